"""CDDFuse with the verbs of the zoo: its two training stages and its files. The network itself is net.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import net
from utils.evaluation.scores import PUBLISHED_COLUMNS
from utils.tiles import Tiles
from utils.training.losses import (
    SSIM_FORMS,
    decomposition_loss,
    difference_loss,
    fused_ssim_loss,
    fusion_loss,
    gradient_loss,
    range_loss,
    reconstruction_loss,
)
from zoo import Batch, CheckedOptions, Stage, System, option


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Training options of CDDFuse; the defaults are those of the published code."""

    stage1_epochs: int = option(40, "epochs of stage one, decomposition: encoder and decoder", low=0)
    stage2_epochs: int = option(80, "epochs of stage two, fusion: everything", low=0)
    stage2_lr_factor: float = option(1.0, "times the rate of encoder and decoder in stage two; by then the schedule "
                                     "`step` has halved it twice", above=0)  # fmt: skip
    decomposition_weight: float = option(2.0, "weight of the decomposition loss, both stages", low=0)
    ssim_weight: float = option(5.0, "weight of the dissimilarity in a reconstruction loss", low=0)
    gradient_weight_1: float = option(5.0, "weight of the gradient of the visible reconstruction", low=0)
    intensity_weight: float = option(1.0, "weight of the intensity of the fused image", low=0)
    gradient_weight_2: float = option(10.0, "weight of the gradient of the fused image", low=0)
    range_weight: float = option(0.0, "weight of how far the fused image leaves the levels of both sources; not in the "
                                 "paper", low=0)  # fmt: skip
    range_radius: int = option(1, "pixels within which --range-weight looks for these levels", low=0,
                               most=100)  # fmt: skip
    difference_weight: float = option(0.0, "weight of how little the fused image less one source correlates with the "
                                      "other; not in the paper", low=0)  # fmt: skip
    fused_ssim_weight: float = option(0.0, "weight of the dissimilarity of the fused image from both sources; not of "
                                      "the paper", low=0)  # fmt: skip
    ssim_form: str = option("published", "they differ where SSIM is negative", choices=SSIM_FORMS)
    gradient_images: str = option("vis", "reconstructions that --gradient-weight-1 is for: vis is the published code's",
                                  choices=("vis", "both"))  # fmt: skip
    decoder_image: str = option("auto", "what the decoder adds in stage two (none: nor in stage one); auto: vis, or "
                                "none for --task mif",
                                choices=("auto", *net.SKIPS))  # fmt: skip


class CDDFuseSystem(System, net.CDDFuse):
    label = "CDDFuse"
    skips = net.SKIPS
    smallest_side = net.SMALLEST_SIDE
    weights = {"ivf": ("CDDFuse_IVF.pth",), "mif": ("CDDFuse_IVF.pth", "CDDFuse_MIF.pth")}
    published_networks = net.CDDFuse.published_networks
    published = weights  # under the same names, in a folder of their own
    columns = PUBLISHED_COLUMNS["cddfuse"]
    Options = Options
    map_bytes = 2 * 64 * 4
    step_bytes = 150_000
    # Why: benchmarks/RESULTS.md, Recipes. `python -m benchmarks.recipes` compares it with the published one.
    recipes = {
        "ours": {
            "optimizer": "muon", "learning_rate": 1e-3, "muon_factor": 3.0, "schedule": "cosine", "warmup_steps": 100,
            "ema": 0.998, "crop": 64, "flips": True, "precision": "auto", "epoch_batches": 500, "stage1_epochs": 4,
            "stage2_epochs": 26, "stage2_lr_factor": 0.25,
        },
        "published": {},
    }  # fmt: skip

    @classmethod
    def row_label(cls, task: str, stem: str) -> str:
        is_published = (task, stem) == ("ivf", "CDDFuse_IVF")  # and so is this label
        return "CDDFuse    " if is_published else super().row_label(task, stem)

    @staticmethod
    def default_skip(trained_for: str, fusing: str) -> str:
        """Medical weights were trained without an image; the others see the visible one, or for medical
        images the sum of both: the rule of the published test scripts."""
        if trained_for == "mif":
            return "none"
        return "vis" if fusing == "ivf" else "sum"

    def fuse_tiled(self, vis: Tensor, ir: Tensor, skip: str, tiles: Tiles) -> Tensor:
        """`fuse`, in tiles. Every map is written over the one before."""
        net.check_sources(vis, ir)
        image = net.decoder_image(vis, ir, skip)
        shallow = encode_tiled(self.encoder, torch.cat([vis, ir]), tiles)
        branches = (self.encoder.baseFeature, shallow), (self.encoder.detailFeature, shallow)
        base, detail = tiles.merged(add_modalities, *branches, out=shallow).unflatten(0, (2, -1))
        fused = tiles.merged(self.decoder.reduce, (self.base_fusion, base), (self.detail_fusion, detail), out=base)
        return decode_tiled(self.decoder, image, fused, tiles)

    def stages(self, options: Options, task: str) -> list[Stage]:
        """Decomposition, then fusion. For medical images the decoder is never given an image."""
        skip = self.default_skip(task, task) if options.decoder_image == "auto" else options.decoder_image
        pair_networks = {"encoder": self.encoder, "decoder": self.decoder}
        all_networks = {**pair_networks, "base_fusion": self.base_fusion, "detail_fusion": self.detail_fusion}

        def decomposition_losses(batch: Batch) -> dict[str, Tensor]:
            images = torch.cat([batch.vis, batch.ir])
            base, detail, _ = self.encoder(images)
            rebuilt = self.decoder(None if skip == "none" else images, base, detail)[0]
            vis_rebuilt, ir_rebuilt = rebuilt.chunk(2)
            terms = decomposition_loss(*base.chunk(2), *detail.chunk(2))
            weights = {"ssim_weight": options.ssim_weight, "form": options.ssim_form}
            terms["reconstruction_vis"] = reconstruction_loss(batch.vis, vis_rebuilt, **weights)
            terms["reconstruction_ir"] = reconstruction_loss(batch.ir, ir_rebuilt, **weights)
            terms["gradient_vis"] = gradient_loss(batch.vis, vis_rebuilt)
            terms["total"] = (
                terms["reconstruction_vis"]
                + terms["reconstruction_ir"]
                + options.decomposition_weight * terms["decomposition"]
                + options.gradient_weight_1 * terms["gradient_vis"]
            )
            if options.gradient_images == "both":
                terms["gradient_ir"] = gradient_loss(batch.ir, ir_rebuilt)
                terms["total"] = terms["total"] + options.gradient_weight_1 * terms["gradient_ir"]
            return terms

        def fusion_losses(batch: Batch) -> dict[str, Tensor]:
            base, detail, _ = self.encoder(torch.cat([batch.vis, batch.ir]))
            fused = self.decode_fused(batch.vis, batch.ir, base, detail, skip)
            terms = decomposition_loss(*base.chunk(2), *detail.chunk(2))
            weights = {"intensity_weight": options.intensity_weight, "gradient_weight": options.gradient_weight_2}
            terms |= fusion_loss(batch.vis, batch.ir, fused, **weights)
            terms["total"] = terms["fusion"] + options.decomposition_weight * terms["decomposition"]
            return self.with_fused_terms(terms, options, batch, fused)

        lr_scale = dict.fromkeys(pair_networks, options.stage2_lr_factor)
        return [
            Stage("decomposition", options.stage1_epochs, pair_networks, decomposition_losses, skip=skip),
            Stage("fusion", options.stage2_epochs, all_networks, fusion_losses, lr_scale=lr_scale, skip=skip),
        ]

    def fused_terms(self, options: Options) -> dict[str, Any]:
        return {
            "range": (options.range_weight, functools.partial(range_loss, radius=options.range_radius)),
            "difference": (options.difference_weight, difference_loss),
            "fused_ssim": (options.fused_ssim_weight, fused_ssim_loss),
        }

    def features(self, vis: Tensor, ir: Tensor) -> dict[str, Tensor]:
        """Base and detail features of both images: (1, 1, H, W) twice -> name -> (1, 64, H, W)."""
        base, detail, _ = self.encoder(torch.cat([vis, ir]))
        maps = (*base.split(1), *detail.split(1))
        return dict(zip(("base vis", "base ir", "detail vis", "detail ir"), maps, strict=True))


def encode_tiled(encoder: nn.Module, images: Tensor, tiles: Tiles) -> Tensor:
    """The shallow features of an encoder in tiles: (B, 1, H, W) -> (B, 64, H, W)."""
    x = tiles(encoder.patch_embed, images)
    for block in encoder.encoder_level1:
        x = tiles(block, x, out=x)
    return x


def decode_tiled(decoder: net.Restormer_Decoder, image: Tensor | None, reduced: Tensor, tiles: Tiles) -> Tensor:
    """What a decoder makes of the reduced feature (B, 64, H, W), which is written over: (B, 1, H, W)."""
    for block in decoder.encoder_level2:
        reduced = tiles(block, reduced, out=reduced)
    return decoder.add_image(image, tiles.memory.fetch(tiles(decoder.output, reduced)))


def add_modalities(base: Tensor, detail: Tensor) -> Tensor:
    """Base and detail features of vis and ir, (2B, 64, H, W) each -> their sums over vis and ir, stacked: the same."""
    return torch.cat([net.sum_of_both(base), net.sum_of_both(detail)])
