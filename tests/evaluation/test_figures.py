import numpy as np
import pytest
from PIL import Image

from art_pixeldefend.evaluation import figures

RNG = np.random.default_rng(0)


def drawn(path):
    """The picture's pixels; a figure that is blank has one colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_show_right_labels_green_and_wrong_ones_red(tmp_path, channels):
    strips = {name: RNG.integers(0, 256, (3, channels, 8, 8)).astype(np.uint8) for name in ("attacked", "purified")}
    labels = {"attacked": ["3", "4", "5"], "purified": ["1", "2", "5"]}
    figures.image_strips(tmp_path / "strips.png", strips, labels, truth=["1", "2", "7"])
    pixels = drawn(tmp_path / "strips.png").astype(int)
    for colour in ((0x1A, 0x7F, 0x37), (0xC6, 0x28, 0x28)):
        assert (np.abs(pixels - colour).sum(-1) < 30).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_sheets_of_any_number_of_images_are_drawn(tmp_path, channels):
    sheets = {name: RNG.integers(0, 256, (n, channels, 8, 8)).astype(np.uint8) for name, n in (("a", 13), ("b", 4))}
    figures.sample_sheets(tmp_path / "sheets.png", sheets, columns=5)
    drawn(tmp_path / "sheets.png")


def test_strips_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same number"):
        figures.image_strips(tmp_path / "a.png", {"a": np.zeros((2, 1, 4, 4)), "b": np.zeros((3, 1, 4, 4))})


def test_histograms_are_drawn_where_only_some_kinds_were_purified(tmp_path):
    before = {name: RNG.random(50) ** power for name, power in (("clean", 1), ("fgsm", 5), ("bim", 3), ("cw", 2))}
    figures.p_value_histograms(tmp_path / "p.png", before, {"fgsm": RNG.random(50)})
    drawn(tmp_path / "p.png")


def test_a_path_without_ending_gives_png_and_pdf(tmp_path):
    figures.likelihood_densities(
        tmp_path / "densities", {"clean": RNG.normal(3, 0.3, 40), "fgsm": RNG.normal(5, 0.3, 40)}
    )
    drawn(tmp_path / "densities.png")
    assert (tmp_path / "densities.pdf").read_bytes().startswith(b"%PDF")
    assert {file.name for file in tmp_path.iterdir()} == {"densities.png", "densities.pdf"}


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [2.0, 3.0, np.inf]])
def test_densities_of_few_or_equal_values_are_drawn(tmp_path, values):
    figures.likelihood_densities(
        tmp_path / "d.png", {"clean": RNG.normal(3, 0.3, 40), "odd": np.array(values)}, {"odd": 1}
    )
    drawn(tmp_path / "d.png")


def test_the_area_under_the_curve_counts_pairs():
    negatives, positives = RNG.integers(0, 9, 40), RNG.integers(0, 7, 30)
    pairs = (positives[:, None] < negatives) + 0.5 * (positives[:, None] == negatives)
    assert figures.auroc(negatives, positives) == pytest.approx(pairs.mean())


def test_the_area_without_images_of_one_kind_is_nan():
    assert np.isnan(figures.auroc(np.array([]), np.array([1.0])))


def test_roc_curves_return_their_areas(tmp_path):
    areas = figures.roc_curves(
        tmp_path / "roc.png",
        np.arange(10.0),
        {"fgsm": -np.arange(1.0, 5), "rand": np.arange(10.0)},
        {"fgsm": np.ones(3)},
    )
    assert areas == {"fgsm": 1.0, "rand": 0.5}
    drawn(tmp_path / "roc.png")
