"""Paired tests, intervals: by hand, against scipy, and on the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, rankdata, wilcoxon

from utils.evaluation.scores import Row, ScoreSheet
from utils.evaluation.statistics import bootstrap_interval, compare, format_statistics, holm, mean_intervals


def row(method, baseline=False, protocol="paper", **columns):
    names = [f"{i:02d}" for i in range(len(next(iter(columns.values()))))]
    images = {name: {key: values[i] for key, values in columns.items()} for i, name in enumerate(names)}
    return Row(method, protocol, ScoreSheet(method, images), baseline)


def test_holm_by_hand():
    # Sorted 0.01 0.02 0.03 0.2: times 4, 3, 2, 1 = 0.04 0.06 0.06 0.2.
    assert holm([0.2, 0.01, 0.03, 0.02]) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])  # never above 1, never falling


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm([0.02, math.nan, 0.03])
    assert [adjusted[0], adjusted[2]] == pytest.approx([0.04, 0.04]) and math.isnan(adjusted[1])
    assert holm([]) == []


def test_a_comparison_is_the_wilcoxon_test_of_scipy():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(7.2, 0.3, 30), rng.normal(7.0, 0.3, 30)
    found = compare([row("ours", EN=ours), row("theirs", EN=theirs)], row("theirs", EN=theirs))
    assert len(found) == 1 and found[0].method == "ours" and found[0].images == 30
    assert found[0].p == found[0].p_holm == wilcoxon(ours, theirs).pvalue
    assert found[0].difference == pytest.approx(np.mean(ours - theirs), rel=1e-12)
    difference = ours - theirs
    ranks = rankdata(np.abs(difference))
    want = (ranks[difference > 0].sum() - ranks[difference < 0].sum()) / ranks.sum()
    assert found[0].effect == pytest.approx(want, rel=1e-12)


def test_every_test_of_a_call_is_in_the_family_of_holm():
    rng = np.random.default_rng(1)
    rows = [row(name, EN=rng.normal(0, 1, 12), MSE=rng.normal(0, 1, 12)) for name in "abc"]
    found = compare(rows, rows[0])
    assert [(c.method, c.metric) for c in found] == [("b", "EN"), ("b", "MSE"), ("c", "EN"), ("c", "MSE")]
    assert [c.p_holm for c in found] == holm([c.p for c in found])


def test_verdict_follows_the_direction_of_the_metric():
    low, high = np.arange(20.0), np.arange(20.0) + 5
    rows = [row("low", EN=low, MSE=low), row("high", EN=high, MSE=high)]
    assert [c.verdict() for c in compare(rows, rows[0])] == ["better", "worse"]
    assert [c.verdict() for c in compare(rows, rows[1])] == ["worse", "better"]
    assert [c.effect for c in compare(rows, rows[0])] == [1, 1]


def test_methods_that_agree_everywhere_do_not_differ():
    rows = [row("a", EN=[1.0, 2, 3]), row("b", EN=[1.0, 2, 3])]
    (found,) = compare(rows, rows[0])
    assert found.p == 1 and found.difference == 0 and found.verdict() == "-" and math.isnan(found.effect)


def test_only_images_with_a_finite_value_on_both_sides_are_compared():
    a = row("a", EN=[1.0, 2, math.nan, math.inf, 5, 6])
    b = row("b", EN=[2.0, math.nan, 3, 4, 7, 9])
    (found,) = compare([a], b)
    assert found.images == 3 and found.difference == pytest.approx(-2)
    (nothing,) = compare([row("a", SCD=[math.nan] * 3)], row("b", SCD=[1.0, 2, 3]))
    assert nothing.images == 0 and math.isnan(nothing.p) and nothing.verdict() == "-"


def test_images_are_paired_by_name():
    a = Row("a", "paper", ScoreSheet("a", {"x": {"EN": 1.0}, "y": {"EN": 2.0}}))
    b = Row("b", "paper", ScoreSheet("b", {"y": {"EN": 5.0}, "z": {"EN": 9.0}}))
    (found,) = compare([a], b)
    assert found.images == 1 and found.difference == -3


def test_baselines_and_other_protocols_are_not_tested_but_a_baseline_can_be_the_reference():
    a, other = row("a", EN=[1.0, 2]), row("a2", protocol="standard", EN=[1.0, 2])
    average = row("average", baseline=True, EN=[0.0, 0])
    assert compare([a, average, other], a) == []
    assert [c.method for c in compare([a, average, other], average)] == ["a"]


def test_interval_is_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(3).gamma(2, 2, 40)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    # Two random sets of resamples: their quantiles differ by a few per cent of the interval's width.
    assert bootstrap_interval(values) == pytest.approx(tuple(theirs), abs=0.05 * (theirs[1] - theirs[0]))
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_intervals_of_few_values():
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
    assert all(map(math.isnan, bootstrap_interval([])))
    assert mean_intervals(row("a", EN=[2.0, 2, math.nan], PSNR=[math.inf, 1, 1])) == {"EN": (2, 2), "PSNR": (1, 1)}


def test_text_names_the_tests_and_shows_no_nan():
    rows = [row("a", EN=[1.0, 2], SCD=[math.nan] * 2), row("b", EN=[2.0, 4], SCD=[1.0, 1])]
    intervals = {r.method: mean_intervals(r) for r in rows}
    text = "\n".join(format_statistics(intervals, compare(rows, rows[1]), "b", 2))
    assert "Wilcoxon" in text and "method minus b" in text and "nan" not in text
    assert "1.00..2.00" in text and "-1.50" in text
