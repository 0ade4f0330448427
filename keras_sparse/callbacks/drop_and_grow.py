"""Dynamic sparse training: the density stays, the connections move."""

import math
import zlib

import numpy as np

from keras_sparse import allocation as allocations
from keras_sparse import criteria, gradients, schedules, validation
from keras_sparse import granularity as granularities
from keras_sparse.callbacks import optimizer_state
from keras_sparse.callbacks.gradual_pruning import check_targets, match_targets
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.callbacks.scheduled_masks import ScheduledMasks, inner_optimizer

__all__ = ["SET", "DropAndGrow", "RigL"]


class DropAndGrow(ScheduledMasks):
    """Base of callbacks that train at a constant sparsity and exchange connections every so many steps.

    The network is sparse from `begin_step` on: masks are drawn at random, unless it is that sparse already. At each
    later update step every weight tensor loses a share of its units, those of the smallest magnitude, and as many
    others grow; these start at zero, and with slots of the optimizer (momentum, averages) as new ones.

    Within `fit` an update of step t takes place right before the next batch: a file written at step t holds the network
    as it was trained, and a run resumed from it makes the update then. An update that would follow the last batch falls
    away.

    A subclass defines `_drop_share(step)` and `_grow_scores(step)`.
    """

    def __init__(
        self,
        sparsity,
        begin_step,
        end_step,
        frequency,
        drop_fraction,
        granularity,
        allocation,
        seed,
        include,
        exclude,
        targets,
        weights,
    ):
        sparsity = validation.sparsity_value("sparsity", sparsity)
        if validation.integer("end_step", end_step) <= validation.integer("begin_step", begin_step):
            validation.fail("end_step", f"be greater than begin_step, {begin_step}", end_step)
        super().__init__(schedules.ConstantSparsity(sparsity, begin_step, end_step, frequency))
        self.drop_fraction = validation.fraction("drop_fraction", drop_fraction, low_open=True)
        self.granularity = None if granularity is None else granularities.get(granularity)
        self.allocation = allocations.get(allocation)
        if not self.allocation.by_shape:
            rule = "share the target by the shapes of the layers alone, as 'uniform', 'erdos_renyi' and 'erk' do"
            validation.fail("allocation", rule, allocation)
        self.seed = validation.integer("seed", seed, at_least=0)
        self.include = include
        self.exclude = exclude
        self.targets = check_targets(targets)
        self.weights = weights
        self._passed = -1  # updates up to this step have been made, by this run or the one it resumes

    def _drop_share(self, step):
        """Return the share of the kept units that go at update step `step`."""
        raise NotImplementedError(f"{type(self).__name__} must define `_drop_share(step)`.")

    def _grow_scores(self, step):
        """Return an array of scores for each weight, in the shape of its units; the highest grow."""
        raise NotImplementedError(f"{type(self).__name__} must define `_grow_scores(step)`.")

    @property
    def _final_step(self):
        return self.schedule.end_step

    def _fail_unreachable(self, situation):
        validation.fail("end_step", f"lie within the steps of `fit`: {situation}", self.schedule.end_step)

    # Keras calls these.

    def on_epoch_begin(self, epoch, logs=None):
        if not self._checked_steps:
            # What fell due in the last turn of an earlier run had its place before the batch that is next.
            self._passed = self._optimizer_step() - self.model.steps_per_execution
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        self.update(self._optimizer_step())

    def on_train_batch_end(self, batch, logs=None):
        self._optimizer_step()
        self._after_batch(logs)

    # Training loops of one's own call this.

    def start(self, model, step=0, optimizer=None):
        """Take hold of a model; call it before the train step is traced.

        Args:
            model: A built Keras model.
            step: Number of optimizer steps taken so far; other than 0 in a resumed run, whose updates up to this step
                have been made.
            optimizer: The optimizer of the loop, whose slots of new connections are set to zero; `None` takes that of
                the compiled model.
        """
        self.set_model(model)
        if optimizer is not None:
            self._optimizer = inner_optimizer(optimizer)
        if self._optimizer is None:
            validation.fail("optimizer", "be the optimizer of the loop, where the model is not compiled", optimizer)
        self._passed = validation.integer("step", step, at_least=0)
        self._attach()
        return self.update(step)

    # The work.

    def _take(self, model):
        weights = masked_weights(model, self.granularity, self.include, self.exclude, self.weights)
        own = match_targets(self.targets, weights)
        sparsity = self.schedule.final_sparsity
        for weight, target in zip(weights, own):
            if not weight.can_grow:
                rule = f"be None or that of layer '{weight.name}', for units to grow again"
                validation.fail("granularity", rule, weight.granularity.name)
            least, final = weight.granularity.least_sparsity, sparsity if target is None else target
            if final < least - 1e-9:
                rule = f"be at least {least:g} for '{weight.name}', of granularity '{weight.granularity.name}'"
                validation.fail("sparsity" if target is None else "targets", rule, final)
        rest = [weight for weight, target in zip(weights, own) if target is None]
        shared = iter(self.allocation.allocate(sparsity, [weight.candidate(weight.mask()) for weight in rest]))
        self._keep = [
            next(shared) if target is None else allocations.units_to_keep(weight.mask().size, target)
            for weight, target in zip(weights, own)
        ]
        return weights

    def _apply(self, step):
        before = [weight.mask() for weight in self._weights]
        moves = step > self._passed and step > self.schedule.begin_step
        self._passed = max(self._passed, step)
        left = []
        for weight, mask, keep in zip(self._weights, before, self._keep):
            kept = int(np.count_nonzero(mask))
            scores, wanted = criteria.Random(self.seed).scores(weight.kernel(), weight.granularity, weight.name), keep
            if moves:
                scores = criteria.Magnitude().scores(weight.kernel(), weight.granularity, weight.name)
                wanted = keep - round(self._drop_share(step) * keep) if keep < mask.size else keep
            left.append(weight.granularity.mask(scores, wanted, mask) if kept > wanted else mask)
        short = [keep > np.count_nonzero(mask) for keep, mask in zip(self._keep, left)]
        scores = self._grow_scores(step) if any(short) else left
        for weight, mask, dropped, grow, keep in zip(self._weights, before, left, scores, self._keep):
            grown = weight.granularity.mask(grow, keep, dropped) if np.count_nonzero(dropped) < keep else dropped
            if (grown != mask).any():
                weight.assign(grown)
                optimizer_state.clear(self._optimizer, weight.variable, weight.expand(grown * (1 - mask)))


class RigL(DropAndGrow):
    r"""Trains sparse from the start: the smallest weights go, the connections with the largest gradients come (RigL).

    Every \(\Delta T\) = `frequency` steps from \(t_0\) = `begin_step` to \(T\) = `end_step`, each weight tensor drops a
    share

    $$f(t) = \frac{\alpha}{2} \left(1 + \cos\frac{\pi\,(t - t_0)}{T - t_0}\right)$$

    of its kept units, those of the smallest magnitude, and grows as many where \(|\partial L / \partial w|\) is largest
    among all that are not kept (Evci et al., 2020, section 3 and equation 1), \(\alpha\) = `drop_fraction`. New
    connections start at zero, and without momentum; one that is dropped and grown again at once keeps its
    value.

    The dense gradient is computed at updates alone, outside of the train step, and then dropped: one forward and one
    backward pass for each batch, every \(\Delta T\) steps. `fit` logs `sparsity`.

    ```python
    rigl = ks.callbacks.RigL(0.9, data=(x_train, y_train), end_step=7500)
    model.fit(x_train, y_train, callbacks=[rigl])
    ```

    Training loops of one's own call `start(model, optimizer=...)`, `update(step)` after each step, and `finish()`.

    Args:
        sparsity: Sparsity in [0, 1), over all that is pruned.
        data: Where batches for the gradients come from: `(x, y)` or `(x, y, sample_weight)` of arrays, a dataset that
            can be iterated again, or a function that returns either.
        end_step: \(T\), optimizer step of the last update; about three quarters of the training.
        begin_step: Optimizer step from which on the network is sparse.
        frequency: \(\Delta T\), optimizer steps between two updates.
        drop_fraction: \(\alpha\), share of the kept units that move at first, in (0, 1].
        granularity: As in `GradualPruning`; of sparse layers, their own.
        allocation: `"erk"`, `"erdos_renyi"`, `"uniform"` or an `Allocation` that knows no scores.
        loss: Loss, its name, or a function of `(y_true, y_pred)`; `None` takes that of the compiled model.
        batch_size: Examples of a batch, where `data` are arrays.
        batches: Batches over which a gradient is averaged.
        seed: Non-negative integer, for the first masks.
        include: As in `GradualPruning`.
        exclude: As in `GradualPruning`.
        targets: As in `GradualPruning`.
        weights: As in `GradualPruning`.

    Attributes:
        history: As in `GradualPruning`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is outside its range, a pattern matches no layer, or, before the first batch, when `fit`
            will end before `end_step`.
    """

    def __init__(
        self,
        sparsity,
        data,
        end_step,
        begin_step=0,
        frequency=100,
        drop_fraction=0.3,
        granularity=None,
        allocation="erk",
        loss=None,
        batch_size=32,
        batches=1,
        seed=0,
        include=None,
        exclude=None,
        targets=None,
        weights=None,
    ):
        chosen = include, exclude, targets, weights
        super().__init__(
            sparsity, begin_step, end_step, frequency, drop_fraction, granularity, allocation, seed, *chosen
        )
        self.loss = loss
        self._batches = gradients.Batches(data, batch_size, batches)

    def _take(self, model):
        gradients.check_loss(model, self.loss)
        return super()._take(model)

    def _drop_share(self, step):
        begin, end = self.schedule.begin_step, self.schedule.end_step
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))

    def _grow_scores(self, step):
        sums = None
        for batch in self._batches.take(self.schedule.updates_before(step)):
            own = gradients.loss_gradients(self.model, self._weights, batch, self.loss)
            sums = own if sums is None else [total + gradient for total, gradient in zip(sums, own)]
        return [w.granularity.reduce(np.abs(gradient), np.sum) for w, gradient in zip(self._weights, sums)]


class SET(DropAndGrow):
    r"""Trains sparse from the start: the smallest weights go, random connections come (sparse evolutionary training).

    Every `frequency` steps, each weight tensor drops a share \(\zeta\) = `drop_fraction` of its kept units, those of
    the smallest magnitude, and grows as many drawn uniformly among all that are not kept (Mocanu et al., 2018,
    algorithm 1, where positive and negative weights are cut off separately). Needs no gradients.

    ```python
    model.fit(x, y, callbacks=[ks.callbacks.SET(0.9, end_step=7500, frequency=steps_per_epoch)])
    ```

    Args:
        sparsity: Sparsity in [0, 1), over all that is pruned.
        end_step: Optimizer step of the last update.
        begin_step: Optimizer step from which on the network is sparse.
        frequency: Optimizer steps between two updates; the paper's is an epoch.
        drop_fraction: \(\zeta\), share of the kept units that move, in (0, 1].
        granularity: As in `GradualPruning`; of sparse layers, their own.
        allocation: `"erdos_renyi"`, `"erk"`, `"uniform"` or an `Allocation` that knows no scores.
        seed: Non-negative integer, for the first masks and for what grows.
        include: As in `GradualPruning`.
        exclude: As in `GradualPruning`.
        targets: As in `GradualPruning`.
        weights: As in `GradualPruning`.

    Attributes:
        history: As in `GradualPruning`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is outside its range, a pattern matches no layer, or, before the first batch, when `fit`
            will end before `end_step`.
    """

    def __init__(
        self,
        sparsity,
        end_step,
        begin_step=0,
        frequency=100,
        drop_fraction=0.3,
        granularity=None,
        allocation="erdos_renyi",
        seed=0,
        include=None,
        exclude=None,
        targets=None,
        weights=None,
    ):
        chosen = include, exclude, targets, weights
        super().__init__(
            sparsity, begin_step, end_step, frequency, drop_fraction, granularity, allocation, seed, *chosen
        )

    def _drop_share(self, step):
        return self.drop_fraction

    def _grow_scores(self, step):
        # A function of the step: a resumed run draws what the uninterrupted one would.
        return [
            np.random.default_rng([self.seed, zlib.crc32(weight.name.encode()), step]).random(weight.mask().shape)
            for weight in self._weights
        ]
