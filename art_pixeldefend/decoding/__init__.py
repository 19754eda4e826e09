"""Finding the purified image: every engine gives exactly what Algorithm 1 gives."""

from art_pixeldefend.decoding.decode import ENGINES, greedy_decode, sample

__all__ = ["ENGINES", "greedy_decode", "sample"]
