import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_pixeldefend import PurifiedModel
from art_pixeldefend.attacks import AdaptivePGD, adaptive_pgd, losses
from art_pixeldefend.purifiers.base import Purifier

SHAPE = (1, 6, 6)


class AddNoise(Purifier):
    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return (x + 0.3 * generator.normal(x.shape[1:])).clamp(0, 1)


class Posterize(Purifier):
    """A discontinuous purifier without random numbers."""

    def purify(self, x, generator):
        return (x * 8).round() / 8


class Flip(Purifier):
    """Inverts images: the identity is the wrong direction."""

    gradients = ("identity", "exact")

    def purify(self, x, generator):
        return 1 - x


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))


def classifier(purifiers=(), net=None, clip_values=(0.0, 1.0), classes=5):
    net = network() if net is None else net
    return PyTorchClassifier(
        net, nn.CrossEntropyLoss(), SHAPE, classes, clip_values=clip_values, device_type="cpu",
        preprocessing_defences=list(purifiers) or None,
    )  # fmt: skip


def images(count=8, clip_values=(0.0, 1.0), seed=1):
    levels = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE))
    low, high = clip_values
    return (levels / 255 * (high - low) + low).astype(np.float32)


def labels(estimator, x):
    return estimator.predict(x).argmax(1)


def linear(seed=0):
    """A classifier of two classes whose margin is a known linear function of the image."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    torch.manual_seed(seed)
    nn.init.normal_(net[1].weight)
    return net


@pytest.mark.parametrize("schedule", ["apgd", "cosine", "constant"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_a_linear_classifier_it_reaches_the_worst_case_in_closed_form(norm, loss, schedule):
    net = linear()
    w = (net[1].weight[1] - net[1].weight[0]).detach().numpy()
    x = np.full((3, *SHAPE), 0.5, np.float32)
    eps = 0.1 if norm == "Linf" else 0.7
    worst = eps * np.abs(w).sum() if norm == "Linf" else eps * np.linalg.norm(w)
    with torch.no_grad():
        net[1].bias[:] = torch.tensor([worst + w.sum() / 2 + 1, 0.0])  # the worst case is a margin of -1
    attack = AdaptivePGD(
        classifier(net=net, classes=2), norm=norm, eps=eps, steps=60, loss=loss, schedule=schedule, seed=0
    )
    attacked = attack.generate(x, np.zeros(3, int))
    assert ((attacked - x).reshape(3, -1) @ w) == pytest.approx(worst, rel=1e-3)
    assert not attack.success.any()


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["Linf", "L2"]),
    levels=st.integers(0, 60),
    schedule=st.sampled_from(["apgd", "cosine", "constant"]),
    targets=st.integers(0, 2),
    round_to_levels=st.booleans(),
    clip_values=st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]),
    seed=st.integers(0, 100),
)
def test_attacked_images_stay_in_the_ball_and_in_the_range(
    norm, levels, schedule, targets, round_to_levels, clip_values, seed
):
    low, high = clip_values
    level = (high - low) / 255
    eps = levels * level * (1 if norm == "Linf" else 3)
    x = images(4, clip_values, seed)
    attack = AdaptivePGD(
        classifier([Posterize(clip_values)], clip_values=clip_values), norm=norm, eps=eps, steps=4, schedule=schedule,
        targets=targets, loss="margin", round_to_levels=round_to_levels, seed=seed,
    )  # fmt: skip
    attacked = attack.generate(x)
    change = (attacked - x).reshape(4, -1)
    distance = np.abs(change).max(1) if norm == "Linf" else np.linalg.norm(change, axis=1)
    assert distance.max() <= eps + 1e-5 * (high - low)
    assert attacked.min() >= low and attacked.max() <= high
    assert attacked.shape == x.shape and attacked.dtype == x.dtype
    if round_to_levels:
        grid = (attacked - low) / level
        assert np.abs(grid - grid.round()).max() < 1e-3


@pytest.mark.parametrize("round_to_levels", [False, True])
def test_the_best_image_on_the_way_is_returned(round_to_levels):
    estimator, x = classifier([Posterize()]), images()
    y, seen = labels(estimator, x), []

    def margin(logits, y, points):
        value = losses.margin(logits, y)
        seen.append(dict(zip([p.numpy().tobytes() for p in points.detach()], value.tolist(), strict=True)))
        return value

    attack = AdaptivePGD(
        estimator, eps=0.02, steps=12, schedule="constant", step_size=0.02, loss=margin,
        round_to_levels=round_to_levels, seed=0,
    )  # fmt: skip
    attacked = attack.generate(x, y)
    values = {point: value for part in seen for point, value in part.items()}
    assert len(seen) == 1 + 13
    order = [[part.get(a.tobytes()) for part in seen] for a in attacked]
    assert all(any(value is not None for value in row) for row in order)
    for i, a in enumerate(attacked):
        near = [v for p, v in values.items() if np.abs(np.frombuffer(p, np.float32) - x[i].ravel()).max() <= 0.0201]
        assert values[a.tobytes()] == max(near)
    assert any(row[-1] is None for row in order)  # of some images the last was not the best


@pytest.mark.parametrize("purifier", [Posterize(), AddNoise(), AddNoise(seed=3)])
@pytest.mark.parametrize("inside", [False, True])
def test_the_same_seed_gives_the_same_images_for_every_batch_size(purifier, inside):
    x = images()
    estimator = classifier(net=PurifiedModel(network(), purifier, runs=2)) if inside else classifier([purifier])
    y = labels(classifier(), x)
    results = []
    for batch_size in (1, 3, 100):
        attack = AdaptivePGD(estimator, eps=0.05, steps=4, eot=2, noise=0.02, seed=7, restarts=2, batch_size=batch_size)
        results.append((attack.generate(x, y), attack.queries, attack.fallen_at))
    for attacked, queries, fallen_at in results[1:]:
        assert np.allclose(attacked, results[0][0], atol=1e-6)
        assert (queries == results[0][1]).all() and (fallen_at == results[0][2]).all()
    other = AdaptivePGD(estimator, eps=0.05, steps=4, eot=2, seed=8, restarts=2)
    other.generate(x, y)
    assert not np.allclose(other.losses, attack.losses, atol=1e-4, equal_nan=True)


def test_averaging_over_draws_changes_nothing_for_a_purifier_without_random_numbers():
    estimator, x = classifier([Posterize()]), images()
    settings = {"eps": 0.05, "steps": 10, "seed": 0}
    one = AdaptivePGD(estimator, **settings)
    many = AdaptivePGD(estimator, **settings, eot=4, selection_draws=3)
    assert np.array_equal(one.generate(x), many.generate(x))
    assert np.array_equal(one.success, many.success) and (many.queries > one.queries).all()


def test_noise_shows_gradients_of_a_loss_with_steps_and_images_are_judged_without_it():
    class Steps(nn.Module):
        """Piecewise constant in the image's brightness, with a gradient that is zero next to nearly every image."""

        def forward(self, x):
            brightness = x.flatten(1).mean(1)
            near = ((brightness * 40) % 1 - 0.5).clamp(-0.1, 0.1)  # a steep rise in a fifth of the images
            rise = ((brightness * 40).floor().detach() + 5 * near) - 20
            return torch.stack([torch.zeros_like(rise), rise], 1)

    x = np.full((6, *SHAPE), 0.475, np.float32) + np.linspace(0, 2e-3, 6, dtype=np.float32)[:, None, None, None]
    estimator, y = classifier(net=Steps(), classes=2), np.zeros(6, int)
    settings = {"eps": 0.04, "steps": 20, "loss": "margin", "schedule": "cosine", "seed": 0, "norm": "Linf"}
    plain = AdaptivePGD(estimator, **settings)
    plain.generate(x, y, start=x)
    smooth = AdaptivePGD(estimator, **settings, eot=8, noise=0.06)
    attacked = smooth.generate(x, y, start=x)
    assert smooth.zero_gradients < plain.zero_gradients
    assert smooth.success.sum() > plain.success.sum()
    assert np.array_equal(labels(estimator, attacked) != y, smooth.success)
    assert np.abs(attacked - x).max() <= 0.04 + 1e-6


def test_an_image_is_chosen_by_other_draws_than_those_of_its_gradients(monkeypatch):
    purifier = AddNoise()
    estimator, x = classifier([purifier]), images()
    drawn = {True: [], False: []}
    draw = Purifier.drawing

    def recording(self, seed, positions):
        drawn[torch.is_grad_enabled()].append(seed)
        return draw(self, seed, positions)

    monkeypatch.setattr(Purifier, "drawing", recording)
    AdaptivePGD(estimator, eps=0.05, steps=5, seed=0).generate(x)
    assert len(set(drawn[True])) == 5  # new ones for every step
    selection = drawn[False][0]
    assert selection not in drawn[True]
    assert drawn[False].count(selection) > 2  # the same for all images that are compared


def test_the_success_rate_is_that_of_fresh_draws():
    estimator, x = classifier([AddNoise()]), images(20)
    y = labels(classifier(), x)
    attack = AdaptivePGD(estimator, eps=0.1, steps=10, eot=8, selection_draws=200, seed=0)
    attacked = attack.generate(x, y)
    fresh = np.mean([labels(estimator, attacked) != y for _ in range(200)], 0)
    assert np.abs(fresh - attack.success_rate).mean() < 0.05
    assert fresh.mean() > np.mean([labels(estimator, x) != y for _ in range(200)]) + 0.1


def test_the_last_image_of_a_run_is_judged_even_if_draws_of_an_earlier_one_were_lucky(monkeypatch):
    estimator, x = classifier([AddNoise()]), images(20)
    y = labels(classifier(), x)
    begin = adaptive_pgd._Search.__init__

    def lucky(search, *arguments):
        begin(search, *arguments)
        search.promise.fill_(torch.inf)

    monkeypatch.setattr(adaptive_pgd._Search, "__init__", lucky)
    attack = AdaptivePGD(estimator, eps=0.1, steps=10, eot=2, seed=0)
    attacked = attack.generate(x, y)
    assert (attack.fallen_at == 10).any() and set(attack.fallen_at) <= {-1, 0, 10}
    assert np.abs(attacked - x).max() > 0.05


def test_an_attacker_who_knows_the_seed_sees_the_draws_of_prediction():
    purifier = AddNoise(seed=5)
    estimator, x = classifier([purifier]), images(30)
    y = labels(estimator, x)
    attack = AdaptivePGD(estimator, eps=0.08, steps=10, seed=0)
    attacked = attack.generate(x, y)
    assert set(attack.success_rate) <= {0.0, 1.0}
    assert attack.success.any()
    assert np.array_equal(labels(estimator, attacked) != y, attack.success)


@pytest.mark.parametrize("targets", [0, 2])
def test_the_first_restart_begins_at_the_given_images(targets):
    estimator, x = classifier(), images(20)
    y = labels(estimator, x)
    settings = {"eps": 0.04, "steps": 5, "seed": 0, "targets": targets}
    start = np.clip(x + np.random.default_rng(0).uniform(-0.1, 0.1, x.shape), 0, 1).astype(np.float32)
    attack = AdaptivePGD(estimator, restarts=2, loss="margin", **settings)
    attack.generate(x, y, start=start)
    logits = torch.from_numpy(estimator.predict(np.clip(start, x - 0.04, x + 0.04)))
    ranked = torch.from_numpy(estimator.predict(x)).scatter(1, torch.from_numpy(y)[:, None], -torch.inf)
    for run in range(2 * max(targets, 1)):
        towards = ranked.topk(2).indices[:, run % 2] if targets else None
        expected = losses.margin(logits, torch.from_numpy(y), towards).numpy()
        found, standing = attack.losses[run, 0], ~np.isnan(attack.losses[run, 0])
        assert standing.any()
        assert np.allclose(found[standing], expected[standing], atol=1e-5) == (run < max(targets, 1))
    with pytest.raises(ValueError, match="start must have the shape of x"):
        attack.generate(x, y, start=start[:3])


@pytest.mark.parametrize("options", [{}, {"targets": 2}, {"round_to_levels": True, "schedule": "cosine"}])
def test_an_attack_on_some_images_gives_what_one_on_all_gives_them(options):
    estimator, x = classifier([AddNoise(seed=3)]), images(12)
    y, only = labels(estimator, x), np.arange(12) % 3 == 1
    options = {"eps": 0.03, "steps": 5, "seed": 0} | options
    whole, some = AdaptivePGD(estimator, **options), AdaptivePGD(estimator, **options)
    expected, found = whole.generate(x, y), some.generate(x, y, only=only)
    np.testing.assert_allclose(found[only], expected[only], atol=1e-5)
    np.testing.assert_allclose(found[~only], x[~only], atol=1e-6)
    assert (found[only] != x[only]).any() and not some.queries[~only].any() and not some.success[~only].any()
    np.testing.assert_array_equal(some.success[only], whole.success[only])
    np.testing.assert_allclose(some.generate(x, y, only=np.zeros(12, bool)), x, atol=1e-6)


@pytest.mark.parametrize("only", [np.ones(3, bool), np.arange(12), True])
def test_a_choice_of_images_of_another_shape_is_refused(only):
    estimator, x = classifier(), images(12)
    with pytest.raises(ValueError, match=r"^only must be 12 bools"):
        AdaptivePGD(estimator).generate(x, labels(estimator, x), only=only)


def test_misclassified_images_are_returned_as_they_are_and_not_attacked():
    estimator, x = classifier(), images()
    y = labels(estimator, x)
    y[:3] = (y[:3] + 1) % 5
    attack = AdaptivePGD(estimator, eps=0.05, steps=5, seed=0)
    attacked = attack.generate(x, y)
    assert np.array_equal(attacked[:3], x[:3])
    assert (attack.queries[:3] == 1).all() and (attack.fallen_at[:3] == 0).all() and attack.success[:3].all()
    assert (attack.queries[3:] > 1).all()


def test_facts_agree_with_predictions():
    estimator, x = classifier([Posterize()]), images(30)
    y = labels(estimator, x)
    attack = AdaptivePGD(estimator, eps=0.06, steps=8, restarts=2, targets=2, loss="dlr", seed=0)
    attacked = attack.generate(x, y)
    fooled = labels(estimator, attacked) != y
    assert np.array_equal(fooled, attack.success) and 0 < fooled.sum() < len(x)
    assert np.array_equal(attack.fallen_at >= 0, fooled)
    assert attack.losses.shape == (4, 9, 30)
    standing = ~np.isnan(attack.losses).any((0, 1))
    assert np.array_equal(standing, ~fooled)
    assert (attack.queries[standing] == 1 + 4 * 9).all()
    assert attack.zero_gradients == 0 and attack.nonfinite_gradients == 0


def test_targets_are_the_most_likely_other_classes():
    estimator, x = classifier(), images()
    logits = torch.from_numpy(estimator.predict(x))
    y = logits.argmax(1)
    attack = AdaptivePGD(estimator, eps=0.0, steps=1, targets=3, loss="margin", seed=0)
    attack.generate(x, y.numpy())
    ranked = logits.sort(descending=True).values
    for rank in range(3):
        assert np.allclose(attack.losses[rank, 0], (ranked[:, 1 + rank] - ranked[:, 0]), atol=1e-5)


def test_zero_and_nonfinite_gradients_are_counted():
    class Constant(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            logits = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]).expand(len(x), 5)
            return (
                logits
                + self.factor * (x.flatten(1).sum(1, keepdim=True) - 18).abs().pow(0.5).detach() * 0
                + (0 * x.flatten(1)[:, :5] if not self.factor else (x.flatten(1)[:, :5] * 0).sqrt())
            )

    x, y = images(), np.zeros(8, int)
    masked = AdaptivePGD(classifier(net=Constant(0)), eps=0.05, steps=3, seed=0)
    masked.generate(x, y)
    assert masked.zero_gradients == 1 and masked.nonfinite_gradients == 0
    broken = AdaptivePGD(classifier(net=Constant(1)), eps=0.05, steps=3, seed=0)
    broken.generate(x, y)
    assert broken.nonfinite_gradients == 1


def test_gradient_chooses_the_purifier_s_backward_pass_and_restores_it():
    purifier, x = Flip(), images(20)
    estimator = classifier([purifier])
    y = labels(estimator, x)
    rates = {}
    for gradient in ("identity", "exact", lambda x: -x, None):
        attack = AdaptivePGD(estimator, eps=0.05, steps=10, gradient=gradient, seed=0)
        attack.generate(x, y)
        rates[str(gradient)[:5]] = attack.success.mean()
        assert purifier.gradient == "identity"
    assert rates["ident"] == rates["None"] < rates["exact"] == rates["<func"]


def test_a_loss_that_is_a_function_gets_logits_labels_and_images():
    estimator, x = classifier(clip_values=(0, 255)), images(clip_values=(0, 255))
    y = labels(estimator, x)

    def brightness(logits, labels, points):
        assert logits.shape == (len(points), 5) and labels.shape == (len(points),)
        return points.flatten(1).mean(1)

    attack = AdaptivePGD(
        estimator, eps=4, steps=20, loss=brightness, seed=0,
        success_criterion=lambda logits, labels, points: torch.zeros(len(points), dtype=torch.bool),
    )  # fmt: skip
    attacked = attack.generate(x, y)
    assert np.allclose(attacked, np.minimum(x + 4, 255), atol=1e-3)
    assert not attack.success.any()


@pytest.mark.parametrize("target", [None, 2])
def test_losses_equal_their_formulas(target):
    z = torch.tensor([[4.0, 1.0, 2.5, -3.0], [0.0, 5.0, 1.0, 4.5]])
    y = torch.tensor([0, 3])
    towards = None if target is None else torch.full((2,), target)
    p = z.softmax(1)
    if target is None:
        assert torch.allclose(losses.cross_entropy(z, y), -torch.stack([p[0, 0], p[1, 3]]).log())
        assert losses.margin(z, y).tolist() == [2.5 - 4, 5 - 4.5]
        assert losses.dlr(z, y).tolist() == pytest.approx([(2.5 - 4) / (4 - 1), (5 - 4.5) / (5 - 1)])
    else:
        assert torch.allclose(losses.cross_entropy(z, y, towards), p[:, 2].log())
        assert losses.margin(z, y, towards).tolist() == [2.5 - 4, 1 - 4.5]
        expected = [(2.5 - 4) / (4 - (1 - 3) / 2), (1 - 4.5) / (5 - (1 + 0) / 2)]
        assert losses.dlr(z, y, towards).tolist() == pytest.approx(expected)


def test_dlr_and_margin_do_not_depend_on_a_shift_nor_dlr_on_the_scale():
    z, y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    assert torch.allclose(losses.dlr(3 * z + 7, y), losses.dlr(z, y), atol=1e-5)
    assert torch.allclose(losses.margin(z + 7, y), losses.margin(z, y), atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "L1"}, {"schedule": "linear"}, {"steps": 0}, {"eot": 0}, {"restarts": 0}, {"eps": -1}, {"seed": -1},
        {"loss": "l2"}, {"targets": 5}, {"targets": -1}, {"selection_draws": 0}, {"gradient": "approximate"},
        {"batch_size": 0}, {"verbose": 1}, {"round_to_levels": None}, {"step_size": -1}, {"momentum": -0.1},
        {"noise": -1},
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AdaptivePGD(classifier(), **arguments)


def test_images_off_the_grid_are_rounded_first_where_8_bit_images_are_asked_for():
    estimator, x = classifier(), images()
    y = labels(estimator, x)
    exact, off = (
        AdaptivePGD(estimator, eps=4 / 255, round_to_levels=True, steps=5, seed=0).generate(given, y)
        for given in (x, np.clip(x + 0.4 / 255, 0, 1))
    )
    assert np.array_equal(exact, off)


def test_a_gradient_that_a_purifier_does_not_support_is_refused():
    with pytest.raises(ValueError, match="gradient must be 'identity' for Posterize"):
        AdaptivePGD(classifier([Posterize()]), gradient="exact", steps=1).generate(images())
