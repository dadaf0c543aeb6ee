"""Every system learns one batch by heart, with its own losses, in each of its stages that is one update a step."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import formula_colour, formula_image, run_of
from utils.training.loop import PassLosses
from zoo import Batch, find_system

SIDE = 16
STEPS = 25


@pytest.mark.parametrize(
    ("name", "number", "options", "rate", "wanted"),
    [
        ("cddfuse", 0, {}, 2e-3, 0.5),
        ("cddfuse", 1, {}, 2e-3, 0.6),
        ("fsidfusion", 1, {}, 2e-3, 0.6),
        ("mlfuse", 0, {}, 2e-3, 0.7),
        ("tsdm", 0, {"stage": "teacher"}, 2e-3, 0.5),
        ("tsdm", 0, {"stage": "student"}, 3e-4, 0.6),
    ],
)
def test_one_batch_is_overfitted(name, number, options, rate, wanted, tmp_path):
    torch.manual_seed(0)
    system = find_system(name)
    model = system()
    vis = torch.cat([(formula_colour if system.takes_colour else formula_image)(c, SIDE, SIDE) for c in (0, 1)])
    ir = torch.cat([formula_image(c, SIDE, SIDE) for c in (2, 3)])
    stage = model.stages(system.Options(**options), "ivf")[number]
    if name == "tsdm":
        model.teacher_is_given.fill_(True)
    run = run_of(model, stage, vis, tmp_path, learning_rate=rate, clip_norm=1.0, batch_size=2)
    losses = []
    for _ in range(STEPS):
        run.step = 0  # one lesson: what a stage draws depends on the step
        run.train_step(stage, [PassLosses(stage.updates[0])], Batch(vis, ir, ir_saliency=ir))
        losses.append(run.look()["losses"]["total"])
    assert min(losses[-3:]) < wanted * losses[0], losses
