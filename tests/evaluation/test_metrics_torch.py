"""Torch twins: equal to the numpy reference in float64, batched, differentiable, and honest about float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.test_metrics import PAPER_GOLDENS, formula_images, made_images
from utils.evaluation import metrics_torch
from utils.evaluation.metrics_torch import TWINS, score_batch, score_on
from utils.metrics import METRICS, PAPER_TABLE, PROTOCOLS, score

CPU = torch.device("cpu")
WITH_GRADIENT = ("SD", "SF", "SCD", "VIF", "Qabf", "SSIM")


def batch(*scenes, dtype=torch.float64):
    """Scenes of (fused, a, b) -> three tensors (B, 1, H, W)."""
    return [torch.from_numpy(np.stack(images)).to(dtype)[:, None] for images in zip(*scenes, strict=True)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_equals_the_reference_image_by_image(protocol):
    scenes = [made_images(seed, 49, 60) for seed in (0, 1, 2)]
    values = score_batch(*batch(*scenes), protocol)
    assert list(values) == list(PAPER_TABLE)
    for i, scene in enumerate(scenes):
        want = score(*scene, protocol=protocol, metrics=PAPER_TABLE)
        found = {key: value[i].item() for key, value in values.items()}
        assert found == pytest.approx(want, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("key", TWINS)
def test_twins_give_the_published_values(key):
    value, tolerance = PAPER_GOLDENS[key]
    assert score_on(CPU, *formula_images(), metrics=[key])[key] == pytest.approx(value, rel=tolerance)


def test_real_images_are_scored_like_the_reference(fusion_data):
    from utils.data.images import read_grey

    folder = fusion_data / "other_methods" / "TNO42"
    images = [read_grey(folder / name / "15.png") for name in ("U2Fusion", "ir", "vi")]
    assert score_on(CPU, *images) == pytest.approx(score(*images, metrics=PAPER_TABLE), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_values_of_the_reference():
    scene = made_images(8, 120, 131)
    assert score_on(torch.device("cuda"), *scene) == pytest.approx(score(*scene, metrics=PAPER_TABLE), rel=1e-6)


@pytest.mark.parametrize("level", [0, 77])
@pytest.mark.parametrize("key", TWINS)
def test_constant_images_get_the_value_of_the_reference(key, level):
    constant, other = np.full((44, 47), float(level)), made_images(3, 44, 47)[1]
    for scene in ((constant, constant, constant), (constant, other, constant), (other, constant, constant)):
        want = score(*scene, metrics=[key])[key]
        assert score_on(CPU, *scene, metrics=[key])[key] == pytest.approx(want, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("protocol", ["paper", "standard"])
@pytest.mark.parametrize("key", WITH_GRADIENT)
def test_gradient_is_the_slope(key, protocol):
    rng = np.random.default_rng(5)
    images = [torch.from_numpy(rng.uniform(20, 235, (1, 1, 43, 44))) for _ in range(3)]
    fused = images[0].requires_grad_()
    direction = torch.from_numpy(rng.normal(size=fused.shape))
    gradient = torch.autograd.grad(TWINS[key](*images, protocol).sum(), fused)[0]
    step = 1e-5
    high, low = (TWINS[key](fused + sign * step * direction, *images[1:], protocol).item() for sign in (1, -1))
    # A difference quotient of step 1e-5 is good to about 1e-5: curvature on one side, rounding on the other.
    assert (gradient * direction).sum().item() == pytest.approx((high - low) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("key", WITH_GRADIENT)
def test_gradients_of_flat_images_are_finite(key):
    fused = torch.full((1, 1, 41, 41), 9.0, dtype=torch.float64, requires_grad=True)
    a, b = torch.zeros_like(fused), torch.rand_like(fused) * 255
    value = TWINS[key](fused, b, a).sum()
    if math.isfinite(value.item()):  # SCD has no value for a constant source
        assert torch.isfinite(torch.autograd.grad(value, fused)[0]).all()
    else:
        assert key == "SCD"


@pytest.mark.parametrize("key", ["EN", "MI"])
def test_histograms_have_no_gradient(key):
    images = [torch.rand(1, 1, 41, 41, requires_grad=True) * 255 for _ in range(3)]
    assert not TWINS[key](*images).requires_grad


def test_raising_ssim_by_its_gradient_works():
    _, a, b = batch(made_images(4, 41, 43))
    fused = ((a + b) / 2).requires_grad_()
    before = metrics_torch.ssim(fused, a, b, "standard")
    gradient = torch.autograd.grad(before.sum(), fused)[0]
    after = metrics_torch.ssim(fused + 100 * gradient / gradient.norm(), a, b, "standard")
    assert after.item() > before.item()


@pytest.mark.parametrize("key", TWINS)
def test_float32_is_good_to_four_digits_under_standard(key):
    scene = made_images(6, 64, 70)
    value = TWINS[key](*batch(scene, dtype=torch.float32), "standard")
    assert value.dtype == torch.float32
    # Single precision through variances and logarithms.
    assert value.item() == pytest.approx(score(*scene, "standard", metrics=[key])[key], rel=1e-4)


def test_bad_tensors_are_refused():
    good = torch.zeros(1, 1, 50, 50)
    with pytest.raises(
        ValueError, match=r"SSIM needs floating-point \(B, 1, H, W\), got torch.float32 \(1, 3, 50, 50\)"
    ):
        metrics_torch.ssim(good, good.expand(1, 3, 50, 50), good)
    with pytest.raises(ValueError, match="floating-point .* got torch.uint8"):
        metrics_torch.standard_deviation(good.byte())
    with pytest.raises(ValueError, match="one shape on one device"):
        metrics_torch.scd(good, good[..., :49], good)
    with pytest.raises(ValueError, match=r"VIF needs sides >= 41, got \(50, 40\)"):
        metrics_torch.vif(*[good[..., :40]] * 3)
    with pytest.raises(ValueError, match="no torch twin of 'AG'"):
        score_batch(good, good, good, metrics=["AG"])
    with pytest.raises(ValueError, match="unknown protocol 'legacy'"):
        metrics_torch.entropy(good, protocol="legacy")
    with pytest.raises(ValueError, match="b must hold grey levels"):
        score_on(CPU, *[np.zeros((41, 41))] * 2, np.full((41, 41), 300.0))


def test_every_twin_has_a_reference_of_the_same_name():
    assert {key: twin.__name__ for key, twin in TWINS.items()} == {key: METRICS[key].function.__name__ for key in TWINS}
