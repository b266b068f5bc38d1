"""Write text with a trained model, in any number of network evaluations (NFE).

    python sample.py --nfe 1                                     # one jump, from the run of distill.py --loss esd
    python sample.py --checkpoint runs/grammar-psd/checkpoint.pt --nfe 1 2 4
    python sample.py --checkpoint runs/owt-diagonal/checkpoint.pt --nfe 64      # stage 1: Euler steps

Reads a checkpoint of either stage. Prints decoded text, and writes it to --output: one sample a line
(newlines inside a sample as \\n) or, for a name that ends in .npy, token ids of shape (samples, L).
The state stays in the embedding: y of shape (B, L, D), never (B, L, V).
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Draw, load_model, machine_flags, resolve_machine
from prepare_data import Parser, UserError, decode, number, run


@torch.no_grad()
def generate(model, xi, nfe, euler=False):
    """Tokens (B, L), int64, from standard normals xi (B, L, model.noise_size), in `nfe` network evaluations.

    The flow map jumps along the schedule's grid, X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50). The
    last jump ends at data, where X_s1 = psi_s1 (short of it by model.LAST): the sample is its most
    probable tokens. With `euler`, psi_ss takes the place of psi_st, which is all that a diagonal alone
    can do: on the linear path that is Euler's method for the drift (52), x + (t - s) b_s(x).
    """
    grid = model.times(torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]).to(xi.dtype).to(xi.device)
    y = model.embed_noise(xi)
    for k in range(nfe):
        s, t = (time.expand(len(xi), -1) for time in grid[k : k + 2])
        h = model(y, s, s if euler else t)
        if k < nfe - 1:
            y = model.path.flow_map(y, model.soft_embedding(h), s, t)
    return model.argmax(h)


def draw_samples(model, nfe, count, batch_size, seed, euler, dtype="float32"):
    """`count` samples in batches: token ids, int64 numpy (count, L). Sample i depends on (seed, i) alone."""
    device = model.head.device
    rows, L = [], model.config.seq_len
    for first in tqdm(range(0, count, batch_size), desc=f"{nfe} NFE", unit="batch", leave=False, disable=None):
        draw = Draw(seed, 0, np.arange(first, min(first + batch_size, count)), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            rows.append(generate(model, draw.normal(L, model.noise_size), nfe, euler).cpu())
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


def sampling_flags(parser, count):
    """The flags that sampling and evaluation share."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--nfe", type=number(int, 1, 100_000), nargs="+", default=[1], metavar="N", help="network evaluations a sample")
    group.add_argument("--num-samples", type=number(int, 1), default=count, help="sequences for each NFE")
    group.add_argument("--batch-size", type=number(int, 1), default=64, help="sequences at once; changes no sample")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise")
    group.add_argument("--sampler", choices=["flow-map", "euler"], help="default: flow-map after distill.py, euler for a stage-1 checkpoint")
    group.add_argument("--position-lag", type=number(float, 0, 10), metavar="W", help="earlier positions first (38); default: as trained")
    machine_flags(parser.add_argument_group("machine"))


def check_output(flag, path, inputs):
    """Raise UserError, before the work that it would lose, where `path` cannot be a file to write or is one of the `inputs`."""
    if not path:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path}: " + ("it is a folder, name a file" if path.is_dir() else f"there is no folder {path.parent}; make it first"))
    if any(path.resolve() == other.resolve() for other in inputs if other):
        raise UserError(f"{flag} {path}: it is named by another flag too; name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: it cannot be written; name another file")


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


def main():
    parser = Parser(prog="sample.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/owt-esd/checkpoint.pt"), metavar="FILE", help="of either stage")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write samples here; -N before the suffix where several NFE are given")
    sampling_flags(parser, count=4)
    args = parser.parse_args()
    resolve_machine(args)
    check_output("--output", args.output, [args.checkpoint])
    model, checkpoint = load_sampler(args.checkpoint, args)
    decode(checkpoint["meta"], [0])  # a missing tokenizer shows before the work, not after
    for nfe in args.nfe:
        rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, is_euler(args, checkpoint), args.dtype)
        if args.output:
            several = f"-{nfe}" if len(args.nfe) > 1 else ""
            write_samples(args.output.with_stem(args.output.stem + several), rows, checkpoint["meta"])
        print(f"--- {nfe} NFE")
        for row in rows[: args.num_samples if not args.output else 4]:
            print(decode(checkpoint["meta"], row))


if __name__ == "__main__":
    run(main)
