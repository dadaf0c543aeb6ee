"""Time and memory of fusing one pair, by size and by what --max-memory allows.

    python -m benchmarks.scale --megapixels 0.3 1 3 --json scale.json
    python -m benchmarks.scale --megapixels 1 --max-memory 700MB 2GB --compare
    python -m benchmarks.scale --megapixels 24 100 --max-memory 4GB 8GB --plan-only

Each run is a process of its own. Its peak is the most memory that the whole process had resident while it fused,
Python, torch and the images included; pages of the scratch file count as long as they are mapped. Images are noise
and weights random: time and memory only, never quality.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inference import made_model, operations_per_pixel, peak_memory
from benchmarks.metrics import processor
from utils.common import EXIT_BAD_INPUT, git_commit
from utils.inference.fusing import PRECISIONS, keep_freed_memory, memory_to_take, plan_for, run_plan
from utils.inference.memory import MAP_BYTES, BoundedWorkspace, format_size, parse_size, resident_memory


def size_of(megapixels: float) -> tuple[int, int]:
    """Height and width, three to four, of so many millions of pixels."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    return height, round(megapixels * 1e6 / height)


def run_one(
    megapixels: float,
    max_memory: int | None,
    scratch: Path | None,
    plan_only: bool,
    out: Path | None,
    precision: str = "float32",
) -> dict:
    """Fuses noise of this size in this process and says what it took."""
    height, width = size_of(megapixels)
    device = torch.device("cpu")
    model = made_model(device)
    rng = np.random.default_rng(0)
    shape = (2, height, width)
    vis, ir = rng.random(shape, dtype=np.float32) * np.float32(255) if not plan_only else np.empty(shape, np.float32)
    before = resident_memory()
    plan = plan_for((height, width), memory_to_take(device, max_memory), device, precision)
    workspace = BoundedWorkspace(plan.map_room, device, scratch)
    maps = MAP_BYTES * height * width * PRECISIONS[precision].itemsize // 4
    report: dict[str, Any] = {
        "height": height, "width": width, "precision": precision, "max_memory": max_memory, "resident_before": before,
        "pixels": plan.pixels,
        "planned_working": plan.working, "planned_map_room": plan.map_room, "maps": maps,
        "planned_scratch": maps if maps > plan.map_room else 0,
    }  # fmt: skip
    if plan_only:
        return report
    peak_memory(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    fused = run_plan(model, vis, ir, "vis", plan, workspace, normalise=False, precision=precision)
    report |= {
        "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall,
        "peak": peak_memory(), "most": workspace.most, "operations": operations_per_pixel(model) * height * width,
    }  # fmt: skip
    if out:
        np.save(out, fused)
    return report


def describe(found: dict[str, Any]) -> str:
    allowed = format_size(found["max_memory"]) if found["max_memory"] else "all free"
    line = f"{found['width']}x{found['height']} ({found['width'] * found['height'] / 1e6:.1f} MP) "
    line += f"in {found['precision']}, allowed {allowed}: "
    if "peak" not in found:
        line += f"pieces of {found['pixels']} pixels, {format_size(found['planned_working'])} for images and pieces, "
        line += f"{format_size(found['maps'])} of maps in "
        return line + ("a scratch file" if found["planned_scratch"] else "memory") + " (planned, not run)"
    line += f"{found['cpu_seconds']:.1f} s of processor, wall {found['wall_seconds']:.1f} s, "
    line += f"{found['operations'] / found['cpu_seconds'] / 1e9:.1f} GFLOP/s, peak {format_size(found['peak'])} "
    line += f"({format_size(found['resident_before'])} before), maps {format_size(found['most']['device'])} in memory "
    line += f"and {format_size(found['most']['scratch'])} in scratch, pieces of {found['pixels']} pixels"
    return line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.3, 1], help="default: 0.3 1")
    parser.add_argument("--max-memory", type=parse_size, nargs="+", metavar="SIZE", help="default: what is free")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="default: the system's temporary folder")
    parser.add_argument("--compare", action="store_true", help="how far results of one size are apart")
    parser.add_argument("--plan-only", action="store_true", help="say what a run would need, and run nothing")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--load", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--here", type=Path, metavar="PATH", help=argparse.SUPPRESS)  # the child: where to save
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.megapixels) < 0.0001 or args.threads < 1:
        parser.error("--megapixels must be at least 0.0001, and --threads at least 1")
    torch.set_num_threads(args.threads)
    if args.here:
        if not args.max_memory:
            keep_freed_memory()
        found = run_one(
            args.megapixels[0],
            args.max_memory and args.max_memory[0],
            args.scratch,
            args.plan_only,
            args.here,
            args.precision,
        )
        print(json.dumps(found))
        return 0
    commit = git_commit()  # now: the checkout may change during the runs
    runs, failed = [], False
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for megapixels in args.megapixels:
            first = None
            for allowed in args.max_memory or [None]:
                saved = Path(folder) / "fused.npy"
                command = [sys.executable, "-m", "benchmarks.scale", "--megapixels", str(megapixels)]
                command += ["--here", str(saved), "--threads", str(args.threads), "--precision", args.precision]
                command += ["--max-memory", str(allowed)] if allowed else []
                command += ["--scratch", str(args.scratch)] if args.scratch else []
                command += ["--plan-only"] if args.plan_only else []
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{megapixels} MP, allowed {allowed}: {done.stderr.strip().splitlines()[-1]}")
                    failed = True
                    continue
                found = json.loads(done.stdout)
                line = describe(found)
                if args.compare and not args.plan_only:
                    fused = np.load(saved)
                    if first is not None:
                        found["largest_difference"] = float(np.abs(fused - first).max() / 255)
                        line += f", difference {found['largest_difference']:.1e}"
                    first = fused if first is None else first
                print(line, flush=True)
                runs.append(found)
    if args.json:
        report = {
            "benchmark": "scale",
            "runs": runs,
            "machine": {
                "processor": processor(), "system": platform.platform(), "threads": args.threads, "load": args.load,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "commit": commit,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return EXIT_BAD_INPUT if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
