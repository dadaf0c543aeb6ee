"""Which images a table is about: hashes of grey images, and lists of published sets (`manifests/*.json`).

A hash is taken of the grey levels as they are scored, not of the file, so that a copy in another lossless format
counts as the same image. JPEG decoders differ by a level here and there; such a copy is another image, and gets
other scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.common import ROOT, InputError, file_sha256, listed
from utils.data.images import read_grey
from utils.data.pairs import find_modalities, images_in, list_pairs

FOLDER = ROOT / "results" / "manifests"
SHOWN = 12  # hexadecimal digits of a hash in tables


def grey_hash(image: np.ndarray) -> str:
    """SHA-256 of the size and the grey levels, (H, W), or colours, (H, W, 3): one byte each if whole, else float32."""
    levels = image.astype(np.uint8)
    stored = levels if np.array_equal(levels, image) else image.astype("<f4")
    size = "x".join(map(str, image.shape))
    return hashlib.sha256(f"{size} {stored.dtype.itemsize}\n".encode() + stored.tobytes()).hexdigest()


def pair_hash(vis: np.ndarray, ir: np.ndarray) -> str:
    """Hash of two sources. Exchanging them changes nothing, as it changes no metric."""
    return hashlib.sha256(" ".join(sorted([grey_hash(vis), grey_hash(ir)])).encode()).hexdigest()


def list_hash(pairs: Iterable[str]) -> str:
    """Hash of a list of pairs, given the hash of each. Neither order nor file names count."""
    return hashlib.sha256("\n".join(sorted(pairs)).encode()).hexdigest()


def make_manifest(folder: Path) -> dict[str, Any]:
    """Names and hashes of a set: a folder with two sub-folders of equally named images.

    Returns:
        "set" (the folder's name), "pairs", "images" (`list_hash`) and "files": sub-folder -> file name ->
        {"sha256": of the file, "grey": `grey_hash`}.

    Raises:
        InputError, FileNotFoundError: as `find_modalities`, `list_pairs` and `read_grey`; a file has no partner.
    """
    vis_folder, ir_folder = find_modalities(folder)
    found = list_pairs(vis_folder, ir_folder)
    if found.unmatched():
        raise InputError(f"{folder}: {found.unmatched()}; a manifest needs whole pairs")
    names = [path.relative_to(folder).as_posix() for path in (vis_folder, ir_folder)]
    files: dict[str, dict[str, dict[str, str]]] = {name: {} for name in names}
    pairs = []
    for pair in found.pairs:
        images = pair.read()
        pairs.append(pair_hash(*images))
        for name, path, image in zip(names, (pair.vis, pair.ir), images, strict=True):
            files[name][path.name] = {"sha256": file_sha256(path), "grey": grey_hash(image)}
    return {"set": folder.resolve().name, "pairs": len(pairs), "images": list_hash(pairs), "files": files}


def read_manifests(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every manifest of a folder, sorted by name; InputError where a file is none."""
    manifests = []
    for path in sorted(folder.glob("*.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            manifest["set"], manifest["images"], manifest["files"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a manifest ({error!r}); remove it or restore it") from None
        manifests.append(manifest)
    return manifests


def name_of_list(images: str, folder: Path = FOLDER) -> str | None:
    """The published set with this `list_hash`, or None."""
    return next((manifest["set"] for manifest in read_manifests(folder) if manifest["images"] == images), None)


@dataclass(frozen=True)
class Verdict:
    """What became of a manifest's files in a user's copy: names as sub-folder/file."""

    published: tuple[str, ...]  # byte for byte
    same_image: tuple[str, ...]  # another file with the same grey levels
    different: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]  # images that the manifest does not know

    def is_published(self) -> bool:
        return not (self.different or self.missing or self.extra)

    def __str__(self) -> str:
        total = len(self.published) + len(self.same_image) + len(self.different) + len(self.missing)
        parts = [f"{len(self.published)} of {total} files as published"]
        if self.same_image:
            parts.append(f"{len(self.same_image)} in another file format or version with the same grey levels")
        for what in ("different", "missing", "extra"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what}: {listed(names)}")
        return "; ".join(parts)


def verify(folder: Path, manifest: dict[str, Any]) -> Verdict:
    """Compares a set on disk with its manifest. Files are found by name, whatever their suffix."""
    fates: dict[str, list[str]] = {key: [] for key in Verdict.__dataclass_fields__}
    for modality, files in manifest["files"].items():
        there = folder / modality
        present = {path.stem: path for path in images_in(there)} if there.is_dir() else {}
        for name, want in files.items():
            path = present.pop(Path(name).stem, None)
            fates[_fate(path, want)].append(f"{modality}/{name}")
        fates["extra"] += [f"{modality}/{path.name}" for path in present.values()]
    return Verdict(**{fate: tuple(names) for fate, names in fates.items()})


def _fate(path: Path | None, want: dict[str, str]) -> str:
    if path is None:
        return "missing"
    if file_sha256(path) == want["sha256"]:
        return "published"
    try:
        return "same_image" if grey_hash(read_grey(path)) == want["grey"] else "different"
    except InputError:  # not even an image
        return "different"
