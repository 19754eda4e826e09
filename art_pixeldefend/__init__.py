"""PixelDefend (Song et al., ICLR 2018, arXiv:1710.10766) for the Adversarial Robustness Toolbox."""

__version__ = "0.1.0"
