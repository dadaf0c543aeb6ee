"""What pictures of tables and trainings share. Needs matplotlib, imported on use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.common import InputError, whole_file
from utils.metrics import METRICS


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, its parts laid out so that nothing overlaps.

    Without pyplot, which keeps global state and may look for a screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; install it: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def title_of(metric: str) -> str:
    """The column name and which way is better.

    >>> title_of("SCD")
    'SCD ↑'
    """
    return metric + {"higher": " ↑", "lower": " ↓"}[METRICS[metric].better]


def save(figure: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        # Without metadata: the same bytes from the same numbers.
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
