"""What callbacks that only look at a model's sparsity share."""

from keras_sparse.callbacks.masked_weights import masked_weights

__all__ = ["observed_sparsity", "synchronise"]


def observed_sparsity(model, logs=None, include=None, exclude=None):
    """Return the share of zeros among the weights that are pruned.

    What a callback that prunes has logged, `"sparsity"` or `"density"`; without one before this in the list of
    callbacks, or where layers are named, what the masks say, and in plain layers the zeros.
    """
    logs = logs or {}
    if include is None and exclude is None:
        if "sparsity" in logs:
            return float(logs["sparsity"])
        if "density" in logs:
            return 1.0 - float(logs["density"])
    synchronise(model)
    weights = masked_weights(model, None, include, exclude)
    kept = sum(weight.count(weight.kept()) for weight in weights)
    return 1.0 - kept / sum(weight.size for weight in weights)


def synchronise(model):
    """Let the JAX trainer, which keeps the variables' values to itself within an epoch, give them out."""
    sync = getattr(model, "jax_state_sync", None)
    if sync is not None:
        sync()
