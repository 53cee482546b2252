"""A checkpoint's chat template is a program: it reads no file, has its share of memory and time, and lives alone."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from plain_world import CHATML
from tessera.core.clock import SystemClock
from tessera.core.errors import Invalid
from tessera.serving import chat_template
from tessera.serving.chat_template import TemplateChat

pytestmark = pytest.mark.anyio

GROWING = "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = GROW %}{% endfor %}{{ n.x }}"


class Plain:
    """Every character is a token; nothing is a marker."""

    def guarded(self, text: str) -> str:
        return text

    def encode_chat(self, rendered: str) -> list[int]:
        return [ord(character) for character in rendered]


def chat(source: str, **named: str) -> TemplateChat:
    return TemplateChat(source, named, Plain(), SystemClock())


async def text(open_chat: TemplateChat, messages: Sequence[tuple[str, str]]) -> str:
    return "".join(map(chr, await open_chat.prompt(messages)))


async def test_a_template_renders_what_it_does_in_transformers() -> None:
    source = (
        CHATML
        + "{{ bos_token }}{{ [1, 'é'] | tojson }}{{ strftime_now('%Y')[:2] }}{% generation %}g{% endgeneration %}"
    )
    async with chat(source, bos_token="<s>") as opened:
        said = await text(opened, [("developer", " be brief "), ("user", "hi")])
    assert said == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + (
        '<s>[1, "é"]20g'
    )


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ ''.__class__.__mro__ }}", marks=pytest.mark.slow),
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        pytest.param(
            "{{ self._TemplateReference__context.environment.loader }}{{ raise_exception.__globals__ }}",
            marks=pytest.mark.slow,
        ),
        pytest.param("{% include '/etc/passwd' %}", marks=pytest.mark.slow),
        pytest.param("{% import 'os' as os %}", marks=pytest.mark.slow),
        pytest.param("{{ messages[0].update({'role': 'system'}) }}", marks=pytest.mark.slow),
        pytest.param("{{ messages.append(messages[0]) }}", marks=pytest.mark.slow),
        pytest.param("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", marks=pytest.mark.slow),
        "{% for",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10000000000 }}",
        pytest.param("{{ '%10000000000d' % 1 }}", marks=pytest.mark.slow),
        pytest.param(GROWING.replace("GROW", "n.x ~ n.x"), marks=pytest.mark.slow),
    ],
)
async def test_a_template_that_reaches_out_or_grows_is_refused(source: str) -> None:
    with pytest.raises(Invalid, match=r"chat template (fails|takes)"):
        async with chat(source):
            pass


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        pytest.param(GROWING.replace("'aaaaaaaaaa'", "[1]").replace("GROW", "[n.x, n.x]"), marks=pytest.mark.slow),
    ],
)
async def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_S", 0.3)
    with pytest.raises(Invalid, match="does not end"):
        async with chat(source):
            pass


async def test_a_template_says_what_it_refuses() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok"
    async with chat(source) as opened:
        with pytest.raises(Invalid, match="refuses: no system role"):
            await opened.prompt([("system", "x"), ("user", "y")])
        assert await text(opened, [("user", "y")]) == "ok"


@pytest.mark.slow
async def test_one_chat_that_breaks_the_template_does_not_break_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% if messages[0].content == 'hang' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    source += "{% endfor %}{% elif messages[0].content == 'fill' %}{{ 'a' * 9000000 }}{% endif %}ok"
    async with chat(source) as opened:
        monkeypatch.setattr(chat_template, "RENDER_S", 0.5)
        for breaking in ("hang", "fill"):
            with pytest.raises(Invalid, match=r"does not end|more memory"):
                await opened.prompt([("user", breaking)])
            monkeypatch.setattr(chat_template, "RENDER_S", 20.0)
            assert await text(opened, [("user", "y")]) == "ok"
            monkeypatch.setattr(chat_template, "RENDER_S", 5.0)


async def test_chats_at_the_same_time_do_not_mix_and_a_caller_who_leaves_disturbs_nobody() -> None:
    async with chat("{{ messages[0].content }}") as opened:
        found: dict[int, str] = {}

        async def ask(number: int) -> None:
            found[number] = await text(opened, [("user", str(number))])

        with anyio.CancelScope() as gone:
            gone.cancel()
            await opened.prompt([("user", "left")])
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(ask, number)
        assert found == {number: str(number) for number in range(20)}
