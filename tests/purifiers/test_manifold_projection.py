import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from art_pixeldefend import ManifoldProjection
from art_pixeldefend.models.generator import VAE, Generator
from art_pixeldefend.purifiers.base import BatchGenerator

SHAPE = (1, 4, 4)
SEARCHES = {
    "adam": {"optimizer": "adam", "learning_rate": 0.1},
    "momentum": {"optimizer": "momentum", "learning_rate": 0.05},
}


class Linear(Generator):
    """G(z) = A z + 0.5, without an encoder; its range is a plane."""

    def __init__(self, latent_size=3, seed=0):
        super().__init__()
        self.image_shape, self.latent_size = SHAPE, latent_size
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(0.3 * torch.randn(16, latent_size, generator=generator))

    def forward(self, z):
        return (z @ self.a.T + 0.5).unflatten(1, SHAPE)

    def closest(self, x):
        """The orthogonal projection, by least squares."""
        a = self.a.detach()
        return (a @ torch.linalg.lstsq(a, x.flatten(1).T - 0.5).solution + 0.5).T.unflatten(1, SHAPE)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = VAE(SHAPE, latent_size=3, hidden=(8,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def images(count=6, seed=0):
    """Images near 0.5, so that nothing is clipped."""
    return 0.4 + 0.2 * np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


# What is computed


@pytest.mark.parametrize("search", SEARCHES)
def test_the_projection_on_a_linear_generator_is_least_squares(search):
    model, x = Linear().double(), images().astype(np.float64)
    projected = ManifoldProjection(model, steps=600, seed=0, **SEARCHES[search])(x)[0]
    np.testing.assert_allclose(projected, model.closest(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_reconstruction_errors_are_the_distances_to_the_range():
    model, x = Linear(), images()
    expected = (model.closest(torch.from_numpy(x)) - torch.from_numpy(x)).square().mean((1, 2, 3)).sqrt()
    for clip_values, scaled in (((0.0, 1.0), x), ((0, 255), 255 * x), ((0.0, 1.0), x.transpose(0, 2, 3, 1))):
        purifier = ManifoldProjection(model, 400, learning_rate=0.05, clip_values=clip_values, seed=0, batch_size=4)
        np.testing.assert_allclose(purifier.reconstruction_errors(scaled), expected, rtol=1e-3)


def test_images_of_the_generator_stay_as_they_are(vae):
    with torch.no_grad():
        x = vae(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    projected = ManifoldProjection(vae, 300, restarts=4, seed=0)(x)[0]
    torch.testing.assert_close(projected, x, atol=1e-3, rtol=0)


def test_more_restarts_are_never_worse(vae):
    """The first restarts are the same ones: the streams of an image are read in order."""
    x = images(8)
    one, many = (
        ManifoldProjection(vae, 30, restarts, encode=False, seed=3).reconstruction_errors(x) for restarts in (1, 6)
    )
    assert (many <= one + 1e-6).all() and (many < one - 1e-4).any()


def test_an_encoder_s_start_needs_no_random_numbers(vae):
    purifier, x = ManifoldProjection(vae, 5), images()
    assert not purifier.stochastic and np.array_equal(purifier(x)[0], purifier(x)[0])
    started = torch.from_numpy(ManifoldProjection(vae, 1, learning_rate=0.0)(x)[0])
    torch.testing.assert_close(started, vae(vae.encode(torch.from_numpy(x))).detach())
    for stochastic in (ManifoldProjection(vae, 5, restarts=2), ManifoldProjection(vae, 5, encode=False)):
        assert stochastic.stochastic and not np.allclose(stochastic(x)[0], stochastic(x)[0], atol=1e-4)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_result_depends_on_seed_and_position_alone(vae, search):
    model, x = copy.deepcopy(vae).double(), images(7).astype(np.float64)
    arguments = {"steps": 20, "restarts": 3, **SEARCHES[search]}
    first = ManifoldProjection(model, seed=5, **arguments)(x)[0]
    for batch_size in (1, 3):
        again = ManifoldProjection(model, seed=5, batch_size=batch_size, **arguments)(x)[0]
        np.testing.assert_allclose(again, first, atol=1e-9)
    assert not np.allclose(ManifoldProjection(model, seed=6, **arguments)(x)[0], first, atol=1e-4)


def test_other_modes_of_autograd_do_not_change_the_result(vae):
    purifier, x = ManifoldProjection(vae, 10, seed=0), torch.from_numpy(images())
    expected = purifier(x)[0]
    with torch.no_grad():
        assert torch.equal(purifier(x)[0], expected)
    with torch.inference_mode():
        assert torch.equal(purifier(x.clone())[0], expected)
    assert torch.equal(purifier(x.clone().requires_grad_())[0], expected)
    assert all(parameter.grad is None for parameter in vae.parameters())


# Divergence


@pytest.mark.parametrize("gradient", ["identity", "exact", "implicit"])
def test_images_whose_search_diverges_stay_as_they_are_and_are_counted(gradient):
    class Broken(Linear):
        """Latents of dark images run away to infinity."""

        def encode(self, x):
            return torch.where(x.mean((1, 2, 3))[:, None] < 0.3, 1e30, 0.0) * torch.ones(self.latent_size)

    x = torch.from_numpy(images())
    x[[1, 4]] -= 0.3
    x.requires_grad_()
    with pytest.warns(UserWarning, match="projection of 2 of 6 images diverged"):
        purified = ManifoldProjection(Broken(), 5, gradient=gradient).forward(x)[0]
    assert torch.equal(purified[[1, 4]], x[[1, 4]]) and not torch.allclose(purified[0], x[0], atol=1e-3)
    (found,) = torch.autograd.grad(purified.sum(), x)
    assert found.isfinite().all() and torch.equal(found[[1, 4]], torch.ones(2, *SHAPE))


def test_one_finite_restart_is_enough(recwarn):
    class Broken(Linear):
        """The search from the encoder diverges."""

        def encode(self, x):
            return torch.full((len(x), self.latent_size), torch.nan) + 0 * x.sum()

    errors = ManifoldProjection(Broken(), 300, restarts=2, learning_rate=0.05, seed=0).reconstruction_errors(images())
    expected = ManifoldProjection(Linear(), 300, learning_rate=0.05, seed=0).reconstruction_errors(images())
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    assert np.isinf(ManifoldProjection(Broken(), 2).reconstruction_errors(images())).all()
    assert not recwarn.list


# Gradients


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("restarts", [1, 2])
def test_the_exact_gradient_agrees_with_finite_differences(vae, search, restarts):
    model = copy.deepcopy(vae).double()
    purifier = ManifoldProjection(model, 4, restarts, gradient="exact", seed=0, **SEARCHES[search])
    x = torch.from_numpy(images(2).astype(np.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: purifier.forward(x)[0], x)


def test_the_exact_gradient_is_that_of_the_plain_graph(vae):
    purifier = ManifoldProjection(vae, 4, 2, gradient="exact", seed=2, batch_size=4)
    x, weights = torch.from_numpy(images()).requires_grad_(), torch.randn(6, *SHAPE)
    (found,) = torch.autograd.grad((purifier.forward(x)[0] * weights).sum(), x)
    (expected,) = torch.autograd.grad((purifier.purify(x, BatchGenerator(2, range(6))) * weights).sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert found.abs().max() > 1e-3


def test_the_implicit_gradient_of_a_converged_search_agrees_with_finite_differences(vae):
    model = copy.deepcopy(vae).double()
    purifier = ManifoldProjection(model, 1500, learning_rate=0.05, gradient="implicit")
    x = torch.from_numpy(images(2).astype(np.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: purifier.forward(x)[0], x, eps=1e-4, atol=1e-4, fast_mode=True)


def test_the_implicit_gradient_of_a_linear_generator_is_the_projection_s():
    model, x = Linear().double(), torch.from_numpy(images(1).astype(np.float64)).requires_grad_()
    purifier = ManifoldProjection(model, 300, learning_rate=0.05, seed=0)
    jacobian = torch.autograd.functional.jacobian(lambda x: purifier.forward(x)[0].flatten(), x).flatten(1)
    torch.testing.assert_close(jacobian, (model.a @ torch.linalg.pinv(model.a)).detach(), atol=1e-6, rtol=1e-5)


def test_latents_without_effect_do_not_disturb_the_implicit_gradient():
    model = Linear(5).double()
    with torch.no_grad():
        model.a[:, 3:] = 0
    x = torch.from_numpy(images(1).astype(np.float64)).requires_grad_()
    purifier = ManifoldProjection(model, 300, learning_rate=0.05, seed=0)
    jacobian = torch.autograd.functional.jacobian(lambda x: purifier.forward(x)[0].flatten(), x).flatten(1)
    torch.testing.assert_close(jacobian, (model.a @ torch.linalg.pinv(model.a)).detach(), atol=1e-6, rtol=1e-5)


def test_the_identity_gradient_passes_gradients_on(vae):
    x, weights = torch.from_numpy(images()).requires_grad_(), torch.randn(6, *SHAPE)
    purified = ManifoldProjection(vae, 5, gradient="identity").forward(x)[0]
    assert torch.equal(torch.autograd.grad((purified * weights).sum(), x)[0], weights)


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("steps", {"steps": 0}),
        ("restarts", {"restarts": 0}),
        ("learning_rate", {"learning_rate": -1.0}),
        ("momentum", {"momentum": 1.5}),
        ("optimizer", {"optimizer": "sgd"}),
        ("encode", {"encode": 2}),
        ("gradient", {"gradient": "none"}),
    ],
)
def test_errors_name_the_argument(vae, name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        ManifoldProjection(vae, **arguments)
    purifier = ManifoldProjection(vae)
    with pytest.raises(ValueError, match=rf"^{name} "):
        purifier.set_params(**arguments)
    assert repr(purifier) == repr(ManifoldProjection(vae))


def test_generators_that_do_not_fit_are_refused(vae):
    with pytest.raises(ValueError, match=r"^model must be a Generator"):
        ManifoldProjection("digits", device_type="cpu")
    with pytest.raises(ValueError, match=r"^encode "):
        ManifoldProjection(Linear(), encode=True)
    with pytest.raises(ValueError, match=r"^x "):
        ManifoldProjection(vae)(np.zeros((2, 1, 8, 8), np.float32))


def test_nothing_is_warned_of_without_a_reason(vae):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ManifoldProjection(vae, 5)(np.zeros((0, *SHAPE), np.float32))[0].shape == (0, *SHAPE)
        ManifoldProjection(vae, 5)(images())
