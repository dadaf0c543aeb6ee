"""Every loss term of the systems, by its name in the paper, with the constants of the published code.

Images are (B, 1, H, W) in [0, 1], feature maps (B, C, H, W). Every function returns a 0-d tensor that falls as
things improve, except `correlation`, which is a similarity. All of them compute in float32 or better whatever
the autocast state: variances by E[x^2] - E[x]^2 and correlations do not survive bfloat16.

Source: Zhao et al., "CDDFuse", CVPR 2023, sections 3.3 and 3.4, where a docstring names no other. Where paper and
published code differ, the code is followed and the docstring says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import kornia.metrics
import torch
import torch.nn.functional as F
from kornia.filters import spatial_gradient
from torch import Tensor

from utils.training.distributed import mean_over_ranks

SSIM_FORMS = ("published", "standard")
SSIM_BORDERS = ("reflect", "constant", "valid")

_SSIM_BORDER = 5  # half the window
_HALVES = (torch.bfloat16, torch.float16)


def _full_precision(function: Callable) -> Callable:
    """Runs a function of tensors outside autocast, with half-precision arguments widened to float32."""

    @functools.wraps(function)
    def wrapped(*tensors: Tensor, **options: float | str) -> Tensor | dict[str, Tensor]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*(x.float() if x.dtype in _HALVES else x for x in tensors), **options)

    return wrapped


@_full_precision
def ssim_map(a: Tensor, b: Tensor, *, borders: str = "reflect") -> Tensor:
    """Structural similarity of every pixel: (B, C, H, W) twice -> (B, C, H, W) in [-1, 1].

    Gaussian window of 11 taps and sigma 1.5, data range 1, biased second moments. Borders are reflected ("reflect";
    CDDFuse), padded with zeros ("constant"; MLFuse), or left out ("valid": (B, C, H - 10, W - 10); TSDM-Fusion).

    Raises:
        ValueError: the shapes differ, a side is shorter than 6 (five pixels are reflected), or unknown borders.

    Source:
        Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13(4), 2004.
    """
    if a.shape != b.shape or min(a.shape[2:]) <= _SSIM_BORDER:
        raise ValueError(
            f"SSIM needs two (B, C, H, W) of one shape with sides of at least {_SSIM_BORDER + 1}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if borders not in SSIM_BORDERS:
        raise ValueError(f"borders must be one of {', '.join(SSIM_BORDERS)}, got {borders!r}")
    if borders == "constant":  # kornia reflects or leaves out; what it leaves out of a padded image is the padding
        a, b = (F.pad(image, (_SSIM_BORDER,) * 4) for image in (a, b))
    padding = "same" if borders == "reflect" else "valid"
    return kornia.metrics.ssim(a, b, 2 * _SSIM_BORDER + 1, padding=padding, eps=0.0)


@_full_precision
def ssim_loss(a: Tensor, b: Tensor, *, form: str = "published") -> Tensor:
    """Structural dissimilarity D(a, b), the mean over all pixels.

    "published": clamp(1 - SSIM, 0, 1) / 2, in [0, 0.5]. Flat, so without gradient, wherever SSIM <= 0. The
    published weights were trained with it (the loss class of kornia up to 0.4).
    "standard": clamp((1 - SSIM) / 2, 0, 1), in [0, 1]; kornia from 0.5 on. Equal where SSIM >= 0.

    Raises:
        ValueError: unknown form, or as `ssim_map`.
    """
    if form not in SSIM_FORMS:
        raise ValueError(f"form must be one of {', '.join(SSIM_FORMS)}, got {form!r}")
    dissimilarity = 1 - ssim_map(a, b)
    halved = dissimilarity.clamp(0, 1) / 2 if form == "published" else (dissimilarity / 2).clamp(0, 1)
    return halved.mean()


@_full_precision
def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the normalised Sobel gradients of two images, borders replicated."""
    return F.l1_loss(spatial_gradient(a), spatial_gradient(b))


@_full_precision
def sobel_magnitude(image: Tensor) -> Tensor:
    """|Gx| + |Gy| with un-normalised Sobel kernels: (B, C, H, W) -> (B, C, H, W), values >= 0.

    Borders are padded with zeros, as published, so a bright border reads as an edge.
    """
    padded = F.pad(image, (1, 1, 1, 1))  # kornia replicates borders: those of the padding, which are cut off again
    return spatial_gradient(padded, normalized=False)[..., 1:-1, 1:-1].abs().sum(dim=2)


@_full_precision
def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation over space of each channel of two feature maps, the mean over batch and channels.

    CC(a, b) in the paper. (B, C, H, W) twice -> 0-d in [-1, 1]. A constant channel counts as 0. In a distributed
    run the mean is over the batches of all processes.
    """
    a, b = (x - x.mean(dim=(2, 3), keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=(2, 3)) * torch.linalg.vector_norm(b, dim=(2, 3))
    correlations = (a * b).sum(dim=(2, 3)) / (torch.finfo(torch.float32).eps + norms)
    return mean_over_ranks(correlations.clamp(-1, 1).mean())


def decomposition_loss(base_vis: Tensor, base_ir: Tensor, detail_vis: Tensor, detail_ir: Tensor) -> dict[str, Tensor]:
    """CC(detail)^2 / (1.01 + CC(base)): base features should correlate, detail features should not.

    The square is of the mean correlation, so channels of opposite sign cancel, as published.

    Returns:
        "decomposition" and the two correlations, "cc_base" and "cc_detail".
    """
    cc_base, cc_detail = correlation(base_vis, base_ir), correlation(detail_vis, detail_ir)
    return {
        "decomposition": cc_detail.square() / (1.01 + cc_base),
        "cc_base": cc_base,
        "cc_detail": cc_detail,
    }


@_full_precision
def reconstruction_loss(
    image: Tensor, reconstruction: Tensor, *, ssim_weight: float = 5.0, form: str = "published"
) -> Tensor:
    """Mean squared error + ssim_weight * D: how well an image survives encoding and decoding."""
    return F.mse_loss(reconstruction, image) + ssim_weight * ssim_loss(image, reconstruction, form=form)


@_full_precision
def fusion_loss(
    vis: Tensor, ir: Tensor, fused: Tensor, *, intensity_weight: float = 1.0, gradient_weight: float = 10.0
) -> dict[str, Tensor]:
    """Fused image against the brighter source and the stronger edge of each pixel.

    Returns:
        "intensity": mean |max(vis, ir) - fused|; "gradient": mean |max(S(vis), S(ir)) - S(fused)| with S the
        `sobel_magnitude`; "fusion": intensity_weight * intensity + gradient_weight * gradient.
    """
    intensity = F.l1_loss(fused, torch.maximum(vis, ir))
    vis_edges, ir_edges, fused_edges = sobel_magnitude(torch.cat([vis, ir, fused])).chunk(3)
    gradient = F.l1_loss(fused_edges, torch.maximum(vis_edges, ir_edges))
    fusion = intensity_weight * intensity + gradient_weight * gradient
    return {"fusion": fusion, "intensity": intensity, "gradient": gradient}


@_full_precision
def range_loss(vis: Tensor, ir: Tensor, fused: Tensor, *, radius: int = 1) -> Tensor:
    """Mean distance of the fused image from the grey levels that either source has within `radius` pixels.

    Not in the paper. The gradient of `fusion_loss` is a magnitude, which a dark line in a bright area satisfies as
    well as the edge that it stands for; such lines lie outside these levels. With a radius of 0 each pixel is to lie
    between its two sources.
    """
    side = 2 * radius + 1
    brightest = F.max_pool2d(torch.maximum(vis, ir), side, stride=1, padding=radius)
    darkest = -F.max_pool2d(-torch.minimum(vis, ir), side, stride=1, padding=radius)
    return ((fused - brightest).relu() + (darkest - fused).relu()).mean()


@_full_precision
def difference_loss(vis: Tensor, ir: Tensor, fused: Tensor) -> Tensor:
    """2 - CC(fused - ir, vis) - CC(fused - vis, ir), in [0, 4]: what the fused image has beyond one source should be
    what the other shows.

    Not in the paper, whose fusion loss asks for the brighter source: where one is brighter everywhere, nothing of the
    other's areas is asked for. The sum is the metric SCD of the images given (in training, of crops), so weights
    trained with it are to be judged by the other metrics.

    Source:
        Aslantas and Bendes, "A new image quality metric for image fusion: the sum of the correlations of
        differences", AEU Int. J. Electron. Commun. 69(12), 2015.
    """
    return 2 - correlation(fused - ir, vis) - correlation(fused - vis, ir)


@_full_precision
def fused_ssim_loss(vis: Tensor, ir: Tensor, fused: Tensor, *, borders: str = "reflect") -> Tensor:
    """Mean of (1 - SSIM(vis, fused)) + (1 - SSIM(ir, fused)), in [0, 4]; borders as in `ssim_map`.

    Not in the CDDFuse paper; in MLFuse the only loss on the fused image (`multi_branch_loss`).
    """
    return (2 - (ssim_map(vis, fused, borders=borders) + ssim_map(ir, fused, borders=borders))).mean()


@_full_precision
def multi_branch_loss(
    vis: Tensor, ir: Tensor, ir_saliency: Tensor, fused: Tensor, edge: Tensor, cross: Tensor, attention: Tensor
) -> dict[str, Tensor]:
    """The four losses of MLFuse: one on the image of each branch, and one on the fused image.

    Args:
        vis: visible image, or MRI.
        ir: infrared image, or CT, PET, SPECT.
        ir_saliency: visual saliency map of `ir` in [0, 1]; see `utils.data.saliency`.
        fused, edge, cross, attention: what the network made, in (-1, 1).

    Returns:
        "edge": mean |S(edge) - S(vis)| with S the `sobel_magnitude`; "attention": mean of ir_saliency |attention - ir|;
        "cross": mean squared error of `cross` from vis and from ir, added; "fusion": a twentieth of
        (1 - SSIM(vis, fused)) + (1 - SSIM(ir, fused)), borders padded with zeros. SSIM is all that holds the fused
        image, so its brightness is hardly determined: that is what min-max normalisation after fusion is for.

    Source:
        "MLFuse: Multi-scenario Feature Joint Learning for Multi-Modality Image Fusion".
    """
    edges, vis_edges = sobel_magnitude(torch.cat([edge, vis])).chunk(2)
    return {
        "edge": F.l1_loss(edges, vis_edges),
        "attention": F.l1_loss(ir_saliency * attention, ir_saliency * ir),
        "cross": F.mse_loss(cross, vis) + F.mse_loss(cross, ir),
        "fusion": fused_ssim_loss(vis, ir, fused, borders="constant") / 20,
    }
