"""Pruning (or densification) along a schedule while `model.fit` runs."""

import numpy as np

from keras_sparse import allocation as allocations
from keras_sparse import criteria, schedules, selection, validation
from keras_sparse import granularity as granularities
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.callbacks.scheduled_masks import ScheduledMasks

__all__ = ["GradualPruning"]


class GradualPruning(ScheduledMasks):
    r"""Drives the masks of a model to the sparsity that a schedule asks for.

    At every update step of the schedule, the criterion rates the units of all layers, the allocation shares the
    target over them, and each layer keeps its highest units (Zhu & Gupta, 2017, section 3). Masks are nested:
    under a rising sparsity what is pruned stays pruned, under a falling one what is kept stays kept.

    Steps are optimizer steps (`optimizer.iterations`), whatever `steps_per_execution` is. The update of step
    \(t\) takes place after \(t\) updates of the weights. Nothing but the model and its optimizer holds state: a
    run resumed by `keras.callbacks.BackupAndRestore` goes on as the uninterrupted one would.

    The layers are the model's sparse layers. In a model without any, the weights of its plain layers are pruned in
    place, and it remains the plain Keras model it is: kernels, recurrent kernels, embeddings, pointwise kernels, in
    wrappers, cells and attention layers too. Depthwise kernels are left alone unless `include` names them.

    `fit` logs `sparsity`, the share of zeros among the pruned kernels' weights, for the progress bar, `History`, and
    `TensorBoard` or `CSVLogger` callbacks that stand after this one.

    ```python
    schedule = ks.schedules.PolynomialDecay(0.0, 0.9, begin_step=200, end_step=2000)
    model.fit(x, y, callbacks=[ks.callbacks.GradualPruning(schedule, exclude="logits")])
    ```

    In a training loop of your own:

    ```python
    pruning.start(model)
    for step, batch in enumerate(data, start=1):
        train_step(batch)
        pruning.update(step)
    pruning.finish()
    ```

    Args:
        schedule: A `ks.schedules.Schedule`.
        granularity: Name, `"n:m"` or `Granularity`; `None` takes the layers' own, `"weight"` for plain layers.
        criterion: Name (`"magnitude"`, `"l2"`, `"mean"`, `"max"`, `"random"`), `ks.criteria.Criterion`, or scores of
            your own: `{name: array}` or a function of `(kernel, name)`.
        allocation: `"uniform"`, `"global"`, `"layerwise_constant"`, `"erdos_renyi"`, `"erk"`, or an `Allocation`.
        include: Which layers: name, path in a nested model, regular expression, layer class, or a list of these. A
            model or wrapper stands for the layers in it, `"rnn/cell/recurrent_kernel"` for a single weight.
        exclude: The same, for layers to leave alone; wins over `include`.
        targets: Final sparsities of single layers, `{name, path, regular expression or class: sparsity}`. Such a layer
            follows the schedule's curve, stretched to its own end; the allocation shares the target over the others.
        weights: Which weights of a layer, `{name, path, regular expression or class: weight or list of weights}`, by
            the names of attributes or variables: `{MyLayer: ["w_in", "w_out"]}`. They take the place of those that
            would be pruned in the layer.

    Attributes:
        history: List of dicts, one an update: `step`, `sparsity` and `layers`, `{name: sparsity}`. The name is the
            layer's path, `"rnn/cell/kernel"` where several of a layer's weights are pruned.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a name is unknown, a pattern matches no layer, a target is outside [0, 1), or, before the first
            batch, when `fit` will end before the schedule does.
    """

    def __init__(
        self,
        schedule,
        granularity=None,
        criterion="magnitude",
        allocation="uniform",
        include=None,
        exclude=None,
        targets=None,
        weights=None,
    ):
        super().__init__(schedules.get(schedule))
        self.granularity = None if granularity is None else granularities.get(granularity)
        self.criterion = criteria.get(criterion)
        self.allocation = allocations.get(allocation)
        self.include = include
        self.exclude = exclude
        self.allocation.check(self.schedule)
        self.targets = check_targets(targets)
        self.weights = weights

    def _take(self, model):
        weights = masked_weights(model, self.granularity, self.include, self.exclude, self.weights)
        self._own_target = match_targets(self.targets, weights)
        for weight, own in zip(weights, self._own_target):
            least, final = weight.granularity.least_sparsity, self.schedule.final_sparsity if own is None else own
            if final < least - 1e-9:
                rule = f"end at a sparsity of at least {least:g} for '{weight.name}', of granularity "
                argument = "schedule" if own is None else "targets"
                validation.fail(argument, f"{rule}'{weight.granularity.name}'", final)
        self.criterion.check(model, weights)
        return weights

    @property
    def _final_step(self):
        return self.allocation.final_step(self.schedule)

    def _apply(self, step):
        if self._applied is not None and self._applied >= self._final_step:
            return  # masks stand once the final sparsity is reached
        self.criterion.prepare(self.model, self._weights, self.schedule.updates_before(step))
        masks = [weight.mask() for weight in self._weights]
        scores = [self._scores(weight, mask) for weight, mask in zip(self._weights, masks)]
        for weight, mask, score, keep in zip(self._weights, masks, scores, self._share(step, scores)):
            kept = int(np.count_nonzero(mask))
            if not self.schedule.densifies:
                keep = min(keep, kept)  # a model that is sparser already stays so
            if keep != kept:
                weight.assign(weight.granularity.mask(score, keep, previous=mask))

    def _scores(self, weight, mask):
        scores = np.asarray(self.criterion.scores(weight.kernel(), weight.granularity, weight.name))
        if scores.shape != mask.shape:
            rule = f"return scores of the mask's shape, {mask.shape}, for '{weight.name}'"
            validation.fail("criterion", rule, scores.shape)
        if np.isnan(scores).any():
            raise ValueError(
                f"`criterion` must return scores without NaN for '{weight.name}': the kernel or a gradient holds NaN, "
                f"training has diverged. Received: criterion={self.criterion!r}"
            )
        # What is pruned ranks last, so that an allocation over layers chooses among what is left.
        return scores if self.schedule.densifies else np.where(mask != 0, scores, -np.inf)

    def _share(self, step, scores):
        """Return the number of units to keep in each weight."""
        sparsity = self.schedule(step)
        keep = [None] * len(scores)
        for index, target in enumerate(self._own_target):
            if target is not None:
                keep[index] = allocations.units_to_keep(scores[index].size, self._stretch(sparsity, target))
        rest = [index for index, target in enumerate(self._own_target) if target is None]
        candidates = [self._weights[i].candidate(scores[i]) for i in rest]
        for index, units in zip(rest, self.allocation.allocate_at(self.schedule, step, candidates)):
            keep[index] = units
        return keep

    def _stretch(self, sparsity, target):
        """Return the sparsity of a layer whose own final sparsity is `target`."""
        initial, final = self.schedule.initial_sparsity, self.schedule.final_sparsity
        if (final - initial) * (target - initial) <= 0:
            return target  # no way there along the curve: masks are nested, and would be past it from the start
        return initial + (sparsity - initial) * (target - initial) / (final - initial)


def check_targets(targets):
    """Return the dict of own targets, or raise where it is none of patterns and sparsities."""
    if targets is None:
        return {}
    if not isinstance(targets, dict):
        validation.fail("targets", "be a dict of layer names or regular expressions to sparsities", targets, TypeError)
    selection.check_patterns("targets", list(targets))
    return {
        pattern: validation.sparsity_value(f"targets[{pattern!r}]", sparsity) for pattern, sparsity in targets.items()
    }


def match_targets(targets, weights):
    """Return the own target of each weight, `None` where it has none; the first pattern that matches holds."""
    for pattern in targets:
        if not any(weight.weight.named_by(pattern) for weight in weights):
            names = ", ".join(repr(weight.name) for weight in weights)
            shown = getattr(pattern, "pattern", getattr(pattern, "__name__", pattern))
            validation.fail("targets", f"match a layer that is pruned; these are {names}", shown)
    return [next((s for pattern, s in targets.items() if weight.weight.named_by(pattern)), None) for weight in weights]
