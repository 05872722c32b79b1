"""Fixtures that several folders share."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

# A job that a script put into the background ignores SIGINT, and so would every child; tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
