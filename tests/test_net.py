"""net.py against the golden numbers, and the properties that code elsewhere relies on.

Golden values: made with the published networks (torch 1.8.1, 2.0.1 and 2.13 agree to 1e-6) for the weights and
images of tests/conftest.py; the tolerance 1e-5 covers the differences between those versions.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import net
from tests import reference_net
from tests.conftest import formula_image, set_formula_weights
from utils.tiles import Tiles
from zoo.cddfuse import CDDFuseSystem

GOLDEN = Path(__file__).parent / "golden"

# mean, standard deviation, [0,0,0,0], [0,0,20,18], last value
FORWARD = {
    "vis shallow": (-0.06132977, 0.44103339, 0.5852739, 0.0413479, 0.5939462),
    "vis base": (-0.04525387, 0.45292479, 0.6311390, -0.1114483, 0.6896636),
    "vis detail": (-0.01745256, 0.22784471, -0.6118551, -0.4801396, -0.0786936),
    "base fusion": (-0.09853088, 0.86274588, 1.4211128, -0.2778832, 1.2249923),
    "detail fusion": (0.00426087, 0.33444622, -0.6161565, -0.2729299, -0.5602607),
    "reduced": (-0.00814381, 0.45351531, 0.2902169, -0.2527335, 0.8944853),
    "fused vis": (0.62515200, 0.05272718, 0.6731720, 0.5779430, 0.6571654),
    "fused sum": (0.72726676, 0.07741506, 0.8365713, 0.6230307, 0.7533972),
    "fused none": (0.50397551, 0.00773635, 0.5056415, 0.5007859, 0.4898489),
    "vis rebuilt": (0.61607950, 0.05251580, 0.6611563, 0.5755770, 0.6523598),
}


@pytest.fixture(scope="module")
def model() -> net.CDDFuse:
    model = net.CDDFuse()
    for part in model.published_networks.values():
        set_formula_weights(getattr(model, part))
    return model.eval()


@pytest.fixture(scope="module")
def outputs(model: net.CDDFuse) -> dict[str, torch.Tensor]:
    vis, ir = formula_image(0), formula_image(1)
    with torch.no_grad():
        vis_features, ir_features = model.encoder(vis), model.encoder(ir)
        base = model.base_fusion(vis_features.base + ir_features.base)
        detail = model.detail_fusion(vis_features.detail + ir_features.detail)
        return {
            "vis shallow": vis_features.shallow,
            "vis base": vis_features.base,
            "vis detail": vis_features.detail,
            "base fusion": base,
            "detail fusion": detail,
            "reduced": model.decoder(vis, base, detail)[1],
            **{f"fused {skip}": model.fuse(vis, ir, skip) for skip in net.SKIPS},
            "vis rebuilt": model.decoder(vis, *vis_features[:2])[0],
        }


def test_formula_weights_and_image_are_those_of_the_golden_numbers(model):
    state = model.encoder.state_dict()
    assert formula_image(0)[0, 0, 0, :3].tolist() == pytest.approx([0.7, 0.7221779, 0.7337679], abs=1e-7)
    weight = state["patch_embed.proj.weight"].flatten()
    assert weight[:3].tolist() == pytest.approx([0.09850673, 0.30127028, -0.19106710], abs=1e-7)
    assert weight[-1].item() == pytest.approx(-0.30957198, abs=1e-7)
    assert state["detailFeature.net.2.shffleconv.bias"][-1].item() == pytest.approx(-0.05346062, abs=1e-7)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_equals_the_published_networks(outputs, name):
    x = outputs[name]
    got = (x.mean(), x.std(), x[0, 0, 0, 0], x[0, 0, 20, 18], x[0, -1, -1, -1])
    assert [value.item() for value in got] == pytest.approx(FORWARD[name], abs=1e-5)


def test_checkpoint_keys_and_shapes_never_drift():
    # golden/cddfuse_keys.json: the key lists of the published format, from its specification.
    wanted = json.loads((GOLDEN / "cddfuse_keys.json").read_text())
    model = net.CDDFuse()
    got = {
        name: {key: list(value.shape) for key, value in getattr(model, part).state_dict().items()}
        for name, part in model.published_networks.items()
    }
    assert got == wanted
    assert [list(keys) for keys in got.values()] == [list(keys) for keys in wanted.values()]  # the order as well
    assert len(model.state_dict()) == 158
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_188_272
    assert not list(model.buffers())


def test_networks_are_called_as_code_for_the_published_file_calls_them():
    vis = torch.rand(1, 1, 9, 12)
    base, detail, shallow = net.Restormer_Encoder(
        inp_channels=1, out_channels=1, dim=64, num_blocks=[4, 4], heads=[8, 8, 8], ffn_expansion_factor=2,
        bias=False, LayerNorm_type="WithBias",
    )(vis)  # fmt: skip
    base = net.BaseFeatureExtraction(dim=64, num_heads=8, ffn_expansion_factor=1.0, qkv_bias=False)(base + base)
    detail = net.DetailFeatureExtraction(num_layers=1)(detail + detail)
    fused, reduced = net.Restormer_Decoder()(None, base, detail)
    assert fused.shape == (1, 1, 9, 12)
    assert shallow.shape == reduced.shape == (1, 64, 9, 12)


def test_arguments_that_no_published_network_uses_are_refused():
    with pytest.raises(ValueError, match="bias must be False"):
        net.Restormer_Decoder(bias=True)
    with pytest.raises(ValueError, match="'WithBias'"):
        net.Restormer_Encoder(LayerNorm_type="BiasFree")


@pytest.mark.parametrize("size", [(2, 2), (2, 7), (5, 3), (31, 40)])
def test_any_size_from_2x2_works(model, size):
    vis, ir = formula_image(0, *size), formula_image(1, *size)
    with torch.no_grad():
        fused = model.fuse(vis, ir)
    assert fused.shape == (1, 1, *size)
    assert fused.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 1, 8, 1), (1, 8, 8)])
def test_smaller_images_are_refused_by_name(model, shape):
    with pytest.raises(ValueError, match="at least 2"):
        model.encoder(torch.zeros(shape))


def test_sources_of_two_shapes_are_refused(model):
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\) and \(1, 1, 8, 9\)"):
        model.fuse(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))


def test_unknown_skip_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match="vis, sum, none"):
        model.fuse(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), skip="ir")


@pytest.mark.parametrize("skip", net.SKIPS)
def test_fused_image_is_that_of_the_network_written_out(model, skip):
    vis, ir = formula_image(0, 19, 23), formula_image(1, 19, 23)
    with torch.no_grad():
        wanted = reference_net.CDDFuse.like(model).fuse(vis, ir, skip)
        torch.testing.assert_close(model.fuse(vis, ir, skip), wanted, rtol=0, atol=2e-6)  # float32


def test_a_batch_equals_its_images_one_by_one(model):
    vis = torch.cat([formula_image(0), formula_image(2)])
    ir = torch.cat([formula_image(1), formula_image(3)])
    with torch.no_grad():
        together = model.fuse(vis, ir)
        apart = torch.cat([model.fuse(vis[i : i + 1], ir[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-6)  # float32; sums are ordered differently


def test_memory_layout_of_the_input_does_not_matter(model):
    vis, ir = formula_image(0), formula_image(1)
    strided = vis.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(model.fuse(strided, ir), model.fuse(vis, ir), rtol=0, atol=1e-6)


def test_attention_sums_added_up_over_halves_give_the_whole_matrix():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 64, 6, 10, dtype=torch.float64)
    temperature = torch.rand(8, 1, 1, dtype=torch.float64) + 0.5
    halves = [net.attention_sums(*half) for half in zip(q.split(4, dim=3), k.split(4, dim=3), strict=True)]
    products, squares = (sum(parts) for parts in zip(*halves, strict=True))
    whole = net.attention_matrix(*net.attention_sums(q, k), temperature)
    torch.testing.assert_close(net.attention_matrix(products, squares, temperature), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [net.RestormerAttention, net.BaseAttention])
def test_attention_equals_attention_written_out_with_the_same_gradient(kind):
    torch.manual_seed(0)
    attention = kind(16, 4).double()
    first, second, last, scale = {
        net.RestormerAttention: ("qkv", "qkv_dwconv", "project_out", "temperature"),
        net.BaseAttention: ("qkv1", "qkv2", "proj", "scale"),
    }[kind]
    getattr(attention, scale).data.uniform_(0.5, 1.5)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    qkv = getattr(attention, second)(getattr(attention, first)(x))
    attended = reference_net.channel_attention(qkv, getattr(attention, scale), 4)
    wanted, got = getattr(attention, last)(attended), attention(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(y.square().sum(), list(attention.parameters())) for y in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


CONVOLUTIONS = [name for name, part in net.CDDFuse().named_modules() if isinstance(part, torch.nn.Conv2d)]


@pytest.mark.parametrize("tiled", [False, True])
def test_every_convolution_is_called_and_may_be_replaced(model, tiled):
    """Hooks see each convolution, and one with a bias in its place counts, in tiles too."""
    vis, ir = formula_image(0, 9, 11), formula_image(1, 9, 11)
    hooked, called = copy.deepcopy(model), set()
    for name in CONVOLUTIONS:
        hooked.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        got = CDDFuseSystem.fuse_tiled(hooked, vis, ir, "vis", Tiles(60)) if tiled else hooked(vis, ir)
        torch.testing.assert_close(got, model(vis, ir), rtol=0, atol=1e-6)
    assert called == set(CONVOLUTIONS)


@pytest.mark.parametrize("name", [n for n in CONVOLUTIONS if n.startswith("base_fusion") or "level2.0" in n])
def test_a_convolution_with_a_bias_in_the_place_of_a_plain_one_counts(model, name):
    changed = copy.deepcopy(model).double()
    old = changed.get_submodule(name)
    new = torch.nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, padding=old.padding, groups=old.groups, bias=True
    )
    new.weight.data, new.bias.data = old.weight.data, torch.linspace(-1, 1, old.out_channels).double()
    changed.set_submodule(name, new)
    reference = reference_net.CDDFuse().double()
    reference.load_state_dict(model.state_dict())
    reference.set_submodule(name, new)
    vis, ir = (image.double() for image in (formula_image(0, 9, 11), formula_image(1, 9, 11)))
    with torch.no_grad():
        wanted = reference.fuse(vis, ir)
        assert (wanted - model.double()(vis, ir)).abs().max() > 1e-6
        model.float()
        torch.testing.assert_close(changed(vis, ir), wanted, rtol=0, atol=1e-9)
        tiled = CDDFuseSystem.fuse_tiled(changed, vis, ir, "vis", Tiles(60))
        torch.testing.assert_close(tiled, wanted, rtol=0, atol=1e-9)


def test_a_wrapped_system_is_called_as_the_system(model):
    vis, ir = formula_image(0, 9, 11), formula_image(1, 9, 11)
    with torch.no_grad():
        assert torch.nn.DataParallel(model)(vis, ir).equal(model.fuse(vis, ir))
        assert model(vis, ir, skip="none").equal(model.fuse(vis, ir, "none"))


@pytest.mark.parametrize("gradients", [True, False])
def test_pairs_of_channels_are_convolved_as_by_torch(gradients):
    torch.manual_seed(0)
    conv = net.PairConv2d(8).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = torch.conv2d(x, conv.weight, padding=1, groups=4)
    with torch.set_grad_enabled(gradients):
        got = conv(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    if gradients:
        found = (torch.autograd.grad(y.square().sum(), (x, conv.weight)) for y in (got, wanted))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("image", ["black", "half black", "white", "grey", "noise", "faint"])
def test_gradients_are_finite_and_those_of_the_published_form(image):
    torch.manual_seed(0)
    noise = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    half = torch.cat([torch.zeros(1, 1, 16, 8), noise[..., :8]], dim=3)
    vis = {
        "black": torch.zeros_like(noise), "half black": half, "white": torch.ones_like(noise),
        "grey": torch.full_like(noise, 0.3), "noise": noise, "faint": noise * 1e-10,
    }[image]  # fmt: skip
    model = net.CDDFuse().double()
    reference = reference_net.CDDFuse().double()
    reference.load_state_dict(model.state_dict())
    found = []
    for network in (model, reference):
        base, detail, _ = network.encoder(vis)
        total = base.square().sum() + detail.sum() + network.fuse(vis, noise.flip(3)).sum()
        found.append(torch.autograd.grad(total, list(network.parameters())))
    for got, wanted in zip(*found, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


def test_every_weight_gets_a_gradient(model):
    fused = model.fuse(formula_image(0), formula_image(1))
    gradients = torch.autograd.grad(fused.sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


def test_bfloat16_stays_near_float32(model):
    vis, ir = formula_image(0), formula_image(1)
    with torch.no_grad():
        wanted = model.fuse(vis, ir)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model.fuse(vis, ir)
        half = net.CDDFuse().bfloat16()
        half.load_state_dict(model.state_dict())
        pure = half.fuse(vis.bfloat16(), ir.bfloat16())
    # bfloat16 keeps 8 bits, so half a grey level on average is what it can do
    assert (autocast - wanted).abs().mean() < 0.5 / 255
    assert (pure.float() - wanted).abs().mean() < 0.5 / 255


def test_exponent_of_the_coupling_survives_bfloat16():
    node = net.DetailNode(64).bfloat16()
    x = torch.randn(1, 64, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    rho = node.theta_rho
    exponents = []
    hook = rho.register_forward_hook(lambda module, args, out: exponents.append(out))
    out = node(x)
    hook.remove()
    assert exponents[0].dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_file_stands_alone():
    tree = ast.parse(Path(net.__file__).read_text())
    modules = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules - sys.stdlib_module_names <= {"torch", "einops"}


@pytest.fixture(scope="module")
def published_outputs(fusion_data):
    """float64 outputs of the published networks for a checkpoint in their format; beside the benchmark data."""
    folder = fusion_data.parent / "golden"
    if not (folder / "cddfuse_random_outputs.npz").is_file():
        pytest.skip(f"no reference outputs at {folder}")
    return folder, np.load(folder / "cddfuse_random_outputs.npz")


@pytest.mark.skipif(not os.environ.get("FUSION_DATA"), reason="FUSION_DATA is not set: no reference outputs")
@pytest.mark.parametrize("case", ["tno_crop", "ct_odd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_forward_equals_the_published_networks_on_real_images(published_outputs, case, dtype, tolerance):
    from utils.inference.checkpoint import load_checkpoint

    folder, wanted = published_outputs
    model = net.CDDFuse()
    load_checkpoint(folder / "cddfuse_random.pth", model)
    model = model.to(dtype).eval()
    vis, ir = (torch.from_numpy(wanted[f"{case}.{n}"]).to(dtype).view(1, 1, *wanted[f"{case}.vis"].shape[-2:])
               for n in ("vis", "ir"))  # fmt: skip
    with torch.no_grad():
        vis_features, ir_features = model.encoder(vis), model.encoder(ir)
        sparse = {
            "vis_base": vis_features.base,
            "vis_detail": vis_features.detail,
            "vis_shallow": vis_features.shallow,
            "fused_base": model.base_fusion(vis_features.base + ir_features.base),
            "fused_detail": model.detail_fusion(vis_features.detail + ir_features.detail),
        }
        got = {name: x[:, ::8, ::4, ::4] for name, x in sparse.items()}
        stacked = [torch.cat(kind) for kind in zip(vis_features[:2], ir_features[:2], strict=True)]  # base, detail
        got["fused_vis_skip"] = model.fuse(vis, ir, "vis")
        got["fused_sum_skip"] = model.decode_fused(vis, ir, *stacked, "sum")
        got["fused_no_skip"] = model.decode_fused(vis, ir, *stacked, "none")
        got["vis_hat"] = model.decoder(vis, *vis_features[:2])[0]
        got["ir_hat"] = model.decoder(ir, *ir_features[:2])[0]
    for name, x in got.items():
        difference = np.abs(x.double().numpy().squeeze() - wanted[f"{case}.{name}"].squeeze()).max()
        assert difference < tolerance, name
