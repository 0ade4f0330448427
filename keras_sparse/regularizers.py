"""Regularizers that shrink whole units of a kernel, so that they can be pruned together."""

import keras
import numpy as np
from keras import ops

from keras_sparse import granularity as granularities
from keras_sparse import validation

__all__ = ["GroupLasso", "TruncatedGroupLasso"]


def _register(cls):
    return keras.saving.register_keras_serializable(package="keras_sparse")(cls)


class _UnitNorms(keras.regularizers.Regularizer):
    """Penalises the l2 norms of a kernel's units; subclasses define `_penalty(norms)`."""

    def __init__(self, lambda_, granularity):
        lambda_ = validation.number("lambda_", lambda_, at_least=0)
        self.lambda_ = keras.Variable(lambda_, trainable=False, dtype="float32", name="lambda")
        self.granularity = granularities.get(granularity)

    def _penalty(self, norms):
        raise NotImplementedError

    def __call__(self, kernel):
        # Sums of squares leave the range of half precisions soon.
        dtype = keras.backend.result_type(kernel.dtype, "float32")
        norms = _norms(ops.cast(kernel, dtype), self.granularity)
        return ops.cast(self.lambda_, dtype) * ops.sum(self._penalty(norms))

    def get_config(self):
        config = {"lambda_": _decimal(self.lambda_), "granularity": granularities.serialize(self.granularity)}
        if _sharing("id_to_config_map") is not None:
            config["shared_id"] = str(id(self))
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        key = (cls.__name__, config.pop("shared_id", None))
        made = _sharing("id_to_obj_map")
        if made is None or key[1] is None:
            return cls(**config)
        if key not in made:
            made[key] = cls(**config)
        return made[key]


@_register
class GroupLasso(_UnitNorms):
    r"""The group lasso, \(\ell_{2,1}\): shrinks units of a kernel to zero as wholes.

    $$\Omega_{2,1}(K) = \lambda \sum_{i,j,s} \lVert \Gamma_{ijs} \rVert
    = \lambda \sum_{i,j,s} \sqrt{\sum_t K(i, j, s, t)^2}$$

    with the groups \(\Gamma_{ijs}\) = K(i, j, s, :), one tap of one input map (Lebedev & Lempitsky, 2016, equations 3
    and 4). Any other granularity sums over its own units; with `"weight"` this is the \(\ell_1\) norm. Units of size
    zero have the gradient zero. Training alone brings no unit to exactly zero: prune the weakest afterwards.

    ```python
    lasso = ks.regularizers.GroupLasso(1e-3)
    layer = ks.layers.SparseConv2D(50, 5, granularity="group", kernel_regularizer=lasso)
    lasso.lambda_.assign(0.0)  # off from the next step on; nothing is traced again
    ```

    Sparse layers show it the effective kernel, at any mask. One object may serve several layers. For an existing
    model, and for a limited time, there is `ks.callbacks.Regularization`.

    Args:
        lambda_: \(\lambda\), strength of the penalty, >= 0. Held in the variable `lambda_`. Under JAX, a step that is
            compiled already keeps the value it was compiled with: compile the model again after a change.
        granularity: What one unit is: a name or a `Granularity`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `lambda_` is negative or `granularity` unknown.
    """

    def __init__(self, lambda_=0.01, granularity="group"):
        super().__init__(lambda_, granularity)

    def _penalty(self, norms):
        return norms


@_register
class TruncatedGroupLasso(_UnitNorms):
    r"""The truncated group lasso: shrinks the units with norms below \(\theta\) and leaves the others alone.

    $$\Omega^T_{2,1}(K) = \lambda \sum_{i,j,s} \min\left(\lVert \Gamma_{ijs} \rVert, \theta\right)$$

    (Lebedev & Lempitsky, 2016, equation 5). The gradient is that of `GroupLasso` where a norm is below \(\theta\), and
    zero otherwise. `ks.callbacks.GroupwiseBrainDamage` moves \(\theta\) by the accuracy on held-out data.

    ```python
    shared = ks.regularizers.TruncatedGroupLasso(0.01, theta=0.5)  # one theta for both layers
    conv1 = ks.layers.SparseConv2D(20, 5, granularity="group", kernel_regularizer=shared)
    conv2 = ks.layers.SparseConv2D(50, 5, granularity="group", kernel_regularizer=shared)
    shared.theta.assign(0.7)  # from the next step on; nothing is traced again
    ```

    The present values of \(\lambda\) and \(\theta\) are part of the configuration: a `.keras` file holds them, and
    layers that share the object share it again when the file is loaded. Weights files hold neither. `ks.sparsify` and
    `clone_model` give every layer a copy of its own.

    Args:
        lambda_: \(\lambda\), strength of the penalty, >= 0. Held in the variable `lambda_`.
        theta: \(\theta\), the norm from which on units are left alone, >= 0. Held in the variable `theta`. Under JAX, a
            step that is compiled already keeps the values it was compiled with: compile the model again.
        granularity: What one unit is: a name or a `Granularity`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `lambda_` or `theta` is negative, or `granularity` unknown.
    """

    def __init__(self, lambda_=0.01, theta=0.0, granularity="group"):
        super().__init__(lambda_, granularity)
        theta = validation.number("theta", theta, at_least=0)
        self.theta = keras.Variable(theta, trainable=False, dtype="float32", name="theta")

    def _penalty(self, norms):
        theta = ops.cast(self.theta, norms.dtype)
        # `where` and not `minimum`, which would hand half of the gradient on where both are equal.
        return ops.where(norms < theta, norms, theta)

    def get_config(self):
        return {**super().get_config(), "theta": _decimal(self.theta)}


def _norms(kernel, granularity):
    """Return the l2 norms of the units, with the gradient 0 where a norm is 0."""
    squares = granularity.reduce(ops.square(kernel), ops.sum)
    positive = squares > 0
    # Both branches of `where` are differentiated: the root must not see the zeros.
    return ops.where(positive, ops.sqrt(ops.where(positive, squares, ops.ones_like(squares))), ops.zeros_like(squares))


def _sharing(table):
    """Return what Keras notes of shared objects while it writes or reads a model file, else `None`.

    Its own sharing misses objects in the configurations of layers, where the first one is written before it is known
    that it is shared.
    """
    try:
        from keras.src.backend.common import global_state
    except ImportError:  # another Keras: each layer then gets an object of its own, with the same values
        return None
    return global_state.get_global_attribute(f"shared_objects/{table}")


def _decimal(variable):
    """Return a float32 variable's value as the shortest number that it is read back from."""
    return float(str(np.float32(ops.convert_to_numpy(variable))))
