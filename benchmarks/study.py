"""The losses side by side: the same stage 1, the same number of steps, several seeds, one table.

    python benchmarks/study.py grammar                    # hours on a CPU; continues where it was
    python benchmarks/study.py grammar --seeds 0 1 --only psd esd
    python benchmarks/study.py words --only psd psd-squared --entropy 3.1    # at equal entropy
    python benchmarks/study.py words --table --baseline psd-squared       # of finished runs only

Calls the programs as a user would; each run has the folder runs/study/STUDY/SEED/RUN. The table
gives means over seeds (smallest to largest). Seeds of stage 1 differ more than losses do, so it
also compares the first score with the --baseline of the same seed: gen-PPL by its ratio, the share
grammatical by its difference. A lower entropy makes a better score, so --entropy draws tokens at
the temperature that gives an equal one.
"""

import argparse
import json
import shutil
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
PLAIN = "--no-learned-weight --consistency-power 0"

# Each run's own flags. Stage 2 starts from "diagonal". The first three losses have the target and
# the weights that served each best; psd-squared is the peers' recipe; the others vary one thing.
STAGE1 = {"diagonal": "", "diagonal-linear": "--schedule linear"}
STAGE2 = {
    "psd": f"--loss psd {PLAIN}",
    "lsd": f"--loss lsd --form signed {PLAIN}",
    "esd": "--loss esd",
    "psd-squared": "--loss psd --divergence square --no-learned-weight",
    "psd-weighted": "--loss psd",
    "lsd-logit": f"--loss lsd {PLAIN}",
    "esd-plain": f"--loss esd {PLAIN}",
    "psd-diagonal-from-data": f"--loss psd {PLAIN} --diagonal-from data",
    "esd-signed": f"--loss esd --form signed {PLAIN}",
    "esd-signed-psd-share": f"--loss esd --form signed --psd-share 0.25 {PLAIN}",
}
# A map, then distribution matching from it; and the map's own loss for as much computation. A row
# costs 4.75 forward passes by those losses, a quarter of the rows being diagonal, and 7 by dmd.
DMD = {f"{name}-dmd": name for name in ("psd", "esd", "psd-squared")}
LONGER = {f"{name}-longer": name for name in DMD.values()}
RUNS = [*STAGE1, *STAGE2, *LONGER, *DMD]

BOTH = "--beta2 0.99 --ema 0.999 --diagonal-power 0"
DISTIL = "--lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125"
MATCH = "--loss dmd --warmup 20"
SCORE = "--nfe 1 2 4 8 32 128 --batch-size 256 --judge-batch 64"
TEXT = {
    "data": "data/stories",
    "both": f"{BOTH} --batch-size 32",
    "stage1": "--size tiny --steps 2500 --warmup 100 --cooldown 2000 --lr 2e-3",
    "stage2": f"{DISTIL} --steps 500 --warmup 100 --cooldown 400",
    "longer": "--steps 940 --cooldown 750",
    "dmd": f"{MATCH} --steps 300 --cooldown 150",
    "evaluate": f"{SCORE} --num-samples 256 --judge runs/judge-stories",
    "scores": ["gen_ppl", "entropy"],
}
WORDS = {
    "data": "data/words",
    "both": f"{BOTH} --batch-size 32 --compile --dtype bfloat16",
    "evaluate": f"{SCORE} --num-samples 256 --judge runs/judge-words --dtype bfloat16",
}
BPE = {
    "data": "data/bpe",
    "both": f"{BOTH} --batch-size 32 --compile --dtype bfloat16",
    "stage1": "--size tiny --steps 2000 --warmup 100 --cooldown 1700 --lr 2e-3",
    "stage2": f"{DISTIL} --steps 250 --warmup 50 --cooldown 200",
    "longer": "--steps 470 --cooldown 375",
    "dmd": f"{MATCH} --steps 150 --cooldown 75",
    "evaluate": f"{SCORE} --num-samples 128 --judge runs/judge-bpe --dtype bfloat16",
}
GRAMMAR = {
    "data": "data/grammar",
    "both": f"{BOTH} --batch-size 128 --micro-batch 128",
    "stage1": "--size tiny --steps 3000 --warmup 100 --cooldown 2900 --lr 2.5e-3",
    "stage2": f"{DISTIL} --steps 800 --warmup 200 --cooldown 600",
    "longer": "--steps 1500 --cooldown 1125",
    "dmd": f"{MATCH} --steps 480 --cooldown 240",
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
    """Train folder/name, or what is left to train of it, and what it starts from."""
    out = folder / name
    more = ["--data", study["data"], "--out", out, "--seed", seed]
    if checkpoints(out):
        checkpoint = read_checkpoint(out)
        if checkpoint["step"] >= checkpoint["args"]["steps"]:
            return
        more.append("--resume")
    else:  # what an earlier try has left cannot be continued
        shutil.rmtree(out, ignore_errors=True)
    if name in STAGE1:
        program("train_diagonal.py", f"{study['both']} {study['stage1']} {STAGE1[name]}", *more)
        return
    start = DMD.get(name, "diagonal")
    train(study, folder, seed, start)
    more += ["--checkpoint", folder / start]
    if name in DMD:
        flags = study["dmd"]
    elif name in LONGER:
        flags = f"{study['stage2']} {STAGE2[LONGER[name]]} {study['longer']}"
    else:
        flags = f"{study['stage2']} {STAGE2[name]}"
    program("distill.py", f"{study['both']} {flags}", *more)


def run_seed(study, folder, seed, names, file, entropy, scoring):
    """Train and evaluate those runs of one seed that have no `file` of scores yet.

    scoring: further flags of evaluate.py, which override the study's.
    """
    for name in names:
        output = folder / name / file
        if output.exists():
            continue
        train(study, folder, seed, name)
        more = []
        if entropy:
            more = ["--entropy", entropy, "--nfe", *([64] if name in STAGE1 else [1, 2, 4, 8])]
        elif name in STAGE1:
            more = ["--bound", 64]
        more += ["--checkpoint", folder / name, "--seed", seed, "--output", output, *scoring]
        program("evaluate.py", study["evaluate"], *more)


# ------------------------------------------------------------------------------------------------
# The table.


def on_text(study):
    return study["scores"][0] == "gen_ppl"


def gather(study, folder, file):
    """All evaluated runs, a dict each: run, seed, scores {nfe: {score: value}}, bound.

    The bound is in nats a token, or None.
    """
    found = []
    for path in sorted(folder.glob(f"*/*/{file}")):
        evaluation = json.loads(path.read_text())
        rows = [row for row in evaluation["results"] if row["nfe"]]
        bounds = [row["nats_a_token"] for row in evaluation["bound"]]
        run = {
            "run": path.parent.name,
            "seed": int(path.parent.parent.name),
            "scores": {row["nfe"]: {s: row[s] for s in study["scores"]} for row in rows},
            "bound": bounds[0] if bounds else None,
        }
        found.append(run)
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
        for run, other in pairs:
            common = [n for n in run["scores"] if n in other["scores"]]
            both = {n: [r["scores"][n][first] for r in (run, other)] for n in common}
            values[label].append({n: compared(study, *two) for n, two in both.items()})
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
    """The first score against NFE: means over seeds, bands from the smallest to the largest."""
    from matplotlib.figure import Figure

    first = study["scores"][0]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    names = {run["run"] for run in found}
    for i, name in enumerate(name for name in RUNS if name in names):
        runs = [run for run in found if run["run"] == name]
        nfe = sorted(runs[0]["scores"])
        values = np.array([[run["scores"][n][first] for n in nfe] for run in runs], float)
        style = "--" if name in STAGE1 else "-"
        axes.plot(nfe, values.mean(0), style, marker=".", label=name, color=f"C{i}")
        axes.fill_between(nfe, values.min(0), values.max(0), alpha=0.15, color=f"C{i}", linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network evaluations", ylabel=first.replace("_", " "))
    axes.set_yscale("log" if on_text(study) else "linear")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("study", choices=list(STUDIES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    help = "these runs beside `diagonal`: " + " ".join(RUNS)
    add("--only", nargs="+", choices=RUNS, default=[*STAGE1, *STAGE2], metavar="RUN", help=help)
    add("--folder", type=Path, default=Path("runs/study"), help="of all studies")
    help = "compare those of stage 2 with this one (default: the first of --only)"
    add("--baseline", choices=RUNS, metavar="RUN", help=help)
    add("--entropy", type=float, help="score at this entropy (nats), 64 NFE of stage 1 and 1 to 8")
    add("--judge", help="of gen-PPL (default: runs/judge-STUDY)")
    add("--num-samples", help="samples for each score (default: 128 to 512, by study)")
    add("--table", action="store_true", help="train nothing, print the table")
    add("--plot", type=Path, help="PNG to draw: the first score against NFE")
    args = parser.parse_args()
    if args.plot:
        check_output("--plot", args.plot, ".png")
    study = STUDIES[args.study]
    folder = args.folder / args.study
    file = f"entropy-{args.entropy:g}.json" if args.entropy else "evaluation.json"
    names = list(dict.fromkeys(["diagonal", *args.only]))
    scoring = ["--judge", args.judge] if args.judge else []
    scoring += ["--num-samples", args.num_samples] if args.num_samples else []
    for seed in [] if args.table else args.seeds:
        run_seed(study, folder / str(seed), seed, names, file, args.entropy, scoring)
    found = [run for run in gather(study, folder, file) if run["run"] in names]
    if not found:
        raise SystemExit(f"no evaluated run in {folder}; drop --table to train some")
    baseline = args.baseline or next((name for name in names if name not in STAGE1), "psd")
    print(table(compare(study, found, baseline)))
    if args.plot:
        draw(study, found, args.plot)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    main()
