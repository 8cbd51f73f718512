"""Where acceptance is lost: cuts of simulated requests, and that noise is no place."""

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tided.model.engines import RequestStats
from tided.policies.slices import LEAST, Served, by_position, sliced, where

GAMMA = 4


def request(
    draw: random.Random, alpha: float, prompt: int = 20, cached: int | None = 0, version: str = "v"
) -> RequestStats:
    own = min(0.95, max(0.02, draw.gauss(alpha, 0.15)))
    accepted = 0
    for _ in range(25):
        accepted += next((k for k in range(GAMMA) if draw.random() >= own), GAMMA)
    return RequestStats(prompt, 26 + accepted, 25, 25 * GAMMA, accepted, version, 0.0, cached)


def low(found: list[Served]) -> list[tuple[str, str]]:
    return [(part.by, part.part) for part in sliced(found) if part.low]


def test_a_prefix_cache_that_spoils_what_it_serves_is_named() -> None:
    draw = random.Random(1)
    found = [Served(request(draw, 0.1 if n % 2 else 0.6, cached=16 * (n % 2)), "a") for n in range(80)]
    assert low(found) == [("prefix cache", "with a hit")]
    told = where(sliced(found))
    assert told.startswith("most is lost: prefix cache with a hit (1.")
    assert "over 40 requests, others 2." in told


def test_long_prompts_a_build_and_a_version_are_named() -> None:
    draw = random.Random(2)
    long = [Served(request(draw, 0.1 if n % 2 else 0.6, prompt=3000 if n % 2 else 100), "a") for n in range(80)]
    assert low(long) == [("prompt length", "more than 2048 tokens")]
    builds = [Served(request(draw, 0.1 if n % 2 else 0.6), f"engine-{n % 2}", f"vllm 0.{n % 2}") for n in range(80)]
    assert low(builds) == [("engine", "engine-1"), ("build", "vllm 0.1")]
    versions = [Served(request(draw, 0.1 if n % 2 else 0.6, version=f"v{n % 2}"), "a") for n in range(80)]
    assert low(versions) == [("version", "v1")]


def test_noise_is_no_place() -> None:
    named = 0
    for seed in range(100):
        draw = random.Random(seed)
        found = [
            Served(
                request(draw, 0.55, draw.choice((50, 300, 900)), draw.choice((0, 16)), draw.choice("vw")),
                draw.choice("ab"),
            )
            for _ in range(120)
        ]
        named += bool(low(found))
    assert named <= 2


def test_what_is_not_told_or_too_little_is_not_cut() -> None:
    draw = random.Random(3)
    alike = [Served(request(draw, 0.5, cached=None), "a") for _ in range(40)]
    assert sliced(alike) == ()
    few = [*alike, *(Served(request(draw, 0.0, cached=None), "b") for _ in range(LEAST - 1))]
    assert sliced(few) == ()
    assert [part.part for part in sliced([*few, Served(request(draw, 0.0, cached=None), "b")])] == ["a", "b"]
    assert sliced([Served(replace(request(draw, 0.5), spec_steps=0, drafted=0), name) for name in "ab" * 20]) == ()


def test_by_position_a_loss_that_begins_later_is_told_from_one_of_all() -> None:
    scored = (0.6, 0.5, 0.5)
    later = by_position((60.0, 30.0, 2.0), (100.0, 60.0, 30.0), scored, 40)
    assert [part.low for part in later] == [False, False, True]
    assert where(later) == "most is lost: from drafted token 3 on"
    everywhere = by_position((20.0, 2.0), (100.0, 20.0), scored, 40)
    assert all(part.low for part in everywhere)
    assert where(everywhere) == ""
    assert by_position((1.0,), (LEAST - 1.0,), scored, 40) == ()


@given(st.randoms(use_true_random=False))
def test_the_order_of_requests_makes_no_difference(shuffled: random.Random) -> None:
    draw = random.Random(4)
    found = [
        Served(request(draw, 0.5, draw.choice((50, 900)), draw.choice((0, 8))), draw.choice("ab")) for _ in range(60)
    ]
    expected = sliced(found)
    shuffled.shuffle(found)
    again = sliced(found)
    assert [(part.by, part.part, part.requests, part.low) for part in again] == [
        (part.by, part.part, part.requests, part.low) for part in expected
    ]
