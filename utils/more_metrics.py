"""More of what fusion papers print: Nabf and MS-SSIM, each with the one definition given here.

Importing this file adds them to `utils.metrics.METRICS`, so that `score` takes their names. They follow the rules
of `utils/metrics.py`: (H, W) grey levels in [0, 255], fused first, float64, sources exchangeable. Unlike the twelve,
they were not compared with a published program, only with their definitions: values that a paper prints under the
same names may come from other constants. They are the same under `paper` and `standard`, and NaN under `toolbox`,
whose functions of these names are other ones.

FMI, Q_CV and Q_CB are left out: what papers print for them depends on choices (how a window becomes a distribution,
the viewing distance, several constants) that we had no reference values to settle.

Needs numpy and `utils/metrics.py`.
"""

import math

import numpy as np

from utils.metrics import (
    _STRIP_ROWS,
    Metric,
    _filter_columns,
    _filter_rows,
    _gaussian,
    _Images,
    _measure,
    _one_plus_exp,
    _Rules,
    _sobel,
    register,
)

__all__ = ["ms_ssim", "nabf"]


def nabf(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Artifacts: edges of the fused image that are stronger than in either source (Nabf).

    Nabf = sum over such pixels of ((1 - Q_A) g_A + (1 - Q_B) g_B) / sum over all pixels of (g_A + g_B), where Q and
    g are the edge preservation and the Sobel strength of `utils.metrics.qabf`, zeros around the image included. The
    part that is preserved (Qabf), the part that is lost and this one add up to 1 where Qabf takes the same
    preservation for equal edges (protocol `standard`).

    Args:
        fused: grey image, shape (H, W) with H, W >= 3, range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.

    Returns:
        In [0, 1]. Smaller is better; 0 where no edge was added. NaN where both sources are zero everywhere, and
        under `toolbox`.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), a side is shorter than 3, or an image is of another
            shape than fused, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Petrovic and Xydeas, ICCV 2005, in the form of Shreyamsha Kumar, Signal Image Video Process. 7(6), 2013,
        with the sigmoid constants of Xydeas and Petrovic, Electron. Lett. 36(4), 2000, and L = 1, as in Qabf.
        Programs that use other constants for Nabf print other values.

    >>> image = np.array([[0, 0, 90, 90], [0, 0, 90, 90], [0, 0, 90, 90]], dtype=np.uint8)
    >>> nabf(image, image, image // 2)
    0.0
    """
    return _measure("Nabf", protocol, fused, a, b)


def ms_ssim(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Structural similarity over five scales, averaged over the sources (MS-SSIM).

    MS-SSIM = (M(F, A) + M(F, B)) / 2, M = l_5^0.1333 prod_j c_j^w_j with w = 0.0448 0.2856 0.3001 0.2363 0.1333 and
    c_j = mean((2 v_xy + C2) / (v_x + v_y + C2)) at scale j; in the last factor the map under the mean is multiplied
    by the luminance (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1), which is how l_5 comes in. Windows are Gaussian, 11 x
    11 with sigma 1.5, whole windows only; C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. From scale to scale, 2 x 2
    blocks are averaged; the last row or column of an odd size counts twice.

    Args:
        fused: grey image, shape (H, W) with H, W >= 161, range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`. The dynamic range is 255 under each of them.

    Returns:
        In [0, 1], 1 for F = A = B. A scale whose mean is negative counts as 0. NaN under `toolbox`.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), a side is shorter than 161, or an image is of another
            shape than fused, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Wang, Simoncelli and Bovik, Asilomar Conf. Signals, Systems and Computers, 2003. The average over two
        sources is that of fusion papers; some print the sum.

    >>> y, x = np.mgrid[0:161, 0:176]
    >>> image = (x * y) % 256
    >>> round(ms_ssim(image, image, image), 12)
    1.0
    """
    return _measure("MS-SSIM", protocol, fused, a, b)


# --- Nabf ------------------------------------------------------------------------------------------------


def _nabf(images: _Images, rules: _Rules) -> float:
    if not rules.prints_more:
        return math.nan
    padded = np.pad(images.planes, ((0, 0), (1, 1), (1, 1))).astype(np.float64)
    added = total = 0.0
    for top in range(0, images.shape[0], _STRIP_ROWS):
        strength, angle = _sobel(padded[:, top : top + _STRIP_ROWS + 2])
        fused, sources = strength[0], strength[1:]
        total += float(np.sum(sources))
        stronger = (fused > sources).all(axis=0)
        sources = sources[:, stronger]
        loss = _one_plus_exp(sources / fused[stronger], -15, 7.5)
        loss *= _one_plus_exp(np.abs(angle[1:, stronger] - angle[0, stronger]), 44 / np.pi, -4.4)
        added += float(np.sum((1 - 0.9994 * 0.9879 / loss) * sources))
    return added / total if total > 0 else math.nan


# --- MS-SSIM ---------------------------------------------------------------------------------------------

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_WINDOW = _gaussian(11, sigma=1.5)


def _ms_ssim(images: _Images, rules: _Rules) -> float:
    if not rules.prints_more:
        return math.nan
    planes, product = images.planes.astype(np.float64), np.ones(2)
    for scale, weight in enumerate(_SCALE_WEIGHTS, start=1):
        if scale > 1:
            planes = _blocks_of_two(planes)
        similarity = _similarity(planes, with_luminance=scale == len(_SCALE_WEIGHTS))
        product *= np.maximum(similarity, 0) ** weight
    return float(product.mean())


def _similarity(planes: np.ndarray, with_luminance: bool) -> np.ndarray:
    """Mean similarity of F with A and B, (3, h, w) -> (2,), with or without the factor of luminance."""
    centre = planes.mean(axis=(1, 2), keepdims=True)  # variances of what is left lose fewer digits
    centred = planes - centre
    products = np.concatenate([centred, centred * centred, centred[0] * centred[1:]])
    averages = _filter_rows(_filter_columns(products, _WINDOW), _WINDOW)
    means, squares, covariances = averages[:3], averages[3:6], averages[6:]
    covariances = covariances - means[0] * means[1:]
    variances = squares - means * means
    similarity = (2 * covariances + _C2) / (variances[0] + variances[1:] + _C2)
    if with_luminance:
        means = means + centre
        similarity *= (2 * means[0] * means[1:] + _C1) / (means[0] ** 2 + means[1:] ** 2 + _C1)
    return similarity.mean(axis=(1, 2))


def _blocks_of_two(planes: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 blocks, the last row or column repeated where there is an odd number."""
    _, height, width = planes.shape
    even = np.pad(planes, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


# --- Registry --------------------------------------------------------------------------------------------

register(
    Metric(
        key="Nabf",
        name="artifacts",
        better="lower",
        unit="",
        value_range=(0.0, 1.0),
        reference="Petrovic and Xydeas, ICCV 2005; Shreyamsha Kumar, Signal Image Video Process. 7(6), 2013",
        min_side=3,
        function=nabf,
        takes_sources=True,
        compute=_nabf,
    )
)
register(
    Metric(
        key="MS-SSIM",
        name="multi-scale structural similarity",
        better="higher",
        unit="",
        value_range=(0.0, 1.0),
        reference="Wang, Simoncelli and Bovik, Asilomar Conf. Signals, Systems and Computers, 2003",
        min_side=161,
        function=ms_ssim,
        takes_sources=True,
        compute=_ms_ssim,
    )
)
