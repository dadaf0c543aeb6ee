"""MLFuse with the verbs of the zoo: the network, its one training stage and its files.

MLFuse ("MLFuse: Multi-scenario Feature Joint Learning for Multi-Modality Image Fusion") is a small convolutional
network with unequal roles: an edge branch sees the visible image (or MRI) alone, an attention branch the infrared
image (or CT, PET, SPECT) alone, a cross-modal branch sees both. Each branch also makes an image of its own, which a
loss looks at, and the features of all three are merged into the fused image.

Attribute names are those of the published checkpoint, typos included: they are its keys. What is inside was written
for this project from the published tensor shapes. In the published code the attention branch calls its channel part
"spatial" and its pixel part "spectral", in the paper's figure it is the other way round; here they are called by
what they weigh.

In tiles of whole rows (`fuse_tiled`) the result is that of the whole image. Three quantities span it, and each is
gathered tile by tile before the pass that makes the fused rows:

- the channel part of the attention: the average of the input features under a softmax over all pixels;
- the pixel part: their plain average, and then the normaliser of a second softmax over all pixels, which needs it;
- the edge branch's pooled features, about H/6 x W/6, on which it convolves before it resizes them to H x W.

Everything else is convolutions, and a fused row depends on six rows of the images on either side. Input features
are made anew in each pass instead of kept, so that memory beyond the images and the result is that of one tile, and
of the pooled features: 16 x H/6 x W numbers after they were resized to W.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import net
from utils.inference.checkpoint import save_checkpoint
from utils.tiles import Tiles
from utils.training.losses import multi_branch_loss
from zoo import Batch, CheckedOptions, Stage, System, option

SMALLEST_SIDE = 15  # the edge branch pools 7 x 7 after a stride of two
BRANCH_HALO = 3  # rows beside a row that a branch looks at: three 3x3 convolutions in the cross-modal branch
MERGE_HALO = 2  # and two in the merging layer
TILE_ROWS = 32  # at least, so that the rows beside a tile, which are worked on twice, are few


class Outputs(NamedTuple):
    """What the network makes of a pair, (B, 1, H, W) in (-1, 1) each: the fused image and one image a branch."""

    fused: Tensor
    edge: Tensor
    cross: Tensor
    attention: Tensor


# Input features of the rows from `top` to `bottom`: (B, 32, bottom - top, W).
Rows = Callable[[int, int], Tensor]


def input_rows(convolution: nn.Module, image: Tensor, in_tiles: bool) -> Rows:
    """The input features of an image (B, 1, H, W), row by row.

    Without tiles they are made once, which batch norm needs in training; in tiles whenever they are asked for.
    """
    if not in_tiles:
        features = convolution(image)
        return lambda top, bottom: features[:, :, top:bottom]

    def rows(top: int, bottom: int) -> Tensor:
        first = max(top - 1, 0)  # a 3x3 convolution sees one row more on either side
        return convolution(image[:, :, first : bottom + 1])[:, :, top - first : bottom - first]

    return rows


def double_conv(*channels: int) -> nn.Sequential:
    """3x3 convolutions, each with batch norm and ReLU: (B, channels[0], H, W) -> (B, channels[-1], H, W)."""
    layers: list[nn.Module] = []
    for wide, narrow in zip(channels[:-1], channels[1:], strict=True):
        layers += [nn.Conv2d(wide, narrow, 3, padding=1), nn.BatchNorm2d(narrow), nn.ReLU()]
    return nn.Sequential(OrderedDict(double_conv=nn.Sequential(*layers)))


class CrossModalBranch(nn.Module):
    """What both modalities show, from the input features of either: (B, 32, H, W) twice -> features and image."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(1, 6):
            setattr(self, f"fuse5_conv{number}", self._block())
        self.ouc_cda = nn.Conv2d(32, 1, 1)

    @staticmethod
    def _block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.PReLU())

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        common = first * second
        shared = self.fuse5_conv3(self.fuse5_conv1(first + common) + self.fuse5_conv2(second + common))
        different = self.fuse5_conv4((first - second).abs())
        features = self.fuse5_conv5(shared + different)
        return features, torch.tanh(self.ouc_cda(features))


class EdgeBranch(nn.Module):
    """Edges of the first image, from its input features at full size and pooled to about a sixth of it.

    `pool` makes the pooled features of the whole image, `forward` the features (in (0, 1)) and the image of any rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, 16, 1)
        self.conv_f = nn.Conv2d(16, 16, 1)
        self.conv_max = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3_ = nn.Conv2d(16, 16, 3, padding=1)
        self.conv4 = nn.Conv2d(16, 32, 1)
        # In the published file, and unused there as well.
        self.conv_dilation = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
        self.ouc_edge = nn.Conv2d(32, 1, 1)

    def pool(self, rows: Rows, ranges: Iterable[tuple[int, int]], height: int, width: int) -> Tensor:
        """(B, 16, h, W), h about H / 6: along W they are resized already, along H each tile does it for its rows."""
        last = ((height - 3) // 2 + 1 - 7) // 3 + 1
        pieces = []
        for top, bottom in ranges:
            if (top, bottom) == (0, height):
                pieces.append(self._shrink(rows(top, bottom)))
                break
            # Pooled row i is made of the rows 6i to 6i + 14; it belongs to the tile that holds the first of them.
            start, stop = min(-(-top // 6), last), min(-(-bottom // 6), last)
            if start < stop:
                pieces.append(self._shrink(rows(6 * start, 6 * stop + 9)))
        x = F.relu(self.conv_max(torch.cat(pieces, dim=2)))
        x = self.conv3_(F.relu(self.conv3(x)))
        return F.interpolate(x, (x.shape[2], width), mode="bilinear", align_corners=False)

    def _shrink(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv2(self.conv1(x)), 7, stride=3)

    def forward(self, x: Tensor, pooled: Tensor, top: int, height: int) -> tuple[Tensor, Tensor]:
        shortcut = self.conv1(x)
        resized = resized_rows(pooled, top, top + x.shape[2], height)
        features = torch.sigmoid(self.conv4(resized + self.conv_f(shortcut)))
        return features, torch.tanh(self.ouc_edge(features))


def resized_rows(x: Tensor, top: int, bottom: int, height: int) -> Tensor:
    """Rows `top` to `bottom` of x resized along H to `height`, linearly, as `F.interpolate` without aligned corners.

    (B, C, h, W) -> (B, C, bottom - top, W)
    """
    row = torch.arange(top, bottom, device=x.device)
    # Where it lies in x, (row + 0.5) h / height - 0.5, in units of 1 / (2 height): whole numbers, exact everywhere.
    source = ((2 * row + 1) * x.shape[2] - height).clamp_min(0)
    above = torch.div(source, 2 * height, rounding_mode="floor")
    below = (above + 1).clamp_max(x.shape[2] - 1)
    share = (source - 2 * height * above).to(x.dtype) / (2 * height)
    return torch.lerp(x[:, :, above], x[:, :, below], share[:, None])


class AttentionContext(NamedTuple):
    """What the attention branch knows of the whole image."""

    gate: Tensor  # factor of each channel in (0, 1), (B, 32, 1, 1)
    query: Tensor  # what the features of each pixel are compared with, (B, 32, 1, 1)
    normaliser: Tensor  # logarithm of the sum over all pixels of exp(query . features), (B, 1, 1, 1)


class AttentionBranch(nn.Module):
    """Polarised self-attention on the second image's input features: one weight a channel, and one a pixel.

    `gather` takes in the whole image, `forward` makes the features and the image of any rows. A pixel's weight is the
    sigmoid of a softmax over all pixels, as published, so it is about 0.5 + 1 / (4 H W): nearly the same everywhere.

    Source: Liu, Liu, Fan and Huang, "Polarized Self-Attention", 2021, the parallel form.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_q_right = net.conv1x1(32, 1)
        self.conv_v_right = net.conv1x1(32, 16)
        self.conv_up = net.conv1x1(16, 32)
        self.conv_q_left = net.conv1x1(32, 16)
        self.conv_v_left = net.conv1x1(32, 16)
        self.ouc_cda = nn.Conv2d(32, 1, 1)
        for convolution in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(convolution.weight)  # as published; the others have torch's defaults

    def gather(self, rows: Rows, ranges: list[tuple[int, int]]) -> AttentionContext:
        means, sizes, pooled, sums = [], [], [], []
        for top, bottom in ranges:
            x = net.at_least_float32(rows(top, bottom)).flatten(2)  # (B, 32, n)
            scores = F.conv1d(x, self.conv_q_right.weight.flatten(2).to(x.dtype))  # (B, 1, n)
            # torch's softmax adds up 65 536 pixels with a relative error of 5e-5, its logsumexp with one of 1e-7.
            sums.append(scores.logsumexp(dim=2))
            pooled.append((x * (scores - sums[-1][:, :, None]).exp()).sum(dim=2))
            means.append(x.mean(dim=2))
            sizes.append(bottom - top)
        # Values are mixed before they are projected, where the published code does it after: the projections are
        # linear and without bias, so it is the same, and one product an image instead of one a pixel.
        share = torch.stack(sums).softmax(dim=0)  # of each tile in the softmax over all pixels
        context = (share * torch.stack(pooled)).sum(dim=0)[:, :, None, None]  # (B, 32, 1, 1)
        mean = means[0][:, :, None, None]
        if len(means) > 1:
            rows_of = context.new_tensor(sizes)[:, None, None]
            mean = ((rows_of / rows_of.sum()) * torch.stack(means)).sum(dim=0)[:, :, None, None]
        gate = torch.sigmoid(self.conv_up(self.conv_v_right(context)))
        query = F.conv_transpose2d(self.conv_q_left(mean), self.conv_v_left.weight)
        logits = [self._logits(rows(top, bottom), query).logsumexp(dim=(2, 3), keepdim=True) for top, bottom in ranges]
        return AttentionContext(gate, query, torch.stack(logits).logsumexp(dim=0))

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid((self._logits(x, context.query) - context.normaliser).exp())  # (B, 1, h, W)
        features = x * (context.gate + weights).to(x.dtype)
        return features, torch.tanh(self.ouc_cda(features))

    @staticmethod
    def _logits(x: Tensor, query: Tensor) -> Tensor:
        return (net.at_least_float32(x) * query).sum(dim=1, keepdim=True)


class MLFuse(nn.Module):
    """The published network: 111 817 parameters, of which 2 320 (`edg_net.conv_dilation`) are unused."""

    def __init__(self) -> None:
        super().__init__()
        self.inc_edg = double_conv(1, 32)
        self.inc_ssd = double_conv(1, 32)
        self.inc_cmk_1 = double_conv(1, 32)
        self.inc_cmk_2 = double_conv(1, 32)
        self.layer = double_conv(96, 48, 16)
        self.outc = nn.Sequential(OrderedDict(conv=nn.Conv2d(16, 1, 1)))
        self.cmk_net = CrossModalBranch()
        self.edg_net = EdgeBranch()
        self.ssd_net = AttentionBranch()

    def forward(self, img1: Tensor, img2: Tensor) -> Outputs:
        """Fuses a pair, (B, 1, H, W) in [0, 1] each with H, W >= 15. Exchanging the two changes the result.

        Args:
            img1: visible, or MRI: gives the texture.
            img2: infrared, or CT, PET, SPECT: gives what stands out.

        Raises:
            ValueError: the shapes differ, or a side is shorter than 15.
        """
        return next(self.fused_rows(img1, img2, [(0, img1.shape[2])]))

    def fused_rows(self, img1: Tensor, img2: Tensor, ranges: list[tuple[int, int]]) -> Iterator[Outputs]:
        """What `forward` gives, in tiles of whole rows, each from `top` to `bottom`: together all rows."""
        if img1.shape != img2.shape or img1.ndim != 4 or min(img1.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"MLFuse needs two (B, 1, H, W) of one shape with H and W at least {SMALLEST_SIDE}, "
                f"got {tuple(img1.shape)} and {tuple(img2.shape)}"
            )
        height, width = img1.shape[2:]
        inputs = ((self.inc_edg, img1), (self.inc_ssd, img2), (self.inc_cmk_1, img1), (self.inc_cmk_2, img2))
        edge_rows, salient_rows, *cross_rows = (input_rows(*pair, in_tiles=len(ranges) > 1) for pair in inputs)
        pooled = self.edg_net.pool(edge_rows, ranges, height, width)
        context = self.ssd_net.gather(salient_rows, ranges)
        halo = BRANCH_HALO + MERGE_HALO
        for top, bottom in ranges:
            # A whole image takes no arithmetic: torch.export calls this with a height that is not a number.
            whole = (top, bottom) == (0, height)
            first, last = (top, bottom) if whole else (max(top - halo, 0), min(bottom + halo, height))
            edge_features, edge = self.edg_net(edge_rows(first, last), pooled, first, height)
            cross_features, cross = self.cmk_net(*(rows(first, last) for rows in cross_rows))
            attention_features, attention = self.ssd_net(salient_rows(first, last), context)
            merged = self.layer(torch.cat([edge_features, cross_features, attention_features], dim=1))
            outputs = (torch.tanh(self.outc(merged)), edge, cross, attention)
            # Rows near an inner edge have seen padding in place of their neighbours; they belong to another tile.
            yield Outputs(*(x[:, :, top - first : bottom - first] for x in outputs))


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Training options of MLFuse; the defaults are those of the published code."""

    epochs: int = option(501, "epochs of its one stage", above=0)
    edge_weight: float = option(0.3, "weight of the edge loss", low=0)
    attention_weight: float = option(3.0, "weight of the attention loss", low=0)
    cross_weight: float = option(0.5, "weight of the cross-modal loss", low=0)
    fusion_weight: float = option(1.0, "weight of the fusion loss", low=0)


class MLFuseSystem(System, nn.Module):
    label = "MLFuse"
    smallest_side = SMALLEST_SIDE
    smallest_patch = SMALLEST_SIDE
    needs_saliency = True
    weights = {"ivf": ("MLFuse.pth",), "mif": ("MLFuse.pth",)}  # one file for all images
    Options = Options
    recipes = {
        "published": {
            "batch_size": 16, "schedule": "cosine", "min_lr": 0.0, "weight_decay": 5e-5, "clip_norm": 0.0, "crop": 128,
            "drop_last": True,
        },
    }  # fmt: skip
    published_networks = {"model": "network"}

    def __init__(self) -> None:
        super().__init__()
        self.network = MLFuse()

    def fuse(self, vis: Tensor, ir: Tensor, skip: str = "none") -> Tensor:
        """(B, 1, H, W) in [0, 1] twice -> (B, 1, H, W) in (-1, 1): min-max normalise it, as published."""
        if skip not in self.skips:
            raise ValueError(f"skip must be {', '.join(self.skips)}, got {skip!r}")
        return self.network(vis, ir).fused

    def fuse_tiled(self, vis: Tensor, ir: Tensor, skip: str, tiles: Tiles) -> Tensor:
        """`fuse`, in tiles of whole rows, of about `tiles.pixels` pixels each."""
        height, width = vis.shape[2:]
        rows = max(TILE_ROWS, tiles.pixels // (len(vis) * width)) if tiles.pixels else height
        ranges = [(top, min(top + rows, height)) for top in range(0, height, rows)]
        # Filled, not collected: a small tile kept after each would cut up the memory that tiles are made in.
        fused = torch.empty_like(vis)
        for (top, bottom), tile in zip(ranges, self.network.fused_rows(vis, ir, ranges), strict=True):
            fused[:, :, top:bottom] = tile.fused
        return fused

    def stages(self, options: Options, task: str) -> list[Stage]:
        """One stage, in which all branches learn at once. Batches need the saliency maps of the second image."""

        def losses(batch: Batch) -> dict[str, Tensor]:
            outputs = self.network(batch.vis, batch.ir)
            terms = multi_branch_loss(batch.vis, batch.ir, batch.ir_saliency, *outputs)
            terms["total"] = (
                options.edge_weight * terms["edge"]
                + options.attention_weight * terms["attention"]
                + options.cross_weight * terms["cross"]
                + options.fusion_weight * terms["fusion"]
            )
            return self.with_fused_terms(terms, options, batch, outputs.fused)

        return [Stage("joint", options.epochs, {"network": self.network}, losses)]

    def save(self, path: Path | str, about: dict[str, Any] | None = None, *, half: bool = False) -> None:
        """Saves in the published format: `epoch` beside the network, and keys without `module.`."""
        beside = {"epoch": (about or {}).get("epochs", 0)}
        save_checkpoint(path, self, about, half=half, prefix="", beside=beside)
