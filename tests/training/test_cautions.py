"""Warnings before a start: a step that takes minutes, text read hundreds of times, more memory than there is."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.compose import compose
from training.config import BatchSection
from training.ranks.distributed import Dist
from training.start import cautions
from training.start.cautions import cpu_seconds, many_epochs, memory_of, slow, spoken, too_large
from training.start.describe import check
from training.start.launch import Request, start_screen

CPU = torch.device("cpu")
ALONE = Dist(0, 1, 0, CPU)


def seconds_of(*words: str, threads: int = 2) -> float:
    config = compose(["data=text", "data.files=x.txt", *words]).config
    checked = check(config, ALONE, 2048)
    return cpu_seconds(checked.shape, checked.plan, checked.numbers, threads)


def test_the_estimate_is_what_was_measured_within_a_factor_of_two():
    """Tokens a second of one thread, by processor time: llama_tiny at 2 x 512."""
    measured = {"bf16": 2920, "sr": 349, "quartet2": 506, "nvidia": 597, "fp8": 2021}
    for recipe, rate in measured.items():
        words = ["model=llama_tiny", f"quant={recipe}", "batch.sequences=2", "batch.micro=2"]
        assert rate / 2 < 1024 / seconds_of(*words, threads=1) < rate * 2, recipe


@pytest.mark.parametrize(
    "given", [["batch.sequences=512"], ["batch.tokens=262144"], ["batch.sequences=512", "batch.micro=32"]]
)
def test_a_start_on_a_cpu_says_what_a_step_takes_and_what_to_type(given):
    words = ["model=llama_tiny", "quant=quartet2", "data=text", "data.files=x.txt", *given]

    def shown(*more: str, elsewhere: bool = False) -> str:
        changed = {word.partition("=")[0] for word in more}
        composed = compose([*(word for word in words if word.partition("=")[0] not in changed), *more])
        return start_screen(Request(composed.config, composed.yaml, composed.choices, ""), ALONE, elsewhere)

    text = shown()
    assert re.search(r"warning: about \d+\.\d (minutes|hours) a step on this CPU", text)
    advice = re.search(r"type (batch\.[\w=. ]+) \(about", text)[1].split()
    assert "a step on this CPU" not in shown(*advice)
    assert "a step on this CPU" not in shown(elsewhere=True)  # submitted from a login node


def test_short_steps_need_no_word():
    numbers = SimpleNamespace(sequences=8, seq_len=64)
    assert slow(cautions.SLOW_S - 1, numbers, BatchSection()) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4, "4.0 s"), (40, "40 s"), (90, "1.5 minutes"), (7200, "2.0 hours"), (864000, "10.0 days")],
)
def test_times_are_spoken(seconds, words):
    assert spoken(seconds) == words


def test_text_that_is_read_over_and_over(run, capsys):
    text = many_epochs(SimpleNamespace(tokens=611_052 * 997), 611_052)
    assert "read 997 times" in text and "tokens=2444208" in text
    assert many_epochs(SimpleNamespace(tokens=611_052 * 4), 611_052) is None
    run("quant=bf16", "steps=1", "evaluate.every=null", "schedule.warmup_steps=0")
    assert "warning" not in capsys.readouterr().out


def test_more_memory_than_there_is(monkeypatch):
    has = memory_of(CPU, 1)
    assert has == 2 * memory_of(CPU, 2) and too_large(0.9 * has, CPU, 1) is None
    text = too_large(1.1 * has, CPU, 1)
    assert f"this process has {has:.1f}" in text and "recompute=true" in text and "batch.micro" in text
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert "this GPU has 80.0" in too_large(81.0, torch.device("cuda"), 8)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cautions, "CGROUPS", (str(limit), str(tmp_path / "absent")))
    for text, gib in (("1073741824\n", 1.0), ("max\n", None)):
        Path(limit).write_text(text)
        assert memory_of(CPU, 1) == (gib or pytest.approx(memory_of(CPU, 2) * 2))
