"""batch.document_mask: what a token sees, by both ways of masking, in training, evaluation and a reopened run."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from launcher.compose import stored
from models.attention import BLOCK, attend, masks
from models.llama import Llama, LlamaConfig
from models.nanochat import Nanochat, NanochatConfig
from models.ngpt import Ngpt, NgptConfig
from training.ranks.distributed import setup
from training.reopen import reopen

BOS = 0
FIRST, SECOND, OTHER = ([BOS, *torch.randint(1, 50, (n,)).tolist()] for n in (9, 13, 9))
QUICK = ["steps=3", "evaluate.every=null", "checkpoint.every=null"]


SHAPE = {"layers": 2, "width": 64, "heads": 2, "hidden": 64, "vocab_size": 50}
MODELS = {
    "heads": lambda: Llama(LlamaConfig(**SHAPE), torch.float32),
    "grouped": lambda: Llama(LlamaConfig(**SHAPE, kv_heads=1), torch.float32),
    "windows": lambda: Nanochat(NanochatConfig(**SHAPE, max_seq_len=24), torch.float32),
    "unit vectors": lambda: Ngpt(NgptConfig(**SHAPE), torch.float32),
}


@pytest.fixture(params=MODELS)
def model(request):
    built = MODELS[request.param]()
    built.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.named_parameters():  # larger, and no zeros, so that attention counts
        if not name.endswith("qk_scale"):  # nGPT's, by which places count once its elements differ
            parameter.data.mul_(3.0).add_(torch.randn(parameter.shape, generator=generator) / 16)
    return built.eval()


@torch.no_grad()
def logits(model, *documents: list[int]) -> torch.Tensor:
    """[T, V] of one row."""
    return model(torch.tensor([[token for document in documents for token in document]]))[0]


def test_a_token_sees_its_own_document_alone(model):
    seen = logits(model, FIRST, SECOND)[-len(SECOND) :], logits(model, OTHER, SECOND)[-len(SECOND) :]
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    model.document_start = BOS
    alone = logits(model, SECOND)
    behind, other = (logits(model, first, SECOND)[-len(SECOND) :] for first in (FIRST, OTHER))
    assert torch.equal(behind, other)
    assert (behind - alone).abs().max() < 1e-4  # RoPE's angles are rounded at other positions
    assert torch.equal(logits(model, FIRST, SECOND)[: len(FIRST)], logits(model, FIRST, OTHER)[: len(FIRST)])
    cut = logits(model, FIRST[4:], SECOND)  # a row that begins within a document
    assert (cut[: len(FIRST) - 4] - logits(model, FIRST[4:])).abs().max() < 1e-4


def test_one_document_a_row_gives_what_no_mask_gives(model):
    plain = logits(model, SECOND)
    model.document_start = BOS
    assert (logits(model, SECOND) - plain).abs().max() < 1e-4


def test_training_and_evaluation_are_masked_and_a_reopened_run_is_again(run, rows):
    _, plain = run(*QUICK, name="plain")
    _, masked = run(*QUICK, "batch.document_mask=true", "recompute=true", name="masked")
    first, other = (rows(folder, "train")[0] for folder in (plain, masked))
    assert first["samples"] == other["samples"] and first["grad_norm"] != other["grad_norm"]
    described = json.loads((masked / "run.json").read_text())
    assert described["numerics"]["batch.document_mask"] is True
    assert "batch.document_mask" not in json.loads((plain / "run.json").read_text())["numerics"]
    for folder, is_masked in ((plain, False), (masked, True)):
        info = json.loads((folder / "run.json").read_text())
        bos = json.loads(Path(info["data_path"], "manifest.json").read_text())["tokenizer"]["bos_id"]
        model = reopen(stored(folder / "config.yaml"), info, 3, setup()).model
        assert model.document_start == (bos if is_masked else None)


@pytest.mark.parametrize(("window", "documents"), [(None, 40), (70, None), (70, 40), (300, 500)])
@pytest.mark.parametrize("length", [100, 384, 700])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_blocks_hold_what_the_dense_mask_does(window, documents, length):
    """Each block is none, some or whole, as the dense mask says; FlexAttention by them gives what attention under the
    dense mask gives (forward: it has no backward on a CPU), and so does the eager path."""
    generator = torch.Generator().manual_seed(length)
    starts = None if documents is None else torch.rand(2, length, generator=generator) < 1 / documents
    tokens = torch.zeros(2, length) if starts is None else torch.where(starts, BOS, 1)
    begin = None if starts is None else BOS
    mask, block_mask = (masks(tokens, begin, (window,), blockwise)[window] for blockwise in (False, True))
    if mask is None:
        assert block_mask is None
        return
    count = -(-length // BLOCK)
    padded = torch.zeros(2, count * BLOCK, count * BLOCK, dtype=torch.bool)
    padded[:, :length, :length] = mask.flatten(0, -3) if mask.ndim > 2 else mask
    share = padded.view(2, count, BLOCK, count, BLOCK).float().mean((2, 4))
    for kinds, expected in (("", (share > 0) & (share < 1)), ("full_", share == 1)):
        for name, listed in (("kv", expected), ("q", expected.mT)):
            counts = getattr(block_mask, f"{kinds}{name}_num_blocks").expand(2, 1, -1)[:, 0]
            columns = getattr(block_mask, f"{kinds}{name}_indices").expand(2, 1, -1, -1)[:, 0]
            found = torch.zeros_like(listed).scatter(2, columns.long(), torch.arange(count) < counts[..., None])
            assert torch.equal(found, listed), (kinds, name)
    q, k, v = torch.randn(3, 2, 2, length, 16, generator=generator)
    with torch.no_grad():
        expected = attend(q, k, v, mask)
        assert torch.equal(attend(q, k, v, block_mask), expected)
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_models_without_windows_keep_pytorchs_own_attention(deterministic):
    """Their bits are the published protocols'. One with windows takes a single kernel where bits must repeat."""
    was, tokens = torch.are_deterministic_algorithms_enabled(), torch.ones(1, 64, dtype=torch.int64)
    torch.use_deterministic_algorithms(deterministic)
    try:
        plain, windowed = (masks(tokens, None, windows, blockwise=True) for windows in ((None,), (None, 8)))
    finally:
        torch.use_deterministic_algorithms(was)
    assert plain == {None: None}
    assert isinstance(windowed[8], BlockMask) and isinstance(windowed[None], BlockMask) == deterministic


def test_the_start_screen_and_the_memory_estimate_name_the_mask(run, capsys):
    tiny = ["model.layers=2", "model.width=128", "model.heads=2", "model.hidden=128", "dry_run=true"]

    def screen(*words: str) -> str:
        run(*tiny, *words)
        return capsys.readouterr().out

    assert not {"attention", "masks"} & {*screen().replace(",", " ").split()}
    masked = screen("batch.document_mask=true", "batch.seq_len=2048", "batch.micro=8", "batch.sequences=8")
    assert "within documents, by a dense mask" in masked
    assert "masks 0.2" in masked  # 8 x 2048^2 pairs, 1 byte each and 2 in each of 2 blocks
    words = ["model=nanochat_560m", "optim=muon", "optim.lr=null", "model.layers=3", "batch.document_mask=true"]
    nanochat = screen(*words, "batch.micro=8")
    assert "within documents and windows of 32 positions in 2 of 3 layers" in nanochat


GPU = ["batch.document_mask=true", "batch.seq_len=256", "batch.micro=4", "evaluate.every=null", "optim=muon"]
GPU += ["model=nanochat_560m", "model.layers=4", "model.width=256", "model.heads=2", "model.hidden=256"]
LLAMA = ["model=llama_tiny", "model.layers=2", "model.heads=4", "model.kv_heads=2", "optim=adamw"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run by hand: pytest -m gpu")
@pytest.mark.parametrize("family", ["nanochat", "llama"])
def test_flex_attention_on_a_gpu_follows_the_dense_mask_and_repeats_its_bits(run, rows, family):
    """Captured or not, recomputed or not, one run or another."""
    found = {}
    ways = {
        "dense": ["compile=false"],
        "flex": ["compile=true", "cuda_graphs=false"],
        "graphs": ["compile=true", "cuda_graphs=true"],
        "recomputed": ["compile=true", "recompute=true"],
    }
    for name, words in ways.items():
        torch.compiler.reset()
        _, folder = run(*GPU, *(LLAMA if family == "llama" else []), *words, name=name)
        found[name] = [(row["loss"], row["grad_norm"]) for row in rows(folder, "train")]
    assert found["flex"] == found["graphs"] == found["recomputed"]
    assert found["flex"][0] == pytest.approx(found["dense"][0], rel=2e-3)
    losses = {name: [loss for loss, _ in steps] for name, steps in found.items()}
    assert losses["flex"] == pytest.approx(losses["dense"], rel=5e-2)  # as in test_gpu_loop.py, after ten steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run by hand: pytest -m gpu")
@pytest.mark.parametrize(("window", "documents", "length"), [(None, 60, 512), (200, None, 512), (200, 90, 700)])
def test_gradients_of_flex_attention_are_the_dense_masks(window, documents, length):
    """Against FP32 under the dense mask: errors of BF16's roundings, as scaled_dot_product_attention's own."""
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.rand(3, length, device="cuda", generator=generator) < 1 / (documents or length)
    tokens, begin = torch.where(starts, BOS, 1), None if documents is None else BOS
    q, k, v, dy = torch.randn(4, 3, 2, length, 64, device="cuda", generator=generator).bfloat16()

    def results(blockwise: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        mask = masks(tokens, begin, (window,), blockwise)[window]
        y = torch.compile(attend, dynamic=False, fullgraph=True)(*inputs, mask)
        y.backward(dy.to(dtype))
        return [y.detach().float(), *(t.grad.float() for t in inputs)]

    exact = results(False, torch.float32)
    for ours, sdpa, right in zip(results(True, torch.bfloat16), results(False, torch.bfloat16), exact, strict=True):
        assert (ours - right).norm() <= 1.5 * (sdpa - right).norm() and (sdpa - right).norm() < 0.01 * right.norm()
