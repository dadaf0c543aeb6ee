"""Every command in docs/troubleshooting.md is one that its script accepts, and every file it names is there."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from utils import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted_by_its_script(command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[2:]]
    assert words[0] == "python"
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    module = importlib.import_module(name)
    parsed = []
    monkeypatch.setattr(module, "run_script", lambda body, args: parsed.append(args) or 0)
    assert module.main(arguments) == 0 and len(parsed) == 1  # argparse leaves with SystemExit at an unknown option


def test_named_files_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
    for name in re.findall(r"`((?:utils|tools|models|manifests)/[\w./]*)`", PAGE):
        assert (ROOT / name).exists(), name


def test_every_pain_has_a_section():
    numbers = re.findall(r"^## (\d+)\. ", PAGE, re.M)
    assert numbers == [str(number) for number in range(1, 21)]
