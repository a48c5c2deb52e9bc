"""Tasks asked of a model: log-likelihoods against a model whose every probability is known, and CORE's arithmetic."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kernels import backend
from training import core
from training.harness import Adapter, metrics
from training.likelihood import Likelihood, windows

LETTERS = "^abcd \n"  # the first one is BOS
# Logits of the next letter (column) behind each (row): small integers, which BF16 holds exactly.
LOGITS = np.random.default_rng(0).integers(-3, 4, (7, 7)).astype(float)
LOGITS[1, 5] = LOGITS[5, 2] = LOGITS[2, 4] = LOGITS[4, 5] = 4  # likeliest: a space behind a, b behind it, then d
LN = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))


class Pairs(nn.Module):
    """Knows the last letter alone: hidden states are one-hot."""

    config, softcap = SimpleNamespace(max_seq_len=20), None
    head_weight = torch.tensor(LOGITS.T, dtype=torch.float32)

    def hidden(self, tokens_BT):
        assert tokens_BT.shape[1] <= 20
        return torch.eye(7, dtype=torch.bfloat16)[tokens_BT]


class Tokenizer:
    bos_id = 0

    def ids(self, text):
        return [LETTERS.index(letter) for letter in text]


@pytest.fixture
def likelihood():
    backend.use("auto", "cpu")
    return Likelihood(Pairs(), Tokenizer(), rows=2)


def ln(context, text):
    """By hand: the sum over the text's letters of ln p(letter | the one before)."""
    ids = [LETTERS.index(letter) for letter in "^" + context + text]
    return sum(LN[i, j] for i, j in zip(ids[len(context) :], ids[len(context) + 1 :], strict=False))


def request(number, *args):
    return SimpleNamespace(args=args, task_name="t", doc_id=number)


def test_log_likelihoods_are_those_of_the_models_probabilities(likelihood):
    asked = [("ab", " cd"), ("ab", " dc"), ("ab", "a"), ("", "dab"), ("ab ", "c"), ("a" * 30, "bc"), ("b", "abcd" * 9)]
    found = Adapter(likelihood).loglikelihood([request(i // 3, *words) for i, words in enumerate(asked)])
    assert [value for value, _ in found[:4]] == pytest.approx([ln(*words) for words in asked[:4]], abs=1e-5)
    assert found[4][0] == pytest.approx(ln("ab", " c"), abs=1e-5)  # the space belongs to what follows it
    assert [value for value, _ in found[5:]] == pytest.approx([ln(*words) for words in asked[5:]], abs=1e-5)
    best = LETTERS[LOGITS[0].argmax()]
    other = LETTERS[LOGITS[0].argmin()]
    greedy = Adapter(likelihood).loglikelihood([request(0, "", best), request(0, "", other)])
    assert [flag for _, flag in greedy] == [True, False]


def test_a_long_document_is_read_in_windows_each_letter_once(likelihood):
    text = "abc d\ndcba" * 7
    (found,) = Adapter(likelihood).loglikelihood_rolling([request(0, text)])
    assert found == pytest.approx(ln("", text), abs=1e-4)
    # The example in lm-eval's documentation of loglikelihood_rolling: BOS and 0 to 9, four at a time.
    cut = list(windows([-1], range(10), 4))
    assert cut == [([-1, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]


def test_tasks_that_let_the_model_write_are_refused(likelihood):
    with pytest.raises(ValueError, match="let the model write"):
        Adapter(likelihood).generate_until([request(0, "a", {})])


def test_metrics_are_read_with_their_errors():
    row = {"alias": "t", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1.0}
    assert metrics(row | {"em_stderr,strict": "N/A"}) == {"acc": [0.5, 0.1], "em,strict": [1.0, None]}


CHOICES, OPTIONS = ["c", "da", "bd" + 6 * " bd"], ["cb", "a"]
KINDS = {  # answers are of unequal counts, so that each choice of the model's gives another accuracy
    "choice": (
        "multiple_choice",
        1,
        25.0,
        [{"query": "ab", "choices": CHOICES, "gold": g} for g in (0, 1, 1, 2, 2, 2)],
    ),
    "schema": ("schema", 0, 50.0, [{"context_options": OPTIONS, "continuation": "dd", "gold": g} for g in (0, 0, 1)]),
    "words": (
        "language_modeling",
        0,
        0.0,
        [{"context": " a ", "continuation": c} for c in ("b", "bd", "bc", "c", "d")],
    ),
}


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "eval_data").mkdir()
    listed, chances = "icl_tasks:\n", "Eval Task,Task Category,Random baseline\n"
    for name, (kind, shots, chance, items) in KINDS.items():
        listed += f"- {{label: {name}, dataset_uri: {name}.jsonl, num_fewshot: [{shots}], icl_task_type: {kind}}}\n"
        chances += f"{name},made up,{chance}\n"
        (tmp_path / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "core.yaml").write_text(listed)
    (tmp_path / "eval_meta_data.csv").write_text(chances)
    return tmp_path


def test_core_asks_what_its_files_say_and_centres(bundle, likelihood):
    tasks = core.read_tasks(bundle)
    rows = core.ask(tasks, likelihood, lambda text: None)
    accuracies = {name: rows[name]["metrics"]["acc"][0] for name in KINDS}
    # Behind "ab" and a space; with the sum of the letters the shortest would win.
    sums = [ln("ab ", text) for text in CHOICES]
    best = int(np.argmax([nats / len(text) for nats, text in zip(sums, CHOICES, strict=True)]))
    assert best == 2 != np.argmax(sums)
    assert accuracies["choice"] == 3 / 6
    ends = [ln(option, " dd") for option in OPTIONS]
    assert np.argmax(ends) == 1 and accuracies["schema"] == 1 / 3
    assert accuracies["words"] == 2 / 5
    centred = [(accuracies[name] - chance / 100) / (1 - chance / 100) for name, (_, _, chance, _) in KINDS.items()]
    assert rows["core"]["metrics"]["core"][0] == pytest.approx(np.mean(centred))
    assert [row["shots"] for row in rows.values()] == [1, 0, 0, None]


def test_centring_has_guessing_at_0_and_its_error_grows_with_it():
    assert core.centre(0.25, 0.03, 0.25) == [0.0, pytest.approx(0.04)]
    assert core.centre(1.0, None, 0.25) == [1.0, None]
    assert core.mean([[0.2, 0.3], [0.4, 0.4]]) == pytest.approx([0.3, 0.25])
    assert core.mean([[0.2, 0.3], [0.4, None]])[1] is None


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("core.yaml", "icl_task_type: schema", "icl_task_type: scheme", ["schema", "scheme", "multiple_choice"]),
        ("core.yaml", "num_fewshot: [1]", "num_fewshot: [6]", ["choice", "6 lines"]),
        ("core.yaml", "dataset_uri: words.jsonl, ", "", ["words", "dataset_uri"]),
        ("eval_meta_data.csv", "schema,made up,50.0", "schema,made up,", ["eval_meta_data.csv", "schema"]),
        ("eval_meta_data.csv", "schema,made up,50.0", "schema,made up,100", ["eval_meta_data.csv", "below 100"]),
        ("eval_data/choice.jsonl", '"gold": 2', '"gold": 3', ["choice.jsonl:4", "gold"]),
    ],
)
def test_a_bundle_that_cannot_be_asked_is_refused_by_name(bundle, file, old, new, words):
    path = bundle / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError) as error:
        core.read_tasks(bundle)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
