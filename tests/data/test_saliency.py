"""Visual saliency maps: the shipped ones pixel for pixel, a map worked by hand, and its properties."""

from __future__ import annotations

import numpy as np
import pytest

from utils.data.images import read_colour, read_luma
from utils.data.saliency import visual_saliency


@pytest.mark.parametrize("name", ["img1", "img2"])
def test_maps_shipped_with_the_published_code_are_equal_in_every_pixel(fusion_data, name):
    folder = fusion_data / "mlfuse" / "train_example"
    shipped = read_colour(folder / f"vsm_{name}" / "0.png")
    np.testing.assert_array_equal(visual_saliency(read_colour(folder / name / "0.png")), shipped)


def test_map_of_a_grey_file_may_be_made_of_its_grey_levels(fusion_data):
    folder = fusion_data / "mlfuse" / "train_example"  # img2 is grey, in three equal channels
    shipped = read_luma(folder / "vsm_img2" / "0.png")
    np.testing.assert_array_equal(visual_saliency(read_luma(folder / "img2" / "0.png")), np.round(shipped))


def test_map_equals_the_one_worked_by_hand():
    image = np.array([[0, 0], [4, 4], [10, 4]], np.uint8)
    # S(0) = 3 * 4 + 10 = 22, S(4) = 2 * 4 + 6 = 14, S(10) = 2 * 10 + 3 * 6 = 38; (22 - 14) / (38 - 14) = 1 / 3
    np.testing.assert_array_equal(visual_saliency(image), [[85, 85], [0, 0], [255, 0]])
    assert visual_saliency(np.full((4, 5), 77, np.uint8)).max() == 0


def test_map_equals_the_sum_of_distances_to_all_other_pixels():
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    flat = image.ravel().astype(float)
    sums = np.abs(flat[:, None] - flat).sum(axis=1)
    wanted = np.floor(255 * (sums - sums.min()) / np.ptp(sums) + 0.5)
    np.testing.assert_array_equal(visual_saliency(image).ravel(), wanted)  # all channels share one histogram


def test_levels_are_rounded_half_to_even_as_in_the_grey_rule():
    image = np.random.default_rng(0).uniform(0, 255, (8, 8)).astype(np.float32)
    np.testing.assert_array_equal(visual_saliency(image), visual_saliency(np.round(image).astype(np.uint8)))


@pytest.mark.parametrize(
    "image", [np.zeros((0, 4)), np.full((2, 2), 256.0), np.full((2, 2), -1.0), np.full((2, 2), np.nan)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"\[0, 255\]"):
        visual_saliency(image)
