"""Draw the method where it is exact: a language of one position and three tokens.

    python examples/simplex.py --output simplex.png

The mean denoiser of such a language is a softmax in closed form, so no network is needed:

    psi_tt(x) = E[x1 | x_t = x] = softmax(log p + t / (1 - t)^2 x)

States live in R^3. Adding one number to all three entries changes no posterior, so the picture
shows the plane of the triangle and leaves that direction out.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import INTERPOLANTS

parser = argparse.ArgumentParser(description="Draw the exact flow of a language of three tokens.")
add = parser.add_argument
add("--output", type=Path, default="simplex.png", help="the picture")
add("--probabilities", type=float, nargs=3, default=[0.5, 0.3, 0.2], help="of the three tokens")
add("--samples", type=int, default=2000, help="draws of noise")
add("--seed", type=int, default=0, help="seed of the noise")
args = parser.parse_args()
path = INTERPOLANTS["linear"]
p = torch.tensor(args.probabilities, dtype=torch.float64)


def diagonal(x, s, t):
    """psi_ss(x), the mean denoiser of an instant (21). A jump with it is one of Euler's steps."""
    return torch.softmax(p.log() + path.beta(s) / path.alpha(s) ** 2 * x, -1)


def exact(x, s, t):
    """psi_st(x) = (X_st(x) - Gamma_st x) / Xi_st (50), from 500 small steps of the ODE."""
    times = s + (t - s) * torch.linspace(0, 1, 501, dtype=torch.float64)
    return (jump(x, times, diagonal)[-1] - path.Gamma(s, t) * x) / path.Xi(s, t)


def jump(x, times, psi):
    """All states (times, rows, 3) on the way from x (rows, 3), by X_st(x) (18, 50)."""
    states = [x]
    for s, t in itertools.pairwise(times):
        states.append(path.flow_map(states[-1], psi(states[-1], s, t), s, t))
    return torch.stack(states)


noise = torch.randn(args.samples, 3, generator=torch.Generator().manual_seed(args.seed)).double()
one = torch.tensor([[-1.11, 0.37, 0.73]], dtype=torch.float64)  # its path: picked for its bend
times = torch.linspace(0, 1, 81, dtype=torch.float64)
states = jump(one, times, exact)[:, 0]
instants = [diagonal(x, t, t) for x, t in zip(states[:-1], times[:-1], strict=True)]
averages = [p, *(exact(one, times[0], t)[0] for t in times[1:])]
mean = jump(noise, times[::80], diagonal)[-1]
euler = jump(noise, times[::20], diagonal)[-1]
tokens = jump(noise, times[::20], exact)[-1].argmax(-1)
shares = torch.bincount(tokens, minlength=3) / args.samples
print("share of each token after four jumps:", *(f"{share:.3f}" for share in shares))

import matplotlib.pyplot as plt  # noqa: E402

CORNERS = torch.tensor([[-1, -1], [1, -1], [0, 2]]).double() / torch.tensor([2, 6]).sqrt()
TOKENS = ["#3b6fb6", "#e08a2c", "#4a9d6b"]  # a colour for each
corner = torch.eye(3, dtype=torch.float64)


def draw(axis, x, color, label=None, marker="", ls="", **how):
    """Plot points (..., 3) in the plane of the triangle."""
    axis.plot(*(x @ CORNERS).view(-1, 2).T, color=color, label=label, marker=marker, ls=ls, **how)


figure, axes = plt.subplots(1, 3, figsize=(11, 4.5), constrained_layout=True)
axes[0].set(title="Noise, coloured by the token\nto which the flow carries it")
axes[1].set(title="The mean denoiser\nalong the black path")
axes[2].set(title="Where all the noise\nlands at time 1")
for v, colour in enumerate(TOKENS):
    draw(axes[0], noise[tokens == v], colour, marker=".", ms=2.5)
    draw(axes[2], corner[v], colour, marker="o", ms=40 * shares[v].item() ** 0.5, zorder=3)
draw(axes[0], states, "black", "path $x_t$ from noise (dot) to a token", ls="-", lw=2)
draw(axes[0], states[0], "black", marker="o")
for curve, style, label in (
    (instants, ":", r"of one instant, $\psi_{tt}(x_t)$"),
    (averages, "-", r"averaged from noise on, $\psi_{0t}(x_0)$"),
):
    draw(axes[1], torch.stack(curve), "black", label, ls=style, lw=2, marker="o", markevery=20)
draw(axes[2], mean, "#c0392b", r"one step with $\psi_{00}$: on the mean", marker="X", ms=11)
draw(axes[2], euler, "gray", r"four steps with $\psi_{ss}$ (Euler)", marker=".", ms=3)
axes[2].plot([], "o", color=TOKENS[0], label=r"four jumps with $\psi_{st}$, or one: on tokens")
for axis in axes:
    draw(axis, corner[[0, 1, 2, 0]], "#333333", ls="-", lw=1, zorder=2)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.03), frameon=False)
    axis.set_aspect("equal")
    axis.margins(0.08)
    axis.axis("off")
axes[0].set(xlim=(-2.2, 2.2), ylim=(-2.1, 2.3))
figure.savefig(args.output, dpi=100)
