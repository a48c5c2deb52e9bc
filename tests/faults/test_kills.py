"""kill -9 of one rank and of all at random moments, in the middle of saves too: what follows is bitwise the same run.

NIBBLE_FAULT_KILLS kills per test (default 50, two tests: 100); `make faults` prints the counts.
"""

import os
import random
import time

import pytest
from forked import Ranks
from reading import differing_tensors, steps_of, train_rows

from training.checkpoint.manifest import checkpoints, latest_good

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("NIBBLE_FAULT_KILLS", "50"))
STEPS, EVERY = 6 * KILLS, 2  # an unloaded machine gets 4 steps further between two kills
# Survivors notice a dead peer by its closed connection. torchrun waits 30 s before it uses SIGKILL.
SURVIVORS_S = 30


def saving(folder) -> bool:
    root = folder / "checkpoints"
    return root.is_dir() and any(path.name.startswith(".tmp-step") for path in root.iterdir())


def wait_for_a_moment(ranks: Ranks, folder, draw: random.Random) -> str:
    """A third of the kills fall into a save, the others anywhere from the start on."""
    if draw.random() < 1 / 3:
        while ranks.alive() and not saving(folder):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.004))
        return "save"
    time.sleep(draw.uniform(0, 3 * draw.random() * STEP_S * EVERY + 1))
    return "any"


STEP_S = 0.3


@pytest.mark.parametrize("victims", ["one rank", "all ranks"])
def test_killed_runs_continue_bitwise(overrides, tmp_path, victims, capsys):
    options = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep_last=2"]
    assert Ranks(overrides("straight", *options), tmp_path / "straight.log", world=2).wait(900) == [0, 0]
    draw, folder = random.Random(victims), tmp_path / "runs" / "killed"
    kills, in_save, lost, stubborn = 0, 0, [], 0
    while kills < KILLS:
        ranks = Ranks(overrides("killed", *options), tmp_path / "killed.log", world=2)
        wait_for_a_moment(ranks, folder, draw)
        if len(ranks.alive()) < 2:
            break  # finished before its time
        in_save += saving(folder)
        reached = max([0, *steps_of(folder)])
        ranks.kill([draw.randrange(2)] if victims == "one rank" else [0, 1])
        stubborn += ranks.end_survivors(SURVIVORS_S)
        kills += 1
        good = latest_good(folder, say=lambda text: None)
        lost.append(reached - (int(good.name.removeprefix("step_")) if good else 0))
    codes = Ranks(overrides("killed", *options), tmp_path / "killed.log", world=2).wait(900)
    with capsys.disabled():
        print(
            f"\n{kills} kills of {victims}, {in_save} in a save; at most {max(lost)} steps lost (interval {EVERY}); ",
            end="",
        )
        print(f"{stubborn} survivors needed SIGKILL")
    assert codes == [0, 0], (tmp_path / "killed.log").read_text()[-2000:]
    assert kills == KILLS and stubborn == 0
    assert max(lost) <= 2 * EVERY  # an asynchronous save that is killed costs the interval before it too
    straight = tmp_path / "runs" / "straight"
    assert steps_of(folder) == list(range(1, STEPS + 1))
    assert train_rows(folder) == train_rows(straight)
    ends = [checkpoints(path / "checkpoints")[-1] for path in (straight, folder)]
    assert differing_tensors(*ends) == []
