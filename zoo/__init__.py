"""The fusion systems, behind one set of verbs, so that no script asks which system it runs.

A system is an `nn.Module` and a `System` with a `label`, `fuse(vis, ir, skip)` and, to be trained here,
`stages(options, task)`; whatever else `System` names has a default there. A new system is a file in this folder and a
line in `SYSTEMS`; docs/extending.md shows one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from utils.common import InputError
from utils.data.patches import Batch
from utils.inference.checkpoint import load_checkpoint, save_checkpoint
from utils.metrics import PAPER_TABLE
from utils.training.options import CheckedOptions, option
from utils.training.stages import Pass, Stage

__all__ = ["SYSTEMS", "TASKS", "Batch", "CheckedOptions", "Pass", "Stage", "System", "find_system", "option"]

TASKS = {"ivf": "infrared and visible images", "mif": "medical images: MRI and CT, PET or SPECT"}

# Name on the command line -> module and class. Imported when asked for: one system never needs another.
SYSTEMS = {
    "cddfuse": ("zoo.cddfuse", "CDDFuseSystem"),
    "fsidfusion": ("zoo.fsidfusion", "FSIDFusion"),
    "mlfuse": ("zoo.mlfuse", "MLFuseSystem"),
    "tsdm": ("zoo.tsdm", "TSDMFusion"),
}


class System:
    """What most systems have in common; a base class beside `nn.Module`.

    A system has, without a default:

    - `label`: its name in tables;
    - `fuse(vis, ir, skip)`: (B, 1, H, W) in [0, 1] twice, visible or MRI first -> fused (B, 1, H, W) in [0, 1], or in a
      range that its docstring names, to be brought to that; a system that takes colour is given visible images
      (B, 3, H, W) too, and then gives such;
    - `stages(options, task)`: its training, a list of `Stage`.

    `features(vis, ir)`, where there is one: name -> feature maps (1, C, H, W) worth looking at. Parameters that are
    created with `requires_grad` off stay untrained.
    """

    label: str
    skips: tuple[str, ...] = ("none",)  # what `fuse` may be given as `skip`; the first is the default
    smallest_side = 1  # of an image, in pixels
    smallest_patch = 6  # of a training patch: SSIM reflects five pixels
    smallest_batch = 1  # a process; more where batch norm asks for it. A smaller last batch is left out
    weights: Mapping[str, tuple[str, ...]] = dict.fromkeys(TASKS, ())  # task -> files in models/ that tests run
    other_weights: tuple[str, ...] = ()  # further files there
    published: Mapping[str, tuple[str, ...]] = {}  # task -> published files, as for `weights`
    columns: Sequence[str] = PAPER_TABLE  # of its published table
    normalised = True  # whether its published test brings each fused image to the full range
    needs_saliency = False  # whether its training needs saliency maps of the infrared images
    takes_colour = False  # whether `fuse` and the training are given visible images in colour where there is some
    # Bytes a pixel of the image, in float32: of the maps that `fuse_tiled` keeps between two sweeps; and of all that
    # `fuse` takes, where there is no `fuse_tiled`, which is what --max-memory is held against (0: not known).
    map_bytes = 0
    whole_bytes = 0
    step_bytes = 0  # bytes a pixel of a batch, in float32, that a training step takes; 0: not known
    Options: type = CheckedOptions  # of its training: a frozen dataclass like this one, with fields made by `option`
    # Name -> values of training options that differ from their defaults, which are those of CDDFuse's published code.
    # The first is the default.
    recipes: Mapping[str, Mapping[str, Any]] = {"published": {}}

    @property
    def published_networks(self) -> dict[str, str]:
        """Name in a checkpoint -> attribute; by default every part of the system under its own name."""
        return {name: name for name, _ in self.named_children()}

    @classmethod
    def default_skip(cls, trained_for: str, fusing: str) -> str:
        """The skip to use, from the tasks ("ivf" or "mif") of the weights and of the images."""
        return cls.skips[0]

    @classmethod
    def row_label(cls, task: str, stem: str) -> str:
        """How the row of a weight file is called in a table: by its name, as a table may hold several."""
        return stem if stem.startswith(cls.label) else f"{cls.label} {stem}"

    def fused_terms(self, options: Any) -> dict[str, tuple[float, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
        """Loss terms of the fused image beside those of the paper: name -> weight and function of (vis, ir, fused)."""
        return {}

    def with_fused_terms(
        self, terms: dict[str, Tensor], options: Any, batch: Batch, fused: Tensor
    ) -> dict[str, Tensor]:
        """The terms of a stage with those of `fused_terms`, where they have a weight, added to the total."""
        for name, (weight, loss) in self.fused_terms(options).items():
            if weight:
                terms[name] = loss(batch.vis, batch.ir, fused)
                terms["total"] = terms["total"] + weight * terms[name]
        return terms

    @classmethod
    def cost(cls, height: int = 480, width: int = 640) -> tuple[int, int]:
        """Parameters of the networks that fuse, and operations for a pair of images, counted without running them.

        PyTorch counts: a multiplication and an addition are two operations.
        """
        system = cls().eval().to("meta")
        vis, ir = (torch.empty(1, n, height, width, device="meta") for n in (3 if cls.takes_colour else 1, 1))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            system.fuse(vis, ir, cls.skips[0])
        parts = [getattr(system, part) for part in system.published_networks.values()]
        return sum(p.numel() for part in parts for p in part.parameters()), counter.get_total_flops()

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
