"""Options as dataclasses: what each may be, how the command line names it, and those of the training loop."""

from __future__ import annotations

import argparse
import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

from utils.common import LARGEST, InputError
from utils.inference.fusing import PRECISIONS
from utils.training.optimizers import OPTIMIZERS

LIMITS = {"above": ("more than", operator.gt), "low": ("at least", operator.ge),
          "below": ("less than", operator.lt), "most": ("at most", operator.le)}  # fmt: skip


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), **limits: float) -> Any:
    """A field of an options dataclass: default, explanation, and what it may be.

    Args:
        limits: `above`, `low`, `below`, `most`; numbers are at most `LARGEST` where nothing else is said.
    """
    if type(default) in (int, float):
        limits = {"most": LARGEST, **limits}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **limits})


@dataclass(frozen=True)
class CheckedOptions:
    """A base of dataclasses whose fields are made by `option`, and checked whenever an object is made.

    Raises:
        InputError: one line with all that is wrong, under the names of the command line.
    """

    def __post_init__(self) -> None:
        problems = []
        for item in dataclasses.fields(self):
            value, rule = getattr(self, item.name), item.metadata
            wrong = [f"{words} {rule[key]}" for key, (words, holds) in LIMITS.items()
                     if key in rule and not holds(value, rule[key])]  # fmt: skip
            if rule["choices"] and value not in rule["choices"]:
                wrong = [f"one of {', '.join(rule['choices'])}"]
            if wrong:
                problems.append(f"--{item.name.replace('_', '-')} must be {wrong[0]}, got {str(value)[:20]}")
        if problems:
            raise InputError("; ".join(problems))


def add_options(parser: argparse.ArgumentParser, title: str, options: type) -> None:
    """Adds one command-line option for each field of an options dataclass, with its default."""
    group = parser.add_argument_group(title)
    for item in dataclasses.fields(options):
        kind = {"int": int, "float": float, "str": str}.get(item.type)
        # Choices are shown here and checked by the dataclass, which code that makes one by hand goes through too.
        shown = "|".join(item.metadata["choices"]) or item.type.upper()
        how = {"type": kind, "metavar": shown} if kind else {"action": argparse.BooleanOptionalAction}
        # Filled in when help is shown: a recipe changes defaults after the options were added.
        text = f"{item.metadata['help']} (default: %(default)s)"
        group.add_argument(f"--{item.name.replace('_', '-')}", default=item.default, help=text, **how)


def take_options(args: argparse.Namespace, options: type) -> Any:
    return options(**{item.name: getattr(args, item.name) for item in dataclasses.fields(options)})


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Options of the training loop; the defaults are those of the published code of CDDFuse."""

    batch_size: int = option(8, "patches a step", above=0, most=2**16)
    optimizer: str = option("adam", "muon: orthogonalised steps for matrices and kernels, Adam for the rest",
                            choices=OPTIMIZERS)  # fmt: skip
    learning_rate: float = option(1e-4, "of the optimiser, for each network", above=0)
    muon_factor: float = option(1.0, "times the rate, for the steps that Muon takes", above=0)
    schedule: str = option("step", "step: times --lr-factor every --lr-epochs; cosine: to --min-lr over all stages",
                           choices=("step", "cosine"))  # fmt: skip
    lr_epochs: int = option(20, "epochs of training of a network between two steps of its rate", above=0)
    lr_factor: float = option(0.5, "factor of a step of the rate", above=0)
    min_lr: float = option(1e-6, "the schedule goes no lower", low=0)
    warmup_steps: int = option(0, "steps over which the rate rises to its value, before either schedule", low=0)
    clip_norm: float = option(0.01, "largest gradient norm of each network; 0: no limit", low=0)
    weight_decay: float = option(0.0, "of Adam, added to the gradient", low=0)
    decoupled_weight_decay: bool = option(
        False, "take the decay off the weights instead, as AdamW does, and Muon always"
    )
    crop: int = option(0, "side of a random crop of each patch; 0: the whole patch", low=0)
    flips: bool = option(False, "flip and quarter-turn patches at random")
    epoch_batches: int = option(0, "steps an epoch; 0: one pass over the patches", low=0)
    ema: float = option(0.0, "decay a step of the running average of the weights, which is what is kept; 0: none",
                        low=0, below=1)  # fmt: skip
    drop_last: bool = option(False, "leave out a last batch that is smaller than the others")
    precision: str = option("float32", "bfloat16: autocast, with the losses in float32; auto: where the device has "
                            "instructions for it, else float32", choices=("auto", *PRECISIONS))  # fmt: skip
    seed: int = option(0, "of the first weights and of the order, crops and flips of the patches", low=0,
                      most=2**32 - 1)  # fmt: skip
