# Everything runs in .venv, which is made once from requirements.txt and remade when that file changes.
PYTHON ?= python3
RUN = .venv/bin/python
# Processes that run tests; each takes one core and up to 4 GB.
WORKERS ?= 2

.PHONY: setup demo demos test test-fast lint format typecheck docs bench list soak

setup: .venv/ready

.venv/ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(RUN) run.py experiment=sail_dinov2

# Do the demos learn? Each prints its table beside its baselines.
demos: setup
	for recipe in conf/experiment/*.yaml; do $(RUN) run.py experiment=$$(basename $$recipe .yaml) || exit 1; done

test: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not ddp"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

typecheck: setup
	.venv/bin/mypy

docs: setup
	$(RUN) -m experiments.config.reference

list: setup
	$(RUN) -m experiments.config.listing

bench: setup
	$(RUN) -m experiments.benchmarks $(ONLY)

# Random kills and damaged checkpoints for 15 minutes: does every job end as an undisturbed one?
soak: setup
	$(RUN) -m tests.soak minutes=15
