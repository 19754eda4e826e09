"""PixelDefend under ART's attacks and trainers and with smoothing, and PurifiedModel under other packages' attacks."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    BasicIterativeMethod,
    NewtonFool,
    ShadowAttack,
    TargetedUniversalPerturbation,
    VirtualAdversarialMethod,
    ZooAttack,
)
from art.defences.trainer import AdversarialTrainerFBFPyTorch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.expectation_over_transformation import EoTBrightnessPyTorch
from torch import nn

from art_pixeldefend import PixelDefend, PurifiedModel
from art_pixeldefend.purifiers import Purifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:the density model gives"),  # the models here have random weights
    pytest.mark.filterwarnings("ignore:images have values outside"),
]
SHAPE = (1, 6, 6)


def network(classes=4, shape=SHAPE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 16), nn.Tanh(), nn.Linear(16, classes))


@pytest.fixture(scope="module")
def pixel_cnn(make_model):
    return make_model(SHAPE)


@pytest.fixture
def build(pixel_cnn):
    """A defended classifier of a given ART class."""

    def build(cls=PyTorchClassifier, model=None, clip_values=(0.0, 1.0), **options):
        model = model or network()
        return cls(
            model, loss=nn.CrossEntropyLoss(), input_shape=SHAPE, nb_classes=4, clip_values=clip_values,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01), device_type="cpu",
            preprocessing_defences=[PixelDefend(clip_values, eps=4, pixel_cnn=pixel_cnn)], **options,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def x(make_levels):
    return (make_levels(2, SHAPE, seed=3) / 255).astype(np.float32)


# Attacks that evaluate images outside clip_values


def zoo(classifier):
    return ZooAttack(
        classifier, max_iter=3, nb_parallel=4, binary_search_steps=1, variable_h=0.2,
        use_resize=False, use_importance=False, verbose=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attack", "count"),
    [
        (lambda c: NewtonFool(c, max_iter=2, verbose=False), 2),
        (lambda c: ShadowAttack(c, nb_steps=2, batch_size=2, verbose=False), 1),
        (lambda c: VirtualAdversarialMethod(c, max_iter=2, verbose=False), 2),
        (zoo, 2),
    ],
    ids=["NewtonFool", "ShadowAttack", "VirtualAdversarialMethod", "ZOO"],
)
def test_arts_attacks_run_through_the_defence(build, x, attack, count):
    classifier = build(
        model=nn.Sequential(network(), nn.Softmax(dim=1))
    )  # VirtualAdversarialMethod needs probabilities
    attacked = attack(classifier).generate(x[:count])
    assert attacked.shape == x[:count].shape and np.isfinite(attacked).all()


def test_a_universal_perturbation_runs_through_the_defence(build, x):
    attack = TargetedUniversalPerturbation(build(), max_iter=1, attacker="fgsm", attacker_params={"eps": 0.3})
    assert np.isfinite(attack.generate(x, np.eye(4, dtype=np.float32)[[3, 3]])).all()


def test_randomized_smoothing_runs_through_the_defence(build, x):
    """Noise is added before the defence, most of it outside the range of values."""
    smoothed = build(PyTorchRandomizedSmoothing, sample_size=4, scale=0.5, alpha=0.1)
    np.testing.assert_array_equal(smoothed.predict(x, is_abstain=False).sum(axis=1), 1)
    assert np.abs(smoothed.loss_gradient(x, np.eye(4, dtype=np.float32)[:2])).max() > 0


def test_a_smoothed_classifier_is_certified_through_the_defence(build, x):
    pytest.importorskip("statsmodels", reason="ART certifies with statsmodels, which is not installed")
    prediction, radius = build(PyTorchRandomizedSmoothing, sample_size=4, scale=0.5, alpha=0.1).certify(x, n=20)
    assert prediction.shape == radius.shape == (2,)


def test_the_fast_adversarial_trainer_runs_through_the_defence(build, x):
    classifier = build()
    before = [parameter.clone() for parameter in classifier.model.parameters()]
    trainer = AdversarialTrainerFBFPyTorch(classifier, eps=0.3)
    trainer.fit(x, np.eye(4, dtype=np.float32)[:2], nb_epochs=2, batch_size=2)  # the learning rate ends at 0
    assert any(not torch.equal(a, b) for a, b in zip(before, classifier.model.parameters(), strict=True))


def test_an_array_of_clip_values_serves_classifier_and_defence(build, pixel_cnn, x):
    """One minimum and maximum for each pixel, as ART allows: here those of images normalised pixel by pixel."""
    rng = np.random.default_rng(0)
    mean, std = rng.random(SHAPE).astype(np.float32), rng.uniform(0.5, 2, SHAPE).astype(np.float32)
    defended = build(clip_values=((0 - mean) / std, (1 - mean) / std))
    plain = PixelDefend(eps=4, pixel_cnn=pixel_cnn)
    (purified, _), normalised = plain(x), (x - mean) / std
    expected = defended.model(torch.from_numpy((purified - mean) / std)).detach()
    np.testing.assert_allclose(defended.predict(normalised), expected, rtol=1e-4, atol=1e-5)
    attack = BasicIterativeMethod(defended, eps=0.2, eps_step=0.1, max_iter=2, verbose=False)
    assert np.abs(attack.generate(normalised) - normalised).max() > 0.05


class Noisy(Purifier):
    """Stochastic and differentiable."""

    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return torch.sigmoid(x + generator.normal(x.shape[1:]))


def test_purifiers_are_chained_with_arts_own_preprocessors(pixel_cnn, x):
    """The gradient passes through ART's augmentation, a stochastic purifier and PixelDefend, in this order."""
    brighter = EoTBrightnessPyTorch(nb_samples=1, clip_values=(0.0, 1.0), delta=(0.1, 0.1), apply_predict=True)
    steps = [brighter, Noisy(seed=1, gradient="exact"), PixelDefend(eps=4, pixel_cnn=pixel_cnn)]
    model = network()
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=(0, 1), preprocessing_defences=steps, device_type="cpu"
    )
    assert classifier.all_framework_preprocessing
    by_hand = torch.from_numpy(x).requires_grad_()
    purified = steps[1].forward(brighter.forward(by_hand)[0])[0]
    model(steps[2].forward(purified)[0])[:, 1].sum().backward()
    np.testing.assert_allclose(classifier.class_gradient(x, 1)[:, 0], by_hand.grad, rtol=1e-5, atol=1e-7)
    again = [copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))]
    for other in again:
        np.testing.assert_array_equal(other.predict(x), classifier.predict(x))


def test_a_clone_for_refitting_keeps_a_stochastic_purifier(x):
    model = network()
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=(0, 1), preprocessing_defences=[Noisy(seed=3)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01), device_type="cpu",
    )  # fmt: skip
    (defence,) = classifier.clone_for_refitting().preprocessing_defences
    np.testing.assert_array_equal(defence(x)[0], Noisy(seed=3)(x)[0])


# Accuracy


def test_purification_restores_most_of_the_accuracy_that_an_attack_takes(digits, digits_model):
    model = network(10, (1, 8, 8))

    def classifier(defences=None):
        return PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=torch.optim.Adam(model.parameters(), 1e-2),
            clip_values=(0, 1), preprocessing_defences=defences, device_type="cpu",
        )  # fmt: skip

    bare, defended = classifier(), classifier([PixelDefend(eps=32, pixel_cnn=digits_model)])
    bare.fit(digits.x_train.astype(np.float32) / 255, digits.y_train, nb_epochs=10, batch_size=64)
    x, y = digits.x_test[:150].astype(np.float32) / 255, digits.y_test[:150]
    attack = BasicIterativeMethod(bare, eps=32 / 255, eps_step=6 / 255, max_iter=10, verbose=False)
    attacked = attack.generate(x, y)

    def accuracy(classifier, x):
        return (classifier.predict(x).argmax(axis=1) == y).mean()

    assert accuracy(bare, x) > 0.9 and accuracy(defended, x) > 0.9
    assert accuracy(bare, attacked) < 0.35
    assert accuracy(defended, attacked) > accuracy(bare, attacked) + 0.3


# Other packages


@pytest.fixture
def robust(pixel_cnn):
    return PurifiedModel(network(), PixelDefend(eps=4, pixel_cnn=pixel_cnn)).eval()


def test_autoattack_runs_on_a_purified_model(robust, x):
    pyautoattack = pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
    inputs = torch.from_numpy(x)
    y = robust(inputs).argmax(1)
    adversary = pyautoattack.AutoAttack(
        robust, norm="Linf", eps=0.1, version="custom", attacks=["apgd-ce", "apgd-dlr", "fab", "square"], seed=0
    )
    adversary.apgd.n_iter, adversary.apgd.n_restarts, adversary.square.n_queries = 3, 1, 5
    adversary.fab.n_iter, adversary.fab.n_restarts = 2, 1
    attacked, _ = adversary.run_standard_evaluation(inputs, y)
    assert attacked.shape == inputs.shape and (attacked - inputs).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PGD", {"eps": 0.1, "steps": 2}),
        ("SPSA", {"eps": 0.1, "nb_iter": 1, "nb_sample": 4, "max_batch_size": 4}),
        ("NIFGSM", {"eps": 0.1, "steps": 2}),
        ("SparseFool", {"steps": 1}),
    ],
)
def test_attacks_of_torchattacks_run_on_a_purified_model(robust, x, name, options):
    torchattacks = pytest.importorskip("torchattacks", reason="the package torchattacks is not installed")
    inputs = torch.from_numpy(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attacked = getattr(torchattacks, name)(robust, **options)(inputs, robust(inputs).argmax(1))
    assert attacked.shape == inputs.shape and attacked.isfinite().all()


def test_arts_autoattack_runs_through_the_defence(build, x):
    pytest.importorskip("multiprocess", reason="multiprocess, which ART's AutoAttack needs, is not installed")
    from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent

    classifier = build()
    apgd = AutoProjectedGradientDescent(classifier, eps=0.1, eps_step=0.05, max_iter=2, nb_random_init=1, verbose=False)
    y = np.eye(4, dtype=np.float32)[classifier.predict(x).argmax(axis=1)]
    attacked = AutoAttack(classifier, eps=0.1, eps_step=0.05, attacks=[apgd]).generate(x, y)
    assert np.abs(attacked - x).max() <= 0.1 + 1e-6
