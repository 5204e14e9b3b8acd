from __future__ import annotations

import pytest

from kvat_report.text import escape, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\r\n", "two lines"),
        ("\x1b[31mred\x07", "[31mred"),
        ("tab\tand\u2028separator", "tab and separator"),
        ("right\u202eleft", "right left"),
        ("lone \udcff surrogate", "lone surrogate"),
        ("", ""),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("`code`", r"\`code\`"),
        ("a\\|b", r"a\\\|b"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("[text](javascript:x)", r"\[text\](javascript:x)"),
        ("*bold*", r"\*bold\*"),
        ("flash_attention_2", "flash_attention_2"),
        ("__init__ _x_", r"\_\_init\_\_ \_x\_"),
        ("~~gone~~ $x$", r"\~\~gone\~\~ \$x\$"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
        ("---", r"\---"),
        ("1. item", r"1\. item"),
        ("1.41", "1.41"),
        ("=====", r"\====="),
        ("> quote", "&gt; quote"),
        ("https://example.org and www.example.org", r"https:\//example.org and www\.example.org"),
        ("    indented", "indented"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert escape(text) == escaped
