import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from art_pixeldefend import datasets
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper import ascent
from art_pixeldefend.evaluation.paper.ascent import ascend, ascend_together, bits_and_gradient
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store


@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 4, 4)])
def test_on_levels_the_objective_is_bits_per_dim(make_model, make_levels, image_shape):
    model, levels = make_model(image_shape), make_levels(2, image_shape)
    for x in levels:
        bits, gradient = bits_and_gradient(model, x.astype(float))
        assert bits == pytest.approx(model.bits_per_dim(x[None]).item(), rel=1e-5)
        assert gradient.shape == image_shape and np.isfinite(gradient).all()


@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 4, 4)])
def test_the_gradient_is_the_objectives(make_model, image_shape):
    model, rng = make_model(image_shape).double(), np.random.default_rng(0)
    x, direction = rng.uniform(20, 235, image_shape), rng.normal(size=image_shape)
    h = 1e-4
    higher, lower = (bits_and_gradient(model, x + sign * h * direction)[0] for sign in (1, -1))
    slope = (higher - lower) / (2 * h)
    assert (bits_and_gradient(model, x)[1] * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("eps", [0, 20, 255])
def test_ascent_stays_on_levels_of_the_ball(make_model, make_levels, eps):
    model, (x,) = make_model((1, 5, 7)), make_levels(1, (1, 5, 7))
    found, asked, ended = ascend(model, x, eps, seed=1, iterations=5)
    assert found.dtype == np.uint8 and found.shape == x.shape and asked > 0 and ended
    assert np.abs(found.astype(int) - x).max() <= eps


def test_ascent_ends_likelier_than_it_started(make_model, make_levels):
    model, (x,) = make_model((1, 5, 7)), make_levels(1, (1, 5, 7))
    start, end = (ascend(model, x, 60, seed=1, iterations=n)[0] for n in (0, 30))
    assert model.bits_per_dim(np.stack([end, start])).diff() > 0


@pytest.mark.parametrize("image_shape", [(1, 5, 7), (3, 4, 4)])
@pytest.mark.parametrize("eps", [0, 20, 255])
def test_images_ascend_together_within_the_ball(make_model, make_levels, image_shape, eps):
    model, levels = make_model(image_shape), make_levels(5, image_shape)
    found = ascend_together(model, levels, eps, steps=40, batch_size=3)
    assert found.dtype == np.uint8 and found.shape == levels.shape
    assert np.abs(found.astype(int) - levels).max() <= eps
    assert (model.bits_per_dim(found).mean() < model.bits_per_dim(levels).mean()) == (eps > 0)
    alone = np.concatenate([ascend_together(model, x[None], eps, steps=40) for x in levels])
    assert np.abs(found.astype(int) - alone).max() <= 1  # the batch changes the order of sums


def test_the_models_own_gradients_are_left_alone(make_model):
    model = make_model((1, 5, 7))
    bits_and_gradient(model, np.full((1, 5, 7), 99.0))
    ascend_together(model, np.full((1, 1, 5, 7), 99, np.uint8), 9, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def figure_5(tmp_path_factory, tiny):
    row = Row("vgg", "normal", "pixeldefend")
    grid = replace(tiny, rows=(row,), images=8, attacks=("fgsm",))
    folder = tmp_path_factory.mktemp("figure")
    stages, path = Stages(grid, datasets.load("digits"), Store(folder / "store")), folder / "figure5"
    return stages, path, ascent.figure_5(stages, path, images=2, starts=3, iterations=4)


def test_figure_5_has_every_end_point(figure_5):
    _, path, numbers = figure_5
    assert np.shape(numbers["bits_per_dim"]["L-BFGS-B"]) == (2, 3) and sum(numbers["ended"].values()) == 6
    assert all(len(numbers["bits_per_dim"][name]) == 2 for name in ("clean", "FGSM", "greedy decoding"))
    assert numbers["mean_bits_per_dim"]["greedy decoding"] < numbers["mean_bits_per_dim"]["FGSM"]
    assert json.loads(path.with_suffix(".json").read_text()) == numbers
    assert path.with_suffix(".png").is_file() and path.with_suffix(".pdf").is_file()


def test_figure_5_keeps_what_it_found(figure_5, monkeypatch, tmp_path):
    stages, _, numbers = figure_5
    monkeypatch.setattr(ascent, "ascend", lambda *args, **kwargs: 1 / 0)
    assert ascent.figure_5(stages, tmp_path / "again", images=2, starts=3, iterations=4) == numbers


def test_figure_5_refuses_more_images_than_a_chunk(figure_5, tmp_path):
    with pytest.raises(ValueError, match="images"):
        ascent.figure_5(figure_5[0], tmp_path / "figure", images=9)
