"""What a run's model makes of a text behind another: its nats, and whether it would have written it itself.

One batch holds one question (its choices) and nothing else: the amax of a quantized tensor belongs to its batch, so an
answer depends on no other question. Rows are filled up on the right with BOS, which no earlier position sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import TextTokenizer
from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference_impl import head_bf16
from quant.plan import replaced
from training.checkpoint.state import load_model
from training.config import TrainConfig
from training.evaluate import EVAL_MICRO_BASE
from training.ranks.distributed import Dist
from training.reopen import reopen
from training.served import OWN, all_forwards

BLOCK = 16  # positions of a batch are a multiple: blocks of 16x16 divide it


@dataclass(frozen=True)
class Answer:
    """nats: of the whole text; tokens: its own; greedy: each of them was the model's likeliest."""

    nats: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Nats per token; infinite where there is nothing to read, so that it is never the best choice."""
        return self.nats / self.tokens if self.tokens else float("inf")


class Likelihood:
    """`rows`: the most sequences of a batch."""

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer, rows: int):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.width = model.config.max_seq_len
        self._head = head_bf16(model.head_weight.detach())

    def parts(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the context, BOS first, and of the text behind it, cut as lm-eval does: both are encoded as one
        text, white space at the context's end belongs to the text, and the context has as many ids as it has alone."""
        kept = context.rstrip()
        count = len(self.tokenizer.ids(kept)) if kept else 0
        ids = self.tokenizer.ids(context + text)
        return [self.tokenizer.bos_id, *ids[:count]], ids[count:]

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """One question: for each (ids before, at least one; ids of the text) what the model makes of the text."""
        cut = [(i, *part) for i, pair in enumerate(pairs) for part in windows(*pair, self.width)]
        nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for begin in range(0, len(cut), self.rows):
            some = cut[begin : begin + self.rows]
            hidden_BTD = self._hidden([tokens[:-1] for _, tokens, _ in some])
            for hidden_TD, (i, tokens, count) in zip(hidden_BTD, some, strict=True):
                h = hidden_TD[len(tokens) - 1 - count : len(tokens) - 1]
                targets = torch.tensor(tokens[-count:], device=h.device)
                each = linear_cross_entropy(h, self.model.head_weight, targets, True, self.model.softcap)
                nats[i] += each.double().sum().item()
                likeliest = F.linear(h.to(self._head.dtype), self._head).bfloat16().argmax(-1)
                greedy[i] &= bool((likeliest == targets).all())
        return [Answer(nats[i], len(text), greedy[i]) for i, (_, text) in enumerate(pairs)]

    def _hidden(self, rows: list[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        shape = len(rows), min(-(-longest // BLOCK) * BLOCK, self.width)
        tokens_BT = torch.full(shape, self.tokenizer.bos_id, device=self._head.device)
        for row, ids in zip(tokens_BT, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return self.model.hidden(tokens_BT)


def windows(before: Sequence[int], text: Sequence[int], width: int) -> Iterator[tuple[list[int], int]]:
    """(ids, how many at their end are scored): every id of the text once, at most `width` inputs, and before each piece
    as much of what precedes it as fits (lm-eval's rule for texts longer than the model's)."""
    ids = [*before, *text]
    for begin in range(len(before), len(ids), width):
        end = min(begin + width, len(ids))
        yield ids[max(0, end - 1 - width) : end], end - begin


@contextmanager
def opened(
    config: TrainConfig,
    run: Mapping[str, Any],
    checkpoint: Path,
    step: int,
    forward: str,
    tokenizer: TextTokenizer,
    ranks: Dist,
) -> Iterator[Likelihood]:
    """The weights of `checkpoint` under the run's own forward or one of score.FORWARDS. The rest as score.score."""
    if ranks.world > 1:
        raise ValueError("tasks are asked by one process: python scripts/score.py, without torchrun")
    again = reopen(config, run, step, ranks)
    load_model(checkpoint, again.model)
    again.rng[2] = EVAL_MICRO_BASE  # the same random bits for every question
    recipes = {} if forward == OWN else all_forwards(again.model, ())[forward]
    with replaced(again.model, recipes):
        yield Likelihood(again.model, tokenizer, again.numbers.micro)
