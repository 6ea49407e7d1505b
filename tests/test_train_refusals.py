"""Tests what train.py refuses: settings, datasets, folders and second processes, with nothing changed on disk."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder
from nanometa.config import TrainConfig
from nanometa.training.distributed import Dist, accumulation
from nanometa.training.resume import lock_new
from tests.conftest import ROOT, cli, override, refusal, tree
from tests.training_runs import BASE, TORCHRUN


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "the run folder out/straight exists: continue that run with --init_from=auto"),
        (
            ("--run_name=new", "--init_from=resume"),
            "there is no checkpoint to resume in out/new: start the run with --init_from=auto",
        ),
        (
            ("--init_from=resume", "--n_layer=3", "--seed=2"),
            "n_layer=3 differs from n_layer=2 of out/straight/.* \\(as does seed\\), and a resumed run cannot change "
            "this: give the settings that .* of the meta arm \\(train.py .*--run_name=straight.*\\) was started with",
        ),
        (
            ("--init_from=resume", "--dataset=data/n", "--second_attention=none", "--block_size=28"),
            r"block_size=28 differs from block_size=32 of .* \(as does second_attention\), and",
        ),
        (("--init_from=resume", "--batch_size=16"), "batch_size=16 differs from batch_size=8 of out/straight/"),
        (("--init_from=resume", "--seed=2"), "seed=2 differs from seed=1337 of out/straight/"),
        (("--init_from=resume", "--dataset=data/p"), "data/p is not the dataset of .*train_000000.bin"),
        (
            ("--run_name=new", "--dataset=data/nothing"),
            "no dataset in data/nothing .*: create it with prepare.py",
        ),
        (("--run_name=new", "--dataset=u"), "there is no dataset in u .*: did you mean 'data/u'"),
        (
            ("--run_name=new", "--second_attention=none", "--block_size=28"),
            "data/u has 4 markers per chunk, but block_size=28 is for data without markers: give a dataset prepared "
            "with --injection=none, or train another arm, one with markers, with --block_size=32",
        ),
        (
            ("--run_name=new", "--second_attention=causal", "--dataset=data/n"),
            "data/n has no markers, and block_size=32 is not a whole number of its 28-position chunks: for an arm with "
            "markers give a dataset prepared with --injection=uniform, else use --block_size=28 or 56",
        ),
        (
            ("--run_name=new", "--tasks=copying", "--train_length=32", "--dataset=data/nothing"),
            "the tasks need the tokenizer .* init_from=scratch names no run and there is no dataset in data/nothing: "
            "give --init_from=out/RUN .*--dataset=FOLDER",
        ),
        (("--run_name=new", "--block_size=33"), "use --block_size=32 or 64"),
        (("--run_name=new", "--block_size=32000"), "fewer than one window"),
        (
            ("--run_name=new", "--vocab_size=999"),
            "vocab_size=999 does not match the tokenizer of data/u, which has 320",
        ),
        (
            ("--run_name=new", "--batch_size=10"),
            "micro-batches of 8: set --micro_batch_size=10 or --batch_size=16",
        ),
        (("--run_name=new", "--device=cuda"), "device=cuda is not available"),
        (
            ("--run_name=new", "--dataset=data/n", "--block_size=28"),
            "second_attention=meta has nothing to connect, because data/n has no markers",
        ),
        (
            ("--run_name=new", "--second_attention=random"),
            "second_attention=random is a control for data without markers, but data/u has 4 markers per chunk: "
            "give .*--injection=none",
        ),
        (
            (
                "--run_name=new",
                "--dataset=data/n",
                "--block_size=28",
                "--second_attention=none",
                "--meta_position=none",
            ),
            "meta_position=none has no effect, because data/n has no markers: set --meta_position=same",
        ),
        (
            ("--run_name=new", "--second_attention=random", "--meta_position=none"),
            "random has none: leave one of them out",
        ),
        (("--out_dir=.", "--run_name=texts", "--init_from=auto"), "texts exists, but train.py did not make it"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing_on_disk(workdir, straight, args, sentence):
    before = tree(workdir)
    base = (*BASE, "--run_name=straight", "--dropout=0.1")
    error = refusal(cli("train.py", *override(base, *args), cwd=workdir))
    assert re.search(sentence, error), error
    assert tree(workdir) == before


def test_a_damaged_dataset_is_refused_before_anything_is_written(workdir, tmp_path):
    shutil.copytree(workdir / "data/u", tmp_path / "data/u")
    shard = tmp_path / "data/u/val_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 4
    shard.write_bytes(raw)
    error = refusal(cli("train.py", *BASE, "--run_name=x", cwd=tmp_path))
    assert "data/u/val_000000.bin is damaged: its sha256 is " in error and not (tmp_path / "out").exists()


def test_a_dataset_of_another_tokenizer_is_refused(workdir, straight, tmp_path):
    """Tokenizers of another size, and of the same size but trained on other text."""
    (tmp_path / "more.txt").write_text("entirely different words and letters " * 3000)
    for name, size, sentence in (
        ("size", 290, "was prepared with another tokenizer"),
        ("text", 300, "another tokenizer"),
    ):
        files = [str(tmp_path / "more.txt"), str(workdir / "texts/*.txt")]
        result = cli("prepare.py", "--source=files", "--files", *files, f"--bpe_vocab_size={size}", f"--name={name}",
                     "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.1", cwd=tmp_path)  # fmt: skip
        assert result.returncode == 0, result.stderr.decode()
        args = (f"--dataset={tmp_path}/data/{name}", "--dropout=0.1", "--run_name=straight", "--init_from=resume")
        error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
        assert sentence in error and "give the run's dataset, data/u" in error


@pytest.mark.parametrize(
    ("batch", "micro", "world", "offer"),
    [
        (480, 12, 7, ": set --batch_size=420 or 504, the nearest that is possible"),
        (10, 4, 1, "--micro_batch_size=5 or --batch_size=12"),
        (16, 3, 2, "--micro_batch_size=2 or --batch_size=18|--micro_batch_size=4 or --batch_size=18"),
        (3, 1, 4, "set --batch_size=4, the nearest that is possible"),
    ],
)
def test_the_refusal_of_a_batch_size_offers_the_nearest_possible_ones(batch, micro, world, offer):
    with pytest.raises(UserError, match=offer):
        accumulation(TrainConfig(batch_size=batch, micro_batch_size=micro), world)


def test_a_diverged_run_ends_with_an_error_and_saves_no_nan(workdir):
    args = ("--run_name=nan", "--learning_rate=1e30", "--grad_clip=0", "--max_steps=50", "--max_skipped=5")
    error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
    assert re.search(
        r"training has failed: the last 5 steps up to step \d+ were skipped, the last one because its", error
    )
    assert re.search(r"from the last checkpoint in out/nan \((step_0000001\d|none was saved yet)\)", error)
    for saved in (workdir / "out/nan").glob("*_0*/model.safetensors"):  # no diverged weights were saved
        assert all(torch.isfinite(p).all() for p in safetensors.torch.load_file(saved).values())


def test_two_trainings_in_one_folder_are_refused(workdir, straight):
    """The refusal comes before anything in the folder is read, with one process and with two."""
    lock = lock_folder(straight)
    args = ("--run_name=straight", "--dropout=0.1", "--micro_batch_size=4", "--init_from=resume", "--max_steps=40")
    before = tree(straight)
    error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
    assert "another process is training in out/straight" in error
    result = cli("train.py", *override(BASE, *args), cwd=workdir, launcher=TORCHRUN)
    assert result.returncode == 1 and result.stderr.decode().count("error: another process is training") == 1
    assert tree(straight) == before
    lock.release()


def test_a_resume_while_the_run_trains_is_refused_and_renames_nothing(workdir):
    args = [*override(BASE, "--save_interval=1", "--eval_interval=1000"), "--run_name=busy", "--max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=workdir, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step       5"):
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    try:
        for init_from in ("resume", "auto"):
            error = refusal(cli("train.py", *args, f"--init_from={init_from}", cwd=workdir))
            assert "another process is training in out/busy" in error and "damaged" not in error
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        drain.join()
    kinds = {path.name.split("_")[0] for path in (workdir / "out/busy").iterdir()}
    assert kinds == {".lock", "config.json", "metrics.jsonl", "train.log", "step", "latest"}


def test_a_folder_that_another_process_took_first_is_refused(tmp_path):
    """Both processes looked at the folder before it existed."""
    lock_new(tmp_path / "run").release()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match="another process has begun a run in .*: continue it with --init_from=auto"):
        lock_new(tmp_path / "run")


def test_an_error_in_one_process_ends_all_processes_and_is_reported_once(capsys):
    store = torch.distributed.HashStore()

    def process(rank: int) -> str:
        dist = Dist(rank, rank, 2, torch.device("cpu"), store)

        def step():
            if rank == 1:
                raise UserError("there is no disk here.")

        try:
            dist.agree("first", lambda: rank)
            dist.agree("second", step)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(process, range(2))] == [f"rank 1 on {socket.gethostname()}: there is no disk here."] * 2
    assert capsys.readouterr().err.count("error: rank 1 on ") == 1


def test_folders_that_cannot_be_written_are_refused_in_one_sentence(workdir, tmp_path):
    (tmp_path / "afile").write_text("")
    for args in (
        ("--out_dir=/proc/nope",),
        (f"--out_dir={tmp_path}/afile",),
        (f"--out_dir={tmp_path}", "--run_name=afile"),
    ):
        for init_from in ("scratch", "auto"):
            args = override(BASE, "--run_name=x", *args, f"--init_from={init_from}")
            result = cli("train.py", *dict.fromkeys(args), cwd=workdir)
            assert result.returncode == 2 and b"Traceback" not in result.stderr, result.stderr.decode()
            assert result.stderr.decode().count("error: ") == 1
