"""Scores folders of fused images, whatever made them, and says under which protocol.

    python evaluate.py --fused fused/MyMethod --ir ir --vi vi
    python evaluate.py --fused A B C=path/to/c --data test_img/TNO --against A --format latex   # for a paper
    python evaluate.py --fused A --data test_img/TNO --compare-protocols    # why two papers differ
    python evaluate.py --verify-data test_img                               # is my copy the published one?
    python evaluate.py --list-metrics                                       # what is Qabf?

Names are matched without their suffix: fused/01.png belongs to ir/01.jpg and vi/01.bmp. Colour is scored as grey,
0.299 R + 0.587 G + 0.114 B rounded half to even, and under --protocol vifb channel by channel. Give the infrared, CT,
PET or SPECT folder as --ir and the visible or MRI folder as --vi; exchanging them changes no value.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.common import (
    DATA_VARIABLE,
    EXIT_BAD_INPUT,
    InputError,
    Parser,
    benchmark_root,
    check_writable,
    git_commit,
    listed,
    number_in,
    run_script,
)
from utils.data.manifests import SHOWN, name_of_list, read_manifests, verify
from utils.data.pairs import find_modalities
from utils.evaluation import tables
from utils.evaluation.folders import Evaluation, evaluate
from utils.evaluation.scores import Row, format_excluded
from utils.evaluation.statistics import LEVEL, compare, format_statistics, mean_intervals
from utils.metrics import METRICS, PROTOCOLS, TABLES, canonical


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--fused", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
        help="fused images, one folder a method")  # fmt: skip
    add("--ir", type=Path, metavar="DIR", help="infrared (or CT, PET, SPECT) sources")
    add("--vi", type=Path, metavar="DIR", help="visible (or MRI) sources")
    add("--data", type=Path, metavar="DIR",
        help="instead of --ir and --vi: a folder with vi/ and ir/, or MRI/ and CT/ ...")  # fmt: skip
    protocols = parser.add_mutually_exclusive_group()
    protocols.add_argument("--protocol", choices=PROTOCOLS, default="paper",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + " (default: paper)")  # fmt: skip
    protocols.add_argument("--compare-protocols", action="store_true",
        help="the same images under each protocol, and which choice makes each difference")  # fmt: skip
    add("--metrics", nargs="+", metavar="NAME",
        help="table (the default: the columns of the protocol's own tables), all (the default with --results), "
        f"or any of {' '.join(METRICS)}")  # fmt: skip
    add("--baselines", action="store_true", help="rows for either source alone and for their average")
    add("--stats", action="store_true", help="95 %% bootstrap intervals of the means")
    add("--against", metavar="NAME", help="test every other row against this one: paired Wilcoxon signed-rank, Holm; "
        "daggers in md and latex")  # fmt: skip
    add("--cost", action="store_true", help="columns with the parameters and the operations for a pair of 640x480, "
        "of systems of this repository, by metrics.json or the row's name")  # fmt: skip
    add("--format", choices=tables.FORMATS, default="text",
        help="default: text; latex: a table for booktabs, with caption and label")  # fmt: skip
    add("--digits", type=number_in(int, 0, 12), default=3, help="decimals in text, md and latex (default: 3)")
    add("--per-image", type=Path, metavar="FILE", help="also write one line an image into this CSV file")
    add("--results", type=Path, metavar="FILE", help="also add the rows to this CSV file, or replace them there")
    add("--jobs", type=number_in(int, 1), help="pairs scored at a time (default: one for each processor)")
    add("--verify-data", nargs="?", const="", metavar="DIR",
        help="compare the sets in this folder with results/manifests/ and exit "
        f"(default: ${DATA_VARIABLE}/test_img if that is set, else test_img)")  # fmt: skip
    add("--list-metrics", action="store_true", help="say what each metric is, with unit, range and source, and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(run, build_parser(), argv)


def run(args: argparse.Namespace) -> int:
    if args.list_metrics:
        emit(tables.describe_metrics())
        return 0
    if args.verify_data is not None:
        return verify_data(args.verify_data)
    vis_folder, ir_folder = find_sources(args)
    set_name = (args.data or vis_folder.parent).resolve().name
    methods = name_methods(args.fused, set_name)
    if not methods and not args.baselines:
        raise InputError("nothing to score: name folders of fused images with --fused, or ask for --baselines")
    protocols = list(TABLES) if args.compare_protocols else [canonical(args.protocol)]
    if args.protocol not in TABLES:
        print(f"note: protocol {args.protocol} is {PROTOCOLS[args.protocol]}", file=sys.stderr)
    metrics = find_metrics(args.metrics or ["all" if args.results else "table"], protocols)
    check_options(args, methods, metrics)
    evaluation = evaluate(methods, vis_folder, ir_folder, protocols, metrics, args.baselines, args.jobs)
    for line in (*evaluation.problems, *evaluation.notes):
        print(f"warning: {line}", file=sys.stderr)
    if not evaluation.rows:
        raise InputError("not one image could be scored; see the warnings above")
    report(args, evaluation, set_name, count_costs(methods) if args.cost else {})
    return EXIT_BAD_INPUT if evaluation.problems else 0


def find_sources(args: argparse.Namespace) -> tuple[Path, Path]:
    if args.data and (args.ir or args.vi):
        raise InputError("--data names both folders of sources; give it, or --ir and --vi")
    if args.data:
        return find_modalities(args.data)
    if not (args.ir and args.vi):
        raise InputError("name the sources: --ir DIR --vi DIR, or --data DIR for a folder with vi/ and ir/")
    if args.ir.resolve() == args.vi.resolve():
        raise InputError(f"--ir and --vi are the same folder, {args.ir}; a fused image has two sources")
    return args.vi, args.ir


def name_methods(values: Sequence[str], set_name: str) -> dict[str, Path]:
    """NAME=DIR, or DIR: then the method is the folder's name, or that of its parent where it is called like the set."""
    methods: dict[str, Path] = {}
    for value in values:
        folder, name = Path(value), ""
        if "=" in value and not folder.is_dir():
            name, _, rest = value.partition("=")
            folder = Path(rest)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of fused images at {folder}; name one with --fused")
        whole = folder.resolve()
        name = name or (whole.parent.name if whole.name == set_name else whole.name)
        if name in methods:
            raise InputError(f"{methods[name]} and {folder} are both called {name}; name them: --fused NAME={folder}")
        methods[name] = folder
    return methods


def find_metrics(names: Sequence[str], protocols: Sequence[str]) -> list[str]:
    """Names of metrics and groups -> the metrics, each once. The table of several protocols has all their columns."""
    table = [key for protocol in protocols for key in TABLES[protocol]]
    groups = {"table": table, "all": list(METRICS)}
    chosen = [key for name in names for key in groups.get(name, [name])]
    unknown = [key for key in chosen if key not in METRICS]
    if unknown:
        raise InputError(f"--metrics: unknown {listed(unknown)}; choose table, all, or from {' '.join(METRICS)}")
    return list(dict.fromkeys(chosen))


def check_options(args: argparse.Namespace, methods: Collection[str], metrics: Sequence[str]) -> None:
    """What can be known to be wrong before the first image is scored."""
    if args.results and set(metrics) != set(METRICS):
        raise InputError("--results keeps a row with every metric; leave out --metrics")
    if args.compare_protocols and (args.stats or args.against or args.cost or args.format == "latex"):
        raise InputError(
            "--compare-protocols puts protocols side by side; choose one --protocol for --stats, --against, --cost and "
            "--format latex"
        )
    if args.format in ("latex", "md") and args.stats:
        raise InputError(f"--stats prints text or JSON; leave out --format {args.format}")
    if args.against and not set(methods) - {args.against}:
        raise InputError(f"--against {args.against}: there is no other method to test; name more with --fused")
    for path in filter(None, (args.per_image, args.results)):
        check_writable(path.parent)


def count_costs(methods: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Parameters, and operations for a pair of 640x480, of the methods that are systems of this repository."""
    from zoo import SYSTEMS, find_system  # and with it torch, which nothing else here needs

    systems = {find_system(name).label: find_system(name) for name in SYSTEMS}
    costs = {}
    for method, folder in methods.items():
        said = method
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = str(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["system"])
        label = next((name for name in systems if re.match(rf"{name}([ _(]|$)", said)), None)
        if label:
            costs[method] = dict(zip(("parameters", "operations"), systems[label].cost(), strict=True))
    return costs


def report(
    args: argparse.Namespace, evaluation: Evaluation, set_name: str, costs: Mapping[str, dict[str, int]]
) -> None:
    """Writes files first, then prints: the reader of the output may close the pipe."""
    rows, commit = evaluation.rows, git_commit()
    facts = provenance(rows, commit)
    against = next((row for row in rows if row.method == args.against), None)
    if args.against and not against:
        raise InputError(
            f"--against {args.against}: no such row; choose one of {', '.join(row.method for row in rows)}"
        )
    comparisons = compare(rows, against) if against else []
    if args.per_image:
        tables.write_per_image(args.per_image, rows)
    if args.results:
        tables.update_results(args.results, rows, commit)
    for path in filter(None, (args.per_image, args.results)):
        print(f"written: {path}", file=sys.stderr)

    intervals = {row.method: mean_intervals(row) for row in rows} if args.stats else {}
    if args.format == "json":
        more = {"numpy": np.__version__, "protocols": {row.protocol: PROTOCOLS[row.protocol] for row in rows}}
        if args.stats:
            more["intervals"] = intervals
        if args.against:
            more |= {"against": args.against, "comparisons": [vars(c) for c in comparisons]}
        if args.cost:
            more["costs"] = costs
        emit(tables.format_json(rows, commit, **more))
        return
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    style = {"md": tables.MARKDOWN, "latex": tables.LATEX}.get(
        args.format, tables.TERMINAL if terminal else tables.PLAIN
    )
    draw = tables.markdown_table if args.format == "md" else tables.align
    if args.compare_protocols:
        parts = [
            tables.protocol_lines(rows, name, args.digits, style) for name in dict.fromkeys(r.method for r in rows)
        ]
        emit("\n\n".join([*map(draw, parts), "\n".join(facts)]))
        return
    verdicts = {(c.method, c.metric): c.verdict() for c in comparisons} if args.format != "text" else {}
    lines = tables.table_lines(rows, args.digits, style, verdicts)
    if args.cost:
        cells = [["parameters, M", "operations, G"]]
        for row in rows:
            cost = costs.get(row.method)
            cells.append([f"{cost['parameters'] / 1e6:.2f}", f"{cost['operations'] / 1e9:.0f}"] if cost else ["-", "-"])
        lines = [[*line, *cost] for line, cost in zip(lines, cells, strict=True)]
    if args.format == "latex":
        emit("\n".join([tables.latex_table(lines, rows, set_name, args.against), *(f"% {line}" for line in facts)]))
    elif args.format == "md":
        if args.against:
            facts.append(f"†: significantly worse than {args.against}, ‡: better (Wilcoxon, Holm, p < {LEVEL})")
        emit(draw(lines) + "\n\n" + "  \n".join(facts))
    else:
        table = "\n".join([draw(lines), *excluded(rows), *facts])
        emit("\n\n".join([table, *format_statistics(intervals, comparisons, args.against, args.digits)]))


def emit(text: str) -> None:
    """Prints what the console can show, with a question mark for the rest; a reader who has seen enough may go."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("↑", "^").replace("↓", "v").encode(encoding, "replace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def excluded(rows: Sequence[Row]) -> list[str]:
    """Lines about means that leave images out. Where none has a value, the table says so by itself."""
    lines = []
    for row in rows:
        lines += format_excluded([row.sheet], [key for key, value in row.sheet.mean().items() if not np.isnan(value)])
    return lines


def provenance(rows: Sequence[Row], commit: str) -> list[str]:
    """A line for each list of images among the rows, what the protocols are, and a warning where the images differ."""
    protocols = dict.fromkeys(row.protocol for row in rows)
    lists = dict.fromkeys(row.sheet.images_hash for row in rows)
    lines = []
    for images in lists:
        these = [row for row in rows if row.sheet.images_hash == images]
        name = name_of_list(images)
        lines.append(
            (f"{listed({row.method for row in these}, most=20)}: " if len(lists) > 1 else "")
            + f"protocol {', '.join(protocols)}, {len(these[0].sheet.images)} pairs, images {images[:SHOWN]}"
            + (f" ({name} as published)" if name else "")
            + f", commit {commit}"
        )
    if len(lists) > 1:
        lines.append(
            "rows about different images cannot be compared; the best are marked among those like the first row"
        )
    return [*lines, *map(tables.describe_protocol, protocols)]


def verify_data(where: str) -> int:
    folder = Path(where) if where else benchmark_root()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; name the one that holds the sets: --verify-data DIR")
    manifests = read_manifests()
    present = [m for m in manifests if (folder / m["set"]).is_dir()]
    if not present:
        known = ", ".join(manifest["set"] for manifest in manifests)
        raise InputError(
            f"{folder} holds none of the published sets ({known}); name the folder that does: --verify-data DIR"
        )
    good = True
    for manifest in manifests:
        if manifest not in present:
            print(f"{manifest['set']}: not in {folder}")
            continue
        verdict = verify(folder / manifest["set"], manifest)
        good &= verdict.is_published()
        answer = "the published images" if verdict.is_published() else "NOT the published set"
        print(f"{manifest['set']}: {answer}: {verdict}")
    return 0 if good else EXIT_BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(main())
