"""One source of a pair, a file or a frame of a video, with its colours."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.images import grey_of, is_coloured
from utils.data.pairs import Pair
from utils.data.readers import PLAIN, Reading, Values, decode, levels_of


class Source(NamedTuple):
    """One image of a pair.

    Attributes:
        name: for messages: the file, or the frame of a video.
        grey: float32 (H, W) in [0, 255], by the rule of `read_grey`.
        colour: float32 (H, W, 3), red first, or None where all channels are equal.
    """

    name: str
    grey: np.ndarray
    colour: np.ndarray | None

    @property
    def size(self) -> tuple[int, int]:
        return self.grey.shape[0], self.grey.shape[1]

    @property
    def shown(self) -> np.ndarray:
        return self.grey if self.colour is None else self.colour


def read_source(path: Path, reading: Reading = PLAIN) -> Source:
    """Reads an image file; errors as of `utils.data.images.read_grey`."""
    return _source(str(path), decode(path, reading))


def read_sources(pair: Pair) -> tuple[Source, Source]:
    """Both images of a pair, visible first, as they were asked to be read."""
    return read_source(pair.vis, pair.vis_reading), read_source(pair.ir, pair.ir_reading)


def frame_source(name: str, frame: np.ndarray, reading: Reading) -> Source:
    """A frame of a video: uint8 (H, W, 3), red first, or uint16 (H, W)."""
    return _source(name, levels_of(name, Values(frame), reading))


def _source(name: str, pixels: np.ndarray) -> Source:
    is_grey = pixels.ndim == 2 or not is_coloured(pixels)
    return Source(name, grey_of(pixels), None if is_grey else pixels.astype(np.float32))
