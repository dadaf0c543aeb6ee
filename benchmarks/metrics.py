"""Time of the eight metrics of the published table: utils/metrics.py against the reference implementation.

    python -m benchmarks.metrics --json metrics.json

Both score the same made pair, in turns, in one process on one thread; times are processor times. The reference
(`tests/reference_metrics.py`) gets float32 images, as the published evaluator reads them, and float64 for a second
difference: sums in float32 are good to 1e-6 only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn, which the reference needs

from benchmarks import about, made_pair, parser_of, spread, time_in_turns, write_json
from tests import reference_metrics
from utils import metrics
from utils.common import number_in, run_script

HEIGHT, WIDTH = 576, 768  # of the made images


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=number_in(int, 1), default=15, help="calls of each side (default 15)")
    return run_script(time_metrics, parser, argv)


def time_metrics(args: argparse.Namespace) -> int:
    report = {"benchmark": "metrics", "height": HEIGHT, "width": WIDTH, **about(args.load)}
    a, b = made_pair(HEIGHT, WIDTH)
    images = np.floor((a + b) / 2 + 0.5), a, b
    calls = {
        "ours": lambda: metrics.score(*images, metrics=metrics.PAPER_TABLE),
        "reference": lambda: reference_metrics.eight(*images),
    }
    with threadpool_limits(limits=1):
        times, results = time_in_turns(calls, args.rounds, warm_up=1)
    found = {name: spread(of["cpu"]) for name, of in times.items()}
    ratio = found["reference"]["median"] / found["ours"]["median"]
    ours, precise = results["ours"], reference_metrics.eight(*(image.astype(np.float64) for image in images))
    differences = {
        name: max((abs(ours[key] - theirs[key]) / abs(theirs[key]), key) for key in ours)
        for name, theirs in (("float64", precise), ("float32", results["reference"]))
    }
    print(f"{' '.join(ours)}, {WIDTH}x{HEIGHT}, one thread, {args.rounds} rounds in turns")
    for name, of in found.items():
        milliseconds = [f"{1e3 * of[key]:.1f}" for key in ("median", "q25", "q75")]
        print("  {:14} {} ms, quartiles {} to {}".format(name, *milliseconds))
    print(f"  ratio of the medians {ratio:.1f}")
    for name, (difference, key) in differences.items():
        print(f"  largest relative difference from the reference in {name}: {difference:.1e} ({key})")
    write_json(args.json, report | {"seconds": found, "ratio": ratio, "largest_relative_difference": differences})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
