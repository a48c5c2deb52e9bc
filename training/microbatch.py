"""Forward and backward of one micro-batch: launched kernel by kernel, or replayed as a CUDA graph.

A quantized step launches several hundred kernels through Python operators; the CPU needs longer for that than a small
model's GPU time (llama_30m under quartet2: 71 ms of kernels, 79 to 97 ms a step). A graph launches them all at once.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class MicroBatch:
    """Adds one micro-batch's gradients to the parameters'; `loss` maps tokens int [B, T+1] to summed nats."""

    graphs = False  # whether CUDA graphs are replayed

    def __init__(self, loss: nn.Module, tokens_per_step: int, accumulate: Callable[[bool], AbstractContextManager]):
        self._loss = loss
        self._tokens_per_step = tokens_per_step
        self._accumulate = accumulate

    def __call__(self, tokens: Tensor, first: bool, last: bool) -> Tensor:
        """Summed nats, FP32 []. `first`, `last`: of this rank's micro-batches of the step; before the first one every
        gradient is None."""
        with self._accumulate(last):
            return self.launch(tokens)

    def release(self) -> None:
        """Give back memory that is kept between calls, before something else needs as much."""

    def use(self, variant: int) -> None:
        """What is launched from now on differs from what other variants launch (another recipe)."""

    def launch(self, tokens: Tensor) -> Tensor:
        nats = self._loss(tokens)
        (nats / self._tokens_per_step).backward()
        return nats.detach()


class GraphedMicroBatch(MicroBatch):
    """The same bits from the same kernels. The first step runs as usual (it compiles, and fills the caches of the
    libraries); the second one captures two graphs: one that sets the gradients, one that adds to them.

    Gradients, activations and the result live in the graphs' memory pool: they are valid until the next call. The pool
    gives the activations' memory to the gradients as an ordinary step does, so that the peak is the same; but nothing
    else can use it. `release` gives it back (a forward and backward outside would need as much again), and the next
    call captures anew.
    """

    def __init__(
        self,
        loss: nn.Module,
        tokens_per_step: int,
        accumulate: Callable[[bool], AbstractContextManager],
        parameters: Iterable[nn.Parameter],
    ):
        super().__init__(loss, tokens_per_step, accumulate)
        self._parameters = list(parameters)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._nats: dict[bool, Tensor] = {}
        self._gradients: list[Tensor | None] = []
        self._steps = 0

    def __call__(self, tokens: Tensor, first: bool, last: bool) -> Tensor:
        self._steps += first
        if self._steps < 2:
            return super().__call__(tokens, first, last)
        if first not in self._graphs:
            self._capture(tokens, first)
        self._tokens.copy_(tokens)
        with self._accumulate(last):
            self._graphs[first].replay()
            if first:
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                    parameter.grad = gradient
        return self._nats[first]

    def release(self) -> None:
        self._graphs, self._nats, self._gradients = {}, {}, []
        torch.cuda.empty_cache()

    def _capture(self, tokens: Tensor, first: bool) -> None:
        """Record the kernels; none of them runs. Other threads (data, checkpoints) may go on using the device."""
        if first:
            self._tokens = tokens.clone()
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with self._accumulate(False), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            self._nats[first] = self.launch(self._tokens)
        self._graphs[first] = graph
        if first:
            self._gradients = [parameter.grad for parameter in self._parameters]


class SwitchedMicroBatch(MicroBatch):
    """A graphed micro-batch for each variant in use, since a graph repeats the kernels that it has captured."""

    graphs = True

    def __init__(self, make: Callable[[], MicroBatch]):
        self._make = make
        self._each: dict[int, MicroBatch] = {}
        self.use(0)

    def use(self, variant: int) -> None:
        if variant not in self._each:
            self._each[variant] = self._make()
        self._current = self._each[variant]

    def __call__(self, tokens: Tensor, first: bool, last: bool) -> Tensor:
        return self._current(tokens, first, last)

    def release(self) -> None:
        for micro_batch in self._each.values():
            micro_batch.release()
