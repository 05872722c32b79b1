"""Chat templates as their models bring them: what transformers renders, and nothing that a sandbox must not allow."""

from __future__ import annotations

from datetime import datetime
from typing import cast

import pytest

from skerry.core.chat import ChatTemplate, encode_prompt, encode_row
from skerry.core.errors import InputError
from skerry.core.tokenizer import Tokenizer

# The parts that are peculiar to SmolLM3's and to Granite 3.1's templates.
SMOLLM3 = """\
{%- if not messages or messages[0].role != "system" %}
{{- "<|im_start|>system\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\n<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {%- set content = message.content | trim %}
        {{- "<|im_start|>assistant\\n" ~ content ~ "<|im_end|>\\n" }}
        {% endgeneration %}
    {%- else %}
        {{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
GRANITE = """\
{%- if messages[0]["role"] == "system" %}
{%- set system = messages[0]["content"] %}
{%- else %}
{%- set system = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now("%B %d, %Y") + "." %}
{%- endif %}
{{- "<|start_of_role|>system<|end_of_role|>" + system + "<|end_of_text|>\\n" }}
{%- for message in messages %}
{{- "<|start_of_role|>" + message["role"] + "<|end_of_role|>" + message["content"] + "<|end_of_text|>\\n" }}
{%- endfor %}
"""
NESTED = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " <b>hello</b> "}]


@pytest.mark.parametrize(
    "source", [SMOLLM3, GRANITE, "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_transformers_own(source: str, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = utils.render_jinja_template([CHAT], chat_template=source, add_generation_prompt=prompt)
    assert ChatTemplate(source).render(CHAT, add_generation_prompt=prompt) == theirs[0]


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_rows_of_files_are_said_at_one_moment() -> None:
    """Else a bundle exported tomorrow would differ, and at midnight a prompt would not begin its conversation."""
    template, letters = ChatTemplate(SMOLLM3), cast(Tokenizer, Letters())
    ids, start = encode_row({"messages": CHAT}, letters, template)
    assert "01 January 2025" in "".join(map(chr, ids[:start]))
    assert encode_prompt(CHAT[:1], letters, template) == ids[:start]


def test_the_time_is_local() -> None:
    before = datetime.now().strftime("%d %B %Y")
    text = ChatTemplate(SMOLLM3).render(CHAT)
    assert before in text or datetime.now().strftime("%d %B %Y") in text
    assert "<|im_start|>assistant\n<b>hello</b><|im_end|>\n" in text


def test_what_is_set_in_a_generation_block_stays_there() -> None:
    assert (
        ChatTemplate("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}").render([])
        == "21"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now.__globals__.os }}", "{{ strftime_now.__class__.__mro__ }}", "{{ strftime_now(3) }}",
        "{{ strftime_now('x' * 100000) }}", "{{ strftime_now() }}", "{% generation %}{{ ''.__class__.__mro__[1] }}"
        "{% endgeneration %}", "{{ raise_exception.__globals__.x }}",
    ],
)  # fmt: skip
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InputError):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ["{% generation %}", "{% endgeneration %}", "{% generation %}{% endfor %}"])
def test_a_block_that_does_not_close_is_named(source: str) -> None:
    with pytest.raises(InputError, match="read chat template"):
        ChatTemplate(source)


def test_variables_are_found_within_a_generation_block() -> None:
    inner = "{% generation %}{{ m.content }}{{ mood }}{{ loop.index }}{% endgeneration %}"
    template = ChatTemplate("{% for m in messages %}" + inner + "{% endfor %}")
    assert template.render(CHAT, mood="calm") == "hicalm1 <b>hello</b> calm2"
