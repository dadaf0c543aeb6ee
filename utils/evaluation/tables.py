"""Rows of scores -> text, Markdown, LaTeX, JSON, and the CSV files in results/.

In text, Markdown and LaTeX the best value of a column is bold and the second underlined. Baselines are shown but do
not compete: a copy of one source is unbeatable in some metrics and worthless as a fusion. Every format says protocol,
commit, number of pairs and which images.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.common import InputError, lock_run_dir, write_csv
from utils.data.manifests import SHOWN
from utils.evaluation.scores import Row
from utils.metrics import METRICS, PROTOCOLS, TABLES, defines

FORMATS = ("text", "md", "latex", "json")
FACTS = ("method", "protocol", "pairs", "images", "commit")
Verdicts = Mapping[tuple[str, str], str]  # (method, metric) -> "better", "worse" or "-" beside one method


class Style(NamedTuple):
    best: str
    second: str
    higher: str = "↑"
    lower: str = "↓"
    worse: str = "†"  # than a method that all are tested against
    better: str = "‡"


PLAIN = Style("{}", "{}")
TERMINAL = Style("\x1b[1m{}\x1b[0m", "\x1b[4m{}\x1b[0m")
MARKDOWN = Style("**{}**", "<u>{}</u>")
LATEX = Style(r"\textbf{{{}}}", r"\underline{{{}}}", r"$\uparrow$", r"$\downarrow$", r"$^\dagger$", r"$^\ddagger$")


def places(rows: Sequence[Row], metric: str, digits: int) -> dict[int, int]:
    """Index of a row -> 1 for the best mean of a metric and 2 for the second; means printed alike share a place.

    Baselines, rows without a value, and rows scored under another protocol or on other images than the first do not
    compete.
    """
    means = {}
    for i, row in enumerate(rows):
        comparable = (row.protocol, row.sheet.images_hash) == (rows[0].protocol, rows[0].sheet.images_hash)
        value = row.sheet.mean()[metric]
        if comparable and not row.is_baseline and not math.isnan(value):
            means[i] = float(f"{value:.{digits}f}")
    if len(means) < 2:
        return {}
    ranked = sorted(set(means.values()), reverse=METRICS[metric].better == "higher")[:2]
    return {i: ranked.index(value) + 1 for i, value in means.items() if value in ranked}


def table_lines(rows: Sequence[Row], digits: int, style: Style, verdicts: Verdicts | None = None) -> list[list[str]]:
    """Cells of a table, the header first: a method a line, a metric a column."""
    columns = _columns(rows)
    ranks = {column: places(rows, column, digits) for column in columns}
    lines = [["method", *(column + getattr(style, METRICS[column].better) for column in columns)]]
    for i, row in enumerate(rows):
        mean, line = row.sheet.mean(), [row.method]
        for column in columns:
            form = ("{}", style.best, style.second)[ranks[column].get(i, 0)]
            sign = getattr(style, (verdicts or {}).get((row.method, column), ""), "")
            line.append(form.format(_fixed(mean[column], digits)) + sign)
        lines.append(line)
    return lines


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right; escape sequences have no width."""
    sizes = [[len(re.sub("\x1b.*?m", "", text)) for text in line] for line in lines]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    padded = []
    for line, used in zip(lines, sizes, strict=True):
        first, *others = (" " * (width - size) for width, size in zip(widths, used, strict=True))
        padded.append("  ".join([line[0] + first, *map("".join, zip(others, line[1:], strict=True))]).rstrip())
    return "\n".join(padded)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells, the header first -> a table whose first column is aligned left, the others right."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    escaped = ([text.replace("|", r"\|") for text in line] for line in (lines[0], rule, *lines[1:]))
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def latex_table(lines: Sequence[Sequence[str]], rows: Sequence[Row], set_name: str, against: str | None = None) -> str:
    """The `table_lines` of `rows` as a table environment for the booktabs package, with caption and label."""
    header, *body = (" & ".join([_latex(line[0]), *line[1:]]) + r" \\" for line in lines)
    methods = sum(not row.is_baseline for row in rows)
    if 0 < methods < len(rows):
        body.insert(methods, r"\midrule")
    pairs = " or ".join(str(n) for n in sorted({len(row.sheet.images) for row in rows}))
    caption = f"{_latex(set_name)}, {pairs} image pairs, protocol {rows[0].protocol}. Best in bold, second underlined."
    if against:
        caption += (
            rf" $\dagger$: significantly worse than {_latex(against)}, $\ddagger$: significantly better "
            "(paired Wilcoxon signed-rank test, Holm, $p < 0.05$)."
        )
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{set_name}-{rows[0].protocol}")
    columns = "l" + "r" * (len(lines[0]) - 1)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        r"\end{table}",
    ])  # fmt: skip


def protocol_lines(rows: Sequence[Row], method: str, digits: int, style: Style) -> list[list[str]]:
    """Cells of a table of one method: a metric a line, a protocol a column, and which choice makes the difference."""
    means = {row.protocol: row.sheet.mean() for row in rows if row.method == method}
    lines = [[method, *means, "what they choose differently"]]
    for key in _columns(rows):
        metric = METRICS[key]
        otherwise = "vifb: mean over the colour channels" if key in TABLES["vifb"] else "nothing"
        numbers = [_fixed(mean[key], digits) for mean in means.values()]
        lines.append([key + getattr(style, metric.better), *numbers, metric.choices or otherwise])
    return lines


def format_json(rows: Sequence[Row], commit: str, **more: Any) -> str:
    """Unrounded means, null where there is none or it is infinite; `more` goes beside the rows."""
    content = [
        {
            "method": row.method, "protocol": row.protocol, "commit": commit, "pairs": len(row.sheet.images),
            "images": row.sheet.images_hash, "baseline": row.is_baseline, "mean": row.sheet.mean(),
            "excluded": row.sheet.excluded(),
        }
        for row in rows
    ]  # fmt: skip
    return json.dumps(_finite({"rows": content, **more}), indent=2, ensure_ascii=False, allow_nan=False)


def describe_metrics() -> str:
    """Every metric: what it is, unit, direction, range under `paper` and `standard`, smallest side, source."""
    blocks = []
    for metric in METRICS.values():
        others = [name for name in TABLES if metric.unit_in(name) != metric.unit]
        units = [metric.unit, *(f"{metric.unit_in(name)} under {name}" for name in others)]
        unit = f"{', '.join(units)}; " if metric.unit else ""
        protocols = [name for name in TABLES if defines(name, metric.key)]
        blocks.append(
            f"{metric.key}: {(metric.function.__doc__ or '').splitlines()[0]}\n"
            f"    {unit}{metric.better} is better; range {metric.low:.6g} to {metric.high:.6g}; "
            f"smallest side {metric.min_side}\n"
            f"    protocols {', '.join(protocols)}" + (f"; {metric.choices}" if metric.choices else "") + "\n"
            f"    {metric.reference}"
        )
    return "\n".join(blocks)


def describe_protocol(protocol: str) -> str:
    return f"{protocol}: {PROTOCOLS[protocol]}" + (" (also called toolbox)" if protocol == "tang-2022" else "")


def write_per_image(path: Path, rows: Sequence[Row]) -> None:
    """CSV with one line for each method, protocol and image, values unrounded, empty where there is none."""
    lines = [["method", "protocol", "image", *_columns(rows)]]
    for row in rows:
        for image, values in row.sheet.images.items():
            lines.append([row.method, row.protocol, image, *(_number(value, repr) for value in values.values())])
    write_csv(path, lines)


def update_results(path: Path, rows: Sequence[Row], commit: str) -> None:
    """Adds rows to a CSV of results, six significant digits; rows of the same method and protocol are replaced.

    Others that do the same at that time wait for each other.

    Raises:
        InputError: the file is not such a CSV, or its rows are about other images.
    """
    with lock_run_dir(path.parent, wait=True):
        columns, records = read_results(path) if path.exists() else (list(FACTS), [])
        kept = {(record["method"], record["protocol"]): record for record in records}
        known = {record["images"] for record in records} | {row.sheet.images_hash[:SHOWN] for row in rows}
        if len(known) > 1:
            raise InputError(
                f"{path} would hold rows about different images ({', '.join(sorted(known))}), which cannot be "
                "compared; score all pairs of the set, or choose another file"
            )
        columns += [column for column in _columns(rows) if column not in columns]
        for row in rows:
            facts = (row.method, row.protocol, str(len(row.sheet.images)), row.sheet.images_hash[:SHOWN], commit)
            means = {key: _number(value, "{:.6g}".format) for key, value in row.sheet.mean().items()}
            kept[row.method, row.protocol] = dict(zip(FACTS, facts, strict=True)) | means
        write_csv(path, [columns, *([record.get(column, "") for column in columns] for record in kept.values())])


def read_results(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV of results.

    Raises:
        InputError: the file is not such a CSV.
    """
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            reader = csv.DictReader(file)
            columns, found = list(reader.fieldnames or []), list(reader)
        except csv.Error as error:
            raise InputError(f"{path} is not a file of results ({error}); choose another name") from None
    if columns[: len(FACTS)] != list(FACTS):
        raise InputError(f"{path} is not a file of results (its columns are {columns}); choose another name")
    for number, record in enumerate(found, 1):
        if None in record or None in record.values():  # how DictReader shows a row too long or too short
            raise InputError(f"{path}: row {number} has not as many values as there are columns; mend it first")
    return columns, found


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(next(iter(rows[0].sheet.images.values())))


def _number(value: float, number: Callable[[float], str]) -> str:
    return "" if math.isnan(value) else number(value)


def _fixed(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _latex(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
    return "".join(special.get(c, c) for c in text)
