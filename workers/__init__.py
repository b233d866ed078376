"""EdgeKiln's workers: what is done. May import `service`; `service` never imports this package."""
