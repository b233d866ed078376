"""Chat templates of the kinds that models bring: the same constructs, written for the tests."""

from __future__ import annotations

#: Roles between two marks; the plainest there is.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Headers, trimmed contents, the start token written by hand.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

#: The system message goes into the first turn; the assistant is called model; roles must alternate.
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}"
    "{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)

#: Instructions between marks; tools stand before the last question, calls and results as JSON with ids.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{%- if not tools is defined %}"
    "{%- set tools = none %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if tools is not none and (message == user_messages[-1]) %}{{- '[AVAILABLE_TOOLS] [' }}"
    "{%- for tool in tools %}{%- set tool = tool.function %}"
    '{{- \'{"type": "function", "function": {\' }}'
    "{%- for key, val in tool.items() if key != 'return' %}{%- if val is string %}"
    "{{- '\"' + key + '\": \"' + val + '\"' }}{%- else %}{{- '\"' + key + '\": ' + val|tojson }}"
    "{%- endif %}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}{%- endfor %}"
    "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'tool_calls' or message.tool_calls is defined %}"
    "{{- '[TOOL_CALLS] [' }}{%- for tool_call in message.tool_calls %}"
    "{%- set out = tool_call.function|tojson %}{{- out[:-1] }}"
    "{%- if not tool_call.id is defined or tool_call.id|length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{%- endif %}{{- ', \"id\": \"' + tool_call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}"
    "{%- else %}{{- ']' + eos_token }}{%- endif %}{%- endfor %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}"
    "{%- elif message['role'] == 'tool_results' or message['role'] == 'tool' %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + message['content']|string + ', ' }}"
    "{{- '\"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}{%- else %}"
    "{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}"
    "{%- endfor %}"
)

#: A system message of its own where none is given; tools, calls and results as JSON between tags.
QWEN = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}"
    "\n    {%- if messages[0]['role'] == 'system' %}\n        {{- messages[0]['content'] }}"
    "\n    {%- else %}\n        {{- 'You are a helpful assistant.' }}\n    {%- endif %}"
    '\n    {{- "\\n\\n# Tools\\n\\nYou may call functions:\\n<tools>" }}\n    {%- for tool in tools %}'
    '\n        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}'
    '\n    {{- "\\n</tools>\\n\\nReturn a json object within <tool_call></tool_call> tags.<|im_end|>\\n" }}'
    "\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}"
    "\n        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "\n    {%- else %}"
    "\n        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "\n    {%- endif %}\n{%- endif %}\n{%- for message in messages %}"
    '\n    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}'
    "\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "\n    {%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role }}"
    "\n        {%- if message.content %}\n            {{- '\\n' + message.content }}"
    "\n        {%- endif %}\n        {%- for tool_call in message.tool_calls %}"
    "\n            {%- if tool_call.function is defined %}"
    "\n                {%- set tool_call = tool_call.function %}\n            {%- endif %}"
    '\n            {{- \'\\n<tool_call>\\n{"name": "\' }}\n            {{- tool_call.name }}'
    '\n            {{- \'", "arguments": \' }}\n            {{- tool_call.arguments | tojson }}'
    "\n            {{- '}\\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\\n' }}"
    '\n    {%- elif message.role == "tool" %}'
    '\n        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}'
    "\n            {{- '<|im_start|>user' }}\n        {%- endif %}"
    "\n        {{- '\\n<tool_response>\\n' }}\n        {{- message.content }}"
    "\n        {{- '\\n</tool_response>' }}"
    '\n        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}'
    "\n            {{- '<|im_end|>\\n' }}\n        {%- endif %}\n    {%- endif %}\n{%- endfor %}"
    "\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)

#: Marks for each role; ends with the stop token where nothing is to be generated.
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen": QWEN, "phi": PHI}
