"""Our layout, number formats and packed GEMM against CUTLASS's and CUDA's own, on the host (csrc/host_checks.cu)."""

import pytest
import torch
from support import FP4_RECIPES

from kernels import backend, build, host_checks
from kernels.formats import minifloat, nibbles, scale_layout
from kernels.gemm.nvfp4 import gemm_nvfp4
from kernels.gemm.packed import operands
from kernels.quantize import reference_impl
from kernels.selftest.probes import probes
from quant import library
from quant.linear import QuantLinear

pytestmark = pytest.mark.skipif(build.cannot_build() is not None, reason=str(build.cannot_build()))

# square, ragged in every extent, tiny
SHAPES = [
    (128, 128, 128),
    (512, 512, 512),
    (256, 384, 1024),
    (100, 96, 64),
    (129, 257, 80),
    (1, 1, 16),
    (7, 16, 32),
    (33, 300, 208),
    (640, 1792, 640),
    (127, 130, 48),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operand", ["a", "b"])
def test_scale_offsets_equal_the_index_map_of_cutlass(operand, shape):
    m, n, k = shape
    rows = m if operand == "a" else n
    offsets, size = host_checks.scale_layout(operand, m, n, k)
    assert torch.equal(scale_layout.swizzled_offsets(rows, k // 16), offsets)
    assert scale_layout.swizzled_size(rows, k // 16) == size


@pytest.mark.parametrize("by", ["cutlass", "cuda"])
def test_e2m1_codes_equal_the_host_converters(by):
    x = probes(minifloat.E2M1)
    codes = nibbles.encode(minifloat.round_nearest(x, minifloat.E2M1), x.signbit())
    assert torch.equal(codes, host_checks.encode(x, "e2m1", by))


@pytest.mark.parametrize(("format", "by"), [("e4m3", "cutlass"), ("e4m3", "cuda"), ("ue4m3", "cutlass")])
def test_e4m3_scales_equal_the_host_converters(format, by):
    x = probes(minifloat.E4M3)
    x = x[x > 0]  # scales; the unsigned type has no sign to compare
    codes = minifloat.round_nearest(x, minifloat.E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes, host_checks.encode(x, format, by))


def test_all_codes_decode_to_the_values_of_cutlass():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(nibbles.decode(codes), host_checks.decode(codes, "e2m1"))
    scales = torch.arange(127, dtype=torch.uint8)  # 127 is NaN; scales have no sign
    assert torch.equal(scales.view(torch.float8_e4m3fn).to(torch.float32), host_checks.decode(scales, "ue4m3"))


TOKENS, OUT, IN = 256, 384, 176  # contractions of wgrad, dgrad and fprop; 176 is padded to 192


class Recorder:
    """A GEMM back end of packed operands that emulates, and keeps what it was given."""

    WANTS = "packed"

    def __init__(self):
        self.calls = {}

    def gemm(self, a, b, kind, alpha_const, out_dtype):
        self.calls[kind] = a.packed, b.packed, alpha_const
        return gemm_nvfp4(a.packed, b.packed, alpha_const, out_dtype, kind)


def packed_operands(recipe: str, monkeypatch) -> dict:
    """kind -> (a, b, alpha_const): what a layer of this recipe gives its three GEMMs."""
    recorder = Recorder()
    monkeypatch.setitem(backend.IMPL, "quantize", reference_impl)
    monkeypatch.setitem(backend.IMPL, "gemm", recorder)
    torch.manual_seed(0)
    layer = QuantLinear(torch.nn.Linear(IN, OUT, bias=False), library.load(recipe), 5, torch.tensor([7, 3, 1]))
    x = torch.randn(TOKENS, IN).to(torch.bfloat16).requires_grad_()
    layer(x).backward((torch.randn(TOKENS, OUT) * 1e-4).to(torch.bfloat16))
    return recorder.calls


@pytest.mark.parametrize("recipe", FP4_RECIPES)
def test_packed_and_swizzled_operands_multiply_in_cutlass_as_in_our_emulation(recipe, monkeypatch):
    calls = packed_operands(recipe, monkeypatch)
    assert sorted(calls) == ["dgrad", "fprop", "wgrad"]
    for kind, (a, b, alpha_const) in calls.items():
        emulated = gemm_nvfp4(a, b, alpha_const, torch.float32, kind)
        left, right = operands.prepare(a), operands.prepare(b, scale_layout.COLUMN_MULTIPLE)
        alpha = float((a.global_scale * b.global_scale) * alpha_const)
        host = host_checks.reference_gemm(left.codes, left.scales, right.codes, right.scales, alpha)[:, : right.rows]
        # Both sum K exact products in FP32, each in its own order: K 2^-24 sum |a||b| each, and one rounding by alpha.
        magnitude = (a.values().abs().double() @ b.values().abs().double().t()) * alpha
        bound = 2 * (a.shape[1] + 1) * 2.0**-24 * magnitude
        assert emulated.abs().max() > 0
        assert ((host - emulated).abs() <= bound).all(), f"{kind}: {((host - emulated).abs() / bound).max()} bounds"
