import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from torch import nn

from art_pixeldefend.evaluation import figures
from art_pixeldefend.evaluation.smoothing import ABSTAIN, Certificates, certified_table, certify_smoothed
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import PurifiedModel, Purifier, ScoreDenoiser

SIGMA = 0.25


class Linear(nn.Module):
    """Two classes on either side of a hyperplane at distance ``offset`` from the origin."""

    def __init__(self, offset=0.1, seed=0):
        super().__init__()
        normal = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        self.normal, self.offset = nn.Parameter(normal / normal.norm()), offset

    def forward(self, x):
        distance = x.flatten(1) @ self.normal - self.offset
        return torch.stack([-distance, distance], dim=1)


def images(count=6, seed=1):
    return (0.2 * np.random.default_rng(seed).standard_normal((count, 1, 4, 4))).astype(np.float32)


def distances(model, x):
    return model(torch.from_numpy(x))[:, 1].detach().numpy()


# The closed form


def test_radii_of_a_linear_classifier_approach_its_distance_to_the_boundary():
    """Phi(distance / sigma) is the probability of the class, so the exact radius is the distance."""
    model, x = Linear(), images(12)
    distance = distances(model, x)
    found = certify_smoothed(model, x, SIGMA, n=20_000)
    far = np.abs(distance) > 0.02
    assert (found.predictions[far] == (distance > 0)[far]).all()
    assert (found.radii <= np.abs(distance)).all()
    within_reach = far & (np.abs(distance) < 0.9 * found.largest_radius)
    assert within_reach.sum() >= 8
    np.testing.assert_allclose(found.radii[within_reach], np.abs(distance)[within_reach], atol=0.04)


def test_counts_are_binomial_with_the_probability_of_the_class():
    model, x = Linear(), images(12)
    found = certify_smoothed(model, x, SIGMA, n=2000)
    probabilities = norm.cdf(np.where(found.selected == 1, 1, -1) * distances(model, x) / SIGMA)
    p_values = [binomtest(int(k), 2000, p).pvalue for k, p in zip(found.counts, probabilities, strict=True)]
    assert min(p_values) > 1e-4


def test_certificates_are_right_as_often_as_they_say():
    """At alpha = 0.2 a fifth of the radii may exceed the exact one, and about a fifth does."""
    model, x = Linear(), np.repeat(images(1), 400, axis=0)
    exact = abs(distances(model, x[:1])[0])
    found = certify_smoothed(model, x, SIGMA, n=200, n0=50, alpha=0.2)
    exceed = int((found.radii > exact).sum())
    assert binomtest(exceed, 400, 0.2, alternative="greater").pvalue > 1e-3 and exceed > 20


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([1e-3, 0.05, 0.3]))
def test_lower_bounds_are_one_sided_clopper_pearson_bounds(n, share, alpha):
    count = round(share * n)
    found = Certificates(np.array([0]), np.array([count]), n, SIGMA, alpha)
    expected = binomtest(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert found.lower_bounds[0] == pytest.approx(expected, abs=1e-9)


def test_the_largest_radius_is_that_of_agreeing_draws():
    found = Certificates(np.array([0]), np.array([1000]), 1000, SIGMA, 0.001)
    assert found.radii[0] == pytest.approx(found.largest_radius) == pytest.approx(2.46 * SIGMA, rel=0.01)


def test_an_undecided_classifier_abstains():
    found = Certificates(np.array([3, 3]), np.array([520, 900]), 1000, SIGMA, 0.001)
    assert found.predictions.tolist() == [ABSTAIN, 3] and found.radii[0] == 0 < found.radii[1]
    assert found.accuracy(np.array([3, 3])) == 0.5 and found.accuracy(np.array([3, 3]), 5.0) == 0


# Draws, batches, classifiers


def equal(a, b):
    return np.array_equal(a.selected, b.selected) and np.array_equal(a.counts, b.counts)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 75, 10_000])
def test_results_do_not_depend_on_the_batch_size(batch_size):
    model, x = Linear(), images()
    first = certify_smoothed(model, x, SIGMA, n0=10, n=20)
    assert equal(certify_smoothed(model, x, SIGMA, n0=10, n=20, batch_size=batch_size), first)
    assert not equal(certify_smoothed(model, x, SIGMA, n0=10, n=20, seed=1), first)


def test_selection_and_estimation_draws_are_different_ones():
    """A classifier that returns the draw's number: the class of the selection sample never occurs again."""
    seen = []

    def count_up(x):
        seen.append(len(x))
        return torch.eye(200)[sum(seen) - len(x) : sum(seen)]

    found = certify_smoothed(count_up, images(1), SIGMA, n0=50, n=100)
    assert sum(seen) == 150 and found.counts.tolist() == [0]


def test_art_classifiers_modules_and_functions_give_the_same():
    model, x = Linear(), images()
    art = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 2)
    expected = certify_smoothed(model, x, SIGMA, n=100)
    assert equal(certify_smoothed(art, x, SIGMA, n=100), expected)
    assert equal(certify_smoothed(lambda x: model(x), torch.from_numpy(x), SIGMA, n=100), expected)


def test_a_denoiser_sees_noise_that_is_not_clipped():
    denoiser = ScoreDenoiser(ScoreModel((1, 4, 4), (4,), (1,), 4, mean=0.0, deviation=0.2), SIGMA)
    model, x = Linear(offset=0.3), np.abs(images())
    art = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 4, 4), 2, preprocessing_defences=denoiser)
    expected = certify_smoothed(lambda x: model(denoiser.model.denoise(x, SIGMA).clamp(0, 1)), x, SIGMA, n=200)
    assert equal(certify_smoothed(art, x, SIGMA, n=200), expected)


class Coin(Purifier):
    """Replaces an image by one of two constant images, each with probability 1/2."""

    stochastic = True

    def purify(self, x, generator):
        return (generator.uniform((1, 1, 1)) < 0.5).to(x.dtype).expand_as(x)


def coin(seed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    model[1].weight.data = torch.stack([torch.full((16,), 0.1), torch.zeros(16)])
    return PurifiedModel(nn.Sequential(model, Shift()), Coin(seed=seed))


class Shift(nn.Module):
    def forward(self, x):
        return x - torch.tensor([0.5, 0.0])


def test_a_classifier_that_tosses_a_coin_gets_no_certificate():
    x = np.zeros((8, 1, 4, 4), np.float32)
    found = certify_smoothed(coin(None), x, SIGMA, n=200, batch_size=10)
    assert (found.predictions == -1).all()
    assert 50 < found.counts.mean() < 150  # both classes occur


def test_purifiers_that_repeat_their_draws_are_refused():
    x, art = np.zeros((2, 1, 4, 4), np.float32), (nn.CrossEntropyLoss(), (1, 4, 4), 2)
    behind = PyTorchClassifier(Linear(), *art, preprocessing_defences=Coin(seed=0))
    for classifier in (coin(0), nn.Sequential(coin(0)), PyTorchClassifier(coin(0), *art), behind):
        with pytest.raises(ValueError, match=r"^classifier must draw new random numbers.*Coin"):
            certify_smoothed(classifier, x, SIGMA, n=20)


def test_a_module_is_evaluated_in_evaluation_mode_and_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(1), Linear())
    certify_smoothed(model, images(2), SIGMA, n=20)
    assert model.training and model[0].num_batches_tracked == 0


def test_nan_is_refused():
    with pytest.raises(ValueError, match=r"^classifier returned NaN"):
        certify_smoothed(lambda x: torch.full((len(x), 2), torch.nan), images(2), SIGMA, n=20)


# Files


def test_a_file_needs_a_name_for_the_classifier(tmp_path):
    with pytest.raises(ValueError, match=r"^name must say"):
        certify_smoothed(Linear(), images(), SIGMA, file=tmp_path / "certificates.json")
    assert not list(tmp_path.iterdir())


def test_a_stopped_certification_goes_on_where_it_was(tmp_path):
    model, x, file = Linear(), images(20), tmp_path / "certificates.json"
    expected = certify_smoothed(model, x, SIGMA, n=50)
    calls = 0

    class Stopping(Linear):
        def forward(self, x):
            nonlocal calls
            calls += 1
            if calls == 12:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        certify_smoothed(Stopping(), x, SIGMA, n=50, file=file, name="a", batch_size=150)
    kept = len(json.loads(file.read_text())["images"])
    assert kept == 8
    calls = 20
    assert equal(certify_smoothed(Stopping(), x, SIGMA, n=50, file=file, name="a", batch_size=150), expected)
    assert calls == 20 + 12


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sigma", {"sigma": 0.3}),
        ("n", {"n": 60}),
        ("alpha", {"alpha": 0.01}),
        ("seed", {"seed": 1}),
        ("images", {"x": images(seed=2)}),
        ("classifier", {"classifier": Linear(seed=3)}),
        ("name", {"name": "b"}),
    ],
)
def test_a_file_of_other_arguments_is_refused_and_kept(tmp_path, name, change):
    arguments = {
        "classifier": Linear(),
        "x": images(),
        "sigma": SIGMA,
        "n": 50,
        "file": tmp_path / "certificates.json",
        "name": "a",
    }
    certify_smoothed(**arguments)
    before = arguments["file"].read_bytes()
    with pytest.raises(ValueError, match=rf"^file .* is of another {name}:"):
        certify_smoothed(**(arguments | change))
    assert arguments["file"].read_bytes() == before


def test_a_file_of_another_denoiser_is_refused(tmp_path):
    def classifier(sigma):
        denoiser = ScoreDenoiser(ScoreModel((1, 4, 4), (4,), (1,), 4), sigma)
        return PyTorchClassifier(Linear(), nn.CrossEntropyLoss(), (1, 4, 4), 2, preprocessing_defences=denoiser)

    file = tmp_path / "certificates.json"
    certify_smoothed(classifier(0.2), images(2), SIGMA, n=20, file=file, name="a")
    with pytest.raises(ValueError, match=r"^file .* is of another classifier"):
        certify_smoothed(classifier(0.3), images(2), SIGMA, n=20, file=file, name="a")


@pytest.mark.parametrize("change", [{"runs": 3}, {"combine": "vote"}])
def test_a_file_of_another_number_of_runs_or_combination_is_refused(change, tmp_path):
    denoiser = ScoreDenoiser(ScoreModel((1, 4, 4), (4,), (1,), 4), 0.2)
    file = tmp_path / "certificates.json"
    certify_smoothed(PurifiedModel(Linear(), denoiser), images(2), SIGMA, n=20, file=file, name="a")
    with pytest.raises(ValueError, match=r"^file .* is of another classifier"):
        certify_smoothed(PurifiedModel(Linear(), denoiser, **change), images(2), SIGMA, n=20, file=file, name="a")


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "notes.json"
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"^file .* does not hold certificates"):
        certify_smoothed(Linear(), images(), SIGMA, file=file, name="a")
    assert file.read_text() == "[1, 2]"


def test_overwriting_replaces_any_file(tmp_path):
    file = tmp_path / "certificates.json"
    certify_smoothed(Linear(), images(), SIGMA, n=50, file=file, name="a")
    expected = file.read_text()
    for before in ("[1, 2]", expected.replace(f'"sigma": {SIGMA}', '"sigma": 0.5')):
        assert before != expected
        file.write_text(before)
        certify_smoothed(Linear(), images(), SIGMA, n=50, file=file, name="a", overwrite=True)
        assert file.read_text() == expected


SCRIPT = """
import sys
import numpy as np
import torch
from art_pixeldefend.evaluation.smoothing import certify_smoothed
from art_pixeldefend.processes import process_group

x = np.linspace(-1, 1, 21, dtype=np.float32)[:, None]
found = certify_smoothed(lambda x: torch.cat([-x, x], 1), x, 0.25, n=100, file=sys.argv[1], name="a")
np.save(f"{sys.argv[1]}.{process_group().rank}.npy", np.stack([found.selected, found.counts]))
"""


def test_several_processes_give_the_results_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "script.py", "certificates"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    x = np.linspace(-1, 1, 21, dtype=np.float32)[:, None]
    expected = certify_smoothed(lambda x: torch.cat([-x, x], 1), x, SIGMA, n=100)
    for rank in (0, 1):
        found = np.load(tmp_path / f"certificates.{rank}.npy")
        assert np.array_equal(found, [expected.selected, expected.counts])
    assert len(json.loads((tmp_path / "certificates").read_text())["images"]) == 21


# Reports


def test_the_table_has_certified_accuracies_by_radius():
    y = np.zeros(4, dtype=int)
    found = Certificates(np.array([0, 0, 1, 0]), np.array([1000, 900, 1000, 500]), 1000, SIGMA, 0.001)
    assert found.radii_of(y).round(2).tolist() == [0.62, 0.28, -np.inf, -np.inf]
    table = certified_table({"linear": found}, y, (0.0, 0.5, 0.75))
    assert table.splitlines()[0] == "|  | 0 | 0.5 | 0.75 | abstained |"
    assert table.splitlines()[-1] == "| linear | 50.0 | 25.0 | out of reach | 25.0 |"


def test_the_plot_is_drawn(tmp_path):
    figures.certified_accuracy(tmp_path / "curve.png", {"a": np.array([0.1, 0.3, -np.inf]), "b": np.array([-np.inf])})
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sigma", {"sigma": 0.0}),
        ("n0", {"n0": 0}),
        ("n", {"n": 1.5}),
        ("alpha", {"alpha": 0.0}),
        ("batch_size", {"batch_size": 0}),
        ("classifier", {"classifier": "fashion-mnist"}),
        ("x", {"x": np.array(["a"])}),
    ],
)
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        certify_smoothed(**({"classifier": Linear(), "x": images(), "sigma": SIGMA} | arguments))
