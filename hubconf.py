"""The systems by name, ready to fuse, for torch.hub:

    model = torch.hub.load("path/to/this/checkout", "cddfuse", source="local")
    fused = model(vis, ir)  # (B, 1, H, W) float32 in [0, 1] each

torch.hub takes every public name here that can be called for a model.
"""

import os
import sys

dependencies = ["torch", "einops", "kornia", "skimage", "h5py", "numpy", "cv2", "tqdm"]

_here = os.path.dirname(os.path.abspath(__file__))
for _name in ("net", "utils", "zoo"):
    _other = getattr(sys.modules.get(_name), "__file__", None)
    if _other and not os.path.abspath(_other).startswith(_here + os.sep):
        raise ImportError(f"{_other} is imported already under the name {_name}, which {_here} uses too; load first")

import zoo  # noqa: E402


def _model(name):
    def load(weights=None, task="ivf", **options):
        from utils.inference.fusing import load_fuser

        return load_fuser(zoo.find_system(name), task, weights, **options)

    load.__doc__ = f"""The system {name} with the weights of models/ for the task, in evaluation mode.

    Args:
        weights: a file in the published format instead; or "published": published/models/ of this checkout.
        task: what will be fused: "ivf", infrared and visible images, or "mif", MRI and CT, PET or SPECT.
        options: skip, normalised and device, as for `utils.inference.fusing.load_fuser`, and what else it takes.

    Returns:
        `utils.inference.fusing.Fuser`; the system itself is its attribute `system`.
    """
    return load


globals().update({_name: _model(_name) for _name in zoo.SYSTEMS})
