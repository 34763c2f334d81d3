"""What a search shows: the live screen, the closing table, the report of a run folder; and what profiles say."""

from autocomp.report.card import render_card
from autocomp.report.console import (
    LiveScreen,
    print_estimate,
    print_finetuned,
    print_result,
    print_shipped,
    print_sparsified,
    print_verification,
)
from autocomp.report.debug import print_accuracy_gap
from autocomp.report.front import print_front, write_front_report
from autocomp.report.layers import print_layers
from autocomp.report.markdown import write_report
from autocomp.report.profile import (
    BuildScreen,
    estimate_json,
    print_checked,
    print_difference,
    print_estimated,
    print_policy,
    print_profile,
    profile_json,
)
from autocomp.report.sensitivity import print_sensitivity, write_sensitivity

__all__ = [
    "BuildScreen",
    "LiveScreen",
    "estimate_json",
    "print_accuracy_gap",
    "print_checked",
    "print_difference",
    "print_estimate",
    "print_estimated",
    "print_finetuned",
    "print_front",
    "print_layers",
    "print_policy",
    "print_profile",
    "print_result",
    "print_sensitivity",
    "print_shipped",
    "print_sparsified",
    "print_verification",
    "profile_json",
    "render_card",
    "write_front_report",
    "write_report",
    "write_sensitivity",
]
