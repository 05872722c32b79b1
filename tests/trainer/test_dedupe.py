"""Exact and near duplicates go, different answers stay; nothing like a holdout row is left to train on."""

from __future__ import annotations

from skerry.trainer.data.dedupe import remove_contaminated, remove_duplicates

LONG = "Return the sum of the array elements over the given axis, with the result in the same type as the input has"


def test_exact_duplicates_ignore_case_and_space(chat):
    kept, exact, near = remove_duplicates([chat("What is a?", "It is  A."), chat("what is a?", "it is a.")])
    assert (len(kept), exact, near) == (1, 1, 0)


def test_near_duplicates_of_long_answers_go_whatever_was_asked(chat):
    rows = [chat("about sum", LONG), chat("about nansum", LONG + " too"), chat("about mean", "Compute the arithmetic "
            "mean of what was given, along the axis that was named, ignoring nothing at all")]  # fmt: skip
    kept, exact, near = remove_duplicates(rows)
    assert [row["messages"][0]["content"] for row in kept] == ["about sum", "about mean"]
    assert (exact, near) == (0, 1)


def test_short_answers_to_different_questions_stay(chat):
    kept, exact, near = remove_duplicates([chat("Is water wet?", "Yes."), chat("Does the sun shine?", "Yes.")])
    assert (len(kept), exact, near) == (2, 0, 0)


def test_contamination_is_taken_out_of_training(chat):
    train, dropped = remove_contaminated([chat("q1", LONG + " do"), chat("q2", "Something else entirely, " * 4)],
                                         [chat("h", LONG)])  # fmt: skip
    assert dropped == 1 and [row["messages"][0]["content"] for row in train] == ["q2"]


def test_nothing_in_nothing_out():
    assert remove_duplicates([]) == ([], 0, 0)
    assert remove_contaminated([], []) == ([], 0)
