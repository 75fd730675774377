"""The chat templates of the LLaVA families and of SmolVLM, as far as public copies show them (Qwen3-VL's is in
tiny_qwen3_vl.py).

Sources: transformers' documentation and tests, the published conversion scripts, public copies of chat_template.json.
(Yi's, "chatml": the prompt in the documentation; its template is from memory.)
"""

# as published with llava-hf/llava-1.5-7b-hf (public copies of its chat_template.json)
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}HEADER{% for kind in ('image', 'video', 'text') %}{% for part in m['content'] %}"
    "{% if part['type'] == kind %}{% if kind == 'text' %}BEFORE{{ part['text'] }}{% else %}{{ '<' + kind + '>' }}AFTER"
    "{% endif %}{% endif %}{% endfor %}{% endfor %}END{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}"
)


def template(header: str, end: str, answer: str, after: str = "", before: str = "") -> str:
    """Pictures of a turn first, `after` behind each; `before` each text."""
    written = PARTS.replace("HEADER", header).replace("END", end).replace("ANSWER", answer)
    return written.replace("BEFORE", before).replace("AFTER", after)


ROLE = "{{ m['role'] }}"
TURN = "{% if m['role'] == 'user' %}[INST] {% else %} {% endif %}"
TEMPLATES = {
    "mistral": template(TURN, "{% if m['role'] == 'user' %} [/INST]{% else %}</s> {% endif %}", "", after="{{'\\n'}}"),
    "chatml": template(
        "<|im_start|>" + ROLE + "{{'\\n'}}", "<|im_end|>", "<|im_start|>assistant{{'\\n'}}", after="{{'\\n'}}"
    ),
    "onevision": template(
        "<|im_start|>" + ROLE + " ", "<|im_end|>", "<|im_start|>assistant{{'\\n'}}", before="{{'\\n'}}"
    ),
    "onevision, converted": template(
        "<|im_start|>" + ROLE + "{{'\\n'}}", "<|im_end|>{{'\\n'}}", "<|im_start|>assistant{{'\\n'}}", after="{{'\\n'}}"
    ),
    "llama3": template(
        "<|start_header_id|>" + ROLE + "<|end_header_id|>{{'\\n\\n'}}",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>{{'\\n\\n'}}",
        before="{{'\\n'}}",
    ),
}

# as published with HuggingFaceTB/SmolVLM-256M-Instruct (public copies of its chat_template.json)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# as published with google/gemma-3-4b-it (public copies of its tokenizer_config.json)
GEMMA3 = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
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
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
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
