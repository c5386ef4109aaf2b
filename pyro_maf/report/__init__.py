"""The report of a fit: a single page that a browser shows without network access."""

from pyro_maf.report.page import write_report

__all__ = ["write_report"]
