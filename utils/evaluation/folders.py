"""Scores folders of fused images, of any method, against their sources: one pair at a time, in parallel.

A pair is read once and every method's image of it is scored, under one protocol or several. What cannot be scored is
named in `Evaluation.problems` and left out; nothing else is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from utils.common import BAD_PAIR, InputError, listed, progress, reason_of
from utils.data.images import is_coloured, read_colour, read_grey, to_uint8
from utils.data.manifests import list_hash, pair_hash
from utils.data.pairs import Pair, PairList, list_pairs
from utils.evaluation.scores import Row, ScoreSheet
from utils.metrics import METRICS, score

# What a method must beat, by name: the fused image that it would be, as written to 8 bits.
BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "vis": lambda vis, ir: to_uint8(vis).astype(np.float32),
    "ir": lambda vis, ir: to_uint8(ir).astype(np.float32),
    "average": lambda vis, ir: to_uint8((vis + ir) / 2).astype(np.float32),
}


def baseline_labels(vis_name: str, ir_name: str) -> dict[str, str]:
    """Label of a row -> its baseline."""
    return {f"{vis_name} only": "vis", f"{ir_name} only": "ir", "average": "average"}


@dataclass(frozen=True)
class Evaluation:
    rows: tuple[Row, ...]
    problems: tuple[str, ...]  # what was left out, one line each
    notes: tuple[str, ...]  # what is worth knowing, one line each


@dataclass
class _Result:
    name: str
    hash: str = ""
    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (method, protocol) -> metrics
    problems: list[str] = field(default_factory=list)
    too_small_for: list[str] = field(default_factory=list)
    without_colour: list[str] = field(default_factory=list)  # methods whose image is grey where a source has colour


def evaluate(
    methods: Mapping[str, Path],
    vis_folder: Path,
    ir_folder: Path,
    protocols: Sequence[str],
    metrics: Sequence[str],
    baselines: bool = False,
    jobs: int | None = None,
) -> Evaluation:
    """Scores every image that a method has for a pair of sources.

    Args:
        methods: row label -> folder of fused images, matched with the sources by file stem.
        vis_folder: visible (or MRI) sources.
        ir_folder: infrared (or CT, PET, SPECT) sources.
        protocols: names from `utils.metrics.PROTOCOLS`. Images are scored in grey, under `vifb` in their colours.
        metrics: names from `utils.metrics.METRICS`. One that a pair is too small for is NaN there.
        baselines: adds rows for either source alone and for their average.
        jobs: pairs scored at a time; None means one for each processor.

    Returns:
        Rows in the order of `methods`, then of the baselines, for each protocol. A method without a single scored
        image has no row.

    Raises:
        FileNotFoundError: a folder is missing.
        InputError: no pair of sources, or not one fused image matches a pair.
    """
    found = list_pairs(vis_folder, ir_folder)
    files, problems, notes = _match(methods, found, vis_folder)
    labels = baseline_labels(vis_folder.name, ir_folder.name) if baselines else {}
    if set(labels) & set(methods):
        raise InputError(f"--fused uses the name of a baseline ({listed(set(labels) & set(methods))}); rename it")

    def score_one(pair: Pair) -> _Result:
        fused = {method: paths[pair.name] for method, paths in files.items() if pair.name in paths}
        return _score_pair(pair, fused, labels, protocols, metrics)

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(jobs or processors)  # numpy and OpenCV let go of Python's lock while they work
    try:
        results = list(progress(pool.map(score_one, found.pairs), "scores", "pair", len(found.pairs)))
    finally:
        pool.shutdown(cancel_futures=True)
    problems += [problem for result in results for problem in result.problems]
    for key in metrics:
        small = [result.name for result in results if key in result.too_small_for]
        if small:
            notes.append(f"{key} needs sides of {METRICS[key].min_side} pixels; no value for {listed(small)}")
    for method in methods:
        grey = [result.name for result in results if method in result.without_colour]
        if grey:
            notes.append(
                f"{method}: grey images beside sources in colour, which vifb does not score; no value for "
                f"{listed(grey)}: fuse in colour, or choose another --protocol"
            )

    hashes = {result.name: result.hash for result in results}
    rows = []
    for protocol in protocols:
        for method in [*methods, *labels]:
            key = (method, protocol)
            images = {result.name: result.scores[key] for result in results if key in result.scores}
            if images:
                sheet = ScoreSheet(method, images, list_hash(hashes[name] for name in images))
                rows.append(Row(method, protocol, sheet, method in labels))
    return Evaluation(tuple(rows), tuple(problems), tuple(notes))


def _match(
    methods: Mapping[str, Path], found: PairList, vis_folder: Path
) -> tuple[dict[str, dict[str, Path]], list[str], list[str]]:
    """method -> stem -> file, and lines about fused images that are missing (problems) or superfluous (notes)."""
    stems = {pair.name for pair in found.pairs}
    files, problems, notes = {}, [], []
    if found.unmatched():
        notes.append(f"{found.unmatched()}; left out")
    for method, folder in methods.items():
        matched = list_pairs(folder, vis_folder)  # raises where not one name is shared
        files[method] = {pair.name: pair.vis for pair in matched.pairs if pair.name in stems}
        missing = sorted(stems - set(files[method]))
        if missing:
            problems.append(f"{method}: no fused image in {folder} for {listed(missing)}; left out")
        if matched.only_vis:
            notes.append(f"{method}: no sources for {listed(matched.only_vis)}; left out")
    return files, problems, notes


def _score_pair(
    pair: Pair, fused: Mapping[str, Path], baselines: Mapping[str, str], protocols: Sequence[str], wanted: Sequence[str]
) -> _Result:
    result = _Result(pair.name)
    try:
        grey = pair.read()
        colour = [read_colour(path) for path in (pair.vis, pair.ir)] if "vifb" in protocols else []
    except BAD_PAIR as error:
        result.problems.append(f"{pair.name}: {reason_of(error)}; left out for every method")
        return result
    result.hash = pair_hash(*grey)
    result.too_small_for = [key for key in wanted if min(grey[0].shape) < METRICS[key].min_side]
    metrics = [key for key in wanted if key not in result.too_small_for]
    for method in (*fused, *baselines):
        try:
            for protocol in protocols:
                vis, ir = colour if protocol == "vifb" else grey
                if method in baselines:
                    image = BASELINES[baselines[method]](vis, ir)
                else:
                    image = (_read_as_stored if protocol == "vifb" else read_grey)(fused[method])
                if image.shape[:2] != vis.shape[:2]:
                    sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, vis.shape)]
                    raise InputError(
                        f"{fused[method]} is {sizes[0]} but its sources are {sizes[1]} (width x height); fuse it again "
                        "at the size of the sources, or name the set that it belongs to"
                    )
                if image.ndim < vis.ndim:
                    if is_coloured(vis) or is_coloured(ir):
                        result.without_colour.append(method)
                        continue
                    vis, ir = vis[..., 0], ir[..., 0]
                values = score(image, ir, vis, protocol, metrics)
                result.scores[method, protocol] = {key: values.get(key, float("nan")) for key in wanted}
        except BAD_PAIR as error:
            result.problems.append(f"{method}, {pair.name}: {reason_of(error)}; left out")
    return result


def _read_as_stored(path: Path) -> np.ndarray:
    """(H, W, 3), red first, or (H, W) where the file has one channel: VIFB's SF depends on the number of channels."""
    image = read_colour(path)
    if is_coloured(image) or cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED).ndim > 2:
        return image
    return image[..., 0]
