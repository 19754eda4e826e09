"""The incremental engine for CPUs, compiled with Numba: images in parallel on threads."""

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.engine import compiled_decode

__all__ = ["compiled_decode"]
