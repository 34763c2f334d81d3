"""The torch side of compression: trace a model, collect statistics, turn a policy into weights, export."""

from autocomp.compress.affine import Norm
from autocomp.compress.apply import Compressed, compress, structure
from autocomp.compress.arrays import logits_of, to_tensor
from autocomp.compress.channels_left import channels_left
from autocomp.compress.equalize import equalize
from autocomp.compress.export import export_compressed, export_onnx
from autocomp.compress.footprint import footprint
from autocomp.compress.low_rank import energies
from autocomp.compress.moments import Moments
from autocomp.compress.ranges import calibration_notes
from autocomp.compress.sensitivity import divergences
from autocomp.compress.statistics import Statistics, collect, kept_outputs
from autocomp.compress.surgery import run
from autocomp.compress.surrogate import lost_outputs
from autocomp.compress.tracing import Traced, trace
from autocomp.compress.tuned import quantize_learned, quantize_tuned

__all__ = [
    "Compressed",
    "Moments",
    "Norm",
    "Statistics",
    "Traced",
    "calibration_notes",
    "channels_left",
    "collect",
    "compress",
    "divergences",
    "energies",
    "equalize",
    "export_compressed",
    "export_onnx",
    "footprint",
    "kept_outputs",
    "logits_of",
    "lost_outputs",
    "quantize_learned",
    "quantize_tuned",
    "run",
    "structure",
    "to_tensor",
    "trace",
]
