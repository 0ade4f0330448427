"""Whole-model transforms."""

from keras_sparse.surgery.depth_multiplier import depth_multiplier
from keras_sparse.surgery.random_tables import RandomTables, random_tables
from keras_sparse.surgery.shrink import shrink
from keras_sparse.surgery.sparsify import sparsify, strip
from keras_sparse.surgery.transform import transform

__all__ = ["RandomTables", "depth_multiplier", "random_tables", "shrink", "sparsify", "strip", "transform"]
