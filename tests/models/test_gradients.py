import copy

import pytest
import torch

from art_pixeldefend.models.gradients import Captured, Eager, gradients_of

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def all_gradients(gradients, model, batch):
    loss = gradients(batch)
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_gradients_are_those_of_the_loss(make_model, make_levels):
    model = make_model((1, 6, 5), dropout=0.0).train()
    batch = torch.from_numpy(make_levels(3, model.image_shape))
    loss, found = all_gradients(gradients_of(model.loss, model, model.device), model, batch)
    expected = torch.autograd.grad(model.loss(batch), list(model.parameters()))
    assert loss == model.loss(batch)
    assert torch.equal(found, torch.cat([gradient.flatten() for gradient in expected]))


@gpu
def test_a_captured_step_has_the_loss_and_gradients_of_an_eager_one_for_batch_after_batch(make_model, make_levels):
    models = [make_model((1, 9, 8), dropout=0.0).cuda().to(memory_format=torch.channels_last).train()]
    models.append(copy.deepcopy(models[0]))
    ways = [Captured(models[0].loss, models[0]), Eager(models[1].loss)]
    for seed in range(3):
        batch = torch.from_numpy(make_levels(4, (1, 9, 8), seed)).cuda()
        (loss, gradients), (other_loss, others) = (
            all_gradients(way, model, batch) for way, model in zip(ways, models, strict=True)
        )
        assert torch.allclose(loss, other_loss, rtol=1e-5)
        assert torch.allclose(gradients, others, rtol=1e-3, atol=1e-5 * others.abs().max().item())
        for model in models:
            model.zero_grad()


@gpu
def test_a_captured_steps_dropout_is_the_generators(make_model, make_levels):
    model = make_model((1, 9, 8), dropout=0.5).cuda().to(memory_format=torch.channels_last).train()
    gradients, batch = Captured(model.loss, model), torch.from_numpy(make_levels(4, (1, 9, 8))).cuda()
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(gradients(batch).item())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
