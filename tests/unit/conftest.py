# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hypothesis judges what comes out, not how long it takes: the machine of the tests may have other work."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("pgdrill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pgdrill")
