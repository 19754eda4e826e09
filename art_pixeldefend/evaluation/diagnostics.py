"""Checks of a robustness evaluation: each says where the accuracy that it reports cannot be trusted.

They follow AutoAttack's flags (Croce and Hein 2020, arXiv:2003.01690) and the recommendations of Carlini et al. 2019,
arXiv:1902.06705. A check that raises no alarm proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from art_pixeldefend.attacks import AdaptivePGD, losses
from art_pixeldefend.evaluation.protocol import AGAIN, Ball, Subject, derived_seed
from art_pixeldefend.levels import from_levels, to_levels
from art_pixeldefend.purifiers.logits import differentiable_logits

if TYPE_CHECKING:
    from art_pixeldefend.evaluation.robustness import AttackResult, Evaluation

VERSION = 2  # to be raised when checks find other things for equal settings
POINTS = 0.02  # a difference of accuracies that matters
SOME = 32  # images of checks that compute gradients
CLEAN = "clean"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        name: of the check.
        alarm: whether the accuracies cannot be trusted for this reason; None if it was not checked.
        text: what was found.
    """

    name: str
    alarm: bool | None
    text: str

    def __str__(self) -> str:
        kind = {True: "WARNING", False: "no alarm for", None: "not checked"}[self.alarm]
        return f'{kind}: "{self.name}": {self.text}'


@dataclass(frozen=True)
class Context:
    """What checks look at.

    Args:
        subject: the classifier and its defence.
        x: clean images (N, ...).
        y: their classes (N,).
        ball: of the attacks.
        seed: of everything random.
        results: of the attacks, by name.
        attacked: their images, by name.
    """

    subject: Subject
    x: np.ndarray
    y: np.ndarray
    ball: Ball
    seed: int
    results: Mapping[str, AttackResult]
    attacked: Mapping[str, np.ndarray]

    def worst_case(self, *, sees: tuple[str, ...]) -> float:
        """Accuracy by majority of draws under all attacks that see one of these, clean images included."""
        chosen = [r for r in self.results.values() if r.threat is None or r.threat.sees in sees]
        return float(np.min([r.right(self.y, "vote") for r in chosen], 0).mean())

    @property
    def strongest(self) -> str | None:
        """The name of the attack of the lowest accuracy."""
        attacks = [name for name, result in self.results.items() if result.threat is not None]
        return min(attacks, key=lambda name: self.results[name].right(self.y).mean(), default=None)

    @property
    def gradient(self) -> str | None:
        """The backward pass of the attack through the defence that found most."""
        through = [r for r in self.results.values() if r.threat is not None and r.threat.sees == "everything"]
        threats = [(r.right(self.y).mean(), r.threat) for r in through if r.threat is not None]
        usable = [(a, t) for a, t in threats if t.gradient not in ("surrogate", "latent") and not t.detector]
        return min(usable, key=lambda found: found[0])[1].gradient if usable else None


def gradients_vanish(context: Context) -> Finding:
    """Raise an alarm if gradients are zero, NaN or infinite for more than one image of twenty.

    The defence masks its gradients then, and attacks that follow them are blind.
    """
    subject, chosen = context.subject, slice(0, SOME)
    device = subject.defended.device
    images = torch.from_numpy(context.x[chosen]).to(device).requires_grad_()
    y = torch.from_numpy(context.y[chosen]).to(device)
    logits = differentiable_logits(subject.defended, images)
    gradient = torch.zeros_like(images).flatten(1)
    if logits.requires_grad:
        gradient = torch.autograd.grad(losses.margin(logits, y).sum(), images)[0].flatten(1)
    zero, nonfinite = ((gradient == 0).all(1), (~gradient.isfinite()).any(1))
    facts = [r.facts for r in context.results.values() if "zero_gradients" in r.facts]
    on_the_way = max((f["zero_gradients"] + f["nonfinite_gradients"] for f in facts), default=0.0)
    bad, count = int((zero | nonfinite).sum()), len(images)
    text = (
        f"{int(zero.sum())} zero and {int(nonfinite.sum())} non-finite of {count}; in attacks {100 * on_the_way:.0f}%"
    )
    return Finding("zero or non-finite gradients", max(bad / count, on_the_way) > 0.05, text)


def absurd_radius(context: Context) -> Finding:
    """Raise an alarm if accuracy stays above chance in a ball that holds, for every image, the same grey image."""
    subject, (low, high) = context.subject, context.subject.clip_values
    eps = (high - low) / 2
    if context.ball.norm == "L2":
        eps *= float(np.prod(context.x.shape[1:]) ** 0.5)
    right = np.flatnonzero(context.results[CLEAN].right(context.y, "vote"))[:SOME]
    if not len(right):
        return Finding("accuracy at an absurd radius", None, "no image is right to begin with")
    attack = AdaptivePGD(
        subject.defended, norm=context.ball.norm, eps=eps, steps=20, gradient=context.gradient, loss="ce",
        eot=4 if subject.stochastic else 1, seed=derived_seed(context.seed, "absurd"), batch_size=subject.batch_size,
    )  # fmt: skip
    attack.generate(context.x[right], context.y[right])
    accuracy, chance = float((~attack.success).mean()), 1 / subject.defended.nb_classes
    text = f"{100 * accuracy:.0f}% of {len(right)} images within {Ball(eps, context.ball.norm).text}"
    return Finding("accuracy at an absurd radius", accuracy > chance + 0.1, f"{text}, chance is {100 * chance:.0f}%")


def black_box_is_stronger(context: Context) -> Finding:
    """Raise an alarm if attacks without the defence's gradients find images that those with its gradients do not.

    The gradients are of little use then.
    """
    white = context.worst_case(sees=("everything",))
    both = context.worst_case(sees=("classifier", "scores", "everything"))
    gain = white - both
    text = f"they lower accuracy by another {100 * gain:.1f} points, from {100 * white:.1f}%"
    name = "black-box or transferred attacks are stronger than white-box ones"
    return Finding(name, gain >= POINTS - 1e-9 and round(gain * len(context.y)) > 1, text)


def not_converged(context: Context) -> Finding:
    """Raise an alarm if more effort still lowers accuracy by 2 points.

    That is, the second half of an attack's steps and restarts, or the same attack with twice the steps or draws.
    """
    results = context.results
    through = {n: r for n, r in results.items() if r.threat is not None and r.threat.sees == "everything"}
    late = {name: _fooled_late_only_by(name, context) for name in through}
    name, most = max(late.items(), key=lambda item: item[1], default=("no attack", 0.0))
    text = f"at most {100 * most:.1f} points in the second half of an attack ({name})"
    if AGAIN in results:
        names = list(results)
        before = np.min([results[n].right(context.y, "vote") for n in names[: names.index(AGAIN)]], 0)
        gain = float((before - np.minimum(before, results[AGAIN].right(context.y, "vote"))).mean())
        text += f"; {100 * gain:.1f} points by twice the effort"
        most = max(most, gain)
    alarm = most >= POINTS - 1e-9 and round(most * len(context.y)) > 1
    return Finding("attacks have not converged", alarm, text)


def _fooled_late_only_by(name: str, context: Context) -> float:
    """The share of images that an attack fooled in the second half of its steps, and no other attack fooled."""
    result, before = context.results[name], list(context.results).index(name)
    # Later attacks on what is left hold the images that this one found.
    others = [r for i, r in enumerate(context.results.values()) if i < before or (i > before and not r.survivors)]
    left = np.min([r.right(context.y, "vote") for r in others], 0) > result.right(context.y, "vote")
    return float(left[list(result.late)].sum() / len(left))


def random_output(context: Context) -> Finding:
    """Raise an alarm if two passes over the same images differ while attacks take gradients of a single draw."""
    eots = [r.threat.eot for r in context.results.values() if r.threat is not None and r.threat.sees == "everything"]
    least = min(eots, default=1)
    if not context.subject.stochastic:
        strongest = context.strongest or CLEAN
        if context.subject.varies(context.attacked[strongest][:SOME]):
            text = f"two passes over images of {strongest} differ, but each image was classified once"
            return Finding("random output", True, text)
        return Finding("random output", False, "two passes agree")
    return Finding("random output", least == 1, f"two passes differ; gradients are means over {least} draws")


def probabilities(context: Context) -> Finding:
    """Raise an alarm if outputs look like probabilities: losses of attacks expect logits."""
    logits = context.subject.logits(context.x[:SOME], derived_seed(context.seed, "probabilities"))
    sums = logits.sum(1)
    found = bool(logits.min() >= 0 and logits.max() <= 1 and np.allclose(sums, 1, atol=1e-4))
    return Finding(
        "probabilities in place of logits", found, "they sum to 1" if found else "outputs are not probabilities"
    )


def off_grid(context: Context) -> Finding:
    """Raise an alarm if rounding the attacks' images to 8 bits raises accuracy by 2 points."""
    subject, clip_values = context.subject, context.subject.clip_values
    name = "images off the 8-bit grid"
    strongest = context.strongest
    if strongest is None:
        return Finding(name, None, "there is no attack")
    images = context.attacked[strongest]
    rounded = from_levels(to_levels(images, clip_values), clip_values, images.dtype)
    off = np.abs(rounded - images).reshape(len(images), -1).max(1) > 1e-5 * (clip_values[1] - clip_values[0])
    if not off.any():
        return Finding(name, False, f"none of {strongest}")
    draws = context.results[strongest].labels.shape[1]
    labels = subject.labels(rounded, draws, derived_seed(context.seed, "rounded"))
    change = float((labels == context.y[:, None]).mean()) - float(context.results[strongest].right(context.y).mean())
    text = (
        f"{int(off.sum())} of {len(off)} of {strongest}; rounding them changes accuracy by {100 * change:+.1f} points"
    )
    return Finding(name, change >= POINTS - 1e-9 and round(change * len(off)) > 1, text)


def weaker_than_baseline(worst_case: float, baseline: Evaluation | None) -> Finding:
    """Raise an alarm if an adversarially trained classifier without a defence is as robust: the defence buys nothing.

    Args:
        worst_case: of the defence.
        baseline: the evaluation of the classifier without a defence, on the same images.
    """
    name = "an adversarially trained classifier without a defence is as robust"
    if baseline is None:
        return Finding(name, None, "no baseline was given")
    text = f"{100 * baseline.worst_case:.1f}% against {100 * worst_case:.1f}%"
    return Finding(name, baseline.worst_case >= worst_case, text)


CHECKS: tuple[Callable[[Context], Finding], ...] = (
    gradients_vanish, absurd_radius, black_box_is_stronger, not_converged, random_output, probabilities, off_grid,
)  # fmt: skip
