"""`rsm-client replay`: recordings of a real server against it, its bundle, and bundles that act otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from rsm_common.errors import RequestError
from rsm_common.policy import ActResult, Adjustment, Timing
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.client import PolicyClient
from rsm_serve.commands import client_cli
from rsm_serve.commands.replay import compare
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Selection
from rsm_serve.local import open_policy
from rsm_serve.recording.format import MAGIC, encode, numbered_files, read
from rsm_serve.server import PolicyServer, background_server
from tests.bundles import make_model, make_probe, make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.engine.test_guarded_answers import HIGH, LOW, guarded
from tests.rsm_serve.recording.records import OBS, make_record
from tests.rsm_serve.test_server import ANY_PORT, wait_until

ASKED = 6


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:1; tiny:2, which acts otherwise because its noise has another shape; other:1."""
    repo = tmp_path_factory.mktemp("repository")
    write_bundle(repo, make_spec("tiny", "1"))
    write_bundle(repo, make_spec("tiny", "2", steps=5))
    write_bundle(repo, make_spec("other", "1", obs_size=6, has_q=False))
    return repo


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    policies = (Selection("tiny", 1), Selection("tiny", 2), Selection("other"))
    with background_server(
        ServerConfig.from_options(repo=repo, addresses=ANY_PORT, policies=policies)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def records(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ASKED answered requests of tiny:1, by all protocols, a refused one, and one of another policy."""
    directory = tmp_path_factory.mktemp("records")
    config = ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, record=directory, policies=(Selection("tiny", 1), Selection("other"))
    )
    with background_server(config) as server:
        address = server.addresses[0]
        with PolicyClient(address, "tiny", client_id="arm-7", timeout_s=HANG_S) as client:
            client.act(OBS)
            client.act(OBS[0], deterministic=True)
            client.act(OBS[:2], noise=draw_noise(expand_seed(5, 2), (3, 2, 2)))
            with client.stream() as stream:
                stream.act(OBS[1])
                stream.act(OBS[2], seed=2**64 - 1)
            with pytest.raises(RequestError):
                client.act(np.zeros((65, 4)))
        with triton.InferenceServerClient(address) as other:
            tensor = triton.InferInput("obs", [9, 4], "FP32")
            tensor.set_data_from_numpy(OBS)
            other.infer("tiny", [tensor])
        with PolicyClient(address, "other", timeout_s=HANG_S) as client:
            client.act(np.zeros(6))
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = client_cli.main(["replay", *map(str, arguments)])
    return status, *capsys.readouterr()


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    content: dict[str, Any] = json.loads(out)
    return status, content


class TestAgreement:
    def test_with_the_server(self, capsys, records, server):
        status, found = report(capsys, records, "--against", server.addresses[0])
        assert status == 0
        assert found["agrees"] is True
        assert (found["compared"], found["equal"], found["rows"]) == (ASKED + 1, ASKED + 1, 24)
        assert found["failed_then"] == {"INVALID_ARGUMENT": 1}
        assert found["largest_difference"] < 1e-5
        assert found["worst"] == []
        assert found["latency_us"]["then"]["total"]["p50"] > found["latency_us"]["then"]["compute"]["p50"] > 0
        assert found["latency_us"]["now"]["total"]["p50"] > 0

    def test_with_one_policy_of_the_server(self, capsys, records, server):
        status, found = report(capsys, records, "--against", f"grpc://{server.addresses[0]}/tiny")
        assert (status, found["compared"], found["other_policies"]) == (0, ASKED, 1)
        status, found = report(capsys, records, "--against", server.addresses[0], "--policy", "other")
        assert (status, found["compared"], found["other_policies"]) == (0, 1, ASKED + 1)

    @pytest.mark.parametrize("place", ["tiny", "tiny/1"])
    def test_with_the_bundle(self, capsys, records, repo, place):
        status, found = report(capsys, records, "--against", repo / place)
        assert (status, found["compared"], found["equal"]) == (0, ASKED, ASKED)

    def test_with_a_link_to_the_bundle(self, capsys, records, repo, tmp_path):
        (tmp_path / "other").symlink_to(repo / "tiny", target_is_directory=True)
        status, found = report(capsys, records, "--against", tmp_path / "other")
        assert (status, found["compared"]) == (
            0,
            report(capsys, records, "--against", repo / "tiny")[1]["compared"],
        )

    def test_with_the_server_that_records_there(self, capsys, bundle_repo, tmp_path):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, record=tmp_path)
        with background_server(config) as server:
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                for _ in range(20):
                    client.act(np.zeros(4))
            wait_until(lambda: len(list(read(tmp_path))) == 20 if numbered_files(tmp_path) else False, "20")
            status, found = report(capsys, tmp_path, "--against", server.addresses[0])
        assert (status, found["records"], found["compared"]) == (0, 20, 20)

    def test_as_text_and_of_a_few(self, capsys, records, repo):
        status, out, _ = run(capsys, records, "--against", repo / "tiny", "--limit", 2)
        assert status == 0
        assert out.startswith(f"2 of 2 records agree to the policy's tolerance with {repo / 'tiny'}\n")
        assert "then p50" in out

    def test_of_a_guarded_server(self, capsys, bundle_repo, tmp_path):
        with (
            guarded(bundle_repo, max_action_step=0.25, fallback="center", record=tmp_path) as (
                server,
                session,
            ),
            PolicyClient(server.addresses[0], client_id="arm", timeout_s=HANG_S) as client,
        ):
            assert client.act(LOW, seed=1).adjusted is None
            assert client.act(HIGH, seed=1).adjusted == Adjustment.LIMITED
            session.broken = True
            assert client.act(HIGH, seed=1).adjusted == Adjustment.CENTERED
            session.broken = False
        status, found = report(capsys, tmp_path, "--against", bundle_repo / "tiny")
        assert (status, found["equal"], found["fallbacks_then"]) == (0, 2, 1)
        with guarded(bundle_repo, max_action_step=0.25, fallback="center") as (server, session):
            status, found = report(capsys, tmp_path, "--against", server.addresses[0])
            assert (status, found["equal"], found["compared"]) == (0, 2, 2)
            session.broken = True
            status, found = report(capsys, tmp_path, "--against", server.addresses[0])
            assert (status, found["compared"]) == (1, 0)
            assert found["failed_now"] == {"the policy failed, and the server answered with its fallback": 2}


class TestDifference:
    def test_a_new_version_with_the_old_ones_records(self, capsys, records, server, repo):
        # The one request that brings its noise has another shape there.
        for against in (f"grpc://{server.addresses[0]}/tiny", repo / "tiny"):
            status, found = report(capsys, records, "--against", against, "--version", 2)
            assert status == 1
            assert found["agrees"] is False
            assert (found["compared"], sum(found["failed_now"].values())) == (ASKED - 1, 1)
            assert found["equal"] < ASKED - 1
            assert found["largest_difference"] > 0.01
            assert found["differing_q_rows"] == 0
            assert found["tied_rows"] == found["differing_rows"] > 0
            worst = found["worst"]
            assert [one["difference"] for one in worst] == sorted(
                (one["difference"] for one in worst), reverse=True
            )
            assert worst[0]["client_id"] in ("arm-7", "")
        status, out, _ = run(capsys, records, "--against", repo / "tiny" / "2")
        assert status == 1
        assert "failed now, 1 times: wanted noise of shape" in out
        assert "arm-7" in out

    def test_a_bundle_of_the_same_version_that_acts_otherwise(self, capsys, records, tmp_path):
        spec = make_spec("tiny", "1")
        wider = make_spec("tiny", "1", particles=3)
        write_bundle(tmp_path, wider, model=make_model(wider), probe=make_probe(wider))
        status, found = report(capsys, records, "--against", tmp_path / "tiny", "--policy", spec.name)
        assert status == 1
        assert 0 < found["differing_rows"] <= found["rows"]

    def test_a_tolerance_lets_pass_what_is_smaller(self, capsys, records, repo):
        arguments = (records, "--against", repo / "tiny" / "2", "--limit", 1)
        largest = report(capsys, *arguments)[1]["largest_difference"]
        assert report(capsys, *arguments, "--tolerance", largest * 1.01)[0] == 0
        assert report(capsys, *arguments, "--tolerance", largest * 0.99)[0] == 1

    def test_versions_that_are_not_there_are_named(self, capsys, records, repo, tmp_path):
        elsewhere = tmp_path / "new.rsmrec"
        answer = open_policy(repo / "tiny" / "1").act(OBS[:2], seed=3)
        there = make_record(
            version="1", seeds=answer.seed, q=None, action=answer.action, policy_action=answer.action
        )
        elsewhere.write_bytes(MAGIC + encode(there) + encode(make_record(version="7")))
        status, found = report(capsys, elsewhere, "--against", repo / "tiny")
        assert (status, found["equal"], found["missing_records"]) == (1, 1, 1)
        assert list(found["missing"]) == ["tiny:7"]

    def test_particles_that_tie_and_values_that_differ(self):
        spec = make_spec()
        record = make_record(3, action=np.zeros((3, 2), np.float32), policy_action=np.zeros((3, 2), np.float32))
        action = np.array([[0, 0], [0.4, 0], [0, -0.8]], np.float32)
        assert record.q is not None
        q = record.q + np.array([0, 0, 1], np.float32)
        result = ActResult(action, q, None, "1", Timing())
        found = compare(1, record, result, spec, 1e-4)
        assert (found.rows, found.tied_rows, found.q_rows) == (2, 1, 1)
        assert found.action == pytest.approx(0.2)
        nan = compare(1, record, ActResult(action * np.nan, q, None, "1", Timing()), spec, 1e-4)
        assert nan.rows == 3


class TestMistakes:
    def test_damaged_files_are_read_as_far_as_they_go(self, capsys, records, repo, tmp_path):
        (file,) = numbered_files(records)
        whole = file.read_bytes()
        cut = tmp_path / "00000001.rsmrec"
        cut.write_bytes(whole[:-5])
        status, found = report(capsys, cut, "--against", repo / "tiny")
        assert (status, found["unreadable"]) == (0, 1)
        assert found["records"] == len(list(read(records))) - 1
        status, out, _ = run(capsys, tmp_path, "--against", repo / "tiny")
        assert "1 unreadable" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere", "--against", "127.0.0.1:1"], "wanted files or directories of records"),
            (["RECORDS", "--against", "nowhere"], "wanted an address such as"),
            (["RECORDS", "--against", "a" * 300], "wanted an address such as"),  # no file can have such a name
            (["RECORDS", "--against", "REPO"], "bundle"),
            (["RECORDS", "--against", "REPO/tiny", "--version", "9"], "wanted answers for tiny:1"),
            (["RECORDS", "--against", "REPO/tiny/2", "--version", "1"], "wanted version 1, got the bundle"),
            (
                ["RECORDS", "--against", "REPO/tiny", "--version", "abc"],
                "wanted the number of a version such as 3",
            ),
            (["x" * 300, "--against", "127.0.0.1:1"], "File name too long"),
            (["RECORDS", "--against", "REPO/tiny", "--policy", "x"], "wanted records of answered requests"),
            (["RECORDS", "--against", "REPO/tiny", "--tolerance", "2"], "tolerance"),
            (["RECORDS", "--against", "127.0.0.1:1", "--timeout", str(HANG_S)], "no policy server answers"),
        ],
    )
    def test_one_sentence_and_status_2(self, capsys, one_attempt, records, repo, arguments, message):
        places = {"RECORDS": str(records), "REPO": str(repo)}
        given = [places.get(word, word.replace("REPO/", f"{repo}/")) for word in arguments]
        status, out, err = run(capsys, *given)
        assert (status, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
