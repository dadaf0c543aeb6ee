"""dataprocessing.py and the patch file."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import dataprocessing
from tests.conftest import write_pair
from utils.common import ROOT, InputError
from utils.data.images import read_colour, read_grey, read_luma
from utils.data.patches import PatchDataset, PatchWriter, batches_in_epoch, is_low_contrast, random_batches, to_unit
from utils.data.saliency import visual_saliency


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(["01.png", "02.png", "10.png"]):
        write_pair(tmp_path / "SET", ("vi", "ir"), name, seed)
    return tmp_path / "SET"


def prepare(folder, out, *options):
    return dataprocessing.main(
        ["--data", str(folder), "--patch-size", "32", "--stride", "20", "--out", str(out), *options]
    )


@pytest.mark.parametrize("layout", ["compact", "published"])
def test_patches_are_the_windows_of_the_images_in_order(folder, tmp_path, layout, capsys):
    assert prepare(folder, tmp_path / "p.h5", "--layout", layout) == 0
    dataset = PatchDataset(tmp_path / "p.h5")
    # 64x72 images: rows 0, 20 and columns 0, 20, 40
    assert len(dataset) == 3 * 6 and "18 patches kept, 0 dropped" in capsys.readouterr().out
    read = read_grey if layout == "compact" else read_luma
    window = (slice(20, 52), slice(40, 72))
    vis, ir = (to_unit(patches[2 * 6 + 5 :][:1])[0] for patches in (dataset.vis, dataset.ir))
    assert vis.shape == (1, 32, 32) and vis.dtype == torch.float32
    np.testing.assert_allclose(vis[0], read(folder / "vi/10.png")[window] / 255, rtol=0, atol=1e-7)
    np.testing.assert_allclose(ir[0], read(folder / "ir/10.png")[window] / 255, rtol=0, atol=1e-7)
    with h5py.File(tmp_path / "p.h5") as file:
        assert file.attrs["patch_size"] == 32 and file.attrs["stride"] == 20 and "SET" in file.attrs["sources"]
        if layout == "published":
            assert set(file) == {"vis_patchs", "ir_patchs"}
            assert set(file["ir_patchs"]) == {str(i) for i in range(18)}
            assert file["ir_patchs/0"].shape == (1, 32, 32) and file["ir_patchs/0"].dtype == np.float32


def test_data_sets_and_folders_go_into_one_file_whose_default_name_is_the_published_one(folder, tmp_path, monkeypatch):
    write_pair(tmp_path / "MED", ("MRI", "PET"), "1.png", 9)
    monkeypatch.chdir(tmp_path)
    assert dataprocessing.main(["--data", "SET", "--patch-size", "32"]) == 0
    assert len(PatchDataset("data/SET_imgsize_32_stride_200.h5")) == 3
    both = ["--vi", "SET/vi", "--ir", "SET/ir", "--patch-size", "32", "--out", "p.h5"]
    assert dataprocessing.main(["--data", "SET", "MED", *both]) == 0
    assert len(PatchDataset("p.h5")) == 3 + 1 + 3


@pytest.mark.parametrize(
    ("patch", "low", "legacy"),
    [
        (np.zeros((8, 8)), True, False),  # black: the published filter divides by zero and keeps it
        (np.full((8, 8), 128.0), True, True),
        (np.linspace(100, 105, 64).reshape(8, 8), True, True),
        (np.linspace(100, 140, 64).reshape(8, 8), False, False),
    ],
)
def test_low_contrast_filter(patch, low, legacy):
    assert is_low_contrast(patch) == low
    assert is_low_contrast(patch, legacy=True) == legacy


def test_pair_is_dropped_when_either_patch_is_flat(folder, tmp_path, capsys):
    import cv2

    cv2.imwrite(str(folder / "ir/02.png"), np.zeros((64, 72), np.uint8))
    assert prepare(folder, tmp_path / "p.h5") == 0
    assert "12 patches kept, 6 dropped" in capsys.readouterr().out
    assert prepare(folder, tmp_path / "q.h5", "--legacy-filter") == 0
    assert len(PatchDataset(tmp_path / "q.h5")) == 18


def test_bad_pair_is_named_and_the_rest_done(folder, tmp_path, capsys):
    (folder / "vi/02.png").write_bytes(b"broken")
    write_pair(folder, ("vi", "ir"), "small.png", 5, size=(20, 20))
    write_pair(folder, ("vi", "ir"), "alone.png", 6)
    (folder / "ir/alone.png").unlink()
    assert prepare(folder, tmp_path / "p.h5") == 2
    printed = capsys.readouterr()
    assert "02.png is not an image" in printed.err and "smaller than a patch" in printed.err
    assert "alone.png" in printed.err and "2 left out" in printed.out
    assert len(PatchDataset(tmp_path / "p.h5")) == 12


def test_full_disk_keeps_the_old_file_and_the_last_line_says_why(folder, tmp_path):
    (tmp_path / "p.h5").write_bytes(b"old")
    # A limit on the size of files stands in for a full disk; it holds for the child process alone.
    code = (
        "import resource, signal, sys, dataprocessing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "sys.exit(dataprocessing.main(sys.argv[1:]))"
    )
    options = ["--data", str(folder), "--patch-size", "32", "--stride", "8", "--out", str(tmp_path / "p.h5")]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    # The HDF5 library complains on its own before our line, and may crash at exit over what it could not flush;
    # so neither the number of lines nor the exit code is ours to promise.
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: ") and "is the disk full?" in done.stderr.splitlines()[-1]
    assert (tmp_path / "p.h5").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["SET", "p.h5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no folder at nowhere"),
        (["--patch-size", "1"], "--patch-size"),
        (["--stride", "0"], "--stride"),
        (["--stride", "9" * 400], "--stride: must be a whole number from 1 to 1000000, got '99"),
        (["--patch-size", "9" * 400], "--patch-size: must be"),
        (["--patch-size", "500"], "not one patch was kept"),
        (["--out", "patches.png"], "ends in .h5"),
        (["--vi", "SET/vi"], "as many of one as of the other"),
        (["--holdout", "1"], "--holdout 1 would leave nothing"),
        (["--holdout", "2", "--holdout-size", "40"], "--holdout-size: must be"),
        (["--colour", "--layout", "published"], "colour is stored in the layout compact"),
        (["--saliency", "--layout", "published"], "saliency maps are stored in the layout compact"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, options, message):
    out = ["--out", str(tmp_path / "p.h5")]
    assert dataprocessing.main(["--data", str(folder), *out, *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "p.h5").exists()


def test_bad_patch_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataprocessing.py"):
        PatchDataset(tmp_path / "none.h5")
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match="not a readable patch file"):
        PatchDataset(tmp_path / "bad.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = np.zeros(3)
    with pytest.raises(InputError, match="not a readable patch file"):
        PatchDataset(tmp_path / "other.h5")
    good = np.zeros((2, 48, 48), np.uint8)
    bad = {
        "group": {"vis/a": np.zeros(3), "ir/a": np.zeros(3)},
        "scalar": {"vis": 1.0, "ir": 1.0},
        "flat": {"vis": good[0], "ir": good[0]},
        "names": {"vis_patchs/a": np.zeros((1, 8, 8)), "ir_patchs/a": np.zeros((1, 8, 8))},
        "unequal": {f"{g}/{i}": np.zeros((1, 8, 8 + i)) for g in ("vis_patchs", "ir_patchs") for i in range(2)},
        "range": {"vis": np.full((2, 8, 8), 7.0), "ir": np.full((2, 8, 8), 7.0)},
        "nan": {"vis": np.full((2, 8, 8), np.nan), "ir": np.zeros((2, 8, 8))},
        "big-endian": {"vis": np.zeros((2, 8, 8), ">f4"), "ir": np.zeros((2, 8, 8), ">f4")},
        "compound": {"vis": np.zeros((2, 8, 8), "u1,u1"), "ir": good},
        "text": {"vis": np.full((2, 8, 8), b"abc"), "ir": good},
        "no size": {"vis": good[:, :0], "ir": good[:, :0]},
        "another file": {"vis": h5py.ExternalLink(tmp_path / "good.h5", "vis"), "ir": good},
        "small pair": {"vis": good, "ir": good, "validation/0": good[:, :10, :10]},
        "float pair": {"vis": good, "ir": good, "validation/0": good / 1.0},
        "flat pair": {"vis": good, "ir": good, "validation/0": good[0]},
    }
    for name, content in {"good": {"vis": good, "ir": good, "validation/0": good}, **bad}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, value in content.items():
                file[key] = value
                if key.startswith("validation"):
                    file[key].attrs["name"] = "one"
    assert len(PatchDataset(tmp_path / "good.h5").validation) == 1
    for name, options in (("huge", {"chunks": (1, 8, 8)}), ("external", {"external": [(tmp_path / "raw", 0, 10**9)]})):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            shape = (10**12, 8, 8) if name == "huge" else (2, 8, 8)
            file.create_dataset("vis", shape, np.uint8, **options)
            file["ir"] = good
    said = {"huge": "declares", "external": "another file", "small pair": "validation pair one"}
    for name in {**bad, **said}:
        with pytest.raises(InputError, match=f"{name}.h5 is not a readable patch file .*{said.get(name, '')}") as error:
            PatchDataset(tmp_path / f"{name}.h5")
        assert "\n" not in str(error.value)
    with PatchWriter(tmp_path / "empty.h5", 8):
        pass
    with pytest.raises(InputError, match="at least one"):
        PatchDataset(tmp_path / "empty.h5")


def test_published_files_are_read_in_the_order_of_their_numbers(tmp_path):
    with PatchWriter(tmp_path / "p.h5", 4, "published") as writer:
        patches = np.arange(12, dtype=np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32)
        writer.add(patches, patches + 100)
    dataset = PatchDataset(tmp_path / "p.h5")
    assert (dataset.vis[:, 0, 0] * 255).round().tolist() == list(range(12))  # 10 after 9, not after 1
    assert (dataset.ir[:, 0, 0] * 255).round().tolist() == list(range(100, 112))


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """Ten patches; pixel (y, x) of patch n is 20 n + y in vis, and one more in ir."""
    base = 20 * np.arange(10)[:, None, None] + np.arange(8)[None, :, None] + np.zeros((1, 1, 8), int)
    with PatchWriter(tmp_path / "n.h5", 8) as writer:
        writer.add(base.astype(np.float32), base.astype(np.float32) + 1)
    return PatchDataset(tmp_path / "n.h5")


def test_epoch_is_every_patch_once_and_the_last_batch_may_be_smaller(numbered):
    batches = list(random_batches(numbered, 4, (0, 0)))
    assert [len(vis) for vis, *_ in batches] == [4, 4, 2]
    seen = torch.cat([vis[:, 0, 0, 0] for vis, *_ in batches]) * 255 / 20
    assert sorted(seen.round().int().tolist()) == list(range(10))
    assert seen.round().int().tolist() != list(range(10))


def test_same_seed_same_batches_and_other_epoch_others(numbered):
    def first(seed):
        return next(random_batches(numbered, 4, seed, crop=4, flips=True))[0]

    assert torch.equal(first((0, 3)), first((0, 3)))
    assert not torch.equal(first((0, 3)), first((0, 4)))


def test_both_images_get_the_same_crop_and_turn(numbered):
    for vis, ir, *_ in random_batches(numbered, 4, (0, 0), crop=5, flips=True, batches=20):
        assert vis.shape[2:] == (5, 5)
        torch.testing.assert_close(ir - vis, torch.full_like(vis, 1 / 255))


def test_epoch_can_be_longer_or_shorter_than_the_patches(numbered):
    assert sum(len(vis) for vis, *_ in random_batches(numbered, 4, (0, 0), batches=2)) == 8
    many = torch.cat([vis[:, 0, 0, 0] for vis, *_ in random_batches(numbered, 4, (0, 0), batches=5)]) * 255 / 20
    assert np.bincount(many.round().int().numpy()).tolist() == [2] * 10


def test_epoch_may_be_begun_in_its_middle(numbered):
    options = {"crop": 5, "flips": True, "batches": 6}
    whole = list(random_batches(numbered, 4, (1, 2), **options))
    rest = list(random_batches(numbered, 4, (1, 2), start=4, **options))
    assert len(whole) == 6 and len(rest) == 2
    for expected, got in zip(whole[4:], rest, strict=True):
        assert torch.equal(expected.vis, got.vis) and torch.equal(expected.ir, got.ir)


def test_processes_share_each_batch_and_get_equally_many(numbered):
    whole = list(random_batches(numbered, 4, (1, 2), crop=5, flips=True))
    parts = [list(random_batches(numbered, 4, (1, 2), crop=5, flips=True, part=(i, 2))) for i in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.vis[0::2], first.vis) and torch.equal(batch.vis[1::2], second.vis)


@pytest.mark.parametrize(("processes", "smallest", "sizes"), [(1, 2, [4, 4, 2]), (1, 3, [4, 4]), (4, 1, [1, 1])])
def test_last_batch_is_left_out_where_a_process_would_get_too_little(numbered, processes, smallest, sizes):
    batches = list(random_batches(numbered, 4, (0, 0), part=(0, processes), smallest=smallest))
    assert [len(batch.vis) for batch in batches] == sizes
    assert batches_in_epoch(len(numbered), 4, processes, smallest) == len(sizes)


def test_flips_and_quarter_turns_are_the_eight_of_the_square(tmp_path):
    corner = np.zeros((1, 3, 3), np.float32)
    corner[0, 0, 0], corner[0, 0, 1] = 200, 100  # tells all eight apart
    with PatchWriter(tmp_path / "c.h5", 3) as writer:
        writer.add(corner, corner)
    batches = random_batches(PatchDataset(tmp_path / "c.h5"), 1, (0,), flips=True, batches=100)
    seen = {tuple((batch.vis * 255).round().int().flatten().tolist()) for batch in batches}
    turned = [np.rot90(image, k) for image in (corner[0], corner[0].T) for k in range(4)]
    assert seen == {tuple(image.astype(int).flatten()) for image in turned}


# --- validation pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compact", "published"])
def test_one_pair_in_n_is_for_validation_and_no_patch_is_cut_from_it(tmp_path, layout):
    for i in range(7):
        write_pair(tmp_path / "SET", ("vi", "ir"), f"{i}.png", seed=i)
    out = tmp_path / "p.h5"
    options = ["--patch-size", "32", "--stride", "32", "--holdout", "3", "--holdout-size", "50", "--layout", layout]
    assert dataprocessing.main(["--data", str(tmp_path / "SET"), "--out", str(out), *options]) == 0
    dataset = PatchDataset(out)
    assert [Path(pair.name).name for pair in dataset.validation] == ["2.png", "3.png"]  # a block of neighbours
    vis, ir = read_luma(tmp_path / "SET/vi/3.png"), read_luma(tmp_path / "SET/ir/3.png")
    middle = np.s_[7:57, 11:61]  # of 64 x 72
    np.testing.assert_array_equal(dataset.validation[1].vis, np.round(vis[middle]).astype(np.uint8))
    np.testing.assert_array_equal(dataset.validation[1].ir, np.round(ir[middle]).astype(np.uint8))
    assert len(dataset) == 5 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="names need not be text there alone")
def test_a_validation_pair_whose_name_is_no_utf_8_is_kept(tmp_path):
    for i in range(3):
        write_pair(tmp_path / "SET", ("vi", "ir"), f"{i}.png", seed=i)
    folder = (tmp_path / "SET").rename(tmp_path / os.fsdecode(b"SET\xff"))
    options = ["--patch-size", "32", "--stride", "32", "--holdout", "3", "--holdout-size", "50"]
    assert dataprocessing.main(["--data", str(folder), "--out", str(tmp_path / "p.h5"), *options]) == 0
    [pair] = PatchDataset(tmp_path / "p.h5").validation
    assert pair.name.endswith("SET?/vi/1.png")


def test_a_set_named_twice_counts_twice_and_its_validation_pairs_once(tmp_path):
    for i in range(4):
        write_pair(tmp_path / "SET", ("vi", "ir"), f"{i}.png", seed=i)
    options = ["--patch-size", "32", "--stride", "32", "--holdout", "4", "--holdout-size", "50"]
    out = tmp_path / "p.h5"
    assert dataprocessing.main(["--data", *[str(tmp_path / "SET")] * 2, "--out", str(out), *options]) == 0
    dataset = PatchDataset(out)
    assert len(dataset) == 2 * 3 * 4
    assert [Path(pair.name).name for pair in dataset.validation] == ["2.png"]


# --- saliency maps ------------------------------------------------------------------------------------------


def test_saliency_patches_are_cut_from_the_map_of_the_whole_image(folder, tmp_path):
    out = tmp_path / "p.h5"
    options = ["--patch-size", "32", "--stride", "32", "--saliency"]
    assert dataprocessing.main(["--data", str(folder), "--out", str(out), *options]) == 0
    dataset = PatchDataset(out)
    expected = visual_saliency(read_luma(folder / "ir/01.png"))
    np.testing.assert_array_equal(dataset.ir_saliency[1], expected[:32, 32:64])
    batch = next(random_batches(dataset, 2, (0,), crop=8, flips=True))
    assert batch.ir_saliency.shape == batch.ir.shape


# --- colour -------------------------------------------------------------------------------------------------


def test_colour_patches_are_those_of_the_file_and_their_grey_is_that_of_a_grey_file(folder, tmp_path):
    options = ["--holdout", "3", "--holdout-size", "50"]
    assert prepare(folder, tmp_path / "colour.h5", "--colour", *options) == 0
    assert prepare(folder, tmp_path / "grey.h5", *options) == 0
    colour, grey = PatchDataset(tmp_path / "colour.h5", colour=True), PatchDataset(tmp_path / "grey.h5", colour=True)
    levels = read_colour(folder / "vi/10.png")
    np.testing.assert_array_equal(colour.vis[6 + 5], levels[20:52, 40:72])
    torch.testing.assert_close(
        to_unit(colour.vis[11:12])[0], torch.from_numpy(levels[20:52, 40:72] / 255).movedim(-1, 0)
    )
    np.testing.assert_array_equal(colour.validation[0].vis, read_colour(folder / "vi/02.png")[7:57, 11:61])
    # A system that takes no colour sees the grey file.
    as_grey = PatchDataset(tmp_path / "colour.h5")
    assert as_grey.hash == grey.hash and colour.hash != grey.hash
    assert as_grey.validation_hash == grey.validation_hash != colour.validation_hash
    np.testing.assert_array_equal(as_grey.validation[0].vis, grey.validation[0].vis)
    np.testing.assert_array_equal(as_grey.validation[0].ir, colour.validation[0].ir)


def test_random_batches_keep_colours_on_their_pixels(tmp_path):
    ir = np.random.default_rng(0).integers(200, size=(4, 9, 9)).astype(np.float32)
    with PatchWriter(tmp_path / "c.h5", 9, colour=True) as writer:
        writer.add(np.stack([ir, ir + 20, ir + 40], axis=-1), ir)
    for batch in random_batches(PatchDataset(tmp_path / "c.h5", colour=True), 2, (0,), crop=5, flips=True):
        assert batch.vis.shape == (2, 3, 5, 5)
        for channel in range(3):
            torch.testing.assert_close(batch.vis[:, channel], batch.ir[:, 0] + 20 * channel / 255)


@pytest.mark.slow
def test_mutated_patch_files_are_whole_or_refused_in_a_line(tmp_path):
    draw, counts = random.Random(0), collections.Counter()
    levels = np.random.default_rng(0).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    with PatchWriter(tmp_path / "good.h5", 48) as writer:
        writer.add(levels[:2], levels[1:])
        writer.add_validation("one", levels[0], levels[1])
    good = (tmp_path / "good.h5").read_bytes()
    for i in range(300):
        data = bytearray(good)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        (tmp_path / f"{i}.h5").write_bytes(data)
        try:
            read = PatchDataset(tmp_path / f"{i}.h5")
        except InputError as error:
            counts["refused"] += 1
            assert "\n" not in str(error)
        else:
            counts["read"] += 1
            assert read.vis.shape[1:] == read.ir.shape[1:] and len(read.vis) == len(read.ir) >= 1
    print(f"\n{dict(counts)} of {counts.total()} mutated patch files")
    assert min(counts.values()) > 20
