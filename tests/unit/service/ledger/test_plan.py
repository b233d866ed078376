"""The graph of a job, and the keys of its steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ledger.keys import Toolchain, canonical_json, step_key
from service.ledger.plan import RESOURCE_CLASSES, SHARED_KINDS, StepSpec, expand_planned, expand_resolved
from service.recipes import parse_own_recipe
from service.requests import JobRequest, parse_request

FACTS = {
    "engines": {"auto": "reauthored", "traced": "traced"},
    "prefill_lengths": [16, 64],
    "context_length": 256,
}
PROTOCOL = {"processes": 5, "threads": 2}


def request(**fields: Any) -> JobRequest:
    return parse_request({"source": {"kind": "folder", "path": "/m"}, **fields})


def expand(**fields: Any) -> dict[str, StepSpec]:
    return {spec.name: spec for spec in expand_planned(request(**fields), FACTS, PROTOCOL)}


def test_recipes_fan_out_from_one_conversion() -> None:
    specs = expand(recipes=["none", "dynamic_int8", "dynamic_int4"], formats=["tflite", "task", "litertlm"])
    kinds = [spec.kind for spec in specs.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "reference": 1,
        "convert": 1,
        "quantize": 3,
        "bundle": 6,
        "verify": 9,
        "publish": 3,
    }
    assert specs["convert:reauthored"].variants == ("none", "dynamic_int8", "dynamic_int4")


def test_two_names_of_one_engine_share_its_conversion() -> None:
    specs = expand(engines=["auto", "traced"], recipes=["none"])
    assert [spec.name for spec in specs.values() if spec.kind == "convert"] == ["convert:reauthored", "convert:traced"]


def test_inputs_come_before_dependents_and_serve_the_same_variants() -> None:
    specs = expand(recipes=["none", "float16"], formats=["task", "litertlm"], devices=["host"])
    seen = {"fetch"}
    for spec in specs.values():
        assert set(spec.inputs.values()) <= seen
        for supplier in spec.inputs.values():
            assert supplier == "fetch" or set(spec.variants) <= set(specs[supplier].variants)
        seen.add(spec.name)


def test_the_graph_is_proven_even_when_only_a_bundle_is_asked_for() -> None:
    specs = expand(recipes=["none"], formats=["litertlm"])
    assert "verify:reauthored:none:tflite" in specs
    assert set(specs["publish:none"].inputs) >= {"verify_tflite", "verify_litertlm", "artifact_litertlm"}
    assert "artifact_tflite" not in specs["publish:none"].inputs


def test_a_bundle_is_held_to_what_the_proof_of_its_graph_left() -> None:
    specs = expand(recipes=["none"], formats=["tflite", "litertlm"])
    assert set(specs["verify:reauthored:none:tflite"].inputs) == {"reference", "quantize"}
    assert specs["verify:reauthored:none:litertlm"].inputs == {
        "reference": "reference",
        "bundle": "bundle:reauthored:none:litertlm",
        "verify_tflite": "verify:reauthored:none:tflite",
    }


def test_a_publication_waits_for_a_benchmark_only_when_a_gate_names_its_figure() -> None:
    fields: dict[str, Any] = {"recipes": ["none"], "formats": ["litertlm"], "devices": ["host"]}
    assert not [name for name in expand(**fields)["publish:none"].inputs if name.startswith("benchmark")]
    gated = expand(**fields, gates={"min_decode_tokens_per_s": 5})
    assert "benchmark_host_litertlm" in gated["publish:none"].inputs


def own(**config: Any) -> list[dict[str, Any]]:
    config = {"weight_tensor_config": {"num_bits": 8}, "compute_precision": "INTEGER", **config}
    return parse_own_recipe("mine", [{"regex": ".*", "operation": "FULLY_CONNECTED", "op_config": config}])


STATIC = own(activation_tensor_config={"num_bits": 8, "symmetric": False})
DYNAMIC = own()
A, B, C = "a" * 64, "b" * 64, "c" * 64


def test_uploads_reach_the_steps_that_read_them_and_no_others() -> None:
    fields = {"evaluation": A, "perplexity_text": B, "calibration": {"kind": "prompts", "upload": C}}
    specs = expand(recipes=["none", "mine"], own_recipes={"mine": STATIC}, **fields)
    uploads = {name: spec.params["uploads"] for name, spec in specs.items() if "uploads" in spec.params}
    assert uploads == {
        "reference": {"evaluation": A, "perplexity_text": B},
        "quantize:reauthored:mine": {"calibration": C},
    }
    assert specs["quantize:reauthored:none"].params == {"recipe": "none"}
    assert "uploads" not in expand()["reference"].params


def test_a_recipe_that_needs_calibration_gets_the_checkpoint_and_the_lengths() -> None:
    own = {"mine": STATIC, "other": DYNAMIC}
    specs = expand(recipes=["mine", "other"], own_recipes=own, calibration={"kind": "text", "upload": C})
    mine, other = specs["quantize:reauthored:mine"], specs["quantize:reauthored:other"]
    assert set(mine.inputs) == {"convert", "checkpoint"}
    assert mine.params == {
        "recipe": "mine",
        "settings": STATIC,
        "calibration": {"kind": "text"},
        "prefill_lengths": [16, 64],
        "context_length": 256,
        "uploads": {"calibration": C},
    }
    assert set(other.inputs) == {"convert"}
    assert other.params == {"recipe": "other", "settings": DYNAMIC}
    default = expand(recipes=["mine"], own_recipes={"mine": STATIC})["quantize:reauthored:mine"]
    assert default.params["calibration"] is None
    assert "uploads" not in default.params


def test_a_bundle_is_proven_with_the_proof_of_its_graph() -> None:
    specs = expand(recipes=["none"], formats=["litertlm", "task"])
    for kind in ("litertlm", "task"):
        assert specs[f"verify:reauthored:none:{kind}"].inputs["verify_tflite"] == "verify:reauthored:none:tflite"
    assert "verify_tflite" not in specs["verify:reauthored:none:tflite"].inputs


def test_every_kind_has_a_class() -> None:
    specs = [*expand(devices=["host"]).values(), *expand_resolved(request(), {"kind": "folder"})]
    assert {spec.kind for spec in specs} | {"resolve"} == set(RESOURCE_CLASSES)
    assert set(RESOURCE_CLASSES) > SHARED_KINDS


@pytest.mark.parametrize("context_length", [2, 3, 64, 1280, 131072])
def test_a_benchmark_fits_the_context(context_length: int) -> None:
    facts = {**FACTS, "context_length": context_length}
    specs = expand_planned(request(recipes=["none"], devices=["host"]), facts, PROTOCOL)
    (benchmark,) = [spec for spec in specs if spec.kind == "benchmark"]
    prefill, decode = benchmark.params["prefill_tokens"], benchmark.params["decode_tokens"]
    assert prefill >= 1
    assert decode >= 1
    assert prefill + decode <= context_length


BASE: dict[str, Any] = {
    "kind": "quantize",
    "params": {"recipe": "none"},
    "checkpoint_digest": "a",
    "input_keys": {"convert": "k"},
    "toolchain_id": "t",
    "revision": "r",
}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "bundle"},
        {"params": {"recipe": "float16"}},
        {"checkpoint_digest": "b"},
        {"input_keys": {"convert": "l"}},
        {"input_keys": {"quantize": "k"}},
        {"toolchain_id": "u"},
        {"revision": "s"},
    ],
)
def test_whatever_decides_the_bytes_changes_the_key(change: dict[str, Any]) -> None:
    assert step_key(**{**BASE, **change}) != step_key(**BASE)


def test_order_of_fields_does_not_change_the_key() -> None:
    params = {"b": 1, "a": [1, 2]}
    assert step_key(**{**BASE, "params": params}) == step_key(**{**BASE, "params": dict(reversed(params.items()))})


def test_toolchains_differ_by_versions_alone() -> None:
    assert Toolchain({"a": "1"}, {"x": "1"}).id == Toolchain({"a": "1"}, {"x": "2"}).id
    assert Toolchain({"a": "1"}, {}).id != Toolchain({"a": "2"}, {}).id


def test_canonical_json_refuses_what_json_has_not() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(documents, documents)
def test_equal_bytes_mean_equal_documents(first: Any, second: Any) -> None:
    # Python holds True and 1 equal; JSON does not.
    assert (canonical_json(first) == canonical_json(second)) == (repr_json(first) == repr_json(second))


def repr_json(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: repr_json(value) for key, value in document.items()}
    if isinstance(document, list):
        return [repr_json(item) for item in document]
    return (type(document).__name__, document)


def test_what_the_host_answered_lies_beside_an_artifact_that_phones_are_asked() -> None:
    specs = expand(recipes=["none"], devices=["any", "host"], smoke_prompts=2)
    phone, host = (specs[f"benchmark:none:{place}:litertlm"] for place in ("any:cpu", "host"))
    assert phone.inputs["graph"] == "verify:reauthored:none:tflite"
    assert phone.inputs["reference"] == "reference"
    assert phone.params["smoke_prompts"] == 2
    assert "smoke_prompts" not in host.params


def test_several_ways_are_arms_of_one_step() -> None:
    specs = expand(recipes=["none"], devices=["any"], backends=["cpu", "npu"], threads=[1, 4])
    (benchmark,) = [spec for spec in specs.values() if spec.kind == "benchmark"]
    assert benchmark.params["arms"] == [
        {"backend": "cpu", "threads": 1},
        {"backend": "cpu", "threads": 4},
        # Threads are of the CPU.
        {"backend": "npu", "threads": None},
    ]
    assert "backend" not in benchmark.params
