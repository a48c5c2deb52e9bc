"""From a command line to runs: Hydra's composition, grids of cells, several runs, SLURM."""
