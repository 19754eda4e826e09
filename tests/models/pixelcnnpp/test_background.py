import pytest
import torch

from art_pixeldefend.models.pixelcnnpp.background import BackgroundLoss


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_as_many_sub_pixels_as_asked_take_any_level(rate):
    torch.manual_seed(0)
    levels = torch.full((50, 3, 16, 16), 200, dtype=torch.uint8)
    mutated = BackgroundLoss(rate).mutate(levels)
    changed = mutated[mutated != levels]
    assert mutated.dtype == torch.uint8 and len(changed) / levels.numel() == pytest.approx(rate * 255 / 256, abs=0.01)
    if rate:
        assert changed.min() == 0 and changed.max() == 255 and changed.float().mean() == pytest.approx(127.3, abs=3)


def test_the_loss_is_that_of_the_changed_images(make_model, make_levels):
    model, levels = make_model((1, 4, 4)), torch.from_numpy(make_levels(8, (1, 4, 4)))
    assert BackgroundLoss(0.0)(model, levels) == model.loss(levels)
    torch.manual_seed(0)
    found = BackgroundLoss(0.5)(model, levels)
    torch.manual_seed(0)
    assert found == model.loss(BackgroundLoss(0.5).mutate(levels))
    found.backward()
    for bad in (-0.1, 1.0, "much"):
        with pytest.raises(ValueError, match=r"^rate must"):
            BackgroundLoss(bad)
