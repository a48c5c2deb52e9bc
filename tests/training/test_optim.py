import pytest
import torch

from models.llama import Llama, LlamaConfig
from training.config import OptimSection
from training.optim.groups import build_optimizer, clip_gradients, set_rates
from training.optim.schedule import Schedule

CONFIG = LlamaConfig(layers=2, width=64, heads=4, hidden=128, vocab_size=97, max_seq_len=32)


def model() -> Llama:
    out = Llama(CONFIG)
    out.init_weights(0)
    return out


def test_weight_decay_applies_to_the_blocks_linear_weights_only():
    net = model()
    optimizer = build_optimizer(net, OptimSection(betas=[0.8, 0.99], eps=1e-5), lr=1e-3)
    names = {parameter: name for name, parameter in net.named_parameters()}
    decay, no_decay = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    linears = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
    assert decay == {f"blocks.{i}.{linear}.weight" for i in range(2) for linear in linears}
    assert {"embed.weight", "lm_head.weight", "norm.weight", "blocks.1.mlp_norm.weight"} <= no_decay
    assert decay | no_decay == set(names.values()) and not decay & no_decay
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.99), 1e-5, 1e-3)


def test_one_step_is_adamw_by_hand():
    net = model()
    optimizer = build_optimizer(net, OptimSection(), lr=1e-3)
    set_rates([optimizer], Schedule("wsd", 2e-3, 10, 0, 0.0, 0.0), 0)
    decayed, plain = net.blocks[0].attn.qkv.weight, net.lm_head.weight
    before = [p.detach().clone() for p in (decayed, plain)]
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    # First step: both moments are bias-corrected to the gradient itself, so the update is lr * sign(g).
    for parameter, old, decay in ((decayed, before[0], 0.1), (plain, before[1], 0.0)):
        torch.testing.assert_close(parameter.detach(), old * (1 - 2e-3 * decay) - 2e-3, rtol=0, atol=1e-8)


def test_clip_scales_to_the_maximal_norm_and_returns_the_norm_before():
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))])
    net[0].grad, net[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(net, 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(net[0].grad, torch.tensor([0.6, 0.0, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(net[1].grad, torch.tensor([0.8]), rtol=1e-5, atol=0)
    assert clip_gradients(net, None).item() == pytest.approx(1.0, rel=1e-5)


def test_no_clipping_still_measures():
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2))])
    net[0].grad = torch.tensor([30.0, 40.0])
    assert clip_gradients(net, None).item() == pytest.approx(50.0)
    assert net[0].grad.tolist() == [30.0, 40.0]
