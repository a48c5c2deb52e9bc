"""CORE, the mean centred accuracy over the 22 tasks of DataComp-LM (arXiv 2406.11794), as nanochat measures it.

From local files in the layout of nanochat's bundle: core.yaml (`icl_tasks`: label, dataset_uri, num_fewshot,
icl_task_type, continuation_delimiter), eval_meta_data.csv ("Eval Task", "Random baseline" in percent) and
eval_data/<dataset_uri>, one JSON object a line. A folder may name fewer tasks or others.
"""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from base import yamlfile
from training.likelihood import Likelihood

# nanochat's, so that figures can be compared: of the questions' order and, plus its number, of a question's examples.
SHUFFLE, EXAMPLES = 1337, 1234
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
CHOICES = {"multiple_choice": "choices", "schema": "context_options"}
Item = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`chance`: accuracy of guessing, 0 to 1."""

    label: str
    kind: str
    shots: int
    between: str
    chance: float
    items: list[Item]


def read_tasks(folder: Path) -> list[Task]:
    """ValueError, in one line, for a file or a field that isn't there and for what can't be asked."""
    listed, chances = folder / "core.yaml", folder / "eval_meta_data.csv"
    for path in (listed, chances):
        if not path.is_file():
            raise ValueError(
                f"--core {folder}: has no {path.name}; needs the folder of nanochat's bundle, with "
                "core.yaml, eval_meta_data.csv and eval_data/"
            )
    with open(chances, newline="", encoding="utf-8") as file:
        chance = {row.get("Eval Task"): row.get("Random baseline") for row in csv.DictReader(file)}
    entries = (yamlfile.read(listed) or {}).get("icl_tasks")
    if not entries:
        raise ValueError(f"{listed}: names no task under icl_tasks")
    return [_task(folder, entry, chance) for entry in entries]


def _task(folder: Path, entry: Item, chances: dict[str, str]) -> Task:
    where = f"{folder / 'core.yaml'}: {entry.get('label')}"
    missing = {"label", "dataset_uri", "num_fewshot", "icl_task_type"} - entry.keys()
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}")
    kind, shots = entry["icl_task_type"], entry["num_fewshot"]
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if not isinstance(shots, int) or shots < 0:
        raise ValueError(f"{where}: num_fewshot {shots}: needs a number, or a list of one")
    if kind not in FIELDS:
        raise ValueError(f"{where}: icl_task_type {kind}: needs one of {', '.join(FIELDS)}")
    try:
        chance = float(chances[entry["label"]]) / 100
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder / 'eval_meta_data.csv'}: needs a row whose 'Eval Task' is {entry['label']}, with a "
            "number, percent, under 'Random baseline'"
        ) from None
    if not 0 <= chance < 1:
        raise ValueError(
            f"{folder / 'eval_meta_data.csv'}: {entry['label']}: {100 * chance:g} is no percentage below 100"
        )
    items = read_items(folder / "eval_data" / entry["dataset_uri"], kind)
    if len(items) <= shots:
        raise ValueError(f"{where}: {shots} examples before a question need more than {len(items)} lines")
    return Task(entry["label"], kind, shots, entry.get("continuation_delimiter", " "), chance, items)


def read_items(path: Path, kind: str) -> list[Item]:
    """In nanochat's order."""
    items = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                items.append({key: row[key] for key in FIELDS[kind]})
                if kind in CHOICES:
                    row[CHOICES[kind]][row["gold"]]  # raises where there is no such choice
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"{path}:{number}: no question of kind {kind} ({error!r}); needs {', '.join(FIELDS[kind])}"
                ) from None
    random.Random(SHUFFLE).shuffle(items)
    return items


def ask(tasks: list[Task], likelihood: Likelihood, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """{task: source, questions, shots, metrics {name: [value, standard error]}}, the last one `core` itself."""
    rows, centred = {}, []
    for task in tasks:
        say(f"{task.label}: {len(task.items)} questions")
        accuracy = sum(is_right(task, number, likelihood) for number in range(len(task.items))) / len(task.items)
        error = sqrt(accuracy * (1 - accuracy) / (len(task.items) - 1)) if len(task.items) > 1 else None
        centred.append(centre(accuracy, error, task.chance))
        figures = {"acc": [accuracy, error], "centred": centred[-1]}
        rows[task.label] = {"source": "core", "questions": len(task.items), "shots": task.shots, "metrics": figures}
    questions = sum(len(task.items) for task in tasks)
    return rows | {
        "core": {"source": "core", "questions": questions, "shots": None, "metrics": {"core": mean(centred)}}
    }


def centre(accuracy: float, error: float | None, chance: float) -> list[float | None]:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for all right; and its standard error."""
    return [(accuracy - chance) / (1 - chance), None if error is None else error / (1 - chance)]


def mean(centred: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of [value, error] pairs, each task with the same weight; the errors, of different questions, are independent."""
    errors = [error for _, error in centred]
    count = len(centred)
    error = None if None in errors else sqrt(sum(error**2 for error in errors)) / count
    return [sum(value for value, _ in centred) / count, error]


def is_right(task: Task, number: int, likelihood: Likelihood) -> bool:
    """Whether the right choice has the fewest nats per token, the first of equals; of language_modeling, whether greedy
    decoding gives the continuation."""
    others = [item for i, item in enumerate(task.items) if i != number]
    examples = random.Random(EXAMPLES + number).sample(others, task.shots)
    pairs = asked(task, task.items[number], examples, likelihood)
    answers = likelihood.score(pairs)
    if task.kind == "language_modeling":
        return answers[0].greedy
    means = [answer.mean for answer in answers]
    return means.index(min(means)) == task.items[number]["gold"]


def asked(task: Task, item: Item, examples: list[Item], likelihood: Likelihood) -> list[tuple[list[int], list[int]]]:
    """(ids before, ids that are scored) of each choice. Where texts differ is found in their tokens: choices of
    multiple_choice behind what they begin with together, of schema what they end with together."""
    front = "".join(f"{solved(task, example)}\n\n" for example in examples)
    if task.kind == "multiple_choice":
        texts = [f"{front}{item['query']}{task.between}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        texts = [f"{front}{option}{task.between}{item['continuation']}" for option in item["context_options"]]
    else:
        before = f"{front}{item['context'].strip()}{task.between}"
        texts = [before.strip(), before + item["continuation"]]
    rows = [[likelihood.tokenizer.bos_id, *likelihood.tokenizer.ids(text)] for text in texts]
    if task.kind == "schema":
        shared = min(common([row[::-1] for row in rows]), min(map(len, rows)) - 1)
        return [(row[: len(row) - shared], row[len(row) - shared :]) for row in rows]
    shared = common(rows)
    return [(row[:shared], row[shared:]) for row in (rows[1:] if task.kind == "language_modeling" else rows)]


def solved(task: Task, example: Item) -> str:
    if task.kind == "multiple_choice":
        return f"{example['query']}{task.between}{example['choices'][example['gold']]}"
    if task.kind == "schema":
        return f"{example['context_options'][example['gold']]}{task.between}{example['continuation']}"
    return f"{example['context'].strip()}{task.between}{example['continuation']}"


def common(rows: list[list[int]]) -> int:
    """How many of their first elements all rows share."""
    alike = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    return alike.index(False) if False in alike else len(alike)
