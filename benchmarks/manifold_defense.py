"""The Robust Manifold Defense on Fashion-MNIST: projection onto a VAE's range, and training on overpowered pairs.

    OMP_NUM_THREADS=1 python benchmarks/manifold_defense.py --work FOLDER

writes ``results/manifold-defense.json``, ``.md`` and a picture of pairs. The folder is that of
``score_purification.py``, whose classifiers and attacked images it shares, and keeps the trained classifier and every
finished part, so that a run that was stopped continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from published import RESULTS, facts_of_run
from score_purification import Subjects

from art_pixeldefend import ManifoldProjection, classifiers
from art_pixeldefend.attacks import OverpoweredAttack, Pairs, make_attack
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import markdown_table, wilson
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models.generator import VAE
from art_pixeldefend.models.zoo import as_model

PROJECTIONS: dict[str, dict[str, Any]] = {
    "encoded and decoded": {"steps": 1, "learning_rate": 0.0},
    "30 steps from the encoder": {"steps": 30},
    "100 steps from the encoder": {"steps": 100},
    "50 steps, 4 restarts": {"steps": 50, "restarts": 4, "seed": 0},
    "100 steps, 2 random restarts": {"steps": 100, "restarts": 2, "encode": False, "seed": 0},
}
ROWS = [
    *((name, False) for name in ("no defence", *PROJECTIONS)),
    *((name, True) for name in ("no defence", *list(PROJECTIONS)[:3])),
]  # and whether the classifier is tuned
SEEN = 100  # images that are attacked through the projection
ATTACK: dict[str, Any] = {"eta": 1.5, "max_iter": 100, "learning_rate": 0.1, "multiplier_rate": 0.3}
PAIRS = 50
SURE = 0.9  # both predictions of a confident pair
ATTACKED: dict[str, float | str] = {  # by overpowered attacks: a weight of pairs in training, or a bundled classifier
    "as it is": 0.0,
    "trained on pairs, weight 0.05": 0.05,
    "trained on pairs, weight 0.2": 0.2,
    "trained on PGD within 8 levels": "fashion-mnist-resnet-pgd-8",
    "trained on PGD within 25 levels": "fashion-mnist-resnet-pgd-25",
}
TRAINING: dict[str, Any] = {"pairs": 30, "every": 2}
SEARCH = {**ATTACK, "max_iter": 20}  # in training
RECIPE = classifiers.Recipe(120, learning_rate=0.02, weight_decay=1e-4)


class Manifold(Subjects):
    """With the VAE, and classifiers trained on overpowered pairs."""

    def __init__(self, work: Path, model: str, data_dir: Path | None) -> None:
        super().__init__(work, "fashion-mnist-score", data_dir)
        self.vae = as_model(model, VAE, name="--model")

    def attacked(self, name: str) -> classifiers.PyTorchClassifier:
        """The ResNet as it is or trained further on overpowered pairs, or a bundled one."""
        weight = ATTACKED[name]
        if isinstance(weight, str):
            return classifiers.as_art(classifiers.load(weight).requires_grad_(False))
        if not weight:
            return self.classifier()
        path = self.work / f"manifold-{weight:g}.safetensors"
        if not path.is_file():
            began = time.process_time()
            network = classifiers.load(self.work / "classifier.safetensors")
            classifier = classifiers.as_art(network)
            attack = OverpoweredAttack(classifier, self.vae, **SEARCH)
            trainer = classifiers.ManifoldAdversarialTrainer(
                classifier, attack, weight=weight, recipe=RECIPE, verbose=True, **TRAINING
            )
            trainer.fit(self.data.x_train.astype(np.float32) / 255, self.data.y_train)
            classifiers.save(path, network, {"cpu_seconds": round(time.process_time() - began, 1)})
        network = classifiers.load(path)
        classifier = classifiers.as_art(network.requires_grad_(False))
        classifier.cpu_seconds = network.provenance.get("cpu_seconds")
        return classifier


def accuracy(classifier: Any, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """In percent, with its 95% interval."""
    right = int((classifier.predict(x, batch_size=250).argmax(1) == y).sum())
    interval = [round(100 * end, 1) for end in wilson(right, len(y))]
    return {"accuracy": round(100 * right / len(y), 2), "interval": interval}


def projected(subjects: Manifold, name: str, tuned: bool, count: int) -> dict[str, Any]:
    """Accuracy of a classifier behind a projection, on clean images and on those of an attack that does not see it."""
    classifier, y = subjects.classifier(tuned), subjects.data.y_test[:count]
    purifier = ManifoldProjection(subjects.vae, **PROJECTIONS[name]) if name in PROJECTIONS else None
    result: dict[str, Any] = {"name": name, "tuned": tuned, "images": count, "purifier": repr(purifier)}
    for kind, x in subjects.images(count, tuned).items():
        began = time.process_time()
        purified = x if purifier is None else purifier(x)[0]
        spent = time.process_time() - began
        result[kind] = accuracy(classifier, purified, y)
        if purifier is not None:
            result["images_per_cpu_second"] = round(count / spent, 1)
            result[kind]["rmse"] = round(float(purifier.reconstruction_errors(x[:SEEN]).mean()), 4)
    return result


def seen(subjects: Manifold, gradient: str, tuned: bool) -> dict[str, Any]:
    """Accuracy under BIM through the projection: an upper bound."""
    purifier = ManifoldProjection(subjects.vae, 50, gradient=gradient)
    defended = classifiers.as_art(subjects.classifier(tuned).model, [purifier])
    x, y = subjects.data.x_test[:SEEN].astype(np.float32) / 255, subjects.data.y_test[:SEEN]
    result: dict[str, Any] = {"gradient": gradient, "tuned": tuned, "images": SEEN, "clean": accuracy(defended, x, y)}
    for eps in (8, 25):
        attacked = make_attack("bim", defended, eps).generate(x, np.eye(10, dtype=np.float32)[y])
        result[f"BIM {eps}"] = accuracy(defended, attacked, y)
    return result


def pairs_of(subjects: Manifold, classifier: Any, start: str) -> Pairs:
    """Pairs from the prior or from encoded test images."""
    attack = OverpoweredAttack(classifier, subjects.vae, **ATTACK)
    if start == "prior":
        return attack.generate(count=PAIRS)
    return attack.generate(subjects.data.x_test[:PAIRS].astype(np.float32) / 255)


def overpowered(subjects: Manifold, name: str, start: str, count: int, picture: Path) -> dict[str, Any]:
    """Success of the overpowered attack, and the classifier's accuracy on clean images."""
    classifier = subjects.attacked(name)
    pairs = pairs_of(subjects, classifier, start)
    if start == "images" and not ATTACKED[name]:
        pairs.draw(picture, subjects.data.classes)
    x, y = subjects.data.x_test[:count].astype(np.float32) / 255, subjects.data.y_test[:count]
    sure = pairs.valid & (pairs.confidence.min(1) >= SURE)
    return {
        "name": name, "start": start, "cpu_seconds_of_training": getattr(classifier, "cpu_seconds", None),
        "pairs": len(pairs.valid), "clean": accuracy(classifier, x, y),
        "valid": round(100 * float(pairs.valid.mean()), 1), "confident": round(100 * float(sure.mean()), 1),
        "divergence": round(float(np.where(pairs.valid, pairs.divergence, 0).mean()), 2),
        "distance_of_valid": round(float(pairs.distance[pairs.valid].mean()), 3) if pairs.valid.any() else None,
    }  # fmt: skip


def main(
    work: Annotated[Path, typer.Option(help="folder for everything between")],
    model: Annotated[str, typer.Option(help="VAE: a bundled name or a path")] = "fashion-mnist-vae",
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 1000,
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    results: Annotated[Path, typer.Option(help="folder for the results")] = RESULTS,
) -> None:
    """Measure projections, attacks through them, and the overpowered attack before and after training on its pairs."""
    subjects, store = Manifold(work, model, data_dir), Store(work)
    fingerprint = subjects.vae.fingerprint()

    def stored(kind: str, compute: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        settings = {"kind": kind, "arguments": list(arguments), "images": images, "model": fingerprint}
        result = store.read("manifold", settings)
        if result is None:
            began = time.process_time()
            result = compute(*arguments)
            result["cpu_seconds"] = round(time.process_time() - began, 1)
            store.write("manifold", settings, result)
        print(json.dumps(result), flush=True)
        return result

    picture = results / "manifold-pairs.png"
    rows = [
        stored("projection", lambda name, tuned: projected(subjects, name, tuned, images), name, tuned)
        for name, tuned in ROWS
    ]
    through = [
        stored("seen", lambda gradient, tuned: seen(subjects, gradient, tuned), gradient, True)
        for gradient in ("identity", "implicit")
    ]
    attacks = [
        stored("overpowered", lambda name, start: overpowered(subjects, name, start, images, picture), *case)
        for case in ((name, start) for name in ATTACKED for start in ("prior", "images"))
    ]
    facts = {
        **facts_of_run("manifold_defense.py"), "model": subjects.vae.provenance, "attack": ATTACK, "sure": SURE,
        "training": {**TRAINING, "max_iter": SEARCH["max_iter"], "steps": RECIPE.steps},
    }  # fmt: skip
    content = json.dumps({"facts": facts, "projections": rows, "through": through, "overpowered": attacks}, indent=1)
    write_atomically(results / "manifold-defense.json", content + "\n")
    write_atomically(results / "manifold-defense.md", page(facts, rows, through, attacks))


def page(facts: dict[str, Any], rows: list[dict], through: list[dict], attacks: list[dict]) -> str:
    """The results as Markdown."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [f"{row[name]['accuracy']:.1f}" for name in ("clean", "BIM 8", "BIM 25")]

    def tuned(row: dict[str, Any]) -> str:
        return "tuned" if row["tuned"] else "as it is"

    accuracies = ["clean", "BIM 8", "BIM 25"]
    projections = [[tuned(row), row["name"], *cells(row), row.get("images_per_cpu_second", "")] for row in rows]
    seen_by_attack = [[tuned(row), row["gradient"], *cells(row)] for row in through]
    seconds = " and ".join(
        f"{row['cpu_seconds_of_training']:.0f}" for row in attacks if row["start"] == "prior" and "pairs" in row["name"]
    )
    found = [
        [
            row["name"], row["start"], f"{row['valid']:.0f}%", f"{row['confident']:.0f}%",
            f"{row['divergence']:.2f}", f"{row['clean']['accuracy']:.1f}",
        ]
        for row in attacks
    ]  # fmt: skip
    return f"""# Fashion-MNIST: the Robust Manifold Defense

`{facts["command"]}`, {facts["date"]}, {facts["hardware"]}.
The ResNet of the paper; the tuned one was trained further on images denoised by a score model. Accuracy in percent.

## Projection, {rows[0]["images"]:,} images, BIM sees the classifier alone

{markdown_table(["classifier", "projection", *accuracies, "images per CPU second"], projections)}
## 50 steps from the encoder, {SEEN} images, BIM sees the defence, too: upper bounds

{markdown_table(["classifier", "gradient", *accuracies], seen_by_attack)}
## Overpowered attack, {PAIRS} pairs within an L2 distance of {ATTACK["eta"]}, {ATTACK["max_iter"]} steps

Valid pairs have different labels, confident ones with a probability of at least {SURE} each. The divergence of pairs
that are not valid counts as 0. Accuracy is that on clean images. Every classifier with several classes has valid pairs,
at the boundary between them, and one whose accuracy is lost has few confident ones: compare both. Training on pairs
took {seconds} CPU seconds. The classifiers trained on PGD are the bundled ones.

{markdown_table(["classifier", "pairs begin at", "valid", "confident", "divergence (nats)", "accuracy"], found)}"""


if __name__ == "__main__":
    typer.run(main)
