"""Which files are a pair, how data sets name their folders, and what is said where neither is clear."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_file
from utils.common import InputError
from utils.data.pairs import (
    Pair,
    PairList,
    find_modalities,
    list_flat_pairs,
    list_pairs,
    refuse_one_source,
    role_names,
    task_of,
)

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)  # BGR


def folders(root: Path, vis: str, ir: str) -> tuple[Path, Path]:
    """Two folders with images of these names."""
    for role, names in (("vi", vis), ("ir", ir)):
        for name in names.split("|"):
            write_file(root / role / name, COLOUR)
    return root / "vi", root / "ir"


def names(found: PairList) -> list[tuple[str, str]]:
    return [(pair.vis.name, pair.ir.name) for pair in found.pairs]


def test_pairs_are_made_by_stem_sorted_and_the_unmatched_named(tmp_path):
    both = folders(tmp_path, "b.png|a.png|only.png", "a.jpg|b.PNG|x.y.bmp")
    for name in ("vi/notes.txt", "vi/.hidden.png", "ir/Thumbs.db"):
        (tmp_path / name).write_text("")
    (tmp_path / "vi/folder.png").mkdir()
    found = list_pairs(*both)
    assert [(p.name, p.vis.name, p.ir.name) for p in found.pairs] == [("a", "a.png", "a.jpg"), ("b", "b.png", "b.PNG")]
    assert found.only_vis == ("only.png",) and found.only_ir == ("x.y.bmp",)
    assert "only.png" in found.unmatched() and "x.y.bmp" in found.unmatched()


@pytest.mark.parametrize(
    ("vis", "ir", "proposed"),
    [
        ("FLIR_0010_RGB.jpg|FLIR_0009_RGB.jpg", "FLIR_0009_PreviewData.jpeg|FLIR_0010_PreviewData.jpeg", "number"),
        ("vi (1).jpeg|vi (2).jpeg", "ir (1).jpeg|ir (2).jpeg", "number"),
        ("0000_rgb.png|0001_rgb.png", "0000_nir.png|0001_nir.png", "number"),
        ("IMG_0000.jpg|IMG_0001.jpg", "THERM_0000.tiff|THERM_0001.tiff", "number"),
        ("1.png|2.png", "001_fused.png|002_fused.png", "number"),
        ("cam1_0000_a.png|cam1_0001_a.png", "cam2_0000_b.png|cam2_0001_b.png", "'([0-9]+)[^0-9]*$'"),
        ("00_day2.png|01_day2.png", "00_x.png|01_x.png", "'^[^0-9]*([0-9]+)'"),
    ],
)
def test_names_that_differ_are_not_paired_but_what_would_pair_them_is_said(tmp_path, vis, ir, proposed):
    both = folders(tmp_path, vis, ir)
    with pytest.raises(InputError, match="share no image name") as error:
        list_pairs(*both)
    said = str(error.value)
    found = list_pairs(*both, proposed.strip("'"))
    assert f"--pair-by {proposed} makes 2 pairs, such as {' with '.join(names(found)[0])}" in said
    assert str(found.pairs[0].vis) in said and str(found.pairs[0].ir) in said  # one name of each side
    assert names(found) == list(zip(sorted(vis.split("|")), sorted(ir.split("|")), strict=True))
    assert list_pairs(*both, "order") == found


def test_order_is_that_of_the_numbers_and_needs_equally_many(tmp_path):
    both = folders(tmp_path, "a.png|b.png|c.png", "9x.png|10x.png")
    with pytest.raises(InputError, match="vi has 3 images and .*ir 2"):
        list_pairs(*both, "order")
    with pytest.raises(InputError, match="use equal names"):
        list_pairs(*both)
    (tmp_path / "vi/c.png").unlink()
    with pytest.raises(InputError, match="--pair-by order if both are in one order"):
        list_pairs(*both)
    assert names(list_pairs(*both, "order")) == [("a.png", "9x.png"), ("b.png", "10x.png")]


def test_a_regular_expression_pairs_by_its_groups_and_names_the_rest(tmp_path):
    both = folders(tmp_path, "day_01_rgb.png|night_01_rgb.png|none.png", "x-day-01.png|x-night-01.png|other.png")
    found = list_pairs(*both, "(day|night).([0-9]+)")
    assert names(found) == [("day_01_rgb.png", "x-day-01.png"), ("night_01_rgb.png", "x-night-01.png")]
    assert (found.only_vis, found.only_ir) == (("none.png",), ("other.png",))
    for by, said in (
        ("number", "share a number"),
        ("01", "share a match of --pair-by 01"),
        ("(", "regular expression"),
    ):
        with pytest.raises(InputError, match=said):
            list_pairs(*both, by)


def test_two_images_of_one_stem_and_a_missing_folder_are_refused(tmp_path):
    vis, ir = folders(tmp_path, "a.png|a.jpg", "a.png")
    with pytest.raises(InputError, match="share a name"):
        list_pairs(vis, ir)
    with pytest.raises(FileNotFoundError, match="no image folder"):
        list_pairs(ir, tmp_path / "none")


def test_one_source_for_both_roles_is_refused_also_through_a_link(tmp_path):
    vis, ir = folders(tmp_path, "a.png", "a.png")
    refuse_one_source(vis, ir)
    (tmp_path / "link").symlink_to(vis)
    for other in (vis, tmp_path / "link"):
        with pytest.raises(InputError, match="one and the same"):
            refuse_one_source(vis, other)


def test_pairs_of_two_sizes_are_an_error_and_if_all_are_one_error(tmp_path):
    both = folders(tmp_path, "a.png|b.png", "a.png|b.png")
    list_pairs(*both).check_usable()
    write_file(tmp_path / "ir/a.png", COLOUR[:, :8])
    pair = Pair("a", tmp_path / "vi/a.png", tmp_path / "ir/a.png")
    with pytest.raises(InputError, match=r"11x9 .* 8x9"):
        pair.read()
    list_pairs(*both).check_usable()
    write_file(tmp_path / "ir/b.png", COLOUR[:7])
    with pytest.raises(InputError, match=r"not one of 2 pairs can be used. The first: .*11x9 .* 8x9"):
        list_pairs(*both).check_usable()


@pytest.mark.parametrize(
    ("vis", "ir"),
    [
        ("vi", "ir"), ("Vis", "Ir"), ("visible", "infrared"), ("visible", "lwir"), ("RGB", "thermal_8_bit"),
        ("MRI", "CT"), ("MRI", "PET"), ("mri", "spect"), ("img1", "img2"), ("train/vi", "train/ir"),
        ("Test/VI", "Test/IR"), ("visible/train", "infrared/train"),
    ],
)  # fmt: skip
def test_modalities_are_found_visible_or_mri_first(tmp_path, vis, ir):
    for name in (vis, ir):
        (tmp_path / name).mkdir(parents=True)
    assert find_modalities(tmp_path) == (tmp_path / vis, tmp_path / ir)
    roles = role_names(tmp_path / vis, tmp_path / ir)
    assert roles == tuple(re.sub("/?(train|test)/?", "", name, flags=re.IGNORECASE) for name in (vis, ir))


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ("MRI|CT|PET", "MRI/ with CT/; MRI/ with PET/"),
        ("RGB/train|ir/train|RGB/test|ir/test", "RGB/train/ with ir/train/; RGB/test/ with ir/test/"),
        ("train/vi|train/ir|test/vi|test/ir", "test/vi/ with test/ir/; train/vi/ with train/ir/"),
        ("hot|cold", "its sub-folders are cold, hot"),
    ],
)  # fmt: skip
def test_folders_of_several_sets_or_of_none_are_refused_and_what_was_seen_is_said(tmp_path, present, said):
    for name in present.split("|"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises((InputError, FileNotFoundError), match=f"{re.escape(said)}.*--vi DIR and --ir DIR"):
        find_modalities(tmp_path)


@pytest.mark.parametrize(
    ("vis", "ir", "task"),
    [
        ("MRI_CT/MRI", "MRI_CT/CT", "mif"), ("mri.png", "pet.png", "mif"), ("TNO/vi/01.png", "TNO/ir/01.png", "ivf"),
        ("0_RGB.png", "0_thermal.png", "ivf"), ("a.png", "b.png", ""), ("vi", "pet", ""),
        ("vi_mri.png", "ir_ct.png", ""),
    ],
)  # fmt: skip
def test_names_tell_the_task_only_where_both_do(vis, ir, task):
    assert task_of(Path(vis), Path(ir)) == task


def flat_folder(folder: Path, *names: str) -> Path:
    for name in names:
        write_file(folder / name, COLOUR)
    return folder


def test_numbered_files_of_one_folder_are_paired_by_number_and_in_its_order(tmp_path):
    files = "ct0.png mrict0.png ct10.png mrict10.jpg ct2.png mrict2.png ct3.png pet2.png"
    found = list_flat_pairs(flat_folder(tmp_path, *files.split()), "mrict", "ct")
    assert names(found) == [("mrict0.png", "ct0.png"), ("mrict2.png", "ct2.png"), ("mrict10.jpg", "ct10.png")]
    assert [pair.name for pair in found.pairs] == ["0", "2", "10"]
    assert (found.only_vis, found.only_ir) == ((), ("ct3.png",))
    exchanged = list_flat_pairs(tmp_path, "ct", "mrict")
    assert [pair.vis.name for pair in exchanged.pairs] == ["ct0.png", "ct2.png", "ct10.png"]


def test_stems_with_digits_and_dots_are_taken_literally(tmp_path):
    folder = flat_folder(tmp_path, "t1.w_01.png", "3d01.png", "t1xw_01.png")
    assert names(list_flat_pairs(folder, "t1.w_", "3d")) == [("t1.w_01.png", "3d01.png")]


@pytest.mark.parametrize(
    ("present", "stems", "message"),
    [
        (("ct1.png", "mr2.png"), ("mr", "ct"), "the stems in it are ct, mr"),
        (("a.png",), ("mr", "ct"), "nothing"),
        (("a12.png", "a2.png"), ("a", "a1"), "of either role"),
        (("a1.png", "a2.png"), ("a", "a"), "of either role"),
        (("a1.png", "a1.jpg", "b1.png"), ("a", "b"), "share a name"),
    ],
)
def test_flat_folders_without_clear_pairs_are_refused(tmp_path, present, stems, message):
    with pytest.raises(InputError, match=message):
        list_flat_pairs(flat_folder(tmp_path, *present), *stems)
