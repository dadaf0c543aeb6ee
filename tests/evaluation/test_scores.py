"""Tables: the published layout to the character, means over what was scored, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math

import pytest

from utils.evaluation.scores import ScoreSheet, format_excluded, format_table
from utils.metrics import PAPER_TABLE


def sheet(label="CDDFuse    ", **columns):
    names = [f"{i}" for i in range(len(next(iter(columns.values()))))]
    return ScoreSheet(label, {n: {c: v[i] for c, v in columns.items()} for i, n in enumerate(names)})


def test_table_has_the_published_layout():
    values = dict(zip(PAPER_TABLE, (7.124, 46.0, 13.15, 2.19, 1.76, 0.77, 0.54, 1.03), strict=True))
    text = format_table("TNO", [ScoreSheet("CDDFuse    ", {"01": values})])
    assert text == (
        "\n\n" + "=" * 80 + "\n"
        "The test result of TNO :\n"
        "\t\t EN\t SD\t SF\t MI\tSCD\tVIF\tQabf\tSSIM\n"
        "CDDFuse    \t7.12\t46.0\t13.15\t2.19\t1.76\t0.77\t0.54\t1.03\n" + "=" * 80
    )


def test_mean_is_over_the_scored_images():
    assert sheet(EN=[1.0, 2.0, 6.0]).mean() == {"EN": 3.0}


def test_images_without_a_value_are_left_out_and_counted():
    scores = sheet(EN=[1.0, 2.0], SCD=[math.nan, 4.0], MI=[math.nan, math.nan])
    assert scores.mean()["SCD"] == 4.0
    assert math.isnan(scores.mean()["MI"])
    assert scores.excluded() == {"SCD": 1, "MI": 2}
    wanted = "CDDFuse: no value for SCD of 1, MI of 2 of 2 images; left out of the mean"
    assert format_excluded([scores]) == [wanted]


def test_infinite_values_are_kept():
    assert sheet(PSNR=[math.inf, 1.0]).mean()["PSNR"] == math.inf


def test_files_hold_every_image_and_unrounded_means(tmp_path):
    scores = sheet(EN=[1.0, 2.0 / 3], SCD=[math.nan, math.nan])
    scores.write(tmp_path, {"protocol": "paper"})
    rows = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert rows[0] == ["image", "EN", "SCD"]
    assert float(rows[2][1]) == 2 / 3
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["mean"]["EN"] == pytest.approx(5 / 6, abs=1e-15)
    assert content["mean"]["SCD"] is None
    assert content["pairs"] == 2 and content["protocol"] == "paper"
