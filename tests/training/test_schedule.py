"""Schedules by hand, and against torch's OneCycleLR, which the published runs used."""

import math

import pytest
import torch

from launcher.compose import compose
from training.optim.schedule import Schedule
from training.start.derive import derive


def cosine(steps: int = 100, warmup: int = 10, lr: float = 1.2e-3) -> Schedule:
    return Schedule("cosine", lr, steps, warmup, start_factor=0.01, end_factor=0.1)


def test_cosine_by_hand():
    schedule = cosine()
    assert schedule.lr(0) == pytest.approx(1.2e-5, rel=1e-12)
    assert schedule.lr(9) == pytest.approx(1.2e-3, rel=1e-12)  # the peak, at step warmup - 1
    assert schedule.lr(99) == pytest.approx(1.2e-4, rel=1e-12)
    # A third of the warm-up: lr/100 + 0.99 lr (1 - cos(pi / 3)) / 2 = lr (0.01 + 0.99 / 4).
    assert schedule.lr(3) == pytest.approx(1.2e-3 * (0.01 + 0.99 / 4), rel=1e-12)
    # Half of the decay, between steps 9 and 99: the mean of peak and end.
    assert schedule.lr(54) == pytest.approx((1.2e-3 + 1.2e-4) / 2, rel=1e-12)


@pytest.mark.parametrize("steps", [20, 100, 380])
def test_cosine_is_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=9e-4,
        total_steps=steps,
        pct_start=0.1,
        div_factor=100,
        final_div_factor=0.1,
        cycle_momentum=False,
    )
    ours = Schedule("cosine", 9e-4, steps, steps // 10, 0.01, 0.1)
    for step in range(steps):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        if step + 1 < steps:
            reference.step()


def test_wsd_by_hand():
    schedule = Schedule("wsd", 1.0, 100, 10, start_factor=0.0, end_factor=0.0, decay_steps=40)
    assert [schedule.lr(step) for step in (0, 4, 9, 10, 59, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert [schedule.lr(step) for step in (61, 80, 99)] == pytest.approx([39 / 40, 20 / 40, 1 / 40])


def test_wsd_falls_by_the_root_of_the_share_that_is_done():
    schedule = Schedule("wsd", 1.0, 100, 0, start_factor=0.0, end_factor=0.2, decay_steps=40, decay_shape="sqrt")
    rates = [schedule.lr(step) for step in (59, 60, 70, 76)]
    assert rates == pytest.approx([1.0, 1.0, 0.2 + 0.8 * 0.5, 0.2 + 0.8 * (1 - 0.4**0.5)])


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        (["schedule=constant"], [0.25, 1.0, 1.0, 1.0]),
        (["schedule=linear"], [0.25, 1.0, 1 - 18 / 36, 1 / 36]),
        (["schedule=linear", "schedule.end_factor=0.5"], [0.25, 1.0, 0.75, 0.5 + 0.5 / 36]),
        (["schedule=wsd_sqrt", "schedule.warmup_steps=4"], [0.25, 1.0, 1.0, 1 - (7 / 8) ** 0.5]),
        (["schedule=cosine", "schedule.end_factor=0", "schedule.warmup_steps=4"], [0.01, 1.0, None, 0.0]),
    ],
)
def test_schedules_by_name(words, rates):
    """40 steps, 4 of them warm-up: the rates of steps 0, 3, 22 and 39 over the peak."""
    config = compose([*words, "steps=40", "optim.lr=1"]).config
    schedule = derive(config, 10**6, world=1).schedule
    for step, rate in zip((0, 3, 22, 39), rates, strict=True):
        assert rate is None or schedule.lr(step) == pytest.approx(rate, abs=1e-12), step


def test_a_decay_that_is_not_read_is_refused():
    for words in (["schedule=cosine", "schedule.decay_shape=sqrt"], ["schedule=constant", "schedule.end_factor=0.5"]):
        with pytest.raises(ValueError, match="doesn't read it; schedule=wsd does"):
            derive(compose([*words, "steps=40"]).config, 10**6, world=1)


def test_wsd_end_factor_is_where_it_would_arrive():
    schedule = Schedule("wsd", 1.0, 10, 0, start_factor=0.0, end_factor=0.5, decay_steps=4)
    assert schedule.lr(8) == pytest.approx(0.5 + 0.5 * 2 / 4)


def test_every_length_gives_positive_finite_rates():
    for steps in (1, 2, 3, 11):
        for warmup in (0, 1, min(2, steps)):
            for step in range(steps):
                lr = cosine(steps, warmup).lr(step)
                assert 0 < lr <= 1.2e-3 and math.isfinite(lr)


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"60 warm-up and 50 decay steps don't fit 100 steps"):
        Schedule("wsd", 1.0, 100, 60, 0.0, 0.0, decay_steps=50)


def test_the_start_screen_ends_where_the_schedule_does(run, capsys):
    """A constant one at its peak: end_factor is none of its words."""
    for words, end in ((["schedule=constant"], "0.01"), (["schedule=linear"], "0"), ([], "0.001")):
        run(*words, "dry_run=true")
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule"))
        assert line.endswith(f", end {end}")
