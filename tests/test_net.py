"""net.py against the golden numbers, and the properties that code elsewhere relies on.

Golden values: made with the published networks (torch 1.8.1, 2.0.1 and 2.13 agree to 1e-6) for the weights and
images of tests/conftest.py; the tolerance 1e-5 covers the differences between those versions.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import net
from tests import reference_net
from tests.conftest import formula_image, set_formula_weights

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
        vis_features, ir_features = model.encode(vis), model.encode(ir)
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
            "vis rebuilt": model.reconstruct(vis),
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
        model.encode(torch.zeros(shape))


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


def test_attention_sums_gathered_by_halves_give_the_whole_map():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 60, 64, dtype=torch.float64)
    temperature = torch.rand(8, 1, 1, dtype=torch.float64) + 0.5
    halves = [net.attention_sums(*half) for half in zip(q.split(25, dim=1), k.split(25, dim=1), strict=True)]
    products, squares = (sum(parts) for parts in zip(*halves, strict=True))
    whole = net.attention_map(*net.attention_sums(q, k), temperature)
    torch.testing.assert_close(net.attention_map(products, squares, temperature), whole, rtol=0, atol=1e-14)


def test_attend_equals_attention_written_out():
    torch.manual_seed(0)
    qkv, projection = torch.randn(2, 48, 5, 7, dtype=torch.float64), torch.randn(16, 16, 1, 1, dtype=torch.float64)
    temperature = torch.rand(4, 1, 1, dtype=torch.float64) + 0.5
    q, k, v = (x.reshape(2, 4, 4, 35) for x in qkv.chunk(3, dim=1))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    attended = torch.softmax(q @ k.transpose(-2, -1) * temperature, dim=-1) @ v
    wanted = torch.nn.functional.conv2d(attended.reshape(2, 16, 5, 7), projection)
    attended = net.attend(lambda x: x.chunk(3, dim=1), lambda x: x.chunk(3, dim=1)[2], qkv, temperature, projection)
    for got in (attended(qkv), attended(qkv, attended.values)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


class Forgetful(net.Workspace):
    """Has room for nothing that can be made again."""

    def spare_map(self, shape, like):
        return None


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    height=st.integers(2, 33),
    width=st.integers(2, 33),
    pixels=st.integers(1, 1500),  # from pieces of one pixel, far below the halos, to one of the whole image
    batch=st.integers(1, 2),
    workspace=st.sampled_from([net.Workspace, Forgetful]),
)
@example(height=2, width=33, pixels=1, batch=1, workspace=Forgetful)
@example(height=13, width=7, pixels=60, batch=2, workspace=Forgetful)
@example(height=16, width=21, pixels=100, batch=1, workspace=net.Workspace)
def test_pieces_of_any_size_give_the_result_of_the_whole_image(model, height, width, pixels, batch, workspace):
    if pixels < 16:
        height, width = min(height, 9), min(width, 9)  # the smallest pieces take long
    vis, ir = (torch.cat([formula_image(c + i, height, width) for i in range(batch)]) for c in (0, 2))
    given_vis = vis.clone()
    with torch.no_grad():
        wanted = model.fuse(vis, ir, "sum")
        with net.strips(pixels, workspace()):
            got = model.fuse(vis, ir, "sum")
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # float32; sums are ordered differently
    assert vis.equal(given_vis)


@pytest.mark.parametrize("pixels", [50, 200])
def test_networks_called_one_by_one_in_pieces_leave_their_inputs_alone(model, pixels):
    image = formula_image(0, 19, 23)
    with torch.no_grad():
        wanted = model.encoder(image)
        out, reduced = model.decoder(image, *wanted[:2])
        with net.strips(pixels):
            got = model.encoder(image)
            again, reduced_again = model.decoder(image, *got[:2])
        reconstructed = model.reconstruct(image)  # the context has ended
    for a, b in zip((*got, again, reduced_again), (*wanted, out, reduced), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)  # float32 features of size 3
    assert reconstructed.equal(out)


def test_pieces_may_be_written_over_their_sources():
    x = torch.randn(2, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(3, 1, 5, 5)

    def blur(x):
        return torch.nn.functional.conv2d(x, weight, padding=2, groups=3)

    wanted = blur(x)
    for pixels in (1, 7, 30, 100, 400, 10_000):
        mine = x.clone()
        with net.strips(pixels):
            got = net.strip_by_strip(blur, mine, halo=2, into=mine)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # sums of 25 floats
        assert pixels >= 2 * 17 * 23 or got is mine


def test_rows_too_long_for_a_piece_are_cut_too():
    image = torch.empty(1, 64, 8333, 12_000, device="meta")
    with net.strips(4096):
        rows, columns = net._grid(image)
    for cuts, length in ((rows, 8333), (columns, 12_000)):
        assert cuts[0][0] == 0 and cuts[-1][1] == length
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
        assert {b - a for a, b in cuts} <= {62, 63, 64}


def test_composed_base_convolution_has_the_gradient_of_the_two_it_replaces():
    torch.manual_seed(0)
    attention = net.FullAttention(16, 4).double()
    norm = net.PixelNorm(16).double()
    x = torch.randn(1, 16, 6, 7, dtype=torch.float64)
    weights = list(attention.parameters())
    attended = attention(norm, x)
    got = torch.autograd.grad(attended(x, attended.values).square().sum(), weights)

    def two(x):
        return attention.qkv2(attention.qkv1(norm(x))).chunk(3, dim=1)

    plain = net.attend(two, lambda x: two(x)[2], x, attention.scale, attention.proj.weight)
    for a, b in zip(got, torch.autograd.grad(plain(x).square().sum(), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_of_channels_are_convolved_as_by_torch(size):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    up = torch.randn(8, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    grouped = torch.randn(8, size, 3, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.conv2d(torch.conv2d(x, up), grouped, padding=1, groups=8 // size)
    got = net._up_and_group(x, up, grouped)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(y.square().sum(), (up, grouped)) for y in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


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
        vis_features, ir_features = model.encode(vis), model.encode(ir)
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
        got["vis_hat"] = model.reconstruct(vis)
        got["ir_hat"] = model.decoder(ir, *ir_features[:2])[0]
    for name, x in got.items():
        difference = np.abs(x.double().numpy().squeeze() - wanted[f"{case}.{name}"].squeeze()).max()
        assert difference < tolerance, name
