"""Numbers that make no sense, whatever the notebook, configuration or command that they are given to."""

import math

# Least values by name; 0 in `batch_size` and `lr` is the setting's own. A round takes half of `steps`, and it takes two
# of `samples`, `reference_samples` and `n_prompts` to see a variance.
LEAST = (
    dict.fromkeys(("seed", "batch_size", "lr", "lam_init", "bonus", "explore", "equal_steps"), 0)
    | dict.fromkeys(("n_pairs", "max_rounds", "max_new_tokens", "max_length", "rounds", "pairs", "labels"), 1)
    | dict.fromkeys(("highest_rank", "fit_steps", "n_seeds"), 1)
    | dict.fromkeys(("steps", "samples", "reference_samples", "n_prompts", "n_objects", "n_tools"), 2)
)
POSITIVE = ("beta", "share_allowed", "coverage")
# Seeds are counted on from; the bench has so many words.
LARGEST = {"seed": 2**31 - 1, "n_objects": 10, "n_tools": 10, "share_allowed": 1}
CHOICES = {"budget_from": ("absolute", "reference")}
SINGULAR = {"seeds": "seed", "budgets": "budget"}


def require(name, value):
    """ValueError where the number of a parameter `name` makes no sense, or its text is not one of CHOICES."""
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{value!r}; expected {' or '.join(CHOICES[name])}")
    if not isinstance(value, int | float):  # nothing, a text, or several
        return
    if not math.isfinite(value):
        raise ValueError(f"{value}; expected a finite number")
    if name in LEAST and value < LEAST[name]:
        raise ValueError(f"{value}; expected at least {LEAST[name]}")
    if name in POSITIVE and value <= 0:
        raise ValueError(f"{value}; expected more than 0")
    if name in LARGEST and value > LARGEST[name]:
        raise ValueError(f"{value}; expected at most {LARGEST[name]}")


def refused(arguments):
    """What is wrong, in one line, with the first of a command's arguments {name: number, or a list of them} that is out
    of range, or is there twice; None where all make sense."""
    for name, given in arguments.items():
        given = given if isinstance(given, list) else [given]
        if len(set(given)) < len(given):  # a mean over seeds, or a table, would count it twice
            return f"--{name.replace('_', '-')} {' '.join(map(str, given))}; expected each once"
        for value in given:
            try:
                require(SINGULAR.get(name, name), value)
            except ValueError as error:
                return f"--{name.replace('_', '-')} {error}"
    return None
