"""Sparsity in TensorBoard."""

import os

import keras
import numpy as np

from keras_sparse import validation
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.callbacks.observing import synchronise
from keras_sparse.report.tensorboard import EventFile, mask_image

__all__ = ["SparsityTensorBoard"]


class SparsityTensorBoard(keras.callbacks.Callback):
    """Writes the sparsity of each layer, its threshold and a picture of its mask for TensorBoard.

    Every `update_freq` optimizer steps and when training ends, or at the end of each epoch, under the number of the
    optimizer step:

    - `sparsity`: the share of zeros among all weights that are pruned; `sparsity/<layer>`, of one layer
    - `threshold/<layer>`: the magnitude below which weights are gone: that of the smallest unit kept, the mean of its
      weights' magnitudes
    - `mask/<layer>`: a picture, white where weights are kept, of input channels down and output channels to the right

    Losses and metrics are the business of `keras.callbacks.TensorBoard`; with the same `log_dir`, both stand side by
    side there. Put this callback behind the one that prunes. In plain Keras layers the zeros are the masks.

    TensorFlow must be installed, on any backend.

    ```python
    model.fit(x, y, callbacks=[pruning, ks.callbacks.SparsityTensorBoard("logs", update_freq=100)])
    ```

    Args:
        log_dir: Folder that TensorBoard looks at; the files go into `sparsity` in it.
        update_freq: `"epoch"`, `"batch"`, or a number of optimizer steps.
        write_masks: Keyword only. Whether masks are drawn.
        include: Keyword only. Which layers, as in `GradualPruning`.
        exclude: Keyword only. The same, for layers to leave out.

    Raises:
        ValueError, TypeError: If `update_freq` is none of these, or a pattern matches no layer.
        ImportError: When training begins, if TensorFlow is missing.
    """

    def __init__(self, log_dir="logs", update_freq="epoch", *, write_masks=True, include=None, exclude=None):
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        if isinstance(update_freq, str):
            update_freq = 1 if validation.one_of("update_freq", update_freq, ("epoch", "batch")) == "batch" else "epoch"
        else:
            update_freq = validation.integer("update_freq", update_freq, at_least=1)
        self.update_freq = update_freq
        self.write_masks = bool(write_masks)
        self.include = include
        self.exclude = exclude
        self._file = None
        self._weights = None
        self._written = None  # the step last written

    def on_train_begin(self, logs=None):
        self._weights = masked_weights(self.model, None, self.include, self.exclude)
        self._file = EventFile(os.path.join(self.log_dir, "sparsity"))
        self._written = self._step()

    def on_train_batch_end(self, batch, logs=None):
        if self.update_freq == "epoch":
            return
        step = self._step()
        # With `steps_per_execution` a multiple may lie in between.
        if step // self.update_freq > self._written // self.update_freq:
            self._write(step)

    def on_epoch_end(self, epoch, logs=None):
        if self.update_freq == "epoch":
            self._write(self._step())

    def on_train_end(self, logs=None):
        if self._step() != self._written:
            self._write(self._step())
        self._file.close()
        self._file = self._weights = None

    def _step(self):
        synchronise(self.model)
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _write(self, step):
        scalars, images, pruned = {}, {}, 0
        for weight in self._weights:
            mask = weight.kept()
            zeros = weight.size - weight.count(mask)
            pruned += zeros
            scalars[f"sparsity/{weight.name}"] = zeros / weight.size
            magnitudes = weight.granularity.reduce(np.abs(weight.kernel()), np.mean)[mask != 0]
            scalars[f"threshold/{weight.name}"] = magnitudes.min() if magnitudes.size else 0.0
            if self.write_masks:
                images[f"mask/{weight.name}"] = mask_image(mask)
        scalars["sparsity"] = pruned / sum(weight.size for weight in self._weights)
        self._file.write(step, scalars, images)
        self._written = step
