"""The incremental engine for CPUs, compiled with Numba: images in parallel on threads.

:mod:`.instructions` turns a model into a program and :mod:`.interpreter` executes it for a group of images, with the
matrix products of :mod:`.gemm`, the elementwise operations of :mod:`.activations` and the levels of :mod:`.choice`.
:mod:`.engine` distributes the groups over threads.
"""

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.engine import compiled_decode

__all__ = ["compiled_decode"]
