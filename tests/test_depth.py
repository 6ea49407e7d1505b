"""Tests the picture of the loss by depth: which lines become which curves, and how the curves are drawn."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.reports.curves import main
from nanometa.reports.depth import COLOUR, loss_by_depth, read
from tests.conftest import cli, refusal

PIECES, TEXT = [3, 1, 2], {"content_sha256": "x", "documents": 3, "pieces": 6, "tokens": 600, "bucket": 64}


def line(arm="meta + rope", scaling="none", trained="none", draw=0, nats=(1.0, 2.0, 4.0), **more):
    """Returns a line whose loss is nats[i] in document i, and twice that in the second bucket."""
    facts = {"arm": arm, "scaling": scaling, "trained_scaling": trained, "original_content": 56, "run": "small",
             "weights_sha256": "ab" * 32, "step": 3, "length": 128, "markers": "trained", "draw": draw}  # fmt: skip
    return {**facts, **TEXT, "document_pieces": PIECES, "document_nats": [[n, 2 * n] for n in nats], **more}


def read_with(arm, scaling, **more):
    return line(f"{arm}, read with {scaling}", scaling, **more)


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def drawn(tmp_path, lines):
    figure = Figure()
    curves, pieces, text = read([write(tmp_path / "lines.jsonl", lines)])
    loss_by_depth(figure, curves, pieces, text)
    return figure


def curves_of(axes):
    return [mark for mark in axes.lines if mark.get_linestyle() != ":"]


def test_a_curve_averages_draws_and_pieces_and_uses_the_last_of_repeated_lines(tmp_path):
    lines = [line(nats=(9, 9, 9)), line(draw=1, nats=(3.0, 2.0, 2.0)), {"eval": "perplexity", "loss": 1.0}, line()]
    (level,) = drawn(tmp_path, lines).axes  # a single curve, so there is no panel of differences
    (curve,) = curves_of(level)
    means = np.array([2.0, 2.0, 3.0])  # of the documents, averaged over draws
    assert curve.get_xdata().tolist() == [32, 96]
    assert curve.get_ydata() == pytest.approx((np.array([1, 2]) * (3 * 2 + 2 + 2 * 3) / 6).tolist())
    (band,) = level.collections
    ends = band.get_paths()[0].vertices[:, 1]
    low, high = clustered_ratio(means * PIECES, np.array(PIECES))
    assert {low, high, 2 * low, 2 * high} <= set(ends.tolist())


def test_a_single_document_has_no_interval(tmp_path):
    one = {"document_pieces": [2], "document_nats": [[1.0, 2.0]]}
    for axes in drawn(tmp_path, [line(**one), line(length=64, **one)]).axes:
        assert not axes.collections and len(curves_of(axes)) == 2


def test_differences_are_paired_by_document(tmp_path):
    """Losses differ between documents, and the scaling adds 0.5 in each of them, so the interval has no width."""
    figure = drawn(tmp_path, [line(), read_with("meta + rope", "pi 4x", nats=(1.5, 2.5, 4.5))])
    level, below = figure.axes
    zero, cost = curves_of(below)
    assert zero.get_ydata().tolist() == [0, 0] and cost.get_ydata().tolist() == [0.5, 1.0]
    (band,) = below.collections
    assert set(band.get_paths()[0].vertices[:, 1].round(9).tolist()) == {0.5, 1.0}
    assert len(level.collections) == 1 and [curve.get_ydata()[0] for curve in curves_of(level)] == [13 / 6, 16 / 6]
    for axes in figure.axes:
        (mark,) = (mark for mark in axes.lines if mark.get_linestyle() == ":")
        assert mark.get_xdata() == [56, 56]


def test_a_scaling_has_the_same_color_in_every_picture(tmp_path):
    lines = [line("gpt2 + rope, yarn 4x", "yarn 4x", "yarn 4x"), read_with("gpt2 + rope", "yarn 8x"),
             read_with("gpt2 + rope", "yarn dynamic"), line(), read_with("meta + rope", "yarn 4x")]  # fmt: skip
    level, _ = drawn(tmp_path, lines).axes
    looks = [(to_hex(c.get_color()).upper(), c.get_linestyle(), c.get_marker()) for c in curves_of(level)]
    yarn, dynamic, none = (COLOUR[name] for name in ("yarn", "yarn dynamic", "none"))
    assert looks == [(yarn, "-", "None"), (yarn, "--", "None"), (dynamic, "--", "None"), (none, "-", "None"),
                     (yarn, "--", "o")]  # fmt: skip
    assert len(set(looks)) == 5 and len(set(COLOUR.values())) == len(COLOUR) == 7


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
    assert "600 tokens, 6 pieces of 3 documents" in figure.axes[-1].get_xlabel()


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
            [{"eval": "perplexity", "loss": 1.0}],
            "lines.jsonl have no line about documents: measure some with eval.py perplexity --documents.",
        ),
        ([], "have no line about documents"),
        ([{name: value for name, value in line().items() if name != "arm"}], "cannot be read (KeyError: 'arm')"),
        ([line(scaling="warp 9x")], "of scaling 'warp 9x'"),
        ([line(document_pieces=[1])], "cannot be read (ValueError"),
        ([line(), line(draw=1, document_nats=[[1.0]])], "cannot be read (ValueError"),
        ([7], "cannot be read (TypeError"),
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
    with pytest.raises(UserError, match="cannot be read .FileNotFoundError"):
        main([str(tmp_path / "no.jsonl")])
