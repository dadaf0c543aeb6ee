"""downstream.py on painted scenes: whole runs, resume, labels of every form, and what happens to bad ones."""

from __future__ import annotations

import importlib.util
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import downstream
from utils.common import InputError
from utils.data.labels import IGNORE, Boxes, read_boxes, read_mask
from utils.evaluation import downstream as engine
from utils.evaluation.downstream import Recipe, Scene, average_precision, crop, iou

SIZE = (64, 96)
LIBRARIES = ("torchvision", "segmentation_models_pytorch", "torchmetrics", "pycocotools")
needs_libraries = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in LIBRARIES), reason="needs requirements-downstream.txt"
)
TINY = "--backbone-weights none --device cpu --block 1 --test-every 2 --steps 2 --batch 2 --crop 64 64".split()
SEGMENT = [*TINY, "--network", "fpn", "--backbone", "tu-mobilenetv3_small_050", "--classes", "ground", "box"]


@pytest.fixture
def data(tmp_path):
    """Six scenes: a box that is bright in the infrared image alone; its mask, its row in boxes.csv; a fused folder."""
    rng = np.random.default_rng(0)
    rows = ["name,class,x0,y0,x1,y1"]
    for name in "abcdef":
        x, y = int(rng.integers(60)), int(rng.integers(30))
        mask = np.zeros(SIZE, np.uint8)
        mask[y : y + 24, x : x + 32] = 1
        vis, ir = rng.integers(0, 99, SIZE), 30 + 200 * mask
        for folder, image in (("vi", vis), ("ir", ir), ("segmentation", mask), ("../fused", (vis + ir) // 2)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "data" / folder / f"{name}.png"), image.astype(np.uint8))
        rows.append(f"{name},box,{x},{y},{x + 32},{y + 24}")
    (tmp_path / "data" / "boxes.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def run(capsys, task, data, *options):
    fused = ["--fused", data.parent / "fused", "--out", data.parent / "out"] if task != "shrink" else []
    code = downstream.main([str(part) for part in (task, "--data", data, *fused, *options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@needs_libraries
def test_segmentation_ends_in_a_table_and_goes_on_where_it_stopped(data, capsys):
    code, out, err = run(capsys, "segment", data, *SEGMENT, "--seeds", "0")
    assert code == 0, err
    report = json.loads((data.parent / "out" / "report.json").read_text())
    channels = {name: len(source["mean"]) for name, source in report["sources"].items()}
    assert channels == {"visible": 3, "infrared": 3, "average": 3, "stacked": 6, "fused": 3}
    assert json.loads((data.parent / "out" / "split.json").read_text()) == {"train": [*"ace"], "test": [*"bdf"]}
    assert out.count("| fused | ") == 1 and "| ground | box |" in out and " ± " not in out

    first = report["runs"]
    code, out, _ = run(capsys, "segment", data, *SEGMENT, "--seeds", "0", "1")
    runs = json.loads((data.parent / "out" / "report.json").read_text())["runs"]
    assert code == 0 and " ± " in out and "seed 0" not in out
    assert runs[:5] == first and [run["seed"] for run in runs[5:]] == [1] * 5

    code, _, err = run(capsys, "segment", data, *SEGMENT, "--lr", "0.1")
    assert code == 2 and "report.json was made with other lr" in err
    code, _, err = run(capsys, "segment", data, *SEGMENT, "--network", "nothing", "--out", data / "out")
    assert code == 2 and "--network nothing --backbone tu-mobilenetv3" in err and err.count("\n") == 1

    shutil.copy(data / "ir" / "a.png", data / "vi" / "a.png")
    code, _, err = run(capsys, "segment", data, *SEGMENT, "--seeds", "0")
    assert code == 2 and "the images of visible have changed since" in err


@needs_libraries
def test_equal_seeds_give_equal_scores_and_a_box_is_learnt_only_where_it_is_seen(monkeypatch):
    def tiny(recipe, channels):
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    monkeypatch.setattr(engine, "build", tiny)
    recipe = Recipe("segment", 2, "tiny", "", "none", steps=60, batch=2, crop=(64, 64), lr=0.05)
    rng, cpu = np.random.default_rng(0), torch.device("cpu")
    masks = rng.integers(0, 2, (4, 8, 12)).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    noise = rng.integers(0, 99, (4, *SIZE, 3)).astype(np.uint8)
    found = {}
    seen = noise + 100 * masks[..., None]
    for name, images in (("seen", seen), ("again", seen), ("unseen", noise)):
        scenes = [Scene(*each) for each in zip(images, masks, strict=True)]
        scale = downstream.measure([scene.image for scene in scenes])
        net, _ = engine.train(recipe, scenes, scale, 0, cpu, name)
        found[name] = engine.evaluate(recipe, net, scenes, scale, cpu)["IoU"]
    assert found["seen"] == found["again"] and min(found["seen"]) > 0.9 and max(found["unseen"]) < 0.7


@needs_libraries
def test_detection_runs_where_torchvision_has_its_operators_and_else_says_how_to_install_it(data, capsys, monkeypatch):
    torchvision = engine.needed("torchvision")
    options = [*TINY, "--network", "ssdlite320_mobilenet_v3_large", "--seeds", "0"]
    if not torchvision.extension._has_ops():
        code, _, err = run(capsys, "detect", data, *options)
        assert code == 2 and err.count("\n") == 1
        assert "detect needs the operators of torchvision" in err and "pip install --force-reinstall torch" in err
        monkeypatch.setattr(torchvision.ops, "nms", lambda boxes, scores, threshold: scores.argsort(descending=True))
        monkeypatch.setattr(torchvision.ops.boxes, "nms", torchvision.ops.nms)
    code, out, err = run(capsys, "detect", data, *options)
    assert code == 0, err
    assert "| AP50, % | mean |" in out and "| AP50:95, % | mean |" in out


def test_a_missing_library_is_one_line_with_the_command_that_installs_it(data, capsys, monkeypatch):
    monkeypatch.setattr(engine.importlib, "import_module", lambda name: __import__("no_such_module"))
    code, _, err = run(capsys, "segment", data, *SEGMENT)
    assert code == 2 and err.count("\n") == 1 and "pip install -r requirements-downstream.txt" in err


def test_shrink_halves_images_masks_and_boxes(data, capsys):
    code, _, err = run(capsys, "shrink", data, "--out", data.parent / "half", "--every", "2")
    assert code == 0, err
    names = sorted(path.stem for path in (data.parent / "half" / "vi").iterdir())
    sizes = dict.fromkeys(names, (32, 48))
    boxes, classes = read_boxes(data.parent / "half" / "boxes.csv", sizes)
    assert names == ["a", "c", "e"] and classes == ["box"]
    for name in names:
        x0, y0, x1, y1 = np.round(boxes[name].corners[0]).astype(int)
        mask = read_mask(data.parent / "half" / "segmentation" / f"{name}.png", sizes[name], 2)
        assert mask[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].all() and abs(mask.sum() - 12 * 16) < 60


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda mask: np.where(mask, 7, 0), "b.png holds class 7, but there are 2: 0 to 1; name every class with"),
        (lambda mask: mask[:32], "b.png is 96x32, its image 96x64 (width x height)"),
        (lambda mask: np.dstack([mask, mask + 1, mask]), "b.png has colours"),
        (None, "has no mask for b"),
    ],
)
def test_a_bad_mask_is_one_line_before_anything_is_trained(data, capsys, monkeypatch, spoil, said):
    monkeypatch.setattr(downstream, "check_libraries", lambda task: None)
    path = data / "segmentation" / "b.png"
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    path.unlink()
    if spoil:
        cv2.imwrite(str(path), spoil(mask).astype(np.uint8))
    code, _, err = run(capsys, "segment", data, *SEGMENT)
    assert code == 2 and err.count("\n") == 1 and said in err
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,tree,1,1,9,9", "line 8: unknown class tree; --classes names box"),
        ("a,box,9,9,9,20", "line 8: a box without area inside the 96x64 image a"),
        ("a,box,200,9,220,20", "line 8: a box without area"),
        ("a,box,9,nan,20,20", "line 8: a box without area"),
        ("a,box,9,,20,20", "not boxes in CSV, COCO or YOLO form"),
    ],
)
def test_a_bad_box_is_named_with_its_line(data, row, said):
    with (data / "boxes.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError, match=said):
        read_boxes(data / "boxes.csv", dict.fromkeys("abcdef", SIZE), ["box"])


def test_one_box_is_the_same_as_csv_coco_and_yolo(tmp_path):
    (tmp_path / "boxes.csv").write_text("name,class,x0,y0,x1,y1\na,car,10,20,30,60\n")
    coco = {"images": [{"id": 3, "file_name": "x/a.jpg", "height": 64, "width": 96}],
            "categories": [{"id": 7, "name": "car"}],
            "annotations": [{"id": 1, "image_id": 3, "category_id": 7, "bbox": [10, 20, 20, 40]}]}  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "classes.txt").write_text("car\n")
    (tmp_path / "yolo" / "a.txt").write_text(f"0 {20 / 96} {40 / 64} {20 / 96} {40 / 64}\n")
    for name in ("boxes.csv", "coco.json", "yolo"):
        boxes, classes = read_boxes(tmp_path / name, {"a": SIZE, "empty": SIZE})
        assert classes == ["car"] and len(boxes["empty"].corners) == 0
        np.testing.assert_allclose(boxes["a"].corners, [[10, 20, 30, 60]], atol=1e-4)  # YOLO fractions in float32
    with pytest.raises(InputError, match="a is 96x64 there, but the image is 9x9"):
        read_boxes(tmp_path / "coco.json", {"a": (9, 9)})


def test_a_crop_moves_mirrors_and_cuts_the_label_with_the_image():
    image = np.zeros((40, 50, 3), np.uint8)
    image[10:30, 20:40] = 255
    boxes = Boxes(np.float32([[20, 10, 40, 30], [0, 0, 1, 1]]), np.int64([1, 0]))
    for seed in range(20):
        size = (32, 32) if seed % 2 else (64, 64)  # smaller and larger than the image
        part, kept = crop(Scene(image, boxes), size, np.random.default_rng(seed))
        same, mask = crop(Scene(image, image[..., 0] // 255), size, np.random.default_rng(seed))
        x0, y0, x1, y1 = kept.corners[kept.classes == 1][0].astype(int)
        assert part.shape == (*size, 3) and (part == same).all()
        assert (part[y0:y1, x0:x1] == 255).all() and (part == 255).sum() == 3 * (y1 - y0) * (x1 - x0)
        assert ((mask == 1) == (part[..., 0] == 255)).all() and (mask == IGNORE).any() == (size == (64, 64))


def test_iou_equals_the_value_worked_by_hand():
    confusion = torch.tensor([[6, 2, 1], [1, 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(iou(confusion), [6 / 10, 3 / 6, np.nan])  # no mask holds the third class


@needs_libraries
def test_average_precision_of_each_class_equals_the_value_worked_by_hand():
    metric = engine.needed("torchmetrics.detection").MeanAveragePrecision(extended_summary=True)
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    shifted = torch.tensor([[0.0, 0.0, 10.0, 8.1]])  # overlap 0.81: found at the thresholds 0.5 ... 0.8, 7 of 10
    metric.update(
        [{"boxes": torch.cat([shifted, box]), "labels": torch.tensor([1, 4]), "scores": torch.tensor([0.9, 0.8])}],
        [{"boxes": torch.cat([box, box]), "labels": torch.tensor([1, 2])}],
    )
    scores = average_precision(metric.compute(), 4)
    np.testing.assert_allclose(scores["AP50"], [1, 0, np.nan, np.nan])
    np.testing.assert_allclose(scores["AP50:95"], [0.7, 0, np.nan, np.nan], atol=1e-6)  # torchmetrics has float32
