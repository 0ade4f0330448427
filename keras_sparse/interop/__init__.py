"""Models and schedules of other packages."""

from keras_sparse.interop import tfmot

__all__ = ["tfmot"]
