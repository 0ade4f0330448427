"""Keras's ModelCheckpoint and EarlyStopping for models that get sparse while they train."""

import warnings

import keras

from keras_sparse import validation
from keras_sparse.callbacks.observing import observed_sparsity

__all__ = ["SparsityEarlyStopping", "SparsityModelCheckpoint"]


class _TargetSparsity:
    """Knows whether the model is as sparse as it is to be; mixed in before a Keras callback.

    A pruned model's accuracy falls while its sparsity rises. The best epoch of all is one in which the model was not
    sparse yet, and patience ends while the schedule still goes on.
    """

    def __init__(self, *args, target_sparsity, tolerance, include, exclude, **kwargs):
        super().__init__(*args, **kwargs)
        self.target_sparsity = validation.sparsity_value("target_sparsity", target_sparsity)
        self.tolerance = validation.fraction("tolerance", tolerance)
        self.include = include
        self.exclude = exclude
        self._sparsity = 0.0
        self._reached_once = False

    def on_train_begin(self, logs=None):
        self._reached_once = False
        super().on_train_begin(logs)

    def _reached(self, logs):
        """Return whether the target is reached, and remember the sparsity."""
        self._sparsity = observed_sparsity(self.model, logs, self.include, self.exclude)
        reached = self._sparsity >= self.target_sparsity - self.tolerance
        self._reached_once |= reached
        return reached

    def _warn_unreached(self, consequence):
        if not self._reached_once:
            warnings.warn(
                f"The model's sparsity, {self._sparsity:.4f} in the end, never reached `target_sparsity`, "
                f"{self.target_sparsity}: {consequence}.",
                stacklevel=3,
            )


class SparsityModelCheckpoint(_TargetSparsity, keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` whose best model is among those that are sparse enough.

    With `save_best_only=True`, no epoch counts before the model's sparsity has reached `target_sparsity`: nothing is
    saved, and the first epoch from there on is the best so far. Everything else is as in Keras.

    The sparsity is what the pruning callback logs, which must stand before this one; without it, what the model's masks
    say, and the zeros of plain layers.

    ```python
    pruning = ks.callbacks.GradualPruning(ks.schedules.PolynomialDecay(0.0, 0.9, 0, 2000))
    best = ks.callbacks.SparsityModelCheckpoint("best.keras", save_best_only=True, target_sparsity=0.9)
    model.fit(x, y, validation_data=(x_val, y_val), epochs=10, callbacks=[pruning, best])
    ```

    Args:
        filepath: Path of the file, with `{epoch}` and the names of logs where wanted.
        monitor: The log to compare by.
        verbose: 0, or 1 to print what is done.
        save_best_only: Whether only models better than all before are saved.
        save_weights_only: Whether weights alone are saved.
        mode: `"auto"`, `"min"` or `"max"`.
        save_freq: `"epoch"`, or a number of batches; with `save_best_only`, they count from the target on.
        initial_value_threshold: Value of `monitor` that the first saved model must better.
        target_sparsity: Keyword only. Sparsity in [0, 1) from which on models count.
        tolerance: Keyword only. How far below it the sparsity may be, since pruning goes by whole units.
        include: Keyword only. Layers whose sparsity counts, as in `GradualPruning`; `None` takes what is logged.
        exclude: Keyword only. The same, for layers that do not count.

    Raises:
        ValueError: If `target_sparsity` or `tolerance` is outside its range, or Keras refuses another argument.
    """

    def __init__(
        self,
        filepath,
        monitor="val_loss",
        verbose=0,
        save_best_only=False,
        save_weights_only=False,
        mode="auto",
        save_freq="epoch",
        initial_value_threshold=None,
        *,
        target_sparsity,
        tolerance=0.005,
        include=None,
        exclude=None,
    ):
        super().__init__(
            filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
            target_sparsity=target_sparsity,
            tolerance=tolerance,
            include=include,
            exclude=exclude,
        )

    def on_train_batch_end(self, batch, logs=None):
        if self.save_freq == "epoch" or not self.save_best_only or self._reached(logs):
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if not self.save_best_only or self._reached(logs):
            super().on_epoch_end(epoch, logs)
        elif self.verbose > 0:
            print(f"\nEpoch {epoch + 1}: sparsity {self._sparsity:.4f} is below {self.target_sparsity}, nothing saved")

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self.save_best_only:
            self._warn_unreached("nothing was saved")


class SparsityEarlyStopping(_TargetSparsity, keras.callbacks.EarlyStopping):
    """`keras.callbacks.EarlyStopping` that waits until the model is sparse enough.

    No epoch counts before the model's sparsity has reached `target_sparsity`: neither for patience nor as the best,
    whose weights `restore_best_weights=True` brings back. Everything else is as in Keras.

    The sparsity is what the pruning callback logs, which must stand before this one; without it, what the model's masks
    say, and the zeros of plain layers.

    Args:
        monitor: The log to compare by.
        min_delta: Smallest change that counts as an improvement.
        patience: Number of epochs without one after which training stops.
        verbose: 0, or 1 to print what is done.
        mode: `"auto"`, `"min"` or `"max"`.
        baseline: Value of `monitor` to improve on.
        restore_best_weights: Whether the weights of the best epoch are brought back in the end.
        start_from_epoch: Number of epochs that do not count, in any case.
        target_sparsity: Keyword only. Sparsity in [0, 1) from which on epochs count.
        tolerance: Keyword only. How far below it the sparsity may be, since pruning goes by whole units.
        include: Keyword only. Layers whose sparsity counts, as in `GradualPruning`; `None` takes what is logged.
        exclude: Keyword only. The same, for layers that do not count.

    Raises:
        ValueError: If `target_sparsity` or `tolerance` is outside its range.
    """

    def __init__(
        self,
        monitor="val_loss",
        min_delta=0,
        patience=0,
        verbose=0,
        mode="auto",
        baseline=None,
        restore_best_weights=False,
        start_from_epoch=0,
        *,
        target_sparsity,
        tolerance=0.005,
        include=None,
        exclude=None,
    ):
        super().__init__(
            monitor=monitor,
            min_delta=min_delta,
            patience=patience,
            verbose=verbose,
            mode=mode,
            baseline=baseline,
            restore_best_weights=restore_best_weights,
            start_from_epoch=start_from_epoch,
            target_sparsity=target_sparsity,
            tolerance=tolerance,
            include=include,
            exclude=exclude,
        )

    def on_epoch_end(self, epoch, logs=None):
        if self._reached(logs):
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._warn_unreached("no epoch counted, and training ran to its end")
