"""The three networks of TSDM-Fusion: teacher, student, discriminator.

Attribute names are the keys of published checkpoints. Shapes: B batch, H and W pixels, C channels; feature maps are
(B, C, H, W), and (B, H, W, C) where a transformer works on pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WINDOW = 8  # pixels a side of a window of attention


def _convolutions(*widths: int) -> list[nn.Module]:
    """3x3 convolutions without bias, each with a LeakyReLU behind it."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.LeakyReLU(0.1, inplace=True)]
    return layers


class Teacher(nn.Module):
    """Infrared and grey visible image -> fused luminance, (B, 1, H, W) each; any size, the result is unbounded."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder_a = nn.Sequential(*_convolutions(1, width, 2 * width, 4 * width, 8 * width))
        self.encoder_b = nn.Sequential(*_convolutions(1, width, 2 * width, 4 * width, 8 * width))
        self.decoder = nn.Sequential(
            *_convolutions(16 * width, 8 * width, 4 * width, 2 * width, width),
            nn.Conv2d(width, 1, 3, padding=1, bias=False),
        )

    def forward(self, ir: Tensor, vis: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.encoder_a(ir), self.encoder_b(vis)], dim=1))


# --- The student: a Swin transformer (Liu et al., ICCV 2021) as SwinIR (Liang et al., ICCVW 2021) uses it ---


class WindowAttention(nn.Module):
    """Attention of the pixels of each window to each other: (B, H, W, C) -> the same.

    With `masks` the image is one that was rolled by half a window: windows of its last row and last column hold
    parts from opposite ends of the image, which must not see each other. Where such a seam lies within a window
    depends only on whether the window is in the last row, the last column, both or neither, so there are four
    masks, whatever the size of the image.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, positions: Tensor, masks: Tensor | None) -> Tensor:
        windows = {"y": WINDOW, "x": WINDOW, "heads": self.heads}
        qkv = rearrange(self.qkv(x), "b (r y) (c x) (qkv heads d) -> qkv b r c heads (y x) d", qkv=3, **windows)
        bias = self.relative_position_bias_table[positions].permute(2, 0, 1).to(qkv.dtype)  # heads, pixels, pixels
        if masks is None:
            mixed = self.attend(qkv, bias)
        else:
            masks, parts = masks.to(qkv.dtype), (slice(None, -1), slice(-1, None))  # all but the last, the last
            mixed = torch.empty_like(qkv[0])
            for (is_last_row, rows), (is_last_column, columns) in product(enumerate(parts), repeat=2):
                mask = masks[is_last_row, is_last_column]
                mixed[:, rows, columns] = self.attend(qkv[:, :, rows, columns], bias + mask)
        return self.proj(rearrange(mixed, "b r c heads (y x) d -> b (r y) (c x) (heads d)", **windows))

    @staticmethod
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        """Queries, keys and values of windows that share one bias, (3, B, rows, columns, heads, pixels, d)."""
        q, k, v = qkv.flatten(1, 3)
        if bias.requires_grad and bias.device.type == "cpu":
            # PyTorch's fallback for a bias with gradient looks for masked rows: three times as long in bfloat16.
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
            return (logits.softmax(-1) @ v).view(qkv.shape[1:])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).view(qkv.shape[1:])


class SwinBlock(nn.Module):
    """Window attention and an MLP, each on a residual path: (B, H, W, C) -> the same.

    Args:
        channels, heads: as they say.
        shifted: whether windows are moved by half their side, to meet pixels across the borders of the others.
        drop: share of training images for which a residual path is left out (stochastic depth).
    """

    def __init__(self, channels: int, heads: int, *, shifted: bool, drop: float) -> None:
        super().__init__()
        self.shift, self.drop = WINDOW // 2 if shifted else 0, drop
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        wide, narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.mlp = nn.Sequential(OrderedDict(fc1=wide, act=nn.GELU(), fc2=narrow))

    def forward(self, x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
        shift, y = self.shift, self.norm1(x)
        if shift:
            y = self.attn(y.roll((-shift, -shift), (1, 2)), positions, masks).roll((shift, shift), (1, 2))
        else:
            y = self.attn(y, positions, None)
        x = x + self.dropped(y)
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop):
            return x
        keep = 1 - self.drop
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep).div_(keep)


class SwinGroup(nn.Module):
    """Swin blocks, every other one shifted, and a convolution, on a residual path: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, heads: int, drops: list[float]) -> None:
        super().__init__()
        self.residual_group = nn.Module()
        self.residual_group.blocks = nn.ModuleList(
            SwinBlock(channels, heads, shifted=bool(number % 2), drop=drop) for number, drop in enumerate(drops)
        )
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        for block in self.residual_group.blocks:
            y = block(y, positions, masks)
        return x + self.conv(y.permute(0, 3, 1, 2))


class Student(nn.Module):
    """Infrared (B, 1, H, W) and colour visible image (B, 3, H, W) -> fused colour image (B, 3, H, W), unbounded.

    H and W are multiples of 8. Files of this network hold no mask and no table of positions: published ones do, for
    128 x 256 pixels, and are 101 MB where the weights are 2.5.
    """

    # Last parts of keys that published files hold and nobody needs.
    computed = ("attn_mask", "relative_position_index")

    def __init__(
        self, channels: int = 48, heads: int = 6, groups: int = 4, blocks: int = 6, drop_path: float = 0.1
    ) -> None:
        super().__init__()
        self.conv_first_ir = nn.Conv2d(1, channels, 1)
        self.conv_first_vi = nn.Conv2d(3, channels, 1)
        # Never used, but published files hold it; without gradient it is never trained.
        self.conv_first = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        self.patch_embed = nn.Module()
        self.patch_embed.norm = nn.LayerNorm(channels)
        drops = torch.linspace(0, drop_path, groups * blocks).view(groups, blocks).tolist()
        self.layers = nn.ModuleList(SwinGroup(channels, heads, row) for row in drops)
        self.norm = nn.LayerNorm(channels)
        self.conv_after_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        )
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.register_buffer("positions", relative_positions(), persistent=False)
        self.register_buffer("masks", seam_masks(), persistent=False)

    def forward(self, ir: Tensor, vis: Tensor) -> Tensor:
        if ir.shape[2] % WINDOW or ir.shape[3] % WINDOW:
            raise ValueError(f"the student takes sides of multiples of {WINDOW}, got {tuple(ir.shape)}; pad the images")
        # In channels-last memory a map of pixels is a view of a feature map.
        first = (self.conv_first_ir(ir) + self.conv_first_vi(vis)).contiguous(memory_format=torch.channels_last)
        x = _over_channels(self.patch_embed.norm, first)
        for group in self.layers:
            x = group(x, self.positions, self.masks)
        return self.conv_last(self.conv_after_body(_over_channels(self.norm, x)) + first)


def _over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def relative_positions() -> Tensor:
    """Which of the 225 relative positions two pixels of a window have: (64, 64) whole numbers."""
    row, column = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down, right = row[:, None] - row + WINDOW - 1, column[:, None] - column + WINDOW - 1
    return down * (2 * WINDOW - 1) + right


def seam_masks() -> Tensor:
    """What is added to attention in rolled windows: (2, 2, 64, 64), for [in the last row][in the last column].

    0 for pixels that may see each other, -100 for those on two sides of a seam through the middle of the window.
    """
    half = torch.arange(WINDOW) >= WINDOW // 2
    masks = torch.zeros(2, 2, WINDOW**2, WINDOW**2)
    for last_row, last_column in product(range(2), repeat=2):
        side = (2 * last_row * half[:, None] + last_column * half).flatten()
        masks[last_row, last_column] = (side[:, None] != side) * -100.0
    return masks


# --- The discriminator --------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """Colour image (B, 3, H, W) -> logit (B, 1) of being a target, not the student's work.

    Any size: features are averaged to the 2 x 4 that the published network gets of its 128 x 256 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        widths = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512)
        for number, (before, after) in enumerate(pairwise(widths)):
            stride = 1 + (number % 2 == 0)
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(512 * 8, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(image), (2, 4)).flatten(1))
