"""tools/plot_training.py: runs in a row, what their last hours brought, and logs that are none."""

from __future__ import annotations

import json
import re

import cv2
import pytest

import train
from tools import plot_training
from utils.data.patches import PatchDataset
from utils.metrics import PAPER_TABLE


def line(
    epoch: int,
    loss: float,
    *,
    stage: str = "fusion",
    hours: float = 0.5,
    metrics: float | None = None,
    pairs: str | None = None,
) -> str:
    content = {"epoch": epoch, "stage": stage, "step": 10 * epoch, "losses": {"total": loss}, "seconds": 3600 * hours}
    if metrics is not None:
        content["validation"] = {"losses": {"total": loss}, "metrics": dict.fromkeys(PAPER_TABLE, metrics)}
        if pairs:
            content["validation"]["pairs"] = pairs
    return json.dumps(content) + "\n"


def test_what_train_writes_is_drawn_and_told(patch_file, tmp_path, capsys):
    run = tmp_path / "run"
    options = "--crop 16 --batch-size 3 --epoch-batches 2 --stage1-epochs 1 --stage2-epochs 2 --validate-every 1"
    said = ["--data", str(patch_file), "--out", str(run), "--device", "cpu", *options.split()]
    assert train.main(said) == 0
    capsys.readouterr()
    assert plot_training.main([str(run)]) == 0
    out = capsys.readouterr().out
    log = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert re.search(r"\| run \| decomposition \| 2 \|", out) and re.search(r"\| run \| fusion \| 4 \|", out)
    assert (
        f"| {log[-1]['losses']['total']:.4f} |" in out and f"| {log[-1]['validation']['metrics']['VIF']:.3f} |" in out
    )
    assert cv2.imread(str(run / "curves.png")).std() > 10
    assert log[1]["validation"]["pairs"] == PatchDataset(patch_file).validation_hash


def test_the_gain_is_counted_from_so_many_hours_before_the_end_over_all_runs(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second.jsonl"
    first.mkdir()
    (first / "log.jsonl").write_text(line(1, 9.0, stage="decomposition", metrics=9.0) + line(2, 2.0, metrics=1.0))
    second.write_text(line(1, 1.6, metrics=1.1) + line(2, 1.5) + line(3, 1.0, hours=1, metrics=1.2))
    out = tmp_path / "c.png"
    assert plot_training.main([str(first), str(second), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| first | decomposition | 10 | 0.5 |" in text and "| second | fusion | 30 | 2.0 | 1.6000 | 1.0000 |" in text
    # Two hours before the end is the end of the first run.
    assert "last 2.00 hours: total loss -50.00 %" in text and "mean gain of the metrics +20.00 %" in text
    assert plot_training.main([str(first), str(second), "--out", str(out), "--last-hours", "1.2"]) == 0
    assert "last 1.50 hours: total loss -37.50 %" in capsys.readouterr().out and out.exists()


def test_other_validation_pairs_are_not_compared_with(tmp_path, capsys):
    log, out = tmp_path / "log.jsonl", ["--out", str(tmp_path / "c.png")]
    of_others = line(1, 9.0, metrics=9.0, pairs="b")
    log.write_text(line(1, 3.0, metrics=1.0) + of_others + line(3, 2.0, metrics=1.5, pairs="a"))
    assert plot_training.main([str(log), *out]) == 0
    assert "last 1.00 hours: total loss -33.33 %" in capsys.readouterr().out  # since the line that names none
    log.write_text(of_others + line(2, 2.0, metrics=1.5, pairs="a"))
    assert plot_training.main([str(log), *out]) == 0
    assert "fewer than two looks at the same validation pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no log at"),
        ("", "has not finished an epoch"),
        (line(1, 2.0) + "{", "line 2: not a line"),
        ('{"epoch": 1}\n', "line 1: not a line"),
        ("[1]\n", "line 1: not a line"),
    ],
)
def test_what_is_no_log_is_one_line(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert plot_training.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and not (tmp_path / "curves.png").exists()
