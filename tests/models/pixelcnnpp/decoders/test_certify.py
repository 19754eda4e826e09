import pytest
import torch

from art_pixeldefend.models.pixelcnnpp import mixture
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


@pytest.mark.parametrize("method", ["fixed-point", "cached"])
@pytest.mark.parametrize("shift", [1, 9])
def test_a_wrong_choice_of_levels_is_found_though_every_engine_makes_it(model, x, monkeypatch, method, shift):
    masses = mixture.masses
    expected = greedy_decode(model, x, 16, "reference")

    def wrong(*arguments):
        return masses(*arguments).roll(shift, dims=1)

    monkeypatch.setattr(mixture, "masses", wrong)
    purified = greedy_decode(model, x, 16, method)
    assert (purified != expected).flatten(1).any(dim=1).all()
    assert not certify(model, x, purified, 16).exact.any()
    assert certify(model, x, expected, 16).exact.all()


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 4)])
@pytest.mark.parametrize("eps", [0, 3, 40, 255])
def test_the_gap_is_that_of_the_most_likely_level_of_the_window(make_model, make_levels, shape, eps):
    model, x = make_model(shape), torch.from_numpy(make_levels(3, shape))
    purified = (x.int() + torch.randint(-eps, eps + 1, x.shape)).clamp(0, 255).to(torch.uint8)
    logs, z = model.double().conditional_log_probs(purified), torch.arange(256)
    inside = (z - x[..., None].int()).abs() <= eps
    gaps = logs.where(inside, -torch.inf).amax(-1) - logs.gather(-1, purified.long()[..., None])[..., 0]
    certificate = certify(model, x, purified, eps)
    assert torch.allclose(certificate.gap, gaps.flatten(1).amax(dim=1), atol=1e-9)
    assert torch.equal(certificate.exact, certificate.gap < 1e-4)


def test_a_model_that_gives_nan_certifies_nothing(model, x):
    with torch.no_grad():
        model.network.head.bias[0] = torch.nan
    assert not certify(model, x, x, 16).exact.any()


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
