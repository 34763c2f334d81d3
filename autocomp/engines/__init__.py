"""Engines: typed ONNX from a policy, backends that run it, and timing. Importing this loads no runtime."""

from autocomp.engines.attribution import by_graph_value
from autocomp.engines.backends import BACKENDS, BackendSpec, copies_of, make_backend, open_engine
from autocomp.engines.fresh import measure_fresh
from autocomp.engines.lock import device_lock
from autocomp.engines.onnx_graph import emit
from autocomp.engines.packing import with_codes
from autocomp.engines.structure import initializer_bytes, int8_layers, structure_digest, with_shapes
from autocomp.engines.template import Template, between_pairs, load_template
from autocomp.engines.timing import clear_of, compare, estimate, merge

__all__ = [
    "BACKENDS",
    "BackendSpec",
    "Template",
    "between_pairs",
    "by_graph_value",
    "clear_of",
    "compare",
    "copies_of",
    "device_lock",
    "emit",
    "estimate",
    "initializer_bytes",
    "int8_layers",
    "load_template",
    "make_backend",
    "measure_fresh",
    "merge",
    "open_engine",
    "structure_digest",
    "with_codes",
    "with_shapes",
]
