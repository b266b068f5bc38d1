"""Draw what runs logged against their steps, from log.jsonl, also of runs that are still going.

    python benchmarks/curves.py runs/grammar-diagonal runs/grammar-psd                    # the losses of both, to loss.png
    python benchmarks/curves.py runs/owt-esd --keys consistency_kl clamped grad_norm --output health.png

One panel a key, crosses for validation rows; a run without that key is left out of its panel.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import load_pyplot
from prepare_data import Parser, UserError, run
from sample import check_output


def read_log(folder):
    """The lines of a run's log.jsonl, a dict each; a last line that is half written is left out."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except OSError as error:
        raise UserError(f"{folder / 'log.jsonl'}: {error.strerror}; name folders that train_diagonal.py or distill.py wrote") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{folder / 'log.jsonl'}, line {number} is not JSON; it is no log of a run") from None
    return found


def main():
    parser = Parser(prog="curves.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="what to draw (default: every loss: diagonal_ce, consistency_kl, ...)")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), metavar="FILE", help="PNG (default: loss.png)")
    args = parser.parse_args()
    logs = {folder: read_log(folder) for folder in args.runs}
    there = dict.fromkeys(key for log in logs.values() for line in log for key in line if key != "step")
    losses = ("diagonal_ce", "diagonal_kl", "consistency_kl", "consistency_square")
    keys = args.keys or [key for key in losses if key in there]
    if missing := [key for key in keys if key not in there]:
        raise UserError(f"no run has logged {missing[0]!r}; there are: {', '.join(there) or 'none yet'}")
    if not keys:
        raise UserError(f"{args.runs[0]} has logged no loss yet; wait for its first line")
    check_output("--output", args.output, [folder / "log.jsonl" for folder in args.runs])
    pyplot = load_pyplot()
    colours = {folder: f"C{i}" for i, folder in enumerate(logs)}
    figure, panels = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 3.6), layout="constrained", squeeze=False)
    for key, axes in zip(keys, panels[0], strict=True):
        for folder, log in logs.items():
            for name, style in ((key, "-"), (f"val_{key}", "x")):
                points = [(line["step"], line[name]) for line in log if name in line]
                if points:
                    label = folder.name + ", validation" * (name != key)
                    axes.plot(*zip(*points, strict=True), style, color=colours[folder], label=label, linewidth=1)
        axes.set(xlabel="step", title=key)
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150, format="png")
    print(f"{args.output}: {', '.join(keys)}")


if __name__ == "__main__":
    run(main)
