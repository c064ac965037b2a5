"""Columns made of the two top-K lists alone, for selectors that read nothing else: in fp64, one program for each row.

  released_kl     D of TA's released code: sum_T q (log q - log p) + sum_{S - T} f (log f - log p); p is the softmax of the
                  student's list, q of the teacher's, each at least f = 1e-12, and f for an id missing from a list
  topk_entropy    H(p on S) / ln |S'|, S' the ids of S with p > 0, two at least
  top1_agreement  1 where both lists begin with one id, else 0
  teacher_rank    the place of the student's first id on the teacher's list: 1, 2, ...; K + 1: not on it, or masked there
  Source: arXiv 2605.26844's code; opd_ops/backends/shared/supports.py computes the same by torch.

exp and log are written out: products and sums of fp64, as exact as a library's to two units in the last place. An entry costs
some 60 of them, a row of K = 16 some 2,000.

Not here: the lists, and the launch (support.py). Tests: tests/kernels/test_support.py.
"""

import triton
import triton.language as tl

LIST_COLUMNS = ("released_kl", "topk_entropy", "top1_agreement", "teacher_rank")
# fp64 numbers: a Python float in an expression of a kernel may become fp32
FLOOR = tl.constexpr(1e-12)
LOG_FLOOR = tl.constexpr(-27.631021115928547)
LEAST_LISTED = tl.constexpr(-745.0)  # log of the smallest fp64 number
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693147180369123816490)  # 32 bits: its products with exponents are exact
LN_2_LOW = tl.constexpr(1.90821492927058770002e-10)
ROUNDER = tl.constexpr(1.5 * 2.0**52)  # a number plus this has no digits after the point
SQRT_2 = tl.constexpr(2.0**0.5)


@triton.jit
def _f64(value: tl.constexpr):
    return tl.full((), value, tl.float64)


@triton.jit
def _exp(x):
    # e^x of fp64 x <= 0, 0 below -708: x = k ln 2 + r, e^r by its series
    shifted = x * _f64(LOG2_E) + _f64(ROUNDER)
    k = shifted - _f64(ROUNDER)
    r = (x - k * _f64(LN_2_HIGH)) - k * _f64(LN_2_LOW)
    series = r * _f64(1.0 / 13.0) + _f64(1.0)
    for i in tl.static_range(12, 0, -1):
        series = r * _f64(1.0 / i) * series + _f64(1.0)
    power = (shifted.to(tl.int64, bitcast=True) + 1023) & 0x7FF  # k is in the low bits
    return tl.where(x < _f64(-708.0), _f64(0.0), series * (power << 52).to(tl.float64, bitcast=True))


@triton.jit
def _log(x):
    # ln x of fp64 x >= 1; NaN stays NaN: x = 2^k m, ln m by the series of 2 atanh((m - 1) / (m + 1))
    bits = x.to(tl.int64, bitcast=True)
    k = (bits >> 52) - 1023
    m = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    is_large = m > _f64(SQRT_2)
    m = tl.where(is_large, m * _f64(0.5), m)
    k = (k + is_large.to(tl.int64)).to(tl.float64)
    w = (m - _f64(1.0)) / (m + _f64(1.0))
    square = w * w
    series = _f64(1.0 / 23.0)
    for i in tl.static_range(21, 0, -2):
        series = series * square + _f64(1.0 / i)
    return tl.where(x != x, x, k * _f64(LN_2_HIGH) + (k * _f64(LN_2_LOW) + w * (series + series)))


@triton.jit
def _list_logprobs(x, mask_k):
    # log softmax of fp32 logits over their list, and the list's log-sum-exp; NaN where all are -inf
    x = x.to(tl.float64)
    top = tl.max(tl.where(mask_k, x, float("-inf")), 0)
    lse = top + _log(tl.sum(tl.where(mask_k, _exp(x - top), _f64(0.0)), 0))
    return x - lse, lse


@triton.jit
def _floored(log_p):
    return tl.where(log_p < _f64(LOG_FLOOR), _f64(LOG_FLOOR), log_p)  # NaN stays


@triton.jit
def _released_kl(s_at_s, s_at_t, t_at_t, s_in_t, t_in_s, mask_k):
    # logits in nats; s_in_t: whether each id of S is in T
    log_p, s_lse = _list_logprobs(s_at_s, mask_k)
    log_q = _floored(_list_logprobs(t_at_t, mask_k)[0])
    log_p_at_t = tl.where(t_in_s, _floored(s_at_t.to(tl.float64) - s_lse), _f64(LOG_FLOOR))
    on_t = tl.sum(tl.where(mask_k, _exp(log_q) * (log_q - log_p_at_t), _f64(0.0)), 0)
    off_t = tl.where(mask_k & (s_in_t == 0), (_f64(LOG_FLOOR) - _floored(log_p)) * _f64(FLOOR), _f64(0.0))
    return on_t + tl.sum(off_t, 0)


@triton.jit
def _topk_entropy(s_at_s, mask_k):
    log_p = _list_logprobs(s_at_s, mask_k)[0]
    total = tl.sum(tl.where(mask_k & (log_p != float("-inf")), _exp(log_p) * log_p, _f64(0.0)), 0)
    n_listed = tl.sum((mask_k & (log_p > _f64(LEAST_LISTED))).to(tl.int32), 0)
    return (_f64(0.0) - total) / _log(tl.maximum(n_listed, 2).to(tl.float64))


@triton.jit
def _first_id(ids, place, mask_k):
    # of a list in any order, with each entry's place in the ordered list
    return tl.max(tl.where(mask_k & (place == 0), ids, -1), 0)


@triton.jit
def _store_list_columns(
    released_kl_ptr, topk_entropy_ptr, top1_agreement_ptr, teacher_rank_ptr, i, K,
    s_ids, t_ids, s_place, t_place, s_in_t, t_in_s, s_at_s, s_at_t, t_at_t, mask_k,
):  # fmt: skip
    # entry i of each column that has a pointer
    if released_kl_ptr is not None:
        kl = _released_kl(s_at_s, s_at_t, t_at_t, s_in_t, t_in_s, mask_k)
        tl.store(released_kl_ptr + i, kl.to(tl.float32))
    if topk_entropy_ptr is not None:
        tl.store(topk_entropy_ptr + i, _topk_entropy(s_at_s, mask_k).to(tl.float32))
    s_first = _first_id(s_ids, s_place, mask_k)
    if top1_agreement_ptr is not None:
        tl.store(top1_agreement_ptr + i, (s_first == _first_id(t_ids, t_place, mask_k)).to(tl.float32))
    if teacher_rank_ptr is not None:
        is_first = mask_k & (t_ids == s_first) & (t_at_t > float("-inf"))
        tl.store(teacher_rank_ptr + i, (tl.min(tl.where(is_first, t_place, K), 0) + 1).to(tl.float32))
