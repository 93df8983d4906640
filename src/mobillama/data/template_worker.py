"""Renders chat templates in a process of its own, which a template may exhaust and its parent may kill.

Run by :mod:`mobillama.data.template`, never imported. The first line of its input is the template, as JSON; each further line
the variables of one rendering. Each is answered by one line: ``{"text": …}`` or ``{"error": …}``. What a template sees is what
transformers gives it: trimmed blocks, ``break`` and ``continue``, ``raise_exception``, ``strftime_now``, a plain
``tojson``, and ``generation`` blocks, which change nothing here.
"""

import contextlib
import datetime
import json
import sys
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_BYTES = 512 << 20
MOST_CHARACTERS = 4 << 20


class Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks what a model says; it is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own spelling)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes within the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> None:
    """Stop, as a template asks to.

    Raises:
        TemplateError: always.
    """
    raise TemplateError(str(message))


def environment() -> ImmutableSandboxedEnvironment:
    """Return where templates are compiled."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def text_of(template: Any, variables: dict[str, Any]) -> str:
    """Return what a template makes of its variables.

    Raises:
        TemplateError: it says so, or makes more than ``MOST_CHARACTERS``.
    """
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > MOST_CHARACTERS:
            refuse(f"it makes more than {MOST_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(compute: Any) -> dict[str, str]:
    """Return the result of ``compute``, or what went wrong in one line."""
    try:
        return {"text": compute()}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"it takes more than {MOST_BYTES >> 20} MiB"}
    except Exception as error:  # a template may raise whatever Python can
        return {"error": " ".join(f"{error or type(error).__name__}".split())[:300]}


def main() -> None:
    """Answer until the input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    template: Any = None

    def compile_template() -> str:
        nonlocal template
        template = environment().from_string(json.loads(line))
        return ""

    for number, line in enumerate(sys.stdin):
        compute = (lambda: text_of(template, json.loads(line))) if number else compile_template  # noqa: B023
        print(json.dumps(answer(compute)), flush=True)


if __name__ == "__main__":
    main()
