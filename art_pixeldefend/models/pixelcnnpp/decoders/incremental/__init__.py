"""Incremental evaluation of the network in raster order, every activation computed once.

When a row of the image begins, everything that depends only on the rows above is computed for the whole width: the
``u`` stream and, for every convolution of the ``ul`` stream, the taps in the row above, the skip connection from ``u``
and the bias. The taps in the row itself follow column by column. Position (I, J) of a lower resolution is computed at
pixel (2 I, 2 J) of the resolution above it.

The blocks of :mod:`.blocks` describe this once, as operations on memory that is laid out beforehand. Three engines
execute them: ``cached`` calls PyTorch, ``graphed`` launches CUDA graphs, ``compiled`` runs a list of instructions in
Numba.
"""

from art_pixeldefend.models.pixelcnnpp.decoders.incremental.memory import Memory, small_batch
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.operations import Operations
from art_pixeldefend.models.pixelcnnpp.decoders.incremental.stages import CYCLE, PERIOD, IncrementalNetwork

__all__ = ["CYCLE", "PERIOD", "IncrementalNetwork", "Memory", "Operations", "small_batch"]
