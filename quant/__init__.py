"""Recipes: which quantizer each of the six operand slots of a linear layer uses."""
