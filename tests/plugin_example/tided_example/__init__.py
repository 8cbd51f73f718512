"""A backend and a policy for tided, as an example."""
