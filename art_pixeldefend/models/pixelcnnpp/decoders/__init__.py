"""Decoders: engines that find the image of PixelDefend's Algorithm 1, a check of their results, and sampling."""

from art_pixeldefend.models.pixelcnnpp.decoders.certify import Certificate, certify
from art_pixeldefend.models.pixelcnnpp.decoders.decode import ENGINES, choose_engine, greedy_decode, load_engine, sample

__all__ = ["ENGINES", "Certificate", "certify", "choose_engine", "greedy_decode", "load_engine", "sample"]
