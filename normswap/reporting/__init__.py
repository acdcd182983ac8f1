"""Reports to keep: Markdown for a pull request, and one HTML page that needs nothing else."""

from normswap.reporting.markdown import markdown
from normswap.reporting.write import check_report, write_report

__all__ = ["check_report", "markdown", "write_report"]
