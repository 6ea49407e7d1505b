"""Tests the picture of the loss by depth: which lines become which curves, and how the curves are drawn."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.reports.curves import main
from nanometa.reports.depth import draw, read
from nanometa.reports.drawing import ARM_COLOURS
from tests.conftest import cli, refusal
from tests.test_report import line as task_line

PIECES = [3, 1, 2, 2, 2]
TEXT = {"content_sha256": "x", "documents": 5, "pieces": 10, "tokens": 600, "bucket": 64}


def stream(arm="meta + rope", scaling="none", trained="none", **more) -> dict:
    """A line of eval.py perplexity about a stream of text."""
    facts = {
        name: of for name, of in task_line().items() if name not in ("task", "placement", "level", "question", "n")
    }
    told = {"eval": "perplexity", "loss": 1.5, "bits_per_byte": 0.75, "perplexity": 4.5, "dataset": "data/x",
            "stride": 64, "tokens": 600, "content_sha256": "x"}  # fmt: skip
    read = {"arm": arm, "scaling": scaling, "trained_scaling": trained, "original_content": 56, "run": "small",
            "weights_sha256": "ab" * 32, "step": 3, "length": 128, "markers": "trained", "draw": 0}  # fmt: skip
    return facts | told | read | more


def line(*reading, nats=(1.0, 2.0, 4.0, 3.0, 5.0), **more) -> dict:
    """Returns a line whose loss is nats[i] in document i, and twice that in the second bucket."""
    return stream(*reading, **{**TEXT, "document_pieces": PIECES, "document_nats": [[n, 2 * n] for n in nats], **more})


def read_with(arm, scaling, **more):
    return line(f"{arm}, read with {scaling}", scaling, **more)


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def drawn(tmp_path, lines):
    figure = Figure()
    curves, pieces, text = read([write(tmp_path / "lines.jsonl", lines)])
    draw(figure, curves, pieces, text)
    return figure


def curves_of(axes):
    return [mark for mark in axes.lines if mark.get_linestyle() != ":"]


def test_a_curve_averages_draws_and_pieces_and_uses_the_last_of_repeated_lines(tmp_path):
    lines = [line(nats=(9, 9, 9, 9, 9)), line(draw=1, nats=(3.0, 2.0, 2.0, 3.0, 3.0)), stream(), line()]
    (level,) = drawn(tmp_path, lines).axes  # a single curve, so there is no panel of differences
    (curve,) = curves_of(level)
    means = np.array([2.0, 2.0, 3.0, 3.0, 4.0])  # of the documents, averaged over draws
    assert curve.get_xdata().tolist() == [32, 96]
    assert curve.get_ydata() == pytest.approx((np.array([1, 2]) * (means @ PIECES) / 10).tolist())
    (band,) = level.collections
    ends = band.get_paths()[0].vertices[:, 1]
    low, high = clustered_ratio(means * PIECES, np.array(PIECES))
    assert {low, high, 2 * low, 2 * high} <= set(ends.tolist())


@pytest.mark.parametrize("documents", [1, 4])
def test_less_than_five_documents_have_no_band(tmp_path, documents):
    one = {"document_pieces": [2] * documents, "document_nats": [[1.0, 2.0]] * documents}
    for axes in drawn(tmp_path, [line(**one), line(length=64, **one)]).axes:
        assert not axes.collections and len(curves_of(axes)) == 2 and "95 %" not in axes.get_title()


def test_differences_are_paired_by_document(tmp_path):
    """Losses differ between documents, and the scaling adds 0.5 in each of them, so the interval has no width."""
    figure = drawn(tmp_path, [line(), read_with("meta + rope", "pi 4x", nats=(1.5, 2.5, 4.5, 3.5, 5.5))])
    level, below = figure.axes
    zero, cost = curves_of(below)
    assert zero.get_ydata().tolist() == [0, 0] and cost.get_ydata().tolist() == [0.5, 1.0]
    (band,) = below.collections
    assert set(band.get_paths()[0].vertices[:, 1].round(9).tolist()) == {0.5, 1.0}
    assert len(level.collections) == 1 and [curve.get_ydata()[0] for curve in curves_of(level)] == [2.9, 3.4]
    for axes in figure.axes:
        (mark,) = (mark for mark in axes.lines if mark.get_linestyle() == ":")
        assert mark.get_xdata() == [56, 56]


def test_curves_look_different_and_those_only_read_with_a_scaling_are_dashed(tmp_path):
    lines = [line("gpt2 + rope, yarn 4x", "yarn 4x", "yarn 4x"), read_with("gpt2 + rope", "yarn 8x"),
             read_with("gpt2 + rope", "yarn dynamic"), line(), read_with("meta + rope", "yarn 4x")]  # fmt: skip
    level, _ = drawn(tmp_path, lines).axes
    shown = curves_of(level)
    assert [mark.get_linestyle() for mark in shown] == ["-", "--", "--", "-", "--"]
    assert len({mark.get_color() for mark in shown}) == 5
    assert shown[3].get_color() == ARM_COLOURS["meta"]


def test_labels_name_the_facts_that_distinguish_curves(tmp_path):
    lines = [line(length=64), line(), line(markers="none"), read_with("meta + rope", "pi 2x"),
             read_with("meta + rope", "pi 2x", weights_sha256="cd" * 32, run="other")]  # fmt: skip
    figure = drawn(tmp_path, lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "meta + rope, windows of 64",
        "meta + rope, windows of 128, markers trained",
        "meta + rope, windows of 128, markers none",
        "meta + rope, read with pi 2x, small",
        "meta + rope, read with pi 2x, other",
        "training window, 56 content tokens",
    ]
    assert "600 tokens, 10 pieces of 5 documents" in figure.axes[-1].get_xlabel()


def test_report_curves_draws_the_loss_by_depth(tmp_path):
    folder = tmp_path / "out/small"
    folder.mkdir(parents=True)
    write(folder / "perplexity.jsonl", [line(), read_with("meta + rope", "ntk 4x")])
    result = cli("report.py", "curves", "out/small/perplexity.jsonl", cwd=tmp_path)
    assert result.stdout.decode().strip() == "out/small/depth.png", result.stderr.decode()
    assert (folder / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert "x.pdf does not end in .png, but the picture is a PNG: take a name that does." in refusal(
        cli("report.py", "curves", "out/small/perplexity.jsonl", "--output=x.pdf", cwd=tmp_path)
    )
    assert not (tmp_path / "x.pdf").exists()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([line(), line(draw=1, content_sha256="y")], "have lines about 2 texts or buckets"),
        ([line(), line(length=64, bucket=32)], "have lines about 2 texts or buckets"),
        (
            [stream()],
            "lines.jsonl have no line about documents: measure some with eval.py perplexity --documents.",
        ),
        ([], "have no line about documents"),
        (
            [{name: value for name, value in line().items() if name != "arm"}],
            "line 1 is no line of eval.py perplexity (arm is",
        ),
        ([line(document_pieces=[1])], "line 1 is no line of eval.py perplexity (document_nats is not a table"),
        ([line(), line(draw=1, document_nats=[[1.0]])], "line 2 is no line of eval.py perplexity ("),
        ([7], "line 1 is no line of eval.py perplexity (it is no object)"),
    ],
)
def test_lines_that_cannot_be_drawn_are_refused(tmp_path, lines, sentence):
    with pytest.raises(UserError) as error:
        main([str(write(tmp_path / "lines.jsonl", lines))])
    assert sentence in str(error.value) and "lines.jsonl" in str(error.value)
    assert not (tmp_path / "depth.png").exists()


def test_files_and_folders_cannot_be_mixed(tmp_path):
    with pytest.raises(
        UserError, match="lines.jsonl is a file of an evaluation, but others are folders of runs: draw them separately"
    ):
        main([str(tmp_path), str(write(tmp_path / "lines.jsonl", [line()]))])
    with pytest.raises(UserError, match="no.jsonl cannot be read .*No such file"):
        main([str(tmp_path / "no.jsonl")])
