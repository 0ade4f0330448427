# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""The sparse convolutions: compiled ops, their gradients, and a pure reference.

Importing this package registers the compiled ops with TensorFlow, so that a SavedModel that holds
them loads. Without the compiled library everything is computed by `keras_sparse.ops.reference`.
"""

from keras_sparse.ops import gradients as _gradients
from keras_sparse.ops import library as _library
from keras_sparse.ops import reference
from keras_sparse.ops.connection_conv2d import connection_conv2d
from keras_sparse.ops.library import is_available, library_path
from keras_sparse.ops.thinned_conv2d import thinned_conv2d

__all__ = [
    "connection_conv2d",
    "is_available",
    "library_path",
    "reference",
    "thinned_conv2d",
]

_gradients.register()
_library.load()
