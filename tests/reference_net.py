"""The published networks and training steps of CDDFuse, written literally from their specification.

The second implementation that net.py and the training are measured and tested against: every operation as it is
described, one after the other, one modality after the other, in the memory layout that torch has by default. It
shares no code with net.py or utils/training/losses.py; attribute names are the keys of published files, so a state dict
fits both. It checks nothing.
"""

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.body = nn.Module()
        self.body.weight = nn.Parameter(torch.ones(dim))
        self.body.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h * w).transpose(1, 2)
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * self.body.weight + self.body.bias
        return x.transpose(1, 2).reshape(b, c, h, w)


def channel_attention(qkv, temperature, heads):
    b, c, h, w = qkv.shape
    q, k, v = (x.reshape(b, heads, c // 3 // heads, h * w) for x in qkv.chunk(3, dim=1))
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1)) * temperature
    return (attention.softmax(dim=-1) @ v).reshape(b, c // 3, h, w)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        return self.project_out(channel_attention(self.qkv_dwconv(self.qkv(x)), self.temperature, self.heads))


class BaseAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv1 = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.qkv2 = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        return self.proj(channel_attention(self.qkv2(self.qkv1(x)), self.scale, self.heads))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden, groups):
        super().__init__()
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=False)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=groups, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x):
        a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(a) * b)


class Block(nn.Module):
    def __init__(self, dim, heads, expansion):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.ffn = FeedForward(dim, int(dim * expansion), groups=int(dim * expansion) * 2)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Base(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = BaseAttention(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = FeedForward(dim, dim, groups=dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = channels * 2
        self.bottleneckBlock = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU6(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(hidden, hidden, 3, groups=hidden, bias=False),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x):
        return self.bottleneckBlock(x)


class Node(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta_phi = Bottleneck(32)
        self.theta_rho = Bottleneck(32)
        self.theta_eta = Bottleneck(32)
        self.shffleconv = nn.Conv2d(64, 64, 1)

    def forward(self, z1, z2):
        z1, z2 = self.shffleconv(torch.cat((z1, z2), dim=1)).chunk(2, dim=1)
        z2 = z2 + self.theta_phi(z1)
        z1 = z1 * torch.exp(self.theta_rho(z2)) + self.theta_eta(z2)
        return z1, z2


class Detail(nn.Module):
    def __init__(self, num_layers=3):
        super().__init__()
        self.net = nn.Sequential(*[Node() for _ in range(num_layers)])

    def forward(self, x):
        z1, z2 = x.chunk(2, dim=1)
        for node in self.net:
            z1, z2 = node(z1, z2)
        return torch.cat((z1, z2), dim=1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.encoder_level1 = nn.Sequential(*[Block(64, 8, 2) for _ in range(4)])
        self.baseFeature = Base(64, 8)
        self.detailFeature = Detail()

    def forward(self, image):
        shallow = self.encoder_level1(self.patch_embed.proj(image))
        return self.baseFeature(shallow), self.detailFeature(shallow), shallow


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce_channel = nn.Conv2d(128, 64, 1, bias=False)
        self.encoder_level2 = nn.Sequential(*[Block(64, 8, 2) for _ in range(4)])
        self.output = nn.Sequential(
            nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.LeakyReLU(), nn.Conv2d(32, 1, 3, padding=1, bias=False)
        )

    def forward(self, image, base, detail):
        reduced = self.reduce_channel(torch.cat((base, detail), dim=1))
        out = self.output(self.encoder_level2(reduced))
        return torch.sigmoid(out + image if image is not None else out), reduced


class CDDFuse(nn.Module):
    """The four networks under the attribute names of `net.CDDFuse`."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.base_fusion = Base(64, 8)
        self.detail_fusion = Detail(num_layers=1)

    @classmethod
    def like(cls, model):
        """With the weights, the precision and the device of a `net.CDDFuse`."""
        first = next(model.parameters())
        self = cls().to(first.device, first.dtype)
        self.load_state_dict(model.state_dict())
        return self.eval()

    def fuse(self, vis, ir, skip="vis"):
        image = {"vis": vis, "sum": vis + ir, "none": None}[skip]
        vis_base, vis_detail, _ = self.encoder(vis)
        ir_base, ir_detail, _ = self.encoder(ir)
        return self.decoder(image, self.base_fusion(ir_base + vis_base), self.detail_fusion(ir_detail + vis_detail))[0]


# --- losses -------------------------------------------------------------------------------------------------


def dissimilarity(a, b):
    taps = torch.exp(-((torch.arange(11.0, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    window = torch.outer(taps, taps)[None, None]

    def blur(x):
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    ssim = ssim / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return (torch.clamp(1 - ssim, 0, 1) / 2).mean()


def gradients(x):
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device) / 8
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return torch.stack([F.conv2d(x, kernel[None, None]), F.conv2d(x, kernel.T[None, None])], dim=2)


def correlation(a, b):
    a, b = a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    norms = torch.sqrt((a**2).sum(-1)) * torch.sqrt((b**2).sum(-1))
    return torch.clamp((a * b).sum(-1) / (torch.finfo(torch.float32).eps + norms), -1, 1).mean()


def sobel(x):
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    across = F.conv2d(x, kernel[None, None], padding=1)
    down = F.conv2d(x, kernel.T.flip(0)[None, None], padding=1)
    return torch.abs(across) + torch.abs(down)


# --- the training step --------------------------------------------------------------------------------------


class Training:
    """Four Adam optimisers and the two phases, with everything that the published step computes."""

    def __init__(self, model):
        self.model = model
        self.networks = [model.encoder, model.decoder, model.base_fusion, model.detail_fusion]
        self.optimizers = [torch.optim.Adam(network.parameters(), lr=1e-4) for network in self.networks]

    def step(self, phase, vis, ir):
        """One step of phase 1 or 2; returns the loss as a number."""
        networks, optimizers = (x[: 2 * phase] for x in (self.networks, self.optimizers))
        for network in self.networks:
            network.zero_grad()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(phase, vis, ir)
        loss.backward()
        for network in networks:
            nn.utils.clip_grad_norm_(network.parameters(), max_norm=0.01, norm_type=2)
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    def loss(self, phase, vis, ir):
        encoder, decoder, base_fusion, detail_fusion = self.networks
        vis_base, vis_detail, _ = encoder(vis)
        ir_base, ir_detail, _ = encoder(ir)
        decomposition = correlation(vis_detail, ir_detail) ** 2 / (1.01 + correlation(vis_base, ir_base))
        if phase == 1:
            vis_again = decoder(vis, vis_base, vis_detail)[0]
            ir_again = decoder(ir, ir_base, ir_detail)[0]
            vis_loss = 5 * dissimilarity(vis, vis_again) + F.mse_loss(vis, vis_again)
            ir_loss = 5 * dissimilarity(ir, ir_again) + F.mse_loss(ir, ir_again)
            gradient = F.l1_loss(gradients(vis), gradients(vis_again))
            return vis_loss + ir_loss + 2 * decomposition + 5 * gradient
        fused = decoder(vis, base_fusion(ir_base + vis_base), detail_fusion(ir_detail + vis_detail))[0]
        # Computed in every step and never used.
        _ = 5 * dissimilarity(vis, fused) + F.mse_loss(vis, fused)
        _ = 5 * dissimilarity(ir, fused) + F.mse_loss(ir, fused)
        intensity = F.l1_loss(torch.max(vis, ir), fused)
        gradient = F.l1_loss(torch.max(sobel(vis), sobel(ir)), sobel(fused))
        return intensity + 10 * gradient + 2 * decomposition
