"""Privileged context: what the teacher reads in its prompt and the student does not.

  system      a system message, in the place of the prompt's own
  template    the last message, with {prompt}, {answer} and {demonstration}: texts of the prompt's row (prompts.py)

A prompt's own teacher_system and teacher_prompt win. Hidden states are counted from the answer's first token (rollouts.py), so
a longer prompt shifts no position: student and teacher score the same answer tokens.
Not here: the teacher's weights (self_teacher.py, teachers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter

from opd_ops.trainer.prompts import Prompt

FIELDS = ("prompt", "answer", "demonstration")


@dataclass(frozen=True)
class PrivilegedContext:
    """Turns the student's prompts into the teacher's; by default each prompt's own texts alone.

    Raises: ValueError: a template that cannot be filled, or that hides the question from the teacher.
    """

    system: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and "prompt" not in fields_of(self.template, "teacher_prompt"):
            raise ValueError(
                f"teacher_prompt: got {self.template!r}, expected a template with {{prompt}}: without it the teacher never "
                "reads the question"
            )

    def prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts as the teacher reads them; `check` has accepted them."""
        return [self._told(prompt) for prompt in prompts]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises: ValueError: a prompt's own template is invalid, or its row lacks a text of the template; names the prompt."""
        for number, prompt in enumerate(prompts, start=1):
            where = f"prompt {number}, {prompt.text[:40]!r}"
            template = self._template(prompt)
            own = "" if prompt.teacher_prompt is None else f"{where}: "
            for name in () if template is None else fields_of(template, f"{own}teacher_prompt"):
                if name != "prompt" and getattr(prompt, name) is None:
                    raise ValueError(
                        f'{where}: has no {name}, expected one for {{{name}}} of teacher_prompt; add "{name}" to its row, or '
                        "take it out of the template"
                    )

    def _told(self, prompt: Prompt) -> Prompt:
        system = self.system if prompt.teacher_system is None else prompt.teacher_system
        messages = [(message["role"], message["content"]) for message in prompt.conversation(system)]
        template = self._template(prompt)
        if template is not None:
            texts = {name: getattr(prompt, name) for name in FIELDS[1:]}
            messages[-1] = (messages[-1][0], template.format(prompt=prompt.text, **texts))
        return replace(prompt, messages=tuple(messages))

    def _template(self, prompt: Prompt) -> str | None:
        return self.template if prompt.teacher_prompt is None else prompt.teacher_prompt


def fields_of(template: str, where: str) -> list[str]:
    """The names in braces of a template; an error begins with `where`.

    Raises: ValueError: a brace without its partner, or other names than FIELDS.
    """
    expected = f"expected {', '.join(f'{{{name}}}' for name in FIELDS)} in braces, and {{{{ or }}}} for a brace itself"
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{where}: got {template!r} ({error}), {expected}") from None
    for name, form, conversion in parts:
        if name not in FIELDS or form or conversion:
            raise ValueError(f"{where}: got {{{name}}} in {template!r}, {expected}")
    return [str(name) for name, _, _ in parts]
