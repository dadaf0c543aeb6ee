"""Time and memory of a training step of CDDFuse: ours against the reference implementation of the published one.

    python -m benchmarks.train_step                    # this machine: CPU, and CUDA where there is one
    python -m benchmarks.train_step --size 64 --rounds 2 --json train_step.json

Both train on the same made patches and take turns in one process, so that whatever else the machine does falls on
both. On a CPU, times are processor times, which leave out the moments when another program has the processor; wall
times stand beside them. Peak memory is of a process of its own for each, since one process never gives back what
it once had: the peak of two steps less what was in use before them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import train
from benchmarks import about, in_process, parser_of, peak_of, time_in_turns, write_json
from tests import reference_net
from utils.common import number_in, run_script
from utils.data.patches import Batch, PatchDataset
from utils.inference.fusing import keep_freed_memory, pick_device
from utils.training.loop import PassLosses, Run
from zoo.cddfuse import CDDFuseSystem

WAYS = ("published float32", "ours float32", "ours bfloat16")
PHASES = (1, 2)
SIDE = 2048  # of the matrix products that say how fast the machine is


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--size",
        type=number_in(int, CDDFuseSystem.smallest_patch, 2**14),
        default=128,
        help="side of the patches (default: 128, published)",
    )
    add("--batch-size", type=number_in(int, 1), default=8)
    add("--rounds", type=number_in(int, 1), default=3, help="timed steps of each way and phase (default: 3)")
    add("--warm-up", type=number_in(int, 0), default=3, help="steps of each before: memory settles (default: 3)")
    add("--threads", type=number_in(int, 1), default=torch.get_num_threads(), help="of the CPU")
    add("--device", default="auto")
    add("--compile", action="store_true", help="torch.compile our step")
    add("--no-memory", dest="memory", action="store_false", help="leave the memory out")
    return run_script(time_steps, parser, argv)


def time_steps(args: argparse.Namespace) -> int:
    args.device = pick_device(args.device)
    peaks = {way: in_process(peak_memory, way, args) for way in WAYS} if args.memory else {}
    torch.set_num_threads(args.threads)
    keep_freed_memory(None)
    report = {"benchmark": "train_step", "size": args.size, "batch_size": args.batch_size, "compile": args.compile,
              "ways": {}, **about(args.load, args.device)}  # fmt: skip
    products = {name: matrix_product(args.device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    steps = {(way, phase): make_step(way, phase, args) for way in WAYS for phase in PHASES}
    clock = "wall" if args.device.type == "cuda" else "cpu"
    rates, _ = time_in_turns(products, rounds=6, device=args.device)
    times, _ = time_in_turns(steps, args.rounds, args.warm_up, args.device)
    report["matrix_product_flops"] = {name: 2 * SIDE**3 / min(of[clock]) for name, of in rates.items()}
    print(f"{args.batch_size} patches of {args.size}x{args.size}, {args.device}, {args.threads} threads, "
          f"{args.rounds} rounds in turns, commit {report['commit']}, torch {torch.__version__}")  # fmt: skip
    for name, value in report["matrix_product_flops"].items():
        print(f"  matrix products here: {value / 1e9:.0f} GFLOP/s in {name}")
    for way in WAYS:
        row = report["ways"][way] = {}
        for phase in PHASES:
            seconds, wall = (float(np.median(times[way, phase][kind])) for kind in (clock, "wall"))
            ratio = float(np.median(times[WAYS[0], phase][clock])) / seconds
            speed = args.batch_size / wall
            row[f"phase {phase}"] = {"seconds": seconds, "wall_seconds": wall, "patches_per_second": speed,
                                     "ratio": ratio}  # fmt: skip
            print(f"  {way:18s} phase {phase}: {seconds:7.3f} s a step (wall {wall:.3f}), {ratio:.2f} times as fast, "
                  f"{speed:.1f} patches/s")  # fmt: skip
        if peaks:
            row["peak_bytes"] = peaks[way]
            share = peaks[way] / peaks[WAYS[0]]
            print(f"  {way:18s} peak memory {peaks[way] / 2**20:.0f} MiB, {share:.2f} of the published step's")
    write_json(args.json, report)
    return 0


def patches(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(2, args.batch_size, 1, args.size // 8, args.size // 8, generator=generator)
    images = [torch.nn.functional.interpolate(x, size=(args.size,) * 2, mode="bicubic").clamp(0, 1) for x in smooth]
    return images[0].to(args.device), images[1].to(args.device)


def make_step(way: str, phase: int, args: argparse.Namespace) -> Callable[[], None]:
    """A step of one way and phase, ready to be called again and again."""
    torch.manual_seed(0)
    vis, ir = patches(args)
    implementation, precision = way.split()
    if implementation == "published":
        training = reference_net.Training(reference_net.CDDFuse().to(args.device))

        def published_step() -> None:
            torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which the published script leaves
            training.step(phase, vis, ir)

        return published_step
    run = ours(precision, phase, args)
    losses: torch.nn.Module = PassLosses(run.stage.updates[0])
    if args.compile:
        losses = torch.compile(losses)

    def step() -> None:
        torch.backends.cudnn.allow_tf32 = False  # as train.py has it
        run.train_step(run.stage, [losses], Batch(vis, ir))
        run.unseen.clear()  # what an epoch would look at now and then

    return step


def ours(precision: str, phase: int, args: argparse.Namespace) -> Run:
    """A run as train.py makes it, in the published recipe."""
    model = CDDFuseSystem().to(args.device)
    options = train.Options(precision=precision, batch_size=args.batch_size)
    stages = model.stages(CDDFuseSystem.Options(), "ivf")[phase - 1 : phase]
    dataset = PatchDataset.__new__(PatchDataset)  # the loop asks for its length alone
    dataset.vis = torch.empty(args.batch_size)
    run = Run(model, stages, options, dataset, {}, {"commit": "", "init": ""}, Path(), "none.pth")
    for name, network in run.networks.items():
        network.requires_grad_(name in stages[0].networks)
    return run


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def peak_memory(way: str, args: argparse.Namespace) -> float:
    """Bytes that two steps of phase 2 need beyond what the process had before them."""
    torch.set_num_threads(args.threads)
    step = make_step(way, 2, args)
    return peak_of(lambda: (step(), step()), args.device)


if __name__ == "__main__":
    raise SystemExit(main())
