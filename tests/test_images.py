"""Reading by the published grey rule, 8-bit writing, and pairing of files."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import InputError
from utils.images import Pair, find_modalities, list_pairs, read_grey, read_luma, write_grey

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)  # BGR


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
def test_colour_is_turned_to_grey_as_float_and_rounded_half_to_even(tmp_path, suffix):
    grey = read_grey(write(tmp_path / f"a{suffix}", COLOUR))
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
    assert read_luma(write(tmp_path / "a.png", ties))[0, 0] == pytest.approx(28.5, abs=1e-5)
    assert read_grey(tmp_path / "a.png")[0, 0] == 28


def test_grey_rule_is_not_the_grey_flag_of_opencv(tmp_path):
    many = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = write(tmp_path / "a.png", many)
    assert (read_grey(path) != cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)).any()


def test_luma_is_not_rounded(tmp_path):
    luma = read_luma(write(tmp_path / "a.png", COLOUR))
    assert (luma != np.round(luma)).any()
    np.testing.assert_array_equal(np.round(luma), read_grey(tmp_path / "a.png"))


def test_jpeg_is_read_as_decoded(tmp_path):
    path = write(tmp_path / "a.jpg", cv2.resize(COLOUR, (64, 48)))
    decoded = cv2.imread(str(path)).astype(np.float32)
    np.testing.assert_array_equal(read_grey(path), np.round(cv2.cvtColor(decoded, cv2.COLOR_BGR2GRAY)))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_keeps_its_depth(tmp_path, suffix):
    levels = np.array([[0, 1, 256, 32768, 65535]], np.uint16)
    grey = read_grey(write(tmp_path / f"a{suffix}", levels))
    np.testing.assert_allclose(grey, levels * (255 / 65535), rtol=1e-5, atol=1e-6)
    assert len(np.unique(grey)) == 5


def test_exif_orientation_is_applied(tmp_path):
    path = write(tmp_path / "a.jpg", np.zeros((16, 32, 3), np.uint8))
    plain = path.read_bytes()
    # A minimal Exif block: big-endian TIFF header, one tag, orientation (0x0112) = 6, a quarter turn.
    tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    block = b"Exif\x00\x00" + tiff
    path.write_bytes(plain[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + plain[2:])
    assert read_grey(path).shape == (32, 16)


@pytest.mark.parametrize("name", ["with space.png", "größe-图像.png", "a.b.c.png", "n" * 251 + ".png"])
def test_any_file_name_works(tmp_path, name):
    write_grey(tmp_path / name, np.full((4, 5), 7.0))
    np.testing.assert_array_equal(read_grey(tmp_path / name), np.full((4, 5), 7))


HUGE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    + (60000).to_bytes(4, "big") * 2
    + b"\x08\x00\x00\x00\x00"
    + zlib.crc32(b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00").to_bytes(4, "big")
)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40), HUGE])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="a.png is not an image of 8 or 16 bits"):
        read_grey(tmp_path / "a.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.png"):
        read_grey(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_float_files_are_refused(tmp_path, shape):
    path = write(tmp_path / "a.tiff", np.zeros(shape, np.float32))
    with pytest.raises(InputError, match="a.tiff is not an image of 8 or 16 bits"):
        read_grey(path)


def test_writing_rounds_half_up_and_clips(tmp_path):
    write_grey(tmp_path / "a.png", np.array([[-3.0, 0.49, 0.5, 1.5, 254.5, 300.0]]))
    assert read_grey(tmp_path / "a.png").tolist() == [[0, 0, 1, 2, 255, 255]]


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a.png", np.array([[1.0, np.nan]]), "NaN"),
        ("a.png", np.zeros((2, 2, 3)), r"\(2, 2, 3\)"),
        ("a.docx", np.zeros((2, 2)), "unknown image format"),
    ],
)
def test_unwritable_images_are_refused_and_the_old_file_kept(tmp_path, name, image, message):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        write_grey(tmp_path / name, image)
    assert (tmp_path / name).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_pairs_are_made_by_stem_sorted_and_the_unmatched_named(tmp_path):
    for name in ("vi/b.png", "vi/a.png", "vi/only.png", "ir/a.jpg", "ir/b.PNG", "ir/x.y.bmp"):
        write(tmp_path / name, COLOUR)
    for name in ("vi/notes.txt", "vi/.hidden.png", "ir/Thumbs.db"):
        (tmp_path / name).write_text("")
    (tmp_path / "vi/folder.png").mkdir()
    found = list_pairs(tmp_path / "vi", tmp_path / "ir")
    assert [(p.name, p.vis.name, p.ir.name) for p in found.pairs] == [("a", "a.png", "a.jpg"), ("b", "b.png", "b.PNG")]
    assert found.only_vis == ("only.png",) and found.only_ir == ("x.y.bmp",)
    assert "only.png" in found.unmatched() and "x.y.bmp" in found.unmatched()


def test_two_images_of_one_stem_are_refused(tmp_path):
    for name in ("vi/a.png", "vi/a.jpg", "ir/a.png"):
        write(tmp_path / name, COLOUR)
    with pytest.raises(InputError, match="share a name"):
        list_pairs(tmp_path / "vi", tmp_path / "ir")


def test_folders_without_a_common_name_are_refused(tmp_path):
    write(tmp_path / "vi/a.png", COLOUR)
    write(tmp_path / "ir/b.png", COLOUR)
    with pytest.raises(InputError, match="share no image name"):
        list_pairs(tmp_path / "vi", tmp_path / "ir")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        list_pairs(tmp_path / "vi", tmp_path / "none")


def test_pair_of_two_sizes_states_both(tmp_path):
    pair = Pair("a", write(tmp_path / "v.png", COLOUR), write(tmp_path / "i.png", COLOUR[:, :8]))
    with pytest.raises(InputError, match=r"11x9 .* 8x9"):
        pair.read()


@pytest.mark.parametrize("names", [("vi", "ir"), ("MRI", "CT"), ("MRI", "PET"), ("MRI", "SPECT")])
def test_modalities_are_found_visible_or_mri_first(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    assert find_modalities(tmp_path) == (tmp_path / names[0], tmp_path / names[1])


def test_folder_of_several_sets_is_refused(tmp_path):
    for name in ("MRI", "CT", "PET"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="MRI/ with CT/; MRI/ with PET/"):
        find_modalities(tmp_path)


def test_folder_without_modalities_names_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="vi/ and ir/"):
        find_modalities(tmp_path)
