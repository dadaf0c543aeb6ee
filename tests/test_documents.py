"""Arrows between rooms; in README and docs, commands that are accepted, snippets that run, links, and equal numbers."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib
import re
import shlex
from pathlib import Path

import pytest

from utils.common import ROOT
from utils.inference import fusing
from zoo import SYSTEMS, find_system

PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    """Every `python SCRIPT.py ...` and `python -m tools.NAME ...` of the pages, without comments."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = [part.strip() for line in text.splitlines() for part in re.sub(r"(^|\s)#\s.*", "", line).split("&&")]
    return sorted({line for line in lines if re.match(r"python (\w+\.py|-m (tools|benchmarks)\.\w+)", line)})


@pytest.mark.parametrize("command", commands())
def test_options_of_each_command_are_accepted(command, monkeypatch):
    class Accepted(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *arguments):
        parse(parser, *arguments)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    words = shlex.split(command)[1:]
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    with pytest.raises(Accepted):
        importlib.import_module(module).main(arguments)


# The Chinese pages have the snippets of the English ones; tests/tools/test_export.py runs that of deployment.md, and
# tests/training/test_extending.py those of extending.md.
OTHERS = (*(page.name for page in PAGES if "zh-CN" in page.name), "deployment.md", "extending.md")
SNIPPETS = {block: page.name for page in PAGES if page.name not in OTHERS for block in blocks(page, "python")}


def test_snippets_of_the_chinese_pages_are_those_of_the_english_ones():
    code = {re.sub(r"#.*", "", block) for block in SNIPPETS}
    for page in PAGES:
        assert "zh-CN" not in page.name or {re.sub(r"#.*", "", block) for block in blocks(page, "python")} <= code, page


@pytest.mark.parametrize("block", SNIPPETS, ids=SNIPPETS.values())
def test_python_in_the_pages_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block.replace("path/to/this/checkout", str(ROOT)), "snippet", "exec"), names)
    if "fused" in names:
        assert names["fused"].isfinite().all()


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if place:
            assert place in map(anchor, re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)), link


def rows_of_ours(page: Path) -> list[tuple[str, dict[str, float]]]:
    """Rows of a page's tables that say "ours" for a set of results/: the set and the values by metric."""
    found, header, of = [], [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if "EN" in cells:
            header = cells
        elif len(cells) == len(header) > 0:
            of = cells[0] or of  # a set is named once, in the first of its rows
            name = re.fullmatch(r"(\w+)( \(\d+\))?", of)
            if name and "ours" in cells[1] and (ROOT / "results" / f"{name[1]}.csv").is_file():
                values = {key: float(cell) for key, cell in zip(header, cells, strict=True) if re.match(r"-?\d", cell)}
                found.append((name[1], values))
        else:
            header = []
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "models" / "MODEL_CARD.md"], ids=lambda page: page.name)
def test_tables_have_the_numbers_of_the_results_files(page):
    for name, values in rows_of_ours(page):
        rows = list(csv.DictReader((ROOT / "results" / f"{name}.csv").open()))
        rows = [row for row in rows if row["protocol"] == "paper" and "(ours" in row["method"]]
        differing = [
            {f"{row['method']} {key}": (value, row[key]) for key, value in values.items()
             if not row[key] or abs(float(row[key]) - value) > 0.00501}
            for row in rows
        ]  # fmt: skip
        assert {} in differing, f"{page.name}, {name}: (page, results) of the nearest row: {min(differing, key=len)}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_parameters_and_operations_are_those_of_the_systems(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in SYSTEMS:
        parameters, operations = find_system(name).cost(480, 640)
        assert f"| `{name}` | {parameters / 1e6:.2f} M | {operations / 1e9:.0f} G |" in text


def test_published_weights_are_those_of_the_clone_and_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "in_checkout", tmp_path.joinpath)
    with pytest.raises(fusing.InputError, match="git clone --depth 1 https://github.com/Zhaozixiang1228/MMIF-CDDFuse "):
        fusing.find_weights(find_system("cddfuse"), "mif", "published")
    (tmp_path / "published/models").mkdir(parents=True)
    for name in ("CDDFuse_IVF.pth", "CDDFuse_MIF.pth"):
        (tmp_path / "published/models" / name).touch()
    found = fusing.find_weights(find_system("cddfuse"), "mif", "published")
    assert found[-1] == tmp_path / "published/models/CDDFuse_MIF.pth"


# From the top down; a file may import from its own room and from those below.
ROOMS = (("zoo",), ("utils.training", "utils.evaluation"), ("utils.inference",), ("utils.data",),
         ("utils.common", "utils.metrics", "utils.tiles", "net"))  # fmt: skip
ALONE = {"net", "utils.metrics", "utils.tiles"}  # others copy them


def room_of(module: str) -> int | None:
    parts = module.split(".")
    found = [level for level, room in enumerate(ROOMS) if parts[0] in room or ".".join(parts[:2]) in room]
    return found[0] if found else None


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_arrows_between_rooms_point_down():
    files = [ROOT / "net.py", *(ROOT / "utils").rglob("*.py"), *(ROOT / "zoo").rglob("*.py")]
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"net"} | {"tools", "benchmarks", "tests"}
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "utils":
            continue
        for imported in imports_of(path):
            assert imported.split(".")[0] not in scripts, f"{module} imports {imported}"
            below = room_of(imported)
            if below is None:
                continue
            assert room_of(module) is not None, f"{module} has no room"
            assert room_of(module) <= below and module not in ALONE, f"{module} imports {imported}"
            assert not re.match(r"net\b", imported) or module.startswith("zoo"), f"{module} imports {imported}"
