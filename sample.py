"""Write text with a trained model, in any number of network evaluations (NFE).

    python sample.py --nfe 1                                     # one jump, from the run of distill.py --loss esd
    python sample.py --checkpoint runs/grammar-psd/checkpoint.pt --nfe 1 2 4
    python sample.py --checkpoint runs/owt-diagonal/checkpoint.pt --nfe 64      # stage 1: Euler steps
    python sample.py --nfe 32 --watch                            # a sequence crystallises in the terminal

Reads a checkpoint of either stage. Prints decoded text, and writes it to --output: one sample a line
(newlines inside a sample as \\n) or, for a name that ends in .npy, token ids of shape (samples, L).
The state stays in the embedding: y of shape (B, L, D), never (B, L, V).
"""

import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Draw, load_model, machine_flags, resolve_machine
from prepare_data import Parser, UserError, decode, number, one_line, run


@torch.no_grad()
def generate(model, xi, nfe, euler=False, temperature=1.0, gamma=0.0, sigma=1.0, normal=None, watch=None):
    """Tokens (B, L), int64, from standard normals xi (B, L, model.noise_size), in `nfe` network evaluations.

    The flow map jumps along the schedule's grid, X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50). The
    last jump ends at data, where X_s1 = psi_s1 (short of it by model.LAST): the sample is its most
    probable tokens. With `euler`, psi_ss takes the place of psi_st, which is all that a diagonal alone
    can do: on the linear path that is Euler's method for the drift (52), x + (t - s) b_s(x).

    Three knobs leave the trained law, and trade likely text for varied text (all neutral by default):
        temperature  divides the logits of psi in every jump, and so sharpens (below 1) or flattens psi along
                     the way; the sample is still the most probable token, so at one evaluation it does nothing
        gamma        in [0, 1], renoises between jumps: a jump to progress tau overshoots to tau + gamma (1 - tau), and
                     fresh noise, normal() -> like xi, brings the state back along the path. 0 is the flow map
                     alone, 1 jumps to data each time (multistep consistency sampling)
        sigma        scales the noise that it starts from
    watch(h), where given, is called with the hidden vectors (B, L, D) of each evaluation.
    """
    tau = torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]
    grid, overshot = (model.times(progress).to(xi.dtype).to(xi.device) for progress in (tau, tau + gamma * (1 - tau)))
    y = sigma * model.embed_noise(xi)
    for k in range(nfe):
        s, t, u = (time.expand(len(xi), -1) for time in (grid[k], grid[k + 1], overshot[k + 1]))
        h = model(y, s, s if euler else u)
        if watch:
            watch(h)
        if k < nfe - 1:
            y = model.path.flow_map(y, model.soft_embedding(h / temperature), s, u)
            if gamma:
                y = renoise(model, y, u, t, normal())
    return model.argmax(h)


def renoise(model, y, u, t, xi):
    """A state y at time u -> one at an earlier time t: a y + sqrt(alpha_t^2 - a^2 alpha_u^2) x0 W, with a = beta_t / beta_u.

    Given x1, it has the law of the path at t wherever y has it at u. xi: standard normals (B, L, noise_size).
    """
    path, a = model.path, model.path.beta(t) / model.path.beta(u)
    added = (path.alpha(t) ** 2 - (a * path.alpha(u)) ** 2).clamp(min=0).sqrt()  # 0 but for rounding where u = t
    return a[..., None] * y + added[..., None] * model.embed_noise(xi)


def draw_samples(model, nfe, count, batch_size, seed, euler, dtype="float32", watch=None, **knobs):
    """`count` samples in batches: token ids, int64 numpy (count, L). Sample i depends on (seed, i) alone.

    watch and knobs (temperature, gamma, sigma): see `generate`.
    """
    device = model.head.device
    rows, L = [], model.config.seq_len
    for first in tqdm(range(0, count, batch_size), desc=f"{nfe} NFE", unit="batch", leave=False, disable=True if watch else None):
        draw = Draw(seed, 0, np.arange(first, min(first + batch_size, count)), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            normal = functools.partial(draw.normal, L, model.noise_size)
            rows.append(generate(model, normal(), nfe, euler, normal=normal, watch=watch, **knobs).cpu())
    return torch.cat(rows).numpy()


def load_sampler(path, args):
    """load_model, with the flags that change how a model samples."""
    model, checkpoint = load_model(path, args.device)
    if args.position_lag is not None:
        model.position_lag = args.position_lag
    model.hold_noise()
    return model, checkpoint


def is_euler(args, checkpoint):
    """Whether to take Euler steps: by --sampler, or because the checkpoint is of stage 1."""
    return args.sampler == "euler" if args.sampler else "loss" not in checkpoint["args"]


def sampling_flags(parser, count, sweep=False):
    """The flags that sampling and evaluation share; with `sweep`, each knob of `generate` takes several values."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--nfe", type=number(int, 1, 100_000), nargs="+", default=[1], metavar="N", help="network evaluations a sample")
    group.add_argument("--num-samples", type=number(int, 1), default=count, help="sequences for each NFE")
    group.add_argument("--batch-size", type=number(int, 1), default=64, help="sequences at once; changes no sample")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise")
    group.add_argument("--sampler", choices=["flow-map", "euler"], help="default: flow-map after distill.py, euler for a stage-1 checkpoint")
    group.add_argument("--position-lag", type=number(float, 0, 10), metavar="W", help="earlier positions first (38); default: as trained")
    several = dict(nargs="+", default=[1.0]) if sweep else dict(default=1.0)
    group.add_argument("--temperature", type=number(float, 0, above=True), metavar="T", help="of psi along the way; no use at 1 NFE", **several)
    group.add_argument("--gamma", type=number(float, 0, 1), metavar="G", help="renoising between jumps: 0 none, 1 multistep consistency",
                       **several | {"default": [0.0] if sweep else 0.0})  # fmt: skip
    group.add_argument("--sigma", type=number(float, 0), metavar="S", help="scale of the noise at the start", **several)
    machine_flags(parser.add_argument_group("machine"))


def check_output(flag, path):
    """Raise UserError, before the work that it would lose, where `path` cannot be a file to write."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{flag} {path}: " + ("it is a folder, name a file" if path.is_dir() else f"there is no folder {path.parent}; make it first"))


def write_samples(path, rows, meta):
    """Token ids (N, L) to `path`: .npy as they are, anything else as text, one sample a line."""
    try:
        if path.suffix == ".npy":
            np.save(path, rows)
        else:
            lines = (decode(meta, row).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for row in rows)
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file with --output") from None


SHADES = (240, 131, 173, 179, 149, 84)  # of the terminal's 256 colours: grey, red, orange, yellow, green; by confidence


def watcher(model, meta, nfe):
    """A `watch` for `generate` that shows the first sequence at each evaluation: its most probable tokens.

    On a terminal one frame an evaluation, each token coloured by its probability; elsewhere one plain line.
    """
    terminal, steps = sys.stdout.isatty(), iter(range(1, nfe + 1))

    def show(h):
        chances, tokens = map(torch.cat, zip(*((rows @ model.head.T).softmax(-1).max(-1) for rows in h[0].float().split(64)), strict=True))
        pieces = [one_line(decode(meta, [token])) for token in tokens]
        pieces = [p[2:] if p.startswith("##") else meta.get("join", "") + p for p in pieces]
        if terminal:
            shades = (chances * len(SHADES)).long().clamp(max=len(SHADES) - 1)
            pieces = [f"\x1b[38;5;{SHADES[shade]}m{piece}" for shade, piece in zip(shades, pieces, strict=True)]
            time.sleep(0.1)
        title = f"{next(steps)}/{nfe}, mean confidence {chances.mean():.2f}: "
        print(f"\x1b[H\x1b[2J{title}\n{''.join(pieces)}\x1b[0m" if terminal else title + "".join(pieces).strip(), flush=True)

    return show


def main():
    parser = Parser(prog="sample.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/owt-esd/checkpoint.pt"), metavar="FILE", help="of either stage")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write samples here; -N before the suffix where several NFE are given")
    parser.add_argument("--watch", action="store_true", help="show the first sequence of a batch at each evaluation, coloured by confidence")
    sampling_flags(parser, count=4)
    args = parser.parse_args()
    resolve_machine(args)
    check_output("--output", args.output)
    model, checkpoint = load_sampler(args.checkpoint, args)
    decode(checkpoint["meta"], [0])  # a missing tokenizer shows before the work, not after
    for nfe in args.nfe:
        watch = watcher(model, checkpoint["meta"], nfe) if args.watch else None
        rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, is_euler(args, checkpoint), args.dtype, watch,
                            temperature=args.temperature, gamma=args.gamma, sigma=args.sigma)  # fmt: skip
        if args.output:
            several = f"-{nfe}" if len(args.nfe) > 1 else ""
            write_samples(args.output.with_stem(args.output.stem + several), rows, checkpoint["meta"])
        print(f"--- {nfe} NFE")
        for row in rows[: args.num_samples if not args.output else 4]:
            print(decode(checkpoint["meta"], row))


if __name__ == "__main__":
    run(main)
