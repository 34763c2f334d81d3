"""Trials on a Ray cluster: long-lived actors score and time, the loop and the journal stay with the search."""

from autocomp.study.executors.ray.connect import ANSWER_S, check
from autocomp.study.executors.ray.crew import RayCrew, trainer
from autocomp.study.executors.ray.executor import ATTEMPTS, RayExecutor
from autocomp.study.executors.ray.pool import Member, Pool

__all__ = ["ANSWER_S", "ATTEMPTS", "Member", "Pool", "RayCrew", "RayExecutor", "check", "trainer"]
