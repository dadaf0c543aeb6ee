"""Time and memory of a training step of CDDFuse: ours against the reference implementation of the published one.

    python -m benchmarks.train_step                    # this machine: CPU, and CUDA where there is one
    python -m benchmarks.train_step --size 64 --rounds 2 --json train_step.json

Both train on the same made patches and take turns in one process, so that whatever else the machine does falls on
both. On a CPU, times are processor times, which leave out the moments when another program has the processor; wall
times stand beside them. Peak memory is of a process of its own for each, since one process never gives back what
it once had: the peak of two steps less what was in use before them. Says something about speed and never about
quality.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import train
from tests import reference_net
from utils.common import InputError, git_commit, run_script
from utils.data.patches import Batch, PatchDataset
from utils.inference.fusing import keep_freed_memory, pick_device
from utils.training.loop import PassLosses, Run
from zoo.cddfuse import CDDFuseSystem

WAYS = ("published float32", "ours float32", "ours bfloat16")
PHASES = (1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the patches (default: 128, published)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way and phase (default: 3)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each before: memory settles (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile our step")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory out")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_script(time_steps, parser.parse_args(argv))


def time_steps(args: argparse.Namespace) -> int:
    least = CDDFuseSystem.smallest_patch
    if args.size < least or min(args.batch_size, args.rounds, args.threads) < 1 or args.warm_up < 0:
        raise InputError(
            f"--size {args.size} must be at least {least}, --batch-size, --rounds and --threads at least 1, "
            "--warm-up at least 0"
        )
    args.device = pick_device(args.device)

    peaks = {way: peak_memory(way, args) for way in WAYS} if args.memory else {}
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    commit = git_commit()  # now: the checkout may change during the runs
    rate = {name: matrix_rate(args.device, dtype) for name, dtype in
            (("float32", torch.float32), ("bfloat16", torch.bfloat16))}  # fmt: skip
    times = time_in_turns({(way, phase): make_step(way, phase, args) for way in WAYS for phase in PHASES}, args)
    result = {
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.processor(),
        "threads": args.threads, "torch": str(torch.__version__), "commit": commit, "size": args.size,
        "batch_size": args.batch_size, "rounds": args.rounds, "compile": args.compile, "matrix_product_flops": rate,
        "ways": {},
    }  # fmt: skip
    print(f"{args.batch_size} patches of {args.size}x{args.size}, {args.device}, {args.threads} threads, "
          f"{args.rounds} rounds in turns, commit {result['commit']}, torch {result['torch']}")  # fmt: skip
    for name, value in rate.items():
        print(f"  matrix products here: {value / 1e9:.0f} GFLOP/s in {name}")
    clock = "wall" if args.device.type == "cuda" else "cpu"
    for way in WAYS:
        row = result["ways"][way] = {}
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
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, default=float) + "\n")
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


def time_in_turns(steps: dict, args: argparse.Namespace) -> dict:
    times: dict = {key: {"cpu": [], "wall": []} for key in steps}
    for number in range(args.warm_up + args.rounds):
        for key, step in steps.items():
            synchronise(args.device)
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            synchronise(args.device)
            if number >= args.warm_up:
                times[key]["cpu"].append(time.process_time() - cpu)
                times[key]["wall"].append(time.perf_counter() - wall)
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """FLOP/s of a large matrix product, the best of a few: in processor time on a CPU."""
    side = side or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronise(device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        a @ b
        synchronise(device)
        best = min(best, clock() - start)
    return 2 * side**3 / best


def peak_memory(way: str, args: argparse.Namespace) -> float:
    """Bytes that two steps of phase 2 need beyond what the process had before them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (way, args))


def _peak_memory(way: str, args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    step = make_step(way, 2, args)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step()
    step()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    raise SystemExit(main())
