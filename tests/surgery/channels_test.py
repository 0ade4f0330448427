"""The channel graph, against the gradients of the model itself.

With positive weights and inputs, no biases and no activation that cuts off, the gradient of a prediction with respect
to a connection's weights is nonzero exactly if a path from the input to the prediction runs through that connection.
"""

import keras
import numpy as np
import pytest
from channel_models import chain, concatenation, conv, groups, lively, many, residual, shared, unknown
from keras import layers

import keras_sparse as ks
from keras_sparse import selection
from keras_sparse.surgery.channels import ChannelGraph, connection_table

MODELS = [chain, residual, concatenation, groups, shared, many]


def random_tables(model, density, seed):
    """Sparsify and prune a model at random, with weights that make gradients tell what is connected."""
    rng = np.random.default_rng(seed)
    sparse = ks.sparsify(model)
    for variable in sparse.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        if variable.name in ("beta", "moving_mean"):
            variable.assign(np.zeros(variable.shape))
    for layer in selection.flatten_layers(sparse).values():
        if isinstance(layer, ks.layers.BaseSparse):
            layer.assign_mask((rng.random(layer.mask.shape) < density).astype("float32"))
    return sparse


@pytest.mark.parametrize("density", [1.0, 0.4, 0.15])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_dangling_connections_are_those_without_a_gradient(build, density):
    seen = set()
    for seed in range(1 if density == 1 else 2):
        model = random_tables(build(), density, seed)
        graph = ChannelGraph(model)
        dangling, expected = graph.dangling(), lively(model)
        assert set(dangling) == set(expected) and len(expected) >= 4
        for path, layer in selection.flatten_layers(model).items():
            if path in expected:
                np.testing.assert_array_equal(dangling[path], connection_table(layer) & ~expected[path], err_msg=path)
                seen |= set(np.unique(dangling[path]))
    assert True in seen or density >= 0.5, "nothing to find"


def test_what_is_not_known_is_taken_as_all_to_all():
    model = random_tables(unknown(), 1.0, 0)
    table = np.zeros((4, 4))
    table[0, 0] = 1
    model.get_layer("b").assign_mask(table[None, None])
    graph = ChannelGraph(model)
    # The slice, the Lambda, the wrapper, and a reshape that puts several channels into one place.
    assert [call.kind for call in graph.calls].count("mix") == 4
    # One channel behind the slice reads all before it, so the table leaves nothing dangling there ...
    assert not any(dangling.any() for dangling in graph.dangling().values())
    # ... and what lies behind the Lambda reads all of it; only those before it can be cut off.
    table[:] = 0
    model.get_layer("b").assign_mask(table[None, None])
    assert {path for path, dangling in graph.dangling().items() if dangling.any()} == {"a", "c", "d"}
    classes, fixed = graph.ties()
    for call in graph.calls:
        if call.path in ("a", "b"):
            assert fixed[call.outputs[0].ids].all()


class Reversed(layers.Conv2D):
    def call(self, inputs):
        return super().call(inputs)[..., ::-1]


def test_a_class_with_its_own_call_is_not_taken_for_its_parent():
    x = inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, layers.Activation("softmax")(Reversed(4, 3, name="own")(x)))
    assert [call.kind for call in ChannelGraph(model).calls] == ["mix", "copy"]


def test_channels_first():
    x = inputs = keras.Input((3, 6, 5))
    options = {"data_format": "channels_first"}
    x = conv(4, name="a", **options)(x)
    x = layers.MaxPooling2D(**options)(layers.BatchNormalization(axis=1)(x))
    x = layers.Flatten(**options)(layers.DepthwiseConv2D(1, **options)(x))
    graph = ChannelGraph(keras.Model(inputs, layers.Dense(2, name="d")(x)))
    calls = {call.path: call for call in graph.calls}
    assert "mix" not in [call.kind for call in graph.calls]
    assert [calls["a"].inputs[0].axis, calls["a"].outputs[0].axis] == [1, 1] and calls["a"].outputs[0].ids.size == 4
    # Flatten moves the channels to the end first.
    depthwise = next(call for call in graph.calls if call.kind == "elementwise")
    np.testing.assert_array_equal(calls["d"].inputs[0].ids, np.tile(depthwise.outputs[0].ids, 3 * 2))


def test_a_layer_that_reads_along_another_axis_reads_all_channels():
    x = inputs = keras.Input((6, 5, 4))
    model = keras.Model(inputs, conv(2, name="b")(layers.Permute((3, 1, 2))(conv(3, name="a")(x))))
    graph = ChannelGraph(model)
    assert [call.kind for call in graph.calls] == ["kernel", "copy", "mix", "kernel"]
    assert graph.kernels()["b"][0].inputs[0].ids.size == 5
    table = np.zeros((4, 3))
    table[:, 1] = 1
    assert graph.alive({"a": table})[graph.outputs[0].ids].all()


def test_flatten_and_reshape_against_numbers():
    # Each channel holds its identity at every pixel; what arrives at a place is the identity that the graph says.
    for shape, steps in [
        ((4, 3, 5), [layers.Flatten()]),
        ((4, 3, 5), [layers.Reshape((12, 5))]),
        ((4, 3, 5), [layers.Reshape((2, 30))]),
        ((4, 3, 5), [layers.Permute((3, 1, 2)), layers.Flatten()]),
        ((4, 3, 5), [layers.Permute((3, 1, 2)), layers.Reshape((5, 12))]),
        ((4, 3, 5), [layers.Flatten(), layers.Reshape((12, 5)), layers.Reshape((3, 4, 5))]),
        ((1, 1, 5), [layers.Reshape((5,)), layers.RepeatVector(3), layers.Reshape((15, 1)), layers.Flatten()]),
    ]:
        x = inputs = keras.Input(shape)
        for step in steps:
            x = step(x)
        model = keras.Model(inputs, x)
        graph = ChannelGraph(model)
        values = np.broadcast_to(graph.inputs[0].ids, (1, *shape)).astype("float32")
        channels = graph.outputs[0]
        assert all(call.kind == "copy" for call in graph.calls)
        arrived = np.moveaxis(np.asarray(model(values)), channels.axis, -1)
        np.testing.assert_array_equal(arrived, np.broadcast_to(channels.ids, arrived.shape))


def test_levels_are_the_highest_on_the_best_path():
    # Against plain reachability: at each level, the channels joined by the connections there by then.
    model = ks.sparsify(residual())
    graph = ChannelGraph(model)
    rng = np.random.default_rng(4)
    levels = {
        path: rng.integers(1, 9, connection_table(calls[0].layer).shape).astype(float)
        for path, calls in graph.kernels().items()
    }
    forward, backward = graph.reach(levels)
    for level in range(10):
        tables = {path: values <= level for path, values in levels.items()}
        np.testing.assert_array_equal(graph.alive(tables), np.maximum(forward, backward) <= level)
    ends = graph.levels_of_ends("b", forward, backward)
    call = graph.kernels()["b"][0]
    assert ends[1, 2] == max(forward[call.inputs[0].ids[1]], backward[call.outputs[0].ids[2]])


def test_ties():
    graph = ChannelGraph(residual())
    classes, fixed = graph.ties()
    outputs = {call.path: call.outputs[0].ids for call in graph.calls if call.kind == "kernel"}
    for name in ("b", "e", "f"):
        np.testing.assert_array_equal(classes[outputs[name]], classes[outputs["stem"]])
    assert len(set(classes[outputs["stem"]])) == 6 and not fixed[outputs["stem"]].any()
    assert not set(classes[outputs["a"]]) & set(classes[outputs["stem"]]) and not fixed[outputs["a"]].any()
    assert fixed[outputs["head"]].all() and fixed[graph.inputs[0].ids].all()


def test_ties_of_shared_layers_groups_and_coupled_calls():
    graph = ChannelGraph(shared())
    classes, fixed = graph.ties()
    first, second = (call.outputs[0].ids for call in graph.kernels()["twice"])
    assert not set(first) & set(second)
    np.testing.assert_array_equal(classes[first], classes[second])
    one, two = (call.inputs[0].ids for call in graph.kernels()["twice"])
    np.testing.assert_array_equal(classes[one], classes[two])
    assert fixed[one].all(), "the model's input"

    graph = ChannelGraph(groups())
    classes, fixed = graph.ties()
    for call in graph.calls:
        if call.path in ("a", "b", "c"):
            assert fixed[call.outputs[0].ids].all()

    for follower in (layers.LayerNormalization(), layers.Softmax(), layers.Activation("softmax"), layers.ReLU()):
        x = inputs = keras.Input((6, 5, 3))
        graph = ChannelGraph(keras.Model(inputs, conv(2, name="b")(follower(conv(4, name="a")(x)))))
        classes, fixed = graph.ties()
        expected = not isinstance(follower, layers.ReLU)
        assert fixed[graph.kernels()["a"][0].outputs[0].ids].all() == expected


def test_squeeze_and_excitation_is_followed_channel_by_channel():
    x = inputs = keras.Input((6, 5, 3))
    x = conv(4, name="a")(x)
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = conv(1, 1, name="gate", activation="sigmoid")(x)
    s = conv(4, 1, name="expand", activation="sigmoid")(conv(2, 1, name="reduce", activation="silu")(s))
    x = layers.Multiply()([x, s, gate])
    graph = ChannelGraph(keras.Model(inputs, conv(2, name="head")(x)))
    outputs = {path: calls[0].outputs[0].ids for path, calls in graph.kernels().items()}
    classes, fixed = graph.ties()
    np.testing.assert_array_equal(classes[outputs["a"]], classes[outputs["expand"]])
    assert not fixed[outputs["a"]].any() and not fixed[outputs["reduce"]].any()
    assert fixed[outputs["gate"]].all(), "one channel over many"


# name -> channels of all kernel layers' outputs, calls of unknown kind
APPLICATIONS = {"InceptionV3": 96, "ResNet50": 64, "MobileNet": 64, "DenseNet121": 64, "VGG16": 64}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications(name):
    size = APPLICATIONS[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    graph = ChannelGraph(model)
    assert not [call.path for call in graph.calls if call.kind == "mix"]
    assert graph.alive().all()
    kernels = graph.kernels()
    found = {p: v for p, v in selection.flatten_layers(model).items() if type(v) in (layers.Conv2D, layers.Dense)}
    assert set(kernels) == set(found)
    for path, calls in kernels.items():
        kernel = found[path].kernel
        assert [(c.inputs[0].ids.size, c.outputs[0].ids.size) for c in calls] == [tuple(kernel.shape[-2:])]
    # Cutting one output channel of the first convolution leaves exactly its readers without that input.
    first = next(iter(kernels))
    table = np.ones(found[first].kernel.shape[-2:])
    table[:, 3] = 0
    dead = ~graph.alive({first: table})
    assert dead[kernels[first][0].outputs[0].ids].tolist() == [i == 3 for i in range(table.shape[1])]
    classes, fixed = graph.ties()
    if name == "ResNet50":
        # Four stages, each with one class for each channel of its sum.
        sums = [call.outputs[0].ids for call in graph.calls if type(call.layer) is layers.Add]
        assert len(sums) == 16
        assert [len(set(map(int, classes[ids]))) for ids in sums] == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
        assert len({int(c) for ids in sums for c in classes[ids]}) == 256 + 512 + 1024 + 2048
    else:
        inner = np.unique(np.concatenate([c.outputs[0].ids for calls in kernels.values() for c in calls]))
        assert len(set(classes[inner].tolist())) == inner.size, "nothing is tied without a sum"
    assert fixed.sum() == fixed[graph.inputs[0].ids].sum() + fixed[graph.outputs[0].ids].sum()


def test_a_model_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="`model` must be .* layers know their shapes"):
        ChannelGraph(keras.Sequential([layers.Conv2D(3, 3)]))
