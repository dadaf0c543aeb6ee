"""The published forward pass of CDDFuse, written out literally from its specification.

The second implementation that net.py is compared with, in result and in time: one modality after the other, one
operation after the other, every convolution by itself, in torch's default memory layout, everything in memory.
It computes with the weights of a `net.CDDFuse`, whose keys are the published ones, and shares no code with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights:
    """A state dict below a prefix: w("attn.qkv") is the weight of that layer, w.at("attn") the dict below it."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, layer: str, name: str = "weight") -> Tensor:
        return self.state[f"{self.prefix}{layer}.{name}"]

    def at(self, below: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{below}.")


def layer_norm(x: Tensor, w: Weights) -> Tensor:
    height, width = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)  # b c h w -> b (h w) c
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-5) * w("body") + w("body", "bias")
    return x.transpose(1, 2).unflatten(2, (height, width))


def channel_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    height, width = qkv.shape[2:]
    heads = len(temperature)
    # b (head c) h w -> b head c (h w)
    q, k, v = (x.reshape(x.shape[0], heads, x.shape[1] // heads, height * width) for x in qkv.chunk(3, dim=1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = ((q @ k.transpose(-2, -1)) * temperature).softmax(dim=-1)
    return (attention @ v).reshape(qkv.shape[0], -1, height, width)


def feed_forward(x: Tensor, w: Weights, groups: int) -> Tensor:
    x = F.conv2d(x, w("project_in"))
    a, b = F.conv2d(x, w("dwconv"), padding=1, groups=groups).chunk(2, dim=1)
    return F.conv2d(F.gelu(a) * b, w("project_out"))


def restormer_block(x: Tensor, w: Weights) -> Tensor:
    qkv = F.conv2d(layer_norm(x, w.at("norm1")), w("attn.qkv"))
    qkv = F.conv2d(qkv, w("attn.qkv_dwconv"), padding=1, groups=192)
    x = x + F.conv2d(channel_attention(qkv, w("attn", "temperature")), w("attn.project_out"))
    return x + feed_forward(layer_norm(x, w.at("norm2")), w.at("ffn"), groups=256)


def base_block(x: Tensor, w: Weights) -> Tensor:
    qkv = F.conv2d(layer_norm(x, w.at("norm1")), w("attn.qkv1"))
    qkv = F.conv2d(qkv, w("attn.qkv2"), padding=1)
    x = x + F.conv2d(channel_attention(qkv, w("attn", "scale")), w("attn.proj"))
    return x + feed_forward(layer_norm(x, w.at("norm2")), w.at("mlp"), groups=64)


def bottleneck(x: Tensor, w: Weights) -> Tensor:
    x = F.relu6(F.conv2d(x, w("0")), inplace=True)
    x = F.relu6(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w("3"), groups=64), inplace=True)
    return F.conv2d(x, w("5"))


def detail_block(x: Tensor, w: Weights, nodes: int) -> Tensor:
    z1, z2 = x.chunk(2, dim=1)
    for i in range(nodes):
        n = w.at(f"net.{i}")
        mixed = F.conv2d(torch.cat([z1, z2], dim=1), n("shffleconv"), n("shffleconv", "bias"))
        z1, z2 = mixed.chunk(2, dim=1)
        z2 = z2 + bottleneck(z1, n.at("theta_phi.bottleneckBlock"))
        gain = torch.exp(bottleneck(z2, n.at("theta_rho.bottleneckBlock")))
        z1 = z1 * gain + bottleneck(z2, n.at("theta_eta.bottleneckBlock"))
    return torch.cat([z1, z2], dim=1)


def encode(image: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 1, H, W) -> base, detail and shallow features."""
    x = F.conv2d(image, w("patch_embed.proj"), padding=1)
    for i in range(4):
        x = restormer_block(x, w.at(f"encoder_level1.{i}"))
    return base_block(x, w.at("baseFeature")), detail_block(x, w.at("detailFeature"), nodes=3), x


def decode(image: Tensor | None, base: Tensor, detail: Tensor, w: Weights) -> Tensor:
    x = F.conv2d(torch.cat([base, detail], dim=1), w("reduce_channel"))
    for i in range(4):
        x = restormer_block(x, w.at(f"encoder_level2.{i}"))
    x = F.conv2d(F.leaky_relu(F.conv2d(x, w("output.0"), padding=1), 0.01), w("output.2"), padding=1)
    return torch.sigmoid(x if image is None else x + image)


def fuse(model: nn.Module, vis: Tensor, ir: Tensor, skip: str = "vis") -> Tensor:
    """What `model.fuse` gives: (B, 1, H, W) twice -> the same shape. `model` is a `net.CDDFuse`."""
    w = Weights(model.state_dict())
    vis_base, vis_detail, _vis_shallow = encode(vis, w.at("encoder"))
    ir_base, ir_detail, _ir_shallow = encode(ir, w.at("encoder"))
    base = base_block(vis_base + ir_base, w.at("base_fusion"))
    detail = detail_block(vis_detail + ir_detail, w.at("detail_fusion"), nodes=1)
    image = {"vis": vis, "sum": vis + ir, "none": None}[skip]
    return decode(image, base, detail, w.at("decoder"))
