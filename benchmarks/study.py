"""The losses side by side: the same stage 1, the same number of steps, several seeds, one table.

    python benchmarks/study.py grammar                                   # hours on a CPU; what is there already is not done again
    python benchmarks/study.py grammar --seeds 0 1 2 --only psd esd
    python benchmarks/study.py grammar --table --folder results/study    # of what is there, here of what is recorded
    python benchmarks/study.py words --only psd psd-squared --frontier   # and at equal entropy
    python benchmarks/study.py words --table --baseline psd-squared      # beside the peers' recipe

Each run is of the programs that a user calls, its folder runs/study/STUDY/SEED/RUN. The table gives means over seeds of stage 1
and stage 2 (and sampling) together, and the smallest and the largest; of the first score also what a run has more than --baseline
from the same stage 1, since seeds of stage 1 differ more than losses do, and with --frontier that at equal entropy too, to which SWEEP
brings the lower. Flags and numbers are in the runs' own config.json, evaluation.json and frontier.json.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import at_entropy, load_pyplot, table
from model import read_checkpoint
from prepare_data import Parser, UserError, number, run
from sample import check_output

ROOT = Path(__file__).parent.parent
# What raises a run's entropy to another's at any number of steps, one too.
SWEEP = "--nfe 1 2 4 --final-temperature 0 0.5 0.75 1 1.25 1.5"
PLAIN = "--no-learned-weight --consistency-power 0"
# Every run, a folder each: its flags beyond those that all share. Stage 1 by three noise schedules, of which stage 2 starts from
# the first; calibrated: on the loss measured each 500 steps.
STAGE1 = {
    "diagonal": "",
    "diagonal-linear": "--schedule linear",
    "diagonal-calibrated": "--schedule calibrated --val-every 500",
}
# Stage 2: first the method's losses, each by the target
# and the weights that served it best, then the peers' recipe, squared distance between probabilities with an adaptive
# weight; then the same weights for all, what stage 1's denoiser is worth on the diagonal, and cures for ESD.
STAGE2 = {
    "psd": f"--loss psd {PLAIN}",
    "lsd": f"--loss lsd --target signed {PLAIN}",
    "esd": "--loss esd",
    "psd-squared": "--loss psd --divergence square --no-learned-weight",
    "psd-weighted": "--loss psd",
    "lsd-logit": f"--loss lsd {PLAIN}",
    "esd-plain": f"--loss esd {PLAIN}",
    "psd-diagonal-from-data": f"--loss psd {PLAIN} --diagonal-from data",
    "esd-psd-share": "--loss esd --psd-share 0.25",
    "esd-signed": f"--loss esd --target signed {PLAIN}",
    "esd-signed-psd-share": f"--loss esd --target signed --psd-share 0.25 {PLAIN}",
    "esd-ema-teacher": "--loss esd --teacher ema",
    "esd-self-teacher": "--loss esd --teacher self",
    "esd-clamp-0.01": "--loss esd --clamp 0.01",
    "esd-clamp-0.1": "--loss esd --clamp 0.1",
    "esd-pair-law": "--loss esd --step-law pair",
}
STUDIES = {
    "grammar": {
        "data": "data/grammar",
        "both": "--batch-size 128 --micro-batch 128 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 100",
        "stage1": "--size tiny --steps 3000 --warmup 100 --cooldown 2900 --lr 2.5e-3",
        "stage2": "--steps 800 --warmup 200 --cooldown 600 --lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125",
        "evaluate": "--nfe 1 2 4 8 16 128 --batch-size 512 --bleu-samples 0",
        "scores": ["grammatical", "entropy", "distinct"],
    },
    "stories": {
        "data": "data/stories",
        "both": "--batch-size 32 --micro-batch 32 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 100",
        "stage1": "--size tiny --steps 2500 --warmup 100 --cooldown 2000 --lr 2e-3",
        "stage2": "--steps 500 --warmup 100 --cooldown 400 --lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125",
        "evaluate": "--nfe 1 2 4 8 32 128 --batch-size 256 --num-samples 256 --bleu-samples 0 --judge runs/judge-stories --judge-batch 64",
        "scores": ["gen_ppl", "entropy", "distinct_4"],
    },
    "words": {
        "data": "data/words",
        "both": "--compile --batch-size 32 --micro-batch 32 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 100",
        "stage1": "--size tiny --steps 2500 --warmup 100 --cooldown 2000 --lr 2e-3",
        "stage2": "--steps 500 --warmup 100 --cooldown 400 --lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125",
        "evaluate": "--nfe 1 2 4 8 32 128 --batch-size 256 --num-samples 256 --bleu-samples 0 --judge runs/judge-words --judge-batch 64",
        "scores": ["gen_ppl", "entropy", "distinct_4"],
    },
    "bpe": {
        "data": "data/bpe",
        "both": "--dtype bfloat16 --compile --batch-size 32 --micro-batch 32 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 100",
        "stage1": "--size tiny --steps 2000 --warmup 100 --cooldown 1700 --lr 2e-3",
        "stage2": "--steps 250 --warmup 50 --cooldown 200 --lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125",
        "evaluate": "--dtype bfloat16 --nfe 1 2 4 8 32 128 --batch-size 256 --num-samples 128 --bleu-samples 0 "
        "--judge runs/judge-bpe --judge-batch 64",
        "scores": ["gen_ppl", "entropy", "distinct_4"],
    },
}


def spread(values):
    """[{nfe: number or None} of each seed] -> {"N NFE": "mean (smallest to largest)"}."""
    seen = {nfe: [v[nfe] for v in values if v.get(nfe) is not None] for nfe in dict.fromkeys(nfe for v in values for nfe in v)}
    show = lambda x: f"{x:.3f}" if abs(x) < 10 else f"{x:.0f}"  # noqa: E731
    return {f"{nfe} NFE": f"{show(sum(v) / len(v))} ({show(min(v))} to {show(max(v))})" if v else None for nfe, v in seen.items()}


def train_and_evaluate(study, folder, seed, names, frontier=False):
    """Every run of one seed that is not evaluated yet, each in a program of its own; `frontier`: and by SWEEP."""

    def program(name, *flags):
        result = subprocess.run([sys.executable, str(ROOT / name), *" ".join(map(str, flags)).split()])
        if result.returncode:
            raise UserError(f"{name} ended with exit code {result.returncode}; see its own line above")

    def train(name, out, *flags):
        """Train to the end: anew, or on from where a run that was stopped is."""
        there = (out / "checkpoint.pt").exists()
        checkpoint = read_checkpoint(out / "checkpoint.pt") if there else None
        if not there or checkpoint["step"] < checkpoint["args"]["steps"]:
            program(name, *flags, "--resume" * there)

    for name in names:
        out = folder / name
        common = f"--data {study['data']} --out {out} --seed {seed} {study['both']}"
        evaluate = f"--checkpoint {out}/checkpoint.pt --seed {seed} {study['evaluate']}"
        if not (out / "evaluation.json").exists():
            if name in STAGE1:
                train("train_diagonal.py", out, common, study["stage1"], STAGE1[name])
            else:
                train("distill.py", out, common, study["stage2"], f"--checkpoint {folder}/diagonal/checkpoint.pt", STAGE2[name])
            program("evaluate.py", evaluate, "--bound 64" if name in STAGE1 else "")
        if frontier and name in STAGE2 and not (out / "frontier.json").exists():
            program("evaluate.py", evaluate, SWEEP, f"--output {out}/frontier.json")


def gather(study, folder):
    """[{run, seed, scores {nfe: {score: value}}, bound (nats a token) or None, frontier {nfe: (entropies, scores)}}] of all that is evaluated."""
    found = []
    for path in sorted(folder.glob("*/*/evaluation.json")):
        evaluation, sweep = json.loads(path.read_text()), path.with_name("frontier.json")
        scores = {row["nfe"]: {score: row[score] for score in study["scores"]} for row in evaluation["results"] if row["nfe"]}
        lines = json.loads(sweep.read_text())["frontier"] if sweep.exists() else []
        run = {
            "run": path.parent.name,
            "seed": int(path.parent.parent.name),
            "scores": scores,
            "bound": next((line["nats_a_token"] for line in evaluation["bound"]), None),
            "frontier": {line["nfe"]: tuple(np.array(line[key], float) for key in ("entropies", "scores")) for line in lines},
        }
        found.append(run)
    return found


def at_equal_entropy(study, run, other):
    """{nfe: (the first score of `run`, that of `other`)}, each where its sweep meets the larger of the two entropies, if both do."""
    found, text = {}, study["scores"][0] == "gen_ppl"
    for nfe in run["frontier"].keys() & other["frontier"].keys():
        target = max(r["scores"][nfe]["entropy"] for r in (run, other))
        sweeps = ([np.array(part)[:, None] for part in r["frontier"][nfe]] for r in (run, other))
        values = [float(at_entropy(*sweep, target, np.fmax if text else np.fmin)[0]) for sweep in sweeps]
        if np.isfinite(values).all():
            found[nfe] = tuple(np.exp(values) if text else values)
    return found


def compare(study, found, baseline="psd"):
    """The table's rows: each score of each run over seeds, and the first one beside the baseline's of the same seed.

    `baseline` is that of stage 2, of stage 1 it is the paper's schedule. A share grammatical is compared by its difference,
    a perplexity by its ratio.
    """
    first, rows = study["scores"][0], []
    sign, beside = ("/", lambda a, b: a / b) if first == "gen_ppl" else ("-", lambda a, b: a - b)
    by_name = {name: {run["seed"]: run for run in found if run["run"] == name} for name in [*STAGE1, *STAGE2]}
    for name, runs in by_name.items():
        base = "diagonal" if name in STAGE1 else baseline
        pairs = [(run, by_name[base][seed]) for seed, run in runs.items() if seed in by_name[base]] if name != base else []
        values = {score: [{nfe: row[score] for nfe, row in run["scores"].items()} for run in runs.values()] for score in study["scores"]}
        values[f"{first} {sign} {base}"] = [
            {nfe: beside(row[first], other["scores"][nfe][first]) for nfe, row in run["scores"].items()
             if None not in (row[first], other["scores"][nfe][first])} for run, other in pairs
        ]  # fmt: skip
        values[f"{first} {sign} {base}, equal entropy"] = [
            {nfe: beside(*both) for nfe, both in sorted(at_equal_entropy(study, run, other).items())} for run, other in pairs
        ]
        rows += [
            {"run": name, "seeds": len(seen), "score": score} | spread(seen)
            for score, of_seeds in values.items()
            if (seen := [v for v in of_seeds if v])
        ]
        bounds = {"bound, nats a token": [run["bound"] for run in runs.values() if run["bound"]],
                  "bound - diagonal": [run["bound"] - other["bound"] for run, other in pairs if run["bound"]]}  # fmt: skip
        rows += [{"run": name, "seeds": len(b), "score": score, "all NFE": spread([{0: x} for x in b])["0 NFE"]} for score, b in bounds.items() if b]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [dict.fromkeys(columns) | row for row in rows]


def draw(study, found, path):
    """The first score against NFE: a line a run, the mean over seeds, with a band from the smallest to the largest.

    Beside it, for each NFE that was swept, that score against entropy, a line a seed.
    """
    pyplot, first = load_pyplot(), study["scores"][0]
    swept = sorted({nfe for run in found for nfe in run["frontier"]})
    figure, panels = pyplot.subplots(1, 1 + len(swept), figsize=(6 + 2.5 * len(swept), 3.8), layout="constrained", sharey=True, squeeze=False)
    axes, beside = panels[0, 0], dict(zip(swept, panels[0, 1:], strict=True))
    for name in dict.fromkeys([*STAGE1, *STAGE2]):
        runs = [run for run in found if run["run"] == name]
        if runs:
            nfe = sorted(runs[0]["scores"])
            values = [[run["scores"][n][first] for run in runs] for n in nfe]
            (line,) = axes.plot(nfe, [sum(v) / len(v) for v in values], "--" if name in STAGE1 else "-", marker=".", label=name)
            axes.fill_between(nfe, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color(), linewidth=0)
            for n, (entropies, scores) in (sweep for run in runs for sweep in run["frontier"].items()):
                beside[n].plot(entropies, np.exp(scores) if first == "gen_ppl" else scores, marker=".", linewidth=0.8, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network evaluations", ylabel=first.replace("_", " "), yscale="log" if first == "gen_ppl" else "linear")
    axes.legend(frameon=False, fontsize="small")
    for n, panel in beside.items():
        panel.set(xlabel="entropy", title=f"{n} NFE")
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def main():
    parser = Parser(prog="study.py", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2])
    every = [*STAGE1, *STAGE2]
    parser.add_argument("--only", nargs="+", choices=every, metavar="RUN", help="these runs, by name: " + "; ".join(every))
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), metavar="DIR", help="of all studies")
    parser.add_argument("--baseline", choices=list(STAGE2), default="psd", help="the run that those of stage 2 are compared with, where it is there")
    parser.add_argument("--frontier", action="store_true", help="draw tokens at several temperatures too, for scores at equal entropy")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the first score against NFE, and entropy where that was swept, as PNG")
    args = parser.parse_args()
    check_output("--plot", args.plot, [])
    study, folder, names = STUDIES[args.study], args.folder / args.study, dict.fromkeys(["diagonal", *(args.only or every)])
    for seed in [] if args.table else args.seeds:
        train_and_evaluate(study, folder / str(seed), seed, names, args.frontier)
    found = [run for run in gather(study, folder) if run["run"] in names]
    if not found:
        raise UserError(f"no evaluated run in {folder}; leave out --table to train some")
    print(table(compare(study, found, args.baseline)))
    if args.plot:
        draw(study, found, args.plot)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    run(main)
