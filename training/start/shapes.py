"""From the model section of a configuration to the shape that a model class takes, and to the model."""

from models.llama import Llama, LlamaConfig
from models.nanochat import Nanochat, NanochatConfig
from models.shape import DecoderShape
from training.config import ModelSection, TrainConfig


def shape_of(config: TrainConfig, vocab_size: int) -> DecoderShape:
    """The shape with its vocabulary; ValueError where widths and heads don't fit."""
    m = config.model
    names = ("layers", "width", "heads", "hidden", "rope_theta", "residual_dtype")
    sizes = {name: getattr(m, name) for name in names}
    sizes |= {"vocab_size": vocab_size, "max_seq_len": config.batch.seq_len}
    if m.family == "nanochat":
        if m.norm_eps != ModelSection().norm_eps:
            raise ValueError(f"model.norm_eps={m.norm_eps:g}: nanochat's norms have their own; leave it out")
        return NanochatConfig(**sizes)
    return LlamaConfig(**sizes, norm_eps=m.norm_eps)


def model_of(shape: DecoderShape) -> Llama | Nanochat:
    """The uninitialized model of a shape, on the current default device."""
    return Nanochat(shape) if isinstance(shape, NanochatConfig) else Llama(shape)
