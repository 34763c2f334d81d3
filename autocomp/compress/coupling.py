"""Which channels must be pruned together: torch-pruning's dependency graph, translated into plain data.

Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3 (the dependency graph and its groups).
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch_pruning
from torch import Tensor, nn

from autocomp.compress.naming import reason_of
from autocomp.graph import Group, Layer, Member

__all__ = ["Coupling", "admit", "couple"]

T = TypeVar("T")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Passed over by torch-pruning with indices that a graph keeps as constants.
_INDEXED = ("SPLIT", "UNBIND", "SLICE", "EXPAND")


@dataclass(frozen=True)
class Coupling:
    """Groups of coupled channels, and the layers whose channels cannot be pruned with the reason for each."""

    groups: tuple[Group, ...]
    left_whole: Mapping[str, str]


class _UnfitError(Exception):
    """A group that the plain form cannot hold; the message is the reason."""


def couple(
    model: nn.Module,
    example: Tensor,
    layers: Sequence[Layer],
    parameters: Mapping[str, tuple[int, ...]],
    shared: frozenset[str],
) -> Coupling:
    """Find the groups of channels that are written by the model's layers.

    Args:
        model: as the user gave it (batch norms not folded); copied, not changed.
        example: (n, ...).
        layers: of the traced graph, in topological order.
        parameters: name -> shape in the traced graph; members that were folded away are left out.
        shared: names of layers whose weight several operators read.

    Returns:
        candidates, in the order of their first writing layer. Whether they can really be pruned is for a trial.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    names = {module: name for name, module in model.named_modules()}
    by_name = {layer.name: layer for layer in layers}
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)
    except Exception as error:  # another library walks the user's code: anything can come out of it
        reason = f"torch-pruning cannot trace the model ({reason_of(error)})"
        return Coupling((), {layer.name: reason for layer in layers})
    groups: list[Group] = []
    whole: dict[str, str] = {}
    modules = dict(model.named_modules())
    visited: set[str] = set()
    for layer in layers:
        if layer.name in visited:
            continue
        module = modules.get(layer.name)
        if not isinstance(module, (*_CONVS, nn.Linear)) or module not in graph.module2node:
            whole[layer.name] = "torch-pruning does not see it"
            continue
        try:
            pruner = graph.get_pruner_of_module(module)
            channels = list(range(pruner.get_out_channels(module)))
            entries = list(graph.get_pruning_group(module, pruner.prune_out_channels, channels))
            visited.update(names[entry.dep.target.module] for entry in entries if _writes(graph, entry, names))
            groups.append(_group(layer.name, _items(graph, entries, names), by_name, parameters, shared))
        except _UnfitError as reason:
            whole[layer.name] = str(reason)
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            whole[layer.name] = f"torch-pruning cannot follow its channels ({reason_of(error)})"
    return Coupling(*_disjoint(groups, whole))


@dataclass(frozen=True)
class _Item:
    """One module of a group: which indices of its input or output belong to which channel of the group."""

    name: str
    module: nn.Module
    writes: bool
    channels: tuple[int, ...]
    indices: tuple[int, ...]


def _writes(graph: Any, entry: Any, names: Mapping[nn.Module, str]) -> bool:
    return entry.dep.target.module in names and bool(graph.is_out_channel_pruning_fn(entry.dep.handler))


def _items(graph: Any, entries: Sequence[Any], names: Mapping[nn.Module, str]) -> list[_Item]:
    """The modules with parameters among the entries of one of torch-pruning's groups."""
    found = []
    for item in entries:
        target = item.dep.target
        if target.type.name in _INDEXED:
            raise _UnfitError("its channels are split or picked by fixed indices")
        if isinstance(target.module, nn.Parameter):
            raise _UnfitError(f"its channels meet the free parameter {target.name}")
        if target.module not in names:
            continue  # torch-pruning's stand-in for an operator without parameters
        if item.root_idxs is None or any(root is None for root in item.root_idxs):
            raise _UnfitError(f"torch-pruning cannot follow its channels into {names[target.module]}")
        indices = tuple(int(index) for index in item.idxs)
        found.append(
            _Item(names[target.module], target.module, _writes(graph, item, names), tuple(item.root_idxs), indices)
        )
    return found


def _group(
    name: str,
    items: Sequence[_Item],
    layers: Mapping[str, Layer],
    parameters: Mapping[str, tuple[int, ...]],
    shared: frozenset[str],
) -> Group:
    channels = parameters[f"{name}.weight"][0]
    members: dict[tuple[str, int], Member] = {}
    for item in items:
        for parameter, axis in _axes(item, layers, shared):
            if parameter not in parameters:
                continue  # folded into its layer
            positions: list[list[int]] = [[] for _ in range(channels)]
            for channel, index in zip(item.channels, item.indices, strict=True):
                positions[channel].append(index)
            flat = [index for entry in positions for index in entry]
            size = parameters[parameter][axis]
            even = len({len(entry) for entry in positions}) == 1
            if not (even and flat and len(set(flat)) == len(flat) and min(flat) >= 0 and max(flat) < size):
                raise _UnfitError(f"its channels do not line up with those of {item.name}")
            members[parameter, axis] = Member(parameter, axis, tuple(tuple(sorted(entry)) for entry in positions))
    return Group(name, channels, tuple(members.values()))


def _axes(item: _Item, layers: Mapping[str, Layer], shared: frozenset[str]) -> list[tuple[str, int]]:
    """(parameter, axis) pairs that a module's pruning slices."""
    name, module = item.name, item.module
    if isinstance(module, (*_CONVS, nn.Linear)):
        layer = layers.get(name)
        if layer is None or name in shared:
            raise _UnfitError(f"{name} shares its weight, or uses it in another way than a plain layer")
        if layer.groups > 1 and not layer.depthwise:
            raise _UnfitError(f"{name} is a grouped convolution")
        if item.writes or layer.depthwise:
            return [(layer.weight, 0), (layer.bias, 0)]
        return [(layer.weight, 1)]
    if isinstance(module, _NORMS):
        return [(f"{name}.{part}", 0) for part in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, nn.PReLU):
        return [(f"{name}.weight", 0)] if module.num_parameters > 1 else []
    raise _UnfitError(f"its channels pass through {name}, a {type(module).__name__}")


def _disjoint(groups: Sequence[Group], whole: dict[str, str]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Only groups of two channels and more that slice nothing an earlier group slices."""
    taken: set[tuple[str, int, int]] = set()
    kept = []
    for group in groups:
        places = {(m.parameter, m.axis, i) for m in group.members for entry in m.positions for i in entry}
        if places & taken:
            whole[group.name] = "it overlaps another group"
        elif group.channels > 1:
            taken |= places
            kept.append(group)
    return tuple(kept), whole


def admit(candidates: Sequence[T], fits: Callable[[Sequence[T]], bool]) -> tuple[T, ...]:
    """The candidates that fit together: all at once where possible, else by bisection.

    Args:
        fits: whether some candidates can be applied together; asked about 2 log2(n) times per failing one.
    """
    admitted: list[T] = []

    def visit(part: Sequence[T]) -> None:
        if not part:
            return
        if fits([*admitted, *part]):
            admitted.extend(part)
        elif len(part) > 1:
            middle = len(part) // 2
            visit(part[:middle])
            visit(part[middle:])

    visit(candidates)
    return tuple(admitted)
