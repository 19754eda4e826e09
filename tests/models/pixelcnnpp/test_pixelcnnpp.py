import contextlib
import math

import numpy as np
import pytest
import torch

from art_pixeldefend import PixelCNNpp, datasets
from art_pixeldefend.models.pixelcnnpp import mixture
from art_pixeldefend.models.pixelcnnpp.layers import WeightNormConv2d

SHAPES = [(1, 8, 8), (3, 5, 6), (2, 7, 4), (1, 1, 9), (1, 9, 1)]


def order_of(image_shape):
    """Position of every sub-pixel in raster-and-channel order, (C, H, W)."""
    channels, height, width = image_shape
    return torch.arange(channels * height * width).view(height, width, channels).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 5, 4), (2, 3, 5)])
def test_changing_a_sub_pixel_changes_no_conditional_before_or_at_it(make_model, make_levels, shape):
    model, order = make_model(shape).double(), order_of(shape)
    x = torch.from_numpy(make_levels(1, shape))
    before = model.conditional_log_probs(x)[0]
    for position in range(order.numel()):
        changed = x.clone()
        k, i, j = (index.item() for index in torch.nonzero(order == position)[0])
        changed[0, k, i, j] ^= 255
        moved = (model.conditional_log_probs(changed)[0] - before).abs().amax(dim=-1)
        assert moved[order <= position].max() == 0
        if position + 1 < order.numel():
            assert moved[order == position + 1].item() > 0  # and the check is able to see a dependence


@pytest.mark.parametrize("shape", SHAPES)
def test_conditionals_are_normalised_and_their_sum_over_the_image_is_its_log_prob(make_model, make_levels, shape):
    model, x = make_model(shape), torch.from_numpy(make_levels(5, shape))
    conditionals = model.conditional_log_probs(x)
    assert conditionals.shape == (5, *shape, 256)
    assert (conditionals.double().exp().sum(-1) - 1).abs().max() < 1e-5
    chosen = conditionals.gather(-1, x.long().unsqueeze(-1)).squeeze(-1).double().sum((1, 2, 3))
    assert torch.allclose(chosen, model.log_prob(x), atol=1e-2, rtol=1e-5)


def test_the_biases_of_the_first_layer_reach_the_first_row_and_the_first_pixel(make_model, make_levels):
    """Unlike in OpenAI's code, where these outputs are zero."""
    network = make_model((1, 5, 6)).network
    x = torch.cat([torch.from_numpy(make_levels(2, (1, 5, 6))).float(), torch.ones(2, 1, 5, 6)], dim=1)
    biases = [layer.bias for layer in (network.u_start, network.ul_start_above, network.ul_start_left)]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert torch.equal(network.u_start(x)[:, :, 0], biases[0].expand(2, 6, 6).mT)
    first = network.ul_start_above(x)[:, :, 0, 0] + network.ul_start_left(x)[:, :, 0, 0]
    assert torch.allclose(first, biases[1] + biases[2])


def test_a_component_is_chosen_for_every_sub_pixel_of_an_rgb_pixel():
    """Two components that agree with each other in no channel: mixing channels, 4 colours are likely and not 2."""
    parameters = torch.full((1, 1, 1, mixture.parameters_per_pixel(2, 2)), 0.0)
    parts = parameters.unflatten(-1, (-1, 2))
    parts[..., 1:3, :] = torch.tensor([-0.5, 0.5])  # the means of both channels
    parts[..., 3:5, :] = -6.0  # log scales
    low, high = 64, 191
    for colour in ((low, low), (low, high), (high, low), (high, high)):
        x = torch.tensor(colour).float()[None, None, None]
        logs = [mixture.log_prob(mixture.components(parameters, x, k), x[..., k]) for k in range(2)]
        assert sum(logs).exp().item() > 0.01


def test_bits_per_dim_is_the_negative_log_prob_in_bits_per_sub_pixel(make_model, make_levels):
    model, x = make_model((3, 4, 5)), make_levels(4, (3, 4, 5))
    assert torch.allclose(model.bits_per_dim(x) * 60 * math.log(2), -model.log_prob(x))


def test_scores_do_not_depend_on_dropout_or_on_the_rest_of_the_batch(make_model, make_levels):
    model, x = make_model((1, 8, 8), dropout=0.5), make_levels(40, (1, 8, 8))
    together = model.train().log_prob(x)
    assert model.training
    alone = torch.cat([model.log_prob(x[i : i + 1]) for i in range(40)])
    assert torch.allclose(together, alone, atol=1e-3)


def test_initialisation_gives_every_layer_standardised_outputs(make_levels):
    from art_pixeldefend.models.pixelcnnpp.layers import WeightNormConv2d

    torch.manual_seed(0)
    model = PixelCNNpp((1, 8, 8), filters=6, resnets=1, mixtures=2, dropout=0.0)
    x = make_levels(50, (1, 8, 8))
    model.initialise(x)
    seen = []
    for layer in model.modules():
        if isinstance(layer, WeightNormConv2d):
            layer.register_forward_hook(
                lambda layer, args, y: seen.append((y.mean((0, 2, 3)).abs().max(), y.std((0, 2, 3)) / layer.init_scale))
            )
    model.conditional_log_probs(x[:16])
    model(model.as_levels(x))
    assert len(seen) > 20
    # Transposed convolutions crop a column after they were standardised, hence the tolerance.
    assert all(mean < 0.1 and ((std > 0.8) & (std < 1.25)).all() for mean, std in seen[len(seen) // 2 :])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_of_any_size_are_scored(make_model, make_levels, count):
    model = make_model((1, 5, 5))
    assert model.bits_per_dim(make_levels(count, (1, 5, 5))).shape == (count,)
    assert model.conditional_log_probs(make_levels(count, (1, 5, 5))).shape == (count, 1, 5, 5, 256)


def test_samples_are_levels_fixed_by_the_seed(make_model):
    model = make_model((3, 4, 4))
    one, same, other = model.sample(3, seed=1), model.sample(3, seed=1), model.sample(3, seed=2)
    assert one.shape == (3, 3, 4, 4) and one.dtype == torch.uint8
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_samples_follow_the_model(make_model):
    """Log-likelihoods of samples average to minus the entropy, as those of exact draws, pixel by pixel, do."""
    model = make_model((1, 3, 3))
    x = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        for j in range(3):
            p = model.conditional_log_probs(x)[:, 0, i, j].exp()
            x[:, 0, i, j] = torch.multinomial(p, 1, generator=generator)[:, 0].to(torch.uint8)
    exact, drawn = model.log_prob(x), model.log_prob(model.sample(400))
    error = math.sqrt((exact.var() + drawn.var()).item() / 400)
    assert abs(exact.mean() - drawn.mean()).item() < 4 * error


def test_saving_and_loading_gives_the_same_model_with_its_provenance(make_model, make_levels, tmp_path):
    model = make_model((1, 6, 6))
    model.provenance = {"dataset": "smooth", "steps": 3}
    model.save(tmp_path / "model.safetensors")
    loaded = PixelCNNpp.load(tmp_path / "model.safetensors")
    x = make_levels(3, (1, 6, 6))
    assert torch.equal(loaded.log_prob(x), model.log_prob(x))
    assert loaded.provenance == model.provenance and loaded.configuration == model.configuration
    assert not loaded.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_bad_checkpoints_are_refused_by_name_and_never_unpickled(make_model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        PixelCNNpp.load(tmp_path / "missing.safetensors")
    make_model((1, 6, 6)).save(path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:7],
        whole[: len(whole) // 2],
        b"\x80\x04" + whole,
        whole[:200] + b"\0" * 50 + whole[250:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            PixelCNNpp.load(path)
    torch.save({"weights": torch.zeros(3)}, path)  # a pickle
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        PixelCNNpp.load(path)
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(3)}, path)  # somebody else's
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        PixelCNNpp.load(path)


def test_an_unknown_pretrained_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="digits"):
        PixelCNNpp.from_pretrained("imagenet")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("image_shape", {"image_shape": (1, 8)}),
        ("image_shape", {"image_shape": (1, 8, 0)}),
        ("image_shape", {"image_shape": 8}),
        ("filters", {"filters": 0}),
        ("resnets", {"resnets": 1.5}),
        ("mixtures", {"mixtures": True}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_impossible_sizes_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=name):
        PixelCNNpp(**({"image_shape": (1, 8, 8)} | arguments))


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 8, 8)),
        np.zeros((2, 3, 8, 8)),
        np.zeros((2, 1, 8, 9)),
        np.full((1, 1, 8, 8), 0.5),
        np.full((1, 1, 8, 8), np.nan),
        np.full((1, 1, 8, 8), np.inf),
        np.full((1, 1, 8, 8), 256),
        np.full((1, 1, 8, 8), -1),
        np.full((1, 1, 8, 8), 256, np.uint16),
        np.zeros((1, 1, 8, 8), bool),
        np.zeros((1, 1, 8, 8), complex),
        np.array([["a"]]),
    ],
)
def test_what_is_no_batch_of_levels_is_refused_by_name(make_model, x):
    model = make_model((1, 8, 8))
    for method in (model.log_prob, model.bits_per_dim, model.conditional_log_probs, model.initialise):
        with pytest.raises(ValueError, match=r"^x must"):
            method(x)


@pytest.mark.parametrize("kind", [">u1", "<u2", ">u2", "<u4", ">i4", "<u8", ">u8", "<f2", ">f8"])
def test_levels_of_any_type_and_byte_order_are_the_same_levels(make_model, make_levels, kind):
    model, x = make_model((1, 8, 8)), make_levels(2, (1, 8, 8))
    assert torch.equal(model.as_levels(x.astype(kind)), torch.from_numpy(x))


@pytest.mark.parametrize("size", [1, 7, 16, 40])
def test_scores_do_not_depend_on_how_many_images_are_scored_at_a_time(make_model, make_levels, size):
    model, x = make_model((3, 8, 8)), make_levels(40, (3, 8, 8))
    in_pieces = torch.cat([model.bits_per_dim(x[first : first + size]) for first in range(0, 40, size)])
    assert (in_pieces - model.bits_per_dim(x)).abs().max() < 1e-5


def test_a_score_is_of_the_weights_at_the_time(make_model, make_levels):
    """Scoring keeps the layers' weights for its duration, and not a moment longer."""
    model, x = make_model((1, 6, 6)), make_levels(3, (1, 6, 6))
    before = model.bits_per_dim(x)
    with torch.no_grad():
        model.network.head.gain.mul_(1.1)
    assert not torch.allclose(model.bits_per_dim(x), before)
    with torch.no_grad():
        model.network.head.gain.div_(1.1)
    assert torch.allclose(model.bits_per_dim(x), before, atol=1e-5)


def test_a_score_that_fails_half_way_keeps_no_weights(make_model, make_levels, monkeypatch):
    model, x = make_model((1, 6, 6)), make_levels(3, (1, 6, 6))

    def fail(padded=False):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.network.head, "weight", fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.bits_per_dim(x)
    monkeypatch.undo()
    assert all(layer._kept is None for layer in model.modules() if isinstance(layer, WeightNormConv2d))


def test_the_last_one_out_of_evaluation_restores_the_mode(make_model):
    model = make_model((1, 6, 6)).train()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(model.evaluating())
        second.enter_context(model.evaluating())
        first.close()
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("reverse", [np.s_[..., ::-1], np.s_[::-1], np.s_[:, :, ::2]])
def test_arrays_of_any_strides_are_levels(make_model, make_levels, reverse):
    x = make_levels(4, (1, 8, 8))[reverse]
    model = make_model(x.shape[1:])
    assert torch.equal(model.as_levels(x), torch.from_numpy(x.copy()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conditionals_of_a_model_of_reduced_precision_sum_to_one_and_to_the_score(make_model, make_levels, dtype):
    model, x = make_model((3, 4, 4)).to(dtype), make_levels(2, (3, 4, 4))
    logs = model.conditional_log_probs(x)
    assert (logs.double().exp().sum(-1) - 1).abs().max() < 1e-5
    chosen = logs.gather(-1, torch.from_numpy(x).long()[..., None])
    assert torch.allclose(chosen.double().sum((1, 2, 3, 4)), model.log_prob(x), rtol=1e-4)


@pytest.mark.parametrize("dropout", [-0.1, 1, None, "0.5", float("nan")])
def test_what_is_no_probability_is_refused_by_name(dropout):
    with pytest.raises(ValueError, match="dropout"):
        PixelCNNpp((1, 4, 4), dropout=dropout)


def test_gradients_under_bf16_autocast_point_where_those_of_float32_do():
    model, x = PixelCNNpp.from_pretrained("digits"), torch.from_numpy(datasets.load("digits").x_test[:8])

    def gradient(mixed):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model.loss(x)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    assert torch.cosine_similarity(gradient(True), gradient(False), dim=0) > 0.999  # bf16 in every layer: 0.93
