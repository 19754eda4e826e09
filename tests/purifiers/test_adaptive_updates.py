import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_pixeldefend.purifiers.adaptive_updates import AdaptiveStep, adaptive_updates

WIDE = {"smallest": 0.0, "largest": 1e6, "stop": 0.0}


def gaussian(mean, variance):
    """The score of independent pixels N(mean, variance)."""
    return lambda x: (mean - x) / variance


@given(st.floats(0.01, 100), st.floats(0.01, 0.9), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_updates_follow_the_closed_form_of_a_gaussian(variance, rate, steps):
    """alpha is rate v: each step goes the fraction ``rate`` of the way to the mean."""
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    moved, taken = adaptive_updates(x, gaussian(0.4, variance), steps, AdaptiveStep(rate=rate, **WIDE))
    torch.testing.assert_close(moved, 0.4 + (1 - rate) ** steps * (x - 0.4), rtol=1e-6, atol=1e-8)
    assert taken.tolist() == [steps] * 4


def test_the_closed_form_holds_in_float32():
    x = torch.randn(4, 1, 28, 28)
    moved, _ = adaptive_updates(x, gaussian(0.4, 0.5), 3, AdaptiveStep(rate=0.2, **WIDE))
    torch.testing.assert_close(moved, 0.4 + 0.8**3 * (x - 0.4), rtol=1e-3, atol=1e-4)


def undivided(sigma, variance, mean=0.4):
    """ADP's own parameterisation: a network that predicts minus the unit noise n of x + sigma n, and is not divided.

    The best one for pixels N(mean, variance), by regression of -n on x + sigma n.
    """
    return lambda x: -sigma / (variance + sigma**2) * (x - mean)


def test_the_undivided_network_is_the_regression_of_minus_the_noise():
    noise = torch.randn(100_000, dtype=torch.float64)
    noisy = 0.4 + 0.3 * torch.randn(100_000, dtype=torch.float64) + 0.25 * noise
    design = torch.stack([noisy, torch.ones_like(noisy)], 1)
    slope, shift = torch.linalg.lstsq(design, -noise[:, None]).solution.flatten().tolist()
    found = undivided(0.25, 0.3**2)(torch.tensor([0.0, 1.0]))
    assert found.tolist() == pytest.approx([shift, slope + shift], abs=0.02)


@given(st.floats(0.05, 1), st.floats(0.01, 1), st.floats(0.01, 0.5))
@settings(max_examples=30, deadline=None)
def test_in_adps_own_parameterisation_a_gaussian_is_followed_with_steps_of_its_closed_form(sigma, variance, rate):
    """1 - z = delta sigma / (v + sigma^2): alpha is rate (v + sigma^2) / sigma, and a step goes ``rate`` of the way."""
    x = 0.4 + torch.randn(4, 2, 3, 3, dtype=torch.float64)
    direction, rule = undivided(sigma, variance), AdaptiveStep(rate=rate, **WIDE)
    sizes = rule.sizes(direction(x), direction(x + rule.delta * direction(x)))
    torch.testing.assert_close(sizes, torch.full_like(sizes, rate * (variance + sigma**2) / sigma), rtol=1e-6, atol=0)
    moved, _ = adaptive_updates(x, direction, 3, rule)
    torch.testing.assert_close(moved, 0.4 + (1 - rate) ** 3 * (x - 0.4), rtol=1e-6, atol=1e-8)


def test_adps_published_rule_removes_noise_of_an_unknown_level_at_its_largest_step_and_then_stops():
    """For one clean image a network that sees no noise level predicts noise of unit size whatever the level is.

    It then points at the image with length sqrt(D) and z is 1: every step is the largest one, 0.1, until the image is
    nearer than that. There the direction turns around, z falls, and the rule stops.
    """
    size = math.sqrt(784)

    def direction(x):
        gap = 0.5 - x
        norm = gap.flatten(1).norm(dim=1)[:, None, None, None]
        return size * gap / (norm.square() + (0.01 * size) ** 2).sqrt()  # smooth within 0.01 of the image

    noise = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    noise *= size / noise.flatten(1).norm(dim=1)[:, None, None, None]
    x = 0.5 + 0.25 * noise
    for steps, left in ((1, 0.15), (2, 0.05)):
        moved, taken = adaptive_updates(x, direction, steps)
        errors = (moved - 0.5).flatten(1).norm(dim=1) / size
        assert errors.tolist() == pytest.approx([left] * 3, abs=0.003) and taken.tolist() == [steps] * 3
    moved, taken = adaptive_updates(x, direction, 10)
    assert (taken < 10).all() and ((moved - 0.5).flatten(1).norm(dim=1) / size < 0.06).all()


@pytest.mark.parametrize(("variance", "alpha"), [(0.01, 5e-4), (1.0, 0.05), (100.0, 0.1)])
def test_published_step_sizes_of_a_gaussian_are_bounded(variance, alpha):
    g = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    sizes = AdaptiveStep().sizes(g, g * (1 - 1e-3 / variance))
    torch.testing.assert_close(sizes, torch.full_like(sizes, alpha))


def test_the_published_rule_stops_where_z_falls_to_19_20ths():
    """alpha = lambda delta / (1 - z) <= 0.001 with lambda 0.05 and delta 0.001 is z <= 0.95."""
    g = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    z = torch.tensor([0.949, 0.951], dtype=torch.float64).reshape(2, 1, 1, 1)
    rule = AdaptiveStep()
    assert (rule.sizes(g, g * z) > rule.stop).tolist() == [False, True]


def test_a_linear_direction_gets_the_largest_step_and_a_growing_one_the_smallest():
    g = torch.ones(2, 1, 2, 2)
    ahead = torch.stack([torch.ones(1, 2, 2), 1.5 * torch.ones(1, 2, 2)])
    torch.testing.assert_close(AdaptiveStep().sizes(g, ahead), torch.tensor([0.1, 1e-5]))


def test_an_image_without_direction_stops_and_stays():
    x = torch.randn(3, 1, 4, 4)

    def direction(x):
        return -x * (x[:, :1, :1, :1] != 9)

    x[1, 0, 0, 0] = 9
    moved, taken = adaptive_updates(x, direction, 4)
    assert torch.equal(moved[1], x[1]) and moved.isfinite().all()
    assert taken.tolist() == [4, 0, 4]


def test_a_stopped_image_is_frozen_while_others_move():
    """The direction bends more and more below 0.5: the first image stops there, the second is far away."""

    def direction(x):
        return -torch.where(x < 0.5, 1e4 * x, torch.ones_like(x))

    x = torch.tensor([0.6, 5.0]).reshape(2, 1, 1, 1)
    history = [adaptive_updates(x, direction, steps)[0].flatten() for steps in range(1, 8)]
    firsts = torch.stack(history)[:, 0]
    taken = adaptive_updates(x, direction, 7)[1].tolist()
    assert 0 < taken[0] < 7 and taken[1] == 7
    assert (firsts[taken[0] - 1 :] == firsts[-1]).all()
    assert history[-1][1].item() == pytest.approx(5 - 7 * 0.1, abs=1e-5)


def test_images_do_not_influence_each_other():
    x = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    variances = torch.tensor([0.001, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)[:, None, None, None]
    rule = AdaptiveStep(rate=0.1)
    # The direction knows an image's variance by its position, so each is moved once alone and once with the others.
    alone = [adaptive_updates(x[i : i + 1], gaussian(0.0, variances[i]), 6, rule)[0] for i in range(5)]

    def direction(some):
        # Images are multiples of one another's originals: find each by its first pixel's ratio.
        ratios = (some[:, None] / x[None]).flatten(2)
        index = ratios.std(2).argmin(1)
        return -some / variances[index]

    torch.testing.assert_close(adaptive_updates(x, direction, 6, rule)[0], torch.cat(alone))


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_equal_those_of_the_plain_graph(detach):
    weight = torch.randn(16, 16, dtype=torch.float64) / 8

    def direction(x):
        return torch.tanh(x.flatten(1) @ weight).reshape(x.shape) - x

    def plain(x, steps, rule):
        for _ in range(steps):
            g = direction(x)
            ahead = direction(x + rule.delta * g)
            z = (g * ahead).sum((1, 2, 3)) / (g * g).sum((1, 2, 3))
            alpha = rule.rate * rule.delta / (1 - z)
            x = x + (alpha.detach() if rule.detach else alpha)[:, None, None, None] * g
        return x

    rule = AdaptiveStep(rate=0.2, detach=detach, **WIDE)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(adaptive_updates(x, direction, 4, rule)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x, 4, rule).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_gradients_of_the_default_rule_are_exact():
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=torch.float64) / 8
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def moved(x):
        direction = lambda x: torch.tanh(x.flatten(1) @ weight).reshape(x.shape) - x  # noqa: E731
        return adaptive_updates(x, direction, 3, AdaptiveStep(rate=0.5, largest=10))[0]

    assert torch.autograd.gradcheck(moved, x, eps=1e-6, rtol=1e-3, atol=1e-6)


def test_gradients_are_finite_where_images_stop_or_have_no_direction():
    x = torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1).requires_grad_()
    moved, _ = adaptive_updates(x, lambda x: -x, 3, AdaptiveStep(detach=False))
    (gradient,) = torch.autograd.grad(moved.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rate", {"rate": 0.0}),
        ("delta", {"delta": math.nan}),
        ("stop", {"stop": -1.0}),
        ("smallest", {"smallest": 0.2}),
        ("detach", {"detach": "no"}),
    ],
)
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} "):
        AdaptiveStep(**arguments)


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match=r"^steps "):
        adaptive_updates(torch.zeros(1, 1, 1, 1), lambda x: x, 0)
