"""Privileged context: the teacher's prompts against the texts they are made of; answer tokens at the same places under prompts
of any length; templates that cannot be filled.

Command: make test ARGS=tests/trainer/test_privileged.py
Not here: the teacher's weights (test_self_teacher.py), rows of a file (test_prompts.py).
"""

from __future__ import annotations

import pytest
import torch

from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over
from opd_ops.trainer.teachers import LocalTeacher
from tests.integrations.models import language_model, tokenizer
from tests.support.tolerances import relative_error

TEMPLATE = "{prompt} {{as}} {demonstration}: {answer}"


def test_the_teacher_reads_the_template_of_the_options_or_of_the_row():
    context = PrivilegedContext("Be kind.", TEMPLATE)
    asked = [
        Prompt((("system", "Be brief."), ("user", "2 {x}?")), answer="4", demonstration="{prompt}"),
        Prompt((("user", "a"), ("assistant", "b"), ("user", "c")), "d", teacher_system="", teacher_prompt="{answer}!"),
        Prompt.of("Why?", teacher_prompt="Why? Say 5."),
    ]
    context.check(asked)
    first, second, third = context.prompts(asked)
    assert first.messages == (("system", "Be kind."), ("user", "2 {x}? {as} {prompt}: 4"))
    assert second.messages == (("system", ""), ("user", "a"), ("assistant", "b"), ("user", "d!"))
    assert third.messages == (("system", "Be kind."), ("user", "Why? Say 5."))
    assert [prompt.answer for prompt in (first, second, third)] == ["4", "d", None]


def test_without_a_context_the_prompts_are_the_students():
    asked = [Prompt((("system", "Be brief."), ("user", "{x}")), answer="4")]
    assert PrivilegedContext().prompts(asked) == asked


@torch.no_grad()
def test_a_longer_prompt_shifts_no_position():
    """The logits of answer token i are those of each conversation alone, after the tokens of its own longer prompt."""
    model, words = language_model(0), tokenizer()
    asked = [Prompt.of("w5", answer="w30 w31 w32 w33"), Prompt.of("w6 w7 w8", answer="w34"), Prompt.of("w9", answer="w35 w36")]
    answers = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    rollouts = Rollouts(asked, answers, mask)
    student = head_over(model, words, rollouts)
    teacher = LocalTeacher(model, words, PrivilegedContext(template="{answer} w20 {prompt}"))(rollouts)
    assert student.hidden.shape == teacher.hidden.shape
    for row, text in enumerate(["w30 w31 w32 w33 w20 w5", "w34 w20 w6 w7 w8", "w35 w36 w20 w9"]):
        ids = words(text, return_tensors="pt")["input_ids"]
        alone = model(torch.cat((ids, answers[row : row + 1]), 1)).logits[0, ids.shape[1] - 1 : -1]
        assert relative_error((teacher.hidden[row] @ teacher.weight.T)[mask[row]], alone[mask[row]]) < 1e-5
        assert relative_error(student.hidden[row], teacher.hidden[row]) > 0.1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Say {answer}.", r"teacher_prompt: got 'Say \{answer\}.', expected a template with \{prompt\}: without it"),
        ("{prompt} {hint}", r"teacher_prompt: got \{hint\} in .*, expected \{prompt\}, \{answer\}, \{demonstration\} in"),
        ("{prompt} {}", r"teacher_prompt: got \{\} in .*, expected .* \{\{ or \}\} for a brace itself"),
        ("{prompt} {answer:>9}", r"got \{answer\} in .*, expected"),
        ("{prompt!r}", r"got \{prompt\} in .*, expected"),
        ("{prompt.answer}", r"got \{prompt.answer\} in .*, expected"),
        ("{prompt} }", r"got '\{prompt\} \}' \(Single '\}' encountered in format string\), expected"),
        ("{prompt} {", r"got '\{prompt\} \{' \(.*\), expected"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        PrivilegedContext(template=template)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt.of("Why?"), r'has no answer, expected one for \{answer\} of teacher_prompt; add "answer" to its row'),
        (Prompt.of("Why?", teacher_prompt="{demonstration}"), r"prompt 2, 'Why\?': has no demonstration, expected one for"),
        (Prompt.of("Why?", teacher_prompt="{hint}"), r"prompt 2, 'Why\?': teacher_prompt: got \{hint\} in"),
    ],
)
def test_a_prompt_that_lacks_a_text_of_its_template_is_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        PrivilegedContext(template="{prompt} {answer}").check([Prompt.of("How?", answer="So."), prompt])
