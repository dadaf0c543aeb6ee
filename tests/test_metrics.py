"""utils/metrics.py under `paper` and `standard`: goldens of the published evaluator, a second implementation, values by
hand, properties, degenerate images, errors, the registry. tests/test_protocols.py has the other protocols."""

import ast
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests import reference_metrics
from utils import metrics
from utils.data.images import read_grey
from utils.metrics import METRICS, PAPER_TABLE, PROTOCOLS, TABLES, TWELVE, Images, metric, score

KEYS = list(TWELVE)

needs_data = pytest.mark.skipif(
    "FUSION_DATA" not in os.environ,
    reason="FUSION_DATA is unset: the folder that holds test_img/ and other_methods/",
)


@pytest.fixture(autouse=True)
def no_warning_and_no_floating_point_exception():
    """Every call in this file runs with warnings as errors and numpy's floating-point checks switched on."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


def level_image(c: float) -> np.ndarray:
    """The image of the golden values with this phase."""
    y, x = np.mgrid[0:96, 0:112].astype(np.float64)
    slow = 60 * np.sin(0.21 * y + 0.13 * x + c) + 45 * np.cos(0.17 * x - 0.31 * y * (1 + 0.1 * c) + 2 * c)
    return np.round(127.5 + slow + 18 * np.sin(1.9 * x + 2.3 * y + c)).clip(0, 255).astype(np.float32)


def formula_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, A, B of the golden values: 96 x 112, whole levels, float32."""
    a, b = level_image(0.0), level_image(1.3)
    return np.round(0.55 * a + 0.45 * b), a, b  # in float32, which decides some ties


def made_images(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, A, B with waves, noise, a black margin in A, saturated and constant patches, and ties; float64."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    sources = []
    for _ in range(2):
        wave = 100 + 90 * np.sin(x / rng.uniform(2, 9) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(2, 9))
        image = (wave + rng.normal(0, 12, size=wave.shape)).clip(0, 255)
        image[: height // 3, width // 2 :] = rng.integers(0, 256)
        sources.append(np.round(image))
    a, b = sources
    a[:, : width // 4] = 0
    b[height // 2 :, : width // 4] = 255
    fused = np.round(0.6 * a + 0.4 * b)
    fused[-height // 4 :] = a[-height // 4 :]  # equal to one source: ties in Qabf, no noise in VIF
    return fused, a, b


# --- goldens of the published evaluator --------------------------------------------------------------------

# Printed by the evaluator published with CDDFuse for `formula_images`: numpy 1.21.5, scipy 1.7.3,
# scikit-image 0.19.2, scikit-learn 1.1.3. Tolerances are relative: 1e-9 where it computes in float64; 2e-6
# where it sums in float32 and prints nine digits of that. SSIM is its value with the map in float64
# (scikit-image 0.18).
PAPER_GOLDENS = {
    "EN": (7.457890150928, 1e-9),
    "SD": (44.1172447, 2e-6),
    "SF": (27.9728203, 2e-6),
    "AG": (11.5355120, 2e-6),
    "MI": (3.218561372686, 1e-9),
    "MSE": (1023.567505, 2e-6),
    "CC": (0.80781054, 2e-6),
    "PSNR": (17.2831522, 2e-6),
    "SCD": (1.17270994, 2e-6),
    "VIF": (0.386250103239, 1e-9),
    "Qabf": (0.37150466, 2e-6),
    "SSIM": (1.468773461, 1e-9),
}


@pytest.mark.parametrize("key", KEYS)
def test_paper_protocol_gives_the_published_value(key):
    value, tolerance = PAPER_GOLDENS[key]
    assert score(*formula_images())[key] == pytest.approx(value, rel=tolerance)


def test_standard_ssim_gives_the_value_of_scikit_image_with_range_255():
    value = metrics.ssim(*formula_images(), protocol="standard")
    assert value == pytest.approx(1.490306783, rel=1e-7)  # scikit-image 0.19.2, map in float32


# Means over the test images distributed with CDDFuse, fused as floor((A + B) / 2 + 0.5), by the published
# evaluator in the environment above; n, then EN SD SF AG MI MSE CC PSNR SCD VIF Qabf SSIM.
SET_COLUMNS = ("EN", "SD", "SF", "AG", "MI", "MSE", "CC", "PSNR", "SCD", "VIF", "Qabf", "SSIM")
SET_GOLDENS = {
    "TNO": ("ir", "vi", 25, 6.421302, 26.111648, 6.935344, 2.662416, 1.613883, 1974.749254,
            0.564811, 15.321486, 1.541385, 0.574961, 0.357593, 1.016397),
    "RoadScene": ("ir", "vi", 50, 6.638279, 28.518782, 7.511250, 2.866783, 2.008462, 1894.619263,
                  0.632504, 16.216914, 1.416170, 0.571773, 0.383475, 0.951000),
    "MRI_CT": ("CT", "MRI", 21, 4.611499, 57.412090, 19.567079, 4.763847, 2.681064, 1431.389416,
               0.843551, 16.196728, 0.998556, 0.455236, 0.373085, 1.321810),
    "MRI_PET": ("PET", "MRI", 42, 3.820485, 49.974643, 15.415615, 4.340580, 2.125336, 1243.141445,
                0.820608, 15.691553, 1.105845, 0.637960, 0.399266, 1.428023),
    "MRI_SPECT": ("SPECT", "MRI", 73, 3.709882, 44.731773, 10.784548, 2.795092, 2.236041, 550.445476,
                  0.894817, 19.205477, 0.742330, 0.609947, 0.403740, 1.456216),
}  # fmt: skip


def averaged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.floor((a + b) / 2 + 0.5)


@needs_data
@pytest.mark.parametrize("name", SET_GOLDENS)
def test_set_means_equal_those_of_the_published_evaluator(name):
    folder_a, folder_b, count, *want = SET_GOLDENS[name]
    root = Path(os.environ["FUSION_DATA"]) / "test_img" / name
    files = sorted((root / folder_a).iterdir())
    assert len(files) == count
    values = []
    for file in files:
        a, b = read_grey(file), read_grey(root / folder_b / file.name)
        values.append(list(score(averaged(a, b), a, b, metrics=SET_COLUMNS).values()))
    # 2e-6 because the published sums are in float32; 5e-7 because the means were printed with six decimals.
    assert np.mean(values, axis=0) == pytest.approx(want, rel=2e-6, abs=5e-7)


# --- the second implementation -----------------------------------------------------------------------------


def reference_score(*images: np.ndarray, protocol: str = "paper") -> dict[str, float]:
    with np.errstate(under="ignore"):  # exp(-15 g) of Qabf
        return reference_metrics.score(*images, protocol=protocol)


@pytest.mark.parametrize("protocol", ["paper", "standard"])
@pytest.mark.parametrize("size", [(41, 41), (41, 120), (97, 64), (130, 151)])
def test_score_equals_the_reference_implementation(size, protocol):
    for seed in range(2):
        images = made_images(seed, *size)
        want = reference_score(*images, protocol=protocol)
        assert score(*images, protocol=protocol) == pytest.approx(want, rel=1e-8)


def test_fractions_are_scored_like_the_reference_implementation_except_for_mi():
    rng = np.random.default_rng(3)
    images = tuple(rng.uniform(0, 255, size=(50, 60)) for _ in range(3))
    for key in KEYS:
        if key != "MI":  # the reference takes every distinct value for a label
            inputs = images if METRICS[key].takes_sources else images[:1]
            want = getattr(reference_metrics, key.lower())(*inputs)
            assert score(*images, metrics=[key])[key] == pytest.approx(want, rel=1e-8), key


# --- values worked by hand ---------------------------------------------------------------------------------


def test_entropy_equals_the_value_worked_by_hand():
    image = np.array([[0, 0, 255, 255], [7, 7, 7, 7]], dtype=np.uint8)  # p = 1/4, 1/4, 1/2
    assert metrics.entropy(image) == pytest.approx(1.5, abs=1e-12)


def test_average_gradient_halves_inner_differences_only():
    image = np.array([[0, 2, 10], [0, 2, 10]])  # Gx = 2, 5, 8 in both rows, Gy = 0; mean 5 / sqrt(2)
    assert metrics.average_gradient(image) == pytest.approx(5 / math.sqrt(2), abs=1e-12)


def test_mutual_information_equals_the_value_worked_by_hand():
    fused = np.array([[0, 0], [9, 9]], dtype=np.uint8)
    a = np.array([[1, 1], [2, 2]], dtype=np.uint8)  # tells all about fused: ln 2
    b = np.array([[5, 6], [5, 6]], dtype=np.uint8)  # independent of it: 0
    assert metrics.mutual_information(fused, a, b) == pytest.approx(math.log(2), abs=1e-12)


def test_mutual_information_rounds_fractions_like_entropy():
    fused, a, b = made_images(0, 20, 20)
    near = metrics.mutual_information(fused + 0.25 * (fused < 255), a, b)
    assert near == metrics.mutual_information(fused, a, b)


def test_psnr_peak_is_the_maximum_of_fused_under_paper_and_255_under_standard():
    images = np.array([[10, 20]]), np.array([[12, 20]]), np.array([[10, 26]])  # MSE 10
    paper, standard = (metrics.psnr(*images, protocol=protocol) for protocol in ("paper", "standard"))
    assert paper == pytest.approx(10 * math.log10(20**2 / 10), abs=1e-12)
    assert standard == pytest.approx(10 * math.log10(255**2 / 10), abs=1e-12)


def test_scd_equals_the_value_worked_by_hand():
    a, b = np.array([[0, 4, 0, 4]]), np.array([[0, 0, 6, 6]])
    fused = np.array([[0, 4, 6, 6]])
    r_a = 8 / math.sqrt(16 * 12)  # A deviates by -2 2 -2 2 from its mean, F - B by -1 3 -1 -1
    r_b = 24 / math.sqrt(36 * 24)  # B deviates by -3 -3 3 3 from its mean, F - A by -2 -2 4 0
    assert metrics.scd(fused, a, b) == pytest.approx(r_a + r_b, abs=1e-12)


def test_qabf_of_identical_images_is_the_product_of_the_two_sigmoids_at_one():
    image = formula_images()[0]
    q_angle = 0.9879 / (1 + math.exp(-22 * 0.2))
    q_strength = 0.9994 / (1 + math.exp(-15 * 0.5))
    standard = metrics.qabf(image, image, image, protocol="standard")
    assert standard == pytest.approx(q_strength * q_angle, rel=1e-12)
    # Under `paper` the strength itself, mostly tens of levels, stands where 1 should.
    assert metrics.qabf(image, image, image) == pytest.approx(0.9994 * q_angle, rel=1e-6)


# --- properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exchanging_the_sources_changes_nothing(protocol):
    fused, a, b = made_images(1, 60, 70)
    forward, backward = score(fused, a, b, protocol), score(fused, b, a, protocol)
    assert forward == pytest.approx(backward, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "float16", "float32", "longdouble"])
def test_every_dtype_gives_the_value_of_float64(dtype):
    images = made_images(2, 50, 60)
    assert score(*(image.astype(dtype) for image in images)) == score(*images)


def test_memory_layout_does_not_matter():
    images = made_images(2, 50, 60)
    padded = [np.pad(image, 3)[3:-3, 3:-3] for image in images]
    assert score(*padded) == score(*images)
    assert score(*map(np.asfortranarray, images)) == pytest.approx(score(*images), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_inputs_are_left_as_they_were(dtype):
    images = [image.astype(dtype) for image in made_images(4, 50, 60)]
    copies = [image.copy() for image in images]
    for protocol in PROTOCOLS:
        score(*images, protocol=protocol)
    for image, copy in zip(images, copies, strict=True):
        np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_identical_images_get_the_best_value(protocol):
    image = formula_images()[0]
    values = score(image, image, image, protocol)
    assert values["MI"] == pytest.approx(2 * values["EN"] * math.log(2), rel=1e-12)
    assert values["VIF"] == pytest.approx(2.0, abs=1e-9)
    assert values["SSIM"] == pytest.approx(2.0, abs=1e-12)
    assert values["CC"] == pytest.approx(1.0, abs=1e-12)
    assert values["MSE"] == 0.0
    assert values["PSNR"] == math.inf
    assert values["Qabf"] > 0.97
    assert math.isnan(values["SCD"])  # F - A is constant


@pytest.mark.parametrize("protocol", ["paper", "standard"])
@pytest.mark.parametrize("seed", range(4))
def test_values_stay_in_the_range_that_the_registry_states(seed, protocol):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, size=(45, 52)) for _ in range(2)]
    images += [255 * rng.integers(0, 2, size=(45, 52))]
    for key, value in score(*images, protocol).items():
        assert METRICS[key].low <= value <= METRICS[key].high, key


def test_large_offset_between_fused_and_source_is_not_lost_in_rounding():
    # One pixel in 40000 differs from F + const: variances far below the means must survive.
    a = np.full((200, 200), 3.0)
    a[5, 7] = 4
    fused = np.full((200, 200), 250.0)
    fused[5, 7] = 251
    assert metrics.correlation_coefficient(fused, a, a) == pytest.approx(1.0, rel=1e-9)
    assert metrics.standard_deviation(fused) == pytest.approx(math.sqrt(1 / 40000 - 1 / 40000**2), rel=1e-9)


# --- degenerate images -------------------------------------------------------------------------------------

NAN = math.nan
BLACK, SEVEN = np.zeros((48, 48)), np.full((48, 48), 7.0)
TEXTURE = made_images(6, 48, 48)[1]

# F, A, B -> what the published evaluator gives, with 0.0 for its -0.0.
DEGENERATE = {
    "constant fused, black sources": ((SEVEN, BLACK, BLACK), dict(
        EN=0.0, SD=0.0, SF=0.0, AG=0.0, MI=0.0, MSE=49.0, CC=NAN, PSNR=0.0, SCD=NAN, VIF=2.0, Qabf=NAN, Nabf=NAN)),
    "all black": ((BLACK, BLACK, BLACK), dict(
        EN=0.0, MI=0.0, MSE=0.0, CC=NAN, PSNR=NAN, SCD=NAN, VIF=2.0, Qabf=NAN, SSIM=2.0)),
    "black fused": ((BLACK, TEXTURE, TEXTURE), dict(EN=0.0, MI=0.0, CC=NAN, PSNR=-math.inf, SCD=-2.0, VIF=0.0)),
    "one constant source": ((TEXTURE, SEVEN, TEXTURE), dict(CC=NAN, SCD=NAN, VIF=2.0)),
    "fused equal to its sources": ((TEXTURE, TEXTURE, TEXTURE), dict(
        MSE=0.0, CC=1.0, PSNR=math.inf, SCD=NAN, VIF=2.0, SSIM=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_images_give_the_documented_value(case):
    images, want = DEGENERATE[case]
    # v(A, A) misses 1 by about 1e-11, because the definition keeps the unexplained variance above 1e-10.
    assert score(*images, metrics=want) == pytest.approx(want, rel=1e-9, abs=1e-9, nan_ok=True)


def test_black_images_have_no_paper_psnr_but_an_infinite_standard_one():
    assert math.isnan(metrics.psnr(BLACK, BLACK, BLACK))
    assert metrics.psnr(BLACK, BLACK, BLACK, protocol="standard") == math.inf
    value = metrics.psnr(BLACK, SEVEN, SEVEN, protocol="standard")
    assert value == pytest.approx(10 * math.log10(255**2 / 49), rel=1e-12)


@pytest.mark.parametrize("level", [1.0, 100.3, 254.9, 255.0])
def test_constant_images_are_recognised_in_spite_of_rounding(level):
    constant = np.full((61, 67), level)
    texture = made_images(7, 61, 67)[1]
    values = score(constant, constant, texture, metrics=["SD", "SF", "AG", "CC", "SCD", "VIF"])
    assert [values[key] for key in ("SD", "SF", "AG", "VIF")] == [0.0, 0.0, 0.0, 1.0]
    assert math.isnan(values["CC"]) and math.isnan(values["SCD"])


def test_scd_is_nan_where_fused_is_a_source_plus_a_constant():
    _, a, b = made_images(8, 48, 48)
    a = np.floor(a / 2)
    assert math.isnan(metrics.scd(a + 100, a, b))
    assert math.isnan(metrics.scd(a + 100.1, a, b))


def test_the_smallest_legal_image_of_each_metric_is_scored():
    for key, entry in METRICS.items():
        images = [image[: entry.min_side, : entry.min_side] for image in made_images(9, 161, 161)]
        assert isinstance(score(*images, metrics=[key])[key], float)


def test_dark_images_are_legal():
    fused, a, b = (np.round(image / 255) for image in made_images(10, 48, 48))  # levels 0 and 1
    assert np.isfinite(list(score(fused, a, b).values())).all()


# --- errors ------------------------------------------------------------------------------------------------

GOOD = made_images(11, 48, 50)[0]


def spoilt(value: float) -> np.ndarray:
    image = GOOD.copy()
    image[3, 4] = value
    return image


BAD_IMAGES = {
    "list": ([[1, 2], [3, 4]], TypeError, "numpy array, got list"),
    "masked": (np.ma.masked_array(GOOD, GOOD > 200), TypeError, "numpy array, got MaskedArray"),
    "boolean": (GOOD > 100, TypeError, "integers or floats, got dtype bool"),
    "complex": (GOOD * 1j, TypeError, "integers or floats, got dtype complex128"),
    "objects": (GOOD.astype(object), TypeError, "integers or floats, got dtype object"),
    "colour": (np.zeros((48, 50, 3)), ValueError, r"\(H, W\), got shape \(48, 50, 3\)"),
    "line": (np.zeros(48), ValueError, r"\(H, W\), got shape \(48,\)"),
    "empty": (np.zeros((0, 50)), ValueError, r"at least one pixel, got shape \(0, 50\)"),
    "NaN": (spoilt(math.nan), ValueError, "finite, got 1 NaN or infinite values"),
    "infinite": (spoilt(math.inf), ValueError, "finite, got 1 NaN or infinite values"),
    "negative": (spoilt(-1), ValueError, r"in \[0, 255\], got values from -1.0 to"),
    "above 255": (spoilt(255.5), ValueError, r"in \[0, 255\], got values from .* to 255.5"),
    "16 bits": (np.uint16(257) * GOOD.astype(np.uint16), ValueError, r"got values from 0 to [0-9]{5}"),
    "scaled to [0, 1]": (GOOD / 255, ValueError, r"fractions up to .*: multiply by 255"),
}


@pytest.mark.parametrize("position", ["fused", "a", "b"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_by_name(case, position):
    bad, error, message = BAD_IMAGES[case]
    images = {"fused": GOOD, "a": GOOD, "b": GOOD} | {position: bad}
    with pytest.raises(error, match=f"^{position} must .*{message}"):
        score(**images)


def test_every_function_checks_its_images_and_names_sides_that_are_too_short():
    for key, entry in METRICS.items():
        count = 3 if entry.takes_sources else 1
        for position in range(count):
            images = [GOOD] * position + [spoilt(256)] + [GOOD] * (count - position - 1)
            with pytest.raises(ValueError, match=r"in \[0, 255\], got values from"):
                entry.function(*images)
        side = entry.min_side
        for shape in ((side - 1, 200), (200, side - 1)) if side > 1 else ():
            with pytest.raises(ValueError, match=f"{key} needs images with sides >= {side}, got .*{side - 1}"):
                entry.function(*[np.zeros(shape)] * count)


def test_different_shapes_are_refused_and_both_are_named():
    other = GOOD[:, :-1]
    with pytest.raises(ValueError, match=r"same shape, got fused \(48, 50\) and a \(48, 49\)"):
        score(GOOD, other, GOOD)
    with pytest.raises(ValueError, match=r"same shape, got fused \(48, 50\) and b \(48, 49\)"):
        metrics.qcb(GOOD, GOOD, other)


def test_unknown_protocols_and_metrics_are_refused_and_the_known_ones_named():
    for call in (score, metrics.ssim, METRICS["MI"].function):
        with pytest.raises(ValueError, match="'legacy', expected one of: paper, standard, vifb, tang-2022, "):
            call(GOOD, GOOD, GOOD, protocol="legacy")
    with pytest.raises(ValueError, match="unknown metric 'FID', expected names from: EN, SD, .*Qcv"):
        score(GOOD, GOOD, GOOD, metrics=["EN", "FID"])


# --- the registry and the module ---------------------------------------------------------------------------


def test_score_returns_the_metrics_asked_for_in_the_order_asked_as_plain_floats():
    images = made_images(13, 48, 50)
    everything = score(*images)
    assert list(everything) == KEYS == list(METRICS)[:12]
    assert everything == score(*images, protocol="paper")
    assert {type(value) for value in everything.values()} == {float}
    chosen = score(*images, metrics=("VIF", "EN", "MSE"))
    assert list(chosen.items()) == [(key, everything[key]) for key in ("VIF", "EN", "MSE")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_function_equals_score(protocol):
    images = made_images(14, 161, 170)
    for key, value in score(*images, protocol, metrics=METRICS).items():
        entry = METRICS[key]
        inputs = images if entry.takes_sources else images[:1]
        assert entry.function(*inputs, protocol=protocol) == pytest.approx(value, rel=1e-12, nan_ok=True), key
        defined = protocol in ("paper", "standard") or key in TABLES[metrics.canonical(protocol)]
        assert math.isnan(value) != defined, key


def test_registry_entries_are_complete():
    assert PAPER_TABLE == ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM")
    assert {key for key, entry in METRICS.items() if entry.better == "lower"} == {
        "MSE", "Nabf", "CE", "RMSE", "Qcv",
    }  # fmt: skip
    for key, entry in METRICS.items():
        assert entry.key == key and entry.name and entry.reference
        assert entry.low < entry.high
        assert getattr(metrics, entry.function.__name__) is entry.function
        for part in (f"({key}).", entry.reference, f"{entry.better} is better", ">>> "):
            assert part in entry.function.__doc__
    assert METRICS["MI"].unit_in("toolbox") == METRICS["MI"].unit_in("tang-2023") == "bits"
    assert METRICS["PSNR"].unit_in("vifb") == "dB" and METRICS["MI"].unit_in("vifb") == "nats"


def test_a_metric_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(METRICS))

    @metric("Range", "range of levels", reference="this test", takes_sources=False)
    def level_range(images: Images, protocol: str) -> float:
        """Largest level minus smallest (Range)."""
        return float(images.grey[0].max() - images.grey[0].min())

    assert level_range(GOOD) == score(GOOD, GOOD, GOOD, metrics=["Range"])["Range"] == np.ptp(GOOD)
    assert math.isnan(level_range(GOOD, protocol="vifb"))
    with pytest.raises(ValueError, match="'Range' is registered already"):
        metric("Range", "again", reference="")


def test_module_needs_only_numpy_and_the_standard_library():
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
