"""TUF end to end: python-tuf's own client against the server, and everything a publisher or thief might try."""

from __future__ import annotations

import base64
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tuf.api.exceptions import ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import Updater

from skerry.core.errors import AuthError, BundleError, Conflict, GateFailed, InputError, UsageError
from skerry.core.release import manifest_path
from skerry.fleet import plane as planes
from skerry.fleet import repository
from skerry.fleet.plane import Plane
from skerry.fleet.repository import Repository, load_signer
from skerry.fleet.store import Metadata as MetadataRow


def updater(server, directory: Path) -> Updater:
    directory.mkdir(exist_ok=True)
    return Updater(
        str(directory),
        f"{server.url}/tuf/metadata/",
        target_dir=str(directory),
        target_base_url=f"{server.url}/tuf/targets/",
        bootstrap=(server.directory / "root.json").read_bytes(),
    )


def test_a_tuf_client_finds_and_verifies_a_manifest(server, bundle, tmp_path):
    made = bundle(b"one")
    server.publish([made], "v1", floor=3)
    client = updater(server, tmp_path / "tuf")
    client.refresh()
    info = client.get_targetinfo(manifest_path("v1", "ort-cpu"))
    assert info.hashes["sha256"] == made.digest
    assert info.custom["floor"] == 3 and info.custom["release"] == "v1"
    assert Path(client.download_target(info)).read_bytes() == made.manifest_bytes
    assert client.get_targetinfo("v9/ort-cpu.manifest.json") is None
    # The same client, later: a second release is a new version of everything, and the first stays.
    server.publish([bundle(b"two")], "v2")
    later = updater(server, tmp_path / "tuf")
    later.refresh()
    assert later.get_targetinfo(manifest_path("v1", "ort-cpu")).hashes == info.hashes
    assert later.get_targetinfo(manifest_path("v2", "ort-cpu")).custom["floor"] == 3


def test_the_server_signs_before_anything_expires(server, tmp_path):
    plane = server.plane
    assert not plane.refresh_metadata()
    with plane.store.write() as session:
        soon = datetime.now(UTC) + timedelta(hours=13)
        assert plane.repository.refresh(session, soon)
        later = datetime.now(UTC) + timedelta(days=5)
        assert plane.repository.refresh(session, later)
        assert plane.repository.newest_version(session, "snapshot") == 2
        assert plane.repository.newest_version(session, "timestamp") == 3
        assert not plane.repository.refresh(session, later)
    client = updater(server, tmp_path / "tuf")
    client.refresh()


def test_a_client_notices_a_server_that_stopped_signing(server, tmp_path):
    with server.plane.store.write() as session:
        session.query(MetadataRow).filter(MetadataRow.role == "timestamp").delete()
        assert server.plane.repository.refresh(session, datetime.now(UTC) - timedelta(days=2))
    with pytest.raises(ExpiredMetadataError):
        updater(server, tmp_path / "tuf").refresh()


def test_a_client_refuses_metadata_of_another_control_plane(server, tmp_path):
    planes.init(tmp_path / "other")
    client = Updater(
        str(tmp_path), f"{server.url}/tuf/metadata/", bootstrap=(tmp_path / "other/root.json").read_bytes()
    )
    with pytest.raises(RepositoryError):
        client.refresh()


def post_release(server, version, bundles, metadata):
    with server.client() as client:
        return client.post(
            "/api/v1/releases",
            {
                "version": version,
                "releases_metadata": base64.b64encode(metadata).decode(),
                "manifests": {"ort-cpu": base64.b64encode(bundles.manifest_bytes).decode()},
            },
        )


@pytest.fixture
def uploaded(server, bundle):
    """A bundle whose chunks are in the store."""
    from skerry.fleet.publish import upload

    made = bundle(b"one")
    with server.client() as client:
        assert upload(client, [made]) > 0
        assert upload(client, [made]) == 0
    return made


def next_metadata(server, made, signer=None, version="v1", custom=None):
    current = httpx.get(f"{server.url}/tuf/metadata/releases.json").content
    signer = signer or load_signer(server.directory / "publisher" / "releases.pem")
    return repository.extend_releases(
        current, signer, {manifest_path(version, "ort-cpu"): (made.manifest_bytes, custom or {"floor": 0})}
    )


def test_only_the_publishers_key_makes_a_release(server, uploaded):
    good = next_metadata(server, uploaded)
    thief = load_signer(server.directory / "server" / "snapshot.pem")
    forged = Metadata.from_bytes(good)
    forged.signatures.clear()
    forged.sign(thief)
    with pytest.raises(AuthError):
        post_release(server, "v1", uploaded, forged.to_bytes())
    with pytest.raises(AuthError, match="not signed by this key"):
        next_metadata(server, uploaded, signer=thief)
    assert server.client().releases() == []
    assert post_release(server, "v1", uploaded, good)["version"] == "v1"


def test_publication_is_idempotent_and_versions_are_final(server, uploaded, bundle):
    good = next_metadata(server, uploaded)
    assert post_release(server, "v1", uploaded, good) == post_release(server, "v1", uploaded, good)
    other = bundle(b"other")
    with pytest.raises(Conflict, match="already published"):
        server.publish([other], "v1")
    again = server.publish([uploaded], "v1")
    assert again["version"] == "v1" and again["uploaded_bytes"] == 0


def test_metadata_that_skips_drops_or_misnames_is_refused(server, uploaded, bundle):
    good = Metadata.from_bytes(next_metadata(server, uploaded))
    signer = load_signer(server.directory / "publisher" / "releases.pem")

    def resigned(change):
        metadata = Metadata[Targets].from_bytes(good.to_bytes())
        change(metadata.signed)
        metadata.signatures.clear()
        metadata.sign(signer)
        return metadata.to_bytes()

    def skip(signed):
        signed.version = 9

    def expire(signed):
        signed.expires = datetime.now(UTC) - timedelta(days=1)

    def misname(signed):
        signed.targets["v1/tensorrt-sm86.manifest.json"] = signed.targets.pop("v1/ort-cpu.manifest.json")

    for change, kind in ((skip, Conflict), (expire, InputError), (misname, InputError)):
        with pytest.raises(kind):
            post_release(server, "v1", uploaded, resigned(change))
    for rubbish in (b"", b"{}", b"[" * 10_000, httpx.get(f"{server.url}/tuf/metadata/1.root.json").content):
        with pytest.raises(InputError):
            post_release(server, "v1", uploaded, rubbish)
    post_release(server, "v1", uploaded, good.to_bytes())
    dropped = resigned(lambda signed: (setattr(signed, "version", 3), signed.targets.clear()))
    with pytest.raises(Conflict, match="drops"):
        post_release(server, "v2", bundle(b"two"), dropped)


def test_chunks_must_be_there_before_the_release(server, bundle):
    made = bundle(b"never uploaded")
    with pytest.raises(Conflict, match="not uploaded"):
        post_release(server, "v1", made, next_metadata(server, made))
    with server.plane.store.read() as session:
        assert server.plane.repository.newest_version(session, "releases") == 1


def test_bundles_that_fail_their_gate_are_refused_on_both_sides(server, bundle, tmp_path):
    from skerry.fleet.publish import upload

    failing = bundle(b"bad", passed=False)
    with pytest.raises(GateFailed, match=r"ppl_ratio 4\.2"):
        server.publish([failing], "v1")
    with server.client() as client:
        upload(client, [failing])
    with pytest.raises(GateFailed):
        post_release(server, "v1", failing, next_metadata(server, failing))
    unqualified = bundle(b"unrun", qualified=False)
    with pytest.raises(GateFailed, match="quality was not measured"):
        server.publish([unqualified], "v1")
    tampered = bundle(b"tampered")
    (tampered.path / "weights.bin").write_bytes(b"x" * 4096)
    with pytest.raises(BundleError):
        server.publish([tampered], "v1")
    twice = [bundle(b"a"), bundle(b"b")]
    with pytest.raises(UsageError, match="second bundle"):
        server.publish(twice, "v1")
    assert server.client().releases() == []


def test_a_control_plane_restored_from_an_old_backup_gets_no_signature(server, bundle, tmp_path):
    server.publish([bundle(b"one")], "v1")
    state = server.directory / "publisher" / "state.json"
    state.write_text('{"version": 7}')
    with pytest.raises(AuthError, match="this publisher signed 7"):
        server.publish([bundle(b"two")], "v2")


def test_new_offline_metadata_is_taken_in_from_files(server, tmp_path):
    plane, key = server.plane, load_signer(server.directory / "offline" / "root.pem")
    root = Metadata.from_bytes((server.directory / "root.json").read_bytes())
    root.signed.version = 2
    root.signatures.clear()
    root.sign(key)
    metadata = server.directory / "server" / "metadata"
    root.to_file(str(metadata / "2.root.json"))
    assert plane.refresh_metadata()
    client = updater(server, tmp_path / "tuf")
    client.refresh()
    assert client._trusted_set.root.version == 2
    # One that the old root did not sign is refused, and the newest good one stays.
    root.signed.version = 3
    root.signatures.clear()
    root.sign(load_signer(server.directory / "publisher" / "releases.pem"))
    root.to_file(str(metadata / "3.root.json"))
    with pytest.raises(AuthError):
        plane.refresh_metadata()
    (metadata / "3.root.json").unlink()


def test_offline_and_publisher_metadata_are_renewed_before_they_expire(server, bundle, tmp_path):
    from skerry.fleet.publish import renew

    server.publish([bundle(b"one")], "v1")
    planes.renew_offline(server.directory / "offline", server.directory / "server" / "metadata")
    assert server.plane.refresh_metadata()
    with server.client() as client:
        assert renew(client, server.directory / "publisher")["version"] == 3
    fresh = updater(server, tmp_path / "tuf")
    fresh.refresh()
    assert fresh._trusted_set.root.version == 2 and fresh._trusted_set.targets.version == 2
    assert fresh.get_targetinfo(manifest_path("v1", "ort-cpu")) is not None
    text = httpx.get(f"{server.url}/metrics").text
    assert 'skerry_fleet_metadata_expiry{role="releases"}' in text


def test_init_refuses_to_overwrite_and_opening_names_what_is_missing(tmp_path, settings):
    planes.init(tmp_path / "d")
    with pytest.raises(Conflict):
        planes.init(tmp_path / "d")
    for path in (tmp_path / "d").rglob("*.pem"):
        assert path.stat().st_mode & 0o077 == 0
    server = tmp_path / "d" / "server"
    assert not list(server.glob("*root*")) and not list(server.glob("targets.pem"))
    (server / "timestamp.pem").write_text("rubbish")
    with pytest.raises(AuthError, match=r"timestamp\.pem"):
        Plane.open(server, settings)
    shutil.copy(tmp_path / "d" / "offline" / "root.pem", server / "timestamp.pem")
    plane = Plane.open(server, settings)
    plane.close()
    assert isinstance(plane.repository, Repository)
