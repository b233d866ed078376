"""EdgeKiln's service: what is asked, what is known, what is kept. Never imports `workers`."""
