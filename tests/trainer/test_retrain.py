"""The client of retrain requests against a control plane over HTTP."""

from __future__ import annotations

import pytest

from skerry.core.errors import AuthError, Conflict, Unavailable
from skerry.trainer.retrain import RetrainClient


@pytest.fixture
def token(tmp_path, control_plane):
    path = tmp_path / "token"
    path.write_text(control_plane[0].token + "\n")
    return path


def test_claim_and_finish(control_plane, token):
    plane, url = control_plane
    plane.file("rt-1", "numpy")
    with RetrainClient(url + "/", token) as client:
        assert [one["id"] for one in client.open_requests()] == ["rt-1"]
        assert client.act("rt-1", "claim", owner="a")["state"] == "claimed"
        assert client.act("rt-1", "claim", owner="a")["state"] == "claimed"
        with pytest.raises(Conflict, match="rt-1 is claimed"):
            client.act("rt-1", "claim", owner="b")
        assert client.open_requests() == []
        assert client.act("rt-1", "complete", owner="a", release="v2")["state"] == "completed"


def test_errors(control_plane, token, tmp_path, free_port):
    _, url = control_plane
    with pytest.raises(AuthError, match="read token"):
        RetrainClient(url, tmp_path / "none")
    token.write_text("wrong")
    with RetrainClient(url, token) as client, pytest.raises(AuthError, match="wrong token"):
        client.open_requests()
    with RetrainClient(f"http://127.0.0.1:{free_port}", token) as client, pytest.raises(Unavailable) as caught:
        client.open_requests()
    assert "skerry fleet serve" in caught.value.hint
