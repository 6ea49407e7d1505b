"""Tests report.py on lines of probe.py: sections show their figures, and lines that lack one are refused."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import nanometa.probe
from nanometa.common.errors import UserError
from nanometa.probe import PROBES
from nanometa.report import sections_of
from nanometa.reports import probe_pictures, rate_distortion, rate_pictures
from nanometa.reports.files import read
from nanometa.reports.probe_sections import SECTIONS
from nanometa.reports.table_sections import unlearned
from tests.test_report import line as task_line
from tests.test_report import write
from tests.test_report_sections import cells_of, rendered


def of(probe: str, **fields) -> dict:
    """Returns a line of a probe with the facts of a run."""
    one = task_line("1" * 50 + "0" * 50)
    measured = ("eval", "correct", "exact", "interval", "token_accuracy", "token_interval", "nats", "chance", "floors")
    facts = {name: value for name, value in one.items() if name not in (*measured, "outcomes")}
    return {**facts, "probe": probe, "mark": "meta-token", **fields}


def judged(claim: str, value: float, low: float, high: float, verdict: str) -> dict:
    return {claim: value, f"{claim}_interval": [low, high], f"{claim}_holm": 0.04, f"{claim}_verdict": verdict}


def attention(layer: int | None, head: int | None, boost: float, **other) -> dict:
    found = {
        **judged("boost", boost, boost - 0.5, boost + 0.5, "holds"), **judged("drop", 0.25, -0.125, 0.625, "undecided"),
        "on_marks": 0.5, "on_marks_zeroed": 0.375, "applies": 0.125, "predicted": -0.75,
    }  # fmt: skip
    return of("attention", **{"attention": "causal", "layer": layer, "head": head} | found | other)


def patching(site: str, layer: int, kept: float, **other) -> dict:
    shares = {"kept": kept, "kept_interval": [kept - 0.0625, kept + 0.03125], "kept_unpatched": 0.75,
              "donor": 0.25, "donor_interval": [0.125, 0.375], "donor_unpatched": 0.0, "n": 1000}  # fmt: skip
    claims = judged("needed", 0.75 - kept, -0.5, 0.5, "holds") | judged("carried", 0.25, 0.0, 0.5, "undecided")
    return of("patching", **{"site": site, "layer": layer} | shares | claims | other)


def residual(place: str, layer: int, distance: int, decoded: float, **other) -> dict:
    found = {"cosine_centred": 0.5, "cosine_centred_interval": [0.25, 0.75], "floor_centred": 0.375,
             "decoded": decoded, "decoded_interval": [0.125, 0.875], "majority": 0.0625,
             "shuffled": 0.03125, "n": 1000}  # fmt: skip
    more = judged("more", 0.125, -0.25, 0.375, "undecided") if place == "mark" else {}
    near = judged("nearer", 0.125, 0.0625, 0.1875, "holds")
    return of("residual", **{"place": place, "layer": layer, "distance": distance} | found | near | more | other)


def curve(state: str, distortions: tuple[float, ...], **other) -> dict:
    points = [
        {"rate": 2.0 * i, "distortion": d, "rate_interval": [2.0 * i - 0.5, 2.0 * i + 0.5],
         "distortion_interval": [d - 0.25, d + 0.25], "violates_converse": False}
        for i, d in enumerate(distortions, 1)
    ]  # fmt: skip
    known = {"uniform": 5.5, "cross_entropy": 5.375, "entropy": 5.25, "floor": 0.0, "violations": 0}
    ends = {"ceiling": {"distortion": 1.5}, "shuffled": {"distortion": 5.4}, "found": True}
    sizes = {"train_texts": 4000, "probe_seeds": 3}
    place = {"kind": "curve", "layer": 4, "target": "answer", "state": state}
    return of("rate_distortion", **place | {"points": points} | known | ends | sizes | other)


def paper_point(state: str, beta: float, **other) -> dict:
    found = {name: 4.0 for name in ("rate", "distortion", "train_rate", "train_distortion", "uniform")}
    ends = {f"{name}_interval": [3.5, 4.5] for name in ("rate", "distortion", "train_distortion", "train_rate")}
    than = {"difference": -0.25, "difference_interval": [-0.5, 0.0], "sd": 0.75, "below": 0.625, "minus_from": "meta"}
    sizes = {"repeats": 20, "train_texts": 50, "n": 100}
    return of(
        "paper_bottleneck", state=state, beta=beta, **found | ends | sizes | other | (than if state != "meta" else {})
    )


def comparison(first: str, second: str) -> dict:
    found = {"up_to": 4.5, "difference": -0.25, "difference_interval": [-0.5, -0.125], "holm": 0.02,
             "verdict": "holds up to R = 4.50"}  # fmt: skip
    return of("rate_distortion", kind="comparison", layer=4, target="answer", states=[first, second], entropy=5.25,
              probe_seeds=3, **found)  # fmt: skip


def ablation(condition: str, tokens: str, difference: float, **other) -> dict:
    found = {"kind": "difference", "text": "validation", "dataset": "data/x", "content_sha256": "a" * 64, "n": 64,
             "condition": condition, "tokens": tokens, "targets": 800, "nats_intact": 2.5, "nats": 2.5 + difference,
             "difference": difference, "difference_interval": [difference - 0.25, difference + 0.25]}  # fmt: skip
    return of("ablation", **found | other)


def lost_answers(condition: str, lost: float, **other) -> dict:
    shares = {"exact_intact": 0.75, "exact": 0.75 - lost, "interval": [0.25, 0.75], "outcomes": "01"}
    claim = judged("lost", lost, -0.125, 0.375, "undecided: n = 100, 1000 decide")
    return ablation(condition, "answers", 1.5, text="tasks", n=100, **shares | claim | other)


def norm(layer: int, value: float, **other) -> dict:
    found = {"kind": "norm", "layer": layer, "positions": 90, "norm": value,
             "norm_interval": [value - 0.125, value + 0.125]}  # fmt: skip
    one = {**ablation("off", "markers", 0.0), **found, **other}
    differences = ("condition", "targets", "nats_intact", "nats", "difference", "difference_interval")
    return {name: one[name] for name in one if name not in differences}


LINES = {
    "attention": [attention(0, 1, 2.5), attention(None, None, 1.5), attention(None, None, 1.0, placement="every")],
    "patching": [
        patching("mark", 0, 0.75),
        patching("answer", 1, 0.0),
        patching("mark", 0, 0.5, task="copying"),
        patching("mark", 1, 0.25, needed_verdict="the reverse holds"),
    ],
    "residual": [residual(place, 0, d, 0.5) for place in ("mark", "word") for d in (1, 8)]
    + [residual("mark", 1, 8, 0.75), residual("mark", 0, 1, 0.25, placement="every")],
    "rate_distortion": [curve("meta", (4.0, 2.0)), curve("question", (5.0,), layer=3), comparison("meta", "question")],
    "paper_bottleneck": [paper_point(state, beta) for state in ("meta", "last") for beta in (0.01, 1.0)],
    "ablation": [
        ablation("off", "ordinary", 0.5),
        ablation("diagonal", "ordinary", 0.25),
        ablation("off", "markers", 2.0),
        lost_answers("off", 0.125),
        norm(0, 0.5),
        norm(1, 0.25),
    ],
}
PICTURES = {
    "attention": {1},
    "patching": {1, 2},
    "residual": {1, 2},
    "rate_distortion": {1, 2},
    "paper_bottleneck": {1},
    "ablation": {1, 2, 3, 4},
}
ROWS = {
    "attention": ("causal", "0.1", "+2.50", "+2.00 .. +3.00", "0.040", "holds", "+0.25", "-0.12 .. +0.62", "0.040",
                  "undecided", "-0.75", "12.5", "50.0", "37.5", "100", "[1]"),
    "patching": ("the mark that ends the span", "75.0", "75.0 25.0", "0; the reverse: 1", "25.0 25.0", "none",
                 "1000", "[1]"),
    "residual": ("the mark", "8", "50.0 75.0", "6.2", "3.1", "none", "+0.12 +0.12", "0 1", "1000", "[1]"),
    "rate_distortion": ("4", "answer", "meta", "yes", "2.000", "1.750 .. 2.250", "4.000", "1.500", "5.400", "5.375",
                        "5.250", "5.500", "0", "4000", "3", "100", "[1]"),
    "paper_bottleneck": ("last", "0.01", "4.0", "4.000", "4.000", "4.000", "-0.250", "-0.500 .. +0.000", "0.750",
                         "62.5", "20", "100", "[1]"),
    "ablation": ("answers", "2.5000", "+1.5000", "+1.2500 .. +1.7500", "75.0", "+12.5", "-12.5 .. +37.5",
                 "0.040", "undecided", "100", "[1]"),
}  # fmt: skip


def test_every_probe_has_a_tested_section():
    assert set(SECTIONS) == set(PROBES)
    assert {*LINES, "positions"} == set(SECTIONS)  # test_report_sections.py tests the section of positions
    assert LINES.keys() == PICTURES.keys() == ROWS.keys()


@pytest.mark.parametrize("name", ["dreams", "attention"])
def test_probe_py_refuses_to_start_if_probes_and_sections_differ(monkeypatch, name):
    changed = {kind: SECTIONS.get(kind) for kind in SECTIONS.keys() ^ {name}}
    monkeypatch.setattr("nanometa.reports.probe_sections.SECTIONS", changed)
    with pytest.raises(ImportError, match=f"^{name}: a probe needs an entry in PROBES"):
        runpy.run_path(nanometa.probe.__file__)


@pytest.fixture(scope="module")
def page() -> dict[str, bytes]:
    return rendered(LINES)


@pytest.mark.parametrize("kind", LINES)
def test_a_section_has_its_pictures_and_figures(page, kind):
    assert {name for name in page if name.startswith(kind)} == {f"{kind}_{of}.png" for of in PICTURES[kind]}
    rows = [row[3:] for row in cells_of(page["report.html"])]
    assert ROWS[kind] in rows


def test_sections_are_in_order_and_quote_the_paper(page):
    text = page["report.html"].decode()
    assert re.findall(r'<h2 id="(\w+)"', text) == [*LINES, "commands"]
    for figure in ("a boost of 1.26 and a drop of 1.40 nats", "10.0 to 10.75 nats", "ln 50257 = 10.82"):
        assert figure in text


def test_a_run_that_has_not_learned_its_task_is_reported():
    lines = [patching("mark", 0, 0.75, answered={"better": better}, placement=name)
             for better, name in ((True, "target"), (False, "every"), (False, "every"))]  # fmt: skip
    assert unlearned(lines[:1] + LINES["patching"]) == ""
    assert unlearned(lines).count("every") == 1 and "target" not in unlearned(lines)


def test_the_means_over_heads_come_before_single_heads(page):
    rows = [row for row in cells_of(page["report.html"]) if len(row) > 4 and row[3] == "causal"]
    assert [row[4:6] for row in rows] == [("all", "+1.50"), ("all", "+1.00"), ("0.1", "+2.50")]


def test_comparisons_of_curves_have_their_own_table(page):
    rows = [row[3:] for row in cells_of(page["report.html"])]
    verdict = ("-0.250", "-0.500 .. -0.125", "0.020", "holds up to R = 4.50")
    assert ("4", "answer", "meta − question", "4.500", *verdict, "3", "100", "[1]") in rows


@pytest.mark.parametrize(
    ("one", "names"),
    [
        (LINES["attention"][0], ("boost", "drop_interval", "drop_verdict", "boost_holm", "layer", "head", "mark")),
        (LINES["patching"][0], ("kept", "donor_interval", "kept_unpatched", "donor_unpatched", "layer", "n")),
        (LINES["residual"][0], ("cosine_centred", "floor_centred", "majority", "shuffled", "distance", "decoded")),
        (LINES["rate_distortion"][0], ("points", "ceiling", "shuffled", "uniform", "floor", "found", "target")),
        (LINES["paper_bottleneck"][0], ("state", "beta", "rate", "distortion_interval", "repeats", "uniform")),
        (LINES["ablation"][0], ("condition", "tokens", "difference_interval", "nats_intact", "dataset", "nats")),
        (LINES["ablation"][3], ("task", "lost", "lost_interval", "lost_verdict", "exact_intact")),
        (LINES["ablation"][4], ("layer", "norm", "norm_interval", "positions")),
        (LINES["rate_distortion"][2], ("difference_interval", "states", "holm", "verdict", "up_to")),
    ],
)
def test_a_line_that_lacks_a_figure_is_refused_by_name(tmp_path, one, names):
    check = SECTIONS[one["probe"]].check
    check(one)
    for name in names:
        lacking = {key: value for key, value in one.items() if key != name}
        with pytest.raises(ValueError, match=f"^{name} is missing$"):
            check(lacking)
    path = write(tmp_path / "x.jsonl", [one, lacking])
    with pytest.raises(UserError, match=rf"x.jsonl, line 2 is no line of eval.py or probe.py \({name} is missing\)"):
        read((path,), sections_of(0.0, 0.05))


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (attention(0, 0, 1.0, attention="third"), "attention is 'third', but must be one of causal, second"),
        (attention(0, 0, 1.0, boost_interval=[1]), "boost_interval is '[1]'"),
        (patching("here", 0, 0.5), "site is 'here', but must be one of mark, "),
        (residual("here", 0, 1, 0.5), "place is 'here', but must be one of mark, "),
        (curve("here", (1.0,)), "state is 'here', but must be one of meta, "),
        (curve("meta", ()), "points is '[]'"),
        (curve("meta", (1.0,), points=[{"rate": 1.0}]), "distortion is missing"),
        (curve("meta", (1.0,), ceiling={}), "distortion is missing"),
        (curve("meta", (1.0,), kind="dream"), "kind is 'dream', but must be one of curve, comparison"),
        (ablation("dream", "ordinary", 0.5), "condition is 'dream', but must be one of off, diagonal, hidden_markers"),
        (ablation("off", "here", 0.5), "tokens is 'here', but must be one of ordinary, markers, answers"),
        (norm(0, 0.5, tokens="answers"), "tokens is 'answers', but must be one of ordinary, markers"),
        (comparison("meta", "last") | {"states": ["meta"]}, "states is \"['meta']\""),
    ],
)
def test_a_line_with_an_impossible_value_is_refused(damaged, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        SECTIONS[damaged["probe"]].check(damaged)


@pytest.mark.parametrize("kind", LINES)
def test_a_later_line_about_the_same_measurement_replaces_the_earlier(tmp_path, kind):
    again = json.loads(json.dumps(LINES[kind][0])) | {"machine": "Abacus"}
    found = read((write(tmp_path / "x.jsonl", [*LINES[kind], again]),), sections_of(0.0, 0.05))
    assert len(found.lines[kind]) == len(LINES[kind]) and found.repeated == 1
    assert found.lines[kind][0]["machine"] == "Abacus"


def drawn(axes) -> list[tuple[list, list]]:
    """Returns the points that are drawn with a marker."""
    return [(list(mark.get_xdata()), list(mark.get_ydata())) for mark in axes.lines if mark.get_marker() in "osDv^PX|"]


def test_the_pictures_of_probes_show_the_figures():
    figure = Figure()
    probe_pictures.draw_attention(figure, LINES["attention"])
    boost, drop = figure.axes
    assert [y for _, y in drawn(boost)] == [[2.5]] and [y for _, y in drawn(drop)] == [[0.25]]
    means = {mark.get_ydata()[0] for mark in boost.lines if mark.get_linestyle() == "-" and len(mark.get_xdata()) == 2}
    assert means == {1.0, 1.5}
    assert [mark.get_ydata()[0] for mark in drop.lines if mark.get_marker() == "_"] == [-0.75]
    assert {line.get_ydata()[0] for line in boost.lines if line.get_linestyle() == ":"} == {1.26}
    assert {line.get_ydata()[0] for line in drop.lines if line.get_linestyle() == ":"} == {1.40}
    figure = Figure()
    probe_pictures.draw_patching(figure, LINES["patching"][:2])
    assert [y for axes in figure.axes for _, y in drawn(axes)] == [[75], [0], [25], [25]]
    figure = Figure()
    probe_pictures.draw_residual(figure, LINES["residual"][:4])
    assert [[y for _, y in drawn(axes)] for axes in figure.axes] == 2 * [[[0.5], [0.5]], [[50], [50]]]
    figure = Figure()
    rate_pictures.draw_rates(figure, LINES["rate_distortion"][:1])
    assert drawn(figure.axes[0]) == [([2, 4], [4, 2])]
    assert rate_distortion.best(LINES["rate_distortion"][0])["rate"] == 4


def test_means_without_heads_or_predictions_can_be_drawn():
    """Some second attentions have only lines about the mean of all heads, and some lines have no predicted drop."""
    lines = [attention(None, None, 1.0, attention="second")]
    probe_pictures.draw_attention(figure := Figure(), lines)
    assert drawn(figure.axes[0]) == drawn(figure.axes[1]) == []


def test_report_reads_a_folder_like_its_files_and_without_torch(tmp_path):
    for kind, lines in LINES.items():
        write(tmp_path / f"{kind}.jsonl", lines)
    files = [str(tmp_path / f"{kind}.jsonl") for kind in LINES]
    found = read((str(tmp_path),), sections_of(0.0, 0.05))
    assert found.lines == read(tuple(files), sections_of(0.0, 0.05)).lines == LINES
    code, root = "import sys; import nanometa.report; print('torch' in sys.modules)", Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
