"""docs/troubleshooting.md answers what users ask, and names what is there. tests/test_commands.py runs its commands."""

from __future__ import annotations

import re

import pytest

from utils.common import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def test_named_files_exist():
    for name in re.findall(r"`((?:utils|tools|models|manifests)/[\w./]*)`", PAGE):
        assert (ROOT / name).exists(), name


def test_every_pain_has_a_section():
    assert list(SECTIONS) == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize(
    ("section", "answer"),
    [
        (1, "--compare-protocols"), (2, "fuse.py"), (3, "--annotations"), (4, "--seed"), (5, "fuse.py"),
        (5, "--homography"), (6, "--verify-data"), (7, "own_data.md"), (8, "paper_vs_code.md"), (9, "requirements.txt"),
        (10, "--task mif"), (11, "--max-memory"), (12, "Any from 2 x 2"), (13, "tools.doctor"), (14, "tools.download"),
        (15, "--bits 16"),
    ],
)  # fmt: skip
def test_the_most_frequent_pains_are_answered_with_what_to_run_or_read(section, answer):
    assert answer in SECTIONS[str(section)]
