"""The roofline script's arithmetic, against numbers worked out by hand and against the published times it leans on."""

import pytest

from kernels.selftest.shapes import PUBLISHED, PUBLISHED_5090, Layers
from scripts.bench import roofline

MACHINE = roofline.Machine("unit", fp4=1.0, bf16=0.25, bandwidth=1.0, memory_gb=1, source="")


def test_bytes_and_milliseconds_of_a_small_layer():
    layers = Layers("small", 1, 2)  # linears (3,1), (1,1), (4,1), (1,2): 10 weights, 5 inputs, 9 outputs a token
    forward, backward = roofline.quantizer_bytes(layers, 100)
    assert forward == pytest.approx(500 * 4.6875 + 10 * 10.6875)
    assert backward == pytest.approx(900 * 9.375 + 510 * 1.8125)
    first, second = roofline.block_cost(layers, 100, MACHINE)
    assert (first.gemm, first.bf16) == pytest.approx((2000 * 1e-9, 8000 * 1e-9))  # 2 x 100 x 10 FLOPs at 1 TFLOP/s
    assert (second.gemm, second.quantize) == pytest.approx((4000 * 1e-9, backward * 1e-9))


def test_published_times_fit_8_x_2048_tokens_and_not_16_x_2048():
    layers = PUBLISHED[-1]
    (_, _), (forward_ms, _) = PUBLISHED_5090["22B"]
    speed = 2 * roofline.TOKENS * layers.parameters / forward_ms * 1e-9
    assert 1100 < speed < 1240 and 2 * speed > 1676


def test_tables_print_every_machine_and_layer(capsys):
    roofline.print_tables(16384)
    out = capsys.readouterr().out
    assert out.count("PREDICTION") == 2
    assert all(f"| {machine.name} | {layers.name} |" in out for machine in roofline.MACHINES for layers in PUBLISHED)
    assert out.count("| quartet2 |") == 2 and "1.00x" in out


@pytest.mark.parametrize("tokens", ["0", "-5", "many"])
def test_tokens_that_make_no_table_are_refused(tokens, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline.py", "--tokens", tokens])
    with pytest.raises(SystemExit, match="2"):
        roofline.main()
    assert "a whole number of at least 1 is needed" in capsys.readouterr().err
