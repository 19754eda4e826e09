import numpy as np
import pytest
import torch
from art.defences.preprocessor import SpatialSmoothing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import PurifiedModel, ScorePurifier
from art_pixeldefend.attacks.through import Evaluator, backward_pass, labels_of, purifiers_of
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers.base import Purifier

SHAPE = (1, 8, 8)


class Round(Purifier):
    def purify(self, x, generator):
        return (x * 4).round() / 4


@pytest.fixture(scope="module")
def score_model():
    return ScoreModel.from_pretrained("digits-score").double()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def classifier(net, *purifiers, clip_values=(0.0, 1.0)):
    return PyTorchClassifier(
        net, nn.CrossEntropyLoss(), SHAPE, 4, clip_values=clip_values, device_type="cpu",
        preprocessing_defences=list(purifiers) or None,
    )  # fmt: skip


def points(count=3):
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_through_a_random_purifier_equal_finite_differences_with_the_noise_replayed(score_model, steps):
    purifier = ScorePurifier(score_model, sigma=0.2, steps=steps)
    evaluator = Evaluator(classifier(network(), purifier), torch.tensor([0, 1, 2]), seed=3, batch_size=4)
    x, index, draws = points(), torch.arange(3), 2
    found = evaluator(x, index, draws, (0, 1), gradient=True)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    ahead, behind = (evaluator(x + sign * step * direction, index, draws, (0, 1)).loss for sign in (1, -1))
    slopes = (found.gradient * direction).flatten(1).sum(1)
    assert torch.allclose(slopes, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7)


def test_the_same_place_replays_the_forward_pass_bit_for_bit_and_others_do_not(score_model):
    purifier = ScorePurifier(score_model, sigma=0.2)
    evaluator = Evaluator(classifier(network(), purifier), torch.tensor([0, 1, 2]), seed=3, batch_size=100)
    x, index = points(), torch.arange(3)
    first = evaluator(x, index, 2, (4,))
    assert torch.equal(evaluator(x, index, 2, (4,)).logits, first.logits)
    assert torch.equal(evaluator(x, index, 2, (4,), gradient=True).logits, first.logits)
    assert not torch.equal(evaluator(x, index, 2, (5,)).logits, first.logits)
    moved = evaluator(x[[2, 0]], index[[2, 0]], 2, (4,))
    assert torch.allclose(moved.logits, first.logits[[2, 0]], atol=1e-9)
    assert evaluator.queries.tolist() == [10, 8, 10]


def test_purifiers_are_found_in_front_of_and_inside_a_model(score_model):
    outside, inside = Round(), ScorePurifier(score_model)
    net = nn.Sequential(PurifiedModel(network(), inside), nn.Identity())
    assert purifiers_of(classifier(net, outside, SpatialSmoothing(channels_first=True))) == [outside, inside]
    assert purifiers_of(classifier(network(), Round(apply_predict=False))) == []


def test_the_backward_pass_is_restored_also_after_an_error(score_model):
    first, second = ScorePurifier(score_model), Round()
    both = [first, second]
    with pytest.raises(ValueError, match="gradient must be 'identity' for Round"), backward_pass(both, "exact"):
        raise AssertionError
    assert (first.gradient, second.gradient) == ("exact", "identity")
    with backward_pass([first, second], "identity"):
        assert first.gradient == "identity"
    assert first.gradient == "exact"
    with pytest.raises(ValueError, match="gradient must be a name"), backward_pass([first, second], torch.sin):
        raise AssertionError


def test_labels_are_numbers_or_one_hot():
    estimator = classifier(network())
    x = points().numpy()
    predicted = estimator.predict(x).argmax(1)
    for y in (None, predicted, np.eye(4)[predicted]):
        assert labels_of(estimator, x, y, 2).tolist() == predicted.tolist()
