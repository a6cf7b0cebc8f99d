"""What a template makes of a conversation, and where in it the assistant speaks."""

import itertools
import re
from pathlib import Path

import pytest

from megahybrid.data.chat.guarded import GuardedTemplate, Limits
from megahybrid.data.chat.probe import PROBES, check_template
from megahybrid.data.chat.render import NO_PREFIX, ChatTemplate, NotRendered
from megahybrid.data.chat.reserved import with_tokens
from megahybrid.data.chat.template_file import SHIPPED, TemplateFile, read_template
from megahybrid.data.chat.tokens import counts_of, trimmed
from megahybrid.data.tokenizer import load_tokenizer
from megahybrid.errors import DataError
from tests.data.chat.chats import EOD, OF_MINE, TOOLS, conversation, write_tokenizer

TODAY = "2024-07-26"
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, TODAY)


def test_both_ways_agree_on_chatml(tmp_path: Path) -> None:
    """By its own blocks, and by rendering with and without each turn of a template without any."""
    source = read_template("chatml").source
    bare = re.sub(
        r"\{%-? ?(end)?generation -?%\}",
        lambda tag: tag[0].replace(tag[0].strip("{%-} "), "set _ = 0"),
        source,
    )
    assert compiled(source).has_generation and not compiled(bare).has_generation
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    for seed in range(30):
        tools = TOOLS if seed % 3 == 0 else None
        messages = conversation(seed, tools=tools is not None)
        blocks = compiled(source).rendering(messages, tools)
        prefixes = compiled(bare).rendering(messages, tools)
        assert blocks.text == prefixes.text
        answers = sum(message["role"] == "assistant" for message in messages)
        assert len(blocks.spans) == len(prefixes.spans) == answers
        (marked,) = tokenizer.encode_marked([blocks.text])
        spans = trimmed(marked, prefixes.spans, prefixes.text)
        assert spans == blocks.spans
        counts = counts_of(marked, spans)
        end = tokenizer.special_tokens["<|im_end|>"]
        # As many ends of turns are targets as there are answers, and no beginning of one is.
        assert (marked.ids[counts] == end).sum() == answers
        assert tokenizer.special_tokens["<|im_start|>"] not in marked.ids[counts]


def test_spans_of_a_template_without_blocks_are_the_answers(tmp_path: Path) -> None:
    """Llama 3's has none: what its text must be is put together here by hand, span by span."""
    source = "".join(
        part for part in re.split(r"\{%- (?:end)?generation %\}\n?", read_template("llama3").source)
    )
    template = compiled(source)
    assert not template.has_generation
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    for seed in range(20):
        text, spans = "<|begin_of_text|>", []
        for message in conversation(seed):
            text += head.format(message["role"])
            begin = len(text)
            text += message["content"].strip() + "<|eot_id|>"
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
        rendering = template.rendering(conversation(seed), None)
        assert rendering.text == text
        (marked,) = tokenizer.encode_marked([text])
        assert trimmed(marked, rendering.spans, text) == tuple(spans)


def test_header_that_no_prompt_begins_is_no_target() -> None:
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    rendering = compiled(source).rendering([USER, ANSWER, USER, ANSWER], None)
    assert [rendering.text[a:b] for a, b in rendering.spans] == ["Yo\n", "Yo\n"]


def test_template_whose_prefixes_are_none_is_refused_by_name(tmp_path: Path) -> None:
    source = "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}"
    with pytest.raises(NotRendered, match=NO_PREFIX):
        compiled(source).rendering([USER, ANSWER, USER, ANSWER], None)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    with (
        GuardedTemplate(TemplateFile("mine.jinja", source), {}, TODAY) as guarded,
        pytest.raises(DataError, match=r"^template mine.jinja has no \{% generation %\} blocks"),
    ):
        check_template(guarded, tokenizer)


def test_block_whose_place_is_not_known_is_refused() -> None:
    source = "{% macro m() %}x{% generation %}Yo{% endgeneration %}{% endmacro %}a{{ m() }}"
    with pytest.raises(NotRendered, match="block within a macro"):
        compiled(source).rendering([USER, ANSWER], None)


def test_date_is_the_day_that_was_asked_for() -> None:
    assert compiled("{{ strftime_now('%d %b %Y') }}").text([], None) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails: access to attribute 'append'"),
        ("{{ cycler.__init__.__globals__.os }}", "fails: access to attribute '__init__'"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "refused by the template: no user"),
        ("{{ 1 + messages[0].none }}", "the template fails: .* 'none'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    ],
)
def test_what_a_template_may_not_do_is_a_reason(source: str, reason: str) -> None:
    with pytest.raises(NotRendered, match=reason):
        compiled(source).text([USER], None)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


def test_template_without_end_is_ended_and_one_that_fills_the_memory_says_so() -> None:
    limits = Limits(seconds=0.3, memory_bytes=2**28)
    with (
        GuardedTemplate(TemplateFile("endless", ENDLESS), {}, TODAY, limits) as guarded,
        pytest.raises(DataError, match=r"^template endless took more than 0.3 seconds for one"),
    ):
        guarded.rendering([USER, ANSWER])
    with GuardedTemplate(TemplateFile("huge", HUGE), {}, TODAY, limits) as guarded:
        with pytest.raises(NotRendered, match="needs too much memory"):
            guarded.rendering([USER, ANSWER])
        # It is there for the next one.
        with pytest.raises(NotRendered, match="needs too much memory"):
            guarded.prompt([USER])
    with pytest.raises(DataError, match=r"^template bad is no chat template \(line 2 of"):
        GuardedTemplate(TemplateFile("bad", "a\n{% for m in %}"), {}, TODAY)


def test_conversations_of_any_text_survive_the_process() -> None:
    odd = {"role": "user", "content": 'a\n"b"\\ \u2028 😀 \x85'}
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with GuardedTemplate(TemplateFile("plain", source), {}, TODAY) as guarded:
        assert guarded.prompt([odd, odd]) == odd["content"] * 2


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_are_good_and_begin_turns_as_they_render_them(
    name: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    with GuardedTemplate(read_template(name), {}, TODAY) as guarded:
        checked = check_template(guarded, tokenizer)
        assert {EOD, *SHIPPED[name]} <= {*checked.spelt}
        ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "cohere": "<|END_OF_TURN_TOKEN|>"}
        assert checked.end_id == tokenizer.special_tokens[ends.get(name, EOD)]
        rendering = guarded.rendering(PROBES[0])
        prompt = guarded.prompt(PROBES[0][:-1])
        assert rendering.text[: rendering.spans[-1][0]] == prompt


def test_what_a_tokenizer_lacks_or_ends_documents_with_is_said(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path)
    tokens = "{% for m in messages %}{{ m.content }}<|of_mine|>{% endfor %}"
    for template, eod, message in (
        (
            TemplateFile("mine", tokens),
            None,
            r"^template mine writes <\|of_mine\|>, special tokens",
        ),
        (read_template("chatml"), "<|im_end|>", r"^template chatml writes <\|im_end\|> within"),
        (TemplateFile("mute", "{{ messages[0].content }}"), None, "renders no turn of the assist"),
    ):
        with (
            GuardedTemplate(template, {}, TODAY) as guarded,
            pytest.raises(DataError, match=message),
        ):
            check_template(guarded, load_tokenizer(file, eod))


def test_tokens_are_added_behind_all_others(tmp_path: Path) -> None:
    from megahybrid.data.tokenizer import train_sentencepiece

    texts = ["the cat runs to the dog and " * 5, "a blue one is what it sees " * 5] * 9
    model = tmp_path / "a.model"
    model.write_bytes(train_sentencepiece(texts, vocab_size=300))
    for file in (model, write_tokenizer(tmp_path)):
        before = load_tokenizer(file)
        asked = ["<|im_start|>", "<|new|>"]
        file.write_bytes(with_tokens(file.read_bytes(), file, before, asked))
        after = load_tokenizer(file)
        new = [token for token in asked if token not in before.special_tokens]
        size = before.info.vocab_size
        assert [after.special_tokens[token] for token in new] == [*range(size, size + len(new))]
        assert after.info.vocab_size == size + len(new) and {*asked} <= after.control_tokens
        text = "the cat <|new|> runs"
        assert after.encode([text]) == before.encode([text])
        (marked,) = after.encode_marked([text])
        assert after.special_tokens["<|new|>"] in marked.ids.tolist()


def test_transformers_renders_and_marks_the_same() -> None:
    """Its own function, for each shipped template and one of the kind that models have."""
    from transformers.utils import chat_template_utils

    sources = {name: read_template(name).source for name in SHIPPED}
    for (name, source), seed in itertools.product(
        [*sources.items(), ("mine", OF_MINE.replace("strftime_now('%d %b %Y')", "'today'"))],
        range(12),
    ):
        tools = TOOLS if name in ("chatml", "llama3", "mine") and seed % 2 else None
        messages = conversation(seed, tools=tools is not None)
        (text,), spans = chat_template_utils.render_jinja_template(
            [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True
        )
        found = compiled(source).rendering(messages, tools)
        assert found.text == text
        if name != "mine":
            assert list(found.spans) == [span for span in map(tuple, spans[0]) if span[0] < span[1]]
