# All targets run in .venv, which `make install` creates. Only Python 3.11 or newer must be installed before.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install quickstart test test-slow golden faults fuzz mutate lint bench gpu study clean

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: name a newer one, make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo 'Installing nanoMeta and the releases that its tests passed with into $(VENV). This takes two to four minutes, or'
	@echo 'longer where PyTorch is downloaded with CUDA (about 3 GB). pip names each package; its last step, "Installing'
	@echo 'collected packages", is silent for about a minute.'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Prepares a dataset, trains a small model on it, draws the loss curve and writes a sample.
quickstart: install data/stdlib_uniform/manifest.json out/quickstart/loss.png
	$(RUN) sample.py --run=out/quickstart --prompt='def main' --max_new_tokens=200
	@echo; echo "loss curve: out/quickstart/loss.png    more text: $(RUN) sample.py --run=out/quickstart"
data/stdlib_uniform/manifest.json:
	$(RUN) prepare.py
out/quickstart/loss.png:
	$(RUN) train.py config/tiny_meta.py --run_name=quickstart --init_from=auto
	$(RUN) report.py curves out/quickstart

test: install lint
	PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -q -n 4 --dist worksteal -m 'not slow'
test-slow: install
	$(RUN) -m pytest -q -m slow

# Compares the results of HEAD with those of the commit OLD, bit for bit. This takes about two minutes.
OLD ?= 8fa93a5
golden: install
	$(RUN) -m tests.compare_commits $(OLD)

# Interrupts runs by hundreds of kills, signals, full disks and damaged files. Each resume after that must be exact.
faults: install
	$(RUN) -m tests.faults

# Tries thousands of damaged files, settings and prompts. Each must be refused in one sentence, or work.
fuzz: install
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz

# Changes single expressions of the core files in a copy, and prints the changes that no test notices.
mutate: install
	nice $(RUN) -m tests.mutate

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: install
	$(RUN) bench.py

# Measures and tests everything on a CUDA GPU, within DEADLINE seconds. A second call repeats what has not passed.
DEADLINE ?= 300
gpu: install
	$(RUN) -m nanometa.benches.gpu --deadline=$(DEADLINE) $(if $(NANOGPT),--nanogpt=$(NANOGPT))

# Runs the study of docs/study.md, about 7 hours on 2 cores, and continues after any interruption. SIZE=minutes tests
# its machinery with runs of 20 steps. The report is made from the runs that are finished.
WORKERS ?= 2
study: install
	nice $(RUN) study.py run studies/meta_tokens.toml --workers=$(WORKERS) $(if $(SIZE),--size=$(SIZE))
	$(RUN) study.py report studies/meta_tokens.toml $(if $(SIZE),--size=$(SIZE))

clean:
	rm -rf $(VENV) out/quickstart data/stdlib_uniform
