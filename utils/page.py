"""What the page of app.py offers, without the page: uploads -> checked sources -> fused file, features, scores, words.

Whoever uses the page sits elsewhere, so every message here names a file as its owner knows it, never as it lies on
this machine, and whatever comes from the page is looked up, never taken for a path.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.common import InputError, in_checkout, listed
from utils.data.images import read_grey, side_by_side, to_uint8, write_image
from utils.data.pairs import find_modalities, list_pairs
from utils.data.registration import edge_shift, resize
from utils.data.sources import Registration, Source, read_source
from utils.evaluation.benchmark import Method, load_method
from utils.inference.colour import COLOURS, fuse_sources
from utils.inference.fusing import memory_to_take
from utils.inference.memory import format_size
from utils.metrics import METRICS, score
from utils.training.monitor import feature_maps
from zoo import SYSTEMS, TASKS, find_system

ROLES = {"ivf": ("visible", "infrared"), "mif": ("MRI", "CT, PET or SPECT")}
COLOUR_NAMES = [("of both", "both"), ("visible", "vis"), ("infrared", "ir"), ("grey", "none")]
SAMPLE_SETS = {"ivf": ("Sample_IVF",), "mif": ("Sample_MRI_CT", "Sample_MRI_PET")}

BYTES_PER_PIXEL = 8  # of the largest file: four channels of 16 bits, not compressed
SMALLEST_LIMIT = 10**6  # bytes; headers and thumbnails of a small image

# Feature maps are drawn as small pictures; those of CDDFuse took 2500 bytes a pixel, 364 MB for so many.
FEATURE_PIXELS = 150_000
FEATURE_BYTES = 3500  # a pixel, with room for what was not measured


class Upload(NamedTuple):
    """A file on this machine and what its owner calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Limits:
    """What one uploaded image may be."""

    pixels: int

    @property
    def file_bytes(self) -> int:
        return max(self.pixels * BYTES_PER_PIXEL, SMALLEST_LIMIT)

    def __str__(self) -> str:
        return f"{megapixels(self.pixels)} and {format_size(self.file_bytes)}"


def megapixels(pixels: int) -> str:
    """
    >>> megapixels(4_000_000), megapixels(221_184)
    ('4 megapixels', '0.221 megapixels')
    """
    return f"{pixels / 1e6:.3g} megapixels"


class Sample(NamedTuple):
    """A bundled pair."""

    task: str
    vis: Upload
    ir: Upload

    def thumbnail(self, height: int = 96) -> np.ndarray:
        """Both images in a row, uint8 (height, W, 3)."""
        sources = [read_source(upload.path).shown for upload in (self.vis, self.ir)]
        small = [resize(image, (height, round(image.shape[1] * height / image.shape[0]))) for image in sources]
        row = side_by_side([to_uint8(image) for image in small])
        return row if row.ndim == 3 else np.repeat(row[..., None], 3, axis=2)


def bundled_samples() -> list[Sample]:
    found = []
    for task, sets in SAMPLE_SETS.items():
        for name in sets:
            for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs:
                found.append(Sample(task, *(Upload(path, path.name) for path in (pair.vis, pair.ir))))
    return found


@dataclass(frozen=True)
class Result:
    """One fused pair.

    Attributes:
        file: the fused image as written, 8-bit PNG in the name of the visible one.
        fused, vis, ir: what is shown, uint8 (H, W) or (H, W, 3), of one size.
        features: by name, uint8; empty where the system shows none.
        columns: the metrics of the table, in its order.
        scores: row -> metric -> value: the file as written, either source alone, their average.
        facts: how it was made, one line.
        notes: what its owner should know, a line each.
    """

    file: Path
    fused: np.ndarray
    vis: np.ndarray
    ir: np.ndarray
    features: dict[str, np.ndarray]
    columns: tuple[str, ...]
    scores: dict[str, dict[str, float]]
    facts: str
    notes: list[str]


@dataclass
class Desk:
    """Everything the page can be asked for.

    Attributes:
        folder: where results are written, each in a folder of its own; whoever made it removes it.
        weights: system -> name of a file -> the file; see `weights_by_system`.
        limits: of an uploaded image.
        protocol: of the scores.
        device, precision, max_memory, scratch: as of `utils.inference.fusing.fuse_arrays`.
    """

    folder: Path
    weights: Mapping[str, Mapping[str, Path]]
    limits: Limits = Limits(4_000_000)
    protocol: str = "paper"
    device: torch.device = torch.device("cpu")
    precision: str = "float32"
    max_memory: int | None = None
    scratch: Path | None = None
    _methods: dict[tuple[str, str, str], Method] = field(default_factory=dict)

    def default_weights(self, system: str, task: str) -> str:
        """The name of the file that suits a task: the bundled one, else the first that was given."""
        offered = chosen(self.weights, system, "system")
        bundled = find_system(system).weights[task]
        return next((name for name in reversed(bundled) if name in offered), next(iter(offered)))

    def read(self, upload: Upload | None, role: str) -> Source:
        """The image of an upload, within the limits.

        Raises:
            InputError: nothing was uploaded, it is too large, or it is not an image that can be read.
        """
        if upload is None:
            raise InputError(f"there is no {role} image yet: choose a file, or one of the samples")
        called = f"the {role} image {upload.name}"
        try:
            self._check_limits(upload.path, called)
            return read_source(upload.path)._replace(name=called)
        except FileNotFoundError as error:
            raise InputError(
                f"{called} is no longer here (uploads are removed after a while); choose it again"
            ) from error
        except InputError as error:
            raise InputError(str(error).replace(str(upload.path), called)) from error

    def preview(self, upload: Upload, task: str, place: int) -> np.ndarray:
        """The first or second image of a pair as it was read, uint8 (H, W) or (H, W, 3); errors as `read`."""
        return to_uint8(self.read(upload, chosen(ROLES, task, "kind of images")[place]).shown)

    def _check_limits(self, path: Path, called: str) -> None:
        size = path.stat().st_size
        if size > self.limits.file_bytes:
            raise InputError(
                f"{called} has {format_size(size)}, and this page takes {format_size(self.limits.file_bytes)}; "
                "reduce it, or use fuse.py, which has no such limit"
            )
        shape = size_in_header(path)
        if shape and math.prod(shape) > self.limits.pixels:
            raise InputError(
                f"{called} is {shape[0]}x{shape[1]}, {megapixels(math.prod(shape))}, and this page takes "
                f"{megapixels(self.limits.pixels)}; reduce it, or use fuse.py, which has no such limit"
            )

    def fuse(
        self,
        vis: Upload | None,
        ir: Upload | None,
        *,
        task: str = "ivf",
        system: str = "cddfuse",
        weights: str | None = None,
        colour: str = "both",
        resize_ir: bool = False,
    ) -> Result:
        """Fuses a pair as fuse.py does, and scores the file as evaluate.py would.

        Args:
            vis, ir: the uploads.
            task: a key of `TASKS`.
            system, weights: keys of `weights`; no weights: those that suit the task.
            colour: one of `COLOURS`.
            resize_ir: stretch the infrared image to the size of the visible one.

        Raises:
            InputError: in words for whoever uploaded.
        """
        roles = chosen(ROLES, task, "kind of images")
        chosen(dict.fromkeys(COLOURS), colour, "colour")
        sources = [self.read(upload, role) for upload, role in zip((vis, ir), roles, strict=True)]
        advice = "where both show the same view, tick “Resize”, else crop or align one of them first"
        registered = Registration(bool(resize_ir), advice=advice)(*sources)
        method = self._method(system, weights or self.default_weights(system, task), task)
        notes = [] if registered is sources[1] else [f"{sources[1].name} was resized to {size_of(registered.grey)}"]
        vis_source, ir_source = sources[0], registered
        # MRI and CT, PET or SPECT have too few edges in common for the check to mean anything.
        shift = edge_shift(vis_source.grey, ir_source.grey) if task == "ivf" else None
        if shift and shift.misaligned:
            notes.append(f"the images look misaligned by {shift}, so edges may be double; align them first")

        started = time.perf_counter()
        fused = fuse_sources(
            method.model, vis_source, ir_source, method.skip, normalise=method.model.stretched,
            colour=colour, precision=self.precision, max_memory=self.max_memory, scratch=self.scratch,
        )  # fmt: skip
        elapsed_s = time.perf_counter() - started
        file = Path(tempfile.mkdtemp(dir=self.folder)) / f"{Path(safe_name(vis.name)).stem}.png"
        write_image(file, fused)
        columns = method.model.columns
        scores = self._scores(read_grey(file), vis_source.grey, ir_source.grey, roles, columns, notes)
        return Result(
            file=file,
            fused=to_uint8(fused),
            vis=to_uint8(vis_source.shown),
            ir=to_uint8(ir_source.shown),
            features=self._features(method.model, vis_source.grey, ir_source.grey, notes),
            columns=columns,
            scores=scores,
            facts=f"{method.model.label} with {method.weights.name} (sha256 {method.sha256[:12]}, "
            f"{method.model.skip_name}: {method.skip}), {size_of(fused)}, {elapsed_s:.1f}\u00a0s on {self.device.type}",
            notes=notes,
        )

    def _method(self, system: str, weights: str, task: str) -> Method:
        path = chosen(chosen(self.weights, system, "system"), weights, f"weights of {system}")
        key = (system, weights, task)
        if key not in self._methods:
            self._methods[key] = load_method(path, find_system(system), self.device, None, task)
        return self._methods[key]

    def _scores(
        self, fused: np.ndarray, vis: np.ndarray, ir: np.ndarray, roles: Sequence[str], columns: Sequence[str],
        notes: list[str],
    ) -> dict[str, dict[str, float]]:  # fmt: skip
        measurable = [key for key in columns if METRICS[key].min_side <= min(fused.shape)]
        if len(measurable) < len(columns):
            missing = [f"{key} ({METRICS[key].min_side})" for key in columns if key not in measurable]
            notes.append(f"too small a side, in pixels, for {listed(missing)}")
        rows = {
            "fused": fused,
            f"{roles[0]} only": vis,
            f"{roles[1]} only": ir,
            "average": to_uint8((vis + ir) / 2).astype(np.float32),
        }
        try:
            return {name: score(image, ir, vis, self.protocol, measurable) for name, image in rows.items()}
        except ValueError as error:  # such as a 12-bit image in a 16-bit file, which is nearly black
            notes.append(f"no scores: {error}")
            return {name: {} for name in rows}

    def _features(self, model: Any, vis: np.ndarray, ir: np.ndarray, notes: list[str]) -> dict[str, np.ndarray]:
        """Features of the pair, reduced where it is large: their maps do not count against a memory budget piece by
        piece, as those of the fused image do."""
        if not hasattr(model, "features"):
            return {}
        factor = math.sqrt(FEATURE_PIXELS / vis.size)
        if factor < 1:
            shape = tuple(max(round(side * factor), model.smallest_side) for side in vis.shape)
            vis, ir = resize(vis, shape), resize(ir, shape)
            notes.append(f"features are those of the pair reduced to {size_of(vis)}")
        needed = FEATURE_BYTES * vis.size
        if memory_to_take(self.device, self.max_memory) < needed:
            notes.append(f"features are not shown: they take {format_size(needed)} of memory, which is not there")
            return {}
        return feature_maps(model, vis, ir)


def weights_by_system(extra: Sequence[Path], device: torch.device) -> dict[str, dict[str, Path]]:
    """System -> name -> file: what is bundled, and further files under each system whose keys they hold.

    Systems without any are left out.

    Raises:
        FileNotFoundError: no such file.
        InputError: a file fits no system, or two have one name.
    """
    systems = {name: find_system(name) for name in SYSTEMS}
    offered = {
        name: {file: in_checkout("models", file) for files in system.weights.values() for file in files}
        for name, system in systems.items()
    }
    for path in extra:
        reasons = []
        for name, system in systems.items():
            try:
                load_method(path, system, device, None, "ivf")
            except InputError as error:
                reasons.append(str(error))
                continue
            other = offered[name].setdefault(path.name, path)
            if other != path:
                raise InputError(f"--weights: {path} and {other} have one name on the page; rename one")
        if len(reasons) == len(systems):
            raise InputError(
                f"--weights: {path} fits none of {', '.join(SYSTEMS)}; for {next(iter(SYSTEMS))}: {reasons[0]}"
            )
    return {name: files for name, files in offered.items() if files}


def chosen(offered: Mapping[str, Any], name: str, what: str) -> Any:
    """What is offered under a name that came from the page.

    Raises:
        InputError: nothing is.
    """
    if not isinstance(name, str) or name not in offered:
        raise InputError(f"there is no {what} {str(name)[:80]!r} here; choose one of: {', '.join(offered)}")
    return offered[name]


def size_in_header(path: Path) -> tuple[int, int] | None:
    """Width and height that an image file announces; None where its header says nothing that is understood.

    So an image that is too large is refused before it is unpacked: a small file can hold a huge one.
    """
    from PIL import Image  # comes with Gradio

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours to say
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "TIFF", "PPM")) as image:
            return image.size
    except Exception:  # whatever is wrong with it, the reader says so
        return None


def safe_name(name: str) -> str:
    """What remains of a file name from elsewhere: no folders, no control characters, at most 200 bytes, not hidden.

    >>> safe_name("../../etc/.street night.tif"), safe_name("C:\\\\x\\\\é.png"), safe_name("..")
    ('street night.tif', 'é.png', 'image')
    """
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", name)[-1]).lstrip(". ")
    stem, suffix = Path(name or "image").stem, Path(name).suffix[:20]
    return stem.encode()[:180].decode(errors="ignore") + suffix


def size_of(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def copy_to(folder: Path, upload: Upload) -> Path:
    """A copy of a bundled file in a folder of its own below `folder`, where the page may serve it."""
    return Path(shutil.copy(upload.path, tempfile.mkdtemp(dir=folder)))


def score_table(result: Result, protocol: str) -> str:
    """The scores as a Markdown table: a metric a row, what it is and which direction is better.

    Holds nothing that came from the page.
    """
    lines = ["| | " + " | ".join(result.scores) + " | |", "|---|" + "---:|" * len(result.scores) + "---|"]
    for key in result.columns:
        metric = METRICS[key]
        values = [scores.get(key, math.nan) for scores in result.scores.values()]
        cells = ["–" if math.isnan(value) else f"{value:.2f}" for value in values]
        what = ", ".join(filter(None, (metric.name, metric.unit_in(protocol))))
        arrow = "↑" if metric.better == "higher" else "↓"
        lines.append(f"| **{key}** {arrow} | **{cells[0]}** | {' | '.join(cells[1:])} | {what} |")
    return "\n".join(lines)


def task_names() -> list[tuple[str, str]]:
    """(what the page calls it, key) of every task."""
    return [(text[0].upper() + text[1:], task) for task, text in TASKS.items()]


def system_names(systems: Iterable[str]) -> list[tuple[str, str]]:
    """(what the page calls it, key) of these systems."""
    return [(find_system(name).label, name) for name in systems]
