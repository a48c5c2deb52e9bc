"""From the model section of a configuration to the shape that a model class takes, and to the model."""

from dataclasses import fields

from torch import nn

from models import family, family_of
from models.shape import DecoderShape
from training.config import ModelSection, TrainConfig

# Fields of the model section that are no sizes.
NO_SIZES = {"name", "family", "lr", "batch_tokens", "micro_tokens"}


def shape_of(config: TrainConfig, vocab_size: int) -> DecoderShape:
    """The shape with its vocabulary; ValueError where widths and heads don't fit, or a size is set that this family
    doesn't have."""
    given, usual = config.model, ModelSection()
    shape = family(given.family).Shape
    known = {field.name for field in fields(shape)}
    names = [field.name for field in fields(given) if field.name not in NO_SIZES]
    for name in names:
        value = getattr(given, name)
        if name not in known and value != getattr(usual, name):
            raise ValueError(f"model.{name}={value}: model.family={given.family} has none; leave it out")
    sizes = {name: getattr(given, name) for name in names if name in known}
    return shape(**sizes, vocab_size=vocab_size, max_seq_len=config.batch.seq_len)


def model_of(shape: DecoderShape) -> nn.Module:
    """The uninitialized model of a shape, on the current default device."""
    return family_of(shape)(shape)
