"""Stage 2: distil a trained diagonal into a flow map that jumps, by self-consistency.

    python distill.py --loss esd                        # from the run that train_diagonal.py writes by default
    torchrun --nproc_per_node=8 distill.py --loss psd
    python distill.py --data data/grammar --loss psd --steps 1000 --batch-size 256

Reads data/NAME and a stage-1 checkpoint. Writes runs/NAME-LOSS/ as stage 1 does: config.json, log.jsonl,
checkpoint.pt. Half of the rows go on learning the diagonal (21), the others learn one identity of the
mean denoiser, each by KL(sg[teacher] || psi_st(x_s)) (27, 35) with x_s drawn from the interpolant:

    psd   the semigroup, two jumps make one      psi_st = omega psi_su + (1 - omega) psi_ut(X_su)     (23, 64)
    esd   the Eulerian, D_s along the flow       psi_st = softmax(z_ss - log(1 - delta / kappa))      (25, 33)

The embedding W stays as stage 1 left it, so that student and teacher see the same y = x W.
"""

import hashlib
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch

from model import build_model, head_loss, kl, load_model, lowered, softmax, wide
from prepare_data import Parser, UserError, number, read_meta, run
from train_diagonal import diagonal, parse_training_args, start_ranks, train, training_flags

# ------------------------------------------------------------------------------------------------
# The teachers. Each takes (model, teacher, y, s, u, t) and returns the student's hidden vectors h_st
# (B, L, D), with their graph, and a function for model.kl: (z_st, rows) -> (log q, report).
# `teacher` gives the instantaneous denoiser: the frozen stage-1 network, or the student itself.


def psd(model, teacher, y, s, u, t):
    """Semigroup: q = omega psi_su(y) + (1 - omega) psi_ut(X_su(y)) (23, 64); the student teaches itself."""
    with torch.no_grad():
        h_su = model(y, s, u)
        X_su = model.path.flow_map(y, model.soft_embedding(h_su), s, u)
        h_ut = model(X_su, u, t).flatten(0, 1)
        h_su = h_su.flatten(0, 1)
        omega = model.path.omega(s, u, t).expand(y.shape[:2]).flatten()[:, None]  # (B L, 1)

    head = lowered(model.head)

    def target(z, rows):
        psi_su, psi_ut = (softmax(wide(h[rows] @ head.T)) for h in (h_su, h_ut))
        q = torch.lerp(psi_ut, psi_su, omega[rows])
        return q.log(), {}

    return model(y, s, t), target


def esd(model, teacher, y, s, u, t):
    """Eulerian: q = softmax(z_ss - log(a - b delta)), delta = dz - <psi_st, dz>, dz = D_s z_st (33, 43, 70)."""
    with torch.no_grad():
        h_ss = teacher(y, s, s)
        drift = model.path.drift(y, teacher.soft_embedding(h_ss), s)  # b_s(y)
        h_ss = h_ss.flatten(0, 1)
        a, b = (c.expand(y.shape[:2]).flatten()[:, None] for c in model.path.eulerian(s, t))  # (B L, 1) each
    h, dh = model.derivative(y, s, t, drift, torch.ones_like(s), torch.zeros_like(t))
    dh, head, teacher_head = dh.flatten(0, 1), lowered(model.head), lowered(teacher.head)

    def target(z, rows):
        z_ss, dz = wide(h_ss[rows] @ teacher_head.T), wide(dh[rows] @ head.T)
        delta = dz - (softmax(z) * dz).sum(-1, keepdim=True)
        argument, floor = a[rows] - b[rows] * delta, CLAMP * (a[rows] + b[rows])
        log_q = (z_ss - argument.clamp(min=floor).log()).log_softmax(-1)
        return log_q, {"clamped": (argument < floor).float().mean(-1)}

    return h, target


# For the true map a - b delta is positive; for a network it need not be. It is kept above this share
# of a + b, and the share of clamped entries is logged: the best sign of health there is.
CLAMP = 1e-5

TEACHERS = {"psd": psd, "esd": esd}


# ------------------------------------------------------------------------------------------------
# The objective of stage 2: the diagonal on some rows, consistency on the others.


def consistency_times(model, draw, boundary):
    """Times s <= u <= t of the path, float64 (B, 1) each: uniform step, uniform start, u half-way (in progress tau).

    The step d ~ U(0.001, 1), s ~ U(0, 1 - d), t = s + d (s = t says nothing new, and is 0/0); a share `boundary` of the rows goes all the way
    from noise to data, d = 1, as one-step sampling will.
    """
    step, start, edge = draw.uniform(3).unbind(-1)
    step = torch.where(edge < boundary, 1.0, 0.001 + 0.999 * step)
    s = start * (1 - step)
    return [model.times(tau)[:, None] for tau in (s, s + step / 2, s + step)]


def consistency(model, teacher, tokens, draw, args):
    """KL(sg[teacher] || psi_st(x_s)) (27, 31, 35), weighted by (45) with r = 0.5, c = 1e-6, then by exp(-w)."""
    B, L = tokens.shape
    s, u, t = (v.float().to(tokens.device) for v in consistency_times(model, draw, args.boundary))
    y = model.interpolate(draw.normal(L, model.noise_size), tokens, s)
    h, target = TEACHERS[args.loss](model, teacher, y, s, u, t)
    w = torch.zeros_like(s)
    if args.learned_weight:
        w = model.log_weight(s, s if args.loss == "psd" else t).float()
    w = w.expand(B, L).flatten()
    loss, report = head_loss(h.flatten(0, 1), model.head, torch.exp(-w.detach()) / (B * L), kl(target), c=1e-6, r=0.5)
    # exp(-w) sg[loss] + w: its gradient on w; the value of its first part is in `loss` already
    learned = torch.exp(-w) * report.pop("weighted")
    report["consistency_kl"] = report.pop("loss")
    return loss + (learned - learned.detach() + w).mean(), {name: value.mean() for name, value in report.items()}


def distillation(args, teacher):
    """The objective of stage 2; `teacher` None means the student itself."""

    def objective(model, tokens, draw):
        # by index and evenly spread: every run of rows holds its share of diagonal ones, whatever the micro-batch
        mask = np.floor((draw.rows + 1) * args.diagonal_share + 1e-9) > np.floor(draw.rows * args.diagonal_share + 1e-9)
        losses, report = diagonal(model, tokens[mask], draw.part(mask), args.diagonal_power)
        losses["consistency"], more = consistency(model, teacher or model, tokens[~mask], draw.part(~mask), args)
        return losses, report | more

    return objective


def main():
    parser = Parser(prog="distill.py", description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("distillation")
    group.add_argument("--loss", choices=list(TEACHERS), required=True, help="the identity to learn")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="stage-1 checkpoint (default: runs/DATA-diagonal/checkpoint.pt)")
    group.add_argument("--teacher", choices=["frozen", "self"], default="frozen", help="who gives psi_ss and b_s to ESD: stage 1, or the student")
    group.add_argument("--diagonal-share", type=number(float, 0, 0.99, above=True), default=0.5, help="share of the rows that learn the diagonal")
    group.add_argument("--boundary", type=number(float, 0, 1), default=1 / 32, help="share of the other rows that jump from noise to data")
    group.add_argument("--learned-weight", action=BooleanOptionalAction, default=True, help="learn a weight of s (PSD) or of s and t (ESD)")
    group.add_argument("--surgery", action=BooleanOptionalAction, help="project conflicting gradients (default: with psd)")
    training_flags(parser, steps=100_000)
    args = parse_training_args(parser)
    args.checkpoint = args.checkpoint or Path("runs") / f"{args.data.name}-diagonal" / "checkpoint.pt"
    args.out = args.out or Path("runs") / f"{args.data.name}-{args.loss}"
    args.surgery = args.loss == "psd" if args.surgery is None else args.surgery
    meta = read_meta(args.data)
    if round(args.micro_batch * args.diagonal_share, 6) % 1:
        raise UserError(f"--micro-batch {args.micro_batch} x --diagonal-share {args.diagonal_share} is not a whole number of rows; change either")

    teacher, checkpoint = load_model(args.checkpoint)
    for key in ("tokenizer", "vocab_size", "seq_len"):
        if checkpoint["meta"][key] != meta[key]:
            raise UserError(f"{args.checkpoint} was trained on rows of {key} {checkpoint['meta'][key]}, {args.data} has {key} {meta[key]}; "
                            "name the data set that it was trained on with --data")  # fmt: skip
    args.stage1 = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    model = build_model(teacher.config)
    model.load_state_dict(teacher.state_dict(), strict=True)
    model.embedding.requires_grad_(False)
    ranks = start_ranks(args)
    frozen = args.loss == "esd" and args.teacher == "frozen"
    objective = distillation(args, teacher.to(ranks[-1]) if frozen else None)
    # A diagonal row costs 3 forward passes, the backward one counted as two. A PSD row costs two more,
    # for psi_su and psi_ut; an ESD row as well, for psi_ss and the tangent of the dual pass.
    train(args, ranks, model, objective, meta, passes=3 * args.diagonal_share + 5 * (1 - args.diagonal_share))


if __name__ == "__main__":
    run(main)
