"""Which code performs which kind of step, in which pool, and how that code's revision is known.

Called by `workers.runner` to find a step's function, and by `workers.app` to say what this worker makes things
with. Imports no step: functions are named, and resolved inside the child.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from service.ledger.keys import Toolchain

_ROOT = Path(__file__).resolve().parent

#: Packages whose change may change an output byte or a figure.
_TOOLS = (
    "torch",
    "litert-torch",
    "litert-converter",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "litert-lm",
    "litert-lm-api",
    "litert-lm-builder",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "numpy",
)

#: Modules that a pool's zygote imports once. `light` children start in milliseconds; `convert` saves 15 s a step.
PRELOADS: Mapping[str, tuple[str, ...]] = {
    "light": (
        "numpy",
        "workers.fetch.plan",
        "workers.convert.quantize",
        "workers.convert.bundle",
        "workers.verify.verify",
        "workers.devices.host",
    ),
    "convert": ("workers.convert.convert", "workers.convert.reauthored", "workers.verify.reference"),
    "fetch": ("workers.fetch.resolve", "workers.fetch.fetch"),
}


@dataclass(frozen=True)
class StepCode:
    """How a kind of step is performed."""

    #: `module:function` of the step function.
    target: str
    #: Zygote that its child is forked from.
    pool: str
    #: Globs below `workers/`; a change in one of these files makes new step keys.
    sources: tuple[str, ...]
    #: Inputs that the child reads; None means all.
    reads: tuple[str, ...] | None = None
    #: Whether the child may use the network, and gets the credential.
    network: bool = False
    #: Whether the attempt must never be repeated by itself once the tool has started.
    is_pinned: bool = False

    @property
    def revision(self) -> str:
        """SHA-256 over the names and bytes of its sources."""
        digest = hashlib.sha256()
        for pattern in self.sources:
            for path in sorted(_ROOT.glob(pattern)):
                digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


CATALOG: Mapping[str, StepCode] = {
    "resolve": StepCode("workers.fetch.resolve:run", "fetch", ("fetch/*.py",), network=True),
    "fetch": StepCode("workers.fetch.fetch:run", "fetch", ("fetch/*.py",), network=True),
    "plan": StepCode(
        "workers.fetch.plan:run", "light", ("fetch/*.py", "convert/architectures/*.py", "convert/tokenizer*.py")
    ),
    "reference": StepCode(
        "workers.verify.reference:run",
        "convert",
        (
            "verify/conversations.py",
            "verify/openelm.py",
            "verify/probe.py",
            "verify/reference.py",
            "verify/scoring.py",
            "verify/source*.py",
            "verify/user_files.py",
            "convert/tokenizer_samples.py",
            "fetch/strict_json.py",
        ),
    ),
    "convert": StepCode(
        "workers.convert.convert:run",
        "convert",
        (
            "convert/convert.py",
            "convert/reauthored*.py",
            "convert/traced.py",
            "convert/side_by_side.py",
            "convert/weights.py",
            "convert/toolfixes.py",
            "convert/architectures/*.py",
        ),
    ),
    "quantize": StepCode(
        "workers.convert.quantize:run",
        "light",
        (
            "convert/quantize.py",
            "convert/storage.py",
            "convert/block_scales.py",
            "convert/calibration*.py",
            "verify/graph.py",
            "verify/probe.py",
            "fetch/chat_template.py",
            "fetch/template_render.py",
            "fetch/strict_json.py",
        ),
    ),
    "bundle": StepCode(
        "workers.convert.bundle:run", "light", ("convert/bundle*.py", "convert/tokenizer*.py", "convert/metadata*.py")
    ),
    "verify": StepCode("workers.verify.verify:run", "light", ("verify/*.py", "convert/bundle_reader.py")),
    "benchmark": StepCode("workers.devices.host:run", "light", ("devices/*.py",), reads=("artifact",), is_pinned=True),
}


def read_toolchain() -> Toolchain:
    """Return what this installation makes things with; a package that is absent is left out."""
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    revisions = {kind: code.revision for kind, code in CATALOG.items()}
    # Publishing runs in the worker itself.
    revisions["publish"] = hashlib.sha256((_ROOT / "publish.py").read_bytes()).hexdigest()
    return Toolchain(versions=versions, revisions=revisions)
