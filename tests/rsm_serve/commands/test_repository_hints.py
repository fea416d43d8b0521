"""What rsm-serve says about a --repo or --canary that is something else; the advice is followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsm_serve.commands import serve_cli
from rsm_serve.config import ServerConfig, VersionSettings
from rsm_serve.engine.lane import Selection
from rsm_serve.server import background_server


class TestWhatIsNoRepository:
    """--repo names something else: the error says what it is, and its advice works."""

    def refused(self, capsys, *arguments: object) -> str:
        assert serve_cli.main([str(argument) for argument in arguments]) == 2
        error: str = capsys.readouterr().err
        return error

    def advised(self, error: str) -> list[str]:
        """The options that an error advises."""
        return error.rstrip().rpartition("give ")[2].split()

    @pytest.mark.parametrize(
        ("below", "what"), [("tiny", "which is one policy"), ("tiny/1", "which is one version of a policy")]
    )
    @pytest.mark.parametrize("poll", [(), ("--poll", "1")])
    def test_a_directory_within_a_repository(self, bundle_repo, below, what, poll, capsys):
        error = self.refused(capsys, "--repo", bundle_repo / below, *poll)
        assert what in error
        arguments = self.advised(error)
        config = ServerConfig(
            repo=Path(arguments[1]),
            addresses=("127.0.0.1:0",),
            versions=VersionSettings(policies=(Selection.parse(arguments[3]),)),
        )
        with background_server(config) as server:
            assert server.registry.names == ["tiny"]

    def test_runs_of_rsm_train(self, tmp_path, capsys):
        run = tmp_path / "runs" / "pendulum"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text("{}")
        error = self.refused(capsys, "--repo", run)
        assert f"which is a run of rsm-train; export it with rsm-export {run} --repo DIR" in error
        error = self.refused(capsys, "--repo", run.parent)
        assert f"which holds runs of rsm-train; export one, for example with rsm-export {run} --repo" in error

    def test_an_empty_directory(self, tmp_path, capsys):
        assert "which has none; create one with rsm-export RUN --repo DIR" in self.refused(
            capsys, "--repo", tmp_path
        )

    @pytest.mark.parametrize(
        ("canary", "got"), [("tiny:9=10%", "got versions 1; "), ("other:1=10%", "got no such policy; ")]
    )
    def test_a_canary_without_its_version(self, bundle_repo, canary, got, capsys):
        error = self.refused(capsys, "--repo", bundle_repo, "--canary", canary)
        assert "for --canary, " + got + "export that version first, or give another --canary" in error
        assert "--policy" not in error
