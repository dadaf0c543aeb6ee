"""Does fusion help? Trains one small network a source, for segmentation or detection, and compares the sources.

python downstream.py segment --data MSRS --fused runs/fused/CDDFuse runs/fused/MLFuse  # masks in MSRS/segmentation
python downstream.py detect --data MSRS --fused runs/fused/CDDFuse --steps 3000        # boxes in MSRS/boxes.csv
python downstream.py shrink --data MSRS --out data/MSRS_half --every 4 --scale 0.5     # a smaller data set for a CPU

Sources are the folders of fused images and always these baselines: visible, infrared, their average, and both stacked
as channels, which is what fusion has to beat. All train with the same seeds, split, crops and first weights. What is
finished is not trained again, so the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.common import InputError, check_writable, file_sha256, git_commit, listed, progress, run_script, whole_file
from utils.data.images import read_colour, to_uint8, write_image
from utils.data.labels import IGNORE, Boxes, read_boxes, read_mask
from utils.data.pairs import find_modalities, list_pairs
from utils.evaluation.downstream import LITE, Found, average_precision, build, imagenet_file, iou, needed
from utils.inference.fusing import pick_device

MSRS = "background car person bike curve car_stop guardrail color_cone bump".split()
BASELINES = ("visible", "infrared", "average", "stacked")
LABELS = {"segment": ("segmentation",), "detect": ("boxes.csv", "annotations.json", "labels")}
VISIBLE_PART = 0.25  # a box that a crop cuts trains on if so much of it is left


@dataclass
class Item:
    """One scene: which part of the split it is in, its file in every source, (H, W) of all of them, and its label."""

    name: str
    is_test: bool
    files: dict[str, Path]
    size: tuple[int, int]
    label: np.ndarray | Boxes  # a mask (H, W), or boxes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in LABELS:
        add = tasks.add_parser(task).add_argument
        add("--data", type=Path, required=True, metavar="DIR", help="holds vi/, ir/ and the labels")
        add("--fused", type=Path, nargs="*", default=[], metavar="DIR", help="fused images of the same names and size")
        add("--labels", type=Path, metavar="PATH",
            help="segment: folder of masks; detect: .csv, COCO .json or folder of YOLO text files (default: the first "
            f"of {', '.join(LABELS[task])} in DIR)")  # fmt: skip
        add("--classes", nargs="+", default=[], metavar="NAME",
            help="all classes in order (default: segment: the nine of MSRS; detect: those of the file)")  # fmt: skip
        add("--test-data", type=Path, metavar="DIR",
            help="a second set to test on, of which --fused also holds the images (default: blocks of DIR)")  # fmt: skip
        add("--block", type=int, default=8, help="neighbouring names that stay together in the split (default: 8)")
        add("--test-every", type=int, default=4, metavar="N", help="one block in N is for the test (default: 4)")
        add("--out", type=Path, metavar="DIR", help=f"report.json, split.json (default: runs/downstream_{task})")
        add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
        add("--steps", type=int, default=1000, help="default: 1000")
        add("--batch", type=int, default=8, help="images a step (default: 8)")
        add(
            "--crop",
            type=int,
            nargs=2,
            default=[256, 256],
            metavar=("H", "W"),
            help="multiples of 32 (default: 256 256)",
        )
        add("--lr", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
        add("--network", default=LITE,
            help=f"{LITE}: EfficientNet-Lite0 with DeepLabV3+; segment: or an architecture of segmentation-models-"
            "pytorch; detect: or a detector of torchvision, such as fcos_resnet50_fpn (default: lite)")  # fmt: skip
        add("--backbone", default="resnet50", help="encoder for segmentation-models-pytorch (default: resnet50)")
        add(
            "--backbone-weights",
            default="imagenet",
            metavar="FILE",
            help="imagenet, none, or a file (default: imagenet)",
        )
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
        add("--debug", action="store_true", help="show tracebacks")
    add = tasks.add_parser("shrink").add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds vi/, ir/ and segmentation/ or boxes.csv")
    add("--out", type=Path, required=True, metavar="DIR", help="the new data set")
    add("--every", type=int, default=1, metavar="N", help="keep one pair in N (default: all)")
    add("--scale", type=float, default=0.5, help="of both sides (default: 0.5)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        lambda args: (shrink if args.task == "shrink" else compare)(args), build_parser().parse_args(argv)
    )


def compare(args: argparse.Namespace) -> int:
    check_options(args)
    fused = {name_of(path, args.fused): path for path in args.fused}
    items, classes = open_items(args, fused)
    split = {"train": [item.name for item in items if not item.is_test],
             "test": [item.name for item in items if item.is_test]}  # fmt: skip
    out = args.out or Path("runs") / f"downstream_{args.task}"
    check_writable(out)
    report_path, device = out / "report.json", pick_device(args.device)
    settings = describe(args, items, classes, split)
    report = open_report(report_path, settings)
    write_json(out / "split.json", split | {"sha256": settings["split"], "labels_sha256": settings["labels"]})
    print(f"{len(split['train'])} pairs to train on, {len(split['test'])} to test: {out}/split.json")
    for source in (*BASELINES, *fused):
        images = [read_image(source, item) for item in items]
        about = {"path": str(fused.get(source, args.data))} | measure(images, items)
        if report["sources"].setdefault(source, about)["images_sha256"] != about["images_sha256"]:
            raise InputError(f"{report_path}: the images of {source} have changed since; choose another --out")
        for seed in args.seeds:
            if any((run["source"], run["seed"]) == (source, seed) for run in report["runs"]):
                continue
            start = time.monotonic()
            net, loss = train(args, items, images, about, len(classes), seed, device)
            scores = evaluate(args.task, net, items, images, about, len(classes), device)
            run = {"source": source, "seed": seed, "scores": scores, "last_loss": loss,
                   "minutes": round((time.monotonic() - start) / 60, 2), "device": str(device),
                   "torch": torch.__version__, "commit": git_commit()}  # fmt: skip
            report["runs"].append(run)
            write_json(report_path, report)
            means = ", ".join(f"mean {name} {mean_of(values):.1f}" for name, values in scores.items())
            print(f"{source}, seed {seed}: {means} %, {run['minutes']} minutes", flush=True)
    names = ["IoU"] if args.task == "segment" else ["AP50", "AP50:95"]
    report["tables"] = {name: table(report["runs"], name, classes, [*BASELINES, *fused], args.seeds) for name in names}
    write_json(report_path, report)
    print("\n" + "\n\n".join(report["tables"].values()) + f"\n\n{report_path}")
    return 0


def check_options(args: argparse.Namespace) -> None:
    if min(args.crop) < 64 or any(side % 32 for side in args.crop):
        raise InputError(f"--crop {args.crop[0]} {args.crop[1]}: both must be multiples of 32 and at least 64")
    if min(args.block, args.steps) < 1 or min(args.batch, args.test_every) < 2 or not args.lr > 0:
        raise InputError("--block and --steps must be at least 1, --batch and --test-every at least 2, --lr above 0")
    if args.task == "detect":
        needed("pycocotools")  # now, not after the first training


def name_of(path: Path, paths: Sequence[Path]) -> str:
    """The last part of a folder's path, with the one above it where that is not unique or the name of a baseline."""
    name, names = path.resolve().name, [each.resolve().name for each in paths]
    return f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 or name in BASELINES else name


def open_items(args: argparse.Namespace, fused: dict[str, Path]) -> tuple[list[Item], list[str]]:
    """The scenes that every source has, in the order of their names, and the names of the classes."""
    items: list[Item] = []
    classes = list(args.classes)
    for folder in [args.data, *([args.test_data] if args.test_data else [])]:
        vis, ir = find_modalities(folder)
        both = list_pairs(vis, ir).pairs
        files = {pair.name: {"visible": pair.vis, "infrared": pair.ir} for pair in both}
        for source, path in fused.items():
            partners = {pair.name: pair.ir for pair in list_pairs(vis, path).pairs}
            files = {name: known | {source: partners[name]} for name, known in files.items() if name in partners}
        if len(files) < len(both):
            print(f"note: {len(files)} of {len(both)} pairs of {folder} are in all of --fused; the others are left out")
        sizes = {name: read_colour(known["visible"]).shape[:2] for name, known in files.items()}
        labels, classes = read_labels(args, folder, sizes, classes)
        for i, (name, known) in enumerate(files.items()):
            # Neighbouring names are often neighbouring frames: whole blocks are tested on.
            is_test = i // args.block % args.test_every == args.test_every // 2
            items.append(
                Item(name, folder == args.test_data if args.test_data else is_test, known, sizes[name], labels[name])
            )
    if len({item.is_test for item in items}) < 2:
        raise InputError(f"{args.data}: {len(items)} pairs in blocks of {args.block} leave none to train or to test on; "
                         "choose a smaller --block or --test-every")  # fmt: skip
    return items, classes


def read_labels(
    args: argparse.Namespace, folder: Path, sizes: dict[str, tuple[int, int]], classes: list[str]
) -> tuple[dict[str, np.ndarray] | dict[str, Boxes], list[str]]:
    found = [folder / name for name in LABELS[args.task] if (folder / name).exists()]
    path = args.labels if args.labels and folder == args.data else found[0] if found else None
    if path is None or not path.exists():
        raise InputError(f"no labels at {path or folder / ' or '.join(LABELS[args.task])}; name them with --labels")
    if args.task == "detect":
        return read_boxes(path, sizes, classes)
    classes = classes or MSRS
    masks = {pair.name: pair.ir for pair in list_pairs(find_modalities(folder)[0], path).pairs}
    missing = sizes.keys() - masks.keys()
    if missing:
        raise InputError(f"{path} has no mask for {listed(missing)}; masks have the names of the images")
    return {name: read_mask(masks[name], size, len(classes)) for name, size in sizes.items()}, classes


def read_image(source: str, item: Item) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W, 6) for `stacked`; three equal channels where a file is grey."""
    if source in ("average", "stacked"):
        vis, ir = (read_image(part, item) for part in ("visible", "infrared"))
        return to_uint8((np.float32(vis) + ir) / 2) if source == "average" else np.concatenate([vis, ir], axis=2)
    image = to_uint8(read_colour(item.files[source]))
    if image.shape[:2] != item.size:
        raise InputError(f"{item.files[source]} is {image.shape[1]}x{image.shape[0]} but {item.files['visible']} is "
                         f"{item.size[1]}x{item.size[0]} (width x height); fuse the images of --data themselves")  # fmt: skip
    return image


def measure(images: Sequence[np.ndarray], items: Sequence[Item]) -> dict:
    """What identifies the images of a source, and mean and standard deviation of its channels where it trains."""
    training = [
        image.reshape(-1, image.shape[2]) for image, item in zip(images, items, strict=True) if not item.is_test
    ]
    means = np.mean([image.mean(axis=0) for image in training], axis=0)
    squares = np.mean([np.square(image, dtype=np.float32).mean(axis=0) for image in training], axis=0)
    std = np.sqrt(np.maximum(squares - means**2, 1))
    return {"images_sha256": hash_of(images), "mean": means.round(2).tolist(), "std": std.round(2).tolist()}


def hash_of(arrays: Sequence[np.ndarray]) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


def describe(args: argparse.Namespace, items: Sequence[Item], classes: list[str], split: dict) -> dict:
    """All that a score depends on but for source and seed."""
    weights = args.backbone_weights
    if args.network == LITE and weights == "imagenet":
        weights = str(imagenet_file())
    labels = [part for item in items for part in ([item.label] if args.task == "segment" else item.label)]
    return {
        "task": args.task,
        "classes": classes,
        "network": args.network,
        "backbone": "EfficientNet-Lite0 to stride 16" if args.network == LITE else args.backbone,
        "backbone_weights": f"{Path(weights).name} {file_sha256(Path(weights))}"
        if Path(weights).is_file()
        else weights,
        "steps": args.steps,
        "batch": args.batch,
        "crop": list(args.crop),
        "learning_rate": f"AdamW, {args.lr:g}, 5 % warm-up, cosine to 0",
        "normalisation": "mean and standard deviation of each channel of the source over the training pairs",
        "augmentation": "random crops, horizontal flips",
        "split": hashlib.sha256(json.dumps(split).encode()).hexdigest(),
        "labels": hash_of(labels),
    }


def open_report(path: Path, settings: dict) -> dict:
    """A new report, or the one of an earlier run with the same settings."""
    if not path.exists():
        return {"settings": settings, "sources": {}, "runs": []}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        before = report["settings"]
        report["sources"], report["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no report of this script; remove it or choose another --out") from error
    differ = [key for key, value in settings.items() if before.get(key) != value]
    if differ:
        raise InputError(f"{path} was made with other {listed(differ)}; repeat its options or choose another --out")
    return report


def write_json(path: Path, content: dict) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def train(
    args: argparse.Namespace,
    items: Sequence[Item],
    images: Sequence[np.ndarray],
    about: dict,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> tuple[torch.nn.Module, float]:
    """The network after the last step, and the mean loss of the last tenth. Nothing is chosen by its test score."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    training = [i for i, item in enumerate(items) if not item.is_test]
    shares = class_shares([items[i].label for i in training], num_classes) if args.task == "segment" else []
    net = build(args.task, args.network, args.backbone, args.backbone_weights, images[0].shape[2], num_classes, shares)
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    warm_up = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 + np.cos(np.pi * step / args.steps)) / 2
    )
    order: list[int] = []
    losses = []
    for step in progress(range(args.steps), f"{Path(about['path']).name}, seed {seed}", "step"):
        while len(order) < args.batch:
            order += rng.permutation(training).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        crops = [crop(normalised(images[i], about), items[i].label, args.crop, rng) for i in chosen]
        batch = as_tensor([image for image, _ in crops], device)
        loss = net.loss(batch, as_targets([label for _, label in crops], device))
        if not torch.isfinite(loss):
            raise InputError(f"the loss is not finite at step {step}; try a smaller --lr than {args.lr:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return net, round(float(np.mean(losses[-max(1, args.steps // 10) :])), 4)


def class_shares(masks: Sequence[np.ndarray], num_classes: int) -> list[float]:
    counts = sum(np.bincount(mask.ravel(), minlength=256)[:num_classes] for mask in masks)
    return (counts / max(1, counts.sum())).tolist()


def normalised(image: np.ndarray, about: dict) -> np.ndarray:
    return (image - np.float32(about["mean"])) / np.float32(about["std"])


def window(array: np.ndarray, top: int, left: int, size: Sequence[int], fill: int) -> np.ndarray:
    """The part of an image or mask, filled up at the right and below where the array ends."""
    part = array[top : top + size[0], left : left + size[1]]
    missing = [(0, size[0] - part.shape[0]), (0, size[1] - part.shape[1]), (0, 0)][: array.ndim]
    return np.pad(part, missing, constant_values=fill)


def crop(
    image: np.ndarray, label: np.ndarray | Boxes, size: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | Boxes]:
    """A random part, mirrored half of the time, with its label."""
    top, left = (int(rng.integers(max(0, have - want) + 1)) for have, want in zip(image.shape, size, strict=False))
    flip = rng.random() < 0.5
    image = window(image, top, left, size, 0)[:, :: -1 if flip else 1]
    if isinstance(label, np.ndarray):
        return image, window(label, top, left, size, IGNORE)[:, :: -1 if flip else 1]
    corners = label.corners - np.float32([left, top, left, top])
    cut = np.clip(corners, 0, np.float32([size[1], size[0], size[1], size[0]]))
    area, before = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (cut, corners))
    kept = area > VISIBLE_PART * before
    if flip:
        cut[:, [0, 2]] = size[1] - cut[:, [2, 0]]
    return image, Boxes(cut[kept], label.classes[kept])


def as_tensor(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """(H, W, C) each -> (B, C, H, W), in memory as the images are: channels last."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)


def as_targets(labels: Sequence[np.ndarray | Boxes], device: torch.device) -> Tensor | list[Found]:
    if isinstance(labels[0], np.ndarray):
        return torch.from_numpy(np.stack(labels)).to(device).long()
    return [Found(*(torch.from_numpy(part).to(device) for part in label)) for label in labels]


@torch.inference_mode()
def evaluate(
    task: str,
    net: torch.nn.Module,
    items: Sequence[Item],
    images: Sequence[np.ndarray],
    about: dict,
    num_classes: int,
    device: torch.device,
) -> dict[str, list[float | None]]:
    """Scores of each class over the test images, in [0, 1]; None where a class cannot be scored."""
    net.eval()
    confusion = np.zeros((num_classes, num_classes), np.int64)
    truth, found = [], []
    for item, image in zip(items, images, strict=True):
        if not item.is_test:
            continue
        height, width = item.size
        filled = window(normalised(image, about), 0, 0, [-(-side // 32) * 32 for side in item.size], 0)
        predicted = net.predict(as_tensor([filled], device))[0]
        if task == "segment":
            true, guess = item.label.ravel().astype(np.int64), predicted[:height, :width].cpu().numpy().ravel()
            counted = true != IGNORE
            pairs = true[counted] * num_classes + guess[counted]
            confusion += np.bincount(pairs, minlength=num_classes**2).reshape(confusion.shape)
        else:
            corners, kinds, scores = (part.float().cpu() for part in predicted)
            corners = corners.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            found.append(Found(corners, kinds.long(), scores))
            truth += as_targets([item.label], torch.device("cpu"))
    scores = {"IoU": iou(confusion)} if task == "segment" else average_precision(truth, found, num_classes)
    return {name: [None if np.isnan(v) else round(float(v), 5) for v in values] for name, values in scores.items()}


def mean_of(values: Sequence[float | None]) -> float:
    """Mean over the classes that have a value, in percent."""
    return 100 * float(np.mean([value for value in values if value is not None]))


def table(runs: Sequence[dict], name: str, classes: Sequence[str], sources: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: mean and spread over the seeds, the difference from the best baseline, and every class, in percent.

    The spread is the standard deviation (n - 1). Differences are taken seed by seed, because equal seeds have equal
    first weights and crops.
    """
    values = {source: [[run["scores"][name] for run in runs if (run["source"], run["seed"]) == (source, seed)][0]
                       for seed in seeds] for source in sources}  # fmt: skip
    means = {source: np.array([mean_of(each) for each in values[source]]) for source in sources}
    best = max(BASELINES, key=lambda source: means[source].mean())
    lines = [f"| {name}, % | mean | minus {best} | " + " | ".join(classes) + " |", "|---" * (3 + len(classes)) + "|"]
    for source in sources:
        difference = "" if source == best else spread(means[source] - means[best], sign="+")
        each = [
            "-" if None in column else f"{100 * np.mean(column):.1f}" for column in zip(*values[source], strict=True)
        ]
        lines.append(f"| {source} | {spread(means[source])} | {difference} | " + " | ".join(each) + " |")
    return "\n".join(lines)


def spread(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def shrink(args: argparse.Namespace) -> int:
    """Writes a part of a data set at another size: images averaged, masks by their nearest pixel, boxes scaled."""
    if args.every < 1 or not 0 < args.scale <= 1:
        raise InputError(f"--every {args.every} must be at least 1 and --scale {args.scale:g} in (0, 1]")
    vis, ir = find_modalities(args.data)
    if args.out.resolve() == args.data.resolve():
        raise InputError(f"--out {args.out} is the data set itself; name another folder")
    pairs = list_pairs(vis, ir).pairs[:: args.every]
    masks, boxes = args.data / LABELS["segment"][0], args.data / LABELS["detect"][0]
    mask_of = {pair.name: pair.ir for pair in list_pairs(vis, masks).pairs} if masks.is_dir() else {}
    for pair in progress(pairs, str(args.out), "pair"):
        for path in (pair.vis, pair.ir):
            image = read_colour(path)
            size = [max(1, round(side * args.scale)) for side in image.shape[1::-1]]
            write_image(
                args.out / path.parent.name / f"{pair.name}.png", cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            )
        if pair.name in mask_of:
            small = Image.open(mask_of[pair.name]).resize(size, Image.Resampling.NEAREST)
            with whole_file(args.out / masks.name / f"{pair.name}.png") as temporary:
                small.save(temporary)
    if boxes.is_file():
        names = {pair.name for pair in pairs}
        with open(boxes, newline="", encoding="utf-8") as file, whole_file(args.out / boxes.name) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as target:
                writer = csv.DictWriter(target, ["name", "class", "x0", "y0", "x1", "y1"], extrasaction="ignore")
                writer.writeheader()
                for row in csv.DictReader(file):
                    if row["name"] in names:
                        writer.writerow(
                            row | {key: round(float(row[key]) * args.scale, 2) for key in ("x0", "y0", "x1", "y1")}
                        )
    print(f"{args.out}: {len(pairs)} pairs, {len(mask_of and pairs)} with masks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
