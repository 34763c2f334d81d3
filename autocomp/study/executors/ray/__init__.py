"""Trials on a Ray cluster: long-lived actors score and time, the loop and the journal stay with the search."""

from autocomp.study.executors.ray.connect import ANSWER_S, check, workers_of
from autocomp.study.executors.ray.executor import ATTEMPTS, RayCrew, RayExecutor, trainer
from autocomp.study.executors.ray.pool import Member, Pool

__all__ = ["ANSWER_S", "ATTEMPTS", "Member", "Pool", "RayCrew", "RayExecutor", "check", "trainer", "workers_of"]
