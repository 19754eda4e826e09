"""Detection of attacked, out-of-distribution and harmlessly changed Fashion-MNIST images, with and without attacks that
know the detector; and false-alarm rates on all bundled data sets.

    OMP_NUM_THREADS=1 python benchmarks/detection.py --work FOLDER

writes ``results/detection.json`` and ``.md``. The folder keeps attacked images and scores, so that a run that was
stopped continues. With ``--choose`` it prints the same table for other images, on which the combinations were chosen.
``--page-only`` computes nothing and writes the page of the published results again.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from published import RESULTS, DataDir, Work, command, page_only
from sklearn.metrics import roc_auc_score

from art_pixeldefend import ScorePurifier, datasets
from art_pixeldefend.attacks import DetectorAware, losses, make_attack
from art_pixeldefend.classifiers import networks
from art_pixeldefend.datasets import fingerprint
from art_pixeldefend.detectors import (
    ConformalDetector,
    DenoisingError,
    Likelihood,
    PredictionChange,
    Score,
    ScoreNorm,
)
from art_pixeldefend.detectors.false_alarms import false_alarms
from art_pixeldefend.detectors.scores import ComplexityCorrectedLikelihood, compressed_bytes
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.stages import attack_key
from art_pixeldefend.evaluation.store import Settings, Store
from art_pixeldefend.evaluation.table import wilson
from art_pixeldefend.files import write_atomically

CLASSIFIER, DENSITY_MODEL, SCORE_MODEL = "fashion-mnist-resnet", "fashion-mnist", "fashion-mnist-score"
RADII = (8, 25)
ALPHAS = (0.01, 0.05, 0.1)
LEVEL = 0.05  # of the detectors that are attacked
METHODS = ("orthogonal", 1.0)
COMBINED = "combined"
CHOICE = slice(7000, 8000)  # of the test images: those on which the combination was chosen
CHOSEN = ("likelihood minus PNG length", "score norm, sigma 0.02", "prediction change, sigma 0.05")
ATTACKS = {"fgsm": "FGSM", "bim": "BIM", "deepfool": "DeepFool", "cw": "CW", "minimal-l2": "minimal L2"}


def scores(classifier: torch.nn.Module) -> dict[str, Score]:
    """The anomaly scores, by name."""
    return {
        "likelihood (the paper's)": Likelihood(DENSITY_MODEL),
        "likelihood minus PNG length": ComplexityCorrectedLikelihood(DENSITY_MODEL),
        "score norm, sigma 0.02": ScoreNorm(SCORE_MODEL, 0.02),
        "denoising error, sigma 0.1": DenoisingError(SCORE_MODEL, 0.1, runs=4),
        "prediction change, sigma 0.05": PredictionChange(classifier, ScorePurifier(SCORE_MODEL, sigma=0.05), runs=8),
    }


# Images


def kinds(x: np.ndarray, data: datasets.Dataset, data_dir: Path | None) -> dict[str, Callable[[], np.ndarray]]:
    """Images that are not attacked, by kind: levels (N, 1, 28, 28), made from clean ones or from other sets."""

    def resized(images: np.ndarray) -> np.ndarray:
        small = [Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR) for image in images]
        return np.stack([np.asarray(image) for image in small])[:, None]

    def digits() -> np.ndarray:
        return resized(datasets.load("digits").x_test[: len(x), 0])

    def cifar() -> np.ndarray:
        images = datasets.load("cifar-10", data_dir).x_test[: len(x)]
        return resized(np.stack([np.asarray(Image.fromarray(np.moveaxis(i, 0, -1)).convert("L")) for i in images]))

    def harmless() -> np.ndarray:
        signs = np.random.default_rng(0).choice([-1, 1], x.shape)
        return np.clip(x.astype(int) + 8 * signs, 0, 255).astype(np.uint8)

    return {
        "noise of 8 levels (harmless)": harmless,
        "digits": digits,
        "CIFAR-10, grey": cifar,
        "constants": lambda: np.full((256, *x.shape[1:]), np.arange(256).reshape(-1, 1, 1, 1), np.uint8),
        "noise": lambda: np.random.default_rng(1).integers(0, 256, x.shape, np.uint8),
        "upside down": lambda: x[:, :, ::-1].copy(),
    }


class Cache:
    """Arrays in a folder, by the settings that they follow from."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.seconds: dict[Path, float] = {}  # of CPU time that the arrays in use took

    def arrays(self, kind: str, settings: Settings, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, Any]:
        """The arrays of these settings, computed if they are not stored."""
        path = self.store.path(kind, settings, ".npz")
        if not path.exists():
            began, buffer = time.process_time(), io.BytesIO()
            found = compute()
            np.savez_compressed(buffer, seconds=time.process_time() - began, **found)
            write_atomically(path, buffer.getvalue())
            print(f"{kind} {settings.get('attack', '')}: {time.process_time() - began:.0f} CPU s", flush=True)
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        self.seconds[path] = float(found.pop("seconds"))
        return found


class Run:
    """The images and scores of one run."""

    def __init__(self, work: Path, data_dir: Path | None) -> None:
        self.cache = Cache(work)
        self.data = datasets.load("fashion-mnist", data_dir)
        self.network = networks.load(CLASSIFIER).eval()
        self.classifier = PyTorchClassifier(
            self.network, torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1)
        )
        self.weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.network.state_dict().values()))
        self.scores = scores(self.network)

    def attack_settings(self, attack: Any, eps: int | None, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        """What the images of an attack follow from."""
        images = [fingerprint(x), fingerprint(y)]
        return {"attack": attack, "eps": eps, "images": images, "classifier": self.weights.hexdigest()}

    def attacked(self, name: str, eps: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Levels of images attacked blindly; those of ``minimal-l2`` are in no ball."""
        if name == "minimal-l2":
            settings = self.attack_settings(name, None, x, y)
            return self.cache.arrays("attacked", settings, lambda: {"x": self._minimal_l2(x, y)})["x"]
        free = name in ("cw", "deepfool")  # the same images, clipped to either ball

        def compute() -> dict[str, np.ndarray]:
            attack = make_attack(name, self.classifier, 255 if free else eps)
            return {"x": np.rint(attack.generate(x.astype(np.float32) / 255, y) * 255).astype(np.uint8)}

        settings = self.attack_settings(attack_key(name), None if free else eps, x, y)
        low, high = (np.clip(x.astype(int) + sign * eps, 0, 255) for sign in (-1, 1))
        return np.clip(self.cache.arrays("attacked", settings, compute)["x"], low, high).astype(np.uint8)

    def _minimal_l2(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Minimise the squared L2 distance plus the positive part of the margin, and take the closest image fooled.

        This is the loss of Carlini and Wagner (2017) with the constant 1, in pixels clipped to [0, 1], by 60 steps of
        Adam. ART's ``CarliniL2Method`` optimises in tanh space with a line search in each step: in as many steps it
        takes longer and finds larger perturbations.
        """
        clean, labels = torch.from_numpy(x).float() / 255, torch.from_numpy(y)
        change = torch.zeros_like(clean, requires_grad=True)
        adam = torch.optim.Adam([change], 0.02)
        best, least = clean.clone(), torch.full((len(clean),), torch.inf)
        for _ in range(60):
            attacked = (clean + change).clamp(0, 1)
            margin, distance = losses.margin(self.network(attacked), labels), (attacked - clean).square().sum((1, 2, 3))
            better = (margin > 0) & (distance < least)
            best[better], least[better] = attacked.detach()[better], distance.detach()[better]
            adam.zero_grad()
            (distance - margin.clamp(max=0)).sum().backward()
            adam.step()
        return np.rint(best.numpy() * 255).astype(np.uint8)

    def scored(self, x: np.ndarray, seed: int = 1) -> np.ndarray:
        """Scores (N, K) of levels."""

        def compute() -> dict[str, np.ndarray]:
            unit, columns = torch.from_numpy(x).float() / 255, []
            for score in self.scores.values():
                if isinstance(score, ComplexityCorrectedLikelihood):  # the likelihood is computed once
                    bits = [8 * compressed_bytes(image) / image.size for image in x]
                    columns.append(columns[0] - np.array(bits))
                    continue
                with torch.no_grad():
                    parts = [score(part, start=128 * i, seed=seed) for i, part in enumerate(unit.split(128))]
                columns.append(torch.cat(parts).double().numpy())
            return {"scores": np.stack(columns, axis=1)}

        fingerprints = [score.fingerprint() for score in self.scores.values()]
        settings = {"images": fingerprint(x), "scores": fingerprints, "seed": seed}
        return self.cache.arrays("scores", settings, compute)["scores"]

    def calibration(self) -> np.ndarray:
        """Scores (N, K) of the test images that are reserved for calibration."""
        return self.scored(self.data.reserve().x, seed=0)

    def detector(self, names: tuple[str, ...]) -> ConformalDetector:
        """A detector of some scores, calibrated on the test images that are reserved for that."""
        detector = ConformalDetector([self.scores[name] for name in names], "joint", LEVEL)
        columns = [list(self.scores).index(name) for name in names]
        detector.calibration_scores = self.calibration()[:, columns]
        return detector

    def aware(self, detector: Any, eps: int, x: np.ndarray, y: np.ndarray, steps: int) -> dict[str, Any]:
        """Attack a classifier and a detector together, and count."""

        def compute() -> dict[str, np.ndarray]:
            attack = DetectorAware(
                self.classifier, detector, eps=eps / 255, steps=steps, methods=METHODS, seed=0, batch_size=64
            )
            attacked = attack.generate(x.astype(np.float32) / 255, y)
            return {"x": np.rint(attacked * 255).astype(np.uint8), "success": attack.success}

        settings = self.attack_settings(attack_key("detector-aware"), eps, x, y) | {
            "steps": steps, "methods": METHODS, "seed": 0, "alpha": detector.alpha, "combine": detector.combine,
            "scores": [score.fingerprint() for score in detector.scores],
            "calibration": fingerprint(detector.calibration_scores),
        }  # fmt: skip
        found = self.cache.arrays("aware", settings, compute)
        return {
            "images": len(x),
            "success_percent": percent(found["success"]),
            "fooled_percent": self.fooled(found["x"], y),
        }

    def fooled(self, x: np.ndarray, y: np.ndarray) -> float:
        """Percent of images that the classifier gets wrong."""
        return percent(self.wrong(x, y))

    def wrong(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether the classifier gets levels wrong."""
        return self.classifier.predict(x.astype(np.float32) / 255).argmax(axis=1) != y


def percent(flags: np.ndarray) -> float:
    """The share of true values, in percent."""
    return round(100 * float(np.mean(flags)), 1)


def measured(detectors: dict[str, Any], columns: dict[str, list[int]], clean: np.ndarray, found: np.ndarray) -> dict:
    """AUROC against clean images, and images flagged in percent, by detector."""
    result = {}
    for name, detector in detectors.items():
        p_clean, p_found = (detector._p_values(s[:, columns[name]], None)["p_values"] for s in (clean, found))
        single = len(columns[name]) == 1  # the score itself has no ties at the ends
        values = [s[:, columns[name][0]] for s in (clean, found)] if single else [-p_clean, -p_found]
        labels = np.repeat([0, 1], [len(clean), len(found)])
        result[name] = {"auroc": round(float(roc_auc_score(labels, np.concatenate(values))), 4)} | {
            f"flagged_percent_{alpha}": percent(p_found <= alpha) for alpha in ALPHAS[:2]
        }
    return result


def rates(detectors: dict[str, ConformalDetector]) -> dict[str, list[dict[str, Any]]]:
    """Realised false-alarm rates of detectors, over random halves of their calibration images."""
    return {
        name: [
            {
                "alpha": found.alpha, "rate_percent": round(100 * found.rate, 2), "tested": found.tested,
                "binomial_percent": [round(100 * end / found.tested, 2) for end in found.interval],
                "splits": len(found.counts),
                "splits_within_beta_binomial": round(found.inside * len(found.counts)),
            }
            for found in false_alarms(detector, ALPHAS)
        ]
        for name, detector in detectors.items()
    }  # fmt: skip


def digits_detectors() -> dict[str, ConformalDetector]:
    """Detectors of the bundled models of digits, calibrated on all test images."""
    scores: dict[str, Score] = {
        "likelihood (the paper's)": Likelihood("digits"),
        "likelihood minus PNG length": ComplexityCorrectedLikelihood("digits"),
        "score norm, sigma 0.1": ScoreNorm("digits-score", 0.1),
        "denoising error, sigma 0.1": DenoisingError("digits-score", 0.1, runs=4),
    }
    x = datasets.load("digits").x_test
    found = {name: ConformalDetector(score, alpha=0.05, clip_values=(0, 255)) for name, score in scores.items()}
    chosen = [scores[name] for name in ("likelihood minus PNG length", "score norm, sigma 0.1")]
    found[COMBINED] = ConformalDetector(chosen, "joint", clip_values=(0, 255))
    for detector in found.values():
        detector.fit(x)
    return found


def main(
    work: Work,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
    data_dir: DataDir = None,
    images: Annotated[int, typer.Option(min=1, help="images of each kind that is not attacked")] = 500,
    attacked: Annotated[int, typer.Option(min=1, help="images attacked with FGSM, BIM and DeepFool")] = 300,
    slow: Annotated[int, typer.Option(min=1, help="images attacked with CW")] = 60,
    aware: Annotated[int, typer.Option(min=0, help="images attacked with knowledge of the detector")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="steps of each method of that attack")] = 25,
    choose: Annotated[bool, typer.Option("--choose", help="use other test images, and write no table")] = False,
    page_only: Annotated[bool, page_only(lambda: write_page())] = False,
) -> None:
    """Compute what is missing, and write or print the table."""
    torch.set_num_threads(1)
    run, part = Run(work, data_dir), CHOICE if choose else slice(1000)
    x, y = clean, _ = run.data.x_test[part], run.data.y_test[part]
    names = list(run.scores)
    columns = {name: [i] for i, name in enumerate(names)} | {COMBINED: [names.index(name) for name in CHOSEN]}
    detectors: dict[str, Any] = {name: run.detector((name,)) for name in names} | {COMBINED: run.detector(CHOSEN)}
    of_clean = run.scored(clean)
    known: dict[str, dict[str, Any]] = {}
    for label, detector in detectors.items() if aware else ():
        known[label] = {str(eps): run.aware(detector, eps, x[:aware], y[:aware], steps) for eps in RADII}
    found: dict[str, dict[str, Any]] = {}
    for kind, made in kinds(x[:images], run.data, data_dir).items():
        levels = made()
        scored = run.scored(levels)
        found[kind] = {"images": len(levels), "scores": measured(detectors, columns, of_clean, scored)}
    for attack, title in ATTACKS.items():
        count = slow if attack in ("cw", "minimal-l2") else attacked
        for eps in RADII if attack != "minimal-l2" else (0,):
            levels = run.attacked(attack, eps, x[:count], y[:count])
            scored = run.scored(levels)
            wrong = run.wrong(levels, y[:count])
            found[f"{title} {eps}" if eps else title] = {
                "images": count, "fooled_percent": percent(wrong),
                "scores": measured(detectors, columns, of_clean, scored),
                "fooling": measured(detectors, columns, of_clean, scored[wrong]),
            }  # fmt: skip
    unseen = {name: ConformalDetector(detector.scores, "joint") for name, detector in detectors.items()}
    everything = np.concatenate([of_clean, run.calibration()])
    for name, detector in unseen.items():
        detector.calibration_scores = everything[:, columns[name]]
    result = {
        "command": command("detection.py"), "date": date.today().isoformat(), "hardware": runner.hardware(),
        "versions": dict(runner.versions()), "classifier": CLASSIFIER, "density_model": DENSITY_MODEL,
        "score_model": SCORE_MODEL, "combined": list(CHOSEN), "clean_images": len(clean),
        "calibration_images": len(run.data.reserve().x), "clean_wrong_percent": run.fooled(clean, y),
        "cpu_seconds": round(sum(run.cache.seconds.values())), "kinds": found, "aware": known, "aware_steps": steps,
        "false_alarms": {"fashion-mnist": rates(unseen), "digits": rates(digits_detectors())},
    }  # fmt: skip
    if choose:
        typer.echo(page(result))
        return
    write_atomically(results / "detection.json", json.dumps(result, indent=1) + "\n")
    write_page(results)


# The page


def write_page(results: Path = RESULTS) -> None:
    """Write the Markdown file from the JSON file."""
    write_atomically(results / "detection.md", page(json.loads((results / "detection.json").read_text())))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = list(result["false_alarms"]["fashion-mnist"])
    kinds_of = result["kinds"]

    def auroc(values: dict[str, Any]) -> list[str]:
        best = max(values[name]["auroc"] for name in names)
        return [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in (values[name]["auroc"] for name in names)]

    def flagged(values: dict[str, Any], alpha: float) -> list[str]:
        return [f"{values[name][f'flagged_percent_{alpha}']:.1f}" for name in names]

    areas = [[kind, str(found["images"]), *auroc(found["scores"])] for kind, found in kinds_of.items()]
    for kind, found in kinds_of.items():
        if "fooling" in found:
            count = round(found["images"] * found["fooled_percent"] / 100)
            areas.append(
                [f"{kind}, misclassified ({found['fooled_percent']:.0f}%)", str(count), *auroc(found["fooling"])]
            )
    power = []
    for kind, found in kinds_of.items():
        pairs = zip(flagged(found["scores"], 0.01), flagged(found["scores"], 0.05), strict=True)
        power.append([kind, *(f"{a} / {b}" for a, b in pairs)])
    aware = [
        [name, *(text for eps in map(str, RADII) for text in success(result, name, eps))]
        for name in names
        if name in result["aware"]
    ]
    alarms = []
    for data, detectors in result["false_alarms"].items():
        for name, found in detectors.items():
            alarms.append([data, name])
            for rate in found:
                low, high = rate["binomial_percent"]
                within = f"{rate['splits_within_beta_binomial']}/{rate['splits']}"
                alarms[-1] += [f"{rate['rate_percent']:.2f}", f"{low:.1f} to {high:.1f}", within]
    combined = ", ".join(result["combined"])
    lowest = "; ".join(
        f"{' and '.join(fewest(result['aware'], str(eps)))} at {eps} levels" for eps in RADII if result["aware"]
    )
    first, wrong = alarms_of(result)[0], result["clean_wrong_percent"]
    attacked = next(iter(result["aware"].values()), {}).get(str(RADII[0]), {}).get("images", 0)
    heads = [f"{text}, {eps} levels" for eps in RADII for text in ("knows the detector", "blind")]
    columns = [text for alpha in ALPHAS for text in (f"level {alpha}", "interval", "splits within")]
    return f"""# Detection on Fashion-MNIST

`{result["command"]}`, {result["hardware"]},
{result["date"]}, {result["cpu_seconds"]} CPU seconds.

Classifier `{result["classifier"]}`, which is wrong on {wrong:.1f}% of the clean images;
density model `{result["density_model"]}`, score model `{result["score_model"]}`. {result["clean_images"]:,} clean
test images, the first ones; attacked images are the first of these. Detectors are calibrated on the last
{result["calibration_images"]:,} test images, which no model has seen. "{COMBINED}" ranks images together
(`combine="joint"`) by {combined}.
It was chosen on test images {CHOICE.start:,} to {CHOICE.stop - 1:,}, none of which this page uses.

## Area under the ROC curve

Against the clean images. CW and DeepFool minimise the perturbation, and their images are clipped to balls of 8 and 25
levels, so that many do not fool the classifier; those of minimal L2 (Carlini and Wagner's loss with the constant 1) are
not clipped. The last rows are of those attacked images that the classifier gets wrong.

{table(["images", "number", *names], areas)}
{better_alone(result)}

## Images flagged in percent, at levels 0.01 / 0.05

{table(["images", *names], power)}
## Attacks that know the detector

Percent of images that are misclassified and not flagged at level {LEVEL}. Knows the detector: `DetectorAware`, methods
{", ".join(map(str, METHODS))}, {result["aware_steps"]} steps each, {attacked} images, with 95% intervals and, in
brackets, the images that are misclassified. Blind: the most successful of FGSM, BIM, DeepFool and CW.

{table(["detector", *heads], aware)}
Fewest successes: {lowest}.

Success rates are lower bounds, which more steps and restarts can only raise. Detectors whose intervals overlap are not
told apart.

## False alarms

Clean images flagged in percent: means over {first["splits"]} random splits of images that no model has seen
(fashion-mnist: {2 * first["tested"]:,}, digits: 400) into halves, one to calibrate and one to test; the 95% binomial
interval of the level for the images tested; and the splits whose number of flagged images is within the 95% interval
for random calibration images (beta-binomial).

{table(["data", "detector", *columns], alarms)}"""


def better_alone(result: dict[str, Any], by: float = 0.01) -> str:
    """A sentence on the images that a single score tells from clean ones clearly better than the combination."""
    shown = []
    for kind, found in result["kinds"].items():
        for part, text in (("scores", kind), ("fooling", f"{kind}, misclassified")):
            areas = {name: values["auroc"] for name, values in found.get(part, {COMBINED: {"auroc": 1}}).items()}
            best = max(areas, key=areas.__getitem__)
            if areas[best] >= areas[COMBINED] + by:
                shown.append(f"{text} ({best}: {areas[best]:.3f}, combined: {areas[COMBINED]:.3f})")
    return f"A single score is better than the combination by {by:g} or more for: {'; '.join(shown) or 'none'}."


def fewest(aware: dict[str, Any], eps: str) -> list[str]:
    """The detectors that the attack beats least often."""
    least = min(found[eps]["success_percent"] for found in aware.values())
    return [name for name, found in aware.items() if found[eps]["success_percent"] == least]


def alarms_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rates of the first detector."""
    return next(iter(result["false_alarms"]["fashion-mnist"].values()))


def success(result: dict[str, Any], name: str, eps: str) -> tuple[str, str]:
    """Percent of successes of attacks that know a detector, and the most of those that do not."""
    found = result["aware"][name][eps]
    low, high = wilson(round(found["success_percent"] * found["images"] / 100), found["images"])
    blind = max(
        kind["fooled_percent"] * (100 - kind["fooling"][name]["flagged_percent_0.05"]) / 100
        for title, kind in result["kinds"].items()
        if title.endswith(f" {eps}") and "fooling" in kind
    )
    shown = f"**{found['success_percent']:.0f}** ({100 * low:.0f} to {100 * high:.0f}) [{found['fooled_percent']:.0f}]"
    return shown, f"{blind:.0f}"


if __name__ == "__main__":
    typer.run(main)
