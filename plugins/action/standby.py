# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module standby; see plugin_utils/forked.py."""

from __future__ import annotations

from ansible_collections.pgdrill.pitr.plugins.plugin_utils.forked import ForkedAction


class ActionModule(ForkedAction):
    """The module as it is."""
