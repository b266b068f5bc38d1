"""The losses side by side: the same stage 1, the same number of steps, several seeds, one table.

    python benchmarks/study.py grammar                                   # hours on a CPU; what is there already is not done again
    python benchmarks/study.py grammar --seeds 0 1 2 --only psd esd
    python benchmarks/study.py grammar --table                           # of what is there

Each run is of the programs that a user calls, its folder runs/study/STUDY/SEED/RUN. The table gives means over seeds of stage 1
and stage 2 (and sampling) together, and the smallest and the largest; of the first score also what a run has more than PSD from the same
stage 1, since seeds of stage 1 differ more than losses do. study.json, beside the runs, has the flags and every number.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import table
from model import read_checkpoint
from prepare_data import Parser, UserError, number, run

ROOT = Path(__file__).parent.parent
PLAIN = "--no-learned-weight --consistency-power 0"
# Every run, a folder each: its flags beyond those that all share. Stage 1 by three noise schedules, of which stage 2 starts from
# the first; calibrated: on the loss measured five times on the way.
STAGE1 = {
    "diagonal": "",
    "diagonal-linear": "--schedule linear",
    "diagonal-calibrated": "--schedule calibrated --val-every 200",
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
    "bpe": {
        "data": "data/bpe",
        "both": "--dtype bfloat16 --batch-size 32 --micro-batch 32 --beta2 0.99 --ema 0.999 --diagonal-power 0 --log-every 100",
        "stage1": "--size tiny --steps 1000 --warmup 100 --cooldown 900 --lr 2e-3",
        "stage2": "--steps 200 --warmup 50 --cooldown 150 --lr 1e-3 --diagonal-share 0.25 --diagonal-from stage1 --boundary 0.125",
        "evaluate": "--dtype bfloat16 --nfe 1 2 4 8 32 --batch-size 256 --num-samples 128 --bleu-samples 0 --judge runs/judge-bpe --judge-batch 64",
        "scores": ["gen_ppl", "entropy", "distinct_4"],
    },
}


def spread(values):
    """{nfe: number or None} of each seed -> {"N NFE": "mean (smallest-largest)"}."""
    seen = {nfe: [v[nfe] for v in values if v[nfe] is not None] for nfe in (values[0] if values else {})}
    return {f"{nfe} NFE": f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" if v else None for nfe, v in seen.items()}


def main():
    parser = Parser(prog="study.py", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*STAGE1, *STAGE2], metavar="RUN", help="these runs, by name: " + "; ".join([*STAGE1, *STAGE2]))
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    args = parser.parse_args()
    study, folder = STUDIES[args.study], Path("runs/study") / args.study

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

    for seed in [] if args.table else args.seeds:
        stage1 = folder / str(seed) / "diagonal"
        for name in dict.fromkeys(["diagonal", *(args.only or [*STAGE1, *STAGE2])]):
            out = folder / str(seed) / name
            common = f"--data {study['data']} --out {out} --seed {seed} {study['both']}"
            if (out / "evaluation.json").exists():
                continue
            if name in STAGE1:
                train("train_diagonal.py", out, common, study["stage1"], STAGE1[name])
            else:
                train("distill.py", out, common, study["stage2"], f"--checkpoint {stage1}/checkpoint.pt", STAGE2[name])
            bound = "--bound 64" if name in STAGE1 else ""
            program("evaluate.py", f"--checkpoint {out}/checkpoint.pt --seed {seed} {bound}", study["evaluate"])

    found = []
    for path in sorted(folder.glob("*/*/evaluation.json")):
        flags = json.loads((path.parent / "config.json").read_text())["flags"]
        scores = {row["nfe"]: {score: row[score] for score in study["scores"]} for row in json.loads(path.read_text())["results"] if row["nfe"]}
        found.append({"run": path.parent.name, "seed": int(path.parent.parent.name), "flags": flags, "scores": scores})
    if not found:
        raise UserError(f"no evaluated run in {folder}; leave out --table to train some")
    by_run = {(run["run"], run["seed"]): run["scores"] for run in found}
    rows = []
    for name in (*STAGE1, *STAGE2):
        runs = {seed: scores for (run, seed), scores in by_run.items() if run == name}
        for score in study["scores"] if runs else []:
            values = [{nfe: row[score] for nfe, row in scores.items()} for scores in runs.values()]
            rows.append({"run": name, "seeds": len(values), "score": score} | spread(values))
            if score == study["scores"][0] and name not in ("diagonal", "psd"):
                pairs = [(scores, by_run["psd", seed]) for seed, scores in runs.items() if ("psd", seed) in by_run]
                values = [{nfe: a[nfe][score] - b[nfe][score] for nfe in a} for a, b in pairs]
                rows.append({"run": name, "seeds": len(values), "score": f"{score} - psd"} | spread(values))
    print(table(rows))
    (folder / "study.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
