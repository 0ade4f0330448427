"""What a criterion is: one method, from a kernel to scores."""

import keras

__all__ = ["Criterion"]


class Criterion:
    """Rates the units of a kernel; those with the highest scores are kept.

    A new criterion overrides `scores` alone, as a rule (and `get_config` when it has arguments), is exported from
    `keras_sparse.criteria` and gets a line in the table of `tests/criteria/criteria_test.py`.
    """

    def scores(self, kernel, granularity, name=""):
        """Return the scores of a kernel's units.

        Args:
            kernel: NumPy array, the effective kernel: zero where pruned.
            granularity: The `Granularity` whose units are rated.
            name: Path of the weight in its model; criteria that draw at random use it to tell weights apart.

        Returns:
            NumPy array of shape `granularity.units_shape(kernel.shape)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `scores(kernel, granularity, name)`.")

    def check(self, model, weights):
        """Raise before training where the criterion cannot rate the weights.

        Args:
            model: The model that will be pruned.
            weights: Its `MaskedWeight`s: `name`, `granularity`, `kernel()`.
        """

    def prepare(self, model, weights, update):
        """Called before each update, for criteria that look at more than kernels.

        Args:
            model: The model.
            weights: As in `check`.
            update: Number of updates before this one.
        """

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def register(cls):
    """Register a criterion for Keras serialisation under the package's name."""
    return keras.saving.register_keras_serializable(package="keras_sparse")(cls)
