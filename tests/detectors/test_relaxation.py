import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_pixeldefend.detectors.conformal import combine_p_values, conformal_p_values, joint_p_values
from art_pixeldefend.detectors.relaxation import JointLogPValues, LogPValues, combine_logs

values = st.lists(st.floats(-5, 5), min_size=3, max_size=60)


@given(calibration=values, scores=values, two_sided=st.booleans())
@settings(max_examples=200, deadline=None)
def test_approximations_are_increasing_in_anomaly_and_at_most_1(calibration, scores, two_sided):
    found = LogPValues(np.array(calibration), two_sided)(torch.tensor(sorted(scores), dtype=torch.float64))
    assert found.isfinite().all() and (found <= 0).all()
    if not two_sided:
        assert (found.diff() <= 1e-9).all()


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("count", [19, 200, 2000])
def test_approximations_are_close_to_p_values_within_the_calibration_scores(count, two_sided):
    rng = np.random.default_rng(0)
    calibration = rng.normal(size=count)
    scores = rng.uniform(calibration.min(), calibration.max(), 500)
    exact = conformal_p_values(scores, calibration, two_sided=two_sided)
    found = LogPValues(calibration, two_sided)(torch.from_numpy(scores)).exp().numpy()
    one_rank = (1 + two_sided) / (count + 1)
    assert (np.abs(found - exact) <= one_rank + 0.15 * exact).all()


def test_scores_beyond_all_calibration_scores_still_have_a_gradient():
    scores = torch.tensor([10.0, 1000.0, -10.0], dtype=torch.float64, requires_grad=True)
    calibration = np.random.default_rng(0).normal(size=100)
    for two_sided in (False, True):
        found = LogPValues(calibration, two_sided)(scores)
        assert (found[:2] < np.log(1 / 101)).all() and found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), scores)
        assert (gradient[:2] < 0).all() and (gradient[2] > 0) == two_sided


def test_nan_and_tied_calibration_scores_give_finite_approximations():
    for calibration in (np.zeros(30), np.repeat([0.0, 1.0], 20)):
        found = LogPValues(calibration)(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, torch.nan]))
        assert found.isfinite().all() and found[-1] < np.log(1 / 31)


@given(p_values=st.lists(st.lists(st.floats(1e-5, 1), min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_combined_logarithms_are_those_of_combined_p_values(p_values):
    p_values = np.array(p_values)
    for method in ("bonferroni", "harmonic", "cauchy"):
        found = combine_logs(torch.from_numpy(p_values).log(), method).exp()
        np.testing.assert_allclose(found, combine_p_values(p_values, method), rtol=1e-6)


@pytest.mark.parametrize("method", ["bonferroni", "harmonic", "cauchy"])
def test_combined_logarithms_have_gradients_however_small_the_p_values(method):
    logs = torch.tensor([[-300.0, -0.1], [-2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(combine_logs(logs, method).sum(), logs)
    assert gradient.isfinite().all() and (gradient[:, 0] > 0).all()


def test_joint_approximations_are_close_to_joint_p_values():
    rng = np.random.default_rng(1)
    calibration, scores = rng.normal(size=(500, 3)), 1.5 * rng.normal(size=(300, 3))
    sides = (False, True, False)
    exact = joint_p_values(scores, calibration, sides, None)
    found = JointLogPValues(calibration, sides)(torch.from_numpy(scores)).exp().numpy()
    inside = exact > 3 / 501
    assert (np.abs(found - exact)[inside] <= 0.02 + 0.2 * exact[inside]).all()
    assert (found[~inside] < 0.02).all()
