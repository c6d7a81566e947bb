"""The overhead bench: its arithmetic, and one short run of both servers. No timing is judged."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loraplex.platform.bench.overhead import FirstToken, Overhead, Streaming
from loraplex.platform.cli.app import app


def run_at(rate: float, *, events: int, cpu_s: float) -> Streaming:
    return Streaming(rate, tokens=int(rate), events=events, wall_s=1.0, cpu_s=cpu_s)


def test_the_highest_rate_is_one_it_kept_up_with() -> None:
    ours = [
        run_at(2000, events=2000, cpu_s=0.2),
        run_at(4000, events=3990, cpu_s=0.4),
        run_at(8000, events=5000, cpu_s=0.9),  # tokens were put together
    ]
    plain = [run_at(rate, events=int(rate), cpu_s=rate / 20_000) for rate in (2000, 4000, 8000)]
    found = Overhead(64, ours, plain, FirstToken(2.5, 1.0), FirstToken(0.75, 0.5))
    assert found.highest is ours[1]
    assert found.ratio == pytest.approx(20_000 / (3990 / 0.4))
    assert found.added_ttft_ms == 1.75
    assert found.as_dict()["goals_met"]
    slow = Overhead(64, ours, plain, FirstToken(4.0, 1.0), FirstToken(0.75, 0.5))
    assert not slow.as_dict()["goals_met"]


def test_less_cpu_than_the_clock_can_tell_is_one_tick() -> None:
    assert run_at(2000, events=40, cpu_s=0.0).tokens_per_cpu_s == 4000


@pytest.mark.e2e
def test_a_short_run() -> None:
    flags = ["--streams", "2", "--rates", "200", "--seconds", "0.2", "--probes", "3"]
    result = CliRunner().invoke(app, ["bench", "overhead", *flags])
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == "overhead"
    assert record["ours"][0]["tokens"] == record["plain"][0]["tokens"] == 40
    assert 0 < record["ours"][0]["events"] <= 40
    assert record["plain"][0]["events"] == 40
