"""Compact tables on disk: written as a stream, read by memory map on NumPy alone."""

from thresher.tables.reader import Tables, load
from thresher.tables.writer import TableWriter, Writer

__all__ = ["TableWriter", "Tables", "Writer", "load"]
