"""CDDFuse in one file: the four published networks and the module that holds them. Needs torch and einops alone.

CDDFuse (Zhao et al., "CDDFuse: Correlation-Driven Dual-Branch Feature Decomposition for Multi-Modality Image
Fusion", CVPR 2023) splits an image into low-frequency *base* features (shared between modalities) and
high-frequency *detail* features (particular to each), fuses the two kinds apart, and decodes one image.

    model = CDDFuse()
    fused = model(vis, ir)  # (B, 1, H, W) each, values in [0, 1]

Names of classes, arguments and attributes of the four networks are those of the published code, typos included:
other code imports them, and published checkpoints hold them as keys. What is inside was written for this project from
the paper and the published tensor shapes.

Shapes: B batch, C = 64 channels, H and W any size from 2 x 2 up, G = 8 heads of C / G channels. Feature maps are
(B, C, H, W) in channels-last memory: layer norms, 1x1 convolutions and attention products then need no copy.

Tiles: only channel attention spans an image, by sums over pixels. So a block with attention offers, beside `forward`,
`sums` of a tile, the `context` that the sums of all tiles give, and `local`, the rest. `halo` says how many pixels
beside a tile are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALLEST_SIDE = 2  # the detail branch pads by reflection, which needs a neighbour to reflect
SKIPS = ("vis", "sum", "none")

Inside = tuple[Any, slice, slice]  # the pixels of a tile without its halo, as an index


class Features(NamedTuple):  # of one image, each (B, 64, H, W)
    base: Tensor
    detail: Tensor
    shallow: Tensor


# Channel attention: channels attend to channels of their head, compared over all pixels of the image.


def attention_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, C, H, W) each -> q k^T, (B, C, C), and the squares of q and k, (B, 2C), summed over pixels.

    Both are at least float32, and may be added up over tiles.
    """
    q, k = (rearrange(x, "b c h w -> b (h w) c") for x in (q, k))
    # All C x C products, though only those within a head are used: one matrix product is faster than G thin ones.
    products = at_least_float32(q.transpose(1, 2) @ k)
    # Squares of half-precision numbers are added up in float32; vector_norm takes several times as long.
    exact = torch.promote_types(q.dtype, torch.float32)
    return products, torch.cat([x.square().sum(dim=1, dtype=exact) for x in (q, k)], dim=1)


def attention_matrix(products: Tensor, squares: Tensor, temperature: Tensor) -> Tensor:
    """`attention_sums` -> softmax of cosines times temperature (G, 1, 1): (B, C, C), zero between heads."""
    # A root has an infinite slope at 0, where F.normalize, the published form, has none. Black images lead there.
    norms = torch.where(squares > 0, squares, 1e-24).sqrt().clamp_min(1e-12)
    q_norm, k_norm = norms.chunk(2, dim=1)
    cosines = products / (q_norm[:, :, None] * k_norm[:, None, :])
    channels, heads = cosines.shape[1], temperature.shape[0]
    head = torch.arange(channels, device=cosines.device) // (channels // heads)
    scaled = cosines * temperature.flatten()[head, None]
    return scaled.masked_fill(head[:, None] != head, -torch.inf).softmax(dim=-1)


class ChannelAttention(nn.Module):
    """Channel attention and a 1x1 convolution. (B, C, H, W) -> same. Sub-classes make queries, keys and values."""

    temperature: Tensor
    project_out: nn.Module

    def qkv_maps(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """Queries, keys and values, (B, 3C, H, W), or some of their channels."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_maps(x).chunk(3, dim=1)
        return self.attend(v, self.context(*attention_sums(q, k)))

    def sums(self, x: Tensor, inside: Inside) -> tuple[Tensor, Tensor]:
        q, k = self.qkv_maps(x, slice(0, 2 * x.shape[1]))[inside].chunk(2, dim=1)
        return attention_sums(q, k)

    def context(self, *sums: Tensor) -> Tensor:
        attention = attention_matrix(*sums, self.temperature)
        # Attention and projection are one matrix: project(attention @ v) = (project @ attention) @ v.
        if not is_plain(self.project_out):
            return attention
        return self.project_out.weight.flatten(1).to(attention.dtype) @ attention

    def local(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.attend(self.qkv_maps(x, slice(2 * x.shape[1], None)), matrix)

    def attend(self, v: Tensor, matrix: Tensor) -> Tensor:
        mixed = rearrange(v, "b c h w -> b (h w) c") @ matrix.transpose(1, 2).to(v.dtype)
        mixed = mixed.unflatten(1, v.shape[2:]).permute(0, 3, 1, 2)
        return mixed if is_plain(self.project_out) else self.project_out(mixed)


class RestormerAttention(ChannelAttention):
    """Restormer's (MDTA): queries, keys and values from a 1x1 and a depthwise 3x3 convolution."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = conv1x1(dim, 3 * dim)
        self.qkv_dwconv = conv3x3(3 * dim, 3 * dim, groups=3 * dim)
        self.project_out = conv1x1(dim, dim)

    def qkv_maps(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        if channels == slice(None) or not is_plain(self.qkv, self.qkv_dwconv):
            return self.qkv_dwconv(self.qkv(x))[:, channels]
        up, depthwise = self.qkv.weight[channels], self.qkv_dwconv.weight[channels]
        return F.conv2d(F.conv2d(x, up), depthwise, padding=1, groups=len(up))


class BaseAttention(ChannelAttention):
    """The base block's: queries, keys and values from a 1x1 and a full 3x3 convolution."""

    temperature = property(lambda self: self.scale)  # other names in published files
    project_out = property(lambda self: self.proj)

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv1 = conv1x1(dim, 3 * dim)
        self.qkv2 = conv3x3(3 * dim, 3 * dim)
        self.proj = conv1x1(dim, dim)

    def qkv_maps(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        if not is_plain(self.qkv1, self.qkv2):
            return self.qkv2(self.qkv1(x))[:, channels]
        # Both together are one 3x3 convolution from C to 3C: a third of the work, with the same gradient.
        weight = torch.einsum("omyx,mi->oiyx", self.qkv2.weight[channels], self.qkv1.weight.flatten(1))
        return F.conv2d(x, _channels_last(weight), padding=1)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def conv3x3(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False)


def is_plain(*convs: nn.Module) -> bool:
    """Whether convolutions do what their weights say and no more: without bias, hooks, or a module in their place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(  # a parametrised convolution has another type
        type(conv) is nn.Conv2d and conv.bias is None and not any(getattr(conv, name) for name in hooks)
        for conv in convs
    )


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel: (B, C, H, W) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PairConv2d(nn.Conv2d):
    """3x3 convolution in groups of two channels: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        # A CPU's backward pass of small groups is slow, in bfloat16 25 times slower than that of single channels. So
        # each channel of a pair is convolved by itself, once for either output.
        to_same, to_other = rearrange(self.weight, "(g o) i y x -> i g o y x", o=2)  # by input channel of the pair
        own = torch.stack([to_same[:, 0], to_other[:, 1]], dim=1).flatten(0, 1)[:, None]
        cross = torch.stack([to_other[:, 0], to_same[:, 1]], dim=1).flatten(0, 1)[:, None]
        other = x.permute(0, 2, 3, 1).unflatten(3, (-1, 2)).flip(4).flatten(3).permute(0, 3, 1, 2)
        own, cross = (F.conv2d(a, w, padding=1, groups=len(w)) for a, w in ((x, own), (other, cross)))
        return own + cross


class GatedFeedForward(nn.Module):
    """1x1 up, grouped 3x3, GELU(first half) * second half, 1x1 down (GDFN). (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden: int, dwconv: nn.Module) -> None:
        super().__init__()
        self.project_in = conv1x1(dim, 2 * hidden)
        self.dwconv = dwconv
        self.project_out = conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Channel attention and gated feed-forward, each normalised and residual. (B, C, H, W) -> same."""

    halo = 2  # two 3x3 convolutions, one after the other
    ffn: nn.Module

    def __init__(self, dim: int, attn: ChannelAttention) -> None:
        super().__init__()
        self.norm1 = PixelNorm(dim)
        self.attn = attn
        self.norm2 = PixelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = _channels_last(x)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def sums(self, x: Tensor, inside: Inside) -> tuple[Tensor, Tensor]:
        return self.attn.sums(self.norm1(x), inside)

    def context(self, *sums: Tensor) -> Tensor:
        return self.attn.context(*sums)

    def local(self, x: Tensor, matrix: Tensor) -> Tensor:
        x = x + self.attn.local(self.norm1(x), matrix)
        return x + self.ffn(self.norm2(x))


class RestormerBlock(TransformerBlock):
    """Restormer's block: both halves convolve each channel by itself."""

    def __init__(self, dim: int, heads: int, expansion: float) -> None:
        super().__init__(dim, RestormerAttention(dim, heads))
        hidden = int(dim * expansion)
        self.ffn = GatedFeedForward(dim, hidden, conv3x3(2 * hidden, 2 * hidden, groups=2 * hidden))


class BaseFeatureExtraction(TransformerBlock):
    """Base branch ("Lite Transformer" in the paper): long-range, low-frequency features. (B, C, H, W) -> same.

    The published code has channel attention behind a full convolution, not Lite Transformer's. Its feed-forward
    convolves in groups of two channels, not one.
    """

    ffn = property(lambda self: self.mlp)  # another name in published files

    def __init__(self, dim: int, num_heads: int, ffn_expansion_factor: float = 1.0, qkv_bias: bool = False) -> None:
        super().__init__(dim, BaseAttention(dim, num_heads))
        if qkv_bias:
            raise ValueError("qkv_bias must be False, as in every published network")
        hidden = int(dim * ffn_expansion_factor)
        self.mlp = GatedFeedForward(dim, hidden, PairConv2d(2 * hidden))


class Bottleneck(nn.Module):
    """1x1 up, depthwise 3x3 over reflected borders, 1x1 down, ReLU6 between. (B, I, H, W) -> (B, O, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 2) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.bottleneckBlock = nn.Sequential(
            conv1x1(in_channels, hidden),
            nn.ReLU6(inplace=True),
            ReflectionPad(1),
            nn.Conv2d(hidden, hidden, 3, groups=hidden, bias=False),
            nn.ReLU6(inplace=True),
            conv1x1(hidden, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneckBlock(x)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding in the dtype of its input. Autocast makes it float32 on a CPU, to no use, and copies twice."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Coupling(nn.Module):
    """Affine coupling: two feature maps change each other, by a sum and then by a gain and a sum."""

    halo = 2  # two 3x3 convolutions, one after the other

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta_phi = Bottleneck(channels, channels)
        self.theta_rho = Bottleneck(channels, channels)
        self.theta_eta = Bottleneck(channels, channels)

    def couple(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, C, H, W) twice -> both changed, stacked along channels, (B, 2C, H, W)."""
        second = second + self.theta_phi(first)
        gain = at_least_float32(self.theta_rho(second)).exp().to(second.dtype)  # nothing bounds the exponent
        return torch.cat([first * gain + self.theta_eta(second), second], dim=1)


class DetailNode(Coupling):
    """One node of the detail branch: channels are mixed, then two halves of C / 2 of them are coupled."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim // 2)
        self.shffleconv = nn.Conv2d(dim, dim, 1)  # the spelling is file format

    def forward(self, x: Tensor) -> Tensor:
        return self.couple(*self.shffleconv(x).chunk(2, dim=1))


class DetailFeatureExtraction(nn.Module):
    """Detail branch ("INN" in the paper): local, high-frequency features. (B, 64, H, W) -> same."""

    def __init__(self, num_layers: int = 3, dim: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(*(DetailNode(dim) for _ in range(num_layers)))
        self.halo = DetailNode.halo * num_layers

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_channels_last(x))


class PatchEmbedding(nn.Module):
    """3x3 convolution from the image to C channels."""

    halo = 1

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = conv3x3(in_channels, dim)

    def forward(self, image: Tensor) -> Tensor:
        shape = tuple(image.shape)
        if len(shape) != 4 or min(shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"images must be (B, C, H, W) with H and W at least {SMALLEST_SIDE}, got {shape}")
        return _channels_last(self.proj(image))


class PublishedNetwork(nn.Module):
    """The constructor of encoder and decoder, with the published arguments."""

    def __init__(
        self,
        inp_channels: int = 1,
        out_channels: int = 1,
        dim: int = 64,
        num_blocks: Sequence[int] = (4, 4),
        heads: Sequence[int] = (8, 8, 8),
        ffn_expansion_factor: float = 2,
        bias: bool = False,
        LayerNorm_type: str = "WithBias",
    ) -> None:
        super().__init__()
        if bias or LayerNorm_type != "WithBias":
            raise ValueError("bias must be False and LayerNorm_type 'WithBias', as in every published network")
        self.build(inp_channels, out_channels, dim, num_blocks, heads, ffn_expansion_factor)


class Restormer_Encoder(PublishedNetwork):
    """Image -> (base, detail, shallow): (B, 1, H, W) in [0, 1] -> three times (B, 64, H, W).

    `out_channels`, `num_blocks[1]` and `heads[1]` have no effect, as published; `heads[2]` is the base branch's.

    Raises:
        ValueError: not (B, C, H, W), or a side is shorter than 2.
    """

    def build(self, inp_channels, out_channels, dim, num_blocks, heads, growth) -> None:
        self.patch_embed = PatchEmbedding(inp_channels, dim)
        self.encoder_level1 = nn.Sequential(*(RestormerBlock(dim, heads[0], growth) for _ in range(num_blocks[0])))
        self.baseFeature = BaseFeatureExtraction(dim, heads[2])
        self.detailFeature = DetailFeatureExtraction(dim=dim)

    def forward(self, inp_img: Tensor) -> Features:
        shallow = self.encoder_level1(self.patch_embed(inp_img))
        return Features(self.baseFeature(shallow), self.detailFeature(shallow), shallow)


class Restormer_Decoder(PublishedNetwork):
    """(image or None, base, detail) -> (fused, reduced): (B, 1, H, W) in [0, 1] and (B, 64, H, W).

    An image is added before the sigmoid. `reduced` is the merged feature before the blocks, as published.
    `inp_channels`, `num_blocks[0]` and `heads[0]` have no effect, as published.
    """

    def build(self, inp_channels, out_channels, dim, num_blocks, heads, growth) -> None:
        self.reduce_channel = conv1x1(2 * dim, dim)
        self.encoder_level2 = nn.Sequential(*(RestormerBlock(dim, heads[1], growth) for _ in range(num_blocks[1])))
        self.output = nn.Sequential(conv3x3(dim, dim // 2), nn.LeakyReLU(0.01), conv3x3(dim // 2, out_channels))
        self.output.halo = 2

    def forward(self, inp_img: Tensor | None, base_feature: Tensor, detail_feature: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.reduce(base_feature, detail_feature)
        return self.add_image(inp_img, self.output(self.encoder_level2(reduced))), reduced

    def reduce(self, base: Tensor, detail: Tensor) -> Tensor:
        return self.reduce_channel(torch.cat([base, detail], dim=1))

    @staticmethod
    def add_image(image: Tensor | None, residual: Tensor) -> Tensor:
        residual = at_least_float32(residual)
        return torch.sigmoid(residual if image is None else residual + image)


class CDDFuse(nn.Module):
    """The whole system: one encoder for both modalities, two fusion layers, one decoder."""

    published_networks = {  # name in a published checkpoint -> attribute
        "DIDF_Encoder": "encoder", "DIDF_Decoder": "decoder",
        "BaseFuseLayer": "base_fusion", "DetailFuseLayer": "detail_fusion",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Restormer_Encoder()
        self.decoder = Restormer_Decoder()
        self.base_fusion = BaseFeatureExtraction(dim=64, num_heads=8)
        self.detail_fusion = DetailFeatureExtraction(num_layers=1)

    def forward(self, vis: Tensor, ir: Tensor, skip: str = "vis") -> Tensor:
        """The same as `fuse`, so that the system may be wrapped: DataParallel, torch.compile."""
        return self.fuse(vis, ir, skip)

    def fuse(self, vis: Tensor, ir: Tensor, skip: str = "vis") -> Tensor:
        """Fuses two aligned images of one size: (B, 1, H, W) in [0, 1] each -> the same shape and range.

        Args:
            vis, ir: visible and infrared image; or MRI and CT, PET or SPECT.
            skip: what the decoder adds before its sigmoid: "vis" (published for infrared-visible images), "sum" of both
                (for medical images with infrared-visible weights) or "none" (for medical weights).

        Raises:
            ValueError: the shapes differ, a side is shorter than 2, or `skip` is unknown.
        """
        check_sources(vis, ir)
        base, detail, _ = self.encoder(torch.cat([vis, ir]))
        return self.decode_fused(vis, ir, base, detail, skip)

    def decode_fused(self, vis: Tensor, ir: Tensor, base: Tensor, detail: Tensor, skip: str = "vis") -> Tensor:
        """The second half of `fuse`: features of vis and ir, stacked along the batch (2B, 64, H, W) -> fused."""
        base, detail = self.base_fusion(sum_of_both(base)), self.detail_fusion(sum_of_both(detail))
        return self.decoder(decoder_image(vis, ir, skip), base, detail)[0]


def sum_of_both(features: Tensor) -> Tensor:
    """The sum over the modalities, which are stacked along the batch: (2B, C, H, W) -> (B, C, H, W)."""
    # Not chunk(2): in an export it fixes the batch, being a number of pieces that depends on a size.
    return torch.add(*features.unflatten(0, (2, -1)))


def check_sources(vis: Tensor, ir: Tensor) -> None:
    """Refuses, by a ValueError, two images that do not have one shape."""
    if vis.shape != ir.shape:
        raise ValueError(f"vis and ir must have one shape, got {tuple(vis.shape)} and {tuple(ir.shape)}")


def decoder_image(vis: Tensor, ir: Tensor, skip: str) -> Tensor | None:
    """What a decoder adds before its sigmoid, by one of `SKIPS`, else a ValueError: an image like vis, or none."""
    if skip not in SKIPS:
        raise ValueError(f"skip must be one of {', '.join(SKIPS)}, got {skip!r}")
    if skip == "none":
        return None
    return vis if skip == "vis" else vis + ir


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
