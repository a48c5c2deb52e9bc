"""Optimizers, their parameter groups and their schedule."""
