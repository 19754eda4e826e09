import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from art_pixeldefend.detectors import conformal
from art_pixeldefend.detectors.conformal import (
    CONDITIONS,
    combine_p_values,
    conditional_p_values,
    conformal_p_values,
    harmonic_constant,
    joint_p_values,
    least_calibration_images,
    q_values_of,
)

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
    count = least_calibration_images(alpha, lambda count: 1 / (count + 1))
    assert conformal_p_values(np.array([1.0]), np.zeros(count))[0] <= alpha
    assert count == 1 or conformal_p_values(np.array([1.0]), np.zeros(count - 1))[0] > alpha


# Random ties


def integers(rng, count, kind):
    """Scores with many ties, few or none."""
    values = rng.normal(size=count)
    return {"none": values, "some": (2 * values).round(), "all": np.zeros(count)}[kind]


@pytest.mark.parametrize("ties", ["none", "some", "all"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("count", [9, 10])
def test_p_values_are_uniform_under_exchangeability(ties, two_sided, count):
    rng, trials = np.random.default_rng(1), 6000
    p_values = np.empty(trials)
    for i in range(trials):
        values = integers(rng, count + 1, ties)
        p_values[i] = conformal_p_values(values[:1], values[1:], two_sided=two_sided, ties=rng.random(1))[0]
    for k in range(1, (count + 1) // (1 + two_sided)):
        alpha = (1 + two_sided) * k / (count + 1)
        assert stats.binomtest(int((p_values <= alpha + 1e-9).sum()), trials, alpha).pvalue > 1e-4


@given(values=scores, calibration=scores, seed=st.integers(0, 9), two_sided=st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_ties_give_no_larger_p_values_than_conservative_ones(values, calibration, seed, two_sided):
    values, calibration = np.array(values), np.array(calibration)
    ties = np.random.default_rng(seed).random(len(values))
    random = conformal_p_values(values, calibration, two_sided=two_sided, ties=ties)
    assert (random <= conformal_p_values(values, calibration, two_sided=two_sided)).all()
    assert (random >= 1 / (len(calibration) + 1)).all() and (random <= 1).all()


# False discovery rates


@pytest.mark.parametrize("method", ["bh", "storey"])
@pytest.mark.parametrize(("size", "q"), [(10, 0.3), (40, 0.2)])
def test_batches_of_clean_images_are_flagged_in_at_most_a_share_q(method, size, q):
    """In a batch without adversarial images every discovery is false: the rate is the share of batches with one."""
    rng, trials, flagged = np.random.default_rng(0), 4000, 0
    for _ in range(trials):
        p_values = conformal_p_values(rng.random(size), rng.random(999))
        flagged += bool((q_values_of(p_values, method) <= q).any())
    assert stats.binomtest(flagged, trials, q, "greater").pvalue > 1e-3
    assert flagged > 0.7 * q * trials


@given(p_values=st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_storeys_q_values_are_benjamini_hochbergs_times_the_estimated_share_of_clean_images(p_values):
    p_values = np.array(p_values)
    clean = (1 + sum(p > 0.5 for p in p_values)) / (len(p_values) / 2)
    expected = np.minimum(q_values_of(p_values, "bh") * clean, 1)
    np.testing.assert_allclose(q_values_of(p_values, "storey"), expected)


# Combinations


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 100, 1000])
def test_the_harmonic_constant_is_the_published_one(count):
    """The bounds of Vovk and Wang 2020: at most e log K for K > 2, and log K asymptotically."""
    constant = harmonic_constant(count)
    if count <= 2:
        assert constant == count
        return
    y = np.linspace(1e-4, 50 * count, 2_000_000)
    assert constant == pytest.approx(((y + count) * np.log1p(y) / y).min(), rel=1e-6)
    assert np.log(count) < constant <= np.e * np.log(count)


def extremes(rng, size, count, level):
    """Uniform p-values that are small together or one at a time, so that a given combination is at its worst."""
    dependent = rng.random((size, 1)).repeat(count, axis=1)
    alone = np.ones((size, count))  # exactly one is small, in turn: min(p) <= level / K with probability `level`
    which, small = rng.integers(0, count, size), rng.random(size) * level
    alone[:] = level / count + (1 - level / count) * rng.random((size, count))
    rows = rng.random(size) < level
    alone[rows, which[rows]] = small[rows] / count
    return {"equal": dependent, "exclusive": alone, "opposite": np.abs(np.arange(count) % 2 - dependent)}


@pytest.mark.parametrize("method", ["bonferroni", "harmonic"])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("kind", ["equal", "exclusive", "opposite"])
def test_combined_p_values_are_valid_under_full_dependence(method, count, kind):
    rng, size = np.random.default_rng(0), 20_000
    for alpha in (0.01, 0.05, 0.2):
        p_values = np.clip(extremes(rng, size, count, alpha)[kind], 1e-12, 1)
        for k in range(count):  # each is uniform where it matters
            assert stats.binomtest(int((p_values[:, k] <= alpha / count).sum()), size, alpha / count).pvalue > 1e-5
        small = int((combine_p_values(p_values, method) <= alpha).sum())
        assert stats.binomtest(small, size, alpha, "greater").pvalue > 1e-4


def test_the_harmonic_mean_needs_its_constant():
    """Two uniform p-values of which the harmonic mean is below alpha more often than alpha, but not twice it."""
    rng, size, alpha = np.random.default_rng(0), 200_000, 0.1
    first = rng.random(size)
    mirrored = np.where(first < alpha, alpha - first, first)  # one is small where the other is not
    p_values = np.stack([first, mirrored], axis=1)
    combined = combine_p_values(p_values, "harmonic")
    assert stats.kstest(mirrored, "uniform").pvalue > 0.001
    for level in (0.02, 0.04, 0.05):
        plain = int((combined / 2 <= level).sum())
        assert stats.binomtest(plain, size, level, "greater").pvalue < 1e-6
        assert stats.binomtest(int((combined <= level).sum()), size, level, "greater").pvalue > 1e-4


@given(
    p_values=st.lists(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    method=st.sampled_from(["bonferroni", "harmonic", "cauchy"]),
)
@settings(max_examples=100, deadline=None)
def test_combinations_are_symmetric_increasing_and_at_most_1(p_values, method):
    p_values = np.array(p_values)
    combined = combine_p_values(p_values, method)
    assert ((combined > 0) & (combined <= 1)).all()
    np.testing.assert_allclose(combine_p_values(p_values[:, ::-1], method), combined, rtol=1e-6)
    assert (combine_p_values(p_values / 2, method) <= combined * (1 + 1e-9)).all()
    np.testing.assert_allclose(combine_p_values(p_values[:, :1], method), p_values[:, 0])


def test_cauchys_combination_is_uniform_for_independent_p_values():
    combined = combine_p_values(np.random.default_rng(0).random((20_000, 4)), "cauchy")
    assert stats.kstest(combined, "uniform").pvalue > 0.001


@pytest.mark.parametrize("sides", [(False, False), (True, False)])
@pytest.mark.parametrize("dependence", ["equal", "opposite", "independent", "ties"])
def test_joint_p_values_are_uniform_whatever_the_dependence(sides, dependence):
    rng, count, trials = np.random.default_rng(2), 19, 4000
    p_values = np.empty(trials)
    for i in range(trials):
        first, second = rng.normal(size=(2, count + 1))
        second = {"equal": first, "opposite": -first, "independent": second, "ties": second.round()}[dependence]
        both = np.stack([first, second], axis=1)
        p_values[i] = joint_p_values(both[:1], both[1:], sides, rng.random(1))[0]
    for alpha in (0.05, 0.1, 0.25, 0.5, 0.9):
        assert stats.binomtest(int((p_values <= alpha + 1e-9).sum()), trials, alpha).pvalue > 1e-4


def test_joint_p_values_do_not_depend_on_how_images_are_divided(monkeypatch):
    rng = np.random.default_rng(0)
    images, calibration, ties = rng.normal(size=(50, 3)), rng.normal(size=(40, 3)), rng.random(50)
    expected = joint_p_values(images, calibration, (False, True, False), ties)
    monkeypatch.setattr(conformal, "PIECE", 100)
    np.testing.assert_array_equal(joint_p_values(images, calibration, (False, True, False), ties), expected)
    alone = [joint_p_values(images[i : i + 1], calibration, (False, True, False), ties[i : i + 1])[0] for i in range(5)]
    np.testing.assert_array_equal(alone, expected[:5])


# Calibration-conditional p-values


@given(count=st.integers(2, 500), delta=st.floats(0.01, 0.9), method=st.sampled_from(CONDITIONS))
@settings(max_examples=40, deadline=None)
def test_conditional_p_values_dominate_marginal_ones_and_keep_their_order(count, delta, method):
    ranks = np.unique(np.linspace(1, count + 1, 50).astype(int))
    marginal = ranks / (count + 1)
    conditional = conditional_p_values(marginal, count, delta, method)
    assert (conditional >= marginal).all() and (conditional <= 1).all() and conditional[-1] == 1
    assert (np.diff(conditional) >= -1e-12).all()


@pytest.mark.parametrize("method", CONDITIONS)
@pytest.mark.parametrize("count", [20, 1000])
def test_conditional_p_values_hold_for_as_many_calibration_sets_as_asked(method, count):
    """P(p <= alpha) <= alpha for all alpha: the k-th of N uniform numbers is the false-positive rate at rank k."""
    rng, delta, trials = np.random.default_rng(5), 0.2, 1500
    bounds = conditional_p_values(np.arange(1, count + 1) / (count + 1), count, delta, method)
    failed = sum(bool((np.sort(rng.random(count)) > bounds).any()) for _ in range(trials))
    assert stats.binomtest(failed, trials, delta, "greater").pvalue > 0.001
    if method == "monte-carlo":  # and not much fewer
        assert failed > 0.5 * delta * trials
    marginal = np.arange(1, count + 1) / (count + 1)
    assert sum(bool((np.sort(rng.random(count)) > marginal).any()) for _ in range(100)) > 80


def test_bounds_are_those_of_the_formulas():
    count, delta = 40, 0.1
    p_values, terms = np.arange(1, count + 1) / (count + 1), 20
    simes = conditional_p_values(p_values, count, delta, "simes")
    for rank in (1, 2, 10):
        i = count + 1 - rank
        product = np.prod([(i - j) / (count - j) for j in range(terms)])
        assert simes[rank - 1] == pytest.approx(1 - (delta * product) ** (1 / terms))
    dkwm = conditional_p_values(p_values, count, delta, "dkwm")
    assert dkwm[0] == pytest.approx(1 / count + np.sqrt(np.log(2 / delta) / (2 * count)))


def test_the_least_number_of_images_is_searched_for_any_least_p_value():
    for method in CONDITIONS:

        def least(count, method=method):
            return float(conditional_p_values(np.array([1 / (count + 1)]), count, 0.1, method)[0])

        count = least_calibration_images(0.05, least)
        assert least(count) <= 0.05 < least(count - 1)
    with pytest.raises(ValueError, match=r"^alpha must be larger"):
        least_calibration_images(0.05, lambda count: 0.1)
