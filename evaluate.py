"""Score a model's samples by the number of network evaluations (NFE): one table, one JSON file.

    python evaluate.py --checkpoint runs/grammar-diagonal/checkpoint.pt runs/grammar-psd/checkpoint.pt --nfe 1 2 4 64
    python evaluate.py --nfe 1 2 4 8 --num-samples 1024                      # needs pip install -e .[eval]

Reads checkpoints of either stage, and data/NAME for the grammar's training rows. On the grammar the
scores are exact: the share of grammatical sentences, their mean log-probability beside the source's
entropy, the shares that are distinct and that stand in the training rows. On text: generative perplexity
under a causal language model, by the protocol that the field uses (see `generative_perplexity`).
The unigram entropy of each sample is given everywhere.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import resolve_machine
from prepare_data import Parser, UserError, decode, grammar_entropy, grammar_log_prob, grammar_rows, number, read_meta, read_rows, run, same_tokens
from sample import check_output, draw_samples, is_euler, load_sampler, sampling_flags


def unigram_entropy(rows):
    """-sum p log p in nats of each row's own token counts, averaged over rows (N, L)."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in rows]
    return float(np.mean([-(p * np.log(p)).sum() for p in shares]))


def grammar_scores(rows, train_rows):
    """Exact scores of samples (N, L) against the grammar and its training rows (M, L)."""
    log_probs = np.array([grammar_log_prob(row) for row in rows])
    good = rows[np.isfinite(log_probs)]
    seen = {row.tobytes() for row in train_rows.astype(np.uint16)}
    count = max(1, len(good))
    return {
        "grammatical": len(good) / len(rows),
        "nll": float(-log_probs[np.isfinite(log_probs)].mean()) if len(good) else None,  # nats a sentence
        "source_entropy": grammar_entropy(),
        "distinct": len(np.unique(good, axis=0)) / count,  # of the grammatical ones
        "in_training": sum(row.tobytes() in seen for row in good.astype(np.uint16)) / count,
    }


def load_judge(name, device):
    """(causal language model in float32, tokenizer) from a folder or the hub, through from_pretrained."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("generative perplexity needs transformers: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        judge = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    except Exception as error:  # the hub's client, the tokenizer and the weights each raise their own kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason given"
        raise UserError(f"no judge at {name!r}: {type(error).__name__}: {reason}; give --judge a hub name or a folder") from None
    tokenizer.pad_token = tokenizer.eos_token
    return judge, tokenizer


@torch.no_grad()
def generative_perplexity(texts, judge, tokenizer, max_length, batch_size=8):
    """exp(total NLL / tokens counted) of `texts` under `judge`: the field's protocol.

    Texts keep their special tokens; they are re-tokenised, truncated to max_length (the model's own L),
    padded with EOS. No BOS is put before, so the first token is not scored. Every token other than EOS
    counts, and the first EOS; padding never does. Every text counts, also those of a last, smaller batch.
    """
    nll, tokens = 0.0, 0
    for first in tqdm(range(0, len(texts), batch_size), desc="judging", unit="batch", leave=False, disable=None):
        batch = tokenizer(texts[first : first + batch_size], return_tensors="pt", padding=True, truncation=True, max_length=max_length)
        ids = batch["input_ids"].to(judge.device)
        if ids.shape[1] < 2:
            continue
        mask = batch["attention_mask"].to(judge.device)
        logits = judge(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        eos = ids == tokenizer.eos_token_id
        counted = (~eos | (eos.cumsum(1) == 1)) & mask.bool()
        nll += losses[counted[:, 1:]].sum(dtype=torch.float64).item()
        tokens += counted[:, 1:].sum().item()
    return math.exp(nll / tokens) if tokens else math.nan


def table(rows):
    """A list of dicts with the same keys as lines of Markdown, columns aligned."""
    cells = [["" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    header = [name.replace("_", " ") for name in rows[0]]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in [header, *cells]]
    return [lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]]


def load_pyplot():
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot, path, results):
    """NFE against the main score, one line a model, to a PNG: the share grammatical, or gen-PPL on log axes."""
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    score = "grammatical" if "grammatical" in results[0] else "gen_ppl"
    for name in dict.fromkeys(result["model"] for result in results if result["nfe"]):
        points = [(result["nfe"], result[score]) for result in results if result["model"] == name]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network evaluations", ylabel="share grammatical" if score == "grammatical" else "generative perplexity")
    axes.set(ylim=(0, 1.03)) if score == "grammatical" else axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def main():
    parser = Parser(prog="evaluate.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[Path("runs/owt-esd/checkpoint.pt")], metavar="FILE", help="of either stage")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set, for training rows (default: the one trained on)")
    parser.add_argument("--judge", default="gpt2-large", metavar="NAME", help="causal LM for text: a hub name or a folder")
    parser.add_argument("--judge-batch", type=number(int, 1), default=8, help="texts the judge reads at once")
    parser.add_argument("--show", type=number(int, 0), default=0, metavar="N", help="print N samples a row of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: evaluation.json beside the last checkpoint)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw NFE against the main score, as PNG")
    sampling_flags(parser, count=1024)
    args = parser.parse_args()
    resolve_machine(args)
    args.output = args.output or args.checkpoint[-1].parent / "evaluation.json"
    check_output("--output", args.output, args.checkpoint)
    check_output("--plot", args.plot, [args.output, *args.checkpoint])
    pyplot = load_pyplot() if args.plot else None
    loaded = [load_sampler(path, args) for path in args.checkpoint]
    kinds = {checkpoint["meta"]["tokenizer"] == "grammar" for _, checkpoint in loaded}
    if len(kinds) > 1:
        raise UserError("--checkpoint mixes models of the grammar with models of text; evaluate them apart")

    on_grammar = kinds == {True}
    results, shown = [], []
    if on_grammar:
        folder = args.data or Path(loaded[-1][1]["args"]["data"])
        meta = read_meta(folder)
        for path, (_, checkpoint) in zip(args.checkpoint, loaded, strict=True):
            same_tokens(path, checkpoint["meta"], folder, meta)
        train_rows = read_rows(folder, "train", meta)
        fresh = grammar_rows(args.num_samples, [args.seed, 2])  # what a perfect model would write; train and val are draws 0 and 1
        results = [{"model": "the grammar itself", "sampler": "", "nfe": 0, "entropy": unigram_entropy(fresh)} | grammar_scores(fresh, train_rows)]
        shown = [[]]
    else:
        judge = load_judge(args.judge, args.device)
    for path, (model, checkpoint) in zip(args.checkpoint, loaded, strict=True):
        meta, euler = checkpoint["meta"], is_euler(args, checkpoint)
        for nfe in args.nfe:
            rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, euler, args.dtype)
            texts = [decode(meta, row) for row in rows]
            name = path.parent.name or str(path)
            scores = {"model": name, "sampler": "euler" if euler else "flow-map", "nfe": nfe, "entropy": unigram_entropy(rows)}
            if on_grammar:
                scores |= grammar_scores(rows, train_rows)
            else:
                scores["gen_ppl"] = generative_perplexity(texts, *judge, meta["seq_len"], args.judge_batch)
            results.append(scores)
            shown.append(texts[: args.show])
    print("\n".join(table(results)))
    for scores, texts in zip(results, shown, strict=True):
        if texts:
            print(f"\n{scores['model']}, {scores['nfe']} NFE:")
            print("\n".join(f"  {text}" for text in texts))
    args.output.write_text(json.dumps({"num_samples": args.num_samples, "seed": args.seed, "judge": None if on_grammar else args.judge,
                                       "results": results}, indent=1) + "\n")  # fmt: skip
    print(f"\nwritten to {args.output}")
    if args.plot:
        plot(pyplot, args.plot, results)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    run(main)
