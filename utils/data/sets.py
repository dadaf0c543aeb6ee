"""The sets that a test script runs: where they are looked for, and what is in them.

A set is a folder with two sub-folders of equally named images, or with numbered images of two stems.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from utils.common import InputError, benchmark_root, in_checkout
from utils.data.images import PairList, find_modalities, known_modalities, list_flat_pairs, list_pairs, modalities_in


@dataclass(frozen=True)
class Benchmark:
    """The defaults of one test script."""

    task: str  # "ivf" or "mif"
    sets: tuple[str, ...]  # folder names of the published benchmark
    samples: tuple[str, ...]  # bundled sets, shown where the published ones are absent


@dataclass(frozen=True)
class TestSet:
    name: str
    vis_name: str  # how the data set calls its visible or MRI images: a folder's name, or a stem
    ir_name: str
    found: PairList


def find_sets(args: argparse.Namespace, benchmark: Benchmark) -> list[TestSet]:
    """The sets to run. Sets that were asked for must exist; absent default sets give way to the bundled ones."""
    if args.pairs == "flat":
        return find_flat_sets(args)
    if args.stems:
        raise InputError("--stems is for one folder that holds both images of every pair; add --pairs flat")
    root = args.data or benchmark_root()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; name one with --data")
    if not args.sets and modalities_in(root):
        return [open_set(root)]
    if args.sets:
        return [open_set(root / name) for name in args.sets]
    present = [name for name in benchmark.sets if (root / name).is_dir()]
    if not present and args.data:
        raise FileNotFoundError(
            f"{root} holds none of {', '.join(benchmark.sets)}, and no two folders of images, one of: "
            f"{known_modalities()}; name the folders of other sets in it with --sets"
        )
    absent = ", ".join(name for name in benchmark.sets if name not in present)
    if absent:
        shown = "" if present else "; the bundled samples are shown instead"
        print(f"benchmark sets not found: {absent}. Put them at {root}/<set>/<modality>/ (README, Data){shown}")
    if not present:
        return [open_set(in_checkout("test_img", name)) for name in benchmark.samples]
    return [open_set(root / name) for name in present]


def find_flat_sets(args: argparse.Namespace) -> list[TestSet]:
    """--data itself, or its sub-folders --sets. Which stem is which is never guessed: exchanged roles fuse as well,
    to another image."""
    if not args.stems or not args.data:
        raise InputError(
            "--pairs flat needs --data DIR and --stems VIS IR, what comes before the number in the names of the "
            "visible or MRI files and of the infrared, CT, PET or SPECT files"
        )
    folders = [args.data / name for name in args.sets] if args.sets else [args.data]
    return [TestSet(folder.resolve().name, *args.stems, list_flat_pairs(folder, *args.stems)) for folder in folders]


def open_set(folder: Path) -> TestSet:
    vis, ir = find_modalities(folder)
    return TestSet(folder.resolve().name, vis.name, ir.name, list_pairs(vis, ir))
