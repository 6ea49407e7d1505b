import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanometa.common.errors import UserError
from nanometa.reports.curves import picture
from nanometa.reports.training import draw, panels_of, reached, read_run, smooth
from tests.conftest import cli


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "out/some"
    folder.mkdir(parents=True)
    data = {"val_text_compressed": {"gzip_9_bits_per_byte": 2.0, "xz_bits_per_byte": 1.5}}
    (folder / "config.json").write_text(json.dumps({"data": data}))
    lines = [{"kind": "train", "step": i, "content_tokens": 100 * i, "loss": 5 / (i + 1)} for i in range(50)]
    lines += [{"kind": "val", "step": i, "content_tokens": 100 * i, "bits_per_byte": 3.0 - i / 50} for i in (0, 25, 49)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_report_curves_draws_the_newest_run(run_dir, tmp_path):
    result = cli("report.py", "curves", cwd=tmp_path)
    assert result.stdout.decode().strip() == "out/some/loss.png", result.stderr.decode()
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def task_run(folder, tasks):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {"dataset": "data/u"}}))
    lines = [{"kind": "train", "step": i, "content_tokens": 100 * i, "loss": 5 / (i + 1)} for i in range(50)]
    shares = {f"exact_{task}": 0.25 for task in tasks} | {f"tokens_{task}": 0.75 for task in tasks}
    ends = [("val", 0, 0.0), ("val", 49, 1.0), ("final", 49, 1.0)]
    lines += [{"kind": kind, "step": step, "content_tokens": 100 * step, "bits_per_byte": 1.0,
               **shares, f"exact_{tasks[0]}": share} for kind, step, share in ends]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(folders) -> dict:
    """The axes of all panels, by title and horizontal axis."""
    axes = []
    for panel in panels_of(list(map(read_run, folders))).values():
        draw(figure := Figure(), *panel)
        axes += figure.axes
    return {(of.get_title(), of.get_xlabel()): of for of in axes}


def test_runs_on_tasks_have_a_panel_per_task_over_steps(run_dir, tmp_path):
    four = task_run(tmp_path / "four", ("parity", "copying", "list_recall", "segment_counting"))
    one = task_run(tmp_path / "one", ("copying",))
    panels = drawn([four, one])
    titles = ["parity", "copying", "list recall", "segment counting", "training loss"]
    assert list(panels) == [(title, "steps") for title in titles]
    curves = {title: [(list(x), list(y)) for x, y in (line.get_data() for line in axes.lines)]
              for (title, _), axes in panels.items()}  # fmt: skip
    # a curve of the evaluations during training, and the point of the final one
    assert curves["parity"] == [([0, 49], [0.0, 1.0]), ([49], [1.0])] and curves["copying"] == [
        ([0, 49], [0.25, 0.25]),
        ([49], [0.25]),
        ([0, 49], [0.0, 1.0]),
        ([49], [1.0]),
    ]
    assert curves["training loss"][0][0] == list(range(50))
    bits = drawn([run_dir])["validation", "content tokens"]
    assert list(bits.lines[0].get_xdata()) == [0, 2500, 4900]
    # an unfinished run has no final point; the levels of the compressors are named in the legend
    assert [list(line.get_ydata()) for line in bits.lines[1:]] == [[2.0, 2.0], [1.5, 1.5]]
    assert [text.get_text() for text in bits.figure.legends[0].get_texts()] == ["some", "gzip -9", "xz"]
    with pytest.raises(UserError, match="some was trained on text and others on tasks"):
        picture([four, run_dir])


def test_figures_by_placement_are_no_tasks_and_the_lowest_is_named(tmp_path):
    folder = task_run(tmp_path / "placed", ("parity",))
    by_placement = {"exact_parity_target": 0.75, "exact_parity_background": 0.25}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | by_placement if line["kind"] != "train" else line for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert run.tasks == ["parity"] and set(drawn([folder])) == {("parity", "steps"), ("training loss", "steps")}
    assert reached(run) == "parity 100.0 %, lowest: parity with background 25.0 %"


def test_runs_without_metrics_are_refused(run_dir, tmp_path):
    (tmp_path / "out/other").mkdir()
    for name, sentence in (
        ("other", "no readable metrics"),
        ("some", "no evaluation yet"),
        ("nothing", "there is no folder out/nothing: give folders of runs, such as out/NAME."),
        ("sone", "there is no folder out/sone: did you mean 'out/some'?"),
    ):
        (run_dir / "metrics.jsonl").write_text("")
        # matplotlib may also print a line about its font cache
        result = cli("report.py", "curves", f"out/{name}", cwd=tmp_path)
        assert result.returncode == 2 and sentence in result.stderr.decode() and b"Traceback" not in result.stderr


def test_smoothing_keeps_a_straight_line_and_lowers_noise():
    line = np.linspace(3, 1, 200)
    assert np.abs(smooth(list(line)) - line)[10:-10].max() < 1e-9
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(list(noise)).std() < 0.15
