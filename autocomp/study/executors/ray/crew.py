"""The actors of a cluster that the searches of one workbench share."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ray

from autocomp.config import SearchConfig
from autocomp.outcome import Note
from autocomp.study.executors.kit import Kit, send
from autocomp.study.executors.ray.connect import check
from autocomp.study.executors.ray.executor import RayExecutor
from autocomp.study.executors.ray.pool import Pool, Station
from autocomp.study.executors.ray.room import DEVICE, room_for
from autocomp.study.trial import Trials
from autocomp.train import Trainer

__all__ = ["RayCrew", "trainer"]


class RayCrew:
    """The actors that the searches of one workbench share; they start at once and learn later what for.

    Args:
        config: with ``address``, ``workers``, ``gpus_per_worker`` and ``target_resource``.
    """

    def __init__(self, config: SearchConfig) -> None:
        check(config)
        self._config, self._room = config, room_for(config)
        started = partial(_station, num_cpus=1, num_gpus=config.gpus_per_worker)
        self.workers = Pool(started, self._room.workers, "worker")
        self.meters = None
        if config.target_resource is not None:
            started = partial(_station, num_cpus=0, resources={config.target_resource: DEVICE})
            self.meters = Pool(started, self._room.meters, "meter")

    def equip(self, kit: Kit, device: Mapping[str, Any]) -> None:
        """The kit goes through the object store once."""
        self._equipment = ray.put(send(kit, ray.cloudpickle.dumps)), device
        self._gather()

    def executor(self, trials: Trials) -> RayExecutor:
        self._gather()
        if self._room.note is not None:
            trials.observer(Note(self._room.note))
        engine = trials.device.engine
        others = [member.engine for member in self.workers.members if member.engine != engine]
        if others:
            trials.observer(
                Note(
                    f"{len(others)} of {len(self.workers.members)} workers lack {engine} and score the same files "
                    f"under {', '.join(sorted(set(others)))}; finalists are scored again on the target"
                )
            )
        return RayExecutor(trials, self.workers, self.meters)

    def trainer(self) -> Trainer:
        """Ray Tune, which needs the processors that the workers hold; they start again for the next search."""
        self.close()
        return trainer(self._config)

    def _gather(self) -> None:
        parcel, device = self._equipment
        self.workers.equip(parcel)
        if self.meters is not None:
            self.meters.equip(parcel, device)
            self.meters.gather()
        self.workers.gather()

    def close(self) -> None:
        for pool in (self.workers, self.meters):
            if pool is not None:
                pool.close()


def trainer(config: SearchConfig) -> Trainer:
    """Ray Tune on the cluster. Raises: ConfigError, RunError as `check`."""
    check(config, trains=True)
    from autocomp.study.executors.ray.tuning import finetune_on_ray  # pandas and pyarrow, which trials do without

    return finetune_on_ray


def _station(name: str, **options: Any) -> Any:
    return ray.remote(Station).options(name=name, **options).remote()
