"""Videos and image sequences: frames in, fused frames out, and a brightness that does not jump between them.

Files are read and written by OpenCV, 8 bits a channel, without sound.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.common import InputError, check_target, check_writable, remember_source
from utils.data.images import in_colour, to_uint8, write_image
from utils.data.pairs import PairList, natural
from utils.data.readers import DEEP_FRAMES, PLAIN, Reading, auto_range
from utils.data.sources import Source, frame_source, read_sources

SUFFIXES = frozenset(".avi .mp4 .mkv .mov .m4v .mpg .mpeg .webm .wmv .ts".split())

# The first that this OpenCV can write: its wheels have no H.264 (avc1). Of a run that is killed (SIGKILL, power), not
# interrupted, an .avi and an .mkv play as far as they have reached the disk, which lags behind by up to some
# megabytes; an .mp4 has its index at the end, and does not play at all.
CODECS = {".avi": ("MJPG",), ".mkv": ("FFV1",), ".mp4": ("avc1", "mp4v")}  # FFV1 is lossless

DEFAULT_RATE = 25.0
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is said in our words

Load = Callable[[], tuple[Source, Source]]  # reads a pair, visible first


def is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _for_opencv(path: Path) -> str:
    """The path as OpenCV takes it; InputError where it is not UTF-8, which ends the process in there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: OpenCV opens no video whose path is not UTF-8; rename it") from None
    return str(path)


class _Frames:
    """The frames of a video file in their order.

    Attributes:
        count, rate: frames, and frames a second, as the file says; 0 where it does not.
        read: frames read so far.
        last: the one that was read last.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no video at {path}")
        self._capture = cv2.VideoCapture(_for_opencv(path))
        if not self._capture.isOpened():
            raise InputError(f"{path} is not a video that OpenCV can read; convert it, for instance to .mp4 or .avi")
        if self._capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT) == DEEP_FRAMES:  # OpenCV would cut them to 8 bits
            self._capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.count, self.rate = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), rate if 0 < rate < 1000 else 0.0
        self.read, self.last = 0, None

    def at(self, number: int) -> np.ndarray | None:
        """Reads on to a frame, counted from 0: uint8 (H, W, 3), red first, or uint16 (H, W); None past the end."""
        while self.read <= number:
            there, frame = self._capture.read()
            if not there:
                return None
            self.read += 1
            self.last = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if frame.ndim == 3 else frame
        return self.last


def iter_frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a video, as `_Frames.at` gives it."""
    frames = _Frames(path)
    while (frame := frames.at(frames.read)) is not None:
        yield frame


class VideoPair:
    """Two videos of one scene, read frame by frame: each visible frame with the infrared one nearest in time.

    Where a file does not say its rate, frames are paired by their number.

    Args:
        vis, ir: the files.
        offset: seconds by which the infrared video began later; visible frames before its first one are left out.
        readings: how the values of the two are read.

    Attributes:
        count: pairs, as far as the files say; None where they do not.
        rate: frames a second of the visible one, 25 where it does not say.
        rest: after the last pair, what was left over though no offset was given, or "".

    Raises:
        FileNotFoundError: no such file.
        InputError: a file is not a video that OpenCV can read; or does not say its rate, and there is an offset.
    """

    def __init__(self, vis: Path, ir: Path, offset: float = 0.0, readings: Sequence[Reading] = (PLAIN, PLAIN)) -> None:
        self.paths, self.offset, self.rest = (vis, ir), offset, ""
        self._readings = [
            how._replace(range=auto_range(how, iter_frames(path), str(path))) if how.range == "auto" else how
            for path, how in zip(self.paths, readings, strict=True)
        ]
        for path in self.paths:
            remember_source(path)
        counts, rates = zip(*((each.count, each.rate) for each in map(_Frames, self.paths)), strict=True)
        self.rate = rates[0] or DEFAULT_RATE
        if offset and not all(rates):
            raise InputError(f"--offset: {self.paths[rates.index(0)]} does not say how many frames a second it has")
        self._rates = rates if all(rates) else [1.0, 1.0]
        self._first = max(0, math.ceil(offset * self._rates[0] - 1e-6))
        end = min(counts[0] / self._rates[0], counts[1] / self._rates[1] + offset)  # in seconds
        self.count = max(0, int(end * self._rates[0] + 1e-6) - self._first) if min(counts) > 0 else None

    def __iter__(self) -> Iterator[tuple[str, Load]]:
        """Name, and what gives the two frames, of every pair."""
        both = vis, ir = [_Frames(path) for path in self.paths]
        for number in itertools.count(self._first):
            there = (number / self._rates[0] - self.offset) * self._rates[1] + 1e-6  # in infrared frames
            frames = [vis.at(number), ir.at(math.floor(there + 0.5))]
            if frames[1] is None and there < ir.read:  # its last frame lasts as long as every other
                frames[1] = ir.last
            if any(frame is None for frame in frames):
                break
            names = [f"{path}, frame {each.read}" for path, each in zip(self.paths, both, strict=True)]
            sources = tuple(map(frame_source, names, frames, self._readings))
            yield f"{number + 1:06d}", lambda sources=sources: sources
        done = number - self._first
        if self.count and done < 0.98 * self.count:  # the count in a file is an estimate
            self.rest = f"only {done} of {self.count} frames could be read; are the files damaged?"
        for one, at in ((0, number), (1, math.ceil(there - 2e-6))):
            least = math.ceil(self._rates[one] / min(self._rates))  # less than a frame of the slower one is no rest
            if not self.offset and both[one].at(at + least - 1) is not None:
                ended = f"{self.paths[1 - one]} has {both[1 - one].read} readable frames"
                self.rest = f"{ended} and {self.paths[one]} has more; the rest was left out"


class SequencePair:
    """The images of two folders as frames, in the order of the numbers in their names, so that 10 follows 9.

    Attributes:
        count: pairs.
        rate, rest: as of `VideoPair`; 25 and empty.
    """

    def __init__(self, found: PairList) -> None:
        self.pairs = sorted(found.pairs, key=lambda pair: natural(pair.name))
        self.count = len(self.pairs)
        self.rate, self.rest = DEFAULT_RATE, ""

    def __iter__(self) -> Iterator[tuple[str, Load]]:
        for pair in self.pairs:
            yield pair.name, partial(read_sources, pair)


class VideoFile:
    """Writes a video frame by frame; the file has its name once it is whole.

    Until then it is NAME.partial.SUFFIX, and stays that when the block ends by an error or Ctrl-C: what is done can be
    played, and a video that was there before is still there. Use it in a `with` block.

    Args:
        path: .avi (Motion JPEG), .mkv (FFV1, lossless), or .mp4 (H.264 where this OpenCV has it, else MPEG-4).
        rate: frames a second.

    Attributes:
        written: frames so far.
        padded: whether the last row or column is repeated, for an odd size.

    Raises:
        InputError: another suffix; or, at the first frame, this OpenCV cannot write the format.
        OSError: fewer frames can be read from the whole file than were written, as on a full disk.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        check_video_name(path)
        _for_opencv(path)
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        for target in (path, self.partial):
            check_target(target)
        self.written, self.padded, self.codec = 0, False, ""
        self._writer: cv2.VideoWriter | None = None
        self._last: np.ndarray | None = None

    def __enter__(self) -> VideoFile:
        return self

    def write(self, image: np.ndarray, name: str = "") -> None:
        """Adds a frame: levels in [0, 255], (H, W) or (H, W, 3) with red first, of the same size each time.

        Raises:
            InputError: another size than before, or this OpenCV cannot write the format.
        """
        # OpenCV would cut off the last row or column of an odd size without a word.
        height, width = image.shape[:2]
        self.padded = bool(height % 2 or width % 2)
        padded = np.pad(in_colour(to_uint8(image)), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        bgr = cv2.cvtColor(padded, cv2.COLOR_RGB2BGR)
        if self._writer is None:
            self._writer = self._start(bgr.shape[1], bgr.shape[0])
        elif bgr.shape != self._last.shape:  # which OpenCV would leave out without a word
            raise InputError(f"{self.path}: frame {self.written + 1} is of another size than those before it")
        self._last = bgr
        self.stand_in()

    def stand_in(self) -> str:
        """Adds the last frame again, in place of one that is missing, so that those after it keep their time."""
        if self._writer is not None:
            self._writer.write(self._last)
            self.written += 1
        return "the frame before it stands in"

    @property
    def what(self) -> str:
        return f"frames at {self.rate:g} a second ({self.codec})"

    def _start(self, width: int, height: int) -> cv2.VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for codec in CODECS[self.path.suffix.lower()]:
            code = cv2.VideoWriter.fourcc(*codec)
            writer = cv2.VideoWriter(str(self.partial), code, self.rate, (width, height))
            if writer.isOpened():
                self.codec = codec
                break
        if not writer.isOpened():
            raise InputError(
                f"{self.path}: this OpenCV cannot write {self.path.suffix} videos of {width}x{height} here; "
                f"use one of {' '.join(CODECS)}, or a folder for images"
            )
        return writer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        self._writer.release()  # writes the index
        if kind is not None:
            print(f"\n{self.partial}: the {self.written} frames done so far", file=sys.stderr)
            return
        try:  # OpenCV says nothing about a full disk
            frames = _Frames(self.partial)
            whole = frames.count >= self.written or frames.at(self.written - 1) is not None
        except InputError:
            whole = False
        if not whole:
            raise OSError(f"{self.partial}: fewer than {self.written} frames were written; is the disk full?")
        os.replace(self.partial, self.path)


class FrameFolder:
    """Writes frames as images into a folder, with the verbs of `VideoFile`; each file is whole, so nothing is closed.

    Args:
        folder: is made.
        names: frame -> file name; a frame without one is called by its own name, in `suffix`.
        suffix: the format of those; ".png" if None.
        bits: 8 or 16.
    """

    what = "images"

    def __init__(self, folder: Path, names: dict[str, str], suffix: str | None = None, bits: int = 8) -> None:
        check_writable(folder)
        self.folder, self.names, self.suffix, self.bits = folder, names, suffix or ".png", bits
        self.written = 0

    def write(self, image: np.ndarray, name: str) -> None:
        write_image(self.folder / self.names.get(name, name + self.suffix), image, bits=self.bits)
        self.written += 1

    def stand_in(self) -> str:
        return "left out"


def check_video_name(path: Path) -> None:
    """Raises InputError where a video of that name cannot be written; the suffixes that can are named."""
    if path.suffix.lower() not in CODECS:
        raise InputError(f"{path}: videos are written as one of {' '.join(CODECS)}; .mkv is lossless")


class RunningRange:
    """Min-max normalises each frame by the range of the last frames, not by its own, so that brightness is steady.

    If each frame were normalised alone, as single images are, one bright pixel that comes or goes would brighten or
    darken the whole frame. Here the lowest and highest value are exponential averages over the frames so far; what lies
    beyond them is clipped. Given to `utils.inference.fusing.fuse_arrays` as `normalise`.

    Args:
        frames: after so many frames, a change of the range has been followed to 63 %. 0 normalises each frame alone.
    """

    def __init__(self, frames: float) -> None:
        self.kept = math.exp(-1 / frames) if frames > 0 else 0.0
        self.low = self.high = math.nan
        self.mean_alone = 0.0  # mean of the last frame, in [0, 255], if it were normalised alone

    def __call__(self, fused: Tensor) -> Tensor:
        """One frame as the system gives it, (1, 1, H, W) -> the same in [0, 1]."""
        low, high, mean = (float(value) for value in (fused.min(), fused.max(), fused.float().mean()))
        self.mean_alone = 255 * ((mean - low) / (high - low) if high > low else mean)
        first = math.isnan(self.low)
        self.low = low if first else self.kept * self.low + (1 - self.kept) * low
        self.high = high if first else self.kept * self.high + (1 - self.kept) * high
        if not self.high > self.low:
            return fused.clamp(0, 1)
        return torch.clamp((fused - self.low) / (self.high - self.low), 0, 1)
