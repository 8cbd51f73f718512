"""The templated traffic: sizes, splits that share templates and no prompt, determinism."""

import pytest

from bench.traffic import DOMAINS, Domain, overlaps, split_of


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=list(DOMAINS))
def test_a_domain_is_large_enough_and_its_splits_share_no_prompt(domain: Domain) -> None:
    train, measure = domain.prompts("train"), domain.prompts("measure")
    assert len(domain.templates) >= 20
    assert len(domain.filled) >= 2000
    assert len(train) + len(measure) == len(domain.filled)
    assert overlaps(measure, train) == 0
    assert len(measure) > 0.1 * len(domain.filled)


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=list(DOMAINS))
def test_every_template_is_in_both_splits_from_the_beginning(domain: Domain) -> None:
    for split in ("train", "measure"):
        first = domain.prompts(split)[: len(domain.templates)]
        starts = {prompt.user for prompt in first}
        assert len(starts) == len(domain.templates)


def test_the_order_follows_the_seed() -> None:
    domain = DOMAINS["code"]
    assert domain.prompts("train", 1) == domain.prompts("train", 1)
    assert domain.prompts("train", 1) != domain.prompts("train", 2)
    assert set(domain.prompts("train", 1)) == set(domain.prompts("train", 2))


def test_overlaps_counts_exact_duplicates() -> None:
    prompts = DOMAINS["code"].prompts("train")[:5]
    assert overlaps(prompts, prompts[2:]) == 3


def test_the_split_follows_the_text() -> None:
    shares = [split_of(f"prompt {i}") == "measure" for i in range(5000)]
    assert 0.17 < sum(shares) / len(shares) < 0.23


def test_the_example_goes_between_the_system_prompt_and_the_question() -> None:
    prompt = DOMAINS["json"].prompts("measure")[0]
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert [message["role"] for message in DOMAINS["code"].prompts("measure")[0].messages] == ["system", "user"]
