"""Fixtures that several test files share: deterministic images and weights, and the data of others if at hand."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.data.patches import PatchDataset, PatchWriter
from utils.training.loop import Run
from utils.training.options import Options
from utils.training.stages import Stage


def formula_image(c: float, height: int = 40, width: int = 56) -> Tensor:
    """The image I(c) behind the golden numbers: (1, 1, H, W) float32 in [0, 1], a sum of two waves."""
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)[None]
    image = 0.5 + 0.25 * torch.sin(0.37 * y + 0.11 * x + c) + 0.2 * torch.cos(0.23 * x - 0.05 * y * (c + 1))
    return image.float()[None, None]


def formula_colour(c: float, height: int = 40, width: int = 56) -> Tensor:
    """The colour image behind the golden numbers, (1, 3, H, W): channel k has k more in one wave, 2 k in the other."""
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)[None]
    k = torch.arange(3, dtype=torch.float64)[:, None, None]
    first, second = torch.sin(0.37 * y + 0.11 * x + c + k), torch.cos(0.23 * x - 0.05 * y * (c + 1) + 2 * k)
    return (0.5 + 0.25 * first + 0.2 * second).float()[None]


def set_formula_weights(network: nn.Module) -> None:
    """Gives a network the deterministic weights behind the golden numbers."""
    floating = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    for t, (key, value) in enumerate(floating.items()):
        i = torch.arange(value.numel(), dtype=torch.float64)
        phase = ((1.7 * i + 0.9 * t) + 0.3) + ((0.013 * i) * i % 6.283185307179586)
        vector = value.ndim in (1, 3)
        scale = 0.1 if vector else (value.numel() / value.shape[0]) ** -0.5
        starts_at_one = value.ndim == 3 or key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight"))
        value.copy_((float(starts_at_one) + scale * torch.sin(phase)).reshape(value.shape))


def write_pair(folder: Path, names: tuple[str, str], name: str, seed: int, size: tuple[int, int] = (64, 72)) -> None:
    """A small structured pair: folder/<names[0]>/name (colour) and folder/<names[1]>/name (grey)."""
    rng = np.random.default_rng(seed)
    for channels, modality in zip((3, 1), names, strict=True):
        coarse = rng.uniform(0, 255, (8, 8, channels)).astype(np.float32)
        image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).reshape(*size, channels)
        (folder / modality).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / modality / name), pixels)


def write_file(path: Path, pixels: np.ndarray) -> Path:
    """An image file, blue first, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


def run_of(model: nn.Module, stage: Stage, vis: Tensor, out: Path, **options: float) -> Run:
    """A training of one stage, on patches that are given to its steps by hand; `vis` is one batch of them."""
    dataset = PatchDataset.__new__(PatchDataset)  # the loop asks for its length alone
    dataset.vis = vis
    return Run(model, [stage], Options(**options), dataset, {}, {"commit": "", "init": ""}, out, "w.pth")


@pytest.fixture
def patch_file(tmp_path: Path) -> Path:
    """Six patches of noise, 16 x 16, and one held-out pair, 48 x 48."""
    rng = np.random.default_rng(0)
    with PatchWriter(tmp_path / "patches.h5", 16) as writer:
        writer.add(*rng.uniform(0, 255, (2, 6, 16, 16)))
        writer.add_validation("one", *rng.uniform(0, 255, (2, 48, 48)))
    return tmp_path / "patches.h5"


@pytest.fixture(scope="session")
def fusion_data() -> Path:
    """The folder of benchmark images; the test is skipped where FUSION_DATA does not name one."""
    folder = os.environ.get("FUSION_DATA")
    if not folder:
        pytest.skip("FUSION_DATA is not set: the benchmark images belong to their publishers and are not shipped")
    return Path(folder)
