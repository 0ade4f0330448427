"""Training that begins with few connections and adds more as it goes on."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_sparse import initializers, schedules, selection, validation
from keras_sparse.callbacks import optimizer_state
from keras_sparse.callbacks.masked_weights import LayerMask
from keras_sparse.callbacks.scheduled_masks import ScheduledMasks, inner_optimizer
from keras_sparse.surgery import RandomTables

__all__ = ["IncrementalTraining"]


class IncrementalTraining(ScheduledMasks):
    r"""Trains a model from a small share of its connections, and doubles them until all are there.

    $$d_t = \min\left(d_f, d_i\,2^{\lfloor t / T \rfloor}\right)$$

    with \(d_i\) = `initial_density`, \(d_f\) = `final_density` and \(T\) = `doubling_steps` (Changpinyo et al., 2017,
    sections 3.2.1 and 5.3). Which connections there are at a density is drawn at random, as `ks.random_tables` does:
    tables are nested, and every connection lies on a path from the input to the prediction at any time. A layer that
    needs more connections for that than its share has the fewest that do it. While tables are sparse, a `SparseConv2D`
    trains through the compiled ops where these are faster: early steps take a fraction of the time of dense ones.

    **Weights.** The connections of the first table keep the values the model has. They are multiplied by
    \(\sqrt{n / n_{ij}}\), where \(n\) is the fan of the layer's `kernel_initializer` in the dense kernel and
    \(n_{ij}\) the one that is left: in mode `"fan_in"` (He, LeCun) the weights into output channel \(j\), in mode
    `"fan_out"` those out of input channel \(i\), in mode `"fan_avg"` (Glorot) the mean of both. Their variance is then
    \(s / n_{ij}\), as if they had been drawn for the table. An initializer without a fan leaves them as they are. A
    connection that comes later starts as `initializer` says.

    **Optimizer.** What the optimizer remembers of a new connection (momenta, accumulators) is what it remembers of an
    untrained weight; an exponential average of the weights starts at the new value. Adam's variances start from zero
    as well, which makes its first steps on new connections up to seven times as long as the learning rate: with Adam,
    `initializer="zeros"` disturbs less.

    Steps are optimizer steps (`optimizer.iterations`), whatever `steps_per_execution` is. The update of step \(t\)
    takes place after \(t\) updates of the weights. Nothing but the model and its optimizer holds state: a run resumed
    by `keras.callbacks.BackupAndRestore` goes on as the uninterrupted one would.

    `fit` logs `density`, the share of kept weights in the kernels of these layers, for the progress bar, `History`, and
    `TensorBoard` or `CSVLogger` callbacks that stand after this one.

    ```python
    model = ks.sparsify(model, granularity="connection", exclude=["conv1", "logits"])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    growing = ks.callbacks.IncrementalTraining(initial_density=0.01, doubling_steps=500)
    model.fit(x, y, epochs=20, callbacks=[growing])
    ```

    In a training loop of your own:

    ```python
    growing.start(model, optimizer=optimizer)
    for step, batch in enumerate(data, start=1):
        train_step(batch)
        growing.update(step)
    growing.finish()
    ```

    Args:
        initial_density: \(d_i\), share of the connections in (0, 1] to begin with; the paper takes 0.01 and 0.001.
        doubling_steps: \(T\), optimizer steps between two doublings.
        final_density: \(d_f\), share in [`initial_density`, 1] to end with.
        initializer: Values of new connections: `"zeros"` (the network computes what it did before), `"layer"` (the
            layer's own `kernel_initializer`), or a Keras initializer, its values multiplied by \(\sqrt{n / n_{ij}}\)
            under the new table where its variance depends on a fan.
        fan_in: `None` for tables that are uniform over all connections of a layer, `"constant"` for the same number
            of connections into each of its output channels.
        include: Which layers: name, path in a nested model, regular expression, layer class, or a list of these. By
            default all `SparseConv2D` of granularity `"connection"`; a `SparseDense` of it grows where it is named.
        exclude: The same, for layers to leave alone; wins over `include`.
        seed: Non-negative integer; draws the tables, those of `ks.random_tables` with this seed, and the new weights.

    Attributes:
        history: List of dicts, one an update: `step`, `density` and `layers`, `{path: density}`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a density is outside (0, 1], `final_density` is below `initial_density`, `doubling_steps` is
            below 1, a pattern matches no layer, the model is subclassed, is not built or holds no `SparseConv2D` of
            connections, its masks are neither ones nor tables of this seed, or, before the first batch, when `fit`
            will end before the density is `final_density`.
    """

    def __init__(
        self,
        initial_density,
        doubling_steps,
        final_density=1.0,
        initializer="zeros",
        fan_in=None,
        include=None,
        exclude=None,
        seed=0,
    ):
        doubling_steps = validation.integer("doubling_steps", doubling_steps, at_least=1)
        super().__init__(schedules.Doubling(initial_density, final_density, frequency=doubling_steps), "density")
        self.initializer = _check_initializer(initializer)
        self.fan_in = fan_in
        self.include = include
        self.exclude = exclude
        self.seed = validation.integer("seed", seed, at_least=0)
        self._tables = None

    def start(self, model, step=0, optimizer=None):
        """Take hold of a model; call it before the train step is traced.

        Args:
            model: A built Keras model.
            step: Number of optimizer steps taken so far; other than 0 in a resumed run.
            optimizer: The Keras optimizer of the loop, which is to forget what it knows of new connections. Default:
                the one the model is compiled with.
        """
        self.set_model(model)
        if optimizer is not None:
            self._optimizer = inner_optimizer(optimizer)
        if self._optimizer is None:
            validation.fail("optimizer", "be the optimizer of the loop, where the model is not compiled", optimizer)
        self._attach()
        return self.update(step)

    def _take(self, model):
        self._tables = RandomTables(model, self.fan_in, self.include, self.exclude, self.seed)
        # By place, as the tables are drawn, not by name: Keras numbers the names of layers anew in every model.
        self._places = {path: place for place, path in enumerate(selection.flatten_layers(model))}
        kernels = {weight.name: weight for weight in selection.prunable_weights(model)}
        return [LayerMask(kernels[path]) for path in self._tables.levels]

    def _fail_unreachable(self, situation):
        rule = (
            "let the density reach `final_density` within the steps of `fit`: it is "
            f"{self.schedule.final_density} from optimizer step {self.schedule.final_step} on, but {situation}"
        )
        validation.fail("doubling_steps", rule, self.schedule.frequency)

    def _apply(self, step):
        density = 1.0 - self.schedule(step)
        tables = self._tables.masks(density)
        thinned = False
        for weight in self._weights:
            before, table = weight.mask() != 0, tables[weight.name] != 0
            new, lost = table & ~before, before & ~table
            if before.all() and lost.any():
                self._thin(weight, table)
                thinned = True
            elif new.any() and lost.any():
                rule = (
                    f"be the one that drew the model's masks, unless these are ones; layer '{weight.name}' has "
                    f"connections that it does not draw for a density of {density:g}"
                )
                validation.fail("seed", rule, self.seed)
            elif new.any():  # where it is denser already it stays so
                self._grow(weight, table, new)
        raised = self._tables.raised(density) if thinned else {}
        if raised:
            most = max(raised, key=raised.get)
            warnings.warn(
                f"density={density:.4g} is too low for {len(raised)} of {len(self._weights)} layers: to have a path "
                f"through every channel they hold more connections, the fewest that do it, up to {raised[most]:.4g} of "
                f"them in '{most}'. The density is {self._tables.density(density):.4g}.",
                stacklevel=2,
            )

    def _thin(self, weight, table):
        """Leave the connections of the first table, their weights scaled to the fan that is left."""
        scale = initializers.fan_scale(weight.layer.kernel_initializer, table, weight.variable.shape)
        weight.assign(table.astype("float32"))
        weight.fill(weight.kernel() * scale, table)

    def _grow(self, weight, table, new):
        weight.assign(table.astype("float32"))
        weight.fill(self._new_values(weight, table), new)
        optimizer_state.clear(self._optimizer, weight.variable, new)

    def _new_values(self, weight, table):
        """Return values for all connections of a weight; the same whenever they are asked for."""
        initializer = weight.layer.kernel_initializer if self.initializer == "layer" else self.initializer
        shape = tuple(weight.variable.shape)
        scale = initializers.fan_scale(initializer, table, shape)
        if isinstance(initializer, keras.initializers.Initializer):
            config = initializer.get_config()
            if "seed" in config:
                state = np.random.SeedSequence([self.seed, self._places[weight.name]]).generate_state(1)
                initializer = type(initializer).from_config({**config, "seed": int(state[0] >> 1)})
        return ops.convert_to_numpy(initializer(shape, dtype="float32")) * scale


def _check_initializer(identifier):
    if identifier == "layer":
        return identifier
    try:
        initializer = keras.initializers.get(identifier)
    except (TypeError, ValueError):
        initializer = None
    if initializer is None:
        validation.fail("initializer", "be 'zeros', 'layer' or a Keras initializer", identifier)
    return initializer
