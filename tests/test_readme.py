"""The commands of README and docstrings are real: every one parses, and the notebook lines run."""

import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nanometa
from nanometa.config import PrepareConfig, SampleConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.eval import EVALS
from nanometa.probe import PROBES
from nanometa.training.checkpoint import load_run
from nanometa.training.run_log import environment
from tests.conftest import ROOT, TINY, cli

NAMED = {"eval.py": EVALS, "probe.py": PROBES}
CLASSES = {"train.py": TrainConfig, "prepare.py": PrepareConfig, "sample.py": SampleConfig}
PAGES = [ROOT / "README.md", ROOT / "LOG.md", *ROOT.glob("*.py"), *(ROOT / "config").glob("*.py")]


COMMAND = (
    r"^ *(?:.*\| )?(?:\.venv/bin/)?(?:python |torchrun --\S+ --\S+ )((?:train|prepare|sample|eval|probe)\.py\b.*)$"
)


def commands() -> list[tuple[str, str]]:
    """Indented lines that run one of the programs, with continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        found += [(page.name, match[1].removesuffix('"""')) for match in re.finditer(COMMAND, text, re.M)]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *argv = shlex.split(command, comments=True)
    settings = NAMED[program][argv.pop(0)][0] if program in NAMED else CLASSES[program]
    assert isinstance(load_config(settings, argv, config_file=program in ("train.py", "prepare.py")), settings)


def test_there_are_commands_to_test():
    pages = {page for page, _ in commands()}
    assert len(commands()) > 20 and {"README.md", "train.py", "sample.py", "prepare.py", "meta_gpt2.py"} <= pages


def test_the_notebook_lines_run(workdir):
    args = ("--dataset=data/u", "--block_size=64", "--run_name=notebook", "--max_steps=2")
    assert cli("train.py", *TINY, *args, cwd=workdir).returncode == 0
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names: dict = {}
    exec(code.replace("out/quickstart", str(workdir / "out/notebook")), names)
    assert isinstance(names["text"], str) and len(names["nats"]) == len(names["tokens"]) > 3
    assert names["run"].config == load_run(workdir / "out/notebook").config


def test_the_map_of_the_readme_is_complete():
    section = (ROOT / "README.md").read_text().split("## The files")[1]
    files, folders = re.findall(r"^    (\w+\.py) ", section, re.M), re.findall(r"^    (\w+)/ ", section, re.M)
    assert sorted(files) == sorted(path.name for path in ROOT.glob("*.py"))
    assert sorted(folders) == sorted({path.parent.name for path in ROOT.glob("*/*.py")} | {"records"})


def test_the_version_is_the_same_everywhere():
    version = nanometa.__version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert environment()["nanometa"] == version


def test_the_pins_lie_within_the_ranges():
    """constraints.txt has a pin for every dependency, within its range, and none that only a CUDA build brings."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    assert pins["torch"] == "2.13.0" and not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    assert "nanometa" not in pins


def test_every_guarantee_names_a_test_that_exists():
    section = (ROOT / "README.md").read_text().split("## What is guaranteed")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", section)
    assert len(named) >= 12 and len(re.findall(r"::", section)) == len(named)
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
    for sentence in re.split(r"\n- ", section)[1:]:
        assert re.search(r"`test_\w+\.py::test_\w+`", sentence), sentence


def test_the_readme_lists_every_second_attention():
    row = re.search(r"^\| `second_attention` \|([^|]*)\|", (ROOT / "README.md").read_text(), re.M)[1]
    assert re.findall(r"`(\w+)`", row) == list(SECOND_ATTENTIONS)
