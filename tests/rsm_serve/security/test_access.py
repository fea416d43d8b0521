"""Tokens: who may act, who may load, what the others are told, and what a changed file changes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.utils import InferenceServerException

from rsm_common.errors import (
    ConfigError,
    InvalidRequestError,
    NotReadyError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from rsm_eval.sources import open_policy
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.client.connection import Connection
from rsm_serve.client.target import Target
from rsm_serve.commands import client_cli
from rsm_serve.commands import serve_cli as cli
from rsm_serve.config import ServerConfig
from rsm_serve.pb import oip_pb2, oip_pb2_grpc, policy_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.security.access import Access, Role
from rsm_serve.security.token_files import bearer, read_tokens
from rsm_serve.security.watched_files import LOOK_S, Watched
from rsm_serve.server import PolicyServer, background_server
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT
from tests.rsm_serve.versions import add_version, damage, point
from tests.server_process import wait_until

ACT, ADMIN, OLD, WRONG = (name * 8 for name in ("act-", "adm-", "old-", "bad-"))


def secret(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return {
        "act_token_file": secret(tmp_path / "act", "# robots", OLD, f"{ACT}  # the new one", ""),
        "admin_token_file": secret(tmp_path / "admin", ADMIN),
    }


def configured(repo: Path, **settings: Any) -> ServerConfig:
    return ServerConfig.from_options(repo=repo, addresses=ANY_PORT, **settings)


def headers(token: str) -> dict[str, str]:
    return dict(bearer(token))


def infer(client: triton.InferenceServerClient, token: str = "") -> Any:
    obs = triton.InferInput("obs", [1, 4], "FP32")
    obs.set_data_from_numpy(np.zeros((1, 4), np.float32))
    return client.infer("tiny", [obs], headers=headers(token), client_timeout=HANG_S)


class TestActing:
    def test_our_clients(self, bundle_repo, files, monkeypatch):
        with background_server(configured(bundle_repo, **files)) as server:
            address = server.addresses[0]
            for token in (ACT, OLD, ADMIN):
                with PolicyClient(address, token=token, timeout_s=HANG_S) as client, client.stream() as stream:
                    assert client.act(np.zeros(4)).action.shape == stream.act(np.zeros(4)).action.shape == (2,)

            async def act() -> None:
                async with AsyncPolicyClient(address, token=ACT, timeout_s=HANG_S) as client:
                    await client.act(np.zeros(4))
                    async with client.stream() as stream:
                        await stream.act(np.zeros(4))

            asyncio.run(act())
            with pytest.raises(UnauthenticatedError, match="wanted the metadata 'authorization: Bearer TOKEN'"):
                PolicyClient(address)
            with pytest.raises(UnauthenticatedError, match="that this server does not know") as refused:
                PolicyClient(address, token=WRONG)
            assert WRONG not in str(refused.value)
            monkeypatch.setenv("RSM_TOKEN", ACT)
            with PolicyClient(address, timeout_s=HANG_S) as client, open_policy(f"grpc://{address}/tiny"):
                client.act(np.zeros(4))
            with pytest.raises(UnauthenticatedError):
                PolicyClient(address, token="")

    def test_every_call_but_those_of_probes(self, bundle_repo, files):
        with background_server(configured(bundle_repo, **files)) as server:
            address = server.addresses[0]
            assert check_health(address) == check_health(address, "tiny") == "SERVING"
            client = triton.InferenceServerClient(address)
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("tiny")
            calls: list[Callable[..., Any]] = [
                client.get_server_metadata,
                client.get_model_repository_index,
                client.get_inference_statistics,
                lambda headers: client.get_model_metadata("tiny", headers=headers),
                lambda headers: client.get_model_config("tiny", headers=headers),
                lambda headers: infer(client, headers.get("authorization", "")[7:]),
            ]
            for call in calls:
                call(headers=headers(ACT))
                for token in ("", WRONG):
                    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                        call(headers=headers(token))
            client.close()
            with grpc.insecure_channel(address) as channel:
                reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
                asked = reflection_pb2.ServerReflectionRequest(list_services="")
                assert next(iter(reflect(iter([asked]), timeout=HANG_S))).list_services_response.service
                stubs = (
                    policy_pb2_grpc.PolicyServiceStub(channel).ActStream,
                    oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer,
                )
                for stream in stubs:
                    with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                        next(stream(never(), timeout=HANG_S))  # before a message was sent
                unknown = channel.unary_unary("/inference.GRPCInferenceService/LogSettings")
                with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                    unknown(b"", timeout=HANG_S)
                with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                    unknown(b"", timeout=HANG_S, metadata=bearer(ACT))

    @pytest.mark.parametrize(
        "metadata",
        [
            (("authorization", ACT),),
            (("authorization", f"Basic {ACT}"),),
            (("authorization", f"Bearer {ACT}x"),),
            (("authorization", f"Bearer {ACT[:-1]}"),),
            (("authorization", "Bearer "),),
            (("authorization", ""),),
            (("authorization", f"Bearer {WRONG}"), ("authorization", f"Bearer {ACT}")),
            (("authorization-bin", f"Bearer {ACT}".encode()),),
        ],
    )
    def test_what_is_no_token_of_the_file(self, bundle_repo, files, metadata):
        with (
            background_server(configured(bundle_repo, **files)) as server,
            grpc.insecure_channel(server.addresses[0]) as channel,
        ):
            get_spec = policy_pb2_grpc.PolicyServiceStub(channel).GetSpec
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                get_spec(pb.GetSpecRequest(), timeout=HANG_S, metadata=metadata)
            get_spec(pb.GetSpecRequest(), timeout=HANG_S, metadata=(("authorization", f"bearer {ACT}"),))

    def test_without_token_files_tokens_mean_nothing(self, bundle_repo):
        with (
            background_server(configured(bundle_repo)) as server,
            PolicyClient(server.addresses[0], token=WRONG, timeout_s=HANG_S) as client,
        ):
            assert client.act(np.zeros(4)).action.shape == (2,)

    def test_refusals_are_counted_and_no_request_adds_a_series(self, bundle_repo, files):
        with background_server(configured(bundle_repo, http="127.0.0.1:0", **files)) as server:
            with pytest.raises(UnauthenticatedError):
                PolicyClient(server.addresses[0], token=WRONG)
            with grpc.insecure_channel(server.addresses[0]) as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary("/made.up/Name")(b"", timeout=HANG_S)
            assert server.monitor is not None
            refusals = server.monitor.counts.refusals
            assert refusals == {
                ("GetSpec", "UNAUTHENTICATED", "unauthenticated"): 1,
                ("", "UNAUTHENTICATED", "unauthenticated"): 1,
            }

    def test_tokens_are_in_no_repr_and_no_log(self, bundle_repo, files, caplog):
        caplog.set_level(logging.DEBUG)
        with background_server(configured(bundle_repo, **files)) as server:
            connection = Connection.to(Target.parse(server.addresses[0]), token=ACT)
            with (
                PolicyClient(server.addresses[0], token=ACT, timeout_s=HANG_S) as client,
                client.stream() as stream,
            ):
                texts = [repr(vars(thing)) for thing in (client, stream, server) if thing] + [repr(connection)]
            with pytest.raises(UnauthenticatedError):
                PolicyClient(server.addresses[0], token=WRONG)
            assert not [text for text in [*texts, caplog.text] if ACT in text or WRONG in text]


def never() -> Any:
    threading.Event().wait(HANG_S)
    yield pb.ActRequest()


class TestLoading:
    def test_an_admin_loads_and_unloads(self, own_repo, files):
        with background_server(configured(own_repo, **files)) as server:
            client = triton.InferenceServerClient(server.addresses[0])
            admin, act = headers(ADMIN), headers(ACT)
            assert "model_repository" in client.get_server_metadata(headers=act).extensions
            add_version(own_repo, 2)
            for call in (client.load_model, client.unload_model):
                with pytest.raises(InferenceServerException, match="PERMISSION_DENIED.*admin token"):
                    call("tiny", headers=act)
                for wrong in ({}, headers(WRONG)):
                    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                        call("tiny", headers=wrong)
            assert infer(client, ACT).get_response().model_version == "1"
            client.load_model("tiny", headers=admin)
            assert infer(client, ACT).get_response().model_version == "2"
            damage(add_version(own_repo, 3))
            with pytest.raises(InferenceServerException, match="FAILED_PRECONDITION.*sha256"):
                client.load_model("tiny", headers=admin)
            # What names files of the server is for admins.
            for token, told in ((act, False), (admin, True)):
                index = client.get_model_repository_index(headers=token).models
                reasons = {model.version: model.reason for model in index}
                assert (str(own_repo) in reasons["3"]) is told
                assert reasons["3"]
            client.unload_model("tiny", headers=admin)
            assert not client.is_model_ready("tiny")
            with pytest.raises(InferenceServerException, match="NOT_FOUND"):
                infer(client, ACT)
            point(own_repo, 1)
            client.load_model("tiny", headers=admin)
            assert infer(client, ACT).get_response().model_version == "1"
            client.close()

    def test_without_an_admin_token_it_is_off(self, own_repo, files):
        with background_server(configured(own_repo, act_token_file=files["act_token_file"])) as server:
            client = triton.InferenceServerClient(server.addresses[0])
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED.*--admin-token-file"):
                client.unload_model("tiny", headers=headers(ACT))
            assert "model_repository" not in client.get_server_metadata(headers=headers(ACT)).extensions
            client.close()

    def test_with_an_admin_token_alone_everybody_acts(self, own_repo, files):
        with background_server(configured(own_repo, admin_token_file=files["admin_token_file"])) as server:
            client = triton.InferenceServerClient(server.addresses[0])
            infer(client)
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.unload_model("tiny")
            client.unload_model("tiny", headers=headers(ADMIN))
            client.close()

    def test_a_load_whose_caller_gives_up_is_finished(self, own_repo, files, monkeypatch):
        begun, may_end = threading.Event(), threading.Event()
        with background_server(configured(own_repo, **files)) as server:
            add_version(own_repo, 2)
            load = server.lifecycle.versions.load

            def held(name: str, version: int) -> Any:
                begun.set()
                assert may_end.wait(HANG_S)
                return load(name, version)

            monkeypatch.setattr(server.lifecycle.versions, "load", held)
            with grpc.insecure_channel(server.addresses[0]) as channel:
                stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
                request = oip_pb2.RepositoryModelLoadRequest(model_name="tiny")
                call = stub.RepositoryModelLoad.future(request, timeout=HANG_S, metadata=bearer(ADMIN))
                assert begun.wait(HANG_S)
                call.cancel()
                with pytest.raises(grpc.FutureCancelledError):
                    call.result()
            with PolicyClient(server.addresses[0], token=ACT, timeout_s=HANG_S) as client:
                assert client.act(np.zeros(4)).version == "1"
                may_end.set()
                wait_until(lambda: client.act(np.zeros(4)).version == "2", "version 2")


@pytest.mark.usefixtures("files_seen_at_once")
class TestRotation:
    def test_tokens_come_and_go_without_a_restart(self, bundle_repo, files, caplog):
        path = files["act_token_file"]
        with background_server(configured(bundle_repo, **files)) as server:
            address = server.addresses[0]
            with PolicyClient(address, token=OLD, timeout_s=HANG_S) as robot, robot.stream() as control:
                control.act(np.zeros(4))
                secret(path, WRONG)
                with PolicyClient(address, token=WRONG, timeout_s=HANG_S) as other:
                    other.act(np.zeros(4))
                with pytest.raises(UnauthenticatedError, match="does not know"):
                    robot.act(np.zeros(4))
                with pytest.raises(UnauthenticatedError, match="was removed from its file"):
                    control.act(np.zeros(4))  # also where it was open before
            with caplog.at_level(logging.WARNING, "rsm_serve"):
                for spoil in (path.unlink, lambda: secret(path, "short"), lambda: secret(path, "#")):
                    spoil()
                    with PolicyClient(address, token=WRONG, timeout_s=HANG_S) as other:
                        other.act(np.zeros(4))
            assert [
                record.getMessage().endswith("read before stays in use") for record in caplog.records
            ] == 3 * [True]

    def test_a_stream_of_the_open_inference_protocol_ends_too(self, bundle_repo, files):
        with (
            background_server(configured(bundle_repo, **files)) as server,
            grpc.insecure_channel(server.addresses[0]) as channel,
        ):

            def requests() -> Any:
                yield request
                assert heard.wait(HANG_S)
                secret(files["act_token_file"], WRONG)
                yield request

            heard = threading.Event()
            request = oip_pb2.ModelInferRequest(model_name="tiny")
            stream = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
                requests(), timeout=HANG_S, metadata=bearer(ACT)
            )
            assert next(stream).error_message  # no observation, but heard
            heard.set()
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                next(stream)


class TestTokenFiles:
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("", "wanted 1 to 1000 tokens in .*got 0"),
            ("# only a comment\n", "got 0"),
            ("short\n", "in line 1 of .*got 5 characters"),
            (f"{ACT}\n{ACT} {ADMIN}\n", "in line 2 of"),
            ("ä" * 40, "in line 1 of"),
            ("x" * 1025, "got 1025 characters"),
            ("0123456789abcdef\n" * 1001, "got 1001"),
        ],
    )
    @pytest.mark.parametrize("option", ["act_token_file", "admin_token_file"])
    def test_mistakes_are_one_sentence_at_the_start(self, tmp_path, content, sentence, option, capsys):
        path = tmp_path / "tokens"
        path.write_text(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=sentence) as refused:
            PolicyServer(configured(tmp_path, **{option: path}))
        assert "ä" not in str(refused.value)
        assert ACT not in str(refused.value)
        assert cli.main(["--repo", str(tmp_path), f"--{option.replace('_', '-')}", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match="nowhere.*No such file"):
            PolicyServer(configured(tmp_path, act_token_file=tmp_path / "nowhere"))

    def test_one_token_for_both_is_a_mistake(self, tmp_path):
        path = secret(tmp_path / "tokens", ACT)
        with pytest.raises(ConfigError, match="the same token"):
            PolicyServer(configured(tmp_path, act_token_file=path, admin_token_file=path))

    def test_a_file_that_everybody_reads_is_warned_of(self, bundle_repo, files, caplog):
        files["act_token_file"].chmod(0o644)
        PolicyServer(configured(bundle_repo, **files))
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "can be read by every user" in warning.getMessage()

    def test_rsm_clients_options(self, bundle_repo, files, monkeypatch, capsys):
        with background_server(configured(bundle_repo, **files)) as server:
            arguments = ["--address", server.addresses[0], "--timeout", str(HANG_S)]
            assert client_cli.main(["act", *arguments]) == 2
            assert "RSM_TOKEN" in capsys.readouterr().err
            assert client_cli.main(["act", *arguments, "--token-file", str(files["act_token_file"])]) == 0
            assert client_cli.main(["health", *arguments]) == 0
            monkeypatch.setenv("RSM_TOKEN", f"{ACT}\n")
            assert client_cli.main(["info", *arguments]) == 0
            monkeypatch.setenv("RSM_TOKEN", "to ken")
            assert client_cli.main(["info", *arguments]) == 2
            assert "in RSM_TOKEN" in capsys.readouterr().err

    def test_a_clients_token_is_checked_before_it_is_sent(self):
        for token in ("short", "x" * 2000, f"{ACT}\n{ACT}", "ü" * 20):
            with pytest.raises(InvalidRequestError, match="of this client") as refused:
                PolicyClient("127.0.0.1:1", token=token)
            assert token not in str(refused.value)


class TestAccess:
    """The pure core, without a server."""

    def test_roles(self, tmp_path, files):
        access = Access(files["act_token_file"], files["admin_token_file"])
        act, admin = "/rsm.v1.PolicyService/Act", "/inference.GRPCInferenceService/RepositoryModelLoad"
        assert access.grant(act, bearer(ACT)).role is Role.ACT
        assert access.grant(act, bearer(ADMIN)).role is access.grant(admin, bearer(ADMIN)).role is Role.ADMIN
        assert access.grant("/grpc.health.v1.Health/Check", ()).role is Role.NOBODY
        with pytest.raises(PermissionDeniedError):
            access.grant(admin, bearer(ACT))
        for method in (act, admin, "/grpc.health.v1.HealthX/Check", "/", ""):
            with pytest.raises(UnauthenticatedError):
                access.grant(method, ())

    def test_files_are_looked_at_once_a_second_and_on_use_alone(self, tmp_path):
        now, reads = [0.0], list[float]()
        path = secret(tmp_path / "tokens", ACT)

        def read() -> tuple[str, ...]:
            reads.append(now[0])
            return read_tokens(path)

        watched = Watched([path], read, clock=lambda: now[0])
        secret(path, ACT, ADMIN)
        values = [watched.value]
        now[0] = LOOK_S
        values.append(watched.value)
        assert values == [(ACT,), (ACT, ADMIN)]
        now[0] = 10 * LOOK_S
        assert watched.value is watched.value
        assert reads == [0.0, LOOK_S]


def test_a_server_that_is_gone_is_not_a_matter_of_tokens():
    with pytest.raises(NotReadyError):
        PolicyClient("127.0.0.1:1", token=ACT)
