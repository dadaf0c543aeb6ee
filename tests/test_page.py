"""utils/page.py: what the page does, without the page. Results are those of fuse.py, errors are words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import fuse
from tests.conftest import write_pair
from utils import page
from utils.common import InputError
from utils.data.images import read_grey, write_colour, write_grey
from utils.inference.checkpoint import save_checkpoint
from utils.metrics import PAPER_TABLE, score
from utils.page import Desk, Limits, Upload, bundled_samples, safe_name, score_table, weights_by_system
from zoo.cddfuse import CDDFuseSystem
from zoo.mlfuse import MLFuseSystem

SIZE = (44, 48)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    return weights_by_system([], CPU)


@pytest.fixture
def desk(weights, tmp_path):
    (tmp_path / "page").mkdir()
    return Desk(tmp_path / "page", weights)


@pytest.fixture
def pair(tmp_path):
    """Uploads lie under names of the server's; their owner calls them otherwise."""
    write_pair(tmp_path / "secret", ("vi", "ir"), "x.png", 0, size=SIZE)
    return tuple(Upload(tmp_path / "secret" / role / "x.png", f"my {role}.jpg") for role in ("vi", "ir"))


def fused_by_script(pair, out, *options):
    vis, ir = pair
    arguments = ["--device", "cpu", "--vi", vis.path, "--ir", ir.path, "--out", out, *options]
    assert fuse.main([str(argument) for argument in arguments]) == 0
    return out.read_bytes()


@pytest.mark.parametrize("colour", ["both", "vis", "ir", "none"])
def test_file_is_the_one_that_fuse_py_writes_in_the_name_of_the_visible_image(desk, pair, colour, tmp_path):
    result = desk.fuse(*pair, colour=colour)
    assert result.file.name == "my vi.png" and result.file.is_relative_to(desk.folder)
    assert result.file.read_bytes() == fused_by_script(pair, tmp_path / "f.png", "--colour", colour)


def test_scores_are_those_of_the_file_beside_those_of_the_sources(desk, pair):
    result = desk.fuse(*pair)
    vis, ir = (read_grey(upload.path) for upload in pair)
    assert list(result.scores) == ["fused", "visible only", "infrared only", "average"]
    want = score(read_grey(result.file), ir, vis)
    assert result.scores["fused"] == {key: want[key] for key in PAPER_TABLE}
    assert result.scores["infrared only"]["EN"] == score(ir, ir, vis)["EN"]
    table = score_table(result, "paper").splitlines()
    assert [line.split("**")[1] for line in table[2:]] == list(PAPER_TABLE)
    assert f"**{want['EN']:.2f}**" in table[2]


def test_both_inputs_the_features_and_how_it_was_made_are_shown(desk, pair):
    result = desk.fuse(*pair)
    assert list(result.features) == ["base vis", "base ir", "detail vis", "detail ir"]
    assert all(image.shape[:2] == SIZE for image in (result.vis, result.ir, result.fused, *result.features.values()))
    np.testing.assert_array_equal(result.ir, read_grey(pair[1].path))
    for part in ("CDDFuse_IVF.pth", "sha256", "decoder image: vis", "48x44"):
        assert part in result.facts


def test_medical_images_get_the_weights_and_the_decoder_image_of_their_task(desk, pair, tmp_path):
    result = desk.fuse(*pair, task="mif")
    assert "CDDFuse_MIF.pth" in result.facts and "decoder image: none" in result.facts
    assert result.file.read_bytes() == fused_by_script(pair, tmp_path / "f.png", "--task", "mif")
    assert list(result.scores)[1] == "MRI only"


def test_sixteen_bits_are_read_by_the_same_reader(desk, tmp_path):
    levels = np.random.default_rng(0).uniform(0, 255, SIZE).astype(np.float32)
    write_grey(tmp_path / "deep.tif", levels, bits=16)
    upload = Upload(tmp_path / "deep.tif", "deep.tif")
    np.testing.assert_array_equal(desk.read(upload, "visible").grey, read_grey(tmp_path / "deep.tif"))
    assert desk.preview(upload, "ivf", 1).dtype == np.uint8


def test_sizes_that_differ_are_said_in_words_and_resizing_is_that_of_fuse_py(desk, pair, tmp_path):
    vis, ir = pair
    cv2.imwrite(str(ir.path), cv2.resize(cv2.imread(str(ir.path)), (24, 22)))
    with pytest.raises(InputError) as error:
        desk.fuse(vis, ir)
    for part in ("the visible image my vi.jpg is 48x44", "the infrared image my ir.jpg is 24x22", "tick “Resize”"):
        assert part in str(error.value)
    assert "--" not in str(error.value)
    result = desk.fuse(vis, ir, resize_ir=True)
    assert result.notes == ["the infrared image my ir.jpg was resized to 48x44"]
    assert result.file.read_bytes() == fused_by_script(pair, tmp_path / "f.png", "--resize-ir")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"GIF89a"), "is not an image of 8 or 16 bits"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "is not an image of 8 or 16 bits"),
        (lambda path: path.unlink(), "choose it again"),
    ],
)
def test_errors_name_files_as_their_owner_does_and_no_folder_of_the_server(desk, pair, spoil, message):
    spoil(pair[1].path)
    with pytest.raises(InputError, match=message) as error:
        desk.fuse(*pair)
    assert "the infrared image my ir.jpg" in str(error.value)
    assert "secret" not in str(error.value) and "x.png" not in str(error.value)


def test_a_missing_image_is_asked_for(desk, pair):
    with pytest.raises(InputError, match="no infrared image yet"):
        desk.fuse(pair[0], None)
    with pytest.raises(InputError, match="no MRI image yet"):
        desk.fuse(None, None, task="mif")


def test_limits_hold_before_an_image_is_unpacked(desk, pair, tmp_path, monkeypatch):
    tight = replace(desk, limits=Limits(SIZE[0] * SIZE[1]))
    assert tight.preview(pair[0], "ivf", 0).shape[:2] == SIZE
    monkeypatch.setattr(page, "read_source", lambda path: pytest.fail("it was unpacked"))
    with pytest.raises(InputError, match=r"my vi.jpg is 48x44, 0.00211 megapixels, and this page takes 0.00211"):
        replace(desk, limits=Limits(SIZE[0] * SIZE[1] - 1)).preview(pair[0], "ivf", 0)
    for suffix in (".png", ".jpg", ".bmp", ".tif", ".ppm"):
        write_colour(tmp_path / f"large{suffix}", np.zeros((60, 80, 3)))
        with pytest.raises(InputError, match="is 80x60"):
            tight.preview(Upload(tmp_path / f"large{suffix}", "large"), "ivf", 0)
    (tmp_path / "heavy.png").write_bytes(bytes(tight.limits.file_bytes + 1))
    with pytest.raises(InputError, match="heavy.png has 2 MB, and this page takes 1 MB"):
        tight.preview(Upload(tmp_path / "heavy.png", "heavy.png"), "ivf", 0)
    assert str(desk.limits) == "4 megapixels and 32 MB"


@pytest.mark.parametrize(
    "forged",
    [
        {"weights": "../../models/CDDFuse_IVF.pth"},
        {"weights": "/etc/passwd"},
        {"system": "other"},
        {"system": ["cddfuse"]},
        {"task": "__class__"},
        {"colour": "red"},
    ],
)
def test_what_is_not_offered_is_refused_whatever_the_page_sends(desk, pair, forged):
    with pytest.raises(InputError, match="choose one of"):
        desk.fuse(*pair, **forged)


def test_a_model_is_loaded_once_for_each_choice(desk, pair, monkeypatch):
    loaded = []
    load = page.load_method
    monkeypatch.setattr(page, "load_method", lambda path, *rest: loaded.append(path.name) or load(path, *rest))
    for weights in ("CDDFuse_IVF.pth", "CDDFuse_MIF.pth", "CDDFuse_IVF.pth", None):
        desk.fuse(*pair, weights=weights)
    assert loaded == ["CDDFuse_IVF.pth", "CDDFuse_MIF.pth"]


def test_small_images_fuse_without_the_metrics_that_need_more_pixels(desk, tmp_path):
    write_pair(tmp_path, ("vi", "ir"), "x.png", 0, size=(30, 34))
    result = desk.fuse(*(Upload(tmp_path / role / "x.png", "x.png") for role in ("vi", "ir")))
    assert "VIF" not in result.scores["fused"] and "EN" in result.scores["fused"]
    assert any("VIF (41)" in note for note in result.notes)
    assert "| **VIF** ↑ | **–** | – |" in score_table(result, "paper")


def test_images_too_dark_to_score_are_fused_and_said_to_be(desk, pair):
    for upload in pair:
        levels = np.random.default_rng(0).uniform(0, 0.9, SIZE)
        write_grey(upload.path, levels, bits=16)
    result = desk.fuse(*pair)
    assert result.file.is_file() and any(note.startswith("no scores: ") for note in result.notes)
    assert score_table(result, "paper").count("**–**") == len(PAPER_TABLE)


def test_a_shifted_pair_is_fused_with_a_note(desk, tmp_path):
    scene = np.random.default_rng(0).uniform(0, 255, (20, 20)).astype(np.float32)
    scene = cv2.resize(scene, (110, 106), interpolation=cv2.INTER_CUBIC)
    write_grey(tmp_path / "vi.png", scene[5:101, 5:101])
    write_grey(tmp_path / "ir.png", 255 - scene[1:97, 5:101])
    uploads = [Upload(tmp_path / f"{name}.png", name) for name in ("vi", "ir")]
    assert any("about 4 pixels (4 down;" in note for note in desk.fuse(*uploads).notes)
    assert not any("pixels" in note for note in desk.fuse(*uploads, task="mif").notes)


def test_features_of_a_large_pair_are_those_of_a_reduced_one_and_none_without_memory(desk, pair, monkeypatch):
    monkeypatch.setattr(page, "FEATURE_PIXELS", SIZE[0] * SIZE[1] // 4)
    result = desk.fuse(*pair)
    assert result.features["base vis"].shape == (22, 24)
    assert result.notes == ["features are those of the pair reduced to 24x22"]
    monkeypatch.setattr(page, "memory_to_take", lambda device, most: 1000)
    result = desk.fuse(*pair)
    assert result.features == {} and "features are not shown" in result.notes[-1]


def test_memory_limit_is_that_of_the_test_scripts(desk, pair):
    with pytest.raises(InputError, match="pixels need"):
        replace(desk, max_memory=10**6).fuse(*pair)


@pytest.fixture
def mlfuse_weights(tmp_path):
    torch.manual_seed(0)
    MLFuseSystem().save(tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_further_weights_are_offered_under_the_system_whose_keys_they_hold(mlfuse_weights, desk, pair, tmp_path):
    save_checkpoint(tmp_path / "other.pth", CDDFuseSystem(), {"task": "ivf"})
    offered = weights_by_system([mlfuse_weights, tmp_path / "other.pth"], CPU)
    assert list(offered["mlfuse"]) == ["MLFuse.pth", "mine.pth"] and list(offered["cddfuse"])[-1] == "other.pth"
    desk = replace(desk, weights=offered)
    assert desk.default_weights("mlfuse", "ivf") == "MLFuse.pth"
    result = desk.fuse(*pair, system="mlfuse", weights="mine.pth")
    assert "MLFuse with mine.pth" in result.facts and result.features == {}
    options = ("--system", "mlfuse", "--weights", mlfuse_weights)
    assert result.file.read_bytes() == fused_by_script(pair, tmp_path / "f.png", *options)


def test_weights_that_fit_nothing_or_share_a_name_are_refused(mlfuse_weights, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"odd.pth fits none of cddfuse, .* holds weight where"):
        weights_by_system([tmp_path / "odd.pth"], CPU)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.pth").write_bytes(mlfuse_weights.read_bytes())
    with pytest.raises(InputError, match="one name"):
        weights_by_system([mlfuse_weights, tmp_path / "more" / "mine.pth"], CPU)
    with pytest.raises(FileNotFoundError):
        weights_by_system([tmp_path / "none.pth"], CPU)


def test_every_bundled_sample_is_a_pair_with_a_thumbnail():
    samples = bundled_samples()
    assert {sample.task for sample in samples} == {"ivf", "mif"} and len(samples) == 8
    for sample in samples:
        assert sample.vis.name == sample.ir.name
        assert sample.thumbnail().shape[0] == 96 and sample.thumbnail().ndim == 3


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../b\x00.png", "ü" * 400 + ".png", "." * 50, "x." + "y" * 400, "a\\b"]
)
def test_names_from_elsewhere_are_names_of_files(name, tmp_path):
    safe = safe_name(name)
    assert Path(safe).name == safe and not safe.startswith(".") and len(safe.encode()) <= 255
    (tmp_path / f"{Path(safe).stem}.png").write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == 1
