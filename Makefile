# A Python >= 3.11 is all that `make demo` and `make test` need. Everything goes into .venv and nothing outside of it.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# on a terminal, pip shows its progress
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
INSTALL := $(PIP) install $(QUIET) -c constraints.txt
PYTEST := $(BIN)/python -m pytest
# longest time for the tests in the guest, which is emulated
GUEST_SECONDS := 1200
# how often `make test-kills` kills, and how long it may take
KILLS := 200
KILLS_SECONDS := 5400
# how long `make soak` and `make test-outage` last
MINUTES := 30
OUTAGE_SECONDS := 300
# how many plans `make sim` plays; with STEPS, as many as have so many steps
SEEDS := 50
STEPS :=
# how long each fuzz target runs
SECONDS := 10
# of `make nightly`: which sixteenth
SHARD :=
# of `make affected`: the revision that a change is compared with
BASE :=
# the environment of `make site`, and what the site is made of
SITE := $(or $(USBIP_PLUGIN_CACHE),$(HOME)/.cache/usbip-plugin)/site
PAGES := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CODE_OF_CONDUCT.md LICENSE docs examples deploy contrib

# PYTHON=/path/to/python chooses the interpreter; without it the first of these that runs and is new enough
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test model sim sim-moments test-page screenshot docs site cast test-apiserver test-kernel test-kills soak-kernel test-deploy test-monitoring show-monitoring \
	image test-image test-arm64 e2e tour test-kubelet test-outage soak test-node test-power \
	bench bench-scale plots bench-kernel fuzz lint format proto constraints newest test-python versions check affected nightly flakes clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## two nodes and a USB/IP server in one process: what the plugin does, in a few seconds
	@$(BIN)/python -m usbip_plugin demo

test: $(VENV)/.test ## unit, contract, protocol, fuzz, model and simulation tests; no root, no network
	$(PYTEST) $(ARGS)

model: $(VENV)/.test ## every state of the lock protocol for two and three nodes, within larger bounds than make test
	$(BIN)/python -m tests.model.lock_runs

sim: $(VENV)/.test ## whole clusters under drawn faults in virtual time: SEEDS of them, or STEPS steps, with all counts
	$(BIN)/python -m tests.simulation.sim $(if $(STEPS),--steps $(STEPS),--seeds $(SEEDS)) $(ARGS)

sim-moments: $(VENV)/.test ## the same with one fault at each single step of an Allocate, a release, a re-attach, a takeover
	$(BIN)/python -m tests.simulation.sim --moments $(ARGS)

test-page: $(VENV)/.page ## the status page in a real browser (Chromium)
	$(PYTEST) tests/page $(ARGS)

screenshot: $(VENV)/.page ## docs/*.png: the status page of a node on which much has happened, and of its cluster (Chromium)
	$(BIN)/python -m tests.page.screenshot docs/status-page.png $(ARGS)
	$(BIN)/python -m tests.page.screenshot docs/status-page-cluster.png cluster $(ARGS)

docs: $(VENV)/.runtime ## write what is generated in docs/reference and the chart from the code
	$(BIN)/python docs/generate.py

site: | $(VENV)/bin/python ## the documents as a site, in build/site; fails for a link that leads nowhere
	@cmp -s docs/constraints.txt $(SITE)/constraints.txt || { \
		echo "installing mkdocs-material"; rm -rf $(SITE); $(BIN)/python -m venv $(SITE) && \
		$(SITE)/bin/pip --disable-pip-version-check --quiet install --no-deps -r docs/constraints.txt && \
		cp docs/constraints.txt $(SITE)/constraints.txt; }
	@rm -rf build/pages && mkdir -p build/pages && for path in $(PAGES); do ln -s ../../$$path build/pages/; done
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

cast: $(VENV)/.runtime ## docs/demo.cast and docs/demo.svg: `make demo`, recorded
	$(BIN)/python docs/cast.py docs/demo.cast docs/demo.svg

chart-readme: ## write the chart's README from its values.yaml, with helm-docs (built once from Go modules)
	@$$(tests/lab/cluster/build.sh release)/helm-docs --log-level error --sort-values-order file -c deploy/helm/usbip-plugin

test-apiserver: $(VENV)/.test ## lock tests against a real kube-apiserver and etcd (built once from Go modules)
	$(PYTEST) tests/apiserver $(ARGS)

test-kernel: $(VENV)/.test ## driver tests against a real vhci_hcd in a QEMU guest (Debian, root for packages)
	tests/lab/guest/run.sh -u -t $(GUEST_SECONDS) '$(PYTEST) -p no:cacheprovider tests/kernel $(ARGS)'

test-kills: $(VENV)/.test ## the plugin killed KILLS times (200) at random moments, on the real kernel; half an hour
	tests/lab/guest/run.sh -u -t $(KILLS_SECONDS) '$(PYTEST) -s -p no:cacheprovider tests/kernel/test_kernel_agent_kills.py --kills $(KILLS) $(ARGS)'

soak-kernel: $(VENV)/.test ## devices attached and detached on the real kernel for MINUTES (30): nothing leaks
	tests/lab/guest/run.sh -r -u -t $$(( $(MINUTES) * 60 + $(GUEST_SECONDS) )) '$(PYTEST) -s -p no:cacheprovider tests/kernel/test_kernel_agent_kills.py -k for_long --soak-seconds $$(( $(MINUTES) * 60 )) $(ARGS)'

test-deploy: $(VENV)/.test ## the manifests and the chart: rendered, compared, tried on a real kube-apiserver
	$(PYTEST) tests/deploy $(ARGS)

test-monitoring: $(VENV)/.test ## alerts and dashboard in a real Prometheus that watches two nodes and an exporter (built once from Go modules)
	$(PYTEST) tests/monitoring $(ARGS)

show-monitoring: $(VENV)/.test ## such a Prometheus at http://127.0.0.1:9090 until Ctrl-C, a data source for your Grafana
	$(BIN)/python -m tests.monitoring.show $(ARGS)

image: $(VENV)/.runtime ## the container image, without a registry where none answers; ARGS: see tests/lab/image/build.sh --help
	PYTHON=$(BIN)/python tests/lab/image/build.sh $(ARGS)

test-image: $(VENV)/.test ## the container image: built, looked at, and run without capabilities (root); IMAGE=TAR: not built, ARGS for pytest
	@set -e; archive=$$(mktemp -d); trap 'rm -rf "$$archive"' EXIT; image=$(IMAGE); \
	[ -n "$$image" ] || { image=$$archive/image.tar; PYTHON=$(BIN)/python tests/lab/image/build.sh --output "$$image" $(ARGS); }; \
	IMAGE_ARCHIVE="$$image" $(PYTEST) -s tests/image $(if $(IMAGE),$(ARGS))

test-arm64: $(VENV)/.test ## unit tests for arm64, emulated, with the image's Python and libraries (Debian, root)
	PYTHON=$(BIN)/python tests/lab/image/units.sh arm64 $(ARGS)

e2e: $(VENV)/.test ## the end-to-end suite on a kind cluster of its own; KEEP=1 leaves it there
	PYTHON=$(BIN)/python tests/lab/kind/e2e.sh $(ARGS)

tour: ## the README's five minutes with kind, its own commands, and a second pod that waits for the device (Docker, or root)
	tests/lab/kind/tour.sh

test-kubelet: $(VENV)/.test ## the same on two kubelets with containerd, side by side on this machine (Debian, root); K8S=1.31, CONTAINERD=1.7: others
	PYTHON=$(BIN)/python tests/lab/cluster/e2e.sh $(ARGS)

test-outage: $(VENV)/.test ## the API server away for OUTAGE_SECONDS (300) while pods use devices; on the same kubelets
	PYTHON=$(BIN)/python tests/lab/cluster/e2e.sh -k api_outage --outage-seconds $(OUTAGE_SECONDS) $(ARGS)

soak: $(VENV)/.test ## pods coming and going, plugins and kubelets restarting, for MINUTES (30): nothing leaks
	PYTHON=$(BIN)/python tests/lab/cluster/e2e.sh -s -k soak --soak-minutes $(MINUTES) $(ARGS)

test-node: $(VENV)/.test ## the DaemonSet on a kubelet with a real vhci_hcd, in the QEMU guest (Debian, root)
	PYTHON=$(BIN)/python tests/lab/cluster/guest.sh $(ARGS)

test-power: $(VENV)/.test ## nodes and server without power, frozen or cut off: three real kernels on a bridge (Debian, root)
	tests/lab/power/run.sh $(PYTEST) -s -p no:cacheprovider tests/power $(ARGS)

check: $(VENV)/.test ## lint, and what `make test` runs on two processes: before each commit
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -n 2 --dist worksteal -q $(ARGS)

affected: ## the targets that a change needs, cheapest first; BASE: the revision it is compared with
	@python3 .ci/affected.py $(if $(BASE),--base $(BASE))

nightly: ## the long forms of everything, figures too; SHARD=N/16: a sixteenth of it
	SHARD=$(SHARD) bash .ci/nightly

flakes: ## which tests failed on a tree on which they also passed, by the ledger of .ci/run and nightly
	@python3 .ci/flakes.py $(or $(USBIP_PLUGIN_CACHE),$(HOME)/.cache/usbip-plugin)/ci/sections.tsv

bench: $(VENV)/.test ## timings and memory, to the screen and bench.json
	$(BIN)/python -m bench.bench $(ARGS)

bench-scale: $(VENV)/.test ## many agents on one kube-apiserver and etcd, counts against the model; to the screen and bench-scale.json
	$(BIN)/python -m bench.bench_scale $(ARGS)

plots: $(VENV)/.test ## docs/internals/performance/*.svg from bench-scale.json
	$(BIN)/python -m bench.scale_plot bench-scale.json docs/internals/performance

bench-kernel: $(VENV)/.test ## Allocate on a real kernel against the kernel's own time, in the QEMU guest
	tests/lab/guest/run.sh -r -u -t $(GUEST_SECONDS) '$(BIN)/python -m bench.bench --kernel $(ARGS)'

fuzz: $(VENV)/.fuzz ## every decoder under atheris, SECONDS each (10); what it finds is in build/fuzz (Linux, x86_64)
	$(BIN)/python -m tests.fuzz.fuzz --seconds $(SECONDS) $(ARGS)

lint: $(VENV)/.test ## ruff, formatting, the direction of imports, mypy --strict, the prose of documents and texts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy usbip_plugin usbip_sim tests bench docs release .ci/affected.py .ci/figures.py .ci/flakes.py
	$(BIN)/python docs/prose.py

format: $(VENV)/.test ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.test ## write the gRPC stubs anew from proto/
	PYTHON=$(BIN)/python proto/generate.sh

constraints: ## write constraints.txt and the locks of image and release anew: the newest versions that pyproject.toml lets in
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(BIN)/python -m venv "$$new" >/dev/null && "$$new/bin/pip" --disable-pip-version-check --quiet install --upgrade pip setuptools '.[test,fuzz,page]'; \
	{ grep '^#' constraints.txt; "$$new/bin/pip" freeze --all | grep -v '^usbip-plugin ' | LC_ALL=C sort -f; } >constraints.new; mv constraints.new constraints.txt; \
	"$$new/bin/pip" --disable-pip-version-check --quiet install uv; \
	lock() { "$$new/bin/uv" pip compile --quiet --no-header --no-annotate --generate-hashes --universal --python-version 3.11 \
		-c constraints.txt -o "$$1" -; }; \
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' | lock image.lock; \
	$(BIN)/python -c 'import tomllib; print("pip", *tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | lock image-build.lock; \
	printf '%s\n' build pyinstaller pyyaml twine | lock release/tools.lock

newest: ## the tests without constraints.txt: with the newest versions that pyproject.toml lets in, in an environment of their own
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(BIN)/python -m venv "$$new" >/dev/null && "$$new/bin/pip" --disable-pip-version-check --quiet install -e '.[test]'; \
	"$$new/bin/python" -m pytest -q -p no:cacheprovider tests/unit tests/contract tests/protocol tests/sim

test-python: ## unit, contract and protocol tests with PYTHON=3.13 or PYTHON=/path/to/python, in an environment of its own
	@set -e; wanted=$(PYTHON); unset PYTHON; python=; \
	[ -z "$$wanted" ] || for one in "$$wanted" "python$$wanted" "$$HOME/.pyenv/versions/$$wanted".*/bin/python; do \
		"$$one" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && python=$$one && break; \
	done; \
	[ -n "$$python" ] || python=$$(tests/lab/python/fetch.sh "$$wanted"); \
	new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; "$$python" -m venv "$$new"; \
	"$$new/bin/python" -m pip --disable-pip-version-check --quiet install -c constraints.txt -e '.[test]'; \
	"$$new/bin/python" -m pytest -q -p no:cacheprovider tests/unit tests/contract tests/protocol $(ARGS)

versions: ## the README's table of versions, from what passed in .ci/run and nightly
	$(BIN)/python docs/tested_with.py $(or $(USBIP_PLUGIN_CACHE),$(HOME)/.cache/usbip-plugin)/ci/tested-with.tsv
	$(BIN)/python docs/generate.py

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench.json bench-scale.json
	find usbip_plugin usbip_sim tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian splits venv from Python: without python3-venv the environment is made without pip, and pip, if there is one, or
# virtualenv fills it.
$(VENV)/bin/python:
	@for python in $(PYTHONS); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		echo "$(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv $(VENV) >/dev/null 2>&1 && exit 0; \
		rm -rf $(VENV); \
		"$$python" -m virtualenv --quiet $(VENV) >/dev/null 2>&1 && exit 0; \
		rm -rf $(VENV); \
		"$$python" -m venv --without-pip $(VENV) >/dev/null 2>&1 && \
			"$$python" -m pip --python $(VENV)/bin/python install --quiet pip >/dev/null 2>&1 && exit 0; \
		rm -rf $(VENV); \
		echo "$$python can make no virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; \
	done; \
	echo "no Python >= 3.11 found; name one with: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what the plugin needs"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what the plugin and its tests need"
	@$(INSTALL) -e '.[test]'
	@touch $(VENV)/.runtime $@

$(VENV)/.fuzz: $(VENV)/.test
	@echo "installing atheris"
	@$(INSTALL) -e '.[fuzz]'
	@touch $@

$(VENV)/.page: $(VENV)/.test
	@echo "installing Playwright and axe"
	@$(INSTALL) -e '.[page]'
	@touch $@
