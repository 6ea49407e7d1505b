"""Defines the kinds of faults that concern datasets and strangers' files, for faults.py: kills of a preparation,
endless sources, copied and read-only datasets, links in a run folder, ranks that differ, and sampling from a run that
is being trained."""

import functools
import hashlib
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.config.command_line import run_cli
from nanometa.data.verify import CACHE
from nanometa.training.checkpoint import load_run
from tests import faulty_train
from tests.conftest import override, write_texts
from tests.fault_kinds import damaged_base, flip, one_sentence
from tests.fault_lab import Attempt, Lab, forked, need

PREPARE = ("--source=files", "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.1", "--workers=1")
OURS = (*PREPARE, "--name=u", "--files=texts/*.txt", "--bpe_vocab_size=300")
THEIRS = (*PREPARE, "--name=u", "--files=others/*.txt", "--bpe_vocab_size=280")  # the same name


class Preparation:
    """A folder in which prepare.py may be started many times, with one trace of all its starts."""

    def __init__(self, lab: Lab):
        lab.count += 1
        self.folder = Path(f"preparation{lab.count}").absolute()
        for name, documents in (("texts", 20), ("others", 15)):
            write_texts(self.folder / name, documents)
        self.trace = self.folder / "trace"

    def start(self, argv: tuple[str, ...], fault: dict | None = None, patience: float = 30) -> Attempt:
        """Runs `python prepare.py ARGV` with a fault by forking, and waits at most `patience` seconds until it ends."""

        def program() -> None:
            os.chdir(self.folder)
            faulty_train.wrap_disk(faulty_train.Fault(fault or {}, self.trace, 0))
            sys.argv = ["prepare.py", *argv]
            run_cli(prepare.main)

        pid = forked(program, self.folder / "out", self.folder / "err")
        end = time.monotonic() + patience
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return Attempt(
            [os.waitstatus_to_exitcode(ended[1])], (self.folder / "out").read_text(), (self.folder / "err").read_text()
        )

    def dataset(self) -> dict[str, str]:
        """Returns the SHA-256 of each file of the dataset, after checking that nothing else is in its folder.

        The work folder may be left, if the preparation was killed after the dataset had appeared."""
        names = {path.name for path in (self.folder / "data").iterdir()}
        need("u" in names and names <= {"u", ".u.partial"}, f"data holds {names}")
        files = sorted((self.folder / "data/u").iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def finish(self, argv: tuple[str, ...], expected: dict[str, str]) -> None:
        """Raises Lost unless `prepare.py ARGV` makes the expected dataset, if it does not exist yet."""
        attempt = self.start(argv)
        made = (self.folder / "data/u").exists() and "exists: choose another" in attempt.error
        need(attempt.statuses == [0] or made, f"the continued preparation {attempt}")
        need(self.dataset() == expected, "the dataset differs from that of an uninterrupted preparation")


@functools.cache
def prepared(lab: Lab, argv: tuple[str, ...]) -> tuple[dict[str, str], list[int]]:
    """Returns the files of an uninterrupted preparation, and the moments at which a preparation can be killed."""
    whole = Preparation(lab)
    whole.start(argv, {"trace": True})
    moments = [line["moment"] for line in faulty_train.lines(whole.trace) if "moment" in line]
    files = whole.dataset()
    shutil.rmtree(whole.folder)
    return files, moments


def kills_of_preparations(lab: Lab):
    """Kills a preparation before every call that changes the disk, which includes each deletion in the work folder.

    Afterwards the same command must make the dataset of an uninterrupted preparation. A command for other files under
    the same name must make the dataset of these files, or refuse in one sentence and leave the first one able to
    continue."""
    expected, moments = prepared(lab, OURS)

    def tried(at: list[int], other: bool):
        preparation = Preparation(lab)
        for moment in at:
            preparation.start(OURS, {"at": moment, "do": ["SIGKILL"]})
        before = (preparation.folder / "data/u").exists()
        if other and not before:
            attempt = preparation.start(THEIRS)
            if attempt.statuses == [0]:
                need(preparation.dataset() == prepared(lab, THEIRS)[0], "the other dataset differs")
            else:
                one_sentence(attempt)
                preparation.finish(OURS, expected)
        else:
            preparation.finish(OURS, expected)
        shutil.rmtree(preparation.folder)

    for other in (False, True):
        for at in lab.some(moments, 60, 1):
            then = ", then other files" if other else ""
            yield f"killed at {at}{then}", functools.partial(tried, [at], other)
    for at in lab.some(moments, 20, 0):
        twice = [at, lab.rng.choice(moments)]
        yield f"killed at {twice}", functools.partial(tried, twice, False)


def endless_sources(lab: Lab):
    """Puts files that never end, or folders that contain themselves, among the sources.

    The preparation must refuse them, or make the dataset of the other files."""

    def listening(path: Path) -> None:
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))

    makers = {
        "a FIFO": os.mkfifo,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a socket": listening,
        "a folder that contains itself": lambda path: path.with_suffix("").symlink_to("."),
    }

    def tried(make):
        expected = prepared(lab, OURS)[0]
        preparation = Preparation(lab)
        make(preparation.folder / "texts/endless.txt")
        argv = (*OURS[:-2], "--files=texts/**/*.txt", OURS[-1])
        attempt = preparation.start(argv, patience=20)
        if attempt.statuses != [0]:
            one_sentence(attempt)
        else:
            shards = {name: digest for name, digest in preparation.dataset().items() if name.endswith(".bin")}
            need(shards.items() <= expected.items(), "the dataset differs")
        shutil.rmtree(preparation.folder)

    for name, make in lab.some([*makers.items()], None, 0):
        yield name, functools.partial(tried, make)


def copied_datasets(lab: Lab):
    """Copies a verified dataset with all times and changes a shard, also keeping its times: training must refuse it."""
    base = damaged_base(lab, 1)

    def tried(name: str):
        data, aside = Path("data/u"), Path("data/aside")
        need((data / CACHE).exists(), "the dataset has not been verified")
        os.rename(data, aside)
        try:
            shutil.copytree(aside, data)  # copies the times, as cp -a does
            times = (data / name).stat()
            flip(data / name)
            os.utime(data / name, ns=(times.st_atime_ns, times.st_mtime_ns))
            lab.count += 1
            run = base.copy(f"trial{lab.count}")
            attempt = run.start()
            one_sentence(attempt)
            need(name in attempt.error, attempt)
        finally:
            shutil.rmtree(data)
            os.rename(aside, data)
        run.finish(lab.references[1])
        run.delete()

    for path in lab.some(sorted(Path("data/u").glob("*.bin")), None, 0):
        yield f"a changed copy of {path.name}", functools.partial(tried, path.name)


def read_only_datasets(lab: Lab):
    """Lets every change below the dataset's folder fail as on a read-only mount: training must not notice."""

    def tried(world: int):
        run = lab.run(world)
        need(not any((attempt := run.start({"read_only": "data/u"})).statuses), f"the run {attempt}")
        need(not Path("data/u", CACHE).exists(), "the dataset was written to")
        run.compare(lab.references[world])
        run.delete()

    for world in lab.some([1, 2], None, 0):
        yield f"{world} processes", functools.partial(tried, world)


def links_in_runs(lab: Lab):
    """Replaces each file of a run folder by a link to a file outside. The other file must stay unharmed.

    The run refuses the link in one sentence, or needs no such file, or falls back to an older checkpoint."""
    base = damaged_base(lab, 1)

    def tried(name: str, outside: str):
        lab.count += 1
        run, target, kept = base.copy(f"trial{lab.count}"), Path(f"outside{lab.count}"), Path(f"kept{lab.count}")
        path = run.folder / name
        shutil.move(path, kept)
        if outside != "nothing":
            target.write_bytes(kept.read_bytes() if outside == "a copy" else b"precious")
        path.symlink_to(target.absolute())
        before = target.read_bytes() if target.exists() else None
        attempt = run.start()
        need((target.read_bytes() if target.exists() else None) == before, f"{target} was changed")
        if attempt.statuses == [0]:
            run.compare(lab.references[1])
        else:
            one_sentence(attempt)
            need(path.is_symlink() and path.name in attempt.error, attempt)
            path.unlink()
            shutil.move(kept, path)
            run.finish(lab.references[1])
        run.delete()

    names = [path.name for path in sorted(base.folder.iterdir()) if path.is_file()]
    names += [f"step_00000006/{path.name}" for path in sorted((base.folder / "step_00000006").iterdir())]
    cases = [(name, outside) for name in names for outside in ("a copy", "another file", "nothing")]
    for name, outside in lab.some(cases, None, 1):
        yield f"{name} is a link to {outside}", functools.partial(tried, name, outside)


def ranks_differ(lab: Lab):
    """Gives one of two ranks another setting: all end with one sentence before the first step."""
    base = damaged_base(lab, 2)

    def tried(rank: int, setting: str, resumes: bool):
        lab.count += 1
        run = base.copy(f"trial{lab.count}") if resumes else lab.run(2)
        before = sorted(path.name for path in run.folder.glob("step_*"))
        attempt = run.start(changes={rank: setting}, patience=40)
        need(all(attempt.statuses) and "Traceback" not in attempt.error, attempt)
        sentences = [line for line in attempt.error.splitlines() if line.startswith("error: ")]
        need(len(sentences) == 1 and setting[2:].split("=")[0] in sentences[0], attempt)
        need(sorted(path.name for path in run.folder.glob("step_*")) == before, "a checkpoint changed")
        run.finish(lab.references[2])
        run.delete()

    settings = ["--learning_rate=2e-3", "--seed=7", "--max_steps=12", "--dropout=0.2", "--eval_interval=3"]
    cases = [(rank, setting, resumes) for rank in (0, 1) for setting in settings for resumes in (False, True)]
    for case in lab.some([c for c in cases if not (c[2] and c[1][2:6] in ("seed", "drop"))], None, 1):
        yield str(case), functools.partial(tried, *case)


def live_sampling(lab: Lab):
    """Loads a run again and again while it is trained and saves at every step: every load must succeed."""

    def tried():
        run = lab.run(1)
        argv = override(run.argv, "--save_interval=1", "--max_steps=60")
        pid, loads, steps = run.fork(argv), 0, set()
        try:
            end = time.monotonic() + 60
            while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < end:
                if not run.newest():
                    time.sleep(0.01)
                    continue
                try:
                    steps.add(load_run(run.folder).state["step"])
                except UserError as error:
                    need(False, f"load {loads + 1} failed: {error}")
                loads += 1
            pid = 0
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        need(loads >= 10 and len(steps) >= 5, f"only {loads} loads of the steps {sorted(steps)}")
        run.delete()

    for number in lab.some([1, 2, 3], None, 0):
        yield f"training {number}", tried


KINDS = {
    "a preparation, killed": kills_of_preparations,
    "a preparation, an endless source": endless_sources,
    "1 process, a changed copy of the dataset": copied_datasets,
    "1 and 2 processes, a read-only dataset": read_only_datasets,
    "1 process, a link in the run folder": links_in_runs,
    "1 process, live sampling": live_sampling,
    "2 processes, ranks that differ": ranks_differ,
}
