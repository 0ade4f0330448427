"""Whole-model transforms."""

from keras_sparse.surgery.sparsify import sparsify, strip
from keras_sparse.surgery.transform import transform

__all__ = ["sparsify", "strip", "transform"]
