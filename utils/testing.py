"""What test_IVF.py and test_MIF.py share: sets of pairs -> fused files, scores of the files, the table.

A set is a folder with two sub-folders of equally named images. The scripts differ in the sets and weights they
take by default, and in how a row is called.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import EXIT_BAD_INPUT, InputError, check_writable, git_commit, in_checkout
from utils.images import Pair, PairList, find_modalities, list_pairs, modalities_in, read_grey, to_uint8, write_grey
from utils.inference import PRECISIONS, fuse_arrays, pick_device
from utils.memory import parse_size
from utils.metrics import PROTOCOLS, score
from utils.scores import ScoreSheet, format_excluded, format_table

DATA_VARIABLE = "FUSION_DATA"
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what befalls one file will befall all


@dataclass(frozen=True)
class Benchmark:
    """The defaults of one test script."""

    task: str  # "ivf" or "mif"
    sets: tuple[str, ...]  # folder names of the published benchmark
    samples: tuple[str, ...]  # bundled sets, shown where the published ones are absent
    weights: tuple[str, ...]  # file names in models/
    row_label: Callable[[str, str], str]  # (label of the system, stem of the weights) -> row label as published


@dataclass(frozen=True)
class TestSet:
    name: str
    vis_folder: Path
    ir_folder: Path
    found: PairList


@dataclass(frozen=True)
class Method:
    """A system with weights, ready to run on a task."""

    model: Any
    weights: Path
    label: str
    skip: str
    sha256: str


def add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark, systems: Iterable[str]) -> None:
    sets, weights = " ".join(benchmark.sets), " ".join(f"models/{name}" for name in benchmark.weights)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of sets, or one set: a folder with vi/ and ir/, or MRI/ and CT/, PET/ or SPECT/ "
        f"(default: ${DATA_VARIABLE}/test_img if that is set, else test_img)",
    )
    add("--sets", nargs="+", metavar="NAME", help=f"sub-folders of --data to run (default: {sets})")
    add("--weights", type=Path, nargs="+", metavar="FILE", help=f"default: {weights}")
    add("--out", type=Path, default=Path("test_result"), metavar="DIR", help="default: test_result")
    add("--skip", help="what the decoder is given; default: what the weights were trained with")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="paper",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + " (default: paper)",
    )
    add("--baselines", action="store_true", help="add the rows of either source alone and of their average")
    add("--no-stretch", action="store_true", help="do not stretch each fused image to the full range")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--max-memory", type=parse_size, metavar="SIZE", help="such as 2GB; same result (default: what is free)")
    add("--scratch", type=Path, metavar="DIR", help="for what does not fit (default: the system's temporary folder)")
    add("--system", choices=list(systems), default="cddfuse", help="default: cddfuse")
    add("--debug", action="store_true", help="show tracebacks")


def run_benchmark(args: argparse.Namespace, benchmark: Benchmark, system: type) -> int:
    """Fuses and scores every set with every weight file. Returns 0, or 2 when a pair had to be left out."""
    device = pick_device(args.device)
    # Everything that can be wrong is looked at before the first image is fused.
    test_sets = find_sets(args, benchmark)
    paths = args.weights or [in_checkout("models", name) for name in benchmark.weights]
    methods = [load_method(path, system, device, args.skip, benchmark) for path in paths]
    stems = [method.weights.stem for method in methods]
    refuse_repeated("--weights", "files", stems)
    refuse_repeated("--sets", "folders", [test_set.name for test_set in test_sets])
    check_writable(args.out)

    commit = git_commit()
    incomplete = False
    for test_set in test_sets:
        if test_set.found.unmatched():
            print(f"warning: {test_set.name}: {test_set.found.unmatched()}; left out", file=sys.stderr)
        sheets: list[ScoreSheet] = []
        for method in methods:
            folder = args.out / method.weights.stem / test_set.name
            started = time.perf_counter()
            sheet = fuse_set(method, test_set, folder, args)
            incomplete |= len(sheet.images) < len(test_set.found.pairs)
            if not sheet.images:
                print(f"warning: no pair of {test_set.name} was scored with {method.weights}", file=sys.stderr)
                continue
            facts = {
                "set": test_set.name, "system": method.model.label, "weights": str(method.weights),
                "weights_sha256": method.sha256, "skip": method.skip, "protocol": args.protocol,
                "stretch": not args.no_stretch, "device": str(device), "precision": args.precision,
                "seconds": round(time.perf_counter() - started, 1), "torch": torch.__version__,
                "numpy": np.__version__, "commit": commit,
            }  # fmt: skip
            sheet.write(folder, facts)
            sheets.append(sheet)
        if not sheets:
            continue
        if args.baselines:
            sheets += baseline_sheets(test_set, args.protocol, width=len(sheets[0].label))
        print(format_table(test_set.name, sheets))
        for line in format_excluded(sheets):
            print(line)
        used = ", ".join(f"{m.weights} (sha256 {m.sha256[:12]}, decoder image: {m.skip})" for m in methods)
        pairs = " and ".join(str(n) for n in sorted({len(sheet.images) for sheet in sheets}))
        print(f"protocol {args.protocol}, {pairs} pairs, weights {used}, {device} {args.precision}")
    for stem in stems:
        print(f"fused images, metrics.csv and metrics.json: {args.out / stem}")
    return EXIT_BAD_INPUT if incomplete else 0


def refuse_repeated(option: str, what: str, names: list[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{option} names two {what} called {repeated}; their results would share a folder: rename one")


def find_sets(args: argparse.Namespace, benchmark: Benchmark) -> list[TestSet]:
    """The sets to run. Sets that were asked for must exist; absent default sets give way to the bundled ones."""
    given = os.environ.get(DATA_VARIABLE)
    root = args.data or (Path(given) / "test_img" if given else in_checkout("test_img"))
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; name one with --data")
    if not args.sets and modalities_in(root):
        return [open_set(root)]
    if args.sets:
        return [open_set(root / name) for name in args.sets]
    present = [name for name in benchmark.sets if (root / name).is_dir()]
    if not present and args.data:
        raise FileNotFoundError(f"{root} holds none of {', '.join(benchmark.sets)}; name its folders with --sets")
    absent = ", ".join(name for name in benchmark.sets if name not in present)
    if absent:
        shown = "" if present else "; the bundled samples are shown instead"
        print(f"benchmark sets not found: {absent}. Put them at {root}/<set>/<modality>/ (README, Data){shown}")
    if not present:
        return [open_set(in_checkout("test_img", name)) for name in benchmark.samples]
    return [open_set(root / name) for name in present]


def open_set(folder: Path) -> TestSet:
    vis, ir = find_modalities(folder)
    return TestSet(folder.resolve().name, vis, ir, list_pairs(vis, ir))


def load_method(path: Path, system: type, device: torch.device, skip: str | None, benchmark: Benchmark) -> Method:
    model = system().to(device).eval()
    about = model.load_published(path)
    # Published files say nothing about themselves; their names do.
    trained_for = about.get("task") or ("mif" if "MIF" in path.stem.upper() else "ivf")
    skip = skip or model.default_skip(trained_for, benchmark.task)
    if skip not in model.skips:
        raise InputError(f"--skip {skip} is unknown to {model.label}; it takes one of: {', '.join(model.skips)}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Method(model, path, benchmark.row_label(model.label, path.stem), skip, sha256)


def fuse_set(method: Method, test_set: TestSet, folder: Path, args: argparse.Namespace) -> ScoreSheet:
    """Fuses the pairs of a set into PNG files and scores the files as written. A bad pair is named and left out.

    Beside the network the next pair is read, and the last one written and scored, unless memory is short.
    """
    images: dict[str, dict[str, float]] = {}
    description = f"{test_set.name}, {method.weights.stem}"
    most_waiting = 0 if args.max_memory else 1

    def name_bad_pair(pair: Pair, error: Exception, fate: str) -> None:
        if args.debug or getattr(error, "errno", None) in HOPELESS:
            raise error
        first_line = str(error).splitlines()[0]
        tqdm.write(f"warning: {test_set.name}/{pair.name}: {first_line}; {fate}", file=sys.stderr)

    def write_and_score(pair: Pair, vis: np.ndarray, ir: np.ndarray, fused: np.ndarray) -> None:
        fate = "left out"
        try:
            path = folder / f"{pair.name}.png"
            write_grey(path, fused)
            fate = "fused, but not scored"
            images[pair.name] = score(read_grey(path), ir, vis, args.protocol)
        except (ValueError, OSError, RuntimeError) as error:
            name_bad_pair(pair, error, fate)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pairs = tqdm(test_set.found.pairs, desc=description, unit="pair", disable=None)
        finishing: deque[Future[None]] = deque()
        for pair, reading in read_ahead(pairs, reader, most_waiting):
            try:
                vis, ir = reading.result()
                fused = fuse_arrays(
                    method.model, vis, ir, method.skip, normalise=not args.no_stretch, precision=args.precision,
                    max_memory=args.max_memory, scratch=args.scratch,
                )  # fmt: skip
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                name_bad_pair(pair, error, "left out")
                continue
            finishing.append(writer.submit(write_and_score, pair, vis, ir, fused))
            while len(finishing) > most_waiting:
                finishing.popleft().result()
        for last in finishing:
            last.result()
    return ScoreSheet(method.label, images)


def read_ahead(
    pairs: Iterable[Pair], reader: ThreadPoolExecutor, depth: int
) -> Iterator[tuple[Pair, Future[tuple[np.ndarray, np.ndarray]]]]:
    """Each pair with its images, `depth` of which are read before they are asked for."""
    waiting: deque[tuple[Pair, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    for pair in pairs:
        waiting.append((pair, reader.submit(pair.read)))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def baseline_sheets(test_set: TestSet, protocol: str, width: int) -> list[ScoreSheet]:
    """Scores of the sources and their average taken for fused images: what a method must beat."""
    makers: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        f"{test_set.vis_folder.name} only": lambda vis, ir: vis,
        f"{test_set.ir_folder.name} only": lambda vis, ir: ir,
        "average": lambda vis, ir: (vis + ir) / 2,
    }
    sheets: dict[str, dict[str, dict[str, float]]] = {name: {} for name in makers}
    for pair in tqdm(test_set.found.pairs, desc=f"{test_set.name}, baselines", unit="pair", disable=None):
        try:
            vis, ir = pair.read()
            scores = {
                name: score(to_uint8(make(vis, ir)).astype(np.float32), ir, vis, protocol)
                for name, make in makers.items()
            }
        except (ValueError, OSError):
            continue  # fuse_set has named it
        for name in makers:
            sheets[name][pair.name] = scores[name]
    return [ScoreSheet(name.ljust(width), images) for name, images in sheets.items()]
