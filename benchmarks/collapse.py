"""Where a distilled map goes wrong: for jumps from s to t, the teacher's entropy, the clamped share, and the distance from the truth.

    python benchmarks/collapse.py --checkpoint runs/grammar-esd/checkpoint.pt --diagonal runs/grammar-diagonal/checkpoint.pt

The truth is psi_st of the diagonal's own flow, integrated in --steps steps from s to t: the mean of its denoisers along the way,
uniform in r = beta/alpha (58). States x_s are the path's, of validation rows. The teacher is the distribution of (23), (29) or (33)
that --loss names (default: the one that the map was trained with), built from the map and, for LSD and ESD, from whom --teacher
names: the diagonal, or the map itself. Entropies and divergences in nats a token.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill
from evaluate import table
from model import Draw, entropy, load_model
from prepare_data import Parser, number, read_meta, read_rows, run


@torch.no_grad()
def integrated(diagonal, y, s, t, steps):
    """psi_st (B, L, V) by `steps` Euler steps of the drift (52), equal in progress: sum of psi_uu (r_v - r_u) / (r_t - r_s) (58)."""
    taus, mean = torch.linspace(float(s), float(t), steps + 1, dtype=torch.float64), 0
    times = [diagonal.times(tau.view(1, 1)).float().expand(len(y), -1) for tau in taus]
    r = [diagonal.path.beta(u) / diagonal.path.alpha(u) for u in times]
    for k in range(steps):
        h = diagonal(y, times[k], times[k])
        mean = mean + ((r[k + 1] - r[k]) / (r[-1] - r[0]))[..., None] * (h @ diagonal.head.T).softmax(-1)
        y = diagonal.path.flow_map(y, diagonal.soft_embedding(h), times[k], times[k + 1])
    return mean


def mean(values):
    return float(values.mean())


def main():
    parser = Parser(prog="collapse.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of stage 2")
    parser.add_argument("--diagonal", type=Path, required=True, metavar="FILE", help="the stage 1 that it started from")
    parser.add_argument("--loss", choices=list(distill.TEACHERS), help="whose teacher to look at (default: the checkpoint's)")
    parser.add_argument("--teacher", choices=["frozen", "self"], default="frozen", help="who gives LSD and ESD the instantaneous denoiser")
    parser.add_argument("--clamp", type=number(float, 0, 1, above=True), default=1e-5, help="see distill.py")
    parser.add_argument("--rows", type=number(int, 1), default=256, help="validation rows")
    parser.add_argument("--steps", type=number(int, 1), default=64, help="Euler steps of the truth")
    parser.add_argument("--start", type=number(float, 0, 0.99), nargs="+", default=[0.0, 0.3, 0.6], metavar="S", help="progress of s")
    parser.add_argument("--end", type=number(float, 0.01, 1), nargs="+", default=[0.31, 0.61, 0.8, 0.9, 0.95, 0.99, 1.0], metavar="T", help="of t")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    model, checkpoint = load_model(args.checkpoint)
    diagonal, (folder, loss) = load_model(args.diagonal)[0], (Path(checkpoint["args"]["data"]), args.loss or checkpoint["args"]["loss"])
    tokens = torch.from_numpy(read_rows(folder, "val", read_meta(folder))[: args.rows].astype(np.int64))
    B, rows = len(tokens), []
    for start in args.start:
        for end in (end for end in args.end if end > start):
            progress = (torch.full((B, 1), tau, dtype=torch.float64) for tau in (start, (start + end) / 2, end))
            jump = distill.Jump(*(time.float() for time in distill.Jump.between(model, *progress)))
            y = model.interpolate(Draw(0, 0, np.arange(B), "cpu").normal(tokens.shape[1], model.noise_size), tokens, jump.s)
            options = SimpleNamespace(target="logit", divergence="kl", clamp=args.clamp)
            with torch.no_grad():
                h, divergence = distill.TEACHERS[loss](model, {"frozen": diagonal, "self": model}[args.teacher], y, jump, options)
                report, g = divergence.function((z := h.flatten(0, 1) @ model.head.T), *divergence.by_row, *divergence.shared)
                psi = z.softmax(-1)
                truth = integrated(diagonal, y, start, end, args.steps).flatten(0, 1)
                kl = (torch.xlogy(truth, truth) - truth * z.log_softmax(-1)).sum(-1)
            row = {"s": start, "t": end, "truth": mean(entropy(truth)), "teacher": mean(entropy((psi - g).clamp(min=0))), "map": mean(entropy(psi)),
                   "clamped": mean(report["clamped"]) if "clamped" in report else None,
                   "KL teacher, map": mean(report["loss"]), "KL truth, map": mean(kl)}  # fmt: skip
            rows.append(row)
    print(f"{loss}: entropies of psi_st, and divergences")
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps({"flags": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
