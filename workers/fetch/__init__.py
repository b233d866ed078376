"""From a source to a validated checkpoint: the steps resolve, fetch and plan."""
