"""Activation checkpointing changes memory, not one bit of the result."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from kernels import backend
from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant.plan import convert, plan_of
from training.loss import LossModel
from training.ranks.distributed import Dist
from training.recompute import recompute_blocks
from training.start.build import build_loss

CONFIG = LlamaConfig(layers=3, width=64, heads=2, hidden=96, vocab_size=61, max_seq_len=16)


def gradients(recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    model = Llama(CONFIG, torch.float32)
    model.init_weights(3)
    calls = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    if recompute:
        recompute_blocks(model)
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}, len(calls)


def test_recomputation_is_bitwise_the_same_and_happens():
    loss, plain, calls = gradients(False)
    loss_again, recomputed, calls_again = gradients(True)
    assert torch.equal(loss, loss_again)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert (calls, calls_again) == (3, 6)


def stochastic_steps(recipe: str, recompute: bool) -> list[dict[str, torch.Tensor]]:
    """Loss and gradients of three micro-batches, each with its own random bits."""
    backend.use("reference", "cpu")
    model = Llama(LlamaConfig(layers=2, width=128, heads=2, hidden=128, vocab_size=61, max_seq_len=64))
    model.init_weights(3)
    rng = torch.zeros(3, dtype=torch.int64)
    convert(model, plan_of(model, compose([f"quant={recipe}"]).config.quant), rng)
    if recompute:
        recompute_blocks(model)
    loss, found = LossModel(model), []
    tokens = torch.randint(0, 61, (2, 65), generator=torch.Generator().manual_seed(1))
    for micro in range(3):
        rng.copy_(torch.tensor([7, 5, micro]))
        nats = loss(tokens)
        nats.backward()
        found.append({"loss": nats.detach()} | {name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("recipe", ["quartet2", "sr"])
def test_stochastic_recipes_repeat_their_random_bits(recipe):
    plain, recomputed = stochastic_steps(recipe, False), stochastic_steps(recipe, True)
    for one, other in zip(plain, recomputed, strict=True):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    weight = "blocks.0.attn.qkv.weight"
    assert not torch.equal(plain[0][weight], plain[1][weight])  # the bits do differ between micro-batches


@pytest.fixture
def one_rank(tmp_path):
    """A group of this process alone, which passes for two ranks where only the mode is chosen."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield Dist(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [
        ("none", False),
        ("fsdp", True),
        pytest.param("none", True, marks=pytest.mark.slow),  # each by itself stands above: 7 s apiece
        pytest.param("fsdp", False, marks=pytest.mark.slow),
    ],
)
def test_blocks_share_their_compiled_graph(one_rank, monkeypatch, mode, recompute):
    """Four graphs of a model of three blocks: the embedding, the first block (nothing to add yet), the others, the last
    norm. Recomputed blocks too: Dynamo doesn't look into checkpoint, so what it wraps must be compiled already."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("training.start.build.choose", lambda *_: mode)
    torch.compiler.reset()
    backend.use("reference", "cpu")
    config = compose(["compile=true", f"recompute={recompute}"]).config
    plan = plan_of(Llama(CONFIG), config.quant)
    counters.clear()
    loss, parallel, _ = build_loss(config, CONFIG, plan, torch.zeros(3, dtype=torch.int64), one_rank)
    with parallel.accumulate(True):
        loss(torch.zeros(2, 17, dtype=torch.int64)).backward()
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("layers", [2, 4])
def test_fewer_tensors_are_kept(layers):
    def kept(recompute: bool) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        config = LlamaConfig(layers=layers, width=64, heads=2, hidden=96, vocab_size=61, max_seq_len=16)
        model = Llama(config, torch.float32)
        model.init_weights(0)
        if recompute:
            recompute_blocks(model)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(2, 16, dtype=torch.int64))
        return total

    assert kept(True) < kept(False) / 3
