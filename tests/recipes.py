"""All that the settings of a recipe may be, for hypothesis."""

import math

from hypothesis import strategies as st

from dansm.scale.model.recipe import SETTINGS, Recipe


def values_of(name):
    rules = SETTINGS[name]
    if rules.choices:
        one = st.sampled_from(rules.choices)
    elif rules.kind is int:
        one = st.integers(rules.least, None if rules.most == math.inf else rules.most)
    elif rules.kind is float:
        one = st.floats(rules.least, rules.most)
    elif rules.kind is bool:
        one = st.booleans()
    else:
        one = st.text(st.characters(exclude_categories=["Cs"]))
    if rules.auto:
        one |= st.just("auto")
    if rules.several:
        one = st.lists(one, min_size=not rules.empty, max_size=4).map(tuple)
    return st.none() | one if rules.optional else one


recipes = st.fixed_dictionaries({name: values_of(name) for name in SETTINGS}).map(
    lambda settings: settings | {"target": settings["target"] if settings["flow"] == "diffusion" else "noise"}
).map(lambda settings: Recipe(**settings))
