"""tools/doctor.py: what is well is ok, and what is not has a line of its own with what to do."""

from __future__ import annotations

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import write_pair
from tools import doctor
from utils.common import ROOT, Parser, run_script
from utils.data.manifests import make_manifest
from zoo import find_system

ARGS = argparse.Namespace(weights=[], system="mlfuse", data=None)


def states(findings):
    return [state for state, *_ in findings]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Weights of MLFuse, their known answer and the bundled pair, which the doctor takes for the checkout."""
    for folder in ("models", "test_img/Sample_IVF/vi", "test_img/Sample_IVF/ir"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("models/MLFuse.pth", *(f"test_img/Sample_IVF/{m}/{doctor.PAIR[1]}.png" for m in ("vi", "ir"))):
        shutil.copy(ROOT / name, tmp_path / name)
    known = json.loads((ROOT / "models/known_answers.json").read_text())
    (tmp_path / "models/known_answers.json").write_text(json.dumps({"MLFuse.pth": known["MLFuse.pth"]}))
    monkeypatch.setattr(doctor, "in_checkout", tmp_path.joinpath)
    return tmp_path


@pytest.mark.slow
def test_this_checkout_has_nothing_to_fix(capsys, monkeypatch):
    for check in ("check_gpu", "check_space"):  # of the machine that runs the tests
        monkeypatch.setattr(doctor, check, lambda args: ())
    code = doctor.main(["--data", str(ROOT / "test_img")])
    out = capsys.readouterr().out
    assert code == 0 and out.endswith("nothing to fix\n") and out.count("underpass is as expected") >= 6, out


def test_a_check_that_fails_is_a_line_and_the_others_go_on(capsys, monkeypatch):
    for check in ("check_packages", "check_weights", "check_data"):
        monkeypatch.setattr(doctor, check, lambda args: ())

    def check_gpu(args):
        yield "ok", "gpu", "so far"
        raise ImportError("libfoo.so is missing\nand more")

    monkeypatch.setattr(doctor, "check_gpu", check_gpu)
    monkeypatch.setattr(doctor.common, "free_memory", lambda: 10**8)
    assert doctor.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["ok   gpu: so far", "FIX  gpu: the check failed: ImportError: libfoo.so is missing"]
    assert lines[3] == "FIX  memory: 0.1 GB free; 2 are needed" and lines[-1] == "2 to fix"


def test_missing_and_old_packages_are_named(monkeypatch):
    versions = {"torch": "2.12.1+cu128", "h5py": "3.9.0", "numpy": "2.4.6"}

    def imported(name):
        if name not in versions:
            raise ImportError("libGL.so.1: cannot open shared object file")
        return SimpleNamespace(__version__=versions[name])

    monkeypatch.setattr(doctor.importlib, "import_module", imported)
    found = {what: (state, text) for state, what, text in doctor.check_packages(ARGS)}
    assert found["torch"][0] == "note" and found["numpy"][0] == "ok"
    assert found["h5py"] == ("FIX", "3.9.0 where requirements.txt has >=3.10; run `pip install -r requirements.txt`")
    assert found["opencv-python-headless"][0] == "FIX" and "libGL.so.1" in found["opencv-python-headless"][1]


def test_other_damaged_and_missing_weights_are_named(checkout):
    path = checkout / "models/MLFuse.pth"
    assert states(doctor.check_weights(ARGS)) == ["ok"]
    system = find_system("mlfuse")()
    system.save(path)
    [(state, what, text)] = doctor.check_weights(ARGS)
    assert state == "FIX" and what == f"{path} on cpu" and "another file than was recorded" in text
    next(system.parameters()).data[:] = torch.nan
    system.save(checkout / "nan.pth")
    path.write_bytes(b"damaged")
    others = argparse.Namespace(weights=[checkout / "nan.pth", checkout / "none.pth"], system="mlfuse")
    found = list(doctor.check_weights(others))
    assert states(found) == ["FIX"] * 3
    assert "git checkout" in found[0][2] and "NaN" in found[1][2] and "no file at" in found[2][2]


def test_data_folders_are_compared_with_the_manifests(tmp_path, monkeypatch):
    write_pair(tmp_path / "SMALL", ("vi", "ir"), "a.png", 0, size=(20, 24))
    manifests = [make_manifest(tmp_path / "SMALL"), {"set": "ABSENT", "files": {}}]
    monkeypatch.setattr("utils.data.manifests.read_manifests", lambda: manifests)
    assert states(doctor.check_data(argparse.Namespace(data=tmp_path))) == ["ok", "note"]
    (tmp_path / "SMALL" / "ir" / "a.png").unlink()
    assert "1 missing: ir/a.png" in next(doctor.check_data(argparse.Namespace(data=tmp_path)))[2]
    assert states(doctor.check_data(argparse.Namespace(data=tmp_path / "none"))) == ["FIX"]


def test_unexpected_crash_names_the_doctor():
    with pytest.raises(ZeroDivisionError) as caught:
        run_script(lambda args: 1 // 0, Parser(), [])
    assert "python -m tools.doctor" in caught.value.__notes__[0]
