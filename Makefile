# Every target sets up what it needs in .venv and then runs. PYTHON names the interpreter to start from.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
BIN := $(VENV)/bin

.PHONY: train test test-slow test-learning pair bench gpu tune studies results lint docs wheel gcc11 arm64 clean

# The main job: HO-SFL, first-order split learning and a frozen client on real digits, three seeds, one table.
# The models are tiny: one thread is fastest.
train: $(VENV)/ready
	rm -rf $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/hosfl compare --out $(OUT)

# One process more than there are cores, since some tests wait; a file's tests in one of them: they share what they make
# once. OPTIONS goes to pytest, such as OPTIONS="--isa avx2": the kernels' instruction set.
PROCESSES = $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
test: $(VENV)/ready
	@.ci/broker
	$(BIN)/python -m pytest -m "not slow" -n $(PROCESSES) --dist loadfile $(OPTIONS)

test-slow: $(VENV)/ready
	@.ci/broker
	$(BIN)/python -m pytest -m slow $(OPTIONS)

# What training comes to, with the instruction sets of other processors, on one thread and two, from five seeds; and how
# far it is from its bounds.
test-learning: $(VENV)/ready
	for set in -uATEN_CPU_CAPABILITY ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default; do \
	  for threads in 1 2; do \
	    env $$set $(BIN)/python -m pytest -m "learning and not slow" --seeds 5 --threads $$threads $(OPTIONS) || exit 1; \
	  done; \
	done

# What depends on torch and Triton, with a pair of them in an environment of its own: make pair TORCH=2.14.1 TRITON=3.8.0.
# The pairs are in docs/versions.md. Where the index has wheels with CUDA only, PIP_EXTRA_INDEX_URL names another.
PAIR = .venv-pairs/torch-$(TORCH)-triton-$(TRITON)
PAIR_TESTS := spec ops update numpy register check gpu_interpreter gpu_choices gpu_compile
pair:
	@test "$(TORCH)" -a "$(TRITON)" || (echo "name both: make pair TORCH=2.14.1 TRITON=3.8.0"; exit 2)
	test -x $(PAIR)/bin/python || $(PYTHON) -m venv $(PAIR)
	$(PAIR)/bin/python -m pip install --quiet torch==$(TORCH) triton==$(TRITON) -e '.[torch]' pytest pytest-timeout hypothesis
	$(PAIR)/bin/python -m pytest $(PAIR_TESTS:%=tests/test_%.py) $(OPTIONS)

# Throughput and memory of the kernels against their roof and their peers; steps of the optimizers beside MeZO's.
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.optim

# Everything that a new GPU is needed for: bits, rows, tests, compute-sanitizer, shapes of tiles. A bare machine needs no
# make: see the file.
gpu: $(VENV)/ready
	$(BIN)/python benchmarks/gpu_session.py --no-install $(OPTIONS)

# The rates of hosfl/tasks/task.py, chosen on validation data: the same grid size for every method.
tune: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tune

# The studies of benchmarks/studies whose data and models are embedded: about three quarters of an hour on two cores. The
# others say in their files what they need. What is kept of a study is its table, its file and its curves.
STUDIES ?= digits digits-iid digits-inverted
studies: $(VENV)/ready
	for study in $(STUDIES); do \
	  OMP_NUM_THREADS=1 $(BIN)/hosfl study benchmarks/studies/$$study.yaml --out runs/$$study-study --jobs 2 && \
	  mkdir -p benchmarks/results/studies/$$study && \
	  cp runs/$$study-study/table.json runs/$$study-study/curves.png benchmarks/results/studies/$$study || exit 1; \
	done
	for rounds in 100 300 1000; do \
	  study=digits-inverted-$$rounds; \
	  OMP_NUM_THREADS=1 $(BIN)/hosfl study benchmarks/studies/$$study.yaml --out runs/$$study-study --jobs 2 && \
	  mkdir -p benchmarks/results/lengths/$$study && \
	  cp runs/$$study-study/table.json benchmarks/results/lengths/$$study || exit 1; \
	done
	OMP_NUM_THREADS=1 $(BIN)/hosfl study benchmarks/studies/digits-uses.yaml --out runs/digits-uses-study --jobs 2
	mkdir -p benchmarks/results/uses/digits-uses
	cp runs/digits-uses-study/table.json benchmarks/results/uses/digits-uses
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.per_weight

# Everything else that the README and the pages of results quote.
results: bench
	rm -rf benchmarks/results/digits
	OMP_NUM_THREADS=1 $(BIN)/hosfl compare --out benchmarks/results/digits
	rm -rf benchmarks/results/digits/*-*/
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ways_to_learn
	$(BIN)/python -m benchmarks.catchup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.liars
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.wire
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.edge
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rounds
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ray_clients
	$(BIN)/hosfl memory --out benchmarks/results/client-memory.json
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.curves
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.estimators
	$(BIN)/python -m benchmarks.readme

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site: tutorials are run, a warning is an error, and nothing is loaded over a network.
docs: $(VENV)/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -E -W --keep-going -n docs build/site

# sdist and wheel into dist/, and the wheel alone in an empty environment: the self-check, and a train of 20 rounds.
wheel:
	PYTHON="$(PYTHON)" .ci/wheel

# The extension by the oldest compiler that it is kept for; installs g++-11 where it is missing.
gcc11: $(VENV)/ready
	PYTHON=$(abspath $(BIN)/python) .ci/gcc11

# The extension and a client without torch on an emulated arm64 processor.
arm64: $(VENV)/ready
	PYTHON=$(abspath $(BIN)/python) .ci/arm64

$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	rm -rf $(VENV)/pictures # why in a folder of their own: tests/pictures.py
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/pictures torchvision timm
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs hosfl_kernels/*.so
