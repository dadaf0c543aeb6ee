"""train.py: the published schedule, resuming, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import train
from utils.data.patches import PatchDataset, PatchWriter
from utils.inference import fusing
from utils.inference.checkpoint import read_file, save_file
from utils.training.loop import Run
from utils.training.optimizers import OPTIMIZERS
from zoo import Stage, find_system
from zoo.cddfuse import CDDFuseSystem


def run(patch_file, out, *options, epochs=(1, 1)):
    argv = ["--data", str(patch_file), "--out", str(out), "--device", "cpu", "--recipe", "published"]
    argv += ["--batch-size", "4", "--validate-every", "0"]
    argv += ["--stage1-epochs", str(epochs[0]), "--stage2-epochs", str(epochs[1]), *options]
    return train.main(argv)


def weights(out):
    content = read_file(next(out.glob("CDDFuse_*.pth")))
    return {f"{name}.{k}": v for name, state in content.items() if name != "about" for k, v in state.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_repeats_the_straight_one_bit_for_bit(optimizer, patch_file, tmp_path, monkeypatch):
    options = ("--flips", "--crop", "12", "--optimizer", optimizer)
    assert run(patch_file, tmp_path / "a", *options, epochs=(2, 2)) == 0

    train_step, calls = Run.train_step, []

    def dies_in_step_6(*args):  # the middle of an epoch of stage two
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", dies_in_step_6)
        assert run(patch_file, tmp_path / "b", *options, epochs=(2, 2)) == 130
    assert run(patch_file, tmp_path / "b", *options, "--resume", "auto", epochs=(2, 2)) == 0
    straight, resumed = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in "ab"]
    assert [json.loads(line)["losses"] for line in logs[0]] == [json.loads(line)["losses"] for line in logs[1]]


def test_run_of_one_optimizer_is_not_gone_on_with_by_another(patch_file, tmp_path, capsys):
    stop = ("--max-minutes", "1e-6")
    assert run(patch_file, tmp_path / "run", *stop) == 75
    before = (tmp_path / "run/last.pt").read_bytes()
    assert run(patch_file, tmp_path / "run", "--optimizer", "muon", "--resume", "auto", "--force") == 2
    assert "trained with --optimizer adam" in capsys.readouterr().err
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_checkpoint_from_before_there_was_a_choice_is_adams(patch_file, tmp_path):
    assert run(patch_file, tmp_path / "run", "--max-minutes", "1e-6") == 75
    last = tmp_path / "run/last.pt"
    saved = read_file(last)
    newer = "optimizer muon_factor range_weight difference_weight fused_ssim_weight intensity_weight".split()
    for name in newer:
        del saved["settings"][name]
    save_file(last, saved)
    assert run(patch_file, tmp_path / "run", "--resume", "auto") == 0


def new_run(args, options, system_options, patch_file):
    model = CDDFuseSystem()
    facts = {"commit": "", "init": ""}
    stages = model.stages(system_options, args.task)
    return Run(model, stages, options, PatchDataset(patch_file), {}, facts, patch_file.parent / "run", "w.pth")


def test_cosine_schedule_warms_up_and_ends_at_the_floor_and_a_factor_is_of_muon_alone(patch_file):
    options = "--schedule cosine --warmup-steps 4 --learning-rate 1e-3 --epoch-batches 10 --optimizer muon"
    options += " --muon-factor 3 --stage1-epochs 1 --stage2-epochs 1"
    args = train.build_parser(CDDFuseSystem).parse_args(options.split())
    state = new_run(args, train.take_options(args, train.Options), train.take_options(args, CDDFuseSystem.Options),
                    patch_file)  # fmt: skip
    for step, rate in ((0, 0.25e-3), (10, 0.5e-3), (20, 1e-6)):
        state.step = step
        state.set_learning_rates()
        assert state.learning_rates() == pytest.approx(dict.fromkeys(state.networks, rate))
        muons = [group["lr"] for group in state.optimizer.param_groups if group.get("by")]
        assert muons == pytest.approx([3 * rate] * 4)


def test_factor_of_stage_two_is_for_encoder_and_decoder_alone():
    stages = CDDFuseSystem().stages(CDDFuseSystem.Options(stage2_lr_factor=0.25), "ivf")
    assert [dict(stage.lr_scale) for stage in stages] == [{}, {"encoder": 0.25, "decoder": 0.25}]


def test_learning_rates_are_those_of_the_published_run(patch_file):
    args = train.build_parser(CDDFuseSystem).parse_args([])
    options = train.take_options(args, train.Options)
    state = new_run(args, options, CDDFuseSystem.Options(), patch_file)
    seen = {}
    for epoch in range(state.epochs):
        stage, _ = state.stage_of(epoch)
        state.set_learning_rates()
        seen[epoch] = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
        for name in stage.networks:
            state.epochs_trained[name] += 1
    assert len(seen) == 120
    # Simulated from the published code: epochs 0, 19, 20, 39, 40, 59, ... of encoder and fusion layers.
    encoder = {0: 1e-4, 19: 1e-4, 20: 5e-5, 39: 5e-5, 40: 2.5e-5, 60: 1.25e-5, 80: 6.25e-6, 100: 3.125e-6}
    fusion = {40: 1e-4, 59: 1e-4, 60: 5e-5, 80: 2.5e-5, 100: 1.25e-5, 119: 1.25e-5}
    for epoch, rate in encoder.items():
        assert seen[epoch]["encoder"] == seen[epoch]["decoder"] == pytest.approx(rate)
    for epoch, rate in fusion.items():
        assert seen[epoch]["base_fusion"] == seen[epoch]["detail_fusion"] == pytest.approx(rate)


def test_each_network_is_clipped_alone(patch_file, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def watched(self, *args):
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(patch_file, tmp_path / "run")
    assert len(norms) == 2 * 2 + 2 * 4  # two steps of two networks, two of four
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)


def test_init_starts_from_given_weights(patch_file, tmp_path):
    run(patch_file, tmp_path / "a", epochs=(1, 0))
    given = tmp_path / "a/CDDFuse_IVF.pth"
    run(patch_file, tmp_path / "b", "--init", str(given), "--learning-rate", "1e-9", "--min-lr", "0", epochs=(1, 0))
    for key, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[key], value, rtol=0, atol=1e-7)  # two steps of 1e-9


@pytest.mark.parametrize(("has_it", "wanted"), [(True, "bfloat16"), (False, "float32")])
def test_automatic_precision_is_recorded_as_what_it_came_to(has_it, wanted, patch_file, tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "has_bfloat16", lambda device: has_it)
    assert run(patch_file, tmp_path / "run", "--precision", "auto", "--max-minutes", "1e-6") == 75
    assert read_file(tmp_path / "run/last.pt")["settings"]["precision"] == wanted


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be more than 0"),
        (["--learning-rate", "-1", "--crop", "-2"], "--crop must be at least 0"),
        (["--learning-rate", "nan"], "--learning-rate must be more than 0, got nan"),
        (["--crop", "5"], "at least 6"),
        (["--device", "meta"], "try --device cpu"),
        (["--schedule", "linear"], "step, cosine"),
        (["--precision", "float8"], "float32, bfloat16"),
        (["--ssim-form", "old"], "published, standard"),
        (["--crop", "99"], "99 pixels"),
        (["--device", "quantum"], "try --device cpu"),
        (["--resume", "none.pt"], "no file at none.pt"),
        (["--init", "none.pth"], "no file at none.pth"),
        (["--stage1-epochs", "0", "--stage2-epochs", "0"], "no epoch"),
        (["--max-minutes", "-1"], "from 0 to"),
        (["--ema", "1"], "--ema must be less than 1"),
        (["--epoch-batches", "9" * 40], "--epoch-batches must be at most 1000000"),
        (["--epoch-batches", "1000000", "--batch-size", "4096"], "shorter epochs"),
        (["--data", "."], "python dataprocessing.py --data . --out data/mine.h5"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(patch_file, tmp_path, capsys, options, message):
    assert run(patch_file, tmp_path / "run", *options) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_patches_without_saliency_maps_are_refused_with_the_command_to_run(patch_file, tmp_path, capsys):
    assert train.main(["--system", "mlfuse", "--data", str(patch_file), "--out", str(tmp_path / "run")]) == 2
    assert "dataprocessing.py --saliency" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_run_folder_is_not_overwritten_and_changed_options_are_named(patch_file, tmp_path, capsys):
    run(patch_file, tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    capsys.readouterr()
    assert run(patch_file, tmp_path / "run") == 2
    assert "--resume auto" in error_of(capsys)
    assert run(patch_file, tmp_path / "run", "--resume", "auto", "--seed", "3", epochs=(1, 2)) == 2
    error = error_of(capsys)
    assert "seed 0 -> 3" in error and "stage2_epochs 1 -> 2" in error
    save_file(tmp_path / "run/other.pt", {"epoch": 1})
    assert run(patch_file, tmp_path / "run", "--resume", str(tmp_path / "run/other.pt")) == 2
    assert "not a file to resume from" in error_of(capsys)
    run(patch_file, tmp_path / "second")
    capsys.readouterr()
    assert run(patch_file, tmp_path / "second", "--resume", str(tmp_path / "run/last.pt")) == 2  # not over a run
    assert "choose another --out" in error_of(capsys)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/CDDFuse_IVF.pth").write_bytes(b"precious")
    assert run(patch_file, tmp_path / "models") == 2  # not over weights
    (tmp_path / "second/last.pt").unlink()  # of a run that is done
    for name in ("models", "second"):
        assert run(patch_file, tmp_path / name, "--resume", "auto") == 2
    assert (tmp_path / "models/CDDFuse_IVF.pth").read_bytes() == b"precious"
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_resume_with_other_patches_is_refused(patch_file, tmp_path, capsys):
    run(patch_file, tmp_path / "run")
    with PatchWriter(tmp_path / "other.h5", 16) as writer:
        writer.add(np.full((6, 16, 16), 9.0), np.full((6, 16, 16), 8.0))
    capsys.readouterr()
    assert run(tmp_path / "other.h5", tmp_path / "run", "--resume", "auto") == 2
    assert "patches_hash" in error_of(capsys)


def test_full_disk_at_the_end_is_one_line_and_a_whole_checkpoint_is_kept(patch_file, tmp_path, monkeypatch, capsys):
    run(patch_file, tmp_path / "run", "--max-minutes", "1e-9", epochs=(1, 0))
    before = (tmp_path / "run/last.pt").read_bytes()

    def full_disk(*args, **kwargs):
        raise RuntimeError("unexpected pos 64 vs 0\nmore lines")

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        assert run(patch_file, tmp_path / "run", "--resume", "auto", epochs=(1, 0)) == 2
    assert "is the disk full" in error_of(capsys)
    assert before in [path.read_bytes() for path in (tmp_path / "run").glob("*.pt")]
    assert run(patch_file, tmp_path / "run", "--resume", "auto", epochs=(1, 0)) == 0


def test_full_disk_in_the_middle_is_a_warning_and_training_goes_on(patch_file, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full_at_first(*args, **kwargs):
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("unexpected pos 64 vs 0")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full_at_first)
    assert run(patch_file, tmp_path / "run", "--save-every-minutes", "0", epochs=(2, 0)) == 0
    assert "training goes on" in capsys.readouterr().err
    assert (tmp_path / "run/CDDFuse_IVF.pth").exists()


@pytest.mark.parametrize("where", ["gradient", "weights"])
def test_non_finite_gradients_and_weights_are_never_saved(patch_file, tmp_path, monkeypatch, capsys, where):
    run(patch_file, tmp_path / "run", epochs=(2, 0))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    stages, step = CDDFuseSystem.stages, torch.optim.Adam.step

    def broken_stages(self, options, task):
        # A loss that is finite, with a gradient that is not: the square root of 0.
        def losses(batch):
            return {"total": first.losses(batch)["total"].mul(0).sqrt()}

        first, *rest = stages(self, options, task)
        return [Stage(first.name, first.epochs, first.networks, losses), *rest]

    def broken_step(self, *args):
        step(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("inf"))

    if where == "gradient":
        monkeypatch.setattr(CDDFuseSystem, "stages", broken_stages)
    else:
        monkeypatch.setattr(torch.optim.Adam, "step", broken_step)
    capsys.readouterr()
    assert run(patch_file, tmp_path / "other", "--epoch-batches", "1", epochs=(1, 0)) == 2
    assert where in error_of(capsys)
    assert not list((tmp_path / "other").glob("*.p*"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_medical_training_never_falls_back_to_the_infrared_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--task", "mif"]) == 2
    assert "--data" in error_of(capsys)
    assert train.main([]) == 2
    assert "MSRS_train_imgsize_128_stride_200.h5" in error_of(capsys)


def test_recipe_sets_defaults_and_published_is_the_published_code():
    values = {}
    for recipe in ("ours", "published"):
        args = train.build_parser(CDDFuseSystem, recipe).parse_args([])
        values[recipe] = {**vars(train.take_options(args, train.Options)),
                          **vars(train.take_options(args, CDDFuseSystem.Options))}  # fmt: skip
    changed = {name: value for name, value in values["ours"].items() if value != values["published"][name]}
    assert changed == CDDFuseSystem.recipes["ours"]
    published = {"batch_size": 8, "learning_rate": 1e-4, "clip_norm": 0.01, "stage1_epochs": 40, "stage2_epochs": 80,
                 "precision": "float32", "crop": 0, "ema": 0.0, "lr_epochs": 20, "lr_factor": 0.5}  # fmt: skip
    assert published.items() <= values["published"].items()
    assert next(iter(CDDFuseSystem.recipes)) == "ours"


def test_average_of_weights_is_what_is_kept_and_the_run_goes_on_with_its_own(patch_file, tmp_path):
    options = ["--ema", "0.9", "--epoch-batches", "3"]
    run(patch_file, tmp_path / "a", *options, epochs=(1, 0))
    saved = read_file(tmp_path / "a/last.pt")
    kept, own = weights(tmp_path / "a"), saved["model"]
    key = "encoder.patch_embed.proj.weight"
    assert not torch.equal(kept["DIDF_Encoder.module.patch_embed.proj.weight"], own[key])
    # The first weights, moved towards those of each step by 1 - decay, with decay (1 + n) / (10 + n) at first.
    torch.manual_seed(0)
    average = CDDFuseSystem().state_dict()[key].double()
    steps = steps_of_run(patch_file, tmp_path / "c", options[2:], key)
    for n, value in enumerate(steps, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value.double()
    torch.testing.assert_close(kept["DIDF_Encoder.module.patch_embed.proj.weight"].double(), average)


def steps_of_run(patch_file, out, options, key):
    """The values of one weight after each step of a run."""
    values, step = [], Run.train_step

    def watched(self, *args):
        step(self, *args)
        values.append(self.model.state_dict()[key].clone())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "train_step", watched)
        run(patch_file, out, *options, epochs=(1, 0))
    return values


def test_decoder_image_is_an_option(patch_file, tmp_path, monkeypatch):
    seen = []
    decode = CDDFuseSystem.decode_fused
    watched = lambda self, *args: seen.append(args[-1]) or decode(self, *args)  # noqa: E731
    monkeypatch.setattr(CDDFuseSystem, "decode_fused", watched)
    for task, image in (("ivf", "auto"), ("mif", "auto"), ("ivf", "none")):
        run(patch_file, tmp_path / f"{task}_{image}", "--task", task, "--decoder-image", image,
            "--epoch-batches", "1", epochs=(0, 1))  # fmt: skip
    assert seen == ["vis", "none", "none"]


def test_batch_too_small_for_a_system_is_found_before_training(patch_file, tmp_path, capsys):
    argv = ["--system", "fsidfusion", "--data", str(patch_file), "--out", str(tmp_path / "run"), "--batch-size", "1"]
    assert train.main([*argv, "--device", "cpu"]) == 2
    assert "at least 2 for FSIDFusion" in error_of(capsys)


def test_step_of_more_memory_than_is_free_is_said_before_the_first(patch_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "free_memory", lambda: 10**8)  # a step of four patches of 16 pixels takes 0.15 GB
    assert run(patch_file, tmp_path / "a") == 0
    assert "--batch-size 4 with 16 pixels a side takes about 0.2 GB" in capsys.readouterr().err
    assert run(patch_file, tmp_path / "b", "--precision", "bfloat16") == 0
    assert "GB" not in capsys.readouterr().err


def test_mlfuse_trains_on_saliency_in_its_published_recipe(tmp_path, capsys):
    rng = np.random.default_rng(0)
    with PatchWriter(tmp_path / "p.h5", 128, saliency=True) as writer:
        writer.add(*rng.uniform(0, 255, (3, 5, 128, 128)))
    argv = ["--system", "mlfuse", "--data", str(tmp_path / "p.h5"), "--device", "cpu", "--epochs", "1"]
    args = train.build_parser(find_system("mlfuse"), "published").parse_args([])
    assert (args.batch_size, args.crop, args.schedule, args.min_lr, args.weight_decay, args.drop_last) == (
        16, 128, "cosine", 0.0, 5e-5, True)  # fmt: skip
    assert train.main([*argv, "--out", str(tmp_path / "few")]) == 2  # five patches are no batch of 16
    assert "--epoch-batches" in error_of(capsys)
    small = ["--batch-size", "2", "--crop", "16"]
    assert train.main([*argv, *small, "--out", str(tmp_path / "run")]) == 0
    line = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert line["step"] == 2  # the fifth patch is left out
    assert set(line["losses"]) == {"edge", "attention", "cross", "fusion", "total"}
    model = find_system("mlfuse")()
    about = model.load_published(tmp_path / "run/MLFuse_IVF.pth")
    assert about["system"] == "mlfuse"
    torch.manual_seed(0)
    unused = find_system("mlfuse")().network.edg_net.conv_dilation.weight
    assert torch.equal(model.network.edg_net.conv_dilation.weight, unused)  # frozen, whatever the weight decay
