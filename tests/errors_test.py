"""Wrong arguments: each error names the argument, the rule and the value received, before any work is done."""

import re

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import allocation, granularity
from keras_sparse.engine import packing
from keras_sparse.interop import tfmot


def cnn():
    return keras.Sequential(
        [
            keras.layers.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(3, name="dense"),
        ],
        name="cnn",
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def sparse_layer(**options):
    layer = ks.layers.SparseConv2D(4, 3, **options)
    layer.build((None, 6, 6, 2))
    return layer


def fit_with(model=None, epochs=2, **options):
    model = model or ks.sparsify(cnn())
    model.compile("sgd", "mse")
    x, y = np.zeros((8, 6, 6, 2), "float32"), np.zeros((8, 3), "float32")
    options.setdefault("schedule", ks.schedules.OneShot(0.5))
    model.fit(x, y, batch_size=4, epochs=epochs, callbacks=[ks.callbacks.GradualPruning(**options)], verbose=0)


def grow(model=None, **options):
    model = model or ks.sparsify(cnn())
    model.compile("sgd", "mse")
    x, y = np.zeros((8, 6, 6, 2), "float32"), np.zeros((8, 3), "float32")
    growing = ks.callbacks.IncrementalTraining(**{"initial_density": 0.5, "doubling_steps": 2, **options})
    model.fit(x, y, batch_size=4, callbacks=[growing], verbose=0)


def damage(data=None, **options):
    data = (np.zeros((8, 6, 6, 2), "float32"), np.zeros((8, 3), "float32")) if data is None else data
    return ks.callbacks.GroupwiseBrainDamage(data, **{"delta": 0.01, "epsilon": 0.1, "lambda_": 0.01, **options})


def fit_damaged(**options):
    model = cnn()
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.zeros((8, 6, 6, 2), "float32"), np.zeros((8, 3), "float32")
    model.fit(x, y, callbacks=[damage(**options)], verbose=0)


def decay(**options):
    defaults = {"initial_sparsity": 0.0, "final_sparsity": 0.9, "begin_step": 0, "end_step": 100}
    return ks.schedules.PolynomialDecay(**{**defaults, **options})


def checkpoint(target, **options):
    return ks.callbacks.SparsityModelCheckpoint("x.keras", target_sparsity=target, **options)


def stopping(target, **options):
    return ks.callbacks.SparsityEarlyStopping(target_sparsity=target, **options)


KERNEL = np.ones((3, 3, 4, 6), "float32")

# (id, call, error, argument the message names, part of the rule, value the message repeats)
CASES = [
    ("sparsity 1", lambda: ks.schedules.OneShot(1.0), ValueError, "target_sparsity", "[0, 1)", "1.0"),
    ("sparsity < 0", lambda: ks.schedules.ConstantSparsity(-0.1, 0), ValueError, "target_sparsity", "[0, 1)", "-0.1"),
    ("sparsity nan", lambda: decay(final_sparsity=float("nan")), ValueError, "final_sparsity", "[0, 1)", "nan"),
    ("sparsity text", lambda: decay(initial_sparsity="half"), TypeError, "initial_sparsity", "[0, 1)", "'half'"),
    ("final sparsity > 1", lambda: decay(final_sparsity=90), ValueError, "final_sparsity", "[0, 1)", "90"),
    ("begin < 0", lambda: decay(begin_step=-5), ValueError, "begin_step", ">= 0", "-5"),
    ("begin float", lambda: decay(begin_step=1.5), TypeError, "begin_step", "integer", "1.5"),
    ("end before begin", lambda: decay(begin_step=100), ValueError, "end_step", "greater than begin_step, 100", "100"),
    ("end < -1", lambda: ks.schedules.ConstantSparsity(0.5, 0, end_step=-2), ValueError, "end_step", ">= -1", "-2"),
    ("end too early", lambda: ks.schedules.ConstantSparsity(0.5, 9, 3), ValueError, "end_step", "begin_step, 9", "3"),
    ("frequency 0", lambda: decay(frequency=0), ValueError, "frequency", ">= 1", "0"),
    ("frequency too long", lambda: decay(frequency=101), ValueError, "frequency", "at most", "101"),
    ("power 0", lambda: decay(power=0), ValueError, "power", "> 0", "0"),
    ("power bool", lambda: decay(power=True), TypeError, "power", "number", "True"),
    ("density 0", lambda: ks.schedules.Doubling(0.0), ValueError, "initial_density", "(0, 1]", "0.0"),
    ("density falls", lambda: ks.schedules.Doubling(0.5, 0.2), ValueError, "final_density", "initial_density", "0.2"),
    ("grow from 0", lambda: grow(initial_density=0), ValueError, "initial_density", "(0, 1]", "0"),
    ("grow to 2", lambda: grow(final_density=2.0), ValueError, "final_density", "(0, 1]", "2.0"),
    ("grow to less", lambda: grow(final_density=0.1), ValueError, "final_density", "initial_density, 0.5", "0.1"),
    ("double at once", lambda: grow(doubling_steps=0), ValueError, "doubling_steps", ">= 1", "0"),
    ("double at 1.5", lambda: grow(doubling_steps=1.5), TypeError, "doubling_steps", "integer", "1.5"),
    ("grow from twos", lambda: grow(initializer="two"), ValueError, "initializer", "'zeros', 'layer'", "'two'"),
    ("grow at random", lambda: grow(seed=-1), ValueError, "seed", ">= 0", "-1"),
    ("grow without end", lambda: grow(doubling_steps=3), ValueError, "doubling_steps", "from optimizer step 3 on", "3"),
    ("grow a plain model", lambda: grow(cnn()), ValueError, "model", "granularity 'connection'", "'cnn'"),
    (
        "grow weights",
        lambda: grow(ks.sparsify(cnn(), "weight")),
        ValueError,
        "model",
        "granularity 'connection'",
        "'cnn'",
    ),
    (
        "grow without an optimizer",
        lambda: ks.callbacks.IncrementalTraining(0.5, 2).start(ks.sparsify(cnn())),
        ValueError,
        "optimizer",
        "not compiled",
        "None",
    ),
    ("n of m, n too large", lambda: granularity.n_m(4, 4), ValueError, "n", "below m, 4", "4"),
    ("n of m, n zero", lambda: granularity.get("0:4"), ValueError, "n", ">= 1", "0"),
    ("block of nothing", lambda: granularity.block(0, 4), ValueError, "rows", ">= 1", "0"),
    ("block of halves", lambda: granularity.block(2, 0.5), TypeError, "columns", "integer", "0.5"),
    (
        "one layer after another at once",
        lambda: fit_with(allocation="layerwise_constant"),
        ValueError,
        "schedule",
        "end_step",
        "OneShot",
    ),
    ("weights a list", lambda: fit_with(weights=["kernel"]), TypeError, "weights", "dict", "['kernel']"),
    ("weights unmatched", lambda: fit_with(weights={"cnov": "k"}), ValueError, "weights", "'conv'", "'cnov'"),
    ("weight unknown", lambda: fit_with(weights={"dense": "w"}), ValueError, "weights", "'bias' (3,)", "'w'"),
    ("prune everything", lambda: ks.prune(cnn(), 1.0), ValueError, "sparsity", "[0, 1)", "1.0"),
    ("prune how much", lambda: ks.prune(cnn()), ValueError, "sparsity", "given", "None"),
    (
        "prune layer by layer",
        lambda: ks.prune(cnn(), 0.5, None, "l2", "layerwise_constant"),
        ValueError,
        "schedule",
        "end_step",
        "0.5",
    ),
    ("prune less than 2:4", lambda: ks.prune(cnn(), 0.3, "2:4"), ValueError, "schedule", "at least 0.5", "0.3"),
    ("prune an unbuilt model", lambda: ks.prune(keras.Sequential(name="s"), 0.5), ValueError, "model", "built", "'s'"),
    ("prune nothing", lambda: ks.prune(cnn(), 0.5, include="cnov"), ValueError, "include", "'conv'", "'cnov'"),
    ("saliency of no data", lambda: ks.criteria.Saliency(None), TypeError, "data", "arrays (x, y)", "None"),
    ("saliency of no batch", lambda: ks.criteria.Saliency([], batches=0), ValueError, "batches", ">= 1", "0"),
    (
        "saliency without a loss",
        lambda: ks.prune(cnn(), 0.5, criterion=ks.criteria.Saliency([1])),
        ValueError,
        "loss",
        "not compiled",
        "None",
    ),
    ("scores a list", lambda: ks.criteria.Given([1.0]), TypeError, "scores", "dict of arrays", "[1.0]"),
    (
        "scores of a wrong shape",
        lambda: ks.prune(cnn(), 0.5, criterion=lambda kernel, name: kernel[0]),
        ValueError,
        "scores",
        "(3, 3, 2, 4)",
        "(3, 2, 4)",
    ),
    (
        "RigL by scores",
        lambda: ks.callbacks.SET(0.5, 900, allocation="global"),
        ValueError,
        "allocation",
        "'erk'",
        "'global'",
    ),
    ("SET ends first", lambda: ks.callbacks.SET(0.5, 9, 9), ValueError, "end_step", "begin_step, 9", "9"),
    ("SET never fires", lambda: ks.callbacks.SET(0.5, 9), ValueError, "frequency", "at most", "100"),
    ("schedule a float", lambda: ks.callbacks.GradualPruning(0.9), TypeError, "schedule", "Schedule", "0.9"),
    ("unknown norm", lambda: ks.criteria.Magnitude("l3"), ValueError, "norm", "'l1', 'l2'", "'l3'"),
    ("seed < 0", lambda: ks.criteria.Random(-1), ValueError, "seed", ">= 0", "-1"),
    ("unknown criterion", lambda: fit_with(criterion="biggest"), ValueError, "criterion", "'magnitude'", "'biggest'"),
    ("criterion an int", lambda: fit_with(criterion=2), TypeError, "criterion", "Criterion", "2"),
    ("unknown allocation", lambda: fit_with(allocation="fair"), ValueError, "allocation", "'uniform'", "'fair'"),
    ("allocation None", lambda: fit_with(allocation=None), TypeError, "allocation", "Allocation", "None"),
    ("unknown granularity", lambda: sparse_layer(granularity="tap"), ValueError, "granularity", "'group'", "'tap'"),
    ("granularity an int", lambda: sparse_layer(granularity=3), TypeError, "granularity", "Granularity", "3"),
    (
        "kernel of rank 1",
        lambda: granularity.get("weight").mask_shape((3,)),
        ValueError,
        "kernel_shape",
        "axis",
        "(3,)",
    ),
    ("keep too many", lambda: granularity.get("weight").mask(np.ones((2, 2)), 5), ValueError, "keep", "at most", "5"),
    ("keep < 0", lambda: granularity.get("weight").mask(np.ones((2, 2)), -1), ValueError, "keep", ">= 0", "-1"),
    (
        "previous mask of another size",
        lambda: granularity.get("weight").mask(np.ones((2, 2)), 1, np.ones((1, 3))),
        ValueError,
        "previous",
        "shape of scores",
        "(1, 3)",
    ),
    ("mask initializer None", lambda: sparse_layer(mask_initializer=None), ValueError, "mask_initializer", "", "None"),
    (
        "mask of halves",
        lambda: sparse_layer().assign_mask(np.full((1, 1, 2, 4), 0.5)),
        ValueError,
        "mask",
        "zeros",
        "0.5",
    ),
    (
        "mask of a wrong shape",
        lambda: sparse_layer().assign_mask(np.ones((2, 4))),
        ValueError,
        "mask",
        "shape",
        "(2, 4)",
    ),
    (
        "initial mask not binary",
        lambda: sparse_layer(mask_initializer="glorot_uniform"),
        ValueError,
        "mask_initializer",
        "zeros and ones",
        "",
    ),
    ("random mask of nothing", lambda: ks.initializers.RandomMask(1.0), ValueError, "sparsity", "[0, 1)", "1.0"),
    ("include matches nothing", lambda: ks.sparsify(cnn(), include="cnov"), ValueError, "include", "'conv'", "'cnov'"),
    ("include cannot", lambda: ks.sparsify(cnn(), include="flat"), ValueError, "include", "'flat' (Flatten)", "'flat'"),
    ("exclude matches nothing", lambda: ks.sparsify(cnn(), exclude="x.*"), ValueError, "exclude", "layer", "'x.*'"),
    ("pattern broken", lambda: ks.sparsify(cnn(), include="(conv"), ValueError, "include", "regular", "'(conv'"),
    ("pattern a number", lambda: ks.sparsify(cnn(), include=[3]), TypeError, "include", "layer names", "3"),
    ("all excluded", lambda: ks.sparsify(cnn(), exclude=".*"), ValueError, "model", "Conv2D or Dense", "'cnn'"),
    ("sparsify a layer", lambda: ks.sparsify(keras.layers.Dense(2)), TypeError, "model", "Keras model", "Dense"),
    ("sparsify a subclass", lambda: ks.sparsify(Subclassed()), ValueError, "model", "Sequential", "'subclassed'"),
    ("strip a subclass", lambda: ks.strip(Subclassed()), ValueError, "model", "GradualPruning", "'subclassed'"),
    ("shrink a layer", lambda: ks.shrink(keras.layers.Dense(2)), TypeError, "model", "Keras model", "Dense"),
    ("shrink a subclass", lambda: ks.shrink(Subclassed()), ValueError, "model", "Sequential", "'subclassed'"),
    ("shrink unbuilt", lambda: ks.shrink(keras.Sequential(name="s")), ValueError, "model", "built", "'s'"),
    ("sparsify unbuilt", lambda: ks.sparsify(keras.Sequential(name="s")), ValueError, "model", "built", "'s'"),
    ("multiplier 0", lambda: ks.depth_multiplier(cnn(), 0), ValueError, "multiplier", "(0, 1]", "0.0"),
    ("multiplier 1.5", lambda: ks.depth_multiplier(cnn(), 1.5), ValueError, "multiplier", "(0, 1]", "1.5"),
    ("multiplier text", lambda: ks.depth_multiplier(cnn(), "half"), TypeError, "multiplier", "(0, 1]", "'half'"),
    ("of units", lambda: ks.depth_multiplier(cnn(), 0.5, of="units"), ValueError, "of", "'connections'", "'units'"),
    ("multiply a subclass", lambda: ks.depth_multiplier(Subclassed(), 1), ValueError, "model", "Sequential", "'subcl"),
    (
        "multiply a layer",
        lambda: ks.depth_multiplier(keras.layers.ReLU(), 1),
        TypeError,
        "model",
        "Keras model",
        "ReLU",
    ),
    (
        "multiply unbuilt",
        lambda: ks.depth_multiplier(keras.Sequential(name="s"), 1),
        ValueError,
        "model",
        "built",
        "'s'",
    ),
    (
        "rounded to nothing",
        lambda: ks.depth_multiplier(cnn(), 0.2, rounding=int),
        ValueError,
        "rounding",
        "the 0.8 filters of 'conv'",
        "0",
    ),
    (
        "multiply nothing",
        lambda: ks.depth_multiplier(cnn(), 0.5, exclude="conv"),
        ValueError,
        "model",
        "hold a convolution",
        "'cnn'",
    ),
    (
        "multiply a pool",
        lambda: ks.depth_multiplier(cnn(), 0.5, include="flat"),
        ValueError,
        "include",
        "'flat' (Flatten) cannot",
        "'flat'",
    ),
    ("tables of density 0", lambda: ks.random_tables(ks.sparsify(cnn()), 0), ValueError, "density", "(0, 1]", "0.0"),
    ("tables of density 2", lambda: ks.random_tables(ks.sparsify(cnn()), 2), ValueError, "density", "(0, 1]", "2.0"),
    ("density text", lambda: ks.random_tables(cnn(), "0.1"), TypeError, "density", "(0, 1]", "'0.1'"),
    ("tables of no table", lambda: ks.random_tables(cnn(), 0.1), ValueError, "model", "'connection'", "'cnn'"),
    (
        "tables of another granularity",
        lambda: ks.random_tables(ks.sparsify(cnn(), "group"), 0.1),
        ValueError,
        "model",
        "ks.sparsify(model, granularity='connection')",
        "'cnn'",
    ),
    (
        "tables unbuilt",
        lambda: ks.random_tables(keras.Sequential(name="s"), 0.1),
        ValueError,
        "model",
        "built",
        "'s'",
    ),
    ("tables of a subclass", lambda: ks.random_tables(Subclassed(), 1.0), ValueError, "model", "Sequential", "'subcl"),
    ("tables of a layer", lambda: ks.random_tables(keras.layers.ReLU(), 1), TypeError, "model", "Keras model", "ReLU"),
    (
        "unknown fan-in",
        lambda: ks.random_tables(ks.sparsify(cnn()), 0.1, fan_in=3),
        ValueError,
        "fan_in",
        "'constant'",
        "3",
    ),
    ("table seed", lambda: ks.random_tables(ks.sparsify(cnn()), 1, seed=-1), ValueError, "seed", ">= 0", "-1"),
    (
        "table of a plain layer",
        lambda: ks.random_tables(ks.sparsify(cnn(), exclude="dense"), 0.1, include="dense"),
        ValueError,
        "include",
        "'dense' (Dense) cannot",
        "'dense'",
    ),
    (
        "tables at density 0",
        lambda: ks.surgery.RandomTables(ks.sparsify(cnn())).masks(0),
        ValueError,
        "density",
        "(0, 1]",
        "0.0",
    ),
    ("targets a list", lambda: fit_with(targets=[0.5]), TypeError, "targets", "dict", "[0.5]"),
    ("target of 1", lambda: fit_with(targets={"conv": 1}), ValueError, "targets['conv']", "[0, 1)", "1"),
    ("target unmatched", lambda: fit_with(targets={"cnov": 0.5}), ValueError, "targets", "'conv'", "'cnov'"),
    ("finer granularity", lambda: fit_with(granularity="weight"), ValueError, "granularity", "'conv'", "'weight'"),
    ("fit too short", lambda: fit_with(schedule=decay()), ValueError, "schedule", "step 100", "PolynomialDecay"),
    ("count unbuilt", lambda: ks.count(keras.Sequential(name="s")), ValueError, "model", "built", "'s'"),
    (
        "count of unknown size",
        lambda: ks.count(keras.Sequential([keras.layers.Input((None, None, 1)), keras.layers.Conv2D(1, 1)])),
        ValueError,
        "input_shape",
        "unknown sizes",
        "None",
    ),
    ("count of a wrong size", lambda: ks.count(cnn(), (5, 5, 2)), ValueError, "input_shape", "(6, 6, 2)", "(5, 5, 2)"),
    ("plot a number", lambda: ks.plot_patterns(3), TypeError, "model", "Keras model or layer", "3"),
    (
        "plot an unbuilt layer",
        lambda: ks.plot_patterns(ks.layers.SparseDense(3)),
        ValueError,
        "model",
        "built",
        "dense",
    ),
    ("plot what is not there", lambda: ks.plot_patterns(cnn(), "x.*"), ValueError, "include", "'conv'", "'x.*'"),
    (
        "plot to no picture",
        lambda: ks.plot_tradeoff({"a": [(0.5, 0.1)]}, path="p.txt"),
        ValueError,
        "path",
        ".png",
        "'p.txt'",
    ),
    ("process of text", lambda: ks.plot_process("history"), TypeError, "history", "list of dicts", "'str'"),
    ("process before a run", lambda: ks.plot_process([]), ValueError, "history", "at least one entry", "[]"),
    ("process of losses", lambda: ks.plot_process([{"loss": 1}]), ValueError, "history", "`sparsity`", "['loss']"),
    ("tradeoff of a list", lambda: ks.plot_tradeoff([(0.5, 0.1)]), TypeError, "curves", "dict", "[(0.5, 0.1)]"),
    ("tradeoff of nothing", lambda: ks.plot_tradeoff({"a": []}), ValueError, "curves['a']", "at least one", "[]"),
    ("tradeoff of sparsity 1", lambda: ks.plot_tradeoff({"a": [(0, 1)]}), ValueError, "curves['a']", "(0, 1]", "0"),
    ("tradeoff of singles", lambda: ks.plot_tradeoff({"a": [0.5]}), TypeError, "curves['a']", "pairs", "[0.5]"),
    ("baseline text", lambda: ks.plot_tradeoff({"a": [(1, 1)]}, "low"), TypeError, "baseline", "number", "'low'"),
    ("unknown backend", lambda: ks.export(cnn(), "x", backend="fast"), ValueError, "backend", "'op'", "'fast'"),
    (
        "routine of another backend",
        lambda: ks.export(cnn(), "x", backend="compact", routine="thinned"),
        ValueError,
        "routine",
        "'auto'",
        "'thinned'",
    ),
    ("routine dense", lambda: ks.export(cnn(), "x", routine="dense"), ValueError, "routine", "'auto'", "'dense'"),
    ("batch 0", lambda: ks.export(cnn(), "x", batch_size=0), ValueError, "batch_size", ">= 1", "0"),
    ("no batch", lambda: ks.export(cnn(), "x", batch_size=[]), ValueError, "batch_size", "at least one", "[]"),
    ("export a subclass", lambda: ks.export(Subclassed(), "x"), ValueError, "model", "Sequential", "'subclassed'"),
    ("load nothing", lambda: ks.load("no/such/place"), FileNotFoundError, "path", "SavedModel", "'no/such/place'"),
    ("index of 9 bits", lambda: ks.storage.CSR(9), ValueError, "index_bits", "at most 8", "9"),
    ("index of 0 bits", lambda: ks.storage.CSR(0), ValueError, "index_bits", ">= 1", "0"),
    ("block of 0", lambda: ks.storage.BlockCSR((4, 0)), ValueError, "block_shape", ">= 1", "0"),
    ("block an int", lambda: ks.storage.BitMask(4), TypeError, "block_shape", "list of sizes", "4"),
    (
        "block of too high a rank",
        lambda: ks.storage.encode(np.ones(4), ks.storage.BlockCSR((2, 2))),
        ValueError,
        "block_shape",
        "at most as many sizes",
        "(2, 2)",
    ),
    ("unknown encoding", lambda: ks.storage.encode(KERNEL, "zip"), ValueError, "encoding", "'bitmask'", "'zip'"),
    ("encoding an int", lambda: ks.storage.nbytes(KERNEL, 4), TypeError, "encoding", "Encoding", "4"),
    ("encode text", lambda: ks.storage.encode(np.array(["a"])), ValueError, "array", "float32", "'str32'"),
    ("encode twos", lambda: ks.storage.encode(2 * KERNEL, "binary"), ValueError, "array", "zeros and ones", "2.0"),
    (
        "save a layer",
        lambda: ks.save_compressed(keras.layers.Dense(2), "x"),
        TypeError,
        "model",
        "Keras model",
        "Dense",
    ),
    ("save unbuilt", lambda: ks.save_compressed(Subclassed(), "x"), ValueError, "model", "built", "'subclassed'"),
    ("save to a folder", lambda: ks.save_compressed(cnn(), "."), IsADirectoryError, "path", "be a file", "'.'"),
    (
        "load other things",
        lambda: ks.load_compressed(__file__),
        ValueError,
        "path",
        "ks.save_compressed",
        "errors_test",
    ),
    ("checkpoint at 1", lambda: checkpoint(1.0), ValueError, "target_sparsity", "[0, 1)", "1.0"),
    ("stopping at 90", lambda: stopping(90), ValueError, "target_sparsity", "[0, 1)", "90"),
    ("tolerance < 0", lambda: stopping(0.9, tolerance=-1), ValueError, "tolerance", "[0, 1]", "-1"),
    ("board never", lambda: ks.callbacks.SparsityTensorBoard(update_freq=0), ValueError, "update_freq", ">= 1", "0"),
    (
        "board daily",
        lambda: ks.callbacks.SparsityTensorBoard("x", "day"),
        ValueError,
        "update_freq",
        "'epoch'",
        "'day'",
    ),
    ("convert a layer", lambda: tfmot.convert_model(keras.layers.Dense(2)), TypeError, "model", "tf_keras", "Dense"),
    (
        "convert a subclass",
        lambda: tfmot.convert_model(Subclassed()),
        ValueError,
        "model",
        "Sequential",
        "'subclassed'",
    ),
    (
        "convert our schedule",
        lambda: tfmot.convert_schedule(decay()),
        TypeError,
        "pruning_schedule",
        "PolynomialDecay or ConstantSparsity",
        "PolynomialDecay",
    ),
    ("pack a matrix", lambda: packing.thinned_filter(np.ones((3, 3))), ValueError, "kernel", "rank 4", "(3, 3)"),
    ("lambda < 0", lambda: ks.regularizers.GroupLasso(-0.1), ValueError, "lambda_", ">= 0", "-0.1"),
    ("lambda text", lambda: ks.regularizers.GroupLasso("big"), TypeError, "lambda_", "number", "'big'"),
    ("theta < 0", lambda: ks.regularizers.TruncatedGroupLasso(theta=-1), ValueError, "theta", ">= 0", "-1"),
    ("theta nan", lambda: ks.regularizers.TruncatedGroupLasso(theta=np.nan), ValueError, "theta", "finite", "nan"),
    (
        "lasso of taps",
        lambda: ks.regularizers.GroupLasso(granularity="tap"),
        ValueError,
        "granularity",
        "'group'",
        "'tap'",
    ),
    (
        "no regularizer",
        lambda: ks.callbacks.Regularization(None),
        TypeError,
        "regularizer",
        "Keras regularizer",
        "None",
    ),
    ("delta 0", lambda: damage(delta=0), ValueError, "delta", "(0, 1)", "0"),
    ("delta 1", lambda: damage(delta=1.0), ValueError, "delta", "(0, 1)", "1.0"),
    ("epsilon < 0", lambda: damage(epsilon=-1), ValueError, "epsilon", ">= 0", "-1"),
    ("damage lambda < 0", lambda: damage(lambda_=-1), ValueError, "lambda_", ">= 0", "-1"),
    ("quantile 0", lambda: damage(quantile=0), ValueError, "quantile", "(0, 1]", "0"),
    ("patience 0", lambda: damage(patience=0), ValueError, "patience", ">= 1", "0"),
    (
        "no held-out",
        lambda: damage((np.zeros((0, 2)), np.zeros(0))),
        ValueError,
        "validation_data",
        "at least one",
        "0 examples",
    ),
    (
        "one held-out",
        lambda: damage((np.zeros((1, 2)), np.zeros(1))),
        ValueError,
        "validation_data",
        "two",
        "1 examples",
    ),
    ("held-out uneven", lambda: damage((np.zeros(3), np.zeros(2))), ValueError, "validation_data", "as many", "[2, 3]"),
    ("held-out alone", lambda: damage(np.zeros((4, 2))), TypeError, "validation_data", "(x, y)", "'ndarray'"),
    ("report nothing", lambda: damage(report_data=([], [])), ValueError, "report_data", "at least one", "0 examples"),
    ("monitor unknown", lambda: fit_damaged(), ValueError, "monitor", "'mae'", "'accuracy'"),
    ("damage dense", lambda: fit_damaged(include="flat"), ValueError, "include", "'flat' (Flatten)", "'flat'"),
    ("pattern unknown", lambda: ks.criteria.FixedPattern("star"), ValueError, "pattern", "'diamond'", "'star'"),
    ("fixed pattern a number", lambda: ks.criteria.FixedPattern(3), ValueError, "pattern", "array", "3"),
    ("pattern of halves", lambda: ks.criteria.FixedPattern([[0.5]]), ValueError, "pattern", "0 and 1", "[[0.5]]"),
    (
        "pattern ragged",
        lambda: ks.criteria.FixedPattern(["#", "##"]),
        ValueError,
        "pattern",
        "one length",
        "['#', '##']",
    ),
    ("pattern empty", lambda: ks.criteria.FixedPattern(["..", ".."]), ValueError, "pattern", "one tap", "['..', '..']"),
    (
        "pattern outside",
        lambda: ks.criteria.FixedPattern(["#..", "...", "..."]).taps(1),
        ValueError,
        "pattern",
        "size (1, 1)",
        "['#..', '...', '...']",
    ),
    ("kernel size 0", lambda: ks.criteria.FixedPattern("cross").taps((3, 0)), ValueError, "kernel_size", ">= 1", "0"),
    (
        "kernel size 3D",
        lambda: ks.criteria.FixedPattern("cross").taps((3, 3, 3)),
        ValueError,
        "kernel_size",
        "pair",
        "(3, 3, 3)",
    ),
    (
        "pattern of connections",
        lambda: ks.criteria.FixedPattern("cross").scores(KERNEL, granularity.get("connection")),
        ValueError,
        "granularity",
        "'group'",
        "'connection'",
    ),
    (
        "pattern mask of connections",
        lambda: sparse_layer(mask_initializer=ks.initializers.PatternMask("cross")),
        ValueError,
        "shape",
        "'group'",
        "(1, 1, 2, 4)",
    ),
    ("groups do not divide", lambda: packing.connection_table(KERNEL, 4), ValueError, "groups", "divide", "4"),
]


@pytest.mark.parametrize(
    ("call", "error", "argument", "rule", "received"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_wrong_argument(call, error, argument, rule, received, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert f"`{argument}` must " in message
    assert rule in message
    assert re.search(r"Received: \S", message) and received in message.split("Received: ")[1]
    assert not list(tmp_path.iterdir()), "an error left something behind"


def test_the_table_is_long_enough():
    assert len(CASES) >= 40 and len({case[0] for case in CASES}) == len(CASES)


def test_allocation_and_criterion_stubs_say_what_to_define():
    with pytest.raises(NotImplementedError, match="must define `allocate"):
        allocation.Allocation().allocate(0.5, [])
    with pytest.raises(NotImplementedError, match="must define `__call__"):
        ks.schedules.Schedule(0, 1, 1)(0)
