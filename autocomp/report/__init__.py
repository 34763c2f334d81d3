"""What a search shows: the live screen, the closing table, and the report of a run folder."""

from autocomp.report.console import LiveScreen, print_estimate, print_result
from autocomp.report.markdown import write_report
from autocomp.report.sensitivity import print_sensitivity, write_sensitivity

__all__ = ["LiveScreen", "print_estimate", "print_result", "print_sensitivity", "write_report", "write_sensitivity"]
