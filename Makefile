# make demo   trains the paper's network on real CT with our loss (sets everything up; a quarter of an hour on 2 cores)
# make study  losses and samplings side by side on real images, a small setting of docs/study.md
# make test   the tests (sets everything up)      make test-quick  two minutes of them
# make test-compiled  what is left out there: what watches the compiled GPU kernels, on the host
# make test-peers  our losses beside MONAI, nnU-Net, smp and kornia themselves, in an environment of its own
# make docs   the site, in .site      make lint   ruff, mypy, clang-format        make bench  the benchmarks of this machine
# make bench-peers  the same beside nnU-Net, segmentation_models_pytorch, kornia and exacta, in an environment of its own
# make bench-report  there too: everything that docs/performance.md shows, with its pictures (an hour on 2 cores)
# make gpu    on a machine with a card: builds, tests and benchmarks with the Python and torch that are there
# make wheel  a wheel in dist/      make release  the packages that are published, in dist/release (docs/releasing.md)
#
# The set-up lives in .venv and is made again only when what it depends on has changed. Nothing else is touched.
#   make test TORCH=torch==2.14.1     another torch          make test PYTHON=python3.12     another Python

PYTHON ?= python3
TORCH ?= torch==2.13.0
# For the tests, where torch has not brought its own.
TRITON ?= triton==3.8.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -type f) setup.py
OUT ?= benchmarks/results

.PHONY: demo study test test-quick test-compiled test-hostile lint format bench bench-peers bench-all bench-report gpu gpu-build wheel clean
# What has been compiled is there for a test that builds a wheel, and for the next change of one source.
export TVERSKY_KERNELS_OBJECTS ?= $(CURDIR)/$(VENV)/objects
SHELL := /bin/bash -o pipefail

$(VENV)/.python: Makefile
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The name of the stamp is the torch, so that another TORCH is another set-up.
empty :=
TORCH_STAMP := $(VENV)/.torch-$(subst /,_,$(subst $(empty) $(empty),_,$(TORCH)))
$(TORCH_STAMP): $(VENV)/.python
	$(PIP) install $(foreach t,$(TORCH),'$(t)') 'setuptools>=77' wheel
	@rm -f $(VENV)/.torch-* $(VENV)/.extras-*
	@touch $@

# One step: the extension in place, and what the extra names. pip finds torch satisfied, whichever it is.
$(VENV)/.extras-%: $(TORCH_STAMP) $(SOURCES) pyproject.toml
	$(if $(findstring test,$*),$(PY) -c 'import triton' 2>/dev/null || $(PIP) install '$(TRITON); platform_system == "Linux"')
	$(PIP) install --no-build-isolation -e '.[$*]'
	@touch $@

comma := ,
DEMO_READY := $(VENV)/.extras-examples
TEST_READY := $(VENV)/.extras-test$(comma)examples$(comma)dev
BENCH_EXTRAS := bench
BENCH_READY := $(VENV)/.extras-$(BENCH_EXTRAS)

# For the demo alone, where there is no card, nothing is compiled for one: nvcc takes minutes.
$(DEMO_READY): export TVERSKY_KERNELS_WITH_CUDA ?= $(if $(wildcard $(VENV)/.extras-*)$(shell nvidia-smi -L 2>/dev/null),auto,0)

.data/lung: $(DEMO_READY)
	$(PY) examples/fetch_lung_ct.py $@
	@touch $@

demo: $(DEMO_READY) .data/lung
	$(PY) examples/fetch_lung_ct.py .data/lung
	$(PY) examples/train_fcn.py --data .data/lung --out runs/demo $(DEMO)

DEMO := --steps 400 --batch-size 2 --features 8 --norm instance --lr 2e-3 --decay-every 40

# One seed and the recipes that the paper's claim is about, on lung CT and, with DATA=DIR, on what MS images are there.
STUDY := --seeds 1 $(foreach r,tversky-.5 tversky-.7 tversky-.9 dice-ce ce,--only '*/$(r)/*')
study: $(DEMO_READY) .data/lung
	$(PY) examples/study.py --jobs $(JOBS) $(addprefix --data ,$(DATA)) $(STUDY)
	$(PY) examples/study_report.py runs/study
	@echo "All recipes and seeds: make study STUDY=  The paper's sizes, for a card or a patient person:"
	@echo "  $(PY) examples/study.py --setting full --out runs/study-full --jobs 1 --data DIR"

# A file of tests to each process: the compilers and emulators that some of them run take one core.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(TEST_READY)
	$(PYTEST) -m 'not compiled' --durations 20 $(TESTS)

# What only watches compiled code, runs it under sanitizers, or plants bugs in it: all of it, or the SHAREd part "0/4"
# to "3/4".
SHARE := 0/1
COMPILED_TESTS := $(addprefix tests/test_,cuda_compiled.py triton_without_gpu.py cuda_by_nvcc.py cuda_planted.py portability.py cuda_on_host.py)
test-compiled: $(TEST_READY)
	TK_SHARE=$(SHARE) $(PYTEST) -m compiled --durations 20 $(COMPILED_TESTS)

# For whoever changes a line of the package.
QUICK_TESTS := tests/test_reference.py tests/test_arguments.py tests/test_modules.py tests/test_counts.py tests/test_blocks.py tests/test_inplace.py
test-quick: $(TEST_READY)
	$(PYTEST) -m 'not slow and not compiled' $(QUICK_TESTS)

# The operators called wrongly, under sanitizers: some minutes.
SANITIZED := $(VENV)/sanitized
HOSTILE := --calls 2500
test-hostile: $(TEST_READY)
	rm -rf $(SANITIZED)
	$(PY) tests/tools/sanitized.py $(SANITIZED) tests/tools/hostile.py $(HOSTILE)

lint: $(TEST_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Stops at a broken link, a name without a page (tests/test_docs.py), a picture of other code.
DOCS_READY := $(VENV)/.extras-docs
.PHONY: docs
docs: $(DOCS_READY)
	$(PY) docs/site/plots.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

format: $(TEST_READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(BENCH_READY)
	$(PY) -m benchmarks.run $(BENCH)

# These peers need torchvision, which does not import beside a CPU build of torch: the default build of both.
PEERS := .venv-peers
bench-peers:
	$(MAKE) bench VENV=$(PEERS) TORCH='torch==2.14.1 torchvision==0.29.1' BENCH_EXTRAS=bench,peers BENCH='$(BENCH)'

# The losses of compat against these libraries themselves, and nnU-Net with our trainers: ten minutes on 2 cores.
PEERS_READY := $(VENV)/.extras-test$(comma)examples$(comma)peers
.PHONY: test-peers test-peers-here
test-peers:
	$(MAKE) test-peers-here VENV=$(PEERS) TORCH='torch==2.14.1 torchvision==0.29.1'
$(PEERS_READY): export TVERSKY_KERNELS_WITH_CUDA ?= 0
test-peers-here: $(PEERS_READY)
	$(PY) -m pytest -n $(JOBS) --dist loadfile tests/peers tests/test_compat.py $(TESTS)

bench-all: $(BENCH_READY)
	$(PY) -m benchmarks.run --set plain --out $(OUT)
	$(PY) -m benchmarks.run --task dice_ce --out $(OUT)
	$(PY) -m benchmarks.run --set half --no-memory --out $(OUT)
	$(PY) -m benchmarks.run --set small --no-memory --out $(OUT)
	$(PY) -m benchmarks.growth --out $(OUT)
	$(PY) -m benchmarks.training_step --out $(OUT)
	$(PY) -m benchmarks.variants --out $(OUT)
	$(PY) -m benchmarks.head --out $(OUT)
	$(PY) -m benchmarks.accuracy --out $(OUT)
	$(PY) -m benchmarks.plot --results $(OUT)

bench-report:
	$(MAKE) bench-all VENV=$(PEERS) TORCH='torch==2.14.1 torchvision==0.29.1' BENCH_EXTRAS=bench,peers

# No set-up: the card's machine has its own torch and no network. Each part can be called by itself, and none that fails
# keeps the others from running; every one has a time limit, so that the whole ends within ten minutes. While the
# extension is built, what Triton and torch.compile need is compiled too, in several processes.
gpu:
	@status=0; for part in '-j16 gpu-build gpu-check-triton gpu-compile' '-j8 gpu-check-built' '-j1 gpu-bench' gpu-report; do \
	  $(MAKE) -k $$part || status=$$?; done; exit $$status

$(OUT):
	mkdir -p $@

gpu-build: | $(OUT)
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -c 'import tversky_kernels as tk; b = tk.available_backends(); print(b); assert b["cuda"] is True, b["cuda"]'

GPU_SHARES := 0 1 2 3 4 5
.PHONY: gpu-compile $(addprefix gpu-compile-,$(GPU_SHARES))
gpu-compile: $(addprefix gpu-compile-,$(GPU_SHARES))
$(addprefix gpu-compile-,$(GPU_SHARES)): gpu-compile-%: | $(OUT)
	OMP_NUM_THREADS=2 timeout -k 5 120 $(PYTHON) -m benchmarks.run --device cuda --set plain --out $(OUT) \
	  --provider 'ours, triton' --provider 'our Dice + CE, triton' \
	  --provider 'lean compiled, mask' --provider 'exacta TverskyLoss' --provider 'exacta DiceCELoss' \
	  --compile-only $*/$(words $(GPU_SHARES))

# Side by side: hardly any of them fills a card or a processor; with pytest-xdist, where it is there, each in several
# processes, for Triton's some 600 kernels have to be compiled.
GPU_CHECKS := cuda triton card memcheck racecheck
GPU_JOBS = $(shell $(PYTHON) -c 'import xdist; print("-n $(1)")' 2>/dev/null)
GPU_PYTEST = OMP_NUM_THREADS=2 timeout -k 5 $(1) $(PYTHON) -m pytest -q
# Memory of each tensor's own, or the tool sees what lies beyond a tensor as torch's.
GPU_SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 TK_GPU_KERNELS=cuda OMP_NUM_THREADS=2 timeout -k 5 120
# Tests of kernels whose warps share voxels, and some of the others.
GPU_SANITIZED_SHARED := test_channels_last and (40 or 118) or test_many_classes and 118
GPU_SANITIZED := test_softmax and spatial0 and float32 or test_dense_targets or test_channels_last and (14- or 33) \
  or $(GPU_SANITIZED_SHARED)
.PHONY: gpu-check gpu-check-built $(addprefix gpu-check-,$(GPU_CHECKS))
gpu-check: $(addprefix gpu-check-,$(GPU_CHECKS))
gpu-check-built: $(addprefix gpu-check-,$(filter-out triton,$(GPU_CHECKS)))
$(addprefix gpu-check-,$(GPU_CHECKS)): | $(OUT)
gpu-check-cuda:
	TK_GPU_KERNELS=cuda $(call GPU_PYTEST,100) $(call GPU_JOBS,4) tests/gpu_kernels 2>&1 | tee $(OUT)/gpu_kernels_cuda.log
gpu-check-triton:
	TK_GPU_KERNELS=triton $(call GPU_PYTEST,180) $(call GPU_JOBS,10) tests/gpu_kernels 2>&1 | tee $(OUT)/gpu_kernels_triton.log
gpu-check-card:
	$(call GPU_PYTEST,100) $(call GPU_JOBS,3) -m gpu tests 2>&1 | tee $(OUT)/gpu_tests.log
gpu-check-memcheck:
	$(GPU_SANITIZE) compute-sanitizer --error-exitcode 9 --tool memcheck $(PYTHON) -m pytest -q -x tests/gpu_kernels \
	  -k '$(GPU_SANITIZED)' 2>&1 | tee $(OUT)/sanitizer_memcheck.log
gpu-check-racecheck:
	$(GPU_SANITIZE) $(PYTHON) tests/tools/racecheck.py --tests '$(GPU_SANITIZED)' --shared '$(GPU_SANITIZED_SHARED)' \
	  2>&1 | tee $(OUT)/sanitizer_racecheck.log

# First ours and exacta on all shapes, then the other losses on some.
GPU_BENCHES := core peers dice-ce variants head step growth
GPU_RUN = timeout -k 5 $(1) $(PYTHON) -m benchmarks.$(2) --device cuda --out $(OUT)
.PHONY: gpu-bench gpu-report $(addprefix gpu-bench-,$(GPU_BENCHES))
gpu-bench: $(addprefix gpu-bench-,$(GPU_BENCHES))
gpu-bench-core:
	$(call GPU_RUN,75,run) --set core --repeats 7 --provider ours --provider 'ours, in place' \
	  --provider 'exacta TverskyLoss'
gpu-bench-peers:
	$(call GPU_RUN,65,run) --set plain --repeats 5 \
	  --provider ours --provider 'ours, in place' --provider 'ours, triton' --provider 'lean compiled, mask' \
	  --provider 'lean eager, mask' --provider 'MONAI TverskyLoss' --provider 'MONAI DiceLoss'
gpu-bench-dice-ce:
	$(call GPU_RUN,35,run) --set plain --task dice_ce --repeats 5 \
	  --provider 'our Dice + CE' --provider 'our Dice + CE, in place' --provider 'our Dice + CE, triton' \
	  --provider 'MONAI DiceCELoss' --provider 'nnU-Net DC_and_CE_loss' --provider 'exacta DiceCELoss'
gpu-bench-variants:
	$(call GPU_RUN,35,variants) --repeats 7
gpu-bench-head:
	$(call GPU_RUN,30,head) --dtype bfloat16 --loss ours --loss 'ours, in place' --loss 'MONAI TverskyLoss'
gpu-bench-step:
	$(call GPU_RUN,25,training_step) --network 'demo FCN' --classes 14 --shares-only
gpu-bench-growth:
	$(call GPU_RUN,25,growth) --no-memory --provider ours --provider 'MONAI TverskyLoss'
# What was found, last: pictures, the tests' last lines, a line for each shape.
gpu-report:
	-$(PYTHON) -m benchmarks.plot --device cuda --results $(OUT)
	tail -n 3 $(OUT)/*.log
	$(PYTHON) -m benchmarks.summary --device cuda --results $(OUT)

wheel: $(TORCH_STAMP)
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

# A wheel with CUDA code for these cards and PTX for newer ones, one without compiled code, and the sources.
RELEASE := dist/release
RELEASE_CUDA := 8.0;9.0;10.0;12.0+PTX
RELEASE_READY := $(VENV)/.extras-release
# Whose libraries a wheel leaves out: torch brings them.
TORCH_LIBRARIES := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so
$(RELEASE_READY): export TVERSKY_KERNELS_WITH_CUDA ?= 0
.PHONY: release release-check
release: $(RELEASE_READY)
	rm -rf $(RELEASE) dist/built build && mkdir -p $(RELEASE)
	TVERSKY_KERNELS_SKIP_EXT=1 $(PY) -m build --no-isolation --outdir $(RELEASE) .
	TVERSKY_KERNELS_WITH_CUDA=1 TORCH_CUDA_ARCH_LIST='$(RELEASE_CUDA)' TVERSKY_KERNELS_OBJECTS=$(CURDIR)/$(VENV)/release-objects \
	  $(PIP) wheel --no-build-isolation --no-deps -w dist/built .
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(PY) -m auditwheel repair $(addprefix --exclude ,$(TORCH_LIBRARIES)) --strip -w $(RELEASE) dist/built/*.whl
	$(PY) -m twine check --strict $(RELEASE)/*
	ls -l $(RELEASE)

# A package of dist/release in an empty environment: make release-check PYTHON=python3.13 TORCH=torch==2.15.0
PACKAGE = $(firstword $(wildcard $(RELEASE)/*manylinux*$(shell uname -m).whl))
release-check:
	$(PYTHON) tests/tools/release_check.py '$(PACKAGE)' $(TORCH)

clean:
	rm -rf build dist *.egg-info tversky_kernels/*.so $(VENV)
