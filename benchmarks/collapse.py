"""Where a distilled map is wrong: its distance from the truth, and its teacher's entropy.

    python benchmarks/collapse.py --checkpoint runs/grammar-esd --diagonal runs/grammar-diagonal

For jumps from progress s to t, from path states of validation rows. The truth is psi_st of the
diagonal's own flow, integrated in --steps steps: a weighted mean of its denoisers along the way
(58). The teacher is the target of (23), (29) or (33) that --loss names, in logit form, built from
the map and the diagonal. Entropies and divergences are in nats a token. "Clamped" is the share of
logits at the floor of the teacher's logarithm.
"""

import argparse
import itertools
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
from prepare_data import Help, read_meta, read_rows
from sample import check_output


def integrated(diagonal, y, s, t, steps):
    """psi_st (B, L, V) by `steps` Euler steps of the drift (52) from progress s to t.

    With r = beta / alpha it is the sum of psi_uu (r_v - r_u) / (r_t - r_s) over steps u to v (58).
    """
    taus = torch.linspace(s, t, steps + 1, dtype=torch.float64)
    times = [diagonal.times(tau.view(1, 1)).float().expand(len(y), -1) for tau in taus]
    r = [diagonal.path.beta(u) / diagonal.path.alpha(u) for u in times]
    mean = 0
    for k in range(steps):
        h = diagonal(y, times[k], times[k])
        share = (r[k + 1] - r[k]) / (r[-1] - r[0])
        mean = mean + share[..., None] * (h @ diagonal.head.T).softmax(-1)
        y = diagonal.path.flow_map(y, diagonal.soft_embedding(h), times[k], times[k + 1])
    return mean


@torch.no_grad()
def jump_row(model, diagonal, loss, tokens, start, end, steps):
    """One row of the table: the jump from progress `start` to `end` of the rows `tokens`."""
    B, L = tokens.shape
    middle = (start + end) / 2
    progress = [torch.full((B, 1), tau, dtype=torch.float64) for tau in (start, middle, end)]
    jump = distill.Jump(*(time.float() for time in distill.Jump.between(model, *progress)))
    noise = Draw(0, 0, np.arange(B), "cpu").normal(L, model.noise_size)
    y = model.interpolate(noise, tokens, jump.s)
    options = SimpleNamespace(form="logit", divergence="kl")
    h, divergence = distill.TEACHERS[loss](model, diagonal, y, jump, options)
    z = h.flatten(0, 1) @ model.head.T
    report, _ = divergence.function(z, *divergence.by_row, *divergence.shared)
    truth = integrated(diagonal, y, start, end, steps).flatten(0, 1)
    kl = -entropy(truth) - (truth * z.log_softmax(-1)).sum(-1)
    columns = {
        "truth": entropy(truth),
        "teacher": report["teacher_entropy"],
        "map": entropy(z.softmax(-1)),
        "clamped": report.get("clamped"),
        "KL teacher, map": report["loss"],
        "KL truth, map": kl,
    }
    row = {"s": start, "t": end}
    return row | {k: None if v is None else float(v.mean()) for k, v in columns.items()}


def main():
    parser = argparse.ArgumentParser(
        prog="collapse.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of stage 2: a checkpoint or a run's folder")
    add("--diagonal", type=Path, required=True, help="the stage 1 that it started from")
    losses = list(distill.TEACHERS)
    add("--loss", choices=losses, help="the teacher (default: the one the map was trained with)")
    add("--rows", type=int, default=256, help="validation rows")
    add("--steps", type=int, default=64, help="Euler steps of the truth")
    add("--start", type=float, nargs="+", default=[0.0, 0.3, 0.6], help="progress s")
    ends = [0.31, 0.61, 0.8, 0.9, 0.95, 0.99, 1.0]
    add("--end", type=float, nargs="+", default=ends, help="progress t")
    add("--output", type=Path, help="JSON to write")
    args = parser.parse_args()
    if args.output:
        check_output("--output", args.output, ".json")
    model, checkpoint = load_model(args.checkpoint)
    diagonal, _ = load_model(args.diagonal)
    folder = Path(checkpoint["args"]["data"])
    loss = args.loss or checkpoint["args"]["loss"]
    rows = read_rows(folder, "val", read_meta(folder))[: args.rows]
    tokens = torch.from_numpy(rows.astype(np.int64))
    pairs = [(s, t) for s, t in itertools.product(args.start, args.end) if s < t]
    results = [jump_row(model, diagonal, loss, tokens, s, t, args.steps) for s, t in pairs]
    print(f"{loss}: entropies of psi_st, and divergences")
    print(table(results))
    if args.output:
        facts = {"args": vars(args), "rows": results}
        args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
