"""Nabf and MS-SSIM: values by hand, second implementations, properties, the registry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import correlate, sobel
from skimage.metrics import structural_similarity

from tests.test_metrics import made_images
from utils import metrics, more_metrics
from utils.metrics import METRICS, PROTOCOLS, score

MORE = ("Nabf", "MS-SSIM")


# --- Nabf --------------------------------------------------------------------------------------------------


def test_nabf_of_a_doubled_source_is_what_its_edges_fail_to_preserve():
    a = np.zeros((12, 15), dtype=np.uint8)
    a[:, 6:] = 40
    a[5:8, 2:4] = 90
    black = np.zeros_like(a)
    # Every edge is twice as strong and has the same angle: G = 1/2, D = 1, so with no edges in the other source
    # 1 - Q = 1 - 0.9994 / (1 + exp(0)) * 0.9879 / (1 + exp(-4.4)).
    want = 1 - 0.9994 / 2 * 0.9879 / (1 + math.exp(-4.4))
    assert more_metrics.nabf(2 * a, a, black) == pytest.approx(want, rel=1e-12)


def test_nabf_is_zero_where_no_edge_became_stronger():
    _, a, b = made_images(3, 48, 50)
    assert more_metrics.nabf(np.maximum(a, 0), a, b) == 0.0
    assert more_metrics.nabf(np.floor(a / 2), a, b) < 0.02  # rounding adds a few edges of one level


def test_nabf_of_black_sources_has_no_value():
    black = np.zeros((8, 8), dtype=np.uint8)
    assert math.isnan(more_metrics.nabf(black + 9, black, black))


def edges(image):
    """Strength and angle with scipy's Sobel filter, zeros around the image, signs as in a convolution."""
    gx, gy = -sobel(image, axis=1, mode="constant"), sobel(image, axis=0, mode="constant")
    angle = np.arctan(np.divide(gy, gx, out=np.full_like(gx, np.inf), where=gx != 0))
    return np.hypot(gx, gy), angle


def test_preserved_lost_and_added_edges_add_up_to_one():
    fused, a, b = made_images(5, 48, 50)
    strength_f, angle_f = edges(fused)
    parts = dict.fromkeys(("kept", "lost", "added", "all"), 0.0)
    (g_a, angle_a), (g_b, angle_b) = edges(a), edges(b)
    added = (strength_f > g_a) & (strength_f > g_b)
    for strength, angle in ((g_a, angle_a), (g_b, angle_b)):
        high = np.maximum(strength, strength_f)
        ratio = np.minimum(strength, strength_f) / np.where(high > 0, high, 1)
        alignment = 1 - np.abs(angle - angle_f) / (np.pi / 2)
        q = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (alignment - 0.8)))
        parts["kept"] += np.sum(q * strength)
        parts["lost"] += np.sum(((1 - q) * strength)[~added])
        parts["added"] += np.sum(((1 - q) * strength)[added])
        parts["all"] += np.sum(strength)
    assert metrics.qabf(fused, a, b, "standard") == pytest.approx(parts["kept"] / parts["all"], rel=1e-9)
    assert more_metrics.nabf(fused, a, b) == pytest.approx(parts["added"] / parts["all"], rel=1e-9)
    assert parts["kept"] + parts["lost"] + parts["added"] == pytest.approx(parts["all"], rel=1e-12)


# --- MS-SSIM -----------------------------------------------------------------------------------------------


def test_ms_ssim_of_constant_images_is_the_luminance_of_the_last_scale():
    fused, a, b = (np.full((161, 170), level, dtype=np.uint8) for level in (100, 100, 60))
    c1 = 2.55**2
    luminance = (2 * 100 * 60 + c1) / (100**2 + 60**2 + c1)
    assert more_metrics.ms_ssim(fused, a, b) == pytest.approx((1 + luminance**0.1333) / 2, rel=1e-12)


def test_each_scale_is_the_ssim_of_scikit_image():
    fused, a, b = made_images(7, 40, 52)
    want = [
        structural_similarity(
            fused, source, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )[1][5:-5, 5:-5].mean()
        for source in (a, b)
    ]
    similarity = more_metrics._similarity(np.stack([fused, a, b]), with_luminance=True)
    assert similarity == pytest.approx(want, rel=1e-9)


def halved(image):
    blocks = [[image[i : i + 2, j : j + 2] for j in range(0, image.shape[1], 2)] for i in range(0, len(image), 2)]
    return np.array([[block.mean() for block in row] for row in blocks])


def ms_ssim_step_by_step(x, y):
    """One source, from the definition, with two-dimensional windows: `scipy.ndimage.correlate`."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333), start=1):

        def local(image):
            return correlate(image, window)[5:-5, 5:-5]  # whole windows only

        mx, my = local(x), local(y)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        variance_x, variance_y = local(x * x) - mx**2, local(y * y) - my**2
        similarity = (2 * (local(x * y) - mx * my) + c2) / (variance_x + variance_y + c2)
        if scale == 5:
            similarity *= (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        value *= max(similarity.mean(), 0) ** weight
        if scale < 5:
            x, y = halved(x), halved(y)
    return value


def test_ms_ssim_equals_its_definition_step_by_step():
    fused, a, b = made_images(9, 176, 192)  # even at every scale but the last
    want = (ms_ssim_step_by_step(fused, a) + ms_ssim_step_by_step(fused, b)) / 2
    assert more_metrics.ms_ssim(fused, a, b) == pytest.approx(want, rel=1e-9)


def test_the_last_row_of_an_odd_size_counts_twice():
    image = np.array([[[0.0, 4.0, 8.0], [4.0, 8.0, 4.0], [2.0, 6.0, 10.0]]])
    assert more_metrics._blocks_of_two(image).tolist() == [[[4.0, 6.0], [4.0, 10.0]]]


def test_ms_ssim_falls_with_noise():
    _, a, _ = made_images(2, 161, 163)
    noise = np.random.default_rng(0).normal(size=a.shape)
    values = [more_metrics.ms_ssim((a + sigma * noise).clip(0, 255), a, a) for sigma in (0, 5, 20, 80)]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert values == sorted(values, reverse=True) and values[-1] < 0.9


def test_a_negative_scale_counts_as_zero():
    checks = np.indices((161, 161)).sum(axis=0) % 2 * 255.0
    assert more_metrics.ms_ssim(checks, 255 - checks, 255 - checks) == 0.0


# --- both --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MORE)
def test_definitions_are_the_same_everywhere_but_in_the_toolbox(key):
    fused, a, b = made_images(14, 161, 164)
    values = {protocol: score(fused, a, b, protocol, metrics=[key])[key] for protocol in PROTOCOLS}
    assert values["paper"] == values["standard"] == METRICS[key].function(fused, b, a)
    assert math.isnan(values["toolbox"])
    low, high = METRICS[key].value_range
    assert low < values["paper"] < high


@pytest.mark.parametrize("key", MORE)
def test_registered_smallest_side_is_the_one_that_works(key):
    side = METRICS[key].min_side
    fused, a, b = made_images(1, side, side + 2)
    assert math.isfinite(score(fused, a, b, metrics=[key])[key])
    with pytest.raises(ValueError, match=f"{key} needs images with sides >= {side}"):
        METRICS[key].function(fused[1:], a[1:], b[1:])


def test_registering_leaves_the_twelve_the_default_and_refuses_a_name_twice():
    fused, a, b = made_images(1, 48, 50)
    assert list(METRICS)[12:] == list(MORE) and list(score(fused, a, b)) == list(METRICS)[:12]
    with pytest.raises(ValueError, match="'Nabf' is registered already"):
        metrics.register(METRICS["Nabf"])
