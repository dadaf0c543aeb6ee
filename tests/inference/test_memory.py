"""The memory plan, and feature maps that lie in scratch files."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.common import InputError, resident_memory
from utils.inference import memory
from utils.inference.fusing import feature_maps, fuse_arrays, fuse_with_tiles
from utils.inference.memory import BoundedMemory, parse_size, plan_memory
from utils.tiles import Tiles
from zoo import find_system
from zoo.cddfuse import CDDFuseSystem


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CDDFuseSystem().eval()


def pair(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (2, height, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2e9), ("500 mb", 5e8), ("1.5GiB", 1.5 * 2**30), ("64k", 64e3), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.2", "2 TB", "two", "9" * 400, "9" * 305 + "GB"])
def test_other_sizes_are_refused_with_an_example(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write 2GB"):
        parse_size(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(height=st.integers(2, 20_000), width=st.integers(2, 20_000), megabytes=st.integers(1, 20_000))
def test_plan_stays_within_what_is_free_or_says_what_it_needs(height, width, megabytes):
    free = megabytes * 10**6
    try:
        plan = plan_memory(height, width, free=free)
    except InputError as error:
        assert "--max-memory" in str(error)
        smallest = memory.tile_memory(height, width, memory.SMALLEST_TILE) * 5 // 4
        assert free < memory.LIBRARY_BYTES + memory.IMAGE_BYTES * height * width + smallest
        return
    assert 0 <= plan.map_room < free
    assert memory.SMALLEST_TILE <= plan.pixels <= memory.CPU_TILE_PIXELS


def test_24_megapixels_fit_4_gb_and_100_megapixels_fit_8_gb_by_the_plan():
    resident = 500 * 10**6  # more than Python, torch and the weights were seen to take
    for height, width, allowed in ((4000, 6000, 4), (8000, 12_500, 8)):
        assert plan_memory(height, width, free=allowed * 10**9 - resident).map_room >= 0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    pixels=st.integers(20, 900),
    maps=st.floats(0, 4.5),  # room, in units of the two maps that must lie somewhere
)
def test_result_is_that_of_the_whole_image_wherever_the_maps_lie(model, tmp_path_factory, height, width, pixels, maps):
    vis, ir = pair(height, width)
    whole = fuse_with_tiles(model, vis, ir, "vis", Tiles(0), normalise=False)
    bounded = BoundedMemory(
        int(maps * CDDFuseSystem.map_bytes * height * width), scratch=tmp_path_factory.mktemp("maps")
    )
    got = fuse_with_tiles(model, vis, ir, "vis", Tiles(pixels, bounded), normalise=False)
    np.testing.assert_allclose(got, whole, rtol=0, atol=255e-6)  # float32; sums are ordered differently
    assert bounded.most <= bounded.room
    if maps < 1 and pixels < height * width:
        assert bounded.in_files > 0
    gc.collect()
    assert not bounded.taken and not list(bounded.scratch.iterdir())


def test_maps_of_a_pair_are_those_that_the_plan_counts(model):
    bounded = BoundedMemory(10**9)
    fuse_with_tiles(model, *pair(40, 60), "vis", Tiles(500, bounded))
    one_channel = 4 * 40 * 60  # what the decoder makes, before the sigmoid
    assert bounded.most == model.map_bytes * 40 * 60 + one_channel


def test_full_disk_is_one_line_that_names_the_folder(model, monkeypatch, tmp_path):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"scratch file of 2 MB in .*No space left.*--scratch"):
        fuse_with_tiles(model, *pair(40, 60), "vis", Tiles(500, BoundedMemory(0, scratch=tmp_path)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="No such file"):
        BoundedMemory(0, scratch=tmp_path / "none").new_map((1, 64, 3, 3), torch.zeros(1))


def test_too_little_memory_is_refused_with_what_it_takes(model):
    vis, ir = pair(600, 800)
    with pytest.raises(InputError, match=r"800x600 pixels need \d+ MB .*--max-memory"):
        fuse_arrays(model, vis, ir, "vis", max_memory=10**6)


def test_max_memory_does_not_change_the_result(model, tmp_path, monkeypatch):
    vis, ir = pair(64, 80)
    made = []
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda dir, make=tempfile.TemporaryFile: made.append(dir) or make(dir=dir)
    )
    with monkeypatch.context() as patch:
        patch.setattr(memory, "CPU_TILE_PIXELS", memory.SMALLEST_TILE)
        free = 10**9 - plan_memory(64, 80, free=10**9).map_room
    monkeypatch.setattr("utils.inference.fusing.memory_to_take", lambda device, most: free if most else 10**9)
    bounded = fuse_arrays(model, vis, ir, "vis", max_memory=10**9, scratch=tmp_path)
    assert made and set(made) == {tmp_path}
    np.testing.assert_allclose(bounded, fuse_arrays(model, vis, ir, "vis"), rtol=0, atol=255e-5)  # after normalisation


def test_out_of_memory_on_the_device_is_tried_again_with_half_and_said(model, monkeypatch, capsys):
    vis, ir = pair(24, 30)
    monkeypatch.setattr(memory, "CPU_TILE_PIXELS", 256)
    wanted, fuse, seen = fuse_arrays(model, vis, ir, "vis"), model.fuse_tiled, []

    def fails_twice(*args):
        seen.append(args[-1].memory.room)
        if len(seen) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fuse(*args)

    monkeypatch.setattr(model, "fuse_tiled", fails_twice)
    got = fuse_arrays(model, vis, ir, "vis")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=255e-5)
    assert seen[0] > seen[1] > seen[2]
    assert capsys.readouterr().err.count("out of memory on cpu; trying again with") == 2


def test_out_of_memory_is_not_tried_again_where_smaller_tiles_do_not_help(monkeypatch):
    model = find_system("tsdm")().eval()
    calls = []

    def fails(*args):
        calls.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "fuse", fails)
    with pytest.raises(InputError, match="no memory for one of 30x24 pixels .*--device cpu"):
        fuse_arrays(model, *pair(24, 30), model.default_skip("ivf", "ivf"))
    assert len(calls) == 1


def test_features_that_do_not_fit_are_not_drawn_and_that_is_said(model, monkeypatch, capsys):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert len(feature_maps(model, *pair(24, 30))) == 4
    monkeypatch.setattr(model, "features", fails)
    assert feature_maps(model, *pair(24, 30)) == {} and "no memory for the features" in capsys.readouterr().err


def test_a_system_of_whole_images_says_before_it_starts_what_it_needs():
    model = find_system("tsdm")().eval()
    with pytest.raises(InputError, match=r"TSDM-Fusion works on whole images: 800x600 pixels need .* GB.*--max-memory"):
        fuse_arrays(model, *pair(600, 800), "none", max_memory=resident_memory() + 50 * 10**6)


def test_a_system_that_says_nothing_about_tiles_is_taken_for_one_that_has_none(capsys):
    class New(torch.nn.Module):
        label, smallest_side, whole_bytes = "New", 1, 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def fuse(self, vis, ir, skip):
            return (vis + ir) / 2

    fuse_arrays(New(), *pair(20, 30), "none", max_memory=10**9)
    assert "New works on whole images, so --max-memory does not bound it" in capsys.readouterr().err
