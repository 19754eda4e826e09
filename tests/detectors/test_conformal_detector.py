import copy
import warnings

import numpy as np
import pytest
import torch
from art.defences.detector.evasion import EvasionDetector
from art.estimators.classification import DetectorClassifier, PyTorchClassifier
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from art_pixeldefend import ConformalDetector, PixelDefendDetector, datasets
from art_pixeldefend.detectors import Likelihood, Score, ScoreNorm
from art_pixeldefend.models import checkpoint

SHAPE = (1, 2, 2)


class Pixel(Score):
    """One pixel's value, optionally with noise added; NaN for images whose last pixel is 1."""

    unit, params, stochastic = "pixel values", ("index", "sign", "noise"), True

    def __init__(self, index=0, sign=1.0, noise=0.0):
        self.index, self.sign, self.noise = index, sign, noise

    def score(self, x, generator):
        x = x.flatten(1)
        values = self.sign * x[:, self.index] + self.noise * generator.normal(())
        return torch.where(x[:, -1] == 1, torch.nan, values)


def images(count, seed=0, shift=0.0):
    x = np.random.default_rng(seed).random((count, *SHAPE)) * 0.5 + shift
    return x.astype(np.float32)


def fitted(scores=None, count=199, **options):
    detector = ConformalDetector(scores or [Pixel(0), Pixel(1)], **options)
    detector.fit(images(count))
    return detector


COMBINATIONS = ["bonferroni", "harmonic", "cauchy", "joint"]


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_clean_images_are_flagged_at_most_at_the_rate_alpha(combine, two_sided):
    flagged, total, alpha = 0, 0, 0.1
    for seed in range(40):
        detector = ConformalDetector([Pixel(0), Pixel(1)], combine, alpha, two_sided=two_sided, seed=seed)
        detector.fit(images(79, seed=2 * seed))
        flagged += int(detector.detect(images(50, seed=2 * seed + 1))[1].sum())
        total += 50
    # Images of one calibration set are flagged together: the count varies more than a binomial one.
    deviation = np.sqrt(total * alpha * (1 - alpha) * (1 + 50 / 80))
    assert flagged < total * alpha + 3.5 * deviation
    if combine == "joint":
        assert flagged > total * alpha - 3.5 * deviation
    attacked = images(50, seed=999)
    attacked[:, 0, 0, 0] += 0.5
    assert detector.detect(attacked)[1].mean() > 0.5


@pytest.mark.parametrize(
    "scores", [[Pixel(0)], [Pixel(0, noise=0.3)], [Pixel(2, sign=0.0)]], ids=["pixel", "noise", "all tied"]
)
def test_p_values_of_clean_images_are_uniform_for_any_score(scores):
    p_values = []
    for seed in range(300):
        detector = ConformalDetector(scores, alpha=0.2, seed=seed)
        detector.fit(images(9, seed=2 * seed))
        p_values += detector.detect(images(4, seed=2 * seed + 1))[0]["p_values"][:1].tolist()
    counts = np.bincount(np.rint(10 * np.array(p_values)).astype(int), minlength=11)[1:]
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_ties_are_ordered_independently_for_images_that_are_detected_one_by_one(combine, seed):
    x = images(300, seed=1)
    detector = fitted([Pixel(0, sign=0.0)], combine=combine, alpha=0.2, seed=seed)
    p_values = detector.detect(x)[0]["p_values"]
    assert stats.binomtest(int((p_values <= 0.2).sum()), len(x), 0.2).pvalue > 1e-3
    alone = [detector.detect(x[i : i + 1])[0]["p_values"][0] for i in range(30)]
    np.testing.assert_array_equal(alone, p_values[:30])
    levels = np.rint(x * 255).astype(np.uint8)
    detector.set_params(clip_values=(0, 255))
    np.testing.assert_array_equal(detector.detect(np.moveaxis(levels, 1, -1))[0]["p_values"], p_values)


def test_a_combination_catches_what_one_score_misses():
    attacked = images(20, seed=5)
    attacked[:, 0, 0, 1] = 0.8
    assert not fitted([Pixel(0)]).detect(attacked)[1].all()
    for combine in ("bonferroni", "harmonic", "joint"):
        assert fitted(combine=combine).detect(attacked)[1].all()


def test_low_scores_are_flagged_if_two_sided_only():
    low = images(5, seed=3)
    low[:, 0, 0, 0] = 0
    detector = fitted([Pixel(0)])
    assert not detector.detect(low)[1].any()
    detector.set_params(two_sided=True)
    assert detector.detect(low)[1].all()
    both = fitted(two_sided=[False, True])
    assert not both.detect(low)[0]["score_p_values"][:, 0].max() < 0.9


@pytest.mark.parametrize("conditional", ["simes", "dkwm", "monte-carlo"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_conditional_p_values_are_larger_and_hold_for_most_calibration_sets(conditional, two_sided):
    held, alpha = 0, 0.3
    x, options = images(400, seed=1), {"alpha": alpha, "two_sided": two_sided, "round_to_levels": False}
    for seed in range(20):
        detector = ConformalDetector([Pixel(0), Pixel(1)], conditional=conditional, delta=0.2, **options)
        detector.fit(images(600, seed=seed + 10))
        held += detector.detect(x)[1].mean() <= alpha + 0.03  # 400 images: a deviation of 0.02
    assert held >= 13
    marginal = ConformalDetector([Pixel(0), Pixel(1)], ties="conservative", **options)
    marginal.fit(images(600, seed=29))
    for name in ("p_values", "score_p_values"):
        assert (detector.detect(x)[0][name] >= marginal.detect(x)[0][name] - 1e-12).all()


def test_the_false_discovery_rate_of_a_batch_is_controlled():
    for method, q in (("bh", 0.2), ("storey", 0.2), ("by", 0.5)):
        proportions, found = [], 0
        for seed in range(100):
            detector = ConformalDetector([Pixel(0)], alpha=0.1, seed=seed)
            detector.fit(images(199, seed=2 * seed))
            x = np.concatenate([images(30, seed=2 * seed + 1), images(10, seed=2 * seed + 1, shift=0.4)])
            report, flagged = detector.detect_batch(x, q, method)
            proportions.append(flagged[:30].sum() / max(flagged.sum(), 1))
            found += flagged[30:].sum()
            np.testing.assert_array_equal(flagged, report["q_values"] <= q)
            np.testing.assert_array_equal(report["p_values"], detector.detect(x)[0]["p_values"])
            if method != "storey":
                expected = stats.false_discovery_control(report["p_values"], method=method)
                np.testing.assert_allclose(report["q_values"], expected)
        error = np.std(proportions) / np.sqrt(len(proportions))
        assert np.mean(proportions) <= q + 3 * error, method
        assert found > 100 * 3  # and it has power


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_images_with_a_score_of_nan_are_flagged(combine):
    x = images(100, seed=4)
    x[7, 0, 1, 1] = 1
    detector = fitted(combine=combine, alpha=0.02)
    report, flagged = detector.detect(x)
    assert flagged[7] and report["p_values"][7] == report["p_values"].min() and np.isnan(report["scores"][7]).all()
    assert detector.detect_batch(x, q=1e-6)[1].tolist() == [i == 7 for i in range(100)]
    with pytest.raises(ValueError, match=r"^scores\[0\], Pixel\(index=0.* must give numbers, got NaN for 1 of 100"):
        detector.fit(x)


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 39), ({"alpha": 0.01}, 199), ({"combine": "joint"}, 19), ({"two_sided": True}, 79),
     ({"two_sided": (True, False)}, 39), ({"conditional": "simes", "delta": 0.1}, None)],
)  # fmt: skip
def test_calibration_images_too_few_to_flag_any_are_refused_with_the_number_needed(options, least):
    detector = ConformalDetector([Pixel(0), Pixel(1)], **options)
    with pytest.raises(ValueError, match=r"^x must hold at least \d+ images for alpha 0.0[15], got 5$") as error:
        detector.fit(images(5))
    found = int(str(error.value).split()[5])
    assert least in (None, found) and detector.calibration_scores is None
    with pytest.raises(ValueError, match=rf"^x must hold at least {found} images"):
        detector.fit(images(found - 1))
    detector.fit(images(found))
    assert detector.detect(images(3, shift=0.5))[1].all()
    with pytest.raises(ValueError, match=rf"^alpha must be at least .* with {found} calibration images"):
        detector.set_params(alpha=detector.alpha / 2)


def test_an_empty_batch_is_detected_as_empty():
    detector = fitted()
    for report, flagged in (detector.detect(np.zeros((0, *SHAPE))), detector.detect_batch(np.zeros((0, *SHAPE)), 0.1)):
        assert flagged.shape == report["p_values"].shape == (0,) and report["score_p_values"].shape == (0, 2)
        assert flagged.dtype == bool
    assert detector.detect_batch(np.zeros((0, *SHAPE)), 0.1, "storey")[1].shape == (0,)


def test_results_depend_on_the_seed_and_positions_only():
    x, scores = images(60, seed=8), [Pixel(0, noise=0.2), Pixel(1, sign=0.0)]
    detector = fitted(scores)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    report, _ = detector.detect(x)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = detector.detect(x, batch_size=7)
    some, _ = detector.detect(x[:10])
    for name in ("p_values", "scores", "score_p_values"):
        np.testing.assert_array_equal(report[name], again[name])
        np.testing.assert_array_equal(report[name][:10], some[name])
    detector.set_params(seed=1)
    assert (detector.detect(x)[0]["scores"][:, 0] != report["scores"][:, 0]).all()
    detector.set_params(seed=None)
    assert (detector.detect(x)[0]["scores"][:, 0] != detector.detect(x)[0]["scores"][:, 0]).all()
    same = ConformalDetector(scores)
    same.fit(x, batch_size=4)
    noise = same.calibration_scores[:, 0] - same.detect(x)[0]["scores"][:, 0]
    assert (noise != 0).all()  # calibration and detection draw independent numbers


# Streams


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_stream_is_detected_as_all_its_images_together(combine):
    x, detector = images(50, seed=8), fitted([Pixel(0, noise=0.2), Pixel(2, sign=0.0)], combine=combine)
    report, flagged = detector.detect(x)
    found = list(detector.detect_stream(x[i : i + 7] for i in range(0, 50, 7)))
    for name in ("p_values", "scores", "score_p_values"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part, _ in found]), report[name])
    np.testing.assert_array_equal(np.concatenate([flags for _, flags in found]), flagged)
    assert all(part["alpha"] == 0.05 for part, _ in found)
    assert list(detector.detect_stream([])) == [] and next(detector.detect_stream([x[:0]]))[1].shape == (0,)


def test_a_data_loader_is_detected_one_batch_at_a_time(capsys):
    x, read = torch.from_numpy(images(40, seed=8)), []

    class Watched(TensorDataset):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    detector = fitted(verbose=True)
    stream = detector.detect_stream(DataLoader(Watched(x, torch.zeros(40)), batch_size=8))
    capsys.readouterr()
    assert read == []
    report, _ = next(stream)
    assert len(report["p_values"]) == 8 and len(read) == 8
    rest = [report, *(part for part, _ in stream)]
    np.testing.assert_array_equal(
        np.concatenate([part["p_values"] for part in rest]), detector.detect(x)[0]["p_values"]
    )
    bars = capsys.readouterr().err
    assert "detect: 100%" in bars and "40/40" in bars


def test_a_stream_reports_errors_at_once_or_for_the_batch_that_causes_them():
    with pytest.raises(ValueError, match="must be fitted"):
        ConformalDetector(Pixel()).detect_stream([])
    stream = fitted().detect_stream([images(3), np.full((1, *SHAPE), 2.0)])
    next(stream)
    with pytest.raises(ValueError, match=r"^x must be within clip_values"):
        next(stream)


# Gradients


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("options", [{}, {"two_sided": True}, {"conditional": "simes"}])
def test_margins_are_positive_for_flagged_images_and_lead_out_of_them(combine, options):
    if combine == "joint" and options.get("conditional"):
        return
    detector = fitted(combine=combine, alpha=0.1, count=999, **options)
    x = torch.from_numpy(np.concatenate([images(200, seed=5), images(20, seed=6, shift=0.3)]))
    report, flagged = detector.detect(x.numpy())
    margin = detector.margin(x)
    certain = np.abs(np.log(report["p_values"] / 0.1)) > 0.3  # approximations are off by up to about 15%
    assert (flagged == (margin > 0).numpy())[certain].all() and certain.sum() > 100
    leaf = x[200:].clone().requires_grad_()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(detector.margin(leaf).clamp(min=-1.0).sum(), leaf)
        leaf = (leaf - 0.02 * gradient.sign()).detach().clamp(0, 1).requires_grad_()
    assert not detector.detect(leaf.detach().numpy())[1].any() and flagged[200:].mean() > 0.5


def test_margins_score_as_detection_does():
    detector = fitted([Pixel(0, noise=0.3)])
    x = torch.from_numpy(images(20, seed=5))
    whole = detector.margin(x)
    assert torch.equal(torch.cat([detector.margin(x[:7]), detector.margin(x[7:], start=7)]), whole)
    expected = np.log(0.05 / detector.detect(x.numpy())[0]["p_values"])
    assert np.abs(whole.numpy() - expected).max() < 0.6 and not torch.equal(detector.margin(x, seed=5), whole)


@pytest.mark.parametrize("clip_values", [(0, 1), (0, 255)])
def test_arts_detector_classifier_flags_the_same_images_and_has_their_gradients(clip_values):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softplus())
    options = {"input_shape": SHAPE, "nb_classes": 3, "clip_values": clip_values, "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), **options)
    detector = fitted(clip_values=(0, 1))
    detector.set_params(clip_values=clip_values)
    x = np.concatenate([images(20, seed=5), images(20, seed=6, shift=0.3)]) * np.float32(clip_values[1])
    both = DetectorClassifier(classifier, detector)
    flagged = detector.detect(x)[1]
    assert 0 < flagged.sum() < 40
    np.testing.assert_array_equal(both.predict(x).argmax(axis=1) == 3, flagged)
    np.testing.assert_array_equal(detector.predict(x)[:, 0] > 0, flagged)
    gradient = detector.class_gradient(x, label=0)
    assert gradient.shape == (40, 1, *SHAPE) and gradient.dtype == np.float32
    unit = torch.from_numpy(x / clip_values[1]).requires_grad_()
    (expected,) = torch.autograd.grad(detector.margin(unit).sum(), unit)
    np.testing.assert_allclose(gradient[:, 0], expected / clip_values[1], rtol=1e-4)
    assert both.class_gradient(x, label=3).shape == (40, 1, *SHAPE)
    assert detector.class_gradient(x[:0]).shape == (0, 1, *SHAPE)


def test_ranges_layouts_and_tensors_give_the_same_scores():
    x = images(10, seed=6)
    detector = fitted(round_to_levels=True)
    expected = detector.detect(x)[0]["scores"]
    detector.set_params(clip_values=(0, 255))
    levels = np.rint(x * 255).astype(np.uint8)
    for same in (levels, torch.from_numpy(levels), levels.astype(float)):
        np.testing.assert_array_equal(detector.detect(same)[0]["scores"], expected)
    np.testing.assert_allclose(expected * 255, np.rint(expected * 255), atol=1e-4)


def test_a_detector_is_arts_and_is_set_all_together_or_not_at_all():
    detector = fitted()
    assert isinstance(detector, EvasionDetector)
    assert detector.get_params()["alpha"] == 0.05 and set(detector.get_params()) == set(detector.defence_params)
    before = detector.detect(images(5))[0]["p_values"]
    with pytest.raises(ValueError, match="batch_size"):
        detector.set_params(scores=[Pixel(1)], alpha=0.5, batch_size=0)
    np.testing.assert_array_equal(detector.detect(images(5))[0]["p_values"], before)
    detector.set_params(scores=Pixel(1))
    assert detector.calibration_scores is None
    with pytest.raises(ValueError, match="must be fitted"):
        detector.detect(images(5))
    with pytest.raises(ValueError, match="must be fitted"):
        detector.save("nowhere")
    detector.fit(images(40), None, 16, 1)
    report, flagged = detector.detect(images(5), batch_size=2)
    assert flagged.dtype == bool and report["alpha"] == 0.05
    copied = copy.deepcopy(detector)
    np.testing.assert_array_equal(copied.detect(images(5))[0]["p_values"], report["p_values"])


def test_calibration_scores_are_saved_and_loaded_for_the_same_scores_only(tmp_path):
    path, detector, x = tmp_path / "calibration.safetensors", fitted(), images(9, seed=2)
    detector.save(path)
    again = ConformalDetector([Pixel(0), Pixel(1)])
    again.load(path)
    np.testing.assert_array_equal(again.detect(x)[0]["p_values"], detector.detect(x)[0]["p_values"])
    for scores in ([Pixel(1), Pixel(0)], [Pixel(0)], [Pixel(0), Pixel(1, sign=-1.0)]):
        with pytest.raises(ValueError, match="other scores or models"):
            ConformalDetector(scores).load(path)
    with pytest.raises(ValueError, match="round_to_levels=False"):
        ConformalDetector([Pixel(0), Pixel(1)], round_to_levels=True).load(path)
    with pytest.raises(ValueError, match=r"^x must hold at least 1999 images"):
        ConformalDetector([Pixel(0), Pixel(1)], alpha=0.001).load(path)
    checkpoint.write(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "detector"})
    with pytest.raises(ValueError, match="is not a file of a ConformalDetector"):
        again.load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"calibration\.safetensors"):
        again.load(path)
    with pytest.raises(FileNotFoundError):
        again.load(tmp_path / "missing")


def test_calibrating_on_a_models_training_images_warns(make_model, make_levels):
    model, x = make_model((1, 4, 4)), make_levels(40, (1, 4, 4))
    model.provenance = {datasets.FINGERPRINT: "another", "start": {datasets.FINGERPRINT: datasets.fingerprint(x)}}
    detector = ConformalDetector(Likelihood(model), clip_values=(0, 255))
    with pytest.warns(UserWarning, match="x holds images that the pixelcnnpp model of the scores was trained on"):
        detector.fit(x)
    papers = PixelDefendDetector(model, (0, 255))
    with pytest.warns(UserWarning, match="trained on"):
        papers.fit(x)
    model.provenance = {datasets.SAMPLE: datasets.sample(x)}
    with pytest.warns(UserWarning, match="trained on"):  # some of them, in another order
        detector.fit(np.concatenate([make_levels(20, (1, 4, 4), seed=1), x[30:], x[:3]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.fit(make_levels(40, (1, 4, 4), seed=1))
        papers.fit(x, reference="training")


@pytest.mark.parametrize(
    ("data", "scores"),
    [("digits", [Likelihood("digits")]), ("digits", [ScoreNorm("digits-score")]),
     ("fashion-mnist", [Likelihood("fashion-mnist"), ScoreNorm("fashion-mnist-score")]),
     ("fashion-mnist", [Likelihood("fashion-mnist-40x5")])],
)  # fmt: skip
def test_calibrating_bundled_models_on_their_training_images_warns(data, scores, monkeypatch, request):
    images = request.getfixturevalue(data.replace("-", "_"))
    detector = ConformalDetector(scores, clip_values=(0, 255))
    monkeypatch.setattr(detector, "_score", lambda images, tensor, *args: np.zeros((len(tensor), len(scores))))
    for which in (images.x_train[:300], images.x_train[-300:][::-1]):
        with pytest.warns(UserWarning, match="trained on") as found:
            detector.fit(which)
        assert len(found) == len(scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.fit(images.calibration(*detector.models()).x)
        detector.fit(images.x_test)


def test_the_papers_detector_is_one_likelihood_with_conservative_ties(make_model, make_levels):
    model, x = make_model((1, 4, 4)), make_levels(60, (1, 4, 4))
    papers = PixelDefendDetector(model, (0, 255))
    general = ConformalDetector(Likelihood(model), ties="conservative", round_to_levels=True, clip_values=(0, 255))
    for detector in (papers, general):
        detector.fit(x[:30])
    np.testing.assert_array_equal(papers.detect(x)[0]["p_values"], general.detect(x)[0]["p_values"])
    np.testing.assert_allclose(papers.detect(x)[0]["bits_per_dim"], general.detect(x)[0]["scores"][:, 0])
    np.testing.assert_array_equal(papers.log_likelihoods, model.log_prob(x[:30]).numpy())
    report, flagged = papers.detect_batch(x, q=0.5)
    np.testing.assert_array_equal(report["q_values"] <= 0.5, flagged)


@pytest.mark.parametrize(
    "bad",
    [
        {"scores": []},
        {"scores": [np.mean]},
        {"scores": "digits"},
        {"combine": "fisher"},
        {"alpha": 0},
        {"alpha": 2},
        {"alpha": np.nan},
        {"two_sided": [True]},
        {"two_sided": 1},
        {"conditional": "asymptotic"},
        {"conditional": "simes", "combine": "joint"},
        {"delta": 0},
        {"delta": 1},
        {"delta": 0.001, "conditional": "monte-carlo"},
        {"ties": "first"},
        {"round_to_levels": 1},
        {"clip_values": (1, 1)},
        {"batch_size": 0},
        {"verbose": 3},
        {"seed": -1},
    ],
)
def test_impossible_arguments_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))} must"):
        ConformalDetector(**{"scores": [Pixel(0), Pixel(1)]} | bad)


def test_scores_of_different_image_shapes_are_refused(make_model):
    with pytest.raises(ValueError, match=r"^scores must be of images of one shape"):
        ConformalDetector([Likelihood(make_model((1, 4, 4))), Likelihood("digits")])


@pytest.mark.parametrize("bad", [{"q": 0}, {"q": 1.5}, {"method": "none"}])
def test_impossible_rates_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} must"):
        fitted().detect_batch(images(3), **bad)


@pytest.mark.parametrize("x", [np.full((1, *SHAPE), np.nan), np.full((1, *SHAPE), 1.5), np.zeros((1, 2)), [["a"]]])
def test_images_that_are_none_are_refused_by_name(x):
    for method in (fitted().detect, fitted().fit):
        with pytest.raises(ValueError, match=r"^x must"):
            method(x)
