"""Time of the eight metrics of the published table: utils/metrics.py against the reference implementation.

    python -m benchmarks.metrics --json metrics.json

Both score the same made pair, so this says something about speed and never about quality. They take turns in
one process on one thread, so that whatever else the machine does falls on both. Times are processor times,
which leave out the moments when another program has the processor. The reference (`tests/reference_metrics.py`) gets
float32 images, as the published evaluator reads them, and float64 for a second difference: sums in float32 are good to
1e-6 only.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn, which the reference needs

from tests import reference_metrics
from utils import metrics
from utils.common import InputError, git_commit, run_script


def made_pair(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fused image and two sources with smooth regions, edges, flat patches and noise: float32 (H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    sources = []
    for _ in range(2):
        image = np.full((height, width), 90.0)
        for _ in range(6):
            phase = 2 * np.pi * (y / rng.uniform(20, 200) + x / rng.uniform(20, 200)) + rng.uniform(0, 6)
            image += rng.uniform(5, 20) * np.sin(phase)
        image += rng.normal(0, 3, size=image.shape)
        for _ in range(40):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            tall, wide = rng.integers(8, max(9, height // 4)), rng.integers(8, max(9, width // 4))
            patch = image[top : top + tall, left : left + wide]
            patch[:] = rng.uniform(0, 255) if rng.random() < 0.3 else patch + rng.uniform(-60, 60)
        sources.append(np.round(image.clip(0, 255)).astype(np.float32))
    fused = np.floor((sources[0] + sources[1]) / 2 + 0.5)
    return fused, sources[0], sources[1]


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of single calls in ms. A turn lasts a second or one call, whichever is longer."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            turn_ends = time.process_time() + 1.0
            while True:
                start = time.process_time()
                call()
                cpu_ms[name].append((time.process_time() - start) * 1e3)
                if time.process_time() >= turn_ends:
                    break
    keys = ("q25_ms", "median_ms", "q75_ms")
    return {
        name: dict(zip(keys, map(float, np.percentile(times, [25, 50, 75])), strict=True)) | {"calls": len(times)}
        for name, times in cpu_ms.items()
    }


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, str]:
    return max((abs(ours[key] - theirs[key]) / abs(theirs[key]), key) for key in ours)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=576, help="rows of the made images (default 576)")
    parser.add_argument("--width", type=int, default=768, help="columns of the made images (default 768)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    return run_script(time_metrics, parser.parse_args(argv))


def time_metrics(args: argparse.Namespace) -> int:
    if min(args.height, args.width) < metrics.SMALLEST_SCORED or args.rounds < 1:
        raise InputError(f"--height and --width must be at least {metrics.SMALLEST_SCORED}, --rounds at least 1")
    images = made_pair(args.height, args.width, seed=0)
    keys = metrics.PAPER_TABLE

    calls = {
        "ours": lambda: metrics.score(*images, metrics=keys),
        "reference": lambda: reference_metrics.eight(*images),
    }
    with threadpool_limits(limits=1):
        times = time_in_turns(calls, args.rounds)
    ratio = times["reference"]["median_ms"] / times["ours"]["median_ms"]
    ours = metrics.score(*images, metrics=keys)
    differences = {
        "float64": largest_difference(ours, reference_metrics.eight(*(image.astype(np.float64) for image in images))),
        "float32": largest_difference(ours, reference_metrics.eight(*images)),
    }

    print(f"{' '.join(keys)}, {args.width}x{args.height}, one thread, {args.rounds} rounds in turns")
    for name, t in times.items():
        spread = f"quartiles {t['q25_ms']:.1f} to {t['q75_ms']:.1f}"
        print(f"  {name:14} {t['median_ms']:9.1f} ms median of {t['calls']}, {spread}")
    print(f"  ratio of the medians {ratio:.1f}")
    for name, (difference, key) in differences.items():
        print(f"  largest relative difference from the reference in {name}: {difference:.1e} ({key})")
    if args.json:
        report = {
            "benchmark": "metrics", "height": args.height, "width": args.width, "rounds": args.rounds,
            "metrics": list(keys), "times": times, "ratio": ratio,
            "largest_relative_difference": differences, "processor": processor(), "system": platform.platform(),
            "python": platform.python_version(), "numpy": np.__version__, "commit": git_commit(),
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
