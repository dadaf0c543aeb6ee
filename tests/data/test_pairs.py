"""Which files are a pair, how data sets name their folders, and what is said where neither is clear."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.common import InputError
from utils.data.pairs import Pair, find_modalities, list_flat_pairs, list_pairs

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)  # BGR


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


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


def flat_folder(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, COLOUR)
    return folder


def test_numbered_files_of_one_folder_are_paired_by_number_and_in_its_order(tmp_path):
    folder = flat_folder(
        tmp_path, "ct0.png", "mrict0.png", "ct10.png", "mrict10.jpg", "ct2.png", "mrict2.png", "ct3.png", "pet2.png"
    )
    found = list_flat_pairs(folder, "mrict", "ct")
    assert [(pair.name, pair.vis.name, pair.ir.name) for pair in found.pairs] == [
        ("0", "mrict0.png", "ct0.png"), ("2", "mrict2.png", "ct2.png"), ("10", "mrict10.jpg", "ct10.png"),
    ]  # fmt: skip
    assert (found.only_vis, found.only_ir) == ((), ("ct3.png",))
    exchanged = list_flat_pairs(folder, "ct", "mrict")
    assert [pair.vis.name for pair in exchanged.pairs] == ["ct0.png", "ct2.png", "ct10.png"]


def test_stems_with_digits_and_dots_are_taken_literally(tmp_path):
    folder = flat_folder(tmp_path, "t1.w_01.png", "3d01.png", "t1xw_01.png")
    assert [pair.name for pair in list_flat_pairs(folder, "t1.w_", "3d").pairs] == ["01"]


@pytest.mark.parametrize(
    ("names", "stems", "message"),
    [
        (("ct1.png", "mr2.png"), ("mr", "ct"), "the stems in it are ct, mr"),
        (("a.png",), ("mr", "ct"), "nothing"),
        (("a12.png", "a2.png"), ("a", "a1"), "of either role"),
        (("a1.png", "a2.png"), ("a", "a"), "of either role"),
        (("a1.png", "a1.jpg", "b1.png"), ("a", "b"), "share a name"),
    ],
)
def test_flat_folders_without_clear_pairs_are_refused(tmp_path, names, stems, message):
    with pytest.raises(InputError, match=message):
        list_flat_pairs(flat_folder(tmp_path, *names), *stems)
