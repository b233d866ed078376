"""The ledger's schema as the database sees it, version by version. Run by `service.ledger.database.migrate`."""
