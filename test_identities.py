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
import train_diagonal
from model import (
    INTERPOLANTS,
    LAST,
    DiT,
    Divergence,
    Draw,
    ModelConfig,
    argmax_accuracy,
    attention,
    attention_tangent,
    cross_entropy,
    head_loss,
    kl,
    lagged,
    maybe_compiled,
    reverse_kl,
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

    def __init__(self, path, lag=0.0, steps=150, sequences=SEQUENCES, weights=WEIGHTS):
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
        """DiT.derivative, by PyTorch's forward mode."""
        with forward_ad.dual_level():
            inputs = ((y, dy), (s, ds), (t, dt))
            return forward_ad.unpack_dual(self(*(a if da is None else forward_ad.make_dual(a, da) for a, da in inputs)))

    def soft_embedding(self, h):
        return h.softmax(-1)


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
    oracle = Oracle(path, lag)
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
    oracle = Oracle(path, lag, steps=400)
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
    h, divergence = distill.TEACHERS[loss](oracle, oracle, x, jump, SimpleNamespace(target=form, reverse_kl=False))
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
    lost = psi_tt < distill.CLAMP * psi
    assert (q - psi).abs().max() > 1e-3
    assert ((psi - q)[lost] > -1e-6).all()
    assert (psi - q)[lost].sum() == pytest.approx(float((q - psi)[~lost].sum()), abs=1e-6)
    assert (taught(oracle, "lsd", "signed", x, jump)[1] - psi).abs().max() < 1e-6


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_teacher_near_the_end(path, loss, form, lag):
    """The same for s -> t and for t -> 1, where the plain forms lose their digits."""
    s, u, t = column(0.3, 0.3, 0.5), column(0.30005, 0.6, 0.7), column(0.3001, 0.99, 0.999)
    if (loss, form) == ("lsd", "logit"):
        s, u, t = s[:1], u[:1], t[:1]  # see the test above
    oracle = Oracle(path, lag)
    jump = oracle.jump(s, u, t)
    x = states(path, jump.s, len(s))
    truth = oracle.psi(x, jump.s, jump.t).flatten(0, 1)
    assert (taught(oracle, loss, form, x, jump)[1] - truth).abs().max() < 1e-6


def test_sampler_on_the_oracle():
    """With the true flow map, any number of steps lands where the fine integration of the flow lands (18)."""
    oracle = Oracle("linear", steps=400)
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


# ------------------------------------------------------------------------------------------------
# Losses.


def plain_loss(h, head, scale, q, c, r, reverse):
    """The weighted KL(q || p), p = softmax(h head^T), or KL(p || q), written out, with the weight detached."""
    p = (h @ head.T).softmax(-1)
    w = ((q - p).square().sum(-1) + c) ** -r
    a, b = (p, q) if reverse else (q, p)
    return (scale * w.detach() * (torch.xlogy(a, a) - a * b.log()).sum(-1)).sum()


@pytest.mark.parametrize("kind", ["cross_entropy", "kl", "reverse_kl"])
def test_head_loss(kind, monkeypatch):
    """The chunked loss equals the plain one, value and gradients, to 1e-9; the KL's logit gradient is q - p."""
    monkeypatch.setattr("model.chunks", lambda rows, _: [slice(i, i + 3) for i in range(0, rows, 3)])
    torch.manual_seed(0)
    h, head, scale = torch.randn(10, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    tokens = torch.randint(7, (10,))
    q = torch.nn.functional.one_hot(tokens, 7).double() if kind == "cross_entropy" else torch.randn(10, 7, dtype=torch.float64).softmax(-1)
    teacher = {"kl": kl, "reverse_kl": reverse_kl}.get(kind, lambda _: cross_entropy)(lambda z, q: (q, {}))
    divergence = Divergence(teacher, (tokens if kind == "cross_entropy" else q,))
    results = []
    for loss in (
        lambda a, b: head_loss(a, b, scale, divergence, 0.01, 0.5)[0],
        lambda a, b: plain_loss(a, b, scale, q, 0.01, 0.5, kind == "reverse_kl"),
    ):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss(a, b)
        (3 * value).backward()
        results.append((value.detach(), a.grad, b.grad))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() < 1e-9


@pytest.mark.parametrize(("loss", "form"), [*FORMS, ("psd", "reverse")])
def test_no_gradient_at_the_truth(loss, form):
    """The loss has zero gradient where psi is true and a non-zero one where it is not (27, 31, 35)."""
    oracle, x = Oracle("linear"), states("linear", S)
    scale = 0.5 if (loss, form) == ("lsd", "logit") else 1
    options = SimpleNamespace(target=form, reverse_kl=form == "reverse")
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
    h, divergence = distill.TEACHERS[loss](model, model, y, jump, SimpleNamespace(target=form, reverse_kl=False))
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
    return SimpleNamespace(**{"loss": loss, "target": "logit", "reverse_kl": False, "boundary": 1 / 8, "step_law": "uniform", "diagonal_share": 0.5,
                              "diagonal_power": 0.0, "consistency_power": 0.0, "learned_weight": False} | changes)  # fmt: skip


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
        total, _ = distill.consistency(model, model, tokens, Draw(0, 0, np.arange(16), "cpu"), args)
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


def learn(model, objective, steps, lr, surgery=False, batch=256):
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
    ("loss", "form", "lr", "weighted"), [("psd", "logit", 3e-3, False), ("lsd", "signed", 3e-3, False), ("esd", "logit", 5e-4, True)]
)
def test_learning_reaches_the_truth(learned_diagonal, loss, form, lr, weighted):
    """Each loss brings the true KL to psi_st below 0.1 nats, and one step to the shares of the language within 0.1."""
    with torch.no_grad():
        # the diagonal alone, a step of Euler's method, cannot
        assert true_kl(learned_diagonal, euler=True) > 0.2
        assert (one_step_shares(learned_diagonal, euler=True) - SHARES).abs().max() > 0.3
    model = copy.deepcopy(learned_diagonal)
    model.embedding.requires_grad_(False)
    args = distillation_args(loss, target=form, learned_weight=weighted, consistency_power=0.5 if weighted else 0.0)
    learn(model, distill.distillation(args, None if loss == "psd" else learned_diagonal), 500, lr, surgery=loss == "psd")
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
                total = distill.consistency(model, model, tokens, draw, distillation_args(loss))[0]
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
                    total = distill.consistency(model, model, tokens, draw, distillation_args(loss))[0]
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
