import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from art_pixeldefend.models.pixelcnnpp import mixture

finite = st.floats(-1e4, 1e4, width=32)


def parameters(channels, mixtures):
    size = mixture.parameters_per_pixel(channels, mixtures)
    return hnp.arrays(np.float32, size, elements=finite)


def all_levels(parts):
    return mixture.log_prob(parts.for_each_level(), torch.arange(256, dtype=parts.means.dtype))


@given(data=st.data(), channels=st.sampled_from([1, 2, 3]), mixtures=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_probabilities_of_the_256_levels_sum_to_one_for_any_parameters(data, channels, mixtures):
    params = torch.from_numpy(data.draw(parameters(channels, mixtures)))
    x = torch.from_numpy(data.draw(hnp.arrays(np.uint8, channels))).float()
    for channel in range(channels):
        logs = all_levels(mixture.components(params, x, channel))
        assert not logs.isnan().any()
        assert abs(logs.double().exp().sum().item() - 1) < 1e-5


@pytest.mark.parametrize("log_scale", [-50.0, -7.0, 0.0, 7.0, 50.0])
@pytest.mark.parametrize("mean", [-1e30, -1.0, 0.0, 0.37, 1.0, 1e30])
def test_extreme_scales_and_means_give_finite_ordered_probabilities(mean, log_scale):
    params = torch.tensor([0.0, mean, log_scale])
    logs = all_levels(mixture.components(params, torch.zeros(1), 0))
    assert logs.isfinite().all()
    assert abs(logs.double().exp().sum().item() - 1) < 1e-5


@given(mean=st.floats(-1, 1), log_scale=st.floats(-4, 1), level=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_probability_is_the_difference_of_two_logistic_functions(mean, log_scale, level):
    params = torch.tensor([0.0, mean, log_scale], dtype=torch.float64)
    value = mixture.log_prob(mixture.components(params, torch.zeros(1), 0), torch.tensor(float(level))).exp().item()

    def cdf(edge):
        return 1 / (1 + math.exp(-((edge - 127.5) / 127.5 - mean) / math.exp(log_scale)))

    expected = (1 if level == 255 else cdf(level + 0.5)) - (0 if level == 0 else cdf(level - 0.5))
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_means_of_later_channels_follow_earlier_ones_linearly():
    params = torch.zeros(10)
    params[7] = 0.5  # green's coefficient of red
    one, other = (mixture.components(params, torch.tensor([red, 0.0, 0.0]), 1).means for red in (100.0, 140.0))
    assert (other - one).item() == pytest.approx(40 * math.tanh(0.5), rel=1e-6)


@given(data=st.data(), mixtures=st.integers(1, 5), eps=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_best_level_of_a_range_is_the_argmax_of_its_log_probabilities(data, mixtures, eps):
    elements = st.floats(-8, 8, width=32)
    params = torch.from_numpy(data.draw(hnp.arrays(np.float32, (4, 3 * mixtures), elements=elements))).double()
    center = torch.from_numpy(data.draw(hnp.arrays(np.uint8, 4))).long()
    low, high = (center - eps).clamp_min(0), (center + eps).clamp_max(255)
    parts = mixture.components(params, torch.zeros(4, 1, dtype=torch.float64), 0)
    best = mixture.best_level(parts, low, high)
    assert ((low <= best) & (best <= high)).all()
    logs = all_levels(parts)
    z = torch.arange(256)
    feasible = (z >= low[:, None]) & (z <= high[:, None])
    most = logs.where(feasible, -torch.inf).amax(dim=1)
    assert torch.allclose(logs.gather(1, best[:, None])[:, 0], most, rtol=1e-12, atol=1e-9)


@given(data=st.data(), mixtures=st.integers(1, 5), eps=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_masses_are_the_probabilities_wherever_these_are_not_tiny(data, mixtures, eps):
    params = torch.from_numpy(data.draw(hnp.arrays(np.float32, (4, 3 * mixtures), elements=finite))).double()
    center = torch.from_numpy(data.draw(hnp.arrays(np.uint8, 4))).long()
    low, high = (center - eps).clamp_min(0), (center + eps).clamp_max(255)
    parts = mixture.components(params, torch.zeros(4, 1, dtype=torch.float64), 0)
    found = mixture.masses(parts, low, high)
    z = low[:, None] + torch.arange(found.shape[1])
    expected = all_levels(parts).exp().gather(1, z.clamp_max(255)).where(z <= high[:, None], 0.0)
    tiny = expected < mixture.SMALLEST
    assert (found[tiny] < 10 * mixture.SMALLEST).all()
    assert torch.allclose(found[~tiny], expected[~tiny], rtol=1e-9, atol=0)


def test_far_tails_keep_the_order_of_levels():
    """All of a range may lie where probabilities underflow; the level nearest the mean must win, not the first."""
    params = torch.tensor([[0.0, 1.0, -7.0]])
    parts = mixture.components(params, torch.zeros(1, 1), 0)
    assert mixture.best_level(parts, torch.tensor([0]), torch.tensor([64])).item() == 64
