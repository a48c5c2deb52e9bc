"""TensorBoard and W&B: refused before any work where they can't be, and whole after a kill and a resume."""

import base64
import hashlib
import json
import struct
import time
from pathlib import Path

import pytest
from PIL import Image
from support import wait_until

from base.files import write_text
from training.config import LoggerSection, WandbSection
from training.records import loggers
from training.records.loggers import check_asked_for, wandb_labels

RUN = {"name": "a", "hash": "b", "model": "llama_30m", "recipe": "sr", "tokens": 750_000_000, "numerics": {"seed": 3}}
BLOCK, HEAD = 32768, 7  # of a .wandb file: LevelDB's log format behind a header of seven bytes


def test_a_missing_package_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for words in (["logger=wandb"], ["logger=tensorboard"], ["logger.wandb.mode=offline"]):
        package = words[0].removeprefix("logger=").partition(".")[0].replace("logger", "wandb")
        with pytest.raises(RuntimeError, match=rf"needs the {package} package: pip install -e '\.\[{package}\]'"):
            run(*words)
    assert not (tmp_path / "runs").exists()


def test_wandb_without_a_key_is_refused_at_once_and_nobody_is_asked(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RuntimeError, match=r"wandb login.*logger\.wandb\.mode=offline"):
        check_asked_for(LoggerSection(wandb=WandbSection(mode="online")))
    check_asked_for(LoggerSection(wandb=WandbSection(mode="offline"), tensorboard=True))


def killed_and_resumed(run, monkeypatch, *words: str) -> Path:
    """Ten steps with checkpoints at 5 and 10: killed after step 8 was logged, then resumed from 5."""
    from training.loop import Trainer

    log = Trainer._log

    def killing(self, *rows):
        log(self, *rows)
        if any(row["kind"] == "train" and row["step"] == 8 for row in rows):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", killing)
        with pytest.raises(KeyboardInterrupt):
            run("quant=bf16", "checkpoint.asynchronous=false", *words)
    code, folder = run("quant=bf16", "checkpoint.asynchronous=false", *words)
    assert code == 0
    return folder


def test_tensorboard_has_each_step_once_after_a_kill(run, rows, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = killed_and_resumed(run, monkeypatch, "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in rows(folder, "train")]
    assert [event.step for event in events.Scalars("eval/loss")] == [5, 10]


def test_a_tracker_that_is_asked_for_later_gets_what_came_before(run, rows, stop_after):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with stop_after(6):
        run("quant=bf16")
    _, folder = run("quant=bf16", "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def test_one_offline_wandb_folder_has_the_whole_run_after_a_kill(run, rows, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = killed_and_resumed(run, monkeypatch, "logger=wandb", "logger.wandb.mode=offline")
    (offline,) = (folder / "wandb").glob("offline-run-*")
    begun, history = read_wandb(next(offline.glob("*.wandb")))
    deadline = time.monotonic() + 60
    while len(history) < 10 and time.monotonic() < deadline:  # its own process may still be writing
        time.sleep(0.2)
        begun, history = read_wandb(next(offline.glob("*.wandb")))
    losses = {int(row["step"]): float(row["train/loss"]) for row in history if "train/loss" in row}
    assert losses == {row["step"]: row["loss"] for row in rows(folder, "train")}
    assert [int(row["step"]) for row in history if "eval/loss" in row] == [5, 10]
    assert begun["job_type"] == "train" and begun["group"] == "llama_tiny-5.12K"
    assert {"bf16", "llama_tiny"} <= set(begun["tags"])
    assert begun["config"]["recipe"] == '"bf16"' and begun["config"]["model"] == '"llama_tiny"'
    assert begun["config"]["commit"].strip('"') and begun["config"]["optim.name"] == '"adamw"'
    (table,) = (offline / "files" / "media" / "table").glob("*.json")
    shown = {(int(x), curve): y for x, curve, y in json.loads(table.read_text())["data"]}
    assert {step: y for (step, curve), y in shown.items() if curve == "train"} == losses
    assert [step for step, curve in shown if curve == "eval"] == [5, 10]


def test_a_comparison_goes_to_wandb_as_a_plot_and_an_artifact(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from analysis.publish import to_wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    paths = [tmp_path / "compare.html", tmp_path / "compare.png"]
    for number, path in enumerate(paths):
        (write_text(path, "<html>") if number == 0 else Image.new("RGB", (4, 4)).save(path))
    to_wandb(paths, "nibble", True, ["bf16", "sr"])
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")

    def stored() -> dict[str, list]:
        """What the folder holds by now: W&B's own process may still be writing."""
        found = {"run": [], "artifact": []}
        for record in wandb_records(next(offline.glob("*.wandb"))):
            kind = record.WhichOneof("record_type")
            found["run"] += [record.run] if kind == "run" else []
            found["artifact"] += [record.artifact] if kind == "artifact" else []
            if kind == "request" and record.request.HasField("log_artifact"):
                found["artifact"].append(record.request.log_artifact.artifact)
        return found

    wait_until(lambda: all(stored().values()))
    (started,) = stored()["run"]
    assert started.job_type == "report" and {"bf16", "sr"} <= set(started.tags)
    (artifact,) = [one for one in stored()["artifact"] if one.name == "comparison"]
    digests = {entry.path: entry.digest for entry in artifact.manifest.contents}
    wanted = {path.name: base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode() for path in paths}
    assert artifact.type == "report" and digests == wanted
    (image,) = (offline / "files" / "media" / "images" / "plot").glob("compare*.png")
    assert image.read_bytes() == paths[1].read_bytes()


def read_wandb(path: Path) -> tuple[dict, list[dict]]:
    """({group, job_type, tags, config}, rows of history) of a .wandb file; values as JSON text."""
    begun, history = {}, []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "run":
            config = {item.key: item.value_json for item in record.run.config.update}
            begun = {"group": record.run.run_group, "job_type": record.run.job_type, "config": config}
            begun["tags"] = list(record.run.tags)
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): item.value_json for item in items})
    return begun, history


def wandb_records(path: Path) -> list:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(data) for data in log_records(path.read_bytes())]


def log_records(data: bytes) -> list[bytes]:
    """Records of LevelDB's log format: pieces of (checksum, length, type) in blocks; type 1 whole, 2 to 4 parts."""
    records, parts, at = [], b"", HEAD
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts = (b"" if kind in (1, 2) else parts) + data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):
            records.append(parts)
    return records


def test_labels_of_an_experiment():
    labels = wandb_labels(RUN | {"experiment": "c4_grid", "cell": "30M/sr/s3"}, "abc")
    assert labels["group"] == "c4_grid" and labels["id"] == "a-b" and labels["tags"] == ["llama_30m", "sr", "c4_grid"]
    assert labels["config"] == {
        **{"recipe": "sr", "model": "llama_30m", "tokens": 750_000_000, "experiment": "c4_grid", "cell": "30M/sr/s3"},
        **{"commit": "abc", "seed": 3},
    }
