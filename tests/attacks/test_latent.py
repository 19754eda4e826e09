import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import ManifoldProjection, PurifiedModel
from art_pixeldefend.attacks import LatentAttack
from art_pixeldefend.models.generator import VAE, Generator

SHAPE = (1, 4, 4)


class Plane(Generator):
    """G(z) = A z + 0.5 with orthonormal columns."""

    def __init__(self, latent_size=4):
        super().__init__()
        self.image_shape, self.latent_size = SHAPE, latent_size
        random = torch.randn(16, latent_size, generator=torch.Generator().manual_seed(0))
        self.a = nn.Parameter(torch.linalg.qr(random).Q)

    def forward(self, z):
        return (z @ self.a.T + 0.5).unflatten(1, SHAPE)


def projection(model, **arguments):
    return ManifoldProjection(model, steps=60, learning_rate=0.1, **{"seed": 0} | arguments)


def classifier(purifier, net, clip_values=(0.0, 1.0), inside=False):
    net = PurifiedModel(net, purifier) if inside else net
    classes = 2 if isinstance(net, PurifiedModel) else net[-1].out_features
    return PyTorchClassifier(
        net, nn.CrossEntropyLoss(), SHAPE, classes, clip_values=clip_values, device_type="cpu",
        preprocessing_defences=None if inside else [purifier],
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("inside", [False, True])
def test_on_a_linear_defence_it_comes_close_to_the_worst_case(norm, inside):
    """The margin after the projection P is w . P x, so that the worst case is eps times a norm of P w."""
    plane, net = Plane(), nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    w = torch.randn(16, generator=torch.Generator().manual_seed(1))
    eps = 0.05 if norm == "Linf" else 0.2
    projected = plane.a.detach() @ (plane.a.detach().T @ w)
    worst = eps * (projected.abs().sum() if norm == "Linf" else projected.norm()).item()
    with torch.no_grad():
        net[1].weight[:] = torch.stack([torch.zeros(16), w])
        net[1].bias[:] = torch.tensor([w.sum().item() / 2 + 0.8 * worst, 0.0])
        x = plane(torch.zeros(1, 4)).numpy()
    attack = LatentAttack(
        classifier(projection(plane), net, inside=inside), norm=norm, eps=eps, steps=60, checks=6, seed=0
    )
    attacked = attack.generate(x, np.zeros(1, int))
    change = (attacked - x).ravel()
    assert (np.abs(change).max() if norm == "Linf" else np.linalg.norm(change)) <= eps + 1e-6
    assert attack.success.all() and attack.fallen_at[0] > 0  # at least 80% of the worst case


def test_facts_agree_with_predictions_and_images_stay_in_the_range():
    torch.manual_seed(0)
    vae = VAE(SHAPE, latent_size=3, hidden=(8,))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    estimator = classifier(projection(vae, clip_values=(0, 255)), net, clip_values=(0.0, 255.0))
    with torch.no_grad():
        x = 255 * vae(torch.randn(12, 3)).clamp(0, 1).numpy()
    y = estimator.predict(x).argmax(1)
    attack = LatentAttack(estimator, eps=30.0, steps=30, weights=(1.0, 0.1), checks=3, seed=0, batch_size=5)
    attacked = attack.generate(x, y)
    fooled = estimator.predict(attacked).argmax(1) != y
    assert np.array_equal(fooled, attack.success) and fooled.any()
    assert np.array_equal(attack.fallen_at >= 0, fooled)
    assert np.abs(attacked - x).max() <= 30 + 1e-3 and attacked.min() >= 0 and attacked.max() <= 255
    assert estimator.preprocessing_defences[0].apply_predict


def test_latents_are_fitted_once_and_judged_as_often_as_asked(monkeypatch):
    estimator = classifier(projection(Plane()), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    x = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    attack = LatentAttack(estimator, eps=0.0, steps=7, checks=4, weights=(1.0, 0.1), batch_size=2, seed=0)
    fitted, closest = [], attack._closest
    monkeypatch.setattr(attack, "_closest", lambda x: fitted.append(len(x)) or closest(x))
    attack.generate(x, estimator.predict(x).argmax(1))
    assert not attack.success.any() and sum(fitted) == 3
    assert attack.queries.tolist() == [1 + 2 * 4] * 3


def test_only_a_single_manifold_projection_is_attacked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    bare = PyTorchClassifier(net, nn.CrossEntropyLoss(), SHAPE, 2, clip_values=(0, 1), device_type="cpu")
    hidden = nn.Sequential(PurifiedModel(net, projection(Plane())))
    for estimator in (bare, classifier(projection(Plane()), nn.Sequential(hidden, nn.Linear(2, 2)))):
        with pytest.raises(ValueError, match="estimator must purify by one ManifoldProjection"):
            LatentAttack(estimator)


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "L1"}, {"eps": -1}, {"steps": 0}, {"checks": 0}, {"weights": ()}, {"weights": (-1,)}, {"weights": 3},
        {"draws": 0}, {"seed": -1}, {"batch_size": 0}, {"verbose": 1}, {"learning_rate": -1},
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(arguments):
    estimator = classifier(projection(Plane()), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LatentAttack(estimator, **arguments)
