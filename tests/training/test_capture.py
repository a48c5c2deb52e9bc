"""What linear layers multiply, kept at a run's end or from its checkpoint: that step's tensors, and no bit changed."""

import json
from pathlib import Path

import pytest
import torch

from kernels import backend
from launcher.compose import compose, stored
from quant.plan import convert, plan_of
from training import capture
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import load_model, read_all
from training.inference import find_checkpoint
from training.loss import LossModel
from training.ranks.distributed import Dist
from training.reopen import reopen
from training.start.build import model_of
from training.start.shapes import shape_of

ROOT = Path(__file__).parents[2]
WORDS = ["quant=quartet2", "evaluate.slots=true", "evaluate.every=null", "evaluate.final_tokens=512", "steps=2"]


@pytest.fixture
def script(main_of):
    return main_of("capture.py")


def untimed(rows: list[dict]) -> list[dict]:
    times = {"time", "ms_per_step", "tokens_per_second", "mfu", "stall_s", "write_s", "memory_gib"}
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def test_a_run_captures_its_end_and_is_the_same_run(run, rows, script, tmp_path):
    _, plain = run(*WORDS, name="plain")
    _, folder = run(*WORDS, "probes.capture={}", name="captured")
    for kind in ("train", "eval", "slots"):
        assert untimed(rows(plain, kind)) == untimed(rows(folder, kind)) != []
    one, other = (read_all(checkpoints(path / "checkpoints")[-1]) for path in (plain, folder))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    written = folder / "capture" / "2"
    index = json.loads((written / "index.json").read_text())
    info = json.loads((folder / "run.json").read_text())
    assert (index["hash"], index["step"], index["recipe_label"]) == (info["hash"], 2, "quartet2")
    assert set(index["layers"]) == {f"blocks.0.{kind}" for kind in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")}
    assert index["layers"]["blocks.0.mlp.down"]["kind"] == "mlp.down" and "lm_head" in index["linears"]
    check_gradients(folder, capture.opened(written))
    # From the checkpoint of the same step: the same tensors, bit for bit.
    code, printed, errors = script(f"{folder}@2", "--out", str(tmp_path / "again"))
    assert code == 0 and printed.strip() == str(tmp_path / "again"), errors
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path


def check_gradients(folder: Path, found: capture.Captured) -> None:
    """dY^T X of a layer left in BF16 is the gradient of its weight, since all tokens were kept."""
    config, info = stored(folder / "config.yaml"), json.loads((folder / "run.json").read_text())
    again = reopen(config, info, 2, Dist(0, 1, 0, torch.device("cpu")))
    load_model(find_checkpoint(folder, 2), again.model)
    LossModel(again.model)(capture.text_of(again.evalset, again.numbers.micro)).backward()
    assert found.index["tokens"]["kept"] == capture.TOKENS
    for name in found.index["layers"]:
        layer = again.model.get_submodule(name)
        w, x, dy = found.tensors(name)
        assert torch.equal(w, layer.weight.detach().bfloat16())
        got, exact = dy.double().t() @ x.double(), layer.weight.grad.double()
        assert (got * exact).sum() / got.norm() / exact.norm() == pytest.approx(1, abs=0.02), name  # less 4 bits' error
        assert got.norm() / exact.norm() == pytest.approx(1, abs=0.05), name


@pytest.mark.parametrize(
    ("model", "blocks", "tokens"),
    [("llama_30m", {0, 2, 5}, 512), ("llama_100m", {4}, 1152), ("llama_1b9", {12}, 512)],
)
def test_what_is_kept_by_the_size_of_the_model(model, blocks, tokens):
    """The figures of the rule, and that no more than 64 MiB in files of 16 is written where a block is no larger."""
    config = compose([f"model={model}", "quant=bf16", "data.path=x"], typed=False).config
    backend.use("reference")
    with torch.device("meta"):
        built = model_of(shape_of(config, 32000))
        convert(built, plan_of(built, config.quant), torch.zeros(3, dtype=torch.int64, device="meta"))
    chosen = capture.choose(built, capture.TOKENS)
    numbers = {int(name.split(".")[1]) for name in chosen.layers}
    assert numbers == blocks and chosen.tokens == tokens
    assert len(set(chosen.runs)) == len(chosen.runs) and max(chosen.runs) < capture.TOKENS // capture.RUN
    assert tokens != 512 or chosen.runs == (0, 9, 18, 27)  # of sequences of 4 runs: each at another place
    sizes = {}
    for name, layer in chosen.layers.items():
        shapes = (layer.weight.shape, (chosen.tokens, layer.in_features), (chosen.tokens, layer.out_features))
        for key, shape in zip(capture.keys_of(name), shapes, strict=True):
            sizes[key] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    files = capture.in_files(sizes)
    totals = [sum(sizes[key].nbytes for key in keys) for keys in files]
    assert [key for keys in files for key in keys] == list(sizes)
    if model != "llama_1b9":
        assert max(totals) < capture.FILE_BYTES and sum(totals) < capture.BYTES < 1.3 * sum(totals) + 2e7


def test_runs_of_tokens_lie_at_every_place_of_their_sequences():
    chosen = capture.Chosen({}, tuple(i * 8 + i % 8 for i in range(4)))
    x = torch.arange(4096.0).view(8, 512, 1).expand(-1, -1, 2)
    rows = chosen.rows(x)
    assert rows.shape == (512, 2) and rows.dtype == torch.bfloat16
    first = x.flatten(0, 1)[[0, 9 * 128, 18 * 128, 27 * 128]].bfloat16()
    assert torch.equal(rows[::128], first)


def test_what_is_wrong_is_one_line(run, script, tmp_path):
    with pytest.raises(ValueError, match=r"no index.json.*probes.capture={}.*scripts/capture.py"):
        capture.opened(tmp_path)
    _, folder = run("quant=bf16", "steps=2", "evaluate.every=null", "evaluate.final_tokens=512", "probes.capture={}")
    written = folder / "capture" / "2"
    found = capture.opened(written)
    with pytest.raises(capture.CaptureError, match=r"blocks.9.mlp.down wasn't captured; captured: blocks.0.attn.qkv"):
        found.tensors("blocks.9.mlp.down")
    path = written / found.index["layers"]["blocks.0.mlp.down"]["files"]["dy"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(capture.CaptureError, match=r"0.safetensors: lacks blocks.0.mlp.down.w .*capture the run again"):
        found.tensors("blocks.0.mlp.down")
    (written / "index.json").write_text("[]")
    with pytest.raises(capture.CaptureError, match=r"not the index of captured tensors"):
        capture.opened(written)
    code, _, errors = script(f"{folder}@7")
    assert code != 0 and "no checkpoint of step 7" in errors and errors.count("\n") == 1
