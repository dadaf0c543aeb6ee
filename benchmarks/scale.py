"""Time and memory of fusing one pair, by size and by what --max-memory allows.

    python -m benchmarks.scale --megapixels 0.3 1 3 --json scale.json
    python -m benchmarks.scale --megapixels 1 --max-memory 700MB 2GB     # and how far the results are apart

Each run is a process of its own. Its peak is the most memory that the whole process had resident while it fused,
Python, torch and the images included; pages of the scratch file count as long as they are mapped. Images are noise
and weights random: time and memory only, never quality.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import about, parser_of, peak_memory, write_json
from utils.common import EXIT_BAD_INPUT, run_script
from utils.inference.fusing import PRECISIONS, fuse_arrays, keep_freed_memory
from utils.inference.memory import format_size, parse_size
from zoo.cddfuse import CDDFuseSystem


def fuse_noise(args: argparse.Namespace) -> int:
    """Fuses noise of one size in this process, saves the result, and prints what it took as JSON."""
    if not args.max_memory:
        keep_freed_memory()
    height = round(math.sqrt(args.megapixels[0] * 1e6 * 3 / 4))  # three to four
    shape = (2, height, round(args.megapixels[0] * 1e6 / height))
    torch.manual_seed(0)
    model = CDDFuseSystem().eval()
    vis, ir = np.random.default_rng(0).random(shape, dtype=np.float32) * np.float32(255)
    allowed = args.max_memory[0] if args.max_memory else None
    before = peak_memory(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    fused = fuse_arrays(
        model, vis, ir, "vis", normalise=False, precision=args.precision, max_memory=allowed, scratch=args.scratch
    )
    found = {
        "height": height, "width": shape[2], "precision": args.precision, "max_memory": allowed,
        "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall,
        "resident_before": before, "peak": peak_memory(),
    }  # fmt: skip
    np.save(args.here, fused)
    print(json.dumps(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--megapixels", type=float, nargs="+", default=[0.3, 1], help="default: 0.3 1")
    add("--max-memory", type=parse_size, nargs="+", default=[], metavar="SIZE", help="default: what is free")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--scratch", type=Path, metavar="DIR", help="default: the system's temporary folder")
    add("--here", type=Path, help=argparse.SUPPRESS)  # the child: where to save the fused image
    return run_script(lambda args: fuse_noise(args) if args.here else measure(args), parser, argv)


def measure(args: argparse.Namespace) -> int:
    report, code = {"benchmark": "scale", "runs": [], **about(args.load)}, 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for megapixels in args.megapixels:
            first = None
            for allowed in args.max_memory or [None]:
                saved = Path(folder) / "fused.npy"
                command = [sys.executable, "-m", "benchmarks.scale", "--here", saved, "--megapixels", megapixels]
                command += ["--precision", args.precision, *(["--max-memory", allowed] if allowed else [])]
                command += ["--scratch", args.scratch] if args.scratch else []
                done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
                if done.returncode:
                    print(f"{megapixels} MP, allowed {allowed}: {done.stderr.strip().splitlines()[-1]}")
                    code = EXIT_BAD_INPUT
                    continue
                found, fused = json.loads(done.stdout), np.load(saved)
                first = fused if first is None else first
                found["largest_difference"] = float(np.abs(fused - first).max() / 255)
                print(f"{found['width']}x{found['height']}, allowed {format_size(allowed) if allowed else 'all free'}: "
                      f"{found['cpu_seconds']:.1f} s of processor, wall {found['wall_seconds']:.1f} s, peak "
                      f"{format_size(found['peak'])} ({format_size(found['resident_before'])} before), difference "
                      f"from the first {found['largest_difference']:.1e}", flush=True)  # fmt: skip
                report["runs"].append(found)
    write_json(args.json, report)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
