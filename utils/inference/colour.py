"""Two sources of one size -> one fused image, in colour where a source has colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.data.images import with_colour_of
from utils.data.sources import Source
from utils.inference.fusing import fuse_arrays

COLOURS = ("both", "vis", "ir", "none")


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
