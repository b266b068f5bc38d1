"""Write text with a trained model in any number of network evaluations (NFE).

    python sample.py --nfe 1                              # one jump, from runs/owt-esd
    python sample.py --checkpoint runs/demo-diagonal --nfe 16 64      # stage 1: Euler steps
    python sample.py --nfe 8 --gamma 1 --output samples.jsonl         # renoise between jumps
    python sample.py --prompt "In 1969" --nfe 8 --guidance 1.5        # trained with --context any

Prints the text and, with --output, writes it as JSON, one {"text": ...} a line.
"""

import functools
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from model import Conditional, Draw, atomic_write, load_model, logit_chunks, parse, softmax
from prepare_data import decode, encoder, new_parser, positive, say


# ---- The sampler. ------------------------------------------------------------------------------
@torch.no_grad()
def generate(model, xi, nfe, euler=False, gamma=0.0, guidance=1.0, normal=None, after_jump=None):
    """Jump `nfe` times from standard normals xi (B, L, model.noise_size), and return the last psi.

    A jump is X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50). The last one ends at data, where
    X_s1 = psi_s1. It is returned as pairs (weight, h) of hidden vectors h (B, L, D), which
    `choose` turns into tokens: the most probable ones, or draws.

    euler: psi_ss for psi_st, as a diagonal can do; on the linear path Euler's method on (52).
    gamma: in [0, 1], renoises between jumps; 1 jumps to data each time (multistep consistency).
    guidance: see `branches`. normal(): returns fresh normals like xi, for gamma.
    after_jump(y, t, hidden): called after each jump but the last; returns the next states."""
    y = model.embed_noise(xi)
    tau = torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]  # uniform in progress
    grid = model.times(tau)
    landings = model.times(tau + gamma * (1 - tau))  # where a jump to tau lands, to be renoised
    jumps = torch.stack([grid[:-1], landings[1:], grid[1:]], 1).to(xi)
    jumps = jumps[:, :, None].expand(-1, -1, len(xi), -1)  # (nfe, 3, B, 1 or L)
    networks = branches(model, guidance)
    for k, (s, landing, t) in enumerate(jumps, 1):
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


def branches(model, guidance):
    """Pairs (weight, network) whose mix is psi_0 + guidance (psi_c - psi_0) (section 4.2).

    psi_0 ignores the context of a `Conditional` model. The drift is affine in psi, so mixing
    denoisers guides it exactly; mixing flow maps agrees with that for short jumps only."""
    if guidance == 1:
        return [(1.0, model)]
    return [(guidance, model), (1 - guidance, model.without_context())]


def renoise(model, y, t, s, xi):
    """A state y at time t -> one at an earlier time s: a y + sqrt(alpha_s^2 - a^2 alpha_t^2) x0 W.

    a = beta_s / beta_t, x0 W is fresh noise from normals xi (B, L, noise_size). Given x1, the
    result has the law of the path at s if y has it at t."""
    path = model.path
    a = path.beta(s) / path.beta(t)
    variance = path.alpha(s) ** 2 - (a * path.alpha(t)) ** 2
    added = variance.clamp(min=0).sqrt()  # rounding can leave it below 0 where s = t
    return a[..., None] * y + added[..., None] * model.embed_noise(xi)


def choose(head, hidden, temperature=0.0, uniform=None):
    """Tokens (B, L) of psi = sum of weight * softmax(h @ head.T) over the pairs in `hidden`.

    The most probable ones or, with temperature T > 0, draws from psi^(1/T) by `uniform` (B L,)
    in [0, 1). A psi below 0 counts as 0."""
    weights = [weight for weight, _ in hidden]
    tokens = []
    for chunk in zip(*(logit_chunks(h, head) for _, h in hidden), strict=True):
        psi = sum(w * softmax(z) for w, (_, z) in zip(weights, chunk, strict=True))
        if not temperature:
            tokens.append(psi.argmax(-1))
        else:
            total = softmax(psi.clamp(min=0).log() / temperature).cumsum(-1)
            rows, _ = chunk[0]
            point = uniform[rows, None] * total[:, -1:]
            tokens.append(torch.searchsorted(total, point, right=True).squeeze(1))
    return torch.cat(tokens).view(hidden[0][1].shape[:-1])


def uniforms(xi):
    """One uniform in [0, 1) for each position, (B L,): Phi of the first of its normals."""
    return torch.special.ndtr(xi[..., 0]).flatten().clamp(max=1 - 2**-24)


# ---- Whole rows, and text after a prompt. ------------------------------------------------------
@torch.no_grad()
def continue_text(
    model, tokens, length, block_size, normal, guidance=1.0, window=None, temperature=0.0, **how
):
    """Extend a prompt (B, p), p >= 0, block by block to `length` tokens: int64 (B, length).

    Blocks have block_size tokens, or fewer at the row's end; the result is cut to `length`. Keys
    and values of the text are kept until it outgrows the window (default: the model's L). Then that
    slides, and each block encodes its context again: the latest tokens that leave it room.
    normal(n): returns standard normals (B, n, noise_size). how: arguments of `generate`."""
    window = window or model.config.seq_len
    start = 0  # where the window begins
    keys = None  # of the tokens from there to `unread`
    unread = tokens
    while (written := tokens.shape[1]) < length:
        n = block_size if length > window else min(block_size, window - written)
        if written + n - start > window:
            start = written + n - window
            keys = None
            unread = tokens[:, start:]
        if unread.shape[1]:
            keys = model.encode(unread, past=keys)
        block = Conditional(model, keys, torch.arange(n, device=tokens.device) + written - start)
        fresh = functools.partial(normal, n)
        weight = guidance if keys else 1.0
        hidden = generate(block, fresh(), guidance=weight, normal=fresh, **how)
        uniform = uniforms(fresh()) if temperature else None
        unread = choose(model.head, hidden, temperature, uniform)
        tokens = torch.cat([tokens, unread], 1)
    return tokens[:, :length]


def write_rows(model, B, normal, prompt=(), length=None, block_size=None, **how):
    """Tokens (B, length): the token ids of a prompt, continued; by default from nothing to L."""
    tokens = torch.tensor([prompt] * B, dtype=torch.long, device=model.head.device)
    L = model.config.seq_len
    return continue_text(model, tokens, length or L, block_size or L, normal, **how)


def draw_samples(model, nfe, count, batch_size, seed, dtype="float32", write=write_rows, **how):
    """`count` samples, int64 numpy (count, L). The noise of sample i depends only on (seed, i)."""
    device = model.head.device

    def batch(first):
        B = min(batch_size, count - first)
        draw = Draw(seed, 0, range(first, first + B), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return write(model, B, lambda n: draw.normal(n, model.noise_size), nfe=nfe, **how)

    bar = tqdm(range(0, count, batch_size), f"{nfe} NFE", leave=False, disable=None)
    return torch.cat([batch(first) for first in bar]).cpu().numpy()


# ---- Machinery: skip at first reading. ---------------------------------------------------------
def load_sampler(path, device):
    """(model, the "args", "meta" and "step" of its checkpoint, whether it is of stage 1)."""
    model, checkpoint = load_model(path, device)
    model.hold_noise()
    decode(checkpoint["meta"], [0])  # a missing tokenizer shows before the work, not after
    facts = {name: checkpoint.get(name) for name in ("args", "meta", "step")}  # no optimizer
    return model, facts, "loss" not in facts["args"]


def check_output(flag, path, suffix):
    """SystemExit, before any work, if `path` cannot be written or has another suffix."""
    if path.suffix != suffix or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise SystemExit(f"{flag} {path}: name a {suffix} file in a folder that can be written")


def prompt_options(args, meta, trained):
    """Options of `write_rows` for --prompt, checked against the flags of the model's training."""
    L = meta["seq_len"]
    length = args.length or L
    size = args.block_size or trained.get("block_size") or L
    bos = [] if meta["bos_id"] is None else [meta["bos_id"]]
    prompt = bos + encoder(meta)(args.prompt)
    whole = trained["block_size"] if trained.get("context") == "block" else 1
    # Framed rows end with EOS at position L - 1: a text that goes on must not use that position.
    window = L - whole if bos and length > L else L
    p = len(prompt)
    found = f"the prompt has {p} tokens, BOS included"
    guidable = trained.get("context_dropout") and trained.get("guidance", 1) == 1
    misguided = args.guidance != 1 and not guidable
    for text, wrong in {
        "--prompt needs training with --context any or block": not trained.get("context"),
        "--guidance needs training with --context-dropout, without --guidance": misguided,
        f"{found}, and --length is {length}: shorten the prompt": p >= length,
        f"{found}, --block-size is {size}: give multiples of {whole}": p % whole or size % whole,
        f"to go beyond L = {L}, give a --block-size below {window}": length > L and size >= window,
    }.items():
        if wrong:
            raise SystemExit(f"{args.checkpoint}: {text}")
    how = dict(length=length, block_size=size, window=window, guidance=args.guidance)
    return how | {"prompt": prompt}


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
    model, facts, euler = load_sampler(args.checkpoint, args.device)
    how = dict(euler=euler, gamma=args.gamma, temperature=args.temperature, dtype=args.dtype)
    how["block_size"] = facts["args"].get("block_size")
    if args.prompt is not None:
        how |= prompt_options(args, facts["meta"], facts["args"])
    for nfe in args.nfe:
        rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, **how)
        texts = [decode(facts["meta"], row) for row in rows]
        if args.output:
            stem = args.output.stem + (f"-{nfe}" if len(args.nfe) > 1 else "")
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            with atomic_write(args.output.with_stem(stem)) as file:
                file.writelines(lines)
        say("\n".join([f"--- {nfe} NFE", *(texts[:4] if args.output else texts)]))


if __name__ == "__main__":
    main()
