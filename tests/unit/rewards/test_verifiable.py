"""Answers that can be checked, with the real math-verify."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rlsys.errors import DataError
from rlsys.records import Prompt, Response
from rlsys.rewards import exact_match, math_verify


def prompt(answer):
    return Prompt(epoch=0, index=4, text="?", token_ids=(1,), answer=answer)


def response(text, finished=True):
    return Response(text=text, finished=finished)


@pytest.mark.parametrize(
    ("text", "finished", "reward"),
    [("19", True, 1.0), (" 19\n", True, 1.0), ("19", False, 0.0), ("19.0", True, 0.0), ("", True, 0.0)],
)
def test_exact_match_ignores_only_surrounding_whitespace(text, finished, reward):
    assert exact_match(prompt("19"), response(text, finished)) == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "The answer is $0.5$.", 1.0),
        (r"$\frac{1}{2}$", r"so \boxed{\frac{2}{4}}", 1.0),
        ("1/2", "0.51", 0.0),
        (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
        (r"2\sqrt{3}", "2", 0.0),
        ("(1,2)", "(1,2)", 1.0),
        ("(1,2)", "$(1, 2)$", 1.0),
        (r"\{1,2\}", r"$\{2,1\}$", 1.0),
        ("1,234", "1234", 1.0),
        ("#### 72", "I think it is 72", 1.0),
        ("72", "no idea", 0.0),
        ("72", "", 0.0),
        ("72", r"$\frac{1}{$", 0.0),
    ],
)
def test_equal_mathematics_is_right_and_unreadable_mathematics_wrong(answer, text, reward):
    assert math_verify(prompt(answer), response(text)) == reward


def test_a_cut_off_response_is_wrong():
    assert math_verify(prompt("72"), response("72", finished=False)) == 0.0


@pytest.mark.parametrize("answer", ["", "???", r"\frac{1}{"])
def test_an_unreadable_answer_is_an_error_of_the_data(answer):
    with pytest.raises(DataError, match=r"prompt 4 of epoch 0: answer .* is not mathematics"):
        math_verify(prompt(answer), response("72"))


def test_math_verify_works_outside_the_main_thread():
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(math_verify, prompt("1/2"), response("$0.5$")).result() == 1.0
