"""A pair of sources from anywhere -> one fused image, in colour where a source has colour.

Where a source comes from, a file or a frame of a video, and how the two are brought to one size is settled here;
what is done with the fused image is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from utils.common import InputError
from utils.data.registration import coverage, resize, warp
from utils.data.images import grey_of_frame, is_coloured, read_colour, read_grey, with_colour_of
from utils.inference.fusing import fuse_arrays

COLOURS = ("both", "vis", "ir", "none")


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


def read_source(path: Path) -> Source:
    """Reads an image file.

    Raises:
        FileNotFoundError, InputError: as `utils.data.images.read_grey`.
    """
    colour = read_colour(path)
    return Source(str(path), read_grey(path), colour if is_coloured(colour) else None)


def frame_source(name: str, bgr: np.ndarray) -> Source:
    """A frame as OpenCV decodes it: uint8 (H, W, 3), blue first."""
    colour = bgr[..., ::-1].astype(np.float32)
    return Source(name, grey_of_frame(bgr), colour if is_coloured(colour) else None)


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


def fuse_sources(
    model: Any,
    vis: Source,
    ir: Source,
    skip: str,
    *,
    colour: str = "both",
    normalise: bool | Callable[[Tensor], Tensor] = True,
    precision: str = "float32",
    max_memory: int | None = None,
    scratch: Path | None = None,
) -> np.ndarray:
    """Fuses the grey levels of two sources of one size, and gives the result the colours of those that have some.

    A system that takes colour is given that of the visible source and sees to it itself.

    Args:
        model, skip, normalise, precision, max_memory, scratch: as of `utils.inference.fusing.fuse_arrays`.
        colour: which sources may give theirs: "both", "vis", "ir", or "none" for a grey result.

    Returns:
        float32 in [0, 255]: (H, W, 3), red first, or (H, W) where no source that may has colour.
    """
    given = vis.colour if model.takes_colour and vis.colour is not None and colour in ("both", "vis") else vis.grey
    fused = fuse_arrays(
        model, given, ir.grey, skip,
        normalise=normalise, precision=precision, max_memory=max_memory, scratch=scratch,
    )  # fmt: skip
    if fused.ndim == 3:
        return np.clip(fused, 0, 255)
    asked = {"both": (vis, ir), "vis": (vis,), "ir": (ir,), "none": ()}[colour]
    colours = [source.colour for source in asked if source.colour is not None]
    # Clipped here, not where files are written: a panel and a video show the same colours as an image file.
    return np.clip(with_colour_of(fused, *colours), 0, 255) if colours else fused
