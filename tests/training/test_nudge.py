"""The two ways to change a run a little: they change exactly what they say, and are part of its identity."""

import torch

from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from training.records.identity import hash_of, numerics
from training.start.build import nudge
from training.start.derive import derive

N = 30_482_560


def digest(*overrides: str) -> str:
    config = compose(["model=llama_30m", *overrides], typed=False).config
    return hash_of(numerics(config, derive(config, N, world=1), {}, 32000, {}))


def test_nudged_weights_differ_by_the_share_asked_for_and_reproducibly():
    def weights(relative: float, seed: int = 0) -> torch.Tensor:
        model = Llama(LlamaConfig(2, 64, 2, 128, 500))
        model.init_weights(0)
        nudge(model, relative, seed)
        return torch.cat([p.detach().flatten().double() for p in model.parameters()])

    plain, nudged = weights(0.0), weights(1e-3)
    share = ((nudged - plain) / plain).square().mean().sqrt()
    assert abs(share - 1e-3) < 2e-5  # 160,000 weights: the estimate is good to 0.2 %
    assert torch.equal(nudged, weights(1e-3)) and not torch.equal(nudged, weights(1e-3, seed=1))


def test_nudges_change_the_hash_and_nothing_else_does_by_being_there():
    assert len({digest(), digest("rounding_seed=1"), digest("rounding_seed=2"), digest("perturb=1e-6")}) == 4
    assert digest() == digest("perturb=0", "rounding_seed=null", "model.family=llama")
