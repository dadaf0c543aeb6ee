"""The training loop that serves every system: one step, the state of a run, and how it survives.

All that a run is can be stored after any step and taken up again; on a CPU the result is then, bit for bit, that
of the run that was never stopped. Two checkpoints are kept, so that a damaged one costs a minute, not a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils.common import SECONDS_BETWEEN_LINES, InputError, whole_file
from utils.data.patches import Batch, PatchDataset, batches_in_epoch, random_batches
from utils.inference.checkpoint import read_file, save_file
from utils.inference.fusing import autocast, has_bfloat16
from utils.training.distributed import any_rank, from_first, is_first, mean_over_ranks, rank, ranks
from utils.training.optimizers import Muon

if TYPE_CHECKING:
    from zoo import Pass, Stage

# Attributes of a Run that are stored as they are.
COUNTERS = ("epoch", "batch", "step", "epochs_trained", "seconds", "sums", "best", "log")
# Looking at a loss makes a GPU wait for the host, so there it is looked at after so many steps only.
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 25}
EMA_WARMUP = 10  # steps in which the average forgets the first weights faster than its decay says


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
        self.optimizer = (Muon if options.optimizer == "muon" else torch.optim.Adam)(
            groups, lr=options.learning_rate, weight_decay=options.weight_decay,
            decoupled_weight_decay=options.decoupled_weight_decay, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        state = [value for value in model.state_dict().values() if value.is_floating_point()]
        self.floating: list[Tensor] = state
        self.ema = [value.clone() for value in state] if options.ema else []
        self.compile = False
        self.steps_between_looks = STEPS_BETWEEN_LOOKS.get(self.device.type, 1)
        self.hurry: Callable[[], bool] = lambda: False  # whether to look after the present step already
        self.looked_at = self.step
        self.unseen: list[tuple[int, bool, list[str], Tensor]] = []

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
        options, stage = self.options, self.stage
        self.model.train()
        losses = []
        for part in stage.updates:
            self.let_train(part.networks)  # before wrapping: DistributedDataParallel waits for what then has gradients
            module: nn.Module = _PassLosses(part)
            if self.compile:
                module = torch.compile(module)
            losses.append(DistributedDataParallel(module) if ranks() > 1 else module)
        batches = random_batches(
            self.dataset, options.batch_size, (options.seed, self.epoch), crop=options.crop, flips=options.flips,
            batches=options.epoch_batches, start=self.batch, part=(rank(), ranks()), smallest=self.smallest_batch,
        )  # fmt: skip
        _, epoch_in_stage = self.stage_of(self.epoch)
        title = f"{stage.name} {epoch_in_stage + 1}/{stage.epochs}"
        hide = None if is_first() else True
        with tqdm(desc=title, total=self.epoch_batches, initial=self.batch, unit="batch", disable=hide,
                  file=_Patient(sys.stderr)) as bar:  # fmt: skip
            since = told = time.perf_counter()
            for batch in batches:
                self.train_step(stage, losses, batch.to(self.device))
                bar.update()
                waits = self.step - self.looked_at < self.steps_between_looks and self.batch < self.epoch_batches
                if waits and not self.hurry():
                    continue
                patches = self.sums.get("", 0.0)
                seen = self.look()
                now = time.perf_counter()
                self.seconds += now - since
                seen["patches_per_second"] = (self.sums[""] - patches) * ranks() / (now - since)
                since = now
                loss = f"{seen['losses']['total']:.4f}"
                bar.set_postfix(loss=loss, refresh=False)
                if bar.disable and is_first() and now - told > SECONDS_BETWEEN_LINES:  # a log file, not a terminal
                    say(f"{title}: {self.batch} of {self.epoch_batches} batches, total loss {loss}")
                    told = now
                yield seen
                since = time.perf_counter()
        self.finish_epoch()

    def let_train(self, networks: Mapping[str, nn.Module]) -> None:
        """Gives gradients to these networks and to no others."""
        for name, network in self.networks.items():
            for parameter in self.trained(network):
                parameter.requires_grad_(name in networks)

    def train_step(self, stage: Stage, losses: list[nn.Module], batch: Batch) -> None:
        """One step: an update for each pass of the stage. But for `prepare`, nothing makes a GPU wait for the host."""
        self.set_learning_rates()
        given = stage.prepare(batch, (self.options.seed, self.step, rank()))
        for part, module in zip(stage.updates, losses, strict=True):
            if len(losses) > 1:
                self.let_train(part.networks)
            self.update(stage, part, module, batch, given)
        self.step += 1
        self.batch += 1
        if self.ema:
            decay = min(self.options.ema, (1 + self.step) / (EMA_WARMUP + self.step))
            torch._foreach_lerp_(self.ema, self.floating, 1 - decay)

    def update(self, stage: Stage, part: Pass, losses: nn.Module, batch: Batch, given: Any) -> None:
        """One pass: losses, gradients, and a step of the optimiser, which passes over all without gradients."""
        terms: dict[str, Tensor] | None
        try:
            with autocast(self.device, self.options.precision):
                terms = losses(given)
            self.optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            terms = None
        if terms is None:  # not in the handler: as long as the error lives, so does what the step has stored
            raise InputError(self.advise_on_memory(stage, batch))
        limit = self.options.clip_norm or math.inf
        norms = {k: nn.utils.clip_grad_norm_(self.trained(n), limit) for k, n in part.networks.items()}
        last = part.name == stage.updates[-1].name
        if not last:  # the plain names are those of the last pass, whose losses are the stage's
            terms = {f"{part.name} {name}": value for name, value in terms.items()}
        values = {**terms, **{f"gradient norm of {name}": norm for name, norm in norms.items()}}
        stacked = torch.stack([v.detach().double() for v in values.values()])
        self.unseen.append((len(batch.vis), last, list(values), stacked))
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
            relative = self.stage.rates.get(group["name"], 1)
            if group.get("by") == "muon":
                relative *= options.muon_factor
            group["lr"] = relative * warmup * max(factor * options.learning_rate, floor)

    def check_finite(self) -> list[dict[str, float]]:
        """The values of the steps since the last look.

        Raises:
            InputError: one is NaN or infinite; the names are given.
        """
        seen = [dict(zip(names, values.tolist(), strict=True)) for *_, names, values in self.unseen]
        bad = [f"{name} {value}" for values in seen for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise InputError(
                f"not finite at step {self.step + 1}: {', '.join(dict.fromkeys(bad))}. The last checkpoint in "
                f"{self.out} is kept; try a smaller --learning-rate, or --precision float32"
            )
        return seen

    def look(self) -> dict[str, Any]:
        """Waits for the steps since the last look, adds their losses up and returns the newest values.

        Raises:
            InputError: as `check_finite`.
        """
        seen = self.check_finite()
        newest: dict[str, float] = {}
        for (patches, last, *_), values in zip(self.unseen, seen, strict=True):
            if last:
                self.sums[""] = self.sums.get("", 0.0) + patches
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * patches
            newest |= values
        norms = {}
        for name in [name for name in newest if name.startswith("gradient norm of ")]:
            norms[name.removeprefix("gradient norm of ")] = newest.pop(name)
        self.unseen.clear()
        self.looked_at = self.step
        return {"step": self.step, "losses": newest, "gradient_norms": norms, "learning_rates": self.rates()}

    def rates(self) -> dict[str, float]:
        """By network; Muon's are that times its factor."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups if group.get("by") != "muon"}

    def finish_epoch(self) -> None:
        stage, _ = self.stage_of(self.epoch)
        sums = torch.tensor([*self.sums.values()], dtype=torch.float64, device=self.device)
        means = dict(zip(self.sums, mean_over_ranks(sums).tolist(), strict=True))
        patches = means.pop("")
        before = sum(line["seconds"] for line in self.log)
        seconds = max(self.seconds - before, 1e-9)
        for name in stage.networks:
            self.epochs_trained[name] += 1
        self.epoch += 1
        losses = {k: v / patches for k, v in means.items() if not k.startswith("gradient norm of ")}
        self.log.append({
            "epoch": self.epoch, "stage": stage.name, "step": self.step, "losses": losses,
            "learning_rates": self.rates(), "seconds": seconds,
            "patches_per_second": round(patches * ranks() / seconds, 2),
        })  # fmt: skip
        self.batch, self.sums = 0, {}

    def advise_on_memory(self, stage: Stage, batch: Batch) -> str:
        """The line to print when a step does not fit into memory: with the largest batch that does."""
        text = f"not enough memory on {self.device} for --batch-size {self.options.batch_size}, {batch.vis.shape[-1]}"
        text += " pixels a side"
        fits = 0
        # With several processes the losses wait for one another, and the others may have memory enough.
        size = len(batch.vis) // 2 if ranks() == 1 else 0
        while size >= self.smallest_batch and not fits:
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                fewer = batch.each(operator.itemgetter(slice(size)))
                given = stage.prepare(fewer, (self.options.seed, self.step, rank()))
                with autocast(self.device, self.options.precision):
                    for part in stage.updates:
                        self.let_train(part.networks)
                        part.losses(given)["total"].backward()
                fits = size
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            size //= 2
        if fits:
            return f"{text}; --batch-size {fits} fits"
        text += "; try a smaller --batch-size or --crop"
        if self.options.precision == "float32" and has_bfloat16(self.device):
            text += ", or --precision bfloat16"
        return text

    # -- state -------------------------------------------------------------------------------------------------

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

    def about(self) -> dict[str, Any]:
        """What is stored beside the weights."""
        facts = {
            "epochs": self.epoch, "steps": self.step, "seconds": round(self.seconds), "processes": ranks(),
            "torch": str(torch.__version__), "device": str(self.device),
        }  # fmt: skip
        return {**self.settings, **self.facts, **facts}

    def save(self) -> None:
        """Writes last.pt, the weights and the log; the checkpoint before becomes previous.pt.

        Raises:
            InputError: a weight is not finite; nothing is written.
            OSError: a file could not be written; one whole checkpoint is there all the same.
        """
        if not all(value.isfinite().all() for value in self.floating):
            raise InputError(
                f"not finite before step {self.step + 1}: weights. The last checkpoint in {self.out} is kept; "
                "try a smaller --learning-rate, or --precision float32"
            )
        if not is_first():
            return
        if self.last.exists():
            os.replace(self.last, self.previous)
        save_file(self.last, {
            **{name: getattr(self, name) for name in COUNTERS}, "settings": self.settings, "about": self.about(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
            "random": random_state(self.device),
        })  # fmt: skip
        self.write_results()

    def write_results(self) -> None:
        """Writes the weights and the log, which are made of what last.pt holds."""
        with self.averaged():
            self.model.save(self.weights, self.about())
        with whole_file(self.out / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log))

    def save_best(self, loss: float) -> bool:
        """Keeps the present weights beside the last ones where the validation loss is the lowest so far."""
        if self.best is not None and not loss < self.best:
            return False
        if is_first():
            with self.averaged():
                self.model.save(self.best_weights, {**self.about(), "validation_loss": loss})
        self.best = loss
        return True

    @property
    def best_weights(self) -> Path:
        return self.weights.with_name(f"{self.weights.stem}_best{self.weights.suffix}")

    def load(self, path: Path, *, force: bool = False) -> None:
        """Takes up a stored run.

        Args:
            path: a file that `save` wrote.
            force: go on although options changed; their names are printed.

        Raises:
            FileNotFoundError, InputError: unreadable, of another kind or of other options.
        """
        self.take_up(path, from_first(lambda: self.read(path)), force=force)

    def take_up(self, path: Path, saved: dict[str, Any], *, force: bool = False) -> None:
        """`load`, of a file's content that is at hand."""
        # An option that there was not yet had its default: what was done before there was a choice.
        of_losses = vars(self.model.Options())
        former = {**vars(type(self.options)()), **of_losses, **saved["settings"]}
        changed = {key: f"{key} {former.get(key)!r} -> {value!r}"
                   for key, value in self.settings.items() if former.get(key) != value}  # fmt: skip
        listed = "; ".join(changed.values())
        if changed and not force:
            raise InputError(
                f"the options differ from those of {path}: {listed}; give the former ones, "
                "or --force to go on with these"
            )
        if former["optimizer"] != self.options.optimizer:
            raise InputError(
                f"{path} was trained with --optimizer {former['optimizer']}, from whose state "
                f"{self.options.optimizer} cannot go on; give the former one, or start a new run from its weights: "
                f"--init {self.weights} --out ANOTHER"
            )
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} is of another network; name the run to go on with by --resume") from error
        for group in self.optimizer.param_groups:  # loaded with the state; the options may have changed
            group["weight_decay"] = self.options.weight_decay
            if "decoupled_weight_decay" in group:  # Muon's always is
                group["decoupled_weight_decay"] = self.options.decoupled_weight_decay
        if changed:
            print(f"warning: options changed: {listed}", file=sys.stderr)
        if self.ema and saved["ema"]:
            torch._foreach_copy_(self.ema, [value.to(self.device) for value in saved["ema"]])
        else:
            self.restart_average()
        for name in COUNTERS:
            setattr(self, name, saved[name])
        # The best weights may lie elsewhere, or be the best by another loss.
        if path.parent != self.out or any(key in of_losses and not key.endswith("epochs") for key in changed):
            self.best = None
        self.looked_at = self.step
        set_random_state(saved["random"], self.device)
        before = saved["about"]["commit"]
        if self.facts["commit"] not in before.split(", then "):
            before += f", then {self.facts['commit']}"
        self.facts |= {"commit": before, "init": saved["about"]["init"]}

    def restart_average(self) -> None:
        """Begins the average with the present weights."""
        if self.ema:
            torch._foreach_copy_(self.ema, self.floating)

    def files(self) -> list[Path]:
        """What a run writes first and what nobody wants overwritten."""
        return [self.last, self.previous, self.weights, self.best_weights]

    def read(self, path: Path) -> dict[str, Any]:
        saved = read_file(path, self.device if ranks() == 1 else "cpu")
        if not {*COUNTERS, "settings", "about", "model", "optimizer", "ema", "random"} <= saved.keys():
            raise InputError(f"{path} is not a file to resume from; train.py writes last.pt for that")
        return saved

    def resume(self, *, force: bool = False) -> Path | None:
        """Takes up the newest readable checkpoint of the folder; None where there is none.

        Raises:
            InputError: there are checkpoints, and none can be read; or options changed.
        """
        there = from_first(lambda: [path for path in (self.last, self.previous) if path.exists()])
        for path in there:
            try:
                saved = from_first(lambda path=path: self.read(path))
            except InputError as error:
                if path == there[-1]:
                    raise
                if is_first():
                    print(f"warning: {error}. Going on with {there[-1]}", file=sys.stderr)
                continue
            self.take_up(path, saved, force=force)
            if path != there[0] and is_first():  # or else the next save would put it over the one that can be read
                os.replace(there[0], there[0].with_name(there[0].name + ".damaged"))
            return path
        return None


class _PassLosses(nn.Module):
    """A pass as one module, from batch to losses, for what wraps modules: compilation, distribution."""

    def __init__(self, part: Pass) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(part.networks)
        self.losses = part.losses

    def forward(self, given: Any) -> dict[str, Tensor]:
        return self.losses(given)


class Stop:
    """Asks a training to end after the step it is in: Ctrl-C, SIGTERM, or a limit of time.

    A second Ctrl-C, some time after the first, ends it at once. Signals that come together are one: a cluster tells
    every process, and so does torchrun.
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
        if self.why:
            if number == signal.SIGINT and time.monotonic() - self.since > self.TOGETHER_S:
                raise KeyboardInterrupt
            return
        self.why, self.since = signal.Signals(number).name, time.monotonic()
        say(f"{self.why}: stopping after this step", error=True)

    def asked(self) -> bool:
        if not self.why and time.monotonic() > self.deadline:
            self.why = "--max-minutes"
        return bool(self.why)


def say(text: str, *, error: bool = False) -> None:
    """Prints a line above the progress bar.

    Where nobody reads any more, as `tee` does not after Ctrl-C, that costs the text and not the run.
    """
    with contextlib.suppress(OSError):
        tqdm.write(text, file=_Patient(sys.stderr if error else sys.stdout))


class _Patient:
    """A stream whose reader may go: from then on what is written is dropped."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            # The descriptor, not the object: Python itself flushes at exit, and would fail then.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def flush(self) -> None:
        """All is written at once."""

    def __eq__(self, other: object) -> bool:  # tqdm takes its bar away for what is written to the same stream
        return self.stream is getattr(other, "stream", other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def stop_now(stop: Stop, device: torch.device) -> bool:
    """Whether any process is asked to stop: all of them stop after the same step."""
    return any_rank(stop.asked(), device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
