"""Counts, tables and pictures of sparse models."""

from keras_sparse.report.counts import count, summary
from keras_sparse.report.plots import plot_patterns, plot_process, plot_tradeoff

__all__ = ["count", "plot_patterns", "plot_process", "plot_tradeoff", "summary"]
