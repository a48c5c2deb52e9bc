"""The training engine: loop, optimizers, schedules, checkpoints, distribution, metrics."""
