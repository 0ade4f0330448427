import keras
import numpy as np
import pytest
from keras import ops

import keras_sparse as ks
from keras_sparse import granularity as granularities
from keras_sparse.initializers import RandomMask
from keras_sparse.report import plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    matplotlib.pyplot.close("all")


def convolution(shape, granularity="group", density=0.4, name="conv"):
    """A one-layer model with a random mask; `shape` is that of the kernel."""
    height, width, inputs, outputs = shape
    layer = ks.layers.SparseConv2D(outputs, (height, width), padding="same", granularity=granularity, name=name)
    model = keras.Sequential([keras.layers.Input((9, 9, inputs)), layer])
    layer.assign_mask(np.asarray(RandomMask(1 - density, seed=3)(layer.mask.shape)))
    return model


def color_count(image, color):
    rgb = [int(255 * part) for part in matplotlib.colors.to_rgb(color)]
    return int((np.asarray(image.get_array()) == rgb).all(axis=-1).sum())


@pytest.mark.parametrize(
    "shape", [(3, 3, 1, 4), (3, 3, 3, 8), (5, 5, 20, 5), (1, 7, 33, 4), (7, 1, 16, 2), (1, 1, 50, 3)]
)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_tiles_show_every_tap_of_every_map(shape, density):
    model = convolution(shape)
    mask = np.random.default_rng(1).random((*shape[:3], 1)) < density
    model.layers[0].assign_mask(mask)
    image = ks.plot_patterns(model).axes[0].images[0]
    kept, pruned, empty = (color_count(image, color) for color in (plots._KEPT, plots._PRUNED, plots._EMPTY))
    # Taps are squares of one size, so that pixels count taps.
    pixels = (kept + pruned + empty) / mask.size
    assert pixels == int(pixels) and pixels >= 9
    dead = ~mask.any(axis=(0, 1, 3))
    assert kept == pixels * mask.sum()
    assert empty == pixels * dead.sum() * shape[0] * shape[1]
    title = model_title(model)
    assert f"{shape[0]}×{shape[1]} · {shape[2]} → {shape[3]}" in title
    assert f"density {100 * mask.mean():.3g}%" in title
    assert (f"{dead.sum()} of {shape[2]} input maps empty" in title) == (dead.any() and shape[2] > 1)


def model_title(model):
    return " ".join(text.get_text() for text in ks.plot_patterns(model).texts)


@pytest.mark.parametrize("granularity", ["connection", "weight", "feature_map"])
def test_tables_show_the_share_of_taps(granularity):
    model = convolution((3, 2, 7, 11), granularity)
    layer = model.layers[0]
    mask = np.broadcast_to(np.asarray(layer.mask), (3, 2, 7, 11))
    figure = ks.plot_patterns(model)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(np.broadcast_to(shown, (7, 11)), mask.mean(axis=(0, 1)), atol=1e-6)
    assert len(figure.axes) == (2 if granularity == "weight" else 1)  # a receptive field where taps are told apart


@pytest.mark.parametrize(("granularity", "axes"), [("group", (2,)), ("weight", (2, 3))])
def test_average_receptive_field(granularity, axes):
    model = convolution((5, 3, 8, 6), granularity)
    field = ks.plot_patterns(model).axes[1]
    expected = np.asarray(model.layers[0].mask).mean(axis=axes).reshape(5, 3)
    np.testing.assert_allclose(field.images[0].get_array(), expected, atol=1e-6)
    assert [text.get_text() for text in field.texts] == [f"{100 * share:.0f}" for share in expected.ravel()]
    assert field.get_title("left") == f"{expected.sum():.3g} of 15 taps"


def test_plain_layers_show_their_zeros():
    inputs = keras.Input((9, 9, 4))
    x = keras.layers.Conv2D(6, 3, name="groups")(inputs)
    x = keras.layers.Conv2D(5, 3, name="dense")(x)
    x = keras.layers.Conv2DTranspose(3, 2, name="transposed")(x)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    model = keras.Model(inputs, keras.layers.Dense(7, name="logits")(keras.layers.Flatten(name="flat")(x)))
    with pytest.raises(ValueError, match="`model` must hold a layer with a mask or with zeros"):
        ks.plot_patterns(model)
    groups, transposed, logits = (model.get_layer(name) for name in ("groups", "transposed", "logits"))
    kernel = ops.convert_to_numpy(groups.kernel).copy()
    kernel[0, :, 2] = 0
    groups.kernel.assign(kernel)
    kernel = ops.convert_to_numpy(transposed.kernel).copy()
    kernel[:, :, 1, 4] = 0  # (height, width, outputs, inputs)
    transposed.kernel.assign(kernel)
    kernel = ops.convert_to_numpy(logits.kernel).copy()
    kernel[5, 3] = 0
    logits.kernel.assign(kernel)
    figure = ks.plot_patterns(model)
    titles = [text.get_text().split()[0] for text in figure.texts]
    assert titles == ["groups", "transposed", "logits"]
    assert color_count(figure.axes[0].images[0], plots._PRUNED) > 0
    table = np.asarray(figure.axes[2].images[0].get_array())
    assert table.shape == (5, 3) and table[4, 1] == 0 and table.sum() == 14
    assert len(ks.plot_patterns(model, include="dense").axes) == 2
    assert len(ks.plot_patterns(model, exclude=["groups", "logits"]).axes) == 1
    assert len(ks.plot_patterns(logits).axes) == 1


def test_kernels_of_one_and_three_dimensions():
    for layer, shape in ((keras.layers.Conv1D(4, 5), (9, 3)), (keras.layers.Conv3D(4, (2, 3, 3)), (5, 5, 5, 3))):
        keras.Sequential([keras.layers.Input(shape), layer])
        kernel = ops.convert_to_numpy(layer.kernel).copy()
        kernel[0, ..., 1, :] = 0
        layer.kernel.assign(kernel)
        figure = ks.plot_patterns(layer)
        share = (kernel != 0).mean(axis=(-1, -2)).reshape(-1)
        shown = np.asarray(figure.axes[1].images[0].get_array())
        assert shown.shape == ((1, 5) if len(shape) == 2 else (3, 6))
        np.testing.assert_allclose(np.sort(shown, axis=None), np.sort(share))


def test_a_large_table_is_averaged_in_blocks():
    table = np.random.default_rng(0).random((2500, 37)) < 0.3
    small = plots._reduced(table)
    assert small.shape == (834, 37)
    np.testing.assert_allclose(small[0], table[:3].mean(axis=0))
    np.testing.assert_allclose(small[-1], table[2499:].mean(axis=0))


@pytest.mark.parametrize("granularity", granularities.names())
def test_every_granularity_is_written_to_a_file(tmp_path, granularity):
    ks.plot_patterns(convolution((3, 3, 6, 8), granularity), path=tmp_path / "new" / "p.png")
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.pyplot.get_fignums() == []  # what is written no longer waits for plt.show()


def test_given_axes_are_drawn_on():
    figure, axes = matplotlib.pyplot.subplots(1, 2)
    first, second = convolution((3, 3, 4, 4), name="a"), convolution((3, 3, 4, 4), "weight", name="b")
    model = keras.Sequential([*first.layers, *second.layers])
    assert ks.plot_patterns(model, ax=axes) is figure
    assert all(axis.images and axis.get_title().startswith(name) for axis, name in zip(axes, "ab"))
    with pytest.raises(ValueError, match="`ax` must hold one Axes for each layer, 2. Received: ax='1 Axes'"):
        ks.plot_patterns(model, ax=axes[0])
    with pytest.raises(TypeError, match="`ax` must be matplotlib Axes"):
        ks.plot_patterns(first, ax="top")


def records(epochs=6):
    steps, drops = [5.0, 10.0, 15.0, 10.0, 15.0, 15.0], [0.0, 0.001, 0.013, 0.002, 0.005, 0.012]
    return [
        {
            "epoch": epoch,
            "sparsity": 0.1 * epoch,
            "layers": {"conv1": 0.05 * epoch, "conv2": 0.15 * epoch},
            "percentile": steps[epoch],
            "drop": drops[epoch],
            "max_drop": 0.012,
        }
        for epoch in range(epochs)
    ]


def test_the_process_in_three_panels():
    history = records()
    density, drop, percentile = ks.plot_process(history).axes
    lines = {line.get_label(): line.get_ydata() for line in density.lines}
    np.testing.assert_allclose(lines["conv2"], [1 - 0.15 * epoch for epoch in range(6)])
    np.testing.assert_allclose(lines["all"], [1 - 0.1 * epoch for epoch in range(6)])
    lines = {line.get_label(): line.get_ydata() for line in drop.lines}
    np.testing.assert_allclose(lines["held-out set"], [record["drop"] for record in history])
    np.testing.assert_allclose(lines["tolerated"], [0.012] * 6)
    assert "test set" not in lines
    marks = {line.get_label(): list(line.get_xdata()) for line in percentile.lines}
    assert marks["raised"] == [0, 1, 3, 4] and marks["lowered"] == [2, 5]
    assert {axis.get_xlabel() for axis in (density, drop, percentile)} == {"epoch"}

    for record in history:
        record["test_drop"] = 0.001
    figure, axes = matplotlib.pyplot.subplots(1, 3)
    assert ks.plot_process(history, ax=axes) is figure
    assert "test set" in [line.get_label() for line in axes[1].lines]


def test_gradual_pruning_has_a_process_too():
    model = ks.sparsify(ks.strip(convolution((3, 3, 2, 4), density=1.0)))
    model.compile("sgd", "mse")
    pruning = ks.callbacks.GradualPruning(ks.schedules.PolynomialDecay(0.0, 0.5, 0, 4, frequency=2))
    model.fit(np.zeros((8, 9, 9, 2)), np.zeros((8, 9, 9, 4)), batch_size=2, epochs=2, callbacks=[pruning], verbose=0)
    (axis,) = ks.plot_process(pruning).axes
    (line,) = [line for line in axis.lines if line.get_label() == "all"]
    assert list(line.get_xdata()) == [0, 2, 4] and line.get_ydata()[-1] == 0.5
    assert axis.get_xlabel() == "optimizer step"


def test_the_tradeoff():
    curves = {"lasso": [(0.5, 0.02), (0.1, 0.05), (0.1, 0.03)], "fixed": [(0.04, 0.09)]}
    (axis,) = ks.plot_tradeoff(curves, baseline=0.015, log=True).axes
    lines = {line.get_label(): line for line in axis.lines}
    np.testing.assert_allclose(lines["lasso"].get_xydata(), [(0.1, 0.04), (0.5, 0.02)])
    assert lines["lasso"].get_linestyle() == "-" and lines["fixed"].get_linestyle() == "None"
    assert list(lines["dense"].get_ydata()) == [0.015, 0.015]
    (band,) = axis.collections
    assert band.get_paths()[0].get_extents().y1 == pytest.approx(0.05)
    assert axis.get_xscale() == "log"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "p.svg"
    ks.plot_tradeoff({"a": [(0.5, 0.1)]}, path=path)
    before = path.read_bytes()

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        ks.plot_tradeoff({"a": [(0.5, 0.2)]}, path=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.svg"]


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import keras_sparse as ks
try:
    ks.plot_tradeoff({"a": [(0.5, 0.1)]})
except ImportError as error:
    assert "`matplotlib` must be installed" in str(error) and "keras_sparse[plot]" in str(error), error
    print("said so")
"""


def test_without_matplotlib_the_error_says_what_to_install(run_python):
    assert "said so" in run_python(WITHOUT_MATPLOTLIB)
