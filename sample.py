"""Write text with a trained model, in any number of network evaluations (NFE): free, after a prompt, or around given words.

    python sample.py --nfe 1                                     # one jump, from the run of distill.py --loss esd
    python sample.py --checkpoint runs/grammar-psd/checkpoint.pt --nfe 1 2 4
    python sample.py --checkpoint runs/owt-diagonal/checkpoint.pt --nfe 64      # stage 1: Euler steps
    python sample.py --nfe 32 --watch                            # a sequence crystallises in the terminal
    python sample.py --prompt "In 1969" --nfe 8 --guidance 1.5   # of a model trained with --context any or block
    python sample.py --infill "some [MASK] near the [MASK]"      # of one trained with --context scatter
    python sample.py --reward my_rewards:plural --particles 8 --gamma 0.5 --nfe 8

Reads a checkpoint of either stage. Prints decoded text, and writes it to --output: one sample a line
(newlines inside a sample as \\n) or, for a name that ends in .npy, token ids of shape (samples, L).
The state stays in the embedding: y of shape (B, L, D), never (B, L, V).

--reward names a Python function that this program imports and calls: the only code that it loads by name.
It is called as function(texts), a list of str, or, if it has a parameter `probabilities`, as
function(texts, probabilities) with a list of tensors (L, V), and returns a number for each.
"""

import functools
import importlib
import inspect
import itertools
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Draw, Given, chunks, load_model, lowered, machine_flags, probabilities, resolve_machine
from prepare_data import Parser, UserError, decode, encoder, number, one_line, run


@torch.no_grad()
def generate(model, xi, nfe, euler=False, temperature=1.0, gamma=0.0, sigma=1.0, final_temperature=0.0, normal=None, watch=None, select=None):
    """Tokens (B, L), int64, from standard normals xi (B, L, model.noise_size), in `nfe` network evaluations.

    The flow map jumps along the schedule's grid, X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50). The
    last jump ends at data, where X_s1 = psi_s1 (short of it by model.LAST): the sample is its most
    probable tokens. With `euler`, psi_ss takes the place of psi_st, which is all that a diagonal alone
    can do: on the linear path that is Euler's method for the drift (52), x + (t - s) b_s(x).

    Four knobs leave the trained law, and trade likely text for varied text (all neutral by default):
        temperature  divides the logits of psi in every jump, and so sharpens (below 1) or flattens psi along
                     the way; the sample is still the most probable token, so at one evaluation it does nothing
        gamma        in [0, 1], renoises between jumps: a jump to progress tau overshoots to tau + gamma (1 - tau), and
                     fresh noise, normal() -> like xi, brings the state back along the path. 0 is the flow map
                     alone, 1 jumps to data each time (multistep consistency sampling)
        sigma        scales the noise that it starts from
        final_temperature  draws the tokens from the last jump's psi^(1/T) in place of the most probable ones; 0 takes those
    watch(h), where given, is called with the hidden vectors (B, L, D) of each evaluation. select(y, t), where given,
    chooses the states to go on with after each jump but the last.
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
            if select:
                y = select(y, t)
    return model.draw(h, final_temperature, torch.special.ndtr(normal()[..., 0])) if final_temperature else model.argmax(h)


def renoise(model, y, u, t, xi):
    """A state y at time u -> one at an earlier time t: a y + sqrt(alpha_t^2 - a^2 alpha_u^2) x0 W, with a = beta_t / beta_u.

    Given x1, it has the law of the path at t wherever y has it at u. xi: standard normals (B, L, noise_size).
    """
    path, a = model.path, model.path.beta(t) / model.path.beta(u)
    added = (path.alpha(t) ** 2 - (a * path.alpha(u)) ** 2).clamp(min=0).sqrt()  # 0 but for rounding where u = t
    return a[..., None] * y + added[..., None] * model.embed_noise(xi)


class Guided(Given):
    """A network given a context, with classifier-free guidance: psi + omega (psi(c) - psi), both branches in one batch (section 4.2).

    The branch without the context sees the block alone. A drift or a flow map is linear in psi, so that guides it too,
    and the most probable token, for omega >= 1, is one that psi(c) allows.
    """

    def __init__(self, model, keys, positions, omega):
        self.omega, c = omega, keys[0][0].shape[2]
        B, n = keys[0][0].shape[0], len(positions)
        seen = torch.ones(2 * B, 1, 1, c + n, dtype=torch.bool, device=positions.device)
        seen[B:, ..., :c] = False
        super().__init__(model, [tuple(x.repeat(2, 1, 1, 1) for x in pair) for pair in keys], positions, seen)

    def __call__(self, y, s, t):
        """Hidden vectors (2 B, n, D): with the context, then without."""
        return super().__call__(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in (y, s, t)))

    def mix(self, values):
        """Two halves, with the context and without -> the guided one."""
        given, alone = values.chunk(2)
        return alone + self.omega * (given - alone)

    def soft_embedding(self, h):
        return self.mix(self.model.soft_embedding(h))

    def argmax(self, h):
        flat, head = h.view(2, -1, h.shape[-1]), lowered(self.head)
        parts = [self.mix(probabilities(flat[:, rows] @ head.T)).argmax(-1) for rows in chunks(flat.shape[1], 2 * len(head))]
        return torch.cat(parts, 1).view(-1, h.shape[1])


def condition(model, keys, positions, omega=1.0):
    """The network to sample a block with: given the keys of a context, or None, and the block's positions (n,)."""
    if keys is None or omega == 0:
        return model.given(None, positions)
    return model.given(keys, positions) if omega == 1 else Guided(model, keys, positions, omega)


@torch.no_grad()
def continue_text(model, tokens, length, block_size, normal, omega=1.0, **how):
    """Tokens (B, p), p >= 0, written on to (B, length) in blocks; int64.

    Each block is a `generate` given all before it. Keys and values are computed once for the prompt and once for each
    finished block. Where the text outgrows the model's L positions the window slides: the context is the latest tokens
    that leave room for the block, encoded anew. normal(n) -> standard normals (B, n, noise_size). how: for generate.
    """
    start, keys = 0, None  # of the window, and of its tokens so far
    while (written := tokens.shape[1]) < length:
        n = min(block_size, length - written)
        if written + n - start > model.config.seq_len:
            start, keys = written + n - model.config.seq_len, None
        fresh = tokens[:, start + (keys[0][0].shape[2] if keys else 0) :]
        if fresh.shape[1] and omega != 0:
            keys = model.encode(fresh, before=keys)
        positions = torch.arange(written - start, written - start + n, device=tokens.device)
        block = generate(condition(model, keys, positions, omega), normal(n), normal=functools.partial(normal, n), **how)
        tokens = torch.cat([tokens, block], 1)
    return tokens


@torch.no_grad()
def fill_in(model, tokens, given, normal, omega=1.0, **how):
    """Tokens (B, L) with those where the bool tensor `given` (L,) holds kept, and all others written around them."""
    places, gaps = given.nonzero().squeeze(1), (~given).nonzero().squeeze(1)
    keys = model.encode(tokens[:, places], places) if len(places) else None
    block = generate(condition(model, keys, gaps, omega), normal(len(gaps)), normal=functools.partial(normal, len(gaps)), **how)
    return tokens.index_copy(1, gaps, block)


# ------------------------------------------------------------------------------------------------
# Steering: of several particles, those whose look-ahead is worth more go on.


class Steering:
    """A `select` for `generate`: resamples groups of `particles` rows by what their look-ahead is worth.

    The look-ahead from y_t is psi_t1, the flow map's own jump to data (18), one evaluation more a step (psi_tt where only
    the diagonal is trained: `euler`). A particle's weight is exp(strength (reward - the reward that it had when it
    was last resampled)), as in sequential Monte Carlo.
    reward: (list of str, list of (L, V) tensors, or None) -> one number each. uniform() -> (rows, k) tensor.
    """

    def __init__(self, model, euler, reward, decode_row, particles, strength, uniform):
        self.model, self.euler, self.reward, self.decode_row, self.uniform = model, euler, reward, decode_row, uniform
        self.particles, self.strength, self.before = particles, strength, 0.0

    def select(self, y, t):
        end = self.model.times(torch.ones(1, 1, dtype=torch.float64)).to(t).expand_as(t)
        h = self.model(y, t, t if self.euler else end)
        chosen, values = self.resample(self.model.argmax(h), h)
        self.before = values[chosen]
        return y[chosen]

    def resample(self, tokens, h=None):
        """(indices of the rows that go on, every row's reward), by systematic resampling within each group."""
        head, texts = lowered(self.model.head), [self.decode_row(row) for row in tokens.cpu()]
        given = [texts]
        if "probabilities" in inspect.signature(self.reward).parameters:
            given += [[F.one_hot(row, len(head)).float() for row in tokens.cpu()] if h is None else [probabilities(row @ head.T).cpu() for row in h]]
        try:
            found = self.reward(*given)
        except Exception as error:  # the user's own code, and it alone
            raise UserError(f"the reward failed: {told(error)}") from None
        try:
            values = torch.as_tensor(found, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"the reward gave {one_line(repr(found))[:80]} for {len(texts)} texts; it must give a number each") from None
        if values.shape != (len(texts),) or not values.isfinite().all():
            raise UserError(
                f"the reward gave {tuple(values.shape)} values for {len(texts)} texts, or one that is not finite; it must give a number each"
            )
        weights = (self.strength * (values - self.before)).view(-1, self.particles).softmax(-1)
        places = (self.uniform(1)[:: self.particles] + torch.arange(self.particles)) / self.particles  # (groups, particles), rising
        chosen = torch.searchsorted(weights.cumsum(-1), places).clamp(max=self.particles - 1)
        return (chosen + torch.arange(len(chosen))[:, None] * self.particles).flatten(), values


def told(error):
    """One line that says what went wrong in a user's own function, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(str(error))[:200]} ({last.filename}, line {last.lineno})"


def load_reward(name):
    """The function that "module:function" names, from the current folder or an installed module."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"--reward {name}: give module:function, of a file module.py in this folder")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"--reward {name}: {error}; give module:function, of a file module.py in this folder") from None
    except Exception as error:  # the user's own code, as it is imported
        raise UserError(f"--reward {name}: the module failed, {told(error)}; mend it") from None
    if not callable(found):
        raise UserError(f"--reward {name}: it is no function; give module:function, of a file module.py in this folder")
    try:
        inspect.signature(found)
    except (TypeError, ValueError):
        raise UserError(f"--reward {name}: its arguments cannot be told; give a function written in Python") from None
    return found


# ------------------------------------------------------------------------------------------------
# Samples in batches.


def write_freely(model, B, normal, **how):
    """`generate` for B whole rows, from normal(n) -> standard normals (B, n, noise_size)."""
    L = model.config.seq_len
    return generate(model, normal(L), normal=functools.partial(normal, L), **how)


def draw_samples(model, nfe, count, batch_size, seed, euler, dtype="float32", watch=None, write=write_freely, steer=None, **knobs):
    """`count` samples in batches: token ids, int64 numpy (count, L). Sample i depends on (seed, i) alone.

    write(model, B, normal, **how) makes B of them; steer: the arguments of Steering between euler and
    uniform, if any. watch and knobs (temperature, gamma, sigma, final_temperature): see `generate`.
    """
    device, many = model.head.device, steer[2] if steer else 1  # rows behind one sample
    rows = []
    for first in tqdm(range(0, count, batch_size), desc=f"{nfe} NFE", unit="batch", leave=False, disable=True if watch else None):
        draw = Draw(seed, 0, np.arange(first * many, min(first + batch_size, count) * many), device)
        how = dict(nfe=nfe, euler=euler, watch=watch, **knobs)
        if steer:
            steering = Steering(model, euler, *steer, draw.uniform)
            how["select"] = steering.select
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            normal = lambda n: draw.normal(n, model.noise_size)  # noqa: B023, E731
            tokens = write(model, len(draw.rows), normal, **how)
            if steer:
                tokens = tokens.cpu()[steering.resample(tokens)[0][::many]]
        rows.append(tokens.cpu())
    return torch.cat(rows).numpy()


def load_sampler(path, args):
    """load_model, with the flags that change how a model samples."""
    model, checkpoint = load_model(path, args.device)
    if args.position_lag is not None:
        model.position_lag = args.position_lag
    model.hold_noise()
    return model, checkpoint


def is_euler(args, checkpoint):
    """Whether to take Euler steps: by --sampler, or because the checkpoint is of stage 1, which has learned no jump."""
    if args.sampler == "flow-map" and "loss" not in checkpoint["args"]:
        raise UserError("--sampler flow-map needs the map that distill.py makes; this checkpoint is of stage 1, leave the flag out")
    return args.sampler == "euler" if args.sampler else "loss" not in checkpoint["args"]


def sampling_flags(parser, count, sweep=False):
    """The flags that sampling and evaluation share; with `sweep`, each knob of `generate` takes several values."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--nfe", type=number(int, 1, 100_000), nargs="+", default=[1], metavar="N", help="network evaluations a sample")
    group.add_argument("--num-samples", type=number(int, 1), default=count, metavar="N", help="sequences for each NFE")
    group.add_argument("--batch-size", type=number(int, 1), default=64, metavar="N", help="sequences at once; changes no sample")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise")
    group.add_argument("--sampler", choices=["flow-map", "euler"], help="default: flow-map after distill.py, euler for a stage-1 checkpoint")
    group.add_argument("--position-lag", type=number(float, 0, 10), metavar="W", help="earlier positions first (38); default: as trained")
    several = dict(nargs="+", default=[1.0]) if sweep else dict(default=1.0)
    group.add_argument("--temperature", type=number(float, 0.001, 1000), metavar="T", help="of psi along the way; no use at 1 NFE", **several)
    group.add_argument("--gamma", type=number(float, 0, 1), metavar="G", help="renoising between jumps: 0 none, 1 multistep consistency",
                       **several | {"default": [0.0] if sweep else 0.0})  # fmt: skip
    group.add_argument("--sigma", type=number(float, 0, 1000), metavar="S", help="scale of the noise at the start", **several)
    group.add_argument("--final-temperature", type=number(float, 0, 1000), metavar="T", help="draw tokens from the last psi; 0: the most probable",
                       **several | {"default": [0.0] if sweep else 0.0})  # fmt: skip
    machine_flags(parser.add_argument_group("machine"))


def check_output(flag, path, inputs):
    """Raise UserError, before the work that it would lose, where `path` cannot be a file to write or is one of the `inputs`."""
    if not path:
        return
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{flag} {path}: it is no regular file; name another")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path}: " + ("it is a folder, name a file" if path.is_dir() else f"there is no folder {path.parent}; make it first"))
    if any(path.resolve() == other.resolve() for other in inputs if other):
        raise UserError(f"{flag} {path}: it is named by another flag too; name another file")
    if not all(os.access(place, os.W_OK) for place in (path, path.parent) if place.exists()):
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


SHADES = (240, 131, 173, 179, 149, 84)  # of the terminal's 256 colours: grey, red, orange, yellow, green; by confidence


def watcher(model, meta, nfe):
    """A `watch` for `generate` that shows the first sequence at each evaluation: its most probable tokens.

    On a terminal one frame an evaluation, each token coloured by its probability; elsewhere one plain line.
    """
    terminal, steps = sys.stdout.isatty(), itertools.cycle(range(1, nfe + 1))

    def show(h):
        chances, tokens = map(torch.cat, zip(*((rows @ model.head.T).softmax(-1).max(-1) for rows in h[0].float().split(64)), strict=True))
        pieces = [one_line(decode(meta, [token], padding=True)) for token in tokens]
        pieces = [p[2:] if p.startswith("##") else meta.get("join", "") + p for p in pieces]
        if terminal:
            shades = (chances * len(SHADES)).long().clamp(max=len(SHADES) - 1)
            pieces = [f"\x1b[38;5;{SHADES[shade]}m{piece}" for shade, piece in zip(shades, pieces, strict=True)]
            time.sleep(0.1)
        title = f"{next(steps)}/{nfe}, mean confidence {chances.mean():.2f}: "
        print(f"\x1b[H\x1b[2J{title}\n{''.join(pieces)}\x1b[0m" if terminal else title + "".join(pieces).strip(), flush=True)

    return show


def prompted(args, checkpoint):
    """The `write` of draw_samples that --prompt, --prompt-file or --infill asks for; UserError where the model cannot."""
    asked = [name for name in ("prompt", "prompt_file", "infill") if getattr(args, name) is not None]
    trained = checkpoint["args"].get("context")
    if not asked:
        if args.guidance != 1 or args.block_size or args.length:
            raise UserError("--guidance, --block-size and --length shape what follows a context; give --prompt, --prompt-file or --infill")
        return write_freely
    if len(asked) > 1 or args.reward is not None:
        raise UserError("give one of --prompt, --prompt-file, --infill and --reward")
    flag, need = ("--infill", "scatter") if args.infill is not None else ("--" + asked[0].replace("_", "-"), "any or block")
    if not trained or (trained == "scatter") != (need == "scatter"):
        raise UserError(f"{args.checkpoint} was trained {f'with --context {trained}' if trained else 'without contexts'}; {flag} needs a model "
                        f"trained with train_diagonal.py --context {need}")  # fmt: skip
    if args.guidance != 1 and not checkpoint["args"]["context_dropout"]:
        raise UserError(f"{args.checkpoint} never saw a block without its context; --guidance needs one trained with --context-dropout above 0")
    if args.guidance != 1 and checkpoint["args"].get("guidance", 1) != 1:
        raise UserError(f"{args.checkpoint} was distilled with --guidance {checkpoint['args']['guidance']:g} already; leave --guidance out")
    return infilled(args, checkpoint["meta"]) if need == "scatter" else continued(args, checkpoint)


def bos(meta):
    """What a row begins with: a list of one id, or of none."""
    return [] if meta["bos_id"] is None else [meta["bos_id"]]


def continued(args, checkpoint):
    """The `write` of --prompt and --prompt-file."""
    meta = checkpoint["meta"]
    L = meta["seq_len"]
    try:
        text = args.prompt if args.prompt_file is None else args.prompt_file.read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {args.prompt_file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; name a text file") from None
    tokens, length, size = bos(meta) + encoder(meta)(text), args.length or L, args.block_size or checkpoint["args"]["block_size"] or L
    if len(tokens) >= length:
        raise UserError(f"the prompt has {len(tokens)} tokens and the text is to have {length}; give a shorter prompt or a larger --length")
    if length > L and size >= L:
        raise UserError(f"--length {length} is more than the {L} tokens that the model sees; give a --block-size below {L}, for its window to slide")

    def write(model, B, normal, **how):
        prompt = torch.tensor(tokens, dtype=torch.long, device=model.head.device).expand(B, -1)
        return continue_text(model, prompt, length, size, normal, args.guidance, **how)

    return write


def infilled(args, meta):
    """The `write` of --infill."""
    L, encode, tokens = meta["seq_len"], encoder(meta), bos(meta)
    if not args.mask:
        raise UserError("--mask is empty; give the text that stands for one token in --infill, [MASK] say")
    given = [True] * len(tokens)
    for k, piece in enumerate(args.infill.split(args.mask)):
        known = encode(piece)
        tokens += [0] * (k > 0) + known
        given += [False] * (k > 0) + [True] * len(known)
    if all(given) or len(tokens) > L or args.length or args.block_size:
        raise UserError(f"--infill has {len(tokens)} tokens, {given.count(False)} of them {args.mask}; give one mask or more and at most {L} tokens "
                        "in all, and neither --length nor --block-size")  # fmt: skip
    rest = L - len(tokens)

    def write(model, B, normal, **how):
        device = model.head.device
        row, kept = torch.tensor(tokens + [0] * rest, device=device), torch.tensor(given + [False] * rest, device=device)
        return fill_in(model, row.expand(B, L), kept, normal, args.guidance, **how)

    return write


def main():
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/owt-esd/checkpoint.pt"), metavar="FILE", help="of either stage")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write samples here; -N before the suffix where several NFE are given")
    parser.add_argument("--watch", action="store_true", help="show the first sequence of a batch at each evaluation, coloured by confidence")
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", metavar="TEXT", help="write on from here; of a model trained with --context")
    group.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, from a text file")
    group.add_argument("--block-size", type=number(int, 1), metavar="K", help="tokens that are written at once (default: as trained)")
    group.add_argument("--length", type=number(int, 1, 10**7), metavar="N",
                       help="tokens in all, prompt included (default: the model's L; above it, the window slides)")  # fmt: skip
    group.add_argument("--infill", metavar="TEXT", help="keep this text, write what its masks hide and what follows")
    group.add_argument("--mask", default="[MASK]", metavar="TEXT", help="stands for one token in --infill")
    group.add_argument("--guidance", type=number(float, 0), default=1.0, metavar="W",
                       help="weight of the context: 0 ignores it, 1 is plain, above 1 exaggerates; two branches, one batch")  # fmt: skip
    group = parser.add_argument_group("steering")
    group.add_argument("--reward", metavar="M:F", help="function F of module M that scores texts: particles that promise more go on")
    group.add_argument("--particles", type=number(int, 2), default=8, metavar="P", help="for each sample")
    group.add_argument("--strength", type=number(float, 0, above=True), default=10.0, metavar="W", help="of the reward, in nats a unit")
    sampling_flags(parser, count=4)
    args = parser.parse_args()
    resolve_machine(args)
    args.nfe = list(dict.fromkeys(args.nfe))
    several = args.output and args.output.name and len(args.nfe) > 1
    outputs = [args.output.with_stem(f"{args.output.stem}-{nfe}") if several else args.output for nfe in args.nfe]
    for output in outputs:
        check_output("--output", output, [args.checkpoint, args.prompt_file])
    if args.reward is not None and not args.gamma:
        raise UserError("--reward: without renoising, the copies of a particle stay the same; give --gamma above 0, 0.5 say")
    for flag, owner in (("particles", "reward"), ("strength", "reward"), ("mask", "infill")):
        if getattr(args, owner) is None and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag} {getattr(args, flag)} belongs to --{owner}; give it too, or leave --{flag} out")
    if args.watch and args.guidance != 1:
        raise UserError("--watch shows what one network expects and --guidance mixes two; leave out one of them")
    if args.final_temperature and args.guidance != 1:
        raise UserError("--final-temperature draws from one psi and --guidance mixes two, which is no distribution; leave out one of them")
    reward = load_reward(args.reward) if args.reward is not None else None
    model, checkpoint = load_sampler(args.checkpoint, args)
    meta = checkpoint["meta"]
    decode(meta, [0])  # a missing tokenizer shows before the work, not after
    write = prompted(args, checkpoint)
    steer = (reward, functools.partial(decode, meta), args.particles, args.strength) if reward else None
    for nfe, output in zip(args.nfe, outputs, strict=True):
        watch = watcher(model, meta, nfe) if args.watch else None
        rows = draw_samples(model, nfe, args.num_samples, args.batch_size, args.seed, is_euler(args, checkpoint), args.dtype, watch, write, steer,
                            temperature=args.temperature, gamma=args.gamma, sigma=args.sigma, final_temperature=args.final_temperature)  # fmt: skip
        if output:
            write_samples(output, rows, meta)
        print(f"--- {nfe} NFE")
        for row in rows[: args.num_samples if not output else 4]:
            print(decode(meta, row))


if __name__ == "__main__":
    run(main)
