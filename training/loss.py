"""The training loss: model and cross-entropy in one module, so that compile, DDP and FSDP see a single forward."""

from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy


class LossModel(nn.Module):
    """tokens int [B, T + 1] -> summed nats, FP32 [] (`per_token`: FP32 [B, T]).

    Sums, never means: the caller weights by the tokens of the whole batch, whatever the split into micro-batches. The
    logits never exist as a whole; the head's weight is read by the loss itself.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, per_token: bool = False) -> Tensor:
        hidden = self.model.hidden(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        nats = linear_cross_entropy(hidden, self.model.head_weight, targets, per_token, self.model.softcap)
        return nats.view(tokens.shape[0], -1) if per_token else nats
