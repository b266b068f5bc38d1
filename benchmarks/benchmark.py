"""Time and peak memory of a step, side by side in one process: ours, the peers' way, and the autoregressive floor.

    python benchmarks/benchmark.py                                   # the paper's 170M, V = 50,257, 4 x 1,024 tokens: half an hour on 2 cores
    python benchmarks/benchmark.py --size tiny --vocab-size 5000 --seq-len 128 --rows 8 --repeats 5
    python benchmarks/benchmark.py --parts memory                    # peak memory by V and by L

Every step is forward, backward, clip and Adam on random tokens, one micro-batch. The variants take turns, --repeats
rounds after one of warm-up; a time is the median over rounds, and a ratio is of those. Memory is the warm-up's peak beyond
weights, gradients and optimizer state, which every variant shares; "counted", the same from the sizes of all tensors alive.

    diagonal    ours: noise drawn in the embedding, the cross-entropy in chunks of rows (train_diagonal.diagonal)
    V-sized     the peers' way to the same step: float32 one-hot rows and Gaussian of size V, their product with W, all logits
    next token  the same backbone, causal, from embedded tokens, with our cross-entropy in chunks: the floor
    psd ...     every row of the step a consistency row, its teacher included
"""

import contextlib
import ctypes
import functools
import gc
import json
import platform
import statistics
import sys
import time
import weakref
from argparse import BooleanOptionalAction
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
from model import SIZES, DiT, Divergence, Draw, ModelConfig, cross_entropy, head_loss, machine_flags, resolve_machine, schedule_table
from prepare_data import Parser, run
from sample import generate
from train_diagonal import PEAK_FLOPS, diagonal, flops_per_row, gradients

# ------------------------------------------------------------------------------------------------
# The steps: objectives, as train_diagonal.py takes them.


def v_sized(model, tokens, draw):
    """The diagonal's cross-entropy with every state and every logit of size (B, L, V), in float32."""
    V = model.config.vocab_size
    t = model.times(draw.uniform(1)).float().to(tokens.device)[..., None]
    x1 = F.one_hot(tokens, V).float()
    with torch.autocast(tokens.device.type, enabled=False):
        y = ((1 - t) * torch.randn_like(x1) + t * x1) @ model.embedding
    log_p = (model(y, t[..., 0], t[..., 0]) @ model.head.T).float().log_softmax(-1)
    return {"diagonal": -log_p.gather(-1, tokens[..., None]).mean()}, {}


def next_token(model, tokens, draw):
    """Next-token cross-entropy of the same backbone with a causal mask; its times are constants."""
    causal = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    with mock.patch("model.attention", causal):
        t = torch.ones(len(tokens), 1, device=tokens.device)
        h = model(model.embedding[tokens], t, t)[:, :-1].flatten(0, 1)
    scale, targets = torch.full((len(h),), 1 / len(h), device=h.device), Divergence(cross_entropy, (tokens[:, 1:].flatten(),))
    return {"next": head_loss(h, model.head, scale, targets, c=0.01, r=0.0, compiled=model.compiled)[0]}, {}


def consistency(loss, teacher, model, tokens, draw):
    """All rows of the step on one identity."""
    args = SimpleNamespace(
        loss=loss, target="logit", divergence="kl", clamp=1e-5, boundary=1 / 32, step_law="uniform", learned_weight=True, consistency_power=0.5
    )
    return distill.consistency(model, teacher or model, tokens, draw, args, loss)


OBJECTIVES = {"diagonal": diagonal, "V-sized": v_sized, "next token": next_token}
STEPS = [*OBJECTIVES, *distill.TEACHERS]


@torch.no_grad()
def v_sized_generate(model, xi, nfe):
    """sample.generate with a state of shape (B, L, V); xi gives its batch only."""
    grid = model.times(torch.linspace(0, 1, nfe + 1, dtype=torch.float64)[:, None]).float().to(xi.device)
    x = torch.randn(*xi.shape[:2], model.config.vocab_size, device=xi.device)
    for k in range(nfe):
        s, t = (time.expand(len(xi), -1) for time in grid[k : k + 2])
        psi = (model(x @ model.embedding, s, t) @ model.head.T).float().softmax(-1)
        x = model.path.flow_map(x, psi, s, t)
    return x.argmax(-1)


# ------------------------------------------------------------------------------------------------
# The meter.


class Meter:
    """Seconds of a call, and the bytes that its peak adds to what was there before."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    @staticmethod
    def map_from(size):
        """glibc: give every block of this many bytes and more a mapping of its own, which freeing it returns."""
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD

    @staticmethod
    def resident(key):
        """VmRSS or VmHWM of this process, in bytes; Linux alone has them."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def __call__(self, f):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what glibc keeps of freed memory would hide in `before`
            before = self.resident("VmRSS")
            if before:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = time.perf_counter()
        f()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")
        return seconds, peak - before


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors alive while it is on, and their peak: exact, whatever the allocator, and right for fake tensors too."""

    def __init__(self, *start):
        super().__init__()
        self.seen, self.now, self.peak = WeakIdKeyDictionary(), 0, 0
        self.add(start)
        self.start = self.now

    def add(self, tensors):
        for tensor in tree_leaves(tensors):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen[storage], size = None, storage.nbytes()
                self.now += size
                weakref.finalize(storage, self.free, size)
        self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(out)
        return out


def counted(args, vocab_size, rows, seq_len, call, teacher=False):
    """(bytes of the state, peak bytes beyond it) of call(bench), on fake tensors: no memory and no time at any size."""
    config = ModelConfig(vocab_size, seq_len, **SIZES[args.size])
    table = schedule_table(config.schedule, vocab_size, config.schedule_blend)
    with mock.patch("model.schedule_table", lambda *_: table), FakeTensorMode(allow_non_fake_inputs=True):
        bench = Bench(SimpleNamespace(**vars(args) | {"device": "cpu", "compile": False}), vocab_size, rows, seq_len, teacher)
        with LiveBytes(bench.state()) as live:
            call(bench)
    return live.start, live.peak - live.start


class Bench:
    """One network with its optimizer, and a step on random tokens by any objective."""

    def __init__(self, args, vocab_size, rows, seq_len, teacher=False):
        torch.manual_seed(0)
        self.device, self.args, self.rows = torch.device(args.device), args, rows
        self.model = DiT(ModelConfig(vocab_size, seq_len, **SIZES[args.size]))
        self.teacher = DiT(self.model.config).requires_grad_(False) if teacher else None
        if self.device.type != "cpu":
            self.model.to(self.device)
            self.teacher = self.teacher and self.teacher.to(self.device)
        if args.compile:
            for network in filter(None, (self.model, self.teacher)):
                network.compile_parts()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # its state, before anything is measured
        self.tokens = torch.randint(vocab_size, (rows, seq_len), device=self.device)
        self.meter, self.count, self.factor = Meter(self.device), 0, self.model.noise_factor().detach()

    def state(self):
        """The tensors that outlive a step: weights, gradients, optimizer state, and a frozen teacher's weights."""
        networks = [p for network in filter(None, (self.model, self.teacher)) for p in (*network.parameters(), *network.buffers())]
        moments = [list(state.values()) for state in self.optimizer.state.values()]
        return networks, [p.grad for p in self.model.parameters()], moments, self.tokens, self.factor

    def step(self, objective, stage2=False):
        """One optimizer step; in stage 2 W is frozen, and the noise factor that of the run."""
        self.count += 1
        self.model.embedding.requires_grad_(not stage2)
        self.model.held_factor = self.factor if stage2 else None
        params = [p for p in self.model.parameters() if p.requires_grad]
        draw = Draw(0, self.count, np.arange(self.rows), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            grads, _ = gradients(params, objective, self.model, [(self.tokens, draw)], False)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        self.optimizer.step()

    def call(self, name):
        """The step of that name."""
        stage2 = name in distill.TEACHERS
        objective = functools.partial(consistency, name, self.teacher) if stage2 else OBJECTIVES[name]
        return functools.partial(self.step, objective, stage2)

    def sample(self, function, nfe, rows):
        self.model.held_factor = self.factor
        xi = torch.randn(rows, self.tokens.shape[1], self.model.noise_size, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            function(self.model, xi, nfe)

    def interleaved(self, calls, repeats):
        """{name: {"seconds": median, "peak_bytes": the first round's, "all_seconds": [...]}} of {name: call}, taking turns after a warm-up."""
        seen = {name: [] for name in calls}
        for turn in tqdm(range(repeats + 1), unit="round", disable=None):
            self.meter.map_from(2**25 if turn else 2**20)  # the first round's memory is what is in use, at a cost in time
            for name, call in calls.items():
                seen[name].append(self.meter(call))
        return {name: {"seconds": statistics.median(s for s, _ in results[1:]), "peak_bytes": results[0][1],
                       "all_seconds": [s for s, _ in results[1:]]} for name, results in seen.items()}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The parts.


def floors(model, tokens, seq_len):
    """{step: FLOPs that it cannot do without}. F is one forward pass; a backward pass is 2 F."""
    V, D, config = model.config.vocab_size, model.config.width, model.config
    F, head, attention = tokens / seq_len * flops_per_row(model, seq_len), 2 * tokens * V * D, 4 * tokens * config.layers * seq_len * D
    noise = 4 * V * D**2 if model.noise_size < V else 4 * tokens * V * D  # W^T W, and its gradient
    derivative = 5 * F + head + 1.5 * attention  # a teacher, a tangent, psi W; 5 products of size L^2 in attention's tangent, not 2
    return {"diagonal": 3 * F + noise, "V-sized": 3 * F + 2 * head, "next token": 3 * (F - attention / 2),
            "psd": 5 * F + head, "lsd": derivative, "esd": derivative}  # fmt: skip


def steps(args):
    """Training steps, ratios and floors."""
    bench, names = Bench(args, args.vocab_size, args.rows, args.seq_len, teacher=True), args.only or STEPS
    tokens, (V, D) = args.rows * args.seq_len, bench.model.head.shape
    a, b = torch.randn(tokens, D, device=bench.device), bench.model.head.detach().T.contiguous()
    a, b = (x.to(getattr(torch, args.dtype)) for x in (a, b))
    calls = {name: bench.call(name) for name in names} | {"matmul": lambda: a @ b, "copy": lambda: bench.model.head.detach().clone()}
    results = bench.interleaved(calls, args.repeats)
    matmul, copy = 2 * tokens * V * D / results.pop("matmul")["seconds"], 8 * V * D / results.pop("copy")["seconds"]
    base, weights = results.get("diagonal", next(iter(results.values()))), 4 * sum(p.numel() for p in bench.model.parameters())
    for name, r in results.items():
        r["counted_bytes"] = counted(args, args.vocab_size, args.rows, args.seq_len, lambda b, name=name: b.call(name)(), True)[1]
        # weights read twice, gradient and Adam's state read and written; activations written and read
        r |= {"flop_floor": floors(bench.model, tokens, args.seq_len)[name], "byte_floor": 10 * weights + 2 * r["counted_bytes"]}
        r["floor_seconds"] = max(r["flop_floor"] / matmul, r["byte_floor"] / copy)
    print(f"\n{tokens} tokens a step, {weights / 4e6:.0f}M parameters")
    print(f"this machine: matrix products {matmul / 1e12:.3f} TFLOP/s, copies {copy / 1e9:.1f} GB/s")
    heads = ("/ diagonal", "TFLOP floor", "GB floor", "floor/time", "peak GB", "/ diagonal", "counted")
    print(f"{'step':>12} {'seconds':>9}", *(f"{head:>11}" for head in heads))
    for name, r in results.items():
        numbers = (r["seconds"] / base["seconds"], r["flop_floor"] / 1e12, r["byte_floor"] / 1e9, r["floor_seconds"] / r["seconds"],
                   r["peak_bytes"] / 1e9, r["peak_bytes"] / max(1, base["peak_bytes"]), r["counted_bytes"] / 1e9)  # fmt: skip
        print(f"{name:>12} {r['seconds']:9.3f}", *(f"{number:11.2f}" for number in numbers))
    peak = next((v for k, v in PEAK_FLOPS.items() if bench.meter.cuda and k in torch.cuda.get_device_name()), None)
    if peak:
        print(f"model FLOP utilisation of the diagonal: {3 * args.rows * flops_per_row(bench.model, args.seq_len) / base['seconds'] / peak:.3f}")
    return results | {"matmul_flops": matmul, "copy_bytes": copy}


def sampling(args):
    """Sampling by NFE, with the state in the embedding and of size V."""
    bench = Bench(args, args.vocab_size, 1, args.seq_len)
    bench.optimizer = None
    for p in bench.model.requires_grad_(False).parameters():
        p.grad = None
    ways = {f"{nfe} NFE{way}": (f, nfe) for nfe in args.nfe for way, f in (("", generate), (", V-sized", v_sized_generate))}
    bench.sample(generate, 1, args.sample_rows)  # what a first call loads is no state of sampling's
    results = bench.interleaved({name: functools.partial(bench.sample, *way, args.sample_rows) for name, way in ways.items()}, args.repeats)
    print(f"\nsampling {args.sample_rows} x {args.seq_len}\n{'':>16} {'seconds':>9} {'sequences/s':>12} {'peak MB':>9} {'counted':>9}")
    for name, r in results.items():
        r["counted_bytes"] = counted(args, args.vocab_size, 1, args.seq_len, lambda b, way=ways[name]: b.sample(*way, args.sample_rows))[1]
        print(f"{name:>16} {r['seconds']:9.3f} {args.sample_rows / r['seconds']:12.2f} {r['peak_bytes'] / 1e6:9.1f} {r['counted_bytes'] / 1e6:9.1f}")
    return results


def memory(args):
    """Peak bytes of a step as V grows, and as L grows, counted."""
    results, tokens = {}, args.rows * args.seq_len
    cases = [(v, args.rows, args.seq_len) for v in (1_000, 10_000, 50_000, 100_000)]
    cases += [(args.vocab_size, tokens // length, length) for length in (128, 512, 1024) if tokens >= length]
    print(f"\npeak GB of a step of {tokens} tokens, counted: state (weights, gradients, optimizer), and what {', '.join(STEPS)} add")
    for vocab_size, rows, length in cases:
        added = {name: counted(args, vocab_size, rows, length, lambda b, name=name: b.call(name)(), name in ("lsd", "esd")) for name in STEPS}
        numbers = {"state": added["diagonal"][0]} | {name: beyond for name, (_, beyond) in added.items()}
        results[f"V={vocab_size} L={length}"] = numbers
        print(f"V {vocab_size:7}  L {length:5} ", *(f"{b / 1e9:7.2f}" for b in numbers.values()), flush=True)
    return results


def fit(args):
    """The largest micro-batch for 24, 40 and 80 GB in bfloat16, from counts at two sizes and the line through them."""
    args, results = SimpleNamespace(**vars(args) | {"dtype": "bfloat16"}), {}
    print(f"\nrows of {args.seq_len} that fit, bfloat16, not compiled; 8% and 1 GB kept for the allocator and the CUDA context")
    print(f"{'step':>12} {'checkpointing':>13} {'state GB':>8} {'fixed GB':>8} {'GB a row':>8} {'24 GB':>6} {'40 GB':>6} {'80 GB':>6}")
    for name in ("diagonal", *distill.TEACHERS):
        for checkpointing in (False, True):

            def call(bench, name=name, checkpointing=checkpointing):
                bench.model.activation_checkpointing = checkpointing
                bench.call(name)()

            teacher, (few, many) = name in ("lsd", "esd"), (16, 32)
            (state, low), (_, high) = (counted(args, args.vocab_size, rows, args.seq_len, call, teacher) for rows in (few, many))
            state += state // (5 if teacher else 4)  # the averaged weights
            row = (high - low) / (many - few)
            fixed = low - few * row
            rows = {gb: int((0.92 * gb * 1e9 - 1e9 - state - fixed) / row) for gb in (24, 40, 80)}
            results[f"{name}{', checkpointing' * checkpointing}"] = {"state": state, "fixed": fixed, "row": row, "rows": rows}
            print(f"{name:>12} {'yes' if checkpointing else 'no':>13} {state / 1e9:8.2f} {fixed / 1e9:8.2f} {row / 1e9:8.3f} "
                  + " ".join(f"{max(0, n):6}" for n in rows.values()), flush=True)  # fmt: skip
    return results


PARTS = {part.__name__: part for part in (steps, sampling, memory, fit)}


def main():
    parser = Parser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help="of the steps, these")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--sample-rows", type=int, default=1, help="sequences sampled at once")
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one of warm-up")
    machine_flags(parser)
    parser.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile the blocks (default: on cuda)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    resolve_machine(args)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"torch {torch.__version__}, {args.device}: {device}, {args.dtype}, size {args.size}, V = {args.vocab_size}, L = {args.seq_len}")
    results = {part: PARTS[part](args) for part in args.parts}
    if args.output:
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.output.write_text(json.dumps({"flags": flags, "torch": torch.__version__, "device": device, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
