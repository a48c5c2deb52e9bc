"""Scales rows or columns of weights back to length one after every step (nGPT, arXiv 2410.01131), and before the first.

Under FSDP2 a rank holds some rows of each matrix. Their lengths are its own business; those of columns take sums over
the ranks that share a matrix: one all-reduce for all matrices. Nothing goes over replicas, which hold equal weights.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.unit import COLUMNS, ROWS, divisors, square_sums
from quant.plan import Plan
from training.hooks.base import Hook, Run, check_globs
from training.ranks.distributed import local, shard_groups


@dataclass(frozen=True)
class NormalizeOptions:
    """Globs over parameters' names: matrices [out, in] whose rows, or whose columns, have length one."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("rows", "columns"):
            globs = getattr(self, field)
            if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
                example = f"hooks.normalize.{field}=[lm_head.weight]"
                raise ValueError(f"hooks.normalize.{field}={globs!r}: needs a list of names, such as {example}")
            object.__setattr__(self, field, tuple(globs))


class Normalize(Hook):
    """No state: what is of length one already keeps its bits, so that a fork goes on with those of its parent."""

    Options = NormalizeOptions

    def __init__(self, options: NormalizeOptions, run: Run):
        super().__init__(options, run)
        rows, columns = matching(run.model, options.rows), matching(run.model, options.columns)
        self._rows = [local(parameter.detach()) for parameter in rows.values()]
        self._columns = [local(parameter.detach()) for parameter in columns.values()]
        self._groups = shard_groups(next(iter(columns.values()), None))

    @classmethod
    def check(cls, options: NormalizeOptions, model: nn.Module, plan: Plan) -> None:
        for glob in (*options.rows, *options.columns):
            check_globs("hooks.normalize", [glob], model)
            if flat := [name for name, parameter in matching(model, (glob,)).items() if parameter.ndim != 2]:
                raise ValueError(f"hooks.normalize: {glob!r} matches {flat[0]}, which is no matrix; name matrices only")
        twice = matching(model, options.rows).keys() & matching(model, options.columns).keys()
        if twice:
            raise ValueError(f"hooks.normalize: rows and columns both name {min(twice)}; leave it out of one of them")

    def begin(self, step: int) -> None:
        held = [*self._rows, *self._columns]
        if held:
            self.after_step(step, torch.zeros((), device=held[0].device))

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        for weight in self._rows:
            weight.div_(divisors_unless(skip, square_sums(weight, ROWS))[:, None])
        if not self._columns:
            return
        sums = torch.cat([square_sums(weight, COLUMNS) for weight in self._columns])
        for group in self._groups:
            dist.all_reduce(sums, group=group)
        widths = [weight.shape[1] for weight in self._columns]
        for weight, by in zip(self._columns, divisors_unless(skip, sums).split(widths), strict=True):
            weight.div_(by)


def divisors_unless(skip: Tensor, sums: Tensor) -> Tensor:
    """1, which changes no bit, where `skip` is raised."""
    return torch.where(skip > 0, 1.0, divisors(sums))


def matching(model: nn.Module, globs: tuple[str, ...]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if any(fnmatchcase(name, glob) for glob in globs)}
