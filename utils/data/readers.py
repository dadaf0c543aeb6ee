"""An image file -> its pixels: formats, memory, and which of its values become black and white.

What is left out of a file (alpha, further pages, most of a range) is named on stderr, once for each kind and folder.
Formats: PNG, JPEG, BMP, WebP, portable anymaps by OpenCV; TIFF by tifffile; the first frame of a GIF; DICOM and NIfTI
where pydicom and nibabel are installed.
"""

from __future__ import annotations

import argparse
import logging
import math
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tifffile import TiffFile
from tqdm import tqdm

from utils.common import InputError, free_memory, reason_of, remember_source, resident_memory

SUFFIXES = frozenset(".png .jpg .jpeg .bmp .dib .tif .tiff .pbm .pgm .ppm .webp .gif .dcm .nii .nii.gz".split())

READ_BYTES = 36  # a pixel, at the most: as in the file, as float colours, as grey levels
HARDLY_USED = 0.1  # of a deep range: less is named
NEARLY_CONSTANT = 3  # levels of 255 between the percentiles below
PERCENTILES = (0.5, 99.5)
SAMPLE = 2**14  # pixels of an image that percentiles are taken of
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEEP_FRAMES = int.from_bytes(b"Y1\0\x10", "little")  # what FFmpeg calls grey frames of 16 bits

# What is wrong with a file is said here, in one line.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # for whoever configures logging
Image.MAX_IMAGE_PIXELS = None


class Reading(NamedTuple):
    """How the files of one role are read.

    Attributes:
        role: "vi" or "ir", the option that names the files; "" where there is none.
        range: two values of the file, which become 0 and 255; "full": the whole range of its type, and 0 to 1 for
            floats; "auto": see `auto_range`. None: the window that the file itself has, else "full" for
            files of up to 16 bits without a sign; the rest is refused.
        alpha: take the fourth channel; None: say where one that varies is left out.
        page: of a volume or of a file of several pages, from 1.
        memory: bytes that this process may have; None: what is free.
    """

    role: str = ""
    range: tuple[float, float] | str | None = None
    alpha: bool | None = None
    page: int | None = None
    memory: int | None = None

    @property
    def option(self) -> str:
        return f"--{self.role}-range" if self.role else "--vi-range or --ir-range"


PLAIN = Reading()


class Values(NamedTuple):
    """What a file holds: (H, W), or (H, W, 3) with red first.

    Attributes:
        values: as they are in the file, with the slope of a medical file applied.
        full: the range that they can have, where it is not that of their type.
        window: what the file itself wants to be black and white.
        inverted: whether small values are bright.
    """

    values: np.ndarray
    full: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    inverted: bool = False


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that reads pairs; `readings_of` turns them into two `Reading`."""
    group = parser.add_argument_group("how the sources are read")
    for role, files in (("vi", "visible or MRI"), ("ir", "infrared, CT, PET or SPECT")):
        group.add_argument(
            f"--{role}-range",
            nargs="+",
            metavar="VALUE",
            help=f"LOW HIGH: values of the {files} files that become black and white; auto: their {PERCENTILES[0]} and "
            f"{PERCENTILES[1]} %% percentiles, over all files; full: the range of their type (default: as the file "
            "says, else full)",
        )
    add = group.add_argument
    add("--window", type=float, nargs=2, metavar=("C", "W"), help="as --ir-range: centre and width of a DICOM window")
    add("--slice", metavar="N", help="slice of DICOM or NIfTI volumes, page of TIFF files, from 1; or all")
    add("--ir-from-alpha", action="store_true", help="the fourth channel of the infrared files is the infrared image")


def readings_of(args: argparse.Namespace, memory: int | None = None) -> tuple[Reading, Reading]:
    """How visible and infrared files are read, as the options say; `memory`: bytes for the whole process.

    Raises:
        InputError: an option has no such value.
    """
    if args.window and args.ir_range:
        raise InputError("--window and --ir-range exclude each other: both say what becomes black and white")
    page = int(args.slice[:10]) if args.slice and args.slice.isdecimal() else None
    if page == 0 or (page is None and args.slice not in (None, "all")):
        raise InputError(f"--slice must be a number from 1, or all, got {args.slice[:20]}")
    ir_range = _range_of("--ir-range", args.ir_range)
    if args.window:
        centre, width = args.window
        ir_range = _range_of("--window", [centre - width / 2, centre - 1 + width / 2])  # PS3.3 C.11.2.1.2
    vis_alpha, ir_alpha = (False, True) if args.ir_from_alpha else (None, None)
    vis = Reading("vi", _range_of("--vi-range", args.vi_range), vis_alpha, page, memory)
    return vis, Reading("ir", ir_range, ir_alpha, page, memory)


def _range_of(option: str, given: Sequence[Any] | None) -> tuple[float, float] | str | None:
    if given is None or given in (["auto"], ["full"]):
        return given and given[0]
    try:
        low, high = map(float, given)
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise InputError(f"{option} must be two growing numbers, auto or full, got {' '.join(map(str, given))[:40]}")
    return low, high


def auto_range(reading: Reading, images: Iterable[np.ndarray], what: str) -> tuple[float, float]:
    """The range that "auto" means for these images together, as `values_in` or a video gives them. It is printed.

    Raises:
        InputError: there is no image.
    """
    values = np.concatenate([*(_sample(image).ravel() for image in images), np.empty(0, np.uint8)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise InputError(f"{reading.option} auto: not one image of {what} can be read")
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    high = max(high, low + 1)  # where all is constant
    print(f"note: {reading.option} auto: {low:g} becomes black, {high:g} white, in all of {what}", file=sys.stderr)
    return low, high


def values_in(path: Path, reading: Reading) -> np.ndarray:
    """The values of a file as they are, for `auto_range`; errors as of `decode`."""
    return _open(path, reading).values


def decode(path: Path, reading: Reading = PLAIN) -> np.ndarray:
    """The pixels of a file: uint8, or float32 levels in [0, 255] where it has more; (H, W), or (H, W, 3), red first.

    Raises:
        FileNotFoundError: no such file.
        InputError: not an image, damaged, too large for the memory, or what its values mean is not known.
    """
    return levels_of(str(path), _open(path, reading), reading)


def _open(path: Path, reading: Reading) -> Values:
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device could wait for ever
        raise InputError(f"{path} is a folder, a pipe or a device, not a file")
    remember_source(path)
    with open(path, "rb") as file:
        start = file.read(132)
    if start[:4] in TIFF_STARTS:
        reader = _read_tiff
    elif start[128:] == b"DICM" or path.suffix.lower() == ".dcm":
        reader = _read_dicom
    elif suffix_of(path) in (".nii", ".nii.gz"):
        reader = _read_nifti
    else:
        reader = _read_by_opencv
    if reading.alpha and reader in (_read_dicom, _read_nifti):
        raise InputError(f"{path} has no fourth channel, which --ir-from-alpha takes")
    try:
        return reader(path, reading)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into the memory that is free; reduce it") from error
    except ImportError as error:
        raise InputError(f"{path} needs a package that is not installed: pip install {error.name}") from error
    except Exception as error:  # whatever a damaged file leads a library to
        raise InputError(
            f"{path} is not an image that can be read ({reason_of(error)[:200]}); replace it, convert it, or remove it"
        ) from error


def levels_of(name: str, given: Values, reading: Reading) -> np.ndarray:
    """Values -> uint8, or float32 in [0, 255], as `decode` says.

    Raises:
        InputError: they are not finite, or it is not known which become black and white.
    """
    values, window = given.values, given.window
    full = given.full or _full_range(values.dtype)
    if not values.size or not np.isfinite(values).all():
        raise InputError(f"{name} holds {'NaN or infinite values' if values.size else 'no pixels'}; replace it")
    low, high = float(values.min()), float(values.max())
    held = f"{values.dtype} values from {low:g} to {high:g}"
    # What the values of other types mean is known to their owner alone: counts, kelvin, shares of 1.
    scale = reading.range or window or (full if values.dtype in (np.uint8, np.uint16) else None)
    if scale == "full":
        scale = full if full[0] <= low and high <= full[1] else None
    if scale is None or not 0 < scale[1] - scale[0] < math.inf:  # a damaged slope or window
        raise InputError(f"{name} holds {held}; say with {reading.option} LOW HIGH (or auto) what is black and white")
    if values.dtype == np.uint8 and scale == (0, 255):
        levels = values
    else:
        exact = np.float32 if values.dtype.itemsize <= 2 else np.float64
        levels = ((values.astype(exact) - scale[0]) * exact(255 / (scale[1] - scale[0]))).astype(np.float32, copy=False)
        np.clip(levels, 0, 255, out=levels)
    used = (high - low) / (scale[1] - scale[0])
    if not (reading.range or window) and values.dtype != np.uint8 and used < HARDLY_USED:
        most = f"{used:.1%} of 0 to {scale[1]:g}"
        _say("range", name, f"holds {held}, {most}, and is nearly constant; {reading.option} auto spreads it", reading)
    else:
        low, high = np.percentile(_sample(levels), PERCENTILES)
        if high - low < NEARLY_CONSTANT:
            _say("constant", name, f"is nearly constant: {low:.1f} to {high:.1f} of 255", reading)
    return 255 - levels if given.inverted else levels


def _sample(image: np.ndarray) -> np.ndarray:
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // SAMPLE))
    return image[::step, ::step]


_said: set[tuple[str, str, Path]] = set()


def _say(kind: str, name: str, text: str, reading: Reading) -> None:
    """One line about a file, or about a frame "FILE, frame N"; once for each kind, role and folder (or video)."""
    file, is_frame, _ = name.partition(", frame ")
    key = (kind, reading.role, Path(file) if is_frame else Path(file).parent)
    if key not in _said:
        _said.add(key)
        tqdm.write(f"note: {name} {text}", file=sys.stderr)


def suffix_of(path: Path) -> str:
    """The suffix in small letters, ".nii.gz" whole."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The name without `suffix_of`."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def check_size(path: Path, width: int, height: int, reading: Reading) -> None:
    """Raises InputError where so many pixels need more memory than is left."""
    left = reading.memory - resident_memory() if reading.memory else free_memory()
    if left is not None and width * height * READ_BYTES > left:
        more = ", or give --max-memory more" if reading.memory else ""
        raise InputError(
            f"{path} is {width}x{height} pixels, which take {width * height * READ_BYTES / 1e9:.1f} GB to read, and "
            f"{max(left, 0) / 1e9:.1f} GB are left; reduce it{more}"
        )


def _check_page(path: Path, pages: int, reading: Reading, what: str) -> int:
    """The index of the page that is asked for."""
    page = reading.page or 1
    if page > pages and (pages > 1 or what == "slices"):
        raise InputError(f"{path} holds {pages} {what}; there is no --slice {page}")
    if reading.page is None and pages > 1:
        if what == "slices":
            raise InputError(f"{path} holds {pages} slices; choose one with --slice N, from 1, or --slice all")
        other = "--slice takes others" if what == "pages" else "for all of them make a video of it"
        _say("pages", str(path), f"holds {pages} {what}, and the first is taken; {other}", reading)
    return min(page, pages) - 1


def pages_in(path: Path) -> int:
    """How many slices a volume has, or pages a TIFF file; 1 for what is neither, or cannot be read."""
    try:
        if suffix_of(path) in (".nii", ".nii.gz"):
            image, axis, _ = _nifti(path)
            return image.shape[axis]
        if suffix_of(path) == ".dcm":
            from pydicom import dcmread

            frames = int(dcmread(path, stop_before_pixels=True).get("NumberOfFrames") or 1)
            return frames if frames <= path.stat().st_size else 1
        if suffix_of(path) in (".tif", ".tiff"):
            with TiffFile(path) as file:
                return len(_whole_pages(file))
    except Exception:  # whatever is wrong with it, `decode` says so
        return 1
    return 1


def _read_by_opencv(path: Path, reading: Reading) -> Values:
    has_alpha = False
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "DIB", "PPM", "WEBP", "GIF")) as header:
            check_size(path, *header.size, reading)
            _check_page(path, getattr(header, "n_frames", 1), reading, "frames")
            has_alpha = header.mode in ("RGBA", "LA", "PA") or "transparency" in header.info
            if header.format == "GIF" and not reading.alpha:
                return Values(np.array(header.convert("RGB")))
    except OSError:  # a header that Pillow does not know
        pass
    data = path.read_bytes()  # not cv2.imread: it cannot open every unicode path
    encoded = np.frombuffer(data, np.uint8)
    image = _imdecode(path, encoded)
    if _is_cut(data):
        raise InputError(f"{path} is cut off: its end is missing; replace it, or remove it")
    if has_alpha or reading.alpha:
        with_alpha = _imdecode(path, encoded, alpha=True)
        four = with_alpha.ndim == 3 and with_alpha.shape[2] == 4
        image = _without_alpha(path, image, with_alpha[..., 3:] if four else None, reading)
    return Values(image)


def _imdecode(path: Path, encoded: np.ndarray, alpha: bool = False) -> np.ndarray:
    """(H, W, 3), red first; with `alpha` whatever channels the file has, an alpha channel as the fourth."""
    flags = cv2.IMREAD_UNCHANGED if alpha else cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(encoded, flags)
    except cv2.error:  # an empty buffer, or a header that promises more pixels than OpenCV allows
        image = None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"{path} is not an image of 8 or 16 bits that OpenCV can read ({encoded.size} bytes); "
            "replace it, convert it, or remove it"
        )
    return image if alpha else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_cut(data: bytes) -> bool:
    """Whether the end of a PNG or JPEG file is missing: OpenCV 4 makes up the rest without a word."""
    if data[:4] == b"\x89PNG":
        return data.rfind(b"IEND") < 0
    if data[:3] != b"\xff\xd8\xff":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # blocks, before the compressed pixels
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) < 0


def _without_alpha(path: Path, image: np.ndarray, alpha: np.ndarray | None, reading: Reading) -> np.ndarray:
    """The image, or its fourth channel where that is asked for; alpha: (H, W, N), of which the first counts."""
    if reading.alpha:
        if alpha is None:
            raise InputError(f"{path} has no fourth channel, which --ir-from-alpha takes")
        return np.ascontiguousarray(alpha[..., 0])
    if alpha is not None and reading.alpha is None and (not alpha.any() or alpha.min() != alpha.max()):
        clear = (alpha[..., 0] == 0).mean()
        hidden = f" {clear:.0%} of its pixels are transparent, and are taken as if they were not." if clear else ""
        low, high = alpha.min(), alpha.max()
        text = f"has an alpha channel from {low} to {high}, which is left out; --ir-from-alpha takes it as infrared."
        _say("alpha", str(path), text + hidden, reading)
    return image


def _whole_pages(file: Any) -> list[Any]:
    """The pages of a TIFF file without thumbnails and masks."""
    return [page for page in file.pages if not int(getattr(page, "subfiletype", 0)) & 5] or [file.pages[0]]


def _read_tiff(path: Path, reading: Reading) -> Values:
    with TiffFile(path) as file:
        pages = _whole_pages(file)
        page = pages[_check_page(path, len(pages), reading, "pages")].aspage()
        check_size(path, page.imagewidth, page.imagelength, reading)
        bits, kind, samples = page.bitspersample, int(page.photometric), page.samplesperpixel
        try:
            if kind > 2 or bits < 8:
                raise ValueError(f"photometric interpretation {page.photometric.name}, {bits} bits")
            values = page.asarray()
        except ValueError as error:
            # Palettes, YCbCr and some compressions are OpenCV's, where it reads them right: the first page, no alpha.
            simple = bits <= 8 or (bits == 16 and kind in (1, 2) and page.planarconfig == 1)
            simple &= page.index == 0 and samples <= 3 and page.sampleformat == 1
            if not simple or "failed to read" in str(error):
                raise InputError(f"{path} is a TIFF file that cannot be read ({error}); convert it") from error
            return Values(_imdecode(path, np.fromfile(path, np.uint8)))
    if samples > 1 and page.planarconfig == 2:
        values = np.moveaxis(values, 0, -1)
    values = values if values.ndim > 2 else values[..., None]
    colours = 3 if kind == 2 else 1
    if values.ndim != 3 or values.shape[2] < colours or values.dtype.kind not in "uif":
        raise InputError(f"{path} is a TIFF file of shape {values.shape} and type {values.dtype}, not one image")
    alpha = values[..., colours:] if values.shape[2] > colours else None
    values = _without_alpha(path, values[..., :3] if colours == 3 else values[..., 0], alpha, reading)
    return Values(values, _full_range(values.dtype, bits), inverted=kind == 0)


def _full_range(kind: np.dtype, bits: int | None = None) -> tuple[float, float]:
    """What "full" is for a type, of whose bits fewer may be used."""
    if kind.kind == "f":
        return 0, 1
    bits = bits or 8 * kind.itemsize
    return (0, 2**bits - 1) if kind.kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _read_dicom(path: Path, reading: Reading) -> Values:
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = dcmread(path, stop_before_pixels=True)
    index = _check_page(path, int(header.get("NumberOfFrames") or 1), reading, "slices")
    check_size(path, header.Columns, header.Rows, reading)
    data = dcmread(path)
    for groups, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if groups in data and sequence in data[groups][item]:  # enhanced files say it for each slice
                data.update(data[groups][item][sequence][0])
    values, kind = pixel_array(data, index=index), data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        return Values(values)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError(f"{path} has the photometric interpretation {kind}, which is not known here; convert it")
    ends = np.array(_full_range(values.dtype, int(data.BitsStored)), values.dtype)
    if (data.get("RescaleSlope", 1), data.get("RescaleIntercept", 0)) != (1, 0) or "ModalityLUTSequence" in data:
        values, ends = apply_modality_lut(values, data), apply_modality_lut(ends, data)
    window = None
    if "WindowCenter" in data and data.get("VOILUTFunction", "LINEAR") in ("LINEAR", "LINEAR_EXACT"):
        centre, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        exact = data.get("VOILUTFunction") == "LINEAR_EXACT"
        window = (centre - width / 2, centre + width / 2 - (0 if exact else 1))  # PS3.3 C.11.2.1.2
        window = window if window[0] < window[1] else None
    return Values(values, (float(ends.min()), float(ends.max())), window, inverted=kind == "MONOCHROME1")


def _nifti(path: Path) -> tuple[Any, int, bool]:
    """A volume, its axis from feet to head, and whether that runs the other way."""
    import nibabel

    image = nibabel.load(path)
    if len(image.shape) > 3 and set(image.shape[3:]) == {1}:
        image = nibabel.funcs.squeeze_image(image)
    if len(image.shape) != 3 or image.get_data_dtype().kind not in "uif":
        raise InputError(f"{path} has the shape {image.shape} and type {image.get_data_dtype()}, not one volume")
    axes = nibabel.io_orientation(image.affine)
    axis = int(np.flatnonzero(axes[:, 0] == 2)[0])
    return image, axis, axes[axis, 1] < 0


def _read_nifti(path: Path, reading: Reading) -> Values:
    image, axis, is_flipped = _nifti(path)
    import nibabel

    index = _check_page(path, image.shape[axis], reading, "slices")
    check_size(path, *(side for i, side in enumerate(image.shape) if i != axis), reading)
    index = image.shape[axis] - 1 - index if is_flipped else index
    part = image.slicer[tuple(slice(index, index + 1) if i == axis else slice(None) for i in range(3))]
    # Front up and the patient's right on the left, as DICOM slices are shown.
    values = np.asanyarray(nibabel.as_closest_canonical(part).dataobj)[::-1, ::-1, 0].T
    window = (float(image.header["cal_min"]), float(image.header["cal_max"]))
    return Values(values, window=window if window[0] < window[1] else None)
