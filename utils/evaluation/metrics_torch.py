"""Torch twins of the metrics of the published table: batched, on any device, and for training where they can be.

Every function takes (B, 1, H, W) tensors of grey levels in [0, 255] (network images times 255), fused first, and
returns (B,) values in their dtype. In float64 they equal `utils/metrics.py`, which stays the reference, within 1e-6;
in float32 to about four digits, except SSIM under `paper`, whose constants vanish beside the rounding of float32.

Gradients flow through SD, SF, SCD, VIF, Qabf and SSIM with respect to all images, and are finite for constant images
too. EN and MI count histograms, which have no gradient: their values are detached. Shapes are checked, ranges and
NaN are not, because looking at the values would make a GPU wait; `score_on` checks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics import _SSIM_SIDE, _VIF_NOISE, _VIF_TINY, METRICS, _checked, _gaussian, _Rules, _rules_of

__all__ = [
    "TWINS",
    "entropy",
    "mutual_information",
    "qabf",
    "scd",
    "score_batch",
    "score_on",
    "spatial_frequency",
    "ssim",
    "standard_deviation",
    "vif",
]


def score_batch(
    fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper", metrics: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Name -> (B,) values, for names from `TWINS` (None: all eight).

    Raises:
        ValueError: unknown protocol or metric; the tensors are not three floating-point (B, 1, H, W) of one shape and
            device; a side is too short for a metric.
    """
    keys = list(TWINS) if metrics is None else list(metrics)
    for key in keys:
        if key not in TWINS:
            raise ValueError(f"no torch twin of {key!r}, expected names from: {', '.join(TWINS)}")
    return {key: TWINS[key](fused, a, b, protocol) for key in keys}


@torch.inference_mode()
def score_on(
    device: torch.device,
    fused: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    protocol: str = "paper",
    metrics: Iterable[str] | None = None,
) -> dict[str, float]:
    """`utils.metrics.score` on a device: one image, checked in the same way, in float64."""
    images = [_checked(image, name) for image, name in zip((fused, a, b), ("fused", "a", "b"), strict=True)]
    tensors = [torch.from_numpy(np.asarray(image, np.float64))[None, None].to(device) for image in images]
    return {key: value.item() for key, value in score_batch(*tensors, protocol, metrics).items()}


# --- Metrics ---------------------------------------------------------------------------------------------


def entropy(fused: Tensor, a: Tensor | None = None, b: Tensor | None = None, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.entropy`, in bits, without gradient. The sources are not looked at."""
    _check("EN", protocol, fused)
    counts = _histogram(_levels(fused).flatten(1), 256).to(fused.dtype)
    p = counts / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=1) / math.log(2) + 0.0


def standard_deviation(
    fused: Tensor, a: Tensor | None = None, b: Tensor | None = None, protocol: str = "paper"
) -> Tensor:
    """Twin of `utils.metrics.standard_deviation`. The sources are not looked at."""
    _check("SD", protocol, fused)
    return _sqrt(_variance(fused))


def spatial_frequency(
    fused: Tensor, a: Tensor | None = None, b: Tensor | None = None, protocol: str = "paper"
) -> Tensor:
    """Twin of `utils.metrics.spatial_frequency`. The sources are not looked at."""
    rules = _check("SF", protocol, fused)
    steps = sum(fused.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3))
    return _sqrt(steps) * rules.level_scale


def mutual_information(fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.mutual_information`, without gradient."""
    rules = _check("MI", protocol, fused, a, b)
    row, nats = _levels(fused).flatten(1) * 256, 0.0
    for source in (a, b):
        joint = _histogram(row + _levels(source).flatten(1), 256 * 256).to(fused.dtype).unflatten(1, (256, 256))
        expected = joint.sum(dim=2, keepdim=True) * joint.sum(dim=1, keepdim=True) / row.shape[1]
        ratio = torch.where(joint > 0, joint / expected.where(joint > 0, 1), 1)
        nats = nats + ((joint * ratio.log()).sum(dim=(1, 2)) / row.shape[1]).clamp(min=0)
    return nats / rules.mi_unit


def scd(fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.scd`. NaN where a source, F - A or F - B is constant."""
    _check("SCD", protocol, fused, a, b)
    return _pearson(a, fused - b) + _pearson(b, fused - a)


def vif(fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.vif`."""
    _check("VIF", protocol, fused, a, b)
    planes = torch.cat([fused, a, b], dim=1)  # (B, 3, H, W)
    planes = planes - planes.mean(dim=(2, 3), keepdim=True)
    kept = total = 0.0
    for side in (17, 9, 5, 3):
        taps = torch.as_tensor(_gaussian(side, sigma=side / 5), dtype=fused.dtype, device=fused.device)
        if side < 17:
            planes = _filtered(planes, taps, stride=2)
        products = torch.cat([planes, planes.square(), planes[:, :1] * planes[:, 1:]], dim=1)
        means, squares, covariances = _filtered(products, taps).split((3, 3, 2), dim=1)
        variances = squares - means.square()
        covariances = (covariances - means[:, :1] * means[:, 1:]).clamp(min=0)
        var_f, sources = variances[:, :1], variances[:, 1:]
        # The order of exceptions of utils/metrics.py.
        covariances = torch.where(var_f >= _VIF_TINY, covariances, 0)
        sources = torch.where(sources >= _VIF_TINY, sources, 0)
        gain = covariances / (sources + _VIF_TINY)
        noise = (var_f - gain * covariances).clamp(min=_VIF_TINY)
        kept = kept + torch.log1p(gain.square() * sources / (noise + _VIF_NOISE)).sum(dim=(2, 3))
        total = total + torch.log1p(sources / _VIF_NOISE).sum(dim=(2, 3))
    return torch.where(total > 0, kept / total.where(total > 0, 1), 1).sum(dim=1)


def qabf(fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.qabf`. NaN where both sources are zero everywhere."""
    rules = _check("Qabf", protocol, fused, a, b)
    strength, angle = _sobel(torch.cat([fused, a, b], dim=1))
    of_fused, sources = strength[:, :1], strength[:, 1:]
    weaker, stronger = torch.minimum(of_fused, sources), torch.maximum(of_fused, sources)
    ratio = weaker / stronger.where(stronger > 0, 1)
    if not rules.equal_strength_is_one:
        ratio = torch.where(weaker == stronger, of_fused.clamp(max=3), ratio)
    alignment = 1 - (angle[:, 1:] - angle[:, :1]).abs() / (math.pi / 2)
    preserved = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (alignment - 0.8))
    total = sources.sum(dim=(1, 2, 3))
    return torch.where(total > 0, (preserved * sources).sum(dim=(1, 2, 3)) / total.where(total > 0, 1), math.nan)


def ssim(fused: Tensor, a: Tensor, b: Tensor, protocol: str = "paper") -> Tensor:
    """Twin of `utils.metrics.ssim`. NaN under `toolbox`."""
    rules = _check("SSIM", protocol, fused, a, b)
    if rules.ssim_range is None:
        return fused.new_full((len(fused),), math.nan)
    c1, c2 = (0.01 * rules.ssim_range) ** 2, (0.03 * rules.ssim_range) ** 2
    count = _SSIM_SIDE**2
    planes = torch.cat([fused, a, b], dim=1)
    centre = planes.mean(dim=(2, 3), keepdim=True)  # variances of what is left lose fewer digits
    centred = planes - centre
    products = torch.cat([centred, centred.square(), centred[:, :1] * centred[:, 1:]], dim=1)
    means, squares, covariances = F.avg_pool2d(products, _SSIM_SIDE, stride=1).split((3, 3, 2), dim=1)
    variances = (squares - means.square()) * (count / (count - 1))
    covariances = (covariances - means[:, :1] * means[:, 1:]) * (count / (count - 1))
    means = means + centre
    similarity = (2 * means[:, :1] * means[:, 1:] + c1) * (2 * covariances + c2)
    dissimilarity = (means[:, :1].square() + means[:, 1:].square() + c1) * (variances[:, :1] + variances[:, 1:] + c2)
    return (similarity / dissimilarity).mean(dim=(2, 3)).sum(dim=1)


TWINS: dict[str, Callable[..., Tensor]] = {
    "EN": entropy,
    "SD": standard_deviation,
    "SF": spatial_frequency,
    "MI": mutual_information,
    "SCD": scd,
    "VIF": vif,
    "Qabf": qabf,
    "SSIM": ssim,
}
"""Key of `utils.metrics.METRICS` -> its torch twin, called as (fused, a, b, protocol)."""


# --- Parts -----------------------------------------------------------------------------------------------


def _check(key: str, protocol: str, *images: Tensor) -> _Rules:
    for image in images:
        if image.ndim != 4 or image.shape[1] != 1 or not image.is_floating_point():
            raise ValueError(f"{key} needs floating-point (B, 1, H, W), got {image.dtype} {tuple(image.shape)}")
        if image.shape != images[0].shape or image.device != images[0].device:
            found = ", ".join(f"{tuple(image.shape)} on {image.device}" for image in images)
            raise ValueError(f"{key} needs images of one shape on one device, got {found}")
    if min(images[0].shape[2:]) < METRICS[key].min_side:
        raise ValueError(f"{key} needs sides >= {METRICS[key].min_side}, got {tuple(images[0].shape[2:])}")
    return _rules_of(protocol)


def _sqrt(values: Tensor) -> Tensor:
    """Square root with the gradient 0, not infinity, at 0."""
    return torch.where(values > 0, values.where(values > 0, 1).sqrt(), 0)


def _levels(image: Tensor) -> Tensor:
    return image.detach().round().clamp(0, 255).long()


def _histogram(indices: Tensor, bins: int) -> Tensor:
    """Counts of each row: (B, N) int64 below bins -> (B, bins) int64."""
    shifted = indices + torch.arange(len(indices), device=indices.device)[:, None] * bins
    return torch.bincount(shifted.flatten(), minlength=len(indices) * bins).unflatten(0, (-1, bins))


def _variance(image: Tensor) -> Tensor:
    variance = image.var(dim=(1, 2, 3), correction=0)
    return torch.where(variance < 1e-20, 0, variance)  # rounding, not signal: see utils/metrics.py


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    covariance = ((x - x.mean(dim=(1, 2, 3), keepdim=True)) * (y - y.mean(dim=(1, 2, 3), keepdim=True))).mean((1, 2, 3))
    product = _variance(x) * _variance(y)
    return torch.where(product > 0, covariance / _sqrt(product.where(product > 0, 1)), math.nan)


def _filtered(planes: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    """Separable filter over whole windows: (B, n, H, W) -> (B, n, h, w)."""
    lines = planes.flatten(0, 1)[:, None]
    lines = F.conv2d(lines, taps[None, None, :, None], stride=(stride, 1))
    lines = F.conv2d(lines, taps[None, None, None, :], stride=(1, stride))
    return lines[:, 0].unflatten(0, planes.shape[:2])


def _sobel(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Strength and angle in (-pi/2, pi/2] of the edges, signs as in a convolution: two of (B, n, H, W)."""
    padded = F.pad(planes, (1, 1, 1, 1))
    smooth = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    gx = smooth[..., :-2] - smooth[..., 2:]
    smooth = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gy = smooth[:, :, 2:] - smooth[:, :, :-2]
    angle = torch.where(gx == 0, math.pi / 2, torch.atan(gy / gx.where(gx != 0, 1)))
    return _sqrt(gx.square() + gy.square()), angle
