"""The bookkeeping of graphed micro-batches, with graphs that a CPU plays back; the GPU's own: test_gpu_loop.py."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from training.microbatch import GraphedMicroBatch, MicroBatch, SwitchedMicroBatch


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 3))

    def forward(self, tokens):
        return self.table[tokens].square().sum()


@pytest.fixture
def played(monkeypatch):
    """torch.cuda's graphs as a CPU can have them: capturing changes no gradient, replaying runs the body again into the
    tensors of the capture. Returns the list of captures."""
    captures = []

    class Graph:
        def replay(self):
            self.body()

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        micro = captures_of["micro"]
        parameter = micro._parameters[0]
        first = parameter.grad is None
        before = None if first else parameter.grad.clone()
        yield
        static = parameter.grad
        if not first:
            static.copy_(before)

        def body():
            held, parameter.grad = parameter.grad, None  # a replay knows nothing of attributes
            nats = micro.launch(micro._tokens)
            fresh, parameter.grad = parameter.grad, held
            static.copy_(fresh if first else static + fresh)
            micro._nats[first].copy_(nats)

        graph.body = body
        captures.append(first)

    captures_of = {}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return captures, captures_of


def test_graphed_steps_equal_plain_ones_also_after_a_release(played):
    captures, captures_of = played
    losses = [Loss(), Loss()]
    plain = MicroBatch(losses[0], 10, lambda last: nullcontext())
    graphed = GraphedMicroBatch(losses[1], 10, lambda last: nullcontext(), losses[1].parameters())
    captures_of["micro"] = graphed
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for micro in range(3):
            tokens = torch.randint(7, (2, 5), generator=generator)
            nats = [m(tokens, first=micro == 0, last=micro == 2).clone() for m in (plain, graphed)]
            assert torch.equal(*nats), (step, micro)
        assert torch.equal(losses[0].table.grad, losses[1].table.grad), step
        with torch.no_grad():
            for loss in losses:
                loss.table -= 0.1 * loss.table.grad
                loss.zero_grad(set_to_none=True)
        if step == 3:
            graphed.release()
    # The first step is eager; two graphs in the second one, and two again after the release.
    assert captures == [True, False, True, False]


def test_each_variant_has_graphs_of_its_own_until_they_are_released():
    made = []

    class Counted(MicroBatch):
        def __init__(self):
            self.calls, self.released = 0, 0
            made.append(self)

        def __call__(self, tokens, first, last):
            self.calls += 1

        def release(self):
            self.released += 1

    switched = SwitchedMicroBatch(Counted)
    for variant in (0, 1, 0, 0):
        switched.use(variant)
        switched(None, True, True)
    switched.release()
    assert [one.calls for one in made] == [3, 1] and [one.released for one in made] == [1, 1]
