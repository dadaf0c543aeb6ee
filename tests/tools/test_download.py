"""tools/download.py against a server that misbehaves: what it puts in place, what it keeps, what it says."""

from __future__ import annotations

import errno
import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import test_IVF
from tests.conftest import write_pair
from tools import doctor, download
from utils.common import ROOT, InputError
from utils.data.manifests import make_manifest, write_manifest
from utils.inference import fusing as inference_module
from utils.inference.fusing import find_weights
from zoo import find_system

CONTENT = np.random.default_rng(0).bytes(50_000)
ETAG = '"one"'


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server:
    """Serves `files` (path -> content); `behave` (path -> function of handler, content, start) may do otherwise."""

    def __init__(self):
        self.files, self.behave, self.asked = {}, {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
                content = outer.files.get(self.path.lstrip("/"))
                behave = outer.behave.get(self.path.lstrip("/")) or outer.behave.get("*") or well
                wanted = self.headers.get("Range")
                behave(self, content, int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def head(handler, status, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def well(handler, content, start):
    if content is None:
        return head(handler, 404, Content_Length=0)
    if not start or handler.headers.get("If-Range", ETAG) != ETAG:
        head(handler, 200, Content_Length=len(content), ETag=ETAG)
        handler.wfile.write(content)
    elif start >= len(content):
        head(handler, 416, Content_Length=0)
    else:
        rest = content[start:]
        place = f"bytes {start}-{len(content) - 1}/{len(content)}"
        head(handler, 206, Content_Length=len(rest), Content_Range=place, ETag=ETAG)
        handler.wfile.write(rest)
    return None


def ignores_range(handler, content, start):
    head(handler, 200, Content_Length=len(content))
    handler.wfile.write(content)


def says(status, **headers):
    return lambda handler, content, start: head(handler, status, Content_Length=0, **headers)


def sends(content, **headers):
    def behave(handler, _, start):
        head(handler, 200, Content_Length=len(content), **headers)
        handler.wfile.write(content)

    return behave


def first(*attempts):
    """One behaviour an attempt, the last one for all that follow."""
    left = list(attempts)
    return lambda *asked: (left.pop(0) if len(left) > 1 else left[0])(*asked)


def cut_off(size):
    def behave(handler, content, start):
        head(handler, 200, Content_Length=len(content), ETag=ETAG)
        handler.wfile.write(content[:size])
        handler.close_connection = True

    return behave


def stands_still(handler, content, start):
    cut_off(1000)(handler, content, start)
    handler.wfile.flush()
    time.sleep(0.8)


def creeps(handler, content, start):
    head(handler, 200, Content_Length=len(content))
    for i in range(12):
        handler.wfile.write(content[i : i + 1])
        time.sleep(0.05)


@pytest.fixture
def server():
    server = Server()
    server.files["models/CDDFuse_IVF.pth"] = CONTENT
    server.files["models/CDDFuse_MIF.pth"] = CONTENT[::-1]
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout, and published weights with the content that the server has; no waiting between attempts."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "FUSION_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download, "in_checkout", tmp_path.joinpath)
    monkeypatch.setattr(inference_module, "in_checkout", tmp_path.joinpath)
    monkeypatch.setattr(download, "BLOBS", {"CDDFuse_IVF.pth": blob(CONTENT), "CDDFuse_MIF.pth": blob(CONTENT[::-1])})
    monkeypatch.setattr(download, "Patience", lambda timeout, retries: PATIENCE(timeout, retries, 0.001))
    return tmp_path


PATIENCE = download.Patience


def run(server, capsys, *options, what=("weights",)):
    url = server if isinstance(server, str) else server.url
    code = download.main([*what, "--base-url", url, "--retries", "2", *map(str, options)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_blob_id_is_that_of_git(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    # Printed by `echo hello | git hash-object --stdin`.
    assert download.git_blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_weights_are_fetched_once_and_terms_are_said_first(server, checkout, capsys):
    code, out, err = run(server, capsys)
    folder = checkout / "models" / "published"
    assert code == 0 and err == ""
    assert out.startswith("What is fetched belongs to its publisher") and "2 of 2 files as published, 2 of them" in out
    assert (folder / "CDDFuse_IVF.pth").read_bytes() == CONTENT
    assert files_in(folder) == ["CDDFuse_IVF.pth", "CDDFuse_MIF.pth"]
    server.asked.clear()
    code, out, _ = run(server, capsys)
    assert code == 0 and server.asked == [] and "0 of them fetched now" in out


def test_another_file_in_the_place_is_named_and_stays(server, checkout, capsys):
    mine = checkout / "models/published/CDDFuse_IVF.pth"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    code, out, err = run(server, capsys)
    assert code == 2 and mine.read_bytes() == b"mine" and "1 of 2 files as published" in out
    assert str(mine) in err and "move it away" in err
    assert (mine.parent / "CDDFuse_MIF.pth").exists()  # the rest is done


def test_a_file_that_appears_meanwhile_stays(server, checkout, capsys):
    mine = checkout / "models/published/CDDFuse_IVF.pth"

    def slowly(handler, content, start):
        mine.write_bytes(b"mine")
        well(handler, content, start)

    server.behave["models/CDDFuse_IVF.pth"] = slowly
    code, _, err = run(server, capsys)
    assert code == 2 and mine.read_bytes() == b"mine" and "has appeared meanwhile" in err


def only(server, capsys, *behaviours, options=()):
    """Fetches the weights, of which one file comes so."""
    server.behave["models/CDDFuse_IVF.pth"] = first(*behaviours)
    code, out, err = run(server, capsys, *options)
    return code, err, [asked for asked in server.asked if "IVF" in asked[0]]


def test_cut_off_goes_on_where_it_stopped_if_the_file_is_still_the_same(server, checkout, capsys):
    code, err, asked = only(server, capsys, cut_off(20_000), well)
    assert code == 0 and "cut off after 20000 of 50000 bytes; trying again" in err
    assert [line[1:] for line in asked] == [(None, None), ("bytes=20000-", ETAG)]
    assert (checkout / "models/published/CDDFuse_IVF.pth").read_bytes() == CONTENT


def test_cut_off_for_good_keeps_what_has_come_for_the_next_run(server, checkout, capsys):
    code, err, _ = only(server, capsys, cut_off(20_000))
    part = checkout / "models/published/CDDFuse_IVF.pth.part"
    assert code == 2 and part.read_bytes() == CONTENT[:20_000]
    assert "attempt 3 of 3" in err and "what has come stays in" in err and "by hand: save https://github.com/" in err
    server.asked.clear()
    code, err, asked = only(server, capsys, well)
    assert code == 0 and not part.exists() and [line[1:] for line in asked] == [("bytes=20000-", None)]


@pytest.mark.parametrize("behaviour", [ignores_range, well])
def test_a_beginning_that_does_not_fit_is_given_up(server, checkout, capsys, behaviour):
    part = checkout / "models/published/CDDFuse_IVF.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 20_000)
    code, _, asked = only(server, capsys, behaviour)
    assert code == 0 and len(asked) == (1 if behaviour is ignores_range else 2) and not part.exists()
    assert (checkout / "models/published/CDDFuse_IVF.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("beginning", [CONTENT, CONTENT + b"more"], ids=["whole", "too long"])
def test_a_run_that_died_before_the_last_step_or_has_too_much(server, checkout, capsys, beginning):
    part = checkout / "models/published/CDDFuse_IVF.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(beginning)
    code, _, asked = only(server, capsys, well)
    assert code == 0 and len(asked) == (0 if beginning == CONTENT else 2) and not part.exists()


def test_a_server_that_goes_on_elsewhere_is_asked_for_the_whole(server, checkout, capsys):
    def elsewhere(handler, content, start):
        head(handler, 206, Content_Length=10, Content_Range=f"bytes 7-16/{len(content)}")
        handler.wfile.write(content[7:17])

    code, err, asked = only(server, capsys, cut_off(9), elsewhere, well)
    assert code == 0 and "at another place than asked" in err and asked[-1][1] is None


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (stands_still, "nothing came for 0.3 s, after 1000 bytes"),
        (creeps, "less than 100 bytes a second"),
        (lambda *_: time.sleep(0.5), "no answer within 0.3 s"),
        (says(503), "503: the server has trouble"),
        (says(429, Retry_After=0), "429: refused; too many requests"),
        (lambda handler, *_: handler.connection.shutdown(socket.SHUT_RDWR), "no connection to 127.0.0.1"),
    ],
)
def test_what_may_pass_is_tried_again(server, checkout, capsys, behaviour, message):
    code, err, asked = only(server, capsys, behaviour, well, options=("--timeout", 0.3))
    assert code == 0 and message in err and "trying again in 0 s" in err and len(asked) == 2
    assert (checkout / "models/published/CDDFuse_IVF.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "message", "attempts"),
    [
        (says(404), "404: not there; moved", 1),
        (says(410), "410: not there; moved", 1),
        (says(401), "asks for a login", 1),
        (says(407), "the proxy asks for a login", 1),
        (says(403), "rate limit), or it is blocked; wait an hour", 1),
        (says(429, Retry_After=3600), "it asks to wait 3600 s", 1),
        (says(418), "418", 1),
        (says(500), "500: the server has trouble (attempt 3 of 3)", 3),
        (says(302, Location="/models/CDDFuse_IVF.pth"), "redirected in a circle", None),
        (says(302, Location="ftp://127.0.0.1/x"), "no web address", 1),
        (sends(b"\n<!DOCTYPE html><p>log in"), "a web page came", 1),
        (sends(b"<p>log in", Content_Type="text/html; charset=utf-8"), "a web page came", 1),
        (sends(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a Git LFS pointer came", 1),
        (sends(b""), "an empty file came", 1),
        (sends(CONTENT[:-1]), f"wrong content: 49999 bytes with git blob {blob(CONTENT[:-1])}", 1),
        (lambda handler, *_: head(handler, 200, Content_Length=10**9), "1000 MB are offered", 1),
    ],
)
def test_what_will_not_pass_is_said_and_the_rest_is_done(server, checkout, capsys, behaviour, message, attempts):
    code, err, asked = only(server, capsys, behaviour)
    assert code == 2 and message in err and str(checkout / "models/published/CDDFuse_IVF.pth") in err
    assert err.count("warning: ") == 1 and (attempts is None or len(asked) == attempts)
    assert files_in(checkout) == ["CDDFuse_MIF.pth"]  # nothing wrong is left behind


def test_endless_content_ends(server, checkout, capsys, monkeypatch):
    monkeypatch.setattr(download, "LARGEST", 10_000)

    def endless(handler, content, start):
        head(handler, 200)
        handler.wfile.write(content)

    code, err, _ = only(server, capsys, endless)
    assert code == 2 and "more than 0 MB came" in err


def test_a_web_page_does_not_cost_what_has_come(server, checkout, capsys):
    part = checkout / "models/published/CDDFuse_IVF.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:100])
    code, _, _ = only(server, capsys, sends(b"<p>log in", Content_Type="text/html"))
    assert code == 2 and part.read_bytes() == CONTENT[:100]


def test_redirects_are_followed_and_the_next_address_is_tried(server, checkout, capsys):
    server.files["moved/CDDFuse_MIF.pth"] = CONTENT[::-1]
    server.behave["models/CDDFuse_MIF.pth"] = says(302, Location="/moved/CDDFuse_MIF.pth")
    code, out, err = run(f"{server.url}/gone", capsys, "--base-url", server.url)
    assert code == 0 and "2 of 2 files as published" in out and err == ""
    assert [path for path, *_ in server.asked][:2] == ["/gone/models/CDDFuse_IVF.pth", "/models/CDDFuse_IVF.pth"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://no-such-host.invalid"])
def test_without_network_one_line_says_so_at_once(checkout, capsys, url, monkeypatch):
    def unknown(host, *_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    if "invalid" in url:
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, _, err = run(url, capsys, what=("weights", "TNO"))
    assert code == 2 and err.splitlines()[-1].startswith("error: no network, or this host is blocked")
    assert ("cannot be resolved" if "invalid" in url else "no connection to 127.0.0.1") in err
    assert "TNO" not in err  # not 50 times the same


def test_the_proxy_of_the_environment_is_used_and_named(server, checkout, capsys, monkeypatch):
    server.files["http://example.invalid/models/CDDFuse_IVF.pth"] = CONTENT
    server.files["http://example.invalid/models/CDDFuse_MIF.pth"] = CONTENT[::-1]
    monkeypatch.setenv("http_proxy", server.url)
    assert run("http://example.invalid", capsys)[0] == 0
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for path in (checkout / "models/published").iterdir():
        path.unlink()
    code, _, err = run("http://example.invalid", capsys)
    assert code == 2 and "through the proxy 127.0.0.1" in err


def test_a_certificate_that_is_not_accepted_is_said(checkout):
    import ssl
    import urllib.error

    error = ssl.SSLCertVerificationError(1, "self-signed")
    error.verify_message = "self-signed certificate"
    told = download.connection_error(urllib.error.URLError(error), "https://a.invalid/x", PATIENCE(1, 1))
    assert isinstance(told, download.Refused) and "is the clock right?" in str(told)


def test_a_full_disk_keeps_what_has_come(server, checkout, capsys, monkeypatch):
    real_open = open

    def full(path, mode="r", *rest, **options):
        file = real_open(path, mode, *rest, **options)
        if not str(path).endswith(".part") or mode != "wb":
            return file

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, block):
                file.write(block[:100])
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(download, "open", full, raising=False)
    code, _, err = run(server, capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "it goes on where it stopped" in err
    assert files_in(checkout) == ["CDDFuse_IVF.pth.part"]
    monkeypatch.undo()


@pytest.fixture
def published_set(server, checkout, monkeypatch):
    """A set on the server with its manifest."""
    for seed, name in enumerate(["a.png", "b c.png"]):
        write_pair(checkout / "there" / "SMALL", ("vi", "ir"), name, seed, size=(20, 24))
    write_manifest(checkout / "results/manifests/SMALL.json", make_manifest(checkout / "there/SMALL"))
    monkeypatch.setattr(download.read_manifests, "__defaults__", (checkout / "manifests",))
    monkeypatch.setattr(download, "SIZES", {"SMALL": 1000})
    for path in (checkout / "there").rglob("*.png"):
        name = str(path.relative_to(checkout / "there")).replace(" ", "%20")
        server.files[f"test_img/{name}"] = path.read_bytes()
    return checkout / "here" / "SMALL"


def test_a_set_is_completed_and_nothing_of_the_user_is_touched(server, checkout, published_set, capsys):
    import cv2

    (published_set / "vi").mkdir(parents=True)
    (published_set / "vi/a.png").write_bytes(b"mine")
    same = cv2.imread(str(checkout / "there/SMALL/vi/b c.png"))
    cv2.imwrite(str(published_set / "vi/b c.bmp"), same)  # the same image in another format
    options = ("--data", published_set.parent)
    code, out, err = run(server, capsys, *options, what=("SMALL",))
    assert code == 2 and "vi/a.png is not the published file" in err and "3 of 4 files as published, 2 of them" in out
    assert (published_set / "vi/a.png").read_bytes() == b"mine" and files_in(published_set / "vi") == [
        "a.png",
        "b c.bmp",
    ]
    assert files_in(published_set / "ir") == ["a.png", "b c.png"]
    (published_set / "vi/a.png").unlink()
    code, out, err = run(server, capsys, *options, what=("SMALL",))
    assert (code, err) == (0, "") and "4 of 4 files as published, 1 of them fetched now" in out


def test_a_repository_that_is_gone_is_not_asked_for_every_file(server, published_set, capsys):
    server.behave["*"] = says(404)
    code, _, err = run(server, capsys, "--data", published_set.parent, what=("SMALL",))
    assert code == 2 and len(server.asked) == 3 and "3 files in a row" in err.splitlines()[-1]


def test_list_says_all_and_asks_nobody(server, checkout, capsys):
    code, out, _ = run(server, capsys, "--list", what=())
    assert code == 0 and server.asked == []
    for name, digest in download.BLOBS.items():
        assert f"models/{name} -> {checkout / 'models/published' / name}, git blob {digest}" in out
    for name in download.SIZES:
        assert f"{name}: " in out and f"results/manifests/{name}.json" in out
    assert server.url in out and "by hand: https://github.com/" in out and "Linfeng-Tang/MSRS" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name what to fetch: weights, TNO"),
        (["everything"], "nothing is called 'everything'"),
        (["weights", "--base-url", "file:///etc"], "is no address"),
        (["weights", "--timeout", "0"], "--timeout must be more than 0"),
    ],
)
def test_bad_options_are_one_line(capsys, options, message):
    assert download.main(options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_every_listed_set_has_a_manifest_and_its_size(fusion_data):
    for name, size in download.SIZES.items():
        items = download.items_of(name, fusion_data / "test_img")
        assert sum(item.target.stat().st_size for item in items) == size
    item = items[0]
    assert item.matches(item.target) and item.path == f"test_img/{name}/MRI/{item.target.name}"


def test_published_is_a_word_for_weights(server, checkout, capsys, monkeypatch):
    cddfuse, mlfuse = find_system("cddfuse"), find_system("mlfuse")
    with pytest.raises(InputError, match=r"CDDFuse_IVF.pth; run `python -m tools.download weights`"):
        find_weights(cddfuse, "ivf", "published")
    assert test_IVF.main(["--weights", "published", "--out", str(checkout / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no published weights at") and err.count("\n") == 1
    with pytest.raises(InputError, match="published weights of MLFuse"):
        find_weights(mlfuse, "mif", "published")

    for name in download.BLOBS:  # ours stand in for them
        path = checkout / "models/published" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / "models" / name).read_bytes())
    assert [path.name for path in find_weights(cddfuse, "mif", "published")] == ["CDDFuse_IVF.pth", "CDDFuse_MIF.pth"]
    assert find_weights(cddfuse, "ivf", "other.pth")[0].name == "other.pth"
    monkeypatch.setattr("utils.evaluation.benchmark.in_checkout", checkout.joinpath)
    write_pair(checkout / "MINE", ("vi", "ir"), "a.png", 0, size=(43, 51))
    options = ["--weights", "published", str(ROOT / "models/CDDFuse_IVF.pth"), "--data", str(checkout / "MINE")]
    assert test_IVF.main([*options, "--out", str(checkout / "out"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert files_in(checkout / "out/CDDFuse_IVF_published/MINE") == files_in(checkout / "out/CDDFuse_IVF/MINE")

    with pytest.raises(InputError, match="is not the published file"):
        doctor.published_or(Path("published"), "cddfuse")
    monkeypatch.setattr(
        download, "BLOBS", {name: download.git_blob_id(ROOT / "models" / name) for name in download.BLOBS}
    )
    assert len(doctor.published_or(Path("published"), "cddfuse")) == 2
