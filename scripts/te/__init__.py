"""Transformer Engine on a machine that has no wheel of it."""
