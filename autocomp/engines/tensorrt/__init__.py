"""TensorRT engines, of the data-centre package or of TensorRT-RTX. Importing this loads neither."""

from autocomp.engines.tensorrt.backend import TensorRtBackend, parse_targets
from autocomp.engines.tensorrt.build import BuildOptions, build_plan
from autocomp.engines.tensorrt.calibration_cache import CalibrationCache, with_scales
from autocomp.engines.tensorrt.flavour import FLAVOURS, Flavour, find_flavour, first_installed, installed
from autocomp.engines.tensorrt.inspector import EngineLayer, inspected
from autocomp.engines.tensorrt.onnx_file import prepare
from autocomp.engines.tensorrt.plan_file import PlanCache, PlanHeader, read_plan, write_plan

__all__ = [
    "FLAVOURS",
    "BuildOptions",
    "CalibrationCache",
    "EngineLayer",
    "Flavour",
    "PlanCache",
    "PlanHeader",
    "TensorRtBackend",
    "build_plan",
    "find_flavour",
    "first_installed",
    "inspected",
    "installed",
    "parse_targets",
    "prepare",
    "read_plan",
    "with_scales",
    "write_plan",
]
