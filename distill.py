"""Stage 2: distil a trained diagonal into a flow map that jumps, by self-consistency.

    python distill.py --loss esd                    # from the run that train_diagonal.py writes
    python distill.py --loss esd --joint --checkpoint runs/new    # both losses, from scratch
    python distill.py --loss dmd --checkpoint runs/owt-esd    # then match the law of its samples

Writes runs/DATA-LOSS/. Half of the rows (under dmd none) go on learning the diagonal (21). The
others learn one identity, by KL(sg[teacher] || psi_st(x_s)) (27, 31, 35) or by its residual:

    psd   semigroup     psi_st = omega psi_su + (1 - omega) psi_ut(X_su)            (23, 64)
    lsd   Lagrangian    psi_st = softmax(z_tt(X_st) - log(1 + C delta))             (24, 29)
    esd   Eulerian      psi_st = softmax(z_ss - log(1 - delta / kappa))             (25, 33)

delta = dz - <psi_st, dz>, with dz the derivative of the logits z_st; omega, C and E = Gamma / kappa
are in model.Interpolant. Who teaches whom ("itself" is the student, its gradient stopped):

    rows        --loss        student        teacher
    diagonal    all           psi_tt         the tokens; with --diagonal-from stage1 its psi_tt
    others      psd           psi_st         itself: psi_su and psi_ut
                lsd           psi_st         stage 1's psi_tt at X_st, and itself: d/dt psi_st
                esd           psi_st         stage 1's psi_ss, and itself: D_s psi_st along the flow
                dmd           psi_s1         stage 1 and a critic, which the student's samples teach

With --joint there is no stage 1: the student is the teacher everywhere. The --checkpoint may then
be untrained: `python train_diagonal.py --steps 0 --out runs/new` writes one.

In short runs --loss psd collapses with its default weights, the paper's: add --no-learned-weight
--consistency-power 0.

--loss dmd learns no identity: it moves the law of one-jump samples to that of the data, see
`matching_loss`. It is not in the paper, and starts from a flow map or from stage 1 itself.
"""

import argparse
import copy
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_diagonal
from model import RowLoss, entropy, head_loss, in_autocast_dtype, load_model, logit_chunks, softmax
from prepare_data import new_parser, read_meta, same_tokens, say
from train_diagonal import by_context, diagonal_loss


# ---- The jumps. --------------------------------------------------------------------------------
class Jump(NamedTuple):
    """Times s <= u <= t, (B, 1) or (B, L), and how fast s and t move with the row's progress.

    The rates are 1, unless each position has times of its own (38): then they are d time / d
    progress, scaled to a mean of 1. Derivatives are taken along them, then divided by them."""

    s: torch.Tensor
    u: torch.Tensor
    t: torch.Tensor
    ds: torch.Tensor
    dt: torch.Tensor

    @classmethod
    def between(cls, model, s, u, t):
        """From progress s <= u <= t, float64 (B, 1) each."""
        s, ds = model.times_and_rates(s)
        u, _ = model.times_and_rates(u)
        t, dt = model.times_and_rates(t)
        return cls(s, u, t, ds, dt)


def draw_progress(draw, boundary, to_data=False):
    """Progress s <= u <= t, float64 (B, 1) each: a uniform step, its start uniform, u half-way.

    A share `boundary` of the rows jumps from noise to data, and to_data ends every jump at data.
    No step is shorter than 0.001: at s = t nothing is learned and the semigroup is 0/0."""
    step, start, edge = draw.uniform(3)[:, :, None].unbind(1)
    step = torch.where(edge < boundary, 1.0, 0.001 + 0.999 * step)
    s = 1 - step if to_data else start * (1 - step)
    return s, s + step / 2, s + step


# ---- The three teachers. A new loss is an entry of TEACHERS. -----------------------------------
# They return the student's h_st (B, L, D) with its graph, and a RowLoss whose target is a constant
# of the gradient. `teacher` gives psi_ss or psi_tt.
def psd(model, teacher, y, jump, args):
    """Semigroup: q = omega psi_su(y) + (1 - omega) psi_ut(X_su(y)) (23, 64), from the student."""
    s, u, t = jump.s, jump.u, jump.t
    with torch.no_grad():
        h_su = model(y, s, u)
        X_su = model.path.flow_map(y, model.soft_embedding(h_su), s, u)
        h_ut = model(X_su, u, t)
    omega = per_row(model.path.omega(s, u, t), y)
    by_row = h_su.flatten(0, 1), h_ut.flatten(0, 1), omega
    shared = in_autocast_dtype(model.head), DIVERGENCES[args.divergence]
    return model(y, s, t), RowLoss(semigroup, by_row, shared)


def semigroup(z, h_su, h_ut, omega, head, divergence):
    """From psi_st to the target omega psi_su + (1 - omega) psi_ut, which does not depend on z."""
    psi_su = softmax(h_su @ head.T)
    psi_ut = softmax(h_ut @ head.T)
    return divergence(z, psi_su.mul_(omega).addcmul_(psi_ut, 1 - omega))


def lsd(model, teacher, y, jump, args):
    """Lagrangian: psi_st = psi_tt(X_st) - C d/dt psi_st (24, 29, 68)."""
    s, t = jump.s, jump.t
    h, dh = model.derivative(y, s, t, dt=jump.dt)
    with torch.no_grad():
        X_st = model.path.flow_map(y, model.soft_embedding(h), s, t)
        h_tt = teacher(X_st, t, t)
    C = model.path.C(s, t)
    # psi_st - psi_tt(X_st) + (C / dt) d/dt psi_st = 0
    return h, identity_target(model, teacher, h_tt, dh, torch.ones_like(C), C / jump.dt, args)


def esd(model, teacher, y, jump, args):
    """Eulerian: psi_st = psi_ss + D_s psi_st / kappa (25, 33, 43, 70), D_s along the flow."""
    s, t = jump.s, jump.t
    with torch.no_grad():
        h_ss = teacher(y, s, s)
        drift = model.path.drift(y, teacher.soft_embedding(h_ss), s)  # b_s(y)
    h, dh = model.derivative(y, s, t, dy=jump.ds[..., None] * drift, ds=jump.ds)
    # Gamma (psi_st - psi_ss) - (E / ds) D_s psi_st = 0: (25) times Gamma, finite at t = 1.
    Gamma = model.path.Gamma(s, t)
    E = model.path.E(s, t)
    return h, identity_target(model, teacher, h_ss, dh, Gamma, -E / jump.ds, args)


TEACHERS = {"psd": psd, "lsd": lsd, "esd": esd}


def identity_target(model, teacher, h_teacher, dh, a, b, args):
    """A `RowLoss` whose fixed point satisfies the identity a (psi_st - psi) + b d psi_st = 0.

    psi = softmax(z) is the teacher's, from h_teacher (B, L, D); d psi_st = psi_st delta, from the
    student's derivative dh (B, L, D). a and b are (B, 1 or L): 1 and C for LSD, Gamma_st and
    -E = -Gamma_st / kappa for ESD, b divided by the positions' rates. Two forms of it:

        logit    q = softmax(z - log(a + b delta)) (29, 33), always a distribution.
        signed   p - q = a (psi_st - psi) + b psi_st delta: no logarithm, finite at t = 1.

    LSD is better conditioned in the signed form: its logit form divides a vanishing psi_tt by a
    vanishing 1 + C delta for every token that time t has ruled out."""
    by_row = h_teacher.flatten(0, 1), dh.flatten(0, 1), per_row(a, dh), per_row(b, dh)
    heads = in_autocast_dtype(teacher.head), in_autocast_dtype(model.head)
    if args.form == "signed":
        return RowLoss(signed, by_row, heads)
    return RowLoss(logit_target, by_row, (*heads, DIVERGENCES[args.divergence]))


def derivatives(z, h_teacher, dh, teacher_head, head):
    """The teacher's logits, psi_st and delta, (n, V) each."""
    dz = (dh @ head.T).to(z.dtype)
    psi_st = softmax(z)
    delta = dz.sub_((psi_st * dz).sum(-1, keepdim=True))
    return (h_teacher @ teacher_head.T).to(z.dtype), psi_st, delta


CLAMP = 1e-5  # floor of the logarithm's argument, relative to a + |b|


def logit_target(z, h_teacher, dh, a, b, teacher_head, head, divergence):
    """The "logit" form of `identity_target`; reports "clamped", a share of the vocabulary.

    softmax ignores a factor in the logarithm: 1 - delta / kappa = (Gamma - E delta) / Gamma, so
    a + b delta serves. A network's may be negative, unlike the true flow map's: the share that is
    clamped is the best health signal of a run."""
    z_teacher, _, delta = derivatives(z, h_teacher, dh, teacher_head, head)
    argument = delta.mul_(b).add_(a)
    floor = CLAMP * (a + b.abs())
    clamped = (argument < floor).sum(-1) / argument.shape[-1]
    report, g = divergence(z, softmax(z_teacher.sub_(argument.clamp_(min=floor).log_())))
    return report | {"clamped": clamped}, g


def per_row(value, y):
    """Times or coefficients (B, 1 or L) as a column (B L, 1) for the rows of y (B, L, D)."""
    return value.expand(y.shape[:2]).reshape(-1, 1)


# ---- Divergences between psi_st = softmax(z) and q, (n, V) each: a report, and g on z. ---------
def kl(z, q):
    """KL(q || psi_st) (27, 31, 35); the gradient on the logits is psi_st - q."""
    log_p = z.log_softmax(-1)
    H = entropy(q)
    loss = -H - (q * log_p).sum(-1)  # autocast would round torch.linalg.vecdot to bfloat16
    g = log_p.exp_().sub_(q)
    distance = torch.linalg.vector_norm(g, dim=-1)
    return {"loss": loss, "distance": distance, "teacher_entropy": H}, g


def square(z, q):
    """|q - psi|^2 / 2, the closest peers' loss; its gradient is psi (d - <psi, d>), d = psi - q."""
    p = softmax(z)
    d = p - q
    distance = torch.linalg.vector_norm(d, dim=-1)
    g = p.mul_(d - (p * d).sum(-1, keepdim=True))
    return {"loss": distance.square() / 2, "distance": distance, "teacher_entropy": entropy(q)}, g


DIVERGENCES = {"kl": kl, "square": square}


def signed(z, h_teacher, dh, a, b, teacher_head, head):
    """The "signed" form of `identity_target`: the logits' gradient is the identity's residual.

    Its target may have negative entries and so no KL: the loss is |p - q|^2 / 2."""
    z_teacher, psi_st, delta = derivatives(z, h_teacher, dh, teacher_head, head)
    psi = softmax(z_teacher)
    g = a * (psi_st - psi) + b * psi_st * delta
    distance = torch.linalg.vector_norm(g, dim=-1)
    loss = distance.square() / 2
    return {"loss": loss, "distance": distance, "teacher_entropy": entropy(psi)}, g


# ---- The objective of stage 2: the diagonal on some rows, consistency on the others (16). ------
def consistency_loss(model, teacher, tokens, draw, args, loss, to_data=False):
    """KL(sg[teacher] || psi_st(x_s)) (27, 31, 35), or as args ask; `loss` is a key of TEACHERS.

    It is weighted by (45) with c = 1e-6, and a learned w of the times makes it exp(-w) loss + w.
    to_data: all jumps end at data; w is off, since it is fitted to the losses of other rows."""
    B, L = tokens.shape
    jump = Jump.between(model, *draw_progress(draw, args.boundary, to_data))
    jump = Jump(*(v.float().to(tokens.device, non_blocking=True) for v in jump))
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, jump.s)
    h, row_loss = TEACHERS[loss](model, teacher, y, jump, args)
    w = torch.zeros_like(jump.s)
    if args.learned_weight and not to_data:
        w = model.log_scale(jump.s, jump.s if loss == "psd" else jump.t).float()
    w = w.expand(B, L).flatten()
    scale = torch.exp(-w.detach()) / (B * L)
    how = dict(c=1e-6, r=args.consistency_power, compiled=model.compiled)
    total, report = head_loss(h.flatten(0, 1), model.head, scale, row_loss, **how)
    # The network's gradient is that of `total`; the value, and the gradient on w, are these.
    learned = (torch.exp(-w) * report.pop("weighted") + w).mean()
    total = total - total.detach() + learned
    is_square = args.divergence == "square" or row_loss.function is signed
    report["consistency_square" if is_square else "consistency_kl"] = report.pop("loss")
    return {"consistency": total}, {name: value.mean() for name, value in report.items()}


# ---- Distribution matching (Simplex-DMD, arXiv 2609.40235; DMD, arXiv 2311.18828). -------------

RENOISED = 0.8  # the largest progress of a data row from which a jump to data is matched


def matching_loss(model, critic, stage1, tokens, draw, args):
    """The reverse KL between renoised one-jump samples and renoised data, and the critic's loss.

    The sample is the soft p = psi_s1(x_s), with s = 0 for a share args.boundary of the rows and
    uniform progress up to RENOISED for the others. Renoised to time tau, of uniform progress, it is
    x = alpha x0 + beta p. The score of a law renoised like this is (beta psi - x) / alpha^2,
    where psi is the posterior mean of x1 under that law. So the KL's gradient on p is, up to a
    positive factor,

        d = psi_critic(x) - psi_real(x)

    with stage 1 for psi_real, and the critic, trained by KL(sg[p] || psi_critic(x)), for the
    student's own law. With T = args.teacher_temperature below 1, psi_real is stage 1's psi^(1/T),
    made to sum to 1: no longer that KL, but samples less varied than stage 1's own.
    d is divided by the mean over the row of |p - psi_real|_1, at least 0.01.
    Where V > D networks see x as x W: the exact gradient is d projected on W's span; we use d."""
    B, L = tokens.shape
    start, edge, level = draw.uniform(3)[:, :, None].unbind(1)
    start = torch.where(edge < args.boundary, 0.0, RENOISED * start)
    times = (model.times(progress) for progress in (start, torch.ones_like(start), level))
    s, t, tau = (time.float().to(tokens.device, non_blocking=True) for time in times)
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, s)
    h = model(y, s, t)
    with torch.no_grad():
        sample = model.soft_embedding(h)
        renoised = model.interpolate(draw.normal(L, model.noise_size), sample, tau)
        h_real = stage1(renoised, tau, tau).flatten(0, 1) / args.teacher_temperature
    h_critic = critic(renoised, tau, tau).flatten(0, 1)
    h = h.flatten(0, 1)
    size = denoising_distance(model, h, stage1, h_real).view(B, L).mean(-1, keepdim=True)
    size = size.clamp(min=0.01).expand(B, L).flatten()
    how = dict(c=1.0, r=0.0, compiled=model.compiled)
    heads = in_autocast_dtype(stage1.head), in_autocast_dtype(critic.head)
    gap = RowLoss(dmd_surrogate, (h_real, h_critic.detach()), heads)
    loss, report = head_loss(h, model.head, 1 / (B * L * size), gap, **how)
    own = RowLoss(from_teacher, (h.detach(),), (in_autocast_dtype(model.head),))
    scale = torch.full_like(size, 1 / (B * L))
    critic_loss, critic_report = head_loss(h_critic, critic.head, scale, own, **how)
    scalars = {"matching_distance": report["distance"], "critic_kl": critic_report["loss"]}
    scalars |= {"sample_entropy": critic_report["teacher_entropy"], "sample_gap": size}
    losses = {"matching": loss, "critic": critic_loss}
    return losses, {name: value.mean() for name, value in scalars.items()}


def denoising_distance(model, h, stage1, h_real):
    """|p - psi_real|_1 (N,) of hidden vectors h and h_real (N, D), without a gradient."""
    real_head = in_autocast_dtype(stage1.head)
    parts = []
    for rows, z in logit_chunks(h, model.head):
        parts.append((softmax(z) - softmax(h_real[rows] @ real_head.T)).abs().sum(-1))
    return torch.cat(parts)


def dmd_surrogate(z, h_real, h_critic, real_head, critic_head):
    """<sg[d], p> for p = softmax(z), d = psi_critic - psi_real; the gradient is p (d - <p, d>)."""
    d = softmax(h_critic @ critic_head.T) - softmax(h_real @ real_head.T)
    p = softmax(z)
    loss = (p * d).sum(-1)
    return {"loss": loss, "distance": torch.linalg.vector_norm(d, dim=-1)}, p * (d - loss[:, None])


# ---- The diagonal in stage 2, and all rows together. -------------------------------------------
def diagonal_from_stage1(model, stage1, tokens, draw, args):
    """The diagonal learned from stage 1: KL(sg[q] || psi_tt(x_t)) instead of (22).

    q is stage 1's psi_tt, far less noisy than a token. With args.guidance it is the guided one:
    then the student needs one network call a step where guidance needs two."""

    @torch.no_grad()
    def target(y, t):
        head = in_autocast_dtype(stage1.head)
        h = stage1(y, t, t).flatten(0, 1)
        if args.guidance == 1:
            return RowLoss(from_teacher, (h,), (head,))
        h_0 = stage1.without_context()(y, t, t).flatten(0, 1)
        return RowLoss(guided, (h, h_0), (args.guidance, head))

    return diagonal_loss(model, tokens, draw, args.diagonal_power, target)


def from_teacher(z, h, head):
    """KL(psi || softmax(z)), psi from the hidden vectors h of another network."""
    return kl(z, softmax(h @ head.T))


def guided(z, h_c, h_0, guidance, head):
    """`from_teacher` for psi_0 + guidance (psi_c - psi_0) (section 4.2), cut at 0, of sum 1."""
    psi_c = softmax(h_c @ head.T)
    psi_0 = softmax(h_0 @ head.T)
    q = (psi_0 + guidance * (psi_c - psi_0)).clamp(min=0)
    return kl(z, q / q.sum(-1, keepdim=True))


def distillation(args, stage1=None, critic=None):
    """The objective of stage 2, with the frozen stage1 if it is needed, and the critic of dmd."""
    teacher = stage1 if stage1 and args.loss != "psd" else None  # None: the student itself
    on_diagonal = functools.partial(diagonal_loss, power=args.diagonal_power)
    if args.diagonal_from == "stage1":
        on_diagonal = functools.partial(diagonal_from_stage1, args=args)
    own_loss = functools.partial(consistency_loss, args=args, loss=args.loss)
    if args.loss == "dmd":
        own_loss = functools.partial(matching_loss, args=args)
    jumps_to_data = functools.partial(consistency_loss, args=args, loss="psd", to_data=True)

    def objective(model, tokens, draw):
        def on_rows(mask, loss, *networks):
            rows = torch.from_numpy(np.flatnonzero(mask)).to(tokens.device, non_blocking=True)
            return by_context(loss, networks, tokens[rows], draw.part(mask), args)

        is_diagonal, index = spread(draw.rows, args.diagonal_share)
        to_data = ~is_diagonal & spread(index, args.psd_share)[0]
        losses = {}
        scalars = {}
        if is_diagonal.any():
            networks = [model, stage1] if args.diagonal_from == "stage1" else [model]
            losses, scalars = on_rows(is_diagonal, on_diagonal, *networks)
        networks = [model, critic, stage1] if args.loss == "dmd" else [model, teacher or model]
        more, report = on_rows(~is_diagonal & ~to_data, own_loss, *networks)
        losses |= more
        scalars |= report
        if args.psd_share:
            more, report = on_rows(to_data, jumps_to_data, model, model)
            rest = (1 - args.psd_share) * losses["consistency"]
            losses["consistency"] = rest + args.psd_share * more["consistency"]
            scalars |= {f"to_data_{name}": value for name, value in report.items()}
        return losses, scalars

    return objective


def spread(rows, share):
    """(chosen, index) for `rows`, an int array (n,) of indices into the global batch.

    chosen: true for an evenly spread share of all rows, so micro-batches and ranks change nothing.
    index: numbers the rows that are not chosen."""
    before = np.floor(rows * share + 1e-9).astype(int)
    after = np.floor((rows + 1) * share + 1e-9).astype(int)
    return after > before, rows - before


# ---- Machinery: skip at first reading. ---------------------------------------------------------
def distillation_flags(parser):
    """The flags of stage 2 alone."""
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("distillation").add_argument
    add("--loss", choices=[*TEACHERS, "dmd"], required=True, help="an identity, or dmd")
    add("--checkpoint", type=Path, help="stage 1; dmd also a map (default: runs/DATA-diagonal)")
    add("--critic-lr", type=float, default=1e-3, help="of dmd: learning rate of the critic")
    add("--teacher-temperature", type=float, default=1.0, help="of dmd: T of stage 1's psi^(1/T)")
    add("--joint", action="store_true", help="no stage 1: the student teaches itself everything")
    add("--form", choices=["logit", "signed"], help="target (default: lsd signed, else logit)")
    add("--divergence", choices=list(DIVERGENCES), default="kl", help="between teacher and psi_st")
    add("--diagonal-share", type=float, help="share of diagonal rows (default: 0.5; dmd 0)")
    add("--diagonal-from", choices=["data", "stage1"], help="tokens or stage 1 (default: data)")
    add("--psd-share", type=float, default=0.0, help="of lsd, esd: share of the others on psd rows")
    add("--boundary", type=float, help="share of noise-to-data jumps (default: 1/32; dmd 1)")
    add("--consistency-power", type=float, default=0.5, help="r of (45); 0 is the plain loss")
    add("--learned-weight", action=yes_no, default=True, help="learn a weight of the times")
    add("--surgery", action=yes_no, help="project conflicting gradients (default: with psd)")
    add("--guidance", type=float, default=1.0, help="distil the map guided by this; 1 is plain")


def set_defaults(args):
    """Fill in the flags whose defaults depend on --loss, --joint and --guidance."""
    dmd = args.loss == "dmd"
    defaults = dict(
        out=Path("runs") / (f"{args.data.name}-{args.loss}" + ("-joint" if args.joint else "")),
        checkpoint=Path("runs") / f"{args.data.name}-diagonal",
        steps=10_000 if dmd else 1_000_000 if args.joint else 100_000,
        form="signed" if args.loss == "lsd" and args.divergence == "kl" else "logit",
        diagonal_share=0.0 if dmd else 0.5,
        diagonal_from="data" if args.guidance == 1 else "stage1",
        boundary=1.0 if dmd else 1 / 32,
        surgery=args.loss == "psd",
    )
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})


def refuse_contradictions(args):
    """SystemExit for flags with which the run would silently be something else."""
    identity = args.loss in ("lsd", "esd")
    is_kl = args.divergence == "kl"
    plain = args.guidance == 1
    from_data = args.diagonal_from == "data"
    guidable = args.loss == "psd" and args.context and args.context_dropout and not from_data
    diagonal = args.micro_batch * args.diagonal_share
    to_data = (args.micro_batch - diagonal) * args.psd_share
    whole = all(abs(n - round(n)) < 1e-6 for n in (diagonal, to_data))
    others = max(args.diagonal_share, args.psd_share) < 1 and (diagonal or args.loss == "dmd")
    rows = f"--micro-batch {args.micro_batch} has {diagonal:g} diagonal and {to_data:g} --psd-share"
    for text, fine in {
        "--form signed needs lsd or esd, and KL": args.form == "logit" or (identity and is_kl),
        "--loss dmd needs KL": args.loss != "dmd" or is_kl,
        "--joint excludes dmd, --guidance and --diagonal-from stage1": not args.joint
        or (args.loss != "dmd" and plain and from_data),
        "--guidance needs --loss psd, --diagonal-from stage1 and a stage 1 with --context and its "
        "dropout": plain or guidable,
        "--psd-share needs --loss lsd or esd": identity or not args.psd_share,
        f"{rows} rows: give whole numbers, and leave others": whole and others,
    }.items():
        if not fine:
            raise SystemExit(text)


def load_networks(args, meta, resumed):
    """(student, frozen stage 1): from the dict `resumed` or, in a new run, from args.checkpoint.

    The student is a copy of stage 1 or, for dmd and to resume, a map; it sets the context flags."""
    model, checkpoint = load_model(resumed or args.checkpoint)
    earlier = checkpoint["args"]
    say(f"from a checkpoint of step {checkpoint.get('step')} of {earlier['steps']}")
    same_tokens(args.checkpoint, checkpoint["meta"], args.data, meta, "seq_len")
    if checkpoint["meta"]["sha256"] != meta["sha256"]:
        say(f"{args.checkpoint} was trained on other rows than those of {args.data}")
    has_stage1 = "stage1" in checkpoint or earlier.get("joint")  # what DMD trusts
    if "loss" in earlier and not resumed and (args.loss != "dmd" or not has_stage1):
        raise SystemExit(f"{args.checkpoint} is a map: name a stage 1, or for dmd a map with one")
    if args.loss == "dmd" and earlier.get("guidance", 1) != 1:
        raise SystemExit(f"{args.checkpoint} was distilled with guidance: --loss dmd would undo it")
    if args.loss == "dmd" and earlier.get("diagonal_power"):
        say(f"{args.checkpoint} was trained with --diagonal-power: DMD learns its bias, see README")
    for name in ("context", "block_size", "context_dropout"):
        setattr(args, name, earlier.get(name))
    stage1 = copy.deepcopy(model, {id(model.embedding): model.embedding})  # shared, as it is frozen
    if "stage1" in checkpoint:
        stage1.load_state_dict(checkpoint["stage1"])
    model.train().requires_grad_(True)
    model.embedding.requires_grad_(args.joint)  # else all networks must see the same y = x W
    return model, stage1


def main():
    parser = new_parser(__doc__)
    distillation_flags(parser)
    train_diagonal.training_flags(parser, None, "default: 100000; dmd 10000, --joint 1000000")
    args = train_diagonal.parse(parser)
    set_defaults(args)
    ranks = train_diagonal.start_ranks(args)
    meta = read_meta(args.data)
    resumed = train_diagonal.read_resumed(args, meta)
    model, stage1 = load_networks(args, meta, resumed)
    refuse_contradictions(args)
    critic = None
    if args.loss == "dmd":
        critic = copy.deepcopy(stage1).train().requires_grad_(True)
        critic.embedding.requires_grad_(False)
    if args.joint:
        stage1 = None
    elif args.loss != "psd" or args.diagonal_from == "stage1":  # else it only goes into checkpoints
        stage1.to(ranks[-1])
        if args.compile:
            stage1.compile_parts(dynamic=bool(args.context))
    objective = distillation(args, stage1, critic)
    train_diagonal.train(args, ranks, model, objective, meta, resumed, stage1, critic)


if __name__ == "__main__":
    main()
