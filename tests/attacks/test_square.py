import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from art_pixeldefend.attacks import Square
from art_pixeldefend.purifiers.base import Purifier

SHAPE = (2, 6, 6)


class AddNoise(Purifier):
    stochastic = True

    def purify(self, x, generator):
        return (x + 0.5 * generator.normal(x.shape[1:])).clamp(0, 1)


def classifier(purifiers=(), clip_values=(0.0, 1.0)):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 4))
    return PyTorchClassifier(
        net, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=clip_values, device_type="cpu",
        preprocessing_defences=list(purifiers) or None,
    )  # fmt: skip


def images(count=10, clip_values=(0.0, 1.0), seed=1):
    low, high = clip_values
    return (np.random.default_rng(seed).random((count, *SHAPE)) * (high - low) + low).astype(np.float32)


def labels(estimator, x):
    return estimator.predict(x).argmax(1)


@settings(max_examples=15, deadline=None)
@given(
    eps=st.floats(0, 0.4), clip_values=st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]),
    area=st.floats(0, 1), seed=st.integers(0, 50),
)  # fmt: skip
def test_images_stay_in_the_ball_and_in_the_range(eps, clip_values, area, seed):
    low, high = clip_values
    x = images(4, clip_values, seed)
    radius = eps * (high - low)
    attacked = Square(classifier((), clip_values), eps=radius, steps=30, area=area, seed=seed).generate(x)
    assert np.abs(attacked - x).max() <= radius + 1e-5 * (high - low)
    assert attacked.min() >= low and attacked.max() <= high


def test_it_fools_without_gradients_and_facts_agree_with_predictions():
    estimator, x = classifier(), images(30)
    y = labels(estimator, x)
    attack = Square(estimator, eps=0.15, steps=200, seed=0)
    attacked = attack.generate(x, y)
    fooled = labels(estimator, attacked) != y
    assert fooled.mean() > 0.5
    assert np.array_equal(fooled, attack.success) and np.array_equal(fooled, attack.fallen_at >= 0)
    steps = np.where(fooled, attack.fallen_at, 200)
    assert np.array_equal(attack.queries, 1 + steps + 1)


def test_more_steps_are_not_weaker():
    estimator, x = classifier(), images(30)
    y = labels(estimator, x)
    rates = []
    for steps in (1, 20, 300):
        attack = Square(estimator, eps=0.1, steps=steps, seed=0)
        attack.generate(x, y)
        rates.append(attack.success.mean())
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("purifiers", [(), (AddNoise(),), (AddNoise(seed=1),)])
def test_the_same_seed_gives_the_same_images_for_every_batch_size(purifiers):
    estimator, x = classifier(purifiers), images(6)
    y = labels(classifier(), x)
    results = [
        Square(estimator, eps=0.1, steps=20, draws=3, seed=2, batch_size=size).generate(x, y) for size in (1, 4, 50)
    ]
    assert all(np.allclose(other, results[0], atol=1e-6) for other in results[1:])


def test_it_does_not_take_a_lucky_draw_for_success():
    """Within the 400 steps, nearly every image is misclassified by some draw of a defence with this much noise."""
    estimator, x = classifier([AddNoise()]), images(20)
    y = labels(classifier(), x)
    attack = Square(estimator, eps=0.3, steps=400, draws=10, seed=0)
    attacked = attack.generate(x, y)
    fresh = np.mean([labels(estimator, attacked) != y for _ in range(100)], 0)
    fallen = attack.fallen_at >= 0
    assert fallen.any() and fresh[fallen].min() > 0.6
    assert attack.success_rate.mean() == pytest.approx(fresh.mean(), abs=0.06)


@pytest.mark.parametrize(
    "arguments",
    [{"eps": -1}, {"steps": 0}, {"draws": 0}, {"area": 2}, {"seed": -1}, {"batch_size": 0}, {"verbose": 1}],
    ids=str,
)
def test_errors_name_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Square(classifier(), **arguments)
