"""What a program calls; the command line calls the same functions."""

from autocomp.api.delivering import apply_policy, export, finetune, verify, verify_shipped
from autocomp.api.measuring import debug_accuracy, measure, run_sensitivity
from autocomp.api.searching import load_result, resume, retarget, run_front, run_search, search
from autocomp.study.build_profile import build_profile
from autocomp.study.conduct import Interrupted
from autocomp.study.profiles import check_profile, predict_policy
from autocomp.study.sparsify import sparsify

__all__ = [
    "Interrupted",
    "apply_policy",
    "build_profile",
    "check_profile",
    "debug_accuracy",
    "export",
    "finetune",
    "load_result",
    "measure",
    "predict_policy",
    "resume",
    "retarget",
    "run_front",
    "run_search",
    "run_sensitivity",
    "search",
    "sparsify",
    "verify",
    "verify_shipped",
]
