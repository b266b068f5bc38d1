"""Watch sequences crystallise out of noise, through the `after_jump` hook of `sample.generate`.

    python examples/watch.py --checkpoint runs/demo-psd --nfe 32 --output watch.gif

Each evaluation shows the most probable token of every position, coloured by its probability.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Draw, softmax
from prepare_data import decode
from sample import generate, load_sampler

# Five degrees of certainty: a colour of the terminal's 256, and the same one for the GIF.
SHADES = [(241, "#626262"), (61, "#5f5faf"), (68, "#5f87d7"), (80, "#5fd7d7"), (195, "#d7ffff")]
COLUMNS = 60  # characters in a line of the GIF

parser = argparse.ArgumentParser(description="Watch sequences crystallise out of noise.")
add = parser.add_argument
add("--checkpoint", type=Path, default="runs/demo-psd", help="a checkpoint or a run's folder")
add("--nfe", type=int, default=32, help="network evaluations")
add("--gamma", type=float, default=0.0, help="renoise between jumps: 0 never, 1 fully")
add("--seed", type=int, default=0, help="seed of the noise")
add("--output", type=Path, help="also write a GIF")
add("--rows", type=int, default=8, help="sequences in the GIF; the terminal shows the first")
args = parser.parse_args()
model, checkpoint, euler = load_sampler(args.checkpoint, "cpu")
frames = []  # one for each evaluation: (title, sequences), a sequence being [(text, shade), ...]


def piece(token, p):
    """A token as it looks inside a text, with the space before it, on one line; and its shade."""
    text = decode(checkpoint["meta"], [token])  # "" for padding
    text = text[2:] if text.startswith("##") else checkpoint["meta"].get("join", "") + text
    return "".join(c if c.isprintable() else "↵" for c in text), SHADES[int(p * 4.999)]


def show(hidden):
    title = f"evaluation {len(frames) + 1} of {args.nfe}"
    best = [softmax(row @ model.head.T).max(-1) for row in hidden[0][1]]
    sequences = [list(map(piece, tokens, psi)) for psi, tokens in best]
    frames.append((title, sequences))
    if sys.stdout.isatty():
        coloured = [f"\x1b[48;5;233;38;5;{code}m{text}" for text, (code, _) in sequences[0]]
        print(f"\x1b[H\x1b[2J{title}\n", *coloured, "\x1b[0m", sep="", flush=True)
        time.sleep(0.1)
    else:
        print(f"{title}:", "".join(text for text, _ in sequences[0]).strip())


def after_jump(y, t, hidden):
    show(hidden)
    return y


draw = Draw(args.seed, 0, range(args.rows), "cpu")
normal = functools.partial(draw.normal, model.config.seq_len, model.noise_size)
how = {"euler": euler, "gamma": args.gamma, "normal": normal, "after_jump": after_jump}
show(generate(model, normal(), args.nfe, **how))

if args.output:
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    lines = -(-model.config.seq_len * 5 // COLUMNS)  # of a sequence; the rest is not shown
    height = 2.5 + (lines + 0.5) * args.rows  # in lines of text
    figure = plt.figure(figsize=(8, 0.3 * height), dpi=100, facecolor="#121212")
    font = {"family": "monospace", "size": 900 / COLUMNS, "parse_math": False}
    writer = PillowWriter(fps=8)
    with writer.saving(figure, args.output, dpi=100):
        for title, sequences in frames + frames[-1:] * 8:  # hold the last one for a second
            figure.clear()
            figure.text(0.03, 1 - 1.4 / height, title, color="#8a8a8a", **font)
            for i, sequence in enumerate(sequences):
                column, line = 0, 0
                for text, (_, colour) in sequence:
                    if column + len(text) > COLUMNS:
                        column, line = 0, line + 1
                    if line < lines:
                        x = 0.015 + 0.95 * column / COLUMNS
                        y = 1 - (3 + i * (lines + 0.5) + line) / height
                        figure.text(x, y, text, color=colour, **font)
                    column += len(text)
            writer.grab_frame()
