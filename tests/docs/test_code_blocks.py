"""Every Python block of README.md and of docs/ runs, as one program for each page, at sizes that take a second.

  Run: make test ARGS=tests/docs
Not here: whether what a page says of the package is true (test_pages.py, and the tests of each claim).
"""

import warnings

import pytest
import torch
import torch.distributed as dist

from tests.docs.pages import NAMES, PAGES, blocks, run

CODE = [(page, blocks(page.read_text())) for page in PAGES]
WITH_CODE = [
    pytest.param(page, code, id=name)
    for name, (page, code) in zip(NAMES, CODE, strict=True)
    if any(not b.is_hidden for b in code)
]
IN_HOSTS = [case for case in WITH_CODE if any(b.is_full for b in case.values[1])]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Pages may seed, start a process group and write into the present folder."""
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "code"), WITH_CODE)
def test_the_code_of_each_page_runs(page, code):
    in_host = any(block.is_full for block in code)
    run(page, [block for block in code if not block.is_full and not (in_host and block.is_hidden)])


@pytest.mark.full
@pytest.mark.parametrize(("page", "code"), IN_HOSTS)
def test_the_code_of_each_page_runs_inside_its_host(page, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hosts' own
        run(page, code)


def test_no_python_block_escapes():
    for page, code in CODE:
        text = page.read_text()
        assert text.count("```python") == sum(not block.is_hidden for block in code), page
        assert text.count("<!-- hidden") == sum(block.is_hidden for block in code), page


def test_a_block_that_fails_names_its_line():
    text = "# Title\n\nWords.\n\n```python\nx = 1\nx.y\n```\n"
    with pytest.raises(AttributeError) as error:
        run(PAGES[0], blocks(text))
    assert error.traceback[-1].lineno + 1 == 7
