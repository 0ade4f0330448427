"""Whole-model transforms."""

from keras_sparse.surgery.random_tables import RandomTables, random_tables
from keras_sparse.surgery.sparsify import sparsify, strip
from keras_sparse.surgery.transform import transform

__all__ = ["RandomTables", "random_tables", "sparsify", "strip", "transform"]
