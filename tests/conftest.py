import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the fork server of tests/forked.py

# a failing example is shown as it was drawn: to find a smaller one takes minutes
hypothesis.settings.register_profile(
    "drawn", phases=[*set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}]
)
hypothesis.settings.load_profile("drawn")

from nanometa.data.tokenizer import Tokenizer  # noqa: E402
from nanometa.tasks.words import ITEMS, NAMES  # noqa: E402
from tests import forked  # noqa: E402

WORDS = tuple("the cat sat on a mat and saw that one dog had run over two hills to eat some red apples".split())


def write_texts(folder: Path, documents: int = 60, words: int = 300) -> None:
    """Writes small documents of repeatable nonsense, enough for a few hundred windows of 32 positions."""
    state = 1
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        out = []
        for i in range(words):
            state = (state * 1103515245 + 12345) % 2**31
            out.append(WORDS[(state >> 16) % len(WORDS)] + ("\n" if i % 11 == 10 else " "))
        (folder / f"doc{number:03}.txt").write_text("".join(out))


def cli(*args: str, cwd: Path, env: dict | None = None, stdin: bytes = b"", launcher=(sys.executable,), timeout=280):
    """Runs a command-line program of the repository in the folder `cwd`, as a user would.

    With the launcher TWO, two processes run it together, and their outputs are joined."""
    if launcher == TWO:
        both = start_two((cwd, cwd), args, args, timeout=timeout)
        return subprocess.CompletedProcess(
            args,
            max((result.returncode for result in both), key=abs),
            *(b"".join(getattr(result, name) for result in both) for name in ("stdout", "stderr")),
        )
    command = [*launcher, str(ROOT / args[0]), *args[1:]]
    # Variables that are read while the interpreter, torch or CUDA starts need a fresh process.
    early = any(name.startswith(("PYTHON", "TORCH_", "CUDA")) for name in env or {})
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    if sys.platform == "linux" and launcher == (sys.executable,) and not early:
        return forked.run(ROOT / args[0], args[1:], cwd, env, stdin, timeout)
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, timeout=timeout)


TWO = "two processes"  # much faster than torchrun, which imports torch in three new processes


def free_port() -> str:
    """Returns a port at which the processes of a run can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(folders: tuple[Path, Path], *commands: tuple[str, ...], timeout=60) -> list:
    """Runs two commands at once, as rank 0 and rank 1 of a run, each in its folder, without torchrun."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def start(rank: int):
        env = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return cli(*commands[rank], cwd=folders[rank], env=env, timeout=timeout)

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(start, range(2))]


IDLE = {"--injection=none": "--chunk_markers", "--tokenizer=": "--bpe_vocab_size", "--schedule=constant": "--min_lr"}


def override(base: tuple[str, ...], *args: str) -> list[str]:
    """Returns the settings --name=value of `args`, and those settings of `base` that a program would accept beside
    them.

    It would refuse a setting that is given twice or that has no effect together with `args`.
    """
    given = {arg.split("=")[0] for arg in args}
    given |= {idle for arg in args for other, idle in IDLE.items() if arg.startswith(other)}
    return [arg for arg in base if arg.split("=")[0] not in given] + list(args)


def refusal(result) -> str:
    """Returns the one sentence of a refused command: status 2, one line on stderr, no traceback."""
    stderr = result.stderr.decode()
    assert result.returncode == 2, stderr + result.stdout.decode()
    assert "Traceback" not in stderr and stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    return stderr


def tree(folder: Path) -> dict[str, tuple]:
    """Returns size and modification time of every file below a folder. Equal before and after means: nothing was
    touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()
        for path in sorted(folder.rglob("*"))
    }


TINY = (
    "--n_layer=2", "--n_head=2", "--n_embd=32", "--dtype=float32", "--compile=False", "--wandb=disabled",
    "--device=cpu", "--batch_size=8", "--micro_batch_size=8", "--learning_rate=1e-3", "--min_lr=1e-4",
    "--warmup_steps=3", "--log_interval=1", "--eval_interval=10", "--save_interval=10", "--eval_windows=5",
    "--draw_curves=False",
)  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_texts(folder / "texts")
    for name, injection in (("u", "uniform"), ("p", "periodic"), ("n", "none")):
        args = ("--source=files", "--files=texts/*.txt", "--bpe_vocab_size=300", "--chunk_content=28",
                "--chunk_markers=4", "--val_fraction=0.1")  # fmt: skip
        args = override(args, f"--name={name}", f"--injection={injection}")
        result = cli("prepare.py", *args, cwd=folder)
        assert result.returncode == 0, result.stderr.decode()
    return folder


@pytest.fixture(scope="module")
def workdir(prepared, tmp_path_factory) -> Path:
    """A folder with three prepared datasets of the same content: data/u (uniform), data/p (periodic), data/n (none).

    Each test module has its own copy, so different modules may use the same run names.
    """
    return shutil.copytree(prepared, tmp_path_factory.mktemp("work"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def straight(workdir):
    """A run of 30 uninterrupted steps, with dropout and two micro-batches."""
    from tests.training_runs import run  # here, because training_runs imports this file

    return run(workdir, "straight", "--max_steps=30", "--dropout=0.1", "--micro_batch_size=4")


@pytest.fixture(scope="module")
def dataset_tokenizer(workdir) -> Tokenizer:
    """The tokenizer of the datasets in workdir."""
    tokenizer = Tokenizer.load(workdir / "data/n")
    assert (tokenizer.n_content, tokenizer.n_vocab) == (300, 320)
    return tokenizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A folder with a small random GPT-2, as transformers saves it, with the vocabulary of the datasets in workdir."""
    from tests.gpt2_folders import hf_folder  # here, because it imports transformers

    return hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer for which each word of the tasks is one token. Some test modules define their own instead."""
    return Tokenizer.train(
        [" " + " ".join(ITEMS + NAMES) + " zero one two three four mark : ? count # [ ] \n"] * 3, 2600
    )


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == kind]
