"""The report of a fit: one page that a browser shows without a network."""

from pyro_maf.report.page import write_report

__all__ = ["write_report"]
