"""Defines PrepareConfig, the settings of prepare.py, which turns text into token shards."""

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.config.checks import FOLDER_NAME, check, check_types, is_folder_name
from nanometa.config.settings import EMPTY, SET, Settings, setting


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Turns text into token shards with meta-tokens. The defaults prepare Python's standard library."""

    # the text
    source: Literal["stdlib", "files", "packages", "hf"] = "stdlib"
    """where the text comes from. stdlib: source code and documentation of the running Python's standard library; files:
    your own files; packages: Python source of installed packages; hf: a Hugging Face dataset"""
    files: tuple[str, ...] = setting((), only_with={"source": ("files",)})
    """for source=files: glob patterns, where ** also matches folders. UTF-8 text files (each file is a document), or
    .jsonl, .ndjson, .json and .parquet files (each row is a document). All but .parquet may be compressed (.gz)"""
    val_files: tuple[str, ...] = setting((), only_with={"source": ("files",)})
    """for source=files: glob patterns of the files that are the validation split. All text of `files` is then the train
    split. By default val_fraction divides the text of `files`"""
    extra_files: tuple[str, ...] = setting((), only_with={"source": ("stdlib", "packages")})
    """for source=stdlib or packages: glob patterns of files to read in addition, as for files"""
    separator: str = setting("", only_with={"source": ("files",), "extra_files": SET})
    """for text files that hold several documents: text between two documents, such as '<|endoftext|>'"""
    text_column: str = setting("text", only_with={"source": ("files", "hf"), "extra_files": SET})
    """field or column that holds the text, for .jsonl, .parquet and source=hf; content.text is the field text of the
    column content"""
    hf_dataset: str = setting("", only_with={"source": ("hf",)})
    """for source=hf: name on the Hugging Face hub (allenai/c4), or a local folder"""
    hf_config: str = setting("", only_with={"source": ("hf",)})
    """for source=hf: configuration of the dataset (en), if it has several"""
    hf_split: str = setting("train", only_with={"source": ("hf",)})
    """for source=hf: split to read; the validation split is taken from it, see val_fraction"""
    hf_revision: str = setting("", only_with={"source": ("hf",)})
    """for source=hf: commit or tag of the dataset; by default the newest"""
    streaming: bool = setting(True, only_with={"source": ("hf",)})
    """for source=hf: True reads the dataset while it downloads, False downloads all of it first"""
    packages: tuple[str, ...] = setting((), only_with={"source": ("packages",)})
    """for source=packages: installed packages, each as NAME or NAME==VERSION"""

    # the dataset
    name: str = ""
    """folder of the dataset inside data/; by default <recipe>_<injection>, followed by _<N>plus with
    min_document_tokens=N"""
    injection: Literal["uniform", "periodic", "none"] = "uniform"
    """where markers go in each chunk. uniform: random positions, drawn without replacement; periodic: evenly spaced;
    none: no markers"""
    tokenizer: str = "bpe"
    """bpe: a byte-level BPE trained on the train split; gpt2: GPT-2's tokenizer; or the folder of a prepared dataset or
    a run, to reuse its tokenizer"""
    bpe_vocab_size: int = setting(4096, only_with={"tokenizer": ("bpe",)})
    """for tokenizer=bpe: vocabulary size, including <|endoftext|>"""
    chunk_content: int = 461
    """content tokens per chunk (922 for the paper's window of 1024)"""
    chunk_markers: int = setting(51, only_with={"injection": ("uniform", "periodic")})
    """markers per chunk (102 for the paper's window of 1024, k = 0.1)"""
    val_fraction: float = setting(0.05, only_with={"val_files": EMPTY})
    """share of the text in the validation split; each text is assigned by a hash of its content"""
    min_document_tokens: int = 0
    """for long windows: leave documents with fewer content tokens (<|endoftext|> counts) out of both splits. The parts
    of a document that is divided between the splits count separately. The tokenizer is trained on all documents"""
    seed: int = 1337
    """seed of the marker positions and of the split"""

    # computation, and preparation on several machines
    inspect: str = setting("", alone=True)
    """show this prepared dataset, with some decoded windows, and prepare nothing"""
    workers: int = setting(os.cpu_count() or 1, only_with={"merge": EMPTY})
    """number of processes that tokenize; the result does not depend on it"""
    shard_tokens: int = 100_000_000
    """positions per shard file"""
    part: str = ""
    """prepare only a part of the dataset, to share the work among machines: 2/3 writes the second of three parts to
    data/NAME.part2of3"""
    merge: tuple[str, ...] = ()
    """folders of all parts (data/NAME.part*of3), to merge into one dataset"""
    recipe: str = setting("", only_with={"name": EMPTY})
    """first part of the default name; by default the name of the config file, else the source"""
    # names of the settings on the command line
    given: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})

    def __post_init__(self):
        check_types(self)
        check(self, "chunk_content", 1 <= self.chunk_content <= 2**20, "lie in 1 .. 1048576")
        check(self, "chunk_markers", 0 <= self.chunk_markers <= 2**20, "lie in 0 .. 1048576")
        # up to this many tokens are held in memory until it is known whether their document is kept
        check(self, "min_document_tokens", 0 <= self.min_document_tokens <= 2**24, "lie in 0 .. 16777216")
        check(self, "workers", 1 <= self.workers <= 1024, "lie in 1 .. 1024")
        check(self, "shard_tokens", self.shard_tokens >= 1, "be at least 1")
        check(self, "seed", self.seed >= 0, "be at least 0")
        check(self, "val_fraction", 0 < self.val_fraction < 1, "lie strictly between 0 and 1")
        check(self, "bpe_vocab_size", 257 <= self.bpe_vocab_size <= 1_000_000, "lie in 257 .. 1000000")
        for name in ("name", "recipe"):
            check(self, name, is_folder_name(getattr(self, name)) or not getattr(self, name), FOLDER_NAME)
        if self.injection != "none" and self.chunk_markers == 0:
            raise UserError(
                f"injection={self.injection} with chunk_markers=0 places no markers: use --injection=none instead."
            )
        for source, name, example in (
            ("files", "files", "--files 'texts/**/*.txt'"),
            ("packages", "packages", "--packages numpy==2.4.6"),
            ("hf", "hf_dataset", "--hf_dataset=allenai/c4 --hf_config=en"),
        ):
            if self.source == source and not getattr(self, name):
                raise UserError(f"source={source} needs {name}: give, for example, --source={source} {example}.")
        if self.part:
            found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.part)
            check(self, "part", found is not None and 1 <= int(found[1]) <= int(found[2]), "be i/n with 1 <= i <= n")
            if self.merge:
                raise UserError("part and merge are both given: prepare the parts first, then merge them.")
