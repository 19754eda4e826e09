import pytest
import torch

from art_pixeldefend.models.pixelcnnpp.decoders import certify, greedy_decode


@pytest.fixture
def model(make_model):
    return make_model((1, 6, 6))


@pytest.fixture
def x(model, make_levels):
    return torch.from_numpy(make_levels(20, model.image_shape))  # more than one pass


def test_the_greedy_solution_is_certified(model, x):
    certificate = certify(model, x, greedy_decode(model, x, 16), 16)
    assert certificate.exact.tolist() == [True] * len(x)
    assert (certificate.gap < 1e-4).all()


def test_one_wrong_level_is_found_in_its_image_only(model, x):
    purified = greedy_decode(model, x, 16)
    purified[3, 0, 5, 5] = torch.where(purified[3, 0, 5, 5] == x[3, 0, 5, 5], x[3, 0, 5, 5] ^ 8, x[3, 0, 5, 5])
    certificate = certify(model, x, purified, 16)
    assert (~certificate.exact).nonzero().flatten().tolist() == [3]
    assert certificate.gap[3] > 1e-4


def test_a_level_outside_the_range_is_never_exact(model, x):
    purified = greedy_decode(model, x, 255)
    moved = ((purified.int() - x.int()).abs() > 2).flatten(1).any(dim=1)
    assert moved.any()
    certificate = certify(model, x, purified, 2)
    assert not certificate.exact[moved].any()
    assert torch.isinf(certificate.gap[moved]).all()


def test_levels_as_likely_as_the_best_are_forgiven_and_counted(model):
    with torch.no_grad():  # a flat mixture: all inner levels within far less than 1e-4 nats
        model.network.head.gain.zero_()
        model.network.head.bias.copy_(torch.tensor([0.0] * 6 + [14.0] * 3))
    x = torch.full((1, 1, 6, 6), 100, dtype=torch.uint8)
    certificate = certify(model, x, x, 5)
    assert certificate.exact.all()
    assert 0 <= certificate.ties.item() <= 36
    assert certificate.gap.item() < 1e-4


def test_arrays_and_empty_batches_are_taken(model, x):
    assert certify(model, x[:2].numpy(), x[:2].numpy(), 0).exact.all()
    assert certify(model, x[:0], x[:0], 4).exact.shape == (0,)


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda x: (x[:, :, 1:], x, 3), "x"),
        (lambda x: (x, x[:, :, 1:], 3), "x_purified"),
        (lambda x: (x, x[1:], 3), "x_purified"),
        (lambda x: (x, x, -1), "eps"),
    ],
)
def test_bad_input_is_named(model, x, change, name):
    with pytest.raises(ValueError, match=rf"^{name} "):
        certify(model, *change(x)[:2], change(x)[2])
