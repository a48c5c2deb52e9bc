"""Export to transformers gives equal logits; sampling is reproducible and reads the run's own tokenizer."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.tokenizer import TextTokenizer
from scripts import export_hf, generate
from scripts.generate import continuation
from training.checkpoint.storage import CheckpointError
from training.inference import load_trained, run_tokenizer, sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Where the one run is kept that all these tests copy."""
    return tmp_path_factory.mktemp("once") / "test"


@pytest.fixture
def trained(run, once, tmp_path):
    if not once.exists():
        shutil.copytree(run("quant=quartet2", "evaluate.every=null")[1], once)
    return Path(shutil.copytree(once, tmp_path / "runs" / "test", dirs_exist_ok=True))


def process(name: str, *arguments) -> subprocess.CompletedProcess:
    """A script as it is typed; `script` is quicker."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def script(name: str, *arguments) -> subprocess.CompletedProcess:
    """A script's main in this process."""
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *words])
        try:
            code = {"generate.py": generate, "export_hf.py": export_hf}[name].main()
        except SystemExit as left:
            code = left.code
    return subprocess.CompletedProcess([name, *words], code, out.getvalue(), err.getvalue())


def test_exported_model_has_equal_logits_in_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    done = process("export_hf.py", trained, tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    assert f"{trained.name} at step 10, 191,872 parameters" in done.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ours, run_info, step = load_trained(trained)
    assert (run_info["recipe"], step) == ("quartet2", 10)
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, reference = ours(tokens), theirs(tokens).logits
    assert (mine - reference).abs().max() < 1e-5 * reference.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.decode(tokenizer.encode("kana lore", add_special_tokens=False)) == "kana lore"
    bos_id = json.loads(Path(run_info["data_path"], "manifest.json").read_text())["tokenizer"]["bos_id"]
    assert theirs.config.bos_token_id == tokenizer.bos_token_id == bos_id
    assert tokenizer.encode("kana")[0] == bos_id != tokenizer.encode("kana")[1]  # as in training, once
    again = script("export_hf.py", trained, tmp_path / "exported")
    assert again.returncode == 1 and "is not empty" in again.stderr


def test_transformers_generation_pads_and_stops_at_the_end_of_the_document(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert script("export_hf.py", trained, tmp_path / "out").returncode == 0
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # all for colleagues to read
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    def generated(texts: list[str]) -> list[list[int]]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        found = model.generate(**batch, max_new_tokens=8, do_sample=False)
        return found[:, batch.input_ids.shape[1] :].tolist()

    texts = ["kana", "kana lore miti suvo"]
    together = generated(texts)
    assert together == [generated([text])[0] for text in texts] and len(together[0]) == 8
    seen = []

    def favour_bos_in_the_end(module, inputs, logits):
        seen.append(1)
        if len(seen) > 1:  # not as the first token
            logits[..., tokenizer.bos_token_id] += 1e4

    model.lm_head.register_forward_hook(favour_bos_in_the_end)
    assert generated(["kana"]) == [[together[0][0], tokenizer.bos_token_id]]


def test_bf16_export_rounds_the_weights_once(trained, tmp_path):
    from safetensors.torch import load_file

    assert script("export_hf.py", trained, tmp_path / "small", "--dtype", "bfloat16").returncode == 0
    weights = load_file(tmp_path / "small" / "model.safetensors")
    model, _, _ = load_trained(trained)
    head = weights["lm_head.weight"]
    assert head.dtype == torch.bfloat16 and torch.equal(head, model.lm_head.weight.to(torch.bfloat16))


def test_generated_text_depends_on_the_seed_alone(trained):
    first = process("generate.py", trained, "kana", "--tokens", 20, "--seed", 1)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("kana") and len(first.stdout) > 10
    assert "at step 10" in first.stderr
    assert script("generate.py", trained, "kana", "--tokens", 20, "--seed", 1).stdout == first.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", 0], "need at least 1"),
        (["--temperature", -1], "at least 0"),
        (["--tokenizer", "README.md"], "README.md can't be read as a tokenizer.json"),
        (["--seed", 2**63], "--seed needs 0 to 2^63 - 1"),
        ([b"\xff"], "the prompt UTF-8"),
    ],
)
def test_wrong_options_of_generate_are_one_line(trained, options, says):
    prompt = [] if options == [b"\xff"] else ["kana"]
    done = script("generate.py", trained, *prompt, *options)
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr


def test_another_tokenizer_than_the_runs_is_refused(trained, tmp_path):
    data = json.loads((trained / "run.json").read_text())["data_path"]
    content = json.loads(Path(data, "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "other.json").write_text(json.dumps(content))
    done = script("generate.py", trained, "kana", "--tokenizer", tmp_path / "other.json")
    assert done.returncode == 1 and "other.json is not the tokenizer that" in done.stderr


def test_the_tokenizer_keeps_the_bos_of_the_runs_data(trained, tmp_path, monkeypatch):
    run = json.loads((trained / "run.json").read_text())
    folder = shutil.copytree(run["data_path"], tmp_path / "data")
    for name in ("tokenizer.json", "manifest.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|bos|>", "<|start|>"))
    given = shutil.copy(folder / "tokenizer.json", tmp_path / "given.json")
    with pytest.raises(ValueError, match="is not the tokenizer that test was trained with"):
        run_tokenizer(run | {"data_path": str(folder)})
    changed = run | {"data_path": str(folder), "tokenizer_hash": TextTokenizer(given, "<|start|>").hash}
    assert run_tokenizer(changed).bos == "<|start|>"
    assert run_tokenizer(changed, given).path == given and run_tokenizer(changed, given).bos == "<|start|>"
    monkeypatch.chdir(folder)  # a run that names no data doesn't take what lies where it is asked
    assert run_tokenizer(changed | {"data_path": ""}) is None


@pytest.mark.parametrize("kind", ["metaspace", "byte level", "wordpiece"])
def test_generated_text_follows_the_prompt_with_the_spaces_that_it_has(kind):
    """SentencePiece's decoder takes the first space of what it is given: the words were glued to the prompt."""
    from tokenizers import Tokenizer, decoders, models

    space = {"metaspace": "\u2581", "byte level": "\u0120", "wordpiece": ""}[kind]
    words = [f"{space}the", f"{space}end", "the", "##ing" if kind == "wordpiece" else "ing", "<s>", "end"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<s>"))
    inner.decoder = {
        "metaspace": decoders.Metaspace(),
        "byte level": decoders.ByteLevel(),
        "wordpiece": decoders.WordPiece(cleanup=False),
    }[kind]
    tokenizer = SimpleNamespace(tokenizer=inner)
    number = inner.get_vocab()
    first, ing = number[f"{space}the"], number["##ing" if kind == "wordpiece" else "ing"]
    following = [number[f"{space}end"], ing]
    assert continuation(tokenizer, [first], following) == " ending"
    assert continuation(tokenizer, [first], [ing]) == "ing"
    assert continuation(tokenizer, [], following).lstrip() == "ending"


def test_generation_ends_with_the_document(trained, monkeypatch, capsys):
    model, run, step = load_trained(trained)
    bos = run_tokenizer(run).bos_id

    class Ends(torch.nn.Module):
        config = model.config

        def forward(self, tokens):
            logits = model(tokens)
            logits[0, -1, bos] += 1e4 if tokens.shape[1] > 4 else -1e4
            return logits

    monkeypatch.setattr(generate, "load_trained", lambda *_: (Ends(), run, step))
    monkeypatch.setattr("sys.argv", ["generate.py", str(trained), "ka", "--tokens", "50", "--temperature", "0"])
    assert generate.main() == 0
    said = capsys.readouterr()
    assert "end of the document" in said.err and 2 < len(said.out.strip()) < 30 and "<|bos|>" not in said.out


def test_sampling_follows_the_logits():
    class Favours(torch.nn.Module):
        """Token (last + 1) modulo 7 has the largest logit, the one after it the second largest."""

        class config:
            max_seq_len = 4

        def forward(self, tokens):
            assert tokens.shape[1] <= 4
            logits = torch.zeros(1, tokens.shape[1], 7)
            logits[0, -1, (tokens[0, -1] + 1) % 7] = 5.0
            logits[0, -1, (tokens[0, -1] + 2) % 7] = 4.0
            return logits

    assert list(sample(Favours(), [5], 6, temperature=0, top_k=7, seed=0)) == [6, 0, 1, 2, 3, 4]
    assert list(sample(Favours(), [5], 6, temperature=1.0, top_k=1, seed=0)) == [6, 0, 1, 2, 3, 4]
    drawn = list(sample(Favours(), [0], 400, temperature=1.0, top_k=2, seed=0))
    steps = [(b - a) % 7 for a, b in zip([0, *drawn], drawn, strict=False)]
    # e^5 against e^4: the first is drawn with 0.731; 400 draws have a standard deviation of 0.022
    assert set(steps) == {1, 2} and steps.count(1) / 400 == pytest.approx(0.731, abs=0.09)
    assert list(sample(Favours(), [5], 6, temperature=1e-45, top_k=7, seed=0)) == [6, 0, 1, 2, 3, 4]
    assert list(sample(Favours(), [5], 6, temperature=0, top_k=7, seed=0, stop=1)) == [6, 0, 1]
    with pytest.raises(ValueError, match="at least one token"):
        next(sample(Favours(), [], 1, 0, 1, 0))


def test_an_export_is_whole_or_not_there(trained, tmp_path):
    info = trained / "run.json"
    run = json.loads(info.read_text())
    copied = shutil.copytree(run["data_path"], tmp_path / "data")
    info.write_text(json.dumps(run | {"data_path": str(copied)}))
    (copied / "tokenizer.json").write_text("{")
    done = script("export_hf.py", trained, tmp_path / "out")
    assert (
        done.returncode == 1 and "can't be read as a tokenizer.json" in done.stderr and "Traceback" not in done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    shutil.rmtree(copied)
    done = script("export_hf.py", trained, tmp_path / "out")
    assert done.returncode == 0 and "without a tokenizer" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    done = script("generate.py", trained, "kana")
    assert done.returncode == 1 and "the data of test is gone" in done.stderr


def test_damaged_or_absent_checkpoints_are_one_line(trained, tmp_path):
    missing = script("export_hf.py", tmp_path, tmp_path / "out")
    assert missing.returncode == 1 and "has no checkpoint" in missing.stderr and "Traceback" not in missing.stderr
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has: 5, 10"):
        load_trained(trained, 7)
    shard = trained / "checkpoints" / "step_00000010" / "shard_00000_00.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = script("generate.py", trained, "kana", "--step", 10)
    assert done.returncode == 1 and "manifest says" in done.stderr and "Traceback" not in done.stderr
