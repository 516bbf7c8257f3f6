# meshwright: `make demo` shows the main job on real input, `make test` and `make lint` are what CI runs.
# Everything is installed into .venv from constraints/dev.txt; nothing but python3 (3.11 or newer) and pip is needed
# (and node for pyright, in `make lint`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_VERSION := 26.3
# One thread per process: the tests fork ranks, and two workers share the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2

.PHONY: hang-at-scale dryrun-check faults fuzz test-serving closing-the-loop doctor-check accuracy golden two-machines calibrate-catalogue parity bench-runtime help setup demo test lint format clean bench-planner

help:
	@sed -n 's/^## //p' Makefile

## make setup            the pinned environment in .venv (rebuilt when pyproject.toml or constraints change)
setup: $(STAMP)

$(STAMP): pyproject.toml constraints/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("meshwright needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	$(BIN)/python -m pip install -qq --constraint constraints/dev.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints/dev.txt --editable '.[runtime]' --group dev
	touch $(STAMP)

## make demo             plan, layout, estimate and scaling of Llama-3.1-70B on 64 H100; a small Llama trained on 8 ranks
demo: $(STAMP)
	@$(BIN)/python tools/demo.py

## make two-machines     torchrun trains one job on two network namespaces (Linux, root; skipped elsewhere)
two-machines: $(STAMP)
	@$(BIN)/python tools/two_machines.py --rate 200mbit

## make survival         a run killed 20 times with SIGKILL ends as an unbroken one does, also on changing layouts
.PHONY: survival
survival: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.survival

## make test             the whole test suite
test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

## make bench-planner    configurations per second, search times and memory on one core, llm-analysis beside it
bench-planner: $(STAMP)
	$(TEST_ENV) $(BIN)/python benchmarks/bench_planner.py

## make lint             ruff, pyright (strict where there is no torch), import-linter with the table of docs/design.md
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

## make format           mend what ruff can mend
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## make calibrate-catalogue   fit the constants to published rows (ROWS=, SERVING_ROWS=path), cross-validate, write all
ROWS ?= ../shared/measurements/train.jsonl
SERVING_ROWS ?= ../shared/measurements/serve.jsonl
calibrate-catalogue: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.calibrate $(ROWS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.calibrate_serving $(SERVING_ROWS)

## make accuracy         docs/accuracy.md from published measurements, other tools beside (MEASUREMENTS=folder)
MEASUREMENTS ?= ../shared/measurements
accuracy: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.accuracy $(MEASUREMENTS)

## make golden           what the cost model says of 40 configurations, to be seen in review when it changes
golden: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.golden

## make parity           every layout of the runtime against one process of plain transformers, in float64 (about 20 min)
parity: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest tests/runtime/test_parity.py -m slow -n 1 -q

## make dryrun-check     dry runs of seven layouts against live runs and the cost model, composed stages (slow)
dryrun-check: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest tests/dryrun -m "slow or not slow" -n 1 -q

## make dryrun-big       dry runs of plans for 128 to 16,384 GPUs: seconds and memory of each, and where they go (3 min)
.PHONY: dryrun-big
dryrun-big: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.dryrun_big

## make dryrun-memory    the model's memory of the runtime beside the dry run's, by kind, over 30 layouts (about 5 min)
.PHONY: dryrun-memory
dryrun-memory: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.dryrun_memory

## make bench-runtime    seconds per step of thirteen layouts beside plain transformers, DeepSpeed, tp_plan (ARGS="--no-peers")
bench-runtime: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m benchmarks.runtime $(ARGS)

## make bench-serving    output tokens/s of generate and of vLLM's CPU build at four layouts beside plain transformers
.PHONY: bench-serving
bench-serving: $(STAMP)
	$(TEST_ENV) PYTHONPATH=. $(BIN)/python benchmarks/bench_serving.py

## make doctor-check     runs with one planted fault each: what doctor efficiency ranks first (about 3 min)
doctor-check: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.doctor_check

## make closing-the-loop this machine calibrated once, 12 layouts predicted and trained: error, ranking, regret (3 min)
closing-the-loop: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.closing_the_loop

## make test-serving     vLLM's CPU build in an environment of its own: tp2, pp2, tp2 x pp2, dp2 against transformers (Linux)
test-serving: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.test_serving

## make hang-at-scale    verdicts on the logs of 4,096 simulated ranks, one planted culprit each, 200 times (about 12 min)
hang-at-scale: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.hang_simulation

## make faults           faults planted in 60 training jobs of 8 ranks: does doctor hang blame the right rank (15 min)
faults: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.faults --runs 60

## make elastic          a job of two torchrun agents loses one and goes on with the ranks left, on another layout (2 min)
.PHONY: elastic
elastic: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.elastic

## make oom-cures        five plans that do not fit: the first cure's plan fits by the dry run (about 10 min)
.PHONY: oom-cures
oom-cures: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.oom_cures

## make fuzz             10,000 hostile run folders, flight logs, dumps, plan and cluster files
fuzz: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tools.fuzz --cases 10000

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
