"""Is the difference between two methods more than chance? Paired tests and intervals over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, wilcoxon

from utils.evaluation.scores import Row
from utils.evaluation.tables import align
from utils.metrics import METRICS

ROUNDS, SEED = 10_000, 0
LEVEL = 0.05  # adjusted p below it: significant


@dataclass(frozen=True)
class Comparison:
    """One metric of `method` against another method, over the images for which both have a finite value."""

    method: str
    metric: str
    images: int
    difference: float  # mean of method minus other
    low: float  # 95 % interval of that mean
    high: float
    effect: float  # rank-biserial correlation: 1 where method has the larger value on every image, -1 on none
    p: float  # two-sided Wilcoxon signed-rank test
    p_holm: float  # adjusted for all comparisons of the same call

    def verdict(self) -> str:
        """ "better", "worse": what `method` is beside the other; "-" where the adjusted p is not below the level."""
        if not self.p_holm < LEVEL:
            return "-"
        return "better" if (self.effect > 0) == (METRICS[self.metric].better == "higher") else "worse"


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
    """
    found = []
    for row in rows:
        if row.is_baseline or row.method == against.method or row.protocol != against.protocol:
            continue
        for metric in next(iter(against.sheet.images.values())):
            differences = _differences(row, against, metric)
            changed = differences[differences != 0]
            p = effect = mean = math.nan
            if differences.size:
                mean, p = float(differences.mean()), 1.0
            if changed.size:
                p = float(wilcoxon(changed).pvalue)
                ranks = rankdata(np.abs(changed))
                effect = float((ranks * np.sign(changed)).sum() / ranks.sum())
            found.append((row.method, metric, differences.size, mean, *bootstrap_interval(differences), effect, p))
    adjusted = holm([values[-1] for values in found])
    return [Comparison(*values, p_holm) for values, p_holm in zip(found, adjusted, strict=True)]


def mean_intervals(row: Row) -> dict[str, tuple[float, float]]:
    """Metric -> 95 % interval of the mean over the images with a finite value."""
    columns = {key: [values[key] for values in row.sheet.images.values()] for key in row.sheet.mean()}
    return {key: bootstrap_interval([v for v in values if np.isfinite(v)]) for key, values in columns.items()}


def format_statistics(
    intervals: dict[str, dict[str, tuple[float, float]]],
    comparisons: Sequence[Comparison],
    against: str | None,
    digits: int,
) -> list[str]:
    """Tables as text: intervals by method, then the comparisons with one method. Empty ones are left out."""

    def shown(value: float, form: str = f".{digits}f") -> str:
        return "-" if np.isnan(value) else format(value, form)

    parts, signed = [], f"+.{digits}f"
    if intervals:
        lines = [["95 % interval of the mean", *next(iter(intervals.values()))]]
        for method, values in intervals.items():
            lines.append([method, *(f"{shown(low)}..{shown(high)}" for low, high in values.values())])
        parts.append(align(lines))
    if comparisons:
        lines = [["method", "metric", "images", "difference", "95 % interval", "effect", "p", "p (Holm)", "better"]]
        for c in comparisons:
            interval = f"{shown(c.low, signed)}..{shown(c.high, signed)}"
            numbers = (shown(c.effect, "+.2f"), shown(c.p, ".2g"), shown(c.p_holm, ".2g"))
            winner = {"better": c.method, "worse": str(against), "-": "-"}[c.verdict()]
            lines.append([c.method, c.metric, str(c.images), shown(c.difference, signed), interval, *numbers, winner])
        parts.append(
            f"{align(lines)}\ndifference: method minus {against}; effect: rank-biserial correlation; paired Wilcoxon "
            f"signed-rank tests, two-sided, p adjusted by Holm for the {len(comparisons)} lines above; better: the one "
            f"with the better values where adjusted p < {LEVEL}"
        )
    return parts


def _differences(row: Row, against: Row, metric: str) -> np.ndarray:
    others = against.sheet.images
    pairs = [(values[metric], others[name][metric]) for name, values in row.sheet.images.items() if name in others]
    return np.array([one - other for one, other in pairs if math.isfinite(one) and math.isfinite(other)])
