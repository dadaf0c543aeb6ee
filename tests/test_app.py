"""app.py: the page in a real browser, from upload to download; what is refused to hostile requests; its options."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest

import app
import fuse
from tests.conftest import write_pair
from tools.screenshot import (
    PATIENCE_S,
    browser,
    click_sample,
    find,
    pictures_loaded,
    served,
    wait_for,
    what_is_missing,
)
from utils.common import ROOT, in_checkout
from utils.data.images import read_grey
from utils.data.registration import resize
from utils.metrics import PAPER_TABLE, score

MAX_PIXELS = 100_000
PASSWORDS = Path("/etc/passwd")

needs_gradio = pytest.mark.skipif("gradio" in what_is_missing(), reason=what_is_missing())
needs_browser = pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        # What another program may have left in the environment must not open the page to anybody.
        patched.setenv("GRADIO_ALLOWED_PATHS", "/")
        patched.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patched.setenv("GRADIO_SHARE", "True")
        folder = tmp_path_factory.mktemp("temporary")
        patched.setenv("TMPDIR", str(folder))
        with served("--max-pixels", MAX_PIXELS) as address:
            assert len(list(folder.glob("fusion-page-*"))) == 1
            yield address
    assert not list(folder.glob("fusion-page-*")), "SIGTERM left uploads or results"
    assert not (ROOT / "app.pyi").exists(), "Gradio wrote a stub into the checkout"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def window(downloads):
    with browser(downloads=downloads) as window:
        yield window


@pytest.fixture
def page(window, address):
    window.get(address)
    wait_for(window, lambda: find(window, "#fuse") and find(window, "#samples .thumbnail-item"))
    return window


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A bundled pair under names of its owner's."""
    folder = tmp_path_factory.mktemp("samples")
    named = {"vi": "straße (1).PNG", "ir": "ir.png"}
    for role, name in named.items():
        shutil.copy(in_checkout("test_img", "Sample_IVF", role, "underpass.png"), folder / name)
    return tuple(folder / name for name in named.values())


def upload(page, place, path):
    field, clear = f"#{place} input[type=file]", f"#{place} button[aria-label=Clear]"
    for button in find(page, clear):  # it holds a file
        button.click()
    wait_for(page, lambda: page.find_elements("css selector", field))[0].send_keys(str(path))
    wait_for(page, lambda: find(page, clear))  # as soon as the file is there


def press(page, selector):
    wait_for(page, lambda: [button for button in find(page, selector) if button.is_enabled()])[0].click()


def status(page, *parts):
    """The message of the page, as soon as it holds all of these."""

    def message():
        text = " ".join(element.text for element in find(page, "#status .said"))
        return text if all(part in text for part in parts) else None

    return wait_for(page, message)


def table(page):
    rows = wait_for(page, lambda: find(page, "#scores tbody tr"))
    return {
        cells[0].text.split()[0]: cells[1].text for cells in (row.find_elements("css selector", "td") for row in rows)
    }


def fused_by_script(vis, ir, out, *options):
    arguments = ["--device", "cpu", "--vi", vis, "--ir", ir, "--out", out, *options]
    assert fuse.main([str(argument) for argument in arguments]) == 0
    return out


def printed_scores(fused, vis, ir):
    scores = score(read_grey(fused), ir, read_grey(vis))
    return {key: f"{scores[key]:.2f}" for key in PAPER_TABLE}


@needs_browser
def test_two_images_become_a_fused_one_with_scores_features_and_a_download(page, samples, downloads, tmp_path, address):
    upload(page, "vis", samples[0])
    upload(page, "ir", samples[1])
    press(page, "#fuse")
    assert "CDDFuse with CDDFuse_IVF.pth" in status(page, "200x161")

    want = fused_by_script(*samples, tmp_path / "f.png")
    assert table(page) == printed_scores(want, samples[0], read_grey(samples[1]))

    press(page, "#download")
    saved = downloads / "straße (1).png"
    wait_for(page, lambda: saved.is_file() and saved.stat().st_size == want.stat().st_size)
    assert saved.read_bytes() == want.read_bytes()

    for tab, pictures in (("Against infrared", 2), ("Features", 4), ("Against visible", 2)):
        next(button for button in find(page, "button[role=tab]") if tab in button.text).click()
        wait_for(page, lambda count=pictures: len(find(page, "[role=tabpanel] img")) >= count and pictures_loaded(page))
    asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), "the page asks elsewhere"
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
def test_sizes_that_differ_are_said_in_words_and_resizing_helps(page, samples, tmp_path):
    odd = tmp_path / "a<b>${6*7}&amp;.png"  # nothing in a name is markup
    cv2.imwrite(str(odd), cv2.resize(cv2.imread(str(samples[1])), (100, 80)))
    upload(page, "vis", samples[0])
    upload(page, "ir", odd)
    press(page, "#fuse")
    message = status(page, "200x161", "100x80", "tick “Resize”")
    assert "straße (1).PNG is 200x161" in message and f"{odd.name} is 100x80" in message
    assert str(tmp_path) not in message and "fusion-page" not in message
    assert find(page, "#status [role=alert]") and not find(page, "#scores") and not find(page, "#download")
    press(page, "#resize input")
    next(label for label in find(page, "#colour label") if label.text == "grey").click()
    press(page, "#fuse")
    assert "was resized to 200x161" in status(page, "CDDFuse with")
    want = fused_by_script(samples[0], odd, tmp_path / "f.png", "--resize-ir", "--colour", "none")
    assert table(page) == printed_scores(want, samples[0], resize(read_grey(odd), (161, 200)))


@needs_browser
def test_files_that_are_no_images_or_too_large_are_refused_in_words(page, samples, tmp_path):
    (tmp_path / "broken.png").write_bytes(samples[0].read_bytes()[:200])
    upload(page, "vis", tmp_path / "broken.png")
    status(page, "the visible image broken.png is not an image of 8 or 16 bits")
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((400, 300), np.uint8))
    upload(page, "ir", tmp_path / "large.png")
    status(page, "the infrared image large.png is 300x400, 0.12 megapixels, and this page takes 0.1 megapixels")
    assert "0.1 megapixels and 1 MB" in page.find_element("css selector", "body").text
    # More than the limit in bytes is refused while it is sent.
    (tmp_path / "heavy.png").write_bytes(bytes(2 * 10**6))
    find(page, "#vis button[aria-label=Clear]")[0].click()
    field = wait_for(page, lambda: page.find_elements("css selector", "#vis input[type=file]"))[0]
    field.send_keys(str(tmp_path / "heavy.png"))
    wait_for(page, lambda: "maximum allowed size" in page.find_element("css selector", "body").text.lower())


@needs_browser
def test_a_click_on_a_sample_fuses_it_with_the_weights_of_its_task(page):
    click_sample(page, 7)  # MRI and PET
    message = status(page, "CDDFuse with CDDFuse_MIF.pth", "256x256")
    assert "decoder image: none" in message
    assert list(table(page)) == list(PAPER_TABLE)
    assert "Download uptake_t1.png" in find(page, "#download")[0].text
    click_sample(page, 3)
    status(page, "CDDFuse with CDDFuse_IVF.pth", "200x161")


# Without a browser: what it would send, and what it would not.


class Client:
    """Sends what the page's script would."""

    def __init__(self, address):
        self.address = address
        self.config = json.loads(self.get("/config")[1])
        self.session = uuid.uuid4().hex

    def get(self, path):
        url = urllib.parse.urlsplit(self.address)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE_S)
        connection.request("GET", path)  # as it is: urllib would tidy it up
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body

    def upload(self, path):
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(f"{self.address}/gradio_api/upload", body, headers)
        return json.load(urllib.request.urlopen(request, timeout=PATIENCE_S))[0]

    def function(self, event, selector):
        component = next(part["id"] for part in self.config["components"] if part["props"].get("elem_id") == selector)
        return next(item["id"] for item in self.config["dependencies"] if [component, event] in item["targets"])

    def call(self, function, data):
        """Joins the queue; every message of it, with the time that it came at."""
        content = json.dumps({"data": data, "fn_index": function, "session_hash": self.session}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/gradio_api/queue/join", content, headers)
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
        messages = []
        events = f"{self.address}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(events, timeout=PATIENCE_S) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    messages.append(json.loads(line[5:]) | {"at": time.monotonic()})
                    if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                        return messages
        return messages


def as_file(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def client(address):
    return Client(address)


@needs_gradio
def test_only_uploads_and_results_are_served(client, samples):
    theirs = client.upload(samples[1])
    assert "/fusion-page-" in theirs  # the folder that is removed at the end
    code, body = client.get(f"/gradio_api/file={theirs}")
    assert code == 200 and body == samples[1].read_bytes()  # so what follows is not refused for its form
    folder = Path(theirs).parent
    up = os.path.relpath(PASSWORDS, folder)
    hostile = [
        PASSWORDS, in_checkout("net.py").resolve(), in_checkout("models", "CDDFuse_IVF.pth").resolve(), samples[1],
        in_checkout("test_img", "Sample_IVF", "vi", "underpass.png").resolve(), "app.py", "../app.py",
        f"{folder}/{up}", f"{folder}/{urllib.parse.quote(up, safe='')}", f"file://{PASSWORDS}", "/proc/self/environ",
    ]  # fmt: skip
    for path in hostile:
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
            code, body = client.get(f"{route}{urllib.parse.quote(str(path), safe='/%:')}")
            assert code in (307, 403, 404, 405), (route, path, code)
            assert b"root:" not in body and body != samples[1].read_bytes()


@needs_gradio
def test_addresses_are_not_fetched(client, samples):
    for address in ("http://example.org/a.png", "HTTPS://example.org/a.png", "http:/example.org/a.png"):
        for route in ("/gradio_api/file=", "/gradio_api/proxy="):
            code, body = client.get(route + address)
            assert (code, body) == (403, b"addresses are not fetched")
    messages = client.call(client.function("change", "vis"), [as_file("http://example.org/a.png"), "ivf"])
    assert not messages[-1]["success"] and "addresses are not fetched" in messages[-1]["output"]["error"]


@needs_gradio
def test_a_forged_path_is_not_read(client, samples):
    preview = client.function("change", "vis")
    shown = client.call(preview, [as_file(client.upload(samples[1])), "ivf"])[-1]
    assert shown["success"] and "200x161" in json.dumps(shown["output"])  # an upload is
    upload = client.upload(samples[1])
    for path in (samples[1], in_checkout("test_img", "Sample_IVF", "vi", "underpass.png").resolve(), PASSWORDS,
                 f"{Path(upload).parent}/{os.path.relpath(samples[1], Path(upload).parent)}"):  # fmt: skip
        for forged in (as_file(path), {"path": str(path)}, str(path), as_file(upload) | {"path": str(path)}):
            message = client.call(preview, [forged, "ivf"])[-1]
            assert not message.get("success"), (path, forged)
            assert "200x161" not in json.dumps(message) and "root:" not in json.dumps(message)


@needs_gradio
def test_a_small_file_that_holds_a_huge_image_is_not_unpacked(client, tmp_path):
    preview = client.function("change", "ir")
    for suffix, part in ((".png", "3000x2000"), (".webp", "not an image of 8 or 16 bits that OpenCV can read")):
        for size, refused in (((20, 30), False), ((2000, 3000), True)):
            path = tmp_path / f"i{size[0]}{suffix}"
            cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
            message = client.call(preview, [as_file(client.upload(path)), "ivf"])[-1]
            assert message["success"] and (part in json.dumps(message["output"])) == refused


@needs_gradio
def test_several_users_take_turns(address, tmp_path):
    write_pair(tmp_path, ("vi", "ir"), "x.png", 0, size=(64, 72))
    clients = [Client(address) for _ in range(3)]
    button = clients[0].function("click", "fuse")
    found = {}

    def use(number):
        client = clients[number]
        files = [as_file(client.upload(tmp_path / role / "x.png")) for role in ("vi", "ir")]
        found[number] = client.call(button, [*files, "ivf", "cddfuse", "CDDFuse_IVF.pth", "both", False])

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(found) == len(clients)
    spans = []
    for messages in found.values():
        times = {message["msg"]: message["at"] for message in messages}
        assert messages[-1]["success"] and "CDDFuse with" in json.dumps(messages[-1]["output"])
        spans.append((times["process_starts"], times["process_completed"]))
    spans.sort()
    for (_, end), (start, _) in zip(spans[:-1], spans[1:], strict=True):
        assert start > end - 0.5  # seconds; both messages cross a socket


@needs_gradio
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp")
def test_it_listens_on_this_machine_alone(address):
    port = urllib.parse.urlsplit(address).port
    sockets = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    listening = [fields[1] for fields in sockets if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port]
    assert listening == [f"0100007F:{port:04X}"]  # 127.0.0.1, and nothing else


# The script itself.


def run(capsys, *options):
    code = app.main([str(option) for option in options])
    return code, capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, err = run(capsys, "--port", 0)
    assert code == 2 and "pip install gradio" in err and err.count("\n") == 1


def test_a_port_that_is_taken_is_named_and_by_default_the_next_one_is_used(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, err = run(capsys, "--port", port)
        assert code == 2 and f"port {port}" in err and err.count("\n") == 1
        monkeypatch.setattr(app, "PORTS", range(port, port + 50))
        assert port < app.free_port("127.0.0.1", None) < port + 50
    for host in ("203.0.113.7", "no such host"):  # an address for documentation
        assert run(capsys, "--host", host)[0] == 2
    assert run(capsys, "--port", 70000)[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share"], "unrecognized arguments"),
        (["--max-pixels", "many"], "no number of pixels"),
        (["--max-pixels", "0"], "no number of pixels"),
        (["--max-pixels", "inf"], "no number of pixels"),
        (["--max-memory", "x"], "no size"),
    ],
)
def test_options_that_do_not_exist_or_make_no_sense_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        app.main(options)
    assert message in capsys.readouterr().err


def test_weights_that_are_not_there_are_named(capsys, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code, err = run(capsys, "--port", 0, "--weights", tmp_path / "none.pth")
    assert code == 2 and "none.pth" in err and err.count("\n") == 1


def test_what_is_not_for_the_page_goes_to_the_terminal(capsys):
    assert "RuntimeError" in app.explained(RuntimeError("/secret/path")) and "secret" in capsys.readouterr().err
    assert "secret" not in app.explained(RuntimeError("/secret/path"))
    assert "No space left" in app.explained(OSError(28, "No space left on device", "/secret/path"))
    assert "secret" not in app.explained(OSError(28, "No space left on device", "/secret/path"))
    assert "memory" in app.explained(MemoryError())
    assert app.said("<b>", "<script>", error=True).count("&lt;") == 2


def test_gradio_is_not_needed_to_import_the_script():
    assert "gradio" not in vars(app)
