"""Proofs too long for the tests: resuming, ranks, bits against an earlier commit."""
