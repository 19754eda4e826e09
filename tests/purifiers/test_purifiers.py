"""PixelDefend and Adaptive PixelDefend as ART preprocessors: ranges, layouts, dtypes, gradients, copies."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from art.attacks.evasion import BasicIterativeMethod
from art.defences.preprocessor import PixelDefend as ArtsPixelDefend
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_pixeldefend import AdaptivePixelDefend, PixelDefend, PurifiedModel, greedy_decode
from art_pixeldefend.purifiers.adaptive_pixel_defend import largest_harmless_threshold

SHAPE = (1, 6, 6)
pytestmark = pytest.mark.filterwarnings("ignore:the density model gives")  # the models here have random weights
RANGES = [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-0.5, 2.5)]


class Dim(PreprocessorPyTorch):
    """Somebody else's preprocessor: half as bright."""

    def __init__(self):
        super().__init__(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)

    def forward(self, x, y=None):
        return x / 2, y


def network(seed=0, shape=SHAPE, classes=4, spread=1.0):
    """A classifier of images whose values spread over so much."""
    torch.manual_seed(seed)
    size = int(np.prod(shape))
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, classes))
    model[1].weight.data /= spread
    return model


def classifier(defences=None, model=None, clip_values=(0.0, 1.0), shape=SHAPE, **options):
    model = model or network(shape=shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, 4, optimizer=optimizer, clip_values=clip_values,
        preprocessing_defences=defences, device_type="cpu", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pixel_cnn(make_model):
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def levels(make_levels):
    return make_levels(6, SHAPE, seed=3)


@pytest.fixture(scope="module")
def purified(pixel_cnn, levels):
    result = greedy_decode(pixel_cnn, levels, 16)
    assert (result != levels).any()
    return result


def in_range(levels, clip_values, dtype=np.float32):
    low, high = clip_values
    return (levels / 255 * (high - low) + low).astype(dtype)


def test_takes_every_argument_of_arts_own_class_in_its_order():
    theirs = list(inspect.signature(ArtsPixelDefend).parameters.values())
    ours = list(inspect.signature(PixelDefend).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.default for p in ours[: len(theirs)]] == [p.default for p in theirs]


@pytest.mark.parametrize("clip_values", RANGES)
def test_any_range_of_values_gives_the_purified_levels_in_that_range(pixel_cnn, levels, purified, clip_values):
    defence = PixelDefend(clip_values=clip_values, eps=16, pixel_cnn=pixel_cnn)
    result, _ = defence(in_range(levels, clip_values))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, in_range(purified, clip_values), rtol=1e-6, atol=1e-6)


def test_nhwc_images_are_recognised_by_the_models_image_shape(make_model, make_levels):
    model, x = make_model((3, 5, 4)), make_levels(3, (3, 5, 4))
    defence = PixelDefend(eps=16, pixel_cnn=model)
    nchw, _ = defence(in_range(x, (0, 1)))
    nhwc, _ = defence(np.moveaxis(in_range(x, (0, 1)), 1, -1))
    np.testing.assert_array_equal(np.moveaxis(nhwc, -1, 1), nchw)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "uint8", "int32", "int64", "uint16", ">f4", "longdouble"]
)
def test_dtype_in_is_dtype_out(pixel_cnn, levels, purified, dtype):
    result, _ = PixelDefend((0, 255), 16, pixel_cnn)(levels.astype(dtype))
    assert result.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(result.astype(np.uint8), purified)


@given(offset=st.floats(-0.49, 0.49))
@settings(max_examples=20, deadline=None)
def test_values_are_rounded_to_the_nearest_level_not_truncated(pixel_cnn, levels, purified, offset):
    x = np.clip(levels.astype(np.float64) + offset, 0, 255)
    result, _ = PixelDefend((0, 255), 16, pixel_cnn)(x)
    np.testing.assert_array_equal(result, purified)


def test_labels_are_handed_through(pixel_cnn, levels):
    y = np.array(["any", "thing"])
    assert PixelDefend((0, 255), 4, pixel_cnn)(levels, y)[1] is y


def test_an_empty_batch_returns_empty(pixel_cnn):
    for defence in (PixelDefend(pixel_cnn=pixel_cnn), AdaptivePixelDefend(pixel_cnn=pixel_cnn, threshold=2.0)):
        assert defence(np.zeros((0, *SHAPE), np.float32))[0].shape == (0, *SHAPE)
        assert defence.forward(torch.zeros(0, *SHAPE))[0].shape == (0, *SHAPE)


def test_an_input_is_never_changed_in_place(pixel_cnn, levels):
    x = in_range(levels, (0, 1))
    kept = x.copy()
    x.flags.writeable = False
    PixelDefend(eps=16, pixel_cnn=pixel_cnn)(x)
    np.testing.assert_array_equal(x, kept)


def test_a_model_may_be_given_by_name_or_path(pixel_cnn, levels, purified, tmp_path):
    pixel_cnn.save(tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        np.testing.assert_array_equal(PixelDefend((0, 255), 16, path)(levels)[0], purified)
    assert PixelDefend(pixel_cnn="digits").pixel_cnn.image_shape == (1, 8, 8)


# Through ART


def test_numpy_path_serves_an_estimator_without_pytorch(pixel_cnn, levels, purified):
    weights = np.random.default_rng(0).normal(size=(36, 4))

    def predict(x):
        return x.reshape(len(x), -1) @ weights

    defended = BlackBoxClassifier(
        predict, SHAPE, 4, clip_values=(0, 1), preprocessing_defences=PixelDefend(eps=16, pixel_cnn=pixel_cnn)
    )
    expected = predict(in_range(purified, (0, 1)))
    np.testing.assert_allclose(defended.predict(in_range(levels, (0, 1))), expected, rtol=1e-5)


@pytest.mark.parametrize("defence_type", [PixelDefend, AdaptivePixelDefend])
def test_predictions_are_those_of_the_purified_images(pixel_cnn, levels, purified, defence_type):
    defended = classifier([defence_type(eps=16, pixel_cnn=pixel_cnn)])
    expected = classifier().predict(in_range(purified, (0, 1)))
    np.testing.assert_allclose(defended.predict(in_range(levels, (0, 1))), expected, rtol=1e-5, atol=1e-6)


def test_chained_with_other_preprocessors_and_standardisation(pixel_cnn, levels):
    options = {"preprocessing": (np.float32(0.3), np.float32(0.4))}
    chain = classifier([Dim(), PixelDefend(eps=16, pixel_cnn=pixel_cnn, device_type="cpu")], **options)
    assert chain.all_framework_preprocessing
    x = in_range(levels, (0, 1))
    cleaned, _ = PixelDefend(eps=16, pixel_cnn=pixel_cnn)(Dim()(x)[0])
    np.testing.assert_allclose(chain.predict(x), classifier(**options).predict(cleaned), rtol=1e-4, atol=1e-5)
    y = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    expected = classifier(**options).loss_gradient(cleaned, y) / 2
    np.testing.assert_allclose(chain.loss_gradient(x, y), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip_values", RANGES)
def test_loss_gradient_is_the_bare_classifiers_at_the_purified_image(pixel_cnn, levels, purified, clip_values):
    model, y = network(spread=clip_values[1] - clip_values[0]), np.eye(4)[[0, 1, 2, 3, 0, 1]]
    defended = classifier([PixelDefend(clip_values, 16, pixel_cnn)], model, clip_values)
    bare = classifier(None, model, clip_values)
    gradient = defended.loss_gradient(in_range(levels, clip_values), y)
    expected = bare.loss_gradient(in_range(purified, clip_values), y)
    assert np.abs(expected).reshape(6, -1).max(axis=1).min() > 0
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_class_gradient_is_the_bare_classifiers_at_the_purified_image(pixel_cnn, levels, purified):
    model = network()
    defended, bare = classifier([PixelDefend(eps=16, pixel_cnn=pixel_cnn)], model), classifier(None, model)
    for label in (None, 2):
        gradient = defended.class_gradient(in_range(levels, (0, 1)), label)
        expected = bare.class_gradient(in_range(purified, (0, 1)), label)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_estimate_forward_purifies_and_passes_the_gradient_as_the_identity(pixel_cnn, levels, purified):
    x = torch.from_numpy(in_range(levels, (0, 1))).requires_grad_()
    result = PixelDefend(eps=16, pixel_cnn=pixel_cnn).estimate_forward(x)
    np.testing.assert_allclose(result.detach().numpy(), in_range(purified, (0, 1)), atol=1e-6)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    result.backward(weights)
    assert torch.equal(x.grad, weights)


def test_estimate_gradient_passes_the_gradient_as_the_identity(pixel_cnn, levels):
    """The NumPy path: ART takes it for estimators of other frameworks than PyTorch.

    (A PyTorch classifier that mixes its own kind of preprocessor with others raises NotImplementedError.)
    """
    x = in_range(levels, (0, 1))
    defence = PixelDefend(eps=16, pixel_cnn=pixel_cnn)
    for shape in (x.shape, (len(x), 4, *SHAPE)):
        gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(defence.estimate_gradient(x, gradient), gradient)


@pytest.mark.parametrize("steps", [1, 3])
def test_arts_attacks_follow_the_gradient_at_the_purified_image(pixel_cnn, levels, steps):
    defence, undefended = PixelDefend(eps=16, pixel_cnn=pixel_cnn), classifier()
    x = in_range(levels, (0, 1))
    y = np.eye(4, dtype=np.float32)[undefended.predict(defence(x)[0]).argmax(axis=1)]
    attack = BasicIterativeMethod(classifier([defence]), eps=0.05, eps_step=0.02, max_iter=steps, verbose=False)
    expected = x
    for _ in range(steps):
        sign = np.sign(undefended.loss_gradient(defence(expected)[0], y))
        expected = np.clip(np.clip(expected + 0.02 * sign, x - 0.05, x + 0.05), 0, 1)
    np.testing.assert_allclose(attack.generate(x, y), expected, atol=1e-6)


@pytest.mark.parametrize("defence_type", [PixelDefend, AdaptivePixelDefend])
@pytest.mark.parametrize(("apply_fit", "apply_predict"), [(True, False), (False, True)])
def test_a_defence_is_applied_where_it_is_told_to_be(
    pixel_cnn, levels, purified, defence_type, apply_fit, apply_predict, monkeypatch
):
    defended = classifier([defence_type(eps=16, pixel_cnn=pixel_cnn, apply_fit=apply_fit, apply_predict=apply_predict)])
    x, clean = in_range(levels[:1], (0, 1)), in_range(purified[:1], (0, 1))
    assert (x != clean).any()
    expected = classifier().predict(clean if apply_predict else x)
    np.testing.assert_allclose(defended.predict(x), expected, rtol=1e-5, atol=1e-6)
    seen, forward = [], defended._model.forward
    monkeypatch.setattr(defended._model, "forward", lambda some: seen.append(some) or forward(some))
    defended.fit(x, np.eye(4)[:1], nb_epochs=1, batch_size=1)
    np.testing.assert_allclose(seen[0].numpy(), clean if apply_fit else x, atol=1e-6)


# Copies


@pytest.mark.parametrize("defence_type", [PixelDefend, AdaptivePixelDefend])
def test_copies_and_pickles_of_a_defended_classifier_predict_the_same(pixel_cnn, levels, defence_type):
    defended = classifier([defence_type(eps=8, pixel_cnn=pixel_cnn)])
    x = in_range(levels, (0, 1))
    for again in (copy.deepcopy(defended), pickle.loads(pickle.dumps(defended))):
        np.testing.assert_array_equal(again.predict(x), defended.predict(x))


def test_clone_for_refitting_keeps_the_defence(pixel_cnn, levels):
    defended = classifier([PixelDefend(eps=8, pixel_cnn=pixel_cnn)])
    clone = defended.clone_for_refitting()
    assert [type(defence) for defence in clone.preprocessing_defences] == [PixelDefend]
    x, y = in_range(levels, (0, 1)), np.eye(4)[[0, 1, 2, 3, 0, 1]]
    clone.fit(x, y, nb_epochs=1, batch_size=6)
    assert clone.predict(x).shape == (6, 4)


def test_set_params_changes_what_it_names_and_checks_it(pixel_cnn, levels):
    defence = PixelDefend(eps=8, pixel_cnn=pixel_cnn)
    defence.set_params(eps=0, clip_values=(0, 255))
    np.testing.assert_array_equal(defence(levels)[0], levels)


@pytest.mark.parametrize("defence_type", [PixelDefend, AdaptivePixelDefend])
def test_parameters_that_are_refused_leave_the_defence_as_it_was(pixel_cnn, levels, purified, defence_type):
    defence = defence_type((0, 255), 16, pixel_cnn)
    with pytest.raises(ValueError, match="eps"):
        defence.set_params(clip_values=(0, 1), batch_size=2, eps=-1)
    assert (defence.clip_values, defence.batch_size, defence.eps) == ((0, 255), 128, 16)
    np.testing.assert_array_equal(defence(levels)[0], purified)


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eps", {"eps": -1}),
        ("eps", {"eps": 256}),
        ("eps", {"eps": 1.5}),
        ("eps", {"eps": "8"}),
        ("eps", {"eps": float("nan")}),
        ("clip_values", {"clip_values": (1, 0)}),
        ("clip_values", {"clip_values": (0, np.inf)}),
        ("clip_values", {"clip_values": None}),
        ("clip_values", {"clip_values": (0, 1, 2)}),
        ("batch_size", {"batch_size": 0}),
        ("verbose", {"verbose": 1}),
        ("device_type", {"device_type": "banana"}),
        ("method", {"method": "magic"}),
        ("pixel_cnn", {"pixel_cnn": None}),
        ("pixel_cnn", {"pixel_cnn": nn.Linear(2, 2)}),
    ],
)
def test_impossible_arguments_are_refused_by_name(pixel_cnn, name, arguments):
    with pytest.raises(ValueError, match=f"^{name}"):
        PixelDefend(**({"pixel_cnn": pixel_cnn} | arguments))


def test_a_missing_model_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        PixelDefend(pixel_cnn="nowhere.safetensors")


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((6, 6)),
        np.zeros((2, 6, 6)),
        np.zeros((2, 3, 6, 6)),
        np.zeros((2, 1, 6, 7)),
        np.full((1, 1, 6, 6), np.nan),
        np.full((1, 1, 6, 6), np.inf),
        np.full((1, 1, 6, 6), 11.1),
        np.full((1, 1, 6, 6), -10.1),
        np.full((1, 1, 6, 6), "a"),
        np.full((1, 1, 6, 6), None),
    ],
)
def test_images_that_are_none_are_refused_by_name(pixel_cnn, x):
    with pytest.raises(ValueError, match=r"^x must"):
        PixelDefend(pixel_cnn=pixel_cnn)(x)


def test_values_less_than_half_a_level_outside_are_clipped(pixel_cnn):
    x = np.full((1, *SHAPE), 1 + 0.49 / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, _ = PixelDefend(eps=0, pixel_cnn=pixel_cnn)(x)
    np.testing.assert_array_equal(result, np.ones_like(x))


@pytest.mark.parametrize("value", [1 + 0.51 / 255, -0.51 / 255, 10.9, -9.9])
def test_values_outside_are_clipped_with_one_warning_per_instance(pixel_cnn, value):
    x = np.full((1, *SHAPE), value)
    for _ in range(2):
        defence = PixelDefend(eps=0, pixel_cnn=pixel_cnn)
        with pytest.warns(UserWarning, match=r"outside clip_values \(0, 1\)"):
            result, _ = defence(x)
        np.testing.assert_array_equal(result, np.clip(x, 0, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            defence(x)


@pytest.mark.parametrize(
    ("low", "high", "hinted"), [(-1, 1, True), (-0.9, 0.8, True), (-0.2, 1, False), (-1, 1.2, False), (-2, 1, False)]
)
def test_images_in_minus_1_to_1_are_clipped_with_a_hint(low, high, hinted, pixel_cnn):
    x = np.full((1, *SHAPE), low, np.float32)
    x[..., 0] = high
    with pytest.warns(UserWarning, match=rf"are clipped: {low:g} to {high:g}") as warned:
        PixelDefend(eps=0, pixel_cnn=pixel_cnn)(x)
    assert any("pass clip_values=(-1, 1)" in str(warning.message) for warning in warned) == hinted


def test_pixels_of_0_to_255_under_a_range_of_0_to_1_are_refused_with_a_hint(pixel_cnn, levels):
    with pytest.raises(ValueError, match=r"^x must be within clip_values \(0, 1\).*clip_values=\(0, 255\)"):
        PixelDefend(pixel_cnn=pixel_cnn)(levels)


@pytest.mark.filterwarnings("default:the density model gives")
@pytest.mark.parametrize("defence_type", [PixelDefend, AdaptivePixelDefend])
def test_a_density_model_worse_than_uniform_warns_once(make_model, levels, defence_type):
    """A uniform distribution over 256 levels has 8 bits per dimension."""
    model = make_model(SHAPE)
    with torch.no_grad():
        model.network.head.bias.add_(3.0)
    assert model.bits_per_dim(levels).median() > 8
    defence = defence_type((0, 255), 4, model)
    with pytest.warns(UserWarning, match="no fewer than a uniform distribution"):
        defence(levels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defence(levels)


@pytest.mark.parametrize("noise", [0, 8])
def test_a_density_model_that_fits_clean_images_does_not_warn(noise, digits, digits_model):
    signs = np.random.default_rng(0).choice([-noise, noise], digits.x_test[:16].shape)
    x = np.clip(digits.x_test[:16].astype(int) + signs, 0, 255).astype(np.uint8)
    assert (digits_model.bits_per_dim(x).median() > 8) == (noise > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PixelDefend((0, 255), 56, digits_model, batch_size=16)(x)


# Adaptive PixelDefend


def test_only_images_below_the_threshold_are_left_alone(pixel_cnn, levels, purified):
    bits = pixel_cnn.bits_per_dim(levels).numpy()
    threshold = float(np.median(bits))
    result, _ = AdaptivePixelDefend((0, 255), 16, pixel_cnn, threshold=threshold)(levels)
    below = bits < threshold
    assert 0 < below.sum() < len(bits)
    np.testing.assert_array_equal(result[below], levels[below])
    np.testing.assert_array_equal(result[~below], purified[~below])


@pytest.mark.parametrize("threshold", [-1, float("nan"), "low", None])
def test_an_impossible_threshold_is_refused_by_name(pixel_cnn, threshold):
    with pytest.raises(ValueError, match="threshold"):
        AdaptivePixelDefend(pixel_cnn=pixel_cnn, threshold=threshold)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_calibrated_threshold_is_the_largest_that_does_not_hurt_the_strongest_attack(data):
    attacks, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))

    def table(elements):
        return np.array(
            data.draw(st.lists(st.lists(elements, min_size=count, max_size=count), min_size=attacks, max_size=attacks))
        )

    bits, alone, purified = table(st.integers(1, 6)).astype(float), table(st.booleans()), table(st.booleans())
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=attacks, max_size=attacks))

    def strongest(threshold):
        right = np.where(bits < threshold, alone, purified).sum(axis=1)
        return {group: min(n for n, other in zip(right, groups, strict=True) if other == group) for group in groups}

    before = strongest(0.0)
    harmless = [t for t in np.unique(bits) if all(n >= before[group] for group, n in strongest(t).items())]
    assert largest_harmless_threshold(bits, alone, purified, groups) == max(harmless, default=0.0)


def test_calibration_does_not_lower_the_accuracy_under_the_strongest_attack(pixel_cnn, make_levels):
    clean, bare = in_range(make_levels(20, SHAPE), (0, 1)), classifier()
    y = bare.predict(clean).argmax(axis=1)
    rng = np.random.default_rng(0)
    attacked = {f"noise {e}": np.clip(clean + rng.integers(-e, e + 1, clean.shape) / 255, 0, 1) for e in (4, 30)}
    attacked = {name: x.astype(np.float32) for name, x in attacked.items()}

    def strongest(defence):
        defended = classifier([defence], bare.model)
        return min((defended.predict(x).argmax(axis=1) == y).mean() for x in attacked.values())

    defence = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn)
    before = strongest(defence)
    threshold = defence.calibrate(bare, attacked, np.eye(4)[y])
    assert defence.threshold == threshold
    for labels in (y, y[:, None]):
        assert AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, attacked, labels) == threshold
    assert strongest(defence) >= before


def test_calibration_does_not_lower_the_accuracy_under_the_strongest_attack_of_any_group(pixel_cnn, make_levels):
    clean, bare = in_range(make_levels(20, SHAPE), (0, 1)), classifier()
    y = bare.predict(clean).argmax(axis=1)
    rng = np.random.default_rng(0)
    groups = {
        f"within {e}": {"noise": np.clip(clean + rng.integers(-e, e + 1, clean.shape) / 255, 0, 1).astype(np.float32)}
        for e in (4, 30)
    }

    def right(threshold, x):
        defence = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn, threshold=threshold)
        return (classifier([defence], bare.model).predict(x).argmax(axis=1) == y).sum()

    threshold = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, groups, y)
    for attacks in groups.values():
        assert right(threshold, attacks["noise"]) >= right(0.0, attacks["noise"])
    flat = {name: attacks["noise"] for name, attacks in groups.items()}
    one = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, flat, y)
    assert AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, {"all": flat}, y) == one


def test_calibration_needs_as_many_labels_as_images(pixel_cnn, levels):
    defence = AdaptivePixelDefend(pixel_cnn=pixel_cnn)
    for attacked in ({}, {"within 8 levels": {}}, {"fgsm": in_range(levels, (0, 1))[:2]}):
        with pytest.raises(ValueError, match="attacked"):
            defence.calibrate(classifier(), attacked, np.zeros(6, int))


@pytest.mark.parametrize(
    "as_given", [lambda x: x.tolist(), torch.from_numpy, lambda x: torch.tensor(x).requires_grad_()]
)
def test_calibration_takes_lists_and_tensors(as_given, pixel_cnn, levels):
    bare, x = classifier(), in_range(levels, (0, 1))
    y = bare.predict(x).argmax(axis=1)
    expected = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, {"none": x}, y)
    threshold = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, {"none": as_given(x)}, list(y))
    assert expected > 0 and threshold == expected


@pytest.mark.parametrize(
    ("attacked", "y", "named"),
    [
        (lambda x: x, np.zeros(6, int), "attacked"),
        (lambda x: [x], np.zeros(6, int), "attacked"),
        (lambda x: {"clean": x}, np.zeros(6, int), "attacked"),
        (lambda x: {"fgsm": x, "clean": x[:5]}, np.zeros(6, int), "attacked"),
        (lambda x: {"fgsm": [[1, 2], [3]]}, np.zeros(6, int), "x"),
        (lambda x: {"fgsm": x}, np.zeros(6), "y"),
        (lambda x: {"fgsm": x}, None, "y"),
    ],
)
def test_calibration_names_the_argument_that_is_wrong(attacked, y, named, pixel_cnn, levels):
    defence = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn, threshold=1.0)
    with pytest.raises(ValueError, match=rf"^{named} must"):
        defence.calibrate(classifier(), attacked(in_range(levels, (0, 1))), y)
    assert defence.threshold == 1.0


def test_calibration_warns_if_most_clean_images_would_not_be_purified(pixel_cnn, levels):
    bare, x = classifier(), in_range(levels, (0, 1))
    y, bits = bare.predict(x).argmax(axis=1), pixel_cnn.bits_per_dim(levels).numpy()
    noise = x + np.random.default_rng(0).uniform(-0.3, 0.3, x.shape).astype(np.float32)
    attacked = {"noise": np.clip(noise, 0, 1)}  # less likely than any clean image
    expected = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, attacked, y)
    assert expected > bits.max()
    with pytest.warns(UserWarning, match="100% of the clean images"):
        threshold = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, attacked | {"clean": x}, y)
    assert threshold == expected  # clean images are no attack
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlikely = {"clean": np.random.default_rng(1).random(x.shape, np.float32)}
        AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, {"none": x} | unlikely, y)


def test_images_without_a_number_of_bits_are_purified_and_calibrate_nothing(pixel_cnn, levels, monkeypatch):
    defence, bare = AdaptivePixelDefend((0, 255), 16, pixel_cnn, threshold=1e9), classifier(None, None, (0, 255))
    assert np.array_equal(defence(levels)[0], levels)
    monkeypatch.setattr(type(pixel_cnn), "bits_per_dim", lambda self, x: torch.full((len(x),), torch.nan))
    assert np.array_equal(defence(levels)[0], PixelDefend((0, 255), 16, pixel_cnn)(levels)[0])
    with pytest.raises(ValueError, match=r"^pixel_cnn must give numbers"):
        defence.calibrate(bare, {"none": levels}, np.zeros(6, int))


def test_calibration_looks_at_images_in_the_range_of_the_defence(pixel_cnn, levels):
    bare, y = classifier(), classifier().predict(in_range(levels, (0, 1))).argmax(axis=1)
    wide = classifier(None, network(spread=255), (0, 255))
    expected = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn).calibrate(bare, {"none": in_range(levels, (0, 1))}, y)
    assert expected > 0
    for x in (levels, in_range(levels, (0, 255))):
        assert AdaptivePixelDefend((0, 255), 16, pixel_cnn).calibrate(wide, {"none": x}, y) == expected


def test_calibration_refuses_a_classifier_that_purifies(pixel_cnn, levels):
    defence, x = AdaptivePixelDefend(eps=16, pixel_cnn=pixel_cnn, threshold=1.0), in_range(levels, (0, 1))
    for own in (defence, PixelDefend(eps=16, pixel_cnn=pixel_cnn)):
        with pytest.raises(ValueError, match=r"^classifier must"):
            defence.calibrate(classifier([own]), {"none": x}, np.zeros(6, int))
    with pytest.raises(ValueError, match=r"^classifier must"):
        defence.calibrate(classifier(None, PurifiedModel(network(), defence)), {"none": x}, np.zeros(6, int))
    assert defence.threshold == 1.0
    defence.calibrate(classifier([Dim()]), {"none": x}, np.zeros(6, int))
