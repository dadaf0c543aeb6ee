"""Reading by the published grey rule, and writing."""

from __future__ import annotations

import os

import cv2
import numpy as np
import pytest

from tests.conftest import write_file
from utils.common import InputError
from utils.data.images import (
    chroma,
    is_coloured,
    read_colour,
    read_grey,
    read_luma,
    with_colour_of,
    write_image,
)

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)  # BGR


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
def test_colour_is_turned_to_grey_as_float_and_rounded_half_to_even(tmp_path, suffix):
    grey = read_grey(write_file(tmp_path / f"a{suffix}", COLOUR))
    b, g, r = (COLOUR[..., i].astype(np.float64) for i in range(3))
    wanted = 0.114 * b + 0.587 * g + 0.299 * r
    assert grey.dtype == np.float32 and grey.shape == (9, 11)
    away_from_ties = np.abs(wanted % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(grey[away_from_ties], np.round(wanted)[away_from_ties])


def test_rounding_is_half_to_even(tmp_path):
    # 0.587 * 250 = 146.75 and so on never tie; grey + 0.5 does: 0.299 * 0 + 0.587 * 0 + 0.114 * 250 = 28.5
    ties = np.zeros((1, 2, 3), np.uint8)
    ties[0, 0, 0] = 250  # 28.5 -> 28
    ties[0, 1] = (250, 0, 0)
    assert read_luma(write_file(tmp_path / "a.png", ties))[0, 0] == pytest.approx(28.5, abs=1e-5)
    assert read_grey(tmp_path / "a.png")[0, 0] == 28


def test_luma_is_not_rounded(tmp_path):
    luma = read_luma(write_file(tmp_path / "a.png", COLOUR))
    assert (luma != np.round(luma)).any()
    np.testing.assert_array_equal(np.round(luma), read_grey(tmp_path / "a.png"))


def test_exif_orientation_is_applied(tmp_path):
    path = write_file(tmp_path / "a.jpg", np.zeros((16, 32, 3), np.uint8))
    plain = path.read_bytes()
    # A minimal Exif block: big-endian TIFF header, one tag, orientation (0x0112) = 6, a quarter turn.
    tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    block = b"Exif\x00\x00" + tiff
    path.write_bytes(plain[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + plain[2:])
    assert read_grey(path).shape == (32, 16)


@pytest.mark.parametrize("name", ["with space.png", "größe-图像.png", "a.b.c.png", "n" * 251 + ".png"])
def test_any_file_name_works(tmp_path, name):
    write_image(tmp_path / name, np.full((4, 5), 7.0))
    np.testing.assert_array_equal(read_grey(tmp_path / name), np.full((4, 5), 7))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="a.png is not an image of 8 or 16 bits"):
        read_grey(tmp_path / "a.png")


def test_writing_rounds_half_up_or_truncates_and_clips(tmp_path):
    write_image(tmp_path / "a.png", np.array([[-3.0, 0.49, 0.5, 1.5, 254.5, 300.0]]))
    assert read_grey(tmp_path / "a.png").tolist() == [[0, 0, 1, 2, 255, 255]]
    write_image(tmp_path / "a.png", np.array([[0.99, 1.5, 254.999, 255.0]]), truncate=True)
    assert read_grey(tmp_path / "a.png").tolist() == [[0, 1, 254, 255]]
    write_image(tmp_path / "a.png", np.array([[[300.0, -20.0, 100.5]]]))
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [101, 0, 255]  # blue first in OpenCV


@pytest.mark.parametrize(
    ("name", "image", "bits", "message"),
    [
        ("a.png", np.array([[1.0, np.nan]]), 8, "NaN"),
        ("a.png", np.array([[1.0, np.nan]]), 16, "NaN"),
        ("a.png", np.zeros((2, 2, 4)), 8, r"\(2, 2, 4\)"),
        ("a.docx", np.zeros((2, 2)), 8, "unknown image format"),
        ("a.jpg", np.zeros((2, 2)), 16, "cannot hold 16 bits"),
        ("a.jpg", np.zeros((1, 66000)), 8, r"66000x1 pixels do not fit .* use \.png"),
        ("a.pgm", np.zeros((2, 2, 3)), 8, "no colours"),
        ("a.pbm", np.zeros((2, 2)), 8, "cannot be written in this format"),
    ],
)
def test_unwritable_images_are_refused_and_the_old_file_kept(tmp_path, name, image, bits, message):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        write_image(tmp_path / name, image, bits=bits)
    assert (tmp_path / name).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_colours_are_read_red_first_and_written_as_they_are(tmp_path):
    path = write_file(tmp_path / "a.png", COLOUR)
    colours = read_colour(path)
    np.testing.assert_array_equal(colours, COLOUR[..., ::-1])
    write_image(tmp_path / "b.png", colours)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "b.png")), COLOUR)


def test_chroma_is_the_full_range_rule_of_jpeg():
    rgb = COLOUR[..., ::-1].astype(np.float32)
    wanted = cv2.cvtColor(rgb / 255, cv2.COLOR_RGB2YCrCb)[..., [2, 1]] * 255 - 127.5
    np.testing.assert_allclose(chroma(rgb), wanted, rtol=0, atol=0.2)  # OpenCV rounds its factors to 0.564 and 0.713
    primaries = np.float32([[[0, 0, 255], [255, 0, 0]]])
    np.testing.assert_allclose(chroma(primaries)[0, :, [0, 1]].diagonal(), [127.5, 127.5], atol=1e-4)


def test_an_image_with_its_own_colour_and_luma_is_itself():
    rgb = COLOUR[..., ::-1].astype(np.float32)
    luma = rgb @ np.float32([0.299, 0.587, 0.114])
    np.testing.assert_allclose(with_colour_of(luma, rgb), rgb, rtol=0, atol=1e-3)  # float32 at 255
    brighter = with_colour_of(luma + 10, rgb)
    np.testing.assert_allclose(brighter, rgb + 10, rtol=0, atol=1e-3)  # all of the range is luma: no 16..235


def test_two_colours_are_averaged_by_their_own_size_and_grey_has_no_say():
    orange, blue = np.full((2, 2, 3), [250, 120, 20], np.float32), np.full((2, 2, 3), [80, 100, 160], np.float32)
    grey = np.full((2, 2, 3), 90, np.float32)
    fused = np.full((2, 2), 128, np.float32)
    a, b = chroma(orange)[0, 0], chroma(blue)[0, 0]
    wanted = (a * abs(a) + b * abs(b)) / (abs(a) + abs(b))
    np.testing.assert_allclose(chroma(with_colour_of(fused, orange, blue))[0, 0], wanted, rtol=0, atol=1e-3)
    np.testing.assert_allclose(with_colour_of(fused, orange, grey), with_colour_of(fused, orange), rtol=0, atol=1e-3)
    np.testing.assert_allclose(with_colour_of(fused, grey, grey), 128, rtol=0, atol=1e-3)
    assert is_coloured(orange) and not is_coloured(grey)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_written_and_read_back_to_half_a_step(suffix, tmp_path):
    image = np.random.default_rng(0).uniform(0, 255, (9, 11, 3)).astype(np.float32)
    image[0, 0], image[0, 1] = 300, -5  # clipped
    path = tmp_path / f"image{suffix}"
    write_image(path, image, bits=16)
    np.testing.assert_allclose(read_colour(path), np.clip(image, 0, 255), atol=0.5 / 257 + 1e-4)
    write_image(path, image[..., 0], bits=16)
    np.testing.assert_allclose(read_grey(path), np.clip(image[..., 0], 0, 255), atol=0.5 / 257 + 1e-4)


def test_portable_anymaps_hold_what_they_can(tmp_path):
    grey = np.arange(240, dtype=np.float32).reshape(12, 20)
    colour = np.stack([grey, grey[::-1], grey], axis=-1)
    for name, image in (("a.pgm", grey), ("b.ppm", grey), ("c.PPM", colour)):
        write_image(tmp_path / name, image)
        np.testing.assert_array_equal(
            read_colour(tmp_path / name), np.broadcast_to(image.reshape(12, 20, -1), colour.shape)
        )
