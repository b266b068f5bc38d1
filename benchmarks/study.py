"""The losses side by side: the same stage 1, the same number of steps, several seeds, one table.

    python benchmarks/study.py grammar                    # hours on a CPU; continues where it was
    python benchmarks/study.py grammar --seeds 0 1 --only psd esd
    python benchmarks/study.py words --only psd psd-squared --frontier    # and at equal entropy
    python benchmarks/study.py words --table --baseline psd-squared       # of finished runs only

Calls the programs as a user would; each run has the folder runs/study/STUDY/SEED/RUN. The table
gives means over seeds (smallest to largest). Seeds of stage 1 differ more than losses do, so it
also compares the first score with the --baseline of the same seed: gen-PPL by its ratio, the share
grammatical by its difference. A lower entropy makes a better score, so --frontier also draws tokens
at several temperatures and compares two runs at the larger of their two entropies.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import table
from model import checkpoints, read_checkpoint
from prepare_data import Help
from sample import check_output

ROOT = Path(__file__).parent.parent
SWEEP = "--nfe 1 2 4 --temperature 0 0.5 0.75 1 1.25 1.5"  # what --frontier adds
PLAIN = "--no-learned-weight --consistency-power 0"

# Each run's own flags. Stage 2 starts from "diagonal". The first three losses have the target and
# the weights that served each best; psd-squared is the peers' recipe; the others vary one thing.
STAGE1 = {"diagonal": "", "diagonal-linear": "--schedule linear"}
STAGE2 = {
    "psd": f"--loss psd {PLAIN}",
    "lsd": f"--loss lsd --target signed {PLAIN}",
    "esd": "--loss esd",
    "psd-squared": "--loss psd --divergence square --no-learned-weight",
    "psd-weighted": "--loss psd",
    "lsd-logit": f"--loss lsd {PLAIN}",
    "esd-plain": f"--loss esd {PLAIN}",
    "psd-diagonal-from-data": f"--loss psd {PLAIN} --diagonal-from data",
    "esd-signed": f"--loss esd --target signed {PLAIN}",
    "esd-signed-psd-share": f"--loss esd --target signed --psd-share 0.25 {PLAIN}",
}
RUNS = STAGE1 | STAGE2

BOTH = "--beta2 0.99 --ema 0.999 --diagonal-power 0"
DISTIL = "--lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125"
SCORE = "--nfe 1 2 4 8 32 128 --batch-size 256 --judge-batch 64"
TEXT = {
    "data": "data/stories",
    "both": f"{BOTH} --batch-size 32",
    "stage1": "--size tiny --steps 2500 --warmup 100 --cooldown 2000 --lr 2e-3",
    "stage2": f"{DISTIL} --steps 500 --warmup 100 --cooldown 400",
    "evaluate": f"{SCORE} --num-samples 256 --judge runs/judge-stories",
    "scores": ["gen_ppl", "entropy", "distinct_4"],
}
WORDS = {
    "data": "data/words",
    "both": f"{BOTH} --batch-size 32 --compile",
    "evaluate": f"{SCORE} --num-samples 256 --judge runs/judge-words",
}
BPE = {
    "data": "data/bpe",
    "both": f"{BOTH} --batch-size 32 --compile --dtype bfloat16",
    "stage1": "--size tiny --steps 2000 --warmup 100 --cooldown 1700 --lr 2e-3",
    "stage2": f"{DISTIL} --steps 250 --warmup 50 --cooldown 200",
    "evaluate": f"{SCORE} --num-samples 128 --judge runs/judge-bpe --dtype bfloat16",
}
GRAMMAR = {
    "data": "data/grammar",
    "both": f"{BOTH} --batch-size 128 --micro-batch 128",
    "stage1": "--size tiny --steps 3000 --warmup 100 --cooldown 2900 --lr 2.5e-3",
    "stage2": f"{DISTIL} --steps 800 --warmup 200 --cooldown 600",
    "evaluate": "--nfe 1 2 4 8 16 128 --batch-size 512",
    "scores": ["grammatical", "entropy", "distinct"],
}
STUDIES = {"grammar": GRAMMAR, "stories": TEXT, "words": TEXT | WORDS, "bpe": TEXT | BPE}

# ------------------------------------------------------------------------------------------------
# The runs.


def program(name, flags, *more):
    """Run one of the programs to its end; SystemExit if it fails."""
    command = [sys.executable, str(ROOT / name), *flags.split(), *map(str, more)]
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(f"{name} ended with exit code {code}; see its own message above")


def train(study, folder, seed, name):
    """Train folder/name, or what is left to train of it."""
    out = folder / name
    more = ["--data", study["data"], "--out", out, "--seed", seed]
    if checkpoints(out):
        checkpoint = read_checkpoint(out)
        if checkpoint["step"] >= checkpoint["args"]["steps"]:
            return
        more.append("--resume")
    if name in STAGE1:
        program("train_diagonal.py", f"{study['both']} {study['stage1']} {STAGE1[name]}", *more)
    else:
        more += ["--checkpoint", folder / "diagonal"]
        program("distill.py", f"{study['both']} {study['stage2']} {STAGE2[name]}", *more)


def run_seed(study, folder, seed, names, frontier=False):
    """Train and evaluate those runs of one seed that are not evaluated yet."""
    for name in names:
        out = folder / name
        more = ["--checkpoint", out, "--seed", seed]
        if not (out / "evaluation.json").exists():
            train(study, folder, seed, name)
            bound = ["--bound", 64] if name in STAGE1 else []
            program("evaluate.py", study["evaluate"], *more, *bound)
        path = out / "frontier.json"
        if frontier and name in STAGE2 and not path.exists():
            program("evaluate.py", f"{study['evaluate']} {SWEEP}", *more, "--output", path)


# ------------------------------------------------------------------------------------------------
# The table.


def on_text(study):
    return study["scores"][0] == "gen_ppl"


def gather(study, folder):
    """All evaluated runs, a dict each.

    run, seed; scores {nfe: {score: value}}; bound, nats a token or None; frontier
    {nfe: (entropies, scores)}, by temperature, where the score is log gen-PPL or a share.
    """
    found = []
    for path in sorted(folder.glob("*/*/evaluation.json")):
        evaluation = json.loads(path.read_text())
        rows = [row for row in evaluation["results"] if row["nfe"]]
        bounds = [row["nats_a_token"] for row in evaluation["bound"]]
        run = {
            "run": path.parent.name,
            "seed": int(path.parent.parent.name),
            "scores": {row["nfe"]: {s: row[s] for s in study["scores"]} for row in rows},
            "bound": bounds[0] if bounds else None,
            "frontier": {},
        }
        sweep = path.with_name("frontier.json")
        points = {}
        for row in json.loads(sweep.read_text())["results"] if sweep.exists() else []:
            if row["nfe"]:
                point = row["temperature"], row["entropy"], row[study["scores"][0]]
                points.setdefault(row["nfe"], []).append(point)
        for nfe, swept in points.items():
            _, entropies, scores = np.array(sorted(swept), float).T
            run["frontier"][nfe] = entropies, np.log(scores) if on_text(study) else scores
        found.append(run)
    return found


def at_entropy(entropies, scores, target, worst):
    """The score at which a sweep (P,), (P,), linear between its points, has the target entropy.

    NaN if it never has: nothing is extrapolated. If it has it twice, the worse score, by `worst`.
    """
    entropies, scores = np.asarray(entropies, float), np.asarray(scores, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        w = (target - entropies[:-1]) / np.diff(entropies)
        crossings = (scores[:-1] + w * np.diff(scores))[(w >= 0) & (w <= 1)]
    return float(worst(crossings)) if len(crossings) else np.nan


def at_equal_entropy(study, run, other):
    """{nfe: (first score of `run`, of `other`)} at the larger entropy of the two at temperature 0.

    Without the NFE at which a sweep does not reach it.
    """
    found = {}
    worst = np.max if on_text(study) else np.min
    for nfe in sorted(run["frontier"].keys() & other["frontier"].keys()):
        sweeps = run["frontier"][nfe], other["frontier"][nfe]
        target = max(entropies[0] for entropies, _ in sweeps)
        scores = [at_entropy(*sweep, target, worst) for sweep in sweeps]
        if np.isfinite(scores).all():
            found[nfe] = tuple(np.exp(scores) if on_text(study) else scores)
    return found


def spread(values):
    """[{nfe: number or None} of each seed] -> {"N NFE": "mean (smallest to largest)"}."""
    cells = {}
    for nfe in dict.fromkeys(nfe for value in values for nfe in value):
        seen = [value[nfe] for value in values if value.get(nfe) is not None]
        if seen:
            numbers = np.mean(seen), min(seen), max(seen)
            text = [f"{x:.3f}" if abs(x) < 10 else f"{x:.0f}" for x in numbers]
            cells[f"{nfe} NFE"] = f"{text[0]} ({text[1]} to {text[2]})"
    return cells


def compared(study, a, b):
    """The score a beside b: the ratio of gen-PPLs, the difference of shares."""
    if a is None or b is None:
        return None
    return a / b if on_text(study) else a - b


def compare(study, found, baseline="psd"):
    """The table's rows: each score of each run over seeds, and the first one beside a baseline.

    `baseline` is that of stage 2; that of stage 1 is the paper's schedule.
    """
    first = study["scores"][0]
    rows = []
    for name in RUNS:
        runs = [run for run in found if run["run"] == name]
        base = "diagonal" if name in STAGE1 else baseline
        others = {run["seed"]: run for run in found if run["run"] == base != name}
        pairs = [(run, others[run["seed"]]) for run in runs if run["seed"] in others]
        values = {}  # {score: [{nfe: value} of each seed]}
        for score in study["scores"]:
            values[score] = [{n: row[score] for n, row in run["scores"].items()} for run in runs]
        label = f"{first} {'/' if on_text(study) else '-'} {base}"
        values[label] = []
        values[f"{label}, equal entropy"] = []
        for run, other in pairs:
            common = [n for n in run["scores"] if n in other["scores"]]
            both = {n: [r["scores"][n][first] for r in (run, other)] for n in common}
            equal = at_equal_entropy(study, run, other)
            for key, scores in ((label, both), (f"{label}, equal entropy", equal)):
                values[key].append({n: compared(study, *two) for n, two in scores.items()})
        values["bound, nats a token"] = [{"all": run["bound"]} for run in runs if run["bound"]]
        values["bound - diagonal"] = [
            {"all": run["bound"] - other["bound"]} for run, other in pairs if run["bound"]
        ]
        for score, seeds in values.items():
            seeds = [seed for seed in seeds if seed]
            if seeds:
                rows.append({"run": name, "seeds": len(seeds), "score": score} | spread(seeds))
    return rows


def draw(study, found, path):
    """The first score against NFE: means over seeds, with bands from the smallest to the largest.

    Beside it, for each NFE that was swept, that score against entropy, one line a seed.
    """
    from matplotlib.figure import Figure

    first = study["scores"][0]
    swept = sorted({nfe for run in found for nfe in run["frontier"]})
    figure = Figure(figsize=(6 + 2.5 * len(swept), 3.8), layout="constrained")
    panels = figure.subplots(1, 1 + len(swept), sharey=True, squeeze=False)[0]
    axes = panels[0]
    names = {run["run"] for run in found}
    for i, name in enumerate(name for name in RUNS if name in names):
        runs = [run for run in found if run["run"] == name]
        nfe = sorted(runs[0]["scores"])
        values = np.array([[run["scores"][n][first] for n in nfe] for run in runs], float)
        style = "--" if name in STAGE1 else "-"
        axes.plot(nfe, values.mean(0), style, marker=".", label=name, color=f"C{i}")
        axes.fill_between(nfe, values.min(0), values.max(0), alpha=0.15, color=f"C{i}", linewidth=0)
        for run in runs:
            for n, (entropies, scores) in run["frontier"].items():
                panel = panels[1 + swept.index(n)]
                shown = np.exp(scores) if on_text(study) else scores
                panel.plot(entropies, shown, marker=".", linewidth=0.8, color=f"C{i}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network evaluations", ylabel=first.replace("_", " "))
    axes.set_yscale("log" if on_text(study) else "linear")
    axes.legend(frameon=False, fontsize="small")
    for n, panel in zip(swept, panels[1:], strict=True):
        panel.set(xlabel="entropy", title=f"{n} NFE")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("study", choices=list(STUDIES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    help = "these runs beside `diagonal`: " + " ".join(RUNS)
    add("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=help)
    add("--folder", type=Path, default=Path("runs/study"), help="of all studies")
    help = "the run that those of stage 2 are compared with"
    add("--baseline", choices=list(STAGE2), default="psd", metavar="RUN", help=help)
    add("--frontier", action="store_true", help="compare at equal entropy too")
    add("--table", action="store_true", help="train nothing, print the table")
    help = "PNG to draw: the first score against NFE and, after --frontier, against entropy"
    add("--plot", type=Path, help=help)
    args = parser.parse_args()
    if args.plot:
        check_output("--plot", args.plot, [".png"])
    study = STUDIES[args.study]
    folder = args.folder / args.study
    names = list(dict.fromkeys(["diagonal", *args.only]))
    for seed in [] if args.table else args.seeds:
        run_seed(study, folder / str(seed), seed, names, args.frontier)
    found = [run for run in gather(study, folder) if run["run"] in names]
    if not found:
        raise SystemExit(f"no evaluated run in {folder}; drop --table to train some")
    print(table(compare(study, found, args.baseline)))
    if args.plot:
        draw(study, found, args.plot)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    main()
