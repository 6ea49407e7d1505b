"""Tests the start of a run: what a failed start leaves behind, what is refused as idle, and what is only warned of."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from nanometa import train
from nanometa.common.errors import UserError, in_words
from nanometa.common.files import lock_folder
from nanometa.config import GPTConfig, TaskConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks.source import TaskWindows
from nanometa.tasks.words import ITEMS, NAMES
from nanometa.training import distributed, messages, run_log, signals
from nanometa.training.distributed import Dist, why_not_compile
from nanometa.training.failed_start import Start
from nanometa.training.optimizer import muon_dtype
from nanometa.training.run_log import RunLog
from tests.conftest import ROOT, cli, losses, override, refusal, tree
from tests.fast_cases import diagonal, every
from tests.training_runs import BASE, run

CPU = Dist(0, 0, 1, torch.device("cpu"))


def start(workdir, monkeypatch, name: str, *args: str) -> None:
    """Runs train.py within this process."""
    monkeypatch.chdir(workdir)
    train.main(override(BASE, f"--run_name={name}", *args))


# ----------------------------------------------------------------------------- a start that fails


def test_online_wandb_without_a_login_is_refused_and_leaves_nothing(workdir, tmp_path):
    env = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    args = override(BASE, "--run_name=online", "--out_dir=new", "--max_steps=2", "--wandb=online")
    for _ in range(2):  # the same command can be given again
        said = refusal(cli("train.py", *args, cwd=workdir, env=env, timeout=60))
        assert said.startswith("error: wandb=online does not work (No API key configured") and "wandb login" in said
        assert not (workdir / "new").exists()


class FakeWandb(types.ModuleType):
    """Stands in for wandb. `fails`: the name of the call that raises."""

    Settings = dict

    def __init__(self, fails: str, after: int = 0):
        super().__init__("wandb")
        self.fails, self.after, self.calls = fails, after, []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails and self.calls.count(name) > self.after:
            raise ConnectionResetError("Connection lost\nto \x1b[31mthe helper")

    def init(self, **settings):
        self._call("init")
        return self

    def log(self, figures, step):
        self._call("log")

    def finish(self, exit_code):
        self._call("finish")

    def teardown(self):
        self._call("teardown")


@pytest.mark.parametrize(("fails", "after"), [("init", 0), ("log", 0), ("log", 3), ("finish", 0)])
def test_a_wandb_that_fails_costs_one_warning_and_no_step(workdir, monkeypatch, fails, after):
    wandb = FakeWandb(fails, after)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    name = f"wandb_{fails}{after}"
    start(workdir, monkeypatch, name, "--max_steps=3", "--wandb=offline")
    assert len(losses(workdir / "out" / name)) == 3
    said = (workdir / "out" / name / "train.log").read_text()
    assert said.count("warning: wandb has failed (Connection lost), so it gets no more figures") == 1
    assert wandb.calls.count(fails) == after + 1 and wandb.calls[-1] == "teardown"


def test_a_resumed_run_goes_on_without_an_unreachable_server(workdir, monkeypatch):
    start(workdir, monkeypatch, "requeued", "--max_steps=2")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("init"))
    start(workdir, monkeypatch, "requeued", "--max_steps=4", "--init_from=resume", "--wandb=online")
    assert len(losses(workdir / "out/requeued")) == 4
    with pytest.raises(UserError, match=r"wandb=online does not work \(Connection lost\)"):
        start(workdir, monkeypatch, "not_yet", "--max_steps=4", "--wandb=online")
    assert not (workdir / "out/not_yet").exists()


NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "137438953472 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("where", ["GPT", "evaluate", "Trainer.train_step", "RunLog"])
def test_a_start_without_enough_memory_leaves_nothing(workdir, monkeypatch, where):
    """Fails while the model is built, in the first evaluation, in the first step, or after the folder was made."""

    def fail(*args, **kwargs):
        raise NO_MEMORY

    out = f"--out_dir=new_{where}/deep"
    monkeypatch.setattr(f"nanometa.train.{where}", fail)
    with pytest.raises(RuntimeError):
        start(workdir, monkeypatch, "no_memory", "--max_steps=1", out)
    assert not (workdir / f"new_{where}").exists()
    monkeypatch.undo()
    start(workdir, monkeypatch, "no_memory", "--max_steps=1", out)


def test_a_failure_after_the_first_step_keeps_the_run(workdir, monkeypatch):
    step = train.Trainer.train_step

    def fail_later(self, stop):
        if self.step == 2:
            raise NO_MEMORY
        return step(self, stop)

    monkeypatch.setattr(train.Trainer, "train_step", fail_later)
    with pytest.raises(RuntimeError):
        start(workdir, monkeypatch, "later", "--max_steps=4")
    assert len(losses(workdir / "out/later")) == 2


def test_a_failed_start_removes_only_what_it_added(tmp_path):
    folder = tmp_path / "out/run"
    folder.mkdir(parents=True)
    (folder / ".mine").write_text("old")
    before = tree(tmp_path)
    subject = Start()
    with pytest.raises(KeyError), subject:
        subject.new_folder(folder)
        (folder / "wandb/files").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "link").symlink_to(tmp_path)
        raise KeyError
    assert tree(tmp_path) == {name: facts for name, facts in before.items() if name in tree(tmp_path)}
    assert (folder / ".mine").read_text() == "old" and [path.name for path in folder.iterdir()] == [".mine"]
    with subject:
        subject.new_folder(tmp_path / "out/kept").release()
    assert (tmp_path / "out/kept").is_dir()


class Killed(BaseException):
    """Raised in place of a SIGKILL."""


@pytest.fixture
def kill(workdir, monkeypatch):
    """Returns a function that starts a run and kills it in the given method, so that no cleanup takes place."""

    def kill(where: str, name: str, *args: str) -> None:
        def killed(*args, **kwargs):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(f"nanometa.train.{where}", killed)
            patch.setattr(Start, "__exit__", lambda self, *error: self._lock and self._lock.release())
            with pytest.raises(Killed):
                start(workdir, patch, name, *args)
        assert (workdir / "out" / name / "config.json").exists()

    return kill


@pytest.mark.parametrize(
    ("where", "init_from"),
    diagonal(["Trainer._introduce", "evaluate", "Trainer.train_step"], ["scratch", "out/base"]),
)
def test_the_command_of_a_killed_start_can_be_given_again(workdir, monkeypatch, kill, where, init_from):
    """It starts from the same weights, which --init_from=auto would not take from another run."""
    if not (workdir / "out/base").exists():
        start(workdir, monkeypatch, "base", "--max_steps=2", "--seed=7")
    name = f"again_{where}_{init_from[:3]}"
    args = (name, "--max_steps=3", f"--init_from={init_from}")
    kill(where, *args)
    with (workdir / "out" / name / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # a line that was being written
    with pytest.raises(
        UserError, match="because its run was stopped before the first one: give the command of its start"
    ):
        start(workdir, monkeypatch, name, "--max_steps=3", "--init_from=resume")
    lock = lock_folder(workdir / "out" / name)
    with pytest.raises(UserError, match=f"another process is training in out/{name}: wait for it"):
        start(workdir, monkeypatch, *args)
    lock.release()
    start(workdir, monkeypatch, *args)
    start(workdir, monkeypatch, f"straight_{name}", *args[1:])
    assert losses(workdir / "out" / name) == losses(workdir / "out" / f"straight_{name}")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"kind": "val", "step": 0}\n{"kind": "train", "step": 1}\n'),
        ("metrics.jsonl", "not json\n"),
        ("notes.txt", "mine"),
        ("best_00000000/x", ""),
    ],
)
def test_a_folder_with_anything_but_a_killed_start_is_not_taken_over(workdir, monkeypatch, kill, file, content):
    name = f"kept_{len(content)}"
    kill("Trainer._introduce", name)
    path = workdir / "out" / name / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    before = tree(workdir / "out" / name)
    for init_from, advice in (("scratch", ".*with --init_from=auto, choose another"), ("gpt2", "choose another")):
        advice = ".*with --init_from=auto, choose another" if file.startswith("best") else advice
        with pytest.raises(UserError, match=f"^the run folder out/{name} exists: {advice} --run_name, or delete the"):
            start(workdir, monkeypatch, name, "--max_steps=3", f"--init_from={init_from}")
    assert tree(workdir / "out" / name) == before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NO_MEMORY, "there is not enough memory for another 137438953472 bytes: use a smaller model or"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "memory for another 20.00 MiB: use"),
        (MemoryError(), "there is not enough memory: use a smaller model"),
        (OSError(28, "No space left on device"), "No space left on device: check the path, its permissions and"),
        (UserError("it is."), "it is."),
    ],
)  # fmt: skip
def test_failures_of_the_machine_are_put_in_words(error, sentence):
    words = in_words(error)
    assert sentence in str(words) and "\n" not in str(words)
    assert in_words(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


# ----------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("text", every(2, ["#!/bin/sh\nexit 1\n", ""]))
@pytest.mark.slow
def test_a_broken_compiler_means_an_eager_run_that_says_why(workdir, tmp_path, text):
    compiler = tmp_path / "g++"
    compiler.write_text(text)
    compiler.chmod(0o755)
    name = f"broken{len(text)}"
    args = [arg for arg in override(BASE, f"--run_name={name}", "--max_steps=2") if not arg.startswith("--compile")]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = cli("train.py", *args, cwd=workdir, env=env)
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()
    said = (workdir / "out" / name / "train.log").read_text()
    assert "torch.compile off (not compiled, because the compiler fails: " in said
    assert len(said.splitlines()) == len(result.stdout.decode().splitlines())
    said = refusal(cli("train.py", *args, "--compile=True", "--out_dir=elsewhere", cwd=workdir, env=env))
    assert "compile=True does not work, because the compiler fails: " in said
    assert not (workdir / "elsewhere").exists()


@pytest.mark.slow
def test_a_working_compiler_is_recognized():
    assert why_not_compile(torch.device("cpu")) is None


def test_a_missing_compiler_is_named(monkeypatch):
    assert why_not_compile(torch.device("mps")) == "torch.compile is not used on mps"
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert why_not_compile(torch.device("cpu")) == "no C++ compiler was found (/nowhere/g++)"


def test_no_process_compiles_if_one_cannot(monkeypatch):
    monkeypatch.setattr(distributed, "why_not_compile", lambda device: None)
    dist = Dist(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(Dist, "hear", lambda self, name, word: [word, "it is broken"])
    assert distributed.why_eager(TrainConfig(), dist) == "not compiled, because it is broken"
    assert distributed.why_eager(TrainConfig(compile=False), dist) == "as requested"


def test_muon_computes_in_fp32_on_a_gpu_that_emulates_bfloat16(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert muon_dtype(torch.device("cuda")) == dtype


# ----------------------------------------------------------------------------- signals and a lost terminal


def test_a_closed_terminal_or_a_scheduler_stops_a_run_like_sigterm():
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        for number in signals.SIGNALS:
            stop = signals.StopFlag()
            signal.raise_signal(number)
            assert stop.raised
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a background job of a shell
        stop = signals.StopFlag()
        signal.raise_signal(signal.SIGHUP)
        assert not stop.raised and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert stop.raised
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1} <= {*signals.SIGNALS}


def test_a_signal_before_the_first_step_leaves_nothing(workdir, monkeypatch):
    monkeypatch.setattr(train, "StopFlag", lambda: types.SimpleNamespace(raised=True))
    for _ in range(2):  # the same command can be given again
        with pytest.raises(UserError, match="stopped by a signal before the first step, so nothing is saved"):
            start(workdir, monkeypatch, "early", "--max_steps=5", "--micro_batch_size=1", "--eval_windows=20")
        assert not (workdir / "out/early").exists()


def test_a_run_whose_reader_ends_goes_on_and_saves_on_sighup(workdir):
    """Like `train.py | head -1` in a terminal that is then closed."""
    args = override(BASE, "--run_name=unread", "--max_steps=100000", "--eval_interval=1000", "--save_interval=1000")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # the tests themselves may run under nohup, which a run would respect
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith(b"unread: training the meta arm")
    process.stdout.close()
    log, end = workdir / "out/unread/train.log", time.monotonic() + 60
    while "step       9/" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    error = process.stderr.read().decode()
    assert process.wait(60) == 0 and error.count("\n") == 1, error
    assert error.startswith("warning: standard output is gone ([Errno 32] Broken pipe), but the run goes on")
    assert "stopped by a signal after step" in log.read_text().splitlines()[-1]


def test_a_run_without_any_stdout_trains(workdir):
    command = f"{sys.executable} {ROOT}/train.py {' '.join(override(BASE, '--run_name=silent', '--max_steps=2'))} >&-"
    done = subprocess.run(command, shell=True, cwd=workdir, capture_output=True, timeout=100)
    assert done.returncode == 0 and not done.stderr and len(losses(workdir / "out/silent")) == 2


# ----------------------------------------------------------------------------- the log


def test_an_entry_of_the_log_is_one_line_without_escape_sequences(tmp_path, capsys):
    log = RunLog(tmp_path, TrainConfig(wandb="disabled"), {"chunk_markers": 0}, -1, main=True)
    log.say("started from weights\nof \x1b[31mout/é\x00")
    log.close()
    line = "started from weights\\nof \\x1b[31mout/é\\x00\n"
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == line == capsys.readouterr().out


def test_the_recorded_command_can_be_pasted_into_a_shell(monkeypatch, tmp_path):
    words = ["train.py", "config/my file.py", "--dataset=data/it's", "--run_name=a", "--out_dir=$HOME/*"]
    run_log.environment.cache_clear()
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", *words[1:]])
    command = run_log.environment()["command"]
    run_log.environment.cache_clear()
    shell = ["sh", "-c", f"for word in {command}; do printf '%s\\n' \"$word\"; done"]
    assert subprocess.run(shell, capture_output=True, text=True).stdout.splitlines() == words


def test_a_machine_without_git_can_train(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "git")

    run_log.environment.cache_clear()
    monkeypatch.setattr(run_log.subprocess, "run", missing)
    assert run_log.environment()["commit"] == "" and run_log.environment()["uncommitted_changes"] is False
    run_log.environment.cache_clear()


# ----------------------------------------------------------------------------- idle and doubtful settings


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--target_rule=skip",), "target_rule=skip has no effect, because data/n has no markers: set "),
        (("--meta_position=none_first", "--position=rope"), "meta_position=none_first has no effect, because data/n"),
        (
            ("--meta_position=none_second", "--position=rope"),
            "meta_position=none_second has no effect, because second_attention=none is no second attention",
        ),
        (
            ("--tasks=parity", "--train_length=64", "--placements=none", "--target_rule=skip"),
            "target_rule=skip has no effect, because placements=none places no markers: set --target_rule=ignore",
        ),
        (
            ("--second_attention=random", "--random_fraction=0.001"),
            "random_fraction=0.001 connects none of 84 positions: set --random_fraction to at least 0.012",
        ),
        (("--dry_run=True", "--show_batch=3"), "dry_run and show_batch=3 are both given"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_are_refused_at_the_start(workdir, monkeypatch, args, sentence):
    base = ("--second_attention=none", "--dataset=data/n", "--block_size=84")
    for instead in ((), ("--show_batch=0",), ("--dry_run=True", "--n_accelerators=1")):
        if "--show_batch" in " ".join(args) and instead:
            continue
        with pytest.raises(UserError, match=sentence):
            start(workdir, monkeypatch, "idle", *override(base, *args), *instead)
    assert not (workdir / "out/idle").exists()


def test_a_run_resumes_with_a_setting_that_was_accepted_at_its_start(workdir, monkeypatch):
    """An earlier version accepted target_rule=skip on data without markers, and a resume may not change it."""
    args = ("--second_attention=none", "--dataset=data/n", "--block_size=84", "--target_rule=skip")
    monkeypatch.setattr(train, "refuse_idle", lambda *args: None)
    start(workdir, monkeypatch, "skipped", *args, "--max_steps=1")
    monkeypatch.undo()
    start(workdir, monkeypatch, "skipped", *args, "--max_steps=2", "--init_from=resume")
    assert len(losses(workdir / "out/skipped")) == 2


@pytest.mark.parametrize(
    ("settings", "n_windows", "expected"),
    [
        ({}, 10**6, []),
        ({"max_steps": 2001, "schedule": "constant"}, 10**6, []),
        ({"max_steps": 2000}, 10**6, ["max_steps=2000 is not above warmup_steps=2000, so the warm-up takes the whole"]),
        ({"lr_decay_steps": 50}, 10**6, ["lr_decay_steps=50 is not above warmup_steps=2000"]),
        ({"lr_decay_steps": 50, "schedule": "constant"}, 10**6, []),
        ({"warmup_steps": 0, "max_steps": 1}, 480, []),
        ({}, 479, ["batch_size=480 is above the 479 training windows of the dataset, so each step reads windows more"]),
        ({"task": TaskConfig(tasks=("parity",), train_length=1024)}, None, []),
        (
            {"task": TaskConfig(tasks=("parity",), train_length=1025, curriculum_steps=200_000)},
            None,
            ["curriculum_steps=200000 is not below max_steps=200000", "train_length=1025 is above the model's window"],
        ),
    ],
)
def test_doubtful_settings_get_one_line_each(settings, n_windows, expected):
    found = messages.warnings(TrainConfig(model=GPTConfig(position="rope"), **settings), n_windows)
    assert len(found) == len(expected)
    for line, sentence in zip(found, expected, strict=True):
        assert line.startswith(f"warning: {sentence}") and "\n" not in line


def test_warnings_are_in_the_log_of_the_run(workdir):
    folder = run(workdir, "warned", "--batch_size=1000", "--micro_batch_size=500", "--max_steps=1")
    said = [line for line in (folder / "train.log").read_text().splitlines() if line.startswith("warning: ")]
    assert len(said) == 2 and "is not above warmup_steps=3" in said[0] and "batch_size=1000 is above the" in said[1]


def test_a_branch_with_another_batch_size_is_refused_in_words_about_branches(workdir, monkeypatch):
    start(workdir, monkeypatch, "trunk", "--max_steps=2")
    with pytest.raises(UserError) as refused:
        start(
            workdir, monkeypatch, "branch", "--branch_from=out/trunk/step_00000002", "--batch_size=16", "--max_steps=9"
        )
    assert str(refused.value).startswith("batch_size=16 differs from batch_size=8 of out/trunk/step_00000002, and a")
    assert "a branch continues with the optimizer and the order of the data of its trunk" in str(refused.value)
    assert not (workdir / "out/branch").exists()


def test_an_arm_without_markers_is_offered_the_dataset_without_markers(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    with pytest.raises(UserError) as refused:
        train.main([str(ROOT / "config/tiny_gpt2.py"), "--dataset=data/u", "--run_name=offered"])
    assert (
        "for an arm without markers give a dataset prepared with --injection=none and --block_size=448 or 476, or "
        "train another arm, one with markers, with --block_size=448 or 480" in str(refused.value)
    )


@pytest.mark.parametrize("longer", [True, False])
def test_a_curriculum_starts_where_the_tokenizer_has_texts(longer):
    """With a small vocabulary a word is several tokens, so that no text of config/tiny_tasks.py has 32 positions."""
    words = [" " + " ".join(ITEMS + NAMES) + " zero one two three four mark : ? count # [ ] \n"] * 3
    tokenizer = Tokenizer.train(words, 300) if longer else Tokenizer.gpt2()
    cfg = load_config(TrainConfig, [str(ROOT / "config/tiny_tasks.py")], config_file=True)
    windows = TaskWindows(cfg, "train", tokenizer)
    assert (windows.curriculum.start > 32) == longer
    for step in (0, 200, 999, 1000):
        longest, _ = windows.reached(step)
        lengths = [len(windows.example(step * cfg.batch_size + i).ids) for i in range(32)]
        assert 32 <= min(lengths) and max(lengths) <= longest <= 128
    assert windows.reached(0)[0] < windows.reached(200)[0] < windows.reached(999)[0] == 128
