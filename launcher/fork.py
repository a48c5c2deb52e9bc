"""The configuration of a fork: its parent's, but for the groups and values that the command line gives."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from base.fork import ForkError, Parent
from training.config import TrainConfig

# Groups that write into many sections: what of them a fork should take isn't known.
WHOLE = ("experiment", "debug")
# Groups whose files may write into the recipe.
OF_RECIPE = ("quant", "phases", *WHOLE)
# Two ways to write one number: the one that is typed replaces the parent's.
EITHER = {"steps": "tokens", "tokens": "steps"}


def inherited(parent: Parent) -> tuple[DictConfig, dict[str, Any]]:
    """(the parent's configuration under the schema, its recipe). Its name isn't inherited."""
    tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(parent.config))
    OmegaConf.set_struct(tree, False)
    recipe = OmegaConf.to_container(tree.quant)
    tree.quant, tree.run.name, tree.dry_run = {}, None, False
    tree.paths.runs = str(parent.folder.parent)
    return tree, recipe


def take_groups(
    groups: list[str], tree: DictConfig, recipe: dict[str, Any], fresh: DictConfig, fresh_recipe: dict[str, Any]
) -> dict[str, Any]:
    """Put the groups that were chosen from `fresh`, a configuration without a parent, into the fork's `tree`; returns
    its recipe. ForkError for a group that is no section."""
    for group in groups:
        if group in WHOLE:
            raise ForkError(f"{group}=: a fork has everything else from its parent; leave it out")
        if group == "quant":
            recipe = fresh_recipe
        elif group == "phases":
            recipe = recipe | {"phases": fresh_recipe["phases"]}
        else:
            tree[group] = fresh[group]
    return recipe


def make_room(keys: list[str], tree: DictConfig) -> None:
    """Unset what a typed key is another way to write of."""
    for key in keys:
        if key in EITHER:
            tree[EITHER[key]] = None
