"""Renders a plan of kvat for readers. Importing this imports neither Jinja nor the plan's schema."""

from kvat_report.decision import decision
from kvat_report.markdown import MarkdownReport
from kvat_report.output import output
from kvat_report.text import one_line

__all__ = ["MarkdownReport", "decision", "one_line", "output"]
