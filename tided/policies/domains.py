"""The pool of drafts by domain: which draft served best in each kind of traffic, so that it can be gone back to when that traffic returns.

Nobody says which domain a request is of. A drift opens the question; scores of the pooled drafts on the newest samples answer it. A draft
that scores there as it did at home has met its domain again. One that is best and yet falls short of that is a start for something new:
then the question stays open, and the next draft that is deployed opens a domain. What is trained inside a domain replaces its draft, and
what was trained for one that traffic has left meanwhile is kept for its return.
The pool is bounded: the draft whose domain was left longest ago goes first, never the one of the present domain. Two drafts that score
alike on samples of two domains are one too many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of traffic. `version`: the draft that served it last; `length`: the acceptance length that this scored on samples of
    it, 0.0 when that is not known. `used_ms`: when it was begun, resumed or left last; `uses`: how often it was begun or resumed."""

    number: int
    version: str
    length: float
    used_ms: int
    uses: int = 1


@dataclass(frozen=True, slots=True)
class Scoring:
    """Acceptance lengths of drafts on the same samples, taken in `domain`."""

    domain: int
    at_ms: int
    lengths: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class DomainRules:
    """`size`: most domains. `same`: share of its length at home by which a draft may fall short and be home. `alike`: share by which
    near-duplicates may differ."""

    size: int = 8
    same: float = 0.15
    alike: float = 0.03


DEFAULT_RULES = DomainRules()


@dataclass(frozen=True, slots=True)
class Domains:
    """`current` is the present domain's number, 0 while the question is open. `opened` counts numbers given, also to traffic that was left
    before a draft was deployed for it. `served`: the version that was last accounted for. `scorings`: the newest of each domain."""

    current: int = 0
    opened: int = 0
    served: str = ""
    entries: tuple[Domain, ...] = ()
    scorings: tuple[Scoring, ...] = ()

    @property
    def here(self) -> int:
        """The number of the present domain, or that under which it will be opened."""
        return self.current or self.opened + 1

    @property
    def numbers(self) -> frozenset[int]:
        """Of all domains that are known, and of the present one."""
        return frozenset({self.here, *(entry.number for entry in self.entries)})

    def of(self, version: str) -> Domain | None:
        """The domain that a draft serves."""
        return next((entry for entry in self.entries if entry.version == version), None)

    def others(self, serving: str) -> tuple[str, ...]:
        """The pooled drafts but the one that serves, by how recently their domain was used."""
        known = sorted(self.entries, key=lambda entry: (-entry.used_ms, -entry.number))
        return tuple(entry.version for entry in known if entry.version != serving)

    def drifted(self, now_ms: int) -> "Domains":
        """Traffic has moved: the present domain is left, and which one it is now is open. No two kinds of traffic have one number."""
        left = self._used(self.current, now_ms)
        return replace(left, current=0, opened=self.opened if self.current else self.here)._tidied()

    def deployed(self, version: str, length: float, now_ms: int, rules: DomainRules = DEFAULT_RULES) -> "Domains":
        """Another draft serves for good. One that the pool holds brings its domain; any other is the present domain's, or opens one."""
        if version == self.served:
            return self
        known = self.of(version)
        if known is not None:
            return replace(self, current=known.number, served=version)._used(known.number, now_ms)
        if self.current:
            entries = tuple(
                replace(entry, version=version, length=length) if entry.number == self.current else entry
                for entry in self.entries
            )
            return replace(self, served=version, entries=entries)
        number = self.opened + 1
        entries = (*self.entries, Domain(number, version, length, now_ms))
        return replace(self, current=number, opened=number, served=version, entries=entries)._bounded(rules)

    def kept(
        self, version: str, number: int, length: float, now_ms: int, rules: DomainRules = DEFAULT_RULES
    ) -> "Domains":
        """A draft was trained for a domain that is not the present one: it replaces that one's draft, or opens the domain. What serves
        stays as it is."""
        if self.of(version) is not None:
            return self
        entries = tuple(entry for entry in self.entries if entry.number != number)
        known = next((entry for entry in self.entries if entry.number == number), Domain(number, "", 0.0, now_ms))
        entry = replace(known, version=version, length=length)
        return replace(self, opened=max(self.opened, number), entries=(*entries, entry))._bounded(rules)

    def scored(
        self, lengths: Mapping[str, float], best: str, now_ms: int, rules: DomainRules = DEFAULT_RULES
    ) -> "Domains":
        """Drafts were scored on the newest samples; `best`, one of them, is what shall serve. Near-duplicates are merged."""
        found, home = self, self.of(best)
        if not self.current or best != self.served:
            is_home = home is not None and lengths[best] >= (1.0 - rules.same) * home.length
            found = replace(self, current=home.number if home is not None and is_home else 0)
            if found.current != self.current:
                found = found._used(found.current, now_ms, more=1)
        newest = Scoring(found.here, now_ms, tuple(sorted(lengths.items())))
        kept = tuple(scoring for scoring in found.scorings if scoring.domain != newest.domain)
        return replace(found, served=best, scorings=(*kept, newest))._merged(rules)._bounded(rules)

    def unknown(self, served: str) -> "Domains":
        """What was gone back to served badly: the question is open again, and `served` serves."""
        return replace(self, current=0, served=served)

    def without(self, versions: frozenset[str]) -> "Domains":
        """Drafts that must not serve any more are in no domain."""
        entries = tuple(entry for entry in self.entries if entry.version not in versions)
        gone = self.current and all(entry.number != self.current for entry in entries)
        return replace(self, entries=entries, current=0 if gone else self.current)._tidied()

    def _used(self, number: int, now_ms: int, more: int = 0) -> "Domains":
        entries = tuple(
            replace(entry, used_ms=max(entry.used_ms, now_ms), uses=entry.uses + more)
            if entry.number == number
            else entry
            for entry in self.entries
        )
        return replace(self, entries=entries)

    def _serves(self, entry: Domain) -> bool:
        return entry.number == self.current or entry.version == self.served

    def _merged(self, rules: DomainRules) -> "Domains":
        for first in self.entries:
            for second in self.entries:
                if first.number < second.number and self._alike(first.version, second.version, rules.alike):
                    return self._merge(first, second)._merged(rules)
        return self

    def _merge(self, first: Domain, second: Domain) -> "Domains":
        """What serves stays; of two that do not, the better one, or the newer."""
        both = [dict(scoring.lengths) for scoring in self.scorings]
        common = [lengths for lengths in both if first.version in lengths and second.version in lengths]

        def rank(entry: Domain) -> tuple[bool, bool, float, int]:
            length = sum(lengths[entry.version] for lengths in common)
            return entry.number == self.current, entry.version == self.served, length, entry.number

        gone, kept = sorted((first, second), key=rank)
        merged = replace(kept, used_ms=max(kept.used_ms, gone.used_ms), uses=kept.uses + gone.uses)
        entries = tuple(merged if entry is kept else entry for entry in self.entries if entry is not gone)
        return replace(self, entries=entries)._tidied()

    def _alike(self, first: str, second: str, margin: float) -> bool:
        both = [
            (found[first], found[second])
            for found in (dict(scoring.lengths) for scoring in self.scorings)
            if first in found and second in found
        ]
        return len(both) >= 2 and all(abs(a - b) <= margin * max(a, b) for a, b in both)

    def _bounded(self, rules: DomainRules) -> "Domains":
        left = [entry for entry in self.entries if not self._serves(entry)]
        excess = max(0, len(self.entries) - rules.size)
        oldest = sorted(left, key=lambda entry: (entry.used_ms, entry.number))[:excess]
        return replace(self, entries=tuple(entry for entry in self.entries if entry not in oldest))._tidied()

    def _tidied(self) -> "Domains":
        """Scorings of domains that are known, or present, only."""
        return replace(self, scorings=tuple(scoring for scoring in self.scorings if scoring.domain in self.numbers))
