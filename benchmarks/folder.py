"""Where the time of a whole test set goes: network, metrics, files.

    python -m benchmarks.folder --data path/to/TNO --pairs 8 --json folder.json

Runs the test scripts' own loop over pairs, with a clock around each thing that it calls. Files are read, and images
written and scored, beside the network; what counts is for how much of the wall time neither the network nor a metric
was at work, which is when something waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.metrics import processor
from test_IVF import IVF
from utils.common import InputError, git_commit, testing
from utils.data.pairs import TestSet, find_modalities, list_pairs
from utils.inference.fusing import find_weights, keep_freed_memory, pick_device
from zoo import SYSTEMS, find_system

Span = tuple[float, float]
WATCHED = {"read": "read_pair", "network": "fuse_arrays", "write": "write_image", "metrics": "score"}


@contextmanager
def watched() -> Iterator[dict[str, list[Span]]]:
    """Within this block, when each of `WATCHED` ran: name -> (start, end) of its calls."""
    spans: dict[str, list[Span]] = {name: [] for name in WATCHED}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                spans[name].append((started, time.perf_counter()))

        return run

    replaced = {function: timed(name, getattr(testing, function)) for name, function in WATCHED.items()}
    with mock.patch.multiple(testing, **replaced):
        yield spans


def covered(spans: Sequence[Span]) -> float:
    """Seconds within at least one of the spans.

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4
    """
    total, reached = 0, float("-inf")
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure(folder: Path, pairs: int | None, system: str, precision: str, device: str) -> dict[str, Any]:
    found = list_pairs(*find_modalities(folder))
    test_set = TestSet(folder.name, "vi", "ir", dataclasses.replace(found, pairs=found.pairs[:pairs]))
    script = argparse.ArgumentParser()
    testing.add_arguments(script, IVF, SYSTEMS)
    asked = script.parse_args(["--precision", precision, "--device", device])
    cls = find_system(system)
    with tempfile.TemporaryDirectory() as out:
        method = testing.load_method(find_weights(cls, "ivf")[-1], cls, pick_device(device), None, "ivf")
        first = dataclasses.replace(test_set, found=dataclasses.replace(found, pairs=found.pairs[:1]))
        testing.fuse_set(method, first, Path(out), asked)  # what a library prepares once is not part of a folder
        with watched() as spans:
            started = time.perf_counter()
            sheet = testing.fuse_set(method, test_set, Path(out), asked)
            wall = time.perf_counter() - started
    return {
        "set": folder.name, "pairs": len(sheet.images), "images": sheet.digest, "system": method.model.label,
        "weights_sha256": method.sha256, "precision": precision, "wall_seconds": wall,
        "seconds": {name: sum(end - start for start, end in found) for name, found in spans.items()},
        "share_of_network": covered(spans["network"]) / wall,
        "share_of_network_or_metrics": covered(spans["network"] + spans["metrics"]) / wall,
    }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="a folder with vi/ and ir/")
    add("--pairs", type=int, help="only so many, the first ones (default: all)")
    add("--system", default="cddfuse", help="with its bundled weights (default: cddfuse)")
    add("--precision", default="float32", choices=("float32", "bfloat16"))
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the processor (default: all)")
    add("--load", default="", help="what else the machine was doing, for the record")
    add("--json", type=Path, metavar="PATH", help="also write the results there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    commit = git_commit()  # now: the checkout may change during the runs
    try:
        found = measure(args.data, args.pairs, args.system, args.precision, args.device)
    except (InputError, OSError) as error:
        parser.error(str(error))
    report = {
        "benchmark": "folder", **found,
        "machine": {"processor": processor(), "system": platform.platform(), "threads": args.threads, "load": args.load,
                    "device": args.device},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": commit,
    }  # fmt: skip
    seconds = ", ".join(f"{name} {spent:.2f}" for name, spent in found["seconds"].items())
    print(f"{found['set']}, {found['pairs']} pairs: wall {found['wall_seconds']:.1f} s; in all {seconds} s; network at "
          f"work {found['share_of_network']:.1%} of the wall time, network or metrics "
          f"{found['share_of_network_or_metrics']:.1%}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
