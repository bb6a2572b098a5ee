# All that a fresh machine needs: Python 3.11 or 3.12 with pip, and make; for `make lint`, a C++ compiler too.

.DEFAULT_GOAL := help
.PHONY: help install serve serve-openai test bench quality growth device models stress soak lint format proto lock sbom charts audit clean

BIN := .venv/bin
INSTALLED := .venv/.installed
SUPPLY := build/supply-chain/bin

# python3 where it is 3.11 or 3.12, else one of those by name
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$python && break; done)

# The tests start some hundred Python processes, each of which would else compile this project anew.
unexport PYTHONDONTWRITEBYTECODE

NATIVE = $(shell find attention server loadtest tests -name '*.[ch]pp')

help:
	@echo 'make install  .venv with the pinned dependencies and this folder'
	@echo 'make serve    install, then serve the default model; flags: make serve ARGS="--port 50052"'
	@echo "make serve-openai  install, then serve the default model with OpenAI's HTTP API in front, by the SMG gateway"
	@echo 'make test     install, then run all tests in three processes; some: make test ARGS="tests/client -k stream";'
	@echo '              in one process, with a debugger: make test ARGS="-n 0 --pdb"'
	@echo 'make bench    install, then measure the default model as served, through gRPC'
	@echo 'make quality  install, then check what is known of the default model under attention patterns; 20 minutes'
	@echo 'make device   install, then measure how near the engine comes to what a GPU can do; 10 minutes'
	@echo 'make growth   install, then time tokens as contexts and streams grow; a quarter of an hour'
	@echo 'make models   install, then try every architecture and checkpoint form and write docs/models.md; 15 minutes;'
	@echo '              some: make models ARGS="llama gemma2"'
	@echo 'make stress   install, then the long tests: thousands of cancellations, a million simulated ticks, every architecture,'
	@echo '              llama.cpp, kvpress, native code on an emulated AArch64 and under sanitizers'
	@echo 'make soak     install, then 30 minutes of load, faults and hostile inputs; shorter: make soak ARGS="--minutes 3"'
	@echo 'make lint     install, then check style, types, imports, the proto, the Dockerfile and the C++'
	@echo 'make format   install, then format the code'
	@echo 'make proto    install, then generate the stubs from the proto'
	@echo 'make lock     install, then pin what the image installs, with hashes (requirements.lock)'
	@echo 'make sbom     install, then write what is installed as a bill of materials (build/sbom.json, CycloneDX)'
	@echo 'make charts   install, then render deploy/ by Helm and kustomize and hold it to the schemas of Kubernetes'
	@echo 'make audit    install, then ask the Python Packaging Advisory Database about all pins, torch included; needs the network'
	@echo 'make clean    remove .venv and caches'

install: $(INSTALLED)

# Not every Python brings ensurepip (Debian packs it apart), so the new environment gets its pip from the old one's.
$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@test -n "$(PYTHON)" || { echo 'Longspan needs Python 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet pip
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,load,otel,protocols,dev]'
	@touch $@

# exec: the server is make's own child, and gets its signals without a shell between them
serve: install
	@exec $(BIN)/longspan serve $(ARGS)

serve-openai: install
	@exec $(BIN)/python deploy/openai/serve.py $(ARGS)

# Three processes, since tests wait for servers for a quarter of their time. They share the cores, so that threads of
# one that wait must not keep the others' from working.
test: install
	@deploy/prometheus/install
	@tests/loadtest/browser/install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: install
	$(BIN)/python -m loadtest.bench $(ARGS)

quality: install
	$(BIN)/longspan compare --preset known $(ARGS)

device: install
	$(BIN)/python -m loadtest.direct.device $(ARGS)

growth: install
	@mkdir -p build
	$(BIN)/python -m loadtest.direct.growth --json build/growth.json --html build/growth.html $(ARGS)

models: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.survey $(ARGS)

stress: install
	$(BIN)/python -m pytest -m stress $(ARGS)

soak: install
	$(BIN)/python -m tests.soak $(ARGS)

# mypy uses one core, so clang-tidy, which uses all, runs beside it.
lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf breaking --against .ci/proto.binpb
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate,$$fresh) \
	&& diff -r -x __pycache__ -x __init__.py -x '*.proto' "$$fresh/longspan/v1" proto/longspan/v1 \
	|| { echo 'The stubs are not what the proto generates; run: make proto' >&2; exit 1; }
	$(BIN)/hadolint Dockerfile
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy & types=$$!; $(BIN)/python .ci/tidy.py; native=$$?; wait $$types && exit $$native

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

proto: install
	$(call generate,proto)

# types.proto has no service, so its _grpc files are empty.
define generate
PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) proto/longspan/v1/*.proto \
&& rm $(1)/longspan/v1/types_pb2_grpc.py $(1)/longspan/v1/types_pb2_grpc.pyi
endef

# Their own environment: the many packages that these tools need are no part of Longspan's.
$(SUPPLY): .ci/supply-chain.txt
	$(PYTHON) -m venv --clear --without-pip build/supply-chain
	$(PYTHON) -m pip --python $(SUPPLY)/python install --quiet pip
	$(SUPPLY)/python -m pip install --quiet --require-hashes --no-deps --requirement .ci/supply-chain.txt
	@touch $@

lock: install $(SUPPLY)
	$(BIN)/python .ci/lock.py $(SUPPLY)/pip-compile

sbom: install $(SUPPLY)
	$(SUPPLY)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json $(BIN)/python

# Strict: without the network it fails, and does not say that all is well. The lock lacks torch; the constraints have it.
charts: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[charts]'
	$(BIN)/python -m pytest -n 0 tests/packaging/test_kubernetes.py

audit: install $(SUPPLY)
	$(SUPPLY)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
