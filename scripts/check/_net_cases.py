"""Fingerprints of what a tree of this project computes: the half of scripts/check/net.py that runs inside the tree.

    cd TREE && python .../_net_cases.py SECTION OUT.json      {name of a result: SHA-256 of its bits, or a plain value}

One copy of this file runs in two trees that may differ by months, so it touches only what users touch and what is kept
for them: recipe mappings, the layer, the operands that reach `kernels.gemm.gemm`, back ends by their preset, train.py.
Whatever else a tree calls by another name belongs nowhere in here.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the tree, before the folder of this file

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import kernels.gemm
from kernels import backend, cross_entropy, pointwise
from quant import library
from quant.linear import QuantLinear
from quant.recipe import Recipe

Results = dict[str, object]
SEED, STEP, MICRO, LAYER = 2**40 + 12345, 678, 9, 7
OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
PRESETS = ("reference", "packed")  # the GEMM back ends of a CPU
NVFP4, SQUARE = ["tensor fp32", "1x16 e4m3"], ["tensor fp32", "16x16 e4m3"]
FOUR_SR = {"select": "four_over_six", "rounding": "sr", "target_max": 6 * 16 / 17, "scale_cap": 256.0}
QUANTIZERS = {
    "rtn": {"scales": NVFP4},
    "rtn_46": {"scales": NVFP4, "select": "four_over_six"},
    "rtn_pow2": {"scales": NVFP4, "tensor_scale": "pow2"},
    "rtn_fixed_amax": {"scales": NVFP4, "amax": 3.0},
    "sr": {"scales": NVFP4, "rounding": "sr"},
    "sr_46": {"scales": NVFP4, **FOUR_SR},
    "ms_eden": {"scales": NVFP4, "rounding": "ms_eden"},
    "ms_eden_rotation": {"scales": NVFP4, "rounding": "ms_eden", "eden_block": "rotation"},
    "ms_eden_scaled": {"scales": NVFP4, "rounding": "ms_eden", "eden_block": "rotation", "eden_space": "scaled"},
    "square": {"scales": SQUARE},
    "square_46": {"scales": SQUARE, "select": "four_over_six"},
    "square_sr": {"scales": SQUARE, "rounding": "sr"},
    "e4m3": {"grid": "e4m3", "scales": ["tensor fp32"]},
    "e4m3_rows": {"grid": "e4m3", "scales": ["row fp32"]},
    "e5m2": {"grid": "e5m2", "scales": ["tensor fp32"], "tensor_scale": "pow2"},
}
POINTWISE = ("swiglu", "rope", "add_norm")
PACKED_FAMILIES = ("normal", "dead_blocks", "huge", "inf")
ROTATIONS = (None, 16, 128)
RANDOM_RECIPES = 1500  # mappings drawn; about one in ten is legal


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bits; one NaN is as good as another."""
    tensor = tensor.detach().contiguous()
    if tensor.is_floating_point():
        wide = tensor.float()
        tensor = torch.where(wide.isnan(), torch.full_like(wide, float("nan")), wide).to(tensor.dtype)
    bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + bits).hexdigest()[:16]


def tensors_of(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dataclasses of dataclasses, by their fields' names."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(f"{name}.{field.name}", getattr(value, field.name))


def families(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """BF16 [rows, columns] of every kind that a quantizer meets."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    gaussian, blocks = normal(), torch.ones(rows, columns // 16).repeat_interleave(16, 1)
    exponents = torch.randint(-24, 3, (rows, columns // 16), generator=generator).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(rows, columns // 8)
    dead = blocks * (torch.rand(rows, columns // 16, generator=generator) < 0.7).repeat_interleave(16, 1)
    made = {
        "normal": gaussian,
        "student_t": normal() / torch.stack([normal().square() for _ in range(3)]).mean(0).sqrt(),
        "log_normal": normal().exp() * gaussian.sign(),
        "swiglu": nn.functional.silu(normal()) * normal(),
        "zeros": torch.zeros(rows, columns),
        "dead_blocks": gaussian * torch.where(dead > 0, 1.0, 2.0**-40),
        "zero_blocks": gaussian * dead,
        "small_scales": gaussian * torch.exp2(exponents).repeat_interleave(16, 1),
        "ties": ties * torch.where(gaussian < 0, -1.0, 1.0),
        "tiny": gaussian * 2.0**-118,
        "huge": gaussian.sign() * torch.finfo(torch.bfloat16).max,
        "nan": gaussian.clone(),
        "inf": gaussian.clone(),
    }
    made["nan"][rows // 3, columns // 3] = float("nan")
    made["inf"][rows // 3, columns // 3] = float("-inf")
    return {name: x.to(torch.bfloat16) for name, x in made.items()}


def layer_results(recipe: object, x: Tensor, w: Tensor, dy: Tensor, needs: tuple = (True, True)) -> Results:
    """Digests of y, dX, dW, of every operand that a GEMM gets, and the bytes kept for the backward."""
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w.clone(), requires_grad=needs[1])
    leaf, out, kept = x.clone().requires_grad_(needs[0]), {}, []
    gemm = kernels.gemm.gemm

    def recording(a, b, kind, *rest):
        for side, operand in (("a", a), ("b", b)):
            found = dict(tensors_of(f"{kind}.{side}", operand))
            scale = found.get(f"{kind}.{side}.scale")
            if scale is not None and scale.isnan().all():
                found = {f"{kind}.{side}.scale": scale}  # codes are unspecified then
            out.update((name, digest(tensor)) for name, tensor in found.items())
        return gemm(a, b, kind, *rest)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    kernels.gemm.gemm = recording
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer = QuantLinear(linear, recipe, LAYER, torch.tensor([SEED, STEP, MICRO]))
            y = layer(leaf)
        if any(needs):
            y.backward(dy)
    except ValueError as error:
        return {"refused": str(error)[:40]}
    finally:
        kernels.gemm.gemm = gemm
    grads = {"dx": leaf.grad, "dw": linear.weight.grad}
    out |= {name: digest(grad) for name, grad in grads.items() if grad is not None}
    return out | {"y": digest(y), "kept_bytes": sum(kept)}


def named(prefix: str, results: Results) -> Results:
    return {f"{prefix}/{name}": value for name, value in results.items()}


def one_quantizer(name: str, rotation: int | None) -> Recipe | None:
    """A recipe with this quantizer in every slot that may have it, or None where it can't stand behind the rotation."""
    operand = {"grid": "e2m1", **QUANTIZERS[name]}
    mapping = {"name": name}
    for gemm, names in OPERANDS.items():
        turned = {"dim": rotation, "signs": "random"}
        mapping[gemm] = {"rotation": turned} | {slot: dict(operand) for slot in names}
    try:
        return Recipe.from_dict(mapping)
    except ValueError:
        return None


def problem(family: str, m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """X [M,K], W [N,K] and dY [M,N] of a family: dY small, W an FP32 master that BF16 rounds; huge as it is."""
    x, w, dy = families(m, k, 1)[family], families(n, k, 3)[family].float(), families(m, n, 2)[family]
    return (x, w, dy) if family == "huge" else (x, w * (1 + 2.0**-11), dy * 2.0**-10)


def quantizers() -> Results:
    """Every quantizer in all slots over all families, rotated and not, as values; over some of them as packed codes."""
    out: Results = {}
    problems = {family: problem(family, 128, 128, 256) for family in families(16, 16, 0)}
    for preset in PRESETS:
        backend.use(preset)
        for name in QUANTIZERS:
            for rotation in ROTATIONS:
                recipe = one_quantizer(name, rotation)
                for family, tensors in problems.items() if recipe else ():
                    if preset == "reference" or family in PACKED_FAMILIES:
                        out |= named(f"{name}/{rotation}/{family}/{preset}", layer_results(recipe, *tensors))
    return out


def random_mapping(draw: random.Random) -> dict:
    """A recipe that nobody published, legal or not. The same draws in every tree."""
    mapping: dict = {"name": "random"}
    for gemm, names in OPERANDS.items():
        dim = draw.choice([None, None, 16, 32, 128] if gemm != "fprop" else [None, None, None, 16])
        mapping[gemm] = {"rotation": {"dim": dim, "signs": draw.choice(["random", "fixed", "none"])}}
        for slot in names:
            quantizer = draw.choice([*QUANTIZERS, "none"])
            operand = {"grid": "e2m1", **QUANTIZERS[quantizer]} if quantizer != "none" else {"grid": "none"}
            source = draw.choice(["input", "fprop", "fprop_transposed"])
            if f"{gemm}.{slot}" in ("dgrad.w", "wgrad.x"):
                operand["source"] = source
            mapping[gemm][slot] = operand
    return mapping


def runnable() -> dict[str, object]:
    """The recipes that both trees have and this machine can run."""
    loaded = {name: library.load(name) for name in os.environ["NET_RECIPES"].split() if name in library.names()}
    return {name: recipe for name, recipe in loaded.items() if hasattr(recipe, "operand")}


def layers() -> Results:
    """Every recipe, as it is and without one of its GEMMs, and recipes drawn at random."""
    out: Results = {}
    x, w, dy = problem("normal", 128, 128, 256)
    for preset in PRESETS:
        backend.use(preset)
        for name, recipe in runnable().items():
            for family in ("normal", "log_normal", "nan"):
                out |= named(f"{name}/{family}/{preset}", layer_results(recipe, *problem(family, 256, 256, 128)))
            for needs in ((True, False), (False, True), (False, False)):
                out |= named(f"{name}/needs{needs}/{preset}", layer_results(recipe, x, w, dy, needs))
            for gemm in OPERANDS:
                try:
                    changed = library.build(library.mapping(name) | {gemm: "none"})
                except ValueError:  # what reuses the codes of this GEMM
                    continue
                out |= named(f"{name}/{gemm}=none/{preset}", layer_results(changed, x, w, dy))
        draw = random.Random(0)
        for i in range(RANDOM_RECIPES):
            mapping = random_mapping(draw)
            try:
                recipe = Recipe.from_dict(mapping)
            except ValueError:
                continue
            out |= named(f"random {i}/{preset}", layer_results(recipe, x, w, dy))
    return out | others(("cross_entropy", "capped", *POINTWISE), "reference")


def others(names: tuple[str, ...], preset: str) -> Results:
    """Loss and pointwise operators, forward and backward."""
    generator = torch.Generator().manual_seed(4)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    h, w = leaf(48, 32), leaf(80, 32, dtype=torch.float32)
    targets = torch.randint(0, 80, (48,), generator=generator)
    table = torch.randn(2, 8, 16, generator=generator)
    calls: dict[str, tuple[Callable, tuple]] = {
        "cross_entropy": (lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets), (h, w)),
        "capped": (lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets, softcap=5.0), (h, w)),
        "swiglu": (pointwise.swiglu, (leaf(6, 64),)),
        "rope": (lambda qkv: torch.cat(pointwise.rope_heads(qkv, table, 2), -1), (leaf(2, 8, 96),)),
        "add_norm": (
            lambda r, b, w: torch.cat(pointwise.add_norm(r, b, w, 1e-5, torch.bfloat16), -1),
            (leaf(6, 64, dtype=torch.float32), leaf(6, 64), leaf(64, dtype=torch.float32)),
        ),
    }
    out: Results = {}
    for name in names:
        call, leaves = calls[name]
        y = call(*leaves)
        grads = torch.autograd.grad(y.sum() if y.ndim else y, leaves)
        out |= {f"{name}/{preset}/y": digest(y)} | {f"{name}/{preset}/d{i}": digest(g) for i, g in enumerate(grads)}
    return out


def triton() -> Results:
    """Triton's kernels in its interpreter (TRITON_INTERPRET=1): every recipe once, some quantizers, the others."""
    out: Results = {}
    backend_of = {"quantize": "triton", "gemm": "reference"}
    for preset, gemm in (("reference", "reference"), ("emulated", backend.PRESETS["packed"]["gemm"])):
        backend.use({**backend_of, "gemm": gemm})
        for name, recipe in runnable().items():
            out |= named(f"{name}/{preset}", layer_results(recipe, *problem("normal", 128, 32, 128)))
    backend.use(backend_of)
    for name in QUANTIZERS:
        recipe = one_quantizer(name, None) or one_quantizer(name, 32)
        for family in ("log_normal", "dead_blocks", "inf"):
            out |= named(f"{name}/{family}", layer_results(recipe, *problem(family, 32, 32, 64)))
    # Its own rule is that it needs a GPU; its kernels can be interpreted.
    backend.IMPL["pointwise"] = import_module("kernels.pointwise.triton_impl")
    return out | others(POINTWISE, "triton")


SMALL = [
    "model=llama_tiny", "model.layers=2", "model.width=128", "model.heads=2", "model.hidden=128", "data=text",
    "data.vocab_size=300", "data.val_fraction=0.2", "data.workers=1", "batch.seq_len=64", "batch.sequences=4",
    "batch.micro=2", "steps=10", "optim.lr=1e-2", "log.every=1", "evaluate.every=5", "evaluate.tokens=512",
    "evaluate.final_tokens=512", "evaluate.bf16=true", "checkpoint.every=null",
]  # fmt: skip
MUON = ["model.family=nanochat", "optim=muon", "optim.lr=0.02", "optim.scalar_lr=0.05", "model.heads=1"]
# What a row of metrics.jsonl says of the numbers; the rest are times and places.
NUMBERS = ("loss", "grad_norm", "lr", "tokens", "samples", "bpb", "se", "loss_bf16", "targets", "slots")


def write_text(path: Path) -> None:
    """60 documents over a small vocabulary."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "su") for b in ("na", "re", "ti", "vo")]
    texts = [" ".join(draw.choice(words) for _ in range(200)) for _ in range(60)]
    lines = [json.dumps({"id": str(i), "source": "made up", "text": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")


def train_results(folder: Path, name: str, overrides: list[str]) -> Results:
    """A run of train.py: its numbers by step, the weights after each step, its hash."""
    import train

    weights: dict[int, Tensor] = {}

    def seen(optimizer: torch.optim.Optimizer, *_) -> None:
        weights.update((id(p), p) for group in optimizer.param_groups for p in group["params"])

    handle = register_optimizer_step_post_hook(seen)
    places = [f"data.files={folder / 'text.jsonl'}", f"paths.data={folder / 'tokens'}", f"paths.runs={folder / 'runs'}"]
    try:
        words = [*SMALL, *places, f"run.name={name}", *overrides]
        code = train.main(list({word.partition("=")[0]: word for word in words}.values()))  # the later one counts
    finally:
        handle.remove()
    out: Results = {f"{name}/exit": code}
    run = folder / "runs" / name
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if row["kind"] in ("train", "eval", "slots"):
            values = {key: row[key] for key in NUMBERS if key in row}
            out |= {f"{name}/{row['kind']}/{row['step']}/{key}": value for key, value in values.items()}
    digests = sorted(digest(weight) for weight in weights.values())  # in no order: groups may be made in another
    out[f"{name}/weights"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
    return out | {f"{name}/hash": json.loads((run / "run.json").read_text())["hash"]}


def training() -> Results:
    """Ten steps of every recipe, the diagnostics of evaluations included; one of Muon, one resumed by recomputation."""
    folder = Path(os.environ["NET_FOLDER"])
    write_text(folder / "text.jsonl")
    out: Results = {}
    for name in runnable():
        out |= train_results(folder, name, [f"quant={name}"])
    out |= train_results(folder, "muon", ["quant=quartet2", *MUON])
    return out | train_results(folder, "recompute", ["quant=nvidia", "recompute=true"])


SECTIONS = {"quantizers": quantizers, "layers": layers, "triton": triton, "training": training}

if __name__ == "__main__":
    torch.set_num_threads(1)
    results = SECTIONS[sys.argv[1]]()
    Path(sys.argv[2]).write_text(json.dumps(results))
