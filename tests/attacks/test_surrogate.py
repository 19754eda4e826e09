import numpy as np
import pytest
import torch

from art_pixeldefend.attacks import Surrogate, fit_surrogate
from art_pixeldefend.purifiers.base import Purifier

SHAPE = (1, 8, 8)
FAST = {"steps": 150, "width": 8, "layers": 3, "batch_size": 16}


class Blur(Purifier):
    """Means of neighbours, rounded: discontinuous, with a derivative that a network can learn."""

    def purify(self, x, generator):
        mean = (x + x.roll(1, -1) + x.roll(1, -2) + x.roll((1, 1), (-1, -2))) / 4
        return (mean * 40).round() / 40


class AddNoise(Blur):
    stochastic = True

    def purify(self, x, generator):
        return super().purify(x, generator) + 0.2 * generator.normal(x.shape[1:])


def images(count=100, clip_values=(0.0, 1.0)):
    low, high = clip_values
    levels = np.random.default_rng(0).integers(0, 256, (count, *SHAPE))
    return (levels / 255 * (high - low) + low).astype(np.float32)


@pytest.mark.parametrize("purifier", [Blur(), AddNoise(seed=0)])
def test_it_learns_what_the_purifier_does_and_how_it_changes(purifier):
    surrogate = fit_surrogate(purifier, images(), learning_rate=1e-2, **FAST)
    new = torch.from_numpy(images(140)[100:])
    mean = Blur().purified(new)
    assert (surrogate(new) - mean).square().mean() < 0.3 * (new - mean).square().mean()
    # The derivative of a pixel of the result by the four pixels of which it is the mean.
    inputs = new.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(inputs)[:, :, 4, 4].sum(), inputs)
    share = gradient[:, :, 3:5, 3:5].sum() / gradient.abs().sum()
    assert share > 0.6 and gradient[:, :, 3:5, 3:5].mean().item() == pytest.approx(0.25, abs=0.08)


def test_it_is_a_function_of_the_seed_whatever_the_range_and_random_state():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = fit_surrogate(Blur(), images(10), seed=1, **FAST | {"steps": 5})
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second = fit_surrogate(Blur((0.0, 255.0)), images(10, (0.0, 255.0)), seed=1, **FAST | {"steps": 5})
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert not a.requires_grad
    other = fit_surrogate(Blur(), images(10), seed=2, **FAST | {"steps": 5})
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_an_untrained_surrogate_is_the_identity_in_every_dtype():
    x = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    assert torch.equal(Surrogate(channels=3)(x), x)


@pytest.mark.parametrize(
    "arguments",
    [{"steps": 0}, {"copies": 0}, {"batch_size": 0}, {"width": 0}, {"layers": 1}, {"seed": -1}, {"eps": -1}],
    ids=str,
)
def test_errors_name_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        fit_surrogate(Blur(), images(2), **arguments)


def test_images_are_needed():
    with pytest.raises(ValueError, match="x must hold at least one image"):
        fit_surrogate(Blur(), images(0))
