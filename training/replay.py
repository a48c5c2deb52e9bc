"""A function that launches many kernels, as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch


class Replay:
    """`function`, which reads and writes tensors where they lie. With a pool: the first call runs it once, so that
    what is loaded or built on first use is there, and captures it; that call and all others replay. Its result then
    lies in the graph's memory: each call overwrites it. Graphs of one pool keep what anyone still holds.
    """

    def __init__(self, function: Callable[[], Any], pool: Any = None):
        self._function, self._pool = function, pool
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
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            self._result = self._function()
        self._graph = graph
