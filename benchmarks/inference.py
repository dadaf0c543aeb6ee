"""Time and memory of fusing a pair: our engine against the published forward pass written out literally.

    python -m benchmarks.inference --sizes 128x128 640x480 --json inference.json

All sides take turns in one process on the same made pair, so that whatever else the machine does falls on all. On a
CPU, times are processor times, summed over threads, which leave out the moments when another program has the
processor (though not what it does to caches and memory); wall times stand beside them. The transcription is
`tests/reference_net.py` with the same weights. Peak memory is that of a process for each side, above what it had
before fusing. Speed and memory only, never quality: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.metrics import made_pair, processor
from tests import reference_net
from utils.common import InputError, git_commit, run_script
from utils.inference.fusing import fuse_arrays, keep_freed_memory, pick_device, to_levels, to_network
from utils.inference.memory import resident_memory
from zoo.cddfuse import CDDFuseSystem

SIDES = ("transcription", "float32", "bfloat16")


def operations_per_pixel(model: CDDFuseSystem) -> int:
    """Multiplications and additions that the composed network needs for a pixel of a fused pair.

    A convolution needs its weights once a pixel. The two convolutions of a base block's attention count as the one
    that they compose to; attention needs q k^T within heads, and one matrix for attention and projection.
    """

    def once(part: torch.nn.Module) -> int:
        count = 0
        for name, weight in part.named_parameters():
            if weight.ndim == 4 and not name.endswith("qkv1.weight"):
                count += weight[:, :64].numel() if name.endswith("qkv2.weight") else weight.numel()
            elif name.endswith(("temperature", "scale")):
                count += 64 * 64 // len(weight) + 2 * 64  # q k^T, squared norms
        return count

    return 2 * (2 * once(model.encoder) + once(model.base_fusion) + once(model.detail_fusion) + once(model.decoder))


def made_model(device: torch.device) -> CDDFuseSystem:
    torch.manual_seed(0)
    return CDDFuseSystem().to(device).eval()


@torch.inference_mode()
def transcribed(model: CDDFuseSystem, vis: np.ndarray, ir: np.ndarray) -> np.ndarray:
    device = next(model.parameters()).device
    return to_levels(reference_net.CDDFuse.like(model).fuse(to_network(vis, device), to_network(ir, device)))


def transcribed_with_exact_sums(model: CDDFuseSystem, vis: np.ndarray, ir: np.ndarray) -> np.ndarray:
    """The same with attention in float64, whose sums over all pixels lose digits in float32."""
    literal = reference_net.channel_attention

    def exact(qkv: torch.Tensor, temperature: torch.Tensor, heads: int) -> torch.Tensor:
        return literal(qkv.double(), temperature.double(), heads).to(qkv.dtype)

    with mock.patch.object(reference_net, "channel_attention", exact):
        return transcribed(model, vis, ir)


def sides(model: CDDFuseSystem, vis: np.ndarray, ir: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    def ours(precision: str) -> Callable[[], np.ndarray]:
        return lambda: fuse_arrays(model, vis, ir, "vis", normalise=False, precision=precision)

    calls = (lambda: transcribed(model, vis, ir), ours("float32"), ours("bfloat16"))
    return dict(zip(SIDES, calls, strict=True))


def matrix_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations a second of a large matrix product, the best of five."""
    side = 1024 if device.type == "cpu" else 8192
    x = torch.rand(side, side, device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        started = clock()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return 2 * side**3 / best


def spread(seconds: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high), "calls": len(seconds)}


def time_size(
    model: CDDFuseSystem, height: int, width: int, rounds: int, chosen: Sequence[str], exact: bool
) -> dict[str, Any]:
    """Times of all sides in turns, and how far their results are apart."""
    device = next(model.parameters()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    pair = made_pair(height, width, seed=0)[1:]
    calls = {name: call for name, call in sides(model, *pair).items() if name in chosen}
    small = sides(model, *made_pair(48, 64, seed=0)[1:])
    results, cpu, wall = {}, {name: [] for name in calls}, {name: [] for name in calls}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for name in calls:
        small[name]()  # what a library prepares once is not part of a call
    for _ in range(rounds):
        for dtype, found in rates.items():
            found.append(matrix_rate(device, getattr(torch, dtype), clock))
        for name, call in calls.items():
            started, wall_started = clock(), time.perf_counter()
            results[name] = call()
            cpu[name].append(clock() - started)
            wall[name].append(time.perf_counter() - wall_started)
    report: dict[str, Any] = {"matrix_product_per_s": {name: float(np.median(found)) for name, found in rates.items()}}
    operations = operations_per_pixel(model) * height * width
    with_exact_sums = transcribed_with_exact_sums(model, *pair) if exact else None
    for name in calls:
        side = report[name] = {"seconds": spread(cpu[name]), "wall_seconds": spread(wall[name])}
        rate = operations / side["seconds"]["median"]
        side["pairs_per_s"] = 1 / side["wall_seconds"]["median"]
        side["operations_per_s"] = rate
        side["share_of_matrix_product"] = rate / report["matrix_product_per_s"][name.replace(SIDES[0], "float32")]
        if "transcription" in calls and name != "transcription":
            side["ratio"] = report["transcription"]["seconds"]["median"] / side["seconds"]["median"]
            side["wall_ratio"] = report["transcription"]["wall_seconds"]["median"] / side["wall_seconds"]["median"]
            side["largest_difference"] = float(np.abs(results[name] - results["transcription"]).max() / 255)
        if exact:
            side["largest_difference_to_exact_sums"] = float(np.abs(results[name] - with_exact_sums).max() / 255)
        if name == "bfloat16" and "float32" in calls:
            error = float(np.mean((results[name] / 255 - results["float32"] / 255) ** 2))
            side["psnr_to_float32_db"] = 10 * math.log10(1 / error)
            side["mean_difference_grey_levels"] = float(np.abs(results[name] - results["float32"]).mean())
    return report


def peak_memory(reset: bool = False) -> int:
    """Most bytes that this process had resident, since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def peak_of(side: str, size: str, device: str, threads: int) -> int:
    """Peak memory of one side in a process of its own, above what it had before, in bytes."""
    command = [sys.executable, "-m", "benchmarks.inference", "--peak-of", side, "--sizes", size]
    command += ["--device", device, "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(side: str, height: int, width: int, device: torch.device) -> int:
    model = made_model(device)
    call = sides(model, *made_pair(height, width, seed=0)[1:])[side]
    sides(model, *made_pair(48, 64, seed=0)[1:])[side]()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        print(torch.cuda.max_memory_allocated(device) - before)
    else:
        peak_memory(reset=True)
        before = resident_memory()
        call()
        print(peak_memory() - before)
    return 0


def print_report(report: dict[str, Any]) -> None:
    for size, found in report["sizes"].items():
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["matrix_product_per_s"].items())
        print(f"{size}, {report['machine']['threads']} threads; matrix products at {rates} GFLOP/s")
        for name in SIDES:
            if name not in found:
                continue
            side = found[name]
            s, w = side["seconds"], side["wall_seconds"]
            line = f"  {name:14}{s['median']:8.3f} s (quartiles {s['q25']:.3f} to {s['q75']:.3f}, {s['calls']} calls), "
            line += f"wall {w['median']:.3f} s, {side['pairs_per_s']:.2f} pairs/s, "
            line += f"{side['operations_per_s'] / 1e9:.1f} GFLOP/s ({side['share_of_matrix_product']:.0%})"
            if "ratio" in side:
                line += f", {side['ratio']:.2f}x (wall {side['wall_ratio']:.2f}x)"
                line += f", difference {side['largest_difference']:.1e}"
            if "largest_difference_to_exact_sums" in side:
                line += f", difference to exact sums {side['largest_difference_to_exact_sums']:.1e}"
            if "psnr_to_float32_db" in side:
                line += (
                    f", PSNR {side['psnr_to_float32_db']:.1f} dB, mean {side['mean_difference_grey_levels']:.3f} levels"
                )
            if "peak_bytes" in side:
                line += f", peak {side['peak_bytes'] / 1e6:.0f} MB"
            print(line)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x128", "640x480"], metavar="WxH")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--exact", action="store_true", help="how far each is from the transcription with attention sums in float64"
    )
    parser.add_argument("--no-peaks", action="store_true", help="do not measure memory, which takes one more call each")
    parser.add_argument("--load", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(time_sizes, build_parser().parse_args(argv))


def read_size(text: str) -> tuple[int, int]:
    """ "640x480" -> (480, 640)."""
    width, _, height = text.partition("x")
    least = CDDFuseSystem.smallest_side
    if not (width.isdecimal() and height.isdecimal()) or min(int(width), int(height)) < least:
        raise InputError(f"--sizes {text!r} must be WIDTHxHEIGHT such as 640x480, {least} pixels or more a side")
    return int(height), int(width)


def time_sizes(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.threads < 1:
        raise InputError(f"--rounds {args.rounds} and --threads {args.threads} must be at least 1")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = pick_device(args.device)
    sizes = {size: read_size(size) for size in args.sizes}
    if args.peak_of:
        return print_peak(args.peak_of, *sizes[args.sizes[0]], device)
    model = made_model(device)
    report = {
        "benchmark": "inference",
        "sizes": {},
        "operations_per_pixel": operations_per_pixel(model),
        "machine": {
            "processor": processor(), "system": platform.platform(), "threads": args.threads, "load": args.load,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": git_commit(),
    }  # fmt: skip
    for size, (height, width) in sizes.items():
        found = report["sizes"][size] = time_size(model, height, width, args.rounds, args.sides, args.exact)
        for side in args.sides if not args.no_peaks else ():
            found[side]["peak_bytes"] = peak_of(side, size, args.device, args.threads)
        print_report({**report, "sizes": {size: found}})
        if args.json:  # after each size: a long run that is stopped has not been for nothing
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
