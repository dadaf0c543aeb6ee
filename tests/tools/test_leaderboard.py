"""The leaderboard: the tables in results/ are sound, the page is drawn from them, ranks by hand, bad rows refused."""

from __future__ import annotations

import shutil

import pytest

from tools import leaderboard
from utils.common import ROOT
from utils.metrics import PAPER_TABLE


def test_the_tables_are_sound_and_the_page_is_drawn_from_them(capsys):
    assert leaderboard.main(["--check"]) == 0, capsys.readouterr().err


def test_mean_ranks_by_hand():
    table = {"a": {"EN": "7", "MSE": "3"}, "b": {"EN": "6", "MSE": "1"}, "vi only": {"EN": "6", "MSE": ""}}
    rows = [{"method": name} | values for name, values in table.items()]
    found = {one.row["method"]: one.mean for one in leaderboard.rank(rows, ["EN", "MSE"])}
    assert found == {"a": 1.5, "b": 1.75, "vi only": 2.5}  # EN 1, 2.5, 2.5; MSE 2, 1, -
    assert list(found) == ["a", "b", "vi only"]


@pytest.fixture
def copies(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("manifests"))
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(leaderboard, "PAGE", tmp_path / "leaderboard.md")
    return tmp_path


def test_page_and_picture_are_drawn(copies, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib comes with requirements-dev.txt")
    assert leaderboard.main(["--check"]) == 2 and "was not drawn from" in capsys.readouterr().err
    assert leaderboard.main([]) == 0 == leaderboard.main(["--check"])
    text = (copies / "leaderboard.md").read_text()
    assert "## TNO, 25 pairs, images 48d9bbf2d286, protocol paper" in text and "*average*" in text
    assert (copies / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ""),
        ("images", "41be8d7c0acd"),  # of other images than those of the published list
        ("protocol", ""),
        ("protocol", "toolbox"),
        ("pairs", "0"),
        ("commit", ""),
        (PAPER_TABLE[0], "nan"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(copies, capsys, column, value):
    path = copies / "results" / "TNO.csv"
    header, *rows = path.read_text().splitlines()
    row = rows[-1].split(",")
    row[header.split(",").index(column)] = value
    path.write_text("\n".join([header, *rows[:-1], ",".join(row)]) + "\n")
    assert leaderboard.main(["--check"]) == 2
    assert f"row {len(rows)} has {column} {value!r}" in capsys.readouterr().err
