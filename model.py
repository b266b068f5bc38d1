"""The model, the flow and the noise: everything that both training stages and the sampler share.

Top to bottom: the path from noise to data (Interpolant), how fast it is walked (the schedule), the
network (DiT, with noise drawn in its embedding), losses over the vocabulary in chunks (head_loss),
randomness (Draw), checkpoints.

Notation (equation numbers are those of Discrete Flow Maps, arXiv 2604.09784):
    B rows, L positions, V tokens, D model width
    time 0 is noise, time 1 is data, and 0 <= s <= u <= t <= 1
    x0 noise, x1 data (one-hot), x_t = alpha_t x0 + beta_t x1: shape (B, L, V), not built (only
        for a small vocabulary, V <= 2 D, is the noise drawn at that size)
    y = x W, shape (B, L, D): the only form in which the network sees x; W is `model.embedding`
    psi_st = softmax(z_st): the mean denoiser, a distribution over V tokens at each position
    times are tensors (B, 1), one for each row, or (B, L), one for each position
"""

import contextlib
import functools
import hashlib
import math
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

# ------------------------------------------------------------------------------------------------
# The interpolant x_t = alpha_t x0 + beta_t x1 (37, 47).


class Interpolant(NamedTuple):
    """A path between noise and data, and the coefficients of its flow.

    Xi, lambda, omega, C and kappa are ratios of alpha and of two combinations that stay finite at
    both ends:

        Delta_st = alpha_s beta_t - alpha_t beta_s        linear path: t - s
        Wr_t     = alpha_t beta'_t - alpha'_t beta_t      linear path: 1      (the Wronskian)

    With r = beta / alpha, the ratio of signal to noise:
    Delta_st = alpha_s alpha_t (r_t - r_s) and Wr_t = alpha_t^2 r'_t. A path must have Wr_t > 0 for
    t < 1: ESD divides by Wr_s, LSD by Wr_t.
    All methods act elementwise on tensors of times in [0, 1].
    """

    alpha: Callable
    beta: Callable
    d_alpha: Callable
    d_beta: Callable
    delta: Callable  # Delta_st, without subtracting nearly equal products
    time_of: Callable  # b in [0, 1] -> the time t at which beta_t / alpha_t = b / (1 - b)

    def wronskian(self, t):
        """Wr_t = alpha_t beta'_t - alpha'_t beta_t."""
        return self.alpha(t) * self.d_beta(t) - self.d_alpha(t) * self.beta(t)

    def Gamma(self, s, t):
        """Gamma_st = alpha_t / alpha_s (50), for s < 1."""
        return self.alpha(t) / self.alpha(s)

    def Xi(self, s, t):
        """Xi_st = beta_t - Gamma_st beta_s = Delta_st / alpha_s (50), for s < 1."""
        return self.delta(s, t) / self.alpha(s)

    def ell(self, t):
        """ell_t = alpha'_t / alpha_t (52), for t < 1."""
        return self.d_alpha(t) / self.alpha(t)

    def lam(self, t):
        """lambda_t = beta'_t - beta_t alpha'_t / alpha_t = Wr_t / alpha_t (52), for t < 1."""
        return self.wronskian(t) / self.alpha(t)

    def omega(self, s, u, t):
        """Semigroup weight omega = Gamma_ut Xi_su / Xi_st (23, 64), for s < t and u < 1."""
        return self.alpha(t) * self.delta(s, u) / (self.alpha(u) * self.delta(s, t))

    def C(self, s, t):
        """Lagrangian factor C = Xi_st / lambda_t (24, 68), for s < 1."""
        return self.alpha(t) * self.delta(s, t) / (self.alpha(s) * self.wronskian(t))

    def eulerian(self, s, t):
        """The pair (Gamma_st, Gamma_st / kappa), 1/kappa = Xi_st / (Gamma_st lambda_s) (25, 70).

        The logit form (33) needs 1 - delta / kappa, up to a factor. Multiplied by Gamma_st it is
        finite at t = 1, where kappa is 0. For s < 1; linear path: (1 - t)/(1 - s) and t - s.
        """
        return self.Gamma(s, t), self.delta(s, t) / self.wronskian(s)

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
# The noise schedule (36): how fast the path is walked. It decides which times are drawn in training
# and which the sampler visits. The identities do not contain it, except that positions with times
# of their own move at different rates (distill.Jump). "Progress" tau in [0, 1] is uniform; the
# schedule turns it into a time.

# Training and sampling stop at this progress, because at t = 1 the Eulerian teacher is 0/0 and the
# drift's coefficients are infinite. Under the argmax schedule, argmax x_t at this progress is the
# clean token with probability 0.9999 or more.
LAST = 0.9999


def argmax_accuracy(ratio, vocab_size):
    """P(argmax of x_t is the clean token) = integral of phi(z) Phi(z + ratio)^(V-1) dz.

    ratio: beta/alpha, a non-negative float64 tensor (n,). The trapezoid rule on 401 points is exact
    to rounding up to V = 1,000,000, because the integrand is smooth and vanishes at both ends.
    """
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    log_power = (vocab_size - 1) * torch.special.log_ndtr(z + ratio[:, None])
    return torch.trapezoid((log_density + log_power).exp(), z, dim=-1).clamp(max=1)


def schedule_table(kind, vocab_size, blend):
    """Knots (tau, b) of the schedule, two float64 tensors (n,), both rising from 0 to 1.

    tau is progress and b = beta / (alpha + beta). "linear" is b = tau. "argmax" makes the accuracy
    of the argmax grow linearly, P(b) = 1/V + tau (1 - 1/V), and is then blended with the linear
    schedule: blend * b(tau) + (1 - blend) * tau.
    """
    b = torch.linspace(0, 1, 2001, dtype=torch.float64)
    if kind == "linear":
        return b, b
    accuracy = argmax_accuracy(b[:-1] / (1 - b[:-1]), vocab_size)
    tau = (accuracy - 1 / vocab_size) / (1 - 1 / vocab_size)
    tau = torch.cat([tau, torch.ones(1, dtype=torch.float64)])
    tau[0] = 0
    # The accuracy rounds to 1 a little before b = 1: keep only knots where tau still rises.
    rising = torch.ones(len(tau), dtype=torch.bool)
    rising[1:-1] = (tau[1:-1] > tau[:-2].cummax(0).values) & (tau[1:-1] < 1 - 1e-12)
    tau, b = tau[rising], b[rising]
    return tau, blend * b + (1 - blend) * tau


def lagged(tau, lag, L):
    """Progress of each of L positions, and its rate, when the row's progress is tau (38).

    Earlier positions go first: logit(tau_l) = logit(tau) - lag (l / (L - 1) - 1/2), our choice. All
    positions start at 0 and end at 1 together, and d tau_l / d tau stays within exp(+-lag/2).
    tau: (n, 1). Returns two tensors (n, L).
    """
    delay = torch.exp(lag * (torch.linspace(0, 1, L, dtype=tau.dtype) - 0.5))
    denominator = tau + (1 - tau) * delay
    return tau / denominator, delay / denominator**2


# ------------------------------------------------------------------------------------------------
# The network: the paper's DiT. It maps an embedded state y and two times to hidden vectors h.
# Logits are z_st = h @ head.T, computed in chunks further down.

SIZES = {
    "tiny": dict(layers=3, width=128, heads=4),
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


class TimeEmbedding(nn.Module):
    """Times (B, 1 or L) -> features (B, 1 or L, width).

    Frequencies of 1 to 8 rad per unit time. Smooth on purpose: the Eulerian loss takes the
    derivative in time, and with the usual sinusoids of up to 1,000 rad that derivative is noise.
    """

    def __init__(self, width):
        super().__init__()
        frequencies = torch.logspace(0, 3, width // 2, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t):
        angles = t[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t):
        return self.mlp(self.features(t))


def attention(q, k, v, causal=False):
    """Attention of queries (B, heads, L, d) to keys and values (B, heads, S, d), S >= L.

    causal: a query sees its own position and earlier ones; the queries are the last L of S.
    """
    L = q.shape[-2]
    S = k.shape[-2]
    if causal and L < S:  # the fused causal mask aligns with the first key, ours with the last
        seen = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    if q.device.type != "cpu" or S > 32 or causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # For short rows on a CPU the fused kernel makes a training step 16% slower (L = 10).
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention_tangent(q, k, v, dq, dk, dv):
    """Derivative of `attention` (not causal) along (dq, dk, dv): no fused kernel provides it.

    Computed in chunks of queries, so the (L, S) weights are never held whole.
    """
    B, heads, L, d = q.shape
    out = torch.empty_like(q)
    for rows in chunks(L, B * heads * k.shape[-2]):
        weights = (q[:, :, rows] @ k.transpose(-2, -1) * d**-0.5).softmax(-1).to(v.dtype)
        d_scores = dq[:, :, rows] @ k.transpose(-2, -1) + q[:, :, rows] @ dk.transpose(-2, -1)
        d_scores = d_scores * d**-0.5
        d_weights = weights * (d_scores - (weights * d_scores).sum(-1, keepdim=True))
        out[:, :, rows] = d_weights @ v + weights @ dv
    return out


def norm(x):
    """LayerNorm without weights over the last dimension: (y, the scale it multiplied by)."""
    y, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
    return y, scale


def norm_tangent(y, scale, dx):
    """Derivative of y along dx, where (y, scale) = norm(x)."""
    return scale * (dx - dx.mean(-1, keepdim=True) - y * (y * dx).mean(-1, keepdim=True))


def modulate(h, shift, scale):
    """(1 + scale) h + shift; shift and scale (B, 1 or L, D) come from the time."""
    return torch.addcmul(shift, h, 1 + scale)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, heads, L, d), pairing feature i with feature i + d/2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GeluLinear(torch.autograd.Function):
    """F.linear(gelu(x), weight, bias), whose backward pass computes the gelu again.

    So of an MLP's two widest activations only one is kept: a quarter of a step's peak memory.
    (torch.utils.checkpoint does the same, but made a small network's step 4% slower.)
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        low_weight = weight.to(x.dtype)  # x is in the precision of the autocast around us
        ctx.save_for_backward(x, low_weight)
        ctx.weight_dtype = weight.dtype
        return F.linear(F.gelu(x, approximate="tanh"), low_weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        act = F.gelu(x, approximate="tanh").flatten(0, -2)
        grad_weight = (flat.T @ act).to(ctx.weight_dtype)
        grad_bias = flat.sum(0).to(ctx.weight_dtype)
        del act  # before the next product allocates a tensor of its size
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x, approximate="tanh")
        return grad_x, grad_weight, grad_bias


class Block(nn.Module):
    """Pre-norm attention and MLP, each modulated and gated by the time (adaLN-zero).

    To use another block, write a class with three methods and name it in `DiT.__init__`: `forward`;
    `dual`, with the derivative, for LSD and ESD (torch.func.jvp will do if no fused kernel is in
    the way); and `encode`, for clean contexts. Under --context h has fewer than seq_len positions.
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), gelu, nn.Linear(4 * D, D))
        self.modulation = nn.Linear(config.time_width, 6 * D)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def split(self, x, rotary):
        """(B, L, 3 D) -> rotated queries, rotated keys, values, each (B, heads, L, D / heads)."""
        q, k, v = x.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # v is copied: as a view it would keep all of x alive until the backward pass.
        return rotate(q, *rotary), rotate(k, *rotary), v.contiguous()

    def trace(self, h, time, rotary, before=None, causal=False):
        """The forward pass: (h, (keys, values), other intermediate values, for `dual`)."""
        modulation = self.modulation(time).chunk(6, -1)  # (B, 1 or L, D) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        n_a, r_a = norm(h)
        q, k, v = self.split(self.qkv(modulate(n_a, shift_a, scale_a)), rotary)
        if before is not None:
            k = torch.cat([before[0], k], 2)
            v = torch.cat([before[1], v], 2)
        a = self.out(attention(q, k, v, causal).transpose(1, 2).flatten(2))
        h = torch.addcmul(h, gate_a, a)
        n_m, r_m = norm(h)
        up = self.mlp[0](modulate(n_m, shift_m, scale_m))
        m = GeluLinear.apply(up, self.mlp[2].weight, self.mlp[2].bias)
        h = torch.addcmul(h, gate_m, m)
        return h, (k, v), (modulation, n_a, r_a, q, a, n_m, r_m, up, m)

    def forward(self, h, time, rotary, before=None):
        """h (B, L, D), time (B, 1 or L, time_width), rotary (cos, sin) -> h (B, L, D).

        before: keys and values (B, heads, c, D / heads) of a clean context to attend to as well.
        """
        return self.trace(h, time, rotary, before)[0]

    def encode(self, h, time, rotary, before=None):
        """The causal pass over a clean context: (h, (keys, values)), with those of `before`."""
        h, keys, _ = self.trace(h, time, rotary, before, causal=True)
        return h, keys

    def dual(self, h, dh, time, dtime, rotary, before=None):
        """`forward` with its ordinary autograd graph, and its derivative along (dh, dtime).

        Forward mode, written out: the fused attention kernels have none, and torch.func.jvp would
        also record an autograd graph of the tangent, which we never use. The context `before` is a
        constant of the derivative. Returns (h, dh).
        """
        out, (k, v), kept = self.trace(h, time, rotary, before)
        modulation, n_a, r_a, q, a, n_m, r_m, up, m = kept
        with torch.no_grad():
            _, scale_a, gate_a, _, scale_m, gate_m = modulation
            d_modulation = F.linear(dtime, self.modulation.weight)
            dshift_a, dscale_a, dgate_a, dshift_m, dscale_m, dgate_m = d_modulation.chunk(6, -1)
            dn = norm_tangent(n_a, r_a, dh)
            dx = dn * (1 + scale_a) + torch.addcmul(dshift_a, n_a, dscale_a)
            dq, dk, dv = self.split(F.linear(dx, self.qkv.weight), rotary)
            context = k.shape[2] - dk.shape[2]  # its keys and values do not move
            dk = F.pad(dk, (0, 0, context, 0))
            dv = F.pad(dv, (0, 0, context, 0))
            da = attention_tangent(q, k, v, dq, dk, dv).transpose(1, 2).flatten(2)
            dh = dh + dgate_a * a + gate_a * F.linear(da, self.out.weight)
            dn = norm_tangent(n_m, r_m, dh)
            dx = dn * (1 + scale_m) + torch.addcmul(dshift_m, n_m, dscale_m)
            dup = F.linear(dx, self.mlp[0].weight)
            dact = torch.ops.aten.gelu_backward(dup, up, approximate="tanh")
            dh = dh + dgate_m * m + gate_m * F.linear(dact, self.mlp[2].weight)
        return out, dh


class DiT(nn.Module):
    """The paper's diffusion transformer, with two times."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.width
        self.path = INTERPOLANTS[config.interpolant]
        knots, b = schedule_table(config.schedule, V, config.schedule_blend)
        self.schedule_tau = knots  # float64, on the CPU
        self.schedule_time = self.path.time_of(b)

        # W. Orthogonal: for V > D, W^T W = I, so the noise y0 = x0 W starts with unit variance.
        self.embedding = nn.Parameter(nn.init.orthogonal_(torch.empty(V, D)))
        self.time_s = TimeEmbedding(config.time_width)
        self.time_t = TimeEmbedding(config.time_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_modulation = nn.Linear(config.time_width, 2 * D)
        self.head = nn.Parameter(torch.zeros(V, D))
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)
        # The learned weight of the distillation loss, a function of the two times.
        self.loss_weight = nn.Sequential(
            nn.Linear(2 * config.time_width, config.time_width),
            nn.SiLU(),
            nn.Linear(config.time_width, 1),
        )
        nn.init.zeros_(self.loss_weight[-1].weight)
        nn.init.zeros_(self.loss_weight[-1].bias)

        half = D // config.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(config.seq_len)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("held_factor", None, persistent=False)  # see `hold_noise`
        self.compiled = False  # or "static", "dynamic": see `compile_parts`
        self.activation_checkpointing = False

    def time(self, s, t):
        """Embedding of two times (B, 1 or L): (B, 1 or L, time_width)."""
        return F.silu(self.time_s(s) + self.time_t(t))

    def call(self, method, *inputs):
        """method(*inputs) of a block; under activation checkpointing only the inputs are kept."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recompute(method, *inputs, use_reentrant=False, preserve_rng_state=False)
        return method(*inputs)

    def forward(self, y, s, t, context=None):
        """Hidden vectors h_st (B, L, D) of the mean denoiser psi_st = softmax(h_st @ head.T).

        y: (B, L, D), the embedded state at time s. s, t: (B, 1) or (B, L), 0 <= s <= t <= 1.
        context: None for whole rows, or a pair (keys, rotary): for each block of the network the
        keys and values of a clean context, or None, and cos and sin of the positions of y.
        """
        h = y
        time = self.time(s, t)
        keys, rotary = context or self.no_context(y)
        for block, before in zip(self.blocks, keys, strict=True):
            h = self.call(block.forward, h, time, rotary, before)
        shift, scale = self.final_modulation(time).chunk(2, -1)
        return modulate(norm(h)[0], shift, scale)

    def derivative(self, y, s, t, dy=None, ds=None, dt=None, context=None):
        """One dual pass: (h_st with its graph, its derivative along (dy, ds, dt) without one).

        None is a zero tangent. With dy = b_s(y) and ds = 1 this is D_s of the Eulerian identity
        (25); with dt = 1 it is d/dt of the Lagrangian identity (24). Logits are linear in h, so the
        head turns the derivative of h into that of the logits.
        """
        zeros = torch.zeros_like
        time = self.time(s, t)
        with torch.no_grad():
            tangents = (zeros(s) if ds is None else ds, zeros(t) if dt is None else dt)
            _, dtime = torch.func.jvp(self.time, (s, t), tangents)
        h = y
        dh = zeros(y) if dy is None else dy.to(y.dtype)
        keys, rotary = context or self.no_context(y)
        for block, before in zip(self.blocks, keys, strict=True):
            h, dh = self.call(block.dual, h, dh, time, dtime, rotary, before)
        n, r = norm(h)
        shift, scale = self.final_modulation(time).chunk(2, -1)
        with torch.no_grad():
            dshift, dscale = F.linear(dtime, self.final_modulation.weight).chunk(2, -1)
            dh = norm_tangent(n, r, dh) * (1 + scale) + torch.addcmul(dshift, n, dscale)
        return modulate(n, shift, scale), dh

    def log_weight(self, s, t):
        """Learned weight w(s, t) of the loss exp(-w) loss + w: times (B, 1 or L) -> same shape."""
        features = torch.cat([self.time_s.features(s), self.time_t.features(t)], -1)
        return self.loss_weight(features).squeeze(-1)

    # --- clean contexts (section 4.2) ---

    def rotation(self, positions):
        """cos and sin of positions (L,) or (B, L), to broadcast to (B, heads, L, D / heads / 2)."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)

    def no_context(self, y):
        """The `context` of whole rows: no keys, the first L positions."""
        L = y.shape[1]
        return [None] * len(self.blocks), (self.cos[:L], self.sin[:L])

    def encode(self, tokens, positions=None, before=None):
        """Keys and values of clean tokens (B, c) at time 1, each seeing only earlier ones.

        Returns a list of (keys, values), each (B, heads, c, D / heads), one pair per block.
        before: an earlier result; the new tokens come after it and the result includes it.
        positions: int64 (B, c); if absent, the c positions that follow `before`.
        """
        if positions is None:
            start = before[0][0].shape[2] if before else 0
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        one = torch.ones(len(tokens), 1, dtype=self.embedding.dtype, device=tokens.device)
        h = F.embedding(tokens, self.embedding)
        time = self.time(one, one)
        rotary = self.rotation(positions)
        found = []
        for block, earlier in zip(self.blocks, before or [None] * len(self.blocks), strict=True):
            h, keys = self.call(block.encode, h, time, rotary, earlier)
            found.append(keys)
        return found

    def given(self, keys, positions):
        """This network on a block of tokens that follows or surrounds a clean context.

        keys: what `encode` returned for the context, or None. positions: int64 (L,) or (B, L),
        those of the block. Losses, teachers and the sampler take the result as they take a DiT.
        """
        return Conditional(self, keys, positions)

    # --- noise, in the embedding ---

    @property
    def noise_size(self):
        """Length of the standard normal vector behind one token's noise.

        D for a large vocabulary. For V <= 2 D the V-vector itself is drawn: it is small, and
        W^T W is singular for V < D and badly conditioned just above.
        """
        V, D = self.config.vocab_size, self.config.width
        return V if V <= 2 * D else D

    def noise_factor(self):
        """R of shape (noise_size, D) with R^T R = W^T W, differentiable in W.

        The jitter, 1e-6 of the mean eigenvalue, changes the factor by a few float32 roundings.
        R costs 4 V D^2 FLOPs once a step (119 GFLOP at the paper's size, gradient included).
        Drawing V normals for each token would cost 4 V D FLOPs a token instead.
        """
        W = self.embedding
        if self.held_factor is not None:
            return self.held_factor
        if self.noise_size == len(W):
            return W
        with torch.autocast(W.device.type, enabled=False):
            # W^T W is symmetric: differentiate one factor and double it, half the work.
            half = W.T @ W.detach()
            gram = 2 * half - half.detach()
            jitter = 1e-6 * gram.diagonal().mean().detach()
            eye = torch.eye(len(gram), dtype=W.dtype, device=W.device)
            return torch.linalg.cholesky(gram + jitter * eye).T

    def hold_noise(self):
        """Compute the noise factor once, for as long as W does not change."""
        self.held_factor = self.noise_factor().detach()

    def embed_noise(self, xi):
        """y0 = x0 W for x0 ~ N(0, I) in R^V, from xi ~ N(0, I) of shape (B, L, noise_size).

        x0 W ~ N(0, W^T W), which is the law of xi R. Returns (B, L, D).
        """
        with torch.autocast(xi.device.type, enabled=False):
            return xi @ self.noise_factor()

    def interpolate(self, xi, tokens, t):
        """y_t = alpha_t x0 W + beta_t W[token] (37): tokens (B, L), t (B, 1 or L) -> (B, L, D)."""
        # F.embedding: the gradient of plain indexing is summed in random order on several threads.
        clean = F.embedding(tokens, self.embedding)
        noise = self.embed_noise(xi)
        return self.path.alpha(t)[..., None] * noise + self.path.beta(t)[..., None] * clean

    # --- times ---

    def times(self, tau, L=None):
        """Progress tau in [0, 1], float64 (n, 1) on the CPU -> times of the path, float64, below 1.

        (n, 1); or (n, L) if positions lag behind each other (38). L: positions (default: seq_len).
        """
        return self.times_and_rates(tau, L)[0]

    def times_and_rates(self, tau, L=None):
        """`times`, and dt/dtau scaled to a mean of 1 over the row; one shared time has rate 1."""
        tau = tau.clamp(0, LAST)
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
            low_embedding = lowered(self.embedding)
            psi_of = maybe_compiled(probabilities, self.compiled)
            parts = [wide(psi_of(z) @ low_embedding) for _, z in logit_chunks(h, self.head)]
        return torch.cat(parts).view(h.shape)

    def compile_parts(self, dynamic=False):
        """torch.compile the blocks, which share their code, and the losses' work on a chunk.

        dynamic: for blocks after a context, whose sizes change from step to step.
        """
        self.compiled = "dynamic" if dynamic else "static"
        if dynamic:  # each mix of context, gradient, tangent and size-1 dimensions is a version
            torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            for name in ("forward", "dual", "encode"):
                method = torch.compile(getattr(block, name), dynamic=dynamic)
                setattr(block, name, method)


class Conditional:
    """A DiT with a clean context: see `DiT.given`. Everything else is the network's own."""

    def __init__(self, model, keys, positions):
        self.model = model
        self.positions = positions
        keys = keys or [None] * len(model.blocks)
        self.context = (keys, model.rotation(positions))

    def __call__(self, y, s, t):
        return self.model(y, s, t, self.context)

    def derivative(self, *args, **kwargs):
        return self.model.derivative(*args, **kwargs, context=self.context)

    def alone(self):
        """The same block of the same network without the context, for guidance."""
        return Conditional(self.model, None, self.positions)

    def times_and_rates(self, tau):
        return self.model.times_and_rates(tau, self.positions.shape[-1])

    def times(self, tau):
        return self.times_and_rates(tau)[0]

    def __getattr__(self, name):
        return getattr(self.model, name)


# ------------------------------------------------------------------------------------------------
# Losses over a vocabulary, without logits of shape (B, L, V).


def softmax(z):
    """psi from logits, in at least float32: an average of posteriors (58) is on the simplex."""
    return wide(z).softmax(-1)


def wide(z):
    """At least float32: low-precision logits are widened before a softmax, float64 stays."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def lowered(x):
    """x detached, in the dtype of the autocast around us: cast once, before a loop over chunks."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.detach().to(torch.get_autocast_dtype(device))
    return x.detach()


def probabilities(z):
    """`softmax` in the dtype of z."""
    return softmax(z).to(z.dtype)


def chunks(rows, width):
    """Slices of `rows` for a (rows, width) tensor of temporary values.

    All but the last are a power of two long. A chunk has about a 32nd of the tensor, but about 2^22
    values at least, to keep a device busy, and about 2^25 (128 MB in float32) at most.
    """
    elements = min(max(rows * width // 32, 1 << 22), 1 << 25)
    step = 1 << max(0, round(math.log2(elements / width)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def logit_chunks(h, head):
    """Yield (rows, logits (n, V)) for hidden vectors h (..., D), rows being a slice of them all."""
    flat = lowered(h).flatten(0, -2)
    low_head = lowered(head)
    for rows in chunks(len(flat), len(head)):
        yield rows, flat[rows] @ low_head.T


@functools.cache
def maybe_compiled(function, compiled):
    """`function`, compiled unless `compiled` is False. Cached, so that it is compiled once.

    "static" compiles for each shape it is called with, "dynamic" for all shapes at once.
    """
    return torch.compile(function, dynamic=compiled == "dynamic") if compiled else function


class Divergence(NamedTuple):
    """A loss on each row of logits: function(z, *rows of the tensors in by_row, *shared).

    For z (n, V) it returns a report {"loss": (n,), "distance": (n,), ...} and g (n, V), the
    gradient on z to descend. The distance is |q - p| between target and prediction. by_row and
    shared, with the heads passed there, are constants: gradients reach only what makes z.
    """

    function: Callable
    by_row: tuple = ()
    shared: tuple = ()


class HeadLoss(torch.autograd.Function):
    """sum_i scale_i w_i loss_i over rows of hidden vectors, with gradients found on the way.

    For each chunk of rows: logits, divergence, its gradient g on the logits (for a cross-entropy or
    a forward KL exactly p - q), and at once g @ head and g.T @ h. No (rows, V) tensor survives.
    """

    @staticmethod
    def forward(ctx, h, head, scale, divergence, c, r, compiled):
        grad_h = torch.empty_like(h) if h.requires_grad else None
        grad_head = torch.zeros_like(head) if head.requires_grad else None
        low_h = lowered(h)
        low_head = lowered(head)
        loss_of = maybe_compiled(weighted(divergence.function, c, r), compiled)
        total = scale.new_zeros(())
        reports = []
        for rows in chunks(len(h), len(head)):
            inputs = (x[rows] for x in divergence.by_row)
            z = low_h[rows] @ low_head.T
            loss, report, g = loss_of(z, scale[rows], *inputs, *divergence.shared)
            total += loss
            reports.append(report)
            if grad_h is not None:
                grad_h[rows] = g @ low_head
            if grad_head is not None and g.dtype == grad_head.dtype:
                grad_head.addmm_(g.T, low_h[rows])  # without a temporary (V, D)
            elif grad_head is not None:
                grad_head += g.T @ low_h[rows]
        ctx.found = grad_h, grad_head
        columns = {name: torch.cat([report[name] for report in reports]) for name in reports[0]}
        ctx.mark_non_differentiable(*columns.values())
        return total, tuple(columns), *columns.values()

    @staticmethod
    def backward(ctx, grad, *_):
        grad_h, grad_head = ctx.found
        ctx.found = None  # scaled in place, not copied, so this works only once
        grad_h = None if grad_h is None else grad_h.mul_(grad)
        grad_head = None if grad_head is None else grad_head.mul_(grad)
        return grad_h, grad_head, None, None, None, None, None


@functools.cache  # so that torch.compile sees the same function at every step
def weighted(function, c, r):
    """What HeadLoss does with a chunk between its matrix products.

    (z, scale, *inputs) -> (weighted sum of losses, report, gradient on z in the dtype of z).
    """

    def chunk(z, scale, *inputs):
        report, g = function(wide(z), *inputs)
        adaptive = (report["distance"].square() + c) ** -r  # (45): w = (|q - p|^2 + c)^-r
        weight = scale * adaptive
        report["weighted"] = adaptive * report["loss"]
        total = (weight * report["loss"]).sum()
        return total, report, g.mul_(weight[:, None]).to(z.dtype)

    return chunk


def head_loss(h, head, scale, divergence, c, r, compiled=False):
    """sum_i scale_i w_i loss_i, and a report per row, from hidden vectors h (N, D), head (V, D).

    scale: (N,), constants. divergence: a `Divergence`. w_i = (distance_i^2 + c)^-r is the adaptive
    weight (45), a constant of the gradient. Returns a scalar, differentiable in h and head, and
    {name: (N,)}: "loss" unweighted, "weighted" (w_i loss_i), and what the divergence reports.
    """
    total, names, *columns = HeadLoss.apply(h, head, scale, divergence, c, r, compiled)
    return total, dict(zip(names, columns, strict=True))


def entropy(p):
    """-sum p log p in nats of distributions (..., V): (...)."""
    return -torch.xlogy(p, p).sum(-1)


# ------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, step, row of the global batch). The number of ranks, of
# micro-batches and of samples at once changes no number, and resuming needs no saved generator.


class Draw:
    """The random numbers of some rows of one step's global batch.

    rows: int array (n,), indices into the global batch. Each call draws fresh numbers. The same
    sequence of calls gives a row the same numbers, whichever rows are drawn with it.
    """

    def __init__(self, seed, step, rows, device, calls=0):
        self.seed = seed
        self.step = step
        self.rows = np.asarray(rows)
        self.device = device
        self.calls = calls
        self.generator = torch.Generator(device=device)

    def part(self, mask):
        """The same draw for the rows where the bool array `mask` (n,) is true."""
        return Draw(self.seed, self.step, self.rows[mask], self.device, self.calls)

    def normal(self, *shape):
        """Standard normals, float32 (n, *shape) on the device."""
        self.calls += 1
        out = torch.empty(len(self.rows), *shape, device=self.device)
        for row, index in zip(out, self.rows.tolist(), strict=True):
            sequence = np.random.SeedSequence([self.seed, self.step, self.calls, index])
            state = sequence.generate_state(1, np.uint64)[0]
            self.generator.manual_seed(int(state >> np.uint64(1)))
            torch.randn(shape, generator=self.generator, device=self.device, out=row)
        return out

    def shared(self):
        """One uniform in [0, 1), a float, the same for all rows of the step."""
        self.calls += 1
        return float(np.random.default_rng([self.seed, self.step, self.calls]).random())

    def uniform(self, k):
        """k uniforms for each row, float64 (n, k) on the CPU, of low discrepancy over the rows.

        A Kronecker sequence: frac(offset + row a_j), a_j = phi^-(j+1), phi^(k+1) = phi + 1 (the
        golden ratio for k = 1). The offset is new each step, so each number alone is uniform.
        """
        self.calls += 1
        offset = np.random.default_rng([self.seed, self.step, self.calls]).random(k)
        phi = 2.0
        for _ in range(64):  # fixed-point iteration for phi
            phi = (1 + phi) ** (1 / (k + 1))
        powers = phi ** -(1.0 + np.arange(k))
        return torch.from_numpy((offset + self.rows[:, None] * powers) % 1)


# ------------------------------------------------------------------------------------------------
# Checkpoints: runs/NAME/checkpoint-STEP.pt, a dict of tensors and plain builtins.

CHECKPOINT_KEYS = {"model", "ema", "optimizer", "step", "model_config", "meta", "args"}


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Open a file to write that appears at `path` only when it is complete and on disk."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name is on disk before anyone deletes an older file
    os.close(folder)


def step_of(path):
    """The step in a name checkpoint-STEP.pt; -1 for other names."""
    step = path.stem.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def checkpoints(folder):
    """The checkpoints in a run's folder, newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*.pt") if step_of(path) >= 0]
    return sorted(paths, key=step_of, reverse=True)


def save_checkpoint(folder, content, keep):
    """Write folder/checkpoint-STEP.pt and delete all but the newest `keep` checkpoints.

    Raises SystemExit, with the earlier checkpoints untouched, if the disk is full or the weights
    are not finite.
    """
    step = content["step"]
    path = Path(folder) / f"checkpoint-{step}.pt"
    weights = [*content["model"].values(), *content["ema"].values()]
    if not torch.stack([w.isfinite().all() for w in weights]).all():
        raise SystemExit(f"weights are not finite at step {step}: --resume with a lower --lr")
    try:
        with replacing(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into RuntimeError
        reason = str(error).splitlines()[0]
        raise SystemExit(f"cannot write {path}: {reason}; make room, then --resume") from None
    # A newer checkpoint here can only be a corrupt one, which --resume skipped.
    older = [p for p in checkpoints(folder) if step_of(p) < step]
    for old in older[keep - 1 :]:
        old.unlink()


def read_checkpoint(path):
    """The dict that a training stage wrote, on the CPU. path: a checkpoint, or a run's folder.

    In a folder the newest checkpoint that can be read is taken. Raises SystemExit if none can.
    """
    path = Path(path)
    reasons = []
    for candidate in checkpoints(path) if path.is_dir() else [path]:
        try:
            with zipfile.ZipFile(candidate) as archive:
                damaged = archive.testzip()  # compares checksums, which torch.load does not
            if damaged:
                raise ValueError(f"{damaged} in it does not match its checksum")
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
            missing = CHECKPOINT_KEYS - checkpoint.keys()
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except Exception as error:  # zipfile, zlib, pickle and torch fail in their own ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reasons.append(f"{candidate} cannot be read ({reason})")
            continue
        if reasons:
            print(f"{'; '.join(reasons)}; taking {candidate}", file=sys.stderr)
        return checkpoint
    found = "; ".join(reasons) or f"no checkpoint-STEP.pt in {path}"
    raise SystemExit(f"{found}; train one, or name another checkpoint or run folder")


def load_model(path, device="cpu"):
    """(DiT with the averaged weights, in eval mode on `device`; the checkpoint's dict).

    path: a checkpoint or a run's folder. Raises SystemExit if it does not fit its own config.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = DiT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["ema"], strict=True)
    except (TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"{path} does not fit its own model_config: {reason}") from None
    return model.to(device).eval().requires_grad_(False), checkpoint


def weights_digest(state):
    """A sha256 of the tensors in a state dict, to tell whether two networks are the same."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def machine_flags(parser):
    """Add --device and --dtype, which every program with a network has."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["cuda", "cpu", "mps"], help="default: cuda if available, else cpu")
    help = "of matrix products (default: bfloat16 on cuda, else float32)"
    add("--dtype", choices=["float32", "bfloat16"], help=help)


def resolve_machine(args):
    """Fill in the defaults of `machine_flags`; SystemExit if the device is absent."""
    cuda = torch.cuda.is_available()
    available = {"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    args.device = args.device or ("cuda" if cuda else "cpu")
    if not available[args.device]:
        raise SystemExit(f"--device {args.device}: not available here; try --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
