"""Pairs of files: which file belongs to which, how data sets name their folders, and the sets a test script runs."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.common import InputError, benchmark_root, in_checkout, listed
from utils.data.images import SUFFIXES, read_grey

# Sub-folders of a data set, (visible or MRI, infrared or CT/PET/SPECT), in the order they are looked for.
MODALITIES = (("vi", "ir"), ("vis", "ir"), ("MRI", "CT"), ("MRI", "PET"), ("MRI", "SPECT"), ("img1", "img2"))


class Pair(NamedTuple):
    """Two files of one scene: `vis` is visible or MRI, `ir` is infrared, CT, PET or SPECT."""

    name: str
    vis: Path
    ir: Path

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Both images as grey levels, vis first.

        Raises:
            InputError: as `read_grey`, or the two sizes differ.
        """
        vis, ir = read_grey(self.vis), read_grey(self.ir)
        check_same_size(self, vis, ir)
        return vis, ir


def check_same_size(pair: Pair, vis: np.ndarray, ir: np.ndarray) -> None:
    if vis.shape[:2] != ir.shape[:2]:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (vis, ir)]
        raise InputError(
            f"{pair.vis} is {sizes[0]} but {pair.ir} is {sizes[1]} (width x height); "
            "a pair must be aligned and of one size: resize or crop one of the two files"
        )


@dataclass(frozen=True)
class PairList:
    """Pairs of two folders by file stem, sorted by name, and the file names that have no partner."""

    pairs: tuple[Pair, ...]
    only_vis: tuple[str, ...]
    only_ir: tuple[str, ...]

    def unmatched(self) -> str:
        """One line naming the files without a partner, empty when there are none."""
        sides = [(self.only_vis, "infrared (or CT/PET/SPECT)"), (self.only_ir, "visible (or MRI)")]
        return "; ".join(f"no {missing} partner for {listed(names)}" for names, missing in sides if names)


def list_pairs(vis_folder: Path | str, ir_folder: Path | str) -> PairList:
    """Pairs the images of two folders by file name without its last suffix.

    Other files and sub-folders are ignored, hidden files too.

    Raises:
        FileNotFoundError: a folder is missing.
        InputError: two images of a folder share a stem, or not a single pair is found.
    """
    vis, ir = _images_by_stem(Path(vis_folder)), _images_by_stem(Path(ir_folder))
    found = PairList(
        pairs=tuple(Pair(stem, vis[stem], ir[stem]) for stem in sorted(vis.keys() & ir.keys())),
        only_vis=tuple(vis[stem].name for stem in sorted(vis.keys() - ir.keys())),
        only_ir=tuple(ir[stem].name for stem in sorted(ir.keys() - vis.keys())),
    )
    if not found.pairs:
        raise InputError(
            f"{vis_folder} and {ir_folder} share no image name ({len(vis)} and {len(ir)} images); "
            "the two files of a pair need the same name, such as vi/01.png and ir/01.png"
        )
    return found


def list_flat_pairs(folder: Path | str, vis_stem: str, ir_stem: str) -> PairList:
    """Pairs the images of one folder by their numbers: `mrict7.png` with `ct7.png` for the stems `mrict` and `ct`.

    A pair is called by its number, and pairs are in the order of the numbers. Files with other stems are ignored.

    Args:
        folder: holds both images of every pair.
        vis_stem: what comes before the number in visible (or MRI) files.
        ir_stem: the same for infrared (or CT, PET, SPECT) files.

    Raises:
        FileNotFoundError: no such folder.
        InputError: the stems are equal, a file fits both, or not a single pair is found.
    """
    images = _images_by_stem(Path(folder))

    def numbered(stem: str) -> dict[str, Path]:
        names = [name for name in images if re.fullmatch(re.escape(stem) + "[0-9]+", name)]
        return {name.removeprefix(stem): images[name] for name in names}

    vis, ir = numbered(vis_stem), numbered(ir_stem)
    either = set(vis.values()) & set(ir.values())
    if either:
        raise InputError(f"{listed(either)}: of either role for the stems {vis_stem} and {ir_stem}; rename the files")
    numbers = sorted(vis.keys() & ir.keys(), key=lambda number: (int(number), number))
    if not numbers:
        present = {re.sub("[0-9]+$", "", name) for name in images if name[-1:].isdigit()}
        raise InputError(
            f"{folder} holds no pair {vis_stem}<number> and {ir_stem}<number>; the stems in it are {listed(present)}"
        )
    return PairList(
        pairs=tuple(Pair(number, vis[number], ir[number]) for number in numbers),
        only_vis=tuple(vis[number].name for number in sorted(vis.keys() - ir.keys())),
        only_ir=tuple(ir[number].name for number in sorted(ir.keys() - vis.keys())),
    )


def known_modalities() -> str:
    """The pairs of sub-folders that a data set may have, for a message."""
    return ", ".join(f"{vis}/ and {ir}/" for vis, ir in MODALITIES)


def modalities_in(folder: Path) -> list[tuple[Path, Path]]:
    """Every known combination of sub-folders that a folder holds, visible or MRI first."""
    both = [(folder / vis, folder / ir) for vis, ir in MODALITIES]
    return [(vis, ir) for vis, ir in both if vis.is_dir() and ir.is_dir()]


def find_modalities(folder: Path | str) -> tuple[Path, Path]:
    """The two sub-folders of a data set: (visible or MRI, infrared or CT/PET/SPECT).

    Raises:
        FileNotFoundError: there is no such folder, or it holds none of the known combinations; they are named.
        InputError: it holds several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    found = modalities_in(folder)
    if not found:
        raise FileNotFoundError(f"{folder} must hold two folders of images, one of: {known_modalities()}")
    if len(found) > 1:
        several = "; ".join(f"{vis.name}/ with {ir.name}/" for vis, ir in found)
        raise InputError(f"{folder} holds more than one set ({several}); give each a folder of its own")
    return found[0]


def _images_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {folder}")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in images:
            raise InputError(f"{path} and {images[path.stem]} share a name, so their partner is unclear; remove one")
        images[path.stem] = path
    return images


@dataclass(frozen=True)
class Benchmark:
    """The defaults of one test script."""

    task: str  # "ivf" or "mif"
    sets: tuple[str, ...]  # folder names of the published benchmark
    samples: tuple[str, ...]  # bundled sets, shown where the published ones are absent


@dataclass(frozen=True)
class TestSet:
    name: str
    vis_name: str  # how the data set calls its visible or MRI images: a folder's name, or a stem
    ir_name: str
    found: PairList


def find_sets(args: argparse.Namespace, benchmark: Benchmark) -> list[TestSet]:
    """The sets to run. Sets that were asked for must exist; absent default sets give way to the bundled ones."""
    if args.pairs == "flat":
        return find_flat_sets(args)
    if args.stems:
        raise InputError("--stems is for one folder that holds both images of every pair; add --pairs flat")
    root = args.data or benchmark_root()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; name one with --data")
    if not args.sets and modalities_in(root):
        return [open_set(root)]
    if args.sets:
        return [open_set(root / name) for name in args.sets]
    present = [name for name in benchmark.sets if (root / name).is_dir()]
    if not present and args.data:
        raise FileNotFoundError(
            f"{root} holds none of {', '.join(benchmark.sets)}, and no two folders of images, one of: "
            f"{known_modalities()}; name the folders of other sets in it with --sets"
        )
    absent = ", ".join(name for name in benchmark.sets if name not in present)
    if absent:
        shown = "" if present else "; the bundled samples are shown instead"
        print(f"benchmark sets not found: {absent}. Put them at {root}/<set>/<modality>/ (README, Data){shown}")
    if not present:
        return [open_set(in_checkout("test_img", name)) for name in benchmark.samples]
    return [open_set(root / name) for name in present]


def find_flat_sets(args: argparse.Namespace) -> list[TestSet]:
    """--data itself, or its sub-folders --sets. Which stem is which is never guessed: exchanged roles fuse as well,
    to another image."""
    if not args.stems or not args.data:
        raise InputError(
            "--pairs flat needs --data DIR and --stems VIS IR, what comes before the number in the names of the "
            "visible or MRI files and of the infrared, CT, PET or SPECT files"
        )
    folders = [args.data / name for name in args.sets] if args.sets else [args.data]
    return [TestSet(folder.resolve().name, *args.stems, list_flat_pairs(folder, *args.stems)) for folder in folders]


def open_set(folder: Path) -> TestSet:
    vis, ir = find_modalities(folder)
    return TestSet(folder.resolve().name, vis.name, ir.name, list_pairs(vis, ir))
