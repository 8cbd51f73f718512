"""The embedded engine (tided.engine.embedded): the Redis protocol, with what is special about it.

It measures its profile at start-up, on its own core, and again only when idle; at gamma = 0 it runs no draft forward at all.
"""

from tided.backends.redis import RedisBackend
from tided.model.engines import LatencyProfile
from tided.model.errors import Refused


class TransformersBackend(RedisBackend):
    """See `Backend`."""

    async def measure_profile(self, epoch: int, deadline_s: float) -> LatencyProfile:
        """As `Backend.measure_profile`; refuses what cannot be a profile rather than steering the policy with it."""
        profile = await super().measure_profile(epoch, deadline_s)
        if not profile.tokens or not profile.batches or min(profile.target_s + profile.draft_s) <= 0:
            raise Refused(f"engine {self.engine}: its latency profile is empty or holds times that are not positive")
        return profile
