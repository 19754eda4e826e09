import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.classification import PyTorchClassifier
from scipy.stats import binomtest
from torch import nn

from art_pixeldefend.attacks import AdaptivePGD
from art_pixeldefend.evaluation import protocol, robustness
from art_pixeldefend.evaluation.protocol import Ball, Planned, Subject, plan
from art_pixeldefend.evaluation.robustness import AttackResult, Evaluation, evaluate_robustness
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.threat import Threat
from art_pixeldefend.models.generator import VAE
from art_pixeldefend.purifiers import AdaptivePixelDefend, ManifoldProjection, PurifiedModel, Purifier

EPS = 40 / 255


class AddNoise(Purifier):
    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return (x + 0.4 * generator.normal(x.shape[1:])).clamp(0, 1)


class Round(Purifier):
    def purify(self, x, generator):
        return (4 * x).round() / 4


def short(gradient=None):
    """Every kind of attack, in a tenth of the quick budget's time."""
    through = Threat("everything", gradient, steps=3, eot=2 if gradient else 1)
    return [
        Planned("blind", Threat("classifier"), protocol.bim),
        Planned("PGD", through, protocol.adaptive_pgd),
        Planned("targeted", replace(through, targets=1), protocol.adaptive_pgd, survivors=True),
        Planned("Square", Threat("scores", steps=3, eot=through.eot), protocol.square, survivors=True),
    ]


@pytest.fixture(scope="module")
def evaluate(digits_images, nearest_mean):
    def evaluate(purifier=None, model=nearest_mean, budget="quick", count=16, **arguments):
        x, y = (part[:count] for part in digits_images)
        return evaluate_robustness(
            model, purifier, x, y, **{"eps": EPS, "budget": budget, "verbose": False} | arguments
        )

    return evaluate


@pytest.fixture(scope="module")
def rounded(evaluate):
    return evaluate(Round())


@pytest.fixture(scope="module")
def noisy(evaluate):
    return evaluate(AddNoise())


def content(result):
    """Everything but times."""
    found = result.as_dict()
    for attack in found["attacks"]:
        del attack["seconds"]
    return found


def test_the_worst_case_follows_from_the_predictions_of_all_attacks(rounded, noisy):
    for result in (rounded, noisy):
        worst = [all((r.labels[i] == y).all() for r in result.results.values()) for i, y in enumerate(result.y)]
        assert result.accuracy(rule="worst") == np.mean(worst)
        most = [
            all((r.labels[i] == y).sum() > max((r.labels[i] == c).sum() for c in range(10) if c != y)
                for r in result.results.values())
            for i, y in enumerate(result.y)
        ]  # fmt: skip
        assert result.accuracy(rule="vote") == np.mean(most)
    assert rounded.worst_case < rounded.clean and noisy.worst_case < noisy.clean


@pytest.mark.parametrize("strong", ["a", "b"])
def test_each_image_is_right_as_often_as_under_its_strongest_attack(strong):
    """Of two attacks, each is strong on other images, in every draw."""
    weak = {"a": "b", "b": "a"}[strong]
    labels = {"clean": np.zeros((4, 10), int), strong: np.zeros((4, 10), int), weak: np.zeros((4, 10), int)}
    labels[strong][:2], labels[weak][2:, :4] = 1, 1
    found = Evaluation(np.zeros(4, int), {name: AttackResult(name, part) for name, part in labels.items()}, [], {})
    assert found.right().tolist() == pytest.approx([0, 0, 0.6, 0.6])


def test_an_image_is_right_in_the_worst_case_only_if_it_is_under_every_attack(rounded):
    every = [rounded.right(name) for name in rounded.results]
    assert np.array_equal(rounded.right(), np.min(every, 0)) and rounded.right().shape == (16,)


def test_the_rules_of_random_defences_are_ordered(noisy):
    assert noisy.draws == 10
    for name in noisy.results:
        worst, mean = (noisy.right(name, rule) for rule in ("worst", "mean"))
        assert (worst <= mean).all() and {*noisy.right(name, "vote")} <= {0.0, 1.0}
    assert ((noisy.right("clean") > 0) & (noisy.right("clean") < 1)).any()


def test_votes_count_the_class_of_more_draws_than_any_other():
    labels = np.array([[1, 1, 2, 3], [2, 2, 2, 1], [-1, -1, -1, 1], [1, 1, 0, 0], [1, 1, 2, 2]])
    result, y = AttackResult("clean", labels), np.ones(5, int)
    assert result.right(y, "vote").tolist() == [1, 0, 0, 0, 0]
    assert result.right(y, "worst").tolist() == [0, 0, 0, 0, 0]
    assert result.right(y, "mean").tolist() == [0.5, 0.25, 0.25, 0.5, 0.5]


def test_the_worst_case_of_equal_attacks_is_not_lowered_by_choosing_among_them():
    """The attack that looks strongest on some draws is not: all are coins."""
    rng, y = np.random.default_rng(0), np.zeros(2000, int)
    results = {name: AttackResult(name, rng.integers(0, 2, (2000, 10))) for name in ("clean", "a", "b", "c", "d")}
    found = Evaluation(y, results, [], {})
    assert found.worst_case == pytest.approx(0.5, abs=0.02)
    assert np.min([r.right(y) for r in results.values()], 0).mean() < 0.4


@pytest.mark.parametrize(("draws", "excess"), [(10, 0.1), (20, 0.08), (200, 0.015)])
def test_the_worst_case_of_unequal_attacks_reads_high_by_less_the_more_draws_there_are(draws, excess):
    rng, y = np.random.default_rng(0), np.zeros(4000, int)
    right = np.concatenate([np.full((1, 4000), 0.9), rng.uniform(0.2, 0.8, (8, 4000))])
    labels = (rng.random((draws, *right.shape)) > right).astype(int).transpose(1, 2, 0)
    found = Evaluation(
        y, {name: AttackResult(name, drawn) for name, drawn in zip(["clean", *"abcdefgh"], labels, strict=True)}, [], {}
    )
    assert 0 < found.worst_case - right.min(0).mean() < excess


def test_reported_budgets_classify_each_image_50_times(evaluate, monkeypatch):
    monkeypatch.setattr(robustness, "plan", lambda *_: [])
    draws = [evaluate(AddNoise(), count=2, budget=budget).draws for budget in protocol.BUDGETS]
    assert draws == [10, 50, 50]


def test_intervals_are_clopper_pearsons():
    labels = np.array([[0]] * 45 + [[1]] * 5)
    found = Evaluation(np.zeros(50, int), {"clean": AttackResult("clean", labels)}, [], {})
    expected = binomtest(45, 50).proportion_ci(method="exact")
    assert found.interval("clean") == pytest.approx((expected.low, expected.high))
    half = Evaluation(np.zeros(1, int), {"clean": AttackResult("clean", np.array([[0, 1]]))}, [], {})
    assert half.interval("clean") == pytest.approx((0.0, 1.0))


def test_the_interval_of_no_and_of_all_right_images_has_the_exact_end():
    for right, end in ((0, 0.0), (20, 1.0)):
        labels = np.array([[0]] * right + [[1]] * (20 - right))
        found = Evaluation(np.zeros(20, int), {"clean": AttackResult("clean", labels)}, [], {})
        assert end in found.interval("clean")


def test_a_saved_evaluation_comes_back_the_same(noisy, tmp_path):
    noisy.save(tmp_path / "result.json")
    again = Evaluation.load(tmp_path / "result.json")
    assert again.as_dict() == noisy.as_dict() and str(again) == str(noisy)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"attacks": [{}], "y": [], "settings": {}}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="path"):
        Evaluation.load(tmp_path / "file.json")


def test_it_prints_every_attack_with_its_interval_and_every_check(noisy):
    text = str(noisy)
    for name in (*noisy.results, "worst case", *(finding.name for finding in noisy.diagnostics)):
        assert name in text
    assert "worst of 10" in text and "40/255 (Linf)" in text and f"{100 * noisy.worst_case:.1f}" in text


def test_a_defence_with_exact_gradients_is_attacked_with_them(noisy):
    assert [r.threat.gradient for r in noisy.results.values() if r.threat] == [None, None, "identity", "exact", None]
    assert noisy.results["exact"].threat.eot == 4 and noisy.results["transfer"].threat.eot == 1


def test_transferred_images_go_on_beyond_the_decision_boundary(digits_images, nearest_mean):
    """On the classifier without its defence, the attack is that which never stops: for the largest margin."""
    x, y = digits_images
    subject, threat = Subject(nearest_mean, Round(), x), Threat("classifier", steps=10, loss="margin")
    attacked, _ = protocol.adaptive_pgd(subject, x, y, threat, Ball(EPS), 0)
    stopped = AdaptivePGD(
        subject.bare, eps=EPS, steps=10, loss="margin", round_to_levels=True, seed=0, batch_size=256
    ).generate(x, y)

    def margins(images):
        logits = subject.bare.predict(images)
        own = logits[np.arange(len(y)), y]
        return np.where(np.arange(10) == y[:, None], -np.inf, logits).max(1) - own

    assert np.abs(attacked - x).max() <= EPS + 1e-6
    fooled = margins(stopped) > 0
    assert fooled.sum() > 5 and (margins(attacked) >= margins(stopped) - 1e-4).all()
    assert margins(attacked)[fooled].mean() > 1.5 * margins(stopped)[fooled].mean()


@pytest.mark.parametrize(
    ("purifier", "budget"), [(Round(), short()), (AddNoise(), short("exact"))], ids=["deterministic", "random"]
)
@pytest.mark.parametrize("kind", ["attacks", "attacked", "diagnostics"])
def test_an_evaluation_that_was_stopped_anywhere_continues_to_the_same_result(
    purifier, budget, kind, evaluate, tmp_path, monkeypatch
):
    """It is stopped before and after each write of a kind, in turn, until it gets to the end."""
    expected = content(evaluate(purifier, budget=budget))
    stops = {"before": set(), "after": set()}

    def stopping(method):
        def wrapped(self, found, settings, value):
            key = str(self.path(found, settings, ""))
            if found == kind and key not in stops["before"]:
                stops["before"].add(key)
                raise KeyboardInterrupt
            result = method(self, found, settings, value)
            if found == kind and key not in stops["after"]:
                stops["after"].add(key)
                raise KeyboardInterrupt
            return result

        return wrapped

    monkeypatch.setattr(Store, "write", stopping(Store.write))
    monkeypatch.setattr(Store, "images", stopping(Store.images))
    for _ in range(100):
        try:
            result = evaluate(purifier, budget=budget, folder=tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert len(stops["after"]) >= 4
    assert content(result) == expected


@pytest.mark.parametrize("make", [Round, lambda: FeatureSqueezing((0, 1), 2)], ids=["purifier", "of ART"])
def test_a_finished_evaluation_is_read_back_without_an_attack(make, evaluate, tmp_path):
    kept = make()  # so that the next one has another address
    first = evaluate(kept, budget=short(), folder=tmp_path)
    unable = [replace(planned, run=None) for planned in short()]
    assert evaluate(make(), budget=unable, folder=tmp_path).as_dict() == first.as_dict()


class Scaled(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(self.scale * x)


@pytest.mark.parametrize("change", ["runs", "combine", "scale", "bit_depth"])
def test_a_changed_classifier_or_defence_does_not_read_the_same_results(change, evaluate, nearest_mean, tmp_path):
    """Each change is one of an attribute of the same object, which no weight tells."""
    purified, scaled = PurifiedModel(nearest_mean, AddNoise(), 2), Scaled(nearest_mean, 1.0)
    squeezing = FeatureSqueezing((0, 1), 1)
    owner, value, arguments = {
        "runs": (purified, 20, {"model": purified}),
        "combine": (purified, "vote", {"model": purified}),
        "scale": (scaled, 0.6, {"model": scaled}),
        "bit_depth": (squeezing, 8, {"purifier": squeezing}),
    }[change]
    arguments |= {"budget": [Planned("PGD", Threat("everything", steps=2), protocol.adaptive_pgd)]}
    before = evaluate(**arguments, folder=tmp_path)
    setattr(owner, change, value)
    after = evaluate(**arguments, folder=tmp_path)
    assert content(after) == content(evaluate(**arguments))
    assert content(after)["attacks"] != content(before)["attacks"]


def test_other_surrogate_images_do_not_read_the_same_results(evaluate, digits_images, monkeypatch, tmp_path):
    fitted = []

    def fit(purifier, x, seed):
        fitted.append(x)
        return nn.Identity()

    monkeypatch.setattr(protocol, "fit_surrogate", fit)
    attack = [Planned("surrogate", Threat("everything", "surrogate", steps=2), protocol.adaptive_pgd)]
    for x in (digits_images[0], np.zeros_like(digits_images[0]), digits_images[0]):
        evaluate(Round(), budget=attack, surrogate_images=x, folder=tmp_path)
    assert len(fitted) == 2


@pytest.mark.parametrize(
    "change", [{"eps": 8 / 255}, {"seed": 1}, {"count": 15}, {"norm": "L2"}, {"purifier": FeatureSqueezing((0, 1), 3)}]
)
def test_other_arguments_do_not_read_the_same_results(change, evaluate, tmp_path):
    attack = [Planned("PGD", Threat("everything", steps=3), protocol.adaptive_pgd)]
    first = {"purifier": FeatureSqueezing((0, 1), 2), "budget": attack}
    evaluate(**first, folder=tmp_path)
    second = first | change
    assert content(evaluate(**second, folder=tmp_path)) == content(evaluate(**second))


def test_a_purifier_with_a_seed_is_attacked_by_one_who_has_it(evaluate, digits_images, nearest_mean):
    subject = Subject(nearest_mean, AddNoise(seed=3), digits_images[0])
    attacks = [p for p in plan(subject, "quick", Ball(EPS)) if p.name != "Square"]
    assert [p.threat.seeds_known for p in attacks if p.threat.sees == "everything"] == [True, True]
    known = evaluate(AddNoise(seed=3), budget=attacks)
    assert known.draws == 1 and known.worst_case < known.clean


def test_attacks_on_the_classifier_alone_do_not_see_the_defence(digits_images, nearest_mean):
    seen = []

    class Watching(Round):
        def purify(self, x, generator):
            seen.append(len(x))
            return super().purify(x, generator)

    subject = Subject(nearest_mean, Watching(), digits_images[0])
    seen.clear()
    subject.bare.predict(digits_images[0])
    assert seen == []
    subject.defended.predict(digits_images[0])
    assert sum(seen) == len(digits_images[0])


def test_a_classifier_of_another_range_with_its_own_defence_is_evaluated_alike(digits_images, nearest_mean, evaluate):
    class Scaled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x / 255)

    squeezing = FeatureSqueezing(clip_values=(0, 255), bit_depth=4)
    classifier = PyTorchClassifier(
        Scaled(nearest_mean), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255),
        preprocessing_defences=[squeezing],
    )  # fmt: skip
    x, y = digits_images
    found = evaluate_robustness(classifier, None, 255 * x[:16], y[:16], eps=255 * EPS, budget="quick", verbose=False)
    assert "transfer" in found.results and found.worst_case < found.clean
    other = evaluate(FeatureSqueezing(clip_values=(0, 1), bit_depth=4))
    assert abs(found.worst_case - other.worst_case) <= 1 / 16 + 1e-9
    assert classifier.preprocessing_defences == [squeezing]


def test_a_purified_model_is_recognised_as_defended(digits_images, nearest_mean):
    subject = Subject(PurifiedModel(nearest_mean, AddNoise(), runs=2), None, digits_images[0])
    assert subject.stochastic and not subject.undefended
    assert "exact" in [planned.name for planned in plan(subject, "quick", Ball(EPS))]


def test_global_state_and_modes_are_left_as_they_were(evaluate, nearest_mean):
    model = nn.Sequential(nearest_mean, nn.Identity()).train()
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5), np.random.seed(5)
    evaluate(AddNoise(), model, short("exact"))
    assert (torch.rand(1).item(), np.random.rand()) == expected
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_the_budgets_add_attacks(digits_images, nearest_mean):
    subject = Subject(nearest_mean, AddNoise(), digits_images[0])
    names = {budget: [p.name for p in plan(subject, budget, Ball(EPS))] for budget in protocol.BUDGETS}
    assert {*names["quick"]} < {*names["standard"]} <= {*names["full"]}
    steps = {budget: plan(subject, budget, Ball(EPS))[2].threat.steps for budget in protocol.BUDGETS}
    assert steps["quick"] < steps["standard"] < steps["full"]


def test_an_attack_that_leaves_the_ball_is_an_error(evaluate):
    far = Planned("far", Threat("everything"), lambda subject, x, y, *_: (np.clip(x + 2 * EPS, 0, 1), {}))
    with pytest.raises(RuntimeError, match="far left the ball"):
        evaluate(budget=[far])


def test_survivors_are_what_no_attack_before_has_found(evaluate):
    seen = []

    def watch(subject, x, y, *_):
        seen.append(len(x))
        return x, {}

    pgd = plan_of_pgd()
    found = evaluate(budget=[pgd, Planned("second", Threat("everything"), watch, survivors=True)])
    assert seen == [int(found.right("PGD").sum())]
    assert found.accuracy("second") == found.accuracy("PGD")


class Coin(nn.Module):
    """Class 1 with the probability of the first pixel's value, otherwise class 0."""

    def forward(self, x):
        one = (torch.rand(len(x)) < x[:, 0, 0, 0]).float()
        return torch.stack([1 - one, one], 1) + 0 * x.flatten(1)[:, :2]


def set_first_pixel(value):
    def run(subject, x, *_):
        changed = x.copy()
        changed[:, 0, 0, 0] = value
        return changed, {}

    return run


def test_images_that_an_attack_fools_in_some_draws_only_are_attacked_further():
    x, y = np.full((20, 1, 2, 2), 0.2, np.float32), np.zeros(20, int)
    attacks = [
        Planned("in most draws", Threat("everything"), set_first_pixel(0.75)),
        Planned("in all draws", Threat("everything"), set_first_pixel(1.0), survivors=True),
    ]
    found = evaluate_robustness(Coin(), None, x, y, eps=1.0, budget=attacks, draws=20, verbose=False)
    assert found.accuracy("in most draws") > 0.1
    assert found.worst_case == found.accuracy("in all draws") == 0


def projection():
    torch.manual_seed(0)
    return ManifoldProjection(VAE((1, 8, 8), latent_size=4), steps=3)


@pytest.mark.parametrize("budget", protocol.BUDGETS)
@pytest.mark.parametrize("purifier", [Round(), AddNoise(), projection()], ids=["round", "noise", "projection"])
def test_a_defence_is_attacked_by_all_of_its_gradients(purifier, budget, digits_images, nearest_mean):
    planned = plan(Subject(nearest_mean, purifier, digits_images[0]), budget, Ball(EPS))
    assert {*purifier.gradients} <= {p.threat.gradient for p in planned}
    assert ("latent" in [p.name for p in planned]) == isinstance(purifier, ManifoldProjection)


@pytest.mark.parametrize("inside", [False, True])
def test_the_latent_attack_returns_8_bit_images_in_the_ball(inside, digits_images, nearest_mean):
    purifier, x = projection(), digits_images[0]
    model = PurifiedModel(nearest_mean, purifier) if inside else nearest_mean
    subject = Subject(model, None if inside else purifier, x)
    (planned,) = [p for p in plan(subject, "quick", Ball(EPS)) if p.name == "latent"]
    y = subject.logits(x[:4], 0).argmax(1)
    images, facts = planned.run(subject, x[:4], y, replace(planned.threat, steps=10), Ball(EPS), 0)
    levels = 255 * images.astype(np.float64)
    assert np.abs(levels - levels.round()).max() < 1e-3 and facts["queries"] > 0
    assert 0 < np.abs(images - x[:4]).max() <= EPS + 1e-6


@pytest.mark.parametrize("inside", [False, True])
def test_adaptive_pixel_defend_is_attacked_by_images_that_it_does_not_purify(inside, digits_images, nearest_mean):
    purifier, (x, y) = AdaptivePixelDefend(eps=64, pixel_cnn="digits", threshold=5.0), digits_images
    model = PurifiedModel(nearest_mean, purifier) if inside else nearest_mean
    subject = Subject(model, None if inside else purifier, x)
    (planned,) = [p for p in plan(subject, "quick", Ball(0.3)) if p.name == "unpurified"]
    images, _ = planned.run(subject, x, y, planned.threat, Ball(0.3), 0)
    assert np.abs(images - x).max() <= 0.3 + 1e-6
    fooled = subject.labels(images, 1, 0)[:, 0] != y
    kept = (purifier(images)[0] == images).all(axis=(1, 2, 3))
    assert (fooled & kept & (np.abs(images - x).max(axis=(1, 2, 3)) > 0)).any()


@pytest.mark.parametrize("eps", [0.1, 0.03])
def test_a_radius_between_two_levels_is_not_exceeded_by_8_bit_images(eps, digits_images, nearest_mean):
    subject, (x, y) = Subject(nearest_mean, None, digits_images[0]), digits_images
    images, _ = protocol.square(subject, x, y, Threat("scores", steps=20), Ball(eps), 0)
    levels = 255 * images.astype(np.float64)
    assert np.abs(levels - levels.round()).max() < 1e-3
    assert np.abs(images - x).max() == pytest.approx(np.floor(255 * eps) / 255, abs=1e-6)


def test_a_baseline_is_compared_with_the_headline(noisy, evaluate):
    finding = evaluate(AddNoise(), baseline=noisy).diagnostics[-1]
    assert finding.text == f"{100 * noisy.worst_case:.1f}% against {100 * noisy.worst_case:.1f}%"


def plan_of_pgd():
    return Planned("PGD", Threat("everything", steps=10), protocol.adaptive_pgd)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"model": "resnet"}, "model"), ({"purifier": "pixeldefend"}, "purifier"), ({"norm": "L1"}, "norm"),
        ({"budget": "huge"}, "budget"), ({"eps": -1}, "eps"), ({"eps": 8}, "8 levels are 0.03137"),
        ({"seed": -1}, "seed"), ({"count": 0}, "x must"),
        ({"batch_size": 0}, "batch_size"), ({"purifier": AddNoise(), "draws": 3}, "draws"),
        ({"budget": [plan_of_pgd(), plan_of_pgd()]}, "budget"),
        ({"baseline": Evaluation(np.zeros(3), {}, [], {})}, "baseline"),
        ({"count": 1, "baseline": Evaluation(np.array([5]), {}, [], {"radius": f"{EPS} (L2)"})}, "baseline"),
        ({"count": 1, "baseline": Evaluation(np.array([5]), {}, [], {"radius": "8/255 (Linf)"})}, "baseline"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, name, evaluate):
    with pytest.raises(ValueError, match=name):
        evaluate(**arguments)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, y: (255 * x, y), r"x must be in 0\.\.1"),
        (lambda x, y: (x[:, 0], y), r"x must be images \(N, C, H, W\)"),
        (lambda x, y: (x, y + 10), r"y must be in 0\.\.9"),
    ],
)  # fmt: skip
def test_images_and_labels_that_do_not_fit_the_classifier_are_refused(change, error, digits_images, nearest_mean):
    x, y = change(*digits_images)
    with pytest.raises(ValueError, match=error):
        evaluate_robustness(nearest_mean, AddNoise(), x, y, verbose=False)


def test_results_are_plain_json_without_nan(noisy):
    assert json.loads(json.dumps(noisy.as_dict(), allow_nan=False)) == noisy.as_dict()


def test_threats_of_results_survive_a_round_trip(noisy, tmp_path):
    noisy.save(tmp_path / "r.json")
    loaded = Evaluation.load(tmp_path / "r.json").results["exact"].threat
    assert loaded == noisy.results["exact"].threat == replace(loaded)


def test_the_standard_budget_attacks_a_purifier_without_exact_gradients_through_a_surrogate(
    digits_images, nearest_mean
):
    x, _ = digits_images
    with_images = [p.name for p in plan(Subject(nearest_mean, Round(), x, surrogate_images=x), "standard", Ball(EPS))]
    without = [p.name for p in plan(Subject(nearest_mean, Round(), x), "standard", Ball(EPS))]
    assert {*with_images} - {*without} == {"surrogate"}
    assert "surrogate" not in [
        p.name for p in plan(Subject(nearest_mean, AddNoise(), x, surrogate_images=x), "standard", Ball(EPS))
    ]


def test_every_attack_of_the_standard_and_full_budgets_runs(evaluate, digits_images, nearest_mean, monkeypatch):
    """With fewer steps."""
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(protocol, "fit_surrogate", partial(protocol.fit_surrogate, steps=3))
    x, _ = digits_images
    subject = Subject(nearest_mean, Round(), x[:6], surrogate_images=x)
    attacks = {p.name: p for budget in ("standard", "full") for p in plan(subject, budget, Ball(EPS))}
    assert "AutoAttack" in attacks
    fewer = [replace(p, threat=replace(p.threat, steps=2, restarts=1)) for p in attacks.values()]
    result = evaluate(Round(), budget=fewer, count=6, surrogate_images=x)
    assert list(result.results) == ["clean", *attacks]
    assert result.worst_case <= min(result.accuracy(name) for name in attacks)


def test_the_baseline_is_compared_with_the_worst_case_that_is_reported(evaluate):
    attack = [Planned("PGD", Threat("everything", steps=2, eot=2), protocol.adaptive_pgd)]
    first = evaluate(AddNoise(), budget=attack)
    second = evaluate(AddNoise(), budget=attack, baseline=first)
    text = f"{100 * first.worst_case:.1f}% against {100 * second.worst_case:.1f}%"
    assert second.diagnostics[-1].text == text and second.diagnostics[-1].alarm
