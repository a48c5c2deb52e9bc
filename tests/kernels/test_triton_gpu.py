"""The Triton quantizers as operators on a GPU: one graph, no recompilation, fakes, NaN. Values: check_fast.py."""

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("triton")
from kernels.philox import Draw
from kernels.quantize import reference_impl, triton_impl
from kernels.spec import FP8_SCALES, HIF4_SCALES, MXFP4_SCALES, NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec

pytestmark = pytest.mark.gpu
RTN_46 = QuantSpec.resolve("e2m1", NVFP4_SCALES, select="four_over_six")
EDEN = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden")
PO4 = QuantSpec.resolve("po4_mix", NVFP4_SCALES)
IF4_EDEN = QuantSpec.resolve("if4", NVFP4_SCALES, rounding="ms_eden")
HIF4 = QuantSpec.resolve("hif4", HIF4_SCALES)
MACRO = QuantSpec.resolve("e2m1", MXFP4_SCALES, rounding="sr", scale_rule="ceil", macro_bits=5)
SQUARE = QuantSpec.resolve("e2m1", NVFP4_SQUARE_SCALES)
E5M2 = QuantSpec.resolve("e5m2", FP8_SCALES[0])
BOTH = (("values",), ("values",))


def randn(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(0)
    return torch.randn(rows, columns, device="cuda", generator=generator).to(torch.bfloat16)


def layer_pass(x: torch.Tensor, dy: torch.Tensor, rng: torch.Tensor, layer: torch.Tensor) -> list[torch.Tensor]:
    """What quartet2 does with X and dY in one layer, without the GEMMs."""
    signs = [triton_impl.rht_signs(rng, layer, gemm, 128, False) for gemm in (1, 2)]
    q = triton_impl.quantize(x, RTN_46, 1, triton_impl.amax(x, 1, None, False), None, None, ("values", "packed"))
    again = triton_impl.amax_packed(q.packed, 0, signs[1], False)
    x_again = triton_impl.requantize(q.packed, EDEN, 0, again, signs[1], Draw(rng, layer, 5), ("values",))
    draws = Draw(rng, layer, 2), Draw(rng, layer, 4)
    dgrad, wgrad = triton_impl.quantize_both(dy, (EDEN, EDEN), tuple(signs), draws, BOTH)
    return [q.values, q.scale, x_again.values, x_again.scale, dgrad.values, dgrad.scale, wgrad.values, wgrad.scale]


def test_a_layer_traces_into_one_graph_that_serves_every_step_and_layer():
    x, dy = randn(256, 384), randn(256, 128)
    rng, layer = torch.tensor([7, 0, 0], device="cuda"), torch.tensor(0, device="cuda")
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer_pass, fullgraph=True, backend=counter)
    seen = []
    for step, number in ((1, 3), (2, 3), (2, 4)):
        rng[1], layer = step, torch.tensor(number, device="cuda")
        eager = layer_pass(x, dy, rng, layer)
        for got, expected in zip(compiled(x, dy, rng, layer), eager, strict=True):
            assert torch.equal(got, expected)
        seen.append(eager[4])
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def other_forms(x: torch.Tensor, rng: torch.Tensor, layer: torch.Tensor) -> list[torch.Tensor]:
    """Held by four tables and quantized again by IF4; MXFP4's and HiFloat4's held and read back."""
    signs = triton_impl.rht_signs(rng, layer, 2, 128, False)
    amax = triton_impl.amax(x, 1, None, False)
    q = triton_impl.quantize(x, PO4, 1, amax, None, None, ("values", "packed"))
    again = triton_impl.amax_packed(q.packed, 0, signs, False)
    made = triton_impl.requantize(q.packed, IF4_EDEN, 0, again, signs, Draw(rng, layer, 5), ("values",))
    out = [q.values, q.packed.members, made.values, made.scale]
    for spec in (HIF4, MACRO):
        held = triton_impl.quantize(x, spec, 0, amax, None, Draw(rng, layer, 5), ("values", "packed"))
        out += [held.values, triton_impl.dequantize(held.packed, 0).values]
        assert out[-1].shape == held.values.shape
    return out


def test_other_forms_trace_into_one_graph():
    x, rng, layer = randn(256, 384), torch.tensor([7, 0, 0], device="cuda"), torch.tensor(0, device="cuda")
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled, eager = torch.compile(other_forms, fullgraph=True, backend=counter), other_forms(x, rng, layer)
    for got, expected in zip(compiled(x, rng, layer), eager, strict=True):
        assert torch.equal(got, expected)
    assert counter.frame_count == 1
    assert torch.equal(eager[4], eager[5]) and torch.equal(eager[6], eager[7])


def test_fake_implementations_give_the_shapes_of_the_kernels():
    x, amax = randn(128, 256), torch.tensor(4.0, device="cuda")
    q = triton_impl.quantize(x, SQUARE, 1, amax, None, None, ("values", "packed"))
    po4 = triton_impl.quantize(x, PO4, 1, amax, None, None, ("packed",)).packed
    nibble = torch.ops.nibble
    for op, arguments in (
        (
            nibble.rht_signs.default,
            (torch.tensor([1, 2, 3], device="cuda"), torch.tensor(4, device="cuda"), 1, 32, True),
        ),
        (nibble.amax.default, (x, None, None, torch.ones(16, device="cuda"))),
        (nibble.unpack_values.default, (q.packed.codes, q.packed.block_scales.view(torch.uint8), 0)),
        (nibble.unpack_form.default, (po4.codes, po4.block_scales.view(torch.uint8), po4.members, 0, PO4.key)),
        (nibble.quantize.default, (x, None, None, amax, *[None] * 3, 1, PO4.key, 0, True, True)),
        (nibble.quantize_fp8.default, (x, amax, 0, 448.0, False, False, True)),
        (nibble.quantize_fp8_both.default, (x, amax, amax, [448.0] * 2, [False] * 2, [False] * 2, [True] * 2)),
        (nibble.quantize_square.default, (x, amax, None, None, 0, SQUARE.key, 1, True, True)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_inf_give_a_nan_scale(axis: int, bad: float):
    x = randn(256, 256)
    x[17, 33] = bad
    signs = torch.ones(128, device="cuda")
    for sign in (None, signs):
        amax = triton_impl.amax(x, axis, sign, False)
        assert not amax.isfinite()
        assert triton_impl.quantize(x, RTN_46, axis, amax, sign, None, ("values",)).scale.isnan()
    assert triton_impl.quantize(x, E5M2, axis, amax, None, None, ("values",)).scale.isnan()


def test_a_rotation_that_does_not_fit_the_tile_is_refused():
    x = randn(256, 256)
    with pytest.raises(ValueError, match="rotates by 16, 32, 64 or 128, not 256"):
        triton_impl.amax(x, 1, torch.ones(256, device="cuda"), False)


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_fp8_bytes_are_the_references_for_every_bf16(grid):
    """Converted by an instruction on this GPU: subnormals, ties, saturation, minus zero and what becomes it."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()].view(-1, 256).cuda()
    spec, largest = QuantSpec.resolve(grid, FP8_SCALES[0]), x.abs().amax().float()
    for amax in (largest, largest.new_tensor(448.0), largest.new_tensor(3.7)):  # the last ones saturate
        for axis in (1, 0):
            made = triton_impl.quantize(x, spec, axis, amax, None, None, ("values",))
            wanted = reference_impl.quantize(x.cpu(), spec, axis, amax.cpu(), None, None, ("values",))
            got, expected = made.values.float().cpu(), wanted.values.float()
            assert torch.equal(got, expected) and not (got.signbit() & (got == 0)).any()
