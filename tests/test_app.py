"""app.py: what the page is asked through Gradio's own client, and once through a browser at the width of a phone."""

import os
import string
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import app
import fuse
from tests.conftest import write_pair
from tools import screenshot
from utils.common import in_checkout
from utils.data.images import read_grey
from utils.data.pairs import find_modalities, list_pairs
from utils.data.sources import read_sources
from utils.metrics import PAPER_TABLE, score

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

PATIENCE_S = 120  # for what takes a second or two on a machine with nothing else to do
PIXELS = 50_000


@pytest.fixture(scope="module")
def address():
    arguments = ["--device", "cpu", "--max-pixels", str(PIXELS), "--max-upload", "200KB"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", "")  # is put back at the end
        with app.running(app.build_parser().parse_args(arguments)) as address:
            folder = Path(os.environ["GRADIO_TEMP_DIR"])
            yield address
            assert list(folder.rglob("*.png")), "nothing was uploaded here, so this proves nothing"
    assert not folder.exists()
    assert in_checkout("test_img", "Sample_IVF", "vi", "underpass.png").is_file()


@pytest.fixture
def visit(address, tmp_path):
    """Opens the page, in a language, as a function of what `fuse` on it is asked."""

    def open_page(language="en", task="ivf"):
        client = gradio_client.Client(
            address, verbose=False, headers={"accept-language": language}, download_files=tmp_path / "downloads"
        )
        choices = client.predict(task, "cddfuse", api_name="/fit")[-1]

        def ask(vis, ir, colour="both", resized=False, spread=False):
            files = [path and gradio_client.handle_file(path) for path in (vis, ir)]
            return files[0], files[1], task, "cddfuse", choices["value"], colour, resized, spread

        return client, ask

    return open_page


@pytest.fixture
def pair(tmp_path):
    write_pair(tmp_path, ("vi", "ir"), "straße (1).png", seed=0)
    return [tmp_path / side / "straße (1).png" for side in ("vi", "ir")]


def grey(path, levels):
    cv2.imwrite(str(path), np.asarray(levels, np.uint8))
    return path


def refusal(client, inputs, api_name="/fuse"):
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        client.submit(*inputs, api_name=api_name).result(PATIENCE_S)
    return str(caught.value)


def test_a_pair_is_fused_and_scored_as_by_the_scripts(visit, pair, tmp_path):
    client, ask = visit()
    status, _, features, table, against_vis, against_ir, file = client.submit(
        *ask(*pair), api_name="/fuse"
    ).result(PATIENCE_S)  # fmt: skip
    assert status.startswith("CDDFuse, CDDFuse_IVF.pth (sha256 ") and "72x64" in status
    assert Path(file).name == "straße (1)_fused.png"
    want = tmp_path / "want.png"
    assert fuse.main(["--device", "cpu", "--vi", str(pair[0]), "--ir", str(pair[1]), "--out", str(want)]) == 0
    assert Path(file).read_bytes() == want.read_bytes()
    scores = score(read_grey(want), read_grey(pair[1]), read_grey(pair[0]))
    assert [line.split("|")[2].strip(" *") for line in table.splitlines()[2:]] == [
        f"{scores[key]:.2f}" for key in PAPER_TABLE
    ]
    assert [feature["caption"] for feature in features] == ["base vis", "base ir", "detail vis", "detail ir"]
    assert len(against_vis) == len(against_ir) == 2


def test_progress_is_told_and_cancel_ends_the_work(visit, pair, monkeypatch):
    def fuse_slowly(*_, **__):
        layer = torch.nn.Identity()
        for _ in range(100 * PATIENCE_S):
            layer(torch.empty(10**6))
            time.sleep(0.01)

    monkeypatch.setattr(app.fusing, "fuse_sources", fuse_slowly)
    client, ask = visit()
    job, told = client.submit(*ask(*pair), api_name="/fuse"), ""
    end = time.monotonic() + PATIENCE_S
    while "s left" not in told and time.monotonic() < end:
        time.sleep(0.05)
        told = "".join(unit.desc for unit in job.status().progress_data or [])
    assert told.startswith("Fusing, about ")
    client.predict(api_name="/cancel")
    assert job.result(PATIENCE_S)[0] == "Cancelled."


def test_a_result_is_stale_as_soon_as_an_input_differs(visit, pair):
    client, ask = visit()
    client.submit(*ask(*pair), api_name="/fuse").result(PATIENCE_S)
    assert client.predict(*ask(*pair, colour="none"), api_name="/is_stale")["visible"]


def test_bad_input_becomes_one_line_in_the_names_of_its_owner(visit, pair, tmp_path):
    client, ask = visit()
    text = tmp_path / "notes.png"
    text.write_text("<b>no image</b>")
    smaller = grey(tmp_path / "smaller.png", np.zeros((40, 50)))
    counts = tmp_path / "counts.tif"
    cv2.imwrite(str(counts), np.linspace(-7000, 9000, 64 * 72, dtype=np.float32).reshape(64, 72))
    cases = {
        "there is no image yet: Infrared": ask(pair[0], None),
        "notes.png (Infrared) is not an image": ask(pair[0], text),
        "smaller.png (Infrared) is 50x40": ask(pair[0], smaller),
        "counts.tif (Infrared) holds float32 values": ask(pair[0], counts),
        "choose the kind of the images": (*ask(*pair)[:3], "mlfuse", *ask(*pair)[4:]),  # with weights of CDDFuse
        "has more than 0.05 megapixels": ask(grey(tmp_path / "large.png", np.zeros((250, 250))), pair[1]),
    }
    for wanted, inputs in cases.items():
        message = refusal(client, inputs)
        assert wanted in message and "\n" not in message and str(tmp_path) not in message
    assert "notes.png (Visible)" in refusal(client, (ask(text, None)[0], "ivf"), "/preview_vis")
    noise = np.random.default_rng(0).integers(0, 256, (600, 600))
    with pytest.raises(Exception, match="413|size"):  # by Gradio, before anything of ours is asked
        client.predict(*ask(grey(tmp_path / "heavy.png", noise), pair[1]), api_name="/fuse")
    status, *_ = client.submit(*ask(pair[0], counts, spread=True), api_name="/fuse").result(PATIENCE_S)
    assert "72x64" in status


def test_a_faulty_program_is_not_blamed_on_the_images(visit, pair, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(app, "edge_shift", fail)
    client, ask = visit()
    assert "secret" not in refusal(client, ask(*pair))
    assert "secret of the server" in capfd.readouterr().err


def test_medical_images_fused_as_infrared_and_visible_ones_are_named(visit, tmp_path):
    head = np.zeros((64, 64))
    head[8:-8, 8:-8] = np.random.default_rng(0).integers(0, 256, (48, 48))
    client, ask = visit("zh-CN,zh")
    inputs = ask(grey(tmp_path / "a.png", head), grey(tmp_path / "b.png", head.T))
    status, _, _, table, *_ = client.submit(*inputs, api_name="/fuse").result(PATIENCE_S)
    assert status.endswith(app.WORDS["zh"]["not_ivf"])
    assert "可见光" in table.splitlines()[0]  # in the language that the browser asks for


@pytest.mark.parametrize(("name", "task"), app.SAMPLE_SETS.items())
def test_the_kind_of_images_is_seen(name, task):
    for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs:
        assert app.task_seen(["a.png", "b.png"], read_sources(pair)) == task
        assert app.task_seen([str(pair.vis), str(pair.ir)], read_sources(pair)) == task


def test_both_languages_have_every_word_and_the_same_blanks():
    def blanks(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    assert app.WORDS["en"].keys() == app.WORDS["zh"].keys()
    for key, text in app.WORDS["en"].items():
        assert blanks(text) == blanks(app.WORDS["zh"][key]), key
    assert "not a medical device" in app.WORDS["en"]["about"] and "不是医疗器械" in app.WORDS["zh"]["about"]


def test_what_cannot_be_served_is_said_in_one_line(address, tmp_path, monkeypatch, capfd):
    other = tmp_path / "other.pth"
    other.write_bytes(b"no weights")
    port = address.strip("/").rsplit(":", 1)[1]
    for options, wanted in (
        (["--weights", str(other)], "other.pth"),
        (["--port", port], f"--port {port}"),
        (["--host", "192.0.2.1"], "192.0.2.1"),  # an address of no machine: RFC 5737
    ):
        monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])
        assert app.main(["--device", "cpu", *options]) == 2
        error = capfd.readouterr().err
        assert wanted in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([]) == 2
    assert "pip install gradio" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(screenshot.what_is_missing()), reason=screenshot.what_is_missing())
def test_the_page_fits_a_phone_and_speaks_the_language_of_the_browser(address):
    with screenshot.browser("zh-CN") as page:
        screenshot.show(page, address, 390)
        assert not screenshot.find(page, "#fuse")  # the kind of images is asked first
        screenshot.fuse_sample(page, 2)  # the smallest
        assert page.execute_script("return document.documentElement.scrollWidth") == 390
        [button] = screenshot.find(page, "#fuse")
        assert button.text == app.WORDS["zh"]["fuse"] and button.is_enabled()
        assert not screenshot.find(page, "#stale")
        screenshot.find(page, "#colour label")[-1].click()
        screenshot.wait_for(page, lambda: screenshot.find(page, "#stale"))
        asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
