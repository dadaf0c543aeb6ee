"""Pictures of an evaluation. Needs matplotlib, imported on use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.common import InputError, whole_file
from utils.evaluation.scores import Row
from utils.metrics import METRICS


def box_plots(path: Path, rows: Sequence[Row], facts: str) -> None:
    """Writes a picture with a box plot of each metric, a box a row.

    Args:
        path: its folder is made where it is missing.
        rows: rows of one protocol.
        facts: one line that says protocol, number of pairs and images; it goes under the picture.

    Raises:
        InputError: matplotlib is not installed.
    """
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
    save(figure, path)


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


def save(figure: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})  # the same bytes from the same numbers
