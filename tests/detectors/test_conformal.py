import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_pixeldefend.detectors.conformal import conformal_p_values, least_calibration_images

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(scores=scores, calibration=scores)
@settings(max_examples=200, deadline=None)
def test_a_p_value_is_the_rank_among_the_calibration_scores(scores, calibration):
    p_values = conformal_p_values(np.array(scores), np.array(calibration))
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    np.testing.assert_array_equal(p_values, expected)


@given(calibration=scores)
@settings(max_examples=50, deadline=None)
def test_nan_has_the_least_p_value_whatever_the_calibration_scores(calibration):
    calibration = np.array([*calibration, np.inf])
    assert conformal_p_values(np.array([np.nan]), calibration) == 1 / (len(calibration) + 1)


@pytest.mark.parametrize("ties", [False, True])
def test_exchangeable_scores_are_flagged_at_most_at_the_rate_alpha(ties):
    rng, alpha, count = np.random.default_rng(0), 0.1, 2000
    flagged = 0
    for _ in range(count):
        values = rng.normal(size=31)
        values = values.round() if ties else values
        flagged += int(conformal_p_values(values[:1], values[1:])[0] <= alpha)
    assert stats.binomtest(flagged, count, alpha, "greater").pvalue > 0.001
    if not ties:  # 3 of 31 ranks
        assert stats.binomtest(flagged, count, 3 / 31).pvalue > 0.001


@given(alpha=st.floats(1e-4, 1) | st.integers(1, 10_000).map(lambda n: 1 / n))
@settings(max_examples=500, deadline=None)
def test_the_least_number_of_images_is_the_first_that_reaches_alpha(alpha):
    count = least_calibration_images(alpha)
    assert conformal_p_values(np.array([1.0]), np.zeros(count))[0] <= alpha
    assert count == 1 or conformal_p_values(np.array([1.0]), np.zeros(count - 1))[0] > alpha
