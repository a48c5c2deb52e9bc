"""What a check says: one line for each kernel, with one of four states; and the file that carries them elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RIGHT = "runs and right"
WRONG = "WRONG"
NOT_RUN = "compiled, not run here"
NOT_COMPILED = "not compiled"
NOT_HERE = "not here"


@dataclass(frozen=True)
class Line:
    """The outcome for one kernel. detail: what was compared and how closely, or why it could not be."""

    kernel: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kernel:34} {self.state:24} {self.detail}"


def judge(kernel: str, failures: list[str], detail: str) -> Line:
    """RIGHT with `detail`, or WRONG with the failures (the first three of them)."""
    if not failures:
        return Line(kernel, RIGHT, detail)
    more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
    return Line(kernel, WRONG, "; ".join(failures[:3]) + more)


def write(path: Path, machine: list[str], lines: Sequence[Line], speed: list[str]) -> None:
    """One file that an owner of a GPU can send: what the machine is, every check, the speed tables. JSON."""
    record = {"machine": machine, "checks": [asdict(line) for line in lines], "speed": speed}
    path.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> tuple[list[str], list[Line], list[str]]:
    """(machine, lines, speed) of a file that `write` made. ValueError says that it is none, or which part lacks."""
    try:
        record = json.loads(path.read_text())
        return record["machine"], [Line(**line) for line in record["checks"]], record["speed"]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        how = "python -m kernels.selftest --report FILE writes one"
        raise ValueError(f"{path} is no report of the self-test ({error!r}); {how}") from None


def compared(ours: Sequence[Line], theirs: Sequence[Line]) -> list[str]:
    """A line for each kernel of either: its state there and here, and what was found there."""
    here = {line.kernel: line.state for line in ours}
    rows = [f"{'kernel':34} {'there':24} {'here':24}"]
    for line in theirs:
        rows.append(f"{line.kernel:34} {line.state:24} {here.pop(line.kernel, 'not checked'):24} {line.detail}")
    return rows + [f"{kernel:34} {'not checked':24} {state:24}" for kernel, state in here.items()]
