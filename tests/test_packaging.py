"""The distributions hold what they must, and starting the command line imports little."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from art_pixeldefend import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("art_pixeldefend", "benchmarks", "docs", "examples", "tests", ".ci")
FILES = ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "constraints.txt", "pyproject.toml")
WEIGHTS = "art_pixeldefend/models/weights/digits-score.safetensors"
HEAVY = ("torch", "art", "numpy", "scipy", "sklearn", "matplotlib", "numba", "PIL", "pooch")


def ignored(folder, names):
    """Caches, generated pages, and bundled weights, which would make builds slow."""
    generated = ("__pycache__", "_generated", "_build")
    return [name for name in names if name in generated or name.endswith(".safetensors")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository's files, with a small model, and with old files: a build folder and a cache."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / WEIGHTS, copy / WEIGHTS)
    for name in (*FILES, ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    for old in ("build/lib/art_pixeldefend/deleted.py", "art_pixeldefend/__pycache__/deleted.cpython-311.pyc"):
        (copy / old).parent.mkdir(parents=True, exist_ok=True)
        (copy / old).write_text("")
    return copy


def build(checkout, out):
    """Build both distributions of a checkout: the paths of the wheel and the source distribution."""
    pytest.importorskip("hatchling"), pytest.importorskip("hatch_fancy_pypi_readme")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory):
    return build(checkout, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def metadata(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        return message_from_bytes(wheel.read(f"art_pixeldefend-{__version__}.dist-info/METADATA"))


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_and_nothing_else(distributions, checkout):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {name for name in files_in(checkout) if name.startswith("art_pixeldefend/") and "__pycache__" not in name}
    assert names == package
    assert names > {WEIGHTS, "art_pixeldefend/py.typed", "art_pixeldefend/models/weights/digits.md"}


def test_the_source_distribution_holds_all_that_tests_read(distributions, checkout):
    with tarfile.open(distributions[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert names >= {name for name in files_in(checkout) if "__pycache__" not in name and not name.startswith("build/")}
    assert not [name for name in names if "__pycache__" in name or name.startswith("build/")]


def test_two_builds_are_identical(distributions, checkout, tmp_path):
    for path in checkout.rglob("*"):
        os.utime(path, (2e9, 2e9))
    for first, second in zip(distributions, build(checkout, tmp_path), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_package_index_shows_no_link_that_leads_nowhere(metadata):
    shown = metadata.get_payload()
    assert shown.startswith("# art-pixeldefend\n")
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", shown)
    assert (ROOT / "README.md").read_text().count("```") == shown.count("```")


def test_the_metadata_names_only_what_exists(metadata):
    assert metadata["Version"] == __version__
    pythons = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") if re.search(r":: 3\.\d+$", c)]
    assert pythons == ["3.11", "3.12", "3.13"] and metadata["Requires-Python"] == "<3.14,>=3.11"


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_every_direct_dependency(metadata):
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist")}
    assert required - {"art-pixeldefend"} <= pinned  # an extra contains another


@pytest.mark.parametrize(
    "code",
    [
        "import art_pixeldefend",
        "from art_pixeldefend import cli",
        "import sys; sys.argv[1:] = ['--help']; from art_pixeldefend import cli; cli.app(standalone_mode=False)",
    ],
    ids=["package", "command line", "help"],
)
def test_starting_imports_no_large_library(code):
    listing = "import atexit, sys; atexit.register(lambda: print('loaded', *sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{listing}\n{code}"], capture_output=True, text=True, check=True)
    loaded = done.stdout.rpartition("loaded ")[2].split()
    assert "art_pixeldefend" in loaded and not set(HEAVY) & set(loaded)
