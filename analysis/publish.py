"""A comparison as a run of Weights & Biases: its plot to look at, its files as an artifact."""

from pathlib import Path


def to_wandb(paths: list[Path], project: str, offline: bool, labels: list[str]) -> str:
    """Log the .png among `paths` as an image and all of them as an artifact `comparison`; returns its place.

    labels: of the recipes that are compared, as tags. RuntimeError, with what to type, where W&B can't be used.
    """
    try:
        import wandb
    except ImportError:
        raise RuntimeError("--wandb needs the wandb package: pip install -e '.[wandb]'") from None
    if not offline and not wandb.login(prompt=False):  # looks for a key only, asks nobody
        raise RuntimeError("no W&B key found: type `wandb login`, or add --wandb-offline")
    folder, mode = paths[0].parent, "offline" if offline else "online"
    with wandb.init(project=project, job_type="report", mode=mode, dir=str(folder), tags=labels) as run:
        artifact = wandb.Artifact("comparison", type="report")
        for path in paths:
            artifact.add_file(str(path))
        run.log({f"plot/{path.stem}": wandb.Image(str(path)) for path in paths if path.suffix == ".png"})
        run.log_artifact(artifact)
        return run.dir if offline else run.url
