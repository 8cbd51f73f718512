"""Keys: one slot per engine, closed names, and the fixture that finds keys which would live for ever (promise 15)."""

import pytest

from tests.conftest import Valkey, unbounded_keys
from tided.model.errors import Refused
from tided.wire import keys


def test_all_keys_of_an_engine_share_its_slot() -> None:
    names = [keys.samples("e1"), keys.credit("e1"), keys.dead("e1"), keys.ledger("e1"), keys.seen("e1", "i-1")]
    names += [keys.info("e1"), keys.commands("e1"), keys.replies("e1"), keys.observations("e1")]
    names += [keys.fetches("e1"), keys.parts("e1", "cmd-1")]
    assert all(name.startswith("tided:{e1}:") for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "E1", "a b", "../a", "a}:b", "a*", "a\n", "x" * 65])
def test_what_is_no_name_makes_no_key(name: str) -> None:
    with pytest.raises(Refused):
        keys.samples(name)
    with pytest.raises(Refused):
        keys.seen("e1", name)


def test_a_key_without_ttl_that_is_not_declared_permanent_is_found(valkey: Valkey) -> None:
    valkey.client.set(keys.credit("e1"), 1)
    valkey.client.set(keys.info("e1"), b"", ex=5)
    assert unbounded_keys(valkey.client) == []
    valkey.client.set(keys.seen("e1", "i-1"), b"")
    assert unbounded_keys(valkey.client) == [keys.seen("e1", "i-1")]
    valkey.client.delete(keys.seen("e1", "i-1"))
