"""Robust accuracy of the purifiers under attacks that know them, with a normal and an adversarially trained classifier.

    OMP_NUM_THREADS=1 python benchmarks/adaptive_evaluation.py --work FOLDER

writes ``results/adaptive-evaluation.json`` and ``.md`` after every row. The folder keeps every finished attack, so that
a run that was stopped continues, and ``--only`` computes some rows with other numbers of images or another budget:

    OMP_NUM_THREADS=1 python benchmarks/adaptive_evaluation.py --work FOLDER --images 500 --budget standard --only none

``--page-only`` computes nothing and writes the page of the published results again.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from art.defences.preprocessor import FeatureSqueezing, Preprocessor
from published import RESULTS, DataDir, Work, mcnemar, page_only
from scipy.stats import bootstrap
from torch import Tensor, nn

from art_pixeldefend import (
    AdaptivePixelDefend,
    DeepImagePrior,
    ManifoldProjection,
    PixelDefend,
    PurifiedModel,
    ScoreDenoiser,
    ScorePurifier,
    classifiers,
    datasets,
)
from art_pixeldefend.attacks import auto_attack, make_attack
from art_pixeldefend.classifiers.tuning import TUNING
from art_pixeldefend.evaluation import evaluate_robustness, runner
from art_pixeldefend.evaluation.paper.art_pixel_defend import ArtPixelDefend
from art_pixeldefend.evaluation.protocol import BUDGETS, Ball, Subject, plan
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import markdown_table, wilson
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import UNIT
from art_pixeldefend.purifiers.base import BatchGenerator

GRADIENTS = ("exact", "implicit", "latent", "unpurified")  # the attacks of a column
FURTHER = ("surrogate", "margin", "targeted", "again")  # and of another one
PAIRED_BY = ("classifier", "eps", "images", "budget")
PLAIN = "PixelDefend, eps 32"
NAME, NORMAL, RADII = "adaptive-evaluation", "fashion-mnist-resnet", (8, 25)
SURROGATE_IMAGES = 1000  # of the training images
VALIDATION = 200  # images that choose the thresholds of Adaptive PixelDefend


def calibrated(eps: int, network: nn.Module, data: datasets.Dataset) -> AdaptivePixelDefend:
    """Adaptive PixelDefend with the threshold that images of the calibration split choose under blind attacks."""
    defence, classifier = AdaptivePixelDefend(eps=32, pixel_cnn="fashion-mnist"), classifiers.as_art(network)
    chosen = data.calibration(defence.pixel_cnn)
    x, y = chosen.x[:VALIDATION].astype(np.float32) / 255, chosen.y[:VALIDATION]
    attacked = {name: make_attack(name, classifier, eps).generate(x, y) for name in ("fgsm", "bim", "deepfool", "cw")}
    defence.calibrate(classifier, attacked | {"clean": x}, y)
    return defence


class NoisyPixelDefend(PixelDefend):
    """PixelDefend of images with Gaussian noise of 16 levels."""

    stochastic = True

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Purify a batch."""
        return super().purify((x + 16 / 255 * generator.normal(x.shape[1:])).clamp(0, 1), generator)


class RandomRadius(PixelDefend):
    """PixelDefend with a radius of 16, 32, 48 or 64 levels, drawn for each image."""

    stochastic = True

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Purify a batch."""
        radii, purified = 16 + 16 * (4 * generator.uniform(())).long(), torch.empty_like(x)
        for eps in radii.unique().tolist():
            one, chosen = copy.copy(self), radii == eps
            one.eps, one._scored = eps, True
            purified[chosen] = PixelDefend.purify(one, x[chosen], generator)
        return purified


def tuned(classifier: str, purifier: Any, data: datasets.Dataset, path: Path) -> nn.Module:
    """A classifier, tuned for 200 steps on purified training images."""
    if not path.is_file():
        network, recipe = classifiers.load(classifier), replace(TUNING, steps=200)
        trainer = classifiers.PurifiedTrainer(classifiers.as_art(network), purifier, recipe=recipe, verbose=True)
        trainer.fit(data.x_train.astype(np.float32) / 255, data.y_train)
        classifiers.save(path, network)
    return classifiers.load(path)


@dataclass(frozen=True)
class Defence:
    """A row: a defence, how many images it is measured on at most, and attacks that it is too slow for."""

    name: str
    make: Callable[[int, nn.Module, datasets.Dataset], Preprocessor | None]  # of radius, classifier and images
    images: int | None = None
    left_out: tuple[str, ...] = ()
    tuned: bool = False  # the classifier, on purified images


AUTO_ATTACK = (
    "`pyautoattack` on the classifier or `PurifiedModel`, with the identity for the purifier's gradient: APGD on the "
    "cross-entropy and towards 2 targets, 20 iterations each. *Here*: the worst case above."
)
PAIRED = (
    "Worst cases on the same images. Intervals of the difference (95%, bootstrap over images) and p-values are about "
    "the choice of images only. Both accuracies are upper bounds. If the last attack, Square, still finds images with "
    "PixelDefend and none without, the difference is more likely to shrink under stronger attacks than to grow. The "
    "classifiers were tuned for 500 steps on PGD with 2 steps; longer adversarial training was not tried."
)
OF_VARIANTS = (
    "A screening under short attacks. Beside each variant the worst case of PixelDefend, eps 32, on the same images, "
    "with the same classifier and budget. *tuned*: the classifier was trained for 200 more steps on purified training "
    "images, which were not attacked. *noise*: Gaussian noise of 16 levels is added first. *random eps*: 16, 32, 48 or "
    "64 levels, drawn for each image. The last two are random: their accuracy is that of a single draw, and attacks "
    "average over 4 draws."
)
VARIANTS = (
    Defence("PixelDefend, eps 64", lambda *_: PixelDefend(eps=64, pixel_cnn="fashion-mnist"), 100),
    Defence("PixelDefend, eps 32, tuned", lambda *_: PixelDefend(eps=32, pixel_cnn="fashion-mnist"), 100, tuned=True),
    Defence("PixelDefend, eps 32, noise", lambda *_: NoisyPixelDefend(eps=32, pixel_cnn="fashion-mnist"), 50),
    Defence("PixelDefend, random eps", lambda *_: RandomRadius(eps=32, pixel_cnn="fashion-mnist"), 50),
)
DEFENCES = (
    Defence("none", lambda *_: None),
    Defence(PLAIN, lambda *_: PixelDefend(eps=32, pixel_cnn="fashion-mnist")),
    Defence("ScorePurifier, one pass, sigma 0.25", lambda *_: ScorePurifier("fashion-mnist-score", 0.25)),
    Defence("feature squeezing, 3 bits", lambda *_: FeatureSqueezing(clip_values=UNIT, bit_depth=3)),
    Defence("ScoreDenoiser, sigma 0.1", lambda *_: ScoreDenoiser("fashion-mnist-score", 0.1)),
    Defence("Adaptive PixelDefend, eps 32", calibrated),
    Defence("ScorePurifier, 5 steps, sigma 0.25", lambda *_: ScorePurifier("fashion-mnist-score", 0.25, steps=5), 50),
    Defence("ManifoldProjection", lambda *_: ManifoldProjection("fashion-mnist-vae"), 50, ("Square",)),
    Defence("DeepImagePrior", lambda *_: DeepImagePrior(), 20, ("Square",)),
    Defence("ART's PixelDefend, eps 32", lambda *_: ArtPixelDefend(eps=32, pixel_cnn="fashion-mnist"), 25),
    *VARIANTS,
)


def measure(
    defence: Defence, classifier: str, eps: int, data: datasets.Dataset, budget: str, images: int, work: Path
) -> dict[str, Any]:
    """One row of the results."""
    count = min(images, defence.images or images)
    x, y = data.x_test[:count].astype(np.float32) / 255, data.y_test[:count]
    network = classifiers.load(classifier)
    purifier = defence.make(eps, network, data)
    if defence.tuned:
        network = tuned(classifier, purifier, data, work / f"{classifier}-tuned.safetensors")
    rate = None
    if purifier is not None:
        purifier(x[:2])  # compiles what is compiled
        began = time.process_time()
        purifier(x)
        rate = count / (time.process_time() - began)
    common: dict[str, Any] = {
        "eps": eps / 255, "folder": work / "evaluations",
        "surrogate_images": data.x_train[:SURROGATE_IMAGES].astype(np.float32) / 255,
    }  # fmt: skip
    attacks: Any = budget
    if defence.left_out:
        subject = Subject(network, purifier, x, surrogate_images=common["surrogate_images"])
        attacks = [p for p in plan(subject, budget, Ball(eps / 255)) if p.name not in defence.left_out]
    found = evaluate_robustness(network, purifier, x, y, budget=attacks, **common)
    alarms = [f"{finding.name}: {finding.text}" for finding in found.diagnostics if finding.alarm]
    row = {
        "defence": defence.name, "classifier": classifier, "eps": eps, "images": count, "budget": budget,
        "draws": found.draws, "purifier": " ".join(str(found.settings["purifier"]).split())[:300],
        "purified_per_cpu_second": rate and round(rate, 1),
        "seconds": round(sum(result.seconds for result in found.results.values()), 1), "alarms": alarms,
        "date": date.today().isoformat(), "accuracy": {}, "interval": {}, "threats": {}, "right_draws": {},
    }  # fmt: skip
    for name, result in found.results.items():
        row["right_draws"][name] = (result.labels == y[:, None]).sum(1).tolist()
        if result.threat is not None:
            row["threats"][name] = str(result.threat) + (", on what is left" if result.survivors else "")
    for name in (*found.results, "worst case"):
        row["accuracy"][name] = percent(found.accuracy(name))
        row["interval"][name] = [percent(end) for end in found.interval(name)]
    if found.draws > 1:
        row |= {
            rule: {name: percent(found.accuracy(name, rule)) for name in row["accuracy"]} for rule in ("worst", "vote")
        }
    return row


def public_check(
    defence: Defence, classifier: str, eps: int, data: datasets.Dataset, images: int, work: Path
) -> dict[str, Any]:
    """The accuracy of a deterministic defence under the public AutoAttack's APGD, with the purifier's own gradient."""
    x, y = torch.from_numpy(data.x_test[:images]).float() / 255, torch.from_numpy(data.y_test[:images])
    network = classifiers.load(classifier).requires_grad_(False)
    purifier = defence.make(eps, network, data)
    model = network if purifier is None else PurifiedModel(network, purifier).eval()
    settings: dict[str, Any] = {"attacks": ["apgd-ce", "apgd-t"], "iterations": 20, "targets": 2}

    def attacked() -> np.ndarray:
        return auto_attack(model, x, y, eps=eps / 255, batch_size=256, **settings).numpy()

    key = settings | {"defence": defence.name, "classifier": classifier, "eps": eps, "images": images}
    found = torch.from_numpy(Store(work).images("auto-attack", key, attacked))
    with torch.no_grad():
        right = int((model(found).argmax(1) == y).sum())
    return settings | {"accuracy": percent(right / len(y)), "interval": [percent(end) for end in wilson(right, len(y))]}


def percent(value: float) -> float:
    """A fraction in percent."""
    return round(100 * value, 2)


def table(rows: list[dict[str, Any]], eps: int) -> str:
    """The rows of a radius as Markdown."""
    head = ["classifier", "defence", "images", "clean", "blind", "transfer", "BPDA", "exact or implicit", "further"]
    head += ["Square", "**worst case**", "95% interval", "PGD alone", "images/s"]
    lines = []
    for row in rows:
        if row["eps"] != eps:
            continue
        accuracy, low_high = row["accuracy"], row["interval"]["worst case"]
        first = accuracy.get("BPDA", accuracy.get("PGD"))
        second, third = (
            min((accuracy[name] for name in names if name in accuracy), default=None) for names in (GRADIENTS, FURTHER)
        )
        values = [accuracy.get("blind"), accuracy.get("transfer"), first, second, third, accuracy.get("Square")]
        cells = ["" if value is None else f"{value:.1f}" for value in [accuracy["clean"], *values]]
        kind = "normal" if row["classifier"] == NORMAL else row["classifier"].removeprefix(f"{NORMAL}-").upper()
        images = f"{row['images']}{'' if row['budget'] == 'quick' else ', ' + row['budget']}"
        rate = row["purified_per_cpu_second"]
        cells = [kind, row["defence"], images, *cells, f"**{accuracy['worst case']:.1f}**"]
        alone = trained_alone(row, rows)
        cells += [f"{low_high[0]:.1f} to {low_high[1]:.1f}", "" if alone is None else f"{alone:.1f}"]
        cells += ["" if rate is None else f"{rate:.0f}"]
        lines.append(cells)
    return markdown_table(head, lines, left=2)


def trained_alone(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """The worst case of the adversarially trained classifier alone, on a defence's images, in percent."""
    for other in rows:
        same = all(other[key] == row[key] for key in ("eps", "budget")) and other["images"] >= row["images"]
        if same and other["defence"] == "none" != row["defence"] and other["classifier"] != NORMAL:
            return percent(np.min([counts[: row["images"]] for counts in other["right_draws"].values()], axis=0).mean())
    return None


def no_better_than_training(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The alarm about a defence that is no more robust than the adversarially trained classifier on the same images."""
    alone = trained_alone(row, rows)
    if alone is None or alone < row["accuracy"]["worst case"]:
        return []
    return [f"no better than the classifier trained on PGD, {alone:.1f}, alone"]


def paired(rows: list[dict[str, Any]]) -> str:
    """PixelDefend against the same classifier without it, on the same images under the same budget, as Markdown."""

    def right(row: dict[str, Any]) -> np.ndarray:
        return np.min(list(row["right_draws"].values()), axis=0)

    cells = []
    for row in (row for row in rows if row["defence"] == PLAIN):
        same = [r for r in rows if r["defence"] == "none" and all(r[k] == row[k] for k in PAIRED_BY)]
        if not same or row["classifier"] == NORMAL:
            continue
        difference = right(row) - right(same[0])
        interval = bootstrap((difference,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        more, fewer, p = mcnemar(difference)
        ends = f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
        cells.append([
            row["classifier"], row["eps"], row["images"], row["budget"],
            f"{100 * difference.mean():+.1f} ({ends})", more, fewer, f"{p:.1g}",
            f"{found_by_square(row)} / {found_by_square(same[0])}",
        ])  # fmt: skip
    titles = ["classifier", "radius", "images", "budget", "difference", "right only with it", "only without it"]
    return markdown_table([*titles, "p (exact McNemar)", "found by Square alone: with it / without"], cells, left=1)


def found_by_square(row: dict[str, Any]) -> int:
    """How many images of a deterministic defence only Square, the last attack, makes wrong."""
    right = row["right_draws"]
    return int(sum(np.min([hits for name, hits in right.items() if name != "Square"], axis=0)) - sum(right["Square"]))


def variants(rows: list[dict[str, Any]]) -> str:
    """The variants of PixelDefend, each beside PixelDefend itself on the same images, as Markdown."""
    cells = []
    for row in (row for row in rows if row["defence"] in [variant.name for variant in VARIANTS]):
        same = [
            r for r in rows if r["defence"] == PLAIN and all(r[k] == row[k] for k in ("classifier", "eps", "budget"))
        ]
        if not same or same[0]["images"] < row["images"]:
            continue
        right = np.min([counts[: row["images"]] for counts in same[0]["right_draws"].values()], axis=0)
        low, high = row["interval"]["worst case"]
        cells.append([
            row["defence"], row["classifier"], row["eps"], row["images"], f"{row['accuracy']['clean']:.1f}",
            f"{row['accuracy']['worst case']:.1f} ({low:.1f} to {high:.1f})", f"{percent(right.mean()):.1f}",
        ])  # fmt: skip
    return markdown_table(["variant", "classifier", "radius", "images", "clean", "worst case", PLAIN], cells, left=2)


def head(facts: dict[str, Any]) -> str:
    """Above the tables."""
    return f"""# Fashion-MNIST: purifiers under attacks that know them

`{facts["command"]}`, in calls with `--only` and `--images` for some rows, {facts["date"]}, {facts["hardware"]}.
Accuracy in percent on the first test images, by `evaluate_robustness`; budget "quick" unless stated otherwise: one
start, 20 steps of BPDA, 10 of the other gradients and of transfer, 50 queries of Square, 4 draws per gradient of a
random defence. "standard": 50 steps of BPDA, 50 of the other gradients, 40 of transfer, 1,000 queries. Every accuracy
is an **upper bound**: a stronger attack may find more.

- *blind*: the papers' way, BIM on the classifier without its defence, last iterates.
- *transfer*: AdaptivePGD on the classifier without its defence. It stopped once that classifier was fooled, so that its
  images often do not survive purification; `evaluate_robustness` has since been changed to go on.
- *BPDA*: AdaptivePGD through the defence, whose gradient is taken for the identity (for no defence: its own gradient).
- *exact or implicit*: AdaptivePGD with such a gradient of the purifier. For `ManifoldProjection` the least accuracy
  under these and under LatentAttack, which searches the generator's latents. For Adaptive PixelDefend the least under
  these and under DetectorAware, which makes images below the threshold, which therefore are not purified. In "quick"
  these attacks run only on images that are still right in some draw after the attacks through the defence.
- *further*: more AdaptivePGD on images that are still right: with the DLR loss towards the most likely wrong classes;
  in "standard" also with the gradients of a network that imitates the purifier, with the margin loss, and with twice
  the steps.
- *Square* uses no gradient. It runs on images that no other attack has broken. The column counts all broken images, so
  that for deterministic defences it is the worst case; for random ones it counts an image by Square's result alone if
  some draw was right before. `ManifoldProjection` and `DeepImagePrior` are too slow for it.
- *worst case*: each image under the attack that is strongest on it, with Clopper-Pearson intervals. For random
  defences an accuracy is the mean over 10 fresh draws per image, which the attacks have not seen. Half of the draws
  choose an image's attack and the others count. If a single attack is stronger than that, it is the worst case.
- *PGD alone*: the worst case of the classifier trained on PGD without a defence, on the same images, under the same
  budget.
- *PGD-8*, *PGD-25*: classifiers trained on PGD within 8 and 25 levels.
- *images/s*: purified in a second of CPU time of one thread.
- Adaptive PixelDefend has a threshold of its own in every row, chosen on 200 images of the calibration split under
  blind attacks; the JSON file states it.
{facts["missing"]}
"""


def main(
    work: Work,
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 100,
    budget: Annotated[str, typer.Option(help="quick, standard or full")] = "quick",
    only: Annotated[list[str], typer.Option(help="a defence, as the table names it; may be repeated")] = [],  # noqa: B006
    radii: Annotated[list[int], typer.Option(help="of the attacks, in levels")] = list(RADII),  # noqa: B006
    public: Annotated[bool, typer.Option(help="attack by the public AutoAttack's APGD, too")] = False,
    data_dir: DataDir = None,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
    page_only: Annotated[bool, page_only(lambda: write_page())] = False,
) -> None:
    """Measure the rows that are missing, and write the table after each of them."""
    data, path = datasets.load("fashion-mnist", data_dir), work / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for defence in DEFENCES:
        if only and defence.name not in only:
            continue
        for eps in radii:
            for classifier in (NORMAL, f"{NORMAL}-pgd-{eps}"):
                row = measure(defence, classifier, eps, data, budget, images, work)
                if public and defence not in VARIANTS:
                    row["auto_attack"] = public_check(defence, classifier, eps, data, images, work)
                rows[label(row)] = row
                print(row["defence"], classifier, eps, row["accuracy"], row["seconds"], row["alarms"], flush=True)
                write_atomically(path, json.dumps(rows))
                publish(list(rows.values()), results)


def label(row: dict[str, Any]) -> str:
    """The name of a row."""
    return ", ".join(str(row[key]) for key in ("defence", "classifier", "eps", "budget"))


def publish(rows: list[dict[str, Any]], results: Path) -> None:
    """Write the results as JSON, a row a line, and as Markdown."""
    order = {defence.name: i for i, defence in enumerate(DEFENCES)}
    rows = sorted(
        rows,
        key=lambda row: (row["eps"], order[row["defence"]], row["classifier"] != NORMAL, BUDGETS.index(row["budget"])),
    )
    measured = {(row["defence"], row["eps"]) for row in rows}
    wanted = [(defence.name, eps) for eps in RADII for defence in DEFENCES if defence not in VARIANTS]
    missing = [f"{name} within {eps} levels" for name, eps in wanted if (name, eps) not in measured]
    facts = {
        "missing": f"- Not measured: {'; '.join(missing)}.\n" if missing else "",
        "command": "python benchmarks/adaptive_evaluation.py --work FOLDER", "date": date.today().isoformat(),
        "hardware": runner.hardware(), "versions": runner.versions(),
    }  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    content = f'{{"facts": {json.dumps(facts, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    write_atomically(results / f"{NAME}.json", content)
    write_page(results)


def write_page(results: Path = RESULTS) -> None:
    """Write the Markdown file from the JSON file."""
    found = json.loads((results / f"{NAME}.json").read_text())
    write_atomically(results / f"{NAME}.md", page(found["rows"], found["facts"]))


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    tables = "\n".join(f"## Within {eps} levels\n\n{table(rows, eps)}" for eps in RADII)
    alarms = [f"- {label(r)}: {alarm}" for r in rows for alarm in [*r["alarms"], *no_better_than_training(r, rows)]]
    checks = [
        f"- {label(r)}: {r['auto_attack']['accuracy']:.1f} "
        f"({r['auto_attack']['interval'][0]:.1f} to {r['auto_attack']['interval'][1]:.1f}), here "
        f"{r['accuracy']['worst case']:.1f}"
        for r in rows
        if "auto_attack" in r
    ]
    tables += f"\n## PixelDefend against the same classifier alone\n\n{PAIRED}\n\n{paired(rows)}"
    if any(row["defence"] in [variant.name for variant in VARIANTS] for row in rows):
        tables += f"\n## Variants of PixelDefend\n\n{OF_VARIANTS}\n\n{variants(rows)}"
    if checks:
        tables += f"\n## APGD of the public AutoAttack\n\n{AUTO_ATTACK}\n\n" + "\n".join(checks) + "\n"
    notes = "\n## Alarms of the diagnostics\n\n" + "\n".join(alarms or ["none"]) + "\n"
    return head(facts) + tables + notes


if __name__ == "__main__":
    typer.run(main)
