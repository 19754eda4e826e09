import builtins

import pytest
import torch
from torch import nn

from art_pixeldefend import PurifiedModel
from art_pixeldefend.attacks import auto_attack
from art_pixeldefend.purifiers.base import Purifier

SHAPE = (1, 10, 10)


class Blur(Purifier):
    gradients = ("identity", "exact")

    def purify(self, x, generator):
        return (x + x.roll(1, -1)) / 2


class AddNoise(Purifier):
    stochastic, gradients = True, ("identity", "exact")

    def purify(self, x, generator):
        return (x + 0.2 * generator.normal(x.shape[1:])).clamp(0, 1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5)).eval()


@pytest.fixture
def x():
    return torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(1))


SMALL = {"iterations": 10, "targets": 2, "queries": 30}


@pytest.mark.parametrize("norm, eps", [("Linf", 0.1), ("L2", 0.8)])
@pytest.mark.parametrize("version", ["standard", "rand"])
def test_it_attacks_through_a_purifier_and_stays_in_the_ball(network, x, version, norm, eps):
    pytest.importorskip("pyautoattack")
    robust = PurifiedModel(network, Blur(gradient="exact"))
    y = robust(x).argmax(1)
    state = torch.random.get_rng_state()
    attacked = auto_attack(robust, x, y, norm=norm, eps=eps, version=version, **SMALL, draws=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (robust(attacked).argmax(1) != y).float().mean() > 0.3
    change = (attacked - x).flatten(1)
    distance = change.abs().amax(1) if norm == "Linf" else change.norm(dim=1)
    assert distance.max() <= eps + 1e-5 and attacked.min() >= 0 and attacked.max() <= 1


def test_the_same_seed_gives_the_same_images_and_modes_are_restored(network, x):
    pytest.importorskip("pyautoattack")
    network.train()
    network[0].eval()
    y = torch.zeros(len(x), dtype=torch.long)
    first, second = (auto_attack(network, x, y, eps=0.1, **SMALL, attacks=["apgd-ce", "square"]) for _ in range(2))
    assert torch.equal(first, second)
    assert network.training and network[3].training and not network[0].training


def test_square_averages_draws_under_rand(network, x):
    pytest.importorskip("pyautoattack")
    seen = []
    robust = PurifiedModel(network, AddNoise())
    robust.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    y = robust(x).argmax(1)
    auto_attack(robust, x, y, eps=0.01, version="rand", attacks=["square"], queries=3, draws=7)
    averaged = [count for count in seen if count > len(x)]
    assert len(averaged) >= 4 and all(count % 7 == 0 for count in averaged)


def test_a_missing_package_is_named(network, x, monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == "pyautoattack":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match=r"pip install pyautoattack$"):
        auto_attack(network, x, torch.zeros(12, dtype=torch.long))


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "L1"}, {"version": "plus"}, {"attacks": []}, {"attacks": ["pgd"]}, {"iterations": 0}, {"targets": 0},
        {"queries": 0}, {"eps": -1}, {"seed": -1}, {"batch_size": 0}, {"draws": 0, "version": "rand"},
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(network, x, arguments):
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        auto_attack(network, x, torch.zeros(12, dtype=torch.long), **arguments)


def test_two_classes_are_refused(x):
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match="model must have three classes"):
        auto_attack(nn.Sequential(nn.Flatten(), nn.Linear(100, 2)), x, torch.zeros(12, dtype=torch.long))
