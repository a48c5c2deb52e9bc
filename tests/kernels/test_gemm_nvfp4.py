"""gemm_nvfp4 where no GPU is needed: the emulated product, preparation of operands, routing, rules, fakes, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import backend, build
from kernels.formats import scale_layout
from kernels.formats.nibbles import unpack
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm import cutlass_impl, packed_emulated_impl, scaled_mm_impl
from kernels.gemm.nvfp4 import gemm_nvfp4
from kernels.gemm.packed import operands, rules
from kernels.quantize import Quantized, reference_impl
from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec

RTN = QuantSpec.resolve("e2m1", NVFP4_SCALES)
SQUARE = QuantSpec.resolve("e2m1", NVFP4_SQUARE_SCALES)


def packed(rows: int, k: int, seed: int, spec: QuantSpec = RTN) -> NVFP4Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    amax = reference_impl.amax(x, 1, None, False)
    return reference_impl.quantize(x, spec, 1, amax, None, None, ("packed",)).packed


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_emulated_product_is_the_product_of_the_dequantized_operands(kind, out_dtype):
    a, b = packed(48, 80, 0), packed(32, 80, 1, SQUARE) if kind == "dgrad" else packed(33, 80, 1)
    exact = a.values().double() @ b.values().double().t() * (a.global_scale * b.global_scale / 8).double()
    magnitude = (
        a.values().abs().double() @ b.values().abs().double().t() * (a.global_scale * b.global_scale / 8).double()
    )
    # FP32 sums of 80 exact products, one rounding by alpha; to BF16 one more of at most 2^-8 of the result.
    bound = 81 * 2.0**-24 * magnitude + (2.0**-8 * exact.abs() if out_dtype == torch.bfloat16 else 0)
    d = gemm_nvfp4(a, b, 1 / 8, out_dtype, kind)
    assert d.dtype == out_dtype
    assert ((d.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("rows", "k", "spec"), [(48, 80, RTN), (7, 16, RTN), (128, 64, RTN), (48, 80, SQUARE)])
def test_prepared_operand_holds_the_same_numbers_and_zero_padding(rows, k, spec):
    operand = packed(rows, k, 2, spec)
    ready = operands.prepare(operand, scale_layout.COLUMN_MULTIPLE)
    padded_rows, padded_k = ready.codes.shape[0], ready.codes.shape[1] * 2
    assert (padded_rows, padded_k) == (scale_layout.round_up(rows, 8), scale_layout.round_up(k, 32))
    offsets = scale_layout.swizzled_offsets(padded_rows, padded_k // 16)
    scales = ready.scales.view(torch.uint8)[offsets].view(torch.float8_e4m3fn)
    again = NVFP4Tensor(ready.codes, scales, operand.global_scale).values()
    assert torch.equal(again[:rows, :k], operand.values())
    codes = unpack(ready.codes)
    assert not codes[rows:].any() and not codes[:, k:].any()
    assert not scales.to(torch.float32)[rows:].any() and not scales.to(torch.float32)[:, k // 16 :].any()


def test_shape_rule_of_the_kernels():
    assert rules.shape_error(100, 96, 64, "bf16") is None
    assert rules.shape_error(1, 4, 32, "f32") is None
    assert "N=12" in rules.shape_error(256, 12, 64, "bf16")
    assert "N=2" in rules.shape_error(256, 2, 64, "f32")
    assert "K=48" in rules.shape_error(256, 64, 48, "bf16")


def test_tile_choice():
    # 148 SMs = 74 pairs. Llama 7B, 32768 tokens: 128 x 16 tiles of 256: every pair has work.
    assert rules.kernel_name("100f", 32768, 4096, "bf16", 148) == "nvfp4_sm100_2sm_bf16"
    assert rules.kernel_name("100f", 2048, 2304, "f32", 148) == "nvfp4_sm100_1sm_f32"  # 72 tiles < 74 pairs
    assert rules.kernel_name("100f", 2304, 2304, "f32", 148) == "nvfp4_sm100_2sm_f32"  # 81 tiles
    # The rule turns where the last pair of 148 SMs gets its tile; a ragged tile counts as one.
    assert rules.kernel_name("100f", 74 * 256, 256, "bf16", 148) == "nvfp4_sm100_2sm_bf16"
    assert rules.kernel_name("100f", 73 * 256 + 1, 248, "bf16", 148) == "nvfp4_sm100_2sm_bf16"
    assert rules.kernel_name("100f", 73 * 256, 256, "bf16", 148) == "nvfp4_sm100_1sm_bf16"
    assert rules.kernel_name("100f", 1, 8, "bf16", 148) == "nvfp4_sm100_1sm_bf16"
    assert rules.kernel_name("120f", 32768, 4096, "bf16", 170) == "nvfp4_sm120_bf16"


def fake_cuda(operand: NVFP4Tensor) -> NVFP4Tensor:
    """The same shapes as fake CUDA tensors, inside a FakeTensorMode."""
    return NVFP4Tensor(
        *(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in operand.tensors()),
    )


@pytest.mark.parametrize("backend_name", ["cutlass", "scaled_mm"])
@pytest.mark.parametrize(("m", "n", "k"), [(256, 128, 64), (100, 30, 48), (1, 1, 16)])
def test_hardware_back_ends_trace_with_fake_tensors(backend_name, m, n, k):
    a, b = packed(m, k, 0), packed(n, k, 1)
    with FakeTensorMode():
        for out_dtype in (torch.bfloat16, torch.float32):
            d = gemm_nvfp4(fake_cuda(a), fake_cuda(b), 0.5, out_dtype, "dgrad", backend_name)
            assert (tuple(d.shape), d.dtype, d.device.type) == ((m, n), out_dtype, "cuda")


def test_custom_operator_traces_on_meta_and_refuses_the_cpu():
    a, b = operands.prepare(packed(16, 32, 0)), operands.prepare(packed(8, 32, 1))
    arguments = a.codes, a.scales, b.codes, b.scales, torch.tensor(1.0)
    d = cutlass_impl.gemm_op(*(t.to("meta") for t in arguments), torch.float32)
    assert (tuple(d.shape), d.dtype) == ((16, 8), torch.float32)
    with pytest.raises(NotImplementedError, match="CPU"):
        cutlass_impl.gemm_op(*arguments, torch.float32)


def test_compiled_graph_holds_the_operator_once():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def multiply(a_codes, a_scales, b_codes, b_scales, scale):
        a, b = NVFP4Tensor(a_codes, a_scales, scale), NVFP4Tensor(b_codes, b_scales, scale)
        return gemm_nvfp4(a, b, 0.25, torch.bfloat16, "fprop", "cutlass")

    a, b = packed(48, 80, 0), packed(24, 80, 1)
    with FakeTensorMode():
        fake_a, fake_b = fake_cuda(a), fake_cuda(b)
        arguments = fake_a.codes, fake_a.block_scales, fake_b.codes, fake_b.block_scales, fake_a.global_scale
        d = torch.compile(multiply, fullgraph=True, backend=keep)(*arguments)
    assert tuple(d.shape) == (48, 24)
    assert sum("gemm_nvfp4_cutlass" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_scaled_mm_takes_our_layout_as_torch_documents_it():
    # torch's own shape function checks sizes of codes and swizzled scales; a wrong one must be refused there.
    a, b = packed(48, 64, 0), packed(32, 64, 1)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="scale_a"):
        fake = fake_cuda(a)
        broken = operands.HardwareOperand(fake.codes, torch.empty(3, dtype=torch.float8_e4m3fn, device="cuda"), 48)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaled_mm_impl, "prepare", lambda *_: broken)
            gemm_nvfp4(fake, fake_cuda(b), 1.0, torch.bfloat16, "fprop", "scaled_mm")


def test_reasons_for_unavailability_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert backend.unavailable("gemm", "cutlass") == "needs a CUDA GPU, torch sees none"
    assert backend.unavailable("gemm", "scaled_mm") == "needs a CUDA GPU, torch sees none"
    with pytest.raises(RuntimeError, match="'cutlass' can't be used: needs a CUDA GPU"):
        backend.use({"gemm": "cutlass"})


def reason_on(monkeypatch, capability, built=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(build, "is_built", lambda _: built)
    return cutlass_impl.unavailable()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (11, 0), (10, 1), (13, 0)])
def test_architectures_without_a_kernel_say_so(monkeypatch, capability):
    reason = reason_on(monkeypatch, capability)
    assert "needs compute capability 10.0, 10.3, 12.0, 12.1" in reason
    assert "this is {}.{}".format(*capability) in reason


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0), (12, 1)])
def test_every_blackwell_capability_runs_the_packed_kernels(monkeypatch, capability):
    """B200, B300, RTX 5090 and RTX PRO, GB10: the code of their family, not a fallback."""
    reason = reason_on(monkeypatch, capability)
    assert reason is None or "capability" not in reason
    family = {10: "100f", 12: "120f"}[capability[0]]
    name = rules.kernel_name(rules.ARCHS[capability], 4096, 4096, "bf16", 148)
    assert build.UNITS[name].arch == family


def test_routing_of_operands():
    a, b = packed(16, 32, 0), packed(16, 32, 1)
    qa, qb = Quantized(None, a.global_scale, a), Quantized(None, b.global_scale, b)
    plain = Quantized(torch.ones(16, 32), None)
    expected = gemm_nvfp4(a, b, 1.0, torch.float32)
    assert torch.equal(packed_emulated_impl.gemm(qa, qb, "fprop", 1.0, torch.float32), expected)
    assert torch.equal(cutlass_impl.gemm(plain, plain, "fprop", 1.0, torch.float32), torch.full((16, 16), 32.0))
    with pytest.raises(ValueError, match="dgrad: the second operand is NVFP4, the first is not"):
        cutlass_impl.gemm(plain, qb, "dgrad", 1.0, torch.float32)


def malformed() -> dict[str, tuple[NVFP4Tensor, str]]:
    good = packed(16, 32, 0)
    codes, scales, scale = good.codes, good.block_scales, good.global_scale
    return {
        "codes dtype": (NVFP4Tensor(codes.to(torch.int32), scales, scale), r"a\.codes: got torch\.int32"),
        "codes rank": (NVFP4Tensor(codes[0], scales, scale), r"a\.codes: .*need uint8 \[rows, K / 2\]"),
        "K of 8": (NVFP4Tensor(codes[:, :4].contiguous(), scales, scale), "K=8 must be a positive multiple of 16"),
        "scales dtype": (NVFP4Tensor(codes, scales.view(torch.uint8), scale), r"a\.block_scales: got torch\.uint8"),
        "scales shape": (NVFP4Tensor(codes, scales[:5], scale), r"need float8_e4m3fn \[16, 2\] or \[1, 2\]"),
        "global scale": (NVFP4Tensor(codes, scales, scale.view(1)), r"a\.global_scale: got torch\.float32 \[1\]"),
        "strided": (NVFP4Tensor(codes.t().contiguous().t(), scales, scale), r"a\.codes: stride .* not row-major"),
        "device": (NVFP4Tensor(codes, scales, scale.to("meta")), "a: codes on cpu"),
    }


@pytest.mark.parametrize("case", malformed())
def test_malformed_operands_are_named(case):
    operand, message = malformed()[case]
    with pytest.raises(ValueError, match=message):
        gemm_nvfp4(operand, packed(16, 32, 1))


def test_disagreeing_arguments_are_named():
    a = packed(16, 32, 0)
    with pytest.raises(ValueError, match=r"a is \[16, 32\] and b is \[16, 48\]"):
        gemm_nvfp4(a, packed(16, 48, 1))
    with pytest.raises(ValueError, match=r"out_dtype=torch\.float16"):
        gemm_nvfp4(a, a, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="backend='cuda'"):
        gemm_nvfp4(a, a, backend="cuda")


def test_misaligned_operands_are_named_before_the_launch():
    a, b = operands.prepare(packed(16, 32, 0)), operands.prepare(packed(8, 32, 1))
    shifted = torch.empty(a.codes.numel() + 1, dtype=torch.uint8)[1:].view_as(a.codes)
    with pytest.raises(ValueError, match="a starts at an address that is not a multiple of 16"):
        cutlass_impl.launch("any", shifted, a.scales, b.codes, b.scales, torch.ones(()), torch.empty(16, 8), 32)
