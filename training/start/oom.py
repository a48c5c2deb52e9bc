"""What a person can type after an out-of-memory error, with the memory expected of each change."""

from dataclasses import replace

from training.config import TrainConfig
from training.ranks.distributed import Dist
from training.ranks.parallel import choose
from training.start.build import is_graphed
from training.start.describe import Description, expected_memory


def advice(error: BaseException, config: TrainConfig, described: Description, ranks: Dist) -> str:
    """One line. Changes that keep the run come first; the micro-batch is part of the numerics."""
    mode = choose(config.parallel, ranks, described.shape.parameters)

    def gib(described: Description = described, mode: str = mode, **changes: bool) -> str:
        graphed = is_graphed(replace(config, cuda_graphs="auto"), described.plan.fullgraph, mode, ranks.device)
        total = expected_memory(replace(config, **changes), described, ranks, mode, graphed).total
        return f"{total:.1f} GiB expected"

    keeping = []
    if not config.recompute and all(recipe.recomputable for plan in described.plans for recipe in plan.recipes):
        keeping.append(f"recompute=true ({gib(recompute=True)})")
    if ranks.world == 1:
        keeping.append("parallel=fsdp on several GPUs, by torchrun --nproc-per-node=gpu")
    elif mode != "fsdp":
        keeping.append(f"parallel=fsdp ({gib(mode='fsdp')})")
    said = f"out of GPU memory ({str(error).splitlines()[0]}); {gib()} of this configuration. "
    said += f"This very run can go on with {' or '.join(keeping)}. " if keeping else ""
    if micro := smaller_micro(described):
        smaller = replace(described, numbers=replace(described.numbers, micro=micro))
        said += f"batch.micro={micro} ({gib(smaller)}) is another run: the micro-batch is part of the numerics. "
    return said + ("" if config.profile.steps else "profile=true shows what takes the memory")


def smaller_micro(described: Description) -> int | None:
    """The largest smaller micro-batch that divides every rank's share of the batch and that the recipes can take."""
    numbers = described.numbers
    share = numbers.sequences // numbers.world
    return next((m for m in range(numbers.micro - 1, 0, -1) if share % m == 0 and fits(described, m)), None)


def fits(described: Description, micro: int) -> bool:
    try:
        for plan in described.plans:
            plan.check_tokens(micro * described.numbers.seq_len)
    except ValueError:
        return False
    return True
