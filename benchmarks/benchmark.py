"""Time and memory of a step: ours, the peers' way, and the autoregressive floor.

    python benchmarks/benchmark.py                   # the paper's 170M: half an hour on 2 cores
    python benchmarks/benchmark.py --size tiny --vocab-size 5000 --seq-len 128 --rows 8
    python benchmarks/benchmark.py --parts memory    # no time and no memory at any size

Five parts: `steps` (training), `sampling`, `memory` (of a step, as V and L grow), `fit` (rows that
fit on a GPU) and `kernels` (the slowest of a step). The training steps, each with backward pass,
clipping and Adam:

    diagonal      ours: noise in the embedding, cross-entropy in chunks of rows
    V-sized       the peers' way: one-hot rows and noise of size V times W, and all logits at once
    next token    the same backbone, causal, with our cross-entropy: the floor
    psd ...       every row of the step learns one identity, teacher included
    dmd           every row matches distributions, stage 1 and the critic included

The steps take turns. Times are medians over --repeats rounds, after one of warm-up. Memory is the
peak beyond weights, gradients and optimizer state, which all steps share: the sizes of all tensors
alive, counted on fake tensors. On CUDA the allocator's own peak stands beside it.
"""

import argparse
import functools
import gc
import json
import platform
import statistics
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill
from evaluate import table
from model import (
    SIZES,
    DiT,
    Draw,
    ModelConfig,
    RowLoss,
    head_loss,
    modulate,
    norm,
    parse,
    schedule_table,
)
from prepare_data import Help
from sample import check_output, generate
from train_diagonal import cross_entropy, diagonal_loss, gradients

# ------------------------------------------------------------------------------------------------
# The steps, as objectives of train_diagonal.


def v_sized(model, tokens, draw):
    """The diagonal's cross-entropy with states and logits of shape (B, L, V), in float32."""
    t = model.times(draw.uniform(1)).float().to(tokens.device)[..., None]
    x1 = F.one_hot(tokens, model.config.vocab_size).float()
    with torch.autocast(tokens.device.type, enabled=False):
        y = ((1 - t) * torch.randn_like(x1) + t * x1) @ model.embedding
    h = model(y, t[..., 0], t[..., 0])
    log_p = (h @ model.head.T).float().log_softmax(-1)
    return {"diagonal": -log_p.gather(-1, tokens[..., None]).mean()}, {}


def next_token(model, tokens, draw):
    """Next-token cross-entropy of the same backbone, causal, with its times fixed at 1."""
    one = torch.ones(len(tokens), 1, device=tokens.device)
    time = model.embed_times(one, one)
    h = F.embedding(tokens, model.embedding)
    rotary = model.cos[: tokens.shape[1]], model.sin[: tokens.shape[1]]
    for block in model.blocks:
        h, _ = model.call(block.forward, h, time, rotary, None, True)
    shift, scale = model.final_modulation(time).chunk(2, -1)
    h = modulate(norm(h), shift, scale)[:, :-1].flatten(0, 1)
    each = torch.full((len(h),), 1 / len(h), device=h.device)
    targets = RowLoss(cross_entropy, (tokens[:, 1:].flatten(),))
    loss, _ = head_loss(h, model.head, each, targets, c=0.01, r=0.0, compiled=model.compiled)
    return {"next": loss}, {}


def identity(loss, teacher, critic, model, tokens, draw):
    """All rows of the step on one loss of distill.py, with its defaults."""
    args = SimpleNamespace(form="logit", divergence="kl", boundary=1 / 32)
    if loss == "dmd":
        args.boundary = 1.0
        return distill.matching_loss(model, critic, teacher, tokens, draw, args)
    args.learned_weight = True
    args.consistency_power = 0.5
    return distill.consistency_loss(model, teacher or model, tokens, draw, args, loss)


OBJECTIVES = {"diagonal": diagonal_loss, "V-sized": v_sized, "next token": next_token}
# {step: forward passes a row, a backward pass counted as two}
PASSES = dict.fromkeys(OBJECTIVES, 3) | dict.fromkeys(distill.TEACHERS, 5) | {"dmd": 7}
STEPS = list(PASSES)
FROZEN = ("lsd", "esd", "dmd")  # steps with a frozen stage 1


@torch.no_grad()
def v_sized_generate(model, xi, nfe):
    """sample.generate with a state of shape (B, L, V); xi gives only B and L."""
    B, L, _ = xi.shape
    tau = torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]
    grid = model.times(tau).float().to(xi.device)
    x = torch.randn(B, L, model.config.vocab_size, device=xi.device)
    for k in range(nfe):
        s = grid[k].expand(B, -1)
        t = grid[k + 1].expand(B, -1)
        psi = (model(x @ model.embedding, s, t) @ model.head.T).float().softmax(-1)
        x = model.path.flow_map(x, psi, s, t)
    return x.argmax(-1)


# ------------------------------------------------------------------------------------------------
# Measuring.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive while it is on, and their peak.

    Exact for any allocator, and for fake tensors too. start: tensors that were there before.
    """

    def __init__(self, *start):
        super().__init__()
        self.seen = WeakIdKeyDictionary()
        self.now = 0
        self.peak = 0
        self.add(start)
        self.start = self.now

    def add(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = None
                size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self.free, size)
        self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(out)
        return out


def counted(args, vocab_size, rows, seq_len, call, names=()):
    """(bytes of the state, peak bytes beyond it) of call(bench), on fake tensors."""
    config = ModelConfig(vocab_size, seq_len, **SIZES[args.size])
    knots = schedule_table(config.schedule, vocab_size, config.schedule_blend)
    args = SimpleNamespace(**vars(args) | {"device": "cpu", "compile": False})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # The schedule's knots must have values, so they are computed before tensors are fake.
    with mock.patch("model.schedule_table", lambda *_: knots), fake:
        bench = Bench(args, vocab_size, rows, seq_len, names)
        with LiveBytes(bench.state()) as live:
            call(bench)
    return live.start, live.peak - live.start


def counted_step(args, name, vocab_size, rows, seq_len, checkpointing=False):
    """`counted` for the training step with this name."""

    def call(bench):
        bench.model.activation_checkpointing = checkpointing
        bench.call(name)()

    return counted(args, vocab_size, rows, seq_len, call, [name])


def interleaved(calls, repeats, device):
    """{name: times and memory} of {name: call}: they take turns, after a round of warm-up."""
    synchronize = getattr(torch, device.type).synchronize
    on_cuda = device.type == "cuda"
    seconds = {name: [] for name in calls}
    peaks = {}
    for _ in tqdm(range(repeats + 1), unit="round", leave=False, disable=None):
        for name, call in calls.items():
            gc.collect()
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            if on_cuda:
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    results = {}
    for name, (_, *rounds) in seconds.items():
        found = {"seconds": statistics.median(rounds), "fastest": min(rounds)}
        results[name] = found | {"slowest": max(rounds), "allocator_gb": peaks.get(name)}
    return results


class Bench:
    """One network with its optimizer, and a step on random tokens by any objective.

    names: the steps to be made, which decide whether there are a stage 1 and a critic.
    """

    def __init__(self, args, vocab_size, rows, seq_len, names=()):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.rows = rows
        self.count = 0
        bf16 = args.dtype == "bfloat16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        config = ModelConfig(vocab_size, seq_len, **SIZES[args.size])
        count = 1 + any(name in FROZEN for name in names) + ("dmd" in names)
        self.networks = [DiT(config) for _ in range(count)]
        if args.device != "cpu":  # moving would replace fake parameters
            self.networks = [network.to(self.device) for network in self.networks]
        if args.compile:
            for network in self.networks:
                network.compile_parts()
        self.model, self.teacher, self.critic = [*self.networks, None, None][:3]
        if self.teacher:
            self.teacher.requires_grad_(False)
        self.trained = [network for network in (self.model, self.critic) if network]
        self.optimizers = []
        for network in self.trained:
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
            for p in network.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()  # makes its state, before anything is measured
            self.optimizers.append(optimizer)
        self.tokens = torch.randint(vocab_size, (rows, seq_len), device=self.device)
        self.factor = self.model.noise_factor().detach()

    def state(self):
        """The tensors that outlive a step: weights, gradients, optimizer state, a teacher."""
        weights = [[*network.parameters(), *network.buffers()] for network in self.networks]
        grads = [p.grad for network in self.trained for p in network.parameters()]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        moments = [list(state.values()) for state in states]
        return weights, grads, moments, self.tokens, self.factor

    def step(self, objective, stage2, networks=1):
        """One step of the first `networks` networks. Stage 2 freezes W and holds the noise factor.

        Only dmd trains a second one, the critic.
        """
        self.count += 1
        self.model.held_factor = self.factor if stage2 else None
        for network in self.trained:
            network.embedding.requires_grad_(not stage2)
        trained = [[p for p in n.parameters() if p.requires_grad] for n in self.trained[:networks]]
        params = [p for group in trained for p in group]
        draw = Draw(0, self.count, np.arange(self.rows), self.device)
        with self.autocast:
            grads, _ = gradients(params, objective, self.model, [(self.tokens, draw)], False)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        for group, optimizer in zip(trained, self.optimizers[:networks], strict=True):
            torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()

    def call(self, name):
        """The step with this name, as a function without arguments."""
        if name in OBJECTIVES:
            return functools.partial(self.step, OBJECTIVES[name], stage2=False)
        objective = functools.partial(identity, name, self.teacher, self.critic)
        networks = 2 if name == "dmd" else 1
        return functools.partial(self.step, objective, stage2=True, networks=networks)

    def sample(self, function, nfe):
        self.model.held_factor = self.factor
        xi = torch.randn(*self.tokens.shape, self.model.noise_size, device=self.device)
        with self.autocast:
            function(self.model, xi, nfe)


# ------------------------------------------------------------------------------------------------
# The parts: each returns the rows of its table.


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16


def peak_flops(device):
    """Dense bf16 FLOPs a second of the GPU in use; None if it is not a known one."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)


def flops_per_row(model, L):
    """FLOPs of one forward pass over one row: 2 per weight and token, and attention's 4 L D."""
    # The modulation acts once a row, not on every token.
    blocks = [p for name, p in model.blocks.named_parameters() if "modulation" not in name]
    weights = sum(p.numel() for p in [*blocks, model.head] if p.ndim == 2)
    return L * (2 * weights + 4 * model.config.layers * L * model.config.width)


def steps(args):
    """Training steps: seconds and memory."""
    bench = Bench(args, args.vocab_size, args.rows, args.seq_len, args.only)
    calls = {name: bench.call(name) for name in args.only}
    results = interleaved(calls, args.repeats, bench.device)
    first = results[args.only[0]]["seconds"]
    peak = peak_flops(bench.device)
    rows = []
    for name, result in results.items():
        _, added = counted_step(args, name, args.vocab_size, args.rows, args.seq_len)
        row = {"step": name, f"of {args.only[0]}": result["seconds"] / first} | result
        a_second = args.rows / result["seconds"]
        row["tokens_per_second"] = a_second * args.seq_len
        flops = PASSES[name] * flops_per_row(bench.model, args.seq_len)
        row["mfu"] = a_second * flops / peak if peak else None
        rows.append(row | {"counted_gb": added / 1e9})
    return rows


def sampling(args):
    """Sampling by NFE, with the state in the embedding and with one of size V."""
    bench = Bench(args, args.vocab_size, args.sample_rows, args.seq_len)
    calls = {}
    for nfe in args.nfe:
        calls[nfe, "embedded"] = functools.partial(Bench.sample, function=generate, nfe=nfe)
        calls[nfe, "V-sized"] = functools.partial(Bench.sample, function=v_sized_generate, nfe=nfe)
    bound = {key: functools.partial(call, bench) for key, call in calls.items()}
    rows = []
    for key, result in interleaved(bound, args.repeats, bench.device).items():
        size = args.vocab_size, args.sample_rows, args.seq_len
        _, added = counted(args, *size, calls[key])
        row = {"nfe": key[0], "state": key[1]} | result
        rows.append(row | {"counted_mb": added / 1e6})
    return rows


def memory(args):
    """GB of a step as V grows and as L grows: the state, and what each step adds to it."""
    tokens = args.rows * args.seq_len
    cases = [(V, args.rows, args.seq_len) for V in (1_000, 10_000, 50_000, 100_000)]
    cases += [(args.vocab_size, tokens // L, L) for L in (128, 512, 1024) if tokens >= L]
    rows = []
    for V, count, L in tqdm(cases, unit="size", leave=False, disable=None):
        found = {name: counted_step(args, name, V, count, L) for name in args.only}
        state, _ = found[args.only[0]]
        row = {"V": V, "L": L, "state": state / 1e9}
        rows.append(row | {name: added / 1e9 for name, (_, added) in found.items()})
    return rows


def fit(args):
    """Rows that fit in 24, 40 and 80 GB in bfloat16, not compiled.

    From counts at 16 and 32 rows and the line through them, with 8% and 1 GB kept back for the
    allocator and the CUDA context. No GPU is asked.
    """
    args = SimpleNamespace(**vars(args) | {"dtype": "bfloat16"})
    names = [name for name in args.only if name not in ("V-sized", "next token")]
    rows = []
    for name, checkpointing in tqdm([(n, c) for n in names for c in (False, True)], disable=None):
        size = args.seq_len, checkpointing
        state, low = counted_step(args, name, args.vocab_size, 16, *size)
        _, high = counted_step(args, name, args.vocab_size, 32, *size)
        # The averaged weights. Of a trained network there are four copies, of stage 1 one.
        state += state // {"lsd": 5, "esd": 5, "dmd": 9}.get(name, 4)
        a_row = (high - low) / 16
        fixed = low - 16 * a_row
        row = {"step": name, "checkpointing": "yes" if checkpointing else "no"}
        row |= {"state_gb": state / 1e9, "fixed_gb": fixed / 1e9, "gb_a_row": a_row / 1e9}
        for gb in (24, 40, 80):
            row[f"rows in {gb} GB"] = max(0, int((0.92e9 * gb - 1e9 - state - fixed) / a_row))
        rows.append(row)
    return rows


def kernels(args):
    """The five kernels that take the most time in the first step of --only."""
    bench = Bench(args, args.vocab_size, args.rows, args.seq_len, args.only[:1])
    call = bench.call(args.only[0])
    call()
    with torch.profiler.profile() as profiler:
        call()
        getattr(torch, bench.device.type).synchronize()
    on = "device" if bench.device.type == "cuda" else "cpu"
    spent = {e.key: getattr(e, f"self_{on}_time_total") for e in profiler.key_averages()}
    total = sum(spent.values())
    slowest = sorted(spent, key=spent.get, reverse=True)[:5]
    return [
        {"kernel": name[:80], "milliseconds": spent[name] / 1e3, "share": spent[name] / total}
        for name in slowest
    ]


PARTS = {part.__name__: part for part in (steps, sampling, memory, fit, kernels)}


def main():
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    add("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help="these steps")
    add("--size", choices=list(SIZES), default="base", help="base is the paper's 170M")
    add("--vocab-size", type=int, default=50257, help="V")
    add("--seq-len", type=int, default=1024, help="L")
    add("--rows", type=int, default=4, help="rows a step")
    add("--sample-rows", type=int, default=1, help="sequences sampled at once")
    add("--nfe", type=int, nargs="+", default=[1, 4, 32], help="network evaluations a sample")
    add("--repeats", type=int, default=3, help="rounds after the warm-up")
    yes_no = argparse.BooleanOptionalAction
    add("--compile", action=yes_no, help="torch.compile (default: on cuda)")
    add("--output", type=Path, help="JSON to write")
    args = parse(parser)
    if args.output:
        check_output("--output", args.output, ".json")
    if args.compile is None:
        args.compile = args.device == "cuda"
    device = f"{torch.get_num_threads()} threads, {platform.machine()}"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, {args.dtype}")
    print(f"size {args.size}, V = {args.vocab_size}, L = {args.seq_len}, {args.rows} rows a step")
    results = {}
    for part in args.parts:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}\n")
        results[part] = PARTS[part](args)
        print(table(results[part]), flush=True)
    if args.output:
        facts = {"args": vars(args), "torch": torch.__version__, "device": device}
        facts["results"] = results
        args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
