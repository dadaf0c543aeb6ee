"""Hashes of images and lists, and the verdict on a copy of a set."""

from __future__ import annotations

import hashlib
import json
import shutil

import cv2
import numpy as np
import pytest

from tests.conftest import write_pair
from tools import make_manifest as tool
from utils.common import InputError, write_json
from utils.data.manifests import (
    FOLDER,
    grey_hash,
    list_hash,
    make_manifest,
    name_of_list,
    pair_hash,
    read_manifests,
    verify,
)

PUBLISHED = {"TNO": 25, "RoadScene": 50, "MRI_CT": 21, "MRI_PET": 42, "MRI_SPECT": 73}


@pytest.fixture
def small_set(tmp_path):
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        write_pair(tmp_path / "SMALL", ("vi", "ir"), name, seed, size=(20, 24))
    return tmp_path / "SMALL"


def test_grey_hash_is_the_sha256_of_size_and_bytes():
    image = np.array([[1, 2, 3], [4, 5, 255]], dtype=np.float32)
    assert grey_hash(image) == hashlib.sha256(b"2x3 1\n" + bytes([1, 2, 3, 4, 5, 255])).hexdigest()
    assert grey_hash(image.astype(np.uint8)) == grey_hash(image)
    assert grey_hash(image.reshape(3, 2)) != grey_hash(image)
    assert grey_hash(image + np.float32(0.25)) != grey_hash(image)


def test_neither_order_nor_names_count_but_every_pixel_does():
    a, b, c = (np.full((4, 4), level, dtype=np.float32) for level in (1, 2, 3))
    assert pair_hash(a, b) == pair_hash(b, a) != pair_hash(a, c)
    pairs = [pair_hash(a, b), pair_hash(a, c)]
    assert list_hash(pairs) == list_hash(reversed(pairs)) != list_hash(pairs[:1])


def test_a_copy_is_recognised(small_set):
    verdict = verify(small_set, make_manifest(small_set))
    assert verdict.is_published() and str(verdict) == "6 of 6 files as published"


def test_every_kind_of_difference_is_named(small_set):
    manifest = make_manifest(small_set)
    (small_set / "ir" / "a.png").unlink()
    image = cv2.imread(str(small_set / "vi" / "b.png"))
    (small_set / "vi" / "b.png").unlink()
    cv2.imwrite(str(small_set / "vi" / "b.bmp"), image)  # the same levels in another file
    image[0, 0] += 9
    cv2.imwrite(str(small_set / "vi" / "c.png"), image)
    (small_set / "ir" / "c.png").write_bytes(b"no image")
    shutil.copy(small_set / "ir" / "b.png", small_set / "ir" / "d.png")
    (small_set / "ir" / "notes.txt").write_text("ignored")
    verdict = verify(small_set, manifest)
    assert verdict.published == ("vi/a.png", "ir/b.png")
    assert verdict.same_image == ("vi/b.png",)
    assert verdict.different == ("vi/c.png", "ir/c.png")
    assert verdict.missing == ("ir/a.png",)
    assert verdict.extra == ("ir/d.png",)
    assert not verdict.is_published()
    assert str(verdict) == (
        "2 of 6 files as published; 1 in another file format or version with the same grey levels; "
        "2 different: ir/c.png, vi/c.png; 1 missing: ir/a.png; 1 extra: ir/d.png"
    )


def test_a_manifest_needs_whole_pairs(small_set):
    (small_set / "ir" / "a.png").unlink()
    with pytest.raises(InputError, match=r"no infrared .* partner for a.png; a manifest needs whole pairs"):
        make_manifest(small_set)


def test_lists_are_found_by_hash(small_set, tmp_path):
    manifest = make_manifest(small_set)
    write_json(tmp_path / "manifests" / "SMALL.json", manifest)
    assert read_manifests(tmp_path / "manifests") == [manifest]
    assert name_of_list(manifest["images"], tmp_path / "manifests") == "SMALL"
    assert name_of_list("0" * 64, tmp_path / "manifests") is None


@pytest.mark.parametrize("content", ["no json", "[]", '{"set": "A"}', '{"set": "A", "images": "", "files": 3}'])
def test_what_is_no_manifest_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match="bad.json is not a manifest"):
        read_manifests(tmp_path)


def test_tool_writes_a_manifest_and_never_replaces_another_list(small_set, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert tool.main([str(small_set), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == make_manifest(small_set)
    assert "3 pairs" in capsys.readouterr().out
    before = out.read_bytes()
    assert tool.main([str(small_set), "--out", str(out)]) == 0 and out.read_bytes() == before
    for modality in ("vi", "ir"):
        (small_set / modality / "a.png").unlink()
    assert tool.main([str(small_set), "--out", str(out)]) == 2 and out.read_bytes() == before
    assert "lists other images" in capsys.readouterr().err
    assert tool.main([str(small_set), str(small_set), "--out", str(out)]) == 2


def test_published_sets_are_listed_whole():
    manifests = {manifest["set"]: manifest for manifest in read_manifests()}
    assert {name: manifest["pairs"] for name, manifest in manifests.items()} == PUBLISHED
    for name, manifest in manifests.items():
        assert (FOLDER / f"{name}.json").is_file()
        assert [len(files) for files in manifest["files"].values()] == [PUBLISHED[name]] * 2


def test_the_smallest_published_set_is_the_listed_one(fusion_data):
    folder = fusion_data / "test_img" / "MRI_CT"
    manifest = next(manifest for manifest in read_manifests() if manifest["set"] == "MRI_CT")
    assert make_manifest(folder) == manifest and verify(folder, manifest).is_published()
