"""Early verdicts: what is measured at a step, what a calibration finds in made-up arms, and who loses."""

from pathlib import Path

import numpy as np
import pytest

from analysis import early
from analysis.early import Arm
from analysis.runs import Run, find_runs

RESULTS = Path(__file__).parents[2] / "results"
STEPS = np.arange(10, 101, 10.0)
FOUR = {f"quant.{slot}.grid": "e2m1" for slot in ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy")}


def run(label: str, losses, seed: int = 0, done: int = 100, **numerics) -> Run:
    """A run evaluated every tenth step of 100, as far as `done`; `losses`: at the ten steps, or one number."""
    losses = np.broadcast_to(np.asarray(losses, float), STEPS.shape)[done >= STEPS]
    info = {"name": f"{label}-{seed}", "model": "m", "steps": 100, "tokens_per_step": 8, "seq_len": 4, "seed": seed}
    info |= {"data_fingerprint": "d", "tokenizer_hash": "t", "recipe_label": label}
    info["numerics"] = {"optim.name": "adamw", "schedule.name": "cosine", "schedule.lr_peak": 1e-3, **numerics}
    evals = {"step": STEPS[done >= STEPS], "loss": losses, "targets": np.full(len(losses), 64.0)}
    result = {"final_loss": float(losses[-1])} if done == 100 else None
    return Run(Path(f"{label}-{seed}"), info, {"step": evals["step"]}, evals, [], result)


def closing(gap: float, late: float) -> np.ndarray:
    """Losses of an arm: 3 + gap until step 50, 3 + late after it."""
    return 3 + np.where(STEPS <= 50, gap, late)


def test_the_window_is_the_last_half_of_what_is_done():
    one, other = run("a", 3 + STEPS / 100), run("bf16", 3.0)
    assert early.windowed(one, other, 0.4) == pytest.approx((0.3 + 0.4) / 2)
    assert early.windowed(one, other, 0.05) is None
    [arm], _ = early.arms_of([run("bf16", 3.0), run("a", 3.1, done=60), run("a", 3.3, seed=1)])
    assert len(arm.pairs) == 1 and arm.share == 0.6 and arm.final is None  # seed 1 has no baseline


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"phases.0.from": 50}, "phases"),
        ({"hooks.feedback.every": 8}, "hooks (feedback)"),
        ({"schedule.name": "wsd"}, "schedule=wsd"),
    ],
)
def test_what_is_refused(changed, told):
    arms, refused = early.arms_of([run("bf16", 3.0), run("a", 3.1, **changed)])
    assert not arms and len(refused) == 1 and told in refused[0]
    fork = run("b", 3.1)
    fork.info["parent"] = {"name": "a"}
    assert "fork" in early.refusal(fork)


@pytest.fixture
def arms() -> list[Arm]:
    """Twelve arms of four families, whose final gap is 1.5 times the early one and a hundredth of it beside."""
    rng, found = np.random.default_rng(0), []
    for number in range(12):
        gap = 0.01 + 0.004 * number
        late = gap * (1.5 + 0.01 * rng.standard_normal())
        label = f"{'abcd'[number % 4]}_{number}"
        found.append(Arm(label, ((run(label, closing(gap, late)), run("bf16", 3.0)),)))
    return found


def test_a_calibration_finds_how_gaps_go_on(arms, monkeypatch):
    monkeypatch.setattr(early, "FIGURES", {"noise": lambda arm, share: int(arm.label[2:]) * 5 % 7 * 1e-3})
    found = early.calibrate(arms, 0.5, early.FIGURES)
    assert found.fit.figures == () and found.fit.coefficients[0] == pytest.approx(1.5, abs=0.02)
    assert found.fit.spread < 0.02 and found.left.arms == 12 and found.left.families == 4
    without, beside, count = found.tried["noise"]
    assert beside > 0.9 * without and count == 12
    middle, low, high = found.fit.foretold(np.array([0.02]))
    assert middle == pytest.approx(0.03, abs=5e-4) and low < 0.03 < high and high - low < 2e-3


def test_a_figure_that_adds_is_counted_and_one_of_few_arms_is_not(arms, monkeypatch):
    rest = {arm.label: arm.final - 1.5 * arm.windowed(0.5) for arm in arms}
    figures = {
        "few": lambda arm, share: 1.0 if arm.label == "a_0" else None,
        "rest": lambda arm, share: rest[arm.label],
    }
    monkeypatch.setattr(early, "FIGURES", figures)
    found = early.calibrate(arms, 0.5, early.FIGURES)
    assert found.fit.figures == ("rest",) and found.fit.coefficients == pytest.approx([1.5, 1.0])
    assert found.tried["few"] == "known of 1 arms of 1 families, too few to tell"
    with pytest.raises(ValueError, match="name more by --kept"):
        early.calibrate(arms[:5], 0.5, ())


def test_the_binomial_interval():
    assert early.Left(0.1, 9, 10, 3).coverage == pytest.approx((0.9, 0.5550, 0.9975), abs=1e-4)
    assert early.Left(0.1, 10, 10, 3).coverage[2] == 1.0


def test_rank_correlation_by_hand(arms):
    n, rho, low, high = early.ranks(arms, 0.5, lambda arm, share: arm.final**2)
    assert (n, rho) == (12, pytest.approx(1.0)) and (low != low or high >= low)
    assert early.ranks(arms[:2], 0.5, lambda arm, share: 1.0)[0] == 2
    order = {arm.label: value for arm, value in zip(arms, (2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11), strict=True)}
    n, rho, low, high = early.ranks(arms, 0.5, lambda arm, share: order[arm.label])
    assert rho == pytest.approx(1 - 6 * 12 / (12 * 143)) and low < rho < high


def test_who_loses_and_when():
    leader = run("a", 3.0, **FOUR)
    far, near, bf16 = (
        run("b", 3.016, **FOUR),
        run("c", 3.006, **FOUR),
        run("bf16", 2.9, **{"quant.fprop.x.grid": "none"}),
    )
    runs = [leader, far, near, bf16]
    assert early.rivals_of(far, runs) == [leader, far, near] and early.rivals_of(bf16, runs) == []
    rivals = early.rivals_of(far, runs)
    assert early.lost(far, rivals, 0.2) is None and early.lost(far, rivals, 0.3)[0] is leader
    assert early.lost(near, rivals, 0.4) is None and early.lost(near, rivals, 0.5)[1] == pytest.approx(6e-3)
    assert early.lost(leader, rivals, 0.9) is None
    assert early.rivals_of(far, [run("a", 3.0, seed=1, **FOUR)]) == []


def test_a_replay_tells_what_is_saved_and_who_is_wronged():
    runs = [run("a", 3.0, **FOUR), run("b", 3.02, **FOUR), run("c", closing(0.02, -0.01), **FOUR)]
    found = early.replay(runs)
    assert found.ended == {"b-0": pytest.approx(0.7), "c-0": pytest.approx(0.7)}
    assert found.saved == pytest.approx(1.4 / 3) and found.wronged == {"c-0": pytest.approx(0.01)}


def test_on_the_kept_screens_a_third_of_the_steps_is_saved_and_nobody_is_wronged():
    found = early.replay(find_runs([f"{RESULTS}/corpus_screen/*", f"{RESULTS}/corpus_forward/*"]))
    assert not found.wronged and 0.25 < found.saved < 0.4
