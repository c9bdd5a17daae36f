#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records how `transformers` renders chat templates: tests/golden/chat_templates.json, for
tests/data/chat_template_test.cc. Needs `pip install jinja2==3.1.6` in an environment of its own: the environment
below is the one that `transformers` makes for chat templates.

The templates are our own, with the constructs that those of the supported models use; `smollm2` reads like the one in that
model's GGUF file, with another system prompt. A case whose `error` is set must be refused.
"""

import datetime
import json
import pathlib

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "chat_templates.json"
NOW = datetime.datetime(2026, 3, 7, 12, 30, 5)


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller):
        return caller()


def environment():
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: NOW.strftime(form)
    return env


SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
           "Answer in a few friendly words<|im_end|>\n' }}{% endif %}{{'<|im_start|>' "
           "+ message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|im_start|>assistant\n' }}{% endif %}")

# As Llama 3.x: a date, a system message cut off the list, tools as JSON, tool calls, headers.
HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message may be missing. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: here\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|end|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|head|>user<|/head|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|end|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n'+ message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

# As Qwen 2.5 and 3: tools listed line by line, thinking cut out of earlier answers, a namespace, a loop backwards.
THINKING = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# As Gemma 3: roles must alternate, content in parts.
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

# As Mistral: the last user message found by filters, ids checked, text around [INST].
INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

# As Phi 3: the shortest, and one with a macro as newer ones have.
PHI3 = ("{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == "
        "'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
MACROS = """{%- macro render_content(content, quote='"') -%}
    {%- if content is string -%}
        {{- quote ~ content ~ quote -}}
    {%- else -%}
        {%- for item in content -%}
            {{- item.text if 'text' in item else '<' ~ item.type ~ '>' -}}
            {%- if not loop.last %}, {% endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro list_of(schema, depth=0) -%}
{%- for name, value in (schema.properties or {}).items() | sort %}
{{ '  ' * depth }}- {{ name }}: {{ value.type | default('any', true) | upper }}{{ ' (needed)' if name in schema.required }}
{%- if value.properties %}{{ list_of(value, depth + 1) }}{% endif %}
{%- endfor %}
{%- endmacro -%}
{% generation %}
{%- for message in messages %}
{{ loop.index }}/{{ loop.length }} {{ message.role.title() }}: {{ render_content(message.content, quote="'") }}
{%- endfor %}
{% endgeneration %}
{% if tools %}{% for tool in tools %}
{{ tool.function.name }}{{ list_of(tool.function.parameters) }}
{% endfor %}{% endif %}
"""

MESSAGES = {
    "plain": [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "  Hi. "},
              {"role": "user", "content": "What's 2 < 3 & \"4\"? \u00e9\u4e2d\U0001f600\n"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Who are you?"}],
    "thinking": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                 {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}, {"role": "user", "content": "R"},
                 {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nB"}],
    "tools": [{"role": "user", "content": "Weather?"},
              {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdef123", "type": "function", "function": {
                  "name": "weather", "arguments": {"city": "Z\u00fcrich", "days": 3, "exact": True, "unit": None}}}]},
              {"role": "tool", "content": "{\"sun\": 0.5}", "tool_call_id": "abcdef123"},
              {"role": "assistant", "content": "Half a sun."}, {"role": "user", "content": "Thanks"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " See "}, {"type": "image"}]}],
    "wrong order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells \"weather\" <b>",
                                           "parameters": {"type": "object", "required": ["city"], "properties": {
                                               "city": {"type": "string"}, "days": {"type": "integer", "default": 1.0},
                                               "where": {"properties": {"lat": {"type": "number"}}}}}}}]

# Small templates, a construct each. `v` is VARIABLES.
VARIABLES = {"i": 7, "f": 2.5, "big": 1e22, "small": 1e-7, "s": "Hello W\u00f6rld", "none": None, "yes": True, "empty": "", "html": "<a & 'b'>",
             "words": ["pear", "Apple", "fig", "apple"], "numbers": [3, 1, 2], "nested": {"b": {"c": [1, 2.0, "x\n'y'"]}, "a": None},
             "people": [{"name": "Ann", "age": 30, "on": True}, {"name": "bob", "age": 25, "on": False}, {"name": "Cy", "age": 25}],
             "lines": "one\n  two\n\nthree\n", "unicode": "\u00e9\u4e2d\U0001f600z"}
SMALL = """{{ 1 + 2 * 3 - 4 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7.5 // 2 }} {{ -i }} {{ +i }}
{{ 1 == 1.0 }} {{ yes == 1 }} {{ 'a' < 'b' }} {{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ [1, 2] == [1, 2] }} {{ (1,) == [1] }}
{{ 'W' in s }} {{ 'b' not in nested }} {{ 3 in numbers }} {{ not yes }} {{ none or 'x' }} {{ yes and i }} {{ '' or 0 }}
{{ f }} {{ big }} {{ small }} {{ 1.0 }} {{ 100000000000000000.0 }} {{ none }} {{ yes }} {{ missing }} {{ nested }} {{ words }} {{ (1, 'a') }} {{ (1,) }} {{ [] }} {{ {} }}
{{ "a" 'b' }} {{ 'tab\\tquote\\'\\u00e9\\x41\\101' }} {{ "\\d" }}
{{ s[0] }} {{ s[-1] }} {{ s[1:3] }} {{ s[::-1] }} {{ s[:-1] }} {{ s[5:] }} {{ s[10:2:-2] }} {{ words[1] }} {{ words[9] }} {{ words[-1:] }} {{ unicode[1] }} {{ unicode[1:] }} {{ unicode | length }}
{{ nested.b.c[1] }} {{ nested['b']['c'][2] }} {{ nested.x }} {{ nested.items() | list }} {{ nested.get('q', 5) }} {{ nested.keys() | list }} {{ nested.values() | list }}
{{ s.upper() }} {{ s.lower() }} {{ s.title() }} {{ 'hello world-x y2k'.title() }} {{ 'hello world-x (y)' | title }} {{ 'aBC' | capitalize }} {{ 'aBC'.capitalize() }}
{{ '  x '.strip() ~ '|' }} {{ 'xxaxx'.strip('x') }} {{ 'xxaxx'.lstrip('x') }} {{ 'xxaxx'.rstrip('x') }} {{ ' a ' | trim }} {{ 'xax' | trim('x') }}
{{ 'a,b,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ ' a  b c '.split() }} {{ ' a  b c '.split(none, 1) }} {{ lines.splitlines() }}
{{ 'abcabc'.replace('b', 'X') }} {{ 'abcabc'.replace('b', 'X', 1) }} {{ 'abcabc' | replace('c', '') }} {{ 'abc'.find('c') }} {{ 'abc'.find('z') }} {{ 'abcabc'.rfind('b') }} {{ 'aXbX'.count('X') }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('bc') }} {{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ ' '.isspace() }} {{ 'A'.isupper() }}
{{ ', '.join(words) }} {{ words | join('-') }} {{ people | join(', ', attribute='name') }} {{ numbers | join }}
{{ words | sort }} {{ words | sort(reverse=true) }} {{ words | sort(case_sensitive=true) }} {{ people | sort(attribute='age') | map(attribute='name') | list }} {{ numbers | sort | first }} {{ numbers | last }} {{ numbers | max }} {{ numbers | min }} {{ numbers | sum }} {{ people | sum(attribute='age') }}
{{ words | unique | list }} {{ words | reverse | list }} {{ 'abc' | reverse }} {{ words | map('upper') | list }} {{ words | select('in', ['fig']) | list }} {{ numbers | select('odd') | list }} {{ numbers | reject('gt', 1) | list }}
{{ people | selectattr('on') | map(attribute='name') | list }} {{ people | rejectattr('on', 'defined') | list }} {{ people | selectattr('age', 'equalto', 25) | list | length }} {{ people | map(attribute='on', default='?') | list }}
{{ nested | dictsort }} {{ {'b': 1, 'A': 2} | dictsort(by='value') }} {{ nested | items | list }} {{ numbers | batch(2) | list }} {{ numbers | batch(2, 0) | list }}
{{ missing | default('d') }} {{ empty | default('d') }} {{ empty | default('d', true) }} {{ none | d('x') }} {{ '42' | int + 1 }} {{ 'x' | int(9) }} {{ '3.7' | int }} {{ '2.5' | float }} {{ 3.7 | int }} {{ -3 | abs }} {{ 2.567 | round(2) }} {{ 2.5 | round }} {{ 2.1 | round(method='ceil') }} {{ 7 | string + '!' }}
{{ html | e }} {{ html | safe }} {{ nested | tojson }} {{ nested | tojson(indent=2) }} {{ unicode | tojson }} {{ unicode | tojson(ensure_ascii=true) }} {{ {'b': 1, 'a': [1.5, none, true]} | tojson(sort_keys=true, separators=(',', ':')) }} {{ [] | tojson(indent=2) }} {{ '\\t"\\\\/\\x7f\\x01' | tojson }}
{{ lines | indent }} {{ lines | indent(2, true) }} {{ lines | indent(width=1, blank=true) }}
{{ i is number }} {{ i is integer }} {{ f is float }} {{ s is string }} {{ nested is mapping }} {{ words is sequence }} {{ s is iterable }} {{ none is none }} {{ missing is defined }} {{ missing is not defined }} {{ missing is undefined }} {{ yes is true }} {{ yes is boolean }} {{ i is odd }} {{ i is divisibleby 7 }} {{ i is even }} {{ i is eq 7 }} {{ i is gt(3) }} {{ i is lessthan 3 }} {{ 'a' is in ['a'] }} {{ none is not none }} {{ i is sameas 7 }} {{ s is upper }} {{ range is callable }}
{% for x in numbers %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.depth }};{% endfor %}
{% for x in [] %}a{% else %}none{% endfor %} {% for k, v in nested.items() %}{{ k }}={{ v }},{% endfor %} {% for x in numbers if x > 1 %}{{ x }}{{ loop.length }}{% endfor %} {% for (a, b) in [(1, 2), (3, 4)] %}{{ a + b }}{% endfor %} {% for c in 'ab' %}[{{ c }}]{% endfor %} {% for k in nested %}{{ k }}{% endfor %} {% for x in missing %}{% endfor %}
{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %} {{ range(2, 11, 3) | list }} {{ range(3, 0, -1) | list }}
{% set x = 1 %}{% for y in numbers %}{% set x = x + y %}{{ x }}{% endfor %}{{ x }} {% set ns = namespace(n=0, m='a') %}{% for y in numbers %}{% set ns.n = ns.n + y %}{% endfor %}{{ ns.n }}{{ ns.m }} {% set a, b = 1, 2 %}{{ a }}{{ b }} {% set t = 1, 2 %}{{ t }}
{% set block %}text {{ i }}{% endset %}[{{ block }}] {% set block | upper | trim %} abc {% endset %}[{{ block }}] {% if yes %}{% set inner = 5 %}{% endif %}{{ inner }} {% with q = 3, r = 4 %}{{ q * r }}{% endwith %}{{ q }} {% filter upper %}abc{{ s }}{% endfilter %}
{% macro m(a, b='x', c=none) %}<{{ a }}{{ b }}{{ c }}>{% endmacro %}{{ m(1) }}{{ m(1, c=3) }}{{ m('q', 'r', 's') }} {% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}in{{ i }}{% endcall %} {% macro each(xs) %}{% for x in xs %}{{ caller(x) }}{% endfor %}{% endmacro %}{% call(v) each(numbers) %}({{ v }}){% endcall %}
{{ 'a' if yes else 'b' }} {{ 'a' if empty }} {{ 'x' if i > 3 else 'y' if i > 1 else 'z' }} {{ (1 if yes else 2) + 1 }} {{ i ~ f ~ none ~ yes }} {{ 'ab' * 3 }} {{ 2 * [1] }} {{ words + ['z'] }}
{# a comment #}{#- and -#} one {%- if yes -%} two {%- endif -%} three
  {%+ if yes %}kept{% endif +%}
   {% if yes %}
   taken
   {% endif %}
{% raw %}{{ not }} {% code %}{% endraw %} {{ "{{" }} {{ '}}' }} {{ {'a': {'b': 1}}['a']['b'] }} {{ {'a': {'b': 1}} }}
{{ dict(a=1, b=2) }} {{ dict(a=1)['a'] }} {{ strftime_now('%d %b %Y %H:%M') }} {{ "it's" }} {{ ["it's", 'say "x"', 'both \\' "'] }} {{ 'nl\\n' | list }} {{ true }} {{ False }} {{ None }}
{{ s | attr('upper') is callable }} {{ 1_000 }} {{ 1.5e3 }} {{ 'a' in nested and 'z' not in nested }} {{ not 1 == 2 }} {{ (i, f) | list }} {{ numbers | length + 1 }} {{ numbers | length > 2 }} {{ -1 | abs }} {{ words.index('fig') }} {{ words.count('fig') }} {{ 'x'.join(['a', 'b']) | upper }}
"""

ERRORS = ["{{ raise_exception('no ' ~ i) }}", "{{ missing.x }}", "{{ missing() }}", "{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{% if %}", "{% for x in y %}",
          "{{ s | nofilter }}", "{{ s is notest }}", "{{ 'open }}", "{% endif %}", "{{ (1 }}", "{% unknown %}", "{{ i.x.y }}", "{{ [1] < 'a' }}", "{{ range(10000000) }}",
          "{{ numbers | map(attribute='a.b') | list }}", "{{ {[1]: 2} }}", "{{ words.append('x') }}", "{# open", "{{ m(1) }}", "{% set words.x = 1 %}", "{{ 1 | items | list }}"]


def main():
    env = environment()
    cases = []

    def add(name, template, **variables):
        case = {"name": name, "template": template, "variables": variables}
        try:
            case["text"] = env.from_string(template).render(
                **{"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "<s>", "eos_token": "</s>", **variables})
        except Exception as error:  # noqa: BLE001: whatever the oracle refuses
            case["error"] = str(error) if isinstance(error, jinja2.exceptions.TemplateError) else type(error).__name__
        cases.append(case)

    models = {"smollm2": SMOLLM2, "headers": HEADERS, "thinking": THINKING, "turns": TURNS, "inst": INST, "phi3": PHI3, "macros": MACROS}
    for model, template in models.items():
        for conversation, messages in MESSAGES.items():
            for prompt in (False, True):
                add(f"{model}, {conversation}, {prompt}", template, messages=messages, add_generation_prompt=prompt)
        add(f"{model}, with tools", template, messages=MESSAGES["tools"], tools=TOOLS, add_generation_prompt=True)
        add(f"{model}, with tools elsewhere", template, messages=MESSAGES["system"], tools=TOOLS, tools_in_user_message=False)
        add(f"{model}, no messages", template, messages=[])
    add("thinking, off", THINKING, messages=MESSAGES["plain"], add_generation_prompt=True, enable_thinking=False)
    for line in SMALL.split("\n"):
        if line:
            add(f"small: {line[:60]}", line, **VARIABLES)
    add("all small ones", SMALL, **VARIABLES)
    for line in ERRORS:
        add(f"error: {line}", line, **VARIABLES)
        assert "error" in cases[-1], line
    # Each template and each set of variables once; cases say which.
    templates, variables, lines = [], [], []
    for case in cases:
        for member, known in (("template", templates), ("variables", variables)):
            if case[member] not in known:
                known.append(case[member])
        lines.append({**case, "template": templates.index(case["template"]), "variables": variables.index(case["variables"])})

    def listed(items):
        return "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in items) + "\n]"

    now = int(NOW.replace(tzinfo=datetime.timezone.utc).timestamp())
    OUT.write_text(f'{{"jinja2":"{jinja2.__version__}","now":{now},"templates":{listed(templates)},"variables":'
                   f'{listed(variables)},"cases":{listed(lines)}}}\n', encoding="utf8")
    print(f"jinja2 {jinja2.__version__}: {len(cases)} cases, {sum('error' in c for c in cases)} of them errors")
    for case in cases:
        if "error" in case and not case["name"].startswith("error"):
            print("  refused:", case["name"], "|", case["error"][:100])


if __name__ == "__main__":
    main()
