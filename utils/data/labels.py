"""Labels of a data set of pairs: masks of classes, and boxes as CSV, COCO JSON or YOLO text.

A label is read right or refused: a class that nobody named, a size that differs from the image's or a box without area
is one clear line, because each of them would only show as a worse score.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.common import InputError, listed, remember_source

IGNORE = 255  # the mask value of pixels that neither train nor count


class Boxes(NamedTuple):
    """Objects of one image: corners x0, y0, x1, y1 in pixels, float32 (N, 4), and numbers of classes, int64 (N,)."""

    corners: np.ndarray
    classes: np.ndarray


class _Box(NamedTuple):
    where: str
    name: str
    kind: str
    corners: tuple[float, ...]


def read_mask(path: Path, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """The class of every pixel, uint8 (H, W): 0 ... num_classes - 1, and `IGNORE`.

    Args:
        path: an image with one channel, or a palette; of three equal channels the first is taken.
        size: (H, W) of the image that the mask belongs to.
        num_classes: how many classes there are.

    Raises:
        InputError: unreadable, of another size, in colours, or with a number that no class has.
    """
    try:
        mask = np.asarray(Image.open(path))  # PIL keeps the numbers of a palette, OpenCV makes colours of them
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a mask that can be read ({error})") from error
    if mask.ndim == 3 and (mask[..., :3] == mask[..., :1]).all():
        mask = mask[..., 0]
    if mask.ndim != 2:
        raise InputError(f"{path} has colours; a mask holds a class number in every pixel, 0 to {num_classes - 1}")
    if mask.shape != size:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]} (width x height)"
        raise InputError(f"{path} is {sizes}; a mask must have the size of its image: resize it without interpolation")
    unknown = [number for number in np.unique(mask) if number >= num_classes and number != IGNORE]
    if unknown:
        raise InputError(f"{path} holds class {listed(unknown)}, but there are {num_classes}: 0 to {num_classes - 1}; "
                         "name every class with --classes")  # fmt: skip
    return mask.astype(np.uint8)


def read_boxes(
    path: Path, sizes: Mapping[str, tuple[int, int]], classes: Sequence[str] = ()
) -> tuple[dict[str, Boxes], list[str]]:
    """The boxes of every image of `sizes`, and the names of the classes. Boxes of other images are left out.

    Args:
        path: .csv with the columns name, class, x0, y0, x1, y1 (pixels); .json as COCO has it; or a folder with one
            YOLO text file an image (class number, centre and size as fractions) and, without `classes`, `classes.txt`.
        sizes: (H, W) of the images, by file name without suffix.
        classes: names of all classes, in order (default: those in the file).

    Raises:
        InputError: a file of another form, an unknown class, a size that differs, or a box without area in its image.
    """
    try:
        if path.is_dir():
            names = list(classes) or (path / "classes.txt").read_text(encoding="utf-8").split("\n")
            found = list(_yolo(path, sizes, [name.strip() for name in names if name.strip()]))
        else:
            remember_source(path)
            found = list((_coco if path.suffix.lower() == ".json" else _csv)(path, sizes))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not boxes in CSV, COCO or YOLO form ({type(error).__name__}: {error})") from error
    known = list(classes) or sorted({box.kind for box in found})
    boxes: dict[str, list[tuple[np.ndarray, int]]] = {name: [] for name in sizes}
    for box in found:
        if box.name not in sizes:
            continue
        if box.kind not in known:
            raise InputError(f"{box.where}: unknown class {box.kind}; --classes names {listed(known)}")
        height, width = sizes[box.name]
        corners = np.clip(np.float32(box.corners), 0, np.float32([width, height, width, height]))
        if not (corners[2:] > corners[:2]).all():  # also where a number is NaN
            raise InputError(f"{box.where}: a box without area inside the {width}x{height} image {box.name}; remove it")
        boxes[box.name].append((corners, known.index(box.kind)))
    if not any(boxes.values()):
        raise InputError(f"{path} has no box for any image, such as {listed(sizes, 3)}; names are without suffix")
    return {
        name: Boxes(np.float32([c for c, _ in each]).reshape(-1, 4), np.int64([k for _, k in each]))
        for name, each in boxes.items()
    }, known


def _csv(path: Path, sizes: Mapping[str, tuple[int, int]]) -> Iterator[_Box]:
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            corners = tuple(float(row[key]) for key in ("x0", "y0", "x1", "y1"))
            yield _Box(f"{path} line {number}", row["name"], row["class"], corners)


def _coco(path: Path, sizes: Mapping[str, tuple[int, int]]) -> Iterator[_Box]:
    content = json.loads(path.read_text(encoding="utf-8"))
    kinds = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    for image in images.values():
        name = Path(image["file_name"]).stem
        said = (image.get("height"), image.get("width"))
        if name in sizes and None not in said and said != sizes[name]:
            raise InputError(f"{path}: {name} is {said[1]}x{said[0]} there, but the image is "
                             f"{sizes[name][1]}x{sizes[name][0]} (width x height)")  # fmt: skip
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        kind = kinds.get(each["category_id"], f"number {each['category_id']}")
        name = Path(images[each["image_id"]]["file_name"]).stem
        yield _Box(f"{path} annotation {each.get('id')}", name, kind, (x, y, x + width, y + height))


def _yolo(folder: Path, sizes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> Iterator[_Box]:
    for name, (height, width) in sizes.items():
        path = folder / f"{name}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            kind, x, y, w, h = line.split()[:5]
            if not 0 <= int(kind) < len(names):
                raise InputError(f"{where}: unknown class {kind}; there are {len(names)}, 0 to {len(names) - 1}")
            x, y, w, h = float(x) * width, float(y) * height, float(w) * width, float(h) * height
            yield _Box(where, name, names[int(kind)], (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
