import numpy as np
import pytest

from art_pixeldefend.detectors import ConformalDetector, Score
from art_pixeldefend.detectors.false_alarms import false_alarms


class Mean(Score):
    def score(self, x, generator):
        return x.mean((1, 2, 3))


def fitted(values, **options):
    detector = ConformalDetector(Mean(), **options)
    detector.fit(np.asarray(values, np.float32).reshape(-1, 1, 1, 1))
    return detector


@pytest.mark.parametrize("options", [{}, {"two_sided": True}, {"ties": "conservative"}])
def test_rates_of_exchangeable_images_are_the_levels(options):
    detector = fitted(np.random.default_rng(0).random(1001), **options)
    before = detector.calibration_scores.copy()
    found = false_alarms(detector, splits=30)
    assert [each.alpha for each in found] == [0.01, 0.05, 0.1]
    for each in found:
        assert each.tested == 501 and each.counts.shape == (30,)
        assert each.interval[0] / 501 <= each.rate <= each.interval[1] / 501 and each.inside >= 0.8
        assert each.split_interval[1] > each.interval[1]
    np.testing.assert_array_equal(detector.calibration_scores, before)
    np.testing.assert_array_equal(false_alarms(detector, [0.05], 30)[0].counts, found[1].counts)


def test_levels_that_half_of_the_images_cannot_reach_are_left_out():
    assert [each.alpha for each in false_alarms(fitted(np.linspace(0, 1, 60)))] == [0.05, 0.1]
    assert false_alarms(fitted(np.linspace(0, 1, 19)), [0.01, 0.05]) == []
    with pytest.raises(ValueError, match="must be fitted"):
        false_alarms(ConformalDetector(Mean()))
