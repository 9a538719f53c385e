"""Optimisation of a cascade's confidence thresholds, on plain arrays independent of the model.

An image leaves at the first of K exits whose confidence is at least that exit's threshold; all remaining images leave at the last exit. Its
cost is the cumulative cost of its exit. Given the confidence and correctness of each exit for n images, thresholds are optimised for a
budget: the highest accuracy with a mean cost within the budget (up to a factor of 1 + 10^-9, for rounding of sums).

    sweep     the 59 candidates of the code released with Dynamic ViT (2105.15075), which depend on the confidences alone
    exact     the best of all thresholds: proven for two and three exits, never worse than `sweep` for more

Confidences are in 0..1. With the threshold ALWAYS every image leaves, with NEVER none. Any other threshold of `exact` is midway between the
confidences that it separates; one of `sweep` is the lowest confidence among the images that leave, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UserError

ALWAYS, NEVER = 0.0, 2.0
SLACK = 1 + 1e-9  # relative tolerance of budgets
CANDIDATES = 59  # number of candidates of the geometric sweep

Thresholds = tuple[float, ...]  # (K-1,): the last exit has none
Numbers = Sequence[float] | np.ndarray


class Outcome(NamedTuple):
    """The result of thresholds on a set of images."""

    accuracy: float  # 0..1
    mean_cost: float  # per image, in the unit of `costs`
    shares: tuple[float, ...]  # fraction of the images by exit


def exits_of(confidences: np.ndarray, thresholds: Numbers) -> np.ndarray:
    """The exit of each image, (n,) int64 from 0. confidences: (n, K) or (n, K-1); thresholds: (K-1,)."""
    exits = np.full(len(confidences), len(thresholds), np.int64)
    for k in reversed(range(len(thresholds))):
        exits[confidences[:, k] >= thresholds[k]] = k
    return exits


def outcome(thresholds: Numbers, confidences: np.ndarray, correct: np.ndarray, costs: Numbers) -> Outcome:
    """Accuracy, mean cost and exit shares of n images. confidences, correct: (n, K); costs: (K,), cumulative."""
    exits = exits_of(confidences, thresholds)  # (n,)
    shares = np.bincount(exits, minlength=len(costs)) / len(exits)
    accuracy = correct[np.arange(len(exits)), exits].mean()
    return Outcome(float(accuracy), float(shares @ np.asarray(costs, np.float64)), tuple(shares.tolist()))


def meets(cost: float, budget: float) -> bool:
    """Whether a cost is within a budget, up to rounding."""
    return cost <= budget * SLACK


def _checked(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> np.ndarray:
    """The costs as float64 (K,). Raises UserError for inconsistent arrays, and for budgets that no thresholds can meet."""
    values = np.asarray(costs, np.float64)
    if confidences.ndim != 2 or not len(confidences) or confidences.shape != correct.shape or confidences.shape[1:] != values.shape:
        raise UserError(
            f"confidences {confidences.shape} and correct {correct.shape} must be (n, K) of at least one image, costs {values.shape} (K,)"
        )
    if len(values) < 2 or not (np.isfinite(values).all() and values[0] > 0 and (np.diff(values) > 0).all()):
        raise UserError(f"costs must ascend from above 0, over two exits or more, got {values.tolist()}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise UserError("confidences must lie in 0..1")
    unmet = [budget for budget in budgets if not meets(values[0], budget)]
    if unmet:
        raise UserError(f"a budget of {unmet[0]:.4g} is below {values[0]:.4g}, what the first exit alone costs: no thresholds meet it")
    return values


# ----------------------------------------------------------------------------------------------------------------- the released sweep
def geometric_thresholds(confidences: np.ndarray) -> list[Thresholds]:
    """The 59 candidates of the released code. confidences: (n, K).

    For p = 1..59, exit k = 1..K gets the fraction P_k ~ (p/20)^k of the images, with fractions that sum to 1: its threshold is the
    floor(n·P_k)-th highest confidence among the images that have not left. If there are fewer images, or this number is 0, none leaves.
    """
    n, exits = confidences.shape
    descending_order = np.argsort(-confidences, axis=0, kind="stable")  # (n, K)
    candidates = []
    for p in range(1, CANDIDATES + 1):
        shares = (p / 20) ** np.arange(1, exits + 1)
        counts = np.floor(n * shares / shares.sum()).astype(int)  # (K,)
        has_left, thresholds = np.zeros(n, bool), []
        for k in range(exits - 1):
            order = descending_order[:, k]
            remaining = confidences[order[~has_left[order]], k]  # of the images that have not left, descending
            thresholds.append(float(remaining[counts[k] - 1]) if 1 <= counts[k] <= len(remaining) else NEVER)
            has_left |= confidences[:, k] >= thresholds[k]
        candidates.append(tuple(thresholds))
    return candidates


def sweep(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> list[Thresholds]:
    """For each budget, the best of `geometric_thresholds` and of "all images leave at exit 1", which alone meets the smallest budgets.

    confidences, correct: (n, K); costs: (K,), cumulative. Raises UserError if a budget is below costs[0].
    """
    cost_array = _checked(confidences, correct, costs, budgets)
    candidates = [(ALWAYS,) * (len(cost_array) - 1), *geometric_thresholds(confidences)]
    outcomes = [outcome(candidate, confidences, correct, cost_array) for candidate in candidates]
    best = []
    for budget in budgets:
        feasible = [i for i, result in enumerate(outcomes) if meets(result.mean_cost, budget)]
        best.append(candidates[max(feasible, key=lambda i: (outcomes[i].accuracy, -outcomes[i].mean_cost))])
    return best


# ------------------------------------------------------------------------------------------------------------------ the exact solver
def exact(confidences: np.ndarray, correct: np.ndarray, costs: Numbers, budgets: Numbers) -> list[Thresholds]:
    """For each budget, the thresholds with the highest accuracy, and with the lowest cost among those of equal accuracy.

    Two and three exits: the optimum over all thresholds. Only the partition of the images matters, and the images that leave at an exit are
    those with the highest confidence among the ones that reach it; hence it suffices to try every cut between distinct confidences
    (`_solve_pair`).

    Four and more: a local optimum that no change of two neighbouring thresholds improves. The search starts from the best of several
    thresholds that meet the budget, including the result of `sweep`. Each step replaces two neighbouring thresholds by their optimum with
    the others fixed, and is accepted if accuracy increases, or cost decreases at equal accuracy; hence the result is never worse than that
    of `sweep`. The search terminates, because there are finitely many partitions of the images.

    confidences, correct: (n, K); costs: (K,), cumulative. The time is proportional to n² for each solved pair: about a second for 10,000
    images and three exits, independent of the number of budgets; with four or more exits, a multiple of that for each budget. Raises
    UserError if a budget is below costs[0].
    """
    cost_array = _checked(confidences, correct, costs, budgets)
    limits = len(confidences) * np.asarray(budgets, np.float64) * SLACK
    if len(cost_array) == 2:  # solved as three exits, all remaining images leaving at the second
        padded = np.column_stack((confidences[:, 0], np.ones(len(confidences), confidences.dtype)))
        return [pair[:1] for pair in _solve_pair(padded, correct[:, [0, 1, 1]], np.tile(cost_array[[0, 1, 1]], (len(correct), 1)), limits)]
    cascade = _Cascade(confidences, correct, cost_array)
    fixed = (NEVER,) * (len(cost_array) - 1)
    starts = [cascade.with_best_pair(fixed, k, limits) for k in range(len(cost_array) - 2)]  # for each pair, for each budget
    if len(cost_array) == 3:
        return starts[0]
    starts.append(sweep(confidences, correct, cost_array, budgets))
    return [cascade.ascend(max(filter(None, options), key=cascade.value), limit) for options, limit in zip(zip(*starts), limits)]


class _Cascade(NamedTuple):
    """The data of the optimisation, and steps on it."""

    confidences: np.ndarray  # (n, K)
    correct: np.ndarray  # (n, K)
    costs: np.ndarray  # (K,)

    def value(self, thresholds: Thresholds) -> tuple[float, float]:
        """The objective to maximise, in lexicographic order: (accuracy, -mean cost)."""
        result = outcome(thresholds, self.confidences, self.correct, self.costs)
        return result.accuracy, -result.mean_cost

    def with_best_pair(self, thresholds: Thresholds, k: int, limits: np.ndarray) -> list[Thresholds]:
        """For each limit on the total cost, `thresholds` with optimal k-th and k+1-th entries, the others fixed; () if none meets it."""
        exits = exits_of(self.confidences, thresholds)
        rows = np.flatnonzero(exits_of(self.confidences, thresholds[:k]) == k)  # indices of the images that reach exit k
        if not len(rows):
            return [thresholds] * len(limits)
        passing = k + 2 + exits_of(self.confidences[rows, k + 2 :], thresholds[k + 2 :])  # the exit of images that pass both
        options = np.column_stack((np.full_like(passing, k), np.full_like(passing, k + 1), passing))  # (rows, 3) exits
        fixed = self.costs[exits].sum() - self.costs[exits[rows]].sum()
        pairs = _solve_pair(self.confidences[rows, k : k + 2], self.correct[rows[:, None], options], self.costs[options], limits - fixed)
        return [pair and thresholds[:k] + pair + thresholds[k + 2 :] for pair in pairs]

    def ascend(self, thresholds: Thresholds, limit: float) -> Thresholds:
        """Improve one pair after another until no pair can be improved. `thresholds` must meet the limit; every step does too."""
        pairs, failures, k = len(thresholds) - 1, 0, 0
        while failures < pairs:
            (candidate,) = self.with_best_pair(thresholds, k, np.array([limit]))
            improved = candidate and self.value(candidate) > self.value(thresholds)
            thresholds, failures, k = candidate if improved else thresholds, 0 if improved else failures + 1, (k + 1) % pairs
        return thresholds


def _solve_pair(confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> list[Thresholds]:
    """For each limit on the total cost, the two best thresholds, or () if none meets it.

    confidences: (n, 2). correct, costs: (n, 3), if an image leaves at the first exit, at the second, or passes both; costs ascend by row.

    Images leave at the first exit in descending order of confidence, equal ones together. After each such step the remaining images, sorted
    by confidence at the second exit, are cut after every group j = 0..G of equal confidences. Prefix sums over the groups give the gain in
    correct predictions and the saved cost of each cut. Savings increase with j, so a limit allows all cuts from some j on, and the best of
    them is a suffix maximum of gain·(G+1) + j, which prefers the cheapest among equal gains.
    """
    order = np.argsort(-confidences[:, 0], kind="stable")
    sorted_conf = confidences[order, 0]
    # the number of images that have left after each step
    step_sizes = np.concatenate(([0], 1 + np.flatnonzero(sorted_conf[1:] != sorted_conf[:-1]), [len(order)]))
    group = np.unique(-confidences[:, 1], return_inverse=True)[1].reshape(-1) + 1  # (n,) 1..G, by descending confidence
    G = int(group.max())
    correct, image_gain, image_saving = correct.astype(np.int64), correct[:, 1].astype(np.int64) - correct[:, 2], costs[:, 2] - costs[:, 1]
    gains = np.bincount(group, image_gain, G + 1).astype(np.int64) * (G + 1) + (np.arange(G + 1) > 0)  # (G+1,)
    savings = np.bincount(group, image_saving, G + 1)  # (G+1,)

    def by_step(first: np.ndarray, others: np.ndarray) -> np.ndarray:
        """For each step, the sum of `first` over the images that have left, plus the sum of `others` over the rest."""
        return others.sum() + np.concatenate(([0], np.cumsum((first - others)[order])))[step_sizes]

    step_correct, step_cost = by_step(correct[:, 0], correct[:, 2]), by_step(costs[:, 0], costs[:, 2])  # if all remaining images pass
    max_correct, min_cost = by_step(correct[:, 0], correct[:, 1:].max(1)), by_step(costs[:, 0], costs[:, 1])  # bounds on all cuts
    best_correct, best_cost = np.full(len(limits), -1), np.full(len(limits), np.inf)
    best_step, best_cut = np.zeros((2, len(limits)), np.int64)
    left_count = 0
    for step in range(len(step_sizes)):
        if not ((min_cost[step] <= limits) & (max_correct[step] >= best_correct)).any():
            continue
        leaving, left_count = order[left_count : step_sizes[step]], step_sizes[step]
        np.subtract.at(gains, group[leaving], image_gain[leaving] * (G + 1))
        np.subtract.at(savings, group[leaving], image_saving[leaving])
        cut_savings = np.cumsum(savings)  # (G+1,)
        suffix_best = np.maximum.accumulate(np.cumsum(gains)[::-1])[::-1]  # (G+1,): the best of the cuts j and after
        first_cut = np.searchsorted(cut_savings, step_cost[step] - limits)  # (budgets,): the first cut that saves enough
        cut_gain, cut = np.divmod(suffix_best[np.minimum(first_cut, G)], G + 1)
        new_correct, new_cost = step_correct[step] + cut_gain, step_cost[step] - cut_savings[cut]
        better = (first_cut <= G) & ((new_correct > best_correct) | ((new_correct == best_correct) & (new_cost < best_cost)))
        best_correct[better], best_cost[better], best_step[better], best_cut[better] = (
            new_correct[better],
            new_cost[better],
            step,
            cut[better],
        )
    return [
        _pair_at(confidences, order, step_sizes[step], group <= cut) if correct_count >= 0 else ()
        for correct_count, step, cut in zip(best_correct, best_step, best_cut)
    ]


def _pair_at(confidences: np.ndarray, order: np.ndarray, left_count: int, leaves_second: np.ndarray) -> Thresholds:
    """The thresholds by which the first `left_count` of `order` leave at the first exit, and of the rest `leaves_second` at the second."""
    first, rest = order[:left_count], order[left_count:]
    second, passing = rest[leaves_second[rest]], rest[~leaves_second[rest]]
    return _between(confidences[first, 0], confidences[rest, 0]), _between(confidences[second, 1], confidences[passing, 1])


def _between(leaving: np.ndarray, passing: np.ndarray) -> float:
    """A threshold that separates confidences: their midpoint, which is robust against rounding, in the dtype of the confidences."""
    if not len(passing):
        return ALWAYS
    if not len(leaving):
        return NEVER
    low, high = passing.max(), leaving.min()
    middle = low + (high - low) / low.dtype.type(2)
    return float(middle if middle > low else high)
