"""A checkpoint gives back the exact state, whatever is damaged is found, and nothing half-written is taken for good."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from training.checkpoint import publish
from training.checkpoint.manifest import checkpoints, latest_good, problems, prune, read_meta, remove_temporary
from training.checkpoint.state import Checkpointer, TrainState, load, load_model, state_tensors
from training.checkpoint.storage import CheckpointError, StagedFile, StagingBuffers


def new_state(seed: int, width: int = 16, hash_: str = "abc") -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 3))
    model.register_buffer("amax_history", torch.rand(4))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return TrainState(model, [torch.optim.AdamW(groups, lr=0.01, fused=True)], hash=hash_)


def train(state: TrainState, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.sin(torch.arange(40.0).reshape(5, 8) * (state.step + 1))
        loss = state.model(x).square().sum()
        loss.backward()
        state.optimizers[0].step()
        state.optimizers[0].zero_grad()
        state.step += 1
        losses.append(loss.item())
    return losses


def saved_run(tmp_path: Path, steps: tuple[int, ...] = (3,), **options) -> TrainState:
    state, saver = new_state(0), Checkpointer(tmp_path, **options)
    for step in steps:
        train(state, step - state.step)
        saver.save(state)
    saver.wait()
    return state


def assert_same(a: TrainState, b: TrainState) -> None:
    left, right = state_tensors(a), state_tensors(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_resumed_training_is_bitwise_the_straight_one(tmp_path, asynchronous):
    straight = new_state(0)
    losses = train(straight, 6)
    saved_run(tmp_path, asynchronous=asynchronous)
    resumed = new_state(1)
    load(latest_good(tmp_path), resumed)
    assert resumed.step == 3
    assert train(resumed, 3) == losses[3:]
    assert_same(straight, resumed)


def test_meta_and_buffers_come_back(tmp_path):
    state = saved_run(tmp_path)
    state.tokens, state.extra = 1234, {"skipped": [[7, 0]], "best": 2.5}
    Checkpointer(tmp_path).save(state, wait=True)
    other = new_state(5)
    load(latest_good(tmp_path), other)
    assert (other.step, other.tokens, other.extra) == (3, 1234, {"skipped": [[7, 0]], "best": 2.5})
    assert torch.equal(other.model.amax_history, state.model.amax_history)


def test_asynchronous_save_keeps_the_state_of_its_step(tmp_path):
    """Training that goes on while the files are written must not leak into them."""
    state, saver = new_state(0), Checkpointer(tmp_path, asynchronous=True)
    train(state, 3)
    before = {name: tensor.detach().clone() for name, tensor in state_tensors(state).items()}
    saver.save(state)
    train(state, 5)
    saver.wait()
    other = new_state(1)
    load(latest_good(tmp_path), other)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_tensors(other).items())


def test_weights_alone_load_into_a_model(tmp_path):
    state = saved_run(tmp_path)
    model = new_state(9).model
    assert load_model(latest_good(tmp_path), model)["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), state.model.parameters(), strict=True))


def test_files_are_plain_safetensors_and_json(tmp_path):
    from safetensors.torch import load_file

    state = saved_run(tmp_path)
    folder = latest_good(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json",
        "manifest.json",
        "meta.json",
        "shard_00000_00.safetensors",
    ]
    tensors = load_file(folder / "shard_00000_00.safetensors")
    assert torch.equal(tensors["model.0.weight"], state.model[0].weight)
    assert tensors["optim.0.2.bias.exp_avg"].shape == (3,)


def test_many_files_when_tensors_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.storage.FILE_BYTES", 600)
    state = saved_run(tmp_path)
    assert len(list(latest_good(tmp_path).glob("shard_*"))) > 3
    other = new_state(1)
    load(latest_good(tmp_path), other)
    assert_same(state, other)


def damage_truncate(folder: Path) -> str:
    os.truncate(folder / "shard_00000_00.safetensors", 100)
    return "100 bytes"


def damage_flip(folder: Path) -> str:
    path = folder / "shard_00000_00.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    return "SHA-256"


def damage_missing(folder: Path) -> str:
    (folder / "shard_00000_00.safetensors").unlink()
    return "missing"


def damage_meta(folder: Path) -> str:
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"step": 5', '"step": 6'))
    return "meta.json: SHA-256"


def damage_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "manifest.json"


def damage_no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def damage_foreign_file(folder: Path) -> str:
    (folder / "optimizer.pt").write_bytes(b"anything")
    return "optimizer.pt: not in the manifest"


DAMAGES = [
    damage_truncate,
    damage_flip,
    damage_missing,
    damage_meta,
    damage_manifest,
    damage_no_manifest,
    damage_foreign_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_by_name_and_reason(tmp_path, damage):
    saved_run(tmp_path, (3, 5))
    newest = tmp_path / "checkpoints" / "step_00000005"
    assert problems(newest) == []
    reason = damage(newest)
    said = []
    assert latest_good(tmp_path, said.append).name == "step_00000003"
    assert len(said) == 1 and "step_00000005" in said[0] and reason in said[0]


def test_before_a_step_means_before_it(tmp_path):
    saved_run(tmp_path, steps=(3, 6))
    assert latest_good(tmp_path, before=7).name == "step_00000006"
    assert latest_good(tmp_path, before=6).name == "step_00000003"
    assert latest_good(tmp_path, before=3) is None


def test_a_state_that_must_not_be_saved_is_not(tmp_path):
    def refuse():
        raise RuntimeError("tokens were altered")

    with pytest.raises(RuntimeError, match="tokens were altered"):
        saved_run(tmp_path, before_save=refuse)
    assert checkpoints(tmp_path / "checkpoints") == []


def test_one_step_is_written_once(tmp_path):
    saved = []
    state, saver = new_state(0), Checkpointer(tmp_path, on_saved=lambda report: saved.append(report.step))
    train(state, 3)
    for _ in range(2):
        saver.save(state, wait=True)
    assert saved == [3]


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_optimizer_tensors_must_be_exactly_the_states(tmp_path, change):
    saved_run(tmp_path)
    other = new_state(1)
    if change == "missing":
        for group in other.optimizers[0].param_groups:
            group["amsgrad"] = True  # one more tensor for each weight
    else:
        other.optimizers[0] = torch.optim.SGD(other.optimizers[0].param_groups, lr=0.01)
    with pytest.raises(CheckpointError, match="is missing" if change == "missing" else "is not in the model"):
        load(latest_good(tmp_path), other)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    saved_run(tmp_path, (3, 5))
    for folder in checkpoints(tmp_path / "checkpoints"):
        damage_flip(folder)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
        latest_good(tmp_path, lambda text: None)
    assert latest_good(tmp_path / "nothing") is None


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["NIBBLE_TEST_BOMB"]),))


@pytest.mark.parametrize("name", [".metadata", "data.pkl", "shard_00000_00.safetensors", "index.json", "meta.json"])
def test_planted_pickle_is_refused_and_never_run(tmp_path, monkeypatch, name):
    """Even with a manifest that vouches for it."""
    monkeypatch.setenv("NIBBLE_TEST_BOMB", str(tmp_path / "exploded"))
    saved_run(tmp_path)
    folder = latest_good(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        latest_good(tmp_path, lambda text: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    from training.checkpoint.manifest import write_durably

    manifest["files"][name] = write_durably(folder / name, [pickle.dumps(Bomb())])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)checkpoint|header|safetensors|json|decode|expecting|utf"):
        load(latest_good(tmp_path, lambda text: None), new_state(1))
    assert not (tmp_path / "exploded").exists()


def test_our_code_never_unpickles_a_checkpoint():
    files = sorted((Path(__file__).parents[2] / "training" / "checkpoint").glob("*.py"))
    assert len(files) > 4
    for file in files:
        text = file.read_text()
        assert "torch.load" not in text and "import pickle" not in text and "FileSystemReader" not in text


def test_other_model_other_hash_refused_with_names(tmp_path):
    saved_run(tmp_path)
    folder = latest_good(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.0\.bias: stored \(\(16,\), 'float32'\), needed \(\(32,\)"):
        load(folder, new_state(0, width=32))
    with pytest.raises(CheckpointError, match="hash abc, this one has xyz"):
        load(folder, new_state(0, hash_="xyz"))
    other = new_state(0)
    other.model.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"model\.extra\.bias is missing"):
        load(folder, other)
    fewer = TrainState(nn.Linear(8, 3), [], hash="abc")
    with pytest.raises(CheckpointError, match="is not in the model"):
        load(folder, fewer)


def test_retention_keeps_last_and_every(tmp_path):
    saved_run(tmp_path, tuple(range(1, 11)), keep_last=2, keep_every=4)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [
        "step_00000004",
        "step_00000008",
        "step_00000009",
        "step_00000010",
    ]
    prune(tmp_path / "checkpoints", 10, 1, 0)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step_00000010"]


def test_what_was_just_loaded_is_not_saved_again(tmp_path):
    state = saved_run(tmp_path)
    before = (tmp_path / "checkpoints" / "step_00000003").stat().st_ino
    Checkpointer(tmp_path, newest=3).save(state, wait=True)
    assert (tmp_path / "checkpoints" / "step_00000003").stat().st_ino == before


def test_a_checkpoint_is_deleted_only_when_its_successor_has_its_name(tmp_path, monkeypatch):
    saved_run(tmp_path)
    final = tmp_path / "checkpoints" / "step_00000003"
    there = []
    monkeypatch.setattr(
        "training.checkpoint.publish.shutil.rmtree", lambda path: there.append((path.name, final.exists()))
    )
    saved_run(tmp_path)
    ((name, has_successor),) = there
    assert name.startswith(".tmp-remove-step_00000003") and has_successor


def test_a_damaged_later_checkpoint_costs_no_good_one(tmp_path):
    """Resumed from step 3 because 9 is damaged: the save of step 6 must not count 9 as kept and delete itself."""
    saved_run(tmp_path, (3, 9))
    root = tmp_path / "checkpoints"
    damage_truncate(root / "step_00000009")
    saved_run(tmp_path, (6,), keep_last=1)
    assert [p.name for p in checkpoints(root)] == ["step_00000006", "step_00000009"]
    assert latest_good(tmp_path).name == "step_00000006"
    saved_run(tmp_path, (9,), keep_last=1)
    assert latest_good(tmp_path).name == "step_00000009" and len(checkpoints(root)) == 1


def test_temporary_folders_are_never_seen_and_removable(tmp_path):
    saved_run(tmp_path)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step_00000003", root / ".tmp-step_00000009-00000000")
    assert latest_good(tmp_path).name == "step_00000003"
    assert remove_temporary(root) == [".tmp-step_00000009-00000000"]
    assert [p.name for p in root.iterdir()] == ["step_00000003"]


def test_too_little_disk_says_so_before_writing(tmp_path, monkeypatch):
    saved_run(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("training.checkpoint.state.shutil.disk_usage", lambda path: usage)
    state = new_state(0)
    state.step = 4
    with pytest.raises(CheckpointError, match=r"takes 0\.07 GB, 0\.00 GB are free.*checkpoint\.keep_last"):
        Checkpointer(tmp_path).save(state)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_failed_write_is_reported_and_leaves_the_earlier_ones(tmp_path, monkeypatch):
    saved_run(tmp_path)

    def full(path, chunks):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint.publish.write_durably", full)
    state, saver = new_state(0), Checkpointer(tmp_path)
    state.step = 4
    saver.save(state)
    with pytest.raises(CheckpointError, match=r"step_00000004 was not saved: OSError: .*No space left"):
        saver.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert read_meta(latest_good(tmp_path))["step"] == 3


@pytest.mark.parametrize("room_for_a_note", [True, False])
def test_a_rank_whose_disk_is_full_ends_the_save_of_all(tmp_path, monkeypatch, room_for_a_note):
    """It would leave rank 0 waiting for half an hour where it can't write down what happened."""
    folder = tmp_path / "checkpoints" / ".tmp-step_00000004-0"
    folder.mkdir(parents=True)
    write, staged = publish.write_durably, StagedFile("shard_00001_00.safetensors", b"", torch.zeros(4).byte())

    def full(path, chunks):
        if path.name == staged.name:
            path.touch()
        if path.name == staged.name or ("part_00001" in path.name and (folder / staged.name).exists()):
            raise OSError(28, "No space left on device")
        if "part_00001" in path.name and not room_for_a_note:
            raise OSError(28, "No space left on device")
        return write(path, chunks)

    monkeypatch.setattr(publish, "write_durably", full)
    monkeypatch.setattr(publish, "write_json", lambda path, value: full(path, [json.dumps(value).encode()]))
    monkeypatch.setattr(publish, "PART_TIMEOUT_S", 10.0)
    final = folder.parent / "step_00000004"
    threads = [
        publish.PublishThread(publish.Job(folder, final, [staged] * rank, rank, 2, {}, {}, 2, 0)) for rank in (1, 0)
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(CheckpointError, match="No space left"):
        threads[0].result()
    says = "rank 1: .*No space left" if room_for_a_note else "rank 1 can't write"
    with pytest.raises(CheckpointError, match=says):
        threads[1].result()
    assert list(folder.parent.iterdir()) == []


def test_verification_shares_cover_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.storage.FILE_BYTES", 600)
    saved_run(tmp_path)
    folder = latest_good(tmp_path)
    for path in folder.glob("shard_*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    found = [p for share in range(3) for p in problems(folder, share, 3)]
    assert len(found) == len(list(folder.glob("shard_*"))) == len(set(found))


def test_reserved_buffers_are_used_and_shared_by_no_two_files(monkeypatch):
    monkeypatch.setattr("training.checkpoint.storage.FILE_BYTES", 600)
    buffers = StagingBuffers()
    buffers.reserve(1500, pinned=False)  # three files' worth
    taken = [buffers.get(name, nbytes, False) for name, nbytes in (("a", 600), ("b", 500), ("c", 20), ("d", 600))]
    assert [t.numel() for t in taken] == [600, 500, 20, 600]
    assert [t.untyped_storage().nbytes() for t in taken] == [600, 600, 600, 600]  # the fourth is its own
    assert len({t.data_ptr() for t in taken}) == 4
    assert buffers.get("b", 500, False) is taken[1]
    assert buffers.get("e", 900, False).untyped_storage().nbytes() == 900  # one tensor larger than a file
