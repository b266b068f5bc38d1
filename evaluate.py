"""Score samples by the number of network evaluations (NFE), beside texts with known quality.

    python evaluate.py --nfe 1 2 4 8 16 128                       # of runs/owt-esd, by GPT-2 Large
    python evaluate.py --nfe 1 4 --entropy 5.4                    # at equal variety
    python evaluate.py --bound 512 --data data/ptb data/wikitext  # the likelihood bound alone
    python evaluate.py --samples texts.jsonl --data data/owt      # samples made elsewhere

Reads checkpoints of either stage, and files of samples. Controls come first: validation rows, their
words shuffled, unigram draws. The score is the share of grammatical sentences or, on text,
generative perplexity by `judge_scores` (it needs `transformers`). Intervals are 95%, by bootstrap.
Each row is printed and written as JSON at once; an earlier file is kept as NAME.json.old.
"""

import bisect
import functools
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import prepare_data
import sample
from model import Draw, atomic_write, commit, logit_chunks, parse
from prepare_data import decode, encoder, explain, positive, read_meta, read_rows, same_tokens, say
from sample import check_output, choose, draw_samples, generate, load_sampler, uniforms


# ---- Generative perplexity. --------------------------------------------------------------------
@torch.no_grad()
def judge_scores(texts, judge, tokenizer, max_length, batch_size=8):
    """(NLL in nats, tokens counted) of each text, float64 (N, 2); gen-PPL is exp(sum / sum).

    The field's protocol: texts keep their special tokens and are re-tokenised for the judge, cut at
    max_length, the model's own L. Scored are all tokens other than EOS and the first EOS, but not
    the first token, as no BOS is added. Text in BERT's tokens is joined as transformers 4 does.

    We depart from the code of MDLM, Duo and FLM: every text counts (they drop the last batch if it
    is not full), and padding never does (they score one pad token of each padded text without EOS).
    Trailing [PAD] is stripped. BOS and EOS are [CLS] and [SEP], where FLM's code has [CLS] for
    both; with ours real rows of LM1B have an entropy of 4.34, the paper's."""
    eos = tokenizer.eos_token_id
    ids = judge_ids(texts, tokenizer, max_length)
    by_length = np.argsort([len(row) for row in ids], kind="stable")
    scores = np.zeros((len(ids), 2))
    for start in tqdm(range(0, len(ids), batch_size), "judging", leave=False, disable=None):
        batch = by_length[start : start + batch_size]
        # An empty text is given an EOS, which is not scored: the judge needs a column.
        targets = [torch.tensor(ids[i] or [eos], device=judge.device) for i in batch]
        padded = pad_sequence(targets, batch_first=True, padding_value=eos)
        mask = pad_sequence([torch.ones_like(target) for target in targets], batch_first=True)
        logits = judge(input_ids=padded, attention_mask=mask).logits
        for i, target, z in zip(batch, targets, logits, strict=True):
            is_eos = target == eos
            counted = ~is_eos | (is_eos.cumsum(0) == 1)
            z = z[: len(target) - 1].float()
            losses = torch.nn.functional.cross_entropy(z, target[1:], reduction="none")[counted[1:]]
            scores[i] = losses.cpu().double().sum().item(), len(losses)
    return scores


# ---- The likelihood bound. ---------------------------------------------------------------------
def diagonal_errors(model, h, tokens, whiten):
    """-log psi(token) and |(x1 - psi) W whiten|^2, (2, B, L), for psi = softmax(h @ head.T)."""
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
    """Times (points + 1, 1 or L): r = beta / alpha is 0, then log-spaced up to MAX_PROGRESS.

    With times per position (38) this is the r of the middle of the row."""
    end = model.times(torch.ones(1, 1, dtype=torch.float64))
    last = model.path.beta(end) / model.path.alpha(end)
    r = np.geomspace(0.05, float(last[0, last.shape[1] // 2]), points)
    t = model.path.time_at(torch.from_numpy(r / (1 + r)))
    tau = np.interp(t, model.schedule_time, model.schedule_tau)
    return model.times(torch.from_numpy(np.append(0, tau))[:, None])


@torch.no_grad()
def likelihood_bound(model, tokens, seed, batch_size, points=64):
    """An upper bound on -log p(x1) in nats, from the diagonal alone, by I-MMSE (Guo et al. 2005).

    For every r* >= 0, with r = beta / alpha and x_r the state on the path there,

        -log p(x1) <= int_0^r* r E|(x1 - psi(x_r)) Q|^2 dr + E[-log psi(x1 | x_r*)]

    summed over positions. p is the law of the stochastic sampler with this psi (not of the ODE)
    that stops at r* and draws each token from psi. The network sees y = x W, so noise of
    covariance W^T W = R^T R; y R^{-1} has unit Gaussian noise (whiten = R^{-1}), Q = W R^{-1}.

    Each r has fresh noise, xi and -xi. The integral is the trapezoid rule in log r; below the first
    r the error is taken constant. With times per position (38) each position has its own r.

    tokens: (N, L). Returns (r (K,) of the middle position, bound (K, N)) for K = points values of
    r*: the smallest mean over rows is the one to report."""
    t = bound_grid(model, points)
    r = (model.path.beta(t) / model.path.alpha(t))[:, None]  # (K + 1, 1, 1 or L)
    factor = model.noise_factor().cpu().double()
    whiten = torch.linalg.pinv(factor, rtol=3e-5).to(model.head)  # 0 on what W does not span
    device = model.head.device
    bound = np.zeros((points, len(tokens)))
    for first in tqdm(range(0, len(tokens), batch_size), "bound", leave=False, disable=None):
        index = np.arange(first, min(first + batch_size, len(tokens)))
        x1 = torch.from_numpy(tokens[index].astype(np.int64)).to(device)
        errors = []
        for k, now in enumerate(t.to(whiten)):
            now = now.expand(len(index), -1)
            xi = Draw(seed, k, index, device).normal(x1.shape[1], model.noise_size).to(whiten)
            states = [model.interpolate(noise, x1, now) for noise in (xi, -xi)]
            a, b = (diagonal_errors(model, model(y, now, now), x1, whiten) for y in states)
            errors.append((a + b).cpu().double() / 2)
        ce, error = torch.stack(errors, 1)  # (K + 1, B, L) each
        area = r**2 * error  # the integrand in log r
        steps = (area[2:] + area[1:-1]) / 2 * (r[2:] / r[1:-1]).log()
        below = r[1] ** 2 * error[:1] / 2  # from r = 0 to the first value
        integral = torch.cat([below, steps]).cumsum(0)
        bound[:, index] = (ce[1:] + integral).sum(-1).numpy()
    return r[1:, 0, r.shape[2] // 2].numpy(), bound


# ---- Other scores of samples, rows of token ids, and their intervals; equal entropy; controls. -
def entropies(rows):
    """-sum p log p in nats of each row's own token counts, padding included: (N,)."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in rows]
    return np.array([-(p * np.log(p)).sum() for p in shares])


def grammar_scores(rows, train_rows):
    """(Whether each row is grammatical, float (N,); exact scores of those that are, a dict)."""
    log_probs = np.array([prepare_data.grammar_log_prob(row) for row in rows])
    grammatical = np.isfinite(log_probs)
    good = [np.asarray(rows[i], np.uint16).tobytes() for i in np.flatnonzero(grammatical)]
    seen = {row.tobytes() for row in np.asarray(train_rows, np.uint16)}
    return grammatical.astype(float), {
        "nll": float(-log_probs[grammatical].mean()) if good else None,  # nats a sentence
        "source_entropy": prepare_data.grammar_entropy(),
        "distinct": len(set(good)) / max(1, len(good)),
        "in_training": sum(row in seen for row in good) / max(1, len(good)),
    }


def bootstrap(name, top, bottom, of=np.asarray):
    """{name: of(sum(top) / sum(bottom)), name_interval: its 95%} of two numbers (N,) per sample.

    Values that are not finite are None, and so is an interval if any resample has such a value."""
    N = len(top)
    drawn = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=1000)
    weights = np.concatenate([np.ones((1, N)), drawn])  # all samples once, then the resamples
    with np.errstate(invalid="ignore", divide="ignore"):
        values = of(weights @ top / (weights @ bottom))
    finite = np.isfinite(values)
    interval = np.quantile(values[1:], [0.025, 0.975]).tolist() if finite.all() else None
    return {name: float(values[0]) if finite[0] else None, f"{name}_interval": interval}


def draw_at_entropy(target, model, nfe, count, batch_size, seed, dtype, **how):
    """(temperature, ids): samples whose mean entropy is `target`; the rest as in `draw_samples`.

    The temperature is the first of 0, 0.01, ..., 2 that reaches it; 2 if none does. The network
    runs once. Only the choice of tokens is repeated, with the same uniforms, from the hidden
    vectors of all samples, which stay on the device."""
    low = getattr(torch, dtype)
    head = model.head.to(low)
    kept = []

    def keep(model, B, normal, **how):
        fresh = functools.partial(normal, model.config.seq_len)
        hidden = generate(model, fresh(), normal=fresh, **how)
        kept.append(([(weight, h.to(low)) for weight, h in hidden], uniforms(fresh())))
        return choose(model.head, hidden)

    def redraw(n):
        parts = [choose(head, hidden, n / 100, uniform) for hidden, uniform in kept]
        return torch.cat(parts).cpu().numpy()

    draw_samples(model, nfe, count, batch_size, seed, dtype, write=keep, **how)
    n = bisect.bisect_left(range(200), target, key=lambda n: entropies(redraw(n)).mean())
    return n / 100, redraw(n)


def to_ids(texts, meta):
    """Token ids (n,) of each text, cut at L; on the grammar padded to L, and not cut."""
    L = meta["seq_len"]
    rows = [np.array(ids, np.int64) for ids in map(encoder(meta), texts)]
    if meta["tokenizer"] != "grammar":
        return [row[:L] for row in rows]
    return [np.pad(row, (0, max(0, L - len(row))), constant_values=meta["pad_id"]) for row in rows]


def control_rows(meta, train, val, count, seed):
    """{name: rows of ids}: validation rows, their words shuffled, and unigram draws, `count` each.

    BOS and EOS stay in place. Shuffled text is tokenised again: its rows differ in length."""
    rng = np.random.default_rng([seed, 1])
    frame = int(meta["bos_id"] is not None)
    inner = slice(frame, meta["seq_len"] - frame)
    real = val[np.sort(rng.permutation(len(val))[:count])].astype(np.int64)
    texts = []
    for row in real:
        parts = re.split(r"(\s+)", decode(meta, row[inner]))  # words, with white space between
        parts[::2] = rng.permutation(parts[::2])
        texts.append("".join(parts))
    bodies = [ids[: inner.stop - frame] for ids in to_ids(texts, meta)]
    ends = zip(real[:, :frame], bodies, real[:, inner.stop :], strict=True)
    shuffled = [np.concatenate(parts) for parts in ends]
    counts = np.bincount(train[:, inner].ravel(), minlength=meta["vocab_size"])
    unigram = real.copy()
    unigram[:, inner] = rng.choice(len(counts), real[:, inner].shape, p=counts / counts.sum())
    return {"validation rows": real, "their words shuffled": shuffled, "unigram draws": unigram}


# ---- Machinery: skip at first reading. ---------------------------------------------------------
def load_judge(name, device, length=1):
    """(causal language model in float32 that reads `length` tokens, tokenizer): folder or hub."""
    advice = "give a folder, or a hub name and a network; needs pip install -e '.[eval]'"
    with explain(f"--judge {name}", advice):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        judge = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        if length > (getattr(judge.config, "max_position_embeddings", None) or length):
            raise ValueError(f"it cannot read {length} tokens")
    return judge.to(device).eval(), tokenizer


def judge_ids(texts, tokenizer, max_length):
    """The judge's token ids of each text, a list each, cut at max_length."""
    how = dict(add_special_tokens=False, truncation=True, max_length=max_length)
    return tokenizer(texts, **how)["input_ids"]


def score_samples(meta, train, judge, name, rows, texts=None, **facts):
    """A row of the table, for samples as rows of ids, or as texts without a data set (meta {}).

    judge: arguments of `judge_scores`; on the grammar None."""
    texts = texts or [decode(meta, row) for row in rows]
    rows = judge_ids(texts, *judge[1:3]) if rows is None else rows
    result = {"model": name, **facts, "samples": len(rows)}
    extra = {}
    if judge:
        result |= bootstrap("gen_ppl", *judge_scores(texts, *judge).T, np.exp)
    else:
        good, extra = grammar_scores(rows, train)
        result |= bootstrap("grammatical", good, np.ones(len(good)))
    return result | {"entropy": float(entropies(rows).mean())} | extra


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
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def bound_row(args, name, model, folder, meta, _, val):
    """A row of the table: the bound, in nats a token without BOS and EOS, at its best r*."""
    chosen = np.random.default_rng([args.seed, 2]).permutation(len(val))[: args.bound]
    rows = val[np.sort(chosen)]
    tokens_per_row = meta["seq_len"] - 2 * (meta["bos_id"] is not None)
    r, bound = likelihood_bound(model, rows, args.seed, args.batch_size)
    best = bound.mean(1).argmin()
    nats = bound[best] / tokens_per_row
    row = {
        "model": name,
        "data": folder.name,
        "rows": len(rows),
        "r*": float(r[best]),
        "nats_a_token": float(nats.mean()),
        "standard_error": float(nats.std(ddof=1) / len(nats) ** 0.5) if len(nats) > 1 else None,
        "perplexity": math.exp(nats.mean()),
    }
    if meta["tokenizer"] == "grammar":  # the exact likelihood of the same rows
        log_probs = [prepare_data.grammar_log_prob(ids) for ids in rows]
        row["source"] = -float(np.mean(log_probs)) / tokens_per_row
    return row


def model_rows(args, score, name, model, euler, block_size):
    """Yield rows of the table for one model: every combination of NFE, gamma and temperature."""
    how = dict(batch_size=args.batch_size, seed=args.seed, dtype=args.dtype, euler=euler)
    temperatures = [None] if args.entropy else args.temperature
    for nfe, gamma, T in itertools.product(args.nfe, args.gamma, temperatures):
        if nfe == 1 and gamma != args.gamma[0]:
            continue  # gamma acts between jumps
        how |= dict(gamma=gamma, count=args.num_samples)
        if args.entropy:
            T, ids = draw_at_entropy(args.entropy, model, nfe, **how)
            if T in (0, 2):
                say(f"{name}, {nfe} NFE: no temperature from 0 to 2 gives --entropy {args.entropy}")
        else:
            ids = draw_samples(model, nfe, temperature=T, block_size=block_size, **how)
        facts = dict(sampler="euler" if euler else "flow-map", nfe=nfe, gamma=gamma, temperature=T)
        yield score(name, ids, **facts)


def evaluation(args, sets):
    """Yield ("results" or "bound", a row of that table): controls, files, then each model."""
    meta, train, val = next(iter(sets.values()), ({}, None, None))
    files = [(path.name, read_samples(path)) for path in args.samples]
    files = [(name, to_ids(texts, meta) if meta else None, texts) for name, texts in files]
    if args.nfe or files:
        judge = None
        if meta.get("tokenizer") != "grammar":
            length = meta.get("seq_len", 1024)
            judge = (*load_judge(args.judge, args.device, length), length, args.judge_batch)
        score = functools.partial(score_samples, meta, train, judge)
        controls = control_rows(meta, train, val, args.num_samples, args.seed) if meta else {}
        for inputs in (*controls.items(), *files):
            yield "results", score(*inputs, sampler=None, nfe=None, gamma=None, temperature=None)
    for path in args.checkpoint:
        model, facts, euler = load_sampler(path, args.device)
        name = path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"
        if args.nfe:
            size = facts["args"].get("block_size")
            rows = model_rows(args, score, name, model, euler, size)
            yield from (("results", row) for row in rows)
        if args.bound:
            for folder, data in sets.items():
                yield "bound", bound_row(args, name, model, folder, *data)
        del model  # before the next one is loaded


def read_samples(path):
    """The texts in a file: .jsonl has {"text": ...} on a line, any other a sample on a line."""
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    lines = text.removesuffix("\n").split("\n")  # not at U+2028
    if path.suffix == ".jsonl":
        lines = [json.loads(line)["text"] for line in lines if line]
    if not any(lines):
        raise SystemExit(f"--samples {path} has no text: give lines, or JSON lines with a text")
    return lines


def data_sets(args, saved):
    """{folder: (meta, train rows, validation rows)} of --data, or of what was trained on."""
    folders = args.data or [Path(facts["args"]["data"]) for facts in [*saved.values()][-1:]]
    keys = ["seq_len"] if args.data else ["seq_len", "sha256"]  # other rows must be asked for
    sets = {}
    for folder in folders:
        meta = read_meta(folder)
        train = read_rows(folder, "train", meta)
        train = train[:: math.ceil(len(train) / 50_000) or 1]  # at most 50,000 rows, evenly spaced
        sets[folder] = meta, train, read_rows(folder, "val", meta)
        for path, facts in saved.items():
            same_tokens(path, facts["meta"], folder, meta, *keys)
    return sets


def parse_args():
    parser = prepare_data.new_parser(__doc__)
    add = parser.add_argument
    paths = dict(type=Path, nargs="+", default=[])
    add("--checkpoint", **paths, help="checkpoints or run folders (default: runs/owt-esd)")
    add("--samples", **paths, help="samples made elsewhere: .jsonl or text (default: none)")
    add("--data", **paths, help="first for controls, all for the bound (default: as trained)")
    add("--entropy", type=float, help="draw at the temperature of this entropy, nats")
    add("--bound", type=positive, help="bound this many validation rows; alone, without --nfe")
    add("--output", type=Path, help="JSON (default: evaluation.json or bound.json by the model)")
    add("--judge", default="gpt2-large", help="language model for gen-PPL: hub name or folder")
    add("--judge-batch", type=positive, default=8, help="texts the judge reads at once")
    sample.sampling_flags(parser, count=1024, several=True)
    parser.set_defaults(nfe=None)
    args = parse(parser)
    if not args.checkpoint and not args.samples:
        args.checkpoint = [Path("runs/owt-esd")]
    if args.nfe is None:
        args.nfe = [] if args.bound else [1]
    if not args.output:
        last = args.checkpoint[-1] if args.checkpoint else Path()
        stem = "evaluation" if args.nfe or args.samples else "bound"
        of_file = last.parent / f"{stem}-{last.stem}.json"
        args.output = last / f"{stem}.json" if last.is_dir() else of_file
    return args


def main():
    args = parse_args()
    saved = {path: load_sampler(path, args.device)[1] for path in args.checkpoint}
    check_output("--output", args.output, ".json")
    if (args.bound or args.entropy) and any(f["args"].get("block_size") for f in saved.values()):
        raise SystemExit("--bound and --entropy need models of whole rows, without --block-size")
    sets = data_sets(args, saved)
    found = dict(args=vars(args), commit=commit(), results=[], bound=[], torch=torch.__version__)
    found["data"] = {str(folder.resolve()): meta["sha256"] for folder, (meta, *_) in sets.items()}
    found["checkpoints"] = [{"path": str(p), "step": facts["step"]} for p, facts in saved.items()]
    if args.output.exists():
        args.output.replace(f"{args.output}.old")
    for name, row in evaluation(args, sets):
        found[name].append(row)
        say(", ".join(f"{key} {cell(value)}" for key, value in row.items() if value is not None))
        with atomic_write(args.output) as file:  # a killed evaluation keeps the rows so far
            file.write(json.dumps(found, indent=1, default=str) + "\n")
    say("\n\n".join(table(found[name]) for name in ("results", "bound") if found[name]))
    say(f"written to {args.output}")


if __name__ == "__main__":
    main()
