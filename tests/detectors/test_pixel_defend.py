import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_pixeldefend import PixelDefendDetector
from art_pixeldefend.detectors.pixel_defend import permutation_p_values

SHAPE = (1, 5, 5)


@pytest.fixture(scope="module")
def pixel_cnn(make_model):
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def drawn(pixel_cnn):
    """Images from the model itself."""
    return pixel_cnn.sample(900, seed=0).numpy()


@pytest.fixture(scope="module")
def fitted(pixel_cnn, drawn):
    detector = PixelDefendDetector(pixel_cnn, clip_values=(0, 255))
    detector.fit(drawn[:600])
    return detector


@pytest.fixture
def detector(fitted):
    return copy.copy(fitted)


scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(scores=scores, training=scores)
@settings(max_examples=200, deadline=None)
def test_p_value_is_the_papers_rank(scores, training):
    p_values = permutation_p_values(np.array(scores), np.sort(training))
    expected = [(1 + sum(t <= s for t in training)) / (len(training) + 1) for s in scores]
    np.testing.assert_allclose(p_values, expected)


def test_p_values_of_held_out_images_from_the_model_itself_are_uniform(detector, drawn):
    report, _ = detector.detect(drawn[600:])
    assert stats.kstest(report["p_values"], "uniform").pvalue > 0.01


def test_false_alarms_come_at_the_level_alpha(detector, drawn):
    for alpha in (0.05, 0.2):
        detector.set_params(alpha=alpha)
        report, adversarial = detector.detect(drawn[600:])
        assert report["alpha"] == alpha
        assert stats.binomtest(int(adversarial.sum()), 300, alpha).pvalue > 0.001


def test_noise_is_detected(detector, drawn):
    noisy = np.clip(drawn[600:].astype(int) + np.random.default_rng(0).choice([-60, 60], drawn[600:].shape), 0, 255)
    report, adversarial = detector.detect(noisy)
    assert adversarial.mean() > 0.9 and report["p_values"].mean() < 0.05


def test_report_is_consistent_and_in_arts_form(detector, pixel_cnn, drawn):
    report, adversarial = detector.detect(drawn[:7], batch_size=2)
    assert adversarial.shape == (7,) and adversarial.dtype == bool
    np.testing.assert_array_equal(adversarial, report["p_values"] <= report["alpha"])
    np.testing.assert_allclose(report["bits_per_dim"], pixel_cnn.bits_per_dim(drawn[:7]).numpy(), rtol=1e-5)


def test_ranges_layouts_and_tensors_give_the_same_p_values(detector, pixel_cnn, drawn):
    x = drawn[600:620]
    expected = detector.detect(x)[0]["p_values"]
    unit = PixelDefendDetector(pixel_cnn, clip_values=(0, 1))
    unit.log_likelihoods = detector.log_likelihoods
    for same in ((x / 255).astype(np.float32), np.moveaxis(x / 255, 1, -1), torch.from_numpy(x / 255)):
        np.testing.assert_allclose(unit.detect(same)[0]["p_values"], expected, atol=0.01)


def test_empty_batch_is_detected_as_empty(detector):
    report, adversarial = detector.detect(np.zeros((0, *SHAPE)))
    assert adversarial.shape == report["p_values"].shape == (0,)


def test_saved_likelihoods_are_loaded_by_the_same_models_detector_only(
    detector, pixel_cnn, make_model, drawn, tmp_path
):
    path = tmp_path / "likelihoods.safetensors"
    detector.save(path)
    again = PixelDefendDetector(pixel_cnn, clip_values=(0, 255))
    again.load(path)
    np.testing.assert_array_equal(again.detect(drawn[:9])[0]["p_values"], detector.detect(drawn[:9])[0]["p_values"])
    with pytest.raises(ValueError, match="another density model"):
        PixelDefendDetector(make_model(SHAPE, seed=9)).load(path)
    pixel_cnn.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no detector"):
        again.load(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"likelihoods\.safetensors"):
        again.load(path)
    with pytest.raises(FileNotFoundError):
        again.load(tmp_path / "missing")


def test_another_density_model_makes_the_likelihoods_void(detector, make_model, drawn):
    detector.set_params(alpha=0.2)
    detector.detect(drawn[:1])
    detector.set_params(pixel_cnn=make_model(SHAPE, seed=9))
    with pytest.raises(ValueError, match="fit"):
        detector.detect(drawn[:1])


def test_parameters_that_are_refused_leave_the_detector_as_it_was(detector, make_model, drawn):
    before, model = detector.detect(drawn[:5])[0], detector.pixel_cnn
    with pytest.raises(ValueError, match="alpha"):
        detector.set_params(pixel_cnn=make_model(SHAPE, seed=9), batch_size=7, alpha=2)
    assert detector.pixel_cnn is model and detector.alpha == 0.05 and detector.batch_size == 128
    np.testing.assert_array_equal(detector.detect(drawn[:5])[0]["p_values"], before["p_values"])


@pytest.mark.parametrize("alpha", [0, 1, np.float32(0.25), np.float64(0.25), np.int64(1)])
def test_alpha_may_be_any_real_number_from_0_to_1(pixel_cnn, alpha):
    assert PixelDefendDetector(pixel_cnn, alpha=alpha).alpha == alpha


def test_likelihoods_of_a_bfloat16_model_are_saved_and_loaded(pixel_cnn, drawn, tmp_path):
    reduced = copy.deepcopy(pixel_cnn).bfloat16()
    detector = PixelDefendDetector(reduced, clip_values=(0, 255))
    detector.fit(drawn[:20])
    detector.save(tmp_path / "likelihoods.safetensors")
    again = PixelDefendDetector(reduced, clip_values=(0, 255))
    again.load(tmp_path / "likelihoods.safetensors")
    assert np.array_equal(again.log_likelihoods, detector.log_likelihoods)
    with pytest.raises(ValueError, match="another density model"):
        PixelDefendDetector(pixel_cnn).load(tmp_path / "likelihoods.safetensors")


def test_a_detector_that_was_not_fitted_says_so(pixel_cnn, drawn, tmp_path):
    detector = PixelDefendDetector(pixel_cnn)
    with pytest.raises(ValueError, match="fit"):
        detector.detect(drawn[:1] / 255)
    with pytest.raises(ValueError, match="fit"):
        detector.save(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^x must"):
        detector.fit(drawn[:0] / 255)


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 2},
        {"alpha": "x"},
        {"alpha": np.nan},
        {"alpha": True},
        {"batch_size": 0},
        {"clip_values": (1, 1)},
        {"verbose": 3},
    ],
)
def test_impossible_arguments_are_refused_by_name(pixel_cnn, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PixelDefendDetector(pixel_cnn, **bad)


@pytest.mark.parametrize("x", [np.zeros((1, 1, 5, 6)), np.full((1, *SHAPE), np.nan), np.full((1, *SHAPE), 300.0)])
def test_images_that_are_none_are_refused_by_name(detector, x):
    for method in (detector.detect, detector.fit):
        with pytest.raises(ValueError, match=r"^x must"):
            method(x)
