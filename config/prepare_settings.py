"""Settings of preparation: how text becomes token shards."""

import os
import re
from dataclasses import dataclass
from typing import Literal

from nanometa.common.errors import UserError
from nanometa.config.checks import FOLDER_NAME, check, check_types, is_folder_name
from nanometa.config.settings import EMPTY, Settings, setting


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """How text becomes token shards with meta-tokens. The defaults make the embedded dataset."""

    name: str = ""
    """the dataset's folder inside data/; by default <recipe>_<injection>, and _<N>plus with min_document_tokens=N"""
    recipe: str = ""
    """by default the name of the config file, or the source"""
    source: Literal["stdlib", "files", "packages", "hf"] = "stdlib"
    """stdlib: source and documentation of the running Python's standard library; files: your files; packages: the
    Python source of installed packages; hf: a Hugging Face dataset"""
    files: tuple[str, ...] = setting((), only_with={"source": ("files",)})
    """glob patterns for --source=files, ** crosses folders: UTF-8 text (a file is a document), .jsonl, .jsonl.gz or
    .parquet (a row is a document)"""
    text_column: str = setting("text", only_with={"source": ("files", "hf")})
    """field or column that holds the text, for .jsonl, .parquet and --source=hf"""
    packages: tuple[str, ...] = setting((), only_with={"source": ("packages",)})
    """packages for --source=packages, each NAME or NAME==VERSION"""
    hf_dataset: str = setting("", only_with={"source": ("hf",)})
    """name on the hub (allenai/c4) or local folder for --source=hf"""
    hf_config: str = setting("", only_with={"source": ("hf",)})
    """its configuration (en), if it has several"""
    hf_split: str = setting("train", only_with={"source": ("hf",)})
    """its split; validation is cut from it by val_fraction"""
    hf_revision: str = setting("", only_with={"source": ("hf",)})
    """commit or tag of the dataset; by default the newest"""
    streaming: bool = setting(True, only_with={"source": ("hf",)})
    """read a Hugging Face dataset while it downloads, or download all of it first"""
    tokenizer: str = "bpe"
    """bpe: a byte-level BPE trained on this train split; gpt2; or the folder of a prepared dataset or run
    whose tokenizer is taken over"""
    bpe_vocab_size: int = setting(4096, only_with={"tokenizer": ("bpe",)})
    """tokens of the trained BPE, <|endoftext|> included"""
    injection: Literal["uniform", "periodic", "none"] = "uniform"
    """places of the markers in a chunk: drawn without replacement, evenly spaced, or no markers"""
    chunk_content: int = 461
    """content tokens in a chunk (922 for the paper's window of 1024)"""
    chunk_markers: int = setting(51, only_with={"injection": ("uniform", "periodic")})
    """markers in a chunk (102 for the paper's window: k = 0.1)"""
    min_document_tokens: int = 0
    """leave documents of fewer content tokens out of both splits, for long windows. The <|endoftext|> that ends a
    document counts; one that is cut between the splits is as long as each stretch. The tokenizer stays that of all"""
    val_fraction: float = 0.05
    """share of the text that goes to validation, by a hash of the text itself"""
    seed: int = 1337
    """keys the places of the markers and the split"""
    workers: int = setting(os.cpu_count() or 1, only_with={"merge": EMPTY})
    """processes that tokenize; the result does not depend on their number"""
    shard_tokens: int = 100_000_000
    """positions in a shard file"""
    part: str = ""
    """2/3 = prepare the second of three parts, on a machine of its own, into data/NAME.part2of3"""
    merge: tuple[str, ...] = ()
    """folders of all parts (data/NAME.part*of3): check them and write one dataset"""
    inspect: str = setting("", alone=True)
    """print this prepared dataset, with windows decoded, and prepare nothing"""

    def __post_init__(self):
        check_types(self)
        check(self, "chunk_content", 1 <= self.chunk_content <= 2**20, "lie in 1 .. 1048576")
        check(self, "chunk_markers", 0 <= self.chunk_markers <= 2**20, "lie in 0 .. 1048576")
        # so many tokens are held in memory until their document is known to stay
        check(self, "min_document_tokens", 0 <= self.min_document_tokens <= 2**24, "lie in 0 .. 16777216")
        check(self, "workers", 1 <= self.workers <= 1024, "lie in 1 .. 1024")
        check(self, "shard_tokens", self.shard_tokens >= 1, "be at least 1")
        check(self, "seed", self.seed >= 0, "be at least 0")
        check(self, "val_fraction", 0 < self.val_fraction < 1, "lie strictly between 0 and 1")
        check(self, "bpe_vocab_size", 257 <= self.bpe_vocab_size <= 1_000_000, "lie in 257 .. 1000000")
        for name in ("name", "recipe"):
            check(self, name, is_folder_name(getattr(self, name)) or not getattr(self, name), FOLDER_NAME)
        if self.injection != "none" and self.chunk_markers == 0:
            raise UserError(f"injection={self.injection} with chunk_markers=0 places nothing: take --injection=none.")
        for source, name, example in (
            ("files", "files", "--files 'texts/**/*.txt'"),
            ("packages", "packages", "--packages numpy==2.4.6"),
            ("hf", "hf_dataset", "--hf_dataset=allenai/c4 --hf_config=en"),
        ):
            if self.source == source and not getattr(self, name):
                raise UserError(f"source={source} needs {name}: for example --source={source} {example}.")
        if self.part:
            found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.part)
            check(self, "part", found is not None and 1 <= int(found[1]) <= int(found[2]), "be i/n with 1 <= i <= n")
            if self.merge:
                raise UserError("part and merge are both given: prepare the parts first, then merge them.")
