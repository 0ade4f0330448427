"""Pictures: sparsity patterns, the course of pruning, error against density.

matplotlib is imported when one is drawn.
"""

import dataclasses
import importlib
import math
import os

import keras
import numpy as np
from keras import ops

from keras_sparse import files, selection, validation
from keras_sparse.layers import BaseSparse

__all__ = ["plot_patterns", "plot_process", "plot_tradeoff"]

_KEPT, _PRUNED, _EMPTY = "#14466b", "#dde5ea", "#f3b5a3"
_INK, _FAINT = "#22303a", "#75848e"
# Distinct in hue and in lightness, so that they are told apart in print too.
_COLORS = ("#14466b", "#d1603d", "#3c8d5a", "#b58a17", "#7a4fa3", "#3aa0b8", "#a83a5b", "#6b7680")
# Inches.
_PATTERN_WIDTH, _FIELD_WIDTH, _MAX_HEIGHT, _MAX_CELL = 6.4, 1.25, 1.9, 0.13
_LEFT, _RIGHT, _TITLE, _GAP, _BOTTOM = 0.62, 0.15, 0.3, 0.3, 0.5
# More layers than this stand in two columns.
_LAYERS_IN_A_COLUMN = 8
_SPACE = "    "
# More epochs than this are drawn without or with smaller markers.
_MARKED = 60


def plot_patterns(model, include=None, exclude=None, *, ax=None, path=None):
    r"""Draw which weights of each layer are kept.

    A mask that does not tell outputs apart (granularity `"group"` or `"channel"`) is drawn as one tile for every input
    map, with the taps of its sparsity pattern \(Q_s\) (Lebedev & Lempitsky, 2016, Figure 4); an input map without any
    tap, which `ks.shrink` removes, stands out. Other masks are drawn as the table of input and output maps, shaded
    by the share of taps kept. Where taps are told apart, the average receptive field stands beside it: the share of
    maps that keep each tap.

    ```python
    ks.plot_patterns(model, include="conv.*", path="patterns.png")
    ```

    Args:
        model: A built model or a single built layer. Plain Keras layers show the zeros of their kernels.
        include: Which layers, as in `ks.sparsify`. `None`: those with a mask, or with zeros in their kernel.
        exclude: The same, for layers to leave out.
        ax: matplotlib Axes to draw the pattern on, or a list of one for each layer; the average receptive field is
            left out then. `None` makes a figure.
        path: File to write the figure to; its suffix is the format. The figure then no longer waits for `plt.show()`.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError, ValueError: If an argument is of the wrong kind, no layer is left to draw, or the Axes are not one
            for each layer.
    """
    patterns = [_pattern(name, layer) for name, layer in _layers_to_draw(model, include, exclude).items()]
    pyplot = _pyplot()
    if ax is not None:
        axes = _given_axes(ax, len(patterns), "layer")
        for pattern, axis in zip(patterns, axes):
            box = axis.get_window_extent()
            size = (box.width / axis.figure.dpi, box.height / axis.figure.dpi)
            _draw_pattern(axis, pattern, _Grid.of(pattern, *size))
            axis.set_title(pattern.title.replace(_SPACE, "\n", 1), fontsize=8.5, color=_INK)
        return _finish(pyplot, axes[0].figure, path)
    columns = 1 if len(patterns) <= _LAYERS_IN_A_COLUMN else 2
    return _finish(pyplot, _draw_layers(pyplot, patterns, columns), path)


def plot_process(history, *, ax=None, path=None):
    r"""Draw the course of pruning, as in Figure 5 of Lebedev & Lempitsky (2016).

    Three panels over the epochs: the density of each layer; the drop of the monitored accuracy, with the drop that is
    tolerated; the percentile of the threshold \(\theta\), the share of groups whose norm lies below it, raised (▲)
    where the drop is smaller than tolerated and lowered (▼) where it is not. The history of `GradualPruning` holds no
    drop and no threshold: its densities are drawn alone, over optimizer steps.

    Args:
        history: `callback.history` of `GroupwiseBrainDamage` or `GradualPruning`, or the callback: a list of dicts,
            each with `sparsity`, `layers` (`{path: sparsity}`) and `epoch` or `step`, and where there are such, `drop`,
            `test_drop`, `max_drop`, `percentile`.
        ax: A list of matplotlib Axes, one for each panel. `None` makes a figure.
        path: File to write the figure to; its suffix is the format.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError, ValueError: If `history` is no such list, is empty, or the Axes are not one for each panel.
    """
    records = _records(history)
    panels = [_draw_densities]
    panels += [_draw_drops] if any("drop" in record for record in records) else []
    panels += [_draw_percentiles] if any("percentile" in record for record in records) else []
    pyplot = _pyplot()
    if ax is None:
        _, axes = pyplot.subplots(1, len(panels), figsize=(4.3 * len(panels), 3.5), layout="constrained", squeeze=False)
        axes = list(axes[0])
    else:
        axes = _given_axes(ax, len(panels), "panel")
    key = "epoch" if all("epoch" in record for record in records) else "step"
    for draw, axis in zip(panels, axes):
        draw(axis, [record.get(key, index) for index, record in enumerate(records)], records)
        axis.set_xlabel("epoch" if key == "epoch" else "optimizer step")
        _tidy(axis)
    return _finish(pyplot, axes[0].figure, path)


def plot_tradeoff(curves, baseline=None, *, xlabel="density", ylabel="test error", log=False, ax=None, path=None):
    """Draw error or accuracy against density, a line a method, as in Figure 3 of Lebedev & Lempitsky (2016).

    ```python
    ks.plot_tradeoff(
        {"group lasso": [(0.05, 0.021), (0.1, 0.013)], "fixed patterns": [(0.04, 0.034)]}, baseline=0.008, log=True
    )
    ```

    Args:
        curves: `{label: [(density, value), ...]}`. Several values at one density, those of several seeds, are drawn as
            their mean within the band from the lowest to the highest; a single point as a dot.
        baseline: Value of the dense network, drawn as a dashed line, or `None`.
        xlabel: Label of the axis of densities.
        ylabel: Label of the values. Values and `baseline` are fractions, written as percents.
        log: Whether densities are spaced by their ratio.
        ax: matplotlib Axes to draw on. `None` makes a figure.
        path: File to write the figure to; its suffix is the format.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError, ValueError: If `curves` is no such dict, or a density lies outside (0, 1].
    """
    curves = _curves(curves)
    if baseline is not None:
        baseline = validation.number("baseline", baseline)
    pyplot = _pyplot()
    if ax is None:
        _, ax = pyplot.subplots(figsize=(5.6, 3.9), layout="constrained")
    (axis,) = _given_axes(ax, 1, "picture")
    for index, (label, points) in enumerate(curves.items()):
        color, marker = _COLORS[index % len(_COLORS)], "osD^vP*X"[index % 8]
        densities = sorted({density for density, _ in points})
        values = [[value for other, value in points if other == density] for density in densities]
        line = "-" if len(densities) > 1 else ""
        means = [float(np.mean(v)) for v in values]
        axis.plot(densities, means, line + marker, color=color, label=label, linewidth=1.6, markersize=4.5, zorder=3)
        lows, highs = [min(v) for v in values], [max(v) for v in values]
        if lows != highs and len(densities) > 1:
            axis.fill_between(densities, lows, highs, color=color, alpha=0.15, linewidth=0)
        elif lows != highs:
            axis.vlines(densities, lows, highs, color=color, linewidth=1.2)
    if baseline is not None:
        axis.axhline(baseline, color=_FAINT, linestyle="--", linewidth=1, label="dense")
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(_matplotlib("ticker").LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(_matplotlib("ticker").NullFormatter())
    for dimension in (axis.xaxis, axis.yaxis):
        dimension.set_major_formatter(_matplotlib("ticker").PercentFormatter(1.0))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    _tidy(axis)
    axis.legend(fontsize=8, frameon=False)
    return _finish(pyplot, axis.figure, path)


def _matplotlib(module):
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            "`matplotlib` must be installed to draw pictures: pip install 'keras_sparse[plot]'. "
            f"Received: {type(error).__name__}: {error}"
        ) from error


def _pyplot():
    return _matplotlib("pyplot")


def _given_axes(ax, count, each):
    axes_class = _matplotlib("axes").Axes
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if not all(isinstance(axis, axes_class) for axis in axes):
        validation.fail("ax", "be matplotlib Axes", ax, TypeError)
    if len(axes) != count:
        validation.fail("ax", f"hold one Axes for each {each}, {count}", f"{len(axes)} Axes")
    return axes


def _finish(pyplot, figure, path):
    """Write the figure, whole or not at all, where a path is given."""
    if path is None:
        return figure
    path = os.fspath(path)
    kind = os.path.splitext(path)[1].lstrip(".").lower()
    kinds = figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        validation.fail("path", f"end in one of {', '.join(f'.{name}' for name in sorted(kinds))}", path)
    with files.replacing(path) as staging:
        figure.savefig(staging, format=kind, dpi=160)
    pyplot.close(figure)
    return figure


# Patterns.


@dataclasses.dataclass
class _Pattern:
    """What of a kernel is kept.

    Attributes:
        name: Path of the layer.
        kept: Booleans of the mask's shape, brought to four axes: kernel height and width, inputs, outputs.
        shape: Shape of the kernel, four axes as well.
        taps: The kernel's own axes of taps, for the title.
    """

    name: str
    kept: np.ndarray
    shape: tuple
    taps: tuple

    @property
    def has_tiles(self):
        return self.kept.shape[3] == 1

    @property
    def tells_taps_apart(self):
        return math.prod(self.kept.shape[:2]) > 1

    @property
    def density(self):
        return float(self.kept.mean())

    def tiles(self):
        """`(inputs, height, width)`: the taps of every input map."""
        kept = np.broadcast_to(self.kept[..., 0], self.shape[:3])
        return np.moveaxis(kept, 2, 0)

    def table(self):
        """`(inputs, outputs)`: the share of taps kept."""
        share = self.kept.mean(axis=(0, 1), dtype="float32")
        return np.broadcast_to(share, (share.shape[0], self.shape[3]))

    def receptive_field(self):
        """`(height, width)`: the share of maps, or of their connections, that keep each tap."""
        return self.kept.mean(axis=(2, 3))

    @property
    def title(self):
        size = "×".join(map(str, self.taps)) + " · " if self.taps else ""
        text = (
            f"{self.name}{_SPACE}{size}{self.shape[2]:,} → {self.shape[3]:,}{_SPACE}density {100 * self.density:.3g}%"
        )
        empty = int((~self.kept.any(axis=(0, 1, 3))).sum()) if self.kept.shape[2] > 1 else 0
        return text + (f"{_SPACE}{empty} of {self.shape[2]} input maps empty" if empty else "")


def _layers_to_draw(model, include, exclude):
    if isinstance(model, keras.Model):
        known = selection.flatten_layers(model)
        layers = {path: layer for path, layer in known.items() if selection.kernel_variable(layer) is not None}
        if include is None:
            layers = {path: layer for path, layer in layers.items() if _has_pattern(layer)}
        chosen = selection.select(layers, include, exclude, known=known) if layers else {}
        if not chosen:
            rule = "hold a layer with a mask or with zeros in its kernel, or be given `include`"
            validation.fail("model", rule, model.name)
        return chosen
    if not isinstance(model, keras.Layer):
        validation.fail("model", "be a Keras model or layer", model, TypeError)
    if selection.kernel_variable(model) is None:
        validation.fail("model", "be a model, or a built layer with a kernel", model.name)
    return {model.name: model}


def _has_pattern(layer):
    if isinstance(layer, BaseSparse):
        return True
    return bool((ops.convert_to_numpy(selection.kernel_variable(layer)) == 0).any())


def _pattern(name, layer):
    shape = tuple(selection.kernel_variable(layer).shape)
    if isinstance(layer, BaseSparse):
        kept = ops.convert_to_numpy(layer.mask) != 0
    else:
        kept = ops.convert_to_numpy(selection.kernel_variable(layer)) != 0
        if np.array_equal(kept.any(axis=-1), kept.all(axis=-1)):
            kept = kept[..., :1]  # the zeros do not tell outputs apart: groups, or nothing pruned
        else:
            taps = tuple(range(kept.ndim - 2))
            if np.array_equal(kept.any(axis=taps), kept.all(axis=taps)):
                kept = kept.any(axis=taps, keepdims=True)  # nor taps: connections
    if isinstance(layer, (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)):
        shape, kept = (*shape[:-2], shape[-1], shape[-2]), np.swapaxes(kept, -1, -2)
    return _Pattern(name, _four_axes(kept), _four_axes(np.empty(shape, "bool")).shape, shape[:-2])


def _four_axes(array):
    """Bring (taps..., inputs, outputs) to two axes of taps; slices of a volume stand side by side."""
    taps = array.shape[:-2]
    if len(taps) == 3:
        return np.concatenate(list(array), axis=1)
    return array.reshape((1,) * (2 - len(taps)) + array.shape)


@dataclasses.dataclass
class _Grid:
    """How the picture of one pattern is laid out, sizes in inches."""

    columns: int
    rows: int
    width: float
    height: float

    @classmethod
    def of(cls, pattern, max_width, max_height):
        if not pattern.has_tiles:
            inputs, outputs = pattern.table().shape
            cell = min(max_width / outputs, max_height / inputs, _MAX_CELL)
            return cls(1, 1, max(cell * outputs, max_width / 3), max(cell * inputs, 0.16))
        count, (height, width) = pattern.shape[2], pattern.shape[:2]
        height, width = height + _gutter(height, width), width + _gutter(height, width)

        def cell(columns):
            return min(max_width / (columns * width), max_height / (math.ceil(count / columns) * height), _MAX_CELL)

        best = max(map(cell, range(1, count + 1)))
        # Of the grids with tiles nearly as large as they can be, one whose last row is full, and the widest.
        fitting = [columns for columns in range(1, count + 1) if cell(columns) >= 0.85 * best]
        columns = max(fitting, key=lambda columns: (count % columns == 0, columns))
        rows = math.ceil(count / columns)
        return cls(columns, rows, columns * width * cell(columns), rows * height * cell(columns))


def _gutter(height, width):
    return 0.3 if height * width == 1 else 0.7


def _tile_image(pattern, columns):
    """Return an RGB image of the tiles, `columns` in a row."""
    tiles = pattern.tiles()
    count, height, width = tiles.shape
    rows = math.ceil(count / columns)
    # Pixels of a tap: many enough for a fine line between taps, and an image of bounded size.
    cell = int(np.clip(3600 // (columns * (width + 1)), 4, 16))
    line = 1 if cell >= 8 else 0
    gutter = max(1, round(_gutter(height, width) * cell))
    white, kept, pruned, empty = (np.array(_rgb(c)) for c in ("#ffffff", _KEPT, _PRUNED, _EMPTY))
    step_y, step_x = height * cell + gutter, width * cell + gutter
    image = np.broadcast_to(white, (rows * step_y, columns * step_x, 3)).copy()
    for index, tile in enumerate(tiles):
        top, left = index // columns * step_y, index % columns * step_x
        ground = pruned if tile.any() else empty
        for i, j in np.ndindex(height, width):
            y, x = top + i * cell, left + j * cell
            image[y : y + cell - line, x : x + cell - line] = kept if tile[i, j] else ground
    return image[: image.shape[0] - gutter, : image.shape[1] - gutter], step_y


def _rgb(color):
    return [int(255 * part) for part in _matplotlib("colors").to_rgb(color)]


def _shades():
    return _matplotlib("colors").LinearSegmentedColormap.from_list("kept", [_PRUNED, _KEPT])


def _draw_pattern(axis, pattern, grid):
    if pattern.has_tiles:
        image, step = _tile_image(pattern, grid.columns)
        axis.imshow(image, interpolation="antialiased")
        # The number of the first map of a row; not in every row where they are small.
        every = max(1, math.ceil(grid.rows / max(1, int(grid.height / 0.16))))
        shown = range(0, grid.rows, every) if grid.rows > 1 else []
        axis.set_yticks([row * step + step * 0.4 for row in shown], [f"{row * grid.columns:,}" for row in shown])
        axis.set_xticks([])
    else:
        table = _reduced(pattern.table())
        inputs, outputs = pattern.table().shape
        axis.imshow(
            table,
            cmap=_shades(),
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="antialiased",
            extent=(0, outputs, inputs, 0),
        )
        axis.set_xticks([0, outputs], ["0", f"{outputs:,}"])
        axis.set_yticks([0, inputs] if inputs > 1 else [], ["0", f"{inputs:,}"] if inputs > 1 else [])
        axis.set_xlabel("output map", fontsize=7, color=_FAINT, labelpad=-6)
        if inputs > 1:
            axis.set_ylabel("input map", fontsize=7, color=_FAINT, labelpad=-8)
    axis.tick_params(length=0, labelsize=7, labelcolor=_FAINT, pad=2)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _reduced(table, limit=1024):
    """Average blocks of a large table: matplotlib would keep several copies of the whole."""
    for axis in (0, 1):
        block = math.ceil(table.shape[axis] / limit)
        if block > 1:
            starts = np.arange(0, table.shape[axis], block)
            sizes = np.diff(np.append(starts, table.shape[axis]))
            sums = np.add.reduceat(table, starts, axis=axis)
            table = sums / (sizes[:, None] if axis == 0 else sizes)
    return table


def _draw_receptive_field(axis, pattern):
    share = pattern.receptive_field()
    top = max(share.max(), 1e-9)
    axis.imshow(share, cmap=_shades(), vmin=0, vmax=top)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    cell = _FIELD_WIDTH / max(share.shape)
    if cell >= 0.17:  # inches: room for two digits
        size = min(7.5, 26 * cell)
        for (i, j), value in np.ndenumerate(share):
            color = "white" if value > 0.55 * top else _INK
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=color)
    mean = share.sum()
    axis.set_title(f"{mean:.3g} of {share.size} taps", fontsize=7.5, color=_FAINT, pad=3, loc="left")


def _draw_layers(pyplot, patterns, columns):
    """One row a layer: its title, its pattern, and the average receptive field where there is one."""
    with_field = any(pattern.tells_taps_apart for pattern in patterns)
    grids = [_Grid.of(pattern, _PATTERN_WIDTH, _MAX_HEIGHT) for pattern in patterns]
    pattern_width = max(grid.width for grid in grids)
    width = _LEFT + pattern_width + _RIGHT + (_GAP + _FIELD_WIDTH if with_field else 0)
    width = max(width, 5.2)  # room for titles and the legend
    contents, heights = [], []
    for pattern, grid in zip(patterns, grids):
        height, wide = pattern.receptive_field().shape
        field = _FIELD_WIDTH * height / max(height, wide) + 0.1 if pattern.tells_taps_apart else 0
        contents.append(max(grid.height, field))
        heights.append(_TITLE + contents[-1] + (0.12 if pattern.has_tiles else 0.26))
    in_columns = np.array_split(np.arange(len(patterns)), columns)
    total = max(sum(heights[i] for i in column) for column in in_columns) + _BOTTOM
    figure = pyplot.figure(figsize=(width * columns, total))

    def add_axes(left, top, wide, high):
        return figure.add_axes(
            (left / (width * columns), 1 - (top + high) / total, wide / (width * columns), high / total)
        )

    for number, column in enumerate(in_columns):
        top, left = 0.05, number * width + _LEFT
        for index in column:
            pattern, grid = patterns[index], grids[index]
            figure.text(
                left / (width * columns),
                1 - (top + 0.21) / total,
                pattern.title,
                fontsize=9,
                color=_INK,
                va="bottom",
            )
            _draw_pattern(add_axes(left, top + _TITLE, grid.width, grid.height), pattern, grid)
            if pattern.tells_taps_apart:
                high, wide = pattern.receptive_field().shape
                high, wide = (_FIELD_WIDTH * size / max(high, wide) for size in (high, wide))
                place = left + pattern_width + _GAP
                _draw_receptive_field(add_axes(place, top + _TITLE + 0.1, wide, high), pattern)
            top += heights[index]
    _draw_legend(figure, patterns)
    return figure


def _draw_legend(figure, patterns):
    patch = _matplotlib("patches").Patch
    tiles = [pattern for pattern in patterns if pattern.has_tiles]
    handles = [patch(color=_KEPT, label="kept"), patch(color=_PRUNED, label="pruned")]
    if any(not pattern.tiles().any(axis=(1, 2)).all() for pattern in tiles):
        handles.append(patch(color=_EMPTY, label="input map without any tap"))
    if any(pattern.tells_taps_apart for pattern in patterns):
        handles.append(patch(color="none", label="at the right: % that keep a tap"))
    if tiles:
        handles.append(patch(color="none", label="a tile: the taps of one input map"))
    if len(tiles) < len(patterns) and any(pattern.tells_taps_apart for pattern in patterns):
        handles.append(patch(color="none", label="shade: share of taps kept"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_LEFT / figure.get_figwidth(), 0.06 / figure.get_figheight()),
        borderaxespad=0,
        borderpad=0,
        ncols=len(handles),
        fontsize=7.5,
        frameon=False,
        labelcolor=_FAINT,
        handlelength=1,
        handleheight=1,
        columnspacing=1.6,
        handletextpad=0.5,
    )


# The course of pruning.


def _records(history):
    records = getattr(history, "history", history)
    if not isinstance(records, (list, tuple)) or not all(isinstance(record, dict) for record in records):
        validation.fail("history", "be a callback's `history`, a list of dicts", type(history).__name__, TypeError)
    if not records:
        validation.fail("history", "hold at least one entry: has the callback run yet?", records)
    for record in records:
        if not isinstance(record.get("layers"), dict) or "sparsity" not in record:
            validation.fail("history", "hold `sparsity` and `layers` in every entry", sorted(record))
    return list(records)


def _draw_densities(axis, x, records):
    percent = _matplotlib("ticker").PercentFormatter(1.0)
    layers = list(dict.fromkeys(name for record in records for name in record["layers"]))
    colors = _matplotlib("colors").LinearSegmentedColormap.from_list("layers", ["#9ecbe0", _KEPT])
    for index, name in enumerate(layers):
        color = _COLORS[index] if len(layers) <= len(_COLORS) else colors(index / (len(layers) - 1))
        density = [1 - record["layers"].get(name, np.nan) for record in records]
        axis.plot(x, density, color=color, label=name, linewidth=1.3)
    axis.plot(x, [1 - record["sparsity"] for record in records], color=_INK, linewidth=2.2, label="all", zorder=3)
    axis.set(ylim=(0, 1.03), title="density")
    axis.yaxis.set_major_formatter(percent)
    if len(layers) <= 2 * len(_COLORS):
        axis.legend(fontsize=7, frameon=False, ncols=1 if len(layers) <= 7 else 2)


def _draw_drops(axis, x, records):
    percent = _matplotlib("ticker").PercentFormatter(1.0)
    for key, label, color in (("drop", "held-out set", _COLORS[0]), ("test_drop", "test set", _COLORS[1])):
        if any(record.get(key) is not None for record in records):
            values = [np.nan if record.get(key) is None else record[key] for record in records]
            marker = "o" if len(x) <= _MARKED else None
            axis.plot(x, values, color=color, label=label, linewidth=1.3, marker=marker, markersize=2.5)
    tolerated = [record.get("max_drop") for record in records]
    if any(value is not None for value in tolerated):
        tolerated = [np.nan if value is None else value for value in tolerated]
        axis.plot(x, tolerated, color=_FAINT, linestyle="--", linewidth=1, label="tolerated")
    axis.axhline(0, color=_PRUNED, linewidth=1, zorder=0)
    axis.yaxis.set_major_formatter(percent)
    axis.set_title("drop of accuracy")
    # Below: such a curve leaves no corner free.
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _draw_percentiles(axis, x, records):
    values = np.array([np.nan if record.get("percentile") is None else record["percentile"] for record in records])
    axis.plot(x, values, color=_FAINT, linewidth=1, drawstyle="steps-post", zorder=2)
    # By the drop that decides it: groups that die change the percentile as well.
    decided = [record if record.get("max_drop") is not None else {} for record in records]
    small = np.array([record["drop"] < record["max_drop"] if record else np.nan for record in decided])
    for chosen, marker, color, label in (
        (small == 1, "^", _COLORS[2], "raised"),
        (small == 0, "v", _COLORS[1], "lowered"),
    ):
        if chosen.any():
            size = 4.5 if len(x) <= _MARKED else 2.5
            axis.plot(
                np.asarray(x)[chosen], values[chosen], marker, color=color, markersize=size, label=label, zorder=3
            )
    axis.set_title(r"percentile of $\theta$")
    axis.set_ylim(0, np.clip(1.15 * np.nanmax(values, initial=0), 10, 103))
    axis.yaxis.set_major_formatter(_matplotlib("ticker").PercentFormatter(100))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))


# Error against density.


def _curves(curves):
    if not isinstance(curves, dict) or not curves:
        validation.fail("curves", "be a dict of lists of (density, value) pairs", curves, TypeError)
    checked = {}
    for label, points in curves.items():
        name = f"curves[{label!r}]"
        try:
            pairs = [(density, value) for density, value in points]
        except (TypeError, ValueError):
            validation.fail(name, "be a list of (density, value) pairs", points, TypeError)
        if not pairs:
            validation.fail(name, "hold at least one (density, value) pair", points)
        for density, value in pairs:
            validation.fraction(name, density, low_open=True)
            validation.number(name, value)
        checked[str(label)] = pairs
    return checked


def _tidy(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6ebee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.title.set(fontsize=10, color=_INK)
