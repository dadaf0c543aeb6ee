"""Every file is read right, or refused in a line; what is left out of it is named."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

import dataprocessing
import fuse
import test_IVF
from tests.conftest import write_file, write_pair
from utils.common import InputError
from utils.data import readers
from utils.data.images import read_colour, read_grey
from utils.data.pairs import list_pairs, read_as
from utils.data.patches import PatchDataset
from utils.data.readers import Reading, decode, pages_in, stem_of
from utils.data.video import VideoPair

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
COUNTS = RNG.integers(7000, 8000, (20, 30), dtype=np.uint16)  # a 14-bit thermal camera


def tiff(path: Path, *args: object, **options: object) -> Path:
    tifffile.imwrite(path, *args, **options)
    return path


def rescaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("depth", [8, 16])
def test_tiff_colours_of_every_layout_are_the_same(tmp_path, options, planes, depth):
    rgb = (RGB >> (16 - depth)).astype(np.uint8 if depth == 8 else np.uint16)
    stored = rgb if planes == "contig" else np.moveaxis(rgb, -1, 0)
    path = tiff(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes, **options)
    np.testing.assert_allclose(read_colour(path), rgb * (255 / (2**depth - 1)), atol=1e-4)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_file_whose_zero_is_white_is_read_so(tmp_path, kind):
    grey = (RGB[..., 0] >> (16 - 8 * np.dtype(kind).itemsize)).astype(kind)
    path = tiff(tmp_path / "a.tif", grey, photometric="miniswhite")
    np.testing.assert_allclose(read_grey(path), 255 - grey * (255 / np.iinfo(kind).max), atol=1e-4)


def test_what_tifffile_leaves_to_imagecodecs_is_read_by_opencv_where_that_is_right(tmp_path):
    (tmp_path / "lzw.tif").write_bytes(cv2.imencode(".tif", RGB)[1].tobytes())
    np.testing.assert_allclose(read_colour(tmp_path / "lzw.tif"), RGB[..., ::-1] * (255 / 65535), atol=1e-4)
    indexed = Image.fromarray((RGB >> 8).astype(np.uint8)).convert("P")
    indexed.save(tmp_path / "palette.tif")
    np.testing.assert_array_equal(read_colour(tmp_path / "palette.tif"), np.array(indexed.convert("RGB")))


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.float32, np.float64])
def test_values_without_an_agreed_range_are_refused_until_one_is_given(tmp_path, kind):
    values = COUNTS.astype(kind) - (7300 if kind == np.int16 else 0)
    path = tiff(tmp_path / "a.tif", values)
    with pytest.raises(InputError, match=rf"a.tif holds {np.dtype(kind)} values from .*--ir-range LOW HIGH"):
        read_grey(path, Reading("ir"))
    low, high = values.min() + 100.0, values.max() - 100.0
    np.testing.assert_allclose(read_grey(path, Reading("ir", (low, high))), rescaled(values, low, high), atol=1e-3)


def test_nan_and_values_beyond_a_full_range_are_refused(tmp_path):
    share = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(read_grey(tiff(tmp_path / "a.tif", share), Reading(range="full")), share * 255)
    with pytest.raises(InputError, match="float32 values from 0 to 2"):
        read_grey(tiff(tmp_path / "b.tif", share * 2), Reading(range="full"))
    share[1, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        read_grey(tiff(tmp_path / "c.tif", share), Reading(range="full"))


def test_pages_of_a_tiff_file_are_named_and_can_be_chosen(tmp_path, capsys):
    pages = np.stack([RGB[..., 0], RGB[..., 1]])
    path = tiff(tmp_path / "a.tif", pages, photometric="minisblack")
    np.testing.assert_allclose(read_grey(path), pages[0] * (255 / 65535), atol=1e-4)
    read_grey(path)
    assert capsys.readouterr().err == f"note: {path} holds 2 pages, and the first is taken; --slice takes others\n"
    np.testing.assert_allclose(read_grey(path, Reading(page=2)), pages[1] * (255 / 65535), atol=1e-4)
    with pytest.raises(InputError, match="there is no --slice 3"):
        read_grey(path, Reading(page=3))


def test_a_deep_file_that_uses_little_of_its_range_is_named_with_what_helps(tmp_path, capsys):
    path = write_file(tmp_path / "a.png", COUNTS)
    np.testing.assert_allclose(read_grey(path, Reading("ir")), COUNTS * (255 / 65535), atol=1e-4)
    said = capsys.readouterr().err
    assert f"{path} holds uint16 values from {COUNTS.min()} to {COUNTS.max()}, 1.5% of 0 to 65535" in said
    assert said.count("\n") == 1 and "--ir-range auto" in said
    read_grey(write_file(tmp_path / "b.png", COUNTS), Reading("ir"))  # once a folder
    read_grey(path, Reading("ir", "full"))
    assert capsys.readouterr().err == ""
    read_grey(write_file(tmp_path / "vi/a.png", (COUNTS - 6900) // 9), Reading("vi"))  # 8-bit values in a 16-bit file
    assert "0.2% of 0 to 65535" in capsys.readouterr().err


def test_a_nearly_constant_source_is_named_whatever_its_depth(tmp_path, capsys):
    read_grey(write_file(tmp_path / "a.png", np.full((20, 30), 77, np.uint8)))
    assert "a.png is nearly constant: 77.0 to 77.0 of 255" in capsys.readouterr().err


def arguments(given: dict) -> argparse.Namespace:
    return argparse.Namespace(
        **{"vi_range": None, "ir_range": None, "window": None, "slice": None, "ir_from_alpha": False} | given
    )


def test_auto_is_one_range_for_all_files_and_is_said(tmp_path, capsys):
    for i, offset in enumerate((0, 500)):
        write_file(tmp_path / f"vi/{i}.png", (RGB >> 8).astype(np.uint8))
        write_file(tmp_path / f"ir/{i}.png", COUNTS + np.uint16(offset))
    found = read_as(list_pairs(tmp_path / "vi", tmp_path / "ir"), arguments({"ir_range": ["auto"]}))
    low, high = np.percentile(np.stack([COUNTS, COUNTS + 500]), (0.5, 99.5))
    for pair, offset in zip(found.pairs, (0, 500), strict=True):
        np.testing.assert_allclose(pair.read()[1], rescaled(COUNTS + offset, low, high), atol=1e-3)
    assert capsys.readouterr().err == (
        f"note: --ir-range auto: {low:g} becomes black, {high:g} white, in all of {tmp_path / 'ir'}\n"
    )


@pytest.mark.parametrize("given", [["5", "5"], ["9", "1"], ["nan", "1"], ["0", "inf"], ["1"], ["all"], ["1e999", "2"]])
def test_ranges_that_are_none_are_refused(given):
    with pytest.raises(InputError, match="--ir-range must be two growing numbers, auto or full"):
        readers.readings_of(arguments({"ir_range": given}))


def test_alpha_that_varies_is_named_or_taken_as_infrared(tmp_path, capsys):
    rgba = RNG.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    rgba[..., 3] = np.maximum(rgba[..., 3], 1)
    rgba[:5, :, 3] = 0
    path = write_file(tmp_path / "a.png", rgba)
    np.testing.assert_array_equal(read_colour(path), rgba[..., 2::-1])
    said = capsys.readouterr().err
    assert "alpha channel from 0 to 255, which is left out; --ir-from-alpha" in said and "25% of its pixels" in said
    np.testing.assert_array_equal(read_grey(path, Reading("ir", alpha=True)), rgba[..., 3])
    deep = tiff(tmp_path / "a.tif", np.dstack([RGB, COUNTS]), photometric="rgb", extrasamples=["unspecified"])
    read = read_grey(deep, Reading("ir", (7000, 8000), alpha=True))
    np.testing.assert_allclose(read, rescaled(COUNTS, 7000, 8000), atol=1e-3)
    capsys.readouterr()
    read_grey(write_file(tmp_path / "opaque/a.png", np.dstack([rgba[..., :3], np.full((20, 30), 255, np.uint8)])))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="no fourth channel"):
        read_grey(write_file(tmp_path / "b.png", rgba[..., :3]), Reading("ir", alpha=True))


def test_four_channel_files_fuse_their_fourth_with_their_colours(tmp_path, capsys):
    rgba = cv2.resize(RNG.integers(0, 256, (6, 6, 4), dtype=np.uint8), (60, 50))
    for file, pixels in (("rgbt/a.png", rgba), ("vi.png", rgba[..., :3]), ("ir.png", rgba[..., 3])):
        write_file(tmp_path / file, pixels)
    base = ("--device", "cpu", "--no-check")
    assert fuse.main([*base, "--vi", str(tmp_path / "rgbt"), "--ir-from-alpha", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    two = ("--vi", str(tmp_path / "vi.png"), "--ir", str(tmp_path / "ir.png"))
    assert fuse.main([*base, *two, "--out", str(tmp_path / "f.png")]) == 0
    np.testing.assert_array_equal(read_colour(tmp_path / "out/a.png"), read_colour(tmp_path / "f.png"))


@pytest.mark.parametrize(("suffix", "said"), [(".gif", "2 frames"), (".png", "2 frames"), (".webp", "")])
def test_moving_images_give_their_first_frame_and_say_so(tmp_path, capsys, suffix, said):
    frames = [Image.fromarray((RGB[..., i] >> 8).astype(np.uint8)) for i in range(2)]
    more = {"save_all": True, "append_images": frames[1:]} if said else {"lossless": True}
    frames[0].save(tmp_path / f"a{suffix}", **more)
    np.testing.assert_array_equal(read_grey(tmp_path / f"a{suffix}"), RGB[..., 0] >> 8)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_files_that_are_cut_off_are_refused(tmp_path, suffix, share):
    whole = cv2.imencode(suffix, RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))[1].tobytes()
    (tmp_path / f"a{suffix}").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=f"a{suffix}"):
        read_grey(tmp_path / f"a{suffix}")
    assert readers._is_cut(whole[:-8]) == (suffix in (".jpg", ".png"))  # what OpenCV 4 does not notice
    if suffix in (".jpg", ".png"):
        (tmp_path / f"a{suffix}").write_bytes(whole + b"\xff\xda and what cameras append")
        read_grey(tmp_path / f"a{suffix}")


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match="not a file"):
            read_grey(path)


def huge_png(path: Path) -> None:
    """20000 x 20000 pixels as their header says; of the pixels nothing is ever read."""
    size = (20000).to_bytes(4, "big") * 2
    chunks = [b"IHDR" + size + b"\x08\x02\x00\x00\x00", b"IDAT" + zlib.compress(bytes(10**6)), b"IEND"]
    written = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def counts_and_one_bad(folder: Path) -> None:
    """Two good pairs with counts of 14 bits as infrared images, and between them one that is far too large."""
    for i, name in enumerate(("a.png", "c.png")):
        write_pair(folder, ("vi", "ir"), name, i)
        grey = cv2.imread(str(folder / "ir" / name), cv2.IMREAD_GRAYSCALE)
        write_file(folder / "ir" / name, grey.astype(np.uint16) + np.uint16(7000))
    for side in ("vi", "ir"):
        huge_png(folder / side / "b.png")


@pytest.mark.parametrize("script", ["fuse", "test_IVF", "dataprocessing"])
def test_scripts_leave_out_what_does_not_fit_and_take_a_range(tmp_path, capsys, monkeypatch, script):
    monkeypatch.setattr(readers, "free_memory", lambda: 8 * 10**9)
    counts_and_one_bad(tmp_path / "S")
    folders = ("--vi", tmp_path / "S/vi", "--ir", tmp_path / "S/ir")
    main, options = {
        "fuse": (fuse.main, ("--device", "cpu", *folders, "--out", tmp_path / "out", "--no-check")),
        "test_IVF": (test_IVF.main, ("--device", "cpu", "--data", tmp_path / "S", "--out", tmp_path / "out")),
        "dataprocessing": (dataprocessing.main, (*folders, "--out", tmp_path / "p.h5", "--patch-size", "32")),
    }[script]
    assert main([*map(str, options), "--ir-range", "7000", "7255"]) == 2
    said = capsys.readouterr().err
    assert "b.png is 20000x20000 pixels, which take 14.4 GB to read, and 8.0 GB are left" in said
    assert "uint16" not in said  # the range was given
    if script == "dataprocessing":
        data = PatchDataset(tmp_path / "p.h5")
        with h5py.File(tmp_path / "p.h5") as file:
            assert file.attrs["ir_range"] == "(7000.0, 7255.0)" and file.attrs["vi_range"] == "as stored"
        counts = cv2.imread(str(tmp_path / "S/ir/a.png"), cv2.IMREAD_UNCHANGED)[:32, :32]
        np.testing.assert_array_equal(data.ir[0], counts - 7000)
    else:
        folder = tmp_path / "out" if script == "fuse" else tmp_path / "out/CDDFuse_IVF/S"
        assert sorted(path.stem for path in folder.glob("*.png")) == ["a", "c"]
    if script == "test_IVF":
        assert json.loads((folder / "metrics.json").read_text())["ir_range"] == [7000, 7255]


def test_memory_that_was_allowed_counts_and_what_runs_out_costs_the_pair(tmp_path, capsys, monkeypatch):
    huge_png(tmp_path / "a.png")
    with pytest.raises(InputError, match="--max-memory"):
        read_grey(tmp_path / "a.png", Reading(memory=10**9))
    counts_and_one_bad(tmp_path / "S")

    def none_left(*_: object) -> None:
        raise MemoryError

    patches = ["--data", tmp_path / "S", "--patch-size", "32", "--out", tmp_path / "p.h5", "--max-memory", "4GB"]
    assert dataprocessing.main([*map(str, patches)]) == 2
    said = capsys.readouterr().err
    assert "b.png is 20000x20000 pixels" in said and "give --max-memory more; left out" in said

    with monkeypatch.context() as patch, pytest.raises(InputError, match="a.png does not fit into the memory"):
        patch.setattr(readers, "check_size", none_left)
        read_grey(tmp_path / "a.png")
    monkeypatch.setattr(fuse, "read_sources", none_left)
    base = ["--device", "cpu", "--vi", str(tmp_path / "S/vi"), "--ir", str(tmp_path / "S/ir")]
    assert fuse.main([*base, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("there is not enough memory; left out") == 3
    one = ["--vi", f"{base[3]}/a.png", "--ir", f"{base[5]}/a.png", "--out", str(tmp_path / "f.png")]
    assert fuse.main([*base[:2], *one]) == 2
    assert capsys.readouterr().err == "error: there is not enough memory\n"


def test_patches_of_constant_sources_are_not_advised_to_be_smaller(tmp_path, capsys):
    for side in ("vi", "ir"):
        write_file(tmp_path / side / "a.png", np.full((64, 64), 90, np.uint8))
    base = ["--vi", str(tmp_path / "vi"), "--ir", str(tmp_path / "ir"), "--out", str(tmp_path / "p.h5")]
    assert dataprocessing.main([*base, "--patch-size", "32"]) == 2
    said = capsys.readouterr().err
    assert "ir/a.png is nearly constant" in said and "--ir-range auto" in said and "--patch-size" not in said
    assert dataprocessing.main([*base, "--patch-size", "128"]) == 2
    assert "try a --patch-size below 128" in capsys.readouterr().err


def test_a_video_of_16_bits_is_read_with_all_of_them_and_one_range(tmp_path, capsys):
    frames = [COUNTS, COUNTS + np.uint16(500)]
    kind = [cv2.VIDEOWRITER_PROP_DEPTH, cv2.CV_16U, cv2.VIDEOWRITER_PROP_IS_COLOR, 0]
    for name in ("vi", "ir"):
        code = cv2.VideoWriter.fourcc(*"FFV1")
        video = cv2.VideoWriter(str(tmp_path / f"{name}.mkv"), cv2.CAP_FFMPEG, code, 25, (30, 20), kind)
        for frame in frames:
            video.write(frame)
        video.release()
    both = VideoPair(tmp_path / "vi.mkv", tmp_path / "ir.mkv", readings=(Reading("vi"), Reading("ir", "auto")))
    read = [load() for _, load in both]
    said = capsys.readouterr().err
    assert "vi.mkv, frame 1 holds uint16 values" in said and "--ir-range auto: 7" in said
    low, high = np.percentile(np.stack(frames), (0.5, 99.5))
    for (vis, ir), frame in zip(read, frames, strict=True):
        np.testing.assert_allclose(vis.grey, frame * (255 / 65535), atol=1e-4)
        np.testing.assert_allclose(ir.grey, rescaled(frame, low, high), atol=1e-3)


def write_dicom(path: Path, values: np.ndarray, **more: object) -> Path:
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    signed = values.dtype.kind == "i"
    data.set_pixel_data(values, str(more.pop("kind", "MONOCHROME2")), 8 * values.dtype.itemsize)
    assert data.PixelRepresentation == signed
    for name, value in more.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_has_slope_window_and_monochrome1(tmp_path):
    stored = RNG.integers(0, 2000, (20, 30), dtype=np.uint16)
    units = stored * 1.0 - 1024
    scanner = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    with pytest.raises(InputError, match="float64 values from -10.*--ir-range LOW HIGH"):
        read_grey(write_dicom(tmp_path / "a.dcm", stored, **scanner), Reading("ir"))
    low, high = 40 - 200, 40 + 199  # of width 400: 400 values, PS3.3 C.11.2.1.2.1
    path = write_dicom(tmp_path / "b.dcm", stored, **scanner, WindowCenter=[40, 300], WindowWidth=[400, 1500])
    np.testing.assert_allclose(read_grey(path), rescaled(units, low, high), atol=1e-3)
    _, ir = readers.readings_of(arguments({"window": (300.0, 100.0)}))
    np.testing.assert_allclose(read_grey(path, ir), rescaled(units, 250, 349), atol=1e-3)
    path = write_dicom(tmp_path / "c.dcm", (stored // 8).astype(np.uint8), kind="MONOCHROME1")
    np.testing.assert_array_equal(read_grey(path), 255 - stored // 8)
    rgb = (RGB >> 8).astype(np.uint8)
    np.testing.assert_array_equal(read_colour(write_dicom(tmp_path / "d.dcm", rgb, kind="RGB")), rgb)


@pytest.mark.parametrize("wrong", [{"RescaleSlope": 0, "RescaleIntercept": 5},
                                   {"WindowCenter": 1.7e308, "WindowWidth": 1.7e308}])  # fmt: skip
def test_dicom_whose_range_is_none_is_refused_and_its_frames_are_at_most_its_bytes(tmp_path, wrong):
    path = write_dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8), NumberOfFrames=2**31, **wrong)
    assert pages_in(path) == 1
    path = write_dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8), **wrong)
    with pytest.raises(InputError, match="say with --ir-range LOW HIGH"):
        read_grey(path, Reading("ir"))


def test_a_nifti_volume_gives_its_slices_as_dicom_shows_them(tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    volume = RNG.integers(-1000, 1000, (7, 50, 60), dtype=np.int16)  # x to the left, z from head to feet, y to the back
    affine = np.array([[0, 0, -1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]])
    affine[:3, :3] = [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]  # axes: z down, y back, x left
    path = tmp_path / "mri.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    with pytest.raises(InputError, match="mri.nii.gz holds 7 slices; choose one with --slice N"):
        decode(path)
    with pytest.raises(InputError, match="int16 values .* --vi-range LOW HIGH"):
        decode(path, Reading("vi", page=1))
    for page in (1, 7):  # from the feet; rows from the front, columns from the patient's right
        wanted = rescaled(volume[7 - page], -900, 900)
        np.testing.assert_allclose(decode(path, Reading("vi", (-900, 900), page=page)), wanted, atol=1e-3)
    nibabel.save(nibabel.Nifti1Image((volume + 1000).astype(np.int32), affine), tmp_path / "ct.nii")
    assert stem_of(path) == "mri"
    options = ["--slice", "all", "--vi-range", "-1000", "1000", "--ir-range", "0", "2000", "--task", "mif"]
    both = ["--vi", str(path), "--ir", str(tmp_path / "ct.nii"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert fuse.main([*both, *options]) == 0, capsys.readouterr().err
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [f"mri_{i}.png" for i in range(1, 8)]
    assert fuse.main([*both[:-4], "--out", str(tmp_path / "one.png"), *options]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_medical_files_name_the_package_that_is_missing(tmp_path, monkeypatch):
    for name, module in (("a.dcm", "pydicom"), ("a.nii", "nibabel")):
        (tmp_path / name).write_bytes(bytes(1000))
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f"{name} needs a package .*pip install {module}"):
            decode(tmp_path / name)


def test_two_constant_sources_are_not_normalised(tmp_path, capsys):
    for side in ("vi", "ir"):
        write_file(tmp_path / f"{side}.png", np.zeros((50, 60), np.uint8))
    both = ["--vi", str(tmp_path / "vi.png"), "--ir", str(tmp_path / "ir.png"), "--out", str(tmp_path / "f.png")]
    assert fuse.main([*both, "--device", "cpu"]) == 0
    assert read_grey(tmp_path / "f.png").mean() < 10  # it was 54: the border of the network's zero, blown up
    said = capsys.readouterr().err
    assert "vi.png is nearly constant" in said and "ir.png is nearly constant" in said


FORMATS = (".png", ".jpg", ".tif", ".bmp", ".webp", ".pgm", ".gif", ".dcm", ".nii")


@pytest.mark.slow
def test_mutated_images_are_read_in_their_size_or_refused_in_a_line(tmp_path):
    draw, counts = random.Random(0), collections.Counter()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    medical = {
        ".dcm": write_dicom(tmp_path / "whole.dcm", pixels[..., 0]).read_bytes(),
        ".nii": pytest.importorskip("nibabel").Nifti1Image(pixels[..., :1], np.eye(4)).to_bytes(),
    }
    for i in range(1300):
        suffix = FORMATS[i % len(FORMATS)]
        if suffix in medical:
            data = bytearray(medical[suffix])
        else:
            data = bytearray(cv2.imencode(suffix, pixels[..., 0] if suffix == ".pgm" else pixels)[1].tobytes())
        for _ in range(draw.choice([1, 1, 3, 20])):
            place = draw.randrange(draw.choice([64, len(data)]))  # headers more often than chance would have it
            kind = draw.randrange(3)
            if kind == 0:
                data[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[place : place + draw.choice([1, 100, len(data)])]
            else:
                data[place:place] = draw.randbytes(draw.choice([1, 100]))
            if len(data) < 64:
                break
        path = tmp_path / f"{i}{suffix}"
        path.write_bytes(data)
        try:
            read = read_grey(path, Reading(memory=4 * 10**9))
        except (InputError, OSError) as error:
            counts["refused"] += 1
            assert "\n" not in str(error)
        else:
            counts["read"] += 1
            assert read.ndim == 2 and np.isfinite(read).all() and 0 <= read.min() <= read.max() <= 255
    print(f"\n{dict(counts)} of {counts.total()} mutated images")
    assert min(counts.values()) > 100
