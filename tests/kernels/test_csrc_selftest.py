"""selftest: it must find faults. Right back ends pass, each kind of broken one is called WRONG."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from kernels import build
from kernels.cross_entropy import reference_impl as loss_reference
from kernels.formats import minifloat, nibbles
from kernels.gemm import packed_emulated_impl
from kernels.gemm import reference_impl as gemm_reference
from kernels.gemm.nvfp4 import BACKENDS
from kernels.quantize import reference_impl
from kernels.selftest import __main__ as selftest
from kernels.selftest import gemms, others, quantizers, shapes, verdicts

SMALL = [("fprop", 33, 40, 208), ("wgrad", 16, 24, 48)]


class Broken:
    """gemm_nvfp4 with a fault put into the operands or the result of the emulated one."""

    def __init__(self, fault):
        self.fault = fault

    def unavailable(self):
        return None

    def gemm_nvfp4(self, a, b, alpha, out_dtype, kind):
        return self.fault(a, b, alpha, out_dtype, kind)


def transposed_block(a, b, alpha, out_dtype, kind):
    scales = a.block_scales.view(torch.uint8).clone()
    scales[:, [0, 1]] = scales[:, [1, 0]]  # two groups' scales exchanged
    return packed_emulated_impl.gemm_nvfp4(
        replace(a, block_scales=scales.view(torch.float8_e4m3fn)), b, alpha, out_dtype, kind
    )


def one_wrong_code(a, b, alpha, out_dtype, kind):
    codes = a.codes.clone()
    codes[-1, -1] ^= 1
    return packed_emulated_impl.gemm_nvfp4(replace(a, codes=codes), b, alpha, out_dtype, kind)


def alpha_after_rounding(a, b, alpha, out_dtype, kind):
    one = torch.ones_like(alpha)
    return (packed_emulated_impl.gemm_nvfp4(a, b, one, out_dtype, kind) * (alpha * 1.01)).to(out_dtype)


def no_alpha(a, b, alpha, out_dtype, kind):
    return packed_emulated_impl.gemm_nvfp4(a, b, torch.ones_like(alpha), out_dtype, kind)


def raises(a, b, alpha, out_dtype, kind):
    raise RuntimeError("error 1000: no kernel image is available")


@pytest.mark.parametrize("fault", [transposed_block, one_wrong_code, alpha_after_rounding, no_alpha, raises])
def test_a_wrong_gemm_is_called_wrong(monkeypatch, fault):
    monkeypatch.setitem(BACKENDS, "cutlass", Broken(fault))
    assert gemms.check_backend("cutlass", SMALL, "cpu").state == verdicts.WRONG


def test_a_right_gemm_in_another_order_passes_within_the_bound(monkeypatch):
    def reordered(a, b, alpha, out_dtype, kind):
        parts = [a.values()[:, i::4] @ b.values()[:, i::4].t() for i in range(4)]
        return ((parts[3] + parts[2]) + (parts[1] + parts[0])).mul(alpha).to(out_dtype)

    monkeypatch.setitem(BACKENDS, "cutlass", Broken(reordered))
    line = gemms.check_backend("cutlass", SMALL, "cpu")
    assert line.state == verdicts.RIGHT, line


class BrokenQuantizer:
    """The reference with a bias: every element is 2 % too small."""

    def __getattr__(self, name):
        return getattr(reference_impl, name)

    def quantize(self, x, spec, axis, amax, signs, draw, want):
        return reference_impl.quantize(x * 0.98, spec, axis, amax, signs, draw, want)


def test_quantizer_checks_pass_the_reference_and_catch_a_shrinkage():
    slot = quantizers.SLOTS[0]
    assert quantizers.check_slot(reference_impl, slot, [(16, 32)], "cpu")[:2] == ([], 0)
    failures, differ, _ = quantizers.check_slot(BrokenQuantizer(), slot, [(16, 32)], "cpu")
    assert differ and "bytes differ" in failures[0]
    right = quantizers.check_sr_mean(reference_impl, "reference", "cpu", draws=8)
    wrong = quantizers.check_sr_mean(BrokenQuantizer(), "broken", "cpu", draws=8)
    assert (right.state, wrong.state) == (verdicts.RIGHT, verdicts.WRONG), (right, wrong)


def convert_by_definition(x):
    values = minifloat.round_nearest(x, minifloat.E2M1)
    codes = nibbles.pack(nibbles.encode(values, x.signbit()))
    return values, codes, codes


def ties_away_from_zero(x):
    return convert_by_definition(torch.where(x.abs() == 2.5, x * 1.1, x))


def minus_zero_kept(x):
    values, codes, _ = convert_by_definition(x)
    return values.copysign(x), codes, codes


def nibbles_exchanged(x):
    values, codes, _ = convert_by_definition(x)
    return values, codes, codes >> 4 | codes << 4


def sign_of_zero_lost(x):
    values, codes, _ = convert_by_definition(x)
    codes = nibbles.pack(nibbles.encode(values, values < 0))
    return values, codes, codes


@pytest.mark.parametrize("fault", [ties_away_from_zero, minus_zero_kept, nibbles_exchanged, sign_of_zero_lost])
def test_the_check_of_the_e2m1_conversion_passes_the_definition_and_catches_faults(fault, monkeypatch):
    pytest.importorskip("triton")
    from kernels.selftest import conversion

    monkeypatch.setattr(conversion, "convert", convert_by_definition)
    assert conversion.check("cpu").state == verdicts.RIGHT
    monkeypatch.setattr(conversion, "convert", fault)
    assert conversion.check("cpu").state == verdicts.WRONG


def test_checks_of_the_other_kernels_pass_the_reference():
    assert others.check_values_gemm("reference", "cpu").state == verdicts.RIGHT
    assert others.check_cross_entropy("reference", "cpu").state == verdicts.RIGHT


def test_checks_of_the_other_kernels_catch_a_fault(monkeypatch):
    class Wrong:
        @staticmethod
        def gemm(a, b, kind, alpha_const, out_dtype):
            return gemm_reference.gemm(a, b, kind, alpha_const, torch.bfloat16).to(out_dtype)  # rounded too early

        @staticmethod
        def linear_cross_entropy(h, weight, targets, per_token):
            return 1.02 * loss_reference.linear_cross_entropy(h, weight, targets, per_token)

    real = others.import_module
    monkeypatch.setattr(
        others, "import_module", lambda name: Wrong if "emulated" in name or "fake" in name else real(name)
    )
    monkeypatch.setattr(others.backend, "unavailable", lambda *_: None)
    assert others.check_values_gemm("packed_emulated", "cpu").state == verdicts.WRONG
    assert others.check_cross_entropy("fake", "cpu").state == verdicts.WRONG


def test_without_a_gpu_the_report_names_every_kernel_and_why_it_does_not_run(capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(build, "cannot_build", lambda: "nvcc not found")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert selftest.main([]) == 0
    out = capsys.readouterr().out
    for unit in build.UNITS.values():
        if unit.arch != "host":
            assert f"{unit.name:34} not compiled             nvcc not found" in out
    assert "gemm_nvfp4 cutlass                 not here                 needs a CUDA GPU" in out
    assert out.splitlines()[-1].endswith("0 wrong")


def test_a_wrong_line_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "lines", lambda _: [verdicts.judge("some kernel", ["3 of 4 bytes differ"], "")])
    assert selftest.main(["--no-speed"]) == 1
    assert "1 wrong" in capsys.readouterr().out


def test_a_report_travels_and_is_set_beside_this_machine(monkeypatch, capsys, tmp_path):
    theirs = [verdicts.judge("gemm cutlass", ["3 of 4 bytes differ"], ""), verdicts.judge("triton", [], "12 slots")]
    ours = [verdicts.Line("gemm cutlass", verdicts.NOT_HERE, "needs a GPU"), verdicts.judge("host", [], "")]
    file = tmp_path / "b200.json"
    monkeypatch.setattr(selftest, "lines", lambda _: theirs)
    assert selftest.main(["--no-speed", "--report", str(file)]) == 1
    capsys.readouterr()
    monkeypatch.setattr(selftest, "lines", lambda _: ours)
    assert selftest.main(["--compare", str(file)]) == 1
    out = capsys.readouterr().out
    assert f"{'gemm cutlass':34} {'WRONG':24} {'not here':24} 3 of 4 bytes differ" in out
    assert f"{'triton':34} {'runs and right':24} {'not checked':24} 12 slots" in out
    assert f"{'host':34} {'not checked':24} {'runs and right':24}" in out
    assert "machine: Python" in out and "2 checks there, 1 wrong" in out


@pytest.mark.parametrize("content", ["", "[]", '{"machine": []}', '{"machine": [], "checks": [{}], "speed": []}'])
def test_a_file_that_is_no_report_is_one_line(content, capsys, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert selftest.main(["--compare", str(file)]) == 2
    err = capsys.readouterr().err
    assert str(file) in err and "--report FILE" in err and len(err.splitlines()) == 1


def test_shapes_are_those_of_the_model_presets():
    folder = Path(__file__).parents[2] / "configs" / "model"
    for layers in shapes.PRESETS:
        preset = yaml.safe_load((folder / f"{layers.name}.yaml").read_text())
        assert (layers.width, layers.hidden) == (preset["width"], preset["hidden"])
    assert shapes.gemms(shapes.PUBLISHED[-1], 64)[:3] == [
        ("fprop", 64, 18432, 6144),
        ("dgrad", 64, 6144, 18432),
        ("wgrad", 18432, 6144, 64),
    ]
