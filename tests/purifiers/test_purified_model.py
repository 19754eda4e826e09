"""A purifier and a classifier as one module: draws, combinations, gradients, and the life of a module."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_pixeldefend import PixelCNNpp, PixelDefend, PurifiedModel
from art_pixeldefend.purifiers import Purifier
from art_pixeldefend.purifiers.purified_model import COMBINATIONS, combined

pytestmark = pytest.mark.filterwarnings("ignore:the density model gives")  # the models here have random weights
SHAPE = (1, 4, 3)


class Smooth(Purifier):
    gradients = ("identity", "exact")

    def purify(self, x, generator):
        return 0.5 * x + 0.4 * torch.sin(x.roll(1, -1)) ** 2


class Noisy(Purifier):
    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return torch.sigmoid(x + generator.normal(x.shape[1:]))


def images(count=5, seed=0, dtype=torch.float64):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype=torch.float64, shape=SHAPE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


# Draws


@pytest.mark.parametrize("gradient", ["identity", "exact"])
def test_runs_of_a_deterministic_purifier_change_nothing(gradient):
    model = network()
    results = []
    for runs in (1, 5):
        x = images().requires_grad_()
        logits = PurifiedModel(model, Smooth(gradient=gradient), runs)(x)
        logits.square().sum().backward()
        results.append((logits, x.grad))
    assert torch.equal(results[0][0], model(Smooth()(images())[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("gradient", ["identity", "exact"])
def test_logits_and_gradients_are_the_means_of_the_draws(gradient):
    model, runs = network(), 3
    x = images().requires_grad_()
    logits = PurifiedModel(model, Noisy(gradient=gradient, seed=4), runs)(x)
    logits[:, 2].sum().backward()
    repeated = x.detach().repeat_interleave(runs, 0).requires_grad_()
    expected = model(Noisy(gradient=gradient, seed=4)(repeated)[0]).reshape(5, runs, 4)
    expected[..., 2].mean(1).sum().backward()
    torch.testing.assert_close(logits, expected.mean(1))
    torch.testing.assert_close(x.grad, repeated.grad.reshape(5, runs, *SHAPE).sum(1))
    assert expected.std(1).min() > 0


def test_without_a_seed_every_call_draws_afresh_and_with_one_batches_do_not_matter():
    x = images()
    fresh = PurifiedModel(network(), Noisy(), 2)
    assert not torch.equal(fresh(x), fresh(x))
    seeded = PurifiedModel(network(), Noisy(seed=1), 2)
    torch.testing.assert_close(seeded(x), seeded(x), rtol=0, atol=0)
    torch.testing.assert_close(seeded(x[:2]), seeded(x)[:2])


def test_more_runs_vary_less():
    x = images(1)
    deviations = []
    for runs in (1, 64):
        robust = PurifiedModel(network(), Noisy(), runs)
        torch.manual_seed(0)
        deviations.append(torch.stack([robust(x) for _ in range(40)]).std(0).mean())
    assert deviations[1] < 0.25 * deviations[0]  # an eighth, in expectation


# Combinations

draws = st.integers(1, 6).flatmap(
    lambda runs: st.lists(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), min_size=runs, max_size=runs)
)


@given(draws)
@settings(max_examples=100, deadline=None)
def test_softmax_is_the_log_of_the_mean_probability(rows):
    logits = torch.tensor([rows], dtype=torch.float64)
    torch.testing.assert_close(combined(logits, "softmax").exp(), logits.softmax(-1).mean(1))


@given(draws)
@settings(max_examples=100, deadline=None)
def test_votes_are_log_probabilities_whose_argmax_is_the_majority(rows):
    logits = torch.tensor([rows], dtype=torch.float64)
    output = combined(logits, "vote")
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    votes = torch.bincount(logits[0].argmax(-1), minlength=3)
    best = (votes == votes.max()).nonzero().flatten().tolist()
    assert output.argmax().item() in best
    p = logits.softmax(-1).mean(1)[0]
    if len(best) > 1:
        assert p[output.argmax()] >= p[best].max() - 1e-9


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_votes_pass_the_gradient_of_the_mean_probability_also_where_it_saturates(scale):
    logits = (scale * torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))).double()
    gradients = []
    for combine in ("softmax", "vote"):
        leaf = logits.clone().requires_grad_()
        combined(leaf, combine)[:, 0].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_single_draw_keeps_the_order_of_its_classes(combine):
    logits = torch.randn(7, 1, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combined(logits, combine).argsort(-1), logits[:, 0].argsort(-1))


# A module


def test_images_are_in_0_to_1_whatever_range_the_purifier_has_elsewhere():
    x, model = images(), network()
    expected = PurifiedModel(model, Smooth())(x)
    torch.testing.assert_close(PurifiedModel(model, Smooth((-1.0, 3.0)))(x), expected)


def test_modes_and_devices_of_all_models_follow_the_module(make_model):
    robust = PurifiedModel(network(torch.float32, (1, 6, 6)), PixelDefend(pixel_cnn=make_model((1, 6, 6))))
    assert robust.train().model.training and not robust.eval().model.training
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = robust(x)
    robust.train()
    assert torch.equal(robust(x), expected)  # no dropout in the density model
    robust.double()
    assert robust.purifier.pixel_cnn.dtype == torch.float64
    torch.testing.assert_close(robust(x.double()), expected.double())


def test_a_state_dict_holds_the_classifier_and_the_density_model(make_model):
    def build(seed):
        torch.manual_seed(seed)
        return PurifiedModel(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), PixelDefend(pixel_cnn=make_model((1, 6, 6), seed))
        )

    first, second = build(0), build(1)
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_copies_pickles_and_saved_modules_compute_the_same(make_model):
    robust = PurifiedModel(
        network(torch.float32, (1, 6, 6)), PixelDefend(pixel_cnn=make_model((1, 6, 6))), combine="vote"
    )
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.save(robust, file)
    file.seek(0)
    for again in (copy.deepcopy(robust), pickle.loads(pickle.dumps(robust)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), robust(x))
        assert again.purifier.pixel_cnn is again.purifier_model is not robust.purifier_model


def test_arts_attacks_follow_the_mean_gradient_of_the_draws():
    """Every image's loss rises, averaged over draws that the attack has not seen."""
    model = network(torch.float32)

    def classifier(purifier, runs):
        robust = PurifiedModel(model, purifier, runs)
        return PyTorchClassifier(robust, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=(0, 1), device_type="cpu")

    attacked_one, judge = classifier(Noisy(gradient="exact"), 20), classifier(Noisy(seed=1), 200)
    x = images(20, dtype=torch.float32).numpy()
    y = np.eye(4)[judge.predict(x).argmax(axis=1)]
    torch.manual_seed(0)
    attack = ProjectedGradientDescent(attacked_one, eps=0.3, eps_step=0.1, max_iter=5, verbose=False)
    assert (judge.compute_loss(attack.generate(x, y), y) > judge.compute_loss(x, y)).all()


def test_an_empty_batch_gives_no_rows():
    for combine in COMBINATIONS:
        assert PurifiedModel(network(), Noisy(), 3, combine)(torch.zeros(0, *SHAPE, dtype=torch.float64)).shape == (
            0,
            4,
        )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("model", {"model": None}),
        ("purifier", {"purifier": nn.Identity()}),
        ("runs", {"runs": 0}),
        ("runs", {"runs": 1.5}),
        ("combine", {"combine": "mean"}),
    ],
)
def test_impossible_arguments_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        PurifiedModel(**({"model": network(), "purifier": Smooth()} | arguments))


def test_an_art_classifier_is_refused_with_a_hint_that_works():
    classifier = PyTorchClassifier(network(), nn.CrossEntropyLoss(), SHAPE, 4, device_type="cpu")
    with pytest.raises(
        ValueError, match=r"^model must be a torch\.nn\.Module, got PyTorchClassifier: pass classifier\.model$"
    ):
        PurifiedModel(classifier, Smooth())
    assert PurifiedModel(classifier.model, Smooth())(images()).shape == (5, 4)
    with pytest.raises(ValueError, match=r"got int$"):
        PurifiedModel(3, Smooth())


def test_arrays_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^x must be a torch.Tensor, got ndarray"):
        PurifiedModel(network(), Noisy())(images().numpy())


def test_integer_images_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^x must"):
        PurifiedModel(network(), Smooth())(torch.zeros(2, *SHAPE, dtype=torch.uint8))


def test_a_purifier_whose_model_was_replaced_is_refused():
    x = torch.rand(2, 1, 8, 8)
    purifier = PixelDefend(eps=8, pixel_cnn="digits")
    robust = PurifiedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), purifier)
    robust(x)
    purifier.set_params(pixel_cnn=PixelCNNpp((1, 8, 8), filters=4, resnets=1))
    with pytest.raises(RuntimeError, match="model was replaced"):
        robust(x)
