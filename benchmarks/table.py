"""Turn records of conv_ops.py into Markdown tables: ratios at each batch size, and their geometric means.

python benchmarks/table.py out.json [more.json ...]
"""

import argparse
import json
import pathlib

from common import geometric_mean


def unique(values):
    return list(dict.fromkeys(values))


def table(records):
    densities = unique(r["density"] for r in records)
    batches = unique(r["batch"] for r in records)
    ratios = {(r["layer"], r["density"], r["batch"]): r["ratio"] for r in records}
    lines = [
        f"| layer | {' | '.join(f'd {density:g}' for density in densities)} |",
        "|---" * (len(densities) + 1) + "|",
    ]
    for layer in unique(r["layer"] for r in records):
        cells = ["/".join(f"{ratios[layer, density, batch]:.2g}" for batch in batches) for density in densities]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    for name, chosen in (
        ("geometric mean, 3x3 and 1x7", lambda layer: not layer.endswith("1x1")),
        ("geometric mean, 1x1", lambda layer: layer.endswith("1x1")),
        ("geometric mean, all", lambda layer: True),
    ):
        cells = []
        for density in densities:
            group = [v for (layer, d, _), v in ratios.items() if d == density and chosen(layer)]
            cells.append(f"**{geometric_mean(group):.2f}**" if group else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return batches, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    for path in parser.parse_args().files:
        for run in json.loads(pathlib.Path(path).read_text())["runs"]:
            first = run["records"][0]
            batches, lines = table(run["records"])
            print(
                f"\n### {first['routine']}, {first['pass']}, {run['threads']} thread(s)\n\n"
                f"Batch {'/'.join(map(str, batches))}; measured peak {run['peak_gflops']:.0f} GF/s.\n"
            )
            print("\n".join(lines))


if __name__ == "__main__":
    main()
