"""The spike watch: what counts as one, and that its state comes back exactly."""

from __future__ import annotations

import json
import random

import pytest

from ernie_elastic.errors import ConfigError, TrainingError
from ernie_elastic.training.guards.spikes import Rollback, Rollbacks, SpikeConfig, SpikeWatch


def test_a_spike_is_a_ratio_above_the_factor_for_so_many_steps():
    watch = SpikeWatch(SpikeConfig(factor=1.5, steps=3))
    noise = random.Random(0)
    assert not any(watch.is_spike({"text": 4 + noise.random(), "image": 0.5}) for _ in range(50))
    # One bad step is smoothed away; the ratio of the mean must stay high.
    assert not watch.is_spike({"text": 5.0, "image": 0.9})
    assert not any(watch.is_spike({"text": 4.5, "image": 0.5}) for _ in range(5))
    assert [watch.is_spike({"text": 12.0, "image": 1.5}) for _ in range(4)] == [False, False, True, True]


def test_a_slow_rise_is_no_spike_and_off_is_off():
    watch = SpikeWatch(SpikeConfig(factor=1.5, steps=3))
    assert not any(watch.is_spike({"text": 1 + step / 100}) for step in range(200))
    off = SpikeWatch(SpikeConfig())
    assert not any(off.is_spike({"text": 10.0**step}) for step in range(20))


def test_kinds_that_come_late_and_steps_without_losses_are_left_alone():
    watch = SpikeWatch(SpikeConfig(factor=1.5, steps=1))
    assert not any(watch.is_spike({"text": 2.0}) for _ in range(20))
    assert not any(watch.is_spike({"text": 2.0, "audio": 50.0 - step}) for step in range(30)), "it only starts"
    assert not watch.is_spike({})


def test_the_state_comes_back_exactly():
    values = [{"text": random.Random(step).uniform(1, 3) * (3 if step > 60 else 1)} for step in range(80)]
    one = SpikeWatch(SpikeConfig(factor=1.6, steps=4, window=20))
    expected = [one.is_spike(value) for value in values]
    assert any(expected)
    for cut in (0, 7, 45, 62):
        two = SpikeWatch(one.config)
        found = [two.is_spike(value) for value in values[:cut]]
        three = SpikeWatch(one.config)
        three.load_json(json.loads(json.dumps(two.to_json())))
        assert found + [three.is_spike(value) for value in values[cut:]] == expected


def test_rollbacks_shift_the_data_from_their_step_on(tmp_path):
    rollbacks = Rollbacks(tmp_path, SpikeConfig(factor=2, max_rollbacks=2))
    rollbacks.add(Rollback(10, 14, 5), write=True)
    rollbacks.add(Rollback(20, 22, 3), write=True)
    again = Rollbacks(tmp_path, rollbacks.config)
    assert [again.shift(step) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 5, 5, 8, 8]
    with pytest.raises(TrainingError, match=r"2 times its median at step 30, after 2 rollbacks already .limit 2"):
        again.check(30)


@pytest.mark.parametrize("bad", [{"factor": 0.9}, {"factor": 2, "steps": 0}, {"window": 3}, {"max_rollbacks": -1}])
def test_values_are_checked(bad):
    with pytest.raises(ConfigError, match="spikes"):
        SpikeConfig(**bad)
