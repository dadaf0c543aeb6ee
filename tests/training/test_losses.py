"""Loss terms against golden numbers of the published training code (kornia 0.2.0 and torch 1.8.1).

Golden values: the published losses on the images and weights of tests/conftest.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests import reference_net
from tests.conftest import formula_image, set_formula_weights
from utils import metrics
from utils.training import losses
from zoo import Batch
from zoo.cddfuse import CDDFuseSystem, Options

I0, I1, I2 = formula_image(0), formula_image(1), formula_image(2)


@pytest.mark.parametrize(
    ("a", "b", "form", "wanted"),
    [
        (I0, I1, "published", 0.2793783),
        (I0, I1, "standard", 0.2884906),
        (I0, I2, "published", 0.4683062),
        (I0, I2, "standard", 0.6104904),
    ],
)
def test_ssim_loss_equals_the_golden_value(a, b, form, wanted):
    assert losses.ssim_loss(a, b, form=form).item() == pytest.approx(wanted, abs=1e-6)


def test_published_ssim_loss_is_flat_where_ssim_is_negative():
    a = I0.clone().requires_grad_()
    loss = losses.ssim_loss(a, 1 - I0)  # every window of the negative correlates negatively
    assert loss.item() == pytest.approx(0.5)
    assert torch.autograd.grad(loss, a)[0].abs().max() == 0
    standard = losses.ssim_loss(a, 1 - I0, form="standard")
    assert torch.autograd.grad(standard, a)[0].abs().max() > 0


def test_spatial_gradient_loss_equals_the_golden_value():
    assert losses.gradient_loss(I0, I1).item() == pytest.approx(0.04203349, abs=1e-7)


def test_sobel_magnitude_pads_with_zeros():
    flat = torch.ones(1, 1, 4, 5)
    # At the left border the right column counts 1 + 2 + 1; in a corner 3 of it, across and down.
    assert losses.sobel_magnitude(flat)[0, 0, 1].tolist() == [4, 0, 0, 0, 4]
    assert losses.sobel_magnitude(flat)[0, 0, 0, 0].item() == 6


def test_correlation_equals_the_golden_value():
    a, b = torch.cat([I0, I1, I2], 1), torch.cat([I1, I2, I0], 1)
    assert losses.correlation(a, b).item() == pytest.approx(0.23726724, abs=1e-7)


def test_correlation_ignores_gain_and_offset_and_counts_a_constant_as_zero():
    assert losses.correlation(I0, 3 * I0 + 0.2).item() == pytest.approx(1, abs=1e-6)
    assert losses.correlation(I0, -I0).item() == pytest.approx(-1, abs=1e-6)
    assert losses.correlation(I0, torch.ones_like(I0)).item() == 0


def test_correlation_with_a_constant_channel_moves_nothing():
    flat = torch.ones_like(I0).requires_grad_()
    losses.correlation(flat, I1).backward()
    assert flat.grad.isfinite().all()


def test_fusion_loss_equals_the_golden_values():
    terms = losses.fusion_loss(I0, I1, I2)
    assert terms["intensity"].item() == pytest.approx(0.24636929, rel=1e-6)
    assert terms["gradient"].item() == pytest.approx(0.38522017, rel=1e-6)
    assert terms["fusion"].item() == pytest.approx(4.0985708, rel=1e-6)
    weighed = losses.fusion_loss(I0, I1, I2, intensity_weight=3)["fusion"] - terms["fusion"]
    assert weighed.item() == pytest.approx(2 * terms["intensity"].item(), rel=1e-5)


@pytest.mark.parametrize("function", [losses.ssim_loss, losses.gradient_loss, losses.correlation])
def test_losses_are_the_same_under_autocast(function):
    plain = function(I0, I1)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(I0, I1).item() == plain.item()
    assert function(I0.bfloat16(), I1.bfloat16()).dtype == torch.float32


def test_range_loss_is_the_distance_from_the_levels_of_both_sources_nearby():
    vis, ir = torch.full((1, 1, 8, 8), 0.3), torch.full((1, 1, 8, 8), 0.6)
    fused = torch.full((1, 1, 8, 8), 0.45)
    assert losses.range_loss(vis, ir, fused).item() == 0
    fused[..., 2, 2], fused[..., 5, 5] = 0.1, 0.9  # below the darker, above the brighter source
    assert losses.range_loss(vis, ir, fused).item() == pytest.approx((0.2 + 0.3) / 64, rel=1e-5)
    vis[..., 3, 3], ir[..., 6, 5] = 0.1, 0.9  # the levels of a neighbour are allowed
    assert losses.range_loss(vis, ir, fused).item() == pytest.approx(0, abs=1e-7)
    assert losses.range_loss(vis, ir, fused, radius=0).item() == pytest.approx((0.2 + 0.3) / 64, rel=1e-5)
    vis[..., 3, 3], vis[..., 2, 4] = 0.3, 0.1  # those of a pixel two away are not
    assert losses.range_loss(vis, ir, fused).item() == pytest.approx(0.2 / 64, rel=1e-5)
    assert losses.range_loss(vis, ir, fused, radius=2).item() == pytest.approx(0, abs=1e-7)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="published, standard"):
        losses.ssim_loss(I0, I1, form="old")
    with pytest.raises(ValueError, match="at least 6"):
        losses.ssim_map(I0[..., :5], I1[..., :5])


# --- whole stages -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system() -> CDDFuseSystem:
    system = CDDFuseSystem()
    for part in system.published_networks.values():
        set_formula_weights(getattr(system, part))
    return system


STAGE_1 = {
    "cc_base": 0.69116306,
    "cc_detail": 0.62659478,
    "decomposition": 0.23079564,
    "reconstruction_vis": 1.44825077,
    "reconstruction_ir": 1.44659960,
    "gradient_vis": 0.03364338,
    "total": 3.52465844,
}
STAGE_2 = {"intensity": 0.14106500, "gradient": 0.71700126, "fusion": 7.31107759, "total": 7.77266884}
GRADIENT_NORMS = [
    {"encoder": 4.239936, "decoder": 5.259170},
    {"encoder": 8.510314, "decoder": 12.610586, "base_fusion": 3.641086, "detail_fusion": 1.296762},
]


@pytest.mark.parametrize(("number", "wanted"), [(0, STAGE_1), (1, STAGE_2)])
def test_stage_losses_and_gradients_equal_the_published_training(system, number, wanted):
    stage = system.stages(Options(), "ivf")[number]
    terms = stage.losses(Batch(I0, I1))
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    system.zero_grad()
    terms["total"].backward()
    for name, wanted_norm in GRADIENT_NORMS[number].items():
        gradients = [parameter.grad for parameter in stage.networks[name].parameters()]
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(wanted_norm, rel=1e-4), name
    assert set(stage.networks) == set(GRADIENT_NORMS[number])


@pytest.mark.parametrize("name", ["range", "difference", "fused_ssim"])
def test_weight_of_an_own_term_adds_it_to_stage_two_alone(system, name):
    plain, first = (stage.losses(Batch(I0, I1)) for stage in reversed(system.stages(Options(), "ivf")))
    options = Options(**{f"{name}_weight": 3})
    weighed, same = (stage.losses(Batch(I0, I1)) for stage in reversed(system.stages(options, "ivf")))
    assert set(weighed) == {*plain, name} and set(same) == set(first)
    assert (weighed["total"] - plain["total"]).item() == pytest.approx(3 * weighed[name].item(), rel=1e-4)
    assert weighed[name] > 0 and same["total"].item() == first["total"].item()


def test_difference_loss_is_two_less_the_metric_scd():
    fused = 0.6 * I0 + 0.3 * I1 + 0.1 * I0 * I1
    pictures = (image[0, 0].double().numpy() * 255 for image in (fused, I1, I0))
    wanted = 2 - metrics.scd(*pictures)
    assert losses.difference_loss(I0[:1], I1[:1], fused[:1]).item() == pytest.approx(wanted, abs=1e-5)
    assert losses.difference_loss(I0, I1, I0 + I1).item() == pytest.approx(0, abs=1e-5)


def test_medical_stages_never_show_the_decoder_an_image(system):
    seen = []
    hook = system.decoder.register_forward_pre_hook(lambda decoder, args: seen.append(args[0]))
    for stage in system.stages(Options(), "mif"):
        stage.losses(Batch(I0, I1))
    hook.remove()
    assert seen == [None, None]


@pytest.mark.parametrize("case", ["tno_crop", "ct_odd"])
def test_stage_losses_equal_the_published_ones_on_real_images(fusion_data, case):
    # Made with the published networks and kornia 0.9, whose SSIM loss differs where SSIM < 0.
    folder = fusion_data.parent / "golden"
    if not (folder / "cddfuse_random_losses.json").is_file():
        pytest.skip(f"no reference losses at {folder}")
    system = CDDFuseSystem()
    system.load_published(folder / "cddfuse_random.pth")
    system.double()
    images = np.load(folder / "cddfuse_random_outputs.npz")
    wanted = json.loads((folder / "cddfuse_random_losses.json").read_text())[case]["losses"]
    height, width = images[f"{case}.vis"].shape[-2:]
    batch = Batch(*(torch.from_numpy(images[f"{case}.{n}"]).double().view(1, 1, height, width) for n in ("vis", "ir")))
    with torch.no_grad():
        first, second = (stage.losses(batch) for stage in system.stages(Options(ssim_form="standard"), "ivf"))
    names = {
        **{name: name for name in ("cc_base", "cc_detail", "decomposition", "gradient_vis")},
        **{"recon_vis": "reconstruction_vis", "recon_ir": "reconstruction_ir", "stage1_total": "total"},
    }
    for published, ours in names.items():
        assert first[ours].item() == pytest.approx(wanted[published], rel=1e-6), published
    names = {
        "fusion_intensity": "intensity",
        "fusion_gradient": "gradient",
        "fusion_total": "fusion",
        "stage2_total": "total",
    }
    for published, ours in names.items():
        assert second[ours].item() == pytest.approx(wanted[published], rel=1e-6), published


# --- the second implementation ------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 2])
def test_losses_and_gradients_are_those_of_the_reference_implementation(phase):
    torch.manual_seed(phase)
    ours, published = CDDFuseSystem(), reference_net.CDDFuse()
    published.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    vis, ir = torch.rand(2, 2, 1, 16, 20, generator=generator)
    expected = reference_net.Training(published).loss(phase, vis, ir)
    expected.backward()
    total = ours.stages(ours.Options(), "ivf")[phase - 1].losses(Batch(vis, ir))["total"]
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), published.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is None and b.grad is None, name
        else:
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-7, name
