"""How far gradients in bfloat16 are from those in float32, by loss and by time.

    python benchmarks/precision.py --checkpoint runs/grammar-psd --stage1 runs/grammar-diagonal
    python benchmarks/precision.py --checkpoint runs/owt-psd --stage1 runs/owt-diagonal --rows 8

Rows, noise and times are the same in both. Each cell is |g - g32| / |g32| over all parameters: the
loss itself is too small to compare near its minimum. Times are the progress of s, for the diagonal
and dmd of t and tau; the jumps start there and have any length. The critic is the map itself.
"""

import argparse
import copy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distill
from evaluate import table
from model import Draw, load_model
from prepare_data import Help, positive, read_meta, read_rows
from train_diagonal import diagonal_loss, gradients

LOSSES = {"diagonal": "", "psd": "logit", "lsd": "signed", "esd": "logit", "dmd": ""}
BANDS = [(0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.0)]


class Band(Draw):
    """Draws whose uniforms are between `low` and `high`."""

    low, high = 0.0, 1.0

    def uniform(self, k):
        return self.low + (self.high - self.low) * super().uniform(k)


def jumps(draw, boundary, to_data=False):
    """As distill.draw_progress, with s in the band of `draw`."""
    s, length = draw.uniform(2)[:, :, None].unbind(1)
    length = (length - draw.low) / (draw.high - draw.low)
    step = (1 - s) * (0.001 + 0.999 * length)
    return s, s + step / 2, s + step


def gradient(loss, model, stage1, tokens, band, half):
    """The gradient of one loss as one vector, in bfloat16 if `half`."""
    args = argparse.Namespace(form=LOSSES[loss], divergence="kl", boundary=1.0)
    args.consistency_power = 0.0
    args.learned_weight = False

    def objective(model, tokens, draw):
        if loss == "diagonal":
            return diagonal_loss(model, tokens, draw, 0.0)
        if loss == "dmd":
            losses, _ = distill.matching_loss(model, critic, stage1, tokens, draw, args)
            return {"matching": losses["matching"]}, {}
        with mock.patch("distill.draw_progress", jumps):
            return distill.consistency_loss(model, stage1, tokens, draw, args, loss)

    critic = copy.deepcopy(model).requires_grad_(False)
    draw = Band(0, 0, np.arange(len(tokens)), tokens.device)
    draw.low, draw.high = band
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
        grads, _ = gradients(params, objective, model, [(tokens, draw)], False)
    return torch.cat([grad.flatten() for grad in grads])


def errors(model, stage1, tokens):
    """A row of the table for each loss: the relative error in each band."""
    rows = []
    for loss in LOSSES:
        row = {"loss": loss}
        for band in BANDS:
            exact, rough = (gradient(loss, model, stage1, tokens, band, h) for h in (False, True))
            row["{} to {}".format(*band)] = float((rough - exact).norm() / exact.norm())
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(
        prog="precision.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a flow map, or its run")
    add("--stage1", type=Path, required=True, help="the stage 1 of it, or its run")
    add("--rows", type=positive, default=64, help="validation rows")
    args = parser.parse_args()
    model, checkpoint = load_model(args.checkpoint)
    stage1, _ = load_model(args.stage1)
    folder = Path(checkpoint["args"]["data"])
    rows = read_rows(folder, "val", read_meta(folder))[: args.rows]
    model.requires_grad_(True)
    model.embedding.requires_grad_(False)
    stage1.requires_grad_(False)
    print(table(errors(model, stage1, torch.from_numpy(rows.astype(np.int64)))))


if __name__ == "__main__":
    main()
