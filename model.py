"""The model, the flow and the noise: everything that both training stages and the sampler share.

Read from the top: the interpolant and its coefficients, the noise schedule, the DiT, then what a
vocabulary of 50,000 asks for (noise drawn in the embedding, losses and soft embeddings in chunks).

Conventions, everywhere in this project (equation numbers: Discrete Flow Maps, arXiv 2604.09784):

    time 0 is noise, time 1 is data, 0 <= s <= u <= t <= 1
    x0 noise, x1 data (one-hot rows), x_t = alpha_t x0 + beta_t x1, all of shape (B, L, V), never built
    y = x W, of shape (B, L, D): the only form in which the network sees x (W is `model.embedding`)
    psi_st = softmax(z_st): the mean denoiser, a distribution over V tokens at each position
    times are tensors of shape (B, 1), one a row, or (B, L), one a position
"""

import functools
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from prepare_data import UserError, meta_fault

# ------------------------------------------------------------------------------------------------
# The interpolant x_t = alpha_t x0 + beta_t x1 (37, 47) and every coefficient that the flow needs.


class Interpolant(NamedTuple):
    """A path between noise and data, and the coefficients derived from it, each in one place.

    Two antisymmetric combinations carry all of them, and stay finite at both ends:

        Delta_st = alpha_s beta_t - alpha_t beta_s          linear: t - s
        Wr_t     = alpha_t beta'_t - alpha'_t beta_t        linear: 1        (the Wronskian)

    With r = beta / alpha, Delta_st = alpha_s alpha_t (r_t - r_s) and Wr_t = alpha_t^2 r'_t. All
    methods are elementwise in tensors of times in [0, 1].
    """

    alpha: Callable
    beta: Callable
    d_alpha: Callable
    d_beta: Callable
    delta: Callable
    time_of: Callable  # the time t at which beta_t / alpha_t = b / (1 - b), for b in [0, 1]

    def wronskian(self, t):
        """Wr_t = alpha_t beta'_t - alpha'_t beta_t."""
        return self.alpha(t) * self.d_beta(t) - self.d_alpha(t) * self.beta(t)

    def Gamma(self, s, t):
        """Gamma_st = alpha_t / alpha_s (50), for s < 1."""
        return self.alpha(t) / self.alpha(s)

    def Xi(self, s, t):
        """Xi_st = beta_t - Gamma_st beta_s (50), for s < 1."""
        return self.delta(s, t) / self.alpha(s)

    def ell(self, t):
        """ell_t = alpha'_t / alpha_t (52), for t < 1."""
        return self.d_alpha(t) / self.alpha(t)

    def lam(self, t):
        """lambda_t = beta'_t - beta_t alpha'_t / alpha_t = Wr_t / alpha_t (52), for t < 1."""
        return self.wronskian(t) / self.alpha(t)

    def omega(self, s, u, t):
        """The semigroup weight omega = Gamma_ut Xi_su / Xi_st (23, 64), for s < t and u < 1."""
        return self.alpha(t) * self.delta(s, u) / (self.alpha(u) * self.delta(s, t))

    def C(self, s, t):
        """The Lagrangian's C = Xi_st / lambda_t (24, 68), for s < 1; linear: (t - s)(1 - t)/(1 - s)."""
        return self.alpha(t) * self.delta(s, t) / (self.alpha(s) * self.wronskian(t))

    def eulerian(self, s, t):
        """The pair (Gamma_st, Gamma_st / kappa), 1/kappa = Xi_st / (Gamma_st lambda_s) (25, 70), for s < 1.

        1 - delta / kappa is their Gamma_st - (Gamma_st / kappa) delta up to a factor, and these two are
        finite at t = 1, where kappa is 0; linear: (1 - t)/(1 - s) and t - s.
        """
        return self.Gamma(s, t), self.delta(s, t) / self.wronskian(s)

    def flow_map(self, x, psi, s, t):
        """X_st(x) = Gamma_st x + Xi_st psi_st (18, 50); x and psi (B, L, *), in tokens or embedded."""
        return self.Gamma(s, t)[..., None] * x + self.Xi(s, t)[..., None] * psi

    def drift(self, x, psi, t):
        """b_t(x) = ell_t x + lambda_t psi_tt (52), for t < 1; linear: (psi_tt - x)/(1 - t)."""
        return self.ell(t)[..., None] * x + self.lam(t)[..., None] * psi


HALF_PI = math.pi / 2
INTERPOLANTS = {
    "linear": Interpolant(
        alpha=lambda t: 1 - t,
        beta=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_beta=lambda t: torch.ones_like(t),
        delta=lambda s, t: t - s,
        time_of=lambda b: b,
    ),
    "trigonometric": Interpolant(
        alpha=lambda t: torch.cos(HALF_PI * t),
        beta=lambda t: torch.sin(HALF_PI * t),
        d_alpha=lambda t: -HALF_PI * torch.sin(HALF_PI * t),
        d_beta=lambda t: HALF_PI * torch.cos(HALF_PI * t),
        delta=lambda s, t: torch.sin(HALF_PI * (t - s)),
        time_of=lambda b: torch.atan2(b, 1 - b) / HALF_PI,
    ),
}


# ------------------------------------------------------------------------------------------------
# The noise schedule (36): how fast the path is walked. It is a law over times, in training and in the
# sampler's grid, and appears in no identity.


def argmax_accuracy(ratio, vocab_size):
    """P(argmax of x_t is the token) when beta/alpha = ratio: the integral of phi(z) Phi(z + ratio)^(V-1).

    `ratio`: float64 tensor (n,), non-negative. Trapezoid rule on 401 points of z in [-10, 10], where the
    integrand is smooth and vanishes at the ends, so that the rule is exact to rounding up to V = 1,000,000 (10,000 points agree to 4e-16).
    """
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    power = (vocab_size - 1) * torch.special.log_ndtr(z + ratio[:, None])
    return torch.trapezoid((log_density + power).exp(), z, dim=-1).clamp(max=1)


def schedule_table(kind, vocab_size, blend, curve=None):
    """Pairs (tau, b): uniform progress tau and the weight b = beta/(alpha+beta) of the data, float64 (n,), rising.

    "linear": b = tau. The others are blended with it, lambda b(tau) + (1 - lambda) tau. "argmax": P(b) = 1/V + tau (1 - 1/V).
    "calibrated": the loss of `curve`, [(b, loss), ...] as measured, falls linearly in tau up to LAST; argmax where there is none yet.
    """
    b = torch.linspace(0, 1, 2001, dtype=torch.float64)
    if kind == "linear":
        return b, b
    if curve:
        b, loss = torch.tensor([[0, curve[0][1]], *curve, [1, curve[-1][1]]], dtype=torch.float64).T
        fall = loss[0] - loss.cummin(0).values  # a measured loss rises here and there by chance
        tau = LAST * fall / fall[-1].clamp(min=1e-9)
    else:
        accuracy = argmax_accuracy(b[:-1] / (1 - b[:-1]), vocab_size)
        tau = torch.cat([(accuracy - 1 / vocab_size) / (1 - 1 / vocab_size), torch.ones(1, dtype=torch.float64)])
    tau[0], tau[-1] = 0, 1
    rising = torch.ones(len(tau), dtype=torch.bool)  # P rounds to 1 a little before b = 1: those points go
    rising[1:-1] = (tau[1:-1] > tau[:-2].cummax(0).values) & (tau[1:-1] < 1 - 1e-12)
    tau, b = tau[rising], b[rising]
    return tau, blend * b + (1 - blend) * tau


def lagged(tau, lag, L):
    """Progress of each of L positions, and its rate, when the row's is tau: (n, 1) -> two of (n, L) (38).

    Earlier positions go first: logit(tau_l) = logit(tau) - lag (l / (L - 1) - 1/2). So all start at 0 and
    end at 1 together, and the rate d tau_l / d tau stays between exp(-lag/2) and exp(lag/2).
    """
    delay = torch.exp(lag * (torch.linspace(0, 1, L, dtype=tau.dtype) - 0.5))
    below = tau + (1 - tau) * delay
    return tau / below, delay / below**2


# ------------------------------------------------------------------------------------------------
# Progress, in training and in sampling, goes no further. At t = 1 the Eulerian identity is 0/0 and the drift infinite;
# and the argmax schedule jumps there from t = 0.9 or so, so a network would have to extrapolate. At this
# progress, by the argmax schedule, the most probable token is the clean one with probability 0.9999, before any context.
LAST = 0.9999

# The network: the paper's DiT. It maps an embedded state y and two times to hidden vectors h, and
# logits are z_st = h @ head.T: the head is applied by the functions further down, in chunks.

# Where a size is known by name, it is in this table. base is the paper's 170M at V = 50,257.
SIZES = {
    "tiny": dict(layers=3, width=128, heads=4),
    "small": dict(layers=6, width=384, heads=6),
    "base": dict(layers=12, width=768, heads=12),
}
SCHEDULES = ("argmax", "linear", "calibrated")


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
    schedule_curve: list | None = None  # what a calibrated schedule was last measured as: [[b, loss], ...]


class TimeEmbedding(nn.Module):
    """Times (B, 1 or L) -> features (B, 1 or L, width). Frequencies of 1 to 8 rad per unit time.

    Smooth on purpose: the Eulerian loss takes the derivative in time, and with the usual sinusoids of
    up to 1,000 rad that derivative is noise.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, width // 2, base=2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t):
        angles = t[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t):
        return self.mlp(self.features(t))


def attention(q, k, v, causal=False, seen=None):
    """Attention of q (B, heads, L, d) to k and v (B, heads, S, d), S >= L: to all of them, or, causal, up to each query's own.

    seen: bool, broadcast to (B, heads, L, S), the keys to attend to where that is neither. The one place that
    knows which kernel to take: the fused one, but for short rows on a CPU, where a training step with it
    was measured at 1.16 times the time (L = 10, width 128).
    """
    if causal and q.shape[-2] < k.shape[-2]:  # the fused kernels' causal mask counts from the first key, ours from the last
        causal, seen = False, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    if q.device.type != "cpu" or k.shape[-2] > 32 or causal or seen is not None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=seen)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention_tangent(q, k, v, dq, dk, dv):
    """The derivative of `attention` to all keys along (dq, dk, dv), in chunks of queries: no fused kernel has it."""
    out, (B, heads, L, d) = torch.empty_like(q), q.shape
    for rows in chunks(L, B * heads * k.shape[-2]):
        weights = (q[:, :, rows] @ k.transpose(-2, -1) * d**-0.5).softmax(-1).to(v.dtype)
        scores = (dq[:, :, rows] @ k.transpose(-2, -1) + q[:, :, rows] @ dk.transpose(-2, -1)) * d**-0.5
        moved = weights * (scores - (weights * scores).sum(-1, keepdim=True))
        out[:, :, rows] = moved @ v + weights @ dv
    return out


def norm(x):
    """LayerNorm without weights over the last dimension: (y, the scale that it multiplied by)."""
    y, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
    return y, scale


def norm_tangent(y, scale, dx):
    """The derivative along dx of y, where (y, scale) = norm(x)."""
    return scale * (dx - dx.mean(-1, keepdim=True) - y * (y * dx).mean(-1, keepdim=True))


def modulate(h, shift, scale):
    """(1 + scale) h + shift, with shift and scale (B, 1 or L, D) given by the time."""
    return torch.addcmul(shift, h, 1 + scale)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, heads, L, d), pairing feature i with feature i + d/2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GeluLinear(torch.autograd.Function):
    """F.linear(gelu(x), weight, bias), the gelu computed again in the backward pass: of an MLP's two widest activations one is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        low, ctx.dtype = weight.to(x.dtype), weight.dtype  # x comes from a linear layer, in the dtype of the autocast around it
        ctx.save_for_backward(x, low)
        return F.linear(F.gelu(x, approximate="tanh"), low, bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat, act = grad.flatten(0, -2), F.gelu(x, approximate="tanh").flatten(0, -2)
        grad_weight, grad_bias = (flat.T @ act).to(ctx.dtype), flat.sum(0).to(ctx.dtype)
        del act
        return torch.ops.aten.gelu_backward(grad @ weight, x, approximate="tanh"), grad_weight, grad_bias


class Block(nn.Module):
    """Pre-norm attention and MLP, each modulated and gated by the time (adaLN-zero).

    A network of another kind is another class with this `forward`, whose tangent may be torch.func.jvp's (test_a_new_network).
    """

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.modulation = nn.Linear(config.time_width, 6 * D)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def split(self, x, cos, sin):
        """(B, L, 3 D) -> rotated queries, rotated keys, values: (B, heads, L, D / heads) each."""
        q, k, v = x.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()  # a view would keep all of x for the backward pass

    def forward(self, h, time, cos, sin, dh=None, dtime=None, before=None, causal=False, seen=None):
        """h (B, L, D) and time (B, 1 or L, time_width) -> h; with tangents dh and dtime, also h's, as (h, dh).

        before: keys and values (B, heads, c, D / heads) of a context, constants of the tangent, to attend to as well;
        seen: which keys, where not all. causal: h is of a context itself, and the answer (h, (keys, values)), with
        those before. The tangent is forward mode written out: no kernel of scaled_dot_product_attention has it, and
        PyTorch's own would record a second graph behind the tangent, which nothing ever reads.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, -1)  # (B, 1 or L, D) each
        n_a, r_a = norm(h)
        q, k, v = self.split(self.qkv(modulate(n_a, shift_a, scale_a)), cos, sin)
        if before is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        a = self.out(attention(q, k, v, causal, seen).transpose(1, 2).flatten(2))
        h_a = torch.addcmul(h, gate_a, a)
        n_m, r_m = norm(h_a)
        up = self.mlp[0](modulate(n_m, shift_m, scale_m))
        m = GeluLinear.apply(up, self.mlp[2].weight, self.mlp[2].bias)
        h_m = torch.addcmul(h_a, gate_m, m)
        if causal:
            return h_m, (k, v)
        if dh is None:
            return h_m
        with torch.no_grad():
            dshift_a, dscale_a, dgate_a, dshift_m, dscale_m, dgate_m = F.linear(dtime, self.modulation.weight).chunk(6, -1)
            dn = norm_tangent(n_a, r_a, dh)
            dx = F.linear(dn * (1 + scale_a) + torch.addcmul(dshift_a, n_a, dscale_a), self.qkv.weight)
            dq, dk, dv = self.split(dx, cos, sin)
            dk, dv = (F.pad(x, (0, 0, k.shape[2] - x.shape[2], 0)) for x in (dk, dv))  # the context does not move
            da = attention_tangent(q, k, v, dq, dk, dv).transpose(1, 2).flatten(2)
            dh = dh + dgate_a * a + gate_a * F.linear(da, self.out.weight)
            dn = norm_tangent(n_m, r_m, dh)
            dx = F.linear(dn * (1 + scale_m) + torch.addcmul(dshift_m, n_m, dscale_m), self.mlp[0].weight)
            dm = F.linear(torch.ops.aten.gelu_backward(dx, up, approximate="tanh"), self.mlp[2].weight)
            return h_m, dh + dgate_m * m + gate_m * dm


class DiT(nn.Module):
    """The diffusion transformer of the paper, with two times."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.width
        self.path = INTERPOLANTS[config.interpolant]
        self.set_schedule(config.schedule_curve)
        self.position_lag = config.position_lag

        # W. Orthogonal: for V > D, W^T W = I and the noise y0 = x0 W starts white, of unit variance.
        self.embedding = nn.Parameter(nn.init.orthogonal_(torch.empty(V, D)))
        self.time_s, self.time_t = TimeEmbedding(config.time_width), TimeEmbedding(config.time_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_modulation = nn.Linear(config.time_width, 2 * D)
        self.head = nn.Parameter(torch.zeros(V, D))
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)
        # The learned weight of the distillation loss, a function of the two times: zero at the start.
        self.loss_weight = nn.Sequential(nn.Linear(2 * config.time_width, config.time_width), nn.SiLU(), nn.Linear(config.time_width, 1))
        nn.init.zeros_(self.loss_weight[-1].weight)
        nn.init.zeros_(self.loss_weight[-1].bias)

        half = D // config.heads // 2
        angles = torch.arange(config.seq_len)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("held_factor", None, persistent=False)
        self.compiled = self.activation_checkpointing = False  # see compile_parts, and `through`

    def set_schedule(self, curve):
        """Tabulate the noise schedule: pairs of progress and time, float64, on the CPU. curve: see `schedule_table`."""
        self.config.schedule_curve = curve
        tau, b = schedule_table(self.config.schedule, self.config.vocab_size, self.config.schedule_blend, curve)
        self.schedule_tau, self.schedule_time = tau, self.path.time_of(b)

    def time(self, s, t):
        """The two times' embedding: (B, 1 or L) each -> (B, 1 or L, time_width)."""
        return F.silu(self.time_s(s) + self.time_t(t))

    def forward(self, y, s, t, context=None):
        """Hidden vectors h_st (B, L, D) of the mean denoiser psi_st = softmax(h_st @ head.T).

        y: (B, L, D), the embedded state at time s. s, t: (B, 1) or (B, L), 0 <= s <= t <= 1. context: see `given`.
        """
        h, time, (before, cos, sin, seen) = y, self.time(s, t), context or self.no_context(y)
        for block, keys in zip(self.blocks, before, strict=True):
            h = self.through(block, h, time, cos, sin, None, None, keys, False, seen)
        shift, scale = self.final_modulation(time).chunk(2, -1)
        return modulate(norm(h)[0], shift, scale)

    def through(self, block, *inputs):
        """block(*inputs); with activation_checkpointing only `inputs` are kept for the backward pass, which computes the rest again."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def derivative(self, y, s, t, dy=None, ds=None, dt=None, context=None):
        """One dual pass: h_st with its ordinary graph, and its derivative along (dy, ds, dt), without one; None is zero.

        With dy = b_s(y), ds = 1 this is D_s of the Eulerian identity (25), with dt = 1 the Lagrangian's d/dt (24).
        """
        time, (before, cos, sin, _) = self.time(s, t), context or self.no_context(y)
        with torch.no_grad():
            zeros = torch.zeros_like
            _, dtime = torch.func.jvp(self.time, (s, t), (zeros(s) if ds is None else ds, zeros(t) if dt is None else dt))
        h, dh = y, zeros(y) if dy is None else dy.to(y.dtype)
        for block, keys in zip(self.blocks, before, strict=True):
            h, dh = self.through(block, h, time, cos, sin, dh, dtime, keys)
        (n, r), (shift, scale) = norm(h), self.final_modulation(time).chunk(2, -1)
        with torch.no_grad():
            dshift, dscale = F.linear(dtime, self.final_modulation.weight).chunk(2, -1)
            dh = norm_tangent(n, r, dh) * (1 + scale) + torch.addcmul(dshift, n, dscale)
        return modulate(n, shift, scale), dh

    def log_weight(self, s, t):
        """The learned weight w(s, t) of the distillation loss exp(-w) loss + w: times (B, 1 or L) -> the same shape."""
        return self.loss_weight(torch.cat([self.time_s.features(s), self.time_t.features(t)], -1)).squeeze(-1)

    # --- clean context (section 4.2) ---

    def no_context(self, y):
        """What `forward` takes where there is none: the positions are the first ones."""
        return [None] * len(self.blocks), self.cos[: y.shape[1]], self.sin[: y.shape[1]], None

    def encode(self, tokens, positions=None, before=None):
        """The keys and values of clean tokens (B, c), at the time of data, each seeing those before it alone.

        positions: int64 (B, c), or None for the c that follow `before`, an earlier answer, to which this adds its
        own. Returns a list of (keys, values), (B, heads, c, D / heads) each, one a block; a token that comes
        later changes none of them.
        """
        start = before[0][0].shape[2] if before else 0
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        one = torch.ones(len(tokens), 1, dtype=self.embedding.dtype, device=tokens.device)
        h, time, (cos, sin), found = F.embedding(tokens, self.embedding), self.time(one, one), self.rotation(positions), []
        for block, keys in zip(self.blocks, before or [None] * len(self.blocks), strict=True):
            h, keys = self.through(block, h, time, cos, sin, None, None, keys, True)
            found.append(keys)
        return found

    def rotation(self, positions):
        """cos and sin for positions (L,) or (B, L), to be broadcast to (B, heads, L, D / heads / 2)."""
        return [table[positions].unsqueeze(-3) for table in (self.cos, self.sin)]

    def given(self, keys, positions, seen=None):
        """This network on a block of tokens that sees a context: an object to be called and used in its place.

        keys: what `encode` gave for the context, or None. positions: int64 (L,) or (B, L), those of the block.
        seen: bool (B, 1, 1, c + L), which keys of context and block a row sees, where not all.
        """
        return Given(self, keys, positions, seen)

    # --- noise, in the embedding (V-sized states are never built) ---

    @property
    def noise_size(self):
        """The length of the standard normal vector behind one token's noise.

        D where the vocabulary is large. Where V <= 2 D the V-vector itself is drawn: it is small, and
        W^T W is singular for V < D and badly conditioned just above.
        """
        V, D = self.config.vocab_size, self.config.width
        return V if V <= 2 * D else D

    def noise_factor(self):
        """C^T of shape (noise_size, D) with C C^T = W^T W, differentiably in W; the held one where there is one.

        The jitter, 1e-6 of the mean eigenvalue, adds noise far below what float32 leaves in the factor. The cost is
        4 V D^2 FLOPs a step, gradient included (119 GFLOP at the paper's size), whatever the batch; V-sized noise
        costs 4 V D a token in its product with W, so below D tokens a step that would be cheaper, above it never.
        """
        W = self.embedding
        if self.held_factor is not None or self.noise_size == len(W):
            return W if self.held_factor is None else self.held_factor
        with torch.autocast(W.device.type, enabled=False):
            half = W.T @ W.detach()  # Cholesky's gradient is symmetric: twice that of one side is that of both, for half the work
            gram = 2 * half - half.detach()
            jitter = 1e-6 * gram.diagonal().mean().detach() * torch.eye(len(gram), dtype=W.dtype, device=W.device)
            return torch.linalg.cholesky(gram + jitter).T

    def hold_noise(self):
        """Form the noise factor once, for as long as W does not change: W is frozen, or one step is under way."""
        self.held_factor = self.noise_factor().detach()

    def embed_noise(self, xi):
        """y0 = x0 W for x0 ~ N(0, I) in R^V, from xi ~ N(0, I) of shape (B, L, noise_size); (B, L, D).

        x0 W ~ N(0, W^T W) exactly, which is the law of y0 = xi C^T.
        """
        with torch.autocast(xi.device.type, enabled=False):
            return xi @ self.noise_factor()

    def interpolate(self, xi, tokens, t):
        """y_t = alpha_t x0 W + beta_t W[token] (37): tokens (B, L), t (B, 1) or (B, L) -> (B, L, D)."""
        clean = F.embedding(tokens, self.embedding)  # W[tokens], whose gradient by indexing is summed in another order each time on several threads
        return self.path.alpha(t)[..., None] * self.embed_noise(xi) + self.path.beta(t)[..., None] * clean

    def times(self, tau, L=None):
        """Uniform progress tau in [0, 1], float64 (n, 1) on the CPU -> times of the path, float64, below 1.

        (n, 1), or (n, L) where the positions lag one behind the other (38), L of them or all. Progress stops at LAST: see there.
        """
        return self.times_and_rates(tau, L)[0]

    def times_and_rates(self, tau, L=None):
        """`times`, and their rates: dt/dtau up to a factor common to the row, so that one shared time has rate 1."""
        tau = tau.clamp(0, LAST)
        if self.position_lag:
            tau, rate = lagged(tau, self.position_lag, L or self.config.seq_len)
        knots, values = self.schedule_tau, self.schedule_time
        right = torch.searchsorted(knots, tau.contiguous()).clamp(1, len(knots) - 1)
        slope = (values[right] - values[right - 1]) / (knots[right] - knots[right - 1])
        t = values[right - 1] + slope * (tau - knots[right - 1])
        if not self.position_lag:
            return t, torch.ones_like(t)
        rate = rate * slope
        return t, rate / rate.mean(-1, keepdim=True)

    def compile_parts(self, dynamic=False):
        """torch.compile every block, the same code for all of them, and what the losses do with a chunk of logits.

        dynamic: for blocks after a context, whose number of rows and positions changes from step to step.
        """
        self.compiled = "dynamic" if dynamic else "static"
        if dynamic:  # each of context or block, gradient, tangent and a single row or token is a version of its own
            torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(dynamic=dynamic)

    # --- the head, in chunks of rows ---

    def soft_embedding(self, h):
        """psi W for psi = softmax(h @ head.T): (B, L, D) -> (B, L, D), without a gradient."""
        flat, head, embedding = h.detach().flatten(0, -2), lowered(self.head), lowered(self.embedding)
        psi = maybe_compiled(probabilities, self.compiled)
        with torch.no_grad():
            out = [wide(psi(flat[rows] @ head.T) @ embedding) for rows in chunks(len(flat), len(head))]
        return torch.cat(out).view(h.shape)

    def argmax(self, h):
        """The most probable token of psi = softmax(h @ head.T): (B, L, D) -> (B, L), int64."""
        flat, head = h.detach().flatten(0, -2), lowered(self.head)
        with torch.no_grad():
            parts = [(flat[rows] @ head.T).argmax(-1) for rows in chunks(len(flat), len(head))]
        return torch.cat(parts).view(h.shape[:-1])

    def draw(self, h, temperature, u):
        """A token of psi^(1/temperature), scaled to sum to 1, where its running sum passes u: (B, L, D), (B, L) in [0, 1] -> (B, L), int64."""
        flat, head, u = h.detach().flatten(0, -2), lowered(self.head), u.flatten()
        with torch.no_grad():
            parts = [inverse(softmax(wide(flat[rows] @ head.T) / temperature), u[rows]) for rows in chunks(len(flat), len(head))]
        return torch.cat(parts).view(h.shape[:-1])


class Given:
    """A DiT with a context: see `DiT.given`. Losses, teachers and the sampler take it as they take a DiT."""

    def __init__(self, model, keys, positions, seen):
        self.model, self.positions = model, positions
        self.context = (keys or [None] * len(model.blocks), *model.rotation(positions), seen)

    def __call__(self, y, s, t):
        return self.model(y, s, t, self.context)

    def derivative(self, *args, **kwargs):
        return self.model.derivative(*args, **kwargs, context=self.context)

    def alone(self):
        """The same block of the same network, without the context."""
        return self.model.given(None, self.positions)

    def times_and_rates(self, tau):
        return self.model.times_and_rates(tau, self.positions.shape[-1])

    def times(self, tau):
        return self.times_and_rates(tau)[0]

    def __getattr__(self, name):
        return getattr(self.model, name)


def softmax(z):
    """The link between logits and the convex set on which the mean denoiser lives: here the simplex.

    For another convex set this would be the gradient of its log-partition function, and the losses
    below the Bregman divergence that goes with it; everything else would stay. The losses take its
    logarithm as z.log_softmax(-1).
    """
    return z.softmax(-1)


def probabilities(z):
    """psi from a chunk of logits, computed in at least float32, in the dtype of z."""
    return softmax(wide(z)).to(z.dtype)


def inverse(p, u):
    """The first index at which the running sum of p (n, V) exceeds u (n,) of the whole: int64 (n,)."""
    total = p.cumsum(-1)
    return torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).squeeze(1).clamp(max=p.shape[-1] - 1)


@functools.cache
def maybe_compiled(function, compiled):
    """`function`, compiled: "static", for each shape that it meets, "dynamic", for all at once, or as it is: False. Cached, so compiled once."""
    return torch.compile(function, dynamic=compiled == "dynamic") if compiled else function


# ------------------------------------------------------------------------------------------------
# Losses over a vocabulary, without logits of shape (B, L, V).


def entropy(p):
    """-sum p log p in nats, of distributions (..., V): (...)."""
    return -torch.xlogy(p, p).sum(-1)  # torch.special.entr would say it shorter, but not on every device


def wide(z):
    """At least float32: bf16 logits are widened before a softmax, float64 stays."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def lowered(x):
    """x in the dtype of the autocast around us, detached: cast once, before a loop over chunks."""
    device = x.device.type
    return x.detach().to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x.detach()


def chunks(rows, vocab_size):
    """Slices of `rows`, a power of two long: about a 32nd of the logits at once, but between 2^22 and 2^25 (128 MB in float32)."""
    elements = min(max(rows * vocab_size // 32, 1 << 22), 1 << 25)
    step = 1 << max(0, round(math.log2(elements / vocab_size)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


class Divergence(NamedTuple):
    """A loss of every row of logits: function(z, *(the same rows of each tensor in by_row), *shared).

    Given z (n, V) it returns ({"loss": (n,), "distance": (n,), ...}, g): the distance |q - p| between
    target and prediction, and g (n, V), the gradient of the loss on z.
    """

    function: Callable
    by_row: tuple = ()
    shared: tuple = ()


class HeadLoss(torch.autograd.Function):
    """sum_i scale_i w_i loss_i over rows of hidden vectors, with gradients found in the forward pass.

    Per chunk of rows: logits, divergence, its gradient g on the logits (for a cross-entropy or a
    forward KL exactly p - q), and at once g @ head and g.T @ h. Nothing of size (rows, V) survives.
    """

    @staticmethod
    def forward(ctx, h, head, scale, divergence, c, r, compiled):
        grad_h = torch.empty_like(h) if h.requires_grad else None
        grad_head = torch.zeros_like(head) if head.requires_grad else None
        low_h, low_head = lowered(h), lowered(head)
        function, by_row, shared = divergence
        function, total, reports = maybe_compiled(weighted(function, c, r), compiled), scale.new_zeros(()), []
        for rows in chunks(len(h), len(head)):
            loss, report, g = function(low_h[rows] @ low_head.T, scale[rows], *(x[rows] for x in by_row), *shared)
            total += loss
            reports.append(report)
            if grad_h is not None:
                grad_h[rows] = g @ low_head
            if grad_head is not None:
                if g.dtype == grad_head.dtype:
                    grad_head.addmm_(g.T, low_h[rows])
                else:
                    grad_head += g.T @ low_h[rows]
        ctx.found = grad_h, grad_head
        reports = {name: torch.cat([report[name] for report in reports]) for name in reports[0]}
        ctx.mark_non_differentiable(*reports.values())
        return total, tuple(reports), *reports.values()

    @staticmethod
    def backward(ctx, grad, *_):
        (grad_h, grad_head), ctx.found = ctx.found, None  # once: they are scaled in place, not copied
        return *(found if found is None else found.mul_(grad) for found in (grad_h, grad_head)), None, None, None, None, None


@functools.cache
def weighted(function, c, r):
    """All that HeadLoss does with a chunk between its matrix products: (z, scale, ...) -> (sum of losses, report, g in z's dtype)."""

    def chunk(z, scale, *inputs):
        report, g = function(wide(z), *inputs)
        adaptive = (report["distance"].square() + c) ** -r  # (45): w = (|q - p|^2 + c)^-r
        weight = scale * adaptive
        report["weighted"] = adaptive * report["loss"]
        return (weight * report["loss"]).sum(), report, g.mul_(weight[:, None]).to(z.dtype)

    return chunk


def head_loss(h, head, scale, divergence, c, r, compiled=False):
    """The sum of scale_i w_i loss_i, and a report per row, from hidden vectors h (N, D) and a head (V, D).

    scale: (N,), constants. divergence: a `Divergence`. w_i is the adaptive weight (45),
    (distance_i^2 + c)^-r, detached. Returns a scalar, differentiable in h and head, and
    {name: (N,)}: "loss", unweighted, "weighted" (w_i loss_i), and whatever else the divergence reports.
    """
    total, names, *reports = HeadLoss.apply(h, head, scale, divergence, c, r, compiled)
    return total, dict(zip(names, reports, strict=True))


def cross_entropy(z, tokens):
    """The diagonal's divergence: -log psi(token) (22), for tokens (n,)."""
    log_p, target = z.log_softmax(-1), tokens[:, None]
    loss = -log_p.gather(-1, target).squeeze(-1)
    g = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(loss)[:, None])
    return {"loss": loss, "distance": torch.linalg.vector_norm(g, dim=-1)}, g


# The others are made from a function of the student's logits, teacher(z, *inputs). They are cached, for
# torch.compile to see one function, not a new one each step.


@functools.cache
def kl(teacher):
    """KL(q || psi) (27, 31, 35), for a teacher that returns (q of shape (n, V), {name: (n,)})."""

    def divergence(z, *inputs):
        q, report = teacher(z, *inputs)
        log_p, own = z.log_softmax(-1), entropy(q)
        loss = -own - torch.linalg.vecdot(q, log_p)
        g = log_p.exp_().sub_(q)
        return report | {"loss": loss, "distance": torch.linalg.vector_norm(g, dim=-1), "teacher_entropy": own}, g

    return divergence


@functools.cache
def reverse_kl(teacher):
    """KL(psi || q), the same with its two sides exchanged; the gradient on the logits is psi (log psi - log q - KL)."""

    def divergence(z, *inputs):
        q, report = teacher(z, *inputs)
        log_p = z.log_softmax(-1)
        p, ratio = log_p.exp(), log_p - q.clamp(min=torch.finfo(q.dtype).tiny).log()
        loss, distance = torch.linalg.vecdot(p, ratio), torch.linalg.vector_norm(p - q, dim=-1)
        return report | {"loss": loss, "distance": distance, "teacher_entropy": entropy(q)}, p * (ratio - loss[:, None])

    return divergence


@functools.cache
def square(teacher):
    """|q - psi|^2 / 2, as on a space without the simplex's geometry; the gradient on the logits is psi (d - <psi, d>), d = psi - q."""

    def divergence(z, *inputs):
        q, report = teacher(z, *inputs)
        p = softmax(z)
        d = p - q
        distance = torch.linalg.vector_norm(d, dim=-1)
        g = p.mul_(d - torch.linalg.vecdot(p, d)[:, None])
        return report | {"loss": distance.square() / 2, "distance": distance, "teacher_entropy": entropy(q)}, g

    return divergence


DIVERGENCES = {"kl": kl, "reverse-kl": reverse_kl, "square": square}


@functools.cache
def signed(residual):
    """A target that need not be a distribution, from residual(z, *inputs) -> (p - q of shape (n, V), {name: (n,)}).

    The gradient on the logits is p - q, as for the KL. A q with negative entries has no KL: the loss
    that is reported, and that a learned weight sees, is |p - q|^2 / 2.
    """

    def divergence(z, *inputs):
        g, report = residual(z, *inputs)
        distance = torch.linalg.vector_norm(g, dim=-1)
        return report | {"loss": distance.square() / 2, "distance": distance}, g

    return divergence


# ------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, step, row of the global batch), so that the number of ranks, of
# micro-batches and of samples at once changes no number, and resuming needs no saved generator.


class Draw:
    """The random numbers of some rows of one step's global batch.

    rows: int array (n,), indices into the global batch. Each call draws fresh numbers; the same
    sequence of calls gives a row the same numbers whoever asks, and whatever rows come with it.
    """

    def __init__(self, seed, step, rows, device, calls=0):
        self.seed, self.step, self.rows, self.device, self.calls = seed, step, np.asarray(rows), device, calls
        self.generator = torch.Generator(device=device)

    def part(self, mask):
        """The same draw for the rows where the bool array `mask` (n,) holds."""
        return Draw(self.seed, self.step, self.rows[mask], self.device, self.calls)

    def normal(self, *shape):
        """Standard normals, float32 (n, *shape) on the device."""
        self.calls += 1
        out = torch.empty(len(self.rows), *shape, device=self.device)
        for row, index in zip(out, self.rows.tolist(), strict=True):
            state = np.random.SeedSequence([self.seed, self.step, self.calls, index]).generate_state(1, np.uint64)[0]
            self.generator.manual_seed(int(state >> np.uint64(1)))
            torch.randn(shape, generator=self.generator, device=self.device, out=row)
        return out

    def shared(self):
        """One uniform in [0, 1), a float, the same for all rows of the step."""
        self.calls += 1
        return float(np.random.default_rng([self.seed, self.step, self.calls]).random())

    def uniform(self, k):
        """k uniforms a row, float64 (n, k) on the CPU, of low discrepancy over any run of rows.

        A Kronecker sequence: frac(offset + row a_j), a_j = phi^-(j+1) with phi^(k+1) = phi + 1 (the
        golden ratio for k = 1), and an offset drawn anew each step, so each number is uniform alone.
        """
        self.calls += 1
        offset = np.random.default_rng([self.seed, self.step, self.calls]).random(k)
        phi = 2.0
        for _ in range(64):
            phi = (1 + phi) ** (1 / (k + 1))
        return torch.from_numpy((offset + self.rows[:, None] * phi ** -(1.0 + np.arange(k))) % 1)


# ------------------------------------------------------------------------------------------------
# Checkpoints: one file of tensors and plain builtins.


def build_model(config):
    """A DiT from a ModelConfig or from the dict in a checkpoint."""
    return DiT(config if isinstance(config, ModelConfig) else ModelConfig(**config))


def read_checkpoint(path):
    """The dict that a training stage wrote: model, ema, optimizer, step, model_config, meta, args; on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train one with train_diagonal.py or distill.py, or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"model": dict, "ema": dict, "optimizer": dict, "step": int, "model_config": dict, "meta": dict, "args": dict}
        missing = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
        json.dumps([checkpoint.get(key) for key in ("model_config", "meta", "args")])  # plain builtins, or TypeError
    except Exception as error:  # a damaged or foreign file fails in zipfile, pickle or torch, each in its own way
        raise UserError(f"{path} is not a checkpoint of this project ({type(error).__name__}); train one anew or name another") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it has another checksum than when it was written; take an older one")
    missing = missing or ["args.data"] * (not isinstance(checkpoint["args"].get("data"), str))
    if fault := f"it lacks {', '.join(missing)}" if missing else meta_fault(checkpoint["meta"]):
        raise UserError(f"{path} is not a checkpoint of this project: {fault}; name another")
    return checkpoint


def load_model(path, device="cpu", ema=True):
    """A model ready for inference and the checkpoint's dict: (DiT in eval mode on `device`, dict).

    ema: take the averaged weights (the ones to sample from) rather than the last ones.
    Raises UserError for a file that is absent, damaged, foreign, or does not fit its own config.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = build_model(checkpoint["model_config"])
        model.load_state_dict(checkpoint["ema" if ema else "model"], strict=True)
    except Exception as error:  # a config that is not ours fails in its own way
        raise UserError(f"{path} does not fit its own model_config: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite; take an older one")
    return model.to(device).eval().requires_grad_(False), checkpoint


def config_dict(model):
    """The model's configuration as plain builtins, for a checkpoint."""
    return {key: value for key, value in asdict(model.config).items() if value is not None}


# ------------------------------------------------------------------------------------------------
# Where to run: the flags that every program with a network shares.


def machine_flags(group):
    """--device and --dtype, shared by every program that runs the network."""
    group.add_argument("--device", choices=["cuda", "cpu", "mps"], help="default: cuda where there is one, else cpu; mps is written for and untried")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="of matrix products (default: bfloat16 on cuda)")


def resolve_machine(args):
    """Fill in the defaults that depend on the machine; UserError for a device that is not there."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[args.device]:
        raise UserError(f"--device {args.device}: there is none on this machine; try --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
