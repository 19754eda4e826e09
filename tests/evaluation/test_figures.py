import numpy as np
import pytest
from PIL import Image

from art_pixeldefend.evaluation import figures
from art_pixeldefend.pictures import tiled

RNG = np.random.default_rng(0)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as matplotlib has them."""
    made, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: made.append(figure) or save(figure, path))
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_show_the_images_with_right_labels_green_and_wrong_ones_red(tmp_path, drawn, channels):
    strips = {name: RNG.integers(0, 256, (3, channels, 8, 8)).astype(np.uint8) for name in ("attacked", "purified")}
    labels = {"attacked": ["3", "4", "5"], "purified": ["1", "2", "5"]}
    figures.image_strips(tmp_path / "strips.png", strips, labels, truth=["1", "2", "7"])
    axes = drawn[0].axes
    shown = [np.atleast_3d(ax.images[0].get_array()).transpose(2, 0, 1) for ax in axes]
    np.testing.assert_array_equal(shown, np.concatenate([strips["attacked"], strips["purified"]]))
    assert [ax.get_ylabel() for ax in axes] == ["attacked", "", "", "purified", "", ""]
    right, wrong = figures.RIGHT, figures.WRONG
    assert [(ax.xaxis.label.get_text(), ax.xaxis.label.get_color()) for ax in axes] == [
        ("3", wrong), ("4", wrong), ("5", wrong), ("1", right), ("2", right), ("5", wrong)
    ]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_sheets_show_all_their_images_under_their_names(tmp_path, drawn, channels):
    sheets = {name: RNG.integers(0, 256, (n, channels, 8, 8)).astype(np.uint8) for name, n in (("a", 13), ("b", 4))}
    figures.sample_sheets(tmp_path / "sheets.png", sheets, columns=5)
    for ax, (name, images) in zip(drawn[0].axes, sheets.items(), strict=True):
        assert ax.get_title() == name
        shown = np.atleast_3d(ax.images[0].get_array()).transpose(2, 0, 1)
        np.testing.assert_array_equal(shown, tiled(images, 5))


def test_strips_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same number"):
        figures.image_strips(tmp_path / "a.png", {"a": np.zeros((2, 1, 4, 4)), "b": np.zeros((3, 1, 4, 4))})
    assert not list(tmp_path.iterdir())


def test_histograms_are_densities_with_outlines_where_images_were_purified(tmp_path, drawn):
    before = {name: RNG.random(50) ** power for name, power in (("clean", 1), ("fgsm", 5), ("bim", 3), ("cw", 2))}
    purified = RNG.random(50)
    figures.p_value_histograms(tmp_path / "p.png", before, {"fgsm": purified}, bins=5)
    assert [ax.get_title() for ax in drawn[0].axes] == list(before)
    for ax, (name, values) in zip(drawn[0].axes, before.items(), strict=True):
        heights = [bar.get_height() for bar in ax.patches[:5]]
        np.testing.assert_allclose(heights, np.histogram(values, 5, (0, 1))[0] / 50 * 5)
        assert len(ax.patches) == (6 if name == "fgsm" else 5)  # an outline is one patch
    outline = drawn[0].axes[1].patches[5].get_xy()
    assert outline[:, 1].max() == pytest.approx(np.histogram(purified, 5, (0, 1))[0].max() / 50 * 5)


def test_histograms_share_one_scale_and_one_legend(tmp_path, drawn):
    values = {"clean": RNG.random(200), "bim": RNG.random(200) ** 9}
    figures.p_value_histograms(tmp_path / "p.png", values, values, bins=10, columns=1)
    limits = [ax.get_ylim() for ax in drawn[0].axes]
    assert limits[0] == limits[1] and limits[0][1] > max(bar.get_height() for bar in drawn[0].axes[1].patches[:10])
    assert len(drawn[0].legends) == 1 and not any(ax.get_legend() for ax in drawn[0].axes)


def test_equal_roc_curves_are_all_visible_and_no_legend_covers_them(tmp_path, drawn):
    clean, attacked = RNG.random(50), RNG.random(50) / 2
    figures.roc_curves(tmp_path / "roc.png", clean, dict.fromkeys(("rand", "fgsm", "bim"), attacked))
    ax = drawn[0].axes[0]
    widths = [line.get_linewidth() for line in ax.lines[:3]]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3  # each is seen beside the next
    drawn[0].draw_without_rendering()
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0


def test_a_path_without_ending_gives_png_and_pdf(tmp_path, drawn):
    figures.likelihood_densities(tmp_path / "densities", {"clean": RNG.normal(3, 0.3, 40)})
    with Image.open(tmp_path / "densities.png") as image:
        assert image.size == tuple((drawn[0].get_size_inches() * 150).astype(int))
        assert image.convert("L").getextrema()[0] < 50
    assert (tmp_path / "densities.pdf").read_bytes().startswith(b"%PDF")
    assert {file.name for file in tmp_path.iterdir()} == {"densities.png", "densities.pdf"}


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [2.0, 2.1, 2.05, np.inf]])
def test_densities_peak_at_their_values_also_if_these_are_few_or_equal(tmp_path, drawn, values):
    figures.likelihood_densities(
        tmp_path / "d.png", {"clean": RNG.normal(3, 0.3, 40), "odd": np.array(values)}, {"odd": 0.25}
    )
    clean, odd = drawn[0].axes[0].lines
    for line, peak in ((clean, 3), (odd, 2)):
        x, density = line.get_data()
        assert x[density.argmax()] == pytest.approx(peak, abs=0.2)
        assert np.trapezoid(density, x) == pytest.approx(1, abs=0.05)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["clean", "odd: 25% error"]


def test_the_area_under_the_curve_counts_pairs():
    negatives, positives = RNG.integers(0, 9, 40), RNG.integers(0, 7, 30)
    pairs = (positives[:, None] < negatives) + 0.5 * (positives[:, None] == negatives)
    assert figures.auroc(negatives, positives) == pytest.approx(pairs.mean())


def test_the_area_without_images_of_one_kind_is_nan():
    assert np.isnan(figures.auroc(np.array([]), np.array([1.0])))


def test_roc_curves_pass_through_the_rates_at_each_threshold_and_return_their_areas(tmp_path, drawn):
    negatives, attacked = np.arange(10.0), {"fgsm": -np.arange(1.0, 5), "rand": np.array([0.5, 4.5, 20])}
    areas = figures.roc_curves(tmp_path / "roc.png", negatives, attacked, {"fgsm": np.array([20.0, 30.0])})
    before, after = drawn[0].axes
    assert areas == {"fgsm": 1.0, "rand": figures.auroc(negatives, attacked["rand"])}
    x, y = before.lines[1].get_data()
    for threshold in (-1, 0.7, 5.2, 99):
        rates = (negatives <= threshold).mean(), (attacked["rand"] <= threshold).mean()
        assert np.interp(rates[0], x, y) == pytest.approx(rates[1]) or rates in zip(x, y, strict=True)
    assert [text.get_text() for text in before.get_legend().get_texts()] == ["fgsm (1.00)", "rand (0.47)"]
    assert [text.get_text() for text in after.get_legend().get_texts()] == ["fgsm (0.00)"]
    assert "area < 0.5: likelier than clean" in after.get_title()
