"""Pictures of an evaluation: box plots of each metric and a map of mean ranks. Needs matplotlib, imported on use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.common import InputError, whole_file
from utils.evaluation.scores import Row
from utils.evaluation.statistics import mean_ranks
from utils.metrics import METRICS


def plot(folder: Path, rows: Sequence[Row], facts: str) -> list[Path]:
    """Writes boxplots.png and, for two methods or more, ranks.png. Returns their paths.

    Args:
        folder: made where it is missing.
        rows: rows of one protocol.
        facts: one line that says protocol, number of pairs and images; it goes under each picture.

    Raises:
        InputError: matplotlib is not installed.
    """
    written = [_save(_box_plots(rows, facts), folder / "boxplots.png")]
    ranks = mean_ranks(rows)
    if len(ranks) > 1:
        written.append(_save(_rank_map(ranks, facts), folder / "ranks.png"))
    return written


def import_figure() -> type:
    """matplotlib's Figure, without pyplot, which keeps global state and may look for a screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; install it: pip install matplotlib") from None
    return Figure


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, its parts laid out so that nothing overlaps."""
    return import_figure()(figsize=(width, height), layout="constrained")


def title_of(metric: str) -> str:
    """The column name and which way is better.

    >>> title_of("SCD")
    'SCD ↑'
    """
    return metric + {"higher": " ↑", "lower": " ↓"}[METRICS[metric].better]


def _box_plots(rows: Sequence[Row], facts: str) -> Any:
    metrics = list(rows[0].sheet.mean())
    across = min(4, len(metrics))
    down = math.ceil(len(metrics) / across)
    figure = new_figure(across * max(2.5, 0.5 * len(rows) + 1), down * 2.8 + 0.4)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(down, across, i + 1)
        values = [[v[metric] for v in row.sheet.images.values() if math.isfinite(v[metric])] for row in rows]
        axes.boxplot(values, showmeans=True)
        axes.set_xticks(range(1, len(rows) + 1), [row.method for row in rows], rotation=45, ha="right", fontsize=8)
        unit = METRICS[metric].unit_in(rows[0].protocol)
        axes.set_title(title_of(metric) + (f" ({unit})" if unit else ""), fontsize=9)
    figure.supxlabel(facts, fontsize=7)
    return figure


def _rank_map(ranks: dict[str, dict[str, float]], facts: str) -> Any:
    # The best mean rank comes first.
    def overall(method: str) -> float:
        return sum(rank for rank in ranks[method].values() if not math.isnan(rank))

    methods, metrics = sorted(ranks, key=overall), list(next(iter(ranks.values())))
    table = [[ranks[method][metric] for metric in metrics] for method in methods]
    figure = new_figure(1.5 + 0.8 * len(metrics), 1.2 + 0.45 * len(methods))
    axes = figure.add_subplot()
    axes.imshow(table, cmap="viridis_r", vmin=1, vmax=len(methods), aspect="auto")
    axes.set_xticks(range(len(metrics)), [title_of(metric) for metric in metrics])
    axes.set_yticks(range(len(methods)), methods)
    middle = (1 + len(methods)) / 2
    for y, line in enumerate(table):
        for x, rank in enumerate(line):
            if not math.isnan(rank):
                axes.text(x, y, f"{rank:.1f}", ha="center", va="center", color="white" if rank > middle else "black")
    axes.set_title("mean rank over the images, 1 is the best", fontsize=9)
    figure.supxlabel(facts, fontsize=7)
    return figure


def _save(figure: Any, path: Path) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
