"""A new attack or defence is one entry and one file, and a stochastic one gives the same table on any processes."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from art_pixeldefend import datasets
from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

EXTENSION = """
import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.estimator import BaseEstimator
from art_pixeldefend.attacks import Attack
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.threat import Threat
from art_pixeldefend.purifiers.base import Purifier


class Brighter(EvasionAttack):
    _estimator_requirements = (BaseEstimator,)

    def generate(self, x, y=None, **kwargs):
        return x + np.random.uniform(0.1, 0.2, x.shape).astype(x.dtype)  # NumPy's global generator, as ART's attacks


class AddNoise(Purifier):
    stochastic = True

    def purify(self, x, generator):
        return (x + 0.3 * generator.normal(x.shape[1:])).clamp(0, 1)


BRIGHTER = Attack(
    lambda classifier, eps, batch_size, seed: Brighter(estimator=classifier), "Brighter", cost=2, note="a remark on it"
)


def grid():
    defences = {
        "noise": (("extension.AddNoise", {}),),
        "arts-noise": (("art.defences.preprocessor.GaussianAugmentation", {"augmentation": False, "sigma": 0.3}),),
        "score": (("art_pixeldefend.purifiers.ScorePurifier", {"model": "{score}", "steps": 2}),),
    }
    rows = [Row("vgg", "normal", defence, threat) for defence in defences for threat in ("blind", "white-box")]
    averaged = Threat("everything", "exact", eot=2, steps=2)
    known = Threat("everything", "exact", steps=2, seeds_known=True)
    rows += [Row("vgg", "normal", "score", threat, attacks=("apgd",)) for threat in (averaged, known)]
    return Grid(
        "digits",
        tuple(rows),
        eps=(40,), attacks=("brighter", "bim"), defences=defences, models={"score": "digits-score"},
        recipe="digits", steps=30, sizes={"vgg": {"width": 2}}, images=32, validation=8, chunk=8,
    )
"""
SCRIPT = """
import sys
import torch
import extension
from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.evaluation.runner import run
torch.set_num_threads(1)
ATTACKS["brighter"] = extension.BRIGHTER
run(extension.grid(), sys.argv[1], verbose=False)
"""


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """The module above, its attack registered."""
    (tmp_path / "extension.py").write_text(EXTENSION)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "extension", raising=False)
    module = importlib.import_module("extension")
    monkeypatch.setitem(ATTACKS, "brighter", module.BRIGHTER)
    return module


def test_a_registered_attack_and_a_purifier_of_ones_own_make_a_table_on_two_processes_as_on_one(extension, tmp_path):
    grid = extension.grid()
    plan = runner.plan(Stages(grid, datasets.load("digits"), Store(tmp_path / "alone")), every_cell=True)
    assert "vgg/normal/noise/blind brighter 40, 32 images, gradients per image: 2" in plan
    table = runner.run(grid, tmp_path / "alone", verbose=False).table
    assert "white-box-gradient-exact-eot-2-steps-2" in table and "seeds_known" in table
    assert "failed" not in table and "| Brighter |" in table and "- Brighter: a remark on it." in table
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "together")],
        env=os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    images = {path.relative_to(tmp_path / "alone"): path for path in (tmp_path / "alone").rglob("*.npy")}
    assert images
    for name, path in images.items():
        assert np.array_equal(np.load(path), np.load(tmp_path / "together" / name)), name
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_the_draws_of_a_defence_differ_between_chunks_seeds_and_attack(extension, tmp_path, monkeypatch):
    grid = replace(extension.grid(), rows=extension.grid().rows[:2], steps=2)
    data, draws = datasets.load("digits"), []
    purify = extension.AddNoise.purify
    monkeypatch.setattr(
        extension.AddNoise, "purify", lambda self, x, g: draws.append((purify(self, x * 0 + 0.5, g)[0], x)) or x
    )
    for seed in (0, 1):
        stages = Stages(replace(grid, seed=seed), data, Store(tmp_path / str(seed)))
        cells = {cell.name: cell for cell in grid.cells()}
        for start in (0, 8):
            stages.right(cells["vgg/normal/noise/white-box bim 40"], start, 8)
    firsts = [noise.flatten().numpy() for noise, _ in draws]
    assert len(firsts) > 40  # BIM's gradients and the defence itself, for two seeds and two chunks
    assert len({first.tobytes() for first in firsts}) == len(firsts)
