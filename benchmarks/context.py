"""What a context and its guidance do: blocks written after held-out contexts, scored by a judge, beside three controls.

    python benchmarks/context.py --checkpoint runs/stories-diagonal/checkpoint.pt --judge runs/judge --nfe 32 --guidance 0 0.5 1 1.5 2
    python benchmarks/context.py --checkpoint runs/stories-guided/checkpoint.pt --judge runs/judge --nfe 1 4 \\
        --against runs/stories-diagonal/checkpoint.pt 1.5 64

For each of --contexts validation rows the first --prompt-length tokens are kept and one block is written after them, from the
same noise in every line of the table. Generative perplexity is that of context and block together, by evaluate.py's
protocol, and so is entropy; "block entropy" is the block's own. Controls: the real blocks, the same blocks each after another row's context, and,
for every line, its own blocks after other rows' contexts ("shuffled"). On the grammar the share of grammatical rows too.

--against FILE W N: the share of a line's tokens that are those of two-branch guidance with weight W by FILE in N evaluations
(Euler steps), from the same noise: for a network into which guidance was distilled.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import entropies, judge_scores, load_judge, table
from model import Draw, load_model, machine_flags, resolve_machine
from prepare_data import Parser, UserError, decode, grammar_log_prob, number, read_meta, read_rows, run
from sample import continue_text


def blocks(model, contexts, length, nfe, omega, euler, seed, batch_size=256):
    """One block of `length` tokens after each of the contexts (N, p): int64 numpy (N, length). Row i's noise depends on (seed, i) alone."""
    found = []
    for first in range(0, len(contexts), batch_size):
        part = contexts[first : first + batch_size].to(model.head.device)
        draw = Draw(seed, 0, np.arange(first, first + len(part)), model.head.device)
        normal = functools.partial(lambda draw, n: draw.normal(n, model.noise_size), draw)
        found.append(continue_text(model, part, part.shape[1] + length, length, normal, omega, nfe=nfe, euler=euler).cpu())
    return torch.cat(found).numpy()[:, contexts.shape[1] :]


def main():
    parser = Parser(prog="context.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of a model trained with --context")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set with the contexts (default: the one trained on)")
    parser.add_argument("--judge", required=True, metavar="NAME", help="causal LM: a hub name or a folder")
    parser.add_argument("--contexts", type=number(int, 2), default=512, help="validation rows")
    parser.add_argument("--prompt-length", type=number(int, 1), metavar="P", help="tokens of a context (default: all but a block, or half a row)")
    parser.add_argument("--nfe", type=number(int, 1), nargs="+", default=[32], metavar="N")
    parser.add_argument("--guidance", type=number(float, 0), nargs="+", default=[1.0], metavar="W")
    parser.add_argument("--against", nargs=3, metavar=("FILE", "W", "N"), help="compare with two-branch guidance of this checkpoint")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the noise")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    machine_flags(parser)
    args = parser.parse_args()
    resolve_machine(args)
    model, checkpoint = load_model(args.checkpoint, args.device)
    if checkpoint["args"].get("context") not in ("any", "block"):
        raise UserError(f"{args.checkpoint} was trained without a context before its blocks; train it with --context any or block")
    model.hold_noise()
    judge, folder = load_judge(args.judge, args.device), args.data or Path(checkpoint["args"]["data"])
    meta = read_meta(folder)
    rows = torch.from_numpy(read_rows(folder, "val", meta)[: args.contexts].astype(np.int64))
    L, learned = meta["seq_len"], checkpoint["args"]["block_size"]  # None: all that follows the context
    length = args.prompt_length or (L - learned if learned else L // 2)
    if length >= L:
        raise UserError(f"--prompt-length {length} leaves nothing of a row of {L} tokens")
    if learned and L - length != learned:
        raise UserError(
            f"--prompt-length {length} leaves a block of {L - length} tokens, and {args.checkpoint} learned {learned}; give {L - learned}"
        )
    contexts, real = rows[:, :length], rows[:, length:].numpy()
    results = []

    def line(name, found, **more):
        whole = [np.concatenate([contexts.numpy(), block], 1) for block in (found, np.roll(found, 1, axis=0))]
        sums = [judge_scores([decode(meta, row) for row in part], *judge, meta["seq_len"]).sum(0) for part in whole]
        ppl, shuffled = (float(np.exp(nll / tokens)) for nll, tokens in sums)
        result = {"blocks": name, "gen_ppl": ppl, "shuffled": shuffled, "entropy": float(np.mean(entropies(whole[0])))}
        result |= {"block_entropy": float(np.mean(entropies(found)))} | more
        if meta["tokenizer"] == "grammar":
            result |= {"grammatical": float(np.mean([np.isfinite(grammar_log_prob(row)) for row in whole[0]]))}
        results.append(result)

    reference = None
    if args.against:
        (file, weight, steps), euler = args.against, True
        reference = blocks(load_model(file, args.device)[0], contexts, real.shape[1], int(steps), float(weight), euler, args.seed)
        line(f"two branches, {weight}, {steps} NFE", reference, agreement=1.0)
    for nfe in args.nfe:
        for omega in args.guidance:
            found = blocks(model, contexts, real.shape[1], nfe, omega, "loss" not in checkpoint["args"], args.seed)
            line(f"guidance {omega:g}, {nfe} NFE", found, **({"agreement": float((found == reference).mean())} if args.against else {}))
    line("real", real, **({"agreement": float((real == reference).mean())} if args.against else {}))
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps({"flags": {k: str(v) for k, v in vars(args).items()}, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
