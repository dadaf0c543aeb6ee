"""utils/data/degradation.py: golden values of its specification, ranges over many draws, and other implementations."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from scipy import ndimage

import dataprocessing
from tests.conftest import formula_colour, write_pair
from utils.common import InputError
from utils.data.degradation import (
    INFRARED,
    NOISES,
    VISIBLE,
    Ranges,
    add_noise,
    adjust_brightness,
    adjust_contrast,
    blur,
    degrade_pair,
    gaussian_kernel,
    jpeg,
    to_8_bits,
    unsharp_mask,
)


def degrade(image: np.ndarray, seed: int | tuple[int, ...], ranges: Ranges = VISIBLE) -> np.ndarray:
    return ranges.draw(np.random.default_rng(seed)).apply(image)


def colour_image(height: int = 40, width: int = 56) -> np.ndarray:
    return np.ascontiguousarray(formula_colour(0.5, height, width)[0].permute(1, 2, 0).numpy())


def test_kernels_equal_the_published_ones():
    # Values of the published code (SciPy 1.10.1, numpy 1.23.5) for these parameters.
    kernel = gaussian_kernel(7, (2, 1), angle=0.3)
    got = kernel[3, 3], kernel[3, 4], kernel[4, 3], kernel[4, 4], kernel[2, 4]
    assert got == pytest.approx((0.11369569, 0.08663401, 0.07048208, 0.06184839, 0.04663563), abs=1e-8)
    isotropic = gaussian_kernel(7, (0.8**2, 0.8**2))
    assert (isotropic[3, 3], isotropic[3, 2]) == pytest.approx((0.24867820, 0.11385318), abs=1e-8)


def test_unsharp_mask_equals_the_published_one():
    # OpenCV 4.7 with the published parameters, on the 2 x 2 tiling of the image.
    image = np.tile(colour_image(), (2, 2, 1))
    assert image[3, 5] == pytest.approx((0.82821280, 0.30007136, 0.32938421), abs=1e-6)
    sharp = unsharp_mask(image)
    assert sharp.dtype == np.float32 and sharp.shape == image.shape
    assert sharp[3, 5] == pytest.approx((0.94303495, 0.26714176, 0.27607164), abs=1e-6)
    assert sharp.mean() == pytest.approx(0.5003356, abs=1e-6)
    np.testing.assert_allclose(unsharp_mask(image[..., 1]), sharp[..., 1], atol=1e-6)


def test_brightness_and_contrast_are_of_8_bits_as_worked_by_hand():
    image = np.float32([[0, 101]]) / 255
    assert (adjust_brightness(image, 0.5) * 255).tolist() == [[0, 50]]  # cut off, not rounded
    assert (adjust_contrast(image, 1.5) * 255).tolist() == [[0, 126]]  # of the mean 51: 51 + 1.5 x 50 = 126
    colours = np.float32([[[255, 0, 0], [0, 0, 255]]]) / 255  # luma 76 and 29, mean 53
    assert (adjust_contrast(colours, 0.5) * 255).tolist() == [[[154, 26, 26], [26, 26, 154]]]


def test_blur_equals_scipy_with_a_mirrored_border():
    image = np.random.default_rng(0).random((9, 14, 3), np.float32)
    kernel = gaussian_kernel(13, (2.5, 0.3), angle=1.1)  # wider than the image is high
    wanted = np.stack([ndimage.convolve(image[..., i], kernel, mode="mirror") for i in range(3)], axis=2)
    np.testing.assert_allclose(blur(image, kernel), wanted, atol=2e-6)  # float32, and OpenCV filters in float32


@pytest.mark.parametrize("variances", [(0, 0), (0, 3), (3, 0), (1e-17, 1e-17)])
def test_kernel_without_width_is_one_pixel_or_a_line_and_not_an_error(variances):
    kernel = gaussian_kernel(7, variances)
    assert kernel.sum() == pytest.approx(1) and kernel[3, 3] == kernel.max()
    assert np.count_nonzero(kernel > 1e-9) == (1 if max(variances) < 1 else 7)


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
def test_kernel_has_the_covariance_asked_for(angle):
    kernel = gaussian_kernel(31, (4, 1), angle)
    offsets = np.arange(31) - 15
    moments = [[(kernel * a * b).sum() for b in (offsets[None], offsets[:, None])]
               for a in (offsets[None], offsets[:, None])]  # fmt: skip
    axes = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    np.testing.assert_allclose(moments, axes.T @ np.diag([4, 1]) @ axes, atol=1e-4)  # sampled, and cut at 15 pixels


def test_jpeg_is_that_of_opencv_with_red_first():
    image = colour_image()
    wanted = cv2.imdecode(cv2.imencode(".jpg", to_8_bits(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1)
    np.testing.assert_array_equal(to_8_bits(jpeg(image, 40)), wanted[..., ::-1])
    assert np.abs(jpeg(image, 90) - image).mean() < np.abs(jpeg(image, 30) - image).mean()
    assert jpeg(image[..., 0], 40).shape == image.shape[:2]


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_has_the_statistics_of_its_kind(kind, channels):
    grey = np.full((200, 300, 3)[: 2 if channels == 1 else 3], 0.5, np.float32)
    noise = (add_noise(grey, kind, 12, np.random.default_rng(3)) - 0.5) * 255
    assert noise.shape == grey.shape and noise.dtype == np.float32
    covariance = np.atleast_2d(np.cov(noise.reshape(-1, channels).T))
    if kind == "correlated":
        assert np.linalg.eigvalsh(covariance).max() <= 1.02 * 12**2  # a variance below 12^2 along each axis
        assert covariance.trace() > 0
    else:
        wanted = 12**2 * (np.eye(channels) if kind == "independent" else np.ones((channels, channels)))
        np.testing.assert_allclose(covariance, wanted, atol=0.02 * 12**2)  # 60 000 samples


def test_published_correlated_noise_has_the_magnitudes_of_a_covariance():
    grey = np.full((200, 300, 3), 0.5, np.float32)
    rng, again = np.random.default_rng(7), np.random.default_rng(7)
    axes = np.linalg.svd(rng.random((3, 3)))[0]
    wanted = 400 * np.abs(axes.T @ np.diag(rng.random(3)) @ axes)
    noise = (add_noise(grey, "correlated", 20, again, legacy=True) - 0.5) * 255
    values, vectors = np.linalg.eigh(wanted)
    np.testing.assert_allclose(np.cov(noise.reshape(-1, 3).T), vectors * values.clip(0) @ vectors.T, atol=8)  # 2 %


def test_every_draw_of_1000_is_in_its_range_and_every_branch_is_taken():
    rng = np.random.default_rng(0)
    for ranges in (VISIBLE, INFRARED):
        draws = [ranges.draw(rng) for _ in range(1000)]
        low, high = ranges.contrast
        assert all(low <= d.contrast <= high for d in draws)
        assert {d.noise_level for d in draws} == set(range(2, 21))
        assert {d.kernel_size for d in draws} == {7, 9, 11, 13}
        assert {q for d in draws for q in d.jpeg_qualities[:1]} == set(range(70, 90))
        assert {q for d in draws for q in d.jpeg_qualities[1:]} == set(range(30, 70))
        assert all(0 <= v <= 3 for d in draws for v in (*d.blur_variances, d.blur_angle / np.pi * 3))
        isotropic = [d for d in draws if d.blur_variances[0] == d.blur_variances[1]]
        assert all(d.blur_variances[0] <= 1.2**2 for d in isotropic)
        bright = [d.brightness for d in draws if d.brightness != 1]
        assert all(0.5 <= factor <= 1.5 for factor in bright)
        # Shares of 1000, within four standard deviations.
        noises = [sum(d.noise == kind for d in draws) for kind in ("independent", "shared", "correlated")]
        assert noises == pytest.approx([400, 400, 200], abs=65)
        twice, noise_first = sum(len(d.jpeg_qualities) - 1 for d in draws), sum(d.noise_first for d in draws)
        assert [len(isotropic), twice, noise_first] == pytest.approx([500] * 3, abs=65)
        assert len(bright) == pytest.approx(300, abs=60) if ranges is VISIBLE else not bright


def test_same_seed_same_degradation_and_another_seed_another():
    image = colour_image()
    first, state = degrade(image, 5), np.random.get_state()[1].copy()
    np.testing.assert_array_equal(degrade(image.astype(np.float64), 5), first)
    assert np.abs(degrade(image, 6) - first).max() > 0.01
    pairs = [degrade_pair(image, image[..., 0], (1, 2, 3)) for _ in range(2)]
    assert [part.shape for part in pairs[0]] == [image.shape, image.shape[:2]]
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # no global generator is touched


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 3), (64, 48, 3)])
def test_any_size_is_degraded_within_0_and_1(shape):
    for seed in range(8):
        image = np.random.default_rng(seed).random(shape, np.float32)
        before = image.copy()
        for ranges in (VISIBLE, INFRARED, VISIBLE.changed("legacy=1")):
            out = degrade(image, seed, ranges)
            assert out.shape == shape and out.dtype == np.float32 and 0 <= out.min() and out.max() <= 1
        np.testing.assert_array_equal(image, before)


def test_steps_are_in_the_published_order():
    image = colour_image()
    rng = np.random.default_rng(1)
    draw = next(d for d in iter(lambda: VISIBLE.draw(rng), None) if d.noise_first and len(d.jpeg_qualities) == 2)
    wanted = adjust_contrast(adjust_brightness(image, draw.brightness), draw.contrast)
    wanted = add_noise(wanted, draw.noise, draw.noise_level, np.random.default_rng(draw.noise_seed))
    wanted = blur(wanted, gaussian_kernel(draw.kernel_size, draw.blur_variances, draw.blur_angle))
    np.testing.assert_array_equal(draw.apply(image), jpeg(jpeg(wanted, draw.jpeg_qualities[0]), draw.jpeg_qualities[1]))


def test_changed_range_leaves_the_other_draws_alone():
    changed = VISIBLE.changed("contrast=0.2:0.3 second_jpeg_probability=1")
    one, other = (ranges.draw(np.random.default_rng(4)) for ranges in (VISIBLE, changed))
    assert 0.2 <= other.contrast <= 0.3 and len(other.jpeg_qualities) == 2
    same = dataclasses.replace(other, contrast=one.contrast, jpeg_qualities=one.jpeg_qualities)
    assert same == one


def test_published_infrared_loses_a_third_of_its_noise():
    grey = np.full((160, 160), 0.5, np.float32)
    changes = "contrast=1 noise_level=20 independent_probability=1 shared_probability=0 blur_sigma=0 jpeg_quality=100 "
    ranges = INFRARED.changed(changes + "anisotropic_probability=0 second_jpeg_probability=0")
    single = degrade_pair(grey, grey, 0, ir_ranges=ranges)[1].std() * 255
    published = degrade_pair(grey, grey, 0, ir_ranges=ranges.changed("legacy=1"))[1].std() * 255
    assert single == pytest.approx(20, rel=0.03)  # 25 600 samples
    assert published == pytest.approx(20 * np.sqrt(0.299**2 + 0.587**2 + 0.114**2), rel=0.03)


def test_published_correlated_noise_ignores_the_level():
    changes = "noise_level=2:20 independent_probability=0 shared_probability=0"
    levels = {VISIBLE.changed(f"{changes} legacy=1").draw(np.random.default_rng(i)).noise_level for i in range(30)}
    assert levels == {20}
    assert len({VISIBLE.changed(changes).draw(np.random.default_rng(i)).noise_level for i in range(30)}) > 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharpness=1:2", "with a name of brightness"),
        ("contrast", "contrast"),
        ("contrast=a:b", "contrast=a:b"),
        ("contrast=0.1:0.2:0.3", "must be two numbers"),
        ("legacy=0:1", "legacy=0:1"),
        ("legacy=0.5", "legacy=0.5"),
        ("contrast=0.9:0.7", "the lower first"),
        ("contrast=0:inf", "the lower first"),
        ("contrast=nan", "the lower first"),
        ("noise_level=2:inf", "the lower first"),
        ("noise_level=0:1e30", "the lower first"),
        ("noise_level=2.5:4", "whole numbers"),
        ("jpeg_quality=50:101", "jpeg_quality"),
        ("second_jpeg_probability=1.5", r"in \[0, 1\]"),
        ("independent_probability=0.8", "more than 1 together"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        VISIBLE.changed(text)


def test_images_that_are_none_are_refused():
    for image in (np.zeros((4, 4), np.uint8), np.full((4, 4), np.nan), np.zeros((4, 4, 4)), np.zeros((0, 4))):
        with pytest.raises(ValueError, match="an image must be"):
            degrade(image, 0)


# --- python dataprocessing.py --degrade ---------------------------------------------------------------------


def test_panel_shows_pairs_and_says_what_was_drawn(tmp_path, capsys):
    for number in range(6):
        write_pair(tmp_path / "SET", ("vi", "ir"), f"{number}.png", number, size=(20 + number, 30))
    argv = ["--degrade", "4", "--data", str(tmp_path / "SET"), "--out", str(tmp_path / "a.png")]
    assert dataprocessing.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 4 + 1 and all("JPEG" in line for line in printed[:-1])
    panel = cv2.imread(str(tmp_path / "a.png"))
    assert panel.shape == (20 + 21 + 23 + 24 + 4 * 4, 6 * 30 + 5 * 4, 3)  # rows of pairs 0, 1, 3 and 4
    original = cv2.imread(str(tmp_path / "SET" / "vi" / "0.png"))
    np.testing.assert_array_equal(panel[:20, :30], original)
    assert (panel[:20, 34:64] != original).any() and (panel[:20, 34:64] != panel[:20, 68:98]).any()
    first = (tmp_path / "a.png").read_bytes()
    assert dataprocessing.main([*argv[:-1], str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == first
    assert dataprocessing.main([*argv[:-1], str(tmp_path / "b.png"), "--degrade-vis", "contrast=0.1"]) == 0
    assert (tmp_path / "b.png").read_bytes() != first
    for number in range(1, 6):
        (tmp_path / "SET" / "ir" / f"{number}.png").write_bytes(b"no image")
    capsys.readouterr()
    assert dataprocessing.main([*argv[:-1], str(tmp_path / "c.png")]) == 2  # one bad pair is named, the rest is shown
    assert "3.png is not an image" in capsys.readouterr().err
    assert cv2.imread(str(tmp_path / "c.png")).shape[0] == 20 + 4


@pytest.mark.parametrize("options", [["--out", "a.jpg"], ["--degrade", "-1"], ["--degrade-ir", "x=1"]])
def test_bad_options_of_the_panel_are_one_line(tmp_path, monkeypatch, capsys, options):
    write_pair(tmp_path / "SET", ("vi", "ir"), "1.png", 1)
    monkeypatch.chdir(tmp_path)
    assert dataprocessing.main(["--degrade", "--data", "SET", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["SET"]
