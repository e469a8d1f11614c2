"""A page: one HTML file with everything inside, that loads nothing and runs only its own scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import kedge
from kedge.errors import RunError

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
# What could end a script element, open a comment in it, or end a line of JavaScript
_UNSAFE = re.compile(f"[<>&]|{_INVISIBLE.pattern}")


def render(template: str, scripts: Sequence[str], styles: Sequence[str], data: Any, **values: Any) -> str:
    """Fill a template with values, escaped, and with what the page's scripts need.

    Args:
        template: Its name in ``templates``.
        scripts: Names of the scripts, in the order in which they run.
        styles: Names of the style sheets.
        data: What the scripts read, as JSON can hold it.
        values: What the template names.
    """
    code = [asset(name) for name in scripts]
    rules = [asset(name) for name in styles]
    environment = Environment(
        loader=FunctionLoader(lambda name: asset(f"templates/{name}")),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        policy=_policy(code, rules),
        scripts=[Markup(script) for script in code],
        styles=[Markup(style) for style in rules],
        data=Markup(embedded(data)),
        version=kedge.__version__,
        **values,
    )


def write_page(file: Path, html: str, again: str) -> Path:
    """Write a page at once: readers see the old one or the new one.

    Args:
        file: Where.
        html: The page.
        again: The command that would write it again.

    Raises:
        RunError: The file could not be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise RunError(
            f"{file}: the page could not be written ({error.strerror}); "
            f"choose another place or free some space, then `{again}` again."
        ) from error
    return file


def visible(text: str) -> str:
    r"""Write characters that are invisible, or that would reorder what surrounds them, by their codes.

    >>> visible("a\u202eb")
    'a[202E]b'
    """
    return _INVISIBLE.sub(lambda found: f"[{ord(found[0]):04X}]", text)


def embedded(data: Any) -> str:
    r"""Write JSON that can stand in a script element, whatever text is in it; half characters become U+FFFD.

    >>> embedded({"text": "</script>\u2028"})
    '{"text":"\\u003c/script\\u003e\\u2028"}'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", whole)


def asset(name: str) -> str:
    """Read a file that ships with this room."""
    return resources.files("kedge.report").joinpath(name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """Name a script or style sheet by its hash, as a content security policy does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Write a content security policy: the page's own scripts and styles by their hashes, and nothing from outside."""
    script = " ".join(digest(text) for text in scripts)
    style = " ".join(digest(text) for text in styles)
    return f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"
