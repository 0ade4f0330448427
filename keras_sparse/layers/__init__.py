"""Layers whose kernels carry masks. They know no callback and no schedule."""

from keras_sparse.layers.base_sparse import BaseSparse
from keras_sparse.layers.sparse_conv2d import SparseConv2D
from keras_sparse.layers.sparse_dense import SparseDense

__all__ = ["BaseSparse", "SparseConv2D", "SparseDense"]
