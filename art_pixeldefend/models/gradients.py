"""The loss of a batch and its gradients, operation by operation on a CPU and as a CUDA graph on a GPU.

A step of a PixelCNN++ is thousands of small kernels. Captured as a CUDA graph they are launched at once, which took a
ninth of the time of launching each on one GPU (``benchmarks/README.md``). Gradients of several processes are averaged
after the backward pass by one all-reduce of :func:`all_reduce`, not by DDP, so that graphs are used on several GPUs as
well. Unlike DDP this does not overlap communication with the backward pass. That parameters equal those of one process
on the joint batch is tested on CPUs; speed on several GPUs has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.backends import cudnn

Loss = Callable[[Tensor], Tensor]
Gradients = Callable[[Tensor], Tensor]  # from a batch to its loss; the gradients are then in the parameters
WARM_UP = 3  # batches before the capture, in which kernels are compiled, chosen and allocated


def gradients_of(loss: Loss, model: nn.Module, device: torch.device) -> Gradients:
    """A function that computes ``loss`` and its gradients, for batches that are all of one shape."""
    return Captured(loss, model) if device.type == "cuda" else Eager(loss)


def all_reduce(tensors: Sequence[Tensor], world_size: int) -> None:
    """Replace tensors of one dtype and device by their means over all processes, in one exchange."""
    if world_size == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


class Eager:
    """Run the loss and its backward pass operation by operation."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(self, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()


class Captured:
    """Capture the loss and its backward pass as a CUDA graph at the first batch, and replay it from then on."""

    def __init__(self, loss: Loss, model: nn.Module) -> None:
        self._loss = loss
        self._graph: torch.cuda.CUDAGraph | None = None
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers())

    def __call__(self, batch: Tensor) -> Tensor:
        """The loss of a batch."""
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
        benchmark, cudnn.benchmark = cudnn.benchmark, True  # let cuDNN time its convolutions and choose the fastest
        buffers = [buffer.clone() for buffer in self._buffers]
        try:
            self._warm_up()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._loss(self._batch)
                loss.backward()
        finally:
            cudnn.benchmark = benchmark
            for buffer, value in zip(self._buffers, buffers, strict=True):
                buffer.copy_(value)
        self._result = loss.detach()
        self._gradients = [parameter.grad for parameter in self._parameters]
        return graph

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._loss(self._batch).backward()
                for parameter in self._parameters:
                    parameter.grad = None
        torch.cuda.current_stream().wait_stream(stream)
