import numpy as np
import pytest
import torch

from art_pixeldefend import AdaptivePixelDefend, PixelDefend
from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.purifiers.soft_window import EDGE, STRIDE, SoftWindow, window_means

SHAPE = (2, 4, 4)
EPS = 24
pytestmark = pytest.mark.filterwarnings("ignore:the density model gives")  # the models here have random weights


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(SHAPE, filters=4).double()


@pytest.fixture(scope="module")
def x(make_levels):
    return torch.from_numpy(make_levels(3, SHAPE)).double() / 255


def test_means_are_those_of_the_conditional_distributions_in_the_window(model, x):
    levels = (x * 255).round()
    means, _ = window_means(model.mixture_parameters(levels), levels, levels, EPS)
    log_p = model.conditional_log_probs(levels.to(torch.uint8))
    count = int((EPS + 3 * EDGE) // STRIDE)
    for n, c, i, j in np.ndindex(*levels.shape):
        centre = levels[n, c, i, j]
        z = (centre + STRIDE * torch.arange(-count, count + 1)).clamp(0, 255)
        weights = log_p[n, c, i, j, z.long()].exp()
        weights = weights * torch.sigmoid((EPS - (z - centre)) / EDGE) * torch.sigmoid((EPS + z - centre) / EDGE)
        assert means[n, c, i, j].item() == pytest.approx(((weights * z).sum() / weights.sum()).item(), abs=1e-6)


def test_the_gradient_follows_the_window_and_one_step_through_earlier_sub_pixels(model, x):
    """Against the dense Jacobians of the definition."""
    purified = ((x * 255).round() + 10).clamp(0, 255)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = x.clone().requires_grad_()
    result = SoftWindow.apply(inputs, purified.to(torch.uint8), model, EPS)
    assert torch.equal(result, purified / 255)
    (found,) = torch.autograd.grad(result, inputs, gradient)
    for n in range(len(x)):

        def means(levels, n=n):
            levels = levels.view(1, *SHAPE)
            return window_means(model.mixture_parameters(levels), levels, 255 * x[n : n + 1], EPS)[0].flatten()

        at = purified[n].flatten()
        through = torch.autograd.functional.jacobian(means, at)
        levels = at.view(1, *SHAPE)
        direct = window_means(model.mixture_parameters(levels), levels, 255 * x[n : n + 1], EPS)[1].flatten().diag()
        expected = gradient[n].flatten() @ (direct + through @ direct)
        assert torch.allclose(found[n].flatten(), expected, atol=1e-9)


def test_derivatives_are_those_of_the_window_by_finite_differences(model, x):
    levels = (x * 255).round()
    params = model.mixture_parameters(levels).detach()
    derivatives = window_means(params, levels, levels, EPS)[1]
    count = int((EPS + 3 * EDGE) // STRIDE)
    z = (levels[..., None] + STRIDE * torch.arange(-count, count + 1)).clamp(0, 255)  # they do not move with the window
    pixels = levels.movedim(1, -1)
    parts = [mixture.components(params, pixels, c).for_each_level() for c in range(SHAPE[0])]
    p = torch.stack([mixture.log_prob(part, z[:, c]) for c, part in enumerate(parts)], 1).exp()

    def means_at(shift):
        distance = z - levels[..., None] - shift
        weights = p * torch.sigmoid((EPS - distance) / EDGE) * torch.sigmoid((EPS + distance) / EDGE)
        return (weights * z).sum(-1) / weights.sum(-1)

    step = 1e-4
    assert torch.allclose(derivatives, (means_at(step) - means_at(-step)) / (2 * step), atol=1e-6)


def test_purified_images_do_not_depend_on_the_gradient(make_model, make_levels):
    x = torch.from_numpy(make_levels(20, SHAPE)) / 255
    model = make_model(SHAPE)
    plain = PixelDefend(eps=EPS, pixel_cnn=model)(x)[0]
    gradients = []
    for batch_size in (7, 20):
        purifier = PixelDefend(eps=EPS, pixel_cnn=model, gradient="implicit", batch_size=batch_size)
        inputs = x.clone().requires_grad_()
        purified = purifier(inputs)[0]
        assert torch.equal(purified.detach(), plain)
        gradients += torch.autograd.grad(purified.square().sum(), inputs)
    assert torch.allclose(*gradients, atol=1e-5)
    assert gradients[0].isfinite().all() and (gradients[0] != 0).flatten(1).any(1).all()
    assert all(p.grad is None for p in model.parameters())


def test_images_that_are_not_purified_pass_their_gradients_on(make_model, make_levels):
    x = torch.from_numpy(make_levels(6, SHAPE)) / 255
    model = make_model(SHAPE)
    bits = model.bits_per_dim((x * 255).to(torch.uint8))
    purifier = AdaptivePixelDefend(eps=EPS, pixel_cnn=model, gradient="implicit", threshold=float(bits.median()) + 1e-6)
    inputs = x.clone().requires_grad_()
    purified = purifier(inputs)[0]
    kept = (purified == x).flatten(1).all(1)
    assert kept.any() and not kept.all()
    (gradient,) = torch.autograd.grad(purified.sum(), inputs)
    assert (gradient[kept] == 1).all() and (gradient[~kept] != 1).any()


def test_the_backward_pass_decodes_nothing_however_many_batches(make_model, make_levels, monkeypatch):
    model, levels = make_model((1, 4, 4)), torch.from_numpy(make_levels(5, (1, 4, 4)))
    results = []
    for batch_size in (2, 5):
        purifier = PixelDefend(eps=24, pixel_cnn=model, gradient="implicit", batch_size=batch_size)
        decoded = []
        decode = purifier.purify_levels
        monkeypatch.setattr(
            purifier, "purify_levels", lambda x, decode=decode, n=decoded: n.append(len(x)) or decode(x)
        )
        x = (levels.double() / 255).requires_grad_()
        results.append(torch.autograd.grad(purifier(x)[0].square().sum(), x)[0])
        assert sum(decoded) == 5
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the model computes in float32
