"""Arithmetic questions such as `12+345=`, made on the fly, with the exact answer."""

from rlsys.config import ArithmeticTask
from rlsys.errors import ConfigError
from rlsys.records import Prompt, Response
from rlsys.tasks.base import Item, Task
from rlsys.tasks.seeding import Permutation


class Arithmetic(Task):
    """Every question of the configured shape exactly once, in an order fixed by `seed`; the first are held out.

    Operands are uniform on 0..10^digits-1. One permutation of all questions gives both sets, so they are
    disjoint by construction and together complete, however large the space.
    """

    chat = False

    def __init__(self, config: ArithmeticTask, seed: int) -> None:
        """Raises ConfigError if `task.eval_size` leaves no question to train on, or no operator is given."""
        self._operators = tuple(dict.fromkeys(config.operators))
        if not self._operators:
            raise ConfigError("task.operators=(): expected at least one of +, -, *")
        self._operands, self._bound, self._eval_size = config.operands, 10**config.digits, config.eval_size
        questions = self._bound**config.operands * len(self._operators) ** (config.operands - 1)
        self.size = questions - config.eval_size
        if self.size < 1:
            raise ConfigError(f"task.eval_size={config.eval_size}: allowed: < {questions}, the number of questions")
        self._order = Permutation(questions, seed, "arithmetic")

    def train_item(self, index: int) -> Item:
        """Training question `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"training item {index} is outside 0..{self.size - 1}")
        return self._question(self._order(self._eval_size + index))

    def eval_items(self) -> list[Item]:
        """The held-out questions."""
        return [self._question(self._order(index)) for index in range(self._eval_size)]

    def score(self, prompt: Prompt, response: Response) -> float:
        """1.0 if the response ended by itself and is exactly the answer, else 0.0."""
        return float(response.finished and response.text == prompt.answer)

    def alphabet(self) -> str:
        """Digits, operators, `=`, and the minus sign of negative answers (only `-` can make one)."""
        return "".join(sorted({*"0123456789=", *self._operators}))

    def _question(self, number: int) -> Item:
        """Question `number`, read as digits of a mixed radix: operand, operator, operand, ..."""
        number, operand = divmod(number, self._bound)
        text, total, term = str(operand), 0, operand  # value = total + term; `*` binds to the term
        for _ in range(self._operands - 1):
            number, choice = divmod(number, len(self._operators))
            number, operand = divmod(number, self._bound)
            operator = self._operators[choice]
            text += f"{operator}{operand}"
            if operator == "*":
                term *= operand
            else:
                total, term = total + term, operand if operator == "+" else -operand
        return Item(f"{text}=", str(total + term))
