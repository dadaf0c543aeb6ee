"""test_img/make_samples.py: committed images are what it paints; each modality has what the other lacks."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import pytest

from utils.common import ROOT

PATH = ROOT / "test_img" / "make_samples.py"
spec = importlib.util.spec_from_file_location("make_samples", PATH)
make_samples = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_samples)


@pytest.mark.parametrize("name", make_samples.SETS)
def test_committed_files_are_what_the_script_paints(name):
    modalities, painters = make_samples.SETS[name]
    painter = painters[-1]  # the smallest; the others share its code
    assert {path.stem for path in PATH.parent.glob(f"{name}/*/*.png")} == {each.__name__ for each in painters}
    pair = painter()
    for modality, image in zip(modalities, pair, strict=True):
        committed = cv2.imread(str(PATH.parent / name / modality / f"{painter.__name__}.png"), cv2.IMREAD_UNCHANGED)
        difference = np.abs(image.astype(int) - committed.astype(int))
        # OpenCV resamples and fills polygons with other rounding from one version or processor to the next.
        assert difference.mean() < 0.5 and np.mean(difference > 3) < 0.002
    slopes = [
        np.hypot(*np.gradient(cv2.GaussianBlur(np.float32(i if i.ndim == 2 else i[..., 1]), (0, 0), 1))) for i in pair
    ]
    for here, there in (slopes, slopes[::-1]):  # a clear edge here, none there
        assert np.mean((here > 5) & (there < 2)) > 0.001
