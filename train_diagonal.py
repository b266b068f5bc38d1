"""Stage 1: train the instantaneous denoiser psi_tt, the diagonal of the flow map.

    torchrun --nproc_per_node=8 train_diagonal.py                    # the paper's OpenWebText run
    python train_diagonal.py --data data/grammar --size tiny --steps 2000 --warmup 100 --batch-size 128

Reads data/NAME (see prepare_data.py). Writes runs/NAME-diagonal/: config.json (flags, command line,
versions), log.jsonl (one object a line) and checkpoint.pt. The objective comes first; below it is the
one training loop that both stages use. distill.py hands it another objective and nothing else.

An objective is a function

    objective(model, tokens, draw) -> ({name: loss}, {name: scalar})

of tokens (B, L) and a `Draw` of random numbers: the losses in order of priority, scalars to minimise
(added up, or, under --surgery, each later one's gradient projected off the earlier ones'), and detached
scalars for the log, each a mean or a pair (sum, count) of which the log takes the mean.
"""

import atexit
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from argparse import BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Imported here, before any process group, for what it would do later: Adam's first step imports it, and
# its default arguments then keep the group, whose threads outlive destroy_process_group and can abort the exit.
import torch.distributed.nn.functional
from tqdm import tqdm

from model import (
    INTERPOLANTS,
    SCHEDULES,
    SIZES,
    Divergence,
    Draw,
    ModelConfig,
    build_model,
    config_dict,
    cross_entropy,
    head_loss,
    machine_flags,
    read_checkpoint,
    resolve_machine,
)
from prepare_data import Parser, UserError, number, read_meta, read_rows, run, verify_rows

# ------------------------------------------------------------------------------------------------
# The objective.


def diagonal(model, tokens, draw, power=0.5, target=None):
    """Cross-entropy of psi_tt(x_t) against the clean token (21, 22), weighted by (45) with c = 0.01, r = `power`.

    target: states y (B, L, D) and times t -> a Divergence to minimise in place of the cross-entropy, a KL.

    Only r = 0 has E[x1 | x_t] as its minimiser: the weight depends on the token drawn, and r = 0.5, the
    paper's, favours the likelier tokens, so it trades diversity for sharper samples.
    """
    B, L = tokens.shape
    tau = draw.uniform(1)
    t = model.times(tau).float().to(tokens.device, non_blocking=True)  # (B, 1 or L), by the noise schedule
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, t)  # (B, L, D)
    h = model(y, t, t).flatten(0, 1)
    scale = torch.full((B * L,), 1 / (B * L), device=h.device)
    name, divergence = ("diagonal_kl", target(y, t)) if target else ("diagonal_ce", Divergence(cross_entropy, (tokens.flatten(),)))
    loss, report = head_loss(h, model.head, scale, divergence, c=0.01, r=power, compiled=model.compiled)
    return {"diagonal": loss}, {name: report["loss"].mean()} | quarters(name, report["loss"], tau)


@torch.no_grad()
def loss_curve(model, tokens, draw):
    """The diagonal's cross-entropy by the weight b of the data, for a calibrated schedule: float64 (61, 2), rows (b, nats a token).

    b / (1 - b), the signal over the noise, goes from 0.01 to 1,000 in equal ratios; all at one noise, so that the curve is smooth.
    """
    xi, curve, held = draw.normal(tokens.shape[1], model.noise_size), [], model.held_factor
    model.hold_noise()
    scale = torch.full((tokens.numel(),), 1 / tokens.numel(), device=tokens.device)
    divergence = Divergence(cross_entropy, (tokens.flatten(),))
    for r in torch.logspace(-2, 3, 61, dtype=torch.float64):
        t = model.path.time_of(r / (1 + r)).float().expand(len(tokens), 1).to(tokens.device)
        h = model(model.interpolate(xi, tokens, t), t, t).flatten(0, 1)
        loss, _ = head_loss(h, model.head, scale, divergence, c=0.01, r=0.0, compiled=model.compiled)
        curve.append(torch.stack([r / (1 + r), loss.cpu().double()]))
    model.held_factor = held
    return torch.stack(curve)


def quarters(name, values, tau):
    """{name_q1: (sum, count), ... name_q4}: `values` (B L,) over the rows with progress tau (B, 1) in each quarter of [0, 1]."""
    rows = values.view(len(tau), -1).mean(-1, keepdim=True)
    inside = ((4 * tau).long().clamp(max=3) == torch.arange(4)).to(rows.device, non_blocking=True)  # (B, 4)
    sums = torch.where(inside, rows, 0).sum(0)  # not a product: a row that is not finite stays in its quarter
    return {f"{name}_q{k + 1}": torch.stack([sums[k], inside[:, k].sum()]) for k in range(4)}


def by_context(loss, networks, tokens, draw, args):
    """loss(*networks, tokens, draw), or, under --context, its mean over rows, of which a block follows a clean context (section 4.2).

    Of each row (L,) a context of a random length is given, and the network learns the block of args.block_size tokens
    that comes next, or what is left of the row. args.context says which contexts: "block", whole blocks; "any", any
    number of tokens; "scatter", any set of positions, the block being all others (for infilling). A share
    args.context_dropout of the rows learns its block without any context, as guidance needs.

    A step has four contexts' lengths, a quarter of [0, L) apart from a random start, and rows of the same
    lengths go through the networks together: no mask, so the fused attention kernels serve.
    """
    if not args.context:
        return loss(*networks, tokens, draw)
    (B, L), size = tokens.shape, args.block_size or tokens.shape[1]
    quarter, kept = draw.uniform(2).unbind(1)
    place = ((4 * quarter).floor() + draw.shared()) / 4  # uniform on [0, 1)
    start = (place * (L // size)).long() * size if args.context == "block" else (place * L).long()  # (B,)
    length, context = (L - start).clamp(max=size), torch.where(kept < args.context_dropout, 0, start)
    order = torch.arange(L, device=tokens.device).expand(B, L)
    if args.context == "scatter":
        first = draw.normal(L).argsort(-1).argsort(-1) < start[:, None].to(tokens.device)  # (B, L), true at `start` random places
        order = torch.argsort(~first, dim=-1, stable=True)  # their positions rising, then the others rising
    losses, report = {}, {}
    for c, n in sorted(set(zip(context.tolist(), length.tolist(), strict=True))):
        mask = (context == c) & (length == n)
        rows = mask.nonzero().squeeze(1).to(tokens.device, non_blocking=True)
        part, places = tokens[rows], order[rows]
        block = places.gather(1, (start[mask, None] + torch.arange(n)).to(tokens.device, non_blocking=True))
        seen = {id(net): net.given(net.encode(part.gather(1, places[:, :c]), places[:, :c]) if c else None, block) for net in networks}
        found = loss(*(seen[id(net)] for net in networks), part.gather(1, block), draw.part(mask.numpy()))
        share = mask.sum().item() / B  # every row counts the same, so the mean over micro-batches is that over the batch
        for whole, values in zip((losses, report), found, strict=True):
            for name, value in values.items():  # a pair (sum, count) adds up as it is
                whole[name] = whole.get(name, 0) + (value if value.numel() == 2 else share * value)
    return losses, report


# ------------------------------------------------------------------------------------------------
# Rows of tokens, in an order that is a function of (seed, epoch).


class TokenRows:
    """The rows of data/NAME/{train,val}.bin and the order in which they are visited."""

    def __init__(self, folder, split, meta):
        self.rows, self.vocab_size = read_rows(folder, split, meta), meta["vocab_size"]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one data set lives as long as the program)
    def order(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self.rows))

    def take(self, seed, positions):
        """Tokens int64 (n, L) at positions (n,) of the endless sequence of shuffled epochs."""
        epochs, places = np.divmod(positions, len(self.rows))
        index = [self.order(seed, int(e))[p] for e, p in zip(epochs, places, strict=True)]
        rows = self.rows[index].astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise UserError(f"the data hold token {rows.max()}, the vocabulary ends at {self.vocab_size - 1}; make them anew with prepare_data.py")
        return torch.from_numpy(rows)


# ------------------------------------------------------------------------------------------------
# The loop.


def gradients(params, objective, model, batches, surgery):
    """Gradients of one step: (list like params, {name: mean scalar}); every rank returns the same.

    batches: a list of (tokens, draw), the micro-batches of this rank. The losses' means over
    micro-batches and over ranks are added up; under `surgery` (PSD) each loss's gradient is averaged
    first, then loses its component along an earlier one's where the two conflict.
    """
    sums, scalars, held = {}, {}, model.held_factor
    factor = model.noise_factor()  # once a step: the micro-batches share it, and hand their gradients back through it together
    model.held_factor = factor.detach().requires_grad_(factor.requires_grad)
    leaves = [*params, model.held_factor]
    for p in params:
        p.grad = None  # the last step's, which would be there beside the new one's

    def add(name, root, gradient=None):
        """Add the gradient of `root` to that of the loss `name`."""
        for p, grad in zip(leaves, sums.get(name, [None] * len(leaves)), strict=True):
            p.grad = grad
        with torch.autocast(params[0].device.type, enabled=False):  # each product goes back in the precision that it had
            root.backward(gradient, retain_graph=root is factor)
        sums[name] = [p.grad for p in leaves]

    for tokens, draw in batches:
        losses, report = objective(model, tokens, draw)
        report |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        for name, loss in losses.items() if surgery else [("total", sum(losses.values()))]:
            add(name, loss / len(batches))
        for name, value in report.items():
            scalars[name] = scalars.get(name, 0) + value / len(batches)
    for name in sums:
        if sums[name][-1] is not None:
            add(name, factor, sums[name][-1])
        sums[name] = average([torch.zeros_like(p) if g is None else g for p, g in zip(params, sums[name][:-1], strict=True)])
    model.held_factor = held
    parts = list(sums.values())
    if surgery:
        conflicts = [project(first, part) for k, part in enumerate(parts) for first in parts[:k]]
        scalars["conflict"] = torch.stack(conflicts).amax()
    for part in parts[1:]:
        torch._foreach_add_(parts[0], part)
    return parts[0], scalars


def average(tensors):
    """Replace tensors by their mean over all ranks, in place.

    Not the DistributedDataParallel wrapper: a step here makes several forward passes and, for PSD, must
    see two averaged gradients before it adds them.
    """
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])  # one message, not one a parameter
        all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)])
    return tensors


def project(first, second):
    """Gradient surgery: where <second, first> < 0, take from `second` its component along `first`, in place.

    Both are lists of tensors over all parameters. Returns 1.0 where there was a conflict, 0.0 where not.
    """
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    square = torch.stack([a.square().sum() for a in first]).sum()
    share = inner.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
    torch._foreach_sub_(second, [share * a for a in first])
    return (inner < 0).float()


def train(args, ranks, model, ema, objective, meta, passes):
    """Train `model` on args.data by `objective` for args.steps steps; write args.out.

    ranks: what start_ranks gives. ema: a copy of the model, which becomes its moving average.
    passes: the forward passes of the backbone that one row costs, for the FLOP count (a backward
    pass counts two). With args.resume, go on from the newest checkpoint in args.out as if never stopped.
    SIGTERM and SIGINT end it after the step under way, saved; a step whose gradient is not finite changes nothing.
    """
    rank, world, device = ranks
    if args.batch_size % (world * args.micro_batch):
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {world} ranks x --micro-batch {args.micro_batch}")
    if checkpoints(args.out) and not args.resume:
        raise UserError(f"{checkpoints(args.out)[0]} exists: go on with --resume, or name another folder with --out")
    if rank == 0:
        for split in ("train", "val"):
            verify_rows(args.data, split, meta)  # damage shows before anything is written
    data = {split: TokenRows(args.data, split, meta) for split in ("train", "val")}

    model.to(device)
    ema.to(device).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    start, means = 0, None
    if args.resume:
        start, means = restore(model, optimizer, ema, meta, args)
        if start >= args.steps:
            raise UserError(f"{args.out} is at step {start} already; give --steps a larger number than that")
        truncate_log(args.out / "log.jsonl", start, rank)
    agree(start, meta, args)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        write_config(args)
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for network in (model, ema):
            network.compile_parts(dynamic=bool(args.context))
    if not model.embedding.requires_grad:
        model.hold_noise()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    share = np.arange(args.batch_size).reshape(world, -1, args.micro_batch)[rank]  # this rank's rows of the global batch

    def load(split, seed, step):
        """This rank's tokens of a step, a tensor (micro-batch, L) each."""
        parts = [data[split].take(seed, step * args.batch_size + rows) for rows in share]
        return [tokens.pin_memory() for tokens in parts] if device.type == "cuda" else parts

    def batches(parts, seed, step):
        """The micro-batches of a step, on the device."""
        return [(tokens.to(device, non_blocking=True), Draw(seed, step, rows, device)) for tokens, rows in zip(parts, share, strict=True)]

    def validate():
        """The objective's scalars on validation rows, under the averaged weights and fixed noise."""
        scores = Means(device)
        with torch.no_grad(), autocast:
            for step in range(args.val_batches):
                for tokens, draw in batches(load("val", 0, step), 0, step):
                    scores.add(step, objective(ema, tokens, draw)[1])
        return {f"val_{name}": value for name, value in scores.read().items()}

    def calibrate(micro):
        """The schedule of both networks anew, from the averaged one's losses on this step's rows; the same on all ranks."""
        with autocast:
            curve = torch.stack([loss_curve(ema, tokens, draw) for tokens, draw in micro]).mean(0)
        for network in (model, ema):
            network.set_schedule(average([curve])[0].tolist())

    flops = passes * flops_per_row(model, meta["seq_len"])
    with Interrupt() as interrupt, contextlib.closing(Log(args, start, meta["seq_len"], flops, ranks, means)) as log, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, "train", args.seed, start)  # the reader takes the next step's rows while one runs
        for step in range(start, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.cooldown))
            micro, ahead = batches(ahead.result(), args.seed, step), reader.submit(load, "train", args.seed, step + 1)
            with autocast:
                grads, scalars = gradients(params, objective, model, micro, args.surgery)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            scalars["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, args.clip)
            optimizer.grad_scale, optimizer.found_inf = None, (~scalars["grad_norm"].isfinite()).float()  # where 1, Adam changes nothing
            optimizer.step()
            decay = min(args.ema, (1 + step) / (10 + step))  # the warm-up makes a short run's average useful
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)

            done, stopped = step + 1, anywhere(interrupt.asked)
            last = done == args.steps
            extra = validate() if last or done % args.val_every == 0 else {}
            if done % args.val_every == 0 and model.config.schedule == "calibrated" and model.embedding.requires_grad:
                calibrate(micro)  # stage 2, where W is frozen, keeps stage 1's
            log.step(done, scalars, optimizer.param_groups[0]["lr"], extra, last)
            if last or stopped or done % args.save_every == 0:
                means = log.means.state(rank, world)
                if rank == 0:
                    os.fsync(log.file)  # a checkpoint's lines outlive what it outlives
                    save(model, ema, optimizer, done, means, meta, args)
            if stopped and not last:
                log.say(f"stopped by {interrupt.asked or 'a signal to another rank'} after step {done:,}, which is saved; --resume goes on")
                break
        anywhere(False)  # no rank leaves before rank 0 has written


class Interrupt:
    """SIGTERM and SIGINT, sent by a user or a scheduler: `asked` names the first, a second one ends the process at once."""

    def __enter__(self):
        self.asked, self.when = None, 0.0
        self.before = {name: signal.signal(name, self.ask) for name in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def ask(self, name, frame):
        # a rank's second one within a second is torchrun passing on what the terminal or the scheduler sent to all
        if self.asked and ("RANK" not in os.environ or time.monotonic() - self.when > 1):
            signal.signal(name, signal.SIG_DFL)
            os.kill(os.getpid(), name)
        if not self.asked:
            self.asked, self.when = signal.Signals(name).name, time.monotonic()


def anywhere(flag):
    """Whether `flag` is true on any rank; the same answer on all. On the CPU, so that it waits for no GPU."""
    flag = torch.tensor(float(bool(flag)))
    if dist.is_initialized():
        all_reduce(flag)
    return bool(flag)


def all_reduce(tensor):
    """The sum over ranks, in place; UserError where a rank is gone."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(f"another rank ended or hangs, so this one ends ({str(error).splitlines()[0][:100]}); see that rank's own line") from None


def agree(step, meta, args):
    """UserError where the ranks do not stand at the same step of the same run on the same data: on one node of several, say."""
    own = {key: value for key, value in plain(args).items() if key not in ("data", "out", "checkpoint", "config")}
    digest = int(hashlib.sha256(repr((step, meta["sha256"], own)).encode()).hexdigest()[:8], 16)
    total = torch.tensor(float(digest), dtype=torch.float64)
    if dist.is_initialized():
        all_reduce(total)
        if total != digest * dist.get_world_size():
            raise UserError(f"the ranks differ in flags, data or the checkpoint found (here of step {step}); give all the same flags and folders")


class Means:
    """Means of scalars over steps and ranks, kept on the device: reading them is all that waits for it.

    A step with a value that is not finite is in no mean: it is counted as skipped, and the first of a run of such steps is kept.
    """

    def __init__(self, device, state=None, rank=0, world=1):
        self.device, self.sizes, self.sums = device, {}, None
        self.streak, self.first_bad = torch.zeros((), device=device), None
        if state is not None:
            sums = state["sums"].to(device)
            self.sizes, self.sums = state["sizes"], sums[rank].clone() if len(sums) == world else sums.mean(0)

    def add(self, step, scalars):
        """Add {name: a mean, or a pair (sum, count)}, the same names each time."""
        values = torch.cat([value.detach().float().reshape(-1).to(self.device) for value in scalars.values()])
        if self.sums is None:
            self.sizes = {name: value.numel() for name, value in scalars.items()}
            self.sums = values.new_zeros(len(values) + 2)
        fine, now = values.isfinite().all(), torch.cat([torch.full((1,), float(step), device=self.device), values])
        self.sums += torch.cat([torch.where(fine, values, 0), torch.stack([fine, ~fine])])
        self.first_bad = now if self.first_bad is None else torch.where(self.streak == 0, now, self.first_bad)
        self.streak = torch.where(fine, 0, self.streak + 1)

    def state(self, rank, world):
        """What a checkpoint keeps: the sums of every rank, (world, n), or None just after `clear`. Collective."""
        if self.sums is None:
            return None
        sums = torch.zeros(world, len(self.sums), device=self.device)
        sums[rank] = self.sums
        if dist.is_initialized():
            all_reduce(sums)
        return {"sizes": self.sizes, "sums": sums.cpu()}

    def clear(self):
        """Begin new means; a run of bad steps goes on."""
        self.sums = None

    def named(self, values):
        """{name: value}, a pair as its ratio, or absent where its count is 0."""
        parts = dict(zip(self.sizes, values.cpu().split(list(self.sizes.values())), strict=True))
        return {name: v[0] / v[1] if len(v) == 2 else v[0] for name, v in parts.items() if len(v) == 1 or v[1] > 0}

    def read(self, limit=0):
        """{name: mean}, the same on all ranks, with "skipped" where it is not 0; {} before the first `add`.

        Raises UserError, naming term, step and progress, where the last more than `limit` steps were not finite.
        """
        if self.sums is None:
            return {}
        sums, streak, bad = average([self.sums.clone(), self.streak.clone(), self.first_bad.clone()])
        if streak > limit:
            first = self.named(bad[1:])
            wrong = [name for name, value in first.items() if not value.isfinite()]
            terms = sorted((n for n in wrong if "_q" not in n), key=lambda n: not n.startswith("loss_"))
            places = [f"[{(int(n[-1]) - 1) / 4:g}, {int(n[-1]) / 4:g}]" for n in wrong if "_q" in n]
            where = f", from times of progress {' and '.join(places)}" if places else ""
            raise UserError(f"{(terms or wrong)[0]} is {first[(terms or wrong)[0]]:g} at step {int(bad[0])}{where}, and {int(streak)} steps "
                            "in a row were skipped; the last checkpoint is kept: resume from it with a lower --lr or --clip")  # fmt: skip
        good, skipped = sums[-2:].tolist()
        pairs = torch.cat([torch.full((size,), size == 2) for size in self.sizes.values()]).to(self.device)
        means = self.named(torch.where(pairs, sums[:-2], sums[:-2] / good)) if good else {}
        return {name: float(value) for name, value in means.items()} | ({"skipped": skipped} if skipped else {})


class Log:
    """Means since the last line, to log.jsonl and to the terminal. Only rank 0 writes."""

    def __init__(self, args, start, seq_len, flops, ranks, means):
        self.args, self.seq_len, self.flops = args, seq_len, flops
        rank, self.world, self.device = ranks
        self.file = open(args.out / "log.jsonl", "a" if args.resume else "w") if rank == 0 else None  # noqa: SIM115 (closed in close)
        self.bar = tqdm(initial=start, total=args.steps, disable=rank != 0 or not sys.stderr.isatty(), unit="step")
        self.means, self.clock, self.steps, self.first = Means(self.device, means, rank, self.world), time.perf_counter(), 0, None
        where = f"{self.world} x {self.device.type}, {args.dtype}{', compiled' if args.compile else ''}"
        self.say(f"{args.out}: steps {start + 1:,} to {args.steps:,} of {args.batch_size} x {seq_len:,} tokens, on {where}")
        if args.steps < args.warmup + args.cooldown:
            most = args.lr * args.steps / (args.warmup + args.cooldown)
            flags = f"--warmup {args.warmup:,} and --cooldown {args.cooldown:,}"
            self.say(f"{flags} exceed --steps {args.steps:,}: the learning rate reaches {most:.1e}")

    def step(self, done, scalars, lr, extra, last):
        self.bar.update()
        self.means.add(done, scalars)
        self.steps += 1
        if self.first is None:  # torch.compile is in it: told apart, so that it spoils no speed
            self.first = {"first_step_seconds": time.perf_counter() - self.clock}
            self.clock, self.steps = time.perf_counter(), 0
        elif self.first and self.steps == 1:  # an estimate before long work
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.say(self.left(done, self.seconds()))
        if not (extra or last or done % self.args.log_every == 0):
            return
        line = {"step": done} | self.means.read(self.args.skip_limit) | {"lr": lr} | self.speed(self.seconds()) | self.first | extra
        self.means.clear()
        self.clock, self.steps, self.first = time.perf_counter(), 0, {}
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            shown = {k: v for k, v in line.items() if k.startswith(("diagonal", "consistency", "clamped", "val_", "tokens")) and "_q" not in k}
            numbers = "  ".join(f"{k} {v:,.4g}" for k, v in shown.items())
            left = "" if last else "  " + self.left(done, line["seconds_per_step"])
            self.say(f"step {done:,}/{self.args.steps:,}  {numbers}{left}")

    def say(self, text):
        """A line on the terminal, above the bar, from rank 0."""
        if self.file:
            tqdm.write(text) if not self.bar.disable else print(text, flush=True)

    def seconds(self):
        """A step's, the mean since the last line."""
        return (time.perf_counter() - self.clock) / self.steps if self.steps else self.first["first_step_seconds"]

    def left(self, done, seconds):
        """How long the rest takes at so many seconds a step, in words."""
        rest = (self.args.steps - done) * seconds
        size, unit = next((size, unit) for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")) if rest >= 2 * size or size == 1)
        return f"{rest / size:,.0f} {unit} left"

    def speed(self, seconds):
        rows = self.args.batch_size / seconds
        peak = next((v for k, v in PEAK_FLOPS.items() if self.device.type == "cuda" and k in torch.cuda.get_device_name()), None)
        cuda = self.device.type == "cuda"
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        out = {"seconds_per_step": seconds, "tokens_per_second": rows * self.seq_len, "peak_memory_gb": memory / 1e9}
        if peak and not self.args.context:  # blocks and contexts cost otherwise than whole rows
            out["mfu"] = rows * self.flops / (peak * self.world)
        return out

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16, from the vendor's data sheets


def flops_per_row(model, L):
    """FLOPs of one forward pass over one row: 2 per weight that multiplies a token, and attention's 4 L D per token."""
    config = model.config
    matmul = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name)  # which a row has once
    return L * (2 * (matmul + model.head.numel()) + 4 * config.layers * L * config.width)


# ------------------------------------------------------------------------------------------------
# Ranks, files and flags.


def from_torchrun():
    """(rank, world size, local rank) as torchrun leaves them in the environment, (0, 1, 0) without it; UserError where they make no sense."""
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not any(found.values()):
        return 0, 1, 0
    rank, world, local = (int(value) if (value or "").isdecimal() and len(value) < 8 else -1 for value in found.values())
    if not (0 <= rank < world and 0 <= local < world):
        said = ", ".join(f"{name}={value}" if value is not None else f"no {name}" for name, value in found.items())
        raise UserError(f"{said} in the environment is no rank of a group; torchrun sets all three, without torchrun unset them")
    return rank, world, local


@contextlib.contextmanager
def start_ranks(args):
    """(rank, world size, device) of this process; under torchrun, one of the process group until the block ends."""
    rank, world, local = from_torchrun()
    device = torch.device(args.device if args.device != "cuda" else f"cuda:{local}")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"local rank {local} has no GPU, this machine has {torch.cuda.device_count()}; start fewer ranks on it")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=args.timeout))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the {world} ranks did not meet: {str(error).splitlines()[0]}; start all with torchrun") from None
        # Where this rank fails, the group ends with the process, after its error is shown: the others see the end at once, and say so.
        atexit.register(end_group)
    yield rank, world, device
    end_group()


def end_group():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def step_of(path):
    """The step in a name checkpoint-STEP.pt; -1 where there is none."""
    return int(path.stem[11:]) if path.stem[11:].isdecimal() else -1


def checkpoints(folder):
    """The checkpoints in a run's folder, the newest first: checkpoint.pt, then those kept as checkpoint-STEP.pt."""
    kept = sorted((path for path in folder.glob("checkpoint-*.pt") if step_of(path) >= 0), key=step_of, reverse=True)
    return [path for path in (folder / "checkpoint.pt", *kept) if path.is_file()]


def save(model, ema, optimizer, step, means, meta, args):
    """Write args.out / checkpoint.pt: beside it, flushed to the disk, then renamed over it; keep the last args.keep.

    Raises UserError, the earlier checkpoints untouched, where the disk is full or the weights are not finite.
    """
    path = args.out / "checkpoint.pt"
    if not torch.stack([p.isfinite().all() for p in (*model.parameters(), *ema.parameters())]).all():
        raise UserError(f"the weights are not finite after step {step}; {path} is not overwritten: resume from it with a lower --lr")
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "means": means,
               "model_config": config_dict(model), "meta": meta, "args": plain(args)}  # fmt: skip
    beside, own = path.with_suffix(".tmp"), path.with_name(f"checkpoint-{step}.pt")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        own.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a file system without hard links keeps checkpoint.pt alone
            os.link(beside, own)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes its own error of a failed write
        beside.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} at step {step}: {reason}; earlier checkpoints are kept: make room, then --resume") from None
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # before older ones go
    os.close(folder)
    kept = [p for p in checkpoints(args.out)[1:] if step_of(p) <= step]  # a later one is what --resume could not read
    for old in set(checkpoints(args.out)[1:]) - set(kept[: args.keep]):
        old.unlink()


# What --resume may change. All else must be as it was, `stage1` too: the sha256 of the checkpoint that stage 2 starts from.
MAY_CHANGE = {"data", "out", "checkpoint", "config", "resume", "steps", "lr", "warmup", "cooldown", "clip", "ema", "micro_batch", "log_every",
              "val_every", "val_batches", "save_every", "keep", "skip_limit", "timeout", "device", "dtype", "compile",
              "activation_checkpointing"}  # fmt: skip


def restore(model, optimizer, ema, meta, args):
    """Load the newest checkpoint of args.out that is whole into model, optimizer and ema, strictly; return its step and sums of the log.

    Raises UserError where there is none, or it is of another model, data set or run than these flags describe.
    """
    for path in (paths := checkpoints(args.out) or [args.out / "checkpoint.pt"]):
        try:
            checkpoint = read_checkpoint(path)
            break
        except UserError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; trying the one before", file=sys.stderr)
    known = checkpoint["model_config"]
    if known != config_dict(model) | {key: known[key] for key in ("schedule_curve",) if key in known}:  # measured, no flag
        raise UserError(f"{path} was trained with {known}, these flags give {config_dict(model)}")
    if checkpoint["meta"]["sha256"] != meta["sha256"]:
        raise UserError(f"{path} was trained on another data set (sha256 of its rows differs); name that one with --data")
    for key, was in ({"loss": None} | checkpoint["args"]).items():  # stage 1 has none
        now = plain(args).get(key)
        if was != now and key not in MAY_CHANGE:
            raise UserError(f"{path} was trained with {key} {was}, this run has {now}; resume with the same, or name another --out")
    means = checkpoint.get("means")
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        ema.load_state_dict(checkpoint["ema"], strict=True)
        for network in (model, ema):
            network.set_schedule(known.get("schedule_curve"))
        Means("cpu", means)
    except Exception as error:  # torch raises many kinds where a state is of another model
        raise UserError(f"{path} does not fit its own flags: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}") from None
    return checkpoint["step"], means


def truncate_log(path, step, rank):
    """Drop the lines after the checkpoint's step, and a last one cut short: the resumed run writes them again."""

    def keep(line):
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    if rank == 0 and path.exists():
        replace(path, "".join(line + "\n" for line in path.read_text(errors="replace").splitlines() if keep(line)))


def replace(path, text):
    """Write a small file whole, or leave the old one."""
    beside = path.with_suffix(".tmp")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def plain(args):
    """An argparse namespace as a dict of plain builtins."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "flags"}


def write_config(args):
    """args.out / config.json: the flags as parsed, what they resolved to, the command line, versions and the git commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    content = {"flags": args.flags, "resolved": plain(args), "command": sys.argv, "versions": versions, "commit": commit or None}
    replace(args.out / "config.json", json.dumps(content, indent=1) + "\n")


def training_flags(parser, steps):
    """The flags that both stages share."""
    group = parser.add_argument_group("training")
    group.add_argument("--data", type=Path, default=Path("data/owt"), metavar="DIR", help="data set made by prepare_data.py")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: runs/DATA-STAGE)")
    group.add_argument("--steps", type=number(int, 1), default=steps, metavar="N",
                       help="optimizer steps (default: 1,000,000 of stage 1 or --joint, 100,000 of stage 2)")  # fmt: skip
    group.add_argument("--batch-size", type=number(int, 1, 1 << 20), default=512, metavar="ROWS", help="rows a step, over all ranks")
    group.add_argument("--micro-batch", type=number(int, 1, 1 << 20), metavar="ROWS", help="rows a rank takes at once (default: at most 64)")
    group.add_argument("--lr", type=number(float, 0, above=True), default=3e-4, help="learning rate of Adam")
    group.add_argument("--warmup", type=number(int, 0), default=2500, metavar="STEPS", help="steps of linear warm-up of the learning rate")
    group.add_argument(
        "--cooldown", type=number(int, 0), default=0, metavar="STEPS", help="last steps, over which it falls linearly to 0; constant between"
    )
    group.add_argument("--beta2", type=number(float, 0, 0.999999), default=0.999, metavar="B", help="Adam's second decay")
    group.add_argument("--clip", type=number(float, 0, above=True), default=1.0, metavar="NORM", help="largest norm of the gradient")
    group.add_argument("--ema", type=number(float, 0, 1), default=0.9999, metavar="DECAY", help="decay a step of the averaged weights")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights, row order, times and noise")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    group.add_argument("--config", type=Path, metavar="FILE", help="take flags from a run's config.json; flags given here win")
    group.add_argument("--diagonal-power", type=number(float, 0, 1), default=0.5, metavar="R",
                       help="exponent r of the diagonal's adaptive weight (45); 0 is the plain cross-entropy")  # fmt: skip
    group = parser.add_argument_group("logging")
    group.add_argument("--log-every", type=number(int, 1), default=100, metavar="STEPS", help="steps between lines of log.jsonl")
    group.add_argument("--val-every", type=number(int, 1), default=5000, metavar="STEPS", help="steps between validations")
    group.add_argument("--val-batches", type=number(int, 1), default=2, metavar="N", help="batches of --batch-size rows a validation")
    group.add_argument("--save-every", type=number(int, 1), default=5000, metavar="STEPS", help="steps between checkpoints")
    group.add_argument("--keep", type=number(int, 1), default=2, metavar="N", help="checkpoints kept, the newest ones")
    group.add_argument("--skip-limit", type=number(int, 0), default=10, metavar="N",
                       help="steps in a row whose gradient may be not finite, and which change nothing, before the run stops")  # fmt: skip
    group = parser.add_argument_group("machine")
    machine_flags(group)
    group.add_argument("--timeout", type=number(int, 1, 10**6), default=600, metavar="SECONDS",
                       help="how long a rank waits for others before all end; must exceed rank 0's time to read the data or to save")  # fmt: skip
    group.add_argument("--compile", action=BooleanOptionalAction, default=None, help="torch.compile (default: on cuda)")
    group.add_argument("--activation-checkpointing", action="store_true",
                       help="keep the input of each block alone and compute the rest again in the backward pass: less memory, more time")  # fmt: skip


def parse_training_args(parser, argv=None):
    """Parse, with --config replayed as flags before the ones given, and fill in the defaults that depend on others.

    args.flags keeps the flags as parsed, for config.json: what depends on the machine is decided anew there.
    """
    argv = sys.argv[1:] if argv is None else argv
    early = Parser(prog=parser.prog, add_help=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(argv)[0].config
    args = parser.parse_args((replay(parser, config) if config else []) + argv)
    args.flags = plain(args)
    resolve_machine(args)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    share = max(1, args.batch_size // from_torchrun()[1])
    args.micro_batch = args.micro_batch or next(n for n in range(min(64, share), 0, -1) if share % n == 0)
    return args


def replay(parser, path):
    """The flags in a config.json as an argument list; unknown keys are an error."""
    try:
        flags = json.loads(path.read_text())["flags"]
        items = list(flags.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--config {path}: not the config.json of a run") from None
    known, argv = {a.dest: a for a in parser._actions}, []
    for key, value in items:
        if key in ("config", "resume", "out") or value is None:
            continue
        if key not in known or key == "help":
            raise UserError(f"--config {path}: unknown key {key!r}; {parser.prog} has no such flag, is it of another program?")
        flag = known[key].option_strings[-1 if value is False else 0]
        if value is False and not flag.startswith("--no-"):
            continue  # a switch that was not thrown
        argv += [flag] if isinstance(value, bool) else [f"{flag}={value}"]
    return argv


CONTEXT_DROPOUT = 0.1


def context_flags(parser):
    """The flags of conditional training, in both stages."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--context", choices=["block", "any", "scatter"],
                       help="learn a block given a clean context: whole blocks (with --block-size), any number of tokens, or any set")  # fmt: skip
    group.add_argument("--block-size", type=number(int, 1), metavar="K", help="tokens that are written at once (default: all after the context)")
    group.add_argument("--context-dropout", type=number(float, 0, 1), default=CONTEXT_DROPOUT, metavar="P",
                       help="share of the rows that learn their block without the context, for guidance")  # fmt: skip


def check_context(args, seq_len):
    """UserError for flags of `context_flags` that contradict each other or the data."""
    if args.context_dropout != CONTEXT_DROPOUT and not args.context:
        raise UserError(f"--context-dropout {args.context_dropout} is of rows with a context; give --context too, or leave it out")
    if args.context and args.schedule == "calibrated":
        raise UserError("--schedule calibrated measures the loss of whole rows, without a context; leave out one of the two")
    if args.block_size and not args.context:
        raise UserError(f"--block-size {args.block_size} says how a context is cut; give --context block or any with it")
    if args.context == "scatter" and args.block_size:
        raise UserError(f"--block-size {args.block_size}: with --context scatter the block is all that is not given; leave it out")
    if args.context == "block" and (not args.block_size or seq_len % args.block_size):
        raise UserError(f"--context block needs a --block-size that divides the {seq_len} tokens of a row, got {args.block_size}")
    if (args.block_size or 1) > seq_len:
        raise UserError(f"--block-size {args.block_size} is longer than the {seq_len} tokens of a row")
    if args.context == "block" and args.block_size == seq_len:
        raise UserError(f"--block-size {args.block_size} is the whole row, before which there is no context; give one that divides it")


def model_flags(parser):
    """The flags that shape a network trained from scratch."""
    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=list(SIZES), default="base", help="base is the paper's 170M, tiny is for a CPU")
    group.add_argument("--schedule", choices=SCHEDULES, default="argmax",
                       help="law of the times (36); calibrated: by the loss, measured each --val-every steps, so that it falls linearly")  # fmt: skip
    group.add_argument(
        "--schedule-blend", type=number(float, 0, 1), default=0.9, metavar="LAMBDA", help="lambda of the argmax and the calibrated schedule"
    )
    group.add_argument("--position-lag", type=number(float, 0, 10), default=0.0, metavar="W",
                       help="earlier positions first (38): the last one's odds of progress are exp(-W) of the first one's")  # fmt: skip
    group.add_argument("--interpolant", choices=list(INTERPOLANTS), default="linear", help="path between noise and data (47)")


def new_model(args, meta):
    """A network from scratch, by the flags of `model_flags` and args.seed."""
    torch.manual_seed(args.seed)
    path = {key: getattr(args, key) for key in ("interpolant", "schedule", "schedule_blend", "position_lag")}
    return build_model(ModelConfig(vocab_size=meta["vocab_size"], seq_len=meta["seq_len"], **SIZES[args.size], **path))


def main():
    parser = Parser(prog="train_diagonal.py", description=__doc__)
    training_flags(parser, steps=1_000_000)
    context_flags(parser)
    model_flags(parser)
    args = parse_training_args(parser)
    args.out = args.out or Path("runs") / f"{args.data.name}-diagonal"
    args.surgery = False
    meta = read_meta(args.data)
    check_context(args, meta["seq_len"])
    model = new_model(args, meta)

    def objective(model, tokens, draw):
        return by_context(functools.partial(diagonal, power=args.diagonal_power), [model], tokens, draw, args)

    with start_ranks(args) as ranks:
        train(args, ranks, model, copy.deepcopy(model), objective, meta, passes=3)


if __name__ == "__main__":
    run(main)
