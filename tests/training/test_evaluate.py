"""What an evaluation asks of the model, without one."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training import loop
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


def test_the_device_has_its_next_batch_before_the_host_takes_up_the_last_one():
    order = []

    class Watched(OneSegmentEach):
        def segment_nats(self, first: int, nats: np.ndarray) -> np.ndarray:
            order.append(f"nats {first}")
            return super().segment_nats(first, nats)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        order.append(f"forward {int(tokens[0, 0])}")
        return tokens[:, 1:].float()

    evaluate(forward, Watched(), BATCH, Dist(0, 1, 0, torch.device("cpu")), lambda number: None)
    assert order == ["forward 0", "forward 2", "nats 0", "forward 4", "nats 2", "nats 4"]


@pytest.mark.parametrize(("recipe", "times"), [("bf16", 1), ("nvfp4_rtn", 2)])
def test_what_is_bf16_already_is_not_scored_in_bf16_once_more(run, rows, monkeypatch, recipe, times):
    scored, evaluated = [], loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: scored.append(0) or evaluated(*arguments))
    _, folder = run(f"quant={recipe}", "steps=1", "evaluate.every=null", "evaluate.bf16=true")
    (row,) = rows(folder, "eval")
    assert len(scored) == times and (row["loss"] == row["loss_bf16"]) == (times == 1)


SQUARE_X = ["quant=nvfp4_rtn", "quant.fprop.x.scales=[tensor fp32,16x16 e4m3]", "quant.wgrad=none", "steps=2"]
ODD = [*SQUARE_X, "batch.seq_len=24", "batch.micro=2", "batch.sequences=4"]  # 48 tokens divide, one sequence's 24 don't


def test_what_only_an_evaluation_meets_is_refused_before_training(run, tmp_path):
    with pytest.raises(
        ValueError, match=r"evaluate\.final_tokens=null: the last batch of 1 .*evaluate\.final_tokens=\d+"
    ):
        run(*ODD, "evaluate.every=null")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["tokens", "final_tokens"])
def test_the_remedy_against_an_odd_batch_works(run, key):
    whole = ["evaluate.tokens=96", "evaluate.final_tokens=96"]
    with pytest.raises(ValueError, match=rf"evaluate\.{key}=120: .*set evaluate\.{key}=96") as refused:
        run(*ODD, *whole, f"evaluate.{key}=120", "evaluate.every=1")
    remedy = re.search(r"set (evaluate\.\w+=\d+)", str(refused.value))[1]
    assert run(*ODD, *whole, remedy, "evaluate.every=1")[0] == 0


def test_a_recipe_without_square_activations_takes_odd_batches(run):
    assert run("quant=nvidia", "batch.seq_len=24", "batch.micro=2", "batch.sequences=4", "steps=1")[0] == 0
