"""Runs tests/fuzz.py briefly, repeats what fuzzing found before, and checks that the fuzzer notices failures."""

import io
import itertools
import json
import os
import time
from pathlib import Path

import pytest

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, PrepareConfig, SampleConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.loader import Windows
from nanometa.data.sources import Skipped, open_source
from nanometa.data.staging import finished_segments, read_plan
from nanometa.data.tokenizer import RANKS_FILE, SPEC_FILE, Tokenizer
from nanometa.model import GPT
from nanometa.sample import read_prompt
from nanometa.training import checkpoint, hugging_face, pretrained
from tests import fuzz
from tests.damage import CHUNK, QUIET, World, seal_checkpoint, seal_tokenizer

DEEP = "[" * 100_000


def test_a_hundred_and_fifty_damaged_inputs_are_refused_or_usable(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 30)  # for a busy machine
    out = io.StringIO()
    assert fuzz.fuzz(150, seed=4, out=out) == 0, out.getvalue()
    assert "| all " in out.getvalue()


def test_the_fuzzer_notices_failures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "SECONDS", 30)
    Path("file").write_text("as it was")

    def refuse(sentence):
        raise UserError(sentence)

    def two_lines():
        error = UserError("x")
        error.args = ("one\ntwo",)
        raise error

    for use, outcome in (
        (lambda: None, "accepted"),
        (lambda: refuse("no"), "refused"),
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
        (two_lines, "failed: not one printable sentence"),
        (lambda: load_config(TrainConfig, ["--help"]), "accepted"),
        (lambda: Path("file").write_text("as it is now"), "failed: accepted, and changed on disk: file"),
        (lambda: Path("new").write_text(""), "failed: accepted, and changed on disk: new"),
    ):
        assert fuzz.verdict(use).startswith(outcome)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzz.verdict(lambda: time.sleep(60)).startswith("failed: Hang")


# ----------------------------------------------------------------------------- what fuzzing found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    here = Path.cwd()
    world = World(tmp_path_factory.mktemp("world"))
    os.chdir(here)
    return world


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    yield made
    made.restore()


def test_a_refusal_is_one_printable_line():
    assert str(UserError("a\nb \x1b[2J \ud800 é")) == r"a\nb \x1b[2J \ud800 é"
    with pytest.raises(UserError, match=r"unknown setting --n\\x00_head: did you mean 'n_head'"):
        load_config(TrainConfig, ["--n\0_head=1"])


def test_parser_errors_keep_their_reason_without_utf8(monkeypatch):
    """If standard output is not UTF-8, the parser of the command line draws its boxes with - and |."""
    with pytest.raises(UserError) as caught, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        load_config(SampleConfig, ["--meta=x"])
    assert "--meta=x is invalid: it must be one of trained" in str(caught.value) and "----" not in str(caught.value)


def test_impossible_paths_are_refused(world):
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="there is no config file"):
            load_config(TrainConfig, [path], config_file=True)
        with pytest.raises(UserError, match="cannot be read"):
            read_prompt(SampleConfig(prompt_file=path))


def test_numbers_beyond_the_range_of_floats_are_refused(world):
    with pytest.raises(UserError, match="learning_rate=1000.* has the wrong type"):
        TrainConfig(learning_rate=10**400)
    config = json.loads(Path("hf/config.json").read_text())
    Path("hf/config.json").write_text(json.dumps(config).replace('"n_layer": 1', '"n_layer": 1e400'))
    with pytest.raises(UserError, match="config.json is damaged"):
        pretrained.load_into(GPT(GPTConfig(vocab_size=64, content_vocab_size=64, n_layer=1)), "hf", world.run.tokenizer)


@pytest.mark.parametrize("text", [DEEP, "3", '"x"', "[]", "{}", "null", "\0", "\ufeff{}"])
def test_json_of_any_shape_is_refused(world, text):
    """Deep nesting once ended in RecursionError, and other shapes in AttributeError and other exceptions."""
    for path, use in (
        ("data/d/manifest.json", lambda: Windows("data/d", "train", CHUNK, "ignore")),
        (f"data/d/{SPEC_FILE}", lambda: Tokenizer.load(Path("data/d"))),
        (world.step / "manifest.json", lambda: checkpoint.open_checkpoint(world.step)),
        ("data/q.part1of1/plan.json", lambda: read_plan(Path("data/q.part1of1"))),
        ("hf/config.json", lambda: hugging_face.files_of(Path("hf")) and world_weights(world)),
    ):
        Path(path).write_text(text)
        with pytest.raises(UserError):
            use()
        world.restore()
    (world.step / "state.json").write_text(text)
    seal_checkpoint(world.step)
    with pytest.raises(UserError, match="state.json was not written by train.py|state.json|manifest.json is damaged"):
        checkpoint.load_run(world.step)
    Path("rows.jsonl").write_text(text + '\n{"text": "fine"}\n')
    source = open_source(PrepareConfig(source="files", files=("rows.jsonl",)))
    skipped, piece = itertools.chain.from_iterable(map(source.read, range(source.n_units)))
    assert isinstance(skipped, Skipped) and piece.text == "fine"


def world_weights(world):
    return pretrained.load_into(GPT(world.run.config.model), "hf", world.run.tokenizer)


def test_damaged_tokenizers_with_valid_hashes_are_refused(world):
    """A byte without a token, a doubled or missing id, or another pattern. The files are sealed, so no hash shows the
    damage."""
    folder = Path("data/d")
    lines = (folder / RANKS_FILE).read_bytes().splitlines(keepends=True)
    for damaged in (lines[1:], lines[:-2] + lines[-1:], [*lines, lines[5]], lines + [b"YWFhYQ== 5\n"], [b"x y z\n"]):
        (folder / RANKS_FILE).write_bytes(b"".join(damaged))
        seal_tokenizer(folder)
        with pytest.raises(UserError, match="the tokenizer in data/d is damaged"):
            Tokenizer.load(folder)
        world.restore()
    spec = json.loads((folder / SPEC_FILE).read_text())
    for key, value in (("pattern", "(["), ("pattern", "."), ("pattern", 3), ("name", None), ("fingerprint", "")):
        (folder / SPEC_FILE).write_text(json.dumps({**spec, key: value}))
        with pytest.raises(UserError, match="the tokenizer in data/d is damaged"):
            Tokenizer.load(folder)


def test_damaged_weights_with_valid_hashes_are_refused(world):
    """Headers that are not JSON, missing tensors or tensors of other shapes, and models larger than the memory, all
    sealed."""
    weights, optimizer, state = (world.step / name for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, "state.json"))
    raw = weights.read_bytes()
    for damaged in (b"\xff" * 8 + raw[8:], raw[:8] + b"x" + raw[9:], raw.replace(b"wte.weight", b"wte.wEight"), b""):
        weights.write_bytes(damaged)
        seal_checkpoint(world.step)
        with pytest.raises(UserError, match=r"model.safetensors (is damaged|does not fit its config, .* missing)"):
            checkpoint.load_run(world.step)
    world.restore()
    state.write_text(state.read_text().replace('"n_embd": 16', '"n_embd": 32768'))
    seal_checkpoint(world.step)
    with pytest.raises(
        UserError, match=r"is float32 \(16, 16\) in the file and float32 \(32768, 32768\) in the model|does not fit"
    ):
        checkpoint.load_run(world.step)
    world.restore()
    raw = optimizer.read_bytes()
    for damaged in (raw.replace(b"ln_f.weight/exp_avg", b"ln_f.weight/exp_Avg"), raw.replace(b"ln_f", b"ln_g")):
        optimizer.write_bytes(damaged)
        seal_checkpoint(world.step)
        with pytest.raises(UserError, match="optimizer.safetensors does not fit the model"):
            fuzz.use_checkpoint(world)


@pytest.mark.parametrize(
    ("where", "value"),
    [(("step",), "1"), (("step",), -1), (("best",), {}), (("best",), 3), (("data", "chunk_content"), 10**12),
     (("data", "injection"), "often"), (("data", "shards"), []), (("data",), None), (("config",), [])],
)  # fmt: skip
def test_damaged_states_with_valid_hashes_are_refused(world, where, value):
    path = world.step / "state.json"
    state = json.loads(path.read_text())
    holder = state if len(where) == 1 else state[where[0]]
    holder[where[-1]] = value
    path.write_text(json.dumps(state))
    seal_checkpoint(world.step)
    with pytest.raises(UserError, match="state.json was not written by train.py"):
        checkpoint.load_run(world.step)


def test_prompts_with_half_a_surrogate_pair_are_refused(world):
    with pytest.raises(UserError, match="not valid Unicode at character 1: remove that character"):
        read_prompt(SampleConfig(prompt="a\ud800"))
    with pytest.raises(UserError, match="not UTF-8 at byte 1: convert it to UTF-8"):
        read_prompt(SampleConfig(prompt="a\udc80"))  # Python represents an undecodable byte of the command line so
    with pytest.raises(UserError, match=r"not valid Unicode at character 3 \('\\udc80'\)"):
        world.run.tokenizer.encode_prompt("abc\udc80<|meta|>")


def test_damaged_parts_of_a_preparation_are_refused(world):
    """A .json with wrong types, or a link in place of ids, counts as not written; the number of units is checked."""
    folder = Path("data/q.part1of1")
    path = sorted(folder.glob("unit_*.json"))[0]
    good = json.loads(path.read_text())
    assert len(finished_segments(folder, 0, 2)) == 1
    for key, value in (("splits", "x"), ("splits", {}), ("items", "1"), ("ends_unit", 1), ("skipped_named", [["a"]]),
                       ("unit", 7), ("extra", 1)):  # fmt: skip
        path.write_text(json.dumps({**good, key: value}))
        assert finished_segments(folder, 0, 2) == []
    world.restore()
    empty = next(file for file in folder.glob("unit_*.*") if file.suffix != ".json" and not file.stat().st_size)
    empty.unlink()
    empty.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is in none of the parts"):
        prepare.merge(prepare.merge_config(["--merge", str(folder)]), "", QUIET)
    world.restore()
    plan = json.loads((folder / "plan.json").read_text())
    for key, value, sentence in (
        ("n_units", plan["n_units"] - 1, "is beyond the"),
        ("n_units", 1.5, "plan.json is damaged"),
        ("config", {**plan["config"], "chunk_content": "28"}, "plan.json is damaged .*chunk_content='28'"),
        ("config", {}, "plan.json is damaged"),
        ("format", 0, "plan.json is damaged .*format is '0'"),
        ("format", 2, r"plan.json has format 2, and this version of nanoMeta reads up to 1: update nanoMeta\.$"),
    ):
        (folder / "plan.json").write_text(json.dumps({**plan, key: value}))
        with pytest.raises(UserError, match=sentence):
            prepare.merge(prepare.merge_config(["--merge", str(folder)]), "", QUIET)
    older = {key: value for key, value in plan.items() if key != "format"}
    (folder / "plan.json").write_text(json.dumps(older))
    assert read_plan(folder) == older


def test_decoding_a_spare_id_is_refused(world):
    """Ids between the markers and n_vocab have a row in the embedding but no text. Decoding one once ended in
    KeyError."""
    tokenizer = world.run.tokenizer
    for token in (tokenizer.meta + 4, tokenizer.n_vocab, -1):
        with pytest.raises(UserError, match=f"{token} is not an id of the tokenizer"):
            tokenizer.decode([5, token])
    assert tokenizer.decode([tokenizer.meta, tokenizer.eot]) == "<|meta|><|endoftext|>"
