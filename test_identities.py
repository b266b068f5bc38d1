"""The mathematics against closed forms, in float64 on the CPU.

The oracle is a language of a few weighted sequences. Its posterior given x_t is a softmax over the
sequences, so the denoiser is exact, the flow follows by integration, and psi_st from both its
definitions. It answers the same calls as model.DiT, with W the identity, so the project's own losses,
teachers and sampler run on it unchanged.
"""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import distill
import sample
import train_diagonal
from evaluate import diagonal_errors, likelihood_bound
from model import (
    DIVERGENCES,
    INTERPOLANTS,
    LAST,
    DiT,
    Divergence,
    Draw,
    GeluLinear,
    Interpolant,
    ModelConfig,
    argmax_accuracy,
    attention,
    attention_tangent,
    cross_entropy,
    head_loss,
    lagged,
    maybe_compiled,
    schedule_table,
)
from prepare_data import grammar, grammar_entropy, grammar_log_prob, grammar_longest, grammar_rows, grammar_words, pack
from sample import generate

torch.set_num_threads(1)  # small tensors; the other core has tests of its own
PATHS = sorted(INTERPOLANTS)
V, L = 5, 3
SEQUENCES = torch.tensor([[0, 1, 2], [0, 3, 4], [1, 1, 4], [2, 0, 2]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LAGS = [0.0, 1.5]  # one time for all positions, and each its own (38)


class Oracle:
    """Exact psi_st of the weighted sequences; y is x itself, and h_st = log psi_st with the identity as head.

    Its schedule is linear: a row's progress tau is its time, and with a lag position l's time is
    model.lagged(tau). All times of a row lie on that curve, along which the flow is integrated.
    """

    def __init__(self, path, lag=0.0, steps=80, sequences=SEQUENCES, weights=WEIGHTS):
        self.path, self.lag, self.steps, self.log_weights = INTERPOLANTS[path], lag, steps, weights.log()
        self.one_hot = torch.nn.functional.one_hot(sequences).double()  # (K, L, V)
        self.head = self.embedding = torch.eye(self.one_hot.shape[-1], dtype=torch.float64)

    def times_and_rates(self, tau):
        """(B, 1) -> two of (B, 1), or of (B, L) with a lag."""
        return lagged(tau, self.lag, self.one_hot.shape[1]) if self.lag else (tau, torch.ones_like(tau))

    def times(self, tau):
        return self.times_and_rates(tau)[0]

    def progress(self, t):
        """The inverse of `times`, from the first position's."""
        first = t[:, :1]
        return first / (first + (1 - first) * math.exp(self.lag / 2))

    def denoiser(self, x, t):
        """E[x1 | x_t = x] (21): the posterior over sequences, one signal-to-noise weight a position."""
        ratio = self.path.beta(t) / self.path.alpha(t) ** 2  # (B, 1 or L)
        evidence = torch.einsum("blv,klv->blk", x, self.one_hot) * ratio[..., None]
        posterior = (self.log_weights + evidence.sum(1)).softmax(-1)  # (B, K)
        return torch.einsum("bk,klv->blv", posterior, self.one_hot)

    def flow(self, x, s, t):
        """X_st by Runge-Kutta on dx/dtau = (dt/dtau) b_t(x) (52), on a grid of progress that is fine near its end."""
        start, end = self.progress(s), self.progress(t)

        def slope(k, x):
            tau, dtau = end - (end - start) * (1 - k) ** 2, 2 * (end - start) * (1 - k) / self.steps
            u, rate = self.times_and_rates(tau)
            return (rate * dtau)[..., None] * self.path.drift(x, self.denoiser(x, u), u)

        for k in range(self.steps):
            k1 = slope(k / self.steps, x)
            k2 = slope((k + 0.5) / self.steps, x + k1 / 2)
            k3 = slope((k + 0.5) / self.steps, x + k2 / 2)
            k4 = slope((k + 1) / self.steps, x + k3)
            x = x + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return x

    def psi(self, x, s, t):
        """psi_st = (X_st - Gamma_st x) / Xi_st (50), solved for psi; the denoiser where s = t."""
        if bool((t == s).all()):
            return self.denoiser(x, s)
        return (self.flow(x, s, t) - self.path.Gamma(s, t)[..., None] * x) / self.path.Xi(s, t)[..., None]

    def jump(self, s, u, t):
        """The distill.Jump between three columns of progress."""
        return distill.Jump.between(self, s, u, t)

    def __call__(self, y, s, t):
        return self.psi(y, s, t).clamp(min=1e-300).log()

    def derivative(self, y, s, t, dy=None, ds=None, dt=None):
        """DiT.derivative, by reverse mode twice: forward mode is ten times slower here, it takes zero tangents of constants through Python."""
        tangents = tuple(torch.zeros_like(a) if da is None else da for a, da in ((y, dy), (s, ds), (t, dt)))
        return torch.autograd.functional.jvp(self, (y, s, t), tangents)

    def soft_embedding(self, h):
        return h.softmax(-1)

    @property
    def noise_size(self):
        return len(self.embedding)

    def noise_factor(self):
        return self.embedding

    def interpolate(self, xi, tokens, t):
        return self.path.alpha(t)[..., None] * (xi @ self.embedding) + self.path.beta(t)[..., None] * self.embedding[tokens]


class Embedded(Oracle):
    """The exact posterior given y = x W alone, for a W of shape (V, D) with D < V."""

    def __init__(self, W, **more):
        super().__init__("linear", **more)
        self.embedding, self.whiten = W, torch.linalg.inv(torch.linalg.cholesky(W.T @ W)).T  # C^{-T}, C C^T = W^T W

    def denoiser(self, y, t):
        r, Q = (self.path.beta(t) / self.path.alpha(t))[..., None], self.embedding @ self.whiten
        seen = (y @ self.whiten / self.path.alpha(t)[..., None])[:, None] - r[:, None] * (self.one_hot @ Q)  # (B, K, L, D): the noise, if k it was
        posterior = (self.log_weights - seen.square().sum((-1, -2)) / 2).softmax(-1)
        return torch.einsum("bk,klv->blv", posterior, self.one_hot)


class GrammarOracle(Oracle):
    """The exact posterior of the embedded grammar, by the forward-backward recursion over its automaton."""

    def __init__(self):
        states, words = [*grammar(), None], grammar_words()
        self.path, self.lag, self.arcs = INTERPOLANTS["linear"], 0.0, torch.zeros(len(states), len(words), len(states), dtype=torch.float64)
        for state, out in {**grammar(), None: {words[0]: (1.0, None)}}.items():  # after the end, padding
            for word, (share, after) in out.items():
                self.arcs[states.index(state), words.index(word), states.index(after)] = share
        self.head = self.embedding = torch.eye(len(words), dtype=torch.float64)

    def denoiser(self, x, t):
        evidence = (x * (self.path.beta(t) / self.path.alpha(t) ** 2)[..., None]).softmax(-1)  # (B, L, V), up to a factor
        steps = [torch.einsum("svz,bv->bsz", self.arcs, e) for e in evidence.unbind(1)]
        ahead, behind = (
            [torch.eye(len(self.arcs), dtype=x.dtype)[:1].expand(len(x), -1)],
            [torch.eye(len(self.arcs), dtype=x.dtype)[-1:].expand(len(x), -1)],
        )
        for step in steps[:-1]:
            ahead.append(torch.nn.functional.normalize(torch.einsum("bs,bsz->bz", ahead[-1], step), 1))
        for step in steps[:0:-1]:
            behind.append(torch.nn.functional.normalize(torch.einsum("bz,bsz->bs", behind[-1], step), 1))
        found = [
            torch.einsum("bs,svz,bz,bv->bv", *terms) for terms in zip(ahead, [self.arcs] * len(steps), behind[::-1], evidence.unbind(1), strict=True)
        ]
        return torch.nn.functional.normalize(torch.stack(found, 1), 1, dim=-1)


def states(path, s, count=6, seed=0):
    """x_s drawn from the interpolant, (count, L, V), for times s (count, 1 or L)."""
    g = torch.Generator().manual_seed(seed)
    x1 = Oracle(path).one_hot[torch.multinomial(WEIGHTS, count, replacement=True, generator=g)]
    x0 = torch.randn(x1.shape, generator=g, dtype=torch.float64)
    return INTERPOLANTS[path].alpha(s)[..., None] * x0 + INTERPOLANTS[path].beta(s)[..., None] * x1


def column(*values):
    """Times (n, 1), float64."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


S, U, T = column(0.0, 0.05, 0.2, 0.3, 0.5, 0.6), column(0.3, 0.2, 0.3, 0.5, 0.51, 0.7), column(0.8, 0.5, 0.9, 0.6, 0.52, 0.9)


# ------------------------------------------------------------------------------------------------
# The interpolant, the flow and the identities.


@pytest.mark.parametrize("path", PATHS)
def test_coefficients(path):
    """Gamma, Xi, lambda, ell of (50, 52) from alpha and beta by automatic differentiation, and the ends alpha_0 = beta_1 = 1."""
    p = INTERPOLANTS[path]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(p.alpha(ends), ends.flip(0), atol=1e-15)
    assert torch.allclose(p.beta(ends), ends, atol=1e-15)
    (_, da), (_, db) = (torch.func.jvp(f, (U,), (torch.ones_like(U),)) for f in (p.alpha, p.beta))
    assert torch.allclose(p.d_alpha(U), da)
    assert torch.allclose(p.d_beta(U), db)
    r = lambda t: p.beta(t) / p.alpha(t)  # noqa: E731
    _, dr = torch.func.jvp(r, (U,), (torch.ones_like(U),))
    assert torch.allclose(p.Xi(S, T), p.beta(T) - p.Gamma(S, T) * p.beta(S))
    assert torch.allclose(p.wronskian(U) / p.alpha(U), p.alpha(U) * dr)  # lambda_t = alpha_t r'_t
    assert torch.allclose(p.omega(S, U, T), (r(U) - r(S)) / (r(T) - r(S)))
    a, b = p.eulerian(S, T)
    _, dr_s = torch.func.jvp(r, (S,), (torch.ones_like(S),))
    assert torch.allclose(a, p.Gamma(S, T))
    assert torch.allclose(b / a, (r(T) - r(S)) / dr_s)  # 1 / kappa
    _, dr_t = torch.func.jvp(r, (T,), (torch.ones_like(T),))
    assert torch.allclose(p.C(S, T), (r(T) - r(S)) / dr_t)
    assert torch.allclose(p.lam(U), db - p.beta(U) * da / p.alpha(U))
    assert torch.allclose(p.ell(U), da / p.alpha(U))
    assert torch.allclose(r(p.time_of(U)), U / (1 - U))
    x, psi = torch.randn(2, 6, L, V, dtype=torch.float64)
    expected = (da / p.alpha(U))[..., None] * x + (db - p.beta(U) * da / p.alpha(U))[..., None] * psi  # ell x + lambda psi
    assert torch.allclose(p.drift(x, psi, U), expected)


def test_linear_forms():
    """The linear path's forms at the right of (18), (23), (43), (52)."""
    p = INTERPOLANTS["linear"]
    assert torch.allclose(p.omega(S, U, T), (U - S) * (1 - T) / ((T - S) * (1 - U)))
    a, b = p.eulerian(S, T)
    assert torch.allclose(a / (1 - S), (1 - T) / (1 - S) ** 2)
    assert torch.allclose(b, T - S)
    assert torch.allclose(p.C(S, T), (T - S) * (1 - T) / (1 - S))
    x, psi = torch.randn(2, 6, L, V, dtype=torch.float64)
    s, t = S[..., None], T[..., None]
    assert torch.allclose(p.flow_map(x, psi, S, T), (1 - t) / (1 - s) * x + (t - s) / (1 - s) * psi)
    assert torch.allclose(p.drift(x, psi, S), (psi - x) / (1 - s))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
def test_mean_denoiser(path, lag):
    """psi_st is the average of psi_uu along the trajectory, uniform in r (58), and lies on the simplex."""
    oracle = Oracle(path, lag, steps=150)
    s, t = oracle.times(S), oracle.times(T)
    x, p = states(path, s), oracle.path
    r = lambda t: p.beta(t) / p.alpha(t)  # noqa: E731
    nodes, weights = (torch.from_numpy(v)[:, None, None] for v in np.polynomial.legendre.leggauss(40))  # (40, 1, 1) on [-1, 1]
    u, rate = oracle.times_and_rates((S + (T - S) * (nodes + 1) / 2).flatten(0, 1))  # all nodes in one batch
    x_u = oracle.flow(x.repeat(40, 1, 1), s.repeat(40, 1), u)
    dr = rate * p.wronskian(u) / p.alpha(u) ** 2 * (T - S).repeat(40, 1)  # of r along the curve, position by position
    share = (weights / 2).expand(40, 6, 1).flatten(0, 1) * dr / (r(t) - r(s)).repeat(40, 1)
    mean = (share[..., None] * oracle.denoiser(x_u, u)).view(40, 6, L, V).sum(0)
    psi = oracle.psi(x, s, t)
    assert torch.allclose(psi, mean, atol=1e-7)
    assert psi.min() > -1e-9
    assert torch.allclose(psi.sum(-1), torch.ones(6, L, dtype=torch.float64))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
def test_identities(path, lag):
    """(23), (24), (25) as they stand, to 1e-8: omega, C and kappa from r, derivatives by central differences of the true map."""
    oracle = Oracle(path, lag, steps=250)
    (s, ds), (u, _), (t, dt) = (oracle.times_and_rates(tau) for tau in (S[1:4], U[1:4], T[1:4]))
    x, p, step = states(path, s, 3), oracle.path, 1e-3
    r = lambda t: p.beta(t) / p.alpha(t)  # noqa: E731
    dr = lambda t: p.wronskian(t) / p.alpha(t) ** 2  # noqa: E731
    psi, X_su = oracle.psi(x, s, t), oracle.flow(x, s, u)
    omega = ((r(u) - r(s)) / (r(t) - r(s)))[..., None]
    assert (psi - omega * oracle.psi(x, s, u) - (1 - omega) * oracle.psi(X_su, u, t)).abs().max() < 1e-8

    def difference(f):
        """The derivative of f at 0, to fourth order: f takes shifts of progress (12, 1), for 4 copies of the 3 rows."""
        shifts = torch.tensor([1.0, -1, 2, -2], dtype=torch.float64).repeat_interleave(3)[:, None] * step
        a, b, c, d = f(shifts).view(4, 3, L, V)
        return (8 * (a - b) - (c - d)) / (12 * step)

    s4, t4, x4 = s.repeat(4, 1), t.repeat(4, 1), x.repeat(4, 1, 1)

    C = (r(t) - r(s)) / (dr(t) * dt)  # the rate: d/dt is along the progress
    d_t = difference(lambda shift: oracle.psi(x4, s4, oracle.times(T[1:4].repeat(4, 1) + shift)))
    X_st = oracle.flow(x, s, t)
    assert (psi - oracle.denoiser(X_st, t) + C[..., None] * d_t).abs().max() < 1e-8

    def along(shift):
        moved = oracle.times(S[1:4].repeat(4, 1) + shift)
        return oracle.psi(oracle.flow(x4, s4, moved), moved, t4)

    kappa = dr(s) * ds / (r(t) - r(s))
    assert (difference(along) - kappa[..., None] * (psi - oracle.denoiser(x, s))).abs().max() < 1e-8


def on_rows(divergence, z):
    """What a Divergence gives for the logits z of all rows."""
    return divergence.function(z, *divergence.by_row, *divergence.shared)


def taught(oracle, loss, form, x, jump):
    """(student's psi_st, target q) of a teacher of distill.py on the oracle, (rows, V) each; q from the gradient p - q."""
    h, divergence = distill.TEACHERS[loss](oracle, oracle, x, jump, SimpleNamespace(target=form, divergence="kl", clamp=1e-5))
    psi = h.flatten(0, 1).exp()
    _, g = on_rows(divergence, h.flatten(0, 1))
    return psi, psi - g


# PSD's target is a distribution as it is; those of LSD and ESD have two forms, see distill.corrected
FORMS = [("psd", "logit"), ("lsd", "logit"), ("lsd", "signed"), ("esd", "logit"), ("esd", "signed")]


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_teacher_returns_the_truth(path, loss, form, lag):
    """At the true flow map each teacher of distill.py gives back psi_st: (23, 64), (24, 29, 68) and (25, 33, 43, 70)."""
    oracle = Oracle(path, lag)
    scale = 0.5 if (loss, form) == ("lsd", "logit") else 1  # see the next test
    jump = oracle.jump(S * scale, U * scale, T * scale)
    x = states(path, jump.s)
    psi, q = taught(oracle, loss, form, x, jump)
    truth = oracle.psi(x, jump.s, jump.t).flatten(0, 1)
    assert torch.allclose(psi, truth)
    assert (q - truth).abs().max() < 1e-6


def test_lagrangian_logit_form_loses_settled_mass():
    """Why LSD has a signed form: the log's argument in (29) is psi_tt / psi_st, which vanishes for a token that time t has ruled out.

    psi_st keeps the mass that such a token had on the way; 0/0 does not. Where rounding or the clamp rules,
    the target misses about that mass, and what it misses is a token whose argument is below the clamp.
    """
    oracle = Oracle("linear")
    jump = oracle.jump(column(0.0), column(0.3), column(0.8))
    x = states("linear", jump.s, 1)
    psi, q = taught(oracle, "lsd", "logit", x, jump)
    psi_tt = oracle.denoiser(oracle.flow(x, jump.s, jump.t), jump.t).flatten(0, 1)
    lost = psi_tt < 1e-5 * psi
    assert (q - psi).abs().max() > 1e-3
    assert ((psi - q)[lost] > -1e-6).all()
    assert (psi - q)[lost].sum() == pytest.approx(float((q - psi)[~lost].sum()), abs=1e-6)
    assert (taught(oracle, "lsd", "signed", x, jump)[1] - psi).abs().max() < 1e-6


@pytest.mark.parametrize(("path", "lag"), [("linear", 0.0), ("trigonometric", 1.5)])
@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_teacher_near_the_end(path, loss, form, lag):
    """The same for s -> t and for t -> 1, where the plain forms lose their digits."""
    s, u, t = column(0.3, 0.3, 0.5), column(0.30005, 0.6, 0.7), column(0.3001, 0.99, 0.999)
    if (loss, form) == ("lsd", "logit"):
        s, u, t = s[:1], u[:1], t[:1]  # see the test above
    oracle = Oracle(path, lag, steps=150)
    jump = oracle.jump(s, u, t)
    x = states(path, jump.s, len(s))
    truth = oracle.psi(x, jump.s, jump.t).flatten(0, 1)
    assert (taught(oracle, loss, form, x, jump)[1] - truth).abs().max() < 1e-6


def test_sampler_on_the_oracle():
    """With the true flow map, any number of steps lands where the fine integration of the flow lands (18)."""
    oracle = Oracle("linear", steps=250)
    tau, b = schedule_table("argmax", V, 0.9)
    oracle.times = lambda q: torch.from_numpy(np.interp(q, tau, b)) * 0.995  # the flow is integrated up to, not into, its end
    oracle.embed_noise = lambda xi: xi
    oracle.argmax = lambda h: h.argmax(-1)
    xi = torch.randn(64, L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = [generate(oracle, xi, nfe) for nfe in (1, 3)]
    assert torch.equal(*tokens)
    known = (tokens[0][:, None] == SEQUENCES).all(-1)  # (64, K)
    assert known.any(1).all()
    euler = generate(oracle, xi, 256, euler=True)
    assert (euler == tokens[0]).all(-1).float().mean() > 0.95


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_renoising_on_the_oracle(gamma):
    """With the true flow map, jumping past t and renoising back to it keeps the law of the language, at any gamma."""
    oracle = Oracle("trigonometric", steps=60)
    oracle.times = lambda q: q * 0.99
    oracle.embed_noise = lambda xi: xi
    oracle.argmax = lambda h: h.argmax(-1)
    g = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(4000, L, V, dtype=torch.float64, generator=g)  # noqa: E731
    xi = normal()
    known = (generate(oracle, xi, 4, gamma=gamma, normal=normal)[:, None] == SEQUENCES).all(-1).double()
    assert ((known.mean(0) - WEIGHTS).abs() < 4 * (WEIGHTS * (1 - WEIGHTS) / 4000).sqrt()).all()
    same = (known * (generate(oracle, xi, 4)[:, None] == SEQUENCES).all(-1)).sum(-1).mean()
    assert same < 0.8  # the fresh noise decides with the first


def test_temperature_and_sigma():
    """psi = softmax(z / T) in the jump, and a start of sigma x0, written out for two evaluations."""
    oracle = Oracle("linear", steps=60)
    oracle.times = lambda q: q * 0.99
    oracle.embed_noise = lambda xi: xi
    oracle.argmax = lambda h: h.argmax(-1)
    xi = torch.randn(500, L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, t, end = (torch.full((500, 1), time, dtype=torch.float64) for time in (0, 0.99 / 2, 0.99))
    psi = oracle.psi(2 * xi, s, t).clamp(min=1e-300) ** (1 / 0.7)
    y = (1 - t)[..., None] * 2 * xi + t[..., None] * psi / psi.sum(-1, keepdim=True)
    assert torch.equal(generate(oracle, xi, 2, temperature=0.7, sigma=2.0), oracle.psi(y, t, end).argmax(-1))
    assert not torch.equal(generate(oracle, xi, 2, sigma=2.0), generate(oracle, xi, 2, temperature=0.1, sigma=2.0))
    assert not torch.equal(generate(oracle, xi, 2), generate(oracle, xi, 2, sigma=2.0))


def test_final_temperature():
    """A token is drawn from psi^(1/T) scaled to sum to 1: its share of an even grid of u is its probability; near T = 0 the most probable one."""
    model, generator = small_model(), torch.Generator().manual_seed(0)
    h = torch.randn(1, 1, 16, dtype=torch.float64, generator=generator)
    n, logits = 50_000, (h @ model.head.T).squeeze().detach()
    u = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    for temperature in (0.5, 1, 3):
        share = model.draw(h.expand(n, -1, -1), temperature, u).flatten().bincount(minlength=40) / n
        assert torch.allclose(share.double(), (logits / temperature).softmax(-1), atol=1.5 / n)
    xi = torch.randn(200, 5, model.noise_size, dtype=torch.float64, generator=generator)
    normal = lambda: torch.randn(xi.shape, dtype=torch.float64, generator=generator)  # noqa: E731
    most_probable = generate(model, xi, 2)
    assert torch.equal(generate(model, xi, 2, final_temperature=1e-6, normal=normal), most_probable)
    once, again = (generate(model, xi, 2, final_temperature=1.0, normal=normal) for _ in range(2))
    assert not torch.equal(once, again)
    assert 0.5 < (once != most_probable).double().mean() < 1


# ------------------------------------------------------------------------------------------------
# The likelihood bound.


@pytest.fixture
def bound_by_sequence(monkeypatch):
    """A function of an oracle: its mean bounds {channel: (K, sequences)} over 2,000 rows of each sequence, drawn all at once, r up to 9."""

    def draw(seed, step, rows, device):
        g = torch.Generator().manual_seed(step)
        return SimpleNamespace(normal=lambda *shape: torch.randn(len(rows), *shape, generator=g, dtype=torch.float64))

    def bound(oracle):
        oracle.times = lambda q: Oracle.times(oracle, q * 0.9)
        sequences = oracle.one_hot.argmax(-1).numpy()
        _, _, bounds = likelihood_bound(oracle, np.repeat(sequences, 2000, 0), 0, 8000)
        return {name: values.reshape(-1, len(sequences), 2000).mean(-1) for name, values in bounds.items()}

    monkeypatch.setattr("evaluate.Draw", draw)
    return bound


ENTROPY = -(WEIGHTS * WEIGHTS.log()).sum().item()


@pytest.mark.parametrize(("path", "lag"), [("linear", 0.0), ("trigonometric", 1.5)])
def test_bound_of_the_exact_denoiser(bound_by_sequence, path, lag):
    """int r E|x1 - psi|^2 dr + E[CE]: above the entropy for every r*, within 1% of it at the best, and at the last -log p of each sequence."""
    bound = bound_by_sequence(Oracle(path, lag))
    assert np.abs(bound["full"] - bound["embedded"]).max() < 1e-9  # W = I
    mean = bound["full"] @ WEIGHTS.numpy()
    assert 0.99 * ENTROPY < mean.min() < 1.01 * ENTROPY  # an estimate, so it may fall a little below
    assert mean[0] > 1.1 * ENTROPY  # r* near 0: the positions' own entropies, summed
    assert np.abs(bound["full"][-1] + WEIGHTS.log().numpy()).max() < 0.03


def test_bound_of_a_wrong_denoiser(bound_by_sequence):
    """The exact denoiser of other weights q: the bound becomes -log q, and exceeds the entropy by KL(p || q)."""
    bound = bound_by_sequence(Oracle("linear", weights=torch.full((4,), 0.25, dtype=torch.float64)))["full"]
    assert np.abs(bound[-1] - math.log(4)).max() < 0.03


def test_bound_in_the_embedding(bound_by_sequence):
    """psi given y = x W: in the channel of y, Q = W C^{-T}, within 1% of the entropy; with Q = I above it still, and looser."""
    bound = bound_by_sequence(Embedded(torch.randn(V, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))))
    seen, full = bound["embedded"] @ WEIGHTS.numpy(), bound["full"] @ WEIGHTS.numpy()
    assert 0.995 * ENTROPY < seen.min() < 1.01 * ENTROPY
    assert full.min() > 1.03 * ENTROPY


def test_bound_of_the_grammar():
    """With the grammar's exact posterior, the bound is -log p of the rows within 1%."""
    oracle, rows = GrammarOracle(), grammar_rows(128, 0)
    oracle.times = lambda q: q * 0.9
    source = -np.mean([grammar_log_prob(row) for row in rows])
    _, _, bounds = likelihood_bound(oracle, rows, 0, 128)
    assert bounds["full"].mean(1).min() == pytest.approx(source, rel=0.01)
    assert source == pytest.approx(grammar_entropy(), rel=0.05)


def test_bound_of_a_network():
    """On a DiT with V > 2 D: finite, the same in batches of any size; |v Q|^2 is v W N^+ W^T v, written out, and below |v|^2."""
    model, tokens = small_model(), np.random.default_rng(0).integers(0, 40, (5, 5))
    torch.nn.init.normal_(model.embedding)
    model.hold_noise()
    (_, ce, a), (_, _, b) = (likelihood_bound(model, tokens, 0, batch_size, points=8) for batch_size in (5, 2))
    assert all(np.allclose(a[name], b[name]) for name in a)
    assert (ce < a["embedded"]).all()
    assert (a["embedded"] < a["full"]).all()
    h, x1 = torch.randn(2, 5, 16, dtype=torch.float64), torch.from_numpy(tokens[:2])
    W, miss = model.embedding.detach(), (h @ model.head.T).softmax(-1) - torch.nn.functional.one_hot(x1, 40)
    factor = model.noise_factor()
    ours = diagonal_errors(model, h, x1, torch.linalg.inv(factor))  # N = factor^T factor, so N^+ = factor^-1 factor^-T
    assert torch.allclose(ours[1], torch.einsum("blv,vw,blw->bl", miss, W @ torch.linalg.pinv(W.T @ W) @ W.T, miss), rtol=1e-4)
    assert torch.allclose(ours[2], miss.square().sum(-1))
    assert torch.allclose(ours[0], torch.nn.functional.cross_entropy((h @ model.head.T).transpose(1, 2), x1, reduction="none"))


# ------------------------------------------------------------------------------------------------
# Losses.


def plain_loss(h, head, scale, q, c, r, kind):
    """The weighted KL(q || p), p = softmax(h head^T), or KL(p || q), or |q - p|^2 / 2, written out, with the weight detached."""
    p = (h @ head.T).softmax(-1)
    w = ((q - p).square().sum(-1) + c) ** -r
    a, b = (p, q) if kind == "reverse-kl" else (q, p)
    loss = (q - p).square() / 2 if kind == "square" else torch.xlogy(a, a) - a * b.log()
    return (scale * w.detach() * loss.sum(-1)).sum()


@pytest.mark.parametrize("kind", ["cross_entropy", *DIVERGENCES])
def test_head_loss(kind, monkeypatch):
    """The chunked loss equals the plain one, value and gradients, to 1e-9; the KL's logit gradient is q - p."""
    monkeypatch.setattr("model.chunks", lambda rows, _: [slice(i, i + 3) for i in range(0, rows, 3)])
    torch.manual_seed(0)
    h, head, scale = torch.randn(10, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    tokens = torch.randint(7, (10,))
    q = torch.nn.functional.one_hot(tokens, 7).double() if kind == "cross_entropy" else torch.randn(10, 7, dtype=torch.float64).softmax(-1)
    teacher = DIVERGENCES.get(kind, lambda _: cross_entropy)(lambda z, q: (q, {}))
    divergence = Divergence(teacher, (tokens if kind == "cross_entropy" else q,))
    results = []
    for loss in (
        lambda a, b: head_loss(a, b, scale, divergence, 0.01, 0.5)[0],
        lambda a, b: plain_loss(a, b, scale, q, 0.01, 0.5, kind),
    ):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss(a, b)
        (3 * value).backward()
        results.append((value.detach(), a.grad, b.grad))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() < 1e-9


@pytest.mark.parametrize(("loss", "form"), [*FORMS, ("psd", "reverse-kl"), ("psd", "square")])
def test_no_gradient_at_the_truth(loss, form):
    """The loss has zero gradient where psi is true and a non-zero one where it is not (27, 31, 35)."""
    oracle, x = Oracle("linear"), states("linear", S)
    scale = 0.5 if (loss, form) == ("lsd", "logit") else 1
    options = SimpleNamespace(target=form, divergence=form if form in DIVERGENCES else "kl", clamp=1e-5)
    h, divergence = distill.TEACHERS[loss](oracle, oracle, x, oracle.jump(S * scale, U * scale, T * scale), options)
    sizes = []
    for shift in (0.0, 0.3):
        z = (h.flatten(0, 1) + shift * torch.arange(V)).requires_grad_()
        total, _ = head_loss(z, oracle.head, torch.ones(6 * L, dtype=torch.float64), divergence, 1e-6, 0.0)
        total.backward()
        sizes.append(float(z.grad.abs().max()))
    assert sizes[0] < 1e-6 < 0.01 < sizes[1]


@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_teacher_is_a_constant(loss, form):
    """No gradient passes through a teacher: the loss's gradient is that of -<q, log psi_st> with q held fixed."""
    model = small_model(vocab=V)
    jump = distill.Jump.between(model, column(0.2, 0.1), column(0.4, 0.2), column(0.8, 0.4))
    y = torch.randn(2, 5, 16, dtype=torch.float64)
    h, divergence = distill.TEACHERS[loss](model, model, y, jump, SimpleNamespace(target=form, divergence="kl", clamp=1e-5))
    h = h.flatten(0, 1)
    z = (h @ model.head.T).detach()
    q = z.softmax(-1) - on_rows(divergence, z)[1]
    ours = head_loss(h, model.head, torch.ones(10, dtype=torch.float64), divergence, 1e-6, 0.0)[0]
    plain = -(q * (h @ model.head.T).log_softmax(-1)).sum()
    params = list(model.parameters())
    grads = (torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in (ours, plain))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-12)


def distillation_args(loss, **changes):
    """The flags of distill.py that its objective reads."""
    return SimpleNamespace(**{"loss": loss, "target": "logit", "divergence": "kl", "psd_share": 0.0, "diagonal_from": "data",
                              "boundary": 1 / 8, "step_law": "uniform", "diagonal_share": 0.5, "context": None, "guidance": 1.0,
                              "clamp": 1e-5, "diagonal_power": 0.0, "consistency_power": 0.0, "learned_weight": False} | changes)  # fmt: skip


def test_diagonal_conditions(monkeypatch):
    """The diagonal shows the network x_t with s = t, each row its own time, and the tokens' own noise and embedding."""
    model, tokens, seen = small_model(vocab=V).float(), torch.randint(V, (16, 5)), []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, y, s, t: seen.append((y, s, t)) or forward(self, y, s, t))
    train_diagonal.diagonal(model, tokens, Draw(0, 0, np.arange(16), "cpu"))
    ((y, s, t),) = seen
    draw = Draw(0, 0, np.arange(16), "cpu")
    time = model.times(draw.uniform(1)).float()
    assert torch.equal(s, time)
    assert torch.equal(t, time)
    x1 = torch.nn.functional.one_hot(tokens, V).float()
    x_t = (1 - time)[..., None] * draw.normal(5, V) + time[..., None] * x1
    assert torch.allclose(y, x_t @ model.embedding, atol=1e-6)


@pytest.mark.parametrize("loss", sorted(distill.TEACHERS))
def test_learned_weight(loss):
    """exp(-w) loss + w: the loss's gradient scales by exp(-w), w's own is 1 - exp(-w) loss; w sees s alone under PSD."""
    model, tokens = small_model(vocab=V).float(), torch.randint(V, (16, 5))
    last = model.loss_weight[-1]
    torch.nn.init.zeros_(last.weight)  # w is its bias, at first
    torch.nn.init.constant_(last.bias, 0.7)

    def loss_of(learned):
        args = distillation_args(loss, learned_weight=learned, consistency_power=0.3)
        total = distill.consistency(model, model, tokens, Draw(0, 0, np.arange(16), "cpu"), args, loss)[0]["consistency"]
        return (total.item(), *torch.autograd.grad(total, [model.head, last.bias], allow_unused=True))

    plain, plain_grad, none = loss_of(False)
    total, grad, weight_grad = loss_of(True)
    assert none is None
    assert torch.allclose(grad, math.exp(-0.7) * plain_grad, atol=1e-6)
    assert total == pytest.approx(math.exp(-0.7) * plain + 0.7, rel=1e-5)
    assert float(weight_grad) == pytest.approx(1 - math.exp(-0.7) * plain, rel=1e-4)
    torch.nn.init.normal_(last.weight)
    seen = []
    log_weight = model.log_weight
    model.log_weight = lambda s, t: seen.append((s, t)) or log_weight(s, t)
    loss_of(True)
    ((s, t),) = seen
    assert torch.equal(s, t) == (loss == "psd")


def test_rows_are_shared_out():
    """Half of any even run of rows learns the diagonal, the others the identity, whatever the micro-batch."""
    model, tokens, seen = small_model(vocab=V).float(), torch.randint(V, (8, 5)), []
    objective = distill.distillation(distillation_args("psd"), None)
    for rows in (np.arange(8), np.arange(2, 6)):
        draw = Draw(0, 0, rows, "cpu")
        parts = []
        draw.part = lambda mask, rows=rows, parts=parts: parts.append(rows[mask]) or Draw(0, 0, rows[mask], "cpu")
        objective(model, tokens[rows], draw)
        seen.append([set(part.tolist()) for part in parts])
    assert seen[0] == [{1, 3, 5, 7}, {0, 2, 4, 6}]
    assert seen[1] == [{3, 5}, {2, 4}]


def test_surgery_comes_after_the_average(monkeypatch):
    """The gradients that are projected are means over micro-batches and over ranks, not each rank's own."""
    calls = []
    project, average = train_diagonal.project, train_diagonal.average
    monkeypatch.setattr(train_diagonal, "average", lambda tensors: calls.append("average") or average(tensors))
    monkeypatch.setattr(train_diagonal, "project", lambda a, b: calls.append("project") or project(a, b))
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    model = SimpleNamespace(held_factor=None, noise_factor=lambda: torch.ones(1))
    # two micro-batches: each alone has conflicting gradients, (1, 0) and (-1, 1), their means have not
    batches = [(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])), (torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0]))]
    grads, scalars = train_diagonal.gradients([w], lambda model, a, b: ({"first": (w * a).sum(), "second": (w * b).sum()}, {}), model, batches, True)
    assert scalars["conflict"] == 0
    assert torch.equal(grads[0], torch.tensor([1.0, 1.0]))
    assert calls == ["average", "average", "project"]


def test_surgery():
    """The projected gradient never opposes the first one, and is left alone where they agree."""
    torch.manual_seed(0)
    for sign in (-1, 1):
        first = [torch.randn(4, 3), torch.randn(5)]
        second = [sign * a + 0.1 * torch.randn_like(a) for a in first]
        before = [b.clone() for b in second]
        conflict = train_diagonal.project(first, second)
        inner = sum((a * b).sum() for a, b in zip(first, second, strict=True))
        assert conflict == (sign < 0)
        assert inner > -1e-5
        assert all(torch.equal(a, b) for a, b in zip(before, second, strict=True)) == (sign > 0)


# ------------------------------------------------------------------------------------------------
# Learning on the oracle, a language of three pairs.

PAIRS, SHARES = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def learn(model, objective, steps, lr, surgery=False, batch=128):
    """Adam on `objective` over pairs drawn by their shares, the learning rate falling linearly to 0."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        tokens = PAIRS[torch.multinomial(SHARES, batch, replacement=True, generator=generator)]
        grads, _ = train_diagonal.gradients(params, objective, model, [(tokens, Draw(0, step, np.arange(batch), "cpu"))], surgery)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


def true_kl(model, euler=False):
    """KL(true psi_st || the model's psi_st, or its psi_ss), nats a token, over the jumps of distill.draw_progress."""
    oracle = Oracle("linear", steps=60, sequences=PAIRS, weights=SHARES)
    jump = distill.Jump.between(model, *distill.draw_progress(Draw(5, 0, np.arange(512), "cpu"), 1 / 8))
    draw = Draw(6, 0, np.arange(512), "cpu")
    x1 = oracle.one_hot[torch.multinomial(SHARES, 512, replacement=True, generator=torch.Generator().manual_seed(3))]
    x = (1 - jump.s)[..., None] * draw.normal(2, 3).double() + jump.s[..., None] * x1
    truth = oracle.psi(x, jump.s, jump.t).clamp(min=0)
    h = model((x @ model.embedding.double()).float(), jump.s.float(), (jump.s if euler else jump.t).float())
    log_psi = (h @ model.head.T).log_softmax(-1).double()
    return float((torch.xlogy(truth, truth) - truth * log_psi).sum(-1).mean())


def one_step_shares(model, euler=False):
    """The shares of the three pairs among 4,096 samples of one network evaluation."""
    tokens = generate(model, Draw(9, 0, np.arange(4096), "cpu").normal(2, model.noise_size), 1, euler)
    return (tokens[:, None] == PAIRS).all(-1).double().mean(0)


@pytest.fixture(scope="module")
def learned_diagonal():
    torch.manual_seed(0)
    model = DiT(ModelConfig(3, 2, 2, 64, 2))
    learn(model, functools.partial(train_diagonal.diagonal, power=0.0), 400, 3e-3)
    return model


@pytest.mark.parametrize(
    ("loss", "form", "lr", "steps", "weighted"),
    [("psd", "logit", 3e-3, 300, False), ("lsd", "signed", 3e-3, 350, False), ("esd", "logit", 5e-4, 400, True)],
)
def test_learning_reaches_the_truth(learned_diagonal, loss, form, lr, steps, weighted):
    """Each loss brings the true KL to psi_st below 0.1 nats, and one step to the shares of the language within 0.1."""
    with torch.no_grad():
        # the diagonal alone, a step of Euler's method, cannot
        assert true_kl(learned_diagonal, euler=True) > 0.2
        assert (one_step_shares(learned_diagonal, euler=True) - SHARES).abs().max() > 0.3
    model = copy.deepcopy(learned_diagonal)
    model.embedding.requires_grad_(False)
    args = distillation_args(loss, target=form, learned_weight=weighted, consistency_power=0.5 if weighted else 0.0)
    learn(model, distill.distillation(args, None if loss == "psd" else learned_diagonal), steps, lr, surgery=loss == "psd")
    with torch.no_grad():
        assert true_kl(model) < 0.1
        assert (one_step_shares(model) - SHARES).abs().max() < 0.1


# ------------------------------------------------------------------------------------------------
# The schedule.


@pytest.mark.parametrize("vocab", [2, 27, 50257])
def test_argmax_accuracy(vocab):
    """P(argmax x_t = token): closed form at V = 2, at ratio 0 and far out, and Simpson's rule on another grid."""
    ratio = torch.tensor([0.0, 0.5, 1.0, 3.0, 5.0, 30.0], dtype=torch.float64)
    ours = argmax_accuracy(ratio, vocab)
    assert ours[0] == pytest.approx(1 / vocab, rel=1e-9)
    assert ours[-1] == pytest.approx(1, abs=1e-12)
    if vocab == 2:  # the difference of two unit Gaussians
        assert torch.allclose(ours, torch.special.ndtr(ratio / 2**0.5), atol=1e-12)
    z = np.linspace(-9, 9, 2401)
    simpson = np.where(np.arange(2401) % 2 == 1, 4.0, 2.0) * (z[1] - z[0]) / 3
    simpson[[0, -1]] /= 2
    for r, value in zip(ratio.tolist(), ours.tolist(), strict=True):
        below = np.array([0.5 * math.erfc(-(a + r) / 2**0.5) for a in z])
        assert value == pytest.approx((simpson * np.exp(-(z**2) / 2) / (2 * math.pi) ** 0.5 * below ** (vocab - 1)).sum(), rel=1e-7)


@pytest.mark.parametrize("vocab", [27, 50257])
def test_schedule_is_linear_in_accuracy(vocab):
    """At the argmax schedule's times, Monte Carlo accuracy rises linearly in tau, within 4 standard errors."""
    tau, b = schedule_table("argmax", vocab, 1.0)
    rng, count = np.random.default_rng(0), 100_000
    for want in (0.1, 0.5, 0.9):
        beta = float(np.interp(want, tau, b))
        token = beta / (1 - beta) + rng.standard_normal(count)
        # the largest of V - 1 normals, by inverting its distribution function
        u = torch.from_numpy(rng.random(count) ** (1 / (vocab - 1)))
        other = -torch.special.ndtri(-torch.expm1(torch.log(u))).numpy()
        expected = 1 / vocab + want * (1 - 1 / vocab)
        assert abs((token > other).mean() - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("schedule", ["argmax", "linear"])
def test_schedule_times(path, schedule):
    """tau -> t goes from 0 to 1, rises, is the same law over beta/alpha on every path, and blends with lambda (36)."""
    model = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule, interpolant=path))
    tau = torch.linspace(0, 1, 5001, dtype=torch.float64)
    t = model.times(tau[:, None]).squeeze(1)
    assert t[0] == 0
    assert (t.diff() > 0).all()
    assert t[-1] < 1
    assert model.times(torch.tensor([[LAST]], dtype=torch.float64)) == t[-1]
    inner = t[1:-1]
    weight = model.path.beta(inner) / (model.path.alpha(inner) + model.path.beta(inner))
    full, b = schedule_table(schedule, 27, 1.0)
    expected = torch.from_numpy(np.interp(tau[1:-1], full, b))
    assert torch.allclose(weight, 0.9 * expected + 0.1 * tau[1:-1] if schedule == "argmax" else tau[1:-1], atol=1e-5)


def test_calibrated_schedule():
    """The measured loss falls linearly in tau, a rise by chance is passed over, and blend and path are those of the others."""
    r = torch.logspace(-2, 3, 61, dtype=torch.float64)
    curve = torch.stack([r / (1 + r), 2 * torch.exp(-r) + 0.5], 1)
    curve[10, 1] += 0.01
    tau, b = schedule_table("calibrated", 27, 1.0, curve.tolist())
    assert tau[0] == b[0] == 0
    assert tau[-1] == b[-1] == 1
    assert (tau.diff() > 0).all()
    want = np.array([0.1, 0.5, 0.9, 0.99])
    weight = np.interp(want, tau, b)
    assert 2 * np.exp(-weight / (1 - weight)) == pytest.approx(2 * (1 - want), abs=0.03)  # 13 points a decade, straight lines between
    assert np.allclose(schedule_table("calibrated", 27, 0.9, curve.tolist())[1], 0.9 * b + 0.1 * tau)
    assert torch.equal(schedule_table("calibrated", 27, 0.9)[1], schedule_table("argmax", 27, 0.9)[1])
    model = DiT(ModelConfig(27, 4, 1, 16, 2, schedule="calibrated", schedule_blend=1.0, interpolant="trigonometric"))
    model.set_schedule(curve.tolist())
    t = model.times(torch.from_numpy(want)[:, None])[:, 0].numpy()
    assert np.tan(t * np.pi / 2) == pytest.approx(weight / (1 - weight), rel=0.01)  # straight lines in t, not in b


def test_loss_curve():
    """The loss that a schedule is calibrated on is the diagonal's cross-entropy: of the noise alone at one end, of the clean row at the other."""
    model = small_model().float().requires_grad_(False)
    tokens = torch.randint(40, (6, 5))
    b, loss = train_diagonal.loss_curve(model, tokens, Draw(0, 0, np.arange(6), "cpu")).T
    y0 = model.embed_noise(Draw(0, 0, np.arange(6), "cpu").normal(5, model.noise_size))
    for k in (0, 30, 60):
        t = b[k].float().expand(6, 1)
        y = (1 - t)[..., None] * y0 + t[..., None] * model.embedding[tokens]
        expected = torch.nn.functional.cross_entropy((model(y, t, t) @ model.head.T).flatten(0, 1), tokens.flatten())
        assert float(loss[k]) == pytest.approx(float(expected), rel=1e-4)
    assert (b / (1 - b))[[0, -1]].tolist() == pytest.approx([0.01, 1000])
    assert model.held_factor is None


@pytest.mark.parametrize("schedule", ["argmax", "linear"])
def test_position_lag(schedule):
    """Earlier positions first (38), from 0 to the end together; the rates are the derivatives of the times."""
    tau = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
    q, rate = lagged(tau, 2.0, 4)
    (_, expected) = torch.func.jvp(lambda tau: lagged(tau, 2.0, 4)[0], (tau,), (torch.ones_like(tau),))
    assert torch.allclose(rate, expected)
    assert (q.diff(dim=-1) < 0).all()
    assert torch.allclose(torch.logit(q[:, 0]) - torch.logit(q[:, -1]), torch.full((99,), 2.0, dtype=torch.float64))
    assert torch.equal(lagged(column(0.0, 1.0), 2.0, 4)[0], column(0.0, 1.0).expand(2, 4))
    model = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule, position_lag=2.0))
    t, rate = model.times_and_rates(tau)
    shared = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule))
    assert torch.allclose(t, torch.cat([shared.times(column) for column in q.split(1, -1)], -1))
    step = 1e-7
    slope = (model.times(tau + step) - model.times(tau - step)) / (2 * step)
    inner = (slope / rate).std(-1) / (slope / rate).mean(-1)  # one factor a row
    assert inner.median() < 1e-6  # at a knot of the schedule's table the slope jumps
    assert torch.allclose(rate.mean(-1), torch.ones(99, dtype=torch.float64))
    assert torch.equal(shared.times_and_rates(tau)[1], torch.ones_like(tau))


# ------------------------------------------------------------------------------------------------
# The network and its noise.


def small_model(vocab=40, width=16, **kwargs):
    """A float64 DiT whose zero-initialised parts are made random, so that everything matters."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(vocab, 5, 2, width, 2, **kwargs)).double()
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return model


def test_embedded_noise():
    """y0 = xi C^T has the law of x0 W: covariance W^T W (exactly, from the factor), and the gradient of E|y0 A|^2."""
    model = small_model()
    torch.nn.init.normal_(model.embedding)  # at its start W is orthogonal, and any factor of the identity would do
    assert model.noise_size == 16
    W, A = model.embedding, torch.randn(16, 3, dtype=torch.float64)
    factor = model.embed_noise(torch.eye(16, dtype=torch.float64)[None])[0]  # (noise_size, D): y0 = xi factor
    assert torch.allclose(factor.T @ factor, W.T @ W, rtol=1e-4, atol=1e-6)
    ours = torch.autograd.grad((factor @ A).square().sum(), W)[0]  # E|y0 A|^2 = |factor A|^2
    plain = torch.autograd.grad((W @ A).square().sum(), W)[0]  # E|x0 W A|^2 = |W A|^2
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [40, 10])
def test_noise_factor_is_shared(vocab, monkeypatch):
    """A step forms one factor for all micro-batches, and its gradients are those of a factor formed by each."""
    model, calls = small_model(vocab=vocab), []
    params, cholesky = list(model.parameters()), torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda A: calls.append(1) or cholesky(A))
    tokens = torch.randint(vocab, (6, 5))
    batches = [(tokens[i : i + 2], np.arange(i, i + 2)) for i in (0, 2, 4)]

    def objective(model, tokens, rows):
        xi = Draw(0, 0, rows, "cpu").normal(5, model.noise_size).double()
        t = torch.full((2, 1), 0.3, dtype=torch.float64)
        y, again = (model.interpolate(xi, tokens, t) for _ in range(2))
        return {"first": y.sin().mean(), "second": (again * model(again, t, t)).mean()}, {}

    plain = torch.autograd.grad(sum(sum(objective(model, *b)[0].values()) for b in batches) / 3, params, allow_unused=True, materialize_grads=True)
    calls.clear()
    for surgery in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(train_diagonal, "project", lambda a, b: torch.zeros(()))
            grads, _ = train_diagonal.gradients(params, objective, model, batches, surgery)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, plain, strict=True))
        assert model.held_factor is None
    assert len(calls) == (2 if vocab == 40 else 0)
    model.embedding.requires_grad_(False)
    model.hold_noise()
    train_diagonal.gradients([p for p in params if p.requires_grad], objective, model, batches, False)
    assert len(calls) == (3 if vocab == 40 else 0)
    assert model.held_factor is not None


@pytest.mark.parametrize("loss", ["diagonal", *sorted(distill.TEACHERS)])
def test_activation_checkpointing(loss):
    """The same gradients, bit for bit, with less kept between the passes."""
    model, tokens, kept = small_model(vocab=V).float(), torch.randint(V, (4, 5)), []
    results = []
    for model.activation_checkpointing in (False, True):
        draw, size = Draw(0, 0, np.arange(4), "cpu"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: size.append(x.numel()) or x, lambda x: x):  # noqa: B023
            if loss == "diagonal":
                total = train_diagonal.diagonal(model, tokens, draw)[0]["diagonal"]
            else:
                total = distill.consistency(model, model, tokens, draw, distillation_args(loss), loss)[0]["consistency"]
        kept.append(sum(size))
        results.append(torch.autograd.grad(total, list(model.parameters()), materialize_grads=True, allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.6 * kept[0]


def test_compiled_steps_do_not_recompile(monkeypatch):
    """Every loss compiled gives the plain one's gradients, and new values of tokens, times, noise and weights compile nothing."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    maybe_compiled.cache_clear()
    for loss in ("diagonal", *sorted(distill.TEACHERS)):
        model = small_model(vocab=V).float()
        results = []
        for turn in range(4):
            with torch.no_grad():
                model.final_modulation.bias.copy_(torch.linspace(0, 0.1 * (turn % 3), 32))
            tokens, draw = torch.randint(V, (4, 5), generator=torch.Generator().manual_seed(turn % 3)), Draw(0, turn % 3, np.arange(4), "cpu")
            with torch.compiler.set_stance("fail_on_recompile" if turn > 1 else "default"):
                if loss == "diagonal":
                    total = train_diagonal.diagonal(model, tokens, draw)[0]["diagonal"]
                else:
                    total = distill.consistency(model, model, tokens, draw, distillation_args(loss), loss)[0]["consistency"]
                grads = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True, allow_unused=True)
            if turn in (0, 3):
                results.append(grads)
            model.compile_parts()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
    maybe_compiled.cache_clear()


def test_small_vocabulary_noise():
    """With V <= 2 D the V-vector itself is drawn, and W^T W need not have full rank."""
    model = small_model(vocab=10)
    xi = torch.randn(2, 5, 10, dtype=torch.float64)
    assert model.noise_size == 10
    assert torch.equal(model.embed_noise(xi), xi @ model.embedding)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("per_position", [False, True])
def test_forward_mode_derivative(path, per_position):
    """D_s h_st along the flow, by one dual pass, against central differences; its primal against the plain pass."""
    model = small_model(interpolant=path)
    y, dy = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    s = torch.rand(3, 5 if per_position else 1, dtype=torch.float64) / 2
    t = s + 0.3
    one, zero, e = torch.ones_like(s), torch.zeros_like(s), 1e-6
    h, dh = model.derivative(y, s, t, dy, one, zero)
    assert torch.allclose(h, model(y, s, t), atol=1e-12)
    difference = (model(y + e * dy, s + e, t) - model(y - e * dy, s - e, t)) / (2 * e)
    assert (dh - difference).abs().max() < 1e-7
    assert h.requires_grad
    assert not dh.requires_grad
    _, dh_t = model.derivative(y, s, t, torch.zeros_like(y), zero, one)
    assert (dh_t - (model(y, s, t + e) - model(y, s, t - e)) / (2 * e)).abs().max() < 1e-7


def test_attention_tangent(monkeypatch):
    """In chunks of queries, against PyTorch's forward mode through the attention written out."""
    monkeypatch.setattr("model.chunks", lambda rows, _: [slice(i, i + 3) for i in range(0, rows, 3)])
    q, k, v, dq, dk, dv = torch.randn(6, 2, 3, 7, 4, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v, (q, k, v), (dq, dk, dv))
    assert torch.allclose(attention_tangent(q, k, v, dq, dk, dv), expected, atol=1e-12)
    assert torch.allclose(attention(q, k, v), (q @ k.mT / 2).softmax(-1) @ v, atol=1e-12)


def test_dual_pass_with_compiled_blocks(monkeypatch):
    """The dual pass runs through compiled blocks as through plain ones."""
    model = small_model()
    y, s = torch.randn(2, 5, 16, dtype=torch.float64), torch.full((2, 1), 0.3, dtype=torch.float64)
    want = model.derivative(y, s, 2 * s, y, torch.ones_like(s), torch.zeros_like(s))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model.compile_parts()
    got = model.derivative(y, s, 2 * s, y, torch.ones_like(s), torch.zeros_like(s))
    assert all(torch.allclose(a, b) for a, b in zip(want, got, strict=True))
    assert torch.allclose(model(y, s, 2 * s), want[0])


def test_dual_pass_gradient():
    """The dual pass keeps the student's ordinary graph: its parameter gradients are those of a plain pass."""
    model = small_model()
    y, s, t = torch.randn(3, 5, 16, dtype=torch.float64), torch.full((3, 1), 0.2).double(), torch.full((3, 1), 0.6).double()
    probe, used = torch.randn(3, 5, 16, dtype=torch.float64), [p for n, p in model.named_parameters() if not n.startswith(("head", "emb", "loss"))]
    dual = model.derivative(y, s, t, y, torch.ones_like(s), torch.zeros_like(t))[0]
    for a, b in zip(torch.autograd.grad((dual * probe).sum(), used), torch.autograd.grad((model(y, s, t) * probe).sum(), used), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_soft_embedding_and_argmax(monkeypatch):
    """psi W and the most probable token, in chunks, against the plain products."""
    monkeypatch.setattr("model.chunks", lambda rows, _: [slice(i, i + 4) for i in range(0, rows, 4)])
    model, h = small_model(), torch.randn(2, 5, 16, dtype=torch.float64)
    logits = h @ model.head.T
    assert torch.allclose(model.soft_embedding(h), logits.softmax(-1) @ model.embedding)
    assert torch.equal(model.argmax(h), logits.argmax(-1))


def test_paper_size():
    """The base model on GPT-2's vocabulary has the paper's 170M parameters."""
    with torch.device("meta"):
        from model import SIZES, Block

        config = ModelConfig(50257, 1024, **SIZES["base"])
        blocks = sum(p.numel() for p in Block(config).parameters()) * config.layers
    assert round((blocks + 2 * config.vocab_size * config.width) / 1e6) == 169


# ------------------------------------------------------------------------------------------------
# Randomness, rows and the grammar.


def test_draw_does_not_depend_on_the_partition():
    """A row's normals and uniforms are the same whatever rows are drawn with it."""
    whole = Draw(3, 7, np.arange(8), "cpu")
    n, u = whole.normal(4, 5), whole.uniform(2)
    for part in (np.arange(2, 5), np.array([7])):
        draw = Draw(3, 7, part, "cpu")
        assert torch.equal(draw.normal(4, 5), n[part])
        assert torch.equal(draw.uniform(2), u[part])
    assert not torch.equal(n, whole.normal(4, 5))
    assert not torch.equal(n, Draw(3, 8, np.arange(8), "cpu").normal(4, 5))
    masked = Draw(3, 7, np.arange(8), "cpu").part(np.arange(8) % 2 == 1)
    assert torch.equal(masked.normal(4, 5), n[1::2])


def test_draw_is_low_discrepancy():
    """512 uniforms of a step leave no gap in [0, 1] of over 3/512 in one dimension, and are normal draws' companions."""
    u = Draw(0, 0, np.arange(512), "cpu").uniform(1).flatten().sort().values
    assert u.diff().max() < 3 / 512
    x = Draw(0, 0, np.arange(64), "cpu").normal(1000)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


def test_draw_progress_to_data():
    """All jumps end at data, from a uniform start, by way of the middle."""
    draw = Draw(0, 0, np.arange(16384), "cpu")
    s, u, t = distill.draw_progress(draw, 0.0, to_data=True)
    assert (t == 1).all()
    assert torch.allclose(2 * u, s + t)
    assert s.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shares", [(0.25, 0.5), (0.5, 0.25), (0.3, 1 / 7)])
def test_spread(shares):
    """Two shares, one of what the other leaves: the same rows whoever asks, and every run of rows holds its part to within one row."""
    rows = np.arange(1000)
    first, others = distill.spread(rows, shares[0])
    second = ~first & distill.spread(others, shares[1])[0]
    assert (others[~first] == np.arange((~first).sum())).all()
    for mask, share in ((first, shares[0]), (second, (1 - shares[0]) * shares[1])):
        counts = np.concatenate([[0], np.cumsum(mask)])
        assert np.abs((counts[64:] - counts[:-64]) - 64 * share).max() <= 2
        part = distill.spread(rows[37:99], shares[0])
        assert (part[0] == first[37:99]).all()


def test_psd_rows_beside_another_loss(monkeypatch):
    """--psd-share: the consistency loss is the mean over both kinds of rows, and those of psd all end at data."""
    model, tokens = small_model(vocab=V).float(), torch.randint(V, (32, 5))
    seen, plain = [], distill.consistency

    def spy(*networks, tokens, draw, args, loss, to_data=False):
        seen.append((loss, to_data, draw.rows.tolist()))
        return plain(*networks, tokens, draw, args, loss, to_data)

    monkeypatch.setattr(
        distill, "consistency", lambda m, t, x, d, args, loss, to_data=False: spy(m, t, tokens=x, draw=d, args=args, loss=loss, to_data=to_data)
    )
    args = distillation_args("esd", psd_share=0.25)
    losses, report = distill.distillation(args, None)(model, tokens, Draw(0, 0, np.arange(32), "cpu"))
    assert [(loss, to_data, len(rows)) for loss, to_data, rows in seen] == [("esd", False, 12), ("psd", True, 4)]
    parts = [plain(model, model, tokens[rows], Draw(0, 0, np.array(rows), "cpu"), args, *how)[0]["consistency"] for *how, rows in
             [("esd", False, seen[0][2]), ("psd", True, seen[1][2])]]  # fmt: skip
    assert losses["consistency"].item() == pytest.approx((12 * parts[0] + 4 * parts[1]).item() / 16, rel=1e-6)
    assert report["to_data_consistency_kl"].isfinite()


@pytest.mark.parametrize("law", ["uniform", "pair"])
def test_draw_progress(law):
    """0 <= s <= u <= t <= 1, steps by their law, s uniform given the step; the boundary's share goes from noise to data."""
    s, u, t = distill.draw_progress(Draw(0, 0, np.arange(8192), "cpu"), 1 / 32, law)
    assert s.shape == (8192, 1)
    assert ((s >= 0) & (s <= u) & (u <= t) & (t <= 1 + 1e-12)).all()
    edge = (s == 0) & (t == 1)
    assert float(edge.double().mean()) == pytest.approx(1 / 32, abs=0.003)
    step, start = (t - s)[~edge], s[~edge]
    assert step.min() > 0.0009
    for x in (0.25, 0.5, 0.75):
        assert float((step < x).double().mean()) == pytest.approx(x if law == "uniform" else 1 - (1 - x) ** 2, abs=0.02)
        assert float((start / (1 - step) < x).double().mean()) == pytest.approx(x, abs=0.02)
    model = small_model()
    jump = distill.Jump.between(model, s, u, t)
    assert (jump.t < 1).all()  # never at t = 1, where the Eulerian identity is 0/0
    assert (jump.t.float() > jump.s.float()).all()


def test_grammar_is_exact():
    """Probabilities sum to one over all sentences of a state, entropy equals the mean of -log p, and L is the longest."""
    for arcs in grammar().values():
        assert sum(p for p, _ in arcs.values()) == pytest.approx(1, abs=1e-12)
    rows = grammar_rows(20_000, 1)
    nll = -np.array([grammar_log_prob(row) for row in rows])
    assert abs(nll.mean() - grammar_entropy()) < 4 * nll.std() / len(nll) ** 0.5
    assert rows.shape[1] == grammar_longest() == (rows != 0).sum(1).max()
    assert len(grammar_words()) - 2 >= 40
    assert grammar_entropy() >= 10


def test_grammar_agreement():
    """Number and class bind over three words and more; a changed word makes a sentence ungrammatical."""
    index = {word: i for i, word in enumerate(grammar_words())}

    def score(text):
        row = [index[word] for word in text.split()]
        return grammar_log_prob(row + [0] * (grammar_longest() - len(row)))

    assert score("some farmers near the river read a famous poem .") > -math.inf
    assert score("some farmers near the river reads a famous poem .") == -math.inf
    assert score("a farmers near the river read a famous poem .") == -math.inf
    assert score("some farmers near the river read a famous cake .") == -math.inf
    assert score("some farmers near the river read a famous poem") == -math.inf
    # determiner, bare noun, verb at once, determiner, bare object
    assert score("a king cooks the soup .") == pytest.approx(math.log(1 / 4 * 1 / 6 * (1 / 2 / 4) * 1 / 2 * (1 / 2 / 5)))


def test_pack():
    """Documents are joined by EOS, cut every L - 2 tokens and framed; the incomplete rest is dropped."""
    rows = np.concatenate(list(pack([[1, 2, 3], [4], [5, 6]], 6, bos=8, eos=9)))
    assert rows.tolist() == [[8, 1, 2, 3, 9, 9], [8, 4, 9, 5, 6, 9]]
    long = [list(range(i % 7)) for i in range(3000)]
    rows = np.concatenate(list(pack(long, 10, bos=8, eos=9)))
    stream = [t for ids in long for t in [*ids, 9]]
    assert rows[:, 1:-1].flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert np.concatenate(list(pack([range(10)], 4, None, None))).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_forward_mode_is_what_sdpa_lacks():
    """The reason why model.attention_tangent is written out."""
    q = torch.randn(1, 2, 4, 8)
    with (
        pytest.raises((NotImplementedError, RuntimeError)),
        forward_ad.dual_level(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    ):
        dual = forward_ad.make_dual(q, q)
        torch.nn.functional.scaled_dot_product_attention(dual, dual, dual)


# ------------------------------------------------------------------------------------------------
# Clean context (section 4.2).


def masked_reference(model, tokens, y, s, t, c):
    """What the block's hidden vectors should be, from one pass over context and block with a dense mask, written out."""
    n = y.shape[1]
    row = torch.cat([model.embedding[tokens], y], 1)
    i = torch.arange(c + n)
    allowed = (i[:, None] >= c) | (i[None] <= i[:, None])  # a context's row sees what is before it, a block's row sees all
    allowed &= (i[:, None] >= c) | (i[None] < c)
    one = torch.ones(len(y), c, dtype=y.dtype)
    s, t = (torch.cat([one, v.expand(-1, n)], 1) for v in (s, t))

    def dense(q, k, v, causal, seen):
        return ((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -math.inf)).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.attention", dense)
        return model(row, s, t)[:, c:]


def context_case(c=3):
    """A float64 network, a context of c tokens, an embedded block of 5 - c, and two times."""
    model = small_model()
    tokens, y = torch.randint(40, (2, c)), torch.randn(2, 5 - c, 16, dtype=torch.float64)
    return model, tokens, y, torch.tensor([[0.2], [0.5]], dtype=torch.float64), torch.tensor([[0.6], [0.9]], dtype=torch.float64)


def test_given_is_the_masked_pass():
    """Cached keys and values give what one pass with the mask of section 4.2 gives; so do keys cached in two parts."""
    model, tokens, y, s, t = context_case()
    keys, places = model.encode(tokens), torch.arange(3, 5)
    want = masked_reference(model, tokens, y, s, t, 3)
    assert torch.allclose(model.given(keys, places)(y, s, t), want, atol=1e-12)
    parts = model.encode(tokens[:, 1:], before=model.encode(tokens[:, :1]))
    assert torch.allclose(model.given(parts, places)(y, s, t), want, atol=1e-12)
    assert not torch.allclose(model.given(None, places)(y, s, t), want, atol=1e-3)
    assert torch.allclose(model.given(None, torch.arange(2))(y, s, t), model(y, s, t), atol=1e-12)


def test_context_sees_no_block_and_no_later_token():
    """Bit for bit: no token changes the keys and values of one before it."""
    model, tokens, *_ = context_case()
    keys = model.encode(tokens)
    for place in range(3):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 40
        for (k, v), (k2, v2) in zip(keys, model.encode(changed), strict=True):
            assert torch.equal(k[:, :, :place], k2[:, :, :place])
            assert torch.equal(v[:, :, :place], v2[:, :, :place])
        assert not torch.equal(keys[-1][1][:, :, place:], model.encode(changed)[-1][1][:, :, place:])
    longer = model.encode(torch.cat([tokens, tokens[:, :2]], 1))
    assert all(torch.allclose(k, k2[:, :, :3], atol=1e-15) for (k, _), (k2, _) in zip(keys, longer, strict=True))


@pytest.mark.parametrize("lag", LAGS)
def test_derivative_given_a_context(lag):
    """D_s h_st of a block, against central differences; the context does not move."""
    model, tokens, y, s, t = context_case()
    net = model.given(model.encode(tokens), torch.tensor([[3, 4], [3, 4]]))
    if lag:
        s, t = s * torch.tensor([1.0, 0.5]), t * torch.tensor([1.0, 0.7])
    dy, one, e = torch.randn_like(y), torch.ones_like(s), 1e-6
    h, dh = net.derivative(y, s, t, dy=dy, ds=one)
    assert torch.allclose(h, net(y, s, t), atol=1e-12)
    assert (dh - (net(y + e * dy, s + e, t) - net(y - e * dy, s - e, t)) / (2 * e)).abs().max() < 1e-7


@pytest.mark.parametrize(("kind", "size"), [("block", 2), ("any", 2), ("any", None), ("scatter", None)])
def test_by_context(kind, size):
    """Context and block are parts of the row as --context says, the loss is the mean over rows, whatever the grouping."""
    model, L = small_model(), 6
    model.cos, model.sin = torch.ones(2, L, 4, dtype=torch.float64)  # no positions: tokens alone tell
    tokens, calls = torch.arange(40 * L).view(40, L) % 40, []
    args = SimpleNamespace(context=kind, block_size=size, context_dropout=0.25)

    def loss(net, block, draw):
        calls.append((net.context[0][0], net.positions, block, draw.rows))
        h = net(net.embedding[block], *torch.full((2, len(block), 1), 0.5, dtype=torch.float64))
        return {"x": h.square().mean()}, {"n": torch.tensor(float(block.numel())), "pair": torch.tensor([1.0, 2.0])}

    lengths, dropped, contexts = set(), 0, set()
    for step in range(1, 20):
        train_diagonal.by_context(loss, [model], tokens, Draw(0, step, np.arange(40), "cpu"), args)
        contexts |= {0 if keys is None else keys[0].shape[2] for keys, *_ in calls}
        assert len(calls) <= 8
        calls.clear()
    losses, report = train_diagonal.by_context(loss, [model], tokens, Draw(0, 0, np.arange(40), "cpu"), args)
    for keys, places, block, rows in calls:
        assert torch.equal(block, tokens[torch.from_numpy(rows)].gather(1, places))
        c = 0 if keys is None else keys[0].shape[2]
        lengths.add(block.shape[1])
        for place in places:
            assert (place.diff() > 0).all()  # a block's positions rise
            if kind != "scatter":
                assert int(place[-1] - place[0]) == len(place) - 1
                dropped += c != int(place[0])
                assert c in (0, int(place[0]))
            else:
                assert c in (0, L - len(place))
        if kind == "block":
            assert c % 2 == 0
            assert block.shape[1] == 2
    assert sorted(np.concatenate([rows for *_, rows in calls])) == list(range(40))
    assert len(contexts) == (3 if kind == "block" else 6)
    assert max(lengths) <= (size or L)
    assert kind == "scatter" or 4 <= dropped <= 12  # a quarter of the rows, but for those without a context anyway
    parts = [train_diagonal.by_context(loss, [model], tokens[i : i + 1], Draw(0, 0, np.array([i]), "cpu"), args) for i in range(40)]
    alone = sum(part[0]["x"] for part in parts) / 40
    assert torch.allclose(losses["x"], alone, atol=1e-12)
    assert report["pair"][1] == 2 * report["pair"][0]


def sampling_case(**config):
    """A network of 12 positions, and normals that are a function of how many were asked for."""
    torch.manual_seed(1)
    model = DiT(ModelConfig(40, 12, 2, 16, 2, **config)).double().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    draw = Draw(0, 0, np.arange(3), "cpu")
    return model, lambda n: draw.normal(n, model.noise_size).double()


@pytest.mark.parametrize("omega", [1.0, 1.7])
def test_blocks_with_and_without_the_cache(omega):
    """Keys and values kept from block to block give the same tokens as all of them computed anew for each."""
    model, normal = sampling_case()
    prompt = torch.randint(40, (3, 2))
    ours = sample.continue_text(model, prompt, 12, 4, normal, omega, nfe=3)
    tokens, (_, normal) = prompt, sampling_case()
    for n in (4, 4, 2):
        places = torch.arange(tokens.shape[1], tokens.shape[1] + n)
        net = sample.condition(model, model.encode(tokens), places, omega)
        tokens = torch.cat([tokens, generate(net, normal(n), 3)], 1)
    assert torch.equal(ours, tokens)
    assert torch.equal(ours[:, :2], prompt)
    _, normal = sampling_case()
    other = sample.continue_text(model, (prompt + 1) % 40, 12, 4, normal, omega, nfe=3)
    assert not torch.equal(ours[:, 2:], other[:, 2:])


def test_no_later_token_changes_a_block():
    """The first blocks of a longer text are those of a shorter one; beyond L the window slides, and the text goes on."""
    model, normal = sampling_case()
    prompt = torch.randint(40, (3, 2))
    short = sample.continue_text(model, prompt, 6, 4, normal, nfe=2)
    long = sample.continue_text(model, prompt, 22, 4, sampling_case()[1], nfe=2)
    assert torch.equal(short, long[:, :6])
    assert long.shape == (3, 22)
    net = model.given(model.encode(long[:, 10:18]), torch.arange(8, 12))  # 22 = 18 + 4, the window's last 8 tokens before it
    _, normal = sampling_case()
    noise = [normal(4) for _ in range(5)][-1]
    assert torch.equal(long[:, 18:], generate(net, noise, 2))


def test_guidance():
    """psi + omega (psi(c) - psi) in one batch: omega 0 and 1 are the plain branches; the drift is linear in psi; no impossible token."""
    model, normal = sampling_case()
    keys, places, xi = model.encode(torch.randint(40, (3, 5))), torch.arange(5, 9), normal(4)
    given, alone = model.given(keys, places), model.given(None, places)
    for omega, plain in ((0.0, alone), (1.0, given)):
        net = sample.Guided(model, keys, places, omega)
        assert torch.equal(generate(net, xi, 3), generate(plain, xi, 3))
        assert torch.equal(generate(sample.condition(model, keys, places, omega), xi, 3), generate(plain, xi, 3))
    s = torch.full((3, 1), 0.3, dtype=torch.float64)
    y = model.embed_noise(xi)
    psi_c, psi_0 = ((net(y, s, s) @ model.head.T).softmax(-1) for net in (given, alone))
    net = sample.Guided(model, keys, places, 1.8)
    h = net(y, s, s)
    assert torch.allclose(net.soft_embedding(h), (psi_0 + 1.8 * (psi_c - psi_0)) @ model.embedding)
    assert torch.equal(net.argmax(h), (psi_0 + 1.8 * (psi_c - psi_0)).argmax(-1))
    drift = [model.path.drift(y, psi @ model.embedding, s) for psi in (psi_0, psi_c)]
    assert torch.allclose(model.path.drift(y, net.soft_embedding(h), s), drift[0] + 1.8 * (drift[1] - drift[0]))


def test_guided_target():
    """psi + omega (psi(c) - psi) where that is on the simplex; else its negative entries are 0; omega 0 and 1 are the branches."""
    h_c, h_0, head = (torch.randn(n, 6, dtype=torch.float64) for n in (40, 40, 9))
    psi_c, psi_0 = ((h @ head.T).softmax(-1) for h in (h_c, h_0))
    for omega in (0.0, 0.5, 1.0, 1.3):
        plain = psi_0 + omega * (psi_c - psi_0)
        q, _ = distill.guided(None, h_c, h_0, torch.full((40, 1), omega, dtype=torch.float64), head)
        inside = (plain >= 0).all(-1)
        assert torch.allclose(q[inside], plain[inside])
        assert torch.allclose(q.sum(-1), torch.ones(40, dtype=torch.float64))
        assert (q[plain < 0] == 0).all()
        assert inside.all() == (omega <= 1)


def test_diagonal_from_stage1():
    """The diagonal's loss against stage 1 is KL(stage 1's psi_tt || psi_tt) at the same states as (22), with no gradient to stage 1."""
    model, stage1 = small_model(vocab=V).float(), small_model(vocab=V).float()
    with torch.no_grad():
        stage1.head.mul_(1.3)
    tokens, draw = torch.randint(V, (16, 5)), Draw(0, 0, np.arange(16), "cpu")
    losses, report = distill.from_stage1(model, stage1, tokens, draw, 0.0, 1.0)
    draw = Draw(0, 0, np.arange(16), "cpu")
    t = model.times(draw.uniform(1)).float()
    y = model.interpolate(draw.normal(5, model.noise_size), tokens, t)
    p, q = ((net(y, t, t) @ net.head.T).log_softmax(-1) for net in (model, stage1))
    plain = (q.exp().detach() * (q.detach() - p)).sum(-1).mean()
    assert losses["diagonal"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert report["diagonal_kl"].item() == pytest.approx(plain.item(), rel=1e-5)
    ours, expected = (torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (losses["diagonal"], plain))
    assert all(a is b is None or torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected, strict=True))
    losses, _ = distill.from_stage1(stage1, stage1, tokens, Draw(0, 0, np.arange(16), "cpu"), 0.0, 1.0)
    assert losses["diagonal"].item() == pytest.approx(0, abs=1e-6)


def test_fill_in():
    """Given tokens stay, wherever they stand; the others depend on them, and not on what stood in their places."""
    model, normal = sampling_case()
    tokens, given = torch.randint(40, (3, 12)), torch.arange(12) % 3 == 1
    out = sample.fill_in(model, tokens, given, normal, nfe=2)
    assert torch.equal(out[:, given], tokens[:, given])
    hidden = torch.where(given, tokens, (tokens + 7) % 40)
    assert torch.equal(out, sample.fill_in(model, hidden, given, sampling_case()[1], nfe=2))
    changed = torch.where(given, (tokens + 7) % 40, tokens)
    assert not torch.equal(out[:, ~given], sample.fill_in(model, changed, given, sampling_case()[1], nfe=2)[:, ~given])


def test_steering_on_the_oracle():
    """Particles resampled by their look-ahead: the share of a property goes from its base rate to nearly one, all in the language."""
    oracle = Oracle("linear", steps=20)
    oracle.times = lambda q: q * 0.99
    oracle.embed_noise, oracle.argmax = lambda xi: xi, lambda h: h.argmax(-1)
    oracle.config = SimpleNamespace(seq_len=L)
    texts = [" ".join(map(str, row.tolist())) for row in SEQUENCES]
    reward = lambda found: [float(text == texts[3]) for text in found]  # noqa: E731 (a tenth of the language)
    rows = {}
    for particles in (1, 6):
        draw = Draw(0, 0, np.arange(120 * particles), "cpu")
        steering = sample.Steering(oracle, False, reward, lambda row: " ".join(map(str, row.tolist())), particles, 10.0, draw.uniform)
        normal = lambda: draw.normal(L, V).double()  # noqa: B023, E731
        tokens = generate(oracle, normal(), 8, gamma=0.3, normal=normal, select=steering.select)
        rows[particles] = tokens[steering.resample(tokens)[0][::particles]]
        assert (rows[particles][:, None] == SEQUENCES).all(-1).any(-1).float().mean() > 0.95
    shares = {n: float((r == SEQUENCES[3]).all(-1).float().mean()) for n, r in rows.items()}
    assert shares[1] < 0.25
    assert shares[6] > 0.7


@pytest.mark.parametrize("bf16", [False, True])
def test_gelu_linear(bf16):
    """The linear layer after a gelu that is computed twice, against autograd of the two, also under autocast."""
    x, w, b = (torch.randn(*shape, dtype=torch.float32 if bf16 else torch.float64, requires_grad=True) for shape in ((2, 3, 8), (4, 8), (4,)))
    results = []
    for f in (GeluLinear.apply, lambda x, w, b: torch.nn.functional.linear(torch.nn.functional.gelu(x, approximate="tanh"), w, b)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = f(x.bfloat16() if bf16 else x, w, b)
        results.append([out, *torch.autograd.grad(out.float().sin().sum() if bf16 else out.sin().sum(), (x, w, b))])
    assert all(a.dtype == c.dtype for a, c in zip(*results, strict=True))
    assert all(torch.allclose(a, c, atol=0.02 if bf16 else 1e-12, rtol=0.02 if bf16 else 1e-9) for a, c in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------
# What a newcomer changes: a path, a loss, a network, each in one place. README.md counts these lines.

QUADRATIC = dict(
    alpha=lambda t: 1 - t**2,
    beta=lambda t: t,
    d_alpha=lambda t: -2 * t,
    d_beta=lambda t: torch.ones_like(t),
    delta=lambda s, t: (t - s) * (1 + s * t),
    time_of=lambda b: 2 * b / (1 - b + torch.sqrt((1 - b) ** 2 + 4 * b**2)),
)


def instantaneous(model, teacher, y, jump, args):
    """A loss that stays where it is: psi_st = psi_ss."""
    with torch.no_grad():
        h_ss = teacher(y, jump.s, jump.s).flatten(0, 1)
    return model(y, jump.s, jump.t), Divergence(distill.kl(distill.instantaneous), (h_ss,), (distill.lowered(teacher.head),))


class Mixer(torch.nn.Module):
    """A block without attention; its tangent is PyTorch's own forward mode."""

    def __init__(self, config):
        super().__init__()
        self.across = torch.nn.Linear(config.seq_len, config.seq_len)
        self.along = torch.nn.Linear(config.width, config.width)
        self.modulation = torch.nn.Linear(config.time_width, config.width)

    def mix(self, h, time):
        return h + self.across((self.along(h) * self.modulation(time)).tanh().mT).mT

    def forward(self, h, time, cos, sin, dh=None, dtime=None, before=None, causal=False, seen=None):
        if dh is None:
            return self.mix(h, time)
        h, dh = torch.func.jvp(self.mix, (h, time), (dh, dtime))
        return h, dh.detach()


def test_a_new_path(monkeypatch):
    """One entry of INTERPOLANTS serves: its Wronskian form, the semigroup on its oracle, and a model's schedule."""
    monkeypatch.setitem(INTERPOLANTS, "quadratic", Interpolant(**QUADRATIC))
    path, (s, u, t) = INTERPOLANTS["quadratic"], torch.tensor([[0.1], [0.35], [0.8]], dtype=torch.float64)
    assert torch.allclose(path.delta(s, t), path.alpha(s) * path.beta(t) - path.alpha(t) * path.beta(s))
    b = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(path.beta(path.time_of(b)) * (1 - b), path.alpha(path.time_of(b)) * b)
    oracle, x = Oracle("quadratic"), torch.randn(3, L, V, dtype=torch.float64)
    (s, u, t), omega = (time.expand(3, 1) for time in (s, u, t)), path.omega(s, u, t)
    psi_su, psi_st = oracle.psi(x, s, u), oracle.psi(x, s, t)
    two = omega[..., None] * psi_su + (1 - omega[..., None]) * oracle.psi(path.flow_map(x, psi_su, s, u), u, t)
    assert (two - psi_st).abs().max() < 1e-7
    assert small_model(interpolant="quadratic").times(torch.rand(4, 1, dtype=torch.float64)).max() < 1


def test_a_new_loss(monkeypatch):
    """One entry of TEACHERS serves: the command line knows it, and the objective learns it."""
    monkeypatch.setitem(distill.TEACHERS, "instantaneous", instantaneous)
    torch.manual_seed(0)
    teacher = DiT(ModelConfig(3, 2, 2, 64, 2))
    model = copy.deepcopy(teacher)
    model.embedding.requires_grad_(False)
    torch.nn.init.normal_(teacher.head)
    args = distillation_args("instantaneous")
    objective = distill.distillation(args, teacher)
    kls = []
    for steps in (1, 60):
        learn(model, objective, steps, 3e-3)
        draw = Draw(7, 0, np.arange(256), "cpu")
        kls.append(float(objective(model, PAIRS[torch.arange(256) % 3], draw)[1]["consistency_kl"]))
    assert kls[1] < kls[0] / 2


def test_a_new_network(monkeypatch):
    """One class in Block's place serves, its tangent included: D_s against central differences, a step of ESD, its FLOPs."""
    monkeypatch.setattr("model.Block", Mixer)
    test_forward_mode_derivative("linear", False)
    model = small_model().float()
    model.embedding.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    objective = distill.distillation(distillation_args("esd"), copy.deepcopy(model))
    grads, _ = train_diagonal.gradients(learned, objective, model, [(torch.randint(7, (8, 5)), Draw(0, 0, np.arange(8), "cpu"))], False)
    assert all(grad.isfinite().all() for grad in grads)
    assert train_diagonal.flops_per_row(model, 5) > 0
