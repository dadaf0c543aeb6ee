"""FSIDFusion: the network, built from net.py's blocks, its two training stages and its files.

FSIDFusion ("Feature Space Interaction Decomposition Fusion") is a relative of CDDFuse. One encoder takes both
images: the shallow part is shared, base and detail branches are each modality's own. An interaction block makes one
*shared* feature of the two base features; the two detail features are added and fused by four coupling nodes;
CDDFuse's decoder makes the image. Where figures and published code disagree (the paper draws a concatenation where
the code adds), the code is followed.

Attribute names inside the networks are the keys of published checkpoints, typos included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import net
from utils.evaluation.scores import PUBLISHED_COLUMNS
from utils.tiles import Local, Tiles
from utils.training.losses import SSIM_FORMS, fusion_loss, gradient_loss, reconstruction_loss
from zoo import Batch, CheckedOptions, Stage, System, option
from zoo.cddfuse import decode_tiled, encode_tiled

CHANNELS = 64


class PairFeatures(NamedTuple):
    """What the encoder makes of two images, each (B, 64, H, W)."""

    shared: Tensor
    detail_vis: Tensor
    detail_ir: Tensor


# --- The network --------------------------------------------------------------------------------------------


class UnusedConv(nn.Module):
    """The weight and bias of a 1x1 convolution that published files hold and no forward pass uses.

    They are buffers: loaded and saved, but no parameters that an optimiser, `requires_grad_` or
    DistributedDataParallel (which stops at a parameter without gradient) could come upon.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in nn.Conv2d(channels, channels, 1).named_parameters():
            self.register_buffer(name, value.detach())


class AttentionalFusion(nn.Module):
    """Attentional feature fusion (AFF): a weight for each pixel and channel chooses between two feature maps.

    The weight comes from a branch that sees one pixel and a branch that sees the mean over the image. Both have
    batch norm, and the mean is one value a channel and image: training needs two images a batch.
    """

    halo = 0

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.local_att = nn.Sequential(*self.layers(channels, channels // reduction))
        self.global_att = nn.Sequential(nn.AdaptiveAvgPool2d(1), *self.layers(channels, channels // reduction))

    @staticmethod
    def layers(channels: int, hidden: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        ]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, C, H, W) twice -> the same shape."""
        return self.local(a, b, self.global_att(a + b))

    def sums(self, a: Tensor, b: Tensor, inside: net.Inside) -> tuple[Tensor, Tensor]:
        total = (a + b)[inside]
        exact = torch.promote_types(total.dtype, torch.float32)
        return total.sum(dim=(2, 3), dtype=exact), total.new_tensor(total.shape[2:].numel(), dtype=exact)

    def context(self, total: Tensor, pixels: Tensor) -> Tensor:
        mean = (total / pixels)[:, :, None, None]
        return self.global_att(mean.to(self.local_att[0].weight.dtype))  # whose pooling then finds one pixel

    def local(self, a: Tensor, b: Tensor, image_wide: Tensor) -> Tensor:
        weight = torch.sigmoid(self.local_att(a + b) + image_wide)
        return 2 * (b + weight * (a - b))


class Interaction(net.Coupling):
    """Base features of both modalities -> one shared feature: (B, C, H, W) twice -> (B, C, H, W).

    A coupling between base blocks of two heads. It is not symmetric: infrared is the first of the pair.
    """

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__(channels)
        self.shffleconv = UnusedConv(2 * channels)
        self.Trans1 = net.BaseFeatureExtraction(channels, heads)
        self.Trans2 = net.BaseFeatureExtraction(channels, heads)
        self.Trans3 = net.BaseFeatureExtraction(channels, heads)
        self.Trans4 = net.BaseFeatureExtraction(channels, heads)
        self.AFF = AttentionalFusion(channels)

    def forward(self, *, base_ir: Tensor, base_vis: Tensor) -> Tensor:
        first, second = self.couple(self.Trans1(base_ir), self.Trans2(base_vis)).chunk(2, dim=1)
        return self.AFF(self.Trans3(first), self.Trans4(second))


class PairEncoder(nn.Module):
    """Two images -> (shared, detail_vis, detail_ir): (B, 1, H, W) in [0, 1] twice -> three times (B, 64, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = net.PatchEmbedding(1, CHANNELS)
        self.encoder_level1 = nn.Sequential(*(net.RestormerBlock(CHANNELS, heads=8, expansion=2) for _ in range(4)))
        self.baseFeature_vis = net.BaseFeatureExtraction(CHANNELS, num_heads=8)
        self.baseFeature_ir = net.BaseFeatureExtraction(CHANNELS, num_heads=8)
        self.detailFeature_vis = net.DetailFeatureExtraction()
        self.detailFeature_ir = net.DetailFeatureExtraction()
        self.duelFuse = Interaction(CHANNELS)  # the spelling is file format

    def forward(self, vis: Tensor, ir: Tensor) -> PairFeatures:
        # One pass over both modalities: the shallow part is shared.
        shallow_vis, shallow_ir = self.encoder_level1(self.patch_embed(torch.cat([vis, ir]))).chunk(2)
        shared = self.duelFuse(base_ir=self.baseFeature_ir(shallow_ir), base_vis=self.baseFeature_vis(shallow_vis))
        return PairFeatures(shared, self.detailFeature_vis(shallow_vis), self.detailFeature_ir(shallow_ir))


# --- The system ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Training options of FSIDFusion; the defaults are those of the published code."""

    stage1_epochs: int = option(40, "epochs of stage one, reconstruction: encoder and decoder", low=0)
    stage2_epochs: int = option(80, "epochs of stage two, fusion: everything", low=0)
    ssim_weight: float = option(5.0, "weight of the dissimilarity in a reconstruction loss", low=0)
    gradient_weight_1: float = option(5.0, "weight of the gradient of the visible reconstruction", low=0)
    gradient_weight_2: float = option(100.0, "weight of the gradient of the fused image", low=0)
    reconstruction_weight: float = option(1.0, "weight in stage two of all terms of stage one", low=0)
    ssim_form: str = option("published", "they differ where SSIM is negative", choices=SSIM_FORMS)


class FSIDFusion(System, nn.Module):
    """The whole system: an encoder of pairs, a fusion layer for detail features, a decoder."""

    label = "FSIDFusion"
    skips = net.SKIPS  # by default the visible image or the MRI, whatever it was trained for, as published
    smallest_side = net.SMALLEST_SIDE
    smallest_batch = 2  # batch norm behind a global mean has one value a channel and patch
    weights = {"ivf": ("FSIDFusion.pth",), "mif": ("FSIDFusion.pth",)}  # one file for all images, as published
    columns = PUBLISHED_COLUMNS["fsidfusion"]
    Options = Options
    map_bytes = 6 * 64 * 4
    step_bytes = 220_000

    # Name in a published checkpoint -> attribute.
    published_networks = {
        "DIDF_Encoder": "encoder",
        "DIDF_Decoder": "decoder",
        "SepcificFuseLayer": "specific_fusion",  # the spelling is file format
    }

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PairEncoder()
        self.decoder = net.Restormer_Decoder()
        self.specific_fusion = net.DetailFeatureExtraction(num_layers=4)

    def encode(self, vis: Tensor, ir: Tensor) -> PairFeatures:
        """(B, 1, H, W) in [0, 1] twice -> shared feature and both detail features, each (B, 64, H, W)."""
        net.check_sources(vis, ir)
        return self.encoder(vis, ir)

    def fuse(self, vis: Tensor, ir: Tensor, skip: str = "vis") -> Tensor:
        """Fuses two aligned images of one size: (B, 1, H, W) in [0, 1] each -> the same shape and range.

        Args:
            vis: visible image, or MRI.
            ir: infrared image, or CT, PET, SPECT.
            skip: what the decoder adds before its sigmoid: "vis" (published, for every kind of image), "sum"
                of both or "none".

        Raises:
            ValueError: the shapes differ, a side is shorter than 2, or `skip` is unknown.
        """
        return self.decode_fused(vis, ir, self.encode(vis, ir), skip)

    def decode_sources(self, vis: Tensor, ir: Tensor, features: PairFeatures) -> tuple[Tensor, Tensor]:
        """Both images again, each from the shared and its own detail feature: shapes as given."""
        shared, detail = torch.cat([features.shared] * 2), torch.cat([features.detail_vis, features.detail_ir])
        vis_rebuilt, ir_rebuilt = self.decoder(torch.cat([vis, ir]), shared, detail)[0].chunk(2)
        return vis_rebuilt, ir_rebuilt

    def decode_fused(self, vis: Tensor, ir: Tensor, features: PairFeatures, skip: str = "vis") -> Tensor:
        """The second half of `fuse`."""
        image = net.decoder_image(vis, ir, skip)
        detail = self.specific_fusion(features.detail_vis + features.detail_ir)
        return self.decoder(image, features.shared, detail)[0]

    def fuse_tiled(self, vis: Tensor, ir: Tensor, skip: str, tiles: Tiles) -> Tensor:
        """`fuse`, in tiles. A map is written over where nobody needs it any more."""
        net.check_sources(vis, ir)
        image = net.decoder_image(vis, ir, skip)
        encoder, couple = self.encoder, self.encoder.duelFuse
        shallow_vis, shallow_ir = encode_tiled(encoder, torch.cat([vis, ir]), tiles).chunk(2)
        base_ir, base_vis = tiles(encoder.baseFeature_ir, shallow_ir), tiles(encoder.baseFeature_vis, shallow_vis)
        base_ir, base_vis = tiles(couple.Trans1, base_ir, out=base_ir), tiles(couple.Trans2, base_vis, out=base_vis)
        first, second = tiles(Local(couple.couple, couple.halo), base_ir, base_vis).chunk(2, dim=1)
        del base_ir, base_vis
        first, second = tiles(couple.Trans3, first, out=first), tiles(couple.Trans4, second, out=second)
        shared = tiles(couple.AFF, first, second, out=first)
        details = (encoder.detailFeature_vis, shallow_vis), (encoder.detailFeature_ir, shallow_ir)
        detail = tiles.merged(torch.add, *details, out=shallow_vis)
        parts = (Local(nn.Identity(), 0), shared), (self.specific_fusion, detail)
        return decode_tiled(self.decoder, image, tiles.merged(self.decoder.reduce, *parts, out=shared), tiles)

    def stages(self, options: Options, task: str) -> list[Stage]:
        """Reconstruction, then fusion with the reconstruction kept; both tasks are trained alike."""
        pair_networks = {"encoder": self.encoder, "decoder": self.decoder}
        all_networks = {**pair_networks, "specific_fusion": self.specific_fusion}

        def reconstruction_terms(batch: Batch, features: PairFeatures) -> dict[str, Tensor]:
            vis_rebuilt, ir_rebuilt = self.decode_sources(batch.vis, batch.ir, features)
            weights = {"ssim_weight": options.ssim_weight, "form": options.ssim_form}
            terms = {
                "reconstruction_vis": reconstruction_loss(batch.vis, vis_rebuilt, **weights),
                "reconstruction_ir": reconstruction_loss(batch.ir, ir_rebuilt, **weights),
                "gradient_vis": gradient_loss(batch.vis, vis_rebuilt),  # visible alone, as published
            }
            terms["total"] = (
                terms["reconstruction_vis"]
                + terms["reconstruction_ir"]
                + options.gradient_weight_1 * terms["gradient_vis"]
            )
            return terms

        def reconstruction_losses(batch: Batch) -> dict[str, Tensor]:
            return reconstruction_terms(batch, self.encode(batch.vis, batch.ir))

        def fusion_losses(batch: Batch) -> dict[str, Tensor]:
            features = self.encode(batch.vis, batch.ir)
            fused = self.decode_fused(batch.vis, batch.ir, features)
            terms = reconstruction_terms(batch, features)
            terms |= fusion_loss(batch.vis, batch.ir, fused, gradient_weight=options.gradient_weight_2)
            terms["total"] = terms["fusion"] + options.reconstruction_weight * terms["total"]
            return self.with_fused_terms(terms, options, batch, fused)

        return [
            Stage("reconstruction", options.stage1_epochs, pair_networks, reconstruction_losses),
            Stage("fusion", options.stage2_epochs, all_networks, fusion_losses),
        ]
