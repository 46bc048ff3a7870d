"""Chat templates: the same text as transformers renders, and one clear line for a template that fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_models import CHAT_TEMPLATE

from localsteer.errors import ModelFileError, PromptError
from localsteer.templates import ChatTemplate

QUESTION = [{"role": "user", "content": "Tell me about <foxes> & owls."}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Why?"},
]
CHATML = (
    "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# one template for each thing that chat templates use and plain jinja2 does not have, or does otherwise
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "chatml, trimmed layers": CHATML,
    "bos and eos": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}",
    "tojson keeps <>&": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "tojson with indent": "{{ messages | tojson(indent=2) }}",
    "generation tag": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}m{% endfor %}",
    "namespace": "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = 5 %}{% endfor %}{{ x.n }}",
    "year": "{{ strftime_now('%Y') }}",
    "tools are none": "{% if tools is not none %}tools{% else %}no tools{% endif %}{{ documents }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [QUESTION, CHAT], ids=["question", "chat"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_is_that_of_transformers(name, messages, add_generation_prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs = utils.render_jinja_template(
        [messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    template = ChatTemplate(TEMPLATES[name], bos="<s>", eos="</s>")
    assert [template.render(messages, add_generation_prompt=add_generation_prompt)] == list(theirs)


def test_without_a_template_questions_are_sent_as_the_paper_prompts_base_models():
    template = ChatTemplate(None)
    assert template.is_fallback
    assert template.render(QUESTION) == "Q: Tell me about <foxes> & owls.\nA:"
    assert template.render(CHAT) == "Be brief.\n\nQ: Hello\nA: Hi!\n\nQ: Why?\nA:"
    assert template.render(CHAT[:3], add_generation_prompt=False) == "Be brief.\n\nQ: Hello\nA: Hi!"


def test_a_template_that_writes_bos_is_tokenised_without_a_second_one():
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", bos="<s>")
    assert template.render(QUESTION).startswith("<s>")
    assert not template.adds_special(template.render(QUESTION))
    assert template.adds_special("no BOS here")
    assert ChatTemplate(None, bos="").adds_special("a model without BOS")


def test_the_hash_names_the_template_and_nothing_else():
    assert ChatTemplate("a", bos="<s>").template_hash == ChatTemplate("a").template_hash
    assert ChatTemplate("a").template_hash != ChatTemplate("b").template_hash
    assert ChatTemplate(None).template_hash == ChatTemplate("").template_hash
    assert len(ChatTemplate(None).template_hash) == 64


def test_only_questions_and_answers_need_stop_strings():
    assert ChatTemplate(None).stop == ("\n\nQ:", "\n\nA:", "\nQ:", "\nA:")
    assert ChatTemplate(CHATML).stop == ()


@pytest.mark.parametrize(
    "text",
    [
        CHAT_TEMPLATE,
        CHATML,
        TEMPLATES["bos and eos"],
        TEMPLATES["tojson keeps <>&"],
        TEMPLATES["tojson with indent"],
        "{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace(' ', '\n  ') | e }}{% endfor %}",
        "{% for m in messages %}{{ m.content | wordwrap(9) }}{% endfor %}",
        None,
    ],
)
def test_a_template_that_shows_what_the_user_says_keeps_words(text):
    assert ChatTemplate(text, bos="<s>", eos="</s>").keeps_words


@pytest.mark.parametrize(
    ("text", "reads_parts"),
    [
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content.0.text.strip() }}{% endfor %}", True),  # refuses a text
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}",
            False,
        ),
        (CHATML, False),
    ],
)
def test_content_is_given_as_parts_where_a_template_reads_nothing_else(text, reads_parts):
    template = ChatTemplate(text)
    assert template.reads_parts == reads_parts
    assert template.keeps_words
    assert "Tell me about" in template.render(QUESTION)


def test_variables_reach_the_template_and_others_are_refused():
    template = ChatTemplate("{{ messages[0].content }}{% if thinking is false %}!{% endif %}")
    asked = [{"role": "user", "content": "a"}]
    assert template.render(asked, variables={"thinking": False}) == "a!"
    template.variables = {"thinking": False}
    assert (template.render(asked), template.render(asked, variables={"thinking": True})) == ("a!", "a")
    for name in ("messages", "thinkin", "tools"):
        with pytest.raises(PromptError, match=name):
            template.check_variables({name: 1})


@pytest.mark.parametrize(
    "text",
    [
        "<|user|><|assistant|>",
        "{% for m in messages %}{{ m.role }}: {{ m.text }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_leaves_out_what_the_user_says_is_known(text):
    assert not ChatTemplate(text).keeps_words


def test_a_template_that_refuses_the_trial_message_is_left_to_say_why():
    assert ChatTemplate("{{ raise_exception('a system message is needed') }}").keeps_words
    assert ChatTemplate("{% for %}").keeps_words


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('Conversation roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",  # the sandbox is immutable
        "{{ ''.__class__.__mro__ }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_template_that_fails_gives_one_clear_line(text):
    with pytest.raises(PromptError) as caught:
        ChatTemplate(text).render(QUESTION)
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)


def test_the_reason_that_a_template_gives_is_passed_on():
    with pytest.raises(PromptError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(QUESTION)


def test_broken_jinja_is_the_fault_of_the_model_file_and_found_only_when_needed():
    template = ChatTemplate("{% for %}")
    assert template.template_hash
    with pytest.raises(ModelFileError, match="chat template can't be read"):
        template.render(QUESTION)


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "empty"),
        ([{"role": "user", "content": "  \n"}], "empty"),
        ([{"role": "tool", "content": "x"}], "does not support tools"),
        ([{"role": "user"}], "a message must be"),
        (["Hello"], "a message must be"),
        ([{"role": "user", "content": 3}], "a message must be"),
    ],
)
def test_messages_are_checked(messages, said):
    with pytest.raises(PromptError, match=said):
        ChatTemplate(None).render(messages)


def test_the_renderer_loads_neither_llama_cpp_nor_torch():
    code = (
        "import sys; from localsteer.templates import ChatTemplate;"
        "ChatTemplate('x').render([{'role': 'user', 'content': 'y'}]);"
        "print(sorted({'llama_cpp', 'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- a system message of the model's own --------------------------------------------------------------------

LOUD = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOUD
DEAF = "{% for m in messages if m.role != 'system' %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        (LOUD, "[system:Be brief.][user:Hi]"),
        (NO_SYSTEM, "[user:Be brief.\n\nHi]"),
        (DEAF, "[user:Be brief.\n\nHi]"),
        (None, "Be brief.\n\nQ: Hi\nA:"),
    ],
)
def test_a_models_own_system_message_comes_out_whatever_the_template_takes(text, rendered):
    template = ChatTemplate(text)
    template.system = "Be brief."
    assert template.render([{"role": "user", "content": "Hi"}]) == rendered


def test_a_conversations_own_system_message_comes_first():
    template = ChatTemplate(LOUD)
    template.system = "Be brief."
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages) == "[system:Be long.][user:Hi]"
