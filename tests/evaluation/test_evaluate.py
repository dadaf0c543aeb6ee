"""evaluate.py: from folders of fused images to tables, files and exit codes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

import evaluate
from tests.conftest import write_pair
from utils.common import ROOT
from utils.data.images import read_grey, write_image
from utils.data.manifests import list_hash, make_manifest, pair_hash
from utils.data.pairs import list_pairs
from utils.evaluation import folders
from utils.evaluation.tables import read_results
from utils.metrics import METRICS, PAPER_TABLE, TABLES, score

NAMES = ("01", "02", "b.x")


@pytest.fixture
def scene(tmp_path):
    """SMALL/{vi,ir} with three pairs, and two methods."""
    for seed, name in enumerate(NAMES):
        write_pair(tmp_path / "SMALL", ("vi", "ir"), f"{name}.png", seed, size=(43, 51))
        vis, ir = (read_grey(tmp_path / "SMALL" / modality / f"{name}.png") for modality in ("vi", "ir"))
        write_image(tmp_path / "Maximum" / f"{name}.bmp", np.maximum(vis, ir))
        write_image(tmp_path / "Mixture" / f"{name}.png", 0.3 * vis + 0.7 * ir)
    write_image(tmp_path / "SMALL" / "none" / "z.png", np.zeros((43, 51)))
    return tmp_path


def run(capsys, *options):
    code = evaluate.main([str(option) for option in ("--jobs", 1, *options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def run_json(capsys, *options):
    code, out, err = run(capsys, "--format", "json", *options)
    return code, json.loads(out), err


def sources(scene, name):
    return [read_grey(scene / "SMALL" / modality / f"{name}.png") for modality in ("ir", "vi")]


def means(scene, folder, suffix, protocol="paper", names=NAMES):
    scores = [score(read_grey(scene / folder / f"{n}{suffix}"), *sources(scene, n), protocol) for n in names]
    return {key: np.mean([values[key] for values in scores]) for key in PAPER_TABLE}


def test_rows_are_the_means_of_the_scores_of_the_files(scene, capsys):
    code, found, _ = run_json(capsys, "--fused", scene / "Maximum", scene / "Mixture", "--data", scene / "SMALL")
    assert code == 0
    assert [row["method"] for row in found["rows"]] == ["Maximum", "Mixture"]
    for row, suffix in zip(found["rows"], (".bmp", ".png"), strict=True):
        assert row["mean"] == pytest.approx(means(scene, row["method"], suffix), rel=1e-12)
        assert (row["protocol"], row["pairs"], row["excluded"]) == ("paper", 3, {})
        assert row["images"] == make_manifest(scene / "SMALL")["images"]
    assert found["rows"][0]["commit"] and found["numpy"] == np.__version__


def test_exchanged_sources_and_more_processes_change_nothing(scene, capsys):
    fused = ("--fused", scene / "Maximum", "--format", "json")
    first = run(capsys, *fused, "--ir", scene / "SMALL" / "ir", "--vi", scene / "SMALL" / "vi")
    second = run(capsys, *fused, "--ir", scene / "SMALL" / "vi", "--vi", scene / "SMALL" / "ir", "--jobs", 2)
    assert first[0] == second[0] == 0 and first[1] == second[1]


def test_table_names_directions_protocol_pairs_images_and_commit(scene, capsys):
    options = ("--fused", scene / "Maximum", "--data", scene / "SMALL", "--metrics", "EN", "MSE")
    _, out, _ = run(capsys, *options, "--protocol", "standard")
    header, row, facts, about = out.splitlines()
    assert header.split() == ["method", "EN↑", "MSE↓"]
    assert row.split()[0] == "Maximum"
    hash = make_manifest(scene / "SMALL")["images"][:12]
    assert facts.startswith(f"protocol standard, 3 pairs, images {hash}, commit ")
    assert about.startswith("standard: textbook")


def test_baselines_are_the_sources_and_their_average(scene, capsys):
    code, found, _ = run_json(capsys, "--baselines", "--data", scene / "SMALL", "--metrics", "SD", "MI")
    assert code == 0
    assert [(row["method"], row["baseline"]) for row in found["rows"]] == [
        ("vi only", True), ("ir only", True), ("average", True),
    ]  # fmt: skip
    vis = [np.std(sources(scene, name)[1], dtype=np.float64) for name in NAMES]
    assert found["rows"][0]["mean"]["SD"] == pytest.approx(np.mean(vis), rel=1e-9)
    halves = [np.floor((sum(sources(scene, name)) / 2) + 0.5) for name in NAMES]
    want = np.mean([np.std(half, dtype=np.float64) for half in halves])
    assert found["rows"][2]["mean"]["SD"] == pytest.approx(want, rel=1e-9)


def test_every_protocol_side_by_side(scene, capsys):
    options = ("--fused", scene / "Mixture", "--data", scene / "SMALL", "--compare-protocols")
    code, found, err = run_json(capsys, *options)
    assert code == 0 and "Mixture: grey images beside sources in colour, which vifb does not score" in err
    assert [row["protocol"] for row in found["rows"]] == ["paper", "standard", "tang-2022", "tang-2023"]
    for row in found["rows"]:
        want = means(scene, "Mixture", ".png", row["protocol"])
        assert (row["mean"]["SSIM"] is None) == row["protocol"].startswith("tang")
        assert {key: row["mean"][key] for key in want if not np.isnan(want[key])} == pytest.approx(
            {key: value for key, value in want.items() if not np.isnan(value)}, rel=1e-12
        )
    _, out, _ = run(capsys, *options)
    header, *lines = out.split("\n\n")[0].splitlines()
    assert header.split()[:5] == ["Mixture", "paper", "standard", "tang-2022", "tang-2023"]
    assert next(line for line in lines if line.startswith("MSE↓")).endswith("tang: on 0..1, divided by 255^2")
    assert "tang-2022: " in out and "(also called toolbox)" in out


def test_vifb_scores_colours_channel_by_channel(scene, capsys):
    options = ("--data", scene / "SMALL", "--protocol", "vifb")
    for name in NAMES:
        vis, ir = (cv2.imread(str(scene / "SMALL" / role / f"{name}.png")) for role in ("vi", "ir"))
        (scene / "Colour").mkdir(exist_ok=True)
        cv2.imwrite(str(scene / "Colour" / f"{name}.png"), np.maximum(vis, ir))
    _, found, _ = run_json(capsys, "--fused", scene / "Colour", *options, "--baselines")
    assert list(found["rows"][0]["mean"]) == list(TABLES["vifb"])
    _, found, _ = run_json(capsys, "--fused", scene / "Colour", *options, "--metrics", "SF", "Qcv", "RMSE")
    folders = ("Colour", "SMALL/ir", "SMALL/vi")
    want = [
        score(*(cv2.imread(str(scene / folder / f"{name}.png"))[..., ::-1] for folder in folders),
              "vifb", metrics=["SF", "Qcv", "RMSE"])
        for name in NAMES
    ]  # fmt: skip
    for key, value in found["rows"][0]["mean"].items():
        assert value == pytest.approx(np.mean([values[key] for values in want]), rel=1e-12)
    code, _, err = run(capsys, "--fused", scene / "Mixture", *options)
    assert code == 2 and "not one image could be scored" in err


def test_parameters_and_operations_of_known_systems_are_columns(scene, capsys):
    (scene / "Maximum" / "metrics.json").write_text('{"system": "MLFuse"}')
    (scene / "Mixture" / "metrics.json").write_text('{"system": null}')
    options = ("--fused", scene / "Maximum", scene / "Mixture", "--data", scene / "SMALL", "--metrics", "EN", "--cost")
    code, out, _ = run(capsys, *options)
    header, *rows = out.splitlines()[:3]
    assert code == 0 and header.endswith("parameters, M  operations, G")
    assert [row.split()[-2:] for row in rows] == [["0.11", "60"], ["-", "-"]]  # as in README's table of models


def test_toolbox_is_another_name_and_is_said_to_be(scene, capsys):
    options = ("--fused", scene / "Mixture", "--data", scene / "SMALL", "--metrics", "SD", "MI")
    _, alias, err = run_json(capsys, *options, "--protocol", "toolbox")
    assert "protocol toolbox is another name of tang-2022" in err
    assert alias == run_json(capsys, *options, "--protocol", "tang-2022")[1]


# --- what can be wrong -------------------------------------------------------------------------------------


def test_missing_mismatched_and_damaged_images_are_named_and_the_rest_is_scored(scene, capsys):
    (scene / "Mixture" / "01.png").unlink()
    write_image(scene / "Mixture" / "02.png", np.zeros((50, 51)))
    (scene / "Maximum" / "b.x.bmp").write_bytes(b"")
    write_image(scene / "Maximum" / "03.bmp", np.zeros((43, 51)))
    code, found, err = run_json(capsys, "--fused", scene / "Maximum", scene / "Mixture", "--data", scene / "SMALL")
    assert code == 2
    assert f"Mixture: no fused image in {scene / 'Mixture'} for 01; left out" in err
    assert "02.png is 51x50 but its sources are 51x43 (width x height)" in err
    assert "b.x.bmp is not an image" in err
    assert "Maximum: no sources for 03.bmp" in err
    assert [row["pairs"] for row in found["rows"]] == [2, 1]
    assert found["rows"][0]["mean"] == pytest.approx(means(scene, "Maximum", ".bmp", names=("01", "02")), rel=1e-12)


def test_pair_that_memory_does_not_hold_is_named_and_the_rest_is_scored(scene, capsys, monkeypatch):
    score = folders.score

    def small(image, *others):
        if image[0, 0] == read_grey(scene / "Maximum" / "02.bmp")[0, 0]:
            raise MemoryError
        return score(image, *others)

    monkeypatch.setattr(folders, "score", small)
    code, found, err = run_json(capsys, "--fused", scene / "Maximum", "--data", scene / "SMALL")
    assert code == 2 and "Maximum, 02: there is not enough memory; left out" in err
    assert found["rows"][0]["pairs"] >= 1


def test_rows_about_different_images_are_said_to_be(scene, capsys):
    (scene / "Mixture" / "01.png").unlink()
    _, out, _ = run(capsys, "--fused", scene / "Maximum", scene / "Mixture", "--data", scene / "SMALL")
    assert "rows about different images cannot be compared" in out
    hashes = {n: pair_hash(*sources(scene, n)) for n in NAMES}
    assert f"Maximum: protocol paper, 3 pairs, images {list_hash(hashes.values())[:12]}" in out
    assert f"Mixture: protocol paper, 2 pairs, images {list_hash([hashes['02'], hashes['b.x']])[:12]}" in out


def test_a_bad_pair_of_sources_is_left_out_for_everybody(scene, capsys):
    cv2.imwrite(str(scene / "SMALL" / "ir" / "02.png"), np.zeros((10, 10)))
    code, found, err = run_json(capsys, "--fused", scene / "Maximum", "--data", scene / "SMALL", "--baselines")
    assert code == 2 and "02.png is 51x43 but" in err and err.count("left out for every method") == 1
    assert {row["pairs"] for row in found["rows"]} == {2}


def test_a_pair_too_small_for_a_metric_has_no_value_there(scene, capsys):
    code, found, err = run_json(
        capsys, "--fused", scene / "Maximum", "--data", scene / "SMALL", "--metrics", "MS-SSIM", "EN"
    )
    assert code == 0 and "MS-SSIM needs sides of 161 pixels; no value for 01, 02, b.x" in err
    assert found["rows"][0]["mean"]["MS-SSIM"] is None and found["rows"][0]["mean"]["EN"] > 0


def test_colour_is_scored_by_the_documented_grey_rule(scene, capsys):
    vis = cv2.imread(str(scene / "SMALL" / "vi" / "01.png"))
    (scene / "Colour").mkdir()
    cv2.imwrite(str(scene / "Colour" / "01.png"), vis)
    _, found, _ = run_json(capsys, "--fused", scene / "Colour", "--data", scene / "SMALL", "--metrics", "SD")
    grey = np.round(vis[..., 0] * 0.114 + vis[..., 1] * 0.587 + vis[..., 2] * 0.299)
    # One pixel near a half may be rounded the other way in float32.
    assert found["rows"][0]["mean"]["SD"] == pytest.approx(grey.std(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{}/SMALL"], "nothing to score"),
        (["--fused", "{}/Maximum"], "name the sources"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--ir", "{}/SMALL/ir"], "--data names both folders"),
        (["--fused", "{}/Maximum", "--ir", "{}/SMALL/ir", "--vi", "{}/SMALL/ir"], "are the same folder"),
        (["--fused", "{}/None", "--data", "{}/SMALL"], "no folder of fused images at"),
        (["--fused", "{}/Maximum", "{}/Maximum", "--data", "{}/SMALL"], "are both called Maximum"),
        (["--fused", "average={}/Maximum", "--baselines", "--data", "{}/SMALL"], "name of a baseline"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--metrics", "PI"], "--metrics: unknown PI"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--jobs", "0"], "--jobs: must be a whole number from 1 to"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--digits", "99"], "--digits: must be"),
        (["--fused", "{}/Maximum", "{}/Mixture", "--data", "{}/SMALL", "--against", "PI"], "--against PI: no such row"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--against", "Maximum"], "no other method to test"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--compare-protocols", "--stats"], "choose one --protocol"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--stats", "--format", "md"], "prints text or JSON"),
        (["--fused", "{}/Maximum", "--data", "{}/SMALL", "--results", "{}/r.csv", "--metrics", "EN"], "every metric"),
        (["--fused", "{}/SMALL/none", "--data", "{}/SMALL"], "share no image name"),
        (["--verify-data", "{}"], "holds none of the published sets"),
        (["--verify-data", "{}/nowhere"], "no folder at"),
    ],
)
def test_wrong_options_get_one_line(scene, capsys, options, message):
    code, out, err = run(capsys, *[option.format(scene) for option in options])
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and len(err.splitlines()) == 1


# --- names -------------------------------------------------------------------------------------------------


def test_a_folder_called_like_the_set_takes_the_name_of_its_parent(scene, capsys):
    shutil.copytree(scene / "Maximum", scene / "test_result" / "Max_weights" / "SMALL")
    folder = scene / "test_result" / "Max_weights" / "SMALL"
    folders = ("--fused", folder, f"Our method={scene / 'Mixture'}", "--fused", scene / "Maximum")
    _, found, _ = run_json(capsys, *folders, "--data", scene / "SMALL", "--metrics", "EN")
    assert [row["method"] for row in found["rows"]] == ["Max_weights", "Our method", "Maximum"]


# --- formats and files -------------------------------------------------------------------------------------


def test_best_is_bold_and_second_underlined_among_methods_only(scene, capsys, monkeypatch):
    options = ("--fused", scene / "Maximum", scene / "Mixture", "--baselines", "--data", scene / "SMALL",
               "--metrics", "SD", "MSE", "--digits", 1)  # fmt: skip
    _, found, _ = run_json(capsys, *options)
    sd, mse = ({row["method"]: row["mean"][key] for row in found["rows"]} for key in ("SD", "MSE"))
    first = max(("Maximum", "Mixture"), key=sd.get)
    near = min(("Maximum", "Mixture"), key=mse.get)
    _, markdown, _ = run(capsys, *options, "--format", "md")
    _, latex, _ = run(capsys, *options, "--format", "latex")
    for name in ("Maximum", "Mixture"):
        best, close = name == first, name == near
        assert (f"**{sd[name]:.1f}**" if best else f"<u>{sd[name]:.1f}</u>") in markdown
        assert (f"**{mse[name]:.1f}**" if close else f"<u>{mse[name]:.1f}</u>") in markdown
        assert (rf"\textbf{{{sd[name]:.1f}}}" if best else rf"\underline{{{sd[name]:.1f}}}") in latex
    assert markdown.count("**") == 4 and markdown.count("<u>") == 2  # no baseline is marked
    assert r"\begin{tabular}{lrr}" in latex and r"SD$\uparrow$" in latex and r"MSE$\downarrow$" in latex
    assert "% protocol paper, 3 pairs" in latex and r"\label{tab:SMALL-paper}" in latex and r"\toprule" in latex

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    _, out, _ = run(capsys, *options)
    assert out.count("\x1b[1m") == 2 and out.count("\x1b[4m") == 2


def test_per_image_file_holds_every_value(scene, capsys):
    path = scene / "out" / "images.csv"
    run(capsys, "--fused", scene / "Maximum", "--baselines", "--data", scene / "SMALL", "--per-image", path)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 4 * 3
    want = score(read_grey(scene / "Maximum" / "b.x.bmp"), *sources(scene, "b.x"))
    found = next(row for row in rows if (row["method"], row["image"]) == ("Maximum", "b.x"))
    assert {key: float(found[key]) for key in PAPER_TABLE} == {key: want[key] for key in PAPER_TABLE}
    assert next(row for row in rows if row["method"] == "vi only")["SCD"] == ""


def test_results_are_added_and_replaced_but_never_mixed(scene, capsys):
    path = scene / "results.csv"
    common = ("--data", scene / "SMALL", "--results", path)
    assert run(capsys, "--fused", scene / "Maximum", *common)[0] == 0
    assert run(capsys, "--fused", scene / "Mixture", *common)[0] == 0
    assert run(capsys, "--fused", f"Maximum={scene / 'Mixture'}", *common)[0] == 0  # replaced in its place
    assert run(capsys, "--fused", scene / "Maximum", *common, "--protocol", "standard")[0] == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["method"], row["protocol"]) for row in rows] == [
        ("Maximum", "paper"), ("Mixture", "paper"), ("Maximum", "standard"),
    ]  # fmt: skip
    assert set(METRICS) < set(rows[0])
    assert rows[0]["VIF"] == rows[1]["VIF"] == f"{means(scene, 'Mixture', '.png')['VIF']:.6g}"
    before = path.read_bytes()
    (scene / "Maximum" / "01.bmp").unlink()
    code, _, err = run(capsys, "--fused", scene / "Maximum", *common)
    assert code == 2 and "rows about different images" in err and path.read_bytes() == before
    path.write_text("a,b\n1,2\n")
    code, _, err = run(capsys, "--fused", scene / "Mixture", *common)
    assert code == 2 and "is not a file of results" in err and path.read_text() == "a,b\n1,2\n"


def test_statistics_are_printed_and_in_json(scene, capsys):
    methods = (scene / "Maximum", scene / "Mixture")
    options = ("--fused", *methods, "--data", scene / "SMALL", "--stats", "--against", "Mixture")
    _, out, _ = run(capsys, *options)
    for part in ("95 % interval of the mean", "minus Mixture", "Wilcoxon"):
        assert part in out
    _, found, _ = run_json(capsys, *options)
    assert found["against"] == "Mixture" and len(found["comparisons"]) == len(PAPER_TABLE)
    low, high = found["intervals"]["Maximum"]["EN"]
    assert low <= found["rows"][0]["mean"]["EN"] <= high


def test_daggers_mark_what_differs_significantly(scene, capsys, monkeypatch):
    monkeypatch.setattr("utils.evaluation.statistics.LEVEL", 2.0)  # three pairs cannot differ significantly
    options = ("--fused", scene / "Maximum", scene / "Mixture", "--data", scene / "SMALL", "--metrics", "SD", "MSE",
               "--against", "Mixture")  # fmt: skip
    _, found, _ = run_json(capsys, *options)
    ours, theirs = (row["mean"] for row in found["rows"])
    signs = ["better" if better else "worse" for better in (ours["SD"] > theirs["SD"], ours["MSE"] < theirs["MSE"])]
    _, latex, _ = run(capsys, *options, "--format", "latex")
    line = next(line for line in latex.splitlines() if line.startswith("Maximum"))
    for sign, cell in zip(signs, line.split("&")[1:], strict=True):
        assert {"better": r"$^\ddagger$", "worse": r"$^\dagger$"}[sign] in cell
    assert r"$\dagger$: significantly worse than Mixture" in latex
    _, markdown, _ = run(capsys, *options, "--format", "md")
    assert [cell.strip()[-1] for cell in markdown.splitlines()[2].split("|")[2:4]] == [
        {"better": "‡", "worse": "†"}[sign] for sign in signs
    ]
    _, out, _ = run(capsys, *options)
    winner = {"better": "Maximum", "worse": "Mixture"}[signs[0]]
    assert next(line for line in out.splitlines() if line.split()[:2] == ["Maximum", "SD"]).endswith(winner)


def test_every_metric_is_described(capsys):
    code, out, _ = run(capsys, "--list-metrics")
    assert code == 0
    for key, metric in METRICS.items():
        assert f"{key}: " in out and metric.reference in out
    assert (
        "nats, bits under tang-2022, bits under tang-2023; higher is better; range 0 to 11.0904; smallest side 1\n"
        in out
    )


# --- published data ----------------------------------------------------------------------------------------


def test_a_copy_of_the_published_set_is_recognised(fusion_data, tmp_path, capsys):
    shutil.copytree(fusion_data / "test_img" / "MRI_CT", tmp_path / "MRI_CT")
    code, out, _ = run(capsys, "--verify-data", tmp_path)
    assert code == 0 and "MRI_CT: the published images: 42 of 42 files as published" in out
    assert f"TNO: not in {tmp_path}" in out
    pair = list_pairs(tmp_path / "MRI_CT" / "MRI", tmp_path / "MRI_CT" / "CT").pairs[0]
    cv2.imwrite(str(pair.vis), 255 - read_grey(pair.vis))
    code, out, _ = run(capsys, "--verify-data", tmp_path)
    assert code == 2 and f"NOT the published set: 41 of 42 files as published; 1 different: MRI/{pair.vis.name}" in out


def test_a_row_of_results_is_what_the_command_beside_it_prints(fusion_data, tmp_path, capsys):
    folder = fusion_data / "test_img" / "MRI_CT"
    code, _, _ = run(capsys, "--baselines", "--data", folder, "--results", tmp_path / "MRI_CT.csv")
    assert code == 0
    kept, again = (
        list(csv.DictReader(path.open())) for path in (ROOT / "results" / "MRI_CT.csv", tmp_path / "MRI_CT.csv")
    )
    kept = {(row["method"], row["protocol"]): row for row in kept}
    assert len(again) == 3
    for row in again:
        old = kept[row["method"], row["protocol"]]
        assert (old["pairs"], old["images"]) == (row["pairs"], row["images"])
        for key in METRICS:
            assert (old[key] == "") == (row[key] == "")
            if row[key]:  # kept with six digits
                assert float(old[key]) == pytest.approx(float(row[key]), rel=1e-5)


def test_the_rows_of_tang_2022_are_what_matlab_printed(fusion_data):
    printed = list(csv.DictReader((fusion_data / "other_methods/TNO42/matlab_toolbox_11.csv").read_text().splitlines()))
    _, rows = read_results(ROOT / "results" / "TNO42.csv")
    for method in ("DenseFuse", "SeAFusion", "U2Fusion"):
        (row,) = (row for row in rows if (row["method"], row["protocol"]) == (method, "tang-2022"))
        for key in TABLES["tang-2022"]:
            values = [float(line[key]) for line in printed if line["method"] == method]
            assert float(row[key]) == pytest.approx(np.mean(values), rel=1e-5)  # kept with six digits


# --- processes, pipes and consoles -------------------------------------------------------------------------


def start(*options, **more):
    command = [sys.executable, "evaluate.py", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_files_are_written_before_a_reader_closes_the_pipe(scene):
    path = scene / "p.csv"
    process = start("--fused", scene / "Maximum", "--data", scene / "SMALL", "--jobs", 1, "--per-image", path)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 0 and "roken" not in err and len(path.read_text().splitlines()) == 1 + 3


def test_a_console_that_is_not_utf_8_gets_no_traceback(scene):
    name = os.fsdecode(b"M\xe9thode \xff")
    shutil.copytree(scene / "Maximum", scene / name)
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    for format_ in ("md", "text", "json"):
        process = start("--fused", scene / name, "--data", scene / "SMALL", "--jobs", 1, "--format", format_,
                        "--results", scene / "r.csv", env=environment)  # fmt: skip
        out, err = process.communicate()
        assert process.returncode == 0 and b"Traceback" not in err and b"thode" in out
        assert (b"EN^" in out) == (format_ != "json")  # cp1252 has no arrows
    assert name.encode("utf-8", "surrogateescape") in (scene / "r.csv").read_bytes()


def test_rows_added_at_the_same_time_are_all_there(scene):
    processes = [
        start("--fused", f"method {number}={scene / 'Mixture'}", "--data", scene / "SMALL", "--jobs", 1,
              "--results", scene / "r.csv")
        for number in range(4)
    ]  # fmt: skip
    assert [process.communicate() and process.returncode for process in processes] == [0] * 4
    _, rows = read_results(scene / "r.csv")
    assert {row["method"] for row in rows} == {f"method {number}" for number in range(4)}
