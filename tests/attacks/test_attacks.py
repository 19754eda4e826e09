import numpy as np
import pytest
import torch
from art.attacks.evasion import CarliniLInfMethod, ProjectedGradientDescent
from art.defences.preprocessor import SpatialSmoothing
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend.attacks import (
    ATTACKS,
    PAPER,
    CarliniWagnerLInf,
    Clipped,
    DeepFoolLInf,
    HalfNormalBIM,
    HalfNormalFGSM,
    RandomNoise,
    TrainingPGD,
    make_attack,
    unclipped,
)
from art_pixeldefend.attacks.budget import bim_steps, clip_to_ball
from art_pixeldefend.attacks.training import frozen
from art_pixeldefend.detectors import ConformalDetector, Score
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.levels import from_levels, to_levels
from art_pixeldefend.purifiers.logits import differentiable_logits


def classifier(clip_values=(0.0, 1.0), seed=0, kind=PyTorchClassifier, **arguments):
    """A small network with a curved boundary, the same function of levels for any clip values."""
    torch.manual_seed(seed)
    low, high = clip_values
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        net[1].bias -= low / (high - low) * net[1].weight.sum(1)
        net[1].weight /= high - low
    return kind(net, nn.CrossEntropyLoss(), (1, 6, 6), 4, clip_values=clip_values, device_type="cpu", **arguments)


def images(clip_values=(0.0, 1.0), count=10):
    levels = np.random.default_rng(1).integers(0, 256, (count, 1, 6, 6)).astype(np.uint8)
    return from_levels(levels, clip_values)


def predictions(estimator, x):
    return estimator.predict(x).argmax(axis=1)


class Brightness(Score):
    """The mean of an image."""

    def score(self, x, generator):
        return x.mean((1, 2, 3))


def detector():
    fitted = ConformalDetector(Brightness())
    fitted.fit(images(count=50))
    return fitted


FAST = {
    "detector-aware": {"detector": detector(), "steps": 5},
    "cw": {"max_iter": 30},
    "cw-art": {"max_iter": 3, "largest_const": 0.01, "const_factor": 100.0},
}


@pytest.mark.parametrize("clip_values", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_stays_in_the_ball_and_on_the_8_bit_grid(name, clip_values):
    estimator, x = classifier(clip_values), images(clip_values, 4)
    attacked = make_attack(name, estimator, 8, **FAST.get(name, {})).generate(x)
    assert attacked.shape == x.shape and attacked.dtype == x.dtype
    levels = (attacked - clip_values[0]) / (clip_values[1] - clip_values[0]) * 255
    assert np.abs(levels - levels.round()).max() < 1e-3
    distance = np.abs(levels.round() - to_levels(x, clip_values))
    assert distance.max() <= 8
    # ART's CW thinks in units of the clip values: with (0, 255) it takes the input for near enough.
    assert distance.max() > 0 or (name, clip_values[1]) == ("cw-art", 255.0)


@pytest.mark.parametrize(
    "name", [name for name in ATTACKS if name not in ("rand", "cw-art") and not ATTACKS[name].needs]
)
def test_every_attack_but_noise_fools_an_undefended_classifier(name):
    estimator, x = classifier(), images(count=8) * 0.6 + 0.2
    y = predictions(estimator, x)
    attacked = unclipped(name, estimator, 32).generate(x, y)
    assert (predictions(estimator, attacked) == y).mean() < 0.5


@pytest.mark.parametrize("name", PAPER)
def test_the_same_seed_gives_the_same_images(name):
    estimator, x = classifier(), images()
    first, second = (make_attack(name, estimator, 8, seed=3, **FAST.get(name, {})).generate(x) for _ in range(2))
    assert np.array_equal(first, second)


def test_an_attack_that_needs_more_than_a_classifier_says_so_and_is_in_no_grid():
    with pytest.raises(ValueError, match=r"^detector must be a ConformalDetector"):
        make_attack("detector-aware", classifier(), 8)
    with pytest.raises(ValueError, match=r"^attacks must be one of .*, got 'detector-aware'"):
        Grid("digits", (Row("vgg"),), (8,), ("detector-aware",))


def test_attacks_do_not_depend_on_clip_values():
    results = []
    for clip_values in ((0.0, 1.0), (-1.0, 1.0)):
        attacked = make_attack("fgsm", classifier(clip_values), 8).generate(images(clip_values))
        results.append(to_levels(attacked, clip_values))
    assert (results[0] == results[1]).mean() > 0.99  # a gradient near 0 may change its sign by rounding


def test_random_noise_takes_every_level_of_its_range_about_equally_often():
    x = np.full((200, 1, 6, 6), 100 / 255, np.float32)
    noise = np.rint(RandomNoise(classifier(), eps=3).generate(x) * 255).astype(int) - 100
    values, counts = np.unique(noise, return_counts=True)
    assert values.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert counts.min() > 0.85 * noise.size / 7


def test_random_noise_differs_between_seeds():
    x = images()
    assert not np.array_equal(*(RandomNoise(classifier(), eps=3, seed=seed).generate(x) for seed in (0, 1)))


def test_clipping_goes_to_the_nearest_level_within_the_ball():
    x = np.array([0, 100, 100, 250], np.float32)
    attacked = np.array([-20, 103.4, 140, 255], np.float32)
    assert clip_to_ball(attacked, x, 8, (0.0, 255.0)).tolist() == [0, 103, 108, 255]


def test_fgsm_moves_every_pixel_with_a_gradient_by_eps():
    estimator, x = classifier(), images() * 0.8 + 0.1
    moved = np.abs(to_levels(make_attack("fgsm", estimator, 8).generate(x), (0, 1)).astype(int) - to_levels(x, (0, 1)))
    assert (moved == 8).mean() > 0.95


@pytest.mark.parametrize(("eps", "steps"), [(2, 2), (8, 10), (16, 20), (25, 29)])
def test_bim_takes_the_papers_number_of_steps(eps, steps):
    assert bim_steps(eps) == steps


def two_classes():
    """A linear classifier whose boundary is where the mean of the image is 1/2."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight[:] = torch.tensor([[1.0], [-1.0]])
        net[1].bias[:] = torch.tensor([-18.0, 18.0])
    return PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 6, 6), 2, clip_values=(0, 1), device_type="cpu")


def at_distance(linear, levels):
    """An image (1, 1, 6, 6) this many levels from the boundary of :func:`two_classes`, and not across it."""
    image = np.full((1, 1, 6, 6), 0.5 + levels / 255, np.float32)
    assert predictions(linear, image) == 0
    return image


@pytest.mark.parametrize("levels", [0.0, 2e-4, 5e-4, 9e-4, 0.5, 1.0])
def test_deepfool_moves_images_that_are_almost_on_the_boundary(levels):
    linear = two_classes()
    x = at_distance(linear, levels)
    attacked = DeepFoolLInf(linear).generate(x)
    assert predictions(linear, attacked) == 1
    assert np.abs(attacked - x).max() * 255 == pytest.approx(2 if levels == 1 else 1, abs=1e-2)


def test_deepfool_of_a_linear_classifier_stops_right_behind_the_boundary():
    estimator, x = classifier(), images(count=20) * 0.2 + 0.4
    linear = PyTorchClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), nn.CrossEntropyLoss(), (1, 6, 6), 2, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    logits = linear.predict(x)
    weight = (linear.model[1].weight[0] - linear.model[1].weight[1]).detach().numpy()
    exact = np.abs(logits[:, 0] - logits[:, 1]) / np.abs(weight).sum()
    attacked = DeepFoolLInf(linear).generate(x)
    assert (predictions(linear, attacked) != logits.argmax(1)).all()
    assert np.abs(attacked - x).max((1, 2, 3)) * 255 == pytest.approx(np.ceil(1.02 * exact * 255), abs=1e-2)
    assert (predictions(estimator, DeepFoolLInf(estimator).generate(x)) != predictions(estimator, x)).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_deepfool_returns_8_bit_images_that_fool_a_deep_network(seed):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(36, 32), *(m for _ in range(4) for m in (nn.ReLU(), nn.Linear(32, 32)))]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 3)).requires_grad_(False)
    for parameter in network.parameters():
        parameter *= 3
    deep = PyTorchClassifier(network, nn.CrossEntropyLoss(), (1, 6, 6), 3, clip_values=(0, 1), device_type="cpu")
    x = np.random.default_rng(seed).integers(0, 256, (40, 1, 6, 6)).astype(np.float32) / 255
    attacked = make_attack("deepfool", deep, eps=255).generate(x)
    assert np.array_equal(from_levels(to_levels(attacked, (0, 1)), (0, 1)), attacked)
    assert (predictions(deep, attacked) != predictions(deep, x)).all()


@pytest.mark.parametrize("kind", [DeepFoolLInf, CarliniWagnerLInf])
def test_attacks_of_bytes_are_those_of_floats(kind):
    estimator, x = classifier((0.0, 255.0)), np.rint(images((0.0, 255.0), count=4))
    assert np.array_equal(kind(estimator).generate(x.astype(np.uint8)), kind(estimator).generate(x))


def test_carlini_wagner_finds_smaller_changes_than_fgsm_needs():
    estimator, x = classifier(), images(count=12) * 0.6 + 0.2
    y = predictions(estimator, x)
    attacked = CarliniWagnerLInf(estimator, max_iter=100).generate(x)
    fooled = predictions(estimator, attacked) != y
    distance = np.abs(attacked - x).max((1, 2, 3))
    needed = np.full(len(x), np.inf)
    for eps in range(60, 0, -1):
        one_step = make_attack("fgsm", estimator, eps).generate(x)
        needed[predictions(estimator, one_step) != y] = eps / 255
    assert fooled.mean() > 0.9
    assert (distance[fooled] <= needed[fooled] + 1 / 255).mean() > 0.9


def test_carlini_wagner_returns_only_images_that_it_cannot_fool_as_they_were():
    linear = two_classes()
    near, far = (at_distance(linear, levels) for levels in (1.5, 100.0))
    attacked = CarliniWagnerLInf(linear, max_iter=5).generate(np.concatenate([near, far]))
    assert predictions(linear, attacked[:1]) != predictions(linear, near)
    assert 1 <= np.abs(attacked[:1] - near).max() * 255 <= 4
    assert np.array_equal(attacked[1:], far)


def test_carlini_wagner_does_not_depend_on_the_batch_size():
    estimator, x = classifier(), images(count=6)
    one, all_ = (CarliniWagnerLInf(estimator, max_iter=20, batch_size=size).generate(x) for size in (1, 6))
    assert np.allclose(one, all_, atol=2e-3)


def test_carlini_wagner_gets_away_from_the_labels_it_is_given():
    estimator, x = classifier(), images(count=6) * 0.6 + 0.2
    wrong = (predictions(estimator, x) + 1) % 4
    for y in (wrong, np.eye(4, dtype=np.float32)[wrong]):  # the images are away from these labels already
        assert np.abs(CarliniWagnerLInf(estimator).generate(x, y) - x).max() <= 1.001 / 255
    assert np.abs(CarliniWagnerLInf(estimator).generate(x) - x).max((1, 2, 3)).min() > 1.001 / 255


def test_carlini_wagner_follows_defences_that_the_classifier_gets_later():
    defence = Inverted(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)
    x, changed = images(count=4) * 0.6 + 0.2, classifier()
    attack = CarliniWagnerLInf(changed, max_iter=30)
    changed.set_params(preprocessing_defences=[defence])
    expected = CarliniWagnerLInf(classifier(preprocessing_defences=[defence]), max_iter=30).generate(x)
    np.testing.assert_array_equal(attack.generate(x), expected)
    changed.set_params(preprocessing_defences=None)
    np.testing.assert_array_equal(attack.generate(x), CarliniWagnerLInf(classifier(), max_iter=30).generate(x))


def test_arts_carlini_wagner_with_the_reference_constants_moves_no_pixel_by_a_level():
    # Why CarliniWagnerLInf exists; should ART change this, the registry's note has to change as well.
    estimator, x = classifier(), images(count=3) * 0.6 + 0.2
    settings = {"initial_const": 1e-5, "largest_const": 1e-3, "const_factor": 100.0, "max_iter": 100}
    arts = CarliniLInfMethod(estimator, learning_rate=5e-3, verbose=False, **settings).generate(x)
    ours = CarliniWagnerLInf(estimator).generate(x)
    assert np.abs(arts - x).max() < 1 / 255
    assert (predictions(estimator, ours) != predictions(estimator, x)).all()


class Inverted(PreprocessorPyTorch):
    """A preprocessor with a true gradient."""

    def forward(self, x, y=None):
        return 1 - x, y


@pytest.mark.parametrize(
    "defence",
    [
        None,
        Inverted(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True),
        Inverted(device_type="cpu", is_fitted=True, apply_fit=True, apply_predict=False),
        SpatialSmoothing(window_size=2, channels_first=True),
    ],
)
def test_logits_and_their_gradients_are_those_of_art_through_any_kind_of_defence(defence):
    estimator, x = classifier(preprocessing_defences=defence), images(count=5)
    tensor = torch.from_numpy(x).requires_grad_()
    logits = differentiable_logits(estimator, tensor)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), tensor)
    assert np.allclose(logits.detach(), estimator.predict(x), atol=1e-6)
    assert np.allclose(gradient, estimator.class_gradient(x, label=2)[:, 0], atol=1e-6)


@pytest.mark.parametrize("kind", [HalfNormalFGSM, HalfNormalBIM, TrainingPGD])
def test_training_attacks_do_not_read_the_labels_they_are_given(kind):
    x = images()
    wrong, none = np.eye(4)[np.zeros(10, int)], None
    first, second = (kind(classifier(), delta=8, seed=5).generate(x, y) for y in (wrong, none))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kind", [HalfNormalFGSM, HalfNormalBIM])
def test_training_radii_are_half_normal_and_truncated(kind):
    attack = kind(classifier(), delta=8)
    radii = attack._radii(20_000)
    assert radii.min() >= 0 and 15 < radii.max() <= 16
    assert radii.mean() == pytest.approx(8 * 0.723, rel=0.03)  # the mean of |N(0, 1)| given that it is at most 2
    moved = np.abs(attack.generate(images(count=50) * 0.6 + 0.2) - (images(count=50) * 0.6 + 0.2)).max((1, 2, 3)) * 255
    assert moved.max() <= 16.01 and len(np.unique(moved.round(2))) > 20


def test_the_pgd_of_training_stays_in_the_ball_and_raises_the_loss():
    estimator, x = classifier(), images(count=50)
    attacked = TrainingPGD(estimator, delta=8, seed=1).generate(x)
    assert np.abs(attacked - x).max() <= 8 / 255 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    labels = np.eye(4, dtype=np.float32)[estimator.predict(x).argmax(1)]
    assert (estimator.compute_loss(attacked, labels) > estimator.compute_loss(x, labels)).mean() > 0.9


def test_a_frozen_classifier_trains_again_afterwards_even_after_an_error():
    estimator = classifier()
    first, *others = estimator.model.parameters()
    first.requires_grad_(False)  # one that was frozen before stays so
    with pytest.raises(ZeroDivisionError), frozen(estimator):
        assert not any(parameter.requires_grad for parameter in estimator.model.parameters())
        raise ZeroDivisionError
    assert not first.requires_grad and all(parameter.requires_grad for parameter in others)


def test_freezing_leaves_the_gradient_in_the_images_as_it_was():
    estimator, x, y = classifier(), images(), np.eye(4, dtype=np.float32)[np.zeros(10, int)]
    free = estimator.loss_gradient(x, y)
    with frozen(estimator):
        assert np.array_equal(estimator.loss_gradient(x, y), free)


@pytest.mark.parametrize("eps", [-1, 256, 1.5, "8", None, True])
def test_a_radius_that_is_no_number_of_levels_is_refused(eps):
    with pytest.raises(ValueError, match="eps"):
        RandomNoise(classifier(), eps=eps)
    with pytest.raises(ValueError, match="eps"):
        make_attack("fgsm", classifier(), eps)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (CarliniWagnerLInf, {"learning_rate": "x"}),
        (CarliniWagnerLInf, {"learning_rate": 0}),
        (CarliniWagnerLInf, {"initial_const": None}),
        (CarliniWagnerLInf, {"largest_const": -1}),
        (CarliniWagnerLInf, {"const_factor": 1}),
        (CarliniWagnerLInf, {"const_factor": "x"}),
        (CarliniWagnerLInf, {"decrease_factor": 1}),
        (CarliniWagnerLInf, {"decrease_factor": 0}),
        (CarliniWagnerLInf, {"decrease_factor": [0.9]}),
        (CarliniWagnerLInf, {"max_iter": 0}),
        (CarliniWagnerLInf, {"batch_size": 1.5}),
        (DeepFoolLInf, {"overshoot": "x"}),
        (DeepFoolLInf, {"overshoot": -0.1}),
        (DeepFoolLInf, {"max_iter": "x"}),
        (HalfNormalFGSM, {"delta": "x"}),
        (HalfNormalFGSM, {"delta": 0}),
        (HalfNormalBIM, {"delta": float("nan")}),
    ],
)
def test_impossible_arguments_are_refused_by_name(kind, arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must"):
        kind(classifier(), **arguments)


def test_an_unknown_attack_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="fgsm"):
        make_attack("nope", classifier(), 8)


def test_an_estimator_without_clip_values_is_refused():
    estimator = PyTorchClassifier(nn.Flatten(), nn.CrossEntropyLoss(), (1, 6, 6), 36, device_type="cpu")
    with pytest.raises(ValueError, match="clip_values"):
        RandomNoise(estimator, eps=8)


@pytest.mark.parametrize("name", PAPER)
def test_no_images_give_no_images(name):
    x = images(count=1)[:0]
    if name in ("fgsm", "bim"):
        pytest.skip("ART's own attacks refuse an empty batch")
    assert make_attack(name, classifier(), 8).generate(x).shape == (0, 1, 6, 6)


def test_clipped_wraps_any_attack_of_art():
    estimator, x = classifier(), images()
    attack = ProjectedGradientDescent(estimator, eps=0.5, eps_step=0.1, max_iter=3, verbose=False)
    attacked = Clipped(attack, eps=4).generate(x)
    assert np.abs(to_levels(attacked, (0, 1)).astype(int) - to_levels(x, (0, 1))).max() == 4


def test_clipped_hands_on_the_labels_it_is_given():
    estimator, x = classifier(), images()
    attack = ProjectedGradientDescent(estimator, eps=4 / 255, eps_step=1 / 255, max_iter=4, verbose=False)
    y = np.eye(4, dtype=np.float32)[(predictions(estimator, x) + 1) % 4]
    attacked = Clipped(attack, eps=4).generate(x, y)
    np.testing.assert_array_equal(to_levels(attacked, (0, 1)), to_levels(attack.generate(x, y), (0, 1)))
    assert (attacked != Clipped(attack, eps=4).generate(x)).any()
