"""A training run becomes a bundled model in one step, and its card says what is in the file."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from art_pixeldefend import cli, datasets
from art_pixeldefend.models import zoo


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bundled_models")


def train(data, out, *options):
    arguments = ["train", str(data), "--out", str(out), "--steps", "2", "--batch-size", "4", "--quiet", *options]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output


DENSITY = ("--filters", "3", "--resnets", "1", "--fp32")


def test_the_card_of_a_density_model_states_its_score(script, tmp_path, monkeypatch):
    train("digits", tmp_path / "first", *DENSITY, "--dropout", "0.25")
    start = str(tmp_path / "first" / "model.safetensors")
    train("digits", tmp_path / "run", *DENSITY, "--dropout", "0", "--start-from", start, "--flip")
    script.main("digits", run=tmp_path / "run", hardware="an abacus, 2 s", name="small", out=tmp_path)
    path, text = tmp_path / "small.safetensors", (tmp_path / "small.md").read_text()
    model = zoo.load(path)
    score = CliRunner().invoke(cli.app, ["score", "digits", "--model", str(path), "--quiet"])
    assert f"**{score.output.split()[0]} bits/dim** on all 400 test images" in text
    assert "| 1 | 2 | 4 | - |" in text and "| 2 | 2 | 4 | 0.0 |" in text and "an abacus, 2 s" in text
    assert "art-pixeldefend train digits --kind pixelcnnpp --out run --filters 3 --resnets 1 --dropout 0.0" in text
    assert "--flip --start-from FILE`" in text and "the 1,258 images of the train split" in text
    assert str(tmp_path) not in text + str(model.provenance)
    assert path.stat().st_size < (tmp_path / "run" / "model.safetensors").stat().st_size
    x = datasets.load("digits").x_train
    assert datasets.training_images_in(np.concatenate([x, x[:3]]), model) == datasets.SAMPLED
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    assert torch.equal(zoo.load("small").loss(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
                       model.loss(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)))  # fmt: skip


def test_the_card_of_a_score_model_states_its_errors(script, tmp_path):
    train("digits", tmp_path / "run", "--kind", "score", "--set", "channels=[4, 8]", "--set", "blocks=[1, 1]")
    script.main("digits", run=tmp_path / "run", hardware="an abacus", name="digits-score", out=tmp_path)
    text, model = (tmp_path / "digits-score.md").read_text(), zoo.load(tmp_path / "digits-score.safetensors")
    assert " / ".join(f"{model.provenance[f'test_rmse_{s}']:.3f}" for s in ("0.1", "0.25", "0.5")) in text
    assert "train digits --kind score --out run --set 'channels=[4, 8]' --set 'blocks=[1, 1]'" in text


def test_a_run_on_part_of_the_train_split_says_how_many_images_it_saw(script, tmp_path):
    data, part = datasets.load("digits"), tmp_path / "part.npz"
    np.savez(part, x_train=data.x_train[:50], x_test=data.x_test[:5])
    train(part, tmp_path / "run", *DENSITY)
    with pytest.raises(typer.BadParameter, match="--trained-on"):
        script.main("digits", run=tmp_path / "run", hardware="an abacus", out=tmp_path)
    script.main("digits", run=tmp_path / "run", hardware="an abacus", trained_on=part, out=tmp_path)
    text = (tmp_path / "digits.md").read_text()
    assert "45 of the 1,258 images of the train split" in text and "train FILE " in text
    assert "the last 200 test images: " in text  # the calibration split is that of the whole train split
    assert zoo.load(tmp_path / "digits.safetensors").provenance["dataset"] == "digits"


def test_a_card_tells_the_images_of_the_last_run_from_those_of_all(script, tmp_path):
    data, part = datasets.load("digits"), tmp_path / "part.npz"
    np.savez(part, x_train=data.x_train[:50], x_test=data.x_test[:5])
    train("digits", tmp_path / "first", *DENSITY)
    train(part, tmp_path / "run", *DENSITY, "--start-from", str(tmp_path / "first" / "model.safetensors"))
    script.main("digits", run=tmp_path / "run", hardware="an abacus", trained_on=part, out=tmp_path)
    text = (tmp_path / "digits.md").read_text()
    assert "the 1,258 images of the train split" in text and "in the last run on 45 of them" in text


def test_a_run_that_has_not_finished_is_bundled_from_its_checkpoint(script, tmp_path):
    train("digits", tmp_path / "run", *DENSITY, "--every", "1")
    (tmp_path / "run" / "model.safetensors").unlink()
    script.main("digits", run=tmp_path / "run", hardware="an abacus", out=tmp_path)
    assert "| 1 | 2 | 4 |" in (tmp_path / "digits.md").read_text()


def test_a_run_on_test_images_is_not_bundled(script, tmp_path):
    data, wrong = datasets.load("digits"), tmp_path / "wrong.npz"
    np.savez(wrong, x_train=data.x_test[:50])
    train(wrong, tmp_path / "run", *DENSITY)
    with pytest.raises(typer.BadParameter, match="train split"):
        script.main("digits", run=tmp_path / "run", hardware="an abacus", trained_on=wrong, out=tmp_path)
    assert not (tmp_path / "digits.safetensors").exists()
