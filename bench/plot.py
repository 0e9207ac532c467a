"""A picture of a benchmark's JSON line: bars for a slide.

    python -m bench.ablate --out ablate.json && python -m bench.plot ablate.json ablate.svg
    python -m bench.peers --out peers.json && python -m bench.plot peers.json peers.png

Needs the `bench` extra. The ending of the second file says its kind: svg, png, pdf. Colours are those of Okabe and Ito,
which colour-blind readers tell apart; bars say their ratio, and thin lines show the range of the repeats.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#0072B2", "#E69F00", "#BBBBBB", "#333333"
PAPER = dict(facecolor="white", edgecolor="none", pad=1.5)  # behind a text, so that no line crosses it
PANELS = {  # of an ablation: metric -> title, is more better?
    "tokens_per_s": ("tokens a second", True),
    "first_p50": ("time to first token, p50", False),
    "between_p99": ("time between tokens, p99", False),
}
STYLE = {
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "svg.hashsalt": "folio",  # the same picture from the same figures
}

Record = dict[str, Any]


def ablation(record: Record) -> Figure:
    """A panel a metric, a bar a variant; those that cost most throughput when they are off come first."""
    variants = record["variants"]
    first, *rest = variants
    names = [first, *sorted(rest, key=lambda name: variants[name]["ratio"]["tokens_per_s"])]
    figure = Figure(figsize=(13.3, 1.9 + 0.55 * len(names)), layout="constrained")
    title(figure, "What each technique is worth", about(record))
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (metric, (label, more)) in zip(axes, PANELS.items(), strict=True):
        ratios = [variants[name]["ratio"][metric] for name in names]
        base = variants[first][metric]["median"]
        ranges = [(variants[name][metric]["low"] / base, variants[name][metric]["high"] / base) for name in names]
        bars(axis, ratios, ranges, [BLUE] + [ORANGE] * len(rest), [f"{ratio:.2f}×" for ratio in ratios])
        axis.axvline(1, color=BLUE, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        unit = "tokens/s" if more else "ms"
        axis.set_title(f"{label}, {'more' if more else 'less'} is better", fontsize=12, loc="left")
        axis.set_xlabel(f"1× = {base:,.1f} {unit}", loc="left")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def peers(record: Record) -> Figure:
    """A panel a row of the benchmark, a bar an engine; longer is faster, 1 is the fastest Folio."""
    rows = {name: rated(row) for name, row in record["rows"].items()}
    rows = {name: row for name, row in rows.items() if row}
    engines = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(13.3, 1.4 + lines * (0.8 + 0.4 * len(engines))), layout="constrained")
    title(figure, "Speed beside other engines, Folio = 1", about(record))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axis, (name, row) in zip(grid, rows.items(), strict=False):
        speeds = [1 / row[engine]["folio"] if engine in row else 0.0 for engine in engines]
        texts = [f"{speed:.2f}×" if speed else "–" for speed in speeds]
        colours = [BLUE if engine.startswith("folio") else ORANGE for engine in engines]
        ranges = [speed_range(row[engine]) if engine in row else None for engine in engines]
        bars(axis, speeds, ranges, colours, texts)
        axis.axvline(1, color=BLUE, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axis.set_title(spelt_out(name), fontsize=12, loc="left")
    for axis in grid[len(rows) :]:
        axis.axis("off")
    grid[0].set_yticks(range(len(engines)), engines)
    grid[0].invert_yaxis()
    return figure


def rated(row: Record) -> Record:
    """The engines of a row that have a figure."""
    return {engine: result for engine, result in row.items() if "folio" in result}


def spelt_out(row: str) -> str:
    """A row of bench.peers in words."""
    words = {
        r"b(\d+)": r"decode, batch \1",
        r"prefill(\d+)": r"prefill of \1",
        "shared": "shared prefix: to all first tokens",
        "poisson": "requests at random: tokens a second",
    }
    return next((re.sub(pattern, text, row) for pattern, text in words.items() if re.fullmatch(pattern, row)), row)


def speed_range(result: Record) -> tuple[float, float]:
    """The range of what `folio` is the median of, in the same unit."""
    speed = 1 / result["folio"]
    if "tokens_per_s" in result:
        rate = result["tokens_per_s"]
        return speed * rate["low"] / rate["median"], speed * rate["high"] / rate["median"]
    first = result["first_s"]
    return speed * first["median"] / first["high"], speed * first["median"] / first["low"]


# ---- what both are made of


def bars(
    axis: Axes, values: list[float], ranges: list[tuple[float, float] | None], colours: list[str], texts: list[str]
) -> None:
    """Horizontal bars from the top down, their ranges, and what they say at their ends."""
    axis.barh(range(len(values)), values, height=0.62, color=colours)
    ends = [max(value, span[1] if span else 0) for value, span in zip(values, ranges, strict=True)]
    for i, (span, end, text) in enumerate(zip(ranges, ends, texts, strict=True)):
        if span is not None and span[1] > span[0]:
            axis.plot(span, (i, i), color=INK, linewidth=1.2, solid_capstyle="butt")
        axis.annotate(text, (end, i), (6, 0), textcoords="offset points", va="center", fontweight="bold", bbox=PAPER)
    axis.set_xlim(0, 1.22 * max([*ends, 1]))
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_color(GREY)


def title(figure: Figure, text: str, below: str) -> None:
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
    figure.suptitle(text, fontsize=18, fontweight="bold", x=0.012, ha="left")
    figure.supxlabel(below, fontsize=10, x=0.012, ha="left", color="#666666")


def about(record: Record) -> str:
    """The machine and the model."""
    machine = record.get("device") or record["cpu"]
    threads = f", {record['threads']} thread{'s' * (record['threads'] > 1)}" if machine == record["cpu"] else ""
    repeats = f"median of {record['repeats']}"
    return f"{record['shape']}, {record['dtype']} on {machine}{threads}, torch {record['torch']}; {repeats}"


PICTURES = {"ablate": ablation, "peers": peers}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what a benchmark has written with --out.")
    parser.add_argument("record", type=Path, help=f"the JSON of one of these: {', '.join(PICTURES)}")
    parser.add_argument("picture", type=Path, help="a file that ends in .svg, .png or .pdf")
    args = parser.parse_args(argv)
    if args.picture.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"{args.picture} ends in neither .svg nor .png nor .pdf")
    record = json.loads(args.record.read_text(encoding="utf-8"))
    if record.get("bench") not in PICTURES:
        parser.error(f"no picture for a record of {record.get('bench')!r}; these there are: {', '.join(PICTURES)}")
    rcParams.update(STYLE)
    PICTURES[record["bench"]](record).savefig(args.picture, dpi=150)
    print(args.picture)


if __name__ == "__main__":
    main()
