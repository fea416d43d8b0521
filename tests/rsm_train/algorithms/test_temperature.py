import itertools
import math

import pytest
import torch

from rsm_train.algorithms.temperature import entropy_log_temperatures, open_loop_temperature


@pytest.mark.parametrize(("target", "wanted"), [(-1.5, -0.6030908), (-0.9, -0.01606)])
def test_entropy_schedule_ends_where_the_published_runs_do(target, wanted):
    values = entropy_log_temperatures(initial=5.0, target_entropy_per_dim=target)
    assert next(itertools.islice(values, 800, None)) == pytest.approx(wanted, abs=1e-5)


def test_entropy_schedule_is_adam_on_its_loss_for_any_dimension():
    for d in (1, 6, 17):
        log_alpha = torch.tensor(math.log(5.0), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([log_alpha], lr=7e-3)
        for _ in range(300):
            entropy = d / 2 * torch.log(2 * math.pi * math.e * (0.1 * log_alpha.exp()) ** 2)
            loss = -log_alpha * (-entropy.detach() - 1.5 * d)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = entropy_log_temperatures(initial=5.0, target_entropy_per_dim=-1.5)
        assert next(itertools.islice(values, 300, None)) == pytest.approx(log_alpha.item(), abs=1e-6)


def test_temperature_moves_every_250_updates():
    moving = open_loop_temperature("entropy", 5.0, -1.5)
    assert moving is not None
    assert moving.log_at(0) == moving.log_at(249) == pytest.approx(math.log(5.0))
    assert moving.log_at(250) == pytest.approx(math.log(5.0) - 7e-3)
    assert moving.log_at(200_000) == pytest.approx(-0.6030908, abs=1e-5)
    assert moving.log_at(250) == pytest.approx(math.log(5.0) - 7e-3), (
        "asking late must not change what was early"
    )


def test_other_schedules_are_not_open_loop():
    assert open_loop_temperature("constant", 0.3, -1.5) is None
    assert open_loop_temperature("kl", 0.3, -1.5) is None
