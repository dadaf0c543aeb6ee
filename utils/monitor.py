"""What a training shows of itself: scores on held-out pairs, panels to look at, curves for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

import net
from utils import whole_file
from utils.images import to_uint8
from utils.inference import PRECISIONS, fuse_arrays, to_network
from utils.memory import CPU_PIECE_PIXELS
from utils.metrics import PAPER_TABLE, score
from utils.patches import Batch, HeldOut
from utils.saliency import visual_saliency

if TYPE_CHECKING:
    from zoo import Stage

PANEL_PAIRS = 4
_GAP = 4  # pixels of white between the images of a panel


class Validation(NamedTuple):
    """Means over the held-out pairs: the stage's loss terms, and the metrics of the table (protocol `paper`)."""

    losses: dict[str, float]
    metrics: dict[str, float]


@torch.inference_mode()
def validate(model: Any, stage: Stage, task: str, pairs: Sequence[HeldOut], precision: str) -> Validation:
    """Losses and scores of a system in training on pairs that it does not train on; its mode is kept."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    skip = model.default_skip(task, task)
    losses, metrics = [], []
    for number, pair in enumerate(pairs):
        images = (pair.vis, pair.ir, visual_saliency(pair.ir))
        vis, ir, ir_saliency = (to_network(image, device) for image in images)
        given = stage.prepare(Batch(vis, ir, ir_saliency=ir_saliency), (0, number))
        with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32"):
            terms = stage.losses(given)
        losses.append({name: value.item() for name, value in terms.items()})
        fused = to_uint8(fuse_arrays(model, pair.vis, pair.ir, skip, precision=precision))
        scores = score(*(image.astype(np.float32) for image in (fused, pair.ir, pair.vis)))
        metrics.append({name: scores[name] for name in PAPER_TABLE})
    model.train(training)
    return Validation(_means(losses), _means(metrics))


@torch.inference_mode()
def draw_panel(model: Any, task: str, pairs: Sequence[HeldOut], precision: str = "float32") -> np.ndarray:
    """A row a pair: visible, infrared, what the system shows of its features, fused; grey levels, uint8 (H, W).

    Feature maps are the mean magnitude over channels, each stretched to the full range.
    """
    training = model.training
    model.eval()
    skip = model.default_skip(task, task)
    rows = []
    for pair in pairs[:PANEL_PAIRS]:
        shown = [pair.vis, pair.ir, *feature_maps(model, pair.vis, pair.ir).values()]
        shown.append(to_uint8(fuse_arrays(model, pair.vis, pair.ir, skip, precision=precision)))
        rows.append(side_by_side(shown))
    model.train(training)
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, _GAP), (0, width - row.shape[1])), constant_values=255) for row in rows]
    return np.concatenate(rows)


@torch.inference_mode()
def feature_maps(model: Any, vis: np.ndarray, ir: np.ndarray) -> dict[str, np.ndarray]:
    """What a system shows of its features of a pair, for a panel; nothing where it shows none.

    Args:
        model: the system, in evaluation mode.
        vis, ir: grey levels (H, W) in [0, 255].

    Returns:
        By name, such as "base vis", uint8 (H, W): the mean magnitude over channels, stretched to the full range.
    """
    if not hasattr(model, "features"):
        return {}
    device = next(model.parameters()).device
    with net.strips(CPU_PIECE_PIXELS if device.type == "cpu" else 0):
        maps = model.features(to_network(vis, device), to_network(ir, device))
    return {name: _stretched(value) for name, value in maps.items()}


def write_panel(path: Path, panel: np.ndarray) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", panel)[1].tobytes())


class Curves:
    """Curves for TensorBoard in a folder; does nothing where the package `tensorboard` is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            # What a run that was killed wrote beyond its last checkpoint is dropped.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, groups: Mapping[str, Any]) -> None:
        """Writes every number of nested dicts under its path, e.g. losses/gradient."""
        if self.writer is None:
            return
        for name, value in groups.items():
            if isinstance(value, Mapping):
                self.scalars(step, {f"{name}/{key}": inner for key, inner in value.items()})
            else:
                self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.add_image(name, image, step, dataformats="HW")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each column over the rows that have a number there; NaN where none has."""
    columns = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return {name: math.fsum(values) / len(values) if values else math.nan for name, values in columns.items()}


def _stretched(maps: Tensor) -> np.ndarray:
    magnitude = maps[0].float().abs().mean(dim=0)
    low, high = magnitude.min(), magnitude.max()
    return ((magnitude - low) / (high - low).clamp_min(1e-12) * 255).round().byte().cpu().numpy()


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one height in a row, with gaps of white: uint8 (H, W), or (H, W, 3) where one of them has colour."""
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    gap = np.full((images[0].shape[0], _GAP, *images[0].shape[2:]), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
