"""The room of child processes: every heavy step runs in one, forked from a preloaded zygote.

Owns how a child starts, what it may reach, how it is watched and how it dies. Knows nothing of the ledger, the
store or Celery. `workers.runner` uses `Sandbox`; `/readyz` and manifests use `probe_isolation`.

Four kinds of process, each doing one thing:
- the worker (`parent`) asks for a run and waits for its end;
- a zygote per pool (`zygote`) has imported the heavy libraries once and forks a supervisor per run;
- the supervisor (`supervisor`) forks the child, measures its process tree and kills it;
- the child (`child`) isolates itself (`isolation`), calls the step function and answers.
"""

from workers.sandbox.isolation import Isolation, probe_isolation
from workers.sandbox.outcome import ChildResult, Limits, StopReason
from workers.sandbox.parent import Sandbox

__all__ = ["ChildResult", "Isolation", "Limits", "Sandbox", "StopReason", "probe_isolation"]
