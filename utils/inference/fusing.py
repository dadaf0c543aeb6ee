"""Two images -> one fused image: weights, device, memory, conversion between the two ranges, normalisation, colour."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.common import InputError, file_sha256, free_memory, in_checkout, reason_of, resident_memory
from utils.data.images import with_colour_of
from utils.data.sources import Source
from utils.inference.memory import (
    CPU_TILE_PIXELS,
    BoundedMemory,
    Plan,
    format_size,
    parse_size,
    plan_memory,
)
from utils.tiles import Tiles

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PUBLISHED = "published"  # for --weights; and the folder in this checkout that the published repository is cloned into
HUGE_PAGE = 2**21  # bytes
COLOURS = ("both", "vis", "ir", "none")  # whose colours a fused image has
PUBLISHED_REPOSITORY = "https://github.com/Zhaozixiang1228/MMIF-CDDFuse"

SKIP_HELP = (
    "image that the decoder is given: vis, sum or none (default: the published rule for the weights and the task)"
)


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that fuses: where, how exactly, and in how much memory."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--max-memory", type=parse_size, metavar="SIZE", help="such as 2GB; same result (default: what is free)")
    add("--scratch", type=Path, metavar="DIR", help="for what does not fit (default: the system's temporary folder)")


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is CUDA where torch can use it, else the CPU. For scripts.

    Each of several processes that torchrun started has its own GPU.

    Raises:
        InputError: unknown name, or a device that torch cannot use here.
    """
    use_full_float32()
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and "LOCAL_RANK" in os.environ:
        chosen += ":" + os.environ["LOCAL_RANK"]
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here ({reason_of(error)}); try --device cpu") from error
    return device


def use_full_float32() -> None:
    """Makes convolutions in float32 float32. PyTorch leaves them ten bits on a GPU (TF32), and of a difference of large
    numbers, as in SSIM, nothing would be left. Scripts, hub and doctor all come here."""
    torch.backends.cudnn.allow_tf32 = False


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a name; "auto" is bfloat16 where the device has instructions for it, else float32.

    A processor without them (AVX2 alone, say) computes bfloat16 all the same, by a fallback that takes 16 times as long
    as float32 and more; where it was asked for by name, a line on stderr says so.
    """
    if name == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if name == "bfloat16" and not has_bfloat16(device):
        print(f"warning: no instructions for bfloat16 on {device}; float32 is much faster", file=sys.stderr)
    return name


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them that is much slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # or else it is asked of the first one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:  # what PyTorch itself asks before it hands bfloat16 to oneDNN
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # built without oneDNN
        return False


def memory_for_files(max_memory: int | None, device: torch.device) -> int | None:
    """What --max-memory means for reading files: on a GPU it is about the memory of that, not of this process."""
    return max_memory if device.type == "cpu" else None


def keep_freed_memory(most: int | None = 2**30) -> None:
    """Has the C library keep the memory that a step or an image frees, in huge pages. For scripts.

    glibc gives large blocks back to the system at once and gets fresh, zeroed pages for the next: on the CPU that
    was measured to take up to a third of a training step. With pages of 2 MB in place of 4 kB the processor looks up
    fewer addresses: a tenth of a step, and more on a slow machine (benchmarks/RESULTS.md). Elsewhere this does nothing.

    Args:
        most: bytes; None: whatever was freed.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the names of malloc.h
    size = min(free_memory() or 0, 2**36) if most is None else most - 2**22  # or else it would be given back
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        libc = ctypes.CDLL(None)
        if most is None:
            libc.mallopt(trim_threshold, -1)  # never
            libc.mallopt(mmap_max, 0)
        else:
            libc.mallopt(trim_threshold, most)
            libc.mallopt(mmap_threshold, most)
        # A block of that size takes no memory until it is written to. What comes to lie there later is in huge pages.
        libc.malloc.restype = ctypes.c_void_p
        block = libc.malloc(ctypes.c_size_t(size))
        if block:
            first = -(-block // HUGE_PAGE) * HUGE_PAGE
            whole = (block + size - first) // HUGE_PAGE * HUGE_PAGE
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(block))


def give_back_freed_memory() -> None:
    """Gives back to the system what `keep_freed_memory` has kept so far."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Within this block what can be is computed in a precision: "float32", or "bfloat16"."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def to_network(levels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Levels (H, W) in [0, 255] -> (1, 1, H, W) float32 in [0, 1]; colours (H, W, 3) -> (1, 3, H, W)."""
    planes = levels[None] if levels.ndim == 2 else np.moveaxis(levels, -1, 0)
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32) / np.float32(255)).to(device)[None]


def to_levels(image: Tensor) -> np.ndarray:
    """The inverse of `to_network`: float32, not rounded."""
    levels = image[0].float().mul(255).cpu().numpy()
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(np.moveaxis(levels, 0, -1))


def min_max_normalise(image: Tensor) -> Tensor:
    """Moves the smallest value of each image to 0 and the largest to 1, as the published test scripts do.

    A constant image has no range and is left as it is (published: NaN). (B, C, H, W) -> same.
    """
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny), image)


@functools.cache
def note_once(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def fuse_arrays(
    model: Any,
    vis: np.ndarray,
    ir: np.ndarray,
    skip: str,
    *,
    normalise: bool | Callable[[Tensor], Tensor] = True,
    precision: str = "float32",
    max_memory: int | None = None,
    scratch: Path | None = None,
) -> np.ndarray:
    """Fuses two images with a system of the zoo. The result does not depend on the memory that it may take.

    Args:
        model: the system, in evaluation mode, on the device to use.
        vis: visible or MRI, (H, W) in [0, 255]; also (H, W, 3), red first, where the system takes colour.
        ir: infrared, CT, PET or SPECT, (H, W).
        skip: what the decoder is given; one of `model.skips`.
        normalise: min-max normalisation of the result, unless both sources are constant: that would blow up what a
            network makes of nothing. Without it, values beyond the range are clipped. Or a
            function of the system's image (1, 1, H, W) that does it in another way: `utils.data.video.RunningRange`.
        precision: "float32", or "bfloat16" for autocast: faster and coarser.
        max_memory: bytes; on a CPU of the whole process, on a GPU of the device's memory. None: what is free.
        scratch: folder of the temporary files in which feature maps lie that do not fit; None: the system's.

    Returns:
        float32 in [0, 255], the shape of `vis`.

    Raises:
        InputError: a side is shorter than `model.smallest_side`, the memory allowed is too small whatever is done,
            or the disk has no room for feature maps.
    """
    if min(ir.shape) < model.smallest_side:
        raise InputError(f"{model.label} needs sides of at least {model.smallest_side} pixels, got {ir.shape}")
    if normalise and all(image.min() == image.max() for image in (vis, ir)):
        note_once("both sources are constant, so the fused image was not normalised")
        normalise = False
    device = next(model.parameters()).device
    if max_memory and device.type == "cpu":
        give_back_freed_memory()
    free = memory_to_take(device, max_memory)
    while True:
        plan = plan_for(model, ir.shape, free, precision, limited=bool(max_memory))
        tiles = Tiles(plan.pixels, BoundedMemory(plan.map_room, device, scratch))
        try:
            return fuse_with_tiles(model, vis, ir, skip, tiles, normalise=normalise, precision=precision)
        except torch.OutOfMemoryError as error:
            if not hasattr(model, "fuse_tiled"):
                raise InputError(
                    f"{model.label} works on whole images, and {device} has no memory for one of "
                    f"{ir.shape[1]}x{ir.shape[0]} pixels (width x height); make it smaller, or try --device cpu"
                ) from error
            free //= 2  # and again below, where the exception and all that its frames hold are gone
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory on {device}; trying again with {format_size(free)}", file=sys.stderr)


def fuse_sources(model: Any, vis: Source, ir: Source, skip: str, colour: str = "both", **how: Any) -> np.ndarray:
    """Fuses the grey levels of two sources of one size, and gives the result the colours of those that have some.

    A system that takes colour is given that of the visible source and sees to it itself.

    Args:
        model, skip, how: as of `fuse_arrays`.
        colour: which sources may give theirs: "both", "vis", "ir", or "none" for a grey result.

    Returns:
        float32 in [0, 255]: (H, W, 3), red first, or (H, W) where no source that may has colour.
    """
    asked = {"both": (vis, ir), "vis": (vis,), "ir": (ir,), "none": ()}[colour]
    colours = [source.colour for source in asked if source.colour is not None]
    takes_colour = model.takes_colour and colour in ("both", "vis") and vis.colour is not None
    fused = fuse_arrays(model, vis.colour if takes_colour else vis.grey, ir.grey, skip, **how)
    if fused.ndim == 2 and colours:
        fused = with_colour_of(fused, *colours)
    # Clipped here, not where files are written: a panel and a video show the same colours as an image file.
    return np.clip(fused, 0, 255)


def memory_to_take(device: torch.device, max_memory: int | None) -> int:
    """Bytes that may be taken beyond what is taken already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free = (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) * 9 // 10
        return min(free, max_memory - torch.cuda.memory_allocated(device)) if max_memory else free
    if max_memory:
        return max_memory - resident_memory()
    free = free_memory()
    return (4 * 10**9 if free is None else free) * 8 // 10  # a guess that suits any machine where nothing is known


def plan_for(model: Any, shape: tuple[int, ...], free: int, precision: str, *, limited: bool = False) -> Plan:
    """How an image of this shape is fused with so many bytes; `limited` where the user set the limit.

    Raises:
        InputError: they are too few.
    """
    height, width = shape
    size, kind = PRECISIONS[precision].itemsize, next(model.parameters()).device.type
    if hasattr(model, "fuse_tiled"):
        return plan_memory(height, width, free=free, kind=kind, element_size=size, map_bytes=model.map_bytes)
    needed = model.whole_bytes * height * width * size // 4
    if needed > free:
        raise InputError(
            f"{model.label} works on whole images: {width}x{height} pixels need {format_size(needed)}, and "
            f"{format_size(max(free, 0))} are left; give --max-memory more, or reduce the images"
        )
    if limited and not needed:
        note_once(f"{model.label} works on whole images, so --max-memory does not bound it")
    return Plan(0, 0)


@torch.inference_mode()
def fuse_with_tiles(
    model: Any, vis: np.ndarray, ir: np.ndarray, skip: str, tiles: Tiles,
    *, normalise: bool | Callable[[Tensor], Tensor] = True, precision: str = "float32",
) -> np.ndarray:  # fmt: skip
    """`fuse_arrays` in given tiles, with a given place for feature maps."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        fused = fuse_in_tiles(model, to_network(vis, device), to_network(ir, device), skip, tiles)
    if callable(normalise):
        return to_levels(normalise(fused))
    return to_levels(min_max_normalise(fused) if normalise else fused.clamp(0, 1))


def fuse_in_tiles(model: Any, vis: Tensor, ir: Tensor, skip: str, tiles: Tiles) -> Tensor:
    """`model.fuse`, in tiles where the system works in tiles and the image is larger than one."""
    if hasattr(model, "fuse_tiled") and 0 < tiles.pixels < vis[:, 0].numel() * 2:
        return model.fuse_tiled(vis, ir, skip, tiles)
    return model.fuse(vis, ir, skip)


@torch.inference_mode()
def feature_maps(model: Any, vis: np.ndarray, ir: np.ndarray) -> dict[str, np.ndarray]:
    """What a system shows of its features of a pair, for a panel; nothing where it shows none.

    Args:
        model: the system, in evaluation mode.
        vis, ir: grey levels (H, W) in [0, 255].

    Returns:
        By name, such as "base vis", uint8 (H, W): the mean magnitude over channels, normalised to the full range.
        Nothing, and a line on stderr, where a GPU has no memory for them.
    """
    if not hasattr(model, "features"):
        return {}
    device = next(model.parameters()).device
    try:
        maps = model.features(to_network(vis, device), to_network(ir, device))
    except torch.OutOfMemoryError:
        tqdm.write(f"warning: {device} has no memory for the features of a pair; they are not drawn", file=sys.stderr)
        return {}
    return {name: _normalised(value) for name, value in maps.items()}


def _normalised(maps: Tensor) -> np.ndarray:
    magnitude = maps[0].float().abs().mean(dim=0)
    low, high = magnitude.min(), magnitude.max()
    return ((magnitude - low) / (high - low).clamp_min(1e-12) * 255).round().byte().cpu().numpy()


def find_weights(system: type, task: str, given: Path | str | None = None) -> list[Path]:
    """The files of weights that are meant; the last one is the one trained for the task.

    Args:
        system: a class of the zoo.
        task: "ivf" or "mif".
        given: a file; the word "published" for those in published/models/; None for those in models/.

    Raises:
        InputError: no such task, there are none of the system, or the published repository has not been cloned.
    """
    if given is None:
        if task not in system.weights:
            raise InputError(f"no task is called {task!r}; it is one of: {', '.join(system.weights)}")
        if not system.weights[task]:
            raise InputError(
                f"no weights of {system.label} for --task {task} come with the project; name a file with --weights"
            )
        return [in_checkout("models", name) for name in system.weights[task]]
    if str(given) != PUBLISHED or Path(given).is_file():
        return [Path(given)]
    names = system.published.get(task)
    if not names:
        raise InputError(f"where the published weights of {system.label} lie is not recorded; name a file of them")
    paths = [in_checkout(PUBLISHED, "models", name) for name in names]
    absent = next((path for path in paths if not path.is_file()), None)
    if absent:
        clone = f"git clone --depth 1 {PUBLISHED_REPOSITORY} {in_checkout(PUBLISHED)}"
        raise InputError(f"no published weights at {absent}; run `{clone}`")
    return paths


class Fuser(nn.Module):
    """A system with everything decided: (B, 1, H, W) in [0, 1] twice, visible or MRI first -> fused, the same.

    On a CPU it works in tiles, but for gradients: with those enabled every feature map of the network is kept, about
    10 kB a pixel for CDDFuse, 3 GB at 640 x 480. So call it within `torch.inference_mode()` unless you need them.
    Raises ValueError where an image has values outside [0, 1]: levels of 255 would fuse into something, too.

    Attributes:
        system: the system of the zoo.
        weights: the file it has its weights from.
        skip: what its decoder is given.
        normalised: whether each fused image is normalised to the full range, as the test scripts do, or clipped.
        sha256: of the file of weights, when it was read.
    """

    def __init__(self, system: nn.Module, weights: Path, skip: str, normalised: bool = True, sha256: str = "") -> None:
        super().__init__()
        self.system, self.weights, self.skip, self.normalised = system, weights, skip, normalised
        self.sha256 = sha256

    def forward(self, vis: Tensor, ir: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
            for name, image in (("vis", vis), ("ir", ir)):
                low, high = (float(value) for value in image.aminmax())
                if not -1e-4 < low <= high < 1 + 1e-4:
                    raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}")
        whole = vis.device.type != "cpu" or self.training or torch.is_grad_enabled() or torch.compiler.is_exporting()
        fused = fuse_in_tiles(self.system, vis, ir, self.skip, Tiles(0 if whole else CPU_TILE_PIXELS))
        return min_max_normalise(fused) if self.normalised else fused.clamp(0, 1)

    def about(self) -> dict[str, Any]:
        """What a file made with it should say of it."""
        return {
            "system": self.system.label, "weights": self.weights.name, "weights_sha256": self.sha256,
            "skip": self.skip, "normalised": self.normalised,
        }  # fmt: skip


def load_fuser(
    system: type,
    task: str = "ivf",
    weights: Path | str | None = None,
    skip: str | None = None,
    *,
    normalised: bool | None = None,
    device: torch.device | str = "cpu",
) -> Fuser:
    """A system with its weights, in evaluation mode.

    Args:
        system: a class of the zoo.
        task: what will be fused, "ivf" or "mif".
        weights: a file in the system's published format, or "published"; by default the one in models/ for the task.
        skip: one of `system.skips`; by default the one that suits weights and task.
        normalised: see `Fuser`; by default as the system's published test does.
        device: where to run.

    Raises:
        FileNotFoundError, InputError: as the system's `load_published` and `find_weights`; or an unknown skip.
    """
    use_full_float32()
    path = find_weights(system, task, weights)[-1]
    model = system().to(device).eval()
    about = model.load_published(path)
    # Published files say nothing about themselves; their names do.
    trained_for = about.get("task") or ("mif" if "MIF" in path.stem.upper() else "ivf")
    trained_with = about.get("decoder_image", "auto")  # an option of the training, where the system has it
    skip = skip or (model.default_skip(trained_for, task) if trained_with == "auto" else trained_with)
    if (trained_for, task) == ("mif", "ivf"):  # the other way round is a row of the published tables
        print(f"note: {path} are for medical images; infrared and visible ones need others", file=sys.stderr)
    if skip not in model.skips:
        raise InputError(f"--skip {skip} is unknown to {model.label}; it takes one of: {', '.join(model.skips)}")
    normalised = model.normalised if normalised is None else normalised
    return Fuser(model, path, skip, normalised, file_sha256(path)).eval()
