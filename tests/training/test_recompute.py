"""Activation checkpointing changes memory, not one bit of the result."""

import pytest
import torch

from models.llama import Llama, LlamaConfig
from training.recompute import recompute_blocks

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
