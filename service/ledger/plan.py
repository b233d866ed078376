"""The graph of a job: from what is asked and what is known to steps. Pure.

A job's graph is written in three parts, as facts arrive: `expand_submitted` with the request,
`expand_resolved` when the source is pinned, `expand_planned` when the checkpoint's facts are known. The
ledger turns the `StepSpec`s into rows (`service.ledger.graph`). A job that measures a published artifact is written at
once: `expand_measuring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service import gates, recipes
from service.devices import HOST, PHONE_CLASS
from service.requests import JobRequest, MeasuringRequest

#: Step kind -> resource class (and Celery queue).
RESOURCE_CLASSES: dict[str, str] = {
    "resolve": "fetch",
    "fetch": "fetch",
    "plan": "light",
    "reference": "light",
    "convert": "convert",
    "quantize": "light",
    "bundle": "light",
    "verify": "light",
    "benchmark": "device",
    "publish": "light",
}

#: Kinds that are shared across variants, jobs and time; the others belong to one job.
SHARED_KINDS = frozenset({"fetch", "reference", "convert", "quantize", "bundle", "verify"})


@dataclass(frozen=True)
class StepSpec:
    """A step that a job needs."""

    #: Unique within the job, e.g. `bundle:dynamic_int8:task`.
    name: str
    kind: str
    params: Mapping[str, Any]
    #: Input name -> name of the spec that makes it.
    inputs: Mapping[str, str] = field(default_factory=dict)
    #: Names of the variants it serves; none for steps that serve the whole job.
    variants: tuple[str, ...] = ()
    #: Anonymous memory it is expected to use at its peak; not part of its key.
    predicted_peak_anon_bytes: int | None = None

    @property
    def shared(self) -> bool:
        """Whether other jobs of the tenant may join it."""
        return self.kind in SHARED_KINDS

    @property
    def resource_class(self) -> str:
        """What it needs to run."""
        if self.kind == "benchmark" and self.params["device"] != HOST:
            return PHONE_CLASS
        return RESOURCE_CLASSES[self.kind]


def expand_submitted(request: JobRequest) -> list[StepSpec]:
    """Return the first step of a new job."""
    return [StepSpec("resolve", "resolve", {"source": request.source.model_dump(mode="json")})]


def expand_resolved(request: JobRequest, source: Mapping[str, Any]) -> list[StepSpec]:
    """Return what follows once `source` is pinned to an immutable revision."""
    return [StepSpec("fetch", "fetch", {"source": dict(source)}), plan_spec(request)]


def plan_spec(request: JobRequest) -> StepSpec:
    """Return the job's own look at the checkpoint."""
    params = {
        "engines": list(request.engines),
        "formats": list(request.formats),
        "recipes": list(request.recipes),
        "prefill_lengths": None if request.prefill_lengths is None else list(request.prefill_lengths),
        "context_length": request.context_length,
        "ignore_custom_code": request.ignore_custom_code,
        "own_recipes": request.own_recipes,
        "calibration": None if request.calibration is None else {"kind": request.calibration.kind},
    }
    return StepSpec("plan", "plan", params, inputs={"checkpoint": "fetch"})


def expand_planned(
    request: JobRequest,
    facts: Mapping[str, Any],
    benchmark: Mapping[str, Any],
    devices: Sequence[str] | None = None,
) -> list[StepSpec]:
    """Return the rest of the graph, inputs before dependents.

    `facts` are the figures of `plan`; `benchmark` holds the operator's protocol (`processes`); `devices` are the
    request's, where one that means several stands for each of them.
    """
    lengths = {"prefill_lengths": list(facts["prefill_lengths"]), "context_length": facts["context_length"]}
    predicted: Mapping[str, int] = facts.get("predicted_peak_anon_bytes", {})
    specs: dict[str, StepSpec] = {}

    def add(name: str, kind: str, params: Mapping[str, Any], inputs: Mapping[str, str], variant: str) -> str:
        known = specs.get(name)
        variants = (*known.variants, variant) if known else (variant,)
        specs[name] = StepSpec(name, kind, params, inputs, variants, predict(kind, variant, params.get("format")))
        return name

    def predict(kind: str, variant: str, model_format: str | None) -> int | None:
        asked_engine, recipe = request.variant_names[variant]
        names = (
            f"{kind}:{recipe}:{model_format}",
            f"{kind}:{recipe}",
            f"{kind}:{facts['engines'][asked_engine]}",
            kind,
        )
        return next((predicted[name] for name in names if name in predicted), None)

    for variant, (asked_engine, recipe) in request.variant_names.items():
        engine = facts["engines"][asked_engine]
        texts = {**lengths, **_uploads_of(request, "evaluation", "perplexity_text")}
        reference = add("reference", "reference", texts, {"checkpoint": "fetch"}, variant)
        convert = add(f"convert:{engine}", "convert", {"engine": engine, **lengths}, {"checkpoint": "fetch"}, variant)
        calibration = _calibration_of(request, recipe, lengths)
        quantize = add(
            f"quantize:{engine}:{recipe}",
            "quantize",
            {"recipe": recipe, **_quantization_of(request, recipe), **calibration},
            {"convert": convert, **({"checkpoint": "fetch"} if calibration else {})},
            variant,
        )
        artifacts = {"tflite": quantize}
        proofs: dict[str, str] = {}
        # The graph is proven whatever the formats: a bundle is held to what that proof left, and runs nothing twice.
        for kind in ("tflite", *(kind for kind in request.formats if kind != "tflite")):
            proof_inputs = {"reference": reference, "quantize": quantize}
            if kind != "tflite":
                artifacts[kind] = add(
                    f"bundle:{engine}:{recipe}:{kind}",
                    "bundle",
                    {"format": kind, "context_length": lengths["context_length"]},
                    {"checkpoint": "fetch", "quantize": quantize},
                    variant,
                )
                proof_inputs = {
                    "reference": reference,
                    "bundle": artifacts[kind],
                    "verify_tflite": proofs["verify_tflite"],
                }
            proofs[f"verify_{kind}"] = add(
                f"verify:{engine}:{recipe}:{kind}",
                "verify",
                {"format": kind, "recipe": recipe, **lengths},
                proof_inputs,
                variant,
            )
        measured = {
            f"benchmark_{place}_{kind}": add(
                f"benchmark:{variant}:{place}:{kind}",
                "benchmark",
                _measuring_params(device, how, kind, benchmark, facts),
                # Only a proven artifact is measured; beside it lies what its graph answered on the host.
                {
                    "artifact": artifacts[kind],
                    "verify": proofs[f"verify_{kind}"],
                    "reference": reference,
                    "graph": proofs["verify_tflite"],
                },
                variant,
            )
            for device in (request.devices if devices is None else devices)
            for place, how in (_ways(request, device),)
            for kind in request.formats
        }
        add(
            f"publish:{variant}",
            "publish",
            {
                "formats": list(request.formats),
                "recipe": recipe,
                **_settings_of(request, recipe),
                "engine": engine,
                "gates": request.gates,
            },
            {
                "checkpoint": "fetch",
                "convert": convert,
                "reference": reference,
                **{f"artifact_{kind}": artifacts[kind] for kind in request.formats},
                **proofs,
                # An absent device holds back a publication only when a gate names one of its figures.
                **(measured if gates.needs_benchmark(request.gates) else {}),
            },
            variant,
        )
    return list(specs.values())


def expand_measuring(
    request: MeasuringRequest, variant: str, inputs: Iterable[str], lengths: Mapping[str, Any], devices: Sequence[str]
) -> list[StepSpec]:
    """Return the benchmarks of an artifact that was published before, as its own job would have had them.

    `inputs`: what is there of `artifact`, `verify`, `reference` and `graph`, each called as the step that made it;
    `lengths` are the parameters of the proof.
    """
    (kind,) = request.formats
    return [
        StepSpec(
            f"benchmark:{variant}:{place}:{kind}",
            "benchmark",
            _measuring_params(device, how, kind, {"processes": request.processes}, lengths),
            {name: name for name in inputs},
            (variant,),
        )
        for device in devices
        for place, how in (_ways(request, device),)
    ]


def _measuring_params(
    device: str, how: Mapping[str, Any], model_format: str, benchmark: Mapping[str, Any], lengths: Mapping[str, Any]
) -> dict[str, Any]:
    place = {"device": device, "format": model_format}
    return {**place, **benchmark, **how, **_workload(lengths), **_signatures(lengths, model_format)}


def _ways(request: JobRequest, device: str) -> tuple[str, dict[str, Any]]:
    """How a device is asked to compute, and a name for that: the host in one way, a phone in all that the job names.

    Several ways are arms of one step, which runs them in turns; threads are of the CPU.
    """
    if device == HOST:
        return device, {}
    arms: list[dict[str, Any]] = [
        {"backend": backend, "threads": threads}
        for backend in request.backends
        for threads in (request.threads if backend == "cpu" and request.threads else (None,))
    ]
    asides = {"smoke_prompts": request.smoke_prompts, "profile": request.profile}
    if len(arms) > 1:
        return device, {"arms": arms, **asides}
    (arm,) = arms
    name = f"{device}:{arm['backend']}" + ("" if arm["threads"] is None else f":{arm['threads']}")
    return name, {**arm, **asides}


def _signatures(facts: Mapping[str, Any], model_format: str) -> dict[str, Any]:
    """The signatures of a graph, which its tool measures one by one; a bundle's runtime knows them itself."""
    if model_format != "tflite":
        return {}
    return {"signatures": [*(f"prefill_{length}" for length in facts["prefill_lengths"]), "decode"]}


def _quantization_of(request: JobRequest, recipe: str) -> dict[str, Any]:
    """What a recipe asks of the quantizer, whoever named it: a name may mean something else tomorrow."""
    settings = [dict(entry) for entry in recipes.find_recipe(recipe, request.own_recipes).settings]
    return {"settings": settings} if settings else {}


def _settings_of(request: JobRequest, recipe: str) -> dict[str, Any]:
    """The entries of a user's own recipe; its name alone says nothing."""
    return {"settings": request.own_recipes[recipe]} if recipe in request.own_recipes else {}


def _calibration_of(request: JobRequest, recipe: str, lengths: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe that needs calibration is told of it; nothing for any other."""
    if not recipes.needs_calibration(recipe, request.own_recipes):
        return {}
    given = request.calibration
    kind = None if given is None else {"kind": given.kind}
    return {"calibration": kind, **lengths, **_uploads_of(request, "calibration")}


def _uploads_of(request: JobRequest, *names: str) -> dict[str, Any]:
    """The uploads that a step gets, by digest."""
    uploads = {name: request.uploads[name] for name in names if name in request.uploads}
    return {"uploads": uploads} if uploads else {}


def _workload(facts: Mapping[str, Any]) -> dict[str, int]:
    """Tokens to prefill and to decode: the field's customary 256 and 128, or what the context holds."""
    context = int(facts["context_length"])
    prefill = min(256, context // 2)
    return {"prefill_tokens": prefill, "decode_tokens": max(1, min(128, context - prefill - 1))}
