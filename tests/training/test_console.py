"""What is printed while a slow step or evaluation goes on."""

from training.records import console


def test_a_long_step_says_where_it_is_and_a_brisk_one_nothing(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = console.Console(active=True, steps=3)
    shown.within("step 1", 1, 8)
    now[0] += console.QUIET_S + 1
    shown.within("step 1", 2, 8)
    shown.within("step 1", 3, 8)
    now[0] += console.QUIET_S + 1
    shown.within("step 5", 1, 1)
    assert capsys.readouterr().out == "  step 1: 2 of 8 micro-batches\n  step 5\n"
    console.Console(active=False, steps=3).within("step 1", 2, 8)
    assert capsys.readouterr().out == ""


def test_a_run_tells_its_console_of_steps_and_evaluations(run, monkeypatch, capsys):
    monkeypatch.setattr(console, "QUIET_S", 0.0)
    assert run("steps=1", "quant=bf16")[0] == 0
    out = capsys.readouterr().out
    assert "  step 1: 1 of 2 micro-batches\n  step 1: 2 of 2 micro-batches\n" in out
    assert "  evaluation at step 1: 1 of " in out
