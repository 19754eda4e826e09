"""What the README shows works as written."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_python_examples_run_as_written(make_levels):
    torch.manual_seed(0)
    x_uint8 = make_levels(3, (1, 28, 28))
    x = (x_uint8 / 255).astype(np.float32)
    names = {
        "model": nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "loss": nn.CrossEntropyLoss(), "x": x,
        "x_uint8": x_uint8, "x_train": x, "x_validation_attacked": x, "y_validation": np.arange(3),
    }  # fmt: skip
    for code in blocks("python"):
        exec(code, names)
    assert names["predictions"].shape == (3, 10)
    assert 0 < np.abs(names["attacked"] - x).max() <= 8 / 255 + 1e-6
    assert names["report"]["p_values"].shape == (3,)
    assert names["levels"].dtype == np.uint8 and names["levels"].shape == x.shape


def test_the_two_commands_come_first_one_a_line():
    demo, tests = blocks("sh")[0].splitlines()
    assert "art-pixeldefend demo" in demo and tests.endswith("pytest")


@pytest.mark.parametrize("line", [line for block in blocks("sh")[1:] for line in block.splitlines()])
def test_commands_have_the_options_that_are_shown(line):
    from typer.testing import CliRunner

    from art_pixeldefend import cli

    _, command, *arguments = line.split()
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert all(option in shown for option in arguments if option.startswith("--"))
