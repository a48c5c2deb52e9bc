"""Checkpoints: what is saved, how it is stored, written and found again."""
