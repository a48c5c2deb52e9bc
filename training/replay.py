"""Functions that launch many kernels, each as one CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Lane:
    """Functions replayed as CUDA graphs from one pool of memory, in which nothing is reused that anyone still holds.
    Without `graphs` they run as they are. aside: in `within` they run on a stream of their own, beside other lanes,
    with which they share no memory: a library's workspace belongs to the stream that was captured."""

    def __init__(self, graphs: bool, aside: bool = False):
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._stream = torch.cuda.Stream() if graphs and aside else None

    def replay(self, function: Callable[[], Any]) -> "Replay":
        return Replay(function, self._pool, self._stream)

    @contextmanager
    def within(self) -> Iterator[None]:
        """What is launched here begins after all that was launched before, and runs beside what follows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from here on waits for what runs aside."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Replay:
    """`function`, which reads and writes tensors where they lie. The first call runs it once, so that what is loaded or
    built on first use is there, and captures it; that call and all others replay. Its result then lies in the graph's
    memory: each call overwrites it."""

    def __init__(self, function: Callable[[], Any], pool: Any, stream: torch.cuda.Stream | None):
        self._function, self._pool, self._stream = function, pool, stream
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Any:
        if self._pool is None:
            return self._function()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        """Other threads (data, checkpoints) may go on using the device."""
        self._function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            self._result = self._function()
        self._graph = graph
