"""How much chaos: a short form for every run of the tests, a long one for `make chaos`.

Each number is a variable of the environment; what is not set is the short form, whose seed is fixed.
"""

from __future__ import annotations

import os

#: Chooses who is hit, how and when; the same seed plays the same faults.
SEED = int(os.environ.get("CHAOS_SEED", "4"))
#: The S3 server of the storm, the store's faults and the soak; see `tests.services.s3_server`.
S3_SERVER = os.environ.get("CHAOS_S3", "swift")
#: Jobs of eight steps that a storm must bring to their end.
JOBS = int(os.environ.get("CHAOS_JOBS", "10"))
#: Minutes after which a storm gets no more jobs and must only end those it has; 0: it gets all.
STORM_MIN = float(os.environ.get("CHAOS_STORM_MIN", "0"))
#: Races between a holder whose lease has run out and the next one.
RACES = int(os.environ.get("CHAOS_RACES", "200"))
#: Histories that the state machine plays on each database; 0: the few of the short form, always the same.
EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "0"))
#: Jobs that go through a store that answers wrongly.
STORE_JOBS = int(os.environ.get("CHAOS_STORE_JOBS", "2"))
#: Size of an object that goes through the stores.
OBJECT_BYTES = int(os.environ.get("CHAOS_OBJECT_BYTES", str((24 << 20) + 1)))
#: How long a soak lasts.
SOAK_MIN = float(os.environ.get("CHAOS_SOAK_MIN", "10"))
