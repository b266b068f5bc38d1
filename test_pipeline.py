"""The programs, as a user runs them: the whole road, resuming, ranks, samples, scores, mistakes.

Tests of real text read the folder named by DFM_TEST_DATA (wiki.txt.xz, lm1b_dev.txt.xz,
tiktoken_cache/, bert-base-uncased/vocab.txt). Without that variable they are skipped.
"""

import argparse
import copy
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
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ["HF_HUB_OFFLINE"] = "0"  # so that `no_network` sees every question to the hub

import distill
import evaluate
import model as model_file
import prepare_data
import sample
import test_identities
import train_diagonal
from model import (
    SIZES,
    Conditional,
    DiT,
    Draw,
    ModelConfig,
    load_model,
    read_checkpoint,
    save_checkpoint,
    schedule_table,
)
from prepare_data import decode, encoder, read_meta, read_rows

HERE = Path(__file__).parent
MODULES = (prepare_data, train_diagonal, distill, sample, evaluate)
PROGRAMS = {f"{module.__name__}.py": module for module in MODULES}
EXTRAS = sorted(path for name in ("benchmarks", "examples") for path in HERE.glob(f"{name}/*.py"))
TEST_DATA = os.environ.get("DFM_TEST_DATA")
needs_data = pytest.mark.skipif(not TEST_DATA, reason="DFM_TEST_DATA names no folder of test data")

torch.set_num_threads(1)  # as in the processes below: two workers share two cores

asked = []  # what the programs wanted from a network


def audit(event, args):
    """Note and refuse every connection and every look-up of a name."""
    connects = event in ("socket.connect", "socket.sendto") and args[0].family != socket.AF_UNIX
    if connects or event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked.append((event, args))
        raise OSError("the tests have no network")


sys.addaudithook(audit)


@pytest.fixture(autouse=True)
def no_network():
    """No program asks a network for anything, given local files."""
    yield
    found = asked.copy()
    asked.clear()
    assert not found


# ------------------------------------------------------------------------------------------------
# Running programs.


def python(script, *flags, cwd, ok=True):
    """Run a program in `cwd`, in this process; the result is that of subprocess.run."""
    out = io.StringIO()
    err = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            PROGRAMS[script].main()
        except SystemExit as stop:
            code = stop.code or 0
    for number, handler in handlers.items():  # training sets its own
        signal.signal(number, handler)
    if isinstance(code, str):  # Python prints the message and exits with 1
        err.write(code + "\n")
        code = 1
    done = subprocess.CompletedProcess(script, code, out.getvalue(), err.getvalue())
    assert code == 0 or not ok, done.stdout + done.stderr
    return done


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(script, *flags, cwd, launcher=(), **options):
    """Start a program in a process of its own; it writes to the file `output` in cwd."""
    command = [sys.executable, *launcher, HERE / script, *flags]
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(cwd / "output", "w") as file:
        options |= {"cwd": cwd, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(list(map(str, command)), **options)


def finish(process, cwd, codes=(0,), seconds=200):
    """Wait for a process to end with one of these exit codes; its output."""
    code = process.wait(timeout=seconds)
    output = (cwd / "output").read_text()
    assert code in codes, output
    return output


TINY = ["--size", "tiny"]
RUN = ["--device", "cpu", "--batch-size", "16", "--warmup", "2"]
RUN += ["--log-every", "1"]
STAGES = {
    "diagonal": ["train_diagonal.py", *TINY],
    "context": ["train_diagonal.py", *TINY, "--context", "any", "--context-dropout", "0.2"],
    "psd": ["distill.py", "--loss", "psd", "--seed", "2"],  # a seed whose gradients conflict
    "lsd": ["distill.py", "--loss", "lsd"],
    "esd": ["distill.py", "--loss", "esd", "--diagonal-from", "stage1", "--psd-share", "0.5"],
    "dmd": ["distill.py", "--loss", "dmd", "--diagonal-share", "0.25", "--critic-lr", "3e-3"],
    "joint": ["distill.py", "--loss", "esd", "--joint"],
}


def train(work, out, *flags, stage="diagonal", run=python, **options):
    """A short run on the grammar into `out`; stage 2 starts from the run of stage 1 in `work`."""
    flags = [*STAGES[stage], "--data", work / "data/grammar", "--out", out, *RUN, *flags]
    if stage not in ("diagonal", "context") and "--checkpoint" not in flags:
        flags += [
            "--checkpoint",
            work / f"runs/{'new' if stage == 'joint' else 'grammar-diagonal'}",
        ]
    return run(*flags, cwd=out.parent, **options)


def wait_for_step(process, run, step):
    """Wait until `run` has logged that step; fail if the process ends before."""
    while process.poll() is None:
        with suppress(OSError, ValueError, IndexError):  # no log, or half a line
            if log_lines(run)[-1]["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError((run.parent / "output").read_text())


def log_lines(run):
    """The lines of log.jsonl as dicts, without what depends on the machine."""
    machine = {"seconds_per_step", "tokens_per_second", "peak_memory_gb"}
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line.keys() - machine} for line in lines]


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
    """The one line in which a program has refused; argparse prints its usage before that line."""
    assert done.returncode in (1, 2), done.stdout + done.stderr
    progress = r"(?m)^.*(Generating|examples/s|it/s|row/s|\?row).*$"
    text = re.sub(progress, "", done.stderr.replace("\r", "\n")).strip()
    *before, line = text.splitlines()
    assert not before or (done.returncode == 2 and before[0].startswith("usage:")), text
    return line


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/grammar and a stage-1 run of 60 steps of it, runs/grammar-diagonal."""
    folder = tmp_path_factory.mktemp("work")
    python("prepare_data.py", "grammar", cwd=folder)
    flags = ["--data", "data/grammar", "--steps", 60, "--lr", "2e-3", "--val-every", 20]
    python("train_diagonal.py", *flags, *TINY, *RUN, cwd=folder)
    flags = ["--data", "data/grammar", "--steps", 0, "--position-lag", 1, "--out", "runs/new"]
    python("train_diagonal.py", *flags, *TINY, *RUN, cwd=folder)
    return folder


# ------------------------------------------------------------------------------------------------
# The whole road.


def test_gpu_dry_run(tmp_path):
    """The plan for a GPU, at toy size: in order, within its minutes, and on from where it ended."""
    out = tmp_path / "all"
    flags = ["--dry-run", "--out", out, "--minutes"]

    def outcome(minutes):
        finish(start("benchmarks/gpu.py", *flags, minutes, cwd=tmp_path), tmp_path)
        lines = map(json.loads, (out / "record.jsonl").read_text().splitlines())
        return [(line["name"], line["ok"], "skipped" in line) for line in lines]

    order = "check steps sampling diagonal psd dmd esd scores".split()
    few = outcome(0.4)  # nine seconds beside those to save and exit
    assert few == [("data", True, False), *((name, False, True) for name in order[:-1])]
    both = outcome(20)
    assert both[len(few) :] == [(name, True, False) for name in order]
    assert outcome(20) == both
    check = json.loads((out / "check.json").read_text())
    assert len(check) == 12
    assert all(row["percent"] < 2 for row in check)
    assert [row["percent"] for row in check if row["loss"] == "resumed"] == [0, 0]
    steps = {row.pop("step"): row for row in json.loads((out / "steps.json").read_text())}
    assert all(steps[name]["seconds"] > 0 for name in ("diagonal", "psd", "esd", "V-sized"))
    assert len(json.loads((out / "scores.json").read_text())["bound"]) == 4


@pytest.mark.parametrize("loss", ["psd", "lsd", "esd"])
def test_the_whole_road(work, loss):
    """Prepare, train, distil, sample, evaluate: each reads by default what the last one wrote."""
    meta = read_meta(work / "data/grammar")
    size = (work / "data/grammar/train.bin").stat().st_size
    assert size == 2 * 50_000 * meta["seq_len"] == 2 * meta["train_rows"] * meta["seq_len"]
    lines = log_lines(work / "runs/grammar-diagonal")
    first, _, last = (line["val_diagonal_ce"] for line in lines if "val_diagonal_ce" in line)
    assert last < first < math.log(52) + 0.1
    assert last < 2.6
    flags = ["--data", "data/grammar", "--loss", loss, "--steps", 2, *RUN]
    python("distill.py", *flags, cwd=work)
    run = work / f"runs/grammar-{loss}"
    line = log_lines(run)[-1]
    expected = {"diagonal_ce", "distance", "teacher_entropy", "grad_norm", "lr", "val_diagonal_ce"}
    expected |= {"consistency_square" if loss == "lsd" else "consistency_kl", "loss_consistency"}
    assert expected <= line.keys()
    assert ("clamped" in line) == (loss == "esd")
    assert ("conflict" in line) == (loss == "psd")
    assert json.loads((run / "config.jsonl").read_text())["args"]["loss"] == loss
    stage1 = newest(work / "runs/grammar-diagonal")["ema"]
    student = newest(run)["model"]
    assert torch.equal(student["embedding"], stage1["embedding"])  # frozen
    assert not torch.equal(student["head"], stage1["head"])

    flags = ["--checkpoint", f"runs/grammar-{loss}", "--num-samples", 2]
    out = python("sample.py", *flags, "--nfe", 1, 3, "--output", "out.jsonl", cwd=work).stdout
    assert re.findall("--- (.*)", out) == ["1 NFE", "3 NFE"]
    texts = read_texts(work / "out-3.jsonl")
    assert texts == out.splitlines()[-2:]
    model, saved, _ = sample.load_sampler(run, "cpu")
    assert same(dict(model.state_dict()), saved["ema"])  # the averaged weights
    rows = sample.draw_samples(model, 3, 2, 64, 0, euler=False)
    assert rows.shape == (2, meta["seq_len"])
    assert texts == [decode(meta, row) for row in rows]

    runs = ["runs/grammar-diagonal", f"runs/grammar-{loss}/checkpoint-2.pt"]
    flags = ["--checkpoint", *runs, "--nfe", 1, 2, "--num-samples", 16]
    out = python("evaluate.py", *flags, cwd=work).stdout
    results = json.loads((run / "evaluation-checkpoint-2.json").read_text())["results"]
    assert [r["sampler"] for r in results] == [None] * 3 + ["euler"] * 2 + ["flow-map"] * 2
    names = [results[3]["model"], results[5]["model"]]
    assert names == ["grammar-diagonal", f"grammar-{loss}/checkpoint-2"]
    assert results[0]["grammatical"] == 1
    assert all(r["source_entropy"] == prepare_data.grammar_entropy() for r in results)
    assert evaluate.table(results) in out


def test_stage_2_carries_its_stage_1(work, tmp_path):
    """A map resumes and goes on to dmd when its stage 1 has trained on, or is gone."""
    stage1 = shutil.copytree(work / "runs/grammar-diagonal", tmp_path / "stage1")
    known = newest(stage1)["ema"]
    start_from = ["--checkpoint", stage1, "--val-every", 1]
    train(work, tmp_path / "whole", "--steps", 3, *start_from, stage="esd")
    train(work, tmp_path / "map", "--steps", 2, *start_from, stage="esd")
    train(work, stage1, "--steps", 62, "--resume")
    train(work, tmp_path / "map", "--steps", 3, "--resume", *start_from, stage="esd")
    assert_same_runs(tmp_path / "whole", tmp_path / "map")
    shutil.rmtree(stage1)
    flags = ["--lr", "3e-3", "--checkpoint", tmp_path / "map", "--steps"]
    train(work, tmp_path / "dmd", *flags, 2, stage="dmd")
    line = log_lines(tmp_path / "dmd")[-1]
    expected = {"matching_distance", "critic_kl", "sample_entropy", "critic_grad_norm"}
    assert expected | {"diagonal_ce"} <= line.keys()
    saved = newest(tmp_path / "dmd")
    assert same(saved["stage1"], known)
    moved = [(saved["critic"]["head"] - known["head"]).abs().max()]
    moved.append((saved["model"]["head"] - newest(tmp_path / "map")["ema"]["head"]).abs().max())
    assert all(0 < step < 0.02 for step in moved)  # two steps of Adam from where each began
    shutil.rmtree(tmp_path / "map")
    train(work, tmp_path / "dmd", *flags, 3, "--resume", stage="dmd")
    model_of, saved, euler = sample.load_sampler(tmp_path / "dmd", "cpu")
    assert same(dict(model_of.state_dict()), saved["ema"])
    assert not euler


def test_a_published_checkpoint_samples(work, tmp_path):
    """Averaged weights, config, meta and flags are all that sampling and scoring need."""
    saved = newest(work / "runs/grammar-diagonal")
    kept = {name: saved[name] for name in ("ema", "model_config", "meta", "args")}
    torch.save(kept, tmp_path / "small.pt")
    flags = ["--nfe", 2, "--num-samples", 2, "--checkpoint"]
    outputs = [
        python("sample.py", *flags, path, cwd=work).stdout
        for path in (tmp_path / "small.pt", work / "runs/grammar-diagonal")
    ]
    assert outputs[0] == outputs[1]
    flags = ["--checkpoint", tmp_path / "small.pt", "--num-samples", 4, "--bound", 4, "--nfe", 1]
    python("evaluate.py", *flags, cwd=work)


def test_config_has_a_line_for_each_start(work, tmp_path):
    """The step, the flags and the versions of each; resuming says what has changed."""
    train(work, tmp_path / "run", "--steps", 1)
    out = train(work, tmp_path / "run", "--steps", 2, "--lr", "1e-4", "--resume").stdout
    assert "resuming with lr 0.0001; it was 0.0003" in out
    lines = [json.loads(line) for line in (tmp_path / "run/config.jsonl").read_text().splitlines()]
    assert [(line["step"], line["args"]["lr"]) for line in lines] == [(0, 3e-4), (1, 1e-4)]
    assert lines[0]["versions"]["torch"] == torch.__version__


def test_examples(work, tmp_path):
    """watch.py shows and draws each evaluation; steer.py raises the mean of its reward."""
    flags = ["--checkpoint", work / "runs/grammar-diagonal", "--nfe", 2]
    picture = ["--rows", 2, "--output", "watch.gif"]
    out = finish(start("examples/watch.py", *flags, *picture, cwd=tmp_path), tmp_path)
    assert re.findall(r"(?m)^evaluation (\d) of 2", out) == ["1", "2"]
    with Image.open(tmp_path / "watch.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", 2)
    out = finish(start("examples/steer.py", *flags, "--strength", 10, cwd=tmp_path), tmp_path)
    plain, steered = map(float, re.findall(r"mean reward ([\d.]+)", out))
    assert steered > plain


# ------------------------------------------------------------------------------------------------
# Steps of the loop.


def test_first_steps(work, tmp_path):
    """Learning rate, average, clipping and validation, from the checkpoints after each step.

    The average follows min(--ema, (1 + k) / (10 + k)); Adam's first moment starts at grad / 10.
    """
    run = tmp_path / "run"
    flags = ["--steps", 4, "--lr", "1e-2", "--cooldown", 2, "--ema", 0.15, "--clip", 0.01]
    train(work, run, *flags, "--save-every", 1, "--keep", 9, "--val-every", 1)
    lines = log_lines(run)
    assert [line["lr"] for line in lines] == [0.005, 0.01, 0.01, 0.005]
    once, twice = (read_checkpoint(run / f"checkpoint-{step}.pt") for step in (1, 2))
    options = {"seed": 0, "size": "tiny", **once["model_config"]}
    initial = train_diagonal.new_model(SimpleNamespace(**options), once["meta"])
    for name, first in initial.named_parameters():
        average = 0.1 * first.detach() + 0.9 * once["model"][name]
        assert torch.allclose(once["ema"][name], average, atol=1e-7), name
        average = 0.15 * average + 0.85 * twice["model"][name]
        assert torch.allclose(twice["ema"][name], average, atol=1e-7), name
    assert not torch.equal(twice["ema"]["head"], twice["model"]["head"])
    optimizer = once["optimizer"]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    squares = [state["exp_avg"].square().sum() for state in optimizer["state"].values()]
    assert float(sum(squares).sqrt()) == pytest.approx(0.001, rel=1e-4)
    assert lines[0]["grad_norm"] > 0.02  # of the gradient before clipping
    rows = read_rows(work / "data/grammar", "val", once["meta"])
    tokens = train_diagonal.take_rows(rows, 0, np.arange(32)).split(16)
    for line in lines[:2]:  # of the averaged weights, on the same rows and noise every time
        model, _ = load_model(run / f"checkpoint-{line['step']}.pt")
        draws = [Draw(train_diagonal.VAL_SEED, k, np.arange(16), "cpu") for k in range(2)]
        reports = [
            train_diagonal.diagonal_loss(model, *batch)[1]["diagonal_ce"]
            for batch in zip(tokens, draws, strict=True)
        ]
        assert line["val_diagonal_ce"] == pytest.approx(float(sum(reports)) / 2, rel=1e-6)


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


def spoil(monkeypatch, steps):
    """Make the diagonal's loss infinite at these steps of training."""
    real = train_diagonal.diagonal_loss

    def diagonal_loss(model, tokens, draw, power):
        losses, report = real(model, tokens, draw, power)
        factor = math.inf if draw.step in steps and torch.is_grad_enabled() else 1.0
        return {"diagonal": losses["diagonal"] * factor}, report

    monkeypatch.setattr(train_diagonal, "diagonal_loss", diagonal_loss)


def test_log_lines_and_kept_checkpoints(work, tmp_path, monkeypatch):
    """A bad step changes nothing; a line holds means without skipped steps; --keep works."""
    spoil(monkeypatch, [2])
    train(work, tmp_path / "each", "--steps", 6, "--save-every", 1, "--keep", 9)
    names = [tmp_path / f"each/checkpoint-{step}.pt" for step in (2, 3, 4)]
    two, three, four = map(read_checkpoint, names)
    assert same(two["model"], three["model"])
    assert same(two["optimizer"]["state"], three["optimizer"]["state"])
    assert not same(three["model"], four["model"])
    each = log_lines(tmp_path / "each")
    assert [line.get("skipped", 0) for line in each] == [0, 0, 1, 0, 0, 0]
    flags = ["--steps", 6, "--save-every", 2, "--keep", 2, "--log-every", 9]
    train(work, tmp_path / "pairs", *flags)
    pairs = log_lines(tmp_path / "pairs")
    assert all(math.isfinite(value) for line in each + pairs for value in line.values())
    assert [line["step"] for line in pairs] == [2, 4, 6]
    for line in pairs:
        for key in ("diagonal_ce", "loss_diagonal", "grad_norm"):
            steps = each[line["step"] - 2 : line["step"]]
            values = [step[key] for step in steps if "skipped" not in step]
            assert line[key] == pytest.approx(np.mean(values)), key
    names = sorted(path.name for path in (tmp_path / "pairs").iterdir())
    files = ["checkpoint-4.pt", "checkpoint-6.pt", "config.jsonl", "log.jsonl"]
    assert names == files


def test_many_bad_steps_end_the_run(work, tmp_path, monkeypatch):
    """10 in a row are borne; 11 end the run with a line that names the term and the step."""
    flags = ["--steps", 16, "--save-every", 2]
    spoil(monkeypatch, range(3, 13))
    train(work, tmp_path / "borne", *flags)
    skipped = [line.get("skipped", 0) for line in log_lines(tmp_path / "borne")]
    assert skipped == [0] * 3 + [1] * 10 + [0] * 3
    spoil(monkeypatch, [13])  # as well
    done = train(work, tmp_path / "ended", *flags, ok=False)
    assert "loss_diagonal is not finite at step 14" in one_line(done)
    assert newest(tmp_path / "ended")["step"] == 12


class OneDevice(TorchDispatchMode):
    """Refuses operations, copies aside, on tensors of two devices. Scalars may be anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        copies = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        assert len(devices) < 2 or func.overloadpacket in copies, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_meta(monkeypatch):
    """Let a step run on the meta device, which has neither autocast, random numbers nor values."""
    knots = schedule_table("linear", 300, 0.0)
    monkeypatch.setattr("model.schedule_table", lambda *_: knots)
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)

    def normal(self, *shape):
        return torch.empty(len(self.rows), *shape, device=self.device)

    monkeypatch.setattr(Draw, "normal", normal)


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
]


def step_on_meta(words, monkeypatch, B, config):
    """The step that a command line asks for, as a function without arguments."""
    args = resolved(words, monkeypatch)
    vars(args).setdefault("context", None)
    vars(args).setdefault("surgery", False)
    L = config.seq_len
    with torch.device("meta"):
        model, stage1, critic = (DiT(config).to("meta") for _ in range(3))
    stage1.requires_grad_(False)
    objective = functools.partial(train_diagonal.diagonal_loss, power=args.diagonal_power)
    params = list(model.parameters())
    if words.startswith("distill"):
        if args.guidance != 1:
            stage1 = Conditional(stage1, None, torch.arange(L, device="meta"))
        objective = distill.distillation(args, None if args.joint else stage1, critic)
        params += list(critic.parameters()) if args.loss == "dmd" else []
    tokens = torch.empty(B, L, dtype=torch.long, device="meta")
    batches = [(tokens, Draw(0, 0, np.arange(B), "meta"))]
    return functools.partial(
        train_diagonal.gradients, params, objective, model, batches, args.surgery
    )


def sampling_on_meta(B, config, nfe, **how):
    """As `step_on_meta`, for sampling."""
    with torch.device("meta"):
        model = DiT(config).to("meta")
    draw = Draw(0, 0, np.arange(B), "meta")
    return functools.partial(
        sample.write_rows, model, B, lambda n: draw.normal(n, model.noise_size), nfe=nfe, **how
    )


@pytest.mark.parametrize("lag", [0.0, 0.5])
@pytest.mark.parametrize("words", STEPS)
def test_a_step_never_waits_for_the_gpu(words, lag, on_meta, monkeypatch):
    """A step on the meta device: reading a value or mixing it with the CPU, as on CUDA, fails."""
    step = step_on_meta(
        words, monkeypatch, 16, ModelConfig(300, 8, **SIZES["tiny"], position_lag=lag)
    )
    with OneDevice():
        grads, _ = step()
    assert all(grad.device.type == "meta" for grad in grads)


@pytest.mark.parametrize("nfe", [1, 3])
@pytest.mark.parametrize("how", [{}, {"gamma": 0.5}, {"gamma": 1.0, "temperature": 0.7}])
def test_sampling_never_waits_for_the_gpu(nfe, how, on_meta):
    """As for a step."""
    draw = sampling_on_meta(4, ModelConfig(300, 8, **SIZES["tiny"]), nfe, **how)
    with OneDevice():
        rows = draw()
    assert rows.shape == (4, 8)


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that any operation returns, and the operation."""

    values = 0
    operation = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if max(sizes, default=0) > self.values:
            self.values = max(sizes)
            self.operation = func
        return out


@pytest.mark.parametrize("words", [*STEPS, "sampling"])
def test_no_tensor_of_size_v(words, on_meta, monkeypatch):
    """At the paper's size no tensor of a step is larger than the activations (B, L, 4 D).

    One of size V, (B, L, V), would be 16 times as large. Two layers, as all have the same sizes.
    Attention does not count: there the fused kernel makes no tensor (L, L), unlike on meta.
    """
    monkeypatch.setattr("model.attention", lambda q, k, v, causal=False: q + k + v)
    B, L = 64, 1024
    config = ModelConfig(50257, L, **SIZES["base"] | {"layers": 2})
    if words == "sampling":
        step = sampling_on_meta(B, config, 3, gamma=1.0, temperature=1.0)
    else:
        step = step_on_meta(words, monkeypatch, B, config)
    with Largest() as largest:
        step()
    rows = B // 2 if "--loss" in words and "dmd" not in words else B
    assert rows * L * config.width <= largest.values, largest.operation
    assert largest.values <= B * L * 4 * config.width, largest.operation


# ------------------------------------------------------------------------------------------------
# Ranks, micro-batches, resuming.


@pytest.mark.parametrize("stage", ["context", "psd", "esd", "dmd"])
def test_ranks_and_micro_batches_change_nothing(work, tmp_path, stage):
    """One step by one rank, in four micro-batches, and by two ranks: one gradient and one log."""
    flags = ["--steps", 1, "--clip", "1e9"]  # clipping would hide the scale
    train(work, tmp_path / "whole", *flags, "--micro-batch", 16, stage=stage)
    flags += ["--micro-batch", 4]
    train(work, tmp_path / "micro", *flags, stage=stage)
    options = {"stage": stage, "run": start, "launcher": TORCHRUN}
    finish(train(work, tmp_path / "ranks", *flags, **options), tmp_path)
    saved = newest(tmp_path / "whole")["optimizer"]["state"]
    scale = max(float(state["exp_avg"].abs().max()) for state in saved.values())
    assert scale > 0
    (line,) = log_lines(tmp_path / "whole")
    assert line.get("conflict") == (1 if stage == "psd" else None)
    for name in ("micro", "ranks"):
        other = newest(tmp_path / name)["optimizer"]["state"]
        for key, state in saved.items():  # the gradient, read from Adam's first moment
            difference = state["exp_avg"] - other[key]["exp_avg"]
            assert float(difference.abs().max()) < 1e-4 * scale, (name, key)
        assert log_lines(tmp_path / name) == [pytest.approx(line, rel=1e-4, abs=1e-4)]


@pytest.mark.parametrize("stage", ["diagonal", "context", "psd", "lsd", "dmd", "joint"])
def test_resuming_equals_never_stopping(work, tmp_path, stage):
    """Three steps, then --resume to six, equal six at once: weights, average, Adam, log."""
    flags = ["--micro-batch", 8, "--val-every", 3]
    parts = tmp_path / "parts"
    train(work, tmp_path / "whole", *flags, "--steps", 6, stage=stage)
    train(work, parts, *flags, "--steps", 3, stage=stage)
    with open(parts / "log.jsonl", "a") as file:  # of a run killed after its checkpoint
        file.write('{"step": 4}\n{"st')
    train(work, parts, *flags, "--steps", 6, "--resume", stage=stage)
    assert_same_runs(tmp_path / "whole", parts)


def test_kills_lose_nothing(work, tmp_path):
    """SIGKILL at random moments, then --resume: the end is that of a run left in peace."""
    flags = ["--micro-batch", 8, "--steps", 40, "--save-every", 3, "--log-every", 2]
    train(work, tmp_path / "whole", *flags, stage="psd")
    chance = random.Random(0)
    parts = tmp_path / "parts"
    for first, last in ((4, 10), (16, 24)):
        process = train(work, parts, *flags, stage="psd", run=start)
        flags += ["--resume"]
        wait_for_step(process, parts, chance.randint(first, last))
        time.sleep(chance.random() * 0.2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train(work, parts, *flags, stage="psd")
    assert_same_runs(tmp_path / "whole", parts)


def stopped_at(run, output):
    """The step at which a run says a signal has stopped it, which is logged and saved."""
    (step,) = re.findall(r"stopped by a signal after step (\d+)", output)
    assert newest(run)["step"] == log_lines(run)[-1]["step"] == int(step)
    return int(step)


def test_a_signal_saves_and_ends(work, tmp_path):
    """SIGTERM or SIGINT: save after the step, exit with 143. Resumed, nothing is lost."""
    flags = ["--steps", 60]
    train(work, tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    last = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = train(work, parts, *flags, run=start)
        flags += ["--resume"]
        wait_for_step(process, parts, last + 3)
        process.send_signal(number)
        last = stopped_at(parts, finish(process, tmp_path, codes=[143]))
        assert last < 60
    train(work, parts, *flags)
    assert_same_runs(tmp_path / "whole", parts)


def test_two_runs_in_one_folder(work, tmp_path):
    """The second is refused, checkpoint or not."""
    process = train(work, tmp_path / "run", "--steps", 100_000, run=start)
    wait_for_step(process, tmp_path / "run", 1)
    config = (tmp_path / "run/config.jsonl").read_text()
    done = train(work, tmp_path / "run", "--steps", 1, "--seed", 1, ok=False)
    assert "holds a run: --resume it, delete it" in one_line(done)
    assert (tmp_path / "run/config.jsonl").read_text() == config
    process.kill()
    process.wait()


def test_variables_of_a_cluster(work, tmp_path, monkeypatch):
    """WORLD_SIZE or RANK without what torchrun sets beside them mean nothing."""
    train(work, tmp_path / "plain", "--steps", 1)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            train(work, tmp_path / name, "--steps", 1)
        assert_same_runs(tmp_path / "plain", tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found in /proc")
def test_two_ranks_end_together(work, tmp_path):
    """A killed rank ends both; a signal to one saves and ends both; resumed, nothing is lost."""
    parts = tmp_path / "parts"

    def begin(out, *more):
        flags = ["--micro-batch", 4, "--steps", 40, "--save-every", 3, *more]
        return train(work, out, *flags, stage="esd", run=start, launcher=TORCHRUN)

    def children(process):
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return list(map(int, path.read_text().split()))

    finish(begin(tmp_path / "whole"), tmp_path)
    process = begin(parts)
    wait_for_step(process, parts, 5)
    ranks = children(process)
    os.kill(ranks[-1], signal.SIGKILL)
    finish(process, tmp_path, codes=range(1, 256))
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    process = begin(parts, "--resume")
    wait_for_step(process, parts, newest(parts)["step"] + 4)  # past what was logged before
    os.kill(children(process)[-1], signal.SIGTERM)
    assert stopped_at(parts, finish(process, tmp_path, codes=range(1, 256))) < 40
    finish(begin(parts, "--resume"), tmp_path)
    assert_same_runs(tmp_path / "whole", parts)


def test_ranks_that_differ_are_refused(work, tmp_path):
    """Ranks that see other data than the rest: all end with a line before the first step."""
    other = shutil.copytree(work / "data/grammar", tmp_path / "1/grammar")
    shutil.copytree(other, tmp_path / "0/grammar")
    meta = read_meta(other)
    (other / "meta.json").write_text(json.dumps(meta | {"sha256": {"train": "", "val": ""}}))
    bash = f'exec {sys.executable} "$0" "$@" --data {tmp_path}/$RANK/grammar'
    launcher = [*TORCHRUN, "--no-python", "bash", "-c", bash]
    process = train(work, tmp_path / "run", "--steps", 9, run=start, launcher=launcher)
    assert "the ranks differ in data" in finish(process, tmp_path, codes=range(1, 256))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# Checkpoints.


def test_damaged_checkpoints(work, tmp_path):
    """A flipped bit or a cut is refused in one line, which names the checkpoint before."""
    run = tmp_path / "parts"
    flags = ["--save-every", 2, "--val-every", 2, "--steps"]
    train(work, tmp_path / "whole", *flags, 6, stage="esd")
    train(work, run, *flags, 4, stage="esd")
    good = (run / "checkpoint-4.pt").read_bytes()
    whole = newest(run)
    chance = random.Random(0)
    refusals = 0
    for case in range(30):
        damaged = bytearray(good)
        place = chance.randrange(len(good))
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "x.pt").write_bytes(damaged if case % 2 else good[:place])
        try:  # a bit in the padding between records harms nothing
            assert same(read_checkpoint(tmp_path / "x.pt"), whole), "damage that was not seen"
        except SystemExit as error:
            assert re.search(r"x\.pt cannot be read .+: name another", str(error))
            refusals += 1
    assert refusals >= 27
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 255
    (run / "checkpoint-4.pt").write_bytes(damaged)
    done = train(work, run, *flags, 6, "--resume", stage="esd", ok=False)
    assert re.search(r"checkpoint-4\.pt .*checksum.*checkpoint-2\.pt", one_line(done))
    (run / "checkpoint-4.pt").unlink()
    train(work, run, *flags, 6, "--resume", stage="esd")
    assert_same_runs(tmp_path / "whole", run)


def test_a_kill_during_a_write(tmp_path):
    """Killed at any byte and between any two file operations: the newest checkpoint is whole."""
    weights = {"w": torch.ones(20_000)}
    content = {"model": weights, "ema": weights, "model_config": {}, "optimizer": {}, "meta": {}}

    def save(step):
        save_checkpoint(tmp_path, {**content, "args": {}, "step": step}, keep=2)

    def die_at_byte(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def die_at_operation(number):
        count = itertools.count()

        def audit(event, arguments):
            ours = event in ("open", "os.rename", "os.remove") and str(tmp_path) in str(arguments)
            if ours and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)

    save(1)
    size = (tmp_path / "checkpoint-1.pt").stat().st_size
    places = [functools.partial(die_at_byte, size * k // 20) for k in range(20)]
    places += [functools.partial(die_at_operation, k) for k in range(6)]
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
    content["ema"] = {"w": torch.tensor([1.0, math.nan])}
    with pytest.raises(SystemExit, match="not finite"):
        save(99)
    assert names == {path.name for path in tmp_path.iterdir()}


def test_a_full_disk(work, tmp_path):
    """The run ends with one line and the earlier checkpoint whole; --resume goes on with room."""
    run = tmp_path / "run"
    train(work, run, "--steps", 2, stage="psd")
    flags = ["--steps", 4, "--resume"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
    process = train(work, run, *flags, stage="psd", run=start, preexec_fn=limit)
    output = finish(process, tmp_path, codes=(1,))
    assert "Traceback" not in output
    assert re.search(r"cannot write \S+checkpoint-4\.pt: .*make room", output)
    assert newest(run)["step"] == 2
    assert not list(run.glob("*.tmp"))
    train(work, run, *flags, stage="psd")
    assert newest(run)["step"] == 4


@pytest.mark.parametrize("script", ["train_diagonal.py", "sample.py", "evaluate.py"])
def test_a_full_disk_is_named(work, tmp_path, script):
    """A log, samples or scores that do not fit are an error in one line; scores are printed."""
    flags = ["--checkpoint", work / "runs/grammar-diagonal", "--num-samples", 99]
    flags += ["--output", tmp_path / "s.jsonl"]
    if script == "evaluate.py":
        flags = [*flags[:-1], tmp_path / "s.json", "--data", work / "data/grammar"]
    if script == "train_diagonal.py":
        flags = ["--data", work / "data/grammar", *TINY, *RUN, "--steps", 99, "--log-every", 1]
        flags += ["--out", tmp_path / "run"]
    command = [sys.executable, HERE / script, *flags]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    how = dict(capture_output=True, text=True, preexec_fn=limit)
    done = subprocess.run([*map(str, command)], **how)
    assert re.search("cannot write .*too large.*make room", one_line(done))
    assert not list(tmp_path.glob("s.*"))
    assert ("validation rows" in done.stdout) == (script == "evaluate.py")


def test_a_checkpoint_runs_no_code(work, tmp_path):
    """A malicious checkpoint is refused, and no source reads files in a way that could run code."""
    reduced = (os.mkdir, (str(tmp_path / "pwned"),))  # what unpickling would call
    evil = type("Evil", (), {"__reduce__": lambda self: reduced})()
    content = newest(work / "runs/grammar-diagonal") | {"meta": evil}
    torch.save(content, tmp_path / "checkpoint-9.pt")
    for script in ("sample.py", "evaluate.py"):
        done = python(script, "--checkpoint", tmp_path, cwd=tmp_path, ok=False)
        assert "checkpoint-9.pt" in one_line(done)
    assert "checkpoint-9.pt" in one_line(train(work, tmp_path, "--resume", ok=False))
    assert not (tmp_path / "pwned").exists()
    danger = r"(?<!\.)\b(eval|exec)\(|pickle\.load|allow_pickle|trust_remote|_only=False|shell=True"
    for path in {*HERE.glob("*.py"), *EXTRAS} - set(HERE.glob("test_*.py")):
        text = path.read_text()
        assert not re.search(danger, text), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


# ------------------------------------------------------------------------------------------------
# Preparing text.


def test_prepare_local_files(tmp_path):
    """.txt, .jsonl and .parquet of the same documents give the same rows, which decode to them."""
    import pyarrow.parquet

    documents = [f"Document {i}: the quick brown fox, {'again ' * (i % 5)}" for i in range(60)]
    text = "\n".join(documents)
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "a.jsonl", documents)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    digests = set()
    for kind in ("txt", "jsonl", "parquet"):
        out = tmp_path / kind
        flags = ["file", "--source", f"a.{kind}", "--out", out, "--tokenizer", "char"]
        flags += ["--seq-len", 32] + (["--documents", "line"] if kind == "txt" else [])
        python("prepare_data.py", *flags, cwd=tmp_path)
        meta = read_meta(out)
        digests.add(json.dumps(meta["sha256"]))
        rows = np.concatenate([read_rows(out, split, meta) for split in ("train", "val")])
        assert "".join(decode(meta, row) for row in rows) == text[: rows.size]
        assert meta["val_rows"] == max(1, len(rows) // 20)
    assert len(digests) == 1
    assert "--force" in python("prepare_data.py", *flags, cwd=tmp_path).stdout
    python("prepare_data.py", *flags, "--limit", 9, "--force", cwd=tmp_path)
    assert read_meta(out)["train_rows"] < meta["train_rows"]


def test_text8_split(tmp_path):
    """text8 as one file of 27 characters: 90, 5 and 5%, rows of 256 without a frame."""
    text = "".join(chr(97 + i * i % 26) if i % 7 else " " for i in range(60_000)).strip()
    (tmp_path / "text8.txt").write_text(text)
    python("prepare_data.py", "text8", "--source", "text8.txt", cwd=tmp_path)
    meta = read_meta(tmp_path / "data/text8")
    train = len(text) * 90 // 100
    assert (meta["train_rows"], meta["val_rows"]) == (train // 256, 3000 // 256)
    first, *_ = read_rows(tmp_path / "data/text8", "val", meta)
    assert decode(meta, first) == text[train:][:256]


def test_prepare_data_killed(tmp_path):
    """Killed at random moments, then run again: the bytes of a run left in peace."""
    lines = (f"{n} is a number and {n * n} its square. " for n in range(100_000))
    (tmp_path / "t.txt").write_text("".join(lines))
    flags = ["prepare_data.py", "file", "--source", "t.txt", "--tokenizer", "char", "--out"]
    python(*flags, "whole", cwd=tmp_path)
    chance = random.Random(0)
    partial = tmp_path / "parts.partial"
    for _ in range(3):
        process = start(*flags, "parts", cwd=tmp_path)
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.5)
        process.kill()
        process.wait()
    partial.mkdir(exist_ok=True)
    (partial / "train.bin").write_bytes(b"half a ro")
    python(*flags, "parts", "--force", cwd=tmp_path)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not partial.exists()


def write_jsonl(path, texts):
    """One line {"text": ...} for each text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@needs_data
def test_real_text_gpt2(tmp_path, judge, monkeypatch):
    """Wikipedia through GPT-2's tokenizer: framed rows that decode to it, then the whole road."""
    cache = shutil.copytree(Path(TEST_DATA) / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))  # tiktoken may write to it
    with lzma.open(Path(TEST_DATA) / "wiki.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    documents = re.findall(r"<doc [^>]*>\s*(.*?)\s*</doc>", text, re.DOTALL)
    write_jsonl(tmp_path / "wiki.jsonl", documents)
    flags = ["--source", "wiki.jsonl", "--out", "data/wiki", "--seq-len", 64]
    python("prepare_data.py", "owt", *flags, "--val-documents", 3, "--workers", 2, cwd=tmp_path)
    meta = read_meta(tmp_path / "data/wiki")
    assert meta["vocab_size"] == 50257
    assert encoder(meta)("<|endoftext|>hello world") == [50256, 31373, 995]
    for split, held in (("train", documents[:-3]), ("val", documents[-3:])):
        rows = read_rows(tmp_path / "data/wiki", split, meta)
        assert set(rows[:, 0]) == set(rows[:, -1]) == {50256}
        text = decode(meta, rows[:, 1:-1].flatten())
        joined = "<|endoftext|>".join(held) + "<|endoftext|>"
        assert joined.startswith(text[:-1])  # the last character may be cut
        assert len(text) > 0.9 * len(joined)

    flags = ["--data", "data/wiki", "--steps", 2, *RUN, "--batch-size", 4]
    python("train_diagonal.py", *TINY, *flags, cwd=tmp_path)
    python("distill.py", "--loss", "esd", *flags, cwd=tmp_path)
    flags = ["--checkpoint", "runs/wiki-esd", "--num-samples", 4, "--judge", judge]
    results = evaluated(tmp_path, *flags)[0]["results"]
    real, shuffled, unigram, _ = results
    assert all(r["gen_ppl"] > 1 for r in results)
    assert real["copied_4"] > max(shuffled["copied_4"], unigram["copied_4"])


CLEANED = {  # pieces -> text, as transformers 4 decodes them
    'the arrest , " he said .': 'the arrest, " he said.',
    "i ' m here": "i'm here",
    "it ' s john ' s": "it's john's",
    "do n't , they 've": "don't, they've",
    "who ? me !": "who? me!",
    "we 're what i 'm": "we're what i'm",
    "rock ' n ' roll": "rock'n'roll",
    "the boys ' . end": "the boys '. end",
    "3 . 5 % , 1 , 000": "3. 5 %, 1, 000",
    "wait . . . what": "wait... what",
    "a - b ; c : d ( e )": "a - b ; c : d ( e )",
    "un ##aff ##able , yes": "unaffable, yes",
    "[CLS] ' s [SEP] , .": "[CLS]'s [SEP],.",
    "can ' t . ' no '": "can't.'no '",
    ". start": ". start",
}


@pytest.mark.parametrize("pieces", CLEANED)
def test_bert_text_is_joined_as_people_write_it(pieces):
    """As transformers 4 decodes it: no space before . ? ! , nor around an apostrophe."""
    vocab = ["[PAD]", *pieces.split()]
    meta = dict(tokenizer="bert", vocab=vocab, join=" ", pad_id=0)
    ids = range(1, len(vocab))
    assert decode(meta, [*ids, 0, 0]) == CLEANED[pieces]


def test_one_writer_at_a_time(tmp_path):
    """A second process that makes the same data set ends at once."""
    (tmp_path / "g.partial").mkdir()
    lock = os.open(tmp_path / "g.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = python("prepare_data.py", "grammar", "--out", tmp_path / "g", cwd=tmp_path, ok=False)
    assert "another process" in one_line(done)
    os.close(lock)
    python("prepare_data.py", "grammar", "--out", tmp_path / "g", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def prepared(folder, *flags, ok=True):
    """What prepare_data.py says, and its rows of two characters as one text."""
    flags = [*flags, "--tokenizer", "char", "--seq-len", 2, "--val-only", "--force"]
    done = python("prepare_data.py", "file", "--source", *flags, cwd=folder, ok=ok)
    if not ok:
        return one_line(done)
    meta = read_meta(folder / "data/file")
    rows = read_rows(folder / "data/file", "val", meta)
    return done.stdout, "".join(decode(meta, row) for row in rows)


def test_a_source_is_read_afresh(tmp_path):
    """Edited at the same size and time, a source gives its new text, but only with --force."""
    flags = ["file", "--source", "a.txt", "--tokenizer", "char", "--seq-len", 2, "--val-only"]
    for text in ("ab", "AB"):
        (tmp_path / "a.txt").write_text(text)
        os.utime(tmp_path / "a.txt", (1e9, 1e9))
        python("prepare_data.py", *flags, cwd=tmp_path)
    assert read_meta(tmp_path / "data/file")["vocab"] == ["a", "b"]
    flags[-2] = 1
    assert "seq_len 2" in one_line(python("prepare_data.py", *flags, cwd=tmp_path, ok=False))
    assert prepared(tmp_path, "a.txt")[1] == "AB"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_and_folders(tmp_path, kind):
    """A folder means its files of text in order; .gz reads like the file in it."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/README.md").write_text("no text")
    for name, text in (("b", "cd"), ("a", "ab")):
        content = text if kind == "txt" else json.dumps({"text": text})
        with gzip.open(tmp_path / f"d/{name}.{kind}.gz", "wt") as file:
            file.write(content)
    assert prepared(tmp_path, "d")[1] == "ab\nc"
    whole = (tmp_path / f"d/a.{kind}.gz").read_bytes()
    (tmp_path / f"d/a.{kind}.gz").write_bytes(whole[:-9])
    assert f"a.{kind}.gz" in prepared(tmp_path, "d", ok=False)


def test_many_files(tmp_path):
    """More files than a process may open are read one at a time."""
    (tmp_path / "d").mkdir()
    for i in range(300):
        (tmp_path / f"d/{i:03}.txt").write_text(f"{i:03}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        text = prepared(tmp_path, "d")[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert text == "\n".join(f"{i:03}" for i in range(300))[: len(text)]


def test_paragraphs(tmp_path):
    """Paragraphs end at a blank line; the second of two blank lines opens the next one."""
    text = "\n\na\nb\n\n\n\n\nc\n\n\nd\n"
    (tmp_path / "a.txt").write_text(text, newline="\r\n")
    found = prepared(tmp_path, "a.txt", "--documents", "paragraph")[1]
    assert found == "\n".join(part for part in text.split("\n\n") if part)[: len(found)]
    assert len(found) == 10


def test_json_lines_as_people_have_them(tmp_path):
    """Another field changes its type, a text is absent, one holds half a pair, a line is blank."""
    lines = ['{"text": "ab", "id": 1}', '{"text": "cd", "id": [{}]}', "", '{"id": null}']
    lines += ['{"text": "\\ud83d\\ude00 e\\ud83d"}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    out, text = prepared(tmp_path, "a.jsonl")
    assert text == "ab\ncd\n\n\N{GRINNING FACE} e\ufffd\n"
    assert "2 documents have no 'text'" in out
    assert "1 documents hold half a surrogate pair" in out
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "[1]"]))
    assert "line 7 of a.jsonl" in prepared(tmp_path, "a.jsonl", ok=False)


def test_held_out_documents(tmp_path):
    """--val-documents holds out the last ones, also with --val-only."""
    (tmp_path / "a.txt").write_text("ab\ncd\nef\ngh\n")
    flags = ["--documents", "line", "--val-documents", 2]
    assert prepared(tmp_path, "a.txt", *flags)[1] == "ef\ng"
    _, val = prepare_data.hold_out(iter("abcde"), 2)  # word pieces: nobody reads the others
    assert list(val) == ["d", "e"]


def test_an_end_that_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C ends the preparation without a trace on the disk."""
    monkeypatch.setattr(prepare_data, "build", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        python("prepare_data.py", "grammar", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))


def test_validation_split_from_the_hub(letters, tmp_path, monkeypatch):
    """--config names a configuration on the hub; --val-only takes its validation split whole."""
    import datasets  # after `letters`: the program sets what this import reads

    texts = {"train": ["ab" * 8], "validation": ["cd" * 8, "dc" * 8], "test": ["ef" * 8]}
    splits = {name: datasets.Dataset.from_dict({"text": text}) for name, text in texts.items()}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **where: asked.append(where) or splits)
    flags = ["--source", "owner/name", "--config", "small", "--val-only", "--tokenizer", "char"]
    python("prepare_data.py", "file", *flags, "--seq-len", 4, cwd=tmp_path)
    assert asked == [{"path": "owner/name", "name": "small"}]
    meta = read_meta(tmp_path / "data/file")
    assert (meta["train_rows"], meta["settings"]["config"]) == (0, "small")
    rows = read_rows(tmp_path / "data/file", "val", meta)
    assert "".join(decode(meta, row) for row in rows) == "cd" * 8 + "\n" + "dc" * 7 + "d"


def test_bom_is_not_text(tmp_path):
    """A UTF-8 byte order mark is no character of the text, in .txt and .jsonl."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\n" * 40)
    lines = "".join('{"text": "ab"}\n' for _ in range(40))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    for name in ("a.txt", "a.jsonl"):
        flags = ["--source", name, "--tokenizer", "char", "--seq-len", 4, "--force"]
        python("prepare_data.py", "file", *flags, cwd=tmp_path)
        assert set(read_meta(tmp_path / "data/file")["vocab"]) == {"a", "b", "\n"}


@pytest.mark.parametrize("script", ["train_diagonal.py", "evaluate.py"])
def test_work_goes_on_without_a_reader(work, tmp_path, script):
    """As with `| head`: the output's reader leaves at once, and all files are written."""
    flags = ["--data", work / "data/grammar", *TINY, *RUN, "--steps", 3, "--out", tmp_path / "r"]
    expected = "r/checkpoint-3.pt"
    if script == "evaluate.py":
        flags = ["--checkpoint", work / "runs/grammar-diagonal", "--data", work / "data/grammar"]
        flags += ["--num-samples", 9, "--output", tmp_path / "e.json"]
        expected = "e.json"
    command = [sys.executable, HERE / script, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*map(str, command)], **pipes) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert "Error" not in errors
    assert (tmp_path / expected).exists()


def test_a_source_with_brackets(tmp_path):
    """File names are no patterns; rows that were cut short are noticed."""
    (tmp_path / "a[1].txt").write_text("right " * 99)
    (tmp_path / "a1.txt").write_text("wrong " * 99)
    flags = ["file", "--source", "a[1].txt", "--tokenizer", "char", "--seq-len", 6, "--out", "d"]
    python("prepare_data.py", *flags, cwd=tmp_path)
    meta = read_meta(tmp_path / "d")
    assert decode(meta, read_rows(tmp_path / "d", "train", meta)[0]) == "right "
    os.truncate(tmp_path / "d/train.bin", 99)
    with pytest.raises(SystemExit, match="is not 95 rows"):
        read_rows(tmp_path / "d", "train", meta)


@pytest.mark.parametrize("lower", [False, True])
def test_bert_text_keeps_its_case(tmp_path, lower):
    """Cased vocabularies: encoding inverts decoding; without their setting they are refused."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "Cat", "cat", "."]
    words += [f"##{i}" for i in range(1000)]  # a BERT vocabulary has over 1,000
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words))
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    (tmp_path / "t.txt").write_text("The cat . the Cat . " * 20)
    flags = ["--source", "t.txt", "--tokenizer", "bert", "--bert", bert, "--seq-len", 8]
    done = python("prepare_data.py", "file", *flags, "--workers", 1, cwd=tmp_path, ok=not lower)
    if lower:
        assert "do_lower_case" in done.stderr
        return
    meta = read_meta(tmp_path / "data/file")
    row = read_rows(tmp_path / "data/file", "train", meta)[0]
    assert decode(meta, row) == "[CLS] The cat. the Cat. [SEP]"
    assert encoder(meta)(decode(meta, row)) == row.tolist()


@needs_data
def test_real_text_bert(tmp_path):
    """LM1B sentences through bert-base-uncased: rows [CLS] ... [SEP] of 128, ## pieces joined."""
    text = lzma.decompress((Path(TEST_DATA) / "lm1b_dev.txt.xz").read_bytes()).decode()
    lines = text.splitlines()[:400]
    (tmp_path / "lm1b.txt").write_text("\n".join(lines))
    flags = ["--source", "lm1b.txt", "--bert", Path(TEST_DATA) / "bert-base-uncased"]
    python("prepare_data.py", "lm1b", *flags, "--workers", 1, cwd=tmp_path)
    meta = read_meta(tmp_path / "data/lm1b")
    assert (meta["vocab_size"], meta["seq_len"]) == (30522, 128)
    cls, *ids = encoder(meta)("[CLS] An unaffable cat")
    assert cls == 101
    assert decode(meta, [*ids, 0, 0]) == "an unaffable cat"
    rows = read_rows(tmp_path / "data/lm1b", "train", meta)
    assert (rows[:, [0, -1]] == [101, 102]).all()
    assert (rows[:, 1:-1] == 102).sum() == pytest.approx(380, abs=20)  # between two sentences
    from transformers import BertTokenizerFast

    bert = BertTokenizerFast.from_pretrained(Path(TEST_DATA) / "bert-base-uncased")
    for row in rows[:200].tolist():
        assert decode(meta, row) == bert.decode(row, clean_up_tokenization_spaces=True)
    first = decode(meta, rows[0, 1:-1]).replace("[SEP]", "")
    letters = re.sub(r"\W", "", first)
    assert re.sub(r"\W", "", "".join(lines).lower()).startswith(letters[:300])


# ------------------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize(("gamma", "temperature"), [(0, 0), (0.5, 0), (0, 1.0), (1.0, 0.7)])
def test_samples_depend_on_seed_and_index_alone(work, gamma, temperature):
    """The same samples in batches of any size and for any count; another seed gives others."""
    model, _, euler = sample.load_sampler(work / "runs/grammar-diagonal", "cpu")
    how = {"gamma": gamma, "temperature": temperature}
    draw = functools.partial(sample.draw_samples, model, 3, euler=euler)
    rows = draw(7, 7, 0, **how)
    assert np.array_equal(rows, draw(7, 3, 0, **how))
    assert np.array_equal(rows[:4], draw(4, 64, 0, **how))
    assert not np.array_equal(rows, draw(7, 7, 1, **how))
    assert np.array_equal(rows, draw(7, 7, 0)) == (gamma == temperature == 0)


def read_texts(path):
    """The texts in a .jsonl by sample.py."""
    return [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]


@pytest.fixture(scope="session")
def conditional(work):
    """In the folder of `work`: runs/any and runs/block of stage 1, runs/guided of stage 2."""
    for kind, more in (("any", []), ("block", ["--block-size", 5])):
        train(work, work / f"runs/{kind}", "--context", kind, *more, "--steps", 4, "--lr", "1e-2")
    flags = ["--data", "data/grammar", "--checkpoint", "runs/any", "--out", "runs/guided"]
    python("distill.py", "--loss", "psd", *flags, "--guidance", 1.5, "--steps", 2, *RUN, cwd=work)
    return work


def test_prompts(conditional, tmp_path):
    """Samples keep the prompt; guidance, blocks and seeds change the rest."""
    meta = read_meta(conditional / "data/grammar")
    prompt = ["--prompt", "some farmers near"]

    def written(run, *flags, length=meta["seq_len"]):
        flags = ["--num-samples", 3, "--nfe", 2, "--temperature", 1, "--output", "x.jsonl", *flags]
        python("sample.py", "--checkpoint", conditional / "runs" / run, *flags, cwd=tmp_path)
        rows = [encoder(meta)(text) for text in read_texts(tmp_path / "x.jsonl")]
        return np.array([row + [meta["pad_id"]] * (length - len(row)) for row in rows])

    plain = written("any", *prompt)
    assert plain.shape == (3, meta["seq_len"])
    assert np.array_equal(plain, written("any", *prompt, "--batch-size", 2))
    assert not np.array_equal(plain, written("any", *prompt, "--seed", 1))
    guided = written("any", *prompt, "--guidance", 40)
    assert not np.array_equal(plain, guided)
    blocks = written("any", *prompt, "--block-size", 2, "--length", 14, length=14)  # slides
    assert blocks.shape == (3, 14)
    longer = written("any", *prompt, "--block-size", 2, "--length", 17, length=17)
    assert np.array_equal(longer[:, :13], blocks[:, :13])
    distilled = written("guided", *prompt)
    for rows in (plain, guided, blocks, distilled):
        assert (rows[:, :3] == encoder(meta)("some farmers near")).all()
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
    flags = ["--checkpoint", "runs/block", "--nfe", 2, "--num-samples", 3]
    out = python("sample.py", *flags, cwd=conditional).stdout.splitlines()
    assert out[-3:] == [decode(read_meta(conditional / "data/grammar"), row) for row in rows]
    found, _ = evaluated(conditional, *flags)
    assert found["results"][-1]["nfe"] == 2


def test_a_long_text_leaves_out_the_place_of_eos(monkeypatch):
    """Framed rows end with EOS at position L - 1, so the window of a text beyond L has L - 1."""
    seen = {}
    monkeypatch.setattr(sample, "continue_text", lambda *inputs, **how: seen.update(how))
    monkeypatch.setattr(sample, "encoder", lambda meta: lambda text: [5, 6])
    args = SimpleNamespace(prompt="a b", length=40, block_size=4, guidance=1.0)
    for bos, context, window in ((None, "any", 16), (0, "any", 15), (None, "block", 16)):
        trained = {"context": context, "block_size": 2}
        write = sample.prompt_writer(args, {"seq_len": 16, "bos_id": bos}, trained)
        write(SimpleNamespace(head=torch.zeros(1)), 2, None)
        assert seen["window"] == window


# ------------------------------------------------------------------------------------------------
# Scores.


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


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_judge_scores(judge, batch):
    """Against the protocol, one token at a time, for awkward texts: EOS inside, empty, too long."""
    model, tokenizer = evaluate.load_judge(str(judge), "cpu")
    scores = evaluate.judge_scores(TEXTS, model, tokenizer, max_length=24, batch_size=batch)
    expected = np.array([protocol(text, model, tokenizer, 24) for text in TEXTS])
    assert scores[:, 1].tolist() == expected[:, 1].tolist()
    assert scores[:, 0] == pytest.approx(expected[:, 0], rel=1e-4)
    assert scores[1].tolist() == scores[2].tolist() == [0, 0]


def test_entropies():
    """-sum p log p in nats of each row's own tokens, for rows of any length."""
    rows = [np.array(r, np.int64) for r in ([1, 1, 2, 2], [3] * 4, [5, 6, 7, 5, 50256], [9], [])]
    expected = [math.log(2), 0, 0.4 * math.log(5 / 2) + 0.6 * math.log(5), 0, 0]
    assert np.abs(evaluate.entropies(rows) - expected).max() < 1e-9


def test_diversity():
    """Shares of 4-grams against sets of tuples."""
    rng = np.random.default_rng(0)
    rows = [*rng.integers(0, 2, (20, 9)), np.array([1, 0]), np.array([], np.int64)]
    train = rng.integers(0, 2, (1, 9))

    def grams(row):
        return [tuple(row[i : i + 4]) for i in range(len(row) - 3)]

    every = [gram for row in rows for gram in grams(row)]
    copied = np.mean([gram in grams(train[0]) for gram in every])
    assert 0 < copied < 1
    ours = evaluate.diversity(rows, np.unique(evaluate.ngrams(train)))
    expected = {"distinct_4": len(set(every)) / len(every), "copied_4": copied}
    assert {key: ours[key] for key in expected} == pytest.approx(expected)
    assert evaluate.diversity(rows)["copied_4"] is None
    assert set(evaluate.diversity([np.array([1])], train[0]).values()) == {None}


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
    distinct = {tuple(row) for row in real}
    assert distinct <= {tuple(row) for row in rows[:200].tolist()}
    assert len(distinct) > 20
    for control in (real, shuffled, unigram):
        assert control.shape == (100, 12)
        assert (control[:, [0, -1]] == [2, 3]).all()
    for a, b in zip(real, shuffled, strict=True):
        assert sorted(decode(meta, a).split()) == sorted(decode(meta, b).split())
    assert (real != shuffled).any(1).sum() > 60
    share = np.bincount(body.ravel(), minlength=9) / body.size
    drawn = np.bincount(unigram[:, 1:-1].ravel(), minlength=9) / 1000
    assert np.abs(drawn - share).max() < 5 * (0.25 / 1000) ** 0.5


def test_bootstrap():
    """The interval of a mean is that of the normal law; what is not finite has none."""
    samples = np.random.default_rng(1).normal(size=400)
    weights = evaluate.resamples(400)
    assert (weights.sum(1) == 400).all()
    value, (low, high) = evaluate.estimate(weights @ samples / 400)
    assert value == pytest.approx(samples.mean())
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * samples.std() / 20, rel=0.1)
    assert evaluate.estimate(np.full(1001, np.nan)) == (None, None)
    assert evaluate.estimate(np.array([1.0, *[np.nan] * 51, *[1.0] * 949])) == (1.0, None)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A folder with data/t, characters of a repetitive text, and a short stage-1 run of it."""
    folder = tmp_path_factory.mktemp("letters")
    chance = random.Random(0)
    text = "to be or not to be that is the question whether tis nobler in the mind to suffer "
    parts = (text[text.index(" ", chance.randrange(40)) :] for _ in range(400))
    (folder / "t.txt").write_text("".join(parts))
    flags = ["--source", "t.txt", "--tokenizer", "char", "--seq-len", 32, "--out", "data/t"]
    python("prepare_data.py", "file", *flags, cwd=folder)
    python("train_diagonal.py", "--data", "data/t", "--steps", 2, *TINY, *RUN, cwd=folder)
    return folder


def evaluated(folder, *flags):
    """What evaluate.py writes as JSON, and what it prints."""
    out = python("evaluate.py", *flags, "--output", "e.json", cwd=folder).stdout
    return json.loads((folder / "e.json").read_text()), out


def test_evaluate_text(letters, judge, monkeypatch):
    """A model of characters: controls, every combination, intervals, the bound and the table."""
    flags = ["--checkpoint", "runs/t-diagonal", "--judge", judge, "--num-samples", 6]
    flags += ["--nfe", 1, 2, "--gamma", 0, 1, "--temperature", 0, 1, "--bound", 3]
    found, out = evaluated(letters, *flags)
    for r in found["results"]:
        assert r["samples"] == 6
        assert r["gen_ppl_interval"][0] <= r["gen_ppl"] <= r["gen_ppl_interval"][1]
    results = {(r["nfe"], r["gamma"], r["temperature"]): r for r in found["results"][3:]}
    assert results.keys() >= {(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)}
    assert all(r["seconds_per_1000"] > 0 for r in results.values())
    (bound,) = found["bound"]
    assert bound["rows"] == 3
    assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_a_token"]))
    assert 1 < bound["perplexity"] < 2 * len(read_meta(letters / "data/t")["vocab"])
    assert len(re.findall(r"(?m)^\|", out)) == (2 + 3 + len(results)) + (2 + 1)
    monkeypatch.syspath_prepend(HERE / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["curves.py", "e.json", "--output", "e.png"])
    monkeypatch.chdir(letters)
    __import__("curves").main()
    assert Path("e.png").read_bytes().startswith(b"\x89PNG")

    model, saved = load_model(letters / "runs/t-diagonal")  # one of the rows from its parts
    rows = sample.draw_samples(model, 2, 6, 64, 0, euler=True, gamma=1.0, temperature=1.0)
    texts = [decode(saved["meta"], row) for row in rows]
    nll, count = evaluate.judge_scores(texts, *evaluate.load_judge(str(judge), "cpu"), 32).sum(0)
    assert results[2, 1, 1]["gen_ppl"] == pytest.approx(math.exp(nll / count))
    assert results[2, 1, 1]["entropy"] == pytest.approx(evaluate.entropies(rows).mean())


def test_bound_by_data_set(letters):
    """--bound alone: a row for each data set, one of them all validation, without a judge."""
    flags = ["--source", "t.txt", "--tokenizer", "char", "--seq-len", 32, "--val-only"]
    python("prepare_data.py", "file", *flags, "--out", "data/v", cwd=letters)
    meta = read_meta(letters / "data/v")
    assert (meta["train_rows"], meta["settings"]["val_only"]) == (0, True)
    whole = read_rows(letters / "data/v", "val", meta)
    other = read_meta(letters / "data/t")
    parts = [read_rows(letters / "data/t", split, other) for split in ("train", "val")]
    assert np.array_equal(whole, np.concatenate(parts))
    run = ["--checkpoint", "runs/t-diagonal"]
    found, _ = evaluated(letters, *run, "--bound", 4, "--data", "data/t", "data/v")
    assert found["results"] == []
    assert [(row["data"], row["rows"]) for row in found["bound"]] == [("t", 4), ("v", 4)]
    default = letters / "runs/t-diagonal/bound.json"
    python("evaluate.py", *run, "--bound", 4, cwd=letters)
    alone = json.loads(default.read_text())
    assert alone["bound"] == found["bound"][:1]
    folders = [letters / "data" / name for name in "tv"]
    assert found["data"] == {str(folder): read_meta(folder)["sha256"] for folder in folders}
    (saved,) = found["checkpoints"]
    assert saved["step"] == 2


def test_training_from_weights(letters, tmp_path):
    """--init starts from the averaged weights of a checkpoint, on rows of another length."""
    flags = ["--source", letters / "t.txt", "--tokenizer", "char", "--seq-len", 48]
    python("prepare_data.py", "file", *flags, "--out", "data/l", cwd=tmp_path)
    flags = ["--data", "data/l", "--init", letters / "runs/t-diagonal", "--steps", 2, *RUN]
    python("train_diagonal.py", *flags, "--lr", 0, cwd=tmp_path)
    model, _ = load_model(tmp_path / "runs/l-diagonal")
    first, _ = load_model(letters / "runs/t-diagonal")
    assert (model.config.seq_len, model.config.width) == (48, SIZES["tiny"]["width"])
    for name, value in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    size = ["--size", "small", "--out", "other"]
    done = python("train_diagonal.py", *flags, *size, cwd=tmp_path)
    assert "size, path and schedule" in done.stdout
    python("train_diagonal.py", *flags, "--lr", 0, "--resume", "--steps", 3, cwd=tmp_path)
    done = python("sample.py", "--checkpoint", "runs/l-diagonal", "--num-samples", 1, cwd=tmp_path)
    assert len(done.stdout.splitlines()[-1]) == 48


def test_equal_entropy(work):
    """--entropy draws tokens at the temperature that gives the entropy asked for."""
    flags = ["--checkpoint", "runs/grammar-diagonal", "--num-samples", 64, "--nfe", 2, "--gamma", 1]
    model, _ = load_model(work / "runs/grammar-diagonal")
    for target, dtype in ((1.9, "float32"), (2.0, "bfloat16")):
        row = evaluated(work, *flags, "--entropy", target, "--dtype", dtype)[0]["results"][-1]
        assert row["entropy"] == pytest.approx(target, abs=0.01)
        assert 0 < row["temperature"] < 2
        how = dict(euler=True, gamma=1.0, temperature=row["temperature"], dtype=dtype)
        ids = sample.draw_samples(model, 2, 64, 64, 0, **how)
        assert row["entropy"] == evaluate.entropies(ids).mean()


def test_evaluate_samples(letters, judge):
    """A .jsonl and a .txt of the same samples score as their model's, also without a data set."""
    flags = ["--checkpoint", "runs/t-diagonal", "--nfe", 2, "--num-samples", 5]
    python("sample.py", *flags, "--output", "s.jsonl", cwd=letters)
    texts = read_texts(letters / "s.jsonl")
    (letters / "s.txt").write_text("\n".join(texts) + "\n")
    (letters / "odd.txt").write_text("to\u2028be\\n\n\n")
    assert evaluate.read_samples(letters / "odd.txt") == ["to\u2028be\\n", ""]
    files = ["s.jsonl", "s.txt"]
    results = evaluated(letters, *flags, "--judge", judge, "--samples", *files)[0]["results"][3:]
    assert [r["model"] for r in results] == [*files, "t-diagonal"]
    for key in ("gen_ppl", "entropy", "distinct_4", "copied_4"):
        assert len({r[key] for r in results}) == 1, key
    alone = evaluated(letters, "--samples", "s.jsonl", "s.txt", "--judge", judge)[0]["results"]
    assert [r["gen_ppl"] for r in alone] == pytest.approx([results[0]["gen_ppl"]] * 2)
    assert alone[0]["copied_4"] is None


def test_evaluate_sentences(work):
    """Sentences in a file are scored exactly; short ones are padded, long ones are wrong."""
    longest = "these farmers behind the bridge eat a sweet apple . apple"
    (work / "lines.txt").write_text(longest + "\n")
    found, _ = evaluated(work, "--samples", "lines.txt", "--data", "data/grammar")
    assert found["results"][-1]["grammatical"] == 0
    good = "this king reads the book ."
    (work / "lines.txt").write_text(f"{good}\nthis kings reads the book .\nthe the the\n{good}\n")
    found, _ = evaluated(work, "--samples", "lines.txt", "--data", "data/grammar")
    real, _, _, row = found["results"]
    assert (real["grammatical"], row["grammatical"], row["distinct"]) == (1, 0.5, 0.5)
    meta = read_meta(work / "data/grammar")
    rows = evaluate.to_ids(evaluate.read_samples(work / "lines.txt"), meta)
    assert [decode(meta, row) for row in rows][::3] == [good, good]
    assert {len(row) for row in rows} == {meta["seq_len"]}


# ------------------------------------------------------------------------------------------------
# Mistakes that people make: one clear line on stderr, no traceback, no file written.

ABSENT_DEVICE = "mps" if torch.cuda.is_available() else "cuda"
MISTAKES = [
    ("prepare_data.py grammar --out trained --force", "not just a data set"),
    ("prepare_data.py file --source absent.txt", "absent.txt"),
    ("prepare_data.py file --source short.txt --tokenizer char", "too short"),
    ("prepare_data.py file --source picture.png", "picture.png"),
    ("prepare_data.py file --source lines.jsonl --tokenizer char", "--column"),
    ("prepare_data.py file --source short.txt latin.txt --tokenizer char", "latin.txt"),
    ("prepare_data.py owt --source short.txt --tokenizer char", "--val-documents"),
    ("prepare_data.py file", "--source"),
    ("train_diagonal.py --data empty", "--val-only"),
    ("train_diagonal.py --data listed", "meta.json"),
    ("distill.py --data grammar --loss esd --checkpoint guided", "is a map"),
    ("train_diagonal.py", "python prepare_data.py owt"),
    ("train_diagonal.py --data broken", "meta.json"),
    ("train_diagonal.py --data grammar --lr fast", "--lr"),
    ("train_diagonal.py --data grammar --batch-size 10 --micro-batch 4", "--micro-batch 4"),
    ("train_diagonal.py --data grammar --out trained --resume --size base --steps 99", "network"),
    ("distill.py --data grammar --loss esd --checkpoint map", "is a map"),
    (f"train_diagonal.py --data grammar --device {ABSENT_DEVICE}", ABSENT_DEVICE),
    ("train_diagonal.py --data grammar --out trained", "--resume"),
    ("train_diagonal.py --data grammar --out absent --resume", "absent"),
    ("train_diagonal.py --data grammar --out trained --resume --steps 1", "--steps"),
    ("train_diagonal.py --data changed --out trained --resume", "differ in sha256"),
    ("evaluate.py --checkpoint trained --data lower --bound 1", "lower_case: None and False"),
    ("train_diagonal.py --data grammar --context block --block-size 3", "--block-size"),
    ("distill.py --data grammar --loss psd", "runs/grammar-diagonal"),
    ("distill.py --data words --loss psd --checkpoint trained", "vocab"),
    ("distill.py --data changed --loss psd --checkpoint trained", "sha256"),
    ("distill.py --data grammar --loss psd --checkpoint trained --guidance 2", "--guidance"),
    (
        "distill.py --data grammar --loss psd --checkpoint trained --micro-batch 1",
        "--diagonal-share",
    ),
    ("distill.py --data grammar --loss dmd --checkpoint trained --joint", "--joint"),
    ("sample.py --checkpoint trained --output x.txt", ".jsonl"),
    ("sample.py --checkpoint any --prompt some --length 1", "shorten the prompt"),
    ("evaluate.py --samples blank.txt", "holds no text"),
    ("sample.py --checkpoint trained --prompt some", "--context"),
    ("sample.py --checkpoint any --prompt 'some dragons'", "dragons"),
    ("sample.py --checkpoint any --prompt some --length 30", "--block-size"),
    ("sample.py --checkpoint guided --prompt some --guidance 2", "--guidance"),
    ("sample.py --checkpoint block --prompt some", "multiples of 5"),
    ("evaluate.py --checkpoint block --data grammar --bound 4", "--block-size"),
    ("prepare_data.py grammar --out /", "not just a data set"),
    ("evaluate.py --checkpoint nowhere", "no checkpoint at nowhere"),
    ("distill.py --data grammar --loss dmd --checkpoint guided", "guidance"),
    ("evaluate.py --checkpoint trained --data cut", "train.bin"),
    ("evaluate.py --samples short.txt --judge ./nowhere", "nowhere"),
]


@pytest.fixture(scope="session")
def mistaken(conditional, tmp_path_factory):
    """A folder with good and damaged files for the mistakes above."""
    folder = tmp_path_factory.mktemp("mistaken")
    names = ("grammar", "cut", "broken", "words", "changed", "lower", "empty", "listed")
    for name in names:
        shutil.copytree(conditional / "data/grammar", folder / name)
    for name, run in (
        ("trained", "grammar-diagonal"),
        ("any", "any"),
        ("block", "block"),
        ("guided", "guided"),
    ):
        shutil.copytree(conditional / "runs" / run, folder / name)
    meta = read_meta(folder / "grammar")
    changes = {"words": {"vocab": meta["vocab"][::-1]}}
    changes |= {"changed": {"sha256": {}}, "lower": {"lower_case": False}}
    for name, change in changes.items():
        (folder / name / "meta.json").write_text(json.dumps(meta | change))
    (folder / "broken/meta.json").write_text("{")
    (folder / "listed/meta.json").write_text("[]")
    (folder / "empty/meta.json").write_text(json.dumps(meta | {"train_rows": 0}))
    (folder / "empty/train.bin").write_bytes(b"")
    shutil.copytree(folder / "trained", folder / "gone")
    flags = ["--data", "grammar", "--checkpoint", "gone", "--out", "map", "--steps", 1]
    python("distill.py", "--loss", "psd", *RUN, *flags, cwd=folder)
    shutil.rmtree(folder / "gone")
    os.truncate(folder / "cut/train.bin", 1001)
    (folder / "blank.txt").write_text("\n\n")
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (folder / "short.txt").write_text("a b\n")
    (folder / "lines.jsonl").write_text('{"words": "a b"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.mark.parametrize(("words", "named"), MISTAKES)
def test_mistakes(mistaken, words, named):
    """A mistake is refused in one line that names it, and no file is written."""

    def files():
        return {path: path.stat().st_mtime_ns for path in mistaken.rglob("*") if path.is_file()}

    before = files()
    script, *flags = shlex.split(words)
    if script in ("train_diagonal.py", "distill.py"):
        tiny = TINY if script == "train_diagonal.py" else []
        flags = [*tiny, "--batch-size", "16", *flags]
    done = python(script, *flags, cwd=mistaken, ok=False)
    assert named in one_line(done)
    assert files() == before


# ------------------------------------------------------------------------------------------------
# What the project says about itself.


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
    run = dict(batch_size=512, lr=3e-4, beta2=0.999, warmup=2500, cooldown=0, clip=1, ema=0.9999)
    run |= dict(data=Path("data/owt"), diagonal_power=0.5, resume=False)
    own = dict(size="base", schedule="argmax", schedule_blend=0.9, interpolant="linear")
    own |= dict(steps=1_000_000, position_lag=0, context=None, out=Path("runs/owt-diagonal"))
    check("train_diagonal.py", **run, **own)
    run |= dict(steps=100_000, divergence="kl", diagonal_share=0.5, guidance=1, joint=False)
    run |= dict(diagonal_from="data", boundary=1 / 32, consistency_power=0.5, learned_weight=True)
    for loss in distill.TEACHERS:
        own = dict(surgery=loss == "psd", form="signed" if loss == "lsd" else "logit")
        check(f"distill.py --loss {loss}", **run, **own, out=Path(f"runs/owt-{loss}"))
    own = dict(steps=10_000, boundary=1, diagonal_share=0, critic_lr=1e-3, surgery=False)
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


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_names_every_flag(script, monkeypatch):
    """--help opens with the program's docstring and says what each flag does."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: seen.append(self))
    python(script, "--help", cwd=HERE)
    (parser,) = seen
    text = parser.format_help()
    assert PROGRAMS[script].__doc__.split("\n")[0] in text
    assert len(parser._actions) > 8
    for action in parser._actions:
        assert action.help, action
        assert all(flag in text for flag in action.option_strings), action


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


@pytest.mark.parametrize("path", EXTRAS, ids=lambda path: path.stem)
def test_benchmarks_and_examples_start(path, monkeypatch, capsys):
    """Every script beside the programs imports what it needs and explains itself."""
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert not stop.value.code
    assert "usage:" in capsys.readouterr().out


def test_precision(work, monkeypatch):
    """In bfloat16 gradients are those of float32 to a few per cent, for each loss at all times."""
    monkeypatch.syspath_prepend(HERE / "benchmarks")
    import precision

    stage1, saved = load_model(work / "runs/grammar-diagonal")
    model = copy.deepcopy(stage1).requires_grad_(True)
    model.head.data.mul_(0.8)  # or dmd has nothing to match
    model.embedding.requires_grad_(False)
    rows = read_rows(work / "data/grammar", "val", saved["meta"])[:64]
    bounds = {"diagonal": 0.012, "psd": 0.1, "lsd": 0.0125, "esd": 0.08, "dmd": 0.02}
    for row in precision.errors(model, stage1, torch.from_numpy(rows.astype(np.int64))):
        bound = bounds[row.pop("loss")]
        assert all(error < bound for error in row.values()), (bound, row)


def test_sampling_in_bfloat16_keeps_its_times(work):
    """Under autocast the network gets the times of float32, and a float32 state, at each jump."""
    model, _ = load_model(work / "runs/grammar-diagonal")
    calls = {}
    for dtype in ("float32", "bfloat16"):
        calls[dtype] = []
        keep = functools.partial(lambda kept, _, inputs: kept.append(inputs), calls[dtype])
        hook = model.register_forward_pre_hook(keep)
        sample.draw_samples(model, 8, 4, 4, seed=0, dtype=dtype)
        hook.remove()
    for exact, rough in zip(*calls.values(), strict=True):
        assert all(x.dtype == torch.float32 for x in (*exact[:3], *rough[:3]))
        assert all(torch.equal(a, b) for a, b in zip(exact[1:3], rough[1:3], strict=True))
        assert (exact[0] - rough[0]).norm() < 0.05 * exact[0].norm()
    assert len(calls["float32"]) == 8


def test_gpu_goes_on_after_a_failure(tmp_path):
    """A command that fails is recorded and reported, with a pointer to its output."""
    flags = ["--dry-run", "--parts", "psd", "--out", tmp_path / "o"]
    output = finish(start("benchmarks/gpu.py", *flags, cwd=tmp_path), tmp_path, codes=(1,))
    assert "o/psd.log" in output
    assert "some commands failed" in output
    assert "runs/diagonal" in (tmp_path / "o/psd.log").read_text()
