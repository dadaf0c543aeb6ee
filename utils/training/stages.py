"""What a training consists of: stages, and the passes of a step. Systems name theirs, `loop.Run` carries them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from utils.data.patches import Batch


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
        networks: those that are trained, by name; all others stand still. Each has its own gradient clipping. The
            schedule `step` counts for each the epochs in which it was trained; `cosine` counts all steps of the run,
            over all stages.
        losses: a batch -> every loss term by its name in the paper; the key `total` is minimised.
        passes: for networks that are trained in turns. A step then is one update a pass, in this order, all on one
            batch; each sees what those before it have made of their networks. Every network of the stage is in
            one pass. `losses` is then what is looked at on validation pairs.
        prepare: (batch, seed) -> what the losses are given, and all passes of a step alike: degraded images, targets
            of a network that is not trained. It runs before the step, without gradient, on the batch's device.
            What it draws depends on the seed alone, (seed of the run, step, process): nothing is to be stored.
        lr_scale: by name of a network, the factor of its learning rate, 1 where it is not named.
        skip: what `fuse` is given for validation pairs; the system's default for the task where empty.

    Raises:
        ValueError: the passes are not a partition of the networks, or a factor is for another network.
    """

    name: str
    epochs: int
    networks: dict[str, nn.Module]
    losses: Callable[[Any], dict[str, Tensor]]
    passes: tuple[Pass, ...] = ()
    prepare: Callable[[Batch, Sequence[int]], Any] = _as_it_is
    lr_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skip: str = ""

    def __post_init__(self) -> None:
        in_passes = sorted(name for part in self.passes for name in part.networks)
        if self.passes and in_passes != sorted(self.networks):
            raise ValueError(f"stage {self.name}: passes over {in_passes} where each of {[*self.networks]} is in one")
        if not self.lr_scale.keys() <= self.networks.keys():
            raise ValueError(f"stage {self.name}: lr_scale of {[*self.lr_scale]}, but it trains {[*self.networks]}")

    @property
    def updates(self) -> tuple[Pass, ...]:
        """What a step does, in this order: the passes, or one over all networks."""
        return self.passes or (Pass(self.name, self.networks, self.losses),)
