"""Turn text into memory-mapped rows of tokens.

    python prepare_data.py grammar                  # embedded, no download, seconds
    python prepare_data.py owt                      # the paper's OpenWebText: GPT-2 BPE, L = 1024
    python prepare_data.py lm1b                     # the paper's LM1B: bert-base-uncased, L = 128
    python prepare_data.py text8                    # 27 characters, L = 256
    python prepare_data.py file --source my.txt     # your own text: GPT-2 BPE, L = 128
    python prepare_data.py file --source Salesforce/wikitext --config wikitext-103-raw-v1 \\
        --seq-len 1024 --out data/wikitext              # any data set on the hub

Reads a data set from the hub or local files: .txt, .jsonl (or .json: one JSON object a line), both
also as .gz, and .parquet. A folder means all of these in it, by path, but no hidden ones. Writes

    data/NAME/train.bin, val.bin    uint16, rows of exactly L tokens, nothing between the rows
    data/NAME/meta.json             tokenizer, vocabulary, row counts, settings, sha256 of both

Word-piece rows are packed as in the paper: documents are joined by EOS, the stream is cut every
L - 2 tokens, and BOS and EOS frame each cut. Character rows are plain cuts of L characters. An
incomplete last cut is dropped. A data set is complete or absent: until then it is NAME.partial.
"""

import argparse
import bisect
import contextlib
import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

SOURCES = {  # the defaults of the flags that depend on what is prepared
    "grammar": dict(tokenizer="grammar", seq_len=10),
    "owt": dict(source=["Skylion007/openwebtext"], tokenizer="gpt2", seq_len=1024)
    | dict(documents="paragraph", val_documents=100_000),  # the last of the hub's only split
    "lm1b": dict(source=["dvruette/lm1b"], tokenizer="bert", seq_len=128, documents="line"),
    "text8": dict(source=["afmck/text8"], tokenizer="char", seq_len=256),
    "file": dict(tokenizer="gpt2", seq_len=128),
}


# ---- From documents to rows. -------------------------------------------------------------------
def batches(items):
    """Lists of up to 1,000 items: enough to share between threads, small enough for the memory."""
    items = iter(items)
    while batch := list(itertools.islice(items, 1000)):
        yield batch


def pack(documents, seq_len, bos, eos):
    """Join documents (integer sequences) and cut them, as above, into blocks of uint16 rows (n, L).

    With bos = eos = None nothing is added, and the stream is cut every L tokens."""
    body = seq_len if bos is None else seq_len - 2
    end = [] if eos is None else [eos]
    stream = np.zeros(0, np.uint16)  # what is not yet in a row
    for batch in batches(documents):  # concatenating one by one is slow
        pieces = [piece for ids in batch for piece in (ids, end)]
        # numpy takes an empty list for floats.
        stream = np.concatenate([stream, *pieces], dtype=np.uint16, casting="unsafe")
        rows, stream = np.split(stream, [len(stream) // body * body])
        rows = rows.reshape(-1, body)
        if bos is not None:
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))
        yield rows


def text_rows(args):
    """Return the tokenizer's part of meta.json, and the blocks of train and, if any, of val."""
    splits = load_texts(args)
    if args.tokenizer == "char":
        return char_rows(args, splits)
    tokenizer, encode = load_tokenizer(args)
    blocks = []
    for split in splits:
        documents = itertools.chain.from_iterable(map(encode, batches(split)))
        documents = filter(None, documents)  # an empty one adds no EOS
        blocks.append(pack(documents, args.seq_len, tokenizer["bos_id"], tokenizer["eos_id"]))
    return tokenizer, blocks


def char_rows(args, splits):
    """`text_rows` for characters: the vocabulary is what occurs, newlines join documents."""
    texts = ["\n".join(split) for split in splits]
    if args.name == "text8" and len(texts) == 1:  # the usual split: 90M, 5M and 5M characters
        whole = texts[0].strip()
        cut = len(whole) * 90 // 100
        texts = [whole[:cut], whole[cut : len(whole) * 95 // 100]]
    vocab = sorted(set().union(*texts))
    table = np.zeros(0x110000, np.uint16)  # code point -> id
    table[[ord(character) for character in vocab]] = range(len(vocab))
    codes = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
    tokenizer = dict(tokenizer="char", vocab_size=len(vocab), bos_id=None, eos_id=None, pad_id=None)
    tokenizer |= dict(vocab=vocab, join="")
    return tokenizer, [pack([table[code]], args.seq_len, None, None) for code in codes]


# ---- From sources to texts. A record is a document as a dict: {column: text}. ------------------
KINDS = (".txt", ".jsonl", ".json", ".parquet")


def kind(path):
    """The suffix of a file without .gz, in lower case: .txt of A.TXT.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def load_texts(args):
    """Return the texts of the source's splits, train and if any val, as iterators."""
    paths = []
    for path in map(Path, args.source):
        files = [file for file in sorted(path.rglob("*")) if kind(file) in KINDS]
        paths += [file for file in files if "/." not in f"/{file.relative_to(path)}"] or [path]
    if len(paths) == 1 and kind(paths[0]) not in KINDS and not paths[0].exists():
        splits = hub_records(args)
    else:
        for path in paths:
            if kind(path) not in KINDS or not path.is_file():
                raise SystemExit(f"--source {path} is no file or folder of {', '.join(KINDS)}")
        say(f"files to read: {len(paths):,}")
        files = (read_file(path, args.column, args.documents) for path in paths)
        splits = [itertools.chain.from_iterable(files)]  # one file is open at a time
    return [texts(itertools.islice(split, args.limit), args.column) for split in splits]


def read_file(path, column, documents):
    """The records of one file. In JSON a field may change its type from line to line."""
    expected = f"expected a whole {kind(path)} file, its text in UTF-8"
    with explain(f"cannot read {path}", expected):
        if kind(path) == ".parquet":
            import pyarrow.parquet  # comes with datasets

            with pyarrow.parquet.ParquetFile(path) as file:
                columns = [column] if column in file.schema_arrow.names else None
                for batch in file.iter_batches(1000, columns=columns):
                    yield from batch.to_pylist()
            return
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:  # -sig: without a byte order mark
            if kind(path) == ".txt":
                yield from ({column: text} for text in cut_text(file, documents))
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    with explain(f"cannot read line {number} of {path}", "expected a JSON object"):
                        record = dict(**json.loads(line))
                    yield record


def cut_text(file, documents):
    """Cut an open text file into lines, paragraphs (which end at a blank line) or nothing."""
    if documents == "document":
        yield file.read()
        return
    end = "\n" if documents == "line" else "\n\n"
    text = ""
    for line in file:
        text += line
        if text.endswith(end):
            if text != "\n\n":  # a third line break stays in front of the next paragraph
                yield text.removesuffix(end)
            text = ""
    if text:
        yield text


def hub_records(args):
    """The records of the train split on the hub and, if any, those of validation or test."""
    advice = "check the network, --config and --column, or give files with --source"
    with explain(f"cannot load {args.source[0]!r}", advice):
        import datasets

        found = datasets.load_dataset(path=args.source[0], name=args.config)
        names = [name for name in ("train", "validation", "test") if name in found][:2]
        train, *val = [found[name].select_columns([args.column]) for name in names]
        if args.val_documents and not val:
            cut = len(train) - args.val_documents
            return [train.select(range(cut)), train.select(range(cut, len(train)))]
        return [train, *val]


def texts(records, column):
    """The text of each record, "" if it has none; how many have none is reported at the end."""
    count = without = halves = 0
    for count, record in enumerate(records, 1):  # noqa: B007
        text = record.get(column)
        if not isinstance(text, str):
            text = ""
            without += 1
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        halves += whole != text
        yield whole
    if 0 < count == without:
        raise SystemExit(f"no document has text in --column {column}, found {[*record]}")
    if without:
        say(f"{without:,} documents have no {column!r}: they count as empty")
    if halves:
        say(f"{halves:,} documents hold half a surrogate pair: it becomes U+FFFD")


def build(args, folder):
    """Write train.bin, val.bin and meta.json into `folder`; return the last as a dict."""
    source_rows = grammar_split if args.name == "grammar" else text_rows
    tokenizer, (train, *val) = source_rows(args)
    train_rows = write_rows(folder / "train.bin", train)
    if not val:  # hold out the last 5% of the rows, at least one
        rows = np.fromfile(folder / "train.bin", "<u2").reshape(-1, args.seq_len)
        held = max(1, len(rows) // 20)
        train_rows = write_rows(folder / "train.bin", [rows[:-held]])
        val = [[rows[-held:]]]
    val_rows = write_rows(folder / "val.bin", val[0])
    if not train_rows or not val_rows:
        raise SystemExit(f"too little text for rows of {args.seq_len}: add more or lower --seq-len")
    meta = dict(name=args.name, source=args.source, seq_len=args.seq_len, **tokenizer)
    meta |= dict(train_rows=train_rows, val_rows=val_rows)
    rows = {split: read_rows(folder, split, meta).ravel() for split in ("train", "val")}
    meta["sha256"] = {split: hashlib.sha256(ids).hexdigest() for split, ids in rows.items()}
    unrelated = {"out", "force", "workers"}  # they change no row
    meta["settings"] = {key: value for key, value in vars(args).items() if key not in unrelated}
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


# ---- Tokenizers. -------------------------------------------------------------------------------
# meta.json holds {tokenizer, vocab_size, bos_id, eos_id, pad_id} and, except for GPT-2,
# {vocab, join}: the strings by token id, and the string that joins them.
@functools.cache
def gpt2():
    """GPT-2's tokenizer."""
    with explain("cannot load the gpt2 tokenizer", "check the network, or set TIKTOKEN_CACHE_DIR"):
        import tiktoken

        return tiktoken.get_encoding("gpt2")


def load_tokenizer(args):
    """Return the tokenizer's part of meta.json, and a function texts -> the token ids of each."""
    if args.tokenizer == "gpt2":
        eot = gpt2().eot_token
        meta = dict(tokenizer="gpt2", vocab_size=gpt2().n_vocab)
        meta |= dict(bos_id=eot, eos_id=eot, pad_id=None)
        return meta, functools.partial(gpt2().encode_ordinary_batch, num_threads=args.workers)
    advice = "check the network, or give a folder with --bert"
    with explain(f"cannot load the bert tokenizer {args.bert!r}", advice):
        from transformers import BertTokenizerFast

        bert = BertTokenizerFast.from_pretrained(args.bert)
        if not 1000 <= len(bert) <= 65536:  # transformers 5 loads absent files as empty
            raise ValueError(f"{len(bert):,} words, expected 1,000 to 65,536, which fit in uint16")
        words = bert.convert_ids_to_tokens(list(range(len(bert))))
        lower_case = bert.init_kwargs.get("do_lower_case", True)
    meta = dict(tokenizer="bert", vocab_size=len(bert), bos_id=bert.cls_token_id)
    meta |= dict(eos_id=bert.sep_token_id, pad_id=bert.pad_token_id)
    meta |= dict(lower_case=lower_case, vocab=words, join=" ")
    options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    return meta, lambda texts: bert(texts, **options)["input_ids"]


def encoder(meta):
    """Return a function text -> list of token ids: the inverse of `decode`, up to tokenization.

    Special tokens in the text, as <|endoftext|>, become their ids. SystemExit at unknown words."""
    if meta["tokenizer"] == "gpt2":
        return lambda text: gpt2().encode(text, allowed_special="all")
    index = {word: i for i, word in enumerate(meta["vocab"])}
    if meta["tokenizer"] == "bert":
        from transformers import BertTokenizerFast

        bert = BertTokenizerFast(vocab=index, do_lower_case=meta.get("lower_case", True))
        return lambda text: bert(text, add_special_tokens=False)["input_ids"]

    def encode(text):
        words = text.split() if meta["join"] else text
        with explain("not in the vocabulary", r"a line break is typed as $'a\nb'"):
            return [index[word] for word in words]

    return encode


# How text in BERT's tokens is joined as people write it, in this order: as transformers 4 does.
CLEAN_UP = {f" {mark}": mark for mark in ".?!,"} | {" ' ": "'"}
CLEAN_UP |= {f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")}


def decode(meta, ids):
    """Turn token ids (a sequence of ints) into text, without the padding at the end."""
    ids = [int(i) for i in ids]
    while ids and ids[-1] == meta["pad_id"]:
        ids.pop()
    if meta["tokenizer"] == "gpt2":
        return gpt2().decode(ids)
    text = meta["join"].join(meta["vocab"][i] for i in ids)
    if meta["tokenizer"] == "bert":
        text = text.replace(" ##", "")  # "##" marks a piece that continues a word
        for apart, joined in CLEAN_UP.items():
            text = text.replace(apart, joined)
    return text


# ---- Machinery: skip at first reading. ---------------------------------------------------------
def prepare(args):
    """Build the data set beside its target, then rename it; return its meta.json as a dict."""
    files = ["train.bin", "val.bin", "meta.json"]
    if args.out.exists() and set(os.listdir(args.out)) - set(files):
        raise SystemExit(f"{args.out} holds more than a data set; name another with --out")
    partial = args.out.with_name(args.out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)  # what a killed run left is overwritten
    lock = os.open(partial, os.O_RDONLY)
    with explain(f"cannot lock {partial}", "if another process is writing there, wait for it"):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        meta = build(args, partial)
        for name in files:
            (args.out / name).unlink(missing_ok=True)
        partial.rename(args.out)  # only onto an empty folder: we delete nobody's files
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a run that fails leaves nothing
        os.close(lock)
    return meta


def write_rows(path, blocks):
    """Write blocks of rows (n, L) to `path`; return the number of rows."""
    count = 0
    with open(path, "wb") as file, tqdm(unit="row", desc=path.name, disable=None) as bar:
        for block in blocks:
            file.write(block.astype("<u2").tobytes())
            count += len(block)
            bar.update(len(block))
    return count


def read_meta(folder):
    """Return data/NAME/meta.json as a dict; SystemExit if it is absent or damaged."""
    path = Path(folder) / "meta.json"
    name = path.parent.name
    command = name if name in SOURCES else f"file --source ... --out {folder}"
    advice = f"make it: python prepare_data.py {command} (--force, if there is a damaged one)"
    with explain(f"no data set at {folder}: cannot read {path}", advice):
        return json.loads(path.read_text(encoding="utf-8"))


def read_rows(folder, split, meta):
    """Map {train,val}.bin into memory: uint16 (N, L); SystemExit if it is not what meta says."""
    path = Path(folder) / f"{split}.bin"
    shape = (meta[f"{split}_rows"], meta["seq_len"])
    advice = "run prepare_data.py --force to make it again"
    with explain(f"{path} is not {shape[0]:,} rows of {shape[1]:,} tokens", advice):
        return np.memmap(path, "<u2", "r").reshape(shape)


def same_tokens(path, trained_meta, folder, meta, *more):
    """SystemExit unless `folder` has the tokens that checkpoint `path` learned.

    more: further keys of meta.json that must agree: "seq_len", and "sha256" for the rows."""
    for key in ("tokenizer", "vocab_size", "vocab", "lower_case", *more):
        was = trained_meta.get(key)
        if was != meta.get(key):
            values = "" if key in ("vocab", "sha256") else f": {was} and {meta.get(key)}"
            found = f"{path} was trained on other data than {folder}, by {key}{values}"
            raise SystemExit(f"{found}; give its own, or train stage 1 on with --init")


@contextlib.contextmanager
def explain(problem, advice):
    """Turn an error in this block into SystemExit: what failed, why, what to do, in one line."""
    try:
        yield
    except Exception as error:  # the libraries that read text have no common class
        why = f"{type(error).__name__}: {str(error).strip()}"  # can run to a page
        raise SystemExit(f"{problem}: {why.splitlines()[0][:200]}; {advice}") from None


def say(text):
    """Print a line at once, from rank 0. If its reader or terminal has gone, go on."""
    if os.environ.get("RANK", "0") != "0":  # set by torchrun
        return
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive(text):
    """An argparse type: an integer, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the docstring as it stands, and defaults unless the help text gives them itself."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


def new_parser(doc):
    """The parser of every program."""
    return argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)


def parse_args():
    """Parse the flags and fill in the source's defaults."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("name", choices=list(SOURCES), help="what to prepare")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: data/NAME)")
    add("--force", action="store_true", help="replace a finished data set")

    add = parser.add_argument_group("what to read").add_argument
    add("--source", nargs="+", help="a data set on the hub, or files and folders in this order")
    add("--config", metavar="NAME", help="the configuration of a data set on the hub")
    add("--column", default="text", metavar="NAME", help="the column or key that holds the text")
    add("--documents", choices=["line", "paragraph", "document"], help="how to cut .txt files")
    add("--limit", type=positive, metavar="N", help="read at most N documents of each split")
    add("--seed", type=int, default=0, help="seed of the grammar's draws")

    add = parser.add_argument_group("how to cut it into rows of tokens").add_argument
    add("--tokenizer", choices=["gpt2", "bert", "char"], help="default: as listed above")
    add("--bert", default="bert-base-uncased", help="hub name or folder of the bert tokenizer")
    add("--seq-len", type=positive, metavar="L", help="BOS and EOS included (default: as above)")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="threads of gpt2's tokenizer")
    args = parser.parse_args()

    defaults = dict(source=[], documents="document", val_documents=0) | SOURCES[args.name]
    given = {key: value for key, value in vars(args).items() if value is not None}
    if args.name == "grammar" and (useless := sorted(defaults.keys() & given)):
        parser.error(f"the grammar is generated: it has no {', '.join(useless)}")
    if args.name == "file" and not args.source:
        parser.error("file needs --source: files, folders or the name of a data set on the hub")
    vars(args).update(defaults | given)
    args.out = (args.out or Path("data") / args.name).resolve()
    return args


def main():
    args = parse_args()
    if (args.out / "meta.json").exists() and not args.force:
        meta = read_meta(args.out)
        for key in sorted(meta["settings"].keys() & vars(args).keys()):
            if meta["settings"][key] != vars(args)[key]:
                found = f"{args.out} is there, with {key} {meta['settings'][key]}"
                raise SystemExit(f"{found}; --force replaces it, --out names another folder")
        say(f"{args.out} is already there; --force makes it again")
        return
    meta = prepare(args)
    rows = f"{meta['train_rows']:,} training and {meta['val_rows']:,} validation rows"
    say(f"{args.out}: {rows} of {meta['seq_len']} tokens, vocabulary {meta['vocab_size']:,}")


# ---- The embedded source: a small probabilistic grammar, as a deterministic automaton. ---------
#
#     some farmers near the river read a famous poem .
#
# Number binds determiner, subject and verb, up to five words apart. The verb's class binds its
# object and the object's adjective. Every (state, word) has one successor: the probability of a row
# is one product, and the entropy of the source is one backward recursion.

NUMBERS = [  # number, determiners, people, verbs of food and of text
    ("sg", "a this", "child woman farmer sailor king doctor", "eats cooks", "reads writes"),
    ("pl", "some these", "children women farmers sailors kings doctors", "eat cook", "read write"),
]
CLASSES = [  # class of the verb, adjectives, objects
    ("food", "fresh warm sweet spicy", "apple cake soup pear fish"),
    ("text", "long short famous clever", "book letter poem story song"),
]
LONGEST = 10  # words of the longest sentence, full stop included
PAD = "<pad>"


def automaton():
    """The grammar, {state: {word: (probability, next state)}}: "start" ... None, then padding."""
    states = {}

    def add(state, words, probability, successor):
        for word in words.split():
            states.setdefault(state, {})[word] = (probability / len(words.split()), successor)

    for n, determiners, people, *verbs in NUMBERS:
        add("start", determiners, 1 / 2, n)
        add(n, people, 1, f"subject {n}")
        add(f"subject {n}", "near behind", 1 / 2, f"preposition {n}")  # optional phrase
        add(f"preposition {n}", "the", 1, f"place {n}")
        add(f"place {n}", "river bridge castle market school", 1, f"verb {n}")
        for kind, words in zip(("food", "text"), verbs, strict=True):
            add(f"subject {n}", words, 1 / 4, kind)
            add(f"verb {n}", words, 1 / 2, kind)
    for kind, adjectives, objects in CLASSES:
        add(kind, "the a", 1, f"{kind} object")
        add(f"{kind} object", adjectives, 1 / 2, f"{kind} noun")  # optional word
        add(f"{kind} object", objects, 1 / 2, "stop")
        add(f"{kind} noun", objects, 1, "stop")
    add("stop", ".", 1, None)
    add(None, PAD, 1, None)
    return states


GRAMMAR = automaton()
# By token id: the padding, the full stop, then the words in order of use.
GRAMMAR_WORDS = list(dict.fromkeys([PAD, ".", *itertools.chain(*GRAMMAR.values())]))


@functools.cache
def grammar_entropy(state="start"):
    """The exact entropy of the source in nats per sentence: H(state) = sum p (H(next) - log p)."""
    if state is None:
        return 0.0
    return sum(p * (grammar_entropy(after) - math.log(p)) for p, after in GRAMMAR[state].values())


def grammar_log_prob(row):
    """The exact log-probability, in nats, of a row of token ids (L,); -inf if not grammatical."""
    state = "start"
    total = 0.0
    for token in row:
        word = GRAMMAR_WORDS[token]
        if word not in GRAMMAR[state]:
            return -math.inf
        probability, state = GRAMMAR[state][word]
        total += math.log(probability)
    return total if state is None else -math.inf


def grammar_rows(count, seed):
    """Draw `count` padded sentences: uint16 (count, L)."""
    rng = np.random.default_rng(seed)
    index = {word: i for i, word in enumerate(GRAMMAR_WORDS)}
    edges = {}  # state: the cumulative probabilities of its words, without the last
    for state, arcs in GRAMMAR.items():
        edges[state] = list(itertools.accumulate(p for p, _ in arcs.values()))[:-1]
    rows = np.zeros((count, LONGEST), np.uint16)
    for row, uniforms in zip(rows, rng.random(rows.shape), strict=True):
        state = "start"
        for position, u in enumerate(uniforms):
            word = list(GRAMMAR[state])[bisect.bisect(edges[state], u)]
            row[position] = index[word]
            state = GRAMMAR[state][word][1]
    return rows


def grammar_split(args):
    """`text_rows` for the grammar: 50,000 and 5,000 sentences."""
    size = len(GRAMMAR_WORDS)
    tokenizer = dict(tokenizer="grammar", vocab_size=size, bos_id=None, eos_id=1, pad_id=0)
    tokenizer |= dict(vocab=GRAMMAR_WORDS, join=" ")
    draws = [grammar_rows(50_000, [args.seed, 0]), grammar_rows(5_000, [args.seed, 1])]
    return tokenizer, [[rows] for rows in draws]


if __name__ == "__main__":
    main()
