"""Text in, token files out, batches back: all that lies between a corpus and the training loop.

    python prepare_data.py                                          # Python's own library
    python prepare_data.py --dataset=book.txt --tokenizer=gpt2      # any text file -> data/book
    python prepare_data.py --dataset=notes --glob='*.md' --name=md  # a folder of texts -> data/md

writes data/<name>/train.bin and val.bin (token ids, little-endian) and meta.json (what they are).
A corpus flows through in pieces, so memory does not grow with the length of the texts."""
import argparse
import hashlib
import json
import os
import re
import signal
import sys
import sysconfig
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

DATASETS = ("stdlib", "python", "shakespeare", "fineweb-edu")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PIECE = 1 << 21  # characters: about the most text that is handled as one string


# ---------------------------------------------------------------- tokenizers

def get_tokenizer(name):
    """-> tiktoken.Encoding: `bytes`, or tiktoken's by name. ValueError: unknown, or no network."""
    if name == "bytes":  # a token is a byte; the pattern only chops the text, for speed
        return tiktoken.Encoding("bytes", pat_str=r"(?s).{1,64}",
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"Tokenizer {name!r} could not be loaded ({type(error).__name__}): choose "
                         f"bytes, or with network {', '.join(tiktoken.list_encoding_names())}; a "
                         "machine with network can fill a folder for all (TIKTOKEN_CACHE_DIR)."
                         ) from error


def encode(tokenizer, text):
    """-> token ids (n,) uint32; special-token text inside `text` stays plain text."""
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's regex gives up on a run of a million spaces: halve it
        if len(text) < 2:  # half of a surrogate pair cannot be encoded
            raise
        half = len(text) // 2
        return np.concatenate([encode(tokenizer, text[:half]), encode(tokenizer, text[half:])])


def printable(tokenizer, ids):
    """-> the text of token ids (a list of ints) as any terminal can show it: bytes that are not
    UTF-8 become U+FFFD, control characters a space; ids that stand for no text are left out."""
    raw = b""
    for i in ids:
        if not tokenizer.is_special_token(i):
            with suppress(KeyError):  # an id that only the model has: its vocabulary is padded
                raw += tokenizer.decode_single_token_bytes(i)
    return visible(raw.decode(errors="replace"))


def visible(text):
    """-> text with a space in the place of each control character but the line end."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


# ---------------------------------------------------------------- a corpus as documents
# A document is (split, text), `split` "train" or "val"; the splits "broken" and "duplicate" are
# counted and left out. A file longer than PIECE makes several.

def open_corpus(dataset, glob=None, val_fraction=0.05, data_root=Path("data")):
    """-> generator of the documents of a built-in data set, or of a text file or folder."""
    path = Path(os.path.expanduser(dataset))
    if glob and (dataset in DATASETS or not path.is_dir()):
        raise ValueError(f"--glob picks files inside a folder, but {dataset} is not a folder.")
    if dataset == "fineweb-edu":
        return stream_fineweb_edu(val_fraction)
    if dataset in ("stdlib", "python"):
        tests, packages = {"test", "tests", "idle_test"}, {"site-packages", "dist-packages"}
        paths = find_files(sysconfig.get_path("stdlib"), "*.py", skip=tests | packages)
        if dataset == "python":  # wherever packages are imported from: venv, user, system
            for root in map(Path, dict.fromkeys(sys.path)):
                paths += find_files(root, "*.py") if root.name in packages else []
    elif dataset == "shakespeare":
        paths = [download_shakespeare(data_root / "tinyshakespeare.txt")]
    elif path.is_file():
        paths = [path]
    elif dataset and path.is_dir():  # "" would be the current folder
        paths = find_files(path, glob or "*")
    else:
        raise ValueError(f"Unknown data set {dataset!r}: it is neither a file nor a folder, nor "
                         f"one of {', '.join(DATASETS)}.")
    if not paths:
        raise ValueError(f"{dataset} holds no text file that matches {glob or '*'}.")
    if len(paths) == 1:
        return read_single(paths[0], val_fraction)
    return read_documents(paths, val_fraction)


def find_files(root, glob, skip=frozenset()):
    """-> sorted Paths of the files below `root` that match, but for empty and hidden ones, those in
    folders named in `skip`, and token files."""
    try:
        paths = sorted(Path(root).rglob(glob))
    except (ValueError, NotImplementedError) as error:  # an absolute one, or **.py
        raise ValueError(f"--glob={glob} is no pattern for names in a folder: {error}.") from None
    found = []
    for path in paths:
        parts = path.relative_to(root).parts
        skipped = skip & set(parts) or any(part.startswith(".") for part in parts)
        if not skipped and path.suffix != ".bin" and path.is_file() and path.stat().st_size:
            found.append(path)
    return found


def read_text(path):
    """Yields the text of a UTF-8 file in pieces of PIECE characters, each prolonged to a line end,
    to at most 2 * PIECE."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while text := file.read(PIECE) + file.readline(PIECE):
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); convert it.") from error


def split_of(digest, val_fraction):
    """By content, not by place: same document, same split, whatever else the corpus holds."""
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def read_documents(paths, val_fraction):
    """Yields the documents of several files. Each document goes to one split; a large file makes
    several, and so can fill both."""
    seen = set()
    for path in paths:
        try:  # to read it all, so that a file with a broken part is left out whole
            for text in read_text(path):
                pass
        except (OSError, ValueError):
            yield "broken", ""
            continue
        for text in read_text(path):
            digest = hashlib.sha256(text.encode()).digest()
            copy = digest in seen  # a symbolic link, a vendored package
            yield "duplicate" if copy else split_of(digest, val_fraction), text
            seen.add(digest)


def read_single(path, val_fraction):
    """Yields the documents of the only file: the first 1 - val_fraction of its characters are train
    and the rest val. The cut moves on behind the next line end, unless that ends the piece."""
    left = int(sum(map(len, read_text(path))) * (1 - val_fraction))  # characters of train
    for text in read_text(path):
        cut = max(0, min(left, len(text)))
        # from cut - 1: a cut right behind a line end may stay; to -1: val must not end up empty
        if cut and (line_end := text.find("\n", cut - 1, -1)) >= 0:
            cut = line_end + 1
        yield "train", text[:cut]
        yield "val", text[cut:]  # mostly one of the two is empty: no document
        left -= len(text)


def download_shakespeare(path):
    """-> `path`, fetched unless it is there. ValueError: not to be had, or not the right file."""
    url = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
           "input.txt")
    try:
        content = path.read_bytes() if path.exists() else urlopen(url, timeout=30).read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError("another SHA-256 than the known file")
    except Exception as error:  # whatever the HTTP layers raise
        raise ValueError(f"{path} could not be made from {url} ({error}): save that there by hand "
                         "and run the same command again.") from error
    if not path.exists():
        path.write_bytes(content)
    return path


def stream_fineweb_edu(val_fraction):
    """Yields the paper-scale corpus: the smallest published sample that holds 50B tokens. Where the
    stream breaks, the data set ends, rather than losing a day's download."""
    n = 0
    try:
        from datasets import load_dataset
        for n, row in enumerate(load_dataset("HuggingFaceFW/fineweb-edu", "sample-100BT",
                                             split="train", streaming=True), 1):
            digest = hashlib.sha256(row["text"].encode()).digest()
            yield split_of(digest, val_fraction), row["text"]
    except Exception as error:  # no such package, no network, whatever its HTTP layers raise
        if not n:
            raise ValueError(f"fineweb-edu could not be streamed ({type(error).__name__}): it "
                             "needs network and pip install datasets.") from error
        print(f"The stream broke ({type(error).__name__}): the data set ends after {n} documents.",
              file=sys.stderr)


# ---------------------------------------------------------------- documents -> token files

def prepare(dataset="stdlib", tokenizer="bytes", val_fraction=0.05, name=None, glob=None,
            max_tokens=None, data_root="data"):
    """Writes <data_root>/<name>/: train.bin, val.bin and meta.json, all or none, and only where
    nothing is yet; same input, same bytes. Prints one line, returns the Path. The arguments are
    the flags that --help explains, and data_root. ValueError: a user's mistake; OSError: a full
    disk."""
    if not 0 < val_fraction < 1 or max_tokens is not None and max_tokens < 2:
        raise ValueError("val_fraction must be between 0 and 1, max_tokens at least 2 (one for "
                         f"each split), not {val_fraction} and {max_tokens}.")
    enc = get_tokenizer(tokenizer)
    dataset, data_root = str(dataset), Path(data_root)
    path = Path(os.path.expanduser(dataset)).resolve()
    source = dataset if dataset in DATASETS else str(path)
    name = name or (path.stem if path.is_file() else path.name)
    target = data_root / name
    if target.name != name or name in DATASETS and name != source:
        raise ValueError(f"{name!r} cannot name a folder in {data_root}/: it is the name of a "
                         "built-in data set, or no plain name; pass another --name.")
    if target.exists():
        raise ValueError(f"{target} is there already; move it away, or pass another --name.")
    data_root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=data_root) as tmp:
            folder = Path(tmp, name)
            folder.mkdir()
            documents = open_corpus(dataset, glob, val_fraction, data_root)
            about, counts = write_tokens(documents, enc, folder, val_fraction, max_tokens)
            rebuild = f"prepare_data.get_tokenizer({tokenizer!r})"
            meta = {"dataset": source, "tokenizer": {"name": tokenizer, "rebuild": rebuild},
                    **about}
            (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            summary = (f"{meta['n_train']:,} train and {meta['n_val']:,} val tokens of "
                       f"{counts['train']:,} and {counts['val']:,} documents; left out: "
                       f"{counts['broken']:,} broken files and {counts['duplicate']:,} duplicates")
            if not (meta["n_train"] and meta["n_val"]):
                raise ValueError(f"{dataset} makes no two splits, but {summary}; pass another "
                                 "--val_fraction, or join the texts into one UTF-8 file.")
            folder.rename(target)  # fails if another process has made it meanwhile
    except OSError as error:
        raise OSError(f"{target} could not be made ({error}): make room on the disk, correct the "
                      "permissions or pass another --name, and try again.") from error
    print(f"{target}: {summary}; vocabulary {enc.n_vocab:,} ({tokenizer})")
    return target


def write_tokens(documents, enc, folder, val_fraction, max_tokens):
    """Encodes `documents` into <folder>/train.bin and val.bin, <|endoftext|> after each. -> (what
    meta.json says of the files, Counter of the documents and of what was left out)"""
    dtype = np.dtype("<u2" if enc.n_vocab <= 1 << 16 else "<u4")
    max_tokens = max_tokens or sys.maxsize
    n_val = min(max(1, round(max_tokens * val_fraction)), max_tokens - 1)
    limit = {"train": max_tokens - n_val, "val": n_val}
    n = {"train": 0, "val": 0}
    sha256 = {split: hashlib.sha256() for split in n}
    counts = Counter()
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for split, text in tqdm(documents, unit=" documents", leave=False, disable=None):
            if split not in files:
                counts[split] += 1
            elif text and n[split] < limit[split]:
                counts[split] += 1
                ids = np.append(encode(enc, text), enc.eot_token)
                ids = ids[:limit[split] - n[split]].astype(dtype)
                files[split].write(ids)
                sha256[split].update(ids)
                n[split] += len(ids)
                if n == limit:
                    break
    return {"vocab_size": enc.n_vocab, "dtype": dtype.name, "n_train": n["train"],
            "n_val": n["val"], "sha256": {f"{s}.bin": sha256[s].hexdigest() for s in n}}, counts


# ---------------------------------------------------------------- token files -> batches

class Dataset(NamedTuple):
    train: np.memmap  # (n_train,) token ids
    val: np.memmap    # (n_val,)
    meta: dict        # meta.json


def open_dataset(folder, block_size, vocab_size, sha256=None):
    """-> Dataset. ValueError unless the files of `folder` are there, have the lengths that
    meta.json says and fit a model of this block_size and vocab_size. sha256 {file: hash}: what a
    run noted of its data; then meta.json must say the same."""
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder} is not there; prepare_data.py makes it (see its --help).")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        n_vocab = meta["vocab_size"]
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
        train, val = (np.memmap(folder / f"{s}.bin", dtype, mode="r") for s in ("train", "val"))
        if (len(train), len(val)) != (meta["n_train"], meta["n_val"]):
            raise ValueError(f"{len(train)} train and {len(val)} val tokens, unlike meta.json")
        # what a run notes of its data: KeyError if it is missing
        meta["tokenizer"]["name"], meta["sha256"]["train.bin"], meta["sha256"]["val.bin"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a whole data set ({type(error).__name__}: {error}): move it away and "
            "make one with prepare_data.py.") from error
    if sha256 and sha256 != meta["sha256"]:
        raise ValueError(f"{folder} is not the data that this run was trained on: prepare that "
                         "again, or start another run.")
    if n_vocab > vocab_size:
        raise ValueError(f"vocab_size must be at least {n_vocab} for {folder}, such as "
                         f"{-(-n_vocab // 64) * 64}; it is {vocab_size}.")
    n = min(len(train), len(val))
    if n <= block_size:
        raise ValueError(f"block_size must be at most {n - 1} for {folder}, whose smaller split "
                         f"has {n} tokens; it is {block_size}.")
    return Dataset(train, val, meta)


def windows(data, split, starts, block_size, device):
    """-> x, y int64 (B, T) on `device`: the T = block_size tokens from each of `starts` (B,) on,
    and the same shifted by one. ValueError on a token id outside the vocabulary: a damaged file."""
    # gathering through a sliding view measured 3 to 30 times faster than stacking slices
    view = np.lib.stride_tricks.sliding_window_view(getattr(data, split), block_size + 1)
    rows = torch.from_numpy(view[starts].astype(np.int64))  # (B, T+1)
    if rows.max() >= data.meta["vocab_size"]:
        raise ValueError(f"{split}.bin is damaged: it holds the token id {rows.max()}, and there "
                         f"are {data.meta['vocab_size']}; prepare the data set anew.")
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (B, T) each
    if torch.device(device).type == "cuda":  # from pinned memory the copy overlaps computation
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def get_batch(data, split, *, seed, step, micro_step=0, rank=0, world_size=1, batch_size,
              block_size, device="cpu"):
    """-> x, y int64 (B, T): random windows of a split, y one token ahead of x. A pure function of
    its arguments, so that resuming needs no reader state. The seed takes micro_step * world_size +
    rank, so W processes with A micro-steps read what one with W*A reads."""
    rng = np.random.default_rng([seed, split == "val", step, micro_step * world_size + rank])
    starts = rng.integers(len(getattr(data, split)) - block_size, size=batch_size)
    return windows(data, split, starts, block_size, device)


def eval_batches(data, eval_tokens, *, block_size, batch_size, rank=0, world_size=1, device="cpu"):
    """Yields x, y int64 (B, T), the last B may be smaller: windows evenly spaced over val.bin, as
    many as hold eval_tokens or as fit without overlap. Neither the batch size nor the number of
    processes changes which ones: rank r takes windows r, r + world_size, ..."""
    n = min(-(-eval_tokens // block_size), (len(data.val) - 1) // block_size)
    starts = np.linspace(0, len(data.val) - 1 - block_size, n, dtype=np.int64)[rank::world_size]
    for i in range(0, len(starts), batch_size):
        yield windows(data, "val", starts[i:i + batch_size], block_size, device)


# ---------------------------------------------------------------- what all scripts share

class Parser(argparse.ArgumentParser):
    """The parser of all scripts: it turns a wrong flag into a ValueError, not into usage text."""

    def error(self, message):
        raise ValueError(f"{message}; python {self.prog} --help lists the flags.")


def cli(main):
    """Runs main(argv) as a command: a user's mistake or a full disk is one sentence on stderr."""
    with suppress(AttributeError):  # a text may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as well
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        sentence, code = "interrupted.", 130
    except Exception as error:
        sentence, code = mistake(error), 2
        if not sentence:
            raise
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def mistake(error):
    """-> the sentence for the user, who made a mistake or has a full disk; None for a bug, perhaps
    in a router of yours, which is to keep its traceback."""
    if isinstance(error, MemoryError) or (  # torch has no class for both CPU and GPU
            isinstance(error, RuntimeError) and re.search("(out of|allocate) memory", str(error))):
        return "not enough memory; a smaller model or batch needs less."
    origin = error.__traceback__
    while origin.tb_next:
        origin = origin.tb_next
    folder = Path(origin.tb_frame.f_code.co_filename).resolve().parent
    # a ValueError for the user is raised in our files, and ends in a full stop: int("x") has none
    ours = folder == Path(__file__).resolve().parent and str(error).endswith(".")
    if isinstance(error, OSError) or (isinstance(error, ValueError) and ours):
        return " ".join(str(error).split())  # on one line


@contextmanager
def replacing(path):
    """Yields a temporary name to write to, then renames that file to `path`: whatever happens,
    what lies at `path` is whole. Its OSError names `path`; that of a full disk names none."""
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # after a power cut, too, its content is there
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError that names this file of its own
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "no room on the disk?"
        raise OSError(f"{path} could not be written ({reason}); the old one, if any, is as it was, "
                      "and the disk must hold both.") from error
    finally:
        temporary.unlink(missing_ok=True)


def free_path(folder, stem, suffix=""):
    """-> the first of stem1suffix, stem2suffix, ... that is not in `folder` yet."""
    return next(path for n in count(1) if not (path := folder / f"{stem}{n}{suffix}").exists())


def lock(folder):
    """-> the locked file folder/lock: while it is open, no other process gets it. ValueError:
    another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows, which would not let a folder with an open file be renamed
        return open(os.devnull)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
    except BlockingIOError:
        raise ValueError(f"another process writes to {folder} right now; wait for its end, or name "
                         "another --out_dir.") from None
    except OSError:
        pass  # some network disks have no such lock
    return file


def main(argv):
    parser = Parser(allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="stdlib", metavar="NAME", help="a text file in UTF-8, "
                        "a folder of them (links to folders in it are not followed), or "
                        f"{', '.join(DATASETS)} (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME",
                        help="bytes, or a tiktoken encoding such as gpt2 (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.05, metavar="F", help="share of "
                        "the documents, or of a single file, in val.bin (default: %(default)s)")
    parser.add_argument("--name", help="folder in data/, for train.py's --dataset (default: named "
                        "after the data set)")
    parser.add_argument("--glob", help="which files of a folder, by name, for example '*.md'")
    parser.add_argument("--max_tokens", type=int, metavar="N",
                        help="stop at N tokens, both files together (--val_fraction is "
                        "then a share of tokens); a folder is read in the order of its files' "
                        "names (default: all)")
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    cli(main)
