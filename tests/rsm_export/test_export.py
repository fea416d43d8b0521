import dataclasses
import json
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from rsm_export import build
from rsm_export.build import make_probe, sampled_policy
from rsm_export.checks.static_rules import FORBIDDEN_OPS
from rsm_export.cli import main
from rsm_export.config import ExportConfig
from rsm_export.exporter import export_checkpoint
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import OPSET

from rsm_common.errors import BundleError, CheckpointError, ConfigError, ParityError
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.run.checkpoint import load_checkpoint, load_torch_policy
from tests.rsm_export.policies import chain_of, with_chain
from tests.rsm_train.critic_kinds import ALL_AT_ONCE
from tests.rsm_train.model.test_critic import by_hand, value_by_hand
from tests.rsm_train.runs import tiny_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def made(run_dir, tmp_path_factory):
    return export_checkpoint(run_dir, tmp_path_factory.mktemp("repository"), "tiny")


def observations(rows):
    """Far beyond what the environment gives, so that clipping and every branch of mish are met."""
    return np.random.default_rng(0).normal(0, 3, (rows, 4)).astype(np.float32)


def test_torch_bundle_and_server_give_the_same_actions(run_dir, made):
    torch_policy, bundle_policy = load_torch_policy(run_dir), open_policy(made.path)
    span = torch_policy.spec.action_high - torch_policy.spec.action_low
    config = ServerConfig(repo=made.path.parent.parent, addresses=("127.0.0.1:0",))
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=10) as client:
        for rows in (1, 7, 64):
            obs, seeds = observations(rows), expand_seed(11 * rows, rows)
            wanted = torch_policy.act(obs, seed=seeds)
            with client.stream() as stream:
                answers = [policy.act(obs, seed=seeds) for policy in (bundle_policy, client, stream)]
            assert wanted.q is not None
            for answer in answers:
                assert answer.q is not None
                assert answer.seed is not None
                assert (np.abs(answer.action - wanted.action) / span).max() <= 1e-5
                np.testing.assert_allclose(answer.q, wanted.q, atol=1e-4, rtol=1e-4)
                assert np.array_equal(answer.seed, seeds)
        assert client.act(obs[0], deterministic=True).action == pytest.approx(
            torch_policy.act(obs[0], deterministic=True).action, abs=1e-5
        )
    assert wanted.action.std() > 0.01, "a constant policy would agree with anything"


def test_the_graph_is_static_self_contained_and_says_nothing_of_this_machine(made):
    model = onnx.load_from_string(load_bundle(made.path).model)
    assert [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")] == [OPSET]
    assert model.ir_version == 10
    assert not {node.op_type for node in model.graph.node} & FORBIDDEN_OPS
    shapes = {
        value.name: [axis.dim_value or "B" for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"obs": ["B", 4], "noise": ["B", 5, 4, 1], "action": ["B", 1], "q": ["B"]}
    assert not any(node.op_type in ("Sin", "Cos") for node in model.graph.node), "time is folded"
    text = str(model).replace("\\n", "\n")
    for trace in ("/home", ".py", "site-packages", "pkg.torch"):
        assert trace not in text, trace


def test_the_same_checkpoint_gives_the_same_bytes(run_dir, made, tmp_path):
    again = export_checkpoint(run_dir, tmp_path, "tiny")
    assert load_bundle(again.path).model == load_bundle(made.path).model


def test_versions_count_up_and_the_newest_is_loaded(run_dir, tmp_path):
    first = export_checkpoint(run_dir, tmp_path, "tiny")
    second = export_checkpoint(run_dir, tmp_path, "tiny")
    assert [first.spec.version, second.spec.version] == ["1", "2"]
    assert open_policy(tmp_path / "tiny").spec.version == "2"
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["1", "2", "config.pbtxt"]


def test_provenance_and_evaluation_travel_with_the_bundle(made):
    spec = load_bundle(made.path).spec
    assert spec.provenance["run"] == "tiny"
    assert spec.provenance["step"] in (80, 160)
    assert spec.provenance["torch"].startswith("2.")
    assert spec.evaluation is not None
    assert spec.evaluation["episodes"] == 2


def test_config_pbtxt_states_shapes_without_the_batch_axis(made):
    text = (made.path.parent / "config.pbtxt").read_text()
    for line in (
        'name: "tiny"',
        "max_batch_size: 64",
        '{ name: "obs" data_type: TYPE_FP32 dims: [ 4 ] }',
        '{ name: "noise" data_type: TYPE_FP32 dims: [ 5, 4, 1 ] }',
        '{ name: "action" data_type: TYPE_FP32 dims: [ 1 ] }',
        "dynamic_batching { }",
    ):
        assert line in text


@pytest.mark.parametrize("particles", [None, 1])
def test_a_graph_that_acts_differently_writes_no_bundle(run_dir, tmp_path, monkeypatch, particles):
    def crooked(weights):
        folded = fold(weights)
        return with_chain(folded, noise_scale=-chain_of(folded).noise_scale)

    monkeypatch.setattr(build, "fold", crooked)
    with pytest.raises(ParityError, match="check 'parity' failed: .* not act like .*; no bundle was written"):
        export_checkpoint(run_dir, tmp_path / "repository", "tiny", ExportConfig(particles=particles))
    assert not (tmp_path / "repository").exists()
    made = export_checkpoint(run_dir, tmp_path / "repository", "tiny", ExportConfig(verify=False))
    assert made.verification is None
    assert made.spec.accuracy is None
    with pytest.raises(BundleError, match="wanted the recorded probe actions"):
        open_policy(made.path)


def test_a_failed_write_leaves_the_repository_as_it_was(run_dir, tmp_path, monkeypatch):
    export_checkpoint(run_dir, tmp_path, "tiny")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsm_export.bundles.bundle_writer.manifest_json", full)
    with pytest.raises(BundleError, match="No space left"):
        export_checkpoint(run_dir, tmp_path, "tiny")
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["1", "config.pbtxt"]


def test_probe_rows_have_a_clear_winner(run_dir):
    checkpoint = load_checkpoint(run_dir)
    policy = checkpoint.policy()
    probe = make_probe(policy, checkpoint.probe_obs.numpy())
    assert len(probe.obs) == 8
    np.testing.assert_array_equal(policy.act(probe.obs, noise=probe.noise).action, probe.action)
    gaps = build._value_gap(policy, probe.obs, probe.noise)
    rows = checkpoint.probe_obs.numpy()[:64]
    typical = build._value_gap(policy, rows, draw_noise(expand_seed(1, len(rows)), policy.spec.noise_shape))
    assert gaps.min() > np.median(typical)


def test_command_line(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path), "--name", "tiny"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^parity: +max error \d\.\de-\d\d of the action range", out, re.M)
    assert re.search(r"^graph: +ddpm, 5 steps, 4 particles, fp32; \d+ nodes, \d+ kB$", out, re.M)
    assert re.search(r"^per action: +[\d.]+ MFLOP, [\d.]+ MB written, [\d.]+ MB of weights read$", out, re.M)
    assert str(tmp_path / "tiny" / "1") in out


@pytest.mark.parametrize("option", [["--tensorrt"], ["--backend", "tensorrt"]])
def test_an_engine_that_cannot_be_built_is_one_sentence(run_dir, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if not installed
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), *option]) == 2
    error = capsys.readouterr().err
    assert 'pip install "rsm-toolkit[serve-gpu]"' in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_two_runtimes_at_once_are_refused(run_dir, tmp_path, capsys):
    arguments = ["--repo", str(tmp_path / "r"), "--tensorrt", "--backend", "openvino"]
    assert main([str(run_dir), *arguments]) == 2
    assert "wanted one runtime, got --tensorrt and --backend openvino" in capsys.readouterr().err


def test_a_graph_is_checked_in_the_runtime_that_was_named(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path), "--backend", "openvino"]) == 0
    assert re.search(r"^parity: .*, openvino [\d.]+, CPU$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "-x", "a" * 200])
def test_unsafe_names_are_refused(run_dir, tmp_path, name, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), f"--name={name}"]) == (2 if name else 0)
    if name:
        assert "wanted a policy name" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()


def test_a_missing_run_gets_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--repo", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "no such directory" in error
    assert error.count("\n") == 1
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_policy_json_is_plain_json(made):
    data = json.loads((made.path / "policy.json").read_text())
    assert data["noise_shape"] == [5, 4, 1]
    assert data["action"]["low"] == [-3.0]


def test_an_sdac_policy_with_normalised_critics_of_another_selection_is_exported(tmp_path):
    run = tiny_run(
        tmp_path / "run",
        algo="sdac",
        critics=3,
        critic_norm="layer",
        critic_selection="mean_std",
        critic_std_factor=-0.5,
    )
    export = export_checkpoint(run, tmp_path / "repo")
    assert export.verification is not None
    assert export.verification.accuracy.max_error <= 1e-5
    policy, obs = load_torch_policy(run), np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    ours, theirs = policy.act(obs, seed=3), open_policy(export.path).act(obs, seed=3)
    np.testing.assert_allclose(ours.action, theirs.action, atol=1e-4)
    assert ours.q is not None
    assert theirs.q is not None
    np.testing.assert_allclose(ours.q, theirs.q, atol=1e-4)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A run with critics of every part at once, whose values are in units of the return."""
    return tiny_run(
        tmp_path_factory.mktemp("runs") / "composed", **ALL_AT_ONCE, normalize_reward=True, noise_hold=5
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_composed_critics_are_exported_and_served_with_q_in_rewards(composed, tmp_path, precision):
    made = export_checkpoint(composed, tmp_path, "composed", ExportConfig(precision=precision))
    assert made.verification is not None
    checkpoint = load_checkpoint(composed)
    obs, seeds = checkpoint.probe_obs.numpy()[:32], expand_seed(3, 32)
    config = ServerConfig(repo=tmp_path, addresses=("127.0.0.1:0",))
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=10) as client:
        served = client.act(obs, seed=seeds)
    assert served.q is not None
    # By hand: the critics with their running statistics, in float64, at the action that was served.
    params = {name: value.double() for name, value in checkpoint.networks["critic"].items()}
    unit = float(checkpoint.networks["value"]["unit"])
    assert unit > 10, "an episode of 1 per step, and reward_scale 0.1"
    scale = torch.from_numpy(served.action).double() / 3
    q = value_by_hand(params, by_hand(params, torch.from_numpy(obs).double(), scale, over_batch=False))
    wanted = unit * q.amin(0).numpy()
    limit = unit * 5.0
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 1e-1}[precision]
    assert np.abs(served.q - wanted).max() <= 2 * tolerance * limit
    assert np.abs(wanted).max() > 20 * tolerance * limit or precision != "fp32"


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repository"


RESAMPLED = {
    "fewer steps": (ExportConfig(steps=2), [4, 2]),
    "ddim": (ExportConfig(steps=3, sampler="ddim"), [4, 3, 1]),
    "half the noise": (ExportConfig(sampler="ddim", eta=0.5, prior_std=1.0), [4, 3, 2, 1, 0]),
    "more particles": (ExportConfig(particles=9), [4, 3, 2, 1, 0]),
    "one particle": (ExportConfig(particles=1, steps=1), [4]),
}


@pytest.mark.parametrize("kind", RESAMPLED)
def test_the_chain_is_retimed_without_retraining(run_dir, repository, kind):
    config, indices = RESAMPLED[kind]
    made = export_checkpoint(run_dir, repository, "tiny", config)
    spec, policy = made.spec, open_policy(made.path)
    assert spec.sampling == {
        "schedule": "cosine",
        "train_steps": 5,
        "timesteps": indices,
        "eta": (config.eta or 0.0) if config.sampler == "ddim" else 1.0,
        "prior_std": config.prior_std or 0.5,
    }
    assert (spec.steps, spec.particles, spec.sampler) == (
        len(indices),
        config.particles or 4,
        config.sampler or "ddpm",
    )
    assert spec.evaluation is None, "what was measured in training was another chain"
    assert spec.has_q is (config.particles != 1)
    obs = observations(30)
    answer = policy.act(obs, seed=3)
    assert (answer.q is None) is (config.particles == 1)
    torch_policy = sampled_policy(load_checkpoint(run_dir), config)
    np.testing.assert_allclose(answer.action, torch_policy.act(obs, seed=3).action, atol=1e-3)
    if kind != "more particles":  # which may choose the same ones
        full = load_torch_policy(run_dir)
        noise = draw_noise(expand_seed(3, 30), full.spec.noise_shape)
        assert np.abs(answer.action - full.act(obs, noise=noise).action).max() > 1e-2


def test_ddim_without_noise_is_a_function_of_the_initial_latent(run_dir, repository):
    made = export_checkpoint(run_dir, repository, "tiny", ExportConfig(sampler="ddim"))
    policy, obs = open_policy(made.path), observations(5)
    noise = draw_noise(expand_seed(0, 5), made.spec.noise_shape)
    other = noise.copy()
    other[:, 1:] = 7.0
    np.testing.assert_array_equal(policy.act(obs, noise=noise).action, policy.act(obs, noise=other).action)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_reduced_precision_is_measured_and_recorded(run_dir, repository, precision):
    made = export_checkpoint(run_dir, repository, "tiny", ExportConfig(precision=precision))
    data = json.loads((made.path / "policy.json").read_text())
    assert data["precision"] == precision
    assert data["accuracy"]["rows"] == 256
    assert 1e-6 < data["accuracy"]["max_error"] <= data["tolerance"]
    assert 0 <= data["accuracy"]["other_particle_rate"] < 0.5
    assert data["accuracy"]["max_q_error"] > 1e-6
    full, small = load_torch_policy(run_dir), open_policy(made.path)
    noise = draw_noise(expand_seed(3, 8), full.spec.noise_shape)
    obs = load_bundle(made.path).probe.obs
    error = np.abs(small.act(obs, noise=noise).action - full.act(obs, noise=noise).action) / 6
    assert np.median(error) <= data["tolerance"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "6"], "wanted --steps of at most 5, as many as were trained, got 6"),
        (["--steps", "0"], "wanted --steps of at least 1, got 0"),
        (["--particles", "-1"], "wanted --particles of at least 1, got -1"),
        (["--particles", "1000000"], "wanted --particles of at most 4,096, got 1,000,000"),
        (["--eta", "0.5"], "wanted --eta from 0 to 1 with --sampler ddim, got 0.5 with ddpm"),
        (["--sampler", "ddim", "--eta", "2"], "got 2.0 with ddim"),
        (["--prior-std", "0"], "wanted --prior-std above 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(run_dir, tmp_path, capsys, arguments, words):
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_the_probe_may_be_off_by_what_the_check_allows(run_dir, tmp_path, monkeypatch):
    """Else an export of a chain that amplifies rounding could pass here and be refused where it is loaded."""
    monkeypatch.setattr("rsm_export.checks.accuracy._ROUNDING_FACTOR", 1000)
    made = export_checkpoint(run_dir, tmp_path, "tiny", ExportConfig(steps=1, particles=1))
    assert made.spec.accuracy is not None
    allowed = made.spec.accuracy["tolerance"]["action"]
    assert allowed > 1e-4
    assert load_bundle(made.path).spec.tolerance == allowed


def test_steps_as_many_as_trained_are_the_policy_as_it_was_evaluated(run_dir):
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.spec.evaluation is not None
    for steps, evaluation in ((None, checkpoint.spec.evaluation), (5, checkpoint.spec.evaluation), (4, None)):
        assert sampled_policy(checkpoint, ExportConfig(steps=steps)).spec.evaluation == evaluation


def test_probe_rows_are_the_clearest_of_all(run_dir):
    checkpoint = load_checkpoint(run_dir)
    policy = checkpoint.policy()
    rows = checkpoint.probe_obs.numpy()[: 8 * build.PROBE_ROWS]
    probe = make_probe(policy, rows)
    noise = draw_noise(expand_seed(build._PROBE_SEED, len(rows)), policy.spec.noise_shape)
    q = policy.particles(rows, noise)[1]
    assert q is not None
    ordered = np.sort(q, axis=1)
    gap = ordered[:, -1] - ordered[:, -2]
    assert (gap >= 0).all()
    assert sorted(map(tuple, probe.obs)) == sorted(map(tuple, rows[np.argsort(-gap, kind="stable")[:8]]))


def test_particles_need_critics(run_dir):
    checkpoint = load_checkpoint(run_dir)
    networks = {name: value for name, value in checkpoint.networks.items() if "critic" not in name}
    spec = dataclasses.replace(checkpoint.spec, has_q=False, particles=1)
    assert isinstance(checkpoint.sampler, DiffusionSampler)
    sampler = dataclasses.replace(checkpoint.sampler, particles=1)
    alone = dataclasses.replace(checkpoint, spec=spec, sampler=sampler, networks=networks)
    assert not sampled_policy(alone, ExportConfig()).spec.has_q
    with pytest.raises(ConfigError, match="wanted --particles 1 for a checkpoint without critics, got 2"):
        sampled_policy(alone, ExportConfig(particles=2))
