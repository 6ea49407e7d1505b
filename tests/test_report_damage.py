"""Damages the files that report.py reads. Each report must be made, or be refused in one sentence."""

import contextlib
import io
import itertools
import json
import random
from pathlib import Path

import pytest

from nanometa import report
from nanometa.common.errors import UserError
from nanometa.config.tasks import TASKS
from nanometa.probes.probe_command import draw_picture, read_earlier_lines
from nanometa.reports import drawing, training
from nanometa.reports.probe_sections import SECTIONS
from tests.conftest import ROOT
from tests.damage import damage
from tests.fast_cases import every

RECORDS = ROOT / "records"
# a published file of each kind of lines, and the number of its lines that are damaged
FILES = {
    "tasks": ("2026-11-22_longer_windows/tasks.jsonl", 6), "perplexity": ("2026-11-22_longer_windows/depth.jsonl", 4),
    "positions": ("2026-11-22_looking_inside/positions_meta_128.jsonl", 6),
    "attention": ("2026-11-22_looking_inside/attention_meta_128.jsonl", 8),
    "patching": ("2026-11-22_looking_inside/patching_meta_128.jsonl", 8),
    "residual": ("2026-11-22_looking_inside/residual_meta_128.jsonl", 8),
    "rate_distortion": ("2026-11-22_looking_inside/rate_distortion_meta_128.jsonl", 3),
}  # fmt: skip
CONFIG = {
    "config": {
        "seed": 1,
        "model": {
            "n_embd": 16, "n_inner": None, "block_size": 64, "second_attention": "meta", "position": "rope",
        },
        "task": {"train_length": 64, "level": "hard", "question": "index", "placements": ["target"]},
    },
    "data": {
        "dataset": "data/u", "tokenizer": "ab", "chunk_markers": 4, "content_sha256": {"train": "ab", "val": "cd"},
        "val_text_compressed": {"gzip_9_bits_per_byte": 2.0, "xz_bits_per_byte": 1.5},
    },
    "environment": {"processor": "a CPU", "cores": 2, "command": "train.py"},
}  # fmt: skip


def metrics(tasks: bool) -> bytes:
    """Returns the metrics.jsonl of a short run on text or on tasks."""
    shares = {f"exact_{task}": 0.25 for task in TASKS[:2]} if tasks else {}
    content = "texts" if tasks else "content_tokens"
    lines = [
        {"kind": "train", "step": step, "loss": 3.0 / (step + 1), "grad_norm": 1.0, content: 100 * step,
         f"{content}_per_s": 50.0, "positions_per_s": 60.0, "elapsed_s": 2.0 * step, "mfu": 0.1}
        for step in range(4)
    ]  # fmt: skip
    lines += [
        {"kind": kind, "step": 3, "loss": 1.5, "bits_per_byte": 1.2, content: 300, "tokens": 90, "eval_s": 1.0,
         "endoftext_loss": None, **shares}
        for kind in ("val", "final")
    ]  # fmt: skip
    lines.append({"kind": "guard", "step": 2, "what": "spike", "why": "x", "windows": [1, 2]})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(autouse=True)
def coarse(monkeypatch, tmp_path):
    """Draws few pixels, and works in a folder of its own."""
    monkeypatch.setattr(drawing, "DPI", 20)
    monkeypatch.chdir(tmp_path)


def outcome(*commands: list[str]) -> str:
    """Returns "made" or the sentence of the refusal. Fails for any other end, such as a traceback."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for command in commands:
                report.main(command)
    except UserError as error:
        sentence = str(error)
        assert sentence.isprintable() and 20 < len(sentence) < 20_000 and sentence.endswith((".", "?")), sentence
        return sentence
    return "made"


def damaged_lines(kind: str, rng: random.Random) -> bytes:
    """Returns some lines of a kind, one or two of them damaged."""
    name, count = FILES[kind]
    lines = list(itertools.islice((RECORDS / name).open("rb"), 200))
    lines = [lines[i] for i in sorted(rng.sample(range(len(lines)), min(count, len(lines))))]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = damage(lines[at].strip(), rng, rng.random() < 0.9) + b"\n"
    return b"".join(lines)


def damaged_run(folder: Path, rng: random.Random) -> None:
    """Writes the record of a run, one of its files damaged, with a damaged header of weights."""
    (folder / "step_00000003").mkdir(parents=True, exist_ok=True)
    files = {"config.json": json.dumps(CONFIG).encode(), "metrics.jsonl": metrics(rng.random() < 0.5)}
    name = rng.choice(["config.json", "config.json", "metrics.jsonl", "weights"])
    if name == "metrics.jsonl" and rng.random() < 0.8:
        lines = files[name].splitlines()
        at = rng.randrange(len(lines))
        lines[at] = damage(lines[at], rng, True)
        files[name] = b"\n".join(lines) + b"\n"
    elif name in files:
        files[name] = damage(files[name], rng, name == "config.json")
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}).encode()
    header = damage(header, rng, True) if name == "weights" else header
    size = rng.choice((len(header), 2**62, 0)) if name == "weights" else len(header)
    files["step_00000003/model.safetensors"] = size.to_bytes(8, "little") + header
    for file, content in files.items():
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_lines_are_shown_or_refused(kind, seeds=range(12), enough=2):
    """Ends after `enough` files if some were shown and some refused."""
    outcomes = []
    for seed in seeds:
        Path("x.jsonl").write_bytes(damaged_lines(kind, random.Random(f"{kind} {seed}")))
        outcomes.append(outcome(["x.jsonl", "--output=page"]))
        if kind in SECTIONS:
            with contextlib.suppress(UserError, ValueError):  # a line of another run may be damaged
                if lines := read_earlier_lines(Path("x.jsonl"), kind, {}):
                    draw_picture(kind, lines)
        if len(outcomes) >= enough and 0 < outcomes.count("made") < len(outcomes):
            break
    assert "made" in outcomes and any(sentence != "made" for sentence in outcomes)


def test_damaged_records_of_runs_are_shown_or_refused(seeds=range(4)):
    outcomes = []
    for seed in seeds:
        damaged_run(Path("out/r"), random.Random(f"run {seed}"))
        outcomes.append(outcome(["out/r", "--output=page"], ["curves", "out/r"]))
    assert "made" in outcomes and any(sentence != "made" for sentence in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FILES, "run"])
def test_many_damaged_files_are_shown_or_refused(kind):
    if kind == "run":
        test_damaged_records_of_runs_are_shown_or_refused(range(1000, 1300))
    else:
        test_damaged_lines_are_shown_or_refused(kind, range(1000, 1150), enough=150)


@pytest.mark.parametrize("kind", every(3, FILES))
def test_every_published_file_is_shown(kind):
    name, _ = FILES[kind]
    assert outcome([str(RECORDS / name), "--output=page"]) == "made"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"data": 3}', b'{"config": []}',
                b'{"config": {"model": {"second_attention": "other"}}}', b'{"config": {"seed": 1e999}}',
                b'{"config": {"task": {"placements": [1]}}}', b'{"data": {"content_sha256": {"val": 3}}}']
)  # fmt: skip
def test_a_config_of_any_shape_is_shown_or_refused(content):
    damaged_run(Path("out/r"), random.Random(0))
    Path("out/r/metrics.jsonl").write_bytes(metrics(False))
    Path("out/r/config.json").write_bytes(content)
    said = outcome(["out/r", "--output=page"], ["curves", "out/r"])
    assert said == "made" if content == b"{}" else "out/r has no readable metrics (config.json: " in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": -1}, "step is -1"), ({"step": 2.5}, "step is 2.5"), ({"step": 2**63}, "is too large"),
        ({"kind": []}, "kind is '[]'"), ({"loss": 10**400}, "is too large"), ({"loss": "1"}, "a value is not a number"),
        ({"elapsed_s": 1e30}, "a time is too long"), ({"exact_../x": 0.5}, "the name of a value is no word"),
        ({"bits_per_byte": float("nan")}, "NaN is no figure"), ({"loss": float("inf")}, "Infinity is no figure"),
        ({"bits_per_byte": None}, ""), ({"texts": None}, ""), ({"elapsed_s": None}, ""), ({"loss": 1e30}, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_damaged_line_of_metrics_is_named(kind, change, reason):
    damaged_run(Path("out/r"), random.Random(0))
    Path("out/r/config.json").write_text(json.dumps(CONFIG))
    lines = [json.loads(line) for line in metrics(True).splitlines()]
    at = [line["kind"] for line in lines].index(kind)
    lines[at] |= change
    Path("out/r/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = outcome(["out/r", "--output=page"], ["curves", "out/r"])
    assert said == "made" if not reason else f"out/r/metrics.jsonl, line {at + 1} is no line of train.py" in said
    assert reason in said
    assert not [path for path in Path().rglob("*") if ".." in path.name]


def line_of(kind: str, where=lambda line: True) -> dict:
    return next(filter(where, map(json.loads, (RECORDS / FILES[kind][0]).open())))


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("tasks", {"train_placements": [1]}, "train_placements is '[1]'"),
        ("tasks", {"origin": None}, "origin is 'None'"),
        ("tasks", {"parameters": 10**400}, "is too large"),
        ("tasks", {"nats": 1e301}, "is too large"),
        ("tasks", {"train_length": 0}, "its train_length is 0"),
        ("perplexity", {"document_nats": [[1.0], [1.0, 2.0]]}, "document_nats is not a table"),
        ("perplexity", {"document_nats": 3}, "document_nats is '3'"),
        ("perplexity", {"document_pieces": []}, "document_nats is not a table"),
        ("perplexity", {"n": "many"}, "n is 'many'"), ("perplexity", {"stride": []}, "stride is '[]'"),
        ("perplexity", {"bucket": 0}, "document_pieces or bucket is not above 0"),
        ("attention", {"predicted": "x"}, "predicted is 'x'"), ("attention", {"keys": None}, "keys is 'None'"),
        ("attention", {"boost_interval": [1.0]}, "boost_interval is '[1.0]'"),
        ("residual", {"more_verdict": 3}, "more_verdict is '3'"),
        ("patching", {"same_place": {}}, "same_place is '{}'"),
        ("positions", {"holm": "0"}, "holm is '0'"),
    ],
)  # fmt: skip
def test_a_damaged_line_of_results_is_named(kind, change, reason):
    line = line_of(kind, lambda line: kind != "residual" or "more_verdict" in line)
    Path("x.jsonl").write_text(json.dumps(line | change) + "\n")
    said = outcome(["x.jsonl", "--output=page"])
    assert said.startswith("x.jsonl, line 1 is no line of eval.py or probe.py (") and reason in said


def test_lines_that_do_not_fit_together_are_refused():
    """Each line is sound, but two draws of the same cell have different numbers of buckets."""
    line = line_of("perplexity")
    other = {**line, "draw": line["draw"] + 1, "document_nats": [row[:-1] for row in line["document_nats"]]}
    Path("x.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(other) + "\n")
    for command in (["x.jsonl", "--output=page"], ["curves", "x.jsonl"]):
        assert "their documents or buckets differ" in outcome(command)


def test_the_known_parts_of_a_file_are_always_there():
    parts = {"a": {"b": (int,), "c": [str]}, "d": (str,)}
    assert training.known({"a": {"b": 3, "e": []}, "f": 1}, parts) == {"a": {"b": 3}}
    assert training.known({"a": None, "d": "x"}, parts) == {"a": {}, "d": "x"}
    for wrong in ({"a": 3}, {"a": {"b": True}}, {"a": {"c": "x"}}, {"a": {"c": [1]}}, {"d": {}}, [], None):
        with pytest.raises(ValueError):
            training.known(wrong, parts)
