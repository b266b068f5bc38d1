"""Turn text into memory-mapped rows of tokens.

    python prepare_data.py grammar                      # embedded, no download, seconds
    python prepare_data.py owt                          # the paper's OpenWebText: GPT-2 BPE, L = 1024
    python prepare_data.py lm1b                         # the paper's LM1B: bert-base-uncased, L = 128
    python prepare_data.py text8                        # 27 characters, L = 256
    python prepare_data.py file --source my.txt         # any local .txt, .jsonl or .parquet

Reads a dataset (from the hub, or local files through the same `datasets` code) and writes a folder:

    data/NAME/train.bin, val.bin    uint16, rows of exactly L tokens, nothing between the rows
    data/NAME/meta.json             name, tokenizer, vocab_size, seq_len, bos/eos/pad ids, row counts,
                                    source, sha256 of the two files, and the vocabulary where it is small

Word-piece rows are packed as in the paper: documents joined by EOS, the stream cut every L - 2 tokens,
each cut framed by BOS and EOS; the last, incomplete cut is dropped. Character rows are plain cuts of
L characters. Everything is written in a folder beside the target and renamed at the end, so a run
that is interrupted leaves no data set behind, and one that has finished is not repeated.
"""

import argparse
import bisect
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------------------------------------
# How every program here fails: one line on stderr, exit code 2.


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected, what to do."""


def one_line(text):
    """`text` with line ends and control characters written as escapes, as a file name may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The program's docstring in --help as it stands, and defaults, but where the text gives one itself or there is none."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False or "default:" in action.help else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviated flags, and errors of one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def number(kind, low, high=None, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] with `above`; NaN and infinity are refused.

    Without `high`, an int ends at 10^12: more than any count here, and far from where int64 or a float would overflow.
    """
    high = {int: 10**12, float: sys.float_info.max}[kind] if high is None else high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if above else low <= value <= high):
            bounds = f"{'above' if above else 'at least'} {low}" + ("" if high == sys.float_info.max else f" and at most {high}")
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'} {bounds}")
        return value

    return parse


def run(main):
    """Call main(); turn a UserError, an OSError or a lack of memory into one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub that cannot be reached is told once, not at each retry
    try:
        main()
        return
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}; name another place or free this one"
    except (MemoryError, RuntimeError) as error:  # numpy raises the one, torch the other
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message = f"out of memory ({(str(error) or 'no size given').splitlines()[0]}); ask for less at once: a smaller batch, fewer samples"
    except KeyboardInterrupt:
        sys.exit(130)
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # torchrun mixes the output of all
    print(one_line(f"{Path(sys.argv[0]).name}{rank}: {message}"), file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------
# The embedded source: a small probabilistic grammar, as a deterministic weighted automaton.
#
#     some farmers near the river read a famous poem .
#
# Number binds determiner, subject and verb (up to five words apart, across the phrase "near the river");
# the verb's class binds its object and the object's adjective (three words apart). Because every
# (state, word) has one successor, a row has at most one derivation: its probability is one product,
# and the entropy of the source is one backward recursion.

DETERMINERS = {"sg": ["a", "this"], "pl": ["some", "these"]}
PEOPLE = {
    "sg": ["child", "woman", "farmer", "sailor", "king", "doctor"],
    "pl": ["children", "women", "farmers", "sailors", "kings", "doctors"],
}
PREPOSITIONS = ["near", "behind"]
PLACES = ["river", "bridge", "castle", "market", "school"]
VERBS = {
    "food": {"sg": ["eats", "cooks"], "pl": ["eat", "cook"]},
    "text": {"sg": ["reads", "writes"], "pl": ["read", "write"]},
}
ADJECTIVES = {"food": ["fresh", "warm", "sweet", "spicy"], "text": ["long", "short", "famous", "clever"]}
OBJECTS = {"food": ["apple", "cake", "soup", "pear", "fish"], "text": ["book", "letter", "poem", "story", "song"]}
OPTIONAL = 1 / 2  # the probability of each optional phrase
PAD, STOP = "<pad>", "."


@functools.cache
def grammar():
    """The automaton: {state: {word: (probability, next state)}}; starts in "start", ends in None."""
    states = {}

    def add(state, words, probability, successor):
        for word in words:
            share = probability / len(words)
            assert word not in states.setdefault(state, {}), f"two derivations through {word!r}"
            states[state][word] = (share, successor)

    for n in ("sg", "pl"):
        add("start", DETERMINERS[n], 1 / 2, n)
        add(n, PEOPLE[n], 1, f"subject {n}")
        add(f"subject {n}", PREPOSITIONS, OPTIONAL, f"preposition {n}")
        add(f"preposition {n}", ["the"], 1, f"place {n}")
        add(f"place {n}", PLACES, 1, f"verb {n}")
        for kind in VERBS:
            add(f"subject {n}", VERBS[kind][n], (1 - OPTIONAL) / len(VERBS), kind)
            add(f"verb {n}", VERBS[kind][n], 1 / len(VERBS), kind)
    for kind in VERBS:
        add(kind, ["the", "a"], 1, f"{kind} object")
        add(f"{kind} object", ADJECTIVES[kind], OPTIONAL, f"{kind} noun")
        add(f"{kind} object", OBJECTS[kind], 1 - OPTIONAL, "stop")
        add(f"{kind} noun", OBJECTS[kind], 1, "stop")
    add("stop", [STOP], 1, None)
    return states


@functools.cache
def grammar_words():
    """The vocabulary, in order of token id: the padding, the full stop, then the words in order of use."""
    words = {word: None for arcs in grammar().values() for word in arcs}
    return [PAD, STOP] + [word for word in words if word != STOP]


@functools.cache
def grammar_longest(state="start"):
    """The number of words, full stop included, of the longest sentence."""
    return 0 if state is None else max(1 + grammar_longest(after) for _, after in grammar()[state].values())


@functools.cache
def grammar_entropy(state="start"):
    """The exact entropy of the source in nats per sentence: H(state) = sum p (H(next) - log p)."""
    if state is None:
        return 0.0
    return sum(p * (grammar_entropy(after) - math.log(p)) for p, after in grammar()[state].values())


def grammar_log_prob(row):
    """The exact log-probability, in nats, of one row of token ids (L,); -inf when it is not grammatical.

    A row is grammatical when it is one complete sentence followed by nothing but padding.
    """
    words, state, total = grammar_words(), "start", 0.0
    for token in row:
        word = words[token]
        if state is None:
            if word != PAD:
                return -math.inf
            continue
        if word not in grammar()[state]:
            return -math.inf
        probability, state = grammar()[state][word]
        total += math.log(probability)
    return total if state is None else -math.inf


def grammar_rows(count, seed):
    """Draw `count` padded sentences: uint16 of shape (count, L)."""
    rng = np.random.default_rng(seed)
    index = {word: i for i, word in enumerate(grammar_words())}
    arcs = {
        state: (list(itertools.accumulate(p for p, _ in out.values())), [index[w] for w in out], [after for _, after in out.values()])
        for state, out in grammar().items()
    }
    rows = np.zeros((count, grammar_longest()), np.uint16)
    for row, uniforms in zip(rows, rng.random(rows.shape), strict=True):
        state = "start"
        for position, u in enumerate(uniforms):
            if state is None:
                break
            edges, tokens, after = arcs[state]
            choice = min(bisect.bisect(edges, u), len(tokens) - 1)
            row[position], state = tokens[choice], after[choice]
    return rows


# ------------------------------------------------------------------------------------------------
# Tokenizers. Each is a dict that goes into meta.json as it is: {tokenizer, vocab_size, bos_id, eos_id,
# pad_id} and, where the vocabulary is small, {vocab, join}: the strings, and what stands between them.


@functools.cache
def gpt2_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests raises many kinds; all mean that the vocabulary cannot be had
        raise UserError(f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}); connect to the internet, "
                        "or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it") from None  # fmt: skip


def bert_class():
    try:
        from transformers import BertTokenizerFast
    except ImportError:
        raise UserError("the bert tokenizer needs transformers: pip install transformers") from None
    return BertTokenizerFast


@functools.cache
def bert_tokenizer(where):
    kind = bert_class()
    try:
        tokenizer, reason = kind.from_pretrained(where), "no vocabulary"
    except Exception as error:
        tokenizer, reason = [], type(error).__name__
    if len(tokenizer) < 1000:  # transformers 5 makes an empty tokenizer where it finds no files
        raise UserError(f"no bert tokenizer at {where!r} ({reason}); connect to the internet, or give --bert a folder that holds its vocab.txt")
    return tokenizer


def encode_batch(batch, tokenizer, column, bert):
    """A batch of documents -> {"ids": one list of token ids a document}, without any framing."""
    texts = [text or "" for text in batch[column]]
    if tokenizer == "gpt2":
        ids = gpt2_encoding().encode_ordinary_batch(texts, num_threads=1)
    else:
        ids = bert_tokenizer(bert)(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"ids": ids}


def end_with_parent():
    """In a forked worker: have the kernel end it when its parent ends, however that does; it would wait for work for ever. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def describe_tokenizer(args):
    """The tokenizer's part of meta.json, for the word-piece tokenizers."""
    if args.tokenizer == "gpt2":
        eos = gpt2_encoding().eot_token
        return dict(tokenizer="gpt2", vocab_size=gpt2_encoding().n_vocab, bos_id=eos, eos_id=eos, pad_id=None)
    bert = bert_tokenizer(args.bert)
    return dict(tokenizer="bert", vocab_size=len(bert), bos_id=bert.cls_token_id, eos_id=bert.sep_token_id, pad_id=bert.pad_token_id,
                vocab=bert.convert_ids_to_tokens(list(range(len(bert)))), join=" ")  # fmt: skip


def encoder(meta):
    """A function text -> token ids (a list), special tokens read as such: the inverse of `decode`, but for other ways to cut the same text.

    It raises UserError for a word or a character that the vocabulary lacks.
    """
    if meta["tokenizer"] == "gpt2":
        return lambda text: gpt2_encoding().encode(text, allowed_special="all")
    index = {word: i for i, word in enumerate(meta["vocab"])}
    if meta["tokenizer"] == "bert":
        bert = bert_class()(vocab=index)
        return lambda text: bert(text, add_special_tokens=False)["input_ids"]

    def encode(text):
        words = text.split() if meta["join"] else text
        unknown = [word for word in words if word not in index]
        if unknown:
            raise UserError(f"{unknown[0]!r} is not in the vocabulary of the data set; use its {'words' if meta['join'] else 'characters'}, "
                            "or name the data set that the text belongs to")  # fmt: skip
        return [index[word] for word in words]

    return encode


def decode(meta, ids, padding=False):
    """Token ids (a sequence of ints) -> text, special tokens kept but, without `padding`, those that pad its end; from what meta.json holds."""
    ids = [int(i) for i in ids]
    while ids and ids[-1] == meta["pad_id"] and not padding:
        ids.pop()
    if meta["tokenizer"] == "gpt2":
        return gpt2_encoding().decode(ids)
    text = meta["join"].join(meta["vocab"][i] for i in ids)
    if meta["tokenizer"] == "bert":
        text = text.replace(" ##", "")
    return text


# ------------------------------------------------------------------------------------------------
# Documents -> rows -> files.


def pack(documents, seq_len, bos, eos):
    """Yield uint16 rows (n, L) from an iterable of integer arrays, one a document.

    Documents are joined by EOS and the stream is cut every L - 2 tokens, each cut framed by BOS and
    EOS. With bos = eos = None nothing is added, and the stream is cut every L tokens.
    """
    body = seq_len if bos is None else seq_len - 2
    parts, held = [], 0
    for ids in documents:
        parts += [np.asarray(ids, np.uint16)] + ([] if eos is None else [np.array([eos], np.uint16)])
        held += len(ids) + (eos is not None)
        if held >= 64 * body:  # flush in blocks: one concatenation per 64 rows, not per document
            stream = np.concatenate(parts)
            rows = stream[: held // body * body].reshape(-1, body)
            parts = [stream[rows.size :]]
            held = len(parts[0])
            yield frame(rows, bos, eos)
    rows = np.concatenate(parts)[: held // body * body].reshape(-1, body) if parts else np.zeros((0, body), np.uint16)
    yield frame(rows, bos, eos)


def frame(rows, bos, eos):
    """Put BOS before and EOS after each row (n, L - 2); leave the rows alone when there is none."""
    return rows if bos is None else np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))


def load_documents(args):
    """The sources as `datasets`: {"train": Dataset, "val": Dataset or None}."""
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else `datasets` reports each use of its readers to a host on the network
    import datasets

    local = [Path(source) for source in args.source if Path(source).exists()]
    missing = [source for source in args.source if not Path(source).exists()]
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if local and missing:
        raise UserError(f"no such file: {missing[0]!r}")
    if args.name == "file" and missing:
        raise UserError(f"no such file: {missing[0]!r}; --source takes local .txt, .jsonl or .parquet files")
    try:
        if local:
            files = [f for path in local for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.suffix in kinds or path == f]
            suffixes = {f.suffix for f in files}
            if len(suffixes) != 1 or not suffixes <= kinds.keys():
                found = ", ".join(sorted({f.name for f in files})[:3]) or "no files"
                raise UserError(f"--source holds {found}; expected files of one kind: {', '.join(kinds)}")
            kind = kinds[suffixes.pop()]
            extra = {"sample_by": args.documents, "keep_linebreaks": False} if kind == "text" else {}
            loaded = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", **extra)
            return {"train": loaded, "val": None}
        if len(args.source) != 1:
            raise UserError(f"--source takes one dataset id or local files, got {args.source}")
        loaded = datasets.load_dataset(args.source[0])
    except UserError:
        raise
    except Exception as error:  # datasets, huggingface_hub, pyarrow and requests each raise their own kinds
        error = error.__cause__ or error  # datasets hides what it met behind an error of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(f"cannot load {args.source[0]!r}: {type(error).__name__}: {reason[:200]}; check the name, the file and the "
                        "network, or give local files with --source") from None  # fmt: skip
    held_out = next((loaded[split] for split in ("validation", "test") if split in loaded), None)
    return {"train": loaded["train"], "val": held_out}


def text_rows(args):
    """Yield ("train" or "val", rows) from text, and return the tokenizer's part of meta.json first."""
    documents = load_documents(args)
    train, val = documents["train"], documents["val"]
    if args.column not in train.column_names:
        raise UserError(f"no column {args.column!r} in the source, it has {train.column_names}; name one with --column")
    if getattr(train.features[args.column], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"column {args.column!r} holds {train.features[args.column]}, not text; name another with --column")
    if args.limit:
        train = train.select(range(min(args.limit, len(train))))
        val = val and val.select(range(min(args.limit, len(val))))
    if args.val_documents and val is None:
        cut = len(train) - args.val_documents
        if cut < 1:
            raise UserError(f"{len(train)} documents are too few to hold out {args.val_documents}; lower --val-documents")
        train, val = train.select(range(cut)), train.select(range(cut, len(train)))
    if args.tokenizer == "char":
        return char_rows(args, train, val)

    os.register_at_fork(after_in_child=end_with_parent)
    tokenizer = describe_tokenizer(args)
    encode = functools.partial(encode_batch, tokenizer=args.tokenizer, column=args.column, bert=args.bert)

    def rows(dataset, title):
        try:
            tokens = dataset.map(encode, batched=True, remove_columns=dataset.column_names, num_proc=min(args.workers, len(dataset)) or None,
                                 desc=f"tokenising {title}")  # fmt: skip
        except RuntimeError as error:  # a worker was killed, most often for its memory
            raise UserError(f"tokenising {title} failed: {str(error).splitlines()[0]}; try fewer --workers") from None
        documents = (ids for batch in tokens.with_format("numpy").iter(1000) for ids in batch["ids"] if len(ids))
        return pack(documents, args.seq_len, tokenizer["bos_id"], tokenizer["eos_id"])

    return tokenizer, rows(train, "train"), rows(val, "val") if val is not None else None


def char_rows(args, train, val):
    """Characters: the vocabulary is what the text holds, documents are joined by a newline."""
    texts = ["\n".join(t or "" for t in part[args.column]) if part is not None else None for part in (train, val)]
    if args.name == "text8" and val is None:  # the usual split: 90M, 5M and 5M characters (here in proportion)
        whole = texts[0].strip()
        cut = len(whole) * 90 // 100
        texts = [whole[:cut], whole[cut : len(whole) * 95 // 100]]
    vocab = sorted(set(texts[0]) | set(texts[1] or ""))
    if args.name == "text8" and set(vocab) - set(" abcdefghijklmnopqrstuvwxyz"):
        raise UserError(f"text8 holds a-z and spaces only, but the source has {set(vocab) - set(' abcdefghijklmnopqrstuvwxyz')}; "
                        "use `file --tokenizer char` for other text")  # fmt: skip
    if len(vocab) > 65536:
        raise UserError(f"{len(vocab)} distinct characters do not fit in uint16; use --tokenizer gpt2")
    table = np.zeros(0x110000, np.uint16)
    table[[ord(c) for c in vocab]] = np.arange(len(vocab))

    def rows(text):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return pack([table[codes]], args.seq_len, None, None)

    tokenizer = dict(tokenizer="char", vocab_size=len(vocab), bos_id=None, eos_id=None, pad_id=None, vocab=vocab, join="")
    return tokenizer, rows(texts[0]), rows(texts[1]) if texts[1] is not None else None


def read_meta(folder):
    """data/NAME/meta.json as a dict; UserError where it is absent or is not one of ours."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        name = Path(folder).name
        raise UserError(
            f"no data set at {folder}; make one with: python prepare_data.py {name if name in SOURCES else f'file --source ... --out {folder}'}"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        meta = None
    if fault := meta_fault(meta):
        raise UserError(f"{path}: {fault}; make it anew with prepare_data.py --force")
    return meta


def meta_fault(meta):
    """What keeps `meta` from being what a meta.json of ours holds, in a few words; None where nothing does."""
    if not isinstance(meta, dict):
        return "it is not the meta.json of a data set"
    if missing := {"vocab_size", "seq_len", "train_rows", "val_rows", "tokenizer", "bos_id", "eos_id", "pad_id", "sha256"} - meta.keys():
        return f"it lacks {', '.join(sorted(missing))}"
    for key, high in dict(vocab_size=65536, seq_len=1 << 20, train_rows=10**12, val_rows=10**12).items():
        if type(meta[key]) is not int or not 1 <= meta[key] <= high:
            return f"{key} is not an integer from 1 to {high}"
    for key in ("bos_id", "eos_id", "pad_id"):
        if (value := meta[key]) is not None and (type(value) is not int or not 0 <= value < meta["vocab_size"]):
            return f"{key} is no token of the vocabulary"
    if not (isinstance(meta["sha256"], dict) and all(isinstance(meta["sha256"].get(k), str) for k in ("train", "val"))):
        return "sha256 does not give that of train and of val"
    if meta["tokenizer"] == "gpt2":
        return None if meta["vocab_size"] == 50257 else "vocab_size is not the 50257 of gpt2"
    if meta["tokenizer"] not in ("grammar", "bert", "char"):
        return "tokenizer is none of gpt2, bert, char and grammar"
    words = meta.get("vocab")
    if not (isinstance(words, list) and len(words) == meta["vocab_size"] and all(isinstance(w, str) for w in [*words, meta.get("join")])):
        return "vocab and join do not hold vocab_size words and what stands between them"
    return None


def same_tokens(path, trained, folder, meta):
    """UserError where the data set in `folder` has other tokens, or rows of another length, than the checkpoint at `path` was trained on."""
    for key in ("tokenizer", "vocab_size", "seq_len", "vocab"):
        if trained.get(key) != meta.get(key):
            was, now = (trained[key], meta[key]) if key != "vocab" else ("of its own", "of other words")
            raise UserError(f"{path} was trained on rows of {key} {was}, {folder} has {key} {now}; "
                            "name the data set that it was trained on with --data")  # fmt: skip


def read_rows(folder, split, meta):
    """The rows of data/NAME/{train,val}.bin, memory-mapped, uint16 (N, L); UserError where the size is not what meta says."""
    path, shape = Path(folder) / f"{split}.bin", (meta[f"{split}_rows"], meta["seq_len"])
    expected = 2 * shape[0] * shape[1]
    if not path.is_file() or path.stat().st_size != expected:
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise UserError(f"{path}: found {found}, meta.json says {expected:,} bytes; make it anew with prepare_data.py --force")
    return np.memmap(path, "<u2", "r", shape=shape)


def verify_rows(folder, split, meta):
    """Read all of a split once: UserError where its sha256 is not that of meta.json, or an id lies outside the vocabulary."""
    from tqdm import tqdm

    rows, digest, highest = read_rows(folder, split, meta), hashlib.sha256(), 0
    path, step = Path(folder) / f"{split}.bin", max(1, 2**24 // meta["seq_len"])
    for first in tqdm(range(0, len(rows), step), desc=f"checking {path}", unit="block", leave=False, disable=None, delay=1):
        block = np.ascontiguousarray(rows[first : first + step])
        digest.update(block)
        highest = max(highest, int(block.max()))
    if digest.hexdigest() != (found := meta["sha256"][split]):
        raise UserError(f"{path}: its sha256 is {digest.hexdigest()[:12]}…, meta.json says {found[:12]}…; make it anew with prepare_data.py --force")
    if highest >= meta["vocab_size"]:
        raise UserError(
            f"{path}: it holds token {highest}, the vocabulary ends at {meta['vocab_size'] - 1}; make it anew with prepare_data.py --force"
        )


# ------------------------------------------------------------------------------------------------
# The command line. A source is (dataset, tokenizer, L, held-out documents, how a .txt is cut into documents).

SOURCES = {
    "grammar": dict(source=[], tokenizer="grammar", seq_len=None, val_documents=0, documents="line"),
    "owt": dict(source=["Skylion007/openwebtext"], tokenizer="gpt2", seq_len=1024, val_documents=100_000, documents="paragraph"),
    "lm1b": dict(source=["dvruette/lm1b"], tokenizer="bert", seq_len=128, val_documents=0, documents="line"),
    "text8": dict(source=["afmck/text8"], tokenizer="char", seq_len=256, val_documents=0, documents="document"),
    "file": dict(source=[], tokenizer="gpt2", seq_len=128, val_documents=0, documents="document"),
}
GRAMMAR_ROWS = {"train": 50_000, "val": 5_000}


def parse_args():
    parser = Parser(prog="prepare_data.py", description=__doc__)
    parser.add_argument("name", choices=list(SOURCES), help="what to prepare")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: data/NAME)")
    parser.add_argument("--force", action="store_true", help="replace a finished data set")
    group = parser.add_argument_group("what to read")
    group.add_argument("--source", nargs="+", metavar="WHERE", help="another dataset id, or local .txt, .jsonl or .parquet files or folders")
    group.add_argument("--column", default="text", metavar="NAME", help="the column that holds the text")
    group.add_argument("--documents", choices=["line", "paragraph", "document"],
                       help="what one document of a .txt file is: a line, a paragraph (blank lines between), or the whole file")  # fmt: skip
    group.add_argument("--val-documents", type=number(int, 0), metavar="N",
                       help="hold out the last N documents where the source has no split of its own "
                            "(default: owt 100000; without it, the last 5%% of the rows)")  # fmt: skip
    group.add_argument("--limit", type=number(int, 1), metavar="N", help="read at most N documents of each split")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the grammar's draws")
    group = parser.add_argument_group("how to cut it into rows of tokens")
    group.add_argument("--tokenizer", choices=["gpt2", "bert", "char"], help="default: owt and file gpt2, lm1b bert, text8 char")
    group.add_argument("--bert", default="bert-base-uncased", metavar="ID", help="hub name or folder of the bert tokenizer")
    group.add_argument("--seq-len", type=number(int, 4, 1 << 20), metavar="L",
                       help="tokens a row, frame included (default: owt 1024, lm1b 128, text8 256, file 128)")  # fmt: skip
    group.add_argument("--workers", type=number(int, 1, 1024), default=os.cpu_count() or 1, metavar="N", help="processes that tokenise")
    args = parser.parse_args()
    if args.name == "grammar":
        given = [f for f in ("source", "tokenizer", "seq_len", "documents", "val_documents", "limit") if getattr(args, f)]
        if given:
            parser.error(f"grammar is generated, so --{given[0].replace('_', '-')} does not apply to it")
    if args.name == "file" and not args.source:
        parser.error("file needs --source with local .txt, .jsonl or .parquet files")
    asked = {key: getattr(args, key) for key in ("name", "tokenizer", "seq_len")}
    args.asked = {key: value for key, value in asked.items() if value is not None}  # what a data set that is there must be
    for key, value in SOURCES[args.name].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or Path("data") / args.name
    return args


def write_rows(path, rows, seq_len):
    """Write an iterator of row blocks to `path` with a progress bar: (number of rows, sha256)."""
    from tqdm import tqdm

    count, digest = 0, hashlib.sha256()
    with open(path, "wb") as file, tqdm(unit="row", desc=f"writing {path.name}") as bar:
        for block in rows:
            data = np.ascontiguousarray(block, "<u2").tobytes()
            file.write(data)
            digest.update(data)
            count += len(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == 2 * seq_len * count
    return count, digest.hexdigest()


def build(args, folder):
    """Write train.bin, val.bin and meta.json into `folder`."""
    if args.name == "grammar":
        args.seq_len = grammar_longest()
        vocab = grammar_words()
        tokenizer = dict(tokenizer="grammar", vocab_size=len(vocab), bos_id=None, eos_id=1, pad_id=0, vocab=vocab, join=" ")
        blocks = {split: iter([grammar_rows(rows, [args.seed, i])]) for i, (split, rows) in enumerate(GRAMMAR_ROWS.items())}
    else:
        tokenizer, train, val = text_rows(args)
        blocks = {"train": train, "val": val}
    if tokenizer["vocab_size"] > 65536:
        raise UserError(f"a vocabulary of {tokenizer['vocab_size']} does not fit in uint16 (at most 65536); use another tokenizer")
    counts, digests = {}, {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if blocks[split] is None:  # no split of its own: the last 5% of the rows, at least one
            total = counts["train"]
            held = max(1, total // 20)
            rows = np.fromfile(folder / "train.bin", "<u2").reshape(total, args.seq_len)
            blocks = {"train": iter([rows[:-held]]), "val": iter([rows[-held:]])} if total > 1 else blocks
            if total > 1:
                counts["train"], digests["train"] = write_rows(folder / "train.bin", blocks["train"], args.seq_len)
        counts[split], digests[split] = write_rows(path, blocks[split] or iter([]), args.seq_len)
        if not counts[split]:
            raise UserError(f"the source gives no {split} row of {args.seq_len} tokens: the text is empty or too short; "
                            "give more text or a smaller --seq-len")  # fmt: skip
    meta = dict(name=args.name, seq_len=args.seq_len, **tokenizer, train_rows=counts["train"], val_rows=counts["val"],
                source=args.source, sha256=digests)  # fmt: skip
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return meta


def main():
    args = parse_args()
    if (args.out / "meta.json").exists() and not args.force:
        there = read_meta(args.out)
        for key, asked in args.asked.items():
            if asked != there[key]:
                raise UserError(f"{args.out} is already there with {key} {there[key]}, not {asked}; --force replaces it, --out names another folder")
        print(f"{args.out} is already there; --force makes it anew")
        return
    args.out = args.out.resolve()
    old = args.out.with_name(args.out.name + ".old")
    partial = args.out.with_name(args.out.name + ".partial")
    for folder in (args.out, old, partial):  # the last two as a killed run left them: this one replaces them
        if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {"train.bin", "val.bin", "meta.json"}):
            raise UserError(f"{folder} exists and is not a data set alone; name another folder with --out")
    fresh_parent = not args.out.parent.exists()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (partial.exists() and os.path.samestat(os.fstat(lock), os.stat(partial))):
            raise BlockingIOError  # another finished, and renamed what is locked here, since it was opened
    except BlockingIOError:
        raise UserError(f"another prepare_data.py is writing {args.out}; wait for it to end") from None
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}; name another folder with --out") from None
    try:
        meta = build(args, partial)
        shutil.rmtree(old, ignore_errors=True)
        if args.out.exists():
            args.out.rename(old)
        partial.rename(args.out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if fresh_parent and not args.out.exists():
            args.out.parent.rmdir()
        os.close(lock)
    print(f"{args.out}: {meta['train_rows']:,} training and {meta['val_rows']:,} validation rows of {meta['seq_len']} tokens, "
          f"vocabulary {meta['vocab_size']:,}")  # fmt: skip
    if args.name == "grammar":
        print(f"the grammar has {meta['vocab_size'] - 2} words and {grammar_entropy():.3f} nats a sentence")


if __name__ == "__main__":
    run(main)
