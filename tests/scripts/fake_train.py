"""Stands in for train.py in tests of run_grid.py: 20 short steps, resumable, stops on SIGTERM, locks its folder; waits
after its third step while there is a file `hold` in its folder.

It composes nothing, so that it starts at once: a cell's folder is the plain one, or run.name's.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.cells import folder_name

STEPS, HELD_AT = 20, 3


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words)
    name = given.get("run.name") or folder_name(given["experiment"], given["cell"])
    folder = Path(given["paths.runs"]) / name
    if given.get("seed") == "666":
        print("no such data")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)  # held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    numerics = json.loads(Path(os.environ["FAKE_NUMERICS"]).read_text())  # of each seed: torch takes too long here
    (folder / "run.json").write_text(json.dumps({"numerics": numerics[given["cell"].rpartition("/s")[2]]}))
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    with open(folder / "starts", "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, STEPS + 1):
        time.sleep(0.01 * int(given.get("log.every", "1")))
        with open(metrics, "a") as file:
            file.write(json.dumps({"kind": "train", "step": step}) + "\n")
        while step == HELD_AT and (folder / "hold").exists() and not stop:
            time.sleep(0.01)
        if stop:
            return 75
    (folder / "result.json").write_text(json.dumps({"status": "finished", "step": STEPS, "final_loss": 3.0}))
    return 0


sys.exit(main(sys.argv[1:]))
