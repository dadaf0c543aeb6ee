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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import net
from utils.common import InputError
from utils.inference import memory
from utils.inference.fusing import fuse_arrays, run_plan
from utils.inference.memory import BoundedWorkspace, Plan, format_size, parse_size, plan_memory
from utils.training.monitor import feature_maps
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


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 TB", "two"])
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
        smallest = memory.piece_memory(height, width, memory.SMALLEST_PIECE) * 5 // 4
        assert free < memory.LIBRARY_BYTES + memory.IMAGE_BYTES * height * width + smallest
        return
    assert plan.working + plan.map_room == free
    assert memory.SMALLEST_PIECE <= plan.pixels <= memory.CPU_PIECE_PIXELS


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
    whole = run_plan(model, vis, ir, "vis", Plan(0, 0, 0), net.Workspace(), normalise=False)
    workspace = BoundedWorkspace(int(maps * memory.MAP_BYTES * height * width), scratch=tmp_path_factory.mktemp("maps"))
    got = run_plan(model, vis, ir, "vis", Plan(pixels, 0, 0), workspace, normalise=False)
    np.testing.assert_allclose(got, whole, rtol=0, atol=255e-6)  # float32; sums are ordered differently
    assert workspace.most["device"] <= workspace.room["device"]
    if maps < 1 and pixels < height * width:
        assert workspace.most["scratch"] > 0
    gc.collect()
    assert not any(workspace._taken.values()) and not list(workspace.scratch.iterdir())


def test_maps_of_a_pair_are_two_and_four_with_room_for_values(model):
    vis, ir = pair(40, 60)
    for room, kept in ((10**9, 2), (memory.MAP_BYTES * 40 * 60, 1)):
        workspace = BoundedWorkspace(room)
        run_plan(model, vis, ir, "vis", Plan(500, 0, 0), workspace)
        assert workspace.most["device"] == kept * memory.MAP_BYTES * 40 * 60


def test_full_disk_is_one_line_that_names_the_folder(model, monkeypatch, tmp_path):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"scratch file of 2 MB in .*No space left.*--scratch"):
        run_plan(model, *pair(40, 60), "vis", Plan(500, 0, 0), BoundedWorkspace(0, scratch=tmp_path))
    assert not list(tmp_path.iterdir())


def test_missing_scratch_folder_is_one_line(tmp_path):
    workspace = BoundedWorkspace(0, scratch=tmp_path / "none")
    with pytest.raises(InputError, match="No such file"):
        workspace.new_map((1, 64, 3, 3), torch.zeros(1))


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
        patch.setattr(memory, "CPU_PIECE_PIXELS", memory.SMALLEST_PIECE)
        free = plan_memory(64, 80, free=10**9).working
    monkeypatch.setattr("utils.inference.fusing.memory_to_take", lambda device, most: free if most else 10**9)
    bounded = fuse_arrays(model, vis, ir, "vis", max_memory=10**9, scratch=tmp_path)
    assert made and set(made) == {tmp_path}
    np.testing.assert_allclose(bounded, fuse_arrays(model, vis, ir, "vis"), rtol=0, atol=255e-5)  # after stretching


def test_out_of_memory_on_the_device_is_tried_again_with_half_and_said(model, monkeypatch, capsys):
    vis, ir = pair(24, 30)
    wanted, fuse, seen = fuse_arrays(model, vis, ir, "vis"), model.fuse, []

    def fails_twice(*args):
        seen.append(net._setting.get().workspace.room["device"])
        if len(seen) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fuse(*args)

    monkeypatch.setattr(model, "fuse", fails_twice)
    got = fuse_arrays(model, vis, ir, "vis")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=255e-5)
    assert seen[0] > seen[1] > seen[2]
    assert capsys.readouterr().err.count("out of memory on cpu; trying again with") == 2


def test_out_of_memory_is_not_tried_again_where_smaller_pieces_do_not_help(monkeypatch):
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


def test_sizes_are_printed_in_one_unit():
    assert format_size(12_288_000_000) == "12.3 GB" and format_size(999_000) == "1 MB"


class Elsewhere(net.Workspace):
    """Some maps lie where no layer can use them, as in host memory for a GPU; here, in another precision."""

    def __init__(self, every=1):
        self.every, self.made = every, 0

    def new_map(self, shape, like):
        self.made += 1
        return super().new_map(shape, like if self.made % self.every else like.double())

    def spare_map(self, shape, like):
        return None

    def fetch(self, piece):
        return piece.float()


class NoMixing(TorchFunctionMode):
    """Refuses operations on maps here and elsewhere, as a GPU does. Pieces may be written to either."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.Tensor.__setitem__ and function is not torch.Tensor.copy_:
            found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim == 4]
            assert len({x.dtype for x in found}) < 2, function
        return function(*args, **kwargs)


# Both images together are more than a piece, which the encoder cuts. One image, which the decoder sees, is one piece in
# the first case, and more in the others.
@pytest.mark.parametrize(("pieces", "every"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("system", ["cddfuse", "fsidfusion", "mlfuse"])
def test_map_elsewhere_is_fetched_before_it_is_used(system, pieces, every):
    torch.manual_seed(0)
    model = find_system(system)().eval()
    height, width = 40, 48
    vis, ir = torch.from_numpy(pair(height, width) / 255)[:, None, None]
    skip = model.default_skip("ivf", "ivf")
    workspace = Elsewhere(every)
    with torch.inference_mode():
        wanted = model.fuse(vis, ir, skip)
        with net.strips(height * width // pieces, workspace), NoMixing():
            fused = model.fuse(vis, ir, skip)
    assert workspace.made >= every or system == "mlfuse"
    torch.testing.assert_close(fused, wanted, rtol=0, atol=1e-5)
