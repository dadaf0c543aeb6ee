"""Losses and stages of zoo/tsdm: golden values, other implementations, and a small loop.

Golden values: as in test_tsdm.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import formula_colour, formula_image, run_of
from utils.common import InputError
from utils.data.degradation import INFRARED, VISIBLE, degrade_pair, unsharp_mask
from utils.inference.checkpoint import read_file
from utils.training import loop, run_state
from utils.training.loop import Run
from zoo import Batch, Pass, Stage
from zoo.tsdm import Options, TSDMFusion
from zoo.tsdm.losses import (
    Content,
    charbonnier_loss,
    laplacian_loss,
    luma,
    relativistic_loss,
    ssim,
    with_luma,
)
from zoo.tsdm.networks import Student, Teacher

# --- Losses -------------------------------------------------------------------------------------------------


def teacher_terms(options: Options) -> dict[str, Tensor]:
    """The loss terms for a teacher that answers I(2) to IR = I(1) and VIS = I(0)."""
    model = TSDMFusion()
    model.teacher.forward = lambda ir, vis: formula_image(2)
    return model.stages(options, "ivf")[0].losses(Batch(formula_image(0), formula_image(1)))


def test_teacher_losses_equal_the_published_ones():
    terms = {name: value.item() for name, value in teacher_terms(Options(legacy=True)).items()}
    wanted = {
        "ssim_ir": 0.43483111, "ssim_vis": -0.24980420, "laplacian_ir": 0.00096357, "laplacian_vis": 0.00280497,
        "l1_ir": 0.18432899, "total": 0.24709252,
    }  # fmt: skip
    assert {name: terms[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    right = {name: value.item() for name, value in teacher_terms(Options()).items()}
    similar = (terms["ssim_ir"] + terms["ssim_vis"]) / 2
    assert right["total"] == pytest.approx(terms["total"] - 0.001 * similar + 0.001 * (1 - similar), abs=1e-7)


def test_teacher_loss_weights_are_options():
    terms = teacher_terms(Options(ssim_weight=2, laplacian_weight=3, l1_weight=5))
    wanted = 2 * (1 - (terms["ssim_ir"] + terms["ssim_vis"]) / 2)
    wanted += 3 * (terms["laplacian_ir"] + terms["laplacian_vis"]) + 5 * (terms["l1_ir"] + terms["l1_vis"])
    torch.testing.assert_close(terms["total"], wanted)


def test_ssim_of_inner_windows_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = formula_image(0), formula_image(1)
    arrays = [image[0, 0].double().numpy() for image in (a, b)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    assert ssim(a, b).item() == pytest.approx(metrics.structural_similarity(*arrays, **options), abs=1e-5)  # float32


def test_laplacian_equals_the_convolution():
    a, b = torch.rand(2, 2, 1, 7, 9, dtype=torch.float64).float()
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None]
    edges = [F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel) for x in (a, b)]
    torch.testing.assert_close(laplacian_loss(a, b), F.mse_loss(*edges), rtol=1e-5, atol=0)  # other order of sums


def test_colour_equals_kornia():
    colour = pytest.importorskip("kornia.color")
    image, y = torch.rand(2, 3, 5, 6), torch.rand(2, 1, 5, 6)
    ycbcr = colour.rgb_to_ycbcr(image)
    torch.testing.assert_close(luma(image), ycbcr[:, :1], rtol=0, atol=1e-6)
    # kornia clamps its result.
    wanted = colour.ycbcr_to_rgb(torch.cat([y, ycbcr[:, 1:]], dim=1))
    # The published inverse has rounded constants, as kornia had up to 0.8.
    torch.testing.assert_close(with_luma(image, y).clamp(0, 1), wanted, rtol=0, atol=3e-4)
    assert (with_luma(image, luma(image)) - image).abs().max() < 2.9e-4


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_relativistic_loss_equals_its_formula(label):
    real, fake = torch.randn(2, 5, 1)
    real_sees, fake_sees = (real - fake.mean()).sigmoid(), (fake - real.mean()).sigmoid()
    first = real_sees.log() if label else (1 - real_sees).log()
    second = (1 - fake_sees).log() if label else fake_sees.log()
    torch.testing.assert_close(relativistic_loss(real, fake, label), -(first.mean() + second.mean()))


def test_charbonnier_is_nearly_the_absolute_difference():
    a, b = torch.rand(2, 1, 3, 8, 8)
    assert charbonnier_loss(a, b).item() == pytest.approx(F.l1_loss(a, b).item(), abs=1e-3)
    assert charbonnier_loss(a, a).item() == pytest.approx(1e-3)


def vgg_weights(path, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """A file as torchvision publishes it, of a network with these widths."""
    state, before, number = {}, 3, 0
    for width in widths:
        if width:
            state[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) / (3 * before**0.5)
            state[f"features.{number}.bias"] = torch.randn(width)
        number, before = number + (2 if width else 1), width or before
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return state


def test_content_is_the_difference_of_vgg_features(tmp_path, monkeypatch):
    assert sum(2 if width else 1 for width in Content.WIDTHS) == 36  # ends with layer 35, a ReLU
    assert sum(map(bool, Content.WIDTHS)) == 16
    monkeypatch.setattr(Content, "WIDTHS", (4, 0, 5))
    state = vgg_weights(tmp_path / "vgg.pth", (4, 0, 5))
    content = Content(tmp_path / "vgg.pth")
    a, b = torch.rand(2, 1, 3, 8, 10, requires_grad=True)

    def features(x: Tensor) -> Tensor:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
        x = F.conv2d(x, state["features.0.weight"], state["features.0.bias"], padding=1).relu()
        return F.conv2d(F.max_pool2d(x, 2), state["features.3.weight"], state["features.3.bias"], padding=1).relu()

    loss = content(a, b)
    torch.testing.assert_close(loss, (features(a) - features(b)).abs().mean())
    loss.backward()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not VGG19"):
        Content(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        Content(tmp_path / "none.pth")


# --- Stages -------------------------------------------------------------------------------------------------


def colour_batch(size: int = 16, count: int = 2) -> Batch:
    vis = torch.cat([formula_colour(c, size, size) for c in range(count)])
    return Batch(vis, torch.cat([formula_image(c + 0.3, size, size) for c in range(count)]))


def student_run(model: TSDMFusion, stage: Stage, out: Path) -> Run:
    return run_of(model, stage, colour_batch().vis, out, learning_rate=1e-3, epoch_batches=4)


def step(run: Run, *batches: Batch) -> dict[str, float]:
    """A step for each batch -> the loss terms of the last."""
    losses = [run.losses_of(part) for part in run.stage.updates]
    for batch in batches:
        run.train_step(run.stage, losses, batch)
    return run.look()["losses"]


def small(seed: int = 0, **options) -> tuple[TSDMFusion, list[Stage]]:
    """A system in training with a student and a discriminator of a few weights, and its stages."""
    torch.manual_seed(seed)
    model = TSDMFusion()
    model.student = Student(channels=12, heads=2, groups=1, blocks=2, drop_path=0.5)
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.discriminator = nn.Sequential(*layers, nn.Linear(4, 1))
    model.teacher = Teacher(width=2)
    model.teacher_is_given.fill_(True)
    return model.train(), model.stages(Options(stage="student", content_weight=0, **options), "ivf")


def test_defaults_are_the_published_stages():
    (teacher,) = TSDMFusion().stages(Options(), "ivf")
    assert (teacher.epochs, list(teacher.networks), teacher.passes) == (50, ["teacher"], ())
    student, adversarial = TSDMFusion().stages(Options(stage="student"), "ivf")
    assert (student.epochs, adversarial.epochs) == (79, 71)
    assert [part.name for part in adversarial.updates] == ["discriminator", "student"]
    assert 5e-4 * adversarial.lr_scale["discriminator"] == pytest.approx(1e-4)
    assert set(TSDMFusion.recipes) == {"teacher", "student"}
    for name, recipe in TSDMFusion.recipes.items():
        assert recipe["stage"] == name


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="teacher, student"):
        Options(stage="both")
    with pytest.raises(InputError, match="with a name of"):
        Options(degrade_vis="blur=1")


def test_teacher_trains_on_the_luma_of_colour_images():
    (stage,) = TSDMFusion().stages(Options(), "ivf")
    batch = colour_batch()
    grey = batch._replace(vis=luma(batch.vis))
    torch.testing.assert_close(stage.losses(grey)["total"], stage.losses(batch)["total"])


def test_lesson_is_made_of_the_degradation_model_the_sharpened_pair_and_the_teacher():
    model, (student, _) = small()
    batch = colour_batch(24)
    lesson = student.prepare(batch, (3, 7))
    assert lesson.vis.shape == lesson.target.shape == (2, 3, 24, 24) and lesson.ir.shape == (2, 1, 24, 24)
    assert not lesson.target.requires_grad
    for number in range(2):
        vis, ir = batch.vis[number].permute(1, 2, 0).numpy(), batch.ir[number, 0].numpy()
        bad_vis, bad_ir = degrade_pair(vis, ir, (3, 7, number), VISIBLE, INFRARED)
        np.testing.assert_array_equal(lesson.vis[number].permute(1, 2, 0).numpy(), bad_vis)
        np.testing.assert_array_equal(lesson.ir[number, 0].numpy(), bad_ir)
        sharp_vis, sharp_ir = (torch.from_numpy(unsharp_mask(image)) for image in (vis, ir))
        sharp_vis, sharp_ir = sharp_vis.permute(2, 0, 1)[None], sharp_ir[None, None]
        with torch.no_grad():
            y = model.teacher(sharp_ir, luma(sharp_vis)).clamp(0, 1)
        wanted = with_luma(sharp_vis, y)[0]
        torch.testing.assert_close(lesson.target[number], wanted, rtol=0, atol=1e-6)  # a batch, and one image


def test_lessons_depend_on_the_seed_and_on_nothing_else():
    _, (student, _) = small()
    batch = colour_batch()
    first = student.prepare(batch, (0, 5, 0))
    torch.rand(3), np.random.rand(3)
    state = torch.get_rng_state()
    again = student.prepare(batch, (0, 5, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((0, 6, 0), (1, 5, 0), (0, 5, 1)):
        assert not torch.equal(student.prepare(batch, other).vis, first.vis)
    assert not torch.equal(first.ir[:1], student.prepare(Batch(batch.vis[:1], batch.ir[1:]), (0, 5, 0)).ir)


def test_grey_patches_are_taken_for_colour_images():
    _, (student, _) = small()
    batch = colour_batch()
    grey = luma(batch.vis)
    one, other = (student.prepare(Batch(vis, batch.ir), (0, 1)) for vis in (grey, grey.expand(-1, 3, -1, -1)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.testing.assert_close(one.target[:, 0], one.target[:, 2], rtol=0, atol=2e-4)  # rounded constants of YCbCr


def test_ranges_of_the_degradation_are_options():
    changes = (
        "contrast=1 noise_level=0 blur_sigma=0 jpeg_quality=100 second_jpeg_probability=0 anisotropic_probability=0"
    )
    nothing = changes + " brightness_probability=0"
    _, (student, _) = small(degrade_vis=nothing, degrade_ir=nothing)
    batch = colour_batch(32)
    lesson = student.prepare(batch, (0, 0))
    assert (lesson.ir - batch.ir).abs().max() < 4 / 255  # JPEG of quality 100
    assert (lesson.vis - batch.vis).abs().mean() < 4 / 255


def test_student_without_a_teacher_is_refused():
    model, (student, _) = small()
    model.teacher_is_given.fill_(False)
    with pytest.raises(InputError, match="--init"):
        student.prepare(colour_batch(), (0, 0))


def test_given_teacher_survives_a_checkpoint(tmp_path):
    model, _ = small()
    torch.save(model.state_dict(), tmp_path / "last.pt")
    other, (student, _) = small(seed=1)
    other.teacher_is_given.fill_(False)
    other.load_state_dict(read_file(tmp_path / "last.pt"))
    student.prepare(colour_batch(), (0, 0))


def test_teacher_given_to_a_student_in_training_does_not_become_what_is_saved(tmp_path):
    teaching = TSDMFusion()
    teaching.stages(Options(), "ivf")
    teaching.save(tmp_path / "teacher.pth")
    training = TSDMFusion()
    training.stages(Options(stage="student", content_weight=0), "ivf")
    training.load_published(tmp_path / "teacher.pth")
    assert training.teacher_is_given and training.acting == "student"
    training.save(tmp_path / "student.pth")
    assert "conv_first_ir.weight" in read_file(tmp_path / "student.pth")["state_dict"]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}


def test_passes_update_the_discriminator_then_the_student_and_nothing_else(tmp_path, monkeypatch):
    model, (_, adversarial) = small()
    run = student_run(model, adversarial, tmp_path)
    seen = []
    update = run.optimizer.step

    def observed() -> None:
        before = {name: state(network) for name, network in model.named_children()}
        update()
        seen.append({name for name, network in model.named_children() if changed(network, before[name])})

    monkeypatch.setattr(run.optimizer, "step", observed)
    values = step(run, colour_batch())
    assert seen == [{"discriminator"}, {"student"}]
    assert set(values) == {"discriminator total", "total", "charbonnier", "adversarial"}
    # As published the student's update moves the discriminator's running statistics too.
    assert model.discriminator[1].num_batches_tracked == 4


def test_first_stage_of_the_student_leaves_the_discriminator_alone(tmp_path):
    model, (student, _) = small()
    before = state(model.discriminator)
    step(student_run(model, student, tmp_path), colour_batch(size=12))  # no multiple of 8
    assert not changed(model.discriminator, before)


def test_adversarial_losses_are_the_published_ones_with_the_labels_of_a_generator():
    for legacy in (False, True):
        model, (_, adversarial) = small(legacy=legacy)
        lesson = adversarial.prepare(colour_batch(), (0, 0))
        model.eval()  # no dropped path
        fused = model.padded_student(lesson.vis, lesson.ir, extra_window=False)
        real, fake = model.discriminator(lesson.target), model.discriminator(fused)
        label = 1.0 if legacy else 0.0
        first, second = real - fake.mean(), fake - real.mean()
        bce = F.binary_cross_entropy_with_logits
        labelled = [bce(x, torch.full_like(x, y)) for x, y in ((first, label), (second, 1 - label))]
        terms = adversarial.losses(lesson)
        torch.testing.assert_close(terms["adversarial"], sum(labelled) / 2)
        torch.testing.assert_close(terms["total"], 10 * terms["charbonnier"] + 0.005 * terms["adversarial"])
        # The discriminator's own loss: targets are real, the student's images are not.
        wanted = bce(first, torch.ones_like(first)) + bce(second, torch.zeros_like(second))
        torch.testing.assert_close(adversarial.passes[0].losses(lesson)["total"], wanted)


def test_published_targets_are_not_clamped():
    model, (student, _) = small()
    with torch.no_grad():
        model.teacher.decoder[-1].weight.mul_(1e6)
    batch = colour_batch()
    legacy = small(legacy=True)
    legacy[0].teacher.load_state_dict(model.teacher.state_dict())
    clamped, free = (luma(stages[0].prepare(batch, (0, 0)).target) for stages in ((student,), legacy[1]))
    assert clamped.min() > -1e-3 and clamped.max() < 1 + 1e-3 and free.abs().max() > 2


def test_content_loss_is_a_term_where_its_weights_are_there(tmp_path, monkeypatch, capsys):
    model, _ = small()
    model.stages(Options(stage="student"), "ivf")
    assert "--vgg-weights" in capsys.readouterr().err
    monkeypatch.setattr(Content, "WIDTHS", (4, 0, 5))
    vgg_weights(tmp_path / "vgg.pth", (4, 0, 5))
    options = Options(stage="student", vgg_weights=str(tmp_path / "vgg.pth"), content_weight=3)
    adversarial = model.stages(options, "ivf")[1]
    assert not capsys.readouterr().err
    terms = adversarial.losses(adversarial.prepare(colour_batch(), (0, 0)))
    wanted = 10 * terms["charbonnier"] + 0.005 * terms["adversarial"] + 3 * terms["content"]
    torch.testing.assert_close(terms["total"], wanted)
    terms["total"].backward()
    assert not any("features" in key or "content" in key for key in model.state_dict())


def adversarial_run(out: Path) -> Run:
    model, (_, adversarial) = small()
    torch.manual_seed(11)  # of dropped paths
    return student_run(model, adversarial, out)


def test_resumed_adversarial_run_repeats_the_straight_one_bit_for_bit(tmp_path):
    batches = [colour_batch(16), colour_batch(24), colour_batch(16, count=3), colour_batch(16)]
    straight, stopped = adversarial_run(tmp_path), adversarial_run(tmp_path)
    step(straight, *batches)
    torch.manual_seed(11)
    step(stopped, *batches[:2])
    run_state.save_state(stopped)
    resumed = adversarial_run(tmp_path)
    run_state.resume(resumed, "auto")
    step(resumed, *batches[2:])
    assert not changed(resumed.model, state(straight.model))


@pytest.mark.filterwarnings("ignore:Grad strides")  # of channels-last convolutions: about speed alone
def test_distributed_passes_find_no_unused_parameter_and_equal_one_process(tmp_path, monkeypatch):
    alone = adversarial_run(tmp_path)
    step(alone, *[colour_batch()] * 3)
    together = adversarial_run(tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    monkeypatch.setattr(loop, "ranks", lambda: 2)  # which wraps the losses
    try:
        step(together, *[colour_batch()] * 3)  # a parameter without gradient is an error of the second step
    finally:
        dist.destroy_process_group()
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(together.model.state_dict()[key], value, rtol=0, atol=1e-6)  # other order of sums


@pytest.mark.parametrize("size", [TSDMFusion.smallest_patch, 43])
def test_validation_pair_has_losses_in_every_stage(size):
    model, stages = small()
    for stage in [*stages, *model.stages(Options(), "ivf")]:
        with torch.inference_mode():
            terms = stage.losses(stage.prepare(colour_batch(size, count=1), (0, 0)))
        assert all(value.isfinite() for value in terms.values())


# --- The extension of Stage, for any system -----------------------------------------------------------------


def test_stage_without_passes_is_one_update_over_all_its_networks():
    network = nn.Linear(1, 1)
    stage = Stage("a", 1, {"n": network}, lambda batch: {"total": batch.vis.sum()})
    (part,) = stage.updates
    assert (part.name, part.networks, part.losses) == ("a", {"n": network}, stage.losses)
    batch = colour_batch()
    assert stage.prepare(batch, (0,)) is batch and stage.lr_scale == {}


def test_passes_that_are_no_partition_of_the_networks_are_refused():
    one, two = {"one": nn.Linear(1, 1)}, {"two": nn.Linear(1, 1)}

    def losses(batch: Batch) -> dict[str, Tensor]:
        return {}

    for passes in ((Pass("a", one, losses),), (Pass("a", one, losses), Pass("b", {**one, **two}, losses))):
        with pytest.raises(ValueError, match="each of"):
            Stage("s", 1, {**one, **two}, losses, passes=passes)
    with pytest.raises(ValueError, match="lr_scale"):
        Stage("s", 1, one, losses, lr_scale={"two": 0.5})
