"""Every command in README and docs does what it says there, in a copy of the checkout with tiny stand-ins for data.

`COMMANDS` in documented_commands.py says how each of them is run. A command without a line there fails, and so does a
line without a command. A command that cannot be run has at least options that its script accepts.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dataprocessing
import train
from tests.conftest import write_pair
from tests.documented_commands import COMMANDS, CUT, PATCHES
from tools import doctor, download
from utils.common import ROOT
from utils.data.images import read_grey, write_image
from utils.data.manifests import make_manifest, read_manifests, write_manifest
from utils.data.video import VideoFile
from zoo import find_system

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, *sorted((ROOT / "docs").glob("*.md")), ROOT / "models" / "MODEL_CARD.md"]
SIZE = (44, 48)  # pixels; VIF needs 41


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments; `a && b` is two."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    bare = (" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines)
    return [command for line in bare for command in line.split(" && ") if command]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What stands in for the checkout, and for all that the commands name."""
    folder = tmp_path_factory.mktemp("world")
    medical = {f"MRI_{other}": ("MRI", other) for other in ("CT", "PET", "SPECT")}
    infrared = ("test_img/TNO", "test_img/RoadScene", "my_pairs", "other_pairs", "folder/A", "folder/B", "data",
                "detection", "frames", "MSRS_train", "train/MSRS", "train/RoadScene")  # fmt: skip
    for place in infrared:
        for name in ("1.png", "2.png"):
            write_pair(folder / place, ("vi", "ir"), name, len(place) + int(name[0]), size=SIZE)
    for place, modalities in medical.items():
        for name in ("1.png", "2.png"):
            write_pair(folder / "test_img" / place, modalities, name, 7, size=SIZE)
        for copy in (folder / place, folder / "train" / place):
            shutil.copytree(folder / "test_img" / place, copy)
    for place in sorted((ROOT / "test_img").glob("Sample_*")):
        for path in place.rglob("*.png"):
            small = cv2.resize(cv2.imread(str(path)), SIZE[::-1], interpolation=cv2.INTER_AREA)
            write_image(folder / path.relative_to(ROOT), small[..., ::-1].astype(np.float32))
    shutil.copytree(folder / "MRI_CT", folder / "my_scans")
    for flat, stem in (("flat_scans", "mri"), ("ct_mri_set", "mrict")):
        (folder / flat).mkdir()
        for modality, name in (("MRI", stem), ("CT", "ct")):
            shutil.copy(folder / "MRI_CT" / modality / "1.png", folder / flat / f"{name}1.png")
    for copy, of in {
        "A": "test_img/TNO/vi", "B": "test_img/TNO/ir", "path/to/MyMethod": "test_img/TNO/vi", "data/fused": "data/vi",
        "my_images/visible": "my_pairs/vi", "my_images/thermal": "my_pairs/ir", "path/to/test_img": "test_img",
    }.items():  # fmt: skip
        shutil.copytree(folder / of, folder / copy)
    (folder / "detection/labels").mkdir()
    for name in "12":
        (folder / f"detection/labels/{name}.txt").write_text("0 0.5 0.5 0.1 0.1\n")

    vis, ir = (folder / "my_pairs" / modality / "1.png" for modality in ("vi", "ir"))
    for name, path in {"vi": vis, "ir": ir, "mri": folder / "my_scans/MRI/1.png", "pet": vis}.items():
        shutil.copy(path, folder / f"{name}.png")
    write_image(folder / "small_ir.png", cv2.resize(read_grey(ir), (24, 22)))
    matrix = next(block for block in blocks(ROOT / "docs/own_data.md", "text") if len(block.splitlines()) == 3)
    (folder / "H.txt").write_text(matrix)
    for name, path in {"vi16": vis, "ir16": ir}.items():
        write_image(folder / f"{name}.png", read_grey(path), bits=16)
    for name in ("vi", "ir"):
        with VideoFile(folder / f"{name}.mp4", 25) as video:
            for _ in range(2):
                video.write(read_grey(vis if name == "vi" else ir))

    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("published"))
    shutil.copy(folder / "models/CDDFuse_IVF.pth", folder / "path/to/published.pth")
    shutil.copy(ROOT / "requirements.txt", folder)
    torch.manual_seed(0)
    for name in ("fsidfusion", "mlfuse", "tsdm"):
        system = find_system(name)()
        system.save(folder / f"stand-ins/{name}.pth", {"task": "ivf"})
    system.loaded = "teacher"
    system.save(folder / "stand-ins/tsdm_teacher.pth")
    for out, *options in ((PATCHES,), ("stand-ins/saliency.h5", "--saliency"), ("stand-ins/colour.h5", "--colour")):
        base = ["--data", str(folder / "MSRS_train"), "--out", str(folder / out), *CUT.split()]
        assert dataprocessing.main([*base, *options]) == 0
    for name in download.SIZES:
        write_manifest(folder / "manifests" / f"{name}.json", make_manifest(folder / "test_img" / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "in_checkout", folder.joinpath)
        doctor.record()  # the bundled pair is small here and so has another answer
    return folder


@pytest.fixture
def checkout(world, tmp_path, monkeypatch):
    """A copy of the world, which the scripts take for the checkout that they are run from."""
    folder = tmp_path / "checkout"
    shutil.copytree(world, folder, copy_function=os.link)  # every file is written whole, so none changes in place
    monkeypatch.chdir(folder)
    monkeypatch.setattr("utils.common.ROOT", folder)
    monkeypatch.delenv("FUSION_DATA", raising=False)
    monkeypatch.setattr(read_manifests, "__defaults__", (folder / "manifests",))
    for check in ("check_gpu", "check_memory", "check_disk", "check_packages"):  # of this machine
        monkeypatch.setattr(doctor, check, lambda: iter(()))
    # Downloads come from the world: no network.
    monkeypatch.setattr(
        download, "BLOBS", {name: download.git_blob_id(Path("models", name)) for name in download.BLOBS}
    )
    published = re.compile(r"https://.*?/((?:models|test_img)/.*)")
    monkeypatch.setattr(
        download, "receive_patiently", lambda url, part, patience: shutil.copy(world / published.match(url)[1], part)
    )
    return folder


def script_of(command: str) -> tuple[str, list[str]]:
    """Module and arguments of a command, without variables, torchrun and what is around it in a loop."""
    words = shlex.split(re.sub(r"^until (.*?); do .*", r"\1", command))
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    assert words[0] == "python", command
    return (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])


def check_options(command: str, monkeypatch) -> None:
    """Runs a script up to where its options have been read."""

    class Accepted(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *arguments):
        parse(parser, *arguments)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    module, arguments = script_of(command)
    with pytest.raises(Accepted):
        importlib.import_module(module).main(arguments)


def test_each_command_of_the_pages_has_a_line_here_and_each_line_a_command():
    written = {command for page in PAGES for command in commands(page)}
    assert written - COMMANDS.keys() == set(), "in the pages, but not in COMMANDS"
    assert COMMANDS.keys() - written == set(), "in COMMANDS, but in no page"


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if not how.not_run], ids=str)
def test_command_does_what_it_says(command, checkout, capsys):
    how = COMMANDS[command]
    for path, stand_in in how.there:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stand_in, path)
    for path in how.makes:
        Path(path).unlink(missing_ok=True)
    module, arguments = script_of(command)
    main = importlib.import_module(module).main
    if how.before:
        assert main([*arguments, *how.before.split()]) == train.EXIT_UNFINISHED
    code = main([*arguments, *how.extra.split()])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "error" not in printed.err and how.says in printed.out, printed.out
    assert [path for path in how.makes if not Path(path).exists()] == []


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if how.not_run])
def test_command_that_is_not_run_has_options_that_are_accepted(command, monkeypatch):
    if command.startswith("pip install -r "):
        assert (ROOT / command.split()[-1]).is_file()
    elif command != "python -m pytest":
        check_options(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_are_accepted(page):
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]*(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    printed = re.findall(r"^\$ (.*)", text, re.M)  # above an output
    for command in {" ".join(span.split()) for span in (*spans, *printed)}:
        if re.match(r"([A-Z_]+=\S+ )*(python|test_\w+\.py|train\.py|dataprocessing\.py) ", command) and not re.search(
            "pytest|--help", command
        ):
            with pytest.MonkeyPatch.context() as patch:
                check_options(re.sub(r"^(\w+\.py)", r"python \1", command), patch)


def test_the_loop_goes_on_while_the_exit_code_is_75(tmp_path):
    loop = next(command for command in COMMANDS if command.startswith("until "))
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$@" >> asked\nread code rest < codes\necho $rest > codes\nexit $code\n')
    stand_in.chmod(0o755)
    for codes, runs in (("75 75 0", 3), ("75 2 0", 2), ("0", 1)):
        (tmp_path / "codes").write_text(codes + "\n")
        (tmp_path / "asked").unlink(missing_ok=True)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-c", loop], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=20)
        assert len((tmp_path / "asked").read_text().splitlines()) == runs


def python_blocks() -> dict[str, str]:
    """Each different block of Python in the pages; comments do not make a difference."""
    return {ast.unparse(ast.parse(block)): block for page in PAGES for block in blocks(page, "python")}


@pytest.mark.parametrize("block", python_blocks().values())
def test_python_in_the_pages_runs(block, checkout, capsys):
    names = {}
    exec(compile(block.replace("path/to/this/checkout", str(ROOT)), "block", "exec"), names)
    assert ("fused" in names) != ("score" in names)
    if "fused" in names:
        assert names["fused"].shape == (1, 1, 97, 131) and 0 <= names["fused"].min() <= names["fused"].max() <= 1
    else:
        assert "'VIF'" in capsys.readouterr().out


def test_both_readmes_have_the_same_commands_code_sections_and_links():
    assert commands(ENGLISH) == commands(CHINESE)
    code = [[ast.unparse(ast.parse(block)) for block in blocks(page, "python")] for page in (ENGLISH, CHINESE)]
    assert code[0] == code[1]
    english, chinese = (page.read_text(encoding="utf-8") for page in (ENGLISH, CHINESE))
    assert re.findall("^#+ ", english, re.M) == re.findall("^#+ ", chinese, re.M)
    assert "(README.zh-CN.md)" in english and "(README.md)" in chinese
    links = [set(re.findall(r"\]\(((?:docs|models)/[^)]*)\)", text)) for text in (english, chinese)]
    assert links[0] == links[1]
    assert "| EN | SD |" not in chinese  # numbers live in one place
    # A table of files has every script in both languages.
    names = [set(re.findall(r"^[\w.]+\.py", text, re.M)) for text in (english, chinese)]
    assert names[0] == names[1]


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert place in map(anchor, headings), link
