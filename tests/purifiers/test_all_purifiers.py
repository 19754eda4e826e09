"""What every purifier of this package can do inside ART's ``PyTorchClassifier``."""

import copy
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import PurifiedModel
from art_pixeldefend.models.generator import VAE
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import (
    AdaptivePixelDefend,
    AdaptiveStep,
    DeepImagePrior,
    ManifoldProjection,
    PixelDefend,
    ScoreDenoiser,
    ScorePurifier,
)

pytestmark = pytest.mark.filterwarnings("ignore:the density model gives")  # the models here have random weights
SHAPE = (1, 8, 8)


def disturbed(model, scale):
    """A model whose layers all contribute, those that begin at zero too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def models(make_model):
    return {
        "pixel_cnn": make_model(SHAPE),
        "score": disturbed(ScoreModel(SHAPE, (8, 12), (1, 1), 8, mean=0.4, deviation=0.3), 0.1),
        "vae": disturbed(VAE(SHAPE, latent_size=4, hidden=(16,)), 0.3),
    }


PURIFIERS = {
    "PixelDefend": lambda m: PixelDefend(eps=16, pixel_cnn=m["pixel_cnn"]),
    "AdaptivePixelDefend": lambda m: AdaptivePixelDefend(eps=16, pixel_cnn=m["pixel_cnn"], threshold=3.0),
    "one pass": lambda m: ScorePurifier(m["score"], seed=0),
    "reverse diffusion": lambda m: ScorePurifier(m["score"], steps=3, seed=0),
    "ADP": lambda m: ScorePurifier(
        m["score"], steps=3, adaptive=AdaptiveStep(rate=0.3, largest=10.0, stop=0.0), seed=0
    ),
    "thresholded": lambda m: ScorePurifier(m["score"], threshold=8.0, spared_sigma=0.05, detection_sigma=0.1, seed=0),
    "identity gradient": lambda m: ScorePurifier(m["score"], gradient="identity", seed=0),
    "ScoreDenoiser": lambda m: ScoreDenoiser(m["score"], 0.2),
    "projection, identity": lambda m: ManifoldProjection(m["vae"], 10, 2, gradient="identity", seed=0),
    "projection, exact": lambda m: ManifoldProjection(m["vae"], 5, 2, gradient="exact", seed=0),
    "projection, implicit": lambda m: ManifoldProjection(m["vae"], 10, 2, gradient="implicit", seed=0),
    "DeepImagePrior": lambda m: DeepImagePrior(error=0.0, steps=10, channels=4, seed=0),
}
every_purifier = pytest.mark.parametrize("name", PURIFIERS)


def images(count=6, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def classifier(purifier, wrap=lambda network: network):
    torch.manual_seed(0)
    network = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3)))
    return PyTorchClassifier(
        network, nn.CrossEntropyLoss(), SHAPE, 3, clip_values=(0.0, 1.0), device_type="cpu",
        optimizer=torch.optim.SGD(network.parameters(), 0.1), preprocessing_defences=purifier,
    )  # fmt: skip


def attacked(defended, x, y, eps=0.1):
    return ProjectedGradientDescentPyTorch(defended, eps=eps, eps_step=eps / 3, max_iter=4, verbose=False).generate(
        x, y
    )


def loss(defended, x, y):
    return float(nn.functional.cross_entropy(torch.from_numpy(defended.predict(x)), torch.from_numpy(y)))


@every_purifier
def test_arts_pgd_attacks_through_it(models, name):
    defended, x, y = classifier(PURIFIERS[name](models)), images(), np.array([0, 1, 2, 0, 1, 2])
    found = attacked(defended, x, y)
    assert 0.05 < np.abs(found - x).max() <= 0.1 + 1e-6
    assert loss(defended, found, y) > loss(defended, x, y)


@every_purifier
def test_pgd_attacks_averaged_draws_in_one_module(models, name):
    purifier = PURIFIERS[name](models)
    defended, x, y = (
        classifier(None, lambda network: PurifiedModel(network, purifier, 2)),
        images(),
        np.array([0, 1, 2] * 2),
    )
    assert loss(defended, attacked(defended, x, y), y) > loss(defended, x, y)


@every_purifier
def test_copies_and_pickles_of_the_classifier_predict_the_same(models, name):
    defended, x = classifier(PURIFIERS[name](models)), images()
    expected, gradient = defended.predict(x), defended.class_gradient(x, 0)
    for other in (copy.deepcopy(defended), pickle.loads(pickle.dumps(defended))):
        np.testing.assert_array_equal(other.predict(x), expected)
        np.testing.assert_allclose(other.class_gradient(x, 0), gradient, rtol=1e-5, atol=1e-7)
    clean = classifier(None)
    assert not np.allclose(clean.predict(x), expected, atol=1e-3)  # the purifier has an effect


@every_purifier
def test_a_clone_for_refitting_purifies_the_same_and_is_trained(models, name):
    defended, x, y = classifier(PURIFIERS[name](models)), images(), np.array([0, 1, 2, 0, 1, 2])
    clone = defended.clone_for_refitting()
    before = clone.predict(x)
    clone.fit(x, y, nb_epochs=2, batch_size=3)
    assert not np.allclose(clone.predict(x), before, atol=1e-4)
    clone.model.load_state_dict(defended.model.state_dict())
    np.testing.assert_array_equal(clone.predict(x), defended.predict(x))


@every_purifier
def test_images_of_another_shape_are_refused_by_name(models, name):
    purifier = PURIFIERS[name](models)
    wrong = images(2, shape=(1, 3, 8) if isinstance(purifier, DeepImagePrior) else (1, 8, 7))
    with pytest.raises(ValueError, match=r"^x must .*(1, 8, 8|sides of at least 4)"):
        purifier(wrong)
