"""The compiled GEMM kernels, as far as a machine without a Blackwell GPU can look: `make kernels-check`.

Compiles every kernel that the cache lacks: about a minute and 5 GB each on an idle core.
"""

import itertools

import pytest
import torch

from kernels import build, sass
from kernels.gemm import cutlass_impl
from kernels.gemm.packed import rules

pytestmark = [
    pytest.mark.kernels_build,
    pytest.mark.skipif(
        build.cannot_build() is not None and not all(map(build.is_built, build.UNITS.values())),
        reason=str(build.cannot_build()),
    ),
]
GEMMS = [unit for unit in build.UNITS.values() if unit.arch != "host"]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(params=GEMMS, ids=lambda unit: unit.name)
def unit(request):
    return request.param


def test_every_output_has_a_kernel_on_every_architecture():
    chosen = {
        rules.kernel_name(arch, m, 4096, output, 148)
        for arch, output, m in itertools.product(rules.ARCHS.values(), rules.OUTPUT_BYTES, (128, 65536))
    }
    assert chosen == {unit.name for unit in GEMMS}


def test_machine_code_holds_the_block_scaled_tensor_core_instruction(unit):
    count = sass.block_scaled_count(build.build(unit), unit.arch)
    print(f"{unit.name}: {count} x {sass.BLOCK_SCALED[unit.arch]}; {build.record(unit)}")
    assert count > 0


def test_two_sm_kernels_use_the_pair_instruction_and_the_others_do_not(unit):
    pairs = sum(count for name, count in sass.opcodes(build.build(unit)).items() if name.startswith("UTCOMMA.2CTA"))
    assert (pairs > 0) == ("2sm" in unit.name)


def test_can_implement_agrees_with_our_shape_rule(unit):
    kernel = cutlass_impl.library(unit.name)
    output = unit.name.rsplit("_", 1)[1]
    extents = [1, 2, 4, 7, 8, 12, 16, 31, 100, 128, 200, 256, 1000, 4096]
    contractions = [16, 32, 48, 64, 96, 100, 128, 160, 176, 256, 272, 1024, 4096]
    disagree = [
        (m, n, k)
        for m, n, k in itertools.product(extents, extents, contractions)
        if (kernel.nibble_gemm_can_implement(m, n, k) == 0) != (rules.shape_error(m, n, k, output) is None)
    ]
    assert disagree == []


@WITHOUT_GPU
def test_without_a_gpu_a_launch_returns_an_error_and_the_process_lives(unit):
    kernel = cutlass_impl.library(unit.name)
    arguments = [None] * 6 + [128, 128, 128, None, 1 << 20, 0, 148, None]
    error = kernel.nibble_gemm_run(*arguments)
    message = kernel.nibble_gemm_error_string(error).decode()
    assert error >= 1000, message  # CUDA's error, not CUTLASS's
    assert "CUDA" in message and ("driver" in message or "device" in message)


@WITHOUT_GPU
def test_errors_of_shape_and_workspace_come_before_any_cuda_call(unit):
    kernel = cutlass_impl.library(unit.name)
    error = kernel.nibble_gemm_run(*[None] * 6, 128, 128, 48, None, 1 << 20, 0, 148, None)
    assert "Invalid" in kernel.nibble_gemm_error_string(error).decode()
    if kernel.nibble_gemm_workspace_bytes(128, 128, 128, 148):
        error = kernel.nibble_gemm_run(*[None] * 6, 128, 128, 128, None, 0, 0, 148, None)
        assert "workspace" in kernel.nibble_gemm_error_string(error).decode()


def test_workspace_stays_small(unit):
    # The data-parallel scheduler needs none or a few counters; a stream-K workspace would be M * N floats.
    assert cutlass_impl.library(unit.name).nibble_gemm_workspace_bytes(65536, 16384, 4096, 148) <= 1 << 16
