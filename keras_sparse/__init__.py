"""keras_sparse: sparse layers, pruning callbacks and kernels that make sparse Keras models measurably faster."""

import importlib.metadata

import keras

from keras_sparse import (
    callbacks,
    criteria,
    granularity,
    initializers,
    interop,
    layers,
    regularizers,
    report,
    schedules,
    storage,
    surgery,
)
from keras_sparse.pruning import prune
from keras_sparse.report import count, plot_patterns, plot_process, plot_tradeoff, summary
from keras_sparse.storage import load_compressed, save_compressed
from keras_sparse.surgery import depth_multiplier, random_tables, shrink, sparsify, strip

__all__ = [
    "__version__",
    "callbacks",
    "count",
    "criteria",
    "depth_multiplier",
    "export",
    "granularity",
    "initializers",
    "interop",
    "layers",
    "load",
    "load_compressed",
    "ops",
    "plot_patterns",
    "plot_process",
    "plot_tradeoff",
    "prune",
    "random_tables",
    "regularizers",
    "report",
    "save_compressed",
    "schedules",
    "shrink",
    "sparsify",
    "storage",
    "strip",
    "summary",
    "surgery",
]

try:
    __version__ = importlib.metadata.version("keras_sparse")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

# Training works on every Keras backend; the compiled ops and SavedModels are TensorFlow's. Importing `ops` here
# registers them, so that a SavedModel that runs them loads.
if keras.backend.backend() == "tensorflow":
    from keras_sparse import ops
    from keras_sparse.engine import training
    from keras_sparse.export import export, load

    # Here, since layers know nothing of TensorFlow and the engine nothing of layers.
    if ops.is_available():
        layers.SparseConv2D._training_engine = (training.is_supported, training.convolve)
else:

    def __getattr__(name):
        if name in ("export", "load", "ops"):
            raise AttributeError(
                f"keras_sparse.{name} needs the TensorFlow backend (KERAS_BACKEND=tensorflow); "
                f"the backend is {keras.backend.backend()}."
            )
        raise AttributeError(f"module 'keras_sparse' has no attribute {name!r}")
