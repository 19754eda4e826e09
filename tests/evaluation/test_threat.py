import pytest

from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.threat import BLIND, WHITE_BOX, Threat


def test_the_two_named_threats_keep_the_keys_that_results_are_stored_under():
    assert (BLIND.key, WHITE_BOX.key) == ("blind", "white-box") == (BLIND.name, WHITE_BOX.name)


def test_other_threats_have_keys_and_names_of_their_own():
    threats = [
        Threat("scores"), Threat("everything", "exact"), Threat("everything", "exact", eot=4),
        Threat("everything", "identity", loss="margin"), Threat("everything", seeds_known=True),
        Threat("everything", detector=True), BLIND, WHITE_BOX,
    ]  # fmt: skip
    assert len({str(threat.key) for threat in threats}) == len({t.name for t in threats}) == len(threats)


@pytest.mark.parametrize("threat", [BLIND, WHITE_BOX])
def test_a_threat_may_be_given_by_its_name(threat):
    assert Threat.of(threat.name) == threat == Threat.of(threat)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"sees": "nothing"}, "sees"), ({"gradient": "wrong"}, "gradient"), ({"eot": 0}, "eot"), ({"steps": 0}, "steps")],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Threat(**arguments)


@pytest.mark.parametrize("use", [Threat.of, lambda threat: Row(threat=threat)])
def test_an_unknown_name_is_answered_with_those_that_exist(use):
    with pytest.raises(ValueError, match="threat must be a Threat or one of blind, white-box"):
        use("grey-box")
