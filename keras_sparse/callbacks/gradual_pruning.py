"""Pruning (or densification) along a schedule while `model.fit` runs."""

import warnings

import keras
import numpy as np

from keras_sparse import allocation as allocations
from keras_sparse import criteria, schedules, selection, validation
from keras_sparse import granularity as granularities
from keras_sparse.callbacks.masked_weights import masked_weights

__all__ = ["GradualPruning"]


class GradualPruning(keras.callbacks.Callback):
    r"""Drives the masks of a model to the sparsity that a schedule asks for.

    At every update step of the schedule, the criterion rates the units of all layers, the allocation shares the
    target over them, and each layer keeps its highest units (Zhu & Gupta, 2017, section 3). Masks are nested:
    under a rising sparsity what is pruned stays pruned, under a falling one what is kept stays kept.

    Steps are optimizer steps (`optimizer.iterations`), whatever `steps_per_execution` is. The update of step
    \(t\) takes place after \(t\) updates of the weights. Nothing but the model and its optimizer holds state: a
    run resumed by `keras.callbacks.BackupAndRestore` goes on as the uninterrupted one would.

    The layers are the model's sparse layers. In a model without any, the kernels of its plain layers are pruned in
    place, and it remains the plain Keras model it is.

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
        granularity: Name or `Granularity`; `None` takes the layers' own, `"weight"` for plain layers.
        criterion: Name (`"magnitude"`, `"l2"`, `"mean"`, `"max"`, `"random"`) or `ks.criteria.Criterion`.
        allocation: `"uniform"`, `"global"`, or an `Allocation`.
        include: Which layers: name, path in a nested model, regular expression, layer class, or a list of these.
        exclude: The same, for layers to leave alone; wins over `include`.
        targets: Final sparsities of single layers, `{name, path or regular expression: sparsity}`. Such a layer
            follows the schedule's curve, stretched to its own end; the allocation shares the target over the others.

    Attributes:
        history: List of dicts, one an update: `step`, `sparsity` and `layers`, `{path: sparsity}`.

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
    ):
        super().__init__()
        self.schedule = schedules.get(schedule)
        self.granularity = None if granularity is None else granularities.get(granularity)
        self.criterion = criteria.get(criterion)
        self.allocation = allocations.get(allocation)
        self.include = include
        self.exclude = exclude
        self.targets = _check_targets(targets)
        self.history = []
        self._weights = None
        self._attached = False
        self._applied = None  # the update step whose masks are in place
        self._sparsity = 0.0
        self._checked_steps = False

    # Keras calls these.

    def set_model(self, model):
        self.finish()
        super().set_model(model)
        self._weights = masked_weights(model, self.granularity, self.include, self.exclude)
        self._own_target = _match_targets(self.targets, self._weights)
        self._attached = False
        self._applied = None

    def on_train_begin(self, logs=None):
        self._optimizer_step()  # raises where there is no optimizer to count by
        for weight in self._weights:
            weight.release()
        self._checked_steps = False

    def on_epoch_begin(self, epoch, logs=None):
        if self._checked_steps:
            return
        # Here, not in on_train_begin: `BackupAndRestore` has restored weights and steps by now.
        step = self._optimizer_step()
        self._check_reachable(epoch, step)
        self._attach()
        before = self._sparsity
        self.update(step)
        self._checked_steps = True
        if self.schedule.begin_step < self.schedule.final_step < step and self._sparsity != before:
            warnings.warn(
                f"The schedule's last update, at step {self.schedule.final_step}, lies before the optimizer's step "
                f"{step}: the sparsity went from {before:.4f} to {self._sparsity:.4f} at once. Compile the model again "
                "to count from 0, or give the schedule later steps.",
                stacklevel=2,
            )

    def on_train_batch_end(self, batch, logs=None):
        self.update(self._optimizer_step())
        for weight in self._weights:
            weight.after_batch(_inner(self.model.optimizer))
        if logs is not None:
            logs["sparsity"] = self._sparsity

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["sparsity"] = self._sparsity

    def on_train_end(self, logs=None):
        step, reached = self._optimizer_step(), self._sparsity
        self._measure()
        self.finish()
        if self._sparsity != reached:
            warnings.warn(
                f"The model's sparsity is {self._sparsity:.4f} again, not {reached:.4f}: weights and masks of an "
                "earlier epoch were restored. Let `EarlyStopping(restore_best_weights=True)` start from the epoch "
                "in which the schedule ends (`start_from_epoch`).",
                stacklevel=2,
            )
        elif step < self.schedule.final_step:
            warnings.warn(
                f"Training ended at step {step}, before the schedule's last update at step "
                f"{self.schedule.final_step}: the model's sparsity is {self._sparsity:.4f}, not "
                f"{self.schedule.final_sparsity:.4f}.",
                stacklevel=2,
            )

    # Training loops of one's own call these.

    def start(self, model, step=0):
        """Take hold of a model; call it before the train step is traced.

        Args:
            model: A built Keras model.
            step: Number of optimizer steps taken so far; other than 0 in a resumed run.
        """
        self.set_model(model)
        self._attach()
        return self.update(step)

    def update(self, step):
        """Bring the masks to the state of optimizer step `step`; cheap where nothing is due.

        Args:
            step: Number of optimizer steps taken so far.

        Returns:
            The sparsity of the pruned kernels together.
        """
        if not self._attached:
            raise RuntimeError("Call `start(model)` before `update(step)`.")
        due = self.schedule.update_step(validation.integer("step", step, at_least=0))
        if due is not None and due != self._applied:
            self._apply(self.schedule(due))
            self._applied = due
            self._measure()
            layers = {weight.name: weight.pruned() / weight.size for weight in self._weights}
            self.history.append({"step": due, "sparsity": self._sparsity, "layers": layers})
        return self._sparsity

    def finish(self):
        """Take the callback off the model; pruned weights are zero. `fit` calls it by itself."""
        if self._attached:
            for weight in self._weights:
                weight.detach()
        self._weights, self._attached = None, False

    # The work.

    def _attach(self):
        for weight in self._weights:
            weight.attach(self.model)
        self._attached, self._applied = True, None
        self._measure()

    def _optimizer_step(self):
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            raise RuntimeError("The model has no optimizer to count steps by: compile it before `fit`.")
        # The JAX trainer keeps the variables' values to itself between epochs, until it is asked for them.
        synchronise = getattr(self.model, "jax_state_sync", None)
        if synchronise is not None and self._attached:
            synchronise()
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _check_reachable(self, epoch, step):
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        if steps is None or epochs is None:
            return  # a generator of unknown length; on_train_end warns
        # Keras counts one iteration for so many batches, and batches that an earlier `fit` left over with them.
        optimizer = _inner(self.model.optimizer)
        batches = int(keras.ops.convert_to_numpy(optimizer._iterations)) + (epochs - epoch) * steps
        last = batches // (optimizer.gradient_accumulation_steps or 1)
        if last < self.schedule.final_step:
            self.finish()
            raise ValueError(
                "`schedule` must reach its last update within the steps of `fit`. Its last update is at optimizer "
                f"step {self.schedule.final_step}, but {epochs - epoch} epochs of {steps} batches from step {step} on "
                f"end at step {last}. Train for more epochs or lower `end_step`. Received: schedule={self.schedule!r}"
            )

    def _apply(self, sparsity):
        masks = [weight.mask() for weight in self._weights]
        scores = [self._scores(weight, mask) for weight, mask in zip(self._weights, masks)]
        for weight, mask, score, keep in zip(self._weights, masks, scores, self._share(sparsity, scores)):
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
                f"`criterion` must return scores without NaN for '{weight.name}': the kernel holds NaN, training has "
                f"diverged. Received: criterion={self.criterion!r}"
            )
        # What is pruned ranks last, so that an allocation over layers chooses among what is left.
        return scores if self.schedule.densifies else np.where(mask != 0, scores, -np.inf)

    def _share(self, sparsity, scores):
        """Return the number of units to keep in each weight."""
        keep = [None] * len(scores)
        for index, target in enumerate(self._own_target):
            if target is not None:
                keep[index] = allocations.units_to_keep(scores[index].size, self._stretch(sparsity, target))
        rest = [index for index, target in enumerate(self._own_target) if target is None]
        candidates = [allocations.Candidate(scores[i], self._weights[i].unit_size) for i in rest]
        for index, units in zip(rest, self.allocation.allocate(sparsity, candidates)):
            keep[index] = units
        return keep

    def _stretch(self, sparsity, target):
        """Return the sparsity of a layer whose own final sparsity is `target`."""
        initial, final = self.schedule.initial_sparsity, self.schedule.final_sparsity
        if (final - initial) * (target - initial) <= 0:
            return target  # no way there along the curve: masks are nested, and would be past it from the start
        return initial + (sparsity - initial) * (target - initial) / (final - initial)

    def _measure(self):
        pruned = sum(weight.pruned() for weight in self._weights)
        self._sparsity = pruned / sum(weight.size for weight in self._weights)


def _inner(optimizer):
    """Return the optimizer that a loss-scale optimizer wraps, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _check_targets(targets):
    if targets is None:
        return {}
    if not isinstance(targets, dict):
        validation.fail("targets", "be a dict of layer names or regular expressions to sparsities", targets, TypeError)
    return {
        pattern: validation.sparsity_value(f"targets[{pattern!r}]", sparsity) for pattern, sparsity in targets.items()
    }


def _match_targets(targets, weights):
    """Return the own target of each weight, `None` where it has none; the first pattern that matches holds."""
    layers = {weight.name: weight.layer for weight in weights}
    for pattern in targets:
        selection.select(layers, include=pattern)  # raises for a pattern without a layer
    return [
        next((s for pattern, s in targets.items() if selection.matches(pattern, weight.name, weight.layer)), None)
        for weight in weights
    ]
