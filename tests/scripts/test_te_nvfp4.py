"""The table of scripts/check/te_nvfp4.py on a reference written here with the interface of Transformer Engine's."""

import runpy
import sys
from pathlib import Path

import pytest

MAIN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "check" / "te_nvfp4.py"))["main"]
REFERENCE = """
import torch
from transformer_engine.pytorch.custom_recipes import gemm, reference_utils
from transformer_engine.pytorch.quantized_tensor import Quantizer

CUTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])

class NVFP4QuantizerRef(Quantizer):
    def __init__(self, dtype, columnwise, quant_tile_shape):
        super().__init__(rowwise=True, columnwise=columnwise)
        self.rows = quant_tile_shape[0]

    def _quantize(self, x):
        amax, T = x.abs().max().float(), x.abs().max().float() / 2688
        tiles = x.float().view(x.shape[0] // self.rows, self.rows, -1, 16)
        largest = tiles.abs().amax((1, 3), keepdim=True) / (6 * T)
        scales = (largest * FACTOR).to(torch.float8_e4m3fn)
        u = tiles / (scales.float().clamp(min=2**-9) * T)
        low, high = torch.bucketize(u.abs(), CUTS), torch.bucketize(u.abs(), CUTS, right=True)
        codes = torch.where(low % 2 == 0, low, high) + 8 * (torch.signbit(u))
        codes = codes.view(x.shape).to(torch.uint8)
        scales = scales.expand(-1, self.rows, -1, 1).reshape(x.shape[0], -1)
        return codes[:, ::2] + codes[:, 1::2] * 16, scales, None, None, amax, None
"""


@pytest.fixture(autouse=True)
def no_stand_ins_are_left():
    yield
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_equal_arithmetic_agrees_bit_for_bit_and_other_does_not(factor, tmp_path, capsys):
    files = tmp_path / "pytorch" / "custom_recipes"
    files.mkdir(parents=True)
    (files / "reference_nvfp4.py").write_text(f"FACTOR = {factor}\n{REFERENCE}")
    (files / "gemm.py").write_text("")
    (files / "reference_utils.py").write_text("import enum\nclass Fp4Formats(enum.Enum):\n    E2M1 = 1\n")
    assert MAIN([f"te={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    same = [line for line in lines if line.startswith("fprop.") or "BF16" in line]
    same += [line for line in lines if line.startswith("dgrad.dy") and "target 6" in line]
    assert len(same) == 2 * 2 + 2 + 4
    for line in same:
        assert (line.count("100.0000") == 2) == (factor == 1.0), line


def test_a_folder_without_the_reference_is_one_line(capsys):
    assert MAIN(["te=nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("te_nvfp4: te=nowhere: no ") and said.count("\n") == 1
