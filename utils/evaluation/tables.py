"""Rows of scores -> text, Markdown, LaTeX, CSV, JSON, and the CSV files in results/.

In text, Markdown and LaTeX the best value of a column is bold and the second underlined. Baselines are shown but do
not compete: a copy of one source is unbeatable in some metrics and worthless as a fusion. Every format says protocol,
commit, number of pairs and which images.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.common import InputError, whole_file
from utils.data.manifests import SHOWN
from utils.evaluation.scores import Row
from utils.metrics import METRICS, PROTOCOLS

FORMATS = ("text", "md", "csv", "latex", "json")
FACTS = ("method", "protocol", "pairs", "images", "commit")

Mark = Callable[[str], str]
PLAIN: tuple[Mark, Mark] = (str, str)
TERMINAL: tuple[Mark, Mark] = ("\x1b[1m{}\x1b[0m".format, "\x1b[4m{}\x1b[0m".format)
MARKDOWN: tuple[Mark, Mark] = ("**{}**".format, "<u>{}</u>".format)
LATEX: tuple[Mark, Mark] = (r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
ARROWS = {"higher": "↑", "lower": "↓"}
ASCII_ARROWS = {"higher": "^", "lower": "v"}


def places(rows: Sequence[Row], metric: str) -> dict[int, int]:
    """Index of a row -> 1 for the best mean of a metric and 2 for the second; ties share a place.

    Baselines, rows without a value, and rows scored under another protocol or on other images than the first do not
    compete.
    """
    means = {}
    for i, row in enumerate(rows):
        comparable = (row.protocol, row.sheet.digest) == (rows[0].protocol, rows[0].sheet.digest)
        value = row.sheet.mean()[metric]
        if comparable and not row.is_baseline and not math.isnan(value):
            means[i] = value
    if len(means) < 2:
        return {}
    ranked = sorted(set(means.values()), reverse=METRICS[metric].better == "higher")[:2]
    return {i: ranked.index(value) + 1 for i, value in means.items() if value in ranked}


def format_text(rows: Sequence[Row], digits: int = 3, marks: tuple[Mark, Mark] = PLAIN, unicode: bool = True) -> str:
    """Columns aligned for a terminal. `marks` is `TERMINAL` where escape sequences are understood."""
    header, cells = _cells(rows, digits, ARROWS if unicode else ASCII_ARROWS)
    widths = [max(len(line[i][0]) for line in [header, *cells]) for i in range(len(header))]
    lines = []
    for line in [header, *cells]:
        padded = [
            text.ljust(width) if i < 2 else " " * (width - len(text)) + _marked(text, place, marks)
            for i, ((text, place), width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def describe_metrics() -> str:
    """Every metric: what it is, unit, direction, range under `paper` and `standard`, smallest side, source."""
    blocks = []
    for metric in METRICS.values():
        about = (metric.function.__doc__ or "").splitlines()[0]
        units = {protocol: metric.unit_in(protocol) for protocol in PROTOCOLS}
        other = [f"{unit} under {protocol}" for protocol, unit in units.items() if unit != metric.unit]
        unit = f"{', '.join([metric.unit, *other])}; " if metric.unit else ""
        low, high = (f"{bound:.6g}" for bound in metric.value_range)
        facts = f"{metric.better} is better; range {low} to {high}; smallest side {metric.min_side}"
        blocks.append(f"{metric.key}: {about}\n    {unit}{facts}\n    {metric.reference}")
    return "\n".join(blocks)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def format_markdown(rows: Sequence[Row], digits: int = 3) -> str:
    header, cells = _cells(rows, digits, ARROWS)
    rule = [("---" if i < 2 else "---:", 0) for i in range(len(header))]
    escaped = [[(text.replace("|", r"\|"), place) for text, place in line] for line in [header, *cells]]
    lines = [escaped[0], rule, *escaped[1:]]
    return "\n".join("| " + " | ".join(_marked(*cell, MARKDOWN) for cell in line) + " |" for line in lines)


def format_latex(rows: Sequence[Row], digits: int = 3) -> str:
    """A tabular that needs no package."""
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    header, cells = _cells(rows, digits, arrows)
    escaped = [header, *([(_latex(text), place) for text, place in line] for line in cells)]
    lines = [" & ".join(_marked(*cell, LATEX) for cell in line) + r" \\" for line in escaped]
    columns = "ll" + "r" * (len(header) - 2)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    return "\n".join([*body, r"\end{tabular}"])


def format_csv(rows: Sequence[Row], commit: str) -> str:
    """Unrounded means, one row a method and protocol; empty where there is none."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*FACTS, *_columns(rows)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(_record(row, commit, repr))
    return file.getvalue().rstrip("\n")


def format_json(rows: Sequence[Row], commit: str, **more: Any) -> str:
    """Unrounded means, null where there is none or it is infinite; `more` goes beside the rows."""
    content = [
        {
            "method": row.method, "protocol": row.protocol, "commit": commit, "pairs": len(row.sheet.images),
            "images": row.sheet.digest, "baseline": row.is_baseline,
            "mean": {key: value if math.isfinite(value) else None for key, value in row.sheet.mean().items()},
            "excluded": row.sheet.excluded(),
        }
        for row in rows
    ]  # fmt: skip
    return json.dumps({"rows": content, **more}, indent=2, ensure_ascii=False, allow_nan=False)


def write_per_image(path: Path, rows: Sequence[Row]) -> None:
    """CSV with one line for each method, protocol and image, values unrounded, empty where there is none."""
    with (
        whole_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["method", "protocol", "image", *_columns(rows)])
        for row in rows:
            for image, values in row.sheet.images.items():
                writer.writerow([row.method, row.protocol, image, *(_number(v, repr) for v in values.values())])


def update_results(path: Path, rows: Sequence[Row], commit: str) -> None:
    """Adds rows to a CSV of results, six significant digits; rows of the same method and protocol are replaced.

    Raises:
        InputError: the file is not such a CSV, or its rows are about other images.
    """
    columns, records = list(FACTS), {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            try:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                found = list(reader)
            except (UnicodeDecodeError, csv.Error) as error:
                raise InputError(f"{path} is not a file of results ({error}); choose another name") from None
            if columns[: len(FACTS)] != list(FACTS):
                raise InputError(f"{path} is not a file of results (its columns are {columns}); choose another name")
            for number, record in enumerate(found, 1):
                if None in record or None in record.values():  # how DictReader shows a row too long or too short
                    raise InputError(f"{path}: row {number} has not as many values as there are columns; mend it first")
            records = {(record["method"], record["protocol"]): record for record in found}
    known = {record["images"] for record in records.values()} | {row.sheet.digest[:SHOWN] for row in rows}
    if len(known) > 1:
        raise InputError(
            f"{path} would hold rows about different images ({', '.join(sorted(known))}), which cannot be compared; "
            "score all pairs of the set, or choose another file"
        )
    columns += [column for column in _columns(rows) if column not in columns]
    for row in rows:
        records[row.method, row.protocol] = _record(row, commit, "{:.6g}".format)
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records.values())


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(next(iter(rows[0].sheet.images.values())))


def _record(row: Row, commit: str, number: Callable[[float], str]) -> Mapping[str, str]:
    facts = (row.method, row.protocol, str(len(row.sheet.images)), row.sheet.digest[:SHOWN], commit)
    means = {key: _number(value, number) for key, value in row.sheet.mean().items()}
    return dict(zip(FACTS, facts, strict=True)) | means


def _number(value: float, number: Callable[[float], str]) -> str:
    return "" if math.isnan(value) else number(value)


def _cells(
    rows: Sequence[Row], digits: int, arrows: Mapping[str, str]
) -> tuple[list[tuple[str, int]], list[list[tuple[str, int]]]]:
    """Header and lines of (text, place)."""
    columns = _columns(rows)
    header = [(name, 0) for name in ("method", "protocol", *(c + arrows[METRICS[c].better] for c in columns))]
    ranks = {column: places(rows, column) for column in columns}
    lines = []
    for i, row in enumerate(rows):
        mean = row.sheet.mean()
        values = [("-" if math.isnan(mean[c]) else f"{mean[c]:.{digits}f}", ranks[c].get(i, 0)) for c in columns]
        lines.append([(row.method, 0), (row.protocol, 0), *values])
    return header, lines


def _marked(text: str, place: int, marks: tuple[Mark, Mark]) -> str:
    return marks[place - 1](text) if place else text


def _latex(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return "".join(special.get(c, c) for c in text)
