"""The loss of a batch and its gradients: the part of a training step that is the same for every batch.

On a GPU it is thousands of small kernels, captured once, as a CUDA graph, and launched at once from then on: launching
them one by one took nine times as long (``benchmarks/README.md``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.backends import cudnn

Gradients = Callable[[Tensor], Tensor]  # a batch to its loss; its gradients are then in the parameters
WARM = 3  # batches before the capture: what is compiled, chosen or allocated at first is not to be captured


def gradients_of(loss: nn.Module, device: torch.device) -> Gradients:
    """For a ``loss`` of batches that are all of one shape."""
    if device.type == "cuda" and not isinstance(loss, nn.parallel.DistributedDataParallel):
        return Captured(loss)
    return Eager(loss)


class Eager:
    """Operation by operation."""

    def __init__(self, loss: nn.Module) -> None:
        self._loss = loss

    def __call__(self, batch: Tensor) -> Tensor:
        """The loss."""
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()


class Captured:
    """As a CUDA graph."""

    def __init__(self, loss: nn.Module) -> None:
        self._loss = loss
        self._graph: torch.cuda.CUDAGraph | None = None
        self._parameters = list(loss.parameters())

    def __call__(self, batch: Tensor) -> Tensor:
        """The loss."""
        if self._graph is None:
            state = torch.cuda.get_rng_state(batch.device)
            with torch.cuda.device_of(batch):
                self._graph = self._capture(batch)
            torch.cuda.set_rng_state(state, batch.device)
        self._batch.copy_(batch)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._graph.replay()
        return self._result.clone()

    def _capture(self, batch: Tensor) -> torch.cuda.CUDAGraph:
        self._batch = batch.clone()
        choosing, cudnn.benchmark = cudnn.benchmark, True  # of convolutions, the fastest of all by trial
        try:
            self._warm_up()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._loss(self._batch)
                loss.backward()
        finally:
            cudnn.benchmark = choosing
        self._result = loss.detach()
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self._loss(self._batch).backward()
                for parameter in self._parameters:
                    parameter.grad = None
        torch.cuda.current_stream().wait_stream(stream)
