"""The programs, run as a user runs them: the whole road, resume, ranks, bad input.

Tests that read real text or a real tokenizer take them from the folder in DFM_TEST_DATA (wiki.txt.xz,
lm1b_dev.txt.xz, tiktoken_cache/, bert-base-uncased/vocab.txt), and are skipped where it is not set.
"""

import json
import lzma
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported: these tests ask nothing of a network

import distill
import evaluate
import prepare_data
import sample
import train_diagonal
from model import load_model
from prepare_data import decode, read_meta

HERE = Path(__file__).parent
TEST_DATA = os.environ.get("DFM_TEST_DATA")
needs_data = pytest.mark.skipif(not TEST_DATA, reason="DFM_TEST_DATA names no folder of test texts and tokenizers")
TINY = ["--size", "tiny", "--device", "cpu", "--batch-size", "16", "--warmup", "2", "--log-every", "1", "--val-batches", "1"]


def python(*args, ranks=1, cwd, env=None, ok=True):
    """Run one of the programs in `cwd`; returns the finished process."""
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    if ranks > 1:
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    script, *rest = map(str, args)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    done = subprocess.run([*launch, str(HERE / script), *rest], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
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
    python("distill.py", "--data", "data/grammar", f"--loss={loss}", "--steps", 2, *TINY[2:], cwd=work)
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
    out = python("sample.py", "--checkpoint", path, "--nfe", 1, 3, "--num-samples", 2, "--output", "out.npy", cwd=work).stdout
    assert out.count("NFE") == 2
    assert np.load(work / "out-1.npy").shape == (2, meta["seq_len"])
    out = python("evaluate.py", "--checkpoint", "runs/grammar-diagonal/checkpoint.pt", path, "--nfe", 1, 2, "--num-samples", 16, cwd=work).stdout
    assert out.count("grammar-") >= 4
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert [r["sampler"] for r in results] == [""] + ["euler"] * 2 + ["flow-map"] * 2
    assert results[0]["grammatical"] == 1
    assert all(0 <= r["grammatical"] <= 1 and r["source_entropy"] == prepare_data.grammar_entropy() for r in results)


def test_samples_depend_on_seed_and_index_alone(work):
    """The same samples in batches of any size; another seed gives others."""
    model, _ = load_model(work / "runs/grammar-diagonal/checkpoint.pt")
    rows = sample.draw_samples(model, 2, 7, 7, 0, euler=True)
    assert np.array_equal(rows, sample.draw_samples(model, 2, 7, 3, 0, euler=True))
    assert np.array_equal(rows[:4], sample.draw_samples(model, 2, 4, 4, 0, euler=True))


def test_written_samples(tmp_path):
    """One sample a line, whatever the sample holds."""
    meta = dict(tokenizer="char", vocab=["a", "\n", "\\"], join="", pad_id=None)
    sample.write_samples(tmp_path / "s.txt", np.array([[0, 1, 2], [2, 0, 0]]), meta)
    assert (tmp_path / "s.txt").read_text().splitlines() == ["a\\n\\\\", "\\\\aa"]


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
    "joint": ["--loss", "esd", "--joint", "--size", "tiny", "--position-lag", "1", "--step-law", "pair"],
}


def stage_command(stage, work):
    """The program and flags of a short run of stage 1 ("diagonal"), or of one of STAGES, on the grammar."""
    if stage == "diagonal":
        return ["train_diagonal.py", "--data", work / "data/grammar", *TINY]
    start = [] if stage == "joint" else ["--checkpoint", work / "runs/grammar-diagonal/checkpoint.pt"]
    return ["distill.py", *STAGES[stage], *start, "--data", work / "data/grammar", *TINY[2:]]


@pytest.mark.parametrize("stage", ["diagonal", "psd", "esd", "joint"])
def test_ranks_and_accumulation_change_nothing(work, tmp_path, stage):
    """One step by one rank, by one rank in four micro-batches, and by two ranks: the same gradient (Adam's first moment)."""
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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of a process's threads are read from /proc")
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
    python(tmp_path / "rank.py", cwd=tmp_path, env=dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())))


@pytest.mark.parametrize("stage", ["diagonal", *STAGES])
def test_resume_is_not_stopping(work, tmp_path, stage):
    """Three steps, then --resume to six, equal six at once: weights, average, optimizer and log, bit for bit."""
    program = [*stage_command(stage, work), "--micro-batch", 8]
    python(*program, "--out", tmp_path / "whole", "--steps", 6, "--val-every", 3, cwd=tmp_path)
    python(*program, "--out", tmp_path / "parts", "--steps", 3, "--val-every", 3, cwd=tmp_path)
    # lines that a killed run wrote after its last checkpoint are written again, not twice
    with open(tmp_path / "parts/log.jsonl", "a") as file:
        file.write('{"step": 4}\n{"st')
    python(*program, "--out", tmp_path / "parts", "--steps", 6, "--val-every", 3, "--resume", cwd=tmp_path)
    whole, parts = (checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "step", "model_config", "meta"):
        assert same(whole[key], parts[key]), key
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "parts")
    assert not list(tmp_path.rglob("*.tmp"))


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
    flags = ["--data", work / "data/grammar", "--out", tmp_path / "run", *TINY, "--log-every", 5, "--save-every", 1, "--warmup", 0]
    done = python("train_diagonal.py", *flags, "--steps", 9, "--lr", "1e38", cwd=tmp_path, ok=False)
    assert one_line(done.returncode, done.stderr, "loss_diagonal is nan at step 2, from times of progress [0, 0.25]")
    assert checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 1


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
    with pytest.raises(prepare_data.UserError, match=r"loss_x is nan at step 3, from times of progress \[0.5, 0.75\];"):
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
def test_real_text_gpt2(tmp_path):
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
    os.environ.update(env)
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


def test_generative_perplexity(judge):
    """Against the protocol computed one text and one token at a time, on awkward texts."""
    model, tokenizer = evaluate.load_judge(str(judge), "cpu")
    texts = [
        "def main(): return 1",
        "",
        "x",
        "import os<|endoftext|>import re<|endoftext|>",
        "<|endoftext|>class A:",
        "for i in range(9): " * 30,
        "end",
    ]
    nll, count = 0.0, 0
    for text in texts:
        ids, seen = tokenizer(text)["input_ids"][:24], False
        for position, token in enumerate(ids):
            counts = token != tokenizer.eos_token_id or not seen
            seen |= token == tokenizer.eos_token_id
            if position and counts:
                logits = model(torch.tensor([ids[:position]])).logits[0, -1]
                nll -= float(logits.detach().double().log_softmax(-1)[token])
                count += 1
    for batch in (1, 3, 8):
        ours = evaluate.generative_perplexity(texts, model, tokenizer, max_length=24, batch_size=batch)
        assert ours == pytest.approx(math.exp(nll / count), rel=1e-4)


@pytest.fixture(scope="session")
def counted(tmp_path_factory):
    """What benchmark.py writes, on a small network and an eighth of the paper's step."""
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = ["--size", "tiny", "--vocab-size", 50257, "--seq-len", 1024, "--rows", 8, "--repeats", 1, "--nfe", 4, "--device", "cpu"]
    python("benchmarks/benchmark.py", *sizes, "--parts", "memory", "--output", "memory.json", cwd=folder)
    sizes = ["--size", "tiny", "--vocab-size", 3000, "--seq-len", 32, "--rows", 8, "--repeats", 1, "--nfe", 1, "--device", "cpu"]
    python("benchmarks/benchmark.py", *sizes, "--parts", "steps", "sampling", "--output", "steps.json", cwd=folder)
    return {name: json.loads((folder / f"{name}.json").read_text())["results"] for name in ("memory", "steps")}


@pytest.mark.parametrize("step", ["diagonal", *sorted(distill.TEACHERS)])
def test_no_tensor_of_size_v(counted, step):
    """With 8,192 tokens and V = 100,000, a step's peak beyond weights, gradients and optimizer is below one float32 tensor (B, L, V).

    And it grows by less than a tenth of the whole from V = 10,000.
    """
    few, many = (counted["memory"]["memory"][f"V={vocab} L=1024"] for vocab in (10_000, 100_000))
    assert many[step] < 8192 * 100_000 * 4 < many["V-sized"]
    grown, start = many[step] - few[step], few["state"] + few[step]
    assert grown < 0.1 * (start + many["state"] - few["state"]) + 4 * 2**25 * 4  # four chunks of logits: the tiny network hides them not


def test_benchmark_steps(counted):
    """Every step and way of sampling is timed, and the peak that was counted is like the one that was measured."""
    steps, sampling = (counted["steps"][part] for part in ("steps", "sampling"))
    assert {"diagonal", "V-sized", "next token", "psd", "lsd", "esd"} < steps.keys()
    assert all(r["seconds"] > 0 and r["counted_bytes"] > 0 for r in (*sampling.values(), *(steps[name] for name in distill.TEACHERS)))
    assert len(sampling) == 2


def test_unigram_entropy():
    """Nats, of each row's own counts."""
    assert evaluate.unigram_entropy(np.array([[1, 1, 2, 2], [3, 3, 3, 3]])) == pytest.approx(math.log(2) / 2)


def test_evaluate_text(tmp_path, judge):
    """A checkpoint on characters, judged by a folder: finite gen-PPL in the table and the JSON."""
    (tmp_path / "t.txt").write_text("to be or not to be that is the question " * 200)
    python("prepare_data.py", "file", "--source", "t.txt", "--tokenizer", "char", "--seq-len", 16, "--out", "data/t", cwd=tmp_path)
    python("train_diagonal.py", "--data", "data/t", "--steps", 2, *TINY, cwd=tmp_path)
    python("evaluate.py", "--checkpoint", "runs/t-diagonal/checkpoint.pt", "--nfe", 1, "--num-samples", 5, "--judge", judge, cwd=tmp_path)
    result = json.loads((tmp_path / "runs/t-diagonal/evaluation.json").read_text())["results"][0]
    assert result["gen_ppl"] > 1
    assert result["entropy"] >= 0


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
    (distill, ["--data", "grammar", "--loss", "esd", "--reverse-kl"], "--reverse-kl"),
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
]


@pytest.fixture(scope="session")
def bad(work, tmp_path_factory):
    """A folder with good and damaged files for the cases above."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(work / "data/grammar", folder / "grammar")
    shutil.copytree(work / "runs/grammar-diagonal", folder / "trained")
    shutil.copytree(folder / "grammar", folder / "cut")
    with open(folder / "cut/train.bin", "r+b") as file:
        file.truncate(1001)
    shutil.copytree(folder / "grammar", folder / "broken")
    (folder / "broken/meta.json").write_text("{")
    shutil.copytree(folder / "grammar", folder / "other")
    meta = json.loads((folder / "other/meta.json").read_text())
    (folder / "other/meta.json").write_text(json.dumps(meta | {"seq_len": 7}))
    shutil.copytree(folder / "grammar", folder / "large")
    (folder / "large/meta.json").write_text(json.dumps(meta | {"vocab_size": 9}))
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a b")
    (folder / "upper.txt").write_text("The QUICK brown fox" * 99)
    (folder / "short.jsonl").write_text('{"text": "a b"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "pwned"),))

    torch.save({"model": Evil()}, folder / "evil.pt")
    return folder


def contents(folder):
    """Every path under `folder`, with the time at which a file was last written."""
    return {p: p.stat().st_mtime_ns if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(("module", "flags", "word"), BAD, ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else getattr(v, "__name__", ""))
def test_bad_input(bad, monkeypatch, capsys, module, flags, word):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    before = contents(bad)
    with pytest.raises(SystemExit) as stop:
        prepare_data.run(module.main)
    err = re.sub(r"(?m)^.*(Generating|examples/s|it/s|row/s|\?row).*$", "", capsys.readouterr().err.replace("\r", "\n"))
    assert one_line(stop.value.code, err, word)
    assert contents(bad) == before


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_bad_environment(bad, monkeypatch, capsys, name):
    """A variable of torchrun's that is no number is bad input too."""
    monkeypatch.setenv(name, "two")
    test_bad_input(bad, monkeypatch, capsys, train_diagonal, ["--data", "grammar", "--device", "cpu"], f"{name}=two")


def test_a_bad_checkpoint_runs_no_code(bad):
    assert not (bad / "pwned").exists()


def test_help_names_every_flag(capsys, monkeypatch):
    """--help of each program exits 0 and gives each flag a description."""
    for module in (prepare_data, train_diagonal, distill, sample, evaluate):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--help"])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 0
        assert "--" in capsys.readouterr().out


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
