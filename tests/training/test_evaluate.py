"""What an evaluation asks of the model, without one."""

from types import SimpleNamespace

import numpy as np
import torch

from training.evaluate import evaluate
from training.ranks.distributed import Dist

SEQUENCES, BATCH = 5, 2


class OneSegmentEach:
    """The interface of EvalSet for sequences of three targets, one segment each."""

    sequences = SEQUENCES
    segments = SimpleNamespace(sequence=np.arange(SEQUENCES))

    def samples(self, first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count)[:, None].expand(count, 4)

    def segment_range(self, first: int, count: int) -> slice:
        return slice(first, first + count)

    def segment_nats(self, first: int, nats: np.ndarray) -> np.ndarray:
        return nats.astype(np.float64).sum(1)


def test_evaluation_draws_by_batch_and_never_what_training_draws():
    """A recipe may draw in fprop; the micro-batch field counts training's micro-batches from 0."""
    drawn, scored = [], []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        numbers = []
        scored.append(
            evaluate(
                lambda tokens: tokens[:, 1:].float(),
                OneSegmentEach(),
                BATCH,
                Dist(rank, world, rank, torch.device("cpu")),
                numbers.append,
            )
        )
        drawn.append(numbers)
    whole, *parts = drawn
    assert len(set(whole)) == 3 and min(whole) >= 2**24 and max(whole) < 2**32
    assert parts == [[whole[0], whole[2]], [whole[1], whole[0]]]  # rank 1 has no second batch and repeats the first
    assert scored[0].tolist() == [0.0, 3.0, 6.0, 9.0, 12.0]
    assert (scored[1] + scored[2]).tolist() == scored[0].tolist()
