"""Where artifacts are measured: devices, their conditions, the tools that run there, and statistics.

Owns measuring and nothing else: no thresholds (those are `service.gates`), no ledger, no store.
"""
