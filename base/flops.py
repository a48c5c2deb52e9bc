"""What a token costs in operations, and the peak that a run's rate is measured against."""

# Dense BF16 in FLOP/s by the exact name that the driver gives: half of what NVIDIA's data sheets of H100 and H200 state
# "with sparsity". Parts of one name in common differ by a quarter, and a MIG slice has a part's name and a share of it.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989e12,  # SXM
    "NVIDIA H200 NVL": 835.5e12,
}


def flops_per_token(parameters_non_embedding: int, vocab_size: int, layers: int, width: int, seq_len: int) -> int:
    """6 N + 12 L d s: N with lm_head, without the embedding; attention counted over all positions, causal or
    windowed as it may be. Source: PaLM's convention (arXiv 2204.02311, appendix B)."""
    counted = parameters_non_embedding + vocab_size * width
    return 6 * counted + 12 * layers * width * seq_len


def peak_of(name: str | None) -> float | None:
    """Dense BF16 FLOP/s of a device by the driver's name of it; None without one, and of a part that we don't know."""
    return PEAK_FLOPS.get(name)


def mfu_formula(peak: float) -> str:
    """What MFU means, at this peak."""
    return f"(6 N + 12 L d s) per token / {peak / 1e12:g} TFLOP/s; N with lm_head, without embedding"


def mfu_note(gpu: str | None) -> str:
    """For a person: the formula on this GPU (its name; None: a CPU), or why there is no MFU."""
    if gpu is None:
        return "none on a CPU"
    if peak := peak_of(gpu):
        return mfu_formula(peak)
    return f"none: {gpu} is {'a slice' if ' MIG ' in gpu else 'a part'} whose BF16 peak isn't known here"
