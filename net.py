"""CDDFuse in one file: the four published networks and the module that holds them. Needs torch alone.

CDDFuse (Zhao et al., "CDDFuse: Correlation-Driven Dual-Branch Feature Decomposition for Multi-Modality Image
Fusion", CVPR 2023) splits an image into low-frequency *base* features (shared between modalities) and
high-frequency *detail* features (particular to each), fuses the two kinds apart, and decodes one image.

    model = CDDFuse()
    fused = model.fuse(vis, ir)  # (B, 1, H, W) each, values in [0, 1]

Class names, constructor arguments, call signatures and attribute names of the four networks are those of the
published code, typos included: code elsewhere imports the names, and published checkpoints hold the attribute
names as keys. What is inside was written for this project from the paper and the published tensor shapes.

Shapes: B batch, C = 64 channels, H and W any size from 2 x 2 up, heads G = 8, d = C / G channels a head.
Feature maps are (B, C, H, W) in channels-last memory, which makes every layer norm, 1x1 convolution and
attention product below a plain matrix product over pixels, without a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BaseFeatureExtraction",
    "CDDFuse",
    "DetailFeatureExtraction",
    "Features",
    "Restormer_Decoder",
    "Restormer_Encoder",
    "strips",
]

SMALLEST_SIDE = 2  # the detail branch pads by reflection, which needs a neighbour to reflect
SKIPS = ("vis", "sum", "none")


class Features(NamedTuple):
    """What the encoder makes of one image, each (B, 64, H, W)."""

    base: Tensor
    detail: Tensor
    shallow: Tensor


# ---------------------------------------------------------------------------------------------------------
# Strips: the same result from pieces that fit into a processor's cache
# ---------------------------------------------------------------------------------------------------------

_strip_pixels: ContextVar[int] = ContextVar("strip_pixels", default=0)


@contextlib.contextmanager
def strips(pixels: int) -> Iterator[None]:
    """Within this context images are worked on in strips of whole rows of about so many pixels.

    The result is that of the whole image up to rounding: convolutions see the rows beside their strip, and
    attention gathers its sums over all strips before it is applied. It takes less memory, and on a CPU less
    time, where a strip stays in the cache and a whole image does not. 0 means no strips. For inference.
    """
    token = _strip_pixels.set(pixels)
    try:
        yield
    finally:
        _strip_pixels.reset(token)


def row_ranges(x: Tensor, fewest: int = 1) -> list[tuple[int, int]]:
    """The strips of an image, as (first row, row after the last), of at least `fewest` rows but for the last one."""
    batch, _, height, width = x.shape
    if not _strip_pixels.get():
        return [(0, height)]  # without arithmetic: torch.export calls this with a height that is not a number
    rows = max(fewest, _strip_pixels.get() // (batch * width))
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def _in_strips(function: Callable[..., Tensor], *maps: Tensor, halo: int) -> Iterator[Tensor]:
    """function(*maps) in pieces along H, for a function of which a row depends on at most `halo` rows beside it."""
    for top, bottom in row_ranges(maps[0]):
        first = max(top - halo, 0)
        piece = function(*(x[:, :, first : bottom + halo] for x in maps))
        # Rows near an inner edge have seen padding in place of their neighbours; they belong to another piece.
        yield piece[:, :, top - first : bottom - first]


def strip_by_strip(function: Callable[..., Tensor], *maps: Tensor, halo: int) -> Tensor:
    """function(*maps), in strips where `strips` asks for them.

    Args:
        function: maps -> (B, C', H, W), where a row depends on at most `halo` rows beside it.
        maps: (B, C, H, W) each, of one height.
        halo: as above.
    """
    pieces = list(_in_strips(function, *maps, halo=halo))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


# ---------------------------------------------------------------------------------------------------------
# Channel attention: heads attend over channels, and the sums run over all pixels of the image
# ---------------------------------------------------------------------------------------------------------


def attention_sums(qk: Tensor) -> tuple[Tensor, Tensor]:
    """The only quantities of channel attention that span the image: plain sums over pixels.

    Being sums, they may be gathered tile by tile; `attention_map` then gives the map of the whole image.

    Args:
        qk: queries and keys of every pixel, (B, H*W, 2C).

    Returns:
        q^T k, (B, C, C), and the squared norms of q and of k over pixels, (B, 2C); at least float32.
    """
    q, k = qk.chunk(2, dim=2)
    # All C x C products in one matrix product, though only the diagonal blocks (one a head) are used: one
    # well-shaped product is faster than G thin ones.
    products = _at_least_float32(q.transpose(1, 2) @ k)
    # torch accumulates the norm in float32 at least; asking for a float32 result would copy the whole of qk.
    norms = _at_least_float32(torch.linalg.vector_norm(qk, dim=1))
    return products, norms.square()


def attention_map(products: Tensor, squares: Tensor, temperature: Tensor) -> Tensor:
    """Softmax attention between the channels of each head, from the sums of `attention_sums`.

    Args:
        products: q^T k, (B, C, C).
        squares: squared norms of q and k, (B, 2C).
        temperature: learned scale a head, (G, 1, 1).

    Returns:
        (B, G, d, d), rows sum to one. Queries and keys are normalised over pixels, so entries before the
        softmax are cosines times the temperature.
    """
    heads = temperature.shape[0]
    q_norm, k_norm = squares.sqrt().clamp_min(1e-12).unflatten(1, (2, heads, -1)).unbind(1)  # (B, G, d)
    blocks = products.unflatten(1, (heads, -1)).unflatten(3, (heads, -1))  # (B, G, d, G, d)
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (B, G, d, d): a head with itself
    cosines = blocks / (q_norm[..., :, None] * k_norm[..., None, :])
    return torch.softmax(cosines * temperature, dim=-1)


def attend(make_qkv: Callable[[Tensor], Tensor], x: Tensor, temperature: Tensor, projection: Tensor) -> Tensor:
    """Channel attention followed by its output projection, as one matrix product a pixel.

    Args:
        make_qkv: x -> queries, keys, values stacked along channels, (B, 3C, H, W); a row of the result may
            depend on one row beside it.
        x: (B, C, H, W).
        temperature: (G, 1, 1).
        projection: weight of the bias-free 1x1 output convolution, (C, C, 1, 1).

    Returns:
        (B, C, H, W).
    """
    values, sums = [], []
    for qkv in _in_strips(make_qkv, x, halo=1):
        channels = qkv.shape[1] // 3
        # Pixels first: (B, h * W, 3C), a view in channels-last.
        qk, v = qkv.permute(0, 2, 3, 1).flatten(1, 2).split([2 * channels, channels], dim=2)
        sums.append(attention_sums(qk))
        values.append(v.contiguous() if _strip_pixels.get() else v)  # a view would keep q and k in memory
    attention = attention_map(*map(sum, zip(*sums, strict=True)), temperature)  # (B, G, d, d)
    # project(attention @ v) = (project . attention) @ v: the two maps become one C x C matrix an image.
    rows = projection.flatten(1).unflatten(1, attention.shape[1:3]).to(attention.dtype)  # (C, G, d)
    matrix = torch.einsum("ogi,bgij->bgjo", rows, attention).flatten(1, 2)  # (B, C in, C out)
    out = [v @ matrix.to(v.dtype) for v in values]  # each (B, h * W, C)
    whole = out[0] if len(out) == 1 else torch.cat(out, dim=1)
    return whole.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def conv3x3(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False)


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseAttention(nn.Module):
    """Restormer's attention (MDTA): 1x1, depthwise 3x3, channel attention, 1x1. (B, C, H, W) -> same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = conv1x1(dim, 3 * dim)
        self.qkv_dwconv = conv3x3(3 * dim, 3 * dim, groups=3 * dim)
        self.project_out = conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return attend(lambda x: self.qkv_dwconv(self.qkv(x)), x, self.temperature, self.project_out.weight)


class FullAttention(nn.Module):
    """The base block's attention: 1x1, full 3x3, channel attention, 1x1. (B, C, H, W) -> same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv1 = conv1x1(dim, 3 * dim)
        self.qkv2 = conv3x3(3 * dim, 3 * dim)
        self.proj = conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Nothing stands between the two convolutions, so they are one 3x3 convolution from C to 3C: a third
        # of the work, the same function and, through this product, the same gradient.
        weight = torch.einsum("omyx,mi->oiyx", self.qkv2.weight, self.qkv1.weight.flatten(1))
        weight = _channels_last(weight)
        return attend(lambda x: F.conv2d(x, weight, padding=1), x, self.scale, self.proj.weight)


class GatedFeedForward(nn.Module):
    """1x1 up, grouped 3x3, GELU(first half) * second half, 1x1 down. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.project_in = conv1x1(dim, 2 * hidden)
        self.dwconv = conv3x3(2 * hidden, 2 * hidden, groups=groups)
        self.project_out = conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class RestormerBlock(nn.Module):
    """Attention and gated feed-forward (GDFN, depthwise), each normalised and residual. (B, C, H, W) -> same."""

    def __init__(self, dim: int, heads: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.norm1 = PixelNorm(dim)
        self.attn = DepthwiseAttention(dim, heads)
        self.norm2 = PixelNorm(dim)
        self.ffn = GatedFeedForward(dim, hidden, groups=2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return strip_by_strip(lambda x: x + self.ffn(self.norm2(x)), x, halo=1)


class BaseFeatureExtraction(nn.Module):
    """Base branch ("Lite Transformer" in the paper): long-range, low-frequency features. (B, C, H, W) -> same.

    In the published code it is channel attention behind a full convolution, not the long-short range
    attention of Lite Transformer. Its feed-forward convolves in groups of two channels, not one.
    """

    def __init__(self, dim: int, num_heads: int, ffn_expansion_factor: float = 1.0, qkv_bias: bool = False) -> None:
        super().__init__()
        _check_published(qkv_bias=(qkv_bias, False))
        hidden = int(dim * ffn_expansion_factor)
        self.norm1 = PixelNorm(dim)
        self.attn = FullAttention(dim, num_heads)
        self.norm2 = PixelNorm(dim)
        self.mlp = GatedFeedForward(dim, hidden, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = _channels_last(x)
        x = x + self.attn(self.norm1(x))
        return strip_by_strip(lambda x: x + self.mlp(self.norm2(x)), x, halo=1)


class Bottleneck(nn.Module):
    """1x1 up, depthwise 3x3 over reflected borders, 1x1 down, ReLU6 between. (B, I, H, W) -> (B, O, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 2) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.bottleneckBlock = nn.Sequential(
            conv1x1(in_channels, hidden),
            nn.ReLU6(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(hidden, hidden, 3, groups=hidden, bias=False),
            nn.ReLU6(),
            conv1x1(hidden, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneckBlock(x)


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
        first, second = _channels_last(first), _channels_last(second)  # once here, not in each bottleneck
        second = second + self.theta_phi(first)
        # The exponent is not bounded by anything, so it is taken in at least float32.
        gain = _at_least_float32(self.theta_rho(second)).exp().to(second.dtype)
        first = first * gain + self.theta_eta(second)
        return torch.cat([first, second], dim=1)


class DetailNode(Coupling):
    """One node of the detail branch: channels are mixed, then two halves of C / 2 of them are coupled."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim // 2)
        self.shffleconv = nn.Conv2d(dim, dim, 1)  # the spelling is file format

    def forward(self, x: Tensor) -> Tensor:
        return strip_by_strip(lambda x: self.couple(*self.shffleconv(x).chunk(2, dim=1)), x, halo=self.halo)


class DetailFeatureExtraction(nn.Module):
    """Detail branch ("INN" in the paper): local, high-frequency features. (B, 64, H, W) -> same."""

    def __init__(self, num_layers: int = 3, dim: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(*(DetailNode(dim) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x)
        return self.net(_channels_last(x))


class PatchEmbedding(nn.Module):
    """3x3 convolution from the image to C channels: (B, I, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = conv3x3(in_channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ShallowEncoder(nn.Module):
    """What an encoder starts with: patch embedding and Restormer blocks, under their published names."""

    def __init__(self, in_channels: int, dim: int, blocks: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(in_channels, dim)
        self.encoder_level1 = nn.Sequential(*(RestormerBlock(dim, heads, expansion) for _ in range(blocks)))

    def shallow(self, image: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H, W)."""
        _check_size(image)
        return self.encoder_level1(_channels_last(self.patch_embed(image)))


# ---------------------------------------------------------------------------------------------------------
# The published networks, and the system
# ---------------------------------------------------------------------------------------------------------


class Restormer_Encoder(ShallowEncoder):
    """Image -> (base, detail, shallow): (B, 1, H, W) in [0, 1] -> three times (B, 64, H, W).

    The arguments are the published ones; `out_channels`, `num_blocks[1]` and `heads[1]` have no effect there
    or here, and `heads[2]` is the base branch's.
    """

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
        super().__init__(inp_channels, dim, num_blocks[0], heads[0], ffn_expansion_factor)
        _check_published(bias=(bias, False), LayerNorm_type=(LayerNorm_type, "WithBias"))
        self.baseFeature = BaseFeatureExtraction(dim, heads[2])
        self.detailFeature = DetailFeatureExtraction(dim=dim)

    def forward(self, inp_img: Tensor) -> Features:
        shallow = self.shallow(inp_img)
        return Features(self.baseFeature(shallow), self.detailFeature(shallow), shallow)


class Restormer_Decoder(nn.Module):
    """(image or None, base, detail) -> (fused, reduced): (B, 1, H, W) in [0, 1] and (B, 64, H, W).

    An image is added before the sigmoid. `reduced` is the merged feature before the blocks, as published.
    Of the published arguments `inp_channels`, `num_blocks[0]` and `heads[0]` have no effect.
    """

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
        _check_published(bias=(bias, False), LayerNorm_type=(LayerNorm_type, "WithBias"))
        self.reduce_channel = conv1x1(2 * dim, dim)
        blocks = (RestormerBlock(dim, heads[1], ffn_expansion_factor) for _ in range(num_blocks[1]))
        self.encoder_level2 = nn.Sequential(*blocks)
        self.output = nn.Sequential(conv3x3(dim, dim // 2), nn.LeakyReLU(0.01), conv3x3(dim // 2, out_channels))

    def forward(self, inp_img: Tensor | None, base_feature: Tensor, detail_feature: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.reduce_channel(torch.cat([_channels_last(base_feature), _channels_last(detail_feature)], dim=1))
        residual = _at_least_float32(strip_by_strip(self.output, self.encoder_level2(reduced), halo=2))
        return torch.sigmoid(residual if inp_img is None else residual + inp_img), reduced


class CDDFuse(nn.Module):
    """The whole system: one encoder for both modalities, two fusion layers, one decoder."""

    # Name in a published checkpoint -> attribute.
    published_networks = {
        "DIDF_Encoder": "encoder",
        "DIDF_Decoder": "decoder",
        "BaseFuseLayer": "base_fusion",
        "DetailFuseLayer": "detail_fusion",
    }

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Restormer_Encoder()
        self.decoder = Restormer_Decoder()
        self.base_fusion = BaseFeatureExtraction(dim=64, num_heads=8)
        self.detail_fusion = DetailFeatureExtraction(num_layers=1)

    def encode(self, image: Tensor) -> Features:
        """(B, 1, H, W) in [0, 1] -> base, detail and shallow features, each (B, 64, H, W)."""
        return self.encoder(image)

    def reconstruct(self, image: Tensor, with_image: bool = True) -> Tensor:
        """Encodes and decodes one image: (B, 1, H, W) in [0, 1] -> the same shape and range.

        Args:
            image: the image.
            with_image: whether the decoder is given the image itself, as the published training does.
        """
        base, detail, _ = self.encoder(image)
        return self.decoder(image if with_image else None, base, detail)[0]

    def fuse(self, vis: Tensor, ir: Tensor, skip: str = "vis") -> Tensor:
        """Fuses two aligned images of one size: (B, 1, H, W) in [0, 1] each -> the same shape and range.

        Args:
            vis: visible image, or MRI.
            ir: infrared image, or CT, PET, SPECT.
            skip: what the decoder adds before its sigmoid: "vis" (published for infrared-visible images),
                "sum" of both (published for medical images with infrared-visible weights) or "none"
                (published for medical weights).

        Raises:
            ValueError: the shapes differ, a side is shorter than 2, or `skip` is unknown.
        """
        check_sources(vis, ir)
        # One pass over both modalities: the encoder is shared, and the larger batch keeps the machine busy.
        base, detail, _ = self.encoder(torch.cat([vis, ir]))
        return self.decode_fused(vis, ir, base, detail, skip)

    def decode_fused(self, vis: Tensor, ir: Tensor, base: Tensor, detail: Tensor, skip: str = "vis") -> Tensor:
        """The second half of `fuse`: features of vis and ir, stacked along the batch (2B, 64, H, W) -> fused."""
        image = decoder_image(vis, ir, skip)
        # Not chunk(2): in an export it fixes the batch, being a number of pieces that depends on a size.
        base = self.base_fusion(torch.add(*base.unflatten(0, (2, -1))))
        detail = self.detail_fusion(torch.add(*detail.unflatten(0, (2, -1))))
        return self.decoder(image, base, detail)[0]


def check_sources(vis: Tensor, ir: Tensor) -> None:
    """Refuses, by a ValueError, two images that do not have one shape."""
    if vis.shape != ir.shape:
        raise ValueError(f"vis and ir must have one shape, got {tuple(vis.shape)} and {tuple(ir.shape)}")


def decoder_image(vis: Tensor, ir: Tensor, skip: str) -> Tensor | None:
    """What a decoder adds before its sigmoid: an image of the shape of vis and ir, or none.

    Raises:
        ValueError: `skip` is not one of `SKIPS`.
    """
    if skip not in SKIPS:
        raise ValueError(f"skip must be one of {', '.join(SKIPS)}, got {skip!r}")
    if skip == "none":
        return None
    return vis if skip == "vis" else vis + ir


def _check_published(**arguments: tuple[object, object]) -> None:
    """Refuses arguments that the published classes take but no published network uses: name=(given, published)."""
    for name, (given, published) in arguments.items():
        if given != published:
            raise ValueError(f"{name} must be {published!r}, as in every published network, got {given!r}")


def _check_size(x: Tensor) -> None:
    if x.ndim != 4 or min(x.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(f"images must be (B, C, H, W) with H and W at least {SMALLEST_SIDE}, got {tuple(x.shape)}")
