"""Score samples by the number of network evaluations (NFE), beside texts with known quality.

    python evaluate.py --nfe 1 2 4 8 16 128                       # of runs/owt-esd, by GPT-2 Large
    python evaluate.py --checkpoint runs/grammar-diagonal runs/grammar-psd --nfe 1 2 4 64
    python evaluate.py --nfe 1 4 --gamma 0 1 --temperature 0 1    # every combination
    python evaluate.py --nfe 8 --bound 512                        # and the likelihood bound
    python evaluate.py --samples texts.jsonl --data data/owt      # samples made elsewhere

Reads checkpoints of either stage, and files of samples. Each table begins with controls from the
data set: validation rows, the same with their words shuffled, and draws from the unigram of the
training rows. On the grammar the main score is exact: the share of grammatical sentences. On text
it is generative perplexity, by the protocol of `judge_scores`; it needs `transformers`.

Also reported: the entropy of each sample's tokens, the shares of 4-grams that are distinct or
copied from training rows, and speed. Intervals are 95%, by bootstrap over samples. Prints a table
in Markdown, and writes it beside the JSON (default: evaluation.json in the run's folder).
"""

import argparse
import itertools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Draw, logit_chunks, replacing, resolve_machine
from prepare_data import (
    Help,
    decode,
    encoder,
    grammar_entropy,
    grammar_log_prob,
    positive,
    read_meta,
    read_rows,
    reason,
    same_tokens,
)
from sample import check_output, draw_samples, load_sampler, sampling_flags

# ------------------------------------------------------------------------------------------------
# Generative perplexity.


def load_judge(name, device):
    """(causal language model in float32, tokenizer) from a folder or the hub."""
    try:
        import transformers
    except ImportError:
        raise SystemExit("gen-PPL needs transformers: pip install -e '.[eval]'") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        judge = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # hub client, tokenizer and weights each raise their own kinds
        found = f"cannot load the judge {name!r} ({reason(error)})"
        raise SystemExit(f"{found}; give --judge a folder, or a hub name and a network") from None
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"the tokenizer of {name!r} has no EOS token, which the protocol needs")
    return judge.to(device).eval(), tokenizer


@torch.no_grad()
def judge_scores(texts, judge, tokenizer, max_length, batch_size=8):
    """(NLL in nats, tokens counted) of each text, float64 (N, 2); gen-PPL is exp(sum / sum).

    The field's protocol: texts keep their special tokens, are re-tokenised for the judge and cut at
    max_length, the model's own L. No BOS is added, so the first token is not scored. Scored are all
    tokens other than EOS and the first EOS; never padding. Every text counts.
    """
    eos = tokenizer.eos_token_id
    cut = dict(add_special_tokens=False, truncation=True, max_length=max_length)
    ids = tokenizer(texts, **cut)["input_ids"]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = np.zeros((len(ids), 2))
    starts = range(0, len(ids), batch_size)
    for start in tqdm(starts, desc="judging", unit="batch", leave=False, disable=None):
        batch = by_length[start : start + batch_size]
        longest = max(1, len(ids[batch[-1]]))
        padded = torch.full((len(batch), longest), eos)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(batch):
            padded[row, : len(ids[i])] = torch.tensor(ids[i], dtype=torch.long)
            mask[row, : max(1, len(ids[i]))] = 1  # an empty text needs a column that is not masked
        padded = padded.to(judge.device)
        logits = judge(input_ids=padded, attention_mask=mask.to(judge.device)).logits
        for row, i in enumerate(batch):
            target = padded[row, : len(ids[i])]
            is_eos = target == eos
            counted = (~is_eos | (is_eos.cumsum(0) == 1))[1:]
            z = logits[row, : len(counted)].float()
            losses = torch.nn.functional.cross_entropy(z, target[1:], reduction="none")
            total = losses[counted].cpu().sum(dtype=torch.float64)
            scores[i] = total.item(), counted.sum().item()
    return scores


# ------------------------------------------------------------------------------------------------
# Other scores of samples, rows of token ids.


def entropies(rows):
    """-sum p log p in nats of each row's own token counts, padding included: (N,)."""
    found = []
    for row in rows:
        p = np.unique(row, return_counts=True)[1] / max(1, len(row))
        found.append(-(p * np.log(p)).sum())
    return np.array(found)


def grammar_scores(rows, train_rows):
    """Exact scores against the grammar and its training rows (M, L).

    Returns (whether each row is grammatical, float (N,); a dict of means over those that are).
    """
    log_probs = np.array([grammar_log_prob(row) for row in rows])
    grammatical = np.isfinite(log_probs)
    good = [np.asarray(rows[i], np.uint16).tobytes() for i in np.flatnonzero(grammatical)]
    seen = {row.tobytes() for row in np.asarray(train_rows, np.uint16)}
    return grammatical.astype(float), {
        "nll": float(-log_probs[grammatical].mean()) if good else None,  # nats a sentence
        "source_entropy": grammar_entropy(),
        "distinct": len(set(good)) / max(1, len(good)),
        "in_training": sum(row in seen for row in good) / max(1, len(good)),
    }


def ngrams(rows):
    """Every run of 4 ids in rows (..., L) as one number, uint64 (..., L - 3): a 64-bit hash."""
    rows = np.asarray(rows, np.uint64)
    count = max(0, rows.shape[-1] - 3)
    key = np.uint64(0)
    for i in range(4):
        key = key * np.uint64(0x9E3779B97F4A7C15) + rows[..., i : i + count] + np.uint64(1)
    return key


def diversity(rows, known=None):
    """Shares of the samples' 4-grams: distinct ones, and those found in training rows.

    known: the hashes of the training rows' 4-grams, or None. Values are None if not computed.
    """
    grams = np.concatenate([ngrams(row) for row in rows])
    found = {"distinct_4": None, "copied_4": None}
    if len(grams):
        found["distinct_4"] = len(np.unique(grams)) / len(grams)
        if known is not None:
            found["copied_4"] = float(np.isin(grams, known).mean())
    return found


# ------------------------------------------------------------------------------------------------
# Samples that are not a model's.


def to_ids(meta):
    """A function text -> token ids (n,) of a sample, cut at L; padded to L on the grammar."""
    encode = encoder(meta)
    L = meta["seq_len"]
    padding = [meta["pad_id"]] * L if meta["tokenizer"] == "grammar" else []

    def ids(text):
        found = encode(text)[:L]
        return np.array(found + padding[len(found) :], np.int64)

    return ids


def control_rows(meta, train, val, count, seed):
    """{name: rows of ids}: validation rows, their words shuffled, and unigram draws, `count` each.

    A frame of BOS and EOS stays in place. Shuffled text is tokenised again, so its rows differ in
    length.
    """
    ids = to_ids(meta)
    rng = np.random.default_rng([seed, 1])
    frame = int(meta["bos_id"] is not None)
    inner = slice(frame, meta["seq_len"] - frame)
    real = val[np.sort(rng.permutation(len(val))[:count])].astype(np.int64)
    shuffled = []
    for row in real:
        parts = re.split(r"(\s+)", decode(meta, row[inner]))  # words, with white space between
        words = parts[::2]
        parts[::2] = [words[i] for i in rng.permutation(len(words))]
        last = row[len(row) - frame :]
        shuffled.append(np.concatenate([row[:frame], ids("".join(parts)), last]))
    counts = np.bincount(train[:, inner].ravel(), minlength=meta["vocab_size"])
    unigram = real.copy()
    size = unigram[:, inner].shape
    unigram[:, inner] = rng.choice(len(counts), size=size, p=counts / counts.sum())
    return {"validation rows": real, "their words shuffled": shuffled, "unigram draws": unigram}


def read_samples(path, meta):
    """(rows of ids or None, texts) from a .jsonl of {"text": ...}, a .npy of ids, or a text file.

    A text file holds one sample a line. Rows are None if no data set says how to tokenise.
    """
    expected = "expected a .jsonl of {'text': ...}, a .npy of ids, or text with one sample a line"
    try:
        if path.suffix == ".npy":
            if meta is None:
                raise ValueError("ids need the data set whose tokens they are: give --data")
            rows = np.load(path)
            if rows.ndim != 2 or rows.dtype.kind not in "iu" or not rows.size:
                raise ValueError(f"found {rows.dtype} of shape {rows.shape}")
            if rows.min() < 0 or rows.max() >= meta["vocab_size"]:
                raise ValueError(f"ids go up to {rows.max()}, V is {meta['vocab_size']}")
            return rows.astype(np.int64), [decode(meta, row) for row in rows]
        texts = path.read_text(encoding="utf-8-sig").splitlines()
        if path.suffix == ".jsonl":
            texts = [json.loads(line)["text"] + "" for line in texts]  # TypeError unless a string
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--samples {path}: {reason(error)}; {expected}") from None
    if not texts:
        raise SystemExit(f"--samples {path} is empty; {expected}")
    print(f"{path}: {len(texts)} samples, {sum(not text for text in texts)} of them empty")
    if meta is None:
        return None, texts
    ids = to_ids(meta)
    return [ids(text) for text in texts], texts


# ------------------------------------------------------------------------------------------------
# Intervals.


def resamples(count, repeats=1000):
    """Bootstrap weights (1 + repeats, count): ones, then how often a resample draws each sample."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=repeats)
    return np.concatenate([np.ones((1, count)), drawn])


def estimate(values):
    """(value, 95% interval) from a statistic of each row of `resamples`, the first being all data.

    (None, None) if the value is NaN; the interval is None if over 5% of the replicates are.
    """
    if not np.isfinite(values[0]):
        return None, None
    finite = values[1:][np.isfinite(values[1:])]
    if len(finite) < 0.95 * len(values[1:]):
        return float(values[0]), None
    return float(values[0]), np.quantile(finite, [0.025, 0.975]).tolist()


# ------------------------------------------------------------------------------------------------
# The likelihood bound.


def diagonal_errors(model, h, tokens, whiten):
    """-log psi(token) and |(x1 - psi) Q|^2 at each position, for psi = softmax(h @ head.T).

    Q = W whiten. Returns (2, B, L).
    """
    targets = tokens.flatten()[:, None]
    parts = []
    for rows, z in logit_chunks(h, model.head):
        log_p = z.log_softmax(-1)
        one = torch.ones_like(log_p[:, :1])
        miss = log_p.exp().scatter_add(-1, targets[rows], -one)  # psi - x1
        seen = miss @ model.embedding @ whiten
        ce = -log_p.gather(-1, targets[rows])[:, 0]
        parts.append(torch.stack([ce, seen.square().sum(-1)]))
    return torch.cat(parts, 1).view(2, *tokens.shape)


def bound_grid(model, points):
    """Progress (points + 1,) on which r = beta / alpha of the middle position is log-spaced.

    The first point is r = 0; the last is the last time the network was trained for.
    """
    # Tabulate r(progress), densely near 0 where it is steep, and invert by interpolation.
    near_zero = np.geomspace(1e-12, 1e-2, 20_000)
    tau = np.concatenate([[0], near_zero, np.linspace(1e-2, 1, 20_001)[1:]])
    t = model.times(torch.from_numpy(tau)[:, None])
    r = model.path.beta(t) / model.path.alpha(t)
    middle = r[:, r.shape[1] // 2].numpy()
    wanted = np.geomspace(0.05, middle[-1], points)
    return np.concatenate([[0], np.interp(wanted, middle, tau)])


def whitening(model):
    """A root S of the inverse covariance of y0 = x0 W, (D, rank): y @ S has unit noise.

    `likelihood_bound` writes C^{-T}. Any root gives the same norms; this one is by eigenvectors.
    """
    factor = model.noise_factor().detach()
    covariance = factor.cpu().double().T @ factor.cpu().double()
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-9 * values[-1]  # leave out what W does not span
    whiten = vectors[:, kept] * values[kept] ** -0.5
    return whiten.to(model.head.device, factor.dtype)


@torch.no_grad()
def likelihood_bound(model, tokens, seed, batch_size, points=64):
    """An upper bound on -log p(x1) in nats, from the diagonal alone, by I-MMSE (Guo et al. 2005).

    For every r* >= 0, with r = beta / alpha and x_r the state on the path there,

        -log p(x1) <= int_0^r* r E|(x1 - psi(x_r)) Q|^2 dr + E[-log psi(x1 | x_r*)]

    summed over positions. p is the law of the stochastic sampler with this psi (not of the ODE)
    that stops at r* and draws each token from psi. The network sees y = x W, so noise of
    covariance W^T W = C C^T; whitened, that is a unit Gaussian channel with Q = W C^{-T}.

    r is log-spaced, each value with fresh noise xi and -xi. The integral is the trapezoid rule in
    log r; below the first r the error is taken constant, at its value for r = 0. With times per
    position (38) the same holds, each position with its own r.

    tokens: (N, L). Returns (r (K,) of the middle position, cross-entropy (K, N), bound (K, N)) for
    K = points values of r*: the smallest mean over rows is the one to report.
    """
    progress = torch.from_numpy(bound_grid(model, points))[:, None]
    t = model.times(progress)  # (K + 1, 1 or L)
    r = (model.path.beta(t) / model.path.alpha(t))[:, None]  # (K + 1, 1, 1 or L)
    whiten = whitening(model)
    device = model.head.device
    dtype = whiten.dtype
    cross_entropy = np.zeros((points, len(tokens)))
    integral = np.zeros((points, len(tokens)))
    starts = range(0, len(tokens), batch_size)
    for first in tqdm(starts, desc="bound", unit="batch", leave=False, disable=None):
        index = np.arange(first, min(first + batch_size, len(tokens)))
        x1 = torch.from_numpy(tokens[index].astype(np.int64)).to(device)
        errors = []
        for k, now in enumerate(t.to(device, dtype)):
            now = now.expand(len(index), -1)
            xi = Draw(seed, k, index, device).normal(x1.shape[1], model.noise_size).to(dtype)
            pair = []
            for noise in (xi, -xi):
                h = model(model.interpolate(noise, x1, now), now, now)
                pair.append(diagonal_errors(model, h, x1, whiten))
            errors.append((pair[0] + pair[1]).cpu().double() / 2)
        ce, error = torch.stack(errors, 1)  # (K + 1, B, L) each
        area = r**2 * error  # the integrand in log r
        steps = (area[2:] + area[1:-1]) / 2 * (r[2:] / r[1:-1]).log()
        below = r[1] ** 2 * error[:1] / 2  # from r = 0 to the first value
        integral[:, index] = torch.cat([below, steps]).cumsum(0).sum(-1).numpy()
        cross_entropy[:, index] = ce[1:].sum(-1).numpy()
    middle = r[1:, 0, r.shape[2] // 2].numpy()
    return middle, cross_entropy, cross_entropy + integral


def bound_row(name, model, rows, meta, args):
    """The bound at its best r*: a row of a table, in nats a token without the BOS-EOS frame."""
    tokens_per_row = meta["seq_len"] - 2 * (meta["bos_id"] is not None)
    r, _, bound = likelihood_bound(model, rows, args.seed, args.batch_size)
    best = bound.mean(1).argmin()
    nats = bound[best] / tokens_per_row
    row = {
        "model": name,
        "rows": len(rows),
        "r*": float(r[best]),
        "nats_a_token": float(nats.mean()),
        "standard_error": float(nats.std(ddof=1) / math.sqrt(len(nats))),
        "perplexity": math.exp(nats.mean()),
    }
    if meta["tokenizer"] == "grammar":  # the exact likelihood of the same rows
        exact = np.mean([grammar_log_prob(ids) for ids in rows])
        row["source"] = -float(exact) / tokens_per_row
    return row


# ------------------------------------------------------------------------------------------------
# Tables and the plot.


class Scorer:
    """Scores samples against a data set (`meta` and its training rows, or None) and a judge."""

    def __init__(self, args, meta, train):
        self.args = args
        self.meta = meta
        self.train = train
        self.known = None if train is None else np.unique(ngrams(train))
        self.exact = meta is not None and meta["tokenizer"] == "grammar"
        if not self.exact:
            self.judge, self.tokenizer = load_judge(args.judge, args.device)
            self.batch = args.judge_batch
            self.length = meta["seq_len"] if meta else 1024
            room = getattr(self.judge.config, "max_position_embeddings", None) or self.length
            if self.length > room:
                found = f"--judge {args.judge} reads {room} tokens, a sample has {self.length}"
                raise SystemExit(f"{found}; name another judge")

    def score(self, name, rows, texts=None, **facts):
        """One row of the table, for samples as rows of ids, or as texts if there is no data set."""
        meta = self.meta
        texts = texts or [decode(meta, row) for row in rows]
        if rows is None:  # the judge's own tokens
            found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            rows = [np.array(ids, np.int64) for ids in found]
        weights = resamples(len(rows))
        result = {"model": name} | facts | {"samples": len(rows)}
        extra = {}
        if self.exact:
            grammatical, extra = grammar_scores(rows, self.train)
            score = weights @ grammatical / len(rows)
            result["grammatical"], result["grammatical_interval"] = estimate(score)
        else:
            judged = judge_scores(texts, self.judge, self.tokenizer, self.length, self.batch)
            with np.errstate(invalid="ignore", divide="ignore"):
                score = np.exp(weights @ judged[:, 0] / (weights @ judged[:, 1]))
            result["gen_ppl"], result["gen_ppl_interval"] = estimate(score)
        result["entropy"] = float(entropies(rows).mean())
        if meta and meta["pad_id"] is not None:
            rows = [row[row != meta["pad_id"]] for row in rows]
        result |= extra | diversity(rows, self.known)
        for text in texts[: self.args.show]:
            print(f"    {name}: {text!r}")
        return result


def cell(value):
    """A value of a table as text."""
    if isinstance(value, list):
        return "–".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "" if value is None else str(value)


def table(rows):
    """A list of dicts as lines of Markdown, without columns that hold nothing or only zeros."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) not in (None, 0.0) for row in rows)]
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = []
    for line in cells:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def plot(path, results):
    """Draw NFE against the main score to a PNG, with the control rows as horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    on_text = "gen_ppl" in results[0]
    score = "gen_ppl" if on_text else "grammatical"
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    lines = {}
    for row in results:
        if row[score] is None:
            continue
        if row["nfe"]:
            knobs = [f", {key} {row[key]:g}" for key in ("gamma", "temperature") if row[key]]
            lines.setdefault(row["model"] + "".join(knobs), []).append(row)
        else:
            axes.axhline(row[score], color="grey", linestyle="--", linewidth=1)
            axes.annotate(row["model"], (1, row[score]), fontsize="small", color="grey")
    for label, rows in lines.items():
        nfe = [row["nfe"] for row in rows]
        value = np.array([row[score] for row in rows])
        low, high = np.array([row[f"{score}_interval"] or [row[score]] * 2 for row in rows]).T
        error = [(value - low).clip(0), (high - value).clip(0)]
        axes.errorbar(nfe, value, yerr=error, marker="o", capsize=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("generative perplexity" if on_text else "share grammatical")
    if on_text:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    text = "checkpoints or run folders (default: runs/owt-esd)"
    add("--checkpoint", type=Path, nargs="+", default=[], help=text)
    text = "samples made elsewhere: .jsonl, .npy of ids, or text with one a line (default: none)"
    add("--samples", type=Path, nargs="+", default=[], help=text)
    text = "data set for control and training rows (default: the one trained on)"
    add("--data", type=Path, help=text)
    add("--bound", type=positive, help="bound the likelihood of this many validation rows")
    add("--show", type=int, default=0, help="print this many samples for each row of the table")
    add("--output", type=Path, help="JSON to write (default: evaluation.json in the run's folder)")
    add("--plot", type=Path, help="PNG to draw: NFE against the main score")
    text = "causal language model for gen-PPL: a hub name or a folder"
    add("--judge", default="gpt2-large", help=text)
    add("--judge-batch", type=positive, default=8, help="texts the judge reads at once")
    sampling_flags(parser, count=1024, several=True)
    args = parser.parse_args()
    resolve_machine(args)
    if not args.checkpoint and not args.samples:
        args.checkpoint = [Path("runs/owt-esd")]
    if args.bound and not args.checkpoint:
        raise SystemExit("--bound is computed from a model: name one with --checkpoint")
    if args.output:
        check_output("--output", args.output, [".json"])
    elif args.checkpoint:
        last = args.checkpoint[-1]
        args.output = (last if last.is_dir() else last.parent) / "evaluation.json"
    else:
        args.output = Path("evaluation.json")
    if args.plot:
        check_output("--plot", args.plot, [".png"])
    return args


def model_rows(args, scorer, name, model, euler):
    """Rows of the table for one model: every combination of NFE, gamma and temperature."""
    rows = []
    warm_up = min(args.batch_size, args.num_samples)
    draw_samples(model, 1, warm_up, args.batch_size, args.seed, args.dtype, euler=euler)
    for nfe, gamma, temperature in itertools.product(args.nfe, args.gamma, args.temperature):
        if nfe == 1 and gamma != args.gamma[0]:
            continue  # gamma acts between jumps
        how = dict(euler=euler, gamma=gamma, temperature=temperature)
        start = time.perf_counter()
        ids = draw_samples(
            model, nfe, args.num_samples, args.batch_size, args.seed, args.dtype, **how
        )
        seconds = (time.perf_counter() - start) / len(ids)
        facts = dict(sampler="euler" if euler else "flow-map", nfe=nfe, gamma=gamma)
        row = scorer.score(name, ids, **facts, temperature=temperature)
        rows.append(row | {"seconds_per_1000": 1000 * seconds})
    return rows


def main():
    args = parse_args()
    loaded = [load_sampler(path, args.device) for path in args.checkpoint]
    folder = args.data
    if folder is None and loaded:
        folder = Path(loaded[-1][1]["args"]["data"])
    meta = train = val = None
    if folder:
        meta = read_meta(folder)
        train = read_rows(folder, "train", meta)
        val = read_rows(folder, "val", meta)
        train = train[:: math.ceil(len(train) / 50_000)]  # at most 50,000 rows, evenly spaced
    for path, (_, checkpoint, _) in zip(args.checkpoint, loaded, strict=True):
        same_tokens(path, checkpoint["meta"], folder, meta)
    samples = [read_samples(path, meta) for path in args.samples]
    scorer = Scorer(args, meta, train)

    results = []
    blank = dict(sampler=None, nfe=None, gamma=None, temperature=None)
    if folder:
        for name, ids in control_rows(meta, train, val, args.num_samples, args.seed).items():
            results.append(scorer.score(name, ids, **blank))
    for path, (ids, texts) in zip(args.samples, samples, strict=True):
        results.append(scorer.score(path.name, ids, texts, **blank))
    bounds = []
    for path, (model, _, euler) in zip(args.checkpoint, loaded, strict=True):
        name = path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"
        results += model_rows(args, scorer, name, model, euler)
        if args.bound:
            chosen = np.random.default_rng([args.seed, 2]).permutation(len(val))[: args.bound]
            bounds.append(bound_row(name, model, val[np.sort(chosen)], meta, args))

    tables = "\n\n".join(table(rows) for rows in (results, bounds) if rows)
    facts = {"args": vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    with replacing(args.output) as file:
        facts |= {"results": results, "bound": bounds}
        file.write(json.dumps(facts, indent=1, default=str) + "\n")
    with replacing(args.output.with_suffix(".md")) as file:
        file.write(tables + "\n")
    if args.plot:
        plot(args.plot, results)
    print(tables)
    print(f"written to {args.output} and {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
