"""The pool of drafts by domain: who is put where, what is merged, what goes first, and random histories."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tided.policies.domains import Domain, DomainRules, Domains

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
RULES = DomainRules(size=3)
TWO = Domains(
    current=2,
    opened=2,
    served=B,
    entries=(Domain(1, A, 2.4, used_ms=100), Domain(2, B, 2.2, used_ms=200)),
)


def versions(domains: Domains) -> dict[int, str]:
    return {entry.number: entry.version for entry in domains.entries}


def test_the_first_draft_that_is_deployed_opens_the_first_domain() -> None:
    domains = Domains().deployed(A, 2.0, 10)
    assert (domains.current, domains.entries) == (1, (Domain(1, A, 2.0, 10),))
    assert domains.deployed(A, 9.0, 99) == domains  # a level: said again it changes nothing


def test_inside_a_domain_a_draft_replaces_the_one_before() -> None:
    domains = Domains().deployed(A, 2.0, 10).deployed(B, 2.3, 20)
    assert versions(domains) == {1: B}
    assert domains.entries[0].length == 2.3


def test_after_a_drift_the_next_draft_opens_a_domain_and_the_old_one_keeps_its_own() -> None:
    domains = Domains().deployed(A, 2.0, 10).drifted(50)
    assert (domains.current, domains.here) == (0, 2)
    assert domains.entries[0].used_ms == 50  # it was in use until then
    opened = domains.deployed(B, 2.2, 90)
    assert versions(opened) == {1: A, 2: B}
    assert (opened.current, opened.opened) == (2, 2)


def test_a_draft_that_scores_as_at_home_resumes_its_domain() -> None:
    domains = TWO.drifted(300).scored({A: 2.3, B: 1.3}, A, 400)
    assert (domains.current, domains.served) == (1, A)
    assert domains.of(A) == Domain(1, A, 2.4, 400, uses=2)
    assert domains.of(B) == Domain(2, B, 2.2, 300)
    after = domains.deployed(C, 2.5, 500)  # trained on from it, in its domain
    assert versions(after) == {1: C, 2: B}


def test_the_best_start_for_something_new_keeps_its_domain_and_the_question_open() -> None:
    domains = TWO.drifted(300).scored({A: 1.7, B: 1.2}, A, 400)
    assert (domains.current, domains.here, domains.served) == (0, 3, A)
    assert domains.of(A) == replace(TWO.entries[0])
    assert versions(domains.deployed(C, 2.0, 500)) == {1: A, 2: B, 3: C}


def test_a_drift_that_was_none_is_answered_by_the_serving_draft() -> None:
    assert TWO.drifted(300).scored({A: 1.1, B: 2.1}, B, 400).current == 2
    assert TWO.drifted(300).scored({A: 1.1, B: 1.5}, B, 400).current == 0


def test_a_score_without_a_drift_moves_nothing_unless_another_draft_wins() -> None:
    assert TWO.scored({A: 1.0, B: 1.0}, B, 400).entries == TWO.entries
    assert TWO.scored({A: 1.0, B: 1.0}, B, 400).current == 2
    assert TWO.scored({A: 2.4, B: 1.0}, A, 400).current == 1


def test_what_was_gone_back_to_and_did_not_hold_leaves_the_question_open() -> None:
    domains = TWO.drifted(300).scored({A: 2.3, B: 1.3}, A, 400).unknown(B)
    assert (domains.current, domains.served) == (0, B)
    assert versions(domains) == {1: A, 2: B}


def test_the_domain_that_was_left_longest_ago_goes_first_and_never_what_serves() -> None:
    domains = Domains()
    for number, version in enumerate((A, B, C, D)):
        domains = domains.drifted(100 * number).deployed(version, 2.0, 100 * number + 50, RULES)
    assert versions(domains) == {3: B, 4: C, 5: D}
    # B is gone back to: now C was left longest ago.
    back = domains.drifted(500).scored({B: 2.0, C: 1.0, D: 1.0}, B, 600, RULES)
    assert versions(back.drifted(700).deployed(A, 2.0, 800, RULES)) == {3: B, 5: D, 6: A}


def test_near_duplicates_in_two_domains_are_merged_into_the_better() -> None:
    once = TWO.scored({A: 2.00, B: 2.02}, B, 400)
    assert len(once.entries) == 2  # of one domain only
    twice = once.drifted(500).scored({A: 1.50, B: 1.51}, B, 600)
    assert versions(twice) == {2: B}
    assert twice.entries[0].uses == 2
    far = once.drifted(500).scored({A: 1.50, B: 1.40}, A, 600)
    assert len(far.entries) == 2


def test_what_was_trained_for_traffic_that_has_gone_is_kept_for_its_return() -> None:
    domains = TWO.drifted(300)
    kept = domains.kept(C, 2, 2.6, 400)
    assert versions(kept) == {1: A, 2: C}
    assert kept.of(C) == Domain(2, C, 2.6, 300)
    assert (kept.current, kept.served, kept.here) == (0, B, 3)
    assert kept.kept(C, 2, 2.6, 500) == kept  # safe to repeat
    assert domains.kept(A, 2, 2.6, 400) == domains  # what it serves already
    full = domains.kept(C, 3, 2.0, 400, RULES).kept(D, 4, 2.0, 500, RULES)
    assert versions(full) == {2: B, 3: C, 4: D}


def test_traffic_that_was_left_before_a_draft_was_deployed_for_it_keeps_its_number() -> None:
    gone = TWO.drifted(300)
    assert gone.here == 3
    now = gone.drifted(400)
    assert (now.here, now.opened) == (4, 3)
    opened = now.kept(C, 3, 2.0, 500)
    assert (opened.here, opened.opened, versions(opened)) == (4, 3, {1: A, 2: B, 3: C})
    assert versions(opened.deployed(D, 2.0, 600)) == {1: A, 2: B, 3: C, 4: D}


def test_a_draft_that_must_not_serve_is_in_no_domain() -> None:
    domains = TWO.without(frozenset({A}))
    assert versions(domains) == {2: B}
    assert TWO.without(frozenset({B})).current == 0


class History(RuleBasedStateMachine):
    """Drifts, deployments and scores in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.domains = Domains()
        self.now_ms = 0
        self.made = 0

    def tick(self) -> int:
        self.now_ms += 10
        return self.now_ms

    @rule()
    def drift(self) -> None:
        before = self.domains
        self.domains = before.drifted(self.tick())
        assert {e.version for e in self.domains.entries} == {e.version for e in before.entries}
        assert self.domains.current == 0

    @rule(length=st.floats(1.0, 4.0))
    def train(self, length: float) -> None:
        before, version = self.domains, f"{self.made:064x}"
        self.made += 1
        self.domains = before.deployed(version, length, self.tick(), RULES)
        if before.current:
            assert self.domains.current == before.current  # never a new one
            assert len(self.domains.entries) == len(before.entries)
        else:
            assert self.domains.current == before.opened + 1
        assert self.domains.of(version) is not None

    @precondition(lambda self: self.domains.opened)
    @rule(data=st.data(), length=st.floats(1.0, 4.0))
    def keep(self, data: st.DataObject, length: float) -> None:
        """A training ends for a domain that traffic has left."""
        before, version = self.domains, f"{self.made:064x}"
        numbers = [number for number in range(1, before.opened + 1) if number != before.here]
        if not numbers:
            return
        self.made += 1
        self.domains = before.kept(version, data.draw(st.sampled_from(numbers)), length, self.tick(), RULES)
        assert (self.domains.here, self.domains.served) == (before.here, before.served)

    @precondition(lambda self: self.domains.served)
    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        known = sorted({self.domains.served, *(e.version for e in self.domains.entries)})
        lengths = {version: data.draw(st.floats(1.0, 4.0)) for version in known}
        best = data.draw(st.sampled_from(known))
        self.domains = self.domains.scored(lengths, best, self.tick(), RULES)
        assert self.domains.served == best

    @precondition(lambda self: self.domains.entries)
    @rule(data=st.data())
    def blame(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([e.version for e in self.domains.entries]))
        self.domains = self.domains.without(frozenset({version}))
        assert self.domains.of(version) is None

    @precondition(lambda self: self.domains.served)
    @rule()
    def undo(self) -> None:
        self.domains = self.domains.unknown(self.domains.served)

    @invariant()
    def it_is_sound(self) -> None:
        entries = self.domains.entries
        numbers = [entry.number for entry in entries]
        assert len(entries) <= RULES.size
        assert len(set(numbers)) == len(numbers)
        assert len({entry.version for entry in entries}) == len(entries)
        assert all(0 < number <= self.domains.opened for number in numbers)
        assert self.domains.current in (0, *numbers)
        assert self.domains.here in self.domains.numbers
        domains = [scoring.domain for scoring in self.domains.scorings]
        assert len(set(domains)) == len(domains)
        assert set(domains) <= self.domains.numbers
        if self.domains.current:
            here = next(entry for entry in entries if entry.number == self.domains.current)
            assert here.version == self.domains.served  # what serves is never evicted


TestHistory = History.TestCase
