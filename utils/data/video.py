"""Videos and image sequences: frames in, fused frames out, and a brightness that does not jump between them.

Files are read and written by OpenCV, 8 bits a channel, without sound.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.common import InputError, check_writable
from utils.data.images import to_uint8, write_image
from utils.data.pairs import PairList
from utils.data.sources import Source, frame_source, read_source

SUFFIXES = frozenset(".avi .mp4 .mkv .mov .m4v .mpg .mpeg .webm .wmv .ts".split())

# What OpenCV's wheels write without further software. Of a run that is killed (SIGKILL, power), not interrupted, an
# .avi and an .mkv play as far as they have reached the disk, which lags behind by up to some megabytes; an .mp4 has its
# index at the end, and does not play at all.
CODECS = {".avi": "MJPG", ".mkv": "FFV1", ".mp4": "mp4v"}  # FFV1 is lossless

DEFAULT_RATE = 25.0


Load = Callable[[], tuple[Source, Source]]  # reads a pair, visible first


def is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


class VideoPair:
    """Two videos of one scene, read frame by frame; frames are paired by their number.

    Attributes:
        count: frames of the shorter one as the files say, None where they do not.
        rate: frames a second of the visible one, None where it does not say.
        warning: what is wrong with the pair though it can be fused, or "".
        rest: after the last pair, what was left over, or "".

    Raises:
        FileNotFoundError: no such file.
        InputError: a file is not a video that OpenCV can read.
    """

    def __init__(self, vis: Path, ir: Path) -> None:
        self.paths = (vis, ir)
        self.rest = self.warning = ""
        captures = [_open(path) for path in self.paths]
        counts = [int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) for capture in captures]
        rates = [float(capture.get(cv2.CAP_PROP_FPS)) for capture in captures]
        for capture in captures:
            capture.release()
        self.count = min(counts) if min(counts) > 0 else None
        self.rate = rates[0] if 0 < rates[0] < 1000 else None
        if min(rates) > 0 and abs(rates[0] - rates[1]) > 0.01 * max(rates):
            self.warning = (
                f"{vis} has {rates[0]:g} frames a second and {ir} has {rates[1]:g}; frames are paired by their "
                "number, so the two drift apart: convert one to the rate of the other"
            )

    def __iter__(self) -> Iterator[tuple[str, Load]]:
        """Name, and what gives the two frames, of every pair."""
        captures = [_open(path) for path in self.paths]
        try:
            for number in itertools.count(1):
                frames = [capture.read()[1] for capture in captures]
                if any(frame is None for frame in frames):
                    break
                names = [f"{path}, frame {number}" for path in self.paths]
                yield f"{number:06d}", partial(_sources, names, frames)
        finally:
            for capture in captures:
                capture.release()
        for path, other, frame in zip(self.paths, reversed(self.paths), frames, strict=True):
            if frame is not None:
                self.rest = f"{other} has {number - 1} readable frames and {path} has more; the rest was left out"
        if not self.rest and self.count and number - 1 < 0.98 * self.count:  # the count in a file is an estimate
            self.rest = f"only {number - 1} of {self.count} frames could be read; are the files damaged?"


class SequencePair:
    """The images of two folders as frames, in the order of the numbers in their names, so that 10 follows 9.

    Attributes:
        count: pairs.
        rate, warning, rest: as of `VideoPair`; None and empty.
    """

    def __init__(self, found: PairList) -> None:
        self.pairs = sorted(found.pairs, key=lambda pair: _by_number(pair.name))
        self.count = len(self.pairs)
        self.rate, self.warning, self.rest = None, "", ""

    def __iter__(self) -> Iterator[tuple[str, Load]]:
        for pair in self.pairs:
            yield pair.name, lambda pair=pair: (read_source(pair.vis), read_source(pair.ir))


def _sources(names: Sequence[str], frames: Sequence[np.ndarray]) -> tuple[Source, Source]:
    vis, ir = map(frame_source, names, frames)
    return vis, ir


def _by_number(name: str) -> list[tuple[int, int | str]]:
    parts = re.split("([0-9]+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise InputError(f"{path} is not a video that OpenCV can read; convert it, for instance to .mp4 or .avi")
    return capture


class VideoFile:
    """Writes a video frame by frame; the file has its name once it is whole.

    Until then it is NAME.partial.SUFFIX, and stays that when the block ends by an error or Ctrl-C: what is done can be
    played, and a video that was there before is still there. Use it in a `with` block.

    Args:
        path: .avi (Motion JPEG), .mkv (FFV1, lossless), or .mp4 (MPEG-4).
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
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.written = 0
        self.padded = False
        self._writer: cv2.VideoWriter | None = None
        self._last: np.ndarray | None = None

    def __enter__(self) -> VideoFile:
        return self

    def write(self, image: np.ndarray, name: str = "") -> None:
        """Adds a frame: levels in [0, 255], (H, W) or (H, W, 3) with red first, of the same size each time.

        Raises:
            InputError: another size than before, or this OpenCV cannot write the format.
        """
        pixels = to_uint8(image)
        bgr = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., ::-1]
        # OpenCV would cut off the last row or column of an odd size without a word.
        height, width = bgr.shape[:2]
        self.padded = bool(height % 2 or width % 2)
        bgr = np.ascontiguousarray(np.pad(bgr, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
        if self._writer is None:
            self._writer = self._start(bgr.shape[1], bgr.shape[0])
        elif self._last is not None and bgr.shape != self._last.shape:  # which OpenCV would leave out without a word
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
        return f"frames at {self.rate:g} a second"

    def _start(self, width: int, height: int) -> cv2.VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        code = cv2.VideoWriter.fourcc(*CODECS[self.path.suffix.lower()])
        writer = cv2.VideoWriter(str(self.partial), code, self.rate, (width, height))
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
        # OpenCV says nothing about a full disk.
        kept = _count(self.partial)
        if kept < self.written:
            raise OSError(f"{self.partial}: only {kept} of {self.written} frames were written; is the disk full?")
        os.replace(self.partial, self.path)


class FrameFolder:
    """Writes frames as images into a folder, with the verbs of `VideoFile`.

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

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # each file is whole already

    def write(self, image: np.ndarray, name: str) -> None:
        write_image(self.folder / self.names.get(name, name + self.suffix), image, bits=self.bits)
        self.written += 1

    def stand_in(self) -> str:
        return "left out"


def check_video_name(path: Path) -> None:
    """Raises InputError where a video of that name cannot be written; the suffixes that can are named."""
    if path.suffix.lower() not in CODECS:
        raise InputError(f"{path}: videos are written as one of {' '.join(CODECS)}; .mkv is lossless")


def _count(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if count <= 0:  # the file does not say
        count = 0
        while capture.grab():
            count += 1
    capture.release()
    return count


class RunningRange:
    """Stretches each frame to the full range of the last frames instead of to its own, so that brightness is steady.

    Stretched on its own, as single images are, a frame is brightened or darkened as a whole by one bright pixel that
    comes or goes. Here lowest and highest value are exponential averages over the frames so far; what lies beyond
    them is clipped. Given to `utils.inference.fusing.fuse_arrays` as `normalise`.

    Args:
        frames: after so many frames, a change of the range has been followed to 63 %. 0 stretches each frame alone.
    """

    def __init__(self, frames: float) -> None:
        self.kept = math.exp(-1 / frames) if frames > 0 else 0.0
        self.low = self.high = math.nan
        self.mean_alone = math.nan  # what the mean of the last frame, in [0, 255], were if stretched alone

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


class Flicker:
    """Mean change of a frame's mean level from each frame to the next, in grey levels of 255, for several videos."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._steps = 0

    def add(self, **means: float) -> None:
        """The mean levels of one frame, by the name of the video; the same names each time."""
        if self._last:
            self._steps += 1
            for name, mean in means.items():
                self._sums[name] = self._sums.get(name, 0.0) + abs(mean - self._last[name])
        self._last = means

    def figures(self) -> dict[str, float]:
        """Name -> figure; nothing before the second frame."""
        return {name: total / self._steps for name, total in self._sums.items()}
