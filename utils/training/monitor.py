"""What a training shows of itself: lines, scores on validation pairs, panels to look at, curves for TensorBoard."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils.data.images import grey_of, one_below_another, side_by_side, to_uint8
from utils.data.patches import Batch, ValidationPair
from utils.data.saliency import visual_saliency
from utils.evaluation.scores import means
from utils.inference.fusing import autocast, feature_maps, fuse_arrays, to_network
from utils.metrics import PAPER_TABLE, score
from utils.training.stages import Stage

PANEL_PAIRS = 4


def log(text: str, *, error: bool = False) -> None:
    """Prints a line above the progress bar.

    Where nobody reads any more, as `tee` does not after Ctrl-C, that costs the text and not the run.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        # The descriptor, not the object: Python itself flushes at exit, and would fail then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Validation(NamedTuple):
    """What validation pairs show: means of the stage's loss terms and of the metrics of the table (protocol `paper`).

    The panel has a row for each of the first pairs, uint8 (H, W), or (H, W, 3) where the system takes colour and a pair
    has some: visible, infrared, features where the system shows them (see `feature_maps`), fused.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    panel: np.ndarray


@torch.inference_mode()
def validate(model: Any, stage: Stage, task: str, pairs: Sequence[ValidationPair], precision: str) -> Validation:
    """Losses and scores of a system in training on pairs that it does not train on; its mode is kept."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    skip = stage.skip or model.default_skip(task, task)
    losses, metrics, rows = [], [], []
    for number, pair in enumerate(pairs):
        images = (pair.vis, pair.ir, visual_saliency(pair.ir))
        vis, ir, ir_saliency = (to_network(image, device) for image in images)
        given = stage.prepare(Batch(vis, ir, ir_saliency=ir_saliency), (0, number))
        with autocast(device, precision):
            terms = stage.losses(given)
        losses.append({name: value.item() for name, value in terms.items()})
        levels = fuse_arrays(model, pair.vis, pair.ir, skip, normalise=model.normalised, precision=precision)
        fused = to_uint8(levels)
        scores = score(*(grey_of(image) for image in (fused, pair.ir, pair.vis)))
        metrics.append({name: scores[name] for name in PAPER_TABLE})
        if number < PANEL_PAIRS:
            features = feature_maps(model, grey_of(pair.vis), pair.ir)
            rows.append(side_by_side([pair.vis, pair.ir, *features.values(), fused]))
    model.train(training)
    return Validation(means(losses), means(metrics), one_below_another(rows))


def open_curves(folder: Path, step: int) -> Any:
    """A writer of curves for TensorBoard in a folder; None where the package `tensorboard` is not installed, or cannot
    open the folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:  # purge_step drops what a killed run wrote beyond its last checkpoint
        return SummaryWriter(str(folder), purge_step=step + 1)
    except UnicodeEncodeError:
        log(f"no curves: TensorBoard takes no path that is not UTF-8, such as {ascii(str(folder))}", error=True)
        return None


def add_scalars(curves: Any, step: int, groups: Mapping[str, Any]) -> None:
    """Writes every number of nested dicts under its path, e.g. losses/gradient."""
    for name, value in groups.items():
        if isinstance(value, Mapping):
            add_scalars(curves, step, {f"{name}/{key}": inner for key, inner in value.items()})
        else:
            curves.add_scalar(name, value, step)
