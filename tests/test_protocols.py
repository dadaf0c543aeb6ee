"""utils/metrics.py: the protocols of VIFB and of Tang's toolbox, and the metrics beyond the twelve."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.ndimage import correlate

from tests.reference_metrics import edge_preservation, edge_strength_and_angle
from tests.test_metrics import formula_images, level_image, made_images, no_warning_and_no_floating_point_exception  # noqa: F401
from utils import metrics
from utils.data.images import read_grey
from utils.metrics import TABLES, score

# VIFB's names of its metrics, in the order of its files, with ours.
THEIRS = (
    "Avg_gradient Cross_entropy Edge_intensity Entropy Mutinf Psnr Qabf Qcb Qcv Rmse Spatial_frequency Ssim Variance"
)
VIFB_NAMES = dict(zip(THEIRS.split(), TABLES["vifb"], strict=True))
TANG_TOLERANCES = dict.fromkeys(TABLES["tang-2022"], 1e-12) | {"MI": 1e-11, "VIF": 1e-7}
# Every seventh of the published values, and all of them.
ROWS = [slice(0, None, 7), pytest.param(slice(None), marks=pytest.mark.slow)]


# --- published values --------------------------------------------------------------------------------------


def as_stored(path: Path) -> np.ndarray:
    """(H, W), or (H, W, 3), red first, as many channels as the file has."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., ::-1]


@pytest.mark.parametrize("part", ROWS)
def test_vifb_protocol_prints_the_five_digits_that_vifb_published(fusion_data, part):
    folder = fusion_data / "other_methods" / "VIFB"
    rows = list(csv.DictReader((folder / "vifb_values.csv").read_text().splitlines()))
    assert len(rows) == 3 * 21
    for row in rows[part]:
        images = (as_stored(folder / name / row["image"]) for name in (row["method"], "vi", "ir"))
        values = score(*images, "vifb", metrics=TABLES["vifb"])
        found = {name: f"{values[key]:.5g}" for name, key in VIFB_NAMES.items()}
        assert found == {name: row[name] for name in VIFB_NAMES}, (row["method"], row["image"])


@pytest.mark.parametrize("part", ROWS)
def test_tang_2022_gives_the_values_that_matlab_printed(fusion_data, part):
    folder = fusion_data / "other_methods" / "TNO42"
    rows = list(csv.DictReader((folder / "matlab_toolbox_11.csv").read_text().splitlines()))
    assert len(rows) == 3 * 42
    for row in rows[part]:
        images = (read_grey(folder / name / row["image"]) for name in (row["method"], "ir", "vi"))
        for key, value in score(*images, "tang-2022", metrics=TABLES["tang-2022"]).items():
            assert value == pytest.approx(float(row[key]), rel=TANG_TOLERANCES[key]), (key, row["image"])


# --- goldens that need no data: computed once from the definitions, published by nobody ----------------------


def colour_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, V (H, W, 3) and R (H, W)."""
    vis, ir = np.stack([level_image(c).astype(int) for c in (0, 0.4, 0.8)], axis=-1), level_image(1.3).astype(int)
    return (11 * vis + 9 * ir[..., None] + 10) // 20, vis, ir


def maximum_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = (np.round(1.5 * level_image(c).astype(int) - 63.75).clip(0, 255) for c in (0, 1.3))
    return np.maximum(a, b), a, b


VIFB_GOLDENS = {  # colour, its top left 83 x 101, channel 0 alone, `maximum_images`
    "AG": (13.1169330486, 13.1402873729, 11.7607603288, 18.7442608628),
    "CE": (0.0443918529448, 0.0541800160555, 0.062129327283, 0.289727379781),
    "EI": (105.755283797, 105.188257206, 94.6922962209, 153.052696826),
    "EN": (7.58635439678, 7.5834337538, 7.45943616264, 6.88109007451),
    "MI": (3.62710042385, 3.92834198848, 3.22371621797, 5.25969471698),
    "PSNR": (54.9675190634, 54.3806024258, 53.2593246715, 50.2478775257),
    "Qabf": (0.550693921992, 0.554091030372, 0.371470680001, 0.512851611677),
    "Qcb": (0.665546908138, 0.66428879894, 0.60728241822, 0.509212851573),
    "Qcv": (174.692830406, 103.640483183, 300.832235998, 749.1994509),
    "RMSE": (0.220126871407, 0.251893177864, 0.307006728458, 0.614175670027),
    "SF": (31.4446985392, 31.3082692268, 27.8327374206, 46.6945086615),
    "SSIM": (1.72152819769, 1.71359759523, 1.50646704332, 1.26360842508),
    "SD": (48.6197806017, 48.6685542815, 44.1132723847, 66.9300323852),
}
VIFB_CASES = {
    "colour": colour_images(),
    "odd": tuple(image[:83, :101] for image in colour_images()),
    "grey": tuple(image[..., 0] if image.ndim == 3 else image for image in colour_images()),
    "max": maximum_images(),
}


@pytest.mark.parametrize("case", VIFB_CASES)
def test_vifb_goldens(case):
    values = score(*VIFB_CASES[case], "vifb", metrics=TABLES["vifb"])
    want = {key: golden[list(VIFB_CASES).index(case)] for key, golden in VIFB_GOLDENS.items()}
    assert values == pytest.approx(want, rel=1e-11)


TANG_GOLDENS = {  # in the order of the table
    "max": (6.88109007451, 10.8556932136, 0.184020896847, 7.65814946193, 1.02236988795, 0.356304603876,
            0.465585760307, 18.7442608628, 0.747882288187, 0.0623741655567, 60.180756122),
    "grey": (7.45943616264, 10.2188887969, 0.109687940479, 4.6508394009, 1.17250547777, 0.406327481647,
             0.371591240027, 11.7607603288, 0.807810221349, 0.0157411483793, 66.1604394818),
}  # fmt: skip


@pytest.mark.parametrize("case", TANG_GOLDENS)
def test_tang_goldens(case):
    fused, a, b = VIFB_CASES[case]
    values = score(fused, a, b, "toolbox", metrics=TABLES["tang-2022"])  # the alias
    assert list(values.values()) == pytest.approx(TANG_GOLDENS[case], rel=1e-11)
    later = score(fused, a, b, "tang-2023", metrics=TABLES["tang-2023"])
    paper = score(fused, a, b)
    assert later == values | {key: paper[key] for key in ("SD", "VIF", "SF", "Qabf")}


# --- what the protocols choose, by hand ----------------------------------------------------------------------


def test_mutual_information_of_tang_merges_the_two_highest_levels_in_the_joint_histogram():
    image = np.array([[254, 255], [254, 255]], dtype=np.uint8)  # marginals 1 bit each, joint 0 bits
    assert metrics.mutual_information(image, image, image, protocol="tang-2022") == 4.0
    dark = image - 1  # levels 253 and 254: nothing is merged
    assert metrics.mutual_information(dark, dark, dark, protocol="tang-2023") == 2.0


def test_standard_deviation_of_tang_2022_saturates():
    image = np.array([[0, 0], [100, 140]], dtype=np.uint8)  # mean 60: differences 0 0 40 80, squares 0 0 255 255
    assert metrics.standard_deviation(image, protocol="tang-2022") == pytest.approx(math.sqrt(255 / 2), rel=1e-15)


def test_spatial_frequency_of_vifb_lays_the_channels_side_by_side():
    image = np.array([[[0, 3, 5], [1, 3, 6]], [[4, 7, 9], [5, 7, 10]]])  # rows 0 1 3 3 5 6 and 4 5 7 7 9 10
    want = math.sqrt((2 * (1 + 4 + 0 + 4 + 1) + 6 * 16) / 12)
    assert score(image, image, image, "vifb", metrics=["SF"])["SF"] == pytest.approx(want, rel=1e-15)


def test_rmse_of_vifb_divides_the_norm_by_the_number_of_pixels():
    images = [np.full((2, 3), level) for level in (10, 12, 16)]  # norms sqrt(6 * 4) and sqrt(6 * 36)
    value = metrics.rmse(*images, protocol="vifb")
    assert value == pytest.approx((math.sqrt(24) + math.sqrt(216)) / 2 / 6, rel=1e-14)
    assert metrics.psnr(*images, protocol="vifb") == pytest.approx(10 * math.log10(65025 / value), rel=1e-14)


def test_cross_entropy_by_hand():
    fused = np.array([[0, 0, 9, 9]])
    a, b = np.array([[0, 9, 9, 9]]), np.array([[0, 0, 5, 5]])  # 1/4 log2(1/2) + 3/4 log2(3/2); 1/2 log2(1) + skipped
    want = (0.25 * math.log2(0.5) + 0.75 * math.log2(1.5)) / 2
    assert metrics.cross_entropy(fused, a, b) == pytest.approx(want, rel=1e-14)
    assert metrics.cross_entropy(fused + 20, a, b) == 0.0  # no level in common


@pytest.mark.parametrize("key", ["Qcb", "Qcv"])
def test_linear_changes_of_contrast_change_neither_qcb_nor_qcv(key):
    fused, a, b = (np.round(image / 2) for image in formula_images())
    changed = score(2 * fused + 3, a, b + 20, "vifb", metrics=[key])
    assert changed == pytest.approx(score(fused, a, b, "vifb", metrics=[key]), rel=1e-12)


def test_degenerate_images_of_vifb():
    texture, black, flat = made_images(6, 48, 50)[1], np.zeros((48, 50)), np.full((48, 50), 9)
    table = TABLES["vifb"]
    values = score(texture, texture, texture, "vifb", metrics=table)
    want = {"RMSE": 0, "PSNR": math.inf, "CE": 0, "Qcv": 0, "Qcb": 1, "SSIM": 2, "MI": 2 * values["EN"] * math.log(2)}
    assert {key: values[key] for key in want} == pytest.approx(want, rel=1e-12)
    for images, missing in (
        ((flat, texture, texture), {"Qcb", "Qcv"}),
        ((texture, flat, texture), {"Qcb", "Qcv"}),
        ((black, texture, texture), {"Qcb"}),
        ((texture, black, black), {"Qabf", "Qcb", "Qcv"}),
    ):
        values = score(*images, "vifb", metrics=table)
        assert {key for key, value in values.items() if math.isnan(value)} == missing
    constant = score(flat, texture, texture, "vifb", metrics=table)
    assert [constant[key] for key in ("AG", "EI", "EN", "SF", "SD", "MI")] == [0] * 6
    assert math.isnan(metrics.qcv(texture, flat, flat))


def test_colour_is_for_vifb_alone_and_never_beside_a_grey_fused_image():
    fused, vis, ir = colour_images()
    for protocol in ("paper", "tang-2022"):
        with pytest.raises(ValueError, match=r"fused must be one grey image of shape \(H, W\), got shape"):
            score(fused, vis, ir, protocol)
    with pytest.raises(ValueError, match=r"a must be one grey image of shape \(H, W\), got shape"):
        score(fused[..., 0], vis, ir, "vifb")
    with pytest.raises(ValueError, match="SSIM needs images with sides >= 11"):
        score(fused[:10], vis[:10], ir[:10], "vifb", metrics=["SSIM"])


# --- Nabf --------------------------------------------------------------------------------------------------


def test_nabf_of_a_doubled_source_is_what_its_edges_fail_to_preserve():
    a = np.zeros((12, 15), dtype=np.uint8)
    a[:, 6:] = 40
    a[5:8, 2:4] = 90
    black = np.zeros_like(a)
    # Every edge is twice as strong and has the same angle: G = 1/2, D = 1, so with no edges in the other source
    # 1 - Q = 1 - 0.9994 / (1 + exp(0)) * 0.9879 / (1 + exp(-4.4)).
    want = 1 - 0.9994 / 2 * 0.9879 / (1 + math.exp(-4.4))
    assert metrics.nabf(2 * a, a, black) == pytest.approx(want, rel=1e-12)


def test_nabf_is_zero_where_no_edge_became_stronger():
    _, a, b = made_images(3, 48, 50)
    assert metrics.nabf(np.maximum(a, 0), a, b) == 0.0
    assert metrics.nabf(np.floor(a / 2), a, b) < 0.02  # rounding adds a few edges of one level


def test_preserved_lost_and_added_edges_add_up_to_one():
    fused, a, b = made_images(5, 48, 50)
    strength_f, angle_f = edge_strength_and_angle(fused)
    parts = dict.fromkeys(("kept", "lost", "added", "all"), 0.0)
    (g_a, angle_a), (g_b, angle_b) = edge_strength_and_angle(a), edge_strength_and_angle(b)
    added = (strength_f > g_a) & (strength_f > g_b)
    for strength, angle in ((g_a, angle_a), (g_b, angle_b)):
        q = edge_preservation(strength_f, angle_f, strength, angle, "standard")
        parts["kept"] += np.sum(q * strength)
        parts["lost"] += np.sum(((1 - q) * strength)[~added])
        parts["added"] += np.sum(((1 - q) * strength)[added])
        parts["all"] += np.sum(strength)
    assert metrics.qabf(fused, a, b, "standard") == pytest.approx(parts["kept"] / parts["all"], rel=1e-9)
    assert metrics.nabf(fused, a, b) == pytest.approx(parts["added"] / parts["all"], rel=1e-9)
    assert parts["kept"] + parts["lost"] + parts["added"] == pytest.approx(parts["all"], rel=1e-12)


# --- MS-SSIM -----------------------------------------------------------------------------------------------


def test_ms_ssim_of_constant_images_is_the_luminance_of_the_last_scale():
    fused, a, b = (np.full((161, 170), level, dtype=np.uint8) for level in (100, 100, 60))
    c1 = 2.55**2
    luminance = (2 * 100 * 60 + c1) / (100**2 + 60**2 + c1)
    assert metrics.ms_ssim(fused, a, b) == pytest.approx((1 + luminance**0.1333) / 2, rel=1e-12)


def halved(image):
    blocks = [[image[i : i + 2, j : j + 2] for j in range(0, image.shape[1], 2)] for i in range(0, len(image), 2)]
    return np.array([[block.mean() for block in row] for row in blocks])


def ms_ssim_step_by_step(x, y):
    """One source, from the definition, with two-dimensional windows: `scipy.ndimage.correlate`."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333), start=1):

        def local(image):
            return correlate(image, window)[5:-5, 5:-5]  # whole windows only

        mx, my = local(x), local(y)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        variance_x, variance_y = local(x * x) - mx**2, local(y * y) - my**2
        similarity = (2 * (local(x * y) - mx * my) + c2) / (variance_x + variance_y + c2)
        if scale == 5:
            similarity *= (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        value *= max(similarity.mean(), 0) ** weight
        if scale < 5:
            x, y = halved(x), halved(y)
    return value


def test_ms_ssim_equals_its_definition_step_by_step():
    fused, a, b = made_images(9, 176, 192)  # even at every scale but the last
    want = (ms_ssim_step_by_step(fused, a) + ms_ssim_step_by_step(fused, b)) / 2
    assert metrics.ms_ssim(fused, a, b) == pytest.approx(want, rel=1e-9)


def test_the_last_row_of_an_odd_size_counts_twice():
    image = np.array([[[0.0, 4.0, 8.0], [4.0, 8.0, 4.0], [2.0, 6.0, 10.0]]])
    assert metrics._blocks_of_two(image).tolist() == [[[4.0, 6.0], [4.0, 10.0]]]


def test_a_negative_scale_counts_as_zero():
    checks = np.indices((161, 161)).sum(axis=0) % 2 * 255.0
    assert metrics.ms_ssim(checks, 255 - checks, 255 - checks) == 0.0
