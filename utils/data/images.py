"""Image files <-> arrays: the published grey rule, writing, colour, images shown together.

An image array here is (H, W) float32 grey levels in [0, 255], a colour image (H, W, 3), red first, in the same range.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.common import InputError, whole_file
from utils.data.readers import PLAIN, SUFFIXES, Reading, decode

WRITABLE = SUFFIXES - {".gif", ".dcm", ".nii", ".nii.gz", ".pbm"}  # the last has black and white alone
DEEP_SUFFIXES = frozenset(".png .tif .tiff".split())  # formats of 16 bits, grey and colour
_GAP = 4  # pixels of white between images that are shown together


def read_grey(path: Path | str, reading: Reading = PLAIN) -> np.ndarray:
    """Grey levels of an image file by the rule behind the published tables.

    Colour is decoded first and turned to grey as floats, 0.299 R + 0.587 G + 0.114 B, then rounded half to
    even. OpenCV's own grey reading differs from it in up to 6 % of the pixels of false-colour PET files.
    EXIF orientation is applied. 16-bit files are scaled to [0, 255] and not rounded, so that no depth is
    lost: 65535 becomes 255 and one 16-bit level 0.0039.

    Args:
        path: a file of the formats of `utils.data.readers`.
        reading: which of its values become black and white, and what else is to be known of it.

    Returns:
        float32 (H, W) in [0, 255].

    Raises:
        FileNotFoundError, InputError: as `utils.data.readers.decode`.
    """
    return grey_of(decode(Path(path), reading))


def read_luma(path: Path | str, reading: Reading = PLAIN) -> np.ndarray:
    """As `read_grey`, without the rounding: what the published training reads."""
    return luma_of(decode(Path(path), reading))


def read_colour(path: Path | str, reading: Reading = PLAIN) -> np.ndarray:
    """As `read_grey`, but colours (H, W, 3), red first; three equal channels for a grey file."""
    return in_colour(decode(Path(path), reading)).astype(np.float32)


def grey_of(image: np.ndarray) -> np.ndarray:
    """Grey levels by the rule of `read_grey`: (H, W) or (H, W, 3), red first, in [0, 255] -> float32 (H, W).

    Those of 8-bit images are rounded half to even.
    """
    return np.round(luma_of(image)) if image.dtype == np.uint8 else luma_of(image)


def luma_of(image: np.ndarray) -> np.ndarray:
    """As `grey_of`, not rounded; also (N, H, W, 3) -> (N, H, W)."""
    if image.ndim == 2:
        return image.astype(np.float32)
    # Blue first: OpenCV adds the channels in their order, and float32 rounds another order differently.
    bgr = np.ascontiguousarray(image[..., ::-1], np.float32).reshape(-1, image.shape[-2], 3)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).reshape(image.shape[:-1])


def in_colour(image: np.ndarray) -> np.ndarray:
    """(H, W) as three equal channels; (H, W, 3) as it is."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def to_uint8(image: np.ndarray, truncate: bool = False) -> np.ndarray:
    """Levels rounded half up and clipped to 0..255.

    Args:
        image: levels in [0, 255], any shape.
        truncate: round down instead, as several published test scripts do: 0.5 levels darker on average.

    Raises:
        InputError: a pixel is not finite: NaN would silently become 0.
    """
    _check_finite(image)
    return np.clip(np.floor(image if truncate else image + 0.5), 0, 255).astype(np.uint8)


def _to_uint16(image: np.ndarray) -> np.ndarray:
    """Levels in [0, 255] -> 0..65535, 257 a level: what `read_grey` undoes."""
    _check_finite(image)
    return np.clip(np.floor(image * np.float64(257) + 0.5), 0, 65535).astype(np.uint16)


def _check_finite(image: np.ndarray) -> None:
    if not np.isfinite(image).all():
        raise InputError(f"an image of shape {image.shape} holds NaN or infinite pixels; it was not written")


def write_image(path: Path | str, image: np.ndarray, truncate: bool = False, bits: int = 8) -> None:
    """Writes an image file of 8 or 16 bits, rounded half up and clipped, whole or not at all.

    Args:
        path: target; the suffix chooses the format. Folders are made.
        image: levels in [0, 255], (H, W), or (H, W, 3), red first.
        truncate: round down to 8 bits; see `to_uint8`.
        bits: 8, or 16 for PNG and TIFF.

    Raises:
        InputError: the array has another shape or holds NaN, the format is unknown or cannot hold it, or the target is
            a source.
    """
    path = Path(path)
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise InputError(f"{path}: an image must be (H, W) or (H, W, 3), got {image.shape}")
    check_format(path, bits)
    suffix = path.suffix.lower()
    if suffix == ".pgm" and image.ndim == 3:
        raise InputError(f"{path}: this format has no colours; use .ppm or .png")
    if suffix == ".ppm":  # this one format has no grey images
        image = in_colour(image)
    pixels = _to_uint16(image) if bits == 16 else to_uint8(image, truncate)
    done, encoded = cv2.imencode(suffix, pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not done:
        raise InputError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels do not fit into this format; use .png")
    with whole_file(path) as temporary:
        encoded.tofile(temporary)


def check_format(path: Path, bits: int = 8) -> None:
    """Raises InputError where a file of that name cannot be written with so many bits, and names those that can."""
    if path.suffix.lower() not in WRITABLE:
        what = "images cannot be written in this format" if path.suffix.lower() in SUFFIXES else "unknown image format"
        raise InputError(f"{path}: {what}; use one of {' '.join(sorted(WRITABLE))}")
    if bits == 16 and path.suffix.lower() not in DEEP_SUFFIXES:
        deep = " ".join(sorted(DEEP_SUFFIXES))
        raise InputError(f"{path} cannot hold 16 bits; use one of {deep} (in a folder: --suffix .png)")


def is_coloured(image: np.ndarray) -> bool:
    """Whether the channels of a colour image differ anywhere."""
    return bool((image != image[..., :1]).any())


def chroma(image: np.ndarray) -> np.ndarray:
    """Blue and red difference, Cb and Cr without their offset: (H, W, 3) colours -> (H, W, 2), 0 where grey.

    Full range, BT.601 (the rule of JPEG files): luma as `read_luma`, Cb = (B - luma) / 1.772 and
    Cr = (R - luma) / 1.402, each in [-127.5, 127.5].
    """
    luma = image @ np.float32([0.299, 0.587, 0.114])
    return (image[..., [2, 0]] - luma[..., None]) / np.float32([1.772, 1.402])


def with_colour_of(grey: np.ndarray, *sources: np.ndarray) -> np.ndarray:
    """A fused grey image with the colours of its sources: the inverse of `chroma`, also in full range.

    Where several sources have colour, each difference is their average weighted by its own size, so that the more
    saturated source has its way; grey sources have no say.

    Args:
        grey: the fused luma, (H, W) in [0, 255].
        sources: colour images (H, W, 3).

    Returns:
        float32 (H, W, 3), beyond [0, 255] where a colour cannot be as bright or as dark as the luma asks for.
    """
    differences = np.stack([chroma(source) for source in sources])
    sizes = np.abs(differences)
    blue, red = np.moveaxis((differences * sizes).sum(axis=0) / np.maximum(sizes.sum(axis=0), 1e-6), -1, 0)
    r, b = grey + np.float32(1.402) * red, grey + np.float32(1.772) * blue
    g = (grey - np.float32(0.299) * r - np.float32(0.114) * b) / np.float32(0.587)
    return np.stack([r, g, b], axis=-1)


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one height in a row, with gaps of white: uint8 (H, W), or (H, W, 3) where one of them has colour."""
    if any(image.ndim == 3 for image in images):
        images = [in_colour(image) for image in images]
    gap = np.full((images[0].shape[0], _GAP, *images[0].shape[2:]), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def one_below_another(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one kind and any width, uint8, each with a gap of white below and filled up with white."""
    width = max(row.shape[1] for row in rows)
    padding = [((0, _GAP), (0, width - row.shape[1]), (0, 0)) for row in rows]
    rows = [np.pad(row, sides[: row.ndim], constant_values=255) for row, sides in zip(rows, padding, strict=True)]
    return np.concatenate(rows)
