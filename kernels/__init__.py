"""Quantizers, Hadamard rotation, random bits and GEMMs: a reference definition and its fast back ends."""
