"""hubconf.py through torch.hub, in a process of its own, as somebody else's code would."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import hubconf
from utils.common import ROOT, InputError
from zoo import SYSTEMS


def elsewhere(code, folder):
    environment = {**os.environ, "TORCH_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", f"import torch\nrepo = {str(ROOT)!r}\n{code}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_models_are_loaded_by_name_from_any_folder(tmp_path):
    code = """
model = torch.hub.load(repo, "cddfuse", source="local", task="mif", normalised=False)
with torch.no_grad():
    fused = model(torch.rand(2, 1, 20, 24), torch.rand(2, 1, 20, 24))
print(type(model).__name__, model.weights.name, model.skip, model.training, tuple(fused.shape))
"""
    done = elsewhere(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Fuser CDDFuse_MIF.pth none False (2, 1, 20, 24)\n"


def test_every_system_has_a_name_and_nothing_else_has_one():
    # What torch.hub lists: everything that can be called and has a public name; and what it prints as help.
    names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert names == sorted(SYSTEMS)
    assert "The system mlfuse with the weights" in hubconf.mlfuse.__doc__


def test_another_module_of_one_of_our_names_is_named(tmp_path):
    (tmp_path / "utils.py").write_text("")
    done = elsewhere('import utils\ntorch.hub.load(repo, "cddfuse", source="local")', tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path / 'utils.py'} is imported already under the name utils" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"task": "x"}, "no task is called 'x'"), ({"skip": "x"}, "unknown to CDDFuse"), ({"weights": "x.pth"}, "x.pth")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        hubconf.cddfuse(**arguments)
