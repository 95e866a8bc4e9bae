# everything one does often; each target makes the environment it needs
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
JOBS   ?= 2
# numerical threads of each test worker: workers times threads = cores
export OMP_NUM_THREADS ?= 1

.PHONY: lock mutants numerics sanitize emulate-long analyse coverage demo test lint format bench aot emulate triton-tests gpu clean build diffusers-tests serving-suite peft-tests robustness endurance docs fuzz hf-kernels wheel sdist sbom matrix quantised-tests metrics-tests
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

# torch first and alone, by its pin; the rest against it, never in an isolated build that would fetch another torch.
# LOCKED=1 takes no file but those whose sha256 stands in constraints.lock
$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel ninja
	$(if $(LOCKED),$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r constraints.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $(STAMP)

build: $(STAMP)

demo: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/mole-kernels demo --out demo_out

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS)

NATIVE = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.cpp' 'tests/*.h')

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py --suite cpu

# the site into build/site, without a warning; then its links and every python block of the documentation
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q tests/docs

# the operator as a repository of the kernels package, into build/hf
hf-kernels: $(STAMP)
	$(BIN)/python python/tools/hf_kernels.py

# a source distribution, from it a wheel with its true tag and its bill of materials, and both tried in an empty environment
sdist: $(STAMP)
	$(BIN)/python python/tools/wheels.py sdist

wheel: sdist
	$(BIN)/python python/tools/wheels.py build --source
	$(BIN)/python python/tools/sbom.py
	$(BIN)/python python/tools/wheels.py install

sbom: $(STAMP)
	$(BIN)/python python/tools/sbom.py

# the oldest and the newest diffusers, PEFT and their kin that are promised (python/tools/matrix.py), each beside this torch
matrix: $(STAMP)
	$(BIN)/python python/tools/matrix.py

# every bad input met once, and what came of it written into docs/robustness.md; the licences of what is installed into docs/licences.md
robustness: $(STAMP)
	$(BIN)/python python/tools/robustness.py
	$(BIN)/python python/tools/licences.py

# constraints.lock anew from constraints.txt: the sha256 of the file behind every pin
lock: $(STAMP)
	$(BIN)/python python/tools/lock.py

# readers of strangers' bytes under atheris, then the model under random calls and faults; finds are kept in build/fuzz. SECONDS=600
fuzz: SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)
	MOLE_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q tests/fuzz/test_machine.py tests/fuzz/test_sweep.py

# a thousand cycles of patch and remove, accelerate on and off, serve; what is left afterwards is printed, in docs/memory.md as measured
CYCLES ?= 1000
endurance: $(STAMP)
	MOLE_ENDURANCE_CYCLES=$(CYCLES) $(BIN)/python -m pytest tests/robustness/test_leaks.py

# diffusers' own LoRA tests with acceleration switched on; SOURCE is a checkout of diffusers
diffusers-tests: $(STAMP)
	$(BIN)/python python/tools/diffusers_suite.py $(if $(SOURCE),--source $(SOURCE))

# every pipeline of diffusers that loads LoRA files, two prompts of two outputs, each prompt with its own adapter: none may be drawn with
# another's. From diffusers' tests, make serving-suite SOURCE=<a checkout of diffusers>, one class with ONLY=<part of its name>
serving-suite: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/serving-suite/packages \
	  parameterized==0.9.0 requests-mock==1.12.1 ftfy==6.3.1 wcwidth==0.9.4
	HF_HUB_OFFLINE=1 PYTHONPATH=build/serving-suite/packages $(BIN)/python python/tools/serving_suite.py --source $(SOURCE) \
	  $(if $(ONLY),--only $(ONLY))

# kernels compiled for GPUs that are not here: registers, spills, tensor-core instructions; some of them with ONLY=<pattern> and ARCH=<90>;
# by another Triton, unpacked beside the environment, with TRITON=<version>
OTHER := $(if $(TRITON),build/triton-$(TRITON))
aot: $(STAMP) $(OTHER)
	PYTHONPATH=$(if $(OTHER),$(OTHER):). $(BIN)/python python/tools/aot.py $(if $(ONLY),--only '$(ONLY)') $(if $(ARCH),--arch $(ARCH))

# CUDA kernels on a CPU, over many schedules: every planted fault must be named, every kernel right and free of races
emulate: $(STAMP)
	MOLE_EMULATE_SEEDS=4 $(BIN)/python -m pytest -n $(JOBS) tests/emulator
	$(BIN)/python python/tools/emulate.py --jobs $(JOBS)
	$(BIN)/python tests/cuda/mutants.py

# the same over a hundred schedules each, and once more with AddressSanitizer and UBSan over kernel and emulator: hours on two cores
SEEDS ?= 100
emulate-long: $(STAMP)
	MOLE_EMULATE_SEEDS=$(SEEDS) $(BIN)/python -m pytest -n $(JOBS) tests/emulator
	$(BIN)/python python/tools/emulate.py --jobs $(JOBS) --seeds $(SEEDS) $(if $(ONLY),--only $(ONLY))
	$(BIN)/python python/tools/emulate.py --jobs $(JOBS) --seeds $(SEEDS) --flavour address $(if $(ONLY),--only $(ONLY))

# the CPU operator under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: $(STAMP)
	$(BIN)/python -m tests.native.sanitized

# clang-tidy over the native code; what it may not say, and why, is in .clang-tidy
analyse: $(STAMP)
	$(BIN)/python -m tests.native.analysed

# the error of every backend and dtype against float64, and its plots, into docs/numerics.md
numerics: $(STAMP)
	$(BIN)/python python/tools/numerics.py

# which lines of the package no test runs, into docs/coverage.md
coverage: $(STAMP)
	$(BIN)/python python/tools/coverage_report.py --run --jobs $(JOBS)

# every fault planted in every backend, CUDA's in the emulator: which test notices it, into docs/kernels/mutants.md
mutants: $(STAMP)
	$(BIN)/python python/tools/mutants.py

# the kernels in the interpreter of another Triton: make triton-tests TRITON=<version>
triton-tests: $(STAMP) $(OTHER)
	PYTHONPATH=$(if $(OTHER),$(OTHER):). $(BIN)/python -m pytest -q tests/kernels --deselect tests/kernels/test_aot.py

build/triton-%: | $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@ triton==$*

# PEFT's own LoRA tests, from its source distribution
peft-tests: $(STAMP)
	$(BIN)/python python/tools/diffusers_suite.py --suite peft

# FID, KID and CLIPScore by torchmetrics, unpacked beside the environment; torch-fidelity would bring torchvision, and that its own torch
metrics-tests: $(STAMP) build/metrics
	PYTHONPATH=build/metrics:. $(BIN)/python -m pytest -q tests/metrics tests/cli/test_evaluate.py

build/metrics: constraints.txt | $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target $@ \
	    torchmetrics lightning-utilities
	touch $@

# LoRA over quantised layers, with four packages unpacked beside the environment: two of them slow every start of diffusers down
quantised-tests: $(STAMP) build/quantised
	PYTHONPATH=build/quantised:. $(BIN)/python -m pytest -q tests/peft/test_quantised.py

build/quantised: constraints.txt | $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target $@ \
	    bitsandbytes torchao gguf optimum-quanto
	touch $@

# with the python that has a torch that sees the GPU, as it is; else with the environment made here. ARGS="--quick", "--only 2048x1280"
GPU_PYTHON ?= $(PYTHON)
gpu:
	@if $(GPU_PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; \
	then $(GPU_PYTHON) -m benchmarks.gpu $(ARGS); \
	elif command -v nvidia-smi >/dev/null; then $(MAKE) build && $(BIN)/python -m benchmarks.gpu $(ARGS); \
	else echo "no NVIDIA GPU here: nothing was run"; exit 2; fi

clean:
	rm -rf build dist *.egg-info demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f mole_kernels/*.so mole_kernels/libmole_kernels.json
