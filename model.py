"""The model, the flow and the noise: everything that both training stages and the sampler share.

Notation (equation numbers are those of Discrete Flow Maps, arXiv 2604.09784):
    B rows, L positions, V tokens, D model width
    time 0 is noise, time 1 is data, and 0 <= s <= u <= t <= 1
    x0 noise, x1 data (one-hot), x_t = alpha_t x0 + beta_t x1: shape (B, L, V), never built
    y = x W, shape (B, L, D): the only form in which the network sees x; W is `model.embedding`
    psi_st = softmax(z_st): the mean denoiser, a distribution over V tokens at each position
    times are tensors (B, 1), one for each row, or (B, L), one for each position
"""

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute


# ---- The interpolant x_t = alpha_t x0 + beta_t x1 (37, 47). ------------------------------------
class Interpolant(NamedTuple):
    """A path between noise and data, and the coefficients of its flow, elementwise in the times.

    Each is built from alpha and from two quantities that are finite at both ends:
        Delta_st = alpha_s beta_t - alpha_t beta_s        linear path: t - s
        Wr_t     = alpha_t beta'_t - alpha'_t beta_t      linear path: 1      (the Wronskian)
    Wr_t must be positive for t < 1: ESD divides by Wr_s, LSD by Wr_t."""

    alpha: Callable
    beta: Callable
    d_alpha: Callable
    d_beta: Callable
    Delta: Callable  # Delta_st, without subtracting nearly equal products
    time_at: Callable  # b in [0, 1] -> the time t at which beta_t / alpha_t = b / (1 - b)

    def wronskian(self, t):
        """Wr_t = alpha_t beta'_t - alpha'_t beta_t."""
        return self.alpha(t) * self.d_beta(t) - self.d_alpha(t) * self.beta(t)

    def Gamma(self, s, t):
        """Gamma_st = alpha_t / alpha_s (50), for s < 1."""
        return self.alpha(t) / self.alpha(s)

    def Xi(self, s, t):
        """Xi_st = beta_t - Gamma_st beta_s = Delta_st / alpha_s (50), for s < 1."""
        return self.Delta(s, t) / self.alpha(s)

    def ell(self, t):
        """ell_t = alpha'_t / alpha_t (52), for t < 1."""
        return self.d_alpha(t) / self.alpha(t)

    def lam(self, t):
        """lambda_t = beta'_t - beta_t alpha'_t / alpha_t = Wr_t / alpha_t (52), for t < 1."""
        return self.wronskian(t) / self.alpha(t)

    def omega(self, s, u, t):
        """Semigroup weight omega = Gamma_ut Xi_su / Xi_st (23, 64), for s < t and u < 1."""
        return self.alpha(t) * self.Delta(s, u) / (self.alpha(u) * self.Delta(s, t))

    def C(self, s, t):
        """Lagrangian factor C = Xi_st / lambda_t (24, 68), for s < 1."""
        return self.alpha(t) * self.Delta(s, t) / (self.alpha(s) * self.wronskian(t))

    def E(self, s, t):
        """Eulerian factor E = Gamma_st / kappa = Xi_st / lambda_s (25, 70); finite at kappa = 0."""
        return self.Delta(s, t) / self.wronskian(s)

    def flow_map(self, x, psi, s, t):
        """X_st(x) = Gamma_st x + Xi_st psi_st(x) (18, 50); x and psi are (B, L, V) or (B, L, D)."""
        return self.Gamma(s, t)[..., None] * x + self.Xi(s, t)[..., None] * psi

    def drift(self, x, psi, t):
        """b_t(x) = ell_t x + lambda_t psi_tt(x) (52), for t < 1; linear path: (psi - x)/(1 - t)."""
        return self.ell(t)[..., None] * x + self.lam(t)[..., None] * psi


HALF_PI = math.pi / 2
INTERPOLANTS = {
    "linear": Interpolant(
        alpha=lambda t: 1 - t,
        beta=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_beta=lambda t: torch.ones_like(t),
        Delta=lambda s, t: t - s,
        time_at=lambda b: b,
    ),
    "trigonometric": Interpolant(
        alpha=lambda t: torch.cos(HALF_PI * t),
        beta=lambda t: torch.sin(HALF_PI * t),
        d_alpha=lambda t: -HALF_PI * torch.sin(HALF_PI * t),
        d_beta=lambda t: HALF_PI * torch.cos(HALF_PI * t),
        Delta=lambda s, t: torch.sin(HALF_PI * (t - s)),
        time_at=lambda b: torch.atan2(b, 1 - b) / HALF_PI,
    ),
}


# ---- The noise schedule (36). ------------------------------------------------------------------
# It turns "progress" tau, uniform in [0, 1], into a time, in training and in sampling. The
# identities contain it only if positions have times of their own (distill.Jump).

# The last progress visited: at t = 1 the Eulerian teacher is 0/0 and the drift infinite. Under the
# argmax schedule without lag argmax x_t is then clean with probability 0.9999 or more.
MAX_PROGRESS = 0.9999


def argmax_accuracy(ratio, vocab_size):
    """P(argmax x_t is clean) = integral of phi(z) Phi(z + ratio)^(V-1) dz, ratio = beta/alpha."""
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)  # exact to rounding up to V = 1,000,000
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    log_power = (vocab_size - 1) * torch.special.log_ndtr(z + ratio[:, None])
    return torch.trapezoid((log_density + log_power).exp(), z, dim=-1).clamp(max=1)


def schedule_table(kind, vocab_size, blend):
    """Knots (tau, b) of the schedule, two float64 tensors (n,), both rising from 0 to 1.

    b = beta / (alpha + beta). "linear" is b = tau. "argmax" makes the accuracy of the argmax grow
    linearly, P(b) = 1/V + tau (1 - 1/V), blended as blend * b(tau) + (1 - blend) * tau."""
    b = torch.linspace(0, 1, 2001, dtype=torch.float64)
    if kind == "linear":
        return b, b
    tau = (argmax_accuracy(b / (1 - b), vocab_size) - 1 / vocab_size) / (1 - 1 / vocab_size)
    tau[0], tau[-1] = 0, 1
    # The accuracy rounds to 1 a little before b = 1: keep only knots where tau still rises.
    rising = (tau[1:-1] > tau[:-2].cummax(0).values) & (tau[1:-1] < 1 - 1e-12)
    rising = F.pad(rising, (1, 1), value=True)
    tau, b = tau[rising], b[rising]
    return tau, blend * b + (1 - blend) * tau


def lagged(tau, lag, L):
    """tau_l and d tau_l / d tau (n, L) of each position when the row's progress is tau (n, 1) (38).

    Our choice: logit(tau_l) = logit(tau) - lag (l / (L - 1) - 1/2). Earlier positions go first, all
    start at 0 and, up to `MAX_PROGRESS`, end at 1 together; the rate stays within exp(+-lag/2)."""
    odds = torch.exp(lag * (torch.linspace(0, 1, L, dtype=tau.dtype) - 0.5))  # tau's over tau_l's
    denominator = tau + (1 - tau) * odds
    return tau / denominator, odds / denominator**2


# ---- The network: embedded state y and two times -> h, with logits z_st = h @ head.T. ----------

SIZES = {
    "tiny": dict(layers=3, width=128, heads=4),
    "mini": dict(layers=4, width=256, heads=4),
    "small": dict(layers=6, width=384, heads=6),
    "base": dict(layers=12, width=768, heads=12),  # the paper's: 170M parameters at V = 50,257
}


@dataclass
class ModelConfig:
    """What fixes a model's shape and its path; stored in every checkpoint."""

    vocab_size: int
    seq_len: int
    layers: int
    width: int
    heads: int
    time_width: int = 128
    interpolant: str = "linear"
    schedule: str = "argmax"
    schedule_blend: float = 0.9
    position_lag: float = 0.0
    input_scale: float = 1.0  # of y, as it enters the residual stream


class TimeEmbedding(nn.Module):
    """Times (B, 1 or L) -> features (B, 1 or L, width).

    1 to 8 rad per unit time: with the usual 1,000 rad the derivative in time (ESD) is noise."""

    def __init__(self, width):
        super().__init__()
        frequencies = torch.logspace(0, 3, width // 2, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))

    def features(self, t):
        angles = t[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t):
        return self.mlp(self.features(t))


def attention(q, k, v, causal=False):
    """Attention of q (B, heads, L, d), the last L of S positions, to k and v (B, heads, S, d)."""
    L, S = q.shape[-2], k.shape[-2]
    if causal and L < S:  # the fused causal mask aligns with the first key, ours with the last
        seen = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    if q.device.type != "cpu" or S > 32 or causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # Short rows on a CPU, where a softmax down the columns is fast: scores (B, heads, S, L).
    scores = k @ q.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.softmax(-2).transpose(-2, -1) @ v


def norm(x):
    """LayerNorm without weights over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def modulate(h, shift, scale):
    """(1 + scale) h + shift; shift and scale (B, 1 or L, D) come from the time."""
    return torch.addcmul(h + shift, h, scale)


class Linear(nn.Linear):
    """A linear layer whose tangent costs one product: torch multiplies the weight's zeros too."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)
        y = super().forward(x)
        return y if dx is None else forward_ad.make_dual(y, F.linear(dx, self.weight))


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, heads, L, d), pairing feature i with feature i + d/2."""
    x, dx = forward_ad.unpack_dual(x)  # as in `Linear`
    a, b = x.chunk(2, -1)
    y = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return y if dx is None else forward_ad.make_dual(y, rotate(dx, cos, sin))


class Block(nn.Module):
    """Pre-norm attention and MLP, each modulated and gated by the time (adaLN-zero).

    Another block has this `forward`, of operations that torch.func.jvp knows (LSD and ESD)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.qkv = Linear(D, 3 * D, bias=False)
        self.out = Linear(D, D, bias=False)
        self.mlp = nn.Sequential(Linear(D, 4 * D), nn.GELU("tanh"), Linear(4 * D, D))
        self.modulation = Linear(config.time_width, 6 * D)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h, time, rotary, past=None, causal=False):
        """h (B, L, D), time (B, 1 or L, time_width) -> h and this block's (keys, values).

        past: the (keys, values) of a context, which those returned then include."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, -1)
        x = self.qkv(modulate(norm(h), shift_a, scale_a)).unflatten(2, (3, self.heads, -1))
        x = x.permute(2, 0, 3, 1, 4)  # q, k, v: (B, heads, L, D / heads) each
        q, k = rotate(x[:2], *rotary)
        v = x[2].contiguous()  # as a view it would keep all of x alive until the backward pass
        if past is not None:
            k = torch.cat([past[0], k], 2)
            v = torch.cat([past[1], v], 2)
        a = self.out(attention(q, k, v, causal).transpose(1, 2).flatten(2))
        h = h + gate_a * a
        m = self.mlp(modulate(norm(h), shift_m, scale_m))
        return h + gate_m * m, (k, v)


class DiT(nn.Module):
    """The paper's diffusion transformer, with two times."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, D, T = config.vocab_size, config.width, config.time_width
        self.path = INTERPOLANTS[config.interpolant]
        self.schedule_tau, b = schedule_table(config.schedule, V, config.schedule_blend)
        self.schedule_time = self.path.time_at(b)

        # W. Orthogonal: for V > D, W^T W = I, so the noise y0 = x0 W starts with unit variance.
        self.embedding = nn.Parameter(nn.init.orthogonal_(torch.empty(V, D)))
        self.time_s = TimeEmbedding(T)
        self.time_t = TimeEmbedding(T)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_modulation = Linear(T, 2 * D)
        self.head = nn.Parameter(torch.zeros(V, D))
        self.loss_weight = nn.Sequential(nn.Linear(2 * T, T), nn.SiLU(), nn.Linear(T, 1))
        for layer in (self.final_modulation, self.loss_weight[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

        half = D // config.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(config.seq_len)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("held_factor", None, persistent=False)  # see `hold_noise`
        self.compiled = False  # or "static", "dynamic": see `compile_parts`
        self.activation_checkpointing = False

    @torch.no_grad()
    def start_from(self, counts):
        """Start where every prediction is p, the tokens' shares of `counts` (V,), and W suits p.

        y = x W shows a token with a signal-to-noise ratio of sqrt(h) beta / alpha, h its leverage
        in W; leverages sum to D, so frequent tokens get more. Learning both takes a plateau."""
        V, D = self.embedding.shape
        if V <= D:  # all are plain to see, and a head of zeros is as good or better
            return
        self.config.input_scale = 0.1  # a token's own y shows it in part: leave more to the context
        p = torch.as_tensor(counts + 1.0) / (counts + 1.0).sum()
        rows = p.sqrt()[:, None] * torch.randn(V, D, dtype=p.dtype)
        self.embedding.copy_(torch.linalg.qr(rows)[0])
        self.final_modulation.bias[:D] = 1  # the shift; norm(h) has no part along it
        self.head.copy_((p.log() - p.log().mean())[:, None].expand(V, D) / D)

    def embed_times(self, s, t):
        """Embedding of two times (B, 1 or L): (B, 1 or L, time_width)."""
        return F.silu(self.time_s(s) + self.time_t(t))

    def call(self, method, *inputs):
        """method(*inputs) of a block; under activation checkpointing only the inputs are kept."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recompute(method, *inputs, use_reentrant=False, preserve_rng_state=False)
        return method(*inputs)

    def forward(self, y, s, t, context=None):
        """y (B, L, D) at time s -> h_st (B, L, D); the mean denoiser is softmax(h_st @ head.T).

        context: None for whole rows, or a pair: each block's keys and values of a clean context, or
        None; and cos and sin of the positions of y. Times: (B, 1 or L), 0 <= s <= t <= 1."""
        L = y.shape[1]
        keys, rotary = context or ([None] * len(self.blocks), (self.cos[:L], self.sin[:L]))
        h = self.config.input_scale * y
        time = self.embed_times(s, t)
        for block, past in zip(self.blocks, keys, strict=True):
            h, _ = self.call(block.forward, h, time, rotary, past)
        shift, scale = self.final_modulation(time).chunk(2, -1)
        return modulate(norm(h), shift, scale)

    def derivative(self, y, s, t, dy=None, ds=None, dt=None, context=None):
        """(h_st with its graph, its derivative along (dy, ds, dt) without one).

        dy = b_s(y) and ds = 1 give D_s of the Eulerian identity (25), dt = 1 gives d/dt of the
        Lagrangian one (24). The head turns dh into the derivative of the logits, linear in h."""
        pairs = zip((y, s, t), (dy, ds, dt), strict=True)
        tangents = [torch.zeros_like(x) if dx is None else dx.to(x.dtype) for x, dx in pairs]
        return self(y, s, t, context), self.tangent((y, s, t), tuple(tangents), context)

    @torch.no_grad()
    def tangent(self, inputs, tangents, context):
        """jvp of `forward`. No fused attention kernel has a forward mode, so plain operations."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda *x: self(*x, context), inputs, tangents)[1]

    def log_scale(self, s, t):
        """Learned weight w(s, t) of the loss exp(-w) loss + w: times (B, 1 or L) -> same shape."""
        features = torch.cat([self.time_s.features(s), self.time_t.features(t)], -1)
        return self.loss_weight(features).squeeze(-1)

    # --- clean contexts (section 4.2) ---

    def encode(self, tokens, past=None):
        """Causal pass over clean tokens (B, c) at time 1: each block's (keys, values).

        Keys and values: (B, heads, c, D / heads). past: an earlier result, of the tokens just
        before these, which the new one extends."""
        start = past[0][0].shape[2] if past else 0
        positions = slice(start, start + tokens.shape[1])
        h = self.config.input_scale * F.embedding(tokens, self.embedding)
        one = torch.ones(len(h), 1, dtype=h.dtype, device=h.device)
        time = self.embed_times(one, one)
        rotary = self.cos[positions], self.sin[positions]
        context = []
        for block, earlier in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            h, keys = self.call(block.forward, h, time, rotary, earlier, True)
            context.append(keys)
        return context

    # --- noise, in the embedding ---

    @property
    def noise_size(self):
        """Normals drawn per token: D, or all V if V <= 2 D, where W^T W is (nearly) singular."""
        V, D = self.config.vocab_size, self.config.width
        return V if V <= 2 * D else D

    def noise_factor(self):
        """R of shape (noise_size, D) with R^T R = W^T W, differentiable in W.

        It costs 4 V D^2 FLOPs a step, gradient included; V normals would cost 4 V D a token."""
        W = self.embedding
        if self.held_factor is not None:
            return self.held_factor
        if self.noise_size == len(W):
            return W
        with torch.autocast(W.device.type, enabled=False):
            half = W.T @ W.detach()  # symmetric: differentiate one factor, double it
            gram = 2 * half - half.detach()
            jitter = 1e-6 * gram.diagonal().mean().detach()  # moves R by a few float32 roundings
            # Unlike cholesky, cholesky_ex does not wait for the GPU to see whether it has failed.
            L, failed = torch.linalg.cholesky_ex(gram + jitter.expand(len(gram)).diag())
            return L.T.masked_fill(failed > 0, math.nan)

    def hold_noise(self):
        """Compute the noise factor once, for as long as W does not change."""
        self.held_factor = self.noise_factor().detach()

    def embed_noise(self, xi):
        """xi ~ N(0, I) (B, L, noise_size) -> y0 = xi R (B, L, D), in law x0 W ~ N(0, W^T W)."""
        with torch.autocast(xi.device.type, enabled=False):
            return xi @ self.noise_factor()

    def interpolate(self, xi, clean, t):
        """y_t = alpha_t x0 W + beta_t x1 W (37): t (B, 1 or L) -> (B, L, D).

        clean: the tokens of x1 (B, L), or x1 W itself (B, L, D), as of a soft sample."""
        if not clean.is_floating_point():
            # The gradient of plain indexing is summed in random order on several threads.
            clean = F.embedding(clean, self.embedding)
        noise = self.embed_noise(xi)
        return self.path.alpha(t)[..., None] * noise + self.path.beta(t)[..., None] * clean

    # --- times ---

    def times(self, tau, L=None):
        """Progress tau, float64 (n, 1) on the CPU -> times < 1 (n, 1), with a lag (n, L) (38)."""
        return self.times_and_rates(tau, L)[0]

    def times_and_rates(self, tau, L=None):
        """`times`, and dt/dtau scaled to a mean of 1 over the row; one shared time has rate 1."""
        tau = tau.clamp(0, MAX_PROGRESS)
        lag = self.config.position_lag
        if lag:
            tau, rate = lagged(tau, lag, L or self.config.seq_len)
        knots, values = self.schedule_tau, self.schedule_time
        right = torch.searchsorted(knots, tau.contiguous()).clamp(1, len(knots) - 1)
        slope = (values[right] - values[right - 1]) / (knots[right] - knots[right - 1])
        t = values[right - 1] + slope * (tau - knots[right - 1])
        if not lag:
            return t, torch.ones_like(t)
        rate = rate * slope
        return t, rate / rate.mean(-1, keepdim=True)

    # --- the head, and compilation ---

    def soft_embedding(self, h):
        """psi W for psi = softmax(h @ head.T): (B, L, D) -> (B, L, D), without a gradient."""
        with torch.no_grad():
            low_embedding = in_autocast_dtype(self.embedding)
            psi_of = maybe_compiled(probabilities, self.compiled)
            parts = [psi_of(z) @ low_embedding for _, z in logit_chunks(h, self.head)]
        return at_least_float32(torch.cat(parts)).view(h.shape)

    def compile_parts(self, dynamic=False):
        """torch.compile the blocks and the losses. dynamic: for sizes that change (--context)."""
        self.compiled = "dynamic" if dynamic else "static"
        # Each mix of network, gradient, batch, context and size-1 dimensions is a version.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.specialize_float = True  # c and r of (45) are constants
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=dynamic)
        self.tangent = torch.compile(self.tangent, dynamic=dynamic)


class Conditional:
    """A DiT on a block at `positions` (n,) after the context `keys`, from `encode`, or None."""

    def __init__(self, model, keys, positions):
        self.model = model
        self.positions = positions
        rotary = model.cos[positions], model.sin[positions]
        self.context = (keys or [None] * len(model.blocks)), rotary
        self.derivative = functools.partial(model.derivative, context=self.context)
        self.times = functools.partial(model.times, L=len(positions))
        self.times_and_rates = functools.partial(model.times_and_rates, L=len(positions))

    def __call__(self, y, s, t):
        return self.model(y, s, t, self.context)

    def without_context(self):
        """The same block of the same network without the context, for guidance."""
        return Conditional(self.model, None, self.positions)

    def __getattr__(self, name):
        return getattr(self.model, name)


# ---- Losses over a vocabulary, without logits of shape (B, L, V). ------------------------------
def softmax(z):
    """psi from logits, in at least float32: an average of posteriors (58) is on the simplex."""
    return at_least_float32(z).softmax(-1)


def at_least_float32(z):
    """At least float32: low-precision logits are widened before a softmax, float64 stays."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def in_autocast_dtype(x):
    """x detached, in the dtype of the autocast around us: cast once, before a loop over chunks."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.detach().to(torch.get_autocast_dtype(device))
    return x.detach()


def probabilities(z):
    """`softmax` in the dtype of z."""
    return softmax(z).to(z.dtype)


def rows_at_once(V, device):
    """Rows of V logits in a chunk, a power of two: 2^23 logits on a CPU, 2^27 elsewhere (0.5 GB).

    Large enough that adding a (V, D) gradient per chunk is cheap; constant, so that runs repeat."""
    logits = 2 ** (23 if device.type == "cpu" else 27)
    return 2 ** max(0, round(math.log2(logits / V)))


def logit_chunks(h, head):
    """Yield (rows, logits (n, V)) for hidden vectors h (..., D), rows being a slice of them all."""
    flat = in_autocast_dtype(h).flatten(0, -2)
    low_head = in_autocast_dtype(head)
    step = rows_at_once(len(head), head.device)
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        yield rows, flat[rows] @ low_head.T


@functools.cache
def maybe_compiled(function, compiled):
    """`function`, compiled once: for each shape ("static"), for all shapes ("dynamic"), or not."""
    return torch.compile(function, dynamic=compiled == "dynamic") if compiled else function


class RowLoss(NamedTuple):
    """A loss on rows of logits z (n, V): function(z, *rows of the tensors in by_row, *shared).

    It returns a report {"loss": (n,), "distance": (n,), ...}, with distance |q - p| from prediction
    to target, and the gradient g (n, V) on z. by_row and shared are constants of the gradient."""

    function: Callable
    by_row: tuple = ()
    shared: tuple = ()


class HeadLoss(torch.autograd.Function):
    """`head_loss` in chunks: logits, their gradient g, at once g @ head and g.T @ h; none stays."""

    @staticmethod
    def forward(ctx, h, head, scale, row_loss, c, r, compiled):
        grad_h = torch.empty_like(h) if h.requires_grad else None
        grad_head = torch.zeros_like(head) if head.requires_grad else None
        low_h = in_autocast_dtype(h)
        low_head = in_autocast_dtype(head)
        loss_of = maybe_compiled(chunk_loss, compiled)
        total = scale.new_zeros(())
        reports = []
        for rows, z in logit_chunks(low_h, low_head):
            inputs = (*(x[rows] for x in row_loss.by_row), *row_loss.shared)
            loss, report, g = loss_of(row_loss.function, z, scale[rows], c, r, inputs)
            total += loss
            reports.append(report)
            if grad_h is not None:
                grad_h[rows] = g @ low_head
            if grad_head is not None:
                grad_head += g.T @ low_h[rows]
        ctx.gradients = grad_h, grad_head
        return total, {name: torch.cat([part[name] for part in reports]) for name in reports[0]}

    @staticmethod
    def backward(ctx, grad, _):
        grads = [None if known is None else known.mul_(grad) for known in ctx.gradients]
        ctx.gradients = None  # scaled in place, not copied, so this works only once
        return *grads, None, None, None, None, None


def chunk_loss(function, z, scale, c, r, inputs):
    """HeadLoss between its products: the weighted sum, the report, and the gradient on z (n, V)."""
    report, g = function(at_least_float32(z), *inputs)
    adaptive = (report["distance"].square() + c) ** -r  # (45): w = (|q - p|^2 + c)^-r
    weight = scale * adaptive
    report["weighted"] = adaptive * report["loss"]
    return (weight * report["loss"]).sum(), report, g.mul_(weight[:, None]).to(z.dtype)


def head_loss(h, head, scale, row_loss, c, r, compiled=False):
    """sum_i scale_i w_i loss_i, differentiable in h (N, D) and head (V, D), and a report per row.

    w_i = (distance_i^2 + c)^-r is the adaptive weight (45), a constant like scale (N,). The report
    {name: (N,)} has the plain "loss", "weighted" (w_i loss_i), and what the `RowLoss` adds."""
    return HeadLoss.apply(h, head, scale, row_loss, c, r, compiled)


def entropy(p):
    """-sum p log p in nats of distributions (..., V): (...)."""
    return -torch.xlogy(p, p).sum(-1)


# ---- Machinery: skip at first reading. ---------------------------------------------------------
# Randomness: a function of (seed, step, row of the global batch), however those rows are split.
class Draw:
    """Random numbers of rows (n,) of a step's global batch; each call draws fresh ones.

    The same calls give a row the same numbers, whichever rows are drawn with it."""

    def __init__(self, seed, step, rows, device, calls=0):
        self.seed = seed
        self.step = step
        self.rows = np.asarray(rows)
        self.device = device
        self.calls = calls

    def part(self, mask):
        """The same draw for the rows where the bool array `mask` (n,) is true."""
        return Draw(self.seed, self.step, self.rows[mask], self.device, self.calls)

    def normal(self, *shape):
        """Standard normals, float32 (n, *shape) on the device."""
        self.calls += 1
        generator = torch.Generator(device=self.device)
        out = torch.empty(len(self.rows), *shape, device=self.device)
        for row, index in zip(out, self.rows.tolist(), strict=True):
            sequence = np.random.SeedSequence([self.seed, self.step, self.calls, index])
            state = sequence.generate_state(1, np.uint64)[0]
            generator.manual_seed(int(state >> np.uint64(1)))
            torch.randn(shape, generator=generator, device=self.device, out=row)
        return out

    def shared(self):
        """One uniform in [0, 1), a float, the same for all rows of the step."""
        self.calls += 1
        return float(np.random.default_rng([self.seed, self.step, self.calls]).random())

    def uniform(self, k):
        """k uniforms for each row, float64 (n, k) on the CPU, of low discrepancy over the rows.

        Kronecker: frac(offset + row a_j), a_j = phi^-(j+1), phi^(k+1) = phi + 1."""
        self.calls += 1
        offset = np.random.default_rng([self.seed, self.step, self.calls]).random(k)
        phi = 2.0
        for _ in range(64):  # fixed-point iteration for phi
            phi = (1 + phi) ** (1 / (k + 1))
        powers = phi ** -(1.0 + np.arange(k))
        return torch.from_numpy((offset + self.rows[:, None] * powers) % 1)


# ---- Checkpoints: runs/NAME/checkpoint-STEP.pt, a dict of tensors and plain builtins. ----------
@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file to write that appears at `path` only when it is complete and on disk.

    SystemExit if it cannot be written, as on a full disk."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name is on disk before anyone deletes an older file
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into RuntimeError
        reason = str(error).splitlines()[0]
        raise SystemExit(f"cannot write {path} ({reason}): make room, or write elsewhere") from None
    finally:
        beside.unlink(missing_ok=True)


def checkpoints(folder):
    """The checkpoints in a run's folder, newest first."""
    names = [re.fullmatch(r"checkpoint-(\d+)\.pt", path.name) for path in Path(folder).glob("*.pt")]
    newest_first = sorted(filter(None, names), key=lambda name: -int(name[1]))
    return [Path(folder) / name[0] for name in newest_first]


def save_checkpoint(folder, content, keep):
    """Write folder/checkpoint-STEP.pt; only once it is safe, delete all but the newest `keep`."""
    with atomic_write(Path(folder) / f"checkpoint-{content['step']}.pt", "wb") as file:
        torch.save(content, file)
    for old in checkpoints(folder)[keep:]:
        old.unlink()


def read_checkpoint(path):
    """A checkpoint's dict, on the CPU; of a run's folder, the newest one."""
    path = Path(path)
    found = checkpoints(path) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise SystemExit(f"no checkpoint at {path}: train one, or name another file or run folder")
    try:
        if damaged := zipfile.ZipFile(found[0]).testzip():  # torch.load compares no checksums
            raise ValueError(f"{damaged} in it does not match its checksum")
        return torch.load(found[0], map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, zlib, pickle and torch fail in their own ways
        older = f" to go on from {found[1]}" if len(found) > 1 else ""
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SystemExit(f"cannot read {found[0]} ({reason}): if torn, delete it{older}") from None


def load_model(source, device="cpu", **changes):
    """(DiT with the averaged weights in eval mode, the dict) of a checkpoint: a path or its dict.

    It needs "ema", "model_config", "meta" and "args" alone. changes: entries of its `ModelConfig`
    to replace that no weight depends on, such as seq_len."""
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    model = DiT(ModelConfig(**checkpoint["model_config"] | changes))
    model.load_state_dict(checkpoint["ema"], strict=True)
    return model.to(device).eval().requires_grad_(False), checkpoint


def commit():
    """The commit of this code, with "-dirty" if files have changed since; "" without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # git may not be installed
        found = subprocess.run([*git, "--exclude=*", "--abbrev=40"], capture_output=True, text=True)
        return found.stdout.strip()
    return ""


def parse(parser):
    """Parse, with --device and --dtype, and fill in both; SystemExit if the device is absent."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["cuda", "cpu", "mps"], help="default: cuda if available, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    args = parser.parse_args()
    if not 0 <= getattr(args, "seed", 0) < 2**63:
        parser.error(f"--seed {args.seed} is not from 0 to 2^63 - 1")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; training sets its own handler
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.get_device_module(args.device).is_available():
        raise SystemExit(f"--device {args.device}: not available here; try --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args
