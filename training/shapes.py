"""From the model section of a configuration to the shape that a model class takes."""

from models.llama import LlamaConfig
from training.config import TrainConfig


def shape_of(config: TrainConfig, vocab_size: int) -> LlamaConfig:
    """The shape with its vocabulary; ValueError where widths and heads don't fit."""
    m = config.model
    return LlamaConfig(
        m.layers,
        m.width,
        m.heads,
        m.hidden,
        vocab_size,
        config.batch.seq_len,
        m.norm_eps,
        m.rope_theta,
        m.residual_dtype,
    )
