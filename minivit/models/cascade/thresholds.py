"""Thresholds of a cascade: how sure an exit must be for an image to stop there. On plain arrays, whatever model they come from.

An image takes the first of K exits whose confidence in it is at least that exit's threshold; the last exit takes whatever comes to it. It
then costs what all exits up to its own cost. Given n images, each exit's confidence in each, and whether it is right, thresholds are
sought for a budget: those with the highest accuracy whose mean cost is within it (to one part in 10^9, for the rounding of sums).

    sweep     the 59 candidates of the code released with Dynamic ViT (2105.15075), which come from the confidences alone
    exact     the best of all thresholds: proven for two and three exits, never worse than `sweep` for more

Confidences lie in 0..1. A threshold of ALWAYS stops every image, NEVER none. Any other of `exact` lies midway between the confidences that
it parts; of `sweep` it is the confidence of the last image that stops, as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UserError

ALWAYS, NEVER = 0.0, 2.0
SLACK = 1 + 1e-9  # a budget is met up to this factor
CANDIDATES = 59  # of the geometric sweep

Thresholds = tuple[float, ...]  # K-1 of them: the last exit needs none
Numbers = Sequence[float] | np.ndarray


class Outcome(NamedTuple):
    """What thresholds do to a set of images."""

    accuracy: float  # 0..1
    mean_cost: float  # of an image, in the unit of `costs`
    shares: tuple[float, ...]  # of the images, by exit


def exits_of(confidences: np.ndarray, thresholds: Numbers) -> np.ndarray:
    """(n,) int64: the exit each image takes, from 0. confidences: (n, K), or (n, K-1); thresholds: K-1."""
    exits = np.full(len(confidences), len(thresholds), np.int64)
    for k in reversed(range(len(thresholds))):
        exits[confidences[:, k] >= thresholds[k]] = k
    return exits


def outcome(thresholds: Numbers, confidences: np.ndarray, correct: np.ndarray, costs: Numbers) -> Outcome:
    """Accuracy, mean cost and exit shares of n images. confidences, correct: (n, K); costs: (K,), ascending."""
    exits = exits_of(confidences, thresholds)  # (n,)
    shares = np.bincount(exits, minlength=len(costs)) / len(exits)
    right = correct[np.arange(len(exits)), exits].mean()
    return Outcome(float(right), float(shares @ np.asarray(costs, np.float64)), tuple(shares.tolist()))


def meets(cost: float, budget: float) -> bool:
    """Whether a cost is within a budget, up to the rounding of sums."""
    return cost <= budget * SLACK


def _checked(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> np.ndarray:
    """The costs as float64 (K,). Raises UserError for arrays that do not go together, and for budgets that no thresholds meet."""
    prices = np.asarray(costs, np.float64)
    if confidences.ndim != 2 or not len(confidences) or confidences.shape != correct.shape or confidences.shape[1:] != prices.shape:
        raise UserError(
            f"confidences {confidences.shape} and correct {correct.shape} must be (n, K) of at least one image, costs {prices.shape} (K,)"
        )
    if len(prices) < 2 or not (np.isfinite(prices).all() and prices[0] > 0 and (np.diff(prices) > 0).all()):
        raise UserError(f"costs must ascend from above 0, over two exits or more, got {prices.tolist()}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise UserError("confidences must lie in 0..1")
    unmet = [budget for budget in budgets if not meets(prices[0], budget)]
    if unmet:
        raise UserError(f"a budget of {unmet[0]:.4g} is below {prices[0]:.4g}, what the first exit alone costs: no thresholds meet it")
    return prices


# ----------------------------------------------------------------------------------------------------------------- the released sweep
def geometric_thresholds(confidences: np.ndarray) -> list[Thresholds]:
    """The 59 candidates of the released code. confidences: (n, K).

    For p = 1..59 exit k = 1..K is to take the share P_k ~ (p/20)^k of the images, the shares adding up to 1: its threshold is the
    confidence of the floor(n·P_k)-th surest of those that have not exited; where there are fewer, or that number is 0, none exits.
    """
    number, exits = confidences.shape
    surest_first = np.argsort(-confidences, axis=0, kind="stable")  # (n, K)
    candidates = []
    for p in range(1, CANDIDATES + 1):
        shares = (p / 20) ** np.arange(1, exits + 1)
        wanted = np.floor(number * shares / shares.sum()).astype(int)  # (K,)
        gone, thresholds = np.zeros(number, bool), []
        for k in range(exits - 1):
            order = surest_first[:, k]
            left = confidences[order[~gone[order]], k]  # of those that have not exited, descending
            thresholds.append(float(left[wanted[k] - 1]) if 1 <= wanted[k] <= len(left) else NEVER)
            gone |= confidences[:, k] >= thresholds[k]
        candidates.append(tuple(thresholds))
    return candidates


def sweep(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> list[Thresholds]:
    """For each budget the best of `geometric_thresholds`, and of "all images at exit 1", which alone meets the smallest budgets.

    confidences, correct: (n, K); costs: (K,), of all exits up to each. Raises UserError where a budget is below costs[0].
    """
    prices = _checked(confidences, correct, costs, budgets)
    candidates = [(ALWAYS,) * (len(prices) - 1), *geometric_thresholds(confidences)]
    outcomes = [outcome(candidate, confidences, correct, prices) for candidate in candidates]
    found = []
    for budget in budgets:
        within = [i for i, each in enumerate(outcomes) if meets(each.mean_cost, budget)]
        found.append(candidates[max(within, key=lambda i: (outcomes[i].accuracy, -outcomes[i].mean_cost))])
    return found


# ------------------------------------------------------------------------------------------------------------------ the exact solver
def exact(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> list[Thresholds]:
    """For each budget the thresholds of the highest accuracy, the cheapest of those that are equally accurate.

    Two and three exits: the optimum over all thresholds. Thresholds matter only by which images they let stop, and those that stop at an
    exit are the surest of the ones that reach it; so it is enough to try every cut between distinct confidences (`_solve_pair`).

    Four and more: a point from which no two neighbouring thresholds, moved together, lead further. It begins from the best of several
    starts that meet the budget, of which the result of `sweep` is one. Each step replaces two neighbours by the optimum of these two with
    the others held, and is kept where accuracy rises, or cost falls at the same accuracy; so the result is never worse than the sweep's.
    As there are finitely many ways to divide the images, and each has one accuracy and one cost, it ends.

    confidences, correct: (n, K); costs: (K,), of all exits up to each. Takes time as n² for each pair that is solved: about a second for
    10,000 images and three exits, whatever the number of budgets; with four and more, some such times for each budget. Raises UserError
    where a budget is below costs[0].
    """
    prices = _checked(confidences, correct, costs, budgets)
    limits = len(confidences) * np.asarray(budgets, np.float64) * SLACK
    if len(prices) == 2:  # as three, of which the second takes whatever comes to it
        certain = np.column_stack((confidences[:, 0], np.ones(len(confidences), confidences.dtype)))
        return [pair[:1] for pair in _solve_pair(certain, correct[:, [0, 1, 1]], np.tile(prices[[0, 1, 1]], (len(correct), 1)), limits)]
    cascade = _Cascade(confidences, correct, prices)
    held = (NEVER,) * (len(prices) - 1)
    starts = [cascade.with_best_pair(held, k, limits) for k in range(len(prices) - 2)]  # for each pair, for each budget
    if len(prices) == 3:
        return starts[0]
    starts.append(sweep(confidences, correct, prices, budgets))
    return [cascade.ascend(max(filter(None, options), key=cascade.value), limit) for options, limit in zip(zip(*starts), limits)]


class _Cascade(NamedTuple):
    confidences: np.ndarray  # (n, K)
    correct: np.ndarray  # (n, K)
    costs: np.ndarray  # (K,)

    def value(self, thresholds: Thresholds) -> tuple[float, float]:
        """What is maximised: accuracy first, then the cost saved."""
        reached = outcome(thresholds, self.confidences, self.correct, self.costs)
        return reached.accuracy, -reached.mean_cost

    def with_best_pair(self, thresholds: Thresholds, k: int, limits: np.ndarray) -> list[Thresholds]:
        """For each limit on the total cost, `thresholds` with the best k-th and k+1-th, the others held; () where none meets it."""
        exits = exits_of(self.confidences, thresholds)
        rows = np.flatnonzero(exits_of(self.confidences, thresholds[:k]) == k)  # of the images that reach exit k
        if not len(rows):
            return [thresholds] * len(limits)
        passing = k + 2 + exits_of(self.confidences[rows, k + 2 :], thresholds[k + 2 :])  # the exit of what passes both
        options = np.column_stack((np.full_like(passing, k), np.full_like(passing, k + 1), passing))  # (rows, 3) exits
        spent = self.costs[exits].sum() - self.costs[exits[rows]].sum()
        pairs = _solve_pair(self.confidences[rows, k : k + 2], self.correct[rows[:, None], options], self.costs[options], limits - spent)
        return [pair and thresholds[:k] + pair + thresholds[k + 2 :] for pair in pairs]

    def ascend(self, thresholds: Thresholds, limit: float) -> Thresholds:
        """Improve pair after pair until none can be; `thresholds` meet the limit, and so does every later step."""
        pairs, stuck, k = len(thresholds) - 1, 0, 0
        while stuck < pairs:
            (found,) = self.with_best_pair(thresholds, k, np.array([limit]))
            improved = found and self.value(found) > self.value(thresholds)
            thresholds, stuck, k = found if improved else thresholds, 0 if improved else stuck + 1, (k + 1) % pairs
        return thresholds


def _solve_pair(confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> list[Thresholds]:
    """For each limit on the total cost the two best thresholds, or () where none meets it.

    confidences: (n, 2). correct, costs: (n, 3), where an image stops at the first, stops at the second, passes both; costs ascend by row.

    The images leave at the first exit in the order of their confidence, those that tie together. After each such step the rest is cut,
    in the order of its confidence at the second exit, behind every group j = 0..G of equal ones. Running sums over the groups give what a
    cut gains in right answers and what it saves. The savings rise with j, so that a limit allows the cuts from some j on, and a running
    maximum from the end knows the best of them: of gain·(G+1) + j, so that the cheapest wins among equals.
    """
    order = np.argsort(-confidences[:, 0], kind="stable")
    leaving = confidences[order, 0]
    steps = np.concatenate(([0], 1 + np.flatnonzero(leaving[1:] != leaving[:-1]), [len(order)]))  # how many have left at each
    group = np.unique(-confidences[:, 1], return_inverse=True)[1].reshape(-1) + 1  # (n,) 1..G, the surest first
    groups = int(group.max())
    correct, gain, saving = correct.astype(np.int64), correct[:, 1].astype(np.int64) - correct[:, 2], costs[:, 2] - costs[:, 1]
    gains = np.bincount(group, gain, groups + 1).astype(np.int64) * (groups + 1) + (np.arange(groups + 1) > 0)  # (G+1,)
    savings = np.bincount(group, saving, groups + 1)  # (G+1,)

    def by_step(first: np.ndarray, others: np.ndarray) -> np.ndarray:
        """At each step the sum of `first` over those that have left and of `others` over the rest."""
        return others.sum() + np.concatenate(([0], np.cumsum((first - others)[order])))[steps]

    right, cost = by_step(correct[:, 0], correct[:, 2]), by_step(costs[:, 0], costs[:, 2])  # if all the rest passes
    most, least = by_step(correct[:, 0], correct[:, 1:].max(1)), by_step(costs[:, 0], costs[:, 1])  # what no cut can surpass
    best, price = np.full(len(limits), -1), np.full(len(limits), np.inf)
    at_step, at_cut = np.zeros((2, len(limits)), np.int64)
    left = 0
    for step in range(len(steps)):
        if not ((least[step] <= limits) & (most[step] >= best)).any():
            continue
        gone, left = order[left : steps[step]], steps[step]
        np.subtract.at(gains, group[gone], gain[gone] * (groups + 1))
        np.subtract.at(savings, group[gone], saving[gone])
        saved = np.cumsum(savings)  # (G+1,)
        ahead = np.maximum.accumulate(np.cumsum(gains)[::-1])[::-1]  # (G+1,): the best of the cuts j and behind
        allowed = np.searchsorted(saved, cost[step] - limits)  # (budgets,): the first cut that saves enough
        gained, cut = np.divmod(ahead[np.minimum(allowed, groups)], groups + 1)
        answers, spent = right[step] + gained, cost[step] - saved[cut]
        better = (allowed <= groups) & ((answers > best) | ((answers == best) & (spent < price)))
        best[better], price[better], at_step[better], at_cut[better] = answers[better], spent[better], step, cut[better]
    return [
        _pair_at(confidences, order, steps[step], group <= cut) if found >= 0 else () for found, step, cut in zip(best, at_step, at_cut)
    ]


def _pair_at(confidences: np.ndarray, order: np.ndarray, left: int, sure: np.ndarray) -> Thresholds:
    """The thresholds by which the first `left` of `order` stop at the first exit, and the `sure` ones (n,) of the rest at the second."""
    first, rest = order[:left], order[left:]
    second, passing = rest[sure[rest]], rest[~sure[rest]]
    return _between(confidences[first, 0], confidences[rest, 0]), _between(confidences[second, 1], confidences[passing, 1])


def _between(stopping: np.ndarray, passing: np.ndarray) -> float:
    """The threshold that parts confidences: midway, so that another rounding of them moves no image; exact in their own dtype."""
    if not len(passing):
        return ALWAYS
    if not len(stopping):
        return NEVER
    low, high = passing.max(), stopping.min()
    middle = low + (high - low) / low.dtype.type(2)
    return float(middle if middle > low else high)
