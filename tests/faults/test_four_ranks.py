"""Four ranks, of which one dies, is full, or was started otherwise: all end soon, with a line each,
and the last checkpoint is whole. By hand, with the others here (about 40 s)."""

import errno
import json
import os
import re
import signal
import time

import forked
import pytest
from forked import Ranks

from base.runfolder import CHECKPOINTS
from training.checkpoint.manifest import checkpoints, problems

pytestmark = pytest.mark.faults
VICTIM, FOUR = 2, ["batch.sequences=4"]
SOON_S = 30


def end(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_building() -> None:
    from training.start import launch

    launch.build_loss = end


def dies_in_step(number: int):
    def plant() -> None:
        from training.loop import Trainer

        step = Trainer._train_step
        Trainer._train_step = lambda self: end() if self.state.step == number else step(self)

    return plant


def writing(fault):
    """`fault` in place of every file of the second checkpoint."""

    def plant() -> None:
        from training.checkpoint import publish

        write = publish.write_durably

        def planted(path, chunks):
            return (fault if "step_00000006" in str(path) else write)(path, chunks)

        publish.write_durably = planted
        publish.write_json = lambda path, value: planted(path, [json.dumps(value).encode()])

    return plant


def full(path, chunks):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def told(word: str):
    def plant() -> None:
        compose = forked.compose
        forked.compose = lambda words, typed: compose([*words, word], typed=typed)

    return plant


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("plant", "saved", "says", "code"),
    [
        (dies_building, [], "another rank has ended", 1),
        (dies_in_step(0), [], "another rank has ended", 1),
        (dies_in_step(4), [3], "another rank has ended", 1),
        (writing(end), [3], "another rank has ended", 1),
        (writing(full), [3], f"rank {VICTIM} can't write", 1),
        (told("nonfinite=skip"), [], f"rank {VICTIM} on .*nonfinite=skip against stop", 2),
    ],
    ids=["building", "first step", "later step", "killed in a save", "full disk", "another command"],
)
def test_one_of_four(overrides, tmp_path, mode, plant, saved, says, code):
    log, folder = tmp_path / "log", tmp_path / "runs" / "four"
    begin = time.monotonic()
    words = overrides("four", *FOUR, f"parallel={mode}")
    ranks = Ranks(words, log, 4, patch=lambda rank: plant() if rank == VICTIM else None)
    codes = ranks.wait(SOON_S)
    assert time.monotonic() - begin < SOON_S
    killed = codes[VICTIM] == -signal.SIGKILL
    assert [c for c in codes if c != -signal.SIGKILL] == [code] * (4 - killed)
    errors = [line for line in log.read_text().splitlines() if "error:" in line]
    assert len(errors) == 4 - killed and "Traceback" not in log.read_text()
    assert all(re.search(says, line) for line in errors)
    found = checkpoints(folder / CHECKPOINTS)
    assert [int(path.name.removeprefix("step_")) for path in found] == saved
    assert not any(map(problems, found))
