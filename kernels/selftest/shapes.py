"""The matrix shapes that selftest runs: layers of the model presets, published benchmark layers, ragged ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layers:
    """The four linear layers of a Llama block: fused q,k,v and output, fused gate,up and down."""

    name: str
    width: int
    hidden: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out features, in features) of each."""
        return (
            (3 * self.width, self.width),
            (self.width, self.width),
            (2 * self.hidden, self.width),
            (self.width, self.hidden),
        )

    @property
    def parameters(self) -> int:
        """Weights of one block's linear layers."""
        return sum(n * k for n, k in self.linears)


# The model presets of configs/model (a test compares them).
PRESETS = (
    Layers("llama_tiny", 256, 640),
    Layers("llama_30m", 640, 1792),
    Layers("llama_50m", 768, 2048),
    Layers("llama_100m", 1024, 2816),
    Layers("llama_200m", 1280, 3584),
    Layers("llama_430m", 1664, 4608),
    Layers("llama_800m", 2048, 5632),
    Layers("llama_1b9", 2560, 6912),
)

# The layers that the published speed tables are about (docs/published.md#6-speed names the sizes only; the widths are
# Llama's).
PUBLISHED = (
    Layers("800M", 2048, 5632),
    Layers("3B", 3072, 8192),
    Layers("7B", 4096, 11008),
    Layers("22B", 6144, 16384),
)
# Size -> (forward, forward + backward) speed-up over BF16 of Quartet II on an RTX 5090, and its milliseconds.
PUBLISHED_5090 = {
    "800M": ((4.15, 3.12), (1.80, 7.71)),
    "3B": ((4.65, 3.64), (3.54, 14.01)),
    "7B": ((4.75, 3.89), (5.94, 22.66)),
    "22B": ((4.89, 4.19), (12.78, 46.22)),
}

# (M, N, K): every extent ragged against the tiles (128, 256), the 32 of the contraction, the 8 of the columns; tiny.
RAGGED = (
    (1, 1, 16),
    (7, 16, 32),
    (100, 96, 64),
    (129, 257, 80),
    (33, 300, 208),
    (384, 130, 1040),
    (255, 511, 4112),
    (1000, 72, 624),
)


def gemms(layers: Layers, tokens: int) -> list[tuple[str, int, int, int]]:
    """(kind, M, N, K) of the three GEMMs of each linear layer, as gemm_nvfp4 sees them (K is the contraction)."""
    out = []
    for n, k in layers.linears:
        out += [("fprop", tokens, n, k), ("dgrad", tokens, k, n), ("wgrad", n, k, tokens)]
    return out
