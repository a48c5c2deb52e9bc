"""Shares and predicted times, against numbers worked out by hand and against the roofline they share rates with."""

import pytest

from kernels.selftest.shapes import PRESETS
from launcher.compose import compose
from quant import price as counts
from quant.price import Kind
from scripts import price
from scripts.bench import roofline
from training.start import price as start

BASE = ["model=llama_30m", "steps=1000", "batch.sequences=128", "data.vocab_size=32000"]


def checked(*words):
    return price.checked_of(compose([*BASE, *words]).config)


def test_shares_of_flops_by_hand():
    """llama_30m: 6 blocks of 8 x 640^2 + ... weights; the head has 20.48M, attention 12 L d s of 512 tokens."""
    weights = 6 * sum(n * k for n, k in PRESETS[1].linears)
    assert price.shares(checked("quant=bf16")) == (0, 0)
    blocks, everything = price.shares(checked("quant=quartet2"))
    assert blocks == 1
    assert everything == pytest.approx(6 * weights / (6 * weights + 6 * 640 * 32000 + 12 * 6 * 640 * 512))
    assert price.shares(checked("quant=quartet2", "quant.fprop=none"))[0] == pytest.approx(2 / 3)
    assert price.shares(checked("quant=quartet2", "quant.fprop.w.grid=none"))[0] == pytest.approx(2 / 3)  # both or none
    assert price.shares(checked("quant=quartet2", "quant.high_precision.last=1"))[0] == pytest.approx(5 / 6)
    assert price.shares(checked("quant=fp8"))[0] == 0


@pytest.mark.parametrize(("model", "share"), [("llama_30m", 0.40), ("llama_100m", 0.24)])
def test_the_heads_share_without_attention(model, share):
    plan = checked(f"model={model}").plan
    head = counts.head_flops(plan, 1)
    assert head / (head + counts.block_flops(plan, 1).total()) == pytest.approx(share, abs=0.01)


def test_phases_count_by_their_steps():
    phased = checked("quant=quartet2", "quant.phases=[{from: 0.85, set: {fprop: none}}]")
    assert price.shares(phased)[0] == pytest.approx(1 - 0.15 / 3)
    drawn = checked("quant=quartet2", "quant.phases=[{share: 0.5, set: {fprop: none}}]")
    assert price.shares(drawn)[0] == pytest.approx(1 - drawn.phases[0].count / 1000 / 3)


def test_of_a_fork_its_own_steps_count_and_the_start_screen_says_so():
    phased = checked("quant=quartet2", "quant.phases=[{from: 0.85, set: {fprop: none}}]")
    assert price.shares(phased, 850)[0] == pytest.approx(2 / 3)
    assert price.shares(phased, 700)[0] == pytest.approx(1 - 0.5 / 3)
    assert start.told(phased, 850).startswith("66.7% of the blocks' GEMM FLOPs")
    assert start.told(checked("quant=fp8"), 0) is None


def test_five_percent_of_the_flops_in_bf16_are_15_percent_of_gemm_time():
    tail = "quant.phases=[{from: 0.95, set: {fprop: none, dgrad: none, wgrad: none}}]"
    four, six = (
        [price.mean_step(checked("quant=quartet2", *more), machine).gemms for more in ((), (tail,))]
        for machine in price.MACHINES[:2]
    )
    assert four[1] / four[0] == pytest.approx(1.15) and six[1] / six[0] == pytest.approx(1.25)


def test_quantizers_and_gemms_of_quartet2_are_the_rooflines():
    layers, blocks, plan = PRESETS[1], 6, checked("quant=quartet2").plan
    assert counts.quantizer_bytes(plan, 4096) == pytest.approx(blocks * sum(roofline.quantizer_bytes(layers, 4096)))
    assert counts.block_flops(plan, 4096) == {Kind(4): blocks * 6 * 4096 * layers.parameters}


def test_shaping_is_counted_in_bf16_beside_the_gemms():
    """Of N x K: K^2 a token for X, or 4 r K; N K^2 for W."""
    for name, added in (("x", 4096), ("w", None)):
        plan = checked(f"quant=quartet2_shaped_{name}").plan
        shapes = [entry.shape for entry in counts.blocks(plan)]
        expected = sum((added or rows) * columns**2 for rows, columns in shapes)
        assert counts.block_flops(plan, 4096)[Kind(16)] == expected


def test_bytes_of_operands_by_hand():
    def of(recipe, slot):
        return counts.operand_bytes(checked(f"quant={recipe}").plan.recipe, slot)

    assert of("bf16", "fprop.x") == 0
    assert of("quartet2", "fprop.x") == 2 + 2 + 9 / 16 + 1 / 8  # amax, read, codes and scales, swizzle
    assert of("quartet2", "dgrad.w") == 3 * 9 / 16 + 1 / 8  # from what fprop stored
    assert of("nvidia", "dgrad.w") == 2 * 9 / 16 + 1 / 8  # fprop's codes, turned
    assert of("fp8", "dgrad.dy") == 2 + 2 + 1


def test_codes_that_no_tensor_core_takes_run_at_the_speed_of_bf16():
    machine = price.MACHINES[0]
    assert [
        price.speed(kind, machine) / machine.bf16 for kind in (Kind(4), Kind(4, native=False), Kind(8), Kind(16))
    ] == [4, 1, 2, 1]
    emulated = checked(
        "quant=quartet2",
        "quant.fprop.x.grid=int4",
        "quant.fprop.w.grid=int4",
        "quant.fprop.x.select=absmax",
        "quant.fprop.w.select=absmax",
    )
    kinds = counts.block_flops(emulated.plan, 1)
    assert kinds[Kind(4, native=False)] == pytest.approx(kinds.total() / 3)
    assert price.shares(emulated)[0] == 1


def test_the_command_line_prices_several_and_refuses_in_one_line(capsys):
    words = ["model=llama_30m", "steps=100", "batch.sequences=128"]
    assert price.main([*words, "recipes=bf16,fp8,quartet2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("bf16 ", "fp8 ", "quartet2 "))]) == 9
    assert all("1.00x" in line for line in lines if line.startswith("bf16 "))
    assert any("PREDICTION" in line for line in lines)
    assert price.main([*words, "quant=quartet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("price: ") and "did you mean quartet2" in error and error.count("\n") == 1
