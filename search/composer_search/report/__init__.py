"""One self-contained page of a study, its models and their training."""

from composer_search.report.data import ReportInputs
from composer_search.report.page import build_report, write_report

__all__ = ["ReportInputs", "build_report", "write_report"]
