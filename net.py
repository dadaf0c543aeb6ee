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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

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
# Strips: the same result from pieces, for images that fit neither a processor's cache nor memory
# ---------------------------------------------------------------------------------------------------------


class Workspace:
    """Where feature maps live between two sweeps over an image. This one keeps them in memory.

    A sub-class may put them elsewhere: `fetch` then brings a piece of a map to where it is worked on.
    """

    def new_map(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An empty map (B, C, H, W) in channels-last memory, of the dtype of `like`."""
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

    def spare_map(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """The same for a map that saves time only; None where there is no room for it."""
        return self.new_map(shape, like)

    def fetch(self, piece: Tensor) -> Tensor:
        return piece

    def row_done(self) -> None:
        """Called whenever a row of pieces has been worked on."""


class _Setting(NamedTuple):
    pixels: int
    workspace: Workspace


_WHOLE_IMAGES = _Setting(0, Workspace())
_setting: ContextVar[_Setting] = ContextVar("strips", default=_WHOLE_IMAGES)


def _current() -> _Setting:
    # torch.compile cannot trace a ContextVar; what is compiled or exported is never worked on in pieces.
    return _WHOLE_IMAGES if torch.compiler.is_compiling() else _setting.get()


def fetched(whole: Tensor) -> Tensor:
    """A small map, or numbers made of a large one, where they are worked on; see `Workspace`."""
    return _current().workspace.fetch(whole)


@contextlib.contextmanager
def strips(pixels: int, workspace: Workspace | None = None) -> Iterator[None]:
    """Within this context images are worked on in pieces of about so many pixels.

    A piece is a strip of whole rows, or a tile where rows are long. The result is that of the whole image up to
    rounding: convolutions see the pixels beside their piece, and attention gathers its sums over all pieces before
    it is applied. Maps are written over where nobody needs them any more. So it takes less memory, and on a CPU less
    time, where a piece stays in the cache and a whole image does not. 0 means no pieces. Without gradients.
    """
    token = _setting.set(_Setting(pixels, workspace or Workspace()))
    try:
        yield
    finally:
        _setting.reset(token)


def row_ranges(x: Tensor, fewest: int = 1) -> list[tuple[int, int]]:
    """The strips of whole rows, as (top, bottom), in which a system may work on `x`, (B, C, H, W).

    Each has at least `fewest` rows, but for the last one.
    """
    batch, _, height, width = x.shape
    pixels = _current().pixels
    if not pixels:
        return [(0, height)]  # without arithmetic: torch.export calls this with a height that is not a number
    rows = max(fewest, pixels // (batch * width))
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def _grid(x: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of rows and of columns that cut `x` into pieces: as square as it takes to have little halo."""
    batch, _, height, width = x.shape
    pixels = _current().pixels
    if not pixels or batch * height * width <= pixels:
        return [(0, height)], [(0, width)]
    pixels = max(1, pixels // batch)
    rows = max(1, math.isqrt(pixels), pixels // width)
    return _cut(height, rows), _cut(width, max(1, pixels // rows))


def _cut(length: int, most: int) -> list[tuple[int, int]]:
    parts = -(-length // most)
    edges = [length * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


# What can be done piece by piece: a function, its maps, and how far beside a pixel of a map it looks.
Part = tuple[Callable[..., Tensor], tuple[Tensor, ...], int]


def _in_pieces(
    function: Callable[..., Any], maps: Sequence[Tensor], halo: int, into: Tensor | None = None
) -> Iterator[tuple[tuple[slice, slice], Any]]:
    """function(*maps), a map or a tuple of maps, in pieces, each with its rows and columns.

    A piece may be written to its place in `into` as soon as it is there, even where `into` is one of the maps.
    """
    workspace = _current().workspace
    row_cuts, column_cuts = _grid(maps[0])
    if len(row_cuts) == len(column_cuts) == 1:
        yield (slice(None), slice(None)), function(*(workspace.fetch(x) for x in maps))
        return
    above: list[Tensor | None] = [None] * len(maps)  # rows of a map as they were before they were written over
    for top, bottom in row_cuts:
        first = max(top - halo, 0)
        bands = []
        for i, x in enumerate(maps):
            band = x[:, :, first : bottom + halo]
            if halo and into is not None and x.untyped_storage().data_ptr() == into.untyped_storage().data_ptr():
                band = band.clone(memory_format=torch.channels_last)
                if above[i] is not None:
                    band[:, :, : top - first] = above[i]
                above[i] = band[:, :, max(bottom - halo, 0) - first : bottom - first].clone()
            bands.append(band)
        for left, right in column_cuts:
            start = max(left - halo, 0)
            piece = function(*(workspace.fetch(band[..., start : right + halo]) for band in bands))
            # Pixels near an inner edge have seen padding in place of their neighbours; they belong to another piece.
            inner = (..., slice(top - first, bottom - first), slice(left - start, right - start))
            piece = tuple(x[inner] for x in piece) if isinstance(piece, tuple) else piece[inner]
            yield (slice(top, bottom), slice(left, right)), piece
        del bands, band
        workspace.row_done()


def side_by_side(merge: Callable[..., Tensor], *parts: Part, into: Tensor | None = None) -> Tensor:
    """merge(function(*maps), ...) of the parts, in pieces where `strips` asks for them.

    Args:
        merge: one result of each part -> (B, C', H, W), pixel by pixel.
        parts: (function, maps, halo) each, all maps of one batch, height and width; see `strip_by_strip`.
        into: where the result may be written, one of the maps for instance; take the result from the return value.
    """
    height, width = parts[0][1][0].shape[2:]
    out = into
    for found in zip(*(_in_pieces(*part, into) for part in parts), strict=True):
        piece = merge(*(x for _, x in found))
        if piece.shape[2:] == (height, width):
            return piece
        if out is None:
            out = _current().workspace.new_map((*piece.shape[:2], height, width), piece)
        rows, columns = found[0][0]
        out[:, :, rows, columns] = piece
    return out


def strip_by_strip(function: Callable[..., Tensor], *maps: Tensor, halo: int, into: Tensor | None = None) -> Tensor:
    """function(*maps), in pieces where `strips` asks for them.

    Args:
        function: maps -> (B, C', H, W), where a pixel depends on pixels at most `halo` rows and columns beside it.
        maps: (B, C, H, W) each.
        halo: as above.
        into: as for `side_by_side`.
    """
    return side_by_side(lambda x: x, (function, maps, halo), into=into)


# ---------------------------------------------------------------------------------------------------------
# Channel attention: heads attend over channels, and the sums run over all pixels of the image
# ---------------------------------------------------------------------------------------------------------


def attention_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The only quantities of channel attention that span the image: plain sums over pixels.

    Being sums, they may be gathered tile by tile; `attention_map` then gives the map of the whole image.

    Args:
        q, k: queries and keys of every pixel, (B, H*W, C) each.

    Returns:
        q^T k, (B, C, C), and the squared norms of q and of k over pixels, (B, 2C); at least float32.
    """
    # All C x C products in one matrix product, though only the diagonal blocks (one a head) are used: one
    # well-shaped product is faster than G thin ones.
    products = _at_least_float32(q.transpose(1, 2) @ k)
    # The squares of half-precision numbers are added up in float32; vector_norm takes several times as long.
    exact = torch.promote_types(q.dtype, torch.float32)
    return products, torch.cat([x.square().sum(dim=1, dtype=exact) for x in (q, k)], dim=1)


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
    # A root has an infinite slope at 0, where the published form, F.normalize, has none. Black images lead there.
    norms = torch.where(squares > 0, squares, 1e-24).sqrt().clamp_min(1e-12)
    q_norm, k_norm = norms.unflatten(1, (2, heads, -1)).unbind(1)  # (B, G, d)
    blocks = products.unflatten(1, (heads, -1)).unflatten(3, (heads, -1))  # (B, G, d, G, d)
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (B, G, d, d): a head with itself
    cosines = blocks / (q_norm[..., :, None] * k_norm[..., None, :])
    return torch.softmax(cosines * temperature, dim=-1)


class Attended(NamedTuple):
    """Channel attention whose sums have been gathered, so that what is left of it is a function of each pixel.

    matrix: attention and output projection in one, (B, C in, C out).
    values: (B, C, H, W), or None where they are made again of the pixels around, by `make_values`.
    """

    matrix: Tensor
    values: Tensor | None
    make_values: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        """The attention's output at a piece of the image: (B, C, h, w), and values if they were kept -> same."""
        v = self.make_values(x) if values is None else values
        return (_pixels(v) @ self.matrix.to(v.dtype)).unflatten(1, v.shape[2:]).permute(0, 3, 1, 2)


def attend(
    make_qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    make_values: Callable[[Tensor], Tensor],
    x: Tensor,
    temperature: Tensor,
    projection: Tensor,
) -> Attended:
    """Gathers the sums of channel attention over an image.

    Args:
        make_qkv: x -> queries, keys and values, (B, C, H, W) each; a pixel of them may depend on the pixels next to
            it. Three maps and not slices of one: those would be copied for the products, and put together again in
            the backward pass.
        make_values: x -> the last of the same.
        x: (B, C, H, W).
        temperature: (G, 1, 1).
        projection: weight of the bias-free 1x1 output convolution, (C, C, 1, 1).
    """
    values: Tensor | None = None
    sums: list[Tensor] = []
    for (rows, columns), (q, k, v) in _in_pieces(make_qkv, (x,), halo=1):
        part = attention_sums(_pixels(q), _pixels(k))
        if v.shape[2:] == x.shape[2:]:
            sums, values = list(part), v
            break
        if not sums:
            sums = [torch.zeros_like(s, dtype=torch.float64) for s in part]  # thousands of pieces may follow
            values = _current().workspace.spare_map((*v.shape[:2], *x.shape[2:]), v)
        for total, s in zip(sums, part, strict=True):
            total += s
        if values is not None:
            values[:, :, rows, columns] = v
    attention = attention_map(*sums, temperature)  # (B, G, d, d)
    # project(attention @ v) = (project . attention) @ v: the two maps become one C x C matrix an image.
    by_head = projection.flatten(1).unflatten(1, attention.shape[1:3]).to(attention.dtype)  # (C, G, d)
    matrix = torch.einsum("ogi,bgij->bgjo", by_head, attention).flatten(1, 2)  # (B, C in, C out)
    return Attended(matrix, values, make_values)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), a view in channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def conv3x3(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False)


def _up_and_group(x: Tensor, up: Tensor, grouped: Tensor) -> Tensor:
    """1x1 convolution, then a 3x3 one in groups: (B, I, H, W) -> (B, O, H, W).

    Args:
        x: as above.
        up: (O, I, 1, 1).
        grouped: (O, n, 3, 3) for groups of n channels.
    """
    size = grouped.shape[1]
    if size == 1:
        return F.conv2d(F.conv2d(x, up), grouped, padding=1, groups=len(grouped))
    # Libraries are slow on small groups, above all backwards, and fast on single channels: so n depthwise convolutions,
    # of the map with the channels of each group moved on by 0 to n - 1 places. To move them is up to the 1x1 weights.
    up, grouped = up.unflatten(0, (-1, size)), grouped.unflatten(0, (-1, size))
    terms = []
    for shift in range(size):
        own = grouped.roll(-shift, 2).diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2).flatten(0, 1)[:, None]
        terms.append(_up_and_group(x, up.roll(-shift, 1).flatten(0, 1), own))
    return sum(terms[1:], start=terms[0])


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

    def forward(self, norm: PixelNorm, x: Tensor) -> Attended:
        weights = list(zip(self.qkv.weight.chunk(3), self.qkv_dwconv.weight.chunk(3), strict=True))

        def make_qkv(x: Tensor) -> tuple[Tensor, ...]:
            x = norm(x)
            return tuple(_up_and_group(x, *each) for each in weights)

        def make_values(x: Tensor) -> Tensor:
            return _up_and_group(norm(x), *weights[2])

        return attend(make_qkv, make_values, x, self.temperature, self.project_out.weight)


class FullAttention(nn.Module):
    """The base block's attention: 1x1, full 3x3, channel attention, 1x1. (B, C, H, W) -> same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv1 = conv1x1(dim, 3 * dim)
        self.qkv2 = conv3x3(3 * dim, 3 * dim)
        self.proj = conv1x1(dim, dim)

    def forward(self, norm: PixelNorm, x: Tensor) -> Attended:
        # Nothing stands between the two convolutions, so they are one 3x3 convolution from C to 3C: a third
        # of the work, the same function and, through this product, the same gradient.
        weight = torch.einsum("omyx,mi->oiyx", self.qkv2.weight, self.qkv1.weight.flatten(1))
        weights = _channels_last(weight).chunk(3)

        def make_qkv(x: Tensor) -> tuple[Tensor, ...]:
            x = norm(x)
            return tuple(F.conv2d(x, each, padding=1) for each in weights)

        def make_values(x: Tensor) -> Tensor:
            return F.conv2d(norm(x), weights[2], padding=1)

        return attend(make_qkv, make_values, x, self.scale, self.proj.weight)


class GatedFeedForward(nn.Module):
    """1x1 up, grouped 3x3, GELU(first half) * second half, 1x1 down. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.project_in = conv1x1(dim, 2 * hidden)
        self.dwconv = conv3x3(2 * hidden, 2 * hidden, groups=groups)
        self.project_out = conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Two maps and not the halves of one, for the reason that `attend` gives.
        weights = zip(self.project_in.weight.chunk(2), self.dwconv.weight.chunk(2), strict=True)
        gate, value = (_up_and_group(x, *each) for each in weights)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Attention and gated feed-forward, each normalised and residual. (B, C, H, W) -> same."""

    norm1: PixelNorm
    attn: nn.Module
    norm2: PixelNorm

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward, which sub-classes hold under its published name."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> Part:
        """Gathers what spans the image: (B, C, H, W) -> the rest, which can be done piece by piece."""
        attention: Attended = self.attn(self.norm1, x)

        def rest(x: Tensor, *values: Tensor) -> Tensor:
            x = x + attention(x, *values)
            return x + self.feed_forward(self.norm2(x))

        return (rest, (x,), 2) if attention.values is None else (rest, (x, attention.values), 1)

    def forward(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        return side_by_side(lambda x: x, self.prepare(_channels_last(x)), into=into)


class RestormerBlock(TransformerBlock):
    """Restormer's block: depthwise attention, and a feed-forward (GDFN) with a depthwise convolution."""

    def __init__(self, dim: int, heads: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.norm1 = PixelNorm(dim)
        self.attn = DepthwiseAttention(dim, heads)
        self.norm2 = PixelNorm(dim)
        self.ffn = GatedFeedForward(dim, hidden, groups=2 * hidden)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def in_turn(blocks: Iterable[TransformerBlock], x: Tensor, into: Tensor | None = None) -> Tensor:
    """Blocks one after the other, each written over the one before: (B, C, H, W) -> same."""
    for block in blocks:
        x = into = block(x, into)
    return x


class BaseFeatureExtraction(TransformerBlock):
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

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding in the dtype of its input. Autocast makes it float32 on a CPU, to no use, and copies twice."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


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
        return self.couple(*self.shffleconv(x).chunk(2, dim=1))


class DetailFeatureExtraction(nn.Module):
    """Detail branch ("INN" in the paper): local, high-frequency features. (B, 64, H, W) -> same."""

    def __init__(self, num_layers: int = 3, dim: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(*(DetailNode(dim) for _ in range(num_layers)))

    def prepare(self, x: Tensor) -> Part:
        """All nodes at once, as `side_by_side` takes them."""
        return self.net, (x,), DetailNode.halo * len(self.net)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x)
        x = _channels_last(x)
        into = None
        for node in self.net:
            x = into = strip_by_strip(node, x, halo=node.halo, into=into)
        return x


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
        x = strip_by_strip(lambda image: _channels_last(self.patch_embed(image)), image, halo=1)
        return in_turn(self.encoder_level1, x, into=x)


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

    def branch_sums(self, shallow: Tensor) -> tuple[Tensor, Tensor]:
        """Base and detail features, each summed over the modalities, in the place of the shallow ones.

        Args:
            shallow: of vis and ir, stacked along the batch, (2B, 64, H, W); written over in strips.

        Returns:
            (B, 64, H, W) twice.
        """

        def sums(base: Tensor, detail: Tensor) -> Tensor:
            return torch.cat([_sum_of_both(base), _sum_of_both(detail)])

        parts = self.baseFeature.prepare(shallow), self.detailFeature.prepare(shallow)
        return side_by_side(sums, *parts, into=shallow).unflatten(0, (2, -1)).unbind(0)


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
        base_feature, detail_feature = _channels_last(base_feature), _channels_last(detail_feature)
        reduced = strip_by_strip(self.reduce, base_feature, detail_feature, halo=0)
        return self.decode(inp_img, reduced), reduced

    def reduce(self, base: Tensor, detail: Tensor) -> Tensor:
        """Both features -> one: (B, 64, H, W) twice -> the same shape."""
        return self.reduce_channel(torch.cat([base, detail], dim=1))

    def decode(self, image: Tensor | None, reduced: Tensor, into: Tensor | None = None) -> Tensor:
        """Reduced feature (B, 64, H, W) -> fused (B, 1, H, W); in strips `into`, maybe `reduced`, is written over."""
        residual = strip_by_strip(self.output, in_turn(self.encoder_level2, reduced, into), halo=2)
        residual = _at_least_float32(fetched(residual))
        return torch.sigmoid(residual if image is None else residual + image)


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
        image = decoder_image(vis, ir, skip)
        # One pass over both modalities: the encoder is shared, and the larger batch keeps the machine busy.
        return self._decode(image, *self.encoder.branch_sums(self.encoder.shallow(torch.cat([vis, ir]))))

    def decode_fused(self, vis: Tensor, ir: Tensor, base: Tensor, detail: Tensor, skip: str = "vis") -> Tensor:
        """The second half of `fuse`: features of vis and ir, stacked along the batch (2B, 64, H, W) -> fused."""
        image = decoder_image(vis, ir, skip)
        return self._decode(image, _sum_of_both(base), _sum_of_both(detail))

    def _decode(self, image: Tensor | None, base: Tensor, detail: Tensor) -> Tensor:
        """Image or None, base and detail features summed over the modalities (written over in strips) -> fused."""
        base, detail = _channels_last(base), _channels_last(detail)
        parts = self.base_fusion.prepare(base), self.detail_fusion.prepare(detail)
        reduced = side_by_side(self.decoder.reduce, *parts, into=base)
        del parts, base, detail  # attention values among them
        return self.decoder.decode(image, reduced, into=reduced)


def _sum_of_both(features: Tensor) -> Tensor:
    """The sum over the modalities, which are stacked along the batch: (2B, C, H, W) -> (B, C, H, W)."""
    # Not chunk(2): in an export it fixes the batch, being a number of pieces that depends on a size.
    return torch.add(*features.unflatten(0, (2, -1)))


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
