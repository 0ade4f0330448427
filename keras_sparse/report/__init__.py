"""Counts, tables and pictures of sparse models."""

from keras_sparse.report.counts import count, summary

__all__ = ["count", "summary"]
