"""Lists the sections of the page for the evaluations of eval.py."""

from nanometa.reports import depth, tasks
from nanometa.reports.page import Section

# Evaluations that the page does not show. tests/test_report.py fails for one that neither has a section nor is named.
NO_SECTION = ("passkey",)


def sections(effect: float, margin: float) -> list[Section]:
    """Returns the sections in the order of the page."""
    return [tasks.section(effect, margin), depth.section()]
