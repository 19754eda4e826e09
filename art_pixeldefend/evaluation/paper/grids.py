"""The grids of PixelDefend's Tables 1 and 2 (Song et al., ICLR 2018), later purifiers, and the paper's accuracies."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from art_pixeldefend.attacks import PAPER
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.preprocessors import CALIBRATED, Step
from art_pixeldefend.evaluation.threat import BLIND, WHITE_BOX, Threat
from art_pixeldefend.levels import UNIT

ART_PIXELDEFEND = "art_pixeldefend.evaluation.paper.art_pixel_defend.ArtPixelDefend"
DENSITY_MODEL = "pixel_cnn"  # the name of the density model among a grid's models
SCORE_MODEL, GENERATOR = "score", "generator"  # and of the others
NOTES = {
    "feature-squeezing": "here a white-box attack has the exact gradient of the median and the identity as that of the "
    "rounding; in the paper's code FGSM, BIM and DeepFool see the median only, and CW neither",
    "pixeldefend": "the paper attacks it blind",
    "art-pixeldefend": "ART's own class, which conditions on the attacked image where Algorithm 1 conditions on the "
    "purified one; an overflow that stops it on NumPy 2 is worked around, nothing else is changed",
    "score-purifier": "one pass after one draw of noise per image, where `PurifiedModel` averages over several",
    "deep-image-prior": "one fit per image, where `PurifiedModel` averages over several",
}
PAPER_DELTAS = {("fashion-mnist", 25): 25}  # of adversarial training, by (data set, eps of the attack); the others: 8


def defences(eps: int, bit_depth: int) -> dict[str, tuple[Step, ...]]:
    """Return the paper's defences, and ART's own PixelDefend.

    Args:
        eps: radius of purification, in levels.
        bit_depth: bits per value that feature squeezing keeps.
    """
    purification = {"eps": eps, "pixel_cnn": f"{{{DENSITY_MODEL}}}"}
    return {
        "feature-squeezing": (
            ("art.defences.preprocessor.FeatureSqueezing", {"clip_values": UNIT, "bit_depth": bit_depth}),
            ("art_pixeldefend.evaluation.preprocessors.MedianSmoothing", {"window_size": 2, "channels_first": True}),
        ),
        "pixeldefend": (("art_pixeldefend.purifiers.PixelDefend", purification),),
        "art-pixeldefend": ((ART_PIXELDEFEND, purification),),
        "adaptive-pixeldefend": (
            ("art_pixeldefend.purifiers.AdaptivePixelDefend", purification | {"threshold": CALIBRATED}),
        ),
    }


def score_purifier(**arguments: Any) -> tuple[Step, ...]:
    """Return the defence of one pass of the score model."""
    return (("art_pixeldefend.purifiers.ScorePurifier", {"model": f"{{{SCORE_MODEL}}}"} | arguments),)


# Purifiers that the paper does not have. For digits there is no generator.
LATER_PURIFIERS: dict[str, tuple[Step, ...]] = {
    "score-purifier": score_purifier(),
    "deep-image-prior": (("art_pixeldefend.purifiers.DeepImagePrior", {}),),
}
MANIFOLD_PROJECTION: dict[str, tuple[Step, ...]] = {
    "manifold-projection": (("art_pixeldefend.purifiers.ManifoldProjection", {"model": f"{{{GENERATOR}}}"}),),
}

PAPER_ROWS = (
    Row("resnet", "normal"),
    Row("vgg", "normal"),
    Row("resnet", "adversarial-fgsm"),
    Row("resnet", "adversarial-bim"),
    Row("resnet", "label-smoothing"),
    Row("resnet", "normal", "feature-squeezing", WHITE_BOX),
    Row("resnet", "adversarial-fgsm", "feature-squeezing", WHITE_BOX),
    Row("resnet", "normal", "pixeldefend"),
    Row("vgg", "normal", "pixeldefend"),
    Row("resnet", "adversarial-fgsm", "pixeldefend"),
    Row("resnet", "adversarial-fgsm", "adaptive-pixeldefend"),
)
# Every defence under the other threat, which the paper does not have. Where each step of an attack runs PixelDefend, a
# row has fewer images and no CW, which takes hundreds of steps.
SHORT = ("rand", "fgsm", "bim", "deepfool")
CHEAP = ("rand", "fgsm", "bim")  # ART's class computes the probabilities of all 256 levels of every sub-pixel
OTHER_ROWS = (
    Row("resnet", "normal", "feature-squeezing", BLIND),
    Row("resnet", "adversarial-fgsm", "feature-squeezing", BLIND),
    Row("resnet", "normal", "art-pixeldefend", BLIND, CHEAP, 100),
    Row("resnet", "normal", "art-pixeldefend", WHITE_BOX, CHEAP, 100),
    Row("resnet", "normal", "pixeldefend", WHITE_BOX, SHORT, 250),
    Row("vgg", "normal", "pixeldefend", WHITE_BOX, SHORT, 250),
    Row("resnet", "adversarial-fgsm", "pixeldefend", WHITE_BOX, SHORT, 250),
    Row("resnet", "adversarial-fgsm", "adaptive-pixeldefend", WHITE_BOX, SHORT, 250),
)
EOT = Threat("everything", "exact", eot=10, steps=20)  # for a random defence: the other attacks take one draw
SCORE_ROWS = (
    Row("resnet", "normal", "score-purifier"),
    Row("resnet", "normal", "score-purifier", EOT, ("apgd", "apgd-margin"), 250),
)
LATER_ROWS = (
    *SCORE_ROWS,
    Row("resnet", "normal", "deep-image-prior", images=500),
    Row("resnet", "normal", "deep-image-prior", WHITE_BOX, CHEAP, 100),
)
MANIFOLD_ROWS = (
    Row("resnet", "normal", "manifold-projection"),
    Row("resnet", "normal", "manifold-projection", WHITE_BOX, CHEAP, 100),
)

# Steps of training: more where the recipe's 9,000 reached 90.6% of clean images (the paper: 92), fewer for slow ones.
CIFAR_STEPS = {("resnet", "normal"): 16_000, ("vgg", "normal"): 5_000, ("resnet", "adversarial-bim"): 4_000}
WIDE = 24  # levels of the CIFAR-10 defence besides the paper's 16: with a weaker density model more is needed
WIDE_ROWS = tuple(
    Row("resnet", training, f"{defence}-{WIDE}", *threat)
    for training, defence in (("normal", "pixeldefend"), ("adversarial-fgsm", "adaptive-pixeldefend"))
    for threat in ((BLIND,), (WHITE_BOX, SHORT, 250))
)


def per_radius(rows: Iterable[Row], radii: tuple[int, ...]) -> tuple[Row, ...]:
    """Repeat rows of adversarial training for each radius, with that as their delta (the paper's Table 1)."""
    return tuple(
        made
        for row in rows
        for made in ([replace(row, delta=eps, eps=(eps,)) for eps in radii] if row.adversarial else [row])
    )


def paper_accuracy(grid: Grid, row: Row, column: str, eps: int) -> float | None:
    """Return the paper's accuracy in percent, or None where it has none.

    The paper attacks classifiers behind PixelDefend blind, and behind feature squeezing through its median, but for CW,
    which is blind. Its adversarially trained classifiers have delta 8, and delta 25 for attacks within 25 levels.
    """
    if row.adversarial and grid.delta_of(row) != PAPER_DELTAS.get((grid.dataset, eps), 8):
        return None
    through = row.defence == "feature-squeezing" and column != "cw"
    if row.defence != "none" and row.threat != (WHITE_BOX if through else BLIND):
        return None
    return paper_accuracies().get((grid.dataset, row.network, row.training, row.defence, column, eps))


@cache
def paper_accuracies() -> Mapping[tuple[str, str, str, str, str, int], float]:
    """Return the paper's percentages by (data set, network, training, defence, column, eps)."""
    with (Path(__file__).parent / "tables.csv").open(newline="") as file:
        return {
            (
                line["dataset"], line["network"], line["training"], line["defence"], line["attack"],
                int(line["eps_attack"]),
            ): float(line["accuracy_percent"])
            for line in csv.DictReader(file)
        }  # fmt: skip


GRIDS = {
    "fashion-mnist": Grid(
        "fashion-mnist",
        per_radius(PAPER_ROWS + OTHER_ROWS + LATER_ROWS + MANIFOLD_ROWS, (8, 25)),
        (8, 25),
        attacks=PAPER,
        defences=defences(32, 3) | LATER_PURIFIERS | MANIFOLD_PROJECTION,
        models={
            DENSITY_MODEL: "fashion-mnist-40x5",
            SCORE_MODEL: "fashion-mnist-score",
            GENERATOR: "fashion-mnist-vae",
        },
        validation=500,
        chunk=125,
        paper=paper_accuracy,
        notes=NOTES,
    ),
    "cifar-10": Grid(
        "cifar-10",
        tuple(
            replace(row, images=row.images and min(row.images, 200), steps=CIFAR_STEPS.get((row.network, row.training)))
            for row in PAPER_ROWS + OTHER_ROWS + WIDE_ROWS + SCORE_ROWS
        ),
        (2, 8, 16),
        attacks=PAPER,
        defences=defences(16, 5)
        | {row.defence: defences(WIDE, 5)[row.defence.removesuffix(f"-{WIDE}")] for row in WIDE_ROWS}
        | {"score-purifier": score_purifier(sigma=0.15)},
        models={DENSITY_MODEL: "cifar-10", SCORE_MODEL: "cifar-10-score"},
        recipe="cifar-10",
        validation=250,
        chunk=100,
        paper=paper_accuracy,
        notes=NOTES
        | {row.defence: f"purifies within {WIDE} levels" for row in WIDE_ROWS}
        | {"score-purifier": f"{NOTES['score-purifier']}; sigma 0.15, chosen on 200 training images of the classifier"},
    ),
    # No download, minutes: runs the whole path. A digit has 17 grey values, 16 levels apart, hence the radii.
    "digits": Grid(
        "digits",
        PAPER_ROWS + tuple(replace(row, images=20) for row in OTHER_ROWS + LATER_ROWS),
        (40,),
        attacks=PAPER,
        defences=defences(56, 3) | LATER_PURIFIERS,
        models={DENSITY_MODEL: "digits", SCORE_MODEL: "digits-score"},
        recipe="digits",
        steps=150,
        sizes={"resnet": {"units": 1}, "vgg": {"width": 2}},
        delta=20,
        images=60,
        validation=40,
        chunk=20,
        paper=paper_accuracy,
        notes=NOTES,
    ),
}
