"""fuse.py: a pair, folders, videos; colour, depth, names, sizes, and what happens to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal

import cv2
import numpy as np
import pytest

import fuse
from tests.conftest import write_pair
from utils.common import InputError, in_checkout
from utils.data.images import chroma, read_colour, read_grey, write_image
from utils.data.video import VideoFile, VideoPair
from utils.inference.fusing import fuse_arrays
from zoo.cddfuse import CDDFuseSystem

SIZE = (36, 44)


@pytest.fixture(scope="module")
def model():
    model = CDDFuseSystem().eval()
    model.load_published(in_checkout("models", "CDDFuse_IVF.pth"))
    return model


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(["b.png", "a.png"]):
        write_pair(tmp_path / "data", ("vi", "ir"), name, seed, size=SIZE)
    return tmp_path / "data"


def frames(count, size=SIZE, seed=0):
    """Grey frames of one scene under a light that changes slowly; a bright spot comes and goes in every second one."""
    scene = cv2.resize(np.random.default_rng(seed).uniform(40, 160, (6, 6)).astype(np.float32), size[::-1])
    for number in range(count):
        frame = scene + 2 * number
        frame[5:9, 5:9] += 80 * (number % 2)
        yield frame


def write_video(path, count, size=SIZE, seed=0, rate=12.5):
    with VideoFile(path, rate) as video:
        for frame in frames(count, size, seed):
            video.write(frame)
    return path


def read_video(path):
    capture, found = cv2.VideoCapture(str(path)), []
    while True:
        ok, frame = capture.read()
        if not ok:
            return found, capture.get(cv2.CAP_PROP_FPS)
        found.append(frame)


def run(capsys, ir, vi, out, *options):
    code = fuse.main([str(part) for part in ("--device", "cpu", "--ir", ir, "--vi", vi, "--out", out, *options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def pair(data, name="a.png"):
    return data / "ir" / name, data / "vi" / name


def test_a_pair_is_fused_as_by_the_test_scripts_and_has_the_colour_of_the_visible_image(data, model, tmp_path, capsys):
    code, out, _ = run(capsys, *pair(data), tmp_path / "f.png")
    assert code == 0 and "44x36, colour, 8 bits, fused in " in out
    ir, vis = (read_grey(path) for path in pair(data))
    want = fuse_arrays(model, vis, ir, "vis")
    fused, source = read_colour(tmp_path / "f.png"), read_colour(pair(data)[1])
    inside = (fused > 0).all(axis=2) & (fused < 255).all(axis=2)  # where nothing was clipped
    assert inside.mean() > 0.5
    luma = fused @ np.float32([0.299, 0.587, 0.114])
    assert np.abs(luma - want)[inside].max() < 0.51  # three channels, each rounded by up to a half
    assert np.abs(chroma(fused) - chroma(source))[inside].max() < 1
    run(capsys, *pair(data), tmp_path / "g.png", "--colour", "none")
    write_image(tmp_path / "want.png", want)
    np.testing.assert_array_equal(read_grey(tmp_path / "g.png"), read_grey(tmp_path / "want.png"))
    assert cv2.imread(str(tmp_path / "g.png"), cv2.IMREAD_UNCHANGED).ndim == 2


def test_grey_sources_give_a_grey_file_and_two_coloured_ones_share(data, tmp_path, capsys):
    ir, vi = pair(data)
    shutil.copy(ir, tmp_path / "copy.png")
    _, out, _ = run(capsys, ir, tmp_path / "copy.png", tmp_path / "f.png")
    assert "grey" in out
    red = np.stack([read_grey(ir), read_grey(ir) * 0, read_grey(ir) * 0], axis=-1)
    write_image(tmp_path / "red.png", red)
    results = {}
    for colour in ("both", "vis", "ir"):
        run(capsys, tmp_path / "red.png", vi, tmp_path / f"{colour}.png", "--colour", colour)
        results[colour] = chroma(read_colour(tmp_path / f"{colour}.png"))[..., 1].mean()
    assert results["vis"] < results["both"] <= results["ir"] + 1


def test_sixteen_bits_keep_what_eight_round_away(data, model, tmp_path, capsys):
    ir, vi = pair(data)
    shutil.copy(ir, tmp_path / "copy.png")
    code, out, _ = run(capsys, ir, tmp_path / "copy.png", tmp_path / "f.png", "--bits", 16)
    assert code == 0 and "16 bits" in out
    written = cv2.imread(str(tmp_path / "f.png"), cv2.IMREAD_UNCHANGED)
    assert written.dtype == np.uint16
    want = fuse_arrays(model, read_grey(ir), read_grey(ir), "vis")
    np.testing.assert_allclose(written / 257, want, atol=0.5 / 257 + 1e-4)
    run(capsys, ir, vi, tmp_path / "colour.tif", "--bits", 16)
    assert cv2.imread(str(tmp_path / "colour.tif"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    code, _, err = run(capsys, ir, vi, tmp_path / "f.jpg", "--bits", 16)
    assert code == 2 and "16 bits" in err and not (tmp_path / "f.jpg").exists()


def test_folders_keep_the_visible_names_and_list_what_belongs_together(data, tmp_path, capsys):
    (data / "vi" / "b.png").rename(data / "vi" / "b.bmp")  # any name of the visible image stays
    cv2.imwrite(str(data / "vi" / "b.bmp"), cv2.imread(str(data / "vi" / "a.png")))
    (data / "labels").mkdir()
    (data / "labels" / "a.xml").write_text("<annotation/>")
    (data / "vi" / "alone.png").write_bytes((data / "vi" / "a.png").read_bytes())
    out = tmp_path / "out"
    code, printed, err = run(
        capsys, data / "ir", data / "vi", out, "--list", tmp_path / "pairs.json", "--annotations", data / "labels"
    )
    assert code == 0 and "2 of 2 pairs" in printed
    assert "alone.png" in err and "no annotation" in err
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.bmp"]
    assert cv2.imread(str(out / "b.bmp")).shape[:2] == SIZE
    listed = json.loads((tmp_path / "pairs.json").read_text())
    assert listed["system"] == "CDDFuse" and len(listed["weights_sha256"]) == 64
    assert listed["pairs"][0] == {
        "name": "a", "ir": str(data / "ir" / "a.png"), "vi": str(data / "vi" / "a.png"), "fused": str(out / "a.png"),
        "annotation": str(data / "labels" / "a.xml"),
    }  # fmt: skip
    assert listed["pairs"][1]["annotation"] is None


def test_unlike_names_are_paired_as_asked_for_and_names_of_the_other_task_are_noticed(data, tmp_path, capsys):
    (data / "vi").rename(data / "MRI")
    (data / "ir").rename(data / "CT")
    (data / "CT/a.png").rename(data / "CT/x (1).png")
    (data / "MRI/a.png").rename(data / "MRI/01_a.png")
    code, printed, err = run(capsys, data / "CT", data / "MRI", tmp_path / "out", "--pair-by", "number")
    assert code == 0 and "1 of 1 pairs fused, in " in printed and "look like a case for --task mif" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01_a.png"]


def test_a_bad_pair_is_named_and_left_out_and_the_rest_is_done(data, tmp_path, capsys):
    (data / "ir" / "a.png").write_bytes(b"not an image")
    code, out, err = run(capsys, data / "ir", data / "vi", tmp_path / "out", "--list", tmp_path / "pairs.json")
    assert code == 2 and "1 of 2 pairs" in out and "out/a: " in err and "left out" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]
    assert [entry["name"] for entry in json.loads((tmp_path / "pairs.json").read_text())["pairs"]] == ["b"]


def test_a_folder_run_that_is_ended_lists_what_it_has_done(data, tmp_path, capsys, monkeypatch):
    def ended(path, *rest, **options):
        if path.stem == "b":
            signal.raise_signal(signal.SIGTERM)
        write_image(path, *rest, **options)

    monkeypatch.setattr(fuse, "write_image", ended)
    code, _, _ = run(capsys, data / "ir", data / "vi", tmp_path / "out", "--list", tmp_path / "pairs.json")
    assert code == 130
    assert [entry["name"] for entry in json.loads((tmp_path / "pairs.json").read_text())["pairs"]] == ["a"]


def test_sizes_that_differ_are_stated_with_the_options_that_help(data, tmp_path, capsys):
    ir, vi = pair(data)
    small = cv2.resize(cv2.imread(str(ir), cv2.IMREAD_GRAYSCALE), (22, 18), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tmp_path / "small.png"), small)
    code, _, err = run(capsys, tmp_path / "small.png", vi, tmp_path / "f.png")
    assert code == 2
    assert all(part in err for part in ("44x36", "22x18", "--resize-ir", "--homography")) and err.count("\n") == 1
    assert run(capsys, tmp_path / "small.png", vi, tmp_path / "f.png", "--resize-ir")[0] == 0
    # The homography between the two pixel grids is what resizing means: the centre of a pixel is at +0.5.
    (tmp_path / "h.txt").write_text("2 0 0.5\n0 2 0.5\n0 0 1\n")
    assert run(capsys, tmp_path / "small.png", vi, tmp_path / "g.png", "--homography", tmp_path / "h.txt")[0] == 0
    difference = np.abs(read_grey(tmp_path / "f.png") - read_grey(tmp_path / "g.png"))
    assert difference.max() <= 1  # fixed-point weights of OpenCV's warp
    both = ("--resize-ir", "--homography", tmp_path / "h.txt")
    assert run(capsys, tmp_path / "small.png", vi, tmp_path / "g.png", *both)[0] == 2


def test_a_homography_that_misses_the_image_or_part_of_it_is_said(data, tmp_path, capsys):
    (tmp_path / "h.txt").write_text("1 0 500\n0 1 0\n0 0 1\n")
    code, _, err = run(capsys, *pair(data), tmp_path / "f.png", "--homography", tmp_path / "h.txt")
    assert code == 2 and "inverse" in err and not (tmp_path / "f.png").exists()
    (tmp_path / "h.txt").write_text("1 0 22\n0 1 0\n0 0 1\n")
    code, out, _ = run(capsys, *pair(data), tmp_path / "f.png", "--homography", tmp_path / "h.txt")
    assert code == 0 and "covers 50%" in out


def test_a_shifted_pair_is_fused_with_a_warning(tmp_path, capsys):
    scene = np.random.default_rng(0).uniform(0, 255, (20, 20)).astype(np.float32)
    scene = cv2.resize(scene, (110, 106), interpolation=cv2.INTER_CUBIC)
    write_image(tmp_path / "vi.png", scene[5:101, 5:101])
    write_image(tmp_path / "ir.png", 255 - scene[1:97, 5:101])  # what is bright in one is dark in the other
    code, _, err = run(capsys, tmp_path / "ir.png", tmp_path / "vi.png", tmp_path / "f.png")
    assert code == 0 and "about 4 pixels (4 down;" in err and "--homography" in err
    code, _, err = run(capsys, tmp_path / "ir.png", tmp_path / "vi.png", tmp_path / "f.png", "--no-check")
    assert code == 0 and err == ""


def test_the_panel_shows_inputs_features_and_result(data, tmp_path, capsys):
    assert run(capsys, *pair(data), tmp_path / "f.png", "--panel")[0] == 0
    panel = cv2.imread(str(tmp_path / "f_panel.png"))
    images = 2 + 4 + 1  # sources; base and detail features of each; result
    assert panel.shape == (SIZE[0], images * SIZE[1] + (images - 1) * 4, 3)
    np.testing.assert_array_equal(panel[:, : SIZE[1]], cv2.imread(str(pair(data)[1])))
    np.testing.assert_array_equal(panel[:, -SIZE[1] :], cv2.imread(str(tmp_path / "f.png")))


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mp4"])
def test_a_video_keeps_its_frame_count_rate_and_size(suffix, tmp_path, capsys):
    ir, vi = (write_video(tmp_path / f"{name}.mkv", 4, seed=seed) for seed, name in enumerate(("ir", "vi")))
    code, out, err = run(capsys, ir, vi, tmp_path / f"f{suffix}", "--panel")
    assert (code, err) == (0, "") and "4 frames at 12.5 a second" in out and "flicker" in out
    found, rate = read_video(tmp_path / f"f{suffix}")
    assert len(found) == 4 and rate == pytest.approx(12.5) and found[0].shape == (*SIZE, 3)
    assert sorted(path.name for path in tmp_path.glob("f*")) == [f"f{suffix}", "f_panel.png"]


def test_brightness_is_steadier_than_if_each_frame_were_normalised_alone(model, tmp_path, capsys):
    ir, vi = (write_video(tmp_path / f"{name}.mkv", 5, seed=seed) for seed, name in enumerate(("ir", "vi")))
    flicker = {}
    for smooth in (2, 0):
        _, out, _ = run(capsys, ir, vi, tmp_path / "f.mkv", "--smooth", smooth)
        line = next(line for line in out.splitlines() if line.startswith("flicker"))
        flicker[smooth] = float(line.split("fused ")[1].split(",")[0])
        alone = float(line.split("; ")[1].split()[0])
    assert flicker[2] < flicker[0] / 2
    assert flicker[0] == pytest.approx(alone, abs=0.02)  # printed with two digits each
    vis, infrared = next(iter(VideoPair(vi, ir)))[1]()
    want = fuse_arrays(model, vis.grey, infrared.grey, "vis")  # the first frame has only its own range
    np.testing.assert_allclose(read_video(tmp_path / "f.mkv")[0][0][..., 0], want, atol=0.51)


def test_image_sequences_are_ordered_by_number_and_odd_sides_of_a_video_are_filled(tmp_path, capsys):
    for seed, name in enumerate(("ir", "vi")):
        for number, frame in zip((8, 9, 10), frames(3, (33, 35), seed), strict=True):
            write_image(tmp_path / name / f"frame_{number}.png", frame)
    code, out, err = run(capsys, tmp_path / "ir", tmp_path / "vi", tmp_path / "f.mkv", "--fps", 5)
    assert code == 0 and "3 frames at 5 a second" in out and "even sides" in err
    found, rate = read_video(tmp_path / "f.mkv")
    assert rate == 5 and found[0].shape == (34, 36, 3)
    options = ("--sequence", "--fps", 5)
    assert run(capsys, tmp_path / "ir", tmp_path / "vi", tmp_path / "frames", *options)[0] == 0
    for number, frame in zip((8, 9, 10), found, strict=True):
        written = read_grey(tmp_path / "frames" / f"frame_{number}.png")
        np.testing.assert_array_equal(written, frame[:33, :35, 0])


def test_a_bad_frame_of_a_sequence_is_replaced_by_the_one_before_it(tmp_path, capsys):
    for seed, name in enumerate(("ir", "vi")):
        for number, frame in enumerate(frames(3, seed=seed)):
            write_image(tmp_path / name / f"{number}.png", frame)
    (tmp_path / "ir" / "1.png").write_bytes(b"")
    code, out, err = run(capsys, tmp_path / "ir", tmp_path / "vi", tmp_path / "f.mkv")
    assert code == 2 and "1.png" in err and "stands in" in err
    found, _ = read_video(tmp_path / "f.mkv")
    assert len(found) == 3
    np.testing.assert_array_equal(found[0], found[1])


def test_a_video_is_written_and_read_red_first(tmp_path):
    colours = np.zeros((*SIZE, 3), np.float32)
    colours[..., 0], colours[10:, :, 1] = 200, 90
    with VideoFile(tmp_path / "vi.mkv", 25) as video:
        video.write(colours)
    np.testing.assert_array_equal(read_video(tmp_path / "vi.mkv")[0][0][..., ::-1], colours)  # blue first in OpenCV
    [(_, load)] = VideoPair(tmp_path / "vi.mkv", write_video(tmp_path / "ir.mkv", 1))
    vis, ir = load()
    np.testing.assert_array_equal(vis.colour, colours)
    assert ir.colour is None


def test_video_whose_path_is_no_utf_8_is_refused(tmp_path):
    vi, ir = (write_video(tmp_path / name, 1) for name in ("vi.avi", "ir.avi"))
    other = tmp_path / os.fsdecode(b"\xff.avi")
    with pytest.raises(InputError, match="not UTF-8"):
        VideoFile(other, 25)
    with pytest.raises(InputError, match="not UTF-8"):
        VideoPair(vi.rename(other), ir)


def test_videos_of_different_length_are_fused_as_far_as_both_go(tmp_path, capsys):
    ir, vi = write_video(tmp_path / "ir.mkv", 2), write_video(tmp_path / "vi.mkv", 3)
    code, out, err = run(capsys, ir, vi, tmp_path / "out")
    assert code == 2 and f"{ir} has 2 readable frames and {vi} has more" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000001.png", "000002.png"]


@pytest.mark.parametrize(("rates", "offset"), [((30, 9), 0), ((9, 30), 0), ((30, 9), 0.5), ((25, 25), -0.4)])
def test_frames_of_videos_are_paired_by_time(rates, offset, tmp_path):
    for name, rate in zip(("vi", "ir"), rates, strict=True):
        with VideoFile(tmp_path / f"{name}.mkv", rate) as video:
            for number in range(rate):  # a second
                video.write(np.full(SIZE, 8.0 * number))
    found = VideoPair(tmp_path / "vi.mkv", tmp_path / "ir.mkv", offset)
    shown = [[round(float(source.grey.mean() / 8)) for source in load()] for _, load in found]
    first, last = (np.ceil(max(0, offset) * rates[0]), np.ceil(min(1, 1 + offset) * rates[0]))
    wanted = np.arange(first, last)
    there = np.floor((wanted / rates[0] - offset) * rates[1] + 0.5 + 1e-6).clip(max=rates[1] - 1)
    assert shown == np.stack([wanted, there], axis=1).astype(int).tolist()
    assert found.count == len(wanted) and found.rest == "" and found.rate == rates[0]


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interrupted_video_can_be_played_and_replaces_nothing(how, tmp_path, capsys, monkeypatch):
    ir, vi = (write_video(tmp_path / f"{name}.mkv", 4, seed=seed) for seed, name in enumerate(("ir", "vi")))
    before = write_video(tmp_path / "f.mp4", 1).read_bytes()
    write = VideoFile.write

    def interrupted(self, image, name=""):
        if self.written == 2:
            if how == "ctrl-c":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        write(self, image, name)

    monkeypatch.setattr(VideoFile, "write", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    code, _, err = run(capsys, ir, vi, tmp_path / "f.mp4")
    assert code == 130 and f"{tmp_path / 'f.partial.mp4'}: the 2 frames done so far" in err
    assert len(read_video(tmp_path / "f.partial.mp4")[0]) == 2
    assert (tmp_path / "f.mp4").read_bytes() == before
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("ir", "vi", "out", "options", "said"),
    [
        ("ir/none.png", "vi/a.png", "f.png", (), "nothing at"),
        ("ir", "vi/a.png", "f.png", (), "one kind"),
        ("ir/a.png", "vi/a.png", "f.xyz", (), "unknown image format"),
        ("ir/a.png", "vi/a.png", "f.mkv", (), "is a video"),
        ("ir/a.png", "vi/a.png", "vi/a.png", (), "write over the source"),
        ("ir", "vi", "vi", (), "write over the source"),
        ("ir", "vi", "f.png", (), "name a folder"),
        ("ir", "vi", "f.mov", (), ".mkv is lossless"),
        ("ir", "vi", "f.mkv", ("--bits", 16), "8 bits"),
        ("ir", "vi", "f.mkv", ("--list", "pairs.json"), "--list is for"),
        ("ir", "vi", "out", ("--annotations", "labels"), "--list"),
        ("ir", "vi", "out", ("--fps", 0), "--fps"),
        ("ir", "vi", "out", ("--smooth", -1), "--smooth"),
        ("ir", "vi", "out", ("--suffix", ".xyz"), "unknown image format"),
        ("ir/a.png", "vi/a.png", "f.png", ("--list", "pairs.json"), "are for folders"),
        ("ir/a.png", "vi/a.png", "f.png", ("--system", "tsdm", "--task", "mif"), "--weights"),
        ("ir/a.png", "vi/a.png", "f.png", ("--skip", "what"), "--skip what"),
        ("bad.avi", "worse.avi", "f.mkv", (), "not a video"),
        ("bad.avi", "link.avi", "f.mkv", (), "one and the same"),
        ("ir", "ir", "out", (), "one and the same"),
        (
            "ir",
            "jpeg",
            "out",
            ("--bits", 16),
            "a.jpg cannot hold 16 bits; use one of .png .tif .tiff (in a folder: --suffix .png)",
        ),
        ("ir", "large", "out", (), "not one of 2 pairs can be used"),
        ("ir", "large", "out", ("--pair-by", "("), "regular expression"),
        ("ir", "vi", "out", ("--offset", 1), "--offset is for two videos"),
        ("bad.avi", "worse.avi", "f.mkv", ("--offset", "nan"), "--offset: must be a number from"),
    ],
)
def test_bad_input_is_one_clear_line(ir, vi, out, options, said, data, capsys):
    for name in ("bad.avi", "worse.avi"):
        (data / name).write_bytes(b"no video")
    (data / "link.avi").symlink_to(data / "bad.avi")
    for name in "ab":
        write_image(data / "jpeg" / f"{name}.jpg", np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE))
        write_image(data / "large" / f"{name}.png", np.linspace(0, 255, 2500).reshape(50, 50))
    before = sorted(data.rglob("*"))
    code, _, err = run(capsys, data / ir, data / vi, data / out, *options)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert sorted(data.rglob("*")) == before
