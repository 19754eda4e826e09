"""Measure how robust a classifier is behind a defence, under attacks that know the defence."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from art_pixeldefend.attacks.budget import scalar_clip_values
from art_pixeldefend.attacks.through import NORMS
from art_pixeldefend.attacks.training import frozen
from art_pixeldefend.classifiers.training import seeded
from art_pixeldefend.evaluation import diagnostics
from art_pixeldefend.evaluation.diagnostics import Context, Finding
from art_pixeldefend.evaluation.preprocessors import description
from art_pixeldefend.evaluation.protocol import BUDGETS, Ball, Planned, Subject, derived_seed, plan
from art_pixeldefend.evaluation.smoothing import fingerprint, hashed
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import markdown_table
from art_pixeldefend.evaluation.threat import Threat
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import LEVELS, UNIT
from art_pixeldefend.models.base import evaluation_mode
from art_pixeldefend.validation import check_choice, check_count, check_labels, check_number

CLEAN, WORST_CASE = "clean", "worst case"
RULES = ("mean", "worst", "vote")
VERSION = 5  # to be raised when attacks of equal settings give other images


@dataclass(frozen=True)
class AttackResult:
    """What one attack found, or the clean images.

    Args:
        name: of the attack.
        labels: predicted classes (N, draws) of its images; -1 where logits were not finite.
        threat: what it saw and did; None for clean images.
        survivors: whether it started from what the attacks before it had found; see :class:`Planned`.
        seconds: that it took.
        facts: further measures by name, among them ``queries``, the mean number of images, times draws, that were
            classified per image.
        late: places of the images that it first fooled in the second half of its steps.
    """

    name: str
    labels: np.ndarray
    threat: Threat | None = None
    survivors: bool = False
    seconds: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)
    late: Sequence[int] = ()

    def right(self, y: np.ndarray, rule: str = "mean") -> np.ndarray:
        """How right each image (N,) is, 0..1: the share of draws that predict ``y`` (N,) for ``"mean"``; 0 or 1 for
        ``"worst"`` (all draws predict it) and ``"vote"`` (more draws predict it than any other class).
        """
        check_choice("rule", rule, RULES)
        hits = self.labels == y[:, None]
        if rule == "vote":
            others = [((self.labels == c) & ~hits).sum(1) for c in np.unique(self.labels)]
            return (hits.sum(1) > np.max(others, 0)).astype(float)
        return hits.mean(1) if rule == "mean" else hits.all(1).astype(float)


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate_robustness`. Printed, it is a table, followed by the diagnostics.

    Accuracies and intervals are fractions. Of a defence that draws random numbers, three rules say when an image counts
    as classified correctly: ``"mean"``, the share of draws that are right, is the accuracy of a single draw;
    ``"worst"``, only if all draws are right; ``"vote"``, only if more draws are right than predict any other class.

    Half of the draws choose each image's strongest attack, and the mean over the other half counts; then the reverse.
    This does not credit attacks with luck, but the worst case reads too high as long as the draws are too few to tell
    which attack is strongest: with 8 attacks of very different strength on each image by 9 points of 100 for 10 draws,
    6 for 20, and 1 for 200. A single attack that is stronger than that is counted instead.

    Attributes:
        y: the classes (N,).
        results: by name, in the order of the attacks, ``"clean"`` first.
        diagnostics: what was checked, and whether the check raised an alarm.
        settings: of the evaluation: eps, norm, budget, seed, images, draws, and descriptions of model and purifier.
    """

    y: np.ndarray
    results: Mapping[str, AttackResult]
    diagnostics: Sequence[Finding]
    settings: Mapping[str, Any]

    @property
    def clean(self) -> float:
        """Accuracy on clean images."""
        return self.accuracy(CLEAN)

    @property
    def worst_case(self) -> float:
        """Accuracy if every image is attacked by the attack that is strongest on it: the headline."""
        return self.accuracy(WORST_CASE)

    @property
    def draws(self) -> int:
        """Draws of the defence's random numbers for each image; 1 if nothing is random."""
        return self.results[CLEAN].labels.shape[1]

    def right(self, name: str = WORST_CASE, rule: str = "mean") -> np.ndarray:
        """How right each image (N,) is, 0..1, under an attack, on ``"clean"`` images or in the ``"worst case"``.

        Raises:
            ValueError: naming ``name`` or ``rule``.
        """
        if name == WORST_CASE:
            return self._worst_case(rule)
        if name not in self.results:
            raise ValueError(f"name must be one of {', '.join([*self.results, WORST_CASE])}, got {name!r}")
        return self.results[name].right(self.y, rule)

    def _worst_case(self, rule: str) -> np.ndarray:
        if rule != "mean" or self.draws == 1:
            return np.min([result.right(self.y, rule) for result in self.results.values()], 0)
        hits = np.stack([result.labels == self.y[:, None] for result in self.results.values()])
        first, second = hits[:, :, ::2].mean(2), hits[:, :, 1::2].mean(2)
        each = np.arange(len(self.y))
        chosen = (second[first.argmin(0), each] + first[second.argmin(0), each]) / 2
        return min([*hits.mean(2), chosen], key=np.mean)

    def accuracy(self, name: str = WORST_CASE, rule: str = "mean") -> float:
        """The mean of :meth:`right`."""
        return float(self.right(name, rule).mean())

    def interval(self, name: str = WORST_CASE, rule: str = "mean") -> tuple[float, float]:
        """Clopper-Pearson's 95% interval of an accuracy, for other images of the same kind.

        Where images are right in a share of draws, the ends are those of the next whole numbers of images: wider.
        """
        right = round(float(self.right(name, rule).sum()), 6)
        low, high = (binomtest(int(k), len(self.y)).proportion_ci() for k in (np.floor(right), np.ceil(right)))
        return float(low.low), float(high.high)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can represent it."""
        rules = RULES if self.draws > 1 else RULES[:1]
        summary = {
            name: {
                rule: {"accuracy": self.accuracy(name, rule), "interval": list(self.interval(name, rule))}
                for rule in rules
            }
            for name in [*self.results, WORST_CASE]
        }
        attacks = [
            {
                "name": result.name, "threat": None if result.threat is None else asdict(result.threat),
                "survivors": result.survivors, "seconds": result.seconds, "facts": dict(result.facts),
                "late": list(result.late), "labels": result.labels.tolist(),
            }
            for result in self.results.values()
        ]  # fmt: skip
        return {
            "settings": dict(self.settings), "summary": summary,
            "diagnostics": [asdict(finding) for finding in self.diagnostics], "y": self.y.tolist(), "attacks": attacks,
        }  # fmt: skip

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything as JSON, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        write_atomically(path, json.dumps(self.as_dict()) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming ``path``, if it holds something else.
        """
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            content = json.loads(text)
            results = {}
            for entry in content["attacks"]:
                threat = None if entry["threat"] is None else Threat(**entry["threat"])
                labels = np.array(entry["labels"], np.int64)
                results[entry["name"]] = AttackResult(**entry | {"threat": threat, "labels": labels})
            findings = [Finding(**finding) for finding in content["diagnostics"]]
            return cls(np.array(content["y"], np.int64), results, findings, content["settings"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path {str(path)!r} does not hold an evaluation: {error}") from error

    def table(self) -> str:
        """The accuracies in percent, as a Markdown table with a row for each attack."""
        names, several = [*self.results, WORST_CASE], self.draws > 1
        columns = ["", "attack", "accuracy", "95% interval"]
        columns += [f"worst of {self.draws}", "vote"] if several else []
        columns += ["queries", "seconds"]
        rows = []
        for name in names:
            result = self.results.get(name)
            low, high = self.interval(name)
            what = "" if result is None or result.threat is None else str(result.threat)
            what += ", on what is left" if result is not None and result.survivors else ""
            cells = [name, what, f"{100 * self.accuracy(name):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
            cells += [f"{100 * self.accuracy(name, rule):.1f}" for rule in RULES[1:]] if several else []
            queries = result.facts.get("queries") if result is not None else None
            seconds = sum(r.seconds for r in self.results.values()) if result is None else result.seconds
            cells += ["" if queries is None else f"{queries:.0f}", f"{seconds:.0f}"]
            rows.append(cells)
        return markdown_table(columns, rows, left=2)

    def __str__(self) -> str:
        s = self.settings
        head = (
            f"{s['purifier'] or 'no purifier'}: accuracy in percent within {s['radius']}, "
            f"{len(self.y)} images, budget {s['budget']}, seed {s['seed']}"
        )
        alarms = [str(finding) for finding in self.diagnostics]
        return "\n".join([head, "", self.table(), *alarms])


def evaluate_robustness(
    model: nn.Module | PyTorchClassifier,
    purifier: Preprocessor | None,
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    budget: str | Sequence[Planned] = "quick",
    draws: int | None = None,
    eot: int | None = None,
    baseline: Evaluation | None = None,
    surrogate_images: np.ndarray | None = None,
    folder: str | PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    verbose: bool = True,
) -> Evaluation:
    """Attack a classifier behind a defence in several ways, and report the accuracy that is left.

    The attacks are those that the literature asks for (Carlini et al. 2019, arXiv:1902.06705; Tramer et al. 2020,
    arXiv:2002.08347; Croce et al. 2022, arXiv:2202.13711): images that fool the classifier alone, gradients through the
    defence by every backward pass that it supports, several losses, and Square, which needs no gradients. The accuracy
    is an upper bound all the same: another attack may find more. The diagnostics say where that is likely.

    ``"quick"`` is for development: 20 steps of one loss, 50 queries. ``"standard"`` is what to report: 50 steps, three
    losses, the strongest attack once more with twice the effort, 1,000 queries. ``"full"`` has 100 steps, 5 restarts,
    9 targets, 5,000 queries, and AutoAttack's own code where it applies.

    Args:
        model: a module from images in [0, 1] to logits, or an ART classifier with clip values, which may have defences.
        purifier: a :class:`Purifier`, any other ART preprocessor, or None.
        x: images (N, C, H, W), in [0, 1] or in the classifier's clip values.
        y: their classes (N,), or one-hot.
        eps: radius of the attacks, in the units of ``x``.
        norm: ``"Linf"`` or ``"L2"``.
        budget: ``"quick"``, ``"standard"``, ``"full"``, or attacks of your own.
        draws: of a random defence, for each reported image, an even number; by default 50, or 10 for ``"quick"`` and
            for attacks of your own.
        eot: draws that each gradient is averaged over; by default 4, 16 or 20 by budget, and 1 if nothing is random.
        baseline: the evaluation, on the same images, of an adversarially trained classifier without a defence.
        surrogate_images: images that are not evaluated, in the units of ``x``, a thousand of 28 x 28: with them,
            ``"standard"`` and ``"full"`` attack a purifier without exact gradients through a network that imitates it.
        folder: stores the result of every attack; an evaluation that was stopped continues, if the arguments are the
            same, and the weights, the representations and the outputs for 8 images of model and purifier.
        seed: of everything random.
        batch_size: images, times draws, at a time.
        verbose: show a progress bar.

    Returns:
        The accuracies, per attack and per image, and the diagnostics.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import ScoreDenoiser, datasets
        >>> digits = datasets.load("digits")
        >>> x, y = digits.x_test[:4].astype(np.float32) / 255, digits.y_test[:4]
        >>> model, denoiser = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ScoreDenoiser("digits-score", sigma=0.1)
        >>> result = evaluate_robustness(model, denoiser, x, y, eps=16 / 255, budget="quick", verbose=False)
        >>> list(result.results), result.worst_case <= result.clean
        (['clean', 'blind', 'transfer', 'BPDA', 'exact', 'Square'], True)
    """
    images = np.asarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x, np.float32)
    labels = check_labels("y", y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y), len(images))
    if not len(images):
        raise ValueError("x must hold at least one image")
    ball, seed = Ball(check_number("eps", eps), check_choice("norm", norm, NORMS)), check_count("seed", seed, 0)
    if not isinstance(model, (nn.Module, PyTorchClassifier)):
        raise ValueError(f"model must be a torch module or an ART PyTorchClassifier, got {type(model).__name__}")
    if isinstance(model, nn.Module) and images.ndim != 4:
        raise ValueError(f"x must be images (N, C, H, W), got shape {images.shape}")
    low, high = UNIT if isinstance(model, nn.Module) else scalar_clip_values(model)
    if images.min() < low - 1e-6 or images.max() > high + 1e-6:
        raise ValueError(f"x must be in {low:g}..{high:g}, got {images.min():g}..{images.max():g}")
    if norm == "Linf" and ball.eps > high - low:
        level = 8 * (high - low) / (LEVELS - 1)
        raise ValueError(f"eps must be at most {high - low:g}, the range of x, got {eps!r}; 8 levels are {level:.4g}")
    with evaluation_mode(model.model if isinstance(model, PyTorchClassifier) else model):
        subject = Subject(model, purifier, images, check_count("batch_size", batch_size), surrogate_images)
        if baseline is not None and (
            not np.array_equal(baseline.y, labels) or baseline.settings["radius"] != ball.text
        ):
            raise ValueError(f"baseline must be an evaluation of the same images within {ball.text}")
        attacks = plan(subject, budget, ball, eot) if isinstance(budget, str) else list(budget)
        if labels.max() >= subject.defended.nb_classes:
            raise ValueError(f"y must be in 0..{subject.defended.nb_classes - 1}, got {labels.max()}")
        if draws is None:
            draws = 50 if budget in BUDGETS[1:] else 10
        if subject.stochastic and check_count("draws", draws, 2) % 2:
            raise ValueError(f"draws must be even, got {draws}")
        draws = draws if subject.stochastic else 1
        settings = {
            "version": VERSION, "images": hashed([torch.from_numpy(images), torch.from_numpy(labels)]), "eps": ball.eps,
            "norm": norm, "model": fingerprint(subject.defended),
            "outputs": hashed([subject.outputs.round(decimals=3)]),
            "surrogate_images": None if surrogate_images is None else hashed([torch.as_tensor(surrogate_images)]),
            "seed": seed, "draws": draws, "batch_size": batch_size,
        }  # fmt: skip
        with TemporaryDirectory() if folder is None else nullcontext(folder) as place, frozen(subject.bare):
            runner = _Runner(subject, images, labels, ball, draws, settings, Store(place), verbose)
            runner.run(attacks)
            findings = runner.diagnose()
    shown = {
        "eps": ball.eps, "norm": norm, "radius": ball.text, "budget": budget if isinstance(budget, str) else "custom",
        "seed": seed, "draws": draws, "images": len(images), "batch_size": batch_size,
        "purifier": "" if purifier is None else description(purifier), "model": settings["model"],
    }  # fmt: skip
    found = Evaluation(labels, runner.results, findings, shown)
    return replace(found, diagnostics=[*findings, diagnostics.weaker_than_baseline(found.worst_case, baseline)])


class _Runner:
    """Runs attacks one after the other, and stores what each of them finds before the next one begins."""

    def __init__(
        self, subject: Subject, x: np.ndarray, y: np.ndarray, ball: Ball, draws: int, settings: dict[str, Any],
        store: Store, verbose: bool,
    ) -> None:  # fmt: skip
        self.subject, self.x, self.y, self.ball, self.draws = subject, x, y, ball, draws
        self.settings, self.store, self.verbose = settings, store, verbose
        self.attacked: dict[str, np.ndarray] = {}
        self.results: dict[str, AttackResult] = {}
        self.keys: list[dict[str, Any]] = []  # of the attacks so far

    def run(self, attacks: Sequence[Planned]) -> None:
        """Classify the clean images, and those of all attacks."""
        names = [CLEAN, *(planned.name for planned in attacks), WORST_CASE]
        if len({*names}) < len(names):
            raise ValueError(f"budget must hold attacks of different names, got {', '.join(names[1:-1])}")
        clean = self.subject.labels(self.x, self.draws, derived_seed(self.settings["seed"], CLEAN))
        self.attacked[CLEAN], self.results[CLEAN] = self.x, AttackResult(CLEAN, clean)
        bar = tqdm(attacks, unit="attack", disable=not self.verbose)
        for planned in bar:
            bar.set_description(planned.name)
            own = {"attack": planned.name, "threat": asdict(planned.threat), "settings": planned.settings}
            key = self.settings | own | ({"after": list(self.keys)} if planned.survivors else {})
            self.keys.append(own)
            kept = self.store.read("attacks", key) or self._attack(planned, key)
            self.attacked[planned.name] = self.store.images("attacked", key, lambda: self.x)
            self.results[planned.name] = AttackResult(
                planned.name, np.array(kept["labels"]), planned.threat, planned.survivors, kept["seconds"],
                kept["facts"], kept["late"],
            )  # fmt: skip

    def _attack(self, planned: Planned, key: dict[str, Any]) -> dict[str, Any]:
        """Run an attack and store its images, then its result."""
        began, seed = time.perf_counter(), derived_seed(self.settings["seed"], planned.name)
        attacked, left = self.x.copy(), np.ones(len(self.x), bool)
        if planned.survivors:
            attacked, left = self._found(planned.threat)
        facts: dict[str, Any] = {}
        late = np.zeros(len(self.x), bool)
        if left.any():
            # A purifier with a seed gives each image draws by its place in the input, so that all must be passed.
            chosen = left | any(p.stochastic and p.seed is not None for p in self.subject.purifiers)
            arguments = (attacked[chosen], self.y[chosen], planned.threat, self.ball, seed)
            with seeded(seed):
                images, facts = planned.run(self.subject, *arguments)
            attacked[left] = images[left[chosen]]
            late[chosen] = facts.pop("late", False)
        farthest = self.ball.distance(attacked, self.x).max()
        if farthest > self.ball.eps * (1 + 1e-4) + 1e-6:
            raise RuntimeError(f"{planned.name} left the ball: an image is {farthest:g} away, eps is {self.ball.eps:g}")
        labels = self.subject.labels(attacked, self.draws, derived_seed(seed, "report"))
        kept = {
            "labels": labels.tolist(), "facts": facts, "late": np.flatnonzero(late & left).tolist(),
            "seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
        self.store.images("attacked", key, lambda: attacked)
        self.store.write("attacks", key, kept)
        return kept

    def _found(self, threat: Threat) -> tuple[np.ndarray, np.ndarray]:
        """Images that all draws misclassify, where an attack has found one; and which images are left, (N,).

        White-box attacks get what white-box attacks have found: the diagnostics compare them with the others.
        """
        best, left = self.x.copy(), np.ones(len(self.x), bool)
        for name, result in self.results.items():
            if result.threat is not None and threat.sees == "everything" != result.threat.sees:
                continue
            fallen = left & (result.right(self.y) == 0)
            best[fallen], left[fallen] = self.attacked[name][fallen], False
        return best, left

    def diagnose(self) -> list[Finding]:
        """The findings of all diagnostics of these results alone."""
        context = Context(self.subject, self.x, self.y, self.ball, self.settings["seed"], self.results, self.attacked)
        findings = []
        for check in tqdm(diagnostics.CHECKS, unit="check", desc="diagnostics", disable=not self.verbose, leave=False):
            key = self.settings | {"check": check.__name__, "checks": diagnostics.VERSION, "after": self.keys}
            kept = self.store.read("diagnostics", key)
            if kept is None:
                with seeded(derived_seed(self.settings["seed"], check.__name__)):
                    kept = asdict(check(context))
                self.store.write("diagnostics", key, kept)
            findings.append(Finding(**kept))
        return findings
