"""What servers and their clients tell a user to do works when it is done."""

from __future__ import annotations

import logging
import shlex
import subprocess
from pathlib import Path

import pytest

from rsm_common.errors import (
    AddressError,
    BundleError,
    ConfigError,
    InvalidRequestError,
)
from rsm_serve.bundle.contract import find_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.commands import client_cli
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Selection
from rsm_serve.security.token_files import MAX_TOKENS, read_tokens
from rsm_serve.security.watched_files import warn_if_public
from rsm_serve.server import background_server
from tests.bundles import make_spec, write_bundle
from tests.certificates import openssl
from tests.hang import HANG_S


@pytest.fixture
def place(tmp_path):
    """A directory whose name a shell would take for two."""
    path = tmp_path / "two words"
    path.mkdir()
    return path


@pytest.fixture
def repo(place):
    """tiny:1 and tiny:2."""
    for version in ("1", "2"):
        write_bundle(place / "repo", make_spec("tiny", version))
    return place / "repo"


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True, timeout=HANG_S)


@pytest.mark.parametrize("address", ["nonsense", "unix:/tmp/status", "127.0.0.1"])
def test_an_address_that_http_proposes_is_one_that_it_takes(repo, address):
    def serve(http: str) -> None:
        with background_server(ServerConfig.from_options(repo=repo, addresses=("127.0.0.1:0",), http=http)):
            pass

    with pytest.raises(AddressError) as caught:
        serve(address)
    assert "unix:" not in str(caught.value).partition(", got ")[0]
    assert "127.0.0.1:8002" in str(caught.value)
    serve("127.0.0.1:0")


def test_a_file_of_tokens_is_made_by_the_command_that_it_says(place):
    openssl("version")  # or the test is skipped
    path = place / "tokens"
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError) as caught:
        read_tokens(path)

    shell(str(caught.value).partition("make one with: ")[2])
    assert len(read_tokens(path)) == 1


def test_too_many_tokens_are_to_be_removed_and_not_replaced(place):
    path = place / "tokens"
    lines = [f"{number:032}" for number in range(MAX_TOKENS + 1)]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="remove those that no client uses"):
        read_tokens(path)

    path.write_text("\n".join(lines[1:]))
    assert len(read_tokens(path)) == MAX_TOKENS


def test_a_public_file_of_tokens_is_made_private_by_the_command_that_it_says(place, caplog):
    path = place / "tokens"
    path.write_text("a" * 32)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        warn_if_public(place)  # a directory: 600 would close it
        assert not caplog.messages
        warn_if_public(path)
    shell(caplog.messages[0].partition("; ")[2])
    assert path.stat().st_mode & 0o777 == 0o600

    caplog.clear()
    warn_if_public(path)
    assert not caplog.messages


def test_one_file_for_both_roles_gets_a_second_file_as_it_says(repo, place):
    path, other = place / "tokens", place / "admin"
    path.write_text("a" * 32)
    with pytest.raises(ConfigError, match="in a file of its own"):
        serve_with_tokens(repo, path, path)

    other.write_text("b" * 32)
    serve_with_tokens(repo, path, other)


def serve_with_tokens(repo: Path, act: Path, admin: Path) -> None:
    config = ServerConfig.from_options(
        repo=repo, addresses=("127.0.0.1:0",), act_token_file=act, admin_token_file=admin
    )
    with background_server(config):
        pass


def test_a_client_is_not_told_to_make_a_token_that_no_server_knows(place, monkeypatch, capsys):
    monkeypatch.setenv("RSM_TOKEN", "short")
    with pytest.raises(InvalidRequestError, match="give a token of the server's file"):
        PolicyClient("127.0.0.1:1", "tiny")
    (place / "empty").touch()
    assert client_cli.main(["info", "--token-file", str(place / "empty")]) == 2
    assert "give a token of the server's file" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["tiny", "tiny/1"])
def test_a_repository_is_served_by_the_options_that_it_says(repo, below):
    with pytest.raises(BundleError) as caught:
        serve(repo / below)
    _, root, _, policy = shlex.split(str(caught.value).partition("; give ")[2])

    serve(Path(root), Selection.parse(policy))


def serve(repo: Path, *policies: Selection) -> None:
    with background_server(ServerConfig.from_options(repo=repo, addresses=("127.0.0.1:0",), policies=policies)):
        pass


def test_a_repository_in_the_place_of_a_policy_names_one(repo):
    with pytest.raises(BundleError) as caught:
        find_bundle(repo)
    assert find_bundle(Path(str(caught.value).partition("such as ")[2])) == repo / "tiny" / "2"

    with pytest.raises(BundleError, match="name one of the versions 1, 2"):
        find_bundle(repo / "tiny" / "9")


def test_a_path_that_is_not_there_is_not_only_called_a_bad_address(repo, place, capsys):
    records = place / "records"
    config = ServerConfig.from_options(repo=repo, addresses=("127.0.0.1:0",), record=records)
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
        client.act([0.0, 0.0, 0.0, 0.0])
    assert client_cli.main(["replay", str(records), "--against", str(repo / "tinny")]) == 2
    assert "there is no bundle of that path" in capsys.readouterr().err
    assert client_cli.main(["replay", str(records), "--against", str(repo / "tiny")]) == 0
