"""The base class of purifiers, through small purifiers without and with random numbers: draws, gradients, ranges."""

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_pixeldefend import PixelCNNpp, PixelDefend
from art_pixeldefend.purifiers import Purifier
from art_pixeldefend.purifiers.base import BatchGenerator


class Smooth(Purifier):
    """Deterministic and differentiable: a nonlinear function of each image and its neighbour pixels."""

    gradients = ("identity", "exact")

    def purify(self, x, generator):
        return 0.5 * x + 0.4 * torch.sin(x.roll(1, -1)) ** 2


class Noisy(Purifier):
    """Stochastic and differentiable: noise that is drawn twice and multiplied with the image."""

    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        noise = generator.normal(x.shape[1:])
        shift = generator.uniform((x.shape[1], 1, 1))
        return torch.sigmoid(x + noise * x**2 + shift)


class NoGradient(Purifier):
    """Stochastic, and by default supports the identity only."""

    stochastic = True

    def purify(self, x, generator):
        return (x + 0.2 * generator.normal(x.shape[1:])).clamp(0, 1)


def images(count=5, shape=(1, 4, 3), dtype=torch.float64, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Random numbers


@given(seed=st.integers(0, 2**62), start=st.integers(0, 1000), cut=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_an_images_numbers_depend_on_the_seed_and_its_position_only(seed, start, cut):
    def draw(positions):
        generator = BatchGenerator(seed, positions)
        return generator.normal((2, 3)), generator.uniform((4,)), generator.normal(())

    positions = range(start, start + 6)
    for whole, *parts in zip(draw(positions), draw(positions[:cut]), draw(positions[cut:]), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_images_and_seeds_have_different_numbers_of_the_named_distributions():
    generator = BatchGenerator(0, range(400))
    normal, uniform = generator.normal((50,)), generator.uniform((50,))
    assert len(normal.unique(dim=0)) == 400
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert (
        abs(normal[0::2].flatten().corrcoef()) <= 1
        and abs(np.corrcoef(normal[:-1].ravel(), normal[1:].ravel())[0, 1]) < 0.03
    )
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert not torch.equal(BatchGenerator(1, range(400)).normal((50,)), normal)


def test_a_subset_goes_on_in_the_streams_of_its_images():
    whole, parts = BatchGenerator(3, range(4)), BatchGenerator(3, range(4))
    mask = torch.tensor([True, False, False, True])
    first, second = whole.normal((2,)), whole.normal((2,))
    assert torch.equal(parts.subset(mask).normal((2,)), first[mask])
    assert torch.equal(parts.subset(torch.tensor([3, 0])).normal((2,)), second[[3, 0]])
    assert torch.equal(parts.subset(~mask).normal((2,)), first[~mask])


# Seeds


@pytest.mark.parametrize("gradient", ["identity", "exact"])
def test_with_a_seed_images_do_not_depend_on_batch_size_or_images_after_them(gradient):
    x = images()
    expected = Noisy(seed=7, gradient=gradient)(x)[0]
    for batch_size in (1, 2, 3):
        assert torch.equal(Noisy(seed=7, gradient=gradient, batch_size=batch_size)(x)[0], expected)
    assert torch.equal(Noisy(seed=7)(x[:2])[0], expected[:2])
    assert not torch.equal(Noisy(seed=8)(x)[0], expected)


def test_without_a_seed_every_call_draws_afresh_from_torchs_global_generator():
    defence, x = Noisy(), images()

    def three_calls():
        torch.manual_seed(0)
        return [defence(x)[0] for _ in range(3)]

    first, again = three_calls(), three_calls()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_the_global_generator_is_advanced_only_where_a_seed_is_drawn_from_it():
    for defence in (Smooth(), Noisy(seed=1)):
        before = torch.get_rng_state()
        defence(images())
        assert torch.equal(torch.get_rng_state(), before)


# Gradients


@pytest.mark.parametrize("defence", [Smooth(gradient="exact"), Noisy(gradient="exact", seed=1)])
@pytest.mark.parametrize("batch_size", [2, 128])
@pytest.mark.parametrize("clip_values", [(0, 1), (-1.0, 2.5), (np.array([-1.0, 0.0]), np.array([1.0, 5.0]))])
@pytest.mark.parametrize("nhwc", [False, True])
def test_exact_gradients_equal_finite_differences(defence, batch_size, clip_values, nhwc):
    defence = copy.copy(defence)
    defence.set_params(batch_size=batch_size, clip_values=clip_values)
    defence.channels_first = not nhwc
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in defence.clip_values)
    x = (images(3, (3, 4, 2)) * (high - low) + low).requires_grad_()
    if not nhwc:
        x = x.detach().movedim(-1, 1).contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: defence(x)[0], x)


def test_exact_gradients_equal_those_of_plain_autograd_and_leave_parameters_without():
    """The numbers of the forward pass are drawn again in the backward pass, though other calls come between."""

    class Network(Purifier):
        stochastic, gradients = True, ("exact",)

        def purify(self, x, generator):
            return layer(x + generator.normal(x.shape[1:]))

    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
    defence = Network(gradient="exact", batch_size=2)
    x, weights = images().requires_grad_(), images(seed=1)
    torch.manual_seed(3)
    result, _ = defence(x)
    defence(x)
    result.backward(weights)
    torch.manual_seed(3)
    plain = x.detach().clone().requires_grad_()
    generator = BatchGenerator(defence._call_seed(), range(len(x)), dtype=torch.float64)
    expected = defence.purify(plain, generator)
    assert torch.equal(result, torch.cat([expected[i : i + 2] for i in (0, 2, 4)]))
    expected.backward(weights)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-12, atol=0)
    assert layer.weight.grad is not None  # of the plain backward pass
    layer.weight.grad = None
    defence(x)[0].sum().backward()
    assert layer.weight.grad is None


def test_identity_gradients_pass_through_unchanged_also_where_values_are_clipped():
    weights = images(seed=1)
    for defence in (Smooth(), Noisy(), NoGradient()):
        x = (images() * 2 - 0.5).requires_grad_()
        with pytest.warns(UserWarning, match="clip_values"):
            result, _ = defence(x)
        result.backward(weights)
        assert torch.equal(x.grad, weights)


@pytest.mark.parametrize("gradient", ["identity", "exact"])
def test_the_result_may_be_changed_in_place(gradient):
    for defence in (Smooth(gradient=gradient), Noisy(gradient=gradient)):
        x = images().requires_grad_()
        result, _ = defence.forward(x)
        result.clamp_(0, 1).mul_(2)
        result.sum().backward()
        assert x.grad.abs().min() > 0


def test_between_the_passes_only_the_images_are_kept_if_there_are_several_batches():
    for gradient, batch_size, expected in (("identity", 128, 0), ("exact", 2, 1)):
        kept = []
        x = images().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            Noisy(gradient=gradient, batch_size=batch_size)(x)
        assert kept == [x.shape] * expected


@pytest.mark.parametrize(("batch_size", "evaluations"), [(128, 1), (5, 1), (4, 2 * 2)])
def test_a_single_batch_is_computed_once_and_several_batches_twice(batch_size, evaluations):
    class Counting(Noisy):
        count = 0

        def purify(self, x, generator):
            self.count += 1
            return super().purify(x, generator)

    defence, x = Counting(gradient="exact", batch_size=batch_size), images().requires_grad_()
    result, _ = defence(x)
    result.sum().backward(retain_graph=True)
    assert defence.count == evaluations
    first = x.grad.clone()
    result.sum().backward()  # the activations are gone: it is computed again, with the same draws
    torch.testing.assert_close(x.grad, 2 * first)


def test_the_backward_pass_repeats_the_forward_pass_bit_for_bit():
    class Recording(Noisy):
        def purify(self, x, generator):
            outputs.append(super().purify(x, generator))
            return outputs[-1]

    outputs = []
    result, _ = Recording(gradient="exact", batch_size=2)(images().requires_grad_())
    result.sum().backward()
    assert torch.equal(torch.cat(outputs[:3]), result) and torch.equal(torch.cat(outputs[3:]), result)


# Ranges, layouts, arrays


@pytest.mark.parametrize("clip_values", [(0, 255), (-1.0, 1.0), (np.array([0.0, -1.0]), np.array([1.0, 3.0]))])
def test_purify_sees_images_in_0_to_1_whatever_the_range(clip_values):
    seen = []

    class Spy(Purifier):
        def purify(self, x, generator):
            seen.append(x)
            return x

    x = images(5, (2, 4, 5))
    low, high = (torch.as_tensor(end, dtype=torch.float64).reshape(-1, 1, 1) for end in clip_values)
    given = x * (high - low) + low
    result, _ = Spy(clip_values, batch_size=2)(given)
    torch.testing.assert_close(torch.cat(seen), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(result, given, rtol=0, atol=1e-12)
    assert [len(batch) for batch in seen] == [2, 2, 1]


@pytest.mark.parametrize(
    ("shape", "nhwc"),
    [((3, 8, 8), False), ((8, 8, 3), True), ((8, 8, 1), True), ((1, 8, 1), False), ((4, 8, 8), False)],
)
def test_without_an_image_shape_the_channel_axis_is_the_one_with_1_or_3_entries(shape, nhwc):
    seen = []

    class Spy(Purifier):
        def purify(self, x, generator):
            seen.append(tuple(x.shape[1:]))
            return x

    x = images(2, shape)
    assert torch.equal(Spy()(x)[0], x)
    assert seen == [(shape[-1], *shape[:-1]) if nhwc else shape]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "uint16", ">f4", "longdouble"])
def test_arrays_keep_their_dtype(dtype):
    x = np.zeros((2, 1, 4, 3), dtype)
    result, _ = Smooth((0, 255))(x)
    assert result.dtype == np.dtype(dtype) and result.shape == x.shape


def test_lists_and_tensors_are_taken_too():
    x = images(2)
    expected = Smooth()(x.numpy())[0]
    np.testing.assert_array_equal(Smooth()(x.tolist())[0], expected)
    result, _ = Smooth()(x.requires_grad_())
    assert isinstance(result, torch.Tensor) and result.requires_grad
    np.testing.assert_array_equal(result.detach().numpy(), expected)


def test_lists_that_are_not_rectangular_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^x must"):
        Smooth()([[1.0], [1.0, 2.0]])


def test_an_empty_batch_returns_empty():
    for defence in (Smooth(gradient="exact"), Noisy()):
        assert defence(np.zeros((0, 1, 4, 3), np.float32))[0].shape == (0, 1, 4, 3)
        assert defence(torch.zeros(0, 1, 4, 3, requires_grad=True))[0].shape == (0, 1, 4, 3)


class Product(Purifier):
    """Stochastic, with a matrix product, which autocast would reduce in precision."""

    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return (x + generator.normal(x.shape[1:])) @ x.mT / x.shape[-1]


def double_by_default():
    @contextmanager
    def changed():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return changed()


@pytest.mark.parametrize("state", [lambda: torch.autocast("cpu", torch.bfloat16), double_by_default])
@pytest.mark.parametrize("gradient", ["identity", "exact"])
@pytest.mark.parametrize("batch_size", [2, 128])
def test_autocast_and_the_default_dtype_change_neither_images_nor_gradients(gradient, batch_size, state):
    x = images(3, (1, 5, 5), torch.float32)

    def purified():
        leaf = x.clone().requires_grad_()
        result, _ = Product(gradient=gradient, batch_size=batch_size, seed=1)(leaf)
        result.sum().backward()
        return result.detach(), leaf.grad

    expected = purified()
    with state():
        found = purified()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gradient", ["identity", "exact"])
def test_grad_and_inference_modes_do_not_change_images(gradient):
    defence, x = Product(gradient=gradient, seed=1), images(3, (1, 5, 5), torch.float32)
    expected = defence(x)[0]
    leaf = x.clone().requires_grad_()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(defence(leaf)[0], expected)
    with torch.inference_mode():
        inference = x.clone()
    assert torch.equal(defence(inference)[0], expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gradient", {"gradient": "magic"}),
        ("gradient", {"gradient": None}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 0.5}),
        ("batch_size", {"batch_size": 0}),
        ("clip_values", {"clip_values": (1, 0)}),
        ("clip_values", {"clip_values": (np.zeros(2), np.array([1.0, 0.0]))}),
        ("verbose", {"verbose": 1}),
        ("device_type", {"device_type": "banana"}),
    ],
)
def test_impossible_arguments_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        Smooth(**arguments)


def test_a_gradient_that_a_purifier_does_not_support_is_refused():
    with pytest.raises(ValueError, match="gradient must be 'identity' for NoGradient"):
        NoGradient(gradient="exact")


def test_clip_values_that_do_not_fit_the_images_are_named():
    with pytest.raises(ValueError, match="clip_values"):
        Smooth((np.zeros(5), np.arange(1, 6)))(images(shape=(2, 4, 3)))


# Through ART


def test_art_receives_the_exact_gradient_of_a_stochastic_defence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    defence = Noisy(gradient="exact", seed=1)
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (1, 4, 3),
        3,
        clip_values=(0, 1),
        preprocessing_defences=[defence],
        device_type="cpu",
    )
    x, y = images(), np.eye(3)[[0, 1, 2, 0, 1]]
    gradient = classifier.loss_gradient(x.numpy(), y)
    plain = x.clone().requires_grad_()
    noisy = defence.purify(plain, BatchGenerator(1, range(5), dtype=torch.float64))
    nn.CrossEntropyLoss(reduction="sum")(model(noisy), torch.tensor(y.argmax(axis=1))).backward()
    ratio = gradient / plain.grad.numpy()
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)  # ART averages over the images


def test_estimate_gradient_is_the_exact_one_where_it_is_asked_for():
    x, weights = images(), np.random.default_rng(0).normal(size=(5, 2, 1, 4, 3))
    plain = x.clone().requires_grad_()
    purified = Smooth().purify(plain, None)
    for k in range(2):
        (expected,) = torch.autograd.grad(purified, plain, torch.from_numpy(weights[:, k]), retain_graph=True)
        found = Smooth(gradient="exact").estimate_gradient(x.numpy(), weights)
        np.testing.assert_allclose(found[:, k], expected.numpy(), rtol=1e-12)
        np.testing.assert_array_equal(Smooth().estimate_gradient(x.numpy(), weights[:, k]), weights[:, k])


def test_copies_and_pickles_purify_alike():
    x = images()
    for defence in (Noisy(seed=2), Smooth(gradient="exact")):
        for again in (copy.deepcopy(defence), pickle.loads(pickle.dumps(defence))):
            assert torch.equal(again(x)[0], defence(x)[0])


def test_representations_name_the_settings():
    assert repr(Noisy(seed=2)) == (
        "Noisy(clip_values=(0.0, 1.0), batch_size=128, verbose=False, gradient='identity', seed=2)"
    )


def test_drawing_replays_the_numbers_of_each_image_in_any_batch():
    purifier, x = Noisy(), torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with purifier.drawing(7, range(4)):
        whole = purifier.purified(x)
        assert torch.equal(purifier.purified(x), whole)
    with purifier.drawing(7, [3, 1]):
        assert torch.equal(purifier.purified(x[[3, 1]]), whole[[3, 1]])
    with purifier.drawing(7, [2]):
        copies = purifier.purified(x[[2, 2]])
    with purifier.drawing(7, [4, 5]):
        assert torch.equal(purifier.purified(x[[2, 2]]), copies)
    with purifier.drawing(7, range(3)), pytest.raises(ValueError, match="x must hold a multiple of 3 images"):
        purifier.purified(x)


def test_a_surrogate_changes_the_backward_pass_only():
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for batch_size in (2, 5):
        purifier = Noisy(clip_values=(0, 2), batch_size=batch_size, seed=1)
        plain = purifier(x)[0]
        purifier.set_params(gradient=lambda unit: unit.square())
        inputs = x.clone().requires_grad_()
        purified = purifier(inputs)[0]
        assert torch.equal(purified.detach(), plain)
        (gradient,) = torch.autograd.grad(purified.sum(), inputs)
        assert torch.allclose(gradient, x)  # of 2 (x / 2)^2


def test_the_representation_of_a_purifier_names_its_model(make_model):
    model = make_model((1, 4, 3))
    shown = eval(model.summary, {"PixelCNNpp": PixelCNNpp})
    assert shown.configuration == model.configuration and "\n" not in model.summary
    assert f"eps=5, pixel_cnn={model.summary}, batch_size=" in repr(PixelDefend(eps=5, pixel_cnn=model))
