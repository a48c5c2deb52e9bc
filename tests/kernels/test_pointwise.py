"""The hand-written backwards against autograd's of the definition, by Triton's interpreter or on a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.pointwise import reference_impl, triton_impl  # noqa: E402
from kernels.pointwise.measured import MeasuredMaxima  # noqa: E402
from models.llama import rope_table  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and not triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU or TRITON_INTERPRET=1: test_triton_interpreted.py runs it so", allow_module_level=True)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.bfloat16).to(DEVICE).requires_grad_()


def gradients(function, inputs, outputs_gradients) -> list[torch.Tensor]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    asked = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, asked, outputs_gradients)]


def assert_one_rounding_apart(got, expected) -> None:
    """Equal up to FP32 operations in another order: at most one step of BF16, and that seldom; always one step where
    the interpreter truncates what a GPU rounds (docs/kernels.md#5-triton)."""
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        if ON_GPU and ours.dtype == torch.bfloat16:
            assert (ours != theirs).double().mean() < 0.01


def test_compiled_gradients_are_the_eager_ones():
    """Dynamo cuts gradients where a forward returns an alias of what it saved: every output must pass its gradient."""
    table, weight = rope_table(8, 16, 1e4).to(DEVICE), torch.ones(48, device=DEVICE, requires_grad=True)

    def both(x, qkv):
        total, y = triton_impl.add_norm(x, x.to(torch.bfloat16), weight, 1e-5, torch.bfloat16)
        total, y = triton_impl.add_norm(total, y, weight, 1e-5, torch.bfloat16)
        q, k, v = triton_impl.rope_heads(qkv, table, 1)
        z = triton_impl.turn_norm(qkv.unflatten(-1, (3, 16)), table, 1e-5).float() * torch.arange(16, device=DEVICE)
        return (total + y.float() * 2).sum() + (q * 2 + k * 3 + v * 5).float().sum() + z.sum()

    inputs = [bf16(8, 48).detach().float().requires_grad_(), bf16(1, 8, 48, seed=1)]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    eager, traced = (torch.autograd.grad(f(*inputs), [*inputs, weight]) for f in (both, compiled))
    for ours, theirs in zip(traced, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(24, 80), (2, 9, 512)])
def test_swiglu(shape):
    gate_up, dh = bf16(*shape), bf16(*shape[:-1], shape[-1] // 2, seed=1).detach()
    got = gradients(triton_impl.swiglu, [gate_up], [dh])
    assert_one_rounding_apart(got, gradients(reference_impl.swiglu, [gate_up], [dh]))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_rope_heads(heads, transposed):
    batch, length, head_dim = 2, 7, 16
    table = rope_table(12, head_dim, 1e4).to(DEVICE)
    qkv = bf16(batch, length, 3 * heads * head_dim)
    grads = [bf16(batch, heads, length, head_dim, seed=i).detach() for i in (1, 2, 3)]
    if transposed:  # as attention gives them: the heads beside the channels
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    got = gradients(triton_impl.rope_heads, [qkv, table, heads], grads)
    assert_one_rounding_apart(got, gradients(reference_impl.rope_heads, [qkv, table, heads], grads))


@pytest.mark.parametrize("transposed", [False, True])
def test_turn_norm(transposed):
    batch, length, heads, head_dim = 2, 7, 3, 16
    table = rope_table(12, head_dim, 1e4).to(DEVICE)
    x, dy = bf16(batch, length, heads, head_dim), bf16(batch, length, heads, head_dim, seed=1).detach()
    if transposed:
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    got = gradients(triton_impl.turn_norm, [x, table, 1e-6], [dy])
    for ours, theirs in zip(got, gradients(reference_impl.turn_norm, [x, table, 1e-6], [dy]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)  # both round what is turned, autograd dy, too
    if ON_GPU:
        assert (got[0] != reference_impl.turn_norm(x, table, 1e-6)).double().mean() < 0.01


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(5, 48), (40, 96)])
def test_add_norm(stream, rows, width, monkeypatch):
    monkeypatch.setattr(triton_impl, "NORM_PROGRAMS", 8)
    monkeypatch.setattr(triton_impl, "NORM_TILE", 256)
    residual = bf16(rows, width).detach().to(stream).requires_grad_()
    branch, weight = bf16(rows, width, seed=1), (1 + bf16(width, seed=2).detach().float()).requires_grad_()
    grads = [bf16(rows, width, seed=3).detach().to(stream), bf16(rows, width, seed=4).detach()]
    inputs = [residual, branch, weight, 1e-5, torch.bfloat16]
    total, y, *got = gradients(triton_impl.add_norm, inputs, grads)
    total_, y_, *expected = gradients(reference_impl.add_norm, inputs, grads)
    assert torch.equal(total, total_) and torch.equal(y, y_)
    if stream == torch.bfloat16:  # autograd rounds the norm's part before it adds; ours rounds the sum once
        torch.testing.assert_close(got[0], expected[0], rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-3)
    else:
        torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-3)
        assert_one_rounding_apart(got[:2], expected[:2])


def cases():
    """(operator, its measured form, arguments, index of the output that is measured)"""
    nibble = torch.ops.nibble
    flat = [bf16(9, 48, seed=i).detach() for i in range(3)]
    norm = [flat[0].float(), flat[1][:, :1].float(), flat[2][0].float(), flat[1].float(), flat[2]]
    heads = [bf16(2, 3, 7, 16, seed=i).detach() for i in (1, 2, 3)]
    return [
        (nibble.swiglu_backward, nibble.swiglu_backward_measured, [flat[0], torch.cat(flat[1:], 1)], 0),
        (nibble.rope_backward, nibble.rope_backward_measured, [*heads, rope_table(12, 16, 1e4).to(DEVICE)], 0),
        (nibble.norm_backward, nibble.norm_backward_measured, norm, 1),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_what_is_measured_while_written_is_the_maximum(number, bad):
    operator, measured, arguments, index = cases()[number]
    if bad is not None:
        arguments[2 if number == 1 else -1].view(-1)[-1] = bad
    plain, (*outputs, largest) = operator(*arguments), measured(*arguments)
    plain = plain if isinstance(plain, tuple) else (plain,)
    for one, other in zip(plain, outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(largest.amax(), plain[index].abs().amax(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", range(3))
def test_a_compiled_graph_measures_what_it_would_read_again(number):
    from torch.fx.experimental.proxy_tensor import make_fx

    operator, measured, arguments, index = cases()[number]

    def consumer(*arguments):
        made = operator(*arguments)
        out = made[index] if isinstance(made, tuple) else made
        rows = out.flatten(0, -2)
        # For each axis of a quantizer; the last one is no maximum of all.
        return out, rows.abs().amax(-1).amax(), rows.abs().amax(-1).amax(), out.abs().amax(0)

    graph = make_fx(consumer, tracing_mode="fake")(*arguments)
    before = graph(*arguments)
    MeasuredMaxima()(graph.graph)
    graph.recompile()
    targets = [node.target for node in graph.graph.nodes]
    assert measured.default in targets and operator.default not in targets
    for one, other in zip(before, graph(*arguments), strict=True):
        assert torch.equal(one, other)
    magnitudes = [node for node in graph.graph.nodes if node.target is torch.ops.aten.abs.default]
    assert len(magnitudes) == 1
