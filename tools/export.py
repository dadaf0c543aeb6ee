"""Writes a system with its weights as an ONNX file and as a torch.export file, and checks both against torch.

    python -m tools.export                                              # models/CDDFuse_IVF.pth -> exported/
    python -m tools.export --task mif --formats onnx
    python -m tools.export --system mlfuse --weights model_fuse.pth

Either file takes two images `vis` and `ir`, (batch, 1, height, width) float32 in [0, 1], any batch and any size from
the system's smallest side up, and gives `fused`, of the same shape and in the same range: what the test scripts write,
min-max normalised (clipped with --no-normalise). ONNX needs the packages onnx, onnxscript and onnxruntime.
docs/deployment.md runs such a file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from utils.common import InputError, Parser, check_writable, git_commit, run_script, whole_file
from utils.inference.fusing import Fuser, load_fuser
from zoo import TASKS, find_system

Runner = Callable[[Tensor, Tensor], Tensor]
# Systems whose sizes stay dynamic in an export, and the smallest side there. MLFuse pools a side of up to 20 pixels to
# a single one, which torch.export would take for a constant.
SMALLEST_SIDES = {"cddfuse": 2, "mlfuse": 21}
LARGEST = 2**16  # of a side, and of a batch
EXAMPLE = (2, 1, 48, 40)  # a batch of one would stay one for ever
CHECKED = ((1, 33, 51), (2, 64, 40), (3, 41, 97))  # batch, height, width; none is the example
TOLERANCE = 1e-5
FORMATS = ("onnx", "pt2")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--system", choices=SMALLEST_SIDES, default="cddfuse", help="default: cddfuse")
    add("--task", choices=TASKS, default="ivf", help="the images it will fuse (default: ivf)")
    add("--weights", type=Path, metavar="FILE", help="or published (default: those in models/ for system and task)")
    add("--skip", help="image that the decoder is given: vis, sum or none (default: the published rule)")
    add(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        help="min-max normalise each fused image; --no-normalise clips, for video (default: as published)",
    )
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: onnx pt2 (torch.export)")
    add("--out", type=Path, default=Path("exported"), metavar="DIR", help="default: exported")
    return run_script(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    if "onnx" in args.formats:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InputError(
                    f"ONNX needs the package {package} ({error}); run `pip install onnx onnxscript onnxruntime`, or "
                    "write only a torch.export file with --formats pt2"
                ) from error
    check_writable(args.out)
    fuser = load_fuser(find_system(args.system), args.task, args.weights, args.skip, normalised=args.normalise)
    about = fuser.about() | {"smallest_side": SMALLEST_SIDES[args.system], "commit": git_commit()}
    program = trace(fuser, SMALLEST_SIDES[args.system])
    writers: dict[str, Callable[..., Runner]] = {"onnx": write_onnx, "pt2": write_pt2}
    for suffix in args.formats:
        path = args.out / f"{fuser.weights.stem}.{suffix}"
        with whole_file(path) as temporary:
            error = largest_error(writers[suffix](program, temporary, about), fuser)
            if not error <= TOLERANCE:
                raise InputError(
                    f"{path} was not written: it differs from torch by {error:.2g}, more than {TOLERANCE:g}, with "
                    f"torch {torch.__version__}; report it with what `python -m tools.doctor` prints"
                )
        sizes = ", ".join("x".join(map(str, size)) for size in CHECKED)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, within {error:.1e} of torch at {sizes}")
    return 0


def trace(fuser: Fuser, smallest_side: int) -> ExportedProgram:
    """The computation of `fuser` as a graph in which batch, height and width are free."""
    height, width = (Dim(name, min=smallest_side, max=LARGEST) for name in ("height", "width"))
    shape = {0: Dim("batch", min=1, max=LARGEST), 2: height, 3: width}
    example = torch.rand(EXAMPLE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # What torch cannot prove for every size (that 2 B images make two batches of B) is asked at run time instead.
        return torch.export.export(
            fuser,
            (example, 1 - example),
            dynamic_shapes=(shape, shape),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> Runner:
    """Writes an ONNX file, reads it back, and returns it as a function that onnxruntime runs."""
    import onnx
    import onnxruntime

    for name in ("torch.onnx", "onnxscript"):  # they miss torchvision, and tell of every node that stays as it is
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between torch's own modules
        made = torch.onnx.export(program, input_names=["vis", "ir"], output_names=["fused"], dynamo=True, verbose=False)
    vis = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "vis")
    names = {str(vis.meta["val"].shape[axis]): name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        value.shape = type(value.shape)([names.get(str(size), size) for size in value.shape])
    made.model.metadata_props.update({key: str(value) for key, value in about.items()})
    made.save(path, external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda vis, ir: torch.from_numpy(session.run(["fused"], {"vis": vis.numpy(), "ir": ir.numpy()})[0])


def write_pt2(program: ExportedProgram, path: Path, about: dict[str, Any]) -> Runner:
    """Writes a torch.export file with `about` in it as about.json, and returns what `torch.export.load` reads."""
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    return torch.export.load(path).module()


def largest_error(exported: Runner, fuser: Fuser) -> float:
    """The largest difference from torch, in [0, 1], over the sizes that are checked; inf where a shape differs."""
    random = torch.Generator().manual_seed(1)
    errors = []
    for batch, height, width in CHECKED:
        vis, ir = torch.rand(2, batch, 1, height, width, generator=random)
        with torch.no_grad():
            ours, theirs = fuser(vis, ir), exported(vis, ir)
        errors.append((ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf"))
    return max(errors)


if __name__ == "__main__":
    raise SystemExit(main())
