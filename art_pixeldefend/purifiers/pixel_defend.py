"""PixelDefend, with the arguments of ART's class of that name."""

from __future__ import annotations

from os import PathLike

from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders import greedy_decode
from art_pixeldefend.models.pixelcnnpp.decoders.decode import choose_engine
from art_pixeldefend.purifiers.base import Purifier
from art_pixeldefend.validation import check_eps


class PixelDefend(Purifier):
    """Purify images with PixelDefend (Song et al., ICLR 2018, Algorithm 1).

        x*[i, j, k] = argmax over z, |z - x[i, j, k]| <= eps, of p(z | x* before it)

    | Paper link: https://arxiv.org/abs/1710.10766

    | What it does not withstand: an attacker who knows of it and takes its backward pass for the identity, as this
      class lets ART's attacks do (https://arxiv.org/abs/1802.00420).

    Args:
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        eps: eps_defend in levels, 0..255 (the paper: 32 for Fashion-MNIST, 16 for CIFAR-10).
        pixel_cnn: the density model; a :class:`PixelCNNpp`, a path, or the name of a bundled one.
        batch_size: most images in memory at a time.
        apply_fit: purify in the classifier's training, too.
        apply_predict: purify in prediction, and so in attacks.
        verbose: show a progress bar.
        method: how :func:`greedy_decode` finds the image; all ways find the same one.
        device_type: ``"gpu"`` or ``"cpu"``, as in ART.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    params = [*Purifier.params, "eps", "method"]

    def __init__(
        self,
        clip_values: tuple[float, float] = (0.0, 1.0),
        eps: int = 16,
        pixel_cnn: PixelCNNpp | str | PathLike[str] | None = None,
        batch_size: int = 128,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        method: str = "auto",
        device_type: str = "gpu",
    ) -> None:
        super().__init__(clip_values, pixel_cnn, batch_size, apply_fit, apply_predict, verbose, device_type=device_type)
        self.eps = eps
        self.method = method
        self._check_params()

    def purify(self, levels: Tensor) -> Tensor:
        """Purified levels of levels, both (N, C, H, W), uint8, on the model's device."""
        return greedy_decode(
            self.pixel_cnn, levels, self.eps, self.method, batch_size=self.batch_size, verbose=self.verbose
        )

    def _check_params(self) -> None:
        super()._check_params()
        self.eps = check_eps("eps", self.eps)
        choose_engine(self.pixel_cnn, self.method)
