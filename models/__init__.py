"""Plain PyTorch language models; they know nothing of quantization, ranks or configuration.

A new model is one file and one line of FAMILIES. The class says everything that the rest of the program asks:

    Shape          its DecoderShape (models/shape.py), which has what a step keeps in memory too
    optimizer      the optimizer that its presets' peak rates are made for: "adamw" or "muon"
    scalar_rates   under Muon: {parameter that is no matrix of a block, embedding or head: share of the scalars' rate}
    hooks          what happens around a training step because of the model: {name: options} (training/hooks)
    refuses        {"muon" or "export": why not with this family}; export needs no word where it is not built
    document_start None, or the token that begins a document, set where attention shall stay within one
    blockwise      False; set where masks shall be FlexAttention's (models/attention.py)
    head_weight    FP32 [V, D]: what the loss multiplies hidden states by
    stacked_rows   only where "muon" isn't refused and its rates are AdamW's: rows of fused weights' matrices
    decays(name)   whether weight decay applies to a parameter
"""

from importlib import import_module
from typing import Any

# By dotted name: a list of the families needs no torch.
FAMILIES = {"llama": "models.llama.Llama", "nanochat": "models.nanochat.Nanochat", "ngpt": "models.ngpt.Ngpt"}
FIRST = "llama"  # the one that identities of runs don't name


def family(name: str) -> Any:
    """The model class of a family."""
    module, _, attribute = FAMILIES[name].rpartition(".")
    return getattr(import_module(module), attribute)


def family_of(shape: Any) -> Any:
    """The model class that is built from this shape."""
    return next(found for found in map(family, FAMILIES) if found.Shape is type(shape))
