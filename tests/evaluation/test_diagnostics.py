"""Each check raises an alarm for a defence that was built to trigger it, and none for an undefended classifier."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import nn

from art_pixeldefend.attacks import AdaptivePGD
from art_pixeldefend.evaluation import diagnostics, protocol
from art_pixeldefend.evaluation.protocol import Ball, Planned, Subject, adaptive_pgd, plan, square
from art_pixeldefend.evaluation.robustness import evaluate_robustness
from art_pixeldefend.evaluation.threat import Threat

EPS = 64 / 255
NAMES = {
    "gradients_vanish": "zero or non-finite gradients",
    "absurd_radius": "accuracy at an absurd radius",
    "black_box_is_stronger": "black-box or transferred attacks are stronger than white-box ones",
    "not_converged": "attacks have not converged",
    "random_output": "random output",
    "probabilities": "probabilities in place of logits",
    "off_grid": "images off the 8-bit grid",
    "weaker_than_baseline": "an adversarially trained classifier without a defence is as robust",
}


class Masked(nn.Module):
    """Rounds images coarsely, which has a gradient of zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((8 * x).round() / 8)


class Clipped(Masked):
    """Clips the distance of other logits from the largest."""

    def forward(self, x):
        logits = self.model(x)
        return (logits - logits.amax(1, keepdim=True)).clamp_min(-1e-6)


class Probabilities(Masked):
    def forward(self, x):
        return self.model(x).softmax(1)


class Noisy(Masked):
    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))


class Misleading(Masked):
    """Gradients point the wrong way."""

    def forward(self, x):
        return self.model(2 * x.detach() - x)


@pytest.fixture(scope="module")
def evaluate(digits_images):
    def evaluate(model, budget="quick", purifier=None, **arguments):
        settings = {"eps": EPS, "budget": budget, "verbose": False} | arguments
        return evaluate_robustness(model, purifier, *digits_images, **settings)

    return evaluate


def alarms(result):
    return {name for name, text in NAMES.items() if any(f.name == text and f.alarm for f in result.diagnostics)}


@pytest.fixture(scope="module")
def undefended(evaluate, nearest_mean):
    return evaluate(nearest_mean)


def test_an_undefended_classifier_raises_no_alarm(undefended):
    assert {finding.name for finding in undefended.diagnostics} == set(NAMES.values())
    assert alarms(undefended) == set()
    assert [f.name for f in undefended.diagnostics if f.alarm is None] == [NAMES["weaker_than_baseline"]]
    assert undefended.worst_case < undefended.clean - 0.2


@pytest.mark.parametrize(
    ("defence", "expected"),
    [
        (Masked, {"gradients_vanish"}),
        (Clipped, {"gradients_vanish"}),
        (Probabilities, {"probabilities"}),
        (Misleading, {"absurd_radius"}),
    ],
)
def test_a_defence_that_fools_attacks_raises_its_alarm(defence, expected, evaluate, nearest_mean):
    assert expected <= alarms(evaluate(defence(nearest_mean)))


def test_a_defence_that_square_breaks_and_gradients_do_not_raises_an_alarm(evaluate, nearest_mean):
    attacks = [
        Planned("PGD", Threat("everything", steps=10, targets=9), adaptive_pgd),
        Planned("Square", Threat("scores", steps=300), square, survivors=True),
    ]
    assert "black_box_is_stronger" in alarms(evaluate(Misleading(nearest_mean), attacks))
    assert "black_box_is_stronger" not in alarms(evaluate(nearest_mean, attacks))


@pytest.mark.parametrize("budget", ["standard", "full"])
def test_white_box_attacks_get_no_credit_for_what_others_found(budget, evaluate, digits_images, nearest_mean):
    """Square runs before AutoAttack in the full budget, transferred images before all in both."""

    class MisleadingPreprocessor(PreprocessorPyTorch):
        params: ClassVar[list[str]] = []

        def __init__(self):
            super().__init__(is_fitted=True, apply_fit=False, apply_predict=True, device_type="cpu")

        def forward(self, x, y=None):
            return 2 * x.detach() - x, y

    subject = Subject(nearest_mean, MisleadingPreprocessor(), digits_images[0])
    planned = [replace(p, threat=replace(p.threat, restarts=1)) for p in plan(subject, budget, Ball(0.75 * EPS))]
    fewer = [replace(p, threat=replace(p.threat, steps=p.threat.steps and min(p.threat.steps, 10))) for p in planned]
    # AutoAttack, which is for defences of this package, stands last and finds nothing.
    fewer.append(Planned("AutoAttack", Threat("everything"), lambda subject, x, *_: (x, {}), survivors=True))
    found = evaluate(nearest_mean, fewer, purifier=MisleadingPreprocessor(), eps=0.75 * EPS)
    assert found.worst_case <= found.accuracy("transfer") < found.accuracy("AutoAttack") - 0.1
    assert "black_box_is_stronger" in alarms(found)


def test_random_output_raises_an_alarm_unless_gradients_are_averaged(evaluate, nearest_mean):
    model = Noisy(nearest_mean)
    through = Planned("PGD", Threat("everything", steps=5), run(steps=5))
    averaged = Planned("PGD", Threat("everything", steps=5, eot=4), run(steps=5, eot=4))
    assert "random_output" in alarms(evaluate(model, [through]))
    assert "random_output" not in alarms(evaluate(model, [averaged]))


class NoisyOutside(Masked):
    """Random for images with a bright first pixel, as no clean image has."""

    def forward(self, x):
        return self.model(x + 0.5 * torch.randn_like(x) * (x[:, :, :1, :1] > self.least))


@pytest.mark.parametrize(("least", "draws"), [(0.01, 10), (0.2, 1)])
def test_a_defence_that_is_random_for_attacked_images_only_is_found(least, draws, evaluate, nearest_mean):
    model = NoisyOutside(nearest_mean)
    model.least = least
    found = evaluate(model, [Planned("corner", Threat("everything"), corner)])
    assert found.draws == draws and "random_output" in alarms(found)
    assert "random_output" not in alarms(evaluate(nearest_mean, [Planned("corner", Threat("everything"), corner)]))


def corner(subject, x, *_):
    changed = x.copy()
    changed[:, :, 0, 0] = EPS
    return changed, {}


def run(**arguments):
    def attack(subject, x, y, threat, ball, seed):
        pgd = AdaptivePGD(subject.defended, eps=ball.eps, seed=seed, **arguments)
        attacked = pgd.generate(x, y)
        return attacked, {"late": pgd.fallen_at > pgd.steps / 2}

    return attack


def test_an_attack_that_is_stopped_early_raises_an_alarm(evaluate, nearest_mean):
    slow = run(steps=12, step_size=EPS / 12, schedule="constant", momentum=0.0)
    found = evaluate(nearest_mean, [Planned("slow", Threat("everything", steps=12), slow)])
    assert "not_converged" in alarms(found)


def test_images_that_another_attack_fools_early_raise_no_alarm_about_a_slow_one(evaluate, nearest_mean):
    slow = run(steps=12, step_size=EPS / 12, schedule="constant", momentum=0.0)
    attacks = [
        Planned("slow", Threat("everything", steps=12), slow),
        Planned("fast", Threat("everything", steps=50), run(steps=50)),
        Planned("carrying", Threat("everything"), lambda subject, x, *_: (x, {}), survivors=True),
    ]
    found = evaluate(nearest_mean, attacks)
    assert len(found.results["slow"].late) > 2 and "not_converged" not in alarms(found)


@pytest.mark.parametrize(("targets", "late"), [(0, [4, 5]), (3, [3, 5])])
def test_an_image_is_late_in_the_second_half_of_all_restarts_or_of_its_targets_run(
    targets, late, digits_images, nearest_mean, monkeypatch
):
    class Stub:
        def __init__(self, *_, **__):
            self.steps, self.losses, self.fallen_at = 10, np.zeros((3, 11, 6)), np.array([-1, 0, 3, 8, 23, 28])
            self.queries, self.zero_gradients, self.nonfinite_gradients = np.ones(6), 0, 0

        def generate(self, x, y):
            return x

    monkeypatch.setattr(protocol, "AdaptivePGD", Stub)
    subject, threat = Subject(nearest_mean, None, digits_images[0]), Threat("everything", targets=targets)
    _, facts = adaptive_pgd(subject, *digits_images, threat, Ball(EPS), 0)
    assert np.flatnonzero(facts["late"]).tolist() == late


def test_an_attack_that_twice_the_effort_improves_raises_an_alarm(evaluate, nearest_mean):
    first = Planned("PGD", Threat("everything"), lambda subject, x, y, *_: (x, {}))
    second = Planned("again", Threat("everything"), run(steps=20), survivors=True)
    assert "not_converged" in alarms(evaluate(nearest_mean, [first, second]))


def test_images_that_rounding_repairs_raise_an_alarm(evaluate, nearest_mean):
    def between_levels(subject, x, y, threat, ball, seed):
        return x + np.float32(0.3 / 255) * (x < 0.5), {}

    class Parity(Masked):
        """Wrong for images that are not 8-bit images."""

        def forward(self, x):
            logits = self.model(x)
            off = ((255 * x - (255 * x).round()).abs() > 0.1).flatten(1).any(1)
            return logits.where(~off[:, None], -logits)

    planned = Planned("between", Threat("everything"), between_levels)
    assert "off_grid" in alarms(evaluate(Parity(nearest_mean), [planned]))
    assert "off_grid" not in alarms(evaluate(nearest_mean, [planned]))


def test_a_baseline_that_is_as_robust_raises_an_alarm(undefended):
    finding = diagnostics.weaker_than_baseline(undefended.worst_case, undefended)
    assert finding.alarm
    assert not diagnostics.weaker_than_baseline(undefended.worst_case + 0.01, undefended).alarm
    assert diagnostics.weaker_than_baseline(0.0, None).alarm is None


def test_a_finding_says_in_one_line_whether_it_is_an_alarm():
    finding = diagnostics.Finding("random output", True, "two passes differ")
    assert str(finding) == 'WARNING: "random output": two passes differ'
    assert str(replace(finding, alarm=False)).startswith('no alarm for: "random output"')
    assert str(replace(finding, alarm=None)).startswith("not checked: ")
