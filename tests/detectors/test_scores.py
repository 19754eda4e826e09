import copy
import zlib

import numpy as np
import pytest
import torch
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from scipy import special
from torch import nn

from art_pixeldefend import PixelDefend, ScorePurifier
from art_pixeldefend.detectors import (
    ComplexityCorrectedLikelihood,
    DenoisingError,
    Likelihood,
    LikelihoodRatio,
    PredictionChange,
    PurifierChange,
    Score,
    ScoreNorm,
)
from art_pixeldefend.detectors.scores import compressed_bytes
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import Purifier
from art_pixeldefend.purifiers.base import BatchGenerator

SHAPE = (1, 6, 6)
pytestmark = pytest.mark.filterwarnings("ignore:the density model gives")  # the models here have random weights


class Noisy(Purifier):
    """Adds noise: a purifier without a model."""

    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return x + 0.1 * generator.normal(x.shape[1:])


def network(shape=SHAPE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 4), nn.Dropout(0.5))


@pytest.fixture(scope="module")
def pixel_cnn(make_model):
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def score_model():
    torch.manual_seed(0)
    model = ScoreModel(SHAPE, channels=(8, 8), blocks=(1, 1), embedding=8, patch=1)
    for parameter in model.parameters():  # the last layer starts at zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def every(make_model, score_model):
    """One of each score, by name, in float64."""
    pixel_cnn, score_model = make_model(SHAPE).double(), copy.deepcopy(score_model).double()
    found = [
        Likelihood(pixel_cnn),
        LikelihoodRatio(pixel_cnn, make_model(SHAPE, seed=1).double()),
        ComplexityCorrectedLikelihood(pixel_cnn),
        ComplexityCorrectedLikelihood(pixel_cnn, codec="zlib"),
        ScoreNorm(score_model, sigma=0.1),
        DenoisingError(score_model, sigma=0.1, runs=2),
        PurifierChange(ScorePurifier(score_model, sigma=0.1)),
        PurifierChange(PixelDefend(eps=8, pixel_cnn=pixel_cnn)),
        PredictionChange(network().double(), ScorePurifier(score_model, sigma=0.1), runs=2),
        PredictionChange(network().double(), PixelDefend(eps=8, pixel_cnn=pixel_cnn)),
    ]
    return {f"{i} {type(score).__name__}": score for i, score in enumerate(found)}


NAMES = ["Likelihood", "LikelihoodRatio", "ComplexityCorrectedLikelihood", "ComplexityCorrectedLikelihood", "ScoreNorm",
         "DenoisingError", "PurifierChange", "PurifierChange", "PredictionChange", "PredictionChange"]  # fmt: skip
each = pytest.mark.parametrize("name", [f"{i} {name}" for i, name in enumerate(NAMES)])


@pytest.fixture(scope="module")
def levels(make_levels):
    return torch.from_numpy(make_levels(5, SHAPE))


@each
def test_scores_are_one_finite_number_for_each_image_whatever_the_batches(name, every, levels):
    score, x = every[name], levels / 255
    whole = score(x)
    assert whole.shape == (5,) and whole.isfinite().all() and score.unit
    parts = torch.cat([score(x[:2]), score(x[2:], start=2)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert score(x[:0]).shape == (0,)
    assert torch.equal(score(x), whole)  # the same seed


@each
def test_gradients_are_those_of_finite_differences(name, every, levels):
    score = every[name]
    x = (levels[:1] / 255 * 0.9 + 0.05 + 0.3 / 255).double()
    purifier = getattr(score, "purifier", None)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    if purifier is not None and purifier.gradient == "identity":
        return  # not the exact gradient by design
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if "Complexity" in name:
        score = Likelihood(score.model)  # the codec's length is piecewise constant
    step = 1e-5
    up, down = (score((x + sign * step * direction).requires_grad_()).item() for sign in (1, -1))
    numeric = (up - down) / (2 * step)
    assert numeric == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-5)


def test_likelihood_is_exact_on_levels_with_and_without_gradients(pixel_cnn, levels):
    expected, x = pixel_cnn.bits_per_dim(levels), levels / 255
    assert torch.equal(Likelihood(pixel_cnn)(x), expected)
    torch.testing.assert_close(Likelihood(pixel_cnn)(x.clone().requires_grad_()).detach(), expected, rtol=1e-5, atol=0)


def test_likelihood_is_continuous_where_values_are_moved_onto_levels(every, levels):
    score, x = every["0 Likelihood"], levels.double().clamp(1, 254) / 255
    for shift in (0.0011, -0.0011, 0.0009):
        torch.testing.assert_close(score(x + shift / 255), score(x), rtol=1e-4, atol=0)
    assert (score(x + 0.4 / 255) != score(x)).all() and torch.equal(score(x + 0.0009 / 255), score(x))


def test_images_that_ascend_the_gradient_are_less_likely_after_rounding(pixel_cnn, levels):
    score, x = Likelihood(pixel_cnn), (levels / 255).clamp(0.1, 0.9)
    before = score((x * 255).round() / 255)
    for _ in range(5):
        leaf = x.clone().requires_grad_()
        x = x + 2 / 255 * torch.autograd.grad(score(leaf).sum(), leaf)[0].sign()
    assert (score((x * 255).round() / 255) > before).all()


def test_likelihood_ratio_is_the_difference_of_the_likelihoods(pixel_cnn, make_model, levels):
    background, x = make_model(SHAPE, seed=1), levels / 255
    expected = pixel_cnn.bits_per_dim(levels) - background.bits_per_dim(levels)
    torch.testing.assert_close(LikelihoodRatio(pixel_cnn, background)(x), expected)


@pytest.mark.parametrize("codec", ["png", "zlib"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (2, 16, 16)])
def test_code_lengths_grow_with_complexity_and_count_no_headers(codec, shape):
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    constant, noisy = compressed_bytes(np.zeros(shape, np.uint8), codec), compressed_bytes(noise, codec)
    assert 0 < constant < 25 < noise.size * 0.9 < noisy < noise.size * 1.15
    if codec == "zlib":
        assert noisy == len(zlib.compress(noise.tobytes(), 9)) - 6


def test_complexity_correction_subtracts_the_code_length_in_bits_per_dimension(pixel_cnn, levels):
    bits = [8 * compressed_bytes(image.numpy()) / image.numel() for image in levels]
    difference = Likelihood(pixel_cnn)(levels / 255) - ComplexityCorrectedLikelihood(pixel_cnn)(levels / 255)
    torch.testing.assert_close(difference, torch.tensor(bits, dtype=torch.float64))


def test_score_norm_is_that_of_the_purifiers_threshold(score_model, levels):
    x = levels / 255
    purifier = ScorePurifier(score_model, detection_sigma=0.05)
    np.testing.assert_allclose(
        ScoreNorm(score_model, sigma=0.05)(x).detach(), purifier.score_norms(x.numpy()), rtol=1e-5
    )


def test_purifier_change_is_the_root_mean_square_change(pixel_cnn, levels):
    purifier = PixelDefend(eps=8, pixel_cnn=pixel_cnn)
    purified, _ = purifier(levels.numpy() / 255)
    expected = np.sqrt(((purified - levels.numpy() / 255) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(PurifierChange(purifier)(levels / 255), expected, atol=1e-6)


class Halved(Purifier):
    gradients = ("identity", "exact", "implicit")

    def purify(self, x, generator):
        return x / 2


@pytest.mark.parametrize("kind", [PurifierChange, PredictionChange])
def test_gradients_of_purification_are_those_that_the_purifier_is_told(kind, levels):
    def gradient(way):
        purifier = Halved(gradient=way)
        score = kind(purifier) if kind is PurifierChange else kind(network(), purifier)
        x = (levels[:3] / 255).requires_grad_()
        value = score(x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    value, exact = gradient("exact")
    for way in ("implicit", lambda x: x / 2):
        found = gradient(way)
        assert torch.equal(found[0], value) or torch.allclose(found[0], value)
        torch.testing.assert_close(found[1], exact)
    assert not torch.allclose(gradient("identity")[1], exact)


def test_gradient_of_no_change_is_zero():
    class Unchanged(Purifier):
        gradients = ("exact",)

        def purify(self, x, generator):
            return x * 1

    x = torch.rand(2, *SHAPE, requires_grad=True)
    PurifierChange(Unchanged(gradient="exact"))(x).sum().backward()
    assert (x.grad == 0).all()


def test_draws_are_independent_between_images_runs_and_seeds(levels):
    x = (levels / 255)[:1].repeat(2, 1, 1, 1)
    change = PurifierChange(Noisy(gradient="exact"))
    assert change(x)[0] != change(x)[1] and change(x)[0] != change(x, seed=1)[0]
    fresh = PurifierChange(Noisy(gradient="exact"), seed=None)
    assert (fresh(x) != fresh(x)).all()
    many = PurifierChange(Noisy(gradient="exact"), runs=200)(x)
    torch.testing.assert_close(many, torch.full((2,), 0.1), rtol=0.1, atol=0)


def test_prediction_change_is_the_distance_of_the_probabilities(levels):
    class Inverted(Purifier):
        gradients = ("exact",)

        def purify(self, x, generator):
            return 1 - x

    model, x = network().eval(), levels / 255
    expected = (model(x).softmax(1) - model(1 - x).softmax(1)).abs().sum(1).detach()
    model.train()
    score = PredictionChange(model, Inverted(gradient="exact"))
    torch.testing.assert_close(score(x).detach(), expected)
    assert model.training and model[2].training  # evaluated without dropout, and left as it was
    probabilities = nn.Sequential(network(), nn.Softmax(dim=1))
    torch.testing.assert_close(
        PredictionChange(probabilities, Inverted(gradient="exact"), output="probabilities")(x).detach(), expected
    )
    for clip_values in ((0, 1), (0, 255)):
        inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        inner[1].load_state_dict({"weight": model[1].weight / clip_values[1], "bias": model[1].bias})
        classifier = PyTorchClassifier(
            inner, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=clip_values, device_type="cpu"
        )
        score = PredictionChange(classifier, Inverted(gradient="exact"))
        leaf = x.clone().requires_grad_()
        value = score(leaf)
        torch.testing.assert_close(value.detach(), expected)
        assert torch.autograd.grad(value.sum(), leaf)[0].abs().max() > 0


def test_classifiers_of_other_frameworks_are_scored_and_refuse_gradients(levels):
    weights = np.random.default_rng(0).normal(size=(36, 4))

    def predict(x):  # of pixels in 0..255
        return special.softmax(x.reshape(len(x), -1) / 255 @ weights, axis=1)

    classifier = BlackBoxClassifier(predict, SHAPE, 4, clip_values=(0, 255))
    score = PredictionChange(classifier, Noisy(gradient="exact"), output="probabilities")
    x = levels[:3] / 255
    noisy = x + 0.1 * BatchGenerator(0, range(3)).normal(x.shape[1:])
    before, after = (predict(255 * images.numpy()) for images in (x, noisy))
    np.testing.assert_allclose(score(x), np.abs(before - after).sum(axis=1), rtol=1e-4)
    with pytest.raises(ValueError, match=r"^classifier must be a module or a PyTorchClassifier"):
        score(x.requires_grad_())


def test_fingerprints_are_equal_for_equal_scores_only(pixel_cnn, make_model, score_model):
    def build(sigma=0.1, eps=8, seed=0, model=pixel_cnn, **options):
        return [
            Likelihood(model),
            ScoreNorm(score_model, sigma),
            PurifierChange(PixelDefend(eps=eps, pixel_cnn=model, **options)),
            PredictionChange(network(), ScorePurifier(score_model, sigma, seed=seed)),
            PredictionChange(
                PyTorchClassifier(network(), nn.CrossEntropyLoss(), SHAPE, 4, clip_values=(0, 1)), Noisy()
            ),
        ]

    first = [score.fingerprint() for score in build()]
    assert len(set(first)) == 5 and first == [score.fingerprint() for score in build(batch_size=3, seed=4)]
    others = [score.fingerprint() for score in build(sigma=0.2, eps=9, model=make_model(SHAPE, seed=1))]
    assert [a == b for a, b in zip(first, others, strict=True)] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p, s: Likelihood(s), "model must be a PixelCNNpp"),
        (lambda p, s: ScoreNorm(p), "model must be a ScoreModel"),
        (lambda p, s: ScoreNorm(s, sigma=0), "sigma must"),
        (lambda p, s: DenoisingError(s, sigma=9), "sigma must"),
        (lambda p, s: DenoisingError(s, runs=0), "runs must"),
        (lambda p, s: DenoisingError(s, seed=-1), "seed must"),
        (lambda p, s: ComplexityCorrectedLikelihood(p, codec="gif"), "codec must be one of png, zlib"),
        (lambda p, s: LikelihoodRatio(p, "digits"), "background must be a model of images"),
        (lambda p, s: PurifierChange(p), "purifier must be a Purifier"),
        (lambda p, s: PredictionChange(3, Noisy()), "classifier must be a torch.nn.Module or an ART classifier"),
        (lambda p, s: PredictionChange(network(), Noisy(), output="votes"), "output must be one of"),
    ],
)
def test_impossible_arguments_are_refused_by_name(build, message, pixel_cnn, score_model):
    with pytest.raises(ValueError, match=f"^{message}"):
        build(pixel_cnn, score_model)


@pytest.mark.parametrize(
    "x",
    [np.zeros((1, *SHAPE)), torch.zeros(1, 1, 6, 7), torch.zeros(6, 6), torch.zeros(1, *SHAPE, dtype=torch.uint8),
     torch.full((1, *SHAPE), 255.0), torch.full((1, *SHAPE), torch.nan)],
)  # fmt: skip
def test_images_that_are_none_are_refused_by_name(x, pixel_cnn):
    with pytest.raises(ValueError, match=r"^x must"):
        Likelihood(pixel_cnn)(x)


def test_a_score_is_a_subclass_away():
    class Mean(Score):
        unit, params = "pixel values", ()

        def score(self, x, generator):
            return x.mean((1, 2, 3))

    assert Mean()(torch.full((2, 1, 3, 3), 0.5)).tolist() == [0.5, 0.5]
