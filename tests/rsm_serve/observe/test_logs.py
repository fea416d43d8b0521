"""The log as text and JSON, and under a flood."""

from __future__ import annotations

import io
import json
import logging

import pytest

from rsm_serve.observe.logs import BURST, FloodFilter, JsonFormatter, is_no_departure


@pytest.fixture
def log():
    """(logger, the text that it has written, the clock)."""
    now = [100.0]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(FloodFilter(lambda: now[0]))
    logger = logging.Logger("rsm_serve.test")
    logger.addHandler(handler)
    return logger, stream, now


def test_a_line_is_one_json_object(log):
    logger, stream, _ = log
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed: %s", 'a\n"b"', extra={"policy": "tiny", "version": "1", "request_id": 7})
    (text,) = stream.getvalue().splitlines()
    line = json.loads(text)
    assert line["time"].endswith("+00:00")
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "rsm_serve.test", 'failed: a\n"b"')
    assert (line["policy"], line["version"], line["request_id"]) == ("tiny", "1", 7)
    assert line["exception"].endswith("ValueError: two\nlines")
    logger.info("plain", extra={"obs": [1.5]})
    assert set(json.loads(stream.getvalue().splitlines()[1])) == {"time", "level", "logger", "message"}


def test_a_caller_that_left_is_no_error_of_the_server():
    class ExecuteBatchError(Exception):
        """What gRPC raises when it cannot send an answer."""

    def record(name: str, error: Exception) -> logging.LogRecord:
        return logging.LogRecord(name, logging.ERROR, "", 1, "failed", None, (type(error), error, None))

    assert not is_no_departure(record("grpc._cython.cygrpc", ExecuteBatchError()))
    assert is_no_departure(record("grpc._cython.cygrpc", ValueError()))
    assert is_no_departure(record("rsm_serve.server", ExecuteBatchError()))


def test_a_flood_is_cut_and_counted(log):
    logger, stream, now = log

    def fail(times: int) -> None:
        for number in range(times):
            logger.error("request %d failed", number)

    fail(1000)
    assert len(stream.getvalue().splitlines()) == BURST
    logger.error("of another place")
    assert len(stream.getvalue().splitlines()) == BURST + 1
    now[0] += 1.5
    fail(5)
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert last["message"] == f"request 0 failed ({1000 - BURST} more like it were not logged)"
    assert len(stream.getvalue().splitlines()) == BURST + 2
    for number in range(100):
        logger.info("%d loaded", number)
    assert len(stream.getvalue().splitlines()) == BURST + 102, "what is no fault is not cut"


def test_a_long_message_is_cut(log):
    logger, stream, _ = log
    logger.error("x" * 100_000)
    assert len(stream.getvalue()) < 5000
