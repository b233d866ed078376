"""What a checkpoint's JSON files tell the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from transformers import AutoTokenizer

from service.errors import BundleFailed, CheckpointInvalid
from tests.checkpoints import CHAT_TEMPLATE, write_tokenizer
from workers.convert.metadata import TokenSettings, build_metadata, build_runtime_template, read_token_settings

MODEL = {"bos_token_id": 1, "eos_token_id": 2}
SETTINGS = TokenSettings(1, (2, 5), "<s>", "</s>", CHAT_TEMPLATE)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, "byte_level")
    put(tmp_path, "config.json", MODEL)
    return tmp_path


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def change(folder: Path, name: str, **fields: Any) -> None:
    put(folder, name, {**json.loads((folder / name).read_text(encoding="utf-8")), **fields})


def test_settings_of_a_usual_checkpoint(checkpoint: Path) -> None:
    assert read_token_settings(checkpoint) == TokenSettings(1, (2,), "<s>", "</s>", CHAT_TEMPLATE)


def test_generation_config_decides_on_stop_tokens(checkpoint: Path) -> None:
    put(checkpoint, "generation_config.json", {"eos_token_id": [7, 2, 7]})
    assert read_token_settings(checkpoint).stop_token_ids == (7, 2)


def test_the_tokenizer_names_the_stop_token_where_the_model_does_not(checkpoint: Path) -> None:
    put(checkpoint, "config.json", {})
    assert read_token_settings(checkpoint).stop_token_ids == (2,)


def test_no_stop_token_is_refused(checkpoint: Path) -> None:
    put(checkpoint, "config.json", {})
    change(checkpoint, "tokenizer_config.json", eos_token=None)
    with pytest.raises(BundleFailed, match="No stop token is known"):
        read_token_settings(checkpoint)


def test_a_stop_token_that_is_no_id_is_invalid(checkpoint: Path) -> None:
    put(checkpoint, "config.json", {"eos_token_id": ["</s>"]})
    with pytest.raises(CheckpointInvalid, match="eos_token_id"):
        read_token_settings(checkpoint)


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_the_start_token_is_put_where_transformers_puts_it(
    checkpoint: Path, flag: bool | None, has_post_processor: bool
) -> None:
    if flag is not None:
        change(checkpoint, "tokenizer_config.json", add_bos_token=flag)
    if not has_post_processor:
        change(checkpoint, "tokenizer.json", post_processor=None)
    starts = AutoTokenizer.from_pretrained(checkpoint)("12")["input_ids"][0] == 1
    assert starts == has_post_processor
    assert read_token_settings(checkpoint).start_token_id == (1 if starts else None)


@pytest.mark.parametrize(("flag", "start"), [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, None)])
def test_the_flag_decides_for_a_sentencepiece_model_alone(
    checkpoint: Path, flag: dict[str, bool], start: int | None
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    change(checkpoint, "tokenizer_config.json", **flag)
    assert read_token_settings(checkpoint).start_token_id == start


def test_a_post_processor_may_stand_in_a_sequence(checkpoint: Path) -> None:
    post_processor = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["post_processor"]
    change(checkpoint, "tokenizer.json", post_processor={"type": "Sequence", "processors": [post_processor]})
    assert read_token_settings(checkpoint).start_token_id == 1


def test_special_tokens_may_be_objects(checkpoint: Path) -> None:
    change(checkpoint, "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    assert read_token_settings(checkpoint).eos_token == "</s>"


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (None, None),
        ("plain", "plain"),
        ([{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
    ],
)
def test_the_template_may_stand_in_the_tokenizer_config(checkpoint: Path, stored: Any, found: str | None) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    change(checkpoint, "tokenizer_config.json", chat_template=stored)
    assert read_token_settings(checkpoint).chat_template == found


def test_a_template_that_is_no_text_is_invalid(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    change(checkpoint, "tokenizer_config.json", chat_template={"default": "x"})
    with pytest.raises(CheckpointInvalid, match="chat_template"):
        read_token_settings(checkpoint)


def test_a_json_file_that_holds_no_object_is_invalid(checkpoint: Path) -> None:
    put(checkpoint, "generation_config.json", [1])
    with pytest.raises(CheckpointInvalid, match=r"generation_config\.json must hold a JSON object"):
        read_token_settings(checkpoint)


def test_the_message_holds_tokens_context_and_template() -> None:
    message = llm_metadata_pb2.LlmMetadata.FromString(build_metadata(SETTINGS, 256))
    assert list(message.start_token.token_ids.ids) == [1]
    assert [list(token.token_ids.ids) for token in message.stop_tokens] == [[2], [5]]
    assert message.max_num_tokens == 256
    assert message.llm_model_type.WhichOneof("model_type") == "generic_model"
    assert message.jinja_prompt_template.endswith(CHAT_TEMPLATE)
    assert build_metadata(SETTINGS, 256) == build_metadata(SETTINGS, 256)


def test_the_message_leaves_out_what_there_is_not() -> None:
    bare = TokenSettings(None, (2,), None, None, None)
    message = llm_metadata_pb2.LlmMetadata.FromString(build_metadata(bare, 256))
    assert not message.HasField("start_token")
    assert not message.HasField("jinja_prompt_template")


def test_the_message_can_say_that_there_is_no_start_token() -> None:
    bare = TokenSettings(None, (2,), None, None, None)
    message = llm_metadata_pb2.LlmMetadata.FromString(build_metadata(bare, 256, must_name_start=True))
    assert list(message.start_token.token_ids.ids) == [-1]


@pytest.mark.parametrize(
    ("written", "carried"),
    [
        ("a {%- generation -%} b {%- endgeneration %}", "a {%- if true -%} b {%- endif %}"),
        ("{% if message.get('name') %}", "{% if message['name'] %}"),
        ("{{ message.get('name', 'nobody') }}", "{{ message.get('name', 'nobody') }}"),
    ],
)
def test_what_the_runtimes_template_engine_lacks_is_rewritten(written: str, carried: str) -> None:
    assert build_runtime_template(TokenSettings(1, (2,), "<s>", "</s>", written)).endswith("-%}\n" + carried)


@pytest.mark.parametrize("as_parts", [False, True])
@pytest.mark.parametrize(("start", "lead"), [(1, ""), (None, "<s>")])
def test_the_runtime_template_renders_what_the_source_renders(as_parts: bool, start: int | None, lead: str) -> None:
    texts = ["12+7=", "19"]
    contents = [[{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}] for text in texts]
    messages = [
        {"role": role, "content": parts if as_parts else text}
        for role, parts, text in zip(("user", "assistant"), contents, texts, strict=True)
    ]
    settings = TokenSettings(start, (2,), "<s>", "</s>", CHAT_TEMPLATE)
    template = ImmutableSandboxedEnvironment().from_string(build_runtime_template(settings))
    # The runtime renders without `bos_token` and `eos_token`.
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == f"{lead}<user> 12+7=</s>\n<assistant> 19</s>\n<assistant> "
