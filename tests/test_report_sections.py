"""Tests the sections of report.py other than tasks: each appears if there are lines for it, and has their figures."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanometa.common.errors import UserError
from nanometa.report import main, pictures_of, render, sections_of
from nanometa.reports import tasks
from nanometa.reports.drawing import ARM_COLOURS
from nanometa.reports.files import Found, read
from nanometa.reports.lines import arms_of
from nanometa.reports.page import Page, footer, origin, runs_table
from nanometa.reports.paper import TABLE_1
from nanometa.reports.probe_pictures import draw_positions
from nanometa.reports.training import costs, curves, draw, looks_of, panels_of, read_run
from tests.test_depth import line as depth_line
from tests.test_depth import stream
from tests.test_report import line, words, write

TEXT = {"train": "a" * 64, "val": "b" * 64}
MACHINE = {"processor": "Abacus", "cores": 2, "threads": 1}


def trained(folder: Path, content=TEXT, dataset="data/x", restart=False, task=None, n=20) -> Path:
    """Writes the record of a run: 100 content tokens and 2 s per step, an evaluation every 10 steps.

    With restart, the run was resumed after step 10. Returns the folder.
    """
    folder.mkdir(parents=True)
    data = {"dataset": dataset, "content_sha256": content, "val_text_compressed": {"gzip_9_bits_per_byte": 2.0}}
    facts = {"config": {"seed": 7, "task": task or {}}, "data": data,
             "environment": {**MACHINE, "command": f"train.py {folder.name}"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    share = {"exact_parity": 0.25} if task else {}
    of = "texts" if task else "content_tokens"
    lines = []
    for step in range(n + 1):
        seen = {of: 100 * step, "positions": 110 * step}
        if step:
            elapsed = 2.0 * (step - 10 if restart and step > 10 else step)
            rates = {f"{of}_per_s": 50.0 + (step == 3) * 900, "positions_per_s": 55.0}
            lines.append({"kind": "train", "step": step, "loss": 5 / step, **seen, **rates, "elapsed_s": elapsed})
        if step % 10 == 0:
            lines.append({"kind": "val", "step": step, "loss": 4.0, "bits_per_byte": 3.0 - step / 20, "tokens": 640,
                          "eval_s": 3.0, **share, **seen})  # fmt: skip
    lines.append({**lines[-1], "kind": "final", "bits_per_byte": 1.75, "tokens": 1280})
    write(folder / "metrics.jsonl", lines)
    return folder


def rendered(lines: dict, runs=()) -> dict[str, bytes]:
    return render(Found(lines, list(runs), 0), sections_of(0.0, 0.05), "report.py")


def cells_of(page: bytes) -> list[tuple[str, ...]]:
    """Returns the rows of all tables."""
    return [tuple(filter(None, row.split("|"))) for row in words(page.decode()).split("\n")]


def position_line(condition: str, right: int, **other) -> dict:
    one = line("1" * right + "0" * (100 - right), **other)
    del one["eval"], one["floors"]
    extra = {"difference": right / 100 - 0.5, "difference_interval": [-0.25, 0.125], "p": 0.5, "holm": 0.625,
             "verdict": "undecided: n = 100, 1000 decide"}  # fmt: skip
    return {**one, "probe": "positions", "condition": condition, **(extra if condition != "full" else {})}


def windowed(
    scaling: str, trained_scaling: str, length: int, right: int, arm="meta + rope", window=512, **other
) -> dict:
    own = {"scaling": scaling, "trained_scaling": trained_scaling, "original_block_size": window, "length": length}
    name = f"{arm}{'' if trained_scaling == 'none' else f', {trained_scaling}'}"
    name += f", read with {scaling}" if scaling != trained_scaling else ""
    tokens = {"token_accuracy": (right + 5) / 100, "token_interval": [0.0625, 0.9375]}
    return line("1" * right + "0" * (100 - right), name, task="list_recall", **{**own, **tokens, **other})


# ----------------------------------------------------------------------------- reading


def test_a_folder_gets_the_sections_of_its_files_and_an_empty_one_is_refused(tmp_path):
    run = trained(tmp_path / "one")
    write(run / "perplexity.jsonl", [depth_line()])
    write(run / "tasks.jsonl", [line()])
    write(run / "positions.jsonl", [position_line("full", 50)])
    found = read((str(run),), sections_of(0.0, 0.05))
    page = render(found, sections_of(0.0, 0.05), "")["report.html"].decode()
    ids = re.findall(r'<h2 id="(\w+)"', page)
    assert ids == ["training", "accuracy", "differences", "lengths", "positions", "commands"]
    assert re.findall(r'<a href="#([a-z]+)">', page)[: len(ids)] == ids  # the table of contents
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare has none of metrics.jsonl, tasks.jsonl, .*: give folders of runs"):
        read((str(run), str(tmp_path / "bare")), sections_of(0.0, 0.05))


def test_lines_of_all_kinds_may_share_a_file(tmp_path):
    lines = [line(), position_line("full", 50), depth_line(), line("0" * 100)]
    found = read((write(tmp_path / "all.jsonl", lines),), sections_of(0.0, 0.05))
    assert {kind: len(of) for kind, of in found.lines.items()} == {"tasks": 1, "positions": 1, "perplexity": 1}
    assert found.repeated == 1 and found.lines["tasks"][0]["correct"] == 0


def test_a_run_read_with_two_scalings_has_two_lines(tmp_path):
    lines = [windowed("none", "none", 512, 40), windowed("yarn 4x", "none", 512, 60)]
    found = read((write(tmp_path / "x.jsonl", lines),), sections_of(0.0, 0.05))
    assert [one["correct"] for one in found.lines["tasks"]] == [40, 60] and found.repeated == 0


@pytest.mark.parametrize(
    ("name", "damaged", "why"),
    [
        ("metrics.jsonl", {"kind": "train", "step": "1"}, "metrics.jsonl, line 2 is no line of train.py ("),
        (
            "metrics.jsonl",
            {"kind": "dream", "step": 1},
            "metrics.jsonl, line 2 is no line of train.py (step is 1, kind is 'dream'",
        ),
        ("metrics.jsonl", {"kind": "val", "step": 1, "loss": "low"}, "a value is not a number"),
        ("positions.jsonl", {"probe": "positions"}, "positions.jsonl, line 2 is no line of eval.py or probe.py (arm"),
        ("positions.jsonl", position_line("full", 50, interval=[0.5]), "interval is '[0.5]'"),
        ("positions.jsonl", position_line("full", 50, placement="here"), "placement is 'here'"),
        ("perplexity.jsonl", {name: of for name, of in depth_line().items() if name != "loss"}, "loss is missing"),
    ],
)
def test_damaged_lines_are_refused_with_their_number(tmp_path, name, damaged, why):
    run = trained(tmp_path / "one")
    good = {"metrics.jsonl": {"kind": "val", "step": 0}, "positions.jsonl": position_line("full", 50)}
    write(run / name, [good.get(name) or depth_line(), damaged])
    with pytest.raises(UserError, match=re.escape(why)) as refused:
        read((str(run),), sections_of(0.0, 0.05))
    assert f"{name}, line 2" in str(refused.value)


# ----------------------------------------------------------------------------- training and cost


def test_runs_on_different_texts_have_separate_axes(tmp_path):
    same = [trained(tmp_path / name, dataset=f"data/{name}") for name in ("one", "two")]
    other = trained(tmp_path / "three", content={"train": "a" * 64, "val": "c" * 64})
    on_tasks = trained(tmp_path / "four", task={"train_length": 64, "level": "easy", "placements": ["every"]})
    page = Page("")
    text = curves(page, [read_run(folder) for folder in (*same, other, on_tasks)])
    heads = re.findall(r"<p class=small>(On .*?)</p>", text)
    assert [head[:40] for head in heads] == [
        "On text: data/one, data/two (content of ", "On text: data/x (content of the validati",
        "On tasks: texts of at most 64 positions,",
    ]  # fmt: skip
    assert set(page.files) == {f"training_{group}_{key}_{of}.png" for group in (1, 2)
                               for key, of in (("loss", "content_tokens"), ("bits_per_byte", "content_tokens"),
                                               ("bits_per_byte", "minutes"))} | {
        "training_3_exact_parity_step.png", "training_3_loss_step.png"}  # fmt: skip
    assert "Runs validated on different texts have separate axes" in text
    rows = cells_of(text.encode())
    ends = [row[:7] for row in rows if row and row[-1].startswith("[")]
    assert ("one", "7", "data/one", "20", "1.7500 bits per byte", "4.0000", "1,280") in ends
    assert ("four", "7", "data/x", "20", "parity 25.0 %", "4.0000", "1,280") in ends
    assert "seed 7; Abacus, 2 cores; training_1" in text and "train.py two" in page.numbers


def test_curves_are_labelled_by_arm_and_seeds_look_alike(tmp_path):
    model = {"n_embd": 32, "second_attention": "meta", "position": "rope"}
    runs = []
    for name, second, seed in (("a", "meta", 1), ("b", "meta", 2), ("c", "none", 1), ("d", "none", 1)):
        run = read_run(trained(tmp_path / name))
        run.facts["data"]["chunk_markers"] = 4 * (second == "meta")
        run.facts["config"] |= {"seed": seed, "model": {**model, "second_attention": second}}
        runs.append(run)
    looks = [(look["label"], look["color"]) for look in looks_of(runs).values()]
    meta, gpt2 = ARM_COLOURS["meta"], ARM_COLOURS["gpt2"]
    assert looks[:3] == [("meta + rope", meta), ("meta + rope", meta), ("gpt2 + rope, c", gpt2)]
    assert looks[3][0] == "gpt2 + rope, d" and looks[3][1] not in (meta, gpt2)


def test_the_final_evaluation_is_a_point_of_its_own(tmp_path):
    run = read_run(trained(tmp_path / "one"))
    for name, panel in panels_of([run]).items():
        draw(figure := Figure(), *panel)
        points = [(line.get_marker(), *line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        assert points == ([] if name.startswith("loss") else [("D", 1.75)])
        assert ("whole split" in named) == bool(points)


def test_the_text_about_curves_describes_only_what_is_drawn(tmp_path):
    short, long = (read_run(trained(tmp_path / f"{n}", n=n)) for n in (20, 40))
    for run, smoothed in ((short, False), (long, True)):
        text = curves(Page(""), [run])
        draw(figure := Figure(), *panels_of([run])["loss_content_tokens"])
        assert len(figure.axes[0].lines) == 1 + smoothed and ("pale line" in text) == smoothed
        assert "hollow diamond" in text
    short.final.clear()
    assert "hollow diamond" not in curves(Page(""), [short])


def test_the_first_table_warns_of_different_budgets(tmp_path):
    same, again, longer = (read_run(trained(tmp_path / name, n=n)) for name, n in (("a", 20), ("b", 20), ("c", 30)))
    said = "Training budgets differ"
    assert said not in rendered({}, [same, again])["report.html"].decode()
    text = rendered({}, [same, again, longer])["report.html"].decode()
    assert said in text and "<small>c, step 30</small>" in text
    other = read_run(trained(tmp_path / "d", n=30, content={"train": "c" * 64, "val": "d" * 64}))
    assert said not in rendered({}, [same, other])["report.html"].decode()  # they have no row to be compared with


def test_wall_time_continues_after_a_resume(tmp_path):
    run = read_run(trained(tmp_path / "one", restart=True))
    assert [run.seconds(step) for step in (0, 1, 10, 11, 20)] == [0, 2, 20, 22, 40]


def test_the_cost_section_has_median_speeds_and_summed_times(tmp_path):
    run = trained(tmp_path / "one", restart=True)
    (run / "best_00000020").mkdir()
    head = json.dumps({"__metadata__": {}, "a": {"shape": [1000, 30]}, "b": {"shape": [500]}}).encode()
    (run / "best_00000020/model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    text = costs(Page(""), [read_run(run)])
    (row,) = [row for row in cells_of(text.encode()) if row and row[0] == "one"]
    # after the last logged step come two evaluations: 40 + 2 x 3 s
    facts = ("0.03M", "2,000 content tokens", "50", "55", "0:00:46", "Abacus, 2 cores", "[1]")
    assert row[7:] == facts


# ----------------------------------------------------------------------------- Table 1


def test_lengths_are_shown_in_windows_and_table_1_stands_where_windows_are_extended():
    lines = [windowed("yarn 4x", "yarn 4x", n, 80, train_length=1024) for n in (1024, 2048)]
    lines += [windowed("yarn 4x", "yarn 4x", 2048, 60, "causal2 + rope", 461, train_length=1024)]
    old = line(task="list_recall")  # of a version that did not record the window
    rows = cells_of(rendered({"tasks": [*lines, old]})["report.html"])
    found = [row[:3] for row in rows if len(row) > 9 and row[-2].startswith("[") and "x" in row[1]]
    assert found == [("1024", "2x", "meta + rope, yarn 4x"), ("2048", "4x", "meta + rope, yarn 4x"),
                     ("2048", "4.44x", "causal2 + rope, yarn 4x")]  # fmt: skip
    assert ("8x", "4x", *map(str, TABLE_1[8, 4].values())) in rows
    assert "Table 1" not in rendered({"tasks": [old]})["report.html"].decode()


# ----------------------------------------------------------------------------- lengths, positions, origin and files


def test_documents_of_two_texts_have_separate_pictures():
    draws = [depth_line(draw=draw) | {"loss": 1.0 + draw} for draw in range(3)]
    other = depth_line(content_sha256="y")
    files = rendered({"perplexity": [*draws, other, stream(length=512)]})
    assert {name for name in files if name.startswith("depth")} == {"depth_1.png", "depth_2.png"}
    rows = cells_of(files["report.html"])
    found = [row[2:9] for row in rows if row[:2] == ("meta + rope", "small") and "." in row[4]]
    assert found == [
        ("128", "trained", "2.0000", "1.0000 .. 3.0000", f"{np.exp(2):.2f}", "0.7500", "3"),
        ("128", "trained", "1.5000", "–", f"{np.exp(1.5):.2f}", "0.7500", "1"),
        ("512", "trained", "1.5000", "–", f"{np.exp(1.5):.2f}", "0.7500", "1"),
    ]


def test_the_text_about_validation_describes_only_the_pictures_that_are_there():
    few = {"document_pieces": [2], "document_nats": [[1.0, 2.0]], "documents": 1, "pieces": 2}
    for lines, marks in (
        ([stream()], ()),
        ([depth_line(**few)], ("the picture shows",)),
        ([depth_line()], ("the picture shows", "Bands are")),
        ([depth_line(**few), depth_line(**few, length=64)], ("the picture shows", "lower half")),
        ([depth_line(), depth_line(length=64)], ("the picture shows", "lower half", "Bands are", "upper half")),
    ):
        section = rendered({"perplexity": lines})["report.html"].decode().partition('<h2 id="lengths">')[2]
        said = section.partition("<table>")[0]
        assert {mark for mark in ("the picture shows", "lower half", "Bands are", "upper half") if mark in said} == set(
            marks
        )
        assert ("<figure>" in said) == ("<details>" in said) == bool(marks)


def test_positions_have_a_picture_for_each_task():
    lines = [position_line(name, right, task=task) for task in ("parity", "copying")
             for name, right in (("full", 50), ("no_position", 44))]  # fmt: skip
    files = rendered({"positions": lines})
    assert {name for name in files if name.endswith(".png")} == {f"positions_{n}.png" for n in (1, 2)}
    rows = cells_of(files["report.html"])
    assert ("copying", "target", "128", "no position", "44.0", "0.0 .. 100.0", "-6.0", "-25.0 .. +12.5", "0.625",
            "undecided", "50.0", "100", "[1]") in rows  # fmt: skip
    figure = Figure()
    draw_positions(figure, lines[:2])
    shown = [mark.get_xdata()[0] for mark in figure.axes[0].lines if mark.get_marker() == "o"]
    assert shown == [50, 44]


def test_the_report_names_the_origin_of_runs_and_warns_if_they_differ():
    start = {"weights": f"weights of out/b/model.safetensors (sha256 {'ab' * 32})", "dataset": "data/x",
             "train_sha256": "c" * 64, "content_tokens": 1234567}  # fmt: skip
    told = origin({"origin": start})
    assert told == "weights of out/b/model.safetensors (sha256 abababab); 1,234,567 content tokens of data/x"
    assert origin({}) == "the line does not say"
    assert origin({"origin": {**start, "content_tokens": 0}}).endswith("no text")
    assert "uncounted" in origin({"origin": {**start, "content_tokens": None}})
    pair = [line(origin=start), line(arm="gpt2 + rope", origin=start)]
    said = "not all pretrained on the same text"
    assert told in words(runs_table(pair)) and said not in differences(pair)
    for other in ({"origin": {**start, "content_tokens": 5}}, {}):
        assert said in differences([pair[0], line(arm="gpt2 + rope", **other)])


def differences(lines: list[dict]) -> str:
    return tasks.differences(arms_of(lines), lines, 0.0, 0.05)


def test_only_pictures_of_an_earlier_report_are_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one")
    write(tmp_path / "p.jsonl", [position_line("full", 50)])
    main(["p.jsonl", "--output=page"])
    (tmp_path / "page/mine.png").write_text("mine")
    before = pictures_of(tmp_path / "page/report.html")
    assert before == {"positions_1.png"}
    main(["one", "--output=page"])
    assert re.findall(r'<h2 id="(\w+)"', Path("page/report.html").read_text()) == ["training", "commands"]
    left = {path.name for path in (tmp_path / "page").iterdir()}
    assert left & before == set() and {"mine.png", "training_1_loss_content_tokens.png"} <= left


def test_a_caption_names_n_seeds_and_machines():
    page, used = Page(""), [line(machine="Abacus"), line(seed=2)]
    assert "n = 100, seed 1, 2; Abacus; a.png" in page.picture("a.png", "what", b"", used)
    assert footer(used) == "n = 100, seed 1, 2"
