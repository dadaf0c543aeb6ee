"""zoo/tsdm against the golden numbers, its files, and the scripts.

Golden values: made with the published networks (torch 2.0.1 and 2.13, pytorch-msssim 0.2.1) for the weights and
images of tests/conftest.py; the tolerance 1e-5 covers the differences between those versions.
"""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import formula_colour, formula_image, set_formula_weights
from zoo.tsdm import TSDMFusion
from zoo.tsdm.losses import (
    luma,
    with_luma,
)
from zoo.tsdm.networks import Discriminator, Student, Teacher, relative_positions, seam_masks


def formula_network(kind: type[nn.Module]) -> nn.Module:
    network = kind()
    set_formula_weights(network)
    if kind is Teacher:  # the golden numbers have weights of twice the amplitude
        for value in network.state_dict().values():
            value.mul_(2)
    return network.eval()


@pytest.fixture(scope="module")
def model() -> TSDMFusion:
    torch.manual_seed(0)
    model = TSDMFusion()
    model.teacher, model.student = formula_network(Teacher), formula_network(Student)
    model.teacher_is_given.fill_(True)
    return model.eval()


def assert_golden(x: Tensor, wanted: tuple[float, ...]) -> None:
    got = x.mean(), x.std(), x[0, 0, 0, 0], x[0, 0, x.shape[2] // 2, x.shape[3] // 3], x[0, -1, -1, -1]
    assert [value.item() for value in got] == pytest.approx(wanted, abs=1e-5)


# --- Networks -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_teacher_equals_the_published_one(model):
    fused = model.teacher(formula_image(1), formula_image(0))
    assert_golden(fused, (-0.13101851, 0.27789169, 0.2467329, -0.2746295, -0.3373466))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((40, 56), (0.05170948, 0.39757287, -0.2472531, 0.2200395, -0.1414157)),
        ((128, 256), (0.06807053, 0.40112797, -0.2472528, -0.0413340, -0.1932926)),
    ],
)
@torch.no_grad()
def test_student_equals_the_published_one(model, size, wanted):
    vis = formula_colour(0.5, *size)
    if size == (40, 56):
        assert (vis.mean().item(), vis[0, 0, 0, 0].item()) == pytest.approx((0.49983982, 0.8198564), abs=1e-7)
    assert_golden(model.student(formula_image(1, *size), vis), wanted)


@torch.no_grad()
def test_discriminator_equals_the_published_one():
    logit = formula_network(Discriminator)(formula_colour(0.5, 128, 256))
    assert logit.shape == (1, 1) and logit.item() == pytest.approx(0.12532428, abs=1e-5)


def published_student_keys() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published student in their order, as the specification lists them."""
    keys: dict[str, tuple[int, ...]] = {}
    for name, channels in (("conv_first_ir", 1), ("conv_first_vi", 3)):
        keys |= {f"{name}.weight": (48, channels, 1, 1), f"{name}.bias": (48,)}
    keys |= {"conv_first.weight": (48, 48, 3, 3), "conv_first.bias": (48,)}
    keys |= {"patch_embed.norm.weight": (48,), "patch_embed.norm.bias": (48,)}
    for i in range(4):
        for j in range(6):
            block = f"layers.{i}.residual_group.blocks.{j}."
            if j % 2:
                keys[block + "attn_mask"] = (512, 64, 64)
            keys |= {block + "norm1.weight": (48,), block + "norm1.bias": (48,)}
            keys |= {block + "attn.relative_position_bias_table": (225, 6)}
            keys |= {block + "attn.relative_position_index": (64, 64)}
            keys |= {block + "attn.qkv.weight": (144, 48), block + "attn.qkv.bias": (144,)}
            keys |= {block + "attn.proj.weight": (48, 48), block + "attn.proj.bias": (48,)}
            keys |= {block + "norm2.weight": (48,), block + "norm2.bias": (48,)}
            keys |= {block + "mlp.fc1.weight": (96, 48), block + "mlp.fc1.bias": (96,)}
            keys |= {block + "mlp.fc2.weight": (48, 96), block + "mlp.fc2.bias": (48,)}
        keys |= {f"layers.{i}.conv.weight": (48, 48, 3, 3), f"layers.{i}.conv.bias": (48,)}
    keys |= {"norm.weight": (48,), "norm.bias": (48,)}
    keys |= {"conv_after_body.weight": (48, 48, 3, 3), "conv_after_body.bias": (48,)}
    keys |= {"conv_last.0.weight": (48, 48, 3, 3), "conv_last.0.bias": (48,)}
    return keys | {"conv_last.1.weight": (3, 48, 3, 3), "conv_last.1.bias": (3,)}


def published_teacher_keys() -> dict[str, tuple[int, ...]]:
    encoder = ((32, 1), (64, 32), (128, 64), (256, 128))
    decoder = ((256, 512), (128, 256), (64, 128), (32, 64), (1, 32))
    keys = {}
    for name, shapes in (("encoder_a", encoder), ("encoder_b", encoder), ("decoder", decoder)):
        keys |= {f"{name}.{2 * i}.weight": (*shape, 3, 3) for i, shape in enumerate(shapes)}
    return keys


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def test_checkpoint_keys_and_shapes_never_drift():
    wanted = published_student_keys()
    assert len(wanted) == 372
    without = {key: shape for key, shape in wanted.items() if not key.endswith(Student.computed)}
    student = shapes_of(Student())
    assert student == without and list(student) == list(without) and len(student) == 336
    teacher = shapes_of(Teacher())
    assert teacher == published_teacher_keys() and list(teacher) == list(published_teacher_keys())
    discriminator = shapes_of(Discriminator())
    assert len(discriminator) == 72
    convolutions, norms = range(2, 33, 3), range(3, 34, 3)
    assert [key for key in discriminator if key.endswith("weight")] == [
        "features.0.weight",
        *(f"features.{i}.weight" for both in zip(convolutions, norms, strict=True) for i in both),
        "classifier.0.weight",
        "classifier.2.weight",
    ]
    assert discriminator["classifier.0.weight"] == (100, 4096)


def published_mask(height: int, width: int) -> Tensor:
    """Masks of all windows by the rule of the specification: labels of nine regions, compared within windows."""
    band = [[int(i >= side - 8) + int(i >= side - 4) for i in range(side)] for side in (height, width)]
    labels = 3 * torch.tensor(band[0])[:, None] + torch.tensor(band[1])
    windows = labels.view(height // 8, 8, width // 8, 8).permute(0, 2, 1, 3).reshape(-1, 64)
    return (windows[:, :, None] != windows[:, None]) * -100.0


@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_window_attention_equals_its_formula(model, shifted):
    attention = copy.deepcopy(model.student.layers[0].residual_group.blocks[1].attn).double()
    torch.manual_seed(0)
    x = torch.randn(2, 16, 24, 48, dtype=torch.float64)
    got = attention(x, relative_positions(), seam_masks().double() if shifted else None)
    windows = x.view(2, 2, 8, 3, 8, 48).permute(0, 1, 3, 2, 4, 5).reshape(2, 6, 64, 48)
    q, k, v = attention.qkv(windows).view(2, 6, 64, 3, 6, 8).permute(3, 0, 1, 4, 2, 5)
    logits = 8**-0.5 * q @ k.transpose(-1, -2)
    logits += attention.relative_position_bias_table[relative_positions()].permute(2, 0, 1)
    if shifted:
        logits += published_mask(16, 24)[:, None]
    mixed = attention.proj((logits.softmax(-1) @ v).transpose(2, 3).reshape(2, 6, 64, 48))
    wanted = mixed.view(2, 2, 3, 8, 8, 48).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_every_parameter_that_is_trained_gets_a_gradient():
    student = Student()
    student(torch.rand(1, 1, 8, 16), torch.rand(1, 3, 8, 16)).square().sum().backward()
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert without == {"conv_first.weight", "conv_first.bias"}


@torch.no_grad()
def test_dropped_paths_keep_the_mean_and_leave_evaluation_alone(model):
    block = copy.deepcopy(model.student.layers[3].residual_group.blocks[5])
    block.drop = 0.5
    x = torch.ones(4000, 1, 1, 2)
    torch.manual_seed(0)
    dropped = block.train().dropped(x)
    assert set(dropped.unique().tolist()) == {0, 2} and torch.equal(dropped[..., 0], dropped[..., 1])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)  # 4000 draws
    assert torch.equal(block.eval().dropped(x), x)


# --- Fusing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 41), (47, 48), (1, 1), (3, 17), (8, 8)])
@torch.no_grad()
def test_padding_is_the_published_one_and_the_least_in_training(model, size):
    vis, ir = formula_colour(0.5, *size), formula_image(1, *size)
    for extra_window, padded in ((True, lambda n: (n // 8 + 1) * 8), (False, lambda n: -(-n // 8) * 8)):
        bottom, right = (padded(side) - side for side in size)
        pad = {"pad": (0, right, 0, bottom), "mode": "replicate"}
        wanted = model.student(F.pad(ir, **pad), F.pad(vis, **pad))[..., : size[0], : size[1]]
        fused = model.padded_student(vis, ir, extra_window)
        assert fused.shape == vis.shape
        torch.testing.assert_close(fused, wanted, rtol=0, atol=1e-6)
    wanted = model.padded_student(vis, ir).clamp(0, 1)
    torch.testing.assert_close(model.fuse(vis, ir), wanted, rtol=0, atol=0)


@torch.no_grad()
def test_grey_visible_image_is_three_channels_and_its_result_grey(model):
    vis, ir = formula_image(0, 13, 20), formula_image(1, 13, 20)
    fused = model.fuse(vis, ir)
    assert fused.shape == vis.shape
    torch.testing.assert_close(fused, luma(model.fuse(vis.expand(-1, 3, -1, -1), ir)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_teacher_fuses_where_it_was_loaded(model):
    teaching = copy.copy(model)
    teaching.loaded = "teacher"
    vis, ir = formula_colour(0.5, 9, 13), formula_image(1, 9, 13)
    y = teaching.teacher(ir, luma(vis)).clamp(0, 1)
    torch.testing.assert_close(teaching.fuse(luma(vis), ir), y, rtol=0, atol=0)
    fused = teaching.fuse(vis, ir)
    torch.testing.assert_close(fused, with_luma(vis, y).clamp(0, 1), rtol=0, atol=0)


def test_bad_sources_and_skips_are_refused(model):
    vis, ir = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    for bad in ((vis, ir[..., :7]), (vis[:, :2], ir), (vis, vis), (vis[0], ir[0]), (vis[:0], ir[:0])):
        with pytest.raises(ValueError, match="sources must be"):
            model.fuse(*bad)
    with pytest.raises(ValueError, match="skip must be none"):
        model.fuse(vis, ir, "vis")
    with pytest.raises(ValueError, match="multiples of 8"):
        model.student(torch.zeros(1, 1, 8, 9), torch.zeros(1, 3, 8, 9))


@torch.no_grad()
def test_bfloat16_stays_near_float32(model):
    vis, ir = formula_colour(0.5, 24, 32), formula_image(1, 24, 32)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.fuse(vis, ir)
    assert autocast.dtype == torch.float32
    assert (autocast - model.fuse(vis, ir)).abs().mean() < 1 / 255  # bfloat16 keeps 8 bits, 24 blocks deep


# --- Files --------------------------------------------------------------------------------------------------


def save_published(path, network: nn.Module, module: str, name: str, monkeypatch, extra: dict | None = None) -> None:
    """A file in the published format: the pickled module, of a class that is gone when the file is read."""
    kind = type(name, (type(network),), {"__module__": module})
    there = types.ModuleType(module)
    setattr(there, name, kind)
    pickled = copy.deepcopy(network)
    pickled.__class__ = kind
    with monkeypatch.context() as context:
        context.setitem(sys.modules, module.partition(".")[0], types.ModuleType("Model"))
        context.setitem(sys.modules, module, there)
        torch.save({"model": pickled, "state_dict": {**network.state_dict(), **(extra or {})}}, path)


def test_published_teacher_loads_and_fuses(model, tmp_path, monkeypatch):
    save_published(tmp_path / "teacher.pth", model.teacher, "Model.TeacherNet", "Teacher", monkeypatch)
    other = TSDMFusion().eval()
    assert other.acting == "student"
    assert other.load_published(tmp_path / "teacher.pth") == {}
    assert other.acting == "teacher" and other.teacher_is_given
    for key, value in model.teacher.state_dict().items():
        assert torch.equal(other.teacher.state_dict()[key], value)


@pytest.mark.parametrize("masks", [True, False])
def test_published_student_loads_with_and_without_its_masks(model, tmp_path, monkeypatch, masks):
    computed = [key for key in published_student_keys() if key.endswith(Student.computed)]
    extra = {key: torch.zeros(2) for key in computed} if masks else {}  # not 101 MB
    save_published(tmp_path / "GT.pth", model.student, "Model.StudentNet", "SwinIR", monkeypatch, extra)
    other = TSDMFusion().eval()
    other.load_published(tmp_path / "GT.pth")
    assert other.acting == "student" and not other.teacher_is_given
    vis, ir = formula_colour(0.5, 9, 13), formula_image(1, 9, 13)
    with torch.no_grad():
        torch.testing.assert_close(other.fuse(vis, ir), model.fuse(vis, ir), rtol=0, atol=0)


def test_student_file_is_small_and_code_of_others_can_read_it(model, tmp_path):
    model.save(tmp_path / "student.pth", {"task": "ivf"})
    assert (tmp_path / "student.pth").stat().st_size < 2_800_000  # 634 707 numbers of 4 bytes, and their names
    content = torch.load(tmp_path / "student.pth", weights_only=True)
    assert content["about"] == {"task": "ivf"}
    Student().load_state_dict(content["state_dict"])
    other = TSDMFusion()
    assert other.load_published(tmp_path / "student.pth") == {"task": "ivf"}
    model.save(tmp_path / "half.pth", half=True)
    assert (tmp_path / "half.pth").stat().st_size < 1_600_000
    assert other.load_published(tmp_path / "half.pth") == {}


def test_student_with_gradient_equals_the_student_without():
    torch.manual_seed(0)
    student = Student().eval()
    ir, vis = formula_image(1, 24, 32), formula_colour(0.5, 24, 32)
    with torch.inference_mode():
        wanted = student(ir, vis)
    torch.testing.assert_close(student(ir, vis).detach(), wanted, rtol=0, atol=1e-5)
