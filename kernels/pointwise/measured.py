"""A pass over compiled graphs: the maximum of what a backward kernel writes is measured while it is written.

A per-tensor quantizer of dY asks for max |dY| first (kernels.quantize.amax). Inductor fuses that into what it writes
itself; the output of an operator of ours it would read once more, 2 bytes an element. Same numbers: a maximum has no
order.
"""

from operator import getitem

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten, nibble = torch.ops.aten, torch.ops.nibble
RESHAPES = (aten.reshape.default, aten.view.default)


def measured() -> dict:
    """{operator: its measured form, index of the output that is measured; None: its only one}"""
    return {
        nibble.swiglu_backward.default: (nibble.swiglu_backward_measured.default, None),
        nibble.rope_backward.default: (nibble.rope_backward_measured.default, None),
        nibble.norm_backward.default: (nibble.norm_backward_measured.default, 1),
    }


class MeasuredMaxima(CustomGraphPass):
    """For torch._inductor.config.post_grad_custom_pre_pass."""

    def __call__(self, graph: Graph) -> None:
        found: dict[tuple[Node, Node], list[Node]] = {}
        for rows in graph.find_nodes(op="call_function", target=aten.amax.default):
            if made := _written_by_ours(rows):
                found.setdefault(made, []).append(rows)
        for (operator, output), readers in found.items():
            largest = _measure(graph, operator, output)
            for rows in readers:
                rows.replace_all_uses_with(largest)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _written_by_ours(rows: Node) -> tuple[Node, Node] | None:
    """(operator, its output) of which `rows`, an amax that only another amax reads, is the maximum of each row."""
    if not all(user.target is aten.amax.default and len(user.args) == 1 for user in rows.users):
        return None
    source = rows.args[0]
    if source.target is not aten.abs.default:
        return None
    source = source.args[0]
    while source.target in RESHAPES:
        source = source.args[0]
    operator = source.args[0] if source.target is getitem else source
    index = source.args[1] if source.target is getitem else None
    return (operator, source) if measured().get(operator.target, (None, -1))[1] == index else None


def _measure(graph: Graph, operator: Node, output: Node) -> Node:
    """The maxima of `output`, from the measured form of its operator, which takes its place."""
    with graph.inserting_before(operator):
        node = _call(graph, measured()[operator.target][0], *operator.args)
        largest = _call(graph, getitem, node, len(node.meta["val"]) - 1)
        if output is operator:
            operator.replace_all_uses_with(_call(graph, getitem, node, 0))
        else:
            operator.replace_all_uses_with(node)
    return largest


def _call(graph: Graph, target, *arguments) -> Node:
    node = graph.call_function(target, arguments)
    values = torch.fx.map_arg(arguments, lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values)
    return node
