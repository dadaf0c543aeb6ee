"""zoo/tsdm against the golden numbers, its files, and its stages in a small loop.

Golden values: made with the published networks (torch 2.0.1 and 2.13, pytorch-msssim 0.2.1) for the weights and
images of tests/conftest.py; the tolerance 1e-5 covers the differences between those versions.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import test_IVF
import train
from tests.conftest import formula_colour, formula_image, set_formula_weights, write_pair
from utils import InputError
from utils.checkpoint import read_file
from utils.degradation import INFRARED, VISIBLE, degrade_pair, unsharp_mask
from utils.inference import fuse_arrays
from utils.patches import PatchWriter
from zoo import Batch, Pass, Stage, find_system
from zoo.tsdm import Lesson, Options, TSDMFusion
from zoo.tsdm.losses import (
    Content,
    charbonnier_loss,
    laplacian_loss,
    luma,
    relativistic_loss,
    ssim,
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


# ---------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------


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


def test_sizes_are_the_published_ones():
    sizes = {kind: sum(p.numel() for p in kind().parameters()) for kind in (Teacher, Student, Discriminator)}
    assert sizes == {Teacher: 2_341_728, Student: 634_707, Discriminator: 14_538_313}
    assert sum(p.numel() for p in Student().parameters() if not p.requires_grad) == 20_784


def test_fresh_weights_are_as_published():
    torch.manual_seed(0)
    student = Student()
    block = student.layers[1].residual_group.blocks[2]
    for weight in (block.attn.qkv.weight, block.mlp.fc1.weight, block.attn.relative_position_bias_table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.fc1.bias.abs().sum() == 0 and (block.norm1.weight == 1).all()
    drops = [b.drop for group in student.layers for b in group.residual_group.blocks]
    assert drops == pytest.approx(np.linspace(0, 0.1, 24), abs=1e-8)
    assert [b.shift for b in student.layers[3].residual_group.blocks] == [0, 4] * 3


def published_mask(height: int, width: int) -> Tensor:
    """Masks of all windows by the rule of the specification: labels of nine regions, compared within windows."""
    band = [[int(i >= side - 8) + int(i >= side - 4) for i in range(side)] for side in (height, width)]
    labels = 3 * torch.tensor(band[0])[:, None] + torch.tensor(band[1])
    windows = labels.view(height // 8, 8, width // 8, 8).permute(0, 2, 1, 3).reshape(-1, 64)
    return (windows[:, :, None] != windows[:, None]) * -100.0


@pytest.mark.parametrize("size", [(8, 8), (8, 24), (16, 8), (40, 56)])
def test_four_masks_are_those_of_all_windows(size):
    rows, columns = size[0] // 8, size[1] // 8
    masks = seam_masks()
    made = [masks[int(row == rows - 1), int(column == columns - 1)] for row in range(rows) for column in range(columns)]
    assert torch.equal(torch.stack(made), published_mask(*size))


def test_relative_positions_are_counted_from_one_pixel_to_the_other():
    positions = relative_positions()
    for p, r in ((0, 63), (63, 0), (9, 9), (17, 42)):
        assert positions[p, r] == (p // 8 - r // 8 + 7) * 15 + (p % 8 - r % 8 + 7)
    assert positions.unique().numel() == 225


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


@pytest.mark.parametrize("size", [(11, 11), (64, 64), (128, 256)])
@torch.no_grad()
def test_discriminator_takes_any_size(size):
    assert Discriminator()(torch.rand(2, 3, *size)).shape == (2, 1)


# ---------------------------------------------------------------------------------------------------------
# Fusing
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 41), (47, 48), (1, 1), (3, 17), (8, 8)])
@torch.no_grad()
def test_padding_is_the_published_one_or_the_least(model, size):
    vis, ir = formula_colour(0.5, *size), formula_image(1, *size)
    for rule, padded in (("published", lambda n: (n // 8 + 1) * 8), ("minimal", lambda n: -(-n // 8) * 8)):
        bottom, right = (padded(side) - side for side in size)
        pad = {"pad": (0, right, 0, bottom), "mode": "replicate"}
        wanted = model.student(F.pad(ir, **pad), F.pad(vis, **pad))[..., : size[0], : size[1]].clamp(0, 1)
        fused = model.fuse(vis, ir, rule)
        assert fused.shape == vis.shape
        torch.testing.assert_close(fused, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.fuse(vis, ir), model.fuse(vis, ir, "published"), rtol=0, atol=0)


@torch.no_grad()
def test_padding_changes_a_side_that_is_a_multiple_of_8(model):
    vis, ir = formula_colour(0.5, 16, 16), formula_image(1, 16, 16)
    assert not torch.equal(model.fuse(vis, ir, "published"), model.fuse(vis, ir, "minimal"))
    torch.testing.assert_close(model.fuse(vis, ir, "minimal"), model.student(ir, vis).clamp(0, 1), rtol=0, atol=0)


@torch.no_grad()
def test_grey_visible_image_is_three_channels_and_its_result_grey(model):
    vis, ir = formula_image(0, 13, 20), formula_image(1, 13, 20)
    fused = model.fuse(vis, ir)
    assert fused.shape == vis.shape
    torch.testing.assert_close(fused, luma(model.fuse(vis.expand(-1, 3, -1, -1), ir)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(model):
    vis = torch.cat([formula_colour(c, 12, 15) for c in (0.0, 1.0)])
    ir = torch.cat([formula_image(c, 12, 15) for c in (2.0, 3.0)])
    apart = torch.cat([model.fuse(vis[i : i + 1], ir[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model.fuse(vis, ir), apart, rtol=0, atol=2e-6)  # float32; sums are ordered differently


@torch.no_grad()
def test_teacher_fuses_where_it_was_loaded(model):
    teaching = copy.copy(model)
    teaching.loaded = "teacher"
    vis, ir = formula_colour(0.5, 9, 13), formula_image(1, 9, 13)
    y = teaching.teacher(ir, luma(vis)).clamp(0, 1)
    torch.testing.assert_close(teaching.fuse(luma(vis), ir), y, rtol=0, atol=0)
    fused = teaching.fuse(vis, ir)
    torch.testing.assert_close(fused, with_luma(vis, y).clamp(0, 1), rtol=0, atol=0)


def test_bad_sources_and_paddings_are_refused(model):
    vis, ir = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    for bad in ((vis, ir[..., :7]), (vis[:, :2], ir), (vis, vis), (vis[0], ir[0]), (vis[:0], ir[:0])):
        with pytest.raises(ValueError, match="sources must be"):
            model.fuse(*bad)
    with pytest.raises(ValueError, match="published, minimal"):
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


def test_two_arrays_are_fused_as_by_any_system(model):
    vis, ir = np.random.default_rng(0).uniform(0, 255, (2, 11, 17)).astype(np.float32)
    fused = fuse_arrays(model, vis, ir, model.default_skip("ivf", "ivf"))
    assert fused.shape == (11, 17) and fused.min() == 0 and fused.max() == 255
    assert find_system("tsdm") is TSDMFusion


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------


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


def test_file_of_another_system_is_refused(model, tmp_path):
    torch.save({"DIDF_Encoder": {"weight": torch.zeros(1)}}, tmp_path / "a.pth")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "b.pth")
    torch.save({"state_dict": {**model.student.state_dict(), "norm.weight": torch.zeros(64)}}, tmp_path / "c.pth")
    for name, message in (("a", "state_dict"), ("b", "336|13 keys are missing"), ("c", r"\(64,\) where \(48,\)")):
        with pytest.raises(InputError, match=message):
            TSDMFusion().load_published(tmp_path / f"{name}.pth")


# ---------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------


def colour_batch(size: int = 16, count: int = 2) -> Batch:
    vis = torch.cat([formula_colour(c, size, size) for c in range(count)])
    return Batch(vis, torch.cat([formula_image(c + 0.3, size, size) for c in range(count)]))


class StageLosses(nn.Module):
    """A pass as DistributedDataParallel wants it: a forward pass that ends in the losses, over its networks alone."""

    def __init__(self, part: Pass) -> None:
        super().__init__()
        self.networks, self.losses = nn.ModuleDict(part.networks), part.losses

    def forward(self, given: Batch | Lesson) -> dict[str, Tensor]:
        return self.losses(given)


class Loop:
    """What a training loop has to do with a stage, and no more."""

    def __init__(self, stage: Stage, rate: float = 1e-3, wrap: Callable[[nn.Module], nn.Module] = lambda x: x) -> None:
        self.stage, self.steps = stage, 0
        self.trained = {k: [p for p in n.parameters() if p.requires_grad] for k, n in stage.networks.items()}
        groups = [{"name": k, "params": p, "lr": rate * stage.rates.get(k, 1)} for k, p in self.trained.items()]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.losses = []
        for part in stage.updates:
            self.let_train(part)
            self.losses.append(wrap(StageLosses(part)))

    def let_train(self, part: Pass) -> None:
        for name, parameters in self.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name in part.networks)

    def step(self, batch: Batch) -> dict[str, float]:
        values = {}
        given = self.stage.prepare(batch, (0, self.steps, 0))
        for part, losses in zip(self.stage.updates, self.losses, strict=True):
            self.let_train(part)
            terms = losses(given)
            self.optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
            for name in part.networks:
                nn.utils.clip_grad_norm_(self.trained[name], 1.0)
            self.optimizer.step()
            values |= {f"{part.name} {name}": value.item() for name, value in terms.items()}
        self.steps += 1
        return values


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
    assert 5e-4 * adversarial.rates["discriminator"] == pytest.approx(1e-4)
    assert set(TSDMFusion.recipes) == {"teacher", "student"}
    for name, recipe in TSDMFusion.recipes.items():
        assert recipe["stage"] == name


def test_options_that_make_no_training_are_refused():
    with pytest.raises(InputError, match="no epoch"):
        Options(teacher_epochs=0)
    with pytest.raises(InputError, match="no epoch"):
        Options(stage="student", student_epochs=0, adversarial_epochs=0)
    with pytest.raises(InputError, match="teacher, student"):
        Options(stage="both")
    with pytest.raises(InputError, match="with a name of"):
        Options(degrade_vis="blur=1")


def test_teacher_trains_in_a_small_loop_with_colour_and_with_grey():
    torch.manual_seed(0)
    model = TSDMFusion()
    model.teacher = Teacher(width=4)
    loop = Loop(model.stages(Options(), "ivf")[0], rate=3e-3)
    losses = [loop.step(colour_batch())["teacher total"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    grey = Batch(luma(colour_batch().vis), colour_batch().ir)
    assert loop.step(grey)["teacher total"] == pytest.approx(losses[-1], rel=0.1)


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


def test_teacher_given_to_a_student_in_training_does_not_become_what_is_saved(model, tmp_path):
    teaching = copy.copy(model)
    teaching.loaded = "teacher"
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


def test_passes_update_the_discriminator_then_the_student_and_nothing_else():
    model, (_, adversarial) = small()
    loop = Loop(adversarial)
    seen = []
    update = loop.optimizer.step

    def step() -> None:
        before = {name: state(network) for name, network in model.named_children()}
        update()
        seen.append({name for name, network in model.named_children() if changed(network, before[name])})

    loop.optimizer.step = step
    start = state(model.teacher)
    values = loop.step(colour_batch())
    assert seen == [{"discriminator"}, {"student"}]
    assert not changed(model.teacher, start)
    assert set(values) == {"discriminator total", "student total", "student charbonnier", "student adversarial"}
    # As published the student's update moves the discriminator's running statistics too.
    assert model.discriminator[1].num_batches_tracked == 4


def test_first_stage_of_the_student_leaves_the_discriminator_alone():
    model, (student, _) = small()
    before = state(model.discriminator)
    loop = Loop(student)
    loop.step(colour_batch(size=12))  # no multiple of 8
    assert not changed(model.discriminator, before)


def test_adversarial_losses_are_the_published_ones_with_the_labels_of_a_generator():
    for legacy in (False, True):
        model, (_, adversarial) = small(legacy=legacy)
        lesson = adversarial.prepare(colour_batch(), (0, 0))
        model.eval()  # no dropped path
        fused = model.padded_student(lesson.vis, lesson.ir, "minimal")
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


def test_resumed_adversarial_run_repeats_the_straight_one_bit_for_bit(tmp_path):
    batches = [colour_batch(16), colour_batch(24), colour_batch(16, count=3), colour_batch(16)]

    def start() -> tuple[TSDMFusion, Loop]:
        model, (_, adversarial) = small()
        torch.manual_seed(11)  # of dropped paths
        return model, Loop(adversarial)

    straight, loop = start()
    for batch in batches:
        loop.step(batch)

    model, loop = start()
    for batch in batches[:2]:
        loop.step(batch)
    saved = {"model": model.state_dict(), "optimizer": loop.optimizer.state_dict(), "steps": loop.steps}
    torch.save({**saved, "random": torch.get_rng_state()}, tmp_path / "last.pt")
    resumed, loop = start()
    last = read_file(tmp_path / "last.pt")
    resumed.load_state_dict(last["model"])
    loop.optimizer.load_state_dict(last["optimizer"])
    loop.steps = last["steps"]
    torch.set_rng_state(last["random"])
    for batch in batches[2:]:
        loop.step(batch)
    assert not changed(resumed, state(straight))


@pytest.mark.filterwarnings("ignore:Grad strides")  # of channels-last convolutions: about speed alone
def test_distributed_passes_find_no_unused_parameter_and_equal_one_process(tmp_path):
    alone, (_, adversarial) = small()
    loop = Loop(adversarial)
    torch.manual_seed(5)
    for _ in range(3):
        loop.step(colour_batch())
    together, (_, adversarial) = small()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        loop = Loop(adversarial, wrap=DistributedDataParallel)
        torch.manual_seed(5)
        for _ in range(3):  # a parameter without gradient is an error of the second step
            loop.step(colour_batch())
    finally:
        dist.destroy_process_group()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, rtol=0, atol=1e-6)  # gradients in other memory


@pytest.mark.parametrize("size", [TSDMFusion.smallest_patch, 43])
def test_held_out_pair_has_losses_in_every_stage(size):
    model, stages = small()
    for stage in [*stages, *model.stages(Options(), "ivf")]:
        with torch.inference_mode():
            terms = stage.losses(stage.prepare(colour_batch(size, count=1), (0, 0)))
        assert all(value.isfinite() for value in terms.values())


# ---------------------------------------------------------------------------------------------------------
# The extension of Stage, for any system
# ---------------------------------------------------------------------------------------------------------


def test_stage_without_passes_is_one_update_over_all_its_networks():
    network = nn.Linear(1, 1)
    stage = Stage("a", 1, {"n": network}, lambda batch: {"total": batch.vis.sum()})
    (part,) = stage.updates
    assert (part.name, part.networks, part.losses) == ("a", {"n": network}, stage.losses)
    batch = colour_batch()
    assert stage.prepare(batch, (0,)) is batch and stage.rates == {}


def test_passes_that_are_no_partition_of_the_networks_are_refused():
    one, two = {"one": nn.Linear(1, 1)}, {"two": nn.Linear(1, 1)}

    def losses(batch: Batch) -> dict[str, Tensor]:
        return {}

    for passes in ((Pass("a", one, losses),), (Pass("a", one, losses), Pass("b", {**one, **two}, losses))):
        with pytest.raises(ValueError, match="each of"):
            Stage("s", 1, {**one, **two}, losses, passes=passes)
    with pytest.raises(ValueError, match="rates"):
        Stage("s", 1, one, losses, rates={"two": 0.5})


# ---------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------


def test_teacher_is_trained_by_the_script_and_both_networks_fuse_a_folder(model, tmp_path, capsys):
    y, x = np.mgrid[:16, :16]
    waves = 127 + 100 * np.sin(0.5 * x + 0.3 * y + np.arange(4)[:, None, None])
    with PatchWriter(tmp_path / "patches.h5", 16) as writer:
        writer.add(waves, 255 - waves)
    argv = ["--system", "tsdm", "--recipe", "teacher", "--data", tmp_path / "patches.h5", "--out", tmp_path / "run"]
    argv += ["--device", "cpu", "--batch-size", "2", "--teacher-epochs", "1"]
    assert train.main(list(map(str, argv))) == 0
    weights = tmp_path / "run" / "TSDM-Fusion_IVF.pth"
    about = TSDMFusion().load_published(weights)
    assert (about["system"], about["stage"], about["learning_rate"], about["steps"]) == ("tsdm", "teacher", 5e-4, 2)
    model.save(tmp_path / "student.pth", {"task": "ivf"})
    write_pair(tmp_path / "SET", ("vi", "ir"), "1.png", 1, size=(43, 51))
    capsys.readouterr()
    argv = ["--system", "tsdm", "--data", tmp_path / "SET", "--device", "cpu", "--out", tmp_path / "out", "--weights"]
    assert test_IVF.main(list(map(str, [*argv, weights, tmp_path / "student.pth"]))) == 0
    printed = capsys.readouterr().out
    assert printed.count("TSDM-Fusion    \t") == 2 and "decoder image: published" in printed
    assert test_IVF.main(list(map(str, [*argv, tmp_path / "student.pth", "--skip", "minimal"]))) == 0
    assert "decoder image: minimal" in capsys.readouterr().out
