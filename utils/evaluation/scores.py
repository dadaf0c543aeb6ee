"""Per-image scores -> means, the published table, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.common import InputError, write_csv, write_json
from utils.metrics import PAPER_TABLE, TWELVE

SEPARATOR = "=" * 80

# The columns of published tables, by the system they were published with.
PUBLISHED_COLUMNS = {"cddfuse": PAPER_TABLE, "fsidfusion": (*PAPER_TABLE, "AG", "CC", "PSNR")}


@dataclass(frozen=True)
class ScoreSheet:
    """The scores of one method on one set: image name -> metric -> value, NaN where a metric has none."""

    label: str
    images: Mapping[str, Mapping[str, float]]
    images_hash: str = ""  # `utils.data.manifests.list_hash` of the scored pairs, where it is known

    def mean(self) -> dict[str, float]:
        """Mean of each metric over the images that have a value; NaN when none has."""
        return means(list(self.images.values()))

    def excluded(self) -> dict[str, int]:
        """Number of images without a value, for each metric that has such images."""
        missing = {metric: len(self.images) - len(self._values(metric)) for metric in self._metrics()}
        return {metric: count for metric, count in missing.items() if count}

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Writes metrics.csv (one row an image) and metrics.json (`facts` and the unrounded means)."""
        lines = ([name, *scores.values()] for name, scores in self.images.items())
        write_csv(folder / "metrics.csv", [["image", *self._metrics()], *lines])
        # JSON has neither NaN nor infinity: a metric without a finite value is null.
        mean = {metric: value if math.isfinite(value) else None for metric, value in self.mean().items()}
        content = {"mean": mean, "excluded": self.excluded(), "pairs": len(self.images), **facts}
        write_json(folder / "metrics.json", content)

    def _metrics(self) -> list[str]:
        return list(next(iter(self.images.values()), {}))

    def _values(self, metric: str) -> list[float]:
        return [scores[metric] for scores in self.images.values() if not math.isnan(scores[metric])]


@dataclass(frozen=True)
class Row:
    """The scores of one method under one protocol."""

    method: str
    protocol: str
    sheet: ScoreSheet
    is_baseline: bool = False


def choose_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the twelve metrics, or of published tables for all of their columns -> the columns, each once.

    >>> choose_columns(["EN", "fsidfusion", "MSE"])
    ('EN', 'SD', 'SF', 'MI', 'SCD', 'VIF', 'Qabf', 'SSIM', 'AG', 'CC', 'PSNR', 'MSE')

    Raises:
        InputError: neither a metric nor a table; the known ones are named.
    """
    for name in names:
        if name not in TWELVE and name not in PUBLISHED_COLUMNS:
            raise InputError(
                f"--columns: there is no metric or table {name!r} here; metrics are {', '.join(TWELVE)}, "
                f"and {', '.join(PUBLISHED_COLUMNS)} stands for the columns of its published table; "
                "`python evaluate.py --list-metrics` names all that can be scored afterwards"
            )
    columns = [column for name in names for column in PUBLISHED_COLUMNS.get(name, (name,))]
    return tuple(dict.fromkeys(columns))


def format_table(title: str, sheets: Sequence[ScoreSheet], columns: Sequence[str] = PAPER_TABLE) -> str:
    """The table in the layout of the published test scripts: values rounded to two decimals, tabs between."""
    # Published: the first four names stand one space from their tab, the others do not.
    header = "\t" + "".join(f"\t {name}" if i < 4 else f"\t{name}" for i, name in enumerate(columns))
    lines = ["", "", SEPARATOR, f"The test result of {title} :", header]
    for sheet in sheets:
        mean = sheet.mean()
        lines.append(sheet.label + "".join(f"\t{round(mean[name], 2)}" for name in columns))
    return "\n".join([*lines, SEPARATOR])


def format_excluded(sheets: Sequence[ScoreSheet], columns: Sequence[str] = PAPER_TABLE) -> list[str]:
    """A line for each row whose means leave images out."""
    lines = []
    for sheet in sheets:
        counts = {metric: count for metric, count in sheet.excluded().items() if metric in columns}
        if counts:
            named = ", ".join(f"{metric} of {count}" for metric, count in counts.items())
            lines.append(
                f"{sheet.label.strip()}: no value for {named} of {len(sheet.images)} images; left out of the mean"
            )
    return lines


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each column over the rows that have a number there; NaN where none has."""
    columns = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in next(iter(rows), {})}
    return {name: math.fsum(values) / len(values) if values else math.nan for name, values in columns.items()}
