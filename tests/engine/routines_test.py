"""Every routine in the list against a float64 convolution of the effective kernel."""

import itertools

import numpy as np
import pytest

from keras_sparse.engine import planner, routines, timing


def convolve(images, kernel, strides, padding, dilation_rate, groups):
    """Float64 convolution, a tap at a time."""
    images = np.asarray(images, "float64")
    kh, kw, channels, filters = kernel.shape
    spans = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilation_rate)]
    if padding == "same":
        sizes = [-(-n // s) for n, s in zip(images.shape[1:3], strides)]
        pads = [max((o - 1) * s + span - n, 0) for o, s, span, n in zip(sizes, strides, spans, images.shape[1:3])]
        images = np.pad(images, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
    else:
        sizes = [(n - span) // s + 1 for n, span, s in zip(images.shape[1:3], spans, strides)]
    outputs = np.zeros((len(images), *sizes, filters))
    for i, j, g in itertools.product(range(kh), range(kw), range(groups)):
        y, x = i * dilation_rate[0], j * dilation_rate[1]
        rows = slice(y, y + (sizes[0] - 1) * strides[0] + 1, strides[0])
        columns = slice(x, x + (sizes[1] - 1) * strides[1] + 1, strides[1])
        per_group = slice(g * (filters // groups), (g + 1) * (filters // groups))
        patch = images[:, rows, columns, g * channels : (g + 1) * channels]
        outputs[..., per_group] += patch @ kernel[i, j, :, per_group].astype("float64")
    return outputs


def sparse_kernel(shape, sparsity, unit, seed=0):
    generator = np.random.default_rng(seed)
    unit_shape = tuple(n if keep else 1 for n, keep in zip(shape, unit))
    mask = generator.random(unit_shape) >= sparsity
    return (generator.standard_normal(shape) * mask).astype("float32")


UNITS = {"connection": (0, 0, 1, 1), "group": (1, 1, 1, 0), "channel": (0, 0, 1, 0), "feature_map": (0, 0, 0, 1)}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", routines.ROUTINES)
def test_product(name, sparsity, unit):
    kernel = sparse_kernel((3, 2, 5, 9), sparsity, UNITS[unit])
    images = np.random.default_rng(1).standard_normal((2, 7, 8, 5)).astype("float32")
    for strides, padding, dilation in [((1, 1), "same", (1, 1)), ((2, 1), "valid", (1, 1)), ((1, 1), "same", (2, 3))]:
        convolution = routines.Convolution(kernel, strides, padding, dilation)
        routine = routines.build(name, convolution)
        if routine is None:
            every_channel = (kernel != 0).any(axis=(0, 1, 3)).all() and (kernel != 0).any(axis=(0, 1, 2)).all()
            assert name == "compact" and (every_channel or not kernel.any()), "there was something to leave out"
            continue
        expected = convolve(images, kernel, strides, padding, dilation, 1)
        np.testing.assert_allclose(routine(images), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", routines.ROUTINES)
def test_groups(name):
    kernel = sparse_kernel((3, 3, 2, 12), 0.5, UNITS["connection"])
    images = np.random.default_rng(1).standard_normal((2, 6, 5, 8)).astype("float32")
    routine = routines.build(name, routines.Convolution(kernel, padding="same", groups=4))
    if name in ("thinned", "compact"):
        assert routine is None
    else:
        expected = convolve(images, kernel, (1, 1), "same", (1, 1), 4)
        np.testing.assert_allclose(routine(images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", routines.ROUTINES)
def test_dense_layers(name):
    kernel = sparse_kernel((1, 1, 33, 17), 0.7, UNITS["channel"])
    rows = np.random.default_rng(1).standard_normal((1, 1, 5, 33)).astype("float32")
    routine = routines.build(name, routines.Convolution(kernel, is_dense_layer=True))
    expected = rows.astype("float64") @ kernel[0, 0]
    assert routine(rows).shape == (1, 1, 5, 17)
    np.testing.assert_allclose(routine(rows), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("is_dense_layer", [False, True])
@pytest.mark.parametrize("activation", ["linear", "relu", "relu6"])
@pytest.mark.parametrize("name", routines.ROUTINES)
def test_bias_residual_and_activation(name, activation, is_dense_layer):
    generator = np.random.default_rng(4)
    size, padding = ((1, 1), "valid") if is_dense_layer else ((3, 2), ((1, 0), (2, 1)))
    kernel = 3 * sparse_kernel((*size, 5, 9), 0.5, UNITS["channel"])
    images = generator.standard_normal((1, 1, 8, 5) if is_dense_layer else (2, 7, 8, 5)).astype("float32")
    pads = ((0, 0), (0, 0)) if is_dense_layer else padding
    product = convolve(np.pad(images, ((0, 0), *pads, (0, 0))), kernel, (1, 1), "valid", (1, 1), 1)
    bias = generator.standard_normal(9).astype("float32")
    residual = generator.standard_normal(product.shape).astype("float32")
    for b, r in itertools.product([None, bias], [None, residual]):
        convolution = routines.Convolution(
            kernel, padding=padding, is_dense_layer=is_dense_layer, bias=b, activation=activation
        )
        expected = product + (0 if b is None else b) + (0 if r is None else r)
        low, high = {"relu": (0, np.inf), "relu6": (0, 6)}.get(activation, (-np.inf, np.inf))
        actual = routines.build(name, convolution)(images, r)
        np.testing.assert_allclose(actual, np.clip(expected, low, high), rtol=0, atol=1e-5 * np.abs(product).max())


def plan_with(monkeypatch, milliseconds):
    """Plan over two batch sizes with made-up times, `{name: (small batch, large batch)}`."""
    monkeypatch.setattr(
        timing, "alternate", lambda f, shapes, **_: {name: milliseconds[name][shapes[0][0] > 1] for name in f}
    )
    convolution = routines.Convolution(sparse_kernel((3, 3, 4, 4), 0.5, UNITS["group"]))
    shapes = [[(1, 8, 8, 4)], [(16, 8, 8, 4)]]
    return planner.plan_convolution(convolution, ("connection", "thinned"), shapes, [1, 16], lambda r: r)[1]


@pytest.mark.parametrize(
    ("connection", "thinned", "chosen"),
    [
        ((0.5, 0.5), (0.9, 0.9), "connection"),
        ((0.9, 0.2), (0.6, 0.6), "connection"),  # the larger product of gains
        ((0.1, 1.01), (0.9, 0.9), "thinned"),  # a loss at one size rules a routine out
        ((0.97, 0.97), (0.99, 0.98), "dense"),  # within the noise
        ((2.0, 2.0), (3.0, 1.0), "dense"),
    ],
)
def test_the_planner_takes_the_fastest_that_never_loses(monkeypatch, connection, thinned, chosen):
    plan = plan_with(monkeypatch, {"dense": (1.0, 1.0), "connection": connection, "thinned": thinned})
    assert plan.routine == chosen
    assert plan.milliseconds["connection"] == {1: connection[0] * 1e3, 16: connection[1] * 1e3}
