"""What the nodes of a cluster have room for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep

import ray
from ray._private.state import available_resources_per_node

from autocomp.config import SearchConfig
from autocomp.errors import ConfigError

__all__ = ["DEVICE", "Node", "Room", "check_room", "room_for"]

DEVICE = 0.9
"""Of a target device that its actor takes: no two share one, and the job that runs there may hold the rest."""
FREE_S = 5.0
"""Longest wait for what actors that have just ended held."""
NAMED = 8
"""Nodes that an error lists."""
_HIDDEN = ("node:", "memory", "object_store_memory", "accelerator_type:")
_EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class Node:
    """A machine by resource: all it has, and what nobody holds."""

    host: str
    has: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        shown = (name for name in sorted(self.has) if not name.startswith(_HIDDEN))
        counts = ", ".join(f"{name} {self.free.get(name, 0.0):g} of {self.has[name]:g}" for name in shown)
        return f"{self.host}: {counts}"


@dataclass(frozen=True, slots=True)
class Room:
    """How many actors of each kind start, and what the user is to know of it."""

    workers: int
    meters: int
    note: str | None = None


def check_room(config: SearchConfig) -> None:
    """Raises: ConfigError if the cluster could not hold what is asked for even if nobody else used it."""
    here = nodes()
    wanted = config.workers or 1
    for unit, each in (("CPU", 1.0), ("GPU", config.gpus_per_worker)):
        has = sum(node.has.get(unit, 0.0) for node in here)
        if each * wanted > has + _EXACT:
            raise ConfigError(
                f"{wanted} workers take {each * wanted:g} {unit}s and the cluster has {has:g}: "
                "give fewer --workers, or a smaller --gpus-per-worker"
            )
    if not sum(_workers_in(node.has, config) for node in here):
        raise ConfigError(
            f"no node can hold a worker, which takes a CPU and {config.gpus_per_worker:g} GPUs; free are "
            f"{_listed(here)}: give a smaller --gpus-per-worker"
        )
    target = config.target_resource
    if target is not None and not sum(_devices(node, target) for node in here):
        raise ConfigError(
            f"no node of the cluster has the resource {target!r}; it has {_summed(here)}: start the target's node with "
            f"--resources '{{\"{target}\": 1}}'"
        )


def room_for(config: SearchConfig) -> Room:
    """As many actors as were asked for, else as many as the cluster can hold, and no more than what is free.

    Raises:
        ConfigError: others hold so much that no worker fits, or no actor that times.
    """
    until = monotonic() + FREE_S
    target = config.target_resource
    while True:
        here = nodes()
        can_hold = sum(_workers_in(node.has, config) for node in here)
        wanted = can_hold if config.workers is None else config.workers
        fitting = min(wanted, sum(_workers_in(node.free, config) for node in here))
        devices = 0 if target is None else sum(_devices(node, target) for node in here)
        idle = 0 if target is None else sum(_idle(node, target) for node in here)
        if (fitting == min(wanted, can_hold) and idle == devices) or monotonic() > until:
            break
        sleep(0.1)
    if not fitting:
        raise ConfigError(f"no node has room for a worker; free are {_listed(here)}: wait until others have ended")
    if target is not None and not idle:
        raise ConfigError(
            f"no node has {DEVICE:g} of the resource {target!r} for the actor that times; free are {_listed(here)}: "
            "wait until others have ended, and let the job itself hold no more than 0.1 (--entrypoint-resources)"
        )
    fewer = fitting < wanted
    note = f"{fitting} workers start in place of {wanted}, as no more fit; free are {_listed(here)}" if fewer else None
    return Room(fitting, idle, note)


def nodes() -> list[Node]:
    """All that live."""
    look = available_resources_per_node
    free = ray.get(ray.remote(num_cpus=0)(look).remote()) if ray.util.client.ray.is_connected() else look()
    return [
        Node(node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _workers_in(resources: Mapping[str, float], config: SearchConfig) -> int:
    """Workers that a node's resources hold; a fraction of a GPU is always of one GPU."""
    fitting, share = int(resources.get("CPU", 0.0) + _EXACT), config.gpus_per_worker
    if not share:
        return fitting
    gpus = resources.get("GPU", 0.0)
    if share >= 1:
        return min(fitting, int(gpus / share + _EXACT))
    whole, part = divmod(gpus + _EXACT, 1.0)
    return min(fitting, int(whole) * int(1.0 / share + _EXACT) + int(part / share))


def _devices(node: Node, target: str) -> int:
    return int(node.has.get(target, 0.0) + _EXACT)


def _idle(node: Node, target: str) -> int:
    """Devices that nobody owns."""
    return min(_devices(node, target), int(node.free.get(target, 0.0) / DEVICE + _EXACT))


def _listed(here: Sequence[Node]) -> str:
    more = f"; and {len(here) - NAMED} more nodes" if len(here) > NAMED else ""
    return "; ".join(map(str, here[:NAMED])) + more


def _summed(here: Sequence[Node]) -> str:
    names = sorted({name for node in here for name in node.has if not name.startswith(_HIDDEN)})
    return ", ".join(f"{name} {sum(node.has.get(name, 0.0) for node in here):g}" for name in names)
