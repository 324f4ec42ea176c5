"""Chat templates in the ways of real model families, written for tests."""

from __future__ import annotations

TURNS = (
    "{%% for message in messages %%}\n"
    "  {%% if loop.first and message['role'] != 'system' %%}\n"
    "    {{- '<|im_start|>system\\n%s<|im_end|>\\n' }}\n"
    "  {%% endif %%}\n"
    "  {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%% endfor %%}\n"
)
CHATS = {
    "a system message of its own": TURNS % "You help."
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Closes the thinking block if it is told not to think.
    "thinking by one name": TURNS % "You think." + "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<think>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}",
    "thinking by another": "{%- if not thinking is defined %}{% set thinking = true %}{% endif -%}\n"
    "{% for message in messages %}<|im_start|>user: {{ message['content'] }}{% endfor %}"
    "<|im_start|>assistant:{{ '<think>' if thinking else '</think>' }}",
    "the day of today": "{%- if strftime_now is defined %}\n"
    "    {%- set day = strftime_now('%d %b %Y') %}\n"
    "{%- else %}\n    {%- set day = '26 Jul 2024' %}\n{%- endif %}\n"
    "{{- bos_token }}<|im_start|>system\n\nToday is {{ day }}.<|im_end|>"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim }}"
    "{%- endfor %}\n{{- '<|im_end|>' if add_generation_prompt }}",
    "tools, documents and JSON": "{%- if tools is not none and tools is defined %}{{ tools | tojson }}{% endif %}"
    "{%- if documents %}{{ documents | tojson(indent=2) }}{% endif %}"
    "{{ {'role': 'jüdge', 'html': '<b>&'} | tojson }}\n{{ messages[0].content }}\n{{ [1, 2] | tojson(indent=1) }}",
    "loops that end early": "{% for message in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}"
    "{% if message.role == 'system' %}{% continue %}{% endif %}{{ message.content }}{% endfor %}{{ eos_token }}",
    "what the model writes marked": "{% for message in messages %}{% generation %}\n"
    "{{ message.content }}\n  {% endgeneration %}\n{% endfor %} Answer:",
    "macros and namespaces": "{%- macro turn(role, text) %}{{ '[' ~ role ~ ']' }} {{ text }}{% endmacro %}"
    "{%- set state = namespace(count=0) %}{%- for message in messages %}{% set state.count = state.count + 1 %}"
    "{{ turn(message['role'] | upper, message['content']) }}{% endfor %} {{ state.count }} {{ unknown_name }}",
    "instructions in brackets": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}",
    "parts or a string": "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}\n",
    "indented blocks": "    {% for message in messages %}\n        {{ message.content }}\n    {% endfor %}\n  end",
}
