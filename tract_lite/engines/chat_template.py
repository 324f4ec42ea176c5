"""A model's chat format from the chat template in its file, as transformers renders it.

The template may come from anywhere. It is rendered in Jinja's sandbox, in a process of its own that
has little time and memory.
"""

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any, Mapping

from tract_lite.engines.child import environment
from tract_lite.spec import CHAT_MESSAGES, CHAT_OPTIONS, chat_date

SECONDS = 20
BYTES = 2**30
LONGEST = 10**6


def render_chat(template: str, special_tokens: Mapping[str, str]) -> str:
    """One user message, `SLOT`, in the chat format of a Jinja template, ready for the answer.

    `special_tokens`: their texts by the names that templates know them by, such as "bos_token".
    Raises ValueError: the template fails, or takes too much time or memory.
    """
    script = f"from {__name__} import render_here; render_here()"
    asked = json.dumps([template, dict(special_tokens)])
    options: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": SECONDS, "env": environment()}
    try:
        # Nothing is imported from where the user is.
        done = subprocess.run([sys.executable, "-P", "-c", script], input=asked, **options)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it takes longer than {SECONDS} seconds") from error
    if done.returncode or not done.stdout:
        lines = done.stderr.strip().splitlines()
        raise ValueError(lines[-1] if lines else f"its process ended with code {done.returncode}")
    answer = json.loads(done.stdout)
    if "fault" in answer:
        raise ValueError(answer["fault"])
    return answer["text"]


def render_here() -> None:
    """Render what standard input asks for, and answer on standard output, both in JSON."""
    _limit_memory()
    template, special_tokens = json.load(sys.stdin)
    try:
        text = _environment().from_string(template).render(messages=CHAT_MESSAGES, **special_tokens, **CHAT_OPTIONS)
        answer = {"text": text} if len(text) <= LONGEST else {"fault": f"it gives {len(text)} characters"}
    except MemoryError:
        answer = {"fault": f"it takes more than {BYTES >> 20} MiB of memory"}
    except Exception as error:  # whatever a template can do
        line = getattr(error, "lineno", None)
        words = " ".join("".join(filter(str.isprintable, part)) for part in str(error).split())
        answer = {"fault": f"{words or type(error).__name__}{f' in line {line}' if line else ''}"}
    json.dump(answer, sys.stdout)


def _environment() -> Any:
    """What a chat template may use, as transformers provides it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model writes; nothing else happens there."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def fail(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols, Generation], **blocks)
    environment.globals |= {"raise_exception": fail, "strftime_now": chat_date}
    environment.filters["tojson"] = tojson
    return environment


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
