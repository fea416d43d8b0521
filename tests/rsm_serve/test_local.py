"""A policy in this process: real graphs through onnxruntime, and sessions that misbehave."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from onnx import TensorProto, helper

from rsm_common.errors import BackendError, BundleError, InvalidRequestError, UsageError
from rsm_common.policy import act_rows
from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise
from rsm_common.spec import BoxSpec
from rsm_serve.bundle.contract import Bundle, load_bundle
from rsm_serve.local import LocalPolicy, open_policy, run_bundle
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_probe, make_spec, reference_action, write_bundle

SPEC = make_spec()


@pytest.fixture(scope="module")
def policy(bundle_repo):
    return open_policy(bundle_repo / "tiny")


def test_actions_are_the_graphs_function_of_observation_and_seed(policy):
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    result = policy.act(obs, seed=[3, 1, 4, 1, 5])
    noise = draw_noise(np.array([3, 1, 4, 1, 5], np.uint64), SPEC.noise_shape)
    assert np.allclose(result.action, reference_action(SPEC, obs, noise), atol=1e-6)
    assert np.allclose(result.q, obs.sum(1), atol=1e-5)
    assert result.seed.tolist() == [3, 1, 4, 1, 5]
    assert result.version == "1"
    timing = result.timing
    assert timing.batch_rows == 5
    assert timing.compute_us > 0
    assert timing.total_us >= timing.batch_us + timing.compute_us


def test_a_row_acts_the_same_alone_and_in_a_batch(policy):
    obs = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
    together = policy.act(obs, seed=list(range(64)))
    for row in (0, 1, 31, 63):
        alone = policy.act(obs[row], seed=row)
        assert alone.action.shape == (2,)
        assert alone.q.shape == ()
        assert np.allclose(alone.action, together.action[row], atol=1e-6)


def test_a_returned_seed_replays_the_answer(policy):
    first = policy.act(np.zeros(4))
    assert first.seed.shape == ()
    assert np.array_equal(policy.act(np.zeros(4), seed=int(first.seed)).action, first.action)
    assert not np.array_equal(policy.act(np.zeros(4)).action, first.action)


def test_deterministic_and_given_noise(policy):
    fixed = policy.act(np.zeros(4), deterministic=True)
    assert np.array_equal(fixed.action, policy.act(np.zeros(4), seed=DETERMINISTIC_SEED).action)
    noise = draw_noise(np.array([DETERMINISTIC_SEED], np.uint64), SPEC.noise_shape)[0]
    given = policy.act(np.zeros(4), noise=noise)
    assert np.array_equal(given.action, fixed.action)
    assert given.seed is None


def test_a_policy_without_critic_has_no_q(own_repo):
    write_bundle(own_repo, make_spec("plain", has_q=False))
    assert open_policy(own_repo / "plain").act(np.zeros(4)).q is None


def test_wrong_arguments_are_refused(policy):
    with pytest.raises(InvalidRequestError):
        policy.act(np.zeros(3))


class FakeSession:
    """Gives the action of `reference_action`, changed by the test after the probe."""

    def __init__(self, spec=SPEC):
        self.spec = spec
        self.change = lambda action, q: (action, q)
        self.batches: list[int] = []
        self.closed = False

    @property
    def runtime(self):
        return "numpy"

    def close(self):
        self.closed = True

    def run(self, obs_BO, noise_BTNA):
        self.batches.append(len(obs_BO))
        return self.change(reference_action(self.spec, obs_BO, noise_BTNA), obs_BO.sum(1))


def fake(spec=SPEC, **settings):
    session = FakeSession(spec)
    bundle = Bundle(None, spec, b"", make_probe(spec))  # type: ignore[arg-type]
    return LocalPolicy(bundle, session, **settings), session


def test_construction_warms_up_every_size_and_replays_the_probe():
    _, session = fake(warm_up_rows=(1, 64))
    assert session.batches == [1, 64, 4]


def at(action, row, value):
    changed = action.copy()
    changed[row, 0] = value
    return changed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.01, -3.01])
def test_an_unsound_action_is_a_backend_error(value):
    policy, session = fake()
    session.change = lambda action, q: (at(action, 0, value), q)
    with pytest.raises(BackendError, match="not finite or out of bounds"):
        policy.act(np.zeros(4))


def test_an_unsound_value_is_a_backend_error():
    policy, session = fake()
    session.change = lambda action, q: (action, q * np.nan)
    with pytest.raises(BackendError):
        policy.act(np.zeros(4))


def test_rounding_over_the_bound_is_clipped():
    policy, session = fake()
    session.change = lambda action, q: (at(action, 0, np.nextafter(np.float32(1), np.float32(2))), q)
    assert policy.act(np.zeros(4)).action[0] == 1.0


def test_one_unsound_row_fails_its_own_request_only():
    policy, session = fake()
    session.change = lambda action, q: (at(action, 2, np.nan), q)
    requests = [act_rows(SPEC, np.full((rows, 4), rows), seed=rows) for rows in (2, 1, 3)]
    first, second, third = policy.act_batch(requests)
    assert isinstance(second, BackendError)
    for answer, request in ((first, requests[0]), (third, requests[2])):
        assert not isinstance(answer, BackendError)
        alone = reference_action(SPEC, request.obs_BO, request.drawn_noise(SPEC))
        assert np.allclose(answer.action, alone, atol=1e-6)
        assert answer.q is not None
        assert np.allclose(answer.q, request.obs_BO.sum(1))
        assert answer.seed is not None
        assert request.seeds_B is not None
        assert answer.seed.tolist() == request.seeds_B.tolist()
        assert answer.timing.batch_rows == 6


def test_a_closed_policy_closes_its_session_once_and_says_so():
    policy, session = fake()
    assert policy.runtime == "numpy"
    assert not session.closed
    policy.close()
    assert session.closed
    session.close = lambda: pytest.fail("closed twice")
    policy.close()
    batches = len(session.batches)
    with pytest.raises(BackendError, match="was closed"):
        policy.act(np.zeros(4))
    assert len(session.batches) == batches


def test_wrong_shapes_and_exceptions_of_a_session_are_backend_errors():
    policy, session = fake()
    session.change = lambda action, q: (action[:, :1], q)
    with pytest.raises(BackendError, match="shapes"):
        policy.act(np.zeros(4))
    session.change = lambda action, q: 1 / 0
    with pytest.raises(BackendError, match="division"):
        policy.act(np.zeros(4))


@pytest.mark.parametrize(("error", "accepted"), [(3e-4, True), (5e-4, False), (np.nan, False)])
def test_the_probe_decides_whether_a_bundle_is_ready(own_repo, error, accepted):
    # The action range is 4, so the limit of 1e-4 of it is 4e-4.
    good = make_probe(make_spec("probed"))
    probe = dataclasses.replace(good, action=at(good.action, 1, good.action[1, 0] + error))
    write_bundle(own_repo, make_spec("probed"), probe=probe)
    if accepted:
        open_policy(own_repo / "probed")
    else:
        with pytest.raises(BundleError, match="probe actions"):
            open_policy(own_repo / "probed")


def graph_with(inputs, outputs):
    """A graph with the given signature, of which every input is used; its values do not matter."""
    (*_, width) = inputs[0][2]
    nodes = [helper.make_node("Cast", [name], [f"{name}_x"], to=TensorProto.FLOAT) for name, *_ in inputs]
    nodes += [helper.make_node("ReduceSum", [f"{name}_x"], [f"{name}_sum"], keepdims=0) for name, *_ in inputs]
    nodes.append(helper.make_node("Sum", [f"{name}_sum" for name, *_ in inputs], ["sum"]))
    nodes.append(helper.make_node("Add", [f"{inputs[0][0]}_x", "sum"], ["x"]))
    constants = [helper.make_tensor("axis", TensorProto.INT64, [1], [1])]
    for name, _, shape in outputs:
        if name == "q":
            nodes.append(helper.make_node("ReduceSum", ["x", "axis"], ["q"], keepdims=len(shape) - 1))
        else:
            size = [width, shape[-1]]
            constants.append(helper.make_tensor("W", TensorProto.FLOAT, size, [0.0] * size[0] * size[1]))
            nodes.append(helper.make_node("MatMul", ["x", "W"], [name]))
    takes = [helper.make_tensor_value_info(*item) for item in inputs]
    gives = [helper.make_tensor_value_info(*item) for item in outputs]
    graph = helper.make_graph(nodes, "g", takes, gives, constants)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()


FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
OBS, NOISE = ("obs", FLOAT, ["B", 4]), ("noise", FLOAT, ["B", 3, 2, 2])
ACTION, Q = ("action", FLOAT, ["B", 2]), ("q", FLOAT, ["B"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([("state", FLOAT, ["B", 4]), NOISE], [ACTION, Q], "inputs obs, noise.*got state, noise"),
        ([OBS], [ACTION, Q], "got obs"),
        ([OBS, NOISE], [ACTION], "outputs action, q.*got action"),
        ([("obs", DOUBLE, ["B", 4]), NOISE], [ACTION, Q], "double"),
        ([("obs", FLOAT, ["B", 5]), NOISE], [ACTION, Q], r"obs of the graph as .*\['B', 4\].*\['B', 5\]"),
        ([("obs", FLOAT, [1, 4]), NOISE], [ACTION, Q], r"\[1, 4\]"),
        ([OBS, ("noise", FLOAT, ["B", 3, 2, 3])], [ACTION, Q], "noise of the graph"),
        ([OBS, NOISE], [("action", FLOAT, ["B", 3]), Q], "action of the graph"),
        ([OBS, NOISE], [ACTION, ("q", FLOAT, ["B", 1])], "q of the graph"),
    ],
)
def test_a_graph_of_another_signature_is_refused(own_repo, inputs, outputs, message):
    write_bundle(own_repo, make_spec("foreign"), model=graph_with(inputs, outputs))
    with pytest.raises(BundleError, match=message):
        open_policy(own_repo / "foreign")


@pytest.mark.parametrize("model", [b"", b"not a graph", make_model(SPEC)[:200]])
def test_what_is_no_graph_is_refused(own_repo, model):
    write_bundle(own_repo, make_spec("broken"), model=model)
    with pytest.raises(BundleError, match="cannot load the graph|wanted an ONNX file"):
        open_policy(own_repo / "broken")


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="auto, onnxruntime.*got 'abacus'"):
        open_session(Bundle(None, SPEC, b"", make_probe(SPEC)), "abacus")  # type: ignore[arg-type]


def test_other_action_ranges_are_kept(own_repo):
    spec = dataclasses.replace(
        make_spec("wide", action_size=3), action=BoxSpec(("a", "b", "c"), (-0.4, -2.0, 5.0), (0.4, 2.0, 9.0))
    )
    write_bundle(own_repo, spec)
    action = open_policy(own_repo / "wide").act(
        np.full((50, 4), 9.0) * np.random.default_rng(0).normal(size=(50, 4))
    )
    assert (action.action >= spec.action_low).all()
    assert (action.action <= spec.action_high).all()
    assert np.ptp(action.action, axis=0).min() > 0.5


def test_a_policy_does_not_keep_its_bundle(bundle_repo):
    """Nor the bytes of the model, which would be there a second time, and after a reload for a while yet."""
    bundle = load_bundle(bundle_repo / "tiny")
    kept = weakref.ref(bundle)
    policy = run_bundle(bundle)
    del bundle
    gc.collect()
    assert kept() is None
    assert len(policy.probe_obs) == len(make_probe(SPEC).obs)
    policy.close()
