"""The fusion systems, behind one set of verbs, so that no script asks which system it runs.

A system is a class that is an `nn.Module` and has

- `label`: its name in tables; `skips`: what its decoder may be given; `smallest_side` of an image and
  `smallest_patch` of a training patch, in pixels;
- `weights`: task -> file names in models/ that a test script runs by default, none if none are bundled; `columns` of
  its published table; `row_label(task, stem)`: how the row of a weight file is called in it; `stretched`: whether its
  published test stretches each fused image to the full range;
- `Options`: a frozen dataclass of its own training options (fields made by `option`), which become command-line
  options of train.py;
- `fuse(vis, ir, skip)`: (B, 1, H, W) in [0, 1] twice, visible or MRI first -> fused (B, 1, H, W) in [0, 1], or in a
  range that its docstring names, to be stretched or clipped to that; a system that fuses colour takes visible images
  (B, 3, H, W) too, and then gives such;
- `default_skip(trained_for, fusing)`: the skip to use, from the tasks ("ivf" or "mif") of the weights and of
  the images;
- `stages(options, task)`: the training, as a list of `Stage`;
- `load_published(path)` and `save(path, about, half)`: its checkpoint files.

What most of them do alike is in `System`. It may also have

- `published`: task -> names of the published files in published/models/, as for `weights`;
- `recipes`: name -> values of training options that differ from their defaults, which are those of CDDFuse's
  published code; the first one is the default, "published" where there is none;
- `published_recipe`: whether "published" is among its recipes even where `recipes` does not name it;
- `other_weights`: names of files in models/ beside `weights`;
- `skip_name`: what `skips` are called in a table's footer;
- `takes_colour`: whether `fuse` and the training are given visible images in colour where there is some, (B, 3, H, W);
- `features(vis, ir)`: name -> feature maps (1, C, H, W) worth looking at;
- `smallest_batch`: where batch norm asks for it, the fewest patches that one process may train on. train.py refuses
  a smaller batch size, and leaves out a last batch that is smaller.

Parameters that it creates with `requires_grad` off stay untrained.

A new system is a file in this folder and a line in `SYSTEMS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.common import InputError, in_checkout
from utils.data.patches import Batch
from utils.inference.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["SYSTEMS", "TASKS", "Batch", "Pass", "Stage", "System", "check_options", "find_system", "option"]

TASKS = {"ivf": "infrared and visible images", "mif": "medical images: MRI and CT, PET or SPECT"}

# Name on the command line -> module and class. Imported when asked for: one system never needs another.
SYSTEMS = {
    "cddfuse": ("zoo.cddfuse", "CDDFuseSystem"),
    "fsidfusion": ("zoo.fsidfusion", "FSIDFusion"),
    "mlfuse": ("zoo.mlfuse", "MLFuseSystem"),
    "tsdm": ("zoo.tsdm", "TSDMFusion"),
}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    low: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of an options dataclass: default, explanation, and what is allowed; see `check_options`."""
    rule = {"help": help, "choices": choices, "above": above, "low": low, "below": below}
    return dataclasses.field(default=default, metadata=rule)


def check_options(options: Any) -> None:
    """Checks every field of an options dataclass against what its `option` allows.

    Raises:
        InputError: one line with all that is wrong, under the names of the command line.
    """
    problems = []
    for item in dataclasses.fields(options):
        name, value, rule = "--" + item.name.replace("_", "-"), getattr(options, item.name), item.metadata
        if rule["choices"] and value not in rule["choices"]:
            problems.append(f"{name} must be one of {', '.join(rule['choices'])}, got {value!r}")
        elif isinstance(value, (int, float)) and not math.isfinite(value):
            problems.append(f"{name} must be finite, got {value}")
        elif rule["above"] is not None and value <= rule["above"]:
            problems.append(f"{name} must be more than {rule['above']}, got {value}")
        elif rule["low"] is not None and value < rule["low"]:
            problems.append(f"{name} must be at least {rule['low']}, got {value}")
        elif rule["below"] is not None and value >= rule["below"]:
            problems.append(f"{name} must be less than {rule['below']}, got {value}")
    if problems:
        raise InputError("; ".join(problems))


def _as_it_is(batch: Batch, seed: Sequence[int]) -> Batch:
    return batch


@dataclass(frozen=True)
class Pass:
    """One update within a step of a `Stage`: what it trains, on which losses.

    Attributes:
        name: for the log.
        networks: those that are updated, by name; all others, those of other passes too, stand still.
        losses: as of a stage.
    """

    name: str
    networks: dict[str, nn.Module]
    losses: Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One stretch of a training: what is trained, for how long, on which losses.

    Attributes:
        name: for the log.
        epochs: how many.
        networks: those that are trained, by name; all others stand still. Each has its own gradient clipping and
            its own learning rate schedule, which counts only the epochs in which it was trained.
        losses: a batch -> every loss term by its name in the paper; the key `total` is minimised.
        passes: for networks that are trained in turns. A step then is one update a pass, in this order, all on one
            batch; each sees what those before it have made of their networks. Every network of the stage is in
            one pass. `losses` is then what is looked at on held-out pairs.
        prepare: (batch, seed) -> what the losses are given, and all passes of a step alike: damaged images, targets
            of a network that is not trained. It runs before the step, without gradient, on the batch's device.
            What it draws depends on the seed alone, (seed of the run, step, process): nothing is to be stored.
        rates: by name of a network, the factor of its learning rate, 1 where it is not named.
        skip: what the decoder is given when held-out pairs are fused; the system's default for the task where empty.

    Raises:
        ValueError: the passes are not a partition of the networks, or a rate is for another network.
    """

    name: str
    epochs: int
    networks: dict[str, nn.Module]
    losses: Callable[[Any], dict[str, Tensor]]
    passes: tuple[Pass, ...] = ()
    prepare: Callable[[Batch, Sequence[int]], Any] = _as_it_is
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skip: str = ""

    def __post_init__(self) -> None:
        in_passes = sorted(name for part in self.passes for name in part.networks)
        if self.passes and in_passes != sorted(self.networks):
            raise ValueError(f"stage {self.name}: passes over {in_passes} where each of {[*self.networks]} is in one")
        if not self.rates.keys() <= self.networks.keys():
            raise ValueError(f"stage {self.name}: rates of {[*self.rates]}, but it trains {[*self.networks]}")

    @property
    def updates(self) -> tuple[Pass, ...]:
        """What a step does, in this order: the passes, or one over all networks."""
        return self.passes or (Pass(self.name, self.networks, self.losses),)


class System:
    """What most systems have in common; a base class beside `nn.Module`."""

    label: str
    weights: Mapping[str, tuple[str, ...]] = dict.fromkeys(TASKS, ())
    stretched = True
    takes_colour = False
    # Bytes a pixel of the image, in float32: of the maps that `fuse_tiled` keeps between two sweeps; and of all that
    # `fuse` takes, where there is no `fuse_tiled`, which is what --max-memory is held against (0: not known).
    map_bytes = 0
    whole_bytes = 0
    skip_name = "decoder image"
    recipes: Mapping[str, Mapping[str, Any]] = {}
    other_weights: tuple[str, ...] = ()
    published_recipe = True

    @classmethod
    def row_label(cls, task: str, stem: str) -> str:
        return stem if stem.startswith(cls.label) else f"{cls.label} {stem}"

    @classmethod
    def is_stretched(cls, asked: bool | None) -> bool:
        """Whether to stretch its images to the full range: as asked for, by default as in its published test."""
        return cls.stretched if asked is None else asked

    @classmethod
    def bundled_weights(cls, task: str) -> list[Path]:
        """The weight files that come with the project, the task's own last.

        Raises:
            InputError: no such task, or there are none.
        """
        if task not in TASKS:
            raise InputError(f"no task is called {task!r}; it is one of: {', '.join(TASKS)}")
        if not cls.weights[task]:
            raise InputError(
                f"no weights of {cls.label} for --task {task} come with the project; name a file with --weights"
            )
        return [in_checkout("models", name) for name in cls.weights[task]]

    def load_published(self, path: Path | str) -> dict[str, Any]:
        """Loads a file in the published format; see `utils.inference.checkpoint.load_checkpoint`."""
        return load_checkpoint(path, self)

    def save(self, path: Path | str, about: dict[str, Any] | None = None, *, half: bool = False) -> None:
        """Saves in the published format, with `half` in half the bytes; see `save_checkpoint`."""
        save_checkpoint(path, self, about, half=half)


def find_system(name: str) -> type[Any]:
    """The class of a system by its name on the command line.

    Raises:
        InputError: no such system; the known ones are named.
    """
    if name not in SYSTEMS:
        raise InputError(f"no system is called {name!r}; --system takes one of: {', '.join(SYSTEMS)}")
    module, attribute = SYSTEMS[name]
    return getattr(importlib.import_module(module), attribute)
