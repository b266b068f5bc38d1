"""Write text with a trained model in any number of network evaluations (NFE).

    python sample.py --nfe 1                              # one jump, from runs/owt-esd
    python sample.py --checkpoint runs/grammar-psd --nfe 1 2 4
    python sample.py --checkpoint runs/owt-diagonal --nfe 64          # stage 1: Euler steps
    python sample.py --nfe 8 --gamma 1 --output samples.jsonl         # renoise between jumps
    python sample.py --prompt "In 1969" --nfe 8 --guidance 1.5        # trained with --context any

Prints the text and, with --output, writes it as JSON, one {"text": ...} a line. The state stays in
the embedding: y of shape (B, L, D), not (B, L, V).
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import (
    Conditional,
    Draw,
    atomic_write,
    load_model,
    logit_chunks,
    parse,
    softmax,
)
from prepare_data import decode, encoder, new_parser, positive, say

# ------------------------------------------------------------------------------------------------
# The sampler.


@torch.no_grad()
def generate(model, xi, nfe, euler=False, gamma=0.0, guidance=1.0, normal=None, after_jump=None):
    """Jump `nfe` times from standard normals xi (B, L, model.noise_size), and return the last psi.

    A jump is X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50). The last one ends at data, where
    X_s1 = psi_s1: a sample is its most probable tokens, or drawn from it, by `choose`. That takes
    psi as returned here, pairs (weight, h) of hidden vectors h (B, L, D).

    euler: psi_ss for psi_st, as a diagonal can do; on the linear path Euler's method on (52).
    gamma: in [0, 1], renoises between jumps; 1 jumps to data each time (multistep consistency).
    guidance: see `branches`.
    normal(): returns fresh normals like xi, for gamma.
    after_jump(y, t, hidden): returns the states to go on with at time t, after every jump but the
        last. hidden: the pairs of that jump.
    """
    y = model.embed_noise(xi)
    networks = branches(model, guidance)
    for k, (s, landing, t) in enumerate(jump_times(model, nfe, gamma, xi), 1):
        end = s if euler else landing
        hidden = [(weight, network(y, s, end)) for weight, network in networks]
        if k == nfe:
            break
        psi_W = sum(weight * model.soft_embedding(h) for weight, h in hidden)
        y = model.path.flow_map(y, psi_W, s, landing)
        if gamma:
            y = renoise(model, y, landing, t, normal())
        if after_jump:
            y = after_jump(y, t, hidden)
    return hidden


def jump_times(model, nfe, gamma, like):
    """Times (s, landing, t) of each jump, (B, 1 or L) each: s to `landing`, then `renoise` to t.

    The grid is uniform in progress; a jump to tau lands at tau + gamma (1 - tau).
    """
    tau = torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]
    grid = model.times(tau).to(like.device, like.dtype)
    landings = model.times(tau + gamma * (1 - tau)).to(like.device, like.dtype)
    jumps = zip(grid[:-1], landings[1:], grid[1:], strict=True)
    return [tuple(time.expand(len(like), -1) for time in jump) for jump in jumps]


def branches(model, guidance):
    """Pairs (weight, network) whose mix is psi_0 + guidance (psi_c - psi_0) (section 4.2).

    psi_0 ignores the context of a `Conditional` model. The drift is affine in psi, so mixing
    denoisers guides it exactly; mixing flow maps agrees with that for short jumps only.
    """
    if guidance == 1:
        return [(1.0, model)]
    if guidance == 0:
        return [(1.0, model.without_context())]
    return [(guidance, model), (1 - guidance, model.without_context())]


def renoise(model, y, u, t, xi):
    """A state y at time u -> one at an earlier time t: a y + sqrt(alpha_t^2 - a^2 alpha_u^2) x0 W.

    a = beta_t / beta_u, x0 W is fresh noise from normals xi (B, L, noise_size). Given x1, the
    result has the law of the path at t if y has it at u.
    """
    path = model.path
    a = path.beta(t) / path.beta(u)
    variance = path.alpha(t) ** 2 - (a * path.alpha(u)) ** 2
    added = variance.clamp(min=0).sqrt()  # rounding can leave it below 0 where u = t
    return a[..., None] * y + added[..., None] * model.embed_noise(xi)


def choose(head, hidden, temperature=0.0, uniform=None):
    """Tokens (B, L) of psi = sum of weight * softmax(h @ head.T) over the pairs in `hidden`.

    The most probable ones or, with temperature T > 0, draws from psi^(1/T) by `uniform` (B L,)
    in [0, 1). A psi below 0 counts as 0.
    """
    weights = [weight for weight, _ in hidden]
    tokens = []
    for chunk in zip(*(logit_chunks(h, head) for _, h in hidden), strict=True):
        psi = sum(w * softmax(z) for w, (_, z) in zip(weights, chunk, strict=True))
        if not temperature:
            tokens.append(psi.argmax(-1))
            continue
        rows = chunk[0][0]
        total = softmax(psi.clamp(min=0).log() / temperature).cumsum(-1)
        point = uniform[rows, None] * total[:, -1:]
        tokens.append(torch.searchsorted(total, point, right=True).squeeze(1))
    return torch.cat(tokens).view(hidden[0][1].shape[:-1])


def uniforms(xi):
    """One uniform in [0, 1) for each position, (B L,): Phi of the first of its normals."""
    return torch.special.ndtr(xi[..., 0]).flatten().clamp(max=1 - 2**-24)


# ------------------------------------------------------------------------------------------------
# Whole rows, and text after a prompt. `normal(n)` returns standard normals (B, n, noise_size);
# `how` are arguments of `generate`, and temperature.


@torch.no_grad()
def write_block(model, n, normal, temperature=0.0, **how):
    """Tokens (B, n), written at once."""
    fresh = functools.partial(normal, n)
    hidden = generate(model, fresh(), normal=fresh, **how)
    uniform = uniforms(fresh()) if temperature else None
    return choose(model.head, hidden, temperature, uniform)


def write_rows(model, B, normal, block_size=None, **how):
    """Tokens (B, L): whole rows, at once or, if the model was trained on blocks, block by block."""
    L = model.config.seq_len
    if not block_size:
        return write_block(model, L, normal, **how)
    nothing = torch.zeros(B, 0, dtype=torch.long, device=model.head.device)
    return continue_text(model, nothing, L, block_size, normal, **how)


@torch.no_grad()
def continue_text(model, tokens, length, block_size, normal, guidance=1.0, window=None, **how):
    """Extend a prompt (B, p), p >= 0, block by block to `length` tokens: int64 (B, length).

    Blocks are whole, or end with the row, as in training; what is beyond `length` is cut off. Keys
    and values are computed once for the prompt and each finished block, until the text outgrows the
    window (default: the model's L). Then it slides, and each block encodes its context again: the
    latest tokens that leave it room.
    """
    window = window or model.config.seq_len
    start = 0  # where the window begins
    encoded = 0  # `keys` hold the tokens from `start` to here
    keys = None
    while tokens.shape[1] < length:
        written = tokens.shape[1]
        n = block_size if length > window else min(block_size, window - written)
        if written + n - start > window:
            start = encoded = written + n - window
            keys = None
        if written > encoded:
            keys = model.encode(tokens[:, encoded:], past=keys)
            encoded = written
        positions = torch.arange(written - start, written - start + n, device=tokens.device)
        block = Conditional(model, keys, positions)
        weight = guidance if keys else 1.0
        new = write_block(block, n, normal, guidance=weight, **how)
        tokens = torch.cat([tokens, new], 1)
    return tokens[:, :length]


def in_batches(write, model, count, batch_size, seed, dtype="float32", label="sampling"):
    """[write(model, B, normal)] of batches of B, `count` samples in all.

    The normals of sample i depend only on (seed, i).
    """
    device = model.head.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    results = []
    starts = range(0, count, batch_size)
    for first in tqdm(starts, desc=label, unit="batch", leave=False, disable=None):
        draw = Draw(seed, 0, np.arange(first, min(first + batch_size, count)), device)

        def normal(n, draw=draw):
            return draw.normal(n, model.noise_size)

        with autocast:
            results.append(write(model, len(draw.rows), normal))
    return results


def draw_samples(model, nfe, count, batch_size, seed, dtype="float32", write=write_rows, **how):
    """`count` samples: token ids, int64 numpy (count, L). `write` makes a batch, given `how`."""
    write = functools.partial(write, nfe=nfe, **how)
    parts = in_batches(write, model, count, batch_size, seed, dtype, f"{nfe} NFE")
    return torch.cat(parts).cpu().numpy()


# ------------------------------------------------------------------------------------------------
# Machinery: skip at first reading


def load_sampler(path, device):
    """(model, checkpoint, euler): a network ready to sample; euler if it is of stage 1."""
    model, checkpoint = load_model(path, device)
    model.hold_noise()
    decode(checkpoint["meta"], [0])  # a missing tokenizer shows before the work, not after
    return model, checkpoint, "loss" not in checkpoint["args"]


def check_output(flag, path, suffix):
    """SystemExit, before any work, if `path` cannot be written or has another suffix."""
    if path.suffix != suffix or path.is_dir() or not os.access(path.parent, os.W_OK):
        expected = f"expected a {suffix} file in a folder that exists and is writable"
        raise SystemExit(f"{flag} {path}: {expected}; name another")


def check_context(args, trained):
    """SystemExit if the model cannot continue the prompt. trained: the flags of its training."""
    if not trained.get("context"):
        found = f"{args.checkpoint} was trained without --context"
        raise SystemExit(f"{found}; --prompt needs a model trained with --context any or block")
    dropout = trained["context_dropout"]
    guided = trained.get("guidance", 1)
    if args.guidance != 1 and (guided != 1 or not dropout):
        found = f"{args.checkpoint} has --context-dropout {dropout} and --guidance {guided}"
        raise SystemExit(f"{found}, expected some dropout and guidance 1; drop --guidance here")


def prompt_writer(args, meta, trained):
    """The `write` of `draw_samples` for --prompt. trained: the flags of the model's training."""
    L = meta["seq_len"]
    length = args.length or L
    size = args.block_size or trained["block_size"] or L
    bos = [] if meta["bos_id"] is None else [meta["bos_id"]]
    tokens = torch.tensor(bos + encoder(meta)(args.prompt), dtype=torch.long)
    found = f"the prompt has {len(tokens)} tokens, BOS included"
    if len(tokens) >= length:
        raise SystemExit(f"{found}, and --length is {length}: shorten the prompt")
    whole = trained["block_size"] if trained["context"] == "block" else 1
    if len(tokens) % whole or size % whole:
        expected = f"--context block learned multiples of {whole}; change the prompt or the blocks"
        raise SystemExit(f"{found}, and --block-size is {size}: {expected}")
    # Framed rows end with EOS at position L - 1: a text that goes on must not use that position.
    window = L - whole if bos and length > L else L
    if length > L and size >= window:
        raise SystemExit(f"--length {length} is beyond L = {L}: give a --block-size below {window}")

    def write(model, B, normal, **how):
        rows = tokens.to(model.head.device).expand(B, -1)
        return continue_text(model, rows, length, size, normal, args.guidance, window=window, **how)

    return write


def sampling_flags(parser, count, several=False):
    """The flags that sampling and evaluation share; with `several`, gamma and T take lists."""
    knob = dict(nargs="+", default=[0.0]) if several else dict(default=0.0)
    add = parser.add_argument_group("sampling").add_argument
    add("--nfe", type=positive, nargs="+", default=[1], help="network evaluations (jumps) a sample")
    add("--num-samples", type=positive, default=count, help="sequences for each NFE")
    add("--batch-size", type=positive, default=64, help="sequences at once; changes no sample")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--gamma", type=float, help="renoise between jumps: 0 never, 1 fully", **knob)
    add("--temperature", type=float, help="draw tokens from psi^(1/T); 0: most probable", **knob)


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/owt-esd"), help="a checkpoint or its folder")
    add("--output", type=Path, help="a .jsonl to write; NAME-NFE.jsonl if several --nfe")
    add = parser.add_argument_group("prompts; all need --prompt").add_argument
    add("--prompt", help="write on from here; needs --context any or block")
    add("--length", type=positive, help="tokens in all, prompt included (default: the model's L)")
    add("--block-size", type=positive, help="tokens written at once (default: as trained)")
    add("--guidance", type=float, default=1.0, help="weight of the context; 0 ignores it")
    sampling_flags(parser, count=4)
    args = parse(parser)
    if args.output:
        check_output("--output", args.output, ".jsonl")
    model, checkpoint, euler = load_sampler(args.checkpoint, args.device)
    meta = checkpoint["meta"]
    how = dict(euler=euler, gamma=args.gamma, temperature=args.temperature, dtype=args.dtype)
    if args.prompt is None:
        how["block_size"] = checkpoint["args"].get("block_size")
    else:
        check_context(args, checkpoint["args"])
        how["write"] = prompt_writer(args, meta, checkpoint["args"])
    for nfe in args.nfe:
        rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, **how)
        texts = [decode(meta, row) for row in rows]
        if args.output:
            stem = args.output.stem + (f"-{nfe}" if len(args.nfe) > 1 else "")
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
            with atomic_write(args.output.with_stem(stem)) as file:
                file.writelines(line + "\n" for line in lines)
        say("\n".join([f"--- {nfe} NFE", *(texts[:4] if args.output else texts)]))


if __name__ == "__main__":
    main()
