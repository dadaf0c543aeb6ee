"""Draws docs/leaderboard.md and docs/leaderboard.png from the tables in results/, after checking every row.

    python -m tools.leaderboard            # checks the tables, draws page and picture
    python -m tools.leaderboard --check    # checks the tables, and that the page was drawn from them

Rows are ranked among those of one image list and one protocol, never across.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from utils.common import ROOT, InputError, Parser, run_script, write_text
from utils.data.manifests import SHOWN, read_manifests
from utils.evaluation.plots import new_figure, save, title_of
from utils.evaluation.statistics import bootstrap_interval
from utils.evaluation.tables import FACTS, describe_protocol, markdown_table, read_results
from utils.metrics import METRICS, TABLES

RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "leaderboard.md"
NUMBER = re.compile(r"-?(\d+(\.\d+)?(e[+-]\d+)?|inf)")
ABOUT = """# Leaderboard

Drawn by `python -m tools.leaderboard` from [results/](../results/README.md); do not edit it.
[own_data.md](own_data.md#score-what-you-have-fused) says how to add a row, [metrics.md](metrics.md) what the columns
are.

Rows are ranked among those of one image list under one protocol. The mean rank is over the metrics of the table, 1 is
the best; its interval is a 95 % bootstrap over these metrics, so it says how much the order depends on which metrics
the table happens to have. A metric without a value does not count. Rows in italics are baselines: a source alone, or
the average of both. They are ranked like methods, because a source alone is hard to beat in MI and VIF: a high rank is
not yet a good image. Bold: the best value of a method.

![mean ranks under protocol paper](leaderboard.png)
"""


class Ranked(NamedTuple):
    """A row of results with its mean rank among its group."""

    mean: float
    interval: tuple[float, float]
    row: dict[str, str]

    def is_baseline(self) -> bool:
        return self.row["method"] == "average" or self.row["method"].endswith(" only")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 where something is wrong")
    return run_script(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    groups = {}
    for path in sorted(RESULTS.glob("*.csv")):
        rows = checked_rows(path)
        for protocol in (name for name in TABLES if any(row["protocol"] == name for row in rows)):
            title = f"{path.stem}, {rows[0]['pairs']} pairs, images {rows[0]['images']}, protocol {protocol}"
            groups[title] = protocol, rank([row for row in rows if row["protocol"] == protocol], TABLES[protocol])
    text = "\n".join([ABOUT, *(section(title, *group) for title, group in groups.items())])
    if args.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            raise InputError(f"{PAGE} was not drawn from {RESULTS}: run python -m tools.leaderboard")
        return 0
    write_text(PAGE, text)
    save(picture({title: rows for title, (protocol, rows) in groups.items() if protocol == "paper"}),
         PAGE.with_suffix(".png"))  # fmt: skip
    print(f"written: {PAGE}, {PAGE.with_suffix('.png')}")
    return 0


def checked_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table. Raises InputError where one lacks something, or is about other images than the rest."""
    columns, rows = read_results(path)
    if set(columns) - {*FACTS, *METRICS}:
        raise InputError(
            f"{path}: unknown columns {sorted(set(columns) - {*FACTS, *METRICS})}; metrics are {' '.join(METRICS)}"
        )
    published = {manifest["set"]: manifest["images"][:SHOWN] for manifest in read_manifests()}
    for number, row in enumerate(rows, 1):
        images = published.get(path.stem, rows[0]["images"])
        good = {
            "method": row["method"].strip(), "protocol": row["protocol"] in TABLES, "commit": row["commit"],
            "pairs": row["pairs"].isdecimal() and int(row["pairs"]),
            "images": re.fullmatch(f"[0-9a-f]{{{SHOWN}}}", row["images"]) and row["images"] == images,
        } | {key: not row[key] or NUMBER.fullmatch(row[key]) for key in columns[len(FACTS) :]}  # fmt: skip
        for column in (column for column, is_good in good.items() if not is_good):
            raise InputError(
                f"{path}: row {number} has {column} {row[column]!r}; let evaluate.py write it: --results {path}"
            )
    return rows


def rank(rows: Sequence[dict[str, str]], metrics: Sequence[str]) -> list[Ranked]:
    """The rows, the best mean rank first."""
    values = np.array([[float(row.get(key) or "nan") for key in metrics] for row in rows])
    signs = [-1 if METRICS[key].better == "higher" else 1 for key in metrics]
    ranks = [line[np.isfinite(line)] for line in rankdata(values * signs, axis=0, nan_policy="omit")]
    found = [Ranked(float(line.mean()), bootstrap_interval(line), row) for line, row in zip(ranks, rows, strict=True)]
    return sorted(found, key=lambda ranked: ranked.mean)


def section(title: str, protocol: str, rows: Sequence[Ranked]) -> str:
    keys = [key for key in TABLES[protocol] if any(one.row.get(key) for one in rows)]
    lines = [["method", "mean rank", "95 %", *map(title_of, keys), "commit"]]
    best = {}
    for key in keys:
        values = [float(one.row[key]) for one in rows if one.row.get(key) and not one.is_baseline()]
        if len(values) > 1:
            best[key] = (max if METRICS[key].better == "higher" else min)(values)
    for one in rows:
        cells = {key: f"{float(one.row[key]):.4g}" if one.row.get(key) else "-" for key in keys}
        if not one.is_baseline():
            cells |= {
                key: f"**{cells[key]}**" for key in keys if one.row.get(key) and float(one.row[key]) == best.get(key)
            }
        method = f"*{one.row['method']}*" if one.is_baseline() else one.row["method"]
        interval = "{:.1f}..{:.1f}".format(*one.interval)
        lines.append([method, f"{one.mean:.2f}", interval, *cells.values(), one.row["commit"]])
    return f"## {title}\n\n{describe_protocol(protocol)}\n\n{markdown_table(lines)}\n"


def picture(groups: dict[str, list[Ranked]]) -> Any:
    down = math.ceil(len(groups) / 2)
    figure = new_figure(11, 0.6 + 2.4 * down)
    for i, (title, rows) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(down, 2, i)
        for y, one in enumerate(rows):
            axes.plot(
                [*one.interval, one.mean], [y] * 3, "-o", color="0.6" if one.is_baseline() else "C0", markevery=[2]
            )
        axes.set_yticks(range(len(rows)), [one.row["method"] for one in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=8)
    figure.supxlabel("mean rank over the metrics of the table, 1 is the best; 95 % bootstrap over metrics", fontsize=8)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
