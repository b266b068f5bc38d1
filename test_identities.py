"""The mathematics against closed forms, in float64 on the CPU.

The oracle is a language of a few weighted sequences, whose posterior given x_t is a softmax over
the sequences: the denoiser is exact, the flow follows by integration, and psi_st from its
definition. It answers the same calls as model.DiT, so losses, teachers and sampler run on it.
"""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import distill
import model as net
import prepare_data
import train_diagonal
from evaluate import likelihood_bound
from model import Conditional, DiT, Draw, ModelConfig, RowLoss, head_loss, schedule_table
from sample import choose, continue_text, generate, renoise, uniforms

torch.set_num_threads(1)  # small tensors; the other cores have tests of their own
PATHS = [*net.INTERPOLANTS, "quadratic"]
LAGS = [0.0, 1.5]  # one time for all positions, or one for each (38)
ROWS_AT_ONCE = net.rows_at_once
V, L = 5, 3
QUADRATIC = net.Interpolant(  # a new path is one entry of INTERPOLANTS
    alpha=lambda t: 1 - t**2,
    beta=lambda t: t,
    d_alpha=lambda t: -2 * t,
    d_beta=lambda t: torch.ones_like(t),
    Delta=lambda s, t: (t - s) * (1 + s * t),
    time_at=lambda b: 2 * b / (1 - b + torch.sqrt((1 - b) ** 2 + 4 * b**2)),
)
SEQUENCES = torch.tensor([[0, 1, 2], [0, 3, 4], [1, 1, 4], [2, 0, 2]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PAIRS = torch.tensor([[0, 1], [1, 2], [2, 0]])  # a language to learn
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.fixture(autouse=True)
def patched(monkeypatch, request):
    """The new path, and more than one chunk in loops over chunks, however small the tensor."""
    monkeypatch.setitem(net.INTERPOLANTS, "quadratic", QUADRATIC)
    many = "truth" in request.node.name or "exact_denoiser" in request.node.name
    monkeypatch.setattr(net, "rows_at_once", lambda *_: 9000 if many else 5)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]  # (n, 1)


S = column(0.0, 0.05, 0.2, 0.3, 0.5, 0.6)  # six rows of s < u < t
U = column(0.3, 0.2, 0.3, 0.5, 0.51, 0.7)
T = column(0.8, 0.5, 0.9, 0.6, 0.52, 0.9)
NEAR_THE_END = (column(0.3, 0.3, 0.5), column(0.30005, 0.6, 0.7), column(0.3001, 0.99, 0.999))
INSIDE = [(path, lag, (S, U, T)) for path in PATHS[:2] for lag in LAGS]
ENDS = [("linear", 0.0, NEAR_THE_END), ("trigonometric", 1.5, NEAR_THE_END)]
# PSD's target has one form, those of LSD and ESD have two.
FORMS = ["psd logit", "lsd logit", "lsd signed", "esd logit", "esd signed"]


def normals(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_rows(sequences, weights, count, seed=0):
    """Sequences (count, L) by their weights."""
    generator = torch.Generator().manual_seed(seed)
    return sequences[torch.multinomial(weights, count, replacement=True, generator=generator)]


def shares(tokens, sequences=SEQUENCES):
    return (tokens[:, None] == sequences).all(-1).double().mean(0)


def same(ours, plain, **tolerance):
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(ours, plain, strict=True))


# ---- Exact flows to check against. -------------------------------------------------------------
class Oracle:
    """Exact psi_st of the weighted sequences, seen through y = x W; psi_st = softmax(h_st), head I.

    With a lag the flow follows the times model.lagged(tau). For W not square, the denoiser alone.
    """

    def __init__(self, path="linear", lag=0.0, steps=80, language=(SEQUENCES, WEIGHTS), W=None):
        self.path = net.INTERPOLANTS[path]
        self.lag = lag
        self.steps = steps
        self.one_hot = F.one_hot(language[0]).double()  # (K, L, V)
        self.log_weights = language[1].log()
        self.head = torch.eye(self.one_hot.shape[-1], dtype=torch.float64)
        self.embedding = self.head if W is None else W
        gram = self.embedding.T @ self.embedding
        self.whiten = torch.linalg.inv(torch.linalg.cholesky(gram)).T  # of y, to unit noise
        self.clean = self.one_hot @ self.embedding @ self.whiten
        self.noise_size = len(self.head)
        self.schedule_tau = self.schedule_time = torch.tensor([0, net.MAX_PROGRESS, 1.0]).double()
        self.times = lambda tau: self.times_and_rates(tau)[0]
        self.noise_factor = lambda: self.embedding
        self.embed_noise = lambda xi: xi @ self.embedding
        self.soft_embedding = lambda h: (h @ self.head).softmax(-1)

    def times_and_rates(self, tau):
        if self.lag:
            return net.lagged(tau, self.lag, self.one_hot.shape[1])
        return tau, torch.ones_like(tau)

    def denoiser(self, y, t):
        """E[x1 | x_t = x] (21): the posterior over sequences."""
        alpha = self.path.alpha(t)
        r = (self.path.beta(t) / alpha)[:, None]
        match = torch.einsum("bld,kld->bkl", y @ self.whiten / alpha[..., None], self.clean)
        evidence = (r * match - r**2 / 2 * self.clean.square().sum(-1)).sum(-1)
        posterior = (self.log_weights + evidence).softmax(-1)  # (B, K)
        return torch.einsum("bk,klv->blv", posterior, self.one_hot)

    def flow(self, x, s, t):
        """X_st by Runge-Kutta on dx/dtau = (dt/dtau) b_t(x) (52), on a grid fine near its end."""
        odds = math.exp(self.lag / 2)  # `times` inverted, from the first position's
        start, end = (v[:, :1] / (v[:, :1] + (1 - v[:, :1]) * odds) for v in (s, t))

        def slope(k, x):
            tau = end - (end - start) * (1 - k) ** 2
            dtau = 2 * (end - start) * (1 - k) / self.steps
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
        moved = self.flow(x, s, t) - self.path.Gamma(s, t)[..., None] * x
        return moved / self.path.Xi(s, t)[..., None]

    def __call__(self, y, s, t):
        shift = (s + 2 * t)[..., None]  # the same for all tokens: of no importance
        return (self.psi(y, s, t).clamp(min=1e-300).log() + shift) / self.head[0, 0]

    def derivative(self, y, s, t, dy=None, ds=None, dt=None):
        """DiT.derivative, by reverse mode twice: ten times faster here than forward mode."""
        tangents = zip((y, s, t), (dy, ds, dt), strict=True)
        tangents = tuple(torch.zeros_like(a) if da is None else da for a, da in tangents)
        return torch.autograd.functional.jvp(self, (y, s, t), tangents)

    def interpolate(self, xi, tokens, t):
        clean = self.path.beta(t)[..., None] * self.embedding[tokens]
        return clean + self.path.alpha(t)[..., None] * self.embed_noise(xi)


def states(path, s):
    """x_s drawn from the interpolant, (n, L, V), for times s (n, 1 or L)."""
    tokens = draw_rows(SEQUENCES, WEIGHTS, len(s))
    return Oracle(path).interpolate(normals(len(s), L, V, seed=4), tokens, s)


# ---- The identities, on the oracle. ------------------------------------------------------------
@pytest.mark.parametrize("name", PATHS)
def test_coefficients(name):
    """Each coefficient of (23, 24, 25, 50, 52) from alpha, beta and r; the linear path's forms."""
    p = net.INTERPOLANTS[name]
    x, psi = normals(2, 6, 1, V)
    s, u, t = (time[..., None] for time in (S, U, T))

    def r(t):
        return p.beta(t) / p.alpha(t)

    def slope(f, t):
        return torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]

    gamma = p.Gamma(S, T)
    ell = slope(p.alpha, U) / p.alpha(U)
    lam = slope(p.beta, U) - p.beta(U) * ell
    xi = p.beta(T) - p.alpha(T) / p.alpha(S) * p.beta(S)
    cases = [
        (p.d_alpha(U), slope(p.alpha, U)),
        (p.d_beta(U), slope(p.beta, U)),
        (p.Delta(S, T), p.alpha(S) * p.beta(T) - p.alpha(T) * p.beta(S)),
        (p.wronskian(U), p.alpha(U) ** 2 * slope(r, U)),
        (p.omega(S, U, T), (r(U) - r(S)) / (r(T) - r(S))),
        (p.C(S, T), (r(T) - r(S)) / slope(r, T)),
        (gamma, p.alpha(T) / p.alpha(S)),
        (p.E(S, T) / gamma, (r(T) - r(S)) / slope(r, S)),  # 1 / kappa
        (p.drift(x, psi, U), ell[..., None] * x + lam[..., None] * psi),
        (p.flow_map(x, psi, S, T), gamma[..., None] * x + xi[..., None] * psi),
        (r(p.time_at(U)), U / (1 - U)),
    ]
    if name == "linear":
        cases += [
            (p.omega(S, U, T), (U - S) * (1 - T) / ((T - S) * (1 - U))),
            (p.E(S, T), T - S),
            (p.C(S, T), (T - S) * (1 - T) / (1 - S)),
            (p.flow_map(x, psi, S, T), (1 - t) / (1 - s) * x + (t - s) / (1 - s) * psi),
            (p.drift(x, psi, U), (psi - x) / (1 - u)),
        ]
    for ours, expected in cases:
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
def test_mean_denoiser(path, lag):
    """psi_st is the average of psi_uu along the trajectory, uniform in r (58): on the simplex."""
    oracle = Oracle(path, lag, steps=150)
    p = oracle.path
    s, t = oracle.times(S), oracle.times(T)
    x = states(path, s)
    n = 40  # nodes of Gauss and Legendre on [-1, 1], all in one batch
    nodes, weights = (torch.from_numpy(v)[:, None] for v in np.polynomial.legendre.leggauss(n))
    tau = S + (T - S) * (nodes[:, None] + 1) / 2  # (n, 6, 1)
    u, rate = oracle.times_and_rates(tau.flatten(0, 1))
    x_u = oracle.flow(x.repeat(n, 1, 1), s.repeat(n, 1), u)
    dr = rate * p.wronskian(u) / p.alpha(u) ** 2 * (T - S).repeat(n, 1)  # of r along the curve
    rise = p.beta(t) / p.alpha(t) - p.beta(s) / p.alpha(s)
    share = weights.repeat_interleave(6, 0) / 2 * dr / rise.repeat(n, 1)
    mean = (share[..., None] * oracle.denoiser(x_u, u)).view(n, 6, L, V).sum(0)
    psi = oracle.psi(x, s, t)
    assert torch.allclose(psi, mean, atol=1e-7)
    assert psi.min() > -1e-8
    assert torch.allclose(psi.sum(-1), torch.ones(6, L, dtype=torch.float64))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("path", PATHS)
def test_identities(path, lag):
    """(23), (24), (25) to 1e-8, coefficients from r and derivatives by central differences."""
    oracle = Oracle(path, lag, steps=250)
    p = oracle.path
    (s, ds), (u, _), (t, dt) = (oracle.times_and_rates(tau[1:4]) for tau in (S, U, T))
    x = states(path, s)
    psi = oracle.psi(x, s, t)
    r_s, r_u, r_t = ((p.beta(v) / p.alpha(v))[..., None] for v in (s, u, t))
    # Both derivatives are along the row's progress, hence the rates.
    dr_s, dr_t = ((dv * p.lam(v) / p.alpha(v))[..., None] for v, dv in ((s, ds), (t, dt)))
    x4, s4, t4 = x.repeat(4, 1, 1), s.repeat(4, 1), t.repeat(4, 1)

    def difference(f, tau):
        """df/dtau, to fourth order; f takes times (12, L), 4 for each of the rows."""
        shifts = column(1.0, -1.0, 2.0, -2.0).repeat_interleave(3, 0) * 1e-3
        a, b, c, d = f(oracle.times(tau[1:4].repeat(4, 1) + shifts)).view(4, 3, L, V)
        return (8 * (a - b) - (c - d)) / 12e-3

    d_t = difference(lambda t: oracle.psi(x4, s4, t), T)
    D_s = difference(lambda s: oracle.psi(oracle.flow(x4, s4, s), s, t4), S)
    omega = (r_u - r_s) / (r_t - r_s)
    psi_ut = oracle.psi(oracle.flow(x, s, u), u, t)
    psi_tt = oracle.denoiser(oracle.flow(x, s, t), t)
    for side in (
        omega * oracle.psi(x, s, u) + (1 - omega) * psi_ut,
        psi_tt - (r_t - r_s) / dr_t * d_t,
        oracle.denoiser(x, s) + (r_t - r_s) / dr_s * D_s,
    ):
        assert (side - psi).abs().max() < 1e-8


def teach(model, teacher, form, y, jump, kind="kl"):
    """(h_st (rows, D), the RowLoss from its target) of a teacher, both on all rows."""
    loss, target = form.split()
    args = SimpleNamespace(form=target, divergence=kind)
    h, divergence = distill.TEACHERS[loss](model, teacher, y, jump, args)
    constants = (*divergence.by_row, *divergence.shared)
    assert not any(x.requires_grad for x in constants if torch.is_tensor(x))
    return h.flatten(0, 1), divergence


def gradient(divergence, z):
    """p - q, what a RowLoss gives as the gradient on the logits z of all rows."""
    return divergence.function(z, *divergence.by_row, *divergence.shared)[1]


@pytest.mark.parametrize(("path", "lag", "times"), INSIDE + ENDS)
@pytest.mark.parametrize("form", FORMS)
def test_teacher_returns_the_truth(path, form, lag, times):
    """The true flow map gets psi_st back, no gradient: (23, 64), (24, 29, 68), (25, 33, 43, 70)."""
    oracle, teacher = (Oracle(path, lag, 150 if times is NEAR_THE_END else 80) for _ in range(2))
    teacher.head = 2 * oracle.head  # another network: its h go with its own head
    if form == "lsd logit":
        times = [time[:1] if times is NEAR_THE_END else time / 2 for time in times]
    jump = distill.Jump.between(oracle, *times)
    x = states(path, jump.s)
    for kind in ("kl", "square") if form == "psd logit" else ("kl",):
        z, divergence = teach(oracle, teacher, form, x, jump, kind)
        assert (z.softmax(-1) - oracle.psi(x, jump.s, jump.t).flatten(0, 1)).abs().max() < 1e-6
        assert gradient(divergence, z).abs().max() < 1e-6
        assert gradient(divergence, z + 0.3 * torch.arange(V)).abs().max() > 0.01


# ---- The sampler and the likelihood bound, on the oracle. --------------------------------------
def sampled(model, xi, *jumps, **how):
    """The most probable tokens at the end of the jumps of `generate`."""
    return choose(model.head, generate(model, xi, *jumps, **how))


def test_sampler_on_the_oracle():
    """With the true flow map any number of jumps lands where the integrated flow lands (18)."""
    oracle = Oracle(steps=250)
    tau, b = schedule_table("argmax", V, 0.9)
    oracle.times = lambda q: torch.from_numpy(np.interp(q, tau, b)) * 0.995  # almost to the end
    jumps = ((1, False), (3, False), (256, True))
    one, three, euler = (sampled(oracle, normals(64, L, V), *jump) for jump in jumps)
    assert torch.equal(one, three)
    assert shares(one).sum() == 1
    assert (euler == one).all(-1).double().mean() > 0.95


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_renoising_on_the_oracle(gamma):
    """Renoised to t, x0 has variance alpha_t^2 and x1 the factor beta_t: samples keep their law."""
    oracle = Oracle("trigonometric", steps=60)
    oracle.times = lambda tau: tau * 0.99
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, 4000, L, V, dtype=torch.float64, generator=generator)
    xi = normal()
    tokens = sampled(oracle, xi, 4, gamma=gamma, normal=normal)
    error = (WEIGHTS * (1 - WEIGHTS) / 4000).sqrt()
    assert ((shares(tokens) - WEIGHTS).abs() < 4 * error).all()
    assert (tokens == sampled(oracle, xi, 4)).all(-1).double().mean() < 0.8  # fresh noise matters
    p = oracle.path
    one = torch.ones(6, 1, V, dtype=torch.float64)
    kept, added = (renoise(oracle, a * one, T, U, (1 - a) * one)[:, 0, :1] for a in (1, 0))
    assert torch.allclose(kept * p.beta(T), p.beta(U))
    assert torch.allclose((kept * p.alpha(T)) ** 2 + added**2, p.alpha(U) ** 2)


def test_euler_with_renoising():
    """Stage 1 jumps to the landing by psi_ss, then is renoised to the next time of the grid."""
    model, _, start = sampling_case()
    xi = start()(12)
    s, landing, t = (time.expand(3, 1) for time in model.times(column(0, 0.7, 0.5)))
    y = model.embed_noise(xi)
    y = model.path.flow_map(y, model.soft_embedding(model(y, s, s)), s, landing)
    y = renoise(model, y, landing, t, xi)
    ((_, h),) = generate(model, xi, 2, euler=True, gamma=0.4, normal=lambda: xi)
    assert torch.allclose(h, model(y, t, t))


def test_temperature():
    """A token's share of an even grid of u is psi^(1/T) scaled to sum to 1; near T = 0 the best."""
    model = small_model()
    h = normals(1, 1, 16)
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for T in (0.5, 1, 3):
        tokens = choose(model.head, [(1.0, h.expand(n, -1, -1))], T, u)
        share = tokens.flatten().bincount(minlength=40).double() / n
        expected = (h @ model.head.T / T).softmax(-1).squeeze()
        assert torch.allclose(share, expected, atol=1.5 / n)
    xi = normals(200, 5, model.noise_size)
    noise = functools.partial(torch.randn_like, xi)
    hidden = generate(model, xi, 2)
    cold, once, again = (choose(model.head, hidden, T, uniforms(noise())) for T in (1e-6, 1, 1))
    assert torch.equal(cold, choose(model.head, hidden))
    assert 0.2 < (once != again).double().mean() < 1


@pytest.mark.parametrize("case", ["linear", "lag", "embedded", "wrong"])
def test_bound_of_the_exact_denoiser(case, monkeypatch):
    """int r E|(x1 - psi) Q|^2 dr + E[CE]: the entropy at the best r*, -log q of a row at last."""
    weights = torch.full_like(WEIGHTS, 0.25) if case == "wrong" else WEIGHTS
    how = {"lag": {"path": "trigonometric", "lag": 1.5}, "embedded": {"W": normals(V, 3, seed=1)}}
    oracle = Oracle(language=(SEQUENCES, weights), **how.get(case, {}))
    oracle.times = lambda tau: oracle.times_and_rates(tau * 0.9)[0]  # r up to 9

    def draw(seed, step, rows, device):  # all rows at once: they are 8,000
        return SimpleNamespace(normal=lambda *shape: normals(len(rows), *shape, seed=step))

    monkeypatch.setattr("evaluate.Draw", draw)
    rows = SEQUENCES.repeat_interleave(2000, 0).numpy()
    bound = likelihood_bound(oracle, rows, 0, 8000)[1].reshape(-1, 4, 2000).mean(-1)
    mean = bound @ WEIGHTS.numpy()
    expected = -float(WEIGHTS @ weights.log())
    assert 0.99 * expected < mean.min() < 1.01 * expected  # an estimate
    assert case == "embedded" or np.abs(bound[-1] + weights.log().numpy()).max() < 0.03


def small_model(vocab=40, **config):
    """A float64 DiT whose zero-initialised parts are made random, so that everything matters."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(vocab, 5, 2, 16, 2, **config)).double()
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return model


def small_case(rows=16, **config):
    """(float32 small_model of V tokens, tokens (rows, 5), a function that makes their Draw)."""
    model = small_model(V, **config).float()
    tokens = torch.randint(V, (rows, 5), generator=torch.Generator().manual_seed(1))
    return model, tokens, lambda: Draw(0, 0, np.arange(rows), "cpu")


def grads_of(loss, *networks):
    """Gradients of a loss on all parameters, zeros where there are none."""
    params = [p for network in networks for p in network.parameters()]
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def flags(loss="psd", **changes):
    """The flags of distill.py, both losses without weights."""
    parser = prepare_data.new_parser("")
    distill.distillation_flags(parser)
    train_diagonal.training_flags(parser, 1)
    args = parser.parse_args(["--loss", loss, "--diagonal-from", "data", "--no-learned-weight"])
    args.context = None
    plain = {"diagonal_power": 0.0, "consistency_power": 0.0, "boundary": 1 / 8}
    plain["diagonal_share"] = 0.0 if loss == "dmd" else 0.5
    vars(args).update(plain | changes)
    return args


def loss_of(name, model, tokens, draw):
    """The diagonal loss or, by the name of its identity, a consistency loss: a scalar."""
    if name == "diagonal":
        return train_diagonal.diagonal_loss(model, tokens, draw)[0]["diagonal"]
    return distill.consistency_loss(model, model, tokens, draw, flags(name), name)[0]["consistency"]


def weighted_loss(z, q, c=0, r=0, kind="kl"):
    """For each row (|q - p|^2 + c)^-r (45), held constant, times KL(q || p) or |q - p|^2 / 2."""
    p = z.softmax(-1)
    square = (q - p).square().sum(-1)
    kl = (torch.xlogy(q, q) - q * p.log()).sum(-1)
    return ((square + c) ** -r).detach() * (square / 2 if kind == "square" else kl)


# ---- Losses and gradients. ---------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cross_entropy", *distill.DIVERGENCES])
def test_head_loss(kind):
    """The loss in chunks equals the plain one, value, report and gradients, to 1e-9."""
    leaves = [normals(10, 4).requires_grad_(), normals(7, 4, seed=1).requires_grad_()]
    scale = torch.rand(10, dtype=torch.float64)
    tokens = torch.arange(10) % 7
    q = F.one_hot(tokens, 7).double()
    divergence = RowLoss(train_diagonal.cross_entropy, (tokens,))
    if kind != "cross_entropy":
        q = normals(10, 7, seed=2).softmax(-1)
        divergence = RowLoss(distill.DIVERGENCES[kind], (q,))
    total, report = head_loss(*leaves, scale, divergence, 0.01, 0.5)
    z = leaves[0] @ leaves[1].T
    weighted = weighted_loss(z, q, 0.01, 0.5, kind)
    plain = (scale * weighted).sum()
    assert torch.allclose(total, plain, rtol=0, atol=1e-9)
    grads = (torch.autograd.grad(3 * loss, leaves, retain_graph=True) for loss in (total, plain))
    assert same(*grads, rtol=0, atol=1e-9)
    assert torch.allclose(report["weighted"], weighted)
    assert torch.allclose(report["loss"], weighted_loss(z, q, kind=kind))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_target_is_a_constant(form, joint):
    """The gradient is that of -<q, log psi_st> with q fixed; a frozen stage 1 never gets any."""
    model = small_model(V)
    stage1 = small_model(V)
    jump = distill.Jump.between(model, column(0.2, 0.1), column(0.4, 0.2), column(0.8, 0.4))
    teacher = model if joint else stage1
    h, divergence = teach(model, teacher, form, normals(2, 5, 16), jump)
    z = h @ model.head.T
    q = z.detach().softmax(-1) - gradient(divergence, z.detach())
    ones = torch.ones(len(h), dtype=torch.float64)
    ours, _ = head_loss(h, model.head, ones, divergence, 1e-6, 0.0)
    expected = grads_of(-(q * z.log_softmax(-1)).sum(), model, stage1)
    assert same(grads_of(ours, model, stage1), expected, atol=1e-12)
    assert not any(grad.any() for grad in expected[len(expected) // 2 :])


@pytest.mark.parametrize("target", [None, 1.0, 4.0])
def test_diagonal(target):
    """(22) or KL(sg[q] || psi_tt), q of stage 1, guided or not, with the weight (45), c = 0.01."""
    model, tokens, draw = small_case(schedule_blend=0.7)
    stage1 = copy.deepcopy(model)
    stage1.head.data.mul_(1.3)
    block = tokens[:, 2:]
    places = torch.arange(2, 5)
    student, teacher = (Conditional(n, n.encode(tokens[:, :2]), places) for n in (model, stage1))
    noise = draw()
    t = model.times(noise.uniform(1)).float()
    q = F.one_hot(block, V).float()
    x_t = (1 - t)[..., None] * noise.normal(3, V) + t[..., None] * q
    networks = (student, teacher, teacher.without_context())
    z, z_c, z_0 = (n(x_t @ model.embedding, t, t) @ n.head.T for n in networks)
    if target is None:
        losses, report = train_diagonal.diagonal_loss(student, block, draw())
    else:
        args = flags(guidance=target, diagonal_power=0.5)
        losses, report = distill.diagonal_from_stage1(student, teacher, block, draw(), args)
        q = z_0.softmax(-1) + target * (z_c.softmax(-1) - z_0.softmax(-1))
        assert (q < 0).any() == (target > 1)
        q = F.normalize(q.clamp(min=0), 1, dim=-1).detach()
    plain = weighted_loss(z, q, 0.01, 0.5).mean()
    assert torch.allclose(losses["diagonal"], plain, rtol=1e-4)
    assert torch.allclose(*report.values(), weighted_loss(z, q).mean(), rtol=1e-4)
    grads = (grads_of(loss, model, stage1) for loss in (losses["diagonal"], plain))
    assert same(*grads, atol=1e-6)


@pytest.mark.parametrize("loss", sorted(distill.TEACHERS))
def test_consistency(loss):
    """exp(-w) loss + w of (27, 31, 35), w(s) for PSD, else w(s, t), weighted by (45), c = 1e-6."""
    model, tokens, draw = small_case(interpolant="trigonometric", position_lag=1.0)
    args = flags(loss, consistency_power=0.4, learned_weight=True)
    for to_data in (True, False):
        losses, report = distill.consistency_loss(model, model, tokens, draw(), args, loss, to_data)
        noise = draw()
        progress = distill.draw_progress(noise, args.boundary, to_data)
        jump = distill.Jump(*(v.float() for v in distill.Jump.between(model, *progress)))
        y = model.interpolate(noise.normal(5, V), tokens, jump.s)
        h, divergence = distill.TEACHERS[loss](model, model, y, jump, args)
        z = (h @ model.head.T).flatten(0, 1)
        q = z.detach().softmax(-1) - gradient(divergence, z.detach().clone())
        w = model.log_scale(jump.s, jump.s if loss == "psd" else jump.t) * (not to_data)
        plain = (torch.exp(-w) * weighted_loss(z, q, 1e-6, 0.4).view(16, 5) + w).mean()
        assert torch.allclose(losses["consistency"], plain, rtol=1e-4)
        assert torch.allclose(report["consistency_kl"], weighted_loss(z, q).mean(), rtol=1e-4)
        grads = (grads_of(total, model) for total in (losses["consistency"], plain))
        assert same(*grads, rtol=1e-3, atol=1e-5)
    assert not torch.equal(w, model.log_scale(jump.s, jump.t + 0.1))


@pytest.mark.parametrize("T", [1.0, 0.8])
def test_matching(T):
    """<sg[d], p> / size, d = psi_critic - psi_real^(1/T), and KL(sg[p] || psi_critic)."""
    model, tokens, draw = small_case()
    stage1, critic = copy.deepcopy(model), copy.deepcopy(model)
    stage1.head.data.mul_(1.3)
    critic.head.data.mul_(-0.7)
    args = flags("dmd", teacher_temperature=T)
    losses, report = distill.matching_loss(model, critic, stage1, tokens, draw(), args)
    noise = draw()
    start, edge, tau = noise.uniform(3)[:, :, None].unbind(1)
    assert 0 < (edge < 1 / 8).sum() < 16
    s = torch.where(edge < 1 / 8, 0, 0.8 * start)
    s, t, tau = (model.times(v).float() for v in (s, torch.ones_like(s), tau))
    y = model.interpolate(noise.normal(5, V), tokens, s)
    p = (model(y, s, t) @ model.head.T).softmax(-1)
    clean = p.detach() @ model.embedding
    xi = noise.normal(5, V) @ model.embedding
    y_tau = ((1 - tau)[..., None] * xi + tau[..., None] * clean).detach()
    real = (stage1(y_tau, tau, tau) @ stage1.head.T / T).softmax(-1)
    fake = (critic(y_tau, tau, tau) @ critic.head.T).softmax(-1)
    size = (p - real).abs().sum(-1).mean(1).clamp(min=0.01)
    plain = ((fake - real) / size[:, None, None] * p).sum(-1).mean()
    ours = grads_of(losses["matching"], model, critic, stage1)
    count = len(list(model.parameters()))
    expected = ((fake - real) / size[:, None, None]).detach()
    expected = grads_of((expected * p).sum(-1).mean(), model, critic, stage1)
    assert torch.allclose(losses["matching"], plain, rtol=1e-4)
    assert same(ours, expected, atol=1e-6)
    assert not any(grad.any() for grad in ours[count:])
    kl = (p * (p.log() - fake.log())).sum(-1).mean()
    assert torch.allclose(losses["critic"], kl, rtol=1e-4)
    ours = grads_of(losses["critic"], model, critic, stage1)
    expected = grads_of(-(p.detach() * fake.log()).sum(-1).mean(), critic)
    assert same(ours[count : 2 * count], expected, atol=1e-6)
    assert not any(grad.any() for grad in ours[:count] + ours[2 * count :])
    assert torch.allclose(report["sample_gap"], size.mean())


@pytest.mark.parametrize("excess", [0.0, 0.2])
def test_matching_descends_the_reverse_kl(excess):
    """With exact denoisers the gradient is that of log q(y) - log p(y), both renoised: 0 at q = p.

    y = alpha xi + beta p; its factor is alpha^2 / beta^2.
    """
    law = SHARES + excess * torch.tensor([-1.0, 1.0, 0.0])
    data, student = (Oracle(language=(PAIRS, weights)) for weights in (SHARES, law))
    z = normals(20, 2, 3, seed=1).requires_grad_()
    tau = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)[:, None]
    alpha, beta = (1 - tau)[..., None], tau[..., None]
    y = alpha * normals(20, 2, 3, seed=2) + beta * z.softmax(-1)

    def log_density(oracle):  # up to a constant
        away = (y[:, None] - beta[:, None] * oracle.one_hot).square().sum((-2, -1))
        return (oracle.log_weights - away / (2 * alpha[:, 0] ** 2)).logsumexp(-1)

    (expected,) = torch.autograd.grad((log_density(student) - log_density(data)).sum(), z)
    h_real, h_critic = (n(y.detach(), tau, tau).flatten(0, 1) for n in (data, student))
    one = data.head
    _, g = distill.dmd_surrogate(z.detach().flatten(0, 1), h_real, h_critic, one, one)
    assert torch.allclose(g.view(20, 2, 3), alpha**2 / beta**2 * expected, atol=1e-12)
    assert (g.abs().max() > 0.01) == (excess > 0)


def one_step_kl(model):
    """KL(law of one-step samples || SHARES), where other pairs have a share of 1e-3 in all."""
    xi = Draw(9, 0, np.arange(4096), "cpu").normal(2, model.noise_size)
    law = shares(sampled(model, xi, 1), PAIRS)
    law = torch.cat([law, 1 - law.sum(0, keepdim=True)])
    truth = torch.cat([0.999 * SHARES, torch.tensor([0.001], dtype=torch.float64)])
    return (torch.xlogy(law, law) - torch.xlogy(law, truth)).sum()


def test_matching_reaches_the_truth():
    """From stage 1 alone, the one-step law comes near the weights of the language."""
    stage1 = learned_diagonal()
    model, critic = copy.deepcopy(stage1), copy.deepcopy(stage1)
    for network in (model, critic):
        network.embedding.requires_grad_(False)
    objective = distill.distillation(flags("dmd", boundary=1.0), stage1, critic)
    before = one_step_kl(model)
    learn(model, objective, 200, 1e-3, critic=critic)
    assert one_step_kl(model) < 0.25 < before / 5


@pytest.mark.parametrize("how", [("psd", 0), ("esd", 0), ("esd", 0, "joint"), ("esd", 0.25)])
def test_rows_are_shared_out(how, monkeypatch):
    """Diagonal, identity and PSD to data get their shares of any run of rows and their teachers."""
    loss, psd_share, *joint = how
    model, tokens, _ = small_case(32)
    stage1 = None if joint else copy.deepcopy(model)
    seen = []

    def spy(*networks, loss="diagonal", to_data=False, **_):
        seen.append((loss, to_data, list(networks[:-2]), networks[-1].rows.tolist()))
        return {"consistency": torch.tensor(3.0 if to_data else 1.0)}, {}

    monkeypatch.setattr(distill, "diagonal_loss", spy)
    monkeypatch.setattr(distill, "consistency_loss", spy)
    objective = distill.distillation(flags(loss, psd_share=psd_share), stage1)
    losses, _ = objective(model, tokens, Draw(0, 0, np.arange(32, 64), "cpu"))
    even = range(32, 64, 2)
    end = even[3::4] if psd_share else []
    teacher = stage1 if loss == "esd" and not joint else model
    expected = [("diagonal", False, [model], [row + 1 for row in even])]
    expected += [(loss, False, [model, teacher], [row for row in even if row not in end])]
    expected += [("psd", True, [model, model], list(end))] if psd_share else []
    assert seen == expected
    assert losses["consistency"] == 1 + 2 * psd_share
    mask, _ = distill.spread(np.arange(1000), 1 / 7)  # evenly, whoever asks
    counts = np.cumsum(mask)
    assert np.abs(counts[64:] - counts[:-64] - 64 / 7).max() <= 1
    assert (distill.spread(np.arange(37, 99), 1 / 7)[0] == mask[37:99]).all()
    assert distill.spread(np.arange(1000), 0.7)[0].sum() == 700


@pytest.mark.parametrize("sign", [-1, 1])
def test_surgery(sign, monkeypatch):
    """Averaged over ranks, a conflict takes <b, a> a / |a|^2 from b, over all parameters."""
    params = [torch.nn.Parameter(normals(n)) for n in (4, 3)]
    model = SimpleNamespace(held_factor=None, noise_factor=lambda: torch.ones(1))
    a, noise, other = normals(3, 7, seed=1)
    b = sign * a + 0.1 * noise
    means = iter([a.clone(), b.clone()])  # of all ranks; this rank's own gradients differ
    monkeypatch.setattr(train_diagonal, "average", lambda _: list(next(means).split([4, 3])))

    def objective(model, tokens, draw):
        return {"first": other @ torch.cat(params), "second": -other @ torch.cat(params)}, {}

    grads, scalars = train_diagonal.gradients(params, objective, model, [(None, None)], True)
    assert scalars["conflict"] == (sign < 0)
    left = b - (a @ b) / (a @ a) * a if sign < 0 else b
    assert torch.allclose(torch.cat(grads), a + left)


def learn(model, objective, steps, lr, surgery=False, critic=None):
    """Adam on `objective`, on a language of three pairs; the learning rate falls linearly to 0."""
    networks = [model, critic] if critic else [model]
    params = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.0 if critic else 0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = draw_rows(PAIRS, SHARES, 128, step), Draw(0, step, np.arange(128), "cpu")
        grads, _ = train_diagonal.gradients(params, objective, model, [batch], surgery)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


@functools.cache
def learned_diagonal():
    torch.manual_seed(0)
    model = DiT(ModelConfig(3, 2, 2, 64, 2))
    learn(model, functools.partial(train_diagonal.diagonal_loss, power=0.0), 250, 3e-3)
    return model


@torch.no_grad()
def errors(model, euler=False):
    """(KL of the true psi_st to the model's, nats a token; the error of its one-step shares)."""
    oracle = Oracle(steps=60, language=(PAIRS, SHARES))
    progress = distill.draw_progress(Draw(5, 0, np.arange(512), "cpu"), 1 / 8)
    s, _, t, *_ = distill.Jump.between(model, *progress)
    x = oracle.interpolate(normals(512, 2, 3, seed=6), draw_rows(PAIRS, SHARES, 512, 3), s)
    y = (x @ model.embedding.double()).float()
    z = model(y, s.float(), (s if euler else t).float()) @ model.head.T
    kl = weighted_loss(z.double(), oracle.psi(x, s, t).clamp(min=0)).mean()
    xi = Draw(9, 0, np.arange(4096), "cpu").normal(2, model.noise_size)
    return kl, (shares(sampled(model, xi, 1, euler), PAIRS) - SHARES).abs().max()


@pytest.mark.parametrize("case", [("psd", 200, 3e-3), ("lsd", 175, 3e-3), ("esd", 200, 5e-4)])
def test_learning_reaches_the_truth(case):
    """Each loss halves the diagonal's KL to the true psi_st; one step is within 0.1 of it."""
    loss, steps, lr = case
    diagonal_kl, one_step = errors(learned_diagonal(), euler=True)
    assert one_step > 0.3
    model = copy.deepcopy(learned_diagonal())
    model.embedding.requires_grad_(False)
    how = {"lsd": {"form": "signed"}, "esd": {"learned_weight": True, "consistency_power": 0.5}}
    objective = distill.distillation(flags(loss, **how.get(loss, {})), learned_diagonal())
    learn(model, objective, steps, lr, surgery=loss == "psd")
    kl, one_step = errors(model)
    assert kl < diagonal_kl / 2
    assert one_step < 0.1


# ---- Schedule, network, noise and randomness. --------------------------------------------------
@pytest.mark.parametrize("vocab", [2, 27, 50257])
def test_argmax_schedule(vocab):
    """P(argmax x_t = token) is its integral over the token's noise, and linear in tau."""
    r = torch.tensor([0.0, 0.5, 1.0, 3.0, 5.0, 30.0], dtype=torch.float64)
    ours = net.argmax_accuracy(r, vocab)
    assert ours[[0, -1]].tolist() == pytest.approx([1 / vocab, 1], rel=1e-9)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(200))
    below = torch.special.ndtr(nodes + r[:, None]) ** (vocab - 1)
    assert torch.allclose(ours, below @ weights / (2 * math.pi) ** 0.5, rtol=1e-4)
    want = np.array([0.1, 0.5, 0.9])
    b = torch.from_numpy(np.interp(want, *schedule_table("argmax", vocab, 1.0)))
    expected = 1 / vocab + torch.from_numpy(want) * (1 - 1 / vocab)
    assert torch.allclose(net.argmax_accuracy(b / (1 - b), vocab), expected, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("schedule", ["argmax", "linear"])
def test_schedule_times(path, schedule):
    """tau -> t rises from 0 to below 1; beta / alpha has one law on every path, blended (36)."""
    model = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule, interpolant=path))
    tau = torch.linspace(0, 1, 5001, dtype=torch.float64)
    t = model.times(tau[:, None]).squeeze(1)
    assert ((t[0] == 0) & (t.diff() > 0)).all()
    assert model.times(column(net.MAX_PROGRESS)) == t[-1] < 1
    alpha, beta = model.path.alpha(t[1:-1]), model.path.beta(t[1:-1])
    expected = tau[1:-1]
    if schedule == "argmax":
        full, b = schedule_table("argmax", 27, 1.0)
        expected = 0.9 * torch.from_numpy(np.interp(expected, full, b)) + 0.1 * expected
    assert torch.allclose(beta / (alpha + beta), expected, atol=1e-5)


@pytest.mark.parametrize("schedule", ["argmax", "linear"])
def test_position_lag(schedule):
    """Earlier positions first (38), from 0 to the end together; rates are derivatives of times."""
    tau = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
    one = torch.ones_like(tau)
    q, _ = net.lagged(tau, 2.0, 4)
    assert torch.allclose(torch.logit(q[:, :1]) - torch.logit(q[:, -1:]), 2.0 * one)
    assert torch.equal(net.lagged(column(0, 1), 2.0, 4)[0], column(0, 1).expand(2, 4))
    shared = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule))
    model = DiT(ModelConfig(27, 4, 1, 16, 2, schedule=schedule, position_lag=2.0))
    t, rate = model.times_and_rates(tau)
    assert torch.allclose(t, torch.cat([shared.times(part) for part in q.split(1, -1)], -1))
    factor = (model.times(tau + 1e-7) - model.times(tau - 1e-7)) / 2e-7 / rate  # one for each row
    assert (factor.std(-1) / factor.mean(-1)).median() < 1e-6  # it jumps at a table's knots
    assert torch.allclose(rate.mean(-1, keepdim=True), one)
    assert torch.equal(shared.times_and_rates(tau)[1], one)
    block = Conditional(model, None, torch.arange(2, 4))  # a block is a row of its own
    assert torch.equal(block.times(tau), model.times(tau, 2))
    assert same(block.times_and_rates(tau), model.times_and_rates(tau, 2), atol=0)


def test_chunks():
    """Chunks cover all rows, about 2^23 logits each on a CPU, 2^27 elsewhere."""
    assert ROWS_AT_ONCE(50257, torch.device("cpu")) == 128
    assert ROWS_AT_ONCE(50257, torch.device("cuda")) == 2048
    assert ROWS_AT_ONCE(10**9, torch.device("cpu")) == 1
    h = torch.randn(12, 3)
    found = list(net.logit_chunks(h, torch.eye(3)))
    assert [len(z) for _, z in found] == [5, 5, 2]
    assert torch.equal(torch.cat([z for _, z in found]), h)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (40, 40), (3, 7)])
def test_attention(queries, keys, causal):
    """softmax(q k^T / sqrt(d)) v for the last queries, and its tangent; rotary sees distances."""
    q, dq = normals(2, 2, 3, queries, 4)
    k, v, dk, dv = normals(4, 2, 3, keys, 4, seed=1)
    hidden = ~torch.ones(queries, keys).tril(keys - queries).bool() & causal

    def plain(q, k, v):
        return (q @ k.mT / 2).masked_fill(hidden, -math.inf).softmax(-1) @ v

    inputs, moves = (q, k, v), (dq, dk, dv)
    out, tangent = torch.func.jvp(plain, inputs, moves)
    assert torch.allclose(net.attention(q, k, v, causal), out, atol=1e-12)
    with torch.no_grad(), net.sdpa_kernel(net.SDPBackend.MATH):
        ours = torch.func.jvp(lambda *x: net.attention(*x, causal), inputs, moves)[1]
    assert torch.allclose(ours, tangent, atol=1e-12)
    model = DiT(ModelConfig(7, 20, 1, 16, 2)).double()
    q, k = (net.rotate(x.expand(20, 8), model.cos, model.sin) for x in normals(2, 8))
    assert torch.allclose((q @ k.T)[:-1, :-1], (q @ k.T)[1:, 1:], atol=1e-5)
    angle = torch.atan2(model.sin[1], model.cos[1])  # pair i turns by 10000^(-i / half) a place
    assert torch.allclose(angle, 10000.0 ** (-torch.arange(4) / 4).double(), atol=1e-6)


def test_the_start(monkeypatch):
    """Predictions are the shares of the rows' tokens, and W shows frequent ones most of all.

    Blocks do nothing yet (adaLN-zero): every gate starts at 0."""
    V, D, L = 400, 128, 5
    rows = np.random.default_rng(0).zipf(1.5, (300, L)).clip(max=V - 1).astype(np.uint16)
    monkeypatch.setattr(train_diagonal, "read_rows", lambda *_: rows)
    flags = dict(schedule="linear", schedule_blend=0.9, position_lag=0.0, interpolant="linear")
    args = SimpleNamespace(seed=0, size="tiny", data=None, **flags)
    model = train_diagonal.new_model(args, {"vocab_size": V, "seq_len": L})
    counts = np.bincount(rows.ravel(), minlength=V) + 1
    p = torch.from_numpy(counts / counts.sum()).float()
    y, t = normals(2, L, D).float(), torch.tensor([[0.1], [0.9]])
    psi = net.softmax(model(y, t, t) @ model.head.T)
    assert torch.allclose(psi, p.expand_as(psi), rtol=1e-4)
    model.final_modulation.bias.data[D:] = 0.5
    assert torch.allclose(model(y, t, t), 1.5 * net.norm(0.1 * y) + 1, atol=1e-5)
    W = model.embedding.detach()
    assert torch.allclose(W.T @ W, torch.eye(D), atol=1e-5)
    assert (p * W.square().sum(1)).sum() > 0.7 > 2 * D / V
    assert model.config.input_scale == 0.1
    model = train_diagonal.new_model(args, {"vocab_size": 100, "seq_len": L})
    assert torch.allclose(model.embedding @ model.embedding.T, torch.eye(100), atol=1e-5)
    assert not model.head.any()
    assert model.config.input_scale == 1.0


def test_input_scale():
    """Where V > D y enters the residual stream at a tenth, clean tokens of a context too."""
    damped, plain = small_model(input_scale=0.1), small_model()
    y, t = normals(2, 5, 16), torch.tensor([[0.1], [0.9]]).double()
    tokens = torch.tensor([[0, 3, 1], [2, 2, 4]])
    assert torch.equal(damped(y, t, t), plain(0.1 * y, t, t))
    assert not torch.allclose(damped(y, t, t), plain(y, t, t), atol=1e-3)
    found = damped.encode(tokens)
    plain.embedding.data *= 0.1
    for pair, expected in zip(found, plain.encode(tokens), strict=True):
        assert all(map(torch.allclose, pair, expected))


def saved():
    """(hooks, sizes): the sizes of what autograd saves within the hooks go to the list."""
    sizes = []
    return saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x), sizes


@pytest.mark.parametrize("loss", ["diagonal", *sorted(distill.TEACHERS)])
def test_checkpointed_and_compiled_steps(loss, monkeypatch):
    """The same gradients: bit for bit and with less kept, or compiled once for all values."""
    model, tokens, _ = small_case(4)
    totals = []

    def step(case):
        hooks, sizes = saved()
        model.final_modulation.bias.data.copy_(torch.linspace(0, 0.1 * case, 32))
        with hooks:
            draw = Draw(0, case, np.arange(4), "cpu")
            total = loss_of(loss, model, (tokens + case) % V, draw)
        totals.append(sum(sizes))
        return grads_of(total, model)

    plain = step(0)
    model.activation_checkpointing = True
    assert same(step(0), plain, rtol=0, atol=0)
    assert totals[1] < 0.6 * totals[0]
    model.activation_checkpointing = False
    # Traced, but with PyTorch's own kernels: seconds instead of minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    net.maybe_compiled.cache_clear()
    model.compile_parts()
    step(1)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(2)
        assert same(step(0), plain, atol=1e-6)
    net.maybe_compiled.cache_clear()


@pytest.mark.parametrize("kind", ["ce", "signed", "dmd", "kl", "square", "logit"])
def test_losses_stay_in_float32(kind):
    """Under autocast a loss on logits is, bit for bit, that of float32 arithmetic on them."""
    z = 0.1 * torch.randn(6, 999)
    h, dh = torch.randn(2, 6, 8).bfloat16()
    head = (0.1 * torch.randn(999, 8)).bfloat16()
    omega = torch.rand(6, 1)
    correction = h, dh, omega, omega, head, head
    function, *inputs = {
        "ce": (train_diagonal.cross_entropy, torch.arange(6)),
        "signed": (distill.signed, *correction),
        "dmd": (distill.dmd_surrogate, h, dh, head, head),
        "kl": (distill.semigroup, h, dh, omega, head, distill.kl),
        "square": (distill.semigroup, h, dh, omega, head, distill.square),
        "logit": (distill.logit_target, *correction, distill.kl),
    }[kind]
    plain = function(z.clone(), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = function(z.clone(), *inputs)
    for one, other in zip(plain, rough, strict=True):
        pairs = [(one, other)] if torch.is_tensor(one) else [(one[k], other[k]) for k in one]
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("context", [0, 2])
def test_forward_mode_derivative(path, per_position, context):
    """D_s and d/dt of h_st in forward mode are central differences of h; h has its graph."""
    model = small_model(interpolant=path)
    keys = model.encode(torch.randint(40, (3, context))) if context else None
    block = Conditional(model, keys, torch.arange(context, 5))
    y, dy, probe = normals(3, 3, 5 - context, 16)
    s = torch.rand(3, y.shape[1] if per_position else 1, dtype=torch.float64) / 2
    inputs = y, s, s + 0.3
    one = torch.ones_like(s)
    for given in ((dy, one, None), (None, None, one), (dy, 2 * one, 3 * one)):
        h, dh = block.derivative(*inputs, *given)
        moves = tuple(0 * x if dx is None else dx for x, dx in zip(inputs, given, strict=True))
        assert same(h, block(*inputs), atol=1e-10)
        ahead = block(*(x + 1e-6 * dx for x, dx in zip(inputs, moves, strict=True)))
        behind = block(*(x - 1e-6 * dx for x, dx in zip(inputs, moves, strict=True)))
        assert (dh - (ahead - behind) / 2e-6).abs().max() < 1e-7
    assert not dh.requires_grad
    grads = (grads_of((x * probe).sum(), model) for x in (h, block(*inputs)))
    assert same(*grads, atol=1e-10)


@pytest.mark.parametrize("vocab", [40, 33, 32, 10])
def test_embedded_noise(vocab):
    """xi C^T has the law of x0 W: covariance W^T W of any rank, and the gradient of E|x0 W A|^2."""
    model = small_model(vocab)
    W = torch.nn.init.normal_(model.embedding)  # orthogonal at its start, which hides mistakes
    assert model.noise_size == (16 if vocab > 32 else vocab)
    A = normals(16, 3)
    factor = model.embed_noise(torch.eye(model.noise_size, dtype=torch.float64)[None])[0]
    gram = W.T @ W
    assert (factor.T @ factor - gram).abs().max() < 2e-6 * gram.diagonal().mean()  # the jitter
    ours = torch.autograd.grad((factor @ A).square().sum(), W)[0]  # E|y0 A|^2 = |factor A|^2
    plain = torch.autograd.grad((W @ A).square().sum(), W)[0]  # E|x0 W A|^2 = |W A|^2
    assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)
    W.data[:, 0] = W.data[:, 1]
    assert model.noise_factor().isfinite().all()
    W.data.fill_(torch.inf)  # a matrix without a Cholesky factor: the step is skipped
    assert vocab <= 32 or model.noise_factor().isnan().all()


def test_draw():
    """A row's numbers do not depend on the rows drawn with it; each call and step has new ones."""

    def numbers(draw):
        return draw.normal(4, 5), draw.uniform(1), torch.tensor(draw.shared()), draw.normal(4, 5)

    index = np.arange(512)
    whole = numbers(Draw(3, 7, index, "cpu"))
    mask = index // 3 == 2
    for draw in (Draw(3, 7, index[mask], "cpu"), Draw(3, 7, index, "cpu").part(mask)):
        assert same(numbers(draw), [x[mask] if x.ndim else x for x in whole], rtol=0, atol=0)
    later = Draw(3, 7, index, "cpu", calls=3).part(mask)  # as when contexts were drawn before
    assert torch.equal(later.normal(4, 5), whole[3][mask])
    for seed, step in ((3, 8), (4, 7)):
        others = numbers(Draw(seed, step, index, "cpu"))
        assert not any(torch.equal(a, b) for a, b in zip(whole, others, strict=True))
    normal, uniform, _, later = whole
    assert not torch.equal(normal, later)
    assert uniform.flatten().sort().values.diff().max() < 3 / 512  # low discrepancy
    assert abs(normal.mean()) + abs(normal.std() - 1) < 0.04


@pytest.mark.parametrize("to_data", [False, True])
def test_draw_progress(to_data):
    """0 <= s < u < t <= 1, u half-way; a uniform step, s uniform given it; a share of (0, 1)."""
    s, u, t = distill.draw_progress(Draw(0, 0, np.arange(8192), "cpu"), 1 / 32, to_data)
    assert ((s >= 0) & (s < u) & (u < t) & (t <= 1 + 1e-12)).all()
    assert torch.allclose(2 * u, s + t)
    assert torch.allclose(t, torch.ones_like(t)) == to_data
    edge = (s == 0) & (t == 1)
    assert float(edge.double().mean()) == pytest.approx(1 / 32, abs=0.003)
    step = (t - s)[~edge]
    start = step if to_data else s[~edge] / (1 - step)
    assert step.min() > 0.0009
    for x in (0.25, 0.5, 0.75):
        assert float((step < x).double().mean()) == pytest.approx(x, abs=0.02)
        assert float((start < x).double().mean()) == pytest.approx(x, abs=0.02)
    jump = distill.Jump.between(small_model(), s, u, t)
    assert ((jump.s.float() < jump.t.float()) & (jump.t < 1)).all()


# ---- Data, contexts, blocks and guidance. ------------------------------------------------------
def test_pack():
    """Documents are joined by EOS, cut every L - 2 tokens and framed; an incomplete rest drops."""
    (rows,) = prepare_data.pack([[1, 2, 3], [4], [5, 6]], 6, bos=8, eos=9)
    assert rows.tolist() == [[8, 1, 2, 3, 9, 9], [8, 4, 9, 5, 6, 9]]
    documents = [list(range(i % 7)) for i in range(3000)]
    rows = np.concatenate(list(prepare_data.pack(documents, 10, bos=8, eos=9)))
    stream = [t for ids in documents for t in [*ids, 9]]
    assert rows[:, 1:-1].flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert next(prepare_data.pack([range(7)], 3, None, None)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_grammar_is_exact():
    """The entropy is E[-log p] of what is drawn, and one changed word is ungrammatical."""
    rows = prepare_data.grammar_rows(20_000, 1)
    nll = -np.array([prepare_data.grammar_log_prob(row) for row in rows])
    error = nll.std() / len(nll) ** 0.5
    assert abs(nll.mean() - prepare_data.grammar_entropy()) < 4 * error
    assert rows.shape[1] == prepare_data.LONGEST == (rows != 0).sum(1).max()
    words = prepare_data.GRAMMAR_WORDS

    def probability(text):
        row = [words.index(word) for word in text.split()]
        return math.exp(prepare_data.grammar_log_prob(row + [0] * (rows.shape[1] - len(row))))

    # determiner, bare noun, verb at once, determiner, bare object
    expected = 1 / 4 * 1 / 6 * (1 / 2 / 4) * 1 / 2 * (1 / 2 / 5)
    assert probability("a king cooks the soup .") == pytest.approx(expected)
    right = "some farmers near the river read a famous poem ."
    assert probability(right) > 0
    for old, new in (("read", "reads"), ("some", "a"), ("poem", "cake"), (" .", "")):
        assert probability(right.replace(old, new)) == 0


def test_given_is_the_masked_pass():
    """Cached keys, in one part or two, give what one pass with the mask of section 4.2 gives."""
    model = small_model()
    tokens = torch.randint(40, (2, 3))
    places = torch.arange(3, 5)
    y, s, t = inputs = (normals(2, 2, 16), column(0.2, 0.5), column(0.6, 0.9))
    hidden = torch.ones(5, 5).triu(1).bool()  # a context's token sees no later one, a block's all
    hidden[3:] = False

    def dense(q, k, v, causal):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.attention", dense)
        row = torch.cat([model.embedding[tokens], y], 1)
        times = (torch.cat([torch.ones(2, 3), v.expand(2, 2)], 1) for v in (s, t))
        expected = model(row, *times)[:, 3:]
    keys = model.encode(tokens)
    parts = model.encode(tokens[:, 1:], past=model.encode(tokens[:, :1]))
    for known in (keys, parts):
        assert torch.allclose(Conditional(model, known, places)(*inputs), expected, atol=1e-12)
    alone = Conditional(model, keys, places).without_context()(*inputs)
    assert not torch.allclose(alone, expected, atol=1e-3)
    assert torch.equal(alone, Conditional(model, None, places)(*inputs))
    assert same(Conditional(model, None, torch.arange(2))(*inputs), model(*inputs), atol=1e-12)


@pytest.mark.parametrize("how", [("block", 2), ("any", 2), ("any", None)])
def test_by_context(how):
    """Context and block are parts of the row as --context says; the loss is the mean over rows."""
    kind, size = how
    model = small_model()
    L = 6
    model.cos, model.sin = torch.ones(2, L, 4, dtype=torch.float64)  # only tokens matter
    tokens = torch.arange(40 * L).view(40, L) % 40
    args = SimpleNamespace(context=kind, block_size=size, context_dropout=0.25)
    calls = []

    def loss(block, tokens, draw):
        keys = block.context[0][0]
        calls.append((0 if keys is None else keys[0].shape[2], block.positions, tokens, draw.rows))
        half = torch.full((len(tokens), 1), 0.5, dtype=torch.float64)
        h = block(block.embedding[tokens], half, half)
        return {"x": h.square().mean()}, {}

    def run(step, rows=slice(0, 40)):
        draw = Draw(0, step, np.arange(40)[rows], "cpu")
        return train_diagonal.by_context(loss, [model], tokens[rows], draw, args)

    found = []  # for each row its context, and what it would be if it had not been dropped
    for step in range(10):
        calls.clear()
        losses, _ = run(step)
        assert len(calls) <= 9  # four lengths, with and without, and none
        for c, places, block, rows in calls:
            before = places[0].item()
            assert torch.equal(places, torch.arange(before, min(L, before + (size or L))))
            assert torch.equal(block, tokens[torch.from_numpy(rows)][:, places])
            found += [(c, before)] * len(rows)
    assert len(found) == 400
    contexts, starts = np.array(found).T
    assert set(starts) == ({0, 2, 4} if kind == "block" else set(range(L)))
    assert ((contexts == starts) | (contexts == 0)).all()
    assert (contexts > 0)[starts > 0].mean() == pytest.approx(0.75, abs=0.05)  # not dropped
    alone = sum(run(9, slice(i, i + 1))[0]["x"] for i in range(40)) / 40
    assert torch.allclose(losses["x"], alone, atol=1e-12)


def sampling_case():
    """A network of 12 positions, tokens (3, 12), and a function that starts the normals again."""
    torch.manual_seed(1)
    model = DiT(ModelConfig(40, 12, 2, 16, 2)).double().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def start():
        draw = Draw(0, 0, np.arange(3), "cpu")
        return lambda n: draw.normal(n, model.noise_size).double()

    return model, torch.randint(40, (3, 12)), start


@pytest.mark.parametrize("omega", [1.0, 1.7])
@pytest.mark.parametrize("prompt", [0, 2])
def test_blocks_with_and_without_the_cache(omega, prompt):
    """Cached keys give the tokens of fresh ones, also where the window of 12 positions slides."""
    model, tokens, start = sampling_case()
    tokens = tokens[:, :prompt]
    ours = continue_text(model, tokens, 22, 4, start(), omega, nfe=2)
    normal = start()
    n = 4
    while (written := tokens.shape[1]) < 22:
        context = tokens[:, max(0, written + n - 12) :]
        c = context.shape[1]
        block = Conditional(model, model.encode(context) if c else None, torch.arange(c, c + n))
        new = sampled(block, normal(n), 2, guidance=omega if c else 1.0)
        tokens = torch.cat([tokens, new], 1)
    assert torch.equal(ours, tokens[:, :22])
    row = continue_text(model, tokens[:, :prompt], 12, 12, start(), omega, nfe=2)
    short = continue_text(model, tokens[:, :prompt], 5, 12, start(), omega, nfe=2)
    assert torch.equal(short, row[:, :5])  # a block as long as in training, then cut


def test_guidance():
    """psi = psi_0 + omega (psi_c - psi_0) in each jump; omega 0 and 1 are the plain branches."""
    model, tokens, start = sampling_case()
    given = Conditional(model, model.encode(tokens[:, :5]), torch.arange(5, 9))
    xi = start()(4)
    for omega, plain in ((0.0, given.without_context()), (1.0, given)):
        assert torch.equal(sampled(given, xi, 3, guidance=omega), sampled(plain, xi, 3))

    def guided(y, s, t):
        psi_c, psi_0 = (
            (n(y, s, t) @ model.head.T).softmax(-1) for n in (given, given.without_context())
        )
        return psi_0 + 1.8 * (psi_c - psi_0)

    s, t, end = (time.expand(3, 1) for time in model.times(column(0, 0.5, 1)))
    y = model.embed_noise(xi)
    y = model.path.flow_map(y, guided(y, s, t) @ model.embedding, s, t)
    expected = guided(y, t, end).argmax(-1)
    assert torch.equal(sampled(given, xi, 2, guidance=1.8), expected)
