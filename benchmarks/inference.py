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
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import about, in_process, made_pair, parser_of, peak_of, spread, time_in_turns, write_json
from tests import reference_net
from tools import export
from utils.common import InputError, number_in, run_script
from utils.inference.fusing import fuse_arrays, keep_freed_memory, load_fuser, pick_device, to_levels, to_network
from zoo import find_system
from zoo.cddfuse import CDDFuseSystem

ENGINES = ("onnxruntime", "openvino")
SIDES = ("float32", "bfloat16", "reference", *ENGINES)
Call = Callable[[np.ndarray, np.ndarray], np.ndarray]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["256x256", "640x480"], metavar="WxH")
    add("--rounds", type=number_in(int, 1), default=3, help="turns of each side (default 3)")
    add("--sides", nargs="+", choices=SIDES, default=SIDES, help="ratios and differences are to the first one")
    add("--threads", type=number_in(int, 1), default=1, help="of the processor (default 1)")
    add("--device", default="cpu", help="cpu or cuda, for our sides (default cpu)")
    return run_script(time_sizes, parser, argv)


def time_sizes(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = pick_device(args.device)
    sizes = {size: read_size(size) for size in args.sizes}
    model = load_fuser(find_system("cddfuse"), "ivf", device=device).system
    small = made_pair(48, 64)  # what a library prepares once is not part of a call
    chosen = [side for side in args.sides if side not in ENGINES or importlib.util.find_spec(side)]
    for side in sorted(set(args.sides) - set(chosen)):
        print(f"{side} is left out: `pip install onnx onnxscript onnxruntime {side}`")
    report = {"benchmark": "inference", "sizes": {}, **about(args.load, device)}
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "CDDFuse_IVF.onnx"
        if set(chosen) & set(ENGINES):
            export.main(["--formats", "onnx", "--no-normalise", "--out", folder])
        calls = {side: make_call(side, model, onnx_file, args.threads) for side in chosen}
        for call in calls.values():
            call(*small)
        for size, shape in sizes.items():
            pair = made_pair(*shape)
            turns = {side: functools.partial(call, *pair) for side, call in calls.items()}
            times, results = time_in_turns(turns, args.rounds)
            found = report["sizes"][size] = {
                side: {
                    "seconds": spread(times[side]["wall"]), "processor_seconds": spread(times[side]["cpu"]),
                    "peak_bytes": in_process(peak_memory, side, shape, onnx_file, args),
                    "largest_difference": float(np.abs(results[side] - results[chosen[0]]).max() / 255),
                }
                for side in chosen
            }  # fmt: skip
            print_size(size, found)
            write_json(args.json, report)  # after each size: a long run that is stopped has not been for nothing
    return 0


def read_size(text: str) -> tuple[int, int]:
    """ "640x480" -> (480, 640)."""
    width, _, height = text.partition("x")
    least = CDDFuseSystem.smallest_side
    if not (width.isdecimal() and height.isdecimal()) or min(int(width), int(height)) < least:
        raise InputError(f"--sizes {text!r} must be WIDTHxHEIGHT such as 640x480, {least} pixels or more a side")
    return int(height), int(width)


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


def peak_memory(side: str, shape: tuple[int, int], onnx_file: Path, args: argparse.Namespace) -> int:
    """Bytes that one side needs to fuse a pair, beyond what the process had before."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = pick_device(args.device)
    call = make_call(side, load_fuser(find_system("cddfuse"), device=device).system, onnx_file, args.threads)
    call(*made_pair(48, 64))
    pair = made_pair(*shape)
    return peak_of(lambda: call(*pair), device)


def print_size(size: str, found: dict[str, dict[str, Any]]) -> None:
    first = next(iter(found))
    print(f"\n| {size} | seconds | processor seconds | times of {first} | peak memory | largest difference |")
    print("|---|---|---|---|---|---|")
    for side, of in found.items():
        wall, cpu = of["seconds"]["median"], of["processor_seconds"]["median"]
        ratio = wall / found[first]["seconds"]["median"]
        print(f"| {side} | {wall:.2f} | {cpu:.2f} | {ratio:.2f} | {of['peak_bytes'] / 1e6:.0f} MB "
              f"| {of['largest_difference']:.1e} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
