"""MLFuse against its golden numbers, a second implementation, and its reference table on real images.

Golden values: the specification of the system, made with the published network and its published checkpoint (torch
1.8.1, 2.0.1 and 2.13), for the images of tests/conftest.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import test_MIF
from tests.conftest import formula_image, set_formula_weights
from utils.data.images import read_grey
from utils.inference.checkpoint import read_file
from utils.training.losses import ssim_map
from zoo import Batch
from zoo.mlfuse import MLFuse, MLFuseSystem, Options

# mean, standard deviation, [0,0,0,0], [0,0,20,18], last value
PUBLISHED = {
    "fused": (0.53868730, 0.22268830, 0.6912915, 0.2381333, 0.4840931),
    "edge": (-0.36294690, 0.13539208, -0.6625872, -0.3438237, -0.6750330),
    "cross": (0.50581684, 0.19528156, 0.6299109, 0.2863845, 0.5546038),
    "attention": (0.53637338, 0.22350244, 0.8310613, 0.2795340, 0.6082495),
}
FORMULA = {  # the first three of them
    "fused": (0.06174545, 0.02793361, 0.0757581),
    "edge": (0.11016709, 0.00597750, 0.0830959),
    "cross": (0.25330949, 0.04919778, -0.0929549),
    "attention": (0.25876664, 0.05378078, 0.4277856),
}
LOSSES = {
    "edge": 0.18658938, "attention": 0.02151258, "cross": 0.02567152, "fusion": 0.01706195, "total": 0.15041226,
}  # fmt: skip
TABLE = {  # (img1, img2) -> means over the 21 pairs
    ("mrict", "ct"): {
        "EN": 4.61361, "SD": 66.07504, "SF": 27.77485, "AG": 5.96228, "MI": 2.27220, "MSE": 3154.66689, "CC": 0.80682,
        "PSNR": 13.21139, "SCD": 1.06179, "VIF": 0.51636, "Qabf": 0.52628, "SSIM": 0.49809,
    },
    ("ct", "mrict"): {
        "EN": 4.69596, "SD": 65.34340, "SF": 26.02131, "AG": 5.74760, "MI": 2.24602, "MSE": 2629.78475, "CC": 0.81103,
        "PSNR": 13.98025, "SCD": 1.05769, "VIF": 0.48880, "Qabf": 0.48957, "SSIM": 0.49376,
    },
}  # fmt: skip
SUM_OF_IMAGE_0 = {("mrict", "ct"): 5_307_949, ("ct", "mrict"): 5_231_932}


def values(x: torch.Tensor) -> list[float]:
    return [v.item() for v in (x.mean(), x.std(), x[0, 0, 0, 0], x[0, 0, 20, 18], x[0, -1, -1, -1])]


@pytest.fixture(scope="module")
def network() -> MLFuse:
    network = MLFuse().eval()
    set_formula_weights(network)
    return network


@pytest.fixture(scope="module")
def checkpoint(fusion_data) -> Path:
    return fusion_data / "mlfuse" / "model_fuse.pth"


@pytest.fixture(scope="module")
def published(checkpoint) -> MLFuseSystem:
    system = MLFuseSystem().eval()
    system.load_published(checkpoint)
    return system


def forward_written_out(state: dict[str, torch.Tensor], img1: torch.Tensor, img2: torch.Tensor) -> torch.Tensor:
    """The fused image by the operations of the specification in their order, whole images at once."""

    def conv(x, key, **how):
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **how)

    def conv_norm(x, conv_key, norm_key):
        mean, variance, gain, bias = (state[f"{norm_key}.{n}"] for n in
                                      ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
        return F.batch_norm(conv(x, conv_key, padding=1), mean, variance, gain, bias)

    def double_conv(x, key, conv_number=0):
        return F.relu(conv_norm(x, f"{key}.double_conv.{conv_number}", f"{key}.double_conv.{conv_number + 1}"))

    edge, salient = double_conv(img1, "inc_edg"), double_conv(img2, "inc_ssd")
    first, second = double_conv(img1, "inc_cmk_1"), double_conv(img2, "inc_cmk_2")

    shortcut = conv(edge, "edg_net.conv1")
    x = F.max_pool2d(conv(shortcut, "edg_net.conv2", stride=2), 7, 3)
    x = F.relu(conv(F.relu(conv(x, "edg_net.conv_max", padding=1)), "edg_net.conv3", padding=1))
    x = F.interpolate(conv(x, "edg_net.conv3_", padding=1), edge.shape[2:], mode="bilinear", align_corners=False)
    edge = torch.sigmoid(conv(x + conv(shortcut, "edg_net.conv_f"), "edg_net.conv4"))

    weights = F.softmax(conv(salient, "ssd_net.conv_q_right").flatten(2), dim=2)  # (B, 1, H * W)
    context = torch.matmul(conv(salient, "ssd_net.conv_v_right").flatten(2), weights.transpose(1, 2))
    by_channel = salient * torch.sigmoid(conv(context[..., None], "ssd_net.conv_up"))
    query = conv(salient, "ssd_net.conv_q_left").mean(dim=(2, 3))[:, None]  # (B, 1, 16)
    weights = F.softmax(torch.matmul(query, conv(salient, "ssd_net.conv_v_left").flatten(2)), dim=2)
    by_pixel = salient * torch.sigmoid(weights.unflatten(2, salient.shape[2:]))

    def block(x, number):
        key = f"cmk_net.fuse5_conv{number}"
        return F.prelu(conv_norm(x, f"{key}.0", f"{key}.1"), state[f"{key}.2.weight"])

    common = first * second
    cross = block(block(first + common, 1) + block(second + common, 2), 3)
    cross = block(cross + block((first - second).abs(), 4), 5)

    merged = double_conv(torch.cat([edge, cross, by_channel + by_pixel], dim=1), "layer")
    return torch.tanh(conv(double_conv(merged, "layer", 3), "outc.conv"))


def test_network_has_the_published_size(network):
    assert len(network.state_dict()) == 111
    assert sum(parameter.numel() for parameter in network.parameters()) == 111_817


def test_forward_equals_the_golden_numbers_for_the_formula_weights(network):
    with torch.no_grad():
        outputs = network(formula_image(0), formula_image(1))
    for name, wanted in FORMULA.items():
        assert values(getattr(outputs, name))[:3] == pytest.approx(wanted, abs=2e-6), name


def test_published_file_loads_key_for_key_and_gives_the_golden_numbers(published, checkpoint):
    state = read_file(checkpoint)["model"]
    assert list(state) == list(published.network.state_dict())  # the order as well
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in published.network.state_dict().items()}
    assert published.network.outc.conv.bias.item() == pytest.approx(-0.06633228, abs=1e-8)
    assert published.network.inc_edg.double_conv[1].num_batches_tracked.item() == 13_527
    with torch.no_grad():
        outputs = published.network(formula_image(0), formula_image(1))
    for name, wanted in PUBLISHED.items():
        assert values(getattr(outputs, name)) == pytest.approx(wanted, abs=2e-6), name


def test_losses_equal_the_golden_numbers(published):
    losses = published.stages(Options(), "ivf")[0].losses
    with torch.no_grad():
        terms = losses(Batch(formula_image(0), formula_image(1), ir_saliency=formula_image(2)))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(LOSSES, abs=1e-7)


@pytest.mark.parametrize("size", [(15, 15), (17, 64), (33, 20)])
def test_forward_equals_the_second_implementation(network, size):
    double = MLFuse().eval().double()
    double.load_state_dict(network.state_dict())
    images = formula_image(0, *size).double(), formula_image(1, *size).double()
    with torch.no_grad():
        wanted = forward_written_out(double.state_dict(), *images)
        torch.testing.assert_close(double(*images).fused, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(33, 22), (64, 16), (101, 15)])
@pytest.mark.parametrize("rows", [32, 46])
def test_tiles_of_any_height_give_the_result_of_the_whole_image(network, size, rows):
    double = MLFuse().eval().double()
    double.load_state_dict(network.state_dict())
    first = torch.cat([formula_image(0, *size), formula_image(2, *size)]).double()
    second = torch.cat([formula_image(1, *size), formula_image(3, *size)]).double()
    ranges = [(top, min(top + rows, size[0])) for top in range(0, size[0], rows)]
    with torch.no_grad():
        wanted = double(first, second)
        tiles = zip(*double.fused_rows(first, second, ranges), strict=True)
    for name, x, parts in zip(wanted._fields, wanted, tiles, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), x, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 14, 40), (1, 1, 40, 14), (1, 40, 40)])
def test_smaller_images_are_refused_by_name(network, shape):
    with pytest.raises(ValueError, match="at least 15"):
        network(torch.zeros(shape), torch.zeros(shape))


def test_attention_context_of_many_equal_pixels_is_exact(network):
    """A black background: torch's own softmax over 262 144 pixels is wrong by more than this in float32."""
    double = MLFuse().eval().double()
    double.load_state_dict(network.state_dict())
    image = torch.full((1, 1, 512, 512), 0.1)
    image[..., 200:300, 200:300] = 0.9
    ranges = [(0, 512)]
    with torch.no_grad():
        features = network.inc_ssd(image)
        got = network.ssd_net.gather(lambda top, bottom: features[:, :, top:bottom], ranges)
        exact = double.ssd_net.gather(lambda top, bottom: features[:, :, top:bottom].double(), ranges)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("order", TABLE)
def test_reference_table_on_the_published_pairs(checkpoint, fusion_data, tmp_path, capsys, order):
    code = test_MIF.main([
        "--system", "mlfuse", "--weights", str(checkpoint), "--data", str(fusion_data / "mlfuse/ct_mri_set"),
        "--stems", *order, "--legacy-rounding", "--out", str(tmp_path), "--device", "cpu",
    ])  # fmt: skip
    assert code == 0 and "21 pairs" in capsys.readouterr().out
    folder = tmp_path / "model_fuse" / "ct_mri_set"
    means = json.loads((folder / "metrics.json").read_text())["mean"]
    # The reference adds up 65 536 pixels in float32, with an error of 5e-5 that depends on the width of the machine's
    # registers, and truncation turns that into whole levels. Ours is the result of float64.
    assert means == pytest.approx(TABLE[order], rel=3e-5)
    first = read_grey(folder / "0.png")
    assert first.sum() == pytest.approx(SUM_OF_IMAGE_0[order], abs=300)
    row = {("mrict", "ct"): [53, 19, 81, 200, 223, 227], ("ct", "mrict"): [55, 18, 58, 198, 214, 214]}[order]
    assert first[128, 100:106].tolist() == row


def test_what_is_saved_has_the_published_form_and_comes_back(tmp_path):
    torch.manual_seed(0)
    system, other = MLFuseSystem(), MLFuseSystem()
    system.fuse(torch.rand(2, 1, 15, 15), torch.rand(2, 1, 15, 15))  # running statistics and counters move
    system.save(tmp_path / "w.pth", {"task": "mif", "epochs": 3})
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["epoch"] == 3 and list(content["model"]) == list(system.network.state_dict())
    MLFuse().load_state_dict(content["model"])  # as code written for the published file does
    assert other.load_published(tmp_path / "w.pth") == {"task": "mif", "epochs": 3}
    for a, b in zip(system.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_step_trains_everything_but_the_unused_convolution():
    torch.manual_seed(0)
    system = MLFuseSystem()
    stage = system.stages(Options(), "mif")[0]
    assert stage.epochs == 501 and stage.networks == {"network": system.network}
    vis, ir, saliency = torch.rand(3, 2, 1, 20, 24)
    terms = stage.losses(Batch(vis, ir, ir_saliency=saliency))
    assert set(terms) == set(LOSSES)
    terms["total"].backward()
    untrained = {name for name, p in system.network.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    # A convolution's bias before batch norm has no effect, so its gradient is rounding, if not 0.
    assert {name for name in untrained if not name.endswith("0.bias")} == {
        "edg_net.conv_dilation.weight", "edg_net.conv_dilation.bias",
    }  # fmt: skip
    norms = [m for m in system.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}  # each saw the batch once


def test_ssim_with_zero_borders_differs_from_reflected_ones_at_the_border_only():
    a, b = formula_image(0), formula_image(1)
    constant, reflected = ssim_map(a, b, borders="constant"), ssim_map(a, b)
    torch.testing.assert_close(constant[..., 5:-5, 5:-5], reflected[..., 5:-5, 5:-5], rtol=0, atol=1e-5)
    assert (constant - reflected).abs().max() > 0.01
    with pytest.raises(ValueError, match="reflect, constant"):
        ssim_map(a, b, borders="none")
