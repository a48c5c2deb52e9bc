import json
import math
from unittest.mock import Mock

import pytest
import torch

from base.flops import mfu_formula, mfu_note, peak_of
from training.loop import Trainer
from training.records.identity import short_count
from training.records.loggers import Loggers, numbers
from training.records.metrics import MetricsFile, StepBuffer, others_gib


def row(kind: str, step: int, **fields) -> dict:
    return {"kind": kind, "step": step, **fields}


def test_memory_of_others_is_what_is_taken_and_not_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * 2**30)
    assert others_gib(torch.device("cuda")) == 18.0 and others_gib(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("GRID H100-80C", None),
        ("NVIDIA H1000", None),
        ("NVIDIA A100-SXM4-80GB", None),
        (None, None),
    ],
)
def test_the_peak_is_that_of_the_very_part(gpu, peak):
    assert peak_of(gpu) == peak
    assert (mfu_note(gpu) == mfu_formula(peak)) if peak else mfu_note(gpu).startswith("none")
    assert gpu is None or peak or gpu in mfu_note(gpu)


def test_the_formula_of_kept_runs_is_what_it_was():
    assert mfu_formula(989e12) == "(6 N + 12 L d s) per token / 989 TFLOP/s; N with lm_head, without embedding"


def test_speed_is_the_jobs_and_mfu_a_gpus():
    trainer = Mock(numbers=Mock(tokens_per_step=1000, world=2), p=Mock(flops_per_token=30), _peak=1e6)
    speed = Trainer._speed(trainer, ms=10.0)
    assert speed["tokens_per_second"] == 1e5 and speed["mfu"] == 30 * 1e5 / 2 / 1e6


def test_truncation_drops_later_measurements_and_keeps_the_history(tmp_path):
    file = MetricsFile(tmp_path)
    file.append([row("event", 0, event="start"), *(row("train", step) for step in range(1, 8))])
    file.append([row("eval", 5), row("eval", 7), row("event", 7, event="interrupt"), row("slots", 7)])
    assert file.truncate(5) == 4
    kept = [(line["kind"], line["step"]) for line in file.rows()]
    assert kept == [("event", 0), *(("train", step) for step in range(1, 6)), ("eval", 5), ("event", 7)]


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path):
    file = MetricsFile(tmp_path)
    file.append([row("train", 1), row("train", 2)])
    with open(file.path, "a") as handle:
        handle.write('{"kind": "train", "st')
    assert [line["step"] for line in file.rows()] == [1, 2]
    file.truncate(2)
    file.append([row("train", 3)])
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("line", [b'{"kind": "train", "st\n', b"\xff\n", b"\n", b"[1]\n", b'{"kind": "train"}\n'])
def test_a_damaged_line_elsewhere_is_an_error_and_nothing_is_cut(tmp_path, line):
    file = MetricsFile(tmp_path)
    file.append([row("train", 1)])
    with open(file.path, "ab") as handle:
        handle.write(line)
    file.append([row("train", 2)])
    before = file.path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: malformed record .* delete"):
        file.truncate(1)
    assert file.path.read_bytes() == before


def test_truncation_is_atomic(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path)
    file.append([row("train", step) for step in (1, 2, 3)])

    def fail(*args):
        raise OSError("killed here")

    monkeypatch.setattr("base.files.os.replace", fail)
    with pytest.raises(OSError, match="killed here"):
        file.truncate(1)
    assert [line["step"] for line in file.rows()] == [1, 2, 3]


def test_non_finite_losses_survive_the_file(tmp_path):
    file = MetricsFile(tmp_path)
    file.append([row("train", 1, loss=math.nan, grad_norm=math.inf)])
    (line,) = file.rows()
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf


def test_step_buffer_sums_micro_batches_and_ranks():
    buffer = StepBuffer(4, torch.device("cpu"))
    for nats, norm in (((1.0, 2.0), 0.5), ((3.0, 4.5), 0.25)):
        for part in nats:
            buffer.add_nats(torch.tensor(part))
        buffer.end_step(torch.tensor(norm))
    assert buffer.read(lambda tensor: 2 * tensor) == [(6.0, 0.5), (15.0, 0.25)]
    assert buffer.count == 0
    buffer.add_nats(torch.tensor(7.0))
    buffer.end_step(torch.tensor(1.0))
    assert buffer.read(lambda tensor: tensor) == [(7.0, 1.0)]
    for part in (2.0**25, 0.25, 0.25):  # FP32 would lose both quarters
        buffer.add_nats(torch.tensor(part))
    buffer.end_step(torch.tensor(1.0))
    assert buffer.read(lambda tensor: tensor) == [(2.0**25 + 0.5, 1.0)]


class Sink:
    def __init__(self, fails_at: int = 99):
        self.seen, self.fails_at = [], fails_at

    def log(self, rows):
        for line in rows:
            if line["step"] >= self.fails_at:
                raise ConnectionError("no route to host")
            self.seen.append(line["step"])

    def close(self):
        pass


def test_a_broken_sink_warns_once_and_never_stops_the_run(tmp_path, capsys):
    good, bad = Sink(), Sink(fails_at=2)

    def unopenable():
        raise ImportError("No module named 'wandb'")

    loggers = Loggers(MetricsFile(tmp_path), {"good": lambda: good, "bad": lambda: bad, "absent": unopenable})
    for step in (1, 2, 3, 4):
        loggers.write(row("train", step))
    loggers.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "absent is off" in warnings[0] and "No module named 'wandb'" in warnings[0]
    assert "bad is off" in warnings[1] and "no route to host" in warnings[1]
    assert (good.seen, bad.seen) == ([1, 2, 3, 4], [1])
    assert [line["step"] for line in MetricsFile(tmp_path).rows()] == [1, 2, 3, 4]


def test_trackers_get_numbers_by_kind():
    line = row("train", 3, loss=2.5, mfu=None, samples="ab", time=1.0, tokens=7)
    assert numbers(line) == {"train/loss": 2.5, "train/tokens": 7}


def test_counts_are_short():
    values = [512, 5120, 153_600, 100_000_000, 749_993_984, 38_000_000_000]
    assert [short_count(value) for value in values] == ["512", "5.12K", "154K", "0.1B", "0.75B", "38B"]
