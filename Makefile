# Two commands for a new machine: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU wheel of torch where pip offers one; the constraints pin what CI tests.
CONSTRAINTS := requirements/ci.txt

.PHONY: help quickstart test lint kernels-check faults net results clean

help:
	@echo "make quickstart     install, train bf16, nvidia and quartet2 on a CPU, compare (no download)"
	@echo "make test           install what the tests need and run them (what CI runs)"
	@echo "make lint           ruff format --check and ruff check"
	@echo "make kernels-check  compile the CUDA kernels with nvcc and check them on the host (minutes; needs nvcc)"
	@echo "make net BASE=REV   compare every result with that of commit REV, bit for bit (minutes)"
	@echo "make results        draw every figure and fill every table again from the raw runs in results/"
	@echo "make faults         kills, full disks, damaged checkpoints, with counts (minutes)"

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$*]"
	touch $@

$(VENV)/.installed-base: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

# Three seeds of three recipes, two runs at a time with one thread each: at this size a second OpenMP thread costs more
# than it brings. quartet2, which takes as long as the other two, shows its progress.
QUICK := OMP_NUM_THREADS=1 $(BIN)/python train.py -m experiment=quickstart paths.runs=runs/quickstart seed=0,1,2
quickstart: $(VENV)/.installed-base
	mkdir -p runs/quickstart
	$(BIN)/python scripts/prepare_data.py experiment=quickstart
	$(QUICK) quant=bf16,nvidia >runs/quickstart/others.log 2>&1 & others=$$!; \
		$(QUICK) quant=quartet2 || { kill $$others; exit 1; }; \
		wait $$others || { cat runs/quickstart/others.log; exit 1; }
	$(BIN)/python scripts/compare.py 'runs/quickstart/llama_micro-*' --baseline bf16 --out runs/quickstart/compare
	@echo
	@echo "Open runs/quickstart/compare/compare.html. These are a few minutes of a tiny model: that the curves fall and how"
	@echo "far seeds scatter is real, an order of recipes is not. results/corpus_ranking.html has one. Next, say:"
	@echo "  $(BIN)/python scripts/generate.py runs/quickstart/$$(basename $$(ls -d runs/quickstart/llama_micro-quartet2-*-s0-*)) 'The function returns'"
	@echo "  $(BIN)/python train.py model=llama_30m quant=quartet2 dry_run=true"
	@echo "  $(BIN)/python scripts/quant_audit.py quartet2"

# CUTLASS's headers without its run-time dependencies: the host checks compile against them.
CUTLASS := $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0

# One thread for each of the two workers: idle OpenMP threads spin, and two pools on two cores slow each other down.
test: $(VENV)/.installed-dev
	$(CUTLASS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

kernels-check: $(VENV)/.installed-dev
	$(CUTLASS)
	$(BIN)/python -m kernels.build --arch host,100f,120f --jobs 2
	$(BIN)/python -m pytest -m "not gpu and not slow" tests/kernels/test_csrc_*.py tests/kernels/test_gemm_nvfp4.py \
		tests/kernels/test_scale_layout.py

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m faults tests/faults -s

# The last commit before the code was opened to new formats, products and hooks.
BASE ?= 8e55133
net: $(VENV)/.installed-dev
	$(BIN)/python scripts/check/net.py --base $(BASE)

# The pages' numbers and pictures; the law is fitted from the published losses (half a minute).
results: $(VENV)/.installed-base
	$(BIN)/python scripts/fit_scaling_law.py --out results/law
	$(BIN)/python scripts/check/results.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
