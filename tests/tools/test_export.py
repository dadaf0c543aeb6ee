"""tools/export.py: both files answer as torch does, at any batch and size, and what goes wrong is one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.conftest import formula_image, set_formula_weights
from tools import export
from utils.common import ROOT
from utils.data.images import read_grey
from utils.inference.fusing import Fuser, to_levels, to_network
from zoo import find_system

pytestmark = pytest.mark.slow  # tracing takes half a minute


def make_system(name):
    torch.manual_seed(5)
    system = find_system(name)().eval()
    if name == "mlfuse":
        with torch.no_grad():
            set_formula_weights(system)
        return system
    # One block of each kind: a graph of the whole network takes minutes, and every run of the tool checks it.
    system.encoder.encoder_level1 = nn.Sequential(system.encoder.encoder_level1[0])
    system.encoder.detailFeature.net = nn.Sequential(system.encoder.detailFeature.net[0])
    system.decoder.encoder_level2 = nn.Sequential(system.decoder.encoder_level2[0])
    return system


@pytest.fixture(scope="session", params=["cddfuse", "mlfuse"])
def exported(request, tmp_path_factory):
    """(name, the module that was exported, folder of both files, both files as functions), from one run of the tool."""
    folder = tmp_path_factory.mktemp(request.param)
    skip = "vis" if request.param == "cddfuse" else "none"
    fuser = Fuser(make_system(request.param), Path("w.pth"), skip, sha256="a" * 64).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_fuser", lambda *args, **options: fuser)
        assert export.main(["--system", request.param, "--out", str(folder)]) == 0
    session = onnxruntime.InferenceSession(str(folder / "w.onnx"), providers=["CPUExecutionProvider"])
    runners = {
        "onnx": lambda vis, ir: torch.from_numpy(session.run(None, {"vis": vis.numpy(), "ir": ir.numpy()})[0]),
        "pt2": torch.export.load(folder / "w.pt2").module(),
    }
    return request.param, fuser, folder, runners


@pytest.mark.parametrize("size", [(1, 0, 0), (1, 26, 3), (4, 7, 40)])  # batch, and pixels beyond the smallest side
def test_both_files_answer_as_torch_does_from_the_smallest_side_up(exported, size):
    name, fuser, _, runners = exported
    height, width = (side + export.SMALLEST_SIDES[name] for side in size[1:])
    vis, ir = (formula_image(c, height, width).repeat(size[0], 1, 1, 1) for c in (0.3, 1.1))
    vis = vis * torch.linspace(0.5, 1, size[0])[:, None, None, None]  # the images of a batch differ
    for kind, runner in runners.items():
        with torch.no_grad():
            want = fuser(vis, ir)
            # Stretching a small image of a network without training magnifies rounding.
            assert (runner(vis, ir) - want).abs().max() <= 1e-5, kind
        assert want.min() == 0 and want.max() == 1


def test_files_say_what_they_are(exported):
    name, fuser, folder, _ = exported
    model = onnx.load(folder / "w.onnx")
    about = {item.key: item.value for item in model.metadata_props}
    assert about["system"] == fuser.system.label and about["smallest_side"] == str(export.SMALLEST_SIDES[name])
    assert about["weights_sha256"] == fuser.sha256 and about["skip"] == fuser.skip and about["commit"]
    for value in (*model.graph.input, *model.graph.output):
        sizes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert sizes == ["batch", 1, "height", "width"]
    extra = {"about.json": ""}
    torch.export.load(folder / "w.pt2", extra_files=extra)
    assert {key: str(value) for key, value in json.loads(extra["about.json"]).items()} == about


def test_a_file_that_differs_from_torch_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "trace", lambda *args: None)

    def write(program, path, about):
        path.write_bytes(b"new")
        return lambda vis, ir: torch.zeros_like(vis)

    monkeypatch.setattr(export, "write_pt2", write)
    (tmp_path / "CDDFuse_IVF.pt2").write_bytes(b"old")
    assert export.main(["--formats", "pt2", "--out", str(tmp_path)]) == 2
    assert "was not written: it differs from torch by 1" in capsys.readouterr().err
    assert (tmp_path / "CDDFuse_IVF.pt2").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_missing_package_is_named_with_the_command_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main(["--formats", "onnx", "--out", str(tmp_path)]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_the_snippet_of_the_docs_fuses_in_colour(exported, tmp_path, monkeypatch):
    _, fuser, folder, _ = exported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    shutil.copy(folder / "w.onnx", "exported/CDDFuse_IVF.onnx")
    for name in ("vi", "ir"):
        image = cv2.imread(str(ROOT / f"test_img/Sample_IVF/{name}/underpass.png"))
        cv2.imwrite(f"{name}.png", image[60:100, 40:100])
    [snippet] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/deployment.md").read_text(), re.S | re.M)
    exec(compile(snippet, "deployment.md", "exec"), {})
    fused, vis = cv2.imread("fused.png"), read_grey(Path("vi.png"))
    with torch.no_grad():
        want = to_levels(fuser(to_network(vis), to_network(read_grey(Path("ir.png")))))
    blue_is_more = [(image[..., 0].astype(int) - image[..., 2]).ravel() for image in (fused, cv2.imread("vi.png"))]
    assert np.abs(cv2.cvtColor(fused, cv2.COLOR_BGR2GRAY) - want).mean() < 3  # colours beyond the range are clipped
    assert np.corrcoef(*blue_is_more)[0, 1] > 0.9
