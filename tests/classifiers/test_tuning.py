import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend.classifiers import PurifiedTrainer, Recipe
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import Purifier, ScorePurifier

FAST = Recipe(60, batch_size=32, learning_rate=0.5, flips=False, weight_decay=0.0)


class Inverted(Purifier):
    """Black and white exchanged: a classifier of clean images is wrong on these until it is tuned."""

    def purify(self, x, generator):
        return 1 - x


class Recorded(Purifier):
    """The identity, with a parameter, and a record of the images and of the parameter's values."""

    params = [*Purifier.params, "sigma"]
    stochastic = True

    def __init__(self, sigma=0.25, **arguments):
        self.sigma, self.seen = sigma, []
        super().__init__(**arguments)

    def purify(self, x, generator):
        self.seen.append((self.sigma, x.numpy().copy(), generator.normal(()).numpy()))
        return x

    def _check_params(self):
        if not 0 <= self.sigma <= 1:
            raise ValueError(f"sigma must be in [0, 1], got {self.sigma}")
        super()._check_params()


def brightness(count=200, seed=0):
    """Images of two classes, dark and bright."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    return (rng.uniform(0, 0.5, (count, 1, 4, 4)) + 0.5 * y[:, None, None, None]).astype(np.float32), y


def linear(seed=0, **arguments):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    arguments = {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "clip_values": (0.0, 1.0)} | arguments
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 2, **arguments)


def accuracy(classifier, x, y):
    return (classifier.predict(x).argmax(1) == y).mean()


def weights(classifier):
    return [parameter.detach().clone() for parameter in classifier.model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tuned_classifier_is_right_on_purified_images():
    (x, y), defence = brightness(), Inverted()
    classifier = linear(preprocessing_defences=defence)
    classifier.fit(x, y, nb_epochs=30)  # the defence is not applied in training
    assert accuracy(classifier, x, y) < 0.2
    PurifiedTrainer(classifier, defence, recipe=FAST).fit(x, y)
    assert accuracy(classifier, x, y) > 0.95


@pytest.mark.parametrize("one_hot", [False, True])
def test_labels_may_be_class_numbers_or_one_hot(one_hot):
    x, y = brightness()
    classifier = linear()
    PurifiedTrainer(classifier, Inverted(), recipe=FAST).fit(x, np.eye(2, dtype=np.float32)[y] if one_hot else y)
    assert accuracy(classifier, 1 - x, y) > 0.95


def test_every_batch_is_purified_with_fresh_draws_and_parameters():
    defence, (x, y) = Recorded(seed=3), brightness()
    PurifiedTrainer(linear(), defence, {"sigma": (0.1, 0.4)}, Recipe(20, batch_size=8)).fit(x, y)
    sigmas, images, draws = zip(*defence.seen, strict=True)
    assert len(sigmas) == 20 and all(len(some) == 8 for some in images)
    assert 0.1 <= min(sigmas) < 0.2 and 0.3 < max(sigmas) <= 0.4
    assert len({float(draw[0]) for draw in draws}) == 20
    assert defence.sigma == 0.25 and defence.seed == 3


def test_images_are_mirrored_along_their_columns():
    x = np.tile(np.arange(4, dtype=np.float32) / 4, (40, 4, 1))  # columns that grow
    y = np.zeros(40, dtype=int)
    for images, axis, layout in ((x[:, None], 3, True), (x[..., None], 2, False)):
        defence = Recorded()
        defence.channels_first = layout
        classifier = linear(channels_first=layout)
        PurifiedTrainer(classifier, defence, recipe=Recipe(2, batch_size=40)).fit(images, y)
        _, seen, _ = defence.seen[0]
        grows = np.diff(seen[:, 0], axis=2).mean((1, 2)) > 0
        assert 5 < grows.sum() < 35, axis
        assert np.allclose(np.diff(seen[:, 0], axis=1), 0)


def test_the_same_seed_gives_the_same_weights():
    x, y = brightness()

    def tuned(seed):
        classifier = linear()
        PurifiedTrainer(classifier, Recorded(), recipe=Recipe(5, batch_size=16), seed=seed).fit(x, y)
        return weights(classifier)

    assert same(tuned(1), tuned(1)) and not same(tuned(1), tuned(2))


def test_the_optimiser_and_global_generators_are_left_as_they_were():
    classifier, (x, y) = linear(), brightness()
    optimizer, state, numpy_state = classifier.optimizer, torch.get_rng_state(), np.random.get_state()[1].copy()
    PurifiedTrainer(classifier, Recorded(), recipe=Recipe(3, batch_size=16)).fit(x, y)
    assert classifier.optimizer is optimizer and not optimizer.state
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert not classifier.model.training


def test_a_score_purifier_tunes():
    model = ScoreModel((1, 4, 4), (4,), (1,), 4)
    classifier, (x, y) = linear(), brightness()
    before = weights(classifier)
    trainer = PurifiedTrainer(classifier, ScorePurifier(model), {"sigma": (0.1, 0.4)}, Recipe(3, batch_size=16))
    trainer.fit(x, y)
    assert trainer.get_classifier() is classifier and not same(before, weights(classifier))


def test_divergence_is_an_error():
    x, y = brightness()
    with pytest.raises(FloatingPointError, match="learning_rate"):
        PurifiedTrainer(linear(), Recorded(), recipe=Recipe(30, batch_size=16, learning_rate=1e30)).fit(x, y)


def frozen():
    classifier = linear()
    classifier.model.requires_grad_(False)
    return classifier


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("classifier", lambda: PurifiedTrainer(nn.Linear(1, 1), Inverted())),
        ("classifier", lambda: PurifiedTrainer(linear(preprocessing_defences=Inverted(apply_fit=True)), Inverted())),
        ("classifier", lambda: PurifiedTrainer(frozen(), Inverted())),
        ("purifier", lambda: PurifiedTrainer(linear(), nn.Identity())),
        ("vary", lambda: PurifiedTrainer(linear(), Recorded(), {"eps": (0, 1)})),
        ("vary", lambda: PurifiedTrainer(linear(), Recorded(), {"sigma": (0.4, 0.1)})),
        ("sigma", lambda: PurifiedTrainer(linear(), Recorded(), {"sigma": (0.4, 2.0)})),
        ("x", lambda: PurifiedTrainer(linear(), Recorded()).fit(brightness()[0], np.zeros(3))),
    ],
)
def test_errors_name_the_argument(name, make):
    with pytest.raises(ValueError, match=rf"^{name} "):
        make()
