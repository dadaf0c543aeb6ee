"""Colour and loss terms of TSDM-Fusion. Images are (B, C, H, W) in [0, 1], colour is red first.

Every loss is a 0-d tensor that falls as things improve, in float32 whatever the autocast state.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_y
from torch import Tensor, nn

from utils.common import InputError, listed
from utils.inference.checkpoint import read_file
from utils.training.distributed import mean_over_ranks
from utils.training.losses import ssim_map


def luma(image: Tensor) -> Tensor:
    """Luminance as in YCbCr: (B, 3, H, W) -> (B, 1, H, W); a grey image is returned as it is."""
    return image if image.shape[1] == 1 else rgb_to_y(image)


def with_luma(image: Tensor, y: Tensor) -> Tensor:
    """A colour image with its luminance replaced: (B, 3, H, W) and (B, 1, H, W) -> (B, 3, H, W), not clamped.

    The published constants of YCbCr are rounded, and kornia's are not; with the image's own luminance they are off by
    up to 2.82e-4.
    """
    r, _, b = image.split(1, dim=1)
    own = luma(image)
    cb, cr = 0.564 * (b - own), 0.713 * (r - own)
    return torch.cat([y + 1.403 * cr, y - 0.714 * cr - 0.344 * cb, y + 1.773 * cb], dim=1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of windows that lie wholly in the image, sides of at least 11. Not a loss."""
    return ssim_map(a, b, borders="valid").mean()


def laplacian_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the Laplacians of four neighbours, with replicated borders."""
    # The Laplacian is linear, so the Laplacian of the difference is enough.
    padded = F.pad(a.float() - b.float(), (1, 1, 1, 1), mode="replicate")
    middle, rows, columns = padded[..., 1:-1, 1:-1], padded[..., 1:-1], padded[..., 1:-1, :]
    neighbours = rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]
    return (4 * middle - neighbours).square().mean()


def charbonnier_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-6): an L1 loss that is smooth at 0."""
    return ((a.float() - b.float()).square() + 1e-6).sqrt().mean()


def relativistic_loss(real: Tensor, fake: Tensor, label: float) -> Tensor:
    """Relativistic average loss: BCE(real - mean fake, label) + BCE(fake - mean real, 1 - label).

    Args:
        real, fake: logits (B, 1) of the discriminator for targets and for the student's images. The means are over
            the batches of all processes.
        label: 1 for the discriminator, 0 for the student.

    Source:
        Jolicoeur-Martineau, "The relativistic discriminator", ICLR 2019.
    """
    real, fake = real.float(), fake.float()
    logits = torch.cat([real - mean_over_ranks(fake.mean()), fake - mean_over_ranks(real.mean())])
    labels = torch.cat([torch.full_like(real, label), torch.full_like(fake, 1 - label)])
    return 2 * F.binary_cross_entropy_with_logits(logits, labels)  # two means over B are twice the mean over 2 B


class Content:
    """Mean absolute difference of VGG19's last feature maps, behind the ReLU of its sixteenth convolution.

    Not a module: what holds it neither saves nor trains it.

    Args:
        path: the ImageNet weights of VGG19 as torchvision publishes them; torchvision itself is not needed.

    Raises:
        FileNotFoundError, InputError: not a file of these weights.
    """

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)  # 0: pooling

    def __init__(self, path: Path | str) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width in self.WIDTHS:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.network = nn.Sequential(*layers).eval().requires_grad_(False)
        wanted = self.network.state_dict()
        state = {key.removeprefix("features."): value for key, value in read_file(path).items()}
        missing = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
        if missing:
            raise InputError(f"{path} is not VGG19 of torchvision: {listed(missing)} are missing or of another shape")
        self.network.load_state_dict({key: state[key] for key in wanted})
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, H, W) twice, sides of at least 16 -> 0-d."""
        with torch.inference_mode(False):  # where validation calls first, training has to use it afterwards
            self.network.to(a.device)
            self.mean, self.std = self.mean.to(a), self.std.to(a)
        first, second = (self.network((image - self.mean) / self.std).float() for image in (a, b))
        return F.l1_loss(first, second)
