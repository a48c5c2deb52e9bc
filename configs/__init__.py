"""Hydra configuration tree and its typed schema."""
