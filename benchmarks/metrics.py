"""Time of the eight metrics of the published table: utils/metrics.py against the literal transcription.

    python -m benchmarks.metrics --json metrics.json

Both score the same made pair, so this says something about speed and never about quality. They take turns in
one process on one thread, so that whatever else the machine does falls on both. Times are processor times,
which leave out the moments when another program has the processor; wall times stand beside them. The
transcription (`tests/reference_metrics.py`) gets float32 images, as the published evaluator reads them. The
difference is given from a transcription in float64 as well, since sums in float32 are good to 1e-6 only.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn, which the transcription needs

from tests import reference_metrics
from utils import metrics
from utils.common import InputError, run_script

ROOT = Path(__file__).resolve().parent.parent


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
    wall_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            turn_ends = time.process_time() + 1.0
            while True:
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                cpu_ms[name].append((time.process_time() - cpu) * 1e3)
                wall_ms[name].append((time.perf_counter() - wall) * 1e3)
                if time.process_time() >= turn_ends:
                    break
    summary = {}
    for name in calls:
        low, median, high = np.percentile(cpu_ms[name], [25, 50, 75])
        summary[name] = {
            "median_ms": float(median),
            "q25_ms": float(low),
            "q75_ms": float(high),
            "min_ms": min(cpu_ms[name]),
            "wall_median_ms": float(np.median(wall_ms[name])),
            "calls": len(cpu_ms[name]),
        }
    return summary


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, str]:
    """The largest relative difference and the metric that shows it."""
    return max((abs(ours[key] - theirs[key]) / abs(theirs[key]), key) for key in ours)


def commit() -> str:
    """Commit of the working tree, marked if files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=576, help="rows of the made images (default 576)")
    parser.add_argument("--width", type=int, default=768, help="columns of the made images (default 768)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the made images (default 0)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(time_metrics, build_parser().parse_args(argv))


def time_metrics(args: argparse.Namespace) -> int:
    least = metrics.SMALLEST_SCORED
    if min(args.height, args.width) < least or args.rounds < 1:
        raise InputError(
            f"--height {args.height} and --width {args.width} must be at least {least}, --rounds at least 1"
        )
    images = made_pair(args.height, args.width, args.seed)
    images_64 = tuple(image.astype(np.float64) for image in images)
    keys = metrics.PAPER_TABLE

    calls = {
        "ours": lambda: metrics.score(*images, metrics=keys),
        "transcription": lambda: reference_metrics.eight(*images),
    }
    with threadpool_limits(limits=1):
        times = time_in_turns(calls, args.rounds)
    ratio = times["transcription"]["median_ms"] / times["ours"]["median_ms"]
    ours = metrics.score(*images, metrics=keys)
    differences = {
        "float64": largest_difference(ours, reference_metrics.eight(*images_64)),
        "float32": largest_difference(ours, reference_metrics.eight(*images)),
    }

    print(f"{' '.join(keys)}, {args.width}x{args.height}, one thread, {args.rounds} rounds in turns")
    for name, t in times.items():
        spread = f"quartiles {t['q25_ms']:.1f} to {t['q75_ms']:.1f}, wall {t['wall_median_ms']:.1f}"
        print(f"  {name:14} {t['median_ms']:9.1f} ms median of {t['calls']}, {spread}")
    print(f"  ratio of the medians {ratio:.1f}")
    for name, (difference, key) in differences.items():
        print(f"  largest relative difference from the transcription in {name}: {difference:.1e} ({key})")
    if args.json:
        report = {
            "benchmark": "metrics",
            "size": {"height": args.height, "width": args.width},
            "rounds": args.rounds,
            "seed": args.seed,
            "metrics": list(keys),
            "times": times,
            "ratio": ratio,
            "largest_relative_difference": {
                name: {"value": difference, "metric": key} for name, (difference, key) in differences.items()
            },
            "machine": {"processor": processor(), "system": platform.platform(), "threads": 1},
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "commit": commit(),
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
