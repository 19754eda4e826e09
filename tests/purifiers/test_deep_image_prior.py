"""The deep image prior: its networks, when a fit stops, draws, and failures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from art_pixeldefend import DeepImagePrior
from art_pixeldefend.purifiers.base import BatchGenerator
from art_pixeldefend.purifiers.deep_image_prior import _Networks

SHAPE = (1, 8, 8)


def images(count=5, shape=SHAPE, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).random((count, *shape)).astype(dtype)


def mean_square(a, b):
    return ((a - b) ** 2).mean(axis=(1, 2, 3))


# The networks


def plain(shapes, weights, x, scales):
    """One network of the published kind, for one image (1, C, H, W), from its weights (P,)."""
    shapes = iter(shapes)

    def convolution(x, stride=1):
        nonlocal weights
        inputs, outputs, size = next(shapes)
        mine, weights = weights.tensor_split([outputs * (inputs * size**2 + 2)])
        kernels, gain, shift = mine.view(outputs, -1).tensor_split([inputs * size**2, inputs * size**2 + 1], dim=1)
        x = F.conv2d(x, kernels.reshape(outputs, inputs, size, size), stride=stride, padding=size // 2)
        return x, gain[:, None], shift[:, None]

    def layer(x, stride=1):
        x, gain, shift = convolution(x, stride)
        return F.leaky_relu(F.instance_norm(x) * gain + shift, 0.2)

    skips = []
    for _ in range(scales):
        skips.append(layer(x))
        x = layer(layer(x, stride=2))
    for skip in reversed(skips):
        x = layer(layer(torch.cat([skip, F.interpolate(x, skip.shape[2:], mode="bilinear")], 1)))
    x, _, shift = convolution(x)
    assert not len(weights)
    return torch.sigmoid(x + shift)


@pytest.mark.parametrize(
    ("shape", "scales"), [((1, 28, 28), 3), ((3, 13, 18), 2), ((2, 5, 4), 1), ((1, 64, 64), 4), ((1, 130, 256), 5)]
)
def test_networks_of_a_batch_are_the_plain_network_of_each_image(shape, scales):
    networks, generator = _Networks(shape, 6), BatchGenerator(0, range(3), dtype=torch.float64)
    weights, inputs = networks.weights(generator), networks.inputs(generator)
    weights = weights + 0.1 * generator.normal(weights.shape[1:])
    outputs = networks.outputs(weights, inputs)
    assert outputs.shape == (3, *shape)
    for i in range(3):
        torch.testing.assert_close(outputs[i : i + 1], plain(networks._shapes, weights[i], inputs[i : i + 1], scales))


def test_random_layers_keep_the_variance_of_their_input():
    networks = _Networks((1, 8, 8), 64)
    weights = networks.weights(BatchGenerator(0, range(4)))
    inputs, outputs, size = networks._shapes[1]
    skip = networks._counts[0]
    kernels = weights[:, skip : skip + networks._counts[1]].unflatten(1, (outputs, -1))[..., :-2]
    assert (kernels.square().sum(-1).mean() - 1).abs() < 0.02 and kernels.shape[-1] == inputs * size**2


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 9, 13), (3, 4, 5), (3, 224, 224)])
def test_images_of_any_shape_are_purified(shape):
    x = images(2, shape)
    purified = DeepImagePrior(error=0.0, steps=2, channels=2, seed=0)(x)[0]
    assert purified.shape == x.shape and purified.dtype == x.dtype
    assert np.isfinite(purified).all() and (purified != x).all()


# The fit


def test_structure_is_fitted_before_noise():
    rows, columns = np.mgrid[0:1:28j, 0:1:28j]
    clean = np.stack([0.3 + 0.4 * (rows > columns), 0.5 + 0.3 * np.sin(9 * columns + 5 * rows)])[:, None]
    noisy = clean + 0.1 * np.random.default_rng(0).standard_normal(clean.shape).clip(-2, 2)
    purified = DeepImagePrior(error=0.008, seed=0)(noisy)[0]
    assert (mean_square(purified, clean) < 0.5 * mean_square(noisy, clean)).all()


def test_each_image_stops_at_the_first_step_that_reaches_the_error():
    x = np.linspace(0.1, 1, 5)[:, None, None, None] * images(dtype=np.float64)
    paths = [DeepImagePrior(error=0.0, steps=steps, seed=1)(x)[0] for steps in range(1, 31)]
    errors = np.array([mean_square(path, x) for path in paths])
    limit = float(np.median(errors))
    reached = (errors <= limit).any(axis=0)
    first = np.where(reached, (errors <= limit).argmax(axis=0), 29)
    assert len(set(first.tolist())) >= 3
    purified = DeepImagePrior(error=limit, steps=30, seed=1)(x)[0]
    for i, step in enumerate(first):
        np.testing.assert_allclose(purified[i], paths[step][i], atol=1e-10)


def test_a_fit_that_goes_on_comes_closer():
    x = images()
    errors = [mean_square(DeepImagePrior(error=0.0, steps=steps, seed=0)(x)[0], x) for steps in (2, 20, 200)]
    assert (errors[0] > errors[1]).all() and (errors[1] > errors[2]).all()


def test_the_result_averages_the_outputs():
    x = images(dtype=np.float64)
    last = [DeepImagePrior(error=0.0, steps=steps, decay=0.0, seed=0)(x)[0] for steps in range(1, 6)]
    expected = last[0]
    for step in range(1, 5):
        decay = min(0.3, step / (step + 9))
        expected = decay * expected + (1 - decay) * last[step]
    found = DeepImagePrior(error=0.0, steps=5, decay=0.3, seed=0)(x)[0]
    np.testing.assert_allclose(found, expected, atol=1e-10)


# Seeds and batches


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_seeded_result_does_not_depend_on_the_batch_size(batch_size):
    x = images(7, (1, 12, 12))
    arguments = {"error": 0.03, "steps": 60, "seed": 5}
    first = DeepImagePrior(**arguments)(x)[0]
    np.testing.assert_allclose(DeepImagePrior(batch_size=batch_size, **arguments)(x)[0], first, atol=1e-6)
    assert not np.allclose(DeepImagePrior(**arguments | {"seed": 6})(x)[0], first, atol=1e-2)


def test_an_images_result_does_not_depend_on_the_others():
    x, other = images(4), images(4, seed=1)
    other[2] = x[2]
    purifier = DeepImagePrior(error=0.03, steps=60, seed=5)
    np.testing.assert_allclose(purifier(other)[0][2], purifier(x)[0][2], atol=1e-6)


def test_without_a_seed_every_call_draws_afresh():
    purifier, x = DeepImagePrior(steps=5), images()
    assert not np.allclose(purifier(x)[0], purifier(x)[0], atol=1e-3)


def test_grad_and_inference_modes_of_the_caller_change_nothing():
    purifier, x = DeepImagePrior(steps=5, seed=0), torch.from_numpy(images())
    expected = purifier(x)[0]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            found, grad = purifier(x.clone())[0], torch.is_grad_enabled()
        assert torch.equal(found, expected) and grad == (mode is torch.enable_grad)


# Failures


class Broken(BatchGenerator):
    """Weights of one image are NaN."""

    def normal(self, shape):
        numbers = super().normal(shape)
        numbers[1] = torch.nan
        return numbers


def test_an_image_whose_fit_fails_stays_as_it_is_beside_others():
    x = torch.from_numpy(images(dtype=np.float64))
    purifier = DeepImagePrior(error=0.0, steps=10)
    with pytest.warns(UserWarning, match="the fit of 1 of 5 images failed"):
        found = purifier.purify(x, Broken(0, range(5), dtype=x.dtype))
    expected = purifier.purify(x, BatchGenerator(0, range(5), dtype=x.dtype))
    assert torch.equal(found[1], x[1]) and not torch.equal(expected[1], x[1])
    others = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=1e-10)


def test_fits_that_diverge_are_counted():
    x = images()
    with pytest.warns(UserWarning, match="the fit of 5 of 5 images failed"):
        purified = DeepImagePrior(error=0.0, steps=10, learning_rate=1e300)(x)[0]
    np.testing.assert_array_equal(purified, x)


def test_no_images_give_no_images():
    assert DeepImagePrior()(np.zeros((0, *SHAPE), np.float32))[0].shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("error", -0.1),
        ("error", float("nan")),
        ("steps", 0),
        ("channels", 1.5),
        ("learning_rate", -1),
        ("decay", 1.0),
        ("gradient", "exact"),
        ("batch_size", 0),
        ("seed", -1),
    ],
)
def test_errors_name_the_argument(name, value):
    purifier = DeepImagePrior()
    before = getattr(purifier, name)
    with pytest.raises(ValueError, match=f"^{name} "):
        purifier.set_params(**{name: value})
    assert getattr(purifier, name) == before
    if name != "gradient":
        with pytest.raises(ValueError, match=f"^{name} "):
            DeepImagePrior(**{name: value})


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"^x must have sides of at least 4 pixels"):
        DeepImagePrior()(images(1, (1, 3, 8)))


# Gradients


def test_the_gradient_is_the_identity():
    x, weights = torch.from_numpy(images()).requires_grad_(), torch.randn(5, *SHAPE)
    (gradient,) = torch.autograd.grad((DeepImagePrior(steps=2).forward(x)[0] * weights).sum(), x)
    assert torch.equal(gradient, weights)
