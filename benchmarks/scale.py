"""Time and memory of fusing one pair, by size and by what --max-memory allows.

    python -m benchmarks.scale --megapixels 0.3 1 3 --json scale.json
    python -m benchmarks.scale --megapixels 1 --max-memory 700MB 2GB     # and how far the results are apart

Each run is a process of its own. Its peak is the most memory that the whole process had resident while it fused,
Python, torch and the images included; pages of the scratch file count as long as they are mapped. Images are noise
and weights random: time and memory only, never quality.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import about, in_process, parser_of, peak_memory, write_json
from utils.common import EXIT_BAD_INPUT, InputError, number_in, run_script
from utils.inference.fusing import PRECISIONS, fuse_arrays, keep_freed_memory
from utils.inference.memory import format_size, parse_size
from zoo.cddfuse import CDDFuseSystem


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--megapixels", type=number_in(float, 0.001), nargs="+", default=[0.3, 1], help="default: 0.3 1")
    add("--max-memory", type=parse_size, nargs="+", default=[None], metavar="SIZE", help="default: what is free")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--scratch", type=Path, metavar="DIR", help="default: the system's temporary folder")
    return run_script(measure, parser, argv)


def measure(args: argparse.Namespace) -> int:
    report, code = {"benchmark": "scale", "runs": [], **about(args.load)}, 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for megapixels in args.megapixels:
            first, saved = None, Path(folder) / "fused.npy"
            for allowed in args.max_memory:
                try:
                    found = in_process(fuse_noise, megapixels, allowed, args.precision, args.scratch, saved)
                except (InputError, BrokenProcessPool) as error:  # too little memory, said or not
                    print(f"{megapixels:g} MP, allowed {allowed}: {error}")
                    code = EXIT_BAD_INPUT
                    continue
                fused = np.load(saved)
                first = fused if first is None else first
                found["largest_difference"] = float(np.abs(fused - first).max() / 255)
                print(f"{found['width']}x{found['height']}, allowed {format_size(allowed) if allowed else 'all free'}: "
                      f"{found['cpu_seconds']:.1f} s of processor, wall {found['wall_seconds']:.1f} s, peak "
                      f"{format_size(found['peak'])} ({format_size(found['resident_before'])} before), difference "
                      f"from the first {found['largest_difference']:.1e}", flush=True)  # fmt: skip
                report["runs"].append(found)
    write_json(args.json, report)
    return code


def fuse_noise(
    megapixels: float, allowed: int | None, precision: str, scratch: Path | None, target: Path
) -> dict[str, Any]:
    """Fuses noise of one size, saves the result, and says what it took."""
    if not allowed:
        keep_freed_memory()
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))  # three to four
    shape = (2, height, round(megapixels * 1e6 / height))
    torch.manual_seed(0)
    model = CDDFuseSystem().eval()
    vis, ir = np.random.default_rng(0).random(shape, dtype=np.float32) * np.float32(255)
    before = peak_memory(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    how = {"precision": precision, "max_memory": allowed, "scratch": scratch}
    np.save(target, fuse_arrays(model, vis, ir, "vis", normalise=False, **how))
    return {
        "height": height, "width": shape[2], "precision": precision, "max_memory": allowed,
        "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall,
        "resident_before": before, "peak": peak_memory(),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
