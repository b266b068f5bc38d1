"""Time and peak memory of a step, side by side in one process: ours, the peers' way, and the autoregressive floor.

    python benchmarks/benchmark.py                                   # the paper's 170M, V = 50,257, 4 x 1,024 tokens: half an hour on 2 cores
    python benchmarks/benchmark.py --size tiny --vocab-size 5000 --seq-len 128 --rows 8 --repeats 5
    python benchmarks/benchmark.py --parts memory                    # peak memory by V and by L

Every step is forward, backward, clip and Adam on random tokens, one micro-batch. The variants take turns, --repeats
rounds after one of warm-up; a cell is the median over rounds, and a ratio is of those. Memory is the peak beyond
weights, gradients and optimizer state, which every variant shares.

    diagonal    ours: noise drawn in the embedding, the cross-entropy in chunks of rows (train_diagonal.diagonal)
    V-sized     the peers' way to the same step: float32 one-hot rows and Gaussian of size V, their product with W, all logits
    next token  the same backbone, causal, from embedded tokens, with our cross-entropy in chunks: the floor
    psd ...     every row of the step a consistency row, its teacher included
"""

import functools
import gc
import json
import platform
import statistics
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill
from model import SIZES, DiT, Draw, ModelConfig, cross_entropy, head_loss, machine_flags, resolve_machine
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
    causal = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    with mock.patch("model.attention", causal):
        t = torch.ones(len(tokens), 1, device=tokens.device)
        h = model(model.embedding[tokens], t, t)[:, :-1].flatten(0, 1)
    scale = torch.full((len(h),), 1 / len(h), device=h.device)
    return {"next": head_loss(h, model.head, scale, cross_entropy(tokens[:, 1:].flatten()), c=0.01, r=0.0)[0]}, {}


def consistency(loss, teacher, model, tokens, draw):
    """All rows of the step on one identity."""
    args = SimpleNamespace(
        loss=loss, target="logit", reverse_kl=False, boundary=1 / 32, step_law="uniform", learned_weight=True, consistency_power=0.5
    )
    return {"consistency": distill.consistency(model, teacher or model, tokens, draw, args)[0]}, {}


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


class Bench:
    """One network with its optimizer, and a step on random tokens by any objective."""

    def __init__(self, args, vocab_size, rows, seq_len):
        torch.manual_seed(0)
        self.device, self.args, self.rows = torch.device(args.device), args, rows
        self.model = DiT(ModelConfig(vocab_size, seq_len, **SIZES[args.size])).to(self.device)
        if args.compile:
            self.model.compile_blocks()
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.params, lr=1e-4, fused=True)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # its state, before anything is measured
        self.tokens = torch.randint(vocab_size, (rows, seq_len), device=self.device)
        self.meter, self.count = Meter(self.device), 0

    def step(self, objective):
        self.count += 1
        draw = Draw(0, self.count, np.arange(self.rows), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            grads, _ = gradients(self.params, objective, self.model, [(self.tokens, draw)], False)
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()

    def sample(self, function, nfe, rows):
        xi = torch.randn(rows, self.tokens.shape[1], self.model.noise_size, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            function(self.model, xi, nfe)

    def interleaved(self, calls, repeats):
        """{name: {"seconds": median, "peak_bytes": median, "all_seconds": [...]}} of {name: call}, taking turns after a warm-up."""
        seen = {name: [] for name in calls}
        for turn in tqdm(range(repeats + 1), unit="round", disable=None):
            for name, call in calls.items():
                result = self.meter(call)
                if turn:
                    seen[name].append(result)
        return {name: {"seconds": statistics.median(s for s, _ in results), "peak_bytes": statistics.median(b for _, b in results),
                       "all_seconds": [s for s, _ in results]} for name, results in seen.items()}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The parts.


def steps(args):
    """Training steps, ratios and floors."""
    bench = Bench(args, args.vocab_size, args.rows, args.seq_len)
    teacher = DiT(bench.model.config).to(bench.device).requires_grad_(False)
    objectives = {
        "diagonal": diagonal,
        "V-sized": v_sized,
        "next token": next_token,
        "psd": functools.partial(consistency, "psd", None),
        "lsd": functools.partial(consistency, "lsd", teacher),
        "esd": functools.partial(consistency, "esd", teacher),
    }
    objectives = {name: f for name, f in objectives.items() if not args.only or name in args.only}
    results = bench.interleaved({name: functools.partial(bench.step, f) for name, f in objectives.items()}, args.repeats)
    base = results.get("diagonal", next(iter(results.values())))
    forward = args.rows * flops_per_row(bench.model, args.seq_len)
    D, tokens = bench.model.config.width, args.rows * args.seq_len
    gram = 6 * args.vocab_size * D**2 if bench.model.noise_size < args.vocab_size else 6 * tokens * args.vocab_size * D
    # forward, twice that backward, and what each adds: noise; the V-sized product and its gradient on W; teachers and a tangent
    floors = {"diagonal": 3 * forward + gram, "V-sized": 3 * forward + 4 * tokens * args.vocab_size * D, "next token": 3 * forward,
              "psd": 5 * forward + gram, "lsd": 5 * forward + gram, "esd": 5 * forward + gram}  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in bench.params)
    print(f"\n{tokens} tokens a step, {sum(p.numel() for p in bench.params) / 1e6:.0f}M parameters")
    print(f"{'step':>12} {'seconds':>9} {'/ diagonal':>10} {'TFLOP floor':>11} {'TFLOP/s':>8} {'peak GB':>8} {'/ diagonal':>10}")
    for name, r in results.items():
        r |= {"flop_floor": floors[name], "byte_floor": 7 * weights}  # weights read twice, gradient and Adam's state read and written
        more = r["peak_bytes"] / max(1, base["peak_bytes"])
        print(f"{name:>12} {r['seconds']:9.3f} {r['seconds'] / base['seconds']:10.2f} {floors[name] / 1e12:11.2f} "
              f"{floors[name] / 1e12 / r['seconds']:8.3f} {r['peak_bytes'] / 1e9:8.2f} {more:10.2f}")  # fmt: skip
    peak = next((v for k, v in PEAK_FLOPS.items() if bench.meter.cuda and k in torch.cuda.get_device_name()), None)
    if peak:
        print(f"model FLOP utilisation of the diagonal: {3 * forward / base['seconds'] / peak:.3f}")
    return results


def sampling(args):
    """Sampling by NFE, with the state in the embedding and of size V."""
    bench = Bench(args, args.vocab_size, 1, args.seq_len)
    bench.optimizer = bench.params = None
    bench.model.requires_grad_(False)
    for p in bench.model.parameters():
        p.grad = None
    calls = {f"{nfe} NFE{way}": functools.partial(bench.sample, f, nfe, args.sample_rows)
             for nfe in args.nfe for way, f in (("", generate), (", V-sized", v_sized_generate))}  # fmt: skip
    results = bench.interleaved(calls, args.repeats)
    print(f"\nsampling {args.sample_rows} x {args.seq_len}\n{'':>16} {'seconds':>9} {'sequences/s':>12} {'peak MB':>9}")
    for name, r in results.items():
        print(f"{name:>16} {r['seconds']:9.3f} {args.sample_rows / r['seconds']:12.2f} {r['peak_bytes'] / 1e6:9.1f}")
    return results


def memory(args):
    """Peak memory of the diagonal's step as V grows, and as L grows."""
    results = {}
    cases = [(v, args.memory_rows, 128) for v in (1_000, 10_000, 50_000, 100_000)]
    cases += [(args.vocab_size, max(1, args.memory_rows * 128 // length), length) for length in (128, 512, 1024)]
    print(f"\n{'V':>8} {'rows':>5} {'L':>5} {'peak MB beyond weights, gradients, optimizer':>45}")
    for vocab_size, rows, length in cases:
        bench = Bench(args, vocab_size, rows, length)
        result = bench.interleaved({"diagonal": functools.partial(bench.step, diagonal)}, 2)["diagonal"]
        results[f"V={vocab_size} rows={rows} L={length}"] = result
        print(f"{vocab_size:8} {rows:5} {length:5} {result['peak_bytes'] / 1e6:45.0f}", flush=True)
        del bench
    return results


def main():
    parser = Parser(prog="benchmark.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=["steps", "sampling", "memory"], default=["steps", "sampling", "memory"])
    parser.add_argument("--only", nargs="+", metavar="STEP", help="of the steps, these")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--sample-rows", type=int, default=1, help="sequences sampled at once")
    parser.add_argument("--memory-rows", type=int, default=32, help="rows of 128 in the memory tables")
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
    results = {part: {"steps": steps, "sampling": sampling, "memory": memory}[part](args) for part in args.parts}
    if args.output:
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.output.write_text(json.dumps({"flags": flags, "torch": torch.__version__, "device": device, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
