"""Does fusion help? Trains one network on each source, for segmentation or detection, and compares the sources.

python downstream.py segment --data MSRS --fused runs/fused/CDDFuse runs/fused/MLFuse  # masks in MSRS/segmentation
python downstream.py detect --data MSRS --fused runs/fused/CDDFuse --steps 3000        # boxes in MSRS/boxes.csv
python downstream.py shrink --data MSRS --out data/MSRS_half --every 6 --scale 0.5     # a smaller data set for a CPU

Sources are the folders of fused images and always these baselines: visible, infrared, their average, and both stacked
as channels, which is what fusion has to beat. All train with the same seeds, split, crops and first weights. What is
finished is not trained again, so the same command goes on after a stop. Libraries: requirements-downstream.txt.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

import utils  # noqa: F401  before torch, see there

# isort: split
import torch

from utils.common import (
    InputError,
    Parser,
    file_sha256,
    git_commit,
    listed,
    lock_run_dir,
    number_in,
    progress,
    run_script,
    write_csv,
    write_json,
)
from utils.data.images import read_colour, to_uint8, write_image
from utils.data.labels import Boxes, read_boxes, read_mask
from utils.data.pairs import Pair, find_modalities, list_pairs
from utils.evaluation.downstream import LITE0, STRIDE, TASKS, Recipe, Scale, Scene, check_libraries, evaluate, train
from utils.inference.fusing import pick_device

MSRS = "background car person bike curve car_stop guardrail color_cone bump".split()
BASELINES = ("visible", "infrared", "average", "stacked")
LABELS = {"segment": ("segmentation",), "detect": ("boxes.csv", "annotations.json", "labels")}
NETWORKS = {"segment": "deeplabv3plus", "detect": "fcos_resnet50_fpn"}
SCORES = {"segment": ("IoU",), "detect": ("AP50", "AP50:95")}


class Item(NamedTuple):
    """One scene: its file in every source, and its label. `is_test` is its part of the split."""

    name: str
    is_test: bool
    files: dict[str, Path]
    label: np.ndarray | Boxes  # a mask (H, W), or boxes


def build_parser() -> Parser:
    parser = Parser(__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in TASKS:
        add = tasks.add_parser(task).add_argument
        add("--data", type=Path, required=True, metavar="DIR", help="holds vi/, ir/ and the labels")
        add("--fused", type=Path, nargs="*", default=[], metavar="DIR", help="fused images of the same names and size")
        add("--labels", type=Path, metavar="PATH",
            help="segment: folder of masks; detect: .csv, COCO .json or folder of YOLO text files (default: the first "
            f"of {', '.join(LABELS[task])} in DIR)")  # fmt: skip
        add("--classes", nargs="+", default=MSRS if task == "segment" else [], metavar="NAME",
            help="all classes in order (default: segment: the nine of MSRS; detect: those of the file)")  # fmt: skip
        add("--block", type=number_in(int, 1), default=8,
            help="neighbouring names that stay together in the split (default: 8)")  # fmt: skip
        add("--test-every", type=number_in(int, 2), default=4, metavar="N",
            help="one block in N is for the test (default: 4)")  # fmt: skip
        add("--out", type=Path, metavar="DIR", help=f"report.json, split.json (default: runs/downstream_{task})")
        add("--seeds", type=number_in(int, 0, 2**32 - 1), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
        add("--steps", type=number_in(int, 1), default=1000, help="default: 1000")
        add("--batch", type=number_in(int, 2, 2**16), default=8, help="images a step (default: 8)")
        add("--crop", type=number_in(int, 2 * STRIDE, 2**14), nargs=2, default=[256, 256], metavar=("H", "W"),
            help=f"multiples of {STRIDE} (default: 256 256)")  # fmt: skip
        add("--lr", type=number_in(float, 1e-9, 1e3), default=1e-3, help="highest learning rate (default: 0.001)")
        add("--network", default=NETWORKS[task],
            help="segment: an architecture of segmentation-models-pytorch; detect: a detector of torchvision "
            f"(default: {NETWORKS[task]})")  # fmt: skip
        if task == "segment":
            add("--backbone", default=LITE0, help=f"encoder of segmentation-models-pytorch (default: {LITE0})")
        add("--backbone-weights", default="imagenet", metavar="FILE",
            help="imagenet, none, or a file of the backbone (default: imagenet)")  # fmt: skip
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add = tasks.add_parser("shrink").add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds vi/, ir/ and segmentation/ or boxes.csv")
    add("--out", type=Path, required=True, metavar="DIR", help="the new data set")
    add("--every", type=number_in(int, 1), default=1, metavar="N", help="keep one pair in N (default: all)")
    add("--scale", type=number_in(float, 0.01, 1), default=0.5, help="of both sides (default: 0.5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(lambda args: (shrink if args.task == "shrink" else compare)(args), build_parser(), argv)


def compare(args: argparse.Namespace) -> int:
    args.seeds = list(dict.fromkeys(args.seeds))
    if any(side % STRIDE for side in args.crop):
        raise InputError(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of {STRIDE}")
    check_libraries(args.task)
    device = pick_device(args.device)
    fused = {name_of(path, args.fused): path for path in args.fused}
    if len(fused) < len(args.fused):
        raise InputError(f"--fused: two folders are called {listed(fused)}; rename one")
    items, classes = open_items(args, fused)
    recipe = Recipe(args.task, len(classes), args.network, getattr(args, "backbone", "that of the network"),
                    args.backbone_weights, args.steps, args.batch, tuple(args.crop), args.lr)  # fmt: skip
    split = {part: [item.name for item in items if item.is_test == (part == "test")] for part in ("train", "test")}
    out = args.out or Path("runs") / f"downstream_{args.task}"
    path, sources = out / "report.json", [*BASELINES, *fused]
    with lock_run_dir(out):
        report = open_report(path, settings_of(recipe, classes, items, split))
        write_json(out / "split.json", split, indent=1)
        print(f"{len(split['train'])} pairs to train on, {len(split['test'])} to test: {out / 'split.json'}")
        for source in sources:
            training, test, scale, sha256 = open_source(source, items)
            about = {"path": str(fused.get(source, args.data)), "images_sha256": sha256, **scale._asdict()}
            if report["sources"].setdefault(source, about)["images_sha256"] != sha256:
                raise InputError(f"{path}: the images of {source} have changed since; choose another --out")
            done = {run["seed"] for run in report["runs"] if run["source"] == source}
            for seed in args.seeds:
                if seed in done:
                    continue
                start = time.monotonic()
                net, loss = train(recipe, training, scale, seed, device, f"{source}, seed {seed}")
                scores = evaluate(recipe, net, test, scale, device)
                minutes = round((time.monotonic() - start) / 60, 2)
                report["runs"].append(
                    {"source": source, "seed": seed, "scores": scores, "last_loss": round(loss, 4), "minutes": minutes,
                     "device": str(device), "torch": torch.__version__, "commit": git_commit()}
                )  # fmt: skip
                write_json(path, report, indent=1)
                means = ", ".join(f"mean {name} {mean_of(values):.1f}" for name, values in scores.items())
                print(f"{source}, seed {seed}: {means} %, {minutes} minutes", flush=True)
        tables = {name: table(report["runs"], name, classes, sources, args.seeds) for name in SCORES[args.task]}
        write_json(path, report | {"tables": tables}, indent=1)
    print("\n" + "\n\n".join(tables.values()) + f"\n\n{path}")
    return 0


def name_of(path: Path, paths: Sequence[Path]) -> str:
    """The last part of a folder's path, with the one above it where that is not unique or the name of a baseline."""
    name, names = path.resolve().name, [each.resolve().name for each in paths]
    return f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 or name in BASELINES else name


def open_items(args: argparse.Namespace, fused: dict[str, Path]) -> tuple[list[Item], list[str]]:
    """The scenes that every source has, in the order of their names, and the names of the classes."""
    vis, ir = find_modalities(args.data)
    both = list_pairs(vis, ir).pairs
    files = {pair.name: {"visible": pair.vis, "infrared": pair.ir} for pair in both}
    for source, path in fused.items():
        partners = {pair.name: pair.ir for pair in list_pairs(vis, path).pairs}
        files = {name: known | {source: partners[name]} for name, known in files.items() if name in partners}
    if len(files) < len(both):
        print(f"note: {len(files)} of {len(both)} pairs of {args.data} are in all of --fused; the others are left out")
    # Neighbouring names are often neighbouring frames: whole blocks are tested on.
    is_test = [i // args.block % args.test_every == args.test_every // 2 for i in range(len(files))]
    if len(set(is_test)) < 2:
        raise InputError(f"{args.data}: too few pairs ({len(files)}) to train on and to test on; try a smaller --block")
    path = args.labels or find_labels(args.data, args.task)
    if path is None or not path.exists():
        raise InputError(f"no labels at {path or args.data / ' or '.join(LABELS[args.task])}; name them with --labels")
    sizes = {name: read_colour(known["visible"]).shape[:2] for name, known in files.items()}
    for source, known in itertools.product(fused, files.values()):
        read_image(source, known)  # a bad file is found before the baselines are trained, not after
    if args.task == "segment":
        labels, classes = read_masks(path, vis, sizes, len(args.classes)), args.classes
    else:
        labels, classes = read_boxes(path, sizes, args.classes)
    return [Item(name, part, files[name], labels[name]) for name, part in zip(files, is_test, strict=True)], classes


def find_labels(data: Path, task: str) -> Path | None:
    return next((data / name for name in LABELS[task] if (data / name).exists()), None)


def read_masks(path: Path, vis: Path, sizes: dict[str, tuple[int, int]], num_classes: int) -> dict[str, np.ndarray]:
    masks = {pair.name: pair.ir for pair in list_pairs(vis, path).pairs}
    missing = sizes.keys() - masks.keys()
    if missing:
        raise InputError(f"{path} has no mask for {listed(missing)}; masks have the names of the images")
    return {name: read_mask(masks[name], size, num_classes) for name, size in sizes.items()}


def read_image(source: str, files: dict[str, Path]) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W, 6) for `stacked`; three equal channels where a file is grey."""
    if source in ("average", "stacked"):
        vis, ir = Pair("", files["visible"], files["infrared"]).read(read_colour, read_colour)
        return to_uint8((vis + ir) / 2 if source == "average" else np.concatenate([vis, ir], axis=2))
    return to_uint8(Pair("", files["visible"], files[source]).read(read_colour, read_colour)[1])  # checks the size


def open_source(source: str, items: Sequence[Item]) -> tuple[list[Scene], list[Scene], Scale, str]:
    """Scenes to train on and to test on, how their channels are normalised, and the hash of all images."""
    parts = {False: [], True: []}
    for item in items:
        parts[item.is_test].append(Scene(read_image(source, item.files), item.label))
    images = [scene.image for part in parts.values() for scene in part]
    return parts[False], parts[True], measure(images[: len(parts[False])]), hash_of(images)


def measure(images: Sequence[np.ndarray]) -> Scale:
    means = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    squares = np.mean([np.square(image, dtype=np.float32).mean(axis=(0, 1)) for image in images], axis=0)
    return Scale(means.round(2).tolist(), np.sqrt(np.maximum(squares - means**2, 1)).round(2).tolist())


def hash_of(arrays: Sequence[np.ndarray]) -> str:
    hashes = [hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in arrays]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def settings_of(recipe: Recipe, classes: list[str], items: Sequence[Item], split: dict) -> dict:
    """All that a score depends on but for source and seed, as it is read back from a report."""
    weights = Path(recipe.weights)
    labels = [part for item in items for part in (item.label if isinstance(item.label, Boxes) else [item.label])]
    settings = dataclasses.asdict(recipe) | {
        "weights": f"{weights.name} {file_sha256(weights)}" if weights.is_file() else recipe.weights,
        "classes": classes,
        "normalisation": "mean and standard deviation of each channel of the source over the training pairs",
        "augmentation": "random crops, horizontal flips",
        "optimizer": "AdamW, weight decay 0.0001, one cycle",
        "split_sha256": hashlib.sha256(json.dumps(split).encode()).hexdigest(),
        "labels_sha256": hash_of(labels),
    }
    return json.loads(json.dumps(settings))


def open_report(path: Path, settings: dict) -> dict:
    """A new report, or the one of an earlier run with the same settings."""
    if not path.exists():
        return {"settings": settings, "sources": {}, "runs": []}
    report = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key, value in settings.items() if report.get("settings", {}).get(key) != value]
    if differ:
        raise InputError(f"{path} was made with other {listed(differ)}; repeat its options or choose another --out")
    return report


def mean_of(values: Sequence[float | None]) -> float:
    """Mean over the classes that have a value, in percent."""
    return 100 * float(np.mean([value for value in values if value is not None]))


def table(runs: Sequence[dict], name: str, classes: Sequence[str], sources: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown, in percent: mean and spread (standard deviation, n - 1) over the seeds, the difference from the best
    baseline, taken seed by seed because equal seeds have equal first weights and crops, and the mean of every class.
    """
    scores = {(run["source"], run["seed"]): run["scores"][name] for run in runs}
    means = {source: np.array([mean_of(scores[source, seed]) for seed in seeds]) for source in sources}
    best = max(BASELINES, key=lambda source: means[source].mean())
    lines = [f"| {name}, % | mean | minus {best} | " + " | ".join(classes) + " |", "|---" * (3 + len(classes)) + "|"]
    for source in sources:
        columns = zip(*(scores[source, seed] for seed in seeds), strict=True)
        each = ["-" if None in column else f"{100 * np.mean(column):.1f}" for column in columns]
        difference = "" if source == best else spread(means[source] - means[best], "+")
        lines.append(f"| {source} | {spread(means[source])} | {difference} | " + " | ".join(each) + " |")
    return "\n".join(lines)


def spread(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def shrink(args: argparse.Namespace) -> int:
    """Writes a part of a data set at another size: images averaged, masks by their nearest pixel, boxes scaled."""
    vis, ir = find_modalities(args.data)
    if args.out.resolve() == args.data.resolve():
        raise InputError(f"--out {args.out} is the data set itself; name another folder")
    pairs = list_pairs(vis, ir).pairs[:: args.every]
    sizes = {}
    for pair in progress(pairs, str(args.out), "pair"):
        for folder, image in zip((vis, ir), pair.read(read_colour, read_colour), strict=True):
            sizes[pair.name] = image.shape[:2]
            if min(sizes[pair.name]) * args.scale < 1:
                raise InputError(f"--scale {args.scale:g} leaves nothing of {pair.name}; take a larger one")
            small = cv2.resize(image, None, fx=args.scale, fy=args.scale, interpolation=cv2.INTER_AREA)
            write_image(args.out / folder.name / f"{pair.name}.png", small)
    masks, objects = (find_labels(args.data, task) for task in TASKS)
    if masks:
        for name, mask in read_masks(masks, vis, sizes, 256).items():
            small = cv2.resize(mask, None, fx=args.scale, fy=args.scale, interpolation=cv2.INTER_NEAREST_EXACT)
            write_image(args.out / masks.name / f"{name}.png", small)
    if objects:
        found, classes = read_boxes(objects, sizes)
        rows = [["name", "class", "x0", "y0", "x1", "y1"]]
        for name, (corners, kinds) in found.items():
            boxes = (corners * args.scale).round(2)
            rows += [[name, classes[kind], *box] for box, kind in zip(boxes, kinds, strict=True)]
        write_csv(args.out / "boxes.csv", rows)
    print(f"{args.out}: {len(pairs)} pairs; labels: {listed(path.name for path in (masks, objects) if path)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
