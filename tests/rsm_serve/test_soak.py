"""A few rounds of benchmarks/soak.py, whose ten minutes are the full form."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import soak

COUNTS = soak.Counts(reloads=8, kills=3, answers=800)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of processes")
def test_everything_at_once(tmp_path):
    results = soak.soak(COUNTS, tmp_path)
    assert soak.failures(results) == [], results["details"]
    assert results["reloads"]["switched"] == COUNTS.reloads
    assert results["reloads"]["published"] == 6, "every third reload goes back"
    assert results["kills"] == COUNTS.kills
    assert results["answers_checked"] >= COUNTS.answers
    many, leaver = results["outcomes"]["many"], results["outcomes"]["leaver"]
    assert min(many["cancelled"], leaver["abandoned"]) >= soak.LEFT


def good_results() -> dict[str, Any]:
    quarters = {"rss_mib": 100.0, "threads": 16, "files": 30}
    return {
        "wrong": 0,
        "lost": 0,
        "unexpected": 0,
        "outcomes": {"unary": {"answered": 9}},
        "reloads": {"switched": 3, "published": 2, "loaded": 4},
        "steady": {"version_changes_seen": 3},
        "server": {
            "tracebacks": 0,
            "streams_open_at_the_end": 0,
            "second_quarter": quarters,
            "last_quarter": dict(quarters),
        },
    }


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("wrong",), 1, "1 wrong"),
        (("lost",), 2, "2 lost"),
        (("unexpected",), 3, "3 unexpected"),
        (("outcomes", "unary", "answered"), 0, "no answers for unary"),
        (("reloads", "switched"), 4, "3 of 4 reloads took effect"),
        (("reloads", "loaded"), 3, "2 of 3 reloads loaded a version"),
        (("server", "tracebacks"), 1, "1 tracebacks"),
        (("server", "streams_open_at_the_end"), 1, "1 streams left open"),
        (("server", "last_quarter", "rss_mib"), 119.0, "memory grew from 100.0 to 119.0 MiB"),
        (("server", "last_quarter", "threads"), 21, "threads grew"),
        (("server", "last_quarter", "files"), 47, "files grew"),
    ],
)
def test_what_is_not_well_is_a_failure(where, value, words):
    results = good_results()
    assert soak.failures(results) == []
    inner = results
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    assert any(words in failure for failure in soak.failures(results))
