"""Score samples by the number of network evaluations (NFE), beside texts whose scores show what a score is worth.

    python evaluate.py --checkpoint runs/grammar-diagonal/checkpoint.pt runs/grammar-psd/checkpoint.pt --nfe 1 2 4 64
    python evaluate.py --nfe 1 2 4 8 --plot nfe.png                                      # text; needs pip install -e '.[eval]'
    python evaluate.py --nfe 8 --temperature 1 0.8 0.9 1.1 --gamma 0 0.5 --seeds 3       # and the frontier
    python evaluate.py --nfe 8 --bound 512                                               # and the likelihood bound
    python evaluate.py --samples texts.txt folder ids.npy --data data/owt                # samples made elsewhere

Reads checkpoints of either stage, files of samples, and data/NAME for the control rows that head every table:
validation rows, the same with their words shuffled, and draws from the unigram of the training rows. On the
grammar the main score is exact, the share of grammatical sentences; on text it is generative perplexity by
the field's protocol (`judge_scores`), of which every deviation is a flag, off by default. Beside it stand the
entropy of a sample's own tokens, n-grams that are distinct, repeated or copied from training rows, self-BLEU,
and speed. Intervals are 95%, by bootstrap over seeds and samples. Prints Markdown, and writes it and JSON.
"""

import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Draw, chunks, resolve_machine
from prepare_data import (
    Parser,
    UserError,
    decode,
    encoder,
    grammar_entropy,
    grammar_log_prob,
    number,
    one_line,
    read_meta,
    read_rows,
    run,
    same_tokens,
)
from sample import check_output, draw_samples, is_euler, load_sampler, sampling_flags

NEUTRAL = {"temperature": 1.0, "gamma": 0.0, "sigma": 1.0, "final_temperature": 0.0}  # the knobs of sample.generate

# ------------------------------------------------------------------------------------------------
# The scores of single samples.


def entropies(rows):
    """-sum p log p in nats of each row's own token counts: rows of ids -> (N,); 0 for an empty one."""
    shares = [np.unique(row, return_counts=True)[1] / max(1, len(row)) for row in rows]
    return np.array([-(p * np.log(p)).sum() for p in shares])


def grammar_scores(rows, train_rows):
    """Exact scores of rows of ids against the grammar and its training rows (M, L): (whether grammatical, float (N,), means)."""
    log_probs = np.array([grammar_log_prob(row) for row in rows])
    grammatical = np.isfinite(log_probs)
    good = [np.asarray(row, np.uint16).tobytes() for row, yes in zip(rows, grammatical, strict=True) if yes]
    seen = {row.tobytes() for row in np.asarray(train_rows, np.uint16)}
    return grammatical.astype(float), {
        "nll": float(-log_probs[grammatical].mean()) if good else None,  # nats a sentence
        "source_entropy": grammar_entropy(),
        "distinct": len(set(good)) / max(1, len(good)),  # of the grammatical ones
        "in_training": sum(row in seen for row in good) / max(1, len(good)),
    }


def load_judge(name, device, dtype="float32"):
    """(causal language model, tokenizer) from a folder or the hub, through from_pretrained."""
    try:
        import transformers
    except ImportError:
        raise UserError("generative perplexity needs transformers: pip install transformers") from None
    if sys.stderr.isatty():
        print(f"loading the judge {name}", file=sys.stderr)  # a hub that cannot be reached is tried for a minute
    else:
        transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        judge = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # the hub's client, the tokenizer and the weights each raise their own kinds
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else "no reason given"
        raise UserError(
            f"no judge at {name!r}: {type(error).__name__}: {reason}; give --judge a folder, or a hub name where the hub can be reached"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-sequence token, which the protocol counts; give --judge another")
    return judge, tokenizer


@torch.no_grad()
def judge_scores(texts, judge, tokenizer, max_length, batch_size=8, bos=False, cache=None):
    """(NLL in nats, tokens counted) of each text under `judge`, float64 (N, 2). Their sums give exp(NLL / tokens), gen-PPL.

    The field's protocol: texts keep their special tokens; they are re-tokenised and truncated to max_length
    (the model's own L). No BOS is put before, so the first token is not scored (with `bos`, a deviation, it is).
    Every token other than EOS counts, and the first EOS; padding never does. Every text counts, those of a last,
    smaller batch too. `cache`, {key: (NLL, tokens)}, is read and filled; the key is of the ids that the judge reads.
    """
    eos, cache = tokenizer.eos_token_id, {} if cache is None else cache
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length - bos)["input_ids"]
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos] if bos else []
    keyed = [(hashlib.sha256(f"{bos} {row}".encode()).hexdigest()[:24], first + row) for row in ids]
    todo = sorted({key: row for key, row in keyed if key not in cache}.items(), key=lambda item: len(item[1]))
    for i in tqdm(range(0, len(todo), batch_size), desc="judging", unit="batch", leave=False, disable=None):
        batch = todo[i : i + batch_size]
        padded = torch.full((len(batch), max(2, len(batch[-1][1]))), eos)  # they come by length
        mask = torch.zeros_like(padded)
        for j, (_, row) in enumerate(batch):
            padded[j, : len(row)], mask[j, : max(1, len(row))] = torch.tensor(row), 1
        padded, mask = padded.to(judge.device), mask.to(judge.device)
        logits = judge(input_ids=padded, attention_mask=mask).logits
        for (key, row), z, target in zip(batch, logits, padded, strict=True):
            is_eos = target[: len(row)] == eos
            is_eos[: len(first)] = False
            counted = (~is_eos | (is_eos.cumsum(0) == 1))[1:]
            losses = torch.nn.functional.cross_entropy(z[: len(counted)].float(), target[1 : len(row)], reduction="none")
            cache[key] = losses[counted].cpu().sum(dtype=torch.float64).item(), int(counted.sum())
    return np.array([cache[key] for key, _ in keyed], np.float64)


def fingerprint(judge):
    """A short name for a judge's weights and precision, by which its cache is found."""
    sums = [(name, tuple(p.shape), p.cpu().sum(dtype=torch.float64).item()) for name, p in judge.named_parameters()]
    return hashlib.sha256(f"{judge.dtype} {judge.config.model_type} {sums}".encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------
# Diversity and copying, on token ids.


def ngrams(rows, n):
    """Every run of n ids in rows (..., L), as one number each: uint64 (..., L - n + 1), hashed by a polynomial mod 2^64."""
    rows = np.asarray(rows, np.uint64)
    key, count = np.uint64(0), max(0, rows.shape[-1] - n + 1)
    for i in range(n):
        key = key * np.uint64(0x9E3779B97F4A7C15) + rows[..., i : i + count] + np.uint64(1)
    return key


def diversity(rows, n, known=None):
    """Shares of n-grams: distinct ones among all samples', repeats within a sample (mean), those in `known`, sorted keys."""
    grams = [keys for row in rows if len(keys := ngrams(row, n))]
    if not grams:
        return dict.fromkeys((f"distinct_{n}", f"repeated_{n}", f"copied_{n}"))
    every = np.concatenate(grams)
    at = None if known is None else np.searchsorted(known, every).clip(max=max(0, len(known) - 1))
    return {
        f"distinct_{n}": len(np.unique(every)) / len(every),
        f"repeated_{n}": float(np.mean([1 - len(np.unique(keys)) / len(keys) for keys in grams])),
        f"copied_{n}": None if known is None else float((known[at] == every).mean()) if len(known) else 0.0,
    }


def self_bleu(rows, count):
    """Mean BLEU-4 of each of the first `count` samples against the others, in [0, 1], of token ids as words, by sacrebleu."""
    try:
        from sacrebleu import BLEU
    except ImportError:
        raise UserError("self-BLEU needs sacrebleu: pip install sacrebleu; or --bleu-samples 0 to go without") from None
    bleu, texts = BLEU(tokenize="none", effective_order=True), [" ".join(map(str, row)) for row in rows[:count]]
    if len(texts) < 2:
        return None
    return float(np.mean([bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)])) / 100


# ------------------------------------------------------------------------------------------------
# Samples that are not a model's.


def sample_ids(meta):
    """A function text, or ids, -> token ids (n,) of a sample: cut at L, as the judge cuts it, and padded to a row where rows are."""
    encode, L, pads = encoder(meta), meta["seq_len"], [meta["pad_id"]] * (meta["seq_len"] if meta["tokenizer"] == "grammar" else 0)

    def ids(sample):
        found = list(encode(sample) if isinstance(sample, str) else sample)[:L]
        return np.array(found + pads[len(found) :], np.int64)

    return ids


def control_rows(meta, train, val, count, seed):
    """{name: rows of ids}: up to `count` of the validation rows (N, L), them with their words shuffled, and unigram draws.

    A frame of BOS and EOS stays where it is. Shuffled text is cut into tokens anew, so its rows differ in length.
    """
    encode, rng, frame = sample_ids(meta), np.random.default_rng([seed, 1]), int(meta["bos_id"] is not None)
    real = val[np.sort(rng.permutation(len(val))[:count])].astype(np.int64)
    cut, shuffled = slice(frame, meta["seq_len"] - frame), []
    for row in real:
        parts = re.split(r"(\s+)", decode(meta, row[cut]))  # words, and between them white space, which stays
        parts[::2] = [parts[2 * i] for i in rng.permutation(len(parts[::2]))]
        shuffled.append(np.concatenate([row[:frame], encode("".join(parts)), row[len(row) - frame :]]))
    counts = np.bincount(train[:, cut].ravel(), minlength=meta["vocab_size"])
    unigram = real.copy()
    unigram[:, cut] = rng.choice(len(counts), size=unigram[:, cut].shape, p=counts / counts.sum())
    return {"validation rows": real, "their words shuffled": shuffled, "unigram draws": unigram}


def read_samples(path, meta):
    """Samples from a file of lines, as sample.py writes them, a .jsonl of {"text": ...}, a folder of text files, or ids in a .npy.

    Returns (rows of ids, or None where no data set says what they are, texts).
    """
    expected = "expected a text file, a .jsonl, a folder of text files, or a .npy of ids"
    try:
        if path.suffix == ".npy":
            rows = np.load(path)
            if meta is None:
                raise UserError(f"--samples {path} holds token ids; name the data set whose tokenizer they are of with --data")
            if not isinstance(rows, np.ndarray):
                raise UserError(f"--samples {path}: an archive of arrays; expected one array of ids of shape (N, L)")
            if rows.ndim != 2 or rows.dtype.kind not in "iu" or not rows.size or rows.min() < 0 or rows.max() >= meta["vocab_size"]:
                raise UserError(f"--samples {path}: {rows.dtype} of shape {rows.shape}; expected ids of shape (N, L) below {meta['vocab_size']}")
            samples = [row.astype(np.int64) for row in rows]
        elif path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
            samples = [file.read_text(encoding="utf-8").removesuffix("\n") for file in files]
        else:
            lines = path.read_text(encoding="utf-8").split("\n")
            lines = lines[: len(lines) - (lines[-1] == "")]
            if path.suffix == ".jsonl":
                samples = ["" + json.loads(line)["text"] for line in lines]  # TypeError where it is no string
            else:
                escapes = {"\\n": "\n", "\\r": "\r", "\\\\": "\\"}
                samples = [re.sub(r"\\[nr\\]", lambda found: escapes[found[0]], line) for line in lines]
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise UserError(f"--samples {path}: cannot be read ({type(error).__name__}: {error}); {expected}") from None
    if not samples:
        raise UserError(f"--samples {path} holds no sample; expected one a line, or one a file in a folder")
    try:
        rows = None if meta is None else list(map(sample_ids(meta), samples))
    except UserError as error:
        raise UserError(f"--samples {path}: {error}") from None
    return rows, samples if isinstance(samples[0], str) else [decode(meta, row) for row in rows]


# ------------------------------------------------------------------------------------------------
# Intervals, and the frontier.


@functools.cache
def resamples(seeds, count, repeats=1000):
    """Weights (1 + repeats, seeds * count): ones, then how often a bootstrap over seeds, and over samples within, draws each."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=repeats)  # (repeats, seeds)
    parts = [rng.multinomial(drawn[:, k] * count, np.full(count, 1 / count)) for k in range(seeds)]
    return np.concatenate([np.ones((1, seeds * count)), np.concatenate(parts, 1)])


def means(weights, value, size=1.0):
    """sum(value) / sum(size) over samples, for each row of weights (R, N): (R,), NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ value) / (weights @ np.broadcast_to(size, value.shape))


def estimate(values):
    """(the first, the 95% interval of the others) of what `means` returned; None where they are not finite, or not over 19 in 20."""
    known = values[1:][np.isfinite(values[1:])]
    interval = [float(q) for q in np.quantile(known, [0.025, 0.975])] if len(known) >= 0.95 * len(values[1:]) else None
    return (float(values[0]), interval) if np.isfinite(values[0]) else (None, None)


def at_entropy(entropy, score, target, worst):
    """The score where a sweep, linear between its points, meets the target entropy: (P, R), (P, R) in the knob's order, (R,) -> (R,).

    NaN where it does not bracket the target: nothing is extrapolated. Where it meets it twice, the worse (np.fmax or np.fmin).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        w = (target - entropy[:-1]) / np.diff(entropy, axis=0)
        return worst.reduce(np.where((w >= 0) & (w <= 1), score[:-1] + w * np.diff(score, axis=0), np.nan))


def frontiers(results, kept, val, on_grammar):
    """One line a model, NFE and swept knob: the score where the sweep meets the data's entropy, that of up to 5,000 validation rows."""
    data = entropies(val[:: -(-len(val) // 5000)])
    lines, target = [], means(resamples(1, len(data)), data)
    label = "grammatical" if on_grammar else "log_ppl"
    for model, nfe in dict.fromkeys((r["model"], r["nfe"]) for r in results if r["nfe"]):
        for knob in NEUTRAL:
            points = [i for i, r in enumerate(results) if (r["model"], r["nfe"]) == (model, nfe) and r["swept"] in (None, knob)]
            points.sort(key=lambda i: results[i][knob])
            if len(points) > 1:
                entropy, score = (np.stack(part) for part in zip(*(kept[i] for i in points), strict=True))  # (P, 1 + repeats)
                value, interval = estimate(at_entropy(entropy, score, target, np.fmin if on_grammar else np.fmax))
                lines.append({"model": model, "nfe": nfe, "knob": knob, "values": [results[i][knob] for i in points],
                              "entropies": entropy[:, 0].tolist(), "scores": score[:, 0].tolist(), "data_entropy": float(target[0]),
                              f"{label}_at_data_entropy": value, "interval": interval})  # fmt: skip
    return lines


# ------------------------------------------------------------------------------------------------
# The likelihood bound.


def diagonal_errors(model, h, tokens, whiten):
    """Of psi = softmax(h @ head.T) at each position: -log psi(token), |(x1 - psi) Q|^2 embedded, and with Q = I: (3, B, L)."""
    flat, targets, parts = h.flatten(0, 1), tokens.flatten()[:, None], []
    for rows in chunks(len(flat), len(model.head)):
        log_p = (flat[rows] @ model.head.T).log_softmax(-1)
        miss = log_p.exp().scatter_add(-1, targets[rows], -torch.ones_like(log_p[:, :1]))  # psi - x1
        seen = miss @ model.embedding @ whiten
        parts.append(torch.stack([-log_p.gather(-1, targets[rows])[:, 0], seen.square().sum(-1), miss.square().sum(-1)]))
    return torch.cat(parts, 1).view(3, *tokens.shape)


@torch.no_grad()
def likelihood_bound(model, tokens, seed, batch_size, points=64):
    """An upper bound on -log p(x1), in nats, from the diagonal alone: (r (K,), cross-entropy (K, N), bounds {channel: (K, N)}).

    For every r* >= 0, with r = beta / alpha the signal over the noise and x_r the path there,

        -log p(x1)  <=  int_0^r* r E|(x1 - psi(x_r)) Q|^2 dr  +  E[-log psi(x1 | x_r*), summed over positions]

    p being what the stochastic sampler with this psi writes when it stops at r* and draws each token from psi
    (and by I-MMSE -log p of the data themselves, where psi is their denoiser). tokens (N, L); bounds are of a row each, for K values of r*.

    The channel is what noise can be drawn in. The network sees y = x W, noise of covariance N = W^T W (plus
    the jitter), so a unit Gaussian channel once whitened: Q = W C^{-T}, N = C C^T, and |v Q|^2 = v W N^+ W^T v. That is
    "embedded", valid for any W (N^+ leaves out what W does not span), the one to report. "full" is Q = I, the channel
    of the V-vector x: psi is a function of x through x W, and x W has the law that is drawn here, so no V-vector need
    be. It holds too, and is the looser where V > D; where W has rank V, Q Q^T = I and both are one.

    r is log-spaced, up to the last time that the network was trained for; each value has fresh noise, and its
    negative. The integral is the trapezoid rule in log r, from r = 0 below the first value. With times per position (38)
    the same holds along the path: r of each its own.
    """
    tau = np.concatenate([[0], np.geomspace(1e-12, 1e-2, 20_000), np.linspace(1e-2, 1, 20_001)[1:]])
    t = model.times(torch.from_numpy(tau)[:, None])
    middle = (model.path.beta(t) / model.path.alpha(t))[:, t.shape[1] // 2].numpy()  # r of the middle position, rising
    grid = np.concatenate([[0], np.interp(np.geomspace(0.05, middle[-1], points), middle, tau)])
    t = model.times(torch.from_numpy(grid)[:, None])  # (points + 1, 1 or L)
    r = (model.path.beta(t) / model.path.alpha(t))[:, None]  # (points + 1, 1, 1 or L)
    factor, device = model.noise_factor().detach(), model.head.device
    values, vectors = torch.linalg.eigh(factor.cpu().double().T @ factor.cpu().double())
    kept = values > 1e-9 * values[-1]
    whiten = (vectors[:, kept] * values[kept] ** -0.5).to(device, factor.dtype)

    out = np.zeros((3, points, len(tokens)))  # cross-entropy; the two integrals
    for first in tqdm(range(0, len(tokens), batch_size), desc="bound", unit="batch", leave=False, disable=None):
        index = np.arange(first, min(first + batch_size, len(tokens)))
        x1, errors = torch.from_numpy(tokens[index].astype(np.int64)).to(device), []
        for k, now in enumerate(t.to(device, factor.dtype)):
            now, xi = now.expand(len(index), -1), Draw(seed, k, index, device).normal(tokens.shape[1], model.noise_size).to(factor.dtype)
            pair = [diagonal_errors(model, model(model.interpolate(x0, x1, now), now, now), x1, whiten) for x0 in (xi, -xi)]
            errors.append((pair[0] + pair[1]).cpu().double() / 2)
        ce, *errors = torch.stack(errors, 1)  # (points + 1, B, L) each
        for channel, error in enumerate(errors):
            area = r**2 * error  # the integrand in log r
            steps = (area[2:] + area[1:-1]) / 2 * (r[2:] / r[1:-1]).log()
            total = torch.cat([r[1] ** 2 * error[:1] / 2, steps]).cumsum(0)
            out[1 + channel][:, index] = total.sum(-1).numpy()
        out[0][:, index] = ce[1:].sum(-1).numpy()
    return r[1:, 0, t.shape[1] // 2].numpy(), out[0], {"embedded": out[0] + out[1], "full": out[0] + out[2]}


def bound_rows(name, model, rows, meta, args):
    """The bound at its best r*, one dict a channel: nats a token (the frame of BOS and EOS is not counted), +- its standard error."""
    tokens = meta["seq_len"] - 2 * (meta["bos_id"] is not None)
    r, ce, bounds = likelihood_bound(model, rows, args.seed, args.batch_size)
    profile = {"r": r.tolist(), "cross_entropy": (ce.mean(1) / tokens).tolist()} | {key: (b.mean(1) / tokens).tolist() for key, b in bounds.items()}
    lines = []
    for channel, bound in bounds.items():
        best = bound[bound.mean(1).argmin()] / tokens
        line = {"model": name, "channel": channel, "rows": len(rows), "r*": float(r[bound.mean(1).argmin()]), "nats_a_token": float(best.mean()),
                "standard_error": float(best.std(ddof=1) / math.sqrt(len(best))), "perplexity": math.exp(best.mean())}  # fmt: skip
        if meta["tokenizer"] == "grammar":  # what the source itself gives those rows, and by how much more the bound is, in per cent
            source = -np.array([grammar_log_prob(row) for row in rows]) / tokens
            line |= {"source": float(source.mean()), "per_cent_above": 100 * float(best.mean() / source.mean() - 1)}
        lines.append(line | {"profile": profile})
    return lines


# ------------------------------------------------------------------------------------------------
# Tables and plots.


def show(value, between=", "):
    """A cell of a table."""
    if isinstance(value, list):
        return between.join(map(show, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "" if value is None else str(value)


def table(rows, without=()):
    """A list of dicts with the same keys as lines of Markdown, columns aligned."""
    names = [name for name in rows[0] if name not in without]
    cells = [
        [name.replace("_", " ") for name in names],
        *([show(row[name], "–" if name.endswith("interval") else ", ") for name in names] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]])


def load_pyplot():
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot, path, results, frontier, bounds):
    """To a PNG: NFE against the main score (gen-PPL on log axes, or the share grammatical); the frontier; the bound against r*."""
    text, count = "gen_ppl" in results[0], 1 + bool(frontier) + bool(bounds)
    score, label = ("gen_ppl", "generative perplexity") if text else ("grammatical", "share grammatical")
    figure, panels = pyplot.subplots(1, count, figsize=(6 * count, 3.8), layout="constrained", squeeze=False)
    first, *others = panels[0]
    for name in dict.fromkeys(r["model"] for r in results if r["nfe"]):
        line = sorted(
            (r["nfe"], *r[f"{score}_interval"], r[score]) for r in results if r["model"] == name and not r["swept"] and r[f"{score}_interval"]
        )
        nfe, low, high, value = np.array(line).reshape(-1, 4).T
        first.errorbar(nfe, value, yerr=np.stack([value - low, high - value]).clip(0), marker="o", capsize=2, label=name)
    controls = [r for r in results if not r["nfe"] and r[score] is not None]
    for i, r in enumerate(controls):
        first.axhline(r[score], color="grey", linestyle=("--", ":", "-.")[i % 3], linewidth=1, label=r["model"])
    first.set_xscale("log", base=2)
    first.set(xlabel="network evaluations", ylabel=label, **{"yscale": "log"} if text else {"ylim": (0, 1.03)})
    if frontier:
        axes = others.pop(0)
        for line in frontier:
            axes.plot(line["entropies"], line["scores"], marker=".", label=f"{line['model']}, {line['nfe']} NFE, {line['knob']}")
        data = results[0][score]  # of the validation rows, which come first
        axes.plot(line["data_entropy"], np.log(data) if text else data, "k*", markersize=12, label="data")
        axes.set(xlabel="entropy of a sample's tokens, nats", ylabel=f"log of {label}" if text else label)
    for line in bounds:
        r, profile = line["profile"]["r"], line["profile"]
        others[0].plot(r, profile[line["channel"]], linestyle="--" if line["channel"] == "full" else "-", label=f"{line['model']}, {line['channel']}")
        if line["channel"] == "full":
            others[0].plot(r, profile["cross_entropy"], linestyle=":", label=f"{line['model']}, cross-entropy at r*")
        others[0].set(xlabel="r*, signal over noise", ylabel="bound, nats a token", xscale="log", ylim=(0, None))
    for axes in panels[0]:
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


# ------------------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE", help="of either stage (default: runs/owt-esd/checkpoint.pt)")
    parser.add_argument("--samples", type=Path, nargs="+", metavar="FILE", help="text made elsewhere: one sample a line, a folder, or a .npy of ids")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set, for control and training rows (default: the one trained on)")
    parser.add_argument(
        "--seeds", type=number(int, 1, 1000), default=1, metavar="N", help="draw --num-samples with each of so many seeds, from --seed on"
    )
    parser.add_argument("--bound", type=number(int, 2), metavar="N", help="bound the likelihood of N validation rows, by each model's diagonal")
    parser.add_argument("--show", type=number(int, 0), default=0, metavar="N", help="print N samples a row of the table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON, and the tables as .md beside it (default: evaluation.json beside the last checkpoint)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw NFE against the main score, frontier and bound, as PNG")
    group = parser.add_argument_group("judge of text", "What departs from the field's protocol is off by default.")
    group.add_argument("--judge", default="gpt2-large", metavar="NAME", help="causal LM: a hub name or a folder")
    group.add_argument("--judge-batch", type=number(int, 1), default=8, metavar="N", help="texts the judge reads at once")
    group.add_argument("--judge-dtype", choices=["float32", "bfloat16"], default="float32", help="its weights; bfloat16 departs")
    group.add_argument("--judge-length", type=number(int, 2), metavar="N", help="departs: cut texts at N of the judge's tokens, not at L")
    group.add_argument("--judge-bos", action="store_true", help="departs: put a BOS before, so that the first token is scored")
    group = parser.add_argument_group("diversity")
    group.add_argument("--ngram", type=number(int, 1, 64), nargs="+", default=[4], metavar="N", help="sizes of the n-grams that are counted")
    group.add_argument("--train-rows", type=number(int, 1), default=50_000, metavar="N", help="training rows to look in for copies, evenly spaced")
    group.add_argument(
        "--bleu-samples", type=number(int, 0), default=100, metavar="N", help="samples in the self-BLEU; its time grows with the square"
    )
    sampling_flags(parser, count=1024, sweep=True)
    args = parser.parse_args()
    if args.bound and not args.checkpoint and args.samples:
        parser.error("--bound is of a model's diagonal: name it with --checkpoint")
    if not args.checkpoint and not args.samples:
        args.checkpoint = [Path("runs/owt-esd/checkpoint.pt")]
        if not args.checkpoint[0].is_file():
            raise UserError(f"no checkpoint at {args.checkpoint[0]}; train one with distill.py, or name --checkpoint or --samples")
    args.output = args.output or (args.checkpoint[-1].parent if args.checkpoint else Path()) / "evaluation.json"
    if args.output.suffix == ".md":
        raise UserError(f"--output {args.output}: that is the tables' name, beside the JSON's; name it {args.output.with_suffix('.json')}")
    named = [*(args.checkpoint or []), *(args.samples or [])]
    check_output("--output", args.output, named)  # a folder has no suffix to change
    for flag, path in (("--output", args.output), ("--output", args.output.with_suffix(".md")), ("--plot", args.plot)):
        check_output(flag, path, named)
        named.append(path)
    for folder in args.samples or []:
        if folder.is_dir() and folder.resolve() in args.output.resolve().parents:
            raise UserError(f"--output {args.output} is in the folder of samples {folder}, one of which it would be; name another place")
    for several in ("nfe", *NEUTRAL):
        setattr(args, several, list(dict.fromkeys(getattr(args, several))))
    resolve_machine(args)
    return args


def unlike(paths, short):
    """A name for each path: the short one, or the whole path where that is empty or another's too."""
    names = [short(path) for path in paths]
    return [name if name and names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def settings(args, nfe):
    """[(knob that is swept or None, the three knobs)]: the first value of each, then every further one alone."""
    base = {knob: getattr(args, knob)[0] for knob in NEUTRAL}
    idle = ("temperature", "gamma") if nfe == 1 else ()  # no jump but the last
    return [(None, base)] + [(knob, base | {knob: value}) for knob in NEUTRAL if knob not in idle for value in getattr(args, knob)[1:]]


def read_cache(path):
    """{key: (NLL, tokens)} as it was written; empty where there is none."""
    try:
        return {key: (float(nll), int(count)) for key, (nll, count) in json.loads(path.read_text()).items()} if path.exists() else {}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is not a cache of judged texts; delete it") from None


def write(path, text):
    """Replace a file whole; what a symbolic link names, not the link."""
    path = path.resolve()
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class Scores:
    """The table as it grows: `results`, a dict a row; `kept`, what a frontier needs of each; `shown`, texts to print."""

    def __init__(self, args, meta, train):
        self.args, self.meta, self.train = args, meta, train
        self.results, self.kept, self.shown = [], [], []
        self.known = {n: None if train is None else np.unique(ngrams(train, n)) for n in args.ngram}
        self.on_grammar = meta is not None and meta["tokenizer"] == "grammar"
        if self.on_grammar:
            return
        self.judge, self.tokenizer = load_judge(args.judge, args.device, args.judge_dtype)
        room = getattr(self.judge.config, "max_position_embeddings", None) or math.inf
        self.length = args.judge_length or (meta["seq_len"] if meta else min(1024, room))
        if self.length > room:
            raise UserError(f"--judge {args.judge} reads {room} tokens, and texts are cut at {self.length}; give --judge-length, or another judge")
        self.cached = args.output.with_name(f"judged-{fingerprint(self.judge)}.json")
        self.cache = read_cache(self.cached)

    def add(self, model, rows, texts=None, sampler="", nfe=None, seconds=None, swept=None, knobs=None):
        """Score samples, rows of ids or (where no data set says what ids are) texts: one more row of the table."""
        args, meta = self.args, self.meta
        texts = texts or [decode(meta, row) for row in rows]
        if rows is None:  # no data set says what the tokens are: the judge's
            rows = [np.array(ids, np.int64) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        seeds = args.seeds if nfe else 1
        weights, entropy = resamples(seeds, len(rows) // seeds), entropies(rows)
        result = {"model": model, "sampler": sampler, "nfe": nfe, "swept": swept} | (knobs or dict.fromkeys(NEUTRAL)) | {"samples": len(rows)}
        if self.on_grammar:
            grammatical, extra = grammar_scores(rows, self.train)
            main_score = means(weights, grammatical)
            result["grammatical"], result["grammatical_interval"] = estimate(main_score)
        else:
            nll, counted = judge_scores(texts, self.judge, self.tokenizer, self.length, args.judge_batch, args.judge_bos, self.cache).T
            write(self.cached, json.dumps(self.cache))
            main_score, extra = means(weights, nll, counted), {}
            result["gen_ppl"], result["gen_ppl_interval"] = estimate(np.exp(main_score))
        result["entropy"], result["entropy_interval"] = estimate(entropy_score := means(weights, entropy))
        words = [row[row != meta["pad_id"]] for row in rows] if meta and meta["pad_id"] is not None else rows
        result |= extra
        for n in args.ngram:
            result |= diversity(words, n, self.known[n])
        if args.bleu_samples:
            result["self_bleu"] = self_bleu(words, args.bleu_samples)
        result["seconds_per_1000"] = seconds and 1000 * seconds / len(rows)
        result["tokens_per_second"] = seconds and sum(map(len, rows)) / seconds
        self.results.append(result)
        self.kept.append((entropy_score, main_score))
        self.shown.append(texts[: args.show])


def report(scores, frontier, bounds, controls):
    """The tables and the samples asked for, as Markdown; columns that say nothing are left out."""
    idle = {name for name in scores.results[0] if all(r[name] is None or r[name] == NEUTRAL.get(name) for r in scores.results)}
    text = [table(scores.results, without=idle | {"swept", "samples", "entropy_interval"})]
    text += [table(part, without={"entropies", "scores", "profile"}) for part in (frontier, bounds) if part]
    for result, texts in zip(scores.results, scores.shown, strict=True):
        title = result["model"] + (f", {result['nfe']} NFE" if result["nfe"] else "")
        text += ["\n".join([f"{title}:", *(f"    {one_line(t)}" for t in texts)])] if texts else []
    text += [] if controls else ["No control rows and no copied n-grams: no data set was named with --data."]
    return "\n\n".join(text) + "\n"


def main():
    args = parse_args()
    pyplot = load_pyplot() if args.plot else None
    loaded = [load_sampler(path, args) for path in args.checkpoint or []]
    eulers, metas = [is_euler(args, checkpoint) for _, checkpoint in loaded], [checkpoint["meta"] for _, checkpoint in loaded]
    folder = args.data or (Path(loaded[-1][1]["args"]["data"]) if loaded else None)
    metas += [read_meta(folder)] if folder else []
    for path, (_, checkpoint) in zip(args.checkpoint or [], loaded, strict=True):
        same_tokens(path, checkpoint["meta"], folder, metas[-1])
    meta, train, val = metas[-1] if metas else None, None, None
    if meta:
        decode(meta, [0])  # a missing tokenizer shows before the work, not after
        np.empty((args.num_samples, meta["seq_len"]), np.int64)  # and so do more samples than memory holds
    if folder:
        train, val = (read_rows(folder, split, meta) for split in ("train", "val"))
        train = train[:: -(-len(train) // args.train_rows)]
    samples = [read_samples(path, meta) for path in args.samples or []]
    scores = Scores(args, meta, train)

    if folder:
        for name, rows in control_rows(meta, train, val, args.num_samples, args.seed).items():
            scores.add(name, rows)
    for name, (rows, texts) in zip(unlike(args.samples or [], lambda path: path.name), samples, strict=True):
        scores.add(name, rows, texts)
    names = unlike(args.checkpoint or [], lambda path: path.parent.name)
    for name, (model, _), euler in zip(names, loaded, eulers, strict=True):
        draw_samples(model, 1, min(args.batch_size, args.num_samples), args.batch_size, args.seed, euler, args.dtype)  # a first call is slow
        for nfe in args.nfe:
            for swept, knobs in settings(args, nfe):
                start = time.perf_counter()
                rows = np.concatenate([draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed + k, euler, args.dtype, **knobs)
                                       for k in range(args.seeds)])  # fmt: skip
                scores.add(name, rows, None, "euler" if euler else "flow-map", nfe, time.perf_counter() - start, swept, knobs)
    frontier, bounds = [] if val is None else frontiers(scores.results, scores.kept, val, scores.on_grammar), []
    if args.bound:
        rows = val[np.sort(np.random.default_rng([args.seed, 2]).permutation(len(val))[: args.bound])]
        for name, (model, _) in zip(names, loaded, strict=True):
            bounds += bound_rows(name, model, rows, meta, args)

    print(text := report(scores, frontier, bounds, controls=folder is not None))
    facts = {"flags": vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    write(args.output, json.dumps({**facts, "results": scores.results, "frontier": frontier, "bound": bounds}, indent=1, default=str) + "\n")
    write(args.output.with_suffix(".md"), text)
    print(f"written to {args.output} and {args.output.with_suffix('.md')}")
    if args.plot:
        plot(pyplot, args.plot, scores.results, frontier, bounds)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    run(main)
