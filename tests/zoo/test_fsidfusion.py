"""zoo/fsidfusion.py against the golden numbers, its files, and a tiny training.

Golden values: made with the published networks (torch 1.8.1, 2.0.1 and 2.13) for the weights and images of
tests/conftest.py; the tolerance 1e-5 covers the differences between those versions.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from tests.conftest import formula_image, set_formula_weights
from utils.common import InputError
from utils.data.patches import PatchWriter
from utils.inference.checkpoint import read_file, save_checkpoint
from utils.tiles import Tiles
from zoo import Batch
from zoo.fsidfusion import AttentionalFusion, FSIDFusion

GOLDEN = Path(__file__).parents[1] / "golden"

# mean, standard deviation, [0,0,0,0], [0,0,20,18], last value
FORWARD = {
    "shared": (-0.09527924, 0.89895657, 1.3112178, -0.4101197, 1.1141009),
    "detail vis": (0.02195408, 0.21327920, -0.5246175, -0.5924260, -0.0630836),
    "detail ir": (0.00399121, 0.18279482, -0.4104347, -0.3532126, 0.0938506),
    "fused detail": (0.00885762, 0.11827836, -0.3625344, -0.4317194, -0.0292289),
    "reduced": (0.00244713, 0.46981927, 0.3075647, -0.4736919, 0.6348821),
    "fused": (0.61997742, 0.04727270, 0.6800742, 0.5814290, 0.6522431),
    "vis rebuilt": (0.62331196, 0.04950628, 0.6904678, 0.5803961, 0.6513146),
    "ir rebuilt": (0.62011956, 0.05146907, 0.7258950, 0.5535136, 0.6058467),
}


def formula_model() -> FSIDFusion:
    model = FSIDFusion()
    for part in model.published_networks.values():
        set_formula_weights(getattr(model, part))
    return model


def batch_of_two(height: int = 40, width: int = 56) -> Batch:
    images = [formula_image(c, height, width) for c in range(4)]
    return Batch(torch.cat([images[0], images[2]]), torch.cat([images[1], images[3]]))


@pytest.fixture(scope="module")
def model() -> FSIDFusion:
    return formula_model().eval()


@pytest.fixture(scope="module")
def outputs(model: FSIDFusion) -> dict[str, torch.Tensor]:
    vis, ir = formula_image(0), formula_image(1)
    with torch.no_grad():
        features = model.encode(vis, ir)
        fused_detail = model.specific_fusion(features.detail_vis + features.detail_ir)
        vis_rebuilt, ir_rebuilt = model.decode_sources(vis, ir, features)
        return {
            "shared": features.shared,
            "detail vis": features.detail_vis,
            "detail ir": features.detail_ir,
            "fused detail": fused_detail,
            "reduced": model.decoder(vis, features.shared, fused_detail)[1],
            "fused": model.fuse(vis, ir),
            "vis rebuilt": vis_rebuilt,
            "ir rebuilt": ir_rebuilt,
        }


@pytest.mark.parametrize("name", FORWARD)
def test_forward_equals_the_published_networks(outputs, name):
    x = outputs[name]
    got = (x.mean(), x.std(), x[0, 0, 0, 0], x[0, 0, 20, 18], x[0, -1, -1, -1])
    assert [value.item() for value in got] == pytest.approx(FORWARD[name], abs=1e-5)


def test_losses_of_both_stages_equal_the_published_ones():
    model, batch = formula_model().train(), batch_of_two()
    first, second = model.stages(FSIDFusion.Options(), "ivf")
    wanted = {  # of the published code in training mode: batch norm uses the batch
        "reconstruction_vis": 1.54250133,
        "reconstruction_ir": 1.47451460,
        "gradient_vis": 0.03492639,
    }
    in_stage_1 = {name: value.item() for name, value in first.losses(batch).items()}
    assert in_stage_1 == pytest.approx({**wanted, "total": 3.19164777}, rel=1e-4)
    terms = second.losses(batch)
    wanted |= {"intensity": 0.14387083, "gradient": 0.73169178, "fusion": 73.31304169, "total": 76.50469208}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(wanted, rel=1e-4)
    terms["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpoint_keys_and_shapes_never_drift():
    # golden/fsidfusion_keys.json: the key lists of the published format, from its specification.
    wanted = json.loads((GOLDEN / "fsidfusion_keys.json").read_text())
    model = FSIDFusion()
    states = {name: getattr(model, part).state_dict() for name, part in model.published_networks.items()}
    got = {name: {key: list(value.shape) for key, value in state.items()} for name, state in states.items()}
    assert got == wanted
    assert [list(keys) for keys in got.values()] == [list(keys) for keys in wanted.values()]  # the order as well
    assert len(model.state_dict()) == 307
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    numbers = {key: value.numel() for key, value in model.state_dict().items() if not key.endswith(statistics)}
    assert sum(numbers.values()) == 2_823_064
    assert len(model.state_dict()) - len(numbers) == 12


def test_never_used_convolution_is_stored_and_cannot_be_trained():
    model = FSIDFusion()
    model.requires_grad_(True)
    model.encoder.requires_grad_(True)
    unused = {key for key in model.state_dict() if "duelFuse.shffleconv" in key}
    assert unused == {"encoder.duelFuse.shffleconv.weight", "encoder.duelFuse.shffleconv.bias"}
    assert not unused & {name for name, _ in model.named_parameters()}
    assert not any(model.state_dict(keep_vars=True)[key].requires_grad for key in unused)
    assert sum(p.numel() for p in model.parameters()) == 2_823_064 - 128 * 128 - 128


def test_bad_sources_and_skips_are_refused(model):
    with pytest.raises(ValueError, match="at least 2"):
        model.fuse(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\) and \(1, 1, 8, 9\)"):
        model.fuse(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="vis, sum, none"):
        model.fuse(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), skip="ir")


def test_decoder_image_is_the_one_asked_for(model):
    vis, ir = formula_image(0, 9, 12), formula_image(1, 9, 12)
    with torch.no_grad():
        logits = {skip: model.fuse(vis, ir, skip).logit() for skip in model.skips}
    # float32 near saturation
    torch.testing.assert_close(logits["vis"] - logits["none"], vis, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits["sum"] - logits["none"], vis + ir, rtol=0, atol=1e-5)
    assert {FSIDFusion.default_skip(a, b) for a in ("ivf", "mif") for b in ("ivf", "mif")} == {"vis"}


def test_attentional_fusion_equals_its_formula():
    torch.manual_seed(0)
    block = AttentionalFusion(16).double()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
    block.eval()
    a, b = torch.randn(2, 2, 16, 9, 5, dtype=torch.float64)
    weight = torch.sigmoid(block.local_att(a + b) + block.global_att(a + b))
    wanted = 2 * a * weight + 2 * b * (1 - weight)
    torch.testing.assert_close(block(a, b), wanted, rtol=0, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(Tiles(20)(block, a, b), wanted, rtol=0, atol=1e-13)


def test_bfloat16_stays_near_float32(model):
    vis, ir = formula_image(0), formula_image(1)
    with torch.no_grad():
        wanted = model.fuse(vis, ir)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model.fuse(vis, ir)
    # bfloat16 keeps 8 bits, so half a grey level on average is what it can do
    assert (autocast - wanted).abs().mean() < 0.5 / 255


# --- Files --------------------------------------------------------------------------------------------------


def assert_same(a: nn.Module, b: nn.Module, atol: float = 0) -> None:
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def trained() -> FSIDFusion:
    """A model of which the batch norms have seen two batches."""
    torch.manual_seed(1)
    model = FSIDFusion()
    with torch.no_grad():
        for _ in range(2):
            model.fuse(*batch_of_two(8, 9)[:2])
    return model


def test_published_file_loads_with_its_batch_norm_statistics(trained, tmp_path):
    networks = {
        name: nn.DataParallel(getattr(trained, part)).state_dict() for name, part in trained.published_networks.items()
    }
    torch.save(networks, tmp_path / "FSIDFusion-IVIF.pth")
    other = FSIDFusion()
    assert other.load_published(tmp_path / "FSIDFusion-IVIF.pth") == {}
    assert_same(trained, other)
    assert other.encoder.duelFuse.AFF.local_att[1].num_batches_tracked == 2
    assert other.encoder.duelFuse.AFF.global_att[2].running_mean.abs().sum() > 0


def test_half_precision_storage_is_under_12_mb_and_widens_on_loading(trained, tmp_path):
    trained.save(tmp_path / "half.pth", half=True)
    assert (tmp_path / "half.pth").stat().st_size < 6_000_000  # 2 823 064 numbers of 2 bytes, and their names
    other = FSIDFusion()
    other.load_published(tmp_path / "half.pth")
    stored = read_file(tmp_path / "half.pth")["DIDF_Encoder"]
    for key, value in trained.encoder.state_dict().items():
        loaded = other.encoder.state_dict()[key]
        assert loaded.dtype == value.dtype
        narrowed = value.ndim > 1
        assert stored[f"module.{key}"].dtype == (torch.float16 if narrowed else value.dtype)
        torch.testing.assert_close(loaded, value.half().float() if narrowed else value, rtol=0, atol=0)
    vis, ir = formula_image(0), formula_image(1)
    with torch.no_grad():
        difference = other.eval().fuse(vis, ir) - copy.deepcopy(trained).eval().fuse(vis, ir)
    assert 0 < difference.abs().max() < 0.5 / 255


def test_weights_beyond_half_precision_are_refused_and_nothing_is_written(tmp_path):
    model = FSIDFusion()
    with torch.no_grad():
        model.decoder.reduce_channel.weight[0, 0] = 7e4
    with pytest.raises(InputError, match="DIDF_Decoder: reduce_channel.weight reaches 7e"):
        save_checkpoint(tmp_path / "half.pth", model, half=True)
    assert not list(tmp_path.iterdir())


# --- Training -----------------------------------------------------------------------------------------------


def test_one_patch_a_batch_cannot_be_trained_and_the_class_says_so():
    model = formula_model().train()
    losses = model.stages(model.Options(), "ivf")[0].losses
    one = Batch(formula_image(0, 8, 8), formula_image(1, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        losses(one)
    assert FSIDFusion.smallest_batch == 2
    two = one.each(lambda x: torch.cat([x, x.flip(3)]))
    assert losses(two)["total"].isfinite()
    with torch.no_grad():
        assert model.eval().fuse(*one[:2]).isfinite().all()


def test_tiny_training_run_reaches_the_end_of_both_stages_and_its_weights_load(tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    waves = 127 + 100 * np.sin(0.5 * x + 0.3 * y + np.arange(6)[:, None, None])
    with PatchWriter(tmp_path / "patches.h5", 16) as writer:
        writer.add(np.clip(waves + rng.normal(0, 3, waves.shape), 0, 255), 255 - np.clip(waves, 0, 255))
    argv = f"--system fsidfusion --data {tmp_path / 'patches.h5'} --out {tmp_path / 'run'} --device cpu --batch-size 4"
    assert train.main([*argv.split(), "--stage1-epochs", "1", "--stage2-epochs", "1"]) == 0
    first, second = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    terms = {"reconstruction_vis", "reconstruction_ir", "gradient_vis", "total"}
    assert (first["stage"], second["stage"]) == ("reconstruction", "fusion")
    assert set(first["losses"]) == terms
    assert set(second["losses"]) == terms | {"fusion", "intensity", "gradient"}

    torch.manual_seed(0)
    start, end = FSIDFusion(), FSIDFusion()
    about = end.load_published(tmp_path / "run/FSIDFusion_IVF.pth")
    assert about["system"] == "fsidfusion" and about["gradient_weight_2"] == 100
    assert end.encoder.duelFuse.AFF.local_att[1].num_batches_tracked == 4  # two steps a stage
    before, after = start.state_dict(), end.state_dict()
    still = {key for key, value in before.items() if torch.equal(after[key], value)}
    assert still == {"encoder.duelFuse.shffleconv.weight", "encoder.duelFuse.shffleconv.bias"}


def test_synchronised_batch_norm_has_the_same_keys_and_results(trained, tmp_path):
    vis, ir = formula_image(0, 8, 9), formula_image(1, 8, 9)
    trained.save(tmp_path / "weights.pth")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(FSIDFusion())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == 4
    synchronised.load_published(tmp_path / "weights.pth")
    with torch.no_grad():
        wanted = copy.deepcopy(trained).eval().fuse(vis, ir)
        torch.testing.assert_close(synchronised.eval().fuse(vis, ir), wanted, rtol=0, atol=0)
    synchronised.save(tmp_path / "again.pth")
    again = FSIDFusion()
    again.load_published(tmp_path / "again.pth")
    assert_same(trained, again)
