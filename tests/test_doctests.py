"""The examples in docstrings run and print what they show; every public class has one."""

import doctest
import importlib
import time
from pathlib import Path

import pytest
import torch

import art_pixeldefend

PACKAGE = Path(art_pixeldefend.__file__).parent
SECONDS = 40  # of processor time; the first example that purifies may compile for 20
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_ONLY_FIRST_FAILURE
WITH_EXAMPLES = [
    ".".join(["art_pixeldefend", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_print_what_they_show(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for examples that write files
    torch.manual_seed(0)
    began = time.process_time()
    found = doctest.testmod(importlib.import_module(module.removesuffix(".__init__")), optionflags=OPTIONS)
    assert found.attempted and not found.failed
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("name", art_pixeldefend.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>> " in getattr(art_pixeldefend, name).__doc__
