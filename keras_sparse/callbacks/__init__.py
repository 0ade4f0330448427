"""Callbacks that drive masks during `fit`. They see layers only through the mask interface."""

from keras_sparse.callbacks.drop_and_grow import SET, DropAndGrow, RigL
from keras_sparse.callbacks.gradual_pruning import GradualPruning
from keras_sparse.callbacks.groupwise_brain_damage import GroupwiseBrainDamage
from keras_sparse.callbacks.incremental_training import IncrementalTraining
from keras_sparse.callbacks.regularization import Regularization
from keras_sparse.callbacks.target_sparsity import SparsityEarlyStopping, SparsityModelCheckpoint
from keras_sparse.callbacks.tensorboard import SparsityTensorBoard

__all__ = [
    "DropAndGrow",
    "GradualPruning",
    "GroupwiseBrainDamage",
    "IncrementalTraining",
    "Regularization",
    "RigL",
    "SET",
    "SparsityEarlyStopping",
    "SparsityModelCheckpoint",
    "SparsityTensorBoard",
]
