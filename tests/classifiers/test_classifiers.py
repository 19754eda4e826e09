from dataclasses import replace

import numpy as np
import pytest
import torch

from art_pixeldefend import PixelCNNpp, datasets
from art_pixeldefend.attacks import HalfNormalFGSM
from art_pixeldefend.classifiers import (
    NETWORKS,
    RECIPES,
    TECHNIQUES,
    Recipe,
    accuracy,
    as_art,
    build,
    load,
    load_module,
    names,
    save,
    train,
    training,
)
from art_pixeldefend.classifiers.layers import BatchNorm, Standardise
from art_pixeldefend.classifiers.networks import WEIGHTS
from art_pixeldefend.classifiers.training import shortened
from art_pixeldefend.models import zoo
from art_pixeldefend.models.training import Settings, as_start
from art_pixeldefend.models.training import train as train_model

TINY = Recipe(steps=3, batch_size=16, mixed_precision=False, flips=False)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def small(network, **arguments):
    sizes = {"resnet": {"units": 1}, "vgg": {"width": 2}}[network]
    return build(network, (1, 8, 8), **sizes, **arguments)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_the_resnet_has_62_weighted_layers():
    model = build("resnet", (1, 28, 28))
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 62


@pytest.mark.parametrize(("shape", "widths"), [((3, 32, 32), [16, 128, 512, 512]), ((1, 28, 28), [4, 32, 128, 128])])
def test_the_vgg_has_the_papers_widths(shape, widths):
    model = build("vgg", shape)
    found = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert found == [width for width, count in zip(widths, (2, 2, 3, 3), strict=True) for _ in range(count)]
    assert [module.out_features for module in model.head if isinstance(module, torch.nn.Linear)] == [widths[-1], 10]


@pytest.mark.parametrize(("shape", "width"), [((3, 32, 32), 16), ((1, 28, 28), 4)])
def test_the_resnet_has_the_papers_widths(shape, width):
    model = build("resnet", shape)
    assert [model.units[i].conv2.out_channels for i in (0, 10, 20)] == [width, 2 * width, 4 * width]
    assert [model.units[i].conv1.stride[0] for i in (0, 10, 20)] == [1, 2, 2]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_take_any_image_size(network, shape):
    model = build(network, shape, classes=7, width=2).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_standardised_images_have_mean_0_and_deviation_1():
    x = Standardise()(torch.rand(4, 3, 8, 8))
    assert torch.allclose(x.mean((1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(x.std((1, 2, 3), correction=0), torch.ones(4), atol=1e-4)


def test_uniform_images_have_finite_gradients():
    x = torch.full((2, 1, 8, 8), 0.5, requires_grad=True)
    Standardise()(x).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_normalisation_with_nothing_to_train_is_torchs(dtype, error):
    layer = BatchNorm(4).eval()
    for values in (layer.weight.data, layer.running_var):
        values.uniform_(0.5, 2)
    for values in (layer.bias.data, layer.running_mean):
        values.normal_()
    x = torch.randn(3, 4, 5, 5, dtype=dtype)
    expected = layer(x)
    found = layer.requires_grad_(False)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_seed_decides_the_initial_weights(network):
    first, same, other = (weights(small(network, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_seed_decides_the_trained_weights(technique, digits):
    first, same, other = (
        weights(train(small("vgg"), digits.x_train[:64], digits.y_train[:64], TINY, technique, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_interrupted_training_continues_to_the_same_weights(technique, digits, tmp_path, monkeypatch):
    recipe, file = replace(TINY, steps=5, crops=1), tmp_path / "run.safetensors"

    def trained(**arguments):
        model = small("vgg")  # it has dropout
        return weights(train(model, digits.x_train[:64], digits.y_train[:64], recipe, technique, **arguments))

    crop, calls = training.crop, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return crop(*args)

    monkeypatch.setattr(training, "crop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint=file, every=2)
    assert file.is_file()
    continued = trained(checkpoint=file, every=2)
    assert len(calls) == 4 + 3  # the steps after the second
    assert torch.equal(continued, trained()) and not file.exists()


def test_a_checkpoint_of_other_arguments_is_refused(digits, tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    monkeypatch.setattr(training.Path, "unlink", lambda *args, **kwargs: None)  # keep it after the end
    arguments = digits.x_train[:64], digits.y_train[:64], TINY
    train(small("resnet"), *arguments, checkpoint=file, every=1)
    for changed in ({"seed": 3}, {"technique": "label-smoothing"}):
        with pytest.raises(
            ValueError, match=r"checkpoint .* not of a training run of this network with these arguments"
        ):
            train(small("resnet"), *arguments, checkpoint=file, **changed)
    with pytest.raises(ValueError, match=r"checkpoint .* not of a training run of this network with these arguments"):
        train(small("resnet"), digits.x_train[64:128], *arguments[1:], checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint .* not of a training run of this network"):
        train(build("resnet", (1, 8, 8), units=2), *arguments, checkpoint=file)
    with pytest.raises(ValueError, match=r"is of kind .* not a model of images"):
        zoo.load(file)
    with pytest.raises(ValueError, match="classifier-training-run"):
        as_start(file, PixelCNNpp)


def test_a_checkpoint_of_an_image_model_is_refused(digits, tmp_path, make_model):
    images = digits.x_train[:8]
    run = Settings(steps=1, batch_size=4)
    train_model(make_model(images.shape[1:]), PixelCNNpp.loss, images, run, tmp_path, device="cpu", verbose=False)
    with pytest.raises(ValueError, match=r"checkpoint .* not of a training run of this network"):
        train(small("resnet"), images, digits.y_train[:8], TINY, checkpoint=tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_learning_rate_rises_and_falls_in_any_number_of_steps(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler, rates = Recipe(steps, learning_rate=0.3).scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert min(rates) >= 0 and max(rates) <= 0.3 + 1e-9 and np.isfinite(rates).all()
    assert steps < 2 or max(rates) == pytest.approx(0.3, rel=0.2)


def test_training_leaves_the_global_generators_alone(digits):
    torch.manual_seed(7), np.random.seed(7)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(7), np.random.seed(7)
    train(small("resnet"), digits.x_train[:64], digits.y_train[:64], TINY, "adversarial-fgsm")
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_a_trained_network_reads_digits(digits):
    recipe = replace(RECIPES["digits"], steps=150)
    model = train(small("resnet"), digits.x_train, digits.y_train, recipe)
    assert accuracy(as_art(model), digits.x_test.astype(np.float32) / 255, digits.y_test) > 0.9


def test_smoothed_labels_make_less_confident_predictions(digits):
    recipe, x = replace(RECIPES["digits"], steps=100), digits.x_train[:200].astype(np.float32) / 255
    plain, smooth = (
        train(small("resnet"), digits.x_train, digits.y_train, recipe, technique, smoothing=0.3)
        for technique in ("normal", "label-smoothing")
    )
    plain, smooth = (torch.softmax(model(torch.from_numpy(x)), 1).amax(1).mean() for model in (plain, smooth))
    assert smooth < 0.85 < plain


def test_adversarial_training_attacks_as_much_of_every_batch_as_the_reference_weighs_it(digits, monkeypatch):
    seen, generate = [], HalfNormalFGSM.generate
    monkeypatch.setattr(HalfNormalFGSM, "generate", lambda self, x, y: (seen.append(len(x)), generate(self, x))[1])
    train(small("vgg"), digits.x_train[:130], digits.y_train[:130], replace(TINY, batch_size=130), "adversarial-fgsm")
    assert seen == [30] * TINY.steps  # 0.6 / 2.6 of 130


def trained_on(digits, monkeypatch, recipe, technique="normal", **arguments):
    """What a network sees in training when all there is are 16 copies of one digit."""
    seen, x, y = [], digits.x_train[:1].repeat(16, 0), digits.y_train[:1].repeat(16)
    model = small("vgg")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda some: seen.append(some.detach().numpy().copy()) or forward(some))
    train(model, x, y, recipe, technique, **arguments)
    return x[0] / 255, np.concatenate(seen)


def test_flips_mirror_half_of_the_images(digits, monkeypatch):
    for flips, low, high in ((True, 0.3, 0.7), (False, 0, 0)):
        image, seen = trained_on(digits, monkeypatch, replace(TINY, steps=8, flips=flips))
        mirrored = np.abs(seen - image[..., ::-1]).max((1, 2, 3)) < 1e-6
        same = np.abs(seen - image).max((1, 2, 3)) < 1e-6
        assert (mirrored ^ same).all() and low <= mirrored.mean() <= high


def test_crops_shift_images_by_up_to_the_padding_each_way(digits, monkeypatch):
    image, seen = trained_on(digits, monkeypatch, replace(TINY, steps=16, crops=1, flips=False))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    found = [[np.allclose(one, shift, atol=1e-6) for shift in shifts] for one in seen]
    assert np.any(found, axis=1).all() and np.any(found, axis=0).all()


@pytest.mark.parametrize("technique", ["adversarial-fgsm", "adversarial-bim"])
def test_delta_is_how_far_adversarial_training_goes(technique, digits, monkeypatch):
    moved = []
    for delta in (2, 20):
        image, seen = trained_on(digits, monkeypatch, TINY, technique, delta=delta)
        moved.append(np.abs(seen - image).max() * 255)
        assert moved[-1] <= 2 * delta + 1e-3
    assert 0 < moved[0] < 5 < moved[1]


def test_adversarial_training_prints_nothing(digits, capfd):
    train(small("resnet"), digits.x_train[:64], digits.y_train[:64], TINY, "adversarial-fgsm")
    assert capfd.readouterr() == ("", "")


def test_a_saved_network_comes_back_the_same(tmp_path):
    model = small("vgg").eval()
    save(tmp_path / "model.safetensors", model, {"seed": 0})
    again = load(tmp_path / "model.safetensors")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(x), again(x)) and again.provenance == {"seed": 0}


def test_half_precision_halves_a_file_and_comes_back_as_float32(tmp_path):
    model = small("resnet").eval()
    for name, dtype in (("whole", None), ("half", torch.float16)):
        save(tmp_path / f"{name}.safetensors", model, dtype=dtype)
    again = load(tmp_path / "half.safetensors")
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    assert torch.allclose(weights(again), weights(model), atol=1e-3) and not torch.equal(weights(again), weights(model))
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size


@pytest.mark.parametrize("name", names())
def test_every_bundled_classifier_has_a_card_that_states_its_header(name):
    header, card = load(name).provenance, (WEIGHTS / f"{name}.md").read_text()
    assert name.startswith(header["dataset"]) and f"**{100 * header['accuracy']:.2f} %**" in card
    most = 200_000 if header["dataset"] == "fashion-mnist" else 2_000_000  # a grey ResNet has a quarter of the width
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < most
    assert f"{header['steps']:,} steps" in card and header["split"] in card


@pytest.mark.parametrize("name", names())
def test_bundled_classifiers_are_as_accurate_on_some_test_images_as_their_cards_say(request, name):
    model, count = load(name), 500
    data = request.getfixturevalue(model.provenance["dataset"].replace("-", "_"))
    x, y = data.x_test[:count].astype(np.float32) / 255, data.y_test[:count]
    expected = model.provenance["accuracy"]
    assert abs(accuracy(as_art(model), x, y) - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_there_are_a_normal_classifier_and_adversarially_trained_ones():
    assert {"cifar-10-resnet", "cifar-10-resnet-fgsm"} <= set(names())
    assert {"fashion-mnist-resnet", "fashion-mnist-resnet-pgd-8", "fashion-mnist-resnet-pgd-25"} <= set(names())


def test_a_name_that_is_not_bundled_is_answered_with_those_that_are():
    with pytest.raises(FileNotFoundError, match="fashion-mnist-resnet-pgd-8"):
        load("fashion-mnist-densenet")


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, small("vgg"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="path"):
        load(path)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    from art_pixeldefend.models import checkpoint

    checkpoint.write(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "other"})
    with pytest.raises(ValueError, match="not a file of a classifier"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "none"}, "recipe"),
        ({"technique": "none"}, "technique"),
        ({"x": np.zeros((4, 1, 8, 8))}, "x must"),
        ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, "x must"),
        ({"x": np.zeros((0, 1, 8, 8), np.uint8), "y": np.zeros(0, int)}, "x must"),
        ({"y": np.zeros(3, int)}, "y must"),
        ({"y": np.zeros(4)}, "y must"),
        ({"y": np.zeros((4, 2))}, "y must"),
        ({"y": np.full(4, -1)}, "y must"),
        ({"y": np.full(4, 10)}, "y must"),
    ],
)
def test_unknown_names_and_wrong_images_and_labels_are_refused(arguments, message):
    arguments = {"x": np.zeros((4, 1, 8, 8), np.uint8), "y": np.zeros(4, int)} | arguments
    with pytest.raises(ValueError, match=message):
        train(small("vgg"), **arguments)


@pytest.mark.parametrize("as_given", [lambda y: y[:, None], lambda y: np.eye(10)[y]])
def test_labels_may_be_columns_or_one_hot(as_given, digits):
    x, y = digits.x_train[:16], digits.y_train[:16]
    expected, found = (weights(train(small("vgg"), x, labels, TINY)) for labels in (y, as_given(y)))
    assert torch.equal(expected, found)


def test_an_unknown_network_or_size_is_refused():
    with pytest.raises(ValueError, match="resnet"):
        build("alexnet", (1, 8, 8))
    with pytest.raises(ValueError, match="sizes"):
        build("vgg", (1, 8, 8), depth=3)


def test_diverged_training_is_reported_and_leaves_no_checkpoint(digits, tmp_path):
    file, recipe = tmp_path / "run.safetensors", replace(TINY, learning_rate=1e30, steps=12)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(small("vgg"), digits.x_train[:64], digits.y_train[:64], recipe, checkpoint=file, every=1)
    assert not file.exists()


def test_steps_between_checkpoints_are_checked(digits, tmp_path):
    with pytest.raises(ValueError, match="every"):
        train(small("vgg"), digits.x_train[:64], digits.y_train[:64], TINY, checkpoint=tmp_path / "run", every=0)


def test_a_shortened_recipe_keeps_its_shape():
    assert shortened("paper", 800).milestones == (400, 600)
    assert shortened("quick", 10).steps == 10


def test_the_paper_recipe_divides_the_learning_rate_by_ten_at_its_milestones():
    recipe = shortened("paper", 8)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], recipe.learning_rate)
    scheduler, rates = recipe.scheduler(optimizer), []
    for _ in range(recipe.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


@pytest.mark.parametrize("source", ["fashion-mnist-resnet", "network.pt"])
def test_weights_that_would_be_ignored_are_refused(source):
    with pytest.raises(ValueError, match="weights must be given with"):
        load_module(source, "weights.safetensors")
