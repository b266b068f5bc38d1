"""Stage 2: distil a trained diagonal into a flow map that jumps, by self-consistency.

    python distill.py --loss esd                        # from the run that train_diagonal.py writes by default
    torchrun --nproc_per_node=8 distill.py --loss psd
    python distill.py --data data/grammar --loss lsd --steps 1000 --warmup 100 --batch-size 256
    python distill.py --loss esd --joint                # both losses at once, from scratch

Reads data/NAME and a stage-1 checkpoint. Writes runs/NAME-LOSS/ as stage 1 does: config.json, log.jsonl,
checkpoint.pt. Half of the rows go on learning the diagonal (21), the others learn one identity of the
mean denoiser, by KL(sg[teacher] || psi_st(x_s)) (27, 31, 35) with x_s drawn from the interpolant:

    psd   the semigroup, two jumps make one      psi_st = omega psi_su + (1 - omega) psi_ut(X_su)         (23, 64)
    lsd   the Lagrangian, d/dt                   psi_st = softmax(z_tt(X_st) - log(1 + C delta))          (24, 29)
    esd   the Eulerian, D_s along the flow       psi_st = softmax(z_ss - log(1 - delta / kappa))          (25, 33)

The embedding W stays as stage 1 left it, so that student and teacher see the same y = x W.
"""

import copy
import functools
import hashlib
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import DIVERGENCES, Divergence, entropy, head_loss, kl, load_model, lowered, signed, softmax, wide
from prepare_data import Parser, UserError, number, read_meta, run, same_tokens
from train_diagonal import (
    by_context,
    check_context,
    context_flags,
    diagonal,
    model_flags,
    new_model,
    parse_training_args,
    quarters,
    start_ranks,
    train,
    training_flags,
)

# ------------------------------------------------------------------------------------------------
# The jumps.


class Jump(NamedTuple):
    """Times s <= u <= t of the path, (B, 1) or (B, L), and the rates of s and t: their derivatives in progress.

    One time shared by all positions has rate 1. Where each position has its own (38), D_s and d/dt are
    the derivatives along the common progress, so position l's identity carries its own rate.
    """

    s: torch.Tensor
    u: torch.Tensor
    t: torch.Tensor
    ds: torch.Tensor
    dt: torch.Tensor

    @classmethod
    def between(cls, model, s, u, t):
        """From progress s <= u <= t, float64 (B, 1) each."""
        (s, ds), (u, _), (t, dt) = (model.times_and_rates(tau) for tau in (s, u, t))
        return cls(s, u, t, ds, dt)


def draw_progress(draw, boundary, law="uniform", to_data=False):
    """Progress s <= u <= t, float64 (B, 1) each: a step by `law`, its start uniform (to_data: t = 1), u half-way.

    law: the step is uniform on (0.001, 1), or that between a "pair" of uniform times (at s = t nothing
    would be learned, and the semigroup is 0/0). A share `boundary` of the rows goes all the way from noise to data.
    """
    step, start, edge = draw.uniform(3)[:, :, None].unbind(1)
    step = 0.001 + 0.999 * {"uniform": step, "pair": 1 - (1 - step).sqrt()}[law]
    step = torch.where(edge < boundary, 1.0, step)
    s = 1 - step if to_data else start * (1 - step)
    return s, s + step / 2, s + step


# ------------------------------------------------------------------------------------------------
# The teachers. Each takes (model, teacher, y, jump, args) and returns the student's hidden vectors h_st
# (B, L, D), with their graph, and a Divergence for model.head_loss, whose target is a constant.
# `teacher` gives the instantaneous denoiser: the frozen stage-1 network, the average, or the student itself.


def psd(model, teacher, y, jump, args):
    """Semigroup: q = omega psi_su(y) + (1 - omega) psi_ut(X_su(y)) (23, 64); the student teaches itself."""
    s, u, t = jump[:3]
    with torch.no_grad():
        h_su = model(y, s, u)
        X_su = model.path.flow_map(y, model.soft_embedding(h_su), s, u)
        h_ut = model(X_su, u, t).flatten(0, 1)
        h_su = h_su.flatten(0, 1)
        omega = a_row_each(model.path.omega(s, u, t), y)
    return model(y, s, t), Divergence(DIVERGENCES[args.divergence](semigroup), (h_su, h_ut, omega), (lowered(model.head),))


def semigroup(z, h_su, h_ut, omega, head):
    """omega psi_su + (1 - omega) psi_ut, from hidden vectors; the student's own logits z play no part."""
    psi_su, psi_ut = (softmax(wide(h @ head.T)) for h in (h_su, h_ut))
    return psi_su.mul_(omega).addcmul_(psi_ut, 1 - omega), {}


def lsd(model, teacher, y, jump, args):
    """Lagrangian: psi_st = psi_tt(X_st) - C d/dt psi_st (24, 29, 68), the derivative along the progress of t."""
    s, _, t, _, dt = jump
    h, dh = model.derivative(y, s, t, dt=dt)
    with torch.no_grad():
        X_st = model.path.flow_map(y, model.soft_embedding(h), s, t)
        h_tt = teacher(X_st, t, t)
    C = model.path.C(s, t)
    return h, corrected(model, teacher, h_tt, dh, torch.ones_like(C), C / dt, args)


def esd(model, teacher, y, jump, args):
    """Eulerian: psi_st = psi_ss + D_s psi_st / kappa (25, 33, 43, 70), the derivative along the flow."""
    s, _, t, ds, _ = jump
    with torch.no_grad():
        h_ss = teacher(y, s, s)
        drift = model.path.drift(y, teacher.soft_embedding(h_ss), s)  # b_s(y)
    h, dh = model.derivative(y, s, t, dy=ds[..., None] * drift, ds=ds)
    a, b = model.path.eulerian(s, t)
    return h, corrected(model, teacher, h_ss, dh, a, -b / ds, args)


def corrected(model, teacher, h, dh, a, b, args):
    """The divergence from the identity a (psi_st - psi) + b d psi_st = 0, psi = softmax(h, by the teacher's head).

    dz is the derivative of the student's logits, so d psi_st = psi_st delta, delta = dz - <psi_st, dz>. Two
    forms with the same fixed point (args.target), h and dh (B, L, D), a and b (B, 1 or L):

        logit    q = softmax(z - log(a + b delta)) (29, 33), always a distribution. For the true map the
                 log's argument is positive; for a network it need not be, so it is kept above args.clamp (a + |b|),
                 and the share of clamped entries is reported.
        signed   p - q = a (psi_st - psi) + b psi_st delta: no logarithm, no clamp, and no 0/0 at t = 1. For ESD this
                 is the target damped towards the prediction: q = a psi_ss + (1 - a) psi_st + (t - s) psi_st delta,
                 a = (1 - t)/(1 - s), on the linear path.
    """
    by_row = h.flatten(0, 1), dh.flatten(0, 1), a_row_each(a, h), a_row_each(b, h)
    heads = lowered(teacher.head), lowered(model.head)
    if args.target == "signed":
        return Divergence(signed(residual), by_row, heads)
    return Divergence(DIVERGENCES[args.divergence](corrected_logits), by_row, (*heads, args.clamp))


def derivatives(z, h, dh, teacher_head, head):
    """The teacher's logits, psi_st and delta, (n, V) each."""
    z_teacher, dz, psi_st = wide(h @ teacher_head.T), wide(dh @ head.T), softmax(z)
    return z_teacher, psi_st, dz.sub_(torch.linalg.vecdot(psi_st, dz)[:, None])


def corrected_logits(z, h, dh, a, b, teacher_head, head, clamp):
    """The "logit" form of `corrected`: (q, {"clamped": share})."""
    z_teacher, _, delta = derivatives(z, h, dh, teacher_head, head)
    argument, floor = delta.mul_(b).add_(a), clamp * (a + b.abs())
    clamped = (argument < floor).sum(-1) / argument.shape[-1]
    return softmax(z_teacher.sub_(argument.clamp_(min=floor).log_())), {"clamped": clamped}


def residual(z, h, dh, a, b, teacher_head, head):
    """The "signed" form of `corrected`: (p - q, report)."""
    z_teacher, psi_st, delta = derivatives(z, h, dh, teacher_head, head)
    psi = softmax(z_teacher)
    return a * (psi_st - psi) + b * psi_st * delta, {"teacher_entropy": entropy(psi)}


def a_row_each(value, y):
    """Times or coefficients (B, 1 or L) as a column (B L, 1) beside the rows of y (B, L, *)."""
    return value.expand(y.shape[:2]).reshape(-1, 1)


TEACHERS = {"psd": psd, "lsd": lsd, "esd": esd}


# ------------------------------------------------------------------------------------------------
# The objective of stage 2: the diagonal on some rows, consistency on the others.


def consistency(model, teacher, tokens, draw, args, loss, to_data=False):
    """KL(sg[teacher] || psi_st(x_s)) (27, 31, 35), or what args asks for in its place, weighted by (45) with c = 1e-6, then by exp(-w).

    loss: a key of TEACHERS. to_data: all jumps end at data, and w = 0: it is learnt of the other rows, whose losses have another size.
    """
    B, L = tokens.shape
    progress = draw_progress(draw, args.boundary, args.step_law, to_data)
    jump = Jump(*(v.float().to(tokens.device, non_blocking=True) for v in Jump.between(model, *progress)))
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, jump.s)
    h, divergence = TEACHERS[loss](model, teacher, y, jump, args)
    w = torch.zeros_like(jump.s)
    if args.learned_weight and not to_data:
        w = model.log_weight(jump.s, jump.s if loss == "psd" else jump.t).float()
    w = w.expand(B, L).flatten()
    scale = torch.exp(-w.detach()) / (B * L)
    total, report = head_loss(h.flatten(0, 1), model.head, scale, divergence, c=1e-6, r=args.consistency_power, compiled=model.compiled)
    # exp(-w) sg[loss] + w: its gradient on w; the value of its first part is in `total` already
    learned = torch.exp(-w) * report.pop("weighted")
    squared = args.divergence == "square" or (args.target == "signed" and loss != "psd")
    name = "consistency_square" if squared else "consistency_kl"
    report[name] = report.pop("loss")
    bins = quarters(name, report[name], progress[-1])
    return {"consistency": total + (learned - learned.detach() + w).mean()}, {name: value.mean() for name, value in report.items()} | bins


def from_stage1(model, stage1, tokens, draw, power, guidance):
    """The diagonal learnt from the frozen stage 1's, not from the data: KL(sg[q] || psi_tt(x_t; c)), weighted by (45), in place of (22).

    q is stage 1's own psi_tt, whose gradient is far less noisy than a token's, or, where guidance is not 1, its guided
    one: then the flow map that is consistent with it needs one network call a step where two-branch guidance needs two.
    """

    @torch.no_grad()
    def target(y, t):
        head, h = (lowered(stage1.head),), stage1(y, t, t).flatten(0, 1)
        if guidance == 1:
            return Divergence(kl(instantaneous), (h,), head)
        h_0 = stage1.alone()(y, t, t).flatten(0, 1)
        return Divergence(kl(guided), (h, h_0, torch.full((len(h), 1), guidance, device=h.device)), head)

    return diagonal(model, tokens, draw, power, target)


def instantaneous(z, h, head):
    """q = psi, from the hidden vectors of stage 1."""
    return softmax(wide(h @ head.T)), {}


def guided(z, h_c, h_0, omega, head):
    """q = psi + omega (psi(c) - psi) (section 4.2), brought back to the simplex: no token below 0, and scaled to sum to 1.

    For omega > 1 the sum itself can have negative entries, which no softmax can meet: the logits would fall for ever.
    """
    psi_c, psi_0 = (softmax(wide(h @ head.T)) for h in (h_c, h_0))
    q = (psi_0 + omega * (psi_c - psi_0)).clamp(min=0)
    return q / q.sum(-1, keepdim=True), {}


def distillation(args, teacher, stage1=None):
    """The objective of stage 2; `teacher` None means the student itself. stage1: that network, frozen, for --diagonal-from stage1."""
    first, networks = functools.partial(diagonal, power=args.diagonal_power), []
    if args.diagonal_from == "stage1":
        first, networks = functools.partial(from_stage1, power=args.diagonal_power, guidance=args.guidance), [stage1]
    second = functools.partial(consistency, args=args, loss=args.loss)
    third = functools.partial(consistency, args=args, loss="psd", to_data=True)

    def objective(model, tokens, draw):
        on_diagonal, index = spread(draw.rows, args.diagonal_share)
        to_data = ~on_diagonal & spread(index, args.psd_share)[0]

        def part(mask, loss, *networks):
            rows = torch.from_numpy(np.flatnonzero(mask)).to(tokens.device, non_blocking=True)
            return by_context(loss, networks, tokens[rows], draw.part(mask), args)

        losses, report = part(on_diagonal, first, model, *networks)
        more_losses, more = part(~on_diagonal & ~to_data, second, model, teacher or model)
        losses, report = losses | more_losses, report | more
        if args.psd_share:
            end, more = part(to_data, third, model, model)
            losses["consistency"] = (1 - args.psd_share) * losses["consistency"] + args.psd_share * end["consistency"]
            report |= {f"to_data_{name}": value for name, value in more.items()}
        return losses, report

    return objective


def spread(rows, share):
    """(whether each of `rows` is one of a share of them, its index among the others): by index and evenly, so that a run of rows has its share.

    rows: int array (n,), indices into the global batch. So the micro-batch and the number of ranks change nothing.
    """
    before, after = (np.floor((rows + k) * share + 1e-9).astype(int) for k in (0, 1))
    return after > before, rows - before


FIXED = ("size", "schedule", "schedule_blend", "position_lag", "interpolant", "context", "block_size", "context_dropout")  # by stage 1


def check_flags(parser, args):
    """Fill in the defaults that depend on --loss and --joint; UserError for flags that contradict each other."""
    if args.divergence == "reverse-kl" and args.loss != "psd":
        raise UserError(f"--divergence reverse-kl goes with --loss psd: the teacher of {args.loss} is built for the forward KL")
    if args.divergence != "kl" and args.target == "signed":
        raise UserError(f"--divergence {args.divergence}: a signed target is no distribution, and has none; leave out one of the two")
    if args.loss == "psd" and args.target != "logit":
        raise UserError(f"--target {args.target}: the teacher of psd is a distribution as it is; leave it out")
    if args.clamp != parser.get_default("clamp") and (args.loss == "psd" or args.target == "signed"):
        raise UserError(f"--clamp {args.clamp:g} is of LSD's and ESD's logit target, which takes a logarithm; leave it out")
    if args.loss == "psd" and args.teacher:
        raise UserError(f"--teacher {args.teacher}: psd has no instantaneous term, it takes no such teacher; leave it out")
    if args.joint:
        if args.checkpoint:
            raise UserError("--joint trains from scratch and --checkpoint names a start; give one of them")
        if args.teacher not in (None, "self"):
            raise UserError(f"--teacher {args.teacher}: with --joint the embedding is learned, which only the student shares; leave it out")
    else:
        given = [name for name in FIXED if getattr(args, name) != parser.get_default(name)]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is fixed by the stage-1 checkpoint; give it to train_diagonal.py, or train from scratch with --joint"
            )
    if args.guidance != 1 and (args.joint or (args.loss != "psd" and args.teacher not in ("self", "ema"))):
        raise UserError(f"--guidance {args.guidance:g} needs a stage 1 and a map that teaches itself: --loss psd, or --teacher self or ema")
    if args.guidance != 1 and args.diagonal_from == "data":
        raise UserError(f"--guidance {args.guidance:g}: the guided denoiser is stage 1's, no data have it; leave out --diagonal-from data")
    if args.joint and args.diagonal_from == "stage1":
        raise UserError("--diagonal-from stage1: with --joint there is no stage 1; leave it out")
    args.diagonal_from = args.diagonal_from or ("data" if args.guidance == 1 else "stage1")
    args.teacher = args.teacher or ("self" if args.joint or args.loss == "psd" else "frozen")
    args.surgery = args.loss == "psd" if args.surgery is None else args.surgery
    args.steps = args.steps or (1_000_000 if args.joint else 100_000)
    args.out = args.out or Path("runs") / f"{args.data.name}-{args.loss}{'-joint' * args.joint}"
    if args.psd_share and args.loss == "psd":
        raise UserError(f"--psd-share {args.psd_share}: with --loss psd all rows are of psd; leave it out, or see --boundary")
    rows = args.micro_batch * args.diagonal_share
    if round(rows, 6) % 1:
        raise UserError(f"--micro-batch {args.micro_batch} x --diagonal-share {args.diagonal_share} is not a whole number of rows; change either")
    if round((args.micro_batch - rows) * args.psd_share, 6) % 1:
        raise UserError(f"--psd-share {args.psd_share} of the {args.micro_batch - rows:g} rows that are not diagonal is no whole number; change it")


def main():
    parser = Parser(prog="distill.py", description=__doc__)
    group = parser.add_argument_group("distillation")
    group.add_argument("--loss", choices=list(TEACHERS), required=True, help="the identity to learn")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="stage-1 checkpoint (default: runs/DATA-diagonal/checkpoint.pt)")
    group.add_argument("--joint", action="store_true", help="no stage 1: train both losses from scratch, the embedding as well")
    group.add_argument("--teacher", choices=["frozen", "ema", "self"],
                       help="who gives LSD and ESD the instantaneous denoiser: stage 1 (the default), the averaged weights, the student")  # fmt: skip
    group.add_argument("--target", choices=["logit", "signed"], default="logit",
                       help="LSD's and ESD's target: a distribution by (29), (33), or the identity itself, which needs no logarithm")  # fmt: skip
    group.add_argument("--clamp", type=number(float, 0, 1, above=True), default=1e-5, metavar="X",
                       help="floor of what the logit target takes the logarithm of, psi_ss / psi_st up to a factor; it should be small for "
                       "a rare token that the jump settles: a higher floor is less noise, and more bias to frequent tokens")  # fmt: skip
    group.add_argument(
        "--diagonal-share", type=number(float, 0, 0.99, above=True), default=0.5, metavar="X", help="share of rows that learn the diagonal"
    )
    group.add_argument("--diagonal-from", choices=["data", "stage1"],
                       help="what those learn: the clean tokens (the default), or stage 1's denoiser (with --guidance, always): less noise, "
                       "one pass more")  # fmt: skip
    group.add_argument("--psd-share", type=number(float, 0, 0.99), default=0.0, metavar="X",
                       help="with lsd and esd: share of the other rows that learn the semigroup instead, by jumps that end at data")  # fmt: skip
    group.add_argument("--step-law", choices=["uniform", "pair"], default="uniform",
                       help="length of a jump t - s, in progress: uniform, or as between two uniform times")  # fmt: skip
    group.add_argument(
        "--boundary", type=number(float, 0, 1), default=1 / 32, metavar="X", help="share of the other rows that jump from noise to data"
    )
    group.add_argument("--divergence", choices=list(DIVERGENCES), default="kl",
                       help="kl: KL(teacher || psi); reverse-kl, for psd alone: KL(psi || teacher); square: |teacher - psi|^2 / 2")  # fmt: skip
    group.add_argument("--consistency-power", type=number(float, 0, 1), default=0.5, metavar="R",
                       help="exponent r of the consistency loss's adaptive weight (45); 0 is the plain loss")  # fmt: skip
    group.add_argument(
        "--learned-weight",
        action=BooleanOptionalAction,
        default=True,
        help="learn a weight of s (PSD) or of s and t (LSD, ESD; rows of --psd-share have none)",
    )
    group.add_argument("--guidance", type=number(float, 0), default=1.0, metavar="W",
                       help="distil the map guided by this weight (0 ignores the context, 1 is plain); stage 1 must know contexts; "
                       "with psd, or with --teacher self or ema")  # fmt: skip
    group.add_argument("--surgery", action=BooleanOptionalAction, help="project conflicting gradients (default: with psd)")
    training_flags(parser, steps=None)
    context_flags(parser)
    model_flags(parser)
    args = parse_training_args(parser)
    check_flags(parser, args)
    meta = read_meta(args.data)
    args.stage1 = None
    if args.joint:
        check_context(args, meta["seq_len"])
        model = new_model(args, meta)
    else:
        args.checkpoint = args.checkpoint or Path("runs") / f"{args.data.name}-diagonal" / "checkpoint.pt"
        model, checkpoint = load_model(args.checkpoint)
        same_tokens(args.checkpoint, checkpoint["meta"], args.data, meta)
        for key in FIXED:
            setattr(args, key, checkpoint["args"].get(key))
        if args.guidance != 1 and not (args.context and args.context_dropout):
            raise UserError(f"--guidance {args.guidance:g}: {args.checkpoint} was trained without contexts, or never without one; "
                            "train it with --context and --context-dropout")  # fmt: skip
        args.stage1 = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
        model.train().requires_grad_(True).embedding.requires_grad_(False)
    # A diagonal row costs 3 forward passes, the backward one counted as two. A PSD row costs two more, for
    # psi_su and psi_ut; so does an LSD or ESD row, for the instantaneous term and the tangent of the dual pass.
    # Stage 1's denoiser costs a diagonal row one more, its guided one two.
    asked = (args.diagonal_from == "stage1") + (args.guidance != 1)
    passes = (3 + asked) * args.diagonal_share + 5 * (1 - args.diagonal_share)
    ema = copy.deepcopy(model)
    with start_ranks(args) as ranks:
        frozen = args.teacher == "frozen" or args.diagonal_from == "stage1"
        stage1 = copy.deepcopy(model).to(ranks[-1]).eval().requires_grad_(False) if frozen else None
        if stage1 and args.compile:
            stage1.compile_parts(dynamic=bool(args.context))
        teacher = {"frozen": stage1, "ema": ema, "self": None}[args.teacher]
        train(args, ranks, model, ema, distillation(args, teacher, stage1), meta, passes)


if __name__ == "__main__":
    run(main)
