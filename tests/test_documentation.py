"""What the README and the documentation site show works as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from art_pixeldefend import cli
from art_pixeldefend.classifiers.training import seeded
from art_pixeldefend.models import zoo

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in ("_build", "_generated"))
SHELL = re.compile("python3 -m venv|pip install|pytest")  # what else a block of shell code may hold


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_python_examples_print_what_they_show(capsys):
    names, code = {}, "\n".join(blocks("python"))
    exec(code, names)
    numbers = [
        [float(number) for number in re.findall(r"\d+\.\d+", line)] for line in capsys.readouterr().out.splitlines()
    ]
    shown = [[float(n) for n in re.findall(r"\d+\.\d+", line)] for line in re.findall(r"^# (.*)$", code, re.MULTILINE)]
    (_, without), (clean, purified), _ = shown
    assert without < 0.1 and purified > 0.8 and clean > 0.85
    for printed, expected in zip(filter(None, numbers), shown, strict=True):
        assert printed == pytest.approx(
            expected, abs=0.05 if max(expected) <= 1 else 5
        )  # other processors round otherwise
    x, white_box = names["x"], names["white_box"]
    assert 0 < np.abs(white_box - x[: len(white_box)]).max() <= 8 / 255 + 1e-6
    assert names["logits"].shape == (20, 10)
    assert names["adaptive"].threshold > 0
    assert names["is_adversarial"].mean() > 0.7 and names["report"]["p_values"].shape == (len(x),)


def test_the_first_python_example_runs_on_cifar_10(cifar_10, capsys):
    """With the changes that README tells, on fewer images."""
    code, text = blocks("python")[0].replace(":300]", ":40]"), README.read_text()
    for before, after in (
        ('"fashion-mnist-500"', '"cifar-10"'),
        ('eps=32, pixel_cnn="fashion-mnist"', 'eps=16, pixel_cnn="cifar-10"'),
        ('"fashion-mnist-resnet"', '"cifar-10-resnet"'),
    ):
        assert f"`{after}`" in text and code.count(before) == 1
        code = code.replace(before, after)
    exec(code, {})
    clean, attacked, purified, defended = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out))
    assert clean > 0.75 and attacked < 0.1 and purified > 0.6 and defended > attacked + 0.1


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_block_of_code_is_tested(page):
    text = page.read_text()
    assert set(re.findall(r"^```([^{\n]+)$", text, re.MULTILINE)) <= {"sh", "python"}
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"^    \S", outside, re.MULTILINE)  # nothing is code by its indentation


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)], ids=lambda page: page.stem)
def test_python_blocks_of_the_site_run(page, tmp_path, monkeypatch):
    """One after the other, with the names of those before."""
    code = "\n".join(blocks("python", page))
    for package in re.findall(r"^(?:import|from) (pyautoattack|foolbox|torchattacks)\b", code, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with seeded(0):
        exec(code, {})


def test_no_file_tells_to_install_the_package_from_an_index():
    folders = ("art_pixeldefend", "benchmarks", "docs", "examples")
    files = [*README.parent.glob("*.md"), *(path for name in folders for path in (README.parent / name).rglob("*"))]
    files = [
        path for path in files if not {"_generated", "_build"} & set(path.parts)
    ]  # copies, perhaps of earlier texts
    texts = {path: path.read_text() for path in files if path.suffix in (".md", ".py", ".ipynb", ".rst")}
    assert not [
        path for path, text in texts.items() if re.search(r"pip install[^`\n]*\bart-pixeldefend\b(?! demo)", text)
    ]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_to_files_and_headings(page):
    path = README.parent / page
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        target, _, heading = link.partition("#")
        linked = path.parent / target if target else path
        assert linked.exists(), link
        if heading:
            assert heading in [slug(line) for line in linked.read_text().splitlines() if line.startswith("#")], link


def slug(heading):
    """A heading's name in a link, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lstrip("# ")).lower().replace(" ", "-")


def test_models_are_those_bundled_with_the_errors_of_their_cards():
    rows = re.findall(
        r"^\| \[`([^`]+)`\]\(([^)]+)\) .*\| (\d\S*(?: bits/dim| RMSE| / \S+ / \S+))", README.read_text(), re.MULTILINE
    )
    assert sorted(name for name, _, _ in rows) == sorted(zoo.names())
    for _, card, error in rows:
        assert f"**{error}**" in (README.parent / card).read_text()


def test_the_two_commands_come_first_one_a_line():
    demo, tests = blocks("sh")[0].splitlines()
    assert "art-pixeldefend demo" in demo and tests.endswith("pytest")


COMMANDS = [
    line
    for page in [README, *PAGES]
    for block in blocks("sh", page)
    for line in block.splitlines()
    if not SHELL.match(line)
]


def parsed(line):
    """Whether a command line is understood: all its options, their values, and nothing missing."""
    program, *words = shlex.split(line)
    if program == "torchrun":
        program, *words = words[words.index("-m") + 1 :]
    name, *arguments = words
    command = typer.main.get_command(cli.app).commands[name]
    return program in ("art-pixeldefend", "art_pixeldefend") and command.make_context(name, arguments)


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_are_understood_as_they_are_shown(line):
    assert parsed(line)


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if "--model " in line})[:3])
@pytest.mark.parametrize("wrong", ["--mod ", "--models ", ""])
def test_commands_with_another_option_would_not_be_understood(line, wrong):
    with pytest.raises(Exception) as refused:
        parsed(line.replace("--model ", wrong))
    assert refused.value.exit_code == 2


def test_the_site_builds_without_a_broken_link(tmp_path):
    """Every reference leads somewhere, and every name in a docstring's reference exists."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    page = (tmp_path / "site" / "defences" / "score-purifier.html").read_text()
    assert "ScorePurifier</span>" in page and "<table" in page  # the measured numbers
