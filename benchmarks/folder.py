"""Where the time of a whole test set goes: network, metrics, files.

    python -m benchmarks.folder --json folder.json --data path/to/TNO     # further options are those of test_IVF.py

Runs the test script with a clock around each thing that it calls. Files are read, and images written and scored, beside
the network; what counts is for how much of the wall time neither the network nor a metric was at work, which is when
something waits.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import test_IVF
import test_MIF
from benchmarks.metrics import processor
from utils.common import git_commit
from utils.evaluation import benchmark

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

    replaced = {function: timed(name, getattr(benchmark, function)) for name, function in WATCHED.items()}
    with mock.patch.multiple(benchmark, **replaced):
        yield spans


def covered(spans: Sequence[Span]) -> float:
    """Seconds within at least one of the spans: [(0, 2), (1, 3), (5, 6)] -> 4."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("ivf", "mif"), default="ivf", help="mif: test_MIF.py (default: ivf)")
    parser.add_argument("--load", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args, options = parser.parse_known_args(argv)
    script = test_IVF if args.task == "ivf" else test_MIF
    with tempfile.TemporaryDirectory() as out, watched() as spans:
        started = time.perf_counter()
        code = script.main([*options, "--out", out])
        wall = time.perf_counter() - started
    report = {
        "benchmark": "folder", "options": options, "pairs": len(spans["network"]), "wall_seconds": wall,
        "seconds": {name: sum(end - start for start, end in found) for name, found in spans.items()},
        "share_of_network": covered(spans["network"]) / wall,
        "share_of_network_or_metrics": covered(spans["network"] + spans["metrics"]) / wall,
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "load": args.load},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "commit": git_commit(),
    }  # fmt: skip
    seconds = ", ".join(f"{name} {spent:.2f}" for name, spent in report["seconds"].items())
    print(f"{report['pairs']} fusions: wall {wall:.1f} s; in all {seconds} s; network at work "
          f"{report['share_of_network']:.1%} of the wall time, network or metrics "
          f"{report['share_of_network_or_metrics']:.1%}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
