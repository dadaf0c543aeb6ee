"""Two arrays in, one array out: conversion, normalisation, device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.common import ROOT, InputError
from utils.inference import fusing
from utils.inference.fusing import Fuser, fuse_arrays, load_fuser, min_max_normalise, pick_device, to_levels, to_network
from zoo import SYSTEMS, find_system
from zoo.cddfuse import CDDFuseSystem


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CDDFuseSystem().eval()


def test_conversion_to_the_network_and_back_keeps_every_level():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    tensor = to_network(levels)
    assert tensor.shape == (1, 1, 16, 16) and tensor.max() == 1
    np.testing.assert_array_equal(np.floor(to_levels(tensor) + 0.5), levels)


def test_normalisation_is_of_each_image():
    images = torch.stack([torch.linspace(0.2, 0.4, 12), torch.linspace(0.5, 0.9, 12)]).view(2, 1, 3, 4)
    normalised = min_max_normalise(images)
    assert normalised.amin(dim=(1, 2, 3)).tolist() == [0, 0] and normalised.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    assert min_max_normalise(torch.full((1, 1, 3, 3), 0.4)).eq(0.4).all()  # it has no range; published: NaN


def test_fused_image_has_the_size_of_the_sources_and_the_full_range(model):
    rng = np.random.default_rng(0)
    vis, ir = rng.uniform(0, 255, (2, 11, 17)).astype(np.float32)
    fused = fuse_arrays(model, vis, ir, "vis")
    assert fused.shape == (11, 17) and fused.min() == 0 and fused.max() == 255
    plain = fuse_arrays(model, vis, ir, "vis", normalise=False)
    np.testing.assert_allclose((plain - plain.min()) / np.ptp(plain) * 255, fused, atol=1e-3)  # float32 at 255
    coarse = fuse_arrays(model, vis, ir, "vis", normalise=False, precision="bfloat16")
    assert 0 < np.abs(coarse - plain).mean() < 0.5


@pytest.mark.parametrize(
    ("name", "has_it", "wanted", "warned"),
    [
        ("auto", True, "bfloat16", False),
        ("auto", False, "float32", False),
        ("bfloat16", True, "bfloat16", False),
        ("bfloat16", False, "bfloat16", True),
        ("float32", False, "float32", False),
    ],
)
def test_bfloat16_is_chosen_only_where_there_are_instructions_for_it(name, has_it, wanted, warned, monkeypatch, capsys):
    monkeypatch.setattr(fusing, "has_bfloat16", lambda device: has_it)
    assert fusing.pick_precision(name, torch.device("cpu")) == wanted
    assert ("float32 is much faster" in capsys.readouterr().err) == warned


def test_device_is_checked_before_use():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device cpu"):
        pick_device("nonsense")


def test_each_process_asks_its_own_gpu_alone(monkeypatch):
    asked, make = [], torch.zeros
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda *size, device: asked.append(device) or make(*size))
    assert pick_device("cuda") == torch.device("cuda:3") and asked == [torch.device("cuda:3")]
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("how", [lambda: pick_device("cpu"), lambda: load_fuser(CDDFuseSystem)])
def test_float32_is_not_tf32(how, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    how()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("size", [(64, 80), (61, 51)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_fuser_gives_one_result_with_and_without_gradients(name, size, monkeypatch):
    """Images larger than a tile, called as README does."""
    monkeypatch.setattr(fusing, "CPU_TILE_PIXELS", 2048)
    torch.manual_seed(0)
    system = find_system(name)().eval()
    fuser = Fuser(system, Path("none.pth"), system.skips[0], normalised=False).eval()
    vis, ir = torch.rand(2, 1, 1, *size)
    with_gradients = fuser(vis, ir)
    with torch.inference_mode():
        without = fuser(vis, ir)
    torch.testing.assert_close(with_gradients.detach(), without, rtol=0, atol=1e-5)
    with_gradients.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())


@pytest.mark.parametrize("bad", [torch.full((1, 1, 8, 8), 255.0), torch.full((1, 1, 8, 8), float("nan"))])
def test_a_fuser_refuses_what_is_not_in_its_range(model, bad):
    fuser, good = fusing.Fuser(model, None, "vis").eval(), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        assert fuser(good, good).shape == good.shape
        for pair, name in (((bad, good), "vis"), ((good, bad), "ir")):
            with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\]"):
                fuser(*pair)


@pytest.mark.parametrize("most", ["", "None"])
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages")
def test_heap_of_scripts_is_in_huge_pages(most):
    code = (
        f"from utils.inference.fusing import keep_freed_memory; keep_freed_memory({most})\n"
        "parts = open('/proc/self/smaps').read().split('VmFlags:')\n"
        "print(any('[heap]' in part and ' hg' in after.split('\\n')[0] for part, after in zip(parts, parts[1:])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
