"""What a context and its guidance do: blocks written after held-out contexts, scored by a judge.

    python benchmarks/context.py --checkpoint runs/stories --judge runs/judge --nfe 32 \\
        --guidance 0 0.5 1 1.5 2
    python benchmarks/context.py --checkpoint runs/guided --judge runs/judge --nfe 1 4 \\
        --against runs/stories 1.5 64

The first --prompt-length tokens of validation rows are kept, and one block is written after them,
from the same noise in every row of the table. Generative perplexity (evaluate.judge_scores) and
entropy are those of context and block together; "block entropy" is the block's own. "Shuffled" is
the perplexity of the same blocks after other rows' contexts. The last row has the real blocks.

--against PATH W N: the share of tokens that are those of guidance with weight W by the model PATH
in N Euler steps, for a model into which that guidance was distilled.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import entropies, judge_scores, load_judge, table
from model import parse
from prepare_data import Help, decode, grammar_log_prob, read_meta, read_rows
from sample import check_output, continue_text, draw_samples, load_sampler

BATCH = 256


def blocks(sampler, contexts, L, nfe, guidance, args):
    """The block that ends each row: contexts (N, p) -> int64 numpy (N, L - p)."""
    model, _, euler = sampler
    p = contexts.shape[1]
    batches = iter(contexts.split(BATCH))

    def write(model, B, normal, **how):
        prompt = next(batches).to(model.head.device)
        return continue_text(model, prompt, L, L - p, normal, guidance, **how)

    count = len(contexts)
    return draw_samples(model, nfe, count, BATCH, args.seed, args.dtype, write, euler=euler)[:, p:]


def prompt_length(args, checkpoint, L):
    """--prompt-length or its default; SystemExit if the checkpoint was not trained for it."""
    context = checkpoint["args"].get("context")
    size = checkpoint["args"]["block_size"]
    length = args.prompt_length or (L - size if size else L // 2)
    if context not in ("any", "block") or not 0 < length < L or size not in (None, L - length):
        raise SystemExit(
            f"{args.checkpoint} was trained with --context {context} and --block-size {size}; that "
            f"does not fit {L - length} tokens after {length}: it needs --context any or block, "
            "and blocks of that size"
        )
    return length


def score(contexts, block, judge, meta):
    """The scores of one row of the table."""
    whole = np.concatenate([contexts, block], 1)
    mixed = np.concatenate([np.roll(contexts, -1, axis=0), block], 1)
    result = {}
    for name, rows in (("gen_ppl", whole), ("shuffled", mixed)):
        texts = [decode(meta, row) for row in rows]
        nll, tokens = judge_scores(texts, *judge, meta["seq_len"]).sum(0)
        result[name] = float(np.exp(nll / tokens))
    result["entropy"] = float(entropies(whole).mean())
    result["block_entropy"] = float(entropies(block).mean())
    if meta["tokenizer"] == "grammar":
        good = [np.isfinite(grammar_log_prob(row)) for row in whole]
        result["grammatical"] = float(np.mean(good))
    return result


def parse_args():
    parser = argparse.ArgumentParser(
        prog="context.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of a model trained with --context")
    add("--data", type=Path, help="data set with the contexts (default: the one trained on)")
    add("--judge", required=True, help="causal language model: a hub name or a folder")
    add("--contexts", type=int, default=512, help="validation rows")
    help = "tokens of a context (default: all but a block, or half a row)"
    add("--prompt-length", type=int, help=help)
    add("--nfe", type=int, nargs="+", default=[32], help="network evaluations a block")
    add("--guidance", type=float, nargs="+", default=[1.0], help="weights of the context")
    help = "compare with guidance W by this checkpoint in N steps"
    add("--against", nargs=3, metavar=("PATH", "W", "N"), help=help)
    add("--seed", type=int, default=0, help="of the noise")
    add("--output", type=Path, help="JSON to write")
    args = parse(parser)
    if args.output:
        check_output("--output", args.output, ".json")
    return args


def main():
    args = parse_args()
    sampler = load_sampler(args.checkpoint, args.device)
    folder = args.data or Path(sampler[1]["args"]["data"])
    meta = read_meta(folder)
    L = meta["seq_len"]
    p = prompt_length(args, sampler[1], L)
    rows = read_rows(folder, "val", meta)[: args.contexts].astype(np.int64)
    contexts = torch.from_numpy(rows[:, :p])
    found = {}
    if args.against:
        path, weight, steps = args.against
        model, checkpoint, _ = load_sampler(path, args.device)
        reference = blocks((model, checkpoint, True), contexts, L, int(steps), float(weight), args)
        found[f"{path}, guidance {weight}, {steps} NFE"] = reference
    for nfe in args.nfe:
        for guidance in args.guidance:
            block = blocks(sampler, contexts, L, nfe, guidance, args)
            found[f"guidance {guidance:g}, {nfe} NFE"] = block
    found["real"] = rows[:, p:]
    judge = load_judge(args.judge, args.device)
    results = []
    for name, block in found.items():
        result = {"blocks": name} | score(rows[:, :p], block, judge, meta)
        if args.against:
            result["agreement"] = float((block == reference).mean())
        results.append(result)
    print(table(results))
    if args.output:
        facts = {"args": vars(args), "results": results}
        args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
