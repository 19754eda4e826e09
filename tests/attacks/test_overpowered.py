import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from torch import nn

from art_pixeldefend.attacks import OverpoweredAttack
from art_pixeldefend.classifiers import ManifoldAdversarialTrainer, Recipe
from art_pixeldefend.models.generator import VAE, Generator

SHAPE = (1, 2, 2)


class Affine(Generator):
    """G(z) = z / 4 + 0.5: all images are in its range."""

    def __init__(self):
        super().__init__()
        self.image_shape, self.latent_size = SHAPE, 4
        self.scale = nn.Parameter(torch.tensor(0.25))

    def forward(self, z):
        return (self.scale * z + 0.5).unflatten(1, SHAPE)


def classifier(weight=None, bias=0.0, seed=0, clip_values=(0.0, 1.0), generator_shape=SHAPE, classes=2):
    """A linear classifier; of two classes with the given weights of the second."""
    torch.manual_seed(seed)
    layer = nn.Linear(int(np.prod(generator_shape)), classes)
    if weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.stack((torch.zeros(4), torch.as_tensor(weight))))
            layer.bias.copy_(torch.tensor([0.0, bias]))
    model = nn.Sequential(nn.Flatten(), layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), generator_shape, classes, optimizer, clip_values=clip_values)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = VAE((1, 4, 4), latent_size=3, hidden=(8,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


W = np.array([3.0, -4.0, 0.0, 0.0], np.float32)


@pytest.mark.parametrize("clip_values", [(0.0, 1.0), (-2.0, 6.0)])
def test_of_a_linear_classifier_the_worst_pairs_lie_across_the_boundary_at_distance_eta(clip_values):
    """Its logit is w x + b: predictions differ most along w, by |w| eta, half of it on each side of the boundary."""
    low, high = clip_values
    # the classifier of images in [0, 1], in the units of its own range
    estimator = classifier(W / (high - low), 0.5 - float(W.sum()) / (high - low) * low, clip_values=clip_values)
    attack = OverpoweredAttack(estimator, Affine(), eta=0.4, max_iter=1000, learning_rate=0.006, multiplier_rate=0.05)
    pairs = attack.generate(count=5)
    assert pairs.valid.all()
    np.testing.assert_allclose(pairs.distance, 0.4, rtol=0.02)
    gap = (pairs.images[:, 0] - pairs.images[:, 1]).reshape(5, -1)
    assert (np.abs(gap @ W) > 0.99 * 5 * pairs.distance).all()
    middle = pairs.images.mean(1).reshape(5, -1) @ W + 0.5
    np.testing.assert_allclose(middle, 0, atol=0.1)
    p = 1 / (1 + np.exp(-5 * 0.4 / 2))  # the confidence in both classes
    np.testing.assert_allclose(pairs.confidence, p, atol=0.03)
    np.testing.assert_allclose(pairs.divergence, 2 * (2 * p - 1) * np.log(p / (1 - p)), rtol=0.1)


def test_a_classifier_that_does_not_see_the_image_has_no_pairs():
    pairs = OverpoweredAttack(classifier(np.zeros(4, np.float32), 1.0), Affine(), max_iter=20).generate(count=4)
    assert not pairs.valid.any() and np.allclose(pairs.divergence, 0, atol=1e-6)


def test_a_distance_of_zero_leaves_nothing():
    assert not OverpoweredAttack(classifier(W), Affine(), eta=0.0, max_iter=20).generate(count=4).valid.any()


def test_pairs_are_what_generator_and_classifier_say(vae):
    estimator = classifier(generator_shape=(1, 4, 4), classes=3)
    pairs = OverpoweredAttack(estimator, vae, max_iter=30).generate(count=6)
    images = vae(torch.from_numpy(pairs.latents).flatten(0, 1)).unflatten(0, (6, 2)).detach()
    torch.testing.assert_close(torch.from_numpy(pairs.images), images)
    answers = torch.from_numpy(estimator.predict(images.flatten(0, 1).numpy())).softmax(1)
    torch.testing.assert_close(torch.from_numpy(pairs.probabilities).flatten(0, 1), answers)
    assert (pairs.labels == answers.argmax(1).reshape(6, 2).numpy()).all()
    kl = torch.nn.functional.kl_div
    p, q = torch.from_numpy(pairs.probabilities).log().unbind(1)
    both = (kl(p, q, log_target=True, reduction="none") + kl(q, p, log_target=True, reduction="none")).sum(1)
    np.testing.assert_allclose(pairs.divergence, both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["near", "normal", "uniform"])
def test_pairs_depend_on_the_seed_and_not_on_the_batch_size(vae, start):
    estimator = classifier(generator_shape=(1, 4, 4), classes=3)
    first, again, other = (
        OverpoweredAttack(estimator, vae, max_iter=10, start=start, seed=seed, batch_size=size).generate(count=5)
        for seed, size in ((1, 100), (1, 2), (2, 100))
    )
    np.testing.assert_allclose(again.images, first.images, atol=1e-4)
    assert not np.allclose(other.images, first.images, atol=1e-2)


@pytest.mark.parametrize("preset", OverpoweredAttack.PRESETS)
def test_the_authors_settings_find_pairs_of_a_linear_classifier(preset):
    settings = {**OverpoweredAttack.PRESETS[preset], "eta": 0.5}
    pairs = OverpoweredAttack(classifier(10 * W), Affine(), **settings).generate(count=10)
    assert pairs.valid.mean() >= 0.5


def test_the_attack_leaves_the_classifier_s_parameters_and_gradients_alone(vae):
    estimator = classifier(generator_shape=(1, 4, 4), classes=3)
    before = {name: value.clone() for name, value in estimator.model.state_dict().items()}
    OverpoweredAttack(estimator, vae, max_iter=3).generate(count=3)
    assert all(torch.equal(value, before[name]) for name, value in estimator.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in [*estimator.model.parameters(), *vae.parameters()])


def test_pairs_may_begin_at_given_images(vae):
    estimator = classifier(generator_shape=(1, 4, 4), classes=3)
    x = np.random.default_rng(0).random((4, 1, 4, 4), dtype=np.float32)
    pairs = OverpoweredAttack(estimator, vae, max_iter=1, learning_rate=0.0).generate(x)
    expected = vae(vae.encode(torch.from_numpy(x))).detach()
    torch.testing.assert_close(torch.from_numpy(pairs.images[:, 0]), expected)
    with pytest.raises(ValueError, match=r"^x must be None"):
        OverpoweredAttack(classifier(W), Affine()).generate(x[:, :, :2, :2])
    with pytest.raises(ValueError, match=r"^x must be images \(N, 1, 4, 4\)"):
        OverpoweredAttack(estimator, vae).generate(x[:, 0])


def test_valid_pairs_are_drawn_with_their_labels(tmp_path):
    pairs = OverpoweredAttack(classifier(W, 0.5), Affine(), eta=0.5, max_iter=50).generate(count=3)
    pairs.draw(tmp_path / "pairs.png", classes=["shirt", "dress"], count=2)
    assert Image.open(tmp_path / "pairs.png").size == (240, 300)
    none = OverpoweredAttack(classifier(W), Affine(), eta=0.0, max_iter=1).generate(count=2)
    with pytest.raises(ValueError, match="valid pair"):
        none.draw(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eta", {"eta": -1.0}), ("max_iter", {"max_iter": 0}), ("learning_rate", {"learning_rate": -0.1}),
        ("optimizer", {"optimizer": "sgd"}), ("divergence", {"divergence": "kl"}), ("distance", {"distance": "linf"}),
        ("multiplier", {"multiplier": -1.0}), ("multiplier_rate", {"multiplier_rate": -1.0}), ("prior", {"prior": -1}),
        ("start", {"start": "far"}), ("batch_size", {"batch_size": 0}), ("seed", {"seed": -1}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        OverpoweredAttack(classifier(W), Affine(), **arguments)


def test_a_generator_of_other_images_is_refused(vae):
    with pytest.raises(ValueError, match=r"^generator "):
        OverpoweredAttack(classifier(W), vae)
    with pytest.raises(ValueError, match=r"^generator "):
        OverpoweredAttack(classifier(W), "digits")
    with pytest.raises(ValueError, match=r"^count "):
        OverpoweredAttack(classifier(W), Affine()).generate(count=0)


# Adversarial training


def brightness(count=200):
    """Images of two classes, told apart by a bright first pixel, and a little by the noisy last one."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, count)
    x = rng.uniform(0.4, 0.6, (count, 4)).astype(np.float32)
    x[:, 0] = 0.2 + 0.6 * y
    x[:, 3] = 0.48 + 0.04 * y
    return x.reshape(-1, *SHAPE), y


FAST = Recipe(100, batch_size=32, learning_rate=0.5, flips=False, weight_decay=0.0)


def trained(weight):
    estimator, (x, y) = classifier(W), brightness()
    attack = OverpoweredAttack(estimator, Affine(), eta=0.3, max_iter=20, learning_rate=0.1)
    optimizer = estimator.optimizer
    ManifoldAdversarialTrainer(estimator, attack, pairs=10, every=2, weight=weight, recipe=FAST).fit(x, y)
    assert estimator.optimizer is optimizer and not estimator.model.training
    return attack.generate(count=50), (estimator.predict(x).argmax(1) == y).mean()


def test_training_lowers_the_divergence_of_pairs_and_keeps_the_accuracy():
    (before, plain), (after, robust) = trained(0.0), trained(1.0)
    assert plain == 1 and robust >= 0.98
    assert after.divergence.mean() < 0.3 * before.divergence.mean()


def test_training_depends_on_its_seed():
    def weights(seed):
        estimator, (x, y) = classifier(W), brightness()
        attack = OverpoweredAttack(estimator, Affine(), eta=0.3, max_iter=5)
        recipe = Recipe(4, batch_size=32, learning_rate=0.1, flips=False)
        ManifoldAdversarialTrainer(estimator, attack, pairs=4, every=2, recipe=recipe, seed=seed).fit(x, y)
        return torch.cat([parameter.detach().flatten() for parameter in estimator.model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("weight", {"weight": -1.0}), ("pairs", {"pairs": 0}), ("every", {"every": 0}), ("seed", {"seed": -1})],
)
def test_errors_of_the_trainer_name_the_argument(name, arguments):
    estimator = classifier(W)
    attack = OverpoweredAttack(estimator, Affine())
    with pytest.raises(ValueError, match=rf"^{name} "):
        ManifoldAdversarialTrainer(estimator, attack, **arguments)
    with pytest.raises(ValueError, match=r"^attack "):
        ManifoldAdversarialTrainer(classifier(W), attack)
