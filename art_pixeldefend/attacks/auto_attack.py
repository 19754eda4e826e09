"""AutoAttack, by its authors' code, on modules such as PurifiedModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from art_pixeldefend.attacks.through import NORMS
from art_pixeldefend.models.base import evaluation_mode
from art_pixeldefend.validation import check_choice, check_count, check_number

VERSIONS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "rand": ("apgd-ce", "apgd-dlr")}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def auto_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "Linf",
    eps: float = 8 / 255,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    iterations: int = 100,
    targets: int = 9,
    queries: int = 5000,
    draws: int = 20,
    batch_size: int = 128,
    seed: int = 0,
) -> Tensor:
    """Attack a module by AutoAttack (Croce and Hein 2020, arXiv:2003.01690), the package ``pyautoattack``.

    It gets gradients as the module gives them: those of a :class:`~art_pixeldefend.PurifiedModel` are its purifier's,
    as its argument ``gradient`` says. The default arguments are AutoAttack's own settings. AutoAttack judges an image
    by one draw: where the module draws random numbers, judge the images that it returns by further draws.

    Args:
        model: a module from images in [0, 1], (N, C, H, W), to logits (N, classes), of three classes at least.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius in the [0, 1] range.
        version: ``"standard"``: APGD on the cross-entropy, targeted APGD, targeted FAB and Square; ``"rand"``, for
            modules that draw random numbers: APGD on the cross-entropy and DLR loss, with gradients averaged over
            ``draws``.
        attacks: others than the version's, of ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"`` and
            ``"square"``. Under ``"rand"`` Square's margins are those of mean logits of ``draws``.
        iterations: of APGD and FAB.
        targets: classes that targeted attacks run towards, at most all others.
        queries: of Square.
        draws: under ``"rand"``.
        batch_size: images at a time.
        seed: of the attack's random numbers.

    Returns:
        Images (N, C, H, W): attacked where the attack succeeded, and otherwise as given.

    Raises:
        ImportError: if ``pyautoattack`` is not installed.
        ValueError: naming the argument that is not as described.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> auto_attack(model, x, model(x).argmax(1), iterations=5, targets=2, queries=10).shape
        torch.Size([2, 1, 8, 8])
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ImportError("auto_attack needs the package pyautoattack: pip install pyautoattack") from None
    check_choice("version", version, VERSIONS)
    check_choice("norm", norm, NORMS)
    chosen = VERSIONS[version] if attacks is None else tuple(attacks)
    if not chosen or not set(chosen) <= set(NAMES):
        raise ValueError(f"attacks must be some of {', '.join(NAMES)}, got {attacks!r}")
    iterations, queries = check_count("iterations", iterations), check_count("queries", queries)
    draws = check_count("draws", draws) if version == "rand" else 1
    if len(x) != len(y):
        raise ValueError(f"y must hold a label for each of {len(x)} images, got {len(y)}")
    if not len(x):
        return x.clone()
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < 3:
        raise ValueError(f"model must have three classes at least, got {classes}")
    others = min(check_count("targets", targets), classes - 1)
    adversary: Any = AutoAttack(
        model, norm=norm, eps=check_number("eps", eps), seed=check_count("seed", seed, least=0), version="custom",
        attacks=list(chosen), device=x.device,
    )  # fmt: skip
    adversary.version = version  # its own lists of attacks are set by now
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = iterations
    adversary.apgd.eot_iter = adversary.apgd_targeted.eot_iter = draws
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = others
    adversary.square.n_queries = queries
    if draws > 1:
        adversary.square.predict = lambda points: (
            model(points.repeat_interleave(draws, 0)).unflatten(0, (len(points), draws)).mean(1)
        )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluation_mode(model):
        attacked, _ = adversary.run_standard_evaluation(x, y, batch_size=check_count("batch_size", batch_size))
    return attacked
