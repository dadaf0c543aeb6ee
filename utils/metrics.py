"""Image-fusion quality metrics on 8-bit grey images: EN SD SF MI SCD VIF Qabf SSIM AG CC MSE PSNR.

Every public function takes (H, W) arrays of grey levels in [0, 255], of any integer or float dtype, and
returns one float. `score` computes all twelve at once and shares the work between them. The fused image
comes first; the two sources `a` and `b` may be exchanged without changing any value.

The same name means different numbers in different evaluators, so every number belongs to a protocol
(`PROTOCOLS`): `paper` reproduces the evaluator published with CDDFuse, quirks included; `standard` is the
textbook; `toolbox` is the MATLAB convention that many papers print. `METRICS` holds for each metric its
name, direction, unit, range and reference, so that a table can say what it prints.

Three rules hold everywhere. Arithmetic is float64. An input that has no answer gives a documented value or
NaN, decided explicitly, never a warning. An input that would give a wrong answer (NaN, values outside
[0, 255], fractions that look scaled to [0, 1], images too small) raises an error that says what was
expected. Dark images are legal.

`utils/more_metrics.py` adds further metrics to the same registry when it is imported (`register`).

Needs numpy and nothing else; the file can be copied into another project as it is.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = [
    "METRICS",
    "PAPER_TABLE",
    "PROTOCOLS",
    "Metric",
    "average_gradient",
    "correlation_coefficient",
    "entropy",
    "mean_squared_error",
    "mutual_information",
    "psnr",
    "qabf",
    "register",
    "scd",
    "score",
    "spatial_frequency",
    "ssim",
    "standard_deviation",
    "vif",
]


# ---------------------------------------------------------------------------------------------------------
# Protocols
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    """What a protocol decides. A new protocol is a new row of `_RULES`, nothing else."""

    description: str
    ssim_range: float | None  # dynamic range L of SSIM; None: the protocol has no SSIM of this kind, so NaN
    psnr_peak: float | None  # None: the largest value of the fused image
    equal_strength_is_one: bool  # G of Qabf where both edges are equally strong; else G is that strength
    mi_unit: float  # one unit of information in nats: 1, or ln 2 for bits
    level_scale: float  # factor on grey levels inside SF, MSE and the MSE of PSNR
    ag_drops_a_border: bool  # AG divides by (H - 1)(W - 1) instead of HW
    prints_more: bool = True  # whether it prints metrics of utils/more_metrics.py as defined there; else NaN
    units: dict[str, str] = field(default_factory=dict)  # where they differ from METRICS[key].unit


_RULES = {
    "paper": _Rules(
        description="the evaluator published with CDDFuse: SSIM range 2, PSNR peak max(fused), MI in nats, "
        "Qabf equal edges weighted by their strength",
        ssim_range=2.0,
        psnr_peak=None,
        equal_strength_is_one=False,
        mi_unit=1.0,
        level_scale=1.0,
        ag_drops_a_border=False,
    ),
    "standard": _Rules(
        description="textbook definitions for 8-bit images: SSIM range 255, PSNR peak 255, MI in nats, "
        "Qabf equal edges count as 1",
        ssim_range=255.0,
        psnr_peak=255.0,
        equal_strength_is_one=True,
        mi_unit=1.0,
        level_scale=1.0,
        ag_drops_a_border=False,
    ),
    "toolbox": _Rules(
        description="the MATLAB toolbox many papers print: MI in bits, SF and MSE on the 0..1 scale, "
        "PSNR 48.13 dB higher, AG over (H-1)(W-1), no SSIM",
        ssim_range=None,
        psnr_peak=255.0,
        equal_strength_is_one=False,
        mi_unit=math.log(2.0),
        level_scale=1.0 / 255.0,
        ag_drops_a_border=True,
        prints_more=False,
        units={"MI": "bits", "SF": "0..1 levels per pixel", "MSE": "0..1 levels squared"},
    ),
}

PROTOCOLS = {name: rules.description for name, rules in _RULES.items()}
"""Protocol name -> one line that says what is particular about it."""


def _rules_of(protocol: str) -> _Rules:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected one of: {', '.join(PROTOCOLS)}")
    return _RULES[protocol]


# ---------------------------------------------------------------------------------------------------------
# All metrics at once
# ---------------------------------------------------------------------------------------------------------


def score(
    fused: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    protocol: str = "paper",
    metrics: Iterable[str] | None = None,
) -> dict[str, float]:
    """All metrics of one fused image, or those named, under one protocol.

    Args:
        fused: grey image, shape (H, W), range [0, 255]. To score a file, pass what was read back from it.
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.
        metrics: names from `METRICS`, in the order wanted; None means the twelve of this file. Leave out VIF
            to score images with a side shorter than 41.

    Returns:
        Name -> value, in the order of `metrics`. NaN where a metric has no value (each docstring says when).

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol or metric; an image is not (H, W), is smaller than a metric needs, of
            another shape than the fused one, not finite, outside [0, 255] or scaled to [0, 1].

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> a, b = (x * y) % 256, (3 * x + y * y) % 256
    >>> values = score((a + b) // 2, a, b, protocol="standard")
    >>> " ".join(values)
    'EN SD SF MI SCD VIF Qabf SSIM AG CC MSE PSNR'
    >>> score((a + b) // 2, a, b, metrics=["MSE", "EN"]) == {"MSE": values["MSE"], "EN": values["EN"]}
    True
    """
    rules = _rules_of(protocol)
    keys = list(TWELVE) if metrics is None else list(metrics)
    for key in keys:
        if key not in METRICS:
            raise ValueError(f"unknown metric {key!r}, expected names from: {', '.join(METRICS)}")
    images = _Images(fused, a, b)
    for key in keys:
        images.require_side(key)
    return {key: METRICS[key].compute(images, rules) for key in keys}


def _measure(key: str, protocol: str, *images: np.ndarray) -> float:
    rules, checked = _rules_of(protocol), _Images(*images)
    checked.require_side(key)
    return METRICS[key].compute(checked, rules)


# ---------------------------------------------------------------------------------------------------------
# One-image metrics
# ---------------------------------------------------------------------------------------------------------


def entropy(fused: np.ndarray) -> float:
    """Shannon entropy of the grey-level histogram (EN).

    EN = -sum_k p_k log2 p_k over the 256 grey levels. Fractions are rounded to the nearest level first, half
    to even, as published.

    Args:
        fused: grey image, shape (H, W), range [0, 255].

    Returns:
        Bits, in [0, 8]. Larger means more levels are in use, which noise also causes. A constant image
        gives 0.

    Raises:
        TypeError: fused is not a numpy array of integers or floats.
        ValueError: fused is not (H, W), empty, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Roberts, van Aardt and Ahmed, J. Appl. Remote Sens. 2(1), 2008.

    >>> entropy(np.array([[0, 50], [100, 255]], dtype=np.uint8))
    2.0
    """
    return _measure("EN", "paper", fused)


def standard_deviation(fused: np.ndarray) -> float:
    """Population standard deviation of the grey levels (SD).

    SD = sqrt(mean((F - mean(F))^2)), divided by the number of pixels N, not N - 1.

    Args:
        fused: grey image, shape (H, W), range [0, 255].

    Returns:
        Grey levels, in [0, 127.5]. Larger means more contrast. A constant image gives 0.

    Raises:
        TypeError: fused is not a numpy array of integers or floats.
        ValueError: fused is not (H, W), empty, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        The released CDDFuse accumulates in float32; we use float64, which agrees to about 1e-6.

    >>> standard_deviation(np.array([[10, 20], [10, 20]], dtype=np.uint8))
    5.0
    """
    return _measure("SD", "paper", fused)


def spatial_frequency(fused: np.ndarray, protocol: str = "paper") -> float:
    """Root mean square of horizontal and vertical grey-level steps (SF).

    SF = sqrt(mean(dx^2) + mean(dy^2)), with dx, dy the first differences. `toolbox` divides by 255.

    Args:
        fused: grey image, shape (H, W) with H, W >= 2, range [0, 255].
        protocol: a name from `PROTOCOLS`.

    Returns:
        Grey levels per pixel, in [0, 360.7]. Larger means busier, which noise also causes.

    Raises:
        TypeError: fused is not a numpy array of integers or floats.
        ValueError: unknown protocol; fused is not (H, W), a side is shorter than 2, or its values are not
            finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Eskicioglu and Fisher, IEEE Trans. Commun. 43(12), 1995. They divide by H*W; we divide by the
        number of differences, as the released CDDFuse does.

    >>> spatial_frequency(np.array([[0, 3], [4, 7]], dtype=np.uint8))
    5.0
    """
    return _measure("SF", protocol, fused)


def average_gradient(fused: np.ndarray, protocol: str = "paper") -> float:
    """Mean gradient magnitude (AG).

    AG = mean(sqrt((Gx^2 + Gy^2) / 2)), with central differences (f(x+1) - f(x-1)) / 2 inside and one-sided
    ones, not halved, at the borders. `toolbox` divides the sum by (H-1)(W-1) instead of HW.

    Args:
        fused: grey image, shape (H, W) with H, W >= 2, range [0, 255].
        protocol: a name from `PROTOCOLS`.

    Returns:
        Grey levels per pixel, in [0, 255]. Larger means sharper or noisier.

    Raises:
        TypeError: fused is not a numpy array of integers or floats.
        ValueError: unknown protocol; fused is not (H, W), a side is shorter than 2, or its values are not
            finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Cui, Feng, Xu, Li and Chen, Opt. Commun. 341, 2015. The border rule is that of the released CDDFuse
        and of MATLAB's gradient.

    >>> average_gradient(np.array([[0, 6, 12], [6, 12, 18], [12, 18, 24]], dtype=np.uint8))
    6.0
    """
    return _measure("AG", protocol, fused)


# ---------------------------------------------------------------------------------------------------------
# Metrics that compare the fused image with its two sources
# ---------------------------------------------------------------------------------------------------------


def mutual_information(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Mutual information of the fused image with each source, added (MI).

    MI = I(F, A) + I(F, B), I(X, Y) = sum p(x, y) ln(p(x, y) / (p(x) p(y))) over the joint 256 x 256
    histogram, not normalised. Nats under `paper` and `standard` (textbooks use either base, and one unit in
    both keeps the columns comparable); bits under `toolbox`, which are nats / ln 2. Fractions are rounded to
    the nearest level first, half to even, like those of `entropy`.

    Args:
        fused: grey image, shape (H, W), range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.

    Returns:
        Nats (or bits), in [0, 2 ln 256]. 0 where an image is constant; twice the entropy if all are the same.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), empty, of another shape than fused, not finite,
            outside [0, 255] or scaled to [0, 1].

    Source:
        Qu, Zhang and Yan, Electron. Lett. 38(7), 2002. Where an image holds fractions, the released CDDFuse
        takes every distinct value for a label of its own, which drives each term towards ln(H W). On whole
        levels, which is all that it ever reads, it agrees with us.

    >>> image = np.array([[0, 0], [9, 9]], dtype=np.uint8)
    >>> round(mutual_information(image, image, 255 - image), 12) == round(2 * math.log(2), 12)
    True
    """
    return _measure("MI", protocol, fused, a, b)


def mean_squared_error(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Mean squared difference from the sources, averaged over the two (MSE).

    MSE = (mean((A - F)^2) + mean((B - F)^2)) / 2. `toolbox` measures on the 0..1 scale: divided by 255^2.

    Args:
        fused: grey image, shape (H, W), range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.

    Returns:
        Grey levels squared, in [0, 65025]. Smaller means closer to the average of the sources.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), empty, of another shape than fused, not finite,
            outside [0, 255] or scaled to [0, 1].

    Source:
        Jagalingam and Hegde, Aquatic Procedia 4, 2015.

    >>> mean_squared_error(*(np.full((2, 2), level) for level in (10, 12, 16)))
    20.0
    """
    return _measure("MSE", protocol, fused, a, b)


def psnr(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Peak signal-to-noise ratio against both sources (PSNR).

    PSNR = 10 log10(peak^2 / MSE), with the MSE of `mean_squared_error`. The peak is the largest value of the
    fused image under `paper` and 255 otherwise. `toolbox` divides 255^2 by an MSE on the 0..1 scale, which
    puts it 20 log10(255) = 48.13 dB above `standard`.

    Args:
        fused: grey image, shape (H, W), range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.

    Returns:
        Decibels. Infinite where MSE = 0. Under `paper` a black fused image gives -inf, and NaN if the sources
        are black as well (0 / 0).

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), empty, of another shape than fused, not finite,
            outside [0, 255] or scaled to [0, 1].

    Source:
        Jagalingam and Hegde, Aquatic Procedia 4, 2015.

    >>> psnr(*(np.full((2, 2), level) for level in (100, 90, 110)))
    20.0
    """
    return _measure("PSNR", protocol, fused, a, b)


def correlation_coefficient(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Mean Pearson correlation of the fused image with its sources (CC).

    CC = (r(A, F) + r(B, F)) / 2.

    Args:
        fused: grey image, shape (H, W), range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.

    Returns:
        In [-1, 1]. NaN where one of the three images is constant.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: an image is not (H, W), empty, of another shape than fused, not finite, outside
            [0, 255] or scaled to [0, 1].

    Source:
        Deshmukh and Bhosale, Int. J. Image Process. 4(5), 2010.

    >>> image = np.array([[0, 10], [20, 30]], dtype=np.uint8)
    >>> correlation_coefficient(image, image, 255 - image)
    0.0
    """
    return _measure("CC", "paper", fused, a, b)


def scd(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the correlations of differences (SCD).

    SCD = r(A, F - B) + r(B, F - A), r the Pearson correlation: what fusing added to one source should look
    like the other.

    Args:
        fused: grey image, shape (H, W), range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.

    Returns:
        In [-2, 2]. NaN where a source, F - A or F - B is constant, for example where F = A.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: an image is not (H, W), empty, of another shape than fused, not finite, outside
            [0, 255] or scaled to [0, 1].

    Source:
        Aslantas and Bendes, AEU Int. J. Electron. Commun. 69(12), 2015.

    >>> a, b = np.array([[0, 10], [0, 10]]), np.array([[0, 0], [10, 10]])
    >>> round(scd(a + b, a, b), 12)
    2.0
    """
    return _measure("SCD", "paper", fused, a, b)


def vif(fused: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Visual information fidelity in the pixel domain, added over the sources (VIF).

    VIF = v(A, F) + v(B, F), v(R, F) = sum log(1 + g^2 s_R / (s_V + 2)) / sum log(1 + s_R / 2) over all
    pixels of four scales, where locally g = cov(R, F) / s_R is the gain of F over R, s_R the variance of R
    and s_V = s_F - g cov(R, F) what the gain leaves unexplained. Local means are Gaussian of N = 17, 9, 5, 3
    taps with sigma N / 5, valid pixels only; between scales the images are smoothed and every second row and
    column is kept. The noise variance is 2.

    Args:
        fused: grey image, shape (H, W) with H, W >= 41, range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.

    Returns:
        >= 0, 2 for F = A = B. It can exceed 2 where F has more contrast than its sources. A constant source
        counts as 1.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: an image is not (H, W), a side is shorter than 41, or an image is of another shape than
            fused, not finite, outside [0, 255] or scaled to [0, 1]. Below 41 the coarsest scale is empty; the
            released CDDFuse then returns a number without meaning.

    Source:
        Sheikh and Bovik, IEEE Trans. Image Process. 15(2), 2006; for fusion, Han, Cai, Cao and Xu,
        Inf. Fusion 14(2), 2013. The windows are separable, so each is applied as two 1-D filters.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> round(vif(image, image, image), 6)
    2.0
    """
    return _measure("VIF", "paper", fused, a, b)


def qabf(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Edge information carried over from the sources, weighted by edge strength (Qabf).

    Qabf = sum(Q_A g_A + Q_B g_B) / sum(g_A + g_B), with g the Sobel strength of a source and Q = Q_g Q_a from
    Q_g = 0.9994 / (1 + exp(-15 (G - 0.5))), G the weaker of the two strengths over the stronger, and
    Q_a = 0.9879 / (1 + exp(-22 (D - 0.8))), D = 1 - |angle_S - angle_F| / (pi / 2). Zeros surround the image.

    Args:
        fused: grey image, shape (H, W) with H, W >= 3, range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`. Where both edges are equally strong, G = 1 under `standard`; under
            `paper` and `toolbox` G is that strength itself, as published.

    Returns:
        In [0, 0.988]; about 0.975 for F = A = B. NaN where both sources are zero everywhere: a constant image
        that is not black still has edges against the zeros around it.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), a side is shorter than 3, or an image is of
            another shape than fused, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Xydeas and Petrovic, Electron. Lett. 36(4), 2000. Angles are arctan(gy / gx) in (-pi/2, pi/2], so that
        the difference of two can reach pi and D can reach -1, as in the released CDDFuse.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> 0.97 < qabf(image, image, image) < 0.98
    True
    """
    return _measure("Qabf", protocol, fused, a, b)


def ssim(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
    """Structural similarity to each source, added (SSIM).

    SSIM = S(F, A) + S(F, B), S the mean over all whole 7 x 7 windows of
    (2 m_x m_y + C1)(2 v_xy + C2) / ((m_x^2 + m_y^2 + C1)(v_x + v_y + C2)), uniform weights, variances
    divided by 48, C1 = (0.01 L)^2, C2 = (0.03 L)^2. The dynamic range L is 255 under `standard`. It is 2
    under `paper`: the released CDDFuse leaves it to scikit-image, which guessed 2 for every float image until
    0.19. With L = 2, C1 and C2 all but vanish, and flat regions are decided by tiny variances.

    Args:
        fused: grey image, shape (H, W) with H, W >= 7, range [0, 255].
        a: first source, same shape and range.
        b: second source, same shape and range.
        protocol: a name from `PROTOCOLS`.

    Returns:
        In [-2, 2], 2 for F = A = B. NaN under `toolbox`, whose SSIM is another function that we do not have.

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol; an image is not (H, W), a side is shorter than 7, or an image is of
            another shape than fused, not finite, outside [0, 255] or scaled to [0, 1].

    Source:
        Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13(4), 2004. They use a Gaussian window
        and one image pair.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> round(ssim(image, image, image, protocol="standard"), 12)
    2.0
    """
    return _measure("SSIM", protocol, fused, a, b)


# ---------------------------------------------------------------------------------------------------------
# Checked images, and what several metrics need of them
# ---------------------------------------------------------------------------------------------------------

_STRIP_ROWS = 32  # rows worked on at a time: few enough to stay in the cache, enough to be worth a call


@dataclass(frozen=True)
class _Moments:
    """Population variances and covariances, in grey levels squared.

    The differences are moments of their own, because var(F) + var(A) - 2 cov(F, A) loses all digits where F
    is close to A.
    """

    variances: np.ndarray  # of F, A, B, F - A, F - B: (5,); of F alone without sources: (1,)
    with_fused: np.ndarray  # cov(A, F), cov(B, F): (2,)
    with_difference: np.ndarray  # cov(A, F - B), cov(B, F - A): (2,)


class _Images:
    """The fused image, alone or with its two sources, checked; shared results are computed once.

    `grey` is the list of them as given, in the order fused, a, b.
    """

    def __init__(self, *images: np.ndarray) -> None:
        names = ("fused", "a", "b")[: len(images)]
        self.grey = [_checked(image, name) for image, name in zip(images, names, strict=True)]
        self.shape = self.grey[0].shape
        for image, name in zip(self.grey[1:], names[1:], strict=True):
            if image.shape != self.shape:
                shapes = f"fused {self.shape} and {name} {image.shape}"
                raise ValueError(f"fused and {name} must have the same shape, got {shapes}")

    def require_side(self, key: str) -> None:
        needed = METRICS[key].min_side
        if min(self.shape) < needed:
            raise ValueError(f"{key} needs images with sides >= {needed}, got {self.shape}")

    @cached_property
    def levels(self) -> np.ndarray:
        """Nearest 8-bit levels, half to even: (n, H, W) uint8."""
        whole = (image if image.dtype.kind in "ui" else np.rint(image) for image in self.grey)
        return np.stack([image.astype(np.uint8) for image in whole])

    @cached_property
    def are_whole(self) -> bool:
        return all(np.array_equal(level, image) for level, image in zip(self.levels, self.grey, strict=True))

    @cached_property
    def planes(self) -> np.ndarray:
        """All images as (n, H, W): uint8 if they hold whole levels, 8 times smaller, else float64."""
        return self.levels if self.are_whole else np.stack(self.grey).astype(np.float64, copy=False)

    @cached_property
    def means(self) -> np.ndarray:
        return np.array([image.mean(dtype=np.float64) for image in self.grey])

    @cached_property
    def moments(self) -> _Moments:
        planes = self.planes.reshape(len(self.grey), -1)
        variances, with_fused, with_difference = (np.zeros(n) for n in (2 * len(planes) - 1, 2, 2))
        # Runs of pixels that stay in the cache, and for which BLAS does not start threads.
        for start in range(0, planes.shape[1], 8192):
            run = planes[:, start : start + 8192].astype(np.float64)
            run -= self.means[:, None]
            rows = [*run, *(run[0] - run[1:])]
            variances += [row @ row for row in rows]
            if len(rows) > 1:
                f, a, b, f_minus_a, f_minus_b = rows
                with_fused += (a @ f, b @ f)
                with_difference += (a @ f_minus_b, b @ f_minus_a)
        variances /= planes.shape[1]
        # A standard deviation under 1e-10 grey levels is rounding, not signal: one 8-bit pixel that differs
        # by one level among 100 million gives 1e-4.
        variances[variances < 1e-20] = 0
        return _Moments(variances, with_fused / planes.shape[1], with_difference / planes.shape[1])

    @cached_property
    def squared_error(self) -> float:
        """Mean squared difference of F from A and B, averaged over the two, in grey levels squared."""
        offsets = self.means[0] - self.means[1:]
        return float(np.mean(self.moments.variances[3:] + offsets**2))


def _checked(image: np.ndarray, name: str) -> np.ndarray:
    """The image itself as a plain array, if it is a legal grey image."""
    if not isinstance(image, np.ndarray) or isinstance(image, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a numpy array, got {type(image).__name__}")
    if image.dtype.kind not in "uif":
        raise TypeError(f"{name} must hold integers or floats, got dtype {image.dtype}")
    if image.ndim != 2:
        raise ValueError(f"{name} must be one grey image of shape (H, W), got shape {image.shape}")
    if image.size == 0:
        raise ValueError(f"{name} must hold at least one pixel, got shape {image.shape}")
    image = np.asarray(image)
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 255):  # true for NaN as well
        bad = np.count_nonzero(~np.isfinite(image))
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")
        raise ValueError(f"{name} must hold grey levels in [0, 255], got values from {low} to {high}")
    if high <= 1 and not np.array_equal(image, np.rint(image)):
        # No 8-bit image looks like this, and VIF, Qabf and SSIM would return plausible nonsense for it.
        found = f"fractions up to {high}: multiply by 255 first"
        raise ValueError(f"{name} must hold grey levels in [0, 255], got {found}")
    return image


# ---------------------------------------------------------------------------------------------------------
# Computation: one function per metric, (images, rules) -> float
# ---------------------------------------------------------------------------------------------------------


def _entropy(images: _Images, rules: _Rules) -> float:
    counts = np.bincount(images.levels[0].ravel())
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log2(p))) + 0.0  # + 0.0 turns the -0.0 of a constant image into 0.0


def _standard_deviation(images: _Images, rules: _Rules) -> float:
    return math.sqrt(images.moments.variances[0])


def _spatial_frequency(images: _Images, rules: _Rules) -> float:
    fused = images.grey[0].astype(np.float64)
    return math.sqrt(sum(np.mean(np.diff(fused, axis=axis) ** 2) for axis in (0, 1))) * rules.level_scale


def _average_gradient(images: _Images, rules: _Rules) -> float:
    fused = images.grey[0].astype(np.float64)
    height, width = fused.shape
    squares = _central_differences(fused) ** 2 + _central_differences(fused.T).T ** 2
    pixels = (height - 1) * (width - 1) if rules.ag_drops_a_border else height * width
    return float(np.sum(np.sqrt(squares / 2))) / pixels


def _central_differences(image: np.ndarray) -> np.ndarray:
    """Along the first axis; one-sided and not halved in the first and last row."""
    steps = np.empty_like(image)
    steps[0], steps[-1] = image[1] - image[0], image[-1] - image[-2]
    steps[1:-1] = (image[2:] - image[:-2]) / 2
    return steps


def _mutual_information(images: _Images, rules: _Rules) -> float:
    row = images.levels[0].astype(np.uint16) << 8
    nats = 0.0
    for source in images.levels[1:]:
        joint = np.bincount((row | source).ravel(), minlength=256 * 256).reshape(256, 256).astype(np.float64)
        f, s = np.nonzero(joint)
        pairs = joint[f, s]
        # From counts, not frequencies: the ratio is then exactly 1, and MI exactly 0, for a constant image.
        ratio = pairs * row.size / (joint.sum(axis=1)[f] * joint.sum(axis=0)[s])
        nats += max(0.0, float(np.sum(pairs * np.log(ratio))) / row.size)
    return nats / rules.mi_unit


def _mean_squared_error(images: _Images, rules: _Rules) -> float:
    return images.squared_error * rules.level_scale**2


def _psnr(images: _Images, rules: _Rules) -> float:
    error = _mean_squared_error(images, rules)
    peak = float(images.grey[0].max()) if rules.psnr_peak is None else rules.psnr_peak
    if error == 0:
        return math.inf if peak > 0 else math.nan
    return 10 * math.log10(peak**2 / error) if peak > 0 else -math.inf


def _correlation_coefficient(images: _Images, rules: _Rules) -> float:
    var_f, var_a, var_b = images.moments.variances[:3]
    with_a, with_b = images.moments.with_fused
    return (_pearson(with_a, var_a, var_f) + _pearson(with_b, var_b, var_f)) / 2


def _scd(images: _Images, rules: _Rules) -> float:
    _, var_a, var_b, var_f_minus_a, var_f_minus_b = images.moments.variances
    a_with_rest, b_with_rest = images.moments.with_difference
    return _pearson(a_with_rest, var_a, var_f_minus_b) + _pearson(b_with_rest, var_b, var_f_minus_a)


def _pearson(covariance: float, variance_x: float, variance_y: float) -> float:
    if min(variance_x, variance_y) == 0:
        return math.nan
    return float(covariance / math.sqrt(variance_x * variance_y))


# --- VIF -------------------------------------------------------------------------------------------------

_VIF_ROWS = 36  # in the cache at a time, and
_VIF_BLOCK = 12  # outputs of one matrix product; both found by measurement
_VIF_TINY = 1e-10  # a variance below this is none
_VIF_NOISE = 2.0  # variance of the observer's noise, in grey levels squared


def _vif(images: _Images, rules: _Rules) -> float:
    kept, total = np.zeros(2), np.zeros(2)  # information in F about A and B; information in A and B
    planes, means = images.planes, images.means[:, None, None]
    for side in (17, 9, 5, 3):
        taps = _gaussian(side, sigma=side / 5)
        if side < 17:
            planes, means = _halve(planes, means, taps), np.zeros_like(means)
        for variances, covariances in _local_statistics(planes, means, taps):
            fused, sources = variances[0], variances[1:]
            # The published order of exceptions comes to this: no gain where it would be negative or where
            # either variance is tiny, and no information in a source of tiny variance.
            np.maximum(covariances, 0, out=covariances)
            if fused.min() < _VIF_TINY:
                covariances *= fused >= _VIF_TINY
            if sources.min() < _VIF_TINY:
                sources *= sources >= _VIF_TINY
            gain = covariances / (sources + _VIF_TINY)
            noise = np.multiply(gain, covariances, out=covariances)
            np.subtract(fused, noise, out=noise)
            np.maximum(noise, _VIF_TINY, out=noise)
            noise += _VIF_NOISE
            gain *= gain
            gain *= sources
            gain /= noise
            gain += 1
            sources *= 1 / _VIF_NOISE
            sources += 1
            kept += _sums_of_logs(gain)
            total += _sums_of_logs(sources)
    # 0 / 0, a constant source, is 1 as published: nothing was there to be lost.
    return float(sum(k / t if t > 0 else 1.0 for k, t in zip(kept, total, strict=True)))


def _sums_of_logs(factors: np.ndarray) -> np.ndarray:
    """Sum of log over the last two axes: (2, h, w) -> (2,). One logarithm per column of h factors.

    The product cannot overflow: a factor is at most 1 + (255 / 2)^2 / 2 < 10^4, and h at most `_VIF_ROWS`.
    """
    return np.log(np.multiply.reduce(factors, axis=1)).sum(axis=1)


def _local_statistics(
    planes: np.ndarray, means: np.ndarray, taps: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weighted variances of F, A, B, (3, h, w), and covariances of F with A, B, (2, h, w), in strips of rows.

    The weights are the outer product of `taps` with itself, over pixels with a whole window. Variances do not
    depend on `means`, (3, 1, 1), but lose fewer digits without them, and a constant image becomes all 0. By
    rounding, a variance can come out below 0.
    """
    _, height, width = planes.shape
    overlap = len(taps) - 1
    rows = np.empty((8, _VIF_ROWS + overlap, width))  # F, A, B, FF, AA, BB, FA, FB
    for top in range(0, height - overlap, _VIF_ROWS):
        strip = planes[:, top : top + _VIF_ROWS + overlap]
        products = rows[:, : strip.shape[1]]
        centred = products[:3]
        centred[:] = strip
        centred -= means
        np.multiply(centred, centred, out=products[3:6])
        np.multiply(centred[0], centred[1:], out=products[6:])
        averages = _filter_rows(_filter_columns(products, taps), taps)
        local_means, variances, covariances = averages[:3], averages[3:6], averages[6:]
        covariances -= local_means[0] * local_means[1:]
        local_means *= local_means
        variances -= local_means
        yield variances, covariances


def _gaussian(side: int, sigma: float) -> np.ndarray:
    offsets = np.arange(side) - (side - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


# Filtering is a product with a banded matrix. Taken a few outputs at a time the band fills most of that
# matrix, and the product is several times faster than adding shifted copies of the image.


def _band(taps: np.ndarray, outputs: int, step: int) -> np.ndarray:
    band = np.zeros((outputs, (outputs - 1) * step + len(taps)))
    for i, row in enumerate(band):
        row[i * step : i * step + len(taps)] = taps
    return band


def _filter_columns(planes: np.ndarray, taps: np.ndarray, step: int = 1) -> np.ndarray:
    """Whole windows along the columns, every step-th: (n, H, W) -> (n, (H - len(taps)) // step + 1, W)."""
    count, height, width = planes.shape
    out = np.empty((count, (height - len(taps)) // step + 1, width))
    block = _VIF_BLOCK // step
    band = _band(taps, block, step)
    # Pieces of at most 2^18 products: above that BLAS starts threads, which cost more than they gain.
    piece = 2**18 // band.size
    for top in range(0, out.shape[1], block):
        target = out[:, top : top + block]
        reach = (target.shape[1] - 1) * step + len(taps)
        for left in range(0, width, piece):
            source = planes[:, top * step : top * step + reach, left : left + piece]
            np.matmul(band[: target.shape[1], :reach], source, out=target[:, :, left : left + piece])
    return out


def _filter_rows(planes: np.ndarray, taps: np.ndarray, step: int = 1) -> np.ndarray:
    """Whole windows along the rows, every step-th: (n, H, W) -> (n, H, (W - len(taps)) // step + 1)."""
    count, height, width = planes.shape
    lines = planes.reshape(count * height, width)
    out = np.empty((count * height, (width - len(taps)) // step + 1))
    block = _VIF_BLOCK // step
    band = np.ascontiguousarray(_band(taps, block, step).T)
    for left in range(0, out.shape[1], block):
        target = out[:, left : left + block]
        reach = (target.shape[1] - 1) * step + len(taps)
        np.matmul(lines[:, left * step : left * step + reach], band[:reach, : target.shape[1]], out=target)
    return out.reshape(count, height, -1)


def _halve(planes: np.ndarray, means: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Smooth planes - means, then keep every second row and column from 0: about (n, H / 2, W / 2)."""
    count, height, width = planes.shape
    out = np.empty((count, (height - len(taps)) // 2 + 1, (width - len(taps)) // 2 + 1))
    for top in range(0, out.shape[1], _VIF_ROWS):
        target = out[:, top : top + _VIF_ROWS]
        strip = planes[:, 2 * top : 2 * (top + target.shape[1] - 1) + len(taps)].astype(np.float64)
        strip -= means
        target[:] = _filter_rows(_filter_columns(strip, taps, step=2), taps, step=2)
    return out


# --- Qabf ------------------------------------------------------------------------------------------------


def _qabf(images: _Images, rules: _Rules) -> float:
    padded = np.pad(images.planes, ((0, 0), (1, 1), (1, 1)))
    # Sobel sums of whole levels stay within +-1020: exact in 16 bits, at a quarter of the traffic.
    dtype = np.int16 if images.are_whole else np.float64
    kept = total = 0.0
    for top in range(0, images.shape[0], _STRIP_ROWS):
        strength, angle = _sobel(padded[:, top : top + _STRIP_ROWS + 2].astype(dtype))
        fused, sources = strength[0], strength[1:]
        ratio = np.minimum(fused, sources)
        stronger = np.maximum(fused, sources)
        equal = ratio == stronger
        stronger[stronger == 0] = 1  # both 0: the pixel has no weight, any ratio will do
        ratio /= stronger
        if not rules.equal_strength_is_one:
            # From 3 on the sigmoid is flat to the last bit, and exp would leave the range of a float.
            np.copyto(ratio, np.minimum(fused, 3), where=equal)
        difference = np.abs(angle[1:] - angle[0])
        # Q = 0.9994 * 0.9879 / loss with loss = (1 + exp(-15 (G - 0.5))) (1 + exp(-22 (D - 0.8)))
        # and D = 1 - difference / (pi / 2).
        loss = _one_plus_exp(ratio, -15, 7.5)
        loss *= _one_plus_exp(difference, 44 / np.pi, -4.4)
        kept += float(np.sum(np.divide(sources, loss, out=loss)))
        total += float(np.sum(sources))
    return 0.9994 * 0.9879 * kept / total if total > 0 else math.nan


def _one_plus_exp(values: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """1 + exp(slope * values + offset), in place."""
    values *= slope
    values += offset
    np.exp(values, out=values)
    values += 1
    return values


def _sobel(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strength and angle in (-pi/2, pi/2] of the edges: (n, h + 2, w + 2) -> two of (n, h, w) float64.

    The signs are those of a convolution, which flips the kernels; they matter where an angle of +pi/2, given
    to gx = 0, meets one close to -pi/2.
    """
    smooth = 2 * padded[:, 1:-1]
    smooth += padded[:, :-2]
    smooth += padded[:, 2:]
    gx = (smooth[:, :, :-2] - smooth[:, :, 2:]).astype(np.float64, copy=False)
    smooth = 2 * padded[:, :, 1:-1]
    smooth += padded[:, :, :-2]
    smooth += padded[:, :, 2:]
    gy = (smooth[:, 2:] - smooth[:, :-2]).astype(np.float64, copy=False)
    strength = gx * gx
    strength += gy * gy
    np.sqrt(strength, out=strength)
    upright = gx == 0
    gx[upright] = 1
    gy /= gx
    gy[upright] = np.inf
    return strength, np.arctan(gy, out=gy)


# --- SSIM ------------------------------------------------------------------------------------------------

_SSIM_SIDE = 7


def _ssim(images: _Images, rules: _Rules) -> float:
    if rules.ssim_range is None:
        return math.nan
    # With whole levels everything up to the constants is a whole number below 2^29, exact in 32 bits.
    dtype = np.int32 if images.are_whole else np.float64
    count, overlap = _SSIM_SIDE**2, _SSIM_SIDE - 1
    # Sums instead of means and variances: numerator and denominator are multiplied by count^3 (count - 1).
    c1 = (0.01 * rules.ssim_range) ** 2 * count**2
    c2 = (0.03 * rules.ssim_range) ** 2 * count * (count - 1)
    total = 0.0
    height, width = (side - overlap for side in images.shape)
    for top in range(0, height, _STRIP_ROWS):
        strip = images.planes[:, top : top + _STRIP_ROWS + overlap].astype(dtype)
        sums = _box_sums(strip)
        squares = strip * strip
        variances = count * _box_sums(squares[0] + squares[1:])  # of F plus of A, of F plus of B
        covariances = 2 * count * _box_sums(strip[0] * strip[1:])
        products = 2 * sums[0] * sums[1:]
        sums *= sums
        squares = sums[0] + sums[1:]
        variances -= squares
        covariances -= products
        similarity = _plus(covariances, c2)
        similarity *= _plus(products, c1)
        dissimilarity = _plus(variances, c2)
        dissimilarity *= _plus(squares, c1)
        similarity /= dissimilarity
        total += float(np.sum(similarity))
    return total / (height * width)


def _plus(values: np.ndarray, constant: float) -> np.ndarray:
    """values + constant as float64, in place where they are float64 already; converting first is quicker."""
    values = values.astype(np.float64, copy=False)
    values += constant
    return values


def _box_sums(planes: np.ndarray) -> np.ndarray:
    """Sums over 7 x 7 windows, in the dtype given: (n, h, w) -> (n, h - 6, w - 6)."""
    count, height, width = planes.shape
    # 7 = 4 + 2 + 1: four additions instead of six.
    two = planes[:, :-1] + planes[:, 1:]
    tall = two[:, :-5] + two[:, 2:-3]
    tall += two[:, 4:-1]
    tall += planes[:, 6:]
    # One long row per plane is quicker than many short ones. Rows run into each other only in the last six
    # columns, which are cut off.
    tall = tall.reshape(count, -1)
    two = tall[:, :-1] + tall[:, 1:]
    wide = np.empty_like(tall)
    inside = wide[:, :-6]
    np.add(two[:, :-5], two[:, 2:-3], out=inside)
    inside += two[:, 4:-1]
    inside += tall[:, 6:]
    return wide.reshape(count, height - 6, width)[:, :, : width - 6]


# ---------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """What a table needs to know about a metric. Unit and range hold for `paper` and `standard`."""

    key: str  # column name
    name: str
    better: str  # "higher" or "lower"
    unit: str
    value_range: tuple[float, float]
    reference: str
    min_side: int  # shortest legal side of the images, in pixels
    function: Callable[..., float]  # the public one
    takes_sources: bool  # function(fused, a, b), or function(fused)
    compute: Callable[[_Images, _Rules], float] = field(repr=False)

    def unit_in(self, protocol: str) -> str:
        """The unit under a protocol; "" for a pure number.

        >>> METRICS["MI"].unit_in("paper"), METRICS["MI"].unit_in("toolbox")
        ('nats', 'bits')
        """
        return _rules_of(protocol).units.get(self.key, self.unit)


_TABLE = (
    Metric(
        key="EN",
        name="entropy",
        better="higher",
        unit="bits",
        value_range=(0.0, 8.0),
        reference="Roberts, van Aardt and Ahmed, J. Appl. Remote Sens. 2(1), 2008",
        min_side=1,
        function=entropy,
        takes_sources=False,
        compute=_entropy,
    ),
    Metric(
        key="SD",
        name="standard deviation",
        better="higher",
        unit="grey levels",
        value_range=(0.0, 127.5),
        reference="population standard deviation, no single source",
        min_side=1,
        function=standard_deviation,
        takes_sources=False,
        compute=_standard_deviation,
    ),
    Metric(
        key="SF",
        name="spatial frequency",
        better="higher",
        unit="grey levels per pixel",
        value_range=(0.0, 255.0 * math.sqrt(2.0)),
        reference="Eskicioglu and Fisher, IEEE Trans. Commun. 43(12), 1995",
        min_side=2,
        function=spatial_frequency,
        takes_sources=False,
        compute=_spatial_frequency,
    ),
    Metric(
        key="MI",
        name="mutual information",
        better="higher",
        unit="nats",
        value_range=(0.0, 2.0 * math.log(256.0)),
        reference="Qu, Zhang and Yan, Electron. Lett. 38(7), 2002",
        min_side=1,
        function=mutual_information,
        takes_sources=True,
        compute=_mutual_information,
    ),
    Metric(
        key="SCD",
        name="sum of the correlations of differences",
        better="higher",
        unit="",
        value_range=(-2.0, 2.0),
        reference="Aslantas and Bendes, AEU Int. J. Electron. Commun. 69(12), 2015",
        min_side=1,
        function=scd,
        takes_sources=True,
        compute=_scd,
    ),
    Metric(
        key="VIF",
        name="visual information fidelity",
        better="higher",
        unit="",
        value_range=(0.0, math.inf),
        reference="Sheikh and Bovik, IEEE Trans. Image Process. 15(2), 2006; "
        "for fusion, Han, Cai, Cao and Xu, Inf. Fusion 14(2), 2013",
        min_side=41,
        function=vif,
        takes_sources=True,
        compute=_vif,
    ),
    Metric(
        key="Qabf",
        name="edge preservation",
        better="higher",
        unit="",
        value_range=(0.0, 0.9994 * 0.9879),
        reference="Xydeas and Petrovic, Electron. Lett. 36(4), 2000",
        min_side=3,
        function=qabf,
        takes_sources=True,
        compute=_qabf,
    ),
    Metric(
        key="SSIM",
        name="structural similarity",
        better="higher",
        unit="",
        value_range=(-2.0, 2.0),
        reference="Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13(4), 2004",
        min_side=_SSIM_SIDE,
        function=ssim,
        takes_sources=True,
        compute=_ssim,
    ),
    Metric(
        key="AG",
        name="average gradient",
        better="higher",
        unit="grey levels per pixel",
        value_range=(0.0, 255.0),
        reference="Cui, Feng, Xu, Li and Chen, Opt. Commun. 341, 2015",
        min_side=2,
        function=average_gradient,
        takes_sources=False,
        compute=_average_gradient,
    ),
    Metric(
        key="CC",
        name="correlation coefficient",
        better="higher",
        unit="",
        value_range=(-1.0, 1.0),
        reference="Deshmukh and Bhosale, Int. J. Image Process. 4(5), 2010",
        min_side=1,
        function=correlation_coefficient,
        takes_sources=True,
        compute=_correlation_coefficient,
    ),
    Metric(
        key="MSE",
        name="mean squared error",
        better="lower",
        unit="grey levels squared",
        value_range=(0.0, 255.0**2),
        reference="Jagalingam and Hegde, Aquatic Procedia 4, 2015",
        min_side=1,
        function=mean_squared_error,
        takes_sources=True,
        compute=_mean_squared_error,
    ),
    Metric(
        key="PSNR",
        name="peak signal-to-noise ratio",
        better="higher",
        unit="dB",
        value_range=(-math.inf, math.inf),
        reference="Jagalingam and Hegde, Aquatic Procedia 4, 2015",
        min_side=1,
        function=psnr,
        takes_sources=True,
        compute=_psnr,
    ),
)

METRICS = {metric.key: metric for metric in _TABLE}
"""Column name -> `Metric`: the twelve of this file, in the order in which `score` returns them, then those that
were registered."""

TWELVE = tuple(METRICS)
"""Names of the metrics of this file, which `score` returns by default."""


def register(metric: Metric) -> None:
    """Adds a metric to `METRICS`, so that `score` and every table know it by its key.

    Raises:
        ValueError: the key is taken.
    """
    if metric.key in METRICS:
        raise ValueError(f"a metric called {metric.key!r} is registered already")
    METRICS[metric.key] = metric


PAPER_TABLE = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM")
"""The columns of the published CDDFuse tables, in order."""

SMALLEST_SCORED = max(METRICS[key].min_side for key in PAPER_TABLE)
"""Pixels a side that every metric of the table can work on."""
