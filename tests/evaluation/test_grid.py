from dataclasses import replace

import pytest

from art_pixeldefend.evaluation.grid import CLEAN, Cell, Row
from art_pixeldefend.evaluation.paper.grids import GRIDS
from art_pixeldefend.evaluation.threat import Threat


def test_a_grid_is_cut_down_by_rows_attacks_and_images():
    grid = GRIDS["fashion-mnist"].only(rows="pixeldefend/white-box, vgg", attacks=("cw", "fgsm"), limit=7)
    assert all("pixeldefend/white-box" in row.name or "vgg" in row.name for row in grid.rows)
    white_box = next(row for row in grid.rows if row.name.endswith("white-box"))
    assert grid.attacks_of(white_box) == ("fgsm",)  # this row never runs CW
    assert grid.images_of(white_box) == 7


def test_rows_are_left_out_by_words_with_an_exclamation_mark():
    grid = GRIDS["fashion-mnist"]
    left = grid.only(rows="!adversarial-bim-delta-25").rows
    assert set(grid.rows) - set(left) == {Row("resnet", "adversarial-bim", delta=25, eps=(25,))}
    assert all("vgg" in row.name and "white-box" not in row.name for row in grid.only(rows="vgg,!white-box").rows)


@pytest.mark.parametrize(
    ("earlier", "current"),
    [
        ("resnet/normal/none/bare", "resnet/normal/none"),
        ("adversarial-bim-delta-25/none/bare", "adversarial-bim-delta-25/none"),
        ("pixeldefend/bare,vgg/normal/pixeldefend/through", "pixeldefend/blind,vgg/normal/pixeldefend/white-box"),
    ],
)
def test_names_in_published_commands_still_select_their_rows(earlier, current):
    grid = GRIDS["fashion-mnist"]
    assert grid.only(rows=earlier).rows == grid.only(rows=current).rows


@pytest.mark.parametrize("options", [{"rows": "nothing"}, {"attacks": ("nothing",)}, {"limit": 0}])
def test_what_is_not_in_a_grid_is_refused(options, tiny):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny.only(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": (256,)}, "eps"), ({"attacks": ("no",)}, "attacks"), ({"rows": (Row("no"),)}, "network"),
        ({"rows": (Row(training="no"),)}, "training"), ({"rows": (Row(defence="no"),)}, "defence"),
        ({"rows": (Row(eps=(9,)),)}, "eps"),
        ({"rows": (Row(delta=8),)}, "delta"), ({"rows": (Row(training="adversarial-fgsm", delta=0),)}, "delta"),
        ({"rows": (Row(),), "defences": {"d": (("some.Class", {"model": "{no}"}),)}}, "defence 'd' .*, got '{no}'"),
        ({"chunk": 0}, "chunk"), ({"recipe": "no"}, "recipe"), ({"reference": "test"}, "reference"),
        ({"rows": (Row("vgg"), Row("vgg", steps=9))}, "vgg/normal/none"),
        ({"rows": (Row("vgg"), Row("vgg", eps=(40,), images=9))}, "within 40"),
        ({"rows": (Row("vgg", attacks=("fgsm",)), Row("vgg", attacks=("rand",)))}, "vgg/normal/none"),
        ({"rows": (Row(training="adversarial-fgsm"), Row(training="adversarial-fgsm", delta=8))}, "delta-8"),
    ],
)  # fmt: skip
def test_a_grid_that_means_nothing_is_refused(change, message, tiny):
    with pytest.raises(ValueError, match=message):
        replace(tiny, **change)


def test_cells_name_themselves():
    assert Cell(Row(), "bim", 8).name == "resnet/normal/none bim 8"
    assert Cell(Row(), CLEAN, 0).name == "resnet/normal/none clean"
    assert Row("resnet", "adversarial-fgsm", delta=25).name == "resnet/adversarial-fgsm-delta-25/none"


@pytest.mark.parametrize(
    ("threat", "attack", "error"),
    [
        (Threat("everything", steps=5), "bim", "steps for bim"),
        (Threat("everything", "surrogate"), "apgd", "surrogate"),
        (Threat("everything", "latent"), "apgd", "latent"),
        (Threat("everything", detector=True), "apgd", "detector"),
    ],
)
def test_a_threat_that_an_attack_cannot_carry_out_is_refused(tiny, threat, attack, error):
    with pytest.raises(ValueError, match=error):
        replace(tiny, rows=(Row("vgg", "normal", "feature-squeezing", threat, attacks=(attack,)),))


def test_rows_of_named_threats_have_the_names_and_keys_that_results_are_stored_under(tiny):
    row = Row("vgg", "normal", "feature-squeezing", "white-box")
    assert row == Row("vgg", "normal", "feature-squeezing", Threat("everything"))
    assert row.name == "vgg/normal/feature-squeezing/white-box" and row.threat.key == "white-box"
