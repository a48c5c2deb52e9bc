"""The YAML files of Nibble: groups for Hydra, recipes and experiment grids. No code."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
