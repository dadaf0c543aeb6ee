"""Image-fusion quality metrics, every one under the protocol of an evaluator that papers use.

    score(fused, a, b)                                   # the twelve metrics of CDDFuse's evaluator
    score(fused, a, b, "vifb", metrics=TABLES["vifb"])   # the thirteen of VIFB
    qabf(fused, a, b, protocol="tang-2022")              # one metric

Images are (H, W) numpy arrays of grey levels in [0, 255], of any integer or float dtype; under `vifb` also (H, W, 3).
The fused image comes first. The sources `a` and `b` may be exchanged without changing any value.

The same name means different numbers in different evaluators, so every number belongs to a protocol (`PROTOCOLS`).
`METRICS` holds for each metric its name, direction, unit, range, reference and what the protocols choose differently.
A metric is one function under the decorator `metric`, here or in a file of yours.

Three rules hold everywhere. Arithmetic is float64. An input that has no answer gives a documented value or NaN,
decided explicitly, never a warning. An input that would give a wrong answer (NaN, values outside [0, 255], fractions
that look scaled to [0, 1], images too small) raises an error that says what was expected. Dark images are legal.

Needs numpy and nothing else; the file can be copied into another project as it is.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

# --- Protocols -------------------------------------------------------------------------------------------------------

PROTOCOLS = {
    "paper": "the evaluator published with CDDFuse: SSIM range 2, PSNR peak max(fused), MI in nats, "
    "Qabf equal edges weighted by their strength",
    "standard": "textbook definitions for 8-bit images: SSIM range 255, PSNR peak 255, MI in nats, "
    "Qabf equal edges count as 1",
    "vifb": "the benchmark VIFB (2020): 13 metrics, colour images channel by channel; SSIM 11 x 11 Gaussian, "
    "PSNR from the RMSE over the number of pixels, MI in nats",
    "tang-2022": "the MATLAB toolbox of Tang as in its published tables: 8-bit saturation in SD (under 16) and VIF, "
    "SF and MSE on 0..1, MI in bits, PSNR 48.13 dB higher, no SSIM",
    "tang-2023": "the MATLAB toolbox of Tang since March 2023: SD, VIF, SF and Qabf as in `paper`; MI in bits, "
    "MSE on 0..1, PSNR 48.13 dB higher, no SSIM",
    "toolbox": "another name of tang-2022; until version 0.1 a mixture of tang-2022 and tang-2023",
}
"""Protocol name -> one line that says what is particular about it."""

ALIASES = {"toolbox": "tang-2022"}
TANG = ("tang-2022", "tang-2023")

PAPER_TABLE = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM")
"""The columns of the published CDDFuse tables, in order."""

TWELVE = (*PAPER_TABLE, "AG", "CC", "MSE", "PSNR")
"""The metrics of CDDFuse's evaluator, which `score` returns by default."""

_TANG_TABLE = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "AG", "CC", "MSE", "PSNR")
TABLES = {
    "paper": PAPER_TABLE,
    "standard": PAPER_TABLE,
    "vifb": ("AG", "CE", "EI", "EN", "MI", "PSNR", "Qabf", "Qcb", "Qcv", "RMSE", "SF", "SSIM", "SD"),
    "tang-2022": _TANG_TABLE,
    "tang-2023": _TANG_TABLE,
}
"""Protocol -> the columns that its tables print. `paper` and `standard` define every other metric too; under the
protocols of VIFB and Tang a metric outside their table is NaN."""


def canonical(protocol: str) -> str:
    """The protocol's own name, where an alias was given.

    Raises:
        ValueError: there is no such protocol.

    >>> canonical("toolbox")
    'tang-2022'
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, expected one of: {', '.join(PROTOCOLS)}")
    return ALIASES.get(protocol, protocol)


# --- All metrics at once ---------------------------------------------------------------------------------------------


def score(
    fused: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    protocol: str = "paper",
    metrics: Iterable[str] | None = None,
) -> dict[str, float]:
    """All metrics of one fused image, or those named, under one protocol; work is shared between them.

    Args:
        fused: grey image, shape (H, W), range [0, 255]. To score a file, pass what was read back from it. Under `vifb`
            also (H, W, 3), red first: then every metric is the mean over the channels, but for SF, which takes the
            channels side by side as one image.
        a: first source, same height, width and range; (H, W, 3) only beside such a fused image.
        b: second source, likewise.
        protocol: a name from `PROTOCOLS`.
        metrics: names from `METRICS`, in the order wanted; None means `TWELVE`. Leave out VIF to score images with a
            side shorter than 41.

    Returns:
        Name -> value, in the order of `metrics`. NaN where a metric has no value (each docstring says when).

    Raises:
        TypeError: an image is not a numpy array of integers or floats.
        ValueError: unknown protocol or metric; an image is not (H, W), is smaller than a metric needs, of another
            shape than the fused one, not finite, outside [0, 255] or scaled to [0, 1].

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> a, b = (x * y) % 256, (3 * x + y * y) % 256
    >>> values = score((a + b) // 2, a, b, protocol="standard")
    >>> " ".join(values)
    'EN SD SF MI SCD VIF Qabf SSIM AG CC MSE PSNR'
    >>> score((a + b) // 2, a, b, metrics=["MSE", "EN"]) == {"MSE": values["MSE"], "EN": values["EN"]}
    True
    """
    return _scores((fused, a, b), protocol, TWELVE if metrics is None else metrics)


def _scores(images: tuple[np.ndarray, ...], protocol: str, keys: Iterable[str]) -> dict[str, float]:
    protocol, keys = canonical(protocol), list(keys)
    for key in keys:
        if key not in METRICS:
            raise ValueError(f"unknown metric {key!r}, expected names from: {', '.join(METRICS)}")
    if protocol == "vifb" and np.ndim(images[0]) == 3:
        fused = images[0]
        channels = [
            _scores(tuple(image if np.ndim(image) == 2 else image[..., k] for image in images), protocol, keys)
            for k in range(fused.shape[2])
        ]
        values = {key: float(np.mean([channel[key] for channel in channels])) for key in keys}
        if "SF" in keys:
            values["SF"] = spatial_frequency(np.concatenate(np.moveaxis(fused, 2, 0), axis=1), protocol)
        return values
    checked = Images(*images)
    for key in keys:
        checked.require_side(key, METRICS[key].min_side)
    return {key: METRICS[key].compute(checked, protocol) if defines(protocol, key) else math.nan for key in keys}


def defines(protocol: str, key: str) -> bool:
    """Whether a metric has a value under a protocol.

    >>> defines("paper", "Qcb"), defines("tang-2022", "SSIM")
    (True, False)
    """
    return protocol in ("paper", "standard") or key in TABLES[canonical(protocol)]


# --- The registry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """What a table needs to know about a metric. Unit and range hold for `paper` and `standard`."""

    key: str  # column name
    name: str
    function: Callable[..., float]  # the public one
    compute: Callable[["Images", str], float] = field(repr=False)
    reference: str
    better: str = "higher"  # or "lower"
    unit: str = ""
    low: float = 0.0  # least and largest value
    high: float = math.inf
    min_side: int = 1  # shortest legal side of the images, in pixels
    takes_sources: bool = True  # function(fused, a, b, protocol), or function(fused, protocol)
    choices: str = ""  # what the protocols choose differently
    units: Mapping[str, str] = field(default_factory=dict)  # of the protocols that have another unit

    def unit_in(self, protocol: str) -> str:
        """The unit under a protocol; "" for a pure number.

        >>> METRICS["MI"].unit_in("paper"), METRICS["MI"].unit_in("tang-2022")
        ('nats', 'bits')
        """
        return self.units.get(canonical(protocol), self.unit)


METRICS: dict[str, Metric] = {}
"""Column name -> `Metric`: `TWELVE` in the order in which `score` returns them, then the others."""


def metric(key: str, name: str, **fields: Any) -> Callable[[Callable[["Images", str], float]], Callable[..., float]]:
    """Decorator: makes a metric of a function of (checked images, protocol), and adds it to `METRICS`.

    The decorated function is called as (fused, a, b, protocol="paper"), or (fused, protocol="paper"). Other arguments
    are fields of `Metric`; `reference` has to be given.

    Raises:
        ValueError: the key is taken.
    """
    if key in METRICS:
        raise ValueError(f"a metric called {key!r} is registered already")

    def decorate(compute: Callable[["Images", str], float]) -> Callable[..., float]:
        def of_three(fused: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> float:
            return _scores((fused, a, b), protocol, [key])[key]

        def of_one(fused: np.ndarray, protocol: str = "paper") -> float:
            return _scores((fused,), protocol, [key])[key]

        function = functools.wraps(compute)(of_three if fields.get("takes_sources", True) else of_one)
        del function.__wrapped__  # else help() would show the arguments of `compute`
        made = METRICS[key] = Metric(key, name, function, compute, **fields)
        scale = f"{made.unit or 'No unit'}, in [{made.low:.6g}, {made.high:.6g}]; {made.better} is better"
        function.__doc__ = (
            f"{(compute.__doc__ or name).rstrip()}\n\n    {scale}; sides >= {made.min_side} pixels.\n"
            f"    Arguments and errors as of `score`.\n\n    Source:\n        {made.reference}\n    "
        )
        return function

    return decorate


# --- Checked images, and what several metrics need of them -----------------------------------------------------------

_ROWS = 32  # worked on at a time: few enough to stay in the cache, enough to be worth a call


class Images:
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

    def require_side(self, key: str, needed: int) -> None:
        if min(self.shape) < needed:
            raise ValueError(f"{key} needs images with sides >= {needed}, got {self.shape}")

    @cached_property
    def levels(self) -> np.ndarray:
        """Nearest 8-bit levels, half to even: (n, H, W) uint8."""
        whole = (image if image.dtype.kind in "ui" else np.rint(image) for image in self.grey)
        return np.stack([image.astype(np.uint8) for image in whole])

    @cached_property
    def planes(self) -> np.ndarray:
        """All images as (n, H, W): uint8 if they hold whole levels, 8 times smaller, else float64."""
        are_whole = all(np.array_equal(level, image) for level, image in zip(self.levels, self.grey, strict=True))
        return self.levels if are_whole else np.stack(self.grey).astype(np.float64, copy=False)

    @cached_property
    def means(self) -> np.ndarray:
        return np.array([image.mean(dtype=np.float64) for image in self.grey])

    @cached_property
    def covariances(self) -> np.ndarray:
        """Population covariances of F, A, B, F - A and F - B, in grey levels squared: (5, 5); (1, 1) without sources.

        The differences have rows of their own, because var(F) + var(A) - 2 cov(F, A) loses all digits where F is close
        to A.
        """
        planes, products = self.planes.reshape(len(self.grey), -1), 0.0
        # Runs of pixels that stay in the cache, and for which BLAS does not start threads.
        for start in range(0, planes.shape[1], 8192):
            run = planes[:, start : start + 8192] - self.means[:, None]
            rows = np.concatenate([run, run[0] - run[1:]])
            products = products + rows @ rows.T
        found = products / planes.shape[1]
        # A standard deviation under 1e-10 grey levels is rounding, not signal: one 8-bit pixel that differs by one
        # level among 100 million gives 1e-4.
        return np.where(np.abs(found) < 1e-20, 0, found)

    def correlation(self, i: int, j: int) -> float:
        """Pearson correlation of two rows of `covariances`; NaN where one is constant."""
        product = self.covariances[i, i] * self.covariances[j, j]
        return float(self.covariances[i, j] / math.sqrt(product)) if product else math.nan

    @cached_property
    def squared_errors(self) -> np.ndarray:
        """Mean squared differences of F from A and from B, in grey levels squared: (2,)."""
        return self.covariances.diagonal()[3:] + (self.means[0] - self.means[1:]) ** 2

    @cached_property
    def min_max_normalised(self) -> np.ndarray | None:
        """VIFB's whole levels 0..255, half rounded up: (3, H, W) float64. Black images stay black; None where another
        image is constant."""
        planes = np.stack(self.grey).astype(np.float64)
        low, high = (of(planes, axis=(1, 2), keepdims=True) for of in (np.min, np.max))
        if ((low == high) & (high > 0)).any():
            return None
        return np.floor((planes - low) / np.where(high > low, high - low, 1) * 255 + 0.5)


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


def _gaussian(side: int, sigma: float) -> np.ndarray:
    offsets = np.arange(side) - (side - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


# Filtering is a product with a banded matrix. Taken a few outputs at a time the band fills most of that matrix, and
# the product is several times faster than adding shifted copies of the image.

_BLOCK = 12  # outputs of one matrix product, found by measurement


def _filter(planes: np.ndarray, taps: np.ndarray, step: int = 1) -> np.ndarray:
    """Whole windows weighted by the outer product of `taps`, every step-th: (n, H, W) -> about (n, H, W) / step."""
    count, height, width = planes.shape
    tall = np.empty((count, (height - len(taps)) // step + 1, width))
    wide = np.empty((count * tall.shape[1], (width - len(taps)) // step + 1))
    block = _BLOCK // step
    band = np.zeros((block, (block - 1) * step + len(taps)))
    for i, row in enumerate(band):
        row[i * step : i * step + len(taps)] = taps
    # At most 2^18 products at a time: above that BLAS starts threads, which cost more than they gain.
    columns = 2**18 // band.size
    for top, left in itertools.product(range(0, tall.shape[1], block), range(0, width, columns)):
        target = tall[:, top : top + block, left : left + columns]
        reach = (target.shape[1] - 1) * step + len(taps)
        source = planes[:, top * step : top * step + reach, left : left + columns]
        np.matmul(band[: target.shape[1], :reach], source, out=target)
    lines, band = tall.reshape(-1, width), np.ascontiguousarray(band.T)
    for left in range(0, wide.shape[1], block):
        target = wide[:, left : left + block]
        reach = (target.shape[1] - 1) * step + len(taps)
        np.matmul(lines[:, left * step : left * step + reach], band[:reach, : target.shape[1]], out=target)
    return wide.reshape(*tall.shape[:2], -1)


def _local_moments(
    planes: np.ndarray, taps: np.ndarray, weight: int = 1, limit: float = math.inf
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Local means and variances of F, A, B, (3, h, w), and covariances of F with A, B, (2, h, w), some rows at a time.

    The windows are the outer product of `taps`, whole ones only. Where the taps add up to more than 1, `weight` is
    their sum squared, means are `weight` times as large and the others `weight`^2 times: then whole levels stay whole,
    and nothing is rounded. Otherwise a variance can come out below 0. Products of levels end at `limit`.
    """
    for top in range(0, planes.shape[1] - len(taps) + 1, _ROWS):
        tile = planes[:, top : top + _ROWS + len(taps) - 1]
        products = np.empty((8, *tile.shape[1:]))  # F, A, B, FF, AA, BB, FA, FB
        products[:3] = tile
        np.multiply(products[:3], products[:3], out=products[3:6])
        np.multiply(products[0], products[1:3], out=products[6:])
        if limit < math.inf:
            np.minimum(products[3:], limit, out=products[3:])
        sums = _filter(products, taps)
        means, variances, covariances = sums[:3], sums[3:6], sums[6:]
        if weight > 1:
            sums[3:] *= weight
        variances -= means * means
        covariances -= means[0] * means[1:]
        yield means, variances, covariances


def _sobel_sums(padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel sums gx, gy: (n, h + 2, w + 2) -> two of (n, h, w).

    The signs are those of a convolution, which flips the kernels; they matter where an angle of +pi/2, given to
    gx = 0, meets one close to -pi/2.
    """
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return down[:, :, :-2] - down[:, :, 2:], across[:, 2:] - across[:, :-2]


def _sobel_sums_as_conv2(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_sobel_sums` with the terms added in the order of MATLAB's conv2, which decides ties between fractions."""
    above, same, below = p[:, :-2], p[:, 1:-1], p[:, 2:]
    left, middle, right = slice(None, -2), slice(1, -1), slice(2, None)
    gx = -below[..., right] - 2 * same[..., right] - above[..., right]
    gx = gx + below[..., left] + 2 * same[..., left] + above[..., left]
    gy = below[..., right] - above[..., right] + 2 * below[..., middle] - 2 * above[..., middle]
    return gx, gy + below[..., left] - above[..., left]


def _edges(gx: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strength and angle in (-pi/2, pi/2] of Sobel sums, float64."""
    upright = gx == 0
    return np.sqrt(gx * gx + gy * gy), np.arctan(np.where(upright, np.inf, gy) / np.where(upright, 1, gx))


# --- The twelve ------------------------------------------------------------------------------------------------------


@metric("EN", "entropy", unit="bits", high=8.0, takes_sources=False,
        reference="Roberts, van Aardt and Ahmed, J. Appl. Remote Sens. 2(1), 2008")  # fmt: skip
def entropy(images: Images, protocol: str) -> float:
    """Shannon entropy of the grey-level histogram (EN).

    EN = -sum_k p_k log2 p_k over the 256 grey levels. Fractions are rounded to the nearest level first, half to even,
    as published. Larger means more levels are in use, which noise also causes. A constant image gives 0.

    >>> entropy(np.array([[0, 50], [100, 255]], dtype=np.uint8))
    2.0
    """
    return _bits(np.bincount(images.levels[0].ravel()))


def _bits(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log2(p))) + 0.0  # + 0.0 turns the -0.0 of a constant image into 0.0


@metric("SD", "standard deviation", unit="grey levels", high=127.5, takes_sources=False,
        choices="tang-2022: 8-bit saturation, never above 15.97",
        reference="population standard deviation, no single source; VIFB calls it Variance (Rao, Meas. "
                  "Sci. Technol. 8(4), 1997)")  # fmt: skip
def standard_deviation(images: Images, protocol: str) -> float:
    """Population standard deviation of the grey levels (SD).

    SD = sqrt(mean((F - mean(F))^2)), divided by the number of pixels N, not N - 1. Larger means more contrast.
    `tang-2022` computes in uint8: differences are rounded, those below 0 become 0, and squares end at 255.

    >>> standard_deviation(np.array([[10, 20], [10, 20]], dtype=np.uint8))
    5.0
    """
    if protocol == "tang-2022":
        above = np.floor(images.levels[0] - images.means[0] + 0.5).clip(min=0)
        return math.sqrt(np.mean(np.minimum(above * above, 255)))
    return math.sqrt(images.covariances[0, 0])


@metric("SF", "spatial frequency", unit="grey levels per pixel", high=255.0 * math.sqrt(2.0), min_side=2,
        takes_sources=False, choices="tang-2022: on 0..1; vifb: both sums over all elements, the channels side by side",
        units={"tang-2022": "0..1 levels per pixel"},
        reference="Eskicioglu and Fisher, IEEE Trans. Commun. 43(12), 1995")  # fmt: skip
def spatial_frequency(images: Images, protocol: str) -> float:
    """Root mean square of horizontal and vertical grey-level steps (SF).

    SF = sqrt(mean(dx^2) + mean(dy^2)), with dx, dy the first differences, each averaged over its own number, as the
    released CDDFuse does; Eskicioglu and Fisher, and `vifb`, divide both sums by H W. Larger means busier, which noise
    also causes.

    >>> spatial_frequency(np.array([[0, 3], [4, 7]], dtype=np.uint8))
    5.0
    """
    fused = images.grey[0].astype(np.float64)
    squares = [np.diff(fused, axis=axis) ** 2 for axis in (0, 1)]
    if protocol == "vifb":
        return math.sqrt(sum(np.sum(square) for square in squares) / fused.size)
    value = math.sqrt(sum(np.mean(square) for square in squares))
    return value / 255.0 if protocol == "tang-2022" else value


@metric("MI", "mutual information", unit="nats", high=2.0 * math.log(256.0),
        choices="tang: bits (1.4427 times), levels 254 and 255 share a bin of the joint histogram",
        units=dict.fromkeys(TANG, "bits"),
        reference="Qu, Zhang and Yan, Electron. Lett. 38(7), 2002")  # fmt: skip
def mutual_information(images: Images, protocol: str) -> float:
    """Mutual information of the fused image with each source, added (MI).

    MI = I(F, A) + I(F, B), I(X, Y) = sum p(x, y) ln(p(x, y) / (p(x) p(y))) over the joint 256 x 256 histogram, not
    normalised. Fractions are rounded to the nearest level first, half to even, like those of `entropy`. 0 where an
    image is constant; twice the entropy if all are the same. Toolboxes of Tang give bits, and let levels 254 and 255
    share a bin of the joint histogram but not of the single ones, so that their MI can exceed the entropy.

    The released CDDFuse takes every distinct value for a label of its own, which drives each term towards ln(H W)
    where an image holds fractions. On whole levels, which is all that it ever reads, it agrees with us.

    >>> image = np.array([[0, 0], [9, 9]], dtype=np.uint8)
    >>> round(mutual_information(image, image, 255 - image), 12) == round(2 * math.log(2), 12)
    True
    """
    levels = np.minimum(images.levels, 254) if protocol in TANG else images.levels
    row = levels[0].astype(np.uint16) << 8
    total = 0.0
    for i in (1, 2):
        joint = np.bincount((row | levels[i]).ravel(), minlength=256 * 256)
        if protocol in TANG:
            total += sum(_bits(np.bincount(images.levels[k].ravel())) for k in (0, i)) - _bits(joint)
            continue
        joint = joint.reshape(256, 256).astype(np.float64)
        f, s = np.nonzero(joint)
        pairs = joint[f, s]
        # From counts, not frequencies: the ratio is then exactly 1, and MI exactly 0, for a constant image.
        ratio = pairs * row.size / (joint.sum(axis=1)[f] * joint.sum(axis=0)[s])
        total += max(0.0, float(np.sum(pairs * np.log(ratio))) / row.size)
    return total


@metric("SCD", "sum of the correlations of differences", low=-2.0, high=2.0,
        reference="Aslantas and Bendes, AEU Int. J. Electron. Commun. 69(12), 2015")  # fmt: skip
def scd(images: Images, protocol: str) -> float:
    """Sum of the correlations of differences (SCD).

    SCD = r(A, F - B) + r(B, F - A), r the Pearson correlation: what fusing added to one source should look like the
    other. NaN where a source, F - A or F - B is constant, for example where F = A.

    >>> a, b = np.array([[0, 10], [0, 10]]), np.array([[0, 0], [10, 10]])
    >>> round(scd(a + b, a, b), 12)
    2.0
    """
    return images.correlation(1, 4) + images.correlation(2, 3)


_VIF_TINY = 1e-10  # a variance below this is none
_VIF_NOISE = 2.0  # variance of the observer's noise, in grey levels squared


@metric("VIF", "visual information fidelity", min_side=41,
        choices="tang-2022: 8-bit saturation of the products of the first scale",
        reference="Sheikh and Bovik, IEEE Trans. Image Process. 15(2), 2006; for fusion, Han, Cai, Cao "
                  "and Xu, Inf. Fusion 14(2), 2013")  # fmt: skip
def vif(images: Images, protocol: str) -> float:
    """Visual information fidelity in the pixel domain, added over the sources (VIF).

    VIF = v(A, F) + v(B, F), v(R, F) = sum log(1 + g^2 s_R / (s_V + 2)) / sum log(1 + s_R / 2) over all pixels of four
    scales, where locally g = cov(R, F) / s_R is the gain of F over R, s_R the variance of R and s_V = s_F - g cov(R, F)
    what the gain leaves unexplained. Local means are Gaussian of N = 17, 9, 5, 3 taps with sigma N / 5, valid pixels
    only; between scales the images are smoothed and every second row and column is kept. The noise variance is 2.

    2 for F = A = B; it can exceed 2 where F has more contrast than its sources. A constant source counts as 1. Below
    41 pixels the coarsest scale is empty; the released CDDFuse then returns a number without meaning.

    `tang-2022` multiplies in uint8 at the first scale: products end at 255, and that scale adds almost nothing.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> round(vif(image, image, image), 6)
    2.0
    """
    kept, total = np.zeros(2), np.zeros(2)  # information in F about A and B; information in A and B
    saturate = protocol == "tang-2022"
    # Variances do not depend on the means, but lose fewer digits without them.
    planes = images.planes - (0 if saturate else images.means[:, None, None])
    for side in (17, 9, 5, 3):
        taps = _gaussian(side, sigma=side / 5)
        if side < 17:
            planes = _filter(planes, taps, step=2)
        limit = 255 if saturate and side == 17 else math.inf
        for _, variances, covariances in _local_moments(planes, taps, limit=limit):
            # The published order of exceptions comes to this: no gain where it would be negative or where either
            # variance is tiny, and no information in a source of tiny variance.
            fused = variances[0]
            sources = np.where(variances[1:] < _VIF_TINY, 0, variances[1:])
            covariances = np.where(fused < _VIF_TINY, 0, np.maximum(covariances, 0))
            gain = covariances / (sources + _VIF_TINY)
            noise = np.maximum(fused - gain * covariances, _VIF_TINY) + _VIF_NOISE
            kept += np.log(1 + gain * gain * sources / noise).sum(axis=(1, 2))
            # One logarithm for a column of factors: each is below 10^4, so the product of `_ROWS` is no overflow.
            total += np.log((1 + sources / _VIF_NOISE).prod(axis=1)).sum(axis=1)
    # 0 / 0, a constant source, is 1 as published: nothing was there to be lost.
    return float(sum(k / t if t > 0 else 1.0 for k, t in zip(kept, total, strict=True)))


@metric("Qabf", "edge preservation", high=0.9994 * 0.9879, min_side=3,
        choices="equal edges: G = 1 (standard) or their strength (others; tang-2022 on 0..1: rounding decides 2 %)",
        reference="Xydeas and Petrovic, Electron. Lett. 36(4), 2000")  # fmt: skip
def qabf(images: Images, protocol: str) -> float:
    """Edge information carried over from the sources, weighted by edge strength (Qabf).

    Qabf = sum(Q_A g_A + Q_B g_B) / sum(g_A + g_B), with g the Sobel strength of a source and Q = Q_g Q_a from
    Q_g = 0.9994 / (1 + exp(-15 (G - 0.5))), G the weaker of the two strengths over the stronger, and
    Q_a = 0.9879 / (1 + exp(-22 (D - 0.8))), D = 1 - |angle_S - angle_F| / (pi / 2). Zeros surround the image. Angles
    are arctan(gy / gx) in (-pi/2, pi/2], so that the difference of two can reach pi and D can reach -1, as released.

    Where both edges are equally strong, G = 1 under `standard`; otherwise G is that strength itself, as published.
    About 0.975 for F = A = B. NaN where both sources are zero everywhere: a constant image that is not black still has
    edges against the zeros around it.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> 0.97 < qabf(image, image, image) < 0.98
    True
    """
    planes, sobel_sums = images.planes, _sobel_sums
    if protocol == "tang-2022":
        planes, sobel_sums = images.levels / 255, _sobel_sums_as_conv2
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)))
    kept = total = 0.0
    for top in range(0, images.shape[0], _ROWS):
        strength, angle = _edges(*sobel_sums(padded[:, top : top + _ROWS + 2].astype(np.float64)))
        fused, sources = strength[0], strength[1:]
        weaker, stronger = np.minimum(fused, sources), np.maximum(fused, sources)
        ratio = weaker / np.maximum(stronger, 1e-300)  # where both are 0 the pixel has no weight: any ratio will do
        # From 3 on the sigmoid is flat to the last bit, and exp would leave the range of a float.
        np.copyto(ratio, 1 if protocol == "standard" else np.minimum(fused, 3), where=weaker == stronger)
        kept += float(np.sum(sources * _preservation(ratio, angle[1:] - angle[0])))
        total += float(np.sum(sources))
    return kept / total if total > 0 else math.nan


def _preservation(ratio: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Q of `qabf` from the ratio of two strengths and the difference of their angles."""
    return 0.9994 * 0.9879 / ((1 + np.exp(7.5 - 15 * ratio)) * (1 + np.exp(44 / np.pi * np.abs(turn) - 4.4)))


_SSIM_SIDE = 7


@metric("SSIM", "structural similarity", low=-2.0, high=2.0, min_side=_SSIM_SIDE,
        choices="dynamic range 2 (paper) or 255; window 7 x 7 uniform, or 11 x 11 Gaussian (vifb)",
        reference="Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13(4), 2004, who use a "
                  "Gaussian window and one image pair")  # fmt: skip
def ssim(images: Images, protocol: str) -> float:
    """Structural similarity to each source, added (SSIM).

    SSIM = S(F, A) + S(F, B), S the mean over all whole 7 x 7 windows of
    (2 m_x m_y + C1)(2 v_xy + C2) / ((m_x^2 + m_y^2 + C1)(v_x + v_y + C2)), uniform weights, variances divided by 48,
    C1 = (0.01 L)^2, C2 = (0.03 L)^2. The dynamic range L is 255 under `standard`. It is 2 under `paper`: the released
    CDDFuse leaves it to scikit-image, which guessed 2 for every float image until 0.19. With L = 2, C1 and C2 all but
    vanish, and flat regions are decided by tiny variances. `vifb` has L = 255, a Gaussian window of 11 x 11 pixels with
    sigma 1.5, and population variances.

    2 for F = A = B. NaN under the protocols of Tang, whose SSIM is another function, without published values. Sides
    >= 11 under `vifb`.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> round(ssim(image, image, image, protocol="standard"), 12)
    2.0
    """
    if protocol == "vifb":
        images.require_side("SSIM", len(_WINDOW))
        return float(_similarity(images.planes, _WINDOW, 255).sum())
    dynamic_range = 2 if protocol == "paper" else 255
    return float(_similarity(images.planes, np.ones(_SSIM_SIDE), dynamic_range, _SSIM_SIDE**2).sum())


def _similarity(
    planes: np.ndarray, taps: np.ndarray, dynamic_range: float, weight: int = 1, with_luminance: bool = True
) -> np.ndarray:
    """Mean similarity of F with A and B, (3, H, W) -> (2,), with or without the factor of luminance.

    `weight` is that of `_local_moments`. With it, variances are divided by the number of pixels less 1.
    """
    c1, c2 = (0.01 * dynamic_range * weight) ** 2, (0.03 * dynamic_range) ** 2 * max(1, weight * (weight - 1))
    height, width = (side - len(taps) + 1 for side in planes.shape[1:])
    total = np.zeros(2)
    for means, variances, covariances in _local_moments(planes, taps, weight):
        similarity = (2 * covariances + c2) / (variances[0] + variances[1:] + c2)
        if with_luminance:
            squares = means * means
            similarity *= (2 * means[0] * means[1:] + c1) / (squares[0] + squares[1:] + c1)
        total += similarity.sum(axis=(1, 2))
    return total / (height * width)


@metric("AG", "average gradient", unit="grey levels per pixel", high=255.0, min_side=2, takes_sources=False,
        choices="the sum over HW pixels is divided by HW (paper, standard) or by (H-1)(W-1)",
        reference="Cui, Feng, Xu, Li and Chen, Opt. Commun. 341, 2015")  # fmt: skip
def average_gradient(images: Images, protocol: str) -> float:
    """Mean gradient magnitude (AG).

    AG = mean(sqrt((Gx^2 + Gy^2) / 2)), with central differences (f(x+1) - f(x-1)) / 2 inside and one-sided ones, not
    halved, at the borders, as MATLAB's gradient. `vifb` and the toolboxes of Tang divide the sum by (H-1)(W-1) instead
    of HW. Larger means sharper or noisier.

    >>> average_gradient(np.array([[0, 6, 12], [6, 12, 18], [12, 18, 24]], dtype=np.uint8))
    6.0
    """
    fused = images.grey[0].astype(np.float64)
    height, width = fused.shape
    gy, gx = np.gradient(fused)
    squares = gy**2 + gx**2
    pixels = height * width if protocol in ("paper", "standard") else (height - 1) * (width - 1)
    return float(np.sum(np.sqrt(squares / 2))) / pixels


@metric("CC", "correlation coefficient", low=-1.0, high=1.0,
        reference="Deshmukh and Bhosale, Int. J. Image Process. 4(5), 2010")  # fmt: skip
def correlation_coefficient(images: Images, protocol: str) -> float:
    """Mean Pearson correlation of the fused image with its sources (CC).

    CC = (r(A, F) + r(B, F)) / 2. NaN where one of the three images is constant.

    >>> image = np.array([[0, 10], [20, 30]], dtype=np.uint8)
    >>> correlation_coefficient(image, image, 255 - image)
    0.0
    """
    return (images.correlation(0, 1) + images.correlation(0, 2)) / 2


@metric("MSE", "mean squared error", better="lower", unit="grey levels squared", high=255.0**2,
        choices="tang: on 0..1, divided by 255^2",
        units=dict.fromkeys(TANG, "0..1 levels squared"),
        reference="Jagalingam and Hegde, Aquatic Procedia 4, 2015")  # fmt: skip
def mean_squared_error(images: Images, protocol: str) -> float:
    """Mean squared difference from the sources, averaged over the two (MSE).

    MSE = (mean((A - F)^2) + mean((B - F)^2)) / 2. Smaller means closer to the average of the sources. The toolboxes of
    Tang measure on the 0..1 scale: divided by 255^2.

    >>> mean_squared_error(*(np.full((2, 2), level) for level in (10, 12, 16)))
    20.0
    """
    error = float(np.mean(images.squared_errors))
    return error / 255.0**2 if protocol in TANG else error


@metric("PSNR", "peak signal-to-noise ratio", unit="dB", low=-math.inf,
        choices="peak max(fused) (paper) or 255; tang: MSE on 0..1, 48.13 dB too high; vifb: RMSE instead of MSE",
        reference="Jagalingam and Hegde, Aquatic Procedia 4, 2015")  # fmt: skip
def psnr(images: Images, protocol: str) -> float:
    """Peak signal-to-noise ratio against both sources (PSNR).

    PSNR = 10 log10(peak^2 / MSE), with the MSE of `mean_squared_error`. The peak is the largest value of the fused
    image under `paper` and 255 otherwise. The toolboxes of Tang divide 255^2 by an MSE on the 0..1 scale, which puts
    it 20 log10(255) = 48.13 dB above `standard`; `vifb` divides it by its RMSE, about 0.1.

    Infinite where MSE = 0. Under `paper` a black fused image gives -inf, and NaN if the sources are black as well
    (0 / 0).

    >>> psnr(*(np.full((2, 2), level) for level in (100, 90, 110)))
    20.0
    """
    error = METRICS["RMSE" if protocol == "vifb" else "MSE"].compute(images, protocol)
    peak = float(images.grey[0].max()) if protocol == "paper" else 255.0
    if error == 0:
        return math.inf if peak > 0 else math.nan
    return 10 * math.log10(peak**2 / error) if peak > 0 else -math.inf


# --- Others ----------------------------------------------------------------------------------------------------------


@metric("Nabf", "artifacts", better="lower", high=1.0, min_side=3,
        reference="Petrovic and Xydeas, ICCV 2005, in the form of Shreyamsha Kumar, Signal Image Video "
                  "Process. 7(6), 2013")  # fmt: skip
def nabf(images: Images, protocol: str) -> float:
    """Artifacts: edges of the fused image that are stronger than in either source (Nabf).

    Nabf = sum over such pixels of ((1 - Q_A) g_A + (1 - Q_B) g_B) / sum over all pixels of (g_A + g_B), where Q and g
    are the edge preservation and the Sobel strength of `qabf`, with its sigmoid constants and zeros around the image.
    The part that is preserved (Qabf), the part that is lost and this one add up to 1 where Qabf takes the same
    preservation for equal edges (protocol `standard`).

    0 where no edge was added. NaN where both sources are zero everywhere, and under VIFB and Tang. Checked against its
    definition alone: programs that use other constants for Nabf print other values.

    >>> image = np.array([[0, 0, 90, 90], [0, 0, 90, 90], [0, 0, 90, 90]], dtype=np.uint8)
    >>> nabf(image, image, image // 2)
    0.0
    """
    padded = np.pad(images.planes, ((0, 0), (1, 1), (1, 1))).astype(np.float64)
    added = total = 0.0
    for top in range(0, images.shape[0], _ROWS):
        strength, angle = _edges(*_sobel_sums(padded[:, top : top + _ROWS + 2]))
        fused, sources = strength[0], strength[1:]
        total += float(np.sum(sources))
        stronger = (fused > sources).all(axis=0)
        sources = sources[:, stronger]
        kept = _preservation(sources / fused[stronger], angle[1:, stronger] - angle[0, stronger])
        added += float(np.sum((1 - kept) * sources))
    return added / total if total > 0 else math.nan


_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = _gaussian(11, sigma=1.5)


@metric("MS-SSIM", "multi-scale structural similarity", high=1.0, min_side=161,
        reference="Wang, Simoncelli and Bovik, Asilomar Conf. Signals, Systems and Computers, 2003")  # fmt: skip
def ms_ssim(images: Images, protocol: str) -> float:
    """Structural similarity over five scales, averaged over the sources (MS-SSIM).

    MS-SSIM = (M(F, A) + M(F, B)) / 2, M = l_5^0.1333 prod_j c_j^w_j with w = 0.0448 0.2856 0.3001 0.2363 0.1333 and
    c_j = mean((2 v_xy + C2) / (v_x + v_y + C2)) at scale j; in the last factor the map under the mean is multiplied by
    the luminance (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1), which is how l_5 comes in. Windows are Gaussian, 11 x 11 with
    sigma 1.5, whole windows only; C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. From scale to scale, 2 x 2 blocks are
    averaged; the last row or column of an odd size counts twice.

    1 for F = A = B. A scale whose mean is negative counts as 0. NaN under VIFB and Tang. Checked against its
    definition alone; the average over two sources is that of fusion papers, some print the sum.

    >>> y, x = np.mgrid[0:161, 0:176]
    >>> image = (x * y) % 256
    >>> round(ms_ssim(image, image, image), 12)
    1.0
    """
    planes, product = images.planes.astype(np.float64), np.ones(2)
    for scale, weight in enumerate(_SCALE_WEIGHTS, start=1):
        if scale > 1:
            planes = _blocks_of_two(planes)
        similarity = _similarity(planes, _WINDOW, 255, with_luminance=scale == len(_SCALE_WEIGHTS))
        product *= np.maximum(similarity, 0) ** weight
    return float(product.mean())


def _blocks_of_two(planes: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 blocks, the last row or column repeated where there is an odd number."""
    _, height, width = planes.shape
    even = np.pad(planes, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


@metric("CE", "cross entropy", better="lower", unit="bits", low=-math.inf,
        reference="Bulanon, Burks and Alchanatis, Biosyst. Eng. 103(1), 2009, as VIFB computes it")  # fmt: skip
def cross_entropy(images: Images, protocol: str) -> float:
    """Divergence of the fused histogram from those of the sources, averaged over the two (CE).

    CE = (D(A, F) + D(B, F)) / 2, D(S, F) = sum p_S log2(p_S / p_F) over the grey levels that occur in both. Levels
    that F lacks would make the divergence infinite and are skipped, so CE can be negative, and is 0, which looks
    perfect, where F shares no level with a source.

    >>> image = np.array([[0, 50], [100, 255]], dtype=np.uint8)
    >>> cross_entropy(image, image, image)
    0.0
    """
    fused, *sources = (np.bincount(plane.ravel(), minlength=256) / plane.size for plane in images.levels)
    total = 0.0
    for source in sources:
        both = (source > 0) & (fused > 0)
        total += float(np.sum(source[both] * np.log2(source[both] / fused[both])))
    return total / 2


@metric("EI", "edge intensity", unit="grey levels", high=1020.0 * math.sqrt(2.0), min_side=2, takes_sources=False,
        reference="Rajalingam and Priya, Int. J. Eng. Sci. Invention, 2018, as VIFB computes it")  # fmt: skip
def edge_intensity(images: Images, protocol: str) -> float:
    """Mean strength of the Sobel edges of the fused image (EI).

    EI = mean(sqrt(gx^2 + gy^2)), with the kernel [1 2 1; 0 0 0; -1 -2 -1] and its transpose, not scaled, and the
    border of the image repeated around it.

    >>> edge_intensity(np.array([[0, 0, 10, 10]] * 4, dtype=np.uint8))
    20.0
    """
    gx, gy = _sobel_sums(np.pad(images.grey[0].astype(np.float64), 1, mode="edge")[None])
    return float(np.mean(np.sqrt(gx * gx + gy * gy)))


@metric("RMSE", "root mean squared error", better="lower", unit="grey levels", high=255.0,
        choices="vifb: root of the sum divided by the number of pixels, sqrt(HW) times smaller",
        reference="Jagalingam and Hegde, Aquatic Procedia 4, 2015")  # fmt: skip
def rmse(images: Images, protocol: str) -> float:
    """Root mean squared difference from the sources, averaged over the two (RMSE).

    RMSE = (sqrt(mean((A - F)^2)) + sqrt(mean((B - F)^2))) / 2. `vifb` takes sqrt(sum((S - F)^2)) / (H W), about 0.1,
    which falls by half where an image has four times the pixels.

    >>> rmse(*(np.full((2, 2), level) for level in (10, 12, 16)))
    4.0
    """
    value = float(np.mean(np.sqrt(images.squared_errors)))
    return value / math.sqrt(images.grey[0].size) if protocol == "vifb" else value


@metric("Qcb", "Chen-Blum perceptual quality", high=1.0, min_side=2,
        reference="Chen and Blum, Image Vis. Comput. 27(10), 2009, as VIFB computes it")  # fmt: skip
def qcb(images: Images, protocol: str) -> float:
    """How much of the local contrast of the sources, as an eye sees it, is in the fused image (Qcb).

    Each image goes through a min-max normalisation to 0..255 and a contrast sensitivity filter (frequency domain,
    difference of two Gaussians, the image 15 units of angle wide and high). Local contrast is
    c = |blur_2 / blur_4 - 1|, Gaussians of 31 x 31 with sigma 2 and 4, zeros around the image, and masked contrast
    C = c^3 / (c^2 + 0.0001). Qcb = mean(w_A q_A + w_B q_B), q_S the smaller of C_S and C_F over the larger, w_S = C_S^2
    / (C_A^2 + C_B^2).

    1 for F = A = B. A linear change of brightness or contrast of an image changes nothing. NaN where a contrast is 0
    somewhere, as in a constant image.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> round(qcb(image, image, image), 12)
    1.0
    """
    planes = images.min_max_normalised
    if planes is None or not planes.any(axis=(1, 2)).all():
        return math.nan
    radius = _frequencies(images.shape) / 15
    sensitivity = np.exp(-((radius / 15.3870) ** 2)) - 0.7622 * np.exp(-((radius / 1.3456) ** 2))
    seen = np.pad(_filter_spectrum(planes, sensitivity), ((0, 0), (15, 15), (15, 15)))
    offsets = np.arange(-15, 16)
    blurred = []
    for sigma in (2, 4):
        taps = np.exp(-(offsets**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)  # their sum is not quite 1
        blurred.append(_filter(seen, taps))
    with np.errstate(divide="ignore", invalid="ignore"):
        contrast = np.abs(blurred[0] / blurred[1] - 1)
        contrast *= contrast**2 / (contrast**2 + 0.0001)
        fused, sources = contrast[0], contrast[1:]
        quality = np.minimum(fused, sources) / np.maximum(fused, sources)
        value = float(np.mean(np.sum(sources**2 * quality, axis=0) / np.sum(sources**2, axis=0)))
    return value if (contrast > 0).all() and math.isfinite(value) else math.nan


@metric("Qcv", "Chen-Varshney perceptual distance", better="lower", unit="grey levels squared", min_side=2,
        reference="Chen and Varshney, Inf. Fusion 8(2), 2007, as VIFB computes it")  # fmt: skip
def qcv(images: Images, protocol: str) -> float:
    """Visible difference from the sources, weighted by their edges (Qcv).

    Each image goes through a min-max normalisation to 0..255. Qcv = sum(w_A D_A + w_B D_B) / sum(w_A + w_B) over
    blocks of 16 x 16 pixels, completed with zeros: w_S is the sum of the fifth powers of the Sobel strengths of the
    source (zeros around the image), D_S the mean square of S - F after a contrast sensitivity filter (Mannos and
    Sakrison, frequency domain, the image 4 units of angle wide and high).

    0 for F = A = B; hundreds to thousands are usual. Two quirks: the zeros make an edge of the picture's frame, and the
    fifth power lets it dominate; a linear change of contrast changes nothing. NaN where an image is constant and not
    black, or both sources are black.

    >>> y, x = np.mgrid[0:48, 0:64]
    >>> image = (x * y) % 256
    >>> qcv(image, image, image)
    0.0
    """
    planes = images.min_max_normalised
    if planes is None:
        return math.nan
    gx, gy = _sobel_sums(np.pad(planes[1:], ((0, 0), (1, 1), (1, 1))))
    squares = gx * gx + gy * gy
    weights = _block_sums(squares**2 * np.sqrt(squares))
    angle = 0.144 * _frequencies(images.shape) / 4
    sensitivity = 2.6 * (0.0192 + angle) * np.exp(-(angle**1.1))
    distances = _block_sums(_filter_spectrum(planes[1:] - planes[0], sensitivity) ** 2) / 256
    total = float(np.sum(weights))
    return float(np.sum(weights * distances)) / total if total > 0 else math.nan


def _frequencies(shape: tuple[int, int]) -> np.ndarray:
    """Distance from zero in cycles per image width and height, for the half spectrum of `_filter_spectrum`."""
    height, width = shape
    return np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width))


def _filter_spectrum(planes: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Circular filtering by a real response: (n, H, W) -> (n, H, W)."""
    return np.fft.irfft2(np.fft.rfft2(planes) * response, s=planes.shape[1:])


def _block_sums(planes: np.ndarray, side: int = 16) -> np.ndarray:
    """Sums over blocks from the top left, the last ones completed with zeros: (n, H, W) -> (n, H / side, W / side)."""
    count, height, width = planes.shape
    whole = np.pad(planes, ((0, 0), (0, -height % side), (0, -width % side)))
    return whole.reshape(count, whole.shape[1] // side, side, whole.shape[2] // side, side).sum(axis=(2, 4))


SMALLEST_SCORED = max(METRICS[key].min_side for key in PAPER_TABLE)
"""Pixels a side that every metric of the published table can work on."""
