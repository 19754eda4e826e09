import copy

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from torch import nn

from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import AdaptiveStep, ScoreDenoiser, ScorePurifier
from art_pixeldefend.purifiers.base import BatchGenerator

VARIANTS = {
    "one-shot": {},
    "diffusion": {"steps": 3},
    "deterministic": {"steps": 3, "eta": 0.0},
    "adaptive": {"steps": 4, "adaptive": AdaptiveStep(rate=0.3, largest=10.0, stop=0.0)},
    "thresholded": {"threshold": 8.0, "spared_sigma": 0.05, "detection_sigma": 0.1},
}
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ScoreModel(SHAPE, (8, 12), (1, 1), 8, mean=0.4, deviation=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(count=6, seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


# What is computed


def test_one_shot_is_the_denoised_noisy_image(model):
    x = torch.from_numpy(images())
    noise = BatchGenerator(3, range(6)).normal(SHAPE)
    expected = model.denoise(x + 0.3 * noise, 0.3).clamp(0, 1)
    torch.testing.assert_close(ScorePurifier(model, 0.3, seed=3)(x)[0], expected)


def test_noisy_images_are_not_clipped(model):
    """Of a model that denoises to a constant plus a share of the noise, nothing is lost at black and white."""
    plain = ScoreModel(SHAPE, (4,), (1,), 4, mean=0.5, deviation=0.2)  # the linear denoiser of N(0.5, 0.2^2)
    x = np.zeros((200, *SHAPE), np.float32)
    purified = ScorePurifier(plain, 0.2, seed=0)(x)[0]
    # (x + 0.5) / 2 + noise / 2: with clipped noise the mean would be 0.29, as half of the noise would be missing
    assert purified.mean() == pytest.approx(0.25, abs=0.005)


def test_more_steps_of_no_noise_reach_the_same_as_their_closed_form():
    plain = ScoreModel(SHAPE, (4,), (1,), 4, mean=0.5, deviation=0.2)
    x = torch.full((2, *SHAPE), 0.5)
    noise = 0.1 * BatchGenerator(0, range(2)).normal(SHAPE)
    variance, factor = 0.04, 1.0
    for now, after in ((0.1, 0.05), (0.05, 0.0)):
        factor *= (variance + now * after) / (variance + now**2)
    purified = ScorePurifier(plain, 0.1, 2, eta=0.0, seed=0)(x)[0]
    torch.testing.assert_close(purified, (0.5 + factor * noise).clamp(0, 1))


def test_adaptive_updates_follow_the_score_at_the_injected_level():
    """For a Gaussian of variance v, sigma times the score is linear: 1 - z = delta sigma / (v + sigma^2)."""
    plain = ScoreModel(SHAPE, (4,), (1,), 4, mean=0.5, deviation=0.2)
    x = torch.full((2, *SHAPE), 0.5)
    rule = AdaptiveStep(rate=0.1, stop=0.0, largest=10.0)
    purified = ScorePurifier(plain, 0.1, 5, adaptive=rule, seed=0)(x)[0]
    expected = 0.5 + 0.9**5 * 0.1 * BatchGenerator(0, range(2)).normal(SHAPE)
    torch.testing.assert_close(purified, expected.clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_images_below_the_threshold_stay_exactly_as_they_are(model):
    x = images()
    norms = ScorePurifier(model, detection_sigma=0.1).score_norms(x)
    threshold = float(np.sort(norms)[3:5].mean())
    purifier = ScorePurifier(model, threshold=threshold, detection_sigma=0.1, seed=0)
    changed = (purifier(x)[0] != x).any((1, 2, 3))
    assert changed.tolist() == (norms > threshold).tolist() and changed.sum() == 2
    everything = ScorePurifier(model, seed=0)(x)[0]
    np.testing.assert_allclose(purifier(x)[0][changed], everything[changed], atol=1e-6)


def test_score_norms_are_those_of_the_score(model):
    x = images()
    expected = 0.1 * model.score(torch.from_numpy(x), 0.1).flatten(1).norm(dim=1)
    for clip_values, scaled in (((0.0, 1.0), x), ((0, 255), 255 * x), ((0.0, 1.0), x.transpose(0, 2, 3, 1))):
        found = ScorePurifier(model, detection_sigma=0.1, clip_values=clip_values, batch_size=4).score_norms(scaled)
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)


def test_noise_of_level_zero_changes_nothing(model):
    x = images()
    assert np.array_equal(ScorePurifier(model, 0.0, steps=3)(x)[0], x)


# Seeds and batches


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seeded_result_does_not_depend_on_the_batch_size(model, variant):
    # In double precision: batches of other sizes round differently, which ADP's finite differences magnify.
    double, x = copy.deepcopy(model).double(), images(7).astype(np.float64)
    first = ScorePurifier(double, seed=5, **VARIANTS[variant])(x)[0]
    again = ScorePurifier(double, seed=5, batch_size=3, **VARIANTS[variant])(x)[0]
    np.testing.assert_allclose(again, first, atol=1e-9)
    assert not np.allclose(ScorePurifier(double, seed=6, **VARIANTS[variant])(x)[0], first, atol=1e-3)


def test_without_a_seed_every_call_draws_afresh(model):
    purifier, x = ScorePurifier(model), images()
    assert not np.allclose(purifier(x)[0], purifier(x)[0], atol=1e-3)


# Gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exact_gradient_is_that_of_the_plain_graph(model, variant):
    # In double precision: batches of other sizes round differently, which ADP's finite differences magnify.
    purifier = ScorePurifier(copy.deepcopy(model).double(), seed=2, batch_size=4, **VARIANTS[variant])
    x = torch.from_numpy(images()).double().requires_grad_()
    weights = torch.randn(6, *SHAPE, dtype=torch.float64)
    (found,) = torch.autograd.grad((purifier.forward(x)[0] * weights).sum(), x)
    plain = purifier.purify(x, BatchGenerator(2, range(6), dtype=torch.float64))  # recorded by autograd
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
    assert found.abs().max() > 1e-3 and not torch.allclose(found, weights, atol=1e-2)


def test_the_identity_gradient_passes_gradients_on(model):
    x = torch.from_numpy(images()).requires_grad_()
    weights = torch.randn(6, *SHAPE)
    purified = ScorePurifier(model, gradient="identity").forward(x)[0]
    assert torch.equal(torch.autograd.grad((purified * weights).sum(), x)[0], weights)


def test_the_exact_gradient_agrees_with_finite_differences(model):
    double = copy.deepcopy(model).double()
    purifier = ScorePurifier(double, 0.3, 2, seed=0)
    x = torch.rand(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: purifier.forward(x)[0], x, fast_mode=True)


# The denoiser of smoothing


def test_the_denoiser_takes_images_outside_the_range_as_they_are(model, recwarn):
    noisy = torch.from_numpy(images()) + torch.randn(6, *SHAPE)
    denoised = ScoreDenoiser(model, 0.5)(noisy)[0]
    torch.testing.assert_close(denoised, model.denoise(noisy, 0.5).clamp(0, 1))
    assert not any("clip_values" in str(warning.message) for warning in recwarn)


def test_sigma_is_a_share_of_the_value_range(model):
    noisy = images() + 0.3
    expected = ScoreDenoiser(model, 0.3)(noisy)[0]
    found = ScoreDenoiser(model, 0.3, clip_values=(-1.0, 3.0))(4 * noisy - 1)[0]
    np.testing.assert_allclose((found + 1) / 4, expected, atol=1e-5)


def test_arts_smoothing_certifies_through_the_denoiser(model):
    """In ART's class the denoiser must see each noisy image before clipping, and once."""
    seen = []

    class Recorded(ScoreDenoiser):
        def purify(self, x, generator):
            seen.append(x)
            return super().purify(x, generator)

    torch.manual_seed(0)
    smoothed = PyTorchRandomizedSmoothing(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.CrossEntropyLoss(), SHAPE, 3, clip_values=(0.0, 1.0),
        preprocessing_defences=Recorded(model, 0.25), sample_size=50, scale=0.25,
    )  # fmt: skip
    labels = smoothed.predict(images(2))
    assert labels.shape == (2, 3)
    assert sum(map(len, seen)) == 100 and torch.cat(seen).min() < 0 and torch.cat(seen).max() > 1


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sigma", {"sigma": -0.1}),
        ("sigma", {"sigma": 1.5}),
        ("steps", {"steps": 0}),
        ("eta", {"eta": 1.5}),
        ("adaptive", {"adaptive": 0.05}),
        ("threshold", {"threshold": -1.0}),
        ("detection_sigma", {"detection_sigma": 0.0}),
        ("spared_sigma", {"spared_sigma": 2.0}),
        ("gradient", {"gradient": "none"}),
    ],
)
def test_errors_name_the_argument(model, name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        ScorePurifier(model, **arguments)
    purifier = ScorePurifier(model)
    with pytest.raises(ValueError, match=rf"^{name} "):
        purifier.set_params(**arguments)
    assert repr(purifier) == repr(ScorePurifier(model))


@pytest.mark.parametrize("make", [ScorePurifier, ScoreDenoiser])
def test_a_model_of_another_kind_is_refused(make):
    with pytest.raises(ValueError, match=r"^model "):
        make("digits")
    with pytest.raises(ValueError, match=r"^x "):
        make(ScoreModel((1, 4, 4), (4,), (1,)))(images())
