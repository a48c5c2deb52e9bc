"""`python -m kernels.selftest`: which kernels run on this machine, whether they are right, and how fast they are."""
