"""Draw what runs have logged against their steps, or scores by evaluate.py against NFE.

    python benchmarks/curves.py runs/demo-diagonal runs/demo-psd     # their losses
    python benchmarks/curves.py runs/owt-esd --keys clamped grad_norm --output health.png
    python benchmarks/curves.py runs/grammar-dmd/evaluation.json --output scores.png

One panel for each key of log.jsonl, with crosses for validation rows. Runs may be unfinished.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from prepare_data import Help
from sample import check_output

LOSSES = ("diagonal_ce", "diagonal_kl", "consistency_kl", "consistency_square")


def read_log(folder):
    """The lines of a run's log.jsonl as dicts, without a last line that is half written."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise SystemExit(f"no {path}; name folders that train_diagonal.py or distill.py wrote")
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw(logs, keys, path):
    """A picture of {run: its log}, one panel for each key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for key, axes in zip(keys, panels, strict=True):
        for i, (name, log) in enumerate(logs.items()):
            for logged, style, label in ((key, "-", name), (f"val_{key}", "x", None)):
                points = [(line["step"], line[logged]) for line in log if logged in line]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
        axes.set(xlabel="step", title=key)
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_scores(results, path):
    """A picture of NFE against the main score, with the control rows as horizontal lines."""
    from matplotlib.figure import Figure

    on_text = "gen_ppl" in results[0]
    score = "gen_ppl" if on_text else "grammatical"
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = {}
    for row in (row for row in results if row[score] is not None):
        if row["nfe"]:
            knobs = [f", {key} {row[key]:g}" for key in ("gamma", "temperature") if row[key]]
            lines.setdefault(row["model"] + "".join(knobs), []).append(row)
        else:
            axes.axhline(row[score], color="grey", linestyle="--", linewidth=1)
            axes.annotate(row["model"], (1, row[score]), fontsize="small", color="grey")
    for label, rows in lines.items():
        value = np.array([row[score] for row in rows])
        low, high = np.array([row[f"{score}_interval"] or [row[score]] * 2 for row in rows]).T
        error = np.clip([value - low, high - value], 0, None)
        nfe = [row["nfe"] for row in rows]
        axes.errorbar(nfe, value, yerr=error, marker="o", capsize=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network evaluations", yscale="log" if on_text else "linear")
    axes.set_ylabel("generative perplexity" if on_text else "share grammatical")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        prog="curves.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders of runs, or one JSON by evaluate.py")
    add("--keys", nargs="+", help="what to draw (default: every loss that was logged)")
    add("--output", type=Path, default=Path("loss.png"), help="PNG to write")
    args = parser.parse_args()
    check_output("--output", args.output, ".png")
    if args.runs[0].suffix == ".json":
        draw_scores(json.loads(args.runs[0].read_text())["results"], args.output)
        return
    logs = {folder.name: read_log(folder) for folder in args.runs}
    logged = sorted({key for log in logs.values() for line in log for key in line})
    keys = args.keys or [key for key in LOSSES if key in logged]
    missing = [key for key in keys if key not in logged]
    if missing or not keys:
        raise SystemExit(
            f"no run has logged {missing[0] if missing else 'a loss'}; there are: {logged}"
        )
    draw(logs, keys, args.output)
    print(f"{args.output}: {', '.join(keys)}")


if __name__ == "__main__":
    main()
