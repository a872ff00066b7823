# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The front door: sets up the sandbox and runs drills and tests in it. The Makefile calls it; so can you.

This file must stay readable to any Python 3, so that an old one ends in a sentence instead of a syntax error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
OTHERS = ("python3.13", "python3.12", "python3.11")
# Not merely exit code 0, which /bin/true has as well.
IS_NEW_ENOUGH = "import sys; sys.exit(42 if sys.version_info >= (3, 11) else 1)"


def use_newer_python():
    # type: () -> None
    """Run the same command under a Python that can, in place of this process; without one, end with a sentence."""
    asked = os.environ.get("PYTHON")
    for name in (asked,) if asked else OTHERS:
        found = shutil.which(name)
        # A version manager's shim exists for versions that are not enabled, too: only running it tells.
        if found and subprocess.call([found, "-c", IS_NEW_ENOUGH], stderr=subprocess.DEVNULL) == 42:
            os.execv(found, [found, *sys.argv])
    sys.exit(
        f"sandbox: Python 3.11, 3.12 or 3.13 is needed, and {asked or sys.executable} is not one. "
        "Install one, or name it: make drill PYTHON=/path/to/python3.12"
    )


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        use_newer_python()
    from sandboxlib.cli import main

    sys.exit(main(sys.argv[1:]))
