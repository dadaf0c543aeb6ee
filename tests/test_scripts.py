"""test_IVF.py and test_MIF.py: printed layout, files, defaults, and the way from folders to a table."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dataprocessing
import test_IVF
import test_MIF
import train
from tests.conftest import write_pair
from utils import common
from utils.common import ROOT
from utils.data.images import chroma, read_colour, read_grey, write_image
from utils.data.manifests import make_manifest
from utils.evaluation.benchmark import add_arguments, find_sets
from utils.inference.checkpoint import save_checkpoint
from utils.inference.fusing import fuse_arrays
from utils.metrics import score
from zoo.cddfuse import CDDFuseSystem
from zoo.mlfuse import MLFuseSystem

HEADER = "\t\t EN\t SD\t SF\t MI\tSCD\tVIF\tQabf\tSSIM"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return CDDFuseSystem().eval()


@pytest.fixture
def weights(model, tmp_path):
    save_checkpoint(tmp_path / "CDDFuse_IVF.pth", model, {"task": "ivf"})
    return tmp_path / "CDDFuse_IVF.pth"


@pytest.fixture
def infrared(tmp_path):
    for seed, name in enumerate(["b.png", "a.x.png"]):
        write_pair(tmp_path / "data" / "MINE", ("vi", "ir"), name, seed, size=(43, 51))
    return tmp_path / "data" / "MINE"


def run(script, capsys, *options):
    code = script.main([str(option) for option in ("--device", "cpu", *options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_ivf_prints_the_published_table_and_one_line_that_says_how(infrared, weights, tmp_path, capsys):
    code, out, _ = run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert code == 0
    lines = out.split("\n")
    assert lines[:5] == ["", "", "=" * 80, "The test result of MINE :", HEADER]
    assert lines[5].startswith("CDDFuse    \t") and len(lines[5].split("\t")) == 9
    assert lines[6] == "=" * 80
    images = f"images {make_manifest(infrared)['images'][:12]}"
    for part in ("protocol paper", "2 pairs", str(weights), "cpu", images, "commit"):
        assert part in lines[7]


def test_scores_are_those_of_the_files_as_written(infrared, weights, model, tmp_path, capsys):
    run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    folder = tmp_path / "out" / "CDDFuse_IVF" / "MINE"
    assert sorted(path.name for path in folder.iterdir()) == ["a.x.png", "b.png", "metrics.csv", "metrics.json"]
    rows = {row["image"]: row for row in csv.DictReader((folder / "metrics.csv").open())}
    means = json.loads((folder / "metrics.json").read_text())
    wanted = []
    for name in ("a.x", "b"):
        vis, ir = (read_grey(infrared / modality / f"{name}.png") for modality in ("vi", "ir"))
        fused = read_grey(folder / f"{name}.png")
        write_image(tmp_path / "again.png", fuse_arrays(model, vis, ir, "vis"))
        np.testing.assert_array_equal(fused, read_grey(tmp_path / "again.png"))
        assert fused.min() == 0 and fused.max() == 255  # normalised, as published
        wanted.append(score(fused, ir, vis))
        assert float(rows[name]["VIF"]) == pytest.approx(wanted[-1]["VIF"], rel=1e-12)
    for metric, value in means["mean"].items():
        assert value == pytest.approx(np.mean([scores[metric] for scores in wanted]), rel=1e-12), metric
    assert means["pairs"] == 2 and means["protocol"] == "paper" and means["weights"] == str(weights)
    assert means["images"] == make_manifest(infrared)["images"]


def test_stale_files_in_the_output_folder_do_not_count(infrared, weights, tmp_path, capsys):
    folder = tmp_path / "out" / "CDDFuse_IVF" / "MINE"
    options = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    first = run(test_IVF, capsys, *options)[1]
    write_image(folder / "stale.png", np.zeros((43, 51)))
    assert run(test_IVF, capsys, *options)[1] == first


def test_mif_runs_each_weight_file_into_its_own_folder_with_its_own_skip(model, weights, tmp_path, capsys):
    save_checkpoint(tmp_path / "CDDFuse_MIF.pth", model, {"task": "mif"})
    write_pair(tmp_path / "data" / "MRI_CT", ("MRI", "CT"), "1.png", 0, size=(43, 51))
    code, out, _ = run(
        test_MIF, capsys, "--data", tmp_path / "data", "--sets", "MRI_CT", "--out", tmp_path / "out",
        "--weights", weights, tmp_path / "CDDFuse_MIF.pth",
    )  # fmt: skip
    assert code == 0
    lines = out.split("\n")
    assert lines[4] == HEADER
    assert lines[5].startswith("CDDFuse_IVF\t") and lines[6].startswith("CDDFuse_MIF\t")
    skips = {
        stem: json.loads((tmp_path / f"out/{stem}/MRI_CT/metrics.json").read_text())["skip"]
        for stem in ("CDDFuse_IVF", "CDDFuse_MIF")
    }
    assert skips == {"CDDFuse_IVF": "sum", "CDDFuse_MIF": "none"}


def test_results_of_other_weights_are_not_replaced_without_a_word(infrared, weights, model, tmp_path, capsys):
    options = ("--data", infrared, "--out", tmp_path / "out", "--weights")
    assert run(test_IVF, capsys, *options, weights)[2] == run(test_IVF, capsys, *options, weights)[2] == ""
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / weights.name, model, {"task": "ivf", "seed": 1})
    err = run(test_IVF, capsys, *options, tmp_path / "run" / weights.name)[2]
    assert err.count("\n") == 1 and f"had the results of other weights, {weights}; --out" in err


def test_medical_weights_on_infrared_images_are_a_note(infrared, model, tmp_path, capsys):
    save_checkpoint(tmp_path / "mine.pth", model, {"task": "mif"})
    code, _, err = run(test_IVF, capsys, "--data", infrared, "--weights", tmp_path / "mine.pth", "--out", tmp_path)
    assert code == 0 and "mine.pth are for medical images" in err


def test_log_file_has_a_line_of_progress_now_and_then(monkeypatch, capsys):
    assert list(common.progress(range(3), "TNO", "pair")) == [0, 1, 2] and not capsys.readouterr().err
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", -1)
    assert list(common.progress(range(3), "TNO", "pair")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[1] == "TNO: 2 of 3 pairs"
    list(common.progress(iter("ab"), "film", "frame"))
    assert capsys.readouterr().err.splitlines() == [f"film: {n} of an unknown number of frames" for n in (1, 2)]


@pytest.mark.parametrize(
    ("name", "about", "script", "skip"),
    [
        ("CDDFuse_MIF.pth", None, test_MIF, "none"),  # published files say nothing; their names do
        ("CDDFuse_IVF.pth", None, test_MIF, "sum"),
        ("mine.pth", {"task": "mif"}, test_MIF, "none"),  # ours remember
        ("mine.pth", {"task": "ivf", "decoder_image": "auto"}, test_IVF, "vis"),
        ("mine.pth", {"task": "ivf", "decoder_image": "none"}, test_IVF, "none"),
        ("mine.pth", {"task": "ivf", "decoder_image": "sum"}, test_IVF, "sum"),
    ],
)
def test_decoder_image_is_the_one_of_the_training(model, tmp_path, capsys, name, about, script, skip):
    save_checkpoint(tmp_path / name, model, about)
    write_pair(tmp_path / "S", ("MRI", "PET"), "1.png", 0, size=(43, 51))
    options = ("--data", tmp_path / "S", "--weights", tmp_path / name, "--out", tmp_path / "out")
    assert f"decoder image: {skip}" in run(script, capsys, *options)[1]
    assert "decoder image: vis" in run(script, capsys, *options, "--skip", "vis")[1]


def test_baselines_are_the_sources_and_their_average(infrared, weights, tmp_path, capsys):
    out = run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "o", "--baselines")[1]
    rows = {line.split("\t")[0].strip(): line.split("\t")[1:] for line in out.split("\n")[5:9]}
    assert list(rows) == ["CDDFuse", "vi only", "ir only", "average"]
    pairs = [tuple(read_grey(infrared / m / f"{n}.png") for m in ("vi", "ir")) for n in ("a.x", "b")]
    wanted = np.mean([score(np.floor((vis + ir) / 2 + 0.5), ir, vis)["SD"] for vis, ir in pairs])
    assert rows["average"][1] == str(round(wanted, 2))
    assert rows["vi only"][4] == "nan" and "vi only: no value for SCD of 2 of 2 images" in out


def test_bad_pairs_are_named_and_the_rest_is_done(infrared, weights, tmp_path, capsys):
    write_pair(infrared, ("vi", "ir"), "c.png", 5, size=(43, 51))
    (infrared / "ir/c.png").write_bytes(b"broken")
    write_pair(infrared, ("vi", "ir"), "d.png", 6, size=(20, 51))  # below the smallest side of VIF
    write_pair(infrared, ("vi", "ir"), "e.png", 7)
    (infrared / "vi/e.png").unlink()
    code, out, err = run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert code == 2 and "2 pairs" in out
    assert "MINE/c" in err and "e.png" in err
    assert "VIF needs images with sides >= 41" in err and "fused, but not scored" in err


def test_set_without_a_score_does_not_stop_the_others(infrared, weights, tmp_path, capsys):
    write_pair(tmp_path / "data" / "SMALL", ("vi", "ir"), "a.png", 5, size=(20, 30))
    code, out, err = run(
        test_IVF, capsys, "--data", tmp_path / "data", "--sets", "SMALL", "MINE", "--weights", weights,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "no pair of SMALL was scored" in err
    assert "The test result of MINE :" in out and "The test result of SMALL :" not in out


def test_unreadable_file_costs_its_pair_only(infrared, weights, tmp_path, capsys, monkeypatch):
    from utils.data import readers

    read = readers._open

    def refuses_one(path, *how):
        if path.name == "b.png" and path.parent.name == "ir":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *how)

    monkeypatch.setattr(readers, "_open", refuses_one)
    code, out, err = run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert code == 2 and "1 pairs" in out and "Permission denied" in err


def test_two_sets_of_one_name_are_refused(infrared, weights, tmp_path, capsys):
    write_pair(tmp_path / "data" / "more" / "MINE", ("vi", "ir"), "a.png", 5)
    code, _, err = run(
        test_IVF, capsys, "--data", tmp_path / "data", "--sets", "MINE", "more/MINE", "--weights", weights
    )
    assert code == 2 and "two folders called MINE" in err


def test_names_that_are_not_utf_8_are_scored_too(infrared, weights, tmp_path, capsys):
    for modality in ("vi", "ir"):
        (infrared / modality / "b.png").rename(infrared / modality / os.fsdecode(b"b\xff.png"))
    code, out, _ = run(test_IVF, capsys, "--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert code == 0 and "2 pairs" in out


def test_two_folders_of_unlike_names_and_the_first_pairs_alone(infrared, weights, tmp_path, capsys):
    for seed, name in enumerate(("0_rgb.png", "1_rgb.png", "2_rgb.png")):
        write_pair(tmp_path / "x" / "SET", ("RGB", "IR"), name, seed, size=(43, 51))
        (tmp_path / "x/SET/IR" / name).rename(tmp_path / "x/SET/IR" / name.replace("rgb", "nir"))
    options = ("--weights", weights, "--out", tmp_path / "out", "--limit", 2)
    both = ("--vi", tmp_path / "x/SET/RGB", "--ir", tmp_path / "x/SET/IR")
    code, _, err = run(test_IVF, capsys, *both, *options)
    assert code == 2 and "--pair-by number makes 3 pairs, such as 0_rgb.png with 0_nir.png" in err
    for sources in (both, ("--data", tmp_path / "x/SET")):
        code, out, _ = run(test_IVF, capsys, *sources, *options, "--pair-by", "number")
        assert code == 0 and "The test result of SET_first_2 :" in out and "2 pairs" in out
    done = sorted(path.name for path in (tmp_path / "out/CDDFuse_IVF/SET_first_2").iterdir())
    assert done == ["0_rgb.png", "1_rgb.png", "metrics.csv", "metrics.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "nowhere"),
        (("--sets", "TNO"), "no folder at"),
        (("--weights", "none.pth"), "no file at none.pth"),
        (("--skip", "ir"), "vis, sum, none"),
        (("--device", "quantum"), "try --device cpu"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(infrared, weights, tmp_path, capsys, options, message):
    base = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    code, _, err = run(test_IVF, capsys, *base, *options)
    assert code == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_weight_files_of_one_name_are_refused(infrared, weights, model, tmp_path, capsys):
    save_checkpoint(tmp_path / "other/CDDFuse_IVF.pth", model)
    code, _, err = run(test_IVF, capsys, "--data", infrared, "--weights", weights, tmp_path / "other/CDDFuse_IVF.pth")
    assert code == 2 and "share a folder" in err


def test_weights_that_give_nan_are_refused_not_scored(infrared, model, tmp_path, capsys):
    broken = CDDFuseSystem()
    torch.nn.init.constant_(broken.decoder.output[2].weight, float("nan"))
    save_checkpoint(tmp_path / "nan.pth", broken)
    code, _, err = run(test_IVF, capsys, "--data", infrared, "--weights", tmp_path / "nan.pth", "--out", tmp_path / "o")
    assert code == 2 and "NaN" in err
    assert not list((tmp_path / "o").rglob("*.png"))


def test_protocol_and_normalisation_are_options(infrared, weights, tmp_path, capsys):
    options = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert "protocol standard" in run(test_IVF, capsys, *options, "--protocol", "standard", "--no-normalise")[1]
    fused = read_grey(tmp_path / "out/CDDFuse_IVF/MINE/b.png")
    assert fused.min() > 0 and fused.max() < 255


@pytest.mark.parametrize("script", [test_IVF, test_MIF])
def test_without_benchmark_folders_the_samples_are_shown_and_the_user_is_told(script, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("FUSION_DATA", raising=False)
    benchmark = script.IVF if script is test_IVF else script.MIF
    parser = argparse.ArgumentParser()
    add_arguments(parser, benchmark, ["cddfuse"])
    if any((ROOT / "test_img" / name).is_dir() for name in benchmark.sets):
        pytest.skip("the benchmark folders are in test_img/")
    found = find_sets(parser.parse_args([]), benchmark)
    assert tuple(test_set.name for test_set in found) == benchmark.samples
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and all(name in said for name in benchmark.sets) and "test_img" in said


def test_variable_names_the_benchmark_folder(monkeypatch, infrared, weights, tmp_path, capsys):
    (tmp_path / "data").rename(tmp_path / "test_img")
    monkeypatch.setenv("FUSION_DATA", str(tmp_path))
    code, out, _ = run(test_IVF, capsys, "--sets", "MINE", "--weights", weights, "--out", tmp_path / "out")
    assert code == 0 and "The test result of MINE :" in out


def test_whole_way_from_folders_to_a_table(infrared, tmp_path, capsys):
    patches, out = tmp_path / "p.h5", tmp_path / "run"
    assert (
        dataprocessing.main(["--data", str(infrared), "--patch-size", "24", "--stride", "12", "--out", str(patches)])
        == 0
    )
    base = ["--data", str(patches), "--out", str(out), "--device", "cpu", "--epoch-batches", "1", "--batch-size", "2"]
    assert train.main([*base, "--recipe", "published", "--stage1-epochs", "1", "--stage2-epochs", "1"]) == 0
    assert (
        train.main([*base, "--recipe", "published", "--stage1-epochs", "1", "--stage2-epochs", "1", "--resume", "auto"])
        == 0
    )
    code, printed, _ = run(
        test_IVF, capsys, "--data", infrared, "--weights", out / "CDDFuse_IVF.pth", "--out", tmp_path / "o"
    )
    assert code == 0 and "The test result of MINE :" in printed


@pytest.fixture
def mlfuse_weights(tmp_path):
    torch.manual_seed(5)
    MLFuseSystem().save(tmp_path / "small.pth", {"task": "mif"})
    return tmp_path / "small.pth"


@pytest.fixture
def flat(tmp_path):
    """A folder with mr0, ct0, mr1 and ct1 in the published layout of MLFuse."""
    for seed, number in enumerate("01"):
        write_pair(tmp_path / "made", ("mr", "ct"), f"{number}.png", seed, size=(43, 51))
        (tmp_path / "flat").mkdir(exist_ok=True)
        for stem in ("mr", "ct"):
            (tmp_path / "made" / stem / f"{number}.png").rename(tmp_path / "flat" / f"{stem}{number}.png")
    return tmp_path / "flat"


@pytest.mark.parametrize("script", [test_IVF, test_MIF])
def test_another_system_prints_the_same_table_under_its_own_name(infrared, mlfuse_weights, tmp_path, capsys, script):
    options = ("--system", "mlfuse", "--data", infrared, "--weights", mlfuse_weights, "--out", tmp_path / "out")
    code, out, _ = run(script, capsys, *options)
    lines = out.split("\n")
    assert code == 0 and lines[4] == HEADER and lines[5].startswith("MLFuse small\t")
    facts = json.loads((tmp_path / "out/small/MINE/metrics.json").read_text())
    assert (facts["system"], facts["vis"], facts["ir"]) == ("MLFuse", "vi", "ir")
    fused = read_grey(tmp_path / "out/small/MINE/b.png")
    assert fused.min() == 0 and fused.max() == 255


def test_system_without_bundled_weights_asks_for_a_file(infrared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MLFuseSystem, "weights", {"ivf": (), "mif": ()})
    code, _, err = run(test_IVF, capsys, "--system", "mlfuse", "--data", infrared, "--out", tmp_path / "out")
    assert code == 2 and "name a file with --weights" in err


def test_weights_of_another_system_are_refused(infrared, weights, mlfuse_weights, tmp_path, capsys):
    options = ("--data", infrared, "--out", tmp_path / "out")
    for system, path in (("mlfuse", weights), ("cddfuse", mlfuse_weights)):
        code, _, err = run(test_IVF, capsys, "--system", system, "--weights", path, *options)
        assert code == 2 and "another network" in err


def test_images_below_the_smallest_side_are_named(mlfuse_weights, tmp_path, capsys):
    write_pair(tmp_path / "S", ("vi", "ir"), "a.png", 0, size=(14, 60))
    options = ("--system", "mlfuse", "--data", tmp_path / "S", "--weights", mlfuse_weights, "--out", tmp_path / "out")
    code, _, err = run(test_IVF, capsys, *options)
    assert code == 2 and "at least 15 pixels" in err


def test_flat_folder_is_read_in_the_roles_that_are_asked_for(flat, mlfuse_weights, tmp_path, capsys):
    images = {}
    for stems in (("mr", "ct"), ("ct", "mr")):
        code, out, _ = run(
            test_MIF, capsys, "--system", "mlfuse", "--weights", mlfuse_weights, "--data", flat, "--stems", *stems,
            "--out", tmp_path / stems[0], "--baselines",
        )  # fmt: skip
        folder = tmp_path / stems[0] / "small" / "flat"
        assert code == 0 and "2 pairs" in out and f"{stems[0]} only" in out
        facts = json.loads((folder / "metrics.json").read_text())
        assert (facts["vis"], facts["ir"]) == stems
        images[stems] = read_grey(folder / "1.png")
    model = MLFuseSystem().eval()
    model.load_published(mlfuse_weights)
    mr, ct = (read_grey(flat / f"{stem}1.png") for stem in ("mr", "ct"))
    for stems, (vis, ir) in {("mr", "ct"): (mr, ct), ("ct", "mr"): (ct, mr)}.items():
        np.testing.assert_array_equal(images[stems], np.floor(fuse_arrays(model, vis, ir, "none") + 0.5))
    assert (images["mr", "ct"] != images["ct", "mr"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "must hold two folders of images"),
        (("--stems", "mri", "ct"), "the stems in it are ct, mr"),
        (("--stems", "mr", "ct", "--sets", "none"), "no image folder"),
        (("--stems", "mr", "ct", "--skip", "vis"), "takes one of: none"),
        (("--stems", "mr", "ct", "--columns", "EN", "LPIPS"), "no metric or table 'LPIPS'"),
        (("--stems", "mr", "ct", "--limit", "0"), "--limit: must be a whole number from 1 to"),
        (("--vi", "a", "--ir", "b"), "in place of --data"),
    ],
)
def test_roles_are_never_guessed(flat, mlfuse_weights, tmp_path, capsys, options, message):
    base = ("--system", "mlfuse", "--weights", mlfuse_weights, "--data", flat, "--out", tmp_path / "out")
    code, _, err = run(test_MIF, capsys, *base, *options)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_columns_are_metrics_or_a_published_table(infrared, weights, tmp_path, capsys):
    options = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    lines = run(test_IVF, capsys, *options, "--columns", "fsidfusion")[1].split("\n")
    assert lines[4] == HEADER + "\tAG\tCC\tPSNR" and len(lines[5].split("\t")) == 12
    lines = run(test_IVF, capsys, *options, "--columns", "PSNR", "EN", "PSNR")[1].split("\n")
    means = json.loads((tmp_path / "out/CDDFuse_IVF/MINE/metrics.json").read_text())["mean"]
    assert lines[4] == "\t\t PSNR\t EN"
    assert lines[5].split("\t")[1:] == [str(round(means["PSNR"], 2)), str(round(means["EN"], 2))]


def test_legacy_rounding_truncates_and_says_so(infrared, weights, model, tmp_path, capsys):
    options = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    assert "truncated" not in run(test_IVF, capsys, *options)[1]
    assert "float32, truncated to 8 bits" in run(test_IVF, capsys, *options, "--legacy-rounding")[1]
    vis, ir = (read_grey(infrared / modality / "b.png") for modality in ("vi", "ir"))
    written = read_grey(tmp_path / "out/CDDFuse_IVF/MINE/b.png")
    np.testing.assert_array_equal(written, np.floor(fuse_arrays(model, vis, ir, "vis")))
    assert json.loads((tmp_path / "out/CDDFuse_IVF/MINE/metrics.json").read_text())["legacy_rounding"]


def test_colour_of_a_source_is_written_beside_the_grey_image(infrared, weights, tmp_path, capsys):
    write_image(infrared / "vi/c.png", read_grey(infrared / "vi/b.png"))  # a pair without colour
    write_image(infrared / "ir/c.png", read_grey(infrared / "ir/b.png"))
    options = ("--data", infrared, "--weights", weights, "--out", tmp_path / "out")
    plain = run(test_IVF, capsys, *options)[1]
    folder = tmp_path / "out/CDDFuse_IVF/MINE"
    assert not (folder / "colour").exists()
    assert run(test_IVF, capsys, *options, "--colour")[1] == plain  # the grey images are scored
    assert sorted(path.name for path in (folder / "colour").iterdir()) == ["a.x.png", "b.png"]
    grey, colour = read_grey(folder / "b.png"), read_colour(folder / "colour/b.png")
    inside = ((colour > 0) & (colour < 255)).all(axis=2)
    assert inside.mean() > 0.1
    np.testing.assert_allclose(read_grey(folder / "colour/b.png")[inside], grey[inside], rtol=0, atol=2)  # rounding
    wanted = chroma(read_colour(infrared / "vi/b.png"))
    np.testing.assert_allclose(chroma(colour)[inside], wanted[inside], rtol=0, atol=1)


def test_scripts_do_nothing_on_import_and_pytest_does_not_collect_them():
    code = "import test_IVF, test_MIF, train, dataprocessing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
    assert 'testpaths = ["tests", "utils"]' in (Path(ROOT) / "pyproject.toml").read_text()


def test_bundled_weights_load_and_know_their_task():
    for task in ("ivf", "mif"):
        path = ROOT / "models" / f"CDDFuse_{task.upper()}.pth"
        assert CDDFuseSystem().load_published(path)["task"] == task


SCRIPTS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for pattern in ("*.py", "tools/[a-z]*.py", "benchmarks/[a-z]*.py")
    for path in ROOT.glob(pattern)
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_waiting_threads_sleep_which_is_said_before_torch_is_loaded_unless_the_user_says_otherwise(script):
    # Stops where torch would be imported, or ours are: whichever comes first.
    code = f"""
import os, sys
class Torch:
    def find_spec(name, *where):
        if name in ("torch", "utils.common"):
            raise SystemExit(os.environ.get("OMP_WAIT_POLICY") != "PASSIVE")
sys.meta_path.insert(0, Torch)
import {script}
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if script == "train":
        kept = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**environment, "OMP_WAIT_POLICY": "ACTIVE"})
        assert kept.returncode == 1
