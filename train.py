"""Trains a fusion system on a patch file. The defaults are the published recipe of CDDFuse.

    python train.py                                   # 40 + 80 epochs on data/MSRS_train_imgsize_128_stride_200.h5
    python train.py --resume auto                     # goes on where the last run in --out stopped
    python train.py --task mif --data data/MIF.h5     # medical images

Writes to --out (default runs/<system>_<task>): the weights in the published format, last.pt to resume from,
and log.jsonl with one line an epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import InputError, check_writable, git_commit, run_script, whole_file
from utils.checkpoint import read_file, save_file
from utils.inference import PRECISIONS, pick_device
from utils.patches import PatchDataset, random_batches
from zoo import SYSTEMS, TASKS, Batch, Stage, check_options, find_system, option

COUNTERS = ("epoch", "step", "epochs_trained", "log")  # attributes of a Run that are stored as they are
DATA = Path("data/MSRS_train_imgsize_128_stride_200.h5")


@dataclass(frozen=True)
class Options:
    """Options of the training loop; the defaults are those of the published code of CDDFuse."""

    batch_size: int = option(8, "patches a step", above=0)
    learning_rate: float = option(1e-4, "of Adam, for each network", above=0)
    schedule: str = option("step", "step: times --lr-factor every --lr-epochs; cosine: down to --min-lr over the run",
                           choices=("step", "cosine"))  # fmt: skip
    lr_epochs: int = option(20, "epochs of training of a network between two steps of its rate", above=0)
    lr_factor: float = option(0.5, "factor of a step of the rate", above=0)
    min_lr: float = option(1e-6, "the schedule goes no lower", low=0)
    warmup_steps: int = option(0, "steps over which the rate rises to its value, before either schedule", low=0)
    clip_norm: float = option(0.01, "largest gradient norm of each network; 0: no limit", low=0)
    crop: int = option(0, "side of a random crop of each patch; 0: the whole patch", low=0)
    flips: bool = option(False, "flip and quarter-turn patches at random")
    epoch_batches: int = option(0, "steps an epoch; 0: one pass over the patches", low=0)
    precision: str = option("float32", "bfloat16: autocast, with the losses in float32", choices=tuple(PRECISIONS))
    seed: int = option(0, "of the first weights and of the order, crops and flips of the patches", low=0)

    def __post_init__(self) -> None:
        check_options(self)


def add_options(parser: argparse.ArgumentParser, title: str, options: type) -> None:
    """Adds one command-line option for each field of an options dataclass, with its default."""
    group = parser.add_argument_group(title)
    for item in dataclasses.fields(options):
        kind = {"int": int, "float": float, "str": str}.get(item.type)
        # Choices are shown here and checked by the dataclass, which code that makes one by hand goes through too.
        shown = "|".join(item.metadata["choices"]) or item.type.upper()
        how = {"type": kind, "metavar": shown} if kind else {"action": argparse.BooleanOptionalAction}
        text = f"{item.metadata['help']} (default: {item.default})"
        group.add_argument(f"--{item.name.replace('_', '-')}", default=item.default, help=text, **how)


def take_options(args: argparse.Namespace, options: type) -> Any:
    return options(**{item.name: getattr(args, item.name) for item in dataclasses.fields(options)})


def build_parser(system: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--system", default="cddfuse", choices=SYSTEMS, help="what to train (default: cddfuse)")
    add(
        "--task",
        default="ivf",
        choices=TASKS,
        help="; ".join(f"{k}: {v}" for k, v in TASKS.items()) + " (default: ivf)",
    )
    add("--data", type=Path, help=f"patch file (default, for ivf alone: {DATA})")
    add("--out", type=Path, help="folder of the run (default: runs/<system>_<task>)")
    add("--init", type=Path, help="weights to start from, in the published format, instead of random ones")
    add("--resume", metavar="auto|PATH", help="auto: go on from last.pt in --out if there is one; PATH: from that file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--debug", action="store_true", help="show tracebacks")
    add_options(parser, "training loop (defaults: published)", Options)
    add_options(parser, f"losses and stages of {system.label} (defaults: published)", system.Options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # The system decides which options there are, so it is looked for first.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--system", default="cddfuse", choices=SYSTEMS)
    system = find_system(first.parse_known_args(argv)[0].system)
    return run_script(lambda args: train(args, system), build_parser(system).parse_args(argv))


def train(args: argparse.Namespace, system: type) -> int:
    options, system_options = take_options(args, Options), take_options(args, system.Options)
    device = pick_device(args.device)
    if args.data is None and args.task != "ivf":
        raise InputError(f"--task {args.task} needs a --data file; make one with `python dataprocessing.py`")
    args.data = args.data or DATA
    dataset = PatchDataset(args.data)
    side = options.crop or dataset.size
    if not system.smallest_patch <= side <= dataset.size:
        raise InputError(
            f"{'--crop' if options.crop else 'patches'} of {side} pixels: {system.label} trains on at least "
            f"{system.smallest_patch}, and the patches of {args.data} have {dataset.size}"
        )
    out = args.out or Path("runs") / f"{args.system}_{args.task}"
    weights, last = out / f"{system.label}_{args.task.upper()}.pth", out / "last.pt"
    run = Run(args, system, options, system_options, device, dataset)
    resume_from = find_resume(args.resume, last)
    if resume_from:
        run.load(resume_from)
        print(f"resumed from {resume_from}: {run.epoch} of {run.epochs} epochs done")
    elif args.init:
        run.model.load_published(args.init)
    if resume_from != last and (last.exists() or weights.exists()):
        raise InputError(f"{out} holds a run or weights already; go on with --resume auto, or choose another --out")
    check_writable(out)
    print(
        f"{system.label}, {args.task}: {len(dataset)} patches of {args.data}, {run.epochs} epochs, {device}, to {out}"
    )
    print(", ".join(f"{name}={value}" for name, value in run.settings.items()))

    for epoch in range(run.epoch, run.epochs):
        stage, epoch_in_stage = run.stage_of(epoch)
        description = f"{stage.name} {epoch_in_stage + 1}/{stage.epochs}"
        batches = random_batches(
            dataset, options.batch_size, (options.seed, epoch),
            crop=options.crop, flips=options.flips, batches=options.epoch_batches,
        )  # fmt: skip
        bar = tqdm(batches, desc=description, total=run.epoch_batches, unit="batch", disable=None)
        line = {"epoch": epoch + 1, "stage": stage.name, **train_epoch(run, stage, bar)}
        run.finish_epoch(line)
        # last.pt after the weights: what it says is done is done.
        run.model.save(weights, run.about())
        run.save(last)
        run.write_log(out / "log.jsonl")
        tqdm.write(f"{description}: total loss {line['losses']['total']:.4f}, {line['seconds']:.0f} s")
    if not weights.exists():  # a finished run whose weights were moved away
        run.model.save(weights, run.about())
    print(
        f"{weights}: {run.epochs} epochs done; score it with `python test_{args.task.upper()}.py --weights {weights}`"
    )
    return 0


def train_epoch(run: Run, stage: Stage, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One epoch of a stage. Returns the means of every loss term and other things worth a log line."""
    run.train_only(stage)
    precision = run.options.precision
    started = time.perf_counter()
    sums: dict[str, float] = {}
    patches = 0
    for vis, ir in batches:
        run.set_learning_rates()
        batch = Batch(vis.to(run.device), ir.to(run.device))
        with torch.autocast(run.device.type, PRECISIONS[precision], enabled=precision != "float32"):
            terms = stage.losses(batch)
        values = {name: value.item() for name, value in terms.items()}
        check_finite(run, values)
        run.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        limit = run.options.clip_norm or math.inf
        norms = {k: nn.utils.clip_grad_norm_(n.parameters(), limit).item() for k, n in stage.networks.items()}
        check_finite(run, {f"gradient norm of {name}": norm for name, norm in norms.items()})
        run.optimizer.step()
        run.step += 1
        patches += len(vis)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * len(vis)
        if isinstance(batches, tqdm):
            batches.set_postfix(loss=f"{values['total']:.4f}", refresh=False)
    seconds = time.perf_counter() - started
    return {
        "step": run.step,
        "losses": {name: value / patches for name, value in sums.items()},
        "learning_rates": {group["name"]: group["lr"] for group in run.optimizer.param_groups},
        "seconds": round(seconds, 2),
        "patches_per_second": round(patches / seconds, 2),
    }


def check_finite(run: Run, values: dict[str, float]) -> None:
    """Stops a run before the step that would spoil its weights.

    Raises:
        InputError: a value is NaN or infinite; the names are given.
    """
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise InputError(
            f"not finite before step {run.step + 1}: {', '.join(bad)}. What was saved after the last whole epoch is "
            "kept; try a smaller --learning-rate, or --precision float32"
        )


class Run:
    """All that changes during a training, and how it is stored: model, optimiser, counters, log."""

    def __init__(
        self,
        args: argparse.Namespace,
        system: type,
        options: Options,
        system_options: Any,
        device: torch.device,
        dataset: PatchDataset,
    ) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, device
        self.model = system().to(device)
        self.stages = self.model.stages(system_options, args.task)
        # What a resumed run must have in common with the one it goes on with.
        self.settings = {"system": args.system, "task": args.task, **vars(options), **vars(system_options)}
        self.settings |= {"patches": len(dataset), "patches_digest": dataset.digest()}
        self.facts = {"data": args.data.name, "init": str(args.init or ""), "commit": git_commit()}
        self.epochs = sum(stage.epochs for stage in self.stages)
        self.epoch_batches = options.epoch_batches or -(-len(dataset) // options.batch_size)
        self.epoch = self.step = 0
        self.log: list[dict[str, Any]] = []
        self.networks = {name: network for stage in self.stages for name, network in stage.networks.items()}
        self.epochs_trained = dict.fromkeys(self.networks, 0)
        # Adam keeps its state by parameter: one optimiser with a group a network is four published ones.
        groups = [{"name": name, "params": list(network.parameters())} for name, network in self.networks.items()]
        self.optimizer = torch.optim.Adam(groups, lr=options.learning_rate)

    def stage_of(self, epoch: int) -> tuple[Stage, int]:
        """The stage that an epoch (from 0) belongs to, and its number within the stage."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        raise IndexError(epoch)

    def train_only(self, stage: Stage) -> None:
        for name, network in self.networks.items():
            network.requires_grad_(name in stage.networks)

    def set_learning_rates(self) -> None:
        """Sets each network's rate for the coming step; the rate is a function of counters, with no state."""
        options = self.options
        warmup = min(1.0, (self.step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            if options.schedule == "step":
                factor = options.lr_factor ** (self.epochs_trained[group["name"]] // options.lr_epochs)
            else:
                factor = 0.5 + 0.5 * math.cos(math.pi * self.step / (self.epochs * self.epoch_batches))
            floor = min(options.min_lr, options.learning_rate)
            group["lr"] = warmup * max(factor * options.learning_rate, floor)

    def finish_epoch(self, line: dict[str, Any]) -> None:
        """Counts an epoch.

        Raises:
            InputError: its last step made a weight NaN or infinite; nothing of it is saved.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            check_finite(self, {"weights": math.nan})
        for name in self.stage_of(self.epoch)[0].networks:
            self.epochs_trained[name] += 1
        self.epoch += 1
        self.log.append(line)

    def about(self) -> dict[str, Any]:
        """What is stored beside the weights."""
        facts = {"epochs": self.epoch, "steps": self.step, "torch": str(torch.__version__), "device": str(self.device)}
        return {**self.settings, **self.facts, **facts}

    def save(self, path: Path) -> None:
        save_file(path, {
            **{name: getattr(self, name) for name in COUNTERS}, "settings": self.settings, "about": self.about(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip

    def load(self, path: Path) -> None:
        saved = read_file(path, self.device)
        if not {*COUNTERS, "settings", "about", "model", "optimizer"} <= saved.keys():
            raise InputError(f"{path} is not a file to resume from; train.py writes last.pt for that")
        changed = [f"{key} {saved['settings'].get(key)!r} -> {value!r}"
                   for key, value in self.settings.items() if saved["settings"].get(key) != value]  # fmt: skip
        if changed:
            raise InputError(f"the options differ from those of {path}: {'; '.join(changed)}; give the former ones")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in COUNTERS:
            setattr(self, name, saved[name])
        before = saved["about"]["commit"]
        if self.facts["commit"] not in before.split(", then "):
            before += f", then {self.facts['commit']}"
        self.facts |= {"commit": before, "init": saved["about"]["init"]}

    def write_log(self, path: Path) -> None:
        """Every epoch's line, whole: after a crash and a resume no epoch is missing or there twice."""
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log))


def find_resume(resume: str | None, last: Path) -> Path | None:
    """The file to resume from: none without --resume, and none for `auto` in a fresh folder."""
    if resume == "auto":
        return last if last.exists() else None
    return Path(resume) if resume is not None else None


if __name__ == "__main__":
    sys.exit(main())
