"""Pages with code run as they stand and print what they show."""

import pytest

from tests.pages import DOCS, check_page, disagreement, quotations, rewritten

TRAINING_STEP = (DOCS / "training_step.md").read_text(encoding="utf-8")
ADD_YOUR_OWN = (DOCS / "add_your_own.md").read_text(encoding="utf-8")
TEMPLATE = DOCS.parent / "examples" / "fourth_method"


def test_the_training_step_prints_what_its_page_shows():
    check_page(TRAINING_STEP)


def test_the_exploration_of_the_page_keeps_its_promises():
    check_page(ADD_YOUR_OWN)


LITTLE = """
```python
import torch
x = torch.arange(6.0).view(2, 3)
```

```python
print("shape", list(x.shape), f"mean {x.mean():.3f}, small {1.234e-5:.2e}")
```

```text
shape [2, 3] mean 2.500, small 1.23e-05
```
"""


def test_a_page_may_be_off_by_what_rounding_explains():
    check_page(LITTLE)
    check_page(LITTLE.replace("2.500", "2.501").replace("1.23e-05", "1.24e-05"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[2, 3] mean", "[2, 4] mean"), ("2.500", "2.600"), ("2.500", "-2.500"), ("1.23e-05", "1.23e-04"),
        ("mean 2", "sum 2"),
        ("```text\nshape [2, 3] mean 2.500, small 1.23e-05\n```\n", ""), (".mean()", ".mode()"),
        ("e-05\n```", "e-05\nmore\n```"),
    ],
)  # fmt: skip
def test_the_page_check_sees_what_is_not_printed(old: str, new: str):
    assert old in LITTLE
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        check_page(LITTLE.replace(old, new))


def test_a_page_can_be_written_anew():
    assert rewritten(LITTLE.replace("2.500", "9.999")) == LITTLE


def test_whole_numbers_must_agree_and_decimals_nearly():
    assert disagreement("42 at 0.123", "42 at 0.124") is None
    assert disagreement("42 at 0.123", "43 at 0.123") and disagreement("42 at 0.123", "42 at 0.133")


def check_quotations(page: str) -> None:
    """What the page shows of a file stands in it."""
    found = quotations(page)
    assert len(found) > 3
    for name, text in found:
        assert text in (TEMPLATE / name).read_text(encoding="utf-8"), f"{name} reads otherwise than the page says"


def test_what_the_page_quotes_of_the_template_stands_there():
    check_quotations(ADD_YOUR_OWN)


def test_the_quotation_check_sees_a_page_that_is_behind():
    with pytest.raises(AssertionError):
        check_quotations(ADD_YOUR_OWN.replace("beta: float = 100.0", "beta: float = 10.0"))
