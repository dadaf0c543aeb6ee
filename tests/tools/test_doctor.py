"""tools/doctor.py: what is well is ok, what is not has a line of its own with what to do; crashes name it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import write_pair
from tools import doctor
from utils.common import ROOT, InputError, run_script
from utils.data.manifests import make_manifest
from zoo import find_system


def findings(check, *arguments):
    return [tuple(finding) for finding in check(*arguments)]


def states(check, *arguments):
    return [finding[0] for finding in findings(check, *arguments)]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of models/ and of the bundled pair that the doctor takes for the checkout."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    for modality in ("vi", "ir"):
        (tmp_path / "test_img" / doctor.PAIR[0] / modality).mkdir(parents=True)
        name = f"test_img/{doctor.PAIR[0]}/{modality}/{doctor.PAIR[1]}.png"
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(doctor, "in_checkout", tmp_path.joinpath)
    return tmp_path


def test_this_checkout_has_nothing_to_fix(capsys, monkeypatch):
    # What differs between machines that run the tests is left out; so are their benchmark folders, which are large.
    for check in ("check_gpu", "check_memory", "check_disk"):
        monkeypatch.setattr(doctor, check, lambda: iter(()))
    code = doctor.main(["--data", str(ROOT / "test_img")])
    out = capsys.readouterr().out
    assert code == 0 and out.endswith("nothing to fix\n"), out
    for name in ("CDDFuse_IVF.pth", "CDDFuse_MIF.pth"):
        assert f"known answer of {name}, cpu: Sample_IVF/underpass within 0.0" in out
        assert f"{name}: 158 keys fit CDDFuse, all finite" in out


def test_a_check_that_fails_is_a_line_and_the_others_go_on(capsys, monkeypatch):
    for check in ("check_packages", "check_gpu", "check_weights", "check_answers", "check_data"):
        monkeypatch.setattr(doctor, check, lambda *_: iter(()))

    def broken():
        yield doctor.Finding("ok", "memory", "so far")
        raise ImportError("libfoo.so is missing\nand more")

    monkeypatch.setattr(doctor, "check_memory", broken)
    assert doctor.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "FIX  memory: the check failed: ImportError: libfoo.so is missing" in lines
    assert lines[-2].startswith("ok   disk") and lines[-1] == "1 to fix"


def test_old_python_missing_and_old_packages_are_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert states(doctor.check_python) == ["FIX"]
    monkeypatch.setattr(doctor, "OLDEST_TORCH", "2.0")
    versions = {"torch": "2.12.1+cu128", "h5py": "3.9.0", "numpy": "2.4.6", "tqdm": "4.66"}

    def imported(name):
        if name not in versions:
            raise ImportError("libGL.so.1: cannot open shared object file")
        return SimpleNamespace(__version__=versions[name])

    monkeypatch.setattr(doctor.importlib, "import_module", imported)
    found = {finding.what: finding for finding in doctor.check_packages()}
    assert {name: finding.state for name, finding in found.items()} == {
        "torch": "note", "h5py": "FIX", "numpy": "ok", "opencv-python-headless": "FIX", "tqdm": "ok",
    }  # fmt: skip
    assert "libGL.so.1" in found["opencv-python-headless"].text and "older than 3.10" in found["h5py"].text


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch believe in a GPU of sm_89."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="Card", major=8, minor=9)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (5e9, 6e9))


def test_gpu_that_the_torch_build_does_not_know_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_90"])
    [(state, what, text)] = findings(doctor.check_gpu)
    assert (state, what) == ("FIX", "gpu 0") and "Card, sm_89 is not among" in text and "sm_70 sm_90" in text


@pytest.mark.parametrize(("right", "state"), [(True, "ok"), (False, "FIX")])
def test_gpu_has_to_multiply_rightly(gpu, monkeypatch, right, state):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_: x if right else x + 1)
    assert states(doctor.check_gpu) == [state]


@pytest.mark.parametrize(
    ("driver", "cuda", "state"), [(None, None, "ok"), ("nvidia-smi", None, "FIX"), ("nvidia-smi", "12.8", "FIX")]
)
def test_without_a_usable_gpu_a_driver_makes_the_difference(monkeypatch, driver, cuda, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert states(doctor.check_gpu) == [state]


def test_other_missing_and_damaged_weights_are_named_and_recording_settles_it(checkout, capsys):
    models = checkout / "models"
    torch.manual_seed(0)
    find_system("cddfuse")().save(models / "CDDFuse_IVF.pth")
    (models / "CDDFuse_MIF.pth").write_bytes(b"damaged")
    others = len(doctor.read_answers()) - 2
    found = findings(doctor.check_weights, ())
    assert [state for state, *_ in found] == ["FIX", "FIX"] + ["ok"] * others
    assert any("111 keys fit MLFuse, all finite" in text for *_, text in found[2:])
    assert "158 keys fit CDDFuse, all finite, but sha256" in found[0][2] and "is not the recorded" in found[0][2]
    assert "not a PyTorch checkpoint" in found[1][2]
    assert states(doctor.check_answers) == ["ok"] * others  # an unknown file has no known answer
    (models / "CDDFuse_MIF.pth").unlink()
    before = (models / "MLFuse.pth").read_bytes()
    assert states(doctor.check_weights, ()) == ["FIX", "FIX"] + ["ok"] * others
    assert doctor.main(["--record"]) == 0
    assert states(doctor.check_weights, ()) == states(doctor.check_answers) == ["ok"] * (1 + others)
    assert (models / "MLFuse.pth").read_bytes() == before


def test_weights_of_others_are_looked_into(tmp_path):
    system = find_system("cddfuse")()
    system.save(tmp_path / "good.pth")
    with torch.no_grad():
        system.decoder.reduce_channel.weight[0] = torch.nan
    system.save(tmp_path / "nan.pth")
    found = findings(doctor.check_weights, [tmp_path / name for name in ("good.pth", "nan.pth", "none.pth")])[-3:]
    assert [state for state, *_ in found] == ["ok", "FIX", "FIX"]
    assert "NaN or infinite" in found[1][2] and "no file at" in found[2][2]


def test_weights_of_another_system_are_looked_into(tmp_path):
    find_system("mlfuse")().save(tmp_path / "good.pth")
    fits, not_cddfuse, unknown = (
        findings(doctor.check_weights, [tmp_path / "good.pth"], name)[-1] for name in ("mlfuse", "cddfuse", "other")
    )
    assert fits[0] == "ok" and "fit MLFuse" in fits[2]
    assert not_cddfuse[0] == "FIX"
    assert unknown[0] == "FIX" and "no system is called 'other'" in unknown[2]


@pytest.mark.parametrize("damage", [lambda b: [b[0] + 1, *b[1:]], lambda b: [float("nan")] * len(b)])
def test_a_wrong_answer_is_named(checkout, monkeypatch, damage):
    known = json.loads((checkout / "models" / doctor.ANSWERS).read_text())
    monkeypatch.setattr(doctor, "answer", lambda path, system, device: damage(known[path.name]["blocks"]))
    assert states(doctor.check_answers) == ["FIX"] * len(known)


def test_data_folders_are_compared_with_the_manifests(tmp_path, monkeypatch):
    write_pair(tmp_path / "SMALL", ("vi", "ir"), "a.png", 0, size=(20, 24))
    manifests = [make_manifest(tmp_path / "SMALL"), {"set": "ABSENT", "files": {}}]
    monkeypatch.setattr("utils.data.manifests.read_manifests", lambda: manifests)
    assert states(doctor.check_data, tmp_path) == ["ok", "note"]
    (tmp_path / "SMALL" / "ir" / "a.png").unlink()
    found = findings(doctor.check_data, tmp_path)
    assert found[0][0] == "FIX" and "1 missing: ir/a.png" in found[0][2] and "ABSENT" in found[1][2]
    assert states(doctor.check_data, tmp_path / "none") == ["FIX"]


def test_little_memory_and_disk_are_named(monkeypatch):
    for free, state in ((None, "note"), (10**9, "FIX"), (10**10, "ok")):
        monkeypatch.setattr(doctor, "free_memory", lambda free=free: free)
        assert states(doctor.check_memory) == [state]
    for free, state in ((10**8, "FIX"), (10**10, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert states(doctor.check_disk) == [state]


def test_unexpected_crash_names_the_doctor_and_bad_input_does_not(capsys):
    def crash(args):
        raise ZeroDivisionError("oh")

    def refuse(args):
        raise InputError("bad")

    args = argparse.Namespace(debug=False)
    with pytest.raises(ZeroDivisionError) as caught:
        run_script(crash, args)
    assert "python -m tools.doctor" in caught.value.__notes__[0]
    assert run_script(refuse, args) == 2 and capsys.readouterr().err == "error: bad\n"
