"""Is the difference between two methods more than chance? Paired tests, intervals and ranks over images.

The tests are scipy's, which is imported where it is used; everything else needs numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils import InputError
from utils.metrics import METRICS
from utils.scores import Row

ROUNDS, SEED = 10_000, 0


@dataclass(frozen=True)
class Comparison:
    """One metric of `method` against another method, over the images for which both have a finite value."""

    method: str
    metric: str
    images: int
    difference: float  # mean of method minus other
    low: float  # 95 % interval of that mean
    high: float
    p: float  # two-sided Wilcoxon signed-rank test
    p_holm: float  # adjusted for all comparisons of the same call

    def verdict(self, level: float = 0.05) -> str:
        """ "better", "worse", or "-" where the adjusted p is not below the level."""
        if not self.p_holm < level:
            return "-"
        return "better" if (self.difference > 0) == (METRICS[self.metric].better == "higher") else "worse"


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean, from 10 000 resamples with a fixed seed; NaN without values."""
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        return math.nan, math.nan
    rng = np.random.default_rng(SEED)
    means = sample[rng.integers(0, sample.size, (ROUNDS, sample.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: compare the result with the level as it is. NaN stays NaN and is not counted.

    Source:
        Holm, Scand. J. Stat. 6(2), 1979.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(rows: Sequence[Row], against: Row) -> list[Comparison]:
    """Every other method of the same protocol against one row, metric by metric. Baselines are no methods.

    Two methods that agree on every image have p = 1; without an image in common, or in a metric that has no values,
    p is NaN. Images on which they agree are left out of the test, as in Wilcoxon's paper.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.stats import wilcoxon
    except ImportError:
        raise InputError("--against needs scipy; install it: pip install scipy") from None
    found = []
    for row in rows:
        if row.is_baseline or row.method == against.method or row.protocol != against.protocol:
            continue
        for metric in next(iter(against.sheet.images.values())):
            differences = _differences(row, against, metric)
            p = math.nan
            if differences.size:
                p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
            low, high = bootstrap_interval(differences)
            mean = float(differences.mean()) if differences.size else math.nan
            found.append((row.method, metric, differences.size, mean, low, high, p))
    adjusted = holm([values[-1] for values in found])
    return [Comparison(*values, p_holm) for values, p_holm in zip(found, adjusted, strict=True)]


def mean_ranks(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Method -> metric -> mean over the images of its rank among the methods, 1 the best, ties averaged.

    Only images that every row has a value for count; the mean is NaN where there is none. Baselines and rows of
    another protocol than the first are left out.
    """
    rows = [row for row in rows if not row.is_baseline and row.protocol == rows[0].protocol]
    ranks: dict[str, dict[str, float]] = {row.method: {} for row in rows}
    for metric in next(iter(rows[0].sheet.images.values()), {}) if rows else ():
        common = set.intersection(*(_images_with(row, metric) for row in rows))
        values = np.array([[row.sheet.images[name][metric] for name in sorted(common)] for row in rows])
        sign = -1 if METRICS[metric].better == "higher" else 1
        for row, mean in zip(rows, _average_ranks(sign * values), strict=True):
            ranks[row.method][metric] = mean
    return ranks


def _average_ranks(values: np.ndarray) -> list[float]:
    """Ranks in each column, ties averaged, then the mean of each row: (methods, images) -> methods."""
    if not values.size:
        return [math.nan] * len(values)
    smaller = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return [float(mean) for mean in (smaller + (equal + 1) / 2).mean(axis=1)]


def _images_with(row: Row, metric: str) -> set[str]:
    return {name for name, values in row.sheet.images.items() if not math.isnan(values[metric])}


def _differences(row: Row, against: Row, metric: str) -> np.ndarray:
    others = against.sheet.images
    pairs = [(values[metric], others[name][metric]) for name, values in row.sheet.images.items() if name in others]
    return np.array([one - other for one, other in pairs if math.isfinite(one) and math.isfinite(other)])
