"""Time and memory of fusing a pair: ours, the published forward pass, and the engines that run our ONNX file.

    pip install onnx onnxscript onnxruntime openvino    # the last two sides; those that are absent are left out
    python -m benchmarks.inference --sizes 256x256 640x480 --threads 2 --json inference.json

All sides have the weights models/CDDFuse_IVF.pth and take turns in one process on the same made pair, so that whatever
else the machine does falls on all. Times are wall times; ratios are those of the medians. On a busy machine look at the
processor times beside them, which leave out the moments when another program has the processor. The published forward
pass is that of the reference implementation, `tests/reference_net.py`. Peak memory is that of a process for each side,
above what it had before fusing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import made_pair, processor
from tests import reference_net
from tools import export
from utils.common import InputError, git_commit, run_script
from utils.inference.fusing import fuse_arrays, keep_freed_memory, load_fuser, pick_device, to_levels, to_network
from utils.inference.memory import resident_memory
from zoo import find_system
from zoo.cddfuse import CDDFuseSystem

ENGINES = ("onnxruntime", "openvino")
SIDES = ("float32", "bfloat16", "reference", *ENGINES)
Call = Callable[[np.ndarray, np.ndarray], np.ndarray]


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


def our_model(device: torch.device) -> CDDFuseSystem:
    return load_fuser(find_system("cddfuse"), "ivf", device=device).system


def make_call(side: str, model: CDDFuseSystem, onnx_file: Path, threads: int) -> Call:
    """A function of two images (H, W) in 0..255 that gives the fused one, neither min-max normalised nor rounded."""
    if side == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
        return lambda *pair: (
            255 * session.run(None, dict(zip(("vis", "ir"), map(as_input, pair), strict=True)))[0][0, 0]
        )
    if side == "openvino":
        import openvino

        # Its default on a CPU that has the instructions is bfloat16.
        how = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(openvino.Core().read_model(onnx_file), "CPU", how)
        return lambda *pair: 255 * compiled(list(map(as_input, pair)))[0][0, 0]
    if side == "reference":
        device = next(model.parameters()).device
        reference = reference_net.CDDFuse.like(model)

        @torch.inference_mode()
        def call(vis: np.ndarray, ir: np.ndarray) -> np.ndarray:
            return to_levels(reference.fuse(to_network(vis, device), to_network(ir, device)))

        return call
    return lambda vis, ir: fuse_arrays(model, vis, ir, "vis", normalise=False, precision=side)


def as_input(image: np.ndarray) -> np.ndarray:
    return image[None, None] / np.float32(255)


def spread(seconds: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high), "calls": len(seconds)}


def time_in_turns(calls: dict[str, Call], pair: Sequence[np.ndarray], rounds: int) -> dict[str, dict[str, Any]]:
    """Times of each side, and how far its result is from the first one's."""
    results: dict[str, np.ndarray] = {}
    wall, cpu = ({side: [] for side in calls} for _ in range(2))
    for call in calls.values():
        call(*made_pair(48, 64, seed=0)[1:])  # what a library prepares once is not part of a call
    for _ in range(rounds):
        for side, call in calls.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            results[side] = call(*pair)
            wall[side].append(time.perf_counter() - started)
            cpu[side].append(time.process_time() - cpu_started)
    first = next(iter(calls))
    found: dict[str, dict[str, Any]] = {}
    for side, result in results.items():
        found[side] = {"seconds": spread(wall[side]), "processor_seconds": spread(cpu[side])}
        found[side]["ratio"] = found[side]["seconds"]["median"] / found[first]["seconds"]["median"]
        found[side]["largest_difference"] = float(np.abs(result - results[first]).max() / 255)
    return found


def peak_memory(reset: bool = False) -> int:
    """Most bytes that this process had resident, since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def print_peak(call: Call, height: int, width: int, device: torch.device) -> None:
    """Prints the peak memory of one call above what the process had before, in bytes."""
    call(*made_pair(48, 64, seed=0)[1:])
    pair = made_pair(height, width, seed=0)[1:]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*pair)
        print(torch.cuda.max_memory_allocated(device) - before)
    else:
        peak_memory(reset=True)
        before = resident_memory()
        call(*pair)
        print(peak_memory() - before)


def peak_of(side: str, size: str, onnx_file: Path, args: argparse.Namespace) -> int:
    """Peak memory of one side, in a process of its own, in bytes."""
    command = [sys.executable, "-m", "benchmarks.inference", "--peak-of", side, str(onnx_file), "--sizes", size]
    command += ["--device", args.device, "--threads", str(args.threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_size(size: str, found: dict[str, dict[str, Any]], first: str) -> None:
    print(f"\n| {size} | seconds | processor seconds | times of {first} | peak memory | largest difference |")
    print("|---|---|---|---|---|---|")
    for side, of in found.items():
        peak = f"{of['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in of else ""
        cpu = of["processor_seconds"]["median"]
        print(f"| {side} | {of['seconds']['median']:.2f} | {cpu:.2f} | {of['ratio']:.2f} | {peak} ", end="")
        print(f"| {of['largest_difference']:.1e} |", flush=True)


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
    model = our_model(device)
    if args.peak_of:
        side, onnx_file = args.peak_of
        print_peak(make_call(side, model, Path(onnx_file), args.threads), *sizes[args.sizes[0]], device)
        return 0
    chosen = [side for side in args.sides if side not in ENGINES or importlib.util.find_spec(side)]
    for side in sorted(set(args.sides) - set(chosen)):
        print(f"{side} is left out: `pip install onnx onnxscript onnxruntime {side}`")
    report = {
        "benchmark": "inference", "sizes": {}, "load": args.load, "threads": args.threads, "commit": git_commit(),
        "processor": processor(), "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", *ENGINES) if importlib.util.find_spec(name)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "CDDFuse_IVF.onnx"
        if set(chosen) & set(ENGINES):
            export.main(["--formats", "onnx", "--no-normalise", "--out", folder])
        calls = {side: make_call(side, model, onnx_file, args.threads) for side in chosen}
        for size, (height, width) in sizes.items():
            found = time_in_turns(calls, made_pair(height, width, seed=0)[1:], args.rounds)
            for side in chosen if not args.no_peaks else ():
                found[side]["peak_bytes"] = peak_of(side, size, onnx_file, args)
            print_size(size, found, chosen[0])
            report["sizes"][size] = found
            if args.json:  # after each size: a long run that is stopped has not been for nothing
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["256x256", "640x480"], metavar="WxH")
    add("--rounds", type=int, default=3, help="turns of each side (default 3)")
    add("--sides", nargs="+", choices=SIDES, default=SIDES, help="ratios and differences are to the first one")
    add("--threads", type=int, default=1, help="of the processor (default 1)")
    add("--device", default="cpu", help="cpu or cuda, for our sides (default cpu)")
    add("--no-peaks", action="store_true", help="do not measure memory, which takes one more call each")
    add("--load", default="", help="what else the machine was doing, for the record")
    add("--json", type=Path, metavar="PATH", help="also write the results there")
    add("--debug", action="store_true", help="show tracebacks")
    add("--peak-of", nargs=2, help=argparse.SUPPRESS)  # a side and the ONNX file
    return run_script(time_sizes, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
