"""What test_IVF.py and test_MIF.py share: sets of pairs -> fused files, scores of the files, the table.

The scripts differ in the sets they take by default; what depends on the system is asked of the system.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.common import (
    BAD_PAIR,
    DATA_VARIABLE,
    EXIT_BAD_INPUT,
    InputError,
    benchmark_root,
    check_writable,
    git_commit,
    in_checkout,
    left_out,
    lock_run_dir,
    number_in,
    progress,
    remember_source,
)
from utils.data.degradation import degrade_pair
from utils.data.images import luma_of, read_grey, with_colour_of, write_image
from utils.data.manifests import SHOWN, list_hash, pair_hash
from utils.data.pairs import (
    ONE_SIZE,
    Pair,
    PairList,
    add_pair_option,
    find_modalities,
    list_flat_pairs,
    modalities_in,
    open_pairs,
    read_as,
    role_names,
    set_name,
)
from utils.data.readers import add_reading_options
from utils.data.registration import register
from utils.data.sources import Source, read_sources
from utils.evaluation.folders import BASELINES, baseline_labels
from utils.evaluation.scores import PUBLISHED_COLUMNS, ScoreSheet, choose_columns, format_excluded, format_table
from utils.inference.fusing import (
    PUBLISHED,
    SKIP_HELP,
    Fuser,
    add_inference_options,
    find_weights,
    fuse_arrays,
    keep_freed_memory,
    load_fuser,
    memory_for_files,
    pick_device,
    pick_precision,
)
from utils.metrics import PROTOCOLS, score


class Benchmark(NamedTuple):
    """The defaults of one test script."""

    task: str  # "ivf" or "mif"
    sets: tuple[str, ...]  # folder names of the published benchmark
    samples: tuple[str, ...]  # bundled sets, shown where the published ones are absent


class TestSet(NamedTuple):
    name: str
    vis_name: str  # how the data set calls its visible or MRI images: a folder's name, or a stem
    ir_name: str
    found: PairList


class Given(NamedTuple):
    """What is read of a pair, to score against, and what the system is given to fuse: arrays of levels."""

    vis: Source
    ir: Source
    vis_to_fuse: np.ndarray
    ir_to_fuse: np.ndarray


def add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark, systems: Iterable[str]) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR",
        help="folder of sets, or one set: a folder with vi/ and ir/, or MRI/ and CT/, PET/ or SPECT/ "
        f"(default: ${DATA_VARIABLE}/test_img if that is set, else test_img)")  # fmt: skip
    add("--sets", nargs="+", metavar="NAME",
        help=f"sub-folders of --data to run (default: {' '.join(benchmark.sets)})")  # fmt: skip
    add("--vi", type=Path, metavar="DIR", help="visible (or MRI) folder, with --ir instead of --data")
    add("--ir", type=Path, metavar="DIR", help="infrared (or CT, PET, SPECT) folder")
    add_pair_option(parser)
    add("--stems", nargs=2, metavar=("VIS", "IR"),
        help="one folder --data holds both images of every pair: what comes before the number in their names, visible "
        "or MRI first, such as: mrict ct")  # fmt: skip
    add("--limit", type=number_in(int, 1), metavar="N", help="a quick look: the first N pairs of each set")
    add("--weights", type=Path, nargs="+", metavar="FILE",
        help="files, or published: those in published/models/, once it is cloned (default: those in models/ for the "
        "system and the task); for several systems one each, in their order")  # fmt: skip
    add("--out", type=Path, default=Path("test_result"), metavar="DIR", help="default: test_result")
    add("--skip", help=SKIP_HELP)
    add("--protocol", choices=PROTOCOLS, default="paper",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + " (default: paper)")  # fmt: skip
    add("--columns", nargs="+", metavar="NAME",
        help="columns of the table: metrics, or the published table of a system, one of "
        f"{', '.join(PUBLISHED_COLUMNS)} (default: those of the system). metrics.csv has all twelve")  # fmt: skip
    add("--baselines", action="store_true", help="add the rows of either source alone and of their average")
    add("--normalise", action=argparse.BooleanOptionalAction,
        help="min-max normalise each fused image (default: as published, which is yes for all but tsdm)")  # fmt: skip
    add("--degrade", type=number_in(int, 0, 2**63 - 1), metavar="SEED",
        help="degrade the pairs first, as TSDM-Fusion is trained to undo (noise, blur, low contrast, JPEG), and score "
        "against the clean ones; one seed degrades a set in one way, whatever is fused with")  # fmt: skip
    add("--legacy-rounding", action="store_true",
        help="truncate to 8 bits when writing, as published by FSIDFusion and MLFuse, instead of rounding")  # fmt: skip
    add("--colour", action="store_true", help="where a source has colour, write the fused image in it too, to colour/")
    add_reading_options(parser)
    add_inference_options(parser)
    add("--system", choices=list(systems), nargs="+", default=["cddfuse"], help="rows of the table (default: cddfuse)")


def run_benchmark(args: argparse.Namespace, benchmark: Benchmark, systems: list[Any]) -> int:
    """Fuses and scores every set with every weight file. Returns 0, or 2 when a pair had to be left out."""
    device = pick_device(args.device)
    keep_freed_memory()
    args.precision = pick_precision(args.precision, device)
    # Everything that can be wrong is looked at before the first image is fused.
    columns = choose_columns(args.columns) if args.columns else systems[0].columns
    if args.degrade is not None and args.colour:
        raise InputError("--colour takes the colours of the sources, which --degrade changes; leave one of them out")
    test_sets = find_sets(args, benchmark, memory_for_files(args.max_memory, device))
    fusers = [load_fuser(system, benchmark.task, path, args.skip, normalised=args.normalise, device=device)
              for system, path in files_of(systems, args.weights, benchmark.task)]  # fmt: skip
    for fuser in fusers:
        remember_source(fuser.weights)
    refuse_repeated("--weights", "files", [results_name(fuser.weights) for fuser in fusers])
    refuse_repeated("--sets", "folders", [test_set.name for test_set in test_sets])
    check_writable(args.out)

    commit = git_commit()
    incomplete, written = False, []
    for test_set in test_sets:
        if test_set.found.unmatched():
            print(f"warning: {test_set.name}: {test_set.found.unmatched()}; left out", file=sys.stderr)
        sheets: list[ScoreSheet] = []
        for fuser in fusers:
            # Degraded sources have a folder of their own: they do not take the place of the others.
            degraded = "" if args.degrade is None else f"_degraded_{args.degrade}"
            name = results_name(fuser.weights)
            folder = args.out / name / f"{test_set.name}{degraded}"
            with lock_run_dir(folder):
                remove_old_metrics(folder, fuser)
                started = time.perf_counter()
                label = fuser.system.row_label(benchmark.task, fuser.weights.stem)
                sheet = fuse_set(fuser, label, test_set, folder, args)
                incomplete |= len(sheet.images) < len(test_set.found.pairs)
                if not sheet.images:
                    print(f"warning: no pair of {test_set.name} was scored with {fuser.weights}", file=sys.stderr)
                    continue
                first = test_set.found.pairs[0]
                facts = {
                    "set": test_set.name, "vis": test_set.vis_name, "ir": test_set.ir_name,
                    "vi_range": first.vis_reading.range, "ir_range": first.ir_reading.range,
                    **fuser.about(), "weights": str(fuser.weights), "protocol": args.protocol,
                    "legacy_rounding": args.legacy_rounding, "degrade": args.degrade, "device": str(device),
                    "precision": args.precision, "seconds": round(time.perf_counter() - started, 1),
                    "torch": torch.__version__, "numpy": np.__version__, "commit": commit, "images": sheet.images_hash,
                }  # fmt: skip
                sheet.write(folder, facts)
            sheets.append(sheet)
            written.append(args.out / name)
        if sheets:
            if args.baselines:
                sheets += baseline_sheets(test_set, args.protocol, width=len(sheets[0].label))
            print_table(test_set, sheets, columns, fusers, args, f"{device} {args.precision}", commit)
    for folder in dict.fromkeys(written):
        print(f"fused images, metrics.csv and metrics.json: {folder}")
    return EXIT_BAD_INPUT if incomplete else 0


def print_table(
    test_set: TestSet, sheets: list[ScoreSheet], columns: Sequence[str], fusers: list[Fuser],
    args: argparse.Namespace, where: str, commit: str,
) -> None:  # fmt: skip
    """The published table, what it leaves out, and one line that says how it was made."""
    degraded = "" if args.degrade is None else f", degraded with seed {args.degrade}"
    print(format_table(f"{test_set.name}{degraded}", sheets, columns))
    for line in format_excluded(sheets, columns):
        print(line)
    used = ", ".join(f"{m.weights} (sha256 {m.sha256[:12]}, decoder image: {m.skip})" for m in fusers)
    pairs = " and ".join(str(n) for n in sorted({len(sheet.images) for sheet in sheets}))
    rounding = ", truncated to 8 bits" if args.legacy_rounding else ""
    lists = " and ".join(dict.fromkeys(sheet.images_hash[:SHOWN] for sheet in sheets if sheet.images_hash))
    print(
        f"protocol {args.protocol}, {pairs} pairs, weights {used}, {where}{rounding}, images {lists}, commit {commit}"
    )


def find_sets(args: argparse.Namespace, benchmark: Benchmark, memory: int | None = None) -> list[TestSet]:
    """The sets to run, and how they are read. Sets that were asked for must exist; absent default sets give way to the
    bundled ones. `memory` as of `read_as`."""
    if args.stems:  # which stem is which is never guessed: exchanged roles fuse as well, to another image
        if not args.data or args.vi or args.ir:
            raise InputError("--stems is for one folder that holds both images of every pair; name it with --data DIR")
        folders = [args.data / name for name in args.sets or [""]]
        found = [read_as(list_flat_pairs(folder, *args.stems), args, memory) for folder in folders]
        sets = [TestSet(folder.resolve().name, *args.stems, each) for folder, each in zip(folders, found, strict=True)]
    else:
        if args.vi or args.ir:
            if not (args.vi and args.ir) or args.data or args.sets:
                raise InputError("--vi DIR and --ir DIR go together, and in place of --data, --sets and --stems")
            named = [(set_name(args.vi), args.vi, args.ir)]
        else:
            folders = find_set_folders(args, benchmark)
            named = [(folder.resolve().name, *find_modalities(folder)) for folder in folders]
        sets = [TestSet(name, *role_names(*both), open_pairs(*both, args, memory)) for name, *both in named]
    for number, test_set in enumerate(sets):
        test_set.found.check_usable()
        if args.limit:  # under another name, so that the results do not take the place of those of the whole set
            name, first = f"{test_set.name}_first_{args.limit}", test_set.found.pairs[: args.limit]
            sets[number] = test_set._replace(name=name, found=test_set.found._replace(pairs=first))
    return sets


def find_set_folders(args: argparse.Namespace, benchmark: Benchmark) -> list[Path]:
    root = args.data or benchmark_root()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; name one with --data")
    if args.sets:
        return [root / name for name in args.sets]
    present = [name for name in benchmark.sets if (root / name).is_dir()]
    if modalities_in(root) or (args.data and not present):
        return [root]
    absent = ", ".join(name for name in benchmark.sets if name not in present)
    if absent:
        shown = "" if present else "; the bundled samples are shown instead"
        print(f"benchmark sets not found: {absent}. Put them at {root}/<set>/<modality>/ (README, Data){shown}")
    return [root / name for name in present] or [in_checkout("test_img", name) for name in benchmark.samples]


def files_of(systems: list[Any], weights: list[Path] | None, task: str) -> list[tuple[Any, Path]]:
    """The rows of a table, as (system, weight file).

    Raises:
        InputError: weights are named that are not one file for each of several systems; or there are none.
    """
    if weights and len(systems) not in (1, len(weights)):
        raise InputError(
            f"--system names {len(systems)} systems and --weights {len(weights)} files; give one file for each system"
        )
    if not weights:
        asked = [(system, None) for system in systems]
    else:
        asked = zip(systems * len(weights) if len(systems) == 1 else systems, weights, strict=True)
    return [(system, path) for system, given in asked for path in find_weights(system, task, given)]


def refuse_repeated(option: str, what: str, names: list[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{option} names two {what} called {repeated}; their results would share a folder: rename one")


def results_name(weights: Path) -> str:
    """The name of what is made with a file of weights. The published files have the names of ours."""
    is_published = weights.resolve().parent == in_checkout(PUBLISHED, "models").resolve()
    return weights.stem + (f"_{PUBLISHED}" if is_published else "")


def remove_old_metrics(folder: Path, fuser: Fuser) -> None:
    """An interrupted run must not leave new images beside old metrics. Those of other weights of that name are named:
    weights of a run have the name of ours, and so have their results."""
    try:
        before = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if before["weights_sha256"] != fuser.sha256:
            weights = before["weights"]
            print(f"note: {folder} had the results of other weights, {weights}; --out DIR keeps both", file=sys.stderr)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for name in ("metrics.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)


def fuse_set(fuser: Fuser, label: str, test_set: TestSet, folder: Path, args: argparse.Namespace) -> ScoreSheet:
    """Fuses the pairs of a set into PNG files and scores the files as written. A bad pair is named and left out."""
    images: dict[str, dict[str, float]] = {}
    hashes: list[str] = []
    for number, pair in enumerate(
        progress(test_set.found.pairs, f"{test_set.name}, {results_name(fuser.weights)}", "pair")
    ):
        path, fate = folder / f"{pair.name}.png", "left out"
        try:
            given = read_pair(pair, fuser.system.takes_colour, None if args.degrade is None else (args.degrade, number))
            fused = fuse_arrays(
                fuser.system, given.vis_to_fuse, given.ir_to_fuse, fuser.skip, normalise=fuser.normalised,
                precision=args.precision, max_memory=args.max_memory, scratch=args.scratch,
            )  # fmt: skip
            write_image(path, fused, truncate=args.legacy_rounding)
            colours = [source.colour for source in (given.vis, given.ir) if source.colour is not None]
            if args.colour and fused.ndim == 2 and colours:
                write_image(folder / "colour" / path.name, with_colour_of(fused, *colours))
            if args.degrade is not None:
                for name, image in (("vis", given.vis_to_fuse), ("ir", given.ir_to_fuse)):
                    write_image(folder / f"given_{name}" / path.name, image)
            fate = "fused, but not scored"
            images[pair.name] = score(read_grey(path), given.ir.grey, given.vis.grey, args.protocol)
            hashes.append(pair_hash(given.vis.grey, given.ir.grey))
        except BAD_PAIR as error:
            left_out(f"{test_set.name}/{pair.name}", error, args, fate)
    return ScoreSheet(label, images, list_hash(hashes))


def read_pair(pair: Pair, colour: bool, degrade: tuple[int, int] | None) -> Given:
    """Reads a pair, and degrades it where a seed is given.

    Args:
        pair: the two files.
        colour: give the visible image in colour where it has some.
        degrade: seed of `utils.data.degradation.degrade_pair`. Colours are degraded, then turned to grey where grey is
            wanted, so that all systems are given the same scene.
    """
    vis, ir = read_sources(pair)
    ir = register(vis, ir, advice=ONE_SIZE)
    if not degrade:
        return Given(vis, ir, vis.shown if colour else vis.grey, ir.grey)
    bad = degrade_pair(vis.shown / np.float32(255), ir.grey / np.float32(255), degrade)
    bad_vis, bad_ir = (255 * image for image in bad)
    if bad_vis.ndim == 3 and not colour:
        bad_vis = np.round(luma_of(bad_vis))
    return Given(vis, ir, bad_vis, bad_ir)


def baseline_sheets(test_set: TestSet, protocol: str, width: int) -> list[ScoreSheet]:
    """Scores of the sources and their average taken for fused images: what a method must beat."""
    labels = baseline_labels(test_set.vis_name, test_set.ir_name)
    sheets: dict[str, dict[str, dict[str, float]]] = {name: {} for name in labels}
    for pair in progress(test_set.found.pairs, f"{test_set.name}, baselines", "pair"):
        try:
            vis, ir = pair.read()
            scores = {name: score(BASELINES[kind](vis, ir), ir, vis, protocol) for name, kind in labels.items()}
        except BAD_PAIR:
            continue  # fuse_set has named it
        for name in labels:
            sheets[name][pair.name] = scores[name]
    return [ScoreSheet(name.ljust(width), images) for name, images in sheets.items()]
