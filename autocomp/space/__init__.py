"""What a search may choose: a `SearchSpace` as written in a TOML file, and the `PolicySpace` it leaves for one model
on one engine."""

from autocomp.space.policy_space import Decision, PolicySpace, Source
from autocomp.space.search_space import Rule, SearchSpace

__all__ = ["Decision", "PolicySpace", "Rule", "SearchSpace", "Source"]
