"""Saliency: what the loss would lose with a unit, to first order."""

import numpy as np

from keras_sparse import gradients
from keras_sparse.criteria.base import Criterion, register

__all__ = ["Saliency"]


@register
class Saliency(Criterion):
    r"""Scores a unit by the change of the loss that a first-order expansion expects of its removal.

    For a unit \(u\) with the weights \(w_i\), over \(B\) batches:

    $$\frac{1}{B}\sum_{b=1}^{B} \Big| \sum_{i \in u} w_i\,\frac{\partial L_b}{\partial w_i} \Big|$$

    At granularity `weight` that is \(|w\,\partial L / \partial w|\) (Mozer & Smolensky, 1989; of whole feature maps,
    Molchanov et al., 2017). As each batch loses its sign, a converged network, whose mean gradient vanishes, is rated
    too.

    Every update of the masks costs one forward and one backward pass for each batch, as in training, and the memory of
    one gradient for each weight that is pruned. Between updates nothing is computed or kept.

    ```python
    criterion = ks.criteria.Saliency((x_train, y_train), batches=4)
    model.fit(x_train, y_train, callbacks=[ks.callbacks.GradualPruning(schedule, criterion=criterion)])
    ```

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays; a dataset of batches that can be iterated again; or a
            function that returns either. Arrays are gone through from one update to the next.
        loss: Loss, its name, or a function of `(y_true, y_pred)`; `None` takes that of the compiled model.
        batch_size: Examples of a batch, where `data` are arrays.
        batches: \(B\), batches for each update.

    Raises:
        TypeError: If `data` holds no batches, or can be used but once.
        ValueError: If a number is below 1, or `loss` is `None` and the model not compiled.
    """

    def __init__(self, data, loss=None, batch_size=32, batches=1):
        self.data = data
        self.loss = loss
        self._batches = gradients.Batches(data, batch_size, batches)
        self._scores = {}

    def check(self, model, weights):
        gradients.check_loss(model, self.loss)

    def prepare(self, model, weights, update):
        total = dict.fromkeys((weight.name for weight in weights), 0.0)
        kernels = {weight.name: np.asarray(weight.kernel(), "float64") for weight in weights}
        taken = 0
        for batch in self._batches.take(update):
            taken += 1
            for weight, gradient in zip(weights, gradients.loss_gradients(model, weights, batch, self.loss)):
                change = weight.granularity.reduce(kernels[weight.name] * gradient, np.sum)
                total[weight.name] = total[weight.name] + np.abs(change)
        self._scores = {name: scores / taken for name, scores in total.items()}

    def scores(self, kernel, granularity, name=""):
        if name not in self._scores:
            raise RuntimeError(
                f"Saliency knows no gradient of '{name}': it is for `GradualPruning` and `ks.prune`, which call "
                "`prepare(model, weights, update)` first."
            )
        return self._scores[name]

    def get_config(self):
        sizes = {"batch_size": self._batches.batch_size, "batches": self._batches.count}
        return {"data": self.data, "loss": self.loss, **sizes}

    def __repr__(self):
        return f"Saliency(loss={self.loss!r}, batch_size={self._batches.batch_size}, batches={self._batches.count})"
