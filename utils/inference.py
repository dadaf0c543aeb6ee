"""Two grey arrays -> one fused array: device, conversion between the two ranges, and normalisation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import net
from utils import InputError

# A processor's cache holds the feature maps of about so many pixels; a GPU is kept busier by whole images.
CPU_STRIP_PIXELS = 16384

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is CUDA where torch can use it, else the CPU.

    Raises:
        InputError: unknown name, or a device that torch cannot use here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); try --device cpu") from error
    return device


def keep_freed_memory() -> None:
    """Has the C library keep the memory that a step or an image frees, for the next one. For scripts.

    glibc gives large blocks back to the system at once and gets fresh, zeroed pages for the next: on the CPU that
    was measured to take up to a third of a training step. Elsewhere this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold, kept = -1, -3, 2**30  # the names of malloc.h
    mallopt(mmap_threshold, kept)
    mallopt(trim_threshold, kept)


def to_network(grey: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Grey levels (H, W) in [0, 255] -> (1, 1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(grey, dtype=np.float32) / np.float32(255)).to(device)[None, None]


def to_grey(image: Tensor) -> np.ndarray:
    """(1, 1, H, W) in [0, 1] -> grey levels (H, W) float32 in [0, 255], not rounded."""
    return image[0, 0].float().mul(255).cpu().numpy()


def stretch(image: Tensor) -> Tensor:
    """Moves the smallest value of each image to 0 and the largest to 1, as the published test scripts do.

    A constant image has no range to stretch and is left as it is (published: NaN). (B, C, H, W) -> same.
    """
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny), image)


@torch.inference_mode()
def fuse_arrays(
    model: Any, vis: np.ndarray, ir: np.ndarray, skip: str, *,
    normalise: bool | Callable[[Tensor], Tensor] = True, precision: str = "float32",
) -> np.ndarray:  # fmt: skip
    """Fuses two grey images with a system of the zoo.

    Args:
        model: the system, in evaluation mode, on the device to use.
        vis: visible or MRI, (H, W) in [0, 255].
        ir: infrared, CT, PET or SPECT, same shape.
        skip: what the decoder is given; one of `model.skips`.
        normalise: stretch the result to the full range; without it, values beyond the range are clipped. Or a
            function of the system's image (1, 1, H, W) that does it in another way, such as `utils.video.RunningRange`.
        precision: "float32", or "bfloat16" for autocast: faster and coarser.

    Returns:
        float32 (H, W) in [0, 255].

    Raises:
        InputError: a side is shorter than `model.smallest_side`.
    """
    if min(vis.shape) < model.smallest_side:
        raise InputError(f"{model.label} needs sides of at least {model.smallest_side} pixels, got {vis.shape}")
    device = next(model.parameters()).device
    strips = net.strips(CPU_STRIP_PIXELS if device.type == "cpu" else 0)
    with strips, torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32"):
        fused = model.fuse(to_network(vis, device), to_network(ir, device), skip)
    if callable(normalise):
        return to_grey(normalise(fused))
    return to_grey(stretch(fused) if normalise else fused.clamp(0, 1))
