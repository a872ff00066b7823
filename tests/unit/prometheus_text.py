# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The text format of Prometheus, read strictly: what node_exporter would refuse is an error here.

By the exposition format's documentation and expfmt/text_parse.go: HELP and TYPE once a name and before its samples, all
samples of a name together, no sample twice, names and labels of legal characters, a number behind each, a line feed at
the end. The textfile collector also refuses timestamps.
"""

from __future__ import annotations

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)?\}})? (\S+)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf|NaN)\Z")
_META = re.compile(rf"# (HELP|TYPE) ({_NAME}) (.+)")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> tuple[Samples, dict[str, str]]:
    """Samples by name and labels, and the type of each name. AssertionError for anything that is not the format."""
    assert text.endswith("\n") and "\r" not in text
    samples: Samples = {}
    told: dict[str, dict[str, str]] = {}
    closed: set[str] = set()
    current = ""
    for line in text[:-1].split("\n"):
        meta = _META.fullmatch(line)
        if meta:
            kind, name, value = meta.groups()
            assert kind not in told.setdefault(name, {}), f"{kind} twice: {line}"
            told[name][kind] = value
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample, f"not a sample: {line!r}"
            name = sample.group(1)
            assert set(told.get(name, {})) == {"HELP", "TYPE"}, f"before its HELP and TYPE: {line}"
            labels = re.findall(_LABEL, sample.group(2) or "")
            assert len(dict(labels)) == len(labels), f"a label twice: {line}"
            assert _NUMBER.match(sample.group(7)), f"not a number: {line}"
            key = (name, frozenset(labels))
            assert key not in samples, f"twice: {line}"
            samples[key] = float(sample.group(7))
        if name != current:
            assert name not in closed, f"{name} is not in one place"
            closed.add(current)
            current = name
    for name, meta_of_name in told.items():
        assert meta_of_name["TYPE"] in ("gauge", "counter"), name
        assert (meta_of_name["TYPE"] == "counter") == name.endswith("_total"), name
    return samples, {name: item["TYPE"] for name, item in told.items()}


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """The value with these labels among others; None where there is none."""
    for (each, found), number in samples.items():
        if each == name and set(labels.items()) <= found:
            return number
    return None
