import copy

import numpy as np
import pytest
import torch
from scipy import stats

from art_pixeldefend import PixelCNNpp, PixelDefendDetector
from art_pixeldefend.models import checkpoint

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


def test_p_values_of_held_out_images_from_the_model_itself_are_uniform(detector, drawn):
    report, _ = detector.detect(drawn[600:])
    assert stats.kstest(report["p_values"], "uniform").pvalue > 0.01


def test_false_alarms_come_at_the_level_alpha(detector, drawn):
    for alpha in (0.05, 0.2):
        detector.set_params(alpha=alpha)
        report, adversarial = detector.detect(drawn[600:])
        assert report["alpha"] == alpha
        assert stats.binomtest(int(adversarial.sum()), 300, alpha).pvalue > 0.001


def test_p_values_are_the_papers_rank(detector, pixel_cnn, drawn):
    report, _ = detector.detect(drawn[600:620])
    ours, others = (pixel_cnn.log_prob(x).numpy() for x in (drawn[600:620], drawn[:600]))
    np.testing.assert_allclose(report["p_values"], (1 + (others <= ours[:, None]).sum(axis=1)) / 601)


@pytest.fixture(scope="module")
def on_digits(digits, digits_model):
    """A detector calibrated as documented, and one fitted as the paper's."""
    calibrated, papers = (PixelDefendDetector(digits_model, clip_values=(0, 255)) for _ in range(2))
    calibrated.fit(digits.calibration(digits_model).x)
    papers.fit(digits.train_and_calibration().x, reference="training")
    return calibrated, papers


def false_alarms(detector, x, alpha):
    """The number of images flagged, and the 95% interval of the rate."""
    detector.set_params(alpha=alpha)
    count = int(detector.detect(x)[1].sum())
    return count, stats.binomtest(count, len(x)).proportion_ci()


def test_a_trained_model_flags_as_many_clean_images_as_alpha_says(on_digits, digits, digits_model):
    x = digits.test(digits_model).x
    count, interval = false_alarms(on_digits[0], x, 0.05)
    assert interval.low <= 0.05 <= interval.high
    for alpha in (0.01, 0.05, 0.1):  # the calibration images are a sample, too
        count, _ = false_alarms(on_digits[0], x, alpha)
        rank = int(alpha * (len(on_digits[0].log_likelihoods) + 1))
        low, high = stats.betabinom(len(x), rank, len(on_digits[0].log_likelihoods) + 1 - rank).interval(0.95)
        assert low <= count <= high


def test_a_trained_model_flags_more_clean_images_if_fitted_to_its_training_images(on_digits, digits):
    for alpha in (0.01, 0.05, 0.1):
        _, interval = false_alarms(on_digits[1], digits.x_test, alpha)
        assert interval.low > alpha


def test_the_fashion_mnist_model_flags_as_many_clean_images_as_alpha_says(fashion_mnist):
    model = PixelCNNpp.from_pretrained("fashion-mnist")
    detector = PixelDefendDetector(model, clip_values=(0, 255))
    detector.fit(fashion_mnist.calibration(model).x[:500])
    _, interval = false_alarms(detector, fashion_mnist.test(model).x[:300], 0.05)
    assert interval.low <= 0.05 <= interval.high


def test_noise_is_detected(detector, drawn):
    noisy = np.clip(drawn[600:].astype(int) + np.random.default_rng(0).choice([-60, 60], drawn[600:].shape), 0, 255)
    report, adversarial = detector.detect(noisy)
    assert adversarial.mean() > 0.9 and report["p_values"].mean() < 0.05


def test_report_is_consistent_and_in_arts_form(detector, pixel_cnn, drawn):
    report, adversarial = detector.detect(drawn[:7], batch_size=2)
    assert report["reference"] == "calibration"
    assert adversarial.shape == (7,) and adversarial.dtype == bool
    np.testing.assert_array_equal(adversarial, report["p_values"] <= report["alpha"])
    np.testing.assert_allclose(report["bits_per_dim"], pixel_cnn.bits_per_dim(drawn[:7]).numpy(), rtol=1e-5)


def test_reports_of_batches_hold_what_those_of_images_do(detector, drawn):
    alone, together = detector.detect(drawn[:7])[0], detector.detect_batch(drawn[:7], q=0.2)[0]
    assert set(together) == set(alone) - {"alpha"} | {"q", "q_values"}
    for name in ("p_values", "bits_per_dim", "log_likelihoods"):
        np.testing.assert_array_equal(together[name], alone[name])


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
    assert again.reference == "calibration"
    with pytest.raises(ValueError, match="another density model"):
        PixelDefendDetector(make_model(SHAPE, seed=9)).load(path)
    pixel_cnn.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a file of a detector"):
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


@pytest.mark.parametrize("alpha", [1e-9, 1, np.float32(0.25), np.float64(0.25), np.int64(1)])
def test_alpha_may_be_any_real_number_above_0_and_up_to_1(pixel_cnn, alpha):
    assert PixelDefendDetector(pixel_cnn, alpha=alpha).alpha == alpha


@pytest.mark.parametrize(("alpha", "least"), [(0.05, 19), (0.1, 9), (0.3, 3), (1, 1)])
def test_images_too_few_to_flag_any_are_refused_with_the_number_needed(alpha, least, pixel_cnn, drawn, monkeypatch):
    detector = PixelDefendDetector(pixel_cnn, (0, 255), alpha)
    with monkeypatch.context() as patched:
        patched.setattr(PixelCNNpp, "log_prob", lambda *_: pytest.fail("scored all the same"))
        with pytest.raises(
            ValueError, match=rf"^x must hold at least {least} images for alpha {alpha}, got {least - 1}"
        ):
            detector.fit(drawn[: least - 1])
    assert detector.log_likelihoods is None
    detector.fit(drawn[:least])
    noise = np.random.default_rng(0).integers(0, 256, (20, *SHAPE))
    assert detector.detect(noise)[1].mean() > 0.9


def test_an_alpha_too_small_for_the_images_it_was_fitted_to_is_refused(pixel_cnn, drawn, make_model, tmp_path):
    detector = PixelDefendDetector(pixel_cnn, (0, 255))
    detector.fit(drawn[:19])
    detector.save(tmp_path / "likelihoods.safetensors")
    with pytest.raises(ValueError, match=r"^alpha must be at least 1/20 with 19 calibration images"):
        detector.set_params(alpha=0.04)
    assert detector.alpha == 0.05
    detector.alpha = 0.04
    with pytest.raises(ValueError, match=r"^alpha must be at least 1/20"):
        detector.detect(drawn[:1])
    with pytest.raises(ValueError, match="at least 24 images"):
        PixelDefendDetector(pixel_cnn, alpha=0.04).load(tmp_path / "likelihoods.safetensors")
    detector.set_params(alpha=0.04, pixel_cnn=make_model(SHAPE, seed=9))  # has to be fitted again anyway
    assert detector.log_likelihoods is None and detector.reference is None


def test_images_that_the_model_gives_no_number_for_are_flagged(detector, drawn, monkeypatch):
    log_prob = PixelCNNpp.log_prob
    monkeypatch.setattr(
        PixelCNNpp, "log_prob", lambda self, x: torch.where(torch.arange(len(x)) == 1, np.nan, log_prob(self, x))
    )
    report, adversarial = detector.detect(drawn[600:603])
    assert adversarial[1] and report["p_values"][1] == 1 / 601 and np.isnan(report["log_likelihoods"][1])
    before = detector.log_likelihoods
    with pytest.raises(ValueError, match=r"^pixel_cnn must give numbers, got NaN for 1 of 30"):
        detector.fit(drawn[:30])
    assert detector.log_likelihoods is before


def test_what_a_detector_was_fitted_to_is_reported_and_saved(pixel_cnn, drawn, tmp_path):
    path, detector = tmp_path / "likelihoods.safetensors", PixelDefendDetector(pixel_cnn, (0, 255))
    detector.fit(drawn[:20], reference="training")
    assert detector.detect(drawn[:1])[0]["reference"] == "training"
    detector.save(path)
    again = PixelDefendDetector(pixel_cnn, (0, 255))
    again.load(path)
    assert again.reference == "training"
    with pytest.raises(ValueError, match=r"^reference must be one of calibration, training"):
        detector.fit(drawn[:20], reference="test")


def test_a_file_of_version_0_1_holds_likelihoods_of_training_images(pixel_cnn, tmp_path):
    path, detector = tmp_path / "likelihoods.safetensors", PixelDefendDetector(pixel_cnn, (0, 255))
    header = {"kind": "detector", "model": pixel_cnn.fingerprint()}
    checkpoint.write(path, {"log_likelihoods": torch.arange(30, dtype=torch.float64)}, header)
    detector.load(path)
    assert detector.reference == "training" and len(detector.log_likelihoods) == 30


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
        {"alpha": 0},
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
