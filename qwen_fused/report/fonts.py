"""Letters that a picture can show: fonts that are here, and the spelt-out number of a letter that none of them has."""

from __future__ import annotations

import functools

from matplotlib import font_manager

# fonts with Chinese, Japanese and Korean letters, as systems have them
WIDE = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "IPAexGothic", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def families() -> list[str]:
    """What `font.family` is to be: matplotlib looks for each letter in one after the other."""
    here = {font.name for font in font_manager.fontManager.ttflist}
    return ["sans-serif", *(name for name in WIDE if name in here)]


@functools.cache
def drawable(text: str) -> str:
    """The text with every letter that no font here has as `U+65E5`.

    Args:
        text: anything, as names of tasks are.
    """
    found = (font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families())
    fonts = [font_manager.get_font(path) for path in found]
    shown = (c if c.isprintable() and any(f.get_char_index(ord(c)) for f in fonts) else f"U+{ord(c):04X}" for c in text)
    return "".join(shown)
