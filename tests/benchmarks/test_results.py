"""The published tables show the numbers of the JSON files beside them."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from art_pixeldefend.evaluation import table
from art_pixeldefend.evaluation.grid import CLEAN, EARLIER_NAMES, Cell, Row
from art_pixeldefend.evaluation.paper.grids import GRIDS, paper_accuracies
from art_pixeldefend.evaluation.threat import Threat

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SECTIONS = {"fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10"}  # of the page
TABLES = {
    "fashion-mnist": "fashion-mnist",
    "fashion-mnist-10000": "fashion-mnist",
    "fashion-mnist-neighbours": "fashion-mnist",
    "fashion-mnist-feature-squeezing": "fashion-mnist",
    "cifar-10": "cifar-10",
}


def stored(name):
    """The grid and the results of a table, from its JSON file."""
    cells = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    attacks = tuple(dict.fromkeys(cell["attack"] for cell in cells if cell["attack"] != CLEAN))
    rows, results = {}, {}
    for cell in cells[::-1]:  # a row's last cell has its attacks, its first ones may stem from another table
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in cell["row"].items()}
        threat = settings["threat"]
        settings["threat"] = Threat(**threat) if isinstance(threat, dict) else EARLIER_NAMES.get(threat, threat)
        row = Row(**settings)
        row = rows.setdefault((row.name, row.eps), replace(row, attacks=None) if row.attacks == attacks else row)
        results[Cell(row, cell["attack"], cell["eps"])] = cell
    images = max(cell["count"] for cell in cells)
    grid = replace(GRIDS[TABLES[name]], rows=tuple(rows.values())[::-1], attacks=attacks, images=images)
    return grid, results


def bits_of(cell, images):
    """Whether each of the first images is right."""
    return np.array([bit == "1" for bit in cell["right"][:images]])


def accuracies(stem, name, images):
    """Columns of the page for one row of a table: accuracies within each radius of its first images."""
    cells = json.loads((RESULTS / f"{stem}.json").read_text())["cells"]
    columns = {}
    for eps in GRIDS[TABLES[stem]].eps:
        row = name.format(eps)
        right = {
            cell["attack"]: bits_of(cell, images)
            for cell in cells
            if cell["cell"].startswith(f"{row} ") and cell["eps"] in (0, eps)
        }
        attacks = [bits for attack, bits in right.items() if attack != CLEAN]
        blind = re.sub("/white-box.*", "/blind", row.replace("/through", "/bare"))
        others = [
            bits_of(cell, len(right[CLEAN]))
            for cell in cells
            if blind != row and cell["cell"].startswith(f"{blind} ") and cell["eps"] == eps
        ]
        shown = {name: right[name].mean() if name in right else None for name in (CLEAN, "fgsm", "bim")}
        worst = np.all([*right.values(), *others], axis=0)  # also without an attack, and under blind attacks
        shown |= {"strongest": min(bits.mean() for bits in attacks), "worst": worst.mean()}
        for column, value in shown.items():
            columns.setdefault(column, []).append("" if value is None else f"{100 * value:.1f}")
    return [" / ".join(values[:1] if len(set(values)) == 1 else values) for values in columns.values()]


FGSM = "resnet/adversarial-fgsm"
SHOWN = [  # table, its row, and how its line of the page begins or goes on
    ("fashion-mnist", "resnet/normal/none/bare", "| none | - | 1,000 |"),
    ("fashion-mnist", "resnet/normal/feature-squeezing/through", "| feature squeezing | white-box | 500 |"),
    ("fashion-mnist-feature-squeezing", "resnet/normal/feature-squeezing/white-box", "| the same, exact gradient"),
    ("fashion-mnist-feature-squeezing", "resnet/normal/feature-squeezing/blind", "| feature squeezing, another ResNet"),
    ("fashion-mnist", "resnet/normal/pixeldefend/bare", "| PixelDefend | blind | 1,000 |"),
    ("fashion-mnist", "resnet/normal/pixeldefend/bare", "| PixelDefend | blind | 100 |"),
    ("fashion-mnist", "resnet/normal/pixeldefend/through", "| PixelDefend | white-box | 100 |"),
    ("fashion-mnist", f"{FGSM}-delta-{{}}/adaptive-pixeldefend/bare", "with `delta` 8 and 25 | blind | 1,000 |"),
    ("fashion-mnist", f"{FGSM}-delta-{{}}/adaptive-pixeldefend/through", "| the same | white-box | 100 |"),
    ("fashion-mnist", "resnet/normal/art-pixeldefend/bare", "| blind | 100 | 87.0 |"),
    ("cifar-10", "resnet/normal/none", "| none | normal | - |"),
    ("cifar-10", "vgg/normal/none", "| none | normal, VGG-16 | - |"),
    ("cifar-10", "resnet/label-smoothing/none", "| none | label smoothing | - |"),
    ("cifar-10", "resnet/normal/feature-squeezing/white-box", "| feature squeezing | normal | white-box |"),
    ("cifar-10", "resnet/normal/feature-squeezing/blind", "| feature squeezing | normal | blind |"),
    ("cifar-10", "resnet/normal/pixeldefend/blind", "| PixelDefend | normal | blind |"),
    ("cifar-10", "resnet/normal/pixeldefend-24/blind", "| PixelDefend, `eps=24` | normal | blind |"),
    ("cifar-10", "vgg/normal/pixeldefend/blind", "| PixelDefend | normal, VGG-16 | blind |"),
    ("cifar-10", "resnet/normal/score-purifier/blind", "| `ScorePurifier`, `sigma=0.15` | normal | blind |"),
    ("cifar-10", "resnet/adversarial-bim/none", "| none | BIM | - |"),
    ("cifar-10", f"{FGSM}/none", "| none | FGSM | - |"),
    ("cifar-10", f"{FGSM}/feature-squeezing/white-box", "| feature squeezing | FGSM | white-box |"),
    ("cifar-10", f"{FGSM}/feature-squeezing/blind", "| feature squeezing | FGSM | blind |"),
    ("cifar-10", f"{FGSM}/pixeldefend/blind", "| PixelDefend | FGSM | blind |"),
    ("cifar-10", f"{FGSM}/adaptive-pixeldefend/blind", "| Adaptive PixelDefend | FGSM | blind |"),
    ("cifar-10", f"{FGSM}/adaptive-pixeldefend-24/blind", "| Adaptive PixelDefend, `eps=24` | FGSM | blind |"),
]

EOT = "white-box-gradient-exact-eot-10-steps-20"
WHITE_BOX = [  # rows of CIFAR-10 by classifier and defence, the white-box threat, and the line's first cells
    ("resnet/normal/none", "", "| none | normal | 200 |"),
    ("vgg/normal/none", "", "| none | normal, VGG-16 | 200 |"),
    (f"{FGSM}/none", "", "| none | FGSM | 200 |"),
    ("resnet/adversarial-bim/none", "", "| none | BIM | 200 |"),
    ("resnet/normal/pixeldefend", "white-box", "| PixelDefend | normal | 200 |"),
    ("resnet/normal/pixeldefend-24", "white-box", "| PixelDefend, `eps=24` | normal | 200 |"),
    ("vgg/normal/pixeldefend", "white-box", "| PixelDefend | normal, VGG-16 | 200 |"),
    (f"{FGSM}/pixeldefend", "white-box", "| PixelDefend | FGSM | 200 |"),
    (f"{FGSM}/adaptive-pixeldefend", "white-box", "| Adaptive PixelDefend | FGSM | 200 |"),
    (f"{FGSM}/adaptive-pixeldefend-24", "white-box", "| Adaptive PixelDefend, `eps=24` | FGSM | 200 |"),
    ("resnet/normal/score-purifier", EOT, "| `ScorePurifier`, `sigma=0.15` | normal | 200 |"),
    ("resnet/normal/pixeldefend", "white-box", "| PixelDefend | normal | 100 |"),
    ("resnet/normal/art-pixeldefend", "white-box", "| ART's `PixelDefend`, this model | normal | 100 |"),
]


def section(dataset):
    """The page's text about a data set."""
    page = (RESULTS.parent / "README.md").read_text()
    return page.partition(f"\n## {SECTIONS[dataset]}\n")[2].partition("\n## ")[0]


def cells_of(line):
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def strongest_of_the_paper(dataset, name):
    """The paper's accuracies for a row under its strongest attacks."""
    row = re.sub("-delta-{}", "", name).split("/")[:3]
    return " / ".join(f"{paper_accuracies()[dataset, *row, 'strongest', eps]:.0f}" for eps in GRIDS[dataset].eps)


@pytest.mark.parametrize(("stem", "name", "start"), SHOWN)
def test_the_page_shows_the_accuracies_of_the_images(stem, name, start):
    dataset = TABLES[stem]
    line = next(line for line in section(dataset).splitlines() if start in line)
    *shown, strongest, papers, worst = cells_of(line)
    images, *shown = shown[-4:]
    assert [*shown, strongest, worst] == accuracies(stem, name, int(images.replace(",", "")))
    if papers:
        assert papers == f"*{strongest_of_the_paper(dataset, name)}*"


@pytest.mark.parametrize(("name", "threat", "start"), WHITE_BOX)
def test_the_page_shows_white_box_beside_blind_accuracies_of_the_same_images(name, threat, start):
    line = next(line for line in section("cifar-10").splitlines() if line.startswith(start))
    images = int(start.split("|")[-2])
    blind = accuracies("cifar-10", f"{name}/blind" if threat else name, images)
    seeing = accuracies("cifar-10", f"{name}/{threat}", images) if threat else blind
    assert cells_of(line)[3:] == [blind[0], blind[3], seeing[3] if threat else "", seeing[4]]
    assert blind[0] == seeing[0]


README_ROWS = [  # rows of CIFAR-10, as in WHITE_BOX
    ("resnet/adversarial-bim/none", "", "| none | ResNet, BIM |"),
    ("resnet/normal/pixeldefend", "white-box", "| PixelDefend, `eps=16` | ResNet-62 |"),
    ("vgg/normal/pixeldefend", "white-box", "| PixelDefend, `eps=16` | VGG-16 |"),
    (f"{FGSM}/adaptive-pixeldefend", "white-box", "| Adaptive PixelDefend, `eps=16` | ResNet, FGSM |"),
    ("resnet/normal/score-purifier", EOT, "| `ScorePurifier`, `sigma=0.15` | ResNet-62 |"),
]


@pytest.mark.parametrize(("name", "threat", "start"), README_ROWS)
def test_the_readme_shows_the_accuracies_of_cifar_10(name, threat, start):
    lines = (RESULTS.parents[1] / "README.md").read_text().splitlines()
    shown = cells_of(next(line for line in lines if line.startswith(start)))[2:]
    alone = accuracies("cifar-10", f"{name.rpartition('/')[0]}/none", 1000)
    blind = accuracies("cifar-10", f"{name}/blind", 1000) if threat else alone
    papers = "" if "score" in name else f" (*{strongest_of_the_paper('cifar-10', name)}*)"
    worst = accuracies("cifar-10", f"{name}/{threat}" if threat else name, 200)[4]
    ours = [alone[3], f"{blind[3]}{papers}"] if threat else [f"{alone[3]}{papers}", ""]
    assert shown == [blind[0], *ours, f"**{worst}**"]


GAPS = [  # row of CIFAR-10 and the line's first cell
    ("resnet/normal/pixeldefend", "normal ResNet, `eps=16`"),
    ("resnet/normal/pixeldefend-24", "normal ResNet, `eps=24`"),
    (f"{FGSM}/pixeldefend", "ResNet trained on FGSM, `eps=16`"),
    ("vgg/normal/pixeldefend", "VGG-16, `eps=16`"),
]


@pytest.mark.parametrize(("name", "start"), GAPS)
def test_the_page_shows_the_gap_to_the_paper_under_blind_bim(name, start):
    clean, _, bim, *_ = accuracies("cifar-10", f"{name}/blind", 1000)
    papers = [
        paper_accuracies()["cifar-10", *name.removesuffix("-24").split("/"), attack, eps]
        for attack, eps in (("clean", 2), ("bim", 2), ("bim", 8), ("bim", 16))
    ]
    gaps = [paper - float(ours) for paper, ours in zip(papers, [clean, *bim.split(" / ")], strict=True)]
    assert f"\n| {start} | {' | '.join(f'{gap:.1f}' for gap in gaps)} |\n" in section("cifar-10")


@pytest.mark.parametrize("dataset", SECTIONS)
def test_the_page_shows_the_areas_under_the_roc_curves(dataset):
    areas = [of["auroc"] for of in json.loads((RESULTS / f"{dataset}-detection.json").read_text())["eps"].values()]
    shown = [f"{attack} {' / '.join(f'{of[attack]:.3f}' for of in areas)}" for attack in areas[0]]
    assert ", ".join(shown) in " ".join((RESULTS.parent / "README.md").read_text().split())


def test_the_page_shows_the_counts_of_appendix_a():
    found = json.loads((RESULTS / "cifar-10-detection.json").read_text())["eps"]
    clean, *others = {of["appendix_a"]["above"] for of in found.values()}
    noisy = " / ".join(str(of["appendix_a"]["above_with_noise"]) for of in found.values())
    text = " ".join(section("cifar-10").split())
    assert not others and f"{clean} of 1,000 clean test images exceed 4.5 bits/dim" in text
    assert f"and {noisy} with uniform noise" in text


@pytest.mark.parametrize("dataset", SECTIONS)
def test_the_page_shows_the_accuracies_by_the_radius_of_the_defence(dataset):
    measured = json.loads((RESULTS / f"{dataset}-causes.json").read_text())["eps_defend"]
    lines = re.findall(
        r"^\| `eps=(\d+)`(?: | , density.* )\| ([\d.]+) \| (.*) \| (.*) \|$", section(dataset), re.MULTILINE
    )
    assert len(lines) > 1
    for eps, clean, *attacked in lines:
        found = measured[eps]
        assert float(clean) == pytest.approx(found["clean"], abs=0.06)
        for attack, shown in zip(("fgsm", "bim"), attacked, strict=True):
            assert shown == " / ".join(f"{found[f'{attack} {radius}']:.1f}" for radius in GRIDS[dataset].eps)


def test_the_page_counts_the_papers_accuracies_that_are_reached():
    """A clean accuracy counts once for both radii, unless its classifier differs."""
    rows = list(csv.DictReader((RESULTS / "fashion-mnist.csv").open()))
    cells = {
        (
            row["network"],
            row["training"],
            row["delta"],
            row["defence"],
            row["column"],
            row["column"] == CLEAN or row["eps"],
        ): row
        for row in rows
        if row["defence"] in ("pixeldefend", "adaptive-pixeldefend") and row["paper"] and row["column"] != "strongest"
    }
    reached = sum(float(row["difference"]) >= -3 for row in cells.values())
    assert f"\n{reached} of {len(cells)} accuracies of PixelDefend and" in (RESULTS.parent / "README.md").read_text()


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_rendered_from_the_results(name):
    grid, results = stored(name)
    text, rendered = (RESULTS / f"{name}.md").read_text(), table.markdown(grid, results)
    tables = rendered[: rendered.index("\n- Accuracy")]
    assert tables in text
    assert (RESULTS / f"{name}.csv").read_text() == table.comma_separated(grid, results)


def test_published_false_alarm_rates_are_within_the_binomial_intervals_of_their_levels():
    result = json.loads((RESULTS / "detection.json").read_text())
    found = [rate for detectors in result["false_alarms"].values() for rates in detectors.values() for rate in rates]
    assert {rate["alpha"] for rate in found} == {0.01, 0.05, 0.1} and len(result["false_alarms"]) == 2
    for rate in found:
        low, high = rate["binomial_percent"]
        assert low <= rate["rate_percent"] <= high, rate
        assert rate["splits_within_beta_binomial"] >= 0.8 * rate["splits"], rate


@pytest.mark.parametrize(
    ("row", "title", "start"),
    [
        ("vgg/normal", "vgg, normal", "VGG-16"),
        (FGSM, "resnet, adversarial-fgsm", "ResNet trained on FGSM"),
    ],
)
def test_the_page_shows_classifiers_on_images_attacked_for_themselves_and_for_the_resnet(row, title, start):
    found = json.loads((RESULTS / "cifar-10-classifiers.json").read_text())["classifiers"][title]
    attacks, radii = ("fgsm", "bim"), GRIDS["cifar-10"].eps
    shown = {
        "attacks on itself": accuracies("cifar-10", f"{row}/pixeldefend/blind", 1000)[1:3],
        "attacks on the ResNet": [" / ".join(f"{found[f'{name} {eps}']:.1f}" for eps in radii) for name in attacks],
    }
    paper = paper_accuracies()
    keys = [[("cifar-10", *row.split("/"), "pixeldefend", name, eps) for eps in radii] for name in attacks]
    shown["*the paper*"] = [f"*{' / '.join(f'{paper[key]:.0f}' for key in of)}*" for of in keys]
    for kind, cells in shown.items():
        assert f"\n| {start}, {kind} | {' | '.join(cells)} |\n" in section("cifar-10")


@pytest.mark.parametrize("way", ["greedy decoding", "gradient ascent"])
def test_the_page_shows_greedy_decoding_beside_gradient_ascent(way):
    found = json.loads((RESULTS / "cifar-10-ascent.json").read_text())["ascent"]
    clean, *attacked = (of[way] for of in found.values())
    cells = [f"{clean['accuracy_percent']:.1f}", " / ".join(f"{of['accuracy_percent']:.1f}" for of in attacked)]
    cells += [f"{clean['bits_per_dim']:.2f}", " / ".join(f"{of['bits_per_dim']:.2f}" for of in attacked)]
    assert list(found) == ["clean", "bim 2", "bim 8", "bim 16"]
    assert f"\n| {way} | {' | '.join(cells)} |\n" in section("cifar-10")
