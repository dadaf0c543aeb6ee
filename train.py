"""Trains a fusion system on a patch file.

    python train.py                                   # our recipe on data/MSRS_train_imgsize_128_stride_200.h5
    python train.py --recipe published                # the published one of CDDFuse: 40 + 80 epochs
    python train.py --resume auto                     # goes on where the last run in --out stopped
    python train.py --task mif --data data/MIF.h5     # medical images
    torchrun --nproc-per-node=4 train.py              # on four GPUs; --batch-size stays that of all together

Writes to --out (default runs/<system>_<task>): the weights in the published format, the best of them on the
validation pairs of the patch file, last.pt and previous.pt to resume from, log.jsonl with one line an epoch,
panels of fused validation pairs, and curves for TensorBoard where it is installed.

Exit code 0: trained to the end; 75: stopped before it by Ctrl-C, SIGTERM or --max-minutes, and saved (go on with
--resume auto); 2: bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils  # noqa: F401  before torch, see there

# isort: split
import torch

from utils.common import (
    InputError,
    Parser,
    check_writable,
    free_memory,
    git_commit,
    listed,
    lock_run_dir,
    number_in,
    run_script,
)
from utils.data.images import write_image
from utils.data.patches import PatchDataset
from utils.inference.checkpoint import load_fitting
from utils.inference.fusing import find_weights, keep_freed_memory, pick_device, pick_precision
from utils.metrics import SMALLEST_SCORED
from utils.training import run_state
from utils.training.distributed import any_rank, from_first, is_first, process_group, ranks
from utils.training.loop import Run, Stop
from utils.training.monitor import add_scalars, log, open_curves, validate
from utils.training.options import Options, add_options, take_options
from zoo import SYSTEMS, TASKS, find_system

DATA = Path("data/MSRS_train_imgsize_128_stride_200.h5")
PUBLISHED = "published"  # the recipe that every default is of
MOST_DRAWN = 10**8  # patches an epoch: their order, crops and flips are drawn before it begins
EXIT_UNFINISHED = 75  # what sendmail and its kin say for "not done, try again"


def build_parser(system: type, recipe: str = PUBLISHED) -> Parser:
    parser = Parser(__doc__, usage="train.py [options]")
    add = parser.add_argument
    tasks = "; ".join(f"{name}: {text}" for name, text in TASKS.items())
    add("--system", default="cddfuse", choices=SYSTEMS, help="what to train (default: cddfuse)")
    add("--task", default="ivf", choices=TASKS, help=f"{tasks} (default: ivf)")
    add("--recipe", choices=list(system.recipes), default=recipe,
        help=f"the recipe that all defaults below come from (default: {next(iter(system.recipes))})")  # fmt: skip
    add("--data", type=Path, help=f"patch file (default, for ivf alone: {DATA})")
    add("--out", type=Path, help="folder of the run (default: runs/<system>_<task>)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="weights to start from, in the published format, not random ones")
    start.add_argument("--init-partial", type=Path, metavar="INIT", help="the same; loads what fits, and says what")
    add("--resume", metavar="auto|PATH", help="auto: go on from last.pt in --out if there is one; PATH: from that file")
    add("--force", action="store_true", help="resume although options changed")
    minutes = number_in(float, 0)
    add("--max-minutes", type=minutes, default=0, metavar="M", help="stop, save and exit with code 75 after so long")
    add("--save-every-minutes", type=minutes, default=1, metavar="M", help="between two checkpoints (default: 1)")
    add("--validate-every", type=number_in(int, 0), default=5, metavar="EPOCHS",
        help="and after the last; 0: never (default: 5)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the step: minutes at first, then faster on CUDA")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_options(parser, f"training loop (defaults: {recipe})", Options)
    add_options(parser, f"losses and stages of {system.label} (defaults: {recipe})", system.Options)
    parser.set_defaults(**system.recipes.get(recipe, {}))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # System and recipe decide which options there are, and their defaults, so they are looked for first.
    first = Parser(add_help=False)
    first.add_argument("--system", default="cddfuse", choices=SYSTEMS)
    first.add_argument("--recipe")
    chosen = argparse.Namespace(system="cddfuse", recipe=None)
    with contextlib.suppress(InputError):  # the parser of all options says what is wrong with these two
        chosen = first.parse_known_args(argv)[0]
    system = find_system(chosen.system)
    parser = build_parser(system, chosen.recipe or next(iter(system.recipes)))
    return run_script(lambda args: train(args, system), parser, argv)


def train(args: argparse.Namespace, system: type) -> int:
    started = time.monotonic()
    device = pick_device(args.device)
    keep_freed_memory(None)
    with process_group(device), contextlib.ExitStack() as held:
        if args.recipe != PUBLISHED and PUBLISHED in system.recipes and is_first():
            log(f"recipe {args.recipe}; the published one: --recipe {PUBLISHED}")
        run = prepare(args, system, device, held)
        if run.epoch < run.epochs:
            with Stop(args.max_minutes - (time.monotonic() - started) / 60 if args.max_minutes else 0) as stop:
                train_on(run, stop, args)
        elif is_first():
            run_state.save_results(run)  # it may have died before they were written, or they were moved away
        if is_first() and run.epoch < run.epochs:
            log(
                f"stopped by {stop.why or 'another process'} after {run.epoch} of {run.epochs} epochs and {run.batch} "
                "batches; go on with the same command and --resume auto",
                error=True,
            )
        elif is_first():
            weights = " ".join(str(path) for path in (run.weights, run.best_weights) if path.exists())
            log(
                f"{run.epochs} epochs done; score the weights with `python test_{args.task.upper()}.py "
                f"--system {args.system} --weights {weights} --out {run.out / 'test_result'}`"
            )
    return EXIT_UNFINISHED if run.epoch < run.epochs else 0


def prepare(args: argparse.Namespace, system: type, device: torch.device, held: contextlib.ExitStack) -> Run:
    """Everything that can be wrong is found here, before the first step and before anything is written.

    The folder of the run is ours until `held` is closed.
    """
    options, system_options = take_options(args, Options), take_options(args, system.Options)
    options = dataclasses.replace(options, precision=pick_precision(options.precision, device))
    if args.data is None and args.task != "ivf":
        raise InputError(f"--task {args.task} needs a --data file; make one with `python dataprocessing.py`")
    data = args.data or DATA
    dataset = PatchDataset(data, colour=system.takes_colour)
    check_patches(options, system, dataset, data)
    if device.type == "cpu":
        warn_of_memory(options, system, options.crop or dataset.size)
    settings = {"system": args.system, "task": args.task, **vars(options), **vars(system_options)}
    settings |= {"patches": len(dataset), "patches_hash": dataset.hash}
    facts = {"data": data.name, "init": getattr(args.init or args.init_partial, "name", ""), "commit": git_commit(),
             "recipe": args.recipe}  # fmt: skip

    torch.manual_seed(options.seed)
    model = system().to(device)
    if ranks() > 1 and device.type == "cuda":  # statistics over the whole batch, for systems with batch norm
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    out = args.out or Path("runs") / f"{args.system}_{args.task}"
    stages = model.stages(system_options, args.task)
    if not any(stage.epochs for stage in stages):
        names = [f"--{name.replace('_', '-')}" for name in vars(system_options) if name.endswith("epochs")]
        raise InputError(f"there is no epoch to train; raise one of {', '.join(names)}")
    run = Run(model, stages, options, dataset, settings, facts, out, f"{system.label}_{args.task.upper()}.pth")
    run.compile = args.compile
    # Lock first: another process could still replace the checkpoint that is read next.
    from_first(lambda: held.enter_context(lock_run_dir(out)))
    resumed = run_state.resume(run, args.resume, force=args.force)
    if not resumed and (args.init or args.init_partial):
        start_from(run, args)
    if (not resumed or resumed.parent != out) and from_first(
        lambda: run_state.is_taken(run, begins_again=args.resume == "auto")
    ):
        advice = "" if args.resume == "auto" else "go on with --resume auto, or "
        raise InputError(f"{out} holds a run or weights already; {advice}choose another --out")
    check_writable(out)
    dataset.move_to(device)
    if is_first():
        if resumed:
            log(f"resumed from {resumed}: {run.epoch} of {run.epochs} epochs and {run.batch} batches done")
        processes = f" in {ranks()} processes" if ranks() > 1 else ""
        log(
            f"{system.label}, {args.task}, recipe {args.recipe}: {len(dataset)} patches and {len(dataset.validation)} "
            f"validation pairs of {data}, {run.epochs} epochs of {run.epoch_batches} steps, {device}{processes}, "
            f"to {out}"
        )
        log(", ".join(f"{name}={value}" for name, value in run.settings.items()))
    return run


def check_patches(options: Options, system: type, dataset: PatchDataset, data: Path) -> None:
    """
    Raises:
        InputError: crops, patches or validation pairs, or what is in a batch, are too small for the system; a batch
            cannot be shared equally; or the system needs saliency maps, and there are none.
    """
    if system.needs_saliency and dataset.ir_saliency is None:
        raise InputError(
            f"{system.label} trains on visual saliency maps, and {data} has none; make it again with "
            "`python dataprocessing.py --saliency`"
        )
    side = options.crop or dataset.size
    if not system.smallest_patch <= side <= dataset.size:
        raise InputError(
            f"{'--crop' if options.crop else 'patches'} of {side} pixels: {system.label} trains on at least "
            f"{system.smallest_patch}, and the patches of {data} have {dataset.size}"
        )
    least = max(system.smallest_patch, system.smallest_side, SMALLEST_SCORED)
    small = [pair.name for pair in dataset.validation if min(pair.ir.shape) < least]
    if small:
        raise InputError(
            f"{data} holds validation pairs with a side under {least} pixels ({listed(small)}); make it again with "
            "`python dataprocessing.py --holdout-size 128`"
        )
    smallest = system.smallest_batch * ranks()
    if options.batch_size % ranks() or options.batch_size < smallest:
        raise InputError(
            f"--batch-size {options.batch_size} must be a multiple of the {ranks()} processes and at least {smallest} "
            f"for {system.label}"
        )
    if options.batch_size * options.epoch_batches > MOST_DRAWN:
        raise InputError(f"--batch-size times --epoch-batches must be at most {MOST_DRAWN}: make shorter epochs")
    smallest = options.batch_size if options.drop_last else smallest
    if not options.epoch_batches and len(dataset) < smallest:
        raise InputError(
            f"{data} holds {len(dataset)} patches, and a batch needs {smallest}: make a larger file, or set "
            "--epoch-batches to draw patches several times"
        )


def warn_of_memory(options: Options, system: type, side: int) -> None:
    """Says so where a step takes more memory than is free: Linux ends such a process without a word."""
    needed = system.step_bytes * options.batch_size * side**2
    if options.precision == "bfloat16":
        needed *= 0.57  # measured for CDDFuse; FSIDFusion takes 0.54
    free = free_memory()
    if free is not None and needed > free and is_first():
        log(
            f"warning: a step of --batch-size {options.batch_size} with {side} pixels a side takes about "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; the system may end this process. "
            "Try a smaller --batch-size or --crop, or --precision bfloat16",
            error=True,
        )


def start_from(run: Run, args: argparse.Namespace) -> None:
    """Loads the weights that --init or --init-partial names."""
    path = find_weights(type(run.model), args.task, args.init or args.init_partial)[-1]
    if args.init:
        run.model.load_published(path)
    else:
        taken = load_fitting(path, run.model)
        if is_first():
            log(taken)
    run.restart_average()


def train_on(run: Run, stop: Stop, args: argparse.Namespace) -> None:
    """Trains to the end, or to where it is asked to stop, and saves."""
    curves = open_curves(run.out / "tensorboard", run.step) if is_first() else None
    saved = time.monotonic()
    if ranks() == 1:  # several have to agree on the step after which they look
        run.is_asked_to_stop = stop.is_asked
    with curves or contextlib.nullcontext():
        while run.epoch < run.epochs:
            for seen in run.train_epoch():
                if curves:
                    add_scalars(curves, seen.pop("step"), seen)
                if stop.is_asked_anywhere(run.device):
                    run_state.save_state(run)
                    return
                if run.batch < run.epoch_batches and time.monotonic() - saved > 60 * args.save_every_minutes:
                    save_or_go_on(run)
                    saved = time.monotonic()
            finish_epoch(run, args, curves)
            if run.epoch == run.epochs:
                run_state.save_state(run)
            elif time.monotonic() - saved > 60 * args.save_every_minutes:
                save_or_go_on(run)
                saved = time.monotonic()


def save_or_go_on(run: Run) -> None:
    """A checkpoint that cannot be written is a reason to warn, not to throw hours of work away."""
    try:
        run_state.save_state(run)
    except OSError as error:
        log(f"warning: {error}; training goes on, and the next checkpoint is tried in time", error=True)


def finish_epoch(run: Run, args: argparse.Namespace, curves: Any) -> None:
    """Validation where it is due, and what there is to see of the epoch."""
    line = run.log[-1]
    stage, epoch_in_stage = run.stage_of(run.epoch - 1)
    text = f"{stage.name} {epoch_in_stage + 1}/{stage.epochs}: total loss {line['losses']['total']:.4f}"
    text += f", {line['seconds']:.0f} s"
    pairs = run.dataset.validation
    due = args.validate_every and ((epoch_in_stage + 1) % args.validate_every == 0 or run.epoch == run.epochs)
    if pairs and due and is_first():
        with run.averaged():
            losses, metrics, panel = validate(run.model, stage, args.task, pairs, run.options.precision)
        looked_at = {"losses": losses, "metrics": metrics}
        line["validation"] = {"pairs": run.dataset.validation_hash} | looked_at
        text += f"; validation total {losses['total']:.4f}, " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items())
        try:
            if stage is run.stage_of(run.epochs - 1)[0]:
                run_state.save_best(run, losses["total"])
            write_image(run.out / "panels" / f"epoch_{run.epoch:04d}.png", panel)
        except OSError as error:
            log(f"warning: {error}; training goes on", error=True)
        if curves:
            add_scalars(curves, run.step, {"validation": looked_at})
            curves.add_image("panel", panel, run.step, dataformats="HW" if panel.ndim == 2 else "HWC")
    if pairs and due:
        any_rank(False, run.device)  # the others wait until the first has validated
    if is_first():
        log(text)


if __name__ == "__main__":
    sys.exit(main())
