"""The divergences once more, value and gradient, straight from their equations on whole fp64 rows: what
divergences/test_divergences.py and inputs/test_teacher_lists.py compare with.

  One function per divergence: (s, u, ...) -> losses (n,), d losses / d s (n, V); s, u (n, V) logits, y (n,) sampled tokens.

Written apart from opd_ops/: no function of it is used. Not here: inputs (cases.py), bounds (tolerances.py).
"""

import math

import torch


def _rows(s, u):
    s, u = s.double(), u.double()
    return s.log_softmax(1), u.log_softmax(1)


def _times(probability, factor):
    """0 where the probability is 0, whatever the factor."""
    return torch.where(probability == 0, 0, probability * torch.where(probability == 0, 0, factor))


def _teachers_best(log_q, k):
    """(n, V) bool: the teacher's k most likely ids, the lower id first among equals; none of probability 0."""
    ids = torch.sort(log_q, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(log_q, dtype=torch.bool).scatter(1, ids, True) & (log_q > -math.inf)


def reverse_kl(s, u):
    log_p, log_q = _rows(s, u)
    p = log_p.exp()
    loss = _times(p, log_p - log_q).sum(1)
    return loss, _times(p, log_p - log_q - loss.unsqueeze(1))


def forward_kl(s, u):
    log_p, log_q = _rows(s, u)
    return _times(log_q.exp(), log_q - log_p).sum(1), log_p.exp() - log_q.exp()


def jsd(s, u, beta=0.5):
    log_p, log_q = _rows(s, u)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.log(beta * q + (1 - beta) * p)
    to_p = _times(p, log_p - log_m).sum(1)
    loss = beta * _times(q, log_q - log_m).sum(1) + (1 - beta) * to_p
    return loss, (1 - beta) * _times(p, log_p - log_m - to_p.unsqueeze(1))


def total_variation(s, u):
    log_p, log_q = _rows(s, u)
    p, sign = log_p.exp(), torch.sign(log_p.exp() - log_q.exp())
    return (p - log_q.exp()).abs().sum(1) / 2, p * (sign - (p * sign).sum(1, keepdim=True)) / 2


def clipped_jsd(s, u, beta=0.5, entry_clip=0.05):
    log_p, log_q = _rows(s, u)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.log(beta * q + (1 - beta) * p)
    terms = beta * _times(q, log_q - log_m) + (1 - beta) * _times(p, log_p - log_m)
    slope = torch.where(terms < entry_clip, (1 - beta) * (log_p - log_m), 0)
    return terms.clamp_max(entry_clip).sum(1), _times(p, slope - _times(p, slope).sum(1, keepdim=True))


def skew_kl(s, u, alpha=0.1, direction="reverse"):
    log_p, log_q = _rows(s, u)
    p, q = log_p.exp(), log_q.exp()
    if direction == "reverse":
        m = (1 - alpha) * q + alpha * p
        loss, slope = _times(p, log_p - m.log()).sum(1), log_p - m.log() - alpha * p / m
    else:
        m = alpha * q + (1 - alpha) * p
        loss, slope = _times(q, log_q - m.log()).sum(1), -(1 - alpha) * q / m
    return loss, _times(p, slope - _times(p, slope).sum(1, keepdim=True))


def power(s, u, alpha=5.0):
    log_p, log_q = _rows(s, u)
    p, q = log_p.exp(), log_q.exp()
    loss = (p ** (1 + alpha) / (1 + alpha) - p * q**alpha + alpha * q ** (1 + alpha) / (1 + alpha)).sum(1)
    slope = p**alpha - q**alpha
    return loss, p * (slope - (p * slope).sum(1, keepdim=True))


def geometric(models, weights):
    """Logits of the geometric mixture: q is proportional to the product of the models' q_m^w_m."""
    return sum(w * u.double().log_softmax(1) for w, u in zip(weights, models, strict=True))


def arithmetic(models, weights):
    """Logits of the arithmetic mixture: q is the sum of w_m q_m."""
    return sum(w * u.double().softmax(1) for w, u in zip(weights, models, strict=True)).log()


def local_support(s, u, top_k=32):
    _, log_q = _rows(s, u)
    best = _teachers_best(log_q, top_k)
    loss, gradient = reverse_kl(s.double().masked_fill(~best, -math.inf), u.double().masked_fill(~best, -math.inf))
    return loss, torch.where(best, gradient, 0)


def tail_aware(s, u, top_k=16):
    log_p, log_q = _rows(s, u)
    best = _teachers_best(log_q, top_k)
    tails = (torch.logsumexp(x.masked_fill(best, -math.inf), 1, keepdim=True) for x in (log_p, log_q))
    log_p_tail, log_q_tail = tails
    p, p_tail = log_p.exp(), log_p_tail.exp()
    ratio = torch.where(best, log_p - log_q, log_p_tail - log_q_tail)
    on_list = torch.where(best, _times(p, log_p - log_q), 0).sum(1)
    loss = on_list + _times(p_tail, log_p_tail - log_q_tail).squeeze(1)
    return loss, _times(p, ratio - loss.unsqueeze(1))


def forward_kl_topk(s, u, top_k=16):
    log_p, log_q = _rows(s, u)
    best = _teachers_best(log_q, top_k)
    q = torch.where(best, log_q.exp(), 0)
    return _times(q, log_q - log_p).sum(1), q.sum(1, keepdim=True) * log_p.exp() - q


def sampled(s, u, y, clip=math.inf, shape="log", baseline=False, alpha=5.0):
    log_p, log_q = _rows(s, u)
    column_y = y.unsqueeze(1)
    at_p, at_q = log_p.gather(1, column_y), log_q.gather(1, column_y)
    log_ratio = at_q - at_p
    advantage = {
        "log": log_ratio,
        "soft_log": log_ratio.sign() * torch.log(1 + log_ratio.abs()),
        "tanh": torch.tanh(log_ratio / 5),
        "power": at_q.exp() ** alpha - at_p.exp() ** alpha,
    }[shape]
    if baseline:
        advantage = advantage + reverse_kl(s, u)[0].unsqueeze(1)
    advantage = advantage.clamp(-clip, clip)
    one_hot = torch.zeros_like(log_p).scatter(1, column_y, 1.0)
    return -(advantage * log_p.gather(1, column_y)).squeeze(1), -advantage * (one_hot - log_p.exp())


def entropy_aware(s, u, alpha=1.0, tau=0.8, top_k=16):
    log_p, log_q = _rows(s, u)
    loss, gradient = reverse_kl(s, u)
    best = _teachers_best(log_q, top_k)
    log_local = u.double().masked_fill(~best, -math.inf).log_softmax(1)
    uncertain = (-_times(log_q.exp(), log_q).sum(1) > tau).double()
    added = _times(log_local.exp(), log_local - log_p).sum(1)
    more = alpha * uncertain.unsqueeze(1) * (log_p.exp() - log_local.exp())
    return loss + alpha * uncertain * added, gradient + more


def top_k(s, u, y=None, *, direction="reverse", support="teacher", tail="bucket", top_k=16, beta=0.5):
    """The family of losses on a list of top-K ids, each gradient in closed form."""
    log_p, log_q = _rows(s, u)
    student_list, teacher_list = (_teachers_best(x, top_k) for x in (log_p, log_q))
    on = {
        "student": student_list,
        "teacher": teacher_list,
        "union": student_list | teacher_list,
        "intersection": student_list & teacher_list,
    }
    on = on[support]
    if tail == "drop":
        kinds = {"reverse": reverse_kl, "forward": forward_kl, "jsd": lambda s, u: jsd(s, u, beta)}
        loss, gradient = kinds[direction](*(x.double().masked_fill(~on, -math.inf) for x in (s, u)))
        return loss, torch.where(on, gradient, 0)
    p, q = log_p.exp(), log_q.exp()
    p_on, q_on = (torch.where(on, x, 0).sum(1, keepdim=True) for x in (p, q))
    ratio = log_p - log_q
    if tail == "bucket":
        p_off, q_off = (torch.where(on, 0, x).sum(1, keepdim=True) for x in (p, q))

        def summed(weight, off, factor):  # over the outcomes: the ids of the list, and all others together
            listed = torch.where(on, _times(weight, factor), 0).sum(1, keepdim=True)
            return listed + off * torch.where(on, -math.inf, factor).amax(1, keepdim=True)

        ratio = torch.where(on, ratio, torch.log(p_off / q_off))
        if direction == "reverse":
            loss = summed(p, p_off, ratio)
            return loss.squeeze(1), _times(p, ratio - loss)
        if direction == "forward":
            loss = summed(q, q_off, -ratio)
            return loss.squeeze(1), torch.where(on, p - q, p * (1 - q_off / p_off))
        smoothed_p, smoothed_q = (torch.where(on, x, off) for x, off in ((p, p_off), (q, q_off)))
        mixed = beta * smoothed_q + (1 - beta) * smoothed_p
        to_p = summed(p, p_off, torch.log(smoothed_p / mixed))
        loss = beta * summed(q, q_off, torch.log(smoothed_q / mixed)) + (1 - beta) * to_p
        return loss.squeeze(1), (1 - beta) * _times(p, torch.log(smoothed_p / mixed) - to_p)
    if direction == "forward":
        loss = torch.where(on, _times(q, -ratio), 0).sum(1) + (p_on - q_on).squeeze(1)
        return loss, torch.where(on, p - q, 0) + p * (q_on - p_on)
    cut = torch.where(on, _times(p, ratio), 0).sum(1, keepdim=True)
    loss, gradient = (cut + q_on - p_on).squeeze(1), torch.where(on, _times(p, ratio), 0) - p * cut
    if tail == "sampled":
        column_y = y.unsqueeze(1)
        alone = torch.where(on.gather(1, column_y), 0, ratio.gather(1, column_y))
        loss = loss + alone.squeeze(1)
        gradient = gradient + alone * (torch.zeros_like(p).scatter(1, column_y, 1.0) - p)
    return loss, gradient
