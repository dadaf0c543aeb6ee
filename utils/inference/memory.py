"""How much memory fusing one image may take: the plan, and feature maps in memory or in a scratch file.

Between two sweeps over an image CDDFuse keeps two maps of 64 channels, 512 bytes a pixel in float32. Everything else
is of the size of a tile or of the images themselves.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.common import InputError, resident_memory
from utils.tiles import Memory

# Tiles of so many pixels are fastest: on a CPU because a tile stays in the cache, on a GPU because few are needed.
CPU_TILE_PIXELS = 16384
CUDA_TILE_PIXELS = 2**20
SMALLEST_TILE = 256
WORTH_MAPS = 8  # tiles are made smaller by up to this factor, so that maps fit into memory

LIBRARY_BYTES = 64 * 10**6  # what torch and its libraries take at their first call, and as much again
IMAGE_BYTES = 48  # a pixel: sources as arrays and as tensors, what the decoder adds, the result and its normalisation
TILE_BYTES = 6000  # a pixel of a tile and of its halo, both modalities: the maps within one block
# A pixel of a row of tiles: two copies of both modalities, and the pages of the scratch file below them.
BAND_BYTES = 4 * 2 * 64 * 4
WIDEST_HALO = 6  # pixels, of the detail branch

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500 MB" or "1.5GiB"; a type for argparse.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]I?)?B?\s*", text.upper())
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no size; write 2GB or 500MB")
    return int(size)


def format_size(size: float) -> str:
    """
    >>> format_size(1_540_000_000)
    '1.54 GB'
    """
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{math.ceil(size / 1e6)} MB"


@dataclass(frozen=True)
class Plan:
    """How one image is fused.

    Attributes:
        pixels: of a tile, over all images of a batch.
        map_room: bytes of memory for feature maps; those that do not fit go to the scratch file.
    """

    pixels: int
    map_room: int


def plan_memory(
    height: int, width: int, *, free: int, kind: str = "cpu", element_size: int = 4, map_bytes: int = 512
) -> Plan:
    """The plan for images of this size.

    Args:
        height, width: of the images.
        free: bytes that may be taken beyond what the process has.
        kind: of the device, "cpu" or "cuda".
        element_size: bytes of a value of a feature map.
        map_bytes: a pixel of the image, in float32: maps that the system keeps between two sweeps.

    Raises:
        InputError: not even the smallest tiles fit.
    """
    most_pixels = CPU_TILE_PIXELS if kind == "cpu" else CUDA_TILE_PIXELS
    sizes = [max(most_pixels >> i, SMALLEST_TILE) for i in range(most_pixels.bit_length())]
    images, maps = IMAGE_BYTES * height * width, map_bytes * height * width * element_size // 4
    working = [
        LIBRARY_BYTES + images + tile_memory(height, width, pixels) * element_size // 4 * 5 // 4  # the heap has gaps
        for pixels in sizes
    ]
    # Maps in memory are worth smaller tiles, down to an eighth: beyond that a scratch file and the best tiles were
    # measured to take less time (benchmarks/RESULTS.md). Large tiles are worth more than room that holds no map.
    for needed, smallest in ((maps, most_pixels // WORTH_MAPS), (0, 0)):
        for pixels, taken in zip(sizes, working, strict=True):
            if pixels >= smallest and taken + needed <= free:
                return Plan(pixels, free - taken)
    raise InputError(
        f"{width}x{height} pixels need {format_size(working[-1])} beyond the {format_size(resident_memory())} that "
        f"is taken, and {format_size(max(free, 0))} are left; give --max-memory more, or reduce the images"
    )


def tile_memory(height: int, width: int, pixels: int) -> int:
    """Bytes that tiles of so many pixels take, in float32."""
    pixels = min(pixels, 2 * height * width)
    rows = max(1, math.isqrt(pixels // 2), pixels // 2 // width)
    columns = min(width, max(1, pixels // 2 // rows))
    band = (min(rows, height) + 2 * WIDEST_HALO) * width * BAND_BYTES
    return band + (rows + 2 * WIDEST_HALO) * (columns + 2 * WIDEST_HALO) * TILE_BYTES


class BoundedMemory(Memory):
    """Feature maps in the memory of the device while there is room, then in temporary files.

    Args:
        room: bytes for maps on the device.
        device: where tiles are worked on.
        scratch: folder of the files; None: the system's folder for temporary files.

    Attributes:
        taken, most: bytes of maps on the device, now and at most.
        in_files: bytes of all maps that were put into files.
    """

    def __init__(self, room: int, device: torch.device | str = "cpu", scratch: Path | None = None) -> None:
        self.room, self.device = room, torch.device(device)
        self.scratch = Path(scratch or tempfile.gettempdir())
        self.taken = self.most = self.in_files = 0
        self._before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def new_map(self, shape: Sequence[int], like: Tensor) -> Tensor:
        batch, channels, height, width = shape
        size = math.prod(shape) * like.dtype.itemsize
        if self.device.type == "cuda":
            self.taken = torch.cuda.memory_allocated(self.device) - self._before
        fits = self.taken + size <= self.room
        if fits and self.device.type != "cpu":
            x = torch.empty((batch, height, width, channels), dtype=like.dtype, device=self.device)
        else:
            # The array, unlike a tensor's Python object, lives exactly as long as the memory.
            array = np.empty(size, np.uint8) if fits else self._in_file(size)
            if fits:
                self._count(size)
                weakref.finalize(array, self._count, -size)
            x = torch.from_numpy(array).view(like.dtype).view(batch, height, width, channels)
        return x.permute(0, 3, 1, 2)

    def _count(self, size: int) -> None:
        self.taken += size
        self.most = max(self.most, self.taken)

    def fetch(self, tile: Tensor) -> Tensor:
        return tile.to(self.device, non_blocking=True)

    def row_done(self) -> None:
        # Pages that were read or written stay in the process until they are let go; the file keeps them.
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _in_file(self, size: int) -> np.ndarray:
        """Zeroed bytes in a file without a name, which the system removes however the process ends.

        Raises:
            InputError: there is no room for it.
        """
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                reserve = getattr(os, "posix_fallocate", _extend)
                reserve(file.fileno(), 0, size)  # now, because a full disk kills a process that writes to a mapping
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            room = shutil.disk_usage(self.scratch).free if self.scratch.is_dir() else 0
            raise InputError(
                f"feature maps need a scratch file of {format_size(size)} in {self.scratch}, where {format_size(room)} "
                f"are free ({error.strerror}); name another folder with --scratch, or give --max-memory more"
            ) from error
        self.in_files += size
        if hasattr(mapped, "madvise"):
            self._mapped.add(mapped)
        return np.frombuffer(mapped, np.uint8)


def _extend(descriptor: int, start: int, size: int) -> None:
    os.truncate(descriptor, start + size)
