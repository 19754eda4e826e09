import numpy as np
import pytest
import torch

from art_pixeldefend.models import zoo
from art_pixeldefend.models.generator import VAE, Generator
from art_pixeldefend.models.training import Settings, train

SHAPES = [(1, 8, 8), (3, 9, 7), (2, 1, 1)]


def tiny(image_shape=(1, 8, 8), seed=0, **sizes):
    torch.manual_seed(seed)
    return VAE(image_shape, **({"latent_size": 3, "hidden": (12,)} | sizes)).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
def test_latents_become_images_and_images_latents(shape, hidden):
    model = tiny(shape, hidden=hidden)
    images = model(torch.randn(4, 3))
    assert images.shape == (4, *shape) and 0 <= images.min() <= images.max() <= 1
    assert model.encode(images).shape == (4, 3)


def test_the_loss_is_the_evidence_lower_bound_of_the_best_variance():
    """-log N(x; G(z), v) averaged over sub-pixels is log(2 pi v) / 2 + 1/2 for the best v, the mean square error."""
    model, levels = tiny(), torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(1)
    loss = model.loss(levels)
    torch.manual_seed(1)
    mean, log_variance = model.posterior(levels / 255)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    images = model(posterior.mean + posterior.stddev * torch.randn(20, 3))
    variance = (images - levels / 255).square().mean()
    log_density = torch.distributions.Normal(images, variance.sqrt()).log_prob(levels / 255).mean()
    prior = torch.distributions.Normal(torch.zeros(20, 3), 1.0)
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean() / 64
    constant = (1 + np.log(2 * np.pi)) / 2
    torch.testing.assert_close(loss, divergence - log_density - constant)


def test_training_learns_to_reconstruct(digits, tmp_path):
    torch.manual_seed(0)
    model = VAE((1, 8, 8), latent_size=8, hidden=(64,))
    before = model.evaluate(digits.x_test)["rmse"]
    settings = Settings(steps=300, batch_size=64, learning_rate=3e-3, warmup=20)
    train(model, VAE.loss, digits.x_train, settings, tmp_path / "run", held_out=digits.x_test,
          evaluate=VAE.evaluate, verbose=False)  # fmt: skip
    assert model.evaluate(digits.x_test)["rmse"] < 0.6 * before
    assert model.provenance["test_rmse"] == pytest.approx(model.evaluate(digits.x_test)["rmse"])
    assert type(zoo.load(tmp_path / "run" / "model.safetensors", "cpu")) is VAE


def test_the_evaluation_averages_the_errors_of_images(digits):
    model, x = tiny(), digits.x_test[:7]
    with torch.no_grad():
        images = model(model.encode(torch.from_numpy(x) / 255)).numpy()
    expected = np.sqrt(((images - x / 255) ** 2).mean((1, 2, 3))).mean()
    assert model.evaluate(x)["rmse"] == pytest.approx(expected, rel=1e-5)


def test_samples_are_images_of_the_prior_and_depend_on_the_seed_alone():
    model = tiny()
    torch.manual_seed(1)
    first = model.sample(3, seed=5)
    torch.manual_seed(2)
    assert torch.equal(model.sample(3, seed=5), first) and not torch.equal(model.sample(3, seed=6), first)
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, (model(z) * 255).round().to(torch.uint8))


def test_a_saved_model_is_the_same_model(tmp_path):
    model = tiny()
    model.save(tmp_path / "model.safetensors")
    z = torch.randn(2, 3)
    assert torch.equal(VAE.load(tmp_path / "model.safetensors")(z), model(z))


class Plain(Generator):
    """A generator of a user, without an encoder."""

    def __init__(self):
        super().__init__()
        self.image_shape, self.latent_size, self.layer = (1, 2, 2), 3, torch.nn.Linear(3, 4)

    def forward(self, z):
        return self.layer(z).unflatten(1, self.image_shape)


def test_a_generator_may_have_no_encoder():
    assert tiny().encodes and not Plain().encodes
    with pytest.raises(NotImplementedError, match="Plain has no encoder"):
        Plain().encode(torch.rand(1, 1, 2, 2))


def test_generators_of_any_class_are_accepted_where_one_is_needed():
    model = Plain()
    assert zoo.as_model(model, Generator) is model
    with pytest.raises(ValueError, match=r"^model must be a Generator.* got 'digits', a PixelCNNpp"):
        zoo.as_model("digits", Generator, "cpu")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("image_shape", {"image_shape": (8, 8)}),
        ("latent_size", {"latent_size": 0}),
        ("hidden", {"hidden": (8, 0)}),
        ("hidden", {"hidden": 8}),
    ],
)
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        VAE(**({"image_shape": (1, 8, 8)} | arguments))
    with pytest.raises(ValueError, match=r"^count "):
        tiny().sample(-1)
