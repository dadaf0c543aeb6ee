"""The patch file: aligned training patches in HDF5, written whole or not at all, read as shuffled batches.

Two layouts are read:

- compact (what we write): `vis` and `ir`, each one chunked, compressed uint8 array (N, H, W), and on request
  `ir_saliency`, cut from the saliency maps of the whole infrared images; attributes say where the patches come from.
  Visible patches may be in colour, (N, H, W, 3), red first; systems that train on grey ones are given those.
- published: groups `vis_patchs` and `ir_patchs` (spelt so) with one float32 dataset (1, H, W) in [0, 1] a patch,
  named by its running number.

Either may also hold pairs that were kept out of the training: a group `validation` with one uint8 array
(2, H, W), visible and infrared, a pair, or (4, H, W) where the visible one is in colour. Readers of the published
layout do not look at it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from utils.common import InputError, reason_of, whole_file
from utils.data.images import grey_of
from utils.data.manifests import SHOWN, list_hash, pair_hash
from utils.metrics import SMALLEST_SCORED

LAYOUTS = ("compact", "published")
_GROUPS = {"vis": "vis_patchs", "ir": "ir_patchs"}
_VALIDATION = "validation"
_SALIENCY = "ir_saliency"
_MOST_COMPRESSED = 1040  # bytes that deflate, our compression, can make of one


class Batch(NamedTuple):
    """Training patches, (B, 1, H, W) in [0, 1] each; saliency maps of the infrared ones where the patch file has them.

    Visible ones are (B, 3, H, W) where the system takes colour and the file has some.
    """

    vis: Tensor
    ir: Tensor
    ir_saliency: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A function of every image that there is."""
        return Batch(*(None if image is None else function(image) for image in self))

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self.each(lambda image: _to_device(image, device))


class ValidationPair(NamedTuple):
    """A pair that no patch was cut from: grey levels, uint8 (H, W) each; colour, (H, W, 3), as in the patches."""

    name: str
    vis: np.ndarray
    ir: np.ndarray


def is_low_contrast(patch: np.ndarray, legacy: bool = False) -> bool:
    """Whether the 10th and 90th percentile differ by less than a tenth of the latter, as published.

    A black patch (90th percentile 0) has no contrast. The published filter divides by zero there and keeps it;
    `legacy` does so too.
    """
    low, high = np.percentile(patch, (10, 90))
    return not legacy if high <= 0 else bool((high - low) / high < 0.1)


class PatchWriter:
    """Writes a patch file; it appears under its name only when the `with` block ends without an error.

    Args:
        path, size, layout: the .h5 file, the side of the square patches, "compact" or "published".
        about: attributes stored in the file: plain strings and numbers.
        saliency: whether `add` is given saliency maps as well; compact layout only.
        colour: whether visible patches are in colour; compact layout only.
    """

    def __init__(
        self, path: Path | str, size: int, layout: str = "compact", about: dict | None = None,
        *, saliency: bool = False, colour: bool = False,
    ) -> None:  # fmt: skip
        if (saliency or colour) and layout != "compact":
            what = "saliency maps are" if saliency else "colour is"
            raise InputError(f"{what} stored in the layout compact, not in {layout!r}")
        self.path, self.about, self.is_compact, self.count = Path(path), about or {}, layout == "compact", 0
        self.shapes = {"vis": (size, size, 3) if colour else (size, size), "ir": (size, size)}
        self.shapes |= {_SALIENCY: (size, size)} if saliency else {}

    def __enter__(self) -> PatchWriter:
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(h5py.File(self._stack.enter_context(whole_file(self.path)), "w"))
        for name, shape in self.shapes.items():
            if self.is_compact:
                self._file.create_dataset(
                    name, (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape), compression="gzip"
                )
            else:
                self._file.create_group(_GROUPS[name])
        for name, value in self.about.items():
            self._file.attrs[name] = _as_utf8(value) if isinstance(value, str) else value
        return self

    def add(self, *arrays: np.ndarray) -> None:
        """Appends patches (N, size, size) of grey levels in [0, 255]; compact rounds them half to even.

        Args:
            arrays: visible, (N, size, size, 3) where the file has colour; infrared; where the file has saliency
                maps, those of the infrared.
        """
        for name, patches in zip(self.shapes, arrays, strict=True):
            if self.is_compact:
                self._file[name].resize(self.count + len(patches), axis=0)
                self._file[name][self.count :] = np.round(patches).astype(np.uint8)
            else:
                for number, patch in enumerate(patches, start=self.count):
                    unit = (patch / np.float32(255)).astype(np.float32)
                    self._file[_GROUPS[name]].create_dataset(str(number), data=unit[None])
        self.count += len(arrays[0])

    def add_validation(self, name: str, vis: np.ndarray, ir: np.ndarray) -> None:
        """Stores a pair (H, W) of levels in [0, 255] for validation, rounded half to even; vis also (H, W, 3)."""
        group = self._file.require_group(_VALIDATION)
        pair = np.round(np.stack([*([vis] if vis.ndim == 2 else np.moveaxis(vis, -1, 0)), ir])).astype(np.uint8)
        group.create_dataset(f"{len(group):06d}", data=pair, compression="gzip").attrs["name"] = _as_utf8(name)

    def __exit__(self, *error: Any) -> None:
        try:
            self._stack.__exit__(*error)
        except RuntimeError as closing:  # what h5py raises when the disk is full
            raise OSError(f"{self.path} could not be written; is the disk full?") from closing


def _as_utf8(text: str) -> str:
    """What HDF5 can store of a text: names of files need not be UTF-8."""
    return text.encode(errors="replace").decode()


class PatchDataset:
    """Patches of a file in either layout, all in memory in the type of the file (MSRS, compact: about 0.2 GB).

    Args:
        path: the file.
        colour: take visible patches as they are, in colour where they have some; otherwise their grey levels.

    Attributes:
        vis, ir: the patches as stored, (N, H, W), or (N, H, W, 3).
        ir_saliency: saliency maps of the infrared ones, the same; None where the file has none.
        validation: the pairs that were kept for validation.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a patch file, or one that cannot be trained and validated on; it says why.
    """

    def __init__(self, path: Path | str, *, colour: bool = False) -> None:
        path = Path(path)
        if path.is_dir():
            command = f"python dataprocessing.py --data {path} --out data/mine.h5"
            raise InputError(f"{path} is a folder; make a patch file of it with `{command}`, and train on that")
        if not path.is_file():
            raise FileNotFoundError(f"no patch file at {path}; make one with `python dataprocessing.py --out {path}`")
        try:
            with h5py.File(path, "r") as file:
                vis, ir = (_read_patches(file, name) for name in ("vis", "ir"))
                saliency = _read(file, _SALIENCY) if _SALIENCY in file else None
                pairs = file.get(_VALIDATION, {})
                self.validation = [_read_validation(pairs, key, colour) for key in sorted(pairs)]
            _check(vis, ir, saliency)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
            raise InputError(
                f"{path} is not a readable patch file ({reason_of(error)}); "
                "make it again with `python dataprocessing.py`"
            ) from error
        if vis.ndim == 4 and not colour:
            vis = np.stack([grey_of(patch).astype(np.uint8) for patch in vis])
        self.vis, self.ir = torch.from_numpy(vis), torch.from_numpy(ir)
        self.ir_saliency = None if saliency is None else torch.from_numpy(saliency)

    def __len__(self) -> int:
        return len(self.vis)

    @functools.cached_property
    def hash(self) -> str:
        """A short hash of all patches: two files with equal patches have equal hashes."""
        found = hashlib.blake2b(self.vis.cpu().numpy().data, digest_size=16)
        found.update(self.ir.cpu().numpy().data)
        return found.hexdigest()

    @functools.cached_property
    def validation_hash(self) -> str:
        """The hash that tables name their images by, of the validation pairs."""
        return list_hash(pair_hash(pair.vis, pair.ir) for pair in self.validation)[:SHOWN]

    def move_to(self, device: torch.device) -> None:
        """Moves all patches to a GPU where they take less than half of its free memory.

        Elsewhere they stay where they are; batches are then cut on the CPU while the GPU computes.
        """
        stored = Batch(self.vis, self.ir, self.ir_saliency)
        size = sum(array.nbytes for array in stored if array is not None)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            self.vis, self.ir, self.ir_saliency = stored.each(lambda patches: patches.to(device))

    @property
    def size(self) -> int:
        """Shorter side of the patches."""
        return min(self.ir.shape[1:])


def to_unit(patches: Tensor) -> Tensor:
    """Patches as stored, (B, H, W) or (B, H, W, 3) -> float32 in [0, 1], (B, 1, H, W) or (B, 3, H, W)."""
    unit = patches.float() / 255 if patches.dtype == torch.uint8 else patches.float()
    return unit[:, None] if unit.ndim == 3 else unit.movedim(-1, 1).contiguous()


def random_batches(
    dataset: PatchDataset, batch_size: int, seed: Sequence[int],
    *, crop: int = 0, flips: bool = False, batches: int = 0, start: int = 0, part: tuple[int, int] = (0, 1),
    smallest: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """One epoch of shuffled batches, where the patches are; pixels in [0, 1].

    What is drawn depends on the arguments alone, so an epoch can be repeated, or gone on with in its middle,
    without any stored state.

    Args:
        dataset: the patches.
        batch_size: patches a batch, over all processes; the last batch of an epoch may be smaller, as published.
        seed: whole numbers, e.g. (seed of the run, epoch).
        crop: side of a random crop of each patch; 0 takes whole patches.
        flips: flip and quarter-turn at random; patches that are not square are flipped only.
        batches: how many batches to draw, reshuffling when the patches run out; 0 is one pass.
        start: the first batch wanted, from 0.
        part: (i, n) gives every n-th patch of each batch from the i-th on, for one of n processes.
        smallest: fewest patches a process can train on. The last batch is cut so that all processes get equally
            many, and is left out when that is fewer.
    """
    rng = np.random.default_rng(seed)
    wanted = batches * batch_size or len(dataset)
    order = np.concatenate([rng.permutation(len(dataset)) for _ in range(-(-wanted // len(dataset)))])[:wanted]
    height, width = ((crop or side) for side in dataset.ir.shape[1:])
    # Everything is drawn first: the batch that is asked for does not depend on where the epoch is begun.
    tops, lefts = (rng.integers(whole - side + 1, size=wanted) for whole, side in
                   zip(dataset.ir.shape[1:], (height, width), strict=True))  # fmt: skip
    flip_rows, flip_columns, turn = rng.integers(2, size=(3, wanted)).astype(bool) & flips
    turn &= height == width
    index, count = part
    for first in range(start * batch_size, wanted, batch_size):
        each = min(batch_size, wanted - first) // count
        if each < smallest:
            break
        take = slice(first + index, first + each * count, count)
        rows, columns = np.arange(height), np.arange(width)
        rows = tops[take, None] + np.where(flip_rows[take, None], rows[::-1], rows)
        columns = lefts[take, None] + np.where(flip_columns[take, None], columns[::-1], columns)
        y, x = np.broadcast_arrays(rows[:, :, None], columns[:, None, :])
        # A quarter turn is a flip and this: rows become columns.
        if turn[take].any():
            y, x = (np.where(turn[take, None, None], axis.swapaxes(1, 2), axis) for axis in (y, x))
        n, y, x = (torch.from_numpy(np.ascontiguousarray(axis)) for axis in (order[take, None, None], y, x))
        where = tuple(_to_device(axis, dataset.vis.device) for axis in (n, y, x))
        stored = Batch(dataset.vis, dataset.ir, dataset.ir_saliency)
        yield stored.each(lambda patches, where=where: to_unit(patches[where]))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # The host does not wait for a copy to a GPU; that needs pinned memory.
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def batches_in_epoch(patches: int, batch_size: int, count: int = 1, smallest: int = 1) -> int:
    """How many batches one pass of `random_batches` gives."""
    return patches // batch_size + (patches % batch_size // count >= smallest)


def _read(group: h5py.Group, name: str) -> np.ndarray:
    """A stored array, whole. Raises ValueError where it is no array of numbers that lie in this file."""
    stored = group[name]
    if not isinstance(stored, h5py.Dataset) or stored.dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(f"{name} is {getattr(stored, 'dtype', 'a group')}, not an array of uint8 or native float32")
    if stored.external or stored.is_virtual or stored.file.filename != group.file.filename:
        raise ValueError(f"{name} lies in another file")
    if stored.nbytes > _MOST_COMPRESSED * stored.id.get_storage_size():
        raise ValueError(f"{name} declares {stored.shape}, more than the file can hold")
    return stored[:]


def _read_patches(file: h5py.File, name: str) -> np.ndarray:
    if name in file:
        return _read(file, name)
    group = file[_GROUPS[name]]
    # Numbers, not text: HDF5 lists 10 before 2, and both groups must come in one order.
    return np.concatenate([_read(group, key) for key in sorted(group, key=int)]) if len(group) else np.empty((0, 0, 0))


def _read_validation(group: h5py.Group, key: str, colour: bool) -> ValidationPair:
    pair, name = _read(group, key), str(group[key].attrs["name"])
    if pair.dtype != np.uint8 or len(pair) not in (2, 4) or pair.ndim != 3 or min(pair.shape[1:]) < SMALLEST_SCORED:
        raise ValueError(
            f"the validation pair {name} is {pair.dtype} {pair.shape}; it must be uint8 (2 or 4, H, W) with sides of "
            f"at least {SMALLEST_SCORED}, which the metrics need"
        )
    vis = pair[0] if len(pair) == 2 else np.moveaxis(pair[:3], 0, -1).copy()
    return ValidationPair(name, vis if colour else grey_of(vis).astype(np.uint8), pair[-1])


def _check(vis: np.ndarray, ir: np.ndarray, saliency: np.ndarray | None) -> None:
    """Raises ValueError where patches do not belong together or are not in their range."""
    if vis.shape not in (ir.shape, (*ir.shape, 3)) or ir.ndim != 3 or not ir.size:
        raise ValueError(
            f"it holds visible patches {vis.shape} and infrared patches {ir.shape}, which must be equally many "
            "(N, H, W), visible ones also (N, H, W, 3), and at least one"
        )
    if any(array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1) for array in (vis, ir)):
        raise ValueError(f"patches of {vis.dtype} are outside [0, 1]")
    if saliency is not None and (saliency.shape != ir.shape or saliency.dtype != np.uint8):
        raise ValueError(f"saliency maps are {saliency.dtype} {saliency.shape} for infrared patches {ir.shape}")
