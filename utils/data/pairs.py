"""Pairs of files: which file belongs to which, and how data sets name their folders."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.common import InputError, listed, remember_source
from utils.data.images import read_grey
from utils.data.readers import (
    PLAIN,
    SUFFIXES,
    Reading,
    auto_range,
    pages_in,
    readings_of,
    stem_of,
    suffix_of,
    values_in,
)

# Task, and what its sub-folders are called, in any case: visible or MRI, and infrared or CT, PET, SPECT.
LAYOUTS = (
    ("ivf", ("vi", "vis", "visible", "rgb"), ("ir", "infrared", "lwir", "nir", "thermal", "thermal_8_bit")),
    ("mif", ("mri",), ("ct", "pet", "spect")),
    ("", ("img1",), ("img2",)),
)
ONE_SIZE = "a pair must be aligned and of one size: resize or crop one of the two files"  # advice
PARTS = ("train", "test")  # folders that may lie above or below those two
# Tried for a proposal, the most natural first: the last number of a name, and the first.
_PROPOSED = ("stem", "number", "([0-9]+)[^0-9]*$", "^[^0-9]*([0-9]+)")


Reader = Callable[[Path, Reading], np.ndarray]


class Pair(NamedTuple):
    """Files of one scene: `vis` is visible or MRI, `ir` is infrared, CT, PET or SPECT; `name` is the stem of `vis`."""

    name: str
    vis: Path
    ir: Path
    vis_reading: Reading = PLAIN
    ir_reading: Reading = PLAIN

    def read(self, read_vis: Reader | None = None, read_ir: Reader | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Both images, vis first; by default as grey levels, by `read_grey`.

        Raises:
            FileNotFoundError, InputError: as the functions that read, or the two sizes differ.
        """
        vis = (read_vis or read_grey)(self.vis, self.vis_reading)
        ir = (read_ir or read_grey)(self.ir, self.ir_reading)
        if vis.shape[:2] != ir.shape[:2]:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (vis, ir)]
            raise InputError(f"{self.vis} is {sizes[0]} but {self.ir} is {sizes[1]} (width x height); {ONE_SIZE}")
        return vis, ir


class PairList(NamedTuple):
    """Pairs of two folders, sorted, and the file names that have no partner."""

    pairs: tuple[Pair, ...]
    only_vis: tuple[str, ...]
    only_ir: tuple[str, ...]

    def unmatched(self) -> str:
        """One line naming the files without a partner, empty when there are none."""
        sides = [(self.only_vis, "infrared (or CT/PET/SPECT)"), (self.only_ir, "visible (or MRI)")]
        return "; ".join(f"no {missing} partner for {listed(names)}" for names, missing in sides if names)

    def check_usable(self, advice: str = "") -> None:
        """Fails before the work if no pair can be used.

        Raises:
            InputError: every pair is of two sizes or cannot be read; `advice` comes after that.
        """
        first = None
        for pair in self.pairs:
            try:
                pair.read()
                return
            except (InputError, OSError) as error:
                first = first or error
        raise InputError(f"not one of {len(self.pairs)} pairs can be used. The first: {first}{advice}")


def add_pair_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--pair-by`, which `list_pairs` takes as `by`."""
    parser.add_argument(
        "--pair-by",
        default="stem",
        metavar="stem|number|order|REGEX",
        help="what makes two files a pair: equal names up to the suffix, equal numbers in the names, their order, or "
        "equal groups of a regular expression that is searched in both names (default: stem)",
    )


def refuse_one_source(vis: Path, ir: Path) -> None:
    """Raises InputError where both roles are one folder, file or video, links resolved."""
    if vis.exists() and ir.exists() and os.path.samefile(vis, ir):
        raise InputError(f"{vis} and {ir} are one and the same; --vi is the visible (or MRI) source, --ir the other")


def list_pairs(vis_folder: Path | str, ir_folder: Path | str, by: str = "stem") -> PairList:
    """Pairs the images of two folders. Other files and sub-folders are ignored, hidden files too.

    Args:
        vis_folder, ir_folder: visible (or MRI) images, and infrared (or CT, PET, SPECT) ones.
        by: "stem", the name without its last suffix; "number", all numbers in it, so that `1_rgb` belongs to `001`;
            "order", where 10 follows 9; or a regular expression that is searched in it: its groups, else all it finds.

    Raises:
        FileNotFoundError: a folder is missing.
        InputError: two images of a folder are alike, not a single pair is found, or `by` is no regular expression.
    """
    vis, ir = images_in(Path(vis_folder)), images_in(Path(ir_folder))
    if by == "order" and len(vis) != len(ir):
        raise InputError(
            f"--pair-by order: {vis_folder} has {len(vis)} images and {ir_folder} {len(ir)}; as many are needed"
        )
    found = _match(_keyed(vis, by), _keyed(ir, by))
    if not found.pairs:
        names = " and ".join(str(images[0]) if images else "no image" for images in (vis, ir))
        raise InputError(
            f"{vis_folder} and {ir_folder} share no image name by --pair-by {by} ({len(vis)} and {len(ir)} images, "
            f"such as {names}); {_proposal(vis, ir)}"
        )
    return found if by != "stem" else found._replace(pairs=tuple(sorted(found.pairs)))


def list_flat_pairs(folder: Path | str, vis_stem: str, ir_stem: str) -> PairList:
    """Pairs the images of one folder by their numbers: `mrict7.png` with `ct7.png` for the stems `mrict` and `ct`.

    A pair is called by its number. Files with other stems are ignored.

    Raises:
        FileNotFoundError: no such folder.
        InputError: the stems are equal, a file fits both, or not a single pair is found.
    """
    images = images_in(Path(folder))
    patterns = [f"^{re.escape(stem)}([0-9]+)$" for stem in (vis_stem, ir_stem)]
    vis, ir = ([path for path in images if re.search(pattern, stem_of(path))] for pattern in patterns)
    either = [path.name for path in vis if path in ir]
    if either:
        raise InputError(f"{listed(either)}: of either role for the stems {vis_stem} and {ir_stem}; rename the files")
    found = _match(_keyed(vis, patterns[0]), _keyed(ir, patterns[1]))
    if not found.pairs:
        present = {re.sub("[0-9]+$", "", stem_of(path)) for path in images if stem_of(path)[-1:].isdigit()}
        raise InputError(
            f"{folder} holds no pair {vis_stem}<number> and {ir_stem}<number>; the stems in it are {listed(present)}"
        )
    return found._replace(pairs=tuple(pair._replace(name=pair.name.removeprefix(vis_stem)) for pair in found.pairs))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key to sort names by, so that 10 follows 9."""
    parts = re.split("([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in their natural order; InputError where two have one name up to the suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {folder}")
    paths = [path for path in folder.iterdir() if suffix_of(path) in SUFFIXES and path.name[0] != "."]
    images = sorted((path for path in paths if path.is_file()), key=lambda path: natural(path.name))
    for path in images:
        remember_source(path)
    _keyed(images, "stem")  # results are called by it
    return images


def _keyed(images: list[Path], by: str) -> dict[Hashable, Path]:
    """What an image has in common with its partner -> the image; itself where there is no such thing in its name."""
    if by == "order":
        return dict(enumerate(images))
    found: dict[Hashable, Path] = {}
    for path in images:
        if by in ("stem", "number"):
            key = stem_of(path) if by == "stem" else tuple(map(int, re.findall("[0-9]+", stem_of(path))))
        else:
            try:
                match = re.search(by, stem_of(path))
            except re.error as error:
                raise InputError(
                    f"--pair-by {by} is none of stem, number, order or a regular expression ({error})"
                ) from None
            key = match and (match.groups() or match.group())
        other = found.setdefault(key or path, path)
        if other != path:
            what = {"stem": "name", "number": "number"}.get(by, f"match of --pair-by {by}")
            raise InputError(f"{path} and {other} share a {what}, so their partner is unclear; remove one")
    return found


def _match(vis: dict[Hashable, Path], ir: dict[Hashable, Path]) -> PairList:
    """In the order of the visible images."""
    pairs = tuple(Pair(stem_of(path), path, ir[key]) for key, path in vis.items() if key in ir)
    only = [tuple(path.name for key, path in one.items() if key not in other) for one, other in ((vis, ir), (ir, vis))]
    return PairList(pairs, *only)


def _proposal(vis: list[Path], ir: list[Path]) -> str:
    """What to ask for instead, tried out: nothing is ever paired that was not asked for."""
    best, how = PairList((), (), ()), ""
    for by in _PROPOSED:
        try:
            found = _match(_keyed(vis, by), _keyed(ir, by))
        except InputError:
            continue
        if len(found.pairs) > len(best.pairs):
            best, how = found, by
    if how:
        example = f"{best.pairs[0].vis.name} with {best.pairs[0].ir.name}"
        return f"--pair-by {shlex.quote(how)} makes {len(best.pairs)} pairs, such as {example}"
    order = "--pair-by order if both are in one order, or " if vis and len(vis) == len(ir) else ""
    return f"use {order}equal names for the two files of a pair, such as vi/01.png and ir/01.png"


def modalities_in(folder: Path, parts: tuple[str, ...] = PARTS) -> list[tuple[Path, Path]]:
    """Every known combination of sub-folders that hold images, visible or MRI first.

    They are looked for in the folder, else in its train/ and test/; so are the images in each of them.
    """
    found = [
        (vis, ir) for _, first, second in LAYOUTS for vis in _called(first, folder) for ir in _called(second, folder)
    ]
    if not found:
        return [both for part in _called(parts, folder) for both in modalities_in(part, ())]
    return [both for vis, ir in found for both in _parts_of(vis, ir) or [(vis, ir)]]


def _parts_of(vis: Path, ir: Path) -> list[tuple[Path, Path]]:
    if any(suffix_of(path) in SUFFIXES for path in vis.iterdir()):
        return []
    return [(first, second) for part in PARTS for first in _called((part,), vis) for second in _called((part,), ir)]


def _called(names: tuple[str, ...], folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name.lower() in names and path.is_dir()]


def find_modalities(folder: Path | str) -> tuple[Path, Path]:
    """The two folders of images of a data set: (visible or MRI, infrared or CT/PET/SPECT).

    Raises:
        FileNotFoundError: there is no such folder, or it holds none of the known combinations; what it holds is said.
        InputError: it holds several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    found = modalities_in(folder)
    if not found:
        known = ", ".join(f"{'|'.join(vis)} with {'|'.join(ir)}" for _, vis, ir in LAYOUTS)
        raise FileNotFoundError(
            f"{folder} must hold two folders of images, {known}, in any case; its sub-folders are "
            f"{listed(path.name for path in folder.iterdir() if path.is_dir())}. Name two with --vi DIR and --ir DIR"
        )
    if len(found) > 1:
        several = "; ".join(" with ".join(f"{path.relative_to(folder).as_posix()}/" for path in both) for both in found)
        raise InputError(f"{folder} holds more than one set ({several}); name one with --vi DIR and --ir DIR")
    return found[0]


def role_names(vis: Path, ir: Path) -> tuple[str, str]:
    """What a data set calls its visible (or MRI) and its infrared (or CT...) images; vi and ir if both the same."""
    vis_name, ir_name = _names(vis)[-1], _names(ir)[-1]
    return (vis_name, ir_name) if vis_name != ir_name else ("vi", "ir")


def set_name(vis: Path) -> str:
    """What a data set is called: as the folder above its visible images, train/ and test/ passed over."""
    return _names(vis)[-2]


def _names(folder: Path) -> list[str]:
    return ["set", "set", *(part for part in Path(os.path.abspath(folder)).parts[1:] if part.lower() not in PARTS)]


def task_of(vis: Path, ir: Path) -> str:
    """The task that the names of two sources speak of, "ivf" or "mif"; "" where they say neither, or both."""
    words = [set(re.split("[^a-z]+", " ".join(path.absolute().parts[-2:]).lower())) for path in (vis, ir)]
    tasks = [task for task, *sides in LAYOUTS if all(each & {*names} for each, names in zip(words, sides, strict=True))]
    return tasks[0] if len(tasks) == 1 else ""


def open_pairs(vis: Path, ir: Path, args: argparse.Namespace, memory: int | None = None) -> PairList:
    """The pairs of two folders as a script's options say: `list_pairs`, then `read_as`; one folder twice is refused."""
    if not args.ir_from_alpha:
        refuse_one_source(vis, ir)
    return read_as(list_pairs(vis, ir, args.pair_by), args, memory)


def read_as(found: PairList, args: argparse.Namespace, memory: int | None = None) -> PairList:
    """The pairs, with how their files are read.

    Args:
        found: pairs of files; with --slice all, those of volumes become a pair for each slice.
        args: has the options of `utils.data.readers.add_reading_options`.
        memory: bytes that the process may have.

    Raises:
        InputError: an option has no such value, two volumes differ in the number of their slices, or what "auto"
            means cannot be found out.
    """
    vis_reading, ir_reading = readings_of(args, memory)
    pairs = [pair._replace(vis_reading=vis_reading, ir_reading=ir_reading) for pair in found.pairs]
    if args.slice == "all":
        pairs = [slice_pair for pair in pairs for slice_pair in _slices(pair)]
    if vis_reading.range == "auto":
        chosen = auto_range(vis_reading, _all_values((p.vis, p.vis_reading) for p in pairs), str(pairs[0].vis.parent))
        pairs = [pair._replace(vis_reading=pair.vis_reading._replace(range=chosen)) for pair in pairs]
    if ir_reading.range == "auto":
        chosen = auto_range(ir_reading, _all_values((p.ir, p.ir_reading) for p in pairs), str(pairs[0].ir.parent))
        pairs = [pair._replace(ir_reading=pair.ir_reading._replace(range=chosen)) for pair in pairs]
    return found._replace(pairs=tuple(pairs))


def _slices(pair: Pair) -> list[Pair]:
    """A pair for each slice of two volumes; the pair itself where there is only one."""
    count, other = pages_in(pair.vis), pages_in(pair.ir)
    if count != other:
        raise InputError(f"--slice all: {pair.vis} holds {count} slices and {pair.ir} holds {other}")
    return [pair] if count == 1 else [
        pair._replace(
            name=f"{pair.name}_{page:0{len(str(count))}d}",
            vis_reading=pair.vis_reading._replace(page=page),
            ir_reading=pair.ir_reading._replace(page=page),
        )
        for page in range(1, count + 1)
    ]  # fmt: skip


def _all_values(files: Iterable[tuple[Path, Reading]]) -> Iterator[np.ndarray]:
    for path, reading in files:
        with contextlib.suppress(InputError, OSError):  # it is named where it is read to be used
            yield values_in(path, reading)
