"""The training loop that serves every system: one step, the epochs made of it, and how a run is asked to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils.common import SECONDS_BETWEEN_LINES, InputError
from utils.data.patches import Batch, PatchDataset, batches_in_epoch, random_batches
from utils.inference.fusing import autocast, has_bfloat16
from utils.training.distributed import any_rank, is_first, mean_over_ranks, rank, ranks
from utils.training.monitor import log
from utils.training.optimizers import Muon, matrices
from utils.training.stages import Pass, Stage

# Looking at a loss makes a GPU wait for the host, so there it is looked at after so many steps only.
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 25}
EMA_WARMUP = 10  # steps in which the average forgets the first weights faster than its decay says
NORM = "gradient norm of "


class Unseen(NamedTuple):
    """What a pass has computed and nobody has looked at yet."""

    step: int
    batch: Batch
    is_last: bool  # of the passes of its step
    names: list[str]
    values: Tensor


class Run:
    """A training: model, optimiser, counters and log, and the step that moves them on.

    Args:
        model: a system of the zoo, on its device.
        stages: its training.
        options: those of the loop, `train.Options`.
        dataset: the patches.
        settings: what a resumed run must have in common with the one it goes on with, by option name.
        facts: plain values to store beside the weights; `commit` and `init` among them.
        out: folder of the run.
        weights: name of the file of weights in it.

    Attributes:
        epoch, batch: whole epochs done, and batches done of the present one.
        step: optimiser steps done.
        epochs_trained: for each network, the epochs in which it was trained.
        seconds: time spent in steps, over all sessions.
        sums: of the loss terms of the present epoch, times patches; patches under "".
        best: lowest validation loss of the last stage, None before the first.
        log: one line an epoch.
    """

    def __init__(
        self,
        model: Any,
        stages: list[Stage],
        options: Any,
        dataset: PatchDataset,
        settings: dict[str, Any],
        facts: dict[str, Any],
        out: Path,
        weights: str,
    ) -> None:
        self.model, self.stages, self.options, self.dataset = model, stages, options, dataset
        self.settings, self.facts = settings, facts
        self.out, self.weights = out, out / weights
        self.best_weights = self.weights.with_name(f"{self.weights.stem}_best{self.weights.suffix}")
        self.last, self.previous = out / "last.pt", out / "previous.pt"
        self.device = next(model.parameters()).device
        self.epochs = sum(stage.epochs for stage in stages)
        self.smallest_batch = getattr(model, "smallest_batch", 1)
        if options.drop_last:
            self.smallest_batch = max(self.smallest_batch, options.batch_size // ranks())
        self.epoch_batches = options.epoch_batches or batches_in_epoch(
            len(dataset), options.batch_size, ranks(), self.smallest_batch
        )
        self.epoch = self.batch = self.step = 0
        self.seconds, self.best = 0.0, None
        self.sums: dict[str, float] = {}
        self.log: list[dict[str, Any]] = []
        self.networks = {name: network for stage in stages for name, network in stage.networks.items()}
        self.epochs_trained = dict.fromkeys(self.networks, 0)
        # What a network registers but never uses is frozen by its system, and stays so.
        self.frozen = {p for network in self.networks.values() for p in network.parameters() if not p.requires_grad}
        # The state is kept by parameter: one optimiser with a group a network is four published ones.
        groups = [{"name": name, "params": self.trained(network)} for name, network in self.networks.items()]
        adam = {"lr": options.learning_rate, "weight_decay": options.weight_decay,
                "decoupled_weight_decay": options.decoupled_weight_decay,
                "fused": self.device.type in ("cpu", "cuda")}  # fmt: skip
        if options.optimizer == "muon":
            self.optimizer = Muon(groups, matrices(model), **adam)
        else:
            self.optimizer = torch.optim.Adam(groups, **adam)
        # Not torch's AveragedModel: that copies networks which are not trained, and averages counters.
        self.floating = [value for value in model.state_dict().values() if value.is_floating_point()]
        self.ema = [value.clone() for value in self.floating] if options.ema else []
        self.compile = False
        self.steps_between_looks = STEPS_BETWEEN_LOOKS.get(self.device.type, 1)
        self.is_asked_to_stop: Callable[[], bool] = lambda: False  # if so, the present step is looked at already
        self.unseen: list[Unseen] = []
        self.looked_at = 0

    def trained(self, network: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in network.parameters() if parameter not in self.frozen]

    def stage_of(self, epoch: int) -> tuple[Stage, int]:
        """The stage that an epoch (from 0) belongs to, and its number within the stage."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        raise IndexError(epoch)

    @property
    def stage(self) -> Stage:
        return self.stage_of(self.epoch)[0]

    # -- steps -------------------------------------------------------------------------------------------------

    def train_epoch(self) -> Iterator[dict[str, Any]]:
        """Goes on with the present epoch and ends with it; yields what is known of the steps after each look.

        Raises:
            InputError: a loss, a gradient or a weight is not finite, or the memory is too small.
        """
        options, (stage, epoch_in_stage) = self.options, self.stage_of(self.epoch)
        self.model.train()
        losses = [self.losses_of(part) for part in stage.updates]
        batches = random_batches(
            self.dataset, options.batch_size, (options.seed, self.epoch), crop=options.crop, flips=options.flips,
            batches=options.epoch_batches, start=self.batch, part=(rank(), ranks()), smallest=self.smallest_batch,
        )  # fmt: skip
        title = f"{stage.name} {epoch_in_stage + 1}/{stage.epochs}"
        bar = tqdm(desc=title, total=self.epoch_batches, initial=self.batch, unit="batch",
                   disable=None if is_first() else True)  # fmt: skip
        with bar:
            since = told = time.perf_counter()
            for batch in batches:
                self.train_step(stage, losses, batch.to(self.device))
                bar.update()
                waits = self.step - self.looked_at < self.steps_between_looks and self.batch < self.epoch_batches
                if waits and not self.is_asked_to_stop():
                    continue
                patches = self.sums.get("", 0.0)
                seen = self.look()
                now = time.perf_counter()
                self.seconds += now - since
                seen["patches_per_second"] = (self.sums[""] - patches) * ranks() / (now - since)
                loss = f"{seen['losses']['total']:.4f}"
                bar.set_postfix(loss=loss, refresh=False)
                if bar.disable and is_first() and now - told > SECONDS_BETWEEN_LINES:  # a log file, not a terminal
                    log(f"{title}: {self.batch} of {self.epoch_batches} batches, total loss {loss}")
                    told = now
                yield seen
                since = time.perf_counter()
        self.finish_epoch()

    def losses_of(self, part: Pass) -> nn.Module:
        """The losses of a pass as a module, wrapped as the run asks for."""
        self.set_trainable(part.networks)  # before wrapping: DistributedDataParallel waits for what then has gradients
        module: nn.Module = PassLosses(part)
        if self.compile:
            module = torch.compile(module)
        return DistributedDataParallel(module) if ranks() > 1 else module

    def set_trainable(self, networks: Mapping[str, nn.Module]) -> None:
        """Gives gradients to these networks and to no others."""
        for name, network in self.networks.items():
            for parameter in self.trained(network):
                parameter.requires_grad_(name in networks)

    def train_step(self, stage: Stage, losses: list[nn.Module], batch: Batch) -> None:
        """One step: an update for each pass of the stage.

        A GPU does not wait for the host here, except in `prepare` and for small kernels that kornia copies to it.
        """
        self.set_learning_rates()
        given = stage.prepare(batch, (self.options.seed, self.step, rank()))
        for part, module in zip(stage.updates, losses, strict=True):
            if len(losses) > 1:
                self.set_trainable(part.networks)
            self.update(stage, part, module, batch, given)
        self.step += 1
        self.batch += 1
        if self.ema:
            decay = min(self.options.ema, (1 + self.step) / (EMA_WARMUP + self.step))
            torch._foreach_lerp_(self.ema, self.floating, 1 - decay)

    def update(self, stage: Stage, part: Pass, losses: nn.Module, batch: Batch, given: Any) -> None:
        """One pass: losses, gradients, and a step of the optimiser, which skips parameters without gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with autocast(self.device, self.options.precision):
                terms = losses(given)
            terms["total"].backward()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
                raise InputError(self.advise_on_memory(batch)) from error
            raise
        limit = self.options.clip_norm or math.inf
        norms = {k: nn.utils.clip_grad_norm_(self.trained(n), limit) for k, n in part.networks.items()}
        is_last = part.name == stage.updates[-1].name
        if not is_last:  # the plain names are those of the last pass, whose losses are the stage's
            terms = {f"{part.name} {name}": value for name, value in terms.items()}
        values = {**terms, **{NORM + name: norm for name, norm in norms.items()}}
        stacked = torch.stack([v.detach().float() for v in values.values()])
        self.unseen.append(Unseen(self.step + 1, batch, is_last, list(values), stacked))
        if self.steps_between_looks == 1:
            self.check_finite()  # before the step that would spoil the weights
        self.optimizer.step()

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
            scale = self.stage.lr_scale.get(group["name"], 1)
            if group.get("by") == "muon":
                scale *= options.muon_factor
            group["lr"] = scale * warmup * max(factor * options.learning_rate, floor)

    def learning_rates(self) -> dict[str, float]:
        """By network; Muon's are that times its factor."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups if group.get("by") != "muon"}

    # -- what the steps have come to -----------------------------------------------------------------------------

    def check_finite(self) -> list[dict[str, float]]:
        """The values of the passes since the last look.

        Raises:
            InputError: one is NaN or infinite; the names are given.
        """
        seen = [dict(zip(part.names, part.values.tolist(), strict=True)) for part in self.unseen]
        for part, values in zip(self.unseen, seen, strict=True):
            bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
            if bad:
                raise self.not_finite(f"at step {part.step}: {', '.join(bad)}", part.batch)
        return seen

    def not_finite(self, what: str, batch: Batch | None = None) -> InputError:
        """The error to raise, with what may be the cause and what is left."""
        text = f"not finite {what}"
        if batch and (constant := constant_patches(batch)):
            text += f"; {constant} of the {len(batch.vis)} patches of this step are constant"
        if self.last.exists():
            text += f". {self.last} is kept"
        advice = "" if self.options.precision == "float32" else ", or --precision float32"
        return InputError(f"{text}. Try a smaller --learning-rate{advice}")

    def look(self) -> dict[str, Any]:
        """Waits for the steps since the last look, adds their losses up and returns the newest values.

        Raises:
            InputError: as `check_finite`.
        """
        newest: dict[str, float] = {}
        for part, values in zip(self.unseen, self.check_finite(), strict=True):
            patches = len(part.batch.vis)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * patches
            if part.is_last:
                self.sums[""] = self.sums.get("", 0.0) + patches
            newest |= values
        norms = {name.removeprefix(NORM): newest.pop(name) for name in [*newest] if name.startswith(NORM)}
        self.unseen.clear()
        self.looked_at = self.step
        return {"step": self.step, "losses": newest, "gradient_norms": norms, "learning_rates": self.learning_rates()}

    def finish_epoch(self) -> None:
        """Moves on to the next epoch, with a line in the log."""
        sums = [*self.sums.values()]
        if ranks() > 1:
            sums = mean_over_ranks(torch.tensor(sums, dtype=torch.float64, device=self.device)).tolist()
        means = dict(zip(self.sums, sums, strict=True))
        patches = means.pop("")
        seconds = max(self.seconds - sum(line["seconds"] for line in self.log), 1e-9)
        stage = self.stage
        for name in stage.networks:
            self.epochs_trained[name] += 1
        self.epoch += 1
        self.log.append({
            "epoch": self.epoch, "stage": stage.name, "step": self.step,
            "losses": {name: value / patches for name, value in means.items() if not name.startswith(NORM)},
            "learning_rates": self.learning_rates(), "seconds": seconds,
            "patches_per_second": round(patches * ranks() / seconds, 2),
        })  # fmt: skip
        self.batch, self.sums = 0, {}

    def advise_on_memory(self, batch: Batch) -> str:
        """The line to print when a step does not fit into memory."""
        text = (
            f"not enough memory on {self.device} for --batch-size {self.options.batch_size}, {batch.vis.shape[-1]} "
            "pixels a side; try a smaller --batch-size or --crop"
        )
        is_wide = self.options.precision == "float32" and has_bfloat16(self.device)
        return text + (", or --precision bfloat16" if is_wide else "")

    # -- averaged weights ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the model has its averaged weights, where an average is kept."""
        if not self.ema:
            yield
            return
        kept = [value.clone() for value in self.floating]
        torch._foreach_copy_(self.floating, self.ema)
        try:
            yield
        finally:
            torch._foreach_copy_(self.floating, kept)

    def restart_average(self) -> None:
        """Begins the average with the present weights."""
        if self.ema:
            torch._foreach_copy_(self.ema, self.floating)


class PassLosses(nn.Module):
    """A pass as one module, from batch to losses, for what wraps modules: compilation, distribution."""

    def __init__(self, part: Pass) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(part.networks)
        self.losses = part.losses

    def forward(self, given: Any) -> dict[str, Tensor]:
        return self.losses(given)


class Stop:
    """Asks a training to end after the step it is in: Ctrl-C, SIGTERM, or a limit of time.

    A second Ctrl-C ends it at once. Signals that come together are one, and a cluster repeats SIGTERM.
    """

    TOGETHER_S = 2.0

    def __init__(self, max_minutes: float = 0) -> None:
        self.why, self.since = "", 0.0
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf

    def __enter__(self) -> Stop:
        self.before: dict[int, Any] = {}
        # Only the main thread may be told; elsewhere signals are somebody else's.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        if self.why and number == signal.SIGINT and time.monotonic() - self.since > self.TOGETHER_S:
            raise KeyboardInterrupt
        if not self.why:
            self.why, self.since = signal.Signals(number).name, time.monotonic()
            log(f"{self.why}: stopping after this step, and saving", error=True)

    def is_asked(self) -> bool:
        if not self.why and time.monotonic() > self.deadline:
            self.why = "--max-minutes"
        return bool(self.why)

    def is_asked_anywhere(self, device: torch.device) -> bool:
        """Whether any process is asked to stop: all of them stop after the same step."""
        return any_rank(self.is_asked(), device)


def constant_patches(batch: Batch) -> int:
    """How many patches of a batch have one level all over, in either image."""
    images = [image.flatten(1) for image in (batch.vis, batch.ir)]
    return int(torch.stack([image.amax(1) == image.amin(1) for image in images]).any(0).sum())
