"""Every script in benchmarks/ imports, and the results page names it."""

import importlib
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module(path.stem).__doc__


def test_the_results_page_names_every_script():
    page = (BENCHMARKS / "README.md").read_text()
    named = re.findall(r"[`/](\w+\.(?:py|sh))[` ]", page)  # alone or in a command
    assert {path.name for path in [*SCRIPTS, BENCHMARKS / "gpu.sh"]} <= set(named)


def test_the_results_page_links_to_files_that_exist():
    page = (BENCHMARKS / "README.md").read_text()
    links = set(re.findall(r"\]\(([^)#:]+)\)", page))
    assert links and [link for link in links if not (BENCHMARKS / link).exists()] == []
