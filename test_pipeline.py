"""The programs, run as a user runs them: the whole road, resume, ranks, bad input.

Tests that read real text or a real tokenizer take them from the folder in DFM_TEST_DATA (wiki.txt.xz,
lm1b_dev.txt.xz, tiktoken_cache/, bert-base-uncased/vocab.txt), and are skipped where it is not set.
"""

import contextlib
import functools
import io
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported: these tests ask nothing of a network

import distill
import evaluate
import prepare_data
import sample
import train_diagonal
from model import ModelConfig, build_model, load_model, read_checkpoint
from prepare_data import decode, read_meta

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "benchmarks"))
import benchmark
import collapse
import curves
import study

TEST_DATA = os.environ.get("DFM_TEST_DATA")
needs_data = pytest.mark.skipif(not TEST_DATA, reason="DFM_TEST_DATA names no folder of test texts and tokenizers")
TINY = ["--size", "tiny", "--device", "cpu", "--batch-size", "16", "--warmup", "2", "--log-every", "1", "--val-batches", "1"]


PROGRAMS = {f"{module.__name__}.py": module for module in (prepare_data, train_diagonal, distill, sample, evaluate)}
torch.set_num_threads(1)  # as the processes below have: two workers share two cores


def python(*args, ranks=1, cwd, env=None, ok=True, apart=False):
    """Run one of the programs in `cwd` to its end, in this process where nothing is lost by it; returns what subprocess.run does.

    apart: in a process of its own. With several ranks each has one, started without torchrun; the output is that of all.
    """
    script, *rest = map(str, args)
    if ranks == 1 and script in PROGRAMS and not apart:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *rest])
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                code = prepare_data.run(PROGRAMS[script].main) or 0
            except SystemExit as stop:
                code = stop.code
        done = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    else:
        group = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())) if ranks > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **group, **(env or {})}
        processes = []
        for rank in map(str, range(ranks)):
            own = environment | (dict(RANK=rank, LOCAL_RANK=rank) if ranks > 1 else {})
            processes.append(subprocess.Popen([sys.executable, str(HERE / script), *rest], cwd=cwd, env=own, stdout=-1, stderr=-1, text=True))
        outs, errs = zip(*(process.communicate(timeout=300) for process in processes), strict=True)
        done = subprocess.CompletedProcess(args, max(process.returncode for process in processes), "".join(outs), "".join(errs))
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/grammar and a short stage-1 run of it, runs/grammar-diagonal."""
    folder = tmp_path_factory.mktemp("work")
    python("prepare_data.py", "grammar", cwd=folder)
    python("train_diagonal.py", "--data", "data/grammar", "--steps", 4, *TINY, cwd=folder)
    return folder


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes and their threads are read from /proc")


def same(a, b):
    """Whether two nested structures of tensors and builtins are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log_lines(folder, without=("seconds_per_step", "tokens_per_second", "first_step_seconds", "peak_memory_gb", "mfu")):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


# ------------------------------------------------------------------------------------------------
# The whole road.


@pytest.mark.parametrize("loss", ["psd", "lsd", "esd"])
def test_the_whole_road(work, loss):
    """prepare, train, distil, sample, evaluate: each reads what the one before wrote, by its defaults."""
    meta = read_meta(work / "data/grammar")
    assert (work / "data/grammar/train.bin").stat().st_size == 2 * meta["train_rows"] * meta["seq_len"] == 2 * 50_000 * meta["seq_len"]
    real = dict(cwd=work, apart=loss == "esd", env={"PYTHONDEVMODE": "1"})  # one of them as processes, which must close their files
    err = python("distill.py", "--data", "data/grammar", f"--loss={loss}", "--steps", 2, *TINY[2:], **real).stderr
    run = work / f"runs/grammar-{loss}"
    last = log_lines(run)[-1]
    assert {"diagonal_ce", "consistency_kl", "distance", "teacher_entropy", "grad_norm", "val_diagonal_ce", "lr"} <= last.keys()
    assert any(name.startswith("consistency_kl_q") for name in last)  # by quarter of progress, where there was a row
    assert ("clamped" in last) == (loss != "psd")
    assert ("conflict" in last) == (loss == "psd")
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["loss"] == loss
    assert config["versions"]["torch"] == torch.__version__
    path = f"runs/grammar-{loss}/checkpoint.pt"
    assert not any("_orig_mod" in name for name in checkpoint(work / path)["model"])
    done = python("sample.py", "--checkpoint", path, "--nfe", 1, 3, "--num-samples", 2, "--output", "out.npy", **real)
    assert done.stdout.count("NFE") == 2
    assert np.load(work / "out-1.npy").shape == (2, meta["seq_len"])
    err += done.stderr
    done = python("evaluate.py", "--checkpoint", "runs/grammar-diagonal/checkpoint.pt", path, "--nfe", 1, 2, "--num-samples", 16, **real)
    assert done.stdout.count("grammar-") >= 4
    assert "ResourceWarning" not in err + done.stderr
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert [r["sampler"] for r in results] == [""] * 3 + ["euler"] * 2 + ["flow-map"] * 2
    assert results[0]["grammatical"] == 1
    assert all(0 <= r["grammatical"] <= 1 and r["source_entropy"] == prepare_data.grammar_entropy() for r in results)


def test_samples_depend_on_seed_and_index_alone(work):
    """The same samples in batches of any size; another seed gives others."""
    model, _ = load_model(work / "runs/grammar-diagonal/checkpoint.pt")
    rows = sample.draw_samples(model, 2, 7, 7, 0, euler=True)
    assert np.array_equal(rows, sample.draw_samples(model, 2, 7, 3, 0, euler=True))
    assert np.array_equal(rows[:4], sample.draw_samples(model, 2, 4, 4, 0, euler=True))


def test_renoised_samples_depend_on_seed_and_index_alone(work):
    """The same with fresh noise between jumps, which moves the samples; a gamma of 0 draws none."""
    model, _ = load_model(work / "runs/grammar-diagonal/checkpoint.pt")
    rows = sample.draw_samples(model, 3, 7, 7, 0, euler=True, gamma=0.5)
    assert np.array_equal(rows, sample.draw_samples(model, 3, 7, 3, 0, euler=True, gamma=0.5))
    assert np.array_equal(rows[:4], sample.draw_samples(model, 3, 4, 4, 0, euler=True, gamma=0.5))
    plain = sample.draw_samples(model, 3, 7, 7, 0, euler=True)
    assert not np.array_equal(rows, plain)
    assert np.array_equal(plain, sample.draw_samples(model, 3, 7, 7, 0, euler=True, temperature=1.0, gamma=0.0, sigma=1.0))


def test_watch(work, monkeypatch, capsys):
    """A line for each evaluation, the last of them the sample; coloured frames on a terminal."""
    monkeypatch.chdir(work)
    flags = ["--checkpoint", "runs/grammar-diagonal/checkpoint.pt", "--nfe", "3", "--num-samples", "1", "--device", "cpu", "--watch"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    sample.main()
    frames, _, text = capsys.readouterr().out.partition("--- 3 NFE\n")
    assert [line[:3] for line in frames.splitlines()] == ["1/3", "2/3", "3/3"]
    assert frames.splitlines()[-1].partition(": ")[2].replace(" <pad>", "") == text.strip()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.main()
    frames = capsys.readouterr().out.split("\x1b[H\x1b[2J")[1:]
    assert len(frames) == 3
    assert all(frame.count("\x1b[38;5;") == 10 for frame in frames)


def test_written_samples(tmp_path):
    """One sample a line, whatever the sample holds, and read back the same."""
    meta = dict(tokenizer="char", vocab=["a", "\n", "\\"], join="", pad_id=None)
    sample.write_samples(tmp_path / "s.txt", np.array([[0, 1, 2], [2, 0, 0]]), meta)
    assert (tmp_path / "s.txt").read_text().splitlines() == ["a\\n\\\\", "\\\\aa"]
    assert evaluate.read_samples(tmp_path / "s.txt", None) == (None, ["a\n\\", "\\aa"])


def test_training_learns(tmp_path, work):
    """60 steps on the grammar bring the validation cross-entropy down from log V."""
    python("train_diagonal.py", "--data", work / "data/grammar", "--out", tmp_path / "run", "--steps", 60, "--lr", "2e-3", "--val-every", 20, *TINY,
           cwd=tmp_path)  # fmt: skip
    losses = [line["val_diagonal_ce"] for line in log_lines(tmp_path / "run") if "val_diagonal_ce" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < math.log(52) + 0.1
    assert losses[-1] < 2.6


# ------------------------------------------------------------------------------------------------
# Ranks, accumulation, resume.


STAGES = {
    "psd": ["--loss", "psd"],
    "esd": ["--loss", "esd"],
    "lsd-ema": ["--loss", "lsd", "--teacher", "ema", "--target", "signed"],
    "joint": ["--loss", "esd", "--joint", "--size", "tiny", "--position-lag", "1", "--step-law", "pair", "--schedule", "calibrated"],
}


def stage_command(stage, work):
    """The program and flags of a short run of stage 1 ("diagonal", "context"), or of one of STAGES, on the grammar."""
    if stage in ("diagonal", "context"):
        return ["train_diagonal.py", "--data", work / "data/grammar", *TINY, *["--context", "any", "--context-dropout", "0.2"] * (stage == "context")]
    start = [] if stage == "joint" else ["--checkpoint", work / "runs/grammar-diagonal/checkpoint.pt"]
    return ["distill.py", *STAGES[stage], *start, "--data", work / "data/grammar", *TINY[2:]]


@pytest.mark.parametrize("stage", ["context", "psd", "joint"])
def test_ranks_and_accumulation_change_nothing(work, tmp_path, stage):
    """One step by one rank, by one rank in four micro-batches, and by two ranks: the same gradient (Adam's first moment).

    What two ranks began one goes on with: the same global batches, so the same weights but for rounding.
    """
    program = stage_command(stage, work)
    moments = []
    for name, ranks, micro in (("whole", 1, 16), ("micro", 1, 4), ("ranks", 2, 4)):
        python(*program, "--out", tmp_path / name, "--steps", 1, "--micro-batch", micro, ranks=ranks, cwd=tmp_path)
        saved = checkpoint(tmp_path / name / "checkpoint.pt")
        moments.append([state["exp_avg"] for state in saved["optimizer"]["state"].values()])
        assert len(log_lines(tmp_path / name)) == 1
    for other in moments[1:]:
        scale = max(float(m.abs().max()) for m in moments[0])
        assert max(float((a - b).abs().max()) for a, b in zip(moments[0], other, strict=True)) < 1e-5 * scale
    assert scale > 0
    if stage == "psd":
        for name, micro in (("whole", 16), ("ranks", 4)):
            python(*program, "--out", tmp_path / name, "--steps", 3, "--micro-batch", micro, "--resume", cwd=tmp_path)
        whole, parts = (checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "ranks"))
        assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


@needs_proc
def test_a_rank_ends_its_group(work, tmp_path):
    """No thread of the process group outlives train: one that does can abort the exit of a run that succeeded."""
    command = [str(a) for a in stage_command("esd", work)]
    script = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import distill
sys.argv = {[*command, "--steps", "1"]!r}
distill.main()
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in names), names
"""
    (tmp_path / "rank.py").write_text(script)
    python(
        tmp_path / "rank.py", cwd=tmp_path, env=dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    )


@pytest.mark.parametrize("stage", ["diagonal", "psd", "lsd-ema", "joint"])
def test_resume_is_not_stopping(work, tmp_path, stage):
    """Three steps, then --resume to six, equal six at once: weights, average, optimizer and log, bit for bit."""
    program = [*stage_command(stage, work), "--micro-batch", 8]
    python(*program, "--out", tmp_path / "whole", "--steps", 6, "--val-every", 3, cwd=tmp_path)
    python(*program, "--out", tmp_path / "parts", "--steps", 3, "--val-every", 3, cwd=tmp_path)
    # lines that a killed run wrote after its last checkpoint are written again, not twice
    with open(tmp_path / "parts/log.jsonl", "a") as file:
        file.write('{"step": 4}\n{"st')
    python(*program, "--out", tmp_path / "parts", "--steps", 6, "--val-every", 3, "--resume", cwd=tmp_path)
    assert same_runs(tmp_path / "whole", tmp_path / "parts")
    curve = checkpoint(tmp_path / "whole/checkpoint.pt")["model_config"].get("schedule_curve")
    assert (curve is not None) == (stage == "joint")


def start(*args, cwd, ranks=1):
    """A program of ours begun in a process group of its own, its output in cwd / "output"."""
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    if ranks > 1:
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    script, *rest = map(str, args)
    with open(cwd / "output", "w") as output:
        return subprocess.Popen([*launch, str(HERE / script), *rest], cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for_step(process, run, step):
    """Wait until `run` has logged that step, or the process has ended."""
    for _ in range(6000):
        try:
            if process.poll() is not None or log_lines(run)[-1]["step"] >= step:
                return
        except (OSError, ValueError, IndexError, KeyError):
            pass  # no log yet, or a line half written
        time.sleep(0.01)
    raise AssertionError((run.parent / "output").read_text())


def same_runs(a, b):
    """Whether two runs ended with the same weights, average, optimizer and log, bit for bit, and left nothing half written."""
    saved = [checkpoint(run / "checkpoint.pt") for run in (a, b)]
    assert all(same(saved[0][key], saved[1][key]) for key in ("model", "ema", "optimizer", "step", "model_config", "meta"))
    assert log_lines(a) == log_lines(b)
    return not list(b.rglob("*.tmp"))


def kill_and_resume(program, folder, kills, steps, seed, ranks=1, one_rank=False):
    """Run `program` to the end, killed `kills` times at random moments; and once in peace. How many kills hit; both must end alike."""
    chance, hits = random.Random(seed), 0
    flags = [*program, "--steps", steps, "--save-every", 3, "--log-every", 2]
    python(*flags, "--out", folder / "whole", ranks=ranks, cwd=folder, apart=True)
    for kill in range(kills + 1):
        resume = ["--resume"] if train_diagonal.checkpoints(folder / "parts") else []
        process = start(*flags, "--out", folder / "parts", *resume, ranks=ranks, cwd=folder)
        if kill < kills:
            wait_for_step(process, folder / "parts", chance.randint(kill * steps // (kills + 1), (kill + 1) * steps // (kills + 1)))
            time.sleep(chance.random() * 0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(workers(folder / "parts")), signal.SIGKILL) if one_rank else os.killpg(process.pid, signal.SIGKILL)
        code = process.wait(timeout=120)
        hits += kill < kills and code != 0
        if code == 2 and "already" in (folder / "output").read_text():
            break  # killed after the last step was saved
        assert kill < kills or code == 0, (folder / "output").read_text()
    assert same_runs(folder / "whole", folder / "parts")
    return hits


def workers(out):
    """The processes that train into `out`, not their launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if str(out).encode() in words and b"torch.distributed.run" not in words:
                found.append(int(entry.name))
    return sorted(found)


def test_killed_runs_resume(work, tmp_path):
    """SIGKILL at random moments and --resume: nothing is lost. Two ranks: `test_two_ranks_stop_and_resume`."""
    assert kill_and_resume([*stage_command("psd", work), "--micro-batch", 8], tmp_path, 2, 24, seed=0) > 0


@pytest.mark.soak
@needs_proc
@pytest.mark.parametrize(("stage", "ranks"), [("diagonal", 1), ("psd", 1), ("esd", 1), ("psd", 2), ("joint", 2)])
def test_soak_of_kills(work, tmp_path, stage, ranks):
    """25 random kills in all, five of each."""
    kills = kill_and_resume([*stage_command(stage, work), "--micro-batch", 4], tmp_path, 5, 100, seed=ranks, ranks=ranks, one_rank=ranks == 2)
    print(f"{stage}, {ranks} rank{'s' * (ranks > 1)}: {kills} kills survived, the end bit for bit that of the uninterrupted run")
    assert kills == 5


def stopped_by(sig, process, folder):
    """Send `sig` to a run into folder / "parts" and wait: (its exit code, the step it ended after, as said, saved and logged)."""
    process.send_signal(sig)
    code = process.wait(timeout=60)
    said = re.findall(r"stopped by (\w+) .*after step (\d+)", (folder / "output").read_text())
    assert [name for name, _ in said] == [sig.name], (folder / "output").read_text()
    step = checkpoint(folder / "parts/checkpoint.pt")["step"]
    assert step == int(said[0][1]) == log_lines(folder / "parts")[-1]["step"]
    return code, step


def test_a_signal_saves_and_ends(work, tmp_path):
    """SIGTERM or SIGINT: within a step the run saves and ends, with exit code 0; --resume ends as if nothing had happened."""
    flags = [*stage_command("psd", work), "--micro-batch", 8, "--steps", 30]
    python(*flags, "--out", tmp_path / "whole", cwd=tmp_path)
    last = 0
    for sig, resume in ((signal.SIGTERM, []), (signal.SIGINT, ["--resume"])):
        process = start(*flags, "--out", tmp_path / "parts", *resume, cwd=tmp_path)
        wait_for_step(process, tmp_path / "parts", last + 3)
        code, last = stopped_by(sig, process, tmp_path)
        assert code == 0
        assert last < 30
    python(*flags, "--out", tmp_path / "parts", "--resume", cwd=tmp_path)
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


@needs_proc
def test_two_ranks_stop_and_resume(work, tmp_path):
    """Of two ranks under torchrun one is killed, which ends both; then SIGTERM saves and ends both; the end is that of a run in peace."""
    flags = [*stage_command("esd", work), "--micro-batch", 4, "--steps", 30, "--save-every", 3]
    python(*flags, "--out", tmp_path / "whole", ranks=2, cwd=tmp_path)
    process = start(*flags, "--out", tmp_path / "parts", ranks=2, cwd=tmp_path)
    wait_for_step(process, tmp_path / "parts", 5)
    os.kill(workers(tmp_path / "parts")[1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    process = start(*flags, "--out", tmp_path / "parts", "--resume", ranks=2, cwd=tmp_path)
    wait_for_step(process, tmp_path / "parts", checkpoint(tmp_path / "parts/checkpoint.pt")["step"] + 4)  # past what the killed run logged
    _, last = stopped_by(signal.SIGTERM, process, tmp_path)  # torchrun ends with a code of its own
    assert last < 30
    python(*flags, "--out", tmp_path / "parts", "--resume", ranks=2, cwd=tmp_path)
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_second_signal_ends_at_once():
    """The first signal is noted; the second one kills, whatever the step is doing."""
    if not (child := os.fork()):
        with train_diagonal.Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            if interrupt.asked == "SIGTERM":
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT


RANK_SCRIPT = """
import atexit, os, sys, time
sys.path.insert(0, {here!r})
rank, when = os.environ["RANK"], {when!r}
atexit.register(lambda: open(when + rank, "w").write(str(time.time())))
def audit(event, args):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.link") or event == "open" and set(args[1] or "") & set("wax+")
    if rank != "0" and changes and {out!r} in str(args[0]):
        os.write(2, f"rank {{rank}} writes {{args}}".encode())
        os._exit(9)
sys.addaudithook(audit)
import train_diagonal
real = train_diagonal.diagonal
def diagonal(model, tokens, draw, power):
    if rank == "1" and draw.step == 3:
        open(when, "w").write(str(time.time()))
        {fault}
    return real(model, tokens, draw, power)
train_diagonal.diagonal = diagonal
sys.argv = ["train_diagonal.py", *{flags!r}]
train_diagonal.run(train_diagonal.main)
"""


@pytest.mark.parametrize(("fault", "shown"), [("raise ValueError('a fault of rank 1')", "a fault of rank 1"), ("time.sleep(12)", "or hangs")])
def test_one_rank_fails(work, tmp_path, fault, shown):
    """A rank that raises ends the others within 5 seconds, its error shown first; one that hangs, 5 after --timeout. Only rank 0 writes."""
    flags = ["--data", str(work / "data/grammar"), *TINY, "--out", "run", "--steps", "99", "--save-every", "2", "--timeout", "5"]
    when = str(tmp_path / "when")
    (tmp_path / "rank.py").write_text(RANK_SCRIPT.format(here=str(HERE), out="run", flags=flags, fault=fault, when=when))
    process = start(tmp_path / "rank.py", cwd=tmp_path, ranks=2)
    assert process.wait(timeout=120) != 0
    took = float(Path(when + "0").read_text()) - float(Path(when).read_text())
    output = (tmp_path / "output").read_text()
    assert shown in output
    assert "rank 1 writes" not in output
    assert output.index(shown) < output.index("another rank ended" if "raise" in fault else "ChildFailedError")
    assert took < 5 + ("sleep" in fault) * 5, took
    assert checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2


def test_ranks_that_differ(work, tmp_path):
    """Ranks with other flags, data or checkpoints than the rest: all end with a line before the first step."""
    flags = ["--data", str(work / "data/grammar"), *TINY, "--out", "run", "--steps", "9"]
    (tmp_path / "rank.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import train_diagonal
sys.argv = ["train_diagonal.py", *{flags!r}, "--lr", "1e-" + os.environ["RANK"]]
train_diagonal.run(train_diagonal.main)
""")
    done = python(tmp_path / "rank.py", cwd=tmp_path, ranks=2, ok=False)
    assert done.returncode == 2
    assert "the ranks differ in flags" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoints(work, tmp_path):
    """A flipped bit, a cut, a foreign file: refused in one line; --resume takes the checkpoint before and loses nothing."""
    flags = [*stage_command("esd", work), "--save-every", 2, "--keep", 2]
    for name, steps in (("whole", 6), ("parts", 4)):
        python(*flags, "--out", tmp_path / name, "--steps", steps, "--val-every", 2, cwd=tmp_path)
    run = tmp_path / "parts"
    assert sorted(path.name for path in run.glob("*.pt")) == ["checkpoint-2.pt", "checkpoint-4.pt", "checkpoint.pt"]
    good = (run / "checkpoint.pt").read_bytes()
    chance, refused = random.Random(0), 0
    for case in range(60):
        flipped, at = bytearray(good), chance.randrange(len(good))
        flipped[at] ^= 1 << chance.randrange(8)
        (tmp_path / "x.pt").write_bytes(flipped if case % 2 else good[:at])
        try:
            whole = same(read_checkpoint(tmp_path / "x.pt"), checkpoint(run / "checkpoint.pt"))
            assert whole, "damage that was not seen"  # a bit between the records harms nothing
        except prepare_data.UserError:
            refused += 1
    assert refused >= 55
    with open(run / "checkpoint.pt", "r+b") as file:  # a hard link: checkpoint-4.pt is the same file
        file.seek(len(good) // 2)
        file.write(bytes(b ^ 255 for b in good[len(good) // 2 :][:1]))
    done = python(*flags, "--out", run, "--steps", 6, "--val-every", 2, "--resume", cwd=tmp_path)
    assert done.stderr.count("is damaged") == done.stderr.count("trying the one before") == 2
    assert same_runs(tmp_path / "whole", run)


def test_a_kill_at_any_byte(work, tmp_path):
    """Killed at any byte of a checkpoint's write and between any two file operations: the newest one is whole, and the next save goes on."""
    meta = read_meta(work / "data/grammar")
    model = build_model(ModelConfig(vocab_size=52, seq_len=10, layers=1, width=8, heads=2, time_width=8))
    args, optimizer = SimpleNamespace(out=tmp_path, keep=2, data="x"), torch.optim.Adam(model.parameters())

    def save(step):
        train_diagonal.save(model, model, optimizer, step, None, meta, args)

    def killed(prepare, step):
        """Save in a child that `prepare` makes die somewhere; whether it did."""
        if not (child := os.fork()):
            try:
                prepare()
                save(step)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def at_byte(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def at_operation(number):
        seen = []

        def audit(event, arguments):
            if event in ("open", "os.rename", "os.link", "os.remove") and str(tmp_path) in str(arguments[0]):
                seen.append(event)
                if len(seen) > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)

    save(1)
    size, step, kills = (tmp_path / "checkpoint.pt").stat().st_size, 1, 0
    places = [functools.partial(at_byte, size * k // 60) for k in range(60)] + [functools.partial(at_operation, k) for k in range(12)]
    for place in places:
        kills += killed(place, step + 1)
        newest = read_checkpoint(train_diagonal.checkpoints(tmp_path)[0])["step"]
        assert newest in (step, step + 1)
        save(step := step + 1)
        assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == step
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["checkpoint.pt", f"checkpoint-{step}.pt", f"checkpoint-{step - 1}.pt"])
    assert kills >= 60 + 6


def test_any_checkpoint(work, monkeypatch):
    """A whole file with another kind of thing in it is refused, or serves as it is meant: nothing but a UserError comes of it."""
    path, chance = work / "runs/grammar-diagonal/checkpoint.pt", random.Random(0)
    good, kinds = checkpoint(path), (None, 3, -1, "x", [1], {}, {"x": torch.ones(2)}, torch.ones(2), math.nan)
    cases = [(key, value) for key in good for value in chance.sample(kinds, 3)]
    for key in ("meta", "model_config", "args"):
        for name in chance.sample(sorted(good[key]), 4):
            cases += [(key, good[key] | {name: value}) for value in chance.sample(kinds, 2)]
            cases += [(key, {k: v for k, v in good[key].items() if k != name})]
    model = build_model(good["model_config"])
    optimizer = torch.optim.Adam(model.parameters())
    args, refused = SimpleNamespace(**good["args"] | {"out": path.parent}), 0
    monkeypatch.chdir(work)
    for key, value in cases:
        with monkeypatch.context() as patch:  # as if read from a file: reading has its own tests, and takes its time
            patch.setattr(torch, "load", lambda *_, bad=good | {key: value}, **__: dict(bad))
            patch.setattr("zipfile.ZipFile.testzip", lambda self: None)
            for use in (load, train_diagonal.restore):
                try:
                    use(model, optimizer, model, good["meta"], args)
                except prepare_data.UserError as error:
                    assert str(error).startswith(str(path.parent / "checkpoint")), error
                    refused += 1
    assert refused > len(cases)


def load(model, optimizer, ema, meta, args):
    """What sample.py and evaluate.py do with args.out / checkpoint.pt before the work."""
    _, found = load_model(args.out / "checkpoint.pt")
    decode(found["meta"], [0, found["meta"]["vocab_size"] - 1])
    sample.is_euler(SimpleNamespace(sampler=None), found)
    Path(found["args"]["data"])


def test_out_of_memory(capsys):
    """What numpy, Python and torch raise where there is no memory for it: one line."""
    for ask in (lambda: np.ones(2**50), lambda: [0] * 2**50, lambda: torch.ones(2**50)):
        with pytest.raises(SystemExit) as stop:
            prepare_data.run(ask)
        assert one_line(stop.value.code, capsys.readouterr().err, "out of memory")


def test_a_full_disk(work, tmp_path):
    """The run stops with one line, the earlier checkpoint is whole, and --resume goes on once there is room."""
    flags = [*stage_command("psd", work), "--out", tmp_path / "run"]
    python(*flags, "--steps", 2, cwd=tmp_path)
    script = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000)); sys.path.insert(0, {str(HERE)!r})\n"
    (tmp_path / "full.py").write_text(script + f"sys.argv[0] = {str(HERE / flags[0])!r}; runpy.run_path(sys.argv[0], run_name='__main__')\n")
    done = python(tmp_path / "full.py", *flags[1:], "--steps", 4, "--resume", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "cannot write")
    assert "step 4" in done.stderr
    assert checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2
    assert not list(tmp_path.rglob("*.tmp"))
    python(*flags, "--steps", 4, "--resume", cwd=tmp_path)


def test_a_bad_step_changes_nothing(work, tmp_path):
    """A gradient that is not finite is skipped and counted: weights and Adam's state stay, the run goes on."""
    flags = ["--data", str(work / "data/grammar"), *TINY, "--steps", "6", "--save-every", "1", "--keep", "9", "--log-every", "2", "--out", "run"]
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import train_diagonal
real, calls = train_diagonal.diagonal, []
def diagonal(model, tokens, draw, power):
    losses, report = real(model, tokens, draw, power)
    return {{"diagonal": losses["diagonal"] * (float("inf") if draw.step == 2 else 1)}}, report
train_diagonal.diagonal = diagonal
sys.argv = {["train_diagonal.py", *flags]!r}
train_diagonal.main()
"""
    (tmp_path / "bad.py").write_text(script)
    python(tmp_path / "bad.py", cwd=tmp_path)
    two, three, four = (checkpoint(tmp_path / f"run/checkpoint-{step}.pt") for step in (2, 3, 4))
    assert same(two["model"], three["model"])
    assert same(two["optimizer"]["state"], three["optimizer"]["state"])
    assert not same(three["model"], four["model"])
    assert [line.get("skipped", 0) for line in log_lines(tmp_path / "run")] == [0, 1, 0]
    assert all(math.isfinite(value) for line in log_lines(tmp_path / "run") for value in line.values())


@pytest.mark.soak
def test_soak_of_memory(work, tmp_path):
    """2,000 steps of stage 2: after the first 500 resident memory grows by less than 1%, open files and threads not at all."""
    flags = [*stage_command("esd", work), "--steps", 2000, "--save-every", 200, "--val-every", 200, "--log-every", 100]
    process = start(*flags, "--out", tmp_path / "run", cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 500)
    proc, seen = Path(f"/proc/{process.pid}"), []
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            size = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            seen.append((time.monotonic(), size, *(len(list((proc / name).iterdir())) for name in ("fd", "task"))))
        time.sleep(0.25)
    assert process.returncode == 0
    clock, resident, files, threads = np.array(seen[:-4], float).T  # the last second is that of leaving
    slope = np.polyfit(clock, resident, 1)[0] * (clock[-1] - clock[0]) / 1500
    print(f"resident {resident.mean() / 1e6:.1f} MB, {slope:+.0f} bytes a step over steps 500 to 2,000, {len(seen)} readings, "
          f"at most {files.max():.0f} open files and {threads.max():.0f} threads")  # fmt: skip
    assert slope * 1500 < 0.01 * resident.mean()
    assert files[-len(files) // 4 :].max() <= files[: len(files) // 4].max()
    assert threads[-len(threads) // 4 :].max() <= threads[: len(threads) // 4].max()


def test_config_replays_a_run(work, tmp_path):
    """--config gives the same run; a flag given beside it wins; an unknown key is refused."""
    python("train_diagonal.py", "--data", work / "data/grammar", "--out", tmp_path / "a", "--steps", 2, *TINY, cwd=tmp_path)
    python("train_diagonal.py", "--config", tmp_path / "a/config.json", "--out", tmp_path / "b", "--steps", 1, cwd=tmp_path)
    python("train_diagonal.py", "--config", tmp_path / "b/config.json", "--out", tmp_path / "b", "--steps", 2, "--resume", cwd=tmp_path)
    assert same(*(checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in "ab"))
    flags = ["--data", work / "data/grammar", "--checkpoint", tmp_path / "a/checkpoint.pt", "--steps", 1, *TINY[2:]]
    python("distill.py", "--loss", "psd", "--out", tmp_path / "d", *flags, cwd=tmp_path)
    python("distill.py", "--config", tmp_path / "d/config.json", "--out", tmp_path / "e", cwd=tmp_path)  # --loss is in the file
    assert same(*(checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in "de"))
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["flags"]["learning_rate"] = 1
    (tmp_path / "c.json").write_text(json.dumps(config))
    done = python("train_diagonal.py", "--config", tmp_path / "c.json", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "learning_rate")


def test_first_steps(work, tmp_path):
    """Warm-up and cool-down of the learning rate, and the average after one step: a tenth of the start, the rest of the new weights."""
    flags = ["--data", work / "data/grammar", *TINY, "--lr", "1e-2", "--warmup", 2, "--cooldown", 2]
    python("train_diagonal.py", *flags, "--out", tmp_path / "a", "--steps", 4, cwd=tmp_path)
    assert [line["lr"] for line in log_lines(tmp_path / "a")] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    python("train_diagonal.py", *flags, "--out", tmp_path / "b", "--steps", 1, cwd=tmp_path)
    saved = checkpoint(tmp_path / "b/checkpoint.pt")
    args = SimpleNamespace(
        seed=0, size="tiny", **{key: saved["model_config"][key] for key in ("interpolant", "schedule", "schedule_blend", "position_lag")}
    )
    for name, start in train_diagonal.new_model(args, saved["meta"]).named_parameters():
        assert torch.allclose(saved["ema"][name], 0.1 * start.detach() + 0.9 * saved["model"][name], atol=1e-7), name
    assert not torch.equal(saved["ema"]["head"], saved["model"]["head"])


def test_a_loss_that_is_not_finite(work, tmp_path):
    """The run stops with a line that names term, step and progress; the checkpoint before is kept."""
    flags = ["--data", work / "data/grammar", "--out", tmp_path / "run", *TINY, "--log-every", 5, "--save-every", 1, "--warmup", 0, "--skip-limit", 3]
    done = python("train_diagonal.py", *flags, "--steps", 9, "--lr", "1e37", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "loss_diagonal is nan at step 2, from times of progress [0, 0.25]")
    assert "4 steps in a row" in done.stderr
    assert all(p.isfinite().all() for p in checkpoint(tmp_path / "run/checkpoint.pt")["ema"].values())


def test_means_find_the_bad_term():
    """Means over steps, a pair as the ratio of its sums; the first bad step, its term and its quarter are named."""
    means = train_diagonal.Means("cpu")
    for step, (loss, pair) in enumerate([(1.0, (2.0, 1)), (3.0, (0.0, 0)), (5.0, (4.0, 2))]):
        means.add(step, {"loss": torch.tensor(loss), "ce_q1": torch.tensor(pair), "ce_q2": torch.tensor([0.0, 0.0])})
    assert means.read() == {"loss": 3.0, "ce_q1": 2.0}
    means = train_diagonal.Means("cpu")
    for step in range(5):
        rows = torch.tensor([1.0, 1.0, math.nan if step >= 3 else 1.0, 1.0])
        bins = train_diagonal.quarters("ce", rows, torch.tensor([[0.1], [0.3], [0.6], [0.9]]))
        means.add(step, {"other": torch.tensor(math.nan if step == 4 else 0.0), "loss_x": rows.mean()} | bins)
    with pytest.raises(prepare_data.UserError, match=r"loss_x is nan at step 3, from times of progress \[0.5, 0.75\], and 2 steps"):
        means.read()


# ------------------------------------------------------------------------------------------------
# Text.


def test_prepare_local_files(tmp_path):
    """.txt, .jsonl and .parquet with the same documents give the same characters, and decode back to the text."""
    import datasets

    documents = [f"Document {i}: the quick brown fox, {'again ' * (i % 5)}" for i in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(documents))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    datasets.Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "a.parquet")
    digests = set()
    for kind in ("txt", "jsonl", "parquet"):
        python("prepare_data.py", "file", "--source", tmp_path / f"a.{kind}", "--tokenizer", "char", "--seq-len", 32, "--documents", "line",
               "--out", tmp_path / kind, cwd=tmp_path)  # fmt: skip
        meta = read_meta(tmp_path / kind)
        digests.add(json.dumps(meta["sha256"], sort_keys=True))
        rows = np.fromfile(tmp_path / kind / "train.bin", "<u2").reshape(-1, 32)
        assert "".join(decode(meta, row) for row in rows) == "\n".join(documents)[: rows.size]
    assert len(digests) == 1
    done = python("prepare_data.py", "file", "--source", tmp_path / "a.txt", "--out", tmp_path / "txt", cwd=tmp_path)
    assert "--force" in done.stdout
    done = python("prepare_data.py", "file", "--source", tmp_path / "a.txt", "--seq-len", 16, "--out", tmp_path / "txt", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "seq_len 32, not 16")


def test_text8_split(tmp_path):
    """text8 as one file of 27 characters: 90/5/5 per cent, rows of 256, no frame."""
    text = "".join(chr(97 + i * i % 26) if i % 7 else " " for i in range(60_000)).strip()
    (tmp_path / "text8.txt").write_text(text)
    python("prepare_data.py", "text8", "--source", "text8.txt", cwd=tmp_path)
    meta = read_meta(tmp_path / "data/text8")
    assert (meta["train_rows"], meta["val_rows"], meta["seq_len"]) == (len(text) * 90 // 100 // 256, 3000 // 256, 256)
    rows = np.fromfile(tmp_path / "data/text8/val.bin", "<u2").reshape(-1, 256)
    assert decode(meta, rows[0]) == text[len(text) * 90 // 100 :][:256]


def wiki_documents(count):
    """The first `count` articles of wiki.txt.xz."""
    with lzma.open(Path(TEST_DATA) / "wiki.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    return [body.strip() for body in re.findall(r"<doc [^>]*>(.*?)</doc>", text, re.DOTALL)][:count]


def tiktoken_environment(folder):
    """TIKTOKEN_CACHE_DIR with a writable copy of the vocabulary."""
    shutil.copytree(Path(TEST_DATA) / "tiktoken_cache", folder / "cache", dirs_exist_ok=True)
    return {"TIKTOKEN_CACHE_DIR": str(folder / "cache")}


@needs_data
def test_real_text_gpt2(tmp_path, judge, monkeypatch):
    """Wikipedia through GPT-2's tokenizer: framed rows that decode to the articles, both stages, sampling, gen-PPL."""
    env, documents = tiktoken_environment(tmp_path), wiki_documents(30)
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    python("prepare_data.py", "owt", "--source", "wiki.jsonl", "--out", "data/wiki", "--seq-len", 64, "--val-documents", 3, "--workers", 2,
           cwd=tmp_path, env=env)  # fmt: skip
    meta = read_meta(tmp_path / "data/wiki")
    rows = np.fromfile(tmp_path / "data/wiki/train.bin", "<u2").reshape(-1, 64)
    assert (rows[:, 0] == 50256).all()
    assert (rows[:, -1] == 50256).all()
    assert meta["vocab_size"] == 50257
    flags = ["--data", "data/wiki", "--steps", 2, "--batch-size", 4, "--log-every", 1, "--val-batches", 1, "--device", "cpu"]
    python("train_diagonal.py", "--size", "tiny", *flags, cwd=tmp_path)
    python("distill.py", "--loss", "esd", *flags, cwd=tmp_path)
    out = python("sample.py", "--checkpoint", "runs/wiki-esd/checkpoint.pt", "--nfe", 2, cwd=tmp_path, env=env).stdout
    assert "2 NFE" in out
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    real, shuffled, unigram, model = evaluated(
        tmp_path, monkeypatch, "--checkpoint", "runs/wiki-esd/checkpoint.pt", "--judge", judge, "--num-samples", 4
    )["results"]
    assert min(r["gen_ppl"] for r in (real, shuffled, unigram, model)) > 1
    assert real["copied_4"] > shuffled["copied_4"] >= unigram["copied_4"]
    text = "".join(decode(meta, row[1:-1]) for row in rows)
    assert text.startswith(documents[0][:500])


@needs_data
def test_real_text_bert(tmp_path):
    """LM1B sentences through bert-base-uncased's word pieces: [CLS] ... [SEP] rows of 128."""
    lines = lzma.decompress((Path(TEST_DATA) / "lm1b_dev.txt.xz").read_bytes()).decode().splitlines()[:400]
    (tmp_path / "lm1b.txt").write_text("\n".join(lines))
    python("prepare_data.py", "lm1b", "--source", "lm1b.txt", "--bert", Path(TEST_DATA) / "bert-base-uncased", cwd=tmp_path)
    meta = read_meta(tmp_path / "data/lm1b")
    rows = np.fromfile(tmp_path / "data/lm1b/train.bin", "<u2").reshape(-1, 128)
    assert meta["vocab_size"] == 30522
    assert set(rows[:, 0]) == {101}
    assert set(rows[:, -1]) == {102}
    words = re.sub(r"\W", "", decode(meta, rows[0]).replace("[CLS]", "").replace("[SEP]", ""))
    assert re.sub(r"\W", "", " ".join(lines).lower()).startswith(words[:200])


# ------------------------------------------------------------------------------------------------
# Prompts, blocks, guidance, infilling, steering.


@pytest.fixture(scope="session")
def conditional(work):
    """Runs of the grammar that know contexts: runs/any, runs/scatter of stage 1 and runs/guided of stage 2, in the folder of `work`."""
    for kind in ("any", "scatter"):
        flags = ["--data", "data/grammar", "--out", f"runs/{kind}", "--context", kind, "--steps", 2]
        python("train_diagonal.py", *flags, *TINY, cwd=work)
    flags = ["--data", "data/grammar", "--checkpoint", "runs/any/checkpoint.pt", "--out", "runs/guided", "--guidance", 1.5, "--steps", 2]
    python("distill.py", "--loss", "psd", *flags, *TINY[2:], cwd=work)
    return work


def test_prompts(conditional, tmp_path):
    """Every sample begins with the prompt, or holds the given words; guidance, blocks and seeds change the rest."""
    meta = read_meta(conditional / "data/grammar")

    def written(run, *flags):
        out = python("sample.py", "--checkpoint", conditional / f"runs/{run}/checkpoint.pt", "--num-samples", 3, "--nfe", 2, *flags,
                     "--output", tmp_path / "x.npy", cwd=tmp_path).stdout  # fmt: skip
        assert "2 NFE" in out
        return np.load(tmp_path / "x.npy")

    start = prepare_data.encoder(meta)("some farmers near")
    (tmp_path / "prompt.txt").write_text("some farmers near\n", encoding="utf-8-sig")  # as some editors save it
    plain = written("any", "--prompt", "some farmers near")
    assert plain.shape == (3, meta["seq_len"])
    assert (plain[:, :3] == start).all()
    assert np.array_equal(plain, written("any", "--prompt-file", tmp_path / "prompt.txt", "--batch-size", 2))
    blocks = written("any", "--prompt", "some farmers near", "--block-size", 2, "--guidance", "2", "--length", 14)
    assert blocks.shape == (3, 14)
    assert (blocks[:, :3] == start).all()
    assert written("guided", "--prompt", "some farmers near").shape == (3, meta["seq_len"])
    infilled = written("scatter", "--infill", "some [MASK] near the [MASK] read")
    assert (infilled[:, [0, 2, 3, 5]] == prepare_data.encoder(meta)("some near the read")).all()
    lagging = written("any", "--prompt", "some farmers near", "--position-lag", "2")
    assert (lagging[:, :3] == start).all()


def test_reward(conditional, tmp_path):
    """A function of the current folder scores texts, or texts and probabilities, and what it asks for is written more often."""
    (tmp_path / "rewards.py").write_text(
        "def short(texts): return [-len(text.split()) for text in texts]\n"
        "def sure(texts, probabilities): return [float(psi.max(-1).values.mean()) for psi in probabilities]\n"
        "def wrong(texts): return [0.0]\n"
        "def fails(texts): return 1 / 0\n"
        "def hidden(texts): return [0.0]\n"
        "hidden.__signature__ = 1\n"
    )
    (tmp_path / "broken.py").write_text("def f(texts:\n")

    def lengths(*flags):
        flags = ["--checkpoint", conditional / "runs/grammar-diagonal/checkpoint.pt", "--num-samples", 4, "--nfe", 3, "--gamma", 0.5, *flags]
        out = python("sample.py", *flags, cwd=tmp_path).stdout.splitlines()[1:]
        return [len(line.split()) for line in out]

    assert sum(lengths("--reward", "rewards:short", "--particles", 6)) < sum(lengths())
    assert len(lengths("--reward", "rewards:sure", "--particles", 2)) == 4
    flags = ["--checkpoint", conditional / "runs/grammar-diagonal/checkpoint.pt", "--nfe", 3, "--gamma", 0.5]
    for name, said in (
        ("rewards:fails", "the reward failed: ZeroDivisionError"),
        ("broken:f", "the module failed, SyntaxError"),
        ("rewards:hidden", "cannot be told"),
    ):
        done = python("sample.py", *flags, "--reward", name, cwd=tmp_path, ok=False)
        assert one_line(done.returncode, done.stderr, said)
    done = python("sample.py", *flags, "--reward", "rewards:wrong", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "the reward gave (1,) values")


def test_samples_in_any_form(work, tmp_path):
    """The same samples as ids, text, .jsonl and a folder are the same rows, inner padding and all; a long row is cut, a short one padded."""
    meta = read_meta(work / "data/grammar")
    rows = prepare_data.read_rows(work / "data/grammar", "val", meta)[:6].astype(np.int64)
    rows[2, 3] = meta["pad_id"]
    for name in ("a.npy", "a.txt"):
        sample.write_samples(tmp_path / name, rows, meta)
    np.save(tmp_path / "wide.npy", np.concatenate([rows, rows], 1))
    np.save(tmp_path / "narrow.npy", rows[:, : max(1, (rows != meta["pad_id"]).nonzero()[1].max() + 1)])
    texts = [decode(meta, row) for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"folder/{i}").write_text(text + "\n")
    for name in ("a.npy", "a.txt", "a.jsonl", "folder", "wide.npy", "narrow.npy"):
        found, read = evaluate.read_samples(tmp_path / name, meta)
        assert np.array_equal(np.stack(found), rows), name
        assert read == texts, name
    assert "<pad>" in texts[2]


def test_encode_is_the_inverse_of_decode():
    """On the grammar and on characters; what the vocabulary lacks is refused."""
    words = dict(tokenizer="grammar", vocab=prepare_data.grammar_words(), join=" ", pad_id=0, bos_id=None)
    assert decode(words, prepare_data.encoder(words)("some farmers read")) == "some farmers read"
    chars = dict(tokenizer="char", vocab=["a", " ", "b"], join="", pad_id=None, bos_id=None)
    assert decode(chars, prepare_data.encoder(chars)("ab ba")) == "ab ba"
    for meta, text in ((words, "some dragons"), (chars, "abc")):
        with pytest.raises(prepare_data.UserError, match="not in the vocabulary"):
            prepare_data.encoder(meta)(text)


@needs_data
def test_encode_word_pieces(tmp_path, monkeypatch):
    """GPT-2's and bert's prompts: the text's own tokens, special ones as such."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", tiktoken_environment(tmp_path)["TIKTOKEN_CACHE_DIR"])
    gpt2 = dict(tokenizer="gpt2", bos_id=50256)
    assert prepare_data.encoder(gpt2)("<|endoftext|>hello world") == [50256, 31373, 995]
    vocab = (Path(TEST_DATA) / "bert-base-uncased/vocab.txt").read_text().splitlines()
    bert = dict(tokenizer="bert", vocab=vocab, join=" ", pad_id=0, bos_id=101)
    ids = prepare_data.encoder(bert)("[CLS] An unaffable cat")
    assert ids[0] == 101
    assert decode(bert, ids[1:]) == "an unaffable cat"


def test_no_tensor_of_size_v():
    """With 8,192 tokens and V = 100,000, a step's peak beyond weights, gradients and optimizer is below one float32 tensor (B, L, V).

    And it grows by less than a tenth of the whole from V = 10,000: as counted by the benchmark, on a small network.
    """
    args, names = SimpleNamespace(size="tiny", dtype="float32"), ["diagonal", *distill.TEACHERS]

    def peak(name, vocab):
        return benchmark.counted(args, vocab, 8, 1024, lambda bench: bench.call(name)(), name in ("lsd", "esd"))

    assert peak("V-sized", 100_000)[1] > 8192 * 100_000 * 4
    for name in names:
        (_, few), (state, many) = (peak(name, vocab) for vocab in (10_000, 100_000))
        assert many < 8192 * 100_000 * 4
        # six chunks of logits (ESD holds those of two networks, their tangent, the target): the tiny network hides them not
        assert many - few < 0.1 * (state + few) + 6 * 2**25 * 4


def test_benchmark_steps(tmp_path):
    """Every step and way of sampling is timed, and its memory counted."""
    sizes = ["--size", "tiny", "--vocab-size", 3000, "--seq-len", 32, "--rows", 8, "--repeats", 1, "--nfe", 1, "--device", "cpu"]
    python("benchmarks/benchmark.py", *sizes, "--parts", "steps", "sampling", "--output", "out.json", cwd=tmp_path)
    steps, sampling = json.loads((tmp_path / "out.json").read_text())["results"].values()
    assert {"diagonal", "V-sized", "next token", "psd", "lsd", "esd"} < steps.keys()
    assert all(r["seconds"] > 0 and r["counted_bytes"] > 0 for r in (*sampling.values(), *(steps[name] for name in distill.TEACHERS)))
    assert len(sampling) == 2


def test_study_goes_on(work, tmp_path, capsys, monkeypatch):
    """A study trains what is not there, goes on with what was stopped, evaluates both once, and tabulates them."""
    monkeypatch.chdir(tmp_path)
    short = {"data": str(work / "data/grammar"), "both": " ".join(TINY[2:]), "stage1": "--size tiny --steps 2", "stage2": "--steps 2",
             "evaluate": "--nfe 1 2 --num-samples 8 --bleu-samples 0", "scores": ["grammatical", "entropy"]}  # fmt: skip
    monkeypatch.setattr(study, "STUDIES", {"grammar": short})
    asked = []

    def program(command):
        asked.append(command[1:])
        return python(Path(command[1]).name, *command[2:], cwd=tmp_path)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=program))
    out = tmp_path / "runs/study/grammar/0/diagonal"
    python("train_diagonal.py", "--data", short["data"], "--out", out, "--seed", 0, *TINY, "--steps", 2, cwd=tmp_path)
    halfway = checkpoint(out / "checkpoint.pt")
    halfway["args"]["steps"] = 3
    torch.save(halfway, out / "checkpoint.pt")
    short["stage1"] = "--size tiny --steps 3"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["study.py", "grammar", "--seeds", "0", "--only", "psd"])
        study.main()
    assert [Path(command[0]).name for command in asked] == ["train_diagonal.py", "evaluate.py", "distill.py", "evaluate.py"]
    assert "--resume" in asked[0]
    assert checkpoint(out / "checkpoint.pt")["step"] == 3
    assert re.search(r"\| *psd \| *1 \| *grammatical \|", capsys.readouterr().out)
    found = study.gather(short, tmp_path / "runs/study/grammar")
    assert [(run["run"], run["bound"] is None) for run in found] == [("diagonal", False), ("psd", True)]
    worse = found[1] | {"run": "esd", "scores": {n: row | {"grammatical": row["grammatical"] - 0.25} for n, row in found[1]["scores"].items()}}
    (beside,) = [row for row in study.compare(short, [*found, worse]) if row["score"] == "grammatical - psd"]
    assert beside["1 NFE"] == beside["2 NFE"] == "-0.250 (-0.250 to -0.250)"
    monkeypatch.setattr(study, "SWEEP", "--nfe 1 --final-temperature 0 1")
    monkeypatch.setattr(sys, "argv", ["study.py", "grammar", "--seeds", "0", "--only", "psd", "--frontier"])
    study.main()
    assert len(asked) == 5
    psd = study.gather(short, tmp_path / "runs/study/grammar")[1]
    entropies, scores = psd["frontier"][1]
    assert (entropies[0], scores[0]) == (psd["scores"][1]["entropy"], psd["scores"][1]["grammatical"])  # where the sweep begins
    assert entropies[1] > entropies[0]
    # The other's entropy is the larger, half-way along the sweep; where a sweep does not reach it, nothing is said.
    at = {"entropy": entropies[0] + 1, "grammatical": 0.25}
    high = {"run": "esd", "seed": 0, "bound": None, "scores": {1: at}, "frontier": {1: ([at["entropy"], at["entropy"] + 1], [0.25, 0])}}
    low = psd | {"frontier": {1: ([entropies[0], entropies[0] + 2], [0.75, 0.25])}}
    assert study.at_equal_entropy(short, high, low) == {1: (0.25, 0.5)}
    assert study.at_equal_entropy(short, high, low | {"frontier": {1: ([entropies[0], entropies[0] + 0.5], [1, 0])}}) == {}
    rows = {row["score"]: row for row in study.compare(short, [low, high]) if row["run"] == "esd"}
    assert rows["grammatical - psd, equal entropy"]["1 NFE"] == "-0.250 (-0.250 to -0.250)"
    rows = {row["score"]: row for row in study.compare(short, [low, high | {"scores": {1: at, 2: at}}], "esd") if row["run"] == "psd"}
    assert rows["grammatical - esd, equal entropy"]["1 NFE"] == "0.250 (0.250 to 0.250)"
    monkeypatch.setattr(sys, "argv", ["study.py", "grammar", "--table", "--plot", str(tmp_path / "study.png")])
    study.main()
    assert len(asked) == 5
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_curves(work, tmp_path, capsys, monkeypatch):
    """The losses of a run to a picture, a half-written last line left out; a key or a run that is not there in one line."""
    folder = tmp_path / "run"
    folder.mkdir()
    log = (work / "runs/grammar-diagonal/log.jsonl").read_text()
    (folder / "log.jsonl").write_text(log + log.splitlines()[0][:20])
    monkeypatch.setattr(sys, "argv", ["curves.py", str(folder), "--output", str(tmp_path / "loss.png")])
    curves.main()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path / 'loss.png'}: diagonal_ce\n"
    for more, said in ((["--keys", "clamped"], "no run has logged 'clamped'"), ([str(tmp_path)], "log.jsonl: No such file")):
        monkeypatch.setattr(sys, "argv", ["curves.py", str(folder), *more])
        with pytest.raises(prepare_data.UserError, match=said):
            curves.main()


def test_collapse(work, tmp_path, capsys, monkeypatch):
    """The map that is the diagonal itself meets the truth where a jump is short, and is told from it where it is long."""
    stage1 = work / "runs/grammar-diagonal/checkpoint.pt"
    python("distill.py", "--loss", "esd", "--data", work / "data/grammar", "--checkpoint", stage1, "--out", tmp_path / "esd", "--steps", 1,
           "--lr", "1e-9", *TINY[2:], cwd=tmp_path)  # fmt: skip
    flags = ["--checkpoint", tmp_path / "esd/checkpoint.pt", "--diagonal", stage1, "--rows", 8, "--steps", 4, "--start", 0.3, "--end", 0.301, 1.0]
    monkeypatch.setattr(sys, "argv", ["collapse.py", *map(str, flags), "--output", str(tmp_path / "out.json")])
    collapse.main()
    short, long = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert abs(short["KL truth, map"]) < 1e-4
    assert long["KL truth, map"] > 10 * abs(short["KL truth, map"])
    assert 0 <= long["clamped"] <= 1
    assert "clamped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Evaluation.


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A small GPT-2 with random weights and its own byte-pair tokenizer, in from_pretrained format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([(HERE / "prepare_data.py").read_text()], vocab_size=400, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


TEXTS = [
    "def main(): return 1",
    "",
    "x",
    "import os<|endoftext|>import re<|endoftext|>",
    "<|endoftext|>class A:",
    "for i in range(9): " * 30,
    "end",
]


def protocol(texts, model, tokenizer, length):
    """The protocol in words, one text and one token at a time: (NLL, tokens counted)."""
    nll, count = 0.0, 0
    for text in texts:
        ids, seen = tokenizer(text)["input_ids"][:length], False
        for position, token in enumerate(ids):
            counts = token != tokenizer.eos_token_id or not seen
            seen |= token == tokenizer.eos_token_id
            if position and counts:
                logits = model(torch.tensor([ids[:position]])).logits[0, -1]
                nll -= float(logits.detach().double().log_softmax(-1)[token])
                count += 1
    return nll, count


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[3:4], ["", "x"]], ids=["awkward", "one", "eos", "nothing to score"])
def test_judge_scores(judge, texts):
    """Generative perplexity against the protocol computed one token at a time: EOS in the middle, empty, over-long, one, a last partial batch."""
    model, tokenizer = evaluate.load_judge(str(judge), "cpu")
    nll, count = protocol(texts, model, tokenizer, 24)
    for batch in (1, 3, 8):
        ours = evaluate.judge_scores(texts, model, tokenizer, max_length=24, batch_size=batch)
        assert ours.shape == (len(texts), 2)
        assert ours[:, 1].sum() == count
        if count:
            assert math.exp(ours[:, 0].sum() / count) == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_judge_deviations(judge):
    """A cache spares the judge and changes nothing; a BOS before scores the first token too; bfloat16 is near."""
    model, tokenizer = evaluate.load_judge(str(judge), "cpu")
    cache = {}
    plain = evaluate.judge_scores(TEXTS, model, tokenizer, 24, cache=cache)
    assert np.array_equal(evaluate.judge_scores(TEXTS[::-1], None, tokenizer, 24, cache=cache), plain[::-1])
    bos = evaluate.judge_scores(TEXTS, model, tokenizer, 25, bos=True, cache=cache)
    assert (bos[:, 1] - plain[:, 1]).tolist() == [1, 0, 1, 1, 1, 1, 1]
    nll, count = protocol(["<|endoftext|>" + text for text in TEXTS[:1]], model, tokenizer, 25)
    assert bos[0] == pytest.approx([nll, count], rel=1e-4)
    low, _ = evaluate.load_judge(str(judge), "cpu", "bfloat16")
    assert evaluate.judge_scores(TEXTS, low, tokenizer, 24)[:, 0] == pytest.approx(plain[:, 0], rel=0.02)
    assert evaluate.fingerprint(low) != evaluate.fingerprint(model) == evaluate.fingerprint(evaluate.load_judge(str(judge), "cpu")[0])


def test_entropies():
    """-sum p log p in nats of each row's own tokens, to 1e-6, for rows of any length."""
    rows = [np.array(row) for row in ([1, 1, 2, 2], [3, 3, 3, 3], [5, 6, 7, 5, 50256], [9], [])]
    expected = [-sum(row.tolist().count(v) / len(row) * math.log(row.tolist().count(v) / len(row)) for v in set(row.tolist())) for row in rows]
    assert np.abs(evaluate.entropies(rows) - expected).max() < 1e-6
    assert evaluate.entropies(rows)[0] == pytest.approx(math.log(2))


def test_diversity():
    """Shares of n-grams against sets of tuples; a BLEU known by hand."""
    rng = np.random.default_rng(0)
    rows = [*rng.integers(0, 4, (20, 9)), np.array([1, 2]), np.array([], np.int64)]
    train = rng.integers(0, 4, (6, 9))
    for n in (1, 3):
        grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
        every, seen = [g for row in grams for g in row], {tuple(row[i : i + n]) for row in train for i in range(9 - n + 1)}
        ours = evaluate.diversity(rows, n, np.unique(evaluate.ngrams(train, n)))
        assert ours[f"distinct_{n}"] == pytest.approx(len(set(every)) / len(every))
        assert ours[f"repeated_{n}"] == pytest.approx(np.mean([1 - len(set(g)) / len(g) for g in grams if g]))
        assert ours[f"copied_{n}"] == pytest.approx(np.mean([g in seen for g in every]))
    assert 0 < ours["copied_3"] < 1
    assert evaluate.diversity([np.array([1])], 2, train[0]) == {"distinct_2": None, "repeated_2": None, "copied_2": None}
    assert evaluate.self_bleu([np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 3, 4, 5, 7])], 9) == pytest.approx(
        (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    )
    assert evaluate.self_bleu(rows[:3] * 2, 9) == pytest.approx(1)
    assert evaluate.self_bleu(rows, 1) is None


def test_controls():
    """Rows of the validation set, the same words in another order inside their frame, and the frequencies of the training rows."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sea", "##son", "of", "light"]
    meta = dict(tokenizer="bert", vocab=vocab, join=" ", vocab_size=9, seq_len=12, bos_id=2, eos_id=3, pad_id=0)
    rng = np.random.default_rng(0)
    body = np.array([[[5, 6], [7, 8]][k] for k in rng.integers(2, size=500 * 5)]).reshape(500, 10)
    rows = np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (2, 3))).astype(np.uint16)
    real, shuffled, unigram = evaluate.control_rows(meta, rows, rows, 100, 0).values()
    assert len(np.unique(real, axis=0)) > 20
    assert {row.tobytes() for row in real} <= {row.tobytes() for row in rows.astype(np.int64)}
    for a, b in zip(real, shuffled, strict=True):
        assert (b[0], b[-1]) == (2, 3)
        assert sorted(decode(meta, a).split()) == sorted(decode(meta, b).split())
    assert sum(not np.array_equal(a, b) for a, b in zip(real, shuffled, strict=True)) > 80
    assert set(unigram[:, 0]) == {2}
    assert set(unigram[:, -1]) == {3}
    share = np.bincount(body.ravel(), minlength=9) / body.size
    assert np.abs(np.bincount(unigram[:, 1:-1].ravel(), minlength=9) / 1000 - share).max() < 5 * (0.25 / 1000) ** 0.5


def test_bootstrap():
    """The interval of a mean is that of the normal law, and covers; seeds that differ widen it; a ratio is of sums."""
    rng = np.random.default_rng(1)
    samples = rng.normal(size=400)
    value, (low, high) = evaluate.estimate(evaluate.means(evaluate.resamples(1, 400), samples))
    assert value == pytest.approx(samples.mean())
    assert high - low == pytest.approx(2 * 1.96 * samples.std() / 20, rel=0.15)
    shifted = samples + np.repeat([-1.0, 0, 1, 2], 100)
    _, (low, high) = evaluate.estimate(evaluate.means(evaluate.resamples(4, 100), shifted))
    assert high - low > 1.5
    assert evaluate.means(np.ones((1, 3)), np.array([1.0, 2, 3]), np.array([1.0, 1, 2]))[0] == 1.5
    assert evaluate.estimate(evaluate.means(evaluate.resamples(1, 2), np.zeros(2), np.zeros(2))) == (None, None)


def test_at_entropy():
    """Linear between the points that bracket the target; the worse of two; nothing outside."""
    entropy, score = np.array([[4.0, 4.0, 4.0], [5.0, 5.0, 4.2], [4.4, 4.4, 4.4]]), np.array([[3.0] * 3, [4.0] * 3, [2.0] * 3])
    found = evaluate.at_entropy(entropy, score, np.array([4.5, 6.0, 3.9]), np.fmax)
    assert found[0] == pytest.approx(3.5)
    assert np.isnan(found[1:]).all()
    assert evaluate.at_entropy(entropy, score, np.array([4.5] * 3), np.fmin)[0] == pytest.approx(2 + 2 / 6)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A folder with data/t, characters of a repetitive text, and a short stage-1 run of it."""
    folder = tmp_path_factory.mktemp("letters")
    text, chance = "to be or not to be that is the question whether tis nobler in the mind to suffer ", random.Random(0)
    (folder / "t.txt").write_text("".join(text[text.index(" ", chance.randrange(40)) :] for _ in range(400)))
    python("prepare_data.py", "file", "--source", "t.txt", "--tokenizer", "char", "--seq-len", 32, "--out", "data/t", cwd=folder)
    python("train_diagonal.py", "--data", "data/t", "--steps", 2, *TINY, cwd=folder)
    return folder


def evaluated(folder, monkeypatch, *flags):
    """What evaluate.py writes in `folder`, as JSON."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu", "--output", "e.json"])
    evaluate.main()
    return json.loads((folder / "e.json").read_text())


def test_evaluate_text(letters, judge, monkeypatch, capsys):
    """A model on characters: controls, intervals, a frontier and the bound in one run; all files there; the cache spares a second judging."""
    flags = ["--checkpoint", "runs/t-diagonal/checkpoint.pt", "--judge", judge, "--num-samples", 6, "--seeds", 2, "--show", 1]
    sweep = ["--nfe", 1, 2, "--temperature", 1, 0.5, "--gamma", 0, 1, "--sigma", 1, 2, "--bound", 3, "--plot", "e.png"]
    found = evaluated(letters, monkeypatch, *flags, *sweep)
    results = found["results"]
    assert [r["model"] for r in results[:3]] == ["validation rows", "their words shuffled", "unigram draws"]
    assert [(r["nfe"], r["swept"]) for r in results[3:]] == [(1, None), (1, "sigma"), (2, None), (2, "temperature"), (2, "gamma"), (2, "sigma")]
    assert [r["samples"] for r in results] == [6] * 3 + [12] * 6
    for r in results:
        assert r["gen_ppl_interval"][0] <= r["gen_ppl"] <= r["gen_ppl_interval"][1]
        assert r["entropy_interval"][0] <= r["entropy"] <= r["entropy_interval"][1]
        assert (r["seconds_per_1000"] or 0) * (r["tokens_per_second"] or 0) == pytest.approx(32_000 if r["nfe"] else 0)
    assert [(line["nfe"], line["knob"]) for line in found["frontier"]] == [(1, "sigma"), (2, "temperature"), (2, "gamma"), (2, "sigma")]
    assert [line["channel"] for line in found["bound"]] == ["embedded", "full"]
    text = (letters / "e.md").read_text()
    assert text in capsys.readouterr().out
    assert sum(line.startswith("|") for line in text.splitlines()) == (2 + 9) + (2 + 4) + (2 + 2)  # each table: title, rule, rows
    assert (letters / "e.png").read_bytes().startswith(b"\x89PNG")
    (cache,) = letters.glob("judged-*.json")
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)  # the judge is not asked again
    again = evaluated(letters, monkeypatch, *flags, "--nfe", 2)
    assert again["results"][3]["gen_ppl"] == results[5]["gen_ppl"]
    assert len(json.loads(cache.read_text())) >= 3 * 6


def test_evaluate_samples(letters, judge, monkeypatch):
    """A text file, a folder and a .npy with the same samples score alike, and as their model's; without --data, by the judge's tokens."""
    model, saved = load_model(letters / "runs/t-diagonal/checkpoint.pt")
    rows = sample.draw_samples(model, 2, 5, 5, 0, euler=True)
    (letters / "folder").mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        (letters / f"folder/{i}.txt").write_text(decode(saved["meta"], row))
    for name in ("s.txt", "s.npy"):
        sample.write_samples(letters / name, rows, saved["meta"])
    flags = [
        "--samples",
        "s.txt",
        "folder",
        "s.npy",
        "--judge",
        judge,
        "--num-samples",
        5,
        "--nfe",
        2,
        "--checkpoint",
        "runs/t-diagonal/checkpoint.pt",
    ]
    results = evaluated(letters, monkeypatch, *flags)["results"][3:]
    assert [r["model"] for r in results] == ["s.txt", "folder", "s.npy", "t-diagonal"]
    for key in ("gen_ppl", "entropy", "distinct_4", "copied_4", "self_bleu"):
        assert len({r[key] for r in results}) == 1, key
    found = evaluated(letters, monkeypatch, "--samples", "s.txt", "folder", "--judge", judge, "--judge-length", 32)["results"]
    assert [r["gen_ppl"] for r in found] == [results[0]["gen_ppl"]] * 2
    assert found[0]["copied_4"] is None
    assert "No control rows" in (letters / "e.md").read_text()


def test_evaluate_samples_of_the_grammar(work, monkeypatch):
    """Sentences in a file are scored exactly: the good one is, the others are not."""
    (work / "lines.txt").write_text("this king reads the book .\nthis kings reads the book .\nthe the the\n")
    found = evaluated(work, monkeypatch, "--samples", "lines.txt", "--data", "data/grammar", "--num-samples", 8)["results"]
    assert found[0]["grammatical"] == 1
    assert found[3]["grammatical"] == pytest.approx(1 / 3)


def test_a_trained_judge_ranks_text(letters, monkeypatch):
    """A judge of 60 steps reads as from_pretrained does, and real text is likelier to it than shuffled, and that than random."""
    flags = [
        "--data",
        "data/t",
        "--out",
        "trained",
        "--steps",
        60,
        "--vocab-size",
        300,
        "--layers",
        1,
        "--width",
        64,
        "--context",
        32,
        "--device",
        "cpu",
    ]
    python("benchmarks/train_judge.py", *flags, cwd=letters)
    real, shuffled, unigram = evaluated(letters, monkeypatch, "--samples", "t.txt", "--data", "data/t", "--judge", "trained")["results"][:3]
    assert real["gen_ppl_interval"][1] < shuffled["gen_ppl_interval"][0]
    assert shuffled["gen_ppl_interval"][1] < unigram["gen_ppl_interval"][0]


# ------------------------------------------------------------------------------------------------
# Bad input: exit code 2, one line on stderr, no traceback, nothing written.


def one_line(code, err, word):
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert word in err
    return True


BAD = [
    (prepare_data, ["nonsense"], "nonsense"),
    (prepare_data, ["grammar", "--seq-len", "8"], "--seq-len"),
    (prepare_data, ["file"], "--source"),
    (prepare_data, ["file", "--source", "absent.txt"], "absent.txt"),
    (prepare_data, ["file", "--source", "empty.txt", "--tokenizer", "char"], "empty"),
    (prepare_data, ["file", "--source", "short.txt", "--tokenizer", "char"], "short"),
    (prepare_data, ["file", "--source", "picture.png"], "picture.png"),
    (prepare_data, ["file", "--source", "short.jsonl", "--tokenizer", "char", "--column", "body"], "body"),
    (prepare_data, ["lm1b", "--source", "short.txt", "--bert", "nowhere"], "nowhere"),
    (prepare_data, ["text8", "--source", "upper.txt"], "text8"),
    (prepare_data, ["owt", "--source", "short.txt"], "too few"),
    (prepare_data, ["grammar", "--out", "short.txt"], "short.txt"),
    (prepare_data, ["grammar", "--out", "short.txt/x"], "short.txt"),
    (train_diagonal, [], "python prepare_data.py owt"),
    (train_diagonal, ["--data", "grammar", "--steps", "0"], "--steps"),
    (train_diagonal, ["--data", "grammar", "--lr", "nan"], "--lr"),
    (train_diagonal, ["--data", "grammar", "--batch-size", "10", "--micro-batch", "4"], "--batch-size"),
    (train_diagonal, ["--data", "grammar", "--device", "cuda"], "cuda"),
    (train_diagonal, ["--data", "grammar", "--resume", "--device", "cpu", "--out", "absent"], "absent"),
    (train_diagonal, ["--data", "grammar", "--device", "cpu", "--out", "trained"], "--resume"),
    (train_diagonal, ["--data", "cut", "--device", "cpu"], "train.bin"),
    (train_diagonal, ["--data", "broken"], "meta.json"),
    (train_diagonal, ["--data", "grammar", "--config", "short.txt"], "--config"),
    (distill, ["--data", "grammar"], "--loss"),
    (distill, ["--data", "grammar", "--loss", "lsdd"], "lsdd"),
    (distill, ["--data", "grammar", "--loss", "psd"], "no checkpoint"),
    (distill, ["--data", "grammar", "--loss", "psd", "--checkpoint", "short.txt"], "short.txt"),
    (distill, ["--data", "grammar", "--loss", "psd", "--checkpoint", "trained/checkpoint.pt", "--micro-batch", "1"], "--diagonal-share"),
    (distill, ["--data", "other", "--loss", "psd", "--checkpoint", "trained/checkpoint.pt"], "seq_len"),
    (distill, ["--data", "grammar", "--loss", "psd", "--teacher", "ema"], "--teacher"),
    (distill, ["--data", "grammar", "--loss", "psd", "--target", "signed"], "--target"),
    (distill, ["--data", "grammar", "--loss", "esd", "--target", "signed", "--clamp", "0.1"], "--clamp"),
    (distill, ["--data", "grammar", "--loss", "esd", "--divergence", "reverse-kl"], "--divergence"),
    (distill, ["--data", "grammar", "--loss", "esd", "--divergence", "square", "--target", "signed"], "--divergence"),
    (distill, ["--data", "grammar", "--loss", "psd", "--psd-share", "0.25"], "--psd-share"),
    (distill, ["--data", "grammar", "--loss", "esd", "--psd-share", "0.3", "--micro-batch", "8"], "--psd-share"),
    (distill, ["--data", "grammar", "--loss", "esd", "--joint", "--diagonal-from", "stage1"], "--diagonal-from"),
    (distill, ["--data", "grammar", "--loss", "psd", "--guidance", "1.5", "--diagonal-from", "data"], "--guidance"),
    (distill, ["--data", "grammar", "--loss", "esd", "--joint", "--checkpoint", "trained/checkpoint.pt"], "--joint"),
    (distill, ["--data", "grammar", "--loss", "esd", "--joint", "--teacher", "frozen"], "--teacher"),
    (distill, ["--data", "grammar", "--loss", "esd", "--position-lag", "1"], "--position-lag"),
    (sample, [], "runs/owt-esd"),
    (sample, ["--nfe", "0"], "--nfe"),
    (sample, ["--checkpoint", "trained"], "trained"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--output", "nowhere/x.txt"], "nowhere"),
    (evaluate, ["--checkpoint", "absent.pt"], "absent.pt"),
    (evaluate, ["--checkpoint", "evil.pt"], "evil.pt"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--output", "grammar"], "grammar"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--prompt", "some"], "without contexts"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--infill", "some [MASK]"], "--context scatter"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--guidance", "2"], "--prompt"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--particles", "4"], "--reward"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--mask", "_"], "--infill"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--watch", "--guidance", "2", "--prompt", "the"], "leave out one"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--final-temperature", "1", "--guidance", "2", "--prompt", "the"], "leave out one"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--reward", "os:nothing", "--gamma", "1"], "os:nothing"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--reward", "os:listdir"], "--gamma"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--prompt", "some dragons"], "dragons"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--infill", "some [MASK]"], "--context scatter"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--prompt", "some " * 10], "10 tokens"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--prompt", "some", "--length", "30"], "--block-size"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--prompt-file", "absent.txt"], "absent.txt"),
    (sample, ["--checkpoint", "any/checkpoint.pt", "--prompt", "some", "--infill", "some"], "give one of"),
    (train_diagonal, ["--data", "grammar", "--context", "block"], "--block-size"),
    (train_diagonal, ["--data", "grammar", "--context", "block", "--block-size", "3"], "divides"),
    (train_diagonal, ["--data", "grammar", "--block-size", "5"], "--context"),
    (train_diagonal, ["--data", "grammar", "--context-dropout", "0.5"], "--context"),
    (train_diagonal, ["--data", "grammar", "--context", "block", "--block-size", "10"], "whole row"),
    (sample, ["--checkpoint", "guided/checkpoint.pt", "--prompt", "some", "--guidance", "2"], "already"),
    (train_diagonal, ["--data", "grammar", "--context", "scatter", "--block-size", "5"], "scatter"),
    (train_diagonal, ["--data", "grammar", "--context", "any", "--schedule", "calibrated"], "whole rows"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--nfe", "1", "2", "--output", "trained/taken.npy"], "taken-2.npy: it is a folder"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--output", "pipe"], "no regular file"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--gamma", "0.5", "--reward", "json:decoder"], "no function"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--gamma", "0.5", "--reward", "json:dumps"], "a number each"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--gamma", "0.5", "--reward", ""], "module:function"),
    (evaluate, ["--samples", "archive.npy", "--data", "grammar"], "an archive"),
    (evaluate, ["--samples", "zip.npy", "--data", "grammar"], "BadZipFile"),
    (evaluate, ["--samples", "short.txt", "absent.txt", "--judge", "no-such-judge"], "absent.txt"),
    (evaluate, ["--samples", "lines.jsonl"], "KeyError"),
    (evaluate, ["--samples", "folder", "--data", "grammar", "--output", "folder/evaluation.json"], "in the folder of samples"),
    (distill, ["--data", "grammar", "--loss", "psd", "--context", "any"], "--context is fixed"),
    (distill, ["--data", "grammar", "--loss", "esd", "--guidance", "2"], "teaches itself"),
    (distill, ["--data", "grammar", "--loss", "psd", "--guidance", "2", "--checkpoint", "trained/checkpoint.pt"], "without contexts"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--output", "table.md"], "table.json"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--data", "absent"], "prepare_data.py file --source"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--data", "other"], "seq_len"),
    (evaluate, ["--samples", "absent.txt", "--data", "grammar"], "absent.txt"),
    (evaluate, ["--samples", "empty.txt", "--data", "grammar"], "no sample"),
    (evaluate, ["--samples", "short.txt", "--data", "grammar"], "'b'"),
    (evaluate, ["--samples", "picture.png", "--data", "grammar"], "picture.png"),
    (evaluate, ["--samples", "floats.npy", "--data", "grammar"], "float64"),
    (evaluate, ["--samples", "short.txt", "--bound", "4"], "--bound"),
    (evaluate, ["--samples", "short.txt", "--judge", "nowhere/judge"], "nowhere/judge"),
    (prepare_data, ["grammar", "--out", "trained", "--force"], "trained"),
    (prepare_data, ["file", "--source", "numbers.jsonl", "--tokenizer", "char"], "not text"),
    (train_diagonal, ["--data", "large", "--device", "cpu", "--size", "tiny", "--batch-size", "512"], "vocabulary"),
    (
        train_diagonal,
        ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "trained", "--batch-size", "16", "--resume", "--steps", "1"],
        "--steps",
    ),
    (
        train_diagonal,
        ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "trained", "--batch-size", "16", "--resume", "--seed", "1"],
        "seed",
    ),
    (
        train_diagonal,
        ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "trained", "--batch-size", "16", "--resume", "--diagonal-power", "0"],
        "diagonal_power",
    ),
    (train_diagonal, ["--data", "grammar", "--device", "cpu", "--size", "small", "--out", "trained", "--batch-size", "16", "--resume"], "layers"),
    (train_diagonal, ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "short.txt"], "short.txt"),
    (train_diagonal, ["--data", "grammar", "--lr", "inf"], "--lr"),
    (train_diagonal, ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "/dev/null/run"], "/dev/null"),
    (train_diagonal, ["--data", "edited", "--device", "cpu", "--size", "tiny"], "sha256"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--output", "/dev/null/x"], "/dev/null"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--output", "trained/checkpoint.pt"], "another flag"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--output", "trained/checkpoint.pt"], "another flag"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--output", "x", "--plot", "./x"], "another flag"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--data", "words", "--device", "cpu"], "vocab"),
    (evaluate, ["--checkpoint", "trained/checkpoint.pt", "--data", "grammar", "--num-samples", "9" * 12, "--device", "cpu"], "out of memory"),
    (distill, ["--data", "words", "--loss", "esd", "--checkpoint", "trained/checkpoint.pt"], "vocab"),
    (distill, ["--data", "grammar", "--loss", "esd", "--checkpoint", "evil.pt"], "evil.pt"),
    (distill, ["--data", "grammar", "--loss", "esd", "--checkpoint", "trained/checkpoint.pt", "--out", "trained", "--resume", "--device", "cpu",
               "--batch-size", "16"], "loss None"),
    (distill, ["--data", "grammar", "--loss", "esd", "--joint", "--size", "tiny", "--out", "trained", "--resume", "--device", "cpu", "--batch-size",
               "16"], "loss None"),
    (train_diagonal, ["--data", "grammar", "--device", "cpu", "--size", "tiny", "--out", "evil", "--resume"], "evil"),
    (train_diagonal, ["--data", "deep"], "meta.json"),
    (train_diagonal, ["--data", "none"], "train_rows"),
    (train_diagonal, ["--data", "a\0b"], "no data set"),
    (train_diagonal, ["--data", "x" * 5000], "too long"),
    (train_diagonal, ["--data", "grammar", "--config", "deep/meta.json"], "--config"),
    (train_diagonal, ["--config", "trained/config.json", "--resume", "--out", "trained", "--timeout", "0"], "--timeout"),
    (distill, ["--config", "trained/config.json", "--data", "grammar"], "--loss"),
    (prepare_data, ["grammar", "--out", "foreign"], "foreign.partial"),
    (prepare_data, ["file", "--source", "short.txt", "--tokenizer", "char", "--out", "grammar"], "name grammar, not file"),
    (train_diagonal, ["--data", "mine"], "file --source"),
    (sample, ["--checkpoint", "trained/checkpoint.pt", "--sampler", "flow-map"], "of stage 1"),
    (evaluate, [], "no checkpoint"),
]  # fmt: skip


@pytest.fixture(scope="session")
def bad(work, conditional, tmp_path_factory):
    """A folder with good and damaged files for the cases above."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(work / "data/grammar", folder / "grammar")
    shutil.copytree(work / "runs/grammar-diagonal", folder / "trained")
    for run in ("any", "guided"):
        shutil.copytree(work / f"runs/{run}", folder / run)
    shutil.copytree(folder / "grammar", folder / "cut")
    with open(folder / "cut/train.bin", "r+b") as file:
        file.truncate(1001)
    shutil.copytree(folder / "grammar", folder / "broken")
    (folder / "broken/meta.json").write_text("{")
    shutil.copytree(folder / "grammar", folder / "other")
    meta = json.loads((folder / "other/meta.json").read_text())
    (folder / "other/meta.json").write_text(json.dumps(meta | {"seq_len": 7}))
    shutil.copytree(folder / "grammar", folder / "large")
    (folder / "large/meta.json").write_text(json.dumps(meta | {"vocab_size": 9, "vocab": meta["vocab"][:9]}))
    shutil.copytree(folder / "grammar", folder / "edited")
    with open(folder / "edited/val.bin", "r+b") as file:
        file.write(b"\x01")
    shutil.copytree(folder / "grammar", folder / "words")
    meta = json.loads((folder / "words/meta.json").read_text())
    (folder / "words/meta.json").write_text(json.dumps(meta | {"vocab": meta["vocab"][::-1]}))
    shutil.copytree(folder / "grammar", folder / "none")
    (folder / "none/meta.json").write_text(json.dumps(meta | {"train_rows": 0}))
    (folder / "none/train.bin").write_bytes(b"")
    (folder / "deep").mkdir()
    (folder / "deep/meta.json").write_text("[" * 100_000)
    (folder / "foreign.partial").mkdir()
    (folder / "foreign.partial/mine.txt").write_text("precious")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    np.save(folder / "floats.npy", np.ones((2, 3)))
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a b")
    (folder / "upper.txt").write_text("The QUICK brown fox" * 99)
    (folder / "short.jsonl").write_text('{"text": "a b"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "trained/taken-2.npy").mkdir()
    os.mkfifo(folder / "pipe")
    with open(folder / "archive.npy", "wb") as file:
        np.savez(file, np.ones((2, 3)))
    (folder / "zip.npy").write_bytes(b"PK\x03\x04")
    (folder / "lines.jsonl").write_text('{"words": "a b"}\n')
    (folder / "folder").mkdir()
    (folder / "folder/1.txt").write_text("some farmers read")

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "pwned"),))

    torch.save(checkpoint(folder / "trained/checkpoint.pt") | {"means": Evil()}, folder / "evil.pt")
    (folder / "evil").mkdir()
    shutil.copy(folder / "evil.pt", folder / "evil/checkpoint.pt")
    return folder


def contents(folder):
    """Every path under `folder`, with the time at which a file was last written."""
    return {p: p.stat().st_mtime_ns if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(("module", "flags", "word"), BAD, ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else getattr(v, "__name__", ""))
def test_bad_input(bad, module, flags, word):
    refused(bad, module, flags, word)


def refused(folder, module, flags, word, **how):
    """Run a program in `folder`, and see it refuse in one line that holds `word`, with nothing written."""
    before = contents(folder)
    done = python(f"{module.__name__}.py", *flags, cwd=folder, ok=False, **how)
    err = re.sub(r"(?m)^.*(Generating|examples/s|it/s|row/s|\?row).*$", "", done.stderr.replace("\r", "\n"))
    assert one_line(done.returncode, err, word)
    assert contents(folder) == before


FUZZED = {
    prepare_data: ["file", "--source", "absent.txt"],
    train_diagonal: ["--data", "absent", "--device", "cpu"],
    distill: ["--loss", "esd", "--data", "absent", "--device", "cpu"],
    sample: ["--checkpoint", "absent.pt", "--device", "cpu"],
    evaluate: ["--checkpoint", "absent.pt", "--device", "cpu"],
}
WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e999", "9" * 30, "True", "short.txt", ".", "/", "absent/x", "~", "\u00e9", "--"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)


@pytest.mark.parametrize("module", FUZZED, ids=lambda m: m.__name__)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_any_flags(bad, module, choice):
    """Whatever the flags: where the input is absent, exit code 2, one line, no traceback, and nothing written."""
    known = known_flags(module)
    extra = [choice.draw(st.one_of(st.sampled_from(known), WORDS), label="word") for _ in range(choice.draw(st.integers(1, 4)))]
    assume("--help" not in extra and "-h" not in extra)
    refused(bad, module, [*extra, *FUZZED[module]], "")  # what is given last wins: the input stays absent


@functools.cache
def known_flags(module):
    """The flags that --help of a program lists."""
    lines = re.findall(r"^  (--.*)", python(f"{module.__name__}.py", "--help", cwd=HERE).stdout, re.MULTILINE)
    return sorted({flag for line in lines for flag in re.findall(r"--[a-z][a-z0-9-]+", line.partition("  ")[0])})


@pytest.mark.parametrize("module", FUZZED, ids=lambda m: m.__name__)
def test_every_flag(bad, module):
    """Each flag of each program with what is no value of it: refused, and a flag that takes a number is named."""
    for flag in known_flags(module):
        first = python(f"{module.__name__}.py", f"{flag}=x", *FUZZED[module], cwd=bad, ok=False)
        takes_number = re.search("is not (an integer|a number)", first.stderr)
        for value in ("", "-1", "nan", "-inf", "1e999", "9" * 400, "9" * 5000, "0x10", "True"):
            refused(bad, module, [f"{flag}={value}", *FUZZED[module]], flag if takes_number else "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_any_meta(bad, tmp_path, choice):
    """A meta.json with a key changed or lost is read as it is meant, or refused."""
    meta = json.loads((bad / "grammar/meta.json").read_text())
    key = choice.draw(st.sampled_from(sorted(meta)))
    value = choice.draw(JSON | st.just("absent"))
    meta = {k: v for k, v in meta.items() if k != key} | ({} if value == "absent" else {key: value})
    for name in ("train", "val"):
        if not (tmp_path / f"{name}.bin").exists():
            (tmp_path / f"{name}.bin").symlink_to(bad / f"grammar/{name}.bin")
    (tmp_path / "meta.json").write_text(json.dumps(choice.draw(st.sampled_from([meta, meta, meta, value]))))
    with contextlib.suppress(prepare_data.UserError):
        meta = read_meta(tmp_path)
        for name in ("train", "val"):
            prepare_data.verify_rows(tmp_path, name, meta)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=JSON
    | st.fixed_dictionaries({"flags": st.dictionaries(st.sampled_from(["lr", "steps", "size", "help", "config", "compile"]) | st.text(), JSON)})
)
def test_any_config(tmp_path, config):
    """A config.json gives flags, or is refused."""
    parser = prepare_data.Parser(prog="x")
    train_diagonal.training_flags(parser, steps=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(prepare_data.UserError):
        assert all(isinstance(flag, str) for flag in train_diagonal.replay(parser, tmp_path / "config.json"))


@needs_proc
def test_prepare_data_killed(tmp_path):
    """Killed at random moments and run again: the same bytes as in peace. Two at once: the second is refused."""
    (tmp_path / "t.txt").write_text("".join(f"{n} is a number and {n * n} its square. " for n in range(100_000)))
    flags = ["prepare_data.py", "file", "--source", "t.txt", "--tokenizer", "char", "--seq-len", 64]
    python(*flags, "--out", "whole", cwd=tmp_path)
    chance = random.Random(0)
    for _ in range(4):
        process = start(*flags, "--out", "parts", cwd=tmp_path)
        for _ in range(1000):
            if (tmp_path / "parts.partial").exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(chance.random())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (tmp_path / "parts.old").mkdir(exist_ok=True)  # what a run killed at its very end leaves
    (tmp_path / "parts.old/meta.json").write_text("{}")
    process = start(*flags, "--out", "parts", "--force", cwd=tmp_path)
    while f" {process.pid} " not in Path("/proc/locks").read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    second = python(*flags, "--out", "parts", "--force", cwd=tmp_path, ok=False)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 0
    assert one_line(second.returncode, second.stderr, "another prepare_data.py is writing")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("parts.")]


@needs_data
@needs_proc
def test_workers_end_with_their_parent(tmp_path, monkeypatch):
    """prepare_data.py killed while its workers tokenise leaves no process behind."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100_000)
    for name, value in tiktoken_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    process = start("prepare_data.py", "file", "--source", "t.txt", "--documents", "line", "--workers", 2, "--out", "out", cwd=tmp_path)
    proc = Path("/proc")
    while not re.search("tokenising.* [1-9][0-9]*/", (tmp_path / "output").read_text()) and process.poll() is None:
        time.sleep(0.01)
    children = (proc / f"{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 2, (tmp_path / "output").read_text()
    for _ in range(200):
        states = [(proc / child / "stat").read_text().split()[2] for child in children if (proc / child).exists()]
        if set(states) <= {"Z"}:  # ended, and not yet reaped
            return
        time.sleep(0.05)
    raise AssertionError(states)


@pytest.mark.parametrize("group", [("two", "2", "0"), ("2", "2", "0"), ("0", None, "0"), (None, "0", None), ("0", "1", "9" * 30)])
def test_bad_environment(bad, group):
    """Variables of torchrun's that make no group are bad input too."""
    env = {name: value for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), group, strict=True) if value is not None}
    refused(bad, train_diagonal, ["--data", "grammar", "--device", "cpu"], "is no rank of a group", env=env)


def test_a_bad_checkpoint_runs_no_code(bad):
    """No file is read in a way that could run code: the malicious one above did not, and the sources ask for nothing else."""
    for module, flags, word in BAD:
        if any("evil" in flag for flag in flags):
            refused(bad, module, flags, word)
    assert not (bad / "pwned").exists()
    for path in HERE.rglob("*.py"):
        if path.name.startswith("test_") or {".venv", "build"} & set(path.parts):
            continue
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, (path, line)
            runs = re.search(r"(?<!\.)\b(eval|exec)\(|pickle\.|allow_pickle|trust_remote_code|_only=False|os\.system|shell=True", line)
            assert not runs, (path, line)


def test_folders_that_cannot_be_written(bad, monkeypatch):
    """A read-only folder: refused in one line, by sample.py and evaluate.py before the work."""
    folder = Path(tempfile.mkdtemp())  # where another user may look
    try:
        for name in ("grammar", "trained"):
            shutil.copytree(bad / name, folder / name)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o555)
        if os.geteuid() == 0:  # who may write everywhere
            monkeypatch.setattr(os, "access", lambda path, mode, access=os.access: access(path, mode, effective_ids=True))
            os.seteuid(65534)
        flags = ["--checkpoint", "trained/checkpoint.pt", "--device", "cpu"]
        refused(folder, sample, [*flags, "--output", "x.txt"], "x.txt")
        refused(folder, evaluate, flags, "evaluation.json")
        refused(folder, evaluate, [*flags, "--output", f"{tempfile.gettempdir()}/no-such-result.json", "--plot", "x.png"], "x.png")
        refused(folder, prepare_data, ["grammar", "--out", "new"], "new")
        refused(folder, prepare_data, ["grammar", "--out", "grammar", "--force"], "grammar")
        training = ["--data", "grammar", *TINY, "--steps"]
        refused(folder, train_diagonal, [*training, "1", "--out", "new"], "new")
        refused(folder, train_diagonal, [*training, "9", "--out", "trained", "--resume"], "trained")
    finally:
        os.seteuid(os.getuid())
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_no_network(work, tmp_path, judge):
    """The whole road with local files opens no connection and asks for no name."""
    text = tmp_path / "t.txt"
    text.write_text("to be or not to be that is the question " * 200)
    new, tiny = ["--checkpoint", "runs/t-diagonal/checkpoint.pt", "--num-samples", "5"], [*TINY, "--data", "data/t", "--steps", "1"]
    road = [
        ["prepare_data", "grammar"],
        ["prepare_data", "file", "--source", str(text), "--tokenizer", "char", "--seq-len", "16", "--out", "data/t"],
        ["train_diagonal", *tiny],
        ["distill", "--loss", "psd", *tiny[2:]],
        ["sample", *new],
        ["evaluate", *new, "--judge", str(judge), "--plot", "p.png"],
    ]
    if TEST_DATA:
        bert = ["--source", str(text), "--bert", f"{TEST_DATA}/bert-base-uncased", "--workers", "2"]
        road += [["prepare_data", "lm1b", *bert, "--documents", "document"]]
        road += [["prepare_data", "file", "--source", str(text), "--out", "data/g", "--workers", "1"]]
    (tmp_path / "alone.py").write_text(f"""
import socket, sys
sys.path.insert(0, {str(HERE)!r})
asked = []
def audit(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or event in ("socket.connect", "socket.sendto") and args[0].family != socket.AF_UNIX:
        asked.append((event, args))
        raise OSError("no network here")
sys.addaudithook(audit)
import importlib
for name, *flags in {road!r}:
    sys.argv = [name + ".py", *flags]
    importlib.import_module(name).main()
assert not asked, asked
""")
    env = tiktoken_environment(tmp_path) if TEST_DATA else {}
    python(tmp_path / "alone.py", cwd=tmp_path, env={"HF_HUB_OFFLINE": "0", **env})


def test_help_names_every_flag():
    """--help of each program exits 0 and lists its flags."""
    for module in PROGRAMS.values():
        assert len(known_flags(module)) > 5


def test_readme_names_exist():
    """Every `name` in the README's equation table is in the code."""
    import model
    import test_identities

    modules = {m.__name__: m for m in (model, train_diagonal, distill, sample, evaluate, prepare_data, test_identities)}
    section = (HERE / "README.md").read_text().partition("## From the paper to the code")[2].partition("\n## ")[0]
    names = [name for line in section.splitlines() if line.startswith("|") for name in re.findall(r"`([\w.]+)`", line)]
    assert len(names) > 15
    for name in names:
        head, *rest = name.split(".")
        found = modules.get(head) or getattr(model, head)
        for part in rest:
            found = getattr(found, part)
