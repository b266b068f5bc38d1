"""Train a small judge of text for evaluate.py, where no pretrained one can be had.

    python benchmarks/train_judge.py --data data/wiki --out runs/judge
    python evaluate.py --checkpoint runs/wiki-esd/checkpoint.pt --judge runs/judge

Reads the training rows of a data set as text, makes a byte-level BPE of them and trains a GPT-2 on it, on
windows of their text, with AdamW and a learning rate that falls to zero. Writes a folder that from_pretrained
reads, and prints the cross-entropy on held-out rows in nats a token of the judge's own. Its perplexities
are its own too: they rank texts, and compare with no other judge's.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import machine_flags, resolve_machine
from prepare_data import Parser, UserError, decode, number, read_meta, read_rows, run

EOS = "<|endoftext|>"


def next_token_loss(judge, ids):
    """The mean cross-entropy in nats of every token of the windows ids (n, context) but the first."""
    return F.cross_entropy(judge(input_ids=ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def stream(tokenizer, texts):
    """Texts -> token ids of all of them in one row, EOS between two: int64 (n,)."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in ids for token in [*row, tokenizer.eos_token_id]])


def main():
    parser = Parser(prog="train_judge.py", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/owt"), metavar="DIR", help="data set to read")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"), metavar="DIR", help="folder to write")
    parser.add_argument("--rows", type=number(int, 2), default=200_000, help="training rows to read at most")
    parser.add_argument("--vocab-size", type=number(int, 300, 65536), default=2048, help="of the judge's tokenizer")
    parser.add_argument("--layers", type=number(int, 1), default=2, help="of the judge")
    parser.add_argument("--width", type=number(int, 1), default=96, help="of the judge; heads are 32 wide")
    parser.add_argument("--context", type=number(int, 2), default=128, help="tokens that the judge can read")
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="windows a step")
    parser.add_argument("--steps", type=number(int, 1), default=1500, help="of training")
    parser.add_argument("--lr", type=number(float, 0, above=True), default=2e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the weights and the order of windows")
    machine_flags(parser)
    args = parser.parse_args()
    resolve_machine(args)
    if args.width % 32:
        raise UserError(f"--width {args.width} is not a multiple of 32")
    if args.out.exists():
        raise UserError(f"{args.out} is already there; name another folder with --out")
    try:
        from tokenizers import ByteLevelBPETokenizer
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    except ImportError:
        raise UserError("a judge needs transformers: pip install transformers") from None

    meta = read_meta(args.data)
    texts = {split: [decode(meta, row) for row in read_rows(args.data, split, meta)[:limit]] for split, limit in (("train", args.rows), ("val", 200))}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["train"][:20_000], vocab_size=args.vocab_size, special_tokens=[EOS], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS)
    ids = {split: stream(tokenizer, texts[split]) for split in texts}
    for split in ids:
        if len(ids[split]) < args.context:
            raise UserError(f"{args.data}: its {split} rows give {len(ids[split])} tokens, fewer than --context {args.context}")
        ids[split] = ids[split][: len(ids[split]) // args.context * args.context].view(-1, args.context)

    torch.manual_seed(args.seed)
    judge = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=args.context, n_embd=args.width, n_layer=args.layers,
                                       n_head=args.width // 32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(args.device)  # fmt: skip
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    order, start = np.random.default_rng(args.seed), time.monotonic()
    for step in range(1, args.steps + 1):
        batch = ids["train"][order.integers(len(ids["train"]), size=args.batch_size)].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = next_token_loss(judge, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / 100, 1 - (step - 1) / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:,}/{args.steps:,}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    judge.eval()
    with torch.no_grad():
        held_out = [next_token_loss(judge, batch).item() for batch in ids["val"].to(args.device).split(args.batch_size)]
    judge.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {judge.num_parameters():,} weights, {args.steps * args.batch_size * args.context:,} tokens read, "
          f"{np.mean(held_out):.3f} nats a token on held-out rows")  # fmt: skip


if __name__ == "__main__":
    run(main)
