"""benchmarks.recipes: how many steps each row gets, and what of its log is shown."""

from __future__ import annotations

import argparse
import json

import pytest

import train
from benchmarks import recipes


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(recipes, "run", lambda call: train.main(call) and pytest.fail("train.py did not train"))


def test_rows_get_the_steps_asked_for_and_show_what_their_log_says(patch_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "PROBE_STEPS", 1)
    short = "--stage1-epochs 1 --stage2-epochs 2 --batch-size 2 --crop 0"
    rows = [f"ours {short}", f"ours {short} --optimizer adam"]
    argv = ["--data", str(patch_file), "--steps", "6", "--device", "cpu", "--recipes", *rows]
    assert recipes.main([*argv, "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "numbers.json")]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers["recipes"]) == rows and numbers["about"]["steps"] == 6
    for number, (row, line) in enumerate(zip(rows, table, strict=True), 1):
        log = (tmp_path / f"runs/{number}/run/log.jsonl").read_text().splitlines()
        said = json.loads(log[-1])["validation"]
        assert len(log) == 3
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [row, "6", "12"]
        assert float(cells[4]) == pytest.approx(said["losses"]["total"], abs=1e-4)
        assert float(cells[5]) == pytest.approx(said["metrics"]["EN"], abs=1e-3)


def test_minutes_are_shared_by_the_time_of_a_step(patch_file, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "probe", lambda *args: {"stage1_epochs": 1.0, "stage2_epochs": 0.5})
    asked = {"system": "cddfuse", "task": "ivf", "device": "cpu", "data": patch_file}
    args = argparse.Namespace(**asked, minutes=17 / 6, steps=None)
    call, batch_size = recipes.plan("ours --batch-size 4", args, tmp_path)
    # 4 epochs of decomposition at 1 s a step and 26 of fusion at 0.5 s: 17 s for each step of an epoch, of 170.
    assert call[call.index("--epoch-batches") + 1] == "10" and batch_size == 4
