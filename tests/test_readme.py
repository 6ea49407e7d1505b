"""Tests that README, docs and docstrings are true: commands parse, the notebook runs, links and tables are complete."""

import argparse
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nanometa
from nanometa import bench, report
from nanometa.config import PrepareConfig, SampleConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.checks import flat_fields
from nanometa.config.command_line import load_config
from nanometa.config.tasks import TASKS
from nanometa.eval import EVALS
from nanometa.interop.export import ExportConfig
from nanometa.probe import PROBES
from nanometa.probes import masks
from nanometa.reports import curves
from nanometa.tasks import example
from nanometa.training import messages
from nanometa.training.checkpoint import load_run
from nanometa.training.run_log import environment
from tests.conftest import ROOT, TINY, cli

NAMED = {"eval.py": EVALS, "probe.py": PROBES}
CLASSES = {"train.py": TrainConfig, "prepare.py": PrepareConfig, "sample.py": SampleConfig, "export.py": ExportConfig}
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "LOG.md", *ROOT.glob("*.py"), *(ROOT / "config").glob("*.py")]

PROGRAM = r"(?:train|prepare|sample|eval|probe|report|bench|export)\.py\b|-m nanometa\.tasks\.\w+"
START = rf"(?:\.venv/bin/)?(?:python |torchrun (?:--\S+ )+)(?=(?:{PROGRAM}))"
COMMAND = rf"^ *(?:.*\| )?{START}(.*)$"
INLINE = rf"`{START}([^`]*)`"
LOOP = rf"^ *for (\w+) in ([^;]*); do {START}(.*); done$"


def commands() -> list[tuple[str, str]]:
    """Returns the pages and lines that run one of the programs, with continued lines joined and loops unrolled.

    In README and docs this includes code within a sentence.
    """
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        lines = [match[1].removesuffix('"""') for match in re.finditer(COMMAND, text, re.M)]
        for name, values, line in re.findall(LOOP, text, re.M):
            lines += [re.sub(rf"\$(?:{name}\b|{{{name}}})", value, line) for value in values.split()]
        if page in GUIDES:
            # a word in capitals, such as NANOGPT, stands for a value
            lines += [line for line in re.findall(INLINE, text) if not re.search(r"\b[A-Z]{4,}\b", line)]
        found += [(page.name, line) for line in lines if "..." not in line]
    return found


class Parsed(Exception):
    """Raised instead of running a program once its arguments are parsed."""


def parse_with_argparse(run, argv: list[str], monkeypatch) -> None:
    """Fails unless argparse accepts argv. The program does not run."""
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, argv=None, namespace=None):
        parse(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    with pytest.raises(Parsed):
        run(argv)


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *argv = shlex.split(command, comments=True)
    if argv == ["--help"]:
        return
    if program == "-m":
        module, *argv = argv
        imported = importlib.import_module(module)
        if module.removeprefix("nanometa.tasks.") not in TASKS:
            return parse_with_argparse(imported.main, argv, monkeypatch)
        return parse_with_argparse(lambda argv: example._show(module, argv), argv, monkeypatch)
    if program == "bench.py":
        return parse_with_argparse(bench.main, argv, monkeypatch)
    if program == "report.py" and argv[0] == "curves":
        return parse_with_argparse(curves.main, argv[1:], monkeypatch)
    settings = NAMED[program][argv.pop(0)][0] if program in NAMED else {**CLASSES, "report.py": report.Report}[program]
    assert isinstance(load_config(settings, argv, config_file=program in ("train.py", "prepare.py")), settings)


def test_commands_are_found_on_all_kinds_of_pages():
    pages = {page for page, _ in commands()}
    assert len(commands()) > 130
    assert {"README.md", "train.py", "sample.py", "prepare.py", "meta_gpt2.py", "data.md", "reproduce.md"} <= pages


def test_the_readme_quotes_lines_as_train_py_prints_them():
    quoted = re.findall(r"^    (step .*)\.\.\.$", (ROOT / "README.md").read_text(), re.M)
    assert len(quoted) == 3
    for line in quoted:
        step, scope = re.match(r"step +([\d,]+)  validation on ([^:]*): ", line).groups()
        numbers = re.findall(r"[\d.]*\d", line.split(": ", 1)[1].replace("gzip -9", "gzip"))
        rate, gzip, xz, loss, ends = map(float, [*numbers, 0][:5])
        figures = {"bits_per_byte": rate, "loss": loss, "endoftext_loss": ends, "tokens": 0}
        packed = {"gzip_9_bits_per_byte": gzip, "xz_bits_per_byte": xz}
        printed = messages.evaluation_line(int(step.replace(",", "")), figures, (), packed, scope, 0.0, best=False)
        assert printed.startswith(line.rstrip()), (printed, line)


def test_the_six_commands_train_the_six_arms_of_the_table():
    section = (ROOT / "README.md").read_text().split("in six commands\n")[1].split("\n[docs/")[0]
    assert len(re.findall(r"^    \S", section, re.M)) == 6
    trained = {line for page, line in commands() if page == "README.md" and "--run_name=books_" in line}
    arms = {re.search(r"config/tiny_(\w+)\.py", line)[1] for line in trained}
    table = (ROOT / "README.md").read_text().split("## The arms")[1].split("\n## ")[0]
    assert arms == set(re.findall(r"^\|.*`config/tiny_(\w+)\.py`", table, re.M)) and len(arms) == 6
    assert arms == set(re.findall(r"out/books_(\w+)", section)) - {"report"}


def test_the_page_of_the_arms_lists_the_configs_of_every_arm():
    """Configs with settings of markers are on the page of sentinels."""
    arms, sentinels = ((ROOT / f"docs/{name}.md").read_text() for name in ("arms", "sentinels"))
    paths = [path for pattern in ("tiny_*.py", "*gpt2.py") for path in (ROOT / "config").glob(pattern)]
    others = {"tiny_tasks.py", "tiny_extend_4x.py", "tiny_extend_8x.py"}
    names = {path.name for path in paths} - others
    marked = {f"{name}.py" for name in masks.configs()}
    assert set(re.findall(r"`config/(tiny_\w+\.py|\w*gpt2\.py)`", arms)) == names - marked
    assert {f"{name}.py" for name in re.findall(r"^\| `(tiny_\w+)` \|", sentinels, re.M)} == marked


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_target_of_make_exists(page):
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    assert set(re.findall(r"(?:^ *|`)make ([a-z-]+)", page.read_text(), re.M)) <= targets


def test_the_notebook_runs(workdir):
    args = ("--dataset=data/u", "--block_size=64", "--run_name=notebook", "--max_steps=2")
    assert cli("train.py", *TINY, *args, cwd=workdir).returncode == 0
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/notebook.md").read_text(), re.M | re.S)
    assert len(blocks) >= 7
    names: dict = {}
    for block in blocks:
        exec(block.replace("out/quickstart", str(workdir / "out/notebook")), names)
    run = names["run"]
    assert run.config == load_run(workdir / "out/notebook").config
    assert isinstance(names["text"], str) and len(names["nats"]) == len(names["tokens"]) > 3
    assert all(len(sample) > 20 for sample in names["samples"])
    assert len(names["by_layer"]) == run.config.model.n_layer + 1 and len(names["at_markers"][0])
    assert {which for _, which in names["maps"]} == {"causal", "second"}
    assert all(bool((of.sum(-1) - 1).abs().max() < 1e-4) for of in names["maps"].values())
    assert float(names["probabilities"].sum()) == pytest.approx(1, abs=1e-4)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_internal_links_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        file = page.parent / target if target else page
        assert file.is_file(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}, which is no heading"


def test_every_page_is_linked_and_the_readme_is_short():
    readme, index = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs/index.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or (f"(docs/{page.name})" in readme and f"({page.name})" in index), page
    assert len(readme.splitlines()) <= 200


def test_every_record_is_named_among_the_results():
    section = (ROOT / "README.md").read_text().split("## Results so far")[1].split("\n## ")[0]
    assert set(re.findall(r"records/([^/]+)/README", section)) == {path.name for path in (ROOT / "records").iterdir()}


def test_the_readme_lists_all_files_and_folders():
    section = (ROOT / "README.md").read_text().split("## The files")[1].split("\n## ")[0]
    files, folders = re.findall(r"^    (\w+\.py) ", section, re.M), re.findall(r"^    (\w+)/ ", section, re.M)
    assert sorted(files) == sorted(path.name for path in ROOT.glob("*.py"))
    assert sorted(folders) == sorted({path.parent.name for path in ROOT.glob("*/*.py")} | {"docs", "records"})


def test_the_version_is_the_same_everywhere():
    version = nanometa.__version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert environment()["nanometa"] == version


def pins() -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return {canonicalize_name(name): version for name, version in found}


def test_the_pins_lie_within_the_ranges():
    """constraints.txt has a pin within the range of every dependency, and none that only a CUDA build needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["docs"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), text
    assert pins()["torch"] == "2.13.0"
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]
    assert "nanometa" not in pins()


def test_the_pre_commit_hooks_use_the_pinned_linter():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {pins()["ruff"]}


def test_the_github_workflow_runs_ci_run():
    assert "bash .ci/run" in (ROOT / ".github/workflows/test.yml").read_text() and (ROOT / ".ci/run").is_file()


def test_every_guarantee_names_a_test_that_exists():
    text = (ROOT / "docs/guarantees.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) >= 30 and len(re.findall(r"::", text)) == len(named)
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
    for sentence in re.split(r"\n- ", text)[1:]:
        assert re.search(r"`test_\w+\.py::test_\w+`", sentence), sentence


SETTINGS = (ROOT / "docs/settings.md").read_text()


def test_the_docs_list_every_second_attention():
    row = re.search(r"^\| `second_attention` \|([^|]*)\|", SETTINGS, re.M)[1]
    assert re.findall(r"`(\w+)`", row) == list(SECOND_ATTENTIONS)


def test_every_setting_of_the_docs_exists():
    parts = SETTINGS.split("\n## Data")
    for text, cls in ((parts[0], TrainConfig), (parts[1], PrepareConfig)):
        cells = re.findall(r"^\| (`[^|]*) \|", text, re.M)
        names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        assert len(names) >= 8 and names <= set(flat_fields(cls)), names - set(flat_fields(cls))
