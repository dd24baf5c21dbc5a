"""
Text in, token files out, batches back: all that lies between a corpus and the training loop.

$ python prepare_data.py                                          # Python's own library
$ python prepare_data.py --dataset=book.txt --tokenizer=gpt2      # any text file -> data/book
$ python prepare_data.py --dataset=notes --glob='*.md' --name=md  # a folder of texts -> data/md

writes data/<name>/train.bin and val.bin (token ids, little-endian) and meta.json (what they are).
A corpus flows through as a generator of `Piece`s, so memory stays bounded however large it is.
"""
import argparse
import codecs
import hashlib
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

DOWNLOADS = {  # data set: URL, file name under data/, SHA-256 of that file
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinyshakespeare.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": (
        "http://mattmahoney.net/dc/enwik8.zip",
        "enwik8.zip", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
}
DATASETS = ("stdlib", "python", *DOWNLOADS, "fineweb-edu")
FILES = {"train.bin", "val.bin", "meta.json"}
META = {"dataset": str, "tokenizer": dict, "vocab_size": int, "dtype": str, "n_train": int,
        "n_val": int, "sha256": dict}  # the keys of meta.json and their types
PIECE_BYTES = 2 << 20  # the most text handled as one string
BATCH_PIECES = 32      # encoded together, in parallel: about 1 GB of memory at the very most


class Piece(NamedTuple):
    split: str         # "train" or "val"; "broken" or "duplicate" for a file that is left out
    text: str = ""     # a document, or the next part of a large one
    n_bytes: int = 0   # its size in UTF-8
    ends: bool = True  # the document ends with this piece


# ---------------------------------------------------------------- tokenizers

def get_tokenizer(name):
    """-> tiktoken.Encoding: `bytes`, or tiktoken's by name. ValueError: unknown, or no network."""
    if name == "bytes":
        # No merges: a token is a byte. The pattern only cuts the text into short stretches, as
        # tiktoken is up to 5x slower on one long stretch; 64 characters measured fastest.
        return tiktoken.Encoding(
            name="bytes", pat_str=r"(?s).{1,64}", special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([i]): i for i in range(256)})
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"Unknown tokenizer {name!r}: choose bytes, {', '.join(known)}.")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The vocabulary of tokenizer {name} could not be loaded ({type(error).__name__}): run "
            "this command on a machine with network and TIKTOKEN_CACHE_DIR=tiktoken_cache, copy "
            "that folder here and set the same variable, or use --tokenizer=bytes.") from error


def encode(enc, text):
    """-> token ids (n,) uint32; special-token text inside `text` stays plain text."""
    try:
        return enc.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's regex gives up on a run of a million spaces: halve it
        half = len(text) // 2
        return np.concatenate([encode(enc, text[:half]), encode(enc, text[half:])])


# ---------------------------------------------------------------- a corpus as pieces of text

def open_corpus(dataset, glob, val_fraction, data_root):
    """-> (generator of Pieces, bytes to come or None). ValueError: no such corpus, or no text."""
    path = Path(os.path.expanduser(dataset))
    if glob and (dataset in DATASETS or not path.is_dir()):
        raise ValueError(f"--glob picks files inside a folder, but {dataset} is not a folder.")
    if dataset == "fineweb-edu":
        return stream_fineweb_edu(val_fraction), None
    if dataset in ("stdlib", "python"):
        tests = ("test", "tests", "idle_test", "site-packages", "dist-packages")
        paths = find_files(sysconfig.get_path("stdlib"), "*.py", skip=tests)
        if dataset == "python":  # wherever packages are imported from: venv, user, system
            roots = [root for root in dict.fromkeys(sys.path) if root.endswith("-packages")]
            paths += [file for root in roots for file in find_files(root, "*.py")]
    elif dataset in DOWNLOADS:
        paths = [download(dataset, data_root)]
    elif path.is_file():
        paths = [path]
    elif dataset and path.is_dir():
        paths = find_files(path, glob or "*")
    else:
        raise ValueError(f"Unknown data set {dataset!r}: it is neither a file nor a folder, nor "
                         f"one of {', '.join(DATASETS)}.")
    if not paths:
        raise ValueError(f"{dataset} holds no text: no file in it matches {glob or '*'!r}.")
    if len(paths) > 1:
        return read_documents(paths, val_fraction), sum(p.stat().st_size for p in paths)
    if dataset == "enwik8":  # the first 10^8 bytes of Wikipedia, left in their zip file
        return read_single(paths[0], val_fraction, zipped=True), 10**8
    return read_single(paths[0], val_fraction), paths[0].stat().st_size


def find_files(root, glob, skip=()):
    """-> sorted Paths below `root` whose name or relative path matches `glob`, without hidden
    files, folders named in `skip`, and prepared data sets (token files are not text)."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip and not s.startswith(".")]
        if not FILES <= set(names):
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(p for p in found if p.is_file() and (
        fnmatchcase(p.name, glob) or fnmatchcase(p.relative_to(root).as_posix(), glob)))


def read_text(file, n_bytes):
    """Yields (text, bytes read) for the next `n_bytes` of a binary file, about PIECE_BYTES at a
    time, cut at line ends where there are any. UnicodeDecodeError if it is not UTF-8."""
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    while n_bytes:
        raw = file.read(min(PIECE_BYTES, n_bytes))
        if not raw:
            raise OSError("it became shorter while it was read")
        n_bytes -= len(raw)
        text += decoder.decode(raw, final=not n_bytes)
        end = (text.rfind("\n") + 1 if n_bytes else 0) or len(text)
        yield text[:end], len(raw)
        text = text[end:]


def split_of(digest, val_fraction):
    """Content alone decides: same document, same split, whatever else the corpus holds."""
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def read_documents(paths, val_fraction):
    """Every file is a document and goes to one split whole; a file above PIECE_BYTES counts as
    several documents, so that it needs no more memory than the others."""
    seen = set()
    for path in paths:
        try:
            with open(path, "rb") as file:
                for text, n_bytes in read_text(file, path.stat().st_size):
                    digest = hashlib.sha256(text.encode()).digest()
                    if digest in seen:  # symbolic links, vendored copies
                        yield Piece("duplicate", "", n_bytes)
                    else:
                        yield Piece(split_of(digest, val_fraction), text, n_bytes)
                    seen.add(digest)
        except (OSError, UnicodeDecodeError):
            yield Piece("broken")


def read_single(path, val_fraction, zipped=False):
    """The only file is one document, cut at the first line end from 1 - val_fraction of its bytes
    on (else the last one before): val is its tail. ValueError if it has no text to cut."""
    try:
        with zipfile.ZipFile(path).open("enwik8") if zipped else open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            target = int(size * (1 - val_fraction))
            start = max(0, target - PIECE_BYTES)
            file.seek(start)
            window = file.read(target - start + PIECE_BYTES)[:max(0, size - 1 - start)]
            after = window.find(b"\n", max(0, target - 1 - start))
            cut = start + 1 + (after if after >= 0 else window.rfind(b"\n"))
            if cut == start:
                raise ValueError(f"{path} ({size} bytes) is too small to split: it has no line end "
                                 f"near byte {target}; give a text of more lines.")
            file.seek(0)
            for split, left in (("train", cut), ("val", size - cut)):
                for text, n_bytes in read_text(file, left):
                    left -= n_bytes
                    yield Piece(split, text, n_bytes, ends=split == "val" and not left)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error


def stream_fineweb_edu(val_fraction):
    """The paper-scale corpus: the smallest published sample that holds 50B tokens."""
    try:
        from datasets import load_dataset
        for row in load_dataset("HuggingFaceFW/fineweb-edu", "sample-100BT", split="train",
                                streaming=True):
            raw = row["text"].encode()
            split = split_of(hashlib.sha256(raw).digest(), val_fraction)
            yield Piece(split, row["text"], len(raw))  # no search for duplicates: 10^8 documents
    except ImportError as error:
        raise ValueError("fineweb-edu needs one more package: run pip install datasets, then the "
                         "same command again.") from error
    except Exception as error:  # whatever its HTTP layers raise
        raise ValueError(
            "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu could not be streamed "
            f"({type(error).__name__}): run this command on a machine with network, copy its "
            "data/fineweb-edu here, then run python train.py --dataset=fineweb-edu.") from error


def download(dataset, data_root):
    """-> Path of the file, fetched unless it is there with the right SHA-256. ValueError if not."""
    url, name, sha256 = DOWNLOADS[dataset]
    path, part = data_root / name, data_root / f".{name}.part-{os.getpid()}"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    state = "is not the right file" if path.exists() else "is missing"
    for attempt in range(3):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file, \
                    tqdm.wrapattr(reply, "read", reply.length, desc=name, leave=False) as body:
                shutil.copyfileobj(body, file)
            if hashlib.sha256(part.read_bytes()).hexdigest() == sha256:
                os.replace(part, path)
                return path
            problem = "the SHA-256 of what came is wrong"
        except (urllib.request.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = error
        finally:
            part.unlink(missing_ok=True)
    raise ValueError(f"{path} {state} and its download failed ({problem}): save {url} there by "
                     f"hand, then run python prepare_data.py --dataset={dataset}.")


# ---------------------------------------------------------------- pieces -> token files

def prepare(dataset="stdlib", tokenizer="bytes", val_fraction=0.05, name=None, glob=None,
            max_tokens=None, data_root="data"):
    """Writes <data_root>/<name>/: train.bin, val.bin and meta.json, all or none, in place of an
    older data set of that name; same input, same bytes. Prints one line, returns the Path. The
    arguments are the flags that --help explains. ValueError, one sentence, on every mistake of
    the user's and when the disk fails."""
    start = time.time()
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is a share between 0 and 1, not {val_fraction}.")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens is at least 2, one for each split, not {max_tokens}.")
    enc, dataset, data_root = get_tokenizer(tokenizer), os.fspath(dataset), Path(data_root)
    name = name or (dataset if dataset in DATASETS else Path(os.path.abspath(dataset)).stem)
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"{name!r} cannot name a folder in {data_root}/: pass another --name.")
    target = data_root / name
    try:
        ours = target.is_dir() and not target.is_symlink() and set(os.listdir(target)) <= FILES
        if os.path.lexists(target) and not ours:  # perhaps the user's texts
            raise ValueError(f"{target} exists and is not a data set of ours: pass another --name.")
        data_root.mkdir(parents=True, exist_ok=True)
        for left in data_root.glob(".*.tmp-*"):  # by a killed run; live ones touch their folder
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:
                    shutil.rmtree(left)
        pieces, n_bytes = open_corpus(dataset, glob, val_fraction, data_root)
        with TemporaryDirectory(prefix=f".{name}.tmp-", dir=data_root) as tmp:
            new = Path(tmp, "new")
            new.mkdir()
            meta, counts = write_tokens(pieces, n_bytes, enc, new, val_fraction, max_tokens)
            if not (meta["n_train"] and meta["n_val"]):
                raise ValueError(
                    f"{dataset} is too small to split: {counts['documents']} readable documents "
                    f"({counts['broken']} broken files) make {meta['n_train']} train and "
                    f"{meta['n_val']} val tokens; give more text, or join it into one file.")
            rebuild = {"name": tokenizer, "rebuild": f"prepare_data.get_tokenizer({tokenizer!r})"}
            meta = {"dataset": dataset, "tokenizer": rebuild, **meta}
            (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            publish(new, target)
    except OSError as error:
        raise ValueError(f"Could not write {target} ({error}): nothing was changed; make room on "
                         "the disk or correct the permissions, and try again.") from error
    print(f"{target}: {counts['documents']:,} documents, {meta['n_train']:,} train and "
          f"{meta['n_val']:,} val tokens, vocabulary {enc.n_vocab:,} ({tokenizer}), "
          f"{counts['broken']:,} broken and {counts['duplicate']:,} duplicate files left out, "
          f"{time.time() - start:.1f} s")
    return target


def write_tokens(pieces, n_bytes, enc, folder, val_fraction, max_tokens):
    """Encodes `pieces` into <folder>/train.bin and val.bin, <|endoftext|> after each document.
    -> (what meta.json says of the files, Counter of documents, broken and duplicate files)"""
    dtype = np.dtype("<u2" if enc.n_vocab <= 1 << 16 else "<u4")
    n_val = round((max_tokens or sys.maxsize) * val_fraction)  # each split has its own limit
    limit = {"train": (max_tokens or sys.maxsize) - n_val, "val": n_val}
    n, counts = {"train": 0, "val": 0}, Counter()
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val, \
            ThreadPoolExecutor() as pool, tqdm(
                desc="encoding", total=max_tokens or n_bytes, leave=False, disable=None,
                unit=" tokens" if max_tokens else "B", unit_scale=True) as bar:
        files, sha256 = {"train": train, "val": val}, {s: hashlib.sha256() for s in n}
        for batch in iter(lambda: list(islice(pieces, BATCH_PIECES)), []):
            texts = ["" if n.get(p.split) == limit.get(p.split) else p.text for p in batch]
            # tiktoken frees the GIL; map keeps the order, so timing never shows in the files
            encoded = pool.map(lambda text: encode(enc, text).astype(dtype), texts)
            for piece, ids in zip(batch, encoded):
                bar.update(len(ids) if max_tokens else piece.n_bytes)
                if piece.split not in files:
                    counts[piece.split] += 1
                    continue
                ids = np.append(ids, dtype.type(enc.eot_token)) if piece.ends else ids
                ids = ids[:limit[piece.split] - n[piece.split]]
                files[piece.split].write(ids)
                sha256[piece.split].update(ids)
                n[piece.split] += len(ids)
                full = n[piece.split] == limit[piece.split]
                counts["documents"] += len(ids) > 0 and (piece.ends or full)
            os.utime(folder.parent)  # a sign of life
            if n == limit:
                break
    return {"vocab_size": enc.n_vocab, "dtype": dtype.name, "n_train": n["train"],
            "n_val": n["val"], "sha256": {f"{s}.bin": sha256[s].hexdigest() for s in n}}, counts


def publish(new, target):
    """Renames the finished folder into place: a reader sees the old data set or the new one."""
    old = new.with_name("old")  # removed with the temporary folder around both
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)


# ---------------------------------------------------------------- token files -> batches

class Dataset(NamedTuple):
    train: np.memmap  # (n_train,) token ids
    val: np.memmap    # (n_val,)
    meta: dict        # meta.json


def open_dataset(folder, block_size, vocab_size):
    """-> Dataset. ValueError unless the files of `folder` are whole, belong together, and hold
    block_size + 1 tokens a split and only ids below the model's vocab_size. For the last it asks
    meta.json; get_batch looks at the ids, since a pass over 100 GB would delay every start."""
    folder = Path(folder)
    corpus = "" if folder.name in DATASETS else "<text file or folder> --name="
    again = f"python prepare_data.py --dataset={corpus}{folder.name}"
    missing = sorted(name for name in FILES if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: run {again}.")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if not all(type(meta[key]) is kind for key, kind in META.items()):
            raise TypeError("a value of another type")
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
        # what get_tokenizer and a run's check of its data will need
        meta["tokenizer"]["name"], meta["sha256"]["train.bin"], meta["sha256"]["val.bin"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/meta.json is damaged or not from prepare_data.py ({error!r}): "
                         f"run {again}.") from error
    if meta["vocab_size"] > vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {meta['vocab_size']} tokens, but the model one of "
            f"{vocab_size}: pass --vocab_size={-(-meta['vocab_size'] // 64) * 64}.")
    for split in ("train", "val"):
        n, size = meta[f"n_{split}"], (folder / f"{split}.bin").stat().st_size
        if size != n * np.dtype(dtype).itemsize:
            raise ValueError(f"{folder}/{split}.bin has {size} bytes where meta.json says {n} "
                             f"{meta['dtype']} tokens: run {again}.")
        if n < block_size + 1:
            raise ValueError(f"{folder}/{split}.bin has {n} tokens, too few for block_size "
                             f"{block_size}: pass --block_size={n - 1} or less, or give more text.")
    train, val = (np.memmap(folder / f"{s}.bin", dtype, mode="r") for s in ("train", "val"))
    return Dataset(train, val, meta)


def get_batch(data, split, *, seed, step, micro_step=0, rank=0, world_size=1, batch_size,
              block_size, device="cpu"):
    """-> x, y int64 (B, T) on `device`: random windows of a split, y one token ahead of x.

    A pure function of its arguments, so that resuming needs no reader state. Rank and micro-step
    make one number: W processes with A micro-steps read what one with W*A reads. ValueError on a
    token id outside the vocabulary: a damaged file.
    """
    tokens = getattr(data, split)
    rng = np.random.default_rng([seed, split == "val", step, micro_step * world_size + rank])
    starts = rng.integers(len(tokens) - block_size, size=batch_size)
    # gathering through a sliding view measured 3 to 30 times faster than stacking slices
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[starts]  # (B, T+1)
    if windows.max() >= data.meta["vocab_size"]:
        raise ValueError(f"{split}.bin is damaged: it holds token id {windows.max()}, but ids end "
                         f"at {data.meta['vocab_size'] - 1}; prepare the data again.")
    windows = torch.from_numpy(windows.astype(np.int64))
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, T) each
    if torch.device(device).type == "cuda":  # from pinned memory the copy overlaps computation
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """Of all three scripts: a wrong flag is a ValueError of one sentence, not the usage text."""

    def error(self, message):
        raise ValueError(f"{message}; python {self.prog} --help lists the flags.")


def main():
    parser = Parser(allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, text in (
            ("dataset", str, "stdlib", f"{', '.join(DATASETS)}, or a text file or folder (UTF-8)"),
            ("tokenizer", str, "bytes", "bytes, or a tiktoken encoding such as gpt2"),
            ("val_fraction", float, 0.05, "share of the documents (or of one file) in val.bin"),
            ("name", str, None, "folder in data/; by default the data set's name or file's stem"),
            ("glob", str, None, "which files of a folder, by name or relative path, e.g. '*.md'"),
            ("max_tokens", int, None, "the most tokens to write, both files together")):
        parser.add_argument(f"--{flag}", type=kind, default=default,
                            help=f"{text} (default: {default})", metavar=kind.__name__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as well
    try:
        prepare(**vars(parser.parse_args()))
    except ValueError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted: nothing was changed.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
