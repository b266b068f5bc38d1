"""Steer samples by a reward, through the `after_jump` hook of `sample.generate`.

    python examples/steer.py --checkpoint runs/demo-psd --nfe 8 --strength 2

Sequential Monte Carlo: each sample comes from a group of particles. After each jump we look ahead
to the text that a particle is heading for, and resample the group by its reward. With many
particles the samples follow the model's law times exp(strength * reward).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare_data import decode
from sample import choose, draw_samples, load_sampler


def reward(text):
    """Edit this: any number, the larger the better. Here it is the number of words."""
    return len(text.split())


parser = argparse.ArgumentParser(description="Steer samples by the reward in this file.")
add = parser.add_argument
add("--checkpoint", type=Path, default="runs/demo-psd", help="a checkpoint or a run's folder")
add("--nfe", type=int, default=8, help="jumps; each but the last is followed by a look ahead")
add("--groups", type=int, default=32, help="samples")
add("--particles", type=int, default=8, help="particles for each sample")
add("--strength", type=float, default=2.0, help="of the reward, in nats a unit")
add("--gamma", type=float, default=0.5, help="renoising between jumps, 0 to 1")
add("--seed", type=int, default=0, help="seed of the noise")
args = parser.parse_args()
if args.gamma <= 0:
    raise SystemExit(f"--gamma {args.gamma:g}: copies of a particle never diverge; try 0.5")
model, checkpoint, euler = load_sampler(args.checkpoint, "cpu")
generator = torch.Generator().manual_seed(args.seed)
before = torch.zeros(args.groups, args.particles)  # the rewards at the last resampling


def rewards(tokens):
    """Tokens of all particles (groups * particles, L) -> (groups, particles)."""
    values = [float(reward(decode(checkpoint["meta"], row))) for row in tokens]
    return torch.tensor(values).view(args.groups, args.particles)


def resample(values, count):
    """Systematic resampling: rows of `count` particles of each group, (groups, count)."""
    weights = (args.strength * (values - before)).softmax(-1)
    points = (torch.rand(args.groups, 1, generator=generator) + torch.arange(count)) / count
    chosen = torch.searchsorted(weights.cumsum(-1), points).clamp(max=args.particles - 1)
    return chosen + args.particles * torch.arange(args.groups)[:, None]


def look_ahead(y, t, hidden):
    """Resample the states y at time t by psi_t1, or psi_tt if no jumps were learned."""
    global before
    end = model.times(torch.ones(1, 1, dtype=torch.float64)).to(t).expand_as(t)
    h = model(y, t, t if euler else end)
    values = rewards(choose(model.head, [(1.0, h)]))
    rows = resample(values, args.particles)
    before = values.flatten()[rows]
    return y[rows.flatten()]


how = {"euler": euler, "gamma": args.gamma}
count = args.groups * args.particles
plain = draw_samples(model, args.nfe, count, count, args.seed, **how)
steered = draw_samples(model, args.nfe, count, count, args.seed, after_jump=look_ahead, **how)
chosen = resample(rewards(steered), 1).flatten()  # one particle of each group
for name, samples in (("plain", plain), ("steered", steered[chosen])):
    texts = [decode(checkpoint["meta"], row) for row in samples]
    print(f"{name}: mean reward {sum(map(reward, texts)) / len(texts):.3f}")
    print("".join(f"    {text}\n" for text in texts[:4]), end="")
