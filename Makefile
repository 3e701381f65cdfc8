# Everything runs in .venv, which is made once from requirements.txt and remade when that file changes.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: setup demo demos test lint bench list

setup: .venv/ready

.venv/ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(RUN) run.py experiment=sail_dinov2

test: setup
	$(RUN) -m pytest

lint: setup
	.venv/bin/ruff check .

list: setup
	$(RUN) -m experiments.config.listing

bench: setup
	$(RUN) -m experiments.benchmarks $(ONLY)

# Do the demos learn? Each prints its table beside its baselines.
demos: setup
	$(RUN) run.py experiment=sail_dinov2
	$(RUN) run.py experiment=structure_dinov2
	$(RUN) run.py experiment=structure_agreement
	$(RUN) run.py experiment=freeze_align_dinov2
	$(RUN) run.py experiment=assess_encoders
	$(RUN) run.py experiment=all_in_one_tiny
	$(RUN) run.py experiment=hammer_dgm4
	$(RUN) run.py experiment=bev_fusion_small
	$(RUN) run.py experiment=avgn_small
