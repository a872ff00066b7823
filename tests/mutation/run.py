# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every guard is worth a test: take the guard away, and the test must fail.

``make mutation ARGS='name…'`` copies the tree, applies one of ``mutations.py`` at a time, runs the tests that belong to
it, and demands that each of them fails. It wants what the tests want: pytest, PGDRILL_TEST_BIN_DIR, and an ordinary
user, as PostgreSQL does not run as root; the front door sets all that.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutations import MUTATIONS, Mutation

CHECKOUT = Path(__file__).resolve().parents[2]
SKIPPED = (".git", ".sandbox", ".venv", "evidence", "__pycache__", ".hypothesis", ".mypy_cache", ".ruff_cache")
FAILED = 1  # pytest's exit code when tests failed; others tell of a mistake in the run itself


class Copy:
    """A copy of the checkout in which one mutation at a time is applied."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "ansible_collections" / "pgdrill" / "pitr"
        shutil.copytree(CHECKOUT, self.tree, ignore=shutil.ignore_patterns(*SKIPPED))
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(directory),
            "ANSIBLE_COLLECTIONS_PATH": str(directory),
            "ANSIBLE_CONFIG": str(self.tree / "ansible.cfg"),
            # A compiled file is told to be old by seconds and size, and a mutation may change neither.
            "PYTHONDONTWRITEBYTECODE": "1",
            # Many tests notice a mutation by waiting in vain.
            "PGDRILL_TEST_PATIENCE": "20",
        }

    def pytest(self, tests: Sequence[str], workers: int = 0) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rf", "-n", str(workers)]
        argv += tests
        return subprocess.run(
            argv, cwd=self.tree, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip

    def complaint(self, mutation: Mutation) -> str:
        """What is wrong with the mutation's tests; empty when all of them have failed."""
        path = self.tree / mutation.file
        original = path.read_text(encoding="utf-8")
        path.write_text(original.replace(mutation.text, mutation.replacement), encoding="utf-8")
        try:
            result = self.pytest(mutation.tests)
        finally:
            path.write_text(original, encoding="utf-8")
        failed = [line.removeprefix("FAILED ") for line in result.stdout.splitlines() if line.startswith("FAILED ")]
        passed = [test for test in mutation.tests if not any(line.startswith(test) for line in failed)]
        if result.returncode == FAILED and not passed:
            return ""
        if result.returncode in (0, FAILED):
            return f"nobody noticed: {', '.join(passed)} did not fail"
        return f"pytest ended with {result.returncode}:\n{result.stdout[-2000:]}"


def misplaced(mutations: Iterable[Mutation]) -> list[str]:
    """Mutations whose text does not occur exactly once, so that they change nothing or too much."""
    found = []
    for mutation in mutations:
        count = (CHECKOUT / mutation.file).read_text(encoding="utf-8").count(mutation.text)
        if count != 1:
            found.append(f"{mutation.name}: its text occurs {count} times in {mutation.file}")
    return found


def _work(tasks: queue.SimpleQueue[Mutation], copy: Copy, complaints: list[str]) -> None:
    while True:
        try:
            mutation = tasks.get_nowait()
        except queue.Empty:
            return
        started = time.monotonic()
        complaint = copy.complaint(mutation)
        verdict = f"SURVIVED  {complaint}" if complaint else "caught"
        print(f"{mutation.name:<60} {time.monotonic() - started:6.1f} s  {verdict}", flush=True)
        if complaint:
            complaints.append(f"{mutation.name}: {complaint}")


def main() -> int:
    """Exit 0 when every mutation was caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the names and check the texts, and run nothing")
    parser.add_argument("names", nargs="*", help="only mutations whose name contains one of these")
    arguments = parser.parse_args()
    chosen = [item for item in MUTATIONS if not arguments.names or any(name in item.name for name in arguments.names)]
    wrong = misplaced(MUTATIONS)
    if arguments.list:
        print("\n".join(item.name for item in chosen))
    if wrong or not chosen:
        print("\n".join(wrong) or "no mutation has such a name", file=sys.stderr)
        return 2
    if arguments.list:
        return 0
    if os.geteuid() == 0:
        print("PostgreSQL does not run as root, and a test that cannot run proves nothing.", file=sys.stderr)
        return 2
    tasks: queue.SimpleQueue[Mutation] = queue.SimpleQueue()
    for mutation in chosen:
        tasks.put(mutation)
    complaints: list[str] = []
    with tempfile.TemporaryDirectory(prefix="m") as directory:
        copies = [Copy(Path(directory) / str(number)) for number in range(max(1, arguments.jobs))]
        # A test that fails anyhow catches nothing.
        started = time.monotonic()
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        sound = copies[0].pytest(tests, workers=len(copies))
        if sound.returncode != 0:
            print(f"the tests fail without any mutation:\n{sound.stdout[-4000:]}", file=sys.stderr)
            return 1
        print(f"{len(tests)} tests pass without a mutation ({time.monotonic() - started:.1f} s)", flush=True)
        threads = [threading.Thread(target=_work, args=(tasks, copy, complaints)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"{len(chosen) - len(complaints)} passed, {len(complaints)} failed")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
