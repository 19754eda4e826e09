"""Certified accuracy by randomized smoothing, with a score model as the denoiser.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/certified_smoothing.py --work FOLDER
    python benchmarks/certified_smoothing.py --work FOLDER --dataset cifar-10 --classifier cifar-10-resnet

writes ``results/certified-smoothing.json``, ``.md`` and ``.png``; for another data set than Fashion-MNIST, files whose
names begin with it. The folder of the first command is that of ``score_purification.py``, with its classifiers.
Certificates are kept in the folder, so that a run that was stopped continues.
"""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from published import RESULTS, command
from scipy.stats import beta
from score_purification import Subjects
from torch import nn

from art_pixeldefend import PurifiedModel, ScoreDenoiser
from art_pixeldefend.evaluation import figures, runner
from art_pixeldefend.evaluation.smoothing import ABSTAIN, Certificates, certified_table, certify_smoothed
from art_pixeldefend.files import write_atomically
from art_pixeldefend.processes import process_group

TITLES = {"fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10"}
RADII = (0.0, 0.25, 0.5, 0.75)
ALPHA = 0.001


class ArtSmoothing(PyTorchRandomizedSmoothing):
    """ART's class, with its confidence bound from SciPy: its own needs the package statsmodels."""

    def _lower_confidence_bound(self, n_class_samples: int, n_total_samples: int) -> float:
        return float(beta.ppf(self.alpha, n_class_samples, n_total_samples - n_class_samples + 1))


def art_seconds(model: nn.Module, denoiser: ScoreDenoiser, x: np.ndarray, n0: int, n: int) -> float:
    """CPU time of ART's ``certify`` per image."""
    smoothed = ArtSmoothing(
        model, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0.0, 1.0), preprocessing_defences=denoiser,
        sample_size=n0, scale=denoiser.sigma, alpha=ALPHA,
    )  # fmt: skip
    began = time.process_time()
    smoothed.certify(x, n, batch_size=500)
    return (time.process_time() - began) / len(x)


def main(
    work: Annotated[Path, typer.Option(help="folder for everything between")],
    dataset: Annotated[str, typer.Option(help=f"one of {', '.join(TITLES)}")] = "fashion-mnist",
    classifier: Annotated[str | None, typer.Option(help="a bundled one; default: trained by the quick recipe")] = None,
    model: Annotated[str | None, typer.Option(help="score model: a name or a path; default: DATASET-score")] = None,
    sigma: Annotated[list[float], typer.Option(help="standard deviation of the noise; may be repeated")] = [0.25, 0.5],  # noqa: B006
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 200,
    n: Annotated[int, typer.Option(help="draws of the estimation sample")] = 1000,
    n0: Annotated[int, typer.Option(help="draws of the selection sample")] = 100,
    art: Annotated[int, typer.Option(help="images that ART's own class certifies, for its speed; 0: none")] = 5,
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
) -> None:
    """Certify the classifier alone, with the denoiser, and tuned."""
    group = process_group()
    subjects = Subjects(work, model or f"{dataset}-score", data_dir, dataset, classifier)
    if group.rank == 0:  # trains them if they are not there
        subjects.classifier(), subjects.classifier(tuned=True)
    group.wait()
    x, y = subjects.data.x_test[:images].astype(np.float32) / 255, subjects.data.y_test[:images]
    rows: list[dict[str, Any]] = []
    found: dict[str, Certificates] = {}
    for level in sigma:
        for name, denoised, tuned in (
            ("classifier alone", False, False),
            ("denoiser and classifier", True, False),
            ("denoiser and tuned classifier", True, True),
        ):
            network, name = subjects.classifier(tuned).model, f"{name}, sigma {level:g}"
            smoothed = PurifiedModel(network, ScoreDenoiser(subjects.score_model, level)) if denoised else network
            file = work / "certificates" / f"{name}, {images} images, n {n}.json"
            began, used, new = time.perf_counter(), time.process_time(), not file.is_file()
            found[name] = certify_smoothed(
                smoothed, x, level, n0=n0, n=n, alpha=ALPHA, file=file, name=name, verbose=True
            )
            rows.append({
                "name": name, "sigma": level, "images": images,
                "certified_percent": {str(radius): 100 * found[name].accuracy(y, radius) for radius in RADII},
                "largest_radius": round(found[name].largest_radius, 3),
                "abstained_percent": 100 * float((found[name].predictions == ABSTAIN).mean()),
                "seconds": round(time.perf_counter() - began, 1) if new else None,
                "cpu_seconds": round(sum(group.gather(time.process_time() - used)), 1) if new else None,
            })  # fmt: skip
    if group.rank > 0:
        return
    facts = {
        "command": command("certified_smoothing.py"), "date": date.today().isoformat(), "hardware": runner.hardware(),
        "processes": group.world_size, "versions": runner.versions(), "n0": n0, "n": n, "alpha": ALPHA,
    }  # fmt: skip
    if art:  # the work of the third row, in one process
        denoiser, network = ScoreDenoiser(subjects.score_model, sigma[0]), subjects.classifier(tuned=True).model
        facts["art_cpu_seconds_per_image"] = round(art_seconds(network, denoiser, x[:art], n0, n), 3)
    lines = ",\n".join(json.dumps(row) for row in rows)
    content = f'{{"facts": {json.dumps(facts, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    stem = "certified-smoothing" if dataset == "fashion-mnist" else f"{dataset}-certified-smoothing"
    write_atomically(results / f"{stem}.json", content)
    text = head(facts, TITLES[dataset], stem, images) + certified_table(found, y, RADII)
    write_atomically(results / f"{stem}.md", text)
    figures.certified_accuracy(results / f"{stem}.png", {name: some.radii_of(y) for name, some in found.items()})


def head(facts: dict[str, Any], title: str, stem: str, images: int) -> str:
    """Above the table."""
    return f"""# {title}: certified accuracy by randomized smoothing

`{facts["command"]}`, {facts["date"]}, {facts["hardware"]}.
The first {images} test images; certified accuracy in percent by L2 radius, in units of the [0, 1] range;
{facts["n0"]} draws to select a class, {facts["n"]} to estimate its probability, alpha {ALPHA}.

![certified accuracy]({stem}.png)

"""


if __name__ == "__main__":
    typer.run(main)
