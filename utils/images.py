"""Image files <-> arrays: the published grey rule, 8-bit writing, and pairs of files by name.

An image array here is (H, W) float32 grey levels in [0, 255].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils import InputError, listed, whole_file

SUFFIXES = frozenset(".png .jpg .jpeg .bmp .dib .tif .tiff .pbm .pgm .ppm".split())

# Sub-folders of a data set, (visible or MRI, infrared or CT/PET/SPECT), in the order they are looked for.
MODALITIES = (("vi", "ir"), ("vis", "ir"), ("MRI", "CT"), ("MRI", "PET"), ("MRI", "SPECT"))


def read_grey(path: Path | str) -> np.ndarray:
    """Grey levels of an image file by the rule behind the published tables.

    Colour is decoded first and turned to grey as floats, 0.299 R + 0.587 G + 0.114 B, then rounded half to
    even. OpenCV's own grey reading differs from it in up to 6 % of the pixels of false-colour PET files.
    EXIF orientation is applied. 16-bit files are scaled to [0, 255] and not rounded, so that no depth is
    lost: 65535 becomes 255 and one 16-bit level 0.0039.

    Args:
        path: PNG, JPEG, BMP, TIFF or portable anymap file of 8 or 16 bits.

    Returns:
        float32 (H, W) in [0, 255].

    Raises:
        FileNotFoundError: no such file.
        InputError: not an image, damaged, or neither 8 nor 16 bits deep.
    """
    luma, depth = _read_luma(Path(path))
    return np.round(luma) if depth == 8 else luma


def read_luma(path: Path | str) -> np.ndarray:
    """As `read_grey`, without the rounding: what the published training reads. float32 (H, W) in [0, 255]."""
    return _read_luma(Path(path))[0]


def _read_luma(path: Path) -> tuple[np.ndarray, int]:
    encoded = np.fromfile(path, dtype=np.uint8)  # not cv2.imread: it cannot open every unicode path
    try:
        bgr = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # an empty buffer, or a header that promises more pixels than OpenCV allows
        bgr = None
    if bgr is None or bgr.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"{path} is not an image of 8 or 16 bits that OpenCV can read ({encoded.size} bytes); "
            "replace it, convert it, or remove it"
        )
    luma = cv2.cvtColor(bgr.astype(np.float32), cv2.COLOR_BGR2GRAY)
    if bgr.dtype == np.uint16:
        return luma * np.float32(255 / 65535), 16
    return luma, 8


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Grey levels rounded half up and clipped to 0..255.

    Raises:
        InputError: a pixel is not finite: NaN would silently become 0.
    """
    if not np.isfinite(image).all():
        raise InputError(f"an image of shape {image.shape} holds NaN or infinite pixels; it was not written")
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def write_grey(path: Path | str, image: np.ndarray) -> None:
    """Writes (H, W) grey levels as an 8-bit file, rounded half up and clipped, whole or not at all.

    Args:
        path: target; the suffix chooses the format. Folders are made.
        image: (H, W) in [0, 255].

    Raises:
        InputError: the array is not (H, W), holds NaN, or the format is unknown.
    """
    path = Path(path)
    if image.ndim != 2:
        raise InputError(f"{path}: a grey image must be (H, W), got {image.shape}")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: unknown image format; use one of {' '.join(sorted(SUFFIXES))}")
    encoded = cv2.imencode(path.suffix, to_uint8(image))[1]
    with whole_file(path) as temporary:
        encoded.tofile(temporary)


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
    if vis.shape != ir.shape:
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


def modalities_in(folder: Path) -> list[tuple[Path, Path]]:
    """Every known combination of sub-folders that a folder holds, visible or MRI first."""
    both = [(folder / vis, folder / ir) for vis, ir in MODALITIES]
    return [(vis, ir) for vis, ir in both if vis.is_dir() and ir.is_dir()]


def find_modalities(folder: Path | str) -> tuple[Path, Path]:
    """The two sub-folders of a data set: (visible or MRI, infrared or CT/PET/SPECT).

    Raises:
        FileNotFoundError: the folder holds none of the known combinations; they are named.
        InputError: it holds several.
    """
    folder = Path(folder)
    found = [
        (folder / vis, folder / ir) for vis, ir in MODALITIES if (folder / vis).is_dir() and (folder / ir).is_dir()
    ]
    if not found:
        known = ", ".join(f"{vis}/ and {ir}/" for vis, ir in MODALITIES)
        raise FileNotFoundError(f"{folder} must hold two folders of images, one of: {known}")
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
