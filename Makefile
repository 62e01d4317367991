# make demo   set everything up and run the demonstration on real data
# make test   the tests            make check  lint, types, floors and the tests
# make test-deploy  real processes between sites (minutes)    make soak  20 of them killed at random
# make bench  speed and memory     make bench-network  messages between sites     make figures  the documentation's figures
# make study DATA=folder   methods compared with searched rates (hours; goes on where it was)
# make replay TREC=folder  aggregation on recorded uploads (half an hour)     make results  docs/results.md, docs/performance.md from their files
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
RUN := $(VENV)/.run-installed
DEV := $(VENV)/.dev-installed
# Tests run in so many processes of one thread each
PROCESSES ?= 2
# Options for the demonstration's runs, e.g. DEMO_FLAGS="--rounds 2"
DEMO_FLAGS ?=
DEMO_OUT ?= runs/demo
# A folder with sst2/ and gsm8k/ for the benchmark; VADER's movie reviews and HumanEval's problems without it
DATA ?=

.PHONY: demo test test-deploy soak check lint bench bench-network figures replay study results clean

demo: $(RUN)
	$(BIN)/fedrot data fetch minilm vader
	rm -rf $(DEMO_OUT)
	$(BIN)/fedrot run vader --out $(DEMO_OUT)/fedit --method.name fedit $(DEMO_FLAGS)
	$(BIN)/fedrot run vader --out $(DEMO_OUT)/fedrot $(DEMO_FLAGS)
	@echo "both side by side:"
	@$(BIN)/fedrot report $(DEMO_OUT)/fedit $(DEMO_OUT)/fedrot --out $(DEMO_OUT)

test: $(DEV)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-deploy: $(DEV)
	FEDROT_DEPLOY=1 $(BIN)/python -m pytest tests/deploy

soak: $(DEV)
	FEDROT_DEPLOY=1 FEDROT_KILLS=20 $(BIN)/python -m pytest -s tests/deploy -k random_kills

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench: $(DEV)
	$(BIN)/fedrot data fetch minilm vader smollm2 humaneval
	$(BIN)/python benchmarks/run.py $(if $(DATA),--data $(DATA))

bench-network: $(DEV)
	$(BIN)/fedrot data fetch minilm vader
	$(BIN)/python benchmarks/network.py

figures: $(DEV)
	$(BIN)/python benchmarks/frames.py

replay: $(DEV)
	$(BIN)/fedrot data fetch minilm vader
	$(BIN)/python benchmarks/replay.py $(if $(TREC),--trec $(TREC))

study: $(DEV)
	$(BIN)/fedrot data fetch minilm
	$(BIN)/python benchmarks/study.py --data $(DATA)

results: $(DEV)
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/performance.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUN): $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[run]'
	touch $@

$(DEV): $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(RUN)

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
