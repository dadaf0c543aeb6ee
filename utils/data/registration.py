"""Do two images show the same place at the same pixel? A check by edges, and the means to bring them there."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.common import InputError, reason_of, remember_source
from utils.data.sources import Source

TOLERANCE = 2.0  # pixels
FARTHEST = 16  # pixels; edges farther apart are not looked for
_LOOKED_AT = 1024  # pixels a side, from the middle of larger images
_SMALLEST = 32
# A peak below these says nothing. Edges are alike over some pixels, so that an image of N pixels has about N / 36
# independent ones, and the correlation of unrelated images spreads by the root of its inverse.
_CLEAR_PEAK, _CLEAR_GAIN, _SPREADS, _ALIKE = 0.1, 0.02, 4.0, 36.0


class Shift(NamedTuple):
    """Where the edges of the second image lie, seen from those of the first.

    Attributes:
        down, right: pixels; moving the second image by their opposites aligns the pair.
        correlation: of the edges at that shift, in [-1, 1].
        unshifted: the same without a shift.
        clear: the correlation from which on a shift is taken for one, not for chance; higher for small images.
    """

    down: int
    right: int
    correlation: float
    unshifted: float
    clear: float

    @property
    def pixels(self) -> float:
        return math.hypot(self.down, self.right)

    @property
    def misaligned(self) -> bool:
        """Whether the pair looks misaligned by more than `TOLERANCE`: a clear peak, inside the searched range."""
        clear = self.correlation >= self.clear and self.correlation - self.unshifted >= _CLEAR_GAIN
        return clear and self.pixels > TOLERANCE and max(abs(self.down), abs(self.right)) < FARTHEST

    def __str__(self) -> str:
        vertical = f"{abs(self.down)} {'down' if self.down > 0 else 'up'}" if self.down else ""
        horizontal = f"{abs(self.right)} {'right' if self.right > 0 else 'left'}" if self.right else ""
        where = " and ".join(filter(None, (vertical, horizontal)))
        return f"about {self.pixels:.0f} pixels ({where}; edge correlation {self.correlation:.2f} there, " + (
            f"{self.unshifted:.2f} as it is)"
        )


def edge_shift(vis: np.ndarray, ir: np.ndarray) -> Shift | None:
    """The shift of up to `FARTHEST` pixels at which the edges of two images agree best.

    Edges are the square root of the gradient's magnitude, so that neither the sign of a step, which differs between
    sensors, nor a few strong ones decide; their correlation is taken at every shift at once. One shift for the whole
    image: a turned or differently zoomed pair may look aligned on average, and so does parallax at several depths.

    Args:
        vis, ir: grey levels (H, W) of one shape.

    Returns:
        The shift, or None where there is nothing to compare: a side below 32 pixels, or an image without edges.
    """
    height, width = vis.shape
    if min(height, width) < _SMALLEST:
        return None
    top, left = max((height - _LOOKED_AT) // 2, 0), max((width - _LOOKED_AT) // 2, 0)
    middle = np.s_[top : top + _LOOKED_AT, left : left + _LOOKED_AT]
    first, second = _edges(vis[middle]), _edges(ir[middle])
    scale = math.sqrt(float(np.square(first).sum()) * float(np.square(second).sum()))
    if not scale:
        return None
    farthest = min(FARTHEST, min(first.shape) // 4)
    # Padded, so that what leaves the image on one side does not come back on the other.
    padded = tuple(cv2.getOptimalDFTSize(side + farthest) for side in first.shape)
    spectrum = np.conj(np.fft.rfft2(first, padded)) * np.fft.rfft2(second, padded)
    shifts = np.arange(-farthest, farthest + 1)
    correlation = np.fft.irfft2(spectrum, padded)[np.ix_(shifts, shifts)] / scale
    down, right = np.unravel_index(correlation.argmax(), correlation.shape)
    peak, unshifted = correlation[down, right], correlation[farthest, farthest]
    clear = max(_CLEAR_PEAK, _SPREADS * math.sqrt(_ALIKE / first.size))
    return Shift(int(shifts[down]), int(shifts[right]), float(peak), float(unshifted), clear)


def _edges(image: np.ndarray) -> np.ndarray:
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.5)
    magnitude = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    if magnitude.max() < 1e-3:  # what blurring leaves of a constant image
        return np.zeros_like(magnitude)
    edges = np.sqrt(magnitude)
    return edges - edges.mean()


def register(
    vis: Source, ir: Source, *, resize_ir: bool = False, homography: np.ndarray | None = None, advice: str = ""
) -> Source:
    """The infrared source on the pixels of the visible one: as it is, resized, or by a homography.

    Raises:
        InputError: the sizes differ and neither was asked for, which ends in the advice; or the homography leads out
            of the image.
    """
    if homography is not None:
        if not coverage(ir.size, homography, vis.size):
            raise InputError(
                f"--homography takes no pixel of {ir.name} into {vis.name}; it must map infrared to visible "
                "pixels (x, y): is it the inverse?"
            )
        move = partial(warp, homography=homography, size=vis.size)
    elif vis.size == ir.size:
        return ir
    elif resize_ir:
        move = partial(resize, size=vis.size)
    else:
        sizes = [f"{width}x{height}" for height, width in (vis.size, ir.size)]
        raise InputError(f"{vis.name} is {sizes[0]} but {ir.name} is {sizes[1]} (width x height); {advice}")
    return Source(ir.name, move(ir.grey), None if ir.colour is None else move(ir.colour))


def read_homography(path: Path | str) -> np.ndarray:
    """A 3x3 matrix that takes pixels (x, y, 1) of the infrared image to those of the visible one.

    That is the direction of `cv2.findHomography(ir_points, vis_points)`.

    Args:
        path: nine numbers in three rows, separated by blanks or commas, in a text file; a list of three lists in a
            .json file; or an array in a .npy file.

    Raises:
        FileNotFoundError: no such file.
        InputError: not nine finite numbers, or a matrix that cannot be inverted.
    """
    path = Path(path)
    remember_source(path)
    try:
        if path.suffix.lower() == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".json":
            matrix = json.loads(path.read_text())
        else:
            matrix = [[float(number) for number in row.replace(",", " ").split()]
                      for row in path.read_text().splitlines() if row.strip()]  # fmt: skip
        matrix = np.asarray(matrix, np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} is not a homography ({reason_of(error)}); {_WANTED}") from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(f"{path} holds an array of shape {matrix.shape}, or numbers that are not finite; {_WANTED}")
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError(f"{path}: the matrix cannot be inverted, so it maps the image to a line or a point")
    return matrix


_WANTED = "it must hold a 3x3 matrix, infrared to visible pixels, as three rows of three numbers"


def warp(image: np.ndarray, homography: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image, (H, W) or (H, W, 3), on the visible one's pixels (`size`: height, width); its border goes on beyond."""
    return cv2.warpPerspective(image, homography, size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def coverage(shape: tuple[int, int], homography: np.ndarray, size: tuple[int, int]) -> float:
    """The share of the visible image's pixels, in [0, 1], that an infrared image of that shape reaches when warped."""
    reached = cv2.warpPerspective(np.full(shape, 255, np.uint8), homography, size[::-1], flags=cv2.INTER_NEAREST)
    return float((reached > 0).mean())


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image normalised to a height and width: by areas where both shrink, else bilinear. (H, W) or (H, W, 3)."""
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
