"""Turn text into memory-mapped rows of tokens.

    python prepare_data.py grammar                  # embedded, no download, seconds
    python prepare_data.py owt                      # the paper's OpenWebText: GPT-2 BPE, L = 1024
    python prepare_data.py lm1b                     # the paper's LM1B: bert-base-uncased, L = 128
    python prepare_data.py text8                    # 27 characters, L = 256
    python prepare_data.py file --source my.txt     # .txt, .jsonl or .parquet: GPT-2 BPE, L = 128
    python prepare_data.py file --source Salesforce/wikitext --config wikitext-103-raw-v1 \\
        --val-only --seq-len 1024 --out data/wikitext    # to bound its likelihood

Reads a data set from the hub, or local files, and writes a folder:

    data/NAME/train.bin, val.bin    uint16, rows of exactly L tokens, nothing between the rows
    data/NAME/meta.json             tokenizer, vocabulary, row counts, settings, sha256 of both

Word-piece rows are packed as in the paper: documents are joined by EOS, the stream is cut every
L - 2 tokens, and BOS and EOS frame each cut. Character rows are plain cuts of L characters. An
incomplete last cut is dropped. Everything is written to data/NAME.partial and renamed at the end:
a data set is complete or absent.
"""

import argparse
import bisect
import collections
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from pickle import PicklingError
from threading import Thread

import numpy as np

# The defaults of the flags that depend on what is prepared.
FLAGS = "source tokenizer seq_len documents val_documents"
Source = collections.namedtuple("Source", FLAGS, defaults=("document", 0))
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
if not (sys.stdout and sys.stderr):  # closed, as by >&-
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


# ------------------------------------------------------------------------------------------------
# From documents to rows.


def pack(documents, seq_len, bos, eos):
    """Join documents (integer sequences) and cut them, as above, into blocks of uint16 rows (n, L).

    With bos = eos = None nothing is added, and the stream is cut every L tokens.
    """
    body = seq_len if bos is None else seq_len - 2
    if body < 1:
        raise SystemExit(f"--seq-len {seq_len} leaves no token between BOS and EOS; give 3 or more")
    end = [] if eos is None else [eos]
    stream = np.zeros(0, np.uint16)  # what is not yet in a row
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 1000)):  # concatenating one by one is slow
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
    splits = load_documents(args)
    if args.tokenizer == "char":
        return char_rows(args, splits)
    tokenizer = describe_tokenizer(args.tokenizer, args.bert)
    ends = tokenizer["bos_id"], tokenizer["eos_id"]
    return tokenizer, [pack(encoded(split, args), args.seq_len, *ends) for split in splits]


def encoded(split, args):
    """The token ids of each document in order, uint16 arrays, encoded by args.workers processes."""
    from tqdm import tqdm

    encode = functools.partial(encode_batch, args.tokenizer, args.bert)
    waiting = collections.deque()
    bar = tqdm(total=len(split), unit="document", desc="tokenising", disable=None)
    pool = ProcessPoolExecutor(args.workers, initializer=follow_parent)
    try:
        with bar, pool:
            for batch in split.select_columns([args.column]).iter(1000):
                waiting.append(pool.submit(encode, batch[args.column]))
                if len(waiting) > 2 * args.workers:
                    yield from waiting.popleft().result()
                bar.update(len(batch[args.column]))
            while waiting:
                yield from waiting.popleft().result()
    except (BrokenProcessPool, PicklingError):  # tiktoken's panics cannot be pickled
        why = "perhaps of memory (lower --workers) or of a million spaces in a row (cut them)"
        raise SystemExit(f"a tokenising process died, {why}") from None
    except OSError as error:  # too many processes, or open files
        for child in multiprocessing.active_children():
            child.kill()  # it waits for work, and the exit for it
        found = f"cannot start {args.workers} processes: {error.strerror}"
        raise SystemExit(f"{found}; lower --workers") from None


def follow_parent():
    """In a new process: leave Ctrl-C to the parent, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def char_rows(args, splits):
    """`text_rows` for characters: the vocabulary is what occurs, newlines join documents."""
    texts = ["\n".join(text or "" for text in split[args.column]) for split in splits]
    if args.name == "text8" and len(texts) == 1:  # the usual split: 90M, 5M and 5M characters
        whole = texts[0].strip()
        cut = len(whole) * 90 // 100
        texts = [whole[:cut], whole[cut : len(whole) * 95 // 100]]
    vocab = sorted(set().union(*texts))
    table = np.zeros(0x110000, np.uint16)  # code point -> id
    table[[ord(character) for character in vocab]] = np.arange(len(vocab))  # build checks the size
    codes = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
    tokenizer = dict(tokenizer="char", vocab_size=len(vocab), bos_id=None, eos_id=None, pad_id=None)
    tokenizer |= dict(vocab=vocab, join="")
    return tokenizer, [pack([table[code]], args.seq_len, None, None) for code in codes]


def load_documents(args):
    """Return the source's documents as a list of `datasets.Dataset`: train and, if any, val."""
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets reports even the use of local readers
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no warning at each retry
    import datasets

    files = [Path(name) for name in args.source]
    kinds = {path.suffix if path.is_file() else None for path in files}
    if len(kinds) == 1 and kinds <= READERS.keys():
        reader = READERS[kinds.pop()]
        how = dict(download_mode="force_redownload")  # the cache goes by a file's time
        if reader == "text":  # -sig: without a byte order mark
            how |= dict(encoding="utf-8-sig", sample_by=args.documents, keep_linebreaks=False)
        loads = [dict(path=reader, data_files=glob.escape(name), **how) for name in args.source]
        advice = "it should be UTF-8 text" if reader == "text" else f"it should be {reader}"
    elif len(files) == 1 and files[0].suffix not in READERS and not files[0].exists():
        loads = [dict(path=args.source[0], name=args.config)]  # on the hub
        advice = "check the network, or give files with --source"
    else:
        expected = f"expected files that exist, of one kind of {list(READERS)}"
        raise SystemExit(f"--source {' '.join(args.source)}: {expected}")
    loaded = []
    for name, where in zip(args.source, loads, strict=True):
        try:
            loaded.append(datasets.load_dataset(**where))
        except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow: no common class
            cause = error.__cause__ or error
            no_memory = isinstance(cause, MemoryError) or "new thread" in str(cause)
            if no_memory or getattr(cause, "errno", None):  # the system's own error
                advice = "make room in memory, and let HF_HOME name a folder that you may fill"
            raise SystemExit(f"cannot load {name!r}: {reason(cause)}; {advice}") from None
    names = [name for name in ("train", "validation", "test") if name in loaded[0]][:2]
    if not names:
        found = f"{args.source[0]} has the splits {[*loaded[0]]}"
        raise SystemExit(f"{found}, expected train, validation or test")
    try:
        splits = [datasets.concatenate_datasets([part[name] for part in loaded]) for name in names]
    except ValueError as error:
        raise SystemExit(f"--source has files of different columns: {reason(error)}") from None
    kinds = {name: getattr(kind, "dtype", kind) for name, kind in splits[0].features.items()}
    if kinds.get(args.column) not in ("string", "large_string"):
        raise SystemExit(f"--column {args.column} should name one of strings, found {kinds}")
    if missing := sum(split.data.column(args.column).null_count for split in splits):
        say(f"{missing:,} documents have no {args.column!r}: they count as empty")
    if args.limit is not None:
        splits = [split.take(min(args.limit, len(split))) for split in splits]
    if args.val_documents and len(splits) == 1:
        cut = len(splits[0]) - args.val_documents
        if cut < 1:
            raise SystemExit(f"only {len(splits[0])} documents; lower --val-documents")
        splits = [splits[0].take(cut), splits[0].skip(cut)]
    return splits


def say(text):
    """Print a line at once. If its reader has gone, as with `| head`, go on in silence."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)  # a terminal may not be UTF-8
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise SystemExit(f"cannot write to stdout: {error.strerror}") from None


def reason(error):
    """The first line of a library's error; the rest can run to a page."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------
# From rows to files.


def prepare(args):
    """Build the data set beside its target, then rename it; return its meta.json as a dict."""
    partial = args.out.parent / (args.out.name + ".partial")
    for folder in (args.out, partial):
        refuse_others(folder)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in partial.iterdir():  # of a run that was killed
            file.unlink()
    except BlockingIOError:
        raise SystemExit(f"another process is writing {partial}: wait for it") from None
    except OSError as error:
        raise SystemExit(f"cannot write {partial}: {error.strerror}; change --out") from None
    try:
        meta = build(args, partial)
        refuse_others(args.out)  # again: building can take hours
        shutil.rmtree(args.out, ignore_errors=True)
        partial.rename(args.out)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {args.out} is as it was") from None
    except MemoryError:
        raise SystemExit("out of memory: free some, or lower --workers or --limit") from None
    except OSError as error:
        raise SystemExit(f"cannot write {partial}: {error}; make room, or change --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a run that fails leaves nothing
        os.close(lock)
    return meta


def refuse_others(folder):
    """SystemExit if `folder` exists and holds more than a data set: we delete nobody's files."""
    if os.path.ismount(folder):  # it cannot be replaced by a renamed folder
        raise SystemExit(f"{folder} is a mount point; name a folder in it with --out")
    if folder.exists() and not (folder.is_dir() and FILES.issuperset(os.listdir(folder))):
        raise SystemExit(f"{folder} exists and is not just a data set; name another with --out")


def build(args, folder):
    """Write train.bin, val.bin and meta.json into `folder`; return the last as a dict."""
    source_rows = grammar_split if args.name == "grammar" else text_rows
    tokenizer, (train, *val) = source_rows(args)
    if args.val_only:
        train, val = [], [*val, train][:1]
    if (size := tokenizer["vocab_size"]) > 65536:
        raise SystemExit(f"a vocabulary of {size} does not fit in uint16; use another tokenizer")
    train_rows, train_sha256 = write_rows(folder / "train.bin", train)
    if not val:  # hold out the last 5% of the rows, at least one
        rows = np.fromfile(folder / "train.bin", "<u2").reshape(-1, args.seq_len)
        held = max(1, len(rows) // 20)
        train_rows, train_sha256 = write_rows(folder / "train.bin", [rows[:-held]])
        val = [[rows[-held:]]]
    val_rows, val_sha256 = write_rows(folder / "val.bin", val[0])
    if not (train_rows or args.val_only) or not val_rows:
        raise SystemExit(f"too short for rows of {args.seq_len}: add text, or lower --seq-len")
    meta = dict(name=args.name, seq_len=args.seq_len, **tokenizer)
    meta |= dict(train_rows=train_rows, val_rows=val_rows, source=args.source)
    meta |= dict(sha256=dict(train=train_sha256, val=val_sha256), settings=args.settings)
    framed = "documents joined by EOS, cut every L - 2 tokens, each cut framed by BOS and EOS"
    plain = {"grammar": "a sentence a row, padded", "char": "cut every L characters"}
    meta["packing"] = plain.get(meta["tokenizer"], framed)
    packages = ("datasets", "tiktoken", "tokenizers", "transformers")
    installed = {found.name: found.version for found in metadata.distributions()}
    meta["versions"] = {name: installed[name] for name in packages if name in installed}
    text = json.dumps(meta, ensure_ascii=False) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")
    return meta


def write_rows(path, blocks):
    """Write blocks of rows (n, L) to `path`; return the number of rows and the file's sha256."""
    from tqdm import tqdm

    count = 0
    digest = hashlib.sha256()
    with open(path, "wb") as file, tqdm(unit="row", desc=path.name, disable=None) as bar:
        for block in blocks:
            data = np.ascontiguousarray(block, "<u2").tobytes()
            file.write(data)
            digest.update(data)
            count += len(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())  # the rows must reach the disk before the rename does
    return count, digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Tokenizers. meta.json holds {tokenizer, vocab_size, bos_id, eos_id, pad_id} and, except for GPT-2,
# {vocab, join}: the strings by token id, and the string that joins them.


@functools.cache
def pretrained(name, where=None):
    """The gpt2 or bert tokenizer; `where`, for bert alone, is a name on the hub or a folder."""
    try:
        if name == "gpt2":
            os.environ["RUST_BACKTRACE"] = "0"  # out of memory, a backtrace hangs tiktoken
            import tiktoken

            return tiktoken.get_encoding("gpt2")
        from transformers import BertTokenizerFast

        tokenizer = BertTokenizerFast.from_pretrained(where)
        if len(tokenizer) < 1000:  # transformers 5 returns an empty one if it finds no files
            raise ValueError(f"no vocabulary at {where!r}")
    except Exception as error:  # ImportError, OSError, or one of requests, huggingface_hub, httpx
        advice = "set TIKTOKEN_CACHE_DIR" if name == "gpt2" else "give a folder with --bert"
        found = f"cannot load the {name} tokenizer ({reason(error)})"
        raise SystemExit(f"{found}; check the network, or {advice}") from None
    return tokenizer


def describe_tokenizer(name, where):
    """The part of meta.json about the word-piece tokenizer `name`; `where` is for bert alone."""
    if name == "gpt2":
        gpt2 = pretrained("gpt2")
        ids = dict(bos_id=gpt2.eot_token, eos_id=gpt2.eot_token, pad_id=None)
        return dict(tokenizer="gpt2", vocab_size=gpt2.n_vocab, **ids)
    bert = pretrained("bert", where)
    ids = dict(bos_id=bert.cls_token_id, eos_id=bert.sep_token_id, pad_id=bert.pad_token_id)
    ids["lower_case"] = bert.init_kwargs.get("do_lower_case", True)
    vocab = bert.convert_ids_to_tokens(list(range(len(bert))))
    if ids["lower_case"] and any(word[:1] != "[" and word != word.lower() for word in vocab):
        found = f"the vocabulary at {where} has capitals, which it would never use"
        raise SystemExit(f'{found}: put {{"do_lower_case": false}} into its tokenizer_config.json')
    return dict(tokenizer="bert", vocab_size=len(bert), **ids, vocab=vocab, join=" ")


def encode_batch(tokenizer, where, texts):
    """Encode documents, strings or None, without BOS or EOS: a list of uint16 arrays."""
    texts = [text or "" for text in texts]
    if tokenizer == "gpt2":
        ids = pretrained("gpt2").encode_ordinary_batch(texts, num_threads=1)
    else:
        options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = pretrained("bert", where)(texts, **options)["input_ids"]
    return [np.array(row, np.uint16) for row in ids if row]  # build has checked that they fit


def encoder(meta):
    """Return a function text -> list of token ids: the inverse of `decode`, up to tokenization.

    Special tokens in the text, like <|endoftext|>, become their ids; SystemExit at an unknown word.
    """
    if meta["tokenizer"] == "gpt2":
        return lambda text: pretrained("gpt2").encode(text, allowed_special="all")
    index = {word: i for i, word in enumerate(meta["vocab"])}
    if meta["tokenizer"] == "bert":
        from transformers import BertTokenizerFast

        bert = BertTokenizerFast(vocab=index, do_lower_case=meta.get("lower_case", True))
        return lambda text: bert(text, add_special_tokens=False)["input_ids"]

    def encode(text):
        try:
            return [index[word] for word in (text.split() if meta["join"] else text)]
        except KeyError as error:
            raise SystemExit(f"{error} is not in the vocabulary; use other words") from None

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
        return pretrained("gpt2").decode(ids)
    text = meta["join"].join(meta["vocab"][i] for i in ids)
    if meta["tokenizer"] == "bert":
        text = text.replace(" ##", "")  # "##" marks a piece that continues a word
        for apart, joined in CLEAN_UP.items():
            text = text.replace(apart, joined)
    return text


# ------------------------------------------------------------------------------------------------
# Reading back.


def read_meta(folder):
    """Return data/NAME/meta.json as a dict; SystemExit if it is absent or damaged."""
    path = Path(folder) / "meta.json"
    if not os.access(path, os.R_OK):
        name = Path(folder).name
        command = name if name in SOURCES else f"file --source ... --out {folder}"
        advice = f"make it: python prepare_data.py {command}"
        raise SystemExit(f"no readable data set at {folder}; {advice}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        meta = {}
    needed = "tokenizer vocab_size bos_id eos_id pad_id seq_len train_rows val_rows sha256"
    if missing := set(needed.split()) - set(meta if isinstance(meta, dict) else ()):
        raise SystemExit(f"{path} is damaged, it lacks {sorted(missing)}; {AGAIN}")
    return meta


def read_rows(folder, split, meta):
    """Map {train,val}.bin into memory: uint16 (N, L); SystemExit if it is not what meta says."""
    path = Path(folder) / f"{split}.bin"
    shape = (meta[f"{split}_rows"], meta["seq_len"])
    found = path.stat().st_size if os.access(path, os.R_OK) else 0
    expected = 2 * shape[0] * shape[1]
    if found != expected:
        raise SystemExit(f"{path}: can read {found:,} bytes, expected {expected:,}; {AGAIN}")
    if not found:  # made with --val-only
        return np.zeros(shape, np.uint16)
    return np.memmap(path, "<u2", "r", shape=shape)


def same_tokens(path, trained_meta, folder, meta, *more):
    """SystemExit unless `folder` has the tokens that checkpoint `path` learned.

    more: further keys of meta.json that must agree, such as "seq_len", and "sha256" for the rows.
    """
    for key in ("tokenizer", "vocab_size", "vocab", "lower_case", *more):
        was = trained_meta.get(key)
        if was != meta.get(key):
            values = "" if key in ("vocab", "sha256") else f": {was} and {meta.get(key)}"
            found = f"{path} and {folder} differ in {key}{values}"
            raise SystemExit(f"{found}; give a checkpoint and --data of the same {key}")


# ------------------------------------------------------------------------------------------------
# The command line.


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float, which is `kind`, from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # which argparse names if the text is no number
    return parse


def utf8(text):
    """An argparse type: text without the half characters of another encoding."""
    return text.encode().decode()


positive = number(int, 1)
natural = number(int, 0)
amount = number(float, 0)
fraction = number(float, 0, 1)
below_one = number(float, 0, 0.9999999)
real = number(float, -1e6, 1e6)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the docstring as it stands, and defaults unless the help text gives them itself."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


def new_parser(doc, **more):
    """The parser of every program."""
    more |= dict(formatter_class=Help, allow_abbrev=False)
    return argparse.ArgumentParser(description=doc, **more)


def parse_args():
    """Parse the flags and fill in the source's defaults; args.settings is what shapes the data."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("name", choices=list(SOURCES), help="what to prepare")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: data/NAME)")
    add("--force", action="store_true", help="replace a finished data set")

    add = parser.add_argument_group("what to read").add_argument
    text = "a data set on the hub, or files, joined in this order: .txt, .jsonl, .json or .parquet"
    add("--source", nargs="+", help=text)
    add("--config", metavar="NAME", help="the configuration of a data set on the hub")
    add("--column", default="text", metavar="NAME", help="the column that holds the text")
    units = ["line", "paragraph", "document"]
    add("--documents", choices=units, help="how to cut .txt files; paragraphs end at blank lines")
    text = "hold out the last N if the hub gives no split (default: owt 100000, else 0: 5%% of it)"
    add("--val-documents", type=natural, metavar="N", help=text)
    text = "no training rows: all of the validation split or, if there is one split, of that"
    add("--val-only", action="store_true", help=text)
    add("--limit", type=positive, metavar="N", help="read at most N documents of each split")
    add("--seed", type=natural, default=0, help="seed of the grammar's draws")

    add = parser.add_argument_group("how to cut it into rows of tokens").add_argument
    add("--tokenizer", choices=["gpt2", "bert", "char"], help="default: as listed above")
    add("--bert", default="bert-base-uncased", help="hub name or folder of the bert tokenizer")
    text = "tokens a row, BOS and EOS included (default: as listed above)"
    add("--seq-len", type=positive, metavar="L", help=text)
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes that tokenise")
    args = parser.parse_args()

    flags = vars(args)
    defaults = SOURCES[args.name]._asdict()
    given = {key: flags[key] for key in (*defaults, "limit") if flags[key] is not None}
    if args.name == "grammar" and given:
        raise SystemExit(f"the grammar is generated: it has no {', '.join(given)}")
    if args.name == "file" and not args.source:
        raise SystemExit("file needs --source: .txt, .jsonl or .parquet files, or a hub name")
    flags.update(defaults | given)
    files = [Path(name) for name in args.source]
    kinds = {path.suffix for path in files}
    if "documents" in given and ".txt" not in kinds:
        raise SystemExit(f"--documents cuts .txt files, not {' '.join(args.source)}; leave it out")
    if args.config and kinds & READERS.keys():
        raise SystemExit("--config is for a data set on the hub, not for files; leave it out")
    if args.bert != parser.get_default("bert") and args.tokenizer != "bert":
        raise SystemExit(f"--bert {args.bert} needs --tokenizer bert")
    more = ("name", "limit", "column", "config", "val_only", "bert", "seed")
    args.settings = {key: flags[key] for key in (*defaults, *more)}
    if args.tokenizer == "bert":
        files += sorted(Path(args.bert).glob("*"))
    try:
        files = [path for path in files if path.is_file()]
        if empty := [path for path in files if not path.stat().st_size]:
            raise SystemExit(f"{empty[0]} is empty; leave it out")
        bytes_of = [np.memmap(path, "u1", "r") for path in files]
    except OSError as error:
        found = f"cannot read {error.filename!s:.80}: {error.strerror}"
        raise SystemExit(f"{found}; --source takes names of files that you may read") from None
    args.settings["sha256"] = [hashlib.sha256(content).hexdigest() for content in bytes_of]
    args.out = args.out or Path("data") / args.name
    return args


# ------------------------------------------------------------------------------------------------
# The embedded source: a small probabilistic grammar, as a deterministic weighted automaton.
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


@functools.cache
def grammar():
    """The automaton {state: {word: (probability, next state)}}: "start" ... None, then padding."""
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


@functools.cache
def grammar_words():
    """The vocabulary by token id: the padding, the full stop, then the words in order of use."""
    words = (word for arcs in grammar().values() for word in arcs)
    return list(dict.fromkeys([PAD, ".", *words]))


@functools.cache
def grammar_entropy(state="start"):
    """The exact entropy of the source in nats per sentence: H(state) = sum p (H(next) - log p)."""
    if state is None:
        return 0.0
    return sum(p * (grammar_entropy(after) - math.log(p)) for p, after in grammar()[state].values())


def grammar_log_prob(row):
    """The exact log-probability, in nats, of a row of token ids (L,); -inf if not grammatical."""
    state = "start"
    total = 0.0
    for token in row:
        word = grammar_words()[token]
        if word not in grammar()[state]:
            return -math.inf
        probability, state = grammar()[state][word]
        total += math.log(probability)
    return total if state is None else -math.inf


def grammar_rows(count, seed):
    """Draw `count` padded sentences: uint16 (count, L)."""
    rng = np.random.default_rng(seed)
    index = {word: i for i, word in enumerate(grammar_words())}
    edges = {}  # state: where in [0, 1] the share of one word ends and that of the next begins
    for state, arcs in grammar().items():
        edges[state] = list(itertools.accumulate(p for p, _ in arcs.values()))[:-1]
    rows = np.zeros((count, LONGEST), np.uint16)
    for row, uniforms in zip(rows, rng.random(rows.shape), strict=True):
        state = "start"
        for position, u in enumerate(uniforms):
            word = list(grammar()[state])[bisect.bisect(edges[state], u)]
            row[position] = index[word]
            state = grammar()[state][word][1]
    return rows


def grammar_split(args):
    """`text_rows` for the grammar: 50,000 and 5,000 sentences; sets args.seq_len."""
    args.seq_len = LONGEST
    vocab = grammar_words()
    tokenizer = dict(tokenizer="grammar", vocab_size=len(vocab), bos_id=None, eos_id=1, pad_id=0)
    tokenizer |= dict(vocab=vocab, join=" ")
    draws = [grammar_rows(50_000, [args.seed, 0]), grammar_rows(5_000, [args.seed, 1])]
    return tokenizer, [[rows] for rows in draws]


def main():
    args = parse_args()
    if (args.out / "meta.json").exists() and not args.force:
        meta = read_meta(args.out)
        was = meta.get("settings", {})
        for key, asked in args.settings.items():
            if key in was and asked != was[key]:
                found = f"{args.out} is already there with {key} {was[key]}, not {asked}"
                raise SystemExit(f"{found}; --force replaces it, --out names another folder")
        for split in ("train", "val"):
            read_rows(args.out, split, meta)  # refuses a file of another size
        say(f"{args.out} is already there; --force makes it again")
        return
    args.out = args.out.resolve()
    meta = prepare(args)
    rows = f"{meta['train_rows']:,} training and {meta['val_rows']:,} validation rows"
    say(f"{args.out}: {rows} of {meta['seq_len']} tokens, vocabulary {meta['vocab_size']:,}")
    if args.name == "grammar":
        say(f"the entropy of the grammar is {grammar_entropy():.3f} nats a sentence")


if __name__ == "__main__":
    main()
