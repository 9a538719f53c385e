"""Thresholds: the released sweep to the letter, and the exact solver against all thresholds there are."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit import UserError
from minivit.models.cascade.thresholds import ALWAYS, NEVER, SLACK, exact, exits_of, geometric_thresholds, outcome, sweep


@st.composite
def problems(draw, exits=(2, 3, 4), most=9):
    """Confidences with many ties, answers, costs and a budget that can be met."""
    exits, number = draw(st.sampled_from(exits)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.integers(1, 12))
    confidences = (rng.integers(0, levels + 1, (number, exits)) / levels).astype(draw(st.sampled_from([np.float32, np.float64])))
    correct = rng.random((number, exits)) < 0.5
    costs = np.cumsum(rng.random(exits) + 0.05) if draw(st.booleans()) else np.cumsum(rng.integers(1, 4, exits)).astype(float)
    budget = draw(st.sampled_from([costs[0], costs[-1], costs[0] + draw(st.floats(0, 1)) * (costs[-1] - costs[0])]))
    return confidences, correct, costs, float(budget)


def best_by_trying(confidences, correct, costs, budget):
    """(accuracy, mean cost) of the best thresholds: every one that equals a confidence, and one that none reaches."""
    best = (-1.0, np.inf)
    for thresholds in product(*([*np.unique(column).tolist(), NEVER] for column in confidences.T[:-1])):
        accuracy, cost, _ = outcome(thresholds, confidences, correct, costs)
        if cost <= budget * SLACK and (accuracy, -cost) > (best[0], -best[1]):
            best = accuracy, cost
    return best


@given(problems(exits=(2, 3)))
def test_the_exact_solver_finds_the_best_of_all_thresholds(problem):
    confidences, correct, costs, budget = problem
    (found,) = exact(confidences, correct, costs, [budget])
    accuracy, cost, _ = outcome(found, confidences, correct, costs)
    expected = best_by_trying(*problem)
    assert accuracy == pytest.approx(expected[0], abs=1e-12)
    assert cost == pytest.approx(expected[1], rel=1e-9)  # the cheapest of the equally accurate


@given(problems(exits=(4, 5), most=7))
def test_more_exits_are_at_least_as_good_as_the_sweep(problem):
    confidences, correct, costs, budget = problem
    (found,) = exact(confidences, correct, costs, [budget])
    accuracy, cost, _ = outcome(found, confidences, correct, costs)
    swept = outcome(sweep(confidences, correct, costs, [budget])[0], confidences, correct, costs)
    assert cost <= budget * SLACK and (accuracy, -cost) >= (swept.accuracy, -swept.mean_cost)
    assert accuracy <= best_by_trying(*problem)[0] + 1e-12


def cascade(number, exits, seed=0):
    """Images of different difficulty, exits that are right more often the later they are, and surer where they are right."""
    rng = np.random.default_rng(seed)
    ease = rng.random((number, 1))
    correct = rng.random((number, exits)) < np.minimum(1, ease + np.linspace(0.1, 0.5, exits))
    confidences = np.clip(0.5 * ease + 0.3 * correct + 0.2 * rng.random((number, exits)), 0, 1).astype(np.float32)
    return confidences, correct, np.geomspace(1, 4 ** (exits - 1), exits)


@pytest.mark.parametrize("exits", [2, 3, 4])
def test_the_exact_solver_is_never_worse_at_twenty_budgets(exits):
    confidences, correct, costs = cascade(400, exits)
    budgets = np.linspace(costs[0], costs[-1], 20)
    swept, solved = (
        [outcome(thresholds, confidences, correct, costs) for thresholds in solve(confidences, correct, costs, budgets)]
        for solve in (sweep, exact)
    )
    for budget, worse, better in zip(budgets, swept, solved):
        assert max(worse.mean_cost, better.mean_cost) <= budget * SLACK
        assert (better.accuracy, -better.mean_cost) >= (worse.accuracy, -worse.mean_cost)
    assert sum(better.accuracy > worse.accuracy for worse, better in zip(swept, solved)) > 2
    assert [each.accuracy for each in solved] == sorted(each.accuracy for each in solved)


def test_four_exits_are_solved_well():
    """Against all thresholds there are: within half a point in the mean."""
    losses = []
    for seed in range(4):
        confidences, correct, costs = cascade(9, 4, seed)
        for budget in np.linspace(costs[0], costs[-1], 5)[:-1]:
            (found,) = exact(confidences, correct, costs, [budget])
            best = best_by_trying(confidences, correct, costs, budget)[0]
            losses.append(best - outcome(found, confidences, correct, costs).accuracy)
    assert np.mean(losses) < 0.005


def test_many_images_meet_all_budgets():
    confidences, correct, costs = cascade(4000, 3)
    budgets = np.linspace(costs[0], costs[-1], 20)
    for found, budget in zip(exact(confidences, correct, costs, budgets), budgets):
        assert outcome(found, confidences, correct, costs).mean_cost <= budget * SLACK


def test_ties_stay_together():
    confidences = np.array([[0.5, 0], [0.5, 0], [0.5, 0], [0.5, 0]])
    correct = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    assert exact(confidences, correct, [1.0, 2.0], [1.0, 1.5, 2.0]) == [(ALWAYS,)] * 3  # the cheaper of two equally good
    correct[3] = True, True
    assert exact(confidences, correct, [1.0, 2.0], [2.0]) == [(ALWAYS,)]
    correct[0] = False, True
    assert exact(confidences, correct, [1.0, 2.0], [1.9, 2.0]) == [(ALWAYS,), (NEVER,)]


def test_thresholds_lie_between_confidences():
    confidences = np.array([[0.9, 0], [0.8, 0], [0.3, 0]], np.float32)
    correct = np.array([[1, 0], [1, 0], [0, 1]], bool)
    ((threshold,),) = exact(confidences, correct, [1.0, 2.0], [1.5])
    assert threshold == pytest.approx(0.55)
    neighbours = np.array([[1, 0], [np.nextafter(np.float32(1), np.float32(0)), 0]], np.float32)
    ((threshold,),) = exact(neighbours, np.array([[1, 0], [0, 1]], bool), [1.0, 2.0], [1.5])
    assert exits_of(neighbours, (threshold,)).tolist() == [0, 1] and np.float32(threshold) == threshold


# -------------------------------------------------------------------------------------------------------------------------- sweep
def released(confidences, p):
    """The released code's rule, image by image (2105.15075)."""
    number, exits = confidences.shape
    shares = [(p / 20) ** k for k in range(1, exits + 1)]
    gone, thresholds = [False] * number, []
    for k in range(exits - 1):
        wanted, count, threshold = int(number * shares[k] / sum(shares)), 0, NEVER
        for i in sorted(range(number), key=lambda i: -confidences[i, k]):
            count += not gone[i]
            if not gone[i] and count == wanted:
                threshold = float(confidences[i, k])
                break
        thresholds.append(threshold)
        gone = [gone[i] or confidences[i, k] >= threshold for i in range(number)]
    return tuple(thresholds)


@pytest.mark.parametrize("number, exits", [(7, 3), (50, 2), (200, 3), (90, 4)])
def test_the_sweep_is_the_released_one(number, exits):
    confidences = cascade(number, exits)[0]
    assert geometric_thresholds(confidences) == [released(confidences, p) for p in range(1, 60)]


def test_the_sweep_of_ties():
    confidences = np.full((10, 3), 0.7)
    for p, found in enumerate(geometric_thresholds(confidences), 1):
        assert found == released(confidences, p)


def test_the_sweep_takes_the_best_candidate_within_the_budget():
    confidences, correct, costs = cascade(300, 3)
    outcomes = [outcome(t, confidences, correct, costs) for t in geometric_thresholds(confidences)]
    budgets = np.linspace(1.5 * costs[0], costs[-1], 6)
    for budget, found in zip(budgets, sweep(confidences, correct, costs, budgets)):
        assert outcome(found, confidences, correct, costs).accuracy == max(o.accuracy for o in outcomes if o.mean_cost <= budget)
    assert sweep(confidences, correct, costs, [costs[0]]) == [(ALWAYS, ALWAYS)]


# ------------------------------------------------------------------------------------------------------------------- exits and errors
def test_an_image_takes_the_first_exit_that_is_sure():
    confidences = np.array([[0.9, 0.9, 0.1], [0.5, 0.8, 0.1], [0.4, 0.7, 0.1], [0.5, 0.9, 0.1]])
    assert exits_of(confidences, (0.6, 0.8)).tolist() == [0, 1, 2, 1]
    correct = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    assert outcome((0.6, 0.8), confidences, correct, (1, 2, 4)) == (0.5, 2.25, (0.25, 0.5, 0.25))


@pytest.mark.parametrize("solve", [exact, sweep])
def test_what_does_not_go_together_is_told(solve):
    confidences, correct, costs = cascade(20, 3)
    for wrong, message in (
        ((confidences, correct, costs, [0.5]), "a budget of 0.5 is below 1, what the first exit alone costs"),
        ((confidences[:5], correct, costs, [2]), r"confidences \(5, 3\) and correct \(20, 3\)"),
        ((confidences, correct, costs[:2], [2]), r"costs \(2,\)"),
        ((confidences, correct, costs[::-1], [2]), "costs must ascend"),
        ((confidences[:, :1], correct[:, :1], costs[:1], [2]), "two exits or more"),
        ((confidences + 1, correct, costs, [2]), "must lie in 0..1"),
        ((confidences * np.nan, correct, costs, [2]), "must lie in 0..1"),
    ):
        with pytest.raises(UserError, match=message):
            solve(*wrong)
