"""Gradual group-wise sparsification: a threshold on norms, steered by the accuracy on held-out data."""

import contextlib
import json
import math
import os
import warnings

import keras
import numpy as np

from keras_sparse import criteria, files, regularizers, selection, validation
from keras_sparse import granularity as granularities
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.callbacks.regularization import Regularization
from keras_sparse.layers import BaseSparse

__all__ = ["GroupwiseBrainDamage"]

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_NORM = criteria.Magnitude("l2")


class GroupwiseBrainDamage(Regularization):
    r"""Sparsifies a trained network as far as its accuracy allows: gradual group-wise brain damage.

    While `fit` runs, the truncated group lasso

    $$\Omega^T_{2,1}(K) = \lambda \sum_{i,j,s} \min\left(\lVert \Gamma_{ijs} \rVert, \theta\right)$$

    is part of the loss, with one \(\theta\) for all layers. After each epoch

    1. every group whose norm is below \(\epsilon\) is eliminated for good;
    2. the accuracy is measured on held-out data, and its drop from that of the network at the start, both as fractions:
       a drop of 0.01 is one percentage point;
    3. \(\theta\) rises if the drop is below \(\delta\), bringing a share `quantile` of the groups that are left below
       \(\theta\), and falls otherwise, releasing as many.

    Training stops when no group has died for `patience` epochs (Lebedev & Lempitsky, 2016, equation 5 and section 4.2,
    "Gradual group-wise sparsification"). The held-out data are split at random into two halves: one steers
    \(\theta\), the other only reports.

    ```python
    damage = ks.callbacks.GroupwiseBrainDamage(
        (x_val, y_val), delta=0.01, epsilon=0.1, lambda_=0.01, path="damage.json"
    )
    model.fit(x, y, epochs=200, callbacks=[damage])
    ks.plot_process(damage.history)
    ```

    A group below \(\theta\) shrinks by about the learning rate times \(\lambda\) in a step of plain SGD; the run has to
    be long enough for that to bring groups from where they are to \(\epsilon\).

    If the next elimination would leave a kernel without any group, or training has diverged, the model gets back the
    weights of the last good epoch, training stops and a warning says why. The penalty is taken off when `fit` ends;
    masks stay. Nothing of the model's files knows of \(\theta\): where a run is to be resumed, by `BackupAndRestore`
    or from a saved model, `path` holds it together with the history. The resumed run then goes on as the uninterrupted
    one would; so does a second `fit` with the same callback.

    In a training loop of your own, over a model that is compiled with a metric:

    ```python
    damage.start(model)
    for epoch in range(epochs):
        train_epoch(model)
        if damage.update(epoch):
            break
    damage.finish()
    ```

    Args:
        validation_data: `(x, y)` or `(x, y, sample_weight)` of arrays, or of dicts or lists of these: held-out data, at
            least two examples. With `report_data`, also whatever else `model.evaluate` takes as `x`: a dataset.
        delta: \(\delta\), drop of the accuracy that is tolerated, in (0, 1).
        epsilon: \(\epsilon\), norm below which a group is eliminated, >= 0. Norms grow with the number of output maps.
        lambda_: \(\lambda\), strength of the penalty, >= 0.
        quantile: Share of the groups left that one move of \(\theta\) brings in or out, in (0, 1].
        patience: Number of epochs without an elimination after which training stops.
        monitor: Name of the compiled metric that stands for the accuracy: a fraction, higher is better.
        report_data: Further held-out data, which report. `None`: half of `validation_data` does.
        granularity: What is eliminated together: a name or a `Granularity`.
        include: Which layers: name, path in a nested model, regular expression, layer class, or a list of these.
            `None`: the sparse convolutions; in a model without sparse layers, all convolutions.
        exclude: The same, for layers to leave alone; wins over `include`.
        batch_size: Batch size when the accuracy is measured.
        path: JSON file for the history, written whole after each epoch; `None` keeps it in memory.
        seed: Non-negative integer, of the random halves.

    Attributes:
        regularizer: The `ks.regularizers.TruncatedGroupLasso` that holds \(\lambda\) and \(\theta\).
        history: List of dicts, the first one of the network at the start, then one an epoch: `epoch` (how many are
            done), `step` of the optimizer, `sparsity` of all kernels together, `layers` (`{path: sparsity}`), `drop` on
            the half that steers and `test_drop` on the other, `max_drop` (\(\delta\)), `accuracy` and `test_accuracy`,
            `theta` for the next epoch and its `percentile`, the percentage of the groups left with norms below it,
            `died`, the number of groups eliminated, and `stalled`, for how many epochs there was none.
        stopped: Why the callback ended the training, or `None`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `delta` or `quantile` is out of range, `epsilon` or `lambda_` negative, `validation_data` empty,
            `monitor` no metric of the model, or a resumed run finds no history of its earlier part.
    """

    def __init__(
        self,
        validation_data,
        delta,
        epsilon,
        lambda_,
        quantile=0.05,
        patience=10,
        monitor="accuracy",
        report_data=None,
        granularity="group",
        include=None,
        exclude=None,
        batch_size=256,
        path=None,
        seed=0,
    ):
        self.granularity = granularities.get(granularity)
        super().__init__(regularizers.TruncatedGroupLasso(lambda_, 0.0, self.granularity), include, exclude)
        self.delta = validation.fraction("delta", delta, low_open=True, high_open=True)
        self.epsilon = validation.number("epsilon", epsilon, at_least=0)
        self.quantile = validation.fraction("quantile", quantile, low_open=True)
        self.patience = validation.integer("patience", patience, at_least=1)
        self.monitor = monitor
        self.batch_size = validation.integer("batch_size", batch_size, at_least=1)
        self.path = None if path is None else os.fspath(path)
        self.seed = validation.integer("seed", seed, at_least=0)
        self._steering, self._reporting = _held_out(validation_data, report_data, self.seed)
        self.history = []
        self.stopped = None
        self._good_weights = None
        self._first_epoch = 0
        self._step_before = None
        self._epochs_before = 0  # of an earlier `fit` with this callback, whose epochs were counted from 0 as well

    # Keras calls these.

    def set_model(self, model):
        super().set_model(model)
        self._step_before = self._step()

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        for weight in self._weights:
            weight.release()

    def on_epoch_begin(self, epoch, logs=None):
        # Here, not in on_train_begin: `BackupAndRestore` has restored weights and steps by now.
        if not self._attached:
            self._first_epoch = epoch
            self._attach()

    def on_train_batch_end(self, batch, logs=None):
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for weight in self._weights:
            weight.after_batch(optimizer)

    def on_epoch_end(self, epoch, logs=None):
        self.update(epoch)
        if logs is not None:
            record = self.history[-1]
            logs.update({"sparsity": record["sparsity"], "theta": record["theta"], "drop": record["drop"]})

    # Training loops of one's own call these.

    def start(self, model, epoch=0):
        """Take hold of a model and measure it; call it before the train step is traced.

        Args:
            model: A built Keras model, compiled with the metric `monitor`.
            epoch: Number of epochs done so far; other than 0 in a resumed run.
        """
        self.set_model(model)
        self._first_epoch = validation.integer("epoch", epoch, at_least=0)
        if epoch:
            self._step_before = None  # whoever says so must have the history
        self._attach()

    def update(self, epoch):
        """Eliminate groups, measure the drop and move theta; call it after each epoch.

        Args:
            epoch: Number of the epoch that has ended, from 0 on.

        Returns:
            Whether training is to stop; `stopped` says why.
        """
        if not self._attached:
            raise RuntimeError("Call `start(model)` before `update(epoch)`.")
        epochs = epoch + 1 + self._epochs_before
        norms, kept = self._survivors()
        broken = self._broken(norms, kept)
        if broken is not None:
            self.model.set_weights(self._good_weights)
            self.history.append({**self.history[-1], "epoch": epochs, "step": self._step(), "died": 0})
            return self._stop(broken)
        died = self._eliminate(kept)
        self._record(epochs, died, norms, kept)
        self._good_weights = self.model.get_weights()
        if self.history[-1]["stalled"] >= self.patience:
            return self._stop(f"No group has died for {self.patience} epochs.")
        self._write()
        return False

    def finish(self):
        """Take the callback off the model; eliminated groups stay zero. `fit` calls it by itself."""
        if self._attached:
            for weight in self._weights:
                weight.detach()
        super().finish()
        self._good_weights = None

    # The work.

    def _take(self, model):
        include = self.include
        if include is None:
            layers = selection.flatten_layers(model)
            include = [path for path, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
            include = [path for path in include if isinstance(layers[path], BaseSparse)] or include
            if not include:
                validation.fail("model", "hold a convolution; name other layers by `include`", model.name)
        weights = masked_weights(model, self.granularity, include, self.exclude)
        for weight in weights:
            if isinstance(getattr(weight.layer, "kernel_regularizer", None), regularizers.TruncatedGroupLasso):
                rule = f"hold no TruncatedGroupLasso of its own in layer '{weight.name}': the callback adds one"
                validation.fail("model", rule, model.name)
        return weights

    def _attach(self):
        for weight in self._weights:
            weight.attach(self.model)
        super()._attach()
        self._begin(self._first_epoch)

    def _begin(self, epoch):
        """Find where an earlier part of this run has ended, or measure the network this run starts from."""
        self.stopped = None
        step = self._step()
        self._epochs_before = 0
        self._good_weights = self.model.get_weights()
        records = self._earlier(step, epoch)
        if records:
            self.history[:] = records
            self._move_theta_to(records[-1]["theta"])
            # Weights may have been saved in the end of an epoch, before this callback's turn. Where it was over,
            # nothing is left below epsilon.
            if records[-1]["step"] == step:
                self._epochs_before = records[-1]["epoch"] - epoch
                self._eliminate(self._survivors()[1])
                self._good_weights = self.model.get_weights()
            elif records[-1]["epoch"] == epoch - 1:
                self.update(epoch - 1)
            return
        if step != self._step_before:
            rule = (
                f"name the file with the history of the run that is resumed at step {step}: it is measured by its start"
            )
            self.finish()
            validation.fail("path", rule, self.path)
        norms, kept = self._survivors(epsilon=0.0)
        for weight, keep in zip(self._weights, kept):
            if not keep.any():
                self.finish()
                rule = f"have a group left in layer '{weight.name}'; name the layers to sparsify by `include`"
                validation.fail("model", rule, self.model.name)
        self.history.clear()
        self._record(epoch, 0, norms, kept)
        self._write()

    def _earlier(self, step, epoch):
        """Return the records of the run that the model has gone through up to now; empty for a new run."""
        records = self.history
        if self.path is not None and os.path.exists(self.path) and not records:
            with open(self.path, encoding="utf-8") as file:
                records = json.load(file)["history"]
        records = [record for record in records if record["step"] <= step]
        if len(records) > 1 and records[-1]["step"] < step:
            # Saved within an epoch, or in its end before this callback's turn. Else it is the file of another run.
            records = records if records[-1]["epoch"] in (epoch, epoch - 1) else []
        elif len(records) == 1 and records[0]["step"] == step:
            records = []  # nothing but the start: measured again, as it costs nothing but that
        layers = [weight.name for weight in self._weights]
        return records if records and list(records[-1]["layers"]) == layers else []

    def _survivors(self, epsilon=None):
        """Return the norms of all groups, and which are alive with a norm not below epsilon, by weight."""
        epsilon = self.epsilon if epsilon is None else epsilon
        norms = [_NORM.scores(weight.kernel(), weight.granularity) for weight in self._weights]
        return norms, [(weight.mask() != 0) & (norm >= epsilon) for weight, norm in zip(self._weights, norms)]

    def _eliminate(self, kept):
        """Assign the masks and return how many groups that has cost."""
        died = 0
        for weight, keep in zip(self._weights, kept):
            lost = int(np.count_nonzero(weight.mask())) - int(np.count_nonzero(keep))
            if lost:
                weight.assign(keep.astype("float32"))
            died += lost
        return died

    def _record(self, epochs, died, norms, kept):
        """Measure, move theta, and note both."""
        accuracy, test_accuracy = (self._accuracy(data) for data in (self._steering, self._reporting))
        start = self.history[0] if self.history else {"accuracy": accuracy, "test_accuracy": test_accuracy}
        drop = start["accuracy"] - accuracy
        norms = np.sort(np.concatenate([norm[keep] for norm, keep in zip(norms, kept)]))
        inside = int(np.searchsorted(norms, self._theta(), side="left")) if self.history else 0
        move = max(1, round(self.quantile * norms.size))
        inside = min(inside + move, norms.size) if drop < self.delta else max(inside - move, 0)
        self._move_theta_to(_between(norms, inside))
        stalled = 0 if died or not self.history else self.history[-1]["stalled"] + 1
        pruned, sizes = ([f(weight) for weight in self._weights] for f in (lambda w: w.pruned(), lambda w: w.size))
        self.history.append(
            {
                "epoch": epochs,
                "step": self._step(),
                "sparsity": sum(pruned) / sum(sizes),
                "layers": {weight.name: p / size for weight, p, size in zip(self._weights, pruned, sizes)},
                "drop": drop,
                "test_drop": start["test_accuracy"] - test_accuracy,
                "max_drop": self.delta,
                "accuracy": accuracy,
                "test_accuracy": test_accuracy,
                "theta": self._theta(),
                "percentile": 100.0 * inside / norms.size,
                "died": died,
                "stalled": stalled,
            }
        )

    def _accuracy(self, data):
        """Return the monitored metric; `data` are the arguments of `model.evaluate`."""
        results = self.model.evaluate(**data, verbose=0, return_dict=True, **self._batching(data))
        self.model.reset_metrics()  # those of an epoch that begins start at nothing
        if self.monitor not in results:
            self.finish()
            rule = f"be a metric the model was compiled with; these are {', '.join(map(repr, results))}"
            validation.fail("monitor", rule, self.monitor)
        return float(results[self.monitor])

    def _batching(self, data):
        return {"batch_size": self.batch_size} if "y" in data else {}

    def _broken(self, norms, kept):
        """Return why the network cannot go on as it is, or `None`."""
        for weight, norm, keep in zip(self._weights, norms, kept):
            if not np.isfinite(norm).all():
                return f"Training has diverged: the kernel of '{weight.name}' holds NaN or infinity."
            if not keep.any():
                return f"No group would be left in the kernel of '{weight.name}': all norms are below epsilon."
        return None

    def _stop(self, reason):
        self.stopped = reason
        self.model.stop_training = True
        self._write()
        if not reason.startswith("No group has died"):
            warnings.warn(f"{reason} The model has the weights of the last good epoch again.", stacklevel=3)
        return True

    def _theta(self):
        return float(keras.ops.convert_to_numpy(self.regularizer.theta))

    def _move_theta_to(self, theta):
        self.regularizer.theta.assign(theta)
        if keras.backend.backend() == "jax":
            self._retrace()  # a compiled step under JAX holds the value, not the variable

    def _step(self):
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            raise RuntimeError("The model has no metric to measure: compile it before it is sparsified.")
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _write(self):
        if self.path is None:
            return
        settings = {name: getattr(self, name) for name in ("delta", "epsilon", "quantile", "patience", "seed")}
        settings["lambda_"] = self.regularizer.get_config()["lambda_"]
        files.write_json(self.path, {**settings, "stopped": self.stopped, "history": self.history})


def _between(norms, inside):
    """Return a theta with exactly so many of the sorted norms below it, as far as ties allow."""
    if inside == 0:
        return 0.0
    if inside == norms.size:
        return float(norms[-1]) * 1.001 + np.finfo("float32").tiny
    return float(norms[inside - 1] + norms[inside]) / 2


def _held_out(validation_data, report_data, seed):
    """Return the arguments of `model.evaluate` for the data that steer and for those that report."""
    if report_data is not None:
        return _as_arguments("validation_data", validation_data), _as_arguments("report_data", report_data)
    if not isinstance(validation_data, (tuple, list)) or not 2 <= len(validation_data) <= 3:
        rule = "be (x, y) or (x, y, sample_weight) of arrays, which are split in two, unless `report_data` is given"
        validation.fail("validation_data", rule, type(validation_data).__name__, TypeError)
    arguments = _as_arguments("validation_data", validation_data)
    examples = _examples("validation_data", arguments)
    if examples < 2:
        validation.fail("validation_data", "hold at least two examples, one for each half", f"{examples} examples")
    order = np.random.default_rng(seed).permutation(examples)
    halves = np.sort(order[: math.ceil(examples / 2)]), np.sort(order[math.ceil(examples / 2) :])

    def half(part, rows):
        return keras.tree.map_structure(lambda array: np.asarray(array)[rows], part)

    return tuple({name: half(part, rows) for name, part in arguments.items()} for rows in halves)


def _as_arguments(name, data):
    if data is None:
        validation.fail(name, "be held-out data", data, TypeError)
    if isinstance(data, (tuple, list)) and 2 <= len(data) <= 3:
        arguments = {name: part for name, part in zip(("x", "y", "sample_weight"), data) if part is not None}
        if _examples(name, arguments) == 0:
            validation.fail(name, "hold at least one example", "0 examples")
        return arguments
    with contextlib.suppress(TypeError):  # a dataset of unknown length
        if len(data) == 0:
            validation.fail(name, "hold at least one batch", "0 batches")
    return {"x": data}


def _examples(name, arguments):
    arrays = keras.tree.flatten(arguments)
    if not all(np.ndim(array) for array in arrays):
        validation.fail(name, "hold arrays, or dicts or lists of arrays", "numbers", TypeError)
    sizes = {len(array) for array in arrays} or {0}
    if len(sizes) != 1:
        validation.fail(name, "hold arrays of as many examples each", f"arrays of {sorted(sizes)}")
    return sizes.pop()
