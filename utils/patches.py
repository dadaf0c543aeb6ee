"""The patch file: aligned training patches in HDF5, written whole or not at all, read as a Dataset.

Two layouts are read:

- compact (what we write): `vis` and `ir`, each one chunked, compressed uint8 array (N, H, W); attributes say
  where the patches come from.
- published: groups `vis_patchs` and `ir_patchs` (spelt so) with one float32 dataset (1, H, W) in [0, 1] a patch,
  named by its running number.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils import InputError, whole_file

LAYOUTS = ("compact", "published")
_GROUPS = {"vis": "vis_patchs", "ir": "ir_patchs"}


def patch_windows(height: int, width: int, size: int, stride: int) -> list[tuple[slice, slice]]:
    """Windows of `size` every `stride` pixels that lie wholly inside the image, row by row.

    >>> [(rows.start, columns.start) for rows, columns in patch_windows(480, 640, 128, 200)]
    [(0, 0), (0, 200), (0, 400), (200, 0), (200, 200), (200, 400)]
    """
    starts = [range(0, side - size + 1, stride) for side in (height, width)]
    return [(slice(y, y + size), slice(x, x + size)) for y in starts[0] for x in starts[1]]


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
        path: the .h5 file.
        size: side of the square patches.
        layout: "compact" or "published".
        about: attributes stored in the file: plain strings and numbers.
    """

    def __init__(self, path: Path | str, size: int, layout: str = "compact", about: dict | None = None) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.path, self.size, self.layout, self.about = Path(path), size, layout, about or {}
        self.count = 0

    def __enter__(self) -> PatchWriter:
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(h5py.File(self._stack.enter_context(whole_file(self.path)), "w"))
        for name in ("vis", "ir"):
            if self.layout == "published":
                self._file.create_group(_GROUPS[name])
            else:
                shape = (self.size, self.size)
                self._file.create_dataset(
                    name, (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape), compression="gzip"
                )
        self._file.attrs.update(self.about)
        return self

    def add(self, vis: np.ndarray, ir: np.ndarray) -> None:
        """Appends patches (N, size, size) of grey levels in [0, 255]; compact rounds them half to even."""
        for name, patches in (("vis", vis), ("ir", ir)):
            if self.layout == "published":
                for number, patch in enumerate(patches, start=self.count):
                    unit = (patch / np.float32(255)).astype(np.float32)
                    self._file[_GROUPS[name]].create_dataset(str(number), data=unit[None])
            else:
                self._file[name].resize(self.count + len(patches), axis=0)
                self._file[name][self.count :] = np.round(patches).astype(np.uint8)
        self.count += len(vis)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        except RuntimeError as closing:  # what h5py raises when the disk is full
            raise OSError(f"{self.path} could not be written; is the disk full?") from closing


class PatchDataset(Dataset):
    """Patches of a file in either layout: `dataset[i]` is (vis, ir), float32 (1, H, W) in [0, 1] each.

    All patches are held in memory in the type of the file (MSRS in the compact layout: about 0.2 GB).

    Raises:
        FileNotFoundError: no such file.
        InputError: not a patch file, damaged, empty, or unequal numbers of patches.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no patch file at {path}; make one with `python dataprocessing.py --out {path}`")
        try:
            with h5py.File(path, "r") as file:
                vis, ir = (_read_patches(file, name) for name in ("vis", "ir"))
                self.about = {key: _plain(value) for key, value in file.attrs.items()}
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(
                f"{path} is not a readable patch file ({error}); make it again with `python dataprocessing.py`"
            ) from error
        if vis.shape != ir.shape or vis.ndim != 3 or not len(vis):
            raise InputError(
                f"{path} holds visible patches {vis.shape} and infrared patches {ir.shape}, which must be equally many "
                "(N, H, W) and at least one; make it again with `python dataprocessing.py`"
            )
        if any(array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1) for array in (vis, ir)):
            raise InputError(
                f"{path} holds patches of {vis.dtype} outside [0, 1]; make it again with `python dataprocessing.py`"
            )
        self.vis, self.ir = torch.from_numpy(vis), torch.from_numpy(ir)

    def __len__(self) -> int:
        return len(self.vis)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return to_unit(self.vis[index])[None], to_unit(self.ir[index])[None]

    def digest(self) -> str:
        """A short hash of all patches: two files with equal patches have equal digests."""
        digest = hashlib.blake2b(self.vis.numpy().data, digest_size=16)
        digest.update(self.ir.numpy().data)
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Shorter side of the patches."""
        return min(self.vis.shape[1:])


def to_unit(patches: Tensor) -> Tensor:
    """Patches as stored -> float32 in [0, 1]."""
    return patches.float() / 255 if patches.dtype == torch.uint8 else patches.float()


def random_batches(
    dataset: PatchDataset, batch_size: int, seed: Sequence[int], *, crop: int = 0, flips: bool = False, batches: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled (vis, ir) batches, (B, 1, h, w) float32 in [0, 1] on the CPU.

    What is drawn depends on the arguments alone, so an epoch can be repeated without any stored state.

    Args:
        dataset: the patches.
        batch_size: patches a batch; the last batch of an epoch may be smaller, as published.
        seed: whole numbers, e.g. (seed of the run, epoch).
        crop: side of a random crop of each patch; 0 takes whole patches.
        flips: flip and quarter-turn at random.
        batches: how many batches to draw, reshuffling when the patches run out; 0 is one pass.
    """
    rng = np.random.default_rng(seed)
    wanted = batches * batch_size or len(dataset)
    order = np.concatenate([rng.permutation(len(dataset)) for _ in range(-(-wanted // len(dataset)))])[:wanted]
    for start in range(0, wanted, batch_size):
        vis, ir = [], []
        for index in order[start : start + batch_size]:
            top, left = (rng.integers(length - crop + 1) if crop else 0 for length in dataset.vis.shape[1:])
            turns, flip = (rng.integers(4), rng.integers(2)) if flips else (0, 0)
            for images, source in ((vis, dataset.vis), (ir, dataset.ir)):
                patch = source[index]
                if crop:
                    patch = patch[top : top + crop, left : left + crop]
                patch = patch.rot90(int(turns)) if turns else patch
                images.append(patch.flip(1) if flip else patch)
        yield to_unit(torch.stack(vis))[:, None], to_unit(torch.stack(ir))[:, None]


def _read_patches(file: h5py.File, name: str) -> np.ndarray:
    if name in file:
        return file[name][:]
    group = file[_GROUPS[name]]
    # Numbers, not text: HDF5 lists 10 before 2, and both groups must come in one order.
    return np.concatenate([group[key][:] for key in sorted(group, key=int)]) if len(group) else np.empty((0, 0, 0))


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
