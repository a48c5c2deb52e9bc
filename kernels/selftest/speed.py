"""How long a Llama block's linear layers take, forward and backward, against BF16 and FP8, beside published figures.

What is timed is the arithmetic of the layer: quantize (amax included), three GEMMs; no optimizer, no weight update. FP8
is per tensor, current scaling, with torch._scaled_mm. Published: docs/published.md#6-speed (Quartet II's notebook log,
RTX 5090;
amax given from outside there), forward and forward + backward over BF16.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import build
from kernels import gemm as gemms
from kernels import quantize as ops
from kernels.gemm import cutlass_impl
from kernels.gemm.packed import rules
from kernels.gemm.packed.operands import prepare
from kernels.philox import Draw
from kernels.selftest.gemms import exact_operand
from kernels.selftest.shapes import PUBLISHED, PUBLISHED_5090, Layers
from kernels.selftest.shapes import gemms as gemms_of
from kernels.spec import NVFP4_SCALES, QuantSpec

TOKENS = 16 * 2048
PUBLISHED_B200 = "gains start at 3B, up to 2.5x forward + backward at 22B"
FOUR_OVER_SIX = QuantSpec.resolve("e2m1", NVFP4_SCALES, select="four_over_six")
MS_EDEN = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden")
ROTATION = 128
FP8_MAX = 448.0
REPEATS = 15  # of which the median is taken


def median_ms(function: Callable[[], object]) -> float:
    """Median milliseconds on the GPU of one call, after three that are not counted."""
    times = []
    for i in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def fp8_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [N, K] transposed, both cast to E4M3 with one scale each."""
    scales = [t.abs().amax().float() / FP8_MAX for t in (a, b)]
    left, right = ((t / s).to(torch.float8_e4m3fn).contiguous() for t, s in zip((a, b), scales, strict=True))
    return torch._scaled_mm(left, right.t(), scales[0], scales[1], out_dtype=out_dtype)


class Quartet2:
    """The recipe quartet2 of one layer, spelled out with this package's operations and the back ends in IMPL."""

    def __init__(self, device: torch.device):
        self.rng, self.layer = torch.tensor([1, 1, 0], device=device), torch.tensor(0, device=device)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        want = (gemms.wants(), "packed") if gemms.wants() != "packed" else ("packed",)
        qx, qw = (ops.quantize(t, FOUR_OVER_SIX, 1, ops.amax(t, 1), want=want) for t in (x, w))
        self.kept = qx.packed, qw.packed
        return gemms.gemm(qx, qw, "fprop", 1.0, torch.bfloat16)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = self.kept
        dx = self.product(dy, w, 1, 1, 2, "dgrad", torch.bfloat16)
        return dx, self.product(dy, x, 0, 2, 4, "wgrad", torch.float32)

    def product(self, dy, other, axis: int, gemm: int, slot: int, kind: str, out_dtype: torch.dtype) -> Tensor:
        signs = ops.rht_signs(self.rng, self.layer, gemm, ROTATION)
        draws = [Draw(self.rng, self.layer, number) for number in (slot, slot + 1)]
        want = (gemms.wants(),)
        a = ops.quantize(dy, MS_EDEN, axis, ops.amax(dy, axis, signs), signs, draws[0], want)
        b = ops.requantize(other, MS_EDEN, 0, ops.amax_packed(other, 0, signs), signs, draws[1], want)
        return gemms.gemm(a, b, kind, 1 / ROTATION, out_dtype)


def runs(x: Tensor, w: Tensor, dy: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Recipe -> (forward, backward) of one linear layer."""
    layer, bf16, fp32 = Quartet2(x.device), torch.bfloat16, torch.float32
    return {
        "bf16": (lambda: x @ w.t(), lambda: (dy @ w, torch.mm(dy.t(), x, out_dtype=fp32))),
        "fp8": (
            lambda: fp8_product(x, w, bf16),
            lambda: (fp8_product(dy, w.t(), bf16), fp8_product(dy.t(), x.t(), fp32)),
        ),
        "quartet2": (lambda: layer.forward(x, w), lambda: layer.backward(dy)),
    }


def time_layers(layers: Layers) -> dict[str, tuple[float, float]]:
    """Recipe -> (forward ms, forward + backward ms), summed over the four linear layers of a block."""
    times = {"bf16": (0.0, 0.0), "fp8": (0.0, 0.0), "quartet2": (0.0, 0.0)}
    for n, k in layers.linears:
        operands = (torch.randn(shape, device="cuda").bfloat16() for shape in ((TOKENS, k), (n, k), (TOKENS, n)))
        for name, (forward, backward) in runs(*operands).items():
            first, second = median_ms(forward), median_ms(backward)
            times[name] = times[name][0] + first, times[name][1] + first + second
    return times


def gemm_lines() -> list[str]:
    """TFLOP/s of the kernels alone on the largest published layers, each tile, and which one the rule picks."""
    arch = rules.ARCHS[torch.cuda.get_device_capability()]
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    lines = ["GEMM alone (published: 1160 to 1240 TFLOP/s on a 5090, 4720 to 5342 on a B200):"]
    for kind, m, n, k in gemms_of(PUBLISHED[-1], TOKENS):
        output = "f32" if kind == "wgrad" else "bf16"
        a, b = (prepare(exact_operand(rows, k, 0, "cuda")) for rows in (m, n))
        d = torch.empty(m, n, dtype=torch.float32 if kind == "wgrad" else torch.bfloat16, device="cuda")
        arguments = a.codes, a.scales, b.codes, b.scales, torch.ones((), device="cuda"), d, k
        names = [name for name, unit in build.UNITS.items() if unit.arch == arch and name.endswith(output)]
        speeds = {name: 2e-9 * m * n * k / median_ms(partial(cutlass_impl.launch, name, *arguments)) for name in names}
        chosen = rules.kernel_name(arch, m, n, output, sm_count)
        cells = ", ".join(f"{name}{'*' if name == chosen else ''} {speed:.0f}" for name, speed in speeds.items())
        lines.append(f"  {kind} {m} x {n} x {k}: {cells} TFLOP/s (* = the rule's choice)")
    return lines


def table() -> list[str]:
    """The lines to print: milliseconds and speed-up over BF16 of every published size, and what was published."""
    lines = [
        f"speed: linear layers of one block, {TOKENS} tokens, ms forward | forward + backward; x = over BF16",
        f"published on B200: {PUBLISHED_B200}",
    ]
    for layers in PUBLISHED:
        times = time_layers(layers)
        base = times["bf16"]
        cells = [
            f"{name} {ms[0]:.2f} | {ms[1]:.2f} ms ({base[0] / ms[0]:.2f}x | {base[1] / ms[1]:.2f}x)"
            for name, ms in times.items()
        ]
        (speedup_f, speedup_t), _ = PUBLISHED_5090[layers.name]
        lines.append(f"{layers.name:5} {'; '.join(cells)}; published on a 5090: {speedup_f}x | {speedup_t}x")
    return lines
