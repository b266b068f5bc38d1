"""The programs, as a user runs them: the whole road, resuming, ranks, samples, scores, mistakes.

Tests of real text read the folder named by DFM_TEST_DATA (wiki.txt.xz, lm1b_dev.txt.xz,
tiktoken_cache/, bert-base-uncased/vocab.txt). Without that variable they are skipped.
"""

import argparse
import fcntl
import functools
import gzip
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network

import distill
import evaluate
import model as model_file
import prepare_data
import sample
import test_identities
import train_diagonal
from model import SIZES, Conditional, DiT, Draw, ModelConfig, load_model, read_checkpoint
from prepare_data import decode, encoder, read_meta, read_rows

HERE = Path(__file__).parent
MODULES = (prepare_data, train_diagonal, distill, sample, evaluate)
PROGRAMS = {f"{module.__name__}.py": module for module in MODULES}
EXTRAS = [f"{path.parent.name}/{path.name}" for path in sorted(HERE.glob("[be]*/*.py"))]
TEST_DATA = os.environ.get("DFM_TEST_DATA")
needs_data = pytest.mark.skipif(not TEST_DATA, reason="DFM_TEST_DATA names no folder of test data")

torch.set_num_threads(1)  # as in the processes below: two workers share two cores


# ---- Running programs. -------------------------------------------------------------------------
def run(cwd, words, ok=True):
    """Run a command line in `cwd`, in this process; the result is that of subprocess.run."""
    script, *flags = shlex.split(words)
    out = io.StringIO()
    err = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.syspath_prepend((HERE / script).parent)
        patch.setattr(sys, "argv", [script, *flags])
        try:
            if script in PROGRAMS:
                PROGRAMS[script].main()
            else:
                runpy.run_path(str(HERE / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    for number, handler in handlers.items():  # training sets its own
        signal.signal(number, handler)
    if isinstance(code, str):  # Python prints the message and exits with 1
        err.write(code + "\n")
        code = 1
    done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    assert code == 0 or not ok, done.stdout + done.stderr
    return done


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(cwd, words, launcher=()):
    """Start a command line in a process of its own; its output goes to the file `output`."""
    script, *flags = shlex.split(words)
    # Otherwise a restart of torchrun meets the store of ranks that died (see examples/slurm.sh).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(cwd / "output", "w") as file:
        how = {"cwd": cwd, "stdout": file, "stderr": subprocess.STDOUT, "env": environment}
        process = subprocess.Popen([sys.executable, *launcher, HERE / script, *flags], **how)
    process.output = cwd / "output"
    return process


def finish(process, codes=(0,)):
    """Wait for a process to end with one of these exit codes; its output."""
    code = process.wait(timeout=200)
    output = process.output.read_text()
    assert code in codes, output
    return output


RUN = "--device cpu --batch-size 16 --warmup 2 --log-every 1"
STAGES = {
    "diagonal": "train_diagonal.py --size tiny",
    "context": "train_diagonal.py --size tiny --context any --context-dropout 0.2",
    "psd": "distill.py --loss psd --seed 2",  # a seed whose gradients conflict
    "lsd": "distill.py --loss lsd",
    "esd": "distill.py --loss esd --diagonal-from stage1 --psd-share 0.5",
    "dmd": "distill.py --loss dmd --diagonal-share 0.25 --critic-lr 3e-3",
    "joint": "distill.py --loss esd --joint --checkpoint runs/new",
}


def train(work, out, flags="", stage="diagonal", how=run, **options):
    """A short run on the grammar into `out`; stage 2 starts from the run of stage 1 in `work`."""
    return how(work, f"{STAGES[stage]} --data data/grammar --out {out} {RUN} {flags}", **options)


def wait_for_step(process, run, step):
    """Wait until `run` has logged that step; fail if the process ends before."""
    while process.poll() is None:
        with suppress(OSError, ValueError, IndexError):  # no log, or half a line
            if log_lines(run)[-1]["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError(process.output.read_text())


def read_lines(path):
    """The values in a file of JSON lines."""
    return list(map(json.loads, path.read_text().removesuffix("\n").split("\n")))


def log_lines(run):
    """The lines of log.jsonl as dicts, without what depends on the machine."""
    machine = {"seconds_per_step", "tokens_per_second", "peak_memory_gb"}
    return [{k: line[k] for k in line.keys() - machine} for line in read_lines(run / "log.jsonl")]


def newest(run):
    """The content of a run's newest checkpoint, without our own reader."""
    steps = [int(path.stem.split("-")[1]) for path in run.glob("checkpoint-*.pt")]
    return torch.load(run / f"checkpoint-{max(steps)}.pt", weights_only=True)


def same(a, b):
    """Whether two nested structures of tensors and builtins are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_runs(a, b):
    """Two runs ended alike, bit for bit, and left nothing half written."""
    first = newest(a)
    second = newest(b)
    assert first.keys() == second.keys()
    for key in first.keys() - {"args"}:
        assert same(first[key], second[key]), key
    assert log_lines(a) == log_lines(b)
    assert not list(b.rglob("*.tmp"))


def one_line(done):
    """The line in which a program has refused; argparse prints its usage before that line."""
    assert done.returncode in (1, 2), done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


@contextmanager
def small_files(size):
    """A disk that is full once a file has this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """data/grammar, runs/grammar-diagonal of 60 steps of stage 1, and the untrained runs/new."""
    folder = tmp_path_factory.mktemp("work")
    run(folder, "prepare_data.py grammar")
    train(folder, "runs/grammar-diagonal", "--steps 60 --lr 2e-3 --val-every 20")
    train(folder, "runs/new", "--steps 0 --position-lag 1")
    return folder


# ---- The whole road. ---------------------------------------------------------------------------
# The longest test stands first, so that no worker is left waiting for it.
def test_gpu_dry_run(tmp_path):
    """The plan for a GPU, at toy size: in order, within its minutes, and on from where it ended."""

    def outcome(minutes):
        finish(start(tmp_path, f"benchmarks/gpu.py --dry-run --out all --minutes {minutes}"))
        lines = read_lines(tmp_path / "all/record.jsonl")
        return [(line["name"], line["ok"], "skipped" in line) for line in lines]

    order = "check steps sampling diagonal psd dmd esd scores".split()
    few = outcome(0.4)  # nine seconds, and fifteen to save and exit
    assert few == [("data", True, False), *((name, False, True) for name in order[:-1])]
    both = outcome(20)
    assert both[len(few) :] == [(name, True, False) for name in order]
    assert outcome(20) == both
    found = {name: tmp_path / f"all/{name}.json" for name in ("check", "steps", "scores")}
    found = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert len(found["check"]) == 12
    assert all(row["percent"] < 2 for row in found["check"])
    assert [row["percent"] for row in found["check"] if row["loss"] == "resumed"] == [0, 0]
    steps = {row["step"]: row for row in found["steps"]}
    assert all(steps[name]["seconds"] > 0 for name in ("diagonal", "psd", "esd", "V-sized"))
    assert len(found["scores"]["bound"]) == 4
    failing = start(tmp_path, "benchmarks/gpu.py --dry-run --out o --parts psd")
    output = finish(failing, codes=(1,))
    assert "some commands failed: see o/psd.log" in output
    assert "runs/diagonal" in (tmp_path / "o/psd.log").read_text()


@pytest.mark.parametrize("loss", ["psd", "lsd", "esd"])
def test_the_whole_road(work, loss):
    """Prepare, train, distil, sample, evaluate: each reads by default what the last one wrote."""
    meta = read_meta(work / "data/grammar")
    lines = log_lines(work / "runs/grammar-diagonal")
    first, _, last = (line["val_diagonal_ce"] for line in lines if "val_diagonal_ce" in line)
    assert last < min(first, 2.6)
    run(work, f"distill.py --data data/grammar --loss {loss} --steps 2 {RUN}")
    out = work / f"runs/grammar-{loss}"
    line = log_lines(out)[-1]
    assert ("clamped" in line, "conflict" in line) == (loss == "esd", loss == "psd")
    stage1 = newest(work / "runs/grammar-diagonal")["ema"]
    student = newest(out)["model"]
    assert torch.equal(student["embedding"], stage1["embedding"])  # frozen
    assert not torch.equal(student["head"], stage1["head"])

    words = f"sample.py --checkpoint {out} --num-samples 2 --nfe 1 3 --output out.jsonl"
    printed = run(work, words).stdout
    assert re.findall("--- (.*)", printed) == ["1 NFE", "3 NFE"]
    texts = read_texts(work / "out-3.jsonl")
    assert texts == printed.splitlines()[-2:]
    model, _, _ = sample.load_sampler(out, "cpu")
    assert same(dict(model.state_dict()), newest(out)["ema"])  # the averaged weights
    rows = sample.draw_samples(model, 3, 2, 64, 0, euler=False)
    assert texts == [decode(meta, row) for row in rows]

    words = f"evaluate.py --checkpoint runs/grammar-diagonal {out}/checkpoint-2.pt --nfe 1 2"
    printed = run(work, f"{words} --num-samples 16").stdout
    results = json.loads((out / "evaluation-checkpoint-2.json").read_text())["results"]
    assert [r["sampler"] for r in results] == [None] * 3 + ["euler"] * 2 + ["flow-map"] * 2
    assert results[5]["model"] == f"grammar-{loss}/checkpoint-2"
    assert results[0]["grammatical"] == 1
    assert all(r["source_entropy"] == prepare_data.grammar_entropy() for r in results)
    assert evaluate.table(results) in printed


def test_stage_2_carries_its_stage_1(work, tmp_path):
    """A map resumes and goes on to dmd when its stage 1 has trained on, or is gone."""
    stage1 = shutil.copytree(work / "runs/grammar-diagonal", tmp_path / "stage1")
    known = newest(stage1)["ema"]
    flags = f"--checkpoint {stage1} --val-every 1 --steps"
    train(work, tmp_path / "whole", f"{flags} 3", "esd")
    train(work, tmp_path / "map", f"{flags} 2", "esd")
    train(work, stage1, "--steps 62 --resume")
    train(work, tmp_path / "map", f"{flags} 3 --resume", "esd")
    assert_same_runs(tmp_path / "whole", tmp_path / "map")
    shutil.rmtree(stage1)
    flags = f"--lr 3e-3 --checkpoint {tmp_path}/map --steps"
    train(work, tmp_path / "dmd", f"{flags} 2", "dmd")
    saved = newest(tmp_path / "dmd")
    assert same(saved["stage1"], known)
    assert saved["optimizer"]["param_groups"][0]["betas"][0] == 0  # of dmd
    moved = [(saved["critic"]["head"] - known["head"]).abs().max()]
    moved.append((saved["model"]["head"] - newest(tmp_path / "map")["ema"]["head"]).abs().max())
    assert all(0 < step < 0.02 for step in moved)  # two steps of Adam from where each began
    shutil.rmtree(tmp_path / "map")
    train(work, tmp_path / "dmd", f"{flags} 3 --resume", "dmd")
    assert not sample.load_sampler(tmp_path / "dmd", "cpu")[2]  # a map, not an Euler sampler


def test_a_published_checkpoint_samples(work, tmp_path):
    """Averaged weights, config, meta and flags are all that sampling and scoring need."""
    saved = newest(work / "runs/grammar-diagonal")
    kept = {name: saved[name] for name in ("ema", "model_config", "meta", "args")}
    torch.save(kept, tmp_path / "small.pt")
    paths = [tmp_path / "small.pt", "runs/grammar-diagonal"]
    words = "sample.py --nfe 2 --num-samples 2 --checkpoint"
    small, whole = (run(work, f"{words} {path}").stdout for path in paths)
    assert small == whole
    run(work, f"evaluate.py --checkpoint {paths[0]} --num-samples 4 --bound 4 --nfe 1")


def test_examples(work, tmp_path):
    """watch.py shows each evaluation; steer.py raises the mean of its reward."""
    flags = f"--checkpoint {work}/runs/grammar-diagonal --nfe 2"
    out = run(tmp_path, f"examples/watch.py {flags} --output watch.gif").stdout
    assert re.findall(r"(?m)^evaluation (\d) of 2", out) == ["1", "2"]
    assert (tmp_path / "watch.gif").read_bytes().startswith(b"GIF8")
    out = run(tmp_path, f"examples/steer.py {flags} --strength 10").stdout
    plain, steered = map(float, re.findall(r"mean reward ([\d.]+)", out))
    assert steered > plain


# ---- Steps of the loop. ------------------------------------------------------------------------
def test_first_steps(work, tmp_path):
    """Learning rate, average, clipping and validation, from the checkpoints after each step.

    The average follows min(--ema, (1 + k) / (10 + k)); Adam's first moment starts at grad / 10.
    """
    out = tmp_path / "run"
    flags = "--steps 4 --lr 1e-2 --cooldown 2 --ema 0.15 --clip 0.01 --val-every 1"
    train(work, out, f"{flags} --save-every 1 --keep 9")
    lines = log_lines(out)
    assert [line["lr"] for line in lines] == [0.005, 0.01, 0.01, 0.005]
    once, twice = (read_checkpoint(out / f"checkpoint-{step}.pt") for step in (1, 2))
    options = {"seed": 0, "size": "tiny", "data": work / "data/grammar", **once["model_config"]}
    initial = train_diagonal.new_model(SimpleNamespace(**options), once["meta"])
    for name, first in initial.named_parameters():
        average = 0.1 * first.detach() + 0.9 * once["model"][name]
        assert torch.allclose(once["ema"][name], average, atol=1e-7), name
        average = 0.15 * average + 0.85 * twice["model"][name]
        assert torch.allclose(twice["ema"][name], average, atol=1e-7), name
    optimizer = once["optimizer"]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    squares = [state["exp_avg"].square().sum() for state in optimizer["state"].values()]
    assert float(sum(squares).sqrt()) == pytest.approx(0.001, rel=1e-4)
    assert lines[0]["grad_norm"] > 0.02  # of the gradient before clipping
    rows = read_rows(work / "data/grammar", "val", once["meta"])
    tokens = train_diagonal.take_rows(rows, 0, np.arange(32)).split(16)
    for line in lines[:2]:  # of the averaged weights, on the same rows and noise every time
        model, _ = load_model(out / f"checkpoint-{line['step']}.pt")
        total = 0
        for k, batch in enumerate(tokens):
            draw = Draw(train_diagonal.VAL_SEED, k, np.arange(16), "cpu")
            total += train_diagonal.diagonal_loss(model, batch, draw)[1]["diagonal_ce"]
        assert line["val_diagonal_ce"] == pytest.approx(float(total) / 2, rel=1e-6)


def test_rows_come_in_shuffled_epochs():
    """An epoch is each row once; its order depends on (seed, epoch) and not on the batch."""
    rows = np.arange(20, dtype=np.uint16)[:, None]

    def order(seed, first, count):
        places = np.arange(first, first + count)
        return train_diagonal.take_rows(rows, seed, places)[:, 0].tolist()

    first = order(0, 0, 20)
    second = order(0, 20, 20)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first not in (second, order(1, 0, 20))
    assert order(0, 17, 6) == (first + second)[17:23]


def test_bad_steps(work, tmp_path, monkeypatch):
    """A bad step changes nothing; a line holds means without them; more than 10 end the run."""
    real = train_diagonal.diagonal_loss

    def train_spoilt(steps, out, flags, **how):
        """Train with an infinite loss at these steps."""

        def diagonal_loss(model, tokens, draw, power):
            losses, report = real(model, tokens, draw, power)
            factor = math.inf if draw.step in steps and torch.is_grad_enabled() else 1.0
            return {"diagonal": losses["diagonal"] * factor}, report

        monkeypatch.setattr(train_diagonal, "diagonal_loss", diagonal_loss)
        return train(work, tmp_path / out, flags, **how)

    train_spoilt([2], "each", "--steps 6 --save-every 1 --keep 9")
    train_spoilt([2], "three", "--steps 3")
    names = [tmp_path / name for name in ("each/checkpoint-2.pt", "three", "each/checkpoint-4.pt")]
    two, three, four = map(read_checkpoint, names)
    assert same(two["model"], three["model"])
    assert same(two["optimizer"]["state"], three["optimizer"]["state"])
    assert not same(three["model"], four["model"])
    each = log_lines(tmp_path / "each")
    assert [line.get("skipped", 0) for line in each] == [0, 0, 1, 0, 0, 0]
    train_spoilt([2], "pairs", "--steps 6 --save-every 2 --keep 2 --log-every 9")
    pairs = log_lines(tmp_path / "pairs")
    assert all(math.isfinite(value) for line in each + pairs for value in line.values())
    assert [line["step"] for line in pairs] == [2, 4, 6]
    for line in pairs:
        for key in ("diagonal_ce", "loss_diagonal", "grad_norm"):
            steps = each[line["step"] - 2 : line["step"]]
            values = [step[key] for step in steps if "skipped" not in step]
            assert line[key] == pytest.approx(np.mean(values)), key
    names = {path.name for path in (tmp_path / "pairs").iterdir()}
    assert names == {"checkpoint-4.pt", "checkpoint-6.pt", "config.jsonl", "log.jsonl"}
    done = train_spoilt(range(3, 14), "ended", "--steps 16 --save-every 2", ok=False)
    assert newest(tmp_path / "ended")["step"] == 2  # a diverged run keeps its last good checkpoint
    assert "no finite gradient in 11 steps up to 14" in one_line(done)


class OneDevice(TorchDispatchMode):
    """Refuses operations, copies aside, on tensors of two devices; notes the largest result."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}  # scalars: anywhere
        copies = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        assert len(devices) < 2 or func.overloadpacket in copies, f"{func} on {devices}"
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


STEPS = [
    "train_diagonal.py",
    "train_diagonal.py --diagonal-power 0",
    "distill.py --loss psd",
    "distill.py --loss psd --divergence square --diagonal-from stage1",
    "distill.py --loss psd --guidance 1.5",
    "distill.py --loss lsd",
    "distill.py --loss lsd --form logit",
    "distill.py --loss esd",
    "distill.py --loss esd --form signed --psd-share 0.25",
    "distill.py --loss esd --joint",
    "distill.py --loss dmd",
    "distill.py --loss dmd --boundary 0.5 --diagonal-share 0.25 --diagonal-from stage1",
    "sample.py",
    "sample.py --nfe 3 --gamma 0.5",
    "sample.py --nfe 3 --gamma 1 --temperature 0.7",
]


def step_on_meta(words, monkeypatch, B, config):
    """Take the step that a command line asks for, or draw its samples, on the meta device."""
    args = resolved(words, monkeypatch)
    vars(args).setdefault("context", None)
    vars(args).setdefault("surgery", False)
    L = config.seq_len
    draw = Draw(0, 0, np.arange(B), "meta")
    with torch.device("meta"):
        model, stage1, critic = (DiT(config).to("meta") for _ in range(3))
    stage1.requires_grad_(False)
    if words.startswith("sample"):
        how = dict(nfe=args.nfe[0], gamma=args.gamma, temperature=args.temperature)
        rows = sample.write_rows(model, B, lambda n: draw.normal(n, model.noise_size), **how)
        assert rows.shape == (B, L)
        return
    objective = functools.partial(train_diagonal.diagonal_loss, power=args.diagonal_power)
    params = list(model.parameters())
    if words.startswith("distill"):
        if args.guidance != 1:
            stage1 = Conditional(stage1, None, torch.arange(L, device="meta"))
        objective = distill.distillation(args, None if args.joint else stage1, critic)
        params += list(critic.parameters()) if args.loss == "dmd" else []
    batches = [(torch.empty(B, L, dtype=torch.long, device="meta"), draw)]
    grads, _ = train_diagonal.gradients(params, objective, model, batches, args.surgery)
    assert all(grad.device.type == "meta" for grad in grads)


@pytest.mark.parametrize("words", STEPS)
def test_a_step_is_cheap(words, monkeypatch):
    """No step reads a value or mixes devices, which on CUDA would wait: on meta either fails.

    At the paper's size none makes a tensor larger than the activations (B, L, 4 D). One of size V,
    (B, L, V), would be 16 times as large. Two layers, as all have the same sizes.
    """
    knots = {V: model_file.schedule_table("linear", V, 0.0) for V in (300, 50257)}
    monkeypatch.setattr("model.schedule_table", lambda kind, V, blend: knots[V])
    # The meta device has neither autocast nor random numbers.
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(
        Draw, "normal", lambda self, *shape: torch.empty(len(self.rows), *shape, device="meta")
    )
    for lag in (0.0, 0.5):
        config = ModelConfig(300, 8, **SIZES["tiny"], position_lag=lag)
        with OneDevice():
            step_on_meta(words, monkeypatch, 16, config)
    # The fused kernel makes no tensor (L, L), unlike attention on meta.
    monkeypatch.setattr("model.attention", lambda q, k, v, causal=False: q + k + v)
    B, L = 64, 1024
    config = ModelConfig(50257, L, **SIZES["base"] | {"layers": 2})
    with OneDevice() as seen:
        step_on_meta(words, monkeypatch, B, config)
    half = 2 if "--loss" in words and "dmd" not in words else 1  # of the rows learn an identity
    assert B // half * L * config.width <= seen.largest <= B * L * 4 * config.width


# ---- Ranks, micro-batches, resuming, checkpoints. ----------------------------------------------

SEVERAL = f"""
import runpy, shlex, sys
import torch.distributed as dist
sys.path.insert(0, "{HERE}")
for words in sys.argv[1:]:
    sys.argv = shlex.split(words)
    runpy.run_path("{HERE}/" + sys.argv[0], run_name="__main__")
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
"""


def test_ranks_and_micro_batches_change_nothing(work, tmp_path):
    """One step by one rank, in four micro-batches, and by two ranks: one gradient and one log."""
    stages = ("context", "psd", "esd", "dmd")
    (tmp_path / "several.py").write_text(SEVERAL)  # one pair of processes for all stages
    commands = []
    for stage in stages:
        flags = "--steps 1 --clip 1e9 --micro-batch"  # clipping would hide the scale
        train(work, tmp_path / f"{stage}-whole", f"{flags} 16", stage)
        train(work, tmp_path / f"{stage}-micro", f"{flags} 4", stage)
        keep = lambda cwd, words: commands.append(words)  # noqa: E731
        train(work, tmp_path / f"{stage}-ranks", f"{flags} 4", stage, keep)
    finish(start(work, shlex.join([f"{tmp_path}/several.py", *commands]), TORCHRUN))
    for stage in stages:
        saved = newest(tmp_path / f"{stage}-whole")["optimizer"]["state"]
        scale = max(float(state["exp_avg"].abs().max()) for state in saved.values())
        assert scale > 0
        (line,) = log_lines(tmp_path / f"{stage}-whole")
        assert line.get("conflict") == (1 if stage == "psd" else None)
        for out in (tmp_path / f"{stage}-micro", tmp_path / f"{stage}-ranks"):
            other = newest(out)["optimizer"]["state"]
            for key, state in saved.items():  # the gradient, read from Adam's first moment
                difference = state["exp_avg"] - other[key]["exp_avg"]
                assert float(difference.abs().max()) < 1e-4 * scale, (out, key)
            assert log_lines(out) == [pytest.approx(line, rel=1e-4, abs=1e-4)]


@pytest.mark.parametrize("stage", ["diagonal", "context", "psd", "lsd", "dmd", "joint"])
def test_resuming_equals_never_stopping(work, tmp_path, stage):
    """Three steps, then --resume to six, equal six at once; config.jsonl has both starts."""
    flags = "--micro-batch 8 --val-every 3 --steps"
    parts = tmp_path / "parts"
    train(work, tmp_path / "whole", f"{flags} 6", stage)
    train(work, parts, f"{flags} 3", stage)
    with open(parts / "log.jsonl", "a") as file:  # of a run killed after its checkpoint
        file.write('{"step": 4}\n{"st')
    out = train(work, parts, f"{flags} 6 --resume", stage).stdout
    assert_same_runs(tmp_path / "whole", parts)
    assert "resuming with steps 6; it was 3" in out
    starts = [(line["step"], line["args"]["steps"]) for line in read_lines(parts / "config.jsonl")]
    assert starts == [(0, 3), (3, 6)]


def stopped_at(run, output):
    """The step at which a run says a signal has stopped it, which is logged and saved."""
    (step,) = re.findall(r"stopped by a signal after step (\d+)", output)
    assert newest(run)["step"] == log_lines(run)[-1]["step"] == int(step)
    return int(step)


def test_kills_and_signals_lose_nothing(work, tmp_path):
    """SIGKILL at a random moment; SIGTERM and SIGINT save, exit with 143. Resumed: as if never."""
    flags = "--micro-batch 8 --steps 60 --save-every 3"
    train(work, tmp_path / "whole", flags, "psd")
    chance = random.Random(0)
    parts = tmp_path / "parts"
    last = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = train(work, parts, flags, "psd", start)
        flags += " --resume"
        wait_for_step(process, parts, last + chance.randint(4, 10))
        time.sleep(chance.random() * 0.2)
        process.send_signal(number)
        if number == signal.SIGKILL:
            finish(process, codes=[-number])
            last = log_lines(parts)[-1]["step"]
        else:
            last = stopped_at(parts, finish(process, codes=[143]))
        assert last < 60
    train(work, parts, flags, "psd")
    assert_same_runs(tmp_path / "whole", parts)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found in /proc")
def test_two_ranks_end_together(work, tmp_path):
    """A signal to one rank saves and ends both; a kill -9 restarts both. Nothing is lost."""
    flags = "--micro-batch 4 --steps 40 --save-every 3 --resume"
    finish(train(work, tmp_path / "whole", flags, "esd", start, launcher=TORCHRUN))
    parts = tmp_path / "parts"

    def children(process):
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return list(map(int, path.read_text().split()))

    process = train(work, parts, flags, "esd", start, launcher=TORCHRUN)
    wait_for_step(process, parts, 5)
    os.kill(children(process)[-1], signal.SIGTERM)
    last = stopped_at(parts, finish(process, codes=range(1, 256)))
    process = train(work, parts, flags, "esd", start, launcher=[*TORCHRUN, "--max-restarts=1"])
    wait_for_step(process, parts, last + 5)
    ranks = children(process)
    os.kill(ranks[-1], signal.SIGKILL)
    finish(process)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    starts = [line["step"] for line in read_lines(parts / "config.jsonl")]
    assert starts[:2] == [0, last] and last < starts[2] < 40
    assert_same_runs(tmp_path / "whole", parts)


def test_damaged_checkpoints(work, tmp_path):
    """A flipped bit or a cut is refused in one line, which names the checkpoint before."""
    out = tmp_path / "parts"
    train(work, out, "--save-every 2 --steps 4", "esd")
    good = (out / "checkpoint-4.pt").read_bytes()
    whole = newest(out)
    chance = random.Random(0)
    refusals = 0
    for case in range(30):
        damaged = bytearray(good)
        place = chance.randrange(len(good))
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "x.pt").write_bytes(damaged if case % 2 else good[:place])
        try:  # a bit in the padding between records harms nothing
            assert same(read_checkpoint(tmp_path / "x.pt"), whole), "damage that was not seen"
        except SystemExit:
            refusals += 1
    assert refusals >= 27
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 255
    (out / "checkpoint-4.pt").write_bytes(damaged)
    done = train(work, out, "--steps 6 --resume", "esd", ok=False)
    assert re.search(r"checkpoint-4\.pt .*checksum.*checkpoint-2\.pt", one_line(done))


def test_a_kill_during_a_write(tmp_path):
    """Killed at any byte and between any two file operations: the newest checkpoint is whole."""
    weights = {"w": torch.ones(20_000)}
    content = {"model": weights, "ema": weights, "model_config": {}, "optimizer": {}, "meta": {}}

    def save(step):
        model_file.save_checkpoint(tmp_path, {**content, "args": {}, "step": step}, keep=2)

    def die_at_byte(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def die_at_operation(count):
        def audit(event, arguments):
            ours = event in ("open", "os.rename", "os.remove") and str(tmp_path) in str(arguments)
            if ours and next(count) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)

    save(1)
    size = (tmp_path / "checkpoint-1.pt").stat().st_size
    places = [functools.partial(die_at_byte, size * k // 20) for k in range(20)]
    places += [functools.partial(die_at_operation, itertools.count(-k)) for k in range(6)]
    kills = 0
    for step, place in enumerate(places, 2):
        child = os.fork()
        if not child:
            with suppress(BaseException):
                place()
                save(step)
            os._exit(0)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        newest_step = max(int(path.stem[11:]) for path in tmp_path.glob("checkpoint-*.pt"))
        assert read_checkpoint(tmp_path)["step"] == newest_step
        assert newest_step in (step - 1, step)
        save(step)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {f"checkpoint-{k}.pt" for k in (step - 1, step)}
    assert kills >= 20 + 3


def test_a_full_disk(work, tmp_path):
    """One line, and what was there stays whole; with room --resume goes on; scores are printed."""
    out = tmp_path / "run"
    train(work, out, "--steps 2", "psd")
    with small_files(5_000_000):
        done = train(work, out, "--steps 4 --resume", "psd", ok=False)
    assert re.search(r"cannot write \S+checkpoint-4\.pt .*make room", one_line(done))
    assert newest(out)["step"] == 2
    assert not list(out.glob("*.tmp"))
    train(work, out, "--steps 4 --resume", "psd")
    assert newest(out)["step"] == 4
    flags = "--checkpoint runs/grammar-diagonal --num-samples 99 --output"
    with small_files(2000):
        done = [train(work, tmp_path / "log", "--steps 99", ok=False)]
        done.append(run(work, f"sample.py {flags} {tmp_path}/s.jsonl", ok=False))
        done.append(run(work, f"evaluate.py {flags} {tmp_path}/s.json", ok=False))
    for program in done:
        assert re.search("cannot write .*too large.*make room", one_line(program))
    assert {path.name for path in tmp_path.glob("s.*")} == {"s.json"}  # the rows that fitted
    assert "validation rows" in done[2].stdout


# ---- Preparing text. ---------------------------------------------------------------------------
def prepared(folder, words, ok=True):
    """What prepare_data.py says of a source, and its rows of two characters as one text."""
    words = f"prepare_data.py file --tokenizer char --seq-len 2 --force --source {words}"
    done = run(folder, words, ok)
    if not ok:
        return one_line(done)
    meta = read_meta(folder / "data/file")
    rows = [*read_rows(folder / "data/file", "train", meta)]
    rows += [*read_rows(folder / "data/file", "val", meta)]
    return done.stdout, "".join(decode(meta, row) for row in rows)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "txt.gz", "jsonl.gz"])
def test_formats(tmp_path, kind):
    """A folder means all its files of text in order; names are no patterns, a BOM is no text."""
    import pyarrow.parquet

    folder = tmp_path / "d[1]"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "README.md").write_text("no text")
    for name, text in (
        (f".hidden/c.{kind}", "ef"),
        (f"sub/b.{kind.upper()}", "cd"),
        (f"a.{kind}", "ab"),
    ):
        path = folder / name
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
            continue
        text = text if "txt" in kind else json.dumps({"text": text})
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path, "wt", encoding="utf-8-sig") as file:  # with a byte order mark
            file.write(text)
    assert prepared(tmp_path, "'d[1]'")[1] == "ab\nc"
    if kind.endswith("gz"):
        path.write_bytes(path.read_bytes()[:-9])
        assert path.name in prepared(tmp_path, "'d[1]'", ok=False)


def test_splits(tmp_path):
    """The last 5% of the rows are held out; text8 is cut 90, 5 and 5%."""
    text = "\n".join(f"Document {i}: the quick brown fox" for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    words = "prepare_data.py file --tokenizer char --seq-len 32 --documents line --source a.txt"
    run(tmp_path, words)
    meta = read_meta(tmp_path / "data/file")
    rows = [read_rows(tmp_path / "data/file", split, meta) for split in ("train", "val")]
    assert "".join(decode(meta, row) for row in np.concatenate(rows)) == text[: -(len(text) % 32)]
    assert meta["val_rows"] == sum(map(len, rows)) // 20
    text = "\n\nab\ncd\n\n\n\n\nef\ngh\n"
    (tmp_path / "a.txt").write_text(text, newline="\r\n")
    assert "--force" in run(tmp_path, words).stdout
    assert read_meta(tmp_path / "data/file") == meta
    assert prepared(tmp_path, "a.txt --documents paragraph --limit 2")[1] == "ab\ncd\n\nef\ngh"
    text = "abcdefghij" * 6000
    (tmp_path / "a.txt").write_text(text)
    run(tmp_path, "prepare_data.py text8 --source a.txt")
    meta = read_meta(tmp_path / "data/text8")
    assert (meta["train_rows"], meta["val_rows"]) == (54_000 // 256, 3000 // 256)
    first, *_ = read_rows(tmp_path / "data/text8", "val", meta)
    assert decode(meta, first) == text[54_000:][:256]


def test_prepare_data_killed(tmp_path):
    """Killed at random moments, then run again: the bytes of a run left in peace."""
    lines = (f"{n} is a number and {n * n} its square. " for n in range(100_000))
    (tmp_path / "t.txt").write_text("".join(lines))
    words = "prepare_data.py file --source t.txt --tokenizer char --out"
    run(tmp_path, f"{words} whole")
    chance = random.Random(0)
    partial = tmp_path / "parts.partial"
    for _ in range(2):
        process = start(tmp_path, f"{words} parts --force")
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.5)
        process.kill()
        process.wait()
    partial.mkdir(exist_ok=True)
    (partial / "train.bin").write_bytes(b"half a ro")
    run(tmp_path, f"{words} parts --force")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not partial.exists()


def test_json_lines_as_people_have_them(tmp_path):
    """Another field changes its type, a text is absent, one holds half a pair, a line is blank."""
    lines = ['{"text": "ab", "id": 1}', '{"text": "cd", "id": [{}]}', "", '{"id": null}']
    lines += ['{"text": "\\ud83d\\ude00 e\\ud83d"}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    out, text = prepared(tmp_path, "a.jsonl")
    assert text == "ab\ncd\n\n\N{GRINNING FACE} e\ufffd\n"
    assert "2 documents have no 'text'" in out
    assert "1 documents hold half a surrogate pair" in out


def test_splits_from_the_hub(tmp_path, monkeypatch):
    """--config names a configuration; without a validation split OWT's last documents are held."""
    import datasets

    texts = {"train": ["ab" * 8, "gh" * 8, "gh" * 8], "validation": ["cd" * 8], "test": ["ef" * 8]}
    splits = {name: datasets.Dataset.from_dict({"text": text}) for name, text in texts.items()}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **where: asked.append(where) or splits)
    text = prepared(tmp_path, "owner/name --config small")[1]
    assert asked == [{"path": "owner/name", "name": "small"}]
    assert text == "\n".join(texts["train"]) + "cd" * 8
    monkeypatch.setitem(prepare_data.SOURCES["owt"], "val_documents", 2)
    del splits["validation"], splits["test"]
    run(tmp_path, "prepare_data.py owt --tokenizer char --seq-len 2")
    meta = read_meta(tmp_path / "data/owt")
    assert (meta["train_rows"], meta["val_rows"]) == (8, 16)
    assert decode(meta, read_rows(tmp_path / "data/owt", "val", meta)[0]) == "gh"


@needs_data
def test_real_text_gpt2(tmp_path, monkeypatch):
    """Wikipedia through GPT-2's tokenizer: framed rows that decode to it."""
    cache = shutil.copytree(Path(TEST_DATA) / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))  # tiktoken may write to it
    with lzma.open(Path(TEST_DATA) / "wiki.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    documents = re.findall(r"<doc [^>]*>\s*(.*?)\s*</doc>", text, re.DOTALL)
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "wiki.jsonl").write_text("".join(lines))
    words = "prepare_data.py owt --source wiki.jsonl --out data/wiki --seq-len 64"
    run(tmp_path, f"{words} --workers 2")
    meta = read_meta(tmp_path / "data/wiki")
    assert meta["vocab_size"] == 50257
    assert encoder(meta)("<|endoftext|>hello world") == [50256, 31373, 995]
    rows = [read_rows(tmp_path / "data/wiki", split, meta) for split in ("train", "val")]
    rows = np.concatenate(rows)
    assert set(rows[:, 0]) == set(rows[:, -1]) == {50256}
    text = decode(meta, rows[:, 1:-1].flatten())
    joined = "<|endoftext|>".join(documents) + "<|endoftext|>"
    assert joined.startswith(text[:-1])  # the last character may be cut
    assert len(text) > len(joined) - 400


CLEANED = {  # pieces -> text, as transformers 4 decodes them
    'the arrest , " he said .': 'the arrest, " he said.',
    "it ' s john ' s": "it's john's",
    "who ? me !": "who? me!",
    "rock ' n ' roll": "rock'n'roll",
    "the boys ' . end": "the boys '. end",
    "3 . 5 % , 1 , 000": "3. 5 %, 1, 000",
    "a - b ; c : d ( e )": "a - b ; c : d ( e )",
    "un ##aff ##able , yes": "unaffable, yes",
    "[CLS] ' s [SEP] , .": "[CLS]'s [SEP],.",
    "can ' t . ' no '": "can't.'no '",
}


@pytest.mark.parametrize("pieces", CLEANED)
def test_bert_text_is_joined_as_people_write_it(pieces):
    """As transformers 4 decodes it: no space before . ? ! , nor around an apostrophe."""
    vocab = ["[PAD]", *pieces.split()]
    meta = dict(tokenizer="bert", vocab=vocab, join=" ", pad_id=0)
    ids = range(1, len(vocab))
    assert decode(meta, [*ids, 0, 0]) == CLEANED[pieces]


@needs_data
def test_real_text_bert(tmp_path):
    """LM1B sentences through bert-base-uncased: rows [CLS] ... [SEP] of 128, ## pieces joined."""
    bert = Path(TEST_DATA) / "bert-base-uncased"
    text = lzma.decompress((Path(TEST_DATA) / "lm1b_dev.txt.xz").read_bytes()).decode()
    lines = text.splitlines()[:400]
    (tmp_path / "lm1b.txt").write_text("\n".join(lines))
    run(tmp_path, f"prepare_data.py lm1b --source lm1b.txt --bert {bert} --workers 1")
    meta = read_meta(tmp_path / "data/lm1b")
    assert (meta["vocab_size"], meta["seq_len"]) == (30522, 128)
    cls, *ids = encoder(meta)("[CLS] An unaffable cat")
    assert cls == 101
    assert decode(meta, [*ids, 0, 0]) == "an unaffable cat"
    rows = read_rows(tmp_path / "data/lm1b", "train", meta)
    assert (rows[:, [0, -1]] == [101, 102]).all()
    assert (rows[:, 1:-1] == 102).sum() == pytest.approx(380, abs=20)  # between two sentences
    from transformers import BertTokenizerFast

    theirs = BertTokenizerFast.from_pretrained(bert)
    for row in rows[:200].tolist():
        assert decode(meta, row) == theirs.decode(row, clean_up_tokenization_spaces=True)
    first = re.sub(r"\W", "", decode(meta, rows[0, 1:-1]).replace("[SEP]", ""))
    assert re.sub(r"\W", "", "".join(lines).lower()).startswith(first[:300])


# ---- Samples and scores. -----------------------------------------------------------------------
def read_texts(path):
    """The texts in a .jsonl by sample.py."""
    return [line["text"] for line in read_lines(path)]


@pytest.fixture(scope="session")
def conditional(work):
    """In the folder of `work`: runs/any and runs/block of stage 1, runs/guided of stage 2."""
    train(work, "runs/any", "--context any --steps 4 --lr 1e-2")
    train(work, "runs/block", "--context block --block-size 5 --steps 4 --lr 1e-2")
    train(work, "runs/guided", "--checkpoint runs/any --guidance 1.5 --steps 2", "psd")
    return work


def test_prompts(conditional):
    """Samples keep the prompt; guidance, blocks and seeds change the rest."""
    meta = read_meta(conditional / "data/grammar")
    prompt = "some farmers near"

    def written(flags, length=meta["seq_len"]):
        how = f"--prompt '{prompt}' --num-samples 3 --nfe 2 --gamma 0.5 --temperature 1"
        run(conditional, f"sample.py {how} --output x.jsonl --checkpoint runs/{flags}")
        rows = [encoder(meta)(text) for text in read_texts(conditional / "x.jsonl")]
        return np.array([row + [meta["pad_id"]] * (length - len(row)) for row in rows])

    plain = written("any")
    assert np.array_equal(plain, written("any --batch-size 2"))
    assert not np.array_equal(plain, written("any --seed 1"))
    guided = written("any --guidance 40")
    assert not np.array_equal(plain, guided)
    blocks = written("any --block-size 2 --length 14", 14)  # slides
    longer = written("any --block-size 2 --length 17", 17)
    assert np.array_equal(longer[:, :13], blocks[:, :13])
    for rows in (plain, guided, blocks, written("guided")):
        assert (rows[:, :3] == encoder(meta)(prompt)).all()
    saved = newest(conditional / "runs/guided")["args"]
    assert (saved["context"], saved["guidance"], saved["diagonal_from"]) == ("any", 1.5, "stage1")


def test_a_model_of_blocks_writes_blocks(conditional):
    """Whole rows of a model trained on blocks of 5 are two blocks, the second given the first."""
    model, saved, _ = sample.load_sampler(conditional / "runs/block", "cpu")
    how = dict(euler=True, block_size=saved["args"]["block_size"])
    rows = torch.from_numpy(sample.draw_samples(model, 2, 3, 64, 0, **how))
    draw = Draw(0, 0, range(3), "cpu")
    keys = None
    for places in (torch.arange(5), torch.arange(5, 10)):
        noise = draw.normal(5, model.noise_size)
        hidden = sample.generate(Conditional(model, keys, places), noise, 2, euler=True)
        expected = sample.choose(model.head, hidden)
        assert torch.equal(rows[:, places], expected)
        keys = model.encode(expected)
    out = run(conditional, "sample.py --checkpoint runs/block --nfe 2 --num-samples 3").stdout
    assert out.splitlines()[-3:] == [decode(saved["meta"], row) for row in rows]


def test_a_long_text_leaves_out_the_place_of_eos(monkeypatch):
    """Framed rows end with EOS at position L - 1, so the window of a text beyond L has L - 1."""
    monkeypatch.setattr(sample, "encoder", lambda meta: lambda text: [5, 6])
    args = SimpleNamespace(prompt="a b", length=40, block_size=4, guidance=1.0, checkpoint="")
    for bos, context, window in ((None, "any", 16), (0, "any", 15), (None, "block", 16)):
        trained = {"context": context, "block_size": 2}
        found = sample.prompt_options(args, {"seq_len": 16, "bos_id": bos}, trained)
        assert found["window"] == window


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A small GPT-2 of random weights with a byte-pair tokenizer, as from_pretrained reads it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    eos = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    corpus = [(HERE / "prepare_data.py").read_text()]
    bpe.train_from_iterator(corpus, vocab_size=400, special_tokens=[eos])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=eos).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=1024, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


TEXTS = ["def main(): return 1", "", "x", "<|endoftext|>class A:", "for i in range(9): " * 30]
TEXTS += ["import os<|endoftext|>import re<|endoftext|>", "end"]


def protocol(text, model, tokenizer, length):
    """The protocol in words, one token at a time: (NLL, tokens counted)."""
    terms = []
    seen_eos = False
    ids = tokenizer(text)["input_ids"][:length]
    for position, token in enumerate(ids):
        is_eos = token == tokenizer.eos_token_id
        if position and not (is_eos and seen_eos):
            logits = model(torch.tensor([ids[:position]])).logits[0, -1].detach().double()
            terms.append(-float(logits.log_softmax(-1)[token]))
        seen_eos |= is_eos
    return sum(terms), len(terms)


def test_judge_scores(judge):
    """Against the protocol, one token at a time, for awkward texts: EOS inside, empty, too long."""
    model, tokenizer = evaluate.load_judge(str(judge), "cpu")
    expected = np.array([protocol(text, model, tokenizer, 24) for text in TEXTS])
    for batch in (1, 3, 8):
        scores = evaluate.judge_scores(TEXTS, model, tokenizer, max_length=24, batch_size=batch)
        assert scores[:, 1].tolist() == expected[:, 1].tolist()
        assert scores[:, 0] == pytest.approx(expected[:, 0], rel=1e-4)
        assert scores[1].tolist() == scores[2].tolist() == [0, 0]


def test_entropies():
    """-sum p log p in nats of each row's own tokens, for rows of any length."""
    rows = [np.array(row, np.int64) for row in ([1, 1, 2, 2], [5, 6, 7, 5, 50256], [9], [])]
    expected = [math.log(2), 0.4 * math.log(5 / 2) + 0.6 * math.log(5), 0, 0]
    assert np.abs(evaluate.entropies(rows) - expected).max() < 1e-9


def test_controls():
    """Validation rows, their words shuffled inside the frame, draws by training frequency."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sea", "##son", "of", "light"]
    meta = {"tokenizer": "bert", "vocab": vocab, "join": " ", "vocab_size": 9, "seq_len": 12}
    meta |= {"bos_id": 2, "eos_id": 3, "pad_id": 0}
    rng = np.random.default_rng(0)
    pairs = np.array([[5, 6], [7, 8]])
    body = pairs[(rng.random((500, 5)) < 0.3).astype(int)].reshape(500, 10)
    rows = np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (2, 3))).astype(np.uint16)
    controls = evaluate.control_rows(meta, rows, rows[:200], 100, 0)
    real, shuffled, unigram = map(np.array, controls.values())
    assert set(map(tuple, real)) <= set(map(tuple, rows[:200].tolist()))
    assert all((control[:, [0, -1]] == [2, 3]).all() for control in (real, shuffled, unigram))
    for a, b in zip(real, shuffled, strict=True):
        assert sorted(decode(meta, a).split()) == sorted(decode(meta, b).split())
    assert (real != shuffled).any(1).sum() > 60
    share = np.bincount(body.ravel(), minlength=9) / body.size
    drawn = np.bincount(unigram[:, 1:-1].ravel(), minlength=9) / 1000
    assert np.abs(drawn - share).max() < 5 * (0.25 / 1000) ** 0.5


def test_bootstrap():
    """The interval of a mean is that of the normal law; what is not finite has none."""
    samples = np.random.default_rng(1).normal(size=400)
    found = evaluate.bootstrap("mean", samples, np.ones(400))
    low, high = found["mean_interval"]
    assert found["mean"] == pytest.approx(samples.mean())
    assert low < found["mean"] < high
    assert high - low == pytest.approx(2 * 1.96 * samples.std() / 20, rel=0.1)
    missing = evaluate.bootstrap("mean", np.zeros(2), np.zeros(2))
    assert missing == {"mean": None, "mean_interval": None}
    some = evaluate.bootstrap("mean", np.ones(2), np.array([1, 0]))  # 2/0 if the first is not drawn
    assert some == {"mean": 2, "mean_interval": None}


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A folder with data/t, characters of a repetitive text, and a short stage-1 run of it."""
    folder = tmp_path_factory.mktemp("letters")
    chance = random.Random(0)
    text = "to be or not to be that is the question whether tis nobler in the mind to suffer "
    parts = (text[text.index(" ", chance.randrange(40)) :] for _ in range(400))
    (folder / "t.txt").write_text("".join(parts))
    run(folder, "prepare_data.py file --source t.txt --tokenizer char --seq-len 32 --out data/t")
    run(folder, f"train_diagonal.py --data data/t --steps 2 --size tiny {RUN}")
    return folder


def evaluated(folder, flags):
    """What evaluate.py writes as JSON, and what it prints."""
    out = run(folder, f"evaluate.py {flags} --output e.json").stdout
    return json.loads((folder / "e.json").read_text()), out


def test_evaluate_text(letters, judge):
    """A model of characters: controls, every combination, intervals, the bound and the table."""
    flags = f"--checkpoint runs/t-diagonal --judge {judge} --num-samples 6"
    flags += " --nfe 1 2 --gamma 0 1 --temperature 0 1 --bound 3"
    found, out = evaluated(letters, flags)
    for r in found["results"]:
        assert r["samples"] == 6
        assert r["gen_ppl_interval"][0] <= r["gen_ppl"] <= r["gen_ppl_interval"][1]
    results = {(r["nfe"], r["gamma"], r["temperature"]): r for r in found["results"][3:]}
    assert results.keys() >= {(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)}
    (bound,) = found["bound"]
    assert bound["rows"] == 3
    assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_a_token"]))
    assert 1 < bound["perplexity"] < 2 * len(read_meta(letters / "data/t")["vocab"])
    assert len(re.findall(r"(?m)^\|", out)) == (2 + 3 + len(results)) + (2 + 1)
    run(letters, "benchmarks/curves.py e.json --output e.png")
    assert (letters / "e.png").read_bytes().startswith(b"\x89PNG")

    model, saved = load_model(letters / "runs/t-diagonal")  # one of the rows from its parts
    rows = sample.draw_samples(model, 2, 6, 64, 0, euler=True, gamma=1.0, temperature=1.0)
    texts = [decode(saved["meta"], row) for row in rows]
    nll, count = evaluate.judge_scores(texts, *evaluate.load_judge(str(judge), "cpu"), 32).sum(0)
    assert results[2, 1, 1]["gen_ppl"] == pytest.approx(math.exp(nll / count))
    assert results[2, 1, 1]["entropy"] == pytest.approx(evaluate.entropies(rows).mean())


def test_a_killed_evaluation_keeps_its_rows(work, tmp_path, monkeypatch):
    """Each row is printed, and written as JSON, as soon as it is scored; then that is kept too."""
    draw = evaluate.draw_samples

    def killed(model, nfe, *inputs, **how):
        if nfe == 3:
            raise SystemExit("killed")
        return draw(model, nfe, *inputs, **how)

    monkeypatch.setattr(evaluate, "draw_samples", killed)
    flags = f"--checkpoint runs/grammar-diagonal --num-samples 9 --output {tmp_path}/e.json"
    done = run(work, f"evaluate.py {flags} --nfe 1 3", ok=False)
    assert one_line(done) == "killed"
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [row["nfe"] for row in results] == [None, None, None, 1]
    assert all(f"entropy {row['entropy']:.3f}" in done.stdout for row in results)
    run(work, f"evaluate.py {flags} --nfe 2")
    assert json.loads((tmp_path / "e.json.old").read_text())["results"] == results


def test_bound_by_data_set(letters):
    """--bound alone: a row for each data set, without a judge."""
    words = "prepare_data.py file --source t.txt --tokenizer char --seq-len 32"
    run(letters, f"{words} --out data/v")
    flags = "--checkpoint runs/t-diagonal --bound 4"
    found, _ = evaluated(letters, f"{flags} --data data/t data/v")
    assert found["results"] == []
    assert [(row["data"], row["rows"]) for row in found["bound"]] == [("t", 4), ("v", 4)]
    assert evaluated(letters, flags)[0]["bound"] == found["bound"][:1]


def test_training_from_weights(letters, tmp_path):
    """--init starts from the averaged weights of a checkpoint, on rows of another length."""
    words = f"prepare_data.py file --source {letters}/t.txt --tokenizer char --seq-len 48"
    run(tmp_path, f"{words} --out data/l")
    words = f"train_diagonal.py --data data/l --init {letters}/runs/t-diagonal --lr 0 {RUN}"
    out = run(tmp_path, f"{words} --size small --steps 2").stdout
    assert "size, path and schedule" in out
    model, _ = load_model(tmp_path / "runs/l-diagonal")
    first, _ = load_model(letters / "runs/t-diagonal")
    assert (model.config.seq_len, model.config.width) == (48, SIZES["tiny"]["width"])
    assert same(dict(model.state_dict()), dict(first.state_dict()))
    run(tmp_path, f"{words} --resume --steps 3")
    out = run(tmp_path, "sample.py --checkpoint runs/l-diagonal --num-samples 1").stdout
    assert len(out.splitlines()[-1]) == 48


def test_equal_entropy(work):
    """--entropy draws tokens at the temperature that gives the entropy asked for."""
    flags = "--checkpoint runs/grammar-diagonal --num-samples 64 --nfe 2 --gamma 1 --entropy"
    model, _ = load_model(work / "runs/grammar-diagonal")
    for target, dtype in ((1.9, "float32"), (2.0, "bfloat16")):
        row = evaluated(work, f"{flags} {target} --dtype {dtype}")[0]["results"][-1]
        assert row["entropy"] == pytest.approx(target, abs=0.01)
        how = dict(euler=True, gamma=1.0, temperature=row["temperature"], dtype=dtype)
        ids = sample.draw_samples(model, 2, 64, 64, 0, **how)
        assert row["entropy"] == evaluate.entropies(ids).mean()


def test_evaluate_samples(letters, judge):
    """A .jsonl and a .txt of the same samples score as their model's, also without a data set."""
    flags = "--checkpoint runs/t-diagonal --nfe 2 --num-samples 5"
    run(letters, f"sample.py {flags} --output s.jsonl")
    (letters / "s.txt").write_text("\n".join(read_texts(letters / "s.jsonl")) + "\n")
    (letters / "odd.txt").write_text("to\u2028be\\n\n\n")
    assert evaluate.read_samples(letters / "odd.txt") == ["to\u2028be\\n", ""]
    files = f"--samples s.jsonl s.txt --judge {judge}"
    results = evaluated(letters, f"{flags} {files}")[0]["results"][3:]
    assert [r["model"] for r in results] == ["s.jsonl", "s.txt", "t-diagonal"]
    for key in ("gen_ppl", "entropy"):
        assert len({r[key] for r in results}) == 1, key
    alone = evaluated(letters, files)[0]["results"]
    assert [r["gen_ppl"] for r in alone] == pytest.approx([results[0]["gen_ppl"]] * 2)


# ---- Mistakes that people make: one clear line on stderr, no traceback, nothing written or lost.

ABSENT_DEVICE = "mps" if torch.cuda.is_available() else "cuda"
MISTAKES = [  # the command line, and what its refusal names
    ("prepare_data.py file --source absent.txt", "absent.txt"),
    ("prepare_data.py file --source latin.txt --tokenizer char", "latin.txt"),
    ("prepare_data.py file --source lines.jsonl --tokenizer char", "--column"),
    ("prepare_data.py file --source cut.jsonl --tokenizer char", "line 2 of cut.jsonl"),
    ("prepare_data.py file --source short.txt --out grammar", "--force"),
    ("prepare_data.py grammar --out trained --force", "trained"),
    ("prepare_data.py grammar --out locked", "another process"),
    ("prepare_data.py file --source short.txt --tokenizer bert --bert bert", "bert"),
    ("train_diagonal.py", "python prepare_data.py owt"),
    ("train_diagonal.py --data broken", "meta.json"),
    (f"train_diagonal.py --data grammar --device {ABSENT_DEVICE}", ABSENT_DEVICE),
    ("train_diagonal.py --data grammar --batch-size 10 --micro-batch 4", "--micro-batch"),
    ("train_diagonal.py --data grammar --context block --block-size 3", "--block-size"),
    ("train_diagonal.py --data grammar --out trained", "--resume"),
    ("train_diagonal.py --data grammar --out begun", "--resume"),
    ("train_diagonal.py --data changed --out trained --resume", "sha256"),
    ("distill.py --data grammar --loss psd", "runs/grammar-diagonal"),
    ("distill.py --data grammar --loss esd --checkpoint guided", "map"),
    ("distill.py --data grammar --loss dmd --checkpoint published.pt", "a map with one"),
    ("distill.py --data grammar --loss esd --out trained --resume", "another kind"),
    ("distill.py --data words --loss psd --checkpoint trained", "vocab"),
    ("distill.py --data grammar --loss psd --checkpoint trained --guidance 2", "--guidance"),
    ("distill.py --data grammar --loss dmd --checkpoint trained --joint", "--joint"),
    ("distill.py --data grammar --loss lsd --checkpoint trained --micro-batch 1", "--micro-batch"),
    ("sample.py --checkpoint trained --output nowhere/x.jsonl", "nowhere/x.jsonl"),
    ("sample.py --checkpoint evil", "evil"),
    ("sample.py --checkpoint trained --seed 99999999999999999999", "--seed"),
    ("sample.py --checkpoint trained --prompt some", "--context"),
    ("sample.py --checkpoint any --prompt 'some dragons'", "dragons"),
    ("sample.py --checkpoint any --prompt 'some farmers' --length 2", "prompt"),
    ("sample.py --checkpoint guided --prompt some --guidance 2", "--guidance"),
    ("evaluate.py --checkpoint nowhere", "nowhere"),
    ("evaluate.py --checkpoint trained --data cut", "train.bin"),
    ("evaluate.py --samples blank.txt", "blank.txt"),
    ("evaluate.py --samples short.txt --judge ./nowhere", "nowhere"),
]


@pytest.fixture(scope="session")
def mistaken(conditional, tmp_path_factory):
    """A folder with good and damaged files for the mistakes above."""
    folder = tmp_path_factory.mktemp("mistaken")
    for name in ("grammar", "cut", "broken", "words", "changed"):
        shutil.copytree(conditional / "data/grammar", folder / name)
    for name in ("grammar-diagonal", "any", "guided"):
        out = folder / name.replace("grammar-diagonal", "trained")
        shutil.copytree(conditional / "runs" / name, out)
    meta = read_meta(folder / "grammar")
    (folder / "words/meta.json").write_text(json.dumps(meta | {"vocab": meta["vocab"][::-1]}))
    (folder / "changed/meta.json").write_text(json.dumps(meta | {"sha256": {}}))
    (folder / "broken/meta.json").write_text("{")
    os.truncate(folder / "cut/train.bin", 1001)
    for name in ("begun", "bert", "data", "evil", "locked.partial"):
        (folder / name).mkdir()
    (folder / "begun/log.jsonl").touch()  # of a run before its first checkpoint
    reduced = (os.mkdir, (str(folder / "pwned"),))  # what unpickling would call
    evil = type("Evil", (), {"__reduce__": lambda self: reduced})()
    torch.save(newest(folder / "trained") | {"evil": evil}, folder / "evil/checkpoint-9.pt")
    published = {k: v for k, v in newest(folder / "guided").items() if k != "stage1"}
    torch.save(published, folder / "published.pt")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (folder / "short.txt").write_text("a b\n")
    (folder / "lines.jsonl").write_text('{"words": "a b"}\n')
    (folder / "cut.jsonl").write_text('{"text": "a b"}\n{"te')
    lock = os.open(folder / "locked.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield folder
    os.close(lock)


@pytest.mark.parametrize(("words", "named"), MISTAKES)
def test_mistakes(mistaken, words, named):
    """A mistake is refused in one line that names it, and no file is written or run."""

    def files():
        return {path: path.is_dir() or path.stat().st_mtime_ns for path in mistaken.rglob("*")}

    before = files()
    words = words.replace("train_diagonal.py", "train_diagonal.py --size tiny --batch-size 16")
    words = words.replace("distill.py", "distill.py --batch-size 16")
    assert named in one_line(run(mistaken, words, ok=False))
    assert files() == before


# ---- What the project says about itself. -------------------------------------------------------
def resolved(words, monkeypatch):
    """The flags of a command line with every default filled in, without running the program."""
    seen = []
    real = argparse.ArgumentParser.parse_args

    def parse_args(self):
        seen.append(real(self))
        return seen[-1]

    script, *flags = shlex.split(words)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *flags])
        for module in MODULES:
            patch.setattr(module, "check_output", print, raising=False)
            for name in ("prepare", "read_meta", "load_sampler"):  # where the work would begin
                patch.setattr(module, name, Mock(side_effect=KeyboardInterrupt), raising=False)
        PROGRAMS[script].main()
    return seen[0]


def test_headline_commands(tmp_path, monkeypatch):
    """The four commands without other flags mean the paper's OpenWebText run."""
    monkeypatch.chdir(tmp_path)

    def check(words, **expected):
        args = vars(resolved(words, monkeypatch))
        assert {key: args[key] for key in expected} == expected

    what = dict(tokenizer="gpt2", seq_len=1024, val_documents=100_000, out=tmp_path / "data/owt")
    check("prepare_data.py owt", source=["Skylion007/openwebtext"], **what)
    both = dict(batch_size=512, lr=3e-4, beta2=0.999, warmup=2500, cooldown=0, clip=1, ema=0.9999)
    both |= dict(data=Path("data/owt"), diagonal_power=0.5, resume=False)
    own = dict(size="base", schedule="argmax", schedule_blend=0.9, interpolant="linear")
    own |= dict(steps=1_000_000, position_lag=0, context=None, out=Path("runs/owt-diagonal"))
    check("train_diagonal.py", **both, **own)
    both |= dict(steps=100_000, divergence="kl", diagonal_share=0.5, guidance=1, joint=False)
    both |= dict(diagonal_from="data", boundary=1 / 32, consistency_power=0.5, learned_weight=True)
    for loss in distill.TEACHERS:
        own = dict(surgery=loss == "psd", form="signed" if loss == "lsd" else "logit")
        check(f"distill.py --loss {loss}", **both, **own, out=Path(f"runs/owt-{loss}"))
    own = dict(steps=10_000, boundary=1, diagonal_share=0, critic_lr=1e-3, surgery=False)
    own |= dict(teacher_temperature=1)
    check("distill.py --loss dmd", **own, out=Path("runs/owt-dmd"))
    how = dict(num_samples=1024, gamma=[0], temperature=[0], judge="gpt2-large", nfe=[1, 2])
    check("evaluate.py --nfe 1 2", checkpoint=[Path("runs/owt-esd")], **how)
    how = dict(nfe=[1], gamma=0, temperature=0, guidance=1)
    check("sample.py", checkpoint=Path("runs/owt-esd"), **how)
    parameters = sum(p.numel() for p in DiT(ModelConfig(100, 8, **SIZES["base"])).parameters())
    parameters += 2 * (50257 - 100) * SIZES["base"]["width"]
    assert parameters == pytest.approx(170e6, rel=0.01)


def test_every_command_shown_parses(tmp_path, monkeypatch):
    """The commands in the README, the Makefile and the docstrings are right."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join((HERE / name).read_text() for name in (*PROGRAMS, "README.md", "Makefile"))
    text = re.sub(r"\\+\n\s*", " ", text)  # continued lines
    scripts = "|".join(map(re.escape, PROGRAMS))
    launcher = r"(?m)^\s*(?:\S*python|torchrun(?: --\S+)*)"
    commands = re.findall(rf"{launcher} ((?:{scripts})\b[^#\n]*)", text)
    assert len(commands) > 20
    for words in commands:
        if not re.search(r"\.\.\.|\$", words):
            resolved(words, monkeypatch)


def test_readme_names_exist():
    """Each `module.name` and path in the README exists, and the equation table has many."""
    modules = {m.__name__: m for m in (*MODULES, model_file, test_identities)}
    pattern = rf"`((?:{'|'.join(modules)})\.(?!py\b)\w+(?:\.\w+)*)"
    text = (HERE / "README.md").read_text()
    for name in re.findall(pattern, text):
        head, *rest = name.split(".")
        functools.reduce(getattr, rest, modules[head])
    for path in re.findall(r"(?:results|benchmarks|examples|assets)/[\w.-]*\w", text):
        assert (HERE / path).exists(), path
    section = text.partition("## Files and equations")[2].partition("\n## ")[0]
    assert sum(len(re.findall(pattern, row)) for row in re.findall(r"(?m)^\|.*", section)) > 15


# ---- Clusters and interrupted work. ------------------------------------------------------------
def test_one_run_a_folder(work, tmp_path):
    """A second start in a run's folder gets one line, with --resume too; the first goes on."""
    flags = "--steps 3 --save-every 1"
    train(work, tmp_path / "run", flags)
    with open(tmp_path / "run/config.jsonl") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = train(work, tmp_path / "run", "--steps 4 --resume", ok=False)
        assert f"another process trains in {tmp_path / 'run'}" in one_line(done)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]
    train(work, tmp_path / "run", "--steps 4 --resume")  # the lock ends with its holder


def test_resume_starts_or_goes_on(work, tmp_path):
    """--resume starts where there is no checkpoint, and a run that has ended exits with 0."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 1}\n{"st')  # killed before a checkpoint
    assert "a new run" in train(work, tmp_path / "run", "--steps 2 --resume").stdout
    train(work, tmp_path / "plain", "--steps 2")
    assert_same_runs(tmp_path / "plain", tmp_path / "run")
    before = newest(tmp_path / "run")
    assert "already at step 2" in train(work, tmp_path / "run", "--steps 2 --resume").stdout
    assert same(newest(tmp_path / "run"), before)
    del before["model_config"]["input_scale"]  # as of a run from before there was one
    torch.save(before, tmp_path / "run/checkpoint-2.pt")
    other = train(work, tmp_path / "run", "--steps 3 --resume --schedule linear", ok=False)
    assert "has another network than these flags" in other.stderr
    train(work, tmp_path / "run", "--steps 3 --resume")
    assert newest(tmp_path / "run")["step"] == 3


def test_a_closed_terminal(work, tmp_path):
    """A dropped connection sends SIGHUP and makes every further line fail: the run is saved."""
    ours, theirs = os.openpty()
    script, *flags = shlex.split(f"{STAGES['diagonal']} --data data/grammar --out {tmp_path} {RUN}")
    command = [sys.executable, HERE / script, *flags, "--steps", "200"]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else ignored if the tests run under nohup
    process = subprocess.Popen(command, cwd=work, stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_for_step(process, tmp_path, 3)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 143
    assert 3 <= newest(tmp_path)["step"] < 200


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_clusters(number):
    """They end a run like SIGTERM, except a SIGHUP that nohup has made to be ignored."""
    earlier = {n: signal.getsignal(n) for n in (15, 2, signal.SIGHUP, signal.SIGUSR1)}
    try:
        signal.signal(number, signal.SIG_DFL)
        caught = train_diagonal.catch_signals()
        signal.raise_signal(number)
        assert caught == [number]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        caught = train_diagonal.catch_signals()
        signal.raise_signal(signal.SIGHUP)
        assert not caught
    finally:
        for n, handler in earlier.items():
            signal.signal(n, handler)


def test_stage_2_on_other_rows(work, tmp_path):
    """A stage 1 of other rows of the same tokens serves stage 2, which says so."""
    run(work, f"prepare_data.py grammar --seed 1 --out {tmp_path / 'other'}")
    words = f"distill.py --loss psd --checkpoint runs/grammar-diagonal --steps 1 {RUN}"
    out = tmp_path / "map"
    done = run(work, f"{words} --data {tmp_path / 'other'} --out {out}")
    assert "was trained on other rows" in done.stdout
    done = run(work, f"{words} --data data/grammar --out {out} --steps 2 --resume", ok=False)
    assert "train stage 1 on with --init" in one_line(done)


def test_compiling_without_a_compiler(work, tmp_path, monkeypatch):
    """Slim images have none: one line that names --no-compile."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    done = train(work, tmp_path / "run", "--steps 1 --compile", ok=False)
    assert "--no-compile" in one_line(done)


def test_two_machines(work, tmp_path):
    """Two agents, one rank each, train as one process does, if their data and flags agree."""
    flags = "--steps 20 --micro-batch 8"
    train(work, tmp_path / "alone", flags)

    def agents(out, folders):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        launcher += ["--master_addr=localhost", f"--master_port={port}"]
        processes = []
        for rank, folder in enumerate(folders):
            place = tmp_path / f"{out}-machine-{rank}"
            place.mkdir()
            where = [*launcher, f"--node_rank={rank}"]
            words = f"{STAGES['diagonal']} --data {folder} --out {tmp_path / out} {RUN} {flags}"
            processes.append(start(place, words, where))
        return processes

    for process in agents("two", [work / "data/grammar"] * 2):
        finish(process)
    pairs = zip(log_lines(tmp_path / "alone"), log_lines(tmp_path / "two"), strict=True)
    assert all(ours == pytest.approx(alone, rel=1e-4, abs=1e-5) for alone, ours in pairs)
    outputs = [finish(p, range(1, 256)) for p in agents("none", [work / "data/grammar", "absent"])]
    assert "a rank failed to start" in outputs[0]
    assert "no data set at absent" in outputs[1]
    other = f"{work / 'data/grammar'} --seed 1"
    for process in agents("seeds", [work / "data/grammar", other]):
        assert "flags differ" in finish(process, range(1, 256))
