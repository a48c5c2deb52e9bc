"""The served loss (training/served.py) of a checkpoint, for scripts/score.py."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.checkpoint.state import load_model
from training.config import TrainConfig
from training.lift import Scorer
from training.loss import LossModel
from training.ranks.distributed import Dist
from training.reopen import reopen
from training.served import OWN, Scored, all_forwards, forward_recipe
from training.shaped_weights import SHAPED_W, shaped_weights


def score(
    config: TrainConfig,
    run: Mapping[str, Any],
    checkpoint: Path,
    step: int,
    globs: Iterable[str],
    ranks: Dist,
    shaped: bool = False,
) -> Scored:
    """Score the weights of `checkpoint` under the run's own forward and every one of FORWARDS, on one device.

    config: the run's own; data.path, where it is given, is where its tokens lie now. run: its run.json. globs: for each
    one also `nvfp4` in the layers that it matches, BF16 in the others. shaped: also training/shaped_weights.py.
    Raises ValueError for other text than the run's and for a glob that matches nothing; RuntimeError for what the
    machine can't do.
    """
    run_again = reopen(config, run, step, ranks)
    model, evalset, rng = run_again.model, run_again.evalset, run_again.rng
    forwards = {OWN: {}, **all_forwards(model, globs)}
    load_model(checkpoint, model)
    loss = LossModel(model)
    tokens = None
    if shaped:
        forwards[SHAPED_W], tokens = shaped_weights(
            model,
            run_again.train,
            run_again.numbers,
            step,
            forward_recipe("nvfp4"),
            lambda batch: loss(batch.to(ranks.device), per_token=True),
        )
    scorer = Scorer(loss, evalset, run_again.numbers.micro, ranks, rng[2].fill_)
    return Scored(step, evalset, {name: scorer.nats(recipes) for name, recipes in forwards.items()}, tokens)
