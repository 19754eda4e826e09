import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import AdaptivePixelDefend, ConformalDetector, ScorePurifier, datasets
from art_pixeldefend.attacks import DetectorAware, make_attack
from art_pixeldefend.classifiers import networks
from art_pixeldefend.detectors import DenoisingError, Likelihood, Score, ScoreNorm
from art_pixeldefend.purifiers import Purifier

EPS, COUNT = 32, 16


@pytest.fixture(scope="module")
def network(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.from_numpy(digits.x_train).float() / 255, torch.from_numpy(digits.y_train)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval()


def classifier(network, clip_values=(0, 1), side=8, **options):
    options = {"clip_values": clip_values, "device_type": "cpu"} | options
    return PyTorchClassifier(network, nn.CrossEntropyLoss(), (1, side, side), 10, **options)


@pytest.fixture(scope="module")
def digit_images(digits):
    return (digits.x_test[:COUNT] / 255).astype(np.float32), digits.y_test[:COUNT]


def fitted(scores, digits, **options):
    detector = ConformalDetector(scores, **options)
    detector.fit((digits.x_test[COUNT:] / 255).astype(np.float32))
    return detector


SCORES = {
    "score norm": lambda: ScoreNorm("digits-score", 0.1),
    "denoising error": lambda: DenoisingError("digits-score", 0.1, runs=2),
}


def unnoticed(estimator, detector, attacked, y):
    """Whether images are misclassified and not flagged."""
    return (estimator.predict(attacked).argmax(axis=1) != y) & ~detector.detect(attacked)[1]


def in_ball(attacked, x, eps):
    """Whether images are 8-bit images within ``eps`` levels of others."""
    levels = attacked * 255
    return np.abs(levels - levels.round()).max() < 1e-3 and np.abs(attacked - x).max() <= (eps + 1e-3) / 255


@pytest.fixture(scope="module")
def clothes():
    """A classifier of Fashion-MNIST, its detector by likelihood, test images and labels, and a blind attack on them."""
    data, estimator = datasets.load("fashion-mnist-500"), classifier(networks.load("fashion-mnist-resnet"), side=28)
    detector = ConformalDetector(Likelihood("fashion-mnist"))
    detector.fit((data.reserve().x[:100] / 255).astype(np.float32))
    x, y = (data.x_test[:10] / 255).astype(np.float32), data.y_test[:10]
    return estimator, detector, x, y, make_attack("bim", estimator, 24).generate(x, y)


def test_an_attack_that_knows_the_likelihood_beats_its_detector(clothes):
    estimator, detector, x, y, blind = clothes
    assert (estimator.predict(blind).argmax(axis=1) != y).all()
    assert unnoticed(estimator, detector, blind, y).mean() <= 0.1
    attack = DetectorAware(estimator, detector, eps=24 / 255, steps=20, methods=["orthogonal"], seed=0)
    aware = attack.generate(x, y)
    success = unnoticed(estimator, detector, aware, y)
    np.testing.assert_array_equal(attack.success, success)
    assert success.mean() >= 0.5 and in_ball(aware, x, 24)


@pytest.mark.parametrize("name", SCORES)
def test_an_attack_that_knows_a_score_beats_it_far_more_often_than_a_blind_one(name, network, digits, digit_images):
    estimator, detector, (x, y) = classifier(network), fitted(SCORES[name](), digits), digit_images
    blind = make_attack("bim", estimator, EPS).generate(x, y)
    assert (estimator.predict(blind).argmax(axis=1) != y).mean() > 0.7
    attack = DetectorAware(estimator, detector, eps=EPS / 255, steps=20, methods=["orthogonal", 1.0], seed=0)
    aware = attack.generate(x, y)
    success = unnoticed(estimator, detector, aware, y)
    np.testing.assert_array_equal(attack.success, success)
    assert success.mean() > unnoticed(estimator, detector, blind, y).mean() + 0.4 and in_ball(aware, x, EPS)


@pytest.mark.parametrize("combine", ["bonferroni", "harmonic", "cauchy", "joint"])
def test_a_combination_is_attacked_as_a_whole(combine, network, digits, digit_images):
    estimator, (x, y) = classifier(network), digit_images
    detector = fitted([score() for score in SCORES.values()], digits, combine=combine)
    blind = make_attack("bim", estimator, EPS).generate(x, y)
    attack = DetectorAware(estimator, detector, eps=EPS / 255, steps=20, methods=["selective"], seed=0)
    aware = unnoticed(estimator, detector, attack.generate(x, y), y)
    assert aware.mean() > unnoticed(estimator, detector, blind, y).mean() + 0.2


def test_every_method_adds_successes_and_says_which(network, digits):
    x, y = (digits.x_test[:32] / 255).astype(np.float32), digits.y_test[:32]
    estimator, detector = classifier(network), fitted(SCORES["score norm"](), digits)
    used = []
    for count in (1, 3):
        methods = [0.1, 10.0, "selective"][:count]
        attack = DetectorAware(estimator, detector, eps=16 / 255, steps=15, methods=methods, seed=0)
        np.testing.assert_array_equal(
            unnoticed(estimator, detector, attack.generate(x, y), y), attack.methods_used >= 0
        )
        used.append(attack.methods_used)
    np.testing.assert_array_equal(used[1] == 0, used[0] == 0)
    assert (used[1] == 0).any() and (used[1] == 1).any() and used[1].max() < 3


def test_misclassified_images_below_the_threshold_pass_adaptive_pixeldefend(clothes):
    estimator, _, x, y, blind = clothes
    purifier = AdaptivePixelDefend(eps=32, pixel_cnn="fashion-mnist", threshold=4.0)
    defended = classifier(networks.load("fashion-mnist-resnet"), side=28, preprocessing_defences=[purifier])
    likely = Likelihood("fashion-mnist")(torch.from_numpy(x)).numpy() < 3.5
    x, y, blind = x[likely], y[likely], blind[likely]
    assert len(x) >= 5
    attack = DetectorAware(estimator, purifier, eps=24 / 255, steps=20, methods=["orthogonal"], seed=0)
    attacked = attack.generate(x, y)
    wrong = defended.predict(attacked).argmax(axis=1) != y
    assert attack.success.sum() >= 2 and wrong[attack.success].all()
    assert wrong.mean() > (defended.predict(blind).argmax(axis=1) != y).mean()


def test_purification_and_detection_are_attacked_together(network, digits, digit_images):
    detector, (x, y) = fitted(SCORES["score norm"](), digits), digit_images
    estimator = classifier(network, preprocessing_defences=[ScorePurifier("digits-score", sigma=0.1, seed=0)])
    blind = make_attack("bim", estimator, EPS).generate(x, y)
    attack = DetectorAware(estimator, detector, eps=EPS / 255, steps=20, methods=["selective", 1.0], seed=0)
    attacked = attack.generate(x, y)
    assert attack.success.mean() > unnoticed(estimator, detector, blind, y).mean() + 0.1
    np.testing.assert_array_equal(attack.success, unnoticed(estimator, detector, attacked, y))


class Coarse(Score):
    """Differences of neighbouring pixels, in few steps, so that most images have the score of others."""

    unit, params = "", ()

    def score(self, x, generator):
        values = (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3))
        return values + ((20 * values).round() / 20 - values).detach()


@pytest.mark.parametrize("combine", ["bonferroni", "joint"])
@pytest.mark.parametrize("ties", ["random", "conservative"])
def test_success_is_what_the_detector_decides_about_tied_scores(combine, ties, network, digits):
    x, y = (digits.x_test[:64] / 255).astype(np.float32), digits.y_test[:64]
    estimator, detector = classifier(network), ConformalDetector(Coarse(), combine, 0.2, ties=ties)
    detector.fit((digits.x_test[64:] / 255).astype(np.float32))
    attack = DetectorAware(estimator, detector, eps=EPS / 255, steps=5, methods=["selective"], seed=0)
    attacked = attack.generate(x, y)
    np.testing.assert_array_equal(attack.success, unnoticed(estimator, detector, attacked, y))
    tied = np.isin(detector.detect(attacked)[0]["scores"], detector.calibration_scores)
    assert tied.mean() > 0.9 and 0 < attack.success.sum() < len(x)


class Noise(Purifier):
    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return (x + 0.4 * generator.normal(x.shape[1:])).clamp(0, 1)


def test_success_against_a_random_classifier_is_success_in_most_draws(network, digits):
    x, y = (digits.x_test[:40] / 255).astype(np.float32), digits.y_test[:40]
    estimator, detector = classifier(network, preprocessing_defences=[Noise()]), fitted(Coarse(), digits, alpha=0.02)
    attack = DetectorAware(estimator, detector, eps=8 / 255, steps=3, methods=["selective"], seed=0)
    attacked = attack.generate(x, y)
    torch.manual_seed(0)
    fresh = np.mean([unnoticed(estimator, detector, attacked, y) for _ in range(60)], axis=0)
    clear = np.abs(fresh - 0.5) > 0.3
    assert (attack.success == (fresh > 0.5))[clear].mean() > 0.9
    assert attack.success[clear].any() and not attack.success[clear].all()
    first = attack.success
    attack.generate(x, y)
    np.testing.assert_array_equal(attack.success, first)


def test_later_methods_draw_a_seeded_purifiers_numbers_for_the_places_of_images(network, digits):
    x, y = (digits.x_test[:48] / 255).astype(np.float32), digits.y_test[:48]
    estimator = classifier(network, preprocessing_defences=[Noise(seed=0)])
    detector = fitted(Coarse(), digits, alpha=0.02)
    attack = DetectorAware(estimator, detector, eps=8 / 255, steps=5, methods=[10.0, 0.0], seed=0)
    attacked = attack.generate(x, y)
    first, second = (attack._attack(method).generate(x, y, start=x) for method in attack.methods)
    left = ~unnoticed(estimator, detector, first, y)
    np.testing.assert_array_equal(attacked, np.where(left[:, None, None, None], second, first))
    np.testing.assert_array_equal(attack.success, unnoticed(estimator, detector, attacked, y))
    assert 0 < (attack.methods_used == 0).sum() < (attack.methods_used >= 0).sum()


class Scale(nn.Module):
    def forward(self, x):
        return x / 255


class ChannelsFirst(nn.Module):
    def forward(self, x):
        return x.movedim(-1, 1)


@pytest.mark.parametrize("detected", [(0, 1), (0, 255)])
def test_ranges_and_layouts_give_the_same_images(detected, network, digits, digit_images):
    (x, y), detector = (part[:6] for part in digit_images), fitted(SCORES["score norm"](), digits)
    options = {"eps": 12 / 255, "steps": 5, "methods": ["selective"], "seed": 0}
    attack = DetectorAware(classifier(network), detector, **options)
    expected = np.rint(255 * attack.generate(x, y))
    detector.set_params(clip_values=detected)
    scaled = classifier(nn.Sequential(Scale(), network), (0, 255))
    last = PyTorchClassifier(
        nn.Sequential(ChannelsFirst(), network), nn.CrossEntropyLoss(), (8, 8, 1), 10,
        clip_values=(0, 1), device_type="cpu", channels_first=False,
    )  # fmt: skip
    for estimator, scale, axis in ((scaled, 255, 1), (last, 1, -1)):
        same = DetectorAware(estimator, detector, **options | {"eps": scale * 12 / 255})
        found = same.generate(np.moveaxis(x, 1, axis) * np.float32(scale), y)
        levels = np.rint(np.moveaxis(found, axis, 1) * (255 / scale))
        assert (levels != expected).mean() < 0.01  # gradients are rounded differently
        np.testing.assert_array_equal(same.success, attack.success)
    assert np.abs(expected - 255 * x).max() > 10
    assert attack.generate(x[:0], y[:0]).shape == (0, 1, 8, 8)


def test_a_random_purifier_gets_colour_images_in_the_estimators_layout(digits):
    colour = np.repeat((digits.x_test[:40] / 255).astype(np.float32), 3, axis=1)
    detector = ConformalDetector(Coarse(), alpha=0.1)
    detector.fit(colour[8:])
    convolution = nn.Sequential(ChannelsFirst(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    last = PyTorchClassifier(
        convolution, nn.CrossEntropyLoss(), (8, 8, 3), 10, clip_values=(0, 1), device_type="cpu", channels_first=False,
        preprocessing_defences=[Noise()],
    )  # fmt: skip
    x = np.moveaxis(colour[:8], 1, -1)
    attack = DetectorAware(last, detector, eps=EPS / 255, steps=2, methods=["selective"], seed=0)
    assert attack.generate(x, digits.y_test[:8]).shape == x.shape and attack.success.shape == (8,)


def test_the_method_that_is_reported_is_of_images_on_which_it_succeeded(network, digits, monkeypatch):
    x, y = (digits.x_test[:2] / 255).astype(np.float32), digits.y_test[:2]
    attack = DetectorAware(classifier(network), fitted(Coarse(), digits), steps=1, methods=[1.0, 2.0], seed=0)
    judgements = iter([np.array([True, False]), np.array([False, True])])  # of other draws each time
    monkeypatch.setattr(attack, "_succeeds", lambda *args: next(judgements))
    attack.generate(x, y)
    assert attack.methods_used.tolist() == [-1, 1]


@pytest.mark.parametrize(
    "bad",
    [{"detector": "likelihood"}, {"methods": []}, {"methods": "selective"}, {"methods": ["greedy"]}, {"methods": [-1]},
     {"eps": -1}, {"steps": 0}, {"norm": "L1"}, {"batch_size": 0}],
)  # fmt: skip
def test_impossible_arguments_are_refused_by_name(bad, network, digits):
    detector = fitted(SCORES["score norm"](), digits)
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))} must"):
        DetectorAware(classifier(network), **{"detector": detector} | bad)
    with pytest.raises(ValueError, match=r"^detector must be fitted"):
        DetectorAware(classifier(network), ConformalDetector(SCORES["score norm"]()))


def test_gradient_steps_move_the_most_important_value_most(network, digit_images):
    from art_pixeldefend.attacks import AdaptivePGD

    estimator, (x, y) = classifier(network), digit_images
    options = {"eps": 0.1, "steps": 1, "schedule": "constant", "step_size": 0.05, "momentum": 0}
    change = {}
    for along in ("sign", "gradient"):
        attack = AdaptivePGD(estimator, along=along, **options)
        change[along] = np.abs(attack.generate(x, y, start=x) - x).reshape(len(x), -1)
    moved = change["gradient"].max(axis=1) > 0  # the others are wrong from the start, or worse than it
    assert moved.any() and np.median(change["gradient"][moved]) < 0.02
    assert change["gradient"].max() <= 0.0501 and np.median(change["sign"][change["sign"].max(axis=1) > 0]) > 0.0
