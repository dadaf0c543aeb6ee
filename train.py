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

from utils import InputError, git_commit, run_script
from utils.checkpoint import read_file, save_file
from utils.inference import PRECISIONS, pick_device
from utils.patches import PatchDataset, random_batches
from zoo import SYSTEMS, TASKS, Batch, Stage, find_system

SCHEDULES = ("step", "cosine")


@dataclass(frozen=True)
class Options:
    """Options of the training loop; the defaults are those of the published code of CDDFuse."""

    batch_size: int = 8
    learning_rate: float = 1e-4  # of Adam, for each network
    schedule: str = "step"  # "step": times lr_factor every lr_epochs; "cosine": down to min_lr over the whole run
    lr_epochs: int = 20
    lr_factor: float = 0.5
    min_lr: float = 1e-6
    warmup_steps: int = 0  # linear, before either schedule
    clip_norm: float = 0.01  # largest gradient norm of each network; 0 clips nothing
    crop: int = 0  # side of a random crop of each patch; 0 takes whole patches
    flips: bool = False  # random flips and quarter turns
    epoch_batches: int = 0  # batches an epoch; 0 is one pass over the patches
    precision: str = "float32"  # or "bfloat16": autocast; the losses stay in float32
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("batch_size", "learning_rate", "lr_epochs", "lr_factor")
        at_least_0 = ("min_lr", "warmup_steps", "clip_norm", "crop", "epoch_batches", "seed")
        problems = [f"{_flag(name)} must be positive" for name in positive if getattr(self, name) <= 0]
        problems += [f"{_flag(name)} must not be negative" for name in at_least_0 if getattr(self, name) < 0]
        if self.schedule not in SCHEDULES:
            problems.append(f"--schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.precision not in PRECISIONS:
            problems.append(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if problems:
            raise InputError("; ".join(problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, title: str, options: type) -> None:
    """Adds one command-line option for each field of a dataclass, with its default."""
    group = parser.add_argument_group(title)
    for item in dataclasses.fields(options):
        kind = {"int": int, "float": float, "str": str}.get(item.type)
        how = {"type": kind, "metavar": item.type.upper()} if kind else {"action": argparse.BooleanOptionalAction}
        group.add_argument(_flag(item.name), default=item.default, help="default: %(default)s", **how)


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
    add("--data", type=Path, default=Path("data/MSRS_train_imgsize_128_stride_200.h5"), help="patch file (%(default)s)")
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
    dataset = PatchDataset(args.data)
    if options.crop > dataset.size:
        raise InputError(f"--crop {options.crop} is larger than the patches of {args.data} ({dataset.size})")
    out = args.out or Path("runs") / f"{args.system}_{args.task}"
    run = Run(args, system, options, system_options, device, len(dataset))
    resume_from = find_resume(args.resume, out)
    if resume_from:
        run.load(resume_from)
        print(f"resumed from {resume_from}: {run.epoch} of {run.epochs} epochs done")
    elif (out / "last.pt").exists():
        raise InputError(f"{out} holds a run already; go on with --resume auto, or choose another --out")
    elif args.init:
        run.model.load_published(args.init)
    weights = out / f"{system.label}_{args.task.upper()}.pth"
    print(
        f"{system.label}, {args.task}: {len(dataset)} patches of {args.data}, {run.epochs} epochs, {device}, to {out}"
    )

    for epoch in range(run.epoch, run.epochs):
        stage, epoch_in_stage = run.stage_of(epoch)
        description = f"{stage.name} {epoch_in_stage + 1}/{stage.epochs}"
        batches = random_batches(
            dataset, options.batch_size, (options.seed, epoch),
            crop=options.crop, flips=options.flips, batches=options.epoch_batches,
        )  # fmt: skip
        bar = tqdm(batches, desc=description, total=run.epoch_batches, unit="batch", disable=None)
        line = {"epoch": epoch + 1, "stage": stage.name, **train_epoch(run, stage, bar)}
        run.epoch = epoch + 1
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        run.save(out / "last.pt")
        run.model.save(weights, run.about())
        tqdm.write(f"{description}: total loss {line['losses']['total']:.4f}, {line['seconds']:.0f} s")
    print(
        f"{weights}: {run.epochs} epochs done; score it with `python test_{args.task.upper()}.py --weights {weights}`"
    )
    return 0


def train_epoch(run: Run, stage: Stage, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One epoch of a stage. Returns the means of every loss term and other things worth a log line."""
    precision = run.options.precision
    started = time.perf_counter()
    sums: dict[str, float] = {}
    patches = 0
    for vis, ir in batches:
        run.set_learning_rates(stage)
        batch = Batch(vis.to(run.device), ir.to(run.device))
        with torch.autocast(run.device.type, PRECISIONS[precision], enabled=precision != "float32"):
            terms = stage.losses(batch)
        values = {name: value.item() for name, value in terms.items()}
        if not math.isfinite(values["total"]):
            raise InputError(
                f"the loss of step {run.step + 1} is not finite ({values}); the weights of the last whole epoch are "
                "kept. Try a smaller --learning-rate, or --precision float32"
            )
        run.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        if run.options.clip_norm:
            for network in stage.networks.values():
                nn.utils.clip_grad_norm_(network.parameters(), run.options.clip_norm)
        run.optimizer.step()
        run.step += 1
        patches += len(vis)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * len(vis)
        if isinstance(batches, tqdm):
            batches.set_postfix(loss=f"{values['total']:.4f}", refresh=False)
    for name in stage.networks:
        run.epochs_trained[name] += 1
    seconds = time.perf_counter() - started
    return {
        "step": run.step,
        "losses": {name: value / patches for name, value in sums.items()},
        "learning_rates": {group["name"]: group["lr"] for group in run.optimizer.param_groups},
        "seconds": round(seconds, 2),
        "patches_per_second": round(patches / seconds, 2),
    }


class Run:
    """All that changes during a training, and how it is stored: model, optimiser, epoch and step."""

    def __init__(
        self,
        args: argparse.Namespace,
        system: type,
        options: Options,
        system_options: Any,
        device: torch.device,
        patches: int,
    ) -> None:
        torch.manual_seed(options.seed)
        self.args, self.options, self.device = args, options, device
        self.model = system().to(device)
        self.stages = self.model.stages(system_options, args.task)
        self.settings = {"system": args.system, "task": args.task, **vars(options), **vars(system_options)}
        self.epochs = sum(stage.epochs for stage in self.stages)
        self.epoch_batches = options.epoch_batches or -(-patches // options.batch_size)
        self.epoch = self.step = 0
        networks = {name: network for stage in self.stages for name, network in stage.networks.items()}
        self.epochs_trained = dict.fromkeys(networks, 0)
        # Adam keeps its state by parameter: one optimiser with a group a network is four published ones.
        groups = [{"name": name, "params": list(network.parameters())} for name, network in networks.items()]
        self.optimizer = torch.optim.Adam(groups, lr=options.learning_rate)

    def stage_of(self, epoch: int) -> tuple[Stage, int]:
        """The stage that an epoch (from 0) belongs to, and its number within the stage."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        raise IndexError(epoch)

    def set_learning_rates(self, stage: Stage) -> None:
        """Sets each network's rate for the coming step; the rate is a function of counters, with no state."""
        warmup = min(1.0, (self.step + 1) / self.options.warmup_steps) if self.options.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            if self.options.schedule == "step":
                factor = self.options.lr_factor ** (self.epochs_trained[group["name"]] // self.options.lr_epochs)
            else:
                factor = 0.5 + 0.5 * math.cos(math.pi * self.step / (self.epochs * self.epoch_batches))
            group["lr"] = max(warmup * factor * self.options.learning_rate, self.options.min_lr)

    def about(self) -> dict[str, Any]:
        """What is stored beside the weights."""
        facts = {"epochs": self.epoch, "steps": self.step, "data": str(self.args.data.name), "commit": git_commit()}
        return {**self.settings, **facts, "torch": str(torch.__version__), "device": str(self.device)}

    def save(self, path: Path) -> None:
        save_file(path, {
            "epoch": self.epoch, "step": self.step, "epochs_trained": self.epochs_trained, "settings": self.settings,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "about": self.about(),
        })  # fmt: skip

    def load(self, path: Path) -> None:
        saved = read_file(path, self.device)
        if not {"epoch", "step", "epochs_trained", "settings", "model", "optimizer"} <= saved.keys():
            raise InputError(f"{path} is not a file to resume from; train.py writes last.pt for that")
        changed = [f"{key} {saved['settings'].get(key)!r} -> {value!r}"
                   for key, value in self.settings.items() if saved["settings"].get(key) != value]  # fmt: skip
        if changed:
            raise InputError(f"the options differ from those of {path}: {'; '.join(changed)}; give the former ones")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.step, self.epochs_trained = saved["epoch"], saved["step"], saved["epochs_trained"]


def find_resume(resume: str | None, out: Path) -> Path | None:
    """The file to resume from: none without --resume, and none for `auto` in a fresh folder."""
    if resume == "auto":
        return out / "last.pt" if (out / "last.pt").exists() else None
    return Path(resume) if resume else None


if __name__ == "__main__":
    sys.exit(main())
