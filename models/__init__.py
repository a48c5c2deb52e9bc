"""Plain PyTorch language models; they know nothing of quantization, ranks or configuration."""
