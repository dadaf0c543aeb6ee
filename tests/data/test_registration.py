"""The alignment check finds shifts between unlike sensors; homographies are read and applied."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from utils.common import InputError
from utils.data.pairs import find_modalities, list_pairs
from utils.data.registration import coverage, edge_shift, read_homography, resize, warp


def scene(height=90, width=120, seed=0):
    coarse = np.random.default_rng(seed).uniform(0, 255, (height // 6, width // 6)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 1), (4, 0), (0, -7), (-3, 5)])
def test_shift_is_found_between_an_image_and_its_inverted_shifted_noisy_self(down, right):
    whole = scene(130, 160)
    vis = whole[20:110, 20:140]
    ir = 200 - 0.6 * whole[20 - down : 110 - down, 20 - right : 140 - right]
    ir = ir + np.random.default_rng(1).normal(0, 3, ir.shape)
    shift = edge_shift(vis, ir)
    assert (shift.down, shift.right) == (down, right)
    assert shift.misaligned == (shift.pixels > 2)
    assert shift.correlation <= 1.000001 and shift.correlation >= shift.unshifted


def test_unrelated_constant_and_tiny_images_are_no_reason_to_warn():
    constant = np.full((64, 64), 7.0, np.float32)
    assert edge_shift(constant, scene(64, 64)) is None
    assert edge_shift(np.zeros((31, 64)), np.zeros((31, 64))) is None
    for seed in range(0, 40, 2):
        for size in ((40, 50), (90, 120), (160, 120)):
            assert not edge_shift(scene(*size, seed), scene(*size, seed + 1)).misaligned, (seed, size)


def test_roadscene_is_aligned_and_a_shift_of_it_is_noticed(fusion_data):
    # RoadScene is published as registered: none of its 50 pairs may raise a false alarm.
    pairs = [pair.read() for pair in list_pairs(*find_modalities(fusion_data / "test_img" / "RoadScene")).pairs]
    assert not any(edge_shift(vis, ir).misaligned for vis, ir in pairs)
    found = [edge_shift(vis[5:, :-4], ir[:-5, 4:]) for vis, ir in pairs]
    assert sum(shift.misaligned for shift in found) >= 48
    assert sum(abs(shift.down - 5) <= 1 and abs(shift.right + 4) <= 1 for shift in found) >= 45


def test_homographies_in_three_formats_are_the_same(tmp_path):
    matrix = np.array([[1.1, 0.02, 3], [-0.01, 0.9, -4], [1e-5, 0, 1]])
    np.save(tmp_path / "h.npy", matrix)
    (tmp_path / "h.json").write_text(json.dumps(matrix.tolist()))
    (tmp_path / "h.txt").write_text("\n".join(", ".join(map(repr, row)) for row in matrix.tolist()) + "\n\n")
    for name in ("h.npy", "h.json", "h.txt"):
        np.testing.assert_array_equal(read_homography(tmp_path / name), matrix)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("h.txt", "1 0 0\n0 1 0\n", "shape (2, 3)"),
        ("h.txt", "1 0 0\n0 1\n0 0 1\n", "not a homography"),
        ("h.txt", "1 0 x\n0 1 0\n0 0 1\n", "not a homography"),
        ("h.txt", "1 0 nan\n0 1 0\n0 0 1\n", "not finite"),
        ("h.txt", "1 0 0\n1 0 0\n0 0 1\n", "inverted"),
        ("h.json", "{", "not a homography"),
        ("h.json", '{"a": 1}', "not a homography"),
        ("h.npy", "no array", "not a homography"),
    ],
)
def test_what_is_not_a_homography_is_said(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")) as error:
        read_homography(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_warp_takes_infrared_pixels_to_visible_ones_and_keeps_colour():
    image = np.zeros((20, 30, 3), np.float32)
    image[5, 7] = 200, 100, 50
    moved = warp(image, np.array([[1, 0, 4], [0, 1, 2], [0, 0, 1.0]]), (25, 40))
    assert moved.shape == (25, 40, 3)
    np.testing.assert_array_equal(moved[7, 11], image[5, 7])
    assert coverage((20, 30), np.eye(3), (20, 60)) == pytest.approx(0.5, abs=0.02)


def test_resizing_keeps_the_mean_and_the_range():
    image = scene(40, 60)
    for size in ((20, 30), (80, 120), (20, 120)):
        resized = resize(image, size)
        assert resized.shape == size and resized.mean() == pytest.approx(image.mean(), rel=0.01)
        assert image.min() <= resized.min() and resized.max() <= image.max()
