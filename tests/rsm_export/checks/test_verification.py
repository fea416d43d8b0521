"""Every check can fail, says which tensor and how far, and lets a sound graph pass."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rsm_export.checks.accuracy import TOLERANCES, Tolerance, allowed, compare
from rsm_export.checks.static_rules import check_static_rules
from rsm_export.checks.verification import ROWS, observations, verify
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import build_graph

from rsm_common.errors import BundleError, ParityError
from rsm_common.spec import BoxSpec
from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession
from tests.rsm_export.policies import inputs, random_policy, weights_of


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def model(policy):
    return build_graph(fold(weights_of(policy)))


@pytest.fixture(scope="module")
def pool(policy):
    return inputs(policy.spec, 50, seed=3)["obs"] / 3


class Around:
    """A session that changes the inputs or answers of another one."""

    runtime = "altered"

    def __init__(self, model, spec):
        self._session = OnnxRuntimeSession(model.SerializeToString(), spec)
        self._first = None
        self.closed = False

    def run(self, obs, noise):
        return self._session.run(obs, noise)

    def close(self):
        self.closed = True
        self._session.close()


def checked(policy, model, pool, session=Around, precision="fp32"):
    return verify(model, policy, lambda: session(model, policy.spec), pool, precision)


def test_a_sound_graph_passes_all_checks_in_their_order(policy, model, pool):
    opened = []

    def open_session():
        opened.append(Around(model, policy.spec))
        return opened[-1]

    result = verify(model, policy, open_session, pool, "fp32")
    assert [check.name for check in result.checks] == [
        "onnx", "static rules", "parity", "batches", "fresh inputs",
    ]  # fmt: skip
    assert result.accuracy.rows == ROWS == 256
    assert 0 < result.accuracy.max_error <= 1e-5
    assert opened[0].closed


class Shifted(Around):
    shift = 3e-4

    def run(self, obs, noise):
        action, q = super().run(obs, noise)
        action[-1] += self.shift * 2.4
        return action, q


class ShiftedAlone(Around):
    """Off in small batches only."""

    def run(self, obs, noise):
        action, q = super().run(obs, noise)
        return (action + 0.01 if len(obs) == 7 else action), q


class Stale(Around):
    """Answers a single row for the first one it was given: what a captured graph does to bound inputs."""

    def run(self, obs, noise):
        if len(obs) == 1:
            self._first = obs if self._first is None else self._first
            obs = self._first
        return super().run(obs, noise)


class Overvalued(Around):
    def run(self, obs, noise):
        action, q = super().run(obs, noise)
        assert q is not None
        return action, q + 1e-3


class Broken(Around):
    def run(self, obs, noise):
        action, q = super().run(obs, noise)
        return np.full_like(action, np.nan), q


@pytest.mark.parametrize(
    ("session", "words"),
    [
        (Shifted, r"check 'parity' failed: .* action of row \d+ is \[.*\], wanted .*off by 0.0003"),
        (ShiftedAlone, "check 'batches' failed: .* action of row 0"),
        (Stale, "check 'batches' failed"),
        (Overvalued, "check 'parity' failed: .* q of row 0 is .*off by 0.001, 1e-05 allowed"),
        (Broken, "check 'parity' failed: .* nan"),
    ],
)
def test_a_runtime_that_acts_differently_is_refused(policy, model, pool, session, words):
    with pytest.raises(ParityError, match=words):
        checked(policy, model, pool, session)


class Failing(Around):
    def run(self, obs, noise):
        raise RuntimeError("no kernel")


def test_a_runtime_that_fails_is_one_sentence(policy, model, pool):
    with pytest.raises(BundleError, match="check 'parity' failed: altered cannot run the graph: no kernel"):
        checked(policy, model, pool, Failing)


@pytest.mark.parametrize(
    ("op_type", "words"),
    [
        ("Bernoulli", "the graph must not contain ONNX operator Bernoulli"),
        ("Cos", "TensorRT's parser does not take node 'more': operator Cos"),
    ],
)
def test_the_static_rules_and_those_of_tensorrt_are_part_of_the_checks(policy, model, pool, op_type, words):
    more = onnx.ModelProto()
    more.CopyFrom(model)
    more.graph.node.append(helper.make_node(op_type, ["obs"], ["unused"], name="more"))
    with pytest.raises(BundleError, match=f"check 'static rules' failed: .*{words}"):
        checked(policy, more, pool)


def test_a_runtime_that_keeps_old_inputs_is_refused(policy, model, pool, monkeypatch):
    monkeypatch.setattr(
        "rsm_export.checks.verification.BATCH_SIZES", (64,)
    )  # so that the batches do not find it first
    with pytest.raises(ParityError, match="check 'fresh inputs' failed"):
        checked(policy, model, pool, Stale)


def test_invalid_onnx_is_refused_first(policy, model, pool):
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.node[0].input[0] = "nowhere"
    with pytest.raises(BundleError, match="check 'onnx' failed: the graph is not valid ONNX: .*nowhere"):
        checked(policy, broken, pool)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
    with pytest.raises(BundleError, match="check 'onnx' failed"):
        checked(policy, wrong, pool)


def one_node_graph(op_type, batch="B", dtype=TensorProto.FLOAT):
    node = helper.make_node(op_type, ["obs"], ["action"], name="the node")
    values = [helper.make_tensor_value_info(name, dtype, [batch, 4]) for name in ("obs", "action")]
    return helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))


def test_static_rules_refuse_what_a_backend_could_not_run():
    check_static_rules(one_node_graph("Tanh"))
    for model, words in (
        (one_node_graph("RandomNormalLike"), "RandomNormalLike, got it as node 'the node'"),
        (one_node_graph("NonZero"), "NonZero"),
        (one_node_graph("Tanh", batch=3), "batch axis"),
        (one_node_graph("Tanh", dtype=TensorProto.DOUBLE), "float32"),
    ):
        with pytest.raises(BundleError, match=words):
            check_static_rules(model)
    outside = one_node_graph("Tanh")
    tensor = helper.make_tensor("elsewhere", TensorProto.FLOAT, [1], [0.0])
    tensor.external_data.add(key="location", value="weights.bin")
    outside.graph.initializer.append(tensor)
    with pytest.raises(BundleError, match="'elsewhere' elsewhere"):
        check_static_rules(outside)


def answers(policy, rows=64):
    feeds = inputs(policy.spec, rows)
    result = policy.act(feeds["obs"], noise=feeds["noise"])
    return feeds["obs"], feeds["noise"], result.action.copy(), result.q.copy()


FP32 = Tolerance(TOLERANCES["fp32"], TOLERANCES["fp32"])


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.8e-5, True), (3e-5, False), (np.nan, False)])
def test_actions_are_allowed_their_tolerance_and_no_more(policy, shift, passes):
    obs, noise, action, q = answers(policy)
    action[5] += np.float32(shift * 2.4)
    if passes:
        assert compare(policy, obs, noise, action, q, FP32).max_error <= 1e-5
    else:
        with pytest.raises(ParityError, match="action of row 5"):
            compare(policy, obs, noise, action, q, FP32)


def test_a_tie_may_be_broken_either_way_and_nothing_else(policy):
    obs, noise, action, q = answers(policy)
    particles, values = policy.particles(obs, noise)
    rows, order = np.arange(len(q)), np.argsort(values, axis=1)
    best, second = order[:, -1], order[:, -2]

    class SecondTies:
        """The policy, but its second best particle is as good as the best, by a gap."""

        spec = policy.spec
        value_size = 1.0

        def __init__(self, gap):
            self._values = values.copy()
            self._values[rows, second] = values[rows, best]
            self._values[rows, best] -= gap

        def particles(self, obs, noise):
            return particles, self._values

    tied = compare(SecondTies(1e-6), obs, noise, action, q, FP32)
    assert tied.max_error == 0
    assert tied.other_particle_rate > 0.9
    with pytest.raises(ParityError, match="does not act like"):
        compare(SecondTies(1e-2), obs, noise, action, q, FP32)


def test_values_are_compared_too(policy):
    obs, noise, action, q = answers(policy)
    q[3] += 1e-3
    with pytest.raises(ParityError, match="q of row 3 is"):
        compare(policy, obs, noise, action, q, FP32)


class Fixed:
    """One particle for each row, of the given values, in an action range of 2."""

    def __init__(self, values, action_size=4, value_size=1.0):
        self.value_size = value_size
        self._values = np.array(values, np.float32)[:, None]
        self.spec = random_policy(action_size=action_size).spec
        bounds = ((-1.0,) * action_size, (1.0,) * action_size)
        box = dataclasses.replace(self.spec.action, low=bounds[0], high=bounds[1])
        self.spec = dataclasses.replace(self.spec, action=box)
        self.action = np.zeros((len(values), action_size), np.float32)

    def particles(self, obs, noise):
        return self.action[:, None], self._values

    def compare(self, action, q, tolerance=1e-3):
        nothing = np.zeros((len(q), 1), np.float32)
        return compare(self, nothing, nothing, action, np.array(q, np.float32), Tolerance(tolerance, tolerance))


def test_the_worst_element_of_the_worst_row_counts():
    policy = Fixed([0.0, 0.0])
    action = policy.action.copy()
    action[1, 2] = 1.6e-3  # of a range of 2
    found = policy.compare(action, [0.0, 0.0])
    assert found.max_error == pytest.approx(8e-4)
    assert found.mean_error == pytest.approx(4e-4)
    action[1, 2] = 2.4e-3
    with pytest.raises(ParityError, match="action of row 1"):
        policy.compare(action, [0.0, 0.0])


@pytest.mark.parametrize("row", [0, 1])
def test_values_are_off_by_a_fraction_of_their_own_magnitude_or_the_usual_one(row):
    policy = Fixed([1000.0, 0.0, 0.0, 0.0])
    scale = (1000.0, 250.0)[row]
    for factor, passes in ((0.9, True), (1.1, False)):
        q = [1000.0, 0.0, 0.0, 0.0]
        q[row] += factor * 1e-3 * scale
        with contextlib.nullcontext() if passes else pytest.raises(ParityError, match=f"q of row {row}"):
            assert policy.compare(policy.action, q).max_q_error == pytest.approx(factor * 1e-3, rel=1e-2)


@pytest.mark.parametrize("size", [0.2, 50.0])
def test_values_of_critics_with_atoms_are_off_by_a_fraction_of_the_largest_atom(size):
    policy = Fixed([0.0, 0.1, 0.0, 0.0], value_size=size)
    for factor, passes in ((0.9, True), (1.1, False)):
        q = [0.0, 0.1 + factor * 1e-3 * size, 0.0, 0.0]
        with contextlib.nullcontext() if passes else pytest.raises(ParityError, match="q of row 1"):
            assert policy.compare(policy.action, q).max_q_error == pytest.approx(factor * 1e-3, rel=1e-2)


def test_the_size_of_values_is_the_largest_atom_in_the_unit():
    assert random_policy(kind={"unit": 40.0}).value_size == 1.0
    assert random_policy(particles=1).value_size == 1.0
    assert random_policy(kind={"atoms": 11, "limit": 3.0, "unit": 40.0}).value_size == pytest.approx(120.0)


def test_a_value_that_is_no_number_is_refused():
    policy = Fixed([0.0, 0.0])
    with pytest.raises(ParityError, match="q of row 1 is nan"):
        policy.compare(policy.action, [0.0, np.nan])


def test_more_is_allowed_of_values_only_where_they_round_more():
    steady, unsteady = random_policy(), random_policy(steps=20, chain_steps=1)
    for tensor in weights_of(unsteady).critics.values():
        tensor *= 3
    found = []
    for policy in (steady, unsteady):
        feeds = inputs(policy.spec, 256)
        found.append(allowed(policy, feeds["obs"], feeds["noise"], "fp32").value)
    assert found[0] == TOLERANCES["fp32"] < found[1] < 1e-2


def test_more_is_allowed_only_where_the_policy_itself_rounds_more():
    usual, unsteady = random_policy(), random_policy(steps=20, chain_steps=1)
    for policy, wider in ((usual, False), (unsteady, True)):
        feeds = inputs(policy.spec, 256)
        tolerance = allowed(policy, feeds["obs"], feeds["noise"], "fp32")
        assert (tolerance.action > TOLERANCES["fp32"]) is wider
        assert tolerance.action < 1e-2
        exact = dataclasses.replace(weights_of(policy)).double()
        assert exact.denoiser.step_bias.dtype.itemsize == 8
    assert allowed(unsteady, feeds["obs"], feeds["noise"], "bf16").action == TOLERANCES["bf16"]


def test_observations_are_met_random_and_corners(pool):
    box = BoxSpec(tuple("abcde"), (None, -7.0, None, None, None), (9.0, None, None, None, None))
    found = observations(pool, box)
    assert found.shape == (256, 5)
    assert found.dtype == np.float32
    met = (found[:, None] == pool[None]).all(axis=2).any(axis=1)
    assert met.sum() == 128
    assert (found == 0).all(axis=1).sum() == 1
    assert [0, -7, 0, 0, 0] in found.tolist()
    assert [9, 0, 0, 0, 0] in found.tolist()
    near = (found[128:192] - pool.mean(0)) / pool.std(0)
    np.testing.assert_allclose(near.std(), 2, rtol=0.15)
    constant = observations(np.ones_like(pool), box)
    assert (constant[-61:] != 1).all(), "an element that never moved is moved too"
    corners = np.abs((found[-61:] - pool.mean(0)) / pool.std(0))
    np.testing.assert_allclose(corners, 5, rtol=1e-3)
    assert (
        len(np.unique(found[-61:] > pool.mean(0), axis=0)) == 2**5 or len(np.unique(found[-61:], axis=0)) > 20
    )


def test_a_policy_that_always_acts_the_same_cannot_be_told_apart_and_says_so(model, pool):
    policy = random_policy(hidden=(4,))
    weights = weights_of(policy)
    for tensor in (
        weights.denoiser.obs_weight,
        weights.denoiser.action_weight,
        *weights.denoiser.tail.values(),
    ):
        tensor.zero_()
    for tensor in weights.critics.values():
        tensor.zero_()
    graph = build_graph(fold(weights))
    result = checked(policy, graph, pool)
    assert "gives one action for all 256 observations" in result.checks[-1].finding
