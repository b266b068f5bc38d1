"""Stage 1: train the instantaneous denoiser psi_tt, the diagonal of the flow map.

    torchrun --nproc_per_node=8 train_diagonal.py               # the paper's OpenWebText run
    python train_diagonal.py --data data/grammar --size tiny --batch-size 128 --steps 9000

Reads a folder made by prepare_data.py. Writes runs/DATA-diagonal/: config.jsonl (a line for each
start: flags, command, versions), log.jsonl and checkpoint-STEP.pt. --resume continues such a run.

The objective comes first, then the one training loop, which distill.py uses with another objective:

    objective(model, tokens, draw) -> ({name: loss}, {name: scalar})

of tokens (B, L) and a `Draw`. The loop adds the losses or, under gradient surgery, removes from
each gradient what conflicts with earlier losses. The scalars are detached means for the log.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import functools
import itertools
import json
import os
import platform
import shutil
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

import model as net
from model import Conditional, DiT, Draw, RowLoss, head_loss, load_model, parse
from prepare_data import explain, new_parser, positive, read_meta, read_rows, same_tokens, say


# ---- The objective. ----------------------------------------------------------------------------
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
    target: a function of y (B, L, D) and t, returning a `RowLoss` to minimise instead."""
    B, L = tokens.shape
    tau = draw.uniform(1)
    t = model.times(tau).float().to(tokens.device, non_blocking=True)  # (B, 1 or L)
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, t)  # (B, L, D)
    h = model(y, t, t).flatten(0, 1)
    scale = torch.full((B * L,), 1 / (B * L), device=h.device)
    name = "diagonal_kl" if target else "diagonal_ce"
    row_loss = target(y, t) if target else RowLoss(cross_entropy, (tokens.flatten(),))
    loss, report = head_loss(h, model.head, scale, row_loss, 0.01, power, model.compiled)
    return {"diagonal": loss}, {name: report["loss"].mean()}


# ---- Clean contexts (section 4.2). -------------------------------------------------------------
def draw_contexts(L, draw, args):
    """(start, length, context) of each row, (B,) each.

    A row's block is its `length` tokens from `start`. Its context is its first `context` tokens:
    all before the block, or none where the context is dropped."""
    size = args.block_size or L
    quarter, drop = draw.uniform(2).unbind(1)
    # Blocks start at one of four places, L / 4 apart, from a random offset that the step shares:
    # few places mean few lengths, and rows of equal lengths run as one batch.
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
    run together, so no mask is needed and the fused attention kernels serve."""
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


# ---- Gradients. --------------------------------------------------------------------------------
def gradients(params, objective, model, batches, surgery):
    """Gradients of one step: (list like params, {name: mean scalar}), the same on every rank.

    batches: this rank's micro-batches, a list of (tokens, draw). Each loss is averaged over all
    micro-batches and ranks before the losses are added or, under surgery, projected."""
    device = params[0].device.type
    by_loss = {}  # {loss: its gradients}, in order of priority
    scalars = {}
    for p in params:
        p.grad = None  # free the old gradients before allocating new ones
    for tokens, draw in batches:
        losses, report = objective(model, tokens, draw)
        report |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        add_to(scalars, {name: value / len(batches) for name, value in report.items()})
        if not surgery:
            losses = {"total": sum(losses.values())}
        for name, loss in losses.items():
            earlier = by_loss.get(name, [None] * len(params))
            for p, grad in zip(params, earlier, strict=True):
                p.grad = grad
            with torch.autocast(device, enabled=False):  # each operation in its forward dtype
                (loss / len(batches)).backward()
            by_loss[name] = [p.grad for p in params]
    parts = []
    for grads in by_loss.values():
        pairs = zip(params, grads, strict=True)
        parts.append(average([torch.zeros_like(p) if g is None else g for p, g in pairs]))
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

    Not DistributedDataParallel: surgery needs two averaged gradients before it adds them."""
    if dist.is_initialized():
        flat = torch.nn.utils.parameters_to_vector(tensors)  # one message, not one per parameter
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / dist.get_world_size(), tensors)
    return tensors


def remove_conflict(first, second):
    """Gradient surgery: if <second, first> < 0, remove from `second` its part along `first`.

    Both are lists over all parameters. In place; returns 1.0 if there was a conflict, else 0.0."""
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    square = torch.stack([a.square().sum() for a in first]).sum()
    share = inner.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
    torch._foreach_sub_(second, [share * a for a in first])
    return (inner < 0).float()


# ---- The loop. ---------------------------------------------------------------------------------

SKIP_LIMIT = 10  # a run ends if whole log lines, of more steps than this, had no finite gradient
VAL_SEED = 1 << 40  # the seed of validation's noise, which no run trains with
VAL_BATCHES = 2  # global batches a validation


def train(args, ranks, model, objective, meta, resumed=None, stage1=None, critic=None):
    """Train `model` on args.data by `objective` up to args.steps steps, and write args.out.

    ranks: from `start_ranks`. resumed: a checkpoint to continue as if the run had never stopped.
    stage1: a frozen network, kept in each checkpoint. critic: a second network that the objective
    trains (distill.py --loss dmd), with a learning rate and clipping of its own; Adam's first decay
    is then 0 for both. A signal saves, then ends the run after this step with exit code 143."""
    rank, world, device = ranks
    data = {split: read_rows(args.data, split, meta) for split in ("train", "val")}
    model.to(device)
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}  # shared, not copied
    ema = copy.deepcopy(model, frozen).requires_grad_(False)  # the moving average
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
    done = 0
    if resumed:
        done = resumed["step"]
        for name, part in saved.items():
            part.load_state_dict(resumed[name])
        for group in optimizer.param_groups:
            group["betas"] = betas  # loading brings the old ones back
        resumed.clear()  # free its weights: the caller holds the dict as long as the run lasts
    check_ranks_agree(args, done, meta)
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

    def batches(split, step, order_seed, noise_seed):
        """This rank's micro-batches of a step: a list of (tokens (micro-batch, L), Draw)."""
        parts = []
        for rows in own_rows:
            places = step * args.batch_size + rows
            tokens = take_rows(data[split], order_seed, places)
            if device.type == "cuda":
                tokens = tokens.pin_memory()
            draw = Draw(noise_seed, step, rows, device)
            parts.append((tokens.to(device, non_blocking=True), draw))
        return parts

    def save():
        content = {name: part.state_dict() for name, part in saved.items()}
        content |= {"stage1": stage1.state_dict()} if stage1 else {}
        content |= {"step": done, "model_config": asdict(model.config)}
        net.save_checkpoint(args.out, content | {"meta": meta, "args": plain(args)}, args.keep)

    log = Log(args, ranks, done, meta["seq_len"])
    stop = catch_signals()
    reader = ThreadPoolExecutor(1)
    ahead = reader.submit(batches, "train", done, args.seed, args.seed)
    if rank == 0 and args.steps == 0:
        save()  # an untrained network, for distill.py --joint
    for step in range(done, args.steps):
        warm = (step + 1) / max(1, args.warmup)
        cool = (args.steps - step) / max(1, args.cooldown)
        for group, lr in zip(optimizer.param_groups, trained.values(), strict=True):
            group["lr"] = lr * min(1, warm, cool)

        micro_batches = ahead.result()
        ahead = reader.submit(batches, "train", step + 1, args.seed, args.seed)
        with autocast:
            grads, scalars = gradients(params, objective, model, micro_batches, args.surgery)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        largest = args.clip or float("inf")
        norms = [torch.nn.utils.clip_grad_norm_(group, largest) for group in groups]
        scalars |= dict(zip(["grad_norm", "critic_grad_norm"], norms, strict=False))

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
        saving = done % args.save_every == 0 or done == args.steps or stopping
        if not (validate or saving or done % args.log_every == 0):
            continue
        extra = {"lr": optimizer.param_groups[0]["lr"]} | log.speed()
        if validate:
            totals = {}
            with torch.no_grad(), autocast:
                for k in range(VAL_BATCHES):  # the same rows and noise every time
                    for tokens, draw in batches("val", k, 0, VAL_SEED):
                        add_to(totals, objective(ema, tokens, draw)[1])
            scores = means(totals, VAL_BATCHES * len(own_rows))
            extra |= {f"val_{name}": value for name, value in scores.items()}
        log.write(done, extra)  # ends the run if too many steps were skipped
        # A diverged run must not replace its good checkpoints.
        if saving and rank == 0 and (finite or stopping or done == args.steps):
            save()
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
    """A list that stays empty until a signal asks the run to end."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: caught.append(number))
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


# ---- Machinery: skip at first reading. ---------------------------------------------------------
@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, rows):
    """A permutation of range(rows)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def take_rows(rows, seed, positions):
    """Tokens int64 (n, L) at positions (n,) of the endless sequence of shuffled epochs."""
    places = zip(*np.divmod(positions, len(rows)), strict=True)
    index = [epoch_order(seed, int(epoch), len(rows))[place] for epoch, place in places]
    return torch.from_numpy(rows[index].astype(np.int64))


class Log:
    """Means since the last line, to log.jsonl and the terminal. The sums stay on the device."""

    def __init__(self, args, ranks, start, seq_len):
        self.args = args
        self.rank, world, self.device = ranks
        self.lock = claim_folder(args, start) if self.rank == 0 else None
        self.tokens = args.batch_size * seq_len  # a step
        self.bad_steps = 0  # in a row, up to the last line
        self.bar = tqdm(initial=start, total=args.steps, disable=self.rank > 0 or None, unit="step")
        work = f"steps {start + 1:,} to {args.steps:,} of {args.batch_size} x {seq_len:,} tokens"
        self.say(f"{args.out}: {work}, on {world} x {self.device.type}, {args.dtype}")
        if args.warmup >= args.steps:
            self.say(f"--warmup {args.warmup:,} is as long as the run or longer: shorten it")
        self.reset()

    def reset(self):
        self.sums = {}
        self.steps = 0
        self.clock = time.perf_counter()

    def add(self, scalars, finite):
        """Add a step's scalars; a step that is not finite counts as skipped and is in no mean."""
        self.bar.update()
        self.steps += 1
        kept = {name: value.where(finite, 0) for name, value in scalars.items()}
        add_to(self.sums, kept | {"skipped": (~finite).float()})

    def speed(self):
        """Seconds a step since `reset`, compilation included, and tokens a second."""
        peak = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        seconds = (time.perf_counter() - self.clock) / self.steps
        return {"seconds_per_step": seconds, "tokens_per_second": self.tokens / seconds} | peak

    def write(self, done, extra):
        """Write a line, from rank 0. SystemExit if SKIP_LIMIT says that the run is lost."""
        sums = means(self.sums, 1)
        skipped = sums.pop("skipped")
        good = self.steps - skipped
        self.bad_steps = 0 if good else self.bad_steps + self.steps
        if self.bad_steps > SKIP_LIMIT:
            found = f"no finite gradient in {self.bad_steps} steps up to {done}"
            raise SystemExit(f"{found}: lower --lr or --clip, --resume from before the loss rose")
        line = {"step": done} | {name: value / good for name, value in sums.items() if good}
        line |= ({"skipped": skipped} if skipped else {}) | extra
        if self.rank > 0:
            return
        path = self.args.out / "log.jsonl"
        with explain(f"cannot write {path}", "make room, then --resume"), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint's line is on disk before the checkpoint
        hidden = ("loss_", "lr", "grad", "distance", "teacher", "peak", "seconds", "step")
        shown = {name: value for name, value in line.items() if not name.startswith(hidden)}
        numbers = [f"{k} {v:,.0f}" if v >= 1000 else f"{k} {v:.4g}" for k, v in shown.items()]
        left = tqdm.format_interval((self.args.steps - done) * line["seconds_per_step"])
        self.say("  ".join([f"step {done:,}/{self.args.steps:,}", *numbers, f"{left} left"]))

    def say(self, text):
        """Print a line above the progress bar."""
        with self.bar.external_write_mode():
            say(text)


def start_ranks(args):
    """(rank, world size, device) of this process; fills in what args leave to the machine."""
    rank, world = 0, 1
    device = torch.device(args.device)
    backend = "gloo"
    if args.device == "cuda":
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        torch.cuda.set_device(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus:  # NCCL refuses a shared GPU
            backend = "cpu:gloo,cuda:nccl"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
        # At exit, so that after a failure this rank's own message is printed first.
        atexit.register(dist.destroy_process_group)
        rank, world = dist.get_rank(), dist.get_world_size()
    rows = args.batch_size // world
    if args.micro_batch is None:  # the largest divisor of this rank's rows, up to 64
        args.micro_batch = max(n for n in range(1, min(64, max(1, rows)) + 1) if rows % n == 0)
    if args.batch_size % (world * args.micro_batch):
        unit = f"{world} ranks x --micro-batch {args.micro_batch}"
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of {unit}")
    if args.compile is None:
        args.compile = args.device == "cuda"
    compilers = [os.environ.get("CXX", "g++")]
    if args.device == "cuda":
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    if args.compile and not any(map(shutil.which, compilers)):
        raise SystemExit(f"--compile needs {compilers[0]}: install it, or add --no-compile")
    return rank, world, device


def plain(args):
    """An argparse namespace as a dict of plain builtins."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def check_ranks_agree(args, step, meta):
    """SystemExit if the ranks differ in step, data or flags, or if one has not come this far."""
    if not dist.is_initialized():
        return
    found = [None] * dist.get_world_size()
    with contextlib.suppress(RuntimeError):  # the connection to a rank that failed is closed
        dist.all_gather_object(found, (step, meta["sha256"], plain(args)))
    if any(other != found[0] for other in found) or not found[0]:
        raise SystemExit("a rank failed to start, or its files or flags differ from the others'")


def read_resumed(args, meta):
    """The newest checkpoint of args.out if args.resume and there is one, else None: a new run.

    Says which flags have changed since. SystemExit if args.out holds a run that is not to be
    resumed, one on other data or one that has ended, the last with exit code 0."""
    found = net.checkpoints(args.out)
    if not args.resume and (found or (args.out / "log.jsonl").exists()):
        raise SystemExit(f"{args.out} holds a run: --resume it, delete it, or change --out")
    if not found:
        if args.resume:
            say(f"{args.out} has no checkpoint: this is a new run")
        return None
    checkpoint = net.read_checkpoint(args.out)
    if any(checkpoint["args"].get(k) != vars(args).get(k) for k in ("loss", "joint")):
        raise SystemExit(f"{args.out} holds a run of another kind (--loss, --joint): change --out")
    same_tokens(args.out, checkpoint["meta"], args.data, meta, "seq_len", "sha256")
    was = checkpoint["args"] | {"resume": True, "micro_batch": args.micro_batch}
    for key, value in plain(args).items():
        if was.get(key) != value:
            say(f"resuming with {key} {value}; it was {was.get(key)}")
    if checkpoint["step"] >= args.steps:
        say(f"{args.out} is already at step {checkpoint['step']:,}; --steps sets a later end")
        raise SystemExit(0)  # so that a chain of jobs goes on
    return checkpoint


def claim_folder(args, start):
    """Add this start to config.jsonl, returned open and locked, and cut the log back to it."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = open(args.out / "config.jsonl", "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process trains in {args.out}: change --out") from None
    except OSError:  # a file system without locks
        pass
    if (newest := net.checkpoints(args.out)) and newest[0].name != f"checkpoint-{start}.pt":
        raise SystemExit(f"{args.out} has trained on meanwhile: start again")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    config = {"step": start, "args": plain(args), "command": sys.argv, "versions": versions}
    print(json.dumps(config | {"commit": net.commit()}), file=file, flush=True)
    log = args.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]  # a kill may have cut the last short
    with net.atomic_write(log) as kept:
        kept.writelines(line for line in whole if json.loads(line)["step"] <= start)
    return file


# ---- Flags. ------------------------------------------------------------------------------------
def training_flags(parser, steps, steps_help="optimizer steps"):
    """The flags that both stages share."""
    add = parser.add_argument_group("training").add_argument
    add("--data", type=Path, default=Path("data/owt"), help="data set made by prepare_data.py")
    add("--out", type=Path, help="folder to write (default: runs/DATA-diagonal or -LOSS)")
    add("--steps", type=int, default=steps, help=steps_help)
    add("--batch-size", type=positive, default=512, help="rows a step, over all ranks")
    add("--micro-batch", type=positive, help="rows a rank takes at once (default: at most 64)")
    add("--lr", type=float, default=3e-4, help="learning rate of Adam")
    add("--warmup", type=int, default=2500, help="steps of linear warm-up of the learning rate")
    add("--cooldown", type=int, default=0, help="final steps, in which it falls linearly to 0")
    add("--beta2", type=float, default=0.999, help="Adam's second decay")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--ema", type=float, default=0.9999, help="decay per step of the averaged weights")
    add("--seed", type=int, default=0, help="seed of weights, row order, times and noise")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--diagonal-power", type=float, default=0.5, help="r of (45); 0 is the plain loss")
    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=positive, default=100, help="steps between lines of log.jsonl")
    add("--val-every", type=positive, default=5000, help="steps between validations")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="checkpoints to keep, the newest ones")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on cuda alone")
    add("--activation-checkpointing", action="store_true", help="recompute blocks to save memory")


def model_flags(parser):
    """The flags of a network trained from scratch, and of its contexts; stage 2 takes them over."""
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=list(net.SIZES), default="base", help="network; base is the paper's 170M")
    add("--schedule", choices=["argmax", "linear"], default="argmax", help="how to draw times (36)")
    add("--schedule-blend", type=float, default=0.9, help="lambda of the argmax schedule")
    add("--position-lag", type=float, default=0.0, help="earlier positions first (38), up to +-8")
    add("--interpolant", choices=list(net.INTERPOLANTS), default="linear", help="the path (47)")
    add("--init", type=Path, metavar="PATH", help="start from the network of this checkpoint")
    add = parser.add_argument_group("prompts").add_argument
    add("--context", choices=["block", "any"], help="learn after whole blocks, or any clean tokens")
    add("--block-size", type=positive, help="tokens written at once (default: all that follow)")
    add("--context-dropout", type=float, default=0.1, help="share without it, for guidance")


def new_model(args, meta):
    """A network from scratch, by the flags of `model_flags` and args.seed."""
    torch.manual_seed(args.seed)
    path = dict(interpolant=args.interpolant, schedule=args.schedule)
    path |= dict(schedule_blend=args.schedule_blend, position_lag=args.position_lag)
    path |= dict(vocab_size=meta["vocab_size"], seq_len=meta["seq_len"])
    model = DiT(net.ModelConfig(**net.SIZES[args.size], **path))
    rows = read_rows(args.data, "train", meta)
    some = rows[:: len(rows) // 50_000 + 1].ravel()
    model.start_from(np.bincount(some, minlength=meta["vocab_size"]))
    return model


def main():
    parser = new_parser(__doc__)
    training_flags(parser, steps=1_000_000)
    model_flags(parser)
    args = parse(parser)
    args.out = args.out or Path("runs") / f"{args.data.name}-diagonal"
    args.surgery = False
    ranks = start_ranks(args)  # first: if a rank fails after this, all stop with a reason
    meta = read_meta(args.data)
    size = args.block_size
    divides = size and size < meta["seq_len"] and meta["seq_len"] % size == 0
    if (args.context == "block" and not divides) or (size and not args.context):
        raise SystemExit(f"give --context and a --block-size that divides {meta['seq_len']}")
    resumed = read_resumed(args, meta)
    if args.init:  # the averaged weights, to go on with on rows of any length
        model, checkpoint = load_model(resumed or args.init, seq_len=meta["seq_len"])
        same_tokens(args.init, checkpoint["meta"], args.data, meta)
        say(f"size, path and schedule of the network are those of {args.init}")
        model.train().requires_grad_(True)
    else:
        model = new_model(args, meta)
    if resumed and net.ModelConfig(**resumed["model_config"]) != model.config:
        raise SystemExit(f"{args.out} has another network than these flags: resume it with its own")
    loss = functools.partial(diagonal_loss, power=args.diagonal_power)

    def objective(model, tokens, draw):
        return by_context(loss, [model], tokens, draw, args)

    train(args, ranks, model, objective, meta, resumed)


if __name__ == "__main__":
    main()
