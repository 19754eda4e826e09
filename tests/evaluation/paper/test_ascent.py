import numpy as np
import pytest
import torch

from art_pixeldefend.evaluation.paper.ascent import ascend, bits_and_gradient


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
    found, asked = ascend(model, x, eps, seed=1, iterations=5)
    assert found.dtype == np.uint8 and found.shape == x.shape and asked > 0
    assert np.abs(found.astype(int) - x).max() <= eps


def test_ascent_ends_likelier_than_it_started(make_model, make_levels):
    model, (x,) = make_model((1, 5, 7)), make_levels(1, (1, 5, 7))
    start, end = (ascend(model, x, 60, seed=1, iterations=n)[0] for n in (0, 30))
    assert model.bits_per_dim(np.stack([end, start])).diff() > 0


def test_the_models_own_gradients_are_left_alone(make_model):
    model = make_model((1, 5, 7))
    bits_and_gradient(model, np.full((1, 5, 7), 99.0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
