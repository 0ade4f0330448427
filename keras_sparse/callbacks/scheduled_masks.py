"""What callbacks share that bring the masks of a model to the state a schedule asks for."""

import warnings

import keras

from keras_sparse import validation

__all__ = ["ScheduledMasks", "inner_optimizer"]


class ScheduledMasks(keras.callbacks.Callback):
    """Base of callbacks that change masks at the update steps of a schedule, in `fit` and in loops of one's own.

    A subclass defines `_take(model)`, which masks it drives, and `_apply(step)`, what an update step makes of them.
    The latter must be a function of the step and the model alone, and change nothing where it is asked again.

    Args:
        schedule: A `Schedule`.
        quantity: What is logged and returned, `"sparsity"` or `"density"`.
    """

    def __init__(self, schedule, quantity="sparsity"):
        super().__init__()
        self.schedule = schedule
        self.history = []
        self._quantity = quantity
        self._weights = None
        self._optimizer = None
        self._attached = False
        self._applied = None  # the update step whose masks are in place
        self._sparsity = 0.0
        self._checked_steps = False

    def _take(self, model):
        """Return the `MaskedWeight`s of a model that this callback drives; raise where there are none."""
        raise NotImplementedError(f"{type(self).__name__} must define `_take(model)`.")

    def _apply(self, step):
        """Bring the masks to the state of update step `step` of the schedule."""
        raise NotImplementedError(f"{type(self).__name__} must define `_apply(step)`.")

    @property
    def _final_step(self):
        """The last step at which masks change, which `fit` has to reach."""
        return self.schedule.final_step

    def _fail_unreachable(self, situation):
        """Raise: the steps of `fit` end, as `situation` says, before the schedule does."""
        raise ValueError(
            "`schedule` must reach its last update within the steps of `fit`. Its last update is at optimizer step "
            f"{self._final_step}, but {situation}. Train for more epochs or lower `end_step`. Received: "
            f"schedule={self.schedule!r}"
        )

    # Keras calls these.

    def set_model(self, model):
        self.finish()
        super().set_model(model)
        self._weights = self._take(model)
        self._optimizer = inner_optimizer(getattr(model, "optimizer", None))
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
        if self.schedule.begin_step < self._final_step < step and self._sparsity != before:
            warnings.warn(
                f"The schedule's last update, at step {self._final_step}, lies before the optimizer's step "
                f"{step}: the {self._quantity} went from {self._figure(before):.4f} to {self._figure():.4f} at once. "
                "Compile the model again to count from 0, or give the schedule later steps.",
                stacklevel=2,
            )

    def on_train_batch_end(self, batch, logs=None):
        self.update(self._optimizer_step())
        self._after_batch(logs)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs[self._quantity] = self._figure()

    def on_train_end(self, logs=None):
        step, reached = self._optimizer_step(), self._sparsity
        self._measure()
        self.finish()
        if self._sparsity != reached:
            warnings.warn(
                f"The model's {self._quantity} is {self._figure():.4f} again, not {self._figure(reached):.4f}: weights "
                "and masks of an earlier epoch were restored. Let `EarlyStopping(restore_best_weights=True)` start "
                "from the epoch in which the schedule ends (`start_from_epoch`).",
                stacklevel=2,
            )
        elif step < self._final_step:
            warnings.warn(
                f"Training ended at step {step}, before the schedule's last update at step "
                f"{self._final_step}: the model's {self._quantity} is {self._figure():.4f}, not "
                f"{self._figure(self.schedule.final_sparsity):.4f}.",
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
            The sparsity (of `IncrementalTraining`: the density) of the driven kernels together.
        """
        if not self._attached:
            raise RuntimeError("Call `start(model)` before `update(step)`.")
        due = self.schedule.update_step(validation.integer("step", step, at_least=0))
        if due is not None and due != self._applied:
            self._apply(due)
            self._applied = due
            self._measure()
            layers = {weight.name: self._figure(weight.pruned() / weight.size) for weight in self._weights}
            self.history.append({"step": due, self._quantity: self._figure(), "layers": layers})
        return self._figure()

    def finish(self):
        """Take the callback off the model; pruned weights are zero. `fit` calls it by itself."""
        if self._attached:
            for weight in self._weights:
                weight.detach()
        self._weights, self._attached = None, False

    # The work.

    def _after_batch(self, logs):
        for weight in self._weights:
            weight.after_batch(self._optimizer)
        if logs is not None:
            logs[self._quantity] = self._figure()

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
        optimizer = self._optimizer
        batches = int(keras.ops.convert_to_numpy(optimizer._iterations)) + (epochs - epoch) * steps
        last = batches // (optimizer.gradient_accumulation_steps or 1)
        if last < self._final_step:
            self.finish()
            self._fail_unreachable(f"{epochs - epoch} epochs of {steps} batches from step {step} on end at step {last}")

    def _measure(self):
        pruned = sum(weight.pruned() for weight in self._weights)
        self._sparsity = pruned / sum(weight.size for weight in self._weights)

    def _figure(self, sparsity=None):
        sparsity = self._sparsity if sparsity is None else sparsity
        return sparsity if self._quantity == "sparsity" else 1.0 - sparsity


def inner_optimizer(optimizer):
    """Return the optimizer that a loss-scale optimizer wraps, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)
