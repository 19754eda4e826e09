"""The classifiers of a table are exported from its folder, with cards."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper.grids import GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

ROWS = {"digits-resnet": ("resnet", "normal"), "digits-resnet-fgsm": ("resnet", "adversarial-fgsm")}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("bundled_classifiers")
    monkeypatch.setitem(module.OF_TABLES, "digits", {name: module.Row(*row) for name, row in ROWS.items()})
    monkeypatch.setitem(GRIDS, "digits", replace(GRIDS["digits"], steps=2))
    return module


def test_classifiers_are_taken_from_the_folder_of_the_table(script, tmp_path, monkeypatch):
    grid = script.table_grid("digits", shorter=["resnet/adversarial-fgsm=1"])
    stages = Stages(grid, datasets.load("digits"), Store(tmp_path / "work"))
    rows = {row.training: row for row in stages.classifiers() if row.network == "resnet"}
    networks = {technique: stages.model(rows[technique]) for technique in ("normal", "adversarial-fgsm")}
    monkeypatch.setattr(classifiers, "train", lambda *_, **__: pytest.fail("trained again"))
    script.main(tmp_path / "work", "digits", shorter=["resnet/adversarial-fgsm=1"], out=tmp_path)
    x, y = datasets.load("digits").x_test.astype(np.float32) / 255, datasets.load("digits").y_test
    for name, (_, technique) in ROWS.items():
        exported, text = classifiers.load(tmp_path / f"{name}.safetensors"), (tmp_path / f"{name}.md").read_text()
        assert torch.allclose(exported(torch.from_numpy(x[:5])), networks[technique](torch.from_numpy(x[:5])), atol=0.1)
        assert f"**{100 * classifiers.accuracy(classifiers.as_art(exported), x, y):.2f} %** of the 400 test" in text
        assert f"{2 if technique == 'normal' else 1} steps" in text and str(tmp_path) not in text
    assert r"23% of every batch attacked by FGSM within \|N(0, 20)\| levels" in text


@pytest.mark.parametrize("resumed", [False, True])
def test_the_card_gives_the_time_of_a_whole_training_only(script, tmp_path, monkeypatch, resumed):
    monkeypatch.setattr(classifiers, "train", lambda *_, **__: None)
    stages = Stages(script.table_grid("digits"), datasets.load("digits"), Store(tmp_path))
    if resumed:
        path = stages.store.path("classifiers", stages.training(Row("resnet", "normal")), ".run")
        path.parent.mkdir(parents=True)
        path.touch()
    script.main(tmp_path, "digits", name=["digits-resnet"], out=tmp_path)
    assert ("CPU seconds" in (tmp_path / "digits-resnet.md").read_text()) is not resumed


def test_one_may_be_selected_by_its_name(script, tmp_path):
    script.main(tmp_path / "work", "digits", name=["digits-resnet"], out=tmp_path)
    assert [path.name for path in tmp_path.glob("*.md")] == ["digits-resnet.md"]
    with pytest.raises(typer.BadParameter, match="digits-resnet-fgsm"):
        script.main(tmp_path / "work", "digits", name=["resnet"], out=tmp_path)
