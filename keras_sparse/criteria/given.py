"""Given scores: a user's own arrays or function."""

import numpy as np

from keras_sparse import validation
from keras_sparse.criteria.base import Criterion, register

__all__ = ["Given"]


@register
class Given(Criterion):
    """Scores that a user gives. `criterion=` also takes the dict or the function itself.

    ```python
    ks.prune(model, 0.5, criterion={"conv1": scores1, "lstm/lstm_cell/kernel": scores2})
    ks.prune(model, 0.5, criterion=lambda kernel, name: np.abs(kernel - np.median(kernel)))
    ```

    Args:
        scores: `{name: array}`, one for each weight that is pruned, by the names in `GradualPruning.history`; or a
            function of the kernel, a NumPy array that is zero where pruned, and the name. Arrays have the shape of the
            kernel, and are summed over units, or the shape of the granularity's units. The highest are kept.

    Raises:
        TypeError: If `scores` is neither a dict nor callable.
        ValueError: Before training, if a weight has no scores or they do not fit its shape.
    """

    def __init__(self, scores):
        if not (isinstance(scores, dict) or callable(scores)):
            validation.fail("scores", "be a dict of arrays or a function of (kernel, name)", scores, TypeError)
        self.given = scores

    def check(self, model, weights):
        for weight in weights:
            self.scores(weight.kernel(), weight.granularity, weight.name)
        names = {weight.name for weight in weights}
        unknown = [name for name in self.given if name not in names] if isinstance(self.given, dict) else []
        if unknown:
            validation.fail("scores", f"be for weights that are pruned; these are {_listed(names)}", unknown[0])

    def scores(self, kernel, granularity, name=""):
        if callable(self.given):
            scores = self.given(kernel, name)
        elif name in self.given:
            scores = self.given[name]
        else:
            validation.fail("scores", f"hold an array for '{name}'", _listed(self.given))
        scores, units = np.asarray(scores), granularity.units_shape(kernel.shape)
        if scores.shape == units:
            return scores
        if scores.shape != kernel.shape:
            rule = f"have the shape of '{name}', {kernel.shape}, or of its units, {units}"
            validation.fail("scores", rule, scores.shape)
        return granularity.reduce(scores, np.sum)

    def get_config(self):
        return {"scores": self.given}

    def __repr__(self):
        given = _listed(self.given) if isinstance(self.given, dict) else repr(self.given)
        return f"Given({given})"


def _listed(names):
    return ", ".join(map(repr, sorted(names)))
