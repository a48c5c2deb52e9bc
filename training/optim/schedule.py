"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """`lr(step)` for step = 0 .. steps - 1, the number of optimizer steps already done.

    cosine: lr * start_factor -> lr over `warmup_steps`, -> lr * end_factor at the last step, both cosine-shaped. The
            same numbers as torch's OneCycleLR(div_factor=1/start, final_div_factor=start/end), which the published
            runs used: the peak is at step warmup_steps - 1.
    others: linear warm-up, flat, decay over the last `decay_steps`, one decrement short of lr * end_factor. wsd has the
            decay that its options say, linear all that the warm-up leaves, constant none. `decay_shape` with a share p
            of the decay done: linear 1 - p, sqrt 1 - sqrt(p), which falls early (arXiv 2405.18392).
    """

    name: str
    lr_peak: float
    steps: int
    warmup_steps: int
    start_factor: float
    end_factor: float
    decay_steps: int = 0
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up and {self.decay_steps} decay steps don't fit {self.steps} steps; "
                "lower schedule.warmup_steps, schedule.warmup_fraction or schedule.decay_fraction"
            )

    def to_dict(self) -> dict[str, Any]:
        """For a run's identity: a later field only where it is used, so that older runs keep their hash."""
        fields = asdict(self)
        return {key: fields[key] for key in fields if key != "decay_shape" or fields[key] != "linear"}

    def lr(self, step: int) -> float:
        return self.lr_peak * (self._cosine(step) if self.name == "cosine" else self._wsd(step))

    def _cosine(self, step: int) -> float:
        peak_at = max(self.warmup_steps - 1, 0)
        if step < peak_at:
            return cosine_between(self.start_factor, 1.0, step / peak_at)
        return cosine_between(1.0, self.end_factor, (step - peak_at) / max(self.steps - 1 - peak_at, 1))

    def _wsd(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start_factor + (1.0 - self.start_factor) * (step + 1) / self.warmup_steps
        left = min(1.0, (self.steps - step) / self.decay_steps) if self.decay_steps else 1.0
        if self.decay_shape == "sqrt":
            left = 1.0 - math.sqrt(1.0 - left)
        return self.end_factor + (1.0 - self.end_factor) * left


def cosine_between(start: float, end: float, progress: float) -> float:
    """start at progress 0, end at progress 1, along half a cosine."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0
