"""Fetches the published weights of CDDFuse and the benchmark folders from their publisher, and checks every byte.

    python -m tools.download --list             # what, how much, from where, to where, how to do it by hand
    python -m tools.download weights            # models/published/CDDFuse_{IVF,MIF}.pth, for --weights published
    python -m tools.download TNO RoadScene      # test_img/TNO and test_img/RoadScene
    python -m tools.download all --base-url https://mirror.example/MMIF-CDDFuse

A download that was cut off goes on where it stopped. A file is put in its place only with the content that is
published: weights by their git blob id, images by the SHA-256 in results/manifests/. A file that is there is never
written over: if it differs, it is named. Proxies are taken from https_proxy, http_proxy and no_proxy. Exit code 0:
everything that was asked for is in place; 2: something is not, and what to do was said.

The addresses follow from the name of the publisher's repository, the blob ids are those of its git tree, as they were
recorded. Neither has been tried yet: there was no network where this was written, and the weights were not at hand.
The tests run against a server of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import http.client
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from utils.common import (
    EXIT_BAD_INPUT,
    InputError,
    benchmark_root,
    check_writable,
    file_sha256,
    in_checkout,
    run_script,
)
from utils.data.manifests import read_manifests, verify

REPOSITORY = "https://github.com/Zhaozixiang1228/MMIF-CDDFuse"
RAW = "https://raw.githubusercontent.com/Zhaozixiang1228/MMIF-CDDFuse"
BASES = (f"{RAW}/fd8da1f", f"{RAW}/HEAD")  # tried in this order; each holds models/ and test_img/
BLOBS = {
    "CDDFuse_IVF.pth": "d2794226bd48961132111bceff89ce3c955b3985",
    "CDDFuse_MIF.pth": "072e39abce5979c0568ee510713c123c28160f12",
}
# Bytes of the copies that results/manifests/ was made of. Those of the weights are not recorded.
SIZES = {"TNO": 12519925, "RoadScene": 1876048, "MRI_CT": 2041541, "MRI_PET": 3298135, "MRI_SPECT": 5131320}
WEIGHTS = "weights"
TERMS = (
    f"What is fetched belongs to its publisher, {REPOSITORY}, and to the owners of the images; their terms go with it "
    "and may exclude commercial use."
)
LARGEST = 64 * 2**20  # bytes; what is larger is none of these files
BLOCK = 2**16
SLOWEST = 100  # bytes a second, over --timeout
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
HOPELESS_IN_A_ROW = 3


@dataclass(frozen=True)
class Item:
    """A published file: where it lies in the repository, where it goes, and what it must be."""

    path: str
    target: Path
    digest: str  # git blob id (40 digits) or SHA-256 (64)

    def matches(self, path: Path) -> bool:
        return (git_blob_id if len(self.digest) == 40 else file_sha256)(path) == self.digest


@dataclass(frozen=True)
class Patience:
    timeout: float  # seconds without a byte
    retries: int  # of one file at one address
    pause: float = 1.0  # seconds before the first retry, doubled before each further one


class Refused(Exception):
    """An address does not give the file; another one may."""


class Interrupted(Exception):
    """An attempt that failed and may be repeated, after `wait` seconds if the server has said so."""

    def __init__(self, text: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(text)
        self.wait, self.unreachable = wait, unreachable


class Unreachable(Refused):
    """The host of an address cannot be reached at all."""


def git_blob_id(path: Path) -> str:
    """The name that git gives to a file's content: SHA-1 of "blob", its size and itself, in hexadecimal."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [WEIGHTS, *SIZES]
    add("what", nargs="*", metavar="WHAT", help=f"{', '.join(names)}, or all")
    add("--list", action="store_true", help="say what would be fetched, and fetch nothing (default: of all)")
    add(
        "--base-url", action="append", metavar="URL", help="a mirror: what holds models/ and test_img/; may be repeated"
    )
    add("--data", type=Path, metavar="DIR", help="folder for benchmark sets (default: as the test scripts look for it)")
    add("--timeout", type=float, default=30, metavar="SECONDS", help="without a byte, then try again (default: 30)")
    add("--retries", type=int, default=4, help="of a file at an address (default: 4)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    known = [WEIGHTS, *SIZES]
    unknown = next((name for name in args.what if name not in [*known, "all"]), None)
    if unknown or not (args.what or args.list):
        wrong = f"nothing is called {unknown!r}; " if unknown else ""
        raise InputError(f"{wrong}name what to fetch: {', '.join(known)}, or all (--list says what each is)")
    bases = [base.rstrip("/") for base in args.base_url or BASES]
    for base in bases:
        if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).netloc:
            raise InputError(f"--base-url {base} is no address; it starts with https:// or http://")
    if not args.timeout > 0 or args.retries < 0:
        raise InputError("--timeout must be more than 0, and --retries at least 0")
    wanted = [name for name in known if name in args.what or "all" in args.what or not args.what]
    root = args.data or benchmark_root()
    if args.list:
        describe(wanted, bases, root)
        return 0
    print(TERMS)
    patience = Patience(args.timeout, args.retries)
    whole = [fetch_group(name, root, bases, patience) for name in wanted]
    return 0 if all(whole) else EXIT_BAD_INPUT


def items_of(name: str, root: Path) -> list[Item]:
    """Every file of the weights or of a set."""
    if name == WEIGHTS:
        folder = in_checkout("models", "published")
        return [Item(f"models/{file}", folder / file, blob) for file, blob in BLOBS.items()]
    return [
        Item(f"test_img/{name}/{modality}/{file}", root / name / modality / file, about["sha256"])
        for modality, files in manifest_of(name)["files"].items()
        for file, about in files.items()
    ]


def manifest_of(name: str) -> dict:
    return next(manifest for manifest in read_manifests() if manifest["set"] == name)


def describe(wanted: Iterable[str], bases: Sequence[str], root: Path) -> None:
    for name in wanted:
        items = items_of(name, root)
        if name == WEIGHTS:
            print(f"{name}: 1 188 272 float32 numbers a file, so about 4.8 MB; for --weights published")
            for item in items:
                print(f"  {item.path} -> {item.target}, git blob {item.digest}")
            continue
        print(
            f"{name}: {len(items)} files, {SIZES[name] / 1e6:.1f} MB; SHA-256 of each in results/manifests/{name}.json"
        )
        for modality in manifest_of(name)["files"]:
            print(f"  test_img/{name}/{modality}/ -> {root / name / modality}{os.sep}")
    print("addresses, tried in this order:", *(f"  {base}/" for base in bases), sep="\n")
    print(
        f"by hand: {REPOSITORY} -> Code -> Download ZIP, put the files where the arrows point; the same command checks"
    )
    print("MSRS, for training, is another repository: Linfeng-Tang/MSRS on GitHub. It is not fetched here")
    print(TERMS)


def fetch_group(name: str, root: Path, bases: Sequence[str], patience: Patience) -> bool:
    """Fetches what is missing of the weights or of a set; returns whether all of it is then in place."""
    items = items_of(name, root)
    if name == WEIGHTS:
        missing = [item for item in items if not item.target.exists()]
        different = [item.target for item in items if item.target.exists() and not item.matches(item.target)]
    else:
        # A set is compared by stem and grey levels: the same images in another file format are not fetched again.
        verdict = verify(root / name, manifest_of(name))
        missing = [item for item in items if item.path.removeprefix(f"test_img/{name}/") in verdict.missing]
        different = [root / name / path for path in verdict.different]
    for path in different:
        print(
            f"warning: {path} is not the published file and was left alone; move it away to fetch that", file=sys.stderr
        )
    failed = in_a_row = 0
    for item in tqdm(missing, desc=name, unit="file", disable=None):
        try:
            fetch_item(item, bases, patience)
            in_a_row = 0
        except Refused as error:
            failed, in_a_row = failed + 1, in_a_row + 1
            tqdm.write(f"warning: {item.path}: {error}; {by_hand(item)}", file=sys.stderr)
            if isinstance(error, Unreachable):
                raise InputError(
                    "no network, or this host is blocked, so no more was tried. With network the same command goes on; "
                    "--base-url names a mirror, https_proxy a proxy"
                ) from error
            if in_a_row == HOPELESS_IN_A_ROW:
                raise InputError(
                    f"{in_a_row} files in a row could not be fetched, so the rest was not tried; the warnings above "
                    "say why, and `python -m tools.download --list` what to do by hand"
                ) from error
    place = items[0].target.parent if name == WEIGHTS else root / name
    right = len(items) - len(different) - failed
    print(f"{place}: {right} of {len(items)} files as published, {len(missing) - failed} of them fetched now")
    return right == len(items)


def by_hand(item: Item) -> str:
    return f"by hand: save {REPOSITORY}/raw/HEAD/{quote(item.path)} as {item.target}, then run this command again"


def fetch_item(item: Item, bases: Sequence[str], patience: Patience) -> None:
    """Puts one file in its place, from the first address that has it.

    Raises:
        Refused: no address gives it; the message has what each said. Unreachable: no host can be reached.
        InputError: nothing can be written.
    """
    check_writable(item.target.parent)
    part = item.target.with_name(item.target.name + ".part")
    said: dict[str, str] = {}
    dead: set[str] = set()
    for base in bases:
        if urlsplit(base).netloc in dead:
            continue
        url = f"{base}/{quote(item.path)}"
        try:
            complete(url, part, item, patience)
            put_in_place(part, item.target)
            return
        except Refused as error:
            said[url] = str(error)
            if isinstance(error, Unreachable):
                dead.add(urlsplit(base).netloc)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "; free some space and run the same command again: it goes on where it stopped" if full else ""
            raise InputError(f"{part} cannot be written: {error.strerror}{advice}") from error
    kind = Unreachable if dead == {urlsplit(base).netloc for base in bases} else Refused
    raise kind("; ".join(f"{url}: {text}" for url, text in said.items()))


def put_in_place(part: Path, target: Path) -> None:
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    try:
        os.link(part, target)  # unlike a move, it never replaces a file that has appeared meanwhile
    except FileExistsError:
        raise Refused(f"{target} has appeared meanwhile and was left alone; what was fetched is {part}") from None
    except OSError:  # a file system without links
        os.replace(part, target)
        return
    part.unlink()


def complete(url: str, part: Path, item: Item, patience: Patience) -> None:
    """Makes `part` the whole file with the right content.

    Raises:
        Refused: the address does not give it.
    """
    for _ in range(2):  # a beginning from another day may not fit the rest: then once more, without it
        resumed = part.exists()
        if not (resumed and item.matches(part)):
            receive_patiently(url, part, patience)
        if item.matches(part):
            return
        wrong = what_is_wrong(part, item)
        part.unlink()
        if not resumed:
            break
    raise Refused(wrong)


def what_is_wrong(path: Path, item: Item) -> str:
    size = path.stat().st_size
    start = path.read_bytes()[:512].lstrip().lower()
    if not start:
        return "an empty file came"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page came instead of the file: a login page of this network, or the file has moved"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer came instead of the file: this address has the text that stands for it, not itself"
    kind, found = ("git blob", git_blob_id(path)) if len(item.digest) == 40 else ("SHA-256", file_sha256(path))
    return f"wrong content: {size} bytes with {kind} {found}, not the recorded {item.digest}; another version"


def receive_patiently(url: str, part: Path, patience: Patience) -> None:
    """Receives the rest of a file, in several attempts if need be. What has come stays for the next one."""
    etag = ""
    attempts = patience.retries + 1
    for attempt in range(attempts):
        try:
            with contextlib.closing(open_rest(url, part, etag, patience)) as response:
                etag = response.headers.get("ETag", "")
                receive(response, part, patience)
            return
        except Interrupted as error:
            if attempt + 1 == attempts:
                kind = Unreachable if error.unreachable else Refused
                raise kind(f"{error} (attempt {attempts} of {attempts}); what has come stays in {part}"
                           if part.exists() else f"{error} (attempt {attempts} of {attempts})") from error  # fmt: skip
            wait = patience.pause * 2**attempt if error.wait is None else error.wait
            tqdm.write(f"note: {url}: {error}; trying again in {min(wait, LONGEST_WAIT):.0f} s", file=sys.stderr)
            time.sleep(min(wait, LONGEST_WAIT))


def open_rest(url: str, part: Path, etag: str, patience: Patience) -> http.client.HTTPResponse:
    """Asks for what `part` lacks. A changed file (another ETag) comes whole."""
    headers = {"User-Agent": "fusion-tools-download", "Accept-Encoding": "identity"}
    have = part.stat().st_size if part.exists() else 0
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag and not etag.startswith("W/"):
            headers["If-Range"] = etag
    try:
        opener = urllib.request.build_opener(WebRedirects)  # with the proxies of the environment
        return opener.open(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:
            part.unlink()
            raise Interrupted("416: there is nothing beyond what has come, so it starts anew", wait=0) from None
        raise status_error(error) from None
    except ValueError as error:
        raise Refused(f"redirects to what is no address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise connection_error(error, url, patience) from None


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the web; urllib follows them to FTP, too."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if urlsplit(url).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(url, code, message, headers, answer)
        return super().redirect_request(request, answer, code, message, headers, url)


def status_error(error: urllib.error.HTTPError) -> Exception:
    """What a status code means to the user."""
    asked = error.headers.get("Retry-After", "") if error.headers else ""
    wait = float(asked) if asked.isdigit() else None
    if error.code in (404, 410):
        return Refused(f"{error.code}: not there; moved, renamed or removed")
    if error.code in (401, 407):
        who = "the proxy" if error.code == 407 else "the server"
        return Refused(f"{error.code}: {who} asks for a login")
    if error.code in (403, 429):
        text = f"{error.code}: refused; too many requests from this network (a rate limit), or it is blocked"
        if error.code == 429 and (wait is None or wait <= LONGEST_WAIT):
            return Interrupted(text, wait)
        return Refused(text + (f"; it asks to wait {wait:.0f} s" if wait else "; wait an hour"))
    if error.code >= 500:
        return Interrupted(f"{error.code}: the server has trouble", wait)
    if 300 <= error.code < 400:
        return Refused(f"{error.code}: redirected in a circle, or to what is no web address")
    return Refused(f"{error.code}: {error.reason}")


def connection_error(error: Exception, url: str, patience: Patience) -> Exception:
    """What a failed connection means to the user."""
    reason = getattr(error, "reason", error)
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme)
    host = urlsplit(url).hostname
    through = f" (through the proxy {urlsplit(proxy).hostname or proxy})" if proxy and not bypassed(host) else ""
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Refused(f"the certificate of {host} is not accepted{through} ({reason.verify_message}); is the clock "
                       "right? A proxy that reads along needs SSL_CERT_FILE")  # fmt: skip
    if isinstance(reason, socket.gaierror):
        return Interrupted(f"the name {host} cannot be resolved{through}: no network?", unreachable=True)
    if isinstance(reason, TimeoutError):
        return Interrupted(
            f"no answer within {patience.timeout:g} s{through}", unreachable=isinstance(error, urllib.error.URLError)
        )
    lost = isinstance(reason, (ConnectionResetError, BrokenPipeError, http.client.HTTPException))
    return Interrupted(f"no connection to {host}{through}: {reason}", unreachable=not lost)


def bypassed(host: str | None) -> bool:
    return bool(urllib.request.proxy_bypass(host or ""))


def receive(response: http.client.HTTPResponse, part: Path, patience: Patience) -> None:
    """Writes an answer to `part`, after what is there if the server goes on there, else from the start.

    Raises:
        Interrupted: the connection ended, stood still or crept. Refused: it cannot be the file.
    """
    have = part.stat().st_size if part.exists() else 0
    continued = response.status == 206
    if continued and response.headers.get("Content-Range", "").split("-")[0] != f"bytes {have}":
        part.unlink(missing_ok=True)
        raise Interrupted("the server goes on at another place than asked, so it starts anew", wait=0)
    if "text/html" in response.headers.get("Content-Type", "").lower():  # before it replaces what has come
        raise Refused("a web page came instead of the file: a login page of this network, or the file has moved")
    have = have if continued else 0
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdigit() else None
    if (total or 0) > LARGEST:
        raise Refused(f"{total / 1e6:.0f} MB are offered, and no file here is that large: something else lies there")
    since, come = time.monotonic(), 0
    bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, leave=False, disable=None)
    with open(part, "ab" if continued else "wb") as file, bar:
        while True:
            try:
                block = response.read1(BLOCK)
            except TimeoutError:
                raise Interrupted(f"nothing came for {patience.timeout:g} s, after {have} bytes") from None
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(f"cut off after {have} bytes ({error!r})") from None
            if not block:
                break
            file.write(block)
            have, come = have + len(block), come + len(block)
            bar.update(len(block))
            if have > LARGEST:
                raise Refused(f"more than {LARGEST / 1e6:.0f} MB came, and no file here is that large")
            if time.monotonic() - since > patience.timeout:
                if come < SLOWEST * patience.timeout:
                    raise Interrupted(f"less than {SLOWEST} bytes a second, after {have} bytes")
                since, come = time.monotonic(), 0
        file.flush()
    if total is not None and have != total:
        raise Interrupted(f"cut off after {have} of {total} bytes")


if __name__ == "__main__":
    raise SystemExit(main())
