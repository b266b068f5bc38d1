"""Train a small judge of text for evaluate.py, where no pretrained one can be had.

    python benchmarks/train_judge.py --data data/wiki --out runs/judge
    python evaluate.py --checkpoint runs/wiki-esd --judge runs/judge

Reads the training rows of a data set as text, makes a byte-level BPE of them and trains a GPT-2 on
windows of their text. Writes a folder for --judge, and prints the cross-entropy of held-out rows
in nats per token of the judge's own tokenizer. Compare its perplexities with each other only.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import parse
from prepare_data import Help, decode, read_meta, read_rows

EOS = "<|endoftext|>"


def windows(tokenizer, texts, context):
    """Token ids of all texts in one row, EOS between two, cut into windows (n, context)."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in ids for token in [*row, tokenizer.eos_token_id]])
    if len(stream) < context:
        raise SystemExit(
            f"a split of --data gives {len(stream)} tokens, fewer than --context {context}; use "
            "more text or a shorter context"
        )
    return stream[: len(stream) // context * context].view(-1, context)


def next_token_loss(judge, ids):
    """The mean cross-entropy in nats of every token but the first of windows ids (n, context)."""
    logits = judge(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(judge, data, args):
    """Train by AdamW, with a learning rate that warms up for 100 steps and falls to zero."""
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1
    )
    rng = np.random.default_rng(args.seed)
    start = time.monotonic()
    for step in range(1, args.steps + 1):
        batch = data[rng.integers(len(data), size=args.batch_size)].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = next_token_loss(judge, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / 100, 1 - (step - 1) / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - start
            print(f"step {step:,}/{args.steps:,}  loss {loss:.3f}  {seconds:.0f} s", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(
        prog="train_judge.py", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/owt"), help="data set to read")
    add("--out", type=Path, default=Path("runs/judge"), help="folder to write")
    add("--rows", type=int, default=200_000, help="training rows to read at most")
    add("--vocab-size", type=int, default=2048, help="of the judge's tokenizer")
    add("--layers", type=int, default=2, help="of the judge")
    add("--width", type=int, default=96, help="of the judge, a multiple of 32: the heads' width")
    add("--context", type=int, default=128, help="tokens that the judge can read")
    add("--batch-size", type=int, default=16, help="windows a step")
    add("--steps", type=int, default=1500, help="of training")
    add("--lr", type=float, default=2e-3, help="the highest learning rate")
    add("--seed", type=int, default=0, help="of the weights and the order of windows")
    args = parse(parser)
    if args.width % 32:
        raise SystemExit(f"--width {args.width} is not a multiple of 32")
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; name another folder with --out")
    return args


def main():
    args = parse_args()
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    meta = read_meta(args.data)
    rows = read_rows(args.data, "train", meta)[: args.rows]
    texts = [decode(meta, row) for row in rows]
    held_out = [decode(meta, row) for row in read_rows(args.data, "val", meta)[:200]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts[:20_000], vocab_size=args.vocab_size, special_tokens=[EOS], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS
    )
    data = windows(tokenizer, texts, args.context)
    held_out = windows(tokenizer, held_out, args.context)

    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    judge = GPT2LMHeadModel(config).to(args.device)
    train(judge, data, args)
    judge.eval()
    with torch.no_grad():
        batches = held_out.to(args.device).split(args.batch_size)
        nats = np.mean([next_token_loss(judge, batch).item() for batch in batches])
    judge.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    read = args.steps * args.batch_size * args.context
    print(
        f"{args.out}: {judge.num_parameters():,} weights, {read:,} tokens read, {nats:.3f} nats a "
        "token on held-out rows"
    )


if __name__ == "__main__":
    main()
