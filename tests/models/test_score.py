import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_pixeldefend.models.score import (
    DenoisingLoss,
    ScoreModel,
    noise_levels,
    reverse_diffusion,
)

SHAPES = [(1, 8, 8), (3, 9, 7), (1, 28, 28), (3, 5, 16), (2, 1, 1)]


def tiny(image_shape=(1, 8, 8), seed=0, **sizes):
    """A small model whose layers all contribute: the zero-initialised ones get random weights."""
    torch.manual_seed(seed)
    model = ScoreModel(image_shape, **({"channels": (8, 12), "blocks": (1, 1), "embedding": 8} | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gaussian_model(image_shape, mean, deviation):
    """The exact score model of independent pixels N(mean, deviation^2): its network is zero."""
    return ScoreModel(image_shape, (4,), (1,), 4, mean=mean, deviation=deviation)


# The model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_any_image_size_is_denoised(shape, patch):
    model = tiny(shape, patch=patch, channels=(8, 8, 8), blocks=(1, 2, 1))
    x = torch.randn(3, *shape)
    assert model.denoise(x, 0.3).shape == model.score(x, 0.3).shape == x.shape


@pytest.mark.parametrize("sigma", [0.02, 0.25, 1.0])
def test_an_untrained_model_has_the_score_of_a_gaussian(sigma):
    model = gaussian_model((1, 4, 4), 0.3, 0.2)
    x = torch.randn(5, 1, 4, 4)
    total = 0.2**2 + sigma**2
    torch.testing.assert_close(model.score(x, sigma), (0.3 - x) / total)
    torch.testing.assert_close(model.denoise(x, sigma), (0.2**2 * x + sigma**2 * 0.3) / total)


@given(st.floats(0.01, 1.0))
@settings(max_examples=20, deadline=None)
def test_score_is_tweedies_formula(sigma):
    model = tiny().double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = (model.denoise(x, sigma) - x) / torch.tensor(sigma, dtype=torch.float64) ** 2
    torch.testing.assert_close(model.score(x, sigma), expected)


def test_the_score_at_small_noise_has_no_cancellation_in_float32():
    model = tiny()
    x = torch.randn(2, 1, 8, 8)
    exact = model.double().score(x.double(), 0.01)
    assert (model.float().score(x, 0.01) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_noise_of_level_zero_is_the_identity():
    model = tiny()
    x = torch.randn(3, 1, 8, 8)
    sigma = torch.tensor([0.0, 0.2, 0.0])
    denoised = model.denoise(x, sigma)
    assert torch.equal(denoised[::2], x[::2]) and not torch.equal(denoised[1], x[1])


def test_each_image_has_its_own_noise_level():
    model = tiny()
    x, sigmas = torch.randn(3, 1, 8, 8), (0.05, 0.3, 0.9)
    together = model.denoise(x, torch.tensor(sigmas))
    for i, sigma in enumerate(sigmas):
        torch.testing.assert_close(together[i : i + 1], model.denoise(x[i : i + 1], sigma))


@pytest.mark.parametrize("method", ["denoise", "score"])
def test_gradients_in_the_images_are_exact(method):
    model = tiny((1, 4, 4), channels=(4,), blocks=(1,), embedding=4).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: getattr(model, method)(x, 0.3), x)


def test_results_do_not_depend_on_autocast():
    model = tiny()
    x = torch.randn(2, 1, 8, 8)
    expected = model.denoise(x, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.denoise(x, 0.3), expected)


def test_training_and_evaluation_mode_agree():
    model = tiny()
    x = torch.randn(2, 1, 8, 8)
    expected = model.denoise(x, 0.3)
    assert torch.equal(model.train().denoise(x, 0.3), expected) and model.training


def test_a_saved_model_is_the_same_model(tmp_path):
    model = tiny()
    model.initialise(np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    model.save(tmp_path / "model.safetensors")
    loaded = ScoreModel.load(tmp_path / "model.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.denoise(x, 0.3), model.denoise(x, 0.3))


def test_half_precision_changes_images_by_less_than_a_level(tmp_path):
    model = tiny()
    model.save(tmp_path / "model.safetensors", dtype=torch.float16)
    x = torch.rand(4, 1, 8, 8)
    assert (
        ScoreModel.load(tmp_path / "model.safetensors").denoise(x, 0.3) - model.denoise(x, 0.3)
    ).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("sigma", lambda model, x: model.denoise(x, -0.1)),
        ("sigma", lambda model, x: model.denoise(x, 1.5)),
        ("sigma", lambda model, x: model.denoise(x, math.nan)),
        ("sigma", lambda model, x: model.score(x, 0.0)),
        ("sigma", lambda model, x: model.denoise(x, torch.tensor([0.1, 0.2]))),
        ("x", lambda model, x: model.denoise(x[:, :, :7], 0.1)),
        ("x", lambda model, x: model.denoise((x * 255).to(torch.uint8), 0.1)),
        ("x", lambda model, x: model.denoise(x.numpy(), 0.1)),
        ("steps", lambda model, x: model.sample(1, steps=0)),
        ("channels", lambda model, x: ScoreModel((1, 8, 8), channels=(8, 0))),
        ("blocks", lambda model, x: ScoreModel((1, 8, 8), channels=(8, 8), blocks=(1,))),
        ("sigma_range", lambda model, x: ScoreModel((1, 8, 8), sigma_range=(1.0, 0.1))),
        ("deviation", lambda model, x: ScoreModel((1, 8, 8), deviation=0.0)),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name} "):
        call(tiny(), torch.rand(3, 1, 8, 8))


# The loss


def test_the_loss_of_an_untrained_model_is_one():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2000, 1, 8, 8), dtype=np.uint8))
    model = ScoreModel((1, 8, 8), (4,), (1,), 4)
    model.initialise(images)
    torch.manual_seed(0)
    assert DenoisingLoss()(model, images).item() == pytest.approx(1, abs=0.02)


def test_the_loss_is_the_weighted_error_of_the_denoised_images():
    model, images = tiny(), torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    loss = DenoisingLoss()
    torch.manual_seed(3)
    found = loss(model, images)
    torch.manual_seed(3)
    sigma = loss.sample_sigma(50, model.sigma_range, torch.device("cpu"))
    clean = images / 255
    error = model.denoise(clean + sigma[:, None, None, None] * torch.randn_like(clean), sigma) - clean
    weight = (sigma**2 + model.deviation**2) / (sigma * model.deviation) ** 2
    torch.testing.assert_close(found, (weight[:, None, None, None] * error.square()).mean())


def test_training_noise_levels_are_log_normal_within_the_range():
    sigma = DenoisingLoss(-1.5, 0.9).sample_sigma(20_000, (0.01, 1.0), torch.device("cpu"))
    assert 0.01 <= sigma.min() < 0.02 and 0.98 < sigma.max() <= 1
    assert sigma.median().item() == pytest.approx(math.exp(-1.5), rel=0.1)


def test_training_learns_to_denoise(digits):
    torch.manual_seed(0)
    model = ScoreModel((1, 8, 8), (16, 24), (1, 1), 16)
    images = torch.from_numpy(digits.x_train)
    model.initialise(images)
    before = model.evaluate(digits.x_test)["rmse_0.25"]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model.loss(images[torch.randint(0, len(images), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.evaluate(digits.x_test)["rmse_0.25"] < 0.75 * before


def test_the_evaluation_is_the_root_mean_square_error_of_each_image():
    plain = gaussian_model((1, 16, 16), 0.0, 0.25)
    black = np.zeros((300, 1, 16, 16), np.uint8)  # denoised to a share of the noise
    errors = plain.evaluate(black)
    for sigma in (0.1, 0.25, 0.5):
        assert errors[f"rmse_{sigma:g}"] == pytest.approx(0.25**2 / (0.25**2 + sigma**2) * sigma, rel=0.01)
    assert plain.evaluate(black) == errors


# Reverse diffusion


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_deterministic_steps_follow_the_closed_form_of_a_gaussian(steps):
    """For pixels N(m, v) one step from s to t maps x - m to (v + s t) / (v + s^2) (x - m)."""
    model, m, v = gaussian_model((1, 4, 4), 0.3, 0.2), 0.3, 0.2**2
    x, sigmas = torch.randn(5, 1, 4, 4), noise_levels(0.4, steps)
    factor = math.prod((v + s * t) / (v + s * s) for s, t in pairwise(sigmas))
    torch.testing.assert_close(reverse_diffusion(model.denoise, x, sigmas, 0.0, None), m + factor * (x - m))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_noise_left_after_a_step_has_the_next_level(eta):
    """Around a single image, D = m, what is left is the noise alone."""
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(20_000, 1, 1, 1)
    y = reverse_diffusion(lambda x, sigma: torch.full_like(x, 0.3), x, (0.5, 0.2), eta, lambda: torch.randn_like(x))
    assert (y - 0.3).std().item() == pytest.approx(0.2, rel=0.03)


def test_the_last_step_is_the_denoised_image():
    model, x = tiny(), torch.rand(2, 1, 8, 8)
    result = reverse_diffusion(model.denoise, x, noise_levels(0.3, 1), 1.0, None)
    torch.testing.assert_close(result, model.denoise(x, 0.3))


def test_many_ancestral_steps_sample_the_distribution():
    model = gaussian_model((1, 1, 1), 0.4, 0.1)
    levels = model.sample(4000, seed=1, steps=60).double()
    assert levels.mean().item() / 255 == pytest.approx(0.4, abs=0.01)
    assert levels.std().item() / 255 == pytest.approx(0.1, rel=0.1)


def test_samples_depend_on_the_seed_alone():
    model = tiny()
    torch.manual_seed(1)
    first = model.sample(3, seed=5, steps=4)
    torch.manual_seed(2)
    assert torch.equal(model.sample(3, seed=5, steps=4), first)
    assert not torch.equal(model.sample(3, seed=6, steps=4), first)
