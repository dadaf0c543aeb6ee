"""The snippets of docs/extending.md do what the page says."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import train
import zoo
from tests.test_documents import blocks
from tests.training.test_train import run
from utils import metrics
from utils.common import ROOT
from zoo import Batch

SNIPPETS = blocks(ROOT / "docs/extending.md", "python")


def names_of(number: int) -> dict:
    names = {"__name__": "snippet"}
    exec(compile(SNIPPETS[number], "docs/extending.md", "exec"), names)
    return names


@pytest.fixture
def batch():
    return Batch(*torch.rand(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_there_are_four_of_under_thirty_lines():
    assert [len(snippet.splitlines()) < 30 for snippet in SNIPPETS] == [True] * 4


def test_loss_term_is_in_the_total_of_the_fusion_stage(batch):
    model = names_of(0)["Brighter"]()
    first, second = (stage.losses(batch) for stage in model.stages(model.Options(), "ivf"))
    assert "brightness" not in first
    plain = second["fusion"] + 2 * second["decomposition"]
    torch.testing.assert_close(second["total"], plain + 0.5 * second["brightness"])


def test_block_is_trained_and_saved(batch, tmp_path):
    model = names_of(1)["Gated"]()
    model.stages(model.Options(), "ivf")[1].losses(batch)["total"].backward()
    assert model.encoder.patch_embed[1].weigh.weight.grad.abs().max() > 0
    model.save(tmp_path / "w.pth")
    model.load_published(tmp_path / "w.pth")


def test_network_is_trained_by_the_script(patch_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "snippet", types.ModuleType("snippet"))
    sys.modules["snippet"].Tiny = names_of(2)["Tiny"]
    monkeypatch.setitem(zoo.SYSTEMS, "tiny", ("snippet", "Tiny"))
    argv = ["--system", "tiny", "--data", str(patch_file), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train.main([*argv, "--batch-size", "3"]) == 0
    assert (tmp_path / "run/Tiny_IVF.pth").exists() and (tmp_path / "run/Tiny_IVF_best.pth").exists()


def test_metric_is_scored(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "METRICS", {**metrics.METRICS})  # what is added there goes again
    names = names_of(3)
    assert f"'MG': {names['image'].mean()}" in capsys.readouterr().out


def test_first_line_of_a_plain_call_names_the_recipe_and_the_other(patch_file, tmp_path, capsys):
    argv = ["--data", str(patch_file), "--out", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "4"]
    assert train.main([*argv, "--crop", "16", "--max-minutes", "1e-6"]) == 75
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "recipe ours; the published one: --recipe published"
    assert run(patch_file, tmp_path / "published", "--max-minutes", "1e-6") == 75
    assert "--recipe" not in capsys.readouterr().out.splitlines()[0]
