"""Tables in documents, made from result files. Reads records, computes no metric."""

from bitswitch.report.tables import render, update

__all__ = ["render", "update"]
