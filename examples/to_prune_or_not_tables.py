"""The sizes of Zhu & Gupta, "To prune, or not to prune" (2017): Tables 2, 3, 5 and 6, recomputed beside the paper's.

    python examples/to_prune_or_not_tables.py

MobileNet is Keras's, the language models are those of section 4.2. Nothing is trained: weights are drawn, the smallest
of them pruned in the layers that the paper prunes, and the sizes are those of `ks.storage`. Accuracies and perplexities
are not repeated here; `examples/to_prune_or_not.py` trains small models.
"""

import argparse
import pathlib

import evidence  # first: it quiets TensorFlow
import keras
import numpy as np

import keras_sparse as ks
from keras_sparse import files

OUTPUT = pathlib.Path(__file__).parents[1] / "docs" / "results"
NAME = "to_prune_or_not_tables"

# The paper's, in millions of parameters and MB.
MOBILENETS = {(0.25, 0): 0.46, (0.5, 0): 1.32, (0.75, 0): 2.57, (1.0, 0): 4.21}
MOBILENETS |= {(1.0, 0.5): 2.13, (1.0, 0.75): 1.09, (1.0, 0.9): 0.46, (1.0, 0.95): 0.25}
LANGUAGE_MODELS = {("small", 0): 4.6, ("medium", 0): 19.8, ("large", 0): 66.0}
LANGUAGE_MODELS |= {("medium", s): p for s, p in ((0.8, 4.0), (0.85, 3.0), (0.9, 2.0), (0.95, 1.0), (0.975, 0.5))}
LANGUAGE_MODELS |= {("large", s): p for s, p in ((0.8, 13.2), (0.85, 9.9), (0.9, 6.6), (0.95, 3.3), (0.975, 1.7))}
OVERHEADS = {0.5: (0.52, 1.06), 0.75: (0.52, 0.54), 0.9: (0.52, 0.23), 0.95: (0.52, 0.13)}
SIZES = {(0.75, 0): 10.28, (0.5, 0): 5.28, (0.25, 0): 1.84}
SIZES |= {(1.0, 0.5): 9.04, (1.0, 0.75): 4.88, (1.0, 0.9): 2.07, (1.0, 0.95): 1.13}
UNITS = {"small": 200, "medium": 650, "large": 1500}
VOCABULARY = 10_000


def language_model(units):
    """An embedding, two LSTM layers and a softmax (section 4.2)."""
    parts = [keras.Input((20,), dtype="int32"), keras.layers.Embedding(VOCABULARY, units)]
    parts += [keras.layers.LSTM(units, return_sequences=True) for _ in range(2)]
    return keras.Sequential([*parts, keras.layers.Dense(VOCABULARY)])


def is_pruned(layer, weight):
    """Whether the paper prunes a weight: neither the first nor depthwise convolutions, no bias, no normalisation."""
    first = isinstance(layer, keras.layers.Conv2D) and layer.kernel_size != (1, 1)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return len(weight.shape) >= 2 and not first and not depthwise


def pruned_weights(model, sparsity):
    """Return `[(layer, array, pruned)]` of a model whose smallest weights are zero, layer by layer."""
    found = []
    for layer in ks.selection.flatten_layers(model).values():
        inner = {id(w) for child in getattr(layer, "_layers", []) for w in child.weights}
        for weight in layer.weights:
            if id(weight) in inner:
                continue
            array, pruned = np.asarray(weight), is_pruned(layer, weight)
            if pruned and sparsity:
                keep = ks.allocation.units_to_keep(array.size, sparsity)
                array = array * ks.granularity.get("weight").mask(np.abs(array), keep)
            found.append((layer, array, pruned))
    return found


def describe(model, sparsity):
    """Return the sizes of a model pruned to a sparsity."""
    counted = {"params": 0, "nnz": 0, "matrix": 0, "matrix_nnz": 0, "normalisation": 0, "vectors": 0}
    sizes = {name: 0 for name in ("bitmask", "csr4", "csr5", "smallest")}
    encodings = {"bitmask": ks.storage.BitMask(), "csr4": ks.storage.CSR(4), "csr5": ks.storage.CSR(5)}
    for layer, array, pruned in pruned_weights(model, sparsity):
        nonzero = int(np.count_nonzero(array)) if pruned else array.size
        counted["params"] += array.size
        counted["nnz"] += nonzero
        if isinstance(layer, keras.layers.BatchNormalization):
            counted["normalisation"] += array.size
        elif array.ndim < 2:
            counted["vectors"] += array.size
        else:
            counted["matrix"] += array.size
            counted["matrix_nnz"] += nonzero
        values = array if pruned else np.ones(array.shape, "float32") * 0.5  # zeros as in fresh biases are no sparsity
        smallest = ks.storage.nbytes(values)
        for name in sizes:
            sizes[name] += encodings[name].nbytes(values != 0, 4) if pruned and name != "smallest" else smallest
    return {**counted, "bytes": {"dense": 4 * counted["params"], **sizes}}


def millions(count):
    return f"{count / 1e6:.2f}"


def build(names):
    """Return `{(network, sparsity): sizes}` of all that the tables need."""
    found = {}
    for name in names:
        keras.utils.set_random_seed(0)
        print(f"{name} ...", flush=True)
        if isinstance(name, float):
            model = keras.applications.MobileNet(weights=None, alpha=name)
            sparsities = [s for width, s in MOBILENETS if width == name]
        else:
            model = language_model(UNITS[name])
            sparsities = [s for size, s in LANGUAGE_MODELS if size == name]
        for sparsity in sparsities:
            found[name, sparsity] = describe(model, sparsity)
        del model
    return found


def tables(found):
    """Return the Markdown text."""
    text = [__doc__.split("\n\n")[0], "", "Columns headed *paper* repeat the paper's numbers. MB are 10^6 bytes.", ""]
    text += ["## Table 2: MobileNet", "", table_2(found), NOTES_2.format(**shares(found)), ""]
    text += ["## Table 3: Penn Tree Bank", "", table_3(found), NOTES_3, ""]
    text += ["## Table 5: overheads of sparse MobileNets", "", table_5(found), NOTES_5, ""]
    text += ["## Table 6: sizes of MobileNets", "", table_6(found), NOTES_6, ""]
    return "# Sizes of pruned networks\n\n" + "\n".join(text)


def shares(found):
    dense = found[1.0, 0]
    return {key: f"{dense[key]:,}" for key in ("matrix", "normalisation", "vectors", "params")}


def table_2(found):
    header = ["width", "sparsity", "paper, M", "kernels, M", "all parameters, M", "file contents, MB"]
    rows = [
        [
            width,
            f"{s:.0%}",
            f"{paper:.2f}",
            millions(e["matrix_nnz"]),
            millions(e["nnz"]),
            millions(e["bytes"]["smallest"]),
        ]
        for (width, s), paper in MOBILENETS.items()
        for e in [found[width, s]]
    ]
    return evidence.markdown_table(header, rows)


def table_3(found):
    header = ["model", "sparsity", "paper, M", "nnz, M", "dense, MB", "file contents, MB"]
    rows = [
        [
            size,
            f"{s:.1%}",
            f"{paper:.1f}",
            millions(e["nnz"]),
            millions(e["bytes"]["dense"]),
            millions(e["bytes"]["smallest"]),
        ]
        for (size, s), paper in sorted(
            LANGUAGE_MODELS.items(), key=lambda item: (list(UNITS).index(item[0][0]), item[0][1])
        )
        for e in [found[size, s]]
    ]
    return evidence.markdown_table(header, rows)


def table_5(found):
    header = [
        "sparsity",
        "bit-mask, paper",
        "bit-mask",
        "CSR, paper",
        "4 bits a value",
        "CSR 4 bits",
        "CSR 5 bits",
        "smallest",
    ]
    rows = []
    for s, (mask, csr) in OVERHEADS.items():
        e = found[1.0, s]
        values = 4 * e["nnz"]
        over = {name: millions(size - values) for name, size in e["bytes"].items()}
        plain = millions(e["matrix_nnz"] / 2)
        rows.append([f"{s:.0%}", mask, over["bitmask"], csr, plain, over["csr4"], over["csr5"], over["smallest"]])
    return evidence.markdown_table(header, rows)


def table_6(found):
    header = ["model", "paper, MB", "paper's sum, MB", "bit-mask, MB", "CSR, MB", "file contents, MB"]
    rows = []
    for (width, s), paper in SIZES.items():
        e = found[width, s]
        overhead = min(e["matrix"] / 8, e["matrix_nnz"] / 2) if s else 0
        csr = min(e["bytes"]["csr4"], e["bytes"]["csr5"])
        sizes = [4 * e["matrix_nnz"] + overhead, e["bytes"]["bitmask"], csr, e["bytes"]["smallest"]]
        name = f"width {width}, {s:.0%} sparse" if s else f"width {width}, dense"
        rows.append(
            [
                name,
                f"{paper:.2f}",
                *(millions(size) if s or index not in (1, 2) else "-" for index, size in enumerate(sizes)),
            ]
        )
    return evidence.markdown_table(header, rows)


NOTES_2 = """*kernels* counts kernels alone, {matrix} at width 1, as the paper does: its 4.21M leave out the {vectors}
biases and the {normalisation} numbers of batch normalisation, which Keras counts among {params}. The first and the
depthwise convolutions stay dense. *File contents* are all tensors in their smallest encoding, as `ks.save_compressed`
writes them.
"""
NOTES_3 = """All weights but the biases are pruned. The paper's numbers are those of the kernels, rounded; its sparse
ones are a share of the rounded dense ones.
"""
NOTES_5 = """In MB, without the values. The bit-mask is the paper's, but for the kernels that stay dense, which need
no mask here. The paper's CSR column is 4 bits for each nonzero parameter (*4 bits a value*) and nothing for gaps that
4 bits cannot count. At 90% sparsity every fifth nonzero value follows a gap of more than 15 zeros, at 95% nearly
every second, and each 16 zeros of such a gap need a filler: a value of zero with its index. With these, CSR of 4 bits
loses to the bit-mask up to 75% and to 5 bits beyond. *smallest* chooses for each tensor, wider indices included.
"""
NOTES_6 = """*Paper's sum* is 4 bytes for each nonzero kernel weight and the smaller overhead of Table 5 as the paper
counts it: these are the paper's sizes. The other columns hold what is there: batch normalisation and biases as well,
and the fillers.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="folder for the results")
    args = parser.parse_args()
    found = build([0.25, 0.5, 0.75, 1.0, "small", "medium", "large"])
    args.output.mkdir(parents=True, exist_ok=True)
    records = [{"network": name, "sparsity": s, **entry} for (name, s), entry in found.items()]
    files.write_json(args.output / f"{NAME}.json", {"records": records})
    text = tables(found)
    with files.replacing(args.output / f"{NAME}.md") as staging:
        pathlib.Path(staging).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
