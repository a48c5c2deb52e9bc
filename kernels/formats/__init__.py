"""Number formats and how packed tensors lie in memory."""
