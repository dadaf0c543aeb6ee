"""The systems by name, ready to fuse, for torch.hub:

    model = torch.hub.load("path/to/this/checkout", "cddfuse", source="local")
    fused = model(vis, ir)  # (B, 1, H, W) float32 in [0, 1] each

torch.hub takes every public name here for a model, so whatever else is needed is imported where it is used.
"""

from __future__ import annotations

dependencies = ["torch", "numpy", "cv2", "h5py", "tqdm"]


def cddfuse(weights=None, task="ivf", **options):
    """CDDFuse with the weights of models/ for the task.

    Args:
        weights: a file in the published format instead; or "published": what tools/download.py has fetched.
        task: what will be fused: "ivf", infrared and visible images, or "mif", MRI and CT, PET or SPECT.
        skip: what the decoder is given: "vis", "sum" or "none"; by default what the weights were trained with.
        stretched: whether each fused image is stretched to [0, 1], or clipped; by default as the system's published
            test does.
        device: "cpu" (the default), "cuda", ...

    Returns:
        `utils.inference.fusing.Fuser`, in evaluation mode; the system itself is its attribute `system`.
    """
    return _load("cddfuse", weights, task, options)


def fsidfusion(weights=None, task="ivf", **options):
    """FSIDFusion; arguments as for `cddfuse`."""
    return _load("fsidfusion", weights, task, options)


def mlfuse(weights=None, task="ivf", **options):
    """MLFuse; arguments as for `cddfuse`, but `skip` is "none" alone."""
    return _load("mlfuse", weights, task, options)


def tsdm(weights=None, task="ivf", **options):
    """TSDM-Fusion, its student; arguments as for `cddfuse`, but `skip` is a padding."""
    return _load("tsdm", weights, task, options)


def _load(name, weights, task, options):
    import os
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    for module in ("net", "utils", "zoo"):
        other = getattr(sys.modules.get(module), "__file__", None)
        if other and not os.path.abspath(other).startswith(here + os.sep):
            raise ImportError(f"{other} is imported already under the name {module}, which {here} uses too; load first")
    from utils.inference.fusing import load_fuser
    from zoo import find_system

    return load_fuser(find_system(name), task, weights, **options)
