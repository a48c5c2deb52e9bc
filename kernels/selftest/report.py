"""What a check says: one line for each kernel, with one of four states."""

from dataclasses import dataclass

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
