"""The published tables of the adaptive evaluation, and the README's, show what its JSON file holds."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from art_pixeldefend import PixelDefend, datasets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("adaptive_evaluation")


@pytest.fixture
def rows():
    return json.loads((BENCHMARKS / "results" / "adaptive-evaluation.json").read_text())["rows"]


def test_the_page_is_rendered_from_the_results_alone(script, tmp_path):
    shutil.copy(BENCHMARKS / "results" / "adaptive-evaluation.json", tmp_path)
    script.write_page(tmp_path)
    name = "adaptive-evaluation.md"
    assert (tmp_path / name).read_text() == (BENCHMARKS / "results" / name).read_text()


def test_the_flag_that_writes_the_page_needs_no_other_option(script, monkeypatch):
    written = []
    monkeypatch.setattr(script, "write_page", lambda: written.append(1))
    app = typer.Typer()
    app.command()(script.main)
    assert CliRunner().invoke(app, ["--page-only"]).exit_code == 0 and written == [1]


def test_the_page_describes_the_attacks_that_were_run(script, rows):
    text = " ".join(script.head({"command": "", "date": "", "hardware": "", "missing": ""}).split())
    assert "one start, 20 steps of BPDA, 10 of the other gradients and of transfer, 50 queries of Square" in text
    assert '"standard": 50 steps of BPDA, 50 of the other gradients, 40 of transfer, 1,000 queries' in text
    budgets = {
        "quick": {"BPDA": 20, "exact": 10, "implicit": 10, "transfer": 10, "Square": 50},
        "standard": {"BPDA": 50, "exact": 50, "implicit": 50, "transfer": 40, "Square": 1000},
    }
    for row in rows:
        steps = budgets[row["budget"]]
        for attack in steps.keys() & row["threats"].keys():
            threat = row["threats"][attack]
            assert f" {steps[attack]} " in threat and "restarts" not in threat
            if row["budget"] == "quick":
                assert ("EOT 4" in threat) == (row["draws"] > 1 and attack != "transfer")
        if row["draws"] == 1 and "Square" in row["accuracy"]:
            assert row["accuracy"]["Square"] == row["accuracy"]["worst case"]
        told = {"blind", "transfer", "BPDA", "PGD", "Square", *script.GRADIENTS, *script.FURTHER}
        assert set(row["threats"]) <= told


def test_the_strongest_of_the_exact_implicit_and_latent_attacks_is_shown(script, rows):
    row = next(row for row in rows if "exact" in row["accuracy"] or "implicit" in row["accuracy"])
    values = {"exact": 62.5, "implicit": 41.25, "latent": 52.5}
    page = script.table([row | {"accuracy": row["accuracy"] | values}], row["eps"])
    assert "| 41.2 |" in page and "62.5" not in page and "52.5" not in page


def test_accuracies_and_intervals_follow_from_the_images(rows):
    for row in rows:
        for name, counts in row["right_draws"].items():
            assert len(counts) == row["images"]
            assert 100 * sum(counts) / (row["draws"] * row["images"]) == pytest.approx(row["accuracy"][name], abs=0.01)
        worst, (low, high) = row["accuracy"]["worst case"], row["interval"]["worst case"]
        assert low <= worst <= high and worst <= min(row["accuracy"].values())


def test_the_readmes_headline_is_what_the_results_say(rows):
    readme = (BENCHMARKS.parent / "README.md").read_text()
    lines = re.findall(r"^\| (\S.*) \| (normal|PGD) \| .* \| \*\*([\d.]+) / ([\d.]+)\*\* \|", readme, re.MULTILINE)
    assert len(lines) >= 3
    for defence, kind, *shown in lines:
        for eps, value in zip((8, 25), shown, strict=True):
            name = next(row["defence"] for row in rows if row["defence"].startswith(defence))
            found = [
                row["accuracy"]["worst case"]
                for row in rows
                if row["defence"] == name and row["eps"] == eps
                and row["classifier"].endswith("resnet") == (kind == "normal")
            ]  # fmt: skip
            assert found and f"{min(found):.1f}" == value


def test_a_variant_stands_beside_pixel_defend_on_the_same_images(script, rows):
    plain = next(row for row in rows if row["defence"] == script.PLAIN and row["budget"] == "quick")
    count = plain["images"] // 2
    right = [hits[:count] for hits in plain["right_draws"].values()]
    variant = plain | {"defence": script.VARIANTS[0].name, "images": count}
    last_cell = script.variants([*rows, variant]).splitlines()[-1].split("|")[-2]
    assert float(last_cell) == pytest.approx(100 * np.min(right, 0).mean(), abs=0.06)


def test_each_image_is_purified_with_one_of_the_random_radii(script):
    x = datasets.load("digits").x_test[:12]
    purifier = script.RandomRadius(clip_values=(0, 255), pixel_cnn="digits")
    each = {eps: PixelDefend((0, 255), eps, "digits")(x)[0] for eps in (16, 32, 48, 64)}
    with purifier.drawing(1, range(len(x))):
        purified, _ = purifier(x)
        again, _ = purifier(x)
    assert np.array_equal(purified, again)
    chosen = [{eps for eps, images in each.items() if np.array_equal(images[i], purified[i])} for i in range(len(x))]
    assert all(chosen) and len(set.union(*chosen)) > 1 and not set.intersection(*chosen)


def test_noise_is_added_before_the_image_is_purified(script):
    x = datasets.load("digits").x_test[:4].astype(np.float32) / 255
    purified = [script.NoisyPixelDefend(eps=8, pixel_cnn="digits")(x)[0] for _ in range(2)]
    assert not np.array_equal(*purified) and max(np.abs(p - x).max() for p in purified) > 9 / 255
