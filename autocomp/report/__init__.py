"""What a search shows: the live screen, the closing table, and the report of a run folder."""

from autocomp.report.console import LiveScreen, print_estimate, print_result
from autocomp.report.markdown import write_report

__all__ = ["LiveScreen", "print_estimate", "print_result", "write_report"]
