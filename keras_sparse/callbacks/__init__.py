"""Callbacks that drive masks during `fit`. They see layers only through the mask interface."""

from keras_sparse.callbacks.gradual_pruning import GradualPruning

__all__ = ["GradualPruning"]
