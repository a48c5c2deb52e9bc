"""Processes: distribution, parallelism, the watchdog, signals."""
