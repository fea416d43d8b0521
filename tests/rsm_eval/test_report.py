"""The report and the command that writes it, with a real bundle and a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rsm_common.commandline import parse_seeds
from rsm_common.errors import ConfigError, MissingExtraError, UsageError
from rsm_common.output import write_atomically
from rsm_eval import animation, cli
from rsm_eval.cli import main
from rsm_eval.evaluation import EvalConfig
from rsm_eval.rollout import episode_seeds, rollout
from rsm_eval.sources import open_policy
from rsm_serve.config import ServerConfig
from rsm_serve.server import background_server
from tests.rsm_eval.test_learning import write as write_metrics
from tests.rsm_eval.tiny_env import ENV_ID

SECTIONS = ("results", "learning", "returns", "latency", "rollout", "policy", "reproduce", "episodes")
VOID = {"meta", "input", "img", "path", "use", "br"}


class Page(HTMLParser):
    """Collects what the tests ask for, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.assets: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.labels: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        if "id" in values:
            self.ids.append(values["id"] or "")
        self.assets += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag == "img":
            self.images.append(values)
        if tag == "svg" and values.get("role") == "img":
            self.labels.append(values.get("aria-label") or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def outcome(bundle_repo, tmp_path_factory):
    """(report, JSON, folder) of one evaluation of a bundle and of the server that serves it."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_metrics(folder)
    with background_server(ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))) as server:
        served = f"grpc://{server.addresses[0]}/tiny"
        options = ["--env", ENV_ID, "--policy", str(bundle_repo / "tiny"), "--policy", served]
        options += ["--episodes", "4", "--seeds", "0,7", "--latency-calls", "20", "--run", str(folder)]
        options += ["--report", f"{folder}/new/out.html", "--json", f"{folder}/out.json"]
        assert main(options) == 0
    return (folder / "new" / "out.html").read_text(), json.loads((folder / "out.json").read_text()), folder


def test_the_report_is_whole_and_stands_alone(outcome):
    html, _, _ = outcome
    page = Page(html)
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.assets
    assert all(asset.startswith(("data:", "#")) for asset in page.assets)
    for forbidden in ("http://", "https://", "<script", "@import", "<metadata"):
        assert forbidden not in html
    assert {asset[1:] for asset in page.assets if asset.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert len(html) < 1_500_000


def test_pictures_have_a_description_and_follow_the_theme(outcome):
    html, _, _ = outcome
    page = Page(html)
    assert (page.images[0]["alt"] or "").startswith("Animation of Bundle")
    assert any(label.startswith("Learning curve: episode return over 400 steps") for label in page.labels)
    assert any(label.startswith("Return of every episode") for label in page.labels)
    assert any(label.startswith("Histogram of total latency") for label in page.labels)
    assert html.count('<svg class="plot"') == len(page.labels)
    assert "prefers-color-scheme: dark" in html
    assert "var(--series-2)" in html
    assert not re.search(r"#0[1-5]0[0-5]0", html), "a placeholder colour is left"


def test_the_report_says_what_was_measured(outcome):
    html, data, _ = outcome
    text = Page(html).text
    summary = data["policies"][0]["summary"]
    assert f"{summary['mean']:.2f} ± {summary['std']:.2f}" in text
    assert "8 episodes per policy from evaluation seeds 0, 7" in text
    assert "[-3, 1]" in text
    assert data["policies"][0]["runtime"] in text
    assert data["command"] in text
    assert "gymnasium" in text


def test_json_holds_every_episode(outcome, bundle_repo):
    _, data, _ = outcome
    bundle, server = data["policies"]
    assert [policy["kind"] for policy in (bundle, server)] == ["bundle", "server"]
    with open_policy(str(bundle_repo / "tiny")) as opened:
        expected = rollout(opened.policy, ENV_ID, episode_seeds(7, 4))
    of_seed_7 = [episode for episode in bundle["episodes"] if episode["seed"] == 7]
    assert [episode["return"] for episode in of_seed_7] == expected.returns.tolist()
    assert [episode["length"] for episode in of_seed_7] == expected.lengths.tolist()
    returns = [[episode["return"] for episode in policy["episodes"]] for policy in (bundle, server)]
    assert returns[0] == pytest.approx(returns[1], abs=1e-4)
    assert bundle["latency"]["calls"] == 20
    total = server["latency"]["stages"]["total"]
    assert 0 < total["p50_ms"] <= total["p90_ms"] <= total["p99_ms"]
    assert {"python", "gymnasium", "numpy"} <= set(data["versions"])
    assert data["machine"]["cores"] >= 1
    assert bundle["spec"]["name"] == "tiny"
    assert re.fullmatch(r"(onnxruntime|openvino) [\d.]+, \w+", bundle["runtime"])
    assert server["runtime"] is None


def test_nothing_but_the_outputs_is_left_behind(outcome):
    _, _, folder = outcome
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {"metrics.jsonl", "out.json", "new", "new/out.html"}


def test_without_gl_without_a_run_and_without_latency(bundle_repo, tmp_path, capsys, monkeypatch):
    reason = animation.NoAnimation("egl: no such library")
    monkeypatch.setattr(animation, "render_animation", lambda *arguments, **options: reason)
    options = ["--env", ENV_ID, "--policy", str(bundle_repo / "tiny"), "--episodes", "1"]
    assert main([*options, "--latency-calls", "0", "--report", str(tmp_path / "a&b.html")]) == 0
    page = Page((tmp_path / "a&b.html").read_text())
    assert set(SECTIONS) <= set(page.ids)
    assert page.images == []
    assert "No animation: egl: no such library" in page.text
    assert "no metrics of a training run" in page.text.lower()
    assert "not measured" in page.text
    assert "no animation in the report: egl" in capsys.readouterr().out


def test_the_table_is_aligned(bundle_repo, capsys):
    options = [
        "--env",
        ENV_ID,
        "--policy",
        str(bundle_repo / "tiny"),
        "--policy",
        str(bundle_repo / "tiny" / "1"),
    ]
    assert main([*options, "--episodes", "2", "--latency-calls", "3", "--deterministic"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 episodes per policy, evaluation seeds 0, deterministic actions")
    header, rule, first, second = lines[2:6]
    assert header.split()[:4] == ["policy", "mean", "std", "IQM"]
    assert rule == "-" * len(header)
    assert len(first) == len(second) == len(header)
    assert first.startswith("Bundle tiny:1 #1")
    assert first.split()[4:9] == second.split()[4:9]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env", "NoSuchThing-v1"], "NoSuchThing-v1"),
        ([], "Tiny-v0"),
        (["--env", "HalfCheetah-v5"], "HalfCheetah-v5|observation"),
        (["--env", ENV_ID, "--episodes", "0"], "--episodes"),
        (["--env", ENV_ID, "--seeds", "4-0"], "4-0"),
        (["--env", ENV_ID, "--seeds", "1,1"], "once"),
        (["--env", ENV_ID, "--latency-calls", "-1"], "--latency-calls"),
        (["--env", ENV_ID, "--run", "no/run"], "no/run"),
        (["--env", ENV_ID, "--policy", "no/such/policy"], "no/such/policy"),
        (["--env", ENV_ID, "--no-such-option"], "no-such-option"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(options, words, bundle_repo, tmp_path, capsys):
    outputs = ["--report", str(tmp_path / "out.html"), "--json", str(tmp_path / "out.json")]
    assert main(["--policy", str(bundle_repo / "tiny"), *options, *outputs]) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err)
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_report(bundle_repo, tmp_path, capsys):
    assert main(["--policy", str(bundle_repo / "tiny"), "--report", str(tmp_path)]) == 2
    assert "add a file name" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    def missing(command, extra, modules):
        assert "gymnasium" in modules
        raise MissingExtraError(f'{command} needs: pip install "rsm-toolkit[{extra}]"')

    monkeypatch.setattr(cli, "require_extra", missing)
    assert main(["--policy", "x"]) == 2
    assert capsys.readouterr().err == 'rsm-eval needs: pip install "rsm-toolkit[eval]"\n'


def test_help_names_every_setting():
    done = subprocess.run(
        [sys.executable, "-m", "rsm_eval.cli", "--help"], capture_output=True, text=True, check=True
    )
    for flag in (
        "--policy",
        "--env",
        "--backend",
        "--episodes",
        "--seeds",
        "--deterministic",
        "--latency-calls",
        "--run",
    ):
        assert flag in done.stdout


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_a_place_that_cannot_be_written_is_heard_of_before_the_rollouts(bundle_repo, tmp_path, option, capsys):
    (tmp_path / "file").write_text("")
    options = ["--policy", str(bundle_repo / "tiny"), option, str(tmp_path / "file" / "sub" / "out")]
    assert main(options) == 2
    output = capsys.readouterr()
    assert "Not a directory; choose a place" in output.err
    assert "episodes" not in output.err, "no rollout was begun"
    assert output.out == ""


def test_writing_is_all_or_nothing(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "one")
    write_atomically(tmp_path / "a" / "b.txt", "two")
    assert (tmp_path / "a" / "b.txt").read_text() == "two"
    with pytest.raises(UsageError, match="wanted to write"):
        write_atomically(tmp_path / "a" / "b.txt" / "c.txt", "three")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (3,)), ("0-4", (0, 1, 2, 3, 4)), ("0,3,7", (0, 3, 7)), ("9, 0-2", (9, 0, 1, 2))]
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "2-1", "0-2,2", str(2**64), "0-999999"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="wanted"):
        EvalConfig(seeds=text)
