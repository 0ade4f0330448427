"""Pruning a model at once, without `fit`."""

from keras_sparse import granularity as granularities
from keras_sparse import schedules, validation
from keras_sparse.callbacks import GradualPruning

__all__ = ["prune"]


def prune(
    model,
    sparsity=None,
    granularity=None,
    criterion="magnitude",
    allocation="uniform",
    include=None,
    exclude=None,
    targets=None,
    weights=None,
):
    """Prune a model at once, in place: its sparse layers get masks, the weights of plain layers zeros.

    What `GradualPruning` does at one update of its schedule, with the same arguments. Weights that are pruned already
    stay so. To fine-tune the pruned model, add `GradualPruning(OneShot(sparsity))` with the same arguments to `fit`: it
    holds the zeros.

    ```python
    ks.prune(model, 0.8, allocation="global", exclude="logits")
    ks.prune(model, granularity="2:4")
    ks.prune(model, 0.5, criterion=ks.criteria.Saliency((x, y), loss="sparse_categorical_crossentropy", batches=10))
    ```

    Args:
        model: A built Keras model, of any kind.
        sparsity: Target in [0, 1), counted over all that is pruned; `None` for a granularity `"n:m"`, which says itself
            how much it prunes.
        granularity: As in `GradualPruning`.
        criterion: As in `GradualPruning`.
        allocation: As in `GradualPruning`; not `"layerwise_constant"`, which takes time.
        include: As in `GradualPruning`.
        exclude: As in `GradualPruning`.
        targets: As in `GradualPruning`.
        weights: As in `GradualPruning`.

    Returns:
        The sparsity that was reached: counts are rounded to units, and every layer keeps one.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the model is not built, `sparsity` is outside [0, 1), or a name or pattern is unknown.
    """
    if sparsity is None:
        least = 0.0 if granularity is None else granularities.get(granularity).least_sparsity
        if not least:
            validation.fail("sparsity", "be given, unless the granularity is an n:m", sparsity)
        sparsity = least
    sparsity = validation.sparsity_value("sparsity", sparsity)
    schedule = schedules.OneShot(sparsity)
    pruning = GradualPruning(schedule, granularity, criterion, allocation, include, exclude, targets, weights)
    reached = pruning.start(model)
    pruning.finish()
    return reached
