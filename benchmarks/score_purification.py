"""Score-based purification on Fashion-MNIST, beside PixelDefend, under BIM on the classifier without its purifier.

    OMP_NUM_THREADS=1 python benchmarks/score_purification.py --work FOLDER

writes ``results/score-purification.json`` and ``.md``. The folder keeps the classifier (the paper's ResNet by the quick
recipe), the same classifier tuned on denoised images, their attacked images and every finished row, so that a run that
was stopped continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import RESULTS, facts_of_run

from art_pixeldefend import PixelDefend, ScorePurifier, classifiers, datasets
from art_pixeldefend.attacks import make_attack
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import markdown_table, wilson
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers import AdaptiveStep, Purifier
from art_pixeldefend.purifiers.purified_model import combined

RADII = (8, 25)  # of the attack, in levels
SIGMAS = (0.1, 0.5)  # of the images that the classifier is tuned on
KEPT = 0.95  # of clean images, by the threshold of detect-then-purify


@dataclass(frozen=True)
class Row:
    """A row of the table: a purifier, the classifier behind it, and how much of it is computed."""

    name: str
    purifier: Callable[[ScoreModel, datasets.Dataset], Purifier] | None
    tuned: bool = False
    runs: int = 8
    images: int | None = None  # the first so many
    transferred: bool = False  # attacked images of the classifier that is not tuned


def one_pass(sigma: float, **arguments: Any) -> Callable[..., Purifier]:
    """A score purifier with its noise level."""
    return lambda model, data: ScorePurifier(model, sigma, seed=0, **arguments)


def thresholded(sigma: float) -> Callable[..., Purifier]:
    """Purification of the images whose score is larger than that of ``KEPT`` of the calibration images."""

    def make(model: ScoreModel, data: datasets.Dataset) -> Purifier:
        clean = data.calibration(model).x[:2000].astype(np.float32) / 255
        threshold = float(np.quantile(ScorePurifier(model).score_norms(clean), KEPT))
        return ScorePurifier(model, sigma, threshold=threshold, seed=0)

    return make


def pixel_defend(model: ScoreModel, data: datasets.Dataset) -> Purifier:
    """PixelDefend with the paper's radius."""
    return PixelDefend(eps=32, pixel_cnn="fashion-mnist")


ROWS = (
    Row("no defence", None, runs=1),
    Row("PixelDefend, eps 32", pixel_defend, runs=1),
    Row("one pass, sigma 0.25", one_pass(0.25)),
    Row("one pass, sigma 0.4", one_pass(0.4)),
    Row("one pass, sigma 0.25, above the threshold", thresholded(0.25)),
    Row("3 deterministic steps, sigma 0.25", one_pass(0.25, steps=3, eta=0.0)),
    Row("5 ancestral steps, sigma 0.25", one_pass(0.25, steps=5)),
    Row("5 ancestral steps, sigma 0.4", one_pass(0.4, steps=5)),
    Row("ADP's updates, sigma 0.25", one_pass(0.25, steps=10, adaptive=AdaptiveStep()), runs=2, images=200),
    Row(
        "ADP's updates, rate 0.3, 5 steps, sigma 0.25",
        one_pass(0.25, steps=5, adaptive=AdaptiveStep(rate=0.3, largest=1.0)),
        runs=2,
        images=200,
    ),
    Row("no defence", None, tuned=True, runs=1),
    Row("PixelDefend, eps 32", pixel_defend, tuned=True, runs=1),
    Row("one pass, sigma 0.25", one_pass(0.25), tuned=True),
    Row("one pass, sigma 0.4", one_pass(0.4), tuned=True),
    Row("5 ancestral steps, sigma 0.4", one_pass(0.4, steps=5), tuned=True),
    Row("one pass, sigma 0.25", one_pass(0.25), tuned=True, transferred=True),
    Row("one pass, sigma 0.4", one_pass(0.4), tuned=True, transferred=True),
)


class Subjects:
    """Data, score model and classifiers, made when first needed and kept in a folder.

    The classifier is a bundled one, or else trained by the quick recipe.
    """

    def __init__(
        self,
        work: Path,
        model: str,
        data_dir: Path | None,
        dataset: str = "fashion-mnist",
        classifier: str | None = None,
    ) -> None:
        self.work, self.bundled = work, classifier
        self.untuned: str | Path = classifier or work / "classifier.safetensors"
        self.data = datasets.load(dataset, data_dir)
        self.score_model = as_model(model, ScoreModel, name="--model")

    def classifier(self, tuned: bool = False) -> classifiers.PyTorchClassifier:
        """The ResNet, or the one tuned on denoised images."""
        path = self.work / "tuned.safetensors" if tuned else self.untuned
        if path != self.bundled and not Path(path).is_file():
            began = time.process_time()
            network = self._tuned() if tuned else self._trained()
            classifiers.save(path, network, {"cpu_seconds": round(time.process_time() - began, 1)})
        network = classifiers.load(path)
        classifier = classifiers.as_art(network.requires_grad_(False))
        classifier.cpu_seconds = network.provenance.get("cpu_seconds")
        return classifier

    def _trained(self) -> torch.nn.Module:
        images = self.data.train_and_calibration()
        network = classifiers.build("resnet", self.data.image_shape)
        return classifiers.train(network, images.x, images.y, "quick", verbose=True)

    def _tuned(self) -> torch.nn.Module:
        network = classifiers.load(self.untuned)
        purifier = ScorePurifier(self.score_model)
        trainer = classifiers.PurifiedTrainer(classifiers.as_art(network), purifier, {"sigma": SIGMAS}, verbose=True)
        trainer.fit(self.data.x_train.astype(np.float32) / 255, self.data.y_train)
        return network

    def images(self, count: int, tuned: bool = False) -> dict[str, np.ndarray]:
        """Clean test images in [0, 1], and those that BIM made of them against one of the classifiers alone."""
        x, y = self.data.x_test[:count].astype(np.float32) / 255, np.eye(10, dtype=np.float32)[self.data.y_test[:count]]
        images = {"clean": x}
        for eps in RADII:
            attack = make_attack("bim", self.classifier(tuned), eps)
            settings = {"eps": eps, "images": count, "tuned": tuned}
            images[f"BIM {eps}"] = Store(self.work).images("attacked", settings, partial(attack.generate, x, y))
        return images


def measure(row: Row, subjects: Subjects, count: int) -> dict[str, Any]:
    """Accuracies of a row, in percent, on the first ``count`` test images or fewer."""
    network, images = subjects.classifier(row.tuned).model, subjects.images(count, row.tuned and not row.transferred)
    purifier = row.purifier(subjects.score_model, subjects.data) if row.purifier else None
    count = min(row.images or count, count)
    result: dict[str, Any] = {
        "name": row.name, "tuned": row.tuned, "transferred": row.transferred, "runs": row.runs, "images": count,
        "purifier": repr(purifier), "one_draw": {}, "accuracy": {}, "interval": {},
    }  # fmt: skip
    began = time.process_time()
    y = subjects.data.y_test[:count]
    for name, x in images.items():
        logits = draws(network, purifier, torch.from_numpy(x[:count]), row.runs)
        right = int((combined(logits, "logits").argmax(1).numpy() == y).sum())
        result["one_draw"][name] = round(100 * float((logits.argmax(2).numpy() == y[:, None]).mean()), 2)
        result["accuracy"][name] = 100 * right / count
        result["interval"][name] = [round(100 * end, 1) for end in wilson(right, count)]
    return result | {"cpu_seconds": round(time.process_time() - began, 1)}


def on_training_images(subjects: Subjects, tuned: bool, sigma: float, count: int) -> float:
    """Accuracy in percent after one pass, 8 draws, on images that trained the classifier."""
    purifier = ScorePurifier(subjects.score_model, sigma, seed=0)
    x = torch.from_numpy(subjects.data.x_train[:count].astype(np.float32) / 255)
    logits = draws(subjects.classifier(tuned).model, purifier, x, 8)
    right = combined(logits, "logits").argmax(1).numpy() == subjects.data.y_train[:count]
    return round(100 * float(right.mean()), 2)


@torch.no_grad()
def draws(network: torch.nn.Module, purifier: Purifier | None, x: torch.Tensor, runs: int) -> torch.Tensor:
    """Logits (N, runs, classes) of purified images."""
    repeated = x.repeat_interleave(runs, 0)
    purified = repeated if purifier is None else purifier.purified(repeated)
    return torch.cat([network(some).detach() for some in purified.split(500)]).unflatten(0, (len(x), runs))


def speed(model: ScoreModel, x: np.ndarray) -> dict[str, float]:
    """Images that one pass purifies in a second of CPU time of one thread, best of five calls."""
    rates = {}
    for batch_size in (1, 250):
        purifier, some = ScorePurifier(model, seed=0, batch_size=batch_size), x[: 4 * batch_size]
        times = []
        for _ in range(6):
            began = time.process_time()
            purifier(some)
            times.append(time.process_time() - began)
        rates[f"batch {batch_size}"] = round(len(some) / min(times[1:]), 1)
    return rates


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: accuracies of averaged logits, and of one draw where there are several."""
    columns = ["clean", *(f"BIM {eps}" for eps in RADII)]
    lines = []
    for row in rows:
        cells = [
            f"{row['accuracy'][name]:.1f}" + (f" ({row['one_draw'][name]:.1f})" if row["runs"] > 1 else "")
            for name in columns
        ]
        kind = ("tuned, images transferred" if row.get("transferred") else "tuned") if row["tuned"] else "as it is"
        lines.append([kind, row["name"], f"{row['images']:,}", row["runs"], *cells])
    return markdown_table(["classifier", "defence", "images", "draws", *columns], lines, left=2)


def main(
    work: Annotated[Path, typer.Option(help="folder for everything between")],
    model: Annotated[str, typer.Option(help="score model: a bundled name or a path")] = "fashion-mnist-score",
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 1000,
    only: Annotated[str, typer.Option(help="rows whose name contains this")] = "",
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
) -> None:
    """Measure every row, and the speed of one pass."""
    subjects, store = Subjects(work, model, data_dir), Store(work)
    subjects.classifier(), subjects.classifier(tuned=True)
    rows = []
    for row in ROWS:
        if only not in row.name:
            continue
        settings = {"row": row.name, "tuned": row.tuned, "runs": row.runs, "of": row.images, "images": images,
                    "model": subjects.score_model.fingerprint()}  # fmt: skip
        settings |= {"transferred": True} if row.transferred else {}
        result = store.read("rows", settings)
        if result is None:
            result = measure(row, subjects, images)
            store.write("rows", settings, result)
        rows.append(result)
        print(table([result]).splitlines()[-1], flush=True)
    facts = {
        **facts_of_run("score_purification.py"), "images": images,
        "classifier_cpu_seconds": round(subjects.classifier().cpu_seconds, 1),
        "tuning_cpu_seconds": subjects.classifier(tuned=True).cpu_seconds,
        "one_pass_on_training_images": {
            f"{'tuned' if tuned else 'as it is'}, sigma {sigma}": on_training_images(subjects, tuned, sigma, images)
            for tuned in (False, True) for sigma in (0.25, 0.4)
        },
        "images_per_cpu_second": speed(subjects.score_model, subjects.images(images)["clean"]),
    }  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    content = f'{{"facts": {json.dumps(facts, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    write_atomically(results / "score-purification.json", content)
    write_atomically(results / "score-purification.md", head(facts) + table(rows))


def head(facts: dict[str, Any]) -> str:
    """Above the table."""
    return f"""# Fashion-MNIST: score-based purification under BIM on the bare classifier

`{facts["command"]}`, {facts["date"]}, {facts["hardware"]}.
The ResNet of the paper on the first {facts["images"]:,} test images. Accuracy in percent: of the averaged logits of
all draws and, in parentheses, of single draws. The tuned classifier was trained for another
{facts["tuning_cpu_seconds"]} CPU seconds on images denoised at sigma {SIGMAS[0]} to {SIGMAS[1]}.
BIM sees the classifier of the row without its defence; transferred images are those of the classifier as it is.
After one pass, accuracy on the first {facts["images"]:,} training images is
{", ".join(f"{value:.1f} ({name})" for name, value in facts["one_pass_on_training_images"].items())}.

"""


if __name__ == "__main__":
    typer.run(main)
