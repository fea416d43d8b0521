"""Requests recorded by a real server, read back, and what disturbs a recorder but not the server."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from rsm_common.errors import ConfigError, DeadlineExpiredError, InvalidRequestError, UsageError
from rsm_common.policy import Adjustment, Timing
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.observe.settled import Settled
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.recording.files import RotatingFiles
from rsm_serve.recording.format import MAGIC, Record, encode, numbered_files, read
from rsm_serve.recording.recorder import MAX_PENDING_BYTES, Recorder
from rsm_serve.server import background_server
from tests.rsm_serve.commands.test_serve_cli import serving
from tests.rsm_serve.http.ask import scrape
from tests.rsm_serve.test_server import ANY_PORT, wait_until

OBS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def config(repo: Path, directory: Path, **settings) -> ServerConfig:
    return ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, backend="onnxruntime", record=directory, **settings
    )


def recorded(directory: Path) -> list[Any]:
    """Untyped: the tests know what there is."""
    return list(read(directory))


def make_record(rows: int = 2, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "policy": "tiny",
        "version": "3",
        "method": "Act",
        "client_id": "arm-7",
        "arrived_unix_ns": 1_700_000_000_123_456_789,
        "obs": OBS[:rows],
        "seeds": expand_seed(2**64 - 1, rows),
        "noise": None,
        "action": OBS[:rows, :2],
        "q": OBS[:rows, 0],
        "policy_action": OBS[:rows, :2],
        "timing": Timing(1.5, 2.5, 3.5, 4, 9.5),
    }
    return Record(**fields | changes)


def assert_same(one: Record, other: Record) -> None:
    for name in Record.__dataclass_fields__:
        mine, yours = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == yours.dtype, name
            assert np.array_equal(mine, yours), name
        else:
            assert mine == yours, name


def assert_recorded(record: Any, answer: Any) -> None:
    """That the record is the answer's, of arm-7."""
    assert np.array_equal(record.action.reshape(answer.action.shape), answer.action)
    assert np.array_equal(record.q.reshape(answer.q.shape), answer.q)
    if record.noise is None:
        assert np.array_equal(record.seeds.reshape(answer.seed.shape), answer.seed)
    assert (record.policy, record.version, record.client_id) == ("tiny", "1", "arm-7")
    assert 0 < record.timing.compute_us < record.timing.total_us < answer.timing.total_us
    assert record.policy_action is record.action


class TestFormat:
    @pytest.mark.parametrize(
        "record",
        [
            make_record(),
            make_record(q=None, client_id="ä"),
            make_record(seeds=None, noise=draw_noise(expand_seed(1, 2), (3, 2, 2))),
            make_record(adjusted=np.array([0, 1], np.int32), policy_action=OBS[:2, 2:]),
            make_record(adjusted=np.full(2, Adjustment.HELD, np.int32), policy_action=None),
            make_record(code="INTERNAL", reason="backend", action=None, q=None, policy_action=None),
            make_record(obs=None, seeds=None, action=None, q=None, policy_action=None, code="NOT_FOUND"),
        ],
    )
    def test_a_record_comes_back_as_it_was(self, record, tmp_path):
        path = tmp_path / "one.rsmrec"
        path.write_bytes(MAGIC + encode(record) * 2)
        reader = read(path)
        found = list(reader)
        assert (len(found), reader.unreadable) == (2, 0)
        assert_same(record, found[1])

    def test_whatever_is_cut_off_the_records_before_are_read(self, tmp_path):
        path, frame = tmp_path / "one.rsmrec", encode(make_record())
        whole = MAGIC + 3 * frame
        for length in (*range(len(whole) - len(frame) + 1, len(whole)), len(MAGIC) + 1):
            path.write_bytes(whole[:length])
            reader = read(path)
            complete = (length - len(MAGIC)) // len(frame)
            assert (len(list(reader)), reader.unreadable) == (complete, 1)

    def test_a_damaged_record_is_left_out_and_a_damaged_length_ends_the_file(self, tmp_path):
        path, frame = tmp_path / "one.rsmrec", encode(make_record())
        content = bytearray(MAGIC + 3 * frame)
        content[len(MAGIC) + len(frame) + 30] ^= 1
        path.write_bytes(content)
        reader = read(path)
        assert (len(list(reader)), reader.unreadable) == (2, 1)
        content[len(MAGIC) + len(frame) + 3] = 255
        path.write_bytes(content)
        reader = read(path)
        assert (len(list(reader)), reader.unreadable) == (1, 1)

    def test_what_is_no_recording(self, tmp_path):
        path = tmp_path / "one.rsmrec"
        path.write_bytes(b"something else")
        reader = read(path)
        assert (list(reader), reader.unreadable) == ([], 1)
        with pytest.raises(UsageError, match=r"wanted a directory of records, got .* without any"):
            read(tmp_path)
        with pytest.raises(UsageError, match="wanted files or directories of records"):
            read(tmp_path / "nothing")
        with pytest.raises(UsageError, match="wanted to read .*File name too long"):
            read(tmp_path / ("x" * 300))

    @pytest.mark.parametrize("named", ["directory", "file"])
    def test_what_is_recorded_meanwhile_is_not_read(self, tmp_path, named):
        """A replay against the server that records there would read its own requests, for ever."""
        path, frame = tmp_path / "00000001.rsmrec", encode(make_record())
        path.write_bytes(MAGIC + 3 * frame)
        reader = read(tmp_path if named == "directory" else path)
        count = 0
        for _ in reader:
            count += 1
            assert count <= 3, "what the loop itself has written"
            with path.open("ab") as file:
                file.write(frame)
            (tmp_path / f"{count + 1:08d}.rsmrec").write_bytes(MAGIC + frame)
        assert (count, reader.unreadable, reader.vanished) == (3, 0, 0)
        assert len(list(read(tmp_path))) == 9, "by another reader"

    def test_files_that_make_room_meanwhile_are_left_out(self, tmp_path):
        paths = [tmp_path / f"{number:08d}.rsmrec" for number in (1, 2, 3)]
        for path in paths:
            path.write_bytes(MAGIC + encode(make_record()))
        reader = read(tmp_path)
        paths[0].unlink()
        found = [next(iter(reader))]
        paths[2].unlink()
        assert (len(found), reader.unreadable, reader.vanished) == (1, 0, 1)
        again = read(tmp_path)
        assert (len(list(again)), again.vanished) == (1, 0)

    def test_a_directory_of_processes_has_theirs(self, tmp_path):
        for place in ("0", "1", "10", "other"):
            (tmp_path / place).mkdir()
            record = make_record(version=place if place.isdecimal() else "99")
            (tmp_path / place / "00000001.rsmrec").write_bytes(MAGIC + encode(record))
        assert [record.version for record in read(tmp_path)] == ["0", "1", "10"]
        (tmp_path / "00000007.rsmrec").write_bytes(MAGIC + encode(make_record(version="7")))
        assert [record.version for record in read(tmp_path)] == ["7", "0", "1", "10"]


class TestServer:
    def test_what_every_protocol_asks_is_recorded(self, bundle_repo, tmp_path):
        noise = draw_noise(expand_seed(5, 2), (3, 2, 2))
        with background_server(config(bundle_repo, tmp_path / "new" / "records")) as server:
            address = server.addresses[0]
            with PolicyClient(address, client_id="arm-7", timeout_s=30) as client:
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
            with PolicyClient(server.addresses[0], client_id="arm", timeout_s=30) as client:
                with pytest.raises(InvalidRequestError):
                    client.act(np.zeros((65, 4)))
                client.act(OBS[0])
            with grpc.insecure_channel(server.addresses[0]) as channel:
                act = policy_pb2_grpc.PolicyServiceStub(channel).Act
                with pytest.raises(grpc.RpcError):
                    act(pb.ActRequest(policy="x" * 1000, rows=1), timeout=30)
        refused, answered, unknown = recorded(tmp_path)
        assert (refused.code, refused.reason, refused.client_id) == ("INVALID_ARGUMENT", "invalid", "arm")
        assert (refused.policy, refused.version, refused.obs) == ("tiny", "1", None)
        assert answered.ok
        assert (unknown.code, unknown.policy) == ("NOT_FOUND", "x" * 128)

    def test_a_request_that_is_given_up_is_recorded_with_its_observation(self, own_repo, tmp_path):
        with (
            background_server(config(own_repo, tmp_path / "r", max_queue_delay_us=300_000)) as server,
            PolicyClient(server.addresses[0], timeout_s=0.05) as client,
            pytest.raises(DeadlineExpiredError),
        ):
            client.act(OBS[0])
        (record,) = recorded(tmp_path / "r")
        assert (record.code, record.action) == ("DEADLINE_EXCEEDED", None)
        assert np.array_equal(record.obs[0], OBS[0])

    def test_a_restart_goes_on_in_a_new_file_and_metrics_count(self, bundle_repo, tmp_path):
        for count in (1, 2):
            with background_server(config(bundle_repo, tmp_path, http="127.0.0.1:0")) as server:
                with PolicyClient(server.addresses[0], timeout_s=30) as client:
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
            PolicyClient(server.addresses[0], timeout_s=30) as client,
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
            with PolicyClient(address, timeout_s=30) as client:
                for _ in range(20):
                    client.act(OBS[0])
                wait_until(lambda: len(list(read(tmp_path))) == 20 if numbered_files(tmp_path) else False, "20")
            process.send_signal(signal.SIGKILL)
            process.wait(30)
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

    def test_a_record_larger_than_a_file_is_dropped(self, tmp_path):
        recorder = Recorder(tmp_path, 1000)
        recorder.settled(refusal("x" * 128))
        recorder.start()
        recorder.close()
        assert recorder.counts.dropped["too_large"] == 1


class TestFiles:
    def test_they_rotate_within_the_bound_and_the_oldest_go(self, tmp_path):
        limit, frame = 64_000, encode(make_record())
        files = RotatingFiles(tmp_path, limit)
        for _ in range(4 * limit // len(frame)):
            assert files.append(frame)
            sizes = [path.stat().st_size for path in numbered_files(tmp_path)]
            assert sum(sizes) <= limit
            assert max(sizes) <= limit // 8
        assert len(sizes) == 8
        assert numbered_files(tmp_path)[0].name > "00000010"
        assert not files.append(bytes(limit // 8))
        files.close()

    def test_a_restart_keeps_within_the_bound_too(self, tmp_path):
        frame = encode(make_record())
        for _ in range(20):
            files = RotatingFiles(tmp_path, 16_000)
            assert files.append(frame)
            files.close()
        found = numbered_files(tmp_path)
        assert found[-1].name == "00000020.rsmrec"
        assert sum(path.stat().st_size for path in found) <= 16_000
        assert (tmp_path / ".lock").exists()

    def test_a_full_disk_leaves_whole_records_and_writing_goes_on_when_there_is_room(self, tmp_path):
        # A limit on file sizes fails as a full disk does: the last write is cut short, the next one fails.
        script = textwrap.dedent(
            """
            import resource, sys
            from pathlib import Path
            from rsm_serve.recording.files import RotatingFiles
            files = RotatingFiles(Path(sys.argv[1]), 2**20)
            frame = open(sys.argv[2], "rb").read()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8 + 5 * len(frame) // 2, hard))
            failures = 0
            for _ in range(5):
                try:
                    files.append(frame)
                except OSError:
                    failures += 1
            assert failures == 3, failures
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert files.append(frame)
            """
        )
        (tmp_path / "frame").write_bytes(encode(make_record()))
        arguments = [sys.executable, "-c", script, str(tmp_path / "records"), str(tmp_path / "frame")]
        subprocess.run(arguments, check=True, timeout=60, env=os.environ)
        reader = read(tmp_path / "records")
        assert (len(list(reader)), reader.unreadable) == (3, 0)
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_policy_of_a_record_gives_its_action_again(bundle_repo, tmp_path):
    with (
        background_server(config(bundle_repo, tmp_path)) as server,
        PolicyClient(server.addresses[0], timeout_s=30) as client,
    ):
        client.act(OBS)
    (record,) = recorded(tmp_path)
    with_seeds = open_policy(bundle_repo / "tiny").act(record.obs, seed=record.seeds)
    assert np.allclose(with_seeds.action, record.action, atol=1e-6)
