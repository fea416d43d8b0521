"""The recorder: requests of every protocol through a real server, and what it drops."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from rsm_common.errors import AddressError, BundleError, ConfigError, InvalidRequestError
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.observe.settled import Settled
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.recording.files import RotatingFiles
from rsm_serve.recording.format import numbered_files, read
from rsm_serve.recording.recorder import MAX_PENDING_BYTES, Recorder
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.hang import HANG_S
from tests.rsm_serve.commands.test_serve_cli import serving
from tests.rsm_serve.http.ask import scrape
from tests.rsm_serve.recording.records import OBS, recorded
from tests.rsm_serve.test_server import ANY_PORT, Gated, Rig, miss_a_deadline, wait_until, watch_queue


def config(repo: Path, directory: Path, **settings) -> ServerConfig:
    return ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, backend="onnxruntime", record=directory, **settings
    )


def assert_recorded(record: Any, answer: Any) -> None:
    """That the record is the answer's, of arm-7."""
    assert np.array_equal(record.action.reshape(answer.action.shape), answer.action)
    assert np.array_equal(record.q.reshape(answer.q.shape), answer.q)
    if record.noise is None:
        assert np.array_equal(record.seeds.reshape(answer.seed.shape), answer.seed)
    assert (record.policy, record.version, record.client_id) == ("tiny", "1", "arm-7")
    assert 0 < record.timing.compute_us < record.timing.total_us < answer.timing.total_us
    assert record.policy_action is record.action


class TestServer:
    def test_what_every_protocol_asks_is_recorded(self, bundle_repo, tmp_path):
        noise = draw_noise(expand_seed(5, 2), (3, 2, 2))
        with background_server(config(bundle_repo, tmp_path / "new" / "records")) as server:
            address = server.addresses[0]
            with PolicyClient(address, client_id="arm-7", timeout_s=HANG_S) as client:
                answers = [
                    client.act(OBS[0]),
                    client.act(OBS[:2], seed=7),
                    client.act(OBS[0], deterministic=True),
                ]
                answers.append(client.act(OBS[:2], noise=noise))
                with client.stream() as stream:
                    answers.append(stream.act(OBS[3]))
            with triton.InferenceServerClient(address) as other:
                tensor = triton.InferInput("obs", [2, 4], "FP32")
                tensor.set_data_from_numpy(OBS[:2])
                result = other.infer("tiny", [tensor], parameters={"seed": 9, "client_id": "t"})
        records = recorded(tmp_path / "new" / "records")
        assert [record.method for record in records] == [*4 * ["Act"], "ActStream", "ModelInfer"]
        for record, answer in zip(records, answers, strict=False):
            assert_recorded(record, answer)
        assert [record.deterministic for record in records] == [False, False, True, False, False, False]
        assert np.array_equal(records[3].noise, noise)
        assert records[3].seeds is None
        assert np.array_equal(records[5].action, result.as_numpy("action"))
        assert (records[5].client_id, records[5].seeds[0]) == ("t", 9)
        assert np.array_equal(records[5].obs, OBS[:2])
        times = [record.arrived_unix_ns for record in records]
        assert times == sorted(times)
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "records").iterdir()
        }
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE((tmp_path / "new" / "records").stat().st_mode) == 0o700

    def test_failures_are_recorded_with_their_reason(self, bundle_repo, tmp_path):
        with background_server(config(bundle_repo, tmp_path)) as server:
            with PolicyClient(server.addresses[0], client_id="arm", timeout_s=HANG_S) as client:
                with pytest.raises(InvalidRequestError):
                    client.act(np.zeros((65, 4)))
                client.act(OBS[0])
            with grpc.insecure_channel(server.addresses[0]) as channel:
                act = policy_pb2_grpc.PolicyServiceStub(channel).Act
                with pytest.raises(grpc.RpcError):
                    act(pb.ActRequest(policy="x" * 1000, rows=1), timeout=HANG_S)
        refused, answered, unknown = recorded(tmp_path)
        assert (refused.code, refused.reason, refused.client_id) == ("INVALID_ARGUMENT", "invalid", "arm")
        assert (refused.policy, refused.version, refused.obs) == ("tiny", "1", None)
        assert answered.ok
        assert (unknown.code, unknown.policy) == ("NOT_FOUND", "x" * 128)

    def test_a_request_that_is_given_up_is_recorded_with_its_observation(self, own_repo, tmp_path):
        bundle = load_bundle(own_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        with (
            background_server(config(own_repo, tmp_path / "r"), [lane]) as server,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
        ):
            rig = Rig(server, session, lane)
            first = rig.hold_worker(client)
            waiting = watch_queue(lane.batcher)
            missed = miss_a_deadline(lambda hasty: hasty.act(OBS[0]), rig.address, lambda: bool(waiting))
            rig.wait_queued(0)
            rig.open()
            first.result(HANG_S)
            rig.pool.shutdown()
        late = [record for record in recorded(tmp_path / "r") if not record.ok]
        assert 1 <= len(late) <= missed
        for record in late:
            assert (record.code, record.action) == ("DEADLINE_EXCEEDED", None)
        assert np.array_equal(late[-1].obs[0], OBS[0])

    def test_a_restart_goes_on_in_a_new_file_and_metrics_count(self, bundle_repo, tmp_path):
        for count in (1, 2):
            with background_server(config(bundle_repo, tmp_path, http="127.0.0.1:0")) as server:
                with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                    client.act(OBS[0])
                wait_until(lambda: scrape(server)["rsm_records_total{}"] == 1, "the record")
                assert scrape(server)["rsm_dropped_records_total{reason=disk}"] == 0
            assert len(numbered_files(tmp_path)) == count
        assert len(list(read(tmp_path))) == 2

    def test_two_servers_do_not_share_a_directory(self, bundle_repo, tmp_path):
        with (
            background_server(config(bundle_repo, tmp_path)),
            pytest.raises(ConfigError, match="another one records; choose another --record"),
            background_server(config(bundle_repo, tmp_path)),
        ):
            pass

    def test_a_directory_that_cannot_be_is_refused(self, bundle_repo, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(ConfigError, match="wanted a directory to record in"),
            background_server(config(bundle_repo, tmp_path / "file")),
        ):
            pass

    def test_a_directory_that_vanishes_does_not_disturb_serving(self, bundle_repo, tmp_path, caplog):
        directory = tmp_path / "records"
        with (
            background_server(config(bundle_repo, directory, http="127.0.0.1:0")) as server,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
        ):
            client.act(OBS[0])
            wait_until(lambda: scrape(server)["rsm_records_total{}"] == 1, "the record")
            shutil.rmtree(directory)
            client.act(OBS[1])
            dropped = "rsm_dropped_records_total{reason=disk}"
            wait_until(lambda: scrape(server)[dropped] == 1, "the dropped record")
            directory.mkdir()

            def recorded_again() -> bool:
                client.act(OBS[2])
                return scrape(server)["rsm_records_total{}"] >= 2

            wait_until(recorded_again, "a record in the new directory")
        assert len([r for r in caplog.records if "requests are not recorded" in r.getMessage()]) <= 2
        assert all(np.array_equal(record.obs[0], OBS[2]) for record in recorded(directory))

    def test_the_answers_of_a_killed_server_are_there(self, bundle_repo, tmp_path):
        arguments = ["--repo", str(bundle_repo), "--address", "127.0.0.1:0"]
        with serving([*arguments, "--record", str(tmp_path)]) as (process, address, _):
            with PolicyClient(address, timeout_s=HANG_S) as client:
                for _ in range(20):
                    client.act(OBS[0])
                wait_until(lambda: len(list(read(tmp_path))) == 20 if numbered_files(tmp_path) else False, "20")
            process.send_signal(signal.SIGKILL)
            process.wait(HANG_S)
        assert len(list(read(tmp_path))) == 20


def refusal(policy: str) -> Settled:
    """A request that was refused before it was queued."""
    return Settled("rsm.v1.PolicyService", "Act", policy, "1", "", 0, 0.0, "INVALID_ARGUMENT", "invalid")


class TestRecorder:
    def test_a_directory_that_was_made_anew_is_locked_anew(self, tmp_path):
        directory = tmp_path / "records"
        files = RotatingFiles(directory, 2**20)
        files.append(b"one")
        shutil.rmtree(directory)
        directory.mkdir()
        files.look()
        files.append(b"two")
        with pytest.raises(ConfigError, match="another one records"):
            RotatingFiles(directory, 2**20)
        shutil.rmtree(directory)
        other = RotatingFiles(directory, 2**20)
        files.look()
        with pytest.raises(OSError, match="another server records in .* now"):
            files.append(b"three")
        other.close()
        assert files.append(b"four")
        files.close()

    def test_what_the_writer_cannot_keep_up_with_is_dropped_and_told_once(self, tmp_path, caplog):
        recorder, count = Recorder(tmp_path, 2**26), MAX_PENDING_BYTES // 1024 + 100
        for _ in range(count):  # the writer does not run yet
            recorder.settled(refusal("tiny"))
        dropped = recorder.counts.dropped["behind"]
        assert 90 < dropped < 110
        recorder.start()
        recorder.close()
        assert recorder.counts.written == count - dropped == len(list(read(tmp_path)))
        told = [line for line in caplog.messages if "requests were answered and not recorded" in line]
        assert told == [f"{dropped} requests were answered and not recorded: the disk does not keep up"]
        recorder.close()

    def test_long_names_of_refused_requests_count_against_the_bound(self, tmp_path):
        recorder = Recorder(tmp_path, 2**26)
        for _ in range(100):  # the writer does not run yet
            recorder.settled(refusal("x" * 2**20))
        assert recorder.counts.dropped["behind"] > 80

    def test_a_record_larger_than_a_file_is_dropped(self, tmp_path):
        recorder = Recorder(tmp_path, 1000)
        recorder.settled(refusal("x" * 128))
        recorder.start()
        recorder.close()
        assert recorder.counts.dropped["too_large"] == 1


def test_the_policy_of_a_record_gives_its_action_again(bundle_repo, tmp_path):
    with (
        background_server(config(bundle_repo, tmp_path)) as server,
        PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
    ):
        client.act(OBS)
    (record,) = recorded(tmp_path)
    with_seeds = open_policy(bundle_repo / "tiny").act(record.obs, seed=record.seeds)
    assert np.allclose(with_seeds.action, record.action, atol=1e-6)


class TestStart:
    def test_a_bad_directory_is_refused_before_the_load(self, bundle_repo, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr("rsm_serve.server.load_repository", lambda *_: pytest.fail("loaded"))
        with pytest.raises(ConfigError, match="file"):
            PolicyServer(config(bundle_repo, tmp_path / "file"))

    def test_a_load_that_fails_releases_the_directory(self, bundle_repo, tmp_path, monkeypatch):
        def broken(*_: Any) -> None:
            raise BundleError("damaged")

        with monkeypatch.context() as patch:
            patch.setattr("rsm_serve.server.load_repository", broken)
            with pytest.raises(BundleError, match="damaged"):
                PolicyServer(config(bundle_repo, tmp_path / "records"))
        with background_server(config(bundle_repo, tmp_path / "records")) as server:
            assert server.addresses

    def test_an_address_in_use_releases_the_directory(self, bundle_repo, tmp_path):
        with background_server(config(bundle_repo, tmp_path / "first")) as first:
            settings = dataclasses.replace(config(bundle_repo, tmp_path / "records"), addresses=first.addresses)
            with pytest.raises(AddressError), background_server(settings):
                pytest.fail("started")
        with background_server(config(bundle_repo, tmp_path / "records")) as server:
            assert server.addresses
