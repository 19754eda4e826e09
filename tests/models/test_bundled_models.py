"""The models that come with the package: what their cards say, and that fast decoding is exact on them."""

import numpy as np
import pytest

from art_pixeldefend import PixelCNNpp, greedy_decode
from art_pixeldefend.models import zoo
from art_pixeldefend.models.generator import VAE
from art_pixeldefend.models.score import ScoreModel

SETTINGS = ("dropout", "learning_rate", "warmup", "decay", "average", "seed")


@pytest.mark.parametrize("name", zoo.names("pixelcnnpp"))
def test_every_density_model_has_a_card_that_states_its_header(name):
    model, card = PixelCNNpp.from_pretrained(name), zoo.path(name).with_suffix(".md").read_text()
    header = model.provenance
    assert name.startswith(header["dataset"])
    assert f"**{header['test_bits_per_dim']:.4f} bits/dim**" in card
    assert f"{model.filters} filters, {model.resnets} resnets per stage, {model.mixtures} logistic components" in card
    runs = [{"dropout": model.dropout} | header, *([header["start"]] if "start" in header else [])][::-1]
    for number, run in enumerate(runs, 1):
        images = run["batch_size"] * run.get("processes", 1)
        assert "| ".join(map(str, ["", f"{number} ", f"{run['steps']} ", f"{images} "])) in card
        assert " | ".join(str(run.get(setting, "-")) for setting in SETTINGS) in card


@pytest.mark.parametrize("name", zoo.names("score"))
def test_every_score_model_has_a_card_that_states_its_header(name):
    model, path = ScoreModel.from_pretrained(name), zoo.path(name)
    card = path.with_suffix(".md").read_text()
    errors = [model.provenance[f"test_rmse_{sigma}"] for sigma in ("0.1", "0.25", "0.5")]
    assert " / ".join(f"{error:.3f}" for error in errors) in card
    assert f" train {model.provenance['dataset']} --kind score" in card
    assert path.stat().st_size <= 2.5e6


@pytest.mark.parametrize("name", zoo.names("vae"))
def test_every_vae_has_a_card_that_states_its_header(name):
    model, path = VAE.from_pretrained(name), zoo.path(name)
    card, header = path.with_suffix(".md").read_text(), model.provenance
    assert f"**{header['test_rmse']:.4f} RMSE**" in card and f"{header['test_kl']:.1f} nats" in card
    run = f"--steps {header['steps']} --batch-size {header['batch_size']} --learning-rate 1e-3"
    assert f"art-pixeldefend train {header['dataset']} --kind vae --out run {run}" in card
    assert header["learning_rate"] == 1e-3 and f"{model.latent_size} latents" in card
    assert path.stat().st_size <= 3e6


def test_fashion_mnist_reconstruction_error_is_what_its_card_says(fashion_mnist):
    model = VAE.from_pretrained("fashion-mnist-vae")
    for name, value in model.evaluate(fashion_mnist.x_test).items():
        assert value == pytest.approx(model.provenance[f"test_{name}"], rel=1e-3)


def test_digits_denoising_errors_are_what_the_card_says(digits):
    model = ScoreModel.from_pretrained("digits-score")
    for name, error in model.evaluate(digits.x_test).items():
        assert error == pytest.approx(model.provenance[f"test_{name}"], abs=1e-4)


def test_digits_bits_per_dim_is_what_its_card_says(digits, digits_model):
    assert digits_model.bits_per_dim(digits.x_test).mean().item() == pytest.approx(
        digits_model.provenance["test_bits_per_dim"], abs=1e-4
    )


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-40x5"])
def test_fashion_mnist_bits_per_dim_is_near_what_its_card_says_on_some_test_images(fashion_mnist, name):
    """All 10,000 take minutes: ``art-pixeldefend score fashion-mnist --model fashion-mnist``."""
    model = PixelCNNpp.from_pretrained(name)
    bits = model.bits_per_dim(fashion_mnist.x_test[:200]).numpy()
    error = bits.std() / np.sqrt(len(bits))
    assert abs(bits.mean() - model.provenance["test_bits_per_dim"]) < 4 * error


def attacked(x, eps, seed=0):
    """Images whose every sub-pixel is moved by eps up or down, as sign attacks do."""
    signs = np.random.default_rng(seed).choice([-eps, eps], x.shape)
    return np.clip(x.astype(int) + signs, 0, 255).astype(np.uint8)


METHODS = ("fixed-point", "cached", "auto")


def test_fast_decoding_equals_the_reference_on_64_attacked_digits(digits, digits_model):
    x = attacked(digits.x_test[:64], 32)
    expected = greedy_decode(digits_model, x, 48, "reference")
    assert (expected != x).mean() > 0.5
    for method in METHODS:
        np.testing.assert_array_equal(greedy_decode(digits_model, x, 48, method), expected, err_msg=method)


def test_fast_decoding_equals_the_reference_on_4_attacked_fashion_mnist_images(fashion_mnist):
    model = PixelCNNpp.from_pretrained("fashion-mnist")
    x = attacked(fashion_mnist.x_test[:4], 25)
    expected = greedy_decode(model, x, 32, "reference")
    for method in METHODS:
        np.testing.assert_array_equal(greedy_decode(model, x, 32, method), expected, err_msg=method)
