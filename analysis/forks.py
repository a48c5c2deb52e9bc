"""Which runs grew out of which: the tree of forks, as text and as a figure. n is the number of trunks.

A node is a way: the recipes from the trunk on, and the steps at which they changed. Its runs are those of all trunks.
"""

from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from analysis import tables
from analysis.compare import Group, losses_at, mean_over_seeds
from analysis.runs import Run

COLOUR, SOFT = "#0072b2", "#555555"
SHOWN = 80  # characters of a line beside the figure


@dataclass
class Node:
    """`begins`: the step at which it left its parent; a trunk's is 0. `group` is None where the parent is not among the
    runs. `loss`: final, mean over trunks."""

    label: str
    begins: int
    group: Group | None = None
    children: list["Node"] = field(default_factory=list)

    @property
    def ends(self) -> int:
        return max((run.last_step for run in self.group.runs), default=self.begins) if self.group else self.begins

    @property
    def loss(self) -> float:
        return mean_over_seeds(self.group, last_loss) if self.group else float("nan")


def last_loss(run: Run) -> float:
    return float(run.evals["loss"][-1]) if len(run.evals["step"]) else float("nan")


def trees(groups: list[Group]) -> list[Node]:
    """One a trunk's recipe that has forks among `groups`, children in order of their first step."""
    hashes = {run.info["hash"]: group.label for group in groups for run in group.members}
    nodes = {group.label: Node(group.label, begins(group), group) for group in groups}
    roots: list[Node] = []
    for group in groups:
        parent = group.runs[0].info.get("parent")
        if parent is None:
            continue
        above = nodes.get(hashes.get(parent["hash"], ""))
        if above is None:
            name = " > ".join(parent["way"])
            above = nodes.setdefault(name, Node(f"{name} (not here)", 0))
            above not in roots and roots.append(above)
        above.children.append(nodes[group.label])
    roots += [node for node in nodes.values() if node.group and node.children and not is_fork(node.group)]
    for node in nodes.values():
        node.children.sort(key=lambda child: child.begins)
    return roots


def is_fork(group: Group) -> bool:
    return "parent" in group.runs[0].info


def begins(group: Group) -> int:
    return int(group.runs[0].info.get("parent", {}).get("step", 0))


def text(roots: list[Node]) -> str:
    """Lines with branches; the loss, in 1e-3 nats over the parent's, and the number of trunks."""
    lines: list[str] = []

    def add(node: Node, parent: Node | None, stem: str, branch: str) -> None:
        lines.append(f"{stem}{branch}{line_of(node, parent)}")
        below = stem + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for child in node.children:
            add(child, node, below, "└─ " if child is node.children[-1] else "├─ ")

    for root in roots:
        add(root, None, "", "")
    return "\n".join(lines)


def line_of(node: Node, parent: Node | None) -> str:
    return f"{name_of(node, parent)}: {figures_of(node, parent)}" if node.group else node.label


def name_of(node: Node, parent: Node | None) -> str:
    return f"@{node.begins} {node.label.rpartition(' > ')[2]}" if parent else node.label


def figures_of(node: Node, parent: Node | None) -> str:
    if node.group is None:
        return ""
    over = over_parent(node, parent)
    gap = "" if over is None else f", {tables.signed(1e3 * over, 1)}e-3"
    n = len(node.group.by_seed())
    return f"{node.loss:.4f}{gap} ({n} trunk{'s' * (n > 1)}{runs_of(node.group, n)})"


def runs_of(group: Group, trunks: int) -> str:
    return "" if len(group.runs) == trunks else f", {len(group.runs)} tails"


def over_parent(node: Node, parent: Node | None) -> float | None:
    """Final loss minus the parent's over the trunks that both have; None where they ended elsewhere or share none."""
    if parent is None or parent.group is None or node.group is None or node.ends != parent.ends:
        return None
    sides = [losses_at(side, node.ends) for side in (node.group, parent.group) if side.has(node.ends)]
    if len(sides) < 2 or not (shared := sides[0].keys() & sides[1].keys()):
        return None
    return float(np.mean([sides[0][seed] - sides[1][seed] for seed in shared]))


def figure(roots: list[Node]) -> Figure:
    """Steps to the right, a line a node, joined to its parent where it left it; its loss at its end."""
    rows = [row for root in roots for row in walk(root, None)]
    drawn, ax = plt.subplots(figsize=(12, 0.9 + 0.32 * len(rows)))
    place = {id(node): -number for number, (node, _) in enumerate(rows)}
    last = max(max(node.ends, *(child.begins for child in node.children), 1) for node, _ in rows)
    for node, parent in rows:
        y, end = place[id(node)], node.ends if node.group else last
        style = {"color": COLOUR if parent else "black", "lw": 2, "solid_capstyle": "butt"}
        ax.plot([node.begins, end], [y, y], ls="-" if node.group else ":", **style)
        if parent:
            ax.plot([node.begins] * 2, [place[id(parent)], y], color=SOFT, lw=0.8)
        said = f"{figures_of(node, parent)}  {name_of(node, parent)}".strip()
        shown = said if len(said) <= SHOWN else f"{said[: SHOWN - 3]}..."
        ax.annotate(shown, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    drawn.subplots_adjust(left=0.01, right=0.5, top=0.98, bottom=0.6 / (0.9 + 0.32 * len(rows)))
    ax.set_xlim(0, last)
    ax.set_ylim(-len(rows) + 0.4, 0.6)
    ax.set_xlabel("step")
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)
    return drawn


def walk(node: Node, parent: Node | None) -> list[tuple[Node, Node | None]]:
    return [(node, parent), *(row for child in node.children for row in walk(child, node))]
