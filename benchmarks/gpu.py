"""What to measure where a GPU can be had for minutes: the most valuable first, in --minutes.

    export TIKTOKEN_CACHE_DIR=data/gpu/tiktoken         # here and beside the GPU
    # Where there is a network: some 20M tokens, 40 MB. Or --source my.txt --documents line.
    python prepare_data.py file --source Salesforce/wikitext --config wikitext-103-raw-v1 \\
        --limit 300000 --out data/gpu/rows
    # Copy the repository with data/gpu in it. Then, beside the GPU:
    python benchmarks/gpu.py                            # nine minutes
    python benchmarks/gpu.py --minutes 4                # goes on where that one ended
    python benchmarks/gpu.py --dry-run                  # everything at toy size, on a CPU

For gen-PPL put a judge beside the rows, in data/gpu/judge: a causal language model and its
tokenizer, as save_pretrained of transformers writes them, in half precision. The parts:

    check     five steps of each loss in float32, bfloat16 and compiled: how far are they from the
              CPU's (2% is near enough)? Does a run resume with the same losses?
    steps     time, memory and MFU of diagonal, PSD, ESD and next-token steps, and of the peers' way
              with states of size V: 170M parameters, 64 rows of 1,024 tokens
    sampling  the same for sampling at 1, 4 and 32 NFE; the slowest kernels of a step
    diagonal  90 seconds of stage 1; then of psd and esd from it, and of dmd from the PSD map
    scores    the likelihood bound of these networks and, with a judge, gen-PPL

The budget counts from the start of this program, compilation included. A command starts if its
estimate fits in what is left, and is stopped before the budget ends; trainings share what is left.
Output goes to results/gpu/NAME.log as it comes, numbers to NAME.json or .jsonl, and a line for each
command, run or skipped, to record.jsonl, with the seconds until a training logs (`log_after`). What
ended well, even with errors in its table, is not run again: delete its line there.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# PyTorch is imported only where it is needed, since that takes seconds.
from prepare_data import new_parser, read_meta

START = time.monotonic()
# Estimates in seconds: no GPU has run this yet.
SECONDS = dict(data=5, check=120, steps=120, sampling=60)
SECONDS |= dict(diagonal=130, psd=130, dmd=130, esd=130, scores=50)
LEAST = 60  # a shorter training is not worth its start and compilation
GRACE = 15  # to save and exit after SIGTERM


class Runner:
    """Runs commands within the budget, except those that have ended well, and records each."""

    def __init__(self, args, machine):
        self.args = args
        self.runs = args.out / "runs"  # checkpoints: git ignores them
        self.runs.mkdir(parents=True, exist_ok=True)
        self.record = args.out / "record.jsonl"
        self.facts = {"machine": machine, "date": time.strftime("%Y-%m-%d")}
        self.facts["torch"] = importlib.metadata.version("torch")
        self.done = {line["command"] for line in read_lines(self.record) if line["ok"]}
        self.failed = []

    def left(self):
        return 60 * self.args.minutes - GRACE - (time.monotonic() - START)

    def run(self, name, command, need=None, limit=None):
        """Run `command` if it is wanted, new, and `need` seconds are left. limit: of a training."""
        need = need or SECONDS[name]
        left = self.left()
        if command in self.done or name not in ("data", *self.args.parts):
            return
        print(f"{name}: python {command}", flush=True)
        line = {"name": name, "ok": False}
        if need > left:
            line["skipped"] = f"needs {need} s, {left:.0f} s are left"
        else:
            log = self.runs / name / "log.jsonl" if limit else None
            line |= self.execute(name, command, min(limit or 1.5 * need, left), log)
            if not line["ok"]:
                self.failed.append(str(self.args.out / f"{name}.log"))
        print(json.dumps(line), flush=True)
        with open(self.record, "a") as file:
            file.write(json.dumps(line | {"command": command} | self.facts) + "\n")

    def execute(self, name, command, limit, log):
        """Run a command for at most `limit` seconds; how it has ended. log: of a training."""
        root = Path(__file__).parent.parent
        script, *flags = shlex.split(command)
        words = [sys.executable, root / script, *flags]
        start = time.monotonic()
        end = start + limit
        line = {"limit": round(limit)}
        with open(self.args.out / f"{name}.log", "w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                if log and "log_after" not in line and log.exists() and log.stat().st_size:
                    line["log_after"] = round(time.monotonic() - start, 1)  # it has compiled
                    end = min(end, time.monotonic() + (0.2 if self.args.dry_run else 90))
            if stopped := process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compilation leaves workers behind
        if log and log.exists():
            shutil.copy(log, self.args.out / f"{name}.jsonl")
        code = process.wait()
        ok = code == 0 or (bool(log) and stopped and code == 128 + signal.SIGTERM)
        return line | {"ok": ok, "code": code, "seconds": round(time.monotonic() - start, 1)}

    def train(self, name, command, others=0):
        """Run a training. `others` like it get as much, if there is enough for all of them."""
        room = self.left() - SECONDS["scores"]
        fit = max(1, min(1 + others, int(room // LEAST)))
        command += f" --resume --out {self.runs / name}"
        self.run(name, command, LEAST + SECONDS["scores"], min(SECONDS[name], room / fit))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(runner, args):
    """All commands, the most valuable first."""
    out = args.out
    dry = " --dry-run" if args.dry_run else ""
    grammar = runner.runs / "grammar"
    rows = grammar if dry else args.data / "rows"
    runner.run("data", f"prepare_data.py grammar --out {grammar}")

    measure = f"benchmarks/gpu.py --out {out}{dry} --measure"
    runner.run("check", f"{measure} check")
    runner.run("steps", f"{measure} diagonal psd esd 'next token' V-sized")
    size = "--rows 64 --repeats 5"
    flags = "--batch-size 512 --micro-batch 256 --log-every 25 --val-every 500"
    if dry:
        size = "--rows 4 --repeats 1 --size tiny --vocab-size 300 --seq-len 16 --nfe 1"
        flags = "--batch-size 8 --log-every 1"
    sampling = "benchmarks/benchmark.py --parts sampling kernels --only diagonal --sample-rows 16"
    runner.run("sampling", f"{sampling} {size} --output {out}/sampling.json")
    flags += f" --data {rows} --beta2 0.99 --ema 0.999 --diagonal-power 0 --steps 1000000"
    stage1 = f"train_diagonal.py --size {'tiny' if dry else 'small'} --warmup 200 --lr 1e-3"
    runner.train("diagonal", f"{stage1} {flags}", others=2)
    distil = f"distill.py --checkpoint {runner.runs}/diagonal --warmup 100 --lr 5e-4 {flags}"
    distil += " --diagonal-from stage1 --diagonal-share 0.25 --boundary 0.125 --loss"
    runner.train("psd", f"{distil} psd --no-learned-weight --consistency-power 0", others=1)
    runner.train("dmd", f"distill.py --checkpoint {runner.runs}/psd --loss dmd --warmup 20 {flags}")
    runner.train("esd", f"{distil} esd")
    names = [runner.runs / name for name in ("diagonal", "psd", "dmd", "esd")]
    names = [str(name) for name in names if any(name.glob("checkpoint-*.pt"))]
    how = "--bound 2 --nfe 1 2 --num-samples 8" if dry else "--bound 256"  # grammar needs no judge
    if not dry and (args.data / "judge").exists():
        how += f" --nfe 1 4 32 --num-samples 256 --judge {args.data / 'judge'} --judge-batch 64"
    if names:
        scores = f"evaluate.py --checkpoint {' '.join(names)} {how} --output {out}/scores.json"
        runner.run("scores", scores)


def measure(path, cases, function):
    """Write and print a row for each of `cases`: labels, and function(*inputs) or its error."""
    from evaluate import table

    rows = []
    for row, *inputs in cases:
        rows.append(row)
        try:
            row |= function(*inputs)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    sys.exit(all("error" in row for row in rows))


def measure_losses(args):
    """How far five steps of each loss are from those on the CPU in float32, in per cent."""
    from model import Draw

    folder = args.out / "runs/check"
    shutil.rmtree(folder, ignore_errors=True)

    def normal_on_cpu(draw, *shape, normal=Draw.normal):
        draw.calls += 1
        twin = Draw(draw.seed, draw.step, draw.rows, "cpu", draw.calls - 1)
        return normal(twin, *shape).to(draw.device)

    Draw.normal = normal_on_cpu  # a GPU draws other numbers from the same seed

    def train(name, command, steps=5):
        """The log of a run in this process."""
        command += f" --data {args.out}/runs/grammar --batch-size 16 --warmup 1 --log-every 1"
        command += f" --steps {steps} --resume --out {folder / name}"
        print(f"python {command}", flush=True)
        sys.argv = command.split()
        importlib.import_module(sys.argv[0].removesuffix(".py")).main()
        return read_lines(folder / name / "log.jsonl")

    def compare(name, command, whole):
        if name.endswith("resumed"):
            train(name, command, 3)
        lines = train(name, command)
        truth = read_lines(folder / whole / "log.jsonl")
        keys = "diagonal_ce consistency_kl consistency_square critic_kl matching_distance".split()
        apart = []
        for key in truth[0].keys() & keys:
            gaps = [abs(a[key] - b[key]) for a, b in zip(truth, lines, strict=True)]
            apart.append(100 * max(gaps) / max(line[key] for line in truth))
        return {"percent": max(apart), "first_step": lines[0]["seconds_per_step"]}

    plain = "--device cpu --dtype float32 --no-compile"
    train("start", f"train_diagonal.py --size tiny --lr 2e-3 {plain}", 20)
    losses = {"diagonal": f"train_diagonal.py --lr 1e-4 --init {folder}/start"}
    for loss in ("psd", "lsd", "esd", "dmd"):
        losses[loss] = f"distill.py --loss {loss} --lr 1e-4 --checkpoint {folder}/start"
    losses["resumed"] = losses["diagonal"]
    ways = {"cpu": plain, "float32": plain.replace("cpu", "cuda")}
    ways["bfloat16"] = ways["float32"].replace("float32", "bfloat16")
    ways["compiled"] = ways["bfloat16"].replace("--no-compile", "--compile")
    if args.dry_run:
        ways = {"cpu": plain, "bfloat16": plain.replace("float32", "bfloat16")}
    cases = []
    for way, flags in ways.items():
        for loss, command in losses.items():
            whole = f"{way}-diagonal" if loss == "resumed" else f"cpu-{loss}"
            row = {"loss": loss, "way": way}
            cases.append((row, f"{way}-{loss}", f"{command} {flags}", whole))
    measure(args.out / "check.json", cases, compare)


def measure_steps(args):
    """Training steps at the paper's size: the first one, which compiles, and ten more."""
    import benchmark
    import torch

    device, size, V, B, L = "cuda", "base", 50257, 64, 1024
    if args.dry_run:
        device, size, V, B, L = "cpu", "tiny", 300, 4, 16
    how = argparse.Namespace(size=size, device=device, dtype="bfloat16", compile=not args.dry_run)
    bench = benchmark.Bench(how, V, B, L, args.measure)
    flops = B * benchmark.flops_per_row(bench.model, L)
    peak = benchmark.peak_flops(bench.device)

    def step(name):
        start = time.perf_counter()
        repeats = 1 if args.dry_run else 10
        row = benchmark.interleaved({name: bench.call(name)}, repeats, bench.device)[name]
        seconds = row["seconds"]
        row["compile_seconds"] = time.perf_counter() - start - (1 + repeats) * seconds
        row["mfu"] = benchmark.PASSES[name] * flops / seconds / peak if peak else None
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    measure(args.out / "steps.json", [({"step": name}, name) for name in args.measure], step)


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="the budget")
    add("--parts", nargs="+", choices=SECONDS, default=SECONDS, help="only these (default: all)")
    add("--data", type=Path, default=Path("data/gpu"), help="folder of rows, tiktoken and judge")
    add("--out", type=Path, help="folder to write (default: results/gpu; with --dry-run runs/gpu)")
    add("--dry-run", action="store_true", help="everything at toy size on a CPU, not compiled")
    add("--measure", nargs="+", metavar="WORD", help="`check`, or steps for the part `steps`")
    args = parser.parse_args()
    args.out = args.out or Path("runs/gpu" if args.dry_run else "results/gpu")
    if args.measure:
        sys.exit(measure_losses(args) if args.measure == ["check"] else measure_steps(args))
    os.environ["PYTHONUNBUFFERED"] = "1"  # output that is there if a command is killed
    machine = f"{os.cpu_count()} CPU cores"
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not shutil.which("nvidia-smi"):
        raise SystemExit("there is no CUDA device here; --dry-run tries the plan without one")
    else:
        machine = subprocess.check_output(["nvidia-smi", "-L"], text=True).split(" (")[0]
        read_meta(args.data / "rows")  # ends with what to do if there is none
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running command, too
    runner = Runner(args, machine)
    plan(runner, args)
    for log in args.out.glob("*.log"):
        if rows := [line for line in log.read_text().splitlines() if line.startswith("|")]:
            print(f"\n{log.stem}:\n", *rows, sep="\n")
    if runner.failed:
        raise SystemExit(f"some commands failed: see {', '.join(runner.failed)}")


if __name__ == "__main__":
    main()
