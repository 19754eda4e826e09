"""What the README shows works as written."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn

from art_pixeldefend import cli

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


COMMANDS = [line for block in blocks("sh")[1:] for line in block.splitlines()]


def parsed(line):
    """Whether a command line is understood: all its options, their values, and nothing missing."""
    program, name, *arguments = shlex.split(line)
    command = typer.main.get_command(cli.app).commands[name]
    return program == "art-pixeldefend" and command.make_context(name, arguments)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood_as_they_are_shown(line):
    assert parsed(line)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--model " in line])
@pytest.mark.parametrize("wrong", ["--mod ", "--models ", ""])
def test_commands_with_another_option_would_not_be_understood(line, wrong):
    with pytest.raises(Exception) as refused:
        parsed(line.replace("--model ", wrong))
    assert refused.value.exit_code == 2
