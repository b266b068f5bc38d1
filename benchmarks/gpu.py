"""Everything to measure when a CUDA machine is at hand for minutes, one part after another.

    # Any text of some 20M tokens, prepared where there is a network:
    python prepare_data.py file --source wiki.txt --documents line --seq-len 128 --out data/wiki
    python benchmarks/gpu.py                      # all parts, each in under nine minutes on an H100
    python benchmarks/gpu.py --parts speed        # one part; what has finished is not repeated
    python benchmarks/gpu.py --dry-run            # all of it on the CPU, at toy size, in a minute

    speed     steps and sampling at the paper's size: time, memory, MFU, beside the peers' way and
              a next-token step; the five slowest kernels
    ranks     two ranks on one GPU, a resumed run, and float32 beside bfloat16: the same losses?
    judge     a small judge of text, trained on --data
    diagonal  eight minutes of stage 1 on --data; then psd, esd and dmd, five minutes each
    choices   the linear schedule, ESD with more jumps from noise, ESD by its signed form
    blocks    blocks after a context: four minutes of training, then guidance
    scores    gen-PPL by the judge, entropy and the likelihood bound of all but `blocks`

Each command's output goes to results/gpu/NAME.log as it runs, its numbers to NAME.json or .jsonl,
and a line about it to results/gpu/record.jsonl: hardware, versions, time, exit code. A command that
fails does not stop the others. What ended well is not run again; delete its line to repeat it.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from evaluate import table
from prepare_data import Help, read_meta

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------
# One command, and its line in the record.


class Runner:
    """Runs commands, except those that have ended well before, and records each."""

    def __init__(self, args):
        self.dry = args.dry_run
        self.data = args.data
        self.out = args.out
        self.runs = args.out / "runs"  # checkpoints: git ignores them
        self.out.mkdir(parents=True, exist_ok=True)
        self.record = self.out / "record.jsonl"
        self.env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.dry else {})
        on_gpu = torch.cuda.is_available() and not self.dry
        self.machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"

    def run(self, name, command, launcher=(sys.executable,)):
        """Run `command`, a string of words, as NAME; whether it has ended well, now or before."""
        if any(line["name"] == name and line["code"] == 0 for line in read_lines(self.record)):
            return True
        print(f"{name}: {command}", flush=True)
        script, *flags = shlex.split(command)
        start = time.monotonic()
        with open(self.out / f"{name}.log", "w") as log:
            words = [*launcher, str(ROOT / script), *flags]
            how = dict(stdout=log, stderr=subprocess.STDOUT, env=self.env)
            code = subprocess.run(words, **how).returncode
        line = {"name": name, "code": code, "seconds": round(time.monotonic() - start, 1)}
        line |= {"command": command, "machine": self.machine, "torch": torch.__version__}
        line |= {"cuda": torch.version.cuda, "date": str(datetime.date.today())}
        if code:
            print(f"{name} ended with exit code {code}: see {self.out / name}.log", flush=True)
        with open(self.record, "a") as file:
            file.write(json.dumps(line) + "\n")
        return code == 0

    def train(self, name, command, **how):
        """As `run` for a training program, whose log is kept: its lines, a list of dicts."""
        folder = self.runs / name
        resume = "--resume" if checkpointed(folder) else ""
        if not resume:  # what an earlier try has left cannot be continued
            shutil.rmtree(folder, ignore_errors=True)
        self.run(name, f"{command} --out {folder} {resume}", **how)
        log = folder / "log.jsonl"
        if log.exists():
            shutil.copy(log, self.out / f"{name}.jsonl")
        return read_lines(self.out / f"{name}.jsonl")


def checkpointed(folder):
    return any(folder.glob("checkpoint-*.pt"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------
# The parts.


def speed(runner):
    """Steps and sampling at the paper's size."""
    toy = "--size tiny --vocab-size 1000 --seq-len 32 --repeats 1 --nfe 1 2"
    size = toy if runner.dry else "--repeats 5"
    few, rows, many = (2, 4, 8) if runner.dry else (16, 64, 128)

    def benchmark(name, flags):
        runner.run(
            name, f"benchmarks/benchmark.py {size} {flags} --output {runner.out}/{name}.json"
        )

    benchmark(f"steps-{rows}", f"--parts steps --only diagonal psd esd dmd --rows {rows}")
    benchmark("peers", f"--parts steps --only diagonal V-sized 'next token' --rows {few}")
    benchmark("kernels", f"--parts kernels --only diagonal --rows {few}")
    benchmark("sampling", f"--parts sampling --sample-rows {few}")
    # If these rows do not fit, the error that ends it is the finding.
    only = "diagonal" if runner.dry else "diagonal psd esd"
    benchmark(f"steps-{many}", f"--parts steps --only {only} --rows {many}")


def ranks(runner):
    """The same losses by two ranks on one GPU, after a resume, and nearly in float32."""
    base = f"train_diagonal.py --data {runner.data} --size tiny --batch-size 32 --micro-batch 16"
    base += " --warmup 5 --log-every 1 --save-every 10"
    steps = 20 if runner.dry else 200
    whole = runner.train("bfloat16", f"{base} --steps {steps} --dtype bfloat16")
    two = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    others = {
        "float32": runner.train("float32", f"{base} --steps {steps} --dtype float32"),
        "two-ranks": runner.train("two-ranks", f"{base} --steps 20 --dtype bfloat16", launcher=two),
    }
    half = f"{base} --steps 10 --dtype bfloat16 --out {runner.runs}/resumed"
    runner.run("half", half)
    others["resumed"] = runner.train("resumed", f"{base} --steps 20 --dtype bfloat16")
    rows = []
    for name, lines in others.items():
        both = zip(whole, lines, strict=False)  # some runs are shorter
        pairs = [(a["diagonal_ce"], b["diagonal_ce"]) for a, b in both]
        apart = max((abs(a - b) / a for a, b in pairs), default=float("nan"))
        rows.append({"run": name, "steps": len(pairs), "furthest from bfloat16": f"{apart:.1e}"})
    (runner.out / "ranks.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def judge(runner):
    """A judge of the same text."""
    size = "--layers 6 --width 384 --vocab-size 8192 --batch-size 64 --steps 6000 --lr 1e-3"
    if runner.dry:
        size = "--layers 1 --width 32 --vocab-size 300 --context 16 --steps 2 --rows 500"
    flags = f"--data {runner.data} --out {runner.runs}/judge {size}"
    runner.run("judge", f"benchmarks/train_judge.py {flags}")


BOTH = "--beta2 0.99 --ema 0.999 --diagonal-power 0 --batch-size 512"
DISTIL = "--diagonal-from stage1 --diagonal-share 0.25 --boundary 0.125 --warmup 100 --lr 5e-4"


def text(runner, name, command, minutes):
    """Train for about `minutes`. A short run before it measures the speed.

    The learning rate falls over the last 80% of the steps.
    """
    command = f"{command} {BOTH} --data {runner.data}"
    steps = 4
    if runner.dry:
        command = command.replace("--batch-size 512", "--batch-size 8")
    else:
        probe = runner.train(f"{name}-probe", f"{command} --steps 60 --log-every 20")
        if not probe:
            return
        steps = int(60 * minutes / probe[-1]["seconds_per_step"])
    runner.train(name, f"{command} --steps {steps} --cooldown {int(0.8 * steps)}")


def stage1(runner, name, flags, minutes):
    size = "tiny" if runner.dry else "small"
    command = f"train_diagonal.py --size {size} --warmup 200 --lr 1e-3 {flags}"
    text(runner, name, command, minutes)


def diagonal(runner):
    """Stage 1 on text."""
    stage1(runner, "diagonal", "", minutes=8)


def distil(runner, name, start, flags, minutes=5):
    text(runner, name, f"distill.py --checkpoint {runner.runs}/{start} {flags}", minutes)


def psd(runner):
    """PSD from the diagonal."""
    plain = "--no-learned-weight --consistency-power 0"
    distil(runner, "psd", "diagonal", f"--loss psd {DISTIL} {plain}")


def esd(runner):
    """ESD from the diagonal, with the paper's weights."""
    distil(runner, "esd", "diagonal", f"--loss esd {DISTIL}")


def dmd(runner):
    """Distribution matching from the PSD map."""
    distil(runner, "dmd", "psd", "--loss dmd --warmup 20")


def choices(runner):
    """What else might matter: two minutes each, four for stage 1."""
    stage1(runner, "linear", "--schedule linear", minutes=4)
    more = DISTIL.replace("--boundary 0.125", "--boundary 0.5")
    distil(runner, "esd-noise", "diagonal", f"--loss esd {more}", minutes=2)
    signed = f"--loss esd --form signed --psd-share 0.5 {DISTIL}"
    distil(runner, "esd-signed", "diagonal", signed, minutes=2)


def blocks(runner):
    """Blocks after a context, and what guidance does to them."""
    stage1(runner, "blocks", "--context any", minutes=4)
    flags = "--nfe 2 --guidance 1" if runner.dry else "--nfe 32 --guidance 0 1 1.5 2"
    flags += f" --checkpoint {runner.runs}/blocks --judge {runner.runs}/judge"
    runner.run("guidance", f"benchmarks/context.py {flags} --output {runner.out}/guidance.json")


def scores(runner):
    """All networks that write whole rows, by the judge and the bound."""
    names = ("diagonal", "psd", "esd", "dmd", "linear", "esd-noise", "esd-signed")
    names = [name for name in names if checkpointed(runner.runs / name)]
    count, rows = (8, 2) if runner.dry else (256, 256)
    paths = " ".join(f"{runner.runs}/{name}" for name in names)
    nfe = "1 2" if runner.dry else "1 2 4 8 64"
    flags = f"--checkpoint {paths} --nfe {nfe} --num-samples {count} --bound {rows}"
    flags += f" --judge {runner.runs}/judge --judge-batch 64 --output {runner.out}/scores.json"
    runner.run("scores", f"evaluate.py {flags}")


ORDER = (speed, ranks, judge, diagonal, psd, esd, dmd, choices, blocks, scores)
PARTS = {part.__name__: part for part in ORDER}


def main():
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    add("--data", type=Path, help="rows of text (default: data/wiki; --dry-run makes grammar)")
    add("--out", type=Path, help="folder to write (default: results/gpu; with --dry-run runs/gpu)")
    add("--dry-run", action="store_true", help="everything at toy size, on any machine")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --dry-run tries the parts without one")
    args.out = args.out or Path("runs/gpu" if args.dry_run else "results/gpu")
    args.data = args.data or (args.out / "runs/grammar" if args.dry_run else Path("data/wiki"))
    if not args.dry_run and set(args.parts) - {"speed"}:
        read_meta(args.data)  # ends with what to do if there is none
    runner = Runner(args)
    if args.dry_run:
        runner.run("data", f"prepare_data.py grammar --out {args.data}")
    for part in args.parts:
        PARTS[part](runner)
    shown = ("name", "code", "seconds", "machine")
    lines = read_lines(runner.record)
    print(table([{key: line[key] for key in shown} for line in lines]))
    if any(line["code"] for line in lines):
        raise SystemExit(f"some commands failed; their output is in {args.out}")


if __name__ == "__main__":
    main()
