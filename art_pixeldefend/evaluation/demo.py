"""The demo: attack a classifier, purify the attacked images, detect them, and attack through the defences."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import __version__, classifiers, datasets
from art_pixeldefend.attacks import ATTACKS, make_attack
from art_pixeldefend.classifiers.training import seeded
from art_pixeldefend.datasets import Dataset, Split
from art_pixeldefend.detectors import PixelDefendDetector
from art_pixeldefend.evaluation import figures, page
from art_pixeldefend.evaluation.preprocessors import Sequential
from art_pixeldefend.evaluation.table import markdown_table, wilson
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import from_levels, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.purifiers import AdaptivePixelDefend, PixelDefend, PurifiedModel, ScorePurifier
from art_pixeldefend.validation import check_choice

# Columns of the table besides the blind attacks; the last two are of the same images.
CLEAN, BLIND, WHITE_BOX = "clean", "blind", "white-box"
SHOWN = 8  # images in the report
MAGNIFIED = 6  # factor of the differences in the report


@dataclass(frozen=True)
class Setting:
    """What the demo runs on. Levels are those of 0..255.

    Args:
        title: of the data.
        data: the data set's name.
        density_model, score_model: bundled models.
        attacks: names of the blind attacks.
        eps_attack, eps_defend: radii of attacks and of PixelDefend, in levels.
        sigma: of the noise that the score purifier adds and removes, in the range from 0 to 1.
        bit_depth: of feature squeezing.
        images: test images that are attacked and reported.
        white_box_images: those of them that are attacked through the defences.
        validation: calibration images that choose the adaptive threshold; the table does not report them.
        runs: draws of the score purifier that the attack through it averages over.
    """

    title: str
    data: str
    density_model: str
    score_model: str
    attacks: tuple[str, ...]
    eps_attack: int
    eps_defend: int
    sigma: float
    bit_depth: int
    images: int = 200
    white_box_images: int = 100
    validation: int = 100
    runs: int = 4

    @property
    def columns(self) -> dict[str, str]:
        """Titles of the clean images and the blind attacks, by name."""
        return {CLEAN: "clean"} | {name: ATTACKS[name].title for name in self.attacks}


SETTINGS = {
    "fashion-mnist": Setting(
        "Fashion-MNIST", "fashion-mnist-500", "fashion-mnist", "fashion-mnist-score", ("rand", "fgsm", "bim"),
        eps_attack=8, eps_defend=32, sigma=0.25, bit_depth=3,
    ),
    # The grey values of the digits are 16 levels apart.
    "digits": Setting(
        "digits", "digits", "digits", "digits-score", ("rand", "fgsm", "bim", "deepfool", "cw"),
        eps_attack=40, eps_defend=56, sigma=0.25, bit_depth=3,
    ),
}  # fmt: skip


def run(out: Path, name: str = "fashion-mnist", *, seed: int = 0, verbose: bool = True) -> str:
    """Run the demo and write ``report.html`` and ``results.json`` into the folder ``out``.

    Args:
        out: the folder.
        name: a key of ``SETTINGS``.
        seed: of attacks, of the score purifier, and of the classifier where it is trained.
        verbose: say on standard error what is done.

    Returns:
        The table of the report, as Markdown.

    Raises:
        ValueError: for another name.
    """
    check_choice("name", name, SETTINGS)
    setting, began = SETTINGS[name], time.perf_counter()

    def say(text: str) -> None:
        if verbose:
            print(f"{time.perf_counter() - began:4.0f} s  {text}", file=sys.stderr, flush=True)

    data, pixel_cnn = datasets.load(setting.data), PixelCNNpp.from_pretrained(setting.density_model)
    calibration, test = data.calibration(pixel_cnn), data.test(pixel_cnn)
    test = Split(test.x[: setting.images], test.y[: setting.images])
    say("training a classifier" if len(data.x_train) else "loading the classifier")
    model = make_classifier(data, seed)

    say(f"attacking {len(test.y) + setting.validation} images")
    classifier = as_art(model, data.image_shape)
    chosen = Split(calibration.x[: setting.validation], calibration.y[: setting.validation])
    validation = attack(classifier, chosen, setting, seed)
    images = attack(classifier, test, setting, seed)

    say("purifying")
    defences = make_defences(setting, pixel_cnn, seed)
    threshold = defences["Adaptive PixelDefend"].calibrate(classifier, _attacks(validation), chosen.y)
    purified = {"none": images} | {d: {a: defence(x)[0] for a, x in images.items()} for d, defence in defences.items()}
    predicted = {d: {a: predict(classifier, x) for a, x in row.items()} for d, row in purified.items()}
    accuracy: dict[str, dict[str, float | None]] = {
        d: {a: float((p == test.y).mean()) for a, p in row.items()} for d, row in predicted.items()
    }

    say("attacking through the defences")
    few = Split(test.x[: setting.white_box_images], test.y[: setting.white_box_images])
    for defence_name, row in accuracy.items():
        row[BLIND] = float((predicted[defence_name]["bim"][: len(few.y)] == few.y).mean())
        row[WHITE_BOX] = (
            white_box(model, defences[defence_name], few, setting, seed) if defence_name != "none" else None
        )

    say("detecting")
    detector = PixelDefendDetector(pixel_cnn)
    detector.fit(from_levels(calibration.x))
    reports = {a: detector.detect(x) for a, x in images.items()}
    p_values = {a: found["p_values"] for a, (found, _) in reports.items()}
    p_purified = {a: detector.detect(x)[0]["p_values"] for a, x in purified["PixelDefend"].items()}

    results = {
        "version": __version__, "seed": seed, "setting": asdict(setting), "calibration_images": len(calibration.y),
        "adaptive_threshold_bits_per_dim": threshold, "density_model": pixel_cnn.provenance, "accuracy": accuracy,
        "detection": {
            a: {
                "auroc": None if a == CLEAN else figures.auroc(p_values[CLEAN], p_values[a]),
                "flagged": float(flagged.mean()), "mean_bits_per_dim": float(found["bits_per_dim"].mean()),
            }
            for a, (found, flagged) in reports.items()
        },
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    shown = list(image_rows(setting, data.classes, test.y, images, purified["PixelDefend"], predicted))
    parts = report(setting, results, shown, charts(setting, p_values, p_purified))
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    page.write_page(out / "report.html", f"Purifying and detecting adversarial {setting.title} images", parts)
    return markdown(setting, results)


def make_classifier(data: Dataset, seed: int) -> nn.Module:
    """Return the bundled classifier, or a small convolutional network trained for a few seconds on the data set."""
    if not len(data.x_train):
        return classifiers.load("fashion-mnist-resnet")
    x, y = data.train_and_calibration()
    with seeded(seed):  # torch initialises the weights, ART shuffles with NumPy
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, clip_values=(0.0, 1.0))
        classifier.fit(from_levels(x), np.eye(10, dtype=np.float32)[y], batch_size=64, nb_epochs=20)
    return model.eval()


def as_art(model: nn.Module, shape: tuple[int, ...], defences: Any = None) -> PyTorchClassifier:
    """Wrap a network of images in [0, 1], (C, H, W) each, and ten classes for ART."""
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, 10, clip_values=(0.0, 1.0), preprocessing_defences=defences
    )


def attack(classifier: PyTorchClassifier, images: Split, setting: Setting, seed: int) -> dict[str, np.ndarray]:
    """Return images in [0, 1] clean and under each blind attack, by name."""
    x, one_hot = from_levels(images.x), np.eye(10, dtype=np.float32)[images.y]
    attacks = {name: make_attack(name, classifier, setting.eps_attack, seed=seed) for name in setting.attacks}
    with seeded(seed):
        return {CLEAN: x} | {
            name: attack.generate(x, one_hot if ATTACKS[name].true_labels else None) for name, attack in attacks.items()
        }


def make_defences(setting: Setting, pixel_cnn: PixelCNNpp, seed: int | None) -> dict[str, Any]:
    """Return the defences by their names in the table; ``seed`` is that of the stochastic one."""
    eps = setting.eps_defend
    return {
        "feature squeezing": Sequential([FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=setting.bit_depth)]),
        "PixelDefend": PixelDefend(eps=eps, pixel_cnn=pixel_cnn),
        "Adaptive PixelDefend": AdaptivePixelDefend(eps=eps, pixel_cnn=pixel_cnn),
        "score purifier": ScorePurifier(setting.score_model, setting.sigma, seed=seed),
    }


def white_box(model: nn.Module, defence: Any, images: Split, setting: Setting, seed: int) -> float:
    """Return the accuracy under BIM that computes its gradients through the defence.

    They are exact for the score purifier, averaged over its draws, and the identity (BPDA) for the others.
    """
    shape = images.x.shape[1:]
    if isinstance(defence, ScorePurifier):
        defence = ScorePurifier(setting.score_model, setting.sigma)  # draws afresh, as in use
        defended = as_art(PurifiedModel(model, defence, runs=setting.runs), shape)
    else:
        defended = as_art(model, shape, [defence])
    with seeded(seed):
        attacked = make_attack("bim", defended, setting.eps_attack).generate(
            from_levels(images.x), np.eye(10, dtype=np.float32)[images.y]
        )
        return float((predict(defended, attacked) == images.y).mean())


def predict(classifier: PyTorchClassifier, x: np.ndarray) -> np.ndarray:
    """Return predicted class numbers (N,)."""
    return classifier.predict(x.astype(np.float32)).argmax(axis=1)


def image_rows(
    setting: Setting, classes: tuple[str, ...], y: np.ndarray, images: Mapping, purified: Mapping, predicted: Mapping
) -> Iterator[list[tuple[np.ndarray, str, str, bool | None]]]:
    """Return the first images for :func:`page.image_rows`: clean, under BIM, purified, and the differences."""
    for i in range(min(SHOWN, len(y))):
        clean, attacked, restored = (to_levels(x[i]) for x in (images[CLEAN], images["bim"], purified["bim"]))

        def shown(levels: np.ndarray, name: str, defence: str, column: str, i: int = i) -> tuple:
            label = predicted[defence][column][i]
            return levels, name, classes[label], bool(label == y[i])

        yield [
            shown(clean, "clean", "none", CLEAN),
            shown(attacked, "attacked", "none", "bim"),
            shown(restored, "purified", "PixelDefend", "bim"),
            (_difference(attacked, clean), "difference", "attacked", None),
            (_difference(restored, clean), "difference", "purified", None),
        ]


def _difference(levels: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the difference of two images, magnified, around mid-grey."""
    return np.clip(128 + MAGNIFIED * (levels.astype(int) - other), 0, 255).astype(np.uint8)


def charts(setting: Setting, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Draw p-values and ROC curves (Figures 3, 7 and 6 of PixelDefend); PNG files by name."""
    before, after = ({setting.columns[name]: p for name, p in values.items()} for values in (before, after))
    clean = before[setting.columns[CLEAN]]
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.png" for name in ("p-values", "roc", "roc purified")}
        figures.p_value_histograms(paths["p-values"], before, after, bins=20, columns=2)
        figures.roc_curves(paths["roc"], clean, _attacks(before))
        figures.roc_curves(paths["roc purified"], clean, _attacks(after), title="attacked images, purified")
        return {name: path.read_bytes() for name, path in paths.items()}


def _attacks(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return all columns except the clean images."""
    return {name: value for name, value in columns.items() if name != CLEAN}


def accuracy_table(setting: Setting, results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of accuracies in percent."""
    first = f"first {setting.white_box_images}"
    header = ["accuracy, %", *setting.columns.values(), f"BIM, {first}", f"BIM through the defence, {first}"]

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    return header, [
        [defence, *(shown(row[column]) for column in (*setting.columns, BLIND, WHITE_BOX))]
        for defence, row in results["accuracy"].items()
    ]


def detection_table(setting: Setting, results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of detection."""
    header = ["images", "flagged at p ≤ 0.05, %", "AUROC", "mean bits/dim"]
    rows = [
        [
            title, f"{100 * row['flagged']:.1f}", "" if row["auroc"] is None else f"{row['auroc']:.3f}",
            f"{row['mean_bits_per_dim']:.2f}",
        ]
        for title, row in zip(setting.columns.values(), results["detection"].values(), strict=True)
    ]  # fmt: skip
    return header, rows


def markdown(setting: Setting, results: Mapping[str, Any]) -> str:
    """Return both tables as Markdown."""
    tables = accuracy_table(setting, results), detection_table(setting, results)
    return "\n".join(markdown_table(*table, left=1) for table in tables)


def report(
    setting: Setting, results: Mapping[str, Any], rows: list[list[tuple]], drawn: Mapping[str, bytes]
) -> Iterator[str]:
    """Return the parts of the page."""
    accuracy, detection = results["accuracy"], results["detection"]
    none, defended, count = accuracy["none"], accuracy["PixelDefend"], setting.images
    percent = "{:.1f}%".format

    def half_width(n: int) -> str:
        low, high = wilson(n // 2, n)
        return f"{50 * (high - low):.0f}"

    yield page.paragraph(
        f"A classifier that is right on {percent(100 * none[CLEAN])} of {count} clean test images is right on "
        f"{percent(100 * none['bim'])} of them after an attack (BIM) that changes no pixel by more than "
        f"{setting.eps_attack} of 255 levels. PixelDefend replaces each attacked image by a similar one that is "
        f"likelier under a density model: the classifier is then right on {percent(100 * defended['bim'])}. On clean "
        f"images this costs {100 * (none[CLEAN] - defended[CLEAN]):.1f} points. This attack does not see the defence. "
        f"Under a short one that does, the classifier is right on {percent(100 * defended[WHITE_BOX])} of the first "
        f"{setting.white_box_images} images, instead of {percent(100 * defended[BLIND])}; longer attacks can only "
        "lower that number."
    )
    yield page.heading("Pictures")
    yield page.paragraph(
        f"The first {len(rows)} test images. Below each is the classifier's prediction, green if it is right and red "
        f"if it is wrong. Differences are magnified {MAGNIFIED} times around mid-grey: grey means no change, white "
        "brighter, black darker."
    )
    yield page.image_rows(rows)
    yield page.heading("Accuracy under attack")
    yield page.table(*accuracy_table(setting, results))
    yield page.paragraph(
        "Each row is a defence in front of the same classifier, each column an attack. Read a row from left to right: "
        "the column “clean” shows what the defence costs when nobody attacks; the columns after it are blind attacks, "
        "computed against the classifier alone; the last column is an attack that computes its gradients through the "
        "defence, to be compared with the column before it, of the same images. A defence is as good "
        "as the lowest number of its row."
    )
    yield page.bullets(
        [
            f"95% intervals reach {half_width(count)} points to either side ({count} images), in the last two columns "
            f"{half_width(setting.white_box_images)} (the first {setting.white_box_images}).",
            "RAND adds random noise of the full size, which is no attack but shows what noise alone does. FGSM takes "
            "one step along the sign of the gradient; BIM takes small steps"
            + ("; DeepFool and CW search for the smallest change" if "cw" in setting.attacks else "")
            + f". All stay within {setting.eps_attack} levels.",
            f"Feature squeezing rounds to {setting.bit_depth} bits. PixelDefend (`eps={setting.eps_defend}`) chooses "
            f"the most likely level within {setting.eps_defend} of each pixel in turn. Adaptive PixelDefend leaves "
            f"images below {results['adaptive_threshold_bits_per_dim']:.2f} bits/dim as they are; the threshold was "
            f"chosen on {setting.validation} other images. The score purifier adds noise of standard deviation "
            f"{setting.sigma} and removes it.",
            "The attack through the defence uses exact gradients averaged over "
            f"{setting.runs} draws for the score purifier, and takes the gradient of the others to be the identity "
            "(BPDA). It is short: all numbers of the last column are upper bounds.",
        ]
    )
    yield page.heading("Detection")
    yield page.table(*detection_table(setting, results))
    yield page.paragraph(
        "Images are compared with "
        f"{results['calibration_images']} clean calibration images by their likelihood under the density model. "
        "“Bits/dim” are bits per pixel that a code made from the model would need: an unusual image needs more. The "
        "p-value of an image is the fraction of calibration images that need at least as many bits. Calling images "
        f"adversarial at p ≤ 0.05 flags about 5% of clean images, here {percent(100 * detection[CLEAN]['flagged'])}. "
        "AUROC is the probability that an attacked image has a smaller p-value than a clean one: 1 is perfect, 0.5 is "
        "chance, and below 0.5 attacked images look more usual than clean ones."
    )
    yield page.charts(
        [drawn["p-values"]],
        "p-values of the images as they are (filled) and after PixelDefend (outline), all on the same scale. "
        "Clean images spread evenly over the interval, as they should; images whose p-values lie at 0 are detected. "
        "Purified images lie near 1, because purification makes images likelier than natural ones.",
    )
    yield page.charts(
        [drawn["roc"], drawn["roc purified"]],
        "ROC curves of detection: the fraction of attacked images flagged, for each fraction of clean images flagged, "
        "with the area under each curve. An area below 0.5 after purification (right) means that purified images look "
        "more usual than clean ones: detect before you purify.",
    )
    yield page.heading("Numbers")
    yield page.paragraph(
        f"`results.json` beside this page has every number. art-pixeldefend {results['version']}, seed "
        f"{results['seed']}, density model `{setting.density_model}` "
        f"({results['density_model'].get('test_bits_per_dim', float('nan')):.3f} bits/dim on test images), "
        f"{results['seconds']:.0f} seconds."
    )
