"""Defines the kinds of faults that faults.py tries: each function yields trials (description, function) for a Lab."""

import functools
import itertools
import json
import shutil
from pathlib import Path

from nanometa.data.verify import CACHE
from tests.fault_lab import Lab, Run, need

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
PHASES = ("start", "training", "evaluation", "saving")


def kill(at: int, rank: int | None = 0, do=("SIGKILL",)) -> dict:
    return {"at": at, "do": do, "rank": rank}


def trial(lab: Lab, world: int, *faults: dict, check=None, **limits):
    """Returns a trial: one start of a run with each of the faults, then resumes until the run is finished.

    check(attempt) verifies how each start with a fault ended.
    """

    def tried():
        run = lab.run(world)
        for fault in faults:
            attempt = run.start(fault, **limits)
            need(run.has_struck() or "limit" in fault, f"the fault never came: it {attempt}")
            run.check_kept()
            if check:
                check(attempt)
        run.finish(lab.references[world])
        run.delete()

    return json.dumps([world, *faults]), tried


# ----------------------------------------------------------------------------- kills


def random_kills(lab: Lab, world: int, kills: int):
    """Kills each run three times at random moments; every start but the first resumes the run."""

    def tried(after: list[float]):
        run = lab.run(world)
        for seconds in after:
            run.start(kill_after=seconds)
            run.check_kept()
        run.finish(lab.references[world])
        run.delete()

    longest = lab.seconds[world] * 0.95
    for _ in range(0, kills, 3):
        after = [lab.rng.uniform(0, longest) for _ in range(3)]
        yield f"{world} processes, killed after {after} s", functools.partial(tried, after)


def kills_in_saves(lab: Lab):
    """Kills before every call of both kinds of saves, which includes the deletion of old checkpoints, and amid their
    writes."""
    moments = [(moment, ("SIGKILL",)) for moment in lab.at("saving")]
    halves = [m["moment"] for m in lab.moments[1] if m["phase"] == "saving" and m["halves"]]
    for at, do in lab.some(moments, None, 2) + [(at, "half") for at in lab.some(halves, None, 1)]:
        yield trial(lab, 1, kill(at, do=do))


def kills_elsewhere(lab: Lab):
    """Kills before calls of the start, of training and of evaluation, and in the middle of their writes."""
    for at in lab.some(lab.at("start", "training", "evaluation"), 60, 1):
        yield trial(lab, 1, kill(at))
    for m in lab.some([m for m in lab.moments[1] if m["phase"] != "saving" and m["halves"]], 20, 1):
        yield trial(lab, 1, kill(m["moment"], do="half"))


def kills_of_the_resumed(lab: Lab):
    """Kills in a save, then while the next start cleans up or trains on, then once more."""
    for at in lab.some(lab.at("saving"), 40, 1):
        yield trial(lab, 1, kill(at), kill(lab.rng.randrange(40)), kill(lab.rng.randrange(60)))


# ----------------------------------------------------------------------------- signals


def in_order(lab: Lab, world: int, at: int, rank: int | None = 0):
    """Returns a check that the process saved and ended, or finished if it was already in its last step."""
    moments = lab.moments_of[world, rank or 0]
    last = [m["moment"] for m in moments if m["call"] == "batch" and m["name"] == "train"][-2]

    def check(attempt):
        stopped = "stopped by a signal" in attempt.out
        need(not any(attempt.statuses), attempt)
        need(stopped or (at >= last and "done in" in attempt.out), "the signal did not stop it")

    return check


def signals(lab: Lab, world: int):
    for name, phase in lab.some([*itertools.product(SIGNALS, PHASES)], None, 2):
        for rank in (0,) if world == 1 else (0, 1, None):
            for at in lab.some(lab.at(phase, world=world, rank=rank or 0), 5 if world == 1 else 1, 1):
                check = None if phase == "start" else in_order(lab, world, at, rank)
                yield trial(lab, world, kill(at, rank, [name]), check=check)


def signals_twice(lab: Lab):
    """Sends two signals: at once, as a launcher does when it forwards a signal, or later, to end without waiting."""

    def ended_at_once(attempt):
        need(attempt.statuses[0] < 0, attempt)

    for phase in lab.some(list(PHASES[1:]), None, 1):
        for at in lab.some(lab.at(phase), 4, 1):
            for names in lab.some([*itertools.product(SIGNALS, SIGNALS)], None, 1):
                yield trial(lab, 1, kill(at, do=names), check=in_order(lab, 1, at))
            yield trial(lab, 1, kill(at, do=["SIGTERM", 1.5, "SIGINT"]), check=ended_at_once)


# ----------------------------------------------------------------------------- disks


def one_sentence(attempt) -> None:
    """Checks that the process failed with one sentence that says why."""
    need(attempt.statuses[0] == 2 and "Traceback" not in attempt.error, attempt)
    need(attempt.error.startswith("error: ") and attempt.error.count("\n") == 1, attempt)


def full_disk(lab: Lab):
    """Lets all writes, fsyncs and renames fail from some moment on, or one of them alone."""
    filling = [m["moment"] for m in lab.moments[1] if m["call"] in ("open", "write", "fsync", "mkdir", "tensors")]
    filling += lab.at(*PHASES, calls=("rename", "replace"))
    for at in lab.some(filling, 60, 1):
        yield trial(lab, 1, kill(at, do="full"), check=one_sentence)
    # A run can do without the cache of verified files, which serves only the next start.
    notes = {m["moment"] for m in lab.moments[1] if CACHE in m["name"]}
    for at in lab.some([at for at in filling if at not in notes], 30, 1):
        yield trial(lab, 1, kill(at, do="once"), check=one_sentence)


def file_size_limit(lab: Lab):
    """Sets the kernel's limit on file sizes so low that metrics, train.log, state, weights or the optimizer do not
    fit."""
    for limit in lab.some([1500, 2000, 2500, 3000, 4000, 6000, 9000, 100_000, 178_000, 200_000, 359_000], None, 1):
        yield trial(lab, 1, {"limit": limit}, check=one_sentence)


def flip(path: Path, where: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 16
    path.write_bytes(raw)


DAMAGES = {
    "a flipped byte in": flip,
    "a flipped byte at the start of": lambda path: flip(path, 0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@functools.cache
def damaged_base(lab: Lab, world: int) -> Run:
    """Returns a run that was killed in step 8, with checkpoints of steps 3 and 6 and the best weights of step 4."""
    run = lab.run(world)
    batches = [m["moment"] for m in lab.moments[world] if m["call"] == "batch" and m["name"] == "train"]
    run.start(kill(batches[2 * 7 + 1], None))
    run.was_damaged = True
    need([path.name for path in run.newest()] == ["step_00000003", "step_00000006"], "the base is another")
    return run


def damaged_checkpoints(lab: Lab, world: int):
    """Damages files of checkpoints.

    If a file of the newest checkpoint is damaged, the run names it and uses the checkpoint before. Damage to both step
    checkpoints is refused. The best checkpoint is not needed to resume, and the file `latest` is not relied on.
    """
    base = damaged_base(lab, world)

    def tried(names: list[str], damage, outcome: str):
        lab.count += 1
        run = base.copy(f"trial{lab.count}")
        for name in names:
            damage(run.folder / name)
        if outcome == "refused":
            attempt = run.start()
            one_sentence(attempt)
            need(names[0] in attempt.error or Path(names[0]).parent.name in attempt.error, attempt)
        else:
            run.finish(lab.references[world])
            said = [line for line in (run.folder / "train.log").read_text().splitlines() if "Falling back" in line]
            # a flipped hash in the manifest is reported as damage to the file that the hash belongs to
            name = Path(names[0]).parent.name if names[0].endswith("manifest.json") else Path(names[0]).name
            need(outcome != "named" or (len(said) == 1 and name in said[0]), f"it said of {names[0]}: {said}")
        run.delete()

    cases = []
    for word, damage in DAMAGES.items():
        files = [path.name for path in sorted((base.folder / "step_00000006").iterdir())]
        cases += [(word, [f"step_00000006/{name}"], damage, "named") for name in files]
        cases += [(word, [f"step_00000006/{name}", f"step_00000003/{name}"], damage, "refused") for name in files[:3]]
        cases += [(word, [f"best_00000004/{name}"], damage, "") for name in files if name != "optimizer.safetensors"]
        cases += [(word, ["latest"], damage, "")]
    cases += [("a missing folder", ["step_00000006"], shutil.rmtree, "")]
    for word, names, damage, outcome in lab.some(cases, None if world == 1 else 12, 2 if world == 1 else 0):
        yield f"{word} {names}", functools.partial(tried, names, damage, outcome)


def damaged_shards(lab: Lab):
    """Damages a shard: the run refuses it by name, and continues once the file is restored."""
    base = damaged_base(lab, 1)

    def tried(shard: Path, damage):
        lab.count += 1
        run, whole = base.copy(f"trial{lab.count}"), shard.read_bytes()
        try:
            damage(shard)
            attempt = run.start()
            one_sentence(attempt)
            need(str(shard) in attempt.error, attempt)
        finally:
            shard.write_bytes(whole)
        run.finish(lab.references[1])
        run.delete()

    cases = [
        (word, shard, damage) for shard in sorted(Path("data/u").glob("*.bin")) for word, damage in DAMAGES.items()
    ]
    for word, shard, damage in lab.some(cases, None, 1):
        yield f"{word} {shard}", functools.partial(tried, shard, damage)


# ----------------------------------------------------------------------------- two processes


def rank_dies(lab: Lab):
    for rank in lab.some([0, 1], None, 1):
        for at in lab.some([m["moment"] for m in lab.moments_of[2, rank]], 15, 1):
            yield trial(lab, 2, kill(at, rank))
    for at in lab.some(lab.at("saving", world=2), 15, 0):
        yield trial(lab, 2, kill(at))
    for at in lab.some(lab.at("saving", world=2, calls=("write", "fsync", "tensors")), 6, 0):
        yield trial(lab, 2, kill(at, do="full"))


def rank_hangs(lab: Lab):
    """Stops a process for longer than the others wait; after some seconds all are killed."""
    for rank in lab.some([0, 1], None, 0):
        for at in lab.some(lab.at("training", "evaluation", world=2, rank=rank), 3, 1):
            yield trial(lab, 2, kill(at, rank, ["SIGSTOP"]), patience=3)


def under_torchrun(lab: Lab):
    """Kills processes or torchrun itself. The run is restarted by torchrun or by us, the first one again under
    torchrun."""

    def tried(fault: dict, patience: float, check, number: int):
        run = lab.run(2)
        attempt = run.torchrun(fault, patience, restarts=2 if check == "restarted" else 0)
        need(run.has_struck(), f"the fault never came: it {attempt}")
        if check == "restarted":
            need(
                attempt.statuses == [0] and "done in" in attempt.out and run.attempts == 2,
                f"not restarted: it {attempt}",
            )
            run.compare(lab.references[2])
            return run.delete()
        if check == "orphans":
            refused = run.start(patience=20)
            need("another process is training" in refused.error and any(refused.statuses), refused)
        elif check == "saved":
            need("stopped by a signal" in attempt.out, f"nothing was saved: it {attempt}")
        run.kill_orphans()
        run.finish(lab.references[2], run.torchrun if number == 0 and not lab.quick else None)
        run.delete()

    trained = [lab.at("training", calls=("batch",), world=2, rank=rank) for rank in (0, 1)]
    middle, middle_1 = (moments[len(moments) // 2] for moments in trained)
    saving = lab.at("saving", calls=("fsync",), world=2)[3]
    cases = [
        (kill(saving), 60, ""),
        (kill(middle, 0, ["parent SIGTERM", 0.7]), 60, "saved"),
        (kill(middle, None, ["SIGTERM", "parent SIGTERM", 0.7]), 60, "saved"),
        (kill(lab.at("saving", calls=("rename",), world=2)[-1], 0), 60, "restarted"),
        (kill(middle_1, 1), 60, "restarted"),
        (kill(saving, 0, ["parent SIGINT", 0.7]), 60, "saved"),
        (kill(middle_1, 1, ["SIGINT"]), 60, "saved"),
        (kill(middle_1, 1), 60, ""),
        (kill(middle, 0), 60, ""),
        (kill(middle_1, 1, ["SIGSTOP"]), 12, ""),
        (kill(middle, 0, ["parent SIGKILL", "SIGSTOP"]), 60, "orphans"),
        (kill(lab.at("start", world=2)[-1], 0, ["parent SIGTERM", 0.7]), 60, ""),
        (kill(saving, do="full"), 60, ""),
    ]
    for number, (fault, patience, check) in enumerate(cases[3:4] if lab.quick else cases):
        yield json.dumps(fault), functools.partial(tried, fault, patience, check, number)


KINDS = {
    "1 process, killed at random": lambda lab: random_kills(lab, 1, lab.kills),
    "1 process, killed in a save": kills_in_saves,
    "1 process, killed elsewhere": kills_elsewhere,
    "1 process, killed again and again": kills_of_the_resumed,
    "1 process, a signal": lambda lab: signals(lab, 1),
    "1 process, two signals": signals_twice,
    "1 process, a full disk": full_disk,
    "1 process, a file size limit": file_size_limit,
    "1 process, a damaged checkpoint": lambda lab: damaged_checkpoints(lab, 1),
    "1 process, a damaged shard": damaged_shards,
    "2 processes, killed at random": lambda lab: random_kills(lab, 2, lab.kills // 4),
    "2 processes, a rank dies": rank_dies,
    "2 processes, a rank hangs": rank_hangs,
    "2 processes, a signal": lambda lab: () if lab.quick else signals(lab, 2),
    "2 processes, a damaged checkpoint": lambda lab: damaged_checkpoints(lab, 2),
    "2 processes, torchrun": under_torchrun,
}
