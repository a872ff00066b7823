# The front door. The work is done by tools/sandbox.py; it installs what it needs into .sandbox, and nothing else.
#   PG=18        PostgreSQL's major version: 15, 16, 17 or 18; for `make test` and the like also `all`
#   PYTHON=…     the Python (3.11 to 3.13) to build the sandbox on; by default the first one that fits
#   ARGS='…'     more arguments for ansible-playbook (drill), pytest (test), ansible-test (sanity), ansible-lint (lint);
#                names of mutations, or parts of them (mutation); scenarios, and before them a command (molecule)
#   KILLS=…      how many processes `make kill-test` kills
PG ?= 18
ARGS ?=
KILLS ?= 2000
export PYTHON
# exec: a signal that ends make must reach the tool, not a shell between them.
SANDBOX = exec "$$(command -v python3 || echo "$${PYTHON:-python3}")" tools/sandbox.py
IN_VENV = $(SANDBOX) run --test --

.DEFAULT_GOAL := help
.PHONY: help setup drill test kill-test exactness mutation lint sanity typecheck molecule check-specs docs build
.PHONY: install-check bench bench-archive bench-wal bench-incremental bench-restore stop clean ledger

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PG=15|16|17|18 (test, kill-test, exactness: all)   PYTHON=/path/to/python3.12   ARGS='-e drill_scenarios=[latest]'"

setup: ## install Ansible and PostgreSQL into .sandbox (the others do it by themselves)
	@$(SANDBOX) setup --pg '$(PG)'

drill: ## rehearse the disasters on a fresh sandbox; the evidence goes to evidence/latest
	@$(SANDBOX) drill --pg '$(PG)' $(ARGS)

test: ## unit and integration tests
	@$(SANDBOX) test --pg '$(PG)' $(ARGS)

kill-test: export PGDRILL_TEST_KILLS = $(KILLS)
kill-test: export PGDRILL_TEST_RESTORE_KILLS = 60
kill-test: ## kill -9 of everything that archives and restores, KILLS times under load, then a restore; `test` kills less
	@$(SANDBOX) test --pg '$(PG)' tests/integration/test_kill_loops.py tests/integration/test_restore_kills.py -s -n 0 $(ARGS)

exactness: export PGDRILL_TEST_EXACT = all
exactness: ## every kind of target at every boundary of a long life, two thousand restores; `test` runs a sample
	@$(SANDBOX) test --pg '$(PG)' tests/integration/test_exactness.py -q $(ARGS)

mutation: ## take away the engine's guards one by one: a test must notice each
	@$(SANDBOX) mutation --pg '$(PG)' $(ARGS)

molecule: ## the roles on real systemd hosts (containers of podman; root), all scenarios or ARGS='default topology'
	@$(SANDBOX) molecule $(ARGS)

lint: ## ansible-lint (production profile), ruff, shellcheck
	@$(SANDBOX) lint $(ARGS)

sanity: ## ansible-test sanity, all of it
	@$(SANDBOX) sanity $(ARGS)

typecheck: ## mypy --strict
	@$(SANDBOX) typecheck

check-specs: ## argument specs against defaults, lists of modules and variables against both
	@$(IN_VENV) python tools/check_specs.py

docs: ## write docs/modules.md and docs/variables.md anew
	@$(IN_VENV) python tools/module_index.py
	@$(IN_VENV) python tools/variable_index.py

build: ## the collection's archive
	@$(IN_VENV) ansible-galaxy collection build --force

install-check: ## build the collection, install it elsewhere, run a drill with what was installed
	@$(SANDBOX) install-check --pg '$(PG)'

ledger: ## what is lost when the primary burns: with a synchronous receiver, without, and with archive_command alone
	@$(SANDBOX) test --pg '$(PG)' tests/integration/test_receiver_ledger.py -n 0 -s $(ARGS)

bench: ## the drill's time beside that of the bare PostgreSQL commands
	@$(SANDBOX) run -- python benchmarks/drill_ratio.py --pg '$(PG)' $(ARGS)

bench-archive: ## archive_info and expire over a million segments: seconds and memory
	@$(SANDBOX) run -- python benchmarks/archive_scan.py $(ARGS)

bench-wal: ## push beside pgBackRest's, replay through get beside a local one; about ten minutes
	@$(SANDBOX) run -- python benchmarks/archive_push.py $(ARGS)
	@$(SANDBOX) run -- python benchmarks/archive_get.py --pg '$(PG)' $(ARGS)

bench-incremental: ## an incremental backup after 1 % of change beside a full one, 1.1 GB
	@$(SANDBOX) run -- python benchmarks/incremental.py --pg '$(PG)' $(ARGS)
bench-restore: ## backup and restore, fresh and delta, beside pgBackRest's; about ten minutes
	@$(SANDBOX) run -- python benchmarks/restore_ratio.py $(ARGS)

stop: ## stop the servers of the sandbox
	@$(SANDBOX) stop

clean: ## stop the servers, remove .sandbox and all caches; evidence/ stays
	@$(SANDBOX) clean
