"""Servers and bundles that answer recorded requests again; `test_replay` has whole replays."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsm_common.errors import BundleError, PolicyNotFoundError, RequestError, UsageError
from rsm_serve.client import PolicyClient
from rsm_serve.client.target import Target
from rsm_serve.commands.replay_targets import Bundles, Server
from tests.bundles import make_spec, write_bundle
from tests.rsm_serve.recording.records import make_record


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny:1 and tiny:2, which has another number of denoising steps."""
    repo = tmp_path_factory.mktemp("repository")
    write_bundle(repo, make_spec("tiny", "1"))
    write_bundle(repo, make_spec("tiny", "2", steps=5))
    return repo / "tiny"


class TestBundles:
    def test_each_record_is_asked_of_its_own_version(self, policy_dir):
        bundles = Bundles(policy_dir)
        assert bundles.policy == "tiny"
        assert [bundles.spec(make_record(version=number)).steps for number in ("1", "2")] == [3, 5]
        bundles.close()

    def test_a_given_version_answers_all_records(self, policy_dir):
        bundles = Bundles(policy_dir, "2")
        assert bundles.spec(make_record(version="1")).steps == 5
        bundles.close()

    @pytest.mark.parametrize("version", ["../tiny/1", "/", "²"])
    def test_the_version_of_a_record_is_never_a_path(self, policy_dir, version):
        with pytest.raises(BundleError, match="wanted a number as version"):
            Bundles(policy_dir).spec(make_record(version=version))

    def test_a_version_that_the_bundle_does_not_have_is_refused(self, policy_dir):
        with pytest.raises(UsageError, match=r"wanted version 1, got the bundle .* of version 2"):
            Bundles(policy_dir / "2", "1")


def test_a_server_without_the_version_is_asked_once():
    asked = []

    def refuse(policy: str, version: str) -> PolicyClient:
        asked.append((policy, version))
        raise PolicyNotFoundError(policy)

    server = Server(Target.parse("127.0.0.1:1"), refuse)
    for _ in range(2):
        with pytest.raises(RequestError):
            server.spec(make_record(version="7"))
    assert asked == [("tiny", "7")]
    server.close()
