"""Stage 1: train the instantaneous denoiser psi_tt, the diagonal of the flow map.

    torchrun --nproc_per_node=8 train_diagonal.py               # the paper's OpenWebText run
    python train_diagonal.py --data data/grammar --size tiny --steps 2000 --warmup 100 \\
        --batch-size 128                                        # minutes on a CPU
    python train_diagonal.py @runs/NAME/flags.txt --out runs/again    # repeat a run

Reads a folder made by prepare_data.py. Writes runs/DATA-diagonal/: config.json (flags, command
line, versions), flags.txt, log.jsonl (one object a line) and checkpoint-STEP.pt.

The objective comes first, then the one training loop, which distill.py uses with another objective:

    objective(model, tokens, draw) -> ({name: loss}, {name: scalar})

of tokens (B, L) and a `Draw`. The loop adds the losses or, under gradient surgery, removes from
each gradient what conflicts with earlier losses. The scalars are detached means for the log.
"""

import argparse
import atexit
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import platform
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Import before init_process_group. Adam's first step would import it later, and then one of its
# default arguments holds the process group, whose threads can abort the exit.
import torch.distributed.nn.functional
from tqdm import tqdm

import prepare_data
from model import (
    INTERPOLANTS,
    SIZES,
    Conditional,
    DiT,
    Draw,
    ModelConfig,
    RowLoss,
    atomic_write,
    checkpoints,
    commit,
    head_loss,
    load_model,
    machine_flags,
    read_checkpoint,
    resolve_machine,
    save_checkpoint,
)
from prepare_data import amount, below_one, fraction, natural, new_parser, positive, say

# ------------------------------------------------------------------------------------------------
# The objective.


def cross_entropy(z, tokens):
    """-log psi(token) (22) for logits z (n, V) and tokens (n,): a function for `RowLoss`."""
    target = tokens[:, None]
    log_p = z.log_softmax(-1)
    loss = -log_p.gather(-1, target).squeeze(-1)
    g = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(loss)[:, None])  # p - one-hot
    return {"loss": loss, "distance": torch.linalg.vector_norm(g, dim=-1)}, g


def diagonal_loss(model, tokens, draw, power=0.5, target=None):
    """Cross-entropy of psi_tt(x_t) against the clean token (21, 22), weighted by (45), c = 0.01.

    power: the exponent r of (45). Only r = 0 learns E[x1 | x_t]: the weight depends on the token
    drawn, and the paper's r = 0.5 favours likely ones, so samples are sharper and less varied.
    target: a function of y (B, L, D) and t, returning a `RowLoss` to minimise instead.
    """
    B, L = tokens.shape
    tau = draw.uniform(1)
    t = model.times(tau).float().to(tokens.device, non_blocking=True)  # (B, 1 or L)
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, t)  # (B, L, D)
    h = model(y, t, t).flatten(0, 1)
    scale = torch.full((B * L,), 1 / (B * L), device=h.device)
    name = "diagonal_kl" if target else "diagonal_ce"
    divergence = target(y, t) if target else RowLoss(cross_entropy, (tokens.flatten(),))
    loss, report = head_loss(h, model.head, scale, divergence, 0.01, power, model.compiled)
    return {"diagonal": loss}, {name: report["loss"].mean()}


# ------------------------------------------------------------------------------------------------
# Clean contexts (section 4.2).


def draw_contexts(L, draw, args):
    """(start, length, context) of each row, (B,) each.

    A row's block is its `length` tokens from `start`. Its context is its first `context` tokens:
    all before the block, or none where the context is dropped.
    """
    size = args.block_size or L
    quarter, drop = draw.uniform(2).unbind(1)
    # All rows share one random offset, so a step has only four places, L / 4 apart, and rows with
    # equal lengths run as one batch.
    place = ((4 * quarter).floor() + draw.shared()) / 4  # uniform on [0, 1)
    unit = size if args.context == "block" else 1
    start = (place * (L // unit)).long() * unit
    if args.context == "any":  # some rows begin at their beginning, as samples without a prompt do
        start = torch.where(quarter < 1 / 8, 0, start)
    length = (L - start).clamp(max=size)
    return start, length, torch.where(drop < args.context_dropout, 0, start)


def by_context(loss, networks, tokens, draw, args):
    """loss(*networks, tokens, draw), or under --context its mean over rows of blocks and contexts.

    A row's context is whole blocks ("block") or any number of tokens ("any"). Rows of equal lengths
    run together, so no mask is needed and the fused attention kernels serve.
    """
    if not args.context:
        return loss(*networks, tokens, draw)
    start, length, context = draw_contexts(tokens.shape[1], draw, args)
    losses = {}
    scalars = {}
    for s, n, c in sorted(set(zip(start.tolist(), length.tolist(), context.tolist(), strict=True))):
        mask = (start == s) & (context == c)
        rows = mask.nonzero().squeeze(1).to(tokens.device, non_blocking=True)
        part = tokens[rows]
        positions = torch.arange(s, s + n, device=tokens.device)
        views = {}
        for network in dict.fromkeys(networks):  # the teacher may be the student
            keys = network.encode(part[:, :c]) if c else None
            views[network] = Conditional(network, keys, positions)
        conditional = [views[network] for network in networks]
        group = loss(*conditional, part[:, s : s + n], draw.part(mask.numpy()))
        share = mask.sum().item() / len(tokens)  # every row counts the same
        for sums, values in zip((losses, scalars), group, strict=True):
            add_to(sums, {name: share * value for name, value in values.items()})
    return losses, scalars


# ------------------------------------------------------------------------------------------------
# Rows of tokens, in an order that is a function of (seed, epoch).


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, rows):
    """A permutation of range(rows)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def take_rows(rows, vocab_size, seed, positions):
    """Tokens int64 (n, L) at positions (n,) of the endless sequence of shuffled epochs."""
    places = zip(*np.divmod(positions, len(rows)), strict=True)
    index = [epoch_order(seed, int(epoch), len(rows))[place] for epoch, place in places]
    tokens = rows[index].astype(np.int64)
    if tokens.max() >= vocab_size:
        found = f"the data hold token {tokens.max()}, beyond the vocabulary"
        raise SystemExit(f"{found}: make them again with prepare_data.py --force")
    return torch.from_numpy(tokens)


# ------------------------------------------------------------------------------------------------
# Gradients.


def accumulate(root, leaves, earlier, gradient=None, retain_graph=False):
    """The gradients of `root` in the leaves, added to the `earlier` ones (None: none yet)."""
    for leaf, grad in zip(leaves, earlier, strict=True):
        leaf.grad = grad
    # Autocast off: each product goes back in the precision it had.
    with torch.autocast(leaves[0].device.type, enabled=False):
        root.backward(gradient, retain_graph=retain_graph)
    return [leaf.grad for leaf in leaves]


def gradients(params, objective, model, batches, surgery):
    """Gradients of one step: (list like params, {name: mean scalar}), the same on every rank.

    batches: this rank's micro-batches, a list of (tokens, draw). Each loss is averaged over all
    micro-batches and ranks before the losses are added or, under surgery, projected.
    """
    # The noise factor is computed once a step. Micro-batches see a detached copy, and the gradient
    # that they leave on it goes back through the factor once, at the end.
    held = model.held_factor  # stage 2 holds it for good: W is frozen
    factor = model.noise_factor()
    model.held_factor = factor.detach().requires_grad_(factor.requires_grad)
    leaves = [*params, model.held_factor]
    for leaf in leaves:
        leaf.grad = None  # free the old gradients before allocating new ones
    by_loss = {}  # {loss: its gradients}, in order of priority
    scalars = {}
    for tokens, draw in batches:
        losses, report = objective(model, tokens, draw)
        report |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        add_to(scalars, {name: value / len(batches) for name, value in report.items()})
        if not surgery:
            losses = {"total": sum(losses.values())}
        for name, loss in losses.items():
            earlier = by_loss.get(name, [None] * len(leaves))
            by_loss[name] = accumulate(loss / len(batches), leaves, earlier)
    parts = []
    for grads in by_loss.values():
        *grads, factor_grad = grads
        if factor_grad is not None:
            # Retain the graph: with surgery each loss passes back through the same factor.
            grads = accumulate(factor, params, grads, gradient=factor_grad, retain_graph=True)
        pairs = zip(params, grads, strict=True)
        parts.append(average([torch.zeros_like(p) if g is None else g for p, g in pairs]))
    model.held_factor = held
    if surgery:
        conflicts = [remove_conflict(*pair) for pair in itertools.combinations(parts, 2)]
        scalars["conflict"] = torch.stack(conflicts).amax()
    for later in parts[1:]:
        torch._foreach_add_(parts[0], later)
    return parts[0], scalars


def add_to(sums, values):
    """Add a dict of numbers or tensors to another, name by name."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


def average(tensors):
    """Replace tensors by their mean over all ranks, in place.

    Not DistributedDataParallel: surgery needs two averaged gradients before it adds them.
    """
    if dist.is_initialized():
        flat = torch.nn.utils.parameters_to_vector(tensors)  # one message, not one per parameter
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / dist.get_world_size(), tensors)
    return tensors


def remove_conflict(first, second):
    """Gradient surgery: if <second, first> < 0, remove from `second` its part along `first`.

    Both are lists over all parameters. In place; returns 1.0 if there was a conflict, else 0.0.
    """
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    square = torch.stack([a.square().sum() for a in first]).sum()
    share = inner.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
    torch._foreach_sub_(second, [share * a for a in first])
    return (inner < 0).float()


# ------------------------------------------------------------------------------------------------
# The loop.

SKIP_LIMIT = 10  # consecutive steps with a non-finite gradient that a run tolerates
VALIDATION = 1 << 40  # the seed of validation's noise, which no run trains with


def train(args, ranks, model, objective, meta, critic=None):
    """Train `model` on args.data by `objective` up to args.steps steps, and write args.out.

    ranks: from `start_ranks`. critic: a second network that the objective trains (distill.py --loss
    dmd). It has a learning rate and clipping of its own, and Adam's first decay is then 0 for both.
    Resuming changes no number. SIGTERM and SIGINT save and end the run after the current step, with
    exit code 143.
    """
    rank, world, device = ranks
    data = {split: prepare_data.read_rows(args.data, split, meta) for split in ("train", "val")}
    if not len(data["train"]):
        raise SystemExit(f"{args.data} has no training rows: it was made with --val-only")
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)  # the moving average
    saved = {"model": model, "ema": ema}
    trained = {model: args.lr}
    if critic:
        saved["critic"] = critic.to(device)
        trained[critic] = args.critic_lr
    groups = [[p for p in network.parameters() if p.requires_grad] for network in trained]
    params = [p for group in groups for p in group]
    betas = (0.0 if critic else 0.9, args.beta2)
    optimizer = torch.optim.Adam([{"params": group} for group in groups], betas=betas, fused=True)
    saved["optimizer"] = optimizer
    start = restore(args, saved, meta) if args.resume else 0
    check_ranks_agree(start, meta, args)
    if rank == 0:
        write_config(args, start)
    for network in trained:
        network.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for network in (ema, *trained):
            network.compile_parts(dynamic=bool(args.context))
    if not model.embedding.requires_grad:
        model.hold_noise()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # A rank takes the same rows of each global batch, one line of this array a micro-batch.
    own_rows = np.arange(args.batch_size).reshape(world, -1, args.micro_batch)[rank]

    def load(split, seed, step):
        """This rank's tokens of a step: a list of tensors (micro-batch, L)."""
        places = [step * args.batch_size + rows for rows in own_rows]
        tokens = [take_rows(data[split], meta["vocab_size"], seed, p) for p in places]
        return [t.pin_memory() for t in tokens] if device.type == "cuda" else tokens

    def on_device(tokens, seed, step):
        """The micro-batches of a step: a list of (tokens, Draw)."""
        tokens = [t.to(device, non_blocking=True) for t in tokens]
        return [(t, Draw(seed, step, r, device)) for t, r in zip(tokens, own_rows, strict=True)]

    log = Log(args, ranks, start, meta["seq_len"])
    stop = catch_signals()
    reader = ThreadPoolExecutor(1)
    next_tokens = reader.submit(load, "train", args.seed, start)
    for step in range(start, args.steps):
        warm = (step + 1) / max(1, args.warmup)
        cool = (args.steps - step) / max(1, args.cooldown)
        for group, lr in zip(optimizer.param_groups, trained.values(), strict=True):
            group["lr"] = lr * min(1, warm, cool)

        batches = on_device(next_tokens.result(), args.seed, step)
        next_tokens = reader.submit(load, "train", args.seed, step + 1)  # read ahead
        with autocast:
            grads, scalars = gradients(params, objective, model, batches, args.surgery)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        largest = args.clip or float("inf")
        norms = [torch.nn.utils.clip_grad_norm_(group, largest) for group in groups]
        scalars["grad_norm"] = norms[0]
        if critic:
            scalars["critic_grad_norm"] = norms[1]

        # Fused Adam changes nothing when found_inf is 1: a bad step is skipped without a sync.
        finite = torch.stack(norms).isfinite().all()
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))  # a short run's average is useful too
        averaged = list(ema.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in model.parameters()], 1 - decay)
        log.add(scalars, finite)

        done = step + 1
        stopping = any_rank(stop)
        validate = done % args.val_every == 0 or done == args.steps
        save = done % args.save_every == 0 or done == args.steps or stopping
        if not (validate or save or done % args.log_every == 0):
            continue
        extra = {"lr": optimizer.param_groups[0]["lr"]} | log.speed()
        if validate:
            totals = {}
            with torch.no_grad(), autocast:
                for k in range(args.val_batches):  # the same rows and noise every time
                    for tokens, draw in on_device(load("val", 0, k), VALIDATION, k):
                        add_to(totals, objective(ema, tokens, draw)[1])
            scores = means(totals, args.val_batches * len(own_rows))
            extra |= {f"val_{name}": value for name, value in scores.items()}
        log.write(done, extra)  # ends the run if too many steps were skipped
        if save and rank == 0:
            content = {name: part.state_dict() for name, part in saved.items()}
            content |= {"step": done, "model_config": asdict(model.config)}
            save_checkpoint(args.out, content | {"meta": meta, "args": plain(args)}, args.keep)
        log.reset()  # the time for validating and saving is not a step's
        if stopping:
            log.say(f"stopped by a signal after step {done:,}, which is saved; --resume continues")
            break
    any_rank(False)  # no rank leaves before rank 0 has written
    reader.shutdown()
    log.bar.close()
    if done < args.steps:
        raise SystemExit(128 + signal.SIGTERM)  # not finished: `train && distill` ends here


def catch_signals():
    """A list that stays empty until SIGTERM or SIGINT arrives."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        # A second one kills, but torchrun may forward a signal that its ranks have got already.
        if "RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def any_rank(flag):
    """Whether `flag` is true on any rank. On the CPU, so that it does not wait for the GPU."""
    total = torch.tensor(float(bool(flag)))
    if dist.is_initialized():
        dist.all_reduce(total)
    return bool(total)


def means(sums, count):
    """{name: a number} from {name: a sum on the device}, averaged over ranks: one transfer."""
    (values,) = average([torch.stack([value.float() for value in sums.values()])])
    return dict(zip(sums, (values / count).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------
# The log.


class Log:
    """Means since the last line, to log.jsonl and the terminal. The sums stay on the device."""

    def __init__(self, args, ranks, start, seq_len):
        self.args = args
        self.seq_len = seq_len
        self.rank, self.world, self.device = ranks
        hidden = self.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(initial=start, total=args.steps, disable=hidden, unit="step")
        work = f"steps {start + 1:,} to {args.steps:,} of {args.batch_size} x {seq_len:,} tokens"
        self.say(f"{args.out}: {work}, on {self.world} x {self.device.type}, {args.dtype}")
        if args.warmup + args.cooldown > args.steps:
            self.say("--warmup and --cooldown exceed --steps: the learning rate stays below --lr")
        self.streak = torch.zeros((), device=self.device)  # bad steps in a row, up to now
        self.reset()

    def reset(self):
        self.sums = {}
        self.steps = 0
        self.clock = time.perf_counter()

    def add(self, scalars, finite):
        """Add a step's scalars; a step that is not finite counts as skipped and is in no mean."""
        self.bar.update()
        self.steps += 1
        self.latest = scalars
        self.streak = torch.where(finite, 0, self.streak + 1)
        kept = {name: value.where(finite, 0) for name, value in scalars.items()}
        add_to(self.sums, kept | {"skipped": (~finite).float()})

    def write(self, done, extra):
        """Write a line, from rank 0. SystemExit after more than SKIP_LIMIT bad steps in a row."""
        sums = means(self.sums | {"streak": self.streak}, 1)
        streak = sums.pop("streak")
        if streak > SKIP_LIMIT:
            bad = [name for name, value in means(self.latest, 1).items() if not np.isfinite(value)]
            found = f"{bad[0]} is not finite at step {done} and {streak - 1:.0f} before"
            raise SystemExit(f"{found}: --resume with a lower --lr or --clip")
        skipped = sums.pop("skipped")
        good = self.steps - skipped
        line = {"step": done} | {name: value / good for name, value in sums.items() if good}
        if skipped:
            line["skipped"] = skipped
        line |= extra
        if self.rank > 0:
            return
        try:
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint's line is on disk before the checkpoint
        except OSError as error:
            raise SystemExit(f"cannot write log.jsonl: {error}; make room, then --resume") from None
        shown = ("diagonal", "consistency", "matching", "critic_kl", "clamped", "skipped")
        shown += ("val_", "tokens")
        numbers = [f"{k} {v:,.4g}" for k, v in line.items() if k.startswith(shown)]
        left = tqdm.format_interval((self.args.steps - done) * line["seconds_per_step"])
        self.say("  ".join([f"step {done:,}/{self.args.steps:,}", *numbers, f"{left} left"]))

    def speed(self):
        """Seconds a step since `reset`, compilation included, tokens a second and peak memory."""
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds = (time.perf_counter() - self.clock) / self.steps
        tokens = self.args.batch_size * self.seq_len
        speed = {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        return speed | {"peak_memory_gb": peak / 1e9}

    def say(self, text):
        """Print a line, above the progress bar, from rank 0."""
        if self.rank == 0:
            self.bar.clear()
            with contextlib.suppress(SystemExit):  # stdout may be on a full disk
                say(text)
            self.bar.refresh()


# ------------------------------------------------------------------------------------------------
# Ranks, files and resuming.


def start_ranks(args):
    """(rank, world size, device) of this process; under torchrun it joins the process group."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    backend = "gloo"
    if args.device == "cuda":
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        torch.cuda.set_device(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus:  # NCCL refuses a shared GPU
            backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
        # At exit, so that after a failure this rank's own message is printed first.
        atexit.register(dist.destroy_process_group)
    rows = world * args.micro_batch
    if args.batch_size % rows:
        found = f"--batch-size {args.batch_size} is not a multiple of {rows}"
        why = f"{world} ranks x --micro-batch {args.micro_batch}"
        near = max(1, round(args.batch_size / rows)) * rows
        raise SystemExit(f"{found} ({why}): try --batch-size {near}, or another --micro-batch")
    return rank, world, device


def plain(args):
    """An argparse namespace as a dict of plain builtins."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


# Flags that --resume may change. All others must be as they were.
MAY_CHANGE = set(
    "data out checkpoint stage1_checkpoint resume steps lr critic_lr warmup cooldown clip ema "
    "micro_batch log_every val_every val_batches save_every keep device dtype compile "
    "activation_checkpointing".split()
)


def check_ranks_agree(step, meta, args):
    """SystemExit if the ranks differ in step, data or flags: machines may not share their files."""
    if not dist.is_initialized():
        return
    folders = ("data", "out", "checkpoint", "stage1_checkpoint")  # may be mounted elsewhere
    flags = {key: value for key, value in plain(args).items() if key not in folders}
    text = repr((step, meta["sha256"], flags))
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    total = torch.tensor(digest, dtype=torch.int64)
    dist.all_reduce(total)
    if total != digest * dist.get_world_size():
        raise SystemExit("the ranks differ in flags, data or step; give all the same, shared files")


def restore(args, saved, meta):
    """Load the newest whole checkpoint of args.out into the objects `saved`; return its step.

    Raises SystemExit if it belongs to another data set or run than the flags describe.
    """
    checkpoint = read_checkpoint(args.out)
    prepare_data.same_tokens(args.out, checkpoint["meta"], args.data, meta, "seq_len", "sha256")
    was = checkpoint["args"]
    now = plain(args)
    for key in ("loss", *now):  # stage 1 has no --loss
        if key not in MAY_CHANGE and was.get(key) != now.get(key):
            found = f"{args.out} was trained with {key} {was.get(key)!s:.60}"
            advice = "resume with the same flags, or name another --out"
            if key in ("start", "stage1"):
                advice = "name the --checkpoint of then, perhaps an earlier checkpoint-STEP.pt"
            raise SystemExit(f"{found}, not {now.get(key)!s:.60}; {advice}")
    if checkpoint["step"] >= args.steps:
        raise SystemExit(f"{args.out} is already at step {checkpoint['step']}; raise --steps")
    for key in ("steps", "lr", "warmup", "cooldown", "clip", "ema", "keep"):
        if was[key] != getattr(args, key):
            say(f"resuming with --{key} {getattr(args, key)}; it was {was[key]}")
    for name, part in saved.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["step"]


def expanded(arguments):
    """Command-line arguments, with the lines of a file in place of each @FILE."""
    for argument in arguments:
        if argument.startswith("@"):
            yield from expanded(Path(argument[1:]).read_text().splitlines())
        else:
            yield argument


def write_config(args, start):
    """Write config.json and flags.txt, and keep the lines up to step `start` of an old log."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot write {args.out}: {error.strerror}; change --out") from None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    config = {"args": plain(args), "command": sys.argv, "versions": versions, "commit": commit()}
    flags = [flag for flag in expanded(sys.argv[1:]) if flag != "--resume"]
    log = args.out / "log.jsonl"
    kept = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, KeyError):  # a killed run may have cut a line short
            if json.loads(line)["step"] <= start:
                kept.append(line)
    files = {"config.json": [json.dumps(config, indent=1)], "flags.txt": flags, "log.jsonl": kept}
    for name, lines in files.items():
        with atomic_write(args.out / name) as file:
            file.writelines(line + "\n" for line in lines)


# ------------------------------------------------------------------------------------------------
# Flags.


def training_flags(parser, steps, steps_help="optimizer steps"):
    """The flags that both stages share."""
    add = parser.add_argument_group("training").add_argument
    add("--data", type=Path, default=Path("data/owt"), help="data set made by prepare_data.py")
    add("--out", type=Path, help="folder to write (default: runs/DATA-diagonal or -LOSS)")
    add("--steps", type=positive, default=steps, help=steps_help)
    add("--batch-size", type=positive, default=512, help="rows a step, over all ranks")
    add("--micro-batch", type=positive, help="rows a rank takes at once (default: at most 64)")
    add("--lr", type=amount, default=3e-4, help="learning rate of Adam")
    add("--warmup", type=natural, default=2500, help="steps of linear warm-up of the learning rate")
    add("--cooldown", type=natural, default=0, help="final steps, in which it falls linearly to 0")
    add("--beta2", type=below_one, default=0.999, help="Adam's second decay")
    add("--clip", type=amount, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--ema", type=below_one, default=0.9999, help="decay per step of the averaged weights")
    add("--seed", type=natural, default=0, help="seed of weights, row order, times and noise")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--diagonal-power", type=fraction, default=0.5, help="r of (45); 0 is the plain loss")
    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=positive, default=100, help="steps between lines of log.jsonl")
    add("--val-every", type=positive, default=5000, help="steps between validations")
    add("--val-batches", type=positive, default=2, help="batches of --batch-size rows a validation")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="checkpoints to keep, the newest ones")
    add = parser.add_argument_group("speed and memory").add_argument
    yes_no = argparse.BooleanOptionalAction
    add("--compile", action=yes_no, help="torch.compile (default: on cuda)")
    add("--activation-checkpointing", action="store_true", help="recompute blocks to save memory")
    machine_flags(parser)


def context_flags(parser):
    """The flags of conditional training, in both stages."""
    add = parser.add_argument_group("prompts").add_argument
    add("--context", choices=["block", "any"], help="learn after whole blocks, or any clean tokens")
    add("--block-size", type=positive, help="tokens written at once (default: all that follow)")
    add("--context-dropout", type=fraction, help="share without it, for guidance (default: 0.1)")


# The flags of a network trained from scratch; one that starts from a checkpoint has them from it.
# The parser's defaults are None, so that a flag at its default value counts as given.
MODEL_DEFAULTS = dict(
    size="base", schedule="argmax", schedule_blend=0.9, position_lag=0.0, interpolant="linear"
)


def first_given(args, names):
    """The first of these flags that is not None, as "--flag"; None if all are."""
    given = [name for name in names if getattr(args, name) is not None]
    return "--" + given[0].replace("_", "-") if given else None


def fill_in(args, **defaults):
    """Set the flags that are None to their defaults."""
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})


def model_flags(parser):
    """The flags that shape a network trained from scratch."""
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=list(SIZES), help="(default: base, the paper's 170M)")
    add("--schedule", choices=["argmax", "linear"], help="how to draw times (36) (default: argmax)")
    add("--schedule-blend", type=fraction, help="lambda of the argmax schedule (default: 0.9)")
    text = "earlier positions first (38): the last's odds are exp(-LAG) the first's (default: 0)"
    add("--position-lag", type=prepare_data.number(float, -8, 8), metavar="LAG", help=text)
    add("--interpolant", choices=list(INTERPOLANTS), help="the path (47) (default: linear)")


def parse_training_args(parser):
    """Parse, and fill in the defaults that depend on the machine."""
    try:
        args = parser.parse_args()
    except (UnicodeDecodeError, RecursionError):
        raise SystemExit("@FILE is not a text of flags, one argument a line") from None
    resolve_machine(args)
    if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():  # one process, whatever a cluster has set
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.micro_batch is None:  # the largest divisor of this rank's rows, up to 64
        rows = max(1, args.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
        args.micro_batch = max(n for n in range(1, min(64, rows) + 1) if rows % n == 0)
    return args


def check_run(args, seq_len):
    """SystemExit for flags that contradict each other, the data, or a finished run."""
    log = args.out / "log.jsonl"
    if not args.resume and checkpoints(args.out):
        raise SystemExit(f"{args.out} holds a run: --resume it, delete it, or change --out")
    if not args.resume and log.exists() and log.stat().st_size:
        found = f"{args.out} holds a run that has not saved a checkpoint"
        raise SystemExit(f"{found}: delete it, or change --out")
    size = args.block_size
    if size and not args.context:
        raise SystemExit(f"--block-size {size} needs --context block or any")
    if args.context == "block" and not (size and size < seq_len and seq_len % size == 0):
        raise SystemExit(f"--context block needs a --block-size that divides {seq_len}, not {size}")


def new_model(args, meta):
    """A network from scratch, by the flags of `model_flags` and args.seed."""
    torch.manual_seed(args.seed)
    path = {name: getattr(args, name) for name in MODEL_DEFAULTS if name != "size"}
    return DiT(ModelConfig(meta["vocab_size"], meta["seq_len"], **SIZES[args.size], **path))


def model_from(args, meta):
    """The averaged weights of the checkpoint args.init, to go on with on rows of any length."""
    path = args.out if args.resume else args.init
    model, checkpoint = load_model(path, seq_len=meta["seq_len"])
    prepare_data.same_tokens(path, checkpoint["meta"], args.data, meta)
    vars(args).update({name: checkpoint["args"][name] for name in MODEL_DEFAULTS})
    return model.train().requires_grad_(True)


def main():
    parser = new_parser(__doc__, fromfile_prefix_chars="@")  # @FILE: an argument a line
    training_flags(parser, steps=1_000_000)
    context_flags(parser)
    model_flags(parser)
    help = "start from the weights of this checkpoint or run, of either stage (default: random)"
    parser.add_argument("--init", type=Path, metavar="PATH", help=help)
    args = parse_training_args(parser)
    args.out = args.out or Path("runs") / f"{args.data.name}-diagonal"
    args.surgery = False
    flag = first_given(args, MODEL_DEFAULTS)
    if args.init and flag:
        raise SystemExit(f"--init {args.init} has fixed {flag}: drop it, or drop --init")
    if args.context_dropout is not None and not args.context:
        raise SystemExit(f"--context-dropout {args.context_dropout} needs --context block or any")
    fill_in(args, **MODEL_DEFAULTS, context_dropout=0.1)
    meta = prepare_data.read_meta(args.data)
    check_run(args, meta["seq_len"])
    model = model_from(args, meta) if args.init else new_model(args, meta)
    loss = functools.partial(diagonal_loss, power=args.diagonal_power)

    def objective(model, tokens, draw):
        return by_context(loss, [model], tokens, draw, args)

    train(args, start_ranks(args), model, objective, meta)


if __name__ == "__main__":
    main()
