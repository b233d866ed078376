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

#: What holds the packages `workers` and `service`.
_ROOT = Path(__file__).resolve().parents[1]

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
    "phone": ("workers.devices.phone",),
}


@dataclass(frozen=True)
class StepCode:
    """How a kind of step is performed."""

    #: `module:function` of the step function.
    target: str
    #: Zygote that its child is forked from.
    pool: str
    #: Globs beside the packages; a change in one of these files makes new step keys.
    sources: tuple[str, ...]
    #: Inputs that the child reads; None means all.
    reads: tuple[str, ...] | None = None
    #: Whether the child may use the network.
    network: bool = False
    #: Whether it gets the credential of the sources.
    gets_credential: bool = False
    #: Whether the attempt must never be repeated by itself once the tool has started.
    is_pinned: bool = False
    #: How far its child lets others of the host go first.
    niceness: int = 0

    @property
    def revision(self) -> str:
        """SHA-256 over the names and bytes of its sources."""
        digest = hashlib.sha256()
        for pattern in self.sources:
            for path in sorted(_ROOT.glob(pattern)):
                digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


_FETCH_SOURCES = (
    "workers/fetch/*.py",
    "service/checkpoint_files.py",
    "service/strict_json.py",
    "service/web_addresses.py",
)

CATALOG: Mapping[str, StepCode] = {
    "resolve": StepCode("workers.fetch.resolve:run", "fetch", _FETCH_SOURCES, network=True, gets_credential=True),
    "fetch": StepCode("workers.fetch.fetch:run", "fetch", _FETCH_SOURCES, network=True, gets_credential=True),
    "plan": StepCode(
        "workers.fetch.plan:run",
        "light",
        (
            *_FETCH_SOURCES,
            "workers/convert/architectures/*.py",
            "workers/convert/tokenizer*.py",
            "service/user_files.py",
        ),
    ),
    "reference": StepCode(
        "workers.verify.reference:run",
        "convert",
        (
            "workers/verify/conversations.py",
            "workers/verify/openelm.py",
            "workers/verify/probe.py",
            "workers/verify/reference.py",
            "workers/verify/scoring.py",
            "workers/verify/source*.py",
            "workers/convert/architectures/parameters.py",
            "workers/convert/architectures/shape.py",
            "workers/convert/tokenizer_samples.py",
            "service/strict_json.py",
            "service/user_files.py",
        ),
        # `convert` begins at the same time and goes first: this uses what it leaves idle in its phases on one core.
        niceness=10,
    ),
    "convert": StepCode(
        "workers.convert.convert:run",
        "convert",
        (
            "workers/convert/convert.py",
            "workers/convert/reauthored*.py",
            "workers/convert/traced.py",
            "workers/convert/side_by_side.py",
            "workers/convert/weights.py",
            "workers/convert/toolfixes.py",
            "workers/convert/architectures/*.py",
        ),
    ),
    "quantize": StepCode(
        "workers.convert.quantize:run",
        "light",
        (
            "workers/convert/quantize.py",
            "workers/convert/storage.py",
            "workers/convert/block_scales.py",
            "workers/convert/calibration*.py",
            "workers/verify/graph.py",
            "workers/verify/openelm.py",
            "workers/verify/probe.py",
            "workers/verify/source_tokenizer.py",
            "workers/fetch/chat_template.py",
            "workers/fetch/strict_json.py",
            "workers/fetch/template_render.py",
            "service/strict_json.py",
            "service/user_files.py",
        ),
    ),
    "bundle": StepCode(
        "workers.convert.bundle:run",
        "light",
        ("workers/convert/bundle*.py", "workers/convert/tokenizer*.py", "workers/convert/metadata*.py"),
    ),
    "verify": StepCode(
        "workers.verify.verify:run", "light", ("workers/verify/*.py", "workers/convert/bundle_reader.py")
    ),
    "benchmark": StepCode(
        "workers.devices.host:run", "light", ("workers/devices/*.py",), reads=("artifact",), is_pinned=True
    ),
}


#: A benchmark on a phone, in two parts: what may be repeated, and what never is by itself. They talk to an adb server.
PREPARE_PHONE = StepCode("workers.devices.phone:prepare", "phone", ("workers/devices/*.py",), network=True)
MEASURE_PHONE = StepCode("workers.devices.phone:measure", "phone", ("workers/devices/*.py",), network=True)


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
    revisions["publish"] = hashlib.sha256((_ROOT / "workers" / "publish.py").read_bytes()).hexdigest()
    return Toolchain(versions=versions, revisions=revisions)
