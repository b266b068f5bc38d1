"""Turn text into memory-mapped rows of tokens.

    python prepare_data.py grammar                  # embedded, no download, seconds
    python prepare_data.py owt                      # the paper's OpenWebText: GPT-2 BPE, L = 1024
    python prepare_data.py lm1b                     # the paper's LM1B: bert-base-uncased, L = 128
    python prepare_data.py text8                    # 27 characters, L = 256
    python prepare_data.py file --source my.txt     # any local .txt, .jsonl or .parquet

Reads a data set from the hub, or local files, with the `datasets` library and writes a folder:

    data/NAME/train.bin, val.bin    uint16, rows of exactly L tokens, nothing between the rows
    data/NAME/meta.json             name, tokenizer, vocab_size, seq_len, bos/eos/pad ids, row
                                    counts, source, sha256 of both files, vocabulary (not GPT-2's)

Word-piece rows are packed as in the paper: documents are joined by EOS, the stream is cut every
L - 2 tokens, and BOS and EOS frame each cut. Character rows are plain cuts of L characters. An
incomplete last cut is dropped. Everything is written to data/NAME.partial and renamed at the end:
a data set is complete or absent. A killed run leaves NAME.partial; the next one replaces it.
"""

import argparse
import bisect
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """The defaults of the flags that depend on what is prepared."""

    source: list  # a data set on the hub
    tokenizer: str
    seq_len: int | None
    documents: str = "document"  # what one document of a .txt file is
    val_documents: int = 0  # held out at the end


SOURCES = {
    "grammar": Source([], "grammar", None),
    "owt": Source(["Skylion007/openwebtext"], "gpt2", 1024, "paragraph", val_documents=100_000),
    "lm1b": Source(["dvruette/lm1b"], "bert", 128, "line"),
    "text8": Source(["afmck/text8"], "char", 256),
    "file": Source([], "gpt2", 128),
}
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FILES = {"train.bin", "val.bin", "meta.json"}
AGAIN = "run prepare_data.py --force to make it again"


# ------------------------------------------------------------------------------------------------
# From documents to rows.


def pack(documents, seq_len, bos, eos):
    """Yield blocks of uint16 rows (n, L) from an iterable of integer sequences, one per document.

    Documents are joined by EOS, the stream is cut every L - 2 tokens, and BOS and EOS frame each
    cut. With bos = eos = None nothing is added, and the stream is cut every L tokens.
    """
    body = seq_len if bos is None else seq_len - 2
    end = [] if eos is None else [eos]
    stream = np.zeros(0, np.uint16)  # what is not yet in a row
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 1000)):  # concatenating one by one is slow
        pieces = [piece for ids in batch for piece in (ids, end)]
        # build has checked that ids fit in uint16; numpy takes an empty list for floats.
        stream = np.concatenate([stream, *pieces], dtype=np.uint16, casting="unsafe")
        whole = len(stream) // body * body
        rows = stream[:whole].reshape(-1, body)
        stream = stream[whole:]
        if bos is not None:
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))
        yield rows


def text_rows(args):
    """Return the tokenizer's part of meta.json and the blocks of rows of train and val.

    val is None if the source has no split of its own and no documents are to be held out.
    """
    train, val = load_documents(args)
    kind = getattr(train.features.get(args.column), "dtype", "missing")
    if kind not in ("string", "large_string"):
        found = f"column {args.column!r} is {kind}, not text"
        raise SystemExit(f"{found}; name one of {train.column_names} with --column")
    if args.limit is not None:
        train = train.take(min(args.limit, len(train)))
        if val is not None:
            val = val.take(min(args.limit, len(val)))
    if args.val_documents and val is None:
        cut = len(train) - args.val_documents
        if cut < 1:
            found = f"{len(train)} documents are too few to hold out {args.val_documents}"
            raise SystemExit(f"{found}; lower --val-documents")
        val = train.skip(cut)
        train = train.take(cut)
    if args.tokenizer == "char":
        return char_rows(args, train, val)

    tokenizer = describe_tokenizer(args.tokenizer, args.bert)
    encode = functools.partial(encode_batch, args.tokenizer, args.bert, args.column)

    def rows(dataset, split):
        workers = max(1, min(args.workers, len(dataset)))
        options = dict(batched=True, num_proc=workers, desc=f"tokenising {split}")
        tokens = dataset.map(encode, remove_columns=dataset.column_names, **options)
        batches = tokens.with_format("numpy").iter(1000)
        documents = (ids for batch in batches for ids in batch["ids"] if len(ids))
        return pack(documents, args.seq_len, tokenizer["bos_id"], tokenizer["eos_id"])

    return tokenizer, rows(train, "train"), None if val is None else rows(val, "val")


def char_rows(args, train, val):
    """`text_rows` for characters: the vocabulary is what occurs, newlines join documents."""
    splits = [train] if val is None else [train, val]
    texts = ["\n".join(text or "" for text in split[args.column]) for split in splits]
    if args.name == "text8" and val is None:  # the usual split: 90M, 5M and 5M characters
        whole = texts[0].strip()
        cut = len(whole) * 90 // 100
        texts = [whole[:cut], whole[cut : len(whole) * 95 // 100]]
    vocab = sorted(set().union(*texts))
    if args.name == "text8" and (others := set(vocab) - set(" abcdefghijklmnopqrstuvwxyz")):
        found = f"text8 holds a-z and spaces only, the source has {sorted(others)[:10]}"
        raise SystemExit(f"{found}; use `file --tokenizer char` for other text")
    table = np.zeros(0x110000, np.uint16)  # code point -> id
    table[[ord(character) for character in vocab]] = np.arange(len(vocab))  # build checks the size
    codes = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
    blocks = [pack([table[code]], args.seq_len, None, None) for code in codes]

    tokenizer = dict(tokenizer="char", vocab_size=len(vocab), bos_id=None, eos_id=None, pad_id=None)
    tokenizer.update(vocab=vocab, join="")
    return tokenizer, blocks[0], blocks[1] if len(blocks) == 2 else None


def load_documents(args):
    """Return the source's documents as `datasets.Dataset`: train, and val or None."""
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets reports even the use of local readers
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no warning at each retry
    import datasets

    missing = [source for source in args.source if not Path(source).exists()]
    if missing and (args.name == "file" or len(args.source) > 1):
        expected = "expected .txt, .jsonl or .parquet files (or, except for `file`, one hub name)"
        raise SystemExit(f"no such file: {missing[0]!r}; {expected}; correct --source")
    where = dict(path=args.source[0])
    if not missing:
        reader, files = local_files(args.source)
        where = dict(path=reader, data_files=files)
        if reader == "text":
            where.update(sample_by=args.documents, keep_linebreaks=False)
    try:
        loaded = datasets.load_dataset(**where)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow: no common class
        cause = reason(error.__cause__ or error)  # datasets wraps the error that explains
        advice = "check the name, the file and the network, or give local files with --source"
        raise SystemExit(f"cannot load {args.source[0]!r}: {cause}; {advice}") from None
    val = next((loaded[split] for split in ("validation", "test") if split in loaded), None)
    return loaded["train"], val


def local_files(source):
    """Return the name of the `datasets` reader and the files, all of one kind, in `source`."""
    files = []
    for path in map(Path, source):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file.suffix in READERS or file == path]
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= READERS.keys():
        found = ", ".join(sorted({file.name for file in files})[:3]) or "no files"
        raise SystemExit(f"--source holds {found}; expected files of one kind of {list(READERS)}")
    return READERS[suffixes.pop()], [str(file) for file in files]


def reason(error):
    """The first line of a library's error; the rest can run to a page."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------
# From rows to files.


def prepare(args):
    """Build the data set beside its target, then rename it; return its meta.json as a dict."""
    partial = args.out.with_name(args.out.name + ".partial")
    for folder in (args.out, partial):
        refuse_others(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"cannot write {partial}: {error.strerror}; change --out") from None
    try:
        meta = build(args, partial)
        refuse_others(args.out)  # again: building can take hours
        if args.out.exists():
            shutil.rmtree(args.out)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a run that fails leaves nothing
    return meta


def refuse_others(folder):
    """SystemExit if `folder` exists and holds more than a data set: we delete nobody's files."""
    if folder.exists() and not (folder.is_dir() and FILES.issuperset(os.listdir(folder))):
        raise SystemExit(f"{folder} exists and is not just a data set; name another with --out")


def build(args, folder):
    """Write train.bin, val.bin and meta.json into `folder`; return the last as a dict."""
    source_rows = grammar_split if args.name == "grammar" else text_rows
    tokenizer, train, val = source_rows(args)
    if (size := tokenizer["vocab_size"]) > 65536:
        raise SystemExit(f"a vocabulary of {size} does not fit in uint16; use another tokenizer")
    train_rows, train_sha256 = write_rows(folder / "train.bin", train, args.seq_len)
    if val is None:  # hold out the last 5% of the rows, at least one
        rows = np.fromfile(folder / "train.bin", "<u2").reshape(-1, args.seq_len)
        held = max(1, len(rows) // 20)
        train_rows, train_sha256 = write_rows(folder / "train.bin", [rows[:-held]], args.seq_len)
        val = [rows[-held:]]
    val_rows, val_sha256 = write_rows(folder / "val.bin", val, args.seq_len)
    if not train_rows or not val_rows:
        found = f"{train_rows} training and {val_rows} validation rows of {args.seq_len} tokens"
        advice = "give more text or a smaller --seq-len"
        raise SystemExit(f"the text is empty or too short, it gives {found}; {advice}")
    meta = dict(name=args.name, seq_len=args.seq_len, **tokenizer)
    meta.update(train_rows=train_rows, val_rows=val_rows, source=args.source)
    meta["sha256"] = {"train": train_sha256, "val": val_sha256}
    meta["settings"] = args.settings
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return meta


def write_rows(path, blocks, seq_len):
    """Write blocks of rows (n, L) to `path`; return the number of rows and the file's sha256."""
    from tqdm import tqdm

    count = 0
    digest = hashlib.sha256()
    with open(path, "wb") as file, tqdm(unit="row", desc=f"writing {path.name}") as bar:
        for block in blocks:
            data = np.ascontiguousarray(block, "<u2").tobytes()
            file.write(data)
            digest.update(data)
            count += len(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())  # the rows must reach the disk before the rename does
    assert path.stat().st_size == 2 * seq_len * count
    return count, digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Tokenizers. meta.json holds {tokenizer, vocab_size, bos_id, eos_id, pad_id} and, except for GPT-2,
# {vocab, join}: the strings by token id, and the string that joins them.


@functools.cache
def gpt2_encoding():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # any of requests' errors, or one of the file system
        found = f"cannot download the GPT-2 vocabulary ({reason(error)})"
        advice = "connect to the internet, or set TIKTOKEN_CACHE_DIR to tiktoken's cache of it"
        raise SystemExit(f"{found}; {advice}") from None


@functools.cache
def bert_tokenizer(where):
    """The tokenizer at `where`: a name on the hub or a folder."""
    try:
        from transformers import BertTokenizerFast

        tokenizer = BertTokenizerFast.from_pretrained(where)
        if len(tokenizer) < 1000:  # transformers 5 returns an empty one if it finds no files
            raise ValueError("no vocabulary there")
    except Exception as error:  # ImportError, OSError, or huggingface_hub's and httpx's own
        found = f"no bert tokenizer at {where!r} ({reason(error)})"
        advice = "pip install transformers, connect to the internet, or give its folder with --bert"
        raise SystemExit(f"{found}; {advice}") from None
    return tokenizer


def describe_tokenizer(name, where):
    """The part of meta.json about the word-piece tokenizer `name`; `where` is for bert alone."""
    if name == "gpt2":
        gpt2 = gpt2_encoding()
        ids = dict(bos_id=gpt2.eot_token, eos_id=gpt2.eot_token, pad_id=None)
        return dict(tokenizer="gpt2", vocab_size=gpt2.n_vocab, **ids)
    bert = bert_tokenizer(where)
    ids = dict(bos_id=bert.cls_token_id, eos_id=bert.sep_token_id, pad_id=bert.pad_token_id)
    vocab = bert.convert_ids_to_tokens(list(range(len(bert))))
    return dict(tokenizer="bert", vocab_size=len(bert), **ids, vocab=vocab, join=" ")


def encode_batch(tokenizer, where, column, batch):
    """Encode a batch of documents: {"ids": one list of token ids per document}, no BOS or EOS."""
    texts = [text or "" for text in batch[column]]
    if tokenizer == "gpt2":
        return {"ids": gpt2_encoding().encode_ordinary_batch(texts, num_threads=1)}
    options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"ids": bert_tokenizer(where)(texts, **options)["input_ids"]}


def encoder(meta):
    """Return a function text -> list of token ids: the inverse of `decode`, up to tokenization.

    A special token written in the text, like <|endoftext|>, becomes its id. SystemExit at a word or
    character that the vocabulary lacks.
    """
    if meta["tokenizer"] == "gpt2":
        return lambda text: gpt2_encoding().encode(text, allowed_special="all")
    index = {word: i for i, word in enumerate(meta["vocab"])}
    if meta["tokenizer"] == "bert":
        from transformers import BertTokenizerFast

        bert = BertTokenizerFast(vocab=index)
        return lambda text: bert(text, add_special_tokens=False)["input_ids"]

    def encode(text):
        try:
            return [index[word] for word in (text.split() if meta["join"] else text)]
        except KeyError as error:
            found = f"{error} is not in the vocabulary of the data set"
            raise SystemExit(f"{found}; use other text, or the data set it belongs to") from None

    return encode


def decode(meta, ids):
    """Turn token ids (a sequence of ints) into text, without the padding at the end."""
    ids = [int(i) for i in ids]
    while ids and ids[-1] == meta["pad_id"]:
        ids.pop()
    if meta["tokenizer"] == "gpt2":
        return gpt2_encoding().decode(ids)
    text = meta["join"].join(meta["vocab"][i] for i in ids)
    if meta["tokenizer"] == "bert":
        text = text.replace(" ##", "")  # "##" marks a piece that continues a word
    return text


# ------------------------------------------------------------------------------------------------
# Reading back.


def read_meta(folder):
    """Return data/NAME/meta.json as a dict; SystemExit if it is absent or damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        name = Path(folder).name
        command = name if name in SOURCES else f"file --source ... --out {folder}"
        raise SystemExit(f"no data set at {folder}; make it: python prepare_data.py {command}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        meta = None
    needed = ["tokenizer", "vocab_size", "bos_id", "eos_id", "pad_id"]
    needed += ["seq_len", "train_rows", "val_rows", "sha256"]
    fault = None
    if not isinstance(meta, dict):
        fault = "not the meta.json of a data set"
    elif missing := [key for key in needed if key not in meta]:
        fault = f"{', '.join(missing)} missing"
    elif "vocab" in meta and len(meta["vocab"]) != meta["vocab_size"]:
        fault = f"vocab holds {len(meta['vocab'])} words, vocab_size says {meta['vocab_size']}"
    if fault:
        raise SystemExit(f"{path}: {fault}; {AGAIN}")
    return meta


def read_rows(folder, split, meta):
    """Map {train,val}.bin into memory: uint16 (N, L); SystemExit if its size is not meta's."""
    path = Path(folder) / f"{split}.bin"
    shape = (meta[f"{split}_rows"], meta["seq_len"])
    found = path.stat().st_size if path.is_file() else 0
    expected = 2 * shape[0] * shape[1]
    if found != expected:
        raise SystemExit(f"{path}: found {found:,} bytes, expected {expected:,}; {AGAIN}")
    return np.memmap(path, "<u2", "r", shape=shape)


def same_tokens(path, trained_meta, folder, meta):
    """SystemExit unless `folder` has the tokens and row length that checkpoint `path` learned."""
    for key in ("tokenizer", "vocab_size", "seq_len", "vocab"):
        was = trained_meta.get(key)
        now = meta.get(key)
        if was != now:
            values = "" if key == "vocab" else f" ({was}, not {now})"  # a vocabulary is too long
            advice = "name the data set that it was trained on with --data"
            raise SystemExit(
                f"{path} was trained on another {key} than {folder} has{values}; {advice}"
            )


# ------------------------------------------------------------------------------------------------
# The command line.


def positive(text):
    """An argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def fraction(text):
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the docstring as it stands, and defaults unless the help text gives them itself."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


def parse_args():
    """Parse the flags and fill in the source's defaults; args.settings is what shapes the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("name", choices=list(SOURCES), help="what to prepare")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: data/NAME)")
    add("--force", action="store_true", help="replace a finished data set")

    add = parser.add_argument_group("what to read").add_argument
    text = "a data set on the hub, or local .txt, .jsonl or .parquet files or folders"
    add("--source", nargs="+", metavar="WHERE", help=text)
    add("--column", default="text", metavar="NAME", help="the column that holds the text")
    text = "what to cut a .txt file into; blank lines separate paragraphs"
    add("--documents", choices=["line", "paragraph", "document"], help=text)
    text = "documents to hold out at the end of a source without a validation split"
    text += " (default: owt 100000; for others, the last 5%% of the rows are held out)"
    add("--val-documents", type=int, metavar="N", help=text)
    add("--limit", type=positive, metavar="N", help="read at most N documents of each split")
    add("--seed", type=int, default=0, help="seed of the grammar's draws")

    add = parser.add_argument_group("how to cut it into rows of tokens").add_argument
    text = "default: owt and file gpt2, lm1b bert, text8 char"
    add("--tokenizer", choices=["gpt2", "bert", "char"], help=text)
    text = "hub name or folder of the bert tokenizer"
    add("--bert", default="bert-base-uncased", metavar="WHERE", help=text)
    text = "tokens a row, BOS and EOS included (default: owt 1024, lm1b 128, text8 256, file 128)"
    add("--seq-len", type=positive, metavar="L", help=text)
    cores = os.cpu_count() or 1
    add("--workers", type=positive, default=cores, metavar="N", help="processes that tokenise")
    args = parser.parse_args()

    flags = vars(args)
    defaults = SOURCES[args.name]._asdict()
    given = {key: flags[key] for key in (*defaults, "limit") if flags[key] is not None}
    if args.name == "grammar" and given:
        flag = next(iter(given)).replace("_", "-")
        raise SystemExit(f"the grammar is generated: --{flag} does not apply to it")
    if args.name == "file" and not args.source:
        raise SystemExit("file needs --source with local .txt, .jsonl or .parquet files")
    flags.update(defaults | given)
    args.settings = {key: flags[key] for key in (*defaults, "limit", "column", "bert", "seed")}
    args.out = args.out or Path("data") / args.name
    return args


# ------------------------------------------------------------------------------------------------
# The embedded source: a small probabilistic grammar, as a deterministic weighted automaton.
#
#     some farmers near the river read a famous poem .
#
# Number binds determiner, subject and verb, up to five words apart across "near the river". The
# verb's class binds its object and the object's adjective, three words apart. Every (state, word)
# has one successor, so a row has at most one derivation: its probability is one product, and the
# entropy of the source is one backward recursion.

DETERMINERS = {"sg": "a this", "pl": "some these"}
PEOPLE = {
    "sg": "child woman farmer sailor king doctor",
    "pl": "children women farmers sailors kings doctors",
}
PREPOSITIONS = "near behind"
PLACES = "river bridge castle market school"
VERBS = {
    "food": {"sg": "eats cooks", "pl": "eat cook"},
    "text": {"sg": "reads writes", "pl": "read write"},
}
ADJECTIVES = {"food": "fresh warm sweet spicy", "text": "long short famous clever"}
OBJECTS = {"food": "apple cake soup pear fish", "text": "book letter poem story song"}
OPTIONAL = 1 / 2  # the probability of each optional phrase
PAD = "<pad>"
STOP = "."


@functools.cache
def grammar():
    """The automaton {state: {word: (probability, next state)}}, from "start" to None."""
    states = {}

    def add(state, words, probability, successor):
        arcs = states.setdefault(state, {})
        for word in words.split():
            assert word not in arcs, f"two derivations through {word!r}"
            arcs[word] = (probability / len(words.split()), successor)

    for n in ("sg", "pl"):
        add("start", DETERMINERS[n], 1 / 2, n)
        add(n, PEOPLE[n], 1, f"subject {n}")
        add(f"subject {n}", PREPOSITIONS, OPTIONAL, f"preposition {n}")
        add(f"preposition {n}", "the", 1, f"place {n}")
        add(f"place {n}", PLACES, 1, f"verb {n}")
        for kind in VERBS:
            add(f"subject {n}", VERBS[kind][n], (1 - OPTIONAL) / len(VERBS), kind)
            add(f"verb {n}", VERBS[kind][n], 1 / len(VERBS), kind)
    for kind in VERBS:
        add(kind, "the a", 1, f"{kind} object")
        add(f"{kind} object", ADJECTIVES[kind], OPTIONAL, f"{kind} noun")
        add(f"{kind} object", OBJECTS[kind], 1 - OPTIONAL, "stop")
        add(f"{kind} noun", OBJECTS[kind], 1, "stop")
    add("stop", STOP, 1, None)
    return states


@functools.cache
def grammar_words():
    """The vocabulary by token id: the padding, the full stop, then the words in order of use."""
    words = dict.fromkeys(word for arcs in grammar().values() for word in arcs)
    return [PAD, STOP] + [word for word in words if word != STOP]


@functools.cache
def grammar_longest(state="start"):
    """The number of words of the longest sentence, full stop included."""
    if state is None:
        return 0
    return max(1 + grammar_longest(after) for _, after in grammar()[state].values())


@functools.cache
def grammar_entropy(state="start"):
    """The exact entropy of the source in nats per sentence: H(state) = sum p (H(next) - log p)."""
    if state is None:
        return 0.0
    return sum(p * (grammar_entropy(after) - math.log(p)) for p, after in grammar()[state].values())


def grammar_log_prob(row):
    """The exact log-probability, in nats, of a row of token ids (L,); -inf if not grammatical.

    A grammatical row is one complete sentence followed by nothing but padding.
    """
    words = grammar_words()
    state = "start"
    total = 0.0
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
    """Draw `count` padded sentences: uint16 (count, L)."""
    rng = np.random.default_rng(seed)
    index = {word: i for i, word in enumerate(grammar_words())}
    arcs = {}  # state: cumulative probabilities, token ids and next states of its words
    for state, out in grammar().items():
        edges = list(itertools.accumulate(p for p, _ in out.values()))
        arcs[state] = (edges, [index[word] for word in out], [after for _, after in out.values()])
    rows = np.zeros((count, grammar_longest()), np.uint16)  # 0 is the padding
    for row, uniforms in zip(rows, rng.random(rows.shape), strict=True):
        state = "start"
        for position, u in enumerate(uniforms):
            if state is None:
                break
            edges, tokens, after = arcs[state]
            choice = min(bisect.bisect(edges, u), len(tokens) - 1)  # a sum can round to below 1
            row[position] = tokens[choice]
            state = after[choice]
    return rows


def grammar_split(args):
    """`text_rows` for the grammar: 50,000 and 5,000 sentences; sets args.seq_len."""
    args.seq_len = grammar_longest()
    vocab = grammar_words()
    tokenizer = dict(tokenizer="grammar", vocab_size=len(vocab), bos_id=None, eos_id=1, pad_id=0)
    tokenizer.update(vocab=vocab, join=" ")
    return tokenizer, [grammar_rows(50_000, [args.seed, 0])], [grammar_rows(5_000, [args.seed, 1])]


def main():
    args = parse_args()
    if (args.out / "meta.json").exists() and not args.force:
        found = read_meta(args.out)
        for key, asked in args.settings.items():
            was = found.get("settings", {}).get(key)
            if asked != was:
                there = f"{args.out} is already there with {key} {was}, not {asked}"
                raise SystemExit(f"{there}; --force replaces it, --out names another folder")
        print(f"{args.out} is already there; --force makes it again")
        return
    args.out = args.out.resolve()
    meta = prepare(args)
    print(
        f"{args.out}: {meta['train_rows']:,} training and {meta['val_rows']:,} validation rows "
        f"of {meta['seq_len']} tokens, vocabulary {meta['vocab_size']:,}"
    )
    if args.name == "grammar":
        words = meta["vocab_size"] - 2  # the padding and the full stop are not words
        print(f"the grammar has {words} words and {grammar_entropy():.3f} nats a sentence")


if __name__ == "__main__":
    main()
