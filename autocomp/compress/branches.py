"""Residual branches that can be removed whole."""

from collections.abc import Mapping, Sequence

from autocomp.graph import Branch, Layer, Node

__all__ = ["find_branches"]


def find_branches(nodes: Sequence[Node], layers: Sequence[Layer]) -> tuple[Branch, ...]:
    """Branches next to additions of two equal shapes, innermost and outermost alike, in topological order.

    A branch is what only its addition needs, apart from the stream and what lies before it; it holds at least one
    layer. The stream's own side, up to where the two part, holds none (identity, or a parameter-free shortcut).
    """
    by_name = {node.name: node for node in nodes}
    layer_at = {layer.node: layer.name for layer in layers}
    readers: dict[str, set[str]] = {node.name: set() for node in nodes}
    ancestors: dict[str, frozenset[str]] = {}
    for node in nodes:
        for value in node.inputs:
            readers[value].add(node.name)
        ancestors[node.name] = frozenset(node.inputs).union(*(ancestors[value] for value in node.inputs))
    order = {node.name: index for index, node in enumerate(nodes)}
    found: list[Branch] = []
    for node in nodes:
        if node.op != "add" or len(set(node.inputs)) != 2:
            continue
        first, second = node.inputs
        if by_name[first].shape != by_name[second].shape:
            continue
        for stream, branch in ((first, second), (second, first)):
            side = _only_for(branch, node.name, ancestors[stream] | {stream}, by_name, readers)
            other = _only_for(stream, node.name, ancestors[branch] | {branch}, by_name, readers)
            inside = [layer_at[name] for name in sorted(side, key=order.__getitem__) if name in layer_at]
            entering = {value for name in side for value in by_name[name].inputs} - side
            parted = entering <= ancestors[stream] | {stream}
            if inside and parted and not any(name in layer_at for name in other):
                found.append(Branch(_path(inside) or node.name, node.name, stream, branch, tuple(inside)))
                break
    return _named_apart(found)


def _only_for(
    value: str, add: str, outside: frozenset[str], nodes: Mapping[str, Node], readers: Mapping[str, set[str]]
) -> set[str]:
    """Nodes that lead to ``add`` through ``value`` and nowhere else."""
    cone: set[str] = set()
    pending = [value]
    while pending:
        name = pending.pop()
        if name in cone or name in outside or nodes[name].op == "input" or not readers[name] <= cone | {add}:
            continue  # a node with readers still missing comes up again behind the last of them
        cone.add(name)
        pending.extend(nodes[name].inputs)
    return cone


def _path(layers: Sequence[str]) -> str:
    """Common module path of layer names."""
    common = []
    for parts in zip(*(name.split(".") for name in layers), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _named_apart(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    names = [branch.name for branch in branches]
    return tuple(
        Branch(f"{branch.name}:{branch.add}", branch.add, branch.stream, branch.branch, branch.layers)
        if names.count(branch.name) > 1
        else branch
        for branch in branches
    )
