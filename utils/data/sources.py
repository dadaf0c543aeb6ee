"""One source of a pair, a file or a frame of a video, with its colours; and how the two are brought to one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.common import InputError
from utils.data.images import colour_of_pixels, grey_of_pixels, is_coloured
from utils.data.pairs import Pair
from utils.data.readers import PLAIN, Reading, Values, decode, levels_of
from utils.data.registration import coverage, resize, warp


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
    """Reads an image file.

    Raises:
        FileNotFoundError, InputError: as `utils.data.images.read_grey`.
    """
    return _source(str(path), decode(path, reading))


def read_sources(pair: Pair) -> tuple[Source, Source]:
    """Both images of a pair, visible first, as they were asked to be read."""
    return read_source(pair.vis, pair.vis_reading), read_source(pair.ir, pair.ir_reading)


def frame_source(name: str, frame: np.ndarray, reading: Reading = PLAIN) -> Source:
    """A frame as OpenCV decodes it: uint8 (H, W, 3), blue first, or uint16 (H, W)."""
    return _source(name, levels_of(name, Values(frame, (0, np.iinfo(frame.dtype).max)), reading))


def _source(name: str, pixels: np.ndarray) -> Source:
    colour = colour_of_pixels(pixels) if pixels.ndim == 3 else None
    return Source(name, grey_of_pixels(pixels), colour if colour is not None and is_coloured(colour) else None)


@dataclass(frozen=True)
class Registration:
    """How an infrared image comes onto the pixels of the visible one: as it is, resized, or by a homography."""

    resize_ir: bool = False
    homography: np.ndarray | None = None
    advice: str = (  # where sizes differ
        "where both show the same view add --resize-ir, else --homography FILE, a 3x3 matrix from infrared to visible "
        "pixels"
    )

    def __post_init__(self) -> None:
        if self.resize_ir and self.homography is not None:
            raise InputError("--resize-ir and --homography exclude each other: a homography sees to the size, too")

    def __call__(self, vis: Source, ir: Source) -> Source:
        """The infrared source in the size of the visible one.

        Raises:
            InputError: the sizes differ and nothing was asked for, or the homography leads out of the image.
        """
        if self.homography is not None:
            if not coverage(ir.size, self.homography, vis.size):
                raise InputError(
                    f"--homography takes no pixel of {ir.name} into {vis.name}; it must map infrared to visible "
                    "pixels (x, y): is it the inverse?"
                )
            return self._each(ir, lambda image: warp(image, self.homography, vis.size))
        if vis.size == ir.size:
            return ir
        if self.resize_ir:
            return self._each(ir, lambda image: resize(image, vis.size))
        sizes = [f"{width}x{height}" for height, width in (vis.size, ir.size)]
        raise InputError(f"{vis.name} is {sizes[0]} but {ir.name} is {sizes[1]} (width x height); {self.advice}")

    @staticmethod
    def _each(source: Source, change: Callable[[np.ndarray], np.ndarray]) -> Source:
        return Source(source.name, change(source.grey), None if source.colour is None else change(source.colour))
