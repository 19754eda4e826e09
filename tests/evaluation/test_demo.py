"""The demo's report is one file that shows pictures, tables and explanations, and agrees with its results."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from torch import nn

from art_pixeldefend import datasets
from art_pixeldefend.classifiers.training import seeded
from art_pixeldefend.evaluation import demo, page

VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page's elements, its text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on few digits with an untrained classifier: its folder and the printed table."""
    out = tmp_path_factory.mktemp("demo")
    small = replace(
        demo.SETTINGS["digits"], attacks=("rand", "bim"), images=12, white_box_images=2, validation=10, runs=2
    )
    with pytest.MonkeyPatch.context() as patch, seeded(0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        patch.setitem(demo.SETTINGS, "digits", small)
        patch.setattr(demo, "make_classifier", lambda data, seed: network)
        printed = demo.run(out, "digits", verbose=False)
    return out, printed


@pytest.fixture(scope="module")
def report(made):
    return Page((made[0] / "report.html").read_text())


def test_the_report_needs_no_other_file(made, report):
    assert {path.name for path in made[0].iterdir()} == {"report.html", "results.json"}
    assert not report.open and not {"script", "link", "iframe"} & {tag for tag, _ in report.elements}
    pictures = [attributes for tag, attributes in report.elements if tag == "img"]
    assert len(pictures) == 5 * demo.SHOWN + 3
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)


def test_pictures_come_first_then_tables_then_detection(report):
    headings = ["Pictures", "Accuracy under attack", "Detection", "Numbers"]
    places = [report.text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)


@pytest.mark.parametrize("word", ["RAND adds", "BIM takes", "Bits/dim” are", "AUROC is", "95% intervals", "On clean"])
def test_the_report_explains_its_words_and_names_the_cost(report, word):
    assert word in report.text


def test_every_number_of_the_tables_is_in_the_results(made, report):
    results = json.loads((made[0] / "results.json").read_text())
    for defence, row in results["accuracy"].items():
        assert list(row) == ["clean", "rand", "bim", "blind", "white-box"]
        assert (row["white-box"] is None) == (defence == "none") and (2 * row["blind"]).is_integer()  # of two images
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in row.values()]
        assert f"{defence}{''.join(cells)}" in report.text
        assert f"| {defence} | {' | '.join(cells)} |" in made[1]
    assert results["accuracy"]["none"]["bim"] <= results["accuracy"]["none"]["clean"]
    assert set(results["accuracy"]) >= {"none", "PixelDefend", "Adaptive PixelDefend", "score purifier"}


def test_wide_tables_scroll_by_themselves(report):
    places = [i for i, (tag, _) in enumerate(report.elements) if tag == "table"]
    assert len(places) == 2 and all(report.elements[i - 1] == ("div", {"class": "table"}) for i in places)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name must be one of fashion-mnist, digits, got 'mnist'"):
        demo.run(tmp_path, "mnist")
    assert not list(tmp_path.iterdir())


def test_text_is_escaped_and_code_is_marked(tmp_path):
    page.write_page(tmp_path / "page.html", "a < b", [page.paragraph("x & `y<z`"), page.table(["<"], [["&"]])])
    text = (tmp_path / "page.html").read_text()
    assert "<title>a &lt; b</title>" in text and "<p>x &amp; <code>y&lt;z</code></p>" in text
    assert re.search("<th>&lt;</th>.*<td>&amp;</td>", text)


def test_differences_are_magnified_around_grey():
    a, b = (np.full((1, 2, 2), level, np.uint8) for level in (103, 100))
    assert (demo._difference(a, b) == 128 + 3 * demo.MAGNIFIED).all()
    assert (demo._difference(b * 0, b) == 0).all()


def test_the_default_setting_needs_no_download():
    data = datasets.load(demo.SETTINGS["fashion-mnist"].data, "/nonexistent", download=False)
    assert len(data.x_test) - data.reserved >= demo.SETTINGS["fashion-mnist"].images
