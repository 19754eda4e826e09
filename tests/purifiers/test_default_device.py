"""Torch's default device, which a caller has set for other code, changes no purified image and no sample."""

import pytest
import torch

from art_pixeldefend import AdaptivePixelDefend, PixelDefend
from art_pixeldefend.models.generator import VAE
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.purifiers import DeepImagePrior, ScorePurifier

SHAPE = (1, 8, 8)
CALLS = {
    "PixelDefend": lambda cnn, x: PixelDefend((0, 1), 16, cnn)(x)[0],
    "AdaptivePixelDefend": lambda cnn, x: AdaptivePixelDefend((0, 1), 16, cnn, threshold=1.0)(x)[0],
    "ScorePurifier": lambda _, x: ScorePurifier("digits-score")(x)[0],
    "DeepImagePrior": lambda _, x: DeepImagePrior(steps=2)(x)[0],
    "samples of a score model": lambda *_: ScoreModel.from_pretrained("digits-score").sample(1),
    "samples of a generator": lambda *_: VAE.from_pretrained("fashion-mnist-vae").sample(1),
}


@pytest.mark.filterwarnings("ignore:the density model gives", "ignore:.*fit")
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_default_device(name, make_model):
    cnn, x = make_model(SHAPE), torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = CALLS[name](cnn, x)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(CALLS[name](cnn, x), expected)
