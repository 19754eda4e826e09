"""Finding the purified image: every engine gives exactly what Algorithm 1 gives."""

from art_pixeldefend.models.pixelcnnpp.decoders.certify import Certificate, certify
from art_pixeldefend.models.pixelcnnpp.decoders.decode import ENGINES, choose_engine, greedy_decode, sample

__all__ = ["ENGINES", "Certificate", "certify", "choose_engine", "greedy_decode", "sample"]
