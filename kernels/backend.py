"""Which implementation of each operation runs: chosen once, before the model is built, and printed by the caller.

Each operation is a folder `kernels/<op>/` with `<name>_impl.py` files that hold the same functions and
`unavailable() -> str | None` (the reason, or None). IMPL is the one mutable global of the project: a filled dict
traces under torch.compile(fullgraph=True), choosing inside the call does not
(docs/numerics.md#7-what-is-equal-what-is-bounded).
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

OPS = ("quantize", "gemm", "cross_entropy", "pointwise")
# Back ends of each operation, the one that `auto` prefers first. `auto` on a CPU always takes the reference.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "quantize": ("triton", "reference"),
    "gemm": ("cutlass", "scaled_mm", "cublaslt", "reference"),
    "cross_entropy": ("triton", "reference"),
    "pointwise": ("triton", "reference"),
}
# What one word on the command line asks of every operation.
PRESETS: dict[str, dict[str, str]] = {
    "reference": dict.fromkeys(OPS, "reference"),
    "triton": {"quantize": "triton", "gemm": "cublaslt", "cross_entropy": "triton", "pointwise": "triton"},
    # 4-bit tensor cores (Blackwell); `packed` is their path with the product itself emulated, on any machine.
    "cutlass": {"gemm": "cutlass"},
    "scaled_mm": {"gemm": "scaled_mm"},
    "packed": {"gemm": "packed_emulated"},
}

IMPL: dict[str, ModuleType] = {}


def unavailable(op: str, name: str) -> str | None:
    """Why back end `name` of `op` can't run here, or None if it can."""
    module = f"kernels.{op}.{name}_impl"
    if find_spec(module) is None:
        return "not implemented"
    try:
        return import_module(module).unavailable()
    except ImportError as error:
        return f"import failed: {error}"


def use(backend: str | Mapping[str, str] = "auto", device: str = "cpu") -> dict[str, str]:
    """Fill IMPL and return {operation: back end} to print.

    backend: "auto", a preset ("reference", "triton"), or {operation: name}; operations left out are "auto".
    device: device type the tensors will live on ("cpu", "cuda"); decides what auto means.
    Raises ValueError for an unknown name and RuntimeError, with the reason, for an explicit request that can't be met.
    """
    if isinstance(backend, str):
        if backend != "auto" and backend not in PRESETS:
            raise ValueError(f"backend={backend!r} is unknown; use one of auto, {', '.join(PRESETS)}")
        backend = PRESETS.get(backend, {})
    if unknown := set(backend) - set(OPS):
        raise ValueError(f"no operation {sorted(unknown)}; operations are {', '.join(OPS)}")
    chosen = {op: _choose(op, backend.get(op, "auto"), device) for op in OPS}
    IMPL.update({op: import_module(f"kernels.{op}.{name}_impl") for op, name in chosen.items()})
    return chosen


def _choose(op: str, name: str, device: str) -> str:
    if name != "auto":
        if reason := unavailable(op, name):
            raise RuntimeError(f"{op}: back end {name!r} can't be used: {reason}")
        return name
    candidates = PREFERENCE[op] if device == "cuda" else ("reference",)
    return next(candidate for candidate in candidates if unavailable(op, candidate) is None)


def impl(op: str) -> ModuleType:
    """The chosen implementation of `op`. Raises RuntimeError before `use` was called."""
    if op not in IMPL:
        raise RuntimeError("no back end chosen yet: call kernels.backend.use('auto', device) before building the model")
    return IMPL[op]
