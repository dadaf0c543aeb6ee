"""The state of a run: all that can be stored after any step and taken up again.

On a CPU the result is then, bit for bit, that of the run that was never stopped. Two checkpoints are kept, so that a
damaged one costs a minute, not a run. Whatever a file holds, it is taken up whole or refused in one line.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.common import InputError, listed, reason_of, write_text
from utils.inference.checkpoint import ABOUT, read_file, save_file
from utils.training.distributed import from_first, is_first, ranks
from utils.training.loop import Run
from utils.training.monitor import log
from utils.training.optimizers import check_tensor
from utils.training.optimizers import load_state as load_optimizer

# Attributes of a Run that are stored as they are.
COUNTERS = ("epoch", "batch", "step", "epochs_trained", "seconds", "sums", "best", "log")
FORMER_NAMES = {"patches_digest": "patches_hash"}  # of settings


class OtherOptions(InputError):
    """A run is whole, but was made with other options."""


def is_taken(run: Run, *, begins_again: bool) -> bool:
    """Whether a run that begins would write over another, or over weights.

    Args:
        begins_again: not over those that the same command wrote before it was killed: it comes to them once more.
    """
    weights = [path for path in (run.weights, run.best_weights) if path.exists()]
    if begins_again and not (run.last.exists() or run.previous.exists()):
        return not all(is_unfinished(run, read_file(path).get(ABOUT, {})) for path in weights)
    return bool(weights) or run.last.exists() or run.previous.exists()


def is_unfinished(run: Run, facts: dict[str, Any]) -> bool:
    """Whether weights with these facts are of this run, before its end."""
    own = run.settings | {"init": run.facts["init"]}
    return facts.get("epochs", run.epochs) < run.epochs and all(facts.get(k) == v for k, v in own.items())


def about(run: Run) -> dict[str, Any]:
    """What is stored beside the weights."""
    facts = {
        "epochs": run.epoch, "steps": run.step, "seconds": round(run.seconds), "processes": ranks(),
        "torch": str(torch.__version__), "device": str(run.device),
    }  # fmt: skip
    return {**run.settings, **run.facts, **facts}


def save_state(run: Run) -> None:
    """Writes the weights, the log and last.pt; the checkpoint before becomes previous.pt.

    Raises:
        InputError: a weight is not finite; nothing is written.
        OSError: a file could not be written; one whole checkpoint is there all the same.
    """
    if not all(value.isfinite().all() for value in run.floating):
        raise run.not_finite(f"before step {run.step + 1}: weights")
    if not is_first():
        return
    save_results(run)  # small, so they come first: there may be room for them where there is none for last.pt
    if run.last.exists():
        os.replace(run.last, run.previous)
    save_file(run.last, {
        **{name: getattr(run, name) for name in COUNTERS}, "settings": run.settings, "about": about(run),
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "ema": run.ema,
        "random": random_state(run.device),
    })  # fmt: skip


def save_results(run: Run) -> None:
    """Writes the weights and the log, which are made of what last.pt holds."""
    with run.averaged():
        run.model.save(run.weights, about(run))
    write_text(run.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))


def save_best(run: Run, loss: float) -> None:
    """Keeps the present weights beside the last ones where the validation loss is the lowest so far."""
    if run.best is None or loss < run.best:
        with run.averaged():
            run.model.save(run.best_weights, {**about(run), "validation_loss": loss})
        run.best = loss


def load_state(run: Run, path: Path, *, force: bool = False) -> None:
    """Takes up a stored run. After an error the run is half loaded: load another file, or end.

    Args:
        run: as it would begin.
        path: a file that `save_state` wrote.
        force: go on although options changed; their names are printed.

    Raises:
        OtherOptions: it is of other options.
        FileNotFoundError, InputError: unreadable, damaged, of another kind or another network.
    """
    saved = from_first(lambda: read_file(path, run.device if ranks() == 1 else "cpu"))
    if not {*COUNTERS, "settings", "about", "model", "optimizer", "ema", "random"} <= saved.keys():
        raise InputError(f"{path} is not a file to resume from; train.py writes last.pt for that")
    try:
        changed = changed_options(run, path, saved["settings"], force)
        check_counters(run, saved, most={} if changed else {"epoch": run.epochs, "batch": run.epoch_batches})
        load_tensors(run, saved)
        commit, init = saved["about"]["commit"], saved["about"]["init"]
        if run.facts["commit"] not in commit.split(", then "):
            commit += f", then {run.facts['commit']}"
    except InputError:
        raise
    except Exception as error:  # a value of a wrong type may lead to anything
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"{path} is damaged or of another network ({reason})") from error
    run.facts |= {"commit": commit, "init": init}
    for name in COUNTERS:
        setattr(run, name, saved[name])
    # The best weights may lie elsewhere, or be the best by another loss.
    of_losses = vars(run.model.Options())
    if path.parent != run.out or any(key in of_losses and not key.endswith("epochs") for key in changed):
        run.best = None
    run.looked_at = run.step


def changed_options(run: Run, path: Path, settings: dict[str, Any], force: bool) -> list[str]:
    """The names of the options that changed, which are printed.

    Raises:
        OtherOptions: there are some without `force`, or the optimiser is another.
    """
    # An option that there was not yet had its default: what was done before there was a choice.
    stored = {FORMER_NAMES.get(key, key): value for key, value in settings.items()}
    former = {**vars(type(run.options)()), **vars(run.model.Options()), **stored}
    changed = [key for key, value in run.settings.items() if former.get(key) != value]
    text = "; ".join(f"{key} {former.get(key)!r} -> {run.settings[key]!r}" for key in changed)
    if changed and not force:
        raise OtherOptions(
            f"the options differ from those of {path}: {text}; give the former ones, or --force to go on with these"
        )
    if "optimizer" in changed:
        raise OtherOptions(
            f"{path} was trained with --optimizer {former['optimizer']}, from whose state {run.options.optimizer} "
            "cannot go on; give the former one, or start a new run from its weights: "
            f"--init {run.weights} --out ANOTHER"
        )
    if changed and is_first():
        log(f"warning: options changed: {text}", error=True)
    return changed


def check_counters(run: Run, saved: dict[str, Any], most: dict[str, int]) -> None:
    """
    Raises:
        ValueError, or what a wrong type leads to: a counter is not what a run may have counted.
    """
    counts = {name: saved[name] for name in ("epoch", "batch", "step")} | saved["epochs_trained"]
    bad = [name for name, n in counts.items() if type(n) is not int or not 0 <= n <= most.get(name, 2**31)]
    if saved["epochs_trained"].keys() != run.networks.keys() or len(saved["log"]) != saved["epoch"]:
        bad.append("epochs")
    numbers = [saved["seconds"], *saved["sums"].values(), *(line["seconds"] for line in saved["log"])]
    numbers += [] if saved["best"] is None else [saved["best"]]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
        bad.append("sums")
    if bad or (saved["batch"] and "" not in saved["sums"]):
        raise ValueError(f"counters {', '.join(bad) or 'sums'}")


def load_tensors(run: Run, saved: dict[str, Any]) -> None:
    """Loads model, optimiser, average and random state.

    Raises:
        ValueError, or what a wrong type leads to: something does not fit.
    """
    own, given = run.model.state_dict(), saved["model"]
    if own.keys() != given.keys():
        raise ValueError(f"keys {listed(own.keys() ^ given.keys())}")
    for name, value in own.items():
        check_tensor(name, given[name], value)
    run.model.load_state_dict(given)
    load_optimizer(run.optimizer, saved["optimizer"])
    run.restart_average()
    if run.ema and saved["ema"]:
        for average, value in zip(run.ema, saved["ema"], strict=True):
            check_tensor("average of the weights", value, average)
            average.copy_(value)
    set_random_state(saved["random"], run.device)


def resume(run: Run, wanted: str | None, *, force: bool = False) -> Path | None:
    """Takes up a run and returns its file; None for a fresh run.

    Args:
        run: as yet untrained.
        wanted: a checkpoint; "auto" for the newest whole one of the run's folder, if there is one; None for none.
        force: although options changed.

    Raises:
        InputError: there are checkpoints, and none is whole; or options changed.
    """
    there = [Path(wanted)] if wanted else []
    if wanted == "auto":
        there = from_first(lambda: [path for path in (run.last, run.previous) if path.exists()])
    for path in there:
        try:
            load_state(run, path, force=force)
        except (InputError, OSError) as error:
            if path == there[-1] or isinstance(error, OtherOptions):
                raise
            if is_first():
                log(f"warning: {error}. Going on with {there[-1]}", error=True)
            continue
        if path != there[0] and is_first():  # or else the next save would put it over the one that can be read
            os.replace(there[0], there[0].with_name(there[0].name + ".damaged"))
        return path
    return None


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
