"""Apple's GPUs have no float64. None of ours can be tried here, so a mode of torch refuses that type instead."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import tiles
from utils.data.patches import PatchDataset
from utils.inference.fusing import min_max_normalise
from utils.training.loop import Run
from utils.training.monitor import validate
from utils.training.options import Options
from zoo import SYSTEMS, find_system


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, given=(), options=None):
        found = function(*given, **(options or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} makes a tensor of {value.dtype}")
        return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_fusing_in_tiles_needs_no_float64(name, monkeypatch):
    monkeypatch.setattr(tiles, "dtype_of_sums", lambda device: torch.float32)  # as on such a GPU
    system = find_system(name)
    model = system().eval()
    vis, ir = torch.rand(1, 3 if system.takes_colour else 1, 40, 48), torch.rand(1, 1, 40, 48)
    with torch.inference_mode(), NoFloat64():
        min_max_normalise(model.fuse(vis, ir, "none"))
        if hasattr(model, "fuse_tiled"):  # all but TSDM-Fusion
            model.fuse_tiled(vis, ir, "none", tiles.Tiles(600))


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in SYSTEMS), ("tsdm", {"stage": "student"})])
def test_training_and_validation_need_no_float64(name, options, patch_file, tmp_path):
    system = find_system(name)
    model = system()
    if options:
        model.teacher_is_given.fill_(True)
    stages = [dataclasses.replace(stage, epochs=1) for stage in model.stages(system.Options(**options), "ivf")]
    dataset = PatchDataset(patch_file, colour=system.takes_colour)
    dataset.ir_saliency = dataset.ir  # which MLFuse asks for
    loop = Options(batch_size=4, epoch_batches=1, ema=0.5, flips=True, optimizer="muon")
    run = Run(model, stages, loop, dataset, {}, {}, tmp_path, "w.pth")
    with NoFloat64():
        while run.epoch < run.epochs:
            stage = run.stage
            for _ in run.train_epoch():
                pass
            validate(model, stage, "ivf", dataset.validation, "float32")
