"""From a checkpoint to a bundle: engines, recipes, tokenizers and the formats a phone reads.

Modules here are functions of files and parameters; they never reach the ledger, the queue or the store.
Called by `workers.sandbox` in a child process, and by hand (`python -m workers.convert.quantize ...`).
"""
