"""Random connection tables for a whole model, nested over densities, without a channel that leads nowhere."""

import collections
import warnings

import keras
import numpy as np

from keras_sparse import granularity as granularities
from keras_sparse import selection, validation
from keras_sparse.layers import BaseSparse
from keras_sparse.surgery.channels import ChannelGraph
from keras_sparse.surgery.transform import check_supported

__all__ = ["RandomTables", "random_tables"]


def random_tables(model, density, fan_in=None, include=None, exclude=None, seed=0):
    r"""Give the sparse layers of a model fixed random connection tables.

    Each table is drawn uniformly over the connections of its layer and is the same at every tap: of its
    \(n_{l-1} n_l\) connections it keeps \(\mathrm{round}(\alpha\, n_{l-1} n_l)\), with \(\alpha\) the density. With
    `fan_in="constant"` each output channel reads \(\mathrm{round}(\alpha\, n_{l-1})\) input channels, the index matrix
    \(a_{ij}\) of section 3.2.

    ```python
    model = ks.sparsify(model, granularity="connection")
    ks.random_tables(model, density=0.1)  # then train it
    ```

    **No dead channels.** Every connection lies on a path from the model's input to its prediction, and every channel
    has such a path: through residual additions, concatenations, pooling, normalization, nested models and shared
    layers (section 5.1). That takes as many connections as a layer has channels on its wider side. Where the density
    is too low for that, the layer gets the smallest table that does it, and a warning says what density results.

    **A single channel.** A layer that has only one input or one output channel, as the first one on grey images,
    keeps a share of \(\sqrt\alpha\) of its connections (section 5.2.1): as many as that layer of a network whose
    channels are thinned to \(\sqrt\alpha\). The channels at the other ends of those it lost are dead and have no
    connection at all; name the layer in `exclude` to keep it whole.

    **Nested.** One seed makes one draw: the tables of a lower density are subsets of those of a higher one.

    Args:
        model: A built Sequential or functional model with sparse layers of granularity `"connection"`, as
            `ks.sparsify(model, granularity="connection")` makes.
        density: Share of the connections to keep, in (0, 1].
        fan_in: `None` for tables that are uniform over all connections of a layer, `"constant"` for the same number
            of connections into each of its output channels.
        include: Which layers: a name, a path in a nested model, a regular expression matched against the whole of
            either, a layer class, or a list of these. `None`: all convolutions; dense layers stay whole unless they
            are named.
        exclude: The same, for layers to leave as they are; wins over `include`. Their masks count: a channel that they
            cut off gets no connection.
        seed: Non-negative integer. The draw depends on it and on the layer's place in the model.

    Returns:
        The true density: kept connections over all connections of the chosen layers.

    Raises:
        TypeError: If `model` is no Keras model, or an argument is of the wrong type.
        ValueError: If `density` is outside (0, 1], `model` is subclassed or not built, or it has no sparse layer of
            granularity `"connection"` to choose.

    Reference:
        Changpinyo, Sandler & Zhmoginov (2017), *The Power of Sparsity in Convolutional Neural Networks*, section 3.2.
    """
    density = validation.fraction("density", density, low_open=True)
    return RandomTables(model, fan_in, include, exclude, seed).assign(density)


class RandomTables:
    """The random tables of a model at every density, from one draw.

    What `ks.random_tables` assigns, for whoever needs several densities: tables that grow while a network trains
    (section 3.2.1 of the paper). Making it draws the whole order once; `masks` then only compares.

    ```python
    tables = ks.surgery.RandomTables(model, seed=0)
    tables.masks(0.01)  # {path: mask}, each a subset of ...
    tables.masks(0.02)
    ```

    Args:
        model: As for `ks.random_tables`; only the masks of layers that are not chosen are looked at.
        fan_in: As for `ks.random_tables`.
        include: As for `ks.random_tables`.
        exclude: As for `ks.random_tables`.
        seed: As for `ks.random_tables`.

    Attributes:
        levels: `{path: array}`, (in / groups, out): the density from which on each connection is in the table, 0 for
            those of the smallest table, infinity for those that can be on no path.

    Raises:
        TypeError: As `ks.random_tables`.
        ValueError: As `ks.random_tables`.
    """

    def __init__(self, model, fan_in=None, include=None, exclude=None, seed=0):
        check_supported(model, "draw its connection tables")
        validation.one_of("fan_in", fan_in, tuple(_GROWTHS))
        seed = validation.integer("seed", seed, at_least=0)
        self._layers = _choose(model, include, exclude)
        graph = ChannelGraph(model)
        for path in self._layers.keys() - graph.kernels().keys():
            rule = f"call its sparse layers itself, not within another layer, as it does '{path}'; exclude it"
            validation.fail("model", rule, model.name)
        self._growths = _draw(graph, self._layers, list(selection.flatten_layers(model)), _GROWTHS[fan_in], seed)

    @property
    def levels(self):
        return {path: growth.levels for path, growth in self._growths.items()}

    def masks(self, density):
        """Return `{path: mask}` at a density, float32 arrays of 0 and 1 of the shapes of the layers' masks.

        Args:
            density: In (0, 1].
        """
        density = validation.fraction("density", density, low_open=True)
        return {
            path: (levels <= density).astype("float32").reshape(self._layers[path].mask.shape)
            for path, levels in self.levels.items()
        }

    def density(self, density):
        """Return the true density at a nominal one: kept connections over all connections of the chosen layers."""
        masks = self.masks(density)
        return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values())

    def raised(self, density):
        """Return `{path: true density}` of the layers that need more connections than the density gives them."""
        density = validation.fraction("density", density, low_open=True)
        kept = {path: int((growth.levels <= density).sum()) for path, growth in self._growths.items()}
        return {
            path: kept[path] / growth.levels.size
            for path, growth in self._growths.items()
            if kept[path] > growth.nominal(density)
        }

    def assign(self, density):
        """Assign the tables of a density to the layers; return the true density, and warn where it had to be higher.

        Args:
            density: In (0, 1].
        """
        for path, mask in self.masks(density).items():
            self._layers[path].assign_mask(mask)
        true, raised = self.density(density), self.raised(density)
        if raised:
            most = max(raised, key=raised.get)
            warnings.warn(
                f"density={density:.4g} is too low for {len(raised)} of {len(self._layers)} layers: to have a path "
                "through every channel they hold more connections, the fewest that do it. The true density is "
                f"{true:.4g}, and up to {raised[most]:.4g} in '{most}'.",
                stacklevel=3,
            )
        return true


def _choose(model, include, exclude):
    layers = selection.flatten_layers(model)
    candidates = {path: layer for path, layer in layers.items() if _has_connections(layer)}
    if include is None:
        candidates = {path: v for path, v in candidates.items() if not isinstance(v, keras.layers.Dense)}
    chosen = selection.select(candidates, include, exclude, known=layers)
    if not chosen:
        rule = (
            "hold a sparse layer of granularity 'connection' that `include` names and `exclude` does not; "
            "`ks.sparsify(model, granularity='connection')` makes them"
        )
        validation.fail("model", rule, model.name)
    return chosen


def _has_connections(layer):
    if not isinstance(layer, BaseSparse):
        return False
    own, connection = layer.granularity, granularities.get("connection")
    return (own.taps, own.inputs, own.outputs) == (connection.taps, connection.inputs, connection.outputs)


# One growth a layer: the order in which its connections come.


class _Growth:
    """The order of a layer's connections, written as the density from which on each is there.

    Connections that channels need for their path are forced in; in between the table grows by connections in the order
    of their random priorities, as fast as the density rises.
    """

    def __init__(self, priorities):
        self.priorities = priorities
        self.levels = np.full(priorities.shape, np.inf)

    def nominal(self, density):
        """Return how many connections the density gives the layer."""
        raise NotImplementedError

    def grow(self, until, available, since):
        """Add what the densities in [since, until) bring, among the available connections, by priority."""
        raise NotImplementedError

    def force(self, rows, columns, level):
        self.levels[rows, columns] = np.minimum(self.levels[rows, columns], level)

    def balance(self, available, level):
        """Called after connections were forced in at a level."""


class _ExactCount(_Growth):
    """As many connections as the density times their number, rounded."""

    def nominal(self, density):
        return int(np.floor(density * self.levels.size + 0.5))

    def grow(self, until, available, since):
        size = self.levels.size
        target = size if until == np.inf else min(size, int(np.ceil(until * size - 0.5)))
        placed = int(np.isfinite(self.levels).sum())
        pool = np.flatnonzero(available & np.isinf(self.levels))
        count = min(target - placed, pool.size)
        if count <= 0:
            return
        chosen = pool[np.argsort(self.priorities.ravel()[pool])[:count]]
        self.levels.ravel()[chosen] = np.maximum((placed + np.arange(count) + 0.5) / size, since)


class _ConstantFanIn(_Growth):
    """As many connections into each output as the density times the inputs, rounded, and one at least."""

    def nominal(self, density):
        wanted = int(np.floor(density * self.levels.shape[0] + 0.5))
        return wanted * int(np.isfinite(self.levels).any(axis=0).sum())

    def grow(self, until, available, since):
        inputs = self.levels.shape[0]
        target = inputs if until == np.inf else min(inputs, max(1, int(np.ceil(until * inputs - 0.5))))
        levels = (np.arange(inputs) + 0.5) / inputs
        levels[0] = 0
        self._fill(target, available, np.maximum(levels, since))

    def balance(self, available, level):
        placed = np.isfinite(self.levels).sum(axis=0)
        self._fill(placed.max(initial=0), available, np.full(self.levels.shape[0], level))

    def _fill(self, target, available, levels):
        placed = np.isfinite(self.levels).sum(axis=0)
        free = available & np.isinf(self.levels)
        order = np.argsort(np.where(free, self.priorities, np.inf), axis=0)
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.arange(order.shape[0])[:, None], axis=0)
        places += placed
        chosen = free & (places < target)
        self.levels[chosen] = levels[places[chosen]]


class _SingleChannel(_Growth):
    """The square root of the density's share: the layer has one input or one output channel (section 5.2.1)."""

    def __init__(self, priorities, first):
        """Make the whole order: by `first`, the density from which on there is a channel to connect, then priority."""
        super().__init__(priorities)
        order = np.lexsort((priorities.ravel(), first.ravel()))
        levels = ((np.arange(order.size) + 0.5) / order.size) ** 2
        levels[0] = 0
        self.levels.ravel()[order] = levels

    def nominal(self, density):
        return int(np.floor(np.sqrt(density) * self.levels.size + 0.5))


_GROWTHS = {None: _ExactCount, "constant": _ConstantFanIn}


def _draw(graph, layers, paths, growth_class, seed):
    """Return `{path: growth}`, complete, for the chosen layers."""
    calls = graph.kernels()
    priorities = {}
    for path, layer in layers.items():
        # By place, not by name: Keras numbers the names of layers anew in every model.
        generator = np.random.default_rng([seed, paths.index(path)])
        priorities[path] = generator.random(tuple(layer.mask.shape)[-2:])
    growths = {}
    for path in calls:
        if path in layers and 1 in (calls[path][0].inputs[0].ids.size, calls[path][0].outputs[0].ids.size):
            forward, _ = graph.reach({p: growth.levels for p, growth in growths.items()} | _whole(layers, growths))
            first = np.broadcast_to(forward[calls[path][0].inputs[0].ids][:, None], priorities[path].shape)
            growths[path] = _SingleChannel(priorities[path], first)
    single = set(growths)
    forward, backward = graph.reach({path: growths[path].levels for path in single} | _whole(layers, growths))
    from_on = np.maximum(forward, backward)
    start = from_on.min()  # no path at all before; the smallest tables stand for any density below
    from_on[from_on <= start] = 0
    ends = {}
    for path in layers:
        ends[path] = graph.levels_of_ends(path, forward, backward)
        ends[path][ends[path] <= start] = 0
        if path in single:
            levels = np.maximum(growths[path].levels, ends[path])
            growths[path].levels = np.where(levels <= start, 0, levels)
        else:
            growths[path] = growth_class(priorities[path])
    growing = {path: growth for path, growth in growths.items() if path not in single}
    _grow(graph, growing, growths, from_on, ends, np.random.default_rng([seed, len(paths)]))
    return {path: growths[path] for path in layers}


def _whole(layers, drawn):
    return {path: np.zeros(tuple(layer.mask.shape)[-2:]) for path, layer in layers.items() if path not in drawn}


def _grow(graph, growing, growths, from_on, ends, generator):
    """Complete the levels of the growing layers: at each event, when channels join, what these need comes first."""
    events = np.unique(from_on[np.isfinite(from_on)])
    since = dict.fromkeys(growing, 0.0)
    for event in events:
        affected = [path for path in growing if (ends[path] == event).any()]
        for path in affected:
            growing[path].grow(event, ends[path] < event, since[path])
            since[path] = event
        levels = {path: growth.levels for path, growth in growths.items()}
        for path, rows, columns in _needed(graph, affected, levels, from_on <= event, event, generator):
            growing[path].force(rows, columns, event)
        for path in affected:
            growing[path].balance(ends[path] <= event, event)
    for path, growth in growing.items():
        growth.grow(np.inf, np.isfinite(ends[path]), since[path])


# The fewest connections that give every channel a path


class _Block:
    """The connections of one call of a layer within one of its groups."""

    def __init__(self, path, call, group, groups, alive):
        inputs, outputs = call.inputs[0].ids.size // groups, call.outputs[0].ids.size // groups
        self.path = path
        self.taps = int(np.prod(selection.kernel_variable(call.layer).shape[:-2]))
        self.columns = np.arange(group * outputs, (group + 1) * outputs)
        ids = call.inputs[0].ids[group * inputs : (group + 1) * inputs]
        self.rows = np.flatnonzero(alive[ids])
        self.ids = ids[self.rows]
        self.columns = self.columns[alive[call.outputs[0].ids[self.columns]]]

    def kept(self, levels, level):
        return levels[self.path][np.ix_(self.rows, self.columns)] <= level


def _needed(graph, affected, levels, alive, level, generator):
    """Yield `(path, rows, columns)` of the connections that the alive channels lack for their paths, the fewest.

    Each output of a layer needs one connection from it; each channel needs a reader, in one of the layers that read it
    at least. As many of the channels without a reader as possible are therefore given to outputs without an input.
    """
    blocks = []
    for path in affected:
        for call in graph.kernels()[path]:
            groups = getattr(call.layer, "groups", 1)
            blocks += [_Block(path, call, group, groups, alive) for group in range(groups)]
    blocks = [block for block in blocks if block.rows.size and block.columns.size]
    lacking = [block.columns[~block.kept(levels, level).any(axis=0)] for block in blocks]
    unread = alive & ~_read(graph, levels, alive, level)
    readers = collections.defaultdict(list)
    for index, block in enumerate(blocks):
        for channel in np.unique(block.ids[unread[block.ids]]):
            readers[int(channel)].append(index)
    classes = collections.defaultdict(list)
    for channel, indices in readers.items():
        classes[tuple(indices)].append(channel)
    shares = _match(list(classes), [len(c) for c in classes.values()], [columns.size for columns in lacking])
    given = [[] for _ in blocks]
    for (indices, channels), share in zip(classes.items(), shares):
        channels = generator.permutation(channels)
        cheapest = min(indices, key=lambda index: (blocks[index].taps, index))
        parts = np.split(channels, np.cumsum([share.get(index, 0) for index in indices]))
        for index, part in zip((*indices, cheapest), parts):
            given[index].extend(part.tolist())
    for block, channels in zip(blocks, given):
        # Again, since the call of the same layer before this one may have brought what it needs.
        kept = block.kept(levels, level)
        columns = generator.permutation(block.columns[~kept.any(axis=0)])
        channels = [channel for channel in channels if not kept[block.ids == channel].any()]
        rows = [int(generator.choice(block.rows[block.ids == channel])) for channel in channels]
        others = generator.permutation(np.setdiff1d(block.columns, columns))
        targets = np.concatenate([columns, others])
        rows += generator.choice(block.rows, max(columns.size - len(rows), 0)).tolist()
        if rows:
            yield block.path, np.array(rows), targets[np.arange(len(rows)) % targets.size]


def _read(graph, levels, alive, level):
    """Return which channels some connection or call that is there at a level hands on to an alive channel."""
    read = np.zeros(graph.size, bool)
    for channels in graph.outputs:
        read[channels.ids] = True
    tables = {path: levels_of <= level for path, levels_of in levels.items()}
    for call in graph.calls:
        if call.kind == "kernel":
            table = graph.table(call, tables.get(call.path))
            hit = alive[call.outputs[0].ids]
            rows = np.full(call.inputs[0].ids.size, hit.any()) if table is None else table[:, hit].any(axis=1)
            read[call.inputs[0].ids[rows]] = True
        elif call.kind == "elementwise":
            for ids in call.sources:
                read[np.broadcast_to(ids, call.outputs[0].ids.shape)[alive[call.outputs[0].ids]]] = True
        elif call.kind == "mix" and any(alive[channels.ids].any() for channels in call.outputs):
            for channels in call.inputs:
                read[channels.ids] = True
    return read


def _match(classes, supplies, capacities):
    """Return how many of each class go to each of its blocks, so that as many as possible find a place.

    A maximum flow by augmenting paths; classes and blocks are few.

    Args:
        classes: List of tuples of block indices, the blocks that the members of a class may go to.
        supplies: Number of members of each class.
        capacities: Places in each block.

    Returns:
        List of `{block: number}`, one a class.
    """
    left, room = list(supplies), list(capacities)
    shares = [collections.Counter() for _ in classes]
    while True:
        # Breadth first from the classes with members left, to a block with room.
        came_from = {("class", c): None for c in range(len(classes)) if left[c]}
        waiting, end = collections.deque(came_from), None
        while waiting and end is None:
            kind, index = node = waiting.popleft()
            if kind == "class":
                following = [("block", block) for block in classes[index]]
            else:
                following = [("class", c) for c, share in enumerate(shares) if share[index]]
            for other in following:
                if other not in came_from:
                    came_from[other] = node
                    waiting.append(other)
                    if other[0] == "block" and room[other[1]]:
                        end = other
                        break
        if end is None:
            return shares
        path = [end]
        while came_from[path[-1]] is not None:
            path.append(came_from[path[-1]])
        path.reverse()  # class, block, class, ..., block
        moved = min(left[path[0][1]], room[end[1]])
        for block, giving in zip(path[1::2], path[2::2]):
            moved = min(moved, shares[giving[1]][block[1]])
        for taking, block in zip(path[::2], path[1::2]):
            shares[taking[1]][block[1]] += moved
        for block, giving in zip(path[1::2], path[2::2]):
            shares[giving[1]][block[1]] -= moved
        left[path[0][1]] -= moved
        room[end[1]] -= moved
