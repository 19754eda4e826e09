"""The deep image prior on Fashion-MNIST under BIM on the classifier without it, and its cost.

    OMP_NUM_THREADS=1 python benchmarks/deep_image_prior.py --work FOLDER

writes ``results/deep-image-prior.json``. The folder is that of ``score_purification.py``, whose classifier it keeps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import RESULTS, facts_of_run
from score_purification import Row, Subjects, measure, table

from art_pixeldefend import DeepImagePrior
from art_pixeldefend.files import write_atomically

ERRORS = (0.004, 0.012)  # beside the default, at which fits stop
DRAWS = 4  # whose logits are averaged
CHOSEN_ON = 64  # of the images: the defaults are the best of a few settings on these


def fitted(**arguments: Any) -> Callable[..., DeepImagePrior]:
    """A deep image prior with these arguments."""
    return lambda model, data: DeepImagePrior(seed=0, **arguments)


ROWS = (
    Row("no defence", None, runs=1),
    *(Row(f"error {error:g}", fitted(error=error), runs=1) for error in ERRORS),
    Row("default", fitted(), runs=1),
    Row(f"default, {DRAWS} draws", fitted(), runs=DRAWS),
)


def seconds_per_image(x: np.ndarray, batch_sizes: tuple[int, ...] = (1, 16)) -> dict[str, dict[str, float]]:
    """Time and CPU time of purification with the default arguments, the least of three calls for each batch size."""
    found = {}
    for batch_size in batch_sizes:
        purify = partial(DeepImagePrior(seed=0, batch_size=batch_size), x[:16])
        times = []
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            purify()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = (round(min(column) / 16, 4) for column in zip(*times, strict=True))
        found[f"batches of {batch_size}"] = {"seconds": wall, "cpu_seconds": cpu}
    return found


def main(
    work: Annotated[Path, typer.Option(help="folder of the classifier and the attacked images")],
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 128,
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    results: Annotated[Path, typer.Option(help="folder for the results")] = RESULTS,
) -> None:
    """Measure accuracies and costs."""
    subjects = Subjects(work, "fashion-mnist-score", data_dir)
    rows = []
    for row in ROWS:
        rows.append(measure(row, subjects, images))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    facts = {
        **facts_of_run("deep_image_prior.py"), "threads": torch.get_num_threads(), "images": images,
        "defaults_chosen_on_the_first": CHOSEN_ON,
        "per_image": seconds_per_image(subjects.images(images)["clean"]),
    }  # fmt: skip
    print(facts["per_image"])
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomically(
        results / "deep-image-prior.json", f'{{"facts": {json.dumps(facts, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    typer.run(main)
