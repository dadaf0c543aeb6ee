"""Visual saliency of grey levels: how much a level stands out from all others of its image.

The map of a pixel depends on its level v alone: S(v) = sum over levels j of h(j) |v - j|, with h the histogram of the
image, normalised to 0..255. Training MLFuse needs the maps of the infrared (or CT, PET, SPECT) images.

Source: Zhai and Shah, "Visual Attention Detection in Video Sequences Using Spatiotemporal Cues", ACM Multimedia 2006;
the published maps of MLFuse are equal in every pixel.
"""

from __future__ import annotations

import numpy as np

_LEVELS = 256


def visual_saliency(image: np.ndarray) -> np.ndarray:
    """Saliency map of one image, of the whole image and not of a patch: the histogram is that of what is given.

    Args:
        image: levels in [0, 255], rounded half to even if they are no whole numbers: grey (H, W) as of
            `utils.data.images.read_grey` or `read_luma`, or colour (H, W, C), whose channels share one histogram. The
            published maps are made of colours and turned to grey afterwards, when they are read for the training.

    Returns:
        uint8, the shape of `image`, from 0 (blends in) to 255 (stands out). All 0 for a constant image.

    Raises:
        ValueError: the image is empty, or holds levels outside [0, 255] or NaN.

    >>> visual_saliency(np.array([[10, 10, 10], [10, 12, 200]]))
    array([[  0,   0,   0],
           [  0,   1, 255]], dtype=uint8)
    """
    if not image.size or not (image.min() >= 0 and image.max() <= _LEVELS - 1):
        raise ValueError(f"saliency needs levels in [0, 255], got an image {image.shape} with others or none")
    levels = np.round(image).astype(np.uint8)
    histogram = np.bincount(levels.ravel(), minlength=_LEVELS)
    level = np.arange(_LEVELS)
    distance = np.abs(level[:, None] - level) @ histogram  # whole numbers: no rounding before the last line
    present = distance[histogram > 0]
    low, high = present.min(), present.max()
    if low == high:
        return np.zeros_like(levels)
    table = np.floor(255 * (distance - low) / (high - low) + 0.5).clip(0, 255).astype(np.uint8)
    return table[levels]
