"""Decoders: engines that find the image of PixelDefend's Algorithm 1, a check of their results, and sampling.

All engines return the same images, up to near ties:

- ``reference``: the algorithm as printed, one forward pass for each pixel.
- ``fixed_point``: forward passes over the whole image until no level changes.
- ``cached``, ``compiled``, ``graphed``: every activation is computed once (:mod:`.incremental`); in PyTorch on any
  device, in Numba on CPUs, in CUDA graphs on NVIDIA GPUs.

:mod:`.decode` chooses the engine, :mod:`.rules` the level of a sub-pixel, and :mod:`.certify` checks a result.
"""

from art_pixeldefend.models.pixelcnnpp.decoders.certify import Certificate, certify
from art_pixeldefend.models.pixelcnnpp.decoders.decode import ENGINES, choose_engine, greedy_decode, load_engine, sample

__all__ = ["ENGINES", "Certificate", "certify", "choose_engine", "greedy_decode", "load_engine", "sample"]
