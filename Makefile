# Everything runs in a virtual environment of its own; the first target that is made sets it up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= ../shared/data
DEVICE ?= cpu

.PHONY: demo test stress test-sanitize docs lint results results-architectures trust bench bench-scaling bench-compare bench-train performance wheel gpu
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python -m pudnet demo

# As many processes as cores, up to eight (or PYTEST_XDIST_AUTO_NUM_WORKERS); one thread each, since OpenMP's threads
# wait for each other by spinning.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

# Fuzzers, injected faults and load at full counts, some minutes; writes docs/stress.md.
stress: $(READY)
	PYTHONPATH=tests $(BIN)/python -m stress

# The extension built again with AddressSanitizer and UndefinedBehaviorSanitizer, under build/sanitize.
test-sanitize: $(READY)
	$(BIN)/python tests/sanitize.py

# The site, from docs/*.md and the docstrings, into build/site; needs no network.
docs: $(READY)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/site
	$(BIN)/python docs/check_links.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Less than half an hour; every row and more tasks, hours, with FULL=--full. Finished rows are kept and not run again.
results: $(READY)
	$(BIN)/python -m pudnet.evaluation --data $(DATA) $(FULL)

# Predicted parameters on unseen architectures, half an hour.
results-architectures: $(READY)
	$(BIN)/python -m pudnet.evaluation.architectures --images $(DATA)/fashion_mnist.npz

# Some minutes: the accuracy to expect beside the measured one, on many datasets; writes into docs/trust.md.
trust: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pudnet.evaluation.trust --data $(DATA)

# Ten minutes, one thread: every op and pass against its reference. AGAIN=-again runs it a second time, beside the first.
bench: $(READY)
	mkdir -p .benchmarks
	OMP_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PUDNET_BENCH_DEVICE=$(DEVICE) $(BIN)/python -m pytest -q \
		benchmarks/bench_ops.py benchmarks/bench_passes.py benchmarks/bench_stages.py \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name \
		--benchmark-json=.benchmarks/bench.json
	mv .benchmarks/bench.json $$(PUDNET_BENCH_DEVICE=$(DEVICE) $(BIN)/python benchmarks/timing.py bench $(AGAIN))
	$(BIN)/python benchmarks/report.py

# Twenty minutes: cost against sizes.
bench-scaling: $(READY)
	OMP_NUM_THREADS=1 PUDNET_BENCH_DEVICE=$(DEVICE) $(BIN)/python benchmarks/bench_scaling.py
	$(BIN)/python benchmarks/report.py

# Two commits or JSON files; ROWS is a pattern of pytest's -k. Exit status 1 where B is slower or wrong.
bench-compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(A) $(B) -k "$(ROWS)"

performance: $(READY)
	$(BIN)/python benchmarks/report.py

# Half an hour: how long training takes to be as accurate as a prediction. DEVICE=cuda for a GPU.
bench-train: $(READY)
	$(BIN)/python -m pudnet.evaluation.training_time --data $(DATA) --device $(DEVICE)
	mkdir -p .benchmarks
	PUDNET_BENCH_DATA=$(DATA) PUDNET_BENCH_DEVICE=$(DEVICE) $(BIN)/python -m pytest benchmarks/bench_training_time.py \
		--benchmark-json=.benchmarks/training-time.json
	$(BIN)/python benchmarks/report.py

# On a machine with an NVIDIA GPU and torch, triton and nvcc already there; nothing is downloaded.
gpu:
	$(PYTHON) benchmarks/gpu.py

wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# torch comes first and is then held fast: nothing that is installed later may replace it by another build. Triton is
# the version that belongs to it; the CPU build of torch does not ask for one.
$(READY): Makefile pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	printf 'torch==2.13.0\ntriton==3.7.1\n' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[all,docs,test]'
	touch $@
