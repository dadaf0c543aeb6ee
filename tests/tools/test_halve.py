"""tools/halve.py: half the bytes, nearly the same weights, nothing written over."""

from __future__ import annotations

import pytest
import torch

from tools import halve
from utils.inference.checkpoint import read_file
from zoo import find_system


@pytest.mark.parametrize("name", ["mlfuse", "tsdm"])
def test_weights_take_half_the_bytes_and_stay_nearly_the_same(name, tmp_path, capsys):
    torch.manual_seed(0)
    system = find_system(name)()
    whole, half = tmp_path / "whole.pth", tmp_path / "half.pth"
    system.save(whole, {"task": "ivf"})
    assert halve.main([str(whole), str(half), "--system", name]) == 0
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert "half.pth: " in capsys.readouterr().out and read_file(half)["about"] == {"task": "ivf"}
    before = {key: value.clone() for key, value in system.state_dict().items()}
    assert system.load_published(half) == {"task": "ivf"}
    after = system.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=2**-11, atol=1e-7)


def test_what_cannot_be_halved_is_one_line_and_changes_nothing(tmp_path, capsys):
    there = tmp_path / "there.pth"
    there.write_bytes(b"mine")
    for weights, out, said in (
        (there, tmp_path / "new.pth", "not a PyTorch checkpoint"),
        (tmp_path / "none.pth", tmp_path / "new.pth", "no file at"),
        (there, there, "exists; remove it first"),
    ):
        assert halve.main([str(weights), str(out), "--system", "mlfuse"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err
    assert there.read_bytes() == b"mine" and not (tmp_path / "new.pth").exists()
