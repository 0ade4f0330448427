r"""Table 1 of "The Power of Sparsity in Convolutional Neural Networks", its counts computed anew.

    python examples/power_of_sparsity_table1.py            # prints both networks, writes the results; a few minutes

Multiply-adds and parameters of Inception V3 at 299 x 299, without the classifier, for each density and each depth
multiplier that the table lists, beside what the paper prints; then the same for VGG-16n, which section 5.2.3 describes.
Nothing is trained. `docs/results/power_of_sparsity_table1.md` is what it wrote last.
"""

import argparse
import math
import os
import pathlib
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
from keras import layers  # noqa: E402

import keras_sparse as ks  # noqa: E402
from keras_sparse import files  # noqa: E402

# (multiplier, density), multiply-adds, parameters, as printed; a hybrid has both.
SPARSE_ROWS = (
    ((0.5, 0.01), 43.0e6, 90e3),
    ((1.0, 0.003), 82.0e6, 158e3),
    ((1.0, 0.01), 104e6, 287e3),
    ((1.0, 0.03), 208e6, 724e3),
    ((1.0, 0.1), 628e6, 2.3e6),
    ((1.0, 0.3), 1.80e9, 6.6e6),
    ((1.0, 0.6), 3.50e9, 13e6),
    ((1.0, 1.0), 5.70e9, 22e6),
)
MULTIPLIER_ROWS = (
    (0.05, 55.0e6, 56e3),
    (0.1, 75.0e6, 170e3),
    (0.2, 183e6, 718e3),
    (0.3, 439e6, 1.8e6),
    (0.5, 1.40e9, 5.4e6),
    (0.8, 3.40e9, 13e6),
)


def eights(filters):
    """The multiple of 8 at or below a number of filters, and 8 at least."""
    return max(8, int(filters) // 8 * 8)


def inception_v3():
    return keras.applications.InceptionV3(weights=None, input_shape=(299, 299, 3))


def vgg16n():
    """VGG-16 with a 2x2 maximum pooling and a 3x3 convolution of 1024 filters in place of its two layers of 4096.

    Section 5.2.3; batch normalization as in all networks of the paper (section 5.1). The pooling comes after VGG's
    last one: 7x7 maps become 3x3, the convolution makes 1x1 of them, and the classifier follows.
    """

    def convolution(x, filters, padding="same"):
        x = layers.Conv2D(filters, 3, padding=padding, use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization()(x))

    x = inputs = keras.Input((224, 224, 3))
    for filters, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(times):
            x = convolution(x, filters)
        x = layers.MaxPooling2D(2)(x)
    x = convolution(layers.MaxPooling2D(2)(x), 1024, padding="valid")
    return keras.Model(inputs, layers.Dense(1000, name="predictions")(layers.Flatten()(x)), name="vgg16n")


def convolutions(model):
    """Return multiply-adds and kept weights of the convolutions, and how many channels and values they put out."""
    counted = ks.count(model)["layers"]
    found = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    shapes = [layer.output.shape[1:] for layer in found]
    return {
        "madds": sum(counted[layer.name]["madds"] for layer in found),
        "params": sum(counted[layer.name]["nnz"] for layer in found),
        "channels": sum(shape[-1] for shape in shapes),
        "values": sum(math.prod(shape) for shape in shapes),
    }


def with_normalization(counts):
    """Add a scale and a shift for each value, and the four parameters that each channel has for them."""
    return counts["madds"] + 2 * counts["values"], counts["params"] + 4 * counts["channels"]


def narrow(model, multiplier, rounding=None):
    return model if multiplier == 1 else ks.depth_multiplier(model, multiplier, rounding=rounding)


def sparse_counts(model, density):
    """Return the counts at a density, and the density that the tables have in truth."""
    sparse = ks.sparsify(model, granularity="connection", include=layers.Conv2D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the true density is in the table
        true = ks.random_tables(sparse, density)
    return {**convolutions(sparse), "density": true}


def count_network(name, build):
    """Return the rows of one network."""
    model = build()
    sparse, multiplied = [], []
    for (multiplier, density), madds, params in SPARSE_ROWS:
        print(f"  {name}: multiplier {multiplier}, density {density}", flush=True)
        row = {"multiplier": multiplier, "density": density, "paper": {"madds": madds, "params": params}}
        sparse.append({**row, "counts": sparse_counts(narrow(model, multiplier), density)})
    for multiplier, madds, params in MULTIPLIER_ROWS:
        print(f"  {name}: multiplier {multiplier}", flush=True)
        row = {"multiplier": multiplier, "paper": {"madds": madds, "params": params}}
        row["rounded_up"] = convolutions(narrow(model, multiplier))
        row["multiples_of_8"] = convolutions(narrow(model, multiplier, eights))
        multiplied.append(row)
    return {"sparse": sparse, "multiplied": multiplied}


def amount(value):
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def table(header, rows):
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def sparse_table(rows, with_paper):
    lines = []
    for row in rows:
        counts, paper = row["counts"], row["paper"]
        name = f"{row['density']:g}" if row["multiplier"] == 1 else f"{row['multiplier']:g}/{row['density']:g}"
        cells = [name, f"{counts['density']:.3g}"]
        for key, whole in zip(("madds", "params"), with_normalization(counts)):
            cells += [amount(paper[key])] if with_paper else []
            cells += [amount(counts[key]), amount(whole)]
        lines.append(cells)
    header = ["density", "true density"]
    for what in ("MAdds", "params"):
        header += [f"{what}, paper"] if with_paper else []
        header += [what, f"{what} with normalization"]
    return table(header, lines)


def multiplier_table(rows, with_paper):
    lines = []
    for row in rows:
        cells = [f"{row['multiplier']:g}"]
        for key in ("madds", "params"):
            cells += [amount(row["paper"][key])] if with_paper else []
            cells += [amount(row[rounding][key]) for rounding in ("multiples_of_8", "rounded_up")]
        lines.append(cells)
    header = ["multiplier"]
    for what in ("MAdds", "params"):
        header += [f"{what}, paper"] if with_paper else []
        header += [f"{what}, multiples of 8", f"{what}, rounded up"]
    return table(header, lines)


def farthest(rows):
    """Return how far from the paper's counts those with normalization are at most, and those without, as ratios."""
    ratios = []
    for row in rows:
        own = (row["counts"]["madds"], row["counts"]["params"]), with_normalization(row["counts"])
        printed = row["paper"]["madds"], row["paper"]["params"]
        ratios.append([max(max(a / b, b / a) for a, b in zip(counts, printed)) for counts in own])
    return [max(column) - 1 for column in zip(*ratios)]


def page(results):
    inception, vgg = results["inception_v3"], results["vgg16n"]
    whole, vgg_whole = (network["sparse"][-1]["counts"] for network in (inception, vgg))
    without, with_it = farthest(inception["sparse"])
    smaller = vgg["vgg16"] / vgg["with_classifier"]
    return f"""# Table 1 of The Power of Sparsity, its counts

Written by `python examples/power_of_sparsity_table1.py`. Counts are those of `ks.count`: multiply-adds and
kept weights of the convolutions, without the classifier, which the paper leaves out as well. "0.5/0.01" is
the hybrid of a multiplier and a density.

## Inception V3, 299 x 299

Whole: {whole["madds"]:,} MAdds and {whole["params"]:,} weights; the paper's 5.7 B and 22 M.

{sparse_table(inception["sparse"], True)}

{multiplier_table(inception["multiplied"], True)}

**Multipliers.** Section 3.1 rounds the filters up, and so does `ks.depth_multiplier`. The table does not:
with filters rounded *down to multiples of 8, and 8 at least*, the counts are the printed ones to the last
digit from 0.05 to 0.3, and agree with the coarser printed figures at 0.5 and 0.8. `rounding=lambda n: max(8,
int(n) // 8 * 8)` makes these networks.

**Densities.** A density of 0.003 or 0.01 is too low for the layers with few channels: they hold the smallest
tables without dead channels, which is why MAdds fall by less than the density (the first layers have few
channels and many pixels). The paper's counts at low densities are higher still, by 62 to 71 thousand weights
and 19 to 30 million MAdds up to 0.03, and the hybrid, which has half the channels, by half as much: a cost of
each channel, not of connections. Batch normalization is of that size. With four parameters for each channel
and two MAdds for each value that a convolution puts out, no row differs from the paper by more than
{with_it:.0%}, against {without:.0%} without. That the paper counts it in this half of its table is our
reading; the other half does not. What is left may come from how tables are drawn in layers whose density
gives them less than a connection for each channel. The paper does not say.

## VGG-16n, 224 x 224

VGG-16 with a 2x2 maximum pooling and a 3x3 convolution of 1024 filters in place of its two dense layers of
4096 (section 5.2.3). Whole: {vgg_whole["madds"]:,} MAdds and {vgg_whole["params"]:,} weights. With
normalization and a classifier of 1000 classes it has {vgg["with_classifier"]:,} parameters, {smaller:.1f}
times fewer than the {vgg["vgg16"]:,} of VGG-16: "about 7 times fewer". The paper has a figure of it and no
table.

{sparse_table(vgg["sparse"], False)}

{multiplier_table(vgg["multiplied"], False)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("docs/results"), help="folder for the results"
    )
    args = parser.parse_args()
    results = {"inception_v3": count_network("Inception V3", inception_v3), "vgg16n": count_network("VGG-16n", vgg16n)}
    plain = keras.applications.VGG16(weights=None)
    results["vgg16n"]["vgg16"] = plain.count_params()
    results["vgg16n"]["with_classifier"] = vgg16n().count_params()
    text = page(results)
    files.write_json(args.output / "power_of_sparsity_table1.json", results)
    with files.replacing(args.output / "power_of_sparsity_table1.md") as staging:
        pathlib.Path(staging).write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
