"""What one training step hands to its parts: its own rate, clipped gradients, global micro-batch numbers."""

from unittest.mock import Mock

import pytest
import torch

from launcher.compose import compose
from training.checkpoint.state import TrainState
from training.loop import Trainer
from training.ranks.distributed import Dist, SharedFlag
from training.start.derive import derive


def test_each_step_has_its_own_rate_and_clipped_gradients(run, rows, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *given):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(({group["lr"] for group in self.param_groups}, torch.nn.utils.get_total_norm(gradients).item()))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    clip = 0.05  # below every norm of this run
    _, folder = run(f"optim.clip={clip}", "schedule=wsd", "schedule.warmup_steps=4", "evaluate.every=null", "steps=6")
    train = rows(folder, "train")
    assert [rate for (rate,), _ in seen] == [row["lr"] for row in train]
    # By hand, peak 0.01: linear warm-up over 4 steps from 0, flat, half of it is left in the last of 2 decay steps.
    assert [rate for (rate,), _ in seen] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.005])
    assert all(row["grad_norm"] > 2 * clip for row in train)  # logged before clipping
    assert [norm for _, norm in seen] == pytest.approx([clip] * 6, rel=1e-3)


def test_random_state_counts_micro_batches_over_all_ranks():
    """Rank 1 of 2: the first half of the step's micro-batches, 0 and 1, is the other rank's."""
    seen, ranks = [], Dist(1, 2, 1, torch.device("cpu"))
    rng = torch.zeros(3, dtype=torch.int64)

    def micro_batch(tokens, first, last):
        seen.append((rng[1].item(), rng[2].item(), first, last))
        return torch.zeros(())

    config = compose(["batch.sequences=8", "batch.micro=2", "steps=10", "optim.clip=null"]).config
    trainer = Trainer.__new__(Trainer)
    trainer.p = Mock(config=config, ranks=ranks, rng=rng, micro_batch=micro_batch, stop=Mock(level=0))
    trainer.numbers, trainer.optimizers = derive(config, 10**6, world=2), []
    trainer.state = TrainState(torch.nn.Linear(1, 1), [], step=3)
    trainer._batches, trainer._stop = iter([None, None]), SharedFlag(ranks)
    trainer._buffer, trainer._guard = Mock(), Mock()
    assert trainer._train_step() == 0
    assert seen == [(3, 2, True, False), (3, 3, False, True)]
    assert trainer.state.step == 4
