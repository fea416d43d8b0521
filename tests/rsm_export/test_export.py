import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from rsm_export import exporter
from rsm_export.chain import UnrolledPolicy, example_inputs
from rsm_export.cli import main
from rsm_export.exporter import export_checkpoint, make_probe
from rsm_export.onnx_graph import FORBIDDEN_OPS, OPSET, build_graph, check_static_rules
from rsm_export.parity import TOLERANCE, check_parity

from rsm_serve.bundle import load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.errors import BundleError, CheckpointError, ParityError
from rsm_serve.local import open_policy
from rsm_serve.seeds import draw_noise, expand_seed
from rsm_serve.server import background_server
from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession
from rsm_train.checkpoint import load_checkpoint, load_torch_policy
from rsm_train.policy import PolicyWeights, TorchPolicy
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


class Wrapped:
    """A session of which a test changes what it computes."""

    runtime = "changed"

    def __init__(self, session):
        self._session = session

    def close(self):
        self._session.close()


class Shifted(Wrapped):
    """A session whose last row is off by a given fraction of the action range."""

    def __init__(self, session, shift):
        super().__init__(session)
        self._shift = shift

    def run(self, obs, noise):
        action, q = self._session.run(obs, noise)
        action[-1] += self._shift * 6.0
        return action, q


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.8e-5, True), (3e-5, False), (np.nan, False)])
def test_parity_allows_its_tolerance_and_no_more(run_dir, made, shift, passes):
    policy = load_torch_policy(run_dir)
    session = Shifted(OnnxRuntimeSession(load_bundle(made.path).model, policy.spec), shift)
    if passes:
        assert check_parity(policy, session, observations(30)).max_error <= TOLERANCE
    else:
        with pytest.raises(ParityError, match=r"batch 1, row 0 is .* no bundle was written"):
            check_parity(policy, session, observations(30))


def test_parity_lets_a_tie_be_broken_either_way_and_nothing_else(run_dir, made, monkeypatch):
    policy = load_torch_policy(run_dir)
    session = OnnxRuntimeSession(load_bundle(made.path).model, policy.spec)
    monkeypatch.setattr("rsm_export.parity.BATCH_SIZES", (64,))
    real = TorchPolicy.particles

    def second_best_ties(gap):
        def particles(self, obs, noise):
            actions, q = real(self, obs, noise)
            order = np.argsort(q, axis=1)
            rows = np.arange(len(q))
            best, second = order[:, -1], order[:, -2]
            top = q[rows, best].copy()
            # The policy prefers what the graph ranks second, by a hair or by more.
            q[rows, best], q[rows, second] = top - gap, top
            return actions, q

        return particles

    monkeypatch.setattr(TorchPolicy, "particles", second_best_ties(1e-6))
    assert check_parity(policy, session, observations(64)).max_error <= TOLERANCE
    monkeypatch.setattr(TorchPolicy, "particles", second_best_ties(1e-2))
    with pytest.raises(ParityError, match="does not act like"):
        check_parity(policy, session, observations(64))


def test_parity_compares_the_values_too(run_dir, made):
    policy = load_torch_policy(run_dir)
    session = OnnxRuntimeSession(load_bundle(made.path).model, policy.spec)

    class Overvalued(Wrapped):
        def run(self, obs, noise):
            action, q = self._session.run(obs, noise)
            assert q is not None
            return action, q + 1e-3

    with pytest.raises(ParityError, match="does not value like"):
        check_parity(policy, Overvalued(session), observations(30))


def test_a_graph_that_acts_differently_writes_no_bundle(run_dir, tmp_path, monkeypatch):
    class Crooked(UnrolledPolicy):
        def forward(self, obs, noise):
            action, q = super().forward(obs, noise)
            return -action, q

    monkeypatch.setattr(exporter, "UnrolledPolicy", Crooked)
    with pytest.raises(ParityError, match="does not act like the policy"):
        export_checkpoint(run_dir, tmp_path / "repository", "tiny")
    assert not (tmp_path / "repository").exists()


def test_a_failed_write_leaves_the_repository_as_it_was(run_dir, tmp_path, monkeypatch):
    export_checkpoint(run_dir, tmp_path, "tiny")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsm_export.bundle_writer.manifest_json", full)
    with pytest.raises(BundleError, match="No space left"):
        export_checkpoint(run_dir, tmp_path, "tiny")
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["1", "config.pbtxt"]


def test_probe_rows_have_a_clear_winner(run_dir):
    checkpoint = load_checkpoint(run_dir)
    policy = checkpoint.policy()
    probe = make_probe(policy, checkpoint.probe_obs.numpy())
    assert len(probe.obs) == 8
    np.testing.assert_array_equal(policy.act(probe.obs, noise=probe.noise).action, probe.action)
    gaps = exporter._value_gap(policy, probe.obs, probe.noise)
    rows = checkpoint.probe_obs.numpy()[:64]
    typical = exporter._value_gap(policy, rows, draw_noise(expand_seed(1, len(rows)), policy.spec.noise_shape))
    assert gaps.min() > np.median(typical)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_unrolled_policy_is_the_policy(run_dir, rows):
    policy = load_torch_policy(run_dir)
    assert isinstance(policy.weights, PolicyWeights)
    unrolled = UnrolledPolicy(policy.weights)
    obs, noise = example_inputs(unrolled, policy.spec.noise_shape, rows)
    action, q = unrolled(obs, noise)
    wanted = policy.act(obs.numpy(), noise=noise.numpy())
    assert np.array_equal(action.numpy(), wanted.action)
    assert wanted.q is not None
    assert np.array_equal(q.numpy(), wanted.q)


def one_node_graph(op_type, batch="B", dtype=onnx.TensorProto.FLOAT):
    node = helper.make_node(op_type, ["obs"], ["action"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("obs", dtype, [batch, 4])], [value("action", dtype, [batch, 4])]
    )
    return helper.make_model(graph)


def test_static_rules_refuse_what_a_backend_could_not_run():
    check_static_rules(one_node_graph("Tanh"))
    for model, words in (
        (one_node_graph("RandomNormalLike"), "RandomNormalLike"),
        (one_node_graph("NonZero"), "NonZero"),
        (one_node_graph("Tanh", batch=3), "batch axis"),
        (one_node_graph("Tanh", dtype=onnx.TensorProto.DOUBLE), "float32"),
    ):
        with pytest.raises(BundleError, match=words):
            check_static_rules(model)


def test_random_weights_of_other_sizes_export_too(run_dir, tmp_path):
    """Humanoid-like sizes, one step, one particle: nothing in the exporter knows the demo's sizes."""
    from rsm_serve.policy import BoxSpec
    from rsm_train.critic import init_critics
    from rsm_train.diffusion import SamplerSettings
    from rsm_train.networks import init_denoiser

    box = BoxSpec(tuple("abc"), (-0.4, 0.0, -2.0), (0.4, 5.0, 2.0))
    obs_box = BoxSpec(tuple(f"o{i}" for i in range(48)), (None,) * 48, (None,) * 48)
    base = load_torch_policy(run_dir).spec
    for steps, particles in ((1, 1), (3, 5)):
        spec = dataclasses.replace(base, observation=obs_box, action=box, steps=steps, particles=particles)
        g = torch.Generator().manual_seed(0)
        weights = PolicyWeights.prepare(
            init_denoiser(48, 3, [24, 24], g),
            init_critics(48, 3, [24], g),
            SamplerSettings("linear", steps, particles, 1.0),
            spec,
        )
        policy = TorchPolicy(spec, weights)
        session = OnnxRuntimeSession(build_graph(UnrolledPolicy(weights), spec.noise_shape), spec)
        obs = np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32)
        assert check_parity(policy, session, obs).max_error <= TOLERANCE


def test_command_line(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path), "--name", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "parity: max error" in out
    assert str(tmp_path / "tiny" / "1") in out


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
        critic_layer_norm=True,
        critic_selection="mean_std",
        critic_std_factor=-0.5,
    )
    export = export_checkpoint(run, tmp_path / "repo")
    assert export.parity.max_error <= TOLERANCE
    policy, obs = load_torch_policy(run), np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    ours, theirs = policy.act(obs, seed=3), open_policy(export.path).act(obs, seed=3)
    np.testing.assert_allclose(ours.action, theirs.action, atol=1e-4)
    assert ours.q is not None
    assert theirs.q is not None
    np.testing.assert_allclose(ours.q, theirs.q, atol=1e-4)
