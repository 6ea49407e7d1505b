"""Defines kinds of damage and a small set of files to damage, for tests/fuzz.py."""

import base64
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import signal
from pathlib import Path

import torch
from rich.console import Console

from nanometa import prepare
from nanometa.common.files import file_sha256, read_file, read_json
from nanometa.config import GPTConfig, PrepareConfig, TrainConfig
from nanometa.data.tokenizer import RANKS_FILE, SPEC_FILE
from nanometa.data.verify import CACHE
from nanometa.model import GPT
from nanometa.train import Trainer
from nanometa.training import checkpoint
from nanometa.training.dataset import open_windows, with_vocabulary
from nanometa.training.distributed import Dist
from nanometa.training.hugging_face import to_hf
from tests.conftest import ROOT, write_texts

QUIET = Console(file=io.StringIO())
CPU = Dist(0, 0, 1, torch.device("cpu"))
NUMBERS = (0, -1, 1, 2, 7, 255, 256, 65_536, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -1e-320, 0.5, 1e400)
PATHS = (
    "../x", "..", ".", "", "/", "/etc/passwd", "/dev/zero", "x/../../y", "a\0b", "C:\\x", "~", "~nobody/x", "x" * 5000,
    "a\nb",
)  # fmt: skip
TEXTS = (
    "\ud800",
    "\udc80",
    "\u202e",
    "\x1b[2J",
    "é" * 3,
    "e\u0301",
    "\U0001f600",
    "\ufeff",
    "\u2028",
    "\r\n",
    "NaN",
    "%s{}",
)
VALUES = (*NUMBERS, *PATHS, *TEXTS, None, True, False, [], {}, [[]], {"a": None}, "1", [1, "2", None], float("nan"))
CHUNK, C, M = 32, 28, 4


# ----------------------------------------------------------------------------- damage


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    at, other = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
    how = rng.randrange(9)
    if how == 0 and raw:
        at = min(at, len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw[: min(at, other)] + raw[max(at, other) :]
    if how == 3:
        return raw[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + raw[at:]
    if how == 4:
        lines = raw.splitlines(keepends=True)
        return b"".join(itertools.chain(*([line, line] if rng.random() < 0.2 else [line] for line in lines)))
    if how == 5:
        return raw[:at] + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + raw[at:]
    if how == 6:
        return raw[:at] + b"\0" * rng.choice((1, 8, 4096)) + raw[at:]
    if how == 7:
        digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57] or [0]
        at = rng.choice(digits)
        return raw[:at] + rng.choice((b"-", b"9", b"99999999999", b"0", b".", b"e9")) + raw[at + 1 :]
    lines = raw.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def damage_json(raw: bytes, rng: random.Random) -> bytes:
    """Replaces, removes or adds one value of a JSON file at any depth, or nests the whole file deeply."""
    if rng.random() < 0.03:
        depth = rng.choice((50, 900, 100_000))
        return b"[" * depth + rng.choice((raw, b"")) + b"]" * depth
    tree = json.loads(raw)
    holders, stack = [], [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        holders += [(node, key) for key in keys]
        stack += [node[key] for key in keys]
    holder, key = rng.choice(holders)
    how, value = rng.randrange(5), rng.choice(VALUES)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice((*PATHS, *TEXTS, "extra"))] = value
    elif how == 2 and type(holder[key]) in (int, float):
        holder[key] += rng.choice((-1, 1, 0.5))
    elif how == 3 and isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[key] = value
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def damage(raw: bytes, rng: random.Random, is_json: bool) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            raw = (damage_json if is_json and rng.random() < 0.7 else damage_bytes)(raw, rng)
        except (ValueError, RecursionError, IndexError, TypeError):  # no longer JSON
            raw = damage_bytes(raw, rng)
    return raw


# ----------------------------------------------------------------------------- the files


class World:
    """A folder with a dataset, one part of another dataset, a trained run, weights and texts; `restore` undoes
    damage."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.chdir(folder)
        write_texts(Path("texts"), documents=6, words=150)
        texts = [path.read_text() for path in sorted(Path("texts").iterdir())]
        rows = [{"text": text, "n": i, "x": [1.5, None]} for i, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        Path("rows.jsonl").write_bytes(lines)
        Path("rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"n": range(6), "text": texts}), "rows.parquet")
        settings = {
            "source": "files", "files": ("texts/*.txt",), "bpe_vocab_size": 300, "chunk_content": C, "chunk_markers": M,
            "val_fraction": 0.3, "workers": 1, "shard_tokens": 1000,
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.prepare(PrepareConfig(name="d", **settings), "python prepare.py", QUIET)
            prepare.prepare(PrepareConfig(name="q", part="1/1", **settings), "python prepare.py", QUIET)
            self.cfg = TrainConfig(
                model=GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=2 * CHUNK), run_name="r", dataset="data/d",
                batch_size=2, micro_batch_size=2, max_steps=1, warmup_steps=1, dtype="float32", compile=False,
                wandb="disabled", device="cpu", eval_windows=2,
            )  # fmt: skip
            handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
            Trainer(self.cfg, CPU).run()
            for number, handler in handlers:  # training installs its own handlers
                signal.signal(number, handler)
        self.data = open_windows(self.cfg, "train")
        self.cfg = with_vocabulary(self.cfg, self.data.tokenizer.n_vocab, self.data.tokenizer.n_content)
        self.run = checkpoint.load_run("out/r")
        self.step = Path("out/r/step_00000001")
        self._write_hugging_face(Path("hf"))
        (Path("data/d") / CACHE).unlink(missing_ok=True)
        Path("damaged.py").write_bytes((ROOT / "config/tiny_meta.py").read_bytes())
        Path("elsewhere").write_text("not yours\n")
        self.pristine = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    def _write_hugging_face(self, folder: Path) -> None:
        import safetensors.torch

        n = self.data.tokenizer.n_content
        self.hf_config = GPTConfig(
            n_layer=1, n_head=2, n_embd=16, block_size=CHUNK, vocab_size=n, content_vocab_size=n,
            second_attention="none", bias=True,
        )  # fmt: skip
        folder.mkdir()
        state = {name: tensor.clone() for name, tensor in to_hf(GPT(self.hf_config)).items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        names = ("n_layer", "n_head", "n_embd")
        config = {**{name: getattr(self.hf_config, name) for name in names}, "n_positions": CHUNK, "vocab_size": n}
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_inner": None, **config}))

    def write(self, path: Path, raw: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(raw)

    def restore(self) -> None:
        for path in [path for path in Path().rglob("*") if path.is_symlink() or not path.is_dir()]:
            if path not in self.pristine or path.is_symlink() or not path.is_file():
                path.unlink()
        for path, raw in self.pristine.items():
            if not path.is_file() or path.read_bytes() != raw:
                path.write_bytes(raw)

    def damage(self, paths: list[Path], rng: random.Random) -> Path:
        """Damages one of the files, or replaces it by a link or a pipe or deletes it, and returns its path."""
        path = rng.choice(paths)
        how = rng.random()
        if how < 0.06:
            path.unlink()
            if how < 0.01:
                os.mkfifo(path)
            elif how < 0.045:
                path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "nowhere", path.name, "/", "../../elsewhere")))
            return path
        raw = path.read_bytes()
        if path.suffix == ".safetensors":  # length of the header (8 bytes), a JSON header, the numbers
            length = int.from_bytes(raw[:8], "little")
            header = damage(raw[8 : 8 + length], rng, True)
            size = rng.choice((len(header),) * 6 + (length, 2**63, 0))
            self.write(path, size.to_bytes(8, "little") + header + raw[8 + length :])
        elif path.suffix == ".bin":
            head, body = raw[:32], raw[32:]
            damaged = (damage(head, rng, False), body) if rng.random() < 0.5 else (head, damage(body, rng, False))
            self.write(path, b"".join(damaged))
        else:
            self.write(path, damage(raw, rng, path.suffix == ".json"))
        return path


def seal_tokenizer(folder: Path) -> None:
    """Writes both hashes of tokenizer.json anew, so that they match the damaged tokenizer."""
    with contextlib.suppress(Exception):
        spec, ranks = read_json(folder / SPEC_FILE), read_file(folder / RANKS_FILE)
        spec["ranks_sha256"] = hashlib.sha256(ranks).hexdigest()
        pairs = sorted((int(rank), token) for token, rank in map(bytes.split, ranks.splitlines()))
        text = b"".join(base64.b64encode(base64.b64decode(token)) + b" %d\n" % rank for rank, token in pairs)
        spec["fingerprint"] = hashlib.sha256(spec["pattern"].encode() + b"\0" + text).hexdigest()
        (folder / SPEC_FILE).write_text(json.dumps(spec))


def sha256_of(folder: Path, name: str) -> str:
    path = folder / Path(name).name
    return file_sha256(path) if path.is_file() else "0" * 64  # a link to /dev/zero has no end


def seal_dataset(folder: Path) -> None:
    with contextlib.suppress(Exception):
        manifest = read_json(folder / "manifest.json")
        manifest["tokenizer"]["fingerprint"] = read_json(folder / SPEC_FILE)["fingerprint"]
        for split in manifest["splits"].values():
            for entry in split["shards"]:
                entry["sha256"] = sha256_of(folder, entry["file"])
        (folder / "manifest.json").write_text(json.dumps(manifest))


def seal_checkpoint(folder: Path) -> None:
    with contextlib.suppress(Exception):
        manifest = read_json(folder / "manifest.json")
        hashes = {name: sha256_of(folder, name) for name in manifest["sha256"]}
        (folder / "manifest.json").write_bytes(checkpoint._manifest(hashes))
