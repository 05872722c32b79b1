"""Who may do what: tokens, signatures, replay, revocation."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from skerry.core.errors import AuthError, SkerryError
from skerry.core.wire import generate_key, public_hex
from skerry.fleet import auth, enrol
from skerry.fleet.store import Base, Store

DEVICE = {"arch": "x86_64", "os": "Linux", "cores": 2, "memory_bytes": 1 << 30, "gpus": [], "backends": ["ort-cpu"], "ops": []}  # fmt: skip  # noqa: E501


def request(token, name="n1", key=None, **changes):
    key = key or public_hex(generate_key())
    return {"token": token, "name": name, "public_key": key, "device": DEVICE, "labels": {}, **changes}


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "fleet.db")
    store.migrate()
    yield store
    store.close()


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_wrong_used_and_expired_tokens_enrol_nobody(server, client, join):
    token = client.create_token(1, 60)["token"]
    post = lambda document: httpx.post(f"{server.url}/api/v1/enrol", json=document)  # noqa: E731
    assert error_of(post(request("skerry-wrong"))) == (401, "unauthorized")
    assert error_of(post(request(""))) == (401, "unauthorized")
    assert post(request(token, "first")).status_code == 201
    answer = post(request(token, "second"))
    assert error_of(answer) == (401, "unauthorized") and "used up" in answer.json()["error"]["message"]
    with server.plane.store.write() as session:
        late, _ = enrol.create_token(session, 1, 1.0, now=time.time() - 10)
    assert "expired" in post(request(late, "third")).json()["error"]["message"]
    assert [node["name"] for node in client.nodes()] == ["first"]


def test_a_node_that_lost_the_answer_enrols_again_for_free(server, client):
    token = client.create_token(1, 60)["token"]
    document = request(token, "n1")
    post = lambda changed: httpx.post(f"{server.url}/api/v1/enrol", json=changed)  # noqa: E731
    first, again = post(document), post(document)
    assert first.status_code == again.status_code == 201
    assert first.json()["node"] == again.json()["node"]
    # The same key under another name is a copied directory, another key under the same name an impostor.
    many = client.create_token(5, 60)["token"]
    assert error_of(post({**document, "token": many, "name": "clone"})) == (409, "conflict")
    assert error_of(post(request(many, "n1"))) == (409, "conflict")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../etc"},
        {"name": ""},
        {"name": "a" * 64},
        {"public_key": "zz"},
        {"public_key": 7},
        {"labels": {"a": 1}},
        {"labels": {str(i): "x" for i in range(100)}},
        {"labels": [1]},
        {"device": None},
        {"device": {"arch": "x"}},
    ],
)  # fmt: skip
def test_malformed_enrolments_are_refused(shared, changes):
    with shared.client() as client:
        token = client.create_token(1, 60)["token"]
        answer = httpx.post(f"{shared.url}/api/v1/enrol", json=request(token, **changes))
        assert error_of(answer) == (400, "invalid_input")
        assert client.nodes() == []


@given(uses=st.integers(1, 4), tries=st.lists(st.integers(0, 5), max_size=10))
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_token_enrols_exactly_as_many_nodes_as_it_says(tmp_path_factory, uses, tries):
    """Whatever the order of names, repeats included: never more nodes than uses."""
    store = Store(tmp_path_factory.mktemp("db") / "f.db")
    Base.metadata.create_all(store.engine)
    keys = [public_hex(generate_key()) for _ in range(6)]
    with store.write() as session:
        token, _ = enrol.create_token(session, uses, 60)
    enrolled: set[int] = set()
    for which in tries:
        try:
            with store.write() as session:
                enrol.enrol(session, request(token, f"n{which}", keys[which]))
            enrolled.add(which)
        except AuthError:
            assert len(enrolled) == uses and which not in enrolled
    assert len(enrolled) == min(uses, len(set(tries)))
    store.close()


counter = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(counter, max_size=30))
def test_replay_rule_accepts_each_request_at_most_once_and_in_order(sent):
    last, accepted = (0, 0), []
    for boot, seq in sent:
        if auth.newer(boot, seq, *last):
            last = (boot, seq)
            accepted.append(last)
    assert accepted == sorted(set(accepted))


def test_replayed_forged_and_foreign_requests_change_nothing(server, client, join):
    node, other = join("n1"), join("n2")
    assert node.call("GET", "desired").status_code == 200
    assert error_of(node.call("GET", "desired", seq=node.seq)) == (401, "replay")
    assert error_of(node.call("GET", "desired", boot=0, seq=999)) == (401, "replay")
    assert error_of(node.call("GET", "desired", key=generate_key())) == (401, "unauthorized")
    # A signature over one body does not carry another, nor another node's path.
    signed = auth_headers(node, "heartbeat", b"{}")
    path = f"/api/v1/nodes/{node.id}/heartbeat"
    assert error_of(node.http.post(path, content=b'{"x":1}', headers=signed)) == (401, "unauthorized")
    stolen = {**auth_headers(node, "desired", b""), "Skerry-Node": other.id}
    answer = node.http.get(f"/api/v1/nodes/{other.id}/desired", headers=stolen)
    assert error_of(answer) == (401, "unauthorized")
    assert error_of(node.http.get(f"/api/v1/nodes/{node.id}/desired")) == (401, "unauthorized")
    # Failed attempts used up no number.
    with server.plane.store.read() as session:
        row = enrol.find(session, "n1")
        assert (row.boot, row.seq) == (1, 1)
    node.boot, node.seq = 2, 0
    assert node.call("GET", "desired").status_code == 200


def auth_headers(node, leaf, body):
    from skerry.core.wire import request_signature

    method = "GET" if leaf == "desired" else "POST"
    return request_signature(node.key, node.id, method, f"/api/v1/nodes/{node.id}/{leaf}", 1, 500, body)


def test_revoked_and_unknown_nodes(server, client, join):
    node = join("n1")
    node.step()
    client.revoke("n1")
    assert error_of(node.call("GET", "desired")) == (403, "revoked")
    assert error_of(node.heartbeat()) == (403, "revoked")
    token = client.create_token(1, 60)["token"]
    assert error_of(node.enrol(token)) == (403, "revoked")
    node.id = "nobody-123456"
    assert error_of(node.call("GET", "desired")) == (404, "not_found")
    # Its name is free again for a node with a new key.
    replacement = join("n1")
    replacement.step()
    assert [n["status"] for n in client.nodes()].count("online") == 1


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", "Basic !!!", "Digest x", "Bearer \x00"])
def test_operators_need_their_token(shared, authorization):
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in (
        ("GET", "/api/v1/nodes"),
        ("POST", "/api/v1/tokens"),
        ("PUT", f"/api/v1/blobs/{'0' * 64}"),
        ("POST", "/api/v1/releases"),
        ("POST", "/api/v1/rollouts"),
        ("GET", "/api/v1/audit"),
        ("GET", "/api/v1/drift"),
    ):
        try:
            answer = httpx.request(method, shared.url + path, headers=headers)
        except httpx.HTTPError:
            continue
        assert answer.status_code in (400, 401)


def test_operator_token_is_compared_by_digest(tmp_path: Path):
    auth.OperatorTokens.save(tmp_path / "a", "right")
    assert "right" not in (tmp_path / "a").read_text()
    tokens = auth.OperatorTokens(tmp_path / "a")
    tokens.check("Bearer right")
    tokens.check("Basic b3BlcmF0b3I6cmlnaHQ=")
    for wrong in ("Bearer Right", "Bearer right2", "Basic b3BlcmF0b3I6d3Jvbmc="):
        with pytest.raises(SkerryError):
            tokens.check(wrong)


def test_migrations_make_the_schema_that_the_models_describe(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
