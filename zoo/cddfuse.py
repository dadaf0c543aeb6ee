"""CDDFuse with the verbs of the zoo: its two training stages and its files. The network itself is net.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import net
from utils import InputError
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.losses import SSIM_FORMS, decomposition_loss, fusion_loss, gradient_loss, reconstruction_loss
from zoo import Batch, Stage


@dataclass(frozen=True)
class Options:
    """Training options of CDDFuse; the defaults are those of the published code."""

    stage1_epochs: int = 40  # decomposition: encoder and decoder
    stage2_epochs: int = 80  # fusion: everything
    decomposition_weight: float = 2.0  # L_decomp, both stages
    ssim_weight: float = 5.0  # of the dissimilarity in each reconstruction loss
    gradient_weight_1: float = 5.0  # gradient of the visible reconstruction, stage one
    gradient_weight_2: float = 10.0  # gradient of the fused image, stage two
    ssim_form: str = "published"  # or "standard": where SSIM is negative, see utils/losses.py

    def __post_init__(self) -> None:
        if self.ssim_form not in SSIM_FORMS:
            raise InputError(f"--ssim-form must be one of {', '.join(SSIM_FORMS)}, got {self.ssim_form!r}")
        if self.stage1_epochs < 0 or self.stage2_epochs < 0 or not self.stage1_epochs + self.stage2_epochs:
            raise InputError("--stage1-epochs and --stage2-epochs must not be negative, nor both 0")


class CDDFuseSystem(net.CDDFuse):
    label = "CDDFuse"
    skips = net.SKIPS
    smallest_side = net.SMALLEST_SIDE
    Options = Options

    @staticmethod
    def default_skip(trained_for: str, fusing: str) -> str:
        """Medical weights were trained without an image; the others see the visible one, or for medical
        images the sum of both: the rule of the published test scripts."""
        if trained_for == "mif":
            return "none"
        return "vis" if fusing == "ivf" else "sum"

    def stages(self, options: Options, task: str) -> list[Stage]:
        """Decomposition, then fusion. For medical images the decoder is never given an image."""
        skip = "none" if task == "mif" else "vis"
        pair_networks = {"encoder": self.encoder, "decoder": self.decoder}
        all_networks = {**pair_networks, "base_fusion": self.base_fusion, "detail_fusion": self.detail_fusion}

        def decomposition_losses(batch: Batch) -> dict[str, Tensor]:
            images = torch.cat(batch)
            base, detail, _ = self.encoder(images)
            rebuilt = self.decoder(None if skip == "none" else images, base, detail)[0]
            vis_rebuilt, ir_rebuilt = rebuilt.chunk(2)
            terms = decomposition_loss(*base.chunk(2), *detail.chunk(2))
            weights = {"ssim_weight": options.ssim_weight, "form": options.ssim_form}
            terms["reconstruction_vis"] = reconstruction_loss(batch.vis, vis_rebuilt, **weights)
            terms["reconstruction_ir"] = reconstruction_loss(batch.ir, ir_rebuilt, **weights)
            terms["gradient_vis"] = gradient_loss(batch.vis, vis_rebuilt)  # visible alone, as published
            terms["total"] = (
                terms["reconstruction_vis"]
                + terms["reconstruction_ir"]
                + options.decomposition_weight * terms["decomposition"]
                + options.gradient_weight_1 * terms["gradient_vis"]
            )
            return terms

        def fusion_losses(batch: Batch) -> dict[str, Tensor]:
            base, detail, _ = self.encoder(torch.cat(batch))
            fused = self.decode_fused(batch.vis, batch.ir, base, detail, skip)
            terms = decomposition_loss(*base.chunk(2), *detail.chunk(2))
            terms |= fusion_loss(batch.vis, batch.ir, fused, gradient_weight=options.gradient_weight_2)
            terms["total"] = terms["fusion"] + options.decomposition_weight * terms["decomposition"]
            return terms

        return [
            Stage("decomposition", options.stage1_epochs, pair_networks, decomposition_losses),
            Stage("fusion", options.stage2_epochs, all_networks, fusion_losses),
        ]

    def load_published(self, path: Path | str) -> dict[str, Any]:
        """Loads a file in the published format; see `utils.checkpoint.load_checkpoint`."""
        return load_checkpoint(path, self)

    def save(self, path: Path | str, about: dict[str, Any] | None = None) -> None:
        save_checkpoint(path, self, about)
