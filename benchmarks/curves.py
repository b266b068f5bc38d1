"""Draw what runs have logged against their steps, finished or not.

    python benchmarks/curves.py runs/grammar-diagonal runs/grammar-psd     # their losses
    python benchmarks/curves.py runs/owt-esd --keys clamped grad_norm --output health.png

One panel for each key of log.jsonl, with crosses for validation rows.
"""

import argparse
import json
import sys
from pathlib import Path

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


def main():
    parser = argparse.ArgumentParser(
        prog="curves.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders of runs")
    add("--keys", nargs="+", help="what to draw (default: every loss that was logged)")
    add("--output", type=Path, default=Path("loss.png"), help="PNG to write")
    args = parser.parse_args()
    check_output("--output", args.output, [".png"])
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
