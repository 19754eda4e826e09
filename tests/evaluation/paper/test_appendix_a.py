import numpy as np
import pytest

from art_pixeldefend.evaluation.paper.appendix_a import appendix_a


def test_appendix_a_counts_as_the_paper_does():
    clean, noisy = np.linspace(2, 6, 10_000), np.full(10_000, 4.6)
    noisy[:126] = 4.4
    clean[:] = 3
    clean[:175] = 5
    found = appendix_a("cifar-10", clean, noisy, 0.08, 0.127)
    assert (found["above"], found["above_with_noise"], found["threshold_bits_per_dim"]) == (175, 9874, 4.5)
    # The two accuracies of Appendix A.
    assert found["accuracy_at_random_above_percent"] == pytest.approx(90.6, abs=0.05)
    assert found["accuracy_at_random_above_with_noise_percent"] == pytest.approx(11.0, abs=0.05)


def test_where_the_paper_has_no_threshold_as_many_clean_images_lie_above_it():
    clean = np.random.default_rng(0).normal(3, 0.5, 10_000)
    found = appendix_a("fashion-mnist", clean, clean + 2, 0.1, 0.1)
    assert found["above"] == 175 and found["above_with_noise"] > 9_000
